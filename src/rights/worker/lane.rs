//! One target's work: claim, carry out, tell the ledger, again.
//!
//! Owns the loop of one target. A lane has its own connector, breaker and batch size, and shares nothing with other lanes
//! but the pool of connections to the ledger, which it holds only for the moment of a call: a target that hangs holds up
//! nobody else. While the ledger writes down one batch's end, the next batch is under way.
//! Never: tells the time of day; carries out what isn't a deletion; says more of a failure than a [`Reason`] and what the
//! connector puts into words without identifiers.

use std::convert::Infallible;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use jiff::Timestamp;
use rand::Rng as _;
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;
use tracing::{debug, info, warn};

use super::agenda::Agenda;
use super::backoff;
use super::batch::{self, Size, Went};
use super::breaker::{Breaker, Permit};
use super::carry::{Carried, Person, carry};
use super::clock::Moment;
use super::ears::Ears;
use super::finishing::{self, Ended, finish};
use super::lease::{self, Lease};
use super::metrics::{Metrics, OfTarget};
use super::split::Finding;
use super::verdict::{Facts, Seen, Verdict, database_time, verdict};
use crate::rights::config::Target;
use crate::rights::connectors::{Connector, Reason};
use crate::rights::ledger::{Claimed, Finished, How, Ledger};
use crate::rights::model::{Evidence, Identifiers, Kind};
use crate::rights::secrecy::Keyring;

/// Batches whose end the ledger is being told of. With one more, the lane waits.
const FINISHING: usize = 2;
/// What is under way when the worker stops may go on for so long.
pub const GRACE: Duration = Duration::from_secs(8);
/// Between two attempts to reach the ledger.
const LEDGER_AGAIN: (Duration, Duration) = (Duration::from_millis(50), Duration::from_millis(500));
/// What is given back calls nobody, and is there once the ledger has been told.
const GIVEN_BACK: Duration = Duration::from_millis(100);
/// For how long a subject is put back that was tried when its target failed, so that others get the next turn.
const ANOTHERS_TURN: (Duration, Duration) =
    (Duration::from_millis(500), Duration::from_millis(2_000));

/// One target's work.
pub struct Lane {
    /// The target.
    pub target: Target,
    /// The worker's region.
    pub region: Arc<str>,
    /// The worker's name.
    pub worker: Arc<str>,
    /// The ledger.
    pub ledger: Ledger,
    /// How to erase from the target.
    pub connector: Box<dyn Connector>,
    /// The keys of requests.
    pub keys: Keyring,
    /// The metrics.
    pub metrics: Arc<Metrics>,
    /// Whether there is something to do.
    pub ears: Ears,
    /// Whether the ledger answered whoever asked it last.
    pub answers: Arc<AtomicBool>,
    /// When to end.
    pub stop: CancellationToken,
}

/// What a lane has learnt.
#[derive(Default)]
struct Learnt {
    breaker: Breaker,
    size: Size,
    agenda: Agenda,
}

impl Lane {
    /// Works until it is to stop, and then until what is under way is over.
    pub async fn run(mut self) {
        let residue = self.connector.residue();
        let residue = residue.map(|r| Duration::from_secs(u64::from(r.days) * 86_400));
        self.metrics.of(&self.target, &self.region).begin(residue);
        let mut learnt = Learnt::default();
        let mut finishing = JoinSet::new();
        while !self.stop.is_cancelled() {
            let now = Moment::now();
            let permit = learnt.breaker.permit(now);
            let metrics = self.metrics.of(&self.target, &self.region);
            metrics.breaker(learnt.breaker.state());
            let most = match permit {
                Permit::Whole => learnt.size.get(),
                Permit::Probe => learnt.size.get().min(batch::PROBE),
                Permit::Wait(until) => {
                    self.sleep(until.since(now)).await;
                    continue;
                }
            };
            // From before the claim is sent: what it takes to arrive is not ours.
            let sent = Moment::now();
            let claim = self.ledger.claim(
                &self.target.name,
                &self.region,
                &self.worker,
                most,
                lease::LENGTH,
            );
            let claim = claim.await;
            self.answers.store(claim.is_ok(), Ordering::Relaxed);
            match claim {
                Err(error) => {
                    metrics.ledger_error("claim");
                    debug!(target_system = %self.target.name, %error, "can't claim");
                    self.sleep(between(LEDGER_AGAIN)).await;
                }
                Ok(claimed) => {
                    let count = u32::try_from(claimed.len()).unwrap_or(u32::MAX);
                    if count > 0 {
                        metrics.claimed(claimed.len());
                        let results = self.batch(&mut learnt, sent, claimed).await;
                        while finishing.len() >= FINISHING {
                            drop(finishing.join_next().await);
                        }
                        let (ledger, all) = (self.ledger.clone(), self.metrics.clone());
                        let (target, region) = (self.target.clone(), self.region.clone());
                        finishing.spawn(async move {
                            finish(&ledger, results, all.of(&target, &region)).await;
                        });
                    }
                    // Fewer than asked for: that was all there was.
                    if count < most {
                        self.await_work(&mut learnt, sent, count).await;
                    }
                }
            }
        }
        // Each is bounded by itself.
        while finishing.join_next().await.is_some() {}
        self.metrics.of(&self.target, &self.region).end();
    }

    /// Waits until there may be something to do, and for its company: what comes while others come is claimed together.
    /// `claimed` is when how many were claimed last.
    async fn await_work(&mut self, learnt: &mut Learnt, claimed: Moment, count: u32) {
        let dice = rand::rng().random();
        let pause = learnt.agenda.pause(Moment::now(), dice);
        tokio::select! {
            () = self.stop.cancelled() => {}
            () = self.ears.called() => {}
            () = tokio::time::sleep(pause) => {}
        }
        let next = claimed.after(batch::between_claims(count));
        self.sleep(next.since(Moment::now())).await;
    }

    async fn sleep(&self, pause: Duration) {
        tokio::select! {
            () = self.stop.cancelled() => {}
            () = tokio::time::sleep(pause) => {}
        }
    }

    /// One batch: what the ledger is to be told of it.
    async fn batch(
        &self,
        learnt: &mut Learnt,
        sent: Moment,
        claimed: Vec<Claimed>,
    ) -> finishing::Batch {
        let lease = Lease::new(sent);
        let metrics = self.metrics.of(&self.target, &self.region);
        let count = u32::try_from(claimed.len()).unwrap_or(u32::MAX);
        let (mut steps, mut people, mut results) = (Vec::new(), Vec::new(), Vec::new());
        for mut step in claimed {
            let before = step.erasure.take().unwrap_or_default();
            match self.open(&step) {
                Ok(identifiers) => {
                    people.push(Person {
                        identifiers,
                        settling: step.settling,
                        before,
                        failures: step.failures,
                    });
                    steps.push(step);
                }
                Err(reason) => {
                    metrics.error(reason);
                    let told = self.told(learnt, sent, &step, before, Seen::Failed(reason));
                    results.push(told);
                }
            }
        }
        let began = Moment::now();
        let worked = learnt.breaker.works();
        let carried = tokio::select! {
            carried = carry(&*self.connector, &lease, &self.stop, &people, worked, metrics) => carried,
            never = self.keep(&lease, &steps) => match never {},
            never = self.give_up_when_stopped(&lease) => match never {},
        };
        let before: Vec<Evidence> = people.into_iter().map(|p| p.before).collect();
        let took = Moment::now().since(began);
        if !steps.is_empty() {
            let went = if carried.split {
                Went::Split
            } else {
                Went::Through
            };
            learnt.size = learnt.size.adapted(count, took, went);
            self.learn(learnt, &carried, took, metrics);
        }
        for ((step, before), seen) in steps.into_iter().zip(before).zip(carried.seen) {
            results.push(self.told(learnt, sent, &step, before, seen));
        }
        finishing::Batch { results, sent }
    }

    /// Who a step is about.
    fn open(&self, step: &Claimed) -> Result<Identifiers, Reason> {
        if step.kind != Kind::Deletion {
            warn!(
                "a request that is no deletion has a step: gateways refuse these, so a newer one filed it"
            );
            return Err(Reason::Refused);
        }
        let opened = self.keys.open(
            step.step.request,
            step.key_epoch,
            &step.wrapped_key,
            &step.sealed,
        );
        opened.map_err(|why| {
            // Of a key that is gone nothing can be erased, ever: a person must know.
            warn!(target_system = %self.target.name, "can't open a request: {why}");
            Reason::Identifier
        })
    }

    /// What a batch says about its target.
    fn learn(&self, learnt: &mut Learnt, carried: &Carried, took: Duration, metrics: OfTarget<'_>) {
        let name = &self.target.name;
        if carried.lost {
            metrics.lease_lost();
            metrics.task(took, "lost");
            warn!(target_system = %name, "a batch was stopped: its lease ended");
        }
        match carried.finding {
            None => return,
            Some(Finding::Unknown) => metrics.task(took, "failed"),
            Some(Finding::Works) => {
                metrics.task(took, "answered");
                if !learnt.breaker.closed() {
                    info!(target_system = %name, "the target works again");
                }
                learnt.breaker.succeeded();
            }
            Some(Finding::Fails) if carried.lost && carried.failure.is_none() => {}
            Some(Finding::Fails) => {
                metrics.task(took, "failed");
                let why = carried.failure.as_ref();
                let reason = why.map_or("unreachable", |f| f.reason.as_str());
                if learnt.breaker.closed() {
                    let detail = why.map_or("", |f| f.detail.as_str());
                    warn!(target_system = %name, reason, detail, "the target fails; its steps wait");
                }
                let dice = rand::rng().random();
                learnt.breaker.failed(Moment::now(), carried.fault(), dice);
            }
        }
        metrics.breaker(learnt.breaker.state());
    }

    /// What the ledger is told of a step, of which earlier claims left `before` as evidence.
    fn told(
        &self,
        learnt: &mut Learnt,
        sent: Moment,
        step: &Claimed,
        before: Evidence,
        seen: Seen,
    ) -> Ended {
        // The lease's end is by the ledger's clock, and so is its beginning.
        let claimed = claimed_at(step);
        let now = database_time(claimed, Moment::now().since(sent));
        let facts = Facts {
            settling: step.settling,
            settle: self.target.settle_seconds > 0,
            residue: self.connector.residue(),
            now,
        };
        let mut absent = false;
        let how = match verdict(&facts, before, seen) {
            Verdict::Done(outcome, evidence) => {
                absent = !step.settling;
                How::Done(outcome, evidence)
            }
            Verdict::Settle(erasure) => {
                absent = !step.settling;
                let after = Duration::from_secs(self.target.settle_seconds.unsigned_abs().into());
                How::Settle { after, erasure }
            }
            Verdict::Retry(reason) => {
                let left = step.deadline.duration_since(now);
                let left = Duration::try_from(left).unwrap_or_default();
                let range = backoff::range(step.failures.saturating_add(1), left);
                let after = backoff::pick(range, &mut rand::rng());
                How::Retry {
                    after,
                    reason: reason.as_str(),
                }
            }
            Verdict::Later(reason) => How::Retry {
                after: between(ANOTHERS_TURN),
                reason: reason.as_str(),
            },
            Verdict::Back => How::Release,
        };
        match &how {
            How::Settle { after, .. } | How::Retry { after, .. } => {
                learnt.agenda.add(Moment::now().after(*after));
            }
            How::Release => learnt.agenda.add(Moment::now().after(GIVEN_BACK)),
            How::Done(..) => {}
        }
        Ended {
            finished: Finished {
                step: step.step,
                lease: step.lease,
                how,
            },
            filed: absent.then_some((step.filed_at, claimed)),
        }
    }

    /// Renews the lease of a batch, for as long as that is possible.
    async fn keep(&self, lease: &Lease, steps: &[Claimed]) -> Infallible {
        let held: Vec<_> = steps.iter().map(|step| (step.step, step.lease)).collect();
        let mut pause = lease::RENEW;
        loop {
            tokio::time::sleep(pause).await;
            let sent = Moment::now();
            match self.ledger.renew(&held, lease::LENGTH).await {
                Ok(kept) if kept.iter().all(|kept| *kept) => {
                    lease.renewed(sent);
                    pause = lease::RENEW;
                }
                Ok(_) => {
                    // Another has one of them: this batch has been away for too long.
                    lease.give_up();
                    return std::future::pending().await;
                }
                Err(error) => {
                    self.metrics
                        .of(&self.target, &self.region)
                        .ledger_error("renew");
                    debug!(target_system = %self.target.name, %error, "can't renew a lease");
                    pause = between(LEDGER_AGAIN);
                }
            }
        }
    }

    async fn give_up_when_stopped(&self, lease: &Lease) -> Infallible {
        self.stop.cancelled().await;
        tokio::time::sleep(GRACE).await;
        lease.give_up();
        std::future::pending().await
    }
}

/// When a step was claimed, by the ledger's clock.
fn claimed_at(step: &Claimed) -> Timestamp {
    step.leased_until
        .checked_sub(lease::LENGTH)
        .unwrap_or(Timestamp::MIN)
}

fn between(range: (Duration, Duration)) -> Duration {
    backoff::pick(range, &mut rand::rng())
}
