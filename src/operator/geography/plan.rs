//! What the cluster-scoped objects should say: stamps on nodes, statuses of Regions and policies.
//!
//! Pure. Never stamps a node whose whereabouts are not certain: an old stamp is removed the moment a witness
//! disagrees, so that nothing new is scheduled there.

use jiff::Timestamp;
use kube::{Resource, ResourceExt};
use std::collections::BTreeSet;
use std::sync::Arc;

use crate::api::conditions::{self, Verdict, reasons};
use crate::api::region::RegionStatus;
use crate::api::residency_policy::ResidencyPolicyStatus;
use crate::api::{Region, ResidencyPolicy, labels};
use crate::residency::{NodeFacts, Permissions, locate};

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
    /// Names of the policies that stores and workflows refer to, once per reference.
    pub references: Vec<String>,
}

/// Everything that isn't yet as it should be.
#[must_use]
pub fn plan(seen: &Seen, now: Timestamp) -> Vec<Write> {
    let regions = || seen.regions.iter().map(AsRef::as_ref);
    let mut writes: Vec<Write> = seen
        .nodes
        .iter()
        .filter_map(|node| {
            let region = locate(node, regions()).region().map(str::to_owned);
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
    for policy in &seen.policies {
        let new = policy_status(policy, seen, now);
        if policy.status.as_ref() != Some(&new) {
            writes.push(Write::Policy(policy.name_any(), Box::new(new)));
        }
    }
    writes
}

fn region_status(region: &Region, seen: &Seen, now: Timestamp) -> RegionStatus {
    let name = region.name_any();
    let here: Vec<&NodeFacts> = seen
        .nodes
        .iter()
        .filter(|n| {
            locate(n, seen.regions.iter().map(AsRef::as_ref)).region() == Some(name.as_str())
        })
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
        zones: zones.into_iter().take(64).collect(),
    }
}

fn policy_status(policy: &ResidencyPolicy, seen: &Seen, now: Timestamp) -> ResidencyPolicyStatus {
    let name = policy.name_any();
    let regions = seen.regions.iter().map(AsRef::as_ref);
    let permissions = Permissions::resolve(policy, regions.clone());
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
    let old = policy.status.clone().unwrap_or_default();
    let used_by = seen.references.iter().filter(|r| **r == name).count();
    ResidencyPolicyStatus {
        conditions: conditions::merge(&old.conditions, &[verdict], policy.meta().generation, now),
        observed_generation: policy.meta().generation,
        used_by: i32::try_from(used_by).ok(),
        permits: permissions.published(regions),
    }
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
