//! A few connections to the primary, and one way to run a statement on one.
//!
//! Owns: how long anything may wait, when a connection is no longer used, and that an answer counts only if it is
//! certain. Never: runs a statement twice, or lets the connections of one process grow without a limit.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use deadpool::managed::{self, Metrics, Object, PoolError, RecycleError, RecycleResult};
use tokio::sync::Semaphore;
use tokio::time::Instant;
use tokio_postgres::types::{ToSql, Type};
use tokio_postgres::{Row, Statement};

use super::connect::{Link, Route};
use super::error::{LedgerError, SLOW, UNCONFIRMED};

/// How long a call may wait for a connection: a failover, with some room.
const CONNECTION: Duration = Duration::from_secs(4);
/// Between two attempts to find a primary.
const PAUSE: Duration = Duration::from_millis(50);

/// A statement, its parameters' types and its limit.
#[derive(Debug)]
pub(super) struct Call {
    pub(super) sql: &'static str,
    pub(super) types: &'static [Type],
    pub(super) limit: Duration,
}

/// Makes connections.
#[derive(Debug)]
pub(super) struct Maker {
    route: Arc<Route>,
    /// Connections of an older generation are no longer used: one of them failed, so the others may lead to the same
    /// dead host.
    generation: AtomicU64,
    /// Bounds connections, those included that only wait for an answer which nobody awaits any more.
    backends: Arc<Semaphore>,
}

/// A pooled connection.
pub(super) struct Pooled {
    link: Link,
    prepared: Mutex<HashMap<&'static str, Statement>>,
    /// Its last answer wasn't certain.
    spoilt: bool,
}

impl managed::Manager for Maker {
    type Type = Pooled;
    type Error = LedgerError;

    async fn create(&self) -> Result<Pooled, LedgerError> {
        let permit = self
            .backends
            .clone()
            .try_acquire_owned()
            .map_err(|_| LedgerError::Unavailable("earlier statements are still unanswered"))?;
        let generation = self.generation.load(Ordering::Acquire);
        let link = self.route.connect(generation, Some(permit)).await?;
        super::migrate::check(&link.client).await?;
        Ok(Pooled {
            link,
            prepared: Mutex::default(),
            spoilt: false,
        })
    }

    async fn recycle(&self, pooled: &mut Pooled, _: &Metrics) -> RecycleResult<LedgerError> {
        if pooled.spoilt
            || pooled.link.client.is_closed()
            || pooled.link.generation != self.generation.load(Ordering::Acquire)
        {
            return Err(RecycleError::message("no longer used"));
        }
        Ok(())
    }
}

/// The connections.
#[derive(Clone)]
pub(super) struct Pool(managed::Pool<Maker>);

impl Pool {
    pub(super) fn new(route: Arc<Route>, connections: usize) -> anyhow::Result<Self> {
        let connections = connections.max(1);
        let maker = Maker {
            route,
            generation: AtomicU64::new(0),
            backends: Arc::new(Semaphore::new(2 * connections)),
        };
        let pool = managed::Pool::builder(maker)
            .max_size(connections)
            .queue_mode(managed::QueueMode::Lifo)
            .runtime(deadpool::Runtime::Tokio1)
            .wait_timeout(Some(CONNECTION))
            .create_timeout(Some(CONNECTION))
            .build()?;
        Ok(Self(pool))
    }

    /// How many calls wait for a connection.
    pub(super) fn waiting(&self) -> usize {
        self.0.status().waiting
    }

    /// The rows of a call, once they are certain: what it wrote is then as durable as the call says.
    ///
    /// # Errors
    /// If it couldn't be done, or couldn't be known to be done, within the limits.
    pub(super) async fn rows(
        &self,
        call: &Call,
        parameters: &[&(dyn ToSql + Sync)],
    ) -> Result<Vec<Row>, LedgerError> {
        let mut pooled = self.connection().await?;
        let warned = pooled.link.warnings();
        // Until the answer is here: whoever gives up waiting leaves a connection that isn't to be used again.
        pooled.spoilt = true;
        let answer = match tokio::time::timeout(call.limit, pooled.query(call, parameters)).await {
            Ok(answer) => answer,
            Err(_) => Err(LedgerError::Unavailable(SLOW)),
        };
        let answer = match answer {
            // The commit is visible here, but the wait for the quorum was cut short: nothing that may be promised.
            Ok(_) if pooled.link.warnings() != warned => Err(LedgerError::Unavailable(UNCONFIRMED)),
            other => other,
        };
        match &answer {
            Err(e) if e.spoils_connection() => {
                // The other connections may lead to the same dead host; each would cost its first user a timeout.
                let generation = pooled.link.generation;
                let _ = self.0.manager().generation.compare_exchange(
                    generation,
                    generation + 1,
                    Ordering::AcqRel,
                    Ordering::Acquire,
                );
            }
            _ => pooled.spoilt = false,
        }
        answer
    }

    /// A connection, at a failover after some attempts. Nothing was sent before, so attempts cost nothing.
    async fn connection(&self) -> Result<Object<Maker>, LedgerError> {
        let deadline = Instant::now() + CONNECTION;
        loop {
            let failed = match self.0.get().await {
                Ok(pooled) => return Ok(pooled),
                Err(PoolError::Backend(e)) => e,
                Err(PoolError::Timeout(managed::TimeoutType::Wait)) => {
                    return Err(LedgerError::Unavailable("all connections are busy"));
                }
                Err(PoolError::Timeout(_)) => {
                    LedgerError::Unavailable("no instance answered as the primary in time")
                }
                Err(
                    PoolError::Closed
                    | PoolError::NoRuntimeSpecified
                    | PoolError::PostCreateHook(_),
                ) => {
                    return Err(LedgerError::Unavailable("this process stops"));
                }
            };
            let again =
                matches!(failed, LedgerError::Unavailable(_)) && Instant::now() + PAUSE < deadline;
            if !again {
                return Err(failed);
            }
            tokio::time::sleep(PAUSE).await;
        }
    }
}

impl Pooled {
    async fn query(
        &self,
        call: &Call,
        parameters: &[&(dyn ToSql + Sync)],
    ) -> Result<Vec<Row>, LedgerError> {
        let known = self.known(call.sql);
        let statement = match known {
            Some(statement) => statement,
            None => {
                let statement = self.link.client.prepare_typed(call.sql, call.types).await?;
                if let Ok(mut prepared) = self.prepared.lock() {
                    prepared.insert(call.sql, statement.clone());
                }
                statement
            }
        };
        Ok(self.link.client.query(&statement, parameters).await?)
    }

    fn known(&self, sql: &str) -> Option<Statement> {
        self.prepared.lock().ok()?.get(sql).cloned()
    }
}
