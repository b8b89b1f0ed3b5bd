//! Two instances on a real PostgreSQL and a witness in memory: whoever is left goes on with its vote.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "a test that can't go on should say so and stop"
)]

mod instance_bed;

use std::time::{Duration, Instant};

use domicile::api::privacy_data_store::InstanceRole;
use instance_bed::writer::Writer;
use instance_bed::*;

/// Long enough for everything that would happen to happen: twice the detection time.
const LONG: Duration = Duration::from_secs(6);

async fn bounded(test: impl Future<Output = ()>) {
    tokio::time::timeout(Duration::from_secs(240), test)
        .await
        .expect("the test ends in time");
}

type Nodes = [Option<Node>; 2];

fn number(index: usize) -> u32 {
    u32::try_from(index).unwrap() + 1
}

fn at(nodes: &Nodes, index: usize) -> &Node {
    nodes[index].as_ref().unwrap()
}

/// Two instances and the witness, all voting, one of them primary.
async fn two(durability: &str) -> (Bed, Nodes, usize) {
    let bed = Bed::new(2, durability);
    bed.witness.make("u");
    let nodes = [Some(bed.start(1)), Some(bed.start(2))];
    for n in 1..=2 {
        bed.until_ready(n).await;
    }
    let leader = whole(&nodes, "witness/u").await;
    let sql = "CREATE TABLE t (v bigint)";
    at(&nodes, leader).app_sql(sql).await.unwrap();
    (bed, nodes, leader)
}

/// Whether this instance serves, with so many standbys in a rule that is in force.
async fn leads(node: &Node, members: usize) -> bool {
    node.status().await.is_some_and(|s| {
        let rule = s.synchronous.unwrap_or_default();
        s.role == InstanceRole::Primary && rule.in_force && rule.members.len() == members
    })
}

/// Until both vote with this witness, and the other is in the rule.
async fn whole(nodes: &Nodes, witness: &str) -> usize {
    let mut leader = 0;
    until("both and the witness vote", async || {
        for (i, node) in nodes.iter().enumerate() {
            let Some(node) = node else { continue };
            let agreed = node
                .wish
                .borrow()
                .as_ref()
                .and_then(|w| w.configuration.clone());
            if let Some(agreed) = agreed
                && agreed.voters.len() == 3
                && agreed.witness.as_deref() == Some(witness)
                && leads(node, 1).await
            {
                leader = i;
                return true;
            }
        }
        false
    })
    .await;
    leader
}

/// Nothing is written to the witness while everybody answers. (The configuration was, once.)
async fn quiet(bed: &Bed) {
    let mut last = (Instant::now(), bed.witness.count().1);
    until("nothing more is written to the witness", async || {
        let now = bed.witness.count().1;
        if now != last.1 {
            last = (Instant::now(), now);
        }
        last.0.elapsed() >= Duration::from_secs(2)
    })
    .await;
}

/// Stops the writer; every acknowledged row is there, and the table empty for the next.
async fn finish(what: &str, node: &Node, writer: Writer) {
    writer.finish(what, node).await;
    node.app_sql("TRUNCATE t").await.unwrap();
}

async fn until_rows(node: &Node) {
    until("rows are written", async || {
        let sql = "SELECT count(*) >= 10 FROM t";
        node.sql_in("app", sql).await == Ok("t".into())
    })
    .await;
}

async fn until_says(node: &Node, part: &str) -> String {
    let mut said = String::new();
    until(&format!("it says {part}"), async || {
        said = node
            .status()
            .await
            .and_then(|s| s.message)
            .unwrap_or_default();
        said.contains(part)
    })
    .await;
    said
}

async fn stop(nodes: Nodes) {
    for node in nodes.into_iter().flatten() {
        node.stop().await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn whoever_is_left_of_two_goes_on_with_the_witness() {
    bounded(async {
        let (bed, mut nodes, first) = two("Required").await;
        quiet(&bed).await;

        let writing = Writer::start(&bed, 2);
        until_rows(at(&nodes, first)).await;
        let began = Instant::now();
        nodes[first].take().unwrap().kill().await;
        let second = 1 - first;
        until("the other serves", async || {
            leads(at(&nodes, second), 0).await
        })
        .await;
        println!("served again after {:?}", began.elapsed());
        assert!(began.elapsed() < Duration::from_secs(10));
        // Nobody else has what it would acknowledge now.
        until_waiting(at(&nodes, second), 1).await;
        until_says(
            at(&nodes, second),
            "writes wait: 1 of the standbys must have each commit, and 0 stream",
        )
        .await;
        assert!(
            at(&nodes, second)
                .app_sql("SELECT count(*) FROM t")
                .await
                .is_ok()
        );
        nodes[first] = Some(bed.start(number(first)));
        assert_eq!(whole(&nodes, "witness/u").await, second);
        bed.until_ready(number(first)).await;
        until_rows(at(&nodes, second)).await;
        finish("the primary killed", at(&nodes, second), writing).await;
        quiet(&bed).await;

        // Without its standby it goes on, and writes to the witness for as long.
        let term = bed.witness.register().unwrap().promised;
        nodes[first].take().unwrap().kill().await;
        let before = bed.witness.count().1;
        let since = Instant::now();
        until("it has served for long alone", async || {
            assert!(leads(at(&nodes, second), 1).await, "it went on serving");
            since.elapsed() >= LONG
        })
        .await;
        let beats = bed.witness.count().1 - before;
        println!("{beats} heartbeats in {LONG:?}");
        assert!(beats >= 8, "{beats}");
        nodes[first] = Some(bed.start(number(first)));
        bed.until_ready(number(first)).await;
        assert_eq!(whole(&nodes, "witness/u").await, second);
        quiet(&bed).await;
        assert_eq!(bed.witness.register().unwrap().promised, term);

        // Made anew, it's another voter in the place of the first.
        bed.witness.make("v");
        assert_eq!(whole(&nodes, "witness/v").await, second);
        quiet(&bed).await;
        stop(nodes).await;
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn under_preferred_whoever_is_left_takes_writes_alone() {
    bounded(async {
        let (bed, mut nodes, first) = two("Preferred").await;
        let writing = Writer::start(&bed, 2);
        until_rows(at(&nodes, first)).await;
        let began = Instant::now();
        nodes[first].take().unwrap().kill().await;
        let second = 1 - first;
        until("the other serves", async || {
            leads(at(&nodes, second), 0).await
        })
        .await;
        let sql = "INSERT INTO t VALUES (-1)";
        until("it takes writes", async || {
            at(&nodes, second).app_sql(sql).await.is_ok()
        })
        .await;
        println!("took writes again after {:?}", began.elapsed());
        nodes[first] = Some(bed.start(number(first)));
        assert_eq!(whole(&nodes, "witness/u").await, second);
        finish("under Preferred", at(&nodes, second), writing).await;
        stop(nodes).await;
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn without_the_api_server_two_go_on_and_one_does_not() {
    bounded(async {
        let (bed, mut nodes, first) = two("Required").await;
        quiet(&bed).await;
        let writing = Writer::start(&bed, 2);
        until_rows(at(&nodes, first)).await;
        bed.witness.away(true);
        bed.deaf(true);
        let term = at(&nodes, first).status().await.unwrap().term;
        let since = Instant::now();
        until("both have gone on for long", async || {
            assert!(leads(at(&nodes, first), 1).await, "it went on serving");
            since.elapsed() >= LONG
        })
        .await;
        assert_eq!(at(&nodes, first).status().await.unwrap().term, term);

        // Its standby is gone, too: there is no majority, and it says so.
        let second = 1 - first;
        nodes[second].take().unwrap().kill().await;
        let said = until_says(at(&nodes, first), "the witness can't be asked").await;
        println!("{said}");
        assert!(said.contains("there is no primary: "), "{said}");
        assert!(said.contains("connection refused"), "{said}");
        assert!(!leads(at(&nodes, first), 1).await);

        // Back: it takes over from itself.
        bed.witness.away(false);
        bed.deaf(false);
        until("it serves again", async || {
            leads(at(&nodes, first), 0).await || leads(at(&nodes, first), 1).await
        })
        .await;
        nodes[second] = Some(bed.start(number(second)));
        assert_eq!(whole(&nodes, "witness/u").await, first);
        bed.until_ready(number(second)).await;
        finish("the API server away", at(&nodes, first), writing).await;

        // The primary is gone while the API server is away: the standby says why it can't take over.
        quiet(&bed).await;
        bed.witness.away(true);
        nodes[first].take().unwrap().kill().await;
        until_says(at(&nodes, second), "the witness can't be asked").await;
        bed.witness.away(false);
        until("the other serves", async || {
            leads(at(&nodes, second), 0).await
        })
        .await;
        stop(nodes).await;
    })
    .await;
}
