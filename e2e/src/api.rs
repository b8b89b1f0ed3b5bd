//! An API server with fake nodes, for tests that need the API and no pod that really runs.
//!
//! etcd, API server, controller manager, scheduler and kwok on free ports of the loopback address;
//! needs no root, and several run side by side. The nodes have the names, labels and provider IDs
//! of the test bed's. Never survives the process that started it, unless that was the command line.

use crate::control::{self, Place};
use crate::daemon::{self, Daemon};
use crate::layout::{Layout, cache};
use crate::pki::Pki;
use crate::run::until;
use crate::tools::{ETCD, KUBERNETES, KWOK};
use crate::topology::{NODES, Node};
use crate::{addons, tools};
use anyhow::{Context, Result, ensure};
use k8s_openapi::api::core::v1::{Node as KubeNode, ServiceAccount};
use kube::api::PostParams;
use kube::{Api, Client};
use serde_json::json;
use std::fs;
use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

static COUNT: AtomicU32 = AtomicU32::new(0);

/// A running API server. It ends, and its folder goes, when this value is dropped or its process
/// dies.
pub struct ApiServer {
    layout: Layout,
    client: Client,
    /// Kills the servers when our end of its standard input closes, however that comes.
    guard: Option<std::process::Child>,
}

impl std::fmt::Debug for ApiServer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ApiServer")
            .field("layout", &self.layout)
            .finish_non_exhaustive()
    }
}

/// The daemons, in the order in which they are ended.
const PARTS: [&str; 5] = [
    "kwok",
    "kube-scheduler",
    "kube-controller-manager",
    "kube-apiserver",
    "etcd",
];

impl ApiServer {
    /// Starts one in a folder of its own.
    ///
    /// # Errors
    /// If a part doesn't start: with the end of its log.
    pub async fn start() -> Result<Self> {
        let number = COUNT.fetch_add(1, Ordering::Relaxed);
        let dir = cache()?
            .join("api")
            .join(format!("{}-{number}", std::process::id()));
        let layout = Layout::at(&dir);
        let client = match launch(&layout).await {
            Ok(client) => client,
            Err(e) => {
                let _ = stop(&layout).await;
                return Err(e);
            }
        };
        let guard = guard(&layout)?;
        Ok(Self {
            layout,
            client,
            guard: Some(guard),
        })
    }

    /// The administrator's kubeconfig.
    #[must_use]
    pub fn kubeconfig(&self) -> PathBuf {
        self.layout.kubeconfig()
    }

    /// The administrator's client.
    #[must_use]
    pub fn client(&self) -> Client {
        self.client.clone()
    }

    /// Where its files and logs are.
    #[must_use]
    pub fn layout(&self) -> &Layout {
        &self.layout
    }

    /// Starts one that stays when this process ends. Its kubeconfig is the answer.
    ///
    /// # Errors
    /// As [`Self::start`].
    pub async fn up(dir: Option<&Path>) -> Result<PathBuf> {
        let layout = layout(dir)?;
        launch(&layout).await?;
        Ok(layout.kubeconfig())
    }

    /// Ends what [`Self::up`] has started and removes its folder.
    ///
    /// # Errors
    /// If something lives on.
    pub async fn down(dir: Option<&Path>) -> Result<()> {
        stop(&layout(dir)?).await
    }
}

impl Drop for ApiServer {
    fn drop(&mut self) {
        if let Some(mut guard) = self.guard.take() {
            drop(guard.stdin.take());
            let _ = guard.wait();
        }
    }
}

fn layout(dir: Option<&Path>) -> Result<Layout> {
    let dir = match dir {
        Some(d) => std::path::absolute(d).with_context(|| format!("the folder {}", d.display()))?,
        None => cache()?.join("api/default"),
    };
    Ok(Layout::at(&dir))
}

fn guard(layout: &Layout) -> Result<std::process::Child> {
    let pids: Vec<_> = PARTS
        .iter()
        .filter_map(|p| daemon::record(layout, p))
        .map(|r| r.pid.to_string())
        .collect();
    // A number alone is never enough: the command must name our folder, too.
    let script = "read -r _; for p in $2; do tr '\\0' ' ' </proc/$p/cmdline 2>/dev/null | grep -qF -- \"$1/\" \
                  && kill -KILL $p; done; sleep 0.1; rm -rf -- \"$1\"";
    std::process::Command::new("setsid")
        .args(["sh", "-c", script, "guard"])
        .arg(layout.root())
        .arg(pids.join(" "))
        .current_dir("/")
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .context("starting the guard of an API server")
}

async fn stop(layout: &Layout) -> Result<()> {
    for part in PARTS {
        daemon::stop(layout, part, Duration::from_secs(1)).await?;
    }
    match fs::remove_dir_all(layout.root()) {
        Err(e) if e.kind() != std::io::ErrorKind::NotFound => {
            Err(e).with_context(|| format!("removing {}", layout.root().display()))
        }
        _ => Ok(()),
    }
}

/// Ports that nobody listens on. They are all held until all are found, so that they differ.
/// Below the ports that the kernel gives to connections (32768 and up): one of those may be a client's by the time that
/// the server for which it was chosen starts.
const PORTS: std::ops::Range<u16> = 20_000..30_000;

fn free_ports() -> Result<[u16; 6]> {
    let mut held = Vec::new();
    let mut ports = [0; 6];
    for port in &mut ports {
        let free = (0..1000).find_map(|_| {
            let port = rand::random_range(PORTS);
            let listener = TcpListener::bind(("127.0.0.1", port)).ok()?;
            Some((port, listener))
        });
        let (number, listener) = free.context("looking for a free port")?;
        *port = number;
        held.push(listener);
    }
    Ok(ports)
}

fn fake_node(node: &Node) -> Result<KubeNode> {
    let mut labels: serde_json::Map<_, _> = node
        .labels()
        .into_iter()
        .map(|(key, value)| (key.to_owned(), json!(value)))
        .collect();
    for (key, value) in [
        ("kubernetes.io/hostname", node.name),
        ("kubernetes.io/os", "linux"),
        ("kubernetes.io/arch", "amd64"),
        ("type", "kwok"),
    ] {
        labels.insert(key.to_owned(), json!(value));
    }
    let resources = json!({"cpu": "16", "memory": "64Gi", "pods": "110"});
    serde_json::from_value(json!({
        "metadata": {"name": node.name, "labels": labels, "annotations": {"kwok.x-k8s.io/node": "fake"}},
        "spec": {"providerID": node.provider_id()},
        "status": {"allocatable": resources, "capacity": resources},
    }))
    .context("a fake node")
}

async fn launch(layout: &Layout) -> Result<Client> {
    for tool in [&KUBERNETES, &ETCD, &KWOK] {
        tool.ensure().await?;
    }
    let dir = layout.root();
    fs::create_dir_all(dir).with_context(|| format!("making {}", dir.display()))?;
    let _lock = tools::lock(&dir.join("lock"), "another 'api up'").await?;
    let ports_file = dir.join("ports.json");
    let ports: [u16; 6] = match fs::read(&ports_file)
        .ok()
        .and_then(|t| serde_json::from_slice(&t).ok())
    {
        Some(ports) => ports,
        None => {
            let ports = free_ports()?;
            crate::layout::write_atomically(&ports_file, &serde_json::to_vec(&ports)?)?;
            ports
        }
    };
    let [port, etcd_client, etcd_peer, manager, scheduler, kwok_port] = ports;
    let place = Place {
        bind: "127.0.0.1".into(),
        // The API server refuses to advertise a loopback address to the cluster.
        advertise: crate::topology::CONTROL_PLANE.to_string(),
        port,
        etcd_ports: [etcd_client, etcd_peer],
        other_ports: [manager, scheduler],
        netns: None,
        contained: false,
    };
    let pki = Pki::new(layout.pki(), &format!("127.0.0.1:{port}"));
    pki.ensure()?;
    if !layout.kubeconfig().exists() {
        fs::copy(pki.kubeconfig("admin"), layout.kubeconfig())
            .context("copying the administrator's kubeconfig")?;
    }
    let client = control::client(&layout.kubeconfig()).await?;
    control::start_storage(layout, &pki, &place).await?;
    control::ready(layout, &client).await?;
    control::start_controllers(layout, &pki, &place).await?;
    let arguments = format!(
        "--kubeconfig {} --manage-all-nodes --config {} --server-address 127.0.0.1:{kwok_port} --node-ip 127.0.0.1",
        pki.kubeconfig("admin").display(),
        KWOK.path("stages.yaml")?.display(),
    );
    let kwok: Daemon = place.daemon("kwok", &KWOK.path("kwok")?, &arguments);
    daemon::ensure(layout, &kwok).await?;
    let nodes: Api<KubeNode> = Api::all(client.clone());
    for node in &NODES {
        match nodes
            .create(&PostParams::default(), &fake_node(node)?)
            .await
        {
            Err(kube::Error::Api(e)) if e.is_already_exists() => {}
            Err(e) => return Err(e).context("creating a fake node"),
            Ok(_) => {}
        }
    }
    let accounts: Api<ServiceAccount> = Api::namespaced(client.clone(), "default");
    until(
        "the fake nodes",
        Duration::from_secs(60),
        Duration::from_millis(100),
        || async {
            for part in PARTS {
                daemon::check(layout, part)?;
            }
            let ready = addons::ready_nodes(&client).await?;
            ensure!(
                ready.len() >= NODES.len(),
                "only {} are ready",
                ready.join(", ")
            );
            // Without it no pod is let into the namespace.
            accounts
                .get("default")
                .await
                .context("the default ServiceAccount")?;
            Ok(())
        },
    )
    .await?;
    Ok(client)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fake_nodes_look_like_the_real_ones() {
        let node = fake_node(&NODES[3]).unwrap();
        let labels = node.metadata.labels.unwrap();
        assert_eq!(labels["topology.kubernetes.io/region"], "us-east-1");
        assert_eq!(
            node.spec.unwrap().provider_id.unwrap(),
            "testbed:///us-east-1/e1"
        );
    }

    #[test]
    fn ports_differ() {
        let mut ports = free_ports().unwrap();
        ports.sort_unstable();
        assert!(ports.windows(2).all(|w| w[0] != w[1]));
    }
}
