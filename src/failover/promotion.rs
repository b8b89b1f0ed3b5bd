//! A proposal, and the promotion: from level voters to a primary that serves.
//!
//! Owns rule 4 on the candidate's side, and rule 11.
//! Never: proposes two configurations in a term, promotes after a higher promise, before the rule is enforced,
//! or outside `may_be_primary`.

use std::collections::BTreeSet;

use super::election::Phase;
use super::history::History;
use super::message::{Effect, Message, Story};
use super::node::{Local, Node, Role};
use super::planted::Mistake;
use super::primary::Primary;
use super::types::{Configuration, Id, Lsn, Millis, Rule, Term};

impl<I: Id> Node<I> {
    pub(super) fn propose(&mut self, now: Millis) {
        let Role::Electing(election) = &self.role else {
            return;
        };
        let (Phase::Levelling { level, .. }, term) = (&election.phase, election.term) else {
            return;
        };
        let Some(basis) = self.outcome(election).ok().flatten().map(|o| o.basis) else {
            return self.give_up(now, "its votes are gone");
        };
        let acks = basis.acks(level.len());
        let configuration = Configuration {
            term,
            version: 1,
            primary: self.me.clone(),
            sync: Rule {
                members: level.clone(),
                acks,
            },
            ..basis
        };
        self.put_forward(now, configuration);
    }

    pub(super) fn put_forward(&mut self, now: Millis, configuration: Configuration<I>) {
        // Not after a higher promise, nor while one is being made.
        let own = self.durable.promised == configuration.term
            && self.durable.coordinator.as_ref() == Some(&self.me)
            && self.cutting == 0;
        if !own {
            return self.give_up(now, "another election is under way");
        }
        self.note_configuration(&configuration);
        self.durable.configuration = Some(configuration.clone());
        self.persist();
        self.out.push(Effect::Enforce(configuration.sync.clone()));
        self.enter(
            now,
            Phase::Accepting {
                configuration,
                accepted: BTreeSet::from([self.me.clone()]),
                enforced: false,
                sent: now,
            },
        );
        self.ask_acceptance(now);
    }

    pub(super) fn planned(&self, term: Term) -> History {
        // Without marks of eras of which nothing was ever received.
        self.own_copy()
            .map_or_else(History::new, |own| self.upto(&own, term))
    }

    pub(super) fn ask_acceptance(&mut self, now: Millis) {
        let Role::Electing(election) = &mut self.role else {
            return;
        };
        election.asked = now;
        let Phase::Accepting {
            configuration,
            accepted,
            ..
        } = &election.phase
        else {
            return;
        };
        let (configuration, accepted) = (configuration.clone(), accepted.clone());
        let history = self.planned(configuration.term);
        for voter in configuration.voters.difference(&accepted) {
            self.send(
                voter,
                Message::Accept {
                    configuration: configuration.clone(),
                    history: history.clone(),
                },
            );
        }
    }

    pub(super) fn on_accepted(&mut self, now: Millis, from: I, term: Term, version: u64) {
        match &mut self.role {
            Role::Electing(election) => {
                if let Phase::Accepting {
                    configuration,
                    accepted,
                    ..
                } = &mut election.phase
                    && configuration.at() == (term, version)
                {
                    accepted.insert(from);
                    self.try_promote(now);
                }
            }
            Role::Primary(_) => self.on_change_accepted(now, from, term, version),
            _ => {}
        }
    }

    pub(super) fn election_enforced(&mut self, now: Millis, rule: &Rule<I>) {
        if let Role::Electing(election) = &mut self.role
            && let Phase::Accepting {
                configuration,
                enforced,
                ..
            } = &mut election.phase
            && configuration.sync == *rule
        {
            *enforced = true;
            self.try_promote(now);
        }
    }

    pub(super) fn try_promote(&mut self, now: Millis) {
        let Role::Electing(election) = &self.role else {
            return;
        };
        let Phase::Accepting {
            configuration,
            accepted,
            enforced,
            sent,
        } = &election.phase
        else {
            return;
        };
        let ruled = *enforced || self.errs(Mistake::PromotedUnruled);
        let half =
            self.errs(Mistake::HalfIsEnough) && accepted.len() * 2 >= configuration.voters.len();
        if !ruled || !(configuration.majority(accepted) || half) {
            return;
        }
        let still = self.durable.promised == configuration.term
            && self.durable.coordinator.as_ref() == Some(&self.me)
            && self.cutting == 0;
        if !still && !self.errs(Mistake::PromotedAfterHigherVote) {
            return self.give_up(now, "another election is under way");
        }
        let (configuration, accepted, sent) = (configuration.clone(), accepted.clone(), *sent);
        let term = configuration.term;
        self.tell(Story::Elected { term });
        // The era is on disk before its first record is in the log.
        self.durable.history = self.planned(term);
        self.persist();
        self.enter(
            now,
            Phase::Promoting {
                configuration,
                accepted,
                sent,
            },
        );
        self.local = Local::Leading;
        self.out.push(Effect::Promote);
    }

    pub(super) fn on_promoted(&mut self, now: Millis, timeline: u32, start: Lsn) {
        let Role::Electing(election) = &self.role else {
            return;
        };
        let Phase::Promoting {
            configuration,
            accepted,
            sent,
        } = &election.phase
        else {
            return;
        };
        let term = configuration.term;
        let primary = Primary::new(configuration.clone(), accepted, *sent, start);
        if let Some(era) = self.durable.history.last_mut()
            && era.term == term
        {
            era.timeline = timeline;
            era.start = start;
        }
        self.persist();
        self.role = Role::Primary(Box::new(primary));
        self.gone = None;
        self.farewell = None;
        self.suspected = None;
        self.tell(Story::Promoted { term });
        self.tick_primary(now);
    }

    // --- by hand

    /// A person goes on with this copy, whatever the others held (rule 11): it becomes the only voter, and
    /// the others join it anew.
    pub(super) fn accept_loss(&mut self, now: Millis) {
        let whole = matches!(self.local, Local::Standing { .. } | Local::Following { .. });
        if matches!(self.role, Role::Primary(_)) || self.durable.configuration.is_none() || !whole {
            return;
        }
        // A copy that was being made anew is all there is.
        self.durable.rebuilding = false;
        // Far above whatever an election that this instance hasn't heard of may have used.
        let term = self.highest.max(self.durable.promised) + 1_000;
        // Nobody else is asked.
        self.begin_election(now, term, true);
    }

    pub(super) fn propose_alone(&mut self, now: Millis) {
        let (Role::Electing(election), Some(basis)) =
            (&self.role, self.durable.configuration.clone())
        else {
            return;
        };
        if self.own_copy().is_none() {
            return self.give_up(now, "its own copy isn't whole");
        }
        let mut configuration = Configuration {
            term: election.term,
            version: 1,
            primary: self.me.clone(),
            voters: BTreeSet::from([self.me.clone()]),
            witness: None,
            ..basis
        };
        configuration.may_be_primary = configuration
            .may_be_primary
            .intersection(&configuration.voters)
            .cloned()
            .collect();
        if configuration.may_be_primary.is_empty() || self.barred(&self.me) {
            return self.give_up(now, "the policy permits no primary here");
        }
        configuration.sync = Rule {
            members: BTreeSet::new(),
            acks: configuration.acks(0),
        };
        self.put_forward(now, configuration);
    }
}
