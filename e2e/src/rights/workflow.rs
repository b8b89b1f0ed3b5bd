//! A workflow on the test bed: its conditions, and its ledger as the superuser sees it.

use anyhow::{Context, Result};
use kube::Api;
use kube::api::DynamicObject;
use kube::core::{ApiResource, GroupVersionKind};

use crate::harness::{PATIENCE, Scope, condition, wait_for};

/// The workflows of a namespace.
#[must_use]
pub fn workflows(scope: &Scope) -> Api<DynamicObject> {
    let kind = GroupVersionKind::gvk("domicile.dev", "v1alpha1", "RightsWorkflow");
    let resource = ApiResource::from_gvk_with_plural(&kind, "rightsworkflows");
    Api::namespaced_with(scope.harness().client(), &scope.namespace, &resource)
}

/// Waits until a condition of a workflow has this status; the error says what it is instead.
///
/// # Errors
/// If it doesn't come to that in time.
pub async fn wait_workflow(
    scope: &Scope,
    name: &str,
    kind: &str,
    status: &str,
) -> Result<DynamicObject> {
    let mut last = None;
    let found = tokio::time::timeout(
        PATIENCE,
        wait_for(workflows(scope), name, |workflow: &DynamicObject| {
            last = Some(workflow.data["status"].to_string());
            workflow.data["status"]["observedGeneration"].as_i64() == workflow.metadata.generation
                && condition(workflow, kind).is_some_and(|(s, ..)| s == status)
        }),
    )
    .await;
    found.with_context(|| format!("workflow {name}: no {kind}={status}: {last:?}"))?
}

/// What the ledger of a workflow, in the store of the same name, says to the superuser on the primary.
///
/// # Errors
/// If there is no primary, or psql fails.
pub async fn ledger(scope: &Scope, name: &str, sql: &str) -> Result<String> {
    let primary = scope.primary(name).await?;
    scope.sql(&primary, &format!("rights-{name}"), sql).await
}
