//! What one copy that got outside, or one failover, gave, and where it is kept: one JSON object a line, so that a bench
//! can go on where it stopped.

use std::io::Write;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use serde::{Deserialize, Serialize, de::DeserializeOwned};

/// The goals: found within so many seconds, stopped within as many more.
pub const GOAL: f64 = 5.0;

/// Where samples are kept, below the present folder.
pub const FOLDER: &str = "target/figures/residency.d";

/// Of one copy.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Sample {
    /// Seconds from the change until it was said, or refused.
    pub found: f64,
    /// Seconds from the change until nothing of it ran.
    pub fenced: f64,
    /// Which copy, or in which words it was refused.
    pub what: String,
    /// What must not be, in words.
    pub violations: Vec<String>,
}

impl Sample {
    /// Of what was found and fenced after so many seconds; each may take [`GOAL`].
    #[must_use]
    pub fn judged(found: f64, fenced: f64, what: String) -> Self {
        let mut violations = Vec::new();
        if found > GOAL {
            violations.push(format!("{what}: found after {found:.2} s"));
        }
        if fenced > found + GOAL {
            let late = fenced - found;
            violations.push(format!("{what}: stopped {late:.2} s after it was found"));
        }
        Self {
            found,
            fenced,
            what,
            violations,
        }
    }
}

/// Of one store whose primary was killed while labels were wrong.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Failover {
    /// From which all of its round follows.
    pub seed: u64,
    /// What was done to which nodes.
    pub spoilt: Vec<String>,
    /// The primary was killed before the operator had said anything.
    pub race: bool,
    /// A primary was permitted nowhere.
    pub nowhere: bool,
    /// Who was promoted, on which node.
    pub promoted: Vec<String>,
    /// Of these, on nodes where none may be.
    pub outside: Vec<String>,
    /// Seconds from the change until the store said so.
    pub said: Option<f64>,
    /// What must not be, in words.
    pub violations: Vec<String>,
}

fn file(folder: &Path, name: &str) -> PathBuf {
    folder.join(format!("{name}.jsonl"))
}

/// What was kept under a name; nothing if there is no file.
///
/// # Errors
/// If it can't be read.
pub fn kept<T: DeserializeOwned>(folder: &Path, name: &str) -> Result<Vec<T>> {
    let path = file(folder, name);
    let text = match std::fs::read_to_string(&path) {
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
        other => other.with_context(|| format!("reading {}", path.display()))?,
    };
    // Half a line is what an interrupted bench leaves; that run is done again.
    let lines = text.lines();
    Ok(lines.filter_map(|l| serde_json::from_str(l).ok()).collect())
}

/// Forgets what was kept under a name.
///
/// # Errors
/// If it can't be removed.
pub fn forget(folder: &Path, name: &str) -> Result<()> {
    let path = file(folder, name);
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
pub fn keep<T: Serialize>(folder: &Path, name: &str, sample: &T) -> Result<()> {
    let path = file(folder, name);
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
        assert!(kept::<Sample>(folder.path(), "x").unwrap().is_empty());
        let sample = Sample {
            found: 0.5,
            fenced: 2.5,
            ..Sample::default()
        };
        keep(folder.path(), "x", &sample).unwrap();
        let mut file = std::fs::OpenOptions::new()
            .append(true)
            .open(folder.path().join("x.jsonl"))
            .unwrap();
        file.write_all(b"{\"found\":").unwrap();
        assert_eq!(kept::<Sample>(folder.path(), "x").unwrap(), [sample]);
        forget(folder.path(), "x").unwrap();
        assert!(kept::<Sample>(folder.path(), "x").unwrap().is_empty());
    }
}
