//! What instances agree about, and what each keeps on its volume.
//!
//! Owns the vocabulary: terms, configurations, the synchronous rule, and the arithmetic of quorums. How copies
//! compare is `history`.
//! Never: does I/O, or reads a clock.

use std::collections::BTreeSet;
use std::fmt::Debug;
use std::hash::Hash;

use serde::{Deserialize, Serialize};

use super::history::History;

/// Milliseconds on a clock that never goes back and counts suspended time (`CLOCK_BOOTTIME`).
pub type Millis = u64;
/// A term: the number of an election. It only ever rises.
pub type Term = u64;
/// A byte position in the write-ahead log.
pub type Lsn = u64;

/// The identity of a voter: its volume, not its name. The instance uses `NAME/VOLUME`; model and simulation
/// use small numbers.
pub trait Id: Clone + Ord + Hash + Debug {}
impl<T: Clone + Ord + Hash + Debug> Id for T {}

/// Whose acknowledgement a commit waits for.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Rule<I: Id> {
    /// Who may acknowledge.
    pub members: BTreeSet<I>,
    /// How many of them must. More than there are members: commits wait until there are.
    pub acks: usize,
}

impl<I: Id> Default for Rule<I> {
    fn default() -> Self {
        Self {
            members: BTreeSet::new(),
            acks: 0,
        }
    }
}

impl<I: Id> Rule<I> {
    /// Whether every set of acknowledgements that satisfies this also satisfies `other`.
    #[must_use]
    pub fn implies(&self, other: &Self) -> bool {
        if self.acks > self.members.len() {
            // Nothing satisfies it.
            return true;
        }
        // In the worst case all acknowledgements come from outside the other's members.
        let outside = self.members.difference(&other.members).count();
        self.acks.saturating_sub(outside) >= other.acks
    }

    /// One rule that satisfies both: the stricter one where there is one, else `n` of the union on the safe
    /// side.
    #[must_use]
    pub fn joint(&self, other: &Self) -> Self {
        if self.implies(other) {
            return self.clone();
        }
        if other.implies(self) {
            return other.clone();
        }
        let union: BTreeSet<I> = self.members.union(&other.members).cloned().collect();
        let need = |rule: &Self| union.len() - rule.members.len() + rule.acks;
        Self {
            acks: need(self).max(need(other)),
            members: union,
        }
    }

    /// Whether these acknowledgements satisfy it.
    #[must_use]
    pub fn satisfied(&self, by: &BTreeSet<I>) -> bool {
        self.members.intersection(by).count() >= self.acks
    }

    /// How many members an election must hear, if it doesn't hear the primary, to know every acknowledged
    /// commit; `None` if no number is enough.
    ///
    /// A commit is on at least `acks` members, so it is on one of any `members − acks + 1`. With fewer members
    /// than `acks` nothing was ever acknowledged under this rule alone, but what was acknowledged before it is
    /// on all of them: one is needed. Without members only the primary knows.
    #[must_use]
    pub fn quorum(&self) -> Option<usize> {
        (!self.members.is_empty())
            .then(|| (self.members.len() + 1).saturating_sub(self.acks).max(1))
    }
}

/// Whether commits wait for standbys when there are none.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum Durability {
    /// They wait.
    #[default]
    Required,
    /// They wait for those that are there.
    Preferred,
}

/// What the voters agree on. Ordered by (term, version).
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Configuration<I: Id> {
    /// The term: one election, one primary.
    pub term: Term,
    /// Counts changes within the term, from 1.
    pub version: u64,
    /// The primary of the term; also the one to whom its voters promised the term.
    pub primary: I,
    /// Who votes, the witness included.
    pub voters: BTreeSet<I>,
    /// The voter without data, if there is one.
    pub witness: Option<I>,
    /// The synchronous rule.
    pub sync: Rule<I>,
    /// Whether commits may go on without standbys.
    pub durability: Durability,
    /// Who may become primary: where the residency policy permits one.
    pub may_be_primary: BTreeSet<I>,
}

impl<I: Id> Configuration<I> {
    /// Its place in the order of configurations.
    #[must_use]
    pub fn at(&self) -> (Term, u64) {
        (self.term, self.version)
    }

    /// Whether these are more than half of its voters.
    #[must_use]
    pub fn majority(&self, of: &BTreeSet<I>) -> bool {
        self.voters.intersection(of).count() * 2 > self.voters.len()
    }

    /// Voters with data.
    pub fn copies(&self) -> impl Iterator<Item = &I> {
        self.voters
            .iter()
            .filter(|v| self.witness.as_ref() != Some(*v))
    }

    /// How many acknowledgements its durability asks for, given whom it could wait for: half of the copies,
    /// at least one; under `Preferred` no more than there are.
    #[must_use]
    pub fn acks(&self, members: usize) -> usize {
        let wanted = (self.copies().count() / 2).max(1);
        match self.durability {
            Durability::Required => wanted,
            Durability::Preferred => wanted.min(members),
        }
    }
}

/// What a voter keeps, and has on disk before it answers.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Durable<I: Id> {
    /// The highest term promised. Nothing of a lower one is granted or accepted any more.
    pub promised: Term,
    /// To whom.
    pub coordinator: Option<I>,
    /// The latest configuration accepted.
    pub configuration: Option<Configuration<I>>,
    /// Its copy is being replaced: it votes, but not as data, and is no candidate.
    pub rebuilding: bool,
    /// The eras of its copy, the newest of them.
    pub history: History,
}

impl<I: Id> Default for Durable<I> {
    fn default() -> Self {
        Self {
            promised: 0,
            coordinator: None,
            configuration: None,
            rebuilding: false,
            history: History::new(),
        }
    }
}

impl<I: Id> Durable<I> {
    /// (term, version) of the configuration, (0, 0) if there is none.
    #[must_use]
    pub fn at(&self) -> (Term, u64) {
        self.configuration
            .as_ref()
            .map_or((0, 0), Configuration::at)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn set(of: &[u8]) -> BTreeSet<u8> {
        of.iter().copied().collect()
    }

    fn rule(members: &[u8], acks: usize) -> Rule<u8> {
        Rule {
            members: set(members),
            acks,
        }
    }

    #[test]
    fn joint_rules_prefer_the_stricter_one() {
        let (one, both) = (rule(&[2], 1), rule(&[1, 2], 1));
        assert_eq!(one.joint(&both), one);
        assert_eq!(both.joint(&one), one);
        assert_eq!(rule(&[1], 1).joint(&rule(&[2], 1)), rule(&[1, 2], 2));
        assert_eq!(rule(&[], 0).joint(&both), both);
    }

    #[test]
    fn fewer_members_than_acknowledgements_never_count_as_none_needed() {
        assert_eq!(rule(&[], 0).quorum(), None);
        assert_eq!(rule(&[], 1).quorum(), None);
        assert_eq!(rule(&[1], 2).quorum(), Some(1));
        assert_eq!(rule(&[1, 2], 1).quorum(), Some(2));
        assert_eq!(rule(&[1, 2, 3, 4], 2).quorum(), Some(3));
    }

    proptest! {
        #[test]
        fn whatever_satisfies_the_joint_rule_satisfies_both(
            a in prop::collection::btree_set(0u8..5, 0..5), an in 0usize..4,
            b in prop::collection::btree_set(0u8..5, 0..5), bn in 0usize..4,
            by in prop::collection::btree_set(0u8..5, 0..6),
        ) {
            let (a, b) = (Rule { members: a, acks: an }, Rule { members: b, acks: bn });
            let joint = a.joint(&b);
            if joint.satisfied(&by) {
                prop_assert!(a.satisfied(&by) && b.satisfied(&by));
            }
            if a.implies(&b) && a.satisfied(&by) {
                prop_assert!(b.satisfied(&by));
            }
        }

        #[test]
        fn a_quorum_of_members_meets_every_acknowledgement(
            members in prop::collection::btree_set(0u8..5, 1..5), acks in 0usize..6,
            acked in prop::collection::btree_set(0u8..5, 0..6),
            heard in prop::collection::btree_set(0u8..5, 0..6),
        ) {
            let rule = Rule { members, acks };
            let heard: BTreeSet<u8> = heard.intersection(&rule.members).copied().collect();
            if acks > 0 && rule.satisfied(&acked) && heard.len() >= rule.quorum().unwrap() {
                prop_assert!(heard.intersection(&acked).next().is_some());
            }
        }
    }
}
