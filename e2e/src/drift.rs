//! Drifts: changes to a running cluster as data, and whether the operator finds what is outside then, and only that.
//!
//! Owns the form of the files in `corpus/drift/`, the instances that are played (a fake node runs none), and how a case
//! is judged. Every case has Regions, nodes, a policy and a store of its own, so that several run at once.
//! Never decides what is right: that is in the files.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use k8s_openapi::api::core::v1::{Namespace, Node, Pod};
use kube::api::{DeleteParams, DynamicObject, ListParams, Patch, PatchParams};
use kube::core::{ApiResource, GroupVersionKind};
use kube::{Api, Client, ResourceExt};
use serde::Deserialize;
use serde_json::{Value, json};
use tokio::time::{Instant, sleep, timeout};

use crate::corpus::{self, Trial, fill, filled};
use crate::harness::{condition, wait_for};

/// How long anything may take before it counts as never: on a busy machine, not a goal.
const PATIENCE: Duration = Duration::from_secs(60);
/// Nothing is to happen for so long: twice what the operator gives a copy that is outside, and a pass.
const WATCHED: Duration = Duration::from_secs(5);
/// Between two looks at what instances are to say.
const TURN: Duration = Duration::from_millis(150);
/// The store's name in every case.
const STORE: &str = "s";

/// A file: cases of one channel.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Group {
    channel: String,
    #[serde(rename = "about")]
    _about: String,
    cases: Vec<Case>,
}

#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Case {
    name: String,
    #[serde(rename = "do")]
    changes: Vec<Change>,
    #[serde(default)]
    with: Vec<BTreeMap<String, String>>,
    #[serde(default)]
    outside: Vec<String>,
    #[serde(default)]
    may_stop: Vec<String>,
    words: Option<String>,
    unknown: Option<String>,
}

#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Change {
    create: Option<Value>,
    patch: Option<String>,
    #[serde(default)]
    change: Value,
    delete: Option<String>,
}

/// One case, with the values that it was written for.
#[derive(Clone, Debug)]
pub struct Drift {
    /// Channel and name.
    pub name: String,
    case: Case,
    values: BTreeMap<String, String>,
}

impl Drift {
    /// Whether something gets outside by it.
    #[must_use]
    pub fn violates(&self) -> bool {
        self.case.words.is_some()
    }
}

/// What came of a case.
#[derive(Clone, Debug, PartialEq)]
pub enum Outcome {
    /// Nothing was to be stopped, and nothing was.
    Quiet,
    /// Found after so many seconds, and stopped so many seconds later.
    Stopped {
        /// From the change to the condition.
        found: f64,
        /// From there to the end of the last pod.
        fenced: f64,
    },
    /// Something outside wasn't found, or not stopped, or not for the reason given.
    Missed(String),
    /// Something was stopped, or called outside, that is lawful.
    FalseAlarm(String),
}

/// All cases of the files in a folder (those that begin with '_' set the scene and are none), in the files' order.
///
/// # Errors
/// If a file isn't understood: which, and where.
pub fn read(folder: &Path) -> Result<Vec<Drift>> {
    let mut files: Vec<_> = std::fs::read_dir(folder)
        .with_context(|| format!("reading {}", folder.display()))?
        .collect::<std::io::Result<_>>()?;
    files.sort_by_key(std::fs::DirEntry::file_name);
    let mut drifts: Vec<Drift> = Vec::new();
    for file in files {
        let name = file.file_name().to_string_lossy().into_owned();
        if name.starts_with('_') || !name.ends_with(".yaml") {
            continue;
        }
        let text = std::fs::read_to_string(file.path())?;
        let group: Group = serde_yaml::from_str(&text).with_context(|| name.clone())?;
        for case in group.cases {
            ensure!(
                case.words.is_some() || case.outside.is_empty(),
                "{name}: {}: give words with outside",
                case.name
            );
            let none = vec![BTreeMap::new()];
            let all = if case.with.is_empty() {
                &none
            } else {
                &case.with
            };
            for values in all {
                let title = filled(&case.name, values)?;
                let drift = Drift {
                    name: format!("{}: {title}", group.channel),
                    case: case.clone(),
                    values: values.clone(),
                };
                ensure!(
                    drifts.iter().all(|d| d.name != drift.name),
                    "twice: {}",
                    drift.name
                );
                drifts.push(drift);
            }
        }
    }
    Ok(drifts)
}

/// A case's own part of the cluster.
struct Scene<'a> {
    client: &'a Client,
    prefix: String,
}

fn kind(name: &str) -> ApiResource {
    ApiResource::from_gvk(&GroupVersionKind::gvk("domicile.dev", "v1alpha1", name))
}

/// The roles in which a case speaks of instances.
const ROLES: [&str; 3] = ["PRIMARY", "STANDBY", "FAR"];

/// Makes the scene, does what the case says, and judges what comes of it.
///
/// # Errors
/// If the scene can't be made, or a change isn't taken.
pub async fn run(client: &Client, world: &str, number: usize, drift: &Drift) -> Result<Outcome> {
    let scene = Scene {
        client,
        prefix: format!("d{number}"),
    };
    let outcome = async {
        scene.make(world).await.context("the scene")?;
        let played = scene.play();
        tokio::pin!(played);
        tokio::select! {
            outcome = scene.judge(drift) => outcome,
            broken = &mut played => broken.and_then(|()| anyhow::bail!("the instances went")),
        }
    }
    .await;
    scene.clear().await.context("clearing the scene")?;
    outcome.with_context(|| drift.name.clone())
}

impl Scene<'_> {
    fn stores(&self) -> Api<DynamicObject> {
        Api::namespaced_with(self.client.clone(), &self.prefix, &kind("PrivacyDataStore"))
    }

    fn pods(&self) -> Api<Pod> {
        Api::namespaced(self.client.clone(), &self.prefix)
    }

    fn nodes(&self) -> [(String, &'static str, String); 5] {
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

    async fn make(&self, world: &str) -> Result<()> {
        let n = &self.prefix;
        let values = BTreeMap::from([("N".to_owned(), n.clone())]);
        for (name, region, zone) in self.nodes() {
            let labels = json!({
                "topology.kubernetes.io/region": format!("{n}-{region}-1"), "topology.kubernetes.io/zone": zone,
                "kubernetes.io/hostname": name, "kubernetes.io/os": "linux", "kubernetes.io/arch": "amd64", "type": "kwok",
            });
            let resources = json!({ "cpu": "16", "memory": "64Gi", "pods": "110" });
            self.send(&Change::made(json!({
                "apiVersion": "v1", "kind": "Node",
                "metadata": { "name": name, "labels": labels, "annotations": { "kwok.x-k8s.io/node": "fake" } },
                "spec": { "providerID": format!("bed://{n}/{name}") },
                "status": { "allocatable": resources, "capacity": resources },
            })), &values)
            .await?;
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
    async fn play(&self) -> Result<()> {
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

    async fn until(&self, wanted: impl Fn(&DynamicObject) -> bool) -> Result<DynamicObject> {
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

    async fn judge(&self, drift: &Drift) -> Result<Outcome> {
        let is = |s: &DynamicObject, kind: &str, status: &str| {
            condition(s, kind).is_some_and(|c| c.0 == status)
        };
        let store = self
            .until(|s| is(s, "Ready", "True") && is(s, "Resident", "True"))
            .await
            .context("it never was ready")?;
        let before = self.uids().await?;
        let values = self.values(drift, &store)?;
        let case = &drift.case;
        let words =
            |words: &Option<String>| words.as_deref().map(|w| filled(w, &values)).transpose();
        let (words, unknown) = (words(&case.words)?, words(&case.unknown)?);
        let names = |all: &[String]| -> Result<BTreeSet<String>> {
            all.iter().map(|o| filled(o, &values)).collect()
        };
        let (outside, may_stop) = (names(&case.outside)?, names(&case.may_stop)?);
        for change in &case.changes {
            self.send(change, &values).await?;
        }
        let begin = Instant::now();
        let Some(words) = words else {
            if let Some(words) = &unknown {
                let said = |s: &DynamicObject| {
                    condition(s, "Resident")
                        .is_some_and(|c| c.0 == "Unknown" && c.2.contains(words.as_str()))
                };
                if let Err(e) = self.until(said).await {
                    return Ok(Outcome::Missed(format!("{words:?} was not said: {e:#}")));
                }
            }
            sleep(WATCHED).await;
            let store = self.stores().get(STORE).await?;
            let resident = condition(&store, "Resident").context("no condition Resident")?;
            let after = self.uids().await?;
            if after != before {
                return Ok(Outcome::FalseAlarm(format!(
                    "{before:?} became {after:?}; {resident:?}"
                )));
            }
            let as_it_should = match &unknown {
                Some(words) => resident.0 == "Unknown" && resident.2.contains(words.as_str()),
                None => resident.0 == "True",
            };
            return Ok(if as_it_should {
                Outcome::Quiet
            } else {
                Outcome::FalseAlarm(format!("{resident:?}"))
            });
        };
        let said = |s: &DynamicObject| {
            condition(s, "Resident").is_some_and(|c| c.0 == "False" && c.2.contains(&words))
        };
        if let Err(e) = self.until(said).await {
            return Ok(Outcome::Missed(format!("{words:?} was not said: {e:#}")));
        }
        let found = begin.elapsed();
        let mut left = outside.clone();
        while begin.elapsed() < found + PATIENCE && !left.is_empty() {
            let now = self.uids().await?;
            left.retain(|name| now.get(name) == before.get(name));
            sleep(Duration::from_millis(50)).await;
        }
        if !left.is_empty() {
            return Ok(Outcome::Missed(format!("not stopped: {left:?}")));
        }
        // Where nobody has to be stopped: the primary has handed over, and is within as a standby.
        if outside.is_empty()
            && let Err(e) = self.until(|s| is(s, "Resident", "True")).await
        {
            return Ok(Outcome::Missed(format!("it stays outside: {e:#}")));
        }
        let fenced = begin.elapsed().saturating_sub(found);
        sleep(Duration::from_secs(1)).await;
        let now = self.uids().await?;
        let others = before
            .iter()
            .filter(|(name, _)| !outside.contains(*name) && !may_stop.contains(*name));
        let hurt: Vec<&String> = others
            .filter(|(name, uid)| now.get(*name) != Some(*uid))
            .map(|(name, _)| name)
            .collect();
        Ok(if hurt.is_empty() {
            Outcome::Stopped {
                found: found.as_secs_f64(),
                fenced: fenced.as_secs_f64(),
            }
        } else {
            Outcome::FalseAlarm(format!("stopped as well: {hurt:?}"))
        })
    }

    /// The uids of instances' pods that aren't told to go.
    async fn uids(&self) -> Result<BTreeMap<String, String>> {
        let pods = self.pods().list(&ListParams::default()).await?;
        Ok(pods
            .iter()
            .filter(|p| p.metadata.deletion_timestamp.is_none() && p.name_any().starts_with("s-"))
            .map(|p| (p.name_any(), p.uid().unwrap_or_default()))
            .collect())
    }

    /// What `$NAME` stands for.
    fn values(&self, drift: &Drift, store: &DynamicObject) -> Result<BTreeMap<String, String>> {
        let status = &store.data["status"];
        let primary = status["primary"].as_str().context("no primary")?;
        let all: Vec<&Value> = status["instances"]
            .as_array()
            .into_iter()
            .flatten()
            .collect();
        let text = |v: &Value, key: &str| v[key].as_str().unwrap_or_default().to_owned();
        let east = format!("{}-east", self.prefix);
        let one = |wanted: &dyn Fn(&Value) -> bool| {
            let found = all
                .iter()
                .find(|v| wanted(v))
                .context("an instance is missing")?;
            anyhow::Ok((text(found, "name"), text(found, "node")))
        };
        let found = [
            one(&|v| v["name"] == primary)?,
            one(&|v| v["name"] != primary && v["region"] != east.as_str())?,
            one(&|v| v["region"] == east.as_str())?,
        ];
        let mut values = BTreeMap::from([("N".to_owned(), self.prefix.clone())]);
        let spare = self.nodes().into_iter().find(|(name, region, _)| {
            *region == "west" && found.iter().all(|(_, node)| node != name)
        });
        values.insert("SPARE".to_owned(), spare.context("no spare node")?.0);
        let mut roles: Vec<(&str, usize)> = ROLES.iter().copied().zip(0..).collect();
        for (key, value) in &drift.values {
            match ROLES.iter().position(|r| r == value) {
                Some(at) => roles.push((key, at)),
                None => drop(values.insert(key.clone(), value.clone())),
            }
        }
        for (key, at) in roles {
            let (name, node) = &found[at];
            values.insert(key.to_owned(), name.clone());
            values.insert(format!("{key}_NODE"), node.clone());
        }
        Ok(values)
    }

    async fn send(&self, change: &Change, values: &BTreeMap<String, String>) -> Result<()> {
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
    async fn clear(&self) -> Result<()> {
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

#[cfg(test)]
mod tests {
    use super::*;

    /// The goal of the project, and a guard against a file that isn't read any more.
    #[test]
    fn there_are_enough_of_both() {
        let drifts = read(&Path::new(env!("CARGO_MANIFEST_DIR")).join("../corpus/drift")).unwrap();
        let outside = drifts.iter().filter(|d| d.violates()).count();
        let lawful = drifts.len() - outside;
        assert!(
            outside >= 60 && lawful >= 50,
            "{outside} get outside, {lawful} don't"
        );
    }
}
