//! The only clock of a worker: one that runs forward.
//!
//! Owns [`Moment`]. Never: tells the time of day, which may be set back or be an hour wrong. When a step is due and
//! when its lease ends in the ledger's eyes is the database's to say; this clock only measures how long something took.

use std::time::Duration;

use crate::instance::clock::boottime_ms;

/// Milliseconds since the machine started, those in which it was suspended included.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct Moment(pub u64);

impl Moment {
    /// Now.
    #[must_use]
    pub fn now() -> Self {
        Self(boottime_ms())
    }

    /// So much later.
    #[must_use]
    pub fn after(self, pause: Duration) -> Self {
        let ms = u64::try_from(pause.as_millis()).unwrap_or(u64::MAX);
        Self(self.0.saturating_add(ms))
    }

    /// How long from `earlier` until this; nothing if it isn't later.
    #[must_use]
    pub fn since(self, earlier: Self) -> Duration {
        Duration::from_millis(self.0.saturating_sub(earlier.0))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn differences_never_go_below_nothing() {
        let (a, b) = (Moment(5), Moment(7));
        assert_eq!(b.since(a), Duration::from_millis(2));
        assert_eq!(a.since(b), Duration::ZERO);
        assert_eq!(a.after(Duration::from_millis(2)), b);
        assert_eq!(b.after(Duration::MAX), Moment(u64::MAX));
    }

    fn files(dir: &std::path::Path, all: &mut Vec<std::path::PathBuf>) {
        for entry in std::fs::read_dir(dir).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                files(&path, all);
            } else {
                all.push(path);
            }
        }
    }

    /// A node whose clock is an hour wrong changes nothing: nobody here asks it what time it is.
    #[test]
    fn the_time_of_day_is_read_nowhere_in_the_worker() {
        let mut all = Vec::new();
        let root = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("src/rights/worker");
        files(&root, &mut all);
        assert!(all.len() > 10);
        // In two parts, or they would be found here.
        let words = [
            ("Timestamp", "::now"),
            ("Zoned", "::now"),
            ("System", "Time"),
            ("UNIX", "_EPOCH"),
            ("CLOCK_", "REALTIME"),
            ("now", "_v7"),
            ("Utc", "::now"),
        ]
        .map(|(a, b)| format!("{a}{b}"));
        for path in all {
            let text = std::fs::read_to_string(&path).unwrap();
            for word in &words {
                assert!(!text.contains(word), "{word} in {}", path.display());
            }
        }
    }
}
