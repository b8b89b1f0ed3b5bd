//! On which nodes a pod of a labelled namespace may be, and the words in which it is kept off the others.
//!
//! Owns what a policy's status publishes for admission, and the same decision that the admission policy
//! `domicile-binding` makes from it (a test compares the two, to the letter).
//! Never asks what a pod is for where that can't be seen: at binding, the API server shows the Binding and not the
//! pod, so that every pod of such a namespace may be wherever the policy permits any pod at all. Which instance may
//! be where is required of the scheduler by affinity, and checked again in every pass.

use std::collections::BTreeSet;

use super::{NodeFacts, Permissions, locate};
use crate::api::residency_policy::{Data, ResidencyPolicyStatus, ResolvedPermit};
use crate::api::{Region, ResidencyPolicy, labels};

/// The kinds of data that a pod may hold or touch. Backup, Snapshot and Export say where copies at rest lie, which
/// is no place to run.
pub const POD_KINDS: [Data; 4] = [Data::Primary, Data::Standby, Data::Worker, Data::Gateway];
/// The kinds that a pod of a store may hold.
pub const STORE_KINDS: [Data; 2] = [Data::Primary, Data::Standby];
/// How many nodes a policy's status names at most: an object in etcd is bounded, and is sent whole at every change.
pub const MOST_NODES: usize = 1000;

/// What admission reads in a policy's status.
#[derive(Clone, Debug, PartialEq)]
pub struct Published {
    /// What is permitted where.
    pub permits: Vec<ResolvedPermit>,
    /// The nodes on which pods may be; `None`: more than [`MOST_NODES`].
    pub nodes: Option<Vec<String>>,
}

/// What of `permissions` admission needs to know.
#[must_use]
pub fn publish<'a>(
    permissions: &Permissions,
    regions: impl IntoIterator<Item = &'a Region> + Clone,
    nodes: &[NodeFacts],
) -> Published {
    let located: Vec<(&NodeFacts, String)> = nodes
        .iter()
        .filter_map(|n| Some((n, locate(n, regions.clone()).region()?.to_owned())))
        .collect();
    let mut permits = permissions.published(regions);
    for permit in &mut permits {
        // A Region may go by providerID alone: then its nodes' labels say by which name admission meets them.
        let carried = located
            .iter()
            .filter(|(_, region)| permit.regions.contains(region))
            .filter_map(|(node, _)| node.labels.get(labels::NODE_TOPOLOGY_REGION).cloned());
        let all: BTreeSet<String> = permit.node_regions.drain(..).chain(carried).collect();
        permit.node_regions = all.into_iter().collect();
    }
    let on: BTreeSet<String> = located
        .into_iter()
        .filter(|(_, region)| {
            POD_KINDS
                .iter()
                .any(|data| permissions.permits(*data, region))
        })
        .map(|(node, _)| node.name.clone())
        .collect();
    Published {
        permits,
        nodes: (on.len() <= MOST_NODES).then(|| on.into_iter().collect()),
    }
}

/// A pod that is about to be on a node, as admission sees it.
#[derive(Clone, Copy, Debug)]
pub struct Bound<'a> {
    /// The pod's namespace.
    pub namespace: &'a str,
    /// The node.
    pub node: &'a str,
    /// The node's label topology.kubernetes.io/region, where the API server has put it on the request itself.
    pub region: Option<&'a str>,
    /// The kinds of data that the pod may hold.
    pub kinds: &'a [Data],
}

/// `Ok` if a namespace labelled with `policy` may have this pod on this node, by the policy's status.
///
/// # Errors
/// The refusal, in the words of the admission policy.
pub fn check(policy: &ResidencyPolicy, bound: &Bound<'_>) -> Result<(), String> {
    let name = policy.metadata.name.as_deref().unwrap_or_default();
    let status = policy.status.as_ref().filter(|s| {
        s.observed_generation
            .is_some_and(|seen| seen >= policy.metadata.generation.unwrap_or(0))
    });
    let Some(status) = status else {
        return Err(format!(
            "ResidencyPolicy {name} is not resolved yet for its present generation, so nothing is permitted by it: see its status"
        ));
    };
    let permitted = node_regions(status, bound.kinds);
    let verified = status
        .nodes
        .as_ref()
        .is_none_or(|nodes| nodes.iter().any(|n| n == bound.node));
    let elsewhere = bound.region.filter(|r| !permitted.contains(*r));
    let known = bound.region.is_some() || status.nodes.is_some();
    if verified && known && elsewhere.is_none() {
        return Ok(());
    }
    let basis = basis(policy);
    let (namespace, node) = (bound.namespace, bound.node);
    let list = if permitted.is_empty() {
        "nowhere".to_owned()
    } else {
        permitted.into_iter().collect::<Vec<_>>().join(", ")
    };
    Err(match elsewhere {
        Some(region) => format!(
            "node {node} is in region {region}, where ResidencyPolicy {name} ({basis}) permits no pod of namespace {namespace}; permitted: {list}"
        ),
        None => format!(
            "node {node} is not verified to be in a region where ResidencyPolicy {name} ({basis}) permits a pod of namespace {namespace}; permitted: {list}; kubectl domicile explain policy {name} says why"
        ),
    })
}

fn node_regions(status: &ResidencyPolicyStatus, kinds: &[Data]) -> BTreeSet<String> {
    status
        .permits
        .iter()
        .filter(|p| kinds.contains(&p.data))
        .flat_map(|p| p.node_regions.iter().cloned())
        .collect()
}

/// Basis and citation, as every refusal gives them.
#[must_use]
pub fn basis(policy: &ResidencyPolicy) -> String {
    let citation = policy.spec.citation.as_deref().unwrap_or_default();
    if citation.is_empty() {
        format!("basis {}", policy.spec.basis)
    } else {
        format!("basis {}: {citation}", policy.spec.basis)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::api::region::{NodeWitnesses, RegionSpec};
    use crate::api::residency_policy::{Permit, ResidencyPolicySpec};

    fn region(name: &str, label: Option<&str>, prefix: Option<&str>) -> Region {
        let labels = label
            .map(|v| (labels::NODE_TOPOLOGY_REGION.to_owned(), v.to_owned()))
            .into_iter()
            .collect();
        Region::new(
            name,
            RegionSpec {
                jurisdictions: vec![],
                nodes: NodeWitnesses {
                    labels,
                    provider_id_prefix: prefix.map(str::to_owned),
                },
            },
        )
    }

    fn node(name: &str, label: Option<&str>, id: Option<&str>) -> NodeFacts {
        NodeFacts {
            name: name.into(),
            labels: label
                .map(|v| (labels::NODE_TOPOLOGY_REGION.to_owned(), v.to_owned()))
                .into_iter()
                .collect(),
            provider_id: id.map(str::to_owned),
            usable: true,
        }
    }

    fn policy(kinds: &[(Data, &str)]) -> ResidencyPolicy {
        let permits = kinds
            .iter()
            .map(|(data, region)| Permit {
                data: *data,
                regions: vec![(*region).to_owned()],
                jurisdictions: vec![],
            })
            .collect();
        let mut policy = ResidencyPolicy::new(
            "records",
            ResidencyPolicySpec {
                basis: Default::default(),
                citation: Some("Annex 2".into()),
                permits,
                namespaces: None,
                on_violation: Default::default(),
            },
        );
        policy.metadata.generation = Some(1);
        policy
    }

    fn resolved(
        policy: ResidencyPolicy,
        regions: &[Region],
        nodes: &[NodeFacts],
    ) -> ResidencyPolicy {
        let Published { permits, nodes } =
            publish(&Permissions::resolve(&policy, regions), regions, nodes);
        ResidencyPolicy {
            status: Some(ResidencyPolicyStatus {
                observed_generation: Some(1),
                permits,
                nodes,
                ..Default::default()
            }),
            ..policy
        }
    }

    fn on<'a>(node: &'a str, region: Option<&'a str>) -> Bound<'a> {
        Bound {
            namespace: "records",
            node,
            region,
            kinds: &POD_KINDS,
        }
    }

    #[test]
    fn a_node_counts_by_every_witness_and_not_by_its_label() {
        let regions = [
            region("west", Some("us-west-2"), Some("aws:///us-west-2")),
            region("eu", Some("eu-1"), None),
        ];
        let nodes = [
            node("w1", Some("us-west-2"), Some("aws:///us-west-2a/i")),
            node("liar", Some("us-west-2"), Some("aws:///eu-1/i")),
            node("mute", None, Some("aws:///us-west-2a/j")),
            node("c1", Some("eu-1"), None),
        ];
        let p = resolved(policy(&[(Data::Standby, "west")]), &regions, &nodes);
        assert_eq!(
            p.status.as_ref().unwrap().nodes,
            Some(vec!["w1".to_owned()])
        );
        assert_eq!(check(&p, &on("w1", Some("us-west-2"))), Ok(()));
        assert_eq!(check(&p, &on("w1", None)), Ok(()), "before Kubernetes 1.35");
        let words = |b| check(&p, &b).unwrap_err();
        assert_eq!(
            words(on("c1", Some("eu-1"))),
            "node c1 is in region eu-1, where ResidencyPolicy records (basis Policy: Annex 2) permits no pod of namespace records; permitted: us-west-2"
        );
        // The label of a node that isn't there, or carries none, may be anybody's invention.
        for node in ["liar", "mute", "not-there"] {
            assert!(words(on(node, Some("us-west-2"))).starts_with(&format!(
                "node {node} is not verified to be in a region where ResidencyPolicy records"
            )));
        }
        // Relabelled a moment ago: the list still has it, the request doesn't.
        assert!(check(&p, &on("w1", Some("eu-1"))).is_err());
    }

    #[test]
    fn a_region_by_provider_id_alone_is_known_by_what_its_nodes_carry() {
        let regions = [region("west", None, Some("aws:///us-west-2"))];
        let nodes = [node("w1", Some("oregon"), Some("aws:///us-west-2a/i"))];
        let p = resolved(policy(&[(Data::Worker, "west")]), &regions, &nodes);
        assert_eq!(check(&p, &on("w1", Some("oregon"))), Ok(()));
    }

    #[test]
    fn backups_are_no_place_to_run_and_a_stores_pod_is_no_worker() {
        let regions = [
            region("a", Some("a-1"), None),
            region("b", Some("b-1"), None),
        ];
        let nodes = [node("n", Some("a-1"), None), node("m", Some("b-1"), None)];
        let p = resolved(
            policy(&[(Data::Backup, "a"), (Data::Worker, "b")]),
            &regions,
            &nodes,
        );
        assert!(check(&p, &on("n", Some("a-1"))).is_err());
        assert_eq!(check(&p, &on("m", Some("b-1"))), Ok(()));
        let store = Bound {
            kinds: &STORE_KINDS,
            ..on("m", Some("b-1"))
        };
        assert!(
            check(&p, &store)
                .unwrap_err()
                .ends_with("permitted: nowhere")
        );
    }

    #[test]
    fn with_too_many_nodes_the_label_decides_and_without_one_nothing_is_let_in() {
        let regions = [region("west", Some("us-west-2"), None)];
        let nodes: Vec<NodeFacts> = (0..=MOST_NODES)
            .map(|i| node(&format!("n{i}"), Some("us-west-2"), None))
            .collect();
        let p = resolved(policy(&[(Data::Standby, "west")]), &regions, &nodes);
        assert_eq!(p.status.as_ref().unwrap().nodes, None);
        assert_eq!(check(&p, &on("n1", Some("us-west-2"))), Ok(()));
        assert!(check(&p, &on("n1", None)).is_err());
    }

    #[test]
    fn what_is_not_resolved_permits_nothing() {
        let regions = [region("west", Some("us-west-2"), None)];
        let nodes = [node("w1", Some("us-west-2"), None)];
        let mut p = resolved(policy(&[(Data::Standby, "west")]), &regions, &nodes);
        p.metadata.generation = Some(2);
        assert!(
            check(&p, &on("w1", Some("us-west-2")))
                .unwrap_err()
                .contains("not resolved yet")
        );
    }
}
