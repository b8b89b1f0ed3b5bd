//! What the cluster-scoped objects should say: stamps on nodes, statuses of Regions and policies, bindings.
//!
//! Pure. Never stamps a node whose whereabouts are not certain: an old stamp is removed the moment a witness
//! disagrees, so that nothing new is scheduled there.

use jiff::Timestamp;
use k8s_openapi::api::admissionregistration::v1::ValidatingAdmissionPolicyBinding;
use kube::{Resource, ResourceExt};
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use super::gate::{self, Gate};
use crate::api::conditions::{self, Verdict, reasons};
use crate::api::region::RegionStatus;
use crate::api::residency_policy::ResidencyPolicyStatus;
use crate::api::{PrivacyDataStore, Region, ResidencyPolicy, RightsWorkflow, labels};
use crate::residency::binding::{self, Published};
use crate::residency::{NodeFacts, Permissions, forbidden, locate};

/// One write.
#[derive(Clone, Debug, PartialEq)]
pub enum Write {
    /// Set or remove the label that says in which Region a node was verified to be.
    Stamp {
        /// The node.
        node: String,
        /// The Region; `None` removes the label.
        region: Option<String>,
    },
    /// A Region's status.
    Region(String, RegionStatus),
    /// A policy's status.
    Policy(String, Box<ResidencyPolicyStatus>),
    /// A binding of an admission policy.
    Bind(Box<ValidatingAdmissionPolicyBinding>),
    /// A binding that nobody needs any more.
    Unbind {
        /// Its name.
        name: String,
        /// Its uid, so that a successor of the same name is left alone.
        uid: String,
    },
}

/// What is known.
#[derive(Clone, Debug, Default)]
pub struct Seen {
    /// Every Region.
    pub regions: Vec<Arc<Region>>,
    /// Every policy.
    pub policies: Vec<Arc<ResidencyPolicy>>,
    /// Every node.
    pub nodes: Vec<NodeFacts>,
    /// Every store.
    pub stores: Vec<Arc<PrivacyDataStore>>,
    /// Every workflow.
    pub workflows: Vec<Arc<RightsWorkflow>>,
    /// The namespaces that name a policy as their ceiling: namespace, policy.
    pub ceilings: BTreeMap<String, String>,
    /// What the API server offers; `None`: not known, so that nothing is done about it.
    pub gate: Option<Gate>,
    /// The bindings of our admission policies.
    pub bindings: Vec<Arc<ValidatingAdmissionPolicyBinding>>,
}

impl Seen {
    fn regions(&self) -> impl Iterator<Item = &Region> + Clone {
        self.regions.iter().map(AsRef::as_ref)
    }

    fn permissions(&self, policy: &ResidencyPolicy) -> Permissions {
        Permissions::resolve(policy, self.regions())
    }

    /// What `policy` permits in a namespace, under the ceiling that the namespace names.
    fn permissions_in(&self, policy: &ResidencyPolicy, namespace: &str) -> Permissions {
        let own = self.permissions(policy);
        let above = self.ceilings.get(namespace);
        let above = above.and_then(|name| self.policies.iter().find(|p| p.name_any() == *name));
        match above {
            Some(above) => own.under(self.permissions(above)),
            None => own,
        }
    }
}

/// Everything that isn't yet as it should be.
#[must_use]
pub fn plan(seen: &Seen, now: Timestamp) -> Vec<Write> {
    let mut writes: Vec<Write> = seen
        .nodes
        .iter()
        .filter_map(|node| {
            let region = locate(node, seen.regions()).region().map(str::to_owned);
            let differs = node.labels.get(labels::NODE_REGION) != region.as_ref();
            differs.then(|| Write::Stamp {
                node: node.name.clone(),
                region,
            })
        })
        .collect();
    for region in &seen.regions {
        let new = region_status(region, seen, now);
        if region.status.as_ref() != Some(&new) {
            writes.push(Write::Region(region.name_any(), new));
        }
    }
    let (mut enforced, mut waived) = (BTreeSet::new(), BTreeSet::new());
    for policy in &seen.policies {
        let new = policy_status(policy, seen, now);
        if let Some(gate) = &seen.gate {
            let enforces = gate.enforces(new.nodes.as_deref());
            let set = if enforces { &mut enforced } else { &mut waived };
            set.insert(policy.name_any());
        }
        if policy.status.as_ref() != Some(&new) {
            writes.push(Write::Policy(policy.name_any(), Box::new(new)));
        }
    }
    if let Some(gate) = &seen.gate {
        writes.extend(gate::plan(gate, &enforced, &waived, &seen.bindings));
    }
    writes
}

/// How many policies that are in use permit something in this Region, and how many stores and workflows name it or
/// are in it. A policy that nobody uses holds nothing: both may go in any order.
fn users_of_region(name: &str, seen: &Seen) -> usize {
    let policies = seen.policies.iter().filter(|p| {
        let permissions = seen.permissions(p);
        users_of_policy(&p.name_any(), seen) > 0
            && permissions
                .kinds()
                .any(|data| permissions.permits(data, name))
    });
    let stores = seen.stores.iter().filter(|s| {
        let placed = s.status.iter().flat_map(|s| &s.instances);
        s.spec.placement.iter().any(|p| p.region == name)
            || placed
                .into_iter()
                .any(|i| i.region.as_deref() == Some(name))
    });
    let workflows = seen
        .workflows
        .iter()
        .filter(|w| w.spec.workers.pools.iter().any(|p| p.region == name));
    policies.count() + stores.count() + workflows.count()
}

fn region_status(region: &Region, seen: &Seen, now: Timestamp) -> RegionStatus {
    let name = region.name_any();
    let here: Vec<&NodeFacts> = seen
        .nodes
        .iter()
        .filter(|n| locate(n, seen.regions()).region() == Some(name.as_str()))
        .collect();
    let zones: BTreeSet<String> = here
        .iter()
        .filter_map(|n| n.labels.get(labels::NODE_ZONE).cloned())
        .collect();
    let verdict = if here.is_empty() {
        Verdict::new(
            conditions::READY,
            false,
            reasons::NO_NODES,
            "no node carries every witness of this region, or another Region claims the same nodes: compare spec.nodes with the nodes' labels and providerIDs",
        )
    } else {
        Verdict::new(
            conditions::READY,
            true,
            reasons::AS_SPECIFIED,
            format!("{} node(s) in {} zone(s)", here.len(), zones.len().max(1)),
        )
    };
    let old = region.status.clone().unwrap_or_default();
    RegionStatus {
        conditions: conditions::merge(&old.conditions, &[verdict], region.meta().generation, now),
        observed_generation: region.meta().generation,
        nodes: i32::try_from(here.len()).ok(),
        used_by: i32::try_from(users_of_region(&name, seen)).ok(),
        zones: zones.into_iter().take(64).collect(),
    }
}

fn policy_status(policy: &ResidencyPolicy, seen: &Seen, now: Timestamp) -> ResidencyPolicyStatus {
    let name = policy.name_any();
    let permissions = seen.permissions(policy);
    let unknown: Vec<&str> = permissions.unknown().collect();
    let verdict = if unknown.is_empty() {
        Verdict::new(
            conditions::READY,
            true,
            reasons::AS_SPECIFIED,
            "every region and jurisdiction it names is defined",
        )
    } else {
        Verdict::new(
            conditions::READY,
            false,
            reasons::REGION_NOT_FOUND,
            format!(
                "no Region object defines {}: nothing can be placed there until one does",
                unknown.join(", ")
            ),
        )
    };
    let Published { permits, nodes } = binding::publish(&permissions, seen.regions(), &seen.nodes);
    let mut verdicts = vec![verdict];
    verdicts.extend(
        seen.gate
            .as_ref()
            .map(|gate| gate::verdict(gate, &name, nodes.as_deref())),
    );
    verdicts.push(respected(policy, seen));
    let mut within: Vec<String> = seen
        .policies
        .iter()
        .filter(|other| other.name_any() != name)
        .filter(|other| permissions.lies_within(&seen.permissions(other)))
        .map(|other| other.name_any())
        .collect();
    within.sort();
    within.truncate(256);
    let old = policy.status.clone().unwrap_or_default();
    ResidencyPolicyStatus {
        conditions: conditions::merge(&old.conditions, &verdicts, policy.meta().generation, now),
        observed_generation: policy.meta().generation,
        used_by: i32::try_from(users_of_policy(&name, seen)).ok(),
        permits,
        nodes,
        within,
    }
}

/// How many stores, workflows and namespaces refer to this policy.
fn users_of_policy(name: &str, seen: &Seen) -> usize {
    let stores = seen
        .stores
        .iter()
        .map(|s| &s.spec.residency_policy_ref.name);
    let workflows = seen
        .workflows
        .iter()
        .map(|w| &w.spec.residency_policy_ref.name);
    stores
        .chain(workflows)
        .chain(seen.ceilings.values())
        .filter(|n| *n == name)
        .count()
}

/// How much of what is outside is spelt out in the condition; `kubectl domicile explain policy` shows all.
const SHOWN: usize = 8;

/// What the policy forbids of what is there.
fn respected(policy: &ResidencyPolicy, seen: &Seen) -> Verdict {
    let name = policy.name_any();
    let mut found: Vec<String> = Vec::new();
    for store in &seen.stores {
        if store.spec.residency_policy_ref.name == name {
            let namespace = store.namespace().unwrap_or_default();
            let permissions = seen.permissions_in(policy, &namespace);
            let outside = forbidden::of_store(store, &permissions, seen.regions(), &seen.nodes);
            found.extend(outside);
        }
    }
    for workflow in &seen.workflows {
        if workflow.spec.residency_policy_ref.name == name {
            let namespace = workflow.namespace().unwrap_or_default();
            let permissions = seen.permissions_in(policy, &namespace);
            found.extend(forbidden::of_workflow(workflow, &permissions));
        }
    }
    found.sort();
    if found.is_empty() {
        return Verdict::new(
            conditions::RESPECTED,
            true,
            reasons::AS_SPECIFIED,
            "every copy of the stores under it is where it permits",
        );
    }
    let more = found.len().saturating_sub(SHOWN);
    found.truncate(SHOWN);
    if more > 0 {
        found.push(format!(
            "and {more} more: kubectl domicile explain policy {name}"
        ));
    }
    Verdict::new(
        conditions::RESPECTED,
        false,
        reasons::OUTSIDE,
        found.join("; "),
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::api::region::{NodeWitnesses, RegionSpec};

    fn seen(stamp: Option<&str>) -> Seen {
        let witness = [(labels::NODE_TOPOLOGY_REGION.to_owned(), "w".to_owned())];
        let nodes = NodeWitnesses {
            labels: witness.clone().into(),
            provider_id_prefix: None,
        };
        let mut node = NodeFacts {
            name: "n".into(),
            labels: witness.into(),
            provider_id: None,
            usable: true,
        };
        if let Some(stamp) = stamp {
            node.labels.insert(labels::NODE_REGION.into(), stamp.into());
        }
        Seen {
            regions: vec![Arc::new(Region::new(
                "west",
                RegionSpec {
                    jurisdictions: vec![],
                    nodes,
                },
            ))],
            nodes: vec![node],
            ..Seen::default()
        }
    }

    fn stamps(seen: &Seen) -> Vec<Write> {
        plan(seen, Timestamp::UNIX_EPOCH)
            .into_iter()
            .filter(|w| matches!(w, Write::Stamp { .. }))
            .collect()
    }

    #[test]
    fn a_verified_node_is_stamped_once() {
        let stamp = Write::Stamp {
            node: "n".into(),
            region: Some("west".into()),
        };
        assert_eq!(stamps(&seen(None)), std::slice::from_ref(&stamp));
        assert_eq!(stamps(&seen(Some("elsewhere"))), [stamp]);
        assert_eq!(stamps(&seen(Some("west"))), []);
    }

    #[test]
    fn a_stamp_goes_when_a_witness_disagrees() {
        let mut world = seen(Some("west"));
        world.nodes[0]
            .labels
            .insert(labels::NODE_TOPOLOGY_REGION.into(), "e".into());
        assert_eq!(
            stamps(&world),
            [Write::Stamp {
                node: "n".into(),
                region: None
            }]
        );
    }

    #[test]
    fn a_narrowed_policy_says_what_it_forbids_and_what_is_in_use_is_counted() {
        let mut world = seen(Some("west"));
        let policy: ResidencyPolicy = serde_json::from_value(serde_json::json!({
            "apiVersion": "domicile.dev/v1alpha1", "kind": "ResidencyPolicy", "metadata": { "name": "records", "generation": 1 },
            "spec": { "permits": [{ "data": "Primary", "regions": ["west"] }] },
        }))
        .unwrap();
        let store = serde_json::from_value(serde_json::json!({
            "apiVersion": "domicile.dev/v1alpha1", "kind": "PrivacyDataStore", "metadata": { "name": "s", "namespace": "n" },
            "spec": { "residencyPolicyRef": { "name": "records" }, "storage": { "size": "1Gi" },
                      "placement": [{ "region": "west", "instances": 2 }] },
            "status": { "primary": "s-1", "instances": [{ "name": "s-1", "region": "west", "node": "n" }, { "name": "s-2", "region": "west", "node": "n" }] },
        }))
        .unwrap();
        let mut ceiling = policy.clone();
        ceiling.metadata.name = Some("ceiling".into());
        world.policies = vec![Arc::new(policy), Arc::new(ceiling)];
        world.stores = vec![Arc::new(store)];
        world.ceilings = [("n".to_owned(), "ceiling".to_owned())].into();
        world.gate = Some(Gate {
            installed: true,
            version: (1, 37),
        });
        let mut statuses = BTreeMap::new();
        let writes = plan(&world, Timestamp::UNIX_EPOCH);
        for write in &writes {
            match write {
                Write::Policy(name, status) => {
                    statuses.insert(name.clone(), status.clone());
                }
                Write::Region(_, status) => assert_eq!(status.used_by, Some(3)),
                _ => {}
            }
        }
        let status = &statuses["records"];
        assert_eq!(
            (status.used_by, statuses["ceiling"].used_by),
            (Some(1), Some(1))
        );
        assert_eq!(status.within, ["ceiling"]);
        assert_eq!(status.nodes, Some(vec!["n".to_owned()]));
        let respected = status
            .conditions
            .iter()
            .find(|c| c.type_ == conditions::RESPECTED)
            .unwrap();
        assert_eq!(respected.status, "False");
        assert!(
            respected
                .message
                .starts_with("n/s: instance s-2 is on node n: region west is not permitted for Standby by ResidencyPolicy records"),
            "{}",
            respected.message
        );
        let binds = writes.iter().filter(|w| matches!(w, Write::Bind(_)));
        assert_eq!(binds.count(), 3, "two policies, and the unknown ones");
        world.gate = None;
        let silent = plan(&world, Timestamp::UNIX_EPOCH);
        assert!(
            silent
                .iter()
                .all(|w| !matches!(w, Write::Bind(_) | Write::Unbind { .. }))
        );
    }

    #[test]
    fn an_unchanged_world_is_left_alone_whatever_the_time() {
        let mut world = seen(Some("west"));
        for write in plan(&world, Timestamp::UNIX_EPOCH) {
            if let Write::Region(_, status) = write {
                let mut region = (*world.regions[0]).clone();
                region.status = Some(status);
                world.regions = vec![Arc::new(region)];
            }
        }
        assert_eq!(plan(&world, Timestamp::from_second(99).unwrap()), []);
    }
}
