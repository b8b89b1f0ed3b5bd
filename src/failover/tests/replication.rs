//! Streaming, promotion, commits and their acknowledgement.

use super::oracle::V;
use super::postgres::{Connection, RECORD, Sender, State, Wal};
use super::world::{Ev, World};
use crate::failover::{Configuration, Event, History, Millis, Streaming, Term};

impl World {
    pub fn connect(&mut self, i: usize, follow: u64) {
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

    pub fn pull(&mut self, i: usize, connection: u64) {
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
    pub fn report(&mut self, i: usize, connection: u64) {
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

    pub fn promote(&mut self, i: usize) {
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

    pub fn promoted(&mut self, i: usize, boot: u64, run: u64, configuration: &Configuration<V>) {
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
        // Also if it ends before its first heartbeat.
        self.oracle.agreed = self.oracle.agreed.max(configuration.at());
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
    pub fn check_promotion(&mut self, i: usize, configuration: &Configuration<V>, wal: &Wal) {
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
        let known = &self.slots[i].disk.history;
        let history = self.begun(known);
        let mut eras = wal.eras(known.first());
        // The one that is about to begin.
        eras.push((configuration.term, wal.end()));
        if history != eras || history.len() < 2 {
            let why = format!("{i} is promoted with eras {history:?}, but holds {eras:?}");
            self.oracle.fail(why);
        }
    }

    pub fn write(&mut self, i: usize, run: u64) {
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
        let upto = ((pg.released() / RECORD) as usize).min(pg.wal.recs.len());
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
    pub fn check_readers(&mut self, i: usize, term: Term) {
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

    pub fn poll(&mut self, i: usize, boot: u64, run: u64) {
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

    pub fn closing(&mut self, i: usize, boot: u64, run: u64, since: Millis) {
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

    pub fn copied(&mut self, i: usize, boot: u64, run: u64, from: V, history: History) {
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
}
