//! Connections to PostgreSQL for whoever works on requests: the ledger's, and those of targets.
//!
//! Owns: how a primary is found among hosts, TLS, and what of an error may be told. Every host is tried at once, since a
//! frozen server still accepts connections and would hold up whoever waits for it before trying the next.
//! Never: connects without TLS unless a URL says `sslmode=disable`; trusts a certificate that doesn't name the host;
//! passes on the text of an error (it may quote values, and the URL has a password).

use std::path::Path;
use std::str::FromStr as _;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use futures::StreamExt as _;
use futures::stream::FuturesUnordered;
use rustls::crypto::ring;
use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::{ClientConfig, RootCertStore};
use tokio_postgres::config::{Host, SslMode, TargetSessionAttrs};
use tokio_postgres::error::{DbError, SqlState};
use tokio_postgres::{AsyncMessage, Client, Config, Connection, NoTls, Socket};
use tokio_postgres_rustls::MakeRustlsConnect;

use super::config::Database;

/// Why there is no connection. The words name hosts, files and roles, and nothing secret.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Trouble {
    /// What we were given can't be used: a file, a URL.
    #[error("{0}")]
    Setup(String),
    /// A server answered, and refuses who we are.
    #[error("{0}")]
    Credentials(String),
    /// A server answered, and doesn't have the database.
    #[error("{0}")]
    NoDatabase(String),
    /// No primary answered.
    #[error("{0}")]
    Unreachable(String),
}

impl Trouble {
    /// The more it tells, the higher.
    fn weight(&self) -> u8 {
        match self {
            Self::Unreachable(_) => 0,
            Self::Setup(_) => 1,
            Self::NoDatabase(_) => 2,
            Self::Credentials(_) => 3,
        }
    }
}

/// By what one is a role at a store: PEM. No `Debug`: it would print the key.
pub struct Identity {
    /// Authorities that servers' certificates are checked against.
    pub ca: Vec<u8>,
    /// The certificate.
    pub certificate: Vec<u8>,
    /// Its key.
    pub key: Vec<u8>,
}

/// How to reach a database.
pub struct Address {
    /// Without hosts.
    config: Config,
    hosts: Vec<Place>,
    tls: Option<MakeRustlsConnect>,
}

/// One host. Its name is what its certificate is checked against.
struct Place {
    name: String,
    address: Option<std::net::IpAddr>,
    port: u16,
}

/// A connection to a primary. It ends when this goes.
pub struct Session {
    /// To ask with.
    pub client: Client,
    /// Which host it is.
    pub host: String,
    unreplicated: Arc<AtomicBool>,
    driver: tokio::task::JoinHandle<()>,
}

impl Drop for Session {
    fn drop(&mut self) {
        // A frozen server would never take the goodbye.
        self.driver.abort();
    }
}

impl Session {
    /// Whether, since this was last asked, a commit returned without the acknowledgement of standbys that it waited for.
    /// PostgreSQL says so in a warning only, and then calls the commit a success: somebody cancelled the wait.
    pub fn take_unreplicated(&self) -> bool {
        self.unreplicated.swap(false, Ordering::AcqRel)
    }
}

impl Address {
    /// A database of a store, as the role that the certificate in `tls` (ca.crt, tls.crt, tls.key) stands for.
    ///
    /// # Errors
    /// If a file isn't there or isn't what it should be.
    pub fn of_store(
        database: &Database,
        role: &str,
        tls: &Path,
        application_name: &str,
    ) -> Result<Self, Trouble> {
        let read = |name: &str| {
            let path = tls.join(name);
            std::fs::read(&path)
                .map_err(|e| Trouble::Setup(format!("can't read {}: {e}", path.display())))
        };
        let identity = Identity {
            ca: read("ca.crt")?,
            certificate: read("tls.crt")?,
            key: read("tls.key")?,
        };
        Self::of_store_with(database, role, &identity, application_name).map_err(|trouble| {
            match trouble {
                Trouble::Setup(what) => Trouble::Setup(format!("{}: {what}", tls.display())),
                other => other,
            }
        })
    }

    /// As [`Address::of_store`], with a certificate that is in no file.
    ///
    /// # Errors
    /// If it isn't what it should be.
    pub fn of_store_with(
        database: &Database,
        role: &str,
        identity: &Identity,
        application_name: &str,
    ) -> Result<Self, Trouble> {
        let pair = (&identity.certificate[..], &identity.key[..]);
        let client = client_config(Some(&identity.ca), Some(pair)).map_err(Trouble::Setup)?;
        let mut config = Config::new();
        config
            .user(role)
            .dbname(&database.name)
            .application_name(application_name)
            .ssl_mode(SslMode::Require);
        let hosts = database.hosts.iter().map(|name| Place {
            name: name.clone(),
            address: None,
            port: database.port,
        });
        Ok(Self {
            config,
            hosts: hosts.collect(),
            tls: Some(connector(client)),
        })
    }

    /// Any database, by a `postgresql://` URL, with the authority (PEM) that its certificate is checked against; none:
    /// the public ones.
    ///
    /// # Errors
    /// If the URL or the authority can't be used. The URL isn't quoted: it has a password.
    pub fn of_url(url: &str, ca: Option<&[u8]>, application_name: &str) -> Result<Self, Trouble> {
        let setup = |what: &str| Trouble::Setup(format!("the URL of the database {what}"));
        let url = url.trim();
        if !url.starts_with("postgresql://") && !url.starts_with("postgres://") {
            return Err(setup("doesn't begin with postgresql://"));
        }
        let url = normalised(url).map_err(|what| setup(&what))?;
        let given = Config::from_str(&url).map_err(|_| {
            setup(
                "isn't understood: postgresql://USER:PASSWORD@HOST:PORT/DATABASE, with special characters of the \
                 password as %XX",
            )
        })?;
        let hosts = places(&given).map_err(setup)?;
        let Some(user) = given.get_user() else {
            return Err(setup("names no user"));
        };
        let mut config = Config::new();
        config
            .user(user)
            .dbname(given.get_dbname().unwrap_or(user))
            .application_name(given.get_application_name().unwrap_or(application_name))
            .ssl_mode(given.get_ssl_mode())
            .ssl_negotiation(given.get_ssl_negotiation())
            .channel_binding(given.get_channel_binding());
        if let Some(password) = given.get_password() {
            config.password(password);
        }
        if let Some(options) = given.get_options() {
            config.options(options);
        }
        let tls = if given.get_ssl_mode() == SslMode::Disable {
            None
        } else {
            config.ssl_mode(SslMode::Require);
            let client = client_config(ca, None)
                .map_err(|what| Trouble::Setup(format!("the database's authority: {what}")))?;
            Some(connector(client))
        };
        Ok(Self { config, hosts, tls })
    }

    /// How many hosts there are.
    #[must_use]
    pub fn hosts(&self) -> usize {
        self.hosts.len()
    }

    /// Startup options (`-c name=value …`), in place of those that a URL has.
    #[must_use]
    pub fn options(mut self, options: &str) -> Self {
        self.config.options(options);
        self
    }

    /// Connects to whichever host is the primary.
    ///
    /// # Errors
    /// If none says so within this time.
    pub async fn primary(&self, within: Duration) -> Result<Session, Trouble> {
        let mut attempts: FuturesUnordered<_> = self
            .hosts
            .iter()
            .map(|place| async move {
                let answer = tokio::time::timeout(within, self.connect(place)).await;
                answer.unwrap_or_else(|_| {
                    Err(Trouble::Unreachable(format!(
                        "{} doesn't answer",
                        place.name
                    )))
                })
            })
            .collect();
        let mut worst = Trouble::Unreachable("there is no host to connect to".into());
        let mut first = true;
        while let Some(answer) = attempts.next().await {
            match answer {
                Ok(session) => return Ok(session),
                Err(trouble) if first || trouble.weight() > worst.weight() => worst = trouble,
                Err(_) => {}
            }
            first = false;
        }
        Err(worst)
    }

    async fn connect(&self, place: &Place) -> Result<Session, Trouble> {
        let mut config = self.config.clone();
        config
            .host(&place.name)
            .port(place.port)
            .target_session_attrs(TargetSessionAttrs::ReadWrite);
        if let Some(address) = place.address {
            config.hostaddr(address);
        }
        let trouble = |e| why(&e, place, &self.config);
        match &self.tls {
            Some(tls) => {
                // Boxed: a TLS handshake is large.
                let connecting = Box::pin(config.connect(tls.clone()));
                let (client, connection) = connecting.await.map_err(trouble)?;
                Ok(session(client, connection, place))
            }
            None => {
                let connecting = Box::pin(config.connect(NoTls));
                let (client, connection) = connecting.await.map_err(trouble)?;
                Ok(session(client, connection, place))
            }
        }
    }
}

fn session<S>(client: Client, mut connection: Connection<Socket, S>, place: &Place) -> Session
where
    S: tokio_postgres::tls::TlsStream + Unpin + Send + 'static,
{
    let unreplicated = Arc::new(AtomicBool::new(false));
    let flag = unreplicated.clone();
    let driver = tokio::spawn(async move {
        let mut messages =
            futures::stream::poll_fn(move |context| connection.poll_message(context));
        // The connection's end shows as an error of the next statement.
        while let Some(Ok(message)) = messages.next().await {
            if let AsyncMessage::Notice(notice) = &message
                && notice.routine() == Some("SyncRepWaitForLSN")
            {
                flag.store(true, Ordering::Release);
            }
        }
    });
    Session {
        client,
        host: place.name.clone(),
        unreplicated,
        driver,
    }
}

/// What may be told of an error: its code, or that the connection ended.
#[must_use]
pub fn code(error: &tokio_postgres::Error) -> Option<&SqlState> {
    error.as_db_error().map(DbError::code)
}

fn why(error: &tokio_postgres::Error, place: &Place, config: &Config) -> Trouble {
    let name = &place.name;
    let role = config.get_user().unwrap_or_default();
    let Some(code) = code(error) else {
        // Of what comes without a code, only the kinds whose text is the library's own, or the operating system's.
        let cause = std::error::Error::source(error);
        let io = cause.and_then(|c| c.downcast_ref::<std::io::Error>());
        let tls = io
            .and_then(|io| io.get_ref())
            .and_then(|e| e.downcast_ref::<rustls::Error>());
        return match (tls, io) {
            (Some(rustls::Error::InvalidCertificate(_)), _) => Trouble::Credentials(format!(
                "{name} shows a certificate that isn't trusted, or isn't in its name"
            )),
            (Some(rustls::Error::AlertReceived(_)), _) => {
                Trouble::Credentials(format!("{name} refuses our certificate"))
            }
            (_, Some(io)) if io.kind() == std::io::ErrorKind::PermissionDenied => {
                Trouble::Unreachable(format!("{name} is a standby"))
            }
            (_, Some(io)) => Trouble::Unreachable(format!("{name}: {}", io.kind())),
            _ if error.to_string() == "authentication error" => Trouble::Credentials(format!(
                "{name} wants a password of {role}, and there is none"
            )),
            _ => Trouble::Unreachable(format!("{name}: {error}")),
        };
    };
    let database = config.get_dbname().unwrap_or_default();
    match code.code() {
        "28000" | "28P01" => Trouble::Credentials(format!(
            "{name} refuses {role}: error {}: compare the credentials with the server's roles and pg_hba.conf",
            code.code()
        )),
        "42501" => Trouble::Credentials(format!(
            "{name}: {role} may not connect to database {database}: GRANT CONNECT is missing"
        )),
        "3D000" => Trouble::NoDatabase(format!("{name} has no database {database}")),
        code => Trouble::Unreachable(format!("{name} takes no connection now: error {code}")),
    }
}

/// What `Config` understands, of what libpq does: certificates are always checked in full.
fn normalised(url: &str) -> Result<String, String> {
    let Some((base, query)) = url.split_once('?') else {
        return Ok(url.to_owned());
    };
    let mut kept = Vec::new();
    for pair in query.split('&').filter(|p| !p.is_empty()) {
        let (name, value) = pair.split_once('=').unwrap_or((pair, ""));
        match (name, value) {
            ("sslmode", "disable") => kept.push(pair),
            ("sslmode", "allow" | "prefer" | "require" | "verify-ca" | "verify-full") => {}
            ("sslmode", _) => return Err("has an sslmode that isn't known".into()),
            ("sslrootcert", "system") => {}
            ("sslrootcert" | "sslcert" | "sslkey", _) => {
                return Err(format!(
                    "has {name}, a file that isn't here: give the authority as ca.crt beside the URL"
                ));
            }
            // Ours: it is the primary that we look for, within our own limits.
            ("target_session_attrs" | "connect_timeout" | "gssencmode", _) => {}
            _ => kept.push(pair),
        }
    }
    Ok(if kept.is_empty() {
        base.to_owned()
    } else {
        format!("{base}?{}", kept.join("&"))
    })
}

fn places(config: &Config) -> Result<Vec<Place>, &'static str> {
    let (hosts, addresses, ports) = (
        config.get_hosts(),
        config.get_hostaddrs(),
        config.get_ports(),
    );
    if hosts.is_empty() {
        return Err("names no host");
    }
    if !addresses.is_empty() && addresses.len() != hosts.len() {
        return Err("has another number of hostaddr than of hosts");
    }
    let mut places = Vec::new();
    for (i, host) in hosts.iter().enumerate() {
        let Host::Tcp(name) = host else {
            return Err("names a socket of this machine; a database is reached by its host's name");
        };
        if name.is_empty() {
            return Err("names no host");
        }
        places.push(Place {
            name: name.clone(),
            address: addresses.get(i).copied(),
            port: ports.get(i).or(ports.first()).copied().unwrap_or(5432),
        });
    }
    Ok(places)
}

/// The process' TLS: certificates are checked against `ca` (PEM), or the public authorities, and in the host's name.
pub(super) fn client_config(
    ca: Option<&[u8]>,
    identity: Option<(&[u8], &[u8])>,
) -> Result<ClientConfig, String> {
    let mut roots = RootCertStore::empty();
    match ca {
        Some(pem) => {
            for root in CertificateDer::pem_slice_iter(pem) {
                let root = root.map_err(|_| "ca.crt is no PEM")?;
                roots.add(root).map_err(|_| "ca.crt has no authority")?;
            }
        }
        None => {
            let found = rustls_native_certs::load_native_certs();
            roots.add_parsable_certificates(found.certs);
        }
    }
    if roots.is_empty() {
        return Err("there is no certificate of an authority: give ca.crt".into());
    }
    let builder = ClientConfig::builder_with_provider(Arc::new(ring::default_provider()))
        .with_safe_default_protocol_versions()
        .map_err(|e| e.to_string())?
        .with_root_certificates(roots);
    Ok(match identity {
        None => builder.with_no_client_auth(),
        Some((cert, key)) => {
            let chain = CertificateDer::pem_slice_iter(cert)
                .collect::<Result<Vec<_>, _>>()
                .map_err(|_| "tls.crt is no PEM")?;
            let key = PrivateKeyDer::from_pem_slice(key).map_err(|_| "tls.key is no key")?;
            builder
                .with_client_auth_cert(chain, key)
                .map_err(|_| "tls.crt and tls.key don't belong together")?
        }
    })
}

fn connector(mut config: ClientConfig) -> MakeRustlsConnect {
    // What PostgreSQL 17 and later asks of who begins with TLS at once; others ignore it.
    config.alpn_protocols = vec![b"postgresql".to_vec()];
    MakeRustlsConnect::new(config)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn trouble(url: &str) -> String {
        match Address::of_url(url, None, "t") {
            Ok(_) => panic!("{url} is understood"),
            Err(trouble) => trouble.to_string(),
        }
    }

    #[test]
    fn only_a_url_that_says_so_goes_without_tls() {
        let key = rcgen::KeyPair::generate().unwrap();
        let mut params = rcgen::CertificateParams::new(Vec::new()).unwrap();
        params.is_ca = rcgen::IsCa::Ca(rcgen::BasicConstraints::Constrained(0));
        let ca = params.self_signed(&key).unwrap().pem();
        let plain = |url: &str| {
            let address = Address::of_url(url, Some(ca.as_bytes()), "t").unwrap();
            address.tls.is_none()
        };
        assert!(plain("postgresql://u:p@h/d?sslmode=disable"));
        for mode in [
            "",
            "?sslmode=allow",
            "?sslmode=prefer",
            "?sslmode=require",
            "?sslmode=verify-full",
            "?application_name=x&sslmode=verify-ca",
        ] {
            assert!(!plain(&format!("postgresql://u:p@h/d{mode}")), "{mode}");
        }
    }

    #[test]
    fn a_url_is_refused_without_being_quoted() {
        for url in [
            "mysql://u:geheim@h/d",
            "postgresql://u:geheim@h/d?sslmode=no",
            "postgresql://u:geheim@h/d?sslrootcert=/x",
            "postgresql://u:geheim@h:port/d",
            "postgresql://u:geheim@%2Frun/d?sslmode=disable",
            "postgresql://h/d?sslmode=disable",
            "postgresql:///d?user=u&sslmode=disable",
        ] {
            let words = trouble(url);
            assert!(words.starts_with("the URL of the database "), "{words}");
            assert!(!words.contains("geheim"), "{words}");
        }
    }

    #[test]
    fn several_hosts_with_their_ports() {
        let url =
            "postgresql://u:p@a:1,b:2/d?sslmode=disable&target_session_attrs=any&connect_timeout=9";
        let address = Address::of_url(url, None, "t").unwrap();
        let places: Vec<_> = address
            .hosts
            .iter()
            .map(|p| (p.name.as_str(), p.port))
            .collect();
        assert_eq!(places, [("a", 1), ("b", 2)]);
    }
}
