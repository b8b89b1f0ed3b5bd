//! The controller of `RightsWorkflow`.
//!
//! A pass reads as its modules: [`observe`] → [`validate`] → [`plan`] → [`apply`] → [`report`]. Only the first and the
//! last two hold a client. Beside the passes, [`backlog`] reads the ledgers.
//! Never holds anything of a person, and is never needed for a request to be taken in or carried out.

pub mod apply;
pub mod assess;
pub mod backlog;
pub mod build;
pub mod keys;
pub mod kinds;
pub mod observe;
pub mod plan;
pub mod pods;
pub mod report;
pub mod step;
pub mod validate;

use futures::StreamExt;
use futures::channel::mpsc;
use k8s_openapi::api::apps::v1::Deployment;
use k8s_openapi::api::core::v1::{Pod, Secret};
use kube::core::{DeserializeGuard, PartialObjectMeta};
use kube::runtime::controller::{Action, Config};
use kube::runtime::reflector::ObjectRef;
use kube::runtime::{Controller, watcher};
use kube::{Api, Resource, ResourceExt};
use std::sync::Arc;
use std::time::Duration;

use super::context::{Context, Triggers, words};
use super::geography::{References, concern};
use super::hands::{ApplyError, blame};
use super::unreadable;
use crate::api::{RightsWorkflow, labels};

/// A workflow as it comes: perhaps not understood.
type Guarded = DeserializeGuard<RightsWorkflow>;

/// Every workflow is looked at this often even if nothing was heard: certificates age, days begin, and not every kind of
/// its objects is watched. Reads only.
const RESYNC: Duration = Duration::from_secs(60);
/// Between two looks at which workflows are concerned by what changed around them.
const PACE: Duration = Duration::from_millis(500);

/// A pass that failed.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The world couldn't be read, or the status not written.
    #[error("{}", words(.0))]
    Io(#[from] anyhow::Error),
    /// A step didn't succeed.
    #[error(transparent)]
    Apply(#[from] ApplyError),
}

/// Runs until the process ends.
pub async fn run(ctx: Arc<Context>, references: Arc<References>, triggers: Triggers) {
    let concerned = concern::stream(
        ctx.clone(),
        references.clone(),
        triggers.paced(PACE),
        |geography, references| {
            let (workflows, stores) = (references.workflows.state(), references.stores.state());
            concern::workflow_marks(geography, &workflows, &stores)
        },
    );
    let (poke, poked) = mpsc::unbounded();
    let client = ctx.client.clone();
    let ours = watcher::Config::default()
        .labels(labels::WORKFLOW)
        .timeout(60);
    let controller = Controller::new(
        Api::<Guarded>::all(client.clone()),
        watcher::Config::default().timeout(60),
    )
    .owns(
        Api::<PartialObjectMeta<Deployment>>::all(client.clone()),
        ours.clone(),
    )
    .watches(
        Api::<PartialObjectMeta<Pod>>::all(client.clone()),
        ours.clone(),
        |object| by_label(&object),
    )
    .watches(
        Api::<PartialObjectMeta<Secret>>::all(client),
        ours,
        |object| by_label(&object),
    )
    .reconcile_on(concerned)
    .reconcile_on(poked)
    .with_config(Config::default().debounce(Duration::from_millis(200)))
    .run(reconcile, on_error, ctx.clone())
    .for_each(|outcome| async move {
        // Failures are logged where they happen; an object that is gone meanwhile is no failure.
        drop(outcome);
    });
    tokio::join!(controller, backlog::run(ctx, references, poke));
}

fn by_label<K: Resource>(object: &PartialObjectMeta<K>) -> Option<ObjectRef<Guarded>> {
    let name = object.labels().get(labels::WORKFLOW)?;
    Some(ObjectRef::new(name).within(&object.namespace()?))
}

async fn reconcile(guarded: Arc<Guarded>, ctx: Arc<Context>) -> Result<Action, Error> {
    let (name, namespace) = (guarded.name_any(), guarded.namespace().unwrap_or_default());
    let room = ctx.passes.acquire().await.map_err(anyhow::Error::from)?;
    if let Err(error) = &guarded.0 {
        // Whether its requests are closed can't be known: only a person's word lets it go.
        let abandoned = |object: &kube::api::DynamicObject| {
            let said = object.annotations().get(labels::ABANDON_REQUESTS);
            said.is_some_and(|v| v == "true")
        };
        unreadable::complain::<RightsWorkflow>(
            &ctx,
            &namespace,
            &name,
            &error.to_string(),
            labels::RIGHTS_FINALIZER,
            abandoned,
        )
        .await?;
        return Ok(Action::await_change());
    }
    // Boxed: it holds everything that is read of a workflow.
    let Some(observed) = Box::pin(observe::observe(&ctx, &namespace, &name)).await? else {
        return Ok(Action::await_change());
    };
    let now = jiff::Timestamp::now();
    let plan = plan::plan(&observed, &ctx.settings, now);
    let goes = plan
        .steps
        .iter()
        .any(|s| matches!(s, step::Step::RemoveFinalizer));
    let applied = apply::apply(&ctx, &observed.workflow, &plan.steps).await;
    drop(room);
    let mut draft = plan.draft;
    if let Err(error) = &applied {
        blame(&mut draft.verdicts, error);
    }
    if !(goes && applied.is_ok()) {
        report::report(&ctx, &observed.workflow, &draft, now).await?;
    }
    applied?;
    ctx.metrics.reconciled(&namespace, &counted(&name));
    Ok(Action::requeue(RESYNC))
}

/// Failures are counted by name, and a store may have the same.
fn counted(name: &str) -> String {
    format!("workflow/{name}")
}

// The controller hands these over by value.
#[allow(clippy::needless_pass_by_value)]
fn on_error(guarded: Arc<Guarded>, error: &Error, ctx: Arc<Context>) -> Action {
    let (name, namespace) = (guarded.name_any(), guarded.namespace().unwrap_or_default());
    let failures = ctx.metrics.failed(&namespace, &counted(&name));
    tracing::warn!(workflow = %name, %namespace, failures, %error, "reconcile failed");
    Action::requeue(super::context::backoff(failures))
}

#[cfg(test)]
mod tests;
