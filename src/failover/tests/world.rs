//! The world of the simulation: virtual time, a network, instances that do what their nodes say.

use std::collections::{BTreeMap, BTreeSet};

use super::chaos::Plan;
use super::oracle::{Oracle, V};
use super::postgres::{Connection, Postgres, Rec, State};
use crate::failover::planted::Mistake;
use crate::failover::{
    Configuration, Durable, Event, History, KEPT, Message, Millis, Node, Register, Rule, Timing,
    Watch, Wish,
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
    /// Until when its agent is busy with cuts, where they take their time (see [`World::far`]).
    pub cutting: Millis,
}

/// Slot number of the witness, as the network knows it.
pub const WITNESS: usize = 9;

pub struct World {
    pub now: Millis,
    /// What every way over the network takes longer, in milliseconds. If it isn't 0, cuts take longer as well, and one
    /// begins when the one before is done, as the agent has it.
    pub far: Millis,
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
    /// How many eras a history keeps.
    pub kept: usize,
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
            far: 0,
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
            // Mostly few, so that they are forgotten soon.
            kept: [4, 5, 8, KEPT][(seed % 4) as usize],
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
                cutting: 0,
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
    pub fn connected(&self, a: usize, b: usize) -> bool {
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
        node.kept = self.kept;
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

    pub fn hang_up(&mut self, i: usize, id: V, c: &Connection) {
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
        let way = if self.quiet || !self.rng.one_in(self.plan.late) {
            self.rng.range(1, 6)
        } else {
            self.rng.range(5, 2_000)
        };
        way + self.far
    }

    pub fn send(&mut self, i: usize, to: V, message: Message<V>) {
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

    pub fn ask_witness(&mut self, i: usize, boot: u64, message: Option<Message<V>>) {
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

    pub fn home(ev: &Ev) -> Option<usize> {
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

    pub fn handle(&mut self, ev: Ev) {
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

    pub fn decide(
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
}
