//! The witness: a voter without data and without a mind of its own.
//!
//! Owns what an instance does to the witness's object on its behalf: reads it, lets [`Register::answer`] say
//! what a voter would, and writes it back on the condition that nobody else has written it since. And
//! [`Watch`], by which each instance knows for itself how long the primary has been silent there.
//! Never: holds a copy, starts an election, or knows a time: an object in an API server has no clock.

use serde::{Deserialize, Serialize};

use super::message::Message;
use super::types::{Configuration, Id, Millis, Term};

/// What the object holds.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Register<I: Id> {
    /// The witness's own identity: the object's uid.
    pub me: I,
    /// The highest term promised.
    pub promised: Term,
    /// To whom.
    pub coordinator: Option<I>,
    /// The latest configuration accepted.
    pub configuration: Option<Configuration<I>>,
    /// The latest heartbeat written there: its term and number.
    pub beat: (Term, u64),
}

impl<I: Id> Register<I> {
    /// A new one. A witness deleted or restored from an old backup is another voter, with another identity.
    #[must_use]
    pub fn new(me: I) -> Self {
        Self {
            me,
            promised: 0,
            coordinator: None,
            configuration: None,
            beat: (0, 0),
        }
    }

    fn at(&self) -> (Term, u64) {
        self.configuration
            .as_ref()
            .map_or((0, 0), Configuration::at)
    }

    /// What the witness says to `message` from `from`. `silent`: the instance that acts for it has seen no
    /// new heartbeat here for the detection time, or knows the primary of this configuration to be down. If
    /// this changed, the answer holds only once it's written back.
    pub fn answer(&mut self, silent: bool, from: &I, message: &Message<I>) -> Option<Message<I>> {
        match message {
            Message::Heartbeat {
                configuration, seq, ..
            } => self.on_heartbeat(from, configuration, *seq),
            Message::PreVote { term } => Some(Message::PreVoted {
                term: *term,
                granted: *term > self.promised && (silent || self.asked_by_primary(from, *term)),
                promised: self.promised,
                configuration: self.configuration.clone(),
            }),
            Message::RequestVote {
                term,
                renewal,
                farewell,
            } => Some(self.on_request_vote(silent, from, *term, *renewal, *farewell)),
            Message::Accept { configuration, .. } if configuration.primary == *from => {
                let (term, version) = configuration.at();
                if self.configuration.as_ref() == Some(configuration) || self.accept(configuration)
                {
                    Some(Message::Accepted { term, version })
                } else {
                    Some(self.refuse(term))
                }
            }
            _ => None,
        }
    }

    fn refuse(&self, term: Term) -> Message<I> {
        Message::Refused {
            term,
            promised: self.promised,
        }
    }

    /// A primary that asks for votes has stopped serving.
    fn asked_by_primary(&self, from: &I, term: Term) -> bool {
        self.configuration
            .as_ref()
            .is_some_and(|c| c.primary == *from && term > c.term)
    }

    fn on_request_vote(
        &mut self,
        silent: bool,
        from: &I,
        term: Term,
        renewal: Option<(Term, u64)>,
        farewell: Option<Term>,
    ) -> Message<I> {
        let mine = term == self.promised && self.coordinator.as_ref() == Some(from);
        if term < self.promised || (term == self.promised && !mine) {
            return self.refuse(term);
        }
        let granted = match renewal {
            // The sitting primary raises its own term: nobody else's configuration stands against it.
            Some(at) => self.at() <= at,
            None => {
                let told = farewell.is_some() && farewell == Some(self.at().0);
                mine || silent || told || self.asked_by_primary(from, term)
            }
        };
        if !granted {
            return self.refuse(term);
        }
        self.promised = term;
        self.coordinator = Some(from.clone());
        Message::Vote {
            term,
            copy: None,
            configuration: self.configuration.clone(),
        }
    }

    fn accept(&mut self, new: &Configuration<I>) -> bool {
        // A promise of the same term to another doesn't stand against it; see `Node::acceptable`.
        let acceptable = new.at() > self.at() && new.term >= self.promised;
        if acceptable {
            self.promised = new.term;
            self.coordinator = Some(new.primary.clone());
            self.configuration = Some(new.clone());
            // The new primary's first lease counts from when it asked.
            self.beat = self.beat.max((new.term, 0));
        }
        acceptable
    }

    fn on_heartbeat(
        &mut self,
        from: &I,
        configuration: &Configuration<I>,
        seq: u64,
    ) -> Option<Message<I>> {
        let term = configuration.term;
        if configuration.primary != *from {
            return None;
        }
        let stands_against = term < self.promised && self.coordinator.as_ref() != Some(from);
        if !stands_against {
            if configuration.at() > self.at() && !self.accept(configuration) {
                return None;
            }
            self.beat = self.beat.max((term, seq));
        }
        Some(Message::Heard {
            seq,
            term,
            promised: self.promised,
            coordinator: self.coordinator.clone(),
        })
    }
}

/// How long the primary has been silent at the witness, as one instance has seen it with its own clock.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub struct Watch {
    last: Option<((Term, u64), Millis)>,
}

impl Watch {
    /// Looks at the register's beat, read at some moment not before `asked`.
    pub fn look(&mut self, now: Millis, beat: (Term, u64)) {
        if self.last.is_none_or(|(last, _)| last != beat) {
            self.last = Some((beat, now));
        }
    }

    /// Whether what was read, in a read that began at `asked`, had not changed for `detection`.
    #[must_use]
    pub fn silent(&self, asked: Millis, detection: Millis) -> bool {
        self.last
            .is_some_and(|(_, since)| asked >= since + detection)
    }
}
