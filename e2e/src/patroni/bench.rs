//! Failover under Patroni, seen by the same clients and counted the same way as the product's.
//!
//! Owns the cases and how long each fault lasts. Never judges: what a case costs or loses is the figure.

use std::net::IpAddr;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, ensure};

use super::{Clocks, DATABASE, Fault, HOSTS, Host, PASSWORD, PATIENCE, Patroni, USER, node};
use crate::failover::check;
use crate::failover::client::{Pace, Spec};
use crate::failover::event::{Event, Who, now};
use crate::failover::ledger::{Ledger, Thaw};
use crate::failover::process::{Process, named};
use crate::failover::target::{self, Target};
use crate::figures::{Figure, publish};

/// What is measured, in this order.
pub const CASES: [Fault; 5] = [
    Fault::PostmasterKill,
    Fault::PodKill,
    Fault::NodeCut,
    Fault::PodFreeze,
    Fault::Graceful,
];
/// Where the clients are: in a region without a PostgreSQL, so that no case cuts them off.
const CLIENTS_ON: &str = "c1";
/// How long the service may be away before a run counts as failed.
const OUTAGE: Duration = Duration::from_secs(120);
/// The shortest and the longest freeze: it ends when somebody else serves.
const FREEZE: [Duration; 2] = [Duration::from_secs(8), Duration::from_secs(40)];
/// How long a fault stays after somebody serves again, and how long is watched after its end.
const AFTERWARDS: Duration = Duration::from_secs(3);
/// A frozen server's answers may be on their way while it is thawed.
const EXCUSED: u64 = 100_000_000;
/// Acknowledged rows before anything is broken.
const ROWS_BEFORE: usize = 100;

/// Patroni's clocks and what their rows are called after the case.
pub const SETTINGS: [(&str, Clocks); 2] = [("", Clocks::DEFAULT), ("/ttl20", Clocks::QUICK)];

/// What one run came to.
#[derive(Clone, Copy, Debug)]
struct Outcome {
    gap: f64,
    lost: f64,
    dual: f64,
    stale: f64,
}

/// Measures these cases under these settings, prints and writes the figures.
///
/// # Errors
/// If the cluster doesn't come up, doesn't serve again, or doesn't mend itself.
pub async fn bench(runs: usize, cases: &[Fault], settings: &[(&str, Clocks)]) -> Result<()> {
    let mut figures = Vec::new();
    for (suffix, clocks) in settings {
        println!(
            "ttl {}, loop_wait {}, retry_timeout {}",
            clocks.ttl, clocks.loop_wait, clocks.retry_timeout
        );
        let measured = async {
            let cluster = Patroni::up(*clocks).await?;
            measure(&cluster, runs, cases, suffix).await
        }
        .await;
        let down = Patroni::down().await;
        figures.extend(measured?);
        down?;
    }
    publish("failover-patroni", &figures).map(drop)
}

async fn measure(
    cluster: &Patroni,
    runs: usize,
    cases: &[Fault],
    suffix: &str,
) -> Result<Vec<Figure>> {
    let mut figures = Vec::new();
    for fault in cases {
        let name = fault.name();
        let mut outcomes = Vec::new();
        for run in 1..=runs {
            let outcome = once(cluster, *fault, &format!("{name}-{run}"))
                .await
                .with_context(|| format!("{name}{suffix}, run {run}"))?;
            println!(
                "{name}{suffix} run {run}: gap {:.2} s, lost {}, dual {}, stale {:.2} s",
                outcome.gap, outcome.lost, outcome.dual, outcome.stale
            );
            outcomes.push(outcome);
        }
        let mut figure = |what: &str, unit: &str, of: fn(&Outcome) -> f64| -> Result<()> {
            let samples: Vec<f64> = outcomes.iter().map(of).collect();
            figures.push(Figure::new(
                &format!("{what}/{name}@0ms{suffix}"),
                unit,
                &samples,
            )?);
            Ok(())
        };
        figure("gap", "s", |o| o.gap)?;
        figure("lost", "rows", |o| o.lost)?;
        figure("dual", "rows", |o| o.dual)?;
        figure("stale", "s", |o| o.stale)?;
    }
    Ok(figures)
}

/// The cluster as its clients know it.
fn target(cluster: &Patroni) -> Result<Target> {
    let hosts = cluster.hosts().into_iter().map(|h| target::Host {
        name: h.name.to_owned(),
        address: IpAddr::V4(h.address),
        port: h.port,
    });
    let mut target = Target::new(hosts.collect(), USER, PASSWORD, DATABASE);
    target.ca = Some(cluster.authority()?);
    Ok(target)
}

/// The clients of a run: the application's in its own region, and one beside each server.
async fn clients(target: &Target, run: &str) -> Result<Vec<Process>> {
    let me = std::env::current_exe().context("finding this program")?;
    let spec = |target: Target| Spec {
        target,
        run: run.to_owned(),
        writer: None,
        probe: None,
        inside: None,
        cancelling: None,
    };
    let start = async |netns: &str, spec: &Spec| {
        Process::start(Path::new(&me), Some(&named(netns)), spec).await
    };
    let outside = Spec {
        writer: Some(Pace::WRITER),
        probe: Some(Pace::PROBE),
        ..spec(target.clone())
    };
    let mut all = vec![start(&node(CLIENTS_ON)?.netns(), &outside).await?];
    for name in HOSTS {
        let node = node(name)?;
        let inside = Spec {
            inside: Some(Pace::INSIDE),
            ..spec(target.only(name, IpAddr::V4(node.address())))
        };
        all.push(start(&node.netns(), &inside).await?);
    }
    Ok(all)
}

/// Whether the service has acknowledged a row that was sent after `from` to a server other than `not`.
fn serves(events: &[Event], from: u64, not: Option<&str>) -> bool {
    // From the end, since this is asked with every event; what is older than `from` can't be of use.
    events
        .iter()
        .rev()
        .take_while(|e| match e {
            Event::Acknowledged { row, .. } => row.sent >= from,
            _ => true,
        })
        .any(|e| {
            matches!(e, Event::Acknowledged { row, warned: false }
                if matches!(row.who, Who::Writer | Who::Probe)
                    && row.sent >= from
                    && not.is_none_or(|not| row.host != not))
        })
}

/// One fault from the first row to the last.
async fn once(cluster: &Patroni, fault: Fault, run: &str) -> Result<Outcome> {
    cluster.wait_healthy(PATIENCE).await?;
    let target = target(cluster)?;
    check::prepare(&target).await?;
    let mut clients = clients(&target, run).await?;
    let outside = clients.first_mut().context("no clients")?;
    outside
        .until("the clients at work", Duration::from_secs(20), |events| {
            events
                .iter()
                .filter(|e| matches!(e, Event::Acknowledged { .. }))
                .count()
                >= ROWS_BEFORE
        })
        .await?;

    let from = now()?;
    let old = cluster.inject(fault).await?;
    let injected = now()?;
    let thaw = lift(cluster, fault, &old, injected, outside).await?;
    cluster.wait_healthy(PATIENCE).await?;
    // Sessions of a former primary that came back show what they believe.
    tokio::time::sleep(AFTERWARDS).await;

    let to = now()?;
    let mut events = Vec::new();
    for client in clients {
        events.extend(client.finish().await?);
    }
    let ledger = Ledger::new(events);
    ensure!(
        ledger.first_after(injected).is_some(),
        "nothing was acknowledged after the fault"
    );
    let wrong = ledger.compare(&check::read(&target).await?);
    ensure!(
        wrong.duplicates.is_empty(),
        "rows are there twice: {:?}",
        wrong.duplicates
    );
    Ok(Outcome {
        gap: ledger.gap(from, to),
        lost: wrong.lost.len() as f64,
        dual: ledger.dual(thaw).len() as f64,
        stale: ledger.stale(thaw),
    })
}

/// Waits until the service is back, then ends the fault.
async fn lift(
    cluster: &Patroni,
    fault: Fault,
    old: &Host,
    injected: u64,
    outside: &mut Process,
) -> Result<Option<Thaw>> {
    // A killed postmaster may be started again where it was.
    let not = (fault != Fault::PostmasterKill).then_some(old.name);
    let back = |limit| {
        let what = format!("the service is back after {}", fault.name());
        (what, limit)
    };
    if fault != Fault::PodFreeze {
        let (what, limit) = back(OUTAGE);
        outside
            .until(&what, limit, |events| serves(events, injected, not))
            .await?;
        tokio::time::sleep(AFTERWARDS).await;
        cluster.heal().await?;
        return Ok(None);
    }
    let [least, most] = FREEZE;
    let begin = tokio::time::Instant::now();
    let (what, limit) = back(most);
    // Nobody took over in time: then the thawed one has to serve again.
    let _ = outside
        .until(&what, limit, |events| serves(events, injected, not))
        .await;
    tokio::time::sleep_until(begin + least).await;
    let at = now()?;
    cluster.heal().await?;
    let (what, limit) = back(OUTAGE);
    outside
        .until(&what, limit, |events| serves(events, at, None))
        .await?;
    Ok(Some(Thaw {
        at,
        excused: at + EXCUSED,
    }))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::failover::event::Row;

    fn ack(who: Who, sent: u64, host: &str) -> Event {
        Event::Acknowledged {
            row: Row {
                who,
                writer: "w".into(),
                seq: sent,
                sent,
                at: sent + 1,
                host: host.into(),
                timeline: 1,
            },
            warned: false,
        }
    }

    #[test]
    fn the_service_is_back_with_a_row_sent_after_the_fault_elsewhere() {
        let events = [
            ack(Who::Writer, 5, "w1"),
            ack(Who::Writer, 12, "w1"),
            ack(Who::Inside, 13, "w2"),
        ];
        assert!(serves(&events, 10, None));
        assert!(!serves(&events, 10, Some("w1")));
        assert!(!serves(&events, 20, None));
        assert!(serves(&[ack(Who::Probe, 11, "w2")], 10, Some("w1")));
    }
}
