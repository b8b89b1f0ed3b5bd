//! Writes to the objects that belong to one custom resource.
//!
//! Owns what every such write has in common: the bound on each call, the uid without which nothing is deleted, the
//! proof that an object of a needed name is ours before it is touched.
//! Never decides, never deletes without a uid, and never takes over an object that is somebody else's.

use k8s_openapi::api::core::v1::{ObjectReference, Pod, Secret};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{ObjectMeta, OwnerReference};
use kube::api::{
    ApiResource, DeleteParams, DynamicObject, Patch, PatchParams, PostParams, Preconditions,
};
use kube::runtime::events::EventType;
use kube::{Api, ResourceExt};
use serde_json::{Value, json};
use std::collections::BTreeMap;

use super::context::{Context, bounded, words};
use crate::api::conditions::{self, Verdict, reasons};
use crate::api::{labels, names};

/// What events say was done.
pub const ACTION: &str = "Reconcile";
/// How many seconds a pod that runs outside has to end by itself. Its own grace is made for those who are inside and have
/// something to hand over; a process that hangs would run outside for all of it.
const FENCE_GRACE: u32 = 2;
/// Who events are from.
pub const REPORTER: &str = "domicile.dev/operator";

/// A step that didn't succeed.
#[derive(Debug, thiserror::Error)]
#[error("{step}: {}", words(.source))]
pub struct ApplyError {
    /// The step, in words.
    pub step: String,
    /// One word for the condition and the metric.
    pub reason: &'static str,
    /// What went wrong.
    pub source: anyhow::Error,
}

impl ApplyError {
    /// The failure of a step.
    #[must_use]
    pub fn new(step: String, source: anyhow::Error) -> Self {
        let reason = if source.is::<Taken>() {
            reasons::NAME_TAKEN
        } else {
            APPLY_FAILED
        };
        Self {
            step,
            reason,
            source,
        }
    }
}

/// What a failed step means for the conditions.
pub fn blame(verdicts: &mut [Verdict], error: &ApplyError) {
    let taken = error.reason == reasons::NAME_TAKEN;
    for verdict in verdicts {
        let status = match verdict.kind {
            conditions::READY => false,
            conditions::RECONCILING => !taken,
            conditions::STALLED => taken,
            _ => continue,
        };
        *verdict = Verdict::new(verdict.kind, status, error.reason, error.to_string());
    }
}

/// Reason for everything that isn't the user's to mend.
const APPLY_FAILED: &str = "ApplyFailed";

/// An object of a needed name belongs to somebody else.
#[derive(Debug, thiserror::Error)]
#[error(
    "{kind} {name} exists and is not this {owner}'s: rename the {owner}, or remove the object if nobody needs it"
)]
pub struct Taken {
    kind: String,
    name: String,
    owner: &'static str,
}

/// The custom resource whose objects are written.
pub struct Hands<'a> {
    /// The client and the recorder.
    pub ctx: &'a Context,
    /// Its kind.
    pub resource: ApiResource,
    /// Its kind in words.
    pub what: &'static str,
    /// The label by which its objects name it.
    pub label: &'static str,
    /// Its metadata as observed.
    pub meta: &'a ObjectMeta,
    /// How events refer to it.
    pub reference: ObjectReference,
}

impl Hands<'_> {
    /// Its namespace.
    #[must_use]
    pub fn namespace(&self) -> &str {
        self.meta.namespace.as_deref().unwrap_or_default()
    }

    /// Its name.
    #[must_use]
    pub fn name(&self) -> &str {
        self.meta.name.as_deref().unwrap_or_default()
    }

    /// Objects of a kind in its namespace.
    #[must_use]
    pub fn api(&self, resource: &ApiResource) -> Api<DynamicObject> {
        Api::namespaced_with(self.ctx.client.clone(), self.namespace(), resource)
    }

    /// Secrets in its namespace.
    #[must_use]
    pub fn secrets(&self) -> Api<Secret> {
        Api::namespaced(self.ctx.client.clone(), self.namespace())
    }

    /// Adds a finalizer.
    ///
    /// # Errors
    /// As the API server's.
    pub async fn add_finalizer(&self, finalizer: &str, manager: &str) -> anyhow::Result<()> {
        // Applied, since the list is a set that others add to as well; the uid keeps a namesake out.
        let patch = json!({
            "apiVersion": self.resource.api_version, "kind": self.resource.kind,
            "metadata": { "uid": self.meta.uid, "finalizers": [finalizer] },
        });
        let params = PatchParams::apply(manager).force();
        bounded(
            "add the finalizer",
            self.api(&self.resource)
                .patch(self.name(), &params, &Patch::Apply(patch)),
        )
        .await?;
        Ok(())
    }

    /// Takes a finalizer off, if the object is still as observed.
    ///
    /// # Errors
    /// As the API server's; not if the object is gone.
    pub async fn remove_finalizer(&self, finalizer: &str) -> anyhow::Result<()> {
        let left: Vec<&String> = self
            .meta
            .finalizers
            .iter()
            .flatten()
            .filter(|f| *f != finalizer)
            .collect();
        let patch = json!({ "metadata": {
            "uid": self.meta.uid, "resourceVersion": self.meta.resource_version, "finalizers": left,
        } });
        let done = bounded(
            "remove the finalizer",
            self.api(&self.resource).patch(
                self.name(),
                &PatchParams::default(),
                &Patch::Merge(patch),
            ),
        )
        .await;
        match done {
            Err(error) if !is_not_found(&error) => Err(error),
            _ => Ok(()),
        }
    }

    /// Makes an object that must not exist yet.
    ///
    /// # Errors
    /// As the API server's, or if an object of that name is somebody else's.
    pub async fn create(&self, resource: &ApiResource, value: &Value) -> anyhow::Result<()> {
        let wanted: DynamicObject = serde_json::from_value(value.clone())?;
        let api = self.api(resource);
        let params = PostParams {
            field_manager: Some(names::OPERATOR_FIELD_MANAGER.to_owned()),
            ..Default::default()
        };
        match bounded("create", api.create(&params, &wanted)).await {
            Ok(_) => Ok(()),
            // The client retries by itself, so it may be our own; or an earlier pass made it just now.
            Err(error) if already_exists(&error) => {
                let name = wanted.name_any();
                let found = bounded("read", api.get(&name)).await?;
                self.must_own(
                    &resource.kind,
                    &name,
                    found.labels(),
                    found.owner_references(),
                )
            }
            Err(error) => Err(error),
        }
    }

    /// # Errors
    /// [`Taken`] if an object with these labels and owners isn't this one's.
    pub fn must_own(
        &self,
        kind: &str,
        name: &str,
        found: &BTreeMap<String, String>,
        owners: &[OwnerReference],
    ) -> anyhow::Result<()> {
        let labelled = found.get(self.label).map(String::as_str) == self.meta.name.as_deref()
            && found
                .get(labels::MANAGED_BY)
                .is_some_and(|v| v == labels::MANAGED_BY_VALUE);
        let uid = self.meta.uid.as_ref();
        let foreign = owners
            .iter()
            .any(|o| o.controller == Some(true) && Some(&o.uid) != uid);
        if labelled && !foreign {
            Ok(())
        } else {
            Err(Taken {
                kind: kind.to_owned(),
                name: name.to_owned(),
                owner: self.what,
            }
            .into())
        }
    }

    /// Brings an object that was observed (its uid is in `wanted`) to what it should be.
    ///
    /// # Errors
    /// As the API server's.
    pub async fn update(
        &self,
        resource: &ApiResource,
        wanted: &DynamicObject,
    ) -> anyhow::Result<()> {
        // A merge, not an apply: a port that somebody renumbered would otherwise be kept beside ours, and
        // two of one name are refused for ever. A merge replaces lists whole. The uid is the one observed.
        let params = PatchParams {
            field_manager: Some(names::OPERATOR_FIELD_MANAGER.to_owned()),
            ..Default::default()
        };
        bounded(
            "update",
            self.api(resource)
                .patch(&wanted.name_any(), &params, &Patch::Merge(wanted)),
        )
        .await?;
        Ok(())
    }

    /// Deletes exactly this object; one that is gone, or another in its place, is no failure.
    ///
    /// # Errors
    /// As the API server's.
    pub async fn delete(
        &self,
        resource: &ApiResource,
        name: &str,
        uid: &str,
    ) -> anyhow::Result<()> {
        delete(&self.api(resource), name, uid).await
    }

    /// Ends exactly this pod, which has two seconds for it, whatever it asks for itself and whenever its end began;
    /// one that is gone, or another in its place, is no failure.
    ///
    /// # Errors
    /// As the API server's.
    pub async fn fence(&self, name: &str, uid: &str) -> anyhow::Result<()> {
        let pods = self.api(&ApiResource::erase::<Pod>(&()));
        end(&pods, name, uid, Some(FENCE_GRACE)).await
    }

    /// Makes or replaces a Secret of this one's; never one of somebody else. `metadata` without a version.
    ///
    /// # Errors
    /// As the API server's, or if a Secret of that name is somebody else's.
    pub async fn put_secret(
        &self,
        metadata: Value,
        content: &[(&str, String)],
    ) -> anyhow::Result<()> {
        let data: serde_json::Map<String, Value> = content
            .iter()
            .map(|(k, v)| ((*k).to_owned(), json!(v)))
            .collect();
        let mut value = json!({ "apiVersion": "v1", "kind": "Secret", "metadata": metadata, "stringData": data, "type": "Opaque" });
        let name = value["metadata"]["name"].as_str().unwrap_or_default();
        let name = name.to_owned();
        match bounded("read a Secret", self.secrets().get_opt(&name)).await? {
            None => {
                self.create(&ApiResource::erase::<Secret>(&()), &value)
                    .await
            }
            Some(found) => {
                self.must_own("Secret", &name, found.labels(), found.owner_references())?;
                value["metadata"]["resourceVersion"] = json!(found.resource_version());
                let secret: Secret = serde_json::from_value(value)?;
                bounded(
                    "replace a Secret",
                    self.secrets()
                        .replace(&name, &PostParams::default(), &secret),
                )
                .await?;
                Ok(())
            }
        }
    }

    /// Tells something as an event. One that can't be written fails nothing: the words are in the log, too.
    pub async fn tell(&self, reason: &str, warning: bool, note: &str) {
        let event = kube::runtime::events::Event {
            type_: kind(warning),
            reason: reason.to_owned(),
            note: Some(short(note)),
            action: ACTION.to_owned(),
            secondary: None,
        };
        self.publish(&event).await;
    }

    /// As [`Self::tell`].
    pub async fn publish(&self, event: &kube::runtime::events::Event) {
        let told = bounded(
            "write an event",
            self.ctx.recorder.publish(event, &self.reference),
        );
        if let Err(error) = told.await {
            tracing::warn!(object = %self.name(), namespace = %self.namespace(), error = words(&error), "event not written");
        }
    }
}

/// Deletes exactly this object; one that is gone, or another in its place, is no failure.
///
/// # Errors
/// As the API server's.
pub async fn delete(api: &Api<DynamicObject>, name: &str, uid: &str) -> anyhow::Result<()> {
    end(api, name, uid, None).await
}

/// Whether the end of a pod, if it has begun, may take longer than one that is fenced has.
#[must_use]
pub fn lingers(pod: &Pod) -> bool {
    let ending = pod.metadata.deletion_timestamp.is_some();
    !ending
        || pod
            .metadata
            .deletion_grace_period_seconds
            .is_none_or(|s| s > i64::from(FENCE_GRACE))
}

async fn end(
    api: &Api<DynamicObject>,
    name: &str,
    uid: &str,
    grace: Option<u32>,
) -> anyhow::Result<()> {
    let preconditions = Preconditions {
        uid: Some(uid.to_owned()),
        resource_version: None,
    };
    let params = DeleteParams {
        preconditions: Some(preconditions),
        grace_period_seconds: grace,
        ..DeleteParams::default()
    };
    match bounded("delete", api.delete(name, &params)).await {
        Err(error) if !is_not_found(&error) && !is_conflict(&error) => Err(error),
        _ => Ok(()),
    }
}

/// The type of an event.
#[must_use]
pub fn kind(warning: bool) -> EventType {
    if warning {
        EventType::Warning
    } else {
        EventType::Normal
    }
}

/// Events take at most 1 kB of note.
#[must_use]
pub fn short(note: &str) -> String {
    note.chars().take(900).collect()
}

/// An object of that name exists.
#[must_use]
pub fn already_exists(error: &anyhow::Error) -> bool {
    matches!(error.downcast_ref::<kube::Error>(), Some(kube::Error::Api(status)) if status.is_already_exists())
}

/// The object doesn't exist (any more).
#[must_use]
pub fn is_not_found(error: &anyhow::Error) -> bool {
    matches!(error.downcast_ref::<kube::Error>(), Some(kube::Error::Api(status)) if status.is_not_found())
}

/// The object has changed, or another of the same name has taken its place.
#[must_use]
pub fn is_conflict(error: &anyhow::Error) -> bool {
    matches!(error.downcast_ref::<kube::Error>(), Some(kube::Error::Api(status)) if status.is_conflict())
}
