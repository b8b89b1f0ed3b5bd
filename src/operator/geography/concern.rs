//! Which stores and workflows a change of Regions, policies, nodes or of other stores concerns.
//!
//! Owns the mark by which that is told: whatever of the geography bears on an object is in its mark, so that a node that
//! comes and goes costs a pass over the stores of its region, and not over all.
//! Pure but for the stream at the end. Never the only reason to look at an object: each is looked at every minute anyway.

use std::collections::hash_map::DefaultHasher;
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::hash::{Hash, Hasher};
use std::sync::Arc;

use futures::{Stream, StreamExt};
use kube::core::DeserializeGuard;
use kube::runtime::reflector::ObjectRef;
use kube::{Resource, ResourceExt};

use super::{References, generation};
use crate::api::{PrivacyDataStore, Region, ResidencyPolicy, RightsWorkflow, labels};
use crate::operator::context::Context;
use crate::residency::{NodeFacts, Whereabouts, locate};

/// Everything that may concern a store or a workflow.
pub struct Geography<'a> {
    /// Every Region.
    pub regions: &'a [Arc<Region>],
    /// Every policy.
    pub policies: &'a [Arc<ResidencyPolicy>],
    /// Every node.
    pub nodes: &'a [NodeFacts],
    /// The labels of each namespace that has a ceiling: they say which, and which policies it may use.
    pub namespaces: &'a BTreeMap<String, BTreeMap<String, String>>,
}

/// A store or workflow: namespace and name.
pub type Key = (String, String);

fn hash(of: impl Hash) -> u64 {
    let mut hasher = DefaultHasher::new();
    of.hash(&mut hasher);
    hasher.finish()
}

/// The geography, in a form in which what bears on one object is found at once.
struct Surroundings<'a> {
    geography: &'a Geography<'a>,
    by_region: BTreeMap<String, Vec<u64>>,
    by_node: HashMap<&'a str, u64>,
}

impl<'a> Surroundings<'a> {
    fn of(geography: &'a Geography<'a>) -> Self {
        let mut by_region: BTreeMap<String, Vec<u64>> = BTreeMap::new();
        let mut by_node: HashMap<&str, u64> = HashMap::new();
        for node in geography.nodes {
            let place = locate(node, geography.regions.iter().map(AsRef::as_ref));
            let claimed = match place {
                Whereabouts::In(region) => vec![region],
                Whereabouts::Disputed(regions) => regions,
                Whereabouts::Unclaimed => Vec::new(),
            };
            let mark = hash((node, &claimed));
            by_node.insert(&node.name, mark);
            let mut all: BTreeSet<String> = claimed.into_iter().collect();
            // Nothing is placed in a region while a node outside bears its stamp.
            all.extend(node.labels.get(labels::NODE_REGION).cloned());
            for region in all {
                by_region.entry(region).or_default().push(mark);
            }
        }
        for marks in by_region.values_mut() {
            marks.sort_unstable();
        }
        Self {
            geography,
            by_region,
            by_node,
        }
    }

    /// The mark of an object: its policy and its namespace's, the Regions that they and the object name, the nodes that
    /// are in those or claimed by them, and the nodes where it is, wherever that is.
    fn mark<'b>(
        &'b self,
        namespace: &str,
        policy: &String,
        mut named: BTreeSet<&'b str>,
        nodes: impl Iterator<Item = &'b str>,
    ) -> u64 {
        let namespace = self.geography.namespaces.get(namespace);
        let ceiling = namespace.and_then(|labels| labels.get(labels::RESIDENCY));
        let policies: Vec<&Arc<ResidencyPolicy>> = [Some(policy), ceiling]
            .into_iter()
            .flatten()
            .filter_map(|name| {
                let mut all = self.geography.policies.iter();
                all.find(|p| p.name_any() == *name)
            })
            .collect();
        for permit in policies.iter().flat_map(|p| &p.spec.permits) {
            named.extend(permit.regions.iter().map(String::as_str));
            let lists = |r: &&Arc<Region>| {
                let listed = &r.spec.jurisdictions;
                listed.iter().any(|j| permit.jurisdictions.contains(j))
            };
            let all = self.geography.regions.iter().filter(lists);
            named.extend(all.filter_map(|r| r.metadata.name.as_deref()));
        }
        let regions: Vec<_> = named
            .into_iter()
            .map(|name| {
                let mut all = self.geography.regions.iter();
                let region = all.find(|r| r.name_any() == name);
                (
                    name,
                    region.map(|r| generation(r.as_ref())),
                    self.by_region.get(name),
                )
            })
            .collect();
        let here: Vec<_> = nodes.map(|node| (node, self.by_node.get(node))).collect();
        let policies: Vec<_> = policies.iter().map(|p| generation(p.as_ref())).collect();
        hash((namespace, policies, regions, here))
    }
}

fn key(object: &impl ResourceExt) -> Option<Key> {
    Some((object.namespace()?, object.name_any()))
}

/// The mark of each store. Two are equal only if nothing that bears on the store differs. Not in it: nodes that are
/// known by a kept volume alone.
#[must_use]
pub fn marks(geography: &Geography<'_>, stores: &[Arc<PrivacyDataStore>]) -> HashMap<Key, u64> {
    let surroundings = Surroundings::of(geography);
    let mark = |store: &PrivacyDataStore| {
        let named = store.spec.placement.iter().map(|p| p.region.as_str());
        let instances = store.status.iter().flat_map(|s| &s.instances);
        let here = instances.filter_map(|i| i.node.as_deref());
        let policy = &store.spec.residency_policy_ref.name;
        let key = key(store)?;
        let mark = surroundings.mark(&key.0, policy, named.collect(), here);
        Some((key, mark))
    };
    stores.iter().filter_map(|s| mark(s)).collect()
}

/// The mark of each workflow: beside the geography, what it takes from the stores that it names.
#[must_use]
pub fn workflow_marks(
    geography: &Geography<'_>,
    workflows: &[Arc<RightsWorkflow>],
    stores: &[Arc<PrivacyDataStore>],
) -> HashMap<Key, u64> {
    let surroundings = Surroundings::of(geography);
    let stores: HashMap<Key, u64> = stores
        .iter()
        .filter_map(|s| Some((key(s.as_ref())?, store_facts(s))))
        .collect();
    let mark = |workflow: &RightsWorkflow| {
        let spec = &workflow.spec;
        let named = spec.workers.pools.iter().map(|p| p.region.as_str());
        let key = key(workflow)?;
        // A workflow's pods run in regions that are permitted, and those are named by the policy.
        let geography = surroundings.mark(
            &key.0,
            &spec.residency_policy_ref.name,
            named.collect(),
            std::iter::empty(),
        );
        let targets = spec.targets.iter().filter_map(|t| t.postgresql.as_ref());
        let named = targets.filter_map(|t| t.store_ref.as_ref());
        let stores: Vec<_> = std::iter::once(&spec.ledger_ref)
            .chain(named)
            .map(|r| stores.get(&(key.0.clone(), r.name.clone())))
            .collect();
        let mark = hash((geography, stores));
        Some((key, mark))
    };
    workflows.iter().filter_map(|w| mark(w)).collect()
}

/// What of a store bears on the workflows that name it.
fn store_facts(store: &PrivacyDataStore) -> u64 {
    let status = store.status.as_ref();
    let mut instances: Vec<_> = status
        .iter()
        .flat_map(|s| &s.instances)
        .map(|i| (&i.name, &i.trusts, &i.signed_by))
        .collect();
    instances.sort();
    let mut rights: Vec<_> = status.iter().flat_map(|s| &s.rights).collect();
    rights.sort_by(|a, b| a.workflow.cmp(&b.workflow));
    hash((generation(store), instances, rights))
}

/// Those whose mark is another than before.
#[must_use]
pub fn concerned(before: &HashMap<Key, u64>, now: &HashMap<Key, u64>) -> Vec<Key> {
    now.iter()
        .filter(|(key, mark)| before.get(*key) != Some(mark))
        .map(|(key, _)| key.clone())
        .collect()
}

/// The objects that are concerned, by their marks, with each item of `changes`; at the first all.
pub fn stream<K>(
    ctx: Arc<Context>,
    references: Arc<References>,
    changes: impl Stream<Item = ()> + Send + 'static,
    marks: impl Fn(&Geography<'_>, &References) -> HashMap<Key, u64> + Send + 'static,
) -> impl Stream<Item = ObjectRef<DeserializeGuard<K>>> + Send + 'static
where
    K: Resource<DynamicType = ()> + Send + 'static,
{
    let mut known = HashMap::new();
    changes.flat_map(move |()| {
        let now = marks(
            &Geography {
                regions: &ctx.regions.state(),
                policies: &ctx.policies.state(),
                nodes: &ctx.node_facts(),
                namespaces: &references.namespaces(),
            },
            &references,
        );
        let all = concerned(&known, &now);
        known = now;
        futures::stream::iter(
            all.into_iter()
                .map(|(ns, name)| ObjectRef::new(&name).within(&ns)),
        )
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::api::region::{NodeWitnesses, RegionSpec};
    use serde_json::json;

    const LABEL: &str = "topology.kubernetes.io/region";

    fn region(name: &str) -> Arc<Region> {
        let nodes = NodeWitnesses {
            labels: [(LABEL.to_owned(), name.to_owned())].into(),
            provider_id_prefix: None,
        };
        Arc::new(Region::new(
            name,
            RegionSpec {
                jurisdictions: vec![],
                nodes,
            },
        ))
    }

    fn node(name: &str, region: &str) -> NodeFacts {
        NodeFacts {
            name: name.into(),
            labels: [(LABEL.to_owned(), region.to_owned())].into(),
            provider_id: None,
            usable: true,
        }
    }

    fn store(name: &str, region: &str, on: &str) -> Arc<PrivacyDataStore> {
        let object = json!({
            "apiVersion": "domicile.dev/v1alpha1", "kind": "PrivacyDataStore",
            "metadata": { "name": name, "namespace": "ns" },
            "spec": {
                "residencyPolicyRef": { "name": region },
                "placement": [{ "region": region, "instances": 1 }], "storage": { "size": "1Gi" },
            },
            "status": { "instances": [{ "name": format!("{name}-1"), "node": on }] },
        });
        Arc::new(serde_json::from_value(object).unwrap())
    }

    fn policy(name: &str) -> Arc<ResidencyPolicy> {
        let spec = json!({ "permits": [{ "data": "Primary", "regions": [name] }] });
        Arc::new(ResidencyPolicy::new(
            name,
            serde_json::from_value(spec).unwrap(),
        ))
    }

    /// Who is concerned when the nodes, Regions and policies become others: a store of the west, one of the east, and
    /// one of the west whose instance is in the north.
    fn concerned_by(
        change: impl FnOnce(&mut Vec<NodeFacts>, &mut Vec<Arc<Region>>),
    ) -> Vec<String> {
        let stores = [
            store("w", "west", "w1"),
            store("e", "east", "e1"),
            store("n", "west", "n1"),
        ];
        let policies = [policy("west"), policy("east")];
        let mut nodes = vec![
            node("w1", "west"),
            node("e1", "east"),
            node("n1", "north"),
            node("n2", "north"),
        ];
        let mut regions = vec![region("west"), region("east"), region("north")];
        let namespaces = BTreeMap::new();
        let of = |nodes: &[NodeFacts], regions: &[Arc<Region>]| {
            marks(
                &Geography {
                    regions,
                    policies: &policies,
                    nodes,
                    namespaces: &namespaces,
                },
                &stores,
            )
        };
        let before = of(&nodes, &regions);
        change(&mut nodes, &mut regions);
        let all = concerned(&before, &of(&nodes, &regions));
        let mut names: Vec<String> = all.into_iter().map(|(_, name)| name).collect();
        names.sort();
        names
    }

    #[test]
    fn a_node_concerns_the_stores_of_its_region_and_those_that_are_on_it() {
        let none: [&str; 0] = [];
        assert_eq!(concerned_by(|_, _| ()), none);
        assert_eq!(concerned_by(|nodes, _| nodes.reverse()), none);
        assert_eq!(concerned_by(|nodes, _| nodes[1].usable = false), ["e"]);
        assert_eq!(concerned_by(|nodes, _| drop(nodes.remove(0))), ["n", "w"]);
        assert_eq!(
            concerned_by(|nodes, _| nodes.push(node("w2", "west"))),
            ["n", "w"]
        );
        // Nobody may be in the north; one is.
        assert_eq!(concerned_by(|nodes, _| nodes[2].usable = false), ["n"]);
        assert_eq!(concerned_by(|nodes, _| nodes[3].usable = false), none);
        // From the north into the east, and away from the east.
        assert_eq!(
            concerned_by(|nodes, _| nodes[3] = node("n2", "east")),
            ["e"]
        );
        assert_eq!(
            concerned_by(|nodes, _| nodes[1] = node("e1", "north")),
            ["e"]
        );
    }

    #[test]
    fn a_stamp_that_stays_behind_concerns_the_region_whose_it_is() {
        let stamped = |node: &mut NodeFacts, stamp: Option<&str>| match stamp {
            Some(stamp) => drop(node.labels.insert(labels::NODE_REGION.into(), stamp.into())),
            None => drop(node.labels.remove(labels::NODE_REGION)),
        };
        assert_eq!(concerned_by(|n, _| stamped(&mut n[3], Some("east"))), ["e"]);
        assert_eq!(concerned_by(|n, _| stamped(&mut n[3], None)), [""; 0]);
    }

    #[test]
    fn a_region_is_named_by_its_jurisdictions_too() {
        let mut named = (*policy("none")).clone();
        named.spec.permits[0].jurisdictions = vec!["US".into()];
        let policies = [Arc::new(named)];
        let stores = [store("s", "none", "x")];
        let of = |regions: &[Arc<Region>], nodes: &[NodeFacts]| {
            let geography = Geography {
                regions,
                policies: &policies,
                nodes,
                namespaces: &BTreeMap::new(),
            };
            marks(&geography, &stores)
        };
        let mut west = (*region("west")).clone();
        let plain = of(&[Arc::new(west.clone())], &[]);
        assert_eq!(concerned(&plain, &of(&[], &[])), [], "it isn't named");
        west.spec.jurisdictions = vec!["US".into()];
        let listed = of(&[Arc::new(west.clone())], &[]);
        assert_eq!(concerned(&plain, &listed).len(), 1);
        let filled = of(&[Arc::new(west)], &[node("w1", "west")]);
        assert_eq!(concerned(&listed, &filled).len(), 1);
    }

    #[test]
    fn a_region_concerns_those_who_name_it_and_those_whose_nodes_it_claims() {
        let twin = |of: &str| {
            let mut twin = (*region(of)).clone();
            twin.metadata.name = Some("twin".into());
            Arc::new(twin)
        };
        assert_eq!(concerned_by(|_, regions| regions.push(twin("east"))), ["e"]);
        assert_eq!(
            concerned_by(|_, regions| regions.push(twin("north"))),
            ["n"]
        );
        assert_eq!(concerned_by(|_, r| drop(r.remove(1))), ["e"]);
        let changed = |r: &mut Vec<Arc<Region>>, n: usize| {
            let mut region = (*r[n]).clone();
            region.metadata.generation = Some(2);
            r[n] = Arc::new(region);
        };
        assert_eq!(concerned_by(|_, r| changed(r, 0)), ["n", "w"]);
        assert_eq!(concerned_by(|_, r| changed(r, 2)), [""; 0]);
    }

    #[test]
    fn a_policy_concerns_who_names_it_and_whose_namespace_does() {
        let stores = [store("w", "west", "w1"), store("e", "east", "e1")];
        let mut policies = vec![policy("west"), policy("east"), policy("ceiling")];
        let of = |policies: &[Arc<ResidencyPolicy>], ceiling: Option<&str>| {
            let labels = |c: &str| [(labels::RESIDENCY.to_owned(), c.to_owned())].into();
            let namespaces = ceiling.map(|c| ("ns".to_owned(), labels(c)));
            let geography = Geography {
                regions: &[],
                policies,
                nodes: &[],
                namespaces: &namespaces.into_iter().collect(),
            };
            marks(&geography, &stores)
        };
        let (free, under) = (of(&policies, None), of(&policies, Some("ceiling")));
        assert_eq!(concerned(&free, &under).len(), 2);
        let mut other = (*policies[2]).clone();
        other.metadata.generation = Some(2);
        policies[2] = Arc::new(other);
        assert_eq!(concerned(&free, &of(&policies, None)), []);
        assert_eq!(concerned(&under, &of(&policies, Some("ceiling"))).len(), 2);
        policies.remove(1);
        let gone = concerned(&free, &of(&policies, None));
        assert_eq!(gone, [("ns".to_owned(), "e".to_owned())]);
        assert_eq!(concerned(&HashMap::new(), &free).len(), 2);
    }
}
