//! Failover decided by the instances: who is primary, what was acknowledged, who may vote.
//!
//! Owns the protocol: [`Node::step`] takes what happened and returns what to do. `instance::agent` does it.
//! Never: does I/O, reads a clock or makes randomness of its own (time and a seed are arguments), or assumes
//! that the voters share an API server.
//!
//! # The idea
//! A commit is acknowledged once enough synchronous standbys have flushed it. A standby that has stopped its
//! own receiver can no longer acknowledge for the old primary. So if enough standbys stop, *then* say how far
//! they got, the old primary can acknowledge nothing any more, wherever it is and whatever it believes, and
//! what was acknowledged is on one of them. No lease has to run out first.
//!
//! The quorum part is Paxos with a lease (a term is a ballot, promised to its coordinator; a configuration is
//! the value), with PostgreSQL's synchronous rule as a second quorum system that must meet the first. The
//! rules are numbered as in docs/failover.md.
//!
//! # What always holds
//! - At most one configuration is proposed per (term, version); a term has one primary, its coordinator.
//! - A voter answers a vote only after its receiver (or its PostgreSQL, if it was a primary) is gone and the
//!   promise is on disk.
//! - A commit acknowledged by anyone is on every later primary.
//! - Nobody is promoted who is not in `may_be_primary` of a configuration that a majority has accepted; nor one whom the
//!   operator calls outside, once a majority has heard of it.
//! - A copy whose content isn't certain (`rebuilding`) is counted as a vote, never as data.

mod candidate;
mod change;
mod election;
mod follower;
mod history;
mod message;
mod node;
mod planted;
mod primary;
mod promotion;
mod types;
mod voter;
mod witness;

pub use election::Phase;
pub use history::{Era, History, KEPT, Relation, held, newest, relation};
pub use message::{Copy, Effect, Event, Message, Story, Streaming, Wish};
pub use node::{Local, Node, Role, Timing, Wanted};
pub use types::{Configuration, Durability, Durable, Id, Lsn, Millis, Rule, Term};
pub use witness::{Register, Watch};

#[cfg(test)]
mod tests;
