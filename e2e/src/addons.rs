//! What runs in the cluster before anybody uses it: the nodes' regions and zones, the DNS, the
//! StorageClass.
//!
//! Everything is applied, so that doing it again changes nothing. Never starts a process, except
//! for the provisioner of volumes.

use crate::daemon::{self, Daemon};
use crate::layout::Layout;
use crate::provisioner;
use crate::run::{run, run_with, until};
use crate::tools::KUBERNETES;
use crate::topology::{DNS_SERVICE, KUBERNETES_SERVICE, NODES};
use anyhow::{Context, Result, ensure};
use k8s_openapi::api::apps::v1::DaemonSet;
use k8s_openapi::api::core::v1::Node as KubeNode;
use kube::api::{ListParams, Patch, PatchParams};
use kube::{Api, Client};
use serde_json::{Value, json};
use std::time::Duration;

/// The name of the daemon that makes volumes.
pub const PROVISIONER: &str = "provisioner";

const FIELD_MANAGER: &str = "testbed";
const COREFILE: &str = "\
cluster.local:1053 in-addr.arpa:1053 ip6.arpa:1053 {
    errors
    health :8080
    ready :8181
    kubernetes cluster.local in-addr.arpa ip6.arpa {
        pods insecure
        ttl 5
    }
    cache 5
}
.:1053 {
    errors
    template ANY ANY {
        rcode NXDOMAIN
    }
}
";

/// Puts regions and zones on the nodes that have registered. Fails as long as one hasn't.
///
/// # Errors
/// If a node isn't there yet, or the API server refuses.
pub async fn label_nodes(client: &Client) -> Result<()> {
    let api: Api<KubeNode> = Api::all(client.clone());
    let known = api
        .list(&ListParams::default())
        .await
        .context("listing the nodes")?;
    for node in &NODES {
        let found = known
            .items
            .iter()
            .find(|n| n.metadata.name.as_deref() == Some(node.name));
        let found = found.with_context(|| format!("{} hasn't registered", node.name))?;
        let has = found.metadata.labels.clone().unwrap_or_default();
        let wanted = node.labels();
        if wanted
            .iter()
            .any(|(key, value)| has.get(*key) != Some(value))
        {
            let labels: serde_json::Map<_, _> = wanted
                .into_iter()
                .map(|(k, v)| (k.to_owned(), json!(v)))
                .collect();
            let patch = json!({"metadata": {"labels": labels}});
            api.patch(node.name, &PatchParams::default(), &Patch::Merge(patch))
                .await
                .context("labelling a node")?;
        }
    }
    Ok(())
}

/// Which nodes say that they are ready.
///
/// # Errors
/// If the API server doesn't answer.
pub async fn ready_nodes(client: &Client) -> Result<Vec<String>> {
    let api: Api<KubeNode> = Api::all(client.clone());
    let nodes = api
        .list(&ListParams::default())
        .await
        .context("listing the nodes")?;
    let ready = |n: &KubeNode| {
        let conditions = n.status.as_ref().and_then(|s| s.conditions.as_ref());
        conditions.is_some_and(|c| c.iter().any(|c| c.type_ == "Ready" && c.status == "True"))
    };
    Ok(nodes
        .items
        .into_iter()
        .filter(ready)
        .filter_map(|n| n.metadata.name)
        .collect())
}

/// The objects of the DNS and of the storage.
fn manifests() -> Vec<Value> {
    let labels = json!({"k8s-app": "kube-dns"});
    let meta = |name: &str| json!({"name": name, "namespace": "kube-system", "labels": labels});
    vec![
        json!({"apiVersion": "v1", "kind": "ServiceAccount", "metadata": meta("coredns")}),
        json!({
            "apiVersion": "rbac.authorization.k8s.io/v1", "kind": "ClusterRole", "metadata": {"name": "system:coredns"},
            "rules": [
                {"apiGroups": [""], "resources": ["endpoints", "services", "pods", "namespaces"], "verbs": ["list", "watch"]},
                {"apiGroups": ["discovery.k8s.io"], "resources": ["endpointslices"], "verbs": ["list", "watch"]},
            ],
        }),
        json!({
            "apiVersion": "rbac.authorization.k8s.io/v1", "kind": "ClusterRoleBinding", "metadata": {"name": "system:coredns"},
            "roleRef": {"apiGroup": "rbac.authorization.k8s.io", "kind": "ClusterRole", "name": "system:coredns"},
            "subjects": [{"kind": "ServiceAccount", "name": "coredns", "namespace": "kube-system"}],
        }),
        json!({"apiVersion": "v1", "kind": "ConfigMap", "metadata": meta("coredns"), "data": {"Corefile": COREFILE}}),
        // One per node, asked by its own node first, as with a node-local cache: a cut elsewhere
        // must not cost anybody five seconds per name.
        json!({
            "apiVersion": "apps/v1", "kind": "DaemonSet", "metadata": meta("coredns"),
            "spec": {
                "selector": {"matchLabels": labels},
                "updateStrategy": {"type": "RollingUpdate", "rollingUpdate": {"maxUnavailable": 3}},
                "template": {
                    "metadata": {"labels": labels},
                    "spec": {
                        "serviceAccountName": "coredns",
                        "priorityClassName": "system-cluster-critical",
                        "dnsPolicy": "Default",
                        "terminationGracePeriodSeconds": 1,
                        "tolerations": [{"operator": "Exists"}],
                        "securityContext": {"runAsNonRoot": true, "runAsUser": 65532},
                        "containers": [{
                            "name": "coredns",
                            "image": crate::images::DNS,
                            "imagePullPolicy": "IfNotPresent",
                            "args": ["-conf", "/etc/coredns/Corefile"],
                            "ports": [{"name": "dns", "containerPort": 1053, "protocol": "UDP"}, {"name": "dns-tcp", "containerPort": 1053}],
                            "readinessProbe": {"httpGet": {"path": "/ready", "port": 8181}, "periodSeconds": 1},
                            "livenessProbe": {"httpGet": {"path": "/health", "port": 8080}, "periodSeconds": 10, "timeoutSeconds": 5},
                            "resources": {"requests": {"cpu": "10m", "memory": "30Mi"}},
                            "securityContext": {"allowPrivilegeEscalation": false, "readOnlyRootFilesystem": true, "capabilities": {"drop": ["ALL"]}},
                            "volumeMounts": [{"name": "config", "mountPath": "/etc/coredns", "readOnly": true}],
                        }],
                        "volumes": [{"name": "config", "configMap": {"name": "coredns"}}],
                    },
                },
            },
        }),
        json!({
            "apiVersion": "v1", "kind": "Service", "metadata": meta("kube-dns"),
            "spec": {
                "clusterIP": DNS_SERVICE, "selector": labels, "trafficDistribution": "PreferSameNode",
                "ports": [
                    {"name": "dns", "port": 53, "protocol": "UDP", "targetPort": "dns"},
                    {"name": "dns-tcp", "port": 53, "protocol": "TCP", "targetPort": "dns-tcp"},
                ],
            },
        }),
        json!({
            "apiVersion": "storage.k8s.io/v1", "kind": "StorageClass",
            "metadata": {"name": provisioner::CLASS, "annotations": {"storageclass.kubernetes.io/is-default-class": "true"}},
            "provisioner": provisioner::NAME, "volumeBindingMode": "WaitForFirstConsumer",
            "reclaimPolicy": "Delete", "allowVolumeExpansion": false,
        }),
    ]
}

/// Applies them.
///
/// # Errors
/// If the API server refuses one.
pub async fn apply(layout: &Layout) -> Result<()> {
    let text = json!({"apiVersion": "v1", "kind": "List", "items": manifests()}).to_string();
    let kubectl = KUBERNETES.path("kubectl")?.display().to_string();
    let kubeconfig = layout.kubeconfig().display().to_string();
    let command = [
        "--kubeconfig",
        &kubeconfig,
        "apply",
        "--server-side",
        "--force-conflicts",
        "--field-manager",
        FIELD_MANAGER,
        "-f",
        "-",
    ];
    run_with(&[&[kubectl.as_str()][..], &command].concat(), Some(&text))
        .await
        .context("the DNS and the StorageClass")?;
    Ok(())
}

/// Starts the daemon that makes volumes.
///
/// # Errors
/// If it can't be started.
pub async fn start_provisioner(layout: &Layout) -> Result<()> {
    let state = layout.root().display().to_string();
    let provisioner = Daemon {
        name: PROVISIONER.into(),
        netns: None,
        command: vec![
            layout.program().display().to_string(),
            "provisioner".into(),
            "--state".into(),
            state,
        ],
        contained: true,
    };
    daemon::ensure(layout, &provisioner).await
}

/// Waits until the DNS runs on every node and answers.
///
/// # Errors
/// If it doesn't within a minute and a half.
pub async fn dns_ready(client: &Client) -> Result<()> {
    let api: Api<DaemonSet> = Api::namespaced(client.clone(), "kube-system");
    until(
        "the DNS",
        Duration::from_secs(90),
        Duration::from_millis(250),
        || async {
            let status = api
                .get("coredns")
                .await
                .context("reading the DaemonSet of the DNS")?
                .status
                .unwrap_or_default();
            let (ready, wanted) = (
                status.number_ready,
                i32::try_from(NODES.len()).unwrap_or(i32::MAX),
            );
            ensure!(ready >= wanted, "{ready} of {wanted} pods are ready");
            let server = DNS_SERVICE.to_string();
            let answer = run(&[
                "busybox",
                "nslookup",
                "kubernetes.default.svc.cluster.local",
                &server,
            ])
            .await?;
            ensure!(
                answer.contains(&KUBERNETES_SERVICE.to_string()),
                "an answer without the address: {answer}"
            );
            Ok(())
        },
    )
    .await
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn objects_have_what_makes_them_ours() {
        let all = manifests();
        let kinds: Vec<_> = all.iter().filter_map(|m| m["kind"].as_str()).collect();
        assert!(kinds.contains(&"StorageClass") && kinds.contains(&"DaemonSet"));
        let service = all.iter().find(|m| m["kind"] == "Service").unwrap();
        assert_eq!(service["spec"]["clusterIP"], DNS_SERVICE.to_string());
    }
}
