//! A part of the cluster that is a case's own: nodes, Regions, a policy, a store, and its instances, which are played.
//!
//! Owns what is made and taken away, and what a played instance says (a fake node runs none).
//! Never judges anything.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use k8s_openapi::api::core::v1::{Namespace, Node, Pod};
use kube::api::{DeleteParams, DynamicObject, ListParams, Patch, PatchParams};
use kube::core::{ApiResource, GroupVersionKind};
use kube::{Api, Client, ResourceExt};
use serde_json::{Value, json};
use tokio::time::{sleep, timeout};

use super::Change;
use crate::corpus::{self, Trial, fill, filled};
use crate::harness::wait_for;

/// How long anything may take before it counts as never: on a busy machine, not a goal.
pub const PATIENCE: Duration = Duration::from_secs(60);
/// Between two looks at what instances are to say.
const TURN: Duration = Duration::from_millis(150);
/// The store's name.
pub const STORE: &str = "s";

/// A case's own part of the cluster.
pub struct Scene<'a> {
    /// The administrator's.
    pub client: &'a Client,
    /// What its names begin with; its namespace and its policy are called so.
    pub prefix: String,
}

/// A kind of ours.
pub fn kind(name: &str) -> ApiResource {
    ApiResource::from_gvk(&GroupVersionKind::gvk("domicile.dev", "v1alpha1", name))
}

impl Scene<'_> {
    pub(super) fn stores(&self) -> Api<DynamicObject> {
        Api::namespaced_with(self.client.clone(), &self.prefix, &kind("PrivacyDataStore"))
    }

    pub(super) fn pods(&self) -> Api<Pod> {
        Api::namespaced(self.client.clone(), &self.prefix)
    }

    pub(super) fn nodes(&self) -> [(String, &'static str, String); 5] {
        let n = &self.prefix;
        [
            ("w1", "west", "a"),
            ("w2", "west", "b"),
            ("w3", "west", "c"),
            ("e1", "east", "a"),
            ("x1", "abroad", "a"),
        ]
        .map(|(name, region, zone)| {
            (
                format!("{n}-{name}"),
                region,
                format!("{n}-{region}-{zone}"),
            )
        })
    }

    pub(super) async fn make(&self, world: &str) -> Result<()> {
        let n = &self.prefix;
        let values = BTreeMap::from([("N".to_owned(), n.clone())]);
        for (name, region, zone) in self.nodes() {
            self.node(&name, region, &zone).await?;
        }
        let objects: Vec<Value> = serde_yaml::from_multiple(world).context("_world.yaml")?;
        for object in objects {
            if object["kind"] == "PrivacyDataStore" {
                // Placed by what is known of the nodes: two on one node would be another scene.
                self.surveyed().await?;
            }
            self.send(&Change::made(object), &values).await?;
        }
        Ok(())
    }

    /// A node in one of the scene's regions.
    pub(super) async fn node(&self, name: &str, region: &str, zone: &str) -> Result<()> {
        let n = &self.prefix;
        let labels = json!({
            "topology.kubernetes.io/region": format!("{n}-{region}-1"), "topology.kubernetes.io/zone": zone,
            "kubernetes.io/hostname": name, "kubernetes.io/os": "linux", "kubernetes.io/arch": "amd64", "type": "kwok",
        });
        let resources = json!({ "cpu": "16", "memory": "64Gi", "pods": "110" });
        let node = json!({
            "apiVersion": "v1", "kind": "Node",
            "metadata": { "name": name, "labels": labels, "annotations": { "kwok.x-k8s.io/node": "fake" } },
            "spec": { "providerID": format!("bed://{n}/{name}") },
            "status": { "allocatable": resources, "capacity": resources },
        });
        self.send(&Change::made(node), &BTreeMap::new()).await
    }

    /// Waits until the operator knows all nodes, and the scheduler may use them.
    async fn surveyed(&self) -> Result<()> {
        let nodes: Api<Node> = Api::all(self.client.clone());
        for (name, _, _) in self.nodes() {
            let free = |n: &Node| {
                let taints = n.spec.iter().flat_map(|s| &s.taints).flatten().next();
                let ready = n.status.iter().flat_map(|s| &s.conditions).flatten();
                taints.is_none()
                    && ready
                        .into_iter()
                        .any(|c| c.type_ == "Ready" && c.status == "True")
            };
            let free = timeout(PATIENCE, wait_for(nodes.clone(), &name, free)).await;
            free.with_context(|| format!("{name} never was ready without a taint"))??;
        }
        for (region, nodes) in [("west", 3), ("east", 1), ("abroad", 1)] {
            let name = format!("{}-{region}", self.prefix);
            let regions: Api<DynamicObject> = Api::all_with(self.client.clone(), &kind("Region"));
            let known = wait_for(regions, &name, |r: &DynamicObject| {
                r.data["status"]["nodes"] == nodes
            });
            let known = timeout(PATIENCE, known).await;
            known.with_context(|| format!("{name} never had {nodes} node(s)"))??;
        }
        Ok(())
    }

    /// Says of each instance whose pod runs what it would say itself, and lets them decide who is primary.
    pub(super) async fn play(&self) -> Result<()> {
        loop {
            sleep(TURN).await;
            let Some(store) = self.stores().get_opt(STORE).await? else {
                continue;
            };
            let status = &store.data["status"];
            let pods = self.pods().list(&ListParams::default()).await?;
            let up: BTreeSet<String> = pods
                .iter()
                .filter(|p| p.metadata.deletion_timestamp.is_none() && ready(p))
                .map(ResourceExt::name_any)
                .filter(|name| name.starts_with("s-"))
                .collect();
            for (name, said) in decide(status, &up) {
                let params = PatchParams::apply(&format!("domicile-instance/{name}")).force();
                let patch = json!({ "apiVersion": "domicile.dev/v1alpha1", "kind": "PrivacyDataStore", "status": said });
                // A store that is going, or a name that isn't there any more, is the next look's business.
                let _ = self
                    .stores()
                    .patch_status(STORE, &params, &Patch::Apply(patch))
                    .await;
            }
        }
    }

    pub(super) async fn until(
        &self,
        wanted: impl Fn(&DynamicObject) -> bool,
    ) -> Result<DynamicObject> {
        let mut last = Value::Null;
        let found = timeout(
            PATIENCE,
            wait_for(self.stores(), STORE, |s: &DynamicObject| {
                last = s.data["status"].clone();
                wanted(s)
            }),
        )
        .await;
        found.map_err(|_| anyhow::anyhow!("after {PATIENCE:?}: {last}"))?
    }

    /// The uids of instances' pods that aren't told to go.
    pub(super) async fn uids(&self) -> Result<BTreeMap<String, String>> {
        let pods = self.pods().list(&ListParams::default()).await?;
        Ok(pods
            .iter()
            .filter(|p| p.metadata.deletion_timestamp.is_none() && p.name_any().starts_with("s-"))
            .map(|p| (p.name_any(), p.uid().unwrap_or_default()))
            .collect())
    }

    pub(super) async fn send(
        &self,
        change: &Change,
        values: &BTreeMap<String, String>,
    ) -> Result<()> {
        let (method, path, mut body) = match (&change.create, &change.patch, &change.delete) {
            (Some(object), None, None) => {
                let mut object = object.clone();
                fill(&mut object, values)?;
                ("POST", corpus::collection(&object)?, object)
            }
            (None, Some(path), None) => ("PATCH", filled(path, values)?, change.change.clone()),
            (None, None, Some(path)) => ("DELETE", filled(path, values)?, Value::Null),
            _ => anyhow::bail!("give exactly one of create, patch, delete"),
        };
        fill(&mut body, values)?;
        let trial = Trial::new(&path, method, path.clone(), body);
        let (code, message, _) = corpus::send(self.client, &trial, false).await?;
        ensure!(
            (200..300).contains(&code),
            "{method} {path}: {code} {message}"
        );
        Ok(())
    }

    /// Takes everything away; nobody waits for it.
    pub(super) async fn clear(&self) -> Result<()> {
        let gone = DeleteParams::background();
        let all = |name: &str| Api::<DynamicObject>::all_with(self.client.clone(), &kind(name));
        let namespaces: Api<Namespace> = Api::all(self.client.clone());
        let nodes: Api<Node> = Api::all(self.client.clone());
        let mine =
            |name: &str| name == self.prefix || name.starts_with(&format!("{}-", self.prefix));
        drop(namespaces.delete(&self.prefix, &gone).await);
        for name in ["ResidencyPolicy", "Region"] {
            for object in all(name).list(&ListParams::default()).await? {
                if mine(&object.name_any()) {
                    drop(all(name).delete(&object.name_any(), &gone).await);
                }
            }
        }
        for node in nodes.list_metadata(&ListParams::default()).await? {
            if mine(&node.name_any()) {
                drop(nodes.delete(&node.name_any(), &gone).await);
            }
        }
        Ok(())
    }
}

impl Change {
    fn made(object: Value) -> Self {
        Self {
            create: Some(object),
            patch: None,
            change: Value::Null,
            delete: None,
        }
    }
}

fn ready(pod: &Pod) -> bool {
    let status = pod.status.as_ref();
    let mut conditions = status
        .into_iter()
        .flat_map(|s| s.conditions.iter().flatten());
    conditions.any(|c| c.type_ == "Ready" && c.status == "True")
}

/// What each instance is to say that it hasn't said: the primary stays while it is up and nobody takes it out; else one
/// that may be is, in the next term.
fn decide(status: &Value, up: &BTreeSet<String>) -> Vec<(String, Value)> {
    let entries: Vec<&Value> = status["instances"]
        .as_array()
        .into_iter()
        .flatten()
        .collect();
    let entry = |name: &str| entries.iter().find(|e| e["name"] == name).copied();
    let Some(old) = status["primary"].as_str() else {
        return Vec::new();
    };
    let term = status["term"].as_i64().unwrap_or_default().max(2);
    let stays = |name: &str| entry(name).is_none_or(|e| e["leaving"] != true);
    let voters: BTreeSet<&String> = entries
        .iter()
        .filter_map(|e| e["name"].as_str())
        .filter(|n| stays(n))
        .filter_map(|n| up.get(n))
        .collect();
    let successor = voters.iter().find(|n| {
        entry(n).is_some_and(|e| e["mayBePrimary"] == true && e["systemIdentifier"].is_string())
    });
    let (primary, term) = match successor {
        Some(next) if !voters.iter().any(|v| *v == old) => (next.as_str(), term + 1),
        _ if up.contains(old) => (old, term),
        _ => return Vec::new(),
    };
    let ids: Vec<String> = voters.iter().map(|v| format!("{v}/v")).collect();
    let mut said = Vec::new();
    for name in up {
        let is_primary = name == primary;
        let mut own = json!({
            "name": name, "id": "v", "role": if is_primary { "Primary" } else { "Standby" }, "ready": true, "term": term,
            "systemIdentifier": "7", "voter": voters.contains(name),
        });
        if is_primary {
            own["durable"] = json!(true);
        }
        let mut all = json!({ "instances": [own] });
        if is_primary {
            all["configuration"] = json!({
                "term": term, "version": 1, "primary": format!("{name}/v"), "voters": ids, "syncMembers": [], "acks": 1,
                "mayBePrimary": [],
            });
        }
        let known = entry(name).cloned().unwrap_or_default();
        let own = &all["instances"][0];
        let same = own
            .as_object()
            .is_some_and(|o| o.iter().all(|(k, v)| known[k] == *v))
            && (is_primary || known["durable"].is_null());
        let agreed = &all["configuration"];
        let told = agreed.is_null()
            || (status["configuration"]["term"] == agreed["term"]
                && status["configuration"]["voters"] == agreed["voters"]);
        if !(same && told) {
            said.push((name.clone(), all));
        }
    }
    said
}
