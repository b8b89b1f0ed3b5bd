//! Filings on their way into the ledger: those that come at the same time share a transaction.
//!
//! A commit waits for another machine's disk; filings that each waited alone would be few. So what comes while a
//! transaction is under way goes together in the next one, which begins when that one ends, or has taken longer than a
//! commit does: fewer and larger transactions cost less, and one that hangs holds up nobody for long. (With four at a
//! time from the start, 32 clients that file one by one got three quarters of the rate.)
//! Never: says that a filing is in the ledger before its commit has returned; takes more than it has room for; files
//! twice what it tries again (a filing keeps its id, so that a commit whose end wasn't heard of is found).

use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use futures::future::BoxFuture;
use rand::Rng as _;
use tokio::sync::{Mutex, mpsc, oneshot};
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep, timeout, timeout_at};
use tracing::error;

use super::metrics::Metrics;
use crate::rights::ledger::{Filed, LedgerError, SealedFiling};

/// The most filings in a transaction.
pub const BATCH: usize = 256;
/// Transactions at a time.
pub const IN_FLIGHT: usize = 4;
/// After this the next one begins beside it: what a commit takes within a region. Between regions it takes longer, and
/// several are under way.
pub const TURN: Duration = Duration::from_millis(20);
/// Pauses between tries: the first, and the longest. A failover takes about a second.
const PAUSE: Duration = Duration::from_millis(20);
const PAUSE_MAX: Duration = Duration::from_millis(250);

/// The ledger, as far as filing goes.
pub trait Book: Send + Sync {
    /// Files all of them in one transaction; see `Ledger::file`.
    fn file<'a>(
        &'a self,
        sealed: &'a [SealedFiling],
    ) -> BoxFuture<'a, Result<Vec<Filed>, LedgerError>>;
}

/// Why a filing isn't known to be in the ledger.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Trouble {
    /// There is no room to wait in. It isn't in the ledger.
    Busy,
    /// The ledger couldn't be reached in time. It may be in the ledger.
    Away,
    /// The ledger has no room, and which. It isn't in the ledger.
    Full(&'static str),
    /// The ledger doesn't take it. It isn't in the ledger.
    Refused,
}

struct Item {
    sealed: SealedFiling,
    until: Instant,
    answer: oneshot::Sender<Result<Filed, Trouble>>,
}

/// The way in.
#[derive(Clone)]
pub struct Intake {
    queue: mpsc::Sender<Item>,
    book: Arc<dyn Book>,
    metrics: Arc<Metrics>,
}

impl std::fmt::Debug for Intake {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Intake(..)")
    }
}

impl Intake {
    /// Starts the tasks, which end with the set, or when the last clone of this is gone and the queue is empty.
    #[must_use]
    pub fn start(book: Arc<dyn Book>, metrics: Arc<Metrics>, room: usize) -> (Self, JoinSet<()>) {
        let (queue, waiting) = mpsc::channel(room);
        let waiting = Arc::new(Mutex::new(waiting));
        let mut tasks = JoinSet::new();
        for _ in 0..IN_FLIGHT {
            tasks.spawn(carry(waiting.clone(), book.clone(), metrics.clone()));
        }
        let intake = Self {
            queue,
            book,
            metrics,
        };
        (intake, tasks)
    }

    /// Files one, together with whatever else comes now.
    ///
    /// # Errors
    /// See [`Trouble`].
    pub async fn file(&self, sealed: SealedFiling, until: Instant) -> Result<Filed, Trouble> {
        let (answer, answered) = oneshot::channel();
        let item = Item {
            sealed,
            until,
            answer,
        };
        self.queue.try_send(item).map_err(|_| Trouble::Busy)?;
        match timeout_at(until, answered).await {
            Ok(Ok(result)) => result,
            // Its transaction may be under way.
            Ok(Err(_)) | Err(_) => Err(Trouble::Away),
        }
    }

    /// Files all of them in a transaction of their own.
    ///
    /// # Errors
    /// See [`Trouble`]; it is all of them or none.
    pub async fn file_together(
        &self,
        sealed: Vec<SealedFiling>,
        until: Instant,
    ) -> Result<Vec<Filed>, Trouble> {
        let (book, metrics) = (self.book.clone(), self.metrics.clone());
        // Apart from the request: a client that goes away must not break off a transaction under way.
        let task = tokio::spawn(async move { persist(&*book, &metrics, &sealed, until).await });
        match timeout_at(until, task).await {
            Ok(Ok(result)) => result,
            Ok(Err(_)) | Err(_) => Err(Trouble::Away),
        }
    }
}

/// Takes what waits, files it, answers.
async fn carry(
    waiting: Arc<Mutex<mpsc::Receiver<Item>>>,
    book: Arc<dyn Book>,
    metrics: Arc<Metrics>,
) {
    loop {
        let mut items = Vec::with_capacity(BATCH);
        let mut turn = waiting.lock().await;
        if turn.recv_many(&mut items, BATCH).await == 0 {
            return;
        }
        // Nobody waits for these any more, and whoever filed them has been told to try again.
        items.retain(|item| !item.answer.is_closed());
        let Some(until) = items.iter().map(|item| item.until).max() else {
            continue;
        };
        let (sealed, answers): (Vec<_>, Vec<_>) =
            items.into_iter().map(|i| (i.sealed, i.answer)).unzip();
        let mut persisted = pin!(persist(&*book, &metrics, &sealed, until));
        let in_time = timeout(TURN, &mut persisted).await;
        drop(turn);
        let persisted = match in_time {
            Ok(persisted) => persisted,
            Err(_) => persisted.await,
        };
        match persisted {
            Ok(filed) => {
                for (answer, filed) in answers.into_iter().zip(filed) {
                    let _ = answer.send(Ok(filed));
                }
            }
            // One that the ledger doesn't take must not keep out the others.
            Err(Trouble::Refused) if sealed.len() > 1 => {
                for (answer, one) in answers.into_iter().zip(&sealed) {
                    let one = std::slice::from_ref(one);
                    let filed = persist(&*book, &metrics, one, until).await;
                    let first = filed.and_then(|f| f.into_iter().next().ok_or(Trouble::Refused));
                    let _ = answer.send(first);
                }
            }
            Err(trouble) => {
                for answer in answers {
                    let _ = answer.send(Err(trouble));
                }
            }
        }
    }
}

/// Files in one transaction, and tries again with the same ids for as long as there is time.
async fn persist(
    book: &dyn Book,
    metrics: &Metrics,
    sealed: &[SealedFiling],
    until: Instant,
) -> Result<Vec<Filed>, Trouble> {
    metrics.batch(sealed.len());
    let mut pause = PAUSE;
    loop {
        match book.file(sealed).await {
            Ok(filed) if filed.len() == sealed.len() => return Ok(filed),
            Ok(_) => {
                error!("the ledger's answer doesn't fit what was filed");
                return Err(Trouble::Away);
            }
            Err(LedgerError::Full(what)) => return Err(Trouble::Full(what)),
            Err(LedgerError::Refused(state)) => {
                error!(%state, filings = sealed.len(), "the ledger refuses a transaction");
                return Err(Trouble::Refused);
            }
            Err(LedgerError::Unavailable(_)) => {}
        }
        // Jitter: the gateways must not all come back at once.
        let wait = pause.mul_f64(rand::rng().random_range(0.5..1.0));
        if Instant::now() + wait >= until {
            return Err(Trouble::Away);
        }
        metrics.retried();
        sleep(wait).await;
        pause = (pause * 2).min(PAUSE_MAX);
    }
}

#[cfg(test)]
mod tests;
