//! A candidate: from the suspicion that the primary is dead to a majority that doesn't hear it either.
//!
//! Owns who suspects, who goes first, and the asking that changes nothing.
//! Never: makes anybody promise anything; that is `election`.

use std::collections::{BTreeMap, BTreeSet};

use super::election::{Election, Phase};
use super::message::{Effect, Message, Story};
use super::node::{Local, Node, Role};
use super::planted::Mistake;
use super::types::{Configuration, Id, Millis, Term};

impl<I: Id> Node<I> {
    // --- suspicion

    pub(super) fn suspect(&mut self, now: Millis, direct: bool) {
        if self.suspected.is_some() {
            return;
        }
        let primary = self
            .durable
            .configuration
            .as_ref()
            .map(|c| c.primary.clone());
        self.tell(Story::Detected { primary, direct });
        let delay = self.delay();
        self.suspected = Some((now, delay));
    }

    /// How long this candidate lets better ones go first.
    pub(super) fn delay(&mut self) -> Millis {
        let Some(c) = self
            .durable
            .configuration
            .as_ref()
            .filter(|c| c.voters.len() > 1)
        else {
            return 0;
        };
        let successor = self
            .farewell
            .as_ref()
            .filter(|(term, _)| *term == c.term)
            .and_then(|(_, successor)| successor.clone());
        if successor.as_ref() == Some(&self.me) {
            return 0;
        }
        let mut rank = c
            .may_be_primary
            .iter()
            .filter(|v| **v != c.primary && Some(*v) != successor.as_ref())
            .position(|v| *v == self.me)
            // The old primary last: it has to recover first.
            .unwrap_or(c.may_be_primary.len());
        if successor.is_some() {
            rank += 3;
        }
        let stagger = self.timing.stagger;
        let rank = Millis::try_from(rank).unwrap_or(0);
        if rank == 0 {
            return 0;
        }
        stagger * rank + self.chance(stagger / 2)
    }

    pub(super) fn eligible(&self) -> bool {
        let Some(c) = self.basis() else {
            return false;
        };
        c.voters.contains(&self.me)
            && !self.durable.rebuilding
            && !self.fenced
            && matches!(self.local, Local::Standing { .. } | Local::Following { .. })
            && self.cutting == 0
    }

    /// Whether it may be primary, as far as it knows. One that may not still asks the others: what it knows
    /// may be out of date, and so may what each of them knows.
    pub(super) fn permitted(&self) -> bool {
        self.basis().is_some_and(|c| self.permitted_by(c))
    }

    /// The same by this configuration. What was agreed on can be behind what the operator has said since; and while
    /// nobody may be primary nobody can agree on anything, so that the operator's word alone counts then.
    pub(super) fn permitted_by(&self, c: &Configuration<I>) -> bool {
        let agreed = if c.may_be_primary.is_empty() {
            let wish = self.wish.as_ref();
            wish.is_some_and(|w| w.may_be_primary.contains(&self.me))
        } else {
            c.may_be_primary.contains(&self.me)
        };
        self.errs(Mistake::PolicyIgnored) || agreed && !self.barred(&self.me)
    }

    /// Whether the operator has said of somebody that he may not be primary, as far as this instance has heard. Once a
    /// majority has, he isn't elected.
    pub(super) fn barred(&self, who: &I) -> bool {
        let wish = self.wish.as_ref();
        wish.is_some_and(|w| w.barred.contains(who)) && !self.errs(Mistake::PolicyIgnored)
    }

    pub(super) fn tick_candidate(&mut self, now: Millis) {
        if self.errs(Mistake::ResumedTerm) && self.resume(now) {
            return;
        }
        if !self.silent(now) {
            self.suspected = None;
            return;
        }
        if self.durable.configuration.is_none() {
            return;
        }
        self.suspect(now, false);
        if !self.eligible() {
            if matches!(self.role, Role::PreVoting { .. }) {
                self.role = Role::Voter;
            }
            return;
        }
        match &self.role {
            Role::Voter => {
                let due = self.suspected.is_some_and(|(at, delay)| now >= at + delay);
                if due {
                    self.pre_vote(now);
                }
            }
            Role::PreVoting { since, asked, .. } => {
                if now >= since + self.timing.round {
                    self.tell(Story::Stuck(
                        "no majority of the voters answers that the primary is gone",
                    ));
                    self.retry_later(now);
                } else if now >= asked + self.timing.retry {
                    self.ask_pre_votes(now);
                }
            }
            _ => {}
        }
    }

    /// Planted: what a restarted primary must never do.
    pub(super) fn resume(&mut self, now: Millis) -> bool {
        let Some(c) = self.durable.configuration.clone() else {
            return false;
        };
        let mine = c.primary == self.me
            && self.durable.promised == c.term
            && matches!(self.local, Local::Standing { .. })
            && self.cutting == 0;
        if mine {
            self.out.push(Effect::Enforce(c.sync.clone()));
            self.role = Role::Electing(Box::new(Election {
                term: c.term,
                votes: BTreeMap::new(),
                phase: Phase::Accepting {
                    accepted: c.voters.clone(),
                    configuration: c,
                    enforced: false,
                    sent: now,
                },
                since: now,
                asked: now,
                farewell: None,
                accept_loss: false,
            }));
        }
        mine
    }

    /// Back to voting, and another attempt after a random time: two coordinators must not keep each other
    /// from being elected.
    pub(super) fn retry_later(&mut self, now: Millis) {
        self.role = Role::Voter;
        let delay = self.timing.stagger + self.chance(self.timing.stagger * 4);
        self.suspected = Some((now, delay));
    }

    pub(super) fn pre_vote(&mut self, now: Millis) {
        let term = self.highest.max(self.durable.promised) + 1;
        self.role = Role::PreVoting {
            term,
            granted: BTreeSet::from([self.me.clone()]),
            since: now,
            asked: now,
        };
        // The primary said itself that it is down: nothing is to be asked first.
        let told = self.farewell.as_ref().map(|(t, _)| *t) == Some(self.durable.at().0);
        if self.permitted() && (told || self.basis().is_some_and(|b| b.voters.len() == 1)) {
            return self.elect(now, term);
        }
        self.ask_pre_votes(now);
    }

    pub(super) fn ask_pre_votes(&mut self, now: Millis) {
        let Role::PreVoting {
            term,
            granted,
            asked,
            ..
        } = &mut self.role
        else {
            return;
        };
        *asked = now;
        let (term, granted) = (*term, granted.clone());
        let voters = self.basis().map(|b| b.voters.clone()).unwrap_or_default();
        for voter in voters.difference(&granted) {
            self.send(voter, Message::PreVote { term });
        }
    }

    pub(super) fn on_pre_voted(
        &mut self,
        now: Millis,
        from: I,
        asked: Term,
        yes: bool,
        promised: Term,
        configuration: Option<&Configuration<I>>,
    ) {
        self.note_term(promised);
        if let Some(c) = configuration {
            self.note_configuration(c);
        }
        let Role::PreVoting { term, granted, .. } = &mut self.role else {
            return;
        };
        if *term != asked {
            return;
        }
        if yes {
            granted.insert(from);
        } else if promised >= *term {
            // It would perhaps, but not in a term that is promised: ask for a later one.
            return self.pre_vote(now);
        }
        let (term, granted) = (*term, granted.clone());
        if self.permitted() && self.basis().is_some_and(|b| b.majority(&granted)) {
            self.elect(now, term);
        }
    }
}
