//! What goes wrong, and when.

use std::collections::BTreeSet;

use super::oracle::V;
use super::world::{Ev, Rng, WITNESS, World};
use crate::failover::planted::Mistake;
use crate::failover::{Durability, Event, Node, Role};

/// Faults of a schedule. Each schedule has only some kinds, so that rare ones aren't always masked by others.
#[derive(Clone, Debug)]
pub struct Plan {
    pub kinds: Vec<Kind>,
    /// Between two faults, at most.
    pub pause: u64,
    /// One message in so many is lost, repeated, late.
    pub loss: u64,
    pub repeat: u64,
    pub late: u64,
    /// One step in so many is torn by a crash; 0: none.
    pub torn: u64,
    /// How many disks may be lost.
    pub wipes: u32,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Kind {
    Crash,
    PostgresCrash,
    Freeze,
    CutOneWay,
    Isolate,
    Wipe,
    LoseCopy,
    Join,
    Policy,
    Durability,
    HandOver,
    FalseDeath,
    TrueDeath,
    Slow,
    Witness,
    Fence,
}

const KINDS: [Kind; 16] = [
    Kind::Crash,
    Kind::PostgresCrash,
    Kind::Freeze,
    Kind::CutOneWay,
    Kind::Isolate,
    Kind::Wipe,
    Kind::LoseCopy,
    Kind::Join,
    Kind::Policy,
    Kind::Durability,
    Kind::HandOver,
    Kind::FalseDeath,
    Kind::TrueDeath,
    Kind::Slow,
    Kind::Witness,
    Kind::Fence,
];

impl Plan {
    /// Where one kind of mistake shows most often.
    pub fn provoking(&mut self, mistake: Mistake) {
        use Mistake as M;
        let (kinds, late, torn): (&[Kind], u64, u64) = match mistake {
            M::RenewalWithoutJointRule => (&[Kind::FalseDeath, Kind::CutOneWay, Kind::Crash], 5, 0),
            M::PromotedAfterHigherVote => (&[Kind::FalseDeath, Kind::TrueDeath], 3, 0),
            M::PromiseForgotten => (&[Kind::FalseDeath, Kind::CutOneWay], 5, 40),
            M::LeaseTooLong => (&[Kind::Isolate, Kind::CutOneWay], 100, 0),
            M::EveryPromiseIsRenewal => (&[Kind::HandOver, Kind::PostgresCrash], 5, 0),
            M::UninformedMembers => (&[Kind::PostgresCrash, Kind::Freeze, Kind::CutOneWay], 4, 0),
            M::RebuildingIsData => (&[Kind::LoseCopy, Kind::Crash, Kind::TrueDeath], 40, 200),
            M::IdentityKept => (&[Kind::Wipe, Kind::Isolate, Kind::Durability], 20, 0),
            M::NoneNeedsToBeHeard => (&[Kind::Crash, Kind::Isolate, Kind::TrueDeath], 40, 0),
            _ => return,
        };
        self.kinds = kinds.to_vec();
        self.late = late;
        self.torn = torn;
        if mistake == M::IdentityKept {
            self.wipes = 20;
        }
    }

    pub fn random(rng: &mut Rng) -> Self {
        let mut kinds: Vec<Kind> = KINDS.into_iter().filter(|_| rng.one_in(3)).collect();
        if kinds.is_empty() {
            kinds = vec![Kind::Crash, Kind::Isolate];
        }
        Self {
            kinds,
            pause: rng.pick(&[150, 600, 2_000]).unwrap_or(600),
            loss: rng.pick(&[8, 50, 1_000]).unwrap_or(50),
            repeat: rng.pick(&[10, 100]).unwrap_or(100),
            late: rng.pick(&[5, 40, 500]).unwrap_or(100),
            torn: rng.pick(&[0, 0, 300, 1_500]).unwrap_or(0),
            wipes: 2,
        }
    }
}

impl World {
    pub fn chaos(&mut self) {
        if self.quiet {
            return;
        }
        let pause = self.rng.range(20, self.plan.pause);
        self.at(pause, Ev::Chaos);
        let kinds = self.plan.kinds.clone();
        let Some(kind) = self.rng.pick(&kinds) else {
            return;
        };
        // Half of the time the primary, if there is one.
        let count = self.slots.len() as u64;
        let leader = self.slots.iter().position(|s| s.pg.leads());
        let any = self.rng.range(0, count) as usize;
        let i = if self.rng.one_in(2) {
            leader.unwrap_or(any)
        } else {
            any
        };
        self.log(|| format!("{kind:?} {i}"));
        match kind {
            Kind::Crash => {
                if self.slots[i].up {
                    self.crash(i);
                    let delay = self.rng.range(30, 4_000);
                    self.at(delay, Ev::Restart { slot: i });
                    if self.rng.one_in(2) {
                        self.death_seen(i);
                    }
                }
            }
            Kind::PostgresCrash => self.postgres_crash(i),
            Kind::Freeze => {
                if self.slots[i].up && !self.slots[i].frozen {
                    self.oracle.honest = false;
                    self.slots[i].frozen = true;
                    let delay = self.rng.range(50, 4_000);
                    self.at(delay, Ev::Thaw { slot: i });
                }
            }
            Kind::CutOneWay => {
                let j = self.rng.range(0, count) as usize;
                self.block(i, j);
            }
            Kind::Isolate => {
                let alone = self.rng.one_in(2);
                for j in 0..count as usize {
                    if alone || self.rng.one_in(2) {
                        self.block(i, j);
                        self.block(j, i);
                    }
                }
                if self.rng.one_in(3) {
                    self.block(i, WITNESS);
                }
            }
            Kind::Witness => self.block(i, WITNESS),
            Kind::Wipe => self.wipe(i),
            Kind::LoseCopy => {
                if self.plan.wipes > 0
                    && self.short_of().is_none()
                    && self.slots[i].up
                    && self.wish.may_be_primary.len() == self.slots.len()
                {
                    self.plan.wipes -= 1;
                    self.stop_postgres(i, super::postgres::State::Down);
                    self.slots[i].pg.copy = false;
                    let boot = self.slots[i].boot;
                    let run = Some(self.slots[i].pg.run);
                    self.at(
                        5,
                        Ev::Tell {
                            slot: i,
                            boot,
                            run,
                            event: Event::Lost { wiped: true },
                        },
                    );
                }
            }
            Kind::Join => {
                let id = self.slots[i].id;
                if !self.wish.voters.remove(&id) {
                    self.wish.voters.insert(id);
                }
                // A store of which nobody may be primary stays down by right.
                if self.wish.may_be_primary.contains(&id)
                    && self.wish.may_be_primary.len() < self.slots.len()
                    || self.wish.voters.len() < 3
                {
                    self.wish.voters.insert(id);
                }
                self.wish_again();
            }
            Kind::Policy => {
                let ids: Vec<V> = self.slots.iter().map(|s| s.id).collect();
                let may: BTreeSet<V> = ids.into_iter().filter(|_| !self.rng.one_in(3)).collect();
                if self.short_of().is_none() {
                    let ids = self.slots.iter().map(|s| s.id);
                    self.wish.barred = ids.filter(|id| !may.contains(id)).collect();
                    self.wish.may_be_primary = may;
                }
                self.wish_again();
            }
            Kind::Durability => {
                self.wish.durability = match self.wish.durability {
                    Durability::Required => Durability::Preferred,
                    Durability::Preferred => Durability::Required,
                };
                self.wish_again();
            }
            Kind::HandOver => {
                let j = self.rng.range(0, count) as usize;
                let to = self.rng.one_in(2).then(|| self.slots[j].id);
                self.step(i, Event::HandOver(to));
            }
            Kind::FalseDeath => {
                self.oracle.honest = false;
                self.death_seen(i);
            }
            Kind::TrueDeath => {
                if self.slots[i].up {
                    self.crash(i);
                    self.death_seen(i);
                    let delay = self.rng.range(30, 4_000);
                    self.at(delay, Ev::Restart { slot: i });
                }
            }
            Kind::Slow => self.slots[i].pg.slow = !self.slots[i].pg.slow,
            Kind::Fence => {
                self.step(i, Event::Fence(true));
                let boot = self.slots[i].boot;
                let delay = self.rng.range(100, 4_000);
                self.at(
                    delay,
                    Ev::Tell {
                        slot: i,
                        boot,
                        run: None,
                        event: Event::Fence(false),
                    },
                );
            }
        }
    }

    fn death_seen(&mut self, i: usize) {
        let dead = self.slots[i].id;
        for j in 0..self.slots.len() {
            if j != i && self.rng.one_in(2) && self.reaches(j, i) {
                let boot = self.slots[j].boot;
                let delay = self.rng.range(1, 200);
                // Late news of a death is news of an earlier life.
                if delay > 30 {
                    self.oracle.honest = false;
                }
                self.at(
                    delay,
                    Ev::Tell {
                        slot: j,
                        boot,
                        run: None,
                        event: Event::Dead(dead),
                    },
                );
            }
        }
    }

    pub fn block(&mut self, a: usize, b: usize) {
        if a != b {
            self.blocked.insert((a, b));
            let delay = self.rng.range(50, 4_000);
            self.at(delay, Ev::Heal { a, b });
        }
    }

    /// The disk is lost: another voter in the same slot. Only while the others hold everything.
    fn wipe(&mut self, i: usize) {
        let needless = self.short_of().is_none() || self.spare(i);
        if self.plan.wipes == 0
            || !needless
            || self.wish.may_be_primary.len() < self.slots.len()
            || self.wish.voters.len() < 3
        {
            return;
        }
        self.plan.wipes -= 1;
        let old = self.slots[i].id;
        let kept = self.mistake == Some(Mistake::IdentityKept);
        let new = if kept { old } else { old + 100 };
        self.crash(i);
        let slot = &mut self.slots[i];
        slot.id = new;
        slot.disk = crate::failover::Durable::default();
        slot.pg.wal = super::postgres::Wal::default();
        slot.pg.copy = false;
        let wish = &mut self.wish;
        for set in [&mut wish.voters, &mut wish.may_be_primary, &mut wish.barred] {
            if set.remove(&old) {
                set.insert(new);
            }
        }
        let delay = self.rng.range(50, 3_000);
        self.at(delay, Ev::Restart { slot: i });
        self.wish_again();
    }

    /// Whether an instance defines no history: its disk can be lost while a primary serves.
    fn spare(&self, i: usize) -> bool {
        let wanted = &self.wish.voters;
        self.slots.iter().any(|s| {
            let Some(Role::Primary(p)) = s.node.as_ref().map(Node::role) else {
                return false;
            };
            let c = &p.committed;
            let (id, others) = (self.slots[i].id, self.slots.iter().filter(|o| o.up).count());
            s.pg.leads()
                && self.now < s.pg.until
                && p.change.is_none()
                && p.renewal.is_none()
                && c.voters == *wanted
                && others == self.slots.len()
                && c.primary != id
                && !c.sync.members.contains(&id)
                && c.sync.members.len() >= c.sync.acks
        })
    }

    /// Everybody learns what the store asks for.
    pub fn wish_again(&mut self) {
        let wish = self.wish.clone();
        for i in 0..self.slots.len() {
            let (boot, delay) = (self.slots[i].boot, self.rng.range(1, 100));
            self.at(
                delay,
                Ev::Tell {
                    slot: i,
                    boot,
                    run: None,
                    event: Event::Wish(wish.clone()),
                },
            );
        }
    }

    /// Everything is repaired, and nothing breaks any more.
    pub fn repair(&mut self) {
        self.log(|| "--- repaired".to_owned());
        self.quiet = true;
        self.blocked.clear();
        let all: BTreeSet<V> = self.slots.iter().map(|s| s.id).collect();
        self.wish.may_be_primary.clone_from(&all);
        self.wish.barred.clear();
        self.wish.voters = all;
        self.wish.voters.extend(self.wish.witness);
        for i in 0..self.slots.len() {
            self.slots[i].pg.slow = false;
            self.thaw(i);
            if !self.slots[i].up {
                self.start(i);
            }
            let boot = self.slots[i].boot;
            self.at(
                1,
                Ev::Tell {
                    slot: i,
                    boot,
                    run: None,
                    event: Event::Fence(false),
                },
            );
        }
        self.wish_again();
    }
}
