//! Whose log a copy holds: eras, and how two copies compare by them.
//!
//! Owns what a history keeps and what it forgets, and the comparison that decides whether a copy may stream from
//! another.
//! Never: compares by PostgreSQL's timeline numbers; or takes a copy for the beginning of another when what it
//! keeps doesn't prove it.

use serde::{Deserialize, Serialize};

use super::types::{Lsn, Term};

/// How many eras a history keeps, the newest. Every message to a voter carries them and has to fit a frame, and
/// every promise writes them down. A copy that has missed this many failovers is made anew.
pub const KEPT: usize = 128;

/// A stretch of WAL: everything from `start` on was written by the primary of `term`. A term has one primary,
/// which began it once, so two histories with the same era agree on all before it.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Era {
    /// The term.
    pub term: Term,
    /// PostgreSQL's timeline; 0 until it's known. Only to choose between a rewind and a new copy.
    pub timeline: u32,
    /// Where it forked from the era before.
    pub start: Lsn,
}

/// The eras of a copy, oldest first. It may name an era of which nothing has been received yet: it's written
/// *before* streaming begins, so that WAL is never held without its era. What is really held ends with the
/// copy's end. If the first one doesn't begin at 0, there were earlier ones, which are forgotten.
pub type History = Vec<Era>;

/// How a copy relates to the one that it's to follow.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Relation {
    /// It's a beginning of the other: it can stream the rest.
    Prefix,
    /// It holds something that the other hasn't, or it's so old that nobody can tell: it must be rewound or made
    /// anew.
    Diverged,
}

/// The newest `most` eras.
#[must_use]
pub fn newest(mut history: History, most: usize) -> History {
    history.drain(..history.len().saturating_sub(most));
    history
}

/// The eras of which a copy that ends at `end` really holds something; none if it ends before all that its history
/// keeps.
#[must_use]
pub fn held(history: &[Era], end: Lsn) -> &[Era] {
    // An era begins with a record of its own, so one that begins at the end isn't held. The very first is.
    let count = history
        .iter()
        .enumerate()
        .take_while(|(n, era)| era.start < end || (*n == 0 && era.start == 0))
        .count();
    history.get(..count).unwrap_or(&[])
}

/// How a copy with `mine`, ending at `end`, relates to one with `theirs`. The other's own end matters only to
/// the caller: a copy may be a prefix of what the other's history allows and yet be longer than the other.
///
/// Either may have forgotten its oldest eras. From the first era that both name they have to agree; without one, the
/// copy counts as diverged.
#[must_use]
pub fn relation(mine: &[Era], end: Lsn, theirs: &[Era]) -> Relation {
    let held = held(mine, end);
    let Some(oldest) = held.first() else {
        // Nothing of it is known: only a copy of nothing is certain to be a beginning.
        return if end == 0 {
            Relation::Prefix
        } else {
            Relation::Diverged
        };
    };
    let place = |of: &[Era], term: Option<Term>| of.iter().position(|e| Some(e.term) == term);
    let (here, there) = match place(theirs, Some(oldest.term)) {
        Some(there) => (0, there),
        None => match place(held, theirs.first().map(|e| e.term)) {
            Some(here) => (here, 0),
            None => return Relation::Diverged,
        },
    };
    let (mut mine, mut theirs) = (held.iter().skip(here), theirs.iter().skip(there));
    let same = mine.all(|a| {
        theirs
            .next()
            .is_some_and(|b| a.term == b.term && a.start == b.start)
    });
    let fits = theirs.next().is_none_or(|next| end <= next.start);
    if same && fits {
        Relation::Prefix
    } else {
        Relation::Diverged
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn era(term: Term, start: Lsn) -> Era {
        Era {
            term,
            timeline: 0,
            start,
        }
    }

    #[test]
    fn copies_are_compared_by_terms_and_not_by_timelines() {
        let old = [era(1, 0)];
        let next = [era(1, 0), era(3, 100)];
        let other = [era(1, 0), era(2, 100)];
        assert_eq!(relation(&old, 100, &next), Relation::Prefix);
        assert_eq!(relation(&old, 101, &next), Relation::Diverged);
        // Marked before it received anything of it.
        assert_eq!(relation(&next, 100, &other), Relation::Prefix);
        assert_eq!(relation(&next, 101, &other), Relation::Diverged);
        assert_eq!(relation(&next, 120, &next), Relation::Prefix);
        assert_eq!(relation(&next, 120, &old), Relation::Diverged);
        assert_eq!(relation(&[], 0, &next), Relation::Prefix);
        assert_eq!(relation(&[], 1, &next), Relation::Diverged);
    }

    #[test]
    fn what_is_forgotten_proves_nothing() {
        let all = [era(1, 0), era(3, 100), era(4, 200), era(6, 300)];
        // It ends before all that the other keeps, or before all that it keeps itself.
        assert_eq!(relation(&all[..1], 100, &all[1..]), Relation::Diverged);
        assert_eq!(relation(&all[2..], 200, &all), Relation::Diverged);
        assert_eq!(held(&all[2..], 200), &[]);
        // One era in common is enough.
        assert_eq!(relation(&all[..2], 150, &all[1..]), Relation::Prefix);
        assert_eq!(relation(&all[..2], 201, &all[1..]), Relation::Diverged);
        assert_eq!(relation(&all[2..3], 300, &all[1..]), Relation::Prefix);
        // The same term from another place is another's.
        assert_eq!(relation(&[era(3, 90)], 95, &all[1..]), Relation::Diverged);
    }

    #[test]
    fn a_node_keeps_the_newest_whatever_it_is_given() {
        use crate::failover::{Durability, Event, Local, Message, Node, Timing};
        let long: History = (0..KEPT as u64 + 900).map(|n| era(n + 1, n * 10)).collect();
        let end = long.last().unwrap().start + 5;
        let mut durable = Node::founding(&1u8, Durability::Required);
        durable.history.clone_from(&long);
        let mut configuration = durable.configuration.clone().unwrap();
        configuration.term = long.len() as Term;
        durable.promised = configuration.term;
        durable.configuration = Some(configuration.clone());
        let mut node = Node::new(2, durable, Timing::new(3_000), 0, 1);
        assert_eq!(node.durable().history, newest(long.clone(), KEPT));
        let _ = node.step(1, Event::Standby { end });
        let message = Message::Heartbeat {
            configuration,
            seq: 1,
            history: long.clone(),
            position: end,
        };
        let _ = node.step(2, Event::Message { from: 1, message });
        assert!(matches!(node.local(), Local::Following { .. }));
        assert_eq!(node.seen_history(), Some(&newest(long, KEPT)));
        assert!(!node.durable().rebuilding, "it still knows its own copy");
    }

    /// Logs that fork from one another, as primaries do: for each its parent, and where it forked from it.
    #[derive(Clone, Debug)]
    struct Forks(Vec<(usize, Lsn)>);

    impl Forks {
        /// The eras of the log that ends with `last`.
        fn history(&self, last: usize) -> History {
            let (parent, start) = self.0[last];
            let mut history = if last == 0 {
                Vec::new()
            } else {
                self.history(parent)
            };
            history.push(era(last as Term + 1, start));
            history
        }
    }

    fn forks() -> impl Strategy<Value = Forks> {
        prop::collection::vec((any::<prop::sample::Index>(), 1..30u64), 0..12).prop_map(|made| {
            let mut forks = Forks(vec![(0, 0)]);
            for (parent, further) in made {
                let parent = parent.index(forks.0.len());
                let start = forks.0[parent].1 + further;
                forks.0.push((parent, start));
            }
            forks
        })
    }

    /// Who wrote the byte at a position.
    fn writer(history: &[Era], at: Lsn) -> Option<Term> {
        history.iter().rev().find(|e| e.start <= at).map(|e| e.term)
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(20_000))]
        #[test]
        fn forgetting_never_makes_a_beginning_of_what_is_none(
            forks in forks(),
            one in any::<prop::sample::Index>(), other in any::<prop::sample::Index>(),
            length in 1..120u64, planned in prop::option::of(0..20u64),
            mine_kept in 1..14usize, their_kept in 1..14usize,
        ) {
            let all = forks.0.len();
            let theirs = forks.history(other.index(all));
            let mut mine = forks.history(one.index(all));
            // A copy may lack the latest of what its history names, and name an era that never began.
            if let Some(beyond) = planned {
                mine.push(era(100, length.max(mine.last().map_or(0, |e| e.start)) + beyond));
            }
            let truth = (0..length).all(|at| writer(&mine, at) == writer(&theirs, at));
            let whole = relation(&mine, length, &theirs);
            prop_assert_eq!(whole == Relation::Prefix, truth);

            let (short, shorter) = (newest(mine.clone(), mine_kept), newest(theirs, their_kept));
            let kept = relation(&short, length, &shorter);
            prop_assert!(kept == Relation::Diverged || truth);
            // And nothing is made anew that both can still place.
            let last = held(&short, length).last();
            if last.is_some_and(|last| shorter.contains(last)) {
                prop_assert_eq!(kept, whole);
            }
            prop_assert!(held(&mine, length).ends_with(held(&short, length)));
        }
    }
}
