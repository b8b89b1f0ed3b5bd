//! The cluster's metrics server: what a HorizontalPodAutoscaler and `kubectl top` ask how much pods use.
//!
//! Owns its manifests, and is built when it is first asked for: that takes three minutes, and only autoscalers need it.
//! Never stays longer than whoever asked for it needs it: it sits on one node, and while that node is cut off Kubernetes
//! ends no namespace, since one of its APIs can't be listed.

use std::time::Duration;

use anyhow::{Result, ensure};
use serde_json::{Value, json};

use crate::cluster;
use crate::images;
use crate::run::until;
use crate::testbed::TestBed;
use crate::tools::METRICS_SERVER;
use crate::topology::NODES;

const NAME: &str = "metrics-server";
const PORT: u16 = 10250;
/// Its shortest interval; a rate needs two looks.
const EVERY: &str = "10s";
/// In which it starts, and has looked at every kubelet twice.
const PATIENCE: Duration = Duration::from_secs(120);

fn manifests() -> Vec<Value> {
    let labels = json!({"k8s-app": NAME});
    let meta = json!({"name": NAME, "namespace": "kube-system", "labels": labels});
    let subjects = json!([{"kind": "ServiceAccount", "name": NAME, "namespace": "kube-system"}]);
    let rbac = "rbac.authorization.k8s.io/v1";
    vec![
        json!({"apiVersion": "v1", "kind": "ServiceAccount", "metadata": meta}),
        json!({
            "apiVersion": rbac, "kind": "ClusterRole", "metadata": {"name": "system:metrics-server"},
            "rules": [
                {"apiGroups": [""], "resources": ["nodes/metrics"], "verbs": ["get"]},
                {"apiGroups": [""], "resources": ["pods", "nodes"], "verbs": ["get", "list", "watch"]},
            ],
        }),
        json!({
            "apiVersion": rbac, "kind": "ClusterRoleBinding", "metadata": {"name": "system:metrics-server"},
            "roleRef": {"apiGroup": "rbac.authorization.k8s.io", "kind": "ClusterRole", "name": "system:metrics-server"},
            "subjects": subjects,
        }),
        // It asks the API server who it is that asks it, and what they may.
        json!({
            "apiVersion": rbac, "kind": "ClusterRoleBinding", "metadata": {"name": "metrics-server:system:auth-delegator"},
            "roleRef": {"apiGroup": "rbac.authorization.k8s.io", "kind": "ClusterRole", "name": "system:auth-delegator"},
            "subjects": subjects,
        }),
        json!({
            "apiVersion": rbac, "kind": "RoleBinding",
            "metadata": {"name": "metrics-server-auth-reader", "namespace": "kube-system"},
            "roleRef": {
                "apiGroup": "rbac.authorization.k8s.io", "kind": "Role", "name": "extension-apiserver-authentication-reader",
            },
            "subjects": subjects,
        }),
        json!({
            "apiVersion": "apps/v1", "kind": "Deployment", "metadata": meta,
            "spec": {
                "selector": {"matchLabels": labels},
                "template": {
                    "metadata": {"labels": labels},
                    "spec": {
                        "serviceAccountName": NAME,
                        "priorityClassName": "system-cluster-critical",
                        "terminationGracePeriodSeconds": 1,
                        "securityContext": {"runAsNonRoot": true, "runAsUser": 65532},
                        "containers": [{
                            "name": NAME,
                            "image": images::METRICS,
                            "imagePullPolicy": "IfNotPresent",
                            "args": [
                                "--cert-dir=/tmp",
                                format!("--secure-port={PORT}"),
                                "--kubelet-preferred-address-types=InternalIP",
                                "--kubelet-certificate-authority=/cluster/ca.crt",
                                format!("--metric-resolution={EVERY}"),
                                "--kubelet-request-timeout=5s",
                            ],
                            "ports": [{"name": "https", "containerPort": PORT}],
                            "readinessProbe": {
                                "httpGet": {"path": "/readyz", "port": "https", "scheme": "HTTPS"}, "periodSeconds": 1,
                            },
                            "resources": {"requests": {"cpu": "10m", "memory": "60Mi"}},
                            "securityContext": {
                                "allowPrivilegeEscalation": false, "readOnlyRootFilesystem": true,
                                "capabilities": {"drop": ["ALL"]}, "seccompProfile": {"type": "RuntimeDefault"},
                            },
                            "volumeMounts": [
                                {"name": "tmp", "mountPath": "/tmp"},
                                {"name": "cluster", "mountPath": "/cluster", "readOnly": true},
                            ],
                        }],
                        "volumes": [
                            {"name": "tmp", "emptyDir": {"medium": "Memory"}},
                            {"name": "cluster", "configMap": {"name": "kube-root-ca.crt"}},
                        ],
                    },
                },
            },
        }),
        json!({
            "apiVersion": "v1", "kind": "Service", "metadata": meta,
            "spec": {"selector": labels, "ports": [{"name": "https", "port": 443, "targetPort": "https"}]},
        }),
        // It makes its own certificate when it starts, as it does wherever people install it.
        json!({
            "apiVersion": "apiregistration.k8s.io/v1", "kind": "APIService", "metadata": {"name": "v1beta1.metrics.k8s.io"},
            "spec": {
                "service": {"name": NAME, "namespace": "kube-system"}, "insecureSkipTLSVerify": true,
                "group": "metrics.k8s.io", "version": "v1beta1", "groupPriorityMinimum": 100, "versionPriority": 100,
            },
        }),
    ]
}

fn list() -> String {
    json!({"apiVersion": "v1", "kind": "List", "items": manifests()}).to_string()
}

/// Installs it, and waits until it knows every node. The first time it is built.
///
/// # Errors
/// If it can't be built, the API server refuses, or it doesn't come to that in two minutes.
pub async fn install(bed: &TestBed) -> Result<()> {
    cluster::build(&METRICS_SERVER).await?;
    bed.load(&images::metrics().await?).await?;
    bed.apply(&list()).await?;
    until(
        "the metrics server",
        PATIENCE,
        Duration::from_millis(500),
        || async {
            let path = "/apis/metrics.k8s.io/v1beta1/nodes";
            let answer: Value = serde_json::from_str(&bed.kubectl(&["get", "--raw", path]).await?)?;
            let known = answer["items"].as_array().map_or(0, Vec::len);
            ensure!(
                known >= NODES.len(),
                "it knows {known} of {} nodes",
                NODES.len()
            );
            Ok(())
        },
    )
    .await
}

/// Removes it.
///
/// # Errors
/// If the API server refuses.
pub async fn remove(bed: &TestBed) -> Result<()> {
    // The API first: while it's there and nobody serves it, no namespace ends.
    bed.kubectl(&[
        "delete",
        "--ignore-not-found",
        "apiservice",
        "v1beta1.metrics.k8s.io",
    ])
    .await?;
    bed.delete(&list()).await
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_api_leads_to_the_service_and_the_service_to_the_pods() {
        let all = manifests();
        let of = |kind: &str| all.iter().find(|m| m["kind"] == kind).unwrap();
        let (api, service, pods) = (of("APIService"), of("Service"), of("Deployment"));
        assert_eq!(api["spec"]["service"]["name"], service["metadata"]["name"]);
        assert_eq!(
            service["spec"]["selector"],
            pods["spec"]["template"]["metadata"]["labels"]
        );
    }
}
