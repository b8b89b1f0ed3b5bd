//! What people ask of a store by annotation: a switchover, and to go on though data may be lost.
//!
//! Owns the end of a request: it is removed once it is met, or can't be, with the reason as an event. The
//! instances are who act on it; `domicile.dev/fence` stays until a person removes it.
//! Pure. Never decides who becomes primary.

use jiff::{SignedDuration, Timestamp};
use kube::ResourceExt;

use super::leader::Leader;
use super::observe::Observed;
use super::step::Step;
use super::validate::Lawful;
use crate::api::privacy_data_store::{InstanceStatus, failover_reasons};
use crate::api::residency_policy::Data;
use crate::api::{PrivacyDataStore, labels};

/// A request that isn't met by then is given up: it must not be met by surprise a day later.
const PATIENCE: SignedDuration = SignedDuration::from_mins(10);

/// Reasons of the events.
mod told {
    /// A switchover can't be.
    pub const PROMOTE_REFUSED: &str = "PromoteRefused";
    /// A person accepted that data is lost, and it was acted on.
    pub const DATA_LOSS_ACCEPTED: &str = "DataLossAccepted";
    /// A person accepted that data is lost, and it wasn't acted on.
    pub const DATA_LOSS_NOT_ACCEPTED: &str = "DataLossNotAccepted";
}

/// Removes requests that are met or can't be.
pub fn answer(
    observed: &Observed,
    lawful: &Lawful,
    leader: Leader<'_>,
    now: Timestamp,
    steps: &mut Vec<Step>,
) {
    let store = &observed.store;
    if let Some(value) = store.annotations().get(labels::PROMOTE) {
        let over = promoted(observed, lawful, leader, value.trim(), now);
        close(labels::PROMOTE, value, over, steps);
    }
    if let Some(value) = store.annotations().get(labels::ACCEPT_DATA_LOSS) {
        let over = loss_accepted(store, leader, value.trim(), now);
        close(labels::ACCEPT_DATA_LOSS, value, over, steps);
    }
}

/// How a request ended: with something to tell, or quietly.
enum Over {
    Quietly,
    Told(&'static str, String),
}

fn close(annotation: &'static str, value: &str, over: Option<Over>, steps: &mut Vec<Step>) {
    let Some(over) = over else { return };
    // Told first: a record twice is better than none.
    if let Over::Told(reason, note) = over {
        steps.push(Step::Tell {
            reason,
            warning: true,
            note,
        });
    }
    steps.push(Step::RemoveAnnotation {
        name: annotation,
        value: value.to_owned(),
    });
}

fn entry<'a>(store: &'a PrivacyDataStore, name: &str) -> Option<&'a InstanceStatus> {
    let status = store.status.as_ref()?;
    status.instances.iter().find(|e| e.name == name)
}

fn promoted(
    observed: &Observed,
    lawful: &Lawful,
    leader: Leader<'_>,
    wanted: &str,
    now: Timestamp,
) -> Option<Over> {
    let store = &observed.store;
    if wanted == leader.name {
        return Some(Over::Quietly);
    }
    let refuse = |why: String| {
        Some(Over::Told(
            told::PROMOTE_REFUSED,
            format!("{wanted} does not become primary: {why}"),
        ))
    };
    let known = entry(store, wanted).filter(|e| e.region.is_some());
    let Some(entry) = known else {
        let names: Vec<&str> = store
            .status
            .iter()
            .flat_map(|s| &s.instances)
            .map(|e| e.name.as_str())
            .collect();
        return refuse(format!(
            "the store has no such instance; it has {}",
            names.join(", ")
        ));
    };
    let region = entry.region.as_deref().unwrap_or_default();
    if let Err(refusal) = lawful.permissions.check(Data::Primary, region) {
        return refuse(refusal.to_string());
    }
    if entry.may_be_primary == Some(false) {
        return refuse(format!(
            "it is not certain that it is in region {region}; see the condition Resident"
        ));
    }
    if entry.leaving == Some(true) {
        return refuse("it is being taken out of the store".to_owned());
    }
    if fenced(store, wanted) {
        return refuse(format!(
            "it is fenced: take it off the annotation {} first",
            labels::FENCE
        ));
    }
    if expired(store, labels::PROMOTE, now) {
        let said = entry.message.as_deref().filter(|m| !m.is_empty());
        return refuse(format!(
            "it has not come to pass within {} minutes{}",
            PATIENCE.as_mins(),
            said.map_or_else(String::new, |m| format!("; it says: {m}"))
        ));
    }
    None
}

fn loss_accepted(
    store: &PrivacyDataStore,
    leader: Leader<'_>,
    value: &str,
    now: Timestamp,
) -> Option<Over> {
    let refuse = |why: String| {
        Some(Over::Told(
            told::DATA_LOSS_NOT_ACCEPTED,
            format!(
                "{} {value:?} is not acted on: {why}",
                labels::ACCEPT_DATA_LOSS
            ),
        ))
    };
    let parsed = value
        .split_once('@')
        .and_then(|(name, term)| Some((name.trim(), term.trim().parse::<i64>().ok()?)));
    let Some((name, term)) = parsed else {
        return refuse("it must be INSTANCE@TERM".to_owned());
    };
    let Some(entry) = entry(store, name) else {
        return refuse(format!("the store has no instance {name}"));
    };
    let by_hand = store
        .status
        .as_ref()
        .and_then(|s| s.last_failover.as_ref())
        .filter(|f| f.primary == name && f.term > term && f.reason == failover_reasons::BY_HAND);
    if let Some(failover) = by_hand {
        return Some(Over::Told(
            told::DATA_LOSS_ACCEPTED,
            format!(
                "a person accepted that commits are lost: {name} went on from term {term} alone, and is primary of term {}; what only other copies had is gone",
                failover.term
            ),
        ));
    }
    if leader.term > term {
        let primary = leader.name;
        return refuse(format!(
            "{primary} is primary of term {} meanwhile",
            leader.term
        ));
    }
    if let Some(known) = entry.term.filter(|known| *known > term) {
        return refuse(format!("{name} knows term {known}"));
    }
    if expired(store, labels::ACCEPT_DATA_LOSS, now) {
        return refuse(format!(
            "{name} has not acted on it within {} minutes{}",
            PATIENCE.as_mins(),
            entry
                .message
                .as_deref()
                .map_or_else(String::new, |m| format!("; it says: {m}"))
        ));
    }
    None
}

/// Whether the annotation that fences names the instance.
#[must_use]
pub fn fenced(store: &PrivacyDataStore, instance: &str) -> bool {
    let value = store.annotations().get(labels::FENCE);
    value.is_some_and(|v| v.split(',').any(|n| n.trim() == instance))
}

/// Whether an annotation has been there for too long. When it was set, the API server has noted with whoever set
/// it.
fn expired(store: &PrivacyDataStore, annotation: &str, now: Timestamp) -> bool {
    let field = format!("f:{annotation}");
    let set = store
        .metadata
        .managed_fields
        .iter()
        .flatten()
        .filter(|m| {
            m.fields_v1
                .as_ref()
                .is_some_and(|f| !f.0["f:metadata"]["f:annotations"][&field].is_null())
        })
        .filter_map(|m| m.time.as_ref())
        .map(|t| t.0)
        .max();
    set.is_some_and(|set| now.duration_since(set) >= PATIENCE)
}
