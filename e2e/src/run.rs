//! Running other programs, waiting for things, and saying what was done.
//!
//! Every failure names the command and carries what it said on its standard error. Never starts
//! anything that outlives the call: that is `daemon`'s.

use anyhow::{Context, Result, bail};
use std::ffi::OsStr;
use std::future::Future;
use std::path::Path;
use std::process::Stdio;
use std::time::{Duration, Instant};
use tokio::io::AsyncWriteExt;
use tokio::process::Command;

/// Runs a command to its end; its standard output is the answer.
///
/// # Errors
/// If it can't be started, or says by its exit code that it failed.
pub async fn run<S: AsRef<OsStr>>(words: &[S]) -> Result<String> {
    run_with(words, None).await
}

/// Like [`run`], with text on the command's standard input.
///
/// # Errors
/// As [`run`].
pub async fn run_with<S: AsRef<OsStr>>(words: &[S], input: Option<&str>) -> Result<String> {
    let line = show(words);
    let (program, rest) = words.split_first().context("an empty command")?;
    let mut child = Command::new(program)
        .args(rest)
        .stdin(if input.is_some() {
            Stdio::piped()
        } else {
            Stdio::null()
        })
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .kill_on_drop(true)
        .spawn()
        .with_context(|| format!("starting {line}"))?;
    if let (Some(text), Some(mut pipe)) = (input, child.stdin.take()) {
        // A command that fails early closes its end; its exit code says more than that.
        let _ = pipe.write_all(text.as_bytes()).await;
    }
    let output = child
        .wait_with_output()
        .await
        .with_context(|| format!("running {line}"))?;
    if !output.status.success() {
        bail!(
            "{line}: {}: {}",
            output.status,
            String::from_utf8_lossy(&output.stderr).trim()
        );
    }
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

/// Whether a command succeeds; what it says is nobody's business.
pub async fn succeeds<S: AsRef<OsStr>>(words: &[S]) -> bool {
    run(words).await.is_ok()
}

/// The command as one would type it.
#[must_use]
pub fn show<S: AsRef<OsStr>>(words: &[S]) -> String {
    words
        .iter()
        .map(|w| w.as_ref().to_string_lossy().into_owned())
        .collect::<Vec<_>>()
        .join(" ")
}

/// Splits a command written with spaces between its words.
#[must_use]
pub fn words(line: &str) -> Vec<String> {
    line.split_whitespace().map(str::to_owned).collect()
}

/// Runs a command written with spaces between its words.
///
/// # Errors
/// As [`run`].
pub async fn sh(line: &str) -> Result<String> {
    run(&words(line)).await
}

/// Runs a command that takes minutes: what it says goes to a log file, and every fifteen seconds a
/// line tells how far it is.
///
/// # Errors
/// If it can't be started or fails: with the name of the log file and its last lines.
pub async fn run_long(what: &str, command: &mut Command, log: &Path) -> Result<()> {
    if let Some(folder) = log.parent() {
        std::fs::create_dir_all(folder).with_context(|| format!("making {}", folder.display()))?;
    }
    let out = std::fs::File::create(log).with_context(|| format!("making {}", log.display()))?;
    let err = out.try_clone().context("a second handle of the log file")?;
    let mut child = command
        .stdin(Stdio::null())
        .stdout(out)
        .stderr(err)
        .kill_on_drop(true)
        .spawn()
        .with_context(|| format!("starting {:?}", command.as_std().get_program()))?;
    let start = Instant::now();
    let mut tick = tokio::time::interval(Duration::from_secs(15));
    tick.tick().await;
    loop {
        tokio::select! {
            status = child.wait() => {
                let status = status.with_context(|| format!("waiting for {what}"))?;
                anyhow::ensure!(status.success(), "{what}: {status}\n{}", crate::daemon::last_lines(log, 15));
                return Ok(());
            }
            _ = tick.tick() => {
                let text = std::fs::read(log).unwrap_or_default();
                let text = String::from_utf8_lossy(&text);
                let last = text.lines().rev().find(|l| !l.trim().is_empty()).unwrap_or("").trim();
                let last: String = last.chars().take(70).collect();
                let lines = text.lines().count();
                say("...", &format!("{what}: {} s, {lines} lines, {last}", start.elapsed().as_secs()), None);
            }
        }
    }
}

/// A failure that no waiting mends.
#[derive(Debug)]
pub struct Hopeless(pub String);

impl std::fmt::Display for Hopeless {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for Hopeless {}

/// Looks again and again, until something is there.
///
/// # Errors
/// If it isn't within `limit`: with what the last look said. At once, if a look says [`Hopeless`].
pub async fn until<T, F, Fut>(
    what: &str,
    limit: Duration,
    every: Duration,
    mut look: F,
) -> Result<T>
where
    F: FnMut() -> Fut,
    Fut: Future<Output = Result<T>>,
{
    let start = Instant::now();
    loop {
        match look().await {
            Ok(found) => return Ok(found),
            Err(e) if e.is::<Hopeless>() => return Err(e.context(what.to_owned())),
            Err(e) if start.elapsed() >= limit => {
                return Err(e.context(format!("{what}: not within {} s", limit.as_secs())));
            }
            Err(_) => tokio::time::sleep(every).await,
        }
    }
}

/// Does one step and says on standard output what it was and how long it took.
///
/// # Errors
/// Those of the step.
pub async fn step<T>(what: &str, work: impl Future<Output = Result<T>>) -> Result<T> {
    let start = Instant::now();
    let result = work.await;
    say(
        if result.is_ok() { "ok" } else { "FAIL" },
        what,
        Some(start.elapsed()),
    );
    result
}

/// One line of a report.
#[allow(clippy::print_stdout, reason = "the report is this program's output")]
pub fn say(mark: &str, what: &str, took: Option<Duration>) {
    match took {
        Some(t) => println!("{mark:<5} {what:<64} {:>6.1} s", t.as_secs_f64()),
        None => println!("{mark:<5} {what}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_failure_names_the_command_and_what_it_said() {
        let e = run(&["sh", "-c", "echo oh no >&2; exit 3"])
            .await
            .unwrap_err()
            .to_string();
        assert!(e.contains("sh -c") && e.contains("oh no"), "{e}");
        assert_eq!(run_with(&["cat"], Some("hello")).await.unwrap(), "hello");
    }

    #[tokio::test]
    async fn waiting_ends_with_the_last_reason() {
        let short = Duration::from_millis(5);
        let e = until::<(), _, _>("the moon", short, short, || async { bail!("clouds") })
            .await
            .unwrap_err();
        assert!(format!("{e:#}").contains("clouds"));
    }
}
