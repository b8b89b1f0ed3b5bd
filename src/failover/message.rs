//! What instances say to each other, what happens to one, and what it does about it.
//!
//! Owns the three alphabets of the protocol. Every message may be lost, repeated or late; each is idempotent.
//! Never: carries anything of the data.

use std::collections::{BTreeMap, BTreeSet};

use serde::{Deserialize, Serialize};

use super::history::History;
use super::types::{Configuration, Durability, Durable, Id, Lsn, Millis, Rule, Term};

/// A message between voters.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum Message<I: Id> {
    /// Primary → everybody it knows of: I serve, under this configuration.
    Heartbeat {
        /// The latest configuration with a majority.
        configuration: Configuration<I>,
        /// Which heartbeat; an answer names it.
        seq: u64,
        /// The eras of the primary's WAL.
        history: History,
        /// The end of the primary's WAL, a moment ago.
        position: Lsn,
    },
    /// The answer.
    Heard {
        /// Which heartbeat.
        seq: u64,
        /// The term of that heartbeat.
        term: Term,
        /// The answerer's promise.
        promised: Term,
        /// To whom.
        coordinator: Option<I>,
    },
    /// Would you vote for me? Changes nothing.
    PreVote {
        /// The term in which the vote would be.
        term: Term,
    },
    /// The answer.
    PreVoted {
        /// The term asked for.
        term: Term,
        /// Whether it would.
        granted: bool,
        /// Its promise, so that the next attempt asks for a higher one.
        promised: Term,
        /// The latest configuration it has accepted.
        configuration: Option<Configuration<I>>,
    },
    /// Promise me this term.
    RequestVote {
        /// The term.
        term: Term,
        /// The asker is the sitting primary of this (term, version) and takes a voter back that promised a
        /// higher term: nothing changes but the term.
        renewal: Option<(Term, u64)>,
        /// The primary of this term told the asker itself that it has stopped.
        farewell: Option<Term>,
    },
    /// The answer: the promise is kept, and the copy gets nothing from an older primary any more.
    Vote {
        /// The term promised.
        term: Term,
        /// The copy, unless it doesn't count as data.
        copy: Option<Copy>,
        /// The latest configuration accepted.
        configuration: Option<Configuration<I>>,
    },
    /// Not that term: this one is promised already.
    Refused {
        /// The term asked for.
        term: Term,
        /// The promise.
        promised: Term,
    },
    /// Coordinator → voter: stream from me up to `end`, then say so.
    Level {
        /// The term.
        term: Term,
        /// Its eras, the one about to begin included.
        history: History,
        /// Up to where.
        end: Lsn,
    },
    /// The answer.
    Levelled {
        /// The term.
        term: Term,
        /// The end of the copy.
        end: Lsn,
    },
    /// Accept this configuration.
    Accept {
        /// The configuration.
        configuration: Configuration<I>,
        /// The eras of its primary's WAL, the one about to begin included.
        history: History,
    },
    /// The answer: it's on disk.
    Accepted {
        /// Its term.
        term: Term,
        /// Its version.
        version: u64,
    },
    /// Primary → everybody: I have stopped. All that anybody was told is on the sync members.
    Farewell {
        /// The term.
        term: Term,
        /// Who should take over.
        successor: Option<I>,
    },
}

impl<I: Id> Message<I> {
    /// The eras that it carries.
    pub(super) fn history_mut(&mut self) -> Option<&mut History> {
        match self {
            Self::Heartbeat { history, .. }
            | Self::Level { history, .. }
            | Self::Accept { history, .. } => Some(history),
            Self::Vote { copy, .. } => copy.as_mut().map(|c| &mut c.history),
            _ => None,
        }
    }
}

/// A copy as its vote tells it.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Copy {
    /// The end of the last whole record, once everything it received was replayed. Not the last byte
    /// received: that may be in the middle of a record that the next primary overwrites, and would make this
    /// copy look longer than one that holds what was written there instead.
    pub end: Lsn,
    /// Its eras.
    pub history: History,
}

/// A standby as its primary sees it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Streaming {
    /// What it has flushed.
    pub flushed: Lsn,
    /// For how long it has streamed without a break.
    pub since: Millis,
}

/// What the store's object asks the primary for.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub struct Wish<I: Id> {
    /// Who is to vote, the witness included.
    pub voters: BTreeSet<I>,
    /// The witness among them.
    pub witness: Option<I>,
    /// Who may become primary.
    pub may_be_primary: BTreeSet<I>,
    /// Who may not, as the operator says, whatever was agreed before.
    pub barred: BTreeSet<I>,
    /// Whether commits may go on without standbys.
    pub durability: Durability,
}

/// What happens to an instance.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Event<I: Id> {
    /// Time passed. Comes at least every few milliseconds while something is under way.
    Tick,
    /// A message came.
    Message {
        /// From whom; known for certain, by its certificate.
        from: I,
        /// What.
        message: Message<I>,
    },
    /// A peer's death was seen: its address refuses connections.
    Dead(I),
    /// PostgreSQL was started: it runs as a standby without an upstream, and has replayed all that it has. Once
    /// per start, also if it had been told to follow somebody before.
    Standby {
        /// Where that ended.
        end: Lsn,
    },
    /// What a streaming standby has received. Also once it's connected, and again at least every second: a copy
    /// that was made anew counts only after this says that it's level.
    Received {
        /// From whom.
        from: I,
        /// Up to where.
        end: Lsn,
    },
    /// [`Effect::Cut`] is done: nothing here acknowledges anything to anybody any more.
    Cut {
        /// The end of the copy, if it is known when this is handed over (not when the cut was done).
        end: Option<Lsn>,
    },
    /// [`Effect::Enforce`] is done.
    Enforced {
        /// The rule that PostgreSQL now enforces, in every walsender.
        rule: Rule<I>,
        /// The end of the WAL after that.
        position: Lsn,
    },
    /// [`Effect::Promote`] is done: PostgreSQL accepts writes.
    Promoted {
        /// The new timeline.
        timeline: u32,
        /// Where it forked.
        start: Lsn,
    },
    /// What the primary sees of its standbys.
    Standbys {
        /// The end of its WAL.
        position: Lsn,
        /// Who streams.
        streaming: BTreeMap<I, Streaming>,
    },
    /// [`Effect::Rebuild`] is done: the copy is whole, of a primary with these eras.
    Rebuilt {
        /// The eras.
        history: History,
    },
    /// PostgreSQL ended though nobody asked it to, or its volume is gone, or making a new copy failed. Void once
    /// a [`Effect::Cut`] or [`Effect::Rebuild`] has ended that same PostgreSQL.
    Lost {
        /// Nothing of the copy is left.
        wiped: bool,
    },
    /// Following came to nothing: the upstream can't continue this copy, whatever the histories say.
    Stranded,
    /// What the store asks for (acted upon by the primary only).
    Wish(Wish<I>),
    /// Hand over to this instance, or to the best one.
    HandOver(Option<I>),
    /// The hand-over's clean stop is done; this is the end of the WAL, all of it flushed by a sync member.
    Stopped {
        /// The end of the WAL.
        end: Option<Lsn>,
    },
    /// Take no part as a candidate (fenced by hand), or take part again.
    Fence(bool),
    /// A person accepts that commits are lost: become primary with what is here.
    AcceptLoss,
}

/// What an instance does, in this order. What is to be on disk comes before what is said.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Effect<I: Id> {
    /// Write this down before anything after it.
    Persist(Durable<I>),
    /// Send.
    Send(I, Message<I>),
    /// Make certain that nothing here acknowledges any more, nor admits clients as a primary: end the
    /// receiver, or, if PostgreSQL is or becomes a primary, stop it at once. Answered by [`Event::Cut`].
    Cut,
    /// Stream from this instance; nothing if PostgreSQL isn't up ([`Event::Standby`] comes when it is).
    Follow(I),
    /// Make a new copy of this instance's, or rewind to it, instead of any that is being made. Answered by
    /// [`Event::Rebuilt`], or [`Event::Lost`] if it fails: wiped unless the old copy is untouched.
    Rebuild {
        /// From whom.
        from: I,
        /// Its eras, for the answer.
        history: History,
    },
    /// Have PostgreSQL enforce this rule. Answered by [`Event::Enforced`].
    Enforce(Rule<I>),
    /// Become primary, under the rule enforced. Answered by [`Event::Promoted`].
    Promote,
    /// The lease: PostgreSQL may accept writes until then.
    Serve {
        /// On the boot-time clock.
        until: Millis,
    },
    /// Stop PostgreSQL so that standbys get all of it. Answered by [`Event::Stopped`].
    StopCleanly,
    /// Something worth telling.
    Tell(Story<I>),
}

/// A milestone of a failover.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Story<I: Id> {
    /// The primary counts as dead.
    Detected {
        /// Which.
        primary: Option<I>,
        /// Seen directly, or silent for too long.
        direct: bool,
    },
    /// Enough voters have cut themselves off.
    Fenced {
        /// The term.
        term: Term,
    },
    /// A majority accepted.
    Elected {
        /// The term.
        term: Term,
    },
    /// It accepts writes.
    Promoted {
        /// The term.
        term: Term,
    },
    /// A primary stopped serving.
    SteppedDown {
        /// The term.
        term: Term,
        /// Why.
        why: &'static str,
    },
    /// An election came to nothing.
    Stuck(&'static str),
}
