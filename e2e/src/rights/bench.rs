//! What rights requests cost: accepted per second, from accepted to absent, a batch drained, memory; and beside it what
//! pgbench gets from the same store for one insert of the same size.
//!
//! Owns what is measured and in which order. Whether a person is gone is read in the tables and in Redis; when a
//! step ended, and in which order, in the ledger. The test bed's cores are shared by everything that is measured, the
//! clients included.

use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use futures::future::try_join_all;
use k8s_openapi::api::core::v1::Pod;
use kube::api::ListParams;
use serde_json::{Value, json};

use super::desk::Gateway;
use super::people;
use super::sessions;
use super::surge::{self, Load, Surge};
use super::workflow::{ledger, wait_workflow};
use crate::failover::session::{Connector, Session};
use crate::failover::store;
use crate::figures::{Figure, hundredth, merge, publish, table};
use crate::harness::{Harness, PATIENCE, POLICY, Scope};

const NAMESPACE: &str = "bench-rights";
const STORE: &str = "consumers";
const REGION: &str = "us-west";
const CLIENT: &str = "app";
/// Shell: what pgbench does, into /tmp/insert.sql.
const INSERT: &str = "echo \"insert into bench_insert (payload) values (decode(repeat(md5(random()::text), 16), 'hex'));\" \
                      >/tmp/insert.sql;";

/// What can be measured by itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum Case {
    /// One request after another, from accepted to absent.
    Absent,
    /// Many clients that file one by one, beside pgbench.
    Accept,
    /// Traffic that quadruples, with a killed primary.
    Surge,
    /// A batch filed at once and drained; memory.
    Drain,
}

/// How much is measured.
#[derive(Clone, Debug)]
pub struct Plan {
    /// Which cases; none: all.
    pub cases: Vec<Case>,
    /// Measurements of a rate, and a two-hundredth of the requests that are followed one by one.
    pub runs: usize,
    /// Requests filed at once.
    pub batch: usize,
    /// Seconds of one measurement of a rate.
    pub seconds: u64,
    /// Connections that file.
    pub clients: usize,
    /// Requests a second from which traffic quadruples.
    pub surge: f64,
}

impl Plan {
    fn all(&self) -> bool {
        self.cases.is_empty()
    }

    fn wants(&self, case: Case) -> bool {
        self.all() || self.cases.contains(&case)
    }
}

/// Measures, prints and writes the figures.
///
/// # Errors
/// If something doesn't come up, or a request is lost or closed without proof: no figure is worth that.
pub async fn bench(plan: Plan) -> Result<()> {
    let harness = Harness::attach().await?;
    let scope = harness.namespace(NAMESPACE).await?;
    let measured = measure(&scope, &plan).await;
    let removed = scope.remove().await;
    let measured = measured?;
    if plan.all() {
        publish("rights", &measured)?;
    } else {
        // Beside rows of other runs, and maybe other builds: which are new is shown first.
        print!("{}", table(&measured));
        println!("with what is there of earlier runs:");
        merge(Path::new("target/figures/rights.json"), &measured)?;
    }
    removed
}

async fn measure(scope: &Scope, plan: &Plan) -> Result<Vec<Figure>> {
    let manifest = scope.manifest(STORE, &[("us-west", 2), ("us-east", 1)], |m| {
        m["spec"]["durability"] = "Required".into();
        m["spec"]["storage"]["size"] = "8Gi".into();
        m["spec"]["postgres"]["parameters"]["shared_buffers"] = "256MB".into();
    });
    scope.apply(&manifest).await?;
    sessions::start(scope, "us-west-2").await?;
    scope.wait_ready(STORE).await?;
    scope.client(CLIENT, "us-west-2", STORE).await?;
    // People who are followed, then people who only file, then the batch.
    let followed = plan.runs * 200;
    let last = followed + plan.batch;
    people::plant(scope, CLIENT, last).await?;
    let table = "CREATE TABLE IF NOT EXISTS bench_insert (id bigserial PRIMARY KEY, payload bytea, at timestamptz DEFAULT now())";
    scope.client_sql(CLIENT, table).await?;
    workers(scope, 1).await?;
    let gateway = Gateway::of(scope, STORE).await?;

    let mut figures = Vec::new();
    if plan.wants(Case::Absent) {
        figures.extend(absent(scope, &gateway, followed).await?);
    }
    if plan.wants(Case::Accept) {
        workers(scope, 0).await?;
        figures.extend(accept(&gateway, plan).await?);
        figures.push(pgbench(scope, plan).await?);
        workers(scope, 1).await?;
    }
    empty(scope, Duration::from_secs(600)).await?;
    if plan.wants(Case::Surge) {
        checkpointed(scope).await?;
        figures.extend(surge(scope, &gateway, plan).await?);
    }
    if plan.wants(Case::Drain) {
        let drained = drain(scope, &gateway, followed, plan.batch).await?;
        // The most that a gateway ever held says little of one that has done nothing else.
        let says = |f: &Figure| plan.all() || !f.name.starts_with("memory/");
        figures.extend(drained.into_iter().filter(says));
    }
    figures.extend(checked(scope).await?);
    Ok(figures)
}

/// The workflow, with so many workers. Keys are named in full, as the documentation advises those who have many: a
/// pattern is looked for among all keys there are.
async fn workers(scope: &Scope, count: usize) -> Result<()> {
    let mut workflow = people::workflow(&scope.namespace, STORE, POLICY, REGION);
    workflow["spec"]["targets"][1]["redis"]["keys"] =
        json!(["session:{customerId}:web", "session:{customerId}:app"]);
    workflow["spec"]["workers"]["pools"][0]["min"] = json!(count);
    scope.apply(&workflow).await?;
    wait_workflow(scope, STORE, "Ready", "True").await?;
    let ours = ListParams::default().labels(&format!(
        "domicile.dev/workflow={STORE},app.kubernetes.io/component=worker"
    ));
    let deadline = Instant::now() + PATIENCE;
    while scope.api::<Pod>().list(&ours).await?.items.len() != count {
        ensure!(Instant::now() < deadline, "there aren't {count} workers");
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    Ok(())
}

/// As a store is that has been up for longer than five minutes, PostgreSQL's pause between checkpoints: what WAL was
/// written is ready for use again. In a store that was just made every 16 MiB are a new file, which primary and standbys
/// fill with zeroes first, here all three at once on one disk, and every commit waits.
async fn checkpointed(scope: &Scope) -> Result<()> {
    const DONE: &str = "SELECT redo_lsn FROM pg_control_checkpoint()";
    let primary = scope.primary(STORE).await?;
    scope.sql(&primary, "postgres", "CHECKPOINT").await?;
    let done = scope.sql(&primary, "postgres", DONE).await?;
    let deadline = Instant::now() + PATIENCE;
    for name in scope.owned::<Pod>(STORE).await? {
        // Of a standby: once it has replayed the primary's.
        while scope.sql(&name, "postgres", DONE).await? != done {
            ensure!(Instant::now() < deadline, "{name} makes no restart point");
            scope.sql(&name, "postgres", "CHECKPOINT").await?;
        }
    }
    Ok(())
}

/// Four times the traffic within a minute, and the primary's pod killed in the middle of it.
async fn surge(scope: &Scope, gateway: &Gateway, plan: &Plan) -> Result<Vec<Figure>> {
    let mut load = Load::quadrupled(plan.surge);
    let steady = steady(scope, load).await?;
    load.normal = load.normal.max(steady);
    let outcome =
        surge::with_failover(scope, STORE, gateway, load, "surge", |n| 2_000_000_000 + n).await?;
    let Surge {
        course,
        normal,
        worst,
        back,
        later,
        ..
    } = outcome.surge;
    println!(
        "surge from {:.0} to {:.0}/s with a killed primary: p99 {normal:.4} s before, at worst {worst:.4} s, back after {back:?} s; told to come again: {later} of {}",
        load.rates.0,
        load.rates.1,
        outcome.shots.len()
    );
    println!("p99 of every five seconds, ms: {}", surge::shown(&course));
    empty(scope, Duration::from_secs(600)).await?;
    let mut figures = vec![
        Figure::new("surge/p99/pgbench", "s", &[steady])?,
        Figure::new("surge/p99/limit", "s", &[load.limit(normal)])?,
        Figure::new("surge/p99/before", "s", &[normal])?,
        Figure::new("surge/p99/worst", "s", &[worst])?,
        Figure::new("surge/told-to-come-again", "requests", &[later as f64])?,
    ];
    match back {
        Some(back) => figures.push(Figure::new("surge/back", "s", &[back])?),
        None => println!("NOT back to normal when the load ended: no row surge/back"),
    }
    Ok(figures)
}

/// One request after another on an idle system: from the answer until row and keys are gone.
async fn absent(scope: &Scope, gateway: &Gateway, count: usize) -> Result<Vec<Figure>> {
    let target = store::target(scope, STORE).await?;
    let connector = Connector::new(target)?;
    let session = primary(&connector).await?;
    let mut redis = sessions::Connection::open(scope).await?;
    let mut desk = gateway.desk();
    let (mut accepted, mut gone) = (Vec::new(), Vec::new());
    for person in 1..=count {
        let begin = Instant::now();
        let key = format!("followed-{person}");
        desk.file(&key, &people::deletion(person), Duration::from_secs(30))
            .await?;
        let filed = Instant::now();
        accepted.push((filed - begin).as_secs_f64());
        let sql = format!("SELECT 1 FROM customer WHERE id = {person}");
        while !session.rows(&sql).await?.is_empty() || redis.exists(person).await? {
            ensure!(
                filed.elapsed() < Duration::from_secs(30),
                "person {person} is still there"
            );
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        gone.push(filed.elapsed().as_secs_f64());
    }
    Ok(vec![
        Figure::new("accept/latency/idle", "s", &accepted)?,
        Figure::new("accept/latency/idle/p99", "s", &[hundredth(&accepted, 99)?])?,
        Figure::new("absent/latency", "s", &gone)?,
        Figure::new("absent/latency/p99", "s", &[hundredth(&gone, 99)?])?,
    ])
}

async fn primary(connector: &Connector) -> Result<Session> {
    for host in &connector.target().hosts {
        if let Ok((session, identity)) = connector.open(host, Duration::from_secs(2)).await
            && identity.writable().is_some()
        {
            return Ok(session);
        }
    }
    anyhow::bail!("no instance takes writes")
}

/// Many clients that file one request after another, as fast as they are answered. They concern nobody whose data is
/// there, and no worker runs: only what accepting costs is measured.
async fn accept(gateway: &Gateway, plan: &Plan) -> Result<Vec<Figure>> {
    let (mut rates, mut latencies) = (Vec::new(), Vec::new());
    for run in 0..plan.runs {
        let limit = Duration::from_secs(plan.seconds);
        let begin = Instant::now();
        let clients = (0..plan.clients).map(|client| async move {
            let mut desk = gateway.desk();
            let mut took = Vec::new();
            let mut number = 0usize;
            while begin.elapsed() < limit {
                let person = 1_000_000_000 + ((run * 1000 + client) << 24) + number;
                let one = Instant::now();
                desk.file(
                    &format!("accept-{person}"),
                    &people::deletion(person),
                    Duration::from_secs(30),
                )
                .await?;
                took.push(one.elapsed().as_secs_f64());
                number += 1;
            }
            anyhow::Ok(took)
        });
        let all: Vec<f64> = try_join_all(clients).await?.concat();
        let rate = all.len() as f64 / begin.elapsed().as_secs_f64();
        println!(
            "accept run {}: {rate:.0}/s by {} clients",
            run + 1,
            plan.clients
        );
        rates.push(rate);
        latencies.extend(all);
    }
    Ok(vec![
        Figure::new("accept/rate", "1/s", &rates)?,
        Figure::new("accept/latency", "s", &latencies)?,
        Figure::new("accept/latency/p99", "s", &[hundredth(&latencies, 99)?])?,
    ])
}

/// What pgbench has of the same store at the surge's high rate, with nobody filing and nobody dying: the worst of
/// its windows, as [`surge::reckon`] takes them, in seconds. What the machine does by itself is no lasting harm of the surge.
async fn steady(scope: &Scope, load: Load) -> Result<f64> {
    let [.., during] = load.phases;
    let run = format!(
        "{INSERT} rm -f /tmp/steady.*; pgbench -n -f /tmp/insert.sql -c 32 -j 2 -T {} --rate {} -l --log-prefix /tmp/steady \"$URI\" \
         >/tmp/steady.out; cat /tmp/steady.[0-9]*",
        during.as_secs(),
        load.rates.1
    );
    let said = scope.exec(CLIENT, &["sh", "-ec", &run]).await?;
    // Client, transaction, microseconds from when it was due, script, and when it was done: seconds, microseconds.
    let shot = |line: &str| -> Option<(Duration, f64)> {
        let mut words = line.split(' ').skip(2);
        let took: f64 = words.next()?.parse().ok()?;
        let second: f64 = words.nth(1)?.parse().ok()?;
        let micros: f64 = words.next()?.parse().ok()?;
        let due = Duration::try_from_secs_f64(second + (micros - took) / 1e6).ok()?;
        Some((due, took / 1e6))
    };
    let shots: Option<Vec<(Duration, f64)>> = said.lines().map(shot).collect();
    let shots = shots.with_context(|| format!("not pgbench's log: {said:.200}"))?;
    let times = || shots.iter().map(|s| s.0);
    let (Some(first), Some(last)) = (times().min(), times().max()) else {
        bail!("pgbench did nothing");
    };
    let windows = surge::windows(&shots, first, last);
    let windows: Vec<f64> = windows.iter().map(|w| w.1).collect();
    ensure!(!windows.is_empty(), "pgbench was too short");
    println!(
        "pgbench at {:.0}/s, p99 of every five seconds, ms: {}",
        load.rates.1,
        surge::shown(&windows)
    );
    Ok(windows.iter().copied().fold(0.0, f64::max))
}

/// What the same store gives pgbench for one row of about a request's size, with as many clients.
async fn pgbench(scope: &Scope, plan: &Plan) -> Result<Figure> {
    let mut rates = Vec::new();
    for run in 1..=plan.runs {
        let script = format!(
            "{INSERT} exec pgbench -n -f /tmp/insert.sql -c {} -j 2 -T {} \"$URI\"",
            plan.clients, plan.seconds
        );
        let said = scope.exec(CLIENT, &["sh", "-ec", &script]).await?;
        let rate: f64 = said
            .lines()
            .find_map(|l| l.strip_prefix("tps = "))
            .and_then(|rest| rest.split(' ').next())
            .with_context(|| format!("pgbench names no rate: {said}"))?
            .parse()?;
        println!("pgbench run {run}: {rate:.0}/s by {} clients", plan.clients);
        rates.push(rate);
    }
    Figure::new("pgbench/rate", "1/s", &rates)
}

/// A batch filed at once, under laws with different clocks: how fast its steps end, and whether earliest deadlines go first.
async fn drain(
    scope: &Scope,
    gateway: &Gateway,
    after: usize,
    count: usize,
) -> Result<Vec<Figure>> {
    const REGIMES: [&str; 3] = ["us-ca-ccpa", "eu-gdpr", "kr-pipa"];
    workers(scope, 0).await?;
    let mark = ledger(scope, STORE, "SELECT now()").await?;
    let people: Vec<usize> = (after + 1..=after + count).collect();
    let begin = Instant::now();
    let mut desk = gateway.desk();
    for part in people.chunks(1000) {
        let requests: Vec<Value> = part
            .iter()
            .map(|p| {
                let mut request = people::deletion(*p);
                request["regimes"] = json!([REGIMES[p % REGIMES.len()]]);
                json!({ "request": request, "idempotencyKey": format!("batch-{p}") })
            })
            .collect();
        let body = json!({ "requests": requests });
        let deadline = Instant::now() + Duration::from_secs(60);
        loop {
            let answer = desk
                .exchange("POST", "/v1/requests/bulk", None, Some(&body))
                .await?;
            if answer.status < 300 {
                let refused = answer.body["refused"].as_u64();
                ensure!(
                    refused == Some(0),
                    "of the batch some are refused: {}",
                    answer.body
                );
                break;
            }
            ensure!(
                [429, 503].contains(&answer.status) && Instant::now() < deadline,
                "the batch was refused: {} {}",
                answer.status,
                answer.body
            );
            tokio::time::sleep(Duration::from_secs(answer.retry_after.unwrap_or(1))).await;
        }
    }
    let filed = begin.elapsed().as_secs_f64();
    println!(
        "{count} requests filed in {filed:.1} s: {:.0}/s",
        count as f64 / filed
    );
    // All of it is there before the first is claimed, so that the order in which they go is the queue's own.
    let begin = Instant::now();
    workers(scope, 1).await?;
    empty(scope, Duration::from_secs(1800)).await?;
    let took = begin.elapsed().as_secs_f64();
    let memory = super::memory::sample()?;
    let left = people::left(scope, CLIENT, after + 1, after + count).await?;
    ensure!(
        left == [0, 0, 0],
        "everything is closed, and of the batch there is still {left:?}"
    );
    // Of steps that could have been claimed together, those with the earlier deadline first: in how many of the batch's
    // neighbours, in the order in which they ended, does a later deadline come before an earlier one by more than a lease?
    let disorder: f64 = ledger(
        scope,
        STORE,
        &format!(
            "WITH steps AS (
               SELECT c.answer_by AS deadline, (s ->> 'finished_at')::timestamptz AS finished_at, s ->> 'target' AS target
                 FROM ledger.closed c, jsonb_array_elements(c.steps) s WHERE c.filed_at > '{mark}'),
             ended AS (
               SELECT deadline, max(deadline) OVER (PARTITION BY target ORDER BY finished_at
                        RANGE BETWEEN UNBOUNDED PRECEDING AND '5 seconds' PRECEDING) AS before
                 FROM steps)
             SELECT coalesce(avg((before > deadline)::int), 0) FROM ended"
        ),
    )
    .await?
    .parse()?;
    let rate = (count * 2) as f64 / took;
    println!("drained in {took:.1} s: {rate:.0} steps/s; out of order: {disorder:.4}");
    let mut figures = vec![
        Figure::new("accept/bulk/rate", "1/s", &[count as f64 / filed])?,
        Figure::new("drain/rate", "steps/s", &[rate])?,
        Figure::new("drain/out-of-order", "", &[disorder])?,
    ];
    for (name, mebibytes) in memory {
        figures.push(Figure::new(&format!("memory/{name}"), "MiB", &mebibytes)?);
    }
    Ok(figures)
}

/// Waits until nothing is open any more.
async fn empty(scope: &Scope, patience: Duration) -> Result<()> {
    let deadline = Instant::now() + patience;
    loop {
        let open = ledger(
            scope,
            STORE,
            "SELECT count(*) FROM (SELECT 1 FROM ledger.request LIMIT 1) o",
        )
        .await;
        match open {
            Ok(n) if n == "0" => return Ok(()),
            other => ensure!(
                Instant::now() < deadline,
                "requests are still open after {patience:?}: {other:?}"
            ),
        }
        tokio::time::sleep(Duration::from_millis(500)).await;
    }
}

/// Requests lost and closed without proof, as the ledger has them.
async fn checked(scope: &Scope) -> Result<Vec<Figure>> {
    let unproven: f64 = ledger(
        scope,
        STORE,
        "SELECT count(*) FROM ledger.closed c WHERE c.state = 'closed' AND EXISTS (
            SELECT FROM jsonb_array_elements(c.steps) s WHERE s -> 'outcome' IS NULL OR s -> 'evidence' IS NULL)",
    )
    .await?
    .parse()?;
    ensure!(unproven == 0.0, "{unproven} requests closed without proof");
    Ok(vec![Figure::new("unproven", "", &[unproven])?])
}
