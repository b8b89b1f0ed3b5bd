//! One instance's part in the protocol: its state, and [`Node::step`].
//!
//! Owns what is remembered between events, and which part of the protocol an event goes to: `voter` answers
//! others, `candidate` suspects, `election` and `promotion` go on from there, `primary` serves, `change` alters
//! the configuration in a term.
//! Never: keeps anything here that has to survive a crash; that is [`Durable`], and it's on disk before any
//! effect that depends on it.

use std::collections::{BTreeMap, BTreeSet};

use super::election::Election;
use super::history::{Era, History, KEPT, newest};
use super::message::{Effect, Event, Message, Story, Wish};
use super::primary::Primary;
use super::types::{Configuration, Durability, Durable, Id, Lsn, Millis, Rule, Term};

/// The intervals of the protocol, in milliseconds.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Timing {
    /// Between two heartbeats.
    pub heartbeat: Millis,
    /// Silence after which a primary counts as dead.
    pub detection: Millis,
    /// How long an answered heartbeat lets the primary serve, counted from its sending.
    pub lease: Millis,
    /// How long an election waits for votes that it could do without.
    pub gather: Millis,
    /// How long any round of an election may take.
    pub round: Millis,
    /// Between two askings of those who haven't answered.
    pub retry: Millis,
    /// How much later each next candidate begins.
    pub stagger: Millis,
    /// How long a standby streams before a `Preferred` rule counts on it.
    pub steady: Millis,
}

impl Timing {
    /// The intervals that follow from `failover.detectionSeconds`.
    #[must_use]
    pub fn new(detection: Millis) -> Self {
        Self {
            heartbeat: (detection / 12).max(10),
            detection,
            lease: detection * 2 / 3,
            gather: (detection / 20).clamp(20, 500),
            round: (detection / 2).clamp(500, 5_000),
            retry: (detection / 50).clamp(20, 250),
            stagger: (detection / 12).clamp(50, 1_000),
            steady: 5_000,
        }
    }
}

/// What is known of this instance's PostgreSQL.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Local<I: Id> {
    /// It isn't running, or hasn't replayed all that it has. The end is known after a clean stop.
    Down {
        /// The end of its WAL.
        end: Option<Lsn>,
    },
    /// A standby without an upstream that has replayed all it has.
    Standing {
        /// The end of its WAL.
        end: Lsn,
    },
    /// A standby that streams, or tries to.
    Following {
        /// From whom.
        upstream: I,
        /// What it has received.
        end: Lsn,
    },
    /// It is being, or has been, promoted.
    Leading,
}

/// What this instance does in the protocol.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Role<I: Id> {
    /// Votes and follows.
    Voter,
    /// Asks whether it would be elected.
    PreVoting {
        /// The term that it would ask for.
        term: Term,
        /// Who would.
        granted: BTreeSet<I>,
        /// Since when.
        since: Millis,
        /// When it asked last.
        asked: Millis,
    },
    /// Runs an election.
    Electing(Box<Election<I>>),
    /// Serves.
    Primary(Box<Primary<I>>),
}

/// As what PostgreSQL is to run. The present wish, not an event: whoever starts PostgreSQL looks at it.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Wanted<I: Id> {
    /// A standby, started with no upstream.
    Standby,
    /// The primary: it runs already, or is being promoted. Never started as one.
    Primary,
    /// A new copy of this instance's.
    Copy(I),
    /// A new copy, as soon as somebody serves.
    CopyOfAnyone,
    /// Nothing: fenced by hand.
    Nothing,
}

/// Why a [`Effect::Cut`] is under way.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(super) enum Pending<I: Id> {
    Vote {
        term: Term,
        to: I,
    },
    Accept {
        configuration: Configuration<I>,
        history: History,
    },
    Retreat,
}

/// What the serving primary said last.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(super) struct Seen {
    pub term: Term,
    pub history: History,
    pub position: Lsn,
}

/// An instance in the protocol.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Node<I: Id> {
    pub(super) me: I,
    pub(super) timing: Timing,
    pub(super) durable: Durable<I>,
    pub(super) role: Role<I>,
    pub(super) local: Local<I>,
    /// When the primary was heard last.
    pub(super) heard: Millis,
    /// The primary of this term is known to be down.
    pub(super) gone: Option<Term>,
    /// … because it said so itself; and whom it named.
    pub(super) farewell: Option<(Term, Option<I>)>,
    /// Since when the primary counts as dead, and how long this candidate waits before it acts on that.
    pub(super) suspected: Option<(Millis, Millis)>,
    pub(super) pending: Option<Pending<I>>,
    /// The promise of this term was made to a primary that serves on meanwhile (rule 9).
    pub(super) renewing: Option<Term>,
    /// Cuts under way. Until all are done nothing is followed, voted or promoted.
    pub(super) cutting: u32,
    /// The newest configuration heard of, accepted or not: whom to ask.
    pub(super) latest: Option<Configuration<I>>,
    pub(super) seen: Option<Seen>,
    /// The highest term heard of.
    pub(super) highest: Term,
    pub(super) levelling: Option<(I, Term, Lsn)>,
    pub(super) wish: Option<Wish<I>>,
    pub(super) fenced: bool,
    /// A new copy is being made.
    pub(super) copying: bool,
    pub(super) random: u64,
    /// How many eras a history keeps.
    pub(super) kept: usize,
    #[cfg(test)]
    pub(super) planted: Option<super::planted::Mistake>,
    /// Does nothing by itself: the model checker chooses when it suspects, asks and beats.
    #[cfg(test)]
    pub(super) passive: bool,
    pub(super) out: Vec<Effect<I>>,
}

impl<I: Id> Node<I> {
    /// An instance that has just started, with what its volume remembers. `seed` makes its random delays.
    #[must_use]
    pub fn new(me: I, mut durable: Durable<I>, timing: Timing, now: Millis, seed: u64) -> Self {
        // An earlier version kept all eras.
        durable.history = newest(durable.history, KEPT);
        Self {
            highest: durable.promised.max(durable.at().0),
            me,
            timing,
            latest: durable.configuration.clone(),
            durable,
            role: Role::Voter,
            local: Local::Down { end: None },
            // It may have answered a heartbeat just before it was restarted, and the primary counts on that.
            heard: now,
            gone: None,
            farewell: None,
            suspected: None,
            pending: None,
            renewing: None,
            cutting: 0,
            seen: None,
            levelling: None,
            wish: None,
            fenced: false,
            copying: false,
            random: seed | 1,
            kept: KEPT,
            #[cfg(test)]
            planted: None,
            #[cfg(test)]
            passive: false,
            out: Vec::new(),
        }
    }

    /// What the first instance of a store begins with, once: it alone votes, and it elects itself.
    #[must_use]
    pub fn founding(me: &I, durability: Durability) -> Durable<I> {
        let mut configuration = Configuration {
            term: 1,
            version: 1,
            primary: me.clone(),
            voters: BTreeSet::from([me.clone()]),
            witness: None,
            sync: Rule::default(),
            durability,
            may_be_primary: BTreeSet::from([me.clone()]),
        };
        configuration.sync.acks = configuration.acks(0);
        Durable {
            promised: 1,
            coordinator: Some(me.clone()),
            configuration: Some(configuration),
            rebuilding: false,
            history: vec![Era {
                term: 1,
                timeline: 0,
                start: 0,
            }],
        }
    }

    /// What is on disk, or is in an effect on its way there.
    #[must_use]
    pub fn durable(&self) -> &Durable<I> {
        &self.durable
    }

    /// What it does.
    #[must_use]
    pub fn role(&self) -> &Role<I> {
        &self.role
    }

    /// What is known of its PostgreSQL.
    #[must_use]
    pub fn local(&self) -> &Local<I> {
        &self.local
    }

    /// Whether it serves: PostgreSQL accepts writes under a configuration with a majority.
    #[must_use]
    pub fn serving(&self) -> Option<&Configuration<I>> {
        match &self.role {
            Role::Primary(primary) => Some(&primary.committed),
            _ => None,
        }
    }

    /// The serving primary, as far as this instance knows: itself, or one heard within the detection time.
    #[must_use]
    pub fn primary(&self, now: Millis) -> Option<&I> {
        let configuration = self.durable.configuration.as_ref()?;
        let heard = self
            .seen
            .as_ref()
            .is_some_and(|s| s.term == configuration.term)
            && !self.silent(now);
        (self.serving().is_some() || heard).then_some(&configuration.primary)
    }

    /// As what PostgreSQL is to run.
    #[must_use]
    pub fn wanted(&self) -> Wanted<I> {
        match &self.role {
            _ if self.local == Local::Leading => Wanted::Primary,
            _ if self.fenced => Wanted::Nothing,
            _ if self.durable.rebuilding && self.copying => self
                .durable
                .configuration
                .as_ref()
                .map_or(Wanted::CopyOfAnyone, |c| Wanted::Copy(c.primary.clone())),
            _ if self.durable.rebuilding && self.durable.history.is_empty() => Wanted::CopyOfAnyone,
            _ => Wanted::Standby,
        }
    }

    /// What happened, and what to do about it.
    #[must_use]
    pub fn step(&mut self, now: Millis, event: Event<I>) -> Vec<Effect<I>> {
        match event {
            Event::Tick => {}
            Event::Message { from, message } => self.message(now, from, message),
            Event::Dead(peer) => self.on_dead(now, &peer),
            Event::Standby { end } => self.on_standby(end),
            Event::Received { from, end } => self.on_received(&from, end),
            Event::Cut { end } => self.on_cut(now, end),
            Event::Enforced { rule, position } => self.on_enforced(now, &rule, position),
            Event::Promoted { timeline, start } => self.on_promoted(now, timeline, start),
            Event::Standbys {
                position,
                streaming,
            } => self.on_standbys(now, position, streaming),
            Event::Rebuilt { history } => self.on_rebuilt(history),
            Event::Lost { wiped } => self.on_lost(now, wiped),
            Event::Stranded => self.rebuild(),
            Event::Wish(wish) => self.wish = Some(wish),
            Event::HandOver(to) => self.hand_over(now, to.as_ref()),
            Event::Stopped { end } => self.on_stopped(now, end),
            Event::Fence(fenced) => {
                self.fenced = fenced;
                if fenced {
                    self.hand_over(now, None);
                }
            }
            Event::AcceptLoss => self.accept_loss(now),
        }
        self.tick(now);
        std::mem::take(&mut self.out)
    }

    fn message(&mut self, now: Millis, from: I, mut message: Message<I>) {
        if let Some(history) = message.history_mut() {
            // An earlier version sends all of them.
            *history = newest(std::mem::take(history), self.kept);
        }
        match message {
            Message::Heartbeat {
                configuration,
                seq,
                history,
                position,
            } => self.on_heartbeat(now, &from, configuration, seq, history, position),
            Message::Heard {
                seq,
                term,
                promised,
                coordinator,
            } => self.on_heard(now, from, seq, term, promised, coordinator.as_ref()),
            Message::PreVote { term } => self.on_pre_vote(now, &from, term),
            Message::PreVoted {
                term,
                granted,
                promised,
                configuration,
            } => self.on_pre_voted(now, from, term, granted, promised, configuration.as_ref()),
            Message::RequestVote {
                term,
                renewal,
                farewell,
            } => self.on_request_vote(now, from, term, renewal, farewell),
            Message::Vote {
                term,
                copy,
                configuration,
            } => self.on_vote(now, from, term, copy, configuration),
            Message::Refused { term, promised } => self.on_refused(now, term, promised),
            Message::Level { term, history, end } => self.on_level(from, term, &history, end),
            Message::Levelled { term, end } => self.on_levelled(now, &from, term, end),
            Message::Accept {
                configuration,
                history,
            } => self.on_accept(now, &from, configuration, history),
            Message::Accepted { term, version } => self.on_accepted(now, from, term, version),
            Message::Farewell { term, successor } => self.on_farewell(now, &from, term, successor),
        }
    }

    fn tick(&mut self, now: Millis) {
        #[cfg(test)]
        if self.passive && matches!(self.role, Role::Voter) {
            return;
        }
        match &self.role {
            Role::Voter | Role::PreVoting { .. } => self.tick_candidate(now),
            Role::Electing(_) => self.tick_election(now),
            Role::Primary(_) => self.tick_primary(now),
        }
    }

    // --- what several parts need

    pub(super) fn persist(&mut self) {
        self.out.push(Effect::Persist(self.durable.clone()));
    }

    pub(super) fn send(&mut self, to: &I, message: Message<I>) {
        if *to != self.me {
            self.out.push(Effect::Send(to.clone(), message));
        }
    }

    pub(super) fn tell(&mut self, story: Story<I>) {
        self.out.push(Effect::Tell(story));
    }

    /// Begins to cut for `pending`. A later reason replaces an earlier one; whoever waits for the earlier asks
    /// again. A retreat waits for nothing, so it never replaces a vote.
    pub(super) fn cut(&mut self, pending: Pending<I>) {
        if !(pending == Pending::Retreat && self.pending.is_some()) {
            self.pending = Some(pending);
        }
        self.cutting += 1;
        self.out.push(Effect::Cut);
    }

    pub(super) fn note_term(&mut self, term: Term) {
        self.highest = self.highest.max(term);
    }

    pub(super) fn note_configuration(&mut self, configuration: &Configuration<I>) {
        self.note_term(configuration.term);
        if self
            .latest
            .as_ref()
            .is_none_or(|l| l.at() < configuration.at())
        {
            self.latest = Some(configuration.clone());
        }
    }

    /// Whether the primary hasn't been heard for the detection time, or is known to be down.
    pub(super) fn silent(&self, now: Millis) -> bool {
        let Some(configuration) = &self.durable.configuration else {
            return true;
        };
        if configuration.primary == self.me {
            return !matches!(self.role, Role::Primary(_));
        }
        self.gone == Some(configuration.term) || now >= self.heard + self.timing.detection
    }

    /// The witness, if the primary hasn't been heard for two heartbeats: whoever looks at it now needn't watch
    /// it for the whole detection time once the primary counts as dead. Before, nobody needs to.
    #[must_use]
    pub fn doubts(&self, now: Millis) -> Option<&I> {
        let configuration = self.durable.configuration.as_ref()?;
        let follows =
            configuration.primary != self.me && configuration.may_be_primary.contains(&self.me);
        let unheard = now >= self.heard + self.timing.heartbeat * 2;
        (follows && unheard).then_some(configuration.witness.as_ref())?
    }

    /// Whether the primary of `term` is known to be down, by a sign and not by silence: so that whoever acts
    /// for the witness needn't wait either.
    #[must_use]
    pub fn knows_dead(&self, term: Term) -> bool {
        self.gone == Some(term)
    }

    /// A number below `bound` that differs from instance to instance.
    pub(super) fn chance(&mut self, bound: Millis) -> Millis {
        // xorshift64*: a delay needs no better randomness.
        self.random ^= self.random << 13;
        self.random ^= self.random >> 7;
        self.random ^= self.random << 17;
        self.random.wrapping_mul(0x2545_F491_4F6C_DD1D) % bound.max(1)
    }

    /// The end of the copy, if it is known for certain and counts as data.
    pub(super) fn known_end(&self) -> Option<Lsn> {
        if self.durable.rebuilding {
            return None;
        }
        match &self.local {
            Local::Standing { end } => Some(*end),
            Local::Down { end } => *end,
            Local::Following { .. } | Local::Leading => None,
        }
    }

    /// Everybody who gets heartbeats: voters, and those who are to become voters.
    pub(super) fn audience(&self) -> BTreeSet<I> {
        let mut all = BTreeSet::new();
        if let Some(configuration) = &self.durable.configuration {
            all.extend(configuration.voters.iter().cloned());
        }
        if let Role::Primary(primary) = &self.role {
            all.extend(primary.committed.voters.iter().cloned());
        }
        if let Some(wish) = &self.wish {
            all.extend(wish.voters.iter().cloned());
        }
        all.remove(&self.me);
        all
    }

    /// Streams from `upstream`, whose eras are `history`; they are on disk before anything is received.
    pub(super) fn follow(&mut self, upstream: &I, history: &History, end: Lsn) {
        if self.durable.history != *history {
            self.durable.history.clone_from(history);
            self.persist();
        }
        self.local = Local::Following {
            upstream: upstream.clone(),
            end,
        };
        self.out.push(Effect::Follow(upstream.clone()));
    }

    /// The configuration by which an election or a change asks.
    pub(super) fn basis(&self) -> Option<&Configuration<I>> {
        self.latest.as_ref()
    }

    /// The store's timing changed.
    pub fn set_timing(&mut self, timing: Timing) {
        self.timing = timing;
    }

    /// Whether a coordinator waits for this copy to become level.
    #[must_use]
    pub fn levelling(&self) -> bool {
        self.levelling.is_some()
    }

    /// The eras of the serving primary's log, as it said last.
    #[must_use]
    pub fn seen_history(&self) -> Option<&History> {
        self.seen.as_ref().map(|s| &s.history)
    }

    /// Latest streaming, for reading.
    #[must_use]
    pub fn streaming(&self) -> BTreeMap<I, super::message::Streaming> {
        match &self.role {
            Role::Primary(primary) => primary.streaming.clone(),
            _ => BTreeMap::new(),
        }
    }
}
