//! The control plane: etcd, API server, controller manager, scheduler and a kube-proxy of its own,
//! in one network namespace.
//!
//! The kube-proxy is there so that the API server reaches webhooks through their Services. Owns
//! how these five are started. Never creates an object: that is `addons`'.

use crate::daemon::{self, Daemon};
use crate::layout::Layout;
use crate::pki::{FRONT_PROXY, Pki};
use crate::run::{until, words};
use crate::tools::{ETCD, KUBERNETES};
use crate::topology::{API_PORT, CONTROL_PLANE, CONTROL_PLANE_NS, NODES, POD_NET, SERVICE_NET};
use anyhow::{Context, Result};
use kube::Client;
use kube::config::{KubeConfigOptions, Kubeconfig};
use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// The names of the daemons, in the order in which they are started.
pub const PARTS: [&str; 5] = [
    "etcd",
    "kube-apiserver",
    "kube-controller-manager",
    "kube-scheduler",
    "kube-proxy",
];

/// The keys of the test bed.
#[must_use]
pub fn pki(layout: &Layout) -> Pki {
    Pki::new(layout.pki(), &format!("{CONTROL_PLANE}:{API_PORT}"))
}

/// The ports and places of a control plane: the real one's, or those of one without nodes.
#[derive(Clone, Debug)]
pub struct Place {
    /// Where the API server listens.
    pub bind: String,
    /// What it tells others of itself.
    pub advertise: String,
    /// The port of the API server.
    pub port: u16,
    /// The ports of etcd.
    pub etcd_ports: [u16; 2],
    /// The ports of controller manager and scheduler.
    pub other_ports: [u16; 2],
    /// The network namespace.
    pub netns: Option<String>,
    /// Whether everything runs in the test bed's cgroup.
    pub contained: bool,
}

impl Place {
    /// The place of the real control plane.
    #[must_use]
    pub fn testbed() -> Self {
        Self {
            bind: "0.0.0.0".into(),
            advertise: CONTROL_PLANE.to_string(),
            port: API_PORT,
            etcd_ports: [2379, 2380],
            other_ports: [10257, 10259],
            netns: Some(CONTROL_PLANE_NS.into()),
            contained: true,
        }
    }

    /// A daemon of this control plane.
    #[must_use]
    pub fn daemon(&self, name: &str, program: &Path, arguments: &str) -> Daemon {
        let mut command = vec![program.display().to_string()];
        command.extend(words(arguments));
        Daemon {
            name: name.into(),
            netns: self.netns.clone(),
            command,
            contained: self.contained,
        }
    }
}

/// Starts etcd and the API server.
///
/// # Errors
/// If one can't be started.
pub async fn start_storage(layout: &Layout, pki: &Pki, place: &Place) -> Result<()> {
    let [client, peer] = place.etcd_ports;
    let (c, p) = (
        format!("http://127.0.0.1:{client}"),
        format!("http://127.0.0.1:{peer}"),
    );
    let data = layout.etcd();
    fs::create_dir_all(&data).with_context(|| format!("making {}", data.display()))?;
    let etcd = place.daemon(
        "etcd",
        &ETCD.path("etcd")?,
        &format!(
            "--data-dir {} --listen-client-urls {c} --advertise-client-urls {c} --listen-peer-urls {p} \
             --initial-advertise-peer-urls {p} --initial-cluster default={p} --unsafe-no-fsync --log-level warn",
            data.display()
        ),
    );
    daemon::ensure(layout, &etcd).await?;
    let (ca, crt, key) = (
        pki.certificate("ca"),
        pki.certificate("apiserver"),
        pki.key("apiserver"),
    );
    let audit_policy = layout.root().join("audit-policy.json");
    fs::write(&audit_policy, audit_policy_text())
        .with_context(|| format!("writing {}", audit_policy.display()))?;
    let apiserver = place.daemon(
        "kube-apiserver",
        &KUBERNETES.path("kube-apiserver")?,
        &format!(
            "--etcd-servers {c} --advertise-address {} --bind-address {} --secure-port {} --client-ca-file {} \
             --tls-cert-file {} --tls-private-key-file {} --kubelet-client-certificate {} --kubelet-client-key {} \
             --kubelet-certificate-authority {} --service-account-key-file {} --service-account-signing-key-file {} \
             --service-account-issuer https://kubernetes.default.svc --service-cluster-ip-range {SERVICE_NET} \
             --authorization-mode Node,RBAC --enable-admission-plugins NodeRestriction --allow-privileged \
             --kubelet-preferred-address-types InternalIP --profiling=false \
             --proxy-client-cert-file {} --proxy-client-key-file {} --requestheader-client-ca-file {} \
             --requestheader-allowed-names {FRONT_PROXY} --requestheader-username-headers X-Remote-User \
             --requestheader-group-headers X-Remote-Group --requestheader-extra-headers-prefix X-Remote-Extra- \
             --audit-policy-file {} --audit-log-path {} --audit-log-maxsize 500",
            place.advertise,
            place.bind,
            place.port,
            ca.display(),
            crt.display(),
            key.display(),
            pki.certificate("kubelet-client").display(),
            pki.key("kubelet-client").display(),
            ca.display(),
            pki.service_account_public().display(),
            pki.key("service-accounts").display(),
            pki.certificate(FRONT_PROXY).display(),
            pki.key(FRONT_PROXY).display(),
            pki.certificate("front-proxy-ca").display(),
            audit_policy.display(),
            audit_log(layout).display(),
        ),
    );
    daemon::ensure(layout, &apiserver).await
}

/// Where the API server writes down who wrote what: one JSON object a line.
#[must_use]
pub fn audit_log(layout: &Layout) -> PathBuf {
    layout.logs().join("audit.log")
}

/// Every write, without its content; no reads.
fn audit_policy_text() -> String {
    serde_json::json!({
        "apiVersion": "audit.k8s.io/v1", "kind": "Policy",
        "omitStages": ["RequestReceived"],
        "rules": [
            { "level": "None", "verbs": ["get", "list", "watch"] },
            { "level": "Metadata" },
        ],
    })
    .to_string()
}

/// Starts controller manager and scheduler.
///
/// # Errors
/// If one can't be started.
pub async fn start_controllers(layout: &Layout, pki: &Pki, place: &Place) -> Result<()> {
    let config = |name: &str| {
        let k = pki.kubeconfig(name).display().to_string();
        format!(
            "--kubeconfig {k} --authentication-kubeconfig {k} --authorization-kubeconfig {k} --leader-elect=false --bind-address 127.0.0.1"
        )
    };
    let [manager, scheduler] = place.other_ports;
    let ca = pki.certificate("ca");
    let d = place.daemon(
        "kube-controller-manager",
        &KUBERNETES.path("kube-controller-manager")?,
        &format!(
            "{} --secure-port {manager} --service-account-private-key-file {} --root-ca-file {} \
             --cluster-signing-cert-file {} --cluster-signing-key-file {} --use-service-account-credentials \
             --flex-volume-plugin-dir {} --profiling=false",
            config("controller-manager"),
            pki.key("service-accounts").display(),
            ca.display(),
            ca.display(),
            pki.key("ca").display(),
            layout.root().join("volume-plugins").display(),
        ),
    );
    daemon::ensure(layout, &d).await?;
    let arguments = format!(
        "{} --secure-port {scheduler} --profiling=false",
        config("scheduler")
    );
    daemon::ensure(
        layout,
        &place.daemon(
            "kube-scheduler",
            &KUBERNETES.path("kube-scheduler")?,
            &arguments,
        ),
    )
    .await
}

/// The arguments of a kube-proxy.
#[must_use]
pub fn proxy_arguments(pki: &Pki, node: &str) -> String {
    // Zero: the machine's own limits on connections are left alone.
    format!(
        "--kubeconfig {} --hostname-override {node} --proxy-mode nftables --cluster-cidr {POD_NET} \
         --nodeport-addresses primary --conntrack-max-per-core 0 --conntrack-min 0 \
         --conntrack-tcp-timeout-established 0s --conntrack-tcp-timeout-close-wait 0s",
        pki.kubeconfig("proxy").display()
    )
}

/// Starts the control plane's kube-proxy.
///
/// # Errors
/// If it can't be started.
pub async fn start_proxy(layout: &Layout, pki: &Pki, place: &Place) -> Result<()> {
    // kube-proxy waits half a minute for a node of its name, and the control plane is none. It
    // goes by the first node's; that only matters for Services with a local traffic policy.
    let arguments = proxy_arguments(pki, NODES[0].name);
    daemon::ensure(
        layout,
        &place.daemon("kube-proxy", &KUBERNETES.path("kube-proxy")?, &arguments),
    )
    .await
}

/// A client of a kubeconfig.
///
/// # Errors
/// If the file can't be understood.
pub async fn client(kubeconfig: &Path) -> Result<Client> {
    let file = Kubeconfig::read_from(kubeconfig)
        .with_context(|| format!("reading {}", kubeconfig.display()))?;
    let mut config =
        kube::Config::from_custom_kubeconfig(file, &KubeConfigOptions::default()).await?;
    // Whoever is cut off should learn it soon.
    config.connect_timeout = Some(Duration::from_secs(5));
    // The environment's proxies are for the outside world.
    config.proxy_url = None;
    Client::try_from(config).context("making a client")
}

/// Waits until the API server answers that it's ready.
///
/// # Errors
/// If it isn't within a minute, or has ended: with the end of its log.
pub async fn ready(layout: &Layout, client: &Client) -> Result<()> {
    let look = || async {
        for part in ["etcd", "kube-apiserver"] {
            daemon::check(layout, part)?;
        }
        let request = http::Request::get("/readyz")
            .body(Vec::new())
            .context("making a request")?;
        client
            .request_text(request)
            .await
            .context("asking for /readyz")?;
        Ok(())
    };
    let waited = until(
        "the API server",
        Duration::from_secs(60),
        Duration::from_millis(100),
        look,
    )
    .await;
    waited.with_context(|| daemon::tail(layout, "kube-apiserver"))
}
