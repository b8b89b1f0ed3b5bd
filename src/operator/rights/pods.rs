//! The Deployments of a workflow: its gateway, and the workers of each region.
//!
//! Owns what is in their pods. Pure. Never asks for a region without the label that only the operator sets, and beside it
//! the labels that the Region itself says its nodes carry, so that a stamp which isn't taken back yet attracts nothing.

use kube::ResourceExt;
use serde_json::{Map, Value, json};
use std::collections::BTreeMap;

use super::build::{GATEWAY, Input, WORKER, folder, labels_of, metadata, scaled, selector};
use crate::api::names::rights::{self as names, paths};
use crate::api::names::{HTTP_PORT, HTTP_PORT_NAME};
use crate::api::privacy_data_store::Resources;
use crate::api::rights_targets::Target;
use crate::api::rights_workflow::WorkerPool;
use crate::api::{RightsWorkflow, labels};
use crate::operator::objects;

/// Name of the gateway's port.
pub const HTTPS: &str = "https";
/// Annotation of pods with the hash of the configuration that they begin with: another one replaces them.
const CONFIG_HASH: &str = "domicile.dev/config-hash";
/// Whom the image's processes run as.
const UID: u32 = 65532;
/// A gateway finishes what it has taken in.
const GATEWAY_GRACE: u32 = 45;
/// A worker finishes the batch that it has begun, or its lease ends.
const WORKER_GRACE: u32 = 60;

/// The gateway's Deployment.
pub fn gateway(input: &Input<'_>, config: &str) -> Value {
    let workflow = input.workflow;
    let name = workflow.name_any();
    let volumes = [
        ("config", config_volume(&name), folder(paths::CONFIG)),
        ("tls", secret(&names::gateway_tls(&name)), paths::TLS),
        ("keys", secret(&names::keys(&name)), paths::KEYS),
        ("serving", secret(&names::serving(&name)), paths::SERVING),
    ];
    let ports = json!([
        { "name": HTTPS, "containerPort": names::GATEWAY_PORT, "protocol": "TCP" },
        { "name": HTTP_PORT_NAME, "containerPort": HTTP_PORT, "protocol": "TCP" },
    ]);
    let spec = &workflow.spec.gateway;
    let regions: Vec<&str> = input.lawful.gateways.iter().map(String::as_str).collect();
    let mut pod = pod(
        input,
        &Process {
            component: GATEWAY,
            account: &names::gateway(&name),
            command: listening(
                input,
                &["gateway"],
                &[("--https", names::GATEWAY_PORT), ("--http", HTTP_PORT)],
            ),
            ports,
            resources: spec.resources.as_ref(),
            grace: GATEWAY_GRACE,
            // It asks the API server whose a token is.
            token: true,
        },
        &regions,
        &volumes,
    );
    pod["topologySpreadConstraints"] = json!([
        spread(&name, labels::NODE_REGION),
        spread(&name, labels::NODE_ZONE),
        spread(&name, labels::NODE_HOSTNAME),
    ]);
    let replicas = if input.closed {
        Some(0)
    } else {
        // Otherwise the autoscaler's to say.
        (!scaled(&spec.replicas)).then_some(spec.replicas.min)
    };
    deployment(
        workflow,
        &names::gateway(&name),
        &labels_of(&name, Some(GATEWAY)),
        replicas,
        config,
        &pod,
    )
}

/// The workers' Deployment of a region.
pub fn worker(input: &Input<'_>, pool: &WorkerPool, config: &str) -> Value {
    let workflow = input.workflow;
    let name = workflow.name_any();
    let tls = names::worker_tls(&name, &workflow.spec.ledger_ref.name);
    let volumes = [
        ("config", config_volume(&name), folder(paths::CONFIG)),
        ("tls", secret(&tls), paths::TLS),
        ("keys", secret(&names::keys(&name)), paths::KEYS),
        (
            "targets",
            credentials(workflow, &pool.region),
            paths::TARGETS,
        ),
    ];
    let command = ["worker", "--region", &pool.region];
    let mut pod = pod(
        input,
        &Process {
            component: WORKER,
            account: &names::workers(&name),
            command: listening(input, &command, &[("--listen", HTTP_PORT)]),
            ports: json!([{ "name": HTTP_PORT_NAME, "containerPort": HTTP_PORT, "protocol": "TCP" }]),
            resources: pool.resources.as_ref(),
            grace: WORKER_GRACE,
            token: false,
        },
        &[pool.region.as_str()],
        &volumes,
    );
    let constraint = |key: &str| {
        let mut constraint = spread(&name, key);
        constraint["labelSelector"]["matchLabels"] = selector(&name, WORKER, Some(&pool.region));
        constraint
    };
    pod["topologySpreadConstraints"] = json!([
        constraint(labels::NODE_ZONE),
        constraint(labels::NODE_HOSTNAME)
    ]);
    let mut all = labels_of(&name, Some(WORKER));
    all.insert(labels::REGION.to_owned(), pool.region.clone());
    deployment(
        workflow,
        &names::worker(&name, &pool.region),
        &all,
        Some(pool.min),
        config,
        &pod,
    )
}

fn deployment(
    workflow: &RightsWorkflow,
    name: &str,
    labels: &BTreeMap<String, String>,
    replicas: Option<i32>,
    config: &str,
    pod: &Value,
) -> Value {
    let mut metadata = metadata(workflow, name, None);
    metadata["labels"] = json!(labels);
    let mut spec = json!({
        "selector": { "matchLabels": labels },
        "revisionHistoryLimit": 2,
        // A new one is ready before an old one goes.
        "strategy": { "type": "RollingUpdate", "rollingUpdate": { "maxUnavailable": 0, "maxSurge": 1 } },
        "template": {
            "metadata": {
                "labels": labels,
                "annotations": { CONFIG_HASH: objects::hash(&json!(config)) },
            },
            "spec": pod,
        },
    });
    if let Some(replicas) = replicas {
        spec["replicas"] = json!(replicas);
    }
    json!({ "metadata": metadata, "spec": spec })
}

/// A command that listens on every address that pods of this cluster have.
fn listening(input: &Input<'_>, command: &[&str], ports: &[(&str, u16)]) -> Vec<String> {
    let mut all: Vec<String> = std::iter::once("/domicile")
        .chain(command.iter().copied())
        .map(str::to_owned)
        .collect();
    // Without a word they listen on all of IPv4.
    if input.settings.ipv6 {
        for (flag, port) in ports {
            all.extend([(*flag).to_owned(), format!("[::]:{port}")]);
        }
    }
    all
}

struct Process<'a> {
    component: &'a str,
    account: &'a str,
    command: Vec<String>,
    ports: Value,
    resources: Option<&'a Resources>,
    grace: u32,
    token: bool,
}

fn pod(
    input: &Input<'_>,
    process: &Process<'_>,
    regions: &[&str],
    volumes: &[(&str, Value, &str)],
) -> Value {
    let probe = |path: &str| json!({ "path": path, "port": HTTP_PORT_NAME });
    let mounts: Vec<Value> = volumes
        .iter()
        .map(|(name, _, path)| json!({ "name": name, "mountPath": path, "readOnly": true }))
        .collect();
    let volumes: Vec<Value> = volumes
        .iter()
        .map(|(name, source, _)| {
            let mut volume = source.clone();
            volume["name"] = json!(name);
            volume
        })
        .collect();
    json!({
        "serviceAccountName": process.account,
        "automountServiceAccountToken": process.token,
        "enableServiceLinks": false,
        "terminationGracePeriodSeconds": process.grace,
        "securityContext": {
            "runAsNonRoot": true, "runAsUser": UID, "runAsGroup": UID, "fsGroup": UID,
            "seccompProfile": { "type": "RuntimeDefault" },
        },
        "affinity": { "nodeAffinity": { "requiredDuringSchedulingIgnoredDuringExecution": {
            "nodeSelectorTerms": terms(input, regions),
        } } },
        "containers": [{
            "name": process.component, "image": input.settings.image, "imagePullPolicy": "IfNotPresent",
            "command": process.command,
            // One heap for all threads: with one each, as the C library has it, what a burst took on one thread's is
            // kept there, and a worker that drained a backlog came to 53 MiB instead of 45.
            "env": [{ "name": "MALLOC_ARENA_MAX", "value": "1" }],
            "ports": process.ports,
            "startupProbe": { "httpGet": probe("/livez"), "periodSeconds": 1, "timeoutSeconds": 3, "failureThreshold": 60 },
            "livenessProbe": { "httpGet": probe("/livez"), "periodSeconds": 10, "timeoutSeconds": 5, "failureThreshold": 6 },
            "readinessProbe": { "httpGet": probe("/readyz"), "periodSeconds": 2, "timeoutSeconds": 3, "failureThreshold": 2 },
            "resources": resources(process.resources),
            "securityContext": objects::container_security(),
            "volumeMounts": mounts,
        }],
        "volumes": volumes,
    })
}

/// One alternative per region.
fn terms(input: &Input<'_>, regions: &[&str]) -> Vec<Value> {
    regions
        .iter()
        .map(|name| {
            let mut expressions =
                vec![json!({ "key": labels::NODE_REGION, "operator": "In", "values": [name] })];
            let region = input.regions.iter().find(|r| r.name_any() == *name);
            for (key, value) in region.iter().flat_map(|r| &r.spec.nodes.labels) {
                expressions.push(json!({ "key": key, "operator": "In", "values": [value] }));
            }
            json!({ "matchExpressions": expressions })
        })
        .collect()
}

/// What a process may use: as asked for, or enough for what was measured, with room. A request for CPU is always there:
/// the autoscaler measures by it.
fn resources(asked: Option<&Resources>) -> Value {
    let Some(asked) = asked else {
        return json!({
            "requests": { "cpu": CPU, "memory": "64Mi" }, "limits": { "memory": "256Mi" },
        });
    };
    let mut all = objects::resources(asked);
    // With a limit alone, that is the request.
    if all["requests"]["cpu"].is_null() && all["limits"]["cpu"].is_null() {
        all["requests"]["cpu"] = json!(CPU);
    }
    if all["limits"].is_null()
        && let Value::Object(map) = &mut all
    {
        map.remove("limits");
    }
    all
}

/// What a process asks for if nobody says otherwise.
const CPU: &str = "100m";

fn spread(workflow: &str, key: &str) -> Value {
    json!({
        "topologyKey": key, "maxSkew": 1, "whenUnsatisfiable": "ScheduleAnyway",
        "labelSelector": { "matchLabels": selector(workflow, GATEWAY, None) },
    })
}

fn config_volume(workflow: &str) -> Value {
    json!({ "configMap": { "name": names::config(workflow) } })
}

fn secret(name: &str) -> Value {
    json!({ "secret": { "secretName": name, "defaultMode": 0o440 } })
}

/// `TARGET/url`, and beside it `ca.crt` if the same Secret has one; of a target in another store than the ledger's, the
/// certificate by which workers are a role there. All of it optional: where a Secret is missing, one target can't be
/// reached and says so, and the others go on.
fn credentials(workflow: &RightsWorkflow, region: &str) -> Value {
    let mut sources = Vec::new();
    let ledger = &workflow.spec.ledger_ref.name;
    let mut add = |secret: &str, items: &[(&str, String)]| {
        let items: Vec<Value> = items
            .iter()
            .map(|(key, path)| json!({ "key": key, "path": path }))
            .collect();
        sources.push(json!({ "secret": { "name": secret, "items": items, "optional": true } }));
    };
    for target in &workflow.spec.targets {
        let name = &target.name;
        let at = |file: &str| format!("{name}/{file}");
        // Not what workers of this region may not touch.
        let here = target.region.as_deref().is_none_or(|r| r == region);
        if let Some(url) = url_of(target).filter(|_| here) {
            let (secret, key) = url;
            add(secret, &[(key, at("url"))]);
            if key != "ca.crt" {
                add(secret, &[("ca.crt", at("ca.crt"))]);
            }
        }
        let store = target
            .postgresql
            .as_ref()
            .and_then(|p| p.store_ref.as_ref());
        if let Some(store) = store.filter(|s| s.name != *ledger) {
            let files = ["ca.crt", "tls.crt", "tls.key"];
            let items: Vec<(&str, String)> = files.iter().map(|f| (*f, at(f))).collect();
            add(
                &names::worker_tls(&workflow.name_any(), &store.name),
                &items,
            );
        }
    }
    if sources.is_empty() {
        return json!({ "emptyDir": {} });
    }
    json!({ "projected": { "defaultMode": 0o440, "sources": sources } })
}

/// The Secret, and the key in it, with a target's URL.
fn url_of(target: &Target) -> Option<(&str, &str)> {
    let postgres = target.postgresql.as_ref().and_then(|p| p.url_from.as_ref());
    let source = postgres.or_else(|| target.redis.as_ref().map(|r| &r.url_from))?;
    let reference = &source.secret_key_ref;
    Some((&reference.name, &reference.key))
}

/// A Deployment as it is made first: the autoscaler takes its number from there.
pub fn with_replicas(mut value: Value, replicas: i32) -> Value {
    if let Some(spec) = value["spec"].as_object_mut() {
        let spec: &mut Map<String, Value> = spec;
        spec.entry("replicas").or_insert_with(|| json!(replicas));
    }
    value
}
