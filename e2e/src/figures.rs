//! Figures of benches: a table for people, and `target/figures/NAME.json` for programs.
//!
//! Owns the form: an array of `{name, unit, runs, min, p50, p95, max}`. Never drops a run: a failed run fails
//! the bench.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use serde::{Deserialize, Serialize};

/// One row.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Figure {
    /// What was measured.
    pub name: String,
    /// In which unit.
    pub unit: String,
    /// How often.
    pub runs: usize,
    /// The smallest.
    pub min: f64,
    /// Half of the runs were at most this.
    pub p50: f64,
    /// 95 of 100 runs were at most this (with fewer than 20 runs: the largest).
    pub p95: f64,
    /// The largest.
    pub max: f64,
}

impl Figure {
    /// The figure of these samples.
    ///
    /// # Errors
    /// If there are none.
    pub fn new(name: &str, unit: &str, samples: &[f64]) -> Result<Self> {
        let at = |hundredths| hundredth(samples, hundredths).with_context(|| name.to_owned());
        Ok(Self {
            name: name.to_owned(),
            unit: unit.to_owned(),
            runs: samples.len(),
            min: at(0)?,
            p50: at(50)?,
            p95: at(95)?,
            max: at(100)?,
        })
    }
}

/// What so many of a hundred samples were at most; with 0 the smallest, with too few samples the largest.
///
/// # Errors
/// If there are none.
pub fn hundredth(samples: &[f64], hundredths: usize) -> Result<f64> {
    ensure!(!samples.is_empty(), "nothing was measured");
    let mut sorted = samples.to_vec();
    sorted.sort_by(f64::total_cmp);
    let place = (sorted.len() * hundredths).div_ceil(100);
    Ok(sorted[place.clamp(1, sorted.len()) - 1])
}

/// Writes rows into a file beside those that others have written there, and shows all.
///
/// # Errors
/// If the file can't be read or written.
pub fn merge(path: &Path, rows: &[Figure]) -> Result<()> {
    let mut all: Vec<Figure> = match std::fs::read(path) {
        Ok(text) => {
            serde_json::from_slice(&text).with_context(|| format!("reading {}", path.display()))?
        }
        Err(_) => Vec::new(),
    };
    all.retain(|f| rows.iter().all(|row| f.name != row.name));
    all.extend_from_slice(rows);
    print!("{}", table(&all));
    if let Some(folder) = path.parent() {
        std::fs::create_dir_all(folder).with_context(|| format!("making {}", folder.display()))?;
    }
    std::fs::write(path, serde_json::to_string_pretty(&all)? + "\n")
        .with_context(|| format!("writing {}", path.display()))
}

/// The rows as a table.
#[must_use]
pub fn table(figures: &[Figure]) -> String {
    let mut out = format!(
        "{:<32} {:>6} {:>5} {:>9} {:>9} {:>9} {:>9}\n",
        "", "unit", "runs", "min", "p50", "p95", "max"
    );
    // Seconds are mostly parts of one, and rates mostly thousands.
    let number = |n: f64| match n.abs() {
        n if n >= 100.0 => format!("{n:.1}"),
        n => format!("{n:.4}"),
    };
    for f in figures {
        let [min, p50, p95, max] = [f.min, f.p50, f.p95, f.max].map(number);
        out += &format!(
            "{:<32} {:>6} {:>5} {min:>9} {p50:>9} {p95:>9} {max:>9}\n",
            f.name, f.unit, f.runs
        );
    }
    out
}

/// Prints the table and writes `target/figures/NAME.json` below the present folder.
///
/// # Errors
/// If the file can't be written.
pub fn publish(name: &str, figures: &[Figure]) -> Result<PathBuf> {
    print!("{}", table(figures));
    let path = Path::new("target/figures").join(format!("{name}.json"));
    std::fs::create_dir_all("target/figures").context("making target/figures")?;
    std::fs::write(&path, serde_json::to_string_pretty(figures)? + "\n")
        .with_context(|| format!("writing {}", path.display()))?;
    println!("written to {}", path.display());
    Ok(path)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn percentiles_are_samples() {
        let samples: Vec<f64> = (1..=20).rev().map(f64::from).collect();
        let figure = Figure::new("x", "s", &samples).unwrap();
        assert_eq!(
            (figure.min, figure.p50, figure.p95, figure.max),
            (1.0, 10.0, 19.0, 20.0)
        );
        let one = Figure::new("x", "s", &[3.0]).unwrap();
        assert_eq!((one.min, one.p50, one.p95, one.max), (3.0, 3.0, 3.0, 3.0));
        assert!(Figure::new("x", "s", &[]).is_err());
    }
}
