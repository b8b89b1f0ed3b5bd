//! Regions, policies and nodes: caches for everyone, and the controller that keeps what they say true.
//!
//! Owns the watches on the cluster-scoped kinds, the stamp on nodes, the statuses of `Region` and
//! `ResidencyPolicy`, and the bindings of the admission policies that read those.
//! Never trusts an object it can't read: an unreadable Region or policy counts as not there, which permits
//! nothing.

pub mod concern;
pub mod gate;
pub mod plan;

use futures::{Stream, StreamExt, pin_mut};
use k8s_openapi::api::admissionregistration::v1::{
    ValidatingAdmissionPolicy, ValidatingAdmissionPolicyBinding,
};
use k8s_openapi::api::core::v1::{Namespace, Node};
use kube::api::{DeleteParams, Patch, PatchParams, Preconditions};
use kube::core::{DeserializeGuard, PartialObjectMeta};
use kube::runtime::reflector::{self, Store};
use kube::runtime::watcher::{self, Event, watcher};
use kube::runtime::{WatchStreamExt, reflector::store::Writer};
use kube::{Api, Client, Resource, ResourceExt};
use serde::de::DeserializeOwned;
use serde_json::json;
use std::collections::{BTreeMap, HashMap};
use std::fmt::Debug;
use std::hash::Hash;
use std::sync::Arc;
use std::time::Duration;

use super::context::{Context, Triggers, bounded, node_facts};
use crate::api::{
    GROUP, PrivacyDataStore, Region, ResidencyPolicy, RightsWorkflow, VERSION, labels, names,
};

/// A watch that hears nothing for this long is opened anew; a dead connection is noticed then.
const WATCH_SECONDS: u32 = 60;
/// Changes that come together are looked at together.
const DEBOUNCE: Duration = Duration::from_millis(100);

/// The caches.
pub struct Caches {
    /// Every Region.
    pub regions: Store<Region>,
    /// Every policy.
    pub policies: Store<ResidencyPolicy>,
    /// Every node.
    pub nodes: Store<Node>,
    /// Every store, for counting references.
    pub stores: Store<PrivacyDataStore>,
    /// Every workflow, for counting references.
    pub workflows: Store<RightsWorkflow>,
    /// The namespaces that name a policy as their ceiling.
    pub namespaces: Store<PartialObjectMeta<Namespace>>,
    /// Our admission policies.
    pub admission: Store<ValidatingAdmissionPolicy>,
    /// Their bindings.
    pub bindings: Store<ValidatingAdmissionPolicyBinding>,
}

/// Starts the watches and waits until each has been filled once. `changed` is pulled whenever something that
/// matters to placement has changed, or which stores there are, `counted` whenever a reference to a policy may have.
///
/// # Errors
/// If a watch ends before it was filled, which it does only when the process ends.
pub async fn start(
    client: &Client,
    changed: &Triggers,
    counted: &Triggers,
) -> anyhow::Result<Caches> {
    let config = || watcher::Config::default().timeout(WATCH_SECONDS);
    let regions = keep_told(
        guarded(Api::all(client.clone()), config()),
        generation::<Region>,
        &[changed],
        &[counted],
    );
    let policies = keep_told(
        guarded(Api::all(client.clone()), config()),
        generation::<ResidencyPolicy>,
        &[changed],
        &[counted],
    );
    let stores = keep(
        guarded(Api::all(client.clone()), config()),
        [changed, counted],
    );
    let workflows = keep(guarded(Api::all(client.clone()), config()), [counted]);
    // Nodes change all the time: heartbeats, images, capacities.
    let slim = watcher(Api::<Node>::all(client.clone()), config())
        .default_backoff()
        .modify(|node| {
            node.metadata.managed_fields = None;
            if let Some(status) = &mut node.status {
                status.images = None;
            }
        });
    let nodes = keep_told(slim, node_facts, &[changed, counted], &[]);
    let ceilings = watcher(
        Api::<PartialObjectMeta<Namespace>>::all(client.clone()),
        config().labels(labels::RESIDENCY),
    );
    let namespaces = keep(ceilings.default_backoff(), [changed, counted]);
    let ours = || config().labels(&format!("{}={}", labels::NAME, labels::NAME_VALUE));
    let admission = watcher(
        Api::<ValidatingAdmissionPolicy>::all(client.clone()),
        ours(),
    );
    let admission = keep(admission.default_backoff(), [counted]);
    let bindings = watcher(
        Api::<ValidatingAdmissionPolicyBinding>::all(client.clone()),
        ours(),
    );
    let bindings = keep(bindings.default_backoff(), [counted]);
    regions.wait_until_ready().await?;
    policies.wait_until_ready().await?;
    stores.wait_until_ready().await?;
    workflows.wait_until_ready().await?;
    nodes.wait_until_ready().await?;
    namespaces.wait_until_ready().await?;
    // Not waited for: where the API server has no such kinds, everything else must go on.
    Ok(Caches {
        regions,
        policies,
        nodes,
        stores,
        workflows,
        namespaces,
        admission,
        bindings,
    })
}

/// A watch that one unreadable object can't stop: such an object counts as deleted.
fn guarded<K>(
    api: Api<DeserializeGuard<K>>,
    config: watcher::Config,
) -> impl Stream<Item = watcher::Result<Event<K>>> + Send
where
    K: Resource + Clone + Debug + DeserializeOwned + Send + Sync + 'static,
    K::DynamicType: Default + Eq + Hash + Clone + Send + Sync,
    DeserializeGuard<K>:
        Resource<DynamicType = K::DynamicType> + Clone + Debug + DeserializeOwned + Send + 'static,
{
    // The last readable version of each, so that its removal can be told once it isn't readable any more:
    // what is kept otherwise may permit more than what is written now.
    let mut readable: HashMap<Option<String>, K> = HashMap::new();
    watcher(api, config)
        .default_backoff()
        .filter_map(move |event| {
            let event = match event {
                Err(error) => Some(Err(error)),
                Ok(Event::Init) => {
                    readable.clear();
                    Some(Ok(Event::Init))
                }
                Ok(Event::InitDone) => Some(Ok(Event::InitDone)),
                Ok(Event::InitApply(guard)) => match read(guard, &mut readable) {
                    Ok(object) => Some(Ok(Event::InitApply(object))),
                    // Not there: the list that is being made doesn't have it.
                    Err(_) => None,
                },
                Ok(Event::Apply(guard)) => match read(guard, &mut readable) {
                    Ok(object) => Some(Ok(Event::Apply(object))),
                    Err(last) => last.map(|last| Ok(Event::Delete(last))),
                },
                Ok(Event::Delete(guard)) => {
                    let last = readable.remove(&guard.meta().name);
                    guard
                        .0
                        .ok()
                        .or(last)
                        .map(|object| Ok(Event::Delete(object)))
                }
            };
            std::future::ready(event)
        })
}

/// The object, or the last readable version of one that isn't readable now.
fn read<K: Resource + Clone>(
    guard: DeserializeGuard<K>,
    readable: &mut HashMap<Option<String>, K>,
) -> Result<K, Option<K>>
where
    K::DynamicType: Default,
{
    match guard.0 {
        Ok(object) => {
            readable.insert(object.meta().name.clone(), object.clone());
            Ok(object)
        }
        Err(error) => {
            tracing::error!(object = ?error.metadata.name, error = %error.error, "an object can't be understood and counts as absent");
            Err(readable.remove(&error.metadata.name))
        }
    }
}

fn keep<K, const N: usize>(
    events: impl Stream<Item = watcher::Result<Event<K>>> + Send + 'static,
    triggers: [&Triggers; N],
) -> Store<K>
where
    K: Resource + Clone + Send + Sync + 'static,
    K::DynamicType: Default + Eq + Hash + Clone + Send + Sync,
{
    keep_told(events, |_| (), &[], &triggers)
}

async fn follow<K>(
    events: impl Stream<Item = watcher::Result<Event<K>>> + Send,
    writer: Writer<K>,
    mut heard: impl FnMut(&Event<K>) + Send,
) where
    K: Resource + Clone + Send + Sync + 'static,
    K::DynamicType: Default + Eq + Hash + Clone + Send + Sync,
{
    let events = events.reflect(writer);
    pin_mut!(events);
    while let Some(event) = events.next().await {
        match event {
            Ok(event) => heard(&event),
            Err(error) => tracing::warn!(%error, "watch interrupted; it is opened again"),
        }
    }
}

/// As [`keep`], but `told` are pulled only when what `facts` makes of an object is other than before.
fn keep_told<K, F>(
    events: impl Stream<Item = watcher::Result<Event<K>>> + Send + 'static,
    facts: impl Fn(&K) -> F + Send + 'static,
    told: &[&Triggers],
    always: &[&Triggers],
) -> Store<K>
where
    K: Resource + Clone + Send + Sync + 'static,
    K::DynamicType: Default + Eq + Hash + Clone + Send + Sync,
    F: PartialEq + Clone + Send + 'static,
{
    let cloned = |all: &[&Triggers]| all.iter().map(|t| (*t).clone()).collect::<Vec<_>>();
    let (told, always) = (cloned(told), cloned(always));
    let (store, writer) = reflector::store();
    let mut known: HashMap<String, F> = HashMap::new();
    tokio::spawn(follow(events, writer, move |event: &Event<K>| {
        let news = match event {
            Event::Apply(object) | Event::InitApply(object) => {
                let facts = facts(object);
                known.insert(object.name_any(), facts.clone()) != Some(facts)
            }
            Event::Delete(object) => known.remove(&object.name_any()).is_some(),
            Event::InitDone => true,
            Event::Init => false,
        };
        if news {
            told.iter().for_each(Triggers::pull);
        }
        if !matches!(event, Event::Init | Event::InitApply(_)) {
            always.iter().for_each(Triggers::pull);
        }
    }));
    store
}

/// What of a Region or policy bears on where copies may be: its status is ours, and a pass over every store for
/// each status written would be work that makes work.
fn generation<K: Resource>(object: &K) -> (Option<String>, Option<i64>, bool) {
    let meta = object.meta();
    (
        meta.uid.clone(),
        meta.generation,
        meta.deletion_timestamp.is_some(),
    )
}

/// What [`run`] looks at beside the context's caches.
pub struct References {
    /// Every store.
    pub stores: Store<PrivacyDataStore>,
    /// Every workflow.
    pub workflows: Store<RightsWorkflow>,
    /// The namespaces that name a policy as their ceiling.
    pub namespaces: Store<PartialObjectMeta<Namespace>>,
    /// Our admission policies.
    pub admission: Store<ValidatingAdmissionPolicy>,
    /// Their bindings.
    pub bindings: Store<ValidatingAdmissionPolicyBinding>,
}

impl References {
    /// What the API server offers; nothing is said while one of the watches has not been filled yet: a binding
    /// that merely wasn't read is not missing.
    async fn gate(&self, client: &Client, patience: Duration) -> Option<gate::Gate> {
        let filled = async {
            self.admission.wait_until_ready().await.ok()?;
            self.bindings.wait_until_ready().await.ok()
        };
        tokio::time::timeout(patience, filled).await.ok()??;
        let version = bounded("ask for the version", client.apiserver_version()).await;
        let version = match version {
            Ok(info) => gate::version(&info.major, &info.minor),
            Err(error) => {
                tracing::warn!(
                    error = format!("{error:#}"),
                    "Kubernetes' version is unknown"
                );
                None
            }
        };
        let there = |name: &str| {
            let found = self.admission.find(|p| p.name_any() == name);
            found.is_some_and(|p| p.metadata.deletion_timestamp.is_none())
        };
        Some(gate::Gate {
            installed: there(gate::BINDING) && there(gate::UNKNOWN),
            version: version?,
        })
    }

    fn namespaces(&self) -> BTreeMap<String, BTreeMap<String, String>> {
        let all = self.namespaces.state();
        all.iter()
            .map(|n| (n.name_any(), n.labels().clone()))
            .collect()
    }

    fn ceilings(&self) -> BTreeMap<String, String> {
        self.namespaces
            .state()
            .iter()
            .filter_map(|n| Some((n.name_any(), n.labels().get(labels::RESIDENCY)?.clone())))
            .collect()
    }
}

/// Keeps stamps, statuses and bindings true until the process ends. Only the leader runs this.
pub async fn run(ctx: Arc<Context>, references: Arc<References>, triggers: Triggers) {
    let changes = triggers.stream();
    pin_mut!(changes);
    // The first pass comes right after the start; later ones don't wait for watches that don't answer.
    let mut patience = Duration::from_secs(2);
    loop {
        let gate = references.gate(&ctx.client, patience).await;
        patience = Duration::ZERO;
        let seen = plan::Seen {
            regions: ctx.regions.state(),
            policies: ctx.policies.state(),
            nodes: ctx.node_facts(),
            stores: references.stores.state(),
            workflows: references.workflows.state(),
            ceilings: references.ceilings(),
            gate,
            bindings: references.bindings.state(),
        };
        let mut failed = false;
        for write in plan::plan(&seen, jiff::Timestamp::now()) {
            if let Err(error) = execute(&ctx.client, &write).await {
                failed = true;
                tracing::warn!(
                    ?write,
                    error = format!("{error:#}"),
                    "not written; tried again"
                );
            }
        }
        let pause = if failed {
            Duration::from_secs(5)
        } else {
            Duration::from_secs(60)
        };
        // The pause ends early with the next change; without one it is the safety net.
        let heard = tokio::time::timeout(pause, changes.next()).await;
        if let Ok(None) = heard {
            return;
        }
        tokio::time::sleep(DEBOUNCE).await;
    }
}

async fn execute(client: &Client, write: &plan::Write) -> anyhow::Result<()> {
    let params = PatchParams::apply(names::OPERATOR_FIELD_MANAGER).force();
    let status = |kind: &str, status: serde_json::Value| {
        Patch::Apply(
            json!({ "apiVersion": format!("{GROUP}/{VERSION}"), "kind": kind, "status": status }),
        )
    };
    match write {
        plan::Write::Stamp { node, region } => {
            let patch =
                Patch::Merge(json!({ "metadata": { "labels": { labels::NODE_REGION: region } } }));
            let nodes: Api<Node> = Api::all(client.clone());
            tracing::info!(%node, ?region, "stamping");
            bounded(
                "stamp a node",
                nodes.patch(node, &PatchParams::default(), &patch),
            )
            .await?;
        }
        plan::Write::Region(name, new) => {
            let regions: Api<Region> = Api::all(client.clone());
            let patch = status("Region", serde_json::to_value(new)?);
            bounded(
                "write a Region's status",
                regions.patch_status(name, &params, &patch),
            )
            .await?;
        }
        plan::Write::Policy(name, new) => {
            let policies: Api<ResidencyPolicy> = Api::all(client.clone());
            let patch = status("ResidencyPolicy", serde_json::to_value(new)?);
            bounded(
                "write a policy's status",
                policies.patch_status(name, &params, &patch),
            )
            .await?;
        }
        plan::Write::Bind(binding) => {
            let api: Api<ValidatingAdmissionPolicyBinding> = Api::all(client.clone());
            let name = binding.name_any();
            tracing::info!(%name, "binding an admission policy");
            bounded(
                "bind an admission policy",
                api.patch(&name, &params, &Patch::Apply(binding)),
            )
            .await?;
        }
        plan::Write::Unbind { name, uid } => {
            let api: Api<ValidatingAdmissionPolicyBinding> = Api::all(client.clone());
            let params = DeleteParams::default().preconditions(Preconditions {
                uid: Some(uid.clone()),
                resource_version: None,
            });
            tracing::info!(%name, "removing a binding");
            match bounded("remove a binding", api.delete(name, &params)).await {
                Err(error) if is_gone(&error) => {}
                done => drop(done?),
            }
        }
    }
    Ok(())
}

/// Somebody else was first.
fn is_gone(error: &anyhow::Error) -> bool {
    matches!(error.downcast_ref(), Some(kube::Error::Api(status)) if status.is_not_found())
}
