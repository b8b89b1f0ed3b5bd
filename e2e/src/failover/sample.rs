//! What one run of one case gave, and where it is kept: one JSON object a line, so that a bench can go on where it
//! stopped.

use std::io::Write;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};

/// What one run gave.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Sample {
    /// The case.
    pub case: String,
    /// Milliseconds between regions, one way.
    pub latency: u64,
    /// Which run, from 1.
    pub run: usize,
    /// How it was done, if there are several ways.
    pub variant: String,
    /// The service's gap, in seconds.
    pub gap: f64,
    /// The single writer's own gap, in seconds.
    pub writer: f64,
    /// The longest commit of the service, in seconds.
    pub longest: f64,
    /// … and the longest in as long a time before the fault, if that was measured.
    pub usual: Option<f64>,
    /// Commits acknowledged, all clients together.
    pub commits: usize,
    /// Commits of which nothing is known.
    pub unknown: usize,
    /// Acknowledged, and gone.
    pub lost: usize,
    /// There more than once.
    pub duplicates: usize,
    /// Acknowledged by the old primary after the new one's first.
    pub dual: usize,
    /// Seconds for which the old primary still answered reads.
    pub stale: f64,
    /// Seconds from the fault's end until who was hurt is back.
    pub back: Option<f64>,
    /// Seconds from the fault's end to the service's next commit.
    pub again: Option<f64>,
    /// Promotions, by the timelines that acknowledged commits.
    pub failovers: usize,
    /// Acknowledged with a warning, by a client that cancels.
    pub cancelled: usize,
    /// Those of them that are gone.
    pub cancelled_lost: usize,
    /// What must not be, in words.
    pub violations: Vec<String>,
}

/// The file of a case at a latency.
fn file(folder: &Path, case: &str, latency: u64) -> PathBuf {
    folder.join(format!("{case}@{latency}ms.jsonl"))
}

/// What was kept of a case; nothing if there is no file.
///
/// # Errors
/// If it can't be read.
pub fn kept(folder: &Path, case: &str, latency: u64) -> Result<Vec<Sample>> {
    let path = file(folder, case, latency);
    let text = match std::fs::read_to_string(&path) {
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
        other => other.with_context(|| format!("reading {}", path.display()))?,
    };
    // Half a line is what an interrupted bench leaves; that run is done again.
    Ok(text
        .lines()
        .filter_map(|line| serde_json::from_str(line).ok())
        .collect())
}

/// Forgets what was kept of a case.
///
/// # Errors
/// If it can't be removed.
pub fn forget(folder: &Path, case: &str, latency: u64) -> Result<()> {
    let path = file(folder, case, latency);
    match std::fs::remove_file(&path) {
        Err(e) if e.kind() != std::io::ErrorKind::NotFound => {
            Err(e).with_context(|| format!("removing {}", path.display()))
        }
        _ => Ok(()),
    }
}

/// Keeps one more.
///
/// # Errors
/// If it can't be written.
pub fn keep(folder: &Path, sample: &Sample) -> Result<()> {
    let path = file(folder, &sample.case, sample.latency);
    std::fs::create_dir_all(folder).with_context(|| format!("making {}", folder.display()))?;
    let mut file = std::fs::OpenOptions::new()
        .create(true)
        .append(true)
        .open(&path)
        .with_context(|| format!("opening {}", path.display()))?;
    file.write_all((serde_json::to_string(sample)? + "\n").as_bytes())
        .with_context(|| format!("writing {}", path.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn samples_are_kept_and_half_a_line_is_not_one() {
        let folder = tempfile::tempdir().unwrap();
        assert!(kept(folder.path(), "x", 0).unwrap().is_empty());
        let sample = Sample {
            case: "x".into(),
            run: 1,
            gap: 0.5,
            back: Some(2.0),
            ..Sample::default()
        };
        keep(folder.path(), &sample).unwrap();
        let path = file(folder.path(), "x", 0);
        let half = std::fs::read_to_string(&path).unwrap() + "{\"case\":\"x";
        std::fs::write(&path, half).unwrap();
        assert_eq!(kept(folder.path(), "x", 0).unwrap(), [sample]);
        assert!(kept(folder.path(), "x", 40).unwrap().is_empty());
    }
}
