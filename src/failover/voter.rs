//! A voter: promises, accepts, follows.
//!
//! Owns rules 1, 4 and 8: cut first, then write down, then answer; stream only from a serving primary, or one
//! just elected, to whom this voter's promise is; and come back with no upstream.
//! Never: answers before the effect that makes the answer true.

use super::message::{Copy, Effect, Message, Story};
use super::node::{Local, Node, Pending, Role, Seen};
use super::planted::Mistake;
use super::types::{Configuration, History, Id, Lsn, Millis, Relation, Term, held, relation};

impl<I: Id> Node<I> {
    // --- votes

    pub(super) fn on_pre_vote(&mut self, now: Millis, from: &I, term: Term) {
        self.primary_asks(from, term);
        let granted = term > self.durable.promised
            && self.silent(now)
            && !matches!(self.role, Role::Primary(_));
        self.send(
            from,
            Message::PreVoted {
                term,
                granted,
                promised: self.durable.promised,
                configuration: self.durable.configuration.clone(),
            },
        );
    }

    /// A primary that asks for votes has stopped serving; but not if the question is older than its election.
    fn primary_asks(&mut self, from: &I, term: Term) {
        if let Some(c) = &self.durable.configuration
            && c.primary == *from
            && term > c.term
        {
            self.gone = Some(c.term);
        }
    }

    pub(super) fn on_request_vote(
        &mut self,
        now: Millis,
        from: I,
        term: Term,
        renewal: Option<(Term, u64)>,
        farewell: Option<Term>,
    ) {
        self.note_term(term);
        let promised = self.bound();
        let mine = match &self.pending {
            Some(Pending::Vote { term: t, to }) if *t == promised => term == *t && *to == from,
            _ => term == promised && self.durable.coordinator.as_ref() == Some(&from),
        };
        if term < promised || (term == promised && !mine) || from == self.me {
            return self.send(&from, Message::Refused { term, promised });
        }
        if let Some(at) = renewal {
            return self.on_renewal(from, term, at);
        }
        self.primary_asks(&from, term);
        if let Some(c) = &self.durable.configuration
            && farewell == Some(c.term)
        {
            self.gone = farewell;
        }
        // A healthy primary isn't deposed because one link is bad; and while this instance serves, it is the
        // proof that there is one.
        let hears = !mine && !self.silent(now);
        if hears || matches!(self.role, Role::Primary(_)) {
            return self.send(&from, Message::Refused { term, promised });
        }
        // Coordinators that are ahead end this one's own attempt.
        self.give_up_below(now, term);
        if self.errs(Mistake::VoteBeforeCut)
            && let Local::Following { end, .. } = self.local.clone()
        {
            let followed = std::mem::replace(&mut self.local, Local::Standing { end });
            self.vote(now, term, &from);
            self.local = followed;
            return self.cut(Pending::Retreat);
        }
        self.cut(Pending::Vote { term, to: from });
    }

    /// The sitting primary raises its own term (rule 9). Nothing has to be cut: what this voter acknowledges
    /// goes to the same primary, and the primary uses the answer for the same configuration only.
    fn on_renewal(&mut self, from: I, term: Term, at: (Term, u64)) {
        let promised = self.durable.promised;
        let other_upstream =
            matches!(&self.local, Local::Following { upstream, .. } if *upstream != from);
        if self.durable.at() > at || matches!(self.role, Role::Primary(_)) {
            return self.send(&from, Message::Refused { term, promised });
        }
        if other_upstream || matches!(self.role, Role::Electing(_)) {
            self.role = Role::Voter;
            return self.cut(Pending::Vote { term, to: from });
        }
        if term > promised {
            self.promise(term, &from);
            self.persist();
        }
        self.renewing = Some(term);
        let configuration = self.durable.configuration.clone();
        self.send(
            &from,
            Message::Vote {
                term,
                copy: None,
                configuration,
            },
        );
    }

    /// The highest term that this voter has promised, or is about to once its copy is cut. What is asked of it
    /// meanwhile is answered as if it had: an answer that lets a primary serve, and then a vote against it
    /// within the detection time, must not both come from here.
    fn bound(&self) -> Term {
        let promised = self.durable.promised;
        match &self.pending {
            Some(Pending::Vote { term, .. }) => promised.max(*term),
            _ => promised,
        }
    }

    fn promise(&mut self, term: Term, to: &I) {
        self.durable.promised = term;
        self.durable.coordinator = Some(to.clone());
        self.note_term(term);
    }

    // --- the cut is done

    pub(super) fn on_cut(&mut self, now: Millis, end: Option<Lsn>) {
        self.cutting = self.cutting.saturating_sub(1);
        if self.cutting > 0 {
            return;
        }
        self.local = end.map_or(Local::Down { end: None }, |end| Local::Standing { end });
        self.levelling = None;
        self.doubt(end);
        match self.pending.take() {
            Some(Pending::Vote { term, to }) => self.vote(now, term, &to),
            Some(Pending::Accept {
                configuration,
                history,
            }) => {
                if self.acceptable(&configuration) {
                    self.take(now, configuration, &history);
                }
            }
            Some(Pending::Retreat) | None => {}
        }
    }

    /// A copy that goes on beyond where it was to become level isn't known: its upstream was promoted, or has
    /// followed somebody else, without this voter's having accepted it. What it was told to follow ends in an
    /// era of a term that it hasn't accepted; if there is WAL after that, it's no data.
    fn doubt(&mut self, end: Option<Lsn>) {
        let accepted = self.durable.at().0;
        let unknown = end.is_some_and(|end| {
            held(&self.durable.history, end)
                .last()
                .is_some_and(|era| era.term > accepted)
        });
        if unknown && !self.durable.rebuilding {
            self.durable.rebuilding = true;
            self.persist();
        }
    }

    fn vote(&mut self, now: Millis, term: Term, to: &I) {
        let again = term == self.durable.promised && self.durable.coordinator.as_ref() == Some(to);
        if term < self.durable.promised || (term == self.durable.promised && !again) {
            return;
        }
        if !again {
            self.promise(term, to);
            if !self.errs(Mistake::PromiseForgotten) {
                self.persist();
            }
        }
        let end = self
            .known_end()
            .or_else(|| self.errs(Mistake::RebuildingIsData).then_some(0));
        let copy = end.map(|end| Copy {
            end,
            history: self.durable.history.clone(),
        });
        let configuration = self.durable.configuration.clone();
        if *to == self.me {
            self.own_vote(now, term, copy, configuration);
        } else {
            self.send(
                to,
                Message::Vote {
                    term,
                    copy,
                    configuration,
                },
            );
        }
    }

    // --- configurations

    /// Whether it is newer, and nothing promised stands against it. A promise of the same term to another
    /// doesn't: whoever proposes has a majority of this term's promises, so nobody else ever can.
    fn acceptable(&self, new: &Configuration<I>) -> bool {
        let newer = new.at() > self.durable.at()
            || (self.errs(Mistake::OlderVersionAccepted) && new.term == self.durable.at().0);
        newer && new.term >= self.durable.promised
    }

    /// Whether this term is promised to this primary: then the copy was cut for it, and follows nobody else.
    fn pledged(&self, to: &Configuration<I>) -> bool {
        to.term == self.durable.promised && self.durable.coordinator.as_ref() == Some(&to.primary)
    }

    pub(super) fn on_accept(
        &mut self,
        now: Millis,
        from: &I,
        new: Configuration<I>,
        history: History,
    ) {
        if new.primary != *from || *from == self.me {
            return;
        }
        self.note_configuration(&new);
        if self.durable.configuration.as_ref() == Some(&new) {
            // Said already, and the answer was lost.
            let (term, version) = new.at();
            return self.send(from, Message::Accepted { term, version });
        }
        let bound = self.bound();
        if !self.acceptable(&new) || new.term < bound {
            let (term, promised) = (new.term, bound);
            return self.send(from, Message::Refused { term, promised });
        }
        if self.pledged(&new) {
            self.take(now, new, &history);
        } else {
            self.retire_from(new.term);
            self.cut(Pending::Accept {
                configuration: new,
                history,
            });
        }
    }

    /// A later term has a primary: whatever this instance was at is over.
    fn retire_from(&mut self, term: Term) {
        if let Role::Primary(primary) = &self.role {
            let old = primary.committed.term;
            if old < term {
                self.tell(Story::SteppedDown {
                    term: old,
                    why: "another instance was elected",
                });
                self.role = Role::Voter;
            }
        } else {
            self.role = Role::Voter;
        }
    }

    /// Accepts, having cut where that is needed.
    fn take(&mut self, now: Millis, new: Configuration<I>, history: &History) {
        let (term, version) = new.at();
        let primary = new.primary.clone();
        let again = self
            .durable
            .configuration
            .as_ref()
            .is_some_and(|c| c.term == term);
        self.promise(term, &primary);
        self.durable.configuration = Some(new);
        self.persist();
        self.send(&primary, Message::Accepted { term, version });
        if !again {
            self.role = Role::Voter;
            // The new primary may serve from when it asked: as after a heartbeat, nobody else is voted for
            // until the detection time is over.
            self.heard = now;
            self.gone = None;
            self.farewell = None;
            self.suspected = None;
        }
        if !history.is_empty() {
            self.consider(&primary, history);
        }
    }

    // --- following

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
    fn consider(&mut self, primary: &I, history: &History) {
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
                if relation(&self.durable.history, *end, history) == Relation::Prefix {
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

    fn consider_seen(&mut self) {
        if let Some(c) = &self.durable.configuration
            && let Some(seen) = &self.seen
            && seen.term == c.term
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
    fn catch_up_again(&mut self, end: Lsn) {
        let Role::Electing(election) = &self.role else {
            return;
        };
        if let Some((source, history)) = election.catching() {
            self.follow(&source, &history, end);
        }
    }

    /// The coordinator's wish: become level with it before the new configuration.
    pub(super) fn on_level(&mut self, from: I, term: Term, history: &History, end: Lsn) {
        let promised = self.durable.promised == term
            && self.durable.coordinator.as_ref() == Some(&from)
            && self.cutting == 0
            && self.role == Role::Voter;
        if !promised || self.durable.rebuilding {
            return;
        }
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

    fn consider_wiped(&mut self) {
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
