//! What would happen if some instances died now.
//!
//! Owns the answer, by the protocol's own arithmetic of quorums ([`Configuration`], [`crate::failover::Rule`]).
//! Pure. Never promises what a vote could still refuse: an instance counts only if it is well now, and of several
//! that could be elected it names all.

use std::collections::BTreeSet;

use crate::api::PrivacyDataStore;
use crate::api::privacy_data_store::{Durability as Wished, InstanceRole, InstanceStatus};
use crate::failover::{Configuration, Durability, Rule};

/// A voter, as `INSTANCE/VOLUME`.
pub type Voter = String;

/// What would come of it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// The primary goes on.
    Stays(Commits),
    /// One of these is elected, the likely one first.
    Elects(Vec<Voter>, Commits),
    /// Nobody serves until some come back.
    Down {
        /// Why.
        why: String,
        /// Those who are left can't know all that was acknowledged.
        blind: bool,
    },
}

/// Whether commits are acknowledged.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Commits {
    /// They are.
    GoOn,
    /// They wait for so many more standbys.
    Wait(usize),
}

/// What the instances have agreed on, for the arithmetic.
#[must_use]
pub fn configuration(store: &PrivacyDataStore) -> Option<Configuration<Voter>> {
    let agreed = store.status.as_ref()?.configuration.as_ref()?;
    let set = |names: &[String]| names.iter().cloned().collect::<BTreeSet<_>>();
    Some(Configuration {
        term: agreed.term.unsigned_abs(),
        version: agreed.version.unsigned_abs(),
        primary: agreed.primary.clone()?,
        voters: set(&agreed.voters),
        witness: agreed.witness.clone(),
        sync: Rule {
            members: set(&agreed.sync_members),
            acks: usize::try_from(agreed.acks).unwrap_or(0),
        },
        durability: match store.spec.durability {
            Wished::Required => Durability::Required,
            Wished::Preferred => Durability::Preferred,
        },
        may_be_primary: set(&agreed.may_be_primary),
    })
}

/// The voters that are well: those that serve; while nobody is primary, those that report themselves and are not
/// failed. The witness is taken to be there.
#[must_use]
pub fn well(
    configuration: &Configuration<Voter>,
    instances: &[InstanceStatus],
    serving: bool,
) -> BTreeSet<Voter> {
    let is_well = |voter: &Voter| {
        let name = voter.split_once('/').map_or(voter.as_str(), |(n, _)| n);
        let Some(entry) = instances.iter().find(|i| i.name == name) else {
            return false;
        };
        // Another volume in the same slot is another voter.
        let same = entry
            .id
            .as_ref()
            .is_none_or(|id| *voter == format!("{name}/{id}"));
        let there = matches!(
            entry.role,
            Some(InstanceRole::Starting | InstanceRole::Standby | InstanceRole::Primary)
        );
        same && entry.fenced != Some(true) && (entry.ready == Some(true) || (!serving && there))
    };
    configuration
        .voters
        .iter()
        .filter(|v| configuration.witness.as_ref() == Some(*v) || is_well(v))
        .cloned()
        .collect()
}

/// What happens if of the `well` voters those in `dead` die at once, and stay dead.
#[must_use]
pub fn what_if(
    configuration: &Configuration<Voter>,
    well: &BTreeSet<Voter>,
    dead: &BTreeSet<Voter>,
) -> Outcome {
    let left: BTreeSet<Voter> = well.difference(dead).cloned().collect();
    let voters = configuration.voters.len();
    let count = configuration.voters.intersection(&left).count();
    let primary = &configuration.primary;
    let knows = left.contains(primary);
    let heard = configuration.sync.members.intersection(&left).count();
    let enough = configuration.sync.quorum().is_some_and(|q| heard >= q);
    let blind = !knows && !enough;
    if !configuration.majority(&left) {
        let why = format!("{count} of {voters} voters are left, and a majority is needed");
        return Outcome::Down { why, blind };
    }
    let copies: Vec<&Voter> = configuration
        .copies()
        .filter(|v| left.contains(*v))
        .collect();
    let commits = |standbys: usize| {
        let acks = configuration.acks(standbys);
        if standbys >= acks {
            Commits::GoOn
        } else {
            Commits::Wait(acks - standbys)
        }
    };
    if knows {
        return Outcome::Stays(commits(copies.len().saturating_sub(1)));
    }
    if !enough {
        let why = match configuration.sync.quorum() {
            None => "only the primary has all that was acknowledged".to_owned(),
            Some(needed) => format!(
                "{heard} of those whose flush commits wait for are left, and {needed} are needed to know what was acknowledged"
            ),
        };
        return Outcome::Down { why, blind };
    }
    let mut candidates: Vec<Voter> = copies
        .iter()
        .filter(|v| configuration.may_be_primary.contains(**v))
        .map(|v| (*v).clone())
        .collect();
    if candidates.is_empty() {
        let why = "none of those left may be primary".to_owned();
        return Outcome::Down { why, blind };
    }
    // Those with every acknowledged commit first: the others would have to catch up from them.
    candidates.sort_by_key(|v| (!configuration.sync.members.contains(v), v.clone()));
    Outcome::Elects(candidates, commits(copies.len().saturating_sub(1)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn set(of: &[&str]) -> BTreeSet<Voter> {
        of.iter().map(|s| (*s).to_owned()).collect()
    }

    fn three(durability: Durability) -> Configuration<Voter> {
        Configuration {
            term: 2,
            version: 1,
            primary: "a".into(),
            voters: set(&["a", "b", "c"]),
            witness: None,
            sync: Rule {
                members: set(&["b", "c"]),
                acks: 1,
            },
            durability,
            may_be_primary: set(&["a", "b"]),
        }
    }

    #[test]
    fn three_copies_survive_any_one() {
        let c = three(Durability::Required);
        let all = set(&["a", "b", "c"]);
        assert_eq!(
            what_if(&c, &all, &set(&["c"])),
            Outcome::Stays(Commits::GoOn)
        );
        assert_eq!(
            what_if(&c, &all, &set(&["a"])),
            Outcome::Elects(vec!["b".into()], Commits::GoOn)
        );
        assert!(matches!(
            what_if(&c, &all, &set(&["a", "b"])),
            Outcome::Down { blind: true, .. }
        ));
        assert!(matches!(
            what_if(&c, &all, &set(&["b", "c"])),
            Outcome::Down { blind: false, .. }
        ));
    }

    #[test]
    fn nobody_is_elected_where_none_may_be() {
        let mut c = three(Durability::Required);
        c.may_be_primary = set(&["a"]);
        let outcome = what_if(&c, &set(&["a", "b", "c"]), &set(&["a"]));
        let Outcome::Down { why, blind } = outcome else {
            panic!("{outcome:?}")
        };
        assert_eq!(
            (why.as_str(), blind),
            ("none of those left may be primary", false)
        );
    }

    #[test]
    fn two_with_a_witness_elect_and_wait_under_required() {
        let two = |durability| Configuration {
            voters: set(&["a", "b", "w"]),
            witness: Some("w".into()),
            sync: Rule {
                members: set(&["b"]),
                acks: 1,
            },
            ..three(durability)
        };
        let (all, dead) = (set(&["a", "b", "w"]), set(&["a"]));
        let elects = |commits| Outcome::Elects(vec!["b".into()], commits);
        assert_eq!(
            what_if(&two(Durability::Required), &all, &dead),
            elects(Commits::Wait(1))
        );
        assert_eq!(
            what_if(&two(Durability::Preferred), &all, &dead),
            elects(Commits::GoOn)
        );
        // Alone under Preferred, only the primary knows.
        let mut alone = two(Durability::Preferred);
        alone.sync = Rule::default();
        assert!(matches!(
            what_if(&alone, &all, &dead),
            Outcome::Down { blind: true, .. }
        ));
    }

    const NAMES: [&str; 6] = ["a", "b", "c", "d", "e", "f"];

    fn some() -> impl Strategy<Value = BTreeSet<Voter>> {
        proptest::sample::subsequence(&NAMES[..], 0..=6).prop_map(|v| set(&v))
    }

    fn configurations() -> impl Strategy<Value = Configuration<Voter>> {
        let voters = proptest::sample::subsequence(&NAMES[..], 1..=6);
        let rest = (some(), some(), 0usize..4, any::<bool>(), any::<bool>());
        (voters, rest).prop_map(|(voters, (members, may, acks, required, witness))| {
            let voters = set(&voters);
            let primary = voters.first().cloned().unwrap();
            let witness = voters.last().cloned().filter(|w| witness && *w != primary);
            let data = |s: &BTreeSet<Voter>| -> BTreeSet<Voter> {
                s.intersection(&voters)
                    .filter(|v| Some(*v) != witness.as_ref())
                    .cloned()
                    .collect()
            };
            let mut members = data(&members);
            members.remove(&primary);
            let durability = if required {
                Durability::Required
            } else {
                Durability::Preferred
            };
            Configuration {
                term: 2,
                version: 1,
                sync: Rule { members, acks },
                may_be_primary: data(&may),
                primary,
                voters,
                witness,
                durability,
            }
        })
    }

    proptest! {
        /// Whoever is elected: every way in which a commit could have been acknowledged left it with somebody.
        #[test]
        fn an_election_knows_every_acknowledged_commit(c in configurations(), well in some(), dead in some(), acked in some()) {
            if let Outcome::Elects(candidates, _) = what_if(&c, &well, &dead) {
                let left: BTreeSet<Voter> = well.difference(&dead).cloned().collect();
                let by: BTreeSet<Voter> = acked.intersection(&c.sync.members).cloned().collect();
                if c.sync.acks > 0 && c.sync.satisfied(&by) {
                    prop_assert!(by.intersection(&left).next().is_some());
                }
                prop_assert!(c.majority(&left));
                for candidate in candidates {
                    prop_assert!(left.contains(&candidate) && c.may_be_primary.contains(&candidate));
                    prop_assert!(c.witness.as_ref() != Some(&candidate));
                }
            }
        }

        /// More deaths never bring a store up, and a minority never serves.
        #[test]
        fn it_only_gets_worse(c in configurations(), well in some(), dead in some(), more in some()) {
            let before = what_if(&c, &well, &dead);
            let dead: BTreeSet<Voter> = dead.union(&more).cloned().collect();
            let after = what_if(&c, &well, &dead);
            if matches!(before, Outcome::Down { .. }) {
                prop_assert!(matches!(after, Outcome::Down { .. }), "{:?} then {:?}", before, after);
            }
            if !matches!(after, Outcome::Down { .. }) {
                let left: BTreeSet<Voter> = well.difference(&dead).cloned().collect();
                prop_assert!(c.majority(&left));
            }
        }

        /// Under Required, commits go on only where enough copies beside the primary are left to flush them.
        #[test]
        fn required_never_acknowledges_with_too_few(c in configurations(), well in some(), dead in some()) {
            if c.durability == Durability::Required
                && let Outcome::Stays(Commits::GoOn) | Outcome::Elects(_, Commits::GoOn) = what_if(&c, &well, &dead)
            {
                let copies = c.copies().filter(|v| well.contains(*v) && !dead.contains(*v)).count();
                prop_assert!(copies > (c.copies().count() / 2).max(1));
            }
        }
    }
}
