//! The client program, started in a network namespace, and what it has seen so far.
//!
//! Owns the process and the collected events. Ends the process by closing its input, and for certain when it is
//! dropped.

use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::process::{Child, ChildStdin, Command};
use tokio::sync::watch;
use tokio::task::JoinHandle;

use super::client::Spec;
use super::event::Event;

/// How long the program may take to end once it is told to.
const GOODBYE: Duration = Duration::from_secs(10);

/// A client program that runs.
#[derive(Debug)]
pub struct Process {
    child: Child,
    input: Option<ChildStdin>,
    events: watch::Receiver<Arc<Vec<Event>>>,
    reader: JoinHandle<Result<()>>,
}

/// The file of a namespace made by `ip netns`.
#[must_use]
pub fn named(netns: &str) -> PathBuf {
    Path::new("/run/netns").join(netns)
}

/// The file of a process's network namespace.
#[must_use]
pub fn of_process(pid: i32) -> PathBuf {
    PathBuf::from(format!("/proc/{pid}/ns/net"))
}

impl Process {
    /// Starts `program client` (the bin `bench`) in a network namespace, or where we are.
    ///
    /// # Errors
    /// If it can't be started.
    pub async fn start(program: &Path, netns: Option<&Path>, spec: &Spec) -> Result<Self> {
        let mut command = match netns {
            Some(netns) => {
                let mut command = Command::new("nsenter");
                command
                    .arg(format!("--net={}", netns.display()))
                    .arg(program);
                command
            }
            None => Command::new(program),
        };
        let mut child = command
            .arg("client")
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .kill_on_drop(true)
            .spawn()
            .with_context(|| format!("starting {} client", program.display()))?;
        let mut input = child.stdin.take().context("no standard input")?;
        // In the input and not in an argument: it holds a password.
        input
            .write_all((serde_json::to_string(spec)? + "\n").as_bytes())
            .await
            .context("telling the client what to do")?;
        input
            .flush()
            .await
            .context("telling the client what to do")?;
        let output = child.stdout.take().context("no standard output")?;
        let (sender, events) = watch::channel(Arc::new(Vec::new()));
        let reader = tokio::spawn(async move {
            let mut lines = BufReader::new(output).lines();
            while let Some(line) = lines.next_line().await.context("reading an event")? {
                let event: Event =
                    serde_json::from_str(&line).with_context(|| format!("not an event: {line}"))?;
                sender.send_modify(|all| Arc::make_mut(all).push(event));
            }
            Ok(())
        });
        Ok(Self {
            child,
            input: Some(input),
            events,
            reader,
        })
    }

    /// What it has seen so far.
    #[must_use]
    pub fn so_far(&self) -> Arc<Vec<Event>> {
        self.events.borrow().clone()
    }

    /// Waits until what it has seen is as wanted.
    ///
    /// # Errors
    /// If that doesn't come about in time, or the program ends before.
    pub async fn until(
        &mut self,
        what: &str,
        limit: Duration,
        mut wanted: impl FnMut(&[Event]) -> bool,
    ) -> Result<()> {
        tokio::time::timeout(limit, self.events.wait_for(|all| wanted(all)))
            .await
            .with_context(|| format!("{what}: not within {} s", limit.as_secs()))?
            .with_context(|| format!("{what}: the client has ended"))?;
        Ok(())
    }

    /// Ends it; all that it has seen is the answer.
    ///
    /// # Errors
    /// If it failed, or doesn't end.
    pub async fn finish(mut self) -> Result<Vec<Event>> {
        drop(self.input.take());
        let status = tokio::time::timeout(GOODBYE, self.child.wait())
            .await
            .context("the client doesn't end")?
            .context("waiting for the client")?;
        if !status.success() {
            let mut said = String::new();
            if let Some(mut errors) = self.child.stderr.take() {
                let _ = errors.read_to_string(&mut said).await;
            }
            anyhow::bail!("the client: {status}: {}", said.trim());
        }
        (&mut self.reader).await.context("the client's events")??;
        let all = self.so_far();
        ensure!(
            matches!(all.last(), Some(Event::End { .. })),
            "the client's last event isn't its end: what it saw isn't whole"
        );
        Ok(Arc::unwrap_or_clone(all))
    }
}
