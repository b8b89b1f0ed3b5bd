//! The corpus of what must be refused and what must not: requests as data, run against a real API server.
//!
//! Owns the form of the files in `corpus/`, and how a case becomes one request. Every request is a dry run: the API
//! server decides as ever, and nothing is kept, so that no case depends on another.
//! Never decides what is right: that is in the files.

use std::collections::BTreeMap;
use std::path::Path;

use anyhow::{Context, Result, bail, ensure};
use kube::Client;
use kube::client::Body;
use serde::Deserialize;
use serde_json::{Map, Value, json};

/// A file: cases of one channel.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Group {
    /// Through what something could get outside.
    pub channel: String,
    /// What the cases have in common.
    pub about: String,
    /// Objects from which cases are made, by name.
    #[serde(default)]
    pub bases: BTreeMap<String, Value>,
    /// The cases.
    pub cases: Vec<Case>,
}

/// One request, or one for each of several values.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Case {
    /// What is tried.
    pub name: String,
    /// Create the object made from this base.
    pub create: Option<String>,
    /// Bind a pod with the Binding made from this base.
    pub bind: Option<String>,
    /// The same by the old address `bindings`.
    #[serde(rename = "bindings")]
    pub bind_old: Option<String>,
    /// Change what is at this path, by the merge patch in `change`.
    pub patch: Option<String>,
    /// Delete what is at this path.
    pub delete: Option<String>,
    /// A merge patch (RFC 7386) to the base, or for `patch`.
    #[serde(default)]
    pub change: Value,
    /// Operations (RFC 6902) on the base, after `change`.
    #[serde(default)]
    pub edit: Value,
    /// Who asks; without it, the administrator.
    #[serde(rename = "as")]
    pub asks: Option<Asks>,
    /// Values for `$NAME` in all of the above: one request for each.
    #[serde(default)]
    pub with: Vec<BTreeMap<String, String>>,
    /// Words of the refusal. Without them the request is lawful.
    pub refused: Option<String>,
    /// Words of the warning that a lawful request brings.
    pub warned: Option<String>,
}

/// Somebody who asks.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Asks {
    /// The user.
    pub user: String,
    /// The user's groups.
    #[serde(default)]
    pub groups: Vec<String>,
}

/// One request, ready to be sent.
#[derive(Clone, Debug)]
pub struct Trial {
    /// Channel and name.
    pub name: String,
    method: &'static str,
    path: String,
    /// What is sent; null for a deletion.
    pub body: Value,
    asks: Option<Asks>,
    /// Words of the refusal; `None`: lawful.
    pub refused: Option<String>,
    warned: Option<String>,
}

/// What came of a trial.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// As it should.
    Right,
    /// It should have been refused and wasn't, or not for the reason given.
    Missed(String),
    /// It should have been let through.
    FalseAlarm(String),
}

/// All trials of the files in a folder (those that begin with '_' set the scene and are none), in the files' order.
///
/// # Errors
/// If a file isn't understood: which, and where.
pub fn read(folder: &Path) -> Result<Vec<Trial>> {
    let mut files: Vec<_> = std::fs::read_dir(folder)
        .with_context(|| format!("reading {}", folder.display()))?
        .collect::<std::io::Result<_>>()?;
    files.sort_by_key(std::fs::DirEntry::file_name);
    let mut trials = Vec::new();
    for file in files {
        let name = file.file_name().to_string_lossy().into_owned();
        if name.starts_with('_') || !name.ends_with(".yaml") {
            continue;
        }
        let text = std::fs::read_to_string(file.path())?;
        let group: Group = serde_yaml::from_str(&text).with_context(|| name.clone())?;
        for case in &group.cases {
            let all = case_trials(&group, case);
            trials.extend(all.with_context(|| format!("{name}: {}", case.name))?);
        }
    }
    Ok(trials)
}

fn case_trials(group: &Group, case: &Case) -> Result<Vec<Trial>> {
    let none = [BTreeMap::new()];
    let values: &[BTreeMap<String, String>] = if case.with.is_empty() {
        &none
    } else {
        &case.with
    };
    values.iter().map(|v| trial(group, case, v)).collect()
}

fn trial(group: &Group, case: &Case, values: &BTreeMap<String, String>) -> Result<Trial> {
    let base = |name: &str| {
        let mut body = group
            .bases
            .get(name)
            .with_context(|| format!("no base {name}"))?
            .clone();
        // A patch of null would leave null.
        if !case.change.is_null() {
            json_patch::merge(&mut body, &case.change);
        }
        if !case.edit.is_null() {
            let edit: json_patch::Patch = serde_json::from_value(case.edit.clone())
                .context("edit is no list of operations")?;
            json_patch::patch(&mut body, &edit).context("edit")?;
        }
        fill(&mut body, values)?;
        anyhow::Ok(body)
    };
    let text = |text: &str| filled(text, values);
    let (method, path, body) = match (
        &case.create,
        &case.bind,
        &case.bind_old,
        &case.patch,
        &case.delete,
    ) {
        (Some(name), None, None, None, None) => {
            let body = base(name)?;
            ("POST", collection(&body)?, body)
        }
        (None, Some(name), None, None, None) => {
            let body = base(name)?;
            let metadata = &body["metadata"];
            let (namespace, pod) = (metadata["namespace"].as_str(), metadata["name"].as_str());
            let (namespace, pod) = namespace.zip(pod).context("a Binding has both names")?;
            let path = format!("/api/v1/namespaces/{namespace}/pods/{pod}/binding");
            ("POST", path, body)
        }
        (None, None, Some(name), None, None) => {
            let body = base(name)?;
            ("POST", collection(&body)?, body)
        }
        (None, None, None, Some(path), None) => {
            let mut body = case.change.clone();
            fill(&mut body, values)?;
            ("PATCH", text(path)?, body)
        }
        (None, None, None, None, Some(path)) => ("DELETE", text(path)?, Value::Null),
        _ => bail!("give exactly one of create, bind, bindings, patch, delete"),
    };
    let words = |words: &Option<String>| words.as_deref().map(text).transpose();
    ensure!(
        case.refused.is_none() || case.warned.is_none(),
        "what is refused brings no warning"
    );
    Ok(Trial {
        name: format!("{}: {}", group.channel, text(&case.name)?),
        method,
        path,
        body,
        asks: match &case.asks {
            Some(asks) => Some(Asks {
                user: text(&asks.user)?,
                groups: asks.groups.clone(),
            }),
            None => None,
        },
        refused: words(&case.refused)?,
        warned: words(&case.warned)?,
    })
}

/// Puts values in place of `$NAME` in all strings.
///
/// # Errors
/// If one is missing.
pub fn fill(value: &mut Value, values: &BTreeMap<String, String>) -> Result<()> {
    match value {
        Value::String(text) => *text = filled(text, values)?,
        Value::Array(items) => {
            for item in items {
                fill(item, values)?;
            }
        }
        Value::Object(map) => {
            let mut new = Map::new();
            for (key, mut item) in std::mem::take(map) {
                fill(&mut item, values)?;
                new.insert(filled(&key, values)?, item);
            }
            *map = new;
        }
        _ => {}
    }
    Ok(())
}

/// Puts values in place of `$NAME`.
///
/// # Errors
/// If one is missing.
pub fn filled(text: &str, values: &BTreeMap<String, String>) -> Result<String> {
    let mut text = text.to_owned();
    // The longest first: $NODE is no beginning of $NODES.
    let mut keys: Vec<&String> = values.keys().collect();
    keys.sort_by_key(|k| std::cmp::Reverse(k.len()));
    for key in keys {
        text = text.replace(&format!("${key}"), &values[key]);
    }
    let left = text.split('$').nth(1);
    ensure!(
        left.is_none_or(|l| !l.starts_with(|c: char| c.is_ascii_uppercase())),
        "no value in `with` for all of: {text}"
    );
    Ok(text)
}

impl Trial {
    /// A request of an administrator.
    #[must_use]
    pub fn new(name: &str, method: &'static str, path: String, body: Value) -> Self {
        Self {
            name: name.to_owned(),
            method,
            path,
            body,
            asks: None,
            refused: None,
            warned: None,
        }
    }
}

/// Where objects of this kind are made.
///
/// # Errors
/// If it has no kind.
pub fn collection(object: &Value) -> Result<String> {
    let kind = object["kind"].as_str().context("no kind")?;
    let version = object["apiVersion"].as_str().context("no apiVersion")?;
    let root = if version == "v1" {
        "/api/v1".to_owned()
    } else {
        format!("/apis/{version}")
    };
    let plural = match kind {
        "ResidencyPolicy" => "residencypolicies".to_owned(),
        other => format!("{}s", other.to_lowercase()),
    };
    Ok(match object["metadata"]["namespace"].as_str() {
        Some(namespace) => format!("{root}/namespaces/{namespace}/{plural}"),
        None => format!("{root}/{plural}"),
    })
}

/// Sends a trial as a dry run, and judges the answer.
///
/// # Errors
/// If there is no answer.
pub async fn run(client: &Client, trial: &Trial) -> Result<Outcome> {
    let (code, message, warnings) = send(client, trial, true).await?;
    Ok(judge(trial, code, &message, &warnings))
}

/// Sends a trial: status code, message, warnings.
///
/// # Errors
/// If there is no answer.
pub async fn send(client: &Client, trial: &Trial, dry: bool) -> Result<(u16, String, String)> {
    let mut query = vec!["fieldManager=corpus"];
    if dry {
        query.push("dryRun=All");
    }
    if trial.method != "DELETE" {
        query.push("fieldValidation=Strict");
    }
    let mut request = http::Request::builder()
        .method(trial.method)
        .uri(format!("{}?{}", trial.path, query.join("&")))
        .header(
            "Content-Type",
            match trial.method {
                "PATCH" => "application/merge-patch+json",
                _ => "application/json",
            },
        );
    if let Some(asks) = &trial.asks {
        request = request.header("Impersonate-User", &asks.user);
        for group in &asks.groups {
            request = request.header("Impersonate-Group", group);
        }
    }
    let body = if trial.body.is_null() {
        if trial.method == "DELETE" && dry {
            // A deletion takes its options from its body.
            let options = json!({ "apiVersion": "v1", "kind": "DeleteOptions", "dryRun": ["All"] });
            serde_json::to_vec(&options)?
        } else {
            Vec::new()
        }
    } else {
        serde_json::to_vec(&trial.body)?
    };
    let request = request.body(Body::from(body)).context("a request")?;
    let response = client
        .send(request)
        .await
        .with_context(|| trial.name.clone())?;
    let code = response.status().as_u16();
    let warnings: Vec<String> = response
        .headers()
        .get_all("Warning")
        .iter()
        .map(|w| String::from_utf8_lossy(w.as_bytes()).into_owned())
        .collect();
    let answer = response.into_body().collect_bytes().await?;
    let answer: Value = serde_json::from_slice(&answer).unwrap_or_default();
    let message = answer["message"].as_str().unwrap_or_default().to_owned();
    Ok((code, message, warnings.join("; ")))
}

fn judge(trial: &Trial, code: u16, message: &str, warnings: &str) -> Outcome {
    let accepted = (200..300).contains(&code);
    match &trial.refused {
        Some(_) if accepted => Outcome::Missed("accepted".to_owned()),
        Some(words) if !message.contains(words.as_str()) => {
            Outcome::Missed(format!("refused for another reason ({code}): {message}"))
        }
        Some(_) => Outcome::Right,
        None if !accepted => Outcome::FalseAlarm(format!("refused ({code}): {message}")),
        None => match &trial.warned {
            // A warning is quoted.
            Some(words) if !warnings.contains(words.as_str()) => {
                Outcome::Missed(format!("not warned of: {warnings}"))
            }
            _ => Outcome::Right,
        },
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeSet;

    fn all() -> Vec<Trial> {
        read(&Path::new(env!("CARGO_MANIFEST_DIR")).join("../corpus/residency")).unwrap()
    }

    /// The goal of the project, and a guard against a file that isn't read any more.
    #[test]
    fn there_are_enough_of_both() {
        let trials = all();
        let refused = trials.iter().filter(|t| t.refused.is_some()).count();
        let lawful = trials.len() - refused;
        assert!(
            refused >= 140 && lawful >= 100,
            "{refused} refused, {lawful} lawful"
        );
    }

    #[test]
    fn no_case_is_there_twice() {
        let trials = all();
        let names: BTreeSet<&String> = trials.iter().map(|t| &t.name).collect();
        let requests: BTreeSet<String> = trials
            .iter()
            .map(|t| format!("{} {} {} {:?}", t.method, t.path, t.body, t.asks))
            .collect();
        assert_eq!((names.len(), requests.len()), (trials.len(), trials.len()));
    }

    /// "forbidden" alone would be satisfied by any refusal.
    #[test]
    fn every_refusal_gives_its_reason() {
        for trial in all() {
            if let Some(words) = &trial.refused {
                assert!(words.split(' ').count() >= 3, "{}: {words}", trial.name);
            }
        }
    }

    #[test]
    fn a_case_says_one_thing_and_leaves_no_gap() {
        let read = |text: &str| {
            let group: Group = serde_yaml::from_str(text).unwrap();
            case_trials(&group, &group.cases[0])
        };
        let text = "
channel: c
about: a
bases: {pod: {apiVersion: v1, kind: Pod, metadata: {name: x, namespace: $NS}}}
cases:
- name: in $NS
  create: pod
  with: [{NS: a}, {NS: b}]
  refused: pod of $NS
";
        let trials = read(text).unwrap();
        assert_eq!(trials.len(), 2);
        assert_eq!(trials[1].path, "/api/v1/namespaces/b/pods");
        assert_eq!(trials[1].refused.as_deref(), Some("pod of b"));
        assert!(read(&text.replace("[{NS: a}, {NS: b}]", "[]")).is_err());
        assert!(read(&text.replace("create: pod", "delete: /x\n  create: pod")).is_err());
        assert!(read(&text.replace("create: pod", "create: pods")).is_err());
    }

    #[test]
    fn the_judge_knows_a_miss_from_a_false_alarm() {
        let group: Group = serde_yaml::from_str(
            "{channel: c, about: a, cases: [{name: n, delete: /x, refused: not here at all}, {name: m, delete: /y, warned: careful with it}]}",
        )
        .unwrap();
        let trial = |n: usize| case_trials(&group, &group.cases[n]).unwrap().remove(0);
        let missed = |o: Outcome| matches!(o, Outcome::Missed(_));
        assert!(missed(judge(&trial(0), 200, "", "")));
        assert!(missed(judge(&trial(0), 403, "for another reason", "")));
        assert_eq!(
            judge(&trial(0), 403, "x is not here at all", ""),
            Outcome::Right
        );
        assert!(missed(judge(&trial(1), 200, "", "")));
        assert_eq!(
            judge(&trial(1), 200, "", "299 - \"careful with it\""),
            Outcome::Right
        );
        assert!(matches!(
            judge(&trial(1), 403, "no", ""),
            Outcome::FalseAlarm(_)
        ));
    }
}
