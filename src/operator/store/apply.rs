//! Executes a plan's steps, in order, and stops at the first failure.
//!
//! Owns every write to a store's children (`secrets`: those that need keys or randomness).
//! Never decides, never deletes without a uid, and never takes over an object that isn't this store's.

use k8s_openapi::api::core::v1::{PersistentVolumeClaim, Pod, Secret};
use k8s_openapi::api::events::v1::Event;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::MicroTime;
use kube::api::{ApiResource, DynamicObject, Patch, PatchParams, PostParams};
use kube::{Api, Resource, ResourceExt};
use serde_json::{Value, json};

use super::failovers::Told;
use super::step::{Object, Step};
use crate::api::{PrivacyDataStore, labels, names};
use crate::operator::context::{Context, bounded, words};
use crate::operator::hands::{
    ACTION, Hands, REPORTER, already_exists, is_conflict, is_not_found, short,
};

pub use crate::operator::hands::ApplyError;

mod secrets;

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
        hands: Hands {
            ctx,
            resource: ApiResource::erase::<PrivacyDataStore>(&()),
            what: "store",
            label: labels::STORE,
            meta: &store.metadata,
            reference: store.object_ref(&()),
        },
    };
    for step in steps {
        tracing::info!(store = %writer.name, namespace = %writer.namespace, step = %step, "step");
        writer
            .run(step)
            .await
            .map_err(|source| ApplyError::new(step.to_string(), source))?;
    }
    Ok(())
}

struct Writer<'a> {
    ctx: &'a Context,
    store: &'a PrivacyDataStore,
    namespace: String,
    name: String,
    hands: Hands<'a>,
}

impl Writer<'_> {
    async fn run(&self, step: &Step) -> anyhow::Result<()> {
        match step {
            Step::AddFinalizer => {
                self.hands
                    .add_finalizer(labels::STORE_FINALIZER, FINALIZER_MANAGER)
                    .await
            }
            Step::RemoveFinalizer => self.hands.remove_finalizer(labels::STORE_FINALIZER).await,
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
            Step::Create(object, value) => self.hands.create(&Self::resource(*object), value).await,
            Step::Update(kind, object) => self.update(&kind.resource(), object).await,
            Step::Delete { object, name, uid } => {
                self.hands.delete(&Self::resource(*object), name, uid).await
            }
            Step::Fence { name, uid } => self.hands.fence(name, uid).await,
            Step::MarkPrimaryVolume { name, uid, term } => {
                self.mark_primary_volume(name, uid, *term).await
            }
            Step::Tell {
                reason,
                warning,
                note,
            } => {
                self.hands.tell(reason, *warning, note).await;
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
        self.hands.secrets()
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
        self.hands.api(&Self::resource(object))
    }

    async fn update(&self, resource: &ApiResource, wanted: &DynamicObject) -> anyhow::Result<()> {
        let mut wanted = wanted.clone();
        if resource.kind == "EndpointSlice" {
            // Where it leads is the primary's to say.
            if let Value::Object(data) = &mut wanted.data {
                data.remove("endpoints");
            }
        }
        self.hands.update(resource, &wanted).await
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

/// Field manager of the finalizer alone, so that an apply of the status doesn't drop it.
const FINALIZER_MANAGER: &str = "domicile-operator-finalizer";
