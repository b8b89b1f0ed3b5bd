//! Reads the world of one store into a plain struct.
//!
//! Owns every read that a pass makes. Nodes, Regions and policies come from caches that watches keep; what
//! belongs to the store is listed afresh, since a stale view of one's own children is how controllers delete
//! what they should not.
//! Never writes, and never decides. Keys and passwords stay in here and in `apply`: [`Observed`] only says
//! whether they exist and how long they last.

use k8s_openapi::api::core::v1::{Namespace, PersistentVolume, PersistentVolumeClaim, Pod, Secret};
use k8s_openapi::api::storage::v1::StorageClass;
use kube::api::{DynamicObject, ListParams};
use kube::{Api, ResourceExt};
use std::collections::BTreeMap;
use std::sync::Arc;

use super::certificates;
use super::kinds::ChildKind;
use super::lost::Volume;
use crate::api::{PrivacyDataStore, Region, ResidencyPolicy, RightsWorkflow, labels, names};
use crate::operator::context::{Context, bounded};
use crate::residency::NodeFacts;
use crate::residency::volumes::Class;

/// What a pass knows.
#[derive(Clone, Debug)]
pub struct Observed {
    /// The store as it is now, not as the cache had it.
    pub store: Arc<PrivacyDataStore>,
    /// Labels of its namespace.
    pub namespace_labels: BTreeMap<String, String>,
    /// Its namespace is being deleted: nothing can be made in it any more.
    pub namespace_ending: bool,
    /// The policy it refers to, if it exists.
    pub policy: Option<Arc<ResidencyPolicy>>,
    /// The policy that its namespace names as its ceiling, if it names one and that exists.
    pub ceiling: Option<Arc<ResidencyPolicy>>,
    /// The class of the volumes that it still lacks.
    pub storage_class: StorageClassSeen,
    /// Every Region.
    pub regions: Vec<Arc<Region>>,
    /// Every node.
    pub nodes: Vec<NodeFacts>,
    /// The store's pods.
    pub pods: Vec<Pod>,
    /// The store's volume claims, also those retained from an earlier store of this name.
    pub claims: Vec<PersistentVolumeClaim>,
    /// What is known of the volumes of those claims, by claim.
    pub volumes: BTreeMap<String, Volume>,
    /// The store's other objects, by kind and name.
    pub children: BTreeMap<(ChildKind, String), DynamicObject>,
    /// The certificate authorities, if there is one that signs.
    pub authorities: Option<certificates::Authorities>,
    /// Instances' certificates, by instance.
    pub certificates: BTreeMap<String, certificates::Facts>,
    /// Hash annotation of the application's Secret, if it exists.
    pub app_secret: Option<String>,
    /// The names of Secrets of this store that exist, with their uids.
    pub secrets: BTreeMap<String, String>,
    /// The term of the last failover that this operator has told.
    pub told: Option<i64>,
    /// The workflows whose requests it keeps. Looked for only when it is being deleted.
    pub keeps: Vec<String>,
}

/// The StorageClass that new volumes would be of.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum StorageClassSeen {
    /// Every instance has its volume claim.
    #[default]
    NotNeeded,
    /// There is none of this name; `None`: none that is the cluster's default.
    Missing(Option<String>),
    /// This one.
    Found(Class),
}

/// Reads everything. `None`: the store is gone.
///
/// # Errors
/// If a read fails or takes too long; nothing has been changed then.
pub async fn observe(
    ctx: &Context,
    namespace: &str,
    name: &str,
) -> anyhow::Result<Option<Observed>> {
    let stores: Api<PrivacyDataStore> = Api::namespaced(ctx.client.clone(), namespace);
    let Some(store) = bounded("get the store", stores.get_opt(name)).await? else {
        return Ok(None);
    };
    let ours = ListParams::default().labels(&format!("{}={name}", labels::STORE));

    let namespaces: Api<Namespace> = Api::all(ctx.client.clone());
    let pods: Api<Pod> = Api::namespaced(ctx.client.clone(), namespace);
    let claims: Api<PersistentVolumeClaim> = Api::namespaced(ctx.client.clone(), namespace);
    let secrets: Api<Secret> = Api::namespaced(ctx.client.clone(), namespace);
    let (namespace_object, pods, claims, secrets) = tokio::try_join!(
        bounded("get the namespace", namespaces.get_opt(namespace)),
        bounded("list pods", pods.list(&ours)),
        bounded("list volume claims", claims.list(&ours)),
        bounded("list Secrets", secrets.list(&ours)),
    )?;

    let kinds = ChildKind::ALL.into_iter().map(|kind| {
        let api: Api<DynamicObject> =
            Api::namespaced_with(ctx.client.clone(), namespace, &kind.resource());
        let ours = &ours;
        async move {
            let all = bounded("list children", api.list(ours)).await?;
            anyhow::Ok((kind, all.items))
        }
    });
    let lists = futures::future::try_join_all(kinds).await?;
    let children = lists
        .into_iter()
        .flat_map(|(kind, all)| all.into_iter().map(move |o| ((kind, o.name_any()), o)))
        .collect();

    let policy = |name: &str| {
        ctx.policies
            .state()
            .into_iter()
            .find(|p| p.name_any() == name)
    };
    let namespace_labels = namespace_object
        .as_ref()
        .map(|n| n.labels().clone())
        .unwrap_or_default();
    let mut observed = Observed {
        namespace_ending: namespace_object
            .as_ref()
            .is_none_or(|n| n.metadata.deletion_timestamp.is_some()),
        policy: policy(&store.spec.residency_policy_ref.name),
        ceiling: namespace_labels
            .get(labels::RESIDENCY)
            .and_then(|name| policy(name)),
        namespace_labels,
        storage_class: storage_class(ctx, &store, claims.items.len()).await?,
        regions: sorted(ctx.regions.state()),
        nodes: ctx.node_facts(),
        volumes: volumes(ctx, &claims.items).await?,
        pods: pods.items,
        claims: claims.items,
        children,
        authorities: None,
        certificates: BTreeMap::new(),
        app_secret: None,
        secrets: BTreeMap::new(),
        told: store.uid().and_then(|uid| ctx.last_told(&uid)),
        keeps: keeps(ctx, &store).await?,
        store: Arc::new(store),
    };
    for secret in secrets {
        observed.note_secret(name, &secret);
    }
    Ok(Some(observed))
}

/// The workflows that keep their requests in a store that is being deleted. What its status says of one that is gone
/// holds nothing up.
async fn keeps(ctx: &Context, store: &PrivacyDataStore) -> anyhow::Result<Vec<String>> {
    if store.metadata.deletion_timestamp.is_none() {
        return Ok(Vec::new());
    }
    let namespace = store.namespace().unwrap_or_default();
    let api: Api<RightsWorkflow> = Api::namespaced(ctx.client.clone(), &namespace);
    let said = store.status.iter().flat_map(|s| &s.rights);
    let mut all = Vec::new();
    for entry in said.filter(|r| r.ledger) {
        let found = bounded("get a workflow", api.get_metadata_opt(&entry.workflow)).await?;
        let waits = |f: &String| f == labels::RIGHTS_FINALIZER;
        if found.is_some_and(|w| w.finalizers().iter().any(waits)) {
            all.push(entry.workflow.clone());
        }
    }
    all.sort();
    Ok(all)
}

/// The volumes of the store's claims. Volumes belong to the cluster: nobody else's are read.
async fn volumes(
    ctx: &Context,
    claims: &[PersistentVolumeClaim],
) -> anyhow::Result<BTreeMap<String, Volume>> {
    let api: Api<PersistentVolume> = Api::all(ctx.client.clone());
    let named = claims.iter().filter_map(|claim| {
        let volume = claim.spec.as_ref()?.volume_name.clone()?;
        (!volume.is_empty()).then(|| (claim.name_any(), volume))
    });
    let all = named.map(|(claim, volume)| {
        let api = &api;
        async move {
            let found = bounded("get a volume", api.get_opt(&volume)).await?;
            let none = Volume {
                gone: true,
                ..Volume::default()
            };
            Ok((claim, found.as_ref().map_or(none, Volume::of)))
        }
    });
    futures::future::join_all(all).await.into_iter().collect()
}

const DEFAULT_CLASS: &str = "storageclass.kubernetes.io/is-default-class";

/// The class of the volumes that are still to be made. Asked for only then: a store that has all its volumes
/// doesn't care what became of their class.
async fn storage_class(
    ctx: &Context,
    store: &PrivacyDataStore,
    claims: usize,
) -> anyhow::Result<StorageClassSeen> {
    let wanted: i32 = store.spec.placement.iter().map(|p| p.instances).sum();
    if claims >= usize::try_from(wanted).unwrap_or(0) {
        return Ok(StorageClassSeen::NotNeeded);
    }
    let api: Api<StorageClass> = Api::all(ctx.client.clone());
    let name = store.spec.storage.storage_class_name.clone();
    let found = match &name {
        Some(name) => bounded("get the StorageClass", api.get_opt(name)).await?,
        None => {
            let all = bounded("list StorageClasses", api.list(&ListParams::default())).await?;
            default_class(all.items)
        }
    };
    Ok(found.map_or(StorageClassSeen::Missing(name), |class| {
        StorageClassSeen::Found(class_facts(&class))
    }))
}

/// The default class, as the API server chooses it among several: the newest, then the first by name.
fn default_class(all: Vec<StorageClass>) -> Option<StorageClass> {
    all.into_iter()
        .filter(|c| {
            c.annotations()
                .get(DEFAULT_CLASS)
                .is_some_and(|v| v == "true")
        })
        .min_by_key(|c| {
            let made = c.metadata.creation_timestamp.as_ref().map(|t| t.0);
            (std::cmp::Reverse(made), c.name_any())
        })
}

/// What of a class bears on where its volumes come to be.
fn class_facts(class: &StorageClass) -> Class {
    let topologies = class.allowed_topologies.iter().flatten().map(|term| {
        let labels = term.match_label_expressions.iter().flatten();
        labels
            .map(|l| (l.key.clone(), l.values.iter().cloned().collect()))
            .collect()
    });
    Class {
        name: class.name_any(),
        // Absent is Immediate, as the API server fills it in.
        immediate: class.volume_binding_mode.as_deref() != Some("WaitForFirstConsumer"),
        found: class.provisioner == "kubernetes.io/no-provisioner",
        topologies: topologies.collect(),
    }
}

impl Observed {
    /// Keeps of a Secret what planning needs, and nothing that is secret.
    fn note_secret(&mut self, store: &str, secret: &Secret) {
        let secret_name = secret.name_any();
        self.secrets
            .insert(secret_name.clone(), secret.uid().unwrap_or_default());
        if secret_name == names::app_secret(store) {
            let hash = secret.annotations().get(super::build::HASH).cloned();
            // A key removed or a password changed by hand: written anew, with the password that is there.
            self.app_secret = Some(
                hash.filter(|_| super::build::coherent(secret))
                    .unwrap_or_default(),
            );
        } else if secret_name == names::ca_secret(store) {
            self.authorities = certificates::authorities(secret);
        } else if let Some(instance) = secret.labels().get(labels::INSTANCE)
            && let Some(facts) = certificates::facts(secret, "tls.crt", "tls.key")
        {
            self.certificates.insert(instance.clone(), facts);
        }
    }
}

/// Caches iterate in random order; decisions must not depend on it.
fn sorted(mut regions: Vec<Arc<Region>>) -> Vec<Arc<Region>> {
    regions.sort_by_key(|r| r.name_any());
    regions
}
