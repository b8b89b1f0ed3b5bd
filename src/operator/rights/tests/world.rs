//! A workflow's world in memory, in which a plan's steps take effect as the API server, the scheduler, kubelets, the store
//! and the ledger would have it.

use jiff::{SignedDuration, Timestamp};
use k8s_openapi::api::core::v1::{Pod, PodCondition, PodStatus};
use kube::ResourceExt;
use serde_json::{Value, json};
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use super::super::backlog::{Reading, Tally};
use super::super::build::GATEWAY;
use super::super::kinds::ChildKind;
use super::super::observe::{Binding, Observed, Signers};
use super::super::plan::{Plan, plan};
use super::super::step::{Object, Step};
use super::super::{keys, report};
use crate::api::names::rights as names;
use crate::api::region::{NodeWitnesses, RegionSpec};
use crate::api::{PrivacyDataStore, Region, ResidencyPolicy, RightsWorkflow, labels};
use crate::operator::store::build::Settings;
use crate::operator::store::certificates::{Authorities, Facts, Known};
use crate::residency::NodeFacts;

fn settings() -> Settings {
    Settings {
        image: "domicile:test".into(),
        ipv6: false,
    }
}

pub(super) fn node(name: &str, region: &str) -> NodeFacts {
    let labels = [
        (labels::NODE_TOPOLOGY_REGION, region),
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
    let nodes = NodeWitnesses {
        labels: [(labels::NODE_TOPOLOGY_REGION.to_owned(), name.to_owned())].into(),
        provider_id_prefix: None,
    };
    let spec = RegionSpec {
        jurisdictions: vec![],
        nodes,
    };
    Arc::new(Region::new(name, spec))
}

pub(super) fn policy(gateway: &[&str], worker: &[&str]) -> Arc<ResidencyPolicy> {
    let spec = json!({
        "basis": "Policy", "citation": "Records policy 12",
        "permits": [{ "data": "Gateway", "regions": gateway }, { "data": "Worker", "regions": worker }],
    });
    Arc::new(ResidencyPolicy::new(
        "records",
        serde_json::from_value(spec).unwrap(),
    ))
}

pub(super) fn store(name: &str, regions: &[&str]) -> PrivacyDataStore {
    let placement: Vec<Value> = regions
        .iter()
        .map(|r| json!({ "region": r, "instances": 1 }))
        .collect();
    let instances: Vec<Value> = regions
        .iter()
        .zip(1..)
        .map(|(r, n)| json!({ "name": format!("{name}-{n}"), "region": r, "trusts": ["ca-1"], "mayBePrimary": true }))
        .collect();
    serde_json::from_value(json!({
        "apiVersion": "domicile.dev/v1alpha1", "kind": "PrivacyDataStore",
        "metadata": { "name": name, "namespace": "ns", "uid": format!("{name}-uid") },
        "spec": {
            "residencyPolicyRef": { "name": "records" }, "placement": placement, "storage": { "size": "1Gi" },
        },
        "status": { "instances": instances },
    }))
    .unwrap()
}

pub(super) fn spec(pools: &[(&str, i32)]) -> Value {
    let pools: Vec<Value> = pools
        .iter()
        .map(|(r, n)| json!({ "region": r, "min": n, "max": 9 }))
        .collect();
    json!({
        "ledgerRef": { "name": "main" }, "residencyPolicyRef": { "name": "records" },
        "regimes": ["eu-gdpr"], "identifiers": ["id"],
        "targets": [
            { "name": "accounts", "type": "PostgreSQL", "postgresql": {
                "storeRef": { "name": "main" },
                "erase": [
                    { "table": "customer", "where": { "id": "id" } },
                    { "table": "orders", "where": { "customer": "id" }, "clearColumns": ["name"] },
                ],
            } },
            { "name": "sessions", "type": "Redis", "region": "us-west", "settleSeconds": 30, "redis": {
                "urlFrom": { "secretKeyRef": { "name": "sessions", "key": "address" } }, "keys": ["session:{id}:*"],
            } },
        ],
        "workers": { "pools": pools },
    })
}

pub(super) fn signers() -> Signers {
    let active = Known {
        id: "ca-1".into(),
        not_after: Timestamp::UNIX_EPOCH + SignedDuration::from_hours(24 * 3650),
    };
    Signers {
        known: Authorities {
            active,
            next: None,
            old: vec![],
            switch_after: None,
            bundle: "b-1".into(),
        },
        bundle: "PEM 1".into(),
    }
}

#[derive(Clone, Debug)]
pub(super) struct World {
    pub(super) seen: Observed,
    uids: u32,
    pub(super) now: Timestamp,
    pub(super) told: Vec<String>,
    /// What the ledger would say.
    pub(super) ledger: Tally,
    /// It answers.
    pub(super) answers: bool,
}

impl World {
    pub(super) fn new(pools: &[(&str, i32)]) -> Self {
        let mut workflow =
            RightsWorkflow::new("consumers", serde_json::from_value(spec(pools)).unwrap());
        workflow.metadata.namespace = Some("ns".into());
        workflow.metadata.uid = Some("uid".into());
        workflow.metadata.generation = Some(1);
        let stores = [store("main", &["us-west", "us-east"])];
        Self {
            seen: Observed {
                workflow: Arc::new(workflow),
                namespace_labels: BTreeMap::new(),
                namespace_ending: false,
                policy: Some(policy(&["us-west", "us-east"], &["us-west", "us-east"])),
                ceiling: None,
                regions: ["eu-central", "us-east", "us-west"].map(region).into(),
                nodes: vec![
                    node("c1", "eu-central"),
                    node("e1", "us-east"),
                    node("w1", "us-west"),
                ],
                stores: stores.map(|s| (s.name_any(), Arc::new(s))).into(),
                authorities: [("main".to_owned(), signers())].into(),
                pods: vec![],
                children: BTreeMap::new(),
                keys: None,
                certificates: BTreeMap::new(),
                secrets: BTreeMap::new(),
                binding: None,
                reading: Reading::Never,
            },
            uids: 0,
            now: "2026-12-04T12:00:00Z".parse().unwrap(),
            told: vec![],
            ledger: Tally {
                empty: true,
                ..Tally::default()
            },
            answers: true,
        }
    }

    pub(super) fn plan(&self) -> Plan {
        plan(&self.seen, &settings(), self.now)
    }

    fn uid(&mut self) -> String {
        self.uids += 1;
        format!("uid-{}", self.uids)
    }

    pub(super) fn workflow(&mut self, change: impl FnOnce(&mut RightsWorkflow)) {
        let mut workflow = (*self.seen.workflow).clone();
        change(&mut workflow);
        self.seen.workflow = Arc::new(workflow);
    }

    fn store(&mut self, name: &str, change: impl FnOnce(&mut PrivacyDataStore)) {
        let mut store = (*self.seen.stores[name]).clone();
        change(&mut store);
        self.seen.stores.insert(name.to_owned(), Arc::new(store));
    }

    pub(super) fn execute(&mut self, step: &Step) {
        let uid = self.uid();
        let keys_secret = names::keys("consumers");
        match step.clone() {
            Step::AddFinalizer => {
                self.workflow(|w| w.finalizers_mut().push(labels::RIGHTS_FINALIZER.into()));
            }
            Step::RemoveFinalizer => self.workflow(|w| w.finalizers_mut().clear()),
            Step::GrantAccess { store, access, .. } => self.store(&store, |s| {
                let rights = &mut s.status.as_mut().unwrap().rights;
                rights.retain(|r| r.workflow != access.workflow);
                rights.push(*access);
            }),
            Step::WithdrawAccess { store, .. } => self.store(&store, |s| {
                let rights = &mut s.status.as_mut().unwrap().rights;
                rights.retain(|r| r.workflow != "consumers");
            }),
            Step::CreateKeys { epochs } => {
                assert!(self.seen.keys.is_none(), "never in the place of others");
                assert!(self.ledger.empty, "requests were sealed with other keys");
                self.seen.keys = Some(keys::Seen {
                    hash: true,
                    epochs,
                    damaged: BTreeSet::new(),
                    version: uid.clone(),
                });
                self.seen.secrets.insert(keys_secret, uid);
            }
            Step::AddEpochs { epochs, version } => {
                let keys = self.seen.keys.as_mut().unwrap();
                assert_eq!(keys.version, version);
                assert!(epochs.is_disjoint(&keys.epochs), "never written over");
                keys.epochs.extend(epochs);
                keys.version = uid;
            }
            Step::DestroyEpochs { epochs, version } => {
                let keys = self.seen.keys.as_mut().unwrap();
                assert_eq!(keys.version, version);
                assert!(
                    epochs.is_disjoint(&self.ledger.epochs),
                    "an open request needs it"
                );
                keys.epochs.retain(|day| !epochs.contains(day));
                keys.version = uid;
            }
            Step::IssueCertificate(wanted) => {
                let signers = &self.seen.authorities[&wanted.store].known;
                let facts = Facts {
                    not_before: self.now,
                    not_after: self.now + SignedDuration::from_hours(24 * 90),
                    bundle: signers.bundle.clone(),
                    signer: Some(signers.active.id.clone()),
                    names: wanted.names.clone(),
                };
                self.seen.certificates.insert(wanted.secret.clone(), facts);
                self.seen.secrets.insert(wanted.secret, uid);
            }
            Step::Entrust(wanted) => {
                let bundle = self.seen.authorities[&wanted.store].known.bundle.clone();
                self.seen
                    .certificates
                    .get_mut(&wanted.secret)
                    .unwrap()
                    .bundle = bundle;
            }
            Step::Create(kind, mut value) => {
                value["metadata"]["uid"] = json!(uid);
                let object: kube::api::DynamicObject = serde_json::from_value(*value).unwrap();
                if kind == ChildKind::Deployment {
                    self.mounted(&object);
                }
                let key = (kind, object.name_any());
                assert!(!self.seen.children.contains_key(&key));
                self.seen.children.insert(key, object);
            }
            Step::Update(kind, object) => {
                let found = self
                    .seen
                    .children
                    .get_mut(&(kind, object.name_any()))
                    .unwrap();
                let replicas = found.data["spec"]["replicas"].clone();
                *found = *object;
                if kind == ChildKind::Deployment && found.data["spec"]["replicas"].is_null() {
                    // As a merge leaves it.
                    found.data["spec"]["replicas"] = replicas;
                }
            }
            Step::Fence { name, uid } => {
                assert!(!uid.is_empty(), "what is fenced carries the uid");
                self.seen.pods.retain(|p| p.name_any() != name);
            }
            Step::Delete { object, name, uid } => {
                assert!(!uid.is_empty(), "a delete carries the uid");
                match object {
                    Object::Secret => {
                        assert_ne!(name, keys_secret, "keys are never deleted");
                        self.seen.secrets.remove(&name);
                        self.seen.certificates.remove(&name);
                    }
                    Object::Child(kind) => {
                        self.seen.children.remove(&(kind, name));
                    }
                }
            }
            Step::BindGateway => {
                self.seen.binding = Some(Binding {
                    uid,
                    right: true,
                    ours: true,
                });
            }
            Step::UnbindGateway { .. } => self.seen.binding = None,
            Step::Tell { note, .. } => self.told.push(note),
        }
    }

    /// What pods need must be there before their Deployment is.
    fn mounted(&self, deployment: &kube::api::DynamicObject) {
        let pod = &deployment.data["spec"]["template"]["spec"];
        for volume in pod["volumes"].as_array().unwrap() {
            if let Some(secret) = volume["secret"]["secretName"].as_str() {
                assert!(
                    self.seen.secrets.contains_key(secret),
                    "{secret} before pods"
                );
            }
            if let Some(config) = volume["configMap"]["name"].as_str() {
                let key = (ChildKind::ConfigMap, config.to_owned());
                assert!(
                    self.seen.children.contains_key(&key),
                    "{config} before pods"
                );
            }
        }
        let account = pod["serviceAccountName"].as_str().unwrap().to_owned();
        let key = (ChildKind::ServiceAccount, account);
        assert!(self.seen.children.contains_key(&key), "account before pods");
    }

    /// Deployments and the scheduler do their part, where a node with the labels asked for is. The ledger answers once a
    /// store was told of it.
    pub(super) fn run(&mut self) {
        let deployments: Vec<_> = self
            .seen
            .children
            .iter()
            .filter(|((kind, _), _)| *kind == ChildKind::Deployment)
            .map(|((_, name), d)| (name.clone(), d.data.clone()))
            .collect();
        let mut wanted: BTreeMap<String, Pod> = BTreeMap::new();
        for (name, data) in deployments {
            for n in 0..data["spec"]["replicas"].as_i64().unwrap() {
                let mut pod: Pod = serde_json::from_value(json!({
                    "metadata": data["spec"]["template"]["metadata"], "spec": data["spec"]["template"]["spec"],
                }))
                .unwrap();
                let name = format!("{name}-{n}");
                pod.metadata.name = Some(name.clone());
                wanted.insert(name, pod);
            }
        }
        self.seen
            .pods
            .retain(|p| wanted.contains_key(&p.name_any()));
        for (name, mut pod) in wanted {
            if self.seen.pods.iter().any(|p| p.name_any() == name) {
                continue;
            }
            pod.metadata.uid = Some(self.uid());
            if let Some(node) = self.seen.nodes.iter().find(|n| fits(&pod, n)) {
                pod.spec.as_mut().unwrap().node_name = Some(node.name.clone());
                pod.status = Some(PodStatus {
                    conditions: Some(vec![PodCondition {
                        type_: "Ready".into(),
                        status: "True".into(),
                        ..PodCondition::default()
                    }]),
                    ..PodStatus::default()
                });
            }
            self.seen.pods.push(pod);
        }
        let prepared = self.seen.stores.get("main").is_some_and(|s| {
            let rights = s.status.as_ref().map(|s| s.rights.clone());
            rights.unwrap_or_default().iter().any(|r| r.ledger)
        });
        let last = self.seen.reading.tally().cloned();
        self.seen.reading = if self.answers && prepared {
            Reading::Known(self.ledger.clone())
        } else if last.is_some() {
            Reading::Failed { why: "away", last }
        } else {
            Reading::Never
        };
    }

    pub(super) fn say(&mut self, plan: &Plan) {
        let new = report::status(&self.seen.workflow, &plan.draft, self.now);
        self.workflow(|w| w.status = Some(new));
    }

    /// Passes until nothing is left to do.
    pub(super) fn settle(&mut self) {
        for _ in 0..50 {
            let plan = self.plan();
            for step in &plan.steps {
                self.execute(step);
            }
            self.run();
            self.say(&plan);
            if plan.steps.is_empty() && self.plan().steps.is_empty() {
                let last = self.plan();
                self.say(&last);
                return;
            }
        }
        panic!("no end: {:?}", self.steps());
    }

    pub(super) fn steps(&self) -> Vec<String> {
        self.plan().steps.iter().map(ToString::to_string).collect()
    }

    pub(super) fn condition(&self, kind: &str) -> (String, String, String) {
        let status = self.seen.workflow.status.clone().unwrap();
        let all = status.conditions.into_iter();
        let c = all.into_iter().find(|c| c.type_ == kind).unwrap();
        (c.status, c.reason, c.message)
    }

    /// Everything there is, without uids and times.
    pub(super) fn digest(&self) -> Vec<String> {
        let seen = &self.seen;
        let mut all: Vec<String> = seen.children.keys().map(|k| format!("{k:?}")).collect();
        all.extend(seen.secrets.keys().map(|s| format!("secret {s}")));
        all.extend(seen.pods.iter().map(|p| format!("pod {}", p.name_any())));
        let stores = seen.stores.values().filter_map(|s| s.status.as_ref());
        all.extend(stores.map(|s| format!("{:?}", s.rights)));
        all.extend(seen.keys.iter().map(|k| format!("{:?}", k.epochs)));
        all.extend(seen.binding.iter().map(|b| format!("bound {}", b.right)));
        all.sort();
        all
    }

    pub(super) fn pods(&self) -> Vec<(String, Option<String>)> {
        let place = |p: &Pod| {
            (
                p.name_any(),
                p.spec.as_ref().and_then(|s| s.node_name.clone()),
            )
        };
        self.seen.pods.iter().map(place).collect()
    }

    pub(super) fn deleted(&mut self) {
        let now = k8s_openapi::apimachinery::pkg::apis::meta::v1::Time(self.now);
        self.workflow(|w| w.metadata.deletion_timestamp = Some(now));
    }

    pub(super) fn has_gateways(&self) -> bool {
        let component = |p: &Pod| p.labels().get(labels::COMPONENT).cloned();
        self.seen
            .pods
            .iter()
            .any(|p| component(p).as_deref() == Some(GATEWAY))
    }
}

/// Whether the pod's required affinity is met by a node.
fn fits(pod: &Pod, node: &NodeFacts) -> bool {
    let affinity = pod.spec.as_ref().and_then(|s| s.affinity.as_ref());
    let required = affinity
        .and_then(|a| a.node_affinity.as_ref())
        .and_then(|a| {
            a.required_during_scheduling_ignored_during_execution
                .as_ref()
        });
    required.unwrap().node_selector_terms.iter().any(|term| {
        let all = term.match_expressions.as_ref().unwrap();
        all.iter().all(|e| {
            let value = node.labels.get(&e.key);
            value.is_some_and(|v| e.values.as_ref().unwrap().contains(v))
        })
    })
}
