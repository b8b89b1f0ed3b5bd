//! Finding the primary, and connections to it.
//!
//! Owns: one connection attempt to every host at once, of which the first that reaches a primary wins. tokio-postgres
//! would try them one after the other, and the address of a dead node doesn't answer: each failover would cost a
//! `connect_timeout`. Certificates are read for every attempt, so that renewed ones are used without further ado.
//! Never: speaks without TLS, or to a host whose certificate doesn't name it; waits without a limit.

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use anyhow::Context as _;
use futures::stream::{FuturesUnordered, StreamExt as _};
use tokio::sync::OwnedSemaphorePermit;
use tokio_postgres::config::{SslMode, TargetSessionAttrs};
use tokio_postgres::{AsyncMessage, Client};
use tokio_postgres_rustls::MakeRustlsConnect;

use super::error::{CONNECTION, LedgerError};
use crate::instance::tls::Certificate;
use crate::rights::config::Database;
use crate::rights::postgres::client_config;

/// How long one attempt may take, TLS and authentication included.
const ATTEMPT: Duration = Duration::from_secs(2);
/// Sent and not acknowledged for so long, the other side is gone. Also what a frozen host costs those who wait on it.
const UNACKNOWLEDGED: Duration = Duration::from_secs(3);
/// Silence after which the other side is asked whether it is there; and how often.
const SILENCE: Duration = Duration::from_secs(1);
/// How long a connection that nobody uses any more may wait for the answer to its last statement.
const LINGER: Duration = Duration::from_secs(60);

/// Settings of every session. They stand in the startup packet, so that nothing precedes them. The statement's limit
/// is for what was abandoned on this side; callers wait for less.
const OPTIONS: &str = "-c search_path=pg_catalog -c client_min_messages=warning -c statement_timeout=30s \
    -c lock_timeout=10s -c idle_in_transaction_session_timeout=10s -c default_transaction_isolation=read\\ committed \
    -c default_transaction_read_only=off -c TimeZone=UTC -c DateStyle=ISO -c jit=off";

/// How the ledger is reached.
#[derive(Debug)]
pub(super) struct Route {
    hosts: Vec<String>,
    config: tokio_postgres::Config,
    tls: PathBuf,
    /// What was last wrong with the certificate: said once, not at every attempt.
    complaint: Mutex<Option<String>>,
}

/// A connection to the primary.
pub(super) struct Link {
    pub(super) client: Client,
    /// Warnings that came so far.
    warnings: Arc<AtomicU64>,
    /// Channels on which something was notified, if the connection listens.
    pub(super) notified: Arc<tokio::sync::Notify>,
    /// Which generation of connections it is of.
    pub(super) generation: u64,
    _gone: tokio::sync::oneshot::Sender<()>,
}

impl Link {
    /// How many warnings came so far. During the wait for the quorum, a cancelled statement is one of these, *and a
    /// success*: "the transaction has already committed locally, but might not have been replicated".
    pub(super) fn warnings(&self) -> u64 {
        self.warnings.load(Ordering::Acquire)
    }
}

impl Route {
    pub(super) fn new(
        database: &Database,
        user: &str,
        tls: &Path,
        application_name: &str,
    ) -> anyhow::Result<Self> {
        anyhow::ensure!(
            !database.hosts.is_empty(),
            "the ledger has no hosts: the operator writes them into workflow.json"
        );
        let mut config = tokio_postgres::Config::new();
        config
            .port(database.port)
            .dbname(&database.name)
            .user(user)
            .application_name(application_name)
            .options(OPTIONS)
            .ssl_mode(SslMode::Require)
            .target_session_attrs(TargetSessionAttrs::ReadWrite)
            .connect_timeout(ATTEMPT)
            .tcp_user_timeout(UNACKNOWLEDGED)
            .keepalives_idle(SILENCE)
            .keepalives_interval(SILENCE)
            .keepalives_retries(3);
        Ok(Self {
            hosts: database.hosts.clone(),
            config,
            tls: tls.to_owned(),
            complaint: Mutex::default(),
        })
    }

    /// The first host that turns out to be the primary.
    pub(super) async fn connect(
        &self,
        generation: u64,
        permit: Option<OwnedSemaphorePermit>,
    ) -> Result<Link, LedgerError> {
        let tls = self.tls().map_err(|e| {
            let words = format!("{e:#}");
            let mut complaint = self
                .complaint
                .lock()
                .unwrap_or_else(PoisonError::into_inner);
            if complaint.as_ref() != Some(&words) {
                tracing::warn!("can't use the certificate for the ledger: {words}");
                *complaint = Some(words);
            }
            LedgerError::Unavailable("the certificate in the pod can't be used")
        })?;
        let mut attempts: FuturesUnordered<_> = self
            .hosts
            .iter()
            .map(|host| self.attempt(host, tls.clone()))
            .collect();
        let mut worst = LedgerError::Unavailable("no instance is the primary");
        while let Some(attempt) = attempts.next().await {
            match attempt {
                Ok((client, connection)) => {
                    let (gone, abandoned) = tokio::sync::oneshot::channel();
                    let warnings = Arc::new(AtomicU64::new(0));
                    let notified = Arc::new(tokio::sync::Notify::new());
                    tokio::spawn(drive(
                        connection,
                        abandoned,
                        warnings.clone(),
                        notified.clone(),
                        permit,
                    ));
                    return Ok(Link {
                        client,
                        warnings,
                        notified,
                        generation,
                        _gone: gone,
                    });
                }
                // What the primary says weighs more than that a standby isn't one.
                Err(e @ (LedgerError::Full(_) | LedgerError::Refused(_))) => worst = e,
                Err(LedgerError::Unavailable(why))
                    if matches!(worst, LedgerError::Unavailable(_)) && why != CONNECTION =>
                {
                    worst = LedgerError::Unavailable(why);
                }
                Err(LedgerError::Unavailable(_)) => {}
            }
        }
        Err(worst)
    }

    async fn attempt(
        &self,
        host: &str,
        tls: MakeRustlsConnect,
    ) -> Result<(Client, Connection), LedgerError> {
        let mut config = self.config.clone();
        config.host(host);
        match tokio::time::timeout(ATTEMPT, config.connect(tls)).await {
            Ok(Ok(connected)) => Ok(connected),
            Ok(Err(e)) => Err(LedgerError::from(&e)),
            Err(_) => Err(LedgerError::Unavailable(CONNECTION)),
        }
    }

    fn tls(&self) -> anyhow::Result<MakeRustlsConnect> {
        let certificate = Certificate::read(&self.tls)
            .with_context(|| format!("can't read {}", self.tls.display()))?
            .with_context(|| {
                format!(
                    "{} must have ca.crt, tls.crt and tls.key",
                    self.tls.display()
                )
            })?;
        let pair = (certificate.cert(), certificate.key());
        let mut config =
            client_config(Some(certificate.ca()), Some(pair)).map_err(anyhow::Error::msg)?;
        // A resumed session would go on with a certificate that was good once.
        config.resumption = rustls::client::Resumption::disabled();
        Ok(MakeRustlsConnect::new(config))
    }
}

type Connection = tokio_postgres::Connection<
    tokio_postgres::Socket,
    <MakeRustlsConnect as tokio_postgres::tls::MakeTlsConnect<tokio_postgres::Socket>>::Stream,
>;

/// Moves a connection on until it ends. When its client is dropped, PostgreSQL's answer to the last statement is still
/// waited for, a while: closing at once wouldn't end a backend that waits for the quorum, and the next connection, and
/// the one after it, would pile up beside it. The permit, one of a bounded number, is held until it is over.
async fn drive(
    mut connection: Connection,
    abandoned: tokio::sync::oneshot::Receiver<()>,
    warnings: Arc<AtomicU64>,
    notified: Arc<tokio::sync::Notify>,
    permit: Option<OwnedSemaphorePermit>,
) {
    let limit = async {
        let _ = abandoned.await;
        tokio::time::sleep(LINGER).await;
    };
    tokio::pin!(limit);
    loop {
        let message = std::future::poll_fn(|cx| connection.poll_message(cx));
        tokio::select! {
            message = message => match message {
                Some(Ok(AsyncMessage::Notice(_))) => {
                    warnings.fetch_add(1, Ordering::AcqRel);
                }
                Some(Ok(AsyncMessage::Notification(_))) => notified.notify_one(),
                Some(Ok(_)) => {}
                // The end of the connection shows as an error of the next statement.
                Some(Err(_)) | None => break,
            },
            () = &mut limit => break,
        }
    }
    drop(connection);
    drop(permit);
    // Who listens must learn that nothing will come this way any more.
    notified.notify_one();
}
