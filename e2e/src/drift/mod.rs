//! Drifts: changes to a running cluster as data, and whether the operator finds what is outside then, and only that.
//!
//! Owns the form of the files in `corpus/drift/`, and how a case is judged. Every case has Regions, nodes, a policy and a store of its own, so that several run at once.
//! Never decides what is right: that is in the files.

pub mod churn;
mod scene;

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use kube::Client;
use kube::api::DynamicObject;
use serde::Deserialize;
use serde_json::Value;
use tokio::time::{Instant, sleep};

use crate::corpus::filled;
use crate::harness::condition;
use scene::{PATIENCE, STORE, Scene};

/// Nothing is to happen for so long: twice what the operator gives a copy that is outside, and a pass.
const WATCHED: Duration = Duration::from_secs(5);

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
