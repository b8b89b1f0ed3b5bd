//! Executes a plan's steps, in order, and stops at the first failure.
//!
//! Owns every write to a store's children (`secrets`: those that need keys or randomness).
//! Never decides, never deletes without a uid, and never takes over an object that isn't this store's.

use k8s_openapi::api::core::v1::{PersistentVolumeClaim, Pod, Secret};
use k8s_openapi::api::events::v1::Event;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::MicroTime;
use kube::api::{
    ApiResource, DeleteParams, DynamicObject, Patch, PatchParams, PostParams, Preconditions,
};
use kube::runtime::events::EventType;
use kube::{Api, Resource, ResourceExt};
use serde_json::{Value, json};

use super::failovers::Told;
use super::step::{Object, Step};
use crate::api::conditions::reasons;
use crate::api::{PrivacyDataStore, labels, names};
use crate::operator::context::{Context, bounded, words};

mod secrets;

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

/// Executes `steps`.
///
/// # Errors
/// The first step that fails; those behind it are not tried, since each relies on those before it.
pub async fn apply(
    ctx: &Context,
    store: &PrivacyDataStore,
    steps: &[Step],
) -> Result<(), ApplyError> {
    let writer = Writer {
        ctx,
        store,
        namespace: store.namespace().unwrap_or_default(),
        name: store.name_any(),
    };
    for step in steps {
        tracing::info!(store = %writer.name, namespace = %writer.namespace, step = %step, "step");
        writer.run(step).await.map_err(|source| ApplyError {
            step: step.to_string(),
            reason: if source.is::<Taken>() {
                reasons::NAME_TAKEN
            } else {
                APPLY_FAILED
            },
            source,
        })?;
    }
    Ok(())
}

/// Reason for everything that isn't the user's to mend.
const APPLY_FAILED: &str = "ApplyFailed";

/// An object of a needed name belongs to somebody else.
#[derive(Debug, thiserror::Error)]
#[error(
    "{kind} {name} exists and is not this store's: rename the store, or remove the object if nobody needs it"
)]
struct Taken {
    kind: String,
    name: String,
}

struct Writer<'a> {
    ctx: &'a Context,
    store: &'a PrivacyDataStore,
    namespace: String,
    name: String,
}

impl Writer<'_> {
    async fn run(&self, step: &Step) -> anyhow::Result<()> {
        match step {
            Step::AddFinalizer => self.add_finalizer().await,
            Step::RemoveFinalizer => self.remove_finalizer().await,
            Step::RecordPrimary {
                name,
                term,
                instead_of,
            } => {
                self.record_primary(name, *term, instead_of.as_deref())
                    .await
            }
            Step::MoveClaim {
                name,
                uid,
                version,
                zone,
            } => self.move_claim(name, uid, version, zone).await,
            Step::CreateAuthority => self.create_authority().await,
            Step::AnnounceAuthority { switch_after } => self.announce(*switch_after).await,
            Step::SwitchAuthority { next } => self.switch_authority(next).await,
            Step::RetireAuthorities { active } => self.retire_authorities(active).await,
            Step::Entrust { instance } => self.entrust(instance).await,
            Step::IssueCertificate { instance, names } => {
                self.issue_certificate(instance, names).await
            }
            Step::WriteAppSecret(secret) => self.write_app_secret(secret).await,
            Step::Create(object, value) => self.create(*object, value).await,
            Step::Update(kind, object) => self.update(&kind.resource(), object).await,
            Step::Delete { object, name, uid } => self.delete(*object, name, uid).await,
            Step::MarkPrimaryVolume { name, uid, term } => {
                self.mark_primary_volume(name, uid, *term).await
            }
            Step::Tell {
                reason,
                warning,
                note,
            } => {
                self.tell(reason, *warning, note).await;
                Ok(())
            }
            Step::TellFailover(told) => self.tell_failover(told).await,
            Step::RemoveAnnotation { name, value } => self.remove_annotation(name, value).await,
            Step::ForgetInstance { name } => self.forget_instance(name).await,
        }
    }

    fn stores(&self) -> Api<PrivacyDataStore> {
        Api::namespaced(self.ctx.client.clone(), &self.namespace)
    }

    fn secrets(&self) -> Api<Secret> {
        Api::namespaced(self.ctx.client.clone(), &self.namespace)
    }

    /// A merge patch of the store that fails if it has changed or is another store of the same name.
    fn guarded(&self, mut patch: Value) -> Patch<Value> {
        patch["metadata"]["uid"] = json!(self.store.uid());
        patch["metadata"]["resourceVersion"] = json!(self.store.resource_version());
        Patch::Merge(patch)
    }

    async fn add_finalizer(&self) -> anyhow::Result<()> {
        // Applied, since the list is a set that others add to as well; the uid keeps a namesake out.
        let patch = json!({
            "apiVersion": "domicile.dev/v1alpha1", "kind": "PrivacyDataStore",
            "metadata": { "uid": self.store.uid(), "finalizers": [labels::STORE_FINALIZER] },
        });
        let params = PatchParams::apply(FINALIZER_MANAGER).force();
        bounded(
            "add the finalizer",
            self.stores()
                .patch(&self.name, &params, &Patch::Apply(patch)),
        )
        .await?;
        Ok(())
    }

    async fn remove_finalizer(&self) -> anyhow::Result<()> {
        let left: Vec<&String> = self
            .store
            .finalizers()
            .iter()
            .filter(|f| *f != labels::STORE_FINALIZER)
            .collect();
        let patch = self.guarded(json!({ "metadata": { "finalizers": left } }));
        let done = bounded(
            "remove the finalizer",
            self.stores()
                .patch(&self.name, &PatchParams::default(), &patch),
        )
        .await;
        match done {
            Err(error) if !is_not_found(&error) => Err(error),
            _ => Ok(()),
        }
    }

    async fn record_primary(
        &self,
        name: &str,
        term: i64,
        instead_of: Option<&str>,
    ) -> anyhow::Result<()> {
        // Conditional on what was read: two operators, or a stale one, can't both found.
        let current = bounded("read the store", self.stores().get(&self.name)).await?;
        anyhow::ensure!(
            current.uid() == self.store.uid(),
            "the store was replaced by another of the same name"
        );
        let on_record = current.status.as_ref().and_then(|s| s.primary.as_deref());
        anyhow::ensure!(
            on_record == instead_of,
            "another operator has recorded a primary meanwhile"
        );
        let patch = json!({
            "metadata": { "uid": current.uid(), "resourceVersion": current.resource_version() },
            "status": { "primary": name, "term": term },
        });
        let params = PatchParams {
            field_manager: Some(names::OPERATOR_FIELD_MANAGER.to_owned()),
            ..Default::default()
        };
        bounded(
            "record the primary",
            self.stores()
                .patch_status(&self.name, &params, &Patch::Merge(patch)),
        )
        .await?;
        Ok(())
    }

    fn resource(object: Object) -> ApiResource {
        match object {
            Object::Pod => ApiResource::erase::<Pod>(&()),
            Object::Claim => ApiResource::erase::<PersistentVolumeClaim>(&()),
            Object::Secret => ApiResource::erase::<Secret>(&()),
            Object::Child(kind) => kind.resource(),
        }
    }

    fn api(&self, object: Object) -> Api<DynamicObject> {
        Api::namespaced_with(
            self.ctx.client.clone(),
            &self.namespace,
            &Self::resource(object),
        )
    }

    async fn create(&self, object: Object, value: &Value) -> anyhow::Result<()> {
        let wanted: DynamicObject = serde_json::from_value(value.clone())?;
        let api = self.api(object);
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
                    &Self::resource(object).kind,
                    &name,
                    found.labels(),
                    found.owner_references(),
                )
            }
            Err(error) => Err(error),
        }
    }

    fn must_own(
        &self,
        kind: &str,
        name: &str,
        found: &std::collections::BTreeMap<String, String>,
        owners: &[k8s_openapi::apimachinery::pkg::apis::meta::v1::OwnerReference],
    ) -> anyhow::Result<()> {
        let labelled = found.get(labels::STORE) == Some(&self.name)
            && found
                .get(labels::MANAGED_BY)
                .is_some_and(|v| v == labels::MANAGED_BY_VALUE);
        let uid = self.store.uid();
        let foreign = owners
            .iter()
            .any(|o| o.controller == Some(true) && Some(&o.uid) != uid.as_ref());
        if labelled && !foreign {
            Ok(())
        } else {
            Err(Taken {
                kind: kind.to_owned(),
                name: name.to_owned(),
            }
            .into())
        }
    }

    async fn update(&self, resource: &ApiResource, wanted: &DynamicObject) -> anyhow::Result<()> {
        let api: Api<DynamicObject> =
            Api::namespaced_with(self.ctx.client.clone(), &self.namespace, resource);
        let mut wanted = wanted.clone();
        if resource.kind == "EndpointSlice" {
            // Where it leads is the primary's to say.
            if let Value::Object(data) = &mut wanted.data {
                data.remove("endpoints");
            }
        }
        // A merge, not an apply: a port that somebody renumbered would otherwise be kept beside ours, and
        // two of one name are refused for ever. A merge replaces lists whole. The uid is the one observed.
        let params = PatchParams {
            field_manager: Some(names::OPERATOR_FIELD_MANAGER.to_owned()),
            ..Default::default()
        };
        bounded(
            "update",
            api.patch(&wanted.name_any(), &params, &Patch::Merge(&wanted)),
        )
        .await?;
        Ok(())
    }

    async fn delete(&self, object: Object, name: &str, uid: &str) -> anyhow::Result<()> {
        let preconditions = Preconditions {
            uid: Some(uid.to_owned()),
            resource_version: None,
        };
        let params = DeleteParams {
            preconditions: Some(preconditions),
            ..DeleteParams::default()
        };
        match bounded("delete", self.api(object).delete(name, &params)).await {
            Err(error) if !is_not_found(&error) && !is_conflict(&error) => Err(error),
            _ => Ok(()),
        }
    }

    async fn mark_primary_volume(&self, name: &str, uid: &str, term: i64) -> anyhow::Result<()> {
        let patch = json!({ "metadata": { "uid": uid, "annotations": { labels::PRIMARY_TERM: term.to_string() } } });
        let api = self.api(Object::Claim);
        bounded(
            "mark the primary's volume",
            api.patch(name, &PatchParams::default(), &Patch::Merge(patch)),
        )
        .await?;
        Ok(())
    }

    async fn move_claim(
        &self,
        name: &str,
        uid: &str,
        version: &str,
        zone: &str,
    ) -> anyhow::Result<()> {
        let patch = json!({
            "metadata": { "uid": uid, "resourceVersion": version, "labels": { labels::ZONE: zone } },
        });
        let api = self.api(Object::Claim);
        bounded(
            "move a claim",
            api.patch(name, &PatchParams::default(), &Patch::Merge(patch)),
        )
        .await?;
        Ok(())
    }

    async fn tell(&self, reason: &str, warning: bool, note: &str) {
        let event = kube::runtime::events::Event {
            type_: kind(warning),
            reason: reason.to_owned(),
            note: Some(short(note)),
            action: ACTION.to_owned(),
            secondary: None,
        };
        let reference = self.store.object_ref(&());
        let told = bounded(
            "write an event",
            self.ctx.recorder.publish(&event, &reference),
        );
        // An event that can't be written must not fail the pass: the words are in the log, too.
        if let Err(error) = told.await {
            tracing::warn!(store = %self.name, namespace = %self.namespace, error = words(&error), "event not written");
        }
    }

    /// Under a name of its own, so that another operator, or this one after a restart, doesn't tell it again.
    async fn tell_failover(&self, told: &Told) -> anyhow::Result<()> {
        let event = json!({
            "apiVersion": "events.k8s.io/v1", "kind": "Event",
            "metadata": { "name": told.name, "namespace": self.namespace },
            "type": if told.warning { "Warning" } else { "Normal" },
            "reason": "Failover", "action": ACTION, "note": short(&told.note),
            "eventTime": MicroTime(jiff::Timestamp::now()),
            "reportingController": REPORTER, "reportingInstance": self.ctx.identity,
            "regarding": self.store.object_ref(&()),
        });
        let events: Api<Event> = Api::namespaced(self.ctx.client.clone(), &self.namespace);
        let event: Event = serde_json::from_value(event)?;
        match bounded(
            "write an event",
            events.create(&PostParams::default(), &event),
        )
        .await
        {
            Err(error) if !already_exists(&error) => {
                tracing::warn!(store = %self.name, namespace = %self.namespace, error = words(&error), "event not written");
            }
            _ => {
                let uid = self.store.uid().unwrap_or_default();
                self.ctx.told_failover(&uid, told.term);
            }
        }
        Ok(())
    }

    async fn remove_annotation(&self, name: &str, value: &str) -> anyhow::Result<()> {
        let current = bounded("read the store", self.stores().get(&self.name)).await?;
        let unchanged = current.uid() == self.store.uid()
            && current.annotations().get(name).map(String::as_str) == Some(value);
        if !unchanged {
            // Somebody asks for something else meanwhile.
            return Ok(());
        }
        let patch = json!({ "metadata": {
            "uid": current.uid(), "resourceVersion": current.resource_version(), "annotations": { name: null },
        } });
        let done = bounded(
            "remove an annotation",
            self.stores()
                .patch(&self.name, &PatchParams::default(), &Patch::Merge(patch)),
        )
        .await;
        match done {
            // Changed in between: that change brings the next pass.
            Err(error) if !is_not_found(&error) && !is_conflict(&error) => Err(error),
            _ => Ok(()),
        }
    }

    async fn forget_instance(&self, name: &str) -> anyhow::Result<()> {
        let empty = json!({ "apiVersion": "domicile.dev/v1alpha1", "kind": "PrivacyDataStore", "status": {} });
        let params = PatchParams::apply(&names::instance_field_manager(name)).force();
        bounded(
            "forget an instance",
            self.stores()
                .patch_status(&self.name, &params, &Patch::Apply(empty)),
        )
        .await?;
        Ok(())
    }
}

/// What events say was done.
pub(super) const ACTION: &str = "Reconcile";
/// Who events are from.
pub const REPORTER: &str = "domicile.dev/operator";

fn kind(warning: bool) -> EventType {
    if warning {
        EventType::Warning
    } else {
        EventType::Normal
    }
}

/// Events take at most 1 kB of note.
fn short(note: &str) -> String {
    note.chars().take(900).collect()
}

/// Field manager of the finalizer alone, so that an apply of the status doesn't drop it.
const FINALIZER_MANAGER: &str = "domicile-operator-finalizer";

fn already_exists(error: &anyhow::Error) -> bool {
    matches!(error.downcast_ref::<kube::Error>(), Some(kube::Error::Api(status)) if status.is_already_exists())
}

fn is_not_found(error: &anyhow::Error) -> bool {
    matches!(error.downcast_ref::<kube::Error>(), Some(kube::Error::Api(status)) if status.is_not_found())
}

/// Another object of the same name has taken the place of the one that was to go.
fn is_conflict(error: &anyhow::Error) -> bool {
    matches!(error.downcast_ref::<kube::Error>(), Some(kube::Error::Api(status)) if status.is_conflict())
}
