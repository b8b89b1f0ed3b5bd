//! The benches, on the running test bed: `bench create`; and their client program.

use std::time::Instant;

use anyhow::{Context, Result};
use clap::{Parser, Subcommand};
use e2e::failover::client;
use e2e::figures::{Figure, publish};
use e2e::harness::Harness;
use futures::future::try_join_all;

/// Measures the product on the running test bed.
#[derive(Parser)]
struct Cli {
    #[command(subcommand)]
    bench: Bench,
}

#[derive(Subcommand)]
enum Bench {
    /// Seconds from apply to Ready, for one store of three instances and for ten at once.
    Create {
        /// How often.
        #[arg(long, default_value_t = 5)]
        runs: usize,
    },
    /// A client that other programs start: a spec in, events out (see `e2e::failover::client`).
    #[command(hide = true)]
    Client,
}

#[tokio::main]
async fn main() -> Result<()> {
    match Cli::parse().bench {
        Bench::Create { runs } => create(runs).await,
        Bench::Client => client::serve().await,
    }
}

async fn create(runs: usize) -> Result<()> {
    let harness = Harness::attach().await?;
    let mut figures = Vec::new();
    for count in [1usize, 10] {
        let mut samples = Vec::new();
        for run in 1..=runs {
            let scope = harness.namespace("bench-create").await?;
            let stores: Vec<String> = (1..=count).map(|n| format!("store{n}")).collect();
            let begin = Instant::now();
            for store in &stores {
                scope
                    .apply(&scope.manifest(store, &[("us-west", 2), ("us-east", 1)], |_| {}))
                    .await?;
            }
            let each = try_join_all(stores.iter().map(|store| async {
                scope
                    .wait_ready(store)
                    .await
                    .map(|_| begin.elapsed().as_secs_f64())
            }))
            .await
            .with_context(|| format!("run {run}"))?;
            let slowest = each.iter().copied().fold(0.0, f64::max);
            println!("create/{count} run {run}: {slowest:.1} s");
            samples.push(slowest);
            scope.remove().await?;
        }
        figures.push(Figure::new(&format!("create/{count}"), "s", &samples)?);
    }
    publish("create", &figures)?;
    Ok(())
}
