//! The long pieces of work: making a database cluster, copying one, trying parameters.
//!
//! Owns how PostgreSQL's tools are called. Each works in `data.new/` and finishes by a rename, so that a crash
//! anywhere leaves a leftover and never half a database cluster; each ends by itself if it makes no progress.
//! Never: decides whether it may (that is `plan`), and never touches PGDATA except where `replace` says so.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::Duration;

use nix::sys::signal::{Signal, killpg};
use nix::unistd::Pid;
use tokio::io::{AsyncBufReadExt as _, AsyncReadExt as _, BufReader};
use tokio::process::Command;
use tracing::info;

use super::conninfo::{self, Downstream, Upstream};
use super::plan::Content;
use super::programs::{self, Programs};
use super::reaper::Children;
use super::{settings, tls, volume};

/// What the jobs share.
#[derive(Clone, Debug)]
pub struct Tools {
    /// PostgreSQL's programs.
    pub programs: Programs,
    /// The volume.
    pub root: PathBuf,
    /// Sockets, keys and configuration.
    pub run: PathBuf,
    /// The manager's children.
    pub children: Children,
}

/// Makes a new database cluster.
///
/// # Errors
/// In words.
pub async fn initdb(tools: &Tools) -> Result<(), String> {
    let fresh = tools.root.join("data.new");
    let mut result = Err("no locale was tried".to_owned());
    for locale in locales(tools.programs.major) {
        clear(&tools.root).await?;
        let mut command = programs::command(&tools.programs.dir, "initdb");
        command
            .arg("-D")
            .arg(&fresh)
            .args(["--data-checksums", "--encoding=UTF8", "--username=postgres"])
            .args(["--auth-local=peer", "--auth-host=scram-sha-256"])
            .args(locale.iter());
        // initdb writes some tens of megabytes; on the slowest disk that isn't ten minutes.
        result = supervise(command, "initdb", tools, None, Duration::from_secs(600)).await;
        if result.is_ok() {
            break;
        }
    }
    result?;
    if !matches!(volume::content(&fresh), Content::Cluster(_)) {
        return Err("initdb left no database cluster behind".to_owned());
    }
    volume::finish(&tools.root).map_err(|e| format!("can't finish the new database cluster: {e}"))
}

/// Which locales are tried. PostgreSQL's own C.UTF-8 first, where there is one: it sorts the same in every
/// image, while another C library's can sort differently and break indexes. Some images know only C.
fn locales(major: u32) -> Vec<Vec<&'static str>> {
    let mut all = vec![vec!["--locale=C.UTF-8"], vec!["--locale=C"]];
    if major >= 17 {
        all.insert(
            0,
            vec![
                "--locale-provider=builtin",
                "--builtin-locale=C.UTF-8",
                "--locale=C",
            ],
        );
    }
    all
}

/// What a clone needs to know.
#[derive(Clone, Debug)]
pub struct CloneFrom {
    /// The primary.
    pub upstream: Upstream,
    /// Its system identifier.
    pub system_identifier: String,
    /// This instance.
    pub instance: String,
    /// Seconds of silence after which the primary counts as dead.
    pub timeout_seconds: u32,
    /// Whether a present copy is replaced.
    pub replace: bool,
    /// How long it may make no progress.
    pub stall: Duration,
}

/// Copies the primary.
///
/// # Errors
/// In words.
pub async fn clone(
    tools: &Tools,
    from: &CloneFrom,
    certificate: &tls::Certificate,
) -> Result<(), String> {
    clear(&tools.root).await?;
    if from.replace {
        make_room(&tools.root).await?;
    }
    let fresh = tools.root.join("data.new");
    certificate
        .install_client(&tools.run)
        .map_err(|e| format!("can't write the client's certificate: {e}"))?;
    let dir = tls::client_dir(&tools.run);
    let conninfo = conninfo::render(
        &from.upstream,
        &Downstream {
            // Not the instance's own name: what a copy has received is no durable commit, and must never be
            // counted as this instance's acknowledgement.
            application_name: format!("{}/clone", from.instance),
            ca: dir.join("ca.crt"),
            cert: dir.join("tls.crt"),
            key: dir.join("tls.key"),
            timeout_seconds: from.timeout_seconds,
            direct_tls: tools.programs.major >= conninfo::DIRECT_TLS_SINCE,
        },
    );
    let mut command = programs::command(&tools.programs.dir, "pg_basebackup");
    command
        .arg("-D")
        .arg(&fresh)
        .arg("-d")
        .arg(&conninfo)
        .args(["--format=plain", "--wal-method=stream", "--checkpoint=fast"])
        .arg(format!("--slot={}", settings::slot(&from.instance)))
        .args(["--no-password", "--verbose"]);
    let result = supervise(
        command,
        "pg_basebackup",
        tools,
        Some(from.stall),
        Duration::MAX,
    )
    .await;
    // The next process with this key is to be one that the manager allows.
    let _ = tls::remove_client_key(&tools.run);
    result?;
    match volume::content(&fresh) {
        Content::Cluster(c) if c.system_identifier == from.system_identifier => {}
        Content::Cluster(c) => {
            return Err(format!(
                "the primary sent another database cluster ({}) than the store's ({})",
                c.system_identifier, from.system_identifier
            ));
        }
        _ => return Err("pg_basebackup left no database cluster behind".to_owned()),
    }
    super::files::replace_durably(&fresh.join("standby.signal"), b"", 0o600)
        .map_err(|e| format!("can't write standby.signal: {e}"))?;
    let root = tools.root.clone();
    let finish = move || {
        volume::finish(&root)?;
        // The old copy, if there was one.
        volume::clear_leftover(&root)
    };
    blocking(finish)
        .await
        .map_err(|e| format!("can't finish the copy: {e}"))
}

/// Keeps the present copy until the new one is whole, if it is one and both fit; else removes it now.
async fn make_room(root: &Path) -> Result<(), String> {
    let root = root.to_owned();
    blocking(move || {
        let data = root.join("data");
        let needed = volume::bytes_of(&data);
        let s = nix::sys::statvfs::statvfs(&root)?;
        let free = s.blocks_available() * s.fragment_size();
        // The size of remains says nothing of how much is needed, and nobody can use them.
        let remains = matches!(volume::content(&data), Content::Remains(_));
        if remains || free < needed + needed / 5 {
            info!(
                free,
                needed, remains, "no room for two copies: the old one is removed first"
            );
            volume::aside(&root)?;
            volume::clear_leftover(&root)?;
        }
        Ok(())
    })
    .await
    .map_err(|e| format!("can't make room for a new copy: {e}"))
}

/// Removes what lies unfinished beside PGDATA.
///
/// # Errors
/// In words.
pub async fn clear(root: &Path) -> Result<(), String> {
    let root = root.to_owned();
    blocking(move || volume::clear_leftover(&root))
        .await
        .map_err(|e| format!("can't remove data.new on the volume: {e}"))
}

async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> std::io::Result<T> + Send + 'static,
) -> std::io::Result<T> {
    tokio::task::spawn_blocking(work)
        .await
        .map_err(std::io::Error::other)?
}

/// The user's parameters after they were tried.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Tried {
    /// As the user gave them.
    pub asked: BTreeMap<String, String>,
    /// Those that work.
    pub good: BTreeMap<String, String>,
    /// Names of those that are Domicile's.
    pub reserved: Vec<String>,
    /// Names of those that PostgreSQL refuses.
    pub refused: Vec<String>,
}

/// Tries the user's parameters: all at once, and, if PostgreSQL refuses that, one after the other, so that
/// one mistake costs one parameter and never a running store.
pub async fn try_parameters(tools: &Tools, asked: BTreeMap<String, String>) -> Tried {
    let (kept, reserved) = settings::split(&asked);
    let mut tried = Tried {
        asked,
        reserved,
        ..Tried::default()
    };
    if kept.is_empty() || accepts(tools, &kept).await {
        tried.good = kept;
        return tried;
    }
    for (name, value) in kept {
        let one = BTreeMap::from([(name.clone(), value.clone())]);
        if accepts(tools, &one).await {
            tried.good.insert(name, value);
        } else {
            tried.refused.push(name);
        }
    }
    // Each alone is good, but not all together.
    if tried.refused.is_empty() || !accepts(tools, &tried.good).await {
        tried
            .refused
            .extend(std::mem::take(&mut tried.good).into_keys());
    }
    tried
}

/// Whether PostgreSQL understands these parameters: `-C` reads a configuration file as a start would, and
/// ends. It needs a directory that looks like one with data, and doesn't touch it.
async fn accepts(tools: &Tools, parameters: &BTreeMap<String, String>) -> bool {
    let run = || -> std::io::Result<Command> {
        let dir = tools.run.join("trial");
        tls::make_private(&dir)?;
        let text: String = parameters
            .iter()
            .map(|(k, v)| format!("{k} = {}\n", settings::quote(v)))
            .collect();
        super::files::replace(&dir.join("postgresql.conf"), text.as_bytes(), 0o600)?;
        super::files::replace(
            &dir.join("PG_VERSION"),
            format!("{}\n", tools.programs.major).as_bytes(),
            0o600,
        )?;
        let mut command = programs::command(&tools.programs.dir, "postgres");
        command.arg("-D").arg(&dir).args(["-C", "port"]);
        Ok(command)
    };
    match run() {
        Ok(command) => programs::output(command, Duration::from_secs(20), &tools.children)
            .await
            .is_ok(),
        Err(_) => false,
    }
}

/// Ends a whole process group when dropped: initdb and pg_basebackup have children of their own.
struct Group(Option<u32>);

impl Drop for Group {
    fn drop(&mut self) {
        if let Some(pid) = self.0.take().and_then(|p| i32::try_from(p).ok()) {
            let _ = killpg(Pid::from_raw(pid), Signal::SIGKILL);
        }
    }
}

/// Runs a tool to its end, its words into the log. With `stall`, it's ended when the volume's free space
/// hasn't changed for that long.
async fn supervise(
    command: Command,
    name: &'static str,
    tools: &Tools,
    stall: Option<Duration>,
    limit: Duration,
) -> Result<(), String> {
    let mut child = tools
        .children
        .spawn(command)
        .map_err(|e| format!("{name} can't be started: {e}"))?;
    let _guard = tools.children.guard(&child);
    let mut group = Group(child.id());
    let (out, err) = (child.stdout.take(), child.stderr.take());
    if let Some(out) = out {
        // Read, so that it can't block; what it says there is of no use.
        tokio::spawn(async move {
            let _ = tokio::io::copy(&mut BufReader::new(out), &mut tokio::io::sink()).await;
        });
    }
    let words = tokio::spawn(async move {
        let mut last = String::new();
        let Some(err) = err else { return last };
        // A tool says a few lines; more than this is dropped with the pipe's end.
        let mut lines = BufReader::new(err.take(1 << 20)).lines();
        while let Ok(Some(line)) = lines.next_line().await {
            let line: String = line.trim().chars().take(300).collect();
            if line.is_empty() {
                continue;
            }
            info!(target: "postgres", tool = name, "{line}");
            // What is worth repeating: the first error, or else the last line.
            if !last.contains("error:") {
                last = line;
            }
        }
        last
    });
    let ended = tokio::select! {
        status = child.wait() => status.map_err(|e| format!("{name} can't be waited for: {e}")),
        () = stalled(&tools.root, stall) => Err(format!("{name} made no progress and was ended")),
        () = tokio::time::sleep(limit.min(Duration::from_secs(86_400 * 365))) => {
            Err(format!("{name} took too long and was ended"))
        }
    };
    let status = ended?;
    group.0 = None;
    let last = tokio::time::timeout(Duration::from_secs(2), words)
        .await
        .ok()
        .and_then(Result::ok)
        .unwrap_or_default();
    if status.success() {
        Ok(())
    } else {
        Err(format!("{name} failed: {last}"))
    }
}

/// Returns when the volume's free space hasn't changed for `limit`.
async fn stalled(root: &Path, limit: Option<Duration>) {
    let Some(limit) = limit else {
        return std::future::pending().await;
    };
    let free = || {
        nix::sys::statvfs::statvfs(root)
            .map(|s| s.blocks_available())
            .ok()
    };
    let mut before = free();
    let mut since = tokio::time::Instant::now();
    loop {
        tokio::time::sleep(limit / 20).await;
        let now = free();
        if now != before {
            before = now;
            since = tokio::time::Instant::now();
        } else if since.elapsed() >= limit {
            return;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_builtin_locale_where_there_is_one() {
        assert_eq!(locales(16)[0], ["--locale=C.UTF-8"]);
        assert_eq!(locales(17)[0][0], "--locale-provider=builtin");
        assert_eq!(locales(18).last().unwrap(), &["--locale=C"]);
    }
}
