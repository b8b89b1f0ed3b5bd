//! The world of the simulation: virtual time, a network, instances that do what their nodes say.

use std::collections::{BTreeMap, BTreeSet};

use super::chaos::Plan;
use super::oracle::{Oracle, V};
use super::postgres::{Connection, Postgres, Rec, Sender, State, Wal};
use crate::failover::planted::Mistake;
use crate::failover::{
    Configuration, Durable, Effect, Era, Event, History, Local, Message, Millis, Node, Register,
    Role, Rule, Streaming, Term, Timing, Wanted, Watch, Wish, held,
};

/// The only source of randomness.
#[derive(Clone)]
pub struct Rng(u64);

impl Rng {
    pub fn new(seed: u64) -> Self {
        Self(seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) ^ 0x1234_5678_9ABC_DEF1)
    }
    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ (z >> 31)
    }
    /// From `from` up to, not including, `to`.
    pub fn range(&mut self, from: u64, to: u64) -> u64 {
        from + self.next() % (to - from).max(1)
    }
    pub fn one_in(&mut self, n: u64) -> bool {
        self.next().is_multiple_of(n)
    }
    pub fn pick<T: Clone>(&mut self, of: &[T]) -> Option<T> {
        let i = self.range(0, of.len() as u64) as usize;
        of.get(i).cloned()
    }
}

#[derive(Clone, Debug)]
pub enum Ev {
    Tick {
        slot: usize,
        boot: u64,
    },
    Deliver {
        slot: usize,
        from: V,
        to: V,
        message: Message<V>,
    },
    /// Something that the agent of `boot` learns of its PostgreSQL; void if that has been started anew.
    Tell {
        slot: usize,
        boot: u64,
        run: Option<u64>,
        event: Event<V>,
    },
    CutReceiver {
        slot: usize,
        boot: u64,
    },
    CutDone {
        slot: usize,
        boot: u64,
    },
    Started {
        slot: usize,
        run: u64,
    },
    Connect {
        slot: usize,
        follow: u64,
    },
    Pull {
        slot: usize,
        connection: u64,
    },
    Arrive {
        slot: usize,
        connection: u64,
        recs: Vec<Rec>,
        torn: u64,
        lines: Vec<(u32, usize)>,
        newest: u32,
    },
    Ack {
        slot: usize,
        run: u64,
        from: V,
        connection: u64,
        flushed: u64,
    },
    Closed {
        slot: usize,
        run: u64,
        from: V,
        connection: u64,
    },
    Enforced {
        slot: usize,
        boot: u64,
        run: u64,
        rule: Rule<V>,
    },
    Promoted {
        slot: usize,
        boot: u64,
        run: u64,
        configuration: Configuration<V>,
    },
    Write {
        slot: usize,
        run: u64,
    },
    Poll {
        slot: usize,
        boot: u64,
        run: u64,
    },
    Expire {
        slot: usize,
        run: u64,
    },
    Copied {
        slot: usize,
        boot: u64,
        run: u64,
        from: V,
        history: History,
    },
    Closing {
        slot: usize,
        boot: u64,
        run: u64,
        since: Millis,
    },
    /// A request to the witness's object: read, and written back if nobody else has.
    Read {
        slot: usize,
        boot: u64,
        message: Option<Message<V>>,
        asked: Millis,
    },
    Decide {
        slot: usize,
        boot: u64,
        message: Option<Message<V>>,
        asked: Millis,
        version: u64,
        register: Register<V>,
    },
    Write2 {
        slot: usize,
        boot: u64,
        version: u64,
        register: Register<V>,
        answer: Message<V>,
    },
    Watch {
        slot: usize,
        boot: u64,
    },
    Restart {
        slot: usize,
    },
    Thaw {
        slot: usize,
    },
    Chaos,
    Heal {
        a: usize,
        b: usize,
    },
}

pub struct Slot {
    pub id: V,
    pub boot: u64,
    pub up: bool,
    pub frozen: bool,
    pub held: Vec<Ev>,
    pub node: Option<Node<V>>,
    pub disk: Durable<V>,
    pub pg: Postgres,
    pub starting: bool,
    pub watch: Watch,
}

/// Slot number of the witness, as the network knows it.
pub const WITNESS: usize = 9;

pub struct World {
    pub now: Millis,
    pub rng: Rng,
    pub slots: Vec<Slot>,
    pub witness: Option<(Register<V>, u64)>,
    pub timing: Timing,
    pub wish: Wish<V>,
    pub blocked: BTreeSet<(usize, usize)>,
    pub plan: Plan,
    pub quiet: bool,
    pub oracle: Oracle,
    pub trace: Option<Vec<String>>,
    pub ids: u64,
    pub steps: u64,
    pub mistake: Option<Mistake>,
    queue: BTreeMap<(Millis, u64), Ev>,
    sequence: u64,
}

impl World {
    pub fn new(
        seed: u64,
        instances: usize,
        timing: Timing,
        plan: Plan,
        wish: Wish<V>,
        mistake: Option<Mistake>,
    ) -> Self {
        let mut world = Self {
            now: 1000,
            rng: Rng::new(seed),
            slots: Vec::new(),
            witness: wish.witness.map(|w| (Register::new(w), 0)),
            timing,
            blocked: BTreeSet::new(),
            plan,
            quiet: true,
            oracle: Oracle {
                honest: true,
                ..Oracle::default()
            },
            trace: None,
            ids: 0,
            steps: 0,
            mistake,
            queue: BTreeMap::new(),
            sequence: 0,
            wish,
        };
        for i in 0..instances {
            let mut slot = Slot {
                id: i as V,
                boot: 0,
                up: false,
                frozen: false,
                held: Vec::new(),
                node: None,
                disk: Durable::default(),
                pg: Postgres::new(),
                starting: false,
                watch: Watch::default(),
            };
            if i == 0 {
                slot.disk = Node::founding(&0, world.wish.durability);
                slot.pg.copy = true;
                slot.pg.wal.lines.push((1, 0));
                slot.pg.wal.newest = 1;
                slot.pg.wal.append(1, 1, false);
            }
            world.slots.push(slot);
            world.start(i);
        }
        world.ids = 1;
        world
    }

    pub fn log(&mut self, line: impl FnOnce() -> String) {
        if let Some(trace) = &mut self.trace {
            trace.push(format!("{:>7} {}", self.now, line()));
        }
    }

    pub fn at(&mut self, delay: Millis, ev: Ev) {
        self.sequence += 1;
        self.queue.insert((self.now + delay, self.sequence), ev);
    }

    pub fn by_id(&self, id: V) -> Option<usize> {
        self.slots.iter().position(|s| s.id == id)
    }

    pub fn reaches(&self, a: usize, b: usize) -> bool {
        !self.blocked.contains(&(a, b))
    }

    /// Both ways, as TCP needs it.
    fn connected(&self, a: usize, b: usize) -> bool {
        self.reaches(a, b) && self.reaches(b, a)
    }

    // --- life and death

    pub fn start(&mut self, i: usize) {
        let seed = self.rng.next();
        let slot = &mut self.slots[i];
        slot.boot += 1;
        slot.up = true;
        slot.frozen = false;
        slot.starting = false;
        slot.watch = Watch::default();
        let mut node = Node::new(slot.id, slot.disk.clone(), self.timing, self.now, seed);
        node.planted = self.mistake;
        slot.node = Some(node);
        let (boot, copy) = (slot.boot, slot.pg.copy);
        self.log(|| format!("{i} starts"));
        let wish = self.wish.clone();
        self.at(1, Ev::Tick { slot: i, boot });
        self.at(
            2,
            Ev::Tell {
                slot: i,
                boot,
                run: None,
                event: Event::Wish(wish),
            },
        );
        if !copy {
            self.at(
                1,
                Ev::Tell {
                    slot: i,
                    boot,
                    run: None,
                    event: Event::Lost { wiped: true },
                },
            );
        }
        if self.witness.is_some() {
            self.at(3, Ev::Watch { slot: i, boot });
        }
    }

    pub fn crash(&mut self, i: usize) {
        self.log(|| format!("{i} crashes"));
        let slot = &mut self.slots[i];
        slot.up = false;
        slot.frozen = false;
        slot.held.clear();
        slot.node = None;
        slot.boot += 1;
        self.stop_postgres(i, State::Down);
    }

    /// Ends PostgreSQL; the connections of others to it are gone.
    pub fn stop_postgres(&mut self, i: usize, state: State) {
        let slot = &mut self.slots[i];
        let connection = slot.pg.connection.clone();
        let id = slot.id;
        slot.pg.stop(state);
        slot.pg.reported = true;
        slot.starting = false;
        if let Some(c) = connection {
            self.hang_up(i, id, &c);
        }
    }

    fn hang_up(&mut self, i: usize, id: V, c: &Connection) {
        if self.reaches(i, c.slot) {
            let delay = self.wire();
            self.at(
                delay,
                Ev::Closed {
                    slot: c.slot,
                    run: c.run,
                    from: id,
                    connection: c.id,
                },
            );
        }
    }

    /// PostgreSQL ends by itself under a living agent.
    pub fn postgres_crash(&mut self, i: usize) {
        if !self.slots[i].pg.runs() {
            return;
        }
        self.log(|| format!("{i} postgres ends"));
        self.stop_postgres(i, State::Down);
        self.slots[i].pg.reported = false;
        let (boot, run) = (self.slots[i].boot, Some(self.slots[i].pg.run));
        let delay = self.rng.range(1, 30);
        let event = Event::Lost { wiped: false };
        self.at(
            delay,
            Ev::Tell {
                slot: i,
                boot,
                run,
                event,
            },
        );
    }

    /// The delay of a packet.
    pub fn wire(&mut self) -> Millis {
        if self.quiet || !self.rng.one_in(self.plan.late) {
            return self.rng.range(1, 6);
        }
        self.rng.range(5, 2_000)
    }

    fn send(&mut self, i: usize, to: V, message: Message<V>) {
        let from = self.slots[i].id;
        if self.witness.as_ref().is_some_and(|(w, _)| w.me == to) {
            let boot = self.slots[i].boot;
            return self.ask_witness(i, boot, Some(message));
        }
        let Some(j) = self.by_id(to) else { return };
        if !self.reaches(i, j) || (!self.quiet && self.rng.one_in(self.plan.loss)) {
            return;
        }
        let delay = self.wire();
        if !self.quiet && self.rng.one_in(self.plan.repeat) {
            let later = self.rng.range(1, 1_500);
            self.at(
                later,
                Ev::Deliver {
                    slot: j,
                    from,
                    to,
                    message: message.clone(),
                },
            );
        }
        self.at(
            delay,
            Ev::Deliver {
                slot: j,
                from,
                to,
                message,
            },
        );
    }

    fn ask_witness(&mut self, i: usize, boot: u64, message: Option<Message<V>>) {
        if self.connected(i, WITNESS) {
            let (delay, asked) = (self.wire(), self.now);
            self.at(
                delay,
                Ev::Read {
                    slot: i,
                    boot,
                    message,
                    asked,
                },
            );
        }
    }

    // --- the loop

    /// Does what comes next, if it comes before `until`.
    pub fn next(&mut self, until: Millis) -> bool {
        let Some((&(at, n), _)) = self.queue.first_key_value() else {
            return false;
        };
        if at > until {
            self.now = until;
            return false;
        }
        self.now = at;
        self.steps += 1;
        let Some(ev) = self.queue.remove(&(at, n)) else {
            return false;
        };
        self.handle(ev);
        self.oracle.failure.is_none()
    }

    fn home(ev: &Ev) -> Option<usize> {
        match ev {
            Ev::Tick { slot, .. }
            | Ev::Deliver { slot, .. }
            | Ev::Tell { slot, .. }
            | Ev::CutReceiver { slot, .. }
            | Ev::CutDone { slot, .. }
            | Ev::Started { slot, .. }
            | Ev::Connect { slot, .. }
            | Ev::Pull { slot, .. }
            | Ev::Arrive { slot, .. }
            | Ev::Ack { slot, .. }
            | Ev::Closed { slot, .. }
            | Ev::Enforced { slot, .. }
            | Ev::Promoted { slot, .. }
            | Ev::Write { slot, .. }
            | Ev::Poll { slot, .. }
            | Ev::Expire { slot, .. }
            | Ev::Copied { slot, .. }
            | Ev::Closing { slot, .. }
            | Ev::Decide { slot, .. }
            | Ev::Watch { slot, .. } => Some(*slot),
            Ev::Read { .. }
            | Ev::Write2 { .. }
            | Ev::Restart { .. }
            | Ev::Thaw { .. }
            | Ev::Chaos
            | Ev::Heal { .. } => None,
        }
    }

    fn handle(&mut self, ev: Ev) {
        if let Some(i) = Self::home(&ev)
            && self.slots[i].frozen
        {
            // Whatever comes, waits in buffers.
            self.slots[i].held.push(ev);
            return;
        }
        match ev {
            Ev::Tick { slot, boot } => {
                if self.slots[slot].boot == boot && self.slots[slot].up {
                    let next = self.rng.range(8, 25);
                    self.at(next, Ev::Tick { slot, boot });
                    self.step(slot, Event::Tick);
                    self.keep_running(slot);
                }
            }
            Ev::Deliver {
                slot,
                from,
                to,
                message,
            } => {
                if self.slots[slot].up && self.slots[slot].id == to {
                    self.step(slot, Event::Message { from, message });
                }
            }
            Ev::Tell {
                slot,
                boot,
                run,
                event,
            } => self.tell(slot, boot, run, event),
            Ev::CutReceiver { slot, boot } => self.cut_receiver(slot, boot),
            Ev::CutDone { slot, boot } => self.cut_done(slot, boot),
            Ev::Started { slot, run } => self.started(slot, run),
            Ev::Connect { slot, follow } => self.connect(slot, follow),
            Ev::Pull { slot, connection } => self.pull(slot, connection),
            Ev::Arrive {
                slot,
                connection,
                recs,
                torn,
                lines,
                newest,
            } => {
                let pg = &mut self.slots[slot].pg;
                if pg.connection.as_ref().is_some_and(|c| c.id == connection)
                    && pg.state == State::Standby
                {
                    pg.wal.receive(&recs, torn, &lines, newest);
                    self.report(slot, connection);
                    let delay = self.rng.range(1, 6);
                    self.at(delay, Ev::Pull { slot, connection });
                }
            }
            Ev::Ack {
                slot,
                run,
                from,
                connection,
                flushed,
            } => {
                let pg = &mut self.slots[slot].pg;
                if pg.run == run
                    && let Some(sender) = pg.senders.get_mut(&from)
                    && sender.connection == connection
                {
                    sender.flushed = sender.flushed.max(flushed);
                    self.release(slot);
                }
            }
            Ev::Closed {
                slot,
                run,
                from,
                connection,
            } => {
                let pg = &mut self.slots[slot].pg;
                if pg.run == run
                    && pg
                        .senders
                        .get(&from)
                        .is_some_and(|s| s.connection == connection)
                {
                    pg.senders.remove(&from);
                }
            }
            Ev::Enforced {
                slot,
                boot,
                run,
                rule,
            } => {
                let pg = &mut self.slots[slot].pg;
                if pg.run == run
                    && pg.runs()
                    && let Some(at) = pg.rules.iter().rposition(|r| *r == rule)
                {
                    let last = at + 1 == pg.rules.len();
                    pg.rules.drain(..at);
                    let position = pg.wal.end();
                    if last {
                        self.tell(slot, boot, Some(run), Event::Enforced { rule, position });
                    }
                }
            }
            Ev::Promoted {
                slot,
                boot,
                run,
                configuration,
            } => self.promoted(slot, boot, run, &configuration),
            Ev::Write { slot, run } => self.write(slot, run),
            Ev::Poll { slot, boot, run } => self.poll(slot, boot, run),
            Ev::Expire { slot, run } => {
                // The watchdog beside a stalled agent.
                let pg = &self.slots[slot].pg;
                if pg.run == run && pg.leads() && pg.until > 0 && self.now >= pg.until {
                    self.postgres_crash(slot);
                }
            }
            Ev::Copied {
                slot,
                boot,
                run,
                from,
                history,
            } => self.copied(slot, boot, run, from, history),
            Ev::Closing {
                slot,
                boot,
                run,
                since,
            } => self.closing(slot, boot, run, since),
            Ev::Read {
                slot,
                boot,
                message,
                asked,
            } => {
                if let Some((register, version)) = self.witness.clone()
                    && self.connected(slot, WITNESS)
                {
                    let delay = self.wire();
                    self.at(
                        delay,
                        Ev::Decide {
                            slot,
                            boot,
                            message,
                            asked,
                            version,
                            register,
                        },
                    );
                }
            }
            Ev::Decide {
                slot,
                boot,
                message,
                asked,
                version,
                register,
            } => {
                self.decide(slot, boot, message, asked, version, register);
            }
            Ev::Write2 {
                slot,
                boot,
                version,
                register,
                answer,
            } => {
                if let Some((current, at)) = &mut self.witness
                    && *at == version
                {
                    *at += 1;
                    *current = register;
                    let from = current.me;
                    if self.connected(slot, WITNESS) {
                        let delay = self.wire();
                        let event = Event::Message {
                            from,
                            message: answer,
                        };
                        self.at(
                            delay,
                            Ev::Tell {
                                slot,
                                boot,
                                run: None,
                                event,
                            },
                        );
                    }
                }
            }
            Ev::Watch { slot, boot } => {
                if self.slots[slot].boot == boot && self.slots[slot].up {
                    self.ask_witness(slot, boot, None);
                    let delay = self.timing.heartbeat;
                    self.at(delay, Ev::Watch { slot, boot });
                }
            }
            Ev::Restart { slot } => {
                if !self.slots[slot].up {
                    self.start(slot);
                }
            }
            Ev::Thaw { slot } => self.thaw(slot),
            Ev::Chaos => self.chaos(),
            Ev::Heal { a, b } => {
                self.blocked.remove(&(a, b));
            }
        }
    }

    pub fn thaw(&mut self, i: usize) {
        if !self.slots[i].frozen {
            return;
        }
        self.log(|| format!("{i} thaws"));
        self.slots[i].frozen = false;
        let mut delay = 0;
        for ev in std::mem::take(&mut self.slots[i].held) {
            delay += self.rng.range(0, 2);
            self.at(delay, ev);
        }
    }

    fn decide(
        &mut self,
        i: usize,
        boot: u64,
        message: Option<Message<V>>,
        asked: Millis,
        version: u64,
        mut register: Register<V>,
    ) {
        if self.slots[i].boot != boot || !self.slots[i].up {
            return;
        }
        let now = self.now;
        self.slots[i].watch.look(now, register.beat);
        let Some(message) = message else { return };
        let slot = &self.slots[i];
        let term = register.configuration.as_ref().map_or(0, |c| c.term);
        let silent = slot.watch.silent(asked, self.timing.detection)
            || slot.node.as_ref().is_some_and(|n| n.knows_dead(term))
            || self.mistake == Some(Mistake::WitnessNotWatched);
        let old = register.clone();
        let from = slot.id;
        let Some(answer) = register.answer(silent, &from, &message) else {
            return;
        };
        if register == old {
            let event = Event::Message {
                from: register.me,
                message: answer,
            };
            return self.tell(i, boot, None, event);
        }
        if self.connected(i, WITNESS) {
            let delay = self.wire();
            self.at(
                delay,
                Ev::Write2 {
                    slot: i,
                    boot,
                    version,
                    register,
                    answer,
                },
            );
        }
    }

    // --- the agent

    fn tell(&mut self, i: usize, boot: u64, run: Option<u64>, event: Event<V>) {
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

    fn execute(&mut self, i: usize, effect: Effect<V>) {
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
                let second = first + self.rng.range(0, 15) + slow;
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
    fn begun(&self, history: &[Era]) -> Vec<Era> {
        let real = |e: &&Era| e.term == 1 || self.oracle.promoted.contains_key(&e.term);
        history.iter().filter(real).cloned().collect()
    }

    /// What is voted as data has to be what is there.
    fn check_sent(&mut self, i: usize, message: &Message<V>) {
        if let Message::Accept { configuration, .. } = message {
            self.oracle.configuration(configuration);
        }
        if let Message::Heartbeat { configuration, .. } = message {
            self.oracle.served = self.oracle.served.max(configuration.at());
        }
        if let Message::Vote {
            copy: Some(copy),
            configuration: Some(c),
            ..
        } = message
            && c.at() >= self.oracle.served
            && (c.primary == self.slots[i].id || c.sync.members.contains(&self.slots[i].id))
        {
            let wal = &self.slots[i].pg.wal;
            let eras = wal.eras();
            let said = self.begun(held(&copy.history, copy.end));
            // Others may have streamed on from an upstream that was promoted, or followed somebody, without
            // their knowing; that makes them strangers to every later primary, never members.
            let same = said.len() <= eras.len()
                && said
                    .iter()
                    .zip(&eras)
                    .all(|(a, b)| (a.term, a.start) == (b.term, b.start));
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
    fn keep_running(&mut self, i: usize) {
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

    fn started(&mut self, i: usize, run: u64) {
        let slot = &mut self.slots[i];
        if slot.pg.run != run || slot.pg.state != State::Starting {
            return;
        }
        slot.pg.state = State::Standby;
        slot.starting = false;
        let (boot, end) = (slot.boot, slot.pg.wal.end());
        self.step_if(i, boot, Event::Standby { end });
    }

    fn step_if(&mut self, i: usize, boot: u64, event: Event<V>) {
        self.tell(i, boot, None, event);
    }

    fn cut_receiver(&mut self, i: usize, boot: u64) {
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

    fn cut_done(&mut self, i: usize, boot: u64) {
        let pg = &self.slots[i].pg;
        let end = matches!(pg.state, State::Standby | State::Stopped).then(|| pg.wal.end());
        self.step_if(i, boot, Event::Cut { end });
    }

    // --- replication

    fn connect(&mut self, i: usize, follow: u64) {
        let pg = &self.slots[i].pg;
        let Some(upstream) = pg.upstream else { return };
        if pg.follow != follow || pg.state != State::Standby || pg.connection.is_some() {
            return;
        }
        let again = self.rng.range(20, 150);
        let Some(j) = self.by_id(upstream) else {
            return self.at(again, Ev::Connect { slot: i, follow });
        };
        let reachable = self.slots[j].up
            && !self.slots[j].frozen
            && self.slots[j].pg.runs()
            && self.connected(i, j);
        if !reachable {
            self.slots[i].pg.refused = None;
            return self.at(again, Ev::Connect { slot: i, follow });
        }
        if !self.slots[i].pg.wal.accepts(&self.slots[j].pg.wal) {
            let (now, boot, run) = (self.now, self.slots[i].boot, self.slots[i].pg.run);
            let since = *self.slots[i].pg.refused.get_or_insert(now);
            if now >= since + 1_000 {
                self.slots[i].pg.refused = None;
                self.tell(i, boot, Some(run), Event::Stranded);
            }
            return self.at(again, Ev::Connect { slot: i, follow });
        }
        self.ids += 1;
        let (id, run, now) = (self.ids, self.slots[j].pg.run, self.now);
        let me = self.slots[i].id;
        self.slots[i].pg.connection = Some(Connection { id, slot: j, run });
        self.slots[i].pg.refused = None;
        self.slots[j].pg.senders.insert(
            me,
            Sender {
                connection: id,
                flushed: 0,
                since: now,
                open: true,
            },
        );
        self.report(i, id);
        self.at(
            1,
            Ev::Pull {
                slot: i,
                connection: id,
            },
        );
    }

    fn pull(&mut self, i: usize, connection: u64) {
        let Some(c) = self.slots[i]
            .pg
            .connection
            .clone()
            .filter(|c| c.id == connection)
        else {
            return;
        };
        let j = c.slot;
        let alive = self.slots[j].pg.run == c.run
            && self.slots[j].pg.runs()
            && self.connected(i, j)
            && self.slots[j]
                .pg
                .senders
                .get(&self.slots[i].id)
                .is_some_and(|s| s.connection == connection);
        if !alive {
            let pg = &mut self.slots[i].pg;
            pg.connection = None;
            let follow = pg.follow;
            let me = self.slots[i].id;
            // Its primary notices later, or never.
            self.hang_up(i, me, &c);
            let delay = self.rng.range(20, 150);
            return self.at(delay, Ev::Connect { slot: i, follow });
        }
        let len = self.slots[i].pg.wal.recs.len();
        let up = &self.slots[j].pg.wal;
        if self.slots[j].frozen || up.recs.len() <= len {
            if self.rng.one_in(8) {
                self.report(i, connection);
            }
            let delay = self.rng.range(8, 20);
            return self.at(
                delay,
                Ev::Pull {
                    slot: i,
                    connection,
                },
            );
        }
        let most = self.rng.range(1, 9) as usize;
        let upto = (len + most).min(up.recs.len());
        let recs = up.recs[len..upto].to_vec();
        let torn = if upto < up.recs.len() {
            self.rng.range(0, 8)
        } else {
            0
        };
        let (lines, newest) = (up.lines.clone(), up.lines.last().map_or(0, |(l, _)| *l));
        let delay = self.wire();
        self.at(
            delay,
            Ev::Arrive {
                slot: i,
                connection,
                recs,
                torn,
                lines,
                newest,
            },
        );
    }

    /// Tells the primary what is flushed, and the own agent what was received.
    fn report(&mut self, i: usize, connection: u64) {
        let slot = &self.slots[i];
        let Some(c) = slot.pg.connection.clone().filter(|c| c.id == connection) else {
            return;
        };
        let (from, boot, run, flushed, upstream) = (
            slot.id,
            slot.boot,
            slot.pg.run,
            slot.pg.wal.received(),
            slot.pg.upstream,
        );
        if self.reaches(i, c.slot) {
            let delay = self.wire();
            self.at(
                delay,
                Ev::Ack {
                    slot: c.slot,
                    run: c.run,
                    from,
                    connection,
                    flushed,
                },
            );
        }
        if let Some(upstream) = upstream {
            // The agent of this start of PostgreSQL asks it, so that it never hears of an earlier connection.
            let event = Event::Received {
                from: upstream,
                end: flushed,
            };
            if self.slots[i].up {
                self.tell(i, boot, Some(run), event);
            }
        }
    }

    // --- the primary

    fn promote(&mut self, i: usize) {
        let slot = &mut self.slots[i];
        if slot.pg.state != State::Standby {
            return;
        }
        let Some(configuration) = slot.disk.configuration.clone() else {
            return;
        };
        slot.pg.state = State::Promoting;
        let (boot, run) = (slot.boot, slot.pg.run);
        let slow = if slot.pg.slow {
            self.rng.range(0, 1_500)
        } else {
            0
        };
        let delay = self.rng.range(10, 120) + slow;
        self.at(
            delay,
            Ev::Promoted {
                slot: i,
                boot,
                run,
                configuration,
            },
        );
    }

    fn promoted(&mut self, i: usize, boot: u64, run: u64, configuration: &Configuration<V>) {
        if self.slots[i].pg.run != run || self.slots[i].pg.state != State::Promoting {
            return;
        }
        self.ids += 1;
        let id = self.ids;
        let slot = &mut self.slots[i];
        let (me, term) = (slot.id, configuration.term);
        let wal = slot.pg.wal.clone();
        let (timeline, start) = slot.pg.wal.fork(id, term);
        slot.pg.state = State::Primary;
        slot.pg.term = term;
        slot.pg.until = 0;
        slot.pg.acknowledged = slot.pg.wal.recs.len();
        if slot.pg.rules.last() != Some(&configuration.sync) || slot.pg.rules.len() != 1 {
            let why = format!("{me} promoted before its rule was in force");
            self.oracle.fail(why);
        }
        self.oracle.promotion(me, configuration, &wal);
        self.check_promotion(i, configuration, &wal);
        self.log(|| format!("{i} is primary of term {term} from {start}"));
        let delay = self.rng.range(1, 20);
        self.at(
            delay,
            Ev::Tell {
                slot: i,
                boot,
                run: Some(run),
                event: Event::Promoted { timeline, start },
            },
        );
        self.at(1, Ev::Write { slot: i, run });
        self.at(5, Ev::Poll { slot: i, boot, run });
    }

    /// Whoever is in the new rule holds all that the new primary begins with; and its eras are true.
    fn check_promotion(&mut self, i: usize, configuration: &Configuration<V>, wal: &Wal) {
        let chain = wal.chain();
        for member in &configuration.sync.members {
            let Some(j) = self.by_id(*member) else {
                continue;
            };
            let has = wal.recs.is_empty() || self.slots[j].pg.wal.holds(wal.recs.len() - 1, chain);
            if !has {
                let why = format!(
                    "{i} is promoted in term {} with member {j}, who lacks something",
                    configuration.term
                );
                self.oracle.fail(why);
            }
        }
        let (history, eras) = (self.begun(&self.slots[i].disk.history), wal.eras());
        let same = history.len() == eras.len() + 1
            && history
                .iter()
                .zip(&eras)
                .all(|(a, b)| (a.term, a.start) == (b.term, b.start));
        if !same
            || history.last().map(|e| (e.term, e.start)) != Some((configuration.term, wal.end()))
        {
            let why = format!("{i} is promoted with eras {history:?}, but holds {eras:?}");
            self.oracle.fail(why);
        }
    }

    fn write(&mut self, i: usize, run: u64) {
        let now = self.now;
        let pg = &mut self.slots[i].pg;
        if pg.run != run || pg.state != State::Primary {
            return;
        }
        let open = now < pg.until;
        let commit = open && !self.rng.one_in(5);
        if commit || self.rng.one_in(4) {
            self.ids += 1;
            let id = self.ids;
            let pg = &mut self.slots[i].pg;
            let term = pg.term;
            pg.wal.append(id, term, commit);
            self.release(i);
        }
        let delay = self.rng.range(4, 60);
        self.at(delay, Ev::Write { slot: i, run });
    }

    /// Acknowledges what the rule lets it.
    pub fn release(&mut self, i: usize) {
        let pg = &mut self.slots[i].pg;
        if !pg.leads() {
            return;
        }
        let upto = ((pg.released() / super::postgres::RECORD) as usize).min(pg.wal.recs.len());
        let from = pg.acknowledged;
        if upto <= from {
            return;
        }
        pg.acknowledged = upto;
        let (term, id) = (pg.term, self.slots[i].id);
        let now = self.now;
        for index in from..upto {
            let rec = self.slots[i].pg.wal.recs[index];
            if rec.commit {
                let first = !self.oracle.first.contains_key(&term);
                self.oracle.acknowledge(now, id, term, index, rec.chain);
                if first {
                    self.check_readers(i, term);
                }
            }
        }
    }

    /// Whoever else still admits readers when the first commit of a term is acknowledged.
    fn check_readers(&mut self, i: usize, term: Term) {
        if !self.oracle.honest {
            return;
        }
        for (j, slot) in self.slots.iter().enumerate() {
            if j != i
                && slot.pg.leads()
                && slot.pg.term < term
                && self.now < slot.pg.until
                && slot.up
            {
                let why = format!(
                    "reads: {j} of term {} still serves when {i} acknowledges in term {term}",
                    slot.pg.term
                );
                return self.oracle.fail(why);
            }
        }
    }

    fn poll(&mut self, i: usize, boot: u64, run: u64) {
        if self.slots[i].pg.run != run || !self.slots[i].pg.leads() || self.slots[i].boot != boot {
            return;
        }
        let now = self.now;
        let pg = &self.slots[i].pg;
        let streaming = pg
            .senders
            .iter()
            .filter(|(_, s)| s.open)
            .map(|(id, s)| {
                (
                    *id,
                    Streaming {
                        flushed: s.flushed,
                        since: now - s.since,
                    },
                )
            })
            .collect();
        let position = pg.wal.end();
        self.tell(
            i,
            boot,
            Some(run),
            Event::Standbys {
                position,
                streaming,
            },
        );
        let delay = self.rng.range(20, 60);
        self.at(delay, Ev::Poll { slot: i, boot, run });
    }

    fn closing(&mut self, i: usize, boot: u64, run: u64, since: Millis) {
        let pg = &self.slots[i].pg;
        if pg.run != run || pg.state != State::Stopping {
            return;
        }
        let end = pg.wal.end();
        let all = pg.senders.values().all(|s| s.flushed >= end);
        if !all && self.now < since + 4_000 {
            return self.at(
                20,
                Ev::Closing {
                    slot: i,
                    boot,
                    run,
                    since,
                },
            );
        }
        self.stop_postgres(i, State::Stopped);
        self.step_if(i, boot, Event::Stopped { end: Some(end) });
    }

    fn copied(&mut self, i: usize, boot: u64, run: u64, from: V, history: History) {
        if self.slots[i].boot != boot || !self.slots[i].up || self.slots[i].pg.run != run {
            return;
        }
        let source = self.by_id(from).filter(|j| {
            self.slots[*j].up
                && !self.slots[*j].frozen
                && self.slots[*j].pg.runs()
                && self.connected(i, *j)
        });
        let event = match source {
            Some(j) => {
                let wal = self.slots[j].pg.wal.clone();
                let slot = &mut self.slots[i];
                slot.pg.wal = wal;
                slot.pg.wal.torn = 0;
                slot.pg.copy = true;
                Event::Rebuilt { history }
            }
            None => Event::Lost {
                wiped: !self.slots[i].pg.copy,
            },
        };
        self.step_if(i, boot, event);
    }

    // --- what the quiet phase has to reach

    /// Nobody who may be primary has a copy that counts: the store stays down by right (rule 3).
    pub fn down_by_right(&self) -> bool {
        if self.slots.iter().any(|s| s.pg.leads()) {
            return false;
        }
        let Some(c) = self
            .slots
            .iter()
            .filter_map(|s| s.disk.configuration.as_ref())
            .max_by_key(|c| c.at())
        else {
            return false;
        };
        // It might also have diverged from those who may not.
        self.slots.iter().any(|s| !c.may_be_primary.contains(&s.id))
            || self.slots.iter().all(|s| s.disk.rebuilding)
    }

    /// Why the store isn't whole, if it isn't.
    pub fn short_of(&self) -> Option<String> {
        let serving: Vec<usize> = (0..self.slots.len())
            .filter(|i| {
                self.slots[*i]
                    .node
                    .as_ref()
                    .is_some_and(|n| n.serving().is_some())
            })
            .collect();
        let [p] = serving.as_slice() else {
            return Some(format!("primaries: {serving:?}"));
        };
        let slot = &self.slots[*p];
        if !slot.pg.leads() || self.now >= slot.pg.until {
            return Some(format!("{p} has no lease"));
        }
        let Some(Role::Primary(primary)) = slot.node.as_ref().map(Node::role) else {
            return Some("none".to_owned());
        };
        if primary.change.is_some() || primary.renewal.is_some() {
            return Some("a change is under way".to_owned());
        }
        let c = &primary.committed;
        if c.voters != self.wish.voters
            || c.durability != self.wish.durability
            || c.witness != self.wish.witness
        {
            return Some(format!(
                "voters {:?}, wished {:?}",
                c.voters, self.wish.voters
            ));
        }
        if c.may_be_primary != self.wish.may_be_primary {
            return Some(format!(
                "may be primary {:?}, wished {:?}",
                c.may_be_primary, self.wish.may_be_primary
            ));
        }
        let others: BTreeSet<V> = c.copies().copied().filter(|v| *v != c.primary).collect();
        if c.sync.members != others || c.sync.acks != c.acks(others.len()) {
            return Some(format!("rule {:?}", c.sync));
        }
        for (i, slot) in self.slots.iter().enumerate() {
            if i == *p {
                continue;
            }
            let Some(node) = &slot.node else {
                return Some(format!("{i} is down"));
            };
            let follows =
                matches!(node.local(), Local::Following { upstream, .. } if *upstream == c.primary);
            if !follows || slot.pg.connection.is_none() {
                return Some(format!("{i} doesn't follow: {:?}", node.local()));
            }
            if node.durable().rebuilding {
                return Some(format!("{i} is marked as rebuilding"));
            }
        }
        None
    }
}
