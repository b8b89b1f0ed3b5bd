//! Three instances on a real PostgreSQL that fail over among themselves, without operator and API server.

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
use domicile::instance::kill::Family;
use domicile::instance::proc::Proc;
use domicile::instance::receiver;
use instance_bed::writer::{Writer, connect};
use instance_bed::*;

async fn bounded(test: impl Future<Output = ()>) {
    tokio::time::timeout(Duration::from_secs(240), test)
        .await
        .expect("the test ends in time");
}

/// A store of three, all streaming, all voting.
async fn three() -> (Bed, Vec<Option<Node>>) {
    of(Bed::new(3, "Required")).await
}

async fn of(bed: Bed) -> (Bed, Vec<Option<Node>>) {
    let nodes: Vec<Option<Node>> = (1..=3).map(|n| Some(bed.start(n))).collect();
    for n in 1..=3 {
        bed.until_ready(n).await;
    }
    settled(&nodes, 2).await;
    (bed, nodes)
}

/// Until the primary's rule names at least so many, and nobody else says it is one. Its index.
async fn settled(nodes: &[Option<Node>], members: usize) -> usize {
    let mut leader = 0;
    until("one primary, and its rule whole", async || {
        let mut found = Vec::new();
        for (i, node) in nodes.iter().enumerate() {
            let Some(node) = node else { continue };
            if let Some(status) = node.status().await
                && status.role == InstanceRole::Primary
                && status.ready
            {
                let rule = status.synchronous.clone().unwrap_or_default();
                found.push((i, rule.members.len(), rule.in_force));
            }
        }
        match found[..] {
            [(i, count, true)] if count >= members => {
                leader = i;
                true
            }
            _ => false,
        }
    })
    .await;
    leader
}

fn name(index: usize) -> u32 {
    u32::try_from(index).unwrap() + 1
}

fn at(nodes: &[Option<Node>], index: usize) -> &Node {
    nodes[index].as_ref().unwrap()
}

/// Until the instance is a ready standby, and all three are in their places.
async fn back(bed: &Bed, nodes: &[Option<Node>], index: usize) -> usize {
    // By its own word, of this life.
    until("it is back", async || {
        let status = at(nodes, index).status().await;
        status.is_some_and(|s| s.role == InstanceRole::Standby && s.ready)
    })
    .await;
    bed.until_ready(name(index)).await;
    settled(nodes, 2).await
}

/// Stops the writer and looks for what it was told.
async fn finish(what: &str, nodes: &[Option<Node>], leader: usize, writer: Writer) -> Duration {
    writer.finish(what, at(nodes, leader)).await
}

async fn table(nodes: &[Option<Node>], leader: usize) {
    let sql = "DROP TABLE IF EXISTS t; CREATE TABLE t (v bigint)";
    at(nodes, leader).app_sql(sql).await.unwrap();
}

/// Until the writer has written so many since it began.
async fn until_rows(nodes: &[Option<Node>], leader: usize, count: usize) {
    until("rows are written", async || {
        let sql = format!("SELECT count(*) >= {count} FROM t");
        at(nodes, leader).sql_in("app", &sql).await == Ok("t".into())
    })
    .await;
}

async fn stop(nodes: Vec<Option<Node>>) {
    let ends = nodes
        .into_iter()
        .flatten()
        .map(|n| tokio::spawn(n.stop()))
        .collect::<Vec<_>>();
    for end in ends {
        end.await.unwrap();
    }
}

fn family(node: &Node) -> std::collections::BTreeSet<Proc> {
    let pid = u32::try_from(node.postmaster().unwrap()).unwrap();
    let all = Family::of(Proc::of(pid).unwrap()).living().unwrap();
    assert!(all.len() > 4);
    all
}

/// Cuts a standby's stream and nothing else: it goes on voting, and doesn't come back by itself.
async fn cut(node: &Node) {
    let pid = u32::try_from(node.postmaster().unwrap()).unwrap();
    let postmaster = Proc::of(pid).unwrap();
    receiver::cut(&node.config.run, postmaster, PORT, Duration::from_secs(10))
        .await
        .unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn killed_instances_are_replaced_and_come_back_as_standbys() {
    bounded(async {
        let (bed, mut nodes) = three().await;
        let leader = settled(&nodes, 2).await;
        table(&nodes, leader).await;
        let writing = Writer::start(&bed, 3);
        until_rows(&nodes, leader, 50).await;
        let began = Instant::now();
        nodes[leader].take().unwrap().kill().await;
        let next = settled(&nodes, 1).await;
        println!("served again after {:?}", began.elapsed());
        assert_ne!(next, leader);
        nodes[leader] = Some(bed.start(name(leader)));
        let last = back(&bed, &nodes, leader).await;
        finish("the primary killed", &nodes, last, writing).await;

        // All at once, and the API server isn't there when they are back.
        table(&nodes, last).await;
        let writing = Writer::start(&bed, 3);
        until_rows(&nodes, last, 50).await;
        let mut taken = nodes.drain(..).map(|n| n.unwrap());
        let (a, b, c) = (taken.next(), taken.next(), taken.next());
        drop(taken);
        tokio::join!(a.unwrap().kill(), b.unwrap().kill(), c.unwrap().kill());
        let began = Instant::now();
        nodes = (1..=3).map(|n| Some(bed.start_alone(n))).collect();
        let leader = settled(&nodes, 2).await;
        println!("all killed: whole again after {:?}", began.elapsed());
        finish("all killed", &nodes, leader, writing).await;
        stop(nodes).await;
    })
    .await;
}

/// Whether a standby goes by a session that was ready: its receiver has no key, and its host is a folder.
async fn goes_by_a_relay(node: &Node) -> bool {
    let shown = node.sql("SHOW primary_conninfo").await;
    shown.is_ok_and(|c| c.contains("/relay/s-"))
        && !node.config.run.join("upstream/tls.key").exists()
}

/// Until whoever doesn't serve has a session ready with each whom it may have to follow next.
async fn ready(nodes: &[Option<Node>], leader: usize) {
    for standby in (0..nodes.len()).filter(|i| *i != leader) {
        let other = format!("s-{}", name(3 - leader - standby));
        until("a session is ready", async || {
            let status = at(nodes, standby).status().await;
            status.is_some_and(|s| s.sessions == [other.as_str()])
        })
        .await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn who_is_far_away_is_followed_by_a_session_that_was_ready() {
    bounded(async {
        let (bed, mut nodes) = of(Bed::new(3, "Required").far_apart()).await;
        let mut leader = settled(&nodes, 2).await;
        table(&nodes, leader).await;
        for round in 0..3 {
            ready(&nodes, leader).await;
            if round == 2 {
                // A session that has ended is noticed, and another one made ready.
                let other = (leader + 1) % 3;
                nodes[other].take().unwrap().kill().await;
                nodes[other] = Some(bed.start(name(other)));
                leader = back(&bed, &nodes, other).await;
                ready(&nodes, leader).await;
            }
            let writing = Writer::start(&bed, 3);
            until_rows(&nodes, leader, 50).await;
            let old = leader;
            if round == 1 {
                // One of them lacks something, which it gets before anybody is promoted, by the same session.
                cut(at(&nodes, (old + 1) % 3)).await;
                until_rows(&nodes, leader, 150).await;
            }
            nodes[old].take().unwrap().kill().await;
            leader = settled(&nodes, 1).await;
            let standby = 3 - old - leader;
            until("it streams by the session", async || {
                let status = at(&nodes, standby).status().await;
                status.is_some_and(|s| s.ready) && goes_by_a_relay(at(&nodes, standby)).await
            })
            .await;
            let upstream = at(&nodes, standby)
                .status()
                .await
                .unwrap()
                .receiver
                .unwrap()
                .upstream;
            assert_eq!(upstream, format!("s-{}", name(leader)));
            // Its own log has to be whole from the beginning of the file on: part of it never came from the upstream.
            if round > 0 {
                nodes[standby].take().unwrap().kill().await;
                nodes[standby] = Some(bed.start(name(standby)));
            }
            nodes[old] = Some(bed.start(name(old)));
            back(&bed, &nodes, old).await;
            leader = back(&bed, &nodes, standby).await;
            let gap = writing
                .finish("followed by a session", at(&nodes, leader))
                .await;
            println!("round {round}: {gap:?}");
            table(&nodes, leader).await;
        }
        let used = logged().matches("goes by a session that was ready").count();
        assert!(used >= 3, "{used} times");
        for amiss in [
            "a receiver's way ends: its timeline",
            "isn't whole up to",
            "asked ahead",
        ] {
            assert!(!logged().contains(amiss), "{amiss}");
        }
        stop(nodes).await;
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_primary_whose_postgresql_ends_hangs_or_is_stopped_is_replaced() {
    bounded(async {
        let (bed, mut nodes) = three().await;
        let mut leader = settled(&nodes, 2).await;
        table(&nodes, leader).await;

        // Its manager lives and tells the others.
        let writing = Writer::start(&bed, 3);
        until_rows(&nodes, leader, 50).await;
        let all = family(at(&nodes, leader));
        let postmaster = at(&nodes, leader).postmaster();
        let began = Instant::now();
        nix::sys::signal::kill(
            nix::unistd::Pid::from_raw(postmaster.unwrap()),
            nix::sys::signal::Signal::SIGKILL,
        )
        .unwrap();
        let old = leader;
        until("another serves", async || {
            let mut others = nodes.iter().enumerate().filter(|(i, _)| *i != old);
            let (a, b) = (others.next().unwrap(), others.next().unwrap());
            for (_, node) in [a, b] {
                let status = node.as_ref().unwrap().status().await;
                if status.is_some_and(|s| s.role == InstanceRole::Primary) {
                    return true;
                }
            }
            false
        })
        .await;
        println!(
            "postmaster killed: another serves after {:?}",
            began.elapsed()
        );
        assert!(
            all.iter().all(|p| !p.alive()),
            "nothing of the old one is left"
        );
        leader = back(&bed, &nodes, old).await;
        assert_ne!(leader, old);
        finish("postmaster killed", &nodes, leader, writing).await;

        // A graceful stop hands over.
        table(&nodes, leader).await;
        let writing = Writer::start(&bed, 3);
        until_rows(&nodes, leader, 50).await;
        let began = Instant::now();
        nodes[leader].take().unwrap().stop().await;
        println!("the stop took {:?}", began.elapsed());
        let next = settled(&nodes, 1).await;
        nodes[leader] = Some(bed.start(name(leader)));
        let next_again = back(&bed, &nodes, leader).await;
        assert_eq!(next, next_again, "who comes back disturbs nobody");
        leader = next;
        let gap = finish("graceful stop", &nodes, leader, writing).await;
        assert!(gap < Duration::from_secs(3), "less than the detection time");

        // PostgreSQL stands still while its manager goes on, with a commit under way.
        table(&nodes, leader).await;
        let ca = std::fs::read(bed.path(1, "tls/ca.crt")).unwrap();
        let client = connect(
            &format!("s-{}", name(leader)),
            at(&nodes, leader).config.address,
            &ca,
        )
        .await
        .unwrap();
        let writing = Writer::start(&bed, 3);
        until_rows(&nodes, leader, 50).await;
        let all = family(at(&nodes, leader));
        let began = Instant::now();
        for process in &all {
            process.signal(nix::sys::signal::Signal::SIGSTOP).unwrap();
        }
        let pending = tokio::spawn(async move {
            let parameters: [&(dyn tokio_postgres::types::ToSql + Sync); 1] = [&-1_i64];
            client
                .execute("INSERT INTO t VALUES ($1)", &parameters)
                .await
        });
        until("the frozen one is ended", async || {
            all.iter().all(|p| !p.alive())
        })
        .await;
        println!("frozen: ended after {:?}", began.elapsed());
        for process in &all {
            let _ = process.signal(nix::sys::signal::Signal::SIGCONT);
        }
        let old = leader;
        leader = back(&bed, &nodes, old).await;
        assert_ne!(leader, old);
        println!("frozen: whole again after {:?}", began.elapsed());
        assert!(
            pending.await.unwrap().is_err(),
            "nothing is acknowledged any more"
        );
        let gap = finish("frozen", &nodes, leader, writing).await;
        assert!(gap < Duration::from_secs(15));
        stop(nodes).await;
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn copies_that_are_away_diverged_or_lost_come_back() {
    bounded(async {
        let (bed, mut nodes) = three().await;
        let mut leader = settled(&nodes, 2).await;
        table(&nodes, leader).await;

        // Both standbys: without a majority nobody serves, and with it somebody does.
        let writing = Writer::start(&bed, 3);
        until_rows(&nodes, leader, 50).await;
        let others: Vec<usize> = (0..3).filter(|i| *i != leader).collect();
        for other in &others {
            nodes[*other].take().unwrap().kill().await;
        }
        until("it doesn't serve alone", async || {
            let status = at(&nodes, leader).status().await;
            status.is_some_and(|s| s.role != InstanceRole::Primary)
        })
        .await;
        for other in &others {
            nodes[*other] = Some(bed.start(name(*other)));
        }
        // Whoever of the three it is.
        leader = settled(&nodes, 2).await;
        finish("both standbys killed", &nodes, leader, writing).await;

        // The primary has a commit that nobody else has, cancelled by its client; then it's away for two failovers.
        table(&nodes, leader).await;
        let first = leader;
        for other in (0..3).filter(|i| *i != first) {
            cut(at(&nodes, other)).await;
        }
        let waiting = commit(at(&nodes, first), "INSERT INTO t VALUES (0)");
        until_waiting(at(&nodes, first), 1).await;
        let cancel = "SELECT pg_cancel_backend(pid) FROM pg_stat_activity WHERE wait_event = 'SyncRep'";
        at(&nodes, first).sql(cancel).await.unwrap();
        let told = waiting.await.unwrap();
        let copy = inode(&bed, first);
        nodes[first].take().unwrap().kill().await;
        let second = settled(&nodes, 1).await;
        let writing = Writer::start(&bed, 3);
        until_rows(&nodes, second, 50).await;
        let there = at(&nodes, second).sql_in("app", "SELECT count(*) FROM t WHERE v = 0").await;
        println!("a cancelled wait: its client was told {told:?}, and the next primary has {there:?} of it");
        nodes[second].take().unwrap().kill().await;
        nodes[second] = Some(bed.start(name(second)));
        let third = settled(&nodes, 1).await;
        nodes[first] = Some(bed.start(name(first)));
        leader = back(&bed, &nodes, first).await;
        println!("two failovers: {first}, {second}, {third}, {leader}");
        assert_ne!(inode(&bed, first), copy, "what had diverged was made anew");
        finish("two failovers", &nodes, leader, writing).await;

        // A standby's copy is lost, and of the primary's is left what PostgreSQL wrote while it was being removed.
        table(&nodes, leader).await;
        let writing = Writer::start(&bed, 3);
        for (victim, remains) in [((leader + 1) % 3, false), (leader, true)] {
            until_rows(&nodes, leader, 50).await;
            nodes[victim].take().unwrap().kill().await;
            let data = bed.path(name(victim), "volume/data");
            std::fs::remove_dir_all(&data).unwrap();
            if remains {
                std::fs::create_dir_all(data.join("pg_wal")).unwrap();
                std::fs::write(data.join("pg_wal/000000010000000000000003"), "rest").unwrap();
            }
            nodes[victim] = Some(bed.start(name(victim)));
            let now = back(&bed, &nodes, victim).await;
            assert!(bed.path(name(victim), "volume/data/PG_VERSION").exists());
            assert_ne!(now, victim);
            leader = now;
        }
        finish("two copies lost", &nodes, leader, writing).await;
        stop(nodes).await;
    })
    .await;
}

fn inode(bed: &Bed, index: usize) -> u64 {
    use std::os::unix::fs::MetadataExt as _;
    std::fs::metadata(bed.path(name(index), "volume/data"))
        .unwrap()
        .ino()
}

/// A standby that was stopped just when it had begun to follow a new primary: PostgreSQL then reads the new timeline's
/// file, which holds less than it had replayed, and would never answer again. Made by hand here, since the moment is short.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_standby_stopped_while_it_went_over_to_a_new_timeline_comes_back() {
    bounded(async {
        let (bed, mut nodes) = three().await;
        let leader = settled(&nodes, 2).await;
        table(&nodes, leader).await;
        let standby = (leader + 1) % 3;
        nodes[standby].take().unwrap().stop().await;
        nodes[leader].take().unwrap().stop().await;
        nodes[leader] = Some(bed.start(name(leader)));
        let next = settled(&nodes, 1).await;
        assert_ne!(next, leader);

        let wal = |index| bed.path(name(index), "volume/data/pg_wal");
        let new = at(&nodes, next)
            .sql("SELECT pg_walfile_name(pg_current_wal_lsn())")
            .await
            .unwrap();
        let history = format!("{}.history", &new[..8]);
        std::fs::copy(wal(next).join(&history), wal(standby).join(&history)).unwrap();
        let timeline = u32::from_str_radix(&new[..8], 16).unwrap();
        let old = wal(standby).join(format!("{:08X}{}", timeline - 1, &new[8..]));
        assert!(old.exists(), "the timelines part in {new}");
        // Three pages of it had come.
        let mut bytes = std::fs::read(wal(next).join(&new)).unwrap();
        bytes[3 * 8192..].fill(0);
        let begun = wal(standby).join(&new);
        std::fs::write(&begun, bytes).unwrap();
        std::fs::set_permissions(&begun, old.metadata().unwrap().permissions()).unwrap();

        nodes[standby] = Some(bed.start(name(standby)));
        back(&bed, &nodes, standby).await;
        assert!(logged().contains("only begun to be copied"));
        stop(nodes).await;
    })
    .await;
}
