//! What an instance does with the effects of its node.

use super::oracle::V;
use super::postgres::State;
use super::world::{Ev, World};
use crate::failover::{Effect, Era, Event, Lsn, Message, Term, Wanted, held};

impl World {
    pub fn tell(&mut self, i: usize, boot: u64, run: Option<u64>, event: Event<V>) {
        let slot = &mut self.slots[i];
        if slot.boot != boot || !slot.up || run.is_some_and(|r| r != slot.pg.run) {
            return;
        }
        if matches!(event, Event::Lost { .. }) {
            slot.pg.reported = true;
        }
        if self.quiet && matches!(event, Event::Wish(_)) {
            // An older one may have been held up; the latest always follows it.
            let wish = self.wish.clone();
            return self.step(i, Event::Wish(wish));
        }
        self.step(i, event);
    }

    pub fn step(&mut self, i: usize, event: Event<V>) {
        let now = self.now;
        let Some(node) = self.slots[i].node.as_mut() else {
            return;
        };
        let quick = matches!(
            event,
            Event::Tick | Event::Received { .. } | Event::Standbys { .. }
        ) || matches!(
            &event,
            Event::Message {
                message: Message::Heartbeat { .. } | Message::Heard { .. },
                ..
            }
        );
        let said = (self.trace.is_some() && !quick).then(|| format!("{event:?}"));
        let effects = node.step(now, event);
        if let Some(said) = said {
            self.log(|| format!("{i} <- {said}"));
        }
        // A crash may come between any two of them.
        let crash = (!self.quiet
            && self.plan.torn > 0
            && self.rng.one_in(self.plan.torn)
            && !effects.is_empty())
        .then(|| self.rng.range(0, effects.len() as u64 + 1) as usize);
        for (n, effect) in effects.into_iter().enumerate() {
            if crash == Some(n) {
                self.crash(i);
                let delay = self.rng.range(20, 2_000);
                return self.at(delay, Ev::Restart { slot: i });
            }
            self.execute(i, effect);
        }
    }

    pub fn execute(&mut self, i: usize, effect: Effect<V>) {
        let quick = matches!(
            &effect,
            Effect::Send(_, Message::Heartbeat { .. } | Message::Heard { .. })
                | Effect::Serve { .. }
        );
        if self.trace.is_some() && !quick {
            let line = format!("{i} -> {effect:?}");
            self.log(|| line);
        }
        let boot = self.slots[i].boot;
        match effect {
            Effect::Persist(durable) => {
                if let Some(c) = &durable.configuration {
                    self.oracle.configuration(c);
                }
                self.slots[i].disk = durable;
            }
            Effect::Send(to, message) => {
                self.check_sent(i, &message);
                self.send(i, to, message);
            }
            Effect::Cut => {
                let first = self.rng.range(1, 15);
                let slow = if self.slots[i].pg.slow {
                    self.rng.range(0, 1_500)
                } else {
                    0
                };
                let mut second = first + self.rng.range(0, 15) + slow;
                if self.far > 0 {
                    let begin = self.slots[i].cutting.max(self.now) - self.now;
                    second = begin + second + self.rng.range(50, 150);
                    self.slots[i].cutting = self.now + second;
                }
                self.at(first, Ev::CutReceiver { slot: i, boot });
                self.at(second, Ev::CutDone { slot: i, boot });
            }
            Effect::Follow(upstream) => {
                let pg = &mut self.slots[i].pg;
                if pg.state == State::Standby {
                    pg.upstream = Some(upstream);
                    pg.follow += 1;
                    pg.refused = None;
                    let follow = pg.follow;
                    let (connection, id) = (pg.connection.take(), self.slots[i].id);
                    if let Some(c) = connection {
                        self.hang_up(i, id, &c);
                    }
                    let delay = self.rng.range(1, 30);
                    self.at(delay, Ev::Connect { slot: i, follow });
                }
            }
            Effect::Rebuild { from, history } => {
                self.stop_postgres(i, State::Down);
                // A clone leaves nothing of the old copy, a rewind that hasn't begun leaves all.
                let (kind, share) = (self.rng.range(0, 3), self.rng.range(0, 100) as usize);
                let pg = &mut self.slots[i].pg;
                if kind == 0 {
                    pg.copy = false;
                } else if kind == 1 {
                    // A rewind that ends half-way leaves something that starts, and lacks what was there.
                    let most = pg.wal.recs.len() * share / 100;
                    pg.wal.recs.truncate(most.max(1));
                    pg.wal
                        .lines
                        .retain(|(_, start)| *start == 0 || *start < most);
                }
                let delay = self.rng.range(50, 1_500);
                let run = self.slots[i].pg.run;
                self.at(
                    delay,
                    Ev::Copied {
                        slot: i,
                        boot,
                        run,
                        from,
                        history,
                    },
                );
            }
            Effect::Enforce(rule) => {
                let until = self.rng.range(1, 60);
                let pg = &mut self.slots[i].pg;
                if pg.runs() {
                    pg.rules.push(rule.clone());
                    let at = (self.now + until).max(pg.enforced_at + 1);
                    pg.enforced_at = at;
                    let run = pg.run;
                    let delay = at - self.now;
                    self.at(
                        delay,
                        Ev::Enforced {
                            slot: i,
                            boot,
                            run,
                            rule,
                        },
                    );
                }
            }
            Effect::Promote => self.promote(i),
            Effect::Serve { until } => {
                let now = self.now;
                let pg = &mut self.slots[i].pg;
                if pg.leads() {
                    pg.until = until;
                    let run = pg.run;
                    self.at(until.saturating_sub(now), Ev::Expire { slot: i, run });
                }
            }
            Effect::StopCleanly => {
                let pg = &mut self.slots[i].pg;
                if pg.state == State::Primary {
                    pg.state = State::Stopping;
                    let (id, term, run, now) = (self.ids + 1, pg.term, pg.run, self.now);
                    self.ids = id;
                    self.slots[i].pg.wal.append(id, term, false);
                    self.at(
                        20,
                        Ev::Closing {
                            slot: i,
                            boot,
                            run,
                            since: now,
                        },
                    );
                }
            }
            Effect::Tell(_) => {}
        }
    }

    /// Without eras that never began. A member may have accepted a configuration whose primary then followed
    /// somebody else instead of being promoted, and passed that on; no copy can hold more of such an era.
    pub fn begun(&self, history: &[Era]) -> Vec<(Term, Lsn)> {
        let real = |e: &&Era| e.term == 1 || self.oracle.promoted.contains_key(&e.term);
        history
            .iter()
            .filter(real)
            .map(|e| (e.term, e.start))
            .collect()
    }

    /// What is voted as data has to be what is there.
    pub fn check_sent(&mut self, i: usize, message: &Message<V>) {
        if let Message::Accept { configuration, .. } = message {
            self.oracle.configuration(configuration);
        }
        if let Message::Heartbeat { configuration, .. } = message {
            self.oracle.agreed = self.oracle.agreed.max(configuration.at());
        }
        if let Message::Vote {
            copy: Some(copy),
            configuration: Some(c),
            ..
        } = message
            && c.at() >= self.oracle.agreed
            && (c.primary == self.slots[i].id || c.sync.members.contains(&self.slots[i].id))
        {
            let wal = &self.slots[i].pg.wal;
            let eras = wal.eras(copy.history.first());
            let said = self.begun(held(&copy.history, copy.end));
            // Others may have streamed on from an upstream that was promoted, or followed somebody, without
            // their knowing; that makes them strangers to every later primary, never members.
            let same = said == eras && !said.is_empty();
            if !self.slots[i].pg.copy || !wal.whole() || wal.end() != copy.end || !same {
                let why = format!(
                    "{i} votes {copy:?} but holds {eras:?} up to {} (whole: {}, copy: {})",
                    wal.end(),
                    wal.whole(),
                    self.slots[i].pg.copy
                );
                self.oracle.fail(why);
            }
        }
    }

    /// Starts PostgreSQL if that is wanted and nothing of it runs.
    pub fn keep_running(&mut self, i: usize) {
        let slot = &mut self.slots[i];
        let Some(node) = &slot.node else { return };
        let idle = matches!(slot.pg.state, State::Down | State::Stopped)
            && slot.pg.reported
            && slot.pg.copy;
        if !idle || slot.starting || node.wanted() != Wanted::Standby {
            return;
        }
        slot.starting = true;
        slot.pg.stop(State::Starting);
        let run = slot.pg.run;
        let slow = if slot.pg.slow { 1_500 } else { 0 };
        let delay = self.rng.range(20, 250) + slow;
        self.at(delay, Ev::Started { slot: i, run });
    }

    pub fn started(&mut self, i: usize, run: u64) {
        let slot = &mut self.slots[i];
        if slot.pg.run != run || slot.pg.state != State::Starting {
            return;
        }
        slot.pg.state = State::Standby;
        slot.starting = false;
        let (boot, end) = (slot.boot, slot.pg.wal.end());
        self.step_if(i, boot, Event::Standby { end });
    }

    pub fn step_if(&mut self, i: usize, boot: u64, event: Event<V>) {
        self.tell(i, boot, None, event);
    }

    pub fn cut_receiver(&mut self, i: usize, boot: u64) {
        if self.slots[i].boot != boot {
            return;
        }
        let pg = &mut self.slots[i].pg;
        match pg.state {
            State::Primary | State::Promoting | State::Stopping => {
                self.stop_postgres(i, State::Down);
            }
            _ => {
                pg.upstream = None;
                pg.follow += 1;
                pg.wal.torn = 0;
                let (connection, id) = (pg.connection.take(), self.slots[i].id);
                if let Some(c) = connection {
                    self.hang_up(i, id, &c);
                }
            }
        }
    }

    pub fn cut_done(&mut self, i: usize, boot: u64) {
        let pg = &self.slots[i].pg;
        let end = matches!(pg.state, State::Standby | State::Stopped).then(|| pg.wal.end());
        self.step_if(i, boot, Event::Cut { end });
    }
}
