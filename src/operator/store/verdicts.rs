//! The three conditions that hold whether or not a store is being worked on: Available, Resident, Durable.
//!
//! Pure; as `assess`.

use kube::ResourceExt;

use super::assess::{desired, pod_ready};
use super::observe::Observed;
use super::validate::{Lawful, data_of_instance};
use crate::api::conditions::{self, Verdict, reasons};
use crate::api::privacy_data_store::InstanceRole;
use crate::api::residency_policy::Data;
use crate::api::{labels, names};
use crate::residency::{Whereabouts, locate};

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

/// Whether every running copy is on a node that is where the copy may be.
pub(super) fn resident(observed: &Observed, lawful: Option<(&Lawful, &str)>) -> Verdict {
    let Some((lawful, primary)) = lawful else {
        return Verdict::unknown(
            conditions::RESIDENT,
            reasons::UNKNOWN,
            "not checked while the store is not worked on; see Ready",
        );
    };
    let data = data_of_instance(desired(observed));
    let mut outside = Vec::new();
    let mut unsure = Vec::new();
    for pod in &observed.pods {
        let Some(node_name) = pod.spec.as_ref().and_then(|s| s.node_name.as_deref()) else {
            continue;
        };
        let name = pod.name_any();
        let data = if name == primary { Data::Primary } else { data };
        let Some(node) = observed.nodes.iter().find(|n| n.name == node_name) else {
            unsure.push(format!(
                "{name} is bound to node {node_name}, which is not known"
            ));
            continue;
        };
        match locate(node, observed.regions.iter().map(AsRef::as_ref)) {
            Whereabouts::In(region) => {
                if let Err(refusal) = lawful.permissions.check(data, &region) {
                    outside.push(format!("{name} is on node {node_name}: {refusal}"));
                }
            }
            Whereabouts::Unclaimed => outside.push(format!(
                "{name} is on node {node_name}, which is in no Region"
            )),
            Whereabouts::Disputed(regions) => outside.push(format!(
                "{name} is on node {node_name}, which Regions {} dispute",
                regions.join(", ")
            )),
        }
    }
    let store = observed.store.name_any();
    for claim in &observed.claims {
        let name = claim.name_any();
        let region = claim.labels().get(labels::REGION);
        let has_pod = observed.pods.iter().any(|p| p.name_any() == name);
        if let Some(region) = region.filter(|_| names::slot(&store, &name).is_some() && !has_pod) {
            let data = if name == primary { Data::Primary } else { data };
            if let Err(refusal) = lawful.permissions.check(data, region) {
                outside.push(format!("volume claim {name} is kept: {refusal}"));
            }
        }
    }
    outside.sort();
    unsure.sort();
    if !outside.is_empty() {
        Verdict::new(
            conditions::RESIDENT,
            false,
            reasons::OUTSIDE,
            outside.join("; "),
        )
    } else if !unsure.is_empty() {
        Verdict::unknown(conditions::RESIDENT, reasons::UNKNOWN, unsure.join("; "))
    } else {
        let policy = lawful.permissions.policy();
        Verdict::new(
            conditions::RESIDENT,
            true,
            reasons::AS_SPECIFIED,
            format!("every copy is where ResidencyPolicy {policy} permits"),
        )
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
