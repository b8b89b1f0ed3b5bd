//! The synchronous rule: whose acknowledgement a commit waits for.
//!
//! Owns `synchronous_standby_names`, from the store's durability, its instances, and who streams.
//! Never: reads a clock (times are arguments), and under `Required` never looks at who is there: a rule that
//! shrinks to what is alive would acknowledge commits that one more loss takes away.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;
use std::time::Duration;

use crate::api::names;
use crate::api::privacy_data_store::Durability;

/// Whose acknowledgement a commit waits for.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Rule {
    /// How many.
    pub acks: usize,
    /// Of whom, sorted.
    pub members: BTreeSet<String>,
}

impl Rule {
    /// As PostgreSQL's `synchronous_standby_names`.
    #[must_use]
    pub fn render(&self) -> String {
        if self.acks == 0 || self.members.is_empty() {
            return String::new();
        }
        let mut out = format!("ANY {} (", self.acks);
        for (i, member) in self.members.iter().enumerate() {
            let separator = if i == 0 { "" } else { ", " };
            let _ = write!(out, "{separator}\"{}\"", member.replace('"', "\"\""));
        }
        out.push(')');
        out
    }
}

/// How long a standby streams before a `Preferred` rule counts on it (again): one that comes and goes would
/// otherwise hold commits up each time it goes.
pub const STEADY: Duration = Duration::from_secs(5);

/// The names of the other instances: those listed in the store's status, or, as long as nobody else is
/// listed, those its placement will bring.
#[must_use]
pub fn others(
    store: &str,
    me: &str,
    listed: &BTreeSet<String>,
    desired: usize,
) -> BTreeSet<String> {
    let listed: BTreeSet<String> = listed.iter().filter(|n| *n != me).cloned().collect();
    if !listed.is_empty() {
        return listed;
    }
    (1..=u32::try_from(desired).unwrap_or(u32::MAX).min(64))
        .map(|slot| names::instance(store, slot))
        .filter(|n| n != me)
        .take(desired.saturating_sub(1))
        .collect()
}

/// How many acknowledgements survive the loss of an instance: half of all, at least one.
#[must_use]
pub fn acks(others: usize) -> usize {
    usize::midpoint(others, 1).max(1)
}

/// The rule. `streaming` says for how long each standby has been streaming without a break.
#[must_use]
pub fn rule(
    durability: Durability,
    store: &str,
    others: &BTreeSet<String>,
    streaming: &BTreeMap<String, Duration>,
    now: &Rule,
) -> Rule {
    match durability {
        Durability::Required => Rule {
            acks: acks(others.len()),
            // Alone, and yet a commit must wait: for a name that no instance ever has (slots begin at 1).
            members: if others.is_empty() {
                BTreeSet::from([names::instance(store, 0)])
            } else {
                others.clone()
            },
        },
        Durability::Preferred => {
            let members: BTreeSet<String> = others
                .iter()
                .filter(|name| {
                    streaming
                        .get(*name)
                        .is_some_and(|since| *since >= STEADY || now.members.contains(*name))
                })
                .cloned()
                .collect();
            Rule {
                acks: acks(others.len()).min(members.len()),
                members,
            }
        }
    }
}

/// Whether a commit now waits for enough standbys that are there: the rule is in force, asks for as many as
/// durability means, and that many of its members stream.
#[must_use]
pub fn durable(
    rule: &Rule,
    in_force: bool,
    others: usize,
    streaming: &BTreeMap<String, Duration>,
) -> bool {
    let present = rule
        .members
        .iter()
        .filter(|m| streaming.contains_key(*m))
        .count();
    in_force && rule.acks >= acks(others) && present >= rule.acks
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn set(names: &[&str]) -> BTreeSet<String> {
        names.iter().map(|n| (*n).to_owned()).collect()
    }

    fn since(of: &[(&str, u64)]) -> BTreeMap<String, Duration> {
        of.iter()
            .map(|(n, s)| ((*n).to_owned(), Duration::from_secs(*s)))
            .collect()
    }

    #[test]
    fn half_of_the_instances_and_at_least_one() {
        // n instances, n - 1 others, floor(n / 2) acknowledgements.
        for n in 2usize..=9 {
            assert_eq!(acks(n - 1), n / 2, "{n} instances");
        }
        assert_eq!(acks(0), 1);
    }

    #[test]
    fn required_never_looks_at_who_is_there() {
        let others = set(&["s-2", "s-3"]);
        let rule = |streaming: &_| {
            rule(
                Durability::Required,
                "s",
                &others,
                streaming,
                &Rule::default(),
            )
        };
        assert_eq!(rule(&since(&[])).render(), r#"ANY 1 ("s-2", "s-3")"#);
        assert_eq!(rule(&since(&[])), rule(&since(&[("s-2", 60)])));
    }

    #[test]
    fn required_waits_even_before_anybody_else_is_listed() {
        let others = others("s", "s-1", &set(&["s-1"]), 3);
        assert_eq!(others, set(&["s-2", "s-3"]));
        let alone = rule(
            Durability::Required,
            "s",
            &BTreeSet::new(),
            &since(&[]),
            &Rule::default(),
        );
        assert_eq!(alone.render(), r#"ANY 1 ("s-0")"#);
    }

    #[test]
    fn the_listed_count_not_the_wished() {
        assert_eq!(others("s", "s-2", &set(&["s-2", "s-4"]), 3), set(&["s-4"]));
        // The primary isn't always the first slot.
        assert_eq!(others("s", "s-2", &set(&[]), 2), set(&["s-1"]));
    }

    #[test]
    fn preferred_shrinks_at_once_and_grows_when_steady() {
        let others = set(&["s-2", "s-3"]);
        let go = |streaming: &[(&str, u64)], now: &Rule| {
            rule(Durability::Preferred, "s", &others, &since(streaming), now)
        };
        let none = Rule::default();
        assert_eq!(go(&[], &none).render(), "");
        assert_eq!(go(&[("s-2", 1)], &none).render(), "");
        let one = go(&[("s-2", 5)], &none);
        assert_eq!(one.render(), r#"ANY 1 ("s-2")"#);
        let both = go(&[("s-2", 9), ("s-3", 5)], &one);
        assert_eq!(both.render(), r#"ANY 1 ("s-2", "s-3")"#);
        // A member that reconnected between two looks stays; one that is gone goes.
        assert_eq!(go(&[("s-3", 0)], &both).render(), r#"ANY 1 ("s-3")"#);
        assert_eq!(go(&[], &both).render(), "");
    }

    #[test]
    fn durable_means_enough_are_there() {
        let others = set(&["s-2", "s-3"]);
        let r = rule(
            Durability::Required,
            "s",
            &others,
            &since(&[]),
            &Rule::default(),
        );
        assert!(durable(&r, true, 2, &since(&[("s-3", 0)])));
        assert!(!durable(&r, false, 2, &since(&[("s-3", 0)])));
        assert!(!durable(&r, true, 2, &since(&[("s-9", 0)])));
        assert!(!durable(&Rule::default(), true, 2, &since(&[("s-2", 9)])));
    }

    proptest! {
        #[test]
        fn required_always_waits(
            listed in proptest::collection::btree_set(1u32..9, 0..9), me in 1u32..9, desired in 1usize..9,
        ) {
            let listed: BTreeSet<String> = listed.iter().map(|s| names::instance("s", *s)).collect();
            let me = names::instance("s", me);
            let others = others("s", &me, &listed, desired);
            let r = rule(Durability::Required, "s", &others, &BTreeMap::new(), &Rule::default());
            prop_assert!(r.acks >= 1 && r.acks <= r.members.len());
            prop_assert!(!r.members.contains(&me) && !r.render().is_empty());
        }
    }
}
