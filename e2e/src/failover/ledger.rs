//! What the clients' events amount to. Pure: no clock, no connection.
//!
//! Owns the definitions:
//! - *gap* of a set of commits: the longest time, between the run's beginning and its end, in which none of them
//!   was acknowledged. The service's commits are the writer's and the probes'; sessions inside a pod are not
//!   the service.
//! - *lost*: acknowledged, and not in the last primary's table.
//! - *dual*: acknowledged by a server of an older timeline after one of a newer timeline had acknowledged a commit.
//! - *stale*: seconds from the newer timeline's first commit to the last read that a server of an older timeline
//!   answered as a primary.

use std::collections::BTreeMap;

use super::check::Found;
use super::event::{Event, Row, Who, seconds};

/// The events of all clients of a run.
#[derive(Clone, Debug, Default)]
pub struct Ledger {
    /// Acknowledged rows, in the order of their acknowledgement.
    acknowledged: Vec<Row>,
    /// Rows that a client cancelled, acknowledged with the warning that they may be on one volume only.
    warned: Vec<Row>,
    /// Rows of which nothing is known, and why.
    unknown: Vec<(Row, String)>,
    /// Reads that a primary answered: when sent, when answered, timeline.
    reads: Vec<(u64, u64, u32)>,
}

/// Not in the table as it should be.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Wrong {
    /// Acknowledged, and not there.
    pub lost: Vec<Row>,
    /// There more than once.
    pub duplicates: Vec<(String, u64)>,
}

/// What a pause of a server excuses: what it was sent before, and answered after.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Thaw {
    /// When the server went on.
    pub at: u64,
    /// Statements sent up to this time may still be answered.
    pub excused: u64,
}

impl Ledger {
    /// Takes the events of all clients in.
    #[must_use]
    pub fn new(events: impl IntoIterator<Item = Event>) -> Self {
        let mut ledger = Self::default();
        for event in events {
            match event {
                // A warning excuses nothing, unless the client brought it about itself.
                Event::Acknowledged { row, warned: true } if row.who == Who::Cancelling => {
                    ledger.warned.push(row);
                }
                Event::Acknowledged { row, .. } => ledger.acknowledged.push(row),
                Event::Unknown { row, why } => ledger.unknown.push((row, why)),
                Event::Read {
                    sent,
                    at,
                    timeline: Some(timeline),
                    ..
                } => ledger.reads.push((sent, at, timeline)),
                Event::Read { timeline: None, .. } | Event::Session { .. } | Event::End { .. } => {}
            }
        }
        ledger.acknowledged.sort_by_key(|row| row.at);
        ledger.reads.sort_by_key(|read| read.1);
        ledger
    }

    /// Acknowledged rows, in the order of their acknowledgement.
    #[must_use]
    pub fn acknowledged(&self) -> &[Row] {
        &self.acknowledged
    }

    /// Rows that a client cancelled, and that were acknowledged with a warning.
    #[must_use]
    pub fn warned(&self) -> &[Row] {
        &self.warned
    }

    /// Rows of which nothing is known, and what the client got instead of an answer.
    #[must_use]
    pub fn unknown(&self) -> &[(Row, String)] {
        &self.unknown
    }

    fn service(&self) -> impl Iterator<Item = &Row> {
        self.acknowledged
            .iter()
            .filter(|row| matches!(row.who, Who::Writer | Who::Probe))
    }

    /// The service's gap between two times, in seconds.
    #[must_use]
    pub fn gap(&self, from: u64, to: u64) -> f64 {
        gap(self.service().map(|row| row.at), from, to)
    }

    /// The single writer's own gap between two times, in seconds.
    #[must_use]
    pub fn writer_gap(&self, from: u64, to: u64) -> f64 {
        let writers = self.acknowledged.iter().filter(|r| r.who == Who::Writer);
        gap(writers.map(|row| row.at), from, to)
    }

    /// Seconds from `from` to the service's first commit that was sent after it; `None` if there is none.
    #[must_use]
    pub fn first_after(&self, from: u64) -> Option<f64> {
        let first = self.service().find(|row| row.sent >= from)?;
        Some(seconds(from, first.at))
    }

    /// The longest that a commit of the service took that was sent between two times, in seconds, counting what
    /// was given up.
    #[must_use]
    pub fn longest_commit(&self, from: u64, to: u64) -> f64 {
        let given_up = self.unknown.iter().map(|(row, _)| row);
        self.service()
            .chain(given_up.filter(|row| matches!(row.who, Who::Writer | Who::Probe)))
            .filter(|row| (from..=to).contains(&row.sent))
            .map(|row| seconds(row.sent, row.at))
            .fold(0.0, f64::max)
    }

    /// The timelines that acknowledged something, with the time of their first acknowledgement.
    #[must_use]
    pub fn reigns(&self) -> BTreeMap<u32, u64> {
        let mut reigns = BTreeMap::new();
        for row in &self.acknowledged {
            reigns.entry(row.timeline).or_insert(row.at);
        }
        reigns
    }

    /// Compares what was acknowledged with what a table holds.
    #[must_use]
    pub fn compare(&self, found: &Found) -> Wrong {
        Wrong {
            lost: missing(&self.acknowledged, found),
            duplicates: found
                .iter()
                .filter(|(_, count)| **count > 1)
                .map(|(key, _)| key.clone())
                .collect(),
        }
    }

    /// Those of [`Ledger::warned`] that a table doesn't hold.
    #[must_use]
    pub fn warned_lost(&self, found: &Found) -> Vec<Row> {
        missing(&self.warned, found)
    }

    /// Commits acknowledged by an older timeline after a newer one's first. A thaw excuses those sent before it.
    #[must_use]
    pub fn dual(&self, thaw: Option<Thaw>) -> Vec<Row> {
        let reigns = self.reigns();
        let excused = |sent: u64| thaw.is_some_and(|thaw| sent <= thaw.excused);
        self.acknowledged
            .iter()
            .filter(|row| {
                deposed(&reigns, row.timeline).is_some_and(|since| row.at > since)
                    && !excused(row.sent)
            })
            .cloned()
            .collect()
    }

    /// How long, in seconds, a server of an older timeline answered reads as a primary after a newer one's first
    /// commit; from the thaw on, if there was one later.
    #[must_use]
    pub fn stale(&self, thaw: Option<Thaw>) -> f64 {
        let reigns = self.reigns();
        self.reads
            .iter()
            .filter_map(|(_, at, timeline)| {
                let since = deposed(&reigns, *timeline)?;
                let since = thaw.map_or(since, |thaw| since.max(thaw.at));
                (*at > since).then(|| seconds(since, *at))
            })
            .fold(0.0, f64::max)
    }
}

/// Since when a timeline has had a successor.
fn deposed(reigns: &BTreeMap<u32, u64>, timeline: u32) -> Option<u64> {
    reigns
        .range(timeline.saturating_add(1)..)
        .map(|(_, at)| *at)
        .min()
}

fn missing(rows: &[Row], found: &Found) -> Vec<Row> {
    let there = |row: &&Row| !found.contains_key(&(row.writer.clone(), row.seq));
    rows.iter().filter(there).cloned().collect()
}

/// The longest time between two neighbours of `from`, the sorted `times` within, and `to`.
fn gap(times: impl Iterator<Item = u64>, from: u64, to: u64) -> f64 {
    let mut last = from;
    let mut longest = 0.0f64;
    for at in times
        .filter(|at| (from..=to).contains(at))
        .chain(std::iter::once(to))
    {
        longest = longest.max(seconds(last, at));
        last = at;
    }
    longest
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: u64 = 1_000_000;

    fn row(who: Who, seq: u64, at: u64, timeline: u32) -> Row {
        Row {
            who,
            writer: format!("{who:?}"),
            seq,
            sent: at.saturating_sub(3) * MS,
            at: at * MS,
            host: format!("host of {timeline}"),
            timeline,
        }
    }

    fn ack(who: Who, seq: u64, at: u64, timeline: u32) -> Event {
        Event::Acknowledged {
            row: row(who, seq, at, timeline),
            warned: false,
        }
    }

    fn read(at: u64, timeline: Option<u32>) -> Event {
        Event::Read {
            who: Who::Inside,
            sent: (at - 1) * MS,
            at: at * MS,
            host: "old".into(),
            timeline,
        }
    }

    #[test]
    fn the_services_gap_is_what_neither_writer_nor_probe_bridges() {
        let ledger = Ledger::new([
            ack(Who::Writer, 1, 100, 1),
            ack(Who::Writer, 2, 900, 2),
            ack(Who::Probe, 1, 600, 2),
            // Inside a pod is not the service.
            ack(Who::Inside, 1, 300, 1),
        ]);
        assert_eq!(ledger.gap(50 * MS, 1000 * MS), 0.5);
        assert_eq!(ledger.writer_gap(50 * MS, 1000 * MS), 0.8);
        // Both ends count: nothing before, or nothing after, is a gap too.
        assert_eq!(ledger.gap(0, 3000 * MS), 2.1);
        assert_eq!(ledger.gap(1000 * MS, 3000 * MS), 2.0);
        assert_eq!(Ledger::default().gap(0, 7000 * MS), 7.0);
        assert_eq!(ledger.first_after(590 * MS), Some(0.01));
        assert_eq!(ledger.first_after(900 * MS), None);
    }

    #[test]
    fn what_is_acknowledged_must_be_there_once_and_the_unknown_may_be() {
        let ledger = Ledger::new([
            ack(Who::Writer, 1, 1, 1),
            ack(Who::Probe, 1, 2, 1),
            ack(Who::Inside, 9, 3, 1),
            Event::Unknown {
                row: row(Who::Writer, 2, 4, 1),
                why: "no answer".into(),
            },
            Event::Acknowledged {
                row: row(Who::Cancelling, 1, 5, 1),
                warned: true,
            },
        ]);
        let found = Found::from([
            (("Writer".into(), 1), 1),
            (("Probe".into(), 1), 2),
            (("Writer".into(), 2), 1),
        ]);
        let wrong = ledger.compare(&found);
        assert_eq!(
            wrong
                .lost
                .iter()
                .map(|r| (r.who, r.seq))
                .collect::<Vec<_>>(),
            [(Who::Inside, 9)]
        );
        assert_eq!(wrong.duplicates, [("Probe".to_owned(), 1)]);
        assert_eq!(ledger.warned_lost(&found).len(), 1);
        assert_eq!(
            (
                ledger.acknowledged().len(),
                ledger.warned().len(),
                ledger.unknown().len()
            ),
            (3, 1, 1)
        );
        assert_eq!(ledger.longest_commit(0, 10 * MS), 0.003);
        assert_eq!(ledger.longest_commit(2 * MS, 10 * MS), 0.0);
    }

    #[test]
    fn a_deposed_timeline_may_neither_commit_nor_answer() {
        let ledger = Ledger::new([
            ack(Who::Inside, 1, 100, 1),
            read(150, Some(1)),
            ack(Who::Writer, 1, 200, 2),
            ack(Who::Inside, 2, 250, 1),
            read(260, Some(1)),
            read(300, None),
            // Promoted again, under a later timeline: its right.
            ack(Who::Inside, 3, 400, 3),
            read(410, Some(3)),
        ]);
        assert_eq!(ledger.reigns().into_keys().collect::<Vec<_>>(), [1, 2, 3]);
        let dual = ledger.dual(None);
        assert_eq!(dual.iter().map(|r| r.seq).collect::<Vec<_>>(), [2]);
        assert_eq!(ledger.stale(None), 0.06);
    }

    #[test]
    fn a_thaw_excuses_what_was_sent_before_it_and_no_more() {
        let ledger = Ledger::new([
            ack(Who::Writer, 1, 200, 2),
            ack(Who::Inside, 1, 1000, 1),
            ack(Who::Inside, 2, 1150, 1),
            read(1020, Some(1)),
        ]);
        let thaw = Thaw {
            at: 990 * MS,
            excused: 1090 * MS,
        };
        let dual = ledger.dual(Some(thaw));
        assert_eq!(dual.iter().map(|r| r.seq).collect::<Vec<_>>(), [2]);
        assert_eq!(ledger.stale(Some(thaw)), 0.03);
        assert_eq!(ledger.dual(None).len(), 2);
    }

    #[test]
    fn without_a_successor_nobody_is_deposed() {
        let ledger = Ledger::new([
            ack(Who::Writer, 1, 1, 4),
            ack(Who::Inside, 1, 2, 4),
            read(3, Some(4)),
        ]);
        assert!(ledger.dual(None).is_empty());
        assert_eq!(ledger.stale(None), 0.0);
    }
}
