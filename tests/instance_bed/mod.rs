//! A bed for instances on a real PostgreSQL: certificates, an API server of a few lines, and clients.
//!
//! Owns: temporary directories, one loopback address per instance, and the merging of the instances' reports
//! into one store object, as the API server and the operator would. Never: sleeps for a guessed time; what a
//! test waits for, it polls for, until a deadline.

#![allow(dead_code)]

pub mod witness;
pub mod writer;

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::os::fd::AsRawFd as _;
use std::path::{Path, PathBuf};
use std::process::{Output, Stdio};
use std::sync::atomic::{AtomicU8, Ordering};
use std::sync::{Arc, Mutex, Once, OnceLock};
use std::time::{Duration, Instant};

use domicile::api::PrivacyDataStore;
use domicile::api::privacy_data_store::{InstanceRole, InstanceStatus};
use domicile::instance::config::Timing;
use domicile::instance::postmaster::Stop;
use domicile::instance::status::Status;
use domicile::instance::store::{Api, Wish};
use domicile::instance::{Config, run_with};
use rcgen::{
    BasicConstraints, CertificateParams, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair,
};
use tokio::process::Command;
use tokio::sync::watch;
use tokio::task::JoinHandle;

pub const PATIENCE: Duration = Duration::from_secs(90);
pub const PORT: u16 = 15432;
pub const PASSWORD: &str = "it's a \\ \"secret\" é";

/// PostgreSQL refuses to run as root, so the whole test process becomes its Debian user.
pub fn drop_root() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        program();
        if nix::unistd::geteuid().is_root() {
            let user = nix::unistd::User::from_name("postgres")
                .unwrap()
                .expect("a user to run PostgreSQL as: install the package postgresql");
            nix::unistd::setgroups(&[]).unwrap();
            nix::unistd::setgid(user.gid).unwrap();
            nix::unistd::setuid(user.uid).unwrap();
        }
        tracing_subscriber::fmt()
            .with_writer(|| Tee)
            .with_ansi(false)
            .with_max_level(tracing::Level::DEBUG)
            .init();
    });
}

static LOG: Mutex<String> = Mutex::new(String::new());

/// Everything that was logged so far, by all tests.
pub fn logged() -> String {
    LOG.lock().unwrap().clone()
}

struct Tee;

impl std::io::Write for Tee {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        let text = String::from_utf8_lossy(bytes);
        LOG.lock().unwrap().push_str(&text);
        print!("{text}");
        Ok(bytes.len())
    }
    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

/// The programs of the PostgreSQL that DOMICILE_TEST_POSTGRES_BIN names, or of the newest there is.
pub fn bin() -> PathBuf {
    if let Some(dir) = std::env::var_os("DOMICILE_TEST_POSTGRES_BIN") {
        return dir.into();
    }
    (15..=18)
        .rev()
        .map(|n| PathBuf::from(format!("/usr/lib/postgresql/{n}/bin")))
        .find(|d| d.join("postgres").exists())
        .expect("PostgreSQL 15 to 18: install the package postgresql")
}

/// The program, also for a test process that has become another user since and can't reach its path any more.
pub fn program() -> PathBuf {
    static PROGRAM: OnceLock<std::fs::File> = OnceLock::new();
    let file = PROGRAM.get_or_init(|| std::fs::File::open(env!("CARGO_BIN_EXE_domicile")).unwrap());
    format!("/proc/self/fd/{}", file.as_raw_fd()).into()
}

/// Polls until it holds.
pub async fn until<F: AsyncFnMut() -> bool>(what: &str, holds: F) {
    assert!(in_time(holds).await, "waited in vain until {what}");
}

async fn in_time<F: AsyncFnMut() -> bool>(mut holds: F) -> bool {
    let deadline = Instant::now() + PATIENCE;
    while !holds().await {
        if Instant::now() >= deadline {
            return false;
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    true
}

pub struct Authority {
    cert: String,
    issuer: Issuer<'static, KeyPair>,
}

impl Authority {
    pub fn new() -> Self {
        let key = KeyPair::generate().unwrap();
        let mut params = CertificateParams::new(Vec::new()).unwrap();
        params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
        params
            .distinguished_name
            .push(DnType::CommonName, "test authority");
        let cert = params.self_signed(&key).unwrap().pem();
        Self {
            cert,
            issuer: Issuer::new(params, key),
        }
    }

    /// Writes ca.crt, tls.crt and tls.key as a mounted Secret has them.
    pub fn issue(&self, dir: &Path, name: &str) {
        std::fs::create_dir_all(dir).unwrap();
        let key = KeyPair::generate().unwrap();
        let mut params = CertificateParams::new(vec![name.to_owned(), "s-rw".to_owned()]).unwrap();
        params.distinguished_name = rcgen::DistinguishedName::new();
        params.distinguished_name.push(DnType::CommonName, name);
        params.extended_key_usages = vec![
            ExtendedKeyUsagePurpose::ServerAuth,
            ExtendedKeyUsagePurpose::ClientAuth,
        ];
        let cert = params.signed_by(&key, &self.issuer).unwrap();
        // As the kubelet does it, all change together; a test replaces them one by one, in this order.
        std::fs::write(dir.join("ca.crt"), &self.cert).unwrap();
        std::fs::write(dir.join("tls.key"), key.serialize_pem()).unwrap();
        std::fs::write(dir.join("tls.crt"), cert.pem()).unwrap();
        use std::os::unix::fs::PermissionsExt as _;
        let private = std::fs::Permissions::from_mode(0o600);
        std::fs::set_permissions(dir.join("tls.key"), private).unwrap();
    }
}

type Views = Vec<watch::Sender<Option<Arc<PrivacyDataStore>>>>;

/// A store of instances, and the API server between them.
pub struct Bed {
    pub dir: tempfile::TempDir,
    pub authority: Authority,
    subnet: u8,
    object: Arc<Mutex<PrivacyDataStore>>,
    views: Arc<Mutex<Views>>,
    deaf: Arc<Mutex<bool>>,
    pub witness: witness::Witness,
    /// From how far on a session is kept ready with an instance.
    far: Duration,
}

impl Bed {
    pub fn new(instances: u32, durability: &str) -> Self {
        drop_root();
        static SUBNET: AtomicU8 = AtomicU8::new(1);
        let dir = tempfile::Builder::new().prefix("dom").tempdir().unwrap();
        let object = serde_json::from_value(serde_json::json!({
            "apiVersion": "domicile.dev/v1alpha1", "kind": "PrivacyDataStore",
            "metadata": {"name": "s", "namespace": "n", "uid": "u-1"},
            "spec": {
                "residencyPolicyRef": {"name": "p"},
                "placement": [{"region": "here", "instances": instances}],
                "durability": durability,
                "storage": {"size": "1Gi"},
                "postgres": {"parameters": {"shared_buffers": "16MB"}},
            },
            "status": {"primary": "s-1", "term": 1,
                       "instances": (1..=instances).map(|i| serde_json::json!({"name": format!("s-{i}"), "mayBePrimary": true}))
                           .collect::<Vec<_>>()},
        }))
        .unwrap();
        Self {
            dir,
            authority: Authority::new(),
            subnet: SUBNET.fetch_add(1, Ordering::Relaxed),
            object: Arc::new(Mutex::new(object)),
            views: Arc::default(),
            deaf: Arc::default(),
            witness: witness::Witness::default(),
            far: Timing::default().far,
        }
    }

    /// As if every instance were in another region. Before any is started.
    pub fn far_apart(mut self) -> Self {
        self.far = Duration::ZERO;
        self
    }

    pub fn address(&self, host: u8) -> IpAddr {
        // Each test has a subnet of its own, and so, as good as always, has each process of tests.
        let process = 64 + u8::try_from(std::process::id() % 128).unwrap();
        Ipv4Addr::new(127, process, self.subnet, host).into()
    }

    pub fn path(&self, instance: u32, what: &str) -> PathBuf {
        self.dir.path().join(format!("s-{instance}")).join(what)
    }

    /// Only the first instance may be primary. Before any is started.
    pub fn only_first(self) -> Self {
        self.change(|o| {
            for entry in &mut o.status.as_mut().unwrap().instances {
                entry.may_be_primary = Some(entry.name == "s-1");
            }
        });
        self
    }

    /// As whom an instance votes, and acknowledges.
    pub fn voter(&self, instance: u32) -> String {
        format!("s-{instance}/{}", self.entry(instance).id.unwrap())
    }

    /// Until the first instance serves under a rule of these standbys, and all of them vote.
    pub async fn until_members(&self, primary: &Node, members: &[u32]) {
        let names: Vec<String> = members.iter().map(|n| format!("s-{n}")).collect();
        until("the standbys are in the rule", async || {
            let rule = primary.status().await.and_then(|s| s.synchronous);
            rule.is_some_and(|r| r.in_force && r.members == names)
                && members.iter().all(|n| self.entry(*n).voter == Some(true))
        })
        .await;
    }

    /// While deaf, the API server takes nothing from the instances.
    pub fn deaf(&self, deaf: bool) {
        *self.deaf.lock().unwrap() = deaf;
    }

    pub fn change(&self, change: impl FnOnce(&mut PrivacyDataStore)) {
        change(&mut self.object.lock().unwrap());
        self.broadcast();
    }

    pub fn parameters(&self, parameters: &[(&str, &str)]) {
        self.change(|o| {
            o.spec.postgres.parameters = parameters
                .iter()
                .map(|(k, v)| ((*k).to_owned(), (*v).to_owned()))
                .collect::<BTreeMap<_, _>>();
        });
    }

    fn broadcast(&self) {
        broadcast(&self.object, &self.views);
    }

    pub fn entry(&self, instance: u32) -> InstanceStatus {
        let name = format!("s-{instance}");
        let object = self.object.lock().unwrap();
        let status = object.status.as_ref().unwrap();
        status
            .instances
            .iter()
            .find(|i| i.name == name)
            .cloned()
            .unwrap()
    }

    pub async fn until_ready(&self, instance: u32) {
        until(&format!("s-{instance} is ready"), async || {
            self.entry(instance).ready == Some(true)
        })
        .await;
    }

    /// The message, once it contains this.
    pub async fn until_message(&self, instance: u32, part: &str) -> String {
        let message = || self.entry(instance).message;
        let says = in_time(async || message().is_some_and(|m| m.contains(part))).await;
        assert!(says, "s-{instance} never says {part}, but {:?}", message());
        message().unwrap()
    }

    pub fn config(&self, instance: u32, host: u8) -> Config {
        let address = self.address(host);
        let app = self.path(instance, "app");
        if !app.exists() {
            std::fs::create_dir_all(&app).unwrap();
            std::fs::write(app.join("username"), "app").unwrap();
            std::fs::write(app.join("password"), PASSWORD).unwrap();
        }
        let tls = self.path(instance, "tls");
        if !tls.exists() {
            self.authority.issue(&tls, &format!("s-{instance}"));
        }
        Config {
            store: "s".into(),
            namespace: "n".into(),
            instance: format!("s-{instance}"),
            address,
            volume: self.path(instance, "volume"),
            run: self.path(instance, "run"),
            tls,
            app,
            bin: Some(bin()),
            listen: address.to_string(),
            port: PORT,
            http: SocketAddr::new(address, 18008),
            peers: SocketAddr::new(address, 18009),
            program: program(),
            timing: Timing {
                tick: Duration::from_millis(200),
                starting_tick: Duration::from_millis(50),
                files: Duration::from_millis(300),
                remember_after: Duration::from_millis(500),
                stranded_after: Duration::from_secs(1),
                backoff: Duration::from_millis(100),
                backoff_max: Duration::from_secs(2),
                stop: Duration::from_secs(30),
                far: self.far,
                ..Timing::default()
            },
        }
    }

    /// Starts an instance that reaches the API server.
    pub fn start(&self, instance: u32) -> Node {
        self.start_at(instance, u8::try_from(instance).unwrap())
    }

    /// As [`Bed::start`], at another address.
    pub fn start_at(&self, instance: u32, host: u8) -> Node {
        let view = Some(Arc::new(self.object.lock().unwrap().clone()));
        let (view_tx, view) = watch::channel(view);
        self.views.lock().unwrap().push(view_tx);
        self.spawn(self.config(instance, host), view)
    }

    /// Starts an instance that never hears from the API server.
    pub fn start_alone(&self, instance: u32) -> Node {
        let (tx, view) = watch::channel(None);
        let mut node = self.spawn(self.config(instance, u8::try_from(instance).unwrap()), view);
        node.silence = Some(tx);
        node
    }

    fn spawn(&self, config: Config, store: watch::Receiver<Option<Arc<PrivacyDataStore>>>) -> Node {
        let (wish, mut wishes) = watch::channel::<Option<Wish>>(None);
        let (stop, stopping) = watch::channel(None);
        let seen = wishes.clone();
        let (object, views, deaf) = (self.object.clone(), self.views.clone(), self.deaf.clone());
        let merger = tokio::spawn(async move {
            // Looks again now and then, since deafness ends without an event.
            loop {
                let more = tokio::time::timeout(Duration::from_millis(50), wishes.changed()).await;
                if matches!(more, Ok(Err(_))) {
                    return;
                }
                let wish = wishes.borrow().clone();
                if let Some(wish) = wish
                    && !*deaf.lock().unwrap()
                    && merge(&object, &wish)
                {
                    broadcast(&object, &views);
                }
            }
        });
        let witness = Arc::new(self.witness.clone());
        let api = Api {
            store,
            wish,
            witness,
        };
        let run = run_with(config.clone(), api, stopping);
        let task = tokio::spawn(async move {
            let result = run.await;
            if let Err(e) = &result {
                println!("an instance ended: {e:#}");
            }
            result
        });
        Node {
            config,
            stop,
            task,
            merger,
            wish: seen,
            silence: None,
        }
    }
}

fn broadcast(object: &Mutex<PrivacyDataStore>, views: &Mutex<Views>) {
    let view = Arc::new(object.lock().unwrap().clone());
    views
        .lock()
        .unwrap()
        .retain(|tx| tx.send(Some(view.clone())).is_ok());
}

/// As server-side apply does with a list-map by name. True if it changed anything.
fn merge(object: &Mutex<PrivacyDataStore>, wish: &Wish) -> bool {
    let mut object = object.lock().unwrap();
    let status = object.status.as_mut().unwrap();
    let changed = match status
        .instances
        .iter_mut()
        .find(|i| i.name == wish.entry.name)
    {
        Some(entry) => {
            // What the operator says stays.
            let new = InstanceStatus {
                may_be_primary: entry.may_be_primary,
                leaving: entry.leaving,
                ..wish.entry.clone()
            };
            let differs = *entry != new;
            *entry = new;
            differs
        }
        None if wish.create => {
            status.instances.push(wish.entry.clone());
            true
        }
        None => false,
    };
    // As the operator: the primary is who says so in the highest term.
    let leader = status
        .instances
        .iter()
        .filter(|i| i.role == Some(InstanceRole::Primary))
        .max_by_key(|i| i.term)
        .map(|i| (i.name.clone(), i.term));
    if let Some((name, Some(term))) = leader
        && status.term < Some(term)
    {
        status.primary = Some(name);
        status.term = Some(term);
    }
    changed
}

/// A running instance.
pub struct Node {
    pub config: Config,
    stop: watch::Sender<Option<Stop>>,
    task: JoinHandle<anyhow::Result<()>>,
    merger: JoinHandle<()>,
    pub wish: watch::Receiver<Option<Wish>>,
    silence: Option<watch::Sender<Option<Arc<PrivacyDataStore>>>>,
}

impl Drop for Node {
    fn drop(&mut self) {
        self.task.abort();
        self.merger.abort();
    }
}

impl Node {
    /// Stops it gracefully, to its end.
    pub async fn stop(mut self) {
        self.stop.send_replace(Some(Stop::Fast));
        tokio::time::timeout(PATIENCE, &mut self.task)
            .await
            .expect("a graceful stop ends")
            .unwrap()
            .unwrap();
    }

    /// Ends it as a SIGKILL of the whole pod would: manager and PostgreSQL at once.
    pub async fn kill(self) {
        let pid = self.postmaster();
        let ports = [self.config.http, self.config.peers];
        self.task.abort();
        if let Some(pid) = pid {
            for victim in with_children(pid) {
                let _ = nix::sys::signal::kill(
                    nix::unistd::Pid::from_raw(victim),
                    nix::sys::signal::Signal::SIGKILL,
                );
            }
            until("PostgreSQL is gone", async || {
                !Path::new(&format!("/proc/{pid}")).exists()
            })
            .await;
        }
        // What was aborted lets go of its sockets a moment later, unlike a process.
        until("its ports are free", async || {
            ports
                .iter()
                .all(|port| std::net::TcpListener::bind(port).is_ok())
        })
        .await;
    }

    /// What `/status` says.
    pub async fn status(&self) -> Option<Status> {
        let (code, body) = self.http("/status").await?;
        (code == 200).then(|| serde_json::from_str(&body).unwrap())
    }

    /// Asks a path.
    pub async fn http(&self, path: &str) -> Option<(u16, String)> {
        use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
        let mut stream = tokio::net::TcpStream::connect(self.config.http)
            .await
            .ok()?;
        let request = format!("GET {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n");
        stream.write_all(request.as_bytes()).await.ok()?;
        let mut text = String::new();
        stream.read_to_string(&mut text).await.ok()?;
        let code = text.split(' ').nth(1)?.parse().ok()?;
        Some((code, text.split_once("\r\n\r\n")?.1.to_owned()))
    }

    pub async fn until_answers(&self, path: &str, code: u16) -> String {
        until(&format!("{path} answers {code}"), async || {
            self.http(path).await.is_some_and(|(c, _)| c == code)
        })
        .await;
        self.http(path).await.unwrap().1
    }

    /// The postmaster's process number.
    pub fn postmaster(&self) -> Option<i32> {
        let path = self.config.volume.join("data/postmaster.pid");
        let text = std::fs::read_to_string(path).ok()?;
        text.lines().next()?.trim().parse().ok()
    }

    /// Runs SQL as the superuser over the Unix socket, and returns its one value.
    pub async fn sql(&self, sql: &str) -> Result<String, String> {
        let conninfo = format!(
            "host={} port={PORT} user=postgres dbname=postgres connect_timeout=5",
            self.config.run.display()
        );
        psql(&conninfo, sql).await
    }

    /// As [`Node::sql`], in another database.
    pub async fn sql_in(&self, database: &str, sql: &str) -> Result<String, String> {
        let conninfo = format!(
            "host={} port={PORT} user=postgres dbname={database} connect_timeout=5",
            self.config.run.display()
        );
        psql(&conninfo, sql).await
    }

    /// A connection string for the application over TLS.
    pub fn app(&self, more: &str) -> String {
        format!(
            "host={} hostaddr={} port={PORT} user=app dbname=app sslmode=verify-full sslrootcert={} \
             connect_timeout=5 {more}",
            self.config.instance,
            self.config.address,
            self.config.tls.join("ca.crt").display(),
        )
    }

    pub async fn app_sql(&self, sql: &str) -> Result<String, String> {
        psql(&self.app(""), sql).await
    }
}

fn with_children(pid: i32) -> Vec<i32> {
    let mut all = vec![pid];
    for entry in std::fs::read_dir("/proc").unwrap().flatten() {
        let Some(child) = entry.file_name().to_str().and_then(|n| n.parse().ok()) else {
            continue;
        };
        let stat = std::fs::read_to_string(format!("/proc/{child}/stat")).unwrap_or_default();
        let parent = stat
            .rsplit_once(')')
            .and_then(|(_, rest)| rest.split_whitespace().nth(1)?.parse::<i32>().ok());
        if parent == Some(pid) {
            all.push(child);
        }
    }
    all
}

/// Runs psql with the application's password at hand.
pub async fn psql(conninfo: &str, sql: &str) -> Result<String, String> {
    psql_with(conninfo, sql, PASSWORD).await
}

pub async fn psql_with(conninfo: &str, sql: &str, password: &str) -> Result<String, String> {
    let output: Output = Command::new(bin().join("psql"))
        .args([
            "-X",
            "-A",
            "-t",
            "-q",
            "-w",
            "-v",
            "ON_ERROR_STOP=1",
            "-d",
            conninfo,
            "-c",
            sql,
        ])
        .env_clear()
        .env("PGPASSWORD", password)
        .env("HOME", "/nonexistent")
        .current_dir("/")
        .stdin(Stdio::null())
        .kill_on_drop(true)
        .output()
        .await
        .unwrap();
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).trim().to_owned();
    if output.status.success() {
        Ok(text(&output.stdout))
    } else {
        Err(text(&output.stderr))
    }
}

/// A commit under way.
pub fn commit(node: &Node, sql: &str) -> JoinHandle<Result<String, String>> {
    let (conninfo, sql) = (node.app(""), sql.to_owned());
    tokio::spawn(async move { psql(&conninfo, &sql).await })
}

/// Waits until so many commits wait for a standby.
pub async fn until_waiting(node: &Node, count: u32) {
    until("the commit waits for a standby", async || {
        let sql = "SELECT count(*) FROM pg_stat_activity WHERE wait_event = 'SyncRep' AND usename = 'app'";
        node.sql(sql).await == Ok(count.to_string())
    })
    .await;
}
