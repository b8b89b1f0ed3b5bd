//! PostgreSQL as a process.
//!
//! Owns its start, its signals and its end. Never: decides when; never starts a second one.

use std::path::Path;
use std::process::ExitStatus;
use std::sync::Arc;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use tokio::process::Child;
use tracing::info;

use super::logs::{self, Signs};
use super::plan::Mode;
use super::proc;
use super::programs::{self, Programs};
use super::reaper::{Children, Guard};
use super::settings;

/// A running PostgreSQL.
pub struct Postmaster {
    child: Child,
    pid: u32,
    mode: Mode,
    _guard: Guard,
}

/// How to stop.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stop {
    /// Sessions are ended, a checkpoint is written, standbys get all of it.
    Fast,
    /// At once, as a crash: recovery follows.
    Immediate,
}

impl Postmaster {
    /// Starts PostgreSQL on `data` with the configuration under `run`.
    ///
    /// # Errors
    /// As the operating system's.
    pub fn start(
        programs: &Programs,
        data: &Path,
        run: &Path,
        mode: Mode,
        signs: &Arc<Signs>,
        children: &Children,
    ) -> anyhow::Result<Self> {
        use std::os::unix::fs::PermissionsExt as _;
        // The kubelet opens the volume's directories to the pod's group when it mounts it; PostgreSQL
        // refuses a data directory that others than its owner can write to.
        let _ = std::fs::set_permissions(data, std::fs::Permissions::from_mode(0o700));
        signs.clear_fatal();
        let mut command = programs::command(&programs.dir, "postgres");
        command
            .arg("-D")
            .arg(data)
            .arg("-c")
            .arg(format!(
                "config_file={}",
                run.join("conf/postgresql.conf").display()
            ))
            // Before the file is read: what is wrong with it is reported in this form.
            .arg("-c")
            .arg(format!("log_line_prefix={}", settings::LOG_LINE_PREFIX));
        let mut child = children.spawn(command)?;
        let guard = children.guard(&child);
        if let Some(stderr) = child.stderr.take() {
            tokio::spawn(logs::relay(stderr, signs.clone()));
        }
        if let Some(stdout) = child.stdout.take() {
            tokio::spawn(logs::relay(stdout, signs.clone()));
        }
        let pid = child.id().unwrap_or_default();
        info!(pid, ?mode, "started PostgreSQL");
        Ok(Self {
            child,
            pid,
            mode,
            _guard: guard,
        })
    }

    /// Its process number.
    #[must_use]
    pub fn pid(&self) -> u32 {
        self.pid
    }

    /// As what it was started.
    #[must_use]
    pub fn mode(&self) -> Mode {
        self.mode
    }

    /// It was a standby, and was promoted.
    pub fn promoted(&mut self) {
        self.mode = Mode::Primary;
    }

    /// Lets it read its configuration and certificates again.
    pub fn reload(&self) {
        if let Some(pid) = self.child.id().and_then(|p| i32::try_from(p).ok()) {
            proc::reload(pid);
        }
    }

    /// Tells it to stop; [`Postmaster::ended`] says when it has.
    pub fn stop(&self, how: Stop) {
        self.signal(match how {
            Stop::Fast => Signal::SIGINT,
            Stop::Immediate => Signal::SIGQUIT,
        });
    }

    /// Ends it without asking. Its children notice and end too.
    pub fn kill(&self) {
        self.signal(Signal::SIGKILL);
    }

    fn signal(&self, signal: Signal) {
        // Not after it was waited for: the number may be somebody else's by then.
        if let Some(pid) = self.child.id().and_then(|p| i32::try_from(p).ok()) {
            let _ = kill(Pid::from_raw(pid), signal);
        }
    }

    /// Waits for its end. May be given up and called again.
    pub async fn ended(&mut self) -> Option<ExitStatus> {
        self.child.wait().await.ok()
    }
}
