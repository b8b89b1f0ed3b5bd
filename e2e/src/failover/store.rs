//! A store on the test bed as its user sees it: status, Secret, and what each instance says of itself.
//!
//! Only looks. Uses nothing but what is documented: the status, `STORE-app`, the instances' Services, and
//! `/status` at an instance's port 8008.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use k8s_openapi::api::core::v1::{Secret, Service};
use k8s_openapi::api::discovery::v1::EndpointSlice;
use kube::Api;
use kube::api::{DynamicObject, ListParams};
use serde::Deserialize;
use serde_json::Value;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use super::target::Target;
use crate::harness::{PATIENCE, Scope, condition};
use crate::net::inside;
use crate::run::until;

/// The port at which an instance says how it is.
const STATUS_PORT: u16 = 8008;
/// How long an instance may take to say so.
const ASK: Duration = Duration::from_secs(1);
/// What an instance says is bounded, whoever answers.
const ANSWER: u64 = 1 << 20;

/// One instance of the status.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(default)]
pub struct Instance {
    /// Its name.
    pub name: String,
    /// Starting, Primary, Standby, Failed.
    pub role: String,
    /// Whether it serves.
    pub ready: bool,
    /// Where it is reached.
    pub address: Option<IpAddr>,
    /// Its node.
    pub node: String,
    /// Its region.
    pub region: String,
    /// What it says.
    pub message: String,
}

/// A store's status.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Status {
    /// Who is primary.
    pub primary: String,
    /// The term.
    pub term: i64,
    /// The condition Ready is True.
    pub ready: bool,
    /// Reason and message of the condition Available, or else Ready, while it is False.
    pub down: Option<(String, String)>,
    /// The instances, by name.
    pub instances: Vec<Instance>,
}

impl Status {
    /// Reads it.
    #[must_use]
    pub fn of(store: &DynamicObject) -> Self {
        let status = &store.data["status"];
        let mut instances: Vec<Instance> =
            serde_json::from_value(status["instances"].clone()).unwrap_or_default();
        instances.sort_by(|a, b| a.name.cmp(&b.name));
        Self {
            primary: status["primary"].as_str().unwrap_or_default().to_owned(),
            term: status["term"].as_i64().unwrap_or_default(),
            ready: condition(store, "Ready").is_some_and(|c| c.0 == "True")
                && status["observedGeneration"].as_i64() == store.metadata.generation,
            down: ["Available", "Ready"]
                .iter()
                .filter_map(|kind| condition(store, kind))
                .find(|(status, reason, _)| status == "False" && !reason.is_empty())
                .map(|(_, reason, message)| (reason, message)),
            instances,
        }
    }

    /// One instance.
    ///
    /// # Errors
    /// If it isn't listed.
    pub fn instance(&self, name: &str) -> Result<&Instance> {
        let found = self.instances.iter().find(|i| i.name == name);
        found.with_context(|| format!("the status doesn't list {name}"))
    }

    /// The primary and its standbys all serve.
    #[must_use]
    pub fn whole(&self) -> bool {
        self.ready
            && self.instances.iter().all(|i| {
                let wanted = if i.name == self.primary {
                    "Primary"
                } else {
                    "Standby"
                };
                i.ready && i.role == wanted && i.address.is_some()
            })
    }
}

/// What an instance says of itself at `/status`.
///
/// # Errors
/// If it doesn't answer, or not as it should.
pub async fn ask(address: IpAddr) -> Result<Value> {
    tokio::time::timeout(ASK, async {
        let mut stream = TcpStream::connect((address, STATUS_PORT)).await?;
        let request =
            format!("GET /status HTTP/1.1\r\nHost: {address}\r\nConnection: close\r\n\r\n");
        stream.write_all(request.as_bytes()).await?;
        let mut answer = String::new();
        stream.take(ANSWER).read_to_string(&mut answer).await?;
        let (head, body) = answer.split_once("\r\n\r\n").context("half an answer")?;
        ensure!(head.starts_with("HTTP/1.1 200"), "it says {head}");
        serde_json::from_str(body).context("not JSON")
    })
    .await
    .context("no answer in time")?
}

/// How applications reach a store: the Secret's URI, with the addresses of the instances' Services.
///
/// # Errors
/// If the Secret or a Service is missing something.
pub async fn target(scope: &Scope, store: &str) -> Result<Target> {
    let secret = scope.api::<Secret>().get(&format!("{store}-app")).await?;
    let data = secret.data.unwrap_or_default();
    let text = |key: &str| -> Result<String> {
        let bytes = data
            .get(key)
            .with_context(|| format!("the Secret {store}-app has no {key}"))?;
        String::from_utf8(bytes.0.clone()).with_context(|| format!("{key} of {store}-app"))
    };
    let mut addresses = BTreeMap::new();
    for host in text("hosts")?.split(',') {
        let name = host.split([':', '.']).next().unwrap_or_default();
        let service = scope.api::<Service>().get(name).await?;
        let address = service.spec.and_then(|s| s.cluster_ip);
        let address = address.with_context(|| format!("the Service {name} has no address"))?;
        let host = host.split(':').next().unwrap_or_default();
        addresses.insert(host.to_owned(), address.parse()?);
    }
    Target::from_uri(&text("uri")?, &text("ca.crt")?, &addresses)
}

/// Kubernetes' own controllers come back to an API server that was away with pauses that double: more than a minute was
/// seen between its return and a Service that leads to a pod's new address.
const KUBERNETES: Duration = Duration::from_secs(240);

/// Waits until every instance can be reached from a node. kube-proxy there learns from the API server of a pod's new
/// address; where that was away, it asks it again only after a pause of its own, and a fault in that moment would measure
/// its pause: clients had to wait 20 to 39 s for a primary that had served after half a second.
///
/// # Errors
/// If it doesn't come to that in time.
pub async fn reachable(netns: &str, target: &Target) -> Result<()> {
    for host in &target.hosts {
        let dial = format!("exec 3<>/dev/tcp/{}/{}", host.address, host.port);
        until(
            "kube-proxy leads to where instances are",
            KUBERNETES,
            Duration::from_millis(200),
            || async {
                let dialled = inside(netns, &["timeout", "1", "bash", "-c", &dial]).await;
                dialled.with_context(|| format!("{} from {netns}", host.name))
            },
        )
        .await?;
    }
    Ok(())
}

/// Waits until every standby has a session ready with each of the others, as it has with whoever is in another region. After a
/// failover that takes some fifteen seconds; a fault within them is one that most stores don't meet.
///
/// # Errors
/// If it doesn't come to that in time.
pub async fn sessions(status: &Status) -> Result<()> {
    let standbys = || status.instances.iter().filter(|i| i.name != status.primary);
    for standby in standbys() {
        let address = standby.address.context("a standby has no address")?;
        let far = |other: &&Instance| other.name != standby.name && other.region != standby.region;
        let wanted: Vec<&str> = standbys().filter(far).map(|i| i.name.as_str()).collect();
        until(
            "sessions are ready between regions",
            Duration::from_secs(90),
            Duration::from_millis(200),
            || async {
                let says = ask(address).await?;
                let ready = says["sessions"].as_array().cloned().unwrap_or_default();
                let missing = wanted.iter().find(|w| !ready.iter().any(|r| r == **w));
                ensure!(
                    missing.is_none(),
                    "{} lacks one with {missing:?}",
                    standby.name
                );
                Ok(())
            },
        )
        .await?;
    }
    Ok(())
}

/// Waits until all instances serve, and the primary itself says that all others stream from it.
///
/// # Errors
/// If it doesn't come to that in time.
pub async fn healthy(scope: &Scope, store: &str) -> Result<Status> {
    let found = scope
        .wait(store, PATIENCE, |s| Status::of(s).whole())
        .await?;
    let status = Status::of(&found);
    let address = status.instance(&status.primary)?.address;
    let address = address.context("the primary has no address")?;
    // Who streams is in no object of the API: it would change too often.
    until(
        "all standbys stream",
        Duration::from_secs(60),
        Duration::from_millis(100),
        || async {
            let said = ask(address).await?;
            let streaming = said["replication"]
                .as_array()
                .into_iter()
                .flatten()
                .filter(|r| r["state"] == "streaming");
            ensure!(
                streaming.count() + 1 >= status.instances.len(),
                "{} says {said}",
                status.primary
            );
            Ok(())
        },
    )
    .await?;
    for instance in &status.instances {
        routed(scope, instance).await?;
    }
    Ok(status)
}

/// Waits until Kubernetes knows the address under which an instance's Service is to lead to it: a pod may have got another
/// while the API server was away, and a fault in that moment would measure Kubernetes' Services.
async fn routed(scope: &Scope, instance: &Instance) -> Result<()> {
    let slices: Api<EndpointSlice> = scope.api();
    let ours =
        ListParams::default().labels(&format!("kubernetes.io/service-name={}", instance.name));
    let wanted = instance.address.map(|a| a.to_string());
    until(
        "Services lead to where instances are",
        KUBERNETES,
        Duration::from_millis(100),
        || async {
            let found = slices.list(&ours).await?;
            let mut endpoints = found
                .items
                .iter()
                .flat_map(|s| s.endpoints.iter().flatten());
            ensure!(
                endpoints.any(|e| e.addresses.first() == wanted.as_ref()),
                "{} is at {wanted:?}, and its Service leads elsewhere",
                instance.name
            );
            Ok(())
        },
    )
    .await
}
