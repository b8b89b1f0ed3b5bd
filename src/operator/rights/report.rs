//! Writes what a pass found into the workflow's status, and tells changes as events.
//!
//! Owns the whole status. Byte-stable: an unchanged finding writes nothing, and numbers that merely move are written at
//! most twice a minute, so that neither a failing workflow nor a busy ledger costs the API server more.

use jiff::Timestamp;
use kube::api::{Patch, PatchParams};
use kube::{Api, Resource, ResourceExt};
use serde_json::json;

use super::assess::Draft;
use crate::api::rights_workflow::RightsWorkflowStatus;
use crate::api::{GROUP, RightsWorkflow, VERSION, conditions, names};
use crate::operator::context::{Context, bounded, words};
use crate::operator::hands::{is_conflict, is_not_found};
use crate::operator::store::report::event;

/// The status that `draft` comes to.
#[must_use]
pub fn status(workflow: &RightsWorkflow, draft: &Draft, now: Timestamp) -> RightsWorkflowStatus {
    let old = workflow.status.clone().unwrap_or_default();
    let generation = workflow.metadata.generation;
    RightsWorkflowStatus {
        conditions: conditions::merge(&old.conditions, &draft.verdicts, generation, now),
        observed_generation: generation,
        pools: draft.pools.clone(),
        backlog: draft.backlog.clone(),
    }
}

/// Whether the new status must be written: it differs, and not only in numbers that were written just now.
#[must_use]
pub fn due(old: &RightsWorkflowStatus, new: &RightsWorkflowStatus, may_tell: bool) -> bool {
    let mut old = old.clone();
    // The API server keeps the order in which entries came; it means nothing.
    old.pools.sort_by(|a, b| a.region.cmp(&b.region));
    let emptied = |s: &RightsWorkflowStatus| s.backlog.as_ref().map(|b| b.open == 0);
    if !may_tell && emptied(&old) == emptied(new) {
        old.backlog.clone_from(&new.backlog);
    }
    old != *new
}

/// Writes the status if that is due.
///
/// # Errors
/// If the API server refuses or doesn't answer in time.
pub async fn report(
    ctx: &Context,
    workflow: &RightsWorkflow,
    draft: &Draft,
    now: Timestamp,
) -> anyhow::Result<()> {
    let new = status(workflow, draft, now);
    let old = workflow.status.clone().unwrap_or_default();
    let uid = workflow.uid().unwrap_or_default();
    if !due(&old, &new, ctx.backlogs.may_tell(&uid)) {
        if old.backlog == new.backlog {
            ctx.backlogs.told(&uid, new.backlog.as_ref());
        }
        return Ok(());
    }
    let namespace = workflow.namespace().unwrap_or_default();
    let api: Api<RightsWorkflow> = Api::namespaced(ctx.client.clone(), &namespace);
    let patch = json!({
        "apiVersion": format!("{GROUP}/{VERSION}"), "kind": "RightsWorkflow",
        // The uid: an apply would otherwise bring a deleted workflow's status onto its namesake.
        "metadata": { "uid": workflow.uid() }, "status": new,
    });
    let params = PatchParams::apply(names::OPERATOR_FIELD_MANAGER).force();
    let name = workflow.name_any();
    let written = bounded(
        "write the status",
        api.patch_status(&name, &params, &Patch::Apply(patch)),
    )
    .await;
    match written {
        Ok(_) => ctx.backlogs.told(&uid, new.backlog.as_ref()),
        Err(error) if is_not_found(&error) || is_conflict(&error) => return Ok(()),
        Err(error) => return Err(error),
    }
    if let Some(event) = event(&old.conditions, &new.conditions) {
        // An event that can't be written must not fail the pass.
        let reference = workflow.object_ref(&());
        let told = bounded("write an event", ctx.recorder.publish(&event, &reference));
        if let Err(error) = told.await {
            tracing::warn!(workflow = %name, %namespace, error = words(&error), "event not written");
        }
    }
    Ok(())
}
