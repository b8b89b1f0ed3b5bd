//! Gateways and workers of a workflow whose node says that it is abroad.
//!
//! Owns the workflow, which is there only while its case is measured. Copies of stores on the same node get outside with
//! it; they are `drift`'s to measure.

use std::time::Instant;

use anyhow::{Context, Result, ensure};
use k8s_openapi::api::core::v1::Pod;
use kube::ResourceExt;
use kube::api::{DeleteParams, ListParams};
use serde_json::json;

use super::ground::{Ground, NAME, REGION};
use super::sample::Sample;
use crate::failover::inject::Victim;
use crate::harness::{PATIENCE, condition, wait_for};
use crate::rights::workflow::workflows;

/// The workflow.
pub const WORKFLOW: &str = "requests";
/// Whose store has its ledger.
const STORE: &str = "alpha";
/// What a gateway or a worker is, as the machine's list of processes has it.
const PROGRAM: &str = "domicile";

/// Makes the workflow and waits until it is ready.
///
/// # Errors
/// If it doesn't come to that.
pub async fn begin(ground: &Ground) -> Result<()> {
    ground
        .scope
        .apply(&json!({
            "apiVersion": "domicile.dev/v1alpha1", "kind": "RightsWorkflow",
            "metadata": { "name": WORKFLOW, "namespace": NAME },
            "spec": {
                "ledgerRef": { "name": STORE }, "residencyPolicyRef": { "name": NAME },
                "regimes": ["us-ca-ccpa"], "identifiers": ["customerId"],
                "targets": [{ "name": "accounts", "type": "PostgreSQL", "postgresql": {
                    "storeRef": { "name": STORE },
                    "erase": [{ "table": "customer", "where": { "id": "customerId" } }],
                } }],
                "gateway": { "replicas": { "min": 2, "max": 2 } },
                "workers": { "pools": [
                    { "region": "us-west", "min": 2, "max": 2 }, { "region": "us-east", "min": 1, "max": 1 },
                ] },
            },
        }))
        .await?;
    whole(ground).await
}

/// Takes it away again.
///
/// # Errors
/// If it stays.
pub async fn end(ground: &Ground) -> Result<()> {
    let all = workflows(&ground.scope);
    match all.delete(WORKFLOW, &DeleteParams::default()).await {
        Err(kube::Error::Api(e)) if e.is_not_found() => return Ok(()),
        other => other.map(drop)?,
    }
    let gone = kube::runtime::wait::await_condition(
        all,
        WORKFLOW,
        |w: Option<&kube::api::DynamicObject>| w.is_none(),
    );
    tokio::time::timeout(PATIENCE, gone)
        .await
        .context("the workflow stays")??;
    Ok(())
}

async fn whole(ground: &Ground) -> Result<()> {
    let well = wait_for(
        workflows(&ground.scope),
        WORKFLOW,
        |w: &kube::api::DynamicObject| {
            ["Ready", "Resident"]
                .iter()
                .all(|kind| condition(w, kind).is_some_and(|c| c.0 == "True"))
        },
    );
    tokio::time::timeout(PATIENCE, well)
        .await
        .context("the workflow isn't ready")??;
    Ok(())
}

/// The pods of the workflow that are to stay, with whether each is a worker.
async fn pods(ground: &Ground) -> Result<Vec<(Victim, bool)>> {
    let ours = ListParams::default().labels(&format!("domicile.dev/workflow={WORKFLOW}"));
    let mut all = Vec::new();
    for pod in ground.scope.api::<Pod>().list(&ours).await? {
        if pod.metadata.deletion_timestamp.is_some() {
            continue;
        }
        let component = pod.labels().get("app.kubernetes.io/component");
        let worker = component.is_some_and(|c| c == "worker");
        all.push((Victim::find(&ground.scope, &pod.name_any()).await?, worker));
    }
    Ok(all)
}

/// The node under a worker says that it is abroad. A sample for each pod of the workflow that is on it.
///
/// # Errors
/// If one isn't found or stopped at all, or all isn't well again after it.
pub async fn run(ground: &Ground, number: usize) -> Result<Vec<Sample>> {
    ground.whole().await?;
    whole(ground).await?;
    let all = pods(ground).await?;
    let workers: Vec<&Victim> = all.iter().filter(|(_, w)| *w).map(|(v, _)| v).collect();
    ensure!(!workers.is_empty(), "no worker runs");
    let node = workers[number % workers.len()].node.clone();
    let victims: Vec<&Victim> = all
        .iter()
        .map(|(v, _)| v)
        .filter(|v| v.node == node)
        .collect();
    let begin = Instant::now();
    ground
        .label(&node, &json!({ REGION: "eu-central-1" }))
        .await?;
    let each = victims
        .iter()
        .map(|v| ground.outside(WORKFLOW, v, PROGRAM, begin));
    let measured = futures::future::try_join_all(each).await;
    let mut alarms = Vec::new();
    for seen in ground.history.since(WORKFLOW, begin) {
        if seen.resident.1 != "Outside" {
            continue;
        }
        // A refusal has parts of its own behind the same sign.
        let called = seen
            .resident
            .2
            .split("; ")
            .filter(|words| words.contains(" is on node "));
        let wrong = called.filter(|words| !victims.iter().any(|v| words.starts_with(&v.pod)));
        alarms.extend(wrong.map(|words| format!("false alarm: {words}")));
    }
    alarms.sort();
    alarms.dedup();
    ground.heal().await?;
    let mut measured = measured?;
    if let Some(first) = measured.first_mut() {
        first.violations.extend(alarms);
    }
    ground.whole().await?;
    whole(ground).await?;
    Ok(measured)
}
