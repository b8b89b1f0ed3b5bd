//! The API server: the store's object comes in, this instance's report goes out.
//!
//! Owns the client, the watch of the own store, the report under the instance's own field manager, the two
//! EndpointSlices, and the way to the witness's object (what it holds is `agent::witness`'s). Every call has a deadline; every failure is tried again after a growing pause.
//! Never: is on the way of anything PostgreSQL does, but of a vote that only the witness can give; writes when nothing changed; writes an object of
//! another uid, or an EndpointSlice of a later term.

use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context as _, anyhow};
use futures::future::BoxFuture;
use futures::{FutureExt as _, StreamExt as _, TryStreamExt as _};
use k8s_openapi::api::core::v1::ConfigMap;
use k8s_openapi::api::discovery::v1::{Endpoint, EndpointConditions, EndpointSlice};
use kube::api::{Api, Patch, PatchParams, PostParams};
use kube::runtime::watcher;
use kube::{Client, ResourceExt as _};
use rand::Rng as _;
use serde_json::json;
use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio::time::Instant;
use tracing::{debug, info, warn};

use super::config::Config;
use super::store::{self, Endpoints, Wish};
use crate::api::privacy_data_store::{AgreedConfiguration, InstanceStatus, LastFailover};
use crate::api::{GROUP, PrivacyDataStore, VERSION, labels, names};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::MicroTime;

/// One call.
const CALL: Duration = Duration::from_secs(10);
/// A watch is begun anew this often; a dead connection is noticed a little later.
const WATCH_SECONDS: u32 = 45;
/// The longest pause after failures.
const PAUSE_MAX: Duration = Duration::from_secs(10);
/// The least time between two writes.
const WRITE_EVERY: Duration = Duration::from_secs(1);
/// How often an EndpointSlice is read again although nothing changed: somebody may have emptied it.
const LOOK_EVERY: Duration = Duration::from_secs(60);
/// For how long the watch may lag behind a write of ours before it counts as somebody else's change.
const SETTLE: Duration = Duration::from_secs(10);

/// Connects in the background. The tasks end when the set is dropped.
#[must_use]
pub fn connect(config: &Config) -> (store::Api, JoinSet<()>) {
    let (store_tx, store_rx) = watch::channel(None);
    let (wish_tx, wish_rx) = watch::channel(None);
    let mut tasks = JoinSet::new();
    let (client_tx, client) = watch::channel(None);
    let witness = Witness {
        client,
        namespace: config.namespace.clone(),
        name: names::witness(&config.store),
    };
    let run = run(
        config.clone(),
        client_tx,
        store_tx,
        store_rx.clone(),
        wish_rx,
    );
    tasks.spawn(run);
    let api = store::Api {
        store: store_rx,
        wish: wish_tx,
        witness: Arc::new(witness),
    };
    (api, tasks)
}

/// The witness's object in the API server. Its deadline is the asker's.
struct Witness {
    client: watch::Receiver<Option<Client>>,
    namespace: String,
    name: String,
}

impl std::fmt::Debug for Witness {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Witness").field("name", &self.name).finish()
    }
}

impl Witness {
    fn api(&self) -> anyhow::Result<Api<ConfigMap>> {
        let client = self.client.borrow().clone();
        let client = client.context("there is no way to the API server yet")?;
        Ok(Api::namespaced(client, &self.namespace))
    }
}

impl store::Shelf for Witness {
    fn read(&self) -> BoxFuture<'_, anyhow::Result<Option<ConfigMap>>> {
        async { Ok(self.api()?.get_opt(&self.name).await?) }.boxed()
    }

    fn replace(&self, object: ConfigMap) -> BoxFuture<'_, anyhow::Result<bool>> {
        async move {
            let params = PostParams::default();
            match self.api()?.replace(&self.name, &params, &object).await {
                Ok(_) => Ok(true),
                Err(kube::Error::Api(status)) if status.is_conflict() || status.is_not_found() => {
                    Ok(false)
                }
                Err(e) => Err(e.into()),
            }
        }
        .boxed()
    }
}

type StoreView = Option<Arc<PrivacyDataStore>>;

async fn run(
    config: Config,
    client_tx: watch::Sender<Option<Client>>,
    store_tx: watch::Sender<StoreView>,
    store_rx: watch::Receiver<StoreView>,
    wish: watch::Receiver<Option<Wish>>,
) {
    let mut pause = Pause::default();
    let client = loop {
        match client().await {
            Ok(client) => break client,
            Err(e) => warn!("can't set up the way to the API server: {e:#}"),
        }
        pause.wait().await;
    };
    client_tx.send_replace(Some(client.clone()));
    let stores: Api<PrivacyDataStore> = Api::namespaced(client.clone(), &config.namespace);
    let writer = Writer {
        stores: stores.clone(),
        slices: Api::namespaced(client, &config.namespace),
        config: config.clone(),
        written: None,
        routed: None,
        read_write: None,
        read_only: None,
    };
    tokio::join!(
        observe(stores, &config.store, store_tx),
        writer.run(wish, store_rx)
    );
}

async fn client() -> anyhow::Result<Client> {
    let mut config = if std::env::var_os("KUBECONFIG").is_some() {
        kube::Config::from_kubeconfig(&kube::config::KubeConfigOptions::default()).await?
    } else {
        kube::Config::incluster()?
    };
    // Pauses are ours: the client's own would hold a newer report back behind an older one.
    config.default_retry = false;
    config.connect_timeout = Some(Duration::from_secs(5));
    Ok(Client::try_from(config)?)
}

/// Watches the own store for ever.
async fn observe(stores: Api<PrivacyDataStore>, name: &str, to: watch::Sender<StoreView>) {
    let selector = format!("metadata.name={name}");
    let config = watcher::Config::default()
        .fields(&selector)
        .timeout(WATCH_SECONDS);
    let mut pause = Pause::default();
    loop {
        let mut events = watcher(stores.clone(), config.clone()).boxed();
        loop {
            match events.try_next().await {
                Ok(Some(watcher::Event::Apply(seen) | watcher::Event::InitApply(seen))) => {
                    pause.reset();
                    let seen = Arc::new(store::pruned(seen));
                    to.send_if_modified(|now| match store::newer(now.as_ref(), &seen) {
                        Some(newer) => {
                            *now = Some(newer);
                            true
                        }
                        None => false,
                    });
                }
                Ok(Some(watcher::Event::Delete(_))) => {
                    info!("the store's object is gone; what it said last stays");
                }
                Ok(Some(watcher::Event::InitDone)) => pause.reset(),
                // Only begins to ask: no sign yet that anybody answers.
                Ok(Some(watcher::Event::Init)) => {}
                Ok(None) => break,
                Err(e) => {
                    warn!("can't watch the store: {}", reason(&e));
                    // The watcher goes on where it was.
                    pause.wait().await;
                }
            }
        }
        pause.wait().await;
    }
}

/// The pause between two writes; over at once when another is to be routed to.
async fn rest(wish: &mut watch::Receiver<Option<Wish>>, routed: Option<&Endpoints>) {
    let moved = wish.wait_for(|w| {
        w.as_ref()
            .is_some_and(|w| w.read_write.is_some() && w.read_write.as_ref() != routed)
    });
    let _ = tokio::time::timeout(WRITE_EVERY, moved).await;
}

/// An error without the object that it may carry.
fn reason(error: &impl std::fmt::Display) -> String {
    error.to_string().chars().take(300).collect()
}

#[derive(Default)]
struct Pause(Duration);

impl Pause {
    fn reset(&mut self) {
        self.0 = Duration::ZERO;
    }

    fn next(&mut self) -> Duration {
        self.0 = (self.0 * 2).clamp(Duration::from_millis(250), PAUSE_MAX);
        // Many instances that lost the same API server must not come back in step.
        self.0.mul_f64(rand::rng().random_range(0.5..1.0))
    }

    async fn wait(&mut self) {
        tokio::time::sleep(self.next()).await;
    }
}

struct Writer {
    stores: Api<PrivacyDataStore>,
    slices: Api<EndpointSlice>,
    config: Config,
    written: Option<(Report, Instant)>,
    read_write: Option<(Endpoints, Instant)>,
    read_only: Option<(Endpoints, Instant)>,
    /// When the Service was first seen to lead here, in which term.
    routed: Option<(i64, jiff::Timestamp)>,
}

/// What an instance writes into the store's status.
#[derive(Clone, Debug, PartialEq)]
struct Report {
    entry: InstanceStatus,
    configuration: Option<AgreedConfiguration>,
    failover: Option<LastFailover>,
}

impl Writer {
    async fn run(
        mut self,
        mut wish: watch::Receiver<Option<Wish>>,
        mut store: watch::Receiver<StoreView>,
    ) {
        let mut pause = Pause::default();
        loop {
            let now = wish.borrow_and_update().clone();
            let view = store.borrow_and_update().clone();
            let mut failed = false;
            if let Some(now) = now {
                match self.fulfil(&now, view.as_deref()).await {
                    Ok(wrote) => {
                        pause.reset();
                        if wrote {
                            rest(&mut wish, now.read_write.as_ref()).await;
                        }
                    }
                    Err(e) => {
                        failed = true;
                        warn!(
                            "can't report to the API server: {}",
                            reason(&format!("{e:#}"))
                        );
                    }
                }
            }
            if failed {
                pause.wait().await;
                continue;
            }
            tokio::select! {
                changed = wish.changed() => if changed.is_err() { return },
                changed = store.changed() => if changed.is_err() { return },
                () = tokio::time::sleep(LOOK_EVERY / 4) => {}
            }
        }
    }

    /// Writes what differs. Returns whether anything was written.
    async fn fulfil(
        &mut self,
        wish: &Wish,
        view: Option<&PrivacyDataStore>,
    ) -> anyhow::Result<bool> {
        let mut wrote = false;
        // The way to the primary first: clients wait for it.
        if let Some(endpoints) = &wish.read_write {
            let name = names::rw(&self.config.store);
            let written = publish(&self.slices, &name, endpoints, &mut self.read_write).await?;
            if written {
                self.routed = Some((endpoints.term, jiff::Timestamp::now()));
            }
            wrote |= written;
        }
        let report = self.wanted(wish);
        if self.differs(&report, wish, view) {
            self.report(wish, &report).await?;
            self.written = Some((report, Instant::now()));
            wrote = true;
        }
        if let Some(endpoints) = &wish.read_only {
            let name = names::ro(&self.config.store);
            wrote |= publish(&self.slices, &name, endpoints, &mut self.read_only).await?;
        }
        Ok(wrote)
    }

    fn wanted(&self, wish: &Wish) -> Report {
        let mut failover = wish.failover.clone();
        if let Some(failover) = &mut failover
            && let Some((term, at)) = self.routed
            && failover.term == term
        {
            failover.routed_at = Some(MicroTime(at));
        }
        Report {
            entry: wish.entry.clone(),
            configuration: wish.configuration.clone(),
            failover,
        }
    }

    fn differs(&self, report: &Report, wish: &Wish, view: Option<&PrivacyDataStore>) -> bool {
        let present = view.and_then(|v| store::entry(v, &self.config.instance));
        if present.is_none() && !wish.create {
            return false;
        }
        if let Some((written, at)) = &self.written
            && written == report
        {
            // Our own write may not have come back yet.
            if at.elapsed() < SETTLE {
                return false;
            }
            // What is agreed on is another's to write by now, if it differs.
            return present.map(own_fields).as_ref() != Some(&report.entry);
        }
        let status = view.and_then(|v| v.status.as_ref());
        let agreed = report.configuration.is_none()
            || status.is_some_and(|s| s.configuration == report.configuration);
        let told =
            report.failover.is_none() || status.is_some_and(|s| s.last_failover == report.failover);
        !agreed || !told || present.map(own_fields).as_ref() != Some(&report.entry)
    }

    async fn report(&self, wish: &Wish, report: &Report) -> anyhow::Result<()> {
        let mut status = json!({"instances": [report.entry]});
        if let Some(configuration) = &report.configuration {
            status["configuration"] = json!(configuration);
        }
        if let Some(failover) = &report.failover {
            status["lastFailover"] = json!(failover);
        }
        let mut metadata = json!({"name": self.config.store});
        if let Some(uid) = &wish.uid {
            metadata["uid"] = json!(uid);
        }
        let patch = json!({
            "apiVersion": format!("{GROUP}/{VERSION}"),
            "kind": "PrivacyDataStore",
            "metadata": metadata,
            "status": status,
        });
        let params =
            PatchParams::apply(&names::instance_field_manager(&self.config.instance)).force();
        let patch = Patch::Apply(&patch);
        let call = self
            .stores
            .patch_status(&self.config.store, &params, &patch);
        tokio::time::timeout(CALL, call)
            .await
            .context("the API server doesn't answer")?
            .context("the status wasn't taken")?;
        debug!("reported");
        Ok(())
    }
}

/// An entry's fields that the instance says of itself.
fn own_fields(entry: &InstanceStatus) -> InstanceStatus {
    InstanceStatus {
        region: None,
        zone: None,
        node: None,
        may_be_primary: None,
        leaving: None,
        ..entry.clone()
    }
}

/// Writes an EndpointSlice's content if it differs. Returns whether it was written.
async fn publish(
    slices: &Api<EndpointSlice>,
    name: &str,
    wanted: &Endpoints,
    last: &mut Option<(Endpoints, Instant)>,
) -> anyhow::Result<bool> {
    if last
        .as_ref()
        .is_some_and(|(e, at)| e == wanted && at.elapsed() < LOOK_EVERY)
    {
        return Ok(false);
    }
    // Twice: somebody (the operator, setting labels) may have written in between.
    for _ in 0..2 {
        let slice = tokio::time::timeout(CALL, slices.get_opt(name))
            .await
            .context("the API server doesn't answer")??
            .ok_or_else(|| anyhow!("the EndpointSlice {name} isn't there yet"))?;
        let Some(changed) = amended(slice, wanted) else {
            *last = Some((wanted.clone(), Instant::now()));
            return Ok(false);
        };
        // Conditional on the resourceVersion that was read.
        let params = PostParams::default();
        let call = slices.replace(name, &params, &changed);
        match tokio::time::timeout(CALL, call)
            .await
            .context("the API server doesn't answer")?
        {
            Ok(_) => {
                info!(
                    slice = name,
                    count = wanted.addresses.len(),
                    "endpoints written"
                );
                *last = Some((wanted.clone(), Instant::now()));
                return Ok(true);
            }
            Err(kube::Error::Api(status)) if status.is_conflict() => {}
            Err(e) => return Err(e).context(format!("the EndpointSlice {name} wasn't taken")),
        }
    }
    Err(anyhow!("the EndpointSlice {name} keeps changing"))
}

/// The slice with the wanted content, unless it has it already or speaks of a later term.
fn amended(mut slice: EndpointSlice, wanted: &Endpoints) -> Option<EndpointSlice> {
    let term = slice
        .annotations()
        .get(labels::TERM)
        .and_then(|t| t.parse::<i64>().ok());
    if term.is_some_and(|t| t > wanted.term) {
        return None;
    }
    let endpoints: Vec<Endpoint> = wanted
        .addresses
        .iter()
        // A slice has one kind of address.
        .filter(|a| (slice.address_type == "IPv6") == a.is_ipv6())
        .map(|a| Endpoint {
            addresses: vec![a.to_string()],
            conditions: Some(EndpointConditions {
                ready: Some(true),
                ..EndpointConditions::default()
            }),
            ..Endpoint::default()
        })
        .collect();
    let present: Vec<_> = slice
        .endpoints
        .iter()
        .flatten()
        .map(|e| {
            let ready = e.conditions.as_ref().and_then(|c| c.ready);
            (e.addresses.clone(), ready)
        })
        .collect();
    let same = present.len() == endpoints.len()
        && endpoints
            .iter()
            .all(|e| present.contains(&(e.addresses.clone(), Some(true))));
    if same && term == Some(wanted.term) {
        return None;
    }
    slice
        .annotations_mut()
        .insert(labels::TERM.to_owned(), wanted.term.to_string());
    slice.metadata.managed_fields = None;
    slice.endpoints = Some(endpoints);
    Some(slice)
}

#[cfg(test)]
mod tests;
