//! `kubectl domicile explain policy NAME`: what a policy permits, on which nodes, why the others don't count, and
//! what it forbids of what is there.
//!
//! Owns the words and the reading. What is permitted and where a node is, is `residency`'s to say: this only shows
//! it, computed afresh from what the API server has, and beside it what the operator has published.
//! Shows what it may read: of nodes, pods and namespaces that the reader may not list it says so.

use std::collections::BTreeMap;
use std::fmt::Write as _;

use anyhow::Context as _;
use k8s_openapi::api::core::v1::{Namespace, Node, Pod};
use kube::api::ListParams;
use kube::{Api, Client, Resource, ResourceExt};
use serde::de::DeserializeOwned;

use super::status::columns;
use crate::api::{PrivacyDataStore, Region, ResidencyPolicy, RightsWorkflow, conditions, labels};
use crate::operator::context::node_facts;
use crate::residency::binding::{self, Bound, POD_KINDS, STORE_KINDS};
use crate::residency::{NodeFacts, Permissions, Whereabouts, accounts, forbidden, locate};

/// A pod on a node.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Placed {
    /// Its namespace.
    pub namespace: String,
    /// Its name.
    pub name: String,
    /// Its node.
    pub node: String,
    /// It has a store's label.
    pub of_store: bool,
}

/// What is known.
#[derive(Clone, Debug)]
pub struct World {
    /// The policy.
    pub policy: ResidencyPolicy,
    /// Every policy: some are ceilings.
    pub policies: Vec<ResidencyPolicy>,
    /// Every Region.
    pub regions: Vec<Region>,
    /// Every node; `None`: may not be read.
    pub nodes: Option<Vec<NodeFacts>>,
    /// Every store; `None`: may not be read.
    pub stores: Option<Vec<PrivacyDataStore>>,
    /// Every workflow; `None`: may not be read.
    pub workflows: Option<Vec<RightsWorkflow>>,
    /// Namespaces with a ceiling: name, policy; `None`: may not be read.
    pub ceilings: Option<BTreeMap<String, String>>,
    /// The pods of the namespaces whose ceiling is the policy; `None`: some may not be read.
    pub pods: Option<Vec<Placed>>,
}

/// Reads and explains.
///
/// # Errors
/// If the policy or the Regions can't be read.
pub async fn run(client: Client, name: &str) -> anyhow::Result<String> {
    Ok(render(&look(&client, name).await?))
}

async fn list<K>(client: &Client) -> kube::Result<Vec<K>>
where
    K: Resource + Clone + DeserializeOwned + std::fmt::Debug,
    K::DynamicType: Default,
{
    let api: Api<K> = Api::all(client.clone());
    Ok(api.list(&ListParams::default()).await?.items)
}

/// `None` if the reader may not.
fn allowed<T>(found: kube::Result<T>) -> anyhow::Result<Option<T>> {
    match found {
        Ok(found) => Ok(Some(found)),
        Err(kube::Error::Api(status)) if status.is_forbidden() => Ok(None),
        Err(error) => Err(error).context("the API server can't be asked"),
    }
}

async fn look(client: &Client, name: &str) -> anyhow::Result<World> {
    let policies: Vec<ResidencyPolicy> = list(client)
        .await
        .context("reading policies (the ClusterRole domicile-policies-view has the right)")?;
    let policy = policies
        .iter()
        .find(|p| p.name_any() == name)
        .cloned()
        .with_context(|| {
            format!("there is no ResidencyPolicy {name}; `kubectl get residencypolicies` lists all")
        })?;
    let regions = list(client).await.context("reading Regions")?;
    let nodes = allowed(list::<Node>(client).await)?;
    let namespaces: Api<Namespace> = Api::all(client.clone());
    let labelled = ListParams::default().labels(labels::RESIDENCY);
    let ceilings = allowed(namespaces.list(&labelled).await)?.map(|all| {
        all.iter()
            .filter_map(|n| Some((n.name_any(), n.labels().get(labels::RESIDENCY)?.clone())))
            .collect::<BTreeMap<_, _>>()
    });
    let mut pods = ceilings.is_some().then(Vec::new);
    for (namespace, _) in ceilings.iter().flatten().filter(|(_, p)| *p == name) {
        let api: Api<Pod> = Api::namespaced(client.clone(), namespace);
        let found = allowed(api.list(&ListParams::default()).await)?;
        pods = match (pods, found) {
            (Some(mut all), Some(found)) => {
                all.extend(found.iter().filter_map(placed));
                Some(all)
            }
            _ => None,
        };
    }
    Ok(World {
        policy,
        policies,
        regions,
        nodes: nodes.map(|all| all.iter().map(node_facts).collect()),
        stores: allowed(list(client).await)?,
        workflows: allowed(list(client).await)?,
        ceilings,
        pods,
    })
}

/// A pod that runs, or will, on a node.
fn placed(pod: &Pod) -> Option<Placed> {
    let ended = pod
        .status
        .as_ref()
        .and_then(|s| s.phase.as_deref())
        .is_some_and(|phase| phase == "Succeeded" || phase == "Failed");
    let node = pod.spec.as_ref()?.node_name.clone()?;
    (!ended && !node.is_empty()).then(|| Placed {
        namespace: pod.namespace().unwrap_or_default(),
        name: pod.name_any(),
        node,
        of_store: pod.labels().contains_key(labels::STORE),
    })
}

/// The explanation as text.
#[must_use]
pub fn render(world: &World) -> String {
    let policy = &world.policy;
    let permissions = Permissions::resolve(policy, &world.regions);
    let mut out = format!(
        "ResidencyPolicy {} ({})\n",
        policy.name_any(),
        binding::basis(policy)
    );
    for line in said(world) {
        // Writing to a String can't fail.
        let _ = writeln!(out, "  {line}");
    }
    out.push('\n');
    out.push_str(&permits(world, &permissions));
    out.push('\n');
    out.push_str(&nodes(world, &permissions));
    out.push_str("\nFORBIDS TODAY\n");
    let (found, unread) = outside(world, &permissions);
    if found.is_empty() && unread.is_empty() {
        out.push_str("  nothing that is there\n");
    }
    for line in &found {
        let _ = writeln!(out, "  {line}");
    }
    if !unread.is_empty() {
        let _ = writeln!(
            out,
            "  not looked at, for want of the right to list them: {}",
            unread.join(", ")
        );
    }
    out
}

/// What the operator says of it, and who uses it.
fn said(world: &World) -> Vec<String> {
    let policy = &world.policy;
    let mut lines = Vec::new();
    let status = policy.status.clone().unwrap_or_default();
    let stale = status.observed_generation != policy.metadata.generation;
    if stale {
        lines.push(
            "the operator hasn't resolved its present generation: no pod is bound by it until it has"
                .to_owned(),
        );
    }
    for kind in [
        conditions::READY,
        conditions::ENFORCED,
        conditions::RESPECTED,
    ] {
        if let Some(c) = status.conditions.iter().find(|c| c.type_ == kind) {
            lines.push(format!("{:<10} {:<7} {}", c.type_, c.status, c.message));
        }
    }
    let selector = policy.spec.namespaces.iter().flat_map(|n| &n.match_labels);
    let selector: Vec<String> = selector.map(|(k, v)| format!("{k}={v}")).collect();
    lines.push(if selector.is_empty() {
        "may be used by every namespace".to_owned()
    } else {
        format!("may be used by namespaces labelled {}", selector.join(", "))
    });
    let name = policy.name_any();
    let held: Vec<&str> = world
        .ceilings
        .iter()
        .flatten()
        .filter(|(_, p)| **p == name)
        .map(|(namespace, _)| namespace.as_str())
        .collect();
    if !held.is_empty() {
        lines.push(format!(
            "must be kept within by namespaces {} (label {})",
            held.join(", "),
            labels::RESIDENCY
        ));
    }
    lines
}

fn permits(world: &World, permissions: &Permissions) -> String {
    let mut rows = vec![["PERMITS", "IN REGIONS", "ON NODES"].map(str::to_owned)];
    for permit in &world.policy.spec.permits {
        let regions: Vec<&str> = permissions.regions(permit.data).collect();
        let count = world.nodes.as_ref().map(|nodes| {
            let there = nodes.iter().filter(|n| {
                locate(n, &world.regions)
                    .region()
                    .is_some_and(|r| regions.contains(&r))
            });
            there.count().to_string()
        });
        rows.push([
            permit.data.to_string(),
            if regions.is_empty() {
                "none that exists".to_owned()
            } else {
                regions.join(", ")
            },
            count.unwrap_or_else(|| "?".to_owned()),
        ]);
    }
    columns(&rows)
}

fn nodes(world: &World, permissions: &Permissions) -> String {
    let Some(nodes) = &world.nodes else {
        return "  which nodes count can't be shown: you may not list nodes\n".to_owned();
    };
    let mut rows = vec![["NODE", "IS IN", "COUNTS FOR"].map(str::to_owned)];
    let mut sorted: Vec<&NodeFacts> = nodes.iter().collect();
    sorted.sort();
    for node in sorted {
        let found = locate(node, &world.regions);
        let (place, counts) = match &found {
            Whereabouts::In(region) => {
                let kinds: Vec<String> = permissions
                    .kinds()
                    .filter(|data| permissions.permits(*data, region))
                    .map(|data| data.to_string())
                    .collect();
                let counts = if kinds.is_empty() {
                    "nothing: nothing is permitted there".to_owned()
                } else {
                    kinds.join(", ")
                };
                (region.clone(), counts)
            }
            Whereabouts::Disputed(regions) => (
                "nowhere".to_owned(),
                format!(
                    "nothing: Regions {} claim it, and it can be in one only",
                    regions.join(", ")
                ),
            ),
            Whereabouts::Unclaimed => (
                "nowhere".to_owned(),
                format!("nothing: {}", why(world, node)),
            ),
        };
        rows.push([node.name.clone(), place, counts]);
    }
    columns(&rows)
}

/// Why no Region claims a node: of the Regions for which something speaks, what speaks against them.
fn why(world: &World, node: &NodeFacts) -> String {
    let mut nearest: Vec<String> = Vec::new();
    for region in &world.regions {
        let all = accounts(&region.spec, node);
        if all.iter().any(|a| a.agrees) {
            let against: Vec<String> = all
                .iter()
                .filter(|a| !a.agrees)
                .map(ToString::to_string)
                .collect();
            nearest.push(format!(
                "not in Region {}: {}",
                region.name_any(),
                against.join(", ")
            ));
        }
    }
    nearest.sort();
    if nearest.is_empty() {
        let label = node.labels.get(labels::NODE_TOPOLOGY_REGION);
        let label = label.map_or("none".to_owned(), Clone::clone);
        let id = node.provider_id.as_deref().unwrap_or("none");
        format!(
            "no witness of any Region agrees ({}: {label}, providerID: {id})",
            labels::NODE_TOPOLOGY_REGION
        )
    } else {
        nearest.join("; ")
    }
}

/// What is where the policy doesn't permit it; and what couldn't be looked at.
fn outside(world: &World, permissions: &Permissions) -> (Vec<String>, Vec<&'static str>) {
    let name = world.policy.name_any();
    let none = Vec::new();
    let nodes = world.nodes.as_ref().unwrap_or(&none);
    let under = |namespace: Option<String>| {
        let ceilings = world.ceilings.iter().flatten();
        let above = ceilings
            .filter(|(n, _)| Some(*n) == namespace.as_ref())
            .find_map(|(_, p)| world.policies.iter().find(|q| q.name_any() == *p));
        let own = permissions.clone();
        match above {
            Some(above) if above.name_any() != name => {
                own.under(Permissions::resolve(above, &world.regions))
            }
            _ => own,
        }
    };
    let mut found: Vec<String> = Vec::new();
    for store in world.stores.iter().flatten() {
        if store.spec.residency_policy_ref.name == name {
            let permissions = under(store.namespace());
            found.extend(forbidden::of_store(
                store,
                &permissions,
                &world.regions,
                nodes,
            ));
        }
    }
    for workflow in world.workflows.iter().flatten() {
        if workflow.spec.residency_policy_ref.name == name {
            found.extend(forbidden::of_workflow(
                workflow,
                &under(workflow.namespace()),
            ));
        }
    }
    // By what is true now, not by what was published: a pod that was bound before the policy was narrowed.
    let now = fresh(world, permissions, nodes);
    for pod in world
        .pods
        .iter()
        .flatten()
        .filter(|_| world.nodes.is_some())
    {
        let label = nodes
            .iter()
            .find(|n| n.name == pod.node)
            .and_then(|n| n.labels.get(labels::NODE_TOPOLOGY_REGION));
        let bound = Bound {
            namespace: &pod.namespace,
            node: &pod.node,
            region: label.map(String::as_str),
            kinds: if pod.of_store {
                &STORE_KINDS
            } else {
                &POD_KINDS
            },
        };
        if let Err(refusal) = binding::check(&now, &bound) {
            found.push(format!("pod {}/{}: {refusal}", pod.namespace, pod.name));
        }
    }
    found.sort();
    let unread = [
        ("nodes", world.nodes.is_none()),
        ("stores", world.stores.is_none()),
        ("workflows", world.workflows.is_none()),
        ("namespaces", world.ceilings.is_none()),
        ("pods", world.pods.is_none()),
    ];
    let unread = unread.into_iter().filter(|(_, missing)| *missing);
    (found, unread.map(|(what, _)| what).collect())
}

/// The policy with the status that it would have if the operator looked now.
fn fresh(world: &World, permissions: &Permissions, nodes: &[NodeFacts]) -> ResidencyPolicy {
    let published = binding::publish(permissions, &world.regions, nodes);
    let mut policy = world.policy.clone();
    let mut status = policy.status.unwrap_or_default();
    status.observed_generation = Some(policy.metadata.generation.unwrap_or(0));
    status.permits = published.permits;
    status.nodes = published.nodes;
    policy.status = Some(status);
    policy
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn world() -> World {
        let of = |kind: &str, name: &str, spec: serde_json::Value| json!({ "apiVersion": "domicile.dev/v1alpha1", "kind": kind, "metadata": { "name": name, "generation": 1 }, "spec": spec });
        let region = |name: &str, label: &str, prefix: Option<&str>| {
            let nodes = json!({ "labels": { labels::NODE_TOPOLOGY_REGION: label }, "providerIDPrefix": prefix });
            serde_json::from_value(of("Region", name, json!({ "nodes": nodes }))).unwrap()
        };
        let mut policy = of(
            "ResidencyPolicy",
            "records",
            json!({
                "basis": "Contract", "citation": "Annex 2",
                "permits": [{ "data": "Primary", "regions": ["us-west"] }, { "data": "Standby", "regions": ["us-west"] }, { "data": "Worker", "jurisdictions": ["CA"] }],
            }),
        );
        policy["status"] = json!({ "observedGeneration": 1, "conditions": [
            { "type": "Enforced", "status": "True", "reason": "AsSpecified", "message": "pods on other nodes are refused", "lastTransitionTime": "2026-01-01T00:00:00Z" },
        ] });
        let policy: ResidencyPolicy = serde_json::from_value(policy).unwrap();
        let node = |name: &str, label: Option<&str>, id: &str| NodeFacts {
            name: name.into(),
            labels: label
                .map(|v| (labels::NODE_TOPOLOGY_REGION.to_owned(), v.to_owned()))
                .into_iter()
                .collect(),
            provider_id: Some(id.into()),
            usable: true,
        };
        let mut store = of(
            "PrivacyDataStore",
            "consumers",
            json!({
                "residencyPolicyRef": { "name": "records" }, "storage": { "size": "1Gi" },
                "placement": [{ "region": "us-west", "instances": 2 }],
            }),
        );
        store["metadata"]["namespace"] = json!("r");
        store["status"] = json!({ "primary": "consumers-1", "instances": [
            { "name": "consumers-1", "region": "us-west", "node": "w1" }, { "name": "consumers-2", "region": "us-west", "node": "c1" },
        ] });
        let pod = |name: &str, node: &str| Placed {
            namespace: "r".into(),
            name: name.into(),
            node: node.into(),
            of_store: false,
        };
        World {
            policies: vec![policy.clone()],
            policy,
            regions: vec![
                region("us-west", "us-west-2", Some("aws:///us-west-2")),
                region("eu-central", "eu-central-1", None),
                region("eu-other", "eu-shared", None),
                region("eu-another", "eu-shared", None),
            ],
            nodes: Some(vec![
                node("c1", Some("eu-central-1"), "aws:///eu-central-1a/i-1"),
                node("d1", Some("eu-shared"), "aws:///eu-west-1a/i-2"),
                node("w1", Some("us-west-2"), "aws:///us-west-2a/i-3"),
                node("x1", None, "aws:///us-west-2a/i-4"),
                node("y1", Some("us-west-2"), "gcp://us-west-2/i-5"),
                node("z1", Some("mars"), "aws:///mars/i-6"),
            ]),
            stores: Some(vec![serde_json::from_value(store).unwrap()]),
            workflows: Some(vec![]),
            ceilings: Some([("r".to_owned(), "records".to_owned())].into()),
            pods: Some(vec![pod("debug", "c1"), pod("fine", "w1")]),
        }
    }

    fn squeeze(text: &str) -> Vec<String> {
        text.lines()
            .map(|l| l.split_whitespace().collect::<Vec<_>>().join(" "))
            .collect()
    }

    #[test]
    fn the_explanation() {
        let expected = "\
ResidencyPolicy records (basis Contract: Annex 2)
  Enforced   True    pods on other nodes are refused
  may be used by every namespace
  must be kept within by namespaces r (label domicile.dev/residency)

  PERMITS  IN REGIONS        ON NODES
  Primary  us-west           1
  Standby  us-west           1
  Worker   none that exists  0

  NODE  IS IN       COUNTS FOR
  c1    eu-central  nothing: nothing is permitted there
  d1    nowhere     nothing: Regions eu-another, eu-other claim it, and it can be in one only
  w1    us-west     Primary, Standby
  x1    nowhere     nothing: not in Region us-west: it has no topology.kubernetes.io/region (wanted: us-west-2)
  y1    nowhere     nothing: not in Region us-west: providerID is gcp://us-west-2/i-5 (wanted: aws:///us-west-2…)
  z1    nowhere     nothing: no witness of any Region agrees (topology.kubernetes.io/region: mars, providerID: aws:///mars/i-6)

FORBIDS TODAY
  pod r/debug: node c1 is in region eu-central-1, where ResidencyPolicy records (basis Contract: Annex 2) permits no pod of namespace r; permitted: us-west-2
  r/consumers: instance consumers-2 is on node c1: region eu-central is not permitted for Standby by ResidencyPolicy records (basis Contract: Annex 2); permitted for Standby: us-west
";
        assert_eq!(squeeze(&render(&world())), squeeze(expected));
    }

    #[test]
    fn what_may_not_be_read_is_said_and_not_taken_for_nothing() {
        let mut world = world();
        world.nodes = None;
        world.pods = None;
        world.stores = None;
        world.policy.metadata.generation = Some(2);
        let text = render(&world);
        assert!(text.contains("you may not list nodes"), "{text}");
        assert!(
            text.contains("the right to list them: nodes, stores, pods"),
            "{text}"
        );
        assert!(!text.contains("nothing that is there"), "{text}");
        assert!(
            text.contains("hasn't resolved its present generation"),
            "{text}"
        );
    }
}
