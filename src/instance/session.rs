//! The manager's one SQL connection: over the Unix socket, as the superuser, by the operating system user.
//!
//! Owns the connection and its settings. Never: waits without a limit, waits for a standby's acknowledgement,
//! or resolves a name through anything but `pg_catalog` (an application could plant a function elsewhere).

use std::path::Path;
use std::time::Duration;

use anyhow::Context as _;
use tokio_postgres::{Client, NoTls};
use tokio_util::task::AbortOnDropHandle;

use super::vitals::Queries;
use crate::api::names::SUPERUSER;

/// Settings of the manager's session. They stand in the startup packet, so no user's parameter precedes them.
const OPTIONS: &str = "-c search_path=pg_catalog -c synchronous_commit=local \
    -c default_transaction_read_only=off -c statement_timeout=0 -c lock_timeout=2s \
    -c idle_in_transaction_session_timeout=0 -c log_statement=none -c log_min_error_statement=panic \
    -c log_min_duration_statement=-1 -c client_min_messages=warning -c DateStyle=ISO";

/// A connection that is closed when this goes.
pub struct Session {
    client: Client,
    queries: Queries,
    _driver: AbortOnDropHandle<()>,
    limit: Duration,
}

/// A connection to any database, for work that has statements of its own. It is closed when this goes.
pub struct Link {
    /// To ask with.
    pub client: Client,
    driver: AbortOnDropHandle<()>,
}

impl Link {
    /// Connects to `database` with these settings beside the manager's own.
    ///
    /// # Errors
    /// If PostgreSQL doesn't accept it within `limit`.
    pub async fn connect(
        run: &Path,
        port: u16,
        database: &str,
        options: &str,
        limit: Duration,
    ) -> anyhow::Result<Self> {
        Self::open(run, port, database, &format!("{OPTIONS} {options}"), limit).await
    }

    async fn open(
        run: &Path,
        port: u16,
        database: &str,
        options: &str,
        limit: Duration,
    ) -> anyhow::Result<Self> {
        let mut config = tokio_postgres::Config::new();
        config
            .host_path(run)
            .port(port)
            .user(SUPERUSER)
            .dbname(database)
            .application_name("domicile")
            .options(options)
            .connect_timeout(limit);
        let (client, connection) = tokio::time::timeout(limit, config.connect(NoTls))
            .await
            .context("PostgreSQL doesn't answer")??;
        let driver = tokio::spawn(async move {
            // The end of the connection shows as an error of the next statement.
            let _ = connection.await;
        });
        Ok(Self {
            client,
            driver: AbortOnDropHandle::new(driver),
        })
    }
}

impl Session {
    /// Connects to `database`.
    ///
    /// # Errors
    /// If PostgreSQL doesn't accept it within `limit`.
    pub async fn connect(
        run: &Path,
        port: u16,
        database: &str,
        limit: Duration,
    ) -> anyhow::Result<Self> {
        let Link { client, driver } = Link::open(run, port, database, OPTIONS, limit).await?;
        let queries = tokio::time::timeout(limit, Queries::prepare(&client)).await;
        match queries {
            Ok(Ok(queries)) => Ok(Self {
                client,
                queries,
                _driver: driver,
                limit,
            }),
            _ => anyhow::bail!("PostgreSQL doesn't answer"),
        }
    }

    /// Whether the connection is gone.
    #[must_use]
    pub fn closed(&self) -> bool {
        self.client.is_closed()
    }

    /// The connection, for the queries of `vitals`.
    #[must_use]
    pub fn client(&self) -> &Client {
        &self.client
    }

    /// The prepared queries.
    #[must_use]
    pub fn queries(&self) -> &Queries {
        &self.queries
    }

    /// How long a statement may take.
    #[must_use]
    pub fn limit(&self) -> Duration {
        self.limit
    }

    /// Runs statements that return nothing.
    ///
    /// # Errors
    /// PostgreSQL's error code and nothing of its message, which could quote the statement; or the time's end.
    pub async fn execute(&self, sql: &str) -> anyhow::Result<()> {
        self.execute_within(sql, self.limit).await
    }

    /// As [`Session::execute`], with another limit.
    ///
    /// # Errors
    /// As [`Session::execute`].
    pub async fn execute_within(&self, sql: &str, limit: Duration) -> anyhow::Result<()> {
        tokio::time::timeout(limit, self.client.batch_execute(sql))
            .await
            .context("PostgreSQL doesn't answer")?
            .map_err(|e| without_words(&e))
    }

    /// Sets a setting of this session to a value that nobody may see.
    ///
    /// # Errors
    /// As [`Session::execute`].
    pub async fn set(&self, setting: &str, secret: &str) -> anyhow::Result<()> {
        let parameters: [&(dyn tokio_postgres::types::ToSql + Sync); 2] =
            [&setting, &Secret(secret)];
        let query = self
            .client
            .query("SELECT set_config($1, $2, false) IS NULL", &parameters);
        tokio::time::timeout(self.limit, query)
            .await
            .context("PostgreSQL doesn't answer")?
            .map_err(|e| without_words(&e))?;
        Ok(())
    }

    /// The one row of a query without parameters.
    ///
    /// # Errors
    /// As [`Session::execute`], or if there isn't exactly one.
    pub async fn row(&self, sql: &str) -> anyhow::Result<tokio_postgres::Row> {
        tokio::time::timeout(self.limit, self.client.query_one(sql, &[]))
            .await
            .context("PostgreSQL doesn't answer")?
            .map_err(|e| without_words(&e))
    }

    /// The rows of a query without parameters.
    ///
    /// # Errors
    /// As [`Session::execute`].
    pub async fn rows(&self, sql: &str) -> anyhow::Result<Vec<tokio_postgres::Row>> {
        tokio::time::timeout(self.limit, self.client.query(sql, &[]))
            .await
            .context("PostgreSQL doesn't answer")?
            .map_err(|e| without_words(&e))
    }

    /// Whether a query returns any row. Its parameters are text.
    ///
    /// # Errors
    /// As [`Session::execute`].
    pub async fn any(&self, sql: &str, parameters: &[&str]) -> anyhow::Result<bool> {
        let parameters: Vec<&(dyn tokio_postgres::types::ToSql + Sync)> = parameters
            .iter()
            .map(|p| p as &(dyn tokio_postgres::types::ToSql + Sync))
            .collect();
        let rows = tokio::time::timeout(self.limit, self.client.query(sql, &parameters))
            .await
            .context("PostgreSQL doesn't answer")?
            .map_err(|e| without_words(&e))?;
        Ok(!rows.is_empty())
    }
}

/// A text parameter that a log of parameters doesn't show.
struct Secret<'a>(&'a str);

impl std::fmt::Debug for Secret<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Secret(..)")
    }
}

impl tokio_postgres::types::ToSql for Secret<'_> {
    fn to_sql(
        &self,
        ty: &tokio_postgres::types::Type,
        out: &mut bytes::BytesMut,
    ) -> Result<tokio_postgres::types::IsNull, Box<dyn std::error::Error + Sync + Send>> {
        self.0.to_sql(ty, out)
    }

    fn accepts(ty: &tokio_postgres::types::Type) -> bool {
        <&str as tokio_postgres::types::ToSql>::accepts(ty)
    }

    tokio_postgres::types::to_sql_checked!();
}

/// An error without PostgreSQL's message.
#[must_use]
pub fn without_words(error: &tokio_postgres::Error) -> anyhow::Error {
    match error.code() {
        Some(code) => anyhow::anyhow!("PostgreSQL refused a statement: error {}", code.code()),
        None => anyhow::anyhow!("the connection to PostgreSQL failed"),
    }
}
