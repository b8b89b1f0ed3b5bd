//! What clients saw: one event each, with its time.
//!
//! Owns the form in which clients tell it, and the clock. Never judges.

use anyhow::{Context, Result};
use nix::time::{ClockId, clock_gettime};
use serde::{Deserialize, Serialize};

/// Nanoseconds of the machine's monotonic clock, which is the same in every process and network namespace.
///
/// # Errors
/// If there is no such clock.
pub fn now() -> Result<u64> {
    let time = clock_gettime(ClockId::CLOCK_MONOTONIC).context("reading the monotonic clock")?;
    let seconds = u64::try_from(time.tv_sec()).context("a time before the machine's start")?;
    let nanoseconds = u64::try_from(time.tv_nsec()).context("a time before the machine's start")?;
    Ok(seconds * 1_000_000_000 + nanoseconds)
}

/// Seconds between two times of [`now`]; zero if they are in the wrong order.
#[must_use]
pub fn seconds(from: u64, to: u64) -> f64 {
    // Exact up to a hundred days of nanoseconds.
    to.saturating_sub(from) as f64 / 1e9
}

/// Which client it was.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Who {
    /// The application: one session, one row after the other.
    Writer,
    /// A fresh session to one host.
    Probe,
    /// A session to one server from inside its own pod.
    Inside,
    /// As `Inside`, but cancels what waits.
    Cancelling,
}

/// A row that a client sent.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Row {
    /// Which client.
    pub who: Who,
    /// The first half of the row's key.
    pub writer: String,
    /// The other half.
    pub seq: u64,
    /// When it was sent.
    pub sent: u64,
    /// When the answer came, or the client gave up.
    pub at: u64,
    /// To which host.
    pub host: String,
    /// The timeline of the server it was sent to.
    pub timeline: u32,
}

/// Something that a client saw.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "event", rename_all = "lowercase")]
pub enum Event {
    /// The server said that the row is committed.
    Acknowledged {
        /// The row.
        #[serde(flatten)]
        row: Row,
        /// It also warned: the commit's wait for standbys was ended by somebody.
        #[serde(default)]
        warned: bool,
    },
    /// Whether the row is committed is not known.
    Unknown {
        /// The row.
        #[serde(flatten)]
        row: Row,
        /// What the client got instead of an answer.
        why: String,
    },
    /// A read was answered.
    Read {
        /// Which client.
        who: Who,
        /// When it was sent.
        sent: u64,
        /// When the answer came.
        at: u64,
        /// By which host.
        host: String,
        /// The server's timeline; `None`: it says that it is a standby.
        timeline: Option<u32>,
    },
    /// A session was opened (without `why`), or couldn't be.
    Session {
        /// Which client.
        who: Who,
        /// When.
        at: u64,
        /// With which host.
        host: String,
        /// Why not.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        why: Option<String>,
    },
    /// The client came to its end as it should.
    End {
        /// When.
        at: u64,
    },
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn events_survive_their_line() {
        let row = Row {
            who: Who::Writer,
            writer: "r1/writer".into(),
            seq: 7,
            sent: 1,
            at: 2,
            host: "a".into(),
            timeline: 3,
        };
        for event in [
            Event::Acknowledged {
                row: row.clone(),
                warned: true,
            },
            Event::Unknown {
                row,
                why: "no answer".into(),
            },
            Event::Read {
                who: Who::Inside,
                sent: 1,
                at: 2,
                host: "a".into(),
                timeline: None,
            },
            Event::End { at: 9 },
        ] {
            let line = serde_json::to_string(&event).unwrap();
            assert!(!line.contains('\n'));
            assert_eq!(serde_json::from_str::<Event>(&line).unwrap(), event);
        }
    }

    #[test]
    fn the_clock_runs_forward() {
        let (a, b) = (now().unwrap(), now().unwrap());
        assert!(a <= b && a > 0);
        assert_eq!(seconds(2_000_000_000, 500_000_000), 0.0);
        assert_eq!(seconds(500_000_000, 2_000_000_000), 1.5);
    }
}
