//! PostgreSQL's programs in an arbitrary image: where they are, and how they are started.
//!
//! Owns the search, the version, and the environment of every child. Never: passes a secret in an argument
//! or a variable, and never lets a child outlive its deadline.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use tokio::process::Command;

use super::reaper::Children;

/// Supported major versions.
pub const SUPPORTED: std::ops::RangeInclusive<u32> = 15..=18;

/// PostgreSQL's programs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Programs {
    /// Where they are.
    pub dir: PathBuf,
    /// Major version.
    pub major: u32,
    /// Version in full, such as "17.6".
    pub version: String,
}

/// Finds the programs: those of `wanted`'s major version if there are several, else of the newest.
///
/// # Errors
/// In words, if there are none that are supported.
pub async fn find(
    given: Option<&Path>,
    wanted: Option<u32>,
    children: &Children,
) -> Result<Programs, String> {
    let mut found = Vec::new();
    let mut unsupported = None;
    for dir in candidates(given) {
        if !dir.join("postgres").is_file() || !dir.join("initdb").is_file() {
            continue;
        }
        let mut command = command(&dir, "postgres");
        command.arg("--version");
        let Ok(text) = output(command, Duration::from_secs(20), children).await else {
            continue;
        };
        match parse_version(&text) {
            Some((major, version)) if SUPPORTED.contains(&major) => found.push(Programs {
                dir,
                major,
                version,
            }),
            Some((_, version)) => unsupported = Some(version),
            None => {}
        }
    }
    found.sort_by_key(|p| (Some(p.major) == wanted, p.major));
    found.pop().ok_or_else(|| match unsupported {
        Some(version) => format!(
            "the image has PostgreSQL {version}, but only 15 to 18 are supported: set postgres.image to one of \
             these"
        ),
        None => "the image has no PostgreSQL server (postgres and initdb were looked for in \
                 /usr/lib/postgresql/*/bin, /usr/pgsql-*/bin, /usr/local/bin and PATH): set postgres.image to \
                 one that has"
            .to_owned(),
    })
}

fn candidates(given: Option<&Path>) -> Vec<PathBuf> {
    if let Some(dir) = given {
        return vec![dir.to_owned()];
    }
    let mut dirs = Vec::new();
    for major in SUPPORTED {
        dirs.push(PathBuf::from(format!("/usr/lib/postgresql/{major}/bin")));
        dirs.push(PathBuf::from(format!("/usr/pgsql-{major}/bin")));
    }
    dirs.push("/usr/local/bin".into());
    if let Some(path) = std::env::var_os("PATH") {
        dirs.extend(std::env::split_paths(&path));
    }
    let mut seen = std::collections::BTreeSet::new();
    dirs.retain(|d| seen.insert(d.clone()));
    dirs
}

/// `postgres (PostgreSQL) 15.18 (Debian …)` → (15, "15.18"). Also `17beta1`, as (17, "17beta1").
fn parse_version(text: &str) -> Option<(u32, String)> {
    let version = text
        .split_once("(PostgreSQL) ")?
        .1
        .split_whitespace()
        .next()?;
    let digits: String = version.chars().take_while(char::is_ascii_digit).collect();
    Some((digits.parse().ok()?, version.chars().take(32).collect()))
}

/// A command of the image, with nothing inherited that would change what PostgreSQL does.
#[must_use]
pub fn command(dir: &Path, program: &str) -> Command {
    let mut command = Command::new(dir.join(program));
    for (name, _) in std::env::vars_os() {
        let text = name.to_string_lossy();
        if [
            "PG",
            "POSTGRES",
            "DOMICILE_",
            "KUBERNETES_",
            "LC_",
            "KUBECONFIG",
        ]
        .iter()
        .any(|p| text.starts_with(p))
        {
            command.env_remove(&name);
        }
    }
    // Messages are read by `logs` and `jobs`: no translations.
    command
        .env("LC_ALL", "C")
        .env("TZ", "UTC")
        // The manager's own directory may be closed to PostgreSQL's user where it is started by hand.
        .current_dir("/")
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        // A signal meant for one must not reach the other.
        .process_group(0)
        .kill_on_drop(true);
    command
}

/// Runs a short command to its end and returns its standard output.
///
/// # Errors
/// In words, with what it last said, if it fails or takes too long.
pub async fn output(
    command: Command,
    limit: Duration,
    children: &Children,
) -> Result<String, String> {
    let out = run(command, limit, children).await?;
    if out.status.success() {
        return Ok(String::from_utf8_lossy(&out.stdout).into_owned());
    }
    let text = String::from_utf8_lossy(&out.stderr);
    let last = text
        .lines()
        .rfind(|l| !l.trim().is_empty())
        .unwrap_or("")
        .chars()
        .take(300)
        .collect::<String>();
    Err(format!("ended with {}: {last}", out.status))
}

/// Runs a short command to its end, however it ends, and returns its standard output and its standard error.
///
/// # Errors
/// In words, if it can't be run or takes too long.
pub async fn said(
    command: Command,
    limit: Duration,
    children: &Children,
) -> Result<(String, String), String> {
    let out = run(command, limit, children).await?;
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    Ok((text(&out.stdout), text(&out.stderr)))
}

async fn run(
    command: Command,
    limit: Duration,
    children: &Children,
) -> Result<std::process::Output, String> {
    let run = async {
        let child = children
            .spawn(command)
            .map_err(|e| format!("can't be started: {e}"))?;
        let _guard = children.guard(&child);
        let out = child.wait_with_output().await;
        out.map_err(|e| format!("can't be waited for: {e}"))
    };
    tokio::time::timeout(limit, run)
        .await
        .map_err(|_| format!("took longer than {} s", limit.as_secs()))?
}

/// The values of `pg_controldata` that a standby has to honour, by its names for them.
pub async fn control_settings(
    programs: &Programs,
    data: &Path,
    children: &Children,
) -> Result<BTreeMap<String, u64>, String> {
    let mut command = command(&programs.dir, "pg_controldata");
    command.arg("-D").arg(data);
    let text = output(command, Duration::from_secs(20), children).await?;
    Ok(parse_control_settings(&text))
}

fn parse_control_settings(text: &str) -> BTreeMap<String, u64> {
    text.lines()
        .filter_map(|line| {
            let (name, value) = line.split_once(" setting:")?;
            Some((name.trim().to_owned(), value.trim().parse().ok()?))
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions() {
        let v = |s| parse_version(s);
        assert_eq!(
            v("postgres (PostgreSQL) 15.18 (Debian 15.18-0+deb12u1)\n"),
            Some((15, "15.18".into()))
        );
        assert_eq!(
            v("postgres (PostgreSQL) 17beta1"),
            Some((17, "17beta1".into()))
        );
        assert_eq!(v("something else"), None);
    }

    #[test]
    fn control_data() {
        let text = "wal_level setting:                    replica\n\
                    max_connections setting:              100\n\
                    max_prepared_xacts setting:           0\nData page checksum version: 1\n";
        let got = parse_control_settings(text);
        assert_eq!(got.get("max_connections"), Some(&100));
        assert_eq!(got.len(), 2);
    }
}
