//! A store's world in memory, in which a plan's steps take effect as the API server, the scheduler, kubelets
//! and instances would have it.

use jiff::{SignedDuration, Timestamp};
use k8s_openapi::api::core::v1::{PersistentVolumeClaim, Pod, PodCondition, PodStatus};
use kube::ResourceExt;
use serde_json::json;
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use super::super::assess::pod_ready;
use super::super::build::Settings;
use super::super::certificates::{Authorities, Facts, Known};
use super::super::leader::{self, Leader};
use super::super::lost::Volume;
use super::super::observe::Observed;
use super::super::plan::{Plan, plan};
use super::super::report;
use super::super::step::{Object, Step};
use crate::api::privacy_data_store::{AgreedConfiguration, InstanceRole, InstanceStatus};
use crate::api::region::{NodeWitnesses, RegionSpec};
use crate::api::{PrivacyDataStore, Region, ResidencyPolicy, labels, names};
use crate::residency::NodeFacts;
use crate::residency::violations::{Requirement, reaching};

pub(super) const NOW: Timestamp = Timestamp::UNIX_EPOCH;

pub(super) fn settings() -> Settings {
    Settings {
        image: "domicile:test".into(),
        ipv6: false,
    }
}

pub(super) fn node(name: &str, region: &str, zone: &str) -> NodeFacts {
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

pub(super) fn region(name: &str) -> Arc<Region> {
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

pub(super) fn policy(primary: &[&str], standby: &[&str]) -> Arc<ResidencyPolicy> {
    let spec = json!({
        "basis": "Policy", "citation": "Records policy 12",
        "permits": [{ "data": "Primary", "regions": primary }, { "data": "Standby", "regions": standby }],
    });
    Arc::new(ResidencyPolicy::new(
        "records",
        serde_json::from_value(spec).unwrap(),
    ))
}

pub(super) fn store(placement: &[(&str, i32)]) -> PrivacyDataStore {
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
pub(super) struct World {
    pub(super) seen: Observed,
    uids: u32,
    /// What the clock says.
    pub(super) now: Timestamp,
    /// Volumes are on the node where they were first used, and on no other.
    pub(super) local: bool,
    /// Events: reason and note.
    pub(super) told: Vec<(String, String)>,
    /// Authorities made so far.
    made: u32,
    /// To these instances a changed Secret hasn't come yet.
    pub(super) unread: BTreeSet<String>,
}

impl World {
    pub(super) fn new(placement: &[(&str, i32)]) -> Self {
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
                ceiling: None,
                storage_class: super::super::observe::StorageClassSeen::NotNeeded,
                regions: ["eu-central", "us-east", "us-west"].map(region).into(),
                nodes,
                pods: vec![],
                claims: vec![],
                children: BTreeMap::new(),
                authorities: None,
                certificates: BTreeMap::new(),
                app_secret: None,
                secrets: BTreeMap::new(),
                volumes: BTreeMap::new(),
                told: None,
                keeps: vec![],
            },
            uids: 0,
            now: NOW,
            local: false,
            told: vec![],
            made: 0,
            unread: BTreeSet::new(),
        }
    }

    fn new_authority(&mut self) -> Known {
        self.made += 1;
        Known {
            id: format!("ca-{}", self.made),
            not_after: self.now + SignedDuration::from_hours(24 * 3650),
        }
    }

    fn hold(&mut self, active: Known, next: Option<Known>, mut old: Vec<String>) {
        old.retain(|id| *id != active.id);
        let next_id = next.as_ref().map(|n| n.id.clone());
        let all = [active.id.clone()]
            .into_iter()
            .chain(next_id)
            .chain(old.clone());
        self.seen.authorities = Some(Authorities {
            bundle: all.collect::<Vec<_>>().join("+"),
            active,
            next,
            old,
            switch_after: None,
        });
    }

    pub(super) fn plan(&self) -> Plan {
        plan(&self.seen, &settings(), self.now)
    }

    pub(super) fn uid(&mut self) -> String {
        self.uids += 1;
        format!("uid-{}", self.uids)
    }

    pub(super) fn store(&mut self, change: impl FnOnce(&mut PrivacyDataStore)) {
        let mut store = (*self.seen.store).clone();
        change(&mut store);
        self.seen.store = Arc::new(store);
    }

    pub(super) fn execute(&mut self, step: &Step) {
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
                let active = self.new_authority();
                let certificates = self.seen.certificates.values();
                let old: BTreeSet<String> = certificates
                    .flat_map(|f| f.bundle.split('+').map(str::to_owned))
                    .collect();
                self.hold(active, None, old.into_iter().collect());
                self.seen.secrets.insert("consumers-ca".into(), uid);
            }
            Step::AnnounceAuthority { switch_after } => {
                let a = self.seen.authorities.clone().unwrap();
                assert_eq!(a.next, None, "one at a time");
                let next = self.new_authority();
                self.hold(a.active, Some(next), a.old);
                self.seen.authorities.as_mut().unwrap().switch_after = Some(switch_after);
            }
            Step::SwitchAuthority { next } => {
                let mut a = self.seen.authorities.clone().unwrap();
                let successor = a.next.take().unwrap();
                assert_eq!(successor.id, next);
                a.old.push(a.active.id);
                self.hold(successor, None, a.old);
            }
            Step::RetireAuthorities { active } => {
                let a = self.seen.authorities.clone().unwrap();
                assert_eq!(a.active.id, active);
                self.hold(a.active, a.next, vec![]);
            }
            Step::Entrust { instance } => {
                let bundle = self.seen.authorities.as_ref().unwrap().bundle.clone();
                self.seen.certificates.get_mut(&instance).unwrap().bundle = bundle;
            }
            Step::IssueCertificate { instance, names } => {
                let authorities = self.seen.authorities.as_ref();
                let authorities = authorities.expect("no certificate without an authority");
                let mut facts = facts(authorities, &names);
                facts.not_before = self.now;
                facts.not_after = self.now + SignedDuration::from_hours(24 * 90);
                self.seen.certificates.insert(instance.clone(), facts);
                self.seen.secrets.insert(names::tls_secret(&instance), uid);
            }
            Step::WriteAppSecret(secret) => {
                let bundle = &self.seen.authorities.as_ref().unwrap().bundle;
                self.seen.app_secret = Some(secret.hash(bundle));
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
            Step::Fence { name, uid } => self.delete(Object::Pod, &name, &uid),
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
            Step::Tell { reason, note, .. } => self.told.push((reason.to_owned(), note)),
            Step::TellFailover(told) => {
                self.seen.told = Some(told.term);
                self.told.push(("Failover".into(), told.note));
            }
            Step::RemoveAnnotation { name, value } => self.store(|s| {
                if s.annotations().get(name) == Some(&value) {
                    s.annotations_mut().remove(name);
                }
            }),
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

    pub(super) fn create(&mut self, object: Object, value: serde_json::Value) {
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

    pub(super) fn delete(&mut self, object: Object, name: &str, uid: &str) {
        assert!(
            !uid.is_empty() || matches!(object, Object::Child(_)),
            "a delete carries the uid"
        );
        match object {
            Object::Pod => self.seen.pods.retain(|p| p.name_any() != name),
            Object::Claim => {
                self.seen.claims.retain(|c| c.name_any() != name);
                if self.local {
                    self.seen.volumes.remove(name);
                }
            }
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

    /// Scheduler, volumes and instances do their part: every pod whose region has a usable node that reaches its
    /// volume runs. One that runs stays where it is, whatever becomes of its node's labels.
    pub(super) fn run_pods(&mut self) {
        let nodes = self.seen.nodes.clone();
        let volumes = self.seen.volumes.clone();
        for pod in &mut self.seen.pods {
            let name = pod.name_any();
            let wanted = pod.labels()[labels::REGION].clone();
            let there = pod.spec.as_ref().and_then(|s| s.node_name.clone());
            let affinity = volumes.get(&name).and_then(|v| v.affinity.as_ref());
            let reaches = |n: &NodeFacts| {
                affinity.is_none_or(|a| !reaching(a, std::slice::from_ref(n)).unwrap().is_empty())
            };
            let Some(node) = nodes
                .iter()
                .find(|n| self.local && Some(&n.name) == there.as_ref())
                .or_else(|| {
                    nodes.iter().find(|n| {
                        n.usable && n.labels.get(labels::NODE_REGION) == Some(&wanted) && reaches(n)
                    })
                })
            else {
                continue;
            };
            if self.local {
                self.seen
                    .volumes
                    .entry(name)
                    .or_insert_with(|| on_node(&node.name));
            }
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
        self.agree();
    }

    /// Instances whose pods are ready decide who is primary, and report.
    fn agree(&mut self) {
        let up: Vec<String> = self
            .seen
            .pods
            .iter()
            .filter(|p| pod_ready(Some(p)))
            .map(ResourceExt::name_any)
            .collect();
        let Some(Leader { name, term }) = leader::of(&self.seen.store) else {
            return;
        };
        let (old, term) = (name.to_owned(), term.max(2));
        let certificates = self.seen.certificates.clone();
        let unread = self.unread.clone();
        self.store(|s| {
            let status = s.status.get_or_insert_default();
            for name in &up {
                if status.instances.iter().all(|i| i.name != *name) {
                    status.instances.push(InstanceStatus {
                        name: name.clone(),
                        ..Default::default()
                    });
                }
            }
            let voters: Vec<String> = status
                .instances
                .iter()
                .filter(|i| i.leaving != Some(true))
                .map(|i| i.name.clone())
                .collect();
            let stays = up.contains(&old) && voters.contains(&old);
            let next = status.instances.iter().find(|i| {
                i.may_be_primary == Some(true)
                    && i.system_identifier.is_some()
                    && up.contains(&i.name)
                    && voters.contains(&i.name)
            });
            let (primary, term) = match next {
                Some(next) if !stays => (next.name.clone(), term + 1),
                _ if up.contains(&old) => (old, term),
                _ => return,
            };
            for entry in status.instances.iter_mut().filter(|i| up.contains(&i.name)) {
                let is_primary = entry.name == primary;
                entry.role = Some(if is_primary {
                    InstanceRole::Primary
                } else {
                    InstanceRole::Standby
                });
                entry.ready = Some(true);
                if let Some(facts) = certificates.get(&entry.name)
                    && !unread.contains(&entry.name)
                {
                    entry.trusts = facts.bundle.split('+').map(str::to_owned).collect();
                    entry.signed_by.clone_from(&facts.signer);
                }
                entry.term = Some(term);
                entry.durable = is_primary.then_some(true);
                entry.system_identifier = Some("7".into());
            }
            let id = |name: &String| format!("{name}/v");
            status.configuration = Some(AgreedConfiguration {
                term,
                primary: Some(id(&primary)),
                voters: voters.iter().map(id).collect(),
                ..AgreedConfiguration::default()
            });
        });
    }

    /// Passes until nothing is left to do; the number of passes.
    pub(super) fn settle(&mut self) -> usize {
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
    pub(super) fn say(&mut self, plan: &Plan) {
        let new = report::status(&self.seen.store, &plan.draft, self.now);
        self.store(|s| {
            let old = s.status.get_or_insert_default();
            let mut merged = new;
            for mine in &mut merged.instances {
                if let Some(said) = old.instances.iter().find(|i| i.name == mine.name) {
                    *mine = InstanceStatus {
                        region: mine.region.clone(),
                        zone: mine.zone.clone(),
                        node: mine.node.clone(),
                        may_be_primary: mine.may_be_primary,
                        leaving: mine.leaving,
                        ..said.clone()
                    };
                }
            }
            let stated = |i: &&InstanceStatus| {
                i.role.is_some() && merged.instances.iter().all(|m| m.name != i.name)
            };
            let others: Vec<InstanceStatus> =
                old.instances.iter().filter(stated).cloned().collect();
            merged
                .instances
                .extend(others.into_iter().map(|o| InstanceStatus {
                    region: None,
                    zone: None,
                    node: None,
                    may_be_primary: None,
                    leaving: None,
                    ..o
                }));
            merged.configuration.clone_from(&old.configuration);
            merged.last_failover.clone_from(&old.last_failover);
            *old = merged;
        });
    }

    pub(super) fn condition(&self, kind: &str) -> (String, String, String) {
        let status = self.seen.store.status.clone().unwrap();
        let c = status
            .conditions
            .into_iter()
            .find(|c| c.type_ == kind)
            .unwrap();
        (c.status, c.reason, c.message)
    }

    /// Everything there is, without uids and times.
    pub(super) fn digest(&self) -> Vec<String> {
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

/// A volume that this node alone reaches.
pub(super) fn on_node(node: &str) -> Volume {
    let requirement = Requirement {
        key: String::new(),
        operator: "In".into(),
        values: vec![node.to_owned()],
    };
    Volume {
        affinity: Some(vec![vec![requirement]]),
        ..Volume::default()
    }
}

pub(super) fn ready() -> PodCondition {
    PodCondition {
        type_: "Ready".into(),
        status: "True".into(),
        ..PodCondition::default()
    }
}

pub(super) fn facts(authorities: &Authorities, names: &[String]) -> Facts {
    Facts {
        not_before: NOW,
        not_after: NOW + SignedDuration::from_hours(24 * 90),
        bundle: authorities.bundle.clone(),
        signer: Some(authorities.active.id.clone()),
        names: names.to_vec(),
    }
}

pub(super) fn sample() -> World {
    World::new(&[("us-west", 2), ("us-east", 1)])
}
