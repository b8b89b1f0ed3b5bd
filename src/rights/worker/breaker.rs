//! The circuit breaker of a target: while it fails as a whole, its steps stay in the ledger, untouched.
//!
//! Owns when a target may be tried. Pure: the caller says what time it is and rolls the dice.
//! Never: keeps a target waiting for more than [`PROBE_UNREACHABLE`] if all that is wrong is that it can't be reached.
//! The promise is normal latency within five seconds after a fault has ended.

use std::time::Duration;

use super::clock::Moment;

/// After the first failure.
const FIRST: Duration = Duration::from_millis(250);
/// The longest pause between two probes of a target that can't be reached, or fails for everybody.
pub const PROBE_UNREACHABLE: Duration = Duration::from_millis(1_500);
/// The longest between two logins with credentials that were refused: servers lock accounts out for less.
pub const PROBE_CREDENTIALS: Duration = Duration::from_secs(15);

/// Where it stands; also the value of its metric.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum State {
    /// The target works.
    Closed,
    /// It failed; not before then.
    Open {
        /// When one batch may try.
        until: Moment,
    },
    /// One batch tries.
    HalfOpen,
}

/// What may be done now.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Permit {
    /// Claim as usual.
    Whole,
    /// Claim a few, and see.
    Probe,
    /// Nothing, until then.
    Wait(Moment),
}

/// What a whole batch failed of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// Credentials were refused.
    Credentials,
    /// Anything else.
    Other,
}

/// The breaker of one target.
#[derive(Clone, Debug)]
pub struct Breaker {
    state: State,
    /// In a row.
    failures: u32,
    /// It has worked since the worker began.
    proven: bool,
}

impl Default for Breaker {
    fn default() -> Self {
        Self {
            state: State::Closed,
            failures: 0,
            proven: false,
        }
    }
}

impl Breaker {
    /// Where it stands.
    #[must_use]
    pub fn state(&self) -> State {
        self.state
    }

    /// Whether it may be used as usual.
    #[must_use]
    pub fn closed(&self) -> bool {
        self.state == State::Closed
    }

    /// Whether the target worked when it was last tried. Of a worker that has just begun, nobody knows.
    #[must_use]
    pub fn works(&self) -> bool {
        self.closed() && self.proven
    }

    /// What may be done at `now`. Half open it stays until the batch's end is told; a claim that found nothing to do is
    /// no end.
    pub fn permit(&mut self, now: Moment) -> Permit {
        match self.state {
            State::Closed => Permit::Whole,
            State::Open { until } if now < until => Permit::Wait(until),
            State::Open { .. } | State::HalfOpen => {
                self.state = State::HalfOpen;
                Permit::Probe
            }
        }
    }

    /// The target did something for somebody.
    pub fn succeeded(&mut self) {
        *self = Self {
            proven: true,
            ..Self::default()
        };
    }

    /// The target failed for everybody. `dice` is from 0 to 1: workers of one region mustn't come back in step.
    pub fn failed(&mut self, now: Moment, fault: Fault, dice: f64) {
        let longest = match fault {
            Fault::Credentials => PROBE_CREDENTIALS,
            Fault::Other => PROBE_UNREACHABLE,
        };
        let grown = FIRST.saturating_mul(1 << self.failures.min(16));
        self.failures = self.failures.saturating_add(1);
        let share = 0.5 + dice.clamp(0.0, 1.0) / 2.0;
        let pause = grown.min(longest).mul_f64(share);
        self.state = State::Open {
            until: now.after(pause),
        };
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[derive(Clone, Copy, Debug)]
    enum Event {
        Pass(u64),
        Ask,
        Success,
        Failure(Fault, f64),
    }

    fn event() -> impl Strategy<Value = Event> {
        prop_oneof![
            (0u64..3_000).prop_map(Event::Pass),
            Just(Event::Ask),
            Just(Event::Success),
            (any::<bool>(), 0.0f64..=1.0).prop_map(|(credentials, dice)| Event::Failure(
                if credentials {
                    Fault::Credentials
                } else {
                    Fault::Other
                },
                dice
            )),
        ]
    }

    #[test]
    fn a_probe_that_succeeds_closes_it_at_once() {
        let mut breaker = Breaker::default();
        let now = Moment(0);
        assert_eq!(breaker.permit(now), Permit::Whole);
        breaker.failed(now, Fault::Other, 1.0);
        assert_eq!(breaker.permit(now), Permit::Wait(Moment(250)));
        assert_eq!(breaker.permit(Moment(250)), Permit::Probe);
        assert_eq!(
            breaker.permit(Moment(251)),
            Permit::Probe,
            "a claim that found nothing is no end"
        );
        breaker.succeeded();
        assert_eq!(breaker.permit(Moment(252)), Permit::Whole);
    }

    proptest! {
        /// After whatever happened, a target that fails no more is tried within the promise, and closed by a success.
        #[test]
        fn it_never_waits_longer_than_promised(events in prop::collection::vec(event(), 0..60)) {
            let (mut breaker, mut now) = (Breaker::default(), Moment(1_000));
            for event in events {
                match event {
                    Event::Pass(ms) => now = now.after(Duration::from_millis(ms)),
                    Event::Ask => drop(breaker.permit(now)),
                    Event::Success => {
                        breaker.succeeded();
                        prop_assert_eq!(breaker.permit(now), Permit::Whole);
                    }
                    Event::Failure(fault, dice) => {
                        breaker.failed(now, fault, dice);
                        let Permit::Wait(until) = breaker.permit(now) else {
                            return Err(TestCaseError::fail("tried again at once"));
                        };
                        let longest = match fault {
                            Fault::Other => PROBE_UNREACHABLE,
                            Fault::Credentials => PROBE_CREDENTIALS,
                        };
                        prop_assert!(until > now && until.since(now) <= longest);
                        prop_assert_eq!(breaker.clone().permit(until), Permit::Probe);
                    }
                }
            }
        }
    }
}
