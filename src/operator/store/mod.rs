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
use kube::core::{DeserializeGuard, PartialObjectMeta};
use kube::runtime::controller::{Action, Config};
use kube::runtime::reflector::ObjectRef;
use kube::runtime::{Controller, watcher};
use kube::{Api, ResourceExt};
use std::sync::Arc;
use std::time::Duration;

use super::context::{Context, Triggers};
use super::geography::{References, concern};
use super::hands::blame;
use super::unreadable;
use crate::api::conditions::reasons;
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
    let concerned = concern::stream(
        ctx.clone(),
        references,
        triggers.paced(PACE),
        |geography, references| concern::marks(geography, &references.stores.state()),
    );
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
        // Its finalizer would hold its namespace for ever. Volumes are kept, whatever its deletion policy was.
        unreadable::complain::<PrivacyDataStore>(
            &ctx,
            &namespace,
            &name,
            &error.to_string(),
            labels::STORE_FINALIZER,
            |_| true,
        )
        .await?;
        return Ok(Action::await_change());
    }
    // Boxed: it holds everything that is read of a store.
    let Some(observed) = Box::pin(observe::observe(&ctx, &namespace, &name)).await? else {
        ctx.metrics.forget(&namespace, &name);
        return Ok(Action::await_change());
    };
    let now = jiff::Timestamp::now();
    let mut plan = plan::plan(&observed, &ctx.settings, now);
    let residence = plan.residence.take();
    ctx.metrics.found(&namespace, &name, residence);
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
        blame(&mut draft.verdicts, error);
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
    let told = |wanted: &str| {
        let steps = plan.steps.iter();
        let told =
            steps.filter(|s| matches!(s, step::Step::Tell { reason, .. } if *reason == wanted));
        told.count() as u64
    };
    let (fenced, erased) = (told(reasons::FENCED), told(reasons::ERASED));
    ctx.metrics.acted(&namespace, &name, fenced, erased);
    if goes {
        ctx.metrics.forget(&namespace, &name);
    }
    ctx.metrics.reconciled(&namespace, &name);
    Ok(Action::requeue(
        plan.again.map_or(RESYNC, |a| a.min(RESYNC)),
    ))
}

// The controller hands these over by value.
#[allow(clippy::needless_pass_by_value)]
fn on_error(guarded: Arc<Guarded>, error: &Error, ctx: Arc<Context>) -> Action {
    let (name, namespace) = (guarded.name_any(), guarded.namespace().unwrap_or_default());
    let failures = ctx.metrics.failed(&namespace, &name);
    tracing::warn!(store = %name, %namespace, failures, %error, "reconcile failed");
    Action::requeue(super::context::backoff(failures))
}

#[cfg(test)]
mod tests;
