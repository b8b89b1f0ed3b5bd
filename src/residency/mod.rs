//! What may be where, and where things are.
//!
//! Owns the two questions on which every placement rests: in which Region is this node ([`whereabouts`]), and
//! which regions does this policy permit for this kind of data ([`permissions`]); and what follows from the two for
//! pods that are bound ([`binding`]), volumes ([`volumes`]) and what is there already ([`violations`], [`forbidden`]).
//! Never does I/O, never reads a clock, and never guesses: a node that cannot be placed with certainty is
//! nowhere, and nowhere is never permitted.

pub mod attestation;
pub mod binding;
pub mod forbidden;
pub mod permissions;
pub mod violations;
pub mod volumes;
pub mod whereabouts;

pub use permissions::{Permissions, Refusal};
pub use whereabouts::{Account, NodeFacts, Whereabouts, accounts, locate};
