//! Operations on PostgreSQL and on the witness, one at a time, beside the loop; and when to look at them.
//!
//! Owns the queue, and what an answer or a failure means. Never: lets an operation that was given up go on behind a cut.

use super::*;

impl Agent {
    pub(super) fn begin_next(&mut self) {
        if self.running.is_some() {
            return;
        }
        let Some(op) = self.queue.pop_front() else {
            return;
        };
        let (hands, work) = (self.hands.clone(), op.clone());
        let slots: Vec<String> = self.slots();
        let task = tokio::spawn(async move { operate(&hands, work, &slots).await });
        self.running = Some(Running { op, task });
    }

    pub(super) fn slots(&self) -> Vec<String> {
        let others = store::others(self.store.as_deref(), &self.config);
        others.iter().map(|o| settings::slot(o)).collect()
    }

    /// Looks at PostgreSQL: often while something depends on it.
    pub(super) fn look(&mut self) {
        if self.running.is_some() || !self.queue.is_empty() || self.hands.server.process().is_none()
        {
            return;
        }
        let rebuilding = self.node.durable().rebuilding;
        let (op, every) = match self.node.local() {
            Local::Down { .. } if !self.hands.server.leads() => {
                (Op::Settle, Duration::from_millis(20))
            }
            Local::Following { upstream, .. } => {
                let catching =
                    matches!(self.node.role(), Role::Electing(_)) || self.node.levelling();
                let every = match (catching, rebuilding) {
                    (true, _) => BUSY,
                    (false, true) => Duration::from_millis(100),
                    (false, false) => LOOK,
                };
                (Op::Receive(upstream.clone()), every)
            }
            Local::Leading => {
                let changing = matches!(self.node.role(), Role::Primary(p) if p.change.is_some());
                let missing = self.node.serving().is_some_and(|c| {
                    c.copies()
                        .any(|v| *v != self.hands.me && !self.since.contains_key(v))
                });
                let every = match (changing, missing) {
                    (true, _) => Duration::from_millis(20),
                    (false, true) => Duration::from_millis(200),
                    (false, false) => LOOK,
                };
                // One that doesn't answer must not keep this from noticing in time that it doesn't.
                let left = self.patience().saturating_sub(self.answered.elapsed());
                (Op::Standbys(left.max(Duration::from_millis(500))), every)
            }
            _ => return,
        };
        if self.looked.is_some_and(|at| at.elapsed() < every) {
            return;
        }
        self.looked = Some(Instant::now());
        self.queue.push_back(op);
    }

    /// Has the witness looked at while that is of use: by a primary that is to have one, and by a standby that begins
    /// to doubt its primary. In quiet times nobody reads it.
    pub(super) fn look_at_witness(&mut self) {
        let leads = self.even && self.node.serving().is_some();
        let every = match self.witness_seen {
            Some(Some(_)) => WITNESS_LOOK_AGAIN,
            _ => WITNESS_LOOK,
        };
        let due = leads && self.witness_looked.is_none_or(|at| at.elapsed() >= every);
        if due {
            self.witness_looked = Some(Instant::now());
        }
        if due || self.node.doubts(boottime_ms()).is_some() {
            self.witness.look();
        }
    }

    pub(super) fn witness_said(&mut self, said: Said) -> Option<Event<String>> {
        match said {
            Said::Answer { from, message } => return Some(Event::Message { from, message }),
            Said::Trouble(trouble) => self.witness_trouble = trouble,
            Said::Seen(voter) => {
                self.witness_looked = Some(Instant::now());
                if self.witness_seen.as_ref() != Some(&voter) {
                    info!(voter, "the witness's object");
                    self.witness_seen = Some(voter);
                    let store = self.store.clone()?;
                    return Some(Event::Wish(self.wish(&store)));
                }
            }
        }
        None
    }

    pub(super) async fn done(&mut self, done: Done) -> Option<Event<String>> {
        self.running = None;
        match done {
            Done::Cut(end) => {
                self.following = None;
                if self.hands.server.process().is_none() {
                    self.release();
                }
                Some(Event::Cut { end })
            }
            Done::Enforced(rule, position) => {
                self.rule = sync::render(&rule);
                self.ruled = Instant::now();
                self.unruly = false;
                self.answered = Instant::now();
                Some(Event::Enforced { rule, position })
            }
            Done::Promoted(timeline, start) => {
                self.answered = Instant::now();
                Some(Event::Promoted { timeline, start })
            }
            Done::Stopped(end) => {
                self.left = true;
                self.release();
                Some(Event::Stopped { end })
            }
            Done::Settled(end) => Some(Event::Standby { end }),
            Done::Received(from, end) => Some(Event::Received { from, end }),
            Done::Standbys(seen) => {
                self.answered = Instant::now();
                let now = Instant::now();
                let streaming: BTreeMap<String, Streaming> =
                    hands::streaming(&seen, &mut self.since, now);
                Some(Event::Standbys {
                    position: seen.position,
                    streaming,
                })
            }
            Done::Ended => {
                self.release();
                Some(Event::Lost { wiped: false })
            }
            Done::Failed(what, error) => self.failed(what, &error).await,
        }
    }

    /// A primary whose PostgreSQL doesn't answer for so long has none.
    pub(super) fn patience(&self) -> Duration {
        Duration::from_secs(u64::from(self.detection()) * 2)
    }

    pub(super) async fn failed(
        &mut self,
        what: &'static str,
        error: &anyhow::Error,
    ) -> Option<Event<String>> {
        let looking = matches!(what, "settle" | "receive");
        if looking {
            debug!("can't {what}: {error:#}");
            return None;
        }
        warn!("can't {what}: {error:#}");
        // Whatever is the matter with this session, the next need not have it.
        self.hands.session = Arc::default();
        // Asked again with the next attempt, change or look; a primary that doesn't answer for long has ended.
        let serving = self.node.serving().is_some();
        if what == "promote" || (serving && self.answered.elapsed() >= self.patience()) {
            error!("PostgreSQL doesn't do what it is asked: ends it");
            self.end(self.hands.server.latest()).await;
            return None;
        }
        self.unruly |= what == "enforce";
        if what == "enforce"
            && let Role::Primary(primary) = self.node.role()
        {
            self.queue.push_back(Op::Enforce(primary.rule.clone()));
        }
        None
    }
}

async fn operate(hands: &Hands, op: Op, slots: &[String]) -> Done {
    let failed = |what: &'static str| move |e: anyhow::Error| Done::Failed(what, e);
    match op {
        Op::Cut => Done::Cut(hands.cut().await),
        Op::Enforce(rule) => match hands.enforce(&rule).await {
            Ok(at) => Done::Enforced(rule, at),
            Err(e) => {
                // It is tried again at once.
                tokio::time::sleep(Duration::from_millis(100)).await;
                Done::Failed("enforce", e)
            }
        },
        Op::Promote => hands
            .promote(slots)
            .await
            .map_or_else(failed("promote"), |(timeline, start)| {
                Done::Promoted(timeline, start)
            }),
        Op::StopCleanly => Done::Stopped(hands.stop_cleanly(CLEAN_STOP).await),
        Op::Settle => {
            if let Err(e) = hands.alone() {
                return Done::Failed("settle", e);
            }
            let settled = tokio::time::timeout(Duration::from_secs(2), hands.settle()).await;
            match settled {
                Ok(settled) => settled.map_or_else(failed("settle"), Done::Settled),
                Err(_) => Done::Failed("settle", anyhow::anyhow!("it still replays")),
            }
        }
        Op::Receive(from) => hands
            .received()
            .await
            .map_or_else(failed("receive"), |end| Done::Received(from, end)),
        Op::Standbys(limit) => match tokio::time::timeout(limit, hands.standbys()).await {
            Ok(Ok(seen)) => Done::Standbys(seen),
            Ok(Err(e)) => Done::Failed("look at the standbys", e),
            Err(_) => Done::Failed(
                "look at the standbys",
                anyhow::anyhow!("PostgreSQL doesn't answer"),
            ),
        },
        Op::End(postmaster) => {
            if let Some(postmaster) = postmaster {
                hands.end(postmaster, END_LIMIT).await;
            }
            Done::Ended
        }
    }
}
