//! A serving primary: heartbeats, the lease, taking back a voter that promised a higher term, and the ends.
//!
//! Owns rules 6, 9 and 10 on the primary's side.
//! Never: serves without a majority's answer within the lease, resumes a term, or counts the answer of a voter
//! that has promised a higher term to somebody else.

use std::collections::{BTreeMap, BTreeSet};

use super::change::Change;
use super::message::{Effect, Message, Story, Streaming};
use super::node::{Local, Node, Pending, Role};
use super::planted::Mistake;
use super::types::{Configuration, Id, Lsn, Millis, Rule, Term};

/// What a primary remembers while it serves.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Primary<I: Id> {
    /// The configuration with a majority.
    pub committed: Configuration<I>,
    /// A change under way.
    pub change: Option<Change<I>>,
    /// For each voter, when the latest message that it answered was sent.
    pub answered: BTreeMap<I, Millis>,
    /// Who has answered a heartbeat of this era: their copies' histories name it.
    pub informed: BTreeSet<I>,
    /// When each recent heartbeat was sent.
    pub sent: BTreeMap<u64, Millis>,
    /// Whether the witness has answered a heartbeat with the present configuration; and the first that has it.
    pub witnessed: (bool, u64),
    /// The next heartbeat's number.
    pub seq: u64,
    /// When it's due.
    pub due: Millis,
    /// The end of the WAL, as last seen.
    pub position: Lsn,
    /// Who streams, as last seen.
    pub streaming: BTreeMap<I, Streaming>,
    /// The lease that was last made known.
    pub until: Millis,
    /// A voter has promised this term to somebody else.
    pub challenged: Option<Term>,
    /// The term that is being taken instead.
    pub renewal: Option<Renewal<I>>,
    /// The clean stop of a hand-over is under way; for whom.
    pub handing: Option<Option<I>>,
    /// The rule last asked for.
    pub rule: Rule<I>,
}

/// Raising the own term.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Renewal<I: Id> {
    /// The new term.
    pub term: Term,
    /// Who promised it.
    pub votes: BTreeSet<I>,
    /// The proposal, once there are enough.
    pub proposed: Option<Configuration<I>>,
    /// Who accepted it.
    pub accepted: BTreeSet<I>,
    /// Since when.
    pub since: Millis,
    /// When it last asked.
    pub asked: Millis,
}

/// How many heartbeats are remembered.
const REMEMBERED: usize = 64;

impl<I: Id> Primary<I> {
    pub(super) fn new(
        committed: Configuration<I>,
        accepted: &BTreeSet<I>,
        sent: Millis,
        position: Lsn,
    ) -> Self {
        Self {
            rule: committed.sync.clone(),
            answered: accepted.iter().map(|v| (v.clone(), sent)).collect(),
            committed,
            change: None,
            informed: BTreeSet::new(),
            sent: BTreeMap::new(),
            witnessed: (false, 1),
            seq: 1,
            due: 0,
            position,
            streaming: BTreeMap::new(),
            until: 0,
            challenged: None,
            renewal: None,
            handing: None,
        }
    }

    /// A configuration has its majority.
    pub(super) fn commit(&mut self, new: Configuration<I>) {
        self.committed = new;
        self.witnessed = (false, self.seq);
        self.due = 0;
    }

    /// Whether a heartbeat to the witness is worth a write: it doesn't know the configuration yet, without
    /// which it can't tell a primary's end when it's told of it; or the others alone don't carry the lease.
    fn needs_witness(&self, me: &I, now: Millis, lease: Millis) -> bool {
        let others = |c: &Configuration<I>| self.supported(me, now, c, c.witness.as_ref());
        let mut since = others(&self.committed);
        if let Some(proposed) = self.proposed() {
            since = since.min(others(proposed));
        }
        !self.witnessed.0 || now >= since + lease / 2
    }

    /// Since when a majority has been with this primary: the lease counts from there. `without`: whose answers
    /// don't count.
    fn supported(&self, me: &I, now: Millis, of: &Configuration<I>, without: Option<&I>) -> Millis {
        let mut times: Vec<Millis> = of
            .voters
            .iter()
            .map(|v| {
                if v == me {
                    now
                } else if without == Some(v) {
                    0
                } else {
                    self.answered.get(v).copied().unwrap_or(0)
                }
            })
            .collect();
        times.sort_unstable_by(|a, b| b.cmp(a));
        times.get(of.voters.len() / 2).copied().unwrap_or(0)
    }
}

impl<I: Id> Node<I> {
    fn primary_mut(&mut self) -> Option<&mut Primary<I>> {
        match &mut self.role {
            Role::Primary(primary) => Some(primary),
            _ => None,
        }
    }

    pub(super) fn tick_primary(&mut self, now: Millis) {
        let Role::Primary(primary) = &self.role else {
            return;
        };
        let mut supported = primary.supported(&self.me, now, &primary.committed, None);
        // An election could go by either as soon as the new one was sent.
        if let Some(proposed) = primary.proposed() {
            supported = supported.min(primary.supported(&self.me, now, proposed, None));
        }
        let lease = if self.errs(Mistake::LeaseTooLong) {
            self.timing.detection * 2
        } else {
            self.timing.lease
        };
        let until = supported + lease;
        if now >= until {
            return self.step_down(now, "no majority answered within the lease", false);
        }
        if until > primary.until {
            if let Some(primary) = self.primary_mut() {
                primary.until = until;
            }
            self.out.push(Effect::Serve { until });
        }
        self.beat(now);
        self.tick_renewal(now);
        self.tick_change(now);
    }

    fn beat(&mut self, now: Millis) {
        let heartbeat = self.timing.heartbeat;
        let history = self.durable.history.clone();
        let audience = self.audience();
        let (me, lease) = (self.me.clone(), self.timing.lease);
        let wished = self.wish.as_ref().and_then(|w| w.witness.clone());
        let Some(primary) = self.primary_mut() else {
            return;
        };
        if now < primary.due {
            return;
        }
        primary.due = now + heartbeat;
        let seq = primary.seq;
        primary.seq += 1;
        primary.sent.insert(seq, now);
        while primary.sent.len() > REMEMBERED {
            primary.sent.pop_first();
        }
        let message = Message::Heartbeat {
            configuration: primary.committed.clone(),
            seq,
            history,
            position: primary.position,
        };
        // Quiet costs nothing: the witness's object is written only while that is of use.
        let needed = primary.needs_witness(&me, now, lease);
        let voting = [Some(&primary.committed), primary.proposed()]
            .into_iter()
            .flatten()
            .filter_map(|c| c.witness.clone())
            .collect::<BTreeSet<I>>();
        for peer in audience {
            let witness = wished.as_ref() == Some(&peer) || voting.contains(&peer);
            if !witness || (needed && voting.contains(&peer)) {
                self.send(&peer, message.clone());
            }
        }
    }

    pub(super) fn on_heard(
        &mut self,
        now: Millis,
        from: I,
        seq: u64,
        term: Term,
        promised: Term,
        coordinator: Option<&I>,
    ) {
        self.note_term(promised);
        let me = self.me.clone();
        // One that is to join could otherwise never accept.
        let joining = self.wish.as_ref().is_some_and(|w| w.voters.contains(&from));
        let Some(primary) = self.primary_mut() else {
            return;
        };
        if term != primary.committed.term {
            return;
        }
        if promised > term && coordinator != Some(&me) {
            let voter = joining || primary.committed.voters.contains(&from);
            if voter && primary.challenged.is_none_or(|c| c < promised) {
                primary.challenged = Some(promised);
            }
        } else if let Some(sent) = primary.sent.get(&seq).copied() {
            primary.informed.insert(from.clone());
            if primary.committed.witness.as_ref() == Some(&from) && seq >= primary.witnessed.1 {
                primary.witnessed.0 = true;
            }
            let answered = primary.answered.entry(from).or_insert(0);
            *answered = sent.max(*answered);
        }
        self.tick_primary(now);
    }

    // --- rule 9

    fn tick_renewal(&mut self, now: Millis) {
        let Role::Primary(primary) = &self.role else {
            return;
        };
        if let Some(renewal) = &primary.renewal {
            if now >= renewal.since + self.timing.round {
                // A voter that refused has named a higher term by now.
                let next = self.highest;
                if let Some(primary) = self.primary_mut() {
                    primary.renewal = None;
                    primary.challenged = Some(next);
                }
            } else if now >= renewal.asked + self.timing.retry {
                self.ask_renewal(now);
            }
            return;
        }
        let Some(challenged) = primary.challenged else {
            return;
        };
        if primary.handing.is_some() || self.cutting > 0 {
            return;
        }
        self.drop_unsent_change();
        let term = challenged.max(self.highest).max(self.durable.promised) + 1;
        self.note_term(term);
        self.durable.promised = term;
        self.durable.coordinator = Some(self.me.clone());
        self.persist();
        let me = self.me.clone();
        if let Some(primary) = self.primary_mut() {
            primary.challenged = None;
            primary.renewal = Some(Renewal {
                term,
                votes: BTreeSet::from([me.clone()]),
                proposed: None,
                accepted: BTreeSet::from([me]),
                since: now,
                asked: now,
            });
        }
        self.ask_renewal(now);
    }

    fn ask_renewal(&mut self, now: Millis) {
        let at = self.durable.at();
        let audience = self.audience();
        let Some(renewal) = self.primary_mut().and_then(|p| p.renewal.as_mut()) else {
            return;
        };
        renewal.asked = now;
        let term = renewal.term;
        let (missing, message) = match &renewal.proposed {
            None => (
                audience.difference(&renewal.votes).cloned().collect(),
                Message::RequestVote {
                    term,
                    renewal: Some(at),
                    farewell: None,
                },
            ),
            Some(configuration) => (
                audience
                    .difference(&renewal.accepted)
                    .cloned()
                    .collect::<Vec<I>>(),
                Message::Accept {
                    configuration: configuration.clone(),
                    history: Vec::new(),
                },
            ),
        };
        for voter in missing {
            self.send(&voter, message.clone());
        }
    }

    pub(super) fn on_renewal_vote(
        &mut self,
        now: Millis,
        from: I,
        term: Term,
        configuration: Option<Configuration<I>>,
    ) {
        let at = self.durable.at();
        if configuration.is_some_and(|c| c.at() > at) {
            return self.step_down(now, "another instance was elected", false);
        }
        let Some(primary) = self.primary_mut() else {
            return;
        };
        let (old, new) = (
            primary.committed.clone(),
            primary.change.as_ref().map(|c| c.to.clone()),
        );
        let Some(renewal) = primary.renewal.as_mut() else {
            return;
        };
        if renewal.term != term || renewal.proposed.is_some() {
            return;
        }
        renewal.votes.insert(from);
        let votes = renewal.votes.clone();
        let enough = old.majority(&votes) && new.is_none_or(|n| n.majority(&votes));
        if enough {
            self.propose_renewal(now);
        }
    }

    /// The same configuration in a higher term. A change that was sent counts as the configuration: it may
    /// have a majority already. The rule in force satisfies both until this is accepted.
    fn propose_renewal(&mut self, now: Millis) {
        let Some(highest) = self.durable.configuration.clone() else {
            return;
        };
        let me = self.me.clone();
        let hasty = self.errs(Mistake::RenewalWithoutJointRule);
        let streaming: BTreeSet<I> = self.streaming().into_keys().collect();
        let Some(renewal) = self.primary_mut().and_then(|p| p.renewal.as_mut()) else {
            return;
        };
        let mut highest = highest;
        if hasty && streaming.len() >= highest.sync.acks {
            highest.sync.members = highest
                .copies()
                .filter(|v| streaming.contains(*v))
                .cloned()
                .collect();
        }
        let configuration = Configuration {
            term: renewal.term,
            version: 1,
            primary: me,
            ..highest
        };
        renewal.proposed = Some(configuration.clone());
        self.note_configuration(&configuration);
        self.durable.configuration = Some(configuration);
        self.persist();
        self.ask_renewal(now);
    }

    pub(super) fn renewal_accepted(&mut self, now: Millis, from: &I, at: (Term, u64)) -> bool {
        let Some(primary) = self.primary_mut() else {
            return false;
        };
        let old = primary.committed.clone();
        let Some(renewal) = primary.renewal.as_mut() else {
            return false;
        };
        let Some(new) = renewal.proposed.clone().filter(|p| p.at() == at) else {
            return false;
        };
        renewal.accepted.insert(from.clone());
        if old.majority(&renewal.accepted) && new.majority(&renewal.accepted) {
            primary.renewal = None;
            primary.change = None;
            // Heartbeats of the old term may still be answered; they prove nothing for the new one.
            primary.sent.clear();
            primary.commit(new.clone());
            self.enforce(&new.sync);
            self.beat(now);
        }
        true
    }

    pub(super) fn enforce(&mut self, rule: &Rule<I>) {
        if let Some(primary) = self.primary_mut()
            && primary.rule != *rule
        {
            primary.rule = rule.clone();
            self.out.push(Effect::Enforce(rule.clone()));
        }
    }

    // --- the ends

    /// Stops serving. `told`: the others are told, so that they need not wait for silence.
    pub(super) fn step_down(&mut self, now: Millis, why: &'static str, told: bool) {
        let Role::Primary(primary) = &self.role else {
            return;
        };
        let term = primary.committed.term;
        self.tell(Story::SteppedDown { term, why });
        let audience = self.audience();
        self.role = Role::Voter;
        self.heard = now;
        self.suspected = None;
        self.cut(Pending::Retreat);
        if told {
            for peer in audience {
                let successor = None;
                self.send(&peer, Message::Farewell { term, successor });
            }
        }
        self.suspect(now, told);
    }

    /// Hands over to `to`, or to the best there is.
    pub(super) fn hand_over(&mut self, now: Millis, to: Option<&I>) {
        let Role::Primary(primary) = &self.role else {
            return;
        };
        if primary.handing.is_some() {
            return;
        }
        let ready = |id: &I| {
            let c = &primary.committed;
            *id != self.me
                && c.may_be_primary.contains(id)
                && c.sync.members.contains(id)
                && primary.streaming.contains_key(id)
        };
        let successor = match to {
            Some(to) if ready(to) => Some(to.clone()),
            Some(_) => {
                return self.tell(Story::Stuck(
                    "that instance can't take over: it isn't permitted, or doesn't stream",
                ));
            }
            None => primary
                .committed
                .may_be_primary
                .iter()
                .find(|id| ready(id))
                .cloned(),
        };
        if let Some(primary) = self.primary_mut() {
            primary.handing = Some(successor);
        }
        self.out.push(Effect::StopCleanly);
        self.tick_primary(now);
    }

    pub(super) fn on_stopped(&mut self, now: Millis, end: Option<Lsn>) {
        let Role::Primary(primary) = &self.role else {
            return;
        };
        let (term, successor) = (primary.committed.term, primary.handing.clone().flatten());
        self.tell(Story::SteppedDown {
            term,
            why: "it handed over",
        });
        let audience = self.audience();
        self.role = Role::Voter;
        self.local = Local::Down { end };
        self.heard = now;
        self.suspected = None;
        // Rank as one who lets the others go first.
        self.farewell = Some((term, successor.clone().filter(|s| *s != self.me)));
        self.suspect(now, true);
        for peer in audience {
            let successor = successor.clone();
            self.send(&peer, Message::Farewell { term, successor });
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::failover::Durability;

    #[test]
    fn the_witness_is_written_to_only_while_it_is_needed() {
        let configuration = Configuration {
            term: 1,
            version: 2,
            primary: 1_u8,
            voters: BTreeSet::from([1, 2, 9]),
            witness: Some(9),
            sync: Rule::default(),
            durability: Durability::Required,
            may_be_primary: BTreeSet::from([1, 2]),
        };
        let mut primary = Primary::new(configuration.clone(), &BTreeSet::from([1]), 0, 0);
        primary.answered.insert(2, 10_000);
        let needs = |p: &Primary<u8>, now| p.needs_witness(&1, now, 2_000);
        assert!(needs(&primary, 10_001), "it doesn't know who serves");
        primary.witnessed.0 = true;
        assert!(!needs(&primary, 10_999));
        assert!(needs(&primary, 11_000), "half the lease is over");
        // As long as only its own answer carries the lease.
        primary.answered.insert(9, 11_900);
        assert!(needs(&primary, 12_000));
        primary.answered.insert(2, 11_950);
        assert!(!needs(&primary, 12_000));
        primary.commit(Configuration {
            version: 3,
            ..configuration
        });
        assert!(needs(&primary, 12_000), "it doesn't know the change");
    }
}
