//! What the product costs a commit: pgbench against a store, and against the same pair of PostgreSQLs configured by
//! hand.
//!
//! Owns what is measured and in which order. Both pairs have the same image, the same nodes, the same kind of
//! volume, TLS for clients and for replication, a synchronous standby, and the same settings, which are read from
//! the store's primary and compared once more when both run. The client is one and the same pod. Both pairs are up
//! all the time; one is idle while the other is measured. Pairs of measurements alternate in their order, so that
//! what drifts on the machine favours neither.

mod by_hand;

use std::time::Duration;

use anyhow::{Context, Result, ensure};

use crate::figures::{Figure, publish};
use crate::harness::{Harness, PATIENCE, Scope, instances};
use crate::run::until;
use by_hand::ByHand;

const NAMESPACE: &str = "bench-commit";
const STORE: &str = "ours";
const CLIENT: &str = "pgbench";
/// pgbench's scale: a million accounts, some 150 MB with their index.
const SCALE: &str = "10";
/// What is still bearable to call the same: the goal for the ratio of the rates.
const GOAL: f64 = 0.97;

/// What a transaction does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Script {
    /// pgbench's own, TPC-B-like without its two tables that everybody updates (`-N`).
    SimpleUpdate,
    /// One row.
    Insert,
}

impl Script {
    const ALL: [Script; 2] = [Script::SimpleUpdate, Script::Insert];

    fn options(self) -> &'static str {
        match self {
            Script::SimpleUpdate => "-N",
            Script::Insert => "-f /tmp/insert.sql",
        }
    }

    /// What its rows are called after `commit/WHO`.
    fn name(self) -> &'static str {
        match self {
            Script::SimpleUpdate => "",
            Script::Insert => "insert/",
        }
    }
}

/// How much is measured.
#[derive(Clone, Copy, Debug)]
pub struct Plan {
    /// Pairs of measurements for each script and each number of clients.
    pub runs: usize,
    /// Seconds of each measurement.
    pub seconds: u64,
}

/// A pair under test: where clients connect to, and the superuser of its primary.
struct Side {
    name: &'static str,
    /// As the client pod's shell writes it.
    uri: &'static str,
    pod: String,
    sockets: &'static str,
}

/// Measures, prints and writes the figures.
///
/// # Errors
/// If a pair doesn't come up, the two don't have the same settings, or a measurement fails.
pub async fn bench(plan: Plan) -> Result<()> {
    let harness = Harness::attach().await?;
    let scope = harness.namespace(NAMESPACE).await?;
    let measured = measure(&scope, plan).await;
    // What a failed bench leaves would be measured along by the next one.
    let removed = scope.remove().await;
    publish("commit", &measured?)?;
    removed
}

async fn measure(scope: &Scope, plan: Plan) -> Result<Vec<Figure>> {
    let manifest = scope.manifest(STORE, &[("us-west", 2)], |m| {
        m["spec"]["durability"] = "Required".into();
        m["spec"]["storage"]["size"] = "4Gi".into();
        // Enough for the tables, so that it is commits that are measured and not reads.
        m["spec"]["postgres"]["parameters"]["shared_buffers"] = "256MB".into();
    });
    scope.apply(&manifest).await?;
    let store = scope.wait_ready(STORE).await?;
    let instances = instances(&store)?;
    let of = |role: &str| {
        instances
            .iter()
            .find(|i| i.role == role)
            .with_context(|| format!("the store has no {role}"))
    };
    let (primary, standby) = (of("Primary")?, of("Standby")?);
    let ours = Side {
        name: "ours",
        uri: "$URI",
        pod: primary.name.clone(),
        sockets: "/run/domicile",
    };
    let settings = scope
        .sql(&primary.name, "postgres", by_hand::SETTINGS)
        .await?;
    let pair = ByHand {
        scope,
        primary_node: &primary.node,
        standby_node: &standby.node,
        settings: &settings,
    };
    pair.up().await?;
    let theirs = Side {
        name: "by-hand",
        uri: by_hand::URI,
        pod: by_hand::PRIMARY.to_owned(),
        sockets: by_hand::SOCKETS,
    };
    scope.client(CLIENT, "us-west-2", STORE).await?;
    alike(scope, &ours, &theirs).await?;
    println!(
        "primaries on {}, standbys on {}, pgbench in us-west; TLS for clients and replication in both",
        primary.node, standby.node
    );

    let insert =
        "echo 'insert into bench_insert (payload) values (md5(random()::text));' >/tmp/insert.sql";
    client(scope, insert).await?;
    for side in [&ours, &theirs] {
        let make = format!(
            "pgbench -i -q -s {SCALE} \"{uri}\" && psql \"{uri}\" -XAtqv ON_ERROR_STOP=1 -c \
             'create table bench_insert (id bigserial primary key, payload text, at timestamptz default now())'",
            uri = side.uri
        );
        client(scope, &make)
            .await
            .with_context(|| format!("the tables of {}", side.name))?;
        for script in Script::ALL {
            // Caches and plans are warm from here on.
            rate(scope, side, script, 16, 5).await?;
        }
    }
    let mut figures = Vec::new();
    for script in Script::ALL {
        for clients in [1usize, 16] {
            figures.extend(compare(scope, [&ours, &theirs], script, clients, plan).await?);
        }
    }
    Ok(figures)
}

/// Measures both, `runs` times each, in alternating order.
async fn compare(
    scope: &Scope,
    [ours, theirs]: [&Side; 2],
    script: Script,
    clients: usize,
    plan: Plan,
) -> Result<Vec<Figure>> {
    let (mut a, mut b, mut ratios) = (Vec::new(), Vec::new(), Vec::new());
    for run in 1..=plan.runs {
        let seconds = plan.seconds;
        let (x, y) = if run % 2 == 1 {
            let x = rate(scope, ours, script, clients, seconds).await?;
            (x, rate(scope, theirs, script, clients, seconds).await?)
        } else {
            let y = rate(scope, theirs, script, clients, seconds).await?;
            (rate(scope, ours, script, clients, seconds).await?, y)
        };
        println!(
            "commit/{}c{clients} run {run}: ours {x:.0}/s, by hand {y:.0}/s, ratio {:.3}",
            script.name(),
            x / y
        );
        a.push(x);
        b.push(y);
        ratios.push(x / y);
    }
    let name = |who: &str| format!("commit/{who}/{}c{clients}", script.name());
    let ratio = Figure::new(&name("ratio"), "", &ratios)?;
    println!(
        "{}: {:.3}, the goal of at least {GOAL} is {}",
        ratio.name,
        ratio.p50,
        if ratio.p50 >= GOAL { "met" } else { "MISSED" }
    );
    Ok(vec![
        Figure::new(&name(ours.name), "1/s", &a)?,
        Figure::new(&name(theirs.name), "1/s", &b)?,
        ratio,
    ])
}

/// Commits per second, after a checkpoint.
async fn rate(
    scope: &Scope,
    side: &Side,
    script: Script,
    clients: usize,
    seconds: u64,
) -> Result<f64> {
    // Else the checkpoint of an earlier measurement, or its dead rows, would fall into this one.
    for sql in ["vacuum", "checkpoint"] {
        superuser(scope, side, "app", sql).await?;
    }
    let pgbench = format!(
        "exec pgbench -n {} -c {clients} -j {} -T {seconds} \"{}\"",
        script.options(),
        clients.min(2),
        side.uri
    );
    let said = client(scope, &pgbench).await?;
    transactions_per_second(&said).with_context(|| format!("pgbench on {}: {said}", side.name))
}

/// The rate in what pgbench says.
fn transactions_per_second(said: &str) -> Result<f64> {
    let failed = said
        .lines()
        .find_map(|l| l.strip_prefix("number of failed transactions: "))
        .unwrap_or("0 ");
    ensure!(failed.starts_with("0 "), "transactions failed: {failed}");
    said.lines()
        .find_map(|l| l.strip_prefix("tps = "))
        .and_then(|rest| rest.split(' ').next())
        .context("it names no rate")?
        .parse()
        .context("the rate")
}

async fn client(scope: &Scope, script: &str) -> Result<String> {
    scope.exec(CLIENT, &["sh", "-ec", script]).await
}

async fn superuser(scope: &Scope, side: &Side, database: &str, sql: &str) -> Result<String> {
    let psql = [
        "psql",
        "-h",
        side.sockets,
        "-U",
        "postgres",
        "-d",
        database,
        "-XAtqv",
        "ON_ERROR_STOP=1",
        "-c",
        sql,
    ];
    Ok(scope.exec(&side.pod, &psql).await?.trim().to_owned())
}

/// Makes sure that both have one standby that commits wait for, and the same settings.
async fn alike(scope: &Scope, ours: &Side, theirs: &Side) -> Result<()> {
    let mut settings = Vec::new();
    for side in [ours, theirs] {
        until("a synchronous standby", PATIENCE, Duration::from_millis(500), || async {
            let sql = "select count(*) filter (where sync_state in ('sync', 'quorum')), count(*) filter (where s.ssl) \
                       from pg_stat_replication join pg_stat_ssl s using (pid)";
            let found = superuser(scope, side, "postgres", sql).await?;
            ensure!(found == "1|1", "{}: synchronous|over TLS is {found}, not 1|1", side.name);
            Ok(())
        })
        .await?;
        settings.push(superuser(scope, side, "postgres", by_hand::COMPARED).await?);
    }
    let [a, b] = &settings[..] else {
        anyhow::bail!("two pairs");
    };
    let differing: Vec<String> = a
        .lines()
        .filter(|l| !b.lines().any(|m| m == *l))
        .map(str::to_owned)
        .collect();
    ensure!(
        differing.is_empty() && a.lines().count() == b.lines().count(),
        "the two pairs don't have the same settings; ours: {}",
        differing.join(", ")
    );
    println!("{} settings are the same in both", a.lines().count());
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_rate_is_read_and_failures_are_seen() {
        let said = "number of transactions actually processed: 10\n\
                    number of failed transactions: 0 (0.000%)\n\
                    tps = 812.345 (without initial connection time)\n";
        assert_eq!(transactions_per_second(said).unwrap(), 812.345);
        assert!(transactions_per_second(&said.replace(": 0 (", ": 3 (")).is_err());
        assert!(transactions_per_second("pgbench: error").is_err());
    }
}
