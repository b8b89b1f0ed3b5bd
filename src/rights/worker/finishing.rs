//! Telling the ledger how steps ended.
//!
//! Owns the call that ends a batch, and its repetitions: what was erased and proven must not be lost because the ledger
//! fails over at that moment. To repeat it is safe, since a result counts once, and only from the step's holder.
//! Never: lets one result that the ledger refuses hold up the others of its batch.

use std::borrow::Borrow;
use std::time::Duration;

use jiff::Timestamp;
use tracing::{debug, error};

use super::backoff;
use super::clock::Moment;
use super::metrics::OfTarget;
use super::verdict::database_time;
use crate::rights::ledger::{Finished, Ledger, LedgerError};

/// For how long the ledger is told again. Longer than a lease: as long as nobody else has claimed the steps, it counts.
const PATIENCE: Duration = Duration::from_secs(8);
/// Between two attempts.
const AGAIN: (Duration, Duration) = (Duration::from_millis(50), Duration::from_millis(400));

/// How a step ended.
#[derive(Debug)]
pub struct Ended {
    /// What the ledger is told.
    pub finished: Finished,
    /// The person was read as absent for the first time: when the request was filed, and when the step was claimed, both
    /// by the ledger's clock.
    pub filed: Option<(Timestamp, Timestamp)>,
}

impl Borrow<Finished> for Ended {
    fn borrow(&self) -> &Finished {
        &self.finished
    }
}

/// What the ledger is told of a batch.
#[derive(Debug)]
pub struct Batch {
    /// Of each step.
    pub results: Vec<Ended>,
    /// Before the claim was sent.
    pub sent: Moment,
}

/// Tells the ledger. What it doesn't hear in time is found by whoever claims these steps next: still absent.
pub async fn finish(ledger: &Ledger, batch: Batch, metrics: OfTarget<'_>) {
    let sent = batch.sent;
    let give_up = Moment::now().after(PATIENCE);
    let mut parts = vec![batch.results];
    while let Some(mut part) = parts.pop() {
        if part.is_empty() {
            continue;
        }
        match ledger.finish(&part).await {
            Ok(taken) => {
                let outdated = taken.iter().filter(|taken| !**taken).count();
                if outdated > 0 {
                    metrics.outdated(outdated);
                    debug!(outdated, "results came too late and don't count");
                }
                let passed = Moment::now().since(sent);
                for (one, taken) in part.iter().zip(taken) {
                    if let (true, Some((filed, claimed))) = (taken, one.filed) {
                        let age = database_time(claimed, passed).duration_since(filed);
                        metrics.absent_after(Duration::try_from(age).unwrap_or_default());
                    }
                }
            }
            Err(LedgerError::Refused(code)) if part.len() > 1 => {
                metrics.ledger_error("finish");
                debug!(code, "the ledger refuses a batch's end: told in halves");
                let rest = part.split_off(part.len() / 2);
                parts.push(rest);
                parts.push(part);
            }
            Err(LedgerError::Refused(code)) => {
                metrics.ledger_error("finish");
                error!(
                    code,
                    "the ledger refuses a step's end; it will be done again"
                );
            }
            Err(why) => {
                metrics.ledger_error("finish");
                if Moment::now() >= give_up {
                    debug!(%why, "the ledger can't be told of a batch's end; its leases run out");
                    return;
                }
                parts.push(part);
                let pause = backoff::pick(AGAIN, &mut rand::rng());
                tokio::time::sleep(pause).await;
            }
        }
    }
}
