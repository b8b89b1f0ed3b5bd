//! The bench: all runs of the chosen cases and the failovers, samples kept as they come.
//!
//! Goes on after a run that violates something, and after one that fails; says so at its end.

use std::path::Path;

use anyhow::{Context, Result, bail};

use super::case::Case;
use super::ground::{Ground, STORES};
use super::sample::{self, FOLDER, Failover, Sample};
use super::{drift, failovers, refused, stranger, volume, worker};
use crate::figures::{Figure, merge};
use crate::harness::Harness;

/// Under which name failovers are kept.
const FAILOVERS: &str = "failovers";
/// The first round's seed.
const SEED: u64 = 1;
/// So many rounds in a row may fail before the bench gives up.
const PATIENCE: usize = 3;

/// What is to be measured.
#[derive(Clone, Debug)]
pub struct Plan {
    /// The cases.
    pub cases: Vec<Case>,
    /// Copies of each.
    pub runs: usize,
    /// How many failovers.
    pub failovers: usize,
    /// Forget what was kept.
    pub fresh: bool,
}

/// Measures what isn't kept yet, reports, and fails if something isn't as it should be.
///
/// # Errors
/// If so.
pub async fn residency(plan: &Plan) -> Result<()> {
    let folder = Path::new(FOLDER);
    if plan.fresh {
        for case in &plan.cases {
            sample::forget(folder, case.name())?;
        }
        sample::forget(folder, FAILOVERS)?;
    }
    let harness = Harness::attach().await?;
    let ground = Ground::make(harness).await?;
    let outcome = tokio::select! {
        outcome = Box::pin(measure(&ground, plan, folder)) => outcome,
        _ = tokio::signal::ctrl_c() => Err(anyhow::anyhow!("interrupted; go on with the same command")),
    };
    ground.heal().await?;
    let mut wrong = match outcome {
        Ok(wrong) => {
            ground.scope.remove().await?;
            wrong
        }
        Err(e) => vec![format!("{e:#}")],
    };
    wrong.extend(report(folder)?);
    if wrong.is_empty() {
        println!("\nok    found, fenced, and nobody promoted outside");
        return Ok(());
    }
    bail!(
        "{} violations:\n!!!!  {}",
        wrong.len(),
        wrong.join("\n!!!!  ")
    )
}

fn count(folder: &Path, case: Case) -> Result<usize> {
    Ok(sample::kept::<Sample>(folder, case.name())?.len())
}

/// All runs that aren't kept yet. What failed is the answer, in words.
async fn measure(ground: &Ground, plan: &Plan, folder: &Path) -> Result<Vec<String>> {
    let mut failures = Vec::new();
    let mut in_a_row = 0;
    for case in &plan.cases {
        let workflow = *case == Case::WorkerRelabelled && count(folder, *case)? < plan.runs;
        if workflow && let Err(e) = worker::begin(ground).await {
            failures.push(failed(ground, case.name(), &e).await?);
            in_a_row = PATIENCE;
        }
        while count(folder, *case)? < plan.runs && in_a_row < PATIENCE {
            let number = count(folder, *case)?;
            match Box::pin(once(ground, *case, number)).await {
                Ok(samples) => {
                    in_a_row = 0;
                    for (case, sample) in samples {
                        println!(
                            "{:<22} found {:>6.2} fenced {:>6.2}  {}",
                            case.name(),
                            sample.found,
                            sample.fenced,
                            sample.what
                        );
                        sample::keep(folder, case.name(), &sample)?;
                    }
                }
                Err(e) => {
                    in_a_row += 1;
                    failures.push(failed(ground, case.name(), &e).await?);
                }
            }
        }
        in_a_row = 0;
        if workflow && let Err(e) = worker::end(ground).await {
            failures.push(failed(ground, case.name(), &e).await?);
        }
    }
    loop {
        let kept = sample::kept::<Failover>(folder, FAILOVERS)?;
        if kept.len() >= plan.failovers || in_a_row >= PATIENCE {
            break;
        }
        let seed = kept.iter().map(|f| f.seed + 1).max().unwrap_or(SEED) + in_a_row as u64;
        match Box::pin(failovers::round(ground, seed)).await {
            Ok(all) => {
                in_a_row = 0;
                for one in all {
                    println!(
                        "  {:?} promoted {:?} nowhere {} said {:?} {:?}",
                        one.spoilt, one.promoted, one.nowhere, one.said, one.violations
                    );
                    sample::keep(folder, FAILOVERS, &one)?;
                }
            }
            Err(e) => {
                in_a_row += 1;
                failures.push(failed(ground, FAILOVERS, &e).await?);
            }
        }
    }
    Ok(failures)
}

async fn failed(ground: &Ground, what: &str, error: &anyhow::Error) -> Result<String> {
    let words = format!("{what} failed: {error:#}");
    println!("!!!!  {words}");
    ground.heal().await.context("after that")?;
    Ok(words)
}

async fn once(ground: &Ground, case: Case, number: usize) -> Result<Vec<(Case, Sample)>> {
    match case {
        Case::PrimaryRelabelled
        | Case::StandbyRelabelled
        | Case::HungRelabelled
        | Case::TwoRegionsMatch
        | Case::PolicyNarrowed => drift::run(ground, case).await,
        Case::VolumeElsewhere => {
            let each = STORES.map(|store| volume::run(ground, store));
            let all = futures::future::try_join_all(each).await?;
            Ok(all.into_iter().map(|s| (case, s)).collect())
        }
        Case::WorkerRelabelled => {
            let all = worker::run(ground, number).await?;
            Ok(all.into_iter().map(|s| (case, s)).collect())
        }
        Case::StolenCertificate => {
            // Each pair of instances once a minute: for so long a store remembers what it has told.
            let copies = ground.copies().await?;
            let mut pairs = Vec::new();
            for victim in &copies {
                let others = copies
                    .iter()
                    .filter(|c| c.store == victim.store && c.name != victim.name);
                pairs.extend(others.map(|thief| (victim, thief.name.clone())));
            }
            if number >= pairs.len() {
                // All were told of: only when nothing is said any more it can be said again.
                ground.whole().await?;
            }
            let (victim, thief) = pairs
                .get(number % pairs.len().max(1))
                .context("no copies")?;
            Ok(vec![(case, stranger::run(ground, victim, thief).await?)])
        }
        _ => Ok(vec![(case, refused::run(ground, case, number).await?)]),
    }
}

/// Writes the rows, and says what violates something.
fn report(folder: &Path) -> Result<Vec<String>> {
    let (mut rows, mut wrong) = (Vec::new(), Vec::new());
    let (mut found, mut fenced) = (Vec::new(), Vec::new());
    for case in Case::ALL {
        let kept = sample::kept::<Sample>(folder, case.name())?;
        if kept.is_empty() {
            continue;
        }
        let of = |number: fn(&Sample) -> f64| kept.iter().map(number).collect::<Vec<f64>>();
        let (one, other) = (of(|s| s.found), of(|s| s.fenced));
        if case.refused() {
            rows.push(Figure::new(&format!("refused/{}", case.name()), "s", &one)?);
        } else {
            rows.push(Figure::new(&format!("found/{}", case.name()), "s", &one)?);
            let name = format!("fenced/{}", case.name());
            rows.push(Figure::new(&name, "s", &other)?);
            found.extend(one);
            fenced.extend(other);
        }
        wrong.extend(kept.into_iter().flat_map(|s| s.violations));
    }
    if !found.is_empty() {
        rows.push(Figure::new("found", "s", &found)?);
        rows.push(Figure::new("fenced", "s", &fenced)?);
    }
    let kept = sample::kept::<Failover>(folder, FAILOVERS)?;
    let number = |outside: bool, race: bool| -> Vec<f64> {
        let all = kept.iter().filter(|f| f.race == race);
        all.map(|f| if outside { f.outside.len() } else { f.promoted.len() } as f64).collect()
    };
    for (name, samples) in [
        ("failovers/outside", number(true, false)),
        ("failovers/promotions", number(false, false)),
        ("failovers/outside-before-said", number(true, true)),
    ] {
        if !samples.is_empty() {
            let total: f64 = samples.iter().sum();
            println!("{name}: {total} in {} failovers", samples.len());
            rows.push(Figure::new(name, "promotions", &samples)?);
        }
    }
    wrong.extend(kept.into_iter().flat_map(|f| f.violations));
    // Beside those that the suite `api` has written.
    merge(Path::new("target/figures/residency.json"), &rows)?;
    Ok(wrong)
}
