//! An election: votes, and what they say about history.
//!
//! Owns rules 2 and 3: who has to be heard, whose copy defines history, who may be in the new synchronous
//! rule. The coordinator of an election is always its candidate; one that lacks WAL gets it first, from the
//! voter that has the most.
//! Never: proposes anything; that is `promotion`.

use std::collections::{BTreeMap, BTreeSet};

use super::history::{Era, History, Relation, held, newest, relation};
use super::message::{Copy, Message, Story};
use super::node::{Node, Pending, Role};
use super::planted::Mistake;
use super::types::{Configuration, Id, Lsn, Millis, Term};

/// A vote as it came.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Ballot<I: Id> {
    /// The copy, if it counts as data.
    pub copy: Option<Copy>,
    /// The latest configuration accepted.
    pub configuration: Option<Configuration<I>>,
}

/// How far an election is.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Phase<I: Id> {
    /// Collects votes.
    Voting {
        /// Since when there are enough.
        enough: Option<Millis>,
    },
    /// Gets the WAL that it lacks.
    Catching {
        /// From whom.
        source: I,
        /// Up to where.
        end: Lsn,
    },
    /// Waits for others to become level.
    Levelling {
        /// Those that are.
        level: BTreeSet<I>,
        /// Those that can become so.
        behind: BTreeSet<I>,
    },
    /// Waits for a majority, and for PostgreSQL to enforce the rule.
    Accepting {
        /// The proposal.
        configuration: Configuration<I>,
        /// Who accepted.
        accepted: BTreeSet<I>,
        /// Whether the rule is enforced.
        enforced: bool,
        /// When it was sent.
        sent: Millis,
    },
    /// PostgreSQL is being promoted.
    Promoting {
        /// The configuration.
        configuration: Configuration<I>,
        /// Who accepted.
        accepted: BTreeSet<I>,
        /// When the acceptance was asked for: the lease counts from there.
        sent: Millis,
    },
}

/// An election that this instance coordinates.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Election<I: Id> {
    /// Its term.
    pub term: Term,
    /// The votes, this instance's own included.
    pub votes: BTreeMap<I, Ballot<I>>,
    /// How far it is.
    pub phase: Phase<I>,
    /// Since when it's there.
    pub since: Millis,
    /// When it last asked those who haven't answered.
    pub asked: Millis,
    /// The primary of this term told this instance itself that it has stopped.
    pub farewell: Option<Term>,
    /// A person has accepted that commits are lost.
    pub accept_loss: bool,
}

impl<I: Id> Election<I> {
    /// Whom it is to catch up with, and what that one voted.
    pub(super) fn catching(&self) -> Option<(&I, &Copy)> {
        let Phase::Catching { source, .. } = &self.phase else {
            return None;
        };
        let copy = self.votes.get(source)?.copy.as_ref()?;
        Some((source, copy))
    }
}

/// What an election may do with its votes.
pub(super) struct Outcome<I: Id> {
    pub(super) basis: Configuration<I>,
    source: I,
    copy: Copy,
    everybody: bool,
}

impl<I: Id> Node<I> {
    /// Asks for votes in `term`, its own like any other's: cut, write down, then count it. The others are asked at once,
    /// since between regions a way takes longer than a cut. Whatever they promise is counted only after that; should this
    /// instance end before, they have promised a term to nobody.
    pub(super) fn elect(&mut self, now: Millis, term: Term) {
        self.begin_election(now, term, false);
        self.ask_votes(now);
    }

    pub(super) fn begin_election(&mut self, now: Millis, term: Term, accept_loss: bool) {
        let term = term.max(self.durable.promised + 1);
        self.note_term(term);
        let farewell = self.farewell.as_ref().map(|(term, _)| *term);
        self.role = Role::Electing(Box::new(Election {
            term,
            votes: BTreeMap::new(),
            phase: Phase::Voting { enough: None },
            since: now,
            asked: now,
            farewell,
            accept_loss,
        }));
        self.cut(Pending::Vote {
            term,
            to: self.me.clone(),
        });
    }

    pub(super) fn own_vote(
        &mut self,
        now: Millis,
        term: Term,
        copy: Option<Copy>,
        configuration: Option<Configuration<I>>,
    ) {
        let Role::Electing(election) = &mut self.role else {
            return;
        };
        if election.term != term {
            return;
        }
        election.votes.insert(
            self.me.clone(),
            Ballot {
                copy,
                configuration,
            },
        );
        if election.accept_loss {
            return self.propose_alone(now);
        }
        self.weigh(now);
    }

    pub(super) fn ask_votes(&mut self, now: Millis) {
        let voters = self.basis().map(|b| b.voters.clone()).unwrap_or_default();
        let Role::Electing(election) = &mut self.role else {
            return;
        };
        election.asked = now;
        let (term, farewell) = (election.term, election.farewell);
        let missing: Vec<I> = voters
            .into_iter()
            // A vote without data may become one with data once its PostgreSQL has recovered.
            .filter(|v| election.votes.get(v).is_none_or(|b| b.copy.is_none()))
            .collect();
        for voter in missing {
            self.send(
                &voter,
                Message::RequestVote {
                    term,
                    renewal: None,
                    farewell,
                },
            );
        }
    }

    pub(super) fn on_vote(
        &mut self,
        now: Millis,
        from: I,
        term: Term,
        copy: Option<Copy>,
        configuration: Option<Configuration<I>>,
    ) {
        if let Some(c) = &configuration {
            self.note_configuration(c);
        }
        match &mut self.role {
            Role::Electing(election)
                if election.term == term && matches!(election.phase, Phase::Voting { .. }) =>
            {
                let ballot = Ballot {
                    copy,
                    configuration,
                };
                election.votes.insert(from, ballot);
                self.weigh(now);
            }
            Role::Primary(_) => self.on_renewal_vote(now, from, term, configuration),
            _ => {}
        }
    }

    pub(super) fn on_refused(&mut self, now: Millis, term: Term, promised: Term) {
        self.note_term(promised);
        match &self.role {
            Role::Electing(election) if election.term == term && promised > term => {
                self.give_up(now, "another election is under way");
            }
            _ => {}
        }
    }

    /// Ends an own attempt of no higher term than `term`.
    pub(super) fn give_up_below(&mut self, now: Millis, term: Term) {
        match &self.role {
            Role::Electing(election)
                if election.term <= term && !self.errs(Mistake::PromotedAfterHigherVote) =>
            {
                self.give_up(now, "another election is under way");
            }
            Role::PreVoting { .. } => self.retry_later(now),
            _ => {}
        }
    }

    pub(super) fn give_up(&mut self, now: Millis, why: &'static str) {
        if let Role::Electing(election) = &self.role {
            let promoting = matches!(election.phase, Phase::Promoting { .. });
            self.tell(Story::Stuck(why));
            self.retry_later(now);
            if promoting {
                self.cut(Pending::Retreat);
            }
        }
    }

    pub(super) fn tick_election(&mut self, now: Millis) {
        let Role::Electing(election) = &self.role else {
            return;
        };
        let over = now >= election.since + self.timing.round;
        let ask = now >= election.asked + self.timing.retry;
        if self.durable.promised > election.term && !self.errs(Mistake::PromotedAfterHigherVote) {
            return self.give_up(now, "another election is under way");
        }
        match &election.phase {
            Phase::Voting { .. } if over => self.give_up(
                now,
                "too few of those that hold every acknowledged commit answer",
            ),
            Phase::Voting { .. } => {
                if ask && !election.accept_loss {
                    self.ask_votes(now);
                }
                self.weigh(now);
            }
            Phase::Catching { .. } if over => {
                self.give_up(now, "the voter with the longest log could not be followed");
            }
            Phase::Levelling { .. } if over => self.propose(now),
            Phase::Levelling { .. } if ask => self.ask_level(now),
            Phase::Accepting { .. } if over => self.give_up(now, "no majority accepted"),
            Phase::Accepting { .. } if ask => self.ask_acceptance(now),
            Phase::Promoting { sent, .. } if now >= sent + self.timing.lease => {
                // Its voters may by now elect another.
                self.give_up(now, "the promotion took longer than the lease");
            }
            _ => {}
        }
    }

    /// Rules 2 and 3, from the votes so far.
    pub(super) fn outcome(
        &self,
        election: &Election<I>,
    ) -> Result<Option<Outcome<I>>, &'static str> {
        let votes = &election.votes;
        let Some(basis) = votes
            .values()
            .filter_map(|b| b.configuration.as_ref())
            .max_by_key(|c| c.at())
        else {
            return Ok(None);
        };
        if basis.term >= election.term {
            return Err("a later configuration is already accepted");
        }
        let heard: BTreeSet<I> = votes.keys().cloned().collect();
        let half = self.errs(Mistake::HalfIsEnough) && heard.len() * 2 >= basis.voters.len();
        if !basis.majority(&heard) && !half {
            return Ok(None);
        }
        let copy = |id: &I| votes.get(id).and_then(|b| b.copy.clone());
        let primary = copy(&basis.primary);
        let members: Vec<(&I, Copy)> = basis
            .sync
            .members
            .iter()
            .filter_map(|m| Some((m, copy(m)?)))
            .collect();
        let enough = primary.is_some()
            || basis
                .sync
                .quorum()
                .is_some_and(|quorum| members.len() >= quorum)
            || (self.errs(Mistake::NoneNeedsToBeHeard)
                && basis.sync.members.len() < basis.sync.acks);
        if !enough {
            return Ok(None);
        }
        // Only these define history; other voters' positions don't compare.
        let longest = primary
            .map(|copy| (&basis.primary, copy))
            .into_iter()
            .chain(members)
            // Among equals this instance, which then has nothing to fetch.
            .max_by_key(|(id, copy)| (copy.end, **id == self.me));
        let careless = self.errs(Mistake::NoneNeedsToBeHeard) && longest.is_none();
        let longest = if careless || self.errs(Mistake::NewestTimelineWins) {
            votes
                .iter()
                .filter_map(|(id, b)| Some((id, b.copy.clone()?)))
                .max_by_key(|(_, copy)| (copy.history.last().map(|e| e.timeline), copy.end))
        } else {
            longest
        };
        let everybody = basis
            .copies()
            .filter(|v| **v != basis.primary)
            .all(|v| heard.contains(v));
        Ok(longest.map(|(source, copy)| Outcome {
            basis: basis.clone(),
            source: source.clone(),
            copy,
            everybody,
        }))
    }

    pub(super) fn weigh(&mut self, now: Millis) {
        let Role::Electing(election) = &self.role else {
            return;
        };
        let Phase::Voting { enough } = election.phase else {
            return;
        };
        if self.cutting > 0 || !election.votes.contains_key(&self.me) {
            // It hasn't promised itself yet. Or what it voted says no longer where its copy ends: it would fetch once
            // more what it has, from an upstream that the cut then takes from it, and wait for that in vain.
            return;
        }
        let outcome = match self.outcome(election) {
            Ok(Some(outcome)) => outcome,
            Ok(None) => return,
            Err(why) => return self.give_up(now, why),
        };
        if !self.permitted_by(&outcome.basis) {
            return self.give_up(now, "the policy permits no primary here");
        }
        if !outcome.everybody {
            match enough {
                None => {
                    if let Role::Electing(election) = &mut self.role {
                        election.phase = Phase::Voting { enough: Some(now) };
                    }
                    return;
                }
                Some(since) if now < since + self.timing.gather => return,
                Some(_) => {}
            }
        }
        let term = election.term;
        self.tell(Story::Fenced { term });
        let Some(own) = self.own_copy() else {
            return self.give_up(now, "its own copy isn't whole");
        };
        match relation(&own.history, own.end, &outcome.copy.history) {
            Relation::Diverged => self.give_up(now, "its own copy has diverged"),
            Relation::Prefix if own.end >= outcome.copy.end => self.level_others(now),
            Relation::Prefix => {
                let Outcome { source, copy, .. } = outcome;
                let history = self.upto(&copy, term);
                if relation(&own.history, own.end, &history) == Relation::Diverged {
                    // With the era to come, the one in which it ends would be forgotten.
                    return self.give_up(now, "its own copy has diverged");
                }
                self.enter(
                    now,
                    Phase::Catching {
                        source: source.clone(),
                        end: copy.end,
                    },
                );
                self.follow(&source, &history, own.end);
            }
        }
    }

    /// The eras of a copy, up to where it was when it was voted. What may come after that is nobody's yet.
    pub(super) fn upto(&self, copy: &Copy, term: Term) -> History {
        let mut history = held(&copy.history, copy.end).to_vec();
        history.push(Era {
            term,
            timeline: 0,
            start: copy.end,
        });
        newest(history, self.kept)
    }

    pub(super) fn enter(&mut self, now: Millis, phase: Phase<I>) {
        if let Role::Electing(election) = &mut self.role {
            election.phase = phase;
            election.since = now;
            election.asked = now;
        }
    }

    pub(super) fn own_copy(&self) -> Option<Copy> {
        match &self.role {
            Role::Electing(election) => election.votes.get(&self.me)?.copy.clone(),
            _ => None,
        }
    }

    /// This coordinator has received what it lacked. It votes again: cut off from its source, whose own log may
    /// go on in another's term, and knowing where its copy really ends.
    pub(super) fn levelled_self(&mut self, from: &I, received: Lsn) {
        let Role::Electing(election) = &mut self.role else {
            return;
        };
        let Phase::Catching { source, end } = &election.phase else {
            return;
        };
        if source != from || received < *end {
            return;
        }
        election.phase = Phase::Voting { enough: Some(0) };
        let term = election.term;
        let to = self.me.clone();
        self.cut(Pending::Vote { term, to });
    }

    /// Who of the voters may be in the new rule: those whose copy is exactly as long as this one's, of the
    /// same eras. One that is longer holds something that this one doesn't.
    pub(super) fn level_others(&mut self, now: Millis) {
        let (Role::Electing(election), Some(own)) = (&self.role, self.own_copy()) else {
            return;
        };
        let Some(basis) = self.outcome(election).ok().flatten().map(|o| o.basis) else {
            return;
        };
        // As they will judge by themselves: with the era to come, the oldest may be forgotten.
        let planned = self.planned(election.term);
        let mut level = BTreeSet::new();
        let mut behind = BTreeSet::new();
        for id in basis.copies().filter(|id| **id != self.me) {
            let Some(copy) = election.votes.get(id).and_then(|b| b.copy.as_ref()) else {
                continue;
            };
            if relation(&copy.history, copy.end, &planned) != Relation::Prefix {
                continue;
            }
            if copy.end == own.end || self.errs(Mistake::LaggardsAreMembers) {
                level.insert(id.clone());
            } else if copy.end < own.end {
                behind.insert(id.clone());
            }
        }
        let needed = basis.acks(usize::MAX);
        let short = level.len() < needed && !behind.is_empty();
        self.enter(now, Phase::Levelling { level, behind });
        if !short {
            return self.propose(now);
        }
        self.ask_level(now);
    }

    pub(super) fn ask_level(&mut self, now: Millis) {
        let Some(own) = self.own_copy() else { return };
        let Role::Electing(election) = &mut self.role else {
            return;
        };
        election.asked = now;
        let term = election.term;
        let Phase::Levelling { level, behind } = &election.phase else {
            return;
        };
        let missing: Vec<I> = behind.difference(level).cloned().collect();
        let history = self.planned(term);
        for id in missing {
            let message = Message::Level {
                term,
                history: history.clone(),
                end: own.end,
            };
            self.send(&id, message);
        }
    }

    pub(super) fn on_levelled(&mut self, now: Millis, from: &I, term: Term, end: Lsn) {
        let own = self.own_copy();
        let Role::Electing(election) = &mut self.role else {
            return;
        };
        if election.term != term || own.is_none_or(|o| o.end != end) {
            return;
        }
        let Phase::Levelling { level, .. } = &mut election.phase else {
            return;
        };
        level.insert(from.clone());
        let count = level.len();
        let Role::Electing(election) = &self.role else {
            return;
        };
        let needed = self
            .outcome(election)
            .ok()
            .flatten()
            .map_or(0, |o| o.basis.acks(usize::MAX));
        if count >= needed {
            self.propose(now);
        }
    }
}
