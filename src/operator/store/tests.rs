//! Plans are executed on a world in memory, cut off after any step and begun again.

use jiff::{SignedDuration, Timestamp};
use k8s_openapi::api::core::v1::{PersistentVolumeClaim, Pod, PodCondition, PodStatus};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use kube::ResourceExt;
use proptest::prelude::*;
use serde_json::json;
use std::collections::BTreeMap;
use std::sync::Arc;

use super::build::{self, Settings};
use super::certificates::Facts;
use super::observe::Observed;
use super::plan::{Plan, plan};
use super::report;
use super::step::{Object, Step};
use crate::api::conditions::{self, reasons};
use crate::api::privacy_data_store::{InstanceRole, InstanceStatus};
use crate::api::region::{NodeWitnesses, RegionSpec};
use crate::api::{PrivacyDataStore, Region, ResidencyPolicy, labels, names};
use crate::residency::NodeFacts;

const NOW: Timestamp = Timestamp::UNIX_EPOCH;

fn settings() -> Settings {
    Settings {
        image: "domicile:test".into(),
        ipv6: false,
    }
}

fn node(name: &str, region: &str, zone: &str) -> NodeFacts {
    let labels = [
        (labels::NODE_TOPOLOGY_REGION, region),
        (labels::NODE_ZONE, zone),
        (labels::NODE_REGION, region),
    ];
    NodeFacts {
        name: name.into(),
        labels: labels.map(|(k, v)| (k.to_owned(), v.to_owned())).into(),
        provider_id: None,
        usable: true,
    }
}

fn region(name: &str) -> Arc<Region> {
    let labels = [(labels::NODE_TOPOLOGY_REGION.to_owned(), name.to_owned())].into();
    let nodes = NodeWitnesses {
        labels,
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

fn policy(primary: &[&str], standby: &[&str]) -> Arc<ResidencyPolicy> {
    let spec = json!({
        "basis": "Policy", "citation": "Records policy 12",
        "permits": [{ "data": "Primary", "regions": primary }, { "data": "Standby", "regions": standby }],
    });
    Arc::new(ResidencyPolicy::new(
        "records",
        serde_json::from_value(spec).unwrap(),
    ))
}

fn store(placement: &[(&str, i32)]) -> PrivacyDataStore {
    let placement: Vec<_> = placement
        .iter()
        .map(|(r, n)| json!({ "region": r, "instances": n }))
        .collect();
    let spec = json!({
        "residencyPolicyRef": { "name": "records" }, "placement": placement, "storage": { "size": "1Gi" },
    });
    let mut store = PrivacyDataStore::new("consumers", serde_json::from_value(spec).unwrap());
    store.metadata.namespace = Some("ns".into());
    store.metadata.uid = Some("store-uid".into());
    store.metadata.generation = Some(1);
    store
}

/// A world in memory in which steps take effect as the API server, kubelets and instances would have it.
#[derive(Clone, Debug)]
struct World {
    seen: Observed,
    uids: u32,
}

impl World {
    fn new(placement: &[(&str, i32)]) -> Self {
        let nodes = vec![
            node("w1", "us-west", "a"),
            node("w2", "us-west", "b"),
            node("e1", "us-east", "a"),
            node("c1", "eu-central", "a"),
        ];
        Self {
            seen: Observed {
                store: Arc::new(store(placement)),
                namespace_labels: BTreeMap::new(),
                namespace_ending: false,
                policy: Some(policy(&["us-west"], &["us-west", "us-east"])),
                regions: ["eu-central", "us-east", "us-west"].map(region).into(),
                nodes,
                pods: vec![],
                claims: vec![],
                children: BTreeMap::new(),
                authority: None,
                certificates: BTreeMap::new(),
                app_secret: None,
                secrets: BTreeMap::new(),
            },
            uids: 0,
        }
    }

    fn plan(&self) -> Plan {
        plan(&self.seen, &settings(), NOW)
    }

    fn uid(&mut self) -> String {
        self.uids += 1;
        format!("uid-{}", self.uids)
    }

    fn store(&mut self, change: impl FnOnce(&mut PrivacyDataStore)) {
        let mut store = (*self.seen.store).clone();
        change(&mut store);
        self.seen.store = Arc::new(store);
    }

    fn execute(&mut self, step: &Step) {
        let uid = self.uid();
        match step.clone() {
            Step::AddFinalizer => {
                self.store(|s| s.finalizers_mut().push(labels::STORE_FINALIZER.into()));
            }
            Step::RemoveFinalizer => self.store(|s| s.finalizers_mut().clear()),
            Step::RecordPrimary {
                name,
                term,
                instead_of,
            } => self.store(|s| {
                let status = s.status.get_or_insert_default();
                assert_eq!(status.primary, instead_of, "recorded over what was seen");
                assert!(status.term.is_none_or(|t| t < term), "terms rise");
                status.primary = Some(name);
                status.term = Some(term);
            }),
            Step::CreateAuthority => {
                self.seen.authority = Some(facts("ca", &[]));
                self.seen.secrets.insert("consumers-ca".into(), uid);
            }
            Step::IssueCertificate { instance, names } => {
                assert!(
                    self.seen.authority.is_some(),
                    "no certificate without an authority"
                );
                self.seen
                    .certificates
                    .insert(instance.clone(), facts("ca", &names));
                self.seen.secrets.insert(names::tls_secret(&instance), uid);
            }
            Step::WriteAppSecret(secret) => {
                self.seen.app_secret = Some(secret.hash("ca"));
                self.seen.secrets.insert("consumers-app".into(), uid);
            }
            Step::Create(object, mut value) => {
                value["metadata"]["uid"] = json!(uid);
                self.create(object, *value);
            }
            Step::Update(kind, object) => {
                self.seen
                    .children
                    .insert((kind, object.name_any()), *object);
            }
            Step::Delete { object, name, uid } => self.delete(object, &name, &uid),
            Step::MarkPrimaryVolume { name, term, .. } => {
                let claim = self
                    .seen
                    .claims
                    .iter_mut()
                    .find(|c| c.name_any() == name)
                    .unwrap();
                claim
                    .annotations_mut()
                    .insert(labels::PRIMARY_TERM.into(), term.to_string());
            }
            Step::MoveClaim { name, zone, .. } => {
                let claim = self
                    .seen
                    .claims
                    .iter_mut()
                    .find(|c| c.name_any() == name)
                    .unwrap();
                claim.labels_mut().insert(labels::ZONE.into(), zone);
            }
            Step::ForgetInstance { name } => self.store(|s| {
                for entry in s
                    .status
                    .iter_mut()
                    .flat_map(|s| &mut s.instances)
                    .filter(|e| e.name == name)
                {
                    *entry = InstanceStatus {
                        name: name.clone(),
                        region: entry.region.clone(),
                        ..Default::default()
                    };
                }
            }),
        }
    }

    fn create(&mut self, object: Object, value: serde_json::Value) {
        match object {
            Object::Pod => {
                let pod: Pod = serde_json::from_value(value).unwrap();
                assert!(
                    self.seen.store.status.as_ref().unwrap().primary.is_some(),
                    "intent before effect"
                );
                assert!(
                    self.seen
                        .claims
                        .iter()
                        .any(|c| c.name_any() == pod.name_any()),
                    "volume before pod"
                );
                assert!(
                    self.seen
                        .secrets
                        .contains_key(&names::tls_secret(&pod.name_any())),
                    "certificate before pod"
                );
                assert!(
                    self.seen
                        .pods
                        .iter()
                        .all(|p| p.name_any() != pod.name_any())
                );
                self.seen.pods.push(pod);
            }
            Object::Claim => {
                let claim: PersistentVolumeClaim = serde_json::from_value(value).unwrap();
                assert!(
                    claim.owner_references().is_empty(),
                    "volumes outlive the store"
                );
                self.seen.claims.push(claim);
            }
            Object::Secret => unreachable!("Secrets have steps of their own"),
            Object::Child(kind) => {
                let object: kube::api::DynamicObject = serde_json::from_value(value).unwrap();
                self.seen.children.insert((kind, object.name_any()), object);
            }
        }
    }

    fn delete(&mut self, object: Object, name: &str, uid: &str) {
        assert!(
            !uid.is_empty() || matches!(object, Object::Child(_)),
            "a delete carries the uid"
        );
        match object {
            Object::Pod => self.seen.pods.retain(|p| p.name_any() != name),
            Object::Claim => self.seen.claims.retain(|c| c.name_any() != name),
            Object::Secret => {
                self.seen.secrets.remove(name);
                if let Some(instance) = name.strip_suffix("-tls") {
                    self.seen.certificates.remove(instance);
                }
            }
            Object::Child(kind) => {
                self.seen.children.remove(&(kind, name.to_owned()));
            }
        }
    }

    /// Scheduler, volumes and instances do their part: every pod whose region has a usable node runs.
    fn run_pods(&mut self) {
        let nodes = self.seen.nodes.clone();
        let primary = self
            .seen
            .store
            .status
            .as_ref()
            .and_then(|s| s.primary.clone());
        for pod in &mut self.seen.pods {
            let wanted = pod.labels()[labels::REGION].clone();
            let Some(node) = nodes
                .iter()
                .find(|n| n.usable && n.labels.get(labels::NODE_REGION) == Some(&wanted))
            else {
                continue;
            };
            pod.spec.as_mut().unwrap().node_name = Some(node.name.clone());
            pod.status = Some(PodStatus {
                phase: Some("Running".into()),
                conditions: Some(vec![ready()]),
                ..PodStatus::default()
            });
            for claim in self
                .seen
                .claims
                .iter_mut()
                .filter(|c| c.name_any() == pod.metadata.name.clone().unwrap_or_default())
            {
                claim.spec.as_mut().unwrap().volume_name = Some("pv".into());
            }
        }
        let names: Vec<String> = self.seen.pods.iter().map(ResourceExt::name_any).collect();
        self.store(|s| {
            let status = s.status.get_or_insert_default();
            for name in names {
                let is_primary = primary.as_ref() == Some(&name);
                if status.instances.iter().all(|i| i.name != name) {
                    status.instances.push(InstanceStatus {
                        name: name.clone(),
                        ..Default::default()
                    });
                }
                let entry = status
                    .instances
                    .iter_mut()
                    .find(|i| i.name == name)
                    .unwrap();
                entry.role = Some(if is_primary {
                    InstanceRole::Primary
                } else {
                    InstanceRole::Standby
                });
                entry.ready = Some(true);
                entry.durable = is_primary.then_some(true);
                entry.system_identifier = Some("7".into());
            }
        });
    }

    /// Passes until nothing is left to do; the number of passes.
    fn settle(&mut self) -> usize {
        for pass in 1..50 {
            let plan = self.plan();
            for step in &plan.steps {
                self.execute(step);
            }
            self.say(&plan);
            self.run_pods();
            if plan.steps.is_empty() && self.plan().steps.is_empty() {
                return pass;
            }
        }
        panic!(
            "no end: {:?}",
            self.plan()
                .steps
                .iter()
                .map(ToString::to_string)
                .collect::<Vec<_>>()
        );
    }

    /// Reports as the operator does.
    fn say(&mut self, plan: &Plan) {
        let new = report::status(&self.seen.store, &plan.draft, NOW);
        self.store(|s| {
            let old = s.status.get_or_insert_default();
            let mut merged = new;
            for mine in &mut merged.instances {
                if let Some(said) = old.instances.iter().find(|i| i.name == mine.name) {
                    *mine = InstanceStatus {
                        region: mine.region.clone(),
                        zone: mine.zone.clone(),
                        node: mine.node.clone(),
                        ..said.clone()
                    };
                }
            }
            let stated = |i: &&InstanceStatus| {
                i.role.is_some() && merged.instances.iter().all(|m| m.name != i.name)
            };
            let others: Vec<InstanceStatus> =
                old.instances.iter().filter(stated).cloned().collect();
            merged.instances.extend(others);
            *old = merged;
        });
    }

    fn condition(&self, kind: &str) -> (String, String, String) {
        let status = self.seen.store.status.clone().unwrap();
        let c = status
            .conditions
            .into_iter()
            .find(|c| c.type_ == kind)
            .unwrap();
        (c.status, c.reason, c.message)
    }

    /// Everything there is, without uids and times.
    fn digest(&self) -> Vec<String> {
        let mut all: Vec<String> = self
            .seen
            .pods
            .iter()
            .map(|p| format!("pod {}", p.name_any()))
            .collect();
        all.extend(self.seen.claims.iter().map(|c| {
            format!(
                "claim {} {:?} {:?}",
                c.name_any(),
                c.labels(),
                c.annotations()
            )
        }));
        all.extend(self.seen.children.keys().map(|k| format!("{k:?}")));
        all.extend(self.seen.secrets.keys().map(|s| format!("secret {s}")));
        all.sort();
        all
    }
}

fn ready() -> PodCondition {
    PodCondition {
        type_: "Ready".into(),
        status: "True".into(),
        ..PodCondition::default()
    }
}

fn facts(authority: &str, names: &[String]) -> Facts {
    Facts {
        not_before: NOW,
        not_after: NOW + SignedDuration::from_hours(24 * 90),
        authority: authority.into(),
        names: names.to_vec(),
    }
}

fn sample() -> World {
    World::new(&[("us-west", 2), ("us-east", 1)])
}

#[test]
fn a_store_comes_up_as_specified_and_is_then_left_alone() {
    let mut world = sample();
    world.settle();
    let (status, reason, message) = world.condition(conditions::READY);
    assert_eq!(
        (status.as_str(), reason.as_str()),
        ("True", reasons::AS_SPECIFIED),
        "{message}"
    );
    assert_eq!(
        message,
        "3/3 instances ready; consumers-1 in region us-west is primary"
    );
    assert_eq!(world.condition(conditions::RESIDENT).0, "True");
    assert_eq!(world.condition(conditions::DURABLE).0, "True");
    assert!(world.plan().steps.is_empty());
    let zones: Vec<_> = world
        .seen
        .claims
        .iter()
        .map(|c| c.labels()[labels::ZONE].clone())
        .collect();
    assert_eq!(zones, ["a", "b", "a"]);
}

/// The operator dies after any step of any pass; its successor ends in the same world.
#[test]
fn a_crash_after_any_step_leaks_and_loses_nothing() {
    let mut reference = sample();
    reference.settle();
    let steps = sample().plan().steps.len();
    assert!(steps > 15, "{steps}");
    for k in 0..=steps {
        let mut world = sample();
        let plan = world.plan();
        for step in plan.steps.iter().take(k) {
            world.execute(step);
        }
        world.settle();
        assert_eq!(world.digest(), reference.digest(), "crashed after step {k}");
        assert_eq!(
            world.seen.store.status.as_ref().unwrap().primary.as_deref(),
            Some("consumers-1")
        );
    }
}

#[test]
fn a_forbidden_region_is_refused_in_words_and_nothing_is_made() {
    let mut world = World::new(&[("us-west", 1), ("eu-central", 1)]);
    let plan = world.plan();
    assert!(plan.steps.is_empty());
    world.say(&plan);
    let (status, reason, message) = world.condition(conditions::STALLED);
    assert_eq!(
        (status.as_str(), reason.as_str()),
        ("True", reasons::REGION_NOT_PERMITTED)
    );
    assert_eq!(
        message,
        "region eu-central is not permitted for Standby by ResidencyPolicy records (basis Policy: Records policy 12); permitted for Standby: us-east, us-west"
    );
}

#[test]
fn a_missing_policy_permits_nothing_but_takes_nothing_down() {
    let mut world = sample();
    world.seen.policy = None;
    assert!(world.plan().steps.is_empty());
    let mut world = sample();
    world.settle();
    world.seen.policy = None;
    let plan = world.plan();
    assert!(plan.steps.is_empty());
    world.say(&plan);
    assert_eq!(
        world.condition(conditions::STALLED).1,
        reasons::POLICY_NOT_FOUND
    );
    assert_eq!(world.condition(conditions::AVAILABLE).0, "True");
}

#[test]
fn a_region_added_unlawfully_to_a_running_store_stops_nothing() {
    let mut world = sample();
    world.settle();
    let before = world.digest();
    let spec = store(&[("us-west", 2), ("us-east", 1), ("eu-central", 1)]).spec;
    world.store(|s| s.spec = spec);
    // The primary's pod is lost meanwhile: it must come back in spite of the bad spec.
    world.seen.pods.retain(|p| p.name_any() != "consumers-1");
    world.settle();
    assert_eq!(world.digest(), before);
    assert_eq!(
        world.condition(conditions::STALLED).1,
        reasons::REGION_NOT_PERMITTED
    );
    assert_eq!(world.condition(conditions::AVAILABLE).0, "True");
}

#[test]
fn without_a_lawful_node_the_store_waits_and_says_so() {
    let mut world = sample();
    world.seen.nodes.retain(|n| n.name != "e1");
    world.settle();
    let (_, reason, message) = world.condition(conditions::READY);
    assert_eq!(reason, reasons::NO_LAWFUL_NODE);
    assert_eq!(
        message,
        "2/3 instances ready; 1 instance(s) wait for a node in region us-east: no node is verified to be there; nothing is placed elsewhere"
    );
    world.seen.nodes.push(node("e2", "us-east", "a"));
    world.settle();
    assert_eq!(world.condition(conditions::READY).0, "True");
}

#[test]
fn a_node_without_the_stamp_takes_nothing() {
    let mut world = sample();
    for node in &mut world.seen.nodes {
        node.labels.remove(labels::NODE_REGION);
    }
    let plan = world.plan();
    assert!(plan.steps.is_empty());
    world.say(&plan);
    assert_eq!(
        world.condition(conditions::READY).1,
        reasons::NO_LAWFUL_NODE
    );
}

#[test]
fn a_lost_pod_comes_back_on_its_volume_and_an_evicted_one_is_replaced() {
    let mut world = sample();
    world.settle();
    let before = world.digest();
    let claims: Vec<_> = world.seen.claims.iter().map(ResourceExt::uid).collect();
    world.seen.pods.retain(|p| p.name_any() != "consumers-2");
    world.seen.pods[0].status.as_mut().unwrap().phase = Some("Failed".into());
    world.settle();
    assert_eq!(world.digest(), before);
    assert_eq!(
        claims,
        world
            .seen
            .claims
            .iter()
            .map(ResourceExt::uid)
            .collect::<Vec<_>>()
    );
}

#[test]
fn a_new_image_is_rolled_out_one_at_a_time_with_the_primary_last() {
    let mut world = sample();
    world.settle();
    world.store(|s| s.spec.postgres.image = "postgres:17.9".into());
    let mut order = Vec::new();
    for _ in 0..10 {
        let plan = world.plan();
        for step in &plan.steps {
            if let Step::Delete { name, .. } = step {
                order.push(name.clone());
            }
            world.execute(step);
        }
        world.run_pods();
    }
    assert_eq!(order, ["consumers-2", "consumers-3", "consumers-1"]);
}

#[test]
fn a_bad_image_costs_one_standby() {
    let mut world = sample();
    world.settle();
    world.store(|s| s.spec.postgres.image = "no:such".into());
    for step in world.plan().steps {
        world.execute(&step);
    }
    // The replacement never becomes ready.
    for step in world.plan().steps {
        world.execute(&step);
    }
    assert!(world.plan().steps.is_empty(), "{:?}", world.plan().steps);
    world.store(|s| s.spec.postgres.image = "postgres:17".into());
    assert_eq!(
        world.plan().steps.len(),
        1,
        "the bad pod is replaced though it isn't ready"
    );
}

#[test]
fn shrinking_removes_the_instance_and_keeps_its_volume() {
    let mut world = sample();
    world.settle();
    let spec = store(&[("us-west", 2)]).spec;
    world.store(|s| s.spec = spec);
    world.settle();
    assert_eq!(world.seen.pods.len(), 2);
    assert_eq!(world.seen.claims.len(), 3);
    assert!(
        world
            .digest()
            .iter()
            .all(|d| !d.contains("consumers-3") || d.starts_with("claim")),
        "{:?}",
        world.digest()
    );
    let spec = store(&[("us-west", 2), ("us-east", 1)]).spec;
    world.store(|s| s.spec = spec);
    world.settle();
    assert_eq!(world.seen.pods.len(), 3, "and takes it up again");
    assert_eq!(world.seen.claims.len(), 3);
}

#[test]
fn nobody_is_retired_before_the_successor_is_there() {
    let mut world = World::new(&[("us-west", 2)]);
    world.settle();
    // The second instance is to move east, where no node is.
    world.seen.nodes.retain(|n| n.name != "e1");
    let spec = store(&[("us-west", 1), ("us-east", 1)]).spec;
    world.store(|s| s.spec = spec);
    world.settle();
    assert_eq!(world.seen.pods.len(), 2, "the standby stays until then");
    world.seen.nodes.push(node("e2", "us-east", "a"));
    world.settle();
    let names: Vec<String> = world.seen.pods.iter().map(ResourceExt::name_any).collect();
    assert_eq!(names, ["consumers-1", "consumers-3"]);
}

#[test]
fn a_primary_whose_region_is_not_asked_for_stays_in_its_store() {
    let mut world = World::new(&[("us-west", 2), ("us-east", 1)]);
    world.seen.policy = Some(policy(&["us-west", "us-east"], &["us-west", "us-east"]));
    world.settle();
    let spec = store(&[("us-east", 2)]).spec;
    world.store(|s| s.spec = spec);
    world.seen.pods.retain(|p| p.name_any() != "consumers-1");
    world.settle();
    assert!(
        world
            .seen
            .pods
            .iter()
            .any(|p| p.name_any() == "consumers-1"),
        "and is made again"
    );
    assert!(world.seen.secrets.contains_key("consumers-1-tls"));
    let (status, _, message) = world.condition(conditions::READY);
    assert_eq!(status, "False");
    assert!(
        message.contains(
            "primary consumers-1 is in region us-west, for which spec.placement asks no instance"
        ),
        "{message}"
    );
}

#[test]
fn a_primary_in_a_region_no_longer_permitted_for_one_is_said_and_not_made_again() {
    let mut world = World::new(&[("us-west", 1), ("us-east", 1)]);
    world.settle();
    world.seen.policy = Some(policy(&["us-east"], &["us-west", "us-east"]));
    world.settle();
    assert_eq!(world.condition(conditions::RESIDENT).0, "False");
    assert_eq!(world.condition(conditions::READY).1, reasons::OUTSIDE);
    world.seen.pods.retain(|p| p.name_any() != "consumers-1");
    world.settle();
    assert!(
        world
            .seen
            .pods
            .iter()
            .all(|p| p.name_any() != "consumers-1")
    );
}

/// The primary is recorded, then nothing more comes to pass, and the world changes.
#[test]
fn a_primary_on_record_that_was_never_made_is_not_made_where_none_may_be() {
    let mut world = World::new(&[("us-west", 1), ("us-east", 1)]);
    let plan = world.plan();
    for step in &plan.steps {
        world.execute(step);
        if matches!(step, Step::RecordPrimary { .. }) {
            break;
        }
    }
    world.seen.nodes.retain(|n| !n.name.starts_with('w'));
    for _ in 0..5 {
        let plan = world.plan();
        for step in &plan.steps {
            world.execute(step);
        }
        world.run_pods();
    }
    assert!(
        world.seen.claims.is_empty() && world.seen.pods.is_empty(),
        "{:?}",
        world.digest()
    );
    world.seen.nodes.push(node("w9", "us-west", "a"));
    world.settle();
    let status = world.seen.store.status.clone().unwrap();
    let primary = status.primary.unwrap();
    let claim = world
        .seen
        .claims
        .iter()
        .find(|c| c.name_any() == primary)
        .unwrap();
    assert_eq!(claim.labels()[labels::REGION], "us-west");
}

#[test]
fn a_volume_claim_deleted_by_hand_is_said_and_its_pod_is_left_alone() {
    let mut world = sample();
    world.settle();
    for claim in &mut world.seen.claims {
        claim.metadata.deletion_timestamp = Some(Time(NOW));
    }
    world.store(|s| s.spec.postgres.image = "postgres:17.9".into());
    let plan = world.plan();
    assert!(plan.steps.is_empty(), "{:?}", plan.steps);
    world.say(&plan);
    let (_, _, message) = world.condition(conditions::READY);
    assert!(
        message.contains("volume claim consumers-1 is being deleted"),
        "{message}"
    );
}

#[test]
fn a_lost_volume_of_the_primary_is_never_replaced_by_an_empty_one() {
    let mut world = sample();
    world.settle();
    world.seen.claims.retain(|c| c.name_any() != "consumers-1");
    world.seen.pods.retain(|p| p.name_any() != "consumers-1");
    world.settle();
    assert!(
        world
            .seen
            .claims
            .iter()
            .all(|c| c.name_any() != "consumers-1")
    );
    assert_eq!(world.condition(conditions::STALLED).1, reasons::VOLUME_LOST);
    // Made anew, the store doesn't begin with whatever volume there is.
    let mut again = sample();
    again.seen.claims = world.seen.claims.clone();
    assert!(again.plan().steps.is_empty());
}

#[test]
fn a_volume_is_marked_only_once_it_holds_the_data() {
    let mut world = sample();
    for step in world.plan().steps {
        world.execute(&step);
    }
    let mark = |world: &World| {
        world.seen.claims[0]
            .annotations()
            .get(labels::PRIMARY_TERM)
            .cloned()
    };
    assert_eq!(mark(&world).as_deref(), Some("0"));
    world.settle();
    assert_eq!(mark(&world).as_deref(), Some("1"));
}

#[test]
fn an_unbound_claim_follows_its_instance_to_another_zone() {
    let mut world = sample();
    for step in world.plan().steps {
        world.execute(&step);
    }
    // Before any volume exists, the first zone is closed.
    for node in world.seen.nodes.iter_mut().filter(|n| n.name == "w1") {
        node.usable = false;
    }
    world.settle();
    for claim in &world.seen.claims {
        assert_ne!(
            (
                claim.labels()[labels::REGION].as_str(),
                claim.labels()[labels::ZONE].as_str()
            ),
            ("us-west", "a")
        );
    }
}

#[test]
fn a_bad_image_is_mended_though_another_pod_hangs_on_a_dead_node() {
    let mut world = sample();
    world.settle();
    world.store(|s| s.spec.postgres.image = "no:such".into());
    for _ in 0..2 {
        for step in world.plan().steps {
            world.execute(&step);
        }
    }
    let stuck = world
        .seen
        .pods
        .iter_mut()
        .find(|p| p.name_any() == "consumers-3")
        .unwrap();
    stuck.metadata.deletion_timestamp = Some(Time(NOW));
    world.store(|s| s.spec.postgres.image = "postgres:17".into());
    let steps = world.plan().steps;
    assert!(
        matches!(&steps[..], [Step::Delete { name, .. }] if name == "consumers-2"),
        "{steps:?}"
    );
}

#[test]
fn deleting_a_store_leaves_a_persons_own_claim() {
    let mut world = sample();
    world.store(|s| s.spec.deletion_policy = serde_json::from_value(json!("Delete")).unwrap());
    world.settle();
    let mut own = world.seen.claims[0].clone();
    own.metadata.name = Some("restored".into());
    world.seen.claims.push(own);
    world.store(|s| s.metadata.deletion_timestamp = Some(Time(NOW)));
    for step in world.plan().steps {
        world.execute(&step);
    }
    let left: Vec<String> = world
        .seen
        .claims
        .iter()
        .map(ResourceExt::name_any)
        .collect();
    assert_eq!(left, ["restored"]);
}

#[test]
fn deletion_keeps_or_removes_the_volumes_as_asked() {
    for (policy, left) in [("Retain", 3), ("Delete", 0)] {
        let mut world = sample();
        world.store(|s| s.spec.deletion_policy = serde_json::from_value(json!(policy)).unwrap());
        world.settle();
        world.store(|s| s.metadata.deletion_timestamp = Some(Time(NOW)));
        for step in world.plan().steps {
            world.execute(&step);
        }
        assert_eq!(world.seen.claims.len(), left, "{policy}");
        assert!(world.seen.store.finalizers().is_empty());
        assert!(world.plan().steps.is_empty());
    }
}

#[test]
fn retained_volumes_are_taken_up_beginning_with_the_last_primary() {
    let mut world = sample();
    world.settle();
    let mut again = sample();
    again.seen.claims = world.seen.claims.clone();
    // In another order, and the last primary isn't the lowest slot.
    for claim in &mut again.seen.claims {
        claim.annotations_mut().remove(labels::PRIMARY_TERM);
    }
    again.seen.claims[1]
        .annotations_mut()
        .insert(labels::PRIMARY_TERM.into(), "4".into());
    again.settle();
    let status = again.seen.store.status.clone().unwrap();
    assert_eq!(
        (status.primary.as_deref(), status.term),
        (Some("consumers-2"), Some(5))
    );

    let mut unknown = sample();
    unknown.seen.claims = world.seen.claims.clone();
    for claim in &mut unknown.seen.claims {
        claim.annotations_mut().remove(labels::PRIMARY_TERM);
    }
    let plan = unknown.plan();
    assert!(
        plan.steps.is_empty(),
        "nobody guesses which volume is the last"
    );
    unknown.say(&plan);
    assert_eq!(unknown.condition(conditions::STALLED).0, "True");
}

#[test]
fn in_a_namespace_that_is_being_deleted_nothing_is_made_again() {
    let mut world = sample();
    world.settle();
    world.seen.namespace_ending = true;
    world.seen.pods.clear();
    assert!(world.plan().steps.is_empty());
}

#[test]
fn a_pause_leaves_everything_alone() {
    let mut world = sample();
    world.store(|s| {
        s.annotations_mut()
            .insert(labels::PAUSE.into(), "true".into());
    });
    assert!(world.plan().steps.is_empty());
}

#[test]
fn a_service_changed_by_hand_is_mended_and_endpoints_are_not_touched() {
    let mut world = sample();
    world.settle();
    for ((kind, _), object) in &mut world.seen.children {
        match kind {
            super::kinds::ChildKind::Service => object.data["spec"]["ports"][0]["port"] = json!(1),
            super::kinds::ChildKind::EndpointSlice => {
                object.data["endpoints"] = json!([{ "addresses": ["198.18.0.1"] }]);
            }
            _ => {}
        }
    }
    let plan = world.plan();
    assert_eq!(
        plan.steps.len(),
        5,
        "{:?}",
        plan.steps
            .iter()
            .map(ToString::to_string)
            .collect::<Vec<_>>()
    );
    assert!(
        plan.steps
            .iter()
            .all(|s| matches!(s, Step::Update(super::kinds::ChildKind::Service, _)))
    );
}

#[test]
fn pods_are_restricted_and_placed_by_the_stamp() {
    let mut world = sample();
    world.settle();
    for pod in &world.seen.pods {
        let spec = pod.spec.as_ref().unwrap();
        let security = spec.security_context.as_ref().unwrap();
        assert_eq!(security.run_as_non_root, Some(true));
        assert_eq!(
            security.seccomp_profile.as_ref().unwrap().type_,
            "RuntimeDefault"
        );
        for container in spec
            .containers
            .iter()
            .chain(spec.init_containers.iter().flatten())
        {
            let security = container.security_context.as_ref().unwrap();
            assert_eq!(security.read_only_root_filesystem, Some(true));
            assert_eq!(security.allow_privilege_escalation, Some(false));
            assert_eq!(
                security.capabilities.as_ref().unwrap().drop.as_deref(),
                Some(&["ALL".to_owned()][..])
            );
        }
        let affinity =
            serde_json::to_string(&spec.affinity.as_ref().unwrap().node_affinity).unwrap();
        assert!(
            affinity.contains("requiredDuringScheduling") && affinity.contains(labels::NODE_REGION),
            "{affinity}"
        );
    }
}

#[test]
fn the_secret_reaches_hosts_that_may_be_primary_first() {
    let world = World::new(&[("us-east", 1), ("us-west", 1)]);
    let placed = crate::placement::place(
        &[("us-east", 1), ("us-west", 1)].map(|(r, n)| crate::placement::Want {
            region: r.into(),
            instances: n,
        }),
        &super::plan::sites(&world.seen),
        &[],
        None,
    )
    .placed;
    let secret = build::AppSecret::new(&world.seen.store, &placed, |r| r == "us-west");
    assert_eq!(secret.hosts, ["consumers-2.ns.svc", "consumers-1.ns.svc"]);
    let data = secret.data("pw", "CA");
    assert_eq!(
        data["uri"],
        "postgresql://app:pw@consumers-2.ns.svc:5432,consumers-1.ns.svc:5432/app?target_session_attrs=read-write&connect_timeout=2&tcp_user_timeout=3000&sslmode=verify-full&sslrootcert=/etc/domicile/consumers/ca.crt"
    );
}

const REGIONS: [&str; 3] = ["eu-central", "us-east", "us-west"];

fn subset() -> impl Strategy<Value = Vec<&'static str>> {
    proptest::sample::subsequence(&REGIONS, 0..=3)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]

    /// Whatever is edited, in whatever order: no pod or volume claim is ever made for a region that the
    /// policy of that moment doesn't permit, and every history of edits settles.
    #[test]
    fn nothing_is_ever_made_outside(
        edits in proptest::collection::vec((subset(), subset(), proptest::collection::vec((0..3usize, 1..3i32), 1..3), subset()), 1..4),
    ) {
        let mut world = sample();
        for (primary, standby, placement, usable) in edits {
            world.seen.policy = Some(policy(&primary, &standby));
            let placement: BTreeMap<&str, i32> = placement.into_iter().map(|(r, n)| (REGIONS[r], n)).collect();
            let placement: Vec<(&str, i32)> = placement.into_iter().collect();
            let spec = store(&placement).spec;
            world.store(|s| s.spec = spec);
            for node in &mut world.seen.nodes {
                node.usable = usable.iter().any(|r| node.labels[labels::NODE_REGION] == *r);
            }
            let total: i32 = placement.iter().map(|(_, n)| n).sum();
            for _ in 0..30 {
                let plan = world.plan();
                for step in &plan.steps {
                    if let Step::Create(Object::Pod | Object::Claim, value) = step {
                        let region = value["metadata"]["labels"][labels::REGION].as_str().unwrap();
                        let permitted = if total > 1 { &standby } else { &primary };
                        prop_assert!(permitted.contains(&region), "{} in {}", step, region);
                        let affinity = value["spec"]["affinity"].to_string();
                        let elsewhere = REGIONS.iter().filter(|r| **r != region).any(|r| affinity.contains(&format!("\"{r}\"")));
                        prop_assert!(!elsewhere);
                    }
                    world.execute(step);
                }
                world.say(&plan);
                world.run_pods();
            }
            let left = world.plan().steps;
            prop_assert!(left.is_empty(), "{:?}", left.iter().map(ToString::to_string).collect::<Vec<_>>());
        }
    }
}
