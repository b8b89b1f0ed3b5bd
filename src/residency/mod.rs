//! What may be where, and where things are.
//!
//! Owns the two questions on which every placement rests: in which Region is this node ([`whereabouts`]), and
//! which regions does this policy permit for this kind of data ([`permissions`]).
//! Never does I/O, never reads a clock, and never guesses: a node that cannot be placed with certainty is
//! nowhere, and nowhere is never permitted.

pub mod attestation;
pub mod permissions;
pub mod whereabouts;

pub use permissions::{Permissions, Refusal};
pub use whereabouts::{NodeFacts, Whereabouts, locate};
