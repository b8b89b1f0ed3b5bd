//! The benches: `bench create`, `bench commit`, `bench failover`, `bench residency` and `bench break` on the running test
//! bed, `bench failover-patroni` where there is none; and their client program.

use std::net::IpAddr;
use std::process::ExitCode;
use std::time::Instant;

use anyhow::{Context, Result, ensure};
use clap::{Parser, Subcommand};
use e2e::commit;
use e2e::failover::bench::{Plan, failover};
use e2e::failover::show::{self, Show};
use e2e::failover::{cases, client, store};
use e2e::figures::{Figure, publish};
use e2e::harness::Harness;
use e2e::patroni::{self, Patroni};
use e2e::residency;
use e2e::testbed::TestBed;
use futures::future::try_join_all;

/// Measures the product on the running test bed, and what it is compared with.
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
    /// What a failover costs: the service's gap, rows lost, two primaries at a time.
    Failover {
        /// How often each case.
        #[arg(long, default_value_t = 5)]
        runs: usize,
        /// Which cases, with commas or spaces between; all by default.
        #[arg(long, default_value = "")]
        cases: String,
        /// Milliseconds between regions, one way, with commas or spaces between.
        #[arg(long, default_value = "0 40")]
        latency: String,
        /// Forget earlier runs of these cases.
        #[arg(long)]
        fresh: bool,
    },
    /// How soon copies outside are found and stopped, and whether anybody is promoted outside.
    Residency {
        /// Copies of each case.
        #[arg(long, default_value_t = 20)]
        runs: usize,
        /// Which cases, with commas or spaces between; all by default.
        #[arg(long, default_value = "")]
        cases: String,
        /// How many failovers with wrong labels.
        #[arg(long, default_value_t = 300)]
        failovers: usize,
        /// Forget earlier runs.
        #[arg(long)]
        fresh: bool,
    },
    /// Cuts the primary's node off before one's eyes, and lets it come home.
    Break {
        /// The store's namespace.
        #[arg(long, default_value = "records")]
        namespace: String,
        /// The store.
        #[arg(long, default_value = "consumers")]
        store: String,
    },
    /// What the instance at an address says of itself.
    #[command(hide = true)]
    Ask {
        /// Its address.
        address: IpAddr,
    },
    /// Commits per second of a store, and of the same pair of PostgreSQLs configured by hand.
    Commit {
        /// How many pairs of measurements, for each script and number of clients.
        #[arg(long, default_value_t = 5)]
        runs: usize,
        /// How long each takes.
        #[arg(long, default_value_t = 20)]
        seconds: u64,
    },
    /// What rights requests cost: accepted, erased, drained, memory; beside pgbench on the same store.
    Rights {
        /// Only these cases.
        #[arg(long, value_delimiter = ',')]
        cases: Vec<e2e::rights::bench::Case>,
        /// Measurements of each rate; two hundred times as many requests are followed one by one.
        #[arg(long, default_value_t = 5)]
        runs: usize,
        /// Requests filed at once.
        #[arg(long, default_value_t = 100_000)]
        batch: usize,
        /// How long each measurement of a rate takes.
        #[arg(long, default_value_t = 10)]
        seconds: u64,
        /// How many clients file.
        #[arg(long, default_value_t = 32)]
        clients: usize,
        /// Requests a second from which traffic quadruples.
        #[arg(long, default_value_t = 50.0)]
        surge: f64,
    },
    /// Failover under Patroni with etcd. Needs no test bed, and that none is there.
    FailoverPatroni {
        /// How often each case.
        #[arg(long, default_value_t = 3)]
        runs: usize,
        /// Only these cases.
        #[arg(long, value_delimiter = ',')]
        cases: Vec<String>,
        /// Only Patroni's own clocks, or only the quicker ones.
        #[arg(long, value_parser = ["default", "quick"])]
        clocks: Option<String>,
        /// Only removes what an interrupted run has left.
        #[arg(long)]
        down: bool,
    },
    /// A client that other programs start: a spec in, events out (see `e2e::failover::client`).
    #[command(hide = true)]
    Client,
}

#[tokio::main]
async fn main() -> ExitCode {
    match Box::pin(execute(Cli::parse().bench)).await {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => {
            eprintln!("error: {e:#}");
            ExitCode::FAILURE
        }
    }
}

async fn execute(bench: Bench) -> Result<()> {
    match bench {
        Bench::Create { runs } => create(runs).await,
        Bench::Failover {
            runs,
            cases,
            latency,
            fresh,
        } => {
            let plan = Plan {
                cases: cases::choose(&cases)?,
                latencies: cases::latencies(&latency)?,
                runs,
                fresh,
                program: std::env::current_exe().context("the path of this program")?,
            };
            Box::pin(failover(&plan)).await
        }
        Bench::Residency {
            runs,
            cases,
            failovers,
            fresh,
        } => {
            let plan = residency::bench::Plan {
                cases: residency::case::choose(&cases)?,
                runs,
                failovers,
                fresh,
            };
            Box::pin(residency::bench::residency(&plan)).await
        }
        Bench::Break { namespace, store } => {
            let harness = Harness {
                bed: TestBed::attach().await?,
            };
            let what = Show {
                scope: harness.scope(&namespace),
                bed: harness.bed,
                store,
                program: std::env::current_exe().context("the path of this program")?,
            };
            Box::pin(show::show(&what)).await
        }
        Bench::Ask { address } => {
            println!("{}", store::ask(address).await?);
            Ok(())
        }
        Bench::Commit { runs, seconds } => commit::bench(commit::Plan { runs, seconds }).await,
        Bench::Rights {
            cases,
            runs,
            batch,
            seconds,
            clients,
            surge,
        } => {
            let plan = e2e::rights::bench::Plan {
                cases,
                runs,
                batch,
                seconds,
                clients,
                surge,
            };
            Box::pin(e2e::rights::bench::bench(plan)).await
        }
        Bench::FailoverPatroni { down: true, .. } => Patroni::down().await,
        Bench::FailoverPatroni {
            runs,
            cases,
            clocks,
            ..
        } => failover_patroni(runs, &cases, clocks.as_deref()).await,
        Bench::Client => client::serve().await,
    }
}

async fn failover_patroni(runs: usize, cases: &[String], clocks: Option<&str>) -> Result<()> {
    let all = patroni::bench::CASES;
    for name in cases {
        ensure!(
            all.iter().any(|c| c.name() == name),
            "no case {name}: there are {}",
            all.map(patroni::Fault::name).join(", ")
        );
    }
    let wanted = |c: &patroni::Fault| cases.is_empty() || cases.iter().any(|n| n == c.name());
    let chosen: Vec<_> = all.into_iter().filter(wanted).collect();
    let [default, quick] = patroni::bench::SETTINGS;
    let settings = match clocks {
        Some("default") => vec![default],
        Some(_) => vec![quick],
        None => vec![default, quick],
    };
    patroni::bench::bench(runs, &chosen, &settings).await
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
