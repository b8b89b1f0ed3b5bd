//! Regimes, clocks and calendars: until when a request must be acknowledged and answered.
//!
//! - [`mod@rules`]: what a regime is made of
//! - [`regimes`]: the regimes, as data, each clock with its citation
//! - [`calendar`]: business days and holidays by rule
//! - [`mod@clocks`]: the deadlines of one request, and their extension
//!
//! Pure: never reads a clock and never does I/O; the time-zone database is part of the program, so every replica
//! gives the same answer whatever its image holds.
//!
//! Where a law can be read in more than one way, the reading that ends first is taken: a deadline that is a day too
//! early costs nothing, one that is a day too late is a breach. `docs/deadlines.md` says which readings these are.

pub mod calendar;
pub mod clocks;
pub mod regimes;
pub mod rules;

#[cfg(test)]
mod tests;

pub use clocks::{Clocks, Error, Extendable, Refusal, clocks, extend};
pub use regimes::rules;
pub use rules::{Kind, Rules, Verification, needs_approval_allowed, verification};
