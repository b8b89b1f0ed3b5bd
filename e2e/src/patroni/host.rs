//! The processes of one host: started as its own, killed, stopped, asked.
//!
//! A host is a network namespace: what runs in it as `postgres` is the host's, and nothing else is ever signalled
//! (clients may run in it too, as somebody else).

use crate::daemon;
use crate::topology::Node;
use anyhow::{Context, Result, bail, ensure};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use std::fs;
use std::net::Ipv4Addr;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::time::{Duration, Instant};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

/// Who runs Patroni and PostgreSQL.
const USER: &str = "postgres";
/// How long processes may take to die or to stop.
const SETTLE: Duration = Duration::from_secs(10);
/// How long a member may take to answer.
const ANSWER: Duration = Duration::from_secs(2);

/// A command as a host runs it: as `postgres`, with shared memory of its own, so that hosts don't see each other's
/// segments and nothing of a killed PostgreSQL stays on the machine.
pub fn command(words: &[&str]) -> Vec<String> {
    let script = "mount -t tmpfs -o mode=1777 shm /dev/shm && \
        exec setpriv --reuid=postgres --regid=postgres --init-groups --reset-env -- \"$@\"";
    let wrapper = [
        "unshare", "--ipc", "--mount", "--", "sh", "-c", script, "host",
    ];
    wrapper
        .iter()
        .chain(words)
        .map(|w| (*w).to_owned())
        .collect()
}

/// The living processes of a host.
fn processes(node: &Node) -> Result<Vec<i32>> {
    let path = format!("/run/netns/{}", node.netns());
    let own = fs::metadata(&path)
        .with_context(|| format!("looking at {path}"))?
        .ino();
    let user = nix::unistd::User::from_name(USER)
        .context("reading the users")?
        .with_context(|| format!("there is no user {USER}"))?;
    let entries = fs::read_dir("/proc").context("reading /proc")?;
    Ok(entries
        .flatten()
        .filter_map(|e| e.file_name().to_str()?.parse().ok())
        .filter(|pid| {
            // A process that ends meanwhile is none of ours any more.
            fs::metadata(format!("/proc/{pid}")).is_ok_and(|m| m.uid() == user.uid.as_raw())
                && fs::metadata(format!("/proc/{pid}/ns/net")).is_ok_and(|m| m.ino() == own)
                && daemon::started(*pid).is_some()
        })
        .collect())
}

/// Kills the postmaster and nothing else.
///
/// # Errors
/// If there is none.
pub fn kill_postmaster(node: &Node, data: &Path) -> Result<()> {
    let path = data.join("postmaster.pid");
    let text = fs::read_to_string(&path).with_context(|| format!("reading {}", path.display()))?;
    let pid: i32 = text
        .lines()
        .next()
        .and_then(|l| l.trim().parse().ok())
        .with_context(|| format!("{} names no process", path.display()))?;
    ensure!(
        processes(node)?.contains(&pid),
        "the postmaster {pid} doesn't run on {}",
        node.name
    );
    kill(Pid::from_raw(pid), Signal::SIGKILL).context("killing the postmaster")
}

/// Kills every process of a host. Comes back once none is left.
///
/// # Errors
/// If one doesn't die.
pub async fn kill_all(node: &Node) -> Result<()> {
    let start = Instant::now();
    loop {
        // One may have been forked since the last look.
        let pids = processes(node)?;
        if pids.is_empty() {
            return Ok(());
        }
        ensure!(
            start.elapsed() < SETTLE,
            "{} still runs {pids:?}",
            node.name
        );
        for pid in pids {
            let _ = kill(Pid::from_raw(pid), Signal::SIGKILL);
        }
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
}

/// Stops every process of a host where it stands. Comes back once all have stopped.
///
/// # Errors
/// If one doesn't stop.
pub async fn freeze(node: &Node) -> Result<()> {
    let start = Instant::now();
    loop {
        let moving: Vec<i32> = processes(node)?
            .into_iter()
            .filter(|p| !is_stopped(*p))
            .collect();
        if moving.is_empty() {
            return Ok(());
        }
        ensure!(
            start.elapsed() < SETTLE,
            "{} doesn't stop {moving:?}",
            node.name
        );
        for pid in moving {
            let _ = kill(Pid::from_raw(pid), Signal::SIGSTOP);
        }
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
}

/// Lets the processes of a host go on.
///
/// # Errors
/// If one can't look.
pub fn thaw(node: &Node) -> Result<()> {
    for pid in processes(node)? {
        let _ = kill(Pid::from_raw(pid), Signal::SIGCONT);
    }
    Ok(())
}

fn is_stopped(pid: i32) -> bool {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    stat.rsplit(") ")
        .next()
        .is_some_and(|rest| rest.starts_with('T'))
}

/// What a host answers to a plain HTTP request.
///
/// # Errors
/// If it doesn't answer in time, or with a failure.
pub async fn get(address: Ipv4Addr, port: u16, path: &str) -> Result<String> {
    let answer = tokio::time::timeout(ANSWER, async {
        let mut stream = TcpStream::connect((address, port)).await?;
        let request = format!("GET {path} HTTP/1.0\r\nHost: {address}\r\n\r\n");
        stream.write_all(request.as_bytes()).await?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer).await?;
        Ok::<_, std::io::Error>(answer)
    })
    .await
    .with_context(|| format!("{address}:{port} doesn't answer"))?
    .with_context(|| format!("asking {address}:{port}"))?;
    match answer.split_once("\r\n\r\n") {
        Some((head, body)) if head.split(' ').nth(1) == Some("200") => Ok(body.to_owned()),
        _ => bail!(
            "{address}:{port}{path} says {}",
            answer.lines().next().unwrap_or("nothing")
        ),
    }
}
