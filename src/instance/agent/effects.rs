//! What the protocol wants done: on disk, over the network, to PostgreSQL, and told.
//!
//! Owns the order: an effect begins only when the one before it is where it has to be.
//! Never: goes on after a promise that the disk didn't take.

use super::*;
use crate::failover::{History, held};

impl Agent {
    pub(super) async fn carry_out(&mut self, effect: Effect<String>) {
        match effect {
            Effect::Persist(state) => self.persist(state).await,
            Effect::Send(to, message) => self.send(to, message),
            Effect::Cut => {
                // What was under way is void; the cut finds out by itself what became of it.
                self.following = None;
                self.queue.retain(|op| *op == Op::Cut);
                self.give_up_running(&Op::Cut).await;
                self.queue.push_back(Op::Cut);
                self.begin_next();
            }
            Effect::Follow(upstream) => self.follow(&upstream, self.level()),
            Effect::Rebuild { from, .. } => {
                info!(from, "this copy can't go on: it is made anew");
                self.following = None;
            }
            Effect::Enforce(rule) => self.queue.push_back(Op::Enforce(rule)),
            Effect::Promote => {
                // From the moment PostgreSQL may accept writes, not only from the first heartbeat on.
                if let Role::Electing(election) = self.node.role()
                    && let Phase::Promoting { sent, .. } = &election.phase
                {
                    let until = *sent + self.timing().lease;
                    self.guard(until);
                }
                self.queue.push_back(Op::Promote);
            }
            Effect::Serve { until } => self.guard(until),
            Effect::StopCleanly => self.queue.push_back(Op::StopCleanly),
            Effect::Tell(story) => self.tell(story),
        }
    }

    /// Ends what is under way, unless it is `keep`. It is certainly over when this returns: an operation that is
    /// only told to end could still promote PostgreSQL behind the back of the cut that follows.
    pub(super) async fn give_up_running(&mut self, keep: &Op) {
        if let Some(mut running) = self.running.take_if(|r| r.op != *keep) {
            running.task.abort();
            let _ = (&mut running.task).await;
            self.hands.session = Arc::default();
        }
    }

    /// PostgreSQL ended, or is to: none of it is left before anybody is told that it's gone. Its processes may
    /// outlive their postmaster, and answer clients.
    pub(super) async fn end(&mut self, postmaster: Option<Proc>) {
        if self.queue.contains(&Op::Cut) || self.running.as_ref().is_some_and(|r| r.op == Op::Cut) {
            // It makes sure of the same.
            return;
        }
        self.queue.clear();
        let end = Op::End(postmaster);
        match &self.running {
            Some(running) if running.op == end => return,
            // Of an earlier one: it goes on to its own end.
            Some(Running { op: Op::End(_), .. }) => {}
            _ => self.give_up_running(&end).await,
        }
        self.queue.push_back(end);
        self.begin_next();
    }

    /// There is no primary to guard any more, as a process.
    pub(super) fn release(&mut self) {
        if let Some(watchdog) = &mut self.watchdog {
            let _ = watchdog.release();
        }
    }

    /// Until the disk has it, nothing else happens: no vote, no heartbeat. If that lasts, the lease ends, and the
    /// watchdog sees to it that PostgreSQL does, too.
    pub(super) async fn persist(&mut self, state: Durable<String>) {
        loop {
            match self.keep.write(&state) {
                Ok(()) => return,
                Err(e) => error!("can't keep what this instance has promised: {e:#}; tries again"),
            }
            tokio::time::sleep(Duration::from_millis(200)).await;
        }
    }

    pub(super) fn send(&self, to: String, message: Message<String>) {
        if names::is_witness(&to) {
            return self.witness.ask(to, message);
        }
        let name = names::instance_of(&to).to_owned();
        let envelope = Envelope {
            from: self.hands.me.clone(),
            to,
            address: self.config.address,
            message,
        };
        match envelope.encode() {
            Ok(bytes) => {
                self.peers.send(&name, &bytes);
            }
            Err(e) => warn!("can't write a message: {e}"),
        }
    }

    /// `level`: where the copy ends, if that is certain: not what was received meanwhile, which may be half a record.
    pub(super) fn follow(&mut self, upstream: &str, level: Option<Level>) {
        let name = names::instance_of(upstream).to_owned();
        let (Some(address), Some(certificate)) = (
            self.addresses.get(&name).copied(),
            self.certificate.borrow().clone(),
        ) else {
            warn!(
                upstream,
                "can't follow yet: its address or the certificate is missing"
            );
            return;
        };
        let upstream = Upstream {
            name,
            address,
            port: self.config.port,
        };
        let timeout = settings::replication_timeout(self.detection());
        // Only a serving primary keeps a slot for each: one that is to be caught up with, or not yet promoted, has none,
        // and asked for one it would refuse.
        let slot = self
            .node
            .primary(boottime_ms())
            .is_some_and(|p| names::instance_of(p) == upstream.name);
        match self
            .hands
            .follow(&certificate, &upstream, timeout, slot, level)
        {
            Ok(()) => self.following = Some(upstream),
            Err(e) => warn!("can't set the upstream: {e:#}"),
        }
    }

    /// Where the copy ends, if it is known which of the log's files are whole up to there; and whether whom it is to follow
    /// begins an era there.
    fn level(&self) -> Option<Level> {
        let Local::Following { end, .. } = self.node.local() else {
            return None;
        };
        let history = &self.node.durable().history;
        let held = held(history, *end);
        let last = held.last()?;
        (last.start < *end && last.timeline > 0).then_some(Level {
            at: *end,
            timeline: last.timeline,
            begins: history
                .get(held.len())
                .is_some_and(|next| next.start == *end),
        })
    }

    /// Lets sessions be made ready with those whom this instance may have to follow next; and tells the way to the upstream
    /// that it serves now.
    pub(super) fn attend(&self, source: Option<&(Upstream, History)>) {
        let relay = &self.hands.relay;
        if let Some((upstream, history)) = source
            && let Some(era) = history.last().filter(|era| era.timeline > 0)
        {
            relay.serves(&upstream.name, era.timeline);
        }
        let upstream = self.following.as_ref().map(|f| f.name.as_str());
        let voters = self.node.durable().configuration.iter();
        let voters = voters
            .flat_map(|c| &c.voters)
            .filter(|_| self.node.local() != &Local::Leading);
        let wanted = voters
            .map(|voter| names::instance_of(voter))
            .filter(|name| *name != self.config.instance && Some(*name) != upstream)
            .filter_map(|name| Some((name.to_owned(), *self.addresses.get(name)?)))
            .collect();
        relay.attend(wanted, settings::replication_timeout(self.detection()));
    }

    pub(super) fn guard(&mut self, until: u64) {
        let Some(process) = self.hands.server.process() else {
            return;
        };
        if self.watchdog.is_none() {
            match Watchdog::start(&self.children, &self.config.program) {
                Ok(watchdog) => self.watchdog = Some(watchdog),
                Err(e) => {
                    error!("can't start the watchdog: {e}");
                    return;
                }
            }
        }
        if let Some(watchdog) = &mut self.watchdog
            && let Err(e) = watchdog.guard(process, until)
        {
            warn!("the watchdog doesn't listen ({e}): starts it anew");
            if let Err(e) = watchdog.restart() {
                error!("can't start the watchdog: {e}");
                self.watchdog = None;
            }
        }
    }

    pub(super) fn watched(&mut self, event: watchdog::Event) -> Option<Event<String>> {
        match event {
            watchdog::Event::Killed(0) => debug!("the watchdog found nothing to end"),
            watchdog::Event::Killed(count) => {
                error!(count, "the watchdog ended PostgreSQL: its lease was over");
            }
            watchdog::Event::Left(count) => {
                error!(
                    count,
                    "the lease is over, and processes of PostgreSQL can't be ended"
                );
            }
            watchdog::Event::Ended(why) => {
                error!("the watchdog ended: {why}");
                self.watchdog = None;
            }
        }
        None
    }

    pub(super) fn tell(&mut self, story: Story<String>) {
        let now = Some(Timestamp::now());
        match story {
            Story::Detected { primary, direct } => {
                let reason = self.reason(direct);
                info!(primary, reason, "the primary is gone");
                self.story = Failover {
                    previous: primary.map(|p| names::instance_of(&p).to_owned()),
                    reason,
                    detected: now,
                    ..Failover::default()
                };
            }
            Story::Fenced { term } => {
                info!(term, "enough voters are cut off from the old primary");
                self.story.fenced = now;
            }
            Story::Elected { term } => {
                info!(term, "a majority accepted");
                self.story.elected = now;
            }
            Story::Promoted { term } => {
                info!(term, "serves");
                self.story.promoted = now;
                self.story.term = term;
                self.handing = false;
                self.last = Some(std::mem::take(&mut self.story));
                self.stuck = None;
                self.since.clear();
                self.left = false;
            }
            Story::SteppedDown { term, why } => {
                // The watchdog stays on guard until PostgreSQL is gone: this process may be frozen before that.
                warn!(term, "stops serving: {why}");
            }
            Story::Stuck(why) => {
                if self.stuck.as_deref() != Some(why) {
                    info!("no election: {why}");
                }
                self.stuck = Some(why.to_owned());
            }
        }
    }

    /// Why there is to be another primary, as the kinds name it.
    pub(super) fn reason(&self, direct: bool) -> &'static str {
        use crate::api::privacy_data_store::failover_reasons as reasons;
        if self.node.durable().at().0 <= 1 {
            reasons::FOUNDING
        } else if self.handing {
            reasons::HAND_OVER
        } else if direct {
            reasons::PRIMARY_DEAD
        } else {
            reasons::PRIMARY_SILENT
        }
    }
}
