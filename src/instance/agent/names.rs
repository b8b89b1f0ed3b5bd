//! How the instance and its volume are named in votes.
//!
//! Owns the form `NAME/VOLUME`: the name is the slot that stays, the volume is who voted.
//! Never: lets a re-made volume pass for the one before it.

/// The voter that is this volume in this slot.
#[must_use]
pub fn voter(instance: &str, volume: &str) -> String {
    format!("{instance}/{volume}")
}

/// The slot of a voter.
#[must_use]
pub fn instance_of(voter: &str) -> &str {
    voter.split_once('/').map_or(voter, |(name, _)| name)
}
