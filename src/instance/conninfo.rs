//! How a standby reaches its upstream: libpq's connection strings.
//!
//! Owns the escaping, and which keywords such a connection needs. A frozen primary's kernel still accepts
//! connections and acknowledges bytes, so each has a `connect_timeout` as well as a `tcp_user_timeout`.
//! Never: holds a secret; the key is a file's path.

use std::fmt::Write as _;
use std::net::IpAddr;
use std::path::{Path, PathBuf};

use crate::api::names;

/// The instance to stream from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Upstream {
    /// Its name: what its certificate is checked against.
    pub name: String,
    /// Its address: certificates name instances, not addresses.
    pub address: IpAddr,
    /// Its port.
    pub port: u16,
}

/// What this side brings along.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Downstream {
    /// How the upstream knows this connection; what `synchronous_standby_names` matches.
    pub application_name: String,
    /// Certificate authority, certificate and key.
    pub ca: PathBuf,
    /// Certificate.
    pub cert: PathBuf,
    /// Key; held only while this instance may stream.
    pub key: PathBuf,
    /// Seconds of silence after which the other side counts as dead.
    pub timeout_seconds: u32,
    /// TLS begins with the first byte, without asking for it first: a round trip less, which between regions is a good part
    /// of a failover. PostgreSQL 17 and later, on both sides; a store's instances are all of one major version.
    pub direct_tls: bool,
}

/// The first major version that can begin with TLS.
pub const DIRECT_TLS_SINCE: u32 = 17;

/// The connection string.
#[must_use]
pub fn render(up: &Upstream, down: &Downstream) -> String {
    let timeout = down.timeout_seconds.max(2);
    let idle = (timeout / 3).max(1).to_string();
    let pairs: [(&str, String); 18] = [
        ("host", up.name.clone()),
        ("hostaddr", up.address.to_string()),
        ("port", up.port.to_string()),
        ("user", names::REPLICATION_ROLE.to_owned()),
        // Ignored by physical replication; keeps libpq from looking for a database of the user's name.
        ("dbname", "replication".to_owned()),
        ("sslmode", "verify-full".to_owned()),
        ("sslrootcert", down.ca.display().to_string()),
        ("sslcert", down.cert.display().to_string()),
        ("sslkey", down.key.display().to_string()),
        // GSSAPI is tried before TLS where libpq has it; it can only cost a round trip here.
        ("gssencmode", "disable".to_owned()),
        ("sslnegotiation", "direct".to_owned()),
        ("application_name", down.application_name.clone()),
        ("connect_timeout", timeout.to_string()),
        ("keepalives", "1".to_owned()),
        ("keepalives_idle", idle.clone()),
        ("keepalives_interval", idle),
        ("keepalives_count", "3".to_owned()),
        ("tcp_user_timeout", (timeout * 1000).to_string()),
    ];
    let mut out = String::new();
    for (key, value) in pairs {
        // An older libpq doesn't know the word, and refuses the whole string.
        if key == "sslnegotiation" && !down.direct_tls {
            continue;
        }
        if !out.is_empty() {
            out.push(' ');
        }
        // Writing to a String can't fail.
        let _ = write!(out, "{key}={}", quote(&value));
    }
    out
}

/// The connection string by which a receiver goes by a [`super::relay`], whose socket is in this folder.
#[must_use]
pub fn render_local(folder: &Path, port: u16, name: &str, timeout_seconds: u32) -> String {
    let pairs = [
        ("host", folder.display().to_string()),
        ("port", port.to_string()),
        ("user", names::REPLICATION_ROLE.to_owned()),
        ("dbname", "replication".to_owned()),
        ("gssencmode", "disable".to_owned()),
        ("application_name", name.to_owned()),
        ("connect_timeout", timeout_seconds.max(2).to_string()),
    ];
    let pairs = pairs.map(|(key, value)| format!("{key}={}", quote(&value)));
    pairs.join(" ")
}

/// A value in libpq's quotes.
#[must_use]
pub fn quote(value: &str) -> String {
    let mut out = String::with_capacity(value.len() + 2);
    out.push('\'');
    for c in value.chars() {
        if matches!(c, '\'' | '\\') {
            out.push('\\');
        }
        out.push(c);
    }
    out.push('\'');
    out
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::str::FromStr;

    fn sides() -> (Upstream, Downstream) {
        (
            Upstream {
                name: "consumers-1".into(),
                address: "10.0.0.7".parse().unwrap(),
                port: 5432,
            },
            Downstream {
                application_name: "consumers-2".into(),
                ca: "/run/ca.crt".into(),
                cert: "/run/tls.crt".into(),
                key: "/run/tls.key".into(),
                timeout_seconds: 6,
                direct_tls: false,
            },
        )
    }

    #[test]
    fn it_names_the_instance_and_dials_the_address() {
        let (up, down) = sides();
        assert_eq!(
            render(&up, &down),
            "host='consumers-1' hostaddr='10.0.0.7' port='5432' user='domicile_replication' \
             dbname='replication' sslmode='verify-full' sslrootcert='/run/ca.crt' sslcert='/run/tls.crt' \
             sslkey='/run/tls.key' gssencmode='disable' application_name='consumers-2' connect_timeout='6' \
             keepalives='1' keepalives_idle='2' keepalives_interval='2' keepalives_count='3' \
             tcp_user_timeout='6000'"
        );
    }

    #[test]
    fn a_relay_is_a_folder() {
        assert_eq!(
            render_local(Path::new("/run/relay/s-1"), 5432, "s-2/v", 6),
            "host='/run/relay/s-1' port='5432' user='domicile_replication' dbname='replication' \
             gssencmode='disable' application_name='s-2/v' connect_timeout='6'"
        );
    }

    #[test]
    fn tls_begins_at_once_where_both_can() {
        let (up, mut down) = sides();
        assert!(!render(&up, &down).contains("sslnegotiation"));
        down.direct_tls = true;
        assert!(render(&up, &down).contains(" sslnegotiation='direct' "));
    }

    proptest! {
        #[test]
        fn no_value_escapes_its_quotes(value in "[ a-z'\\\\=]{0,20}") {
            let (up, mut down) = sides();
            down.application_name.clone_from(&value);
            // tokio-postgres reads the same syntax; it refuses the keywords that it doesn't know.
            let known = format!("host='x' application_name={}", quote(&value));
            let parsed = tokio_postgres::Config::from_str(&known).unwrap();
            prop_assert_eq!(parsed.get_application_name(), Some(value.as_str()));
            prop_assert!(render(&up, &down).contains(&quote(&value)));
        }
    }
}
