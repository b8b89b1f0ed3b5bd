//! A Redis that holds people's sessions, as an application would run it.
//!
//! Owns its pod, Service and the Secret with its URL. Never keeps anything: it is a cache.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use k8s_openapi::api::core::v1::{Pod, Service};
use serde_json::{Value, json};
use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader};
use tokio::net::TcpStream;

use crate::harness::{PATIENCE, Scope, wait_for};

/// Name of pod, Service and Secret.
pub const NAME: &str = "sessions";

/// The objects.
#[must_use]
pub fn manifests(namespace: &str, region: &str) -> Vec<Value> {
    let labels = json!({ "app": NAME });
    vec![
        json!({ "apiVersion": "v1", "kind": "Secret", "metadata": { "name": NAME, "namespace": namespace },
            "stringData": { "url": format!("redis://{NAME}.{namespace}.svc:6379/") } }),
        json!({ "apiVersion": "v1", "kind": "Service", "metadata": { "name": NAME, "namespace": namespace },
            "spec": { "selector": labels, "ports": [{ "port": 6379 }] } }),
        json!({ "apiVersion": "v1", "kind": "Pod",
            "metadata": { "name": NAME, "namespace": namespace, "labels": labels },
            "spec": {
                "nodeSelector": { "topology.kubernetes.io/region": region },
                "terminationGracePeriodSeconds": 0,
                "securityContext": { "runAsNonRoot": true, "runAsUser": 10003, "seccompProfile": { "type": "RuntimeDefault" } },
                "containers": [{
                    "name": "redis", "image": "redis:8", "imagePullPolicy": "IfNotPresent",
                    "command": ["redis-server", "--save", "", "--appendonly", "no", "--protected-mode", "no", "--dir", "/tmp"],
                    "securityContext": { "allowPrivilegeEscalation": false, "capabilities": { "drop": ["ALL"] } },
                }],
            } }),
    ]
}

/// Starts it and waits until it answers.
///
/// # Errors
/// If it doesn't in time.
pub async fn start(scope: &Scope, region: &str) -> Result<()> {
    for manifest in manifests(&scope.namespace, region) {
        scope.apply(&manifest).await?;
    }
    let running = wait_for(scope.api::<Pod>(), NAME, |pod| {
        pod.status.as_ref().and_then(|s| s.phase.as_deref()) == Some("Running")
    });
    tokio::time::timeout(PATIENCE, running)
        .await
        .context("Redis doesn't start")??;
    let deadline = tokio::time::Instant::now() + Duration::from_secs(30);
    while command(scope, &["PING"]).await.ok().as_deref() != Some("PONG") {
        anyhow::ensure!(
            tokio::time::Instant::now() < deadline,
            "Redis doesn't answer"
        );
        tokio::time::sleep(Duration::from_millis(200)).await;
    }
    Ok(())
}

/// One command.
///
/// # Errors
/// If redis-cli fails.
pub async fn command(scope: &Scope, command: &[&str]) -> Result<String> {
    let all = [&["redis-cli", "--no-auth-warning"], command].concat();
    Ok(scope.exec(NAME, &all).await?.trim().to_owned())
}

/// A connection of its own, for those who can't wait for redis-cli to start. Speaks inline commands only.
pub struct Connection(BufReader<TcpStream>);

impl Connection {
    /// Connects by the Service's address.
    ///
    /// # Errors
    /// If Redis can't be reached.
    pub async fn open(scope: &Scope) -> Result<Self> {
        let service = scope.api::<Service>().get(NAME).await?;
        let address = service
            .spec
            .and_then(|s| s.cluster_ip)
            .context("the Service has no address")?;
        let stream = TcpStream::connect((address.as_str(), 6379)).await?;
        stream.set_nodelay(true)?;
        Ok(Self(BufReader::new(stream)))
    }

    /// Whether a session of this person is there.
    ///
    /// # Errors
    /// If Redis doesn't answer with a number.
    pub async fn exists(&mut self, person: usize) -> Result<bool> {
        let command = format!("EXISTS session:{person}:web session:{person}:app\r\n");
        self.0.get_mut().write_all(command.as_bytes()).await?;
        let mut line = String::new();
        self.0.read_line(&mut line).await?;
        let count = line.trim_end().strip_prefix(':');
        let count = count.with_context(|| format!("Redis says {line}"))?;
        ensure!(!count.is_empty(), "Redis says {line}");
        Ok(count != "0")
    }
}
