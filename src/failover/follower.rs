//! A follower: whom it streams from, and what its copy is worth.
//!
//! Owns rule 8: stream only from a serving primary, or one just elected, to whom this voter's promise is; come
//! back with no upstream; mark a copy before it is touched, and count it as data only once it's level.
//! Never: compares copies by timelines.

use super::history::{History, Relation, held, relation};
use super::message::{Effect, Message};
use super::node::{Local, Node, Pending, Role, Seen};
use super::planted::Mistake;
use super::types::{Configuration, Id, Lsn, Millis, Term};

impl<I: Id> Node<I> {
    pub(super) fn on_heartbeat(
        &mut self,
        now: Millis,
        from: &I,
        configuration: Configuration<I>,
        seq: u64,
        history: History,
        position: Lsn,
    ) {
        if configuration.primary != *from || *from == self.me {
            return;
        }
        self.note_configuration(&configuration);
        let (promised, term) = (self.durable.promised, configuration.term);
        if term < self.bound() && self.bound() != promised {
            return;
        }
        let coordinator = self.durable.coordinator.clone();
        let answer = Message::Heard {
            seq,
            term,
            promised,
            coordinator: coordinator.clone(),
        };
        if term < promised && coordinator.as_ref() != Some(from) {
            // A higher promise stands against it, and the answer says so.
            return self.send(from, answer);
        }
        // A promise to this very primary is a renewal under way (rule 9), or it was asked for after this
        // heartbeat: then the primary has stopped since, and whoever followed it now would do so unaware of
        // the era that it is about to begin.
        let renewing = self.renewing == Some(promised) || self.errs(Mistake::EveryPromiseIsRenewal);
        if term < promised && !renewing {
            return;
        }
        if configuration.at() > self.durable.at() {
            // This voter missed the election, or a change: a heartbeat's configuration has its majority.
            if self.acceptable(&configuration) {
                if self.pledged(&configuration) {
                    self.take(now, configuration, &history);
                } else if !matches!(&self.pending, Some(Pending::Accept { configuration: c, .. }) if *c == configuration)
                {
                    self.retire_from(term);
                    self.cut(Pending::Accept {
                        configuration,
                        history,
                    });
                }
            }
            return;
        }
        if matches!(self.role, Role::PreVoting { .. }) {
            self.role = Role::Voter;
        }
        self.heard = now;
        self.gone = None;
        self.farewell = None;
        self.suspected = None;
        if term < promised && !self.errs(Mistake::FollowsBeforeRenewed) {
            // This voter may have been cut for another's election, which counts on that until the renewal has
            // its majority: whoever streams still, goes on; whoever doesn't, waits.
            return self.send(from, answer);
        }
        if term < self.durable.at().0 {
            // A renewal that this voter has accepted already; or a late one of an earlier reign, whose eras
            // must not replace those of what is being received now.
            return self.send(from, answer);
        }
        self.seen = Some(Seen {
            term,
            history: history.clone(),
            position,
        });
        self.consider(from, &history);
        // Last: whoever answers has its era on disk.
        self.send(from, answer);
    }

    /// Follows `primary`, if nothing keeps this copy from it.
    pub(super) fn consider(&mut self, primary: &I, history: &History) {
        if self.role != Role::Voter || self.cutting > 0 || *primary == self.me {
            return;
        }
        match &self.local {
            Local::Standing { end } => {
                let end = *end;
                match relation(&self.durable.history, end, history) {
                    Relation::Prefix => self.follow(primary, history, end),
                    Relation::Diverged => self.rebuild(),
                }
            }
            Local::Following { upstream, end } if upstream == primary => {
                if self.durable.history == *history {
                    return;
                }
                // It streamed from this one before it was promoted: the new era is written down before it
                // comes along the same connection. If it came already, or the other's copy isn't the one that
                // this one followed, only a look at its own end can tell.
                // What came of the last era it holds may be half a record, and be gone after the cut: one more
                // has to be among those that are kept.
                let placed =
                    history.first().is_some_and(|e| e.start == 0) || held(history, *end).len() > 1;
                let prefix = relation(&self.durable.history, *end, history) == Relation::Prefix;
                if prefix && placed {
                    self.durable.history.clone_from(history);
                    self.persist();
                } else {
                    self.cut(Pending::Retreat);
                }
            }
            Local::Following { .. } => self.cut(Pending::Retreat),
            // Nothing is left of it. (A copy that is there, but marked, is looked at once it has started.)
            Local::Down { .. } if self.durable.rebuilding && self.durable.history.is_empty() => {
                self.rebuild();
            }
            Local::Down { .. } | Local::Leading => {}
        }
    }

    pub(super) fn on_standby(&mut self, end: Lsn) {
        if self.local == Local::Leading || self.copying || self.cutting > 0 {
            return;
        }
        // Whatever it was told to follow before it started, it follows nobody now.
        self.local = Local::Standing { end };
        self.doubt(Some(end));
        self.catch_up_again(end);
        self.consider_seen();
    }

    pub(super) fn consider_seen(&mut self) {
        if let Some(c) = &self.durable.configuration
            && let Some(seen) = &self.seen
            && seen.term == c.term
            && seen.term >= self.durable.promised
            && self.gone != Some(c.term)
        {
            let (primary, history) = (c.primary.clone(), seen.history.clone());
            self.consider(&primary, &history);
        }
    }

    pub(super) fn on_received(&mut self, from: &I, end: Lsn) {
        let Local::Following { upstream, end: old } = &mut self.local else {
            return;
        };
        if upstream != from {
            return;
        }
        *old = end;
        if let Some((coordinator, term, target)) = self.levelling.clone()
            && end >= target
        {
            self.levelling = None;
            self.send(&coordinator, Message::Levelled { term, end: target });
        }
        // Level with a serving primary: the copy is data again (rule 8).
        let level = self.seen.as_ref().is_some_and(|s| {
            self.durable
                .configuration
                .as_ref()
                .is_some_and(|c| c.term == s.term && c.primary == *from)
                && end >= s.position
        });
        if self.durable.rebuilding && level {
            self.durable.rebuilding = false;
            self.persist();
        }
        self.levelled_self(from, end);
    }

    /// A coordinator whose PostgreSQL was started anew while it fetched what it lacks.
    pub(super) fn catch_up_again(&mut self, end: Lsn) {
        let Role::Electing(election) = &self.role else {
            return;
        };
        if let Some((source, copy)) = election.catching() {
            let (source, history) = (source.clone(), self.upto(copy, election.term));
            self.follow(&source, &history, end);
        }
    }

    /// The coordinator's wish: become level with it before the new configuration.
    pub(super) fn on_level(&mut self, from: I, term: Term, history: &History, end: Lsn) {
        let promised = self.durable.promised == term
            && self.durable.coordinator.as_ref() == Some(&from)
            && self.cutting == 0
            && matches!(self.role, Role::Voter | Role::PreVoting { .. });
        if !promised || self.durable.rebuilding {
            return;
        }
        // Whom it has promised this to is at it: to ask for itself meanwhile would cost the round.
        self.role = Role::Voter;
        match &self.local {
            Local::Standing { end: own } if *own == end => {
                self.send(&from, Message::Levelled { term, end });
            }
            Local::Standing { end: own } => {
                let own = *own;
                if own < end && relation(&self.durable.history, own, history) == Relation::Prefix {
                    self.follow(&from, history, own);
                    self.levelling = Some((from, term, end));
                }
            }
            Local::Following { upstream, end: own } if *upstream == from => {
                if *own >= end {
                    self.send(&from, Message::Levelled { term, end });
                } else {
                    self.levelling = Some((from, term, end));
                }
            }
            _ => {}
        }
    }

    // --- losing the copy, and making it anew

    /// This copy can't go on. From here on it votes, but not as data; the mark is on disk before anything of
    /// it is touched.
    pub(super) fn rebuild(&mut self) {
        if self.role != Role::Voter || self.copying {
            return;
        }
        if !self.durable.rebuilding {
            self.durable.rebuilding = true;
            self.persist();
        }
        let from = self.durable.configuration.as_ref().map(|c| {
            let seen = self.seen.as_ref().filter(|s| s.term == c.term);
            (c.primary.clone(), seen.map(|s| s.history.clone()))
        });
        if let Some((from, Some(history))) = from
            && from != self.me
        {
            self.local = Local::Down { end: None };
            self.levelling = None;
            self.copying = true;
            self.out.push(Effect::Rebuild { from, history });
        }
    }

    pub(super) fn on_rebuilt(&mut self, history: History) {
        self.copying = false;
        self.durable.rebuilding = true;
        self.durable.history = history;
        self.persist();
        self.local = Local::Down { end: None };
        // Level only with what the primary says from now on.
        self.seen = None;
    }

    pub(super) fn on_lost(&mut self, now: Millis, wiped: bool) {
        match &self.role {
            Role::Primary(_) => self.step_down(now, "PostgreSQL ended", true),
            Role::Electing(_) => self.give_up(now, "PostgreSQL ended"),
            Role::Voter | Role::PreVoting { .. } => {}
        }
        self.local = Local::Down { end: None };
        self.levelling = None;
        self.copying = false;
        if wiped {
            self.role = Role::Voter;
            if !self.durable.rebuilding || !self.durable.history.is_empty() {
                self.durable.rebuilding = true;
                self.durable.history.clear();
                self.persist();
            }
            self.consider_wiped();
        }
    }

    pub(super) fn consider_wiped(&mut self) {
        let known = self.seen.as_ref().map(|s| s.term) == Some(self.durable.at().0);
        if known && self.gone.is_none() {
            self.rebuild();
        }
    }

    // --- signs of the primary's end

    pub(super) fn on_dead(&mut self, now: Millis, peer: &I) {
        let Some(c) = &self.durable.configuration else {
            return;
        };
        if c.primary == *peer && self.gone != Some(c.term) {
            self.gone = Some(c.term);
            self.suspect(now, true);
        }
    }

    pub(super) fn on_farewell(&mut self, now: Millis, from: &I, term: Term, successor: Option<I>) {
        let Some(c) = &self.durable.configuration else {
            return;
        };
        if c.primary != *from || c.term != term {
            return;
        }
        self.gone = Some(term);
        self.farewell = Some((term, successor));
        self.suspected = None;
        self.suspect(now, true);
    }
}
