//! The watchdog process and the end of PostgreSQL, on real processes.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "a test that can't go on should say so and stop"
)]

mod instance_bed;

use std::collections::BTreeSet;
use std::io::Read as _;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use domicile::instance::clock::boottime_ms;
use domicile::instance::kill::{Family, stop_now};
use domicile::instance::proc::{self, Proc};
use domicile::instance::reaper::Children;
use domicile::instance::watchdog::{Event, Watchdog, process};
use instance_bed::*;
use nix::sys::signal::Signal;

/// How long an end may take on a busy machine; what it took is printed.
const SOON: Duration = Duration::from_millis(500);

async fn bounded(test: impl Future<Output = ()>) {
    tokio::time::timeout(Duration::from_secs(240), test)
        .await
        .expect("the test ends in time");
}

/// A shell with two children, in place of a postmaster.
struct Tree {
    child: Child,
    all: BTreeSet<Proc>,
    _dir: tempfile::TempDir,
}

impl Tree {
    fn new() -> Self {
        // Or a test that does so later couldn't end what others began before.
        drop(program());
        drop_root();
        let dir = tempfile::tempdir().unwrap();
        let mut child = Command::new("sh")
            .args(["-c", "sleep 1000 & sleep 1000 & echo up; wait"])
            .current_dir(dir.path())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut up = [0; 3];
        child.stdout.as_mut().unwrap().read_exact(&mut up).unwrap();
        let root = Proc::of(child.id()).unwrap();
        let all = Family::of(root).living().unwrap();
        assert_eq!(all.len(), 3);
        Self {
            child,
            all,
            _dir: dir,
        }
    }

    fn root(&self) -> Proc {
        Proc::of(self.child.id()).unwrap()
    }

    fn signal(&self, signal: Signal) {
        for p in &self.all {
            p.signal(signal).unwrap();
        }
    }

    fn living(&self) -> usize {
        self.all.iter().filter(|p| p.alive()).count()
    }

    async fn until_gone(&self) -> Duration {
        let begun = Instant::now();
        while self.living() > 0 {
            assert!(begun.elapsed() < PATIENCE, "the processes end");
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        begun.elapsed()
    }
}

impl Drop for Tree {
    fn drop(&mut self) {
        self.signal(Signal::SIGKILL);
        let _ = self.child.wait();
    }
}

fn start() -> Watchdog {
    Watchdog::start(&Children::default(), &program()).unwrap()
}

#[tokio::test]
async fn a_renewed_deadline_lets_live_and_a_passed_one_ends_all() {
    bounded(async {
        let tree = Tree::new();
        let mut watchdog = start();
        let mut deadline = 0;
        for _ in 0..10 {
            deadline = boottime_ms() + 250;
            watchdog.guard(tree.root(), deadline).unwrap();
            tokio::time::sleep(Duration::from_millis(100)).await;
            assert_eq!(tree.living(), 3, "renewed in time");
        }
        tree.until_gone().await;
        let late = boottime_ms().saturating_sub(deadline);
        println!("all gone {late} ms after the deadline");
        assert!(Duration::from_millis(late) < SOON);
        assert_eq!(watchdog.event().await, Event::Killed(3));
        assert!(watchdog.pid().is_some(), "it stays for the next primary");

        let next = Tree::new();
        watchdog.guard(next.root(), boottime_ms() + 100).unwrap();
        next.until_gone().await;
        assert_eq!(watchdog.event().await, Event::Killed(3));
    })
    .await;
}

#[tokio::test]
async fn a_released_one_lives_on_also_when_the_manager_goes() {
    bounded(async {
        let tree = Tree::new();
        let mut watchdog = start();
        watchdog.guard(tree.root(), boottime_ms() + 100).unwrap();
        watchdog.release().unwrap();
        tokio::time::sleep(Duration::from_millis(200)).await;
        let process = Proc::of(watchdog.pid().unwrap()).unwrap();
        drop(watchdog);
        until("the watchdog has ended", async || !process.alive()).await;
        assert_eq!(tree.living(), 3);
    })
    .await;
}

#[tokio::test]
async fn a_killed_manager_takes_the_primary_along() {
    bounded(async {
        let tree = Tree::new();
        let Proc { pid, started } = tree.root();
        let text = format!("serve {pid} {started} {}", boottime_ms() + 3_600_000);
        let record = String::from_utf8(process::record(&text).to_vec()).unwrap();
        // In place of the manager: a process that says this and then hangs.
        let mut manager = Command::new("sh")
            .args(["-c", "printf %s \"$1\"; exec sleep 1000", "sh", &record])
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut watchdog = Command::new(program())
            .arg("watchdog")
            .stdin(manager.stdout.take().unwrap())
            .stdout(Stdio::null())
            .spawn()
            .unwrap();
        tokio::time::sleep(Duration::from_millis(300)).await;
        assert_eq!(tree.living(), 3);
        manager.kill().unwrap();
        let took = tree.until_gone().await;
        println!("all gone {took:?} after the manager");
        assert!(took < SOON);
        manager.wait().unwrap();
        assert!(watchdog.wait().unwrap().success());
    })
    .await;
}

#[tokio::test]
async fn frozen_past_the_deadline_and_thawed_it_ends_at_once() {
    bounded(async {
        let tree = Tree::new();
        let mut watchdog = start();
        let process = Proc::of(watchdog.pid().unwrap()).unwrap();
        watchdog.guard(tree.root(), boottime_ms() + 400).unwrap();
        tokio::time::sleep(Duration::from_millis(100)).await;
        process.signal(Signal::SIGSTOP).unwrap();
        tree.signal(Signal::SIGSTOP);
        // A renewal from before the freeze that it hasn't read.
        watchdog.guard(tree.root(), boottime_ms() + 300).unwrap();
        tokio::time::sleep(Duration::from_millis(800)).await;
        assert_eq!(tree.living(), 3, "frozen processes can't end");
        tree.signal(Signal::SIGCONT);
        process.signal(Signal::SIGCONT).unwrap();
        let took = tree.until_gone().await;
        println!("all gone {took:?} after the thaw");
        assert!(took < SOON);
        assert_eq!(watchdog.event().await, Event::Killed(3));

        // Frozen alone, while the manager goes on: the renewals it finds are good.
        let tree = Tree::new();
        watchdog.guard(tree.root(), boottime_ms() + 200).unwrap();
        tokio::time::sleep(Duration::from_millis(50)).await;
        process.signal(Signal::SIGSTOP).unwrap();
        tokio::time::sleep(Duration::from_millis(300)).await;
        watchdog.guard(tree.root(), boottime_ms() + 60_000).unwrap();
        process.signal(Signal::SIGCONT).unwrap();
        tokio::time::sleep(Duration::from_millis(200)).await;
        assert_eq!(tree.living(), 3);
    })
    .await;
}

#[tokio::test]
async fn another_process_under_the_number_is_left_alone() {
    bounded(async {
        let tree = Tree::new();
        let mut watchdog = start();
        let other = Proc {
            started: tree.root().started - 1,
            ..tree.root()
        };
        watchdog.guard(other, boottime_ms()).unwrap();
        assert_eq!(watchdog.event().await, Event::Killed(0));
        assert_eq!(tree.living(), 3);
    })
    .await;
}

#[tokio::test]
async fn a_watchdog_that_hangs_or_dies_is_noticed_and_replaced() {
    bounded(async {
        let tree = Tree::new();
        let mut watchdog = start();
        let first = Proc::of(watchdog.pid().unwrap()).unwrap();
        let renew = |w: &mut Watchdog| w.guard(tree.root(), boottime_ms() + 60_000);
        renew(&mut watchdog).unwrap();
        first.signal(Signal::SIGSTOP).unwrap();
        let missed = (0..1000)
            .take_while(|_| renew(&mut watchdog).is_ok())
            .count();
        println!("noticed after {missed} renewals");
        assert!(missed < 200);
        let full = renew(&mut watchdog).unwrap_err();
        assert_eq!(full.kind(), std::io::ErrorKind::WouldBlock);
        watchdog.restart().unwrap();
        until("the old one is gone", async || !first.alive()).await;
        assert_eq!(tree.living(), 3);

        let second = Proc::of(watchdog.pid().unwrap()).unwrap();
        assert_ne!(first, second);
        second.signal(Signal::SIGKILL).unwrap();
        assert!(matches!(watchdog.event().await, Event::Ended(_)));
        assert!(renew(&mut watchdog).is_err());
        watchdog.restart().unwrap();
        // The replacement knows what is guarded.
        let third = Proc::of(watchdog.pid().unwrap()).unwrap();
        until("it has begun to wait", async || {
            third.stat().is_some_and(|s| s.state == 'S')
        })
        .await;
        let status = std::fs::read_to_string(format!("/proc/{}/status", third.pid)).unwrap();
        let rss: Vec<&str> = status
            .lines()
            .filter(|l| l.contains("Rss") || l.contains("VmRSS"))
            .collect();
        println!("{rss:?}");
        drop(watchdog);
        tree.until_gone().await;
    })
    .await;
}

/// Sessions that don't notice their postmaster's end: they never wait for anything.
async fn busy(node: &Node, count: usize) {
    for _ in 0..count {
        drop(commit(node, "DO $$ BEGIN LOOP END LOOP; END $$"));
    }
    until("the sessions are busy", async || {
        let sql =
            "SELECT count(*) FROM pg_stat_activity WHERE query LIKE 'DO %' AND state = 'active'";
        node.sql(sql).await == Ok(count.to_string())
    })
    .await;
}

fn family(node: &Node) -> (Proc, BTreeSet<Proc>) {
    let postmaster = Proc::of(u32::try_from(node.postmaster().unwrap()).unwrap()).unwrap();
    let all = Family::of(postmaster).living().unwrap();
    assert!(all.len() > 4);
    (postmaster, all)
}

/// What is left of the data directory's processes, by a look of the test's own.
fn remaining(node: &Node, but: &BTreeSet<Proc>) -> Vec<Proc> {
    let data = node.config.volume.join("data");
    proc::all()
        .unwrap()
        .into_iter()
        .filter(|(p, stat)| {
            !stat.ended()
                && !but.contains(p)
                && std::fs::read_link(format!("/proc/{}/cwd", p.pid)).is_ok_and(|cwd| cwd == data)
        })
        .map(|(p, _)| p)
        .collect()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_real_postgresql_ends_at_its_deadline_with_all_its_sessions() {
    bounded(async {
        let program = program();
        let bed = Bed::new(1, "Preferred");
        let primary = bed.start(1);
        bed.until_ready(1).await;
        busy(&primary, 3).await;
        let (postmaster, all) = family(&primary);
        let mut watchdog = Watchdog::start(&Children::default(), &program).unwrap();
        let deadline = boottime_ms() + 300;
        watchdog.guard(postmaster, deadline).unwrap();
        let Event::Killed(killed) = watchdog.event().await else {
            panic!("it isn't killed")
        };
        let late = boottime_ms() - deadline;
        println!("{killed} processes killed, reported {late} ms after the deadline");
        assert!(Duration::from_millis(late) < SOON);
        // The three sessions, the postmaster and its helpers; the test's own look may be over by then.
        assert!(killed >= 7);
        assert!(all.iter().all(|p| !p.alive()));
        // The manager starts it anew; that one isn't touched.
        until("it's back", async || primary.sql("SELECT 1").await.is_ok()).await;
        primary.stop().await;
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nothing_of_postgresql_is_left_after_stop_now() {
    bounded(async {
        drop(program());
        let bed = Bed::new(1, "Preferred");
        for how in ["healthy", "frozen", "orphans"] {
            let primary = bed.start(1);
            bed.until_ready(1).await;
            until("it serves", async || {
                primary.app_sql("SELECT pg_is_in_recovery()").await == Ok("f".into())
            })
            .await;
            busy(&primary, 2).await;
            let (postmaster, all) = family(&primary);
            let mut family = Family::of(postmaster);
            let mut successor = BTreeSet::new();
            match how {
                "frozen" => postmaster.signal(Signal::SIGSTOP).unwrap(),
                "orphans" => {
                    postmaster.signal(Signal::SIGKILL).unwrap();
                    // The busy sessions don't notice; the instance ends them before it tells anybody that it's gone.
                    let begun = Instant::now();
                    until("nothing of it is left", async || {
                        all.iter().all(|p| !p.alive())
                    })
                    .await;
                    println!(
                        "no process outlives the postmaster for {:?}",
                        begun.elapsed()
                    );
                    assert!(begun.elapsed() < Duration::from_secs(2));
                }
                _ => {}
            }
            let took = stop_now(&mut family, Duration::from_secs(5)).await.unwrap();
            println!("{how}: nothing left after {took:?}");
            assert!(took < Duration::from_secs(2));
            assert!(all.iter().all(|p| !p.alive()), "{how}");
            // Whoever is there now belongs to the next one, which the manager started meanwhile.
            successor.extend(
                remaining(&primary, &BTreeSet::new())
                    .into_iter()
                    .filter(|p| p.started > postmaster.started && !all.contains(p)),
            );
            assert_eq!(remaining(&primary, &successor), Vec::new(), "{how}");
            until("it's back", async || primary.sql("SELECT 1").await.is_ok()).await;
            primary.stop().await;
        }
    })
    .await;
}
