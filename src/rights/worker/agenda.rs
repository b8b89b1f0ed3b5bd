//! When a lane looks for work though nobody called it.
//!
//! Owns the pause until the next look: what the lane itself has put off comes due at a known moment; for everything
//! else, such as the steps of a worker that died, there is a slow poll. Pure.

use std::cmp::Reverse;
use std::collections::BinaryHeap;
use std::time::Duration;

use super::clock::Moment;

/// Between two looks, more or less. Calls for work come by themselves; nobody calls when a lease runs out.
const POLL: Duration = Duration::from_millis(1_000);
/// More moments aren't remembered; the poll finds what belongs to them.
const MOST: usize = 4_096;
/// The database's clock decides what is due; to come a little early would be in vain.
const LATER: Duration = Duration::from_millis(5);

/// What a lane has put off.
#[derive(Clone, Debug, Default)]
pub struct Agenda {
    due: BinaryHeap<Reverse<Moment>>,
}

impl Agenda {
    /// Something comes due at `at`.
    pub fn add(&mut self, at: Moment) {
        if self.due.len() < MOST {
            self.due.push(Reverse(at.after(LATER)));
        }
    }

    /// How long to wait at most. What is due by now is taken off: the look that follows finds it. `dice` is from 0 to
    /// 1, so that workers don't all look at once.
    pub fn pause(&mut self, now: Moment, dice: f64) -> Duration {
        let mut due_now = false;
        while self.due.peek().is_some_and(|Reverse(at)| *at <= now) {
            self.due.pop();
            due_now = true;
        }
        if due_now {
            return Duration::ZERO;
        }
        let poll = POLL.mul_f64(0.75 + dice.clamp(0.0, 1.0) / 2.0);
        match self.due.peek() {
            Some(Reverse(at)) => poll.min(at.since(now)),
            None => poll,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn nothing_due_is_slept_through(
            due in prop::collection::vec(0u64..10_000, 0..50),
            now in 0u64..10_000, dice in 0.0f64..=1.0
        ) {
            let mut agenda = Agenda::default();
            for at in &due {
                agenda.add(Moment(*at));
            }
            let now = Moment(now);
            let first = agenda.pause(now, dice);
            prop_assert!(first <= POLL.mul_f64(1.25));
            let passed = due.iter().any(|at| Moment(*at).after(LATER) <= now);
            prop_assert_eq!(first.is_zero(), passed);
            for at in due.iter().map(|at| Moment(*at).after(LATER)).filter(|at| *at > now) {
                prop_assert!(agenda.pause(now, dice) <= at.since(now));
            }
            prop_assert!(!agenda.pause(now, dice).is_zero(), "it would look again and again");
        }
    }

    #[test]
    fn what_it_remembers_is_bounded() {
        let mut agenda = Agenda::default();
        for n in 0..100_000 {
            agenda.add(Moment(n));
        }
        assert_eq!(agenda.due.len(), MOST);
    }
}
