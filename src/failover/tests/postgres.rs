//! A model of PostgreSQL: a log of whole records and a torn rest, timelines numbered locally, receivers and
//! senders, the synchronous rule, and how long things take.

use std::collections::BTreeMap;

use super::oracle::V;
use crate::failover::{Era, Lsn, Millis, Rule, Term};

/// Bytes of a record.
pub const RECORD: u64 = 8;

/// A record. `chain` stands for everything up to and including it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Rec {
    pub chain: u64,
    pub before: u64,
    pub term: Term,
    pub commit: bool,
}

#[derive(Clone, Debug, Default)]
pub struct Wal {
    pub recs: Vec<Rec>,
    /// Bytes of a record that hasn't come whole.
    pub torn: u64,
    /// PostgreSQL's own view: timeline and the record at which it begins.
    pub lines: Vec<(u32, usize)>,
    /// The highest timeline of which it has a history file.
    pub newest: u32,
}

impl Wal {
    pub fn end(&self) -> Lsn {
        self.recs.len() as u64 * RECORD
    }

    pub fn received(&self) -> Lsn {
        self.end() + self.torn
    }

    pub fn chain(&self) -> u64 {
        self.recs.last().map_or(0, |r| r.chain)
    }

    pub fn holds(&self, index: usize, chain: u64) -> bool {
        self.recs.get(index).is_some_and(|r| r.chain == chain)
    }

    pub fn append(&mut self, id: u64, term: Term, commit: bool) {
        self.torn = 0;
        let before = self.chain();
        let chain = (before ^ id)
            .wrapping_mul(0x9E37_79B9_7F4A_7C15)
            .rotate_left(23)
            ^ id;
        self.recs.push(Rec {
            chain,
            before,
            term,
            commit,
        });
    }

    /// The eras as they really are, of those that a history keeps which begins with `oldest`.
    pub fn eras(&self, oldest: Option<&Era>) -> Vec<(Term, Lsn)> {
        let floor = oldest.map_or(0, |e| e.start);
        let mut eras = self.all_eras();
        eras.retain(|(_, start)| *start >= floor);
        eras
    }

    fn all_eras(&self) -> Vec<(Term, Lsn)> {
        let mut eras: Vec<(Term, Lsn)> = Vec::new();
        for (i, r) in self.recs.iter().enumerate() {
            if eras.last().is_none_or(|(term, _)| *term != r.term) {
                eras.push((r.term, i as u64 * RECORD));
            }
        }
        eras
    }

    /// Whether every record follows the one before it.
    pub fn whole(&self) -> bool {
        let mut before = 0;
        self.recs.iter().all(|r| {
            let fits = r.before == before;
            before = r.chain;
            fits
        })
    }

    /// Forks a timeline, as PostgreSQL does when it's promoted.
    pub fn fork(&mut self, id: u64, term: Term) -> (u32, Lsn) {
        let start = self.end();
        self.newest += 1;
        self.lines.push((self.newest, self.recs.len()));
        self.append(id, term, false);
        (self.newest, start)
    }

    /// Whether PostgreSQL would let a standby with this log stream from one with `other`; it knows timelines
    /// by number only, and can be wrong.
    pub fn accepts(&self, other: &Self) -> bool {
        let Some((line, _)) = self.lines.last() else {
            return false;
        };
        let Some(at) = other.lines.iter().position(|(l, _)| l == line) else {
            return false;
        };
        match other.lines.get(at + 1) {
            Some((_, switch)) => *switch >= self.recs.len(),
            None => self.recs.len() <= other.recs.len(),
        }
    }

    /// Takes what `other` holds after this one's end.
    pub fn receive(&mut self, recs: &[Rec], torn: u64, lines: &[(u32, usize)], newest: u32) {
        self.recs.extend_from_slice(recs);
        self.torn = torn;
        let len = self.recs.len();
        self.lines = lines
            .iter()
            .filter(|(_, start)| *start == 0 || *start < len)
            .copied()
            .collect();
        self.newest = self.newest.max(newest);
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum State {
    Down,
    /// Recovers, as a standby without an upstream.
    Starting,
    Standby,
    Promoting,
    Primary,
    /// A clean stop that waits for its standbys.
    Stopping,
    Stopped,
}

#[derive(Clone, Debug)]
pub struct Sender {
    pub connection: u64,
    pub flushed: Lsn,
    pub since: Millis,
    pub open: bool,
}

#[derive(Clone, Debug)]
pub struct Connection {
    pub id: u64,
    pub slot: usize,
    pub run: u64,
}

#[derive(Clone, Debug)]
pub struct Postgres {
    /// Which start of it; events of earlier ones are void.
    pub run: u64,
    pub state: State,
    pub wal: Wal,
    /// Whether there is a copy at all.
    pub copy: bool,
    pub upstream: Option<V>,
    pub follow: u64,
    pub connection: Option<Connection>,
    pub refused: Option<Millis>,
    pub senders: BTreeMap<V, Sender>,
    /// Rules that some backend may still use; the last is the one asked for.
    pub rules: Vec<Rule<V>>,
    pub enforced_at: Millis,
    pub term: Term,
    /// Whether clients were let in, and until when.
    pub until: Millis,
    /// Everything before this record is acknowledged.
    pub acknowledged: usize,
    /// Its end was noticed, or is about to be, by an event of its own.
    pub reported: bool,
    pub slow: bool,
}

impl Postgres {
    pub fn new() -> Self {
        Self {
            run: 0,
            state: State::Down,
            wal: Wal::default(),
            copy: false,
            upstream: None,
            follow: 0,
            connection: None,
            refused: None,
            senders: BTreeMap::new(),
            rules: Vec::new(),
            enforced_at: 0,
            term: 0,
            until: 0,
            acknowledged: 0,
            reported: true,
            slow: false,
        }
    }

    pub fn stop(&mut self, state: State) {
        self.run += 1;
        self.state = state;
        self.upstream = None;
        self.follow += 1;
        self.connection = None;
        self.senders.clear();
        self.rules.clear();
        self.until = 0;
        self.wal.torn = 0;
    }

    pub fn runs(&self) -> bool {
        matches!(
            self.state,
            State::Standby | State::Promoting | State::Primary | State::Stopping
        )
    }

    pub fn leads(&self) -> bool {
        matches!(self.state, State::Primary | State::Stopping)
    }

    /// Up to which position commits are released, by any rule that a backend may still use.
    pub fn released(&self) -> Lsn {
        self.rules
            .iter()
            .map(|rule| {
                if rule.acks == 0 {
                    return self.wal.end();
                }
                let mut flushed: Vec<Lsn> = rule
                    .members
                    .iter()
                    .filter_map(|m| self.senders.get(m).map(|s| s.flushed))
                    .collect();
                flushed.sort_unstable_by(|a, b| b.cmp(a));
                flushed.get(rule.acks - 1).copied().unwrap_or(0)
            })
            .max()
            .unwrap_or(0)
    }
}
