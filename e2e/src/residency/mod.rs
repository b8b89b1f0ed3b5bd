//! What becomes of copies that get outside, measured on the test bed: `bench residency`.
//!
//! **What is measured.** For each case the time from the moment at which the change was sent to the API server (so that it
//! was visible no earlier) until it is *found*: refused, or said in the store's condition Resident; and until it is
//! *fenced*: no PostgreSQL of that copy runs any more, as the machine's own list of processes has it, whatever any object
//! says. What is refused has a row of its own: how
//! long that took.
//!
//! **Several stores at once.** A node or a policy that changes concerns each of three stores: each copy that gets outside is a
//! sample of its own. The machine is the busier for it, so that the times are rather too long.
//!
//! Never judges by what the product says of itself whether a copy is stopped.

pub mod bench;
pub mod case;
pub mod drift;
pub mod failovers;
pub mod ground;
pub mod history;
pub mod refused;
pub mod sample;
pub mod stranger;
pub mod volume;
pub mod worker;
