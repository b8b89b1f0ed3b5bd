//! Who is to blame when a call fails as a whole: one subject of it, or the target.
//!
//! Owns the order of calls for a batch: all at once, and if that fails, in parts, until whoever makes it fail is alone.
//! Never: lets one subject hold the others back; takes a target that fails for everybody for so many subjects that
//! fail; goes on calling a target that is away. Pure.
//!
//! A call that fails for a reason that only a target can have (it can't be reached, it refuses the credentials) ends
//! the batch. Any other may be a subject's doing: two subjects that are alone tell. If one of them succeeds, the target
//! works, and what else fails is the subjects'. If both fail, it is the target.

use std::ops::Range;

/// Whose fault a failure may be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Scope {
    /// The target's, and nobody else's.
    Target,
    /// The target's or a subject's.
    Either,
}

/// What is to become of a subject.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fate {
    /// Its call was answered.
    Answered,
    /// It fails where others succeed.
    Guilty,
    /// It was tried alone and failed, but so did everything else.
    Tried,
    /// It wasn't tried, or only together with others. As if it had never been claimed.
    Untouched,
}

/// What the batch says about the target.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Finding {
    /// It works: for somebody at least.
    Works,
    /// It doesn't.
    Fails,
    /// Nobody was tried, or one who failed as before.
    Unknown,
}

/// A batch, on its way.
#[derive(Clone, Debug)]
pub struct Split {
    fates: Vec<Fate>,
    /// Last in, first called.
    pending: Vec<Range<usize>>,
    alone: u32,
    failures: u32,
    budget: u32,
    works: bool,
    /// Nobody's fault but the target's.
    away: bool,
    fails: bool,
}

impl Split {
    /// A batch of `len` subjects, of which those from `suspects` on have failed before: they are called apart from
    /// the others, and after them.
    #[must_use]
    pub fn new(len: usize, suspects: usize) -> Self {
        let suspects = suspects.min(len);
        let mut pending = vec![suspects..len, 0..suspects];
        pending.retain(|part| !part.is_empty());
        Self {
            fates: vec![Fate::Untouched; len],
            pending,
            alone: 0,
            failures: 0,
            // Enough to find one guilty subject in any batch, and a few more.
            budget: 2 * (usize::BITS - len.leading_zeros()) + 6,
            works: false,
            away: false,
            fails: false,
        }
    }

    /// The subjects to call next; none: the batch is over.
    pub fn next_part(&mut self) -> Option<Range<usize>> {
        if self.fails || self.failures >= self.budget {
            return None;
        }
        self.pending.pop()
    }

    /// The call was answered, for each subject in its own way.
    pub fn answered(&mut self, part: Range<usize>) {
        self.works = true;
        self.set(part, Fate::Answered);
    }

    /// The call was answered, and says nothing of the target: it was asked for nobody.
    pub fn skipped(&mut self, part: Range<usize>) {
        self.set(part, Fate::Answered);
    }

    /// The call failed as a whole.
    pub fn failed(&mut self, part: Range<usize>, scope: Scope) {
        self.failures = self.failures.saturating_add(1);
        if scope == Scope::Target {
            self.away = true;
            self.fails = true;
            return;
        }
        let Range { start, end } = part;
        if end - start <= 1 {
            self.set(part, Fate::Tried);
            self.alone += 1;
            self.fails = !self.works && self.alone >= 2;
        } else if self.works {
            let middle = start + (end - start) / 2;
            self.pending.push(middle..end);
            self.pending.push(start..middle);
        } else {
            // The first and the last alone: likely not of the same kind.
            if end - start > 2 {
                self.pending.push(start + 1..end - 1);
            }
            self.pending.push(end - 1..end);
            self.pending.push(start..start + 1);
        }
    }

    /// The call was answered, and every one of them failed by itself.
    pub fn failed_each(&mut self, part: Range<usize>) {
        self.failures = self.failures.saturating_add(1);
        self.alone = self
            .alone
            .saturating_add(u32::try_from(part.len()).unwrap_or(u32::MAX));
        self.set(part, Fate::Tried);
        self.fails = !self.works && self.alone >= 2;
    }

    /// Whether a call failed.
    #[must_use]
    pub fn was_split(&self) -> bool {
        self.failures > 0
    }

    /// What becomes of each, in the order given, and what that says about the target. `worked`: it did when it was last
    /// tried. `before`: how often each subject has failed already.
    ///
    /// Where nobody succeeds, it may be a subject or the target. A target that worked a moment ago is not given up for
    /// one subject that failed before, or a poison would stop it each time its turn comes; and whoever was tried has an
    /// attempt counted, so that the next time it will be such a one. While a target doesn't work, nobody's attempts
    /// are counted, or everybody would wait long after it works again.
    #[must_use]
    pub fn end(self, worked: bool, before: &[u32]) -> (Vec<Fate>, Finding) {
        let blamed = self.works || (worked && !self.away);
        let found = |fate: &Fate| match fate {
            Fate::Tried if blamed => Fate::Guilty,
            other => *other,
        };
        let old = |i: usize| before.get(i).is_some_and(|n| *n > 0);
        let mut tried = (0..self.fates.len()).filter(|i| self.fates.get(*i) == Some(&Fate::Tried));
        let finding = if self.away {
            Finding::Fails
        } else if self.works {
            Finding::Works
        } else if self.failures == 0 || (worked && self.alone < 2 && tried.all(old)) {
            Finding::Unknown
        } else {
            Finding::Fails
        };
        (self.fates.iter().map(found).collect(), finding)
    }

    fn set(&mut self, part: Range<usize>, fate: Fate) {
        if let Some(fates) = self.fates.get_mut(part) {
            fates.fill(fate);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::BTreeSet;

    /// Runs a batch against a target that fails whenever a poison is in the call, or from its `dies`-th call on.
    fn run(
        len: usize,
        suspects: usize,
        poison: &BTreeSet<usize>,
        dies: Option<usize>,
    ) -> (Vec<Fate>, Finding, usize) {
        let mut split = Split::new(len, suspects);
        let mut calls = 0;
        while let Some(part) = split.next_part() {
            let scope = if dies.is_some_and(|n| calls >= n) {
                Some(Scope::Target)
            } else if part.clone().any(|i| poison.contains(&i)) {
                Some(Scope::Either)
            } else {
                None
            };
            calls += 1;
            match scope {
                Some(scope) => split.failed(part, scope),
                None => split.answered(part),
            }
            assert!(calls < 10_000, "it never ends");
        }
        let (fates, finding) = split.end(false, &vec![0; len]);
        (fates, finding, calls)
    }

    #[test]
    fn one_poison_among_many_is_found_and_all_others_go_through() {
        for poison in 0..100 {
            let (fates, finding, _) = run(100, 100, &BTreeSet::from([poison]), None);
            for (i, fate) in fates.into_iter().enumerate() {
                let expected = if i == poison {
                    Fate::Guilty
                } else {
                    Fate::Answered
                };
                assert_eq!(fate, expected, "{i} with poison {poison}");
            }
            assert_eq!(finding, Finding::Works);
        }
    }

    #[test]
    fn a_target_that_fails_for_everybody_is_found_out_in_three_calls() {
        let (fates, finding, calls) = run(500, 500, &(0..500).collect(), None);
        assert_eq!(
            (finding, calls),
            (Finding::Fails, 3),
            "together, one alone, another alone"
        );
        assert_eq!(fates.iter().filter(|f| **f == Fate::Tried).count(), 2);
        assert!(!fates.contains(&Fate::Guilty));
    }

    #[test]
    fn a_target_that_is_away_is_called_once() {
        let (fates, finding, calls) = run(500, 400, &BTreeSet::new(), Some(0));
        assert_eq!((finding, calls), (Finding::Fails, 1));
        assert!(fates.iter().all(|f| *f == Fate::Untouched));
    }

    #[test]
    fn one_alone_that_fails_says_that_the_target_does() {
        let (fates, finding, calls) = run(1, 1, &BTreeSet::from([0]), None);
        assert_eq!((finding, calls), (Finding::Fails, 1));
        assert_eq!(fates, [Fate::Tried]);
    }

    fn alone(scope: Scope, worked: bool, before: u32) -> (Fate, Finding) {
        let mut split = Split::new(1, 1);
        let part = split.next_part().unwrap();
        split.failed(part, scope);
        let (fates, finding) = split.end(worked, &[before]);
        (fates[0], finding)
    }

    #[test]
    fn whom_a_lone_failure_is_held_against() {
        let either = |worked, before| alone(Scope::Either, worked, before);
        assert_eq!(either(true, 0), (Fate::Guilty, Finding::Fails), "its first");
        assert_eq!(
            either(true, 1),
            (Fate::Guilty, Finding::Unknown),
            "its second, and others succeeded in between"
        );
        for before in [0, 1, 7] {
            assert_eq!(
                either(false, before),
                (Fate::Tried, Finding::Fails),
                "nobody succeeds"
            );
            for worked in [false, true] {
                assert_eq!(
                    alone(Scope::Target, worked, before),
                    (Fate::Untouched, Finding::Fails)
                );
            }
        }
    }

    #[test]
    fn several_that_fail_each_by_itself_say_that_the_target_does() {
        let mut split = Split::new(3, 3);
        let part = split.next_part().unwrap();
        split.failed_each(part);
        assert_eq!(split.next_part(), None);
        let (fates, finding) = split.end(true, &[1, 1, 1]);
        assert_eq!((fates, finding), (vec![Fate::Guilty; 3], Finding::Fails));
    }

    #[test]
    fn several_that_fail_where_others_succeed_are_guilty() {
        let mut split = Split::new(3, 1);
        let part = split.next_part().unwrap();
        split.answered(part);
        let part = split.next_part().unwrap();
        split.failed_each(part);
        let (fates, finding) = split.end(false, &[0, 1, 1]);
        assert_eq!(fates, [Fate::Answered, Fate::Guilty, Fate::Guilty]);
        assert_eq!(finding, Finding::Works);
    }

    proptest! {
        #[test]
        fn nobody_innocent_is_found_guilty_and_nobody_guilty_answered(
            len in 1usize..300,
            suspects in 0usize..300,
            poison in prop::collection::btree_set(0usize..300, 0..40),
            dies in prop::option::of(0usize..40),
        ) {
            let (fates, finding, calls) = run(len, suspects, &poison, dies);
            for (i, fate) in fates.into_iter().enumerate() {
                match fate {
                    Fate::Guilty => prop_assert!(poison.contains(&i)),
                    Fate::Answered => prop_assert!(!poison.contains(&i)),
                    Fate::Tried => prop_assert_eq!(finding, Finding::Fails),
                    Fate::Untouched => {}
                }
            }
            prop_assert!(calls <= 2 * len + 2);
        }

        /// Something always moves: or the same batch would be claimed again, for ever.
        #[test]
        fn where_the_target_works_for_anybody_tried_there_is_progress(
            len in 1usize..300,
            poison in prop::collection::btree_set(0usize..300, 0..300),
        ) {
            let (fates, finding, _) = run(len, len, &poison, None);
            match finding {
                Finding::Works => {
                    prop_assert!(fates.contains(&Fate::Answered));
                    let poisoned = (0..len).any(|i| poison.contains(&i));
                    prop_assert_eq!(poisoned, fates.contains(&Fate::Guilty));
                }
                Finding::Fails => prop_assert!(poison.contains(&0) && poison.contains(&(len - 1))),
                Finding::Unknown => return Err(TestCaseError::fail("nobody failed before")),
            }
        }

        /// Few poisons: every one found at once, and nobody else delayed.
        #[test]
        fn two_poisons_are_found_in_one_batch(len in 3usize..300, a in 0usize..300, b in 0usize..300) {
            let poison = BTreeSet::from([a % len, b % len]);
            prop_assume!(poison != BTreeSet::from([0, len - 1]));
            let (fates, _, _) = run(len, len, &poison, None);
            let guilty: BTreeSet<usize> = fates
                .iter()
                .enumerate()
                .filter_map(|(i, f)| (*f == Fate::Guilty).then_some(i))
                .collect();
            prop_assert_eq!(guilty, poison);
        }
    }
}
