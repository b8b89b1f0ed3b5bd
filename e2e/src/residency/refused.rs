//! What the API server refuses.
//!
//! Each request is made as whoever would make it, and must be refused in the words of the policy. One that passes is
//! undone at once, and is a violation.

use std::time::Instant;

use anyhow::{Context, Result};
use k8s_openapi::api::core::v1::{Node, Pod};
use kube::api::{DeleteParams, DynamicObject, Patch, PatchParams, PostParams};
use kube::core::{ApiResource, GroupVersionKind};
use kube::{Api, Client, Config};
use serde_json::{Value, json};

use super::case::Case;
use super::ground::{Ground, NAME, REGION};
use super::sample::Sample;
use crate::control;

/// A node that there isn't.
const NEW: &str = "new1";

/// Makes the request.
///
/// # Errors
/// If it can't be made, or is refused for another reason.
pub async fn run(ground: &Ground, case: Case, number: usize) -> Result<Sample> {
    let client = ground.harness.client();
    let pods: Api<Pod> = ground.scope.api();
    let name = format!("stray-{number}");
    let begin;
    let (answer, words) = match case {
        Case::KubeletRegisters => {
            let nodes: Api<Node> = Api::all(kubelet(ground, None).await?);
            let node = json!({ "metadata": { "name": NEW, "labels": { REGION: "us-west-2" } } });
            let node: Node = serde_json::from_value(node)?;
            begin = Instant::now();
            let answer = nodes.create(&PostParams::default(), &node).await.map(drop);
            (answer, "a node may not say itself where it is")
        }
        Case::KubeletClaims => {
            let nodes: Api<Node> = Api::all(kubelet(ground, Some("c1")).await?);
            let patch = Patch::Merge(json!({ "metadata": { "labels": { REGION: "us-west-2" } } }));
            begin = Instant::now();
            let answer = nodes.patch("c1", &PatchParams::default(), &patch).await;
            (answer.map(drop), "a node may not say itself where it is")
        }
        Case::BoundByHand => {
            let pod: Pod =
                serde_json::from_value(stray(&name, &json!({ "schedulerName": "nobody" })))?;
            pods.create(&PostParams::default(), &pod).await?;
            let binding = json!({
                "apiVersion": "v1", "kind": "Binding", "metadata": { "name": name },
                "target": { "apiVersion": "v1", "kind": "Node", "name": "c1" },
            });
            begin = Instant::now();
            let bound: kube::Result<Value> = pods
                .create_subresource("binding", &name, &PostParams::default(), &binding)
                .await;
            (
                bound.map(drop),
                "node c1 is in region eu-central-1, where ResidencyPolicy",
            )
        }
        Case::CreatedOnNode => {
            let pod: Pod = serde_json::from_value(stray(&name, &json!({ "nodeName": "c1" })))?;
            begin = Instant::now();
            let answer = pods.create(&PostParams::default(), &pod).await.map(drop);
            (
                answer,
                "node c1 is in region eu-central-1, where ResidencyPolicy",
            )
        }
        _ => {
            let kind = GroupVersionKind::gvk("domicile.dev", "v1alpha1", "ResidencyPolicy");
            let policies: Api<DynamicObject> = Api::all_with(
                client.clone(),
                &ApiResource::from_gvk_with_plural(&kind, "residencypolicies"),
            );
            begin = Instant::now();
            let answer = policies
                .delete(NAME, &DeleteParams::default())
                .await
                .map(drop);
            (answer, "is in use")
        }
    };
    let took = begin.elapsed().as_secs_f64();
    let at_once = DeleteParams {
        grace_period_seconds: Some(0),
        ..DeleteParams::default()
    };
    let _ = pods.delete(&name, &at_once).await;
    let mut sample = Sample {
        found: took,
        fenced: took,
        ..Sample::default()
    };
    match answer {
        Err(kube::Error::Api(refusal)) if refusal.message.contains(words) => {
            sample.what = refusal.message.chars().take(200).collect();
        }
        Err(other) => return Err(other).context("refused, and not for being outside"),
        Ok(()) => {
            sample
                .violations
                .push(format!("{}: it was let through", case.name()));
            if case == Case::KubeletRegisters {
                let nodes: Api<Node> = Api::all(client);
                let _ = nodes.delete(NEW, &DeleteParams::default()).await;
            }
            ground.heal().await?;
        }
    }
    Ok(sample)
}

/// A client with a kubelet's own credentials, or one that passes for the kubelet of a node that there isn't.
async fn kubelet(ground: &Ground, node: Option<&str>) -> Result<Client> {
    if let Some(node) = node {
        let pki = control::pki(ground.harness.bed.layout());
        return control::client(&pki.kubeconfig(&format!("node-{node}"))).await;
    }
    let file = kube::config::Kubeconfig::read_from(ground.harness.bed.kubeconfig())?;
    let options = kube::config::KubeConfigOptions::default();
    let mut config = Config::from_custom_kubeconfig(file, &options).await?;
    config.auth_info.impersonate = Some(format!("system:node:{NEW}"));
    let groups = ["system:nodes", "system:authenticated"];
    config.auth_info.impersonate_groups = Some(groups.map(str::to_owned).to_vec());
    Client::try_from(config).context("a client that passes for a kubelet")
}

fn stray(name: &str, more: &Value) -> Value {
    let mut pod = json!({
        "apiVersion": "v1", "kind": "Pod", "metadata": { "name": name, "namespace": NAME },
        "spec": {
            "terminationGracePeriodSeconds": 0,
            "securityContext": { "runAsNonRoot": true, "runAsUser": 10002, "seccompProfile": { "type": "RuntimeDefault" } },
            "containers": [{
                "name": "stray", "image": "postgres:17", "imagePullPolicy": "IfNotPresent", "command": ["sleep", "infinity"],
                "securityContext": { "allowPrivilegeEscalation": false, "capabilities": { "drop": ["ALL"] } },
            }],
        },
    });
    json_patch::merge(&mut pod["spec"], more);
    pod
}
