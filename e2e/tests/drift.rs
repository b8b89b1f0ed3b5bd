//! The drifts of `corpus/drift/` on a real API server with fake nodes, played instances and a running operator: what is
//! outside is found, said and stopped, and nothing else is.
//!
//! Feature `api`: the API server's programs must be built (`testbed prepare`).

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use e2e::drift::{self, Outcome, churn};
use e2e::figures::{self, Figure};
use e2e::operated::{Operated, root};
use futures::{StreamExt as _, TryStreamExt as _};
use serde_json::json;

/// When the operator is killed, in the middle of the day.
const OPERATOR_DIES: Duration = Duration::from_secs(30);
/// Stores that live through a day of churn, and how much happens to each.
const DAYS: u64 = 4;
const EVENTS: u32 = 25;
/// How many cases are under way at once.
const AT_ONCE: usize = 8;

/// An API server with the operator, and a StorageClass.
async fn operated(port: u16) -> Result<Operated> {
    let mut world = Operated::new().await?;
    let class = json!({
        "apiVersion": "storage.k8s.io/v1", "kind": "StorageClass",
        "metadata": { "name": e2e::provisioner::CLASS, "annotations": { "storageclass.kubernetes.io/is-default-class": "true" } },
        "provisioner": e2e::provisioner::NAME, "volumeBindingMode": "WaitForFirstConsumer",
    });
    world.apply(&class.to_string()).await?;
    world.start_operator(port)?;
    Ok(world)
}

#[tokio::test]
async fn what_drifts_outside_is_stopped_and_nothing_else_is() -> Result<()> {
    let folder = root().join("corpus/drift");
    let mut drifts = drift::read(&folder)?;
    if let Ok(part) = std::env::var("DOMICILE_DRIFT") {
        drifts.retain(|d| d.name.contains(&part));
        ensure!(
            !drifts.is_empty(),
            "DOMICILE_DRIFT={part}: no case has that in its name"
        );
    }
    let scene = std::fs::read_to_string(folder.join("_world.yaml"))?;
    let world = operated(18151).await?;
    let client = world.client();
    let outcomes: Vec<(&str, Outcome)> = futures::stream::iter(drifts.iter().enumerate())
        .map(|(number, drift)| {
            let (client, scene) = (&client, &scene);
            async move {
                let outcome = drift::run(client, scene, number, drift).await?;
                anyhow::Ok((drift.name.as_str(), outcome))
            }
        })
        .buffer_unordered(AT_ONCE)
        .try_collect()
        .await
        .with_context(|| format!("logs: {}", world.server().layout().logs().display()))?;
    let (mut missed, mut alarms) = (Vec::new(), Vec::new());
    let (mut found_after, mut fenced_after) = (Vec::new(), Vec::new());
    for (name, outcome) in outcomes {
        match outcome {
            Outcome::Quiet => {}
            Outcome::Stopped { found, fenced } => {
                found_after.push(found);
                fenced_after.push(fenced);
            }
            Outcome::Missed(how) => missed.push(format!("{name}: {how}")),
            Outcome::FalseAlarm(how) => alarms.push(format!("{name}: {how}")),
        }
    }
    let violations = drifts.iter().filter(|d| d.violates()).count();
    println!(
        "{violations} that get outside, {} that don't; missed {}, false alarms {}",
        drifts.len() - violations,
        missed.len(),
        alarms.len()
    );
    let count = |all: &[String]| u32::try_from(all.len()).map(f64::from);
    let mut rows = vec![
        Figure::new("drift/missed", "cases", &[count(&missed)?])?,
        Figure::new("drift/false-alarms", "cases", &[count(&alarms)?])?,
    ];
    if !found_after.is_empty() {
        rows.push(Figure::new("found", "s", &found_after)?);
        rows.push(Figure::new("fenced", "s", &fenced_after)?);
    }
    figures::merge(&root().join("target/figures/residency.json"), &rows)?;
    ensure!(
        missed.is_empty() && alarms.is_empty(),
        "missed:\n  {}\nfalse alarms:\n  {}",
        missed.join("\n  "),
        alarms.join("\n  ")
    );
    Ok(())
}

/// Nodes upgraded, stores scaled, pods evicted, texts edited, and the operator killed in the middle of it.
#[tokio::test]
async fn a_day_of_ordinary_churn_raises_no_alarm() -> Result<()> {
    let scene = std::fs::read_to_string(root().join("corpus/drift/_world.yaml"))?;
    let mut world = operated(18152).await?;
    let client = world.client();
    let base: u64 = match std::env::var("DOMICILE_SEED") {
        Ok(seed) => seed.parse().context("DOMICILE_SEED")?,
        Err(_) => 1,
    };
    let days = futures::future::join_all((0..DAYS).map(|n| {
        let (client, scene) = (&client, &scene);
        async move { churn::day(client, scene, &format!("c{n}"), base + n, EVENTS).await }
    }));
    tokio::pin!(days);
    let outcomes = tokio::select! {
        early = &mut days => early,
        () = tokio::time::sleep(OPERATOR_DIES) => {
            world.kill_operator()?;
            world.start_operator(18152)?;
            println!("the operator is killed");
            days.await
        }
    };
    let alarms: Vec<String> = outcomes
        .into_iter()
        .filter_map(Result::err)
        .map(|e| format!("{e:#}"))
        .collect();
    let count = f64::from(u32::try_from(alarms.len())?);
    let row = Figure::new("churn/false-alarms", "stores", &[count])?;
    figures::merge(&root().join("target/figures/residency.json"), &[row])?;
    ensure!(alarms.is_empty(), "{}", alarms.join("\n"));
    Ok(())
}
