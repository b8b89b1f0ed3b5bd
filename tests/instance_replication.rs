//! Two instances on a real PostgreSQL: streaming, the synchronous rule, and cutting.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "a test that can't go on should say so and stop"
)]

mod instance_bed;

use std::path::Path;
use std::time::Duration;

use domicile::instance::conninfo::Upstream;
use domicile::instance::{receiver, tls};
use instance_bed::*;

async fn bounded(test: impl Future<Output = ()>) {
    tokio::time::timeout(Duration::from_secs(240), test)
        .await
        .expect("the test ends in time");
}

/// A primary and a standby that streams.
async fn pair() -> (Bed, Node, Node) {
    let bed = Bed::new(2, "Required");
    let primary = bed.start(1);
    let standby = bed.start(2);
    bed.until_ready(1).await;
    bed.until_ready(2).await;
    (bed, primary, standby)
}

/// A driver that tries every host of the application's URI would take it for the primary.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_standby_promoted_by_hand_is_stopped() {
    bounded(async {
        let (bed, primary, standby) = pair().await;
        let _ = standby.sql("SELECT pg_promote(wait => false)").await;
        bed.until_message(2, "was a primary").await;
        until("it is stopped", async || standby.postmaster().is_none()).await;
        assert!(standby.app_sql("SELECT 1").await.is_err());
        assert_eq!(
            primary.app_sql("SELECT pg_is_in_recovery()").await,
            Ok("f".into())
        );
        standby.stop().await;
        primary.stop().await;
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_commit_waits_until_the_standby_has_it() {
    bounded(async {
        let bed = Bed::new(2, "Required");
        let primary = bed.start(1);
        bed.until_ready(1).await;
        // Before any standby is there, and from the first moment on.
        assert_eq!(
            primary.app_sql("SHOW synchronous_standby_names").await,
            Ok("ANY 1 (\"s-2\")".into())
        );
        let first = commit(&primary, "CREATE TABLE t (v int)");
        until_waiting(&primary, 1).await;
        assert_eq!(bed.entry(1).durable, Some(false));
        assert!(!first.is_finished());

        // As an interrupted clone leaves it.
        std::fs::create_dir_all(bed.path(2, "volume/data.new/pg_wal")).unwrap();
        let standby = bed.start(2);
        bed.until_ready(2).await;
        first.await.unwrap().unwrap();
        until("the commit is durable", async || bed.entry(1).durable == Some(true)).await;
        assert!(!bed.path(2, "volume/data.new").exists());
        assert_eq!(bed.entry(2).system_identifier, bed.entry(1).system_identifier);
        assert_ne!(bed.entry(2).id, bed.entry(1).id);
        assert_eq!(
            primary.sql("SELECT slot_name || active FROM pg_replication_slots").await,
            Ok("s_2true".into())
        );
        assert_eq!(
            primary.sql("SELECT application_name || ' ' || state || ' ' || sync_state FROM pg_stat_replication").await,
            Ok("s-2 streaming quorum".into())
        );
        assert_eq!(standby.app_sql("SELECT pg_is_in_recovery()").await, Ok("t".into()));
        let status = primary.status().await.unwrap();
        assert!(status.durable && status.ready);
        assert_eq!(status.replication[0].name, "s-2");
        let status = standby.status().await.unwrap();
        assert_eq!(status.receiver.unwrap().upstream, "s-1");
        until("the standby is an endpoint for reads", async || {
            let wish = primary.wish.borrow().clone().unwrap();
            wish.read_only.unwrap().addresses.contains(&bed.address(2))
                && wish.read_write.unwrap().addresses.contains(&bed.address(1))
        })
        .await;

        // The standby is away: commits wait, and the primary says so.
        standby.stop().await;
        let second = commit(&primary, "INSERT INTO t VALUES (1)");
        until_waiting(&primary, 1).await;
        until("it isn't durable", async || bed.entry(1).durable == Some(false)).await;
        assert!(!second.is_finished());
        let standby = bed.start(2);
        second.await.unwrap().unwrap();
        bed.until_ready(2).await;
        assert_eq!(standby.app_sql("SELECT v FROM t").await, Ok("1".into()));

        // Without the API server, after a crash of the whole standby.
        standby.kill().await;
        let third = commit(&primary, "INSERT INTO t VALUES (2)");
        until_waiting(&primary, 1).await;
        let alone = bed.start_alone(2);
        alone.until_answers("/readyz", 200).await;
        third.await.unwrap().unwrap();
        alone.stop().await;
        primary.stop().await;
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_cut_receiver_acknowledges_nothing_more() {
    bounded(async {
        let (bed, primary, standby) = pair().await;
        primary.app_sql("CREATE TABLE t (v int)").await.unwrap();
        let run = standby.config.run.clone();
        let postmaster = u32::try_from(standby.postmaster().unwrap()).unwrap();
        let certificate = tls::Certificate::read(&standby.config.tls)
            .unwrap()
            .unwrap();
        let upstream = Upstream {
            name: "s-1".into(),
            address: bed.address(1),
            port: PORT,
        };
        let reload = || {
            let pid = nix::unistd::Pid::from_raw(i32::try_from(postmaster).unwrap());
            nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGHUP).unwrap();
        };
        let mut longest = Duration::ZERO;
        for round in 0..12u32 {
            until("a receiver is there", async || {
                receiver::process(postmaster).is_some()
            })
            .await;
            // At different moments of its life: just forked, connecting, streaming.
            if round % 3 != 0 {
                until("it streams", async || {
                    primary
                        .sql("SELECT count(*) FROM pg_stat_replication WHERE state = 'streaming'")
                        .await
                        == Ok("1".into())
                })
                .await;
            }
            let victim = receiver::process(postmaster);
            let took = receiver::cut(&run, postmaster, Duration::from_secs(10))
                .await
                .unwrap();
            longest = longest.max(took);
            if let Some(victim) = victim {
                let title = std::fs::read(format!("/proc/{victim}/cmdline")).unwrap_or_default();
                assert!(!String::from_utf8_lossy(&title).contains("walreceiver"));
            }
            assert!(!run.join("upstream/tls.key").exists());
            // Nothing acknowledges: it waits, and goes on waiting.
            let write = commit(&primary, &format!("INSERT INTO t VALUES ({round})"));
            until_waiting(&primary, 1).await;
            assert_eq!(receiver::process(postmaster), None, "none came back");
            assert!(!write.is_finished());

            receiver::follow(&run, &certificate, &upstream, "s-2", "s-2", 6).unwrap();
            reload();
            write.await.unwrap().unwrap();
        }
        println!("the longest cut took {} ms", longest.as_millis());
        assert!(longest < Duration::from_secs(2));
        standby.stop().await;
        primary.stop().await;
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_frozen_receiver_is_not_reported_as_cut() {
    bounded(async {
        let (_bed, primary, standby) = pair().await;
        let postmaster = u32::try_from(standby.postmaster().unwrap()).unwrap();
        let receiver = nix::unistd::Pid::from_raw(receiver::process(postmaster).unwrap());
        nix::sys::signal::kill(receiver, nix::sys::signal::Signal::SIGSTOP).unwrap();
        let run = &standby.config.run;
        let cut = receiver::cut(run, postmaster, Duration::from_millis(300)).await;
        assert!(
            cut.is_err(),
            "a process that is there may still have an answer to send"
        );
        nix::sys::signal::kill(receiver, nix::sys::signal::Signal::SIGCONT).unwrap();
        receiver::cut(run, postmaster, Duration::from_secs(10))
            .await
            .unwrap();
        standby.stop().await;
        primary.stop().await;
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_primary_that_moved_is_followed_and_a_stranded_standby_cloned_anew() {
    bounded(async {
        let (bed, primary, standby) = pair().await;
        primary.app_sql("CREATE TABLE t (v int)").await.unwrap();
        let before = standby.postmaster();
        primary.stop().await;
        let primary = bed.start_at(1, 101);
        until("the standby streams from the new address", async || {
            let sql = "SELECT count(*) FROM pg_stat_replication WHERE state = 'streaming'";
            primary.sql(sql).await == Ok("1".into())
        })
        .await;
        primary.app_sql("INSERT INTO t VALUES (1)").await.unwrap();
        assert_eq!(
            standby.postmaster(),
            before,
            "by a reload, not by a restart"
        );
        bed.until_ready(2).await;

        // The WAL that the standby needs vanishes while it's away.
        standby.stop().await;
        primary
            .sql("SELECT pg_drop_replication_slot('s_2')")
            .await
            .unwrap();
        let write = commit(&primary, "INSERT INTO t VALUES (2)");
        until_waiting(&primary, 1).await;
        let mut keep = String::new();
        for _ in 0..3 {
            primary.sql("SELECT pg_switch_wal()").await.unwrap();
            primary.sql("CHECKPOINT").await.unwrap();
            keep = primary
                .sql("SELECT pg_walfile_name(pg_current_wal_lsn())")
                .await
                .unwrap();
        }
        let wal = primary.config.volume.join("data/pg_wal");
        remove_before(&wal, &keep);
        let identity = bed.entry(2).id;
        let standby = bed.start(2);
        write.await.unwrap().unwrap();
        bed.until_ready(2).await;
        assert_eq!(bed.entry(2).id, identity, "the same volume");
        assert!(!bed.path(2, "volume/data.new").exists());
        until("the standby has all rows", async || {
            standby.app_sql("SELECT count(*) FROM t").await == Ok("2".into())
        })
        .await;
        let text = standby.http("/metrics").await.unwrap().1;
        assert!(
            text.contains("work_duration_seconds{work=\"clone\"}"),
            "{text}"
        );
        standby.stop().await;
        primary.stop().await;
    })
    .await;
}

/// Removes the WAL segments that precede one.
fn remove_before(wal: &Path, segment: &str) {
    for entry in std::fs::read_dir(wal).unwrap().flatten() {
        let name = entry.file_name().to_string_lossy().into_owned();
        if name.len() == 24 && name.as_str() < segment {
            std::fs::remove_file(entry.path()).unwrap();
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn preferred_goes_on_alone_and_comes_back() {
    bounded(async {
        let bed = Bed::new(2, "Preferred");
        let primary = bed.start(1);
        bed.until_ready(1).await;
        primary.app_sql("CREATE TABLE t (v int)").await.unwrap();
        let standby = bed.start(2);
        let rule = "SHOW synchronous_standby_names";
        until("the standby counts", async || {
            primary.app_sql(rule).await == Ok("ANY 1 (\"s-2\")".into())
        })
        .await;
        until("it is durable", async || bed.entry(1).durable == Some(true)).await;
        standby.stop().await;
        primary.app_sql("INSERT INTO t VALUES (1)").await.unwrap();
        until("it isn't durable", async || {
            bed.entry(1).durable == Some(false)
        })
        .await;
        assert_eq!(primary.app_sql(rule).await, Ok(String::new()));
        primary.stop().await;
    })
    .await;
}
