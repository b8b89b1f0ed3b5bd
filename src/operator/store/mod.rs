//! The controller of `PrivacyDataStore`.
//!
//! A pass reads as its modules: [`observe`] → [`validate`] → [`plan`] → [`apply`] → [`report`]. Only the
//! first and the last two hold a client.
//! Never decides a failover, and is never needed for a store to keep serving.

pub mod apply;
pub mod assess;
pub mod attest;
pub mod build;
pub mod certificates;
pub mod evict;
pub mod failovers;
pub mod found;
pub mod kinds;
pub mod leader;
pub mod lifecycle;
pub mod lost;
pub mod observe;
pub mod plan;
pub mod report;
pub mod requests;
pub mod rotation;
pub mod step;
pub mod validate;
mod verdicts;

use futures::StreamExt;
use k8s_openapi::api::core::v1::{PersistentVolumeClaim, Pod, Secret, Service};
use k8s_openapi::api::discovery::v1::EndpointSlice;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Condition;
use kube::api::{Patch, PatchParams};
use kube::core::{DeserializeGuard, PartialObjectMeta};
use kube::runtime::controller::{Action, Config};
use kube::runtime::reflector::ObjectRef;
use kube::runtime::{Controller, watcher};
use kube::{Api, Resource, ResourceExt};
use serde_json::json;
use std::sync::Arc;
use std::time::Duration;

use super::context::{Context, Triggers, bounded};
use super::geography::{References, concern};
use crate::api::conditions::{self, Verdict, reasons};
use crate::api::{PrivacyDataStore, labels};

/// A store as it comes: perhaps not understood.
type Guarded = DeserializeGuard<PrivacyDataStore>;

/// Every store is looked at this often even if nothing was heard: certificates age, and a namespace's labels
/// aren't watched. Reads only.
const RESYNC: Duration = Duration::from_secs(60);
/// Stores reconciled at the same time.
pub const CONCURRENCY: usize = 8;
/// Between two looks at which stores are concerned by what changed around them.
const PACE: Duration = Duration::from_millis(200);

/// A pass that failed.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The world couldn't be read, or the status not written.
    #[error("{}", super::context::words(.0))]
    Io(#[from] anyhow::Error),
    /// A step didn't succeed.
    #[error(transparent)]
    Apply(#[from] apply::ApplyError),
}

/// Runs until the process ends.
pub async fn run(ctx: Arc<Context>, references: Arc<References>, triggers: Triggers) {
    let concerned = concern::stream(ctx.clone(), references, triggers.paced(PACE));
    let client = ctx.client.clone();
    let ours = watcher::Config::default()
        .labels(&format!(
            "{}={}",
            labels::MANAGED_BY,
            labels::MANAGED_BY_VALUE
        ))
        .timeout(60);
    let all = Api::<Guarded>::all(client.clone());
    let by_label = |object: PartialObjectMeta<PersistentVolumeClaim>| {
        let name = object.labels().get(labels::STORE).cloned();
        name.zip(object.namespace())
            .map(|(name, ns)| ObjectRef::<Guarded>::new(&name).within(&ns))
    };
    Controller::new(all, watcher::Config::default().timeout(60))
        .owns(
            Api::<PartialObjectMeta<Pod>>::all(client.clone()),
            ours.clone(),
        )
        .owns(
            Api::<PartialObjectMeta<Service>>::all(client.clone()),
            ours.clone(),
        )
        .owns(
            Api::<PartialObjectMeta<Secret>>::all(client.clone()),
            ours.clone(),
        )
        .owns(
            Api::<PartialObjectMeta<EndpointSlice>>::all(client.clone()),
            ours.clone(),
        )
        .watches(
            Api::<PartialObjectMeta<PersistentVolumeClaim>>::all(client),
            ours.clone(),
            by_label,
        )
        .reconcile_on(concerned)
        // Unbounded here: see [`Context::passes`].
        .with_config(Config::default().debounce(Duration::from_millis(50)))
        .run(reconcile, on_error, ctx)
        .for_each(|outcome| async move {
            // Failures are logged where they happen; an object that is gone meanwhile is no failure.
            drop(outcome);
        })
        .await;
}

async fn reconcile(guarded: Arc<Guarded>, ctx: Arc<Context>) -> Result<Action, Error> {
    let (name, namespace) = (guarded.name_any(), guarded.namespace().unwrap_or_default());
    let room = ctx.passes.acquire().await.map_err(anyhow::Error::from)?;
    if let Err(error) = &guarded.0 {
        complain(&ctx, &namespace, &name, &error.to_string()).await?;
        return Ok(Action::await_change());
    }
    // Boxed: it holds everything that is read of a store.
    let Some(observed) = Box::pin(observe::observe(&ctx, &namespace, &name)).await? else {
        return Ok(Action::await_change());
    };
    let now = jiff::Timestamp::now();
    let plan = plan::plan(&observed, &ctx.settings, now);
    let goes = plan
        .steps
        .iter()
        .any(|s| matches!(s, step::Step::RemoveFinalizer));
    // The last word is kept before the store goes: afterwards nobody comes back to say it.
    let last_word = if goes {
        attest::attest(&ctx, &observed, now).await
    } else {
        None
    };
    let applied = apply::apply(&ctx, &observed.store, &plan.steps).await;
    // Instances that don't answer keep nobody else waiting.
    drop(room);
    let mut draft = plan.draft;
    if let Err(error) = &applied {
        if plan
            .steps
            .iter()
            .any(|s| matches!(s, step::Step::RecordPrimary { .. }))
        {
            // It may have been refused because another operator was first: its word stands.
            let status = observed.store.status.as_ref();
            draft.primary = status.and_then(|s| s.primary.clone());
            draft.term = status.and_then(|s| s.term);
        }
        blame(&mut draft, error);
    }
    // Whatever became of the steps: what was seen was seen.
    draft.verdicts.extend(if goes {
        last_word
    } else {
        attest::attest(&ctx, &observed, now).await
    });
    if !(goes && applied.is_ok()) {
        report::report(&ctx, &observed.store, &draft, now).await?;
    }
    applied?;
    ctx.metrics.reconciled(&namespace, &name);
    Ok(Action::requeue(
        plan.again.map_or(RESYNC, |a| a.min(RESYNC)),
    ))
}

/// What a failed step means for the conditions.
fn blame(draft: &mut assess::Draft, error: &apply::ApplyError) {
    let taken = error.reason == reasons::NAME_TAKEN;
    for verdict in &mut draft.verdicts {
        let status = match verdict.kind {
            conditions::READY => false,
            conditions::RECONCILING => !taken,
            conditions::STALLED => taken,
            _ => continue,
        };
        *verdict = Verdict::new(verdict.kind, status, error.reason, error.to_string());
    }
}

// The controller hands these over by value.
#[allow(clippy::needless_pass_by_value)]
fn on_error(guarded: Arc<Guarded>, error: &Error, ctx: Arc<Context>) -> Action {
    let (name, namespace) = (guarded.name_any(), guarded.namespace().unwrap_or_default());
    let failures = ctx.metrics.failed(&namespace, &name);
    tracing::warn!(store = %name, %namespace, failures, %error, "reconcile failed");
    // 1, 2, 4, … 64 s: a store that can't be mended by trying costs little.
    Action::requeue(Duration::from_secs(1 << failures.saturating_sub(1).min(6)))
}

/// Says on a store that can't be understood that it can't, without touching anything else of it.
async fn complain(ctx: &Context, namespace: &str, name: &str, error: &str) -> anyhow::Result<()> {
    let resource = kube::core::ApiResource::erase::<PrivacyDataStore>(&());
    let api: Api<kube::api::DynamicObject> =
        Api::namespaced_with(ctx.client.clone(), namespace, &resource);
    let Some(object) = bounded("read the store", api.get_opt(name)).await? else {
        return Ok(());
    };
    let old: Vec<Condition> =
        serde_json::from_value(object.data["status"]["conditions"].clone()).unwrap_or_default();
    if object.metadata.deletion_timestamp.is_some() {
        return release(&api, &object).await;
    }
    let message = format!("this object can't be understood, and is left alone: {error}");
    let verdicts = [
        Verdict::new(conditions::READY, false, reasons::INVALID, message.clone()),
        Verdict::new(conditions::STALLED, true, reasons::INVALID, message),
    ];
    let new = conditions::merge(
        &old,
        &verdicts,
        object.meta().generation,
        jiff::Timestamp::now(),
    );
    if new == old {
        return Ok(());
    }
    let patch = json!({ "metadata": { "uid": object.uid() }, "status": { "conditions": new } });
    bounded(
        "write the status",
        api.patch_status(name, &PatchParams::default(), &Patch::Merge(patch)),
    )
    .await?;
    Ok(())
}

/// Lets a store go that can't be understood: its finalizer would hold its namespace for ever. Volumes are
/// kept, whatever its deletion policy was.
async fn release(
    api: &Api<kube::api::DynamicObject>,
    object: &kube::api::DynamicObject,
) -> anyhow::Result<()> {
    if !object
        .finalizers()
        .iter()
        .any(|f| f == labels::STORE_FINALIZER)
    {
        return Ok(());
    }
    let left: Vec<&String> = object
        .finalizers()
        .iter()
        .filter(|f| *f != labels::STORE_FINALIZER)
        .collect();
    let patch = json!({ "metadata": {
        "uid": object.uid(), "resourceVersion": object.resource_version(), "finalizers": left,
    } });
    let name = object.name_any();
    bounded(
        "remove the finalizer",
        api.patch(&name, &PatchParams::default(), &Patch::Merge(patch)),
    )
    .await?;
    Ok(())
}

#[cfg(test)]
mod tests;
