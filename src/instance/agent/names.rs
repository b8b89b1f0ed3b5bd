//! How the instance and its volume are named in votes.
//!
//! Owns the form `NAME/VOLUME`: the name is the slot that stays, the volume is who voted.
//! The witness is `witness/UID`.
//! Never: lets a re-made volume, or a re-made object, pass for the one before it.

const WITNESS: &str = "witness";

/// The voter that is this volume in this slot.
#[must_use]
pub fn voter(instance: &str, volume: &str) -> String {
    format!("{instance}/{volume}")
}

/// The voter that is this object.
#[must_use]
pub fn witness(uid: &str) -> String {
    format!("{WITNESS}/{uid}")
}

/// Whether a voter is a witness. No instance has its name: theirs end in a number.
#[must_use]
pub fn is_witness(voter: &str) -> bool {
    instance_of(voter) == WITNESS
}

/// The slot of a voter.
#[must_use]
pub fn instance_of(voter: &str) -> &str {
    voter.split_once('/').map_or(voter, |(name, _)| name)
}
