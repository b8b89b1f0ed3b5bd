//! A node: containerd, kubelet and kube-proxy in a network namespace and a cgroup of its own.
//!
//! Owns their configuration. They share the machine's mounts, since a mount namespace of
//! containerd's own would hide the kubelet's volumes from the pods. Never labels a node: regions
//! and zones come from the administrator, not from the kubelet.

use crate::cgroups;
use crate::control::proxy_arguments;
use crate::daemon::{self, Daemon};
use crate::images;
use crate::layout::{Layout, write_atomically};
use crate::pki::Pki;
use crate::run::{succeeds, until, words};
use crate::seed;
use crate::tools::KUBERNETES;
use crate::topology::{CGROUP, DNS_SERVICE, Node};
use anyhow::{Context, Result, ensure};
use serde_json::json;
use std::fs;
use std::path::Path;
use std::time::Duration;

/// The names of a node's daemons.
#[must_use]
pub fn daemons(node: &Node) -> [String; 3] {
    ["containerd", "kubelet", "kube-proxy"].map(|part| format!("{}-{part}", node.name))
}

/// The configuration of a containerd that keeps everything below one folder.
pub(crate) fn containerd_config(folder: &Path, socket: &Path) -> String {
    let d = folder.display();
    // restrict_oom_score_adj: else no sandbox starts where lowering oom_score_adj isn't allowed.
    // opt, Root: else containerd makes /opt/containerd, and runc keeps its state in /run/containerd.
    format!(
        r#"version = 2
root = "{d}/containerd"
state = "{d}/run/containerd"
disabled_plugins = ["io.containerd.snapshotter.v1.aufs", "io.containerd.snapshotter.v1.btrfs", "io.containerd.snapshotter.v1.devmapper", "io.containerd.snapshotter.v1.zfs", "io.containerd.tracing.processor.v1.otlp", "io.containerd.internal.v1.tracing"]
[grpc]
  address = "{socket}"
[plugins."io.containerd.internal.v1.opt"]
  path = "{d}/opt"
[plugins."io.containerd.grpc.v1.cri"]
  restrict_oom_score_adj = true
  netns_mounts_under_state_dir = true
  sandbox_image = "docker.io/library/{pause}"
  [plugins."io.containerd.grpc.v1.cri".cni]
    bin_dir = "/usr/lib/cni"
    conf_dir = "{d}/cni"
  [plugins."io.containerd.grpc.v1.cri".containerd]
    snapshotter = "overlayfs"
    [plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc]
      runtime_type = "io.containerd.runc.v2"
      [plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc.options]
        SystemdCgroup = false
        Root = "{d}/run/runc"
"#,
        socket = socket.display(),
        pause = images::PAUSE,
    )
}

fn cni_config(layout: &Layout, node: &Node) -> String {
    json!({
        "cniVersion": "0.4.0",
        "name": node.netns(),
        "plugins": [
            {
                "type": "bridge", "bridge": "cni0", "isGateway": true, "ipMasq": false, "hairpinMode": true,
                "ipam": {
                    "type": "host-local",
                    "ranges": [[{"subnet": node.pod_net()}]],
                    "routes": [{"dst": "0.0.0.0/0"}],
                    "dataDir": layout.node(node.name).join("cni-addresses"),
                },
            },
            {"type": "portmap", "capabilities": {"portMappings": true}},
        ],
    })
    .to_string()
}

fn kubelet_config(layout: &Layout, pki: &Pki, node: &Node) -> String {
    let folder = layout.node(node.name);
    let identity = format!("node-{}", node.name);
    json!({
        "apiVersion": "kubelet.config.k8s.io/v1beta1",
        "kind": "KubeletConfiguration",
        "address": node.address(),
        "authentication": {
            "x509": {"clientCAFile": pki.certificate("ca")},
            "webhook": {"enabled": true},
            "anonymous": {"enabled": false},
        },
        "authorization": {"mode": "Webhook"},
        "tlsCertFile": pki.certificate(&identity),
        "tlsPrivateKeyFile": pki.key(&identity),
        "cgroupDriver": "cgroupfs",
        "cgroupRoot": format!("/{CGROUP}/{}", node.name),
        "cgroupsPerQOS": true,
        "enforceNodeAllocatable": ["pods"],
        "failSwapOn": false,
        "failCgroupV1": false,
        "containerRuntimeEndpoint": format!("unix://{}", layout.containerd_socket(node.name).display()),
        "podLogsDir": folder.join("podlogs"),
        "volumePluginDir": folder.join("volume-plugins"),
        "staticPodPath": "",
        "clusterDomain": "cluster.local",
        "clusterDNS": [DNS_SERVICE],
        "resolvConf": "",
        "nodeStatusUpdateFrequency": "10s",
        // The disk is the machine's, and shared: a full one must not drive pods away.
        "evictionHard": {"memory.available": "100Mi"},
        "imageGCHighThresholdPercent": 100,
        "imageGCLowThresholdPercent": 99,
        "makeIPTablesUtilChains": false,
        "providerID": node.provider_id(),
        "maxPods": 100,
        "logging": {"verbosity": 1},
    })
    .to_string()
}

fn daemon_of(node: &Node, part: &str, program: &Path, arguments: &str) -> Daemon {
    let mut command = vec![program.display().to_string()];
    command.extend(words(arguments));
    Daemon {
        name: format!("{}-{part}", node.name),
        netns: Some(node.netns()),
        command,
        contained: true,
    }
}

/// Starts a node, with the images of the seed.
///
/// # Errors
/// If a part doesn't start: with the end of its log.
pub async fn start(layout: &Layout, pki: &Pki, node: &Node, seed: &Path) -> Result<()> {
    let folder = layout.node(node.name);
    for part in ["run", "cni", "podlogs", "kubelet", "volumes"] {
        let path = folder.join(part);
        fs::create_dir_all(&path).with_context(|| format!("making {}", path.display()))?;
    }
    cgroups::create(node.name)?;
    let containerd = folder.join("containerd.toml");
    write_atomically(
        &containerd,
        containerd_config(&folder, &layout.containerd_socket(node.name)).as_bytes(),
    )?;
    write_atomically(
        &folder.join("cni/10-bridge.conflist"),
        cni_config(layout, node).as_bytes(),
    )?;
    let kubelet = folder.join("kubelet.json");
    write_atomically(&kubelet, kubelet_config(layout, pki, node).as_bytes())?;

    seed::plant(seed, &folder.join("containerd")).await?;
    let d = daemon_of(
        node,
        "containerd",
        Path::new("containerd"),
        &format!("-c {}", containerd.display()),
    );
    daemon::ensure(layout, &d).await?;
    answers(layout, &d.name, &layout.containerd_socket(node.name)).await?;

    let arguments = format!(
        "--config {} --kubeconfig {} --cert-dir {} --root-dir {} --hostname-override {} --node-ip {}",
        kubelet.display(),
        pki.kubeconfig(&format!("node-{}", node.name)).display(),
        folder.join("kubelet-pki").display(),
        folder.join("kubelet").display(),
        node.name,
        node.address(),
    );
    daemon::ensure(
        layout,
        &daemon_of(node, "kubelet", &KUBERNETES.path("kubelet")?, &arguments),
    )
    .await?;
    let arguments = proxy_arguments(pki, node.name);
    daemon::ensure(
        layout,
        &daemon_of(
            node,
            "kube-proxy",
            &KUBERNETES.path("kube-proxy")?,
            &arguments,
        ),
    )
    .await
}

/// Waits until a containerd answers.
///
/// # Errors
/// If it doesn't within half a minute, or has ended: with the end of its log.
pub(crate) async fn answers(layout: &Layout, daemon: &str, socket: &Path) -> Result<()> {
    let socket = socket.display().to_string();
    let (limit, every) = (Duration::from_secs(30), Duration::from_millis(100));
    until(daemon, limit, every, || async {
        daemon::check(layout, daemon)?;
        ensure!(
            succeeds(&["ctr", "-a", &socket, "version"]).await,
            "no answer; {}",
            daemon::tail(layout, daemon)
        );
        Ok(())
    })
    .await
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::topology::NODES;

    #[test]
    fn nodes_share_no_path_and_tell_no_region_themselves() {
        let layout = Layout::at(Path::new("/state"));
        let pki = crate::control::pki(&layout);
        let [w1, w2, ..] = &NODES;
        for text in [
            containerd_config(&layout.node(w2.name), &layout.containerd_socket(w2.name)),
            cni_config(&layout, w2),
            kubelet_config(&layout, &pki, w2),
        ] {
            assert!(!text.contains("/w1"), "{text}");
            assert!(!text.contains("topology.kubernetes.io"), "{text}");
        }
        assert!(kubelet_config(&layout, &pki, w1).contains("testbed:///us-west-2/w1"));
        serde_json::from_str::<serde_json::Value>(&cni_config(&layout, w1)).unwrap();
    }
}
