//! What an instance says of itself, from what was seen: role, readiness, message.
//!
//! Owns the words and when a change counts. Pure.
//! Never: puts a time, a position or a lag into the store's status, which would make a quiet store write.

use std::time::Duration;

use super::plan::{Mode, Step};
use super::vitals::Vitals;
use crate::api::privacy_data_store::InstanceRole;

/// The longest message that the status takes, in characters; its schema says so.
const MESSAGE_MAX: usize = 512;

/// What readiness depends on.
#[derive(Clone, Debug)]
pub struct Facts<'a> {
    /// The step of this turn.
    pub step: &'a Step,
    /// What PostgreSQL said in this turn, if it answered.
    pub vitals: Option<&'a Vitals>,
    /// The primary's name.
    pub primary: Option<&'a str>,
    /// The synchronous rule that was in force when PostgreSQL was asked; none if it was being changed.
    pub rule: Option<&'a str>,
    /// Whether a majority has it for the primary.
    pub serving: bool,
    /// A receiver that is silent for longer isn't streaming.
    pub silence: Duration,
    /// What went wrong last, if PostgreSQL doesn't run.
    pub trouble: Option<&'a str>,
    /// What a person should know though it doesn't keep the instance from serving.
    pub notes: &'a [String],
}

/// What an instance is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Verdict {
    /// What it is.
    pub role: InstanceRole,
    /// Whether it serves, or why not.
    pub ready: Result<(), String>,
    /// For the status.
    pub message: Option<String>,
}

/// Judges.
#[must_use]
pub fn judge(facts: &Facts<'_>) -> Verdict {
    let (role, ready) = role_and_readiness(facts);
    let mut words: Vec<&str> = Vec::new();
    if let Err(why) = &ready {
        words.push(why);
    }
    if ready.is_err()
        && let Some(trouble) = facts.trouble
        && !words.contains(&trouble)
    {
        words.push(trouble);
    }
    words.extend(facts.notes.iter().map(String::as_str));
    let message: String = words.join("; ").chars().take(MESSAGE_MAX).collect();
    Verdict {
        role,
        ready,
        message: (!message.is_empty()).then_some(message),
    }
}

fn role_and_readiness(facts: &Facts<'_>) -> (InstanceRole, Result<(), String>) {
    let starting = |why: &str| (InstanceRole::Starting, Err(why.to_owned()));
    let mode = match facts.step {
        Step::Fail(why) => return (InstanceRole::Failed, Err(why.clone())),
        Step::Wait(why) => return starting(why),
        Step::Stop(why) => return starting(&format!("is stopping PostgreSQL: {why}")),
        Step::ClearLeftover => return starting("removes what an interrupted copy left behind"),
        Step::Found => return starting("becomes the first voter of its store"),
        Step::InitDb => return starting("makes a new database cluster"),
        Step::Clone { .. } => return starting("copies the primary"),
        Step::Start(_) => return starting("starts PostgreSQL"),
        Step::Serve(mode) => *mode,
    };
    let Some(vitals) = facts.vitals else {
        return starting("waits for PostgreSQL to answer");
    };
    match mode {
        Mode::Founding => starting(
            "waits for the store to know its new database cluster, before clients are let in",
        ),
        Mode::Primary if !facts.serving => starting("takes over"),
        Mode::Primary if vitals.in_recovery => starting("PostgreSQL recovers"),
        Mode::Primary => (InstanceRole::Primary, primary_ready(facts, vitals)),
        Mode::Standby if !vitals.in_recovery => {
            // Nobody told it to; somebody promoted it by hand.
            (
                InstanceRole::Failed,
                Err(
                    "this standby was promoted by hand: it is stopped, and its copy is made anew"
                        .to_owned(),
                ),
            )
        }
        Mode::Standby => (InstanceRole::Standby, standby_ready(facts, vitals)),
    }
}

/// Whether PostgreSQL goes by its rule. While one takes the place of another, it goes by one of the two, and whichever
/// that is holds what has been acknowledged.
#[must_use]
pub fn in_force(vitals: &Vitals, rule: Option<&str>) -> bool {
    rule.is_none_or(|rule| rule == vitals.sync_names)
}

fn primary_ready(facts: &Facts<'_>, vitals: &Vitals) -> Result<(), String> {
    if in_force(vitals, facts.rule) {
        Ok(())
    } else {
        Err(
            "the synchronous rule isn't in force: something else sets synchronous_standby_names; run ALTER \
             SYSTEM RESET synchronous_standby_names"
                .to_owned(),
        )
    }
}

fn standby_ready(facts: &Facts<'_>, vitals: &Vitals) -> Result<(), String> {
    let primary = facts.primary.unwrap_or("the primary");
    let Some(receiver) = &vitals.receiver else {
        return Err(format!("waits to stream from {primary}"));
    };
    if receiver.host != primary {
        return Err(format!(
            "waits to stream from {primary}: still streams from another"
        ));
    }
    if receiver.state != "streaming" {
        return Err(format!(
            "waits to stream from {primary}: the receiver is {}",
            receiver.state
        ));
    }
    if receiver.silent > facts.silence {
        return Err(format!("has not heard from {primary} for too long"));
    }
    if vitals.replay_paused {
        return Err(
            "replay stands still since the primary has a larger max_connections, \
             max_prepared_transactions, max_worker_processes or max_locks_per_transaction than this standby \
             was started with: delete this pod to restart it"
                .to_owned(),
        );
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::super::vitals::ReceiverSeen;
    use super::*;

    fn judge_of(step: &Step, vitals: Option<&Vitals>, notes: &[String]) -> Verdict {
        judge(&Facts {
            step,
            vitals,
            primary: Some("s-1"),
            rule: Some("ANY 1 (\"s-2\")"),
            serving: true,
            silence: Duration::from_secs(6),
            trouble: Some("it crashed"),
            notes,
        })
    }

    #[test]
    fn a_primary_needs_its_rule() {
        let step = Step::Serve(Mode::Primary);
        let mut vitals = Vitals {
            sync_names: "ANY 1 (\"s-2\")".into(),
            ..Vitals::default()
        };
        let good = judge_of(&step, Some(&vitals), &[]);
        assert_eq!(
            (good.role, good.ready, good.message),
            (InstanceRole::Primary, Ok(()), None)
        );
        vitals.sync_names.clear();
        assert!(judge_of(&step, Some(&vitals), &[]).ready.is_err());
        // Its successor, asked for while it was being put in force.
        assert!(in_force(&vitals, None));
        vitals.in_recovery = true;
        assert_eq!(
            judge_of(&step, Some(&vitals), &[]).role,
            InstanceRole::Starting
        );
        let dead = judge_of(&step, None, &[]);
        assert_eq!(dead.role, InstanceRole::Starting);
        assert!(dead.message.unwrap().ends_with("it crashed"));
    }

    #[test]
    fn a_standby_needs_a_live_stream_from_the_primary() {
        let step = Step::Serve(Mode::Standby);
        let streaming = Vitals {
            in_recovery: true,
            receiver: Some(ReceiverSeen {
                state: "streaming".into(),
                host: "s-1".into(),
                silent: Duration::from_secs(1),
            }),
            ..Vitals::default()
        };
        assert_eq!(judge_of(&step, Some(&streaming), &[]).ready, Ok(()));
        for spoil in [
            (|v: &mut Vitals| v.receiver = None) as fn(&mut Vitals),
            |v| v.receiver.as_mut().unwrap().state = "waiting".into(),
            |v| v.receiver.as_mut().unwrap().host = "s-3".into(),
            |v| v.receiver.as_mut().unwrap().silent = Duration::from_secs(7),
            |v| v.replay_paused = true,
        ] {
            let mut vitals = streaming.clone();
            spoil(&mut vitals);
            let verdict = judge_of(&step, Some(&vitals), &[]);
            assert_eq!(verdict.role, InstanceRole::Standby);
            assert!(verdict.ready.is_err());
        }
        let promoted = Vitals::default();
        assert_eq!(
            judge_of(&step, Some(&promoted), &[]).role,
            InstanceRole::Failed
        );
    }

    #[test]
    fn notes_are_told_though_it_serves_and_messages_are_bounded() {
        let step = Step::Serve(Mode::Primary);
        let vitals = Vitals {
            sync_names: "ANY 1 (\"s-2\")".into(),
            ..Vitals::default()
        };
        let notes = ["waits for restart: shared_buffers".to_owned()];
        let verdict = judge_of(&step, Some(&vitals), &notes);
        assert_eq!(verdict.ready, Ok(()));
        assert_eq!(verdict.message.as_deref(), Some(notes[0].as_str()));
        let long = judge_of(&Step::Fail("é".repeat(9999)), None, &[]);
        assert_eq!(long.message.unwrap().chars().count(), 512);
    }
}
