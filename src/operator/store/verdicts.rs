//! Two conditions that hold whether or not a store is being worked on: Available and Durable.
//!
//! Pure; as `assess`.

use kube::ResourceExt;

use super::assess::pod_ready;
use super::observe::Observed;
use crate::api::conditions::{self, Verdict, reasons};
use crate::api::privacy_data_store::InstanceRole;

/// Whether writes are accepted.
pub(super) fn available(observed: &Observed, primary: Option<&str>) -> Verdict {
    let Some(primary) = primary else {
        return Verdict::new(
            conditions::AVAILABLE,
            false,
            reasons::NO_PRIMARY,
            "there is no primary yet",
        );
    };
    let pod = observed.pods.iter().find(|p| p.name_any() == primary);
    let serves = observed
        .store
        .status
        .iter()
        .flat_map(|s| &s.instances)
        .any(|e| {
            e.name == primary && e.role == Some(InstanceRole::Primary) && e.ready == Some(true)
        });
    if serves && pod_ready(pod) {
        Verdict::new(
            conditions::AVAILABLE,
            true,
            reasons::AS_SPECIFIED,
            format!("{primary} accepts writes"),
        )
    } else {
        let mut message = format!("primary {primary} does not serve");
        // The instances decide who is next, and say what keeps them from it.
        let entries = observed.store.status.iter().flat_map(|s| &s.instances);
        let mut said: Vec<String> = entries
            .filter(|e| e.ready != Some(true))
            .filter_map(|e| Some((e, e.message.as_deref().filter(|m| !m.is_empty())?)))
            .map(|(e, m)| format!("{}: {m}", e.name))
            .collect();
        said.sort();
        for words in said {
            message.push_str("; ");
            message.push_str(&words);
        }
        Verdict::new(conditions::AVAILABLE, false, reasons::NO_PRIMARY, message)
    }
}

/// Whether a commit survives the loss of an instance.
pub(super) fn durable(observed: &Observed, primary: Option<&str>) -> Verdict {
    let says = primary.and_then(|p| {
        observed
            .store
            .status
            .iter()
            .flat_map(|s| &s.instances)
            .find(|e| e.name == p)
    });
    let alive =
        primary.is_some_and(|p| pod_ready(observed.pods.iter().find(|pod| pod.name_any() == p)));
    match says.and_then(|e| e.durable).filter(|_| alive) {
        Some(true) => Verdict::new(
            conditions::DURABLE,
            true,
            reasons::AS_SPECIFIED,
            "a commit is acknowledged only once enough standbys have flushed it",
        ),
        Some(false) => Verdict::new(
            conditions::DURABLE,
            false,
            reasons::STANDBYS_MISSING,
            "too few standbys stream from the primary",
        ),
        None => Verdict::new(
            conditions::DURABLE,
            false,
            reasons::NO_PRIMARY,
            "no primary serves",
        ),
    }
}
