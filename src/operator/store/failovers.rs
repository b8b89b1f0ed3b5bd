//! The event of a failover: who, why, and how long each part took.
//!
//! Pure. Never tells one twice: the event's name has the term, and one that is older than events are kept is
//! not told any more.

use jiff::{SignedDuration, Timestamp};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::MicroTime;
use kube::ResourceExt;

use crate::api::PrivacyDataStore;
use crate::api::privacy_data_store::{LastFailover, failover_reasons};

/// The last milestone may come late, or never while the API server is away: the rest is told then.
const PATIENCE: SignedDuration = SignedDuration::from_secs(30);
/// API servers keep events for an hour: within this time one that was told is still there.
const STALE: SignedDuration = SignedDuration::from_mins(30);

/// An event with a name of its own.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Told {
    /// The term, which is told once.
    pub term: i64,
    /// Name of the Event object.
    pub name: String,
    /// The words.
    pub note: String,
    /// Nobody asked for it.
    pub warning: bool,
}

/// The event to write now, unless the term was told already.
#[must_use]
pub fn due(store: &PrivacyDataStore, told: Option<i64>, now: Timestamp) -> Option<Told> {
    let failover = store.status.as_ref()?.last_failover.as_ref()?;
    if failover.reason == failover_reasons::FOUNDING || told.is_some_and(|t| t >= failover.term) {
        return None;
    }
    let at = |t: &Option<MicroTime>| t.as_ref().map(|t| t.0);
    let latest = [
        at(&failover.promoted_at),
        at(&failover.elected_at),
        at(&failover.fenced_at),
        at(&failover.detected_at),
    ]
    .into_iter()
    .flatten()
    .next();
    if let Some(latest) = latest {
        let age = now.duration_since(latest);
        if age > STALE || (failover.routed_at.is_none() && age < PATIENCE) {
            return None;
        }
    }
    // Another store of the same name counts its own terms.
    let uid = store.uid().unwrap_or_default();
    let uid: String = uid.chars().take(8).collect();
    Some(Told {
        term: failover.term,
        name: format!("{}.failover-{}-{uid}", store.name_any(), failover.term),
        note: note(failover),
        warning: failover.reason != failover_reasons::HAND_OVER,
    })
}

fn note(failover: &LastFailover) -> String {
    let from = failover
        .previous_primary
        .as_deref()
        .map_or_else(String::new, |p| format!(" after {p}"));
    let mut note = format!(
        "{} is primary{from} in term {}: {}",
        failover.primary, failover.term, failover.reason
    );
    let Some(detected) = &failover.detected_at else {
        return note;
    };
    let parts: Vec<String> = [
        ("fenced", &failover.fenced_at),
        ("elected", &failover.elected_at),
        ("promoted", &failover.promoted_at),
        ("routed", &failover.routed_at),
    ]
    .into_iter()
    .filter_map(|(what, at)| {
        let after = at.as_ref()?.0.duration_since(detected.0).as_millis();
        Some(format!("{what} {after} ms"))
    })
    .collect();
    if !parts.is_empty() {
        note.push_str("; after detection: ");
        note.push_str(&parts.join(", "));
    }
    note
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::{Value, json};

    fn store(failover: &Value) -> PrivacyDataStore {
        serde_json::from_value(json!({
            "apiVersion": "domicile.dev/v1alpha1", "kind": "PrivacyDataStore",
            "metadata": { "name": "s", "uid": "0123456789" },
            "spec": { "residencyPolicyRef": { "name": "p" }, "placement": [], "storage": { "size": "1Gi" } },
            "status": { "lastFailover": failover },
        }))
        .unwrap()
    }

    fn second(second: i64) -> Timestamp {
        Timestamp::from_second(second).unwrap()
    }

    #[test]
    fn a_failover_is_told_once_with_its_milestones() {
        let whole = store(&json!({
            "term": 5, "primary": "s-2", "previousPrimary": "s-1", "reason": "PrimarySilent",
            "detectedAt": "1970-01-01T00:00:01.000Z", "fencedAt": "1970-01-01T00:00:01.014Z",
            "electedAt": "1970-01-01T00:00:01.030Z", "promotedAt": "1970-01-01T00:00:01.140Z",
            "routedAt": "1970-01-01T00:00:01.200Z",
        }));
        let told = due(&whole, None, second(2)).unwrap();
        assert_eq!(
            told.note,
            "s-2 is primary after s-1 in term 5: PrimarySilent; after detection: fenced 14 ms, elected 30 ms, promoted 140 ms, routed 200 ms"
        );
        assert_eq!(told.name, "s.failover-5-01234567");
        assert!(told.warning);
        assert_eq!(due(&whole, Some(5), second(2)), None);
        assert!(due(&whole, Some(4), second(2)).is_some());
        assert_eq!(due(&whole, None, second(3600)), None, "long past");
    }

    #[test]
    fn it_waits_for_the_last_milestone_but_not_for_ever() {
        let part = store(&json!({
            "term": 5, "primary": "s-2", "reason": "HandOver", "promotedAt": "1970-01-01T00:00:01Z",
        }));
        assert_eq!(due(&part, None, second(2)), None);
        let told = due(&part, None, second(40)).unwrap();
        assert_eq!(told.note, "s-2 is primary in term 5: HandOver");
        assert!(!told.warning);
        let founding = store(&json!({ "term": 2, "primary": "s-1", "reason": "Founding" }));
        assert_eq!(due(&founding, None, second(2)), None);
    }
}
