//! The configuration of Patroni, of etcd and of the PostgreSQLs, as a careful user would write it.
//!
//! Owns ports, roles, certificates and every setting. Never starts anything.

use super::{Clocks, Host, PORT, SCOPE};
use crate::layout::{Layout, write_atomically};
use crate::topology::{CONTROL_PLANE, Node, SUPERNET};
use anyhow::{Context, Result};
use rcgen::{BasicConstraints, CertificateParams, DnType, IsCa, Issuer, KeyPair};
use serde_json::json;
use std::fs;
use std::net::Ipv4Addr;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

/// Where etcd is: at the address of the test bed's control plane, which has its etcd too.
pub const ETCD_ADDRESS: Ipv4Addr = CONTROL_PLANE;
/// The port of etcd's clients.
pub const ETCD_PORT: u16 = 2379;
/// The port of Patroni's REST API.
pub const API_PORT: u16 = 8008;
/// The clients' role.
pub const USER: &str = "app";
/// The clients' database.
pub const DATABASE: &str = "app";
/// Everybody's password. It guards nothing: the hosts are namespaces without a way out, and live for minutes.
pub const PASSWORD: &str = "bench";

/// The program and arguments of etcd.
pub fn etcd(data: &Path) -> Vec<String> {
    let client = format!("http://{ETCD_ADDRESS}:{ETCD_PORT}");
    let peer = "http://127.0.0.1:2380";
    let data = data.display().to_string();
    [
        "/usr/bin/etcd",
        "--name",
        "etcd",
        "--data-dir",
        &data,
        "--listen-client-urls",
        &client,
        "--advertise-client-urls",
        &client,
        "--listen-peer-urls",
        peer,
        "--initial-advertise-peer-urls",
        peer,
        "--initial-cluster",
        &format!("etcd={peer}"),
    ]
    .map(str::to_owned)
    .to_vec()
}

/// The configuration file of a host's Patroni (JSON, which is YAML).
pub fn patroni(node: &Node, folder: &Path, bin: &Path, clocks: Clocks) -> String {
    let address = node.address();
    let at = |port: u16| format!("{address}:{port}");
    let login = |user: &str| json!({"username": user, "password": PASSWORD});
    json!({
        "scope": SCOPE,
        "name": node.name,
        "restapi": {"listen": at(API_PORT), "connect_address": at(API_PORT)},
        "etcd3": {"host": format!("{ETCD_ADDRESS}:{ETCD_PORT}")},
        "bootstrap": {
            "dcs": {
                "ttl": clocks.ttl,
                "loop_wait": clocks.loop_wait,
                "retry_timeout": clocks.retry_timeout,
                "maximum_lag_on_failover": 1_048_576,
                "synchronous_mode": true,
                "postgresql": {
                    "use_pg_rewind": true,
                    "use_slots": true,
                    "parameters": {
                        "wal_level": "replica",
                        "hot_standby": "on",
                        "wal_log_hints": "on",
                        "max_connections": 100,
                        "max_wal_senders": 20,
                        "max_replication_slots": 20,
                    },
                },
            },
            "initdb": [{"encoding": "UTF8"}, {"locale": "C.UTF-8"}, "data-checksums"],
        },
        "postgresql": {
            "listen": at(PORT),
            "connect_address": at(PORT),
            "data_dir": folder.join("data"),
            "bin_dir": bin,
            "pgpass": folder.join("pgpass"),
            "authentication": {
                "superuser": login("postgres"),
                "replication": login("replicator"),
                "rewind": login("rewind"),
            },
            "parameters": {
                // As the bench's stores have it.
                "shared_buffers": "32MB",
                "unix_socket_directories": folder.join("run"),
                "password_encryption": "scram-sha-256",
                "ssl": "on",
                "ssl_cert_file": folder.join("server.crt"),
                "ssl_key_file": folder.join("server.key"),
                "log_timezone": "UTC",
                "timezone": "UTC",
            },
            "pg_hba": [
                format!("hostssl replication replicator {SUPERNET} scram-sha-256"),
                format!("hostssl all all {SUPERNET} scram-sha-256"),
            ],
            // So that a former primary comes back by itself even where it can't be rewound.
            "remove_data_directory_on_rewind_failure": true,
            "remove_data_directory_on_diverged_timelines": true,
        },
        "watchdog": {"mode": "off"},
    })
    .to_string()
}

/// How the superuser reaches a host from the machine.
pub fn superuser_uri(host: &Host) -> String {
    format!(
        "postgresql://postgres:{PASSWORD}@{}:{}/postgres?sslmode=require&connect_timeout=5",
        host.address, host.port
    )
}

/// The certificate that verifies the servers.
pub fn authority(layout: &Layout) -> PathBuf {
    layout.pki().join("ca.crt")
}

fn authority_parameters() -> Result<CertificateParams> {
    let mut parameters = CertificateParams::new(Vec::new()).context("an authority's parameters")?;
    parameters.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    parameters
        .distinguished_name
        .push(DnType::CommonName, "patroni-bench");
    Ok(parameters)
}

/// Makes the authority of this cluster.
///
/// # Errors
/// If it can't be made or written.
pub fn write_authority(layout: &Layout) -> Result<()> {
    let key = KeyPair::generate().context("a key")?;
    let certificate = authority_parameters()?
        .self_signed(&key)
        .context("the authority's certificate")?;
    write_atomically(&authority(layout), certificate.pem().as_bytes())?;
    write_atomically(&layout.pki().join("ca.key"), key.serialize_pem().as_bytes())
}

/// Makes a server's certificate and key.
///
/// # Errors
/// If they can't be made or written.
pub fn write_identity(layout: &Layout, node: &Node, folder: &Path) -> Result<()> {
    let path = layout.pki().join("ca.key");
    let text = fs::read_to_string(&path).with_context(|| format!("reading {}", path.display()))?;
    let issuer = Issuer::new(
        authority_parameters()?,
        KeyPair::from_pem(&text).context("the authority's key")?,
    );
    let key = KeyPair::generate().context("a key")?;
    let certificate = CertificateParams::new(vec![node.name.to_owned()])
        .context("a server's name")?
        .signed_by(&key, &issuer)
        .context("a server's certificate")?;
    write_atomically(&folder.join("server.crt"), certificate.pem().as_bytes())?;
    let path = folder.join("server.key");
    write_atomically(&path, key.serialize_pem().as_bytes())?;
    // PostgreSQL refuses a key that others may read.
    fs::set_permissions(&path, fs::Permissions::from_mode(0o600))
        .with_context(|| format!("closing {}", path.display()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::MetadataExt;

    #[test]
    fn the_configuration_is_synchronous_and_has_the_asked_clocks() {
        let node = Node::find("w2").unwrap();
        let text = patroni(
            node,
            Path::new("/state/w2"),
            Path::new("/bin"),
            Clocks::QUICK,
        );
        let value: serde_json::Value = serde_json::from_str(&text).unwrap();
        let dcs = &value["bootstrap"]["dcs"];
        assert_eq!(dcs["synchronous_mode"], true);
        assert_eq!((&dcs["ttl"], &dcs["loop_wait"]), (&json!(20), &json!(1)));
        // Patroni refuses clocks that don't leave room for a second try.
        for c in [Clocks::DEFAULT, Clocks::QUICK] {
            assert!(c.loop_wait + 2 * c.retry_timeout <= c.ttl);
        }
        assert_eq!(value["postgresql"]["connect_address"], "198.18.1.2:5432");
    }

    #[test]
    fn keys_are_for_their_owner_only() {
        let folder = tempfile::tempdir().unwrap();
        let layout = Layout::at(folder.path());
        write_authority(&layout).unwrap();
        let node = Node::find("e1").unwrap();
        write_identity(&layout, node, folder.path()).unwrap();
        let mode = fs::metadata(folder.path().join("server.key"))
            .unwrap()
            .mode();
        assert_eq!(mode & 0o777, 0o600);
    }
}
