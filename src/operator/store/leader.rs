//! Who is primary, as the instances say.
//!
//! Owns the reading of their reports. The operator names the first primary of a store and never another: from
//! then on it copies what the instances have decided.
//! Never goes back to a lower term, and never takes silence for a change.

use crate::api::PrivacyDataStore;
use crate::api::privacy_data_store::{InstanceRole, InstanceStatus};

/// Who is primary, and since which term.
#[derive(Clone, Copy, Debug)]
pub struct Leader<'a> {
    /// The instance.
    pub name: &'a str,
    /// Its term.
    pub term: i64,
}

/// The slot of a voter that is named `INSTANCE/VOLUME`.
#[must_use]
pub fn instance_of(voter: &str) -> &str {
    voter.split_once('/').map_or(voter, |(name, _)| name)
}

/// The primary: the one on record, or the one that reports itself in a term at least as high. While nobody
/// reports itself, the last one. `None`: the store has never had one.
#[must_use]
pub fn of(store: &PrivacyDataStore) -> Option<Leader<'_>> {
    let status = store.status.as_ref()?;
    let recorded = Leader {
        name: status.primary.as_deref()?,
        term: status.term.unwrap_or(1),
    };
    // An instance that has just stepped down may know the new term before it takes back its old role: what the
    // new primary says of the configuration decides then.
    let agreed = |e: &InstanceStatus| {
        status.configuration.as_ref().is_some_and(|c| {
            Some(c.term) == e.term && c.primary.as_deref().map(instance_of) == Some(e.name.as_str())
        })
    };
    let reported = status
        .instances
        .iter()
        .filter(|e| e.role == Some(InstanceRole::Primary))
        .filter(|e| e.term.is_some_and(|t| t >= recorded.term))
        .max_by_key(|e| {
            let kept = e.name == recorded.name && e.term == Some(recorded.term);
            (e.term, agreed(e), kept, e.ready == Some(true), &e.name)
        });
    Some(match reported.and_then(|e| Some((e, e.term?))) {
        Some((entry, term)) => Leader {
            name: &entry.name,
            term,
        },
        None => recorded,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use serde_json::{Value, json};

    fn store(status: &Value) -> PrivacyDataStore {
        serde_json::from_value(json!({
            "apiVersion": "domicile.dev/v1alpha1", "kind": "PrivacyDataStore", "metadata": { "name": "s" },
            "spec": { "residencyPolicyRef": { "name": "p" }, "placement": [], "storage": { "size": "1Gi" } },
            "status": status,
        }))
        .unwrap()
    }

    fn leader(status: &Value) -> Option<(String, i64)> {
        of(&store(status)).map(|l| (l.name.to_owned(), l.term))
    }

    #[test]
    fn the_highest_term_that_is_reported_wins_and_silence_changes_nothing() {
        assert_eq!(leader(&json!({})), None);
        let silent = json!({ "primary": "s-1", "term": 4, "instances": [
            { "name": "s-1", "role": "Starting", "term": 4 }, { "name": "s-2", "role": "Standby", "term": 4 } ] });
        assert_eq!(leader(&silent), Some(("s-1".into(), 4)));
        let moved = json!({ "primary": "s-1", "term": 4, "instances": [
            // What a dead instance said last stays.
            { "name": "s-1", "role": "Primary", "term": 4 }, { "name": "s-2", "role": "Primary", "term": 5 } ] });
        assert_eq!(leader(&moved), Some(("s-2".into(), 5)));
        let late = json!({ "primary": "s-2", "term": 5, "instances": [
            { "name": "s-1", "role": "Primary", "term": 4 }, { "name": "s-2", "role": "Starting", "term": 5 } ] });
        assert_eq!(leader(&late), Some(("s-2".into(), 5)));
    }

    #[test]
    fn of_two_in_one_term_the_agreed_one_counts() {
        let both = json!({ "primary": "s-1", "term": 4, "instances": [
            { "name": "s-1", "role": "Primary", "term": 5 }, { "name": "s-2", "role": "Primary", "term": 5 } ],
            "configuration": { "term": 5, "primary": "s-2/x" } });
        assert_eq!(leader(&both), Some(("s-2".into(), 5)));
    }

    proptest! {
        #[test]
        fn the_term_never_falls(
            recorded in 1i64..6,
            said in proptest::collection::vec((0usize..4, proptest::option::of(0i64..8)), 0..5),
        ) {
            let roles = ["Primary", "Standby", "Starting", "Failed"];
            let instances: Vec<Value> = said
                .iter()
                .enumerate()
                .map(|(i, (role, term))| json!({ "name": format!("s-{i}"), "role": roles[*role], "term": term }))
                .collect();
            let status = json!({ "primary": "s-9", "term": recorded, "instances": instances });
            let (name, term) = leader(&status).unwrap();
            prop_assert!(term >= recorded);
            // It names one that says so of itself, or nothing has changed.
            let says = said.iter().enumerate().any(|(i, (role, t))| format!("s-{i}") == name && *role == 0 && *t == Some(term));
            prop_assert!(says || (name == "s-9" && term == recorded));
        }
    }
}
