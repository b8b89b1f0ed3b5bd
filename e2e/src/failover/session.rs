//! One session with one server: TLS, time-outs, warnings.
//!
//! Owns opening and dropping. Never cancels a statement: a session that takes too long is dropped where it is,
//! which says nothing about what the server does with it.

use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::task::{Context as Poller, Poll};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, ServerName};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::TcpStream;
use tokio::task::JoinHandle;
use tokio_postgres::config::SslMode;
use tokio_postgres::tls::{ChannelBinding, TlsConnect, TlsStream};
use tokio_postgres::{
    AsyncMessage, CancelToken, Client, Connection, NoTls, SimpleQueryMessage, error::Severity,
};

use super::target::{Host, Target};

/// What a server says of itself: in recovery, read-only, timeline. The timeline is that of the WAL being written,
/// so it is right from the promotion on and not only after the next checkpoint.
const IDENTITY: &str = "select pg_catalog.pg_is_in_recovery(), \
    pg_catalog.current_setting('transaction_read_only'), \
    case when pg_catalog.pg_is_in_recovery() then '0' \
    else pg_catalog.left(pg_catalog.pg_walfile_name(pg_catalog.pg_current_wal_lsn()), 8) end";

/// How to reach a cluster's servers.
#[derive(Clone)]
pub struct Connector {
    target: Arc<Target>,
    tls: Option<tokio_rustls::TlsConnector>,
}

/// What a server says of itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Identity {
    /// The timeline it writes; `None`: it is a standby.
    pub timeline: Option<u32>,
    /// Whether it refuses writes.
    pub read_only: bool,
}

impl Identity {
    /// Whether libpq would take it for `target_session_attrs=read-write`.
    #[must_use]
    pub fn writable(self) -> Option<u32> {
        self.timeline.filter(|_| !self.read_only)
    }
}

/// An open session. Dropped, its socket closes without a word to the server, as when a client's process dies.
pub struct Session {
    // First, so that it ends before the client can say goodbye through it.
    driver: Driver,
    client: Client,
    warnings: Arc<AtomicU64>,
}

struct Driver(JoinHandle<()>);

impl Drop for Driver {
    fn drop(&mut self) {
        self.0.abort();
    }
}

/// How long a goodbye may take.
const GOODBYE: Duration = Duration::from_millis(200);

impl Connector {
    /// Takes the cluster's authority in.
    ///
    /// # Errors
    /// If it isn't one.
    pub fn new(target: Target) -> Result<Self> {
        let tls = target.ca.as_deref().map(tls_config).transpose()?;
        Ok(Self {
            target: Arc::new(target),
            tls,
        })
    }

    /// The cluster.
    #[must_use]
    pub fn target(&self) -> &Target {
        &self.target
    }

    async fn stream(&self, host: &Host) -> Result<TcpStream> {
        let stream = TcpStream::connect((host.address, host.port)).await?;
        stream.set_nodelay(true)?;
        let limit = Duration::from_millis(self.target.tcp_user_timeout_ms);
        socket2::SockRef::from(&stream).set_tcp_user_timeout(Some(limit))?;
        Ok(stream)
    }

    fn tls(&self, host: &Host) -> Result<Option<Tls>> {
        let Some(connector) = self.tls.clone() else {
            return Ok(None);
        };
        let name = ServerName::try_from(host.name.clone()).context("the host's name")?;
        Ok(Some(Tls { connector, name }))
    }

    /// Opens a session and asks the server what it is: all within `limit`, as libpq bounds a host.
    ///
    /// # Errors
    /// If that fails or takes longer.
    pub async fn open(&self, host: &Host, limit: Duration) -> Result<(Session, Identity)> {
        tokio::time::timeout(limit, self.open_unbounded(host))
            .await
            .context("no session in time")?
    }

    async fn open_unbounded(&self, host: &Host) -> Result<(Session, Identity)> {
        let mut config = tokio_postgres::Config::new();
        config
            .user(&self.target.user)
            .password(&self.target.password)
            .dbname(&self.target.database)
            .application_name("failover-bench");
        let stream = self.stream(host).await.context("connecting")?;
        let warnings = Arc::new(AtomicU64::new(0));
        let (client, driver) = if let Some(tls) = self.tls(host)? {
            config.ssl_mode(SslMode::Require);
            let (client, connection) = config.connect_raw(stream, tls).await?;
            (
                client,
                tokio::spawn(drive(connection, Arc::clone(&warnings))),
            )
        } else {
            config.ssl_mode(SslMode::Disable);
            let (client, connection) = config.connect_raw(stream, NoTls).await?;
            (
                client,
                tokio::spawn(drive(connection, Arc::clone(&warnings))),
            )
        };
        let session = Session {
            driver: Driver(driver),
            client,
            warnings,
        };
        let identity = session.identity().await?;
        Ok((session, identity))
    }

    /// Asks the server to cancel what a session waits for. Only for the case that is about just that.
    ///
    /// # Errors
    /// If the server can't be asked.
    pub async fn cancel(&self, host: &Host, token: &CancelToken) -> Result<()> {
        let stream = self.stream(host).await?;
        match self.tls(host)? {
            Some(tls) => token.cancel_query_raw(stream, tls).await?,
            None => token.cancel_query_raw(stream, NoTls).await?,
        }
        Ok(())
    }
}

/// Runs a connection to its end and counts the server's warnings. A warning that comes with an answer is counted
/// before the answer is seen, since both come in order.
async fn drive<S, T>(mut connection: Connection<S, T>, warnings: Arc<AtomicU64>)
where
    S: AsyncRead + AsyncWrite + Unpin,
    T: AsyncRead + AsyncWrite + Unpin,
{
    loop {
        match std::future::poll_fn(|cx| connection.poll_message(cx)).await {
            Some(Ok(AsyncMessage::Notice(notice))) => {
                if notice.parsed_severity() == Some(Severity::Warning) {
                    warnings.fetch_add(1, Ordering::SeqCst);
                }
            }
            Some(Ok(_)) => {}
            // The end shows as an error of the statement under way.
            Some(Err(_)) | None => return,
        }
    }
}

impl Session {
    /// Asks the server what it is.
    ///
    /// # Errors
    /// If it doesn't say.
    pub async fn identity(&self) -> Result<Identity> {
        let rows = self.rows(IDENTITY).await?;
        let Some([recovery, read_only, timeline]) =
            rows.first().and_then(|r| <&[_; 3]>::try_from(&r[..]).ok())
        else {
            bail!("the server doesn't say what it is");
        };
        let timeline = u32::from_str_radix(timeline, 16).context("the server's timeline")?;
        Ok(Identity {
            timeline: (recovery == "f").then_some(timeline),
            read_only: read_only != "off",
        })
    }

    /// The rows of a query, as text.
    ///
    /// # Errors
    /// If the server refuses, or the connection fails.
    pub async fn rows(&self, sql: &str) -> Result<Vec<Vec<String>>> {
        let mut rows = Vec::new();
        for message in self.client.simple_query(sql).await? {
            if let SimpleQueryMessage::Row(row) = message {
                rows.push(
                    (0..row.len())
                        .map(|i| row.get(i).unwrap_or_default().to_owned())
                        .collect(),
                );
            }
        }
        Ok(rows)
    }

    /// Commits one statement. Comes back without error only if the server said that it is committed: a simple
    /// query's completion is sent after the commit, and waited for until the server is ready for the next.
    /// Whether it warned is the answer.
    ///
    /// # Errors
    /// If there is no such answer: the statement may be committed or not.
    pub async fn commit(&self, sql: &str) -> Result<bool> {
        let before = self.warnings.load(Ordering::SeqCst);
        self.client.batch_execute(sql).await?;
        Ok(self.warnings.load(Ordering::SeqCst) != before)
    }

    /// Ends the session politely.
    pub async fn close(self) {
        let Self {
            mut driver, client, ..
        } = self;
        drop(client);
        // Whoever doesn't let us go in time is left.
        let _ = tokio::time::timeout(GOODBYE, &mut driver.0).await;
    }

    /// What is needed to ask the server to cancel this session's statement.
    #[must_use]
    pub fn cancel_token(&self) -> CancelToken {
        self.client.cancel_token()
    }
}

/// TLS that trusts this authority (PEM) and no other.
///
/// # Errors
/// If it isn't one.
pub fn tls_config(ca: &str) -> Result<tokio_rustls::TlsConnector> {
    let mut roots = rustls::RootCertStore::empty();
    for certificate in CertificateDer::pem_slice_iter(ca.as_bytes()) {
        roots
            .add(certificate.context("reading the authority's certificate")?)
            .context("the authority's certificate")?;
    }
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let config = rustls::ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .context("TLS versions")?
        .with_root_certificates(roots)
        .with_no_client_auth();
    Ok(Arc::new(config).into())
}

/// TLS with one server.
struct Tls {
    connector: tokio_rustls::TlsConnector,
    name: ServerName<'static>,
}

impl TlsConnect<TcpStream> for Tls {
    type Stream = Wrapped;
    type Error = std::io::Error;
    type Future = Pin<Box<dyn Future<Output = std::io::Result<Wrapped>> + Send>>;

    fn connect(self, stream: TcpStream) -> Self::Future {
        Box::pin(async move {
            self.connector
                .connect(self.name, stream)
                .await
                .map(|s| Wrapped(Box::new(s)))
        })
    }
}

/// A connection inside TLS.
struct Wrapped(Box<tokio_rustls::client::TlsStream<TcpStream>>);

impl TlsStream for Wrapped {
    fn channel_binding(&self) -> ChannelBinding {
        ChannelBinding::none()
    }
}

impl AsyncRead for Wrapped {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Poller<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<std::io::Result<()>> {
        Pin::new(&mut *self.0).poll_read(cx, buffer)
    }
}

impl AsyncWrite for Wrapped {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Poller<'_>,
        bytes: &[u8],
    ) -> Poll<std::io::Result<usize>> {
        Pin::new(&mut *self.0).poll_write(cx, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Poller<'_>) -> Poll<std::io::Result<()>> {
        Pin::new(&mut *self.0).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Poller<'_>) -> Poll<std::io::Result<()>> {
        Pin::new(&mut *self.0).poll_shutdown(cx)
    }
}
