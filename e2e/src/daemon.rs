//! Processes that outlive the command that started them.
//!
//! Each has a record (process number, start time, boot, command) and a log file. Nothing is ever
//! signalled by its number alone: the record must name the very process, on this very boot.

use crate::cgroups;
use crate::layout::{Layout, write_atomically};
use crate::run::Hopeless;
use anyhow::{Context, Result, bail};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde::{Deserialize, Serialize};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::{Duration, Instant};

/// What to start.
#[derive(Clone, Debug)]
pub struct Daemon {
    /// Its name: of its record and of its log file.
    pub name: String,
    /// The network namespace it runs in; `None`: the machine's own.
    pub netns: Option<String>,
    /// Program and arguments.
    pub command: Vec<String>,
    /// Whether it joins the test bed's cgroup (which needs root).
    pub contained: bool,
}

/// What is known of a started daemon.
#[derive(Clone, Debug, Serialize, Deserialize, PartialEq, Eq)]
pub struct Record {
    /// The process.
    pub pid: i32,
    /// When it was started, in ticks since the boot.
    pub start: u64,
    /// The boot.
    pub boot: String,
    /// What was started.
    pub command: Vec<String>,
}

/// The start time in a text of the form of `/proc/PID/stat`: `None` if the process is dead and
/// only waits for its parent.
fn start_time(stat: &str) -> Option<u64> {
    // The name in parentheses may hold anything, so count from the last one.
    let mut fields = stat.rsplit_once(") ")?.1.split(' ');
    if matches!(fields.next()?, "Z" | "X") {
        return None;
    }
    fields.nth(18)?.parse().ok()
}

/// When a living process was started.
#[must_use]
pub fn started(pid: i32) -> Option<u64> {
    start_time(&fs::read_to_string(format!("/proc/{pid}/stat")).ok()?)
}

/// The name of this boot of the machine.
///
/// # Errors
/// If the kernel doesn't tell.
pub fn boot_id() -> Result<String> {
    let path = "/proc/sys/kernel/random/boot_id";
    Ok(fs::read_to_string(path)
        .with_context(|| format!("reading {path}"))?
        .trim()
        .to_owned())
}

impl Record {
    /// Whether that process still lives.
    #[must_use]
    pub fn alive(&self) -> bool {
        boot_id().is_ok_and(|b| b == self.boot) && started(self.pid) == Some(self.start)
    }

    /// Ends the process: first by asking, then by force. Does nothing if it's gone already.
    ///
    /// # Errors
    /// If it lives on after that.
    pub async fn stop(&self, patience: Duration) -> Result<()> {
        for (signal, patience) in [
            (Signal::SIGTERM, patience),
            (Signal::SIGKILL, Duration::from_secs(5)),
        ] {
            if !self.alive() {
                return Ok(());
            }
            let _ = kill(Pid::from_raw(self.pid), signal);
            let start = Instant::now();
            while self.alive() && start.elapsed() < patience {
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
        }
        if self.alive() {
            bail!(
                "the process {} ({}) can't be ended",
                self.pid,
                self.command.join(" ")
            );
        }
        Ok(())
    }
}

fn record_path(layout: &Layout, name: &str) -> PathBuf {
    layout.pids().join(format!("{name}.json"))
}

/// The log file of a daemon.
#[must_use]
pub fn log_path(layout: &Layout, name: &str) -> PathBuf {
    layout.logs().join(format!("{name}.log"))
}

/// The record of a daemon, dead or alive.
#[must_use]
pub fn record(layout: &Layout, name: &str) -> Option<Record> {
    serde_json::from_slice(&fs::read(record_path(layout, name)).ok()?).ok()
}

/// Whether a daemon of this name lives.
#[must_use]
pub fn alive(layout: &Layout, name: &str) -> bool {
    record(layout, name).is_some_and(|r| r.alive())
}

/// The names of all daemons that have a record.
#[must_use]
pub fn names(layout: &Layout) -> Vec<String> {
    let Ok(entries) = fs::read_dir(layout.pids()) else {
        return Vec::new();
    };
    let mut names: Vec<_> = entries
        .flatten()
        .filter_map(|e| {
            e.file_name()
                .to_string_lossy()
                .strip_suffix(".json")
                .map(str::to_owned)
        })
        .collect();
    names.sort();
    names
}

/// Starts a daemon, unless it already runs with this very command. One that runs with another is
/// ended first.
///
/// # Errors
/// If it can't be started.
pub async fn ensure(layout: &Layout, daemon: &Daemon) -> Result<()> {
    let mut command = Vec::new();
    if let Some(ns) = &daemon.netns {
        // Not `ip netns exec`: that mounts a /sys of its own, which hides the cgroups.
        command.extend(["nsenter".to_owned(), format!("--net=/run/netns/{ns}")]);
    }
    command.extend(daemon.command.iter().cloned());
    if let Some(old) = record(layout, &daemon.name) {
        if old.alive() && old.command == command {
            return Ok(());
        }
        old.stop(Duration::from_secs(10)).await?;
    }
    let log = log_path(layout, &daemon.name);
    fs::create_dir_all(layout.logs())
        .with_context(|| format!("making {}", layout.logs().display()))?;
    let out = fs::OpenOptions::new()
        .create(true)
        .append(true)
        .open(&log)
        .with_context(|| format!("opening {}", log.display()))?;
    let err = out.try_clone().context("a second handle of the log file")?;

    // The shell joins the cgroups before it becomes the daemon, so that no child of the daemon can
    // ever be outside them.
    let mut join = String::new();
    if daemon.contained {
        for file in cgroups::system_procs()? {
            join.push_str(&format!("echo $$ >'{}' || exit 125; ", file.display()));
        }
    }
    let child = tokio::process::Command::new("setsid")
        .args(["sh", "-c", &format!("{join}exec \"$@\""), "testbed"])
        .args(&command)
        .current_dir(layout.root())
        .stdin(Stdio::null())
        .stdout(out)
        .stderr(err)
        .spawn()
        .with_context(|| format!("starting {}", daemon.name))?;
    let pid = child
        .id()
        .and_then(|p| i32::try_from(p).ok())
        .context("a process without a number")?;
    let start = started(pid).with_context(|| {
        format!(
            "{} ended at once\n{}",
            daemon.name,
            tail(layout, &daemon.name)
        )
    })?;
    let record = Record {
        pid,
        start,
        boot: boot_id()?,
        command,
    };
    write_atomically(
        &record_path(layout, &daemon.name),
        serde_json::to_string_pretty(&record)?.as_bytes(),
    )
}

/// Ends a daemon and forgets it.
///
/// # Errors
/// If it lives on.
pub async fn stop(layout: &Layout, name: &str, patience: Duration) -> Result<()> {
    if let Some(r) = record(layout, name) {
        r.stop(patience).await?;
    }
    match fs::remove_file(record_path(layout, name)) {
        Err(e) if e.kind() != std::io::ErrorKind::NotFound => {
            Err(e).context("removing a daemon's record")
        }
        _ => Ok(()),
    }
}

/// Fails if the daemon is dead: with what it said last.
///
/// # Errors
/// If the daemon is dead.
pub fn check(layout: &Layout, name: &str) -> Result<()> {
    if alive(layout, name) {
        return Ok(());
    }
    Err(Hopeless(format!("{name} has ended; {}", tail(layout, name))).into())
}

/// Where to read on, and the last lines of it.
#[must_use]
pub fn tail(layout: &Layout, name: &str) -> String {
    last_lines(&log_path(layout, name), 12)
}

/// The last lines of a file, under its name.
#[must_use]
pub fn last_lines(path: &Path, count: usize) -> String {
    let text = fs::read(path)
        .map(|b| String::from_utf8_lossy(&b).into_owned())
        .unwrap_or_default();
    let lines: Vec<_> = text.lines().rev().take(count).collect();
    let shown = lines
        .into_iter()
        .rev()
        .map(|l| format!("  | {l}\n"))
        .collect::<String>();
    format!("last lines of {}:\n{shown}", path.display())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn start_times_are_read_past_strange_names() {
        let tail = "S 1 1 1 0 -1 4194560 1 2 3 4 5 6 7 8 20 0 1 0 8675309 1 2";
        assert_eq!(start_time(&format!("42 (a ) b) {tail}")), Some(8_675_309));
        assert_eq!(
            start_time(&format!("42 (x) {}", tail.replace('S', "Z"))),
            None
        );
        assert_eq!(start_time("nonsense"), None);
    }

    #[tokio::test]
    async fn a_daemon_starts_once_is_known_again_and_ends() {
        let folder = tempfile::tempdir().unwrap();
        let layout = Layout::at(folder.path());
        let mut daemon = Daemon {
            name: "sleeper".into(),
            netns: None,
            command: vec!["sleep".into(), "600".into()],
            contained: false,
        };
        ensure(&layout, &daemon).await.unwrap();
        let first = record(&layout, "sleeper").unwrap();
        assert!(first.alive());
        ensure(&layout, &daemon).await.unwrap();
        assert_eq!(record(&layout, "sleeper").unwrap(), first);

        daemon.command = vec!["sleep".into(), "601".into()];
        ensure(&layout, &daemon).await.unwrap();
        assert!(!first.alive());
        let second = record(&layout, "sleeper").unwrap();
        assert!(second.alive());

        stop(&layout, "sleeper", Duration::from_secs(2))
            .await
            .unwrap();
        assert!(!second.alive());
        assert!(names(&layout).is_empty());
    }

    #[tokio::test]
    async fn a_reused_number_is_left_alone() {
        let me = i32::try_from(std::process::id()).unwrap();
        let stranger = Record {
            pid: me,
            start: 1,
            boot: boot_id().unwrap(),
            command: vec![],
        };
        assert!(!stranger.alive());
        stranger.stop(Duration::from_millis(1)).await.unwrap(); // and we live to tell
    }
}
