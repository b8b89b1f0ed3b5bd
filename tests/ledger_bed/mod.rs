//! A real PostgreSQL with ledgers in it, reached as in a pod: by TLS, with a role's certificate.
//!
//! Whoever uses it declares `mod instance_bed;` beside it: certificates, programs and patience are from there.
//! Owns a server of its own per bed, which ends with it. Never: sleeps for a guessed time.

#![allow(dead_code)]

use std::net::Ipv4Addr;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};
use std::time::Duration;

use domicile::api::names::rights::{Role, database, role};
use domicile::api::rights_targets::TableErasure;
use domicile::api::rights_workflow::Regime;
use domicile::rights::config::{Database, System, Target};
use domicile::rights::ledger::{Ledger, SealedFiling, migrate, roles};
use domicile::rights::model::{Channel, Filing, Identifiers, Kind};
use domicile::rights::secrecy::Keyring;
use jiff::Timestamp;
use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use tokio_postgres::{Client, NoTls};
use tokio_postgres_rustls::MakeRustlsConnect;
use uuid::Uuid;

use crate::instance_bed::{Authority, bin, drop_root, until};

pub const PORT: u16 = 15433;

/// A server.
pub struct Bed {
    pub dir: tempfile::TempDir,
    pub authority: Authority,
    pub address: String,
    postmaster: Option<Child>,
}

impl Drop for Bed {
    fn drop(&mut self) {
        self.kill();
    }
}

/// A client that ends with it.
pub struct Session {
    pub client: Client,
    driver: tokio::task::JoinHandle<()>,
}

impl std::ops::Deref for Session {
    type Target = Client;
    fn deref(&self) -> &Client {
        &self.client
    }
}

impl Drop for Session {
    fn drop(&mut self) {
        self.driver.abort();
    }
}

impl Bed {
    /// A new server; its settings beside the bed's own.
    pub async fn start(settings: &[(&str, &str)]) -> Self {
        drop_root();
        static SUBNET: AtomicU8 = AtomicU8::new(1);
        let process = 64 + u8::try_from(std::process::id() % 128).unwrap();
        let address =
            Ipv4Addr::new(127, process, SUBNET.fetch_add(1, Ordering::Relaxed), 1).to_string();
        let mut bed = Self {
            dir: tempfile::Builder::new().prefix("led").tempdir().unwrap(),
            authority: Authority::new(),
            address,
            postmaster: None,
        };
        let data = bed.data();
        let made = Command::new(bin().join("initdb"))
            .args([
                "-A",
                "trust",
                "-U",
                "postgres",
                "-N",
                "-E",
                "UTF8",
                "--locale=C",
                "-D",
            ])
            .arg(&data)
            .env_clear()
            .stdout(Stdio::null())
            .status()
            .unwrap();
        assert!(made.success());
        bed.authority.issue(&bed.path("server"), &bed.address);
        let tls = bed.path("server");
        let mut conf = format!(
            "listen_addresses = '{}'\nport = {PORT}\nunix_socket_directories = '{}'\nssl = on\n\
             ssl_ca_file = '{3}/ca.crt'\nssl_cert_file = '{3}/tls.crt'\nssl_key_file = '{3}/tls.key'\n\
             shared_buffers = '64MB'\nmax_wal_size = '1GB'\nlog_min_messages = warning\ncluster_name = '{2}'\n",
            bed.address,
            bed.dir.path().display(),
            bed.address,
            tls.display()
        );
        for (name, value) in settings {
            conf.push_str(&format!("{name} = '{value}'\n"));
        }
        std::fs::write(data.join("postgresql.auto.conf"), conf).unwrap();
        std::fs::write(
            data.join("pg_hba.conf"),
            "local all postgres trust\nhostnossl all all all reject\n\
             hostssl all +domicile_rights all cert\nhostssl all all all scram-sha-256\n",
        )
        .unwrap();
        bed.run().await;
        bed
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn data(&self) -> PathBuf {
        self.path("data")
    }

    /// Starts the server and waits until it answers.
    pub async fn run(&mut self) {
        let (bin, data) = (bin(), self.data());
        let mut child: Option<Child> = None;
        // Right after a kill, what is left of the former server is in its way for a moment.
        until("PostgreSQL answers", async || {
            if child
                .as_mut()
                .is_none_or(|c| c.try_wait().unwrap().is_some())
            {
                let log = std::fs::File::options()
                    .create(true)
                    .append(true)
                    .open(data.join("log"))
                    .unwrap();
                child = Some(
                    Command::new(bin.join("postgres"))
                        .arg("-D")
                        .arg(&data)
                        .env_clear()
                        .stdin(Stdio::null())
                        .stdout(Stdio::null())
                        .stderr(log)
                        .spawn()
                        .unwrap(),
                );
            }
            self.try_superuser("postgres").await.is_some()
        })
        .await;
        self.postmaster = child;
    }

    /// SIGKILLs the server with all its processes.
    pub fn kill(&mut self) {
        let Some(mut postmaster) = self.postmaster.take() else {
            return;
        };
        let pid = postmaster.id();
        let children = std::fs::read_to_string(format!("/proc/{pid}/task/{pid}/children"));
        let _ = postmaster.kill();
        let _ = postmaster.wait();
        for child in children.unwrap_or_default().split_whitespace() {
            if let Ok(child) = child.parse() {
                let _ = nix::sys::signal::kill(
                    nix::unistd::Pid::from_raw(child),
                    nix::sys::signal::Signal::SIGKILL,
                );
            }
        }
    }

    /// What the server wrote into its log.
    pub fn log(&self) -> String {
        std::fs::read_to_string(self.data().join("log")).unwrap_or_default()
    }

    async fn try_superuser(&self, database: &str) -> Option<Session> {
        let mut config = tokio_postgres::Config::new();
        config
            .host_path(self.dir.path())
            .port(PORT)
            .user("postgres")
            .dbname(database)
            .options("-c search_path=pg_catalog -c synchronous_commit=local -c lock_timeout=10s");
        let (client, connection) = config.connect(NoTls).await.ok()?;
        let driver = tokio::spawn(async move {
            let _ = connection.await;
        });
        Some(Session { client, driver })
    }

    /// The superuser, as the instance manager is.
    pub async fn superuser(&self, database: &str) -> Session {
        self.try_superuser(database).await.unwrap()
    }

    /// Roles, database and schema of a workflow, as the instance manager makes them.
    pub async fn workflow(&self, workflow: &str) -> Session {
        let postgres = self.superuser("postgres").await;
        roles::prepare(&postgres, workflow).await.unwrap();
        let mut session = self.superuser(&database(workflow)).await;
        migrate(&mut session.client, workflow).await.unwrap();
        for who in [Role::Gateway, Role::Worker, Role::Observer] {
            let name = role(workflow, who);
            self.authority.issue(&self.path(&name), &name);
        }
        session
    }

    /// How a workflow's ledger is reached.
    pub fn database(&self, workflow: &str) -> Database {
        Database {
            hosts: vec![self.address.clone()],
            port: PORT,
            name: database(workflow),
        }
    }

    /// A workflow's ledger, as one of its roles.
    pub fn ledger(&self, workflow: &str, who: Role) -> Ledger {
        let name = role(workflow, who);
        Ledger::new(
            &self.database(workflow),
            &name,
            &self.path(&name),
            8,
            "test",
        )
        .unwrap()
    }

    /// A bare connection with the certificate in a directory, as this user.
    pub async fn connect(
        &self,
        database: &str,
        user: &str,
        dir: &str,
    ) -> Result<Session, tokio_postgres::Error> {
        let read = |name: &str| std::fs::read(self.path(dir).join(name)).unwrap();
        let mut roots = rustls::RootCertStore::empty();
        let ca = std::fs::read(self.path("server").join("ca.crt")).unwrap();
        roots
            .add(CertificateDer::from_pem_slice(&ca).unwrap())
            .unwrap();
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let tls = rustls::ClientConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .unwrap()
            .with_root_certificates(roots)
            .with_client_auth_cert(
                vec![CertificateDer::from_pem_slice(&read("tls.crt")).unwrap()],
                PrivateKeyDer::from_pem_slice(&read("tls.key")).unwrap(),
            )
            .unwrap();
        let mut config = tokio_postgres::Config::new();
        config
            .host(&self.address)
            .port(PORT)
            .user(user)
            .dbname(database)
            .ssl_mode(tokio_postgres::config::SslMode::Require);
        let (client, connection) = config.connect(MakeRustlsConnect::new(tls)).await?;
        let driver = tokio::spawn(async move {
            let _ = connection.await;
        });
        Ok(Session { client, driver })
    }
}

/// Keys of a workflow, for yesterday, today and tomorrow.
pub fn keys() -> (tempfile::TempDir, Keyring) {
    let dir = tempfile::tempdir().unwrap();
    let today = Timestamp::now().to_zoned(jiff::tz::TimeZone::UTC).date();
    for (i, name) in [
        "hash".to_owned(),
        format!("epoch-{}", today.yesterday().unwrap()),
        format!("epoch-{today}"),
        format!("epoch-{}", today.tomorrow().unwrap()),
    ]
    .iter()
    .enumerate()
    {
        std::fs::write(dir.path().join(name), [u8::try_from(i).unwrap() + 1; 32]).unwrap();
    }
    let keyring = Keyring::read(dir.path()).unwrap();
    (dir, keyring)
}

/// The time, no finer than PostgreSQL has it.
pub fn now() -> Timestamp {
    Timestamp::now().round(jiff::Unit::Millisecond).unwrap()
}

/// A deletion request of this person.
pub fn filing(email: &str) -> Filing {
    Filing {
        id: Uuid::now_v7(),
        kind: Kind::Deletion,
        regimes: vec![Regime::EuGdpr],
        identifiers: Identifiers(
            [
                ("email".to_owned(), email.to_owned()),
                ("customerId".to_owned(), "4711".to_owned()),
            ]
            .into(),
        ),
        channel: Channel::Api,
        received_at: now(),
        needs_approval: false,
        idempotency_key: None,
    }
}

/// As a gateway seals it, due in so many days.
pub fn sealed(keyring: &Keyring, filing: &Filing, days: i64) -> SealedFiling {
    let due = filing.received_at + Duration::from_secs(86_400 * u64::try_from(days).unwrap());
    keyring.seal(filing, None, due).unwrap()
}

/// A target whose workers are in these regions.
pub fn target(name: &str, regions: &[&str]) -> Target {
    Target {
        name: name.to_owned(),
        regions: regions.iter().map(|r| (*r).to_owned()).collect(),
        settle_seconds: 0,
        residue_days: None,
        system: System::PostgreSql {
            store: None,
            erase: Vec::<TableErasure>::new(),
        },
    }
}
