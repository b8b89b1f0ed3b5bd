//! The end of PostgreSQL, for certain: of the postmaster and of every process it started.
//!
//! Owns which processes are one PostgreSQL, how they are killed so that none is missed, and how it is known that
//! nothing of it can answer or acknowledge anything any more.
//! Never: decides when; touches another PostgreSQL, or a process whose number only was this one's.
//!
//! # Which processes
//! The postmaster's children are those whose parent it is. If it died before them they have another parent, and a
//! session in the middle of a statement doesn't notice: those are found because they were seen before, or because
//! they run the same program in the same data directory under the title of one of PostgreSQL's processes.
//!
//! # Why the postmaster is stopped before it's killed
//! One that runs could start another child between the look and the kill, and that child's parent would then be
//! gone. So: SIGSTOP; kill the children; when it's seen stopped, look and kill once more; then kill it.

use std::collections::BTreeSet;
use std::io;
use std::os::unix::fs::MetadataExt as _;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail};
use nix::sys::signal::Signal;

use super::proc::{self, Proc, Stat};

/// How long PostgreSQL is given to stop by itself, at once.
const OWN_END: Duration = Duration::from_millis(300);
/// Looks at a postmaster that doesn't come to a stop (it waits for a disk) before it's killed all the same.
const LOOKS: u32 = 5;

/// Program and working directory, as device and inode.
type Home = [(u64, u64); 2];

/// A postmaster and all that it started.
#[derive(Clone, Debug)]
pub struct Family {
    postmaster: Proc,
    home: Option<Home>,
    known: BTreeSet<Proc>,
    looks: u32,
}

impl Family {
    /// Of this postmaster. Best made while it lives: what it leaves behind is then known by its program and its
    /// data directory.
    #[must_use]
    pub fn of(postmaster: Proc) -> Self {
        let home = postmaster.alive().then(|| home(postmaster.pid)).flatten();
        Self {
            postmaster,
            // Again, now that it's read: it may have been another's.
            home: home.filter(|_| postmaster.alive()),
            known: BTreeSet::new(),
            looks: 0,
        }
    }

    /// Of a postmaster that was just started on this data directory, and hasn't gone there yet: it does so itself, a
    /// moment after its start.
    #[must_use]
    pub fn on(postmaster: Proc, data: &Path) -> Self {
        let mut family = Self::of(postmaster);
        if let (Some([_, cwd]), Ok(meta)) = (&mut family.home, std::fs::metadata(data)) {
            *cwd = (meta.dev(), meta.ino());
        }
        family
    }

    /// The postmaster.
    #[must_use]
    pub fn postmaster(&self) -> Proc {
        self.postmaster
    }

    /// Looks who of it can still do something, the postmaster included, and remembers them. An empty answer is the
    /// last word: nobody is left who could start another.
    ///
    /// # Errors
    /// If `/proc` can't be read.
    pub fn living(&mut self) -> io::Result<BTreeSet<Proc>> {
        let alive_before = self.postmaster.alive();
        let mut living = self.look()?;
        if living.is_empty() && alive_before {
            // It died during the look, and may have started one just before.
            living = self.look()?;
        }
        self.known.clone_from(&living);
        Ok(living)
    }

    fn look(&self) -> io::Result<BTreeSet<Proc>> {
        let all = proc::all()?;
        // A zombie's children have another parent already; another process under its number has none of ours.
        let parent = self.postmaster.stat().map(|_| self.postmaster.pid);
        Ok(all
            .into_iter()
            .filter(|(candidate, stat)| {
                !stat.ended()
                    && (*candidate == self.postmaster
                        || Some(stat.parent) == parent
                        || self.known.contains(candidate)
                        || self.left_behind(*candidate, stat))
            })
            .map(|(candidate, _)| candidate)
            .collect())
    }

    /// Whether it is a child of this postmaster that has outlived it, and not one of its successor's.
    fn left_behind(&self, candidate: Proc, stat: &Stat) -> bool {
        self.home.is_some()
            && candidate.started >= self.postmaster.started
            && home(candidate.pid) == self.home
            && proc::title(candidate.pid).is_some_and(|t| t.starts_with(b"postgres:"))
            && home(stat.parent) != self.home
    }

    /// One round of killing; see the module's text. Returns who was still there when it began; empty when all is
    /// over.
    ///
    /// # Errors
    /// If `/proc` can't be read, or a process may not be killed.
    pub fn strike(&mut self) -> io::Result<BTreeSet<Proc>> {
        let state = self.postmaster.stat().filter(|s| !s.ended());
        let stands_still = state.is_none_or(|s| matches!(s.state, 'T' | 't'));
        if !stands_still {
            self.postmaster.signal(Signal::SIGSTOP)?;
        }
        let living = self.living()?;
        for victim in living.iter().filter(|p| **p != self.postmaster) {
            victim.signal(Signal::SIGKILL)?;
        }
        self.looks += 1;
        if stands_still || self.looks > LOOKS {
            self.postmaster.signal(Signal::SIGKILL)?;
        }
        Ok(living)
    }
}

/// Program and working directory of a process that runs under the same user.
fn home(pid: i32) -> Option<Home> {
    let of = |what: &str| {
        let meta = std::fs::metadata(format!("/proc/{pid}/{what}")).ok()?;
        Some((meta.dev(), meta.ino()))
    };
    Some([of("exe")?, of("cwd")?])
}

/// Stops PostgreSQL at once, as a crash does: asks it, and kills what is still there after a moment. When this
/// returns, no process of it can acknowledge or answer anything any more. The postmaster may be left as a zombie,
/// for the one who started it.
///
/// # Errors
/// With the processes that are left after `limit` (they wait for a disk, mostly). They may still answer.
pub async fn stop_now(family: &mut Family, limit: Duration) -> anyhow::Result<Duration> {
    let begun = Instant::now();
    // Before the first signal, so that whatever it leaves behind is known.
    let mut living = family.living().context("can't list processes")?;
    family
        .postmaster
        .signal(Signal::SIGQUIT)
        .context("can't stop PostgreSQL")?;
    let mut pause = Duration::from_millis(1);
    loop {
        if living.is_empty() {
            return Ok(begun.elapsed());
        }
        if begun.elapsed() >= limit {
            let pids: Vec<String> = living.iter().map(|p| p.pid.to_string()).collect();
            bail!(
                "processes {} of PostgreSQL are still there {} ms after they were killed: does their disk answer?",
                pids.join(", "),
                begun.elapsed().as_millis()
            );
        }
        // Processes that aren't our children have no event to wait for but their end, which is near.
        tokio::time::sleep(pause).await;
        let asked = OWN_END.min(limit / 2);
        living = if begun.elapsed() < asked && family.postmaster.alive() {
            pause = (pause * 2).min(Duration::from_millis(10));
            family.living()
        } else {
            // Also when it is gone and has left others behind: nobody else will end those.
            pause = Duration::from_millis(2);
            family.strike()
        }
        .context("can't end PostgreSQL's processes")?;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::process::{Child, Command, Stdio};

    /// A shell with two children, in a directory of its own.
    fn tree(dir: &Path) -> Child {
        let mut child = Command::new("sh")
            .args(["-c", "sleep 1000 & sleep 1000 & echo up; wait"])
            .current_dir(dir)
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut up = [0; 3];
        io::Read::read_exact(child.stdout.as_mut().unwrap(), &mut up).unwrap();
        child
    }

    #[tokio::test]
    async fn what_ignores_the_request_is_killed_with_its_children() {
        let dir = tempfile::tempdir().unwrap();
        let mut child = tree(dir.path());
        let mut family = Family::of(Proc::of(child.id()).unwrap());
        let before = family.living().unwrap();
        assert_eq!(before.len(), 3);
        // Frozen, as a stopped container: it can't follow any request.
        family.postmaster().signal(Signal::SIGSTOP).unwrap();
        let took = stop_now(&mut family, Duration::from_secs(5)).await.unwrap();
        assert!(took < Duration::from_secs(2), "{took:?}");
        assert!(before.iter().all(|p| !p.alive()));
        child.wait().unwrap();
    }

    #[tokio::test]
    async fn children_that_outlive_it_are_found_again() {
        let dir = tempfile::tempdir().unwrap();
        let mut child = tree(dir.path());
        let mut family = Family::of(Proc::of(child.id()).unwrap());
        let before = family.living().unwrap();
        child.kill().unwrap();
        child.wait().unwrap();
        assert_eq!(family.living().unwrap().len(), 2);
        stop_now(&mut family, Duration::from_secs(5)).await.unwrap();
        assert!(before.iter().all(|p| !p.alive()));
    }

    #[tokio::test]
    async fn also_of_one_that_was_elsewhere_when_it_began() {
        let dir = tempfile::tempdir().unwrap();
        let mut child = tree(dir.path());
        let process = Proc::of(child.id()).unwrap();
        assert_eq!(
            Family::on(process, dir.path()).home,
            Family::of(process).home
        );
        let other = Family::on(process, Path::new("/"));
        assert_ne!(other.home, Family::of(process).home);
        stop_now(&mut Family::of(process), Duration::from_secs(5))
            .await
            .unwrap();
        child.wait().unwrap();
    }

    #[tokio::test]
    async fn another_process_under_the_number_is_left_alone() {
        let dir = tempfile::tempdir().unwrap();
        let mut child = tree(dir.path());
        let real = Proc::of(child.id()).unwrap();
        let mut other = Family::of(Proc {
            started: real.started - 1,
            ..real
        });
        stop_now(&mut other, Duration::from_secs(1)).await.unwrap();
        assert!(real.alive());
        let mut family = Family::of(real);
        stop_now(&mut family, Duration::from_secs(5)).await.unwrap();
        child.wait().unwrap();
    }
}
