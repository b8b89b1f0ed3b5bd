//! Volumes that are lost: with their node, or with their PersistentVolume.
//!
//! Owns the conditions under which one is given up, and made anew as an empty one that copies the primary.
//! Pure. Never gives up the primary's volume, nor any while the rest doesn't carry every commit without it: what
//! is unreachable may still be the last good copy.

use jiff::{SignedDuration, Timestamp};
use k8s_openapi::api::core::v1::{NodeSelectorTerm, PersistentVolume, PersistentVolumeClaim, Pod};
use kube::ResourceExt;

use super::assess::{desired, pod_ready};
use super::leader::Leader;
use super::lifecycle::{delete_pod, ending};
use super::observe::Observed;
use super::plan::{Instance, bound};
use super::step::{Object, Step};
use crate::api::conditions::reasons;
use crate::api::privacy_data_store::{InstanceRole, InstanceStatus};
use crate::residency::NodeFacts;
use crate::residency::violations::{Affinity, Requirement};

/// A pod waits this long for its volume before that counts as lost: a node that registers anew, or a volume
/// that is late, must not cost a copy.
const PATIENCE: SignedDuration = SignedDuration::from_secs(60);

/// What of a volume matters: which nodes reach it, and on which alone it can be.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Volume {
    /// There is no such PersistentVolume.
    pub gone: bool,
    /// The nodes that it is on, as label and value; the label "" is the node's name. Empty: it isn't tied to
    /// single nodes.
    pub nodes: Vec<(String, String)>,
    /// Its node affinity. None: nothing is said of where it is.
    pub affinity: Option<Affinity>,
}

impl Volume {
    /// Of a PersistentVolume.
    #[must_use]
    pub fn of(volume: &PersistentVolume) -> Self {
        Self {
            affinity: affinity(volume),
            nodes: Self::nodes(volume),
            gone: false,
        }
    }

    fn nodes(volume: &PersistentVolume) -> Vec<(String, String)> {
        let terms = volume
            .spec
            .as_ref()
            .and_then(|s| s.node_affinity.as_ref())
            .and_then(|a| a.required.as_ref())
            .map(|r| r.node_selector_terms.as_slice())
            .unwrap_or_default();
        let mut nodes = Vec::new();
        for term in terms {
            let names = term.match_fields.iter().flatten();
            let labels = term.match_expressions.iter().flatten();
            let single = names
                .filter(|f| f.key == "metadata.name")
                .map(|f| (String::new(), f))
                .chain(
                    labels
                        .filter(|e| names_a_node(&e.key))
                        .map(|e| (e.key.clone(), e)),
                )
                .find(|(_, e)| e.operator == "In");
            let Some((key, expression)) = single else {
                // One alternative that isn't tied to a node: the volume may be reached from others.
                return Vec::new();
            };
            let values = expression.values.iter().flatten();
            nodes.extend(values.map(|value| (key.clone(), value.clone())));
        }
        nodes
    }

    /// No node has it, or ever will.
    fn lost(&self, nodes: &[NodeFacts]) -> bool {
        let there = |(label, value): &(String, String)| {
            nodes.iter().any(|n| {
                if label.is_empty() {
                    n.name == *value
                } else {
                    n.labels.get(label) == Some(value)
                }
            })
        };
        // Without any node nothing is known of nodes.
        self.gone || (!nodes.is_empty() && !self.nodes.is_empty() && !self.nodes.iter().any(there))
    }
}

/// The node affinity of a volume, as requirements.
fn affinity(volume: &PersistentVolume) -> Option<Affinity> {
    let required = volume
        .spec
        .as_ref()?
        .node_affinity
        .as_ref()?
        .required
        .as_ref()?;
    let requirements = |term: &NodeSelectorTerm| {
        let labels = term.match_expressions.iter().flatten();
        let fields = term.match_fields.iter().flatten();
        labels
            .map(|e| (e.key.clone(), e))
            // The only field there is: the node's name.
            .chain(fields.map(|e| (String::new(), e)))
            .map(|(key, e)| Requirement {
                key,
                operator: e.operator.clone(),
                values: e.values.clone().unwrap_or_default(),
            })
            .collect()
    };
    let terms = required.node_selector_terms.iter();
    Some(terms.map(requirements).collect())
}

/// Labels that tell one node from all others, as provisioners of local volumes use them. A zone's nodes may all
/// be away for a night and come back with the zone's volumes.
fn names_a_node(label: &str) -> bool {
    ["/hostname", "/node", "/nodename"]
        .iter()
        .any(|end| label.ends_with(end))
}

/// Whether a pod waits for a node.
fn unplaced(pod: &Pod) -> bool {
    let node = pod.spec.as_ref().and_then(|s| s.node_name.as_deref());
    pod.metadata.deletion_timestamp.is_none() && node.is_none_or(str::is_empty)
}

fn waits_for_long(pod: &Pod, now: Timestamp) -> bool {
    let since = pod.metadata.creation_timestamp.as_ref().map(|t| t.0);
    unplaced(pod) && since.is_some_and(|since| now.duration_since(since) >= PATIENCE)
}

/// Whether an instance's volume is lost, as far as can be told.
#[must_use]
pub fn is_lost(
    observed: &Observed,
    claim: &PersistentVolumeClaim,
    pod: Option<&Pod>,
    now: Timestamp,
) -> bool {
    let phase = claim.status.as_ref().and_then(|s| s.phase.as_deref());
    let volume = observed.volumes.get(&claim.name_any());
    bound(claim)
        && !ending(claim)
        && pod.is_some_and(|p| waits_for_long(p, now))
        && (phase == Some("Lost") || volume.is_some_and(|v| v.lost(&observed.nodes)))
}

/// Gives up one lost volume, if the others carry on without it.
pub fn replace(
    observed: &Observed,
    instances: &[Instance<'_>],
    leader: Leader<'_>,
    now: Timestamp,
    steps: &mut Vec<Step>,
) {
    let entry = |name: &str| -> Option<&InstanceStatus> {
        let all = observed.store.status.as_ref()?;
        all.instances.iter().find(|e| e.name == name)
    };
    let ready = |i: &&Instance<'_>| {
        pod_ready(i.pod) && entry(&i.name).is_some_and(|e| e.ready == Some(true))
    };
    let Some((instance, claim, pod)) = instances.iter().find_map(|i| {
        let (claim, pod) = (i.claim?, i.pod?);
        (i.name != leader.name && is_lost(observed, claim, i.pod, now)).then_some((i, claim, pod))
    }) else {
        return;
    };
    let Some(primary) = instances
        .iter()
        .filter(ready)
        .find(|i| i.name == leader.name)
        .and_then(|i| entry(&i.name))
        .filter(|e| e.role == Some(InstanceRole::Primary))
    else {
        return;
    };
    let others = || {
        instances
            .iter()
            .filter(|i| i.name != leader.name && i.name != instance.name)
    };
    // Half of the copies, as a commit waits for; of two, the primary's alone.
    let acks = usize::try_from(desired(observed) / 2).unwrap_or(0).max(1);
    let needed = acks.min(others().count());
    let carried =
        others().filter(ready).count() >= needed && (needed == 0 || primary.durable == Some(true));
    if !carried {
        return;
    }
    steps.push(Step::Tell {
        reason: reasons::VOLUME_LOST,
        warning: true,
        note: format!(
            "the volume of {} is lost with its node: it is given up, and a new one copies the primary {}",
            instance.name, leader.name
        ),
    });
    steps.push(Step::Delete {
        object: Object::Claim,
        name: claim.name_any(),
        uid: claim.uid().unwrap_or_default(),
    });
    steps.push(delete_pod(pod));
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn volume(terms: &serde_json::Value) -> Volume {
        let volume =
            json!({ "spec": { "nodeAffinity": { "required": { "nodeSelectorTerms": terms } } } });
        Volume::of(&serde_json::from_value(volume).unwrap())
    }

    fn node(name: &str) -> NodeFacts {
        NodeFacts {
            name: name.into(),
            labels: [("kubernetes.io/hostname".to_owned(), name.to_owned())].into(),
            ..NodeFacts::default()
        }
    }

    #[test]
    fn only_a_volume_of_nodes_that_are_no_more_is_lost() {
        let on = |key: &str| json!([{ "matchExpressions": [{ "key": key, "operator": "In", "values": ["w1"] }] }]);
        let local = volume(&on("kubernetes.io/hostname"));
        assert!(local.lost(&[node("w2")]));
        assert!(!local.lost(&[node("w2"), node("w1")]));
        assert!(!local.lost(&[]), "nothing is known of nodes");
        assert!(volume(&on("topology.topolvm.io/node")).lost(&[node("w1")]));
        assert!(!volume(&on("topology.kubernetes.io/zone")).lost(&[node("w2")]));
        assert!(!volume(&json!([])).lost(&[node("w2")]));
        let named = json!([{ "matchFields": [{ "key": "metadata.name", "operator": "In", "values": ["w1"] }] }]);
        assert!(volume(&named).lost(&[node("w2")]));
        assert!(!volume(&named).lost(&[node("w1")]));
        let either = json!([
            { "matchExpressions": [{ "key": "kubernetes.io/hostname", "operator": "In", "values": ["w1"] }] },
            { "matchExpressions": [{ "key": "topology.kubernetes.io/zone", "operator": "In", "values": ["a"] }] },
        ]);
        assert!(!volume(&either).lost(&[node("w2")]));
    }
}
