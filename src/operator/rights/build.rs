//! The objects of a workflow, as they should be.
//!
//! Owns their content. Pure: what reaches here has been validated, and the same input gives the same bytes.
//! Never puts a secret or personal data into an object's name, label or annotation; never lets a gateway see the
//! credentials of targets, or a worker the gateway's certificate.

use kube::ResourceExt;
use kube::api::DynamicObject;
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;

use super::kinds::ChildKind;
use super::pods;
use super::validate::Lawful;
use crate::api::names::rights::{self as names, paths};
use crate::api::rights_workflow::ReplicaRange;
use crate::api::{GROUP, Region, RightsWorkflow, VERSION, labels};
use crate::operator::objects;
use crate::operator::store::build::Settings;

/// The value of [`labels::COMPONENT`] on gateways.
pub const GATEWAY: &str = "gateway";
/// The same on workers.
pub const WORKER: &str = "worker";
/// Key of the workflow's ConfigMap.
pub const CONFIG_KEY: &str = "workflow.json";

/// What building needs beside the workflow.
pub struct Input<'a> {
    /// The workflow.
    pub workflow: &'a RightsWorkflow,
    /// What of it is lawful.
    pub lawful: &'a Lawful<'a>,
    /// Every Region.
    pub regions: &'a [Arc<Region>],
    /// What the operator is told of itself and the cluster.
    pub settings: &'a Settings,
    /// The content of the workflow's ConfigMap: what is wanted, or what is there while that can't be said.
    pub config: Option<String>,
    /// The authorities that sign the gateway's certificate, PEM.
    pub authorities: &'a str,
    /// Requests are taken in no more.
    pub closed: bool,
}

/// Labels of every object of a workflow.
#[must_use]
pub fn labels_of(workflow: &str, component: Option<&str>) -> BTreeMap<String, String> {
    let mut all = BTreeMap::from([
        (
            labels::MANAGED_BY.to_owned(),
            labels::MANAGED_BY_VALUE.to_owned(),
        ),
        (labels::WORKFLOW.to_owned(), workflow.to_owned()),
    ]);
    all.extend(component.map(|c| (labels::COMPONENT.to_owned(), c.to_owned())));
    all
}

/// Metadata of an owned object.
#[must_use]
pub fn metadata(workflow: &RightsWorkflow, name: &str, component: Option<&str>) -> Value {
    json!({
        "name": name, "namespace": workflow.namespace().unwrap_or_default(),
        "labels": labels_of(&workflow.name_any(), component),
        "ownerReferences": [{
            "apiVersion": format!("{GROUP}/{VERSION}"), "kind": "RightsWorkflow",
            "name": workflow.name_any(), "uid": workflow.uid().unwrap_or_default(),
            "controller": true, "blockOwnerDeletion": true,
        }],
    })
}

/// Metadata of an object that outlives the workflow.
#[must_use]
pub fn metadata_of_kept(workflow: &RightsWorkflow, name: &str) -> Value {
    let mut metadata = metadata(workflow, name, None);
    if let Value::Object(map) = &mut metadata {
        map.remove("ownerReferences");
    }
    metadata
}

/// What the workflow's ConfigMap says.
///
/// # Errors
/// None at present: everything in it can be written.
pub fn config_text(config: &crate::rights::config::Workflow) -> serde_json::Result<String> {
    serde_json::to_string_pretty(config)
}

/// Labels that select the pods of a component, of one region or of all.
#[must_use]
pub fn selector(workflow: &str, component: &str, region: Option<&str>) -> Value {
    let mut all = labels_of(workflow, Some(component));
    all.extend(region.map(|r| (labels::REGION.to_owned(), r.to_owned())));
    json!(all)
}

/// Every child, in the order in which they are made.
#[must_use]
pub fn children(input: &Input<'_>) -> Vec<(ChildKind, DynamicObject)> {
    let workflow = input.workflow;
    let name = workflow.name_any();
    let of = |name: &str, component: &str| metadata(workflow, name, Some(component));
    let (gateway, workers) = (names::gateway(&name), names::workers(&name));
    let mut all = vec![
        (
            ChildKind::ServiceAccount,
            json!({ "metadata": of(&gateway, GATEWAY), "automountServiceAccountToken": false }),
        ),
        (
            ChildKind::ServiceAccount,
            json!({ "metadata": of(&workers, WORKER), "automountServiceAccountToken": false }),
        ),
        (
            ChildKind::ConfigMap,
            json!({
                "metadata": of(&names::gateway_ca(&name), GATEWAY),
                "data": { "ca.crt": input.authorities },
            }),
        ),
        (
            ChildKind::NetworkPolicy,
            json!({
                "metadata": of(&gateway, GATEWAY),
                "spec": {
                    "podSelector": { "matchLabels": selector(&name, GATEWAY, None) },
                    // Out of it everything may go: the ledger, and the API server, whose address nobody can know here.
                    "policyTypes": ["Ingress"],
                    "ingress": [
                        // Requests from this namespace. Others are let in by a policy of one's own: policies add up.
                        { "from": [{ "podSelector": {} }], "ports": [port_rule(names::GATEWAY_PORT)] },
                        // Probes and metrics: nothing secret, and whoever reads metrics is elsewhere.
                        { "ports": [port_rule(crate::api::names::HTTP_PORT)] },
                    ],
                },
            }),
        ),
        (
            ChildKind::NetworkPolicy,
            json!({
                "metadata": of(&workers, WORKER),
                "spec": {
                    "podSelector": { "matchLabels": selector(&name, WORKER, None) },
                    // Out of them everything may go: targets are anywhere.
                    "policyTypes": ["Ingress"],
                    "ingress": [{ "ports": [port_rule(crate::api::names::HTTP_PORT)] }],
                },
            }),
        ),
        (
            ChildKind::Service,
            json!({
                "metadata": of(&names::gateway_service(&name), GATEWAY),
                "spec": {
                    "type": "ClusterIP", "selector": selector(&name, GATEWAY, None),
                    "ports": [{
                        "name": pods::HTTPS, "port": names::GATEWAY_PORT, "targetPort": pods::HTTPS, "protocol": "TCP",
                    }],
                },
            }),
        ),
        (
            ChildKind::PodDisruptionBudget,
            budget(&of(&gateway, GATEWAY), &selector(&name, GATEWAY, None)),
        ),
    ];
    if let Some(config) = &input.config {
        all.push((
            ChildKind::ConfigMap,
            json!({ "metadata": metadata(workflow, &names::config(&name), None), "data": { CONFIG_KEY: config } }),
        ));
        if !input.lawful.gateways.is_empty() {
            all.push((ChildKind::Deployment, pods::gateway(input, config)));
        }
        for pool in &input.lawful.pools {
            all.push((ChildKind::Deployment, pods::worker(input, pool, config)));
        }
    }
    for pool in &input.lawful.pools {
        all.push((
            ChildKind::PodDisruptionBudget,
            budget(
                &of(&names::worker(&name, &pool.region), WORKER),
                &selector(&name, WORKER, Some(&pool.region)),
            ),
        ));
    }
    let replicas = &workflow.spec.gateway.replicas;
    if scaled(replicas) && !input.closed && !input.lawful.gateways.is_empty() {
        all.push((
            ChildKind::HorizontalPodAutoscaler,
            autoscaler(&of(&gateway, GATEWAY), &gateway, replicas),
        ));
    }
    let place = |kind: ChildKind| ChildKind::ALL.iter().position(|k| *k == kind);
    all.sort_by_key(|(kind, _)| place(*kind));
    all.into_iter()
        .map(|(kind, value)| (kind, objects::finish(&kind.resource(), value)))
        .collect()
}

/// Whether the number of gateways follows their load.
#[must_use]
pub fn scaled(replicas: &ReplicaRange) -> bool {
    replicas.min < replicas.max
}

fn port_rule(port: u16) -> Value {
    json!({ "port": port, "protocol": "TCP" })
}

fn budget(metadata: &Value, selector: &Value) -> Value {
    json!({
        "metadata": metadata,
        "spec": { "maxUnavailable": 1, "selector": { "matchLabels": selector } },
    })
}

/// Follows the load within seconds, and lets go of it slowly: a burst comes back.
fn autoscaler(metadata: &Value, gateway: &str, replicas: &ReplicaRange) -> Value {
    json!({
        "metadata": metadata,
        "spec": {
            "scaleTargetRef": { "apiVersion": "apps/v1", "kind": "Deployment", "name": gateway },
            "minReplicas": replicas.min, "maxReplicas": replicas.max,
            "metrics": [{
                "type": "Resource",
                "resource": { "name": "cpu", "target": { "type": "Utilization", "averageUtilization": 70 } },
            }],
            "behavior": {
                "scaleUp": {
                    "stabilizationWindowSeconds": 0, "selectPolicy": "Max",
                    "policies": [{ "type": "Percent", "value": 300, "periodSeconds": 15 }],
                },
                "scaleDown": {
                    "stabilizationWindowSeconds": 300, "selectPolicy": "Max",
                    "policies": [{ "type": "Percent", "value": 50, "periodSeconds": 60 }],
                },
            },
        },
    })
}

/// The directory of a file's path inside a pod.
#[must_use]
pub fn folder(path: &'static str) -> &'static str {
    Path::new(path)
        .parent()
        .and_then(Path::to_str)
        .unwrap_or(paths::CONFIG)
}
