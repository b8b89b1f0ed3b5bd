//! The store's object as an instance sees it, and what an instance wants written.
//!
//! Owns the seam to the API server: a view that comes in, a wish that goes out. The API server itself is
//! `apiserver`; tests feed the view directly.
//! Never: forgets a view because the API server is away, or goes back to an older term.

use std::collections::BTreeSet;
use std::net::IpAddr;
use std::sync::Arc;

use futures::future::BoxFuture;
use k8s_openapi::api::core::v1::ConfigMap;
use tokio::sync::watch;

use super::config::Config;
use super::plan::{Source, StoreSeen};
use super::sync;
use crate::api::privacy_data_store::{AgreedConfiguration, InstanceStatus, LastFailover};
use crate::api::{PrivacyDataStore, labels};

/// The two ways between an instance and the API server. Each holds the newest value only: an API server that
/// is away costs no memory, and finds the present state when it's back.
#[derive(Debug)]
pub struct Api {
    /// The store's object, once it was seen.
    pub store: watch::Receiver<Option<Arc<PrivacyDataStore>>>,
    /// What is to be written.
    pub wish: watch::Sender<Option<Wish>>,
    /// The witness's object.
    pub witness: Arc<dyn Shelf>,
}

/// Where the witness's object is kept.
pub trait Shelf: Send + Sync + std::fmt::Debug {
    /// Reads it, as it is now and not as a cache has it; none if there is none.
    fn read(&self) -> BoxFuture<'_, anyhow::Result<Option<ConfigMap>>>;

    /// Writes it, on the condition that it is still the one read: same uid, same resourceVersion. False if not.
    fn replace(&self, object: ConfigMap) -> BoxFuture<'_, anyhow::Result<bool>>;
}

/// What an instance wants the API server to hold.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Wish {
    /// The object it is meant for; never another of the same name.
    pub uid: Option<String>,
    /// Its entry in the store's status, its own fields only.
    pub entry: InstanceStatus,
    /// Whether the entry may be made if it isn't there. Not while the instance is stopping: it may just have
    /// been taken out of the store.
    pub create: bool,
    /// What the instances have agreed on (from the primary only).
    pub configuration: Option<AgreedConfiguration>,
    /// The failover that made it primary (from the primary only).
    pub failover: Option<LastFailover>,
    /// Who accepts writes (from the primary only).
    pub read_write: Option<Endpoints>,
    /// Who answers reads (from the primary only).
    pub read_only: Option<Endpoints>,
}

/// The content of an EndpointSlice.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Endpoints {
    /// Addresses.
    pub addresses: BTreeSet<IpAddr>,
    /// The term in which this is so.
    pub term: i64,
}

/// The newer of two views. A view of the same object with a lower term is an old one (an API server brought
/// back from a backup, a stale cache): believing it could make two primaries.
#[must_use]
pub fn newer(
    old: Option<&Arc<PrivacyDataStore>>,
    new: &Arc<PrivacyDataStore>,
) -> Option<Arc<PrivacyDataStore>> {
    let term = |s: &PrivacyDataStore| s.status.as_ref().and_then(|s| s.term).unwrap_or(0);
    match old {
        Some(old) if old.metadata.uid == new.metadata.uid && term(old) > term(new) => None,
        _ => Some(new.clone()),
    }
}

/// Whether two views differ in anything that an instance reads.
#[must_use]
pub fn same(a: &PrivacyDataStore, b: &PrivacyDataStore) -> bool {
    let rest = |s: &PrivacyDataStore| {
        s.status.as_ref().map(|s| {
            (
                s.term,
                s.primary.clone(),
                s.system_identifier.clone(),
                s.instances.clone(),
                s.configuration.is_some(),
                s.rights.clone(),
            )
        })
    };
    let asked = |s: &PrivacyDataStore| s.metadata.annotations.clone().unwrap_or_default();
    a.metadata.uid == b.metadata.uid
        && a.spec == b.spec
        && rest(a) == rest(b)
        && asked(a) == asked(b)
}

/// Without what an instance doesn't need, before it's kept.
#[must_use]
pub fn pruned(mut store: PrivacyDataStore) -> PrivacyDataStore {
    store.metadata.managed_fields = None;
    let ours = [labels::PROMOTE, labels::FENCE, labels::ACCEPT_DATA_LOSS];
    if let Some(annotations) = &mut store.metadata.annotations {
        annotations.retain(|name, _| ours.contains(&name.as_str()));
    }
    store.metadata.labels = None;
    store
}

/// The entry of an instance.
#[must_use]
pub fn entry<'a>(store: &'a PrivacyDataStore, instance: &str) -> Option<&'a InstanceStatus> {
    store
        .status
        .as_ref()?
        .instances
        .iter()
        .find(|i| i.name == instance)
}

/// The present primary.
#[must_use]
pub fn primary(store: &PrivacyDataStore) -> Option<&str> {
    store.status.as_ref()?.primary.as_deref()
}

/// The term.
#[must_use]
pub fn term(store: &PrivacyDataStore) -> i64 {
    store.status.as_ref().and_then(|s| s.term).unwrap_or(0)
}

/// The store's system identifier: its own, or, until the operator has written that, its primary's.
#[must_use]
pub fn system_identifier(store: &PrivacyDataStore) -> Option<&str> {
    let status = store.status.as_ref()?;
    status.system_identifier.as_deref().or_else(|| {
        entry(store, status.primary.as_deref()?)?
            .system_identifier
            .as_deref()
    })
}

/// How many instances the placement asks for.
#[must_use]
pub fn desired(store: &PrivacyDataStore) -> usize {
    store
        .spec
        .placement
        .iter()
        .map(|p| usize::try_from(p.instances).unwrap_or(0))
        .sum()
}

/// The names listed in the status.
#[must_use]
pub fn listed(store: &PrivacyDataStore) -> BTreeSet<String> {
    store
        .status
        .iter()
        .flat_map(|s| &s.instances)
        .map(|i| i.name.clone())
        .collect()
}

/// The other instances of the store of this one ([`sync::others`]); none while it isn't known.
#[must_use]
pub fn others(store: Option<&PrivacyDataStore>, config: &Config) -> BTreeSet<String> {
    store.map_or_else(BTreeSet::new, |s| {
        sync::others(&config.store, &config.instance, &listed(s), desired(s))
    })
}

/// The value of an annotation.
fn annotation<'a>(store: &'a PrivacyDataStore, name: &str) -> Option<&'a str> {
    store
        .metadata
        .annotations
        .as_ref()?
        .get(name)
        .map(String::as_str)
}

/// Whom a person asks to become primary.
#[must_use]
pub fn promote(store: &PrivacyDataStore) -> Option<String> {
    annotation(store, labels::PROMOTE).map(|v| v.trim().to_owned())
}

/// Whether a person has fenced the instance.
#[must_use]
pub fn fenced(store: &PrivacyDataStore, instance: &str) -> bool {
    annotation(store, labels::FENCE).is_some_and(|v| v.split(',').any(|n| n.trim() == instance))
}

/// The term after which a person lets this instance go on alone, whatever is lost.
#[must_use]
pub fn accept_loss(store: &PrivacyDataStore, instance: &str) -> Option<u64> {
    let (name, term) = annotation(store, labels::ACCEPT_DATA_LOSS)?.split_once('@')?;
    (name.trim() == instance).then_some(())?;
    term.trim().parse().ok()
}

/// Whether the operator takes the instance out of the store.
#[must_use]
pub fn leaving(store: &PrivacyDataStore, instance: &str) -> bool {
    entry(store, instance).is_some_and(|e| e.leaving == Some(true))
}

/// What the plan needs of the store.
#[must_use]
pub fn seen(store: &PrivacyDataStore, source: Source) -> StoreSeen {
    let status = store.status.clone().unwrap_or_default();
    StoreSeen {
        source,
        system_identifier: system_identifier(store).map(str::to_owned),
        any_identifier: status.system_identifier.is_some()
            || status
                .instances
                .iter()
                .any(|i| i.system_identifier.is_some()),
        governed: status.configuration.is_some()
            || status.instances.iter().any(|i| i.term.is_some()),
        primary: status.primary,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[allow(clippy::needless_pass_by_value, reason = "called with literals")]
    fn store(status: serde_json::Value) -> PrivacyDataStore {
        serde_json::from_value(serde_json::json!({
            "apiVersion": "domicile.dev/v1alpha1", "kind": "PrivacyDataStore",
            "metadata": {"name": "s", "uid": "u"},
            "spec": {"residencyPolicyRef": {"name": "p"}, "placement": [{"region": "r", "instances": 3}],
                     "storage": {"size": "1Gi"}},
            "status": status,
        }))
        .unwrap()
    }

    #[test]
    fn an_older_term_is_not_believed() {
        let at = |term: i64, uid: &str| {
            let mut s = store(serde_json::json!({"term": term}));
            s.metadata.uid = Some(uid.into());
            Arc::new(s)
        };
        assert!(newer(Some(&at(2, "u")), &at(1, "u")).is_none());
        assert!(newer(Some(&at(2, "u")), &at(2, "u")).is_some());
        assert!(newer(Some(&at(2, "u")), &at(1, "other")).is_some());
        assert!(newer(None, &at(1, "u")).is_some());
    }

    #[test]
    fn the_identifier_is_the_stores_or_its_primarys() {
        let s = store(serde_json::json!({"primary": "s-1", "instances": [
            {"name": "s-1"}, {"name": "s-2", "systemIdentifier": "8"}]}));
        let view = seen(&s, Source::Live);
        assert_eq!(view.system_identifier, None);
        assert!(view.any_identifier && !view.governed);
        let s = store(serde_json::json!({"primary": "s-1", "instances": [
            {"name": "s-1", "systemIdentifier": "7", "ready": true, "address": "10.0.0.1"}]}));
        let view = seen(&s, Source::Live);
        assert_eq!(view.system_identifier.as_deref(), Some("7"));
        assert_eq!((desired(&s), listed(&s).len()), (3, 1));
    }

    #[test]
    fn what_no_instance_reads_makes_no_difference() {
        let a = store(serde_json::json!({"primary": "s-1", "summary": "1/3"}));
        let mut b = store(serde_json::json!({"primary": "s-1", "summary": "2/3"}));
        b.metadata.resource_version = Some("9".into());
        assert!(same(&a, &b));
        assert!(!same(&a, &store(serde_json::json!({"primary": "s-2"}))));
    }
}
