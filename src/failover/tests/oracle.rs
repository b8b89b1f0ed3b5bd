//! What must never happen, checked whenever it could have.

use std::collections::BTreeMap;

use super::postgres::Wal;
use crate::failover::{Configuration, Millis, Term};

/// Voters of the simulation: slot + 100 · generation.
pub type V = u32;

/// A commit that a client was told of.
#[derive(Clone, Debug)]
pub struct Acknowledged {
    pub index: usize,
    pub chain: u64,
    pub term: Term,
}

#[derive(Default)]
pub struct Oracle {
    pub acknowledged: Vec<Acknowledged>,
    /// Per term: who was promoted, and with what.
    pub promoted: BTreeMap<Term, (V, Wal)>,
    pub configurations: BTreeMap<(Term, u64), Configuration<V>>,
    /// The latest configuration that certainly has a majority: a primary was promoted, or served, under it. A voter with an
    /// older one may hold anything: every election hears of this one, and goes by its members.
    pub agreed: (Term, u64),
    /// When the first commit of each term was acknowledged.
    pub first: BTreeMap<Term, Millis>,
    /// False once something happened after which rule 6's timing isn't promised.
    pub honest: bool,
    /// A person accepted a loss: commits of lower terms may be missing.
    pub excused: Term,
    pub failure: Option<String>,
}

impl Oracle {
    pub fn fail(&mut self, why: String) {
        if self.failure.is_none() {
            self.failure = Some(why);
        }
    }

    pub fn configuration(&mut self, c: &Configuration<V>) {
        let known = self
            .configurations
            .entry(c.at())
            .or_insert_with(|| c.clone());
        if known != c {
            let why = format!("two configurations at {:?}: {known:?} and {c:?}", c.at());
            self.fail(why);
        }
        if let Some((_, other)) = self
            .configurations
            .range((c.term, 0)..(c.term + 1, 0))
            .next()
            && other.primary != c.primary
        {
            let why = format!("two primaries in term {}", c.term);
            self.fail(why);
        }
    }

    pub fn promotion(&mut self, who: V, configuration: &Configuration<V>, wal: &Wal) {
        let term = configuration.term;
        if let Some((other, _)) = self.promoted.get(&term) {
            let why = format!("term {term}: {other} and {who} promoted");
            return self.fail(why);
        }
        if !configuration.may_be_primary.contains(&who) || configuration.primary != who {
            return self.fail(format!("{who} promoted outside of {configuration:?}"));
        }
        for a in self.acknowledged.iter().filter(|a| a.term >= self.excused) {
            if a.term < term && !wal.holds(a.index, a.chain) {
                let why = format!(
                    "lost: record {} acknowledged in term {} isn't on {who}, promoted in term {term}",
                    a.index, a.term
                );
                return self.fail(why);
            }
        }
        self.promoted.insert(term, (who, wal.clone()));
    }

    /// A client of the primary of `term` is told that a commit is durable.
    pub fn acknowledge(&mut self, now: Millis, who: V, term: Term, index: usize, chain: u64) {
        for (later, (other, wal)) in self.promoted.range(term + 1..) {
            if *later < self.excused || term < self.excused {
                continue;
            }
            if !wal.holds(index, chain) {
                let why = format!(
                    "lost: record {index} acknowledged by {who} in term {term} isn't on {other}, promoted in term {later} before"
                );
                return self.fail(why);
            }
        }
        if self.honest
            && let Some((later, at)) = self.first.range(term + 1..).next()
        {
            let why = format!(
                "late: {who} of term {term} acknowledges although term {later} did at {at}"
            );
            return self.fail(why);
        }
        self.first.entry(term).or_insert(now);
        self.acknowledged.push(Acknowledged { index, chain, term });
    }
}
