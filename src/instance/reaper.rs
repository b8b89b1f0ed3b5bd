//! The duties of process 1: children that nobody waits for.
//!
//! Owns the list of processes that the manager started and waits for itself. Never: reaps one of those, whose
//! end would then be lost to the one who waits for it.

use std::collections::BTreeSet;
use std::io;
use std::sync::{Arc, Mutex, PoisonError};

use nix::sys::wait::{Id, WaitPidFlag, WaitStatus, waitid};
use nix::unistd::Pid;
use tokio::process::{Child, Command};
use tokio::signal::unix::{SignalKind, signal};

/// The processes that the manager started itself.
#[derive(Clone, Debug, Default)]
pub struct Children(Arc<Mutex<BTreeSet<i32>>>);

impl Children {
    fn pids(&self) -> std::sync::MutexGuard<'_, BTreeSet<i32>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Starts a process that the caller waits for.
    ///
    /// # Errors
    /// As the operating system's.
    pub fn spawn(&self, mut command: Command) -> io::Result<Child> {
        // Under the lock from before the fork: one that ends at once must not be taken for an orphan.
        let mut pids = self.pids();
        let child = command.spawn()?;
        if let Some(pid) = child.id().and_then(|p| i32::try_from(p).ok()) {
            pids.insert(pid);
        }
        Ok(child)
    }

    /// The caller has waited for it; the number may come again as an orphan's.
    pub fn forget(&self, pid: Option<u32>) {
        if let Some(pid) = pid.and_then(|p| i32::try_from(p).ok()) {
            self.pids().remove(&pid);
        }
    }

    /// As [`Children::forget`], whenever the guard goes: also when a caller gave up waiting.
    #[must_use]
    pub fn guard(&self, child: &Child) -> Guard {
        Guard(self.clone(), child.id())
    }

    /// Reaps what ended and is nobody's. Returns how many.
    fn reap(&self) -> usize {
        let pids = self.pids();
        let mut reaped = 0;
        // Bounded: an orphan per turn, and the list of zombies is finite, but nothing here may loop for ever.
        while reaped < 1024 {
            let peek = WaitPidFlag::WEXITED | WaitPidFlag::WNOHANG | WaitPidFlag::WNOWAIT;
            let Ok(status) = waitid(Id::All, peek) else {
                break;
            };
            let Some(pid) = ended(&status) else { break };
            if pids.contains(&pid.as_raw()) {
                // Somebody waits for it. It hides those behind it until then; the next turn sees them.
                break;
            }
            let take = WaitPidFlag::WEXITED | WaitPidFlag::WNOHANG;
            if waitid(Id::Pid(pid), take).is_err() {
                break;
            }
            reaped += 1;
        }
        reaped
    }
}

/// Forgets a child when it goes out of scope.
#[derive(Debug)]
pub struct Guard(Children, Option<u32>);

impl Drop for Guard {
    fn drop(&mut self) {
        self.0.forget(self.1);
    }
}

fn ended(status: &WaitStatus) -> Option<Pid> {
    match status {
        WaitStatus::Exited(pid, _) | WaitStatus::Signaled(pid, _, _) => Some(*pid),
        _ => None,
    }
}

/// Reaps orphans for as long as the process lives. Only for process 1.
pub async fn run(children: Children) {
    let Ok(mut ended) = signal(SignalKind::child()) else {
        return;
    };
    // Signals coalesce, and one of ours may have hidden an orphan: look again now and then.
    let mut again = tokio::time::interval(std::time::Duration::from_secs(5));
    loop {
        tokio::select! {
            _ = ended.recv() => {}
            _ = again.tick() => {}
        }
        children.reap();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn an_own_child_is_left_to_its_waiter() {
        let children = Children::default();
        let mut own = children.spawn(Command::new("true")).unwrap();
        let deadline = std::time::Instant::now() + std::time::Duration::from_secs(10);
        // Peek until it is a zombie, without taking it.
        let pid = Pid::from_raw(i32::try_from(own.id().unwrap()).unwrap());
        let peek = WaitPidFlag::WEXITED | WaitPidFlag::WNOHANG | WaitPidFlag::WNOWAIT;
        while waitid(Id::Pid(pid), peek).is_ok_and(|s| ended(&s).is_none()) {
            assert!(std::time::Instant::now() < deadline);
            tokio::task::yield_now().await;
        }
        children.reap();
        assert!(own.wait().await.unwrap().success());
    }
}
