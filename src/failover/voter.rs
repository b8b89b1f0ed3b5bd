//! A voter: promises and accepts.
//!
//! Owns rules 1 and 4: cut first, then write down, then answer.
//! Never: answers before the effect that makes the answer true.

use super::history::{History, held};
use super::message::{Copy, Message, Story};
use super::node::{Local, Node, Pending, Role};
use super::planted::Mistake;
use super::types::{Configuration, Id, Lsn, Millis, Term};

impl<I: Id> Node<I> {
    // --- votes

    pub(super) fn on_pre_vote(&mut self, now: Millis, from: &I, term: Term) {
        self.primary_asks(from, term);
        let granted = term > self.durable.promised
            && self.silent(now)
            && !self.barred(from)
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
    pub(super) fn primary_asks(&mut self, from: &I, term: Term) {
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
        // Nor is one elected who may not be primary any more, even if that isn't agreed on yet.
        let barred = !mine && self.barred(&from);
        if hears || barred || matches!(self.role, Role::Primary(_)) {
            return self.send(&from, Message::Refused { term, promised });
        }
        if mine {
            // Asked again. Cut once more for it, a voter whose cut takes longer than the coordinator waits between two
            // askings would never answer; and what it has begun to follow since would be taken from it.
            if self.durable.at().0 == term {
                return;
            }
            if self.cutting > 0 && matches!(self.pending, Some(Pending::Vote { .. })) {
                return;
            }
            if self.cutting == 0 && matches!(self.local, Local::Standing { .. }) {
                return self.vote(now, term, &from);
            }
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
    pub(super) fn on_renewal(&mut self, from: I, term: Term, at: (Term, u64)) {
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
    pub(super) fn bound(&self) -> Term {
        let promised = self.durable.promised;
        match &self.pending {
            Some(Pending::Vote { term, .. }) => promised.max(*term),
            _ => promised,
        }
    }

    pub(super) fn promise(&mut self, term: Term, to: &I) {
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
    pub(super) fn doubt(&mut self, end: Option<Lsn>) {
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

    pub(super) fn vote(&mut self, now: Millis, term: Term, to: &I) {
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
    pub(super) fn acceptable(&self, new: &Configuration<I>) -> bool {
        let newer = new.at() > self.durable.at()
            || (self.errs(Mistake::OlderVersionAccepted) && new.term == self.durable.at().0);
        newer && new.term >= self.durable.promised
    }

    /// Whether this term is promised to this primary: then the copy was cut for it, and follows nobody else.
    pub(super) fn pledged(&self, to: &Configuration<I>) -> bool {
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
    pub(super) fn retire_from(&mut self, term: Term) {
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
    pub(super) fn take(&mut self, now: Millis, new: Configuration<I>, history: &History) {
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
        // Only once it is primary: a coordinator that fails goes on to follow somebody, and whoever followed it already
        // would take what comes along for the era that never began.
        if history.last().is_some_and(|era| era.timeline > 0) {
            self.consider(&primary, history);
        }
    }
}
