//! Failover on the test bed, through the interface a user has: one run each of the commonest faults.
//!
//! Asserts what must hold in every run: nothing acknowledged is lost or doubled, no two primaries at a time, terms
//! only rise, another instance takes over, and the old primary comes back. How long it takes is a bench's matter
//! (`make bench-failover`), not a test's: machines are shared.

use std::path::Path;

use anyhow::{Result, ensure};
use e2e::failover::bench::{between_regions, clean, ground};
use e2e::failover::cases::{Case, Shape};
use e2e::failover::report::line;
use e2e::harness::Harness;

/// The gap that even a busy machine doesn't excuse, in seconds.
const FAR_TOO_LONG: f64 = 30.0;

#[tokio::test]
async fn nothing_acknowledged_is_lost_and_there_are_never_two_primaries() -> Result<()> {
    let harness = Harness::attach().await?;
    let program = Path::new(env!("CARGO_BIN_EXE_bench"));
    let ground = Box::pin(ground(&harness, program, Shape::Home)).await?;
    let mut wrong = Vec::new();
    // How each is done is the variant of the run's number.
    // The way between regions is another one if it is long.
    for (name, number, latency) in [
        ("postmaster-kill", 1, 0),
        ("pod-kill", 2, 0),
        ("node-cut", 1, 0),
        ("pod-freeze", 1, 0),
        ("graceful", 1, 0),
        ("api-down", 1, 0),
        ("pod-kill", 1, 40),
    ] {
        between_regions(&harness, latency).await?;
        let sample = Box::pin(ground.run(Case::parse(name)?, latency, number)).await?;
        println!("{}", line(&sample));
        let mut said = sample.violations.clone();
        if sample.back.is_none() {
            said.push("the old primary isn't back".to_owned());
        }
        if sample.gap > FAR_TOO_LONG {
            said.push(format!("no commit for {:.1} s", sample.gap));
        }
        if sample.commits < 100 {
            said.push(format!("only {} commits: hardly a test", sample.commits));
        }
        let at = format!("{name} at {latency} ms");
        wrong.extend(said.into_iter().map(|w| format!("{at}: {w}")));
    }
    between_regions(&harness, 0).await?;
    Box::pin(clean(&harness, true)).await?;
    ensure!(wrong.is_empty(), "{}", wrong.join("\n"));
    Ok(())
}
