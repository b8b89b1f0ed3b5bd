//! A bed for workers: a real PostgreSQL for the ledger, one that is a target, a real Redis, and the real program as child
//! processes that can be killed and stopped.
//!
//! Owns processes, ports, files. Never: sleeps for a guessed time, but for how long a fault lasts.

use std::collections::BTreeMap;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::{Mutex, Once};
use std::time::{Duration, Instant};

use domicile::api::names::rights::{Role, database, role};
use domicile::rights::ledger::{Ledger, Waker, migrate, roles};
use domicile::rights::secrecy::Keyring;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use tokio_postgres::{Client, NoTls};

use crate::client::Client as Desk;
use crate::instance_bed::{Authority, bin, program};
use crate::relay::Relay;
use crate::volume::{self, Volume};

pub const WORKFLOW: &str = "wf";
pub const REGION: &str = "here";
pub const PATIENCE: Duration = Duration::from_secs(120);

/// Polls until it holds.
pub async fn until<F: AsyncFnMut() -> bool>(what: &str, mut holds: F) -> Duration {
    let began = Instant::now();
    while !holds().await {
        assert!(began.elapsed() < PATIENCE, "waited in vain until {what}");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    began.elapsed()
}

/// PostgreSQL refuses to run as root, so the whole test process becomes its Debian user. It logs nothing itself: what
/// counts is what the workers log.
fn drop_root() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        program();
        if nix::unistd::geteuid().is_root() {
            let user = nix::unistd::User::from_name("postgres")
                .unwrap()
                .expect("a user to run PostgreSQL as: install the package postgresql");
            volume::prepare(user.uid.as_raw(), user.gid.as_raw());
            nix::unistd::setgroups(&[]).unwrap();
            nix::unistd::setgid(user.gid).unwrap();
            nix::unistd::setuid(user.uid).unwrap();
            // pg_dump and initdb look for where they are.
            std::env::set_current_dir("/").unwrap();
        }
    });
}

pub fn free_port() -> u16 {
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    listener.local_addr().unwrap().port()
}

fn signal(child: &Child, signal: Signal) {
    let pid = Pid::from_raw(i32::try_from(child.id()).unwrap());
    // One that is gone already needs none.
    let _ = kill(pid, signal);
}

fn faketime() -> PathBuf {
    let name = "faketime/libfaketimeMT.so.1";
    let libraries = std::fs::read_dir("/usr/lib").unwrap();
    let mut all = libraries.map(|dir| dir.unwrap().path().join(name));
    all.find(|path| path.exists())
        .expect("a wrong clock: install the package libfaketime")
}

/// A process that can be killed, stopped, let go on, and started again.
pub struct Process {
    name: String,
    /// By how many seconds its clock is wrong.
    clock: Mutex<i32>,
    make: Box<dyn Fn() -> Command + Send + Sync>,
    child: Mutex<Option<Child>>,
}

impl Process {
    fn new(name: &str, make: impl Fn() -> Command + Send + Sync + 'static) -> Self {
        Self {
            name: name.to_owned(),
            clock: Mutex::new(0),
            make: Box::new(make),
            child: Mutex::new(None),
        }
    }

    /// Starts it if it doesn't run.
    pub fn start(&self) {
        let wrong = *self.clock.lock().unwrap();
        let library = (wrong != 0).then(faketime);
        let mut child = self.child.lock().unwrap();
        let gone = match child.as_mut() {
            None => true,
            Some(child) => child.try_wait().unwrap().is_some(),
        };
        if gone {
            let mut command = (self.make)();
            if let Some(library) = library {
                // Of the clocks only the one that tells the time of day: the other can't be set.
                command
                    .env("LD_PRELOAD", library)
                    .env("FAKETIME", format!("{wrong:+}s"))
                    .env("FAKETIME_DONT_FAKE_MONOTONIC", "1");
            }
            let spawned = command.spawn();
            *child = Some(spawned.unwrap_or_else(|e| panic!("can't start {}: {e}", self.name)));
        }
    }

    /// Its clock is wrong by so much from its next start on.
    pub fn set_clock(&self, seconds: i32) {
        *self.clock.lock().unwrap() = seconds;
    }

    pub fn kill(&self) {
        if let Some(mut child) = self.child.lock().unwrap().take() {
            signal(&child, Signal::SIGKILL);
            child.wait().unwrap();
            // What a wrong clock leaves behind if it is killed, and would keep its successor from working.
            for name in ["faketime_shm_", "sem.faketime_sem_"] {
                let _ = std::fs::remove_file(format!("/dev/shm/{name}{}", child.id()));
            }
        }
    }

    pub fn signal(&self, which: Signal) {
        if let Some(child) = self.child.lock().unwrap().as_ref() {
            signal(child, which);
        }
    }

    /// Whether it ended by itself, and well.
    pub fn ended(&self) -> Option<bool> {
        let mut child = self.child.lock().unwrap();
        let status = child.as_mut()?.try_wait().unwrap()?;
        Some(status.success())
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        self.signal(Signal::SIGCONT);
        self.kill();
    }
}

/// A PostgreSQL server.
pub struct Server {
    pub process: Process,
    pub dir: PathBuf,
    pub port: u16,
}

impl Server {
    fn new(name: &str, dir: PathBuf, settings: &str, hba: &str) -> Self {
        let data = dir.join("data");
        std::fs::create_dir_all(&dir).unwrap();
        let made = Command::new(bin().join("initdb"))
            .args([
                "-U",
                "postgres",
                "-A",
                "trust",
                "--no-sync",
                "-E",
                "UTF8",
                "--locale=C",
                "-D",
            ])
            .arg(&data)
            .stdout(Stdio::null())
            .status()
            .unwrap();
        assert!(made.success());
        let port = free_port();
        let socket = dir.display();
        std::fs::write(
            data.join("postgresql.auto.conf"),
            format!(
                "listen_addresses = '127.0.0.1'\nport = {port}\nunix_socket_directories = '{socket}'\n\
                 shared_buffers = '32MB'\nmax_connections = 100\nlog_line_prefix = '%m '\n{settings}\n"
            ),
        )
        .unwrap();
        std::fs::write(data.join("pg_hba.conf"), hba).unwrap();
        let log = dir.join("log");
        let process = Process::new(name, move || {
            let mut command = Command::new(bin().join("postgres"));
            command
                .arg("-D")
                .arg(&data)
                .stdout(Stdio::null())
                .stderr(append(&log));
            command
        });
        Self { process, dir, port }
    }

    /// Starts it, again and again if what a kill left behind is in the way, until it answers.
    pub async fn up(&self) {
        until("PostgreSQL is up", async || {
            self.process.start();
            self.try_admin("postgres").await.is_some()
        })
        .await;
    }

    async fn try_admin(&self, database: &str) -> Option<Client> {
        let mut config = tokio_postgres::Config::new();
        config
            .host_path(&self.dir)
            .port(self.port)
            .user("postgres")
            .dbname(database)
            .connect_timeout(Duration::from_secs(2));
        let (client, connection) = config.connect(NoTls).await.ok()?;
        tokio::spawn(connection);
        Some(client)
    }

    /// The superuser, over the Unix socket.
    pub async fn admin(&self, database: &str) -> Client {
        for _ in 0..500 {
            if let Some(client) = self.try_admin(database).await {
                return client;
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        panic!("no connection to {database}");
    }

    pub fn log(&self) -> String {
        read(&self.dir.join("log"))
    }
}

fn append(path: &Path) -> std::fs::File {
    std::fs::OpenOptions::new()
        .create(true)
        .append(true)
        .open(path)
        .unwrap()
}

fn read(path: &Path) -> String {
    String::from_utf8_lossy(&std::fs::read(path).unwrap_or_default()).into_owned()
}

/// A worker.
pub struct Worker {
    pub process: Process,
    pub log: PathBuf,
    pub port: u16,
}

impl Worker {
    pub fn logged(&self) -> String {
        read(&self.log)
    }

    /// A path of its HTTP port: status and body.
    pub async fn get(&self, path: &str) -> Option<(u16, String)> {
        use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
        let ask = async {
            let mut stream = tokio::net::TcpStream::connect(("127.0.0.1", self.port)).await?;
            let request = format!("GET {path} HTTP/1.1\r\nHost: w\r\nConnection: close\r\n\r\n");
            stream.write_all(request.as_bytes()).await?;
            let mut text = String::new();
            stream.read_to_string(&mut text).await?;
            std::io::Result::Ok(text)
        };
        let text = tokio::time::timeout(Duration::from_secs(2), ask)
            .await
            .ok()?
            .ok()?;
        let (head, body) = text.split_once("\r\n\r\n")?;
        let status = head.split(' ').nth(1)?.parse().ok()?;
        Some((status, body.to_owned()))
    }

    /// The sum of a metric over all labels that contain `label`.
    pub async fn metric(&self, name: &str, label: &str) -> f64 {
        let Some((_, text)) = self.get("/metrics").await else {
            return 0.0;
        };
        text.lines()
            .filter(|line| line.starts_with(name) && line.contains(label))
            .filter_map(|line| line.rsplit(' ').next()?.parse::<f64>().ok())
            .sum()
    }
}

/// Everything.
pub struct Bed {
    pub ledger: Server,
    pub shop: Server,
    pub redis: Process,
    pub redis_port: u16,
    pub workers: Vec<Worker>,
    pub gateway: Process,
    pub gateway_port: u16,
    /// The ways to the ledger, and of each worker to the shop and to Redis.
    pub to_ledger: Relay,
    pub to_shop: Vec<Relay>,
    pub to_redis: Vec<Relay>,
    /// What the ledger lies on; none where nobody may mount.
    pub volume: Option<Volume>,
    pub filer: Ledger,
    pub waker: Waker,
    pub keyring: Keyring,
    pub config: PathBuf,
    /// How much of each log was looked at.
    read: Mutex<BTreeMap<PathBuf, usize>>,
    // Last, so that it goes last.
    pub dir: tempfile::TempDir,
}

/// Tables of people, and who may erase: `eraser_a` for the first worker, `eraser_b` for the second.
const SHOP: &str = "
    CREATE TABLE customers (id text PRIMARY KEY, email text, name text);
    CREATE TABLE orders (n bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
                         customer_id text NOT NULL REFERENCES customers (id), what text);
    CREATE TABLE mails (n bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY, address text NOT NULL, body text);
    CREATE INDEX ON orders (customer_id);
    CREATE INDEX ON mails (address);
    CREATE ROLE eraser_a LOGIN PASSWORD 'a-secret';
    CREATE ROLE eraser_b LOGIN PASSWORD 'b-secret';
    GRANT SELECT, DELETE ON customers, orders, mails TO eraser_a, eraser_b;";

impl Bed {
    /// `workers` of them, made but not started.
    pub async fn new(workers: usize, targets: &serde_json::Value) -> Self {
        drop_root();
        let dir = tempfile::Builder::new().prefix("rw").tempdir().unwrap();
        let root = dir.path().to_owned();
        let authority = Authority::new();

        let tls = root.join("server-tls");
        authority.issue(&tls, "localhost");
        let volume = Volume::over(&root.join("ledger"));
        let ledger = Server::new(
            "the ledger's PostgreSQL",
            root.join("ledger"),
            &format!(
                "max_wal_size = '128MB'\nmin_wal_size = '32MB'\nssl = on\nssl_ca_file = '{0}/ca.crt'\nssl_cert_file = '{0}/tls.crt'\nssl_key_file = '{0}/tls.key'",
                tls.display()
            ),
            "local all postgres trust\nhostssl all +domicile_rights all cert\nhost all all all reject\n",
        );
        let shop = Server::new(
            "the target's PostgreSQL",
            root.join("shop"),
            "",
            "local all postgres trust\nhost all all 127.0.0.1/32 scram-sha-256\n",
        );
        ledger.up().await;
        shop.up().await;

        roles::prepare(&ledger.admin("postgres").await, WORKFLOW)
            .await
            .unwrap();
        let mut client = ledger.admin(&database(WORKFLOW)).await;
        migrate(&mut client, WORKFLOW).await.unwrap();
        let admin = shop.admin("postgres").await;
        admin.batch_execute("CREATE DATABASE shop").await.unwrap();
        shop.admin("shop").await.batch_execute(SHOP).await.unwrap();

        let redis_port = free_port();
        let redis_dir = root.join("redis");
        std::fs::create_dir_all(&redis_dir).unwrap();
        let redis = {
            let (dir, log) = (redis_dir, root.join("redis.log"));
            Process::new("redis-server", move || {
                let mut command = Command::new("redis-server");
                command
                    // On disk at once: what a kill loses of it would look like erased.
                    .args([
                        "--save",
                        "",
                        "--appendonly",
                        "yes",
                        "--appendfsync",
                        "always",
                    ])
                    .args(["--bind", "127.0.0.1", "--requirepass", "r-secret"])
                    .args(["--port", &redis_port.to_string()])
                    .arg("--dir")
                    .arg(&dir)
                    .stdout(append(&log))
                    .stderr(append(&log));
                command
            })
        };
        redis.start();

        let keys = root.join("keys");
        std::fs::create_dir_all(&keys).unwrap();
        std::fs::write(keys.join("hash"), rand::random::<[u8; 32]>()).unwrap();
        let today = jiff::Timestamp::now()
            .to_zoned(jiff::tz::TimeZone::UTC)
            .date();
        for date in [today, today.tomorrow().unwrap()] {
            std::fs::write(
                keys.join(format!("epoch-{date}")),
                rand::random::<[u8; 32]>(),
            )
            .unwrap();
        }

        let config = root.join("workflow.json");
        let to_ledger = Relay::to(ledger.port).await;
        let (mut to_shop, mut to_redis) = (Vec::new(), Vec::new());
        for _ in 0..workers {
            to_shop.push(Relay::to(shop.port).await);
            to_redis.push(Relay::to(redis_port).await);
        }
        let workflow_json = workflow(to_ledger.port, targets);
        std::fs::write(&config, workflow_json.to_string()).unwrap();

        let worker_tls = root.join("worker-tls");
        authority.issue(&worker_tls, &role(WORKFLOW, Role::Worker));
        let made = (0..workers)
            .map(|n| {
                let letter = ["a", "b"][n];
                let credentials = root.join(format!("targets-{letter}"));
                let url = |target: &str, url: String| {
                    let dir = credentials.join(target);
                    std::fs::create_dir_all(&dir).unwrap();
                    std::fs::write(dir.join("url"), url).unwrap();
                };
                url(
                    "shop",
                    format!(
                        "postgresql://eraser_{letter}:{letter}-secret@localhost:{}/shop?sslmode=disable",
                        to_shop[n].port
                    ),
                );
                for target in ["cache", "cart", "late"] {
                    let port = to_redis[n].port;
                    url(target, format!("redis://:r-secret@127.0.0.1:{port}"));
                }
                url("nowhere", "redis://127.0.0.1:1".to_owned());
                let port = free_port();
                let log = root.join(format!("worker-{letter}.log"));
                let to = log.clone();
                let (config, tls, keys) = (config.clone(), worker_tls.clone(), keys.clone());
                let process = Process::new("a worker", move || {
                    let mut command = Command::new(program());
                    command
                        .args(["worker", "--region", REGION, "--name", letter])
                        .args(["--listen", &format!("127.0.0.1:{port}")])
                        .arg("--config")
                        .arg(&config)
                        .arg("--tls")
                        .arg(&tls)
                        .arg("--keys")
                        .arg(&keys)
                        .arg("--targets")
                        .arg(&credentials)
                        // All that any library says: identifiers mustn't be in it.
                        .env("DOMICILE_LOG", "debug")
                        .stdout(append(&to))
                        .stderr(append(&to));
                    command
                });
                Worker { process, log, port }
            })
            .collect();

        let gateway_tls = root.join("gateway-tls");
        authority.issue(&gateway_tls, &role(WORKFLOW, Role::Gateway));
        let (gateway, gateway_port) = gateway(&authority, &root);
        let at: domicile::rights::config::Workflow = serde_json::from_value(workflow_json).unwrap();
        let filer = Ledger::new(
            &at.ledger,
            &role(WORKFLOW, Role::Gateway),
            &gateway_tls,
            4,
            "the test",
        )
        .unwrap();
        let waker = filer.waker();
        let bed = Self {
            ledger,
            shop,
            redis,
            redis_port,
            workers: made,
            gateway,
            gateway_port,
            to_ledger,
            to_shop,
            to_redis,
            volume,
            filer,
            waker,
            keyring: Keyring::read(&keys).unwrap(),
            config,
            read: Mutex::default(),
            dir,
        };
        until("Redis is up", async || bed.redis().await.is_some()).await;
        bed
    }

    pub fn start(&self) {
        for worker in &self.workers {
            worker.process.start();
        }
    }

    /// Writes another set of targets, as the kubelet does: all at once.
    pub fn targets(&self, targets: &serde_json::Value) {
        let new = self.config.with_extension("new");
        std::fs::write(&new, workflow(self.to_ledger.port, targets).to_string()).unwrap();
        std::fs::rename(&new, &self.config).unwrap();
    }

    /// A client of the gateway, known by its certificate.
    pub fn desk(&self) -> Desk {
        let tls = self.dir.path().join("desk-tls");
        let text = |name: &str| std::fs::read_to_string(tls.join(name)).unwrap();
        let pair = (text("tls.crt"), text("tls.key"));
        let address = (std::net::Ipv4Addr::LOCALHOST, self.gateway_port).into();
        Desk::new(address, &text("ca.crt"), None, Some(pair))
    }

    pub async fn redis(&self) -> Option<redis::aio::MultiplexedConnection> {
        let url = format!("redis://:r-secret@127.0.0.1:{}", self.redis_port);
        let client = redis::Client::open(url).unwrap();
        let connecting = client.get_multiplexed_async_connection();
        let connection = tokio::time::timeout(Duration::from_secs(2), connecting).await;
        let mut connection = connection.ok()?.ok()?;
        let pong: Result<String, _> = redis::cmd("PING").query_async(&mut connection).await;
        pong.ok().map(|_| connection)
    }

    /// The ledger's own database, as the superuser.
    pub async fn ledger_admin(&self) -> Client {
        self.ledger.admin(&database(WORKFLOW)).await
    }

    pub async fn shop_admin(&self) -> Client {
        self.shop.admin("shop").await
    }

    /// What gateway and workers have logged since this was asked last.
    pub fn logged_since(&self) -> String {
        let mut read = self.read.lock().unwrap();
        let all = self.workers.iter().map(|w| w.log.clone());
        let all = all.chain([self.dir.path().join("gateway.log")]);
        let mut text = String::new();
        for path in all {
            let bytes = std::fs::read(&path).unwrap_or_default();
            let from = read.insert(path, bytes.len()).unwrap_or(0);
            text += &String::from_utf8_lossy(&bytes[from..]);
        }
        text
    }

    pub fn logged(&self) -> String {
        let gateway = read(&self.dir.path().join("gateway.log"));
        let workers = self.workers.iter().map(Worker::logged);
        workers.chain([gateway]).collect()
    }
}

impl Drop for Bed {
    fn drop(&mut self) {
        if std::thread::panicking() {
            let kept = std::env::temp_dir().join(format!("rights-worker-{}", std::process::id()));
            let _ = std::fs::create_dir_all(&kept);
            let _ = std::fs::set_permissions(&kept, std::fs::Permissions::from_mode(0o755));
            for worker in &self.workers {
                let _ = std::fs::copy(&worker.log, kept.join(worker.log.file_name().unwrap()));
            }
            let _ = std::fs::copy(
                self.dir.path().join("gateway.log"),
                kept.join("gateway.log"),
            );
            for server in [&self.ledger, &self.shop] {
                let name = server.dir.file_name().unwrap().to_string_lossy();
                let _ = std::fs::copy(server.dir.join("log"), kept.join(format!("{name}.log")));
            }
            eprintln!("the logs are kept in {}", kept.display());
        }
    }
}

/// A gateway that knows its clients by certificate, so that it needs no API server. Made but not started.
fn gateway(authority: &Authority, root: &Path) -> (Process, u16) {
    authority.issue(&root.join("serving"), "localhost");
    authority.issue(&root.join("desk-tls"), "desk");
    let nowhere = serde_json::json!({
        "apiVersion": "v1", "kind": "Config", "current-context": "c",
        "contexts": [{"name": "c", "context": {"cluster": "c", "user": "u"}}],
        "clusters": [{"name": "c", "cluster": {"server": "http://127.0.0.1:1"}}],
        "users": [{"name": "u", "user": {}}],
    });
    std::fs::write(root.join("kubeconfig"), nowhere.to_string()).unwrap();
    let (root, port, http) = (root.to_owned(), free_port(), free_port());
    let process = Process::new("a gateway", move || {
        let mut command = Command::new(program());
        let flag = |name: &str, path: &str| format!("--{name}={}", root.join(path).display());
        command
            .arg("gateway")
            .arg(flag("config", "workflow.json"))
            .arg(flag("tls", "gateway-tls"))
            .arg(flag("keys", "keys"))
            .arg(flag("serving", "serving"))
            .arg(flag("client-ca", "desk-tls/ca.crt"))
            .args(["--allow-cn=desk", "--leave-seconds=0"])
            .arg(format!("--https=127.0.0.1:{port}"))
            .arg(format!("--http=127.0.0.1:{http}"))
            .env("KUBECONFIG", root.join("kubeconfig"))
            .env("DOMICILE_LOG", "debug")
            .stdout(append(&root.join("gateway.log")))
            .stderr(append(&root.join("gateway.log")));
        command
    });
    (process, port)
}

pub fn workflow(port: u16, targets: &serde_json::Value) -> serde_json::Value {
    serde_json::json!({
        "name": WORKFLOW, "namespace": "n", "regimes": ["eu-gdpr"], "identifiers": ["customerId", "email"],
        "promptnessSeconds": 10, "closedRequestsMonths": 24,
        "ledger": {"hosts": ["localhost"], "port": port, "name": database(WORKFLOW)},
        "targets": targets,
    })
}

/// The shop's tables, and a cache that is probed twice.
pub fn shop_and_cache() -> serde_json::Value {
    serde_json::json!([shop(), cache(1)])
}

pub fn shop() -> serde_json::Value {
    serde_json::json!({"name": "shop", "regions": [REGION], "system": {"type": "PostgreSQL", "erase": [
        {"table": "customers", "where": {"id": "customerId"}},
        {"table": "orders", "where": {"customer_id": "customerId"}},
        {"table": "mails", "where": {"address": "email"}},
    ]}})
}

pub fn cache(settle: u32) -> serde_json::Value {
    redis_target(
        "cache",
        settle,
        &["profile:{customerId}", "session:{customerId}:*"],
    )
}

pub fn redis_target(name: &str, settle: u32, keys: &[&str]) -> serde_json::Value {
    serde_json::json!({"name": name, "regions": [REGION], "settleSeconds": settle,
                       "system": {"type": "Redis", "keys": keys}})
}
