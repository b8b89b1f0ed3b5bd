//! What becomes of a step, from what was seen of it.
//!
//! Owns the way from a reading to an end. Never: ends a step without a probe that found nothing. Pure.
//!
//! | claimed as | probe after the erasure | then |
//! |---|---|---|
//! | new | nothing there, nothing to settle | done |
//! | new | nothing there | settle: probed once more later |
//! | settling | nothing there, and nothing was erased | done |
//! | settling | nothing there, but it had come back and was erased again | settle again |
//! | either | still there, twice | retry |

use jiff::{SignedDuration, Timestamp};
use serde_json::{Map, Value};
use std::time::Duration;

use super::split::Scope;
use crate::rights::connectors::{Reason, Residue};
use crate::rights::model::{Evidence, Outcome};

/// Whose fault a call's failure may be.
#[must_use]
pub fn scope(reason: Reason) -> Scope {
    match reason {
        // No subject can make a table vanish, or a login fail.
        Reason::Unreachable | Reason::Credentials | Reason::Missing | Reason::Protocol => {
            Scope::Target
        }
        // One person's ten million rows can time out, one person's value can be refused.
        Reason::Timeout
        | Reason::Refused
        | Reason::Locked
        | Reason::Identifier
        | Reason::StillThere => Scope::Either,
    }
}

/// What was seen of one step.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Seen {
    /// A probe read where the person would be, and they weren't.
    Gone {
        /// What the erasure under this claim said; none: nothing was erased under it.
        erased: Option<Evidence>,
        /// What the probe said.
        probed: Evidence,
        /// A copy that serves nobody may hold bytes until then.
        bounded: Option<Timestamp>,
    },
    /// It failed, and it is the subject's own.
    Failed(Reason),
    /// The target failed while it was this one's turn. It is put back a little, so that another gets the next turn.
    Tried(Reason),
    /// Nothing was done for it.
    Untouched,
}

/// What becomes of a step.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// It ended.
    Done(Outcome, Evidence),
    /// It is probed once more later.
    Settle(Evidence),
    /// It failed, and waits the longer the more often it did.
    Retry(Reason),
    /// It is put back for a moment, however often it failed.
    Later(Reason),
    /// It is given back at once, as if it had never been claimed.
    Back,
}

/// What a verdict depends on beside what was seen.
#[derive(Clone, Copy, Debug)]
pub struct Facts {
    /// The step was claimed for its second probe.
    pub settling: bool,
    /// The target is to be probed once more.
    pub settle: bool,
    /// What the target keeps.
    pub residue: Option<Residue>,
    /// The database's time, not before which the erasure was over.
    pub now: Timestamp,
}

/// The verdict. `before` is what earlier claims of the step left as evidence.
#[must_use]
pub fn verdict(facts: &Facts, before: Evidence, seen: Seen) -> Verdict {
    match seen {
        Seen::Failed(reason) => Verdict::Retry(reason),
        Seen::Tried(reason) => Verdict::Later(reason),
        Seen::Untouched => Verdict::Back,
        Seen::Gone {
            erased,
            probed,
            bounded,
        } => {
            let again = facts.settle && (!facts.settling || erased.is_some());
            let evidence = gathered(before, erased, probed);
            if again {
                return Verdict::Settle(evidence);
            }
            let residue = facts.residue.map(|r| r.until(facts.now));
            match bounded.into_iter().chain(residue).max() {
                Some(until) => Verdict::Done(Outcome::Bounded { until }, evidence),
                None => Verdict::Done(Outcome::Absent, evidence),
            }
        }
    }
}

/// `erased`: what the erasures said, the last one last; `probed`: what the last probe said.
fn gathered(before: Evidence, erased: Option<Evidence>, probed: Evidence) -> Evidence {
    let Evidence(mut all) = before;
    let mut erasures = match all.remove("erased") {
        Some(Value::Array(erasures)) => erasures,
        _ => Vec::new(),
    };
    if let Some(Evidence(erased)) = erased {
        // The first says what there was, the last what came back last. A cache refilled for days must not grow a
        // proof for days.
        erasures.truncate(1);
        erasures.push(Value::Object(erased));
    }
    let mut out = Map::new();
    out.insert("erased".to_owned(), Value::Array(erasures));
    out.insert("probed".to_owned(), Value::Object(probed.0));
    Evidence(out)
}

/// What an earlier claim's evidence says of its last erasure; a probe of a settling step is given it.
#[must_use]
pub fn last_erasure(before: &Evidence) -> Evidence {
    let last = before
        .0
        .get("erased")
        .and_then(Value::as_array)
        .and_then(|erasures| erasures.last())
        .and_then(Value::as_object);
    Evidence(last.cloned().unwrap_or_default())
}

/// The database's time now, at the latest: what it was when a claim was answered, and what has passed since the claim
/// was sent.
#[must_use]
pub fn database_time(claimed: Timestamp, since_sent: Duration) -> Timestamp {
    let passed = SignedDuration::try_from(since_sent).unwrap_or(SignedDuration::MAX);
    claimed.checked_add(passed).unwrap_or(Timestamp::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use serde_json::json;

    fn evidence() -> impl Strategy<Value = Evidence> {
        (0u64..100).prop_map(|n| Evidence(Map::from_iter([("rows".to_owned(), json!(n))])))
    }

    fn time() -> impl Strategy<Value = Timestamp> {
        (0i64..4_000_000_000).prop_map(|s| Timestamp::from_second(s).unwrap())
    }

    fn reason() -> impl Strategy<Value = Reason> {
        prop::sample::select(vec![
            Reason::Unreachable,
            Reason::Credentials,
            Reason::Missing,
            Reason::Identifier,
            Reason::Timeout,
            Reason::Refused,
            Reason::Locked,
            Reason::StillThere,
            Reason::Protocol,
        ])
    }

    fn seen() -> impl Strategy<Value = Seen> {
        prop_oneof![
            (
                prop::option::of(evidence()),
                evidence(),
                prop::option::of(time())
            )
                .prop_map(|(erased, probed, bounded)| Seen::Gone {
                    erased,
                    probed,
                    bounded
                }),
            reason().prop_map(Seen::Failed),
            reason().prop_map(Seen::Tried),
            Just(Seen::Untouched),
        ]
    }

    fn facts() -> impl Strategy<Value = Facts> {
        (
            any::<bool>(),
            any::<bool>(),
            prop::option::of(1u32..4_000),
            time(),
        )
            .prop_map(|(settling, settle, days, now)| Facts {
                settling,
                settle,
                residue: days.map(|days| Residue { days }),
                now,
            })
    }

    proptest! {
        #[test]
        fn it_ends_only_when_a_probe_found_nothing(facts in facts(), seen in seen()) {
            let gone = matches!(seen, Seen::Gone { .. });
            match verdict(&facts, Evidence::default(), seen.clone()) {
                Verdict::Done(..) | Verdict::Settle(_) => prop_assert!(gone),
                Verdict::Retry(reason) => prop_assert_eq!(seen, Seen::Failed(reason)),
                Verdict::Later(reason) => prop_assert_eq!(seen, Seen::Tried(reason)),
                Verdict::Back => prop_assert_eq!(seen, Seen::Untouched),
            }
        }

        #[test]
        fn where_a_target_settles_the_last_probe_was_one_that_followed_no_erasure(facts in facts(), seen in seen()) {
            if let Verdict::Done(..) = verdict(&facts, Evidence::default(), seen.clone()) {
                let Seen::Gone { erased, .. } = seen else {
                    return Err(TestCaseError::fail("done without a probe"));
                };
                prop_assert!(!facts.settle || (facts.settling && erased.is_none()));
            }
        }

        #[test]
        fn absent_is_said_only_where_no_byte_may_be_left(facts in facts(), seen in seen()) {
            if let Verdict::Done(outcome, _) = verdict(&facts, Evidence::default(), seen.clone()) {
                let Seen::Gone { bounded, .. } = seen else {
                    return Err(TestCaseError::fail("done without a probe"));
                };
                let bounds: Vec<_> =
                    bounded.into_iter().chain(facts.residue.map(|r| r.until(facts.now))).collect();
                match outcome {
                    Outcome::Absent => prop_assert!(bounds.is_empty()),
                    Outcome::Bounded { until } => prop_assert!(bounds.iter().all(|b| *b <= until)),
                    Outcome::Excepted { .. } => return Err(TestCaseError::fail("no law was asked")),
                }
            }
        }

        /// A cache that is refilled again and again, and at last isn't: two erasures are kept, the first and the last.
        #[test]
        fn a_proof_stays_small_and_keeps_the_first_and_the_last_erasure(
            erasures in prop::collection::vec(evidence(), 1..20), now in time()
        ) {
            let mut before = Evidence::default();
            for (n, erased) in erasures.iter().enumerate() {
                let facts = Facts { settling: n > 0, settle: true, residue: None, now };
                let seen = Seen::Gone {
                    erased: Some(erased.clone()),
                    probed: Evidence::default(),
                    bounded: None,
                };
                let Verdict::Settle(next) = verdict(&facts, before, seen) else {
                    return Err(TestCaseError::fail("ended before it had settled"));
                };
                prop_assert_eq!(&last_erasure(&next), erased);
                before = next;
            }
            let facts = Facts { settling: true, settle: true, residue: None, now };
            let seen = Seen::Gone { erased: None, probed: Evidence::default(), bounded: None };
            let Verdict::Done(Outcome::Absent, proof) = verdict(&facts, before, seen) else {
                return Err(TestCaseError::fail("not done"));
            };
            let kept = proof.0["erased"].as_array().unwrap();
            prop_assert!(kept.len() <= 2);
            prop_assert_eq!(kept.first().unwrap(), &Value::Object(erasures.first().unwrap().0.clone()));
            prop_assert_eq!(kept.last().unwrap(), &Value::Object(erasures.last().unwrap().0.clone()));
        }
    }
}
