//! The API server with fake nodes: starts, schedules, and leaves nothing behind. Needs no root; the
//! first run builds its programs.
#![cfg(feature = "api")]

use anyhow::{Context, Result, ensure};
use e2e::api::ApiServer;
use e2e::run::until;
use k8s_openapi::api::core::v1::{Node, Pod};
use kube::Api;
use kube::api::{ListParams, PostParams};
use serde_json::json;
use std::time::Duration;

#[tokio::test(flavor = "multi_thread")]
async fn pods_run_on_fake_nodes_and_nothing_is_left() -> Result<()> {
    let server = ApiServer::start().await?;
    let nodes = Api::<Node>::all(server.client())
        .list(&ListParams::default())
        .await?;
    assert_eq!(nodes.items.len(), 6);

    let pods: Api<Pod> = Api::default_namespaced(server.client());
    let pod: Pod = serde_json::from_value(json!({
        "metadata": {"name": "demo"},
        "spec": {
            "nodeSelector": {"topology.kubernetes.io/region": "eu-central-1"},
            "containers": [{"name": "c", "image": "anything"}],
        },
    }))?;
    pods.create(&PostParams::default(), &pod).await?;
    until(
        "the pod",
        Duration::from_secs(30),
        Duration::from_millis(100),
        || async {
            let pod = pods.get("demo").await?;
            let node = pod.spec.and_then(|s| s.node_name);
            let phase = pod.status.and_then(|s| s.phase).context("no phase")?;
            ensure!(
                phase == "Running" && node.as_deref() == Some("c1"),
                "{phase} on {node:?}"
            );
            Ok(())
        },
    )
    .await?;

    let root = server.layout().root().to_owned();
    let etcd = e2e::daemon::record(server.layout(), "etcd").context("no record of etcd")?;
    assert!(etcd.alive());
    drop(server);
    assert!(!etcd.alive() && !root.exists());
    Ok(())
}
