//! A bed for gateways: a real PostgreSQL with a real ledger, a real server over real TLS, and an API server of a few
//! lines that knows tokens.
//!
//! Owns: temporary directories and the server's process, which end with it. Never: sleeps for a guessed time; what a
//! test waits for, it polls for, until a deadline.

pub mod client;
pub mod kube;

use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex, Once};
use std::time::{Duration, Instant};

use domicile::api::names::rights::{Role, database, role};
use domicile::rights::config::{Database, Workflow};
use domicile::rights::gateway::{self, Addresses};
use domicile::rights::ledger::{Ledger, migrate, roles};
use jiff::{Timestamp, ToSpan as _, tz::TimeZone};
use nix::sys::signal::{Signal, kill};
use nix::unistd::{Pid, User};
use rcgen::{BasicConstraints, CertificateParams, DnType, IsCa, Issuer, KeyPair};
use serde_json::json;
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

pub const PATIENCE: Duration = Duration::from_secs(60);
pub const WORKFLOW: &str = "consumers";
/// Who reads this in a log, or anywhere but in the ledger's ciphertext, has found a leak.
pub const CANARY: &str = "zanzibar.canary";

/// Polls until it holds.
pub async fn until<F: AsyncFnMut() -> bool>(what: &str, mut holds: F) {
    let deadline = Instant::now() + PATIENCE;
    while !holds().await {
        if Instant::now() >= deadline {
            let log = logged();
            let warnings = log
                .lines()
                .rev()
                .filter(|l| l.contains(" WARN ") || l.contains(" ERROR "));
            let last: Vec<&str> = warnings.take(5).collect();
            panic!("waited in vain until {what}: {last:#?}");
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

static LOG: Mutex<String> = Mutex::new(String::new());

/// Everything that was logged so far, by all tests.
pub fn logged() -> String {
    LOG.lock().unwrap().clone()
}

struct Tee;

impl std::io::Write for Tee {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        LOG.lock()
            .unwrap()
            .push_str(&String::from_utf8_lossy(bytes));
        Ok(bytes.len())
    }
    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

fn log_everything() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        tracing_subscriber::fmt()
            .with_writer(|| Tee)
            .with_ansi(false)
            .with_max_level(tracing::Level::TRACE)
            .init();
    });
}

pub struct Authority {
    pub pem: String,
    issuer: Issuer<'static, KeyPair>,
}

impl Authority {
    pub fn new(name: &str) -> Self {
        let key = KeyPair::generate().unwrap();
        let mut params = CertificateParams::new(Vec::new()).unwrap();
        params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
        params.distinguished_name.push(DnType::CommonName, name);
        let pem = params.self_signed(&key).unwrap().pem();
        Self {
            pem,
            issuer: Issuer::new(params, key),
        }
    }

    /// A certificate and its key, PEM.
    pub fn pair(&self, common_name: &str, host: &str) -> (String, String) {
        let key = KeyPair::generate().unwrap();
        let mut params = CertificateParams::new(vec![host.to_owned()]).unwrap();
        params.distinguished_name = rcgen::DistinguishedName::new();
        params
            .distinguished_name
            .push(DnType::CommonName, common_name);
        let cert = params.signed_by(&key, &self.issuer).unwrap();
        (cert.pem(), key.serialize_pem())
    }

    /// Writes ca.crt, tls.crt and tls.key as a mounted Secret has them.
    pub fn issue(&self, dir: &Path, common_name: &str, host: &str) {
        let (cert, key) = self.pair(common_name, host);
        std::fs::create_dir_all(dir).unwrap();
        std::fs::write(dir.join("ca.crt"), &self.pem).unwrap();
        std::fs::write(dir.join("tls.crt"), cert).unwrap();
        std::fs::write(dir.join("tls.key"), key).unwrap();
    }
}

/// The programs of the PostgreSQL that DOMICILE_TEST_POSTGRES_BIN names, or of the newest there is.
fn bin() -> PathBuf {
    if let Some(dir) = std::env::var_os("DOMICILE_TEST_POSTGRES_BIN") {
        return dir.into();
    }
    (15..=18)
        .rev()
        .map(|n| PathBuf::from(format!("/usr/lib/postgresql/{n}/bin")))
        .find(|d| d.join("postgres").exists())
        .expect("PostgreSQL 15 to 18: install the package postgresql")
}

/// A PostgreSQL with a workflow's ledger in it.
pub struct Postgres {
    dir: PathBuf,
    port: u16,
    server: Option<Child>,
}

impl Drop for Postgres {
    fn drop(&mut self) {
        self.kill();
    }
}

fn as_postgres(program: &Path) -> Command {
    let mut command = Command::new(program);
    // PostgreSQL refuses to run as root.
    if nix::unistd::geteuid().is_root() {
        let user = User::from_name("postgres")
            .unwrap()
            .expect("a user to run PostgreSQL as: install the package postgresql");
        command.uid(user.uid.as_raw()).gid(user.gid.as_raw());
    }
    command
}

fn give_to_postgres(path: &Path) {
    if nix::unistd::geteuid().is_root() {
        let user = User::from_name("postgres").unwrap().unwrap();
        nix::unistd::chown(path, Some(user.uid), Some(user.gid)).unwrap();
    }
}

impl Postgres {
    fn new(dir: PathBuf, authority: &Authority) -> Self {
        std::fs::create_dir_all(&dir).unwrap();
        give_to_postgres(&dir);
        let data = dir.join("data");
        let made = as_postgres(&bin().join("initdb"))
            .args([
                "--no-sync",
                "-A",
                "trust",
                "-U",
                "postgres",
                "-E",
                "UTF8",
                "-D",
            ])
            .arg(&data)
            .current_dir("/")
            .output()
            .unwrap();
        assert!(made.status.success(), "{made:?}");
        authority.issue(&data.join("tls"), "server", "localhost");
        for file in ["", "ca.crt", "tls.crt", "tls.key"] {
            give_to_postgres(&data.join("tls").join(file));
        }
        use std::os::unix::fs::PermissionsExt as _;
        let private = std::fs::Permissions::from_mode(0o600);
        std::fs::set_permissions(data.join("tls/tls.key"), private).unwrap();
        std::fs::write(
            data.join("pg_hba.conf"),
            "local all postgres trust\nhostssl all +domicile_rights all cert\n",
        )
        .unwrap();
        // A port of the kernel's choosing, free a moment ago.
        let port = std::net::TcpListener::bind(("127.0.0.1", 0))
            .unwrap()
            .local_addr()
            .unwrap()
            .port();
        let settings = format!(
            "listen_addresses = '127.0.0.1'\nport = {port}\nunix_socket_directories = '{}'\n\
             ssl = on\nssl_ca_file = 'tls/ca.crt'\nssl_cert_file = 'tls/tls.crt'\nssl_key_file = 'tls/tls.key'\n\
             shared_buffers = 16MB\nmax_connections = 60\nfsync = off\n\
             log_min_duration_statement = 0\nlog_parameter_max_length = -1\nlog_parameter_max_length_on_error = -1\n",
            dir.display()
        );
        use std::io::Write as _;
        std::fs::OpenOptions::new()
            .append(true)
            .open(data.join("postgresql.conf"))
            .unwrap()
            .write_all(settings.as_bytes())
            .unwrap();
        Self {
            dir,
            port,
            server: None,
        }
    }

    /// Starts it, and waits until it answers.
    pub async fn start(&mut self) {
        until("PostgreSQL is there", async || {
            let exited = self
                .server
                .as_mut()
                .is_none_or(|s| s.try_wait().unwrap().is_some());
            if exited {
                // After a SIGKILL it refuses to start until the last of its old processes has ended.
                let log = std::fs::OpenOptions::new()
                    .create(true)
                    .append(true)
                    .open(self.dir.join("log"))
                    .unwrap();
                let server = as_postgres(&bin().join("postgres"))
                    .arg("-D")
                    .arg(self.dir.join("data"))
                    .current_dir("/")
                    .stdin(Stdio::null())
                    .stdout(Stdio::null())
                    .stderr(log)
                    .spawn()
                    .unwrap();
                self.server = Some(server);
            }
            self.try_connect("postgres").await.is_some()
        })
        .await;
    }

    /// SIGKILL. What it had begun ends with it.
    pub fn kill(&mut self) {
        if let Some(mut server) = self.server.take() {
            let _ = kill(Pid::from_raw(server.id() as i32), Signal::SIGKILL);
            let _ = server.wait();
        }
    }

    async fn try_connect(&self, database: &str) -> Option<tokio_postgres::Client> {
        let (client, connection) = tokio_postgres::Config::new()
            .host_path(&self.dir)
            .port(self.port)
            .user("postgres")
            .dbname(database)
            .connect(tokio_postgres::NoTls)
            .await
            .ok()?;
        tokio::spawn(connection);
        Some(client)
    }

    /// The superuser, in the ledger's database.
    pub async fn superuser(&self) -> tokio_postgres::Client {
        self.try_connect(&database(WORKFLOW)).await.unwrap()
    }

    /// What PostgreSQL logged, every statement and parameter included.
    pub fn log(&self) -> String {
        String::from_utf8_lossy(&std::fs::read(self.dir.join("log")).unwrap()).into_owned()
    }
}

/// A ledger, and all that a gateway needs.
pub struct Bed {
    // In this order: the server must end before its directory goes.
    pub postgres: Postgres,
    pub authority: Authority,
    pub kube: Arc<kube::Fake>,
    pub dir: tempfile::TempDir,
}

impl Bed {
    pub async fn new() -> Self {
        log_everything();
        let dir = tempfile::Builder::new().prefix("gw").tempdir().unwrap();
        use std::os::unix::fs::PermissionsExt as _;
        let open = std::fs::Permissions::from_mode(0o755);
        std::fs::set_permissions(dir.path(), open).unwrap();
        let authority = Authority::new("test authority");
        let mut postgres = Postgres::new(dir.path().join("postgres"), &authority);
        postgres.start().await;
        let client = postgres.try_connect("postgres").await.unwrap();
        roles::prepare(&client, WORKFLOW).await.unwrap();
        let mut client = postgres.superuser().await;
        migrate(&mut client, WORKFLOW).await.unwrap();

        let bed = Self {
            postgres,
            authority,
            kube: Arc::default(),
            dir,
        };
        for who in [Role::Gateway, Role::Worker] {
            let name = role(WORKFLOW, who);
            bed.authority.issue(&bed.tls(who), &name, &name);
        }
        bed.authority
            .issue(&bed.path("serving"), "gateway", "localhost");
        bed.write_keys();
        std::fs::write(
            bed.path("workflow.json"),
            serde_json::to_vec(&bed.workflow()).unwrap(),
        )
        .unwrap();
        bed
    }

    fn path(&self, what: &str) -> PathBuf {
        self.dir.path().join(what)
    }

    fn tls(&self, who: Role) -> PathBuf {
        self.path(&role(WORKFLOW, who))
    }

    pub fn keys(&self) -> PathBuf {
        self.path("keys")
    }

    fn write_keys(&self) {
        std::fs::create_dir_all(self.keys()).unwrap();
        std::fs::write(self.keys().join("hash"), [7; 32]).unwrap();
        // A test may run at midnight.
        let today = Timestamp::now().to_zoned(TimeZone::UTC).date();
        for (n, days) in [0, 1].into_iter().enumerate() {
            let day = today.checked_add(days.days()).unwrap();
            let key = [u8::try_from(n).unwrap() + 1; 32];
            std::fs::write(self.keys().join(format!("epoch-{day}")), key).unwrap();
        }
    }

    pub fn workflow(&self) -> Workflow {
        serde_json::from_value(json!({
            "name": WORKFLOW, "namespace": "records",
            "regimes": ["us-ca-ccpa", "eu-gdpr"],
            "identifiers": ["customerId", "email"],
            "promptnessSeconds": 10, "closedRequestsMonths": 24,
            "ledger": {"hosts": ["localhost"], "port": self.postgres.port, "name": database(WORKFLOW)},
            "targets": [
                {"name": "accounts", "regions": ["here"], "system": {"type": "PostgreSQL",
                 "erase": [{"table": "customer", "where": {"id": "customerId"}}]}},
                {"name": "sessions", "regions": ["here"], "settleSeconds": 30,
                 "system": {"type": "Redis", "keys": ["session:{customerId}:*"]}},
            ],
        }))
        .unwrap()
    }

    /// The ledger, as a worker.
    pub fn worker(&self) -> Ledger {
        let database: Database = self.workflow().ledger;
        let name = role(WORKFLOW, Role::Worker);
        Ledger::new(&database, &name, &self.tls(Role::Worker), 2, "test").unwrap()
    }

    /// Settings of a gateway, with free ports.
    pub fn args(&self, more: &[&str]) -> gateway::Args {
        #[derive(clap::Parser)]
        struct Line {
            #[command(flatten)]
            args: gateway::Args,
        }
        let own = [
            "gateway".to_owned(),
            format!("--config={}", self.path("workflow.json").display()),
            format!("--tls={}", self.tls(Role::Gateway).display()),
            format!("--keys={}", self.keys().display()),
            format!("--serving={}", self.path("serving").display()),
            "--https=127.0.0.1:0".to_owned(),
            "--http=127.0.0.1:0".to_owned(),
            "--leave-seconds=0".to_owned(),
        ];
        let more = more.iter().map(|s| (*s).to_owned());
        <Line as clap::Parser>::parse_from(own.into_iter().chain(more)).args
    }

    /// Starts a gateway, and waits until it is ready.
    pub async fn gateway(&self, more: &[&str]) -> Gateway {
        let (tx, rx) = tokio::sync::oneshot::channel();
        let stop = CancellationToken::new();
        let task = tokio::spawn(gateway::run_with(
            self.args(more),
            self.kube.client(),
            stop.clone(),
            move |addresses| {
                let _ = tx.send(addresses);
            },
        ));
        let addresses = rx.await.expect("it listens");
        let gateway = Gateway {
            addresses,
            authority: self.authority.pem.clone(),
            stop,
            task,
        };
        until("the gateway is ready", async || {
            gateway.probe("/readyz").await.0 == 200
        })
        .await;
        gateway
    }
}

/// A gateway that runs.
pub struct Gateway {
    pub addresses: Addresses,
    pub authority: String,
    pub stop: CancellationToken,
    pub task: JoinHandle<anyhow::Result<()>>,
}

impl Drop for Gateway {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl Gateway {
    /// A client with this token.
    pub fn client(&self, token: &str) -> client::Client {
        client::Client::new(self.addresses.https, &self.authority, Some(token), None)
    }

    /// A probe's answer. Status 0: there is none.
    pub async fn probe(&self, path: &str) -> (u16, String) {
        client::plain(self.addresses.http, path).await
    }

    /// A metric's value, by the line that it begins.
    pub async fn metric(&self, line: &str) -> Option<f64> {
        let text = self.probe("/metrics").await.1;
        let found = text.lines().find_map(|l| l.strip_prefix(line))?;
        found.trim().parse().ok()
    }
}
