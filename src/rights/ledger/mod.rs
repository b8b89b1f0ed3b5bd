//! The ledger: requests and their steps, in a database of the store that `ledgerRef` names.
//!
//! - [`types`]: what goes in and comes out
//! - [`error`]: what can go wrong, by what to do about it
//! - `connect`, `pool`: finding the primary; one way to run a statement
//! - `filing`: what a gateway does
//! - `work`: what a worker and an observer do
//! - [`wake`]: telling workers that there is something to do
//! - [`roles`], [`mod@migrate`]: run by the primary's instance manager: roles, database, schema
//!
//! What is decided is decided by functions inside the database, in one transaction, by its clock: `migrations/`. Three
//! roles call them, each its own and none a table.
//! Never: says that something is filed, changed or finished before it is on the quorum; runs a statement twice;
//! waits without a limit; passes PostgreSQL's messages on.

pub mod error;
pub mod migrate;
pub mod roles;
pub mod types;
pub mod wake;

mod connect;
mod filing;
mod pool;
mod work;

pub(crate) use filing::word;

use std::path::Path;
use std::sync::Arc;

pub use error::LedgerError;
pub use filing::{MOST_FILINGS, MOST_LISTED};
pub use migrate::{Migrated, migrate};
pub use types::*;
pub use wake::{Listener, Waker};

use crate::rights::config::Database;

/// The ledger, as the role whose certificate is in the directory. Cheap to clone; all clones share its connections.
#[derive(Clone)]
pub struct Ledger {
    pool: pool::Pool,
    route: Arc<connect::Route>,
}

impl Ledger {
    /// Connects to nothing yet: connections are made when they are needed, and made anew for ever. Certificates are
    /// read from `tls` (ca.crt, tls.crt, tls.key) for every connection.
    ///
    /// # Errors
    /// If there are no hosts.
    pub fn new(
        database: &Database,
        user: &str,
        tls: &Path,
        connections: usize,
        application_name: &str,
    ) -> anyhow::Result<Self> {
        let route = Arc::new(connect::Route::new(database, user, tls, application_name)?);
        Ok(Self {
            pool: pool::Pool::new(route.clone(), connections)?,
            route,
        })
    }

    /// How many calls wait for a connection: a measure of load.
    #[must_use]
    pub fn waiting(&self) -> usize {
        self.pool.waiting()
    }

    /// Tells workers that there is something to do, by a connection of its own.
    #[must_use]
    pub fn waker(&self) -> Waker {
        Waker::new(self.route.clone())
    }

    /// Hears that there is something to do, by a connection of its own.
    #[must_use]
    pub fn listener(&self) -> Listener {
        Listener::new(self.route.clone())
    }
}
