//! A workflow's keys: made once, one more per day, and destroyed when nobody needs them.
//!
//! Owns when. A request's identifiers are readable as long as the key of the day on which it was filed exists, so that
//! destroying that key erases them from every standby, log segment and backup of the ledger at once.
//! Pure. Never makes keys in the place of others that a ledger's requests were sealed with: whoever lost them needs to
//! know, and a new hash key would not know again whom the ledger remembers as erased.

use jiff::civil::Date;
use jiff::tz::TimeZone;
use jiff::{Timestamp, ToSpan};
use k8s_openapi::api::core::v1::Secret;
use kube::ResourceExt;
use std::collections::BTreeSet;

use super::backlog::Reading;
use super::step::Step;
use crate::api::conditions::reasons;
use crate::api::names;
use crate::operator::law::Problem;

/// The key by which people are known again.
pub const HASH: &str = "hash";
/// What the keys of days begin with.
const EPOCH: &str = "epoch-";
/// How long a key is.
pub const BYTES: usize = 32;
/// A day's key is kept so many days at least: clocks differ, and what is on its way is still sealed with it.
const KEPT_DAYS: i64 = 2;

/// What is known of the keys, without them.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Seen {
    /// The hash key is whole.
    pub hash: bool,
    /// The days whose key is whole.
    pub epochs: BTreeSet<Date>,
    /// Keys of a wrong length, or names that mean nothing.
    pub damaged: BTreeSet<String>,
    /// The Secret's version.
    pub version: String,
}

impl Seen {
    /// Reads what may be known.
    #[must_use]
    pub fn of(secret: &Secret) -> Self {
        let mut seen = Self {
            version: secret.resource_version().unwrap_or_default(),
            ..Self::default()
        };
        for (name, bytes) in secret.data.iter().flatten() {
            let whole = bytes.0.len() == BYTES;
            match (name.as_str(), day(name)) {
                (HASH, _) if whole => seen.hash = true,
                (_, Some(day)) if whole => {
                    seen.epochs.insert(day);
                }
                _ => {
                    seen.damaged.insert(name.clone());
                }
            }
        }
        seen
    }
}

/// The name of a day's key.
#[must_use]
pub fn epoch(day: Date) -> String {
    format!("{EPOCH}{day}")
}

/// The day of a key's name.
#[must_use]
pub fn day(name: &str) -> Option<Date> {
    let day: Date = name.strip_prefix(EPOCH)?.parse().ok()?;
    // Only as we write it.
    (epoch(day) == name).then_some(day)
}

/// What keys there are to be now, or why nobody can say.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// They are there, or are made by the steps given.
    There,
    /// Not before the ledger could be read.
    Waits,
    /// A person must act.
    Lost(Problem),
}

/// Decides.
pub fn keep(
    workflow: &str,
    seen: Option<&Seen>,
    reading: &Reading,
    now: Timestamp,
    steps: &mut Vec<Step>,
) -> Outcome {
    let today = now.to_zoned(TimeZone::UTC).date();
    // Tomorrow's is there in time: a changed Secret takes a minute or two to come into a pod.
    let wanted: BTreeSet<Date> = std::iter::once(today)
        .chain(today.checked_add(1.day()).ok())
        .collect();
    let Some(seen) = seen else {
        // What it said once doesn't make room for new ones.
        let fresh = matches!(reading, Reading::Known(_));
        return match reading.tally() {
            Some(tally) if tally.empty && fresh => {
                steps.push(Step::CreateKeys { epochs: wanted });
                Outcome::There
            }
            Some(tally) if !tally.empty => Outcome::Lost(lost(
                workflow,
                "is gone, and the ledger holds requests that were sealed with it",
            )),
            _ => Outcome::Waits,
        };
    };
    if !seen.hash {
        return Outcome::Lost(lost(workflow, "has no whole key \"hash\""));
    }
    let missing: BTreeSet<Date> = wanted.difference(&seen.epochs).copied().collect();
    let damaged = |day: &Date| seen.damaged.contains(&epoch(*day));
    if missing.iter().any(damaged) {
        return Outcome::Lost(lost(workflow, "has a damaged key of today or tomorrow"));
    }
    let version = seen.version.clone();
    if !missing.is_empty() {
        steps.push(Step::AddEpochs {
            epochs: missing,
            version,
        });
        // The version is another one then: what else is to be done is done at the next pass.
        return Outcome::There;
    }
    // Only what the ledger itself says, and not what it said once.
    if let Reading::Known(tally) = reading {
        let old = |day: &Date| {
            day.checked_add(KEPT_DAYS.days())
                .is_ok_and(|until| until <= today)
        };
        let unused: BTreeSet<Date> = seen
            .epochs
            .iter()
            .filter(|day| old(day) && !tally.epochs.contains(*day))
            .copied()
            .collect();
        if !unused.is_empty() {
            steps.push(Step::DestroyEpochs {
                epochs: unused,
                version,
            });
        }
    }
    Outcome::There
}

fn lost(workflow: &str, what: &str) -> Problem {
    let secret = names::rights::keys(workflow);
    Problem {
        reason: reasons::KEYS_LOST,
        message: format!(
            "Secret {secret} {what}: bring it back from a backup; without it nobody can read whom those requests are about, and no other is made in its place"
        ),
    }
}
