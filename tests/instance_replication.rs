//! Two instances on a real PostgreSQL: streaming, the synchronous rule, and cutting.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "a test that can't go on should say so and stop"
)]

mod instance_bed;

use std::collections::BTreeSet;
use std::os::unix::fs::MetadataExt as _;
use std::path::Path;
use std::time::Duration;

use domicile::instance::conninfo::Upstream;
use domicile::instance::{proc, receiver, tls, volume};
use instance_bed::*;

async fn bounded(test: impl Future<Output = ()>) {
    tokio::time::timeout(Duration::from_secs(240), test)
        .await
        .expect("the test ends in time");
}

/// Whoever watches a store must not be told that its primary is down because a standby comes.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_primary_is_ready_all_the_while_its_rule_changes() {
    bounded(async {
        let bed = Bed::new(3, "Required").only_first();
        let primary = bed.start(1);
        bed.until_ready(1).await;
        let changes = async {
            let (second, third) = (bed.start(2), bed.start(3));
            bed.until_members(&primary, &[2, 3]).await;
            [third, second]
        };
        let watched = async {
            loop {
                let status = primary.status().await.expect("it answers");
                assert!(status.ready, "{status:?}");
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        };
        let standbys = tokio::select! {
            standbys = changes => standbys,
            () = watched => unreachable!("it watches until the changes are done"),
        };
        for standby in standbys {
            standby.stop().await;
        }
        primary.stop().await;
    })
    .await;
}

/// A primary and a standby whose acknowledgement counts.
async fn pair() -> (Bed, Node, Node) {
    let bed = Bed::new(2, "Required").only_first();
    let primary = bed.start(1);
    let standby = bed.start(2);
    bed.until_ready(1).await;
    bed.until_ready(2).await;
    bed.until_members(&primary, &[2]).await;
    (bed, primary, standby)
}

/// Cuts a standby's stream and nothing else: it goes on voting, and doesn't come back by itself.
async fn cut(standby: &Node) -> Duration {
    cut_within(standby, Duration::from_secs(10)).await.unwrap()
}

async fn cut_within(standby: &Node, limit: Duration) -> anyhow::Result<Duration> {
    let pid = u32::try_from(standby.postmaster().unwrap()).unwrap();
    let postmaster = proc::Proc::of(pid).unwrap();
    receiver::cut(&standby.config.run, postmaster, PORT, limit).await
}

/// Takes [`cut`] back.
fn follow(bed: &Bed, standby: &Node, instance: u32) {
    let certificate = tls::Certificate::read(&standby.config.tls)
        .unwrap()
        .unwrap();
    let upstream = Upstream {
        name: "s-1".into(),
        address: bed.address(1),
        port: PORT,
    };
    let (voter, name) = (bed.voter(instance), format!("s-{instance}"));
    let run = &standby.config.run;
    let major = volume::major(&standby.config.volume.join("data"));
    receiver::follow(run, &certificate, &upstream, &voter, &name, 6, major).unwrap();
    let pid = nix::unistd::Pid::from_raw(standby.postmaster().unwrap());
    nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGHUP).unwrap();
}

/// With the key of an instance a thief gets as far as PostgreSQL's walsender, and no further.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn whoever_replicates_with_a_stolen_key_is_cut_off_and_told_of() {
    bounded(async {
        let (bed, primary, standby) = pair().await;
        let wal = bed.path(2, "stolen");
        std::fs::create_dir(&wal).unwrap();
        let tls = |file: &str| standby.config.tls.join(file).display().to_string();
        // PostgreSQL's clients refuse a key that others may read.
        let key = bed.path(2, "stolen.key");
        std::fs::copy(tls("tls.key"), &key).unwrap();
        let private = std::os::unix::fs::PermissionsExt::from_mode(0o600);
        std::fs::set_permissions(&key, private).unwrap();
        for (victim, host) in [(&primary, 1), (&standby, 2)] {
            // Its own name in the certificate is the other's.
            let (stolen, name) = (tls("tls.crt"), format!("s-{host}"));
            let conninfo = format!(
                "host={name} hostaddr={} port={PORT} user=domicile_replication sslmode=verify-full sslrootcert={} sslcert={stolen} sslkey={}",
                bed.address(host),
                tls("ca.crt"),
                key.display(),
            );
            let begin = std::time::Instant::now();
            let mut thief = tokio::process::Command::new(bin().join("pg_receivewal"));
            thief.args(["--no-loop", "--dbname", &conninfo, "--directory"]).arg(&wal);
            let thief = thief.output().await.unwrap();
            let said = String::from_utf8_lossy(&thief.stderr).into_owned();
            assert!(
                said.contains("terminating connection due to administrator command"),
                "{said}"
            );
            println!("{name} cut it off after {:.1} s", begin.elapsed().as_secs_f64());
            let told = |instance| bed.entry(instance).strangers;
            until("it is told", async || !told(u32::from(host)).is_empty()).await;
            let words = told(u32::from(host)).remove(0);
            assert!(words.contains("with the certificate of s-2, as \"pg_receivewal\""), "{words}");
            let (_, metrics) = victim.http("/metrics").await.unwrap();
            assert!(metrics.contains("domicile_instance_strangers_cut_total 1"));
        }
        // The store's own goes on.
        primary.app_sql("CREATE TABLE t (v int)").await.unwrap();
        standby.stop().await;
        primary.stop().await;
    })
    .await;
}

/// A driver that tries every host of the application's URI would take it for the primary; and its log has an era that
/// nobody voted for.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_standby_promoted_by_hand_is_stopped_and_copied_anew() {
    bounded(async {
        let (bed, primary, standby) = pair().await;
        let inode = |bed: &Bed| Some(std::fs::metadata(bed.path(2, "volume/data")).ok()?.ino());
        let (before, copy) = (standby.postmaster(), inode(&bed));
        let _ = standby.sql("SELECT pg_promote(wait => false)").await;
        until("it is stopped", async || standby.postmaster() != before).await;
        assert_eq!(
            primary.app_sql("SELECT pg_is_in_recovery()").await,
            Ok("f".into())
        );
        until("it was copied anew", async || {
            inode(&bed).is_some_and(|now| Some(now) != copy)
        })
        .await;
        bed.until_ready(2).await;
        primary.app_sql("CREATE TABLE t (v int)").await.unwrap();
        standby.stop().await;
        primary.stop().await;
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_commit_waits_until_the_standby_has_it() {
    bounded(async {
        let bed = Bed::new(3, "Required").only_first();
        let primary = bed.start(1);
        bed.until_ready(1).await;
        // Before any standby is there, and from the first moment on.
        assert_eq!(
            primary.app_sql("SHOW synchronous_standby_names").await,
            Ok("ANY 1 (\"-\")".into())
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
        bed.until_members(&primary, &[2]).await;
        until("the commit is durable", async || bed.entry(1).durable == Some(true)).await;
        assert!(!bed.path(2, "volume/data.new").exists());
        assert_eq!(bed.entry(2).system_identifier, bed.entry(1).system_identifier);
        assert_ne!(bed.entry(2).id, bed.entry(1).id);
        assert_eq!(
            primary.sql("SELECT string_agg(slot_name || active, ' ') FROM pg_replication_slots WHERE active").await,
            Ok("s_2true".into())
        );
        // Under the name of its volume: another volume's acknowledgement is another's.
        assert_eq!(
            primary.sql("SELECT application_name || ' ' || state || ' ' || sync_state FROM pg_stat_replication").await,
            Ok(format!("{} streaming quorum", bed.voter(2)))
        );
        assert_eq!(
            primary.app_sql("SHOW synchronous_standby_names").await,
            Ok(format!("ANY 1 (\"{}\")", bed.voter(2)))
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

        // A third one, so that two are a majority; it votes, but streams no more.
        let third = bed.start(3);
        bed.until_members(&primary, &[2, 3]).await;
        cut(&third).await;
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
        let last = commit(&primary, "INSERT INTO t VALUES (2)");
        until_waiting(&primary, 1).await;
        let alone = bed.start_alone(2);
        alone.until_answers("/readyz", 200).await;
        last.await.unwrap().unwrap();
        third.stop().await;
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
            longest = longest.max(cut(&standby).await);
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

            follow(&bed, &standby, 2);
            write.await.unwrap().unwrap();
        }
        println!("the longest cut took {} ms", longest.as_millis());
        assert!(longest < Duration::from_secs(2));
        standby.stop().await;
        primary.stop().await;
    })
    .await;
}

/// Over 80 ms there and back, clients that were just connecting made each cut, and so each failover, 0.2 s longer; one
/// that connects and says nothing would have had PostgreSQL stopped.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn clients_that_have_said_nothing_yet_keep_no_cut_waiting() {
    bounded(async {
        let (bed, primary, standby) = pair().await;
        let postmaster = standby.postmaster().unwrap();
        let mut silent = Vec::new();
        for _ in 0..3 {
            let connection = tokio::net::TcpStream::connect((bed.address(2), PORT)).await;
            silent.push(connection.unwrap());
        }
        until("each has a process", async || {
            unnamed(postmaster).len() >= silent.len()
        })
        .await;
        let pid = u32::try_from(postmaster).unwrap();
        assert!(receiver::process(pid).is_some());
        cut_within(&standby, Duration::from_secs(2)).await.unwrap();
        assert_eq!(receiver::process(pid), None);
        drop(silent);
        until("their processes end", async || {
            unnamed(postmaster).is_empty()
        })
        .await;

        // One of which nothing tells that it isn't a receiver is waited for. Nobody but the manager comes this way.
        let socket = standby.config.run.join(format!(".s.PGSQL.{PORT}"));
        let silent = tokio::net::UnixStream::connect(socket).await.unwrap();
        // The manager's own are without a name for a moment, too.
        let mut before = unnamed(postmaster);
        until("it has a process", async || {
            let now = unnamed(postmaster);
            !std::mem::replace(&mut before, now.clone()).is_disjoint(&now)
        })
        .await;
        let unknown = cut_within(&standby, Duration::from_millis(300)).await;
        assert!(unknown.is_err(), "{unknown:?}");
        drop(silent);
        cut(&standby).await;
        standby.stop().await;
        primary.stop().await;
    })
    .await;
}

/// The processes of a postmaster that are named as it is.
fn unnamed(postmaster: i32) -> BTreeSet<i32> {
    let own = proc::title(postmaster).unwrap();
    let all = proc::all().unwrap().into_iter();
    all.filter(|(_, stat)| stat.parent == postmaster)
        .map(|(process, _)| process.pid)
        .filter(|pid| proc::title(*pid).is_some_and(|title| title == own))
        .collect()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_frozen_receiver_is_not_reported_as_cut() {
    bounded(async {
        let (_bed, primary, standby) = pair().await;
        let postmaster = u32::try_from(standby.postmaster().unwrap()).unwrap();
        let receiver = nix::unistd::Pid::from_raw(receiver::process(postmaster).unwrap());
        nix::sys::signal::kill(receiver, nix::sys::signal::Signal::SIGSTOP).unwrap();
        let early = cut_within(&standby, Duration::from_millis(300)).await;
        assert!(
            early.is_err(),
            "a process that is there may still have an answer to send"
        );
        nix::sys::signal::kill(receiver, nix::sys::signal::Signal::SIGCONT).unwrap();
        cut(&standby).await;
        standby.stop().await;
        primary.stop().await;
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_primary_that_moved_is_followed_and_a_stranded_standby_cloned_anew() {
    bounded(async {
        let bed = Bed::new(3, "Required").only_first();
        let primary = bed.start(1);
        let standby = bed.start(2);
        bed.until_members(&primary, &[2]).await;
        primary.app_sql("CREATE TABLE t (v int)").await.unwrap();
        let before = standby.postmaster();
        primary.stop().await;
        let primary = bed.start_at(1, 101);
        until("the standby streams from the new address", async || {
            // It may stream already while the other waits to be elected again.
            let sql = "SELECT count(*) FROM pg_stat_replication WHERE state = 'streaming' AND NOT pg_is_in_recovery()";
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

        // The WAL that the standby needs vanishes while it's away; a third one keeps the majority.
        let third = bed.start(3);
        bed.until_members(&primary, &[2, 3]).await;
        standby.stop().await;
        primary
            .sql("SELECT pg_drop_replication_slot('s_2')")
            .await
            .unwrap();
        primary.app_sql("INSERT INTO t VALUES (2)").await.unwrap();
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
        until("it is copied anew", async || {
            let text = standby.http("/metrics").await.map(|(_, text)| text);
            text.is_some_and(|t| t.contains("work_duration_seconds{work=\"clone\"}"))
        })
        .await;
        bed.until_ready(2).await;
        assert_eq!(bed.entry(2).id, identity, "the same volume");
        assert!(!bed.path(2, "volume/data.new").exists());
        until("the standby has all rows", async || {
            standby.app_sql("SELECT count(*) FROM t").await == Ok("2".into())
        })
        .await;
        third.stop().await;
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
        let bed = Bed::new(2, "Preferred").only_first();
        let primary = bed.start(1);
        bed.until_ready(1).await;
        primary.app_sql("CREATE TABLE t (v int)").await.unwrap();
        let standby = bed.start(2);
        let rule = "SHOW synchronous_standby_names";
        bed.until_members(&primary, &[2]).await;
        let both = Ok(format!("ANY 1 (\"{}\")", bed.voter(2)));
        assert_eq!(primary.app_sql(rule).await, both);
        until("it is durable", async || bed.entry(1).durable == Some(true)).await;
        // It votes, but has no stream any more.
        cut(&standby).await;
        primary.app_sql("INSERT INTO t VALUES (1)").await.unwrap();
        until("it isn't durable", async || {
            bed.entry(1).durable == Some(false)
        })
        .await;
        assert_eq!(primary.app_sql(rule).await, Ok(String::new()));
        follow(&bed, &standby, 2);
        until("the standby counts again", async || {
            primary.app_sql(rule).await == both
        })
        .await;
        standby.stop().await;
        primary.stop().await;
    })
    .await;
}
