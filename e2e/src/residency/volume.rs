//! A volume that is elsewhere: somebody has made one abroad for a claim of a store that is about to be made.

use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use k8s_openapi::api::core::v1::{PersistentVolume, PersistentVolumeClaim, Pod};
use kube::api::DeleteParams;
use kube::{Api, ResourceExt};
use serde_json::json;

use super::ground::{Ground, LIMIT, NAME};
use super::sample::Sample;
use crate::failover::inject::Victim;
use crate::harness::wait_for;
use crate::provisioner::CLASS;

/// Makes it once, in one store, and takes it away.
///
/// # Errors
/// If it isn't found, or all isn't well again after it.
pub async fn run(ground: &Ground, store: &str) -> Result<Sample> {
    ground.whole().await?;
    let scope = &ground.scope;
    let claims: Api<PersistentVolumeClaim> = scope.api();
    let taken = scope.owned::<PersistentVolumeClaim>(store).await?;
    let free = (1..)
        .map(|n| format!("{store}-{n}"))
        .find(|n| !taken.contains(n));
    let name = free.context("no number is free")?;
    let volume = format!("abroad-{name}");
    let abroad = json!({
        "apiVersion": "v1", "kind": "PersistentVolume", "metadata": { "name": volume },
        "spec": {
            "capacity": { "storage": "1Gi" }, "accessModes": ["ReadWriteOnce"], "storageClassName": CLASS,
            "persistentVolumeReclaimPolicy": "Retain",
            "claimRef": { "apiVersion": "v1", "kind": "PersistentVolumeClaim", "namespace": NAME, "name": name },
            "hostPath": { "path": format!("/nonexistent/{volume}") },
            "nodeAffinity": { "required": { "nodeSelectorTerms": [{ "matchExpressions": [
                { "key": "kubernetes.io/hostname", "operator": "In", "values": ["c1"] },
            ] }] } },
        },
    });
    scope.apply(&abroad).await?;
    let asked = |west: i32| {
        json!({ "spec": { "placement": [
            { "region": "us-west", "instances": west }, { "region": "us-east", "instances": 1 },
        ] } })
    };
    let outcome = async {
        scope.patch(store, asked(3)).await?;
        let bound = wait_for(claims, &name, |c| {
            c.spec
                .as_ref()
                .is_some_and(|s| s.volume_name.as_deref() == Some(&volume))
        });
        tokio::time::timeout(LIMIT, bound)
            .await
            .context("it isn't bound")??;
        let begin = Instant::now();
        let said = format!("volume claim {name} is kept on node c1");
        let found = ground
            .history
            .first(store, begin - Duration::from_secs(1), LIMIT, |s| {
                s.resident.0 == "False" && s.resident.2.contains(&said)
            });
        let found = found.await?.saturating_duration_since(begin).as_secs_f64();
        let mut sample = Sample {
            found,
            fenced: found,
            what: said,
            violations: vec![],
        };
        // Nothing has ever run on it.
        if let Some(pod) = scope.api::<Pod>().get_opt(&name).await?
            && pod.spec.as_ref().is_some_and(|s| s.node_name.is_some())
            && Victim::find(scope, &name).await?.runs("postgres")?
        {
            sample
                .violations
                .push(format!("{} runs on it", pod.name_any()));
        }
        anyhow::Ok(sample)
    };
    let outcome = outcome.await;
    scope.patch(store, asked(2)).await?;
    let whole = ground.whole().await;
    let volumes: Api<PersistentVolume> = Api::all(ground.harness.client());
    let _ = volumes.delete(&volume, &DeleteParams::default()).await;
    whole?;
    outcome
}
