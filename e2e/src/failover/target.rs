//! A PostgreSQL cluster as a client knows it: hosts, addresses, login, time-outs.
//!
//! Owns how the application Secret's URI is read. Never resolves a name: whoever makes a target says where the
//! hosts are.

use anyhow::{Context, Result, bail, ensure};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::net::IpAddr;
use std::time::Duration;

/// One server of the cluster.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Host {
    /// The name its certificate is verified by, and under which events speak of it.
    pub name: String,
    /// Where it is.
    pub address: IpAddr,
    /// Its port.
    pub port: u16,
}

/// A PostgreSQL cluster and how to log in.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Target {
    /// Its servers, in the order in which a client tries them.
    pub hosts: Vec<Host>,
    /// The role.
    pub user: String,
    /// Its password.
    pub password: String,
    /// The database.
    pub database: String,
    /// The authority (PEM) that signed the servers' certificates. `None`: without TLS.
    #[serde(default)]
    pub ca: Option<String>,
    /// Milliseconds that one host is given to open a session, as libpq's `connect_timeout`.
    pub connect_timeout_ms: u64,
    /// Milliseconds after which a peer that doesn't acknowledge data is given up, as libpq's `tcp_user_timeout`.
    pub tcp_user_timeout_ms: u64,
    /// The table that clients write into.
    #[serde(default = "default_table")]
    pub table: String,
}

fn default_table() -> String {
    "failover_bench".to_owned()
}

impl std::fmt::Debug for Target {
    // A password must not reach a log by a derived Debug.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Target")
            .field("hosts", &self.hosts)
            .field("user", &self.user)
            .field("database", &self.database)
            .finish_non_exhaustive()
    }
}

impl Target {
    /// A cluster with the time-outs that Domicile's own URIs have.
    #[must_use]
    pub fn new(hosts: Vec<Host>, user: &str, password: &str, database: &str) -> Self {
        Self {
            hosts,
            user: user.to_owned(),
            password: password.to_owned(),
            database: database.to_owned(),
            ca: None,
            connect_timeout_ms: 2000,
            tcp_user_timeout_ms: 3000,
            table: default_table(),
        }
    }

    /// What a URI in libpq's form says, with the hosts' addresses by name.
    ///
    /// # Errors
    /// If it lacks something, demands less than a primary or than verified TLS, or an address isn't known.
    pub fn from_uri(uri: &str, ca: &str, addresses: &BTreeMap<String, IpAddr>) -> Result<Self> {
        let Uri {
            user,
            password,
            hosts,
            database,
            options,
        } = parse(uri)?;
        let option = |key: &str| options.get(key).map(String::as_str);
        ensure!(
            option("target_session_attrs") == Some("read-write"),
            "the URI doesn't ask for a primary (target_session_attrs=read-write)"
        );
        ensure!(
            option("sslmode") == Some("verify-full"),
            "the URI doesn't verify the server (sslmode=verify-full)"
        );
        let number = |key: &str| -> Result<u64> {
            option(key)
                .with_context(|| format!("the URI has no {key}"))?
                .parse()
                .with_context(|| format!("the URI's {key}"))
        };
        let hosts = hosts.into_iter().map(|(name, port)| {
            let address = *addresses
                .get(&name)
                .with_context(|| format!("no address of {name} is known"))?;
            Ok(Host {
                name,
                address,
                port,
            })
        });
        Ok(Self {
            hosts: hosts.collect::<Result<_>>()?,
            ca: Some(ca.to_owned()),
            connect_timeout_ms: number("connect_timeout")? * 1000,
            tcp_user_timeout_ms: number("tcp_user_timeout")?,
            ..Self::new(Vec::new(), &user, &password, &database)
        })
    }

    /// The same cluster, of which only one server is asked, at an address of its own.
    #[must_use]
    pub fn only(&self, name: &str, address: IpAddr) -> Self {
        let mut one = self.clone();
        one.hosts.retain(|h| h.name == name);
        for host in &mut one.hosts {
            host.address = address;
        }
        one
    }

    /// How long one host is given to open a session.
    #[must_use]
    pub fn connect_timeout(&self) -> Duration {
        Duration::from_millis(self.connect_timeout_ms)
    }
}

/// The parts of a URI.
#[derive(Debug, PartialEq, Eq)]
struct Uri {
    user: String,
    password: String,
    hosts: Vec<(String, u16)>,
    database: String,
    options: BTreeMap<String, String>,
}

fn parse(uri: &str) -> Result<Uri> {
    let rest = uri
        .strip_prefix("postgresql://")
        .context("the URI doesn't begin with postgresql://")?;
    // The password is URL-safe (docs of the Secret), so nothing here is percent-encoded.
    ensure!(!rest.contains('%'), "a percent-encoded URI isn't read here");
    let (login, rest) = rest.rsplit_once('@').context("the URI has no login")?;
    let (user, password) = login.split_once(':').context("the URI has no password")?;
    let (hosts, rest) = rest.split_once('/').context("the URI has no database")?;
    let (database, options) = rest.split_once('?').unwrap_or((rest, ""));
    let hosts = hosts.split(',').map(|host| {
        let (name, port) = host.rsplit_once(':').unwrap_or((host, "5432"));
        if name.is_empty() {
            bail!("the URI has an empty host");
        }
        Ok((
            name.to_owned(),
            port.parse()
                .with_context(|| format!("the port of {name}"))?,
        ))
    });
    let options = options
        .split('&')
        .filter_map(|o| o.split_once('='))
        .map(|(k, v)| (k.to_owned(), v.to_owned()));
    Ok(Uri {
        user: user.to_owned(),
        password: password.to_owned(),
        hosts: hosts.collect::<Result<_>>()?,
        database: database.to_owned(),
        options: options.collect(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const URI: &str = "postgresql://app:p-w@s-1.ns.svc:5432,s-2.ns.svc:5433/db?target_session_attrs=read-write&connect_timeout=2&tcp_user_timeout=3000&sslmode=verify-full&sslrootcert=/etc/x/ca.crt";

    fn addresses() -> BTreeMap<String, IpAddr> {
        BTreeMap::from([
            ("s-1.ns.svc".to_owned(), IpAddr::from([198, 18, 64, 21])),
            ("s-2.ns.svc".to_owned(), IpAddr::from([198, 18, 64, 22])),
        ])
    }

    #[test]
    fn the_secrets_uri_is_read_whole() {
        let target = Target::from_uri(URI, "PEM", &addresses()).unwrap();
        assert_eq!(
            (
                target.user.as_str(),
                target.password.as_str(),
                target.database.as_str()
            ),
            ("app", "p-w", "db")
        );
        assert_eq!(
            target
                .hosts
                .iter()
                .map(|h| h.name.as_str())
                .collect::<Vec<_>>(),
            ["s-1.ns.svc", "s-2.ns.svc"]
        );
        assert_eq!(target.hosts[1].port, 5433);
        assert_eq!(
            (target.connect_timeout_ms, target.tcp_user_timeout_ms),
            (2000, 3000)
        );
        assert_eq!(target.ca.as_deref(), Some("PEM"));
        assert!(!format!("{target:?}").contains("p-w"));
        let one = target.only("s-2.ns.svc", IpAddr::from([198, 19, 1, 9]));
        assert_eq!(one.hosts.len(), 1);
        assert_eq!(one.hosts[0].address, IpAddr::from([198, 19, 1, 9]));
    }

    #[test]
    fn a_weaker_uri_is_refused() {
        for (without, said) in [
            ("target_session_attrs=read-write&", "primary"),
            ("sslmode=verify-full&", "verify"),
            ("connect_timeout=2&", "connect_timeout"),
        ] {
            let e = Target::from_uri(&URI.replace(without, ""), "PEM", &addresses()).unwrap_err();
            assert!(format!("{e:#}").contains(said), "{e:#}");
        }
        assert!(Target::from_uri(URI, "PEM", &BTreeMap::new()).is_err());
        assert!(parse("mysql://x").is_err());
    }
}
