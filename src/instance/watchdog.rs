//! A second, tiny process that ends PostgreSQL if the manager doesn't say in time that it may go on.
//!
//! Owns the manager's side: its start, the messages to it, and what it says. The process itself is [`process`].
//! Never: decides until when; waits for the watchdog.
//!
//! # Messages
//! The manager writes records of [`RECORD`] bytes, text padded with spaces, into the watchdog's standard input:
//! `serve PID STARTED DEADLINE` (this postmaster may run as a primary until this instant of the boot-time clock, in
//! milliseconds) and `release` (there is no primary to guard). The watchdog answers with lines: `killed N` (all N
//! processes of it are gone) or `left N`. Records are that large so that the pipe holds eight: a watchdog that has
//! missed as many is noticed because the next doesn't fit.

pub mod process;

use std::io::{self, PipeWriter, Write as _};
use std::os::fd::{AsFd as _, OwnedFd};
use std::path::{Path, PathBuf};
use std::process::Stdio;

use nix::fcntl::{FcntlArg, OFlag, fcntl};
use tokio::io::{AsyncBufReadExt as _, BufReader, Lines};
use tokio::process::{Child, ChildStdout, Command};
use tracing::warn;

use super::proc::Proc;
use super::reaper::{Children, Guard};

/// Name of the subcommand.
pub const SUBCOMMAND: &str = "watchdog";
/// Size of a record, in bytes.
pub const RECORD: usize = 512;
/// Size of the pipe, in bytes; the kernel may take a larger page.
const PIPE: i32 = 4096;

/// What the watchdog did, or what became of it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Event {
    /// The deadline passed: this many processes were killed, and none is left.
    Killed(u32),
    /// The deadline passed, and this many processes can't be killed yet. It goes on trying.
    Left(u32),
    /// The watchdog itself ended. Nobody guards until [`Watchdog::restart`].
    Ended(String),
}

/// The watchdog as its manager has it. When this is dropped while it guards, the watchdog kills.
#[derive(Debug)]
pub struct Watchdog {
    children: Children,
    program: PathBuf,
    child: Child,
    input: PipeWriter,
    output: Lines<BufReader<ChildStdout>>,
    last: Option<[u8; RECORD]>,
    _guard: Guard,
}

impl Watchdog {
    /// Starts it: `program` is this program itself.
    ///
    /// # Errors
    /// As the operating system's.
    pub fn start(children: &Children, program: &Path) -> io::Result<Self> {
        let (reader, writer) = io::pipe()?;
        // Without it, a hung watchdog is noticed later: no reason not to have one.
        let _ = fcntl(writer.as_fd(), FcntlArg::F_SETPIPE_SZ(PIPE));
        // This end only; the other is the watchdog's own.
        fcntl(writer.as_fd(), FcntlArg::F_SETFL(OFlag::O_NONBLOCK))?;
        let mut command = Command::new(program);
        command
            .arg(SUBCOMMAND)
            .env_clear()
            .current_dir("/")
            .stdin(Stdio::from(OwnedFd::from(reader)))
            .stdout(Stdio::piped())
            .stderr(Stdio::inherit())
            // A signal meant for the manager's group must not reach it.
            .process_group(0);
        // Not killed on drop: the end of its input is what tells it that the manager is gone.
        let mut child = children.spawn(command)?;
        let guard = children.guard(&child);
        let output = child
            .stdout
            .take()
            .ok_or_else(|| io::Error::other("the watchdog has no output"))?;
        Ok(Self {
            children: children.clone(),
            program: program.to_owned(),
            input: writer,
            output: BufReader::new(output).lines(),
            child,
            last: None,
            _guard: guard,
        })
    }

    /// Its process number, while it runs.
    #[must_use]
    pub fn pid(&self) -> Option<u32> {
        self.child.id()
    }

    /// The postmaster may run as a primary until `deadline_ms` of the boot-time clock. Takes the place of whatever
    /// was said before.
    ///
    /// # Errors
    /// `WouldBlock` if the watchdog doesn't read (it hangs), another if it's gone. It can't be relied upon then:
    /// [`Watchdog::restart`].
    pub fn guard(&mut self, postmaster: Proc, deadline_ms: u64) -> io::Result<()> {
        let Proc { pid, started } = postmaster;
        let text = format!("serve {pid} {started} {deadline_ms}");
        let record = process::record(&text);
        self.last = Some(record);
        self.say(&record)
    }

    /// There is no primary any more.
    ///
    /// # Errors
    /// As [`Watchdog::guard`]; it may then kill at the deadline it knows.
    pub fn release(&mut self) -> io::Result<()> {
        self.last = None;
        self.say(&process::record("release"))
    }

    fn say(&self, record: &[u8; RECORD]) -> io::Result<()> {
        // A pipe takes so few bytes whole or not at all.
        match (&self.input).write(record) {
            Ok(RECORD) => Ok(()),
            Ok(_) => Err(io::Error::other("a record was torn")),
            Err(e) => Err(e),
        }
    }

    /// Ends this watchdog, which may hang, and starts another that is told what this one was told last.
    ///
    /// # Errors
    /// As [`Watchdog::start`] and [`Watchdog::guard`]. The old one is gone in any case; with its end nobody guards.
    pub fn restart(&mut self) -> io::Result<()> {
        // Before its input ends: that would make it kill what it guards.
        let killed = self.child.start_kill();
        let mut next = Self::start(&self.children, &self.program)?;
        next.last = self.last;
        if let Some(record) = next.last {
            next.say(&record)?;
        }
        // It has ended already, mostly; a zombie of it is reaped like any other.
        drop(killed);
        *self = next;
        Ok(())
    }

    /// Waits for the next thing to know. May be given up and called again.
    pub async fn event(&mut self) -> Event {
        while let Ok(Some(line)) = self.output.next_line().await {
            let number = |prefix: &str| line.strip_prefix(prefix)?.parse().ok();
            if let Some(n) = number("killed ") {
                self.last = None;
                return Event::Killed(n);
            }
            if let Some(n) = number("left ") {
                return Event::Left(n);
            }
            warn!(line, "the watchdog says something that it never should");
        }
        match self.child.wait().await {
            Ok(status) => Event::Ended(status.to_string()),
            Err(e) => Event::Ended(format!("it can't be waited for: {e}")),
        }
    }
}
