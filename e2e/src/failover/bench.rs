//! The bench: all runs of the chosen cases, one store at a time, samples kept as they come.
//!
//! Owns the ground (namespace, policy, stores, latency) and the order of runs. Goes on after a run that violates
//! something, and after one that fails; says so at its end.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use serde_json::json;
use tokio::signal::unix::{SignalKind, signal};

use super::cases::{self, Case, Shape};
use super::inject;
use super::report;
use super::run::Ground;
use super::sample::{self, Sample};
use crate::figures::publish;
use crate::harness::{Harness, POLICY, Scope};
use crate::topology::REGIONS;

/// Where samples are kept, below the present folder.
const FOLDER: &str = "target/figures/failover.d";
/// The namespace of the stores.
const NAMESPACE: &str = "bench-failover";
/// The policy that permits a primary in every region.
const ANYWHERE: &str = "e2e-anywhere";
/// The size of a bounded volume: WAL of half a minute and its checkpoints.
const BOUND: &str = "512m";

/// What is to be measured.
#[derive(Clone, Debug)]
pub struct Plan {
    /// The cases.
    pub cases: Vec<Case>,
    /// Milliseconds between regions.
    pub latencies: Vec<u64>,
    /// Runs of each.
    pub runs: usize,
    /// Forget what was kept of these cases.
    pub fresh: bool,
    /// The program `bench`.
    pub program: PathBuf,
}

/// Measures, reports, and fails if a run did or violated something.
///
/// # Errors
/// If so.
pub async fn failover(plan: &Plan) -> Result<()> {
    let folder = Path::new(FOLDER);
    if plan.fresh {
        for (case, latency) in pairs(plan) {
            sample::forget(folder, &case.to_string(), latency)?;
        }
    }
    let harness = Harness::attach().await?;
    let mut terminated = signal(SignalKind::terminate()).context("listening for SIGTERM")?;
    let outcome = tokio::select! {
        outcome = Box::pin(measure(&harness, plan, folder)) => outcome,
        _ = tokio::signal::ctrl_c() => Err(anyhow::anyhow!("interrupted; go on with the same command")),
        _ = terminated.recv() => Err(anyhow::anyhow!("told to end; go on with the same command")),
    };
    let cleaned = clean(&harness, outcome.is_ok()).await;
    let mut wrong = outcome?;
    cleaned.context("cleaning up")?;

    let mut figures = Vec::new();
    let mut verdicts = Vec::new();
    for (case, latency) in known(plan) {
        let kept = sample::kept(folder, &case.to_string(), latency)?;
        if kept.is_empty() {
            continue;
        }
        let rows = report::figures(case, latency, &kept)?;
        verdicts.extend(report::verdict(case, latency, &rows));
        figures.extend(rows);
        for sample in &kept {
            let Sample { run, .. } = sample;
            let of = |v: &String| format!("{case}@{latency}ms run {run}: {v}");
            wrong.extend(sample.violations.iter().map(of));
        }
    }
    publish("failover", &figures)?;
    println!("\n{}", verdicts.join("\n"));
    if wrong.is_empty() {
        println!("\nok    no acknowledged row lost or doubled, no two primaries at a time");
        return Ok(());
    }
    bail!(
        "{} violations:\n!!!!  {}",
        wrong.len(),
        wrong.join("\n!!!!  ")
    )
}

fn pairs(plan: &Plan) -> Vec<(Case, u64)> {
    let each = |case: &Case| {
        let case = *case;
        plan.latencies.iter().map(move |latency| (case, *latency))
    };
    plan.cases.iter().flat_map(each).collect()
}

/// All that may have been kept: the table shows earlier cases too.
fn known(plan: &Plan) -> Vec<(Case, u64)> {
    let mut latencies: BTreeSet<u64> = plan.latencies.iter().copied().collect();
    latencies.extend([0, 40]);
    let each = |case: Case| latencies.iter().map(move |latency| (case, *latency));
    cases::all().into_iter().flat_map(each).collect()
}

/// All runs that aren't kept yet. What failed is the answer, in words.
async fn measure(harness: &Harness, plan: &Plan, folder: &Path) -> Result<Vec<String>> {
    let mut failures = Vec::new();
    let mut there: Option<(Shape, Ground)> = None;
    for (case, latency) in pairs(plan) {
        let name = format!("{case}@{latency}ms");
        let kept = sample::kept(folder, &case.to_string(), latency)?;
        let done: BTreeSet<usize> = kept.iter().map(|s| s.run).collect();
        for number in (1..=plan.runs).filter(|n| !done.contains(n)) {
            let ground = match there.take() {
                Some((shape, ground)) if shape == case.shape() => ground,
                other => {
                    if let Some((_, ground)) = other {
                        ground.scope.delete_store(&ground.store).await?;
                    }
                    ground(harness, &plan.program, case.shape()).await?
                }
            };
            between_regions(harness, latency).await?;
            match Box::pin(ground.run(case, latency, number)).await {
                Ok(sample) => {
                    println!("{}", report::line(&sample));
                    sample::keep(folder, &sample)?;
                    there = Some((case.shape(), ground));
                }
                Err(e) => {
                    println!("!!!!  {name} run {number} failed: {e:#}");
                    failures.push(format!("{name} run {number} failed: {e:#}"));
                    // The next one begins on new ground.
                    clean(harness, true).await?;
                }
            }
        }
    }
    Ok(failures)
}

/// The same latency between all regions, one way.
///
/// # Errors
/// If the test bed refuses.
pub async fn between_regions(harness: &Harness, latency: u64) -> Result<()> {
    let [west, east, central] = REGIONS.map(|r| r.name);
    for (a, b) in [(west, east), (west, central), (east, central)] {
        harness.bed.latency(a, b, latency).await?;
    }
    Ok(())
}

/// A healthy store of a shape: the one that an earlier bench left, or a new one.
///
/// # Errors
/// If it can't be made, or doesn't become Ready.
pub async fn ground(harness: &Harness, program: &Path, shape: Shape) -> Result<Ground> {
    let scope = harness.keep_namespace(NAMESPACE).await?;
    if shape == Shape::Anywhere {
        let regions = REGIONS.map(|r| r.name);
        let policy = json!({
            "apiVersion": "domicile.dev/v1alpha1", "kind": "ResidencyPolicy",
            "metadata": { "name": ANYWHERE },
            "spec": { "basis": "Policy", "citation": "End-to-end tests", "permits": [
                { "data": "Primary", "regions": regions },
                { "data": "Standby", "regions": regions },
            ] },
        });
        scope.apply(&policy).await?;
    }
    let ground = Ground {
        bed: harness.bed.clone(),
        scope: scope.clone(),
        store: shape.store().to_owned(),
        program: program.to_owned(),
    };
    ground.mend(inject::operators(&harness.bed).await?).await?;
    let policy = if shape == Shape::Anywhere {
        ANYWHERE
    } else {
        POLICY
    };
    let manifest = scope.manifest(shape.store(), shape.placement(), |s| {
        s["spec"]["residencyPolicyRef"]["name"] = json!(policy);
        s["spec"]["failover"] = json!({ "detectionSeconds": 3 });
    });
    scope.apply(&manifest).await?;
    scope.wait_ready(shape.store()).await?;
    if shape == Shape::Bounded {
        bound(harness, &scope, shape).await?;
    }
    Ok(ground)
}

/// Bounds the volumes of the instances that may be primary.
async fn bound(harness: &Harness, scope: &Scope, shape: Shape) -> Result<()> {
    inject::unbound_volumes(&harness.bed).await?;
    let operators = inject::operators(&harness.bed).await?;
    inject::scale_operator(&harness.bed, 0).await?;
    let mut bounded = Ok(());
    for number in [1, 2] {
        let pod = format!("{}-{number}", shape.store());
        bounded = inject::bound_volume(scope, &harness.bed, &pod, BOUND).await;
        if bounded.is_err() {
            break;
        }
    }
    inject::scale_operator(&harness.bed, operators).await?;
    bounded?;
    scope.wait_ready(shape.store()).await?;
    Ok(())
}

/// Nothing broken stays; with `all`, no store either.
///
/// # Errors
/// If something can't be mended or removed.
pub async fn clean(harness: &Harness, all: bool) -> Result<()> {
    harness.bed.heal_all().await?;
    inject::start_api(&harness.bed).await?;
    inject::scale_operator(&harness.bed, inject::operators(&harness.bed).await?.max(2)).await?;
    if all {
        harness.keep_namespace(NAMESPACE).await?.remove().await?;
        inject::unbound_volumes(&harness.bed).await?;
    }
    Ok(())
}
