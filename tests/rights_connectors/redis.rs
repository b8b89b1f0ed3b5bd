//! Redis, for the suite.

use std::collections::BTreeSet;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::Mutex;
use std::sync::atomic::{AtomicU8, Ordering};

use domicile::rights::config::{System, Target};
use domicile::rights::connectors::{Connector, connect_within};
use domicile::rights::model::{Evidence, Identifiers};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use redis::AsyncCommands as _;
use redis::aio::MultiplexedConnection;

use crate::instance_bed::{PATIENCE, drop_root, until};
use crate::suite::{CANARY, LIMITS, World, identifiers, person};

const PORT: u16 = 16379;
const PASSWORD: &str = "worker-pass-word";
pub const KEYS: [&str; 3] = [
    "profile:{customerId}",
    "session:{customerId}:*",
    "mail:{email}",
];

/// An address of this test's own: tests and test processes run side by side.
pub fn address() -> String {
    static NEXT: AtomicU8 = AtomicU8::new(1);
    let process = 64 + std::process::id() % 128;
    format!("127.{process}.{}.77", NEXT.fetch_add(1, Ordering::Relaxed))
}

/// A server.
pub struct Server {
    pub address: String,
    dir: tempfile::TempDir,
    more: Vec<String>,
    process: Mutex<Option<Child>>,
}

impl Drop for Server {
    fn drop(&mut self) {
        if let Some(mut child) = self.process.lock().unwrap().take() {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

impl Server {
    pub async fn start(more: &[&str]) -> Self {
        drop_root();
        let server = Self {
            address: address(),
            dir: tempfile::Builder::new().prefix("dom").tempdir().unwrap(),
            more: more.iter().map(|m| (*m).to_owned()).collect(),
            process: Mutex::new(None),
        };
        server.run().await;
        server
    }

    pub async fn run(&self) {
        let child = Command::new("redis-server")
            .args(["--port", &PORT.to_string(), "--bind", &self.address])
            .args([
                "--save",
                "",
                "--appendonly",
                "no",
                "--logfile",
                "log",
                "--dir",
            ])
            .arg(self.dir.path())
            .args(&self.more)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .spawn()
            .expect("redis-server: install the package redis-server");
        *self.process.lock().unwrap() = Some(child);
        until("Redis answers", async || self.ready().await).await;
    }

    async fn ready(&self) -> bool {
        let Ok(client) = redis::Client::open(self.url()) else {
            return false;
        };
        let Ok(mut c) = client.get_multiplexed_async_connection().await else {
            return false;
        };
        redis::cmd("PING")
            .query_async::<String>(&mut c)
            .await
            .is_ok()
    }

    pub fn signal(&self, signal: Signal) {
        let process = self.process.lock().unwrap();
        let pid = i32::try_from(process.as_ref().unwrap().id()).unwrap();
        kill(Pid::from_raw(pid), signal).unwrap();
    }

    pub fn stop(&self) {
        let mut child = self.process.lock().unwrap().take().unwrap();
        child.kill().unwrap();
        child.wait().unwrap();
    }

    /// As the user that may do everything.
    pub fn url(&self) -> String {
        format!("redis://{}:{PORT}", self.address)
    }

    pub async fn admin(&self) -> MultiplexedConnection {
        let client = redis::Client::open(self.url()).unwrap();
        // The suite fills large keyspaces by it.
        let patient = redis::AsyncConnectionConfig::new().set_response_timeout(Some(PATIENCE));
        let connecting = client.get_multiplexed_async_connection_with_config(&patient);
        connecting.await.unwrap()
    }

    pub async fn run_command(&self, words: &[&str]) {
        let mut command = redis::cmd(words[0]);
        for word in &words[1..] {
            command.arg(*word);
        }
        let _: redis::Value = command.query_async(&mut self.admin().await).await.unwrap();
    }

    /// Makes the worker's user, with what docs/connectors.md says that it needs.
    pub async fn user(&self, keys: &str) {
        self.run_command(&[
            "ACL",
            "SETUSER",
            "worker",
            "reset",
            "on",
            &format!(">{PASSWORD}"),
            keys,
            "+info",
            "+scan",
            "+unlink",
            "+exists",
            "+wait",
        ])
        .await;
    }
}

/// Writes a target's URL where a worker finds it.
pub fn write_url(dir: &Path, target: &str, url: &str) {
    std::fs::create_dir_all(dir.join(target)).unwrap();
    std::fs::write(dir.join(target).join("url"), url).unwrap();
}

pub fn target(name: &str, keys: &[&str]) -> Target {
    Target {
        name: name.into(),
        regions: vec!["here".into()],
        settle_seconds: 0,
        residue_days: None,
        system: System::Redis {
            keys: keys.iter().map(|k| (*k).to_owned()).collect(),
        },
    }
}

pub struct Redis {
    pub server: Server,
    replica: Mutex<Option<Server>>,
    pub credentials: tempfile::TempDir,
}

impl Redis {
    pub fn freeze_replica(&self) {
        self.replica
            .lock()
            .unwrap()
            .as_ref()
            .unwrap()
            .signal(Signal::SIGSTOP);
    }

    pub fn url(&self, password: &str) -> String {
        format!("redis://worker:{password}@{}:{PORT}", self.server.address)
    }
}

fn is_of(key: &[u8], person: &Identifiers) -> bool {
    let of = |name: &str| person.0.get(name).cloned().unwrap_or_default();
    let id = of("customerId");
    key == format!("profile:{id}").as_bytes()
        || key == format!("mail:{}", of("email")).as_bytes()
        || key.starts_with(format!("session:{id}:").as_bytes())
}

pub async fn all_keys(c: &mut MultiplexedConnection) -> Vec<Vec<u8>> {
    // Not by SCAN: this is who checks it.
    redis::cmd("KEYS").arg("*").query_async(c).await.unwrap()
}

impl World for Redis {
    async fn new() -> Self {
        let server = Server::start(&[]).await;
        server.user("~*").await;
        let world = Self {
            server,
            replica: Mutex::new(None),
            credentials: tempfile::Builder::new().prefix("dom").tempdir().unwrap(),
        };
        world.mend();
        world
    }

    fn connector(&self) -> Box<dyn Connector> {
        let none = Path::new("/nonexistent");
        connect_within(
            &target("cache", &KEYS),
            none,
            self.credentials.path(),
            "x",
            LIMITS,
        )
        .unwrap()
    }

    async fn plant(&self, person: &Identifiers) {
        let mut c = self.server.admin().await;
        let of = |name: &str| person.0.get(name).cloned().unwrap_or_default();
        let id = of("customerId");
        let _: () = c.set(format!("profile:{id}"), "x").await.unwrap();
        let _: () = c.set(format!("mail:{}", of("email")), "x").await.unwrap();
        for session in ["", "1", "*", "a:b", "[x]\r\n\0"] {
            let key = format!("session:{id}:{session}");
            let _: () = c.hset(key, "field", "x").await.unwrap();
        }
    }

    async fn left(&self, person: &Identifiers) -> usize {
        let keys = all_keys(&mut self.server.admin().await).await;
        keys.iter().filter(|k| is_of(k, person)).count()
    }

    async fn everything(&self) -> BTreeSet<String> {
        let keys = all_keys(&mut self.server.admin().await).await;
        keys.iter()
            .map(|k| format!("{:?}", String::from_utf8_lossy(k)))
            .collect()
    }

    fn removed(evidence: &Evidence) -> u64 {
        let keys = evidence.0["keys"].as_object().unwrap();
        assert_eq!(keys.len(), KEYS.len());
        keys.values().map(|n| n.as_u64().unwrap()).sum()
    }

    fn hostile() -> Vec<Identifiers> {
        [
            "*",
            "**",
            "?",
            "[7-9]",
            "[^a]",
            "\\",
            "\\*",
            "7301994*",
            "7301994??0",
            "a b",
            "\r\nFLUSHALL\r\n",
            "é😀",
            "\0",
            "a\0b",
            "{x}",
            "^",
            "]",
            "'; DROP TABLE customers; --",
            "730",
            "*73",
        ]
        .iter()
        .map(|id| identifiers(&[("customerId", id), ("email", &format!("{CANARY}{id}*"))]))
        .collect()
    }

    fn freeze(&self) {
        self.server.signal(Signal::SIGSTOP);
    }

    fn thaw(&self) {
        self.server.signal(Signal::SIGCONT);
    }

    async fn down(&mut self) {
        self.server.stop();
    }

    async fn up(&mut self) {
        self.server.run().await;
        self.server.user("~*").await;
    }

    fn forge(&self) {
        write_url(self.credentials.path(), "cache", &self.url("wrong"));
    }

    fn mend(&self) {
        write_url(self.credentials.path(), "cache", &self.url(PASSWORD));
    }

    async fn poison(&self, poisoned: &Identifiers) {
        // Everybody's keys but this person's: an access list has no "but".
        assert_eq!(poisoned, &person(17));
        let mut c = self.server.admin().await;
        let mut acl = redis::cmd("ACL");
        acl.arg("SETUSER").arg("worker").arg("resetkeys");
        for n in (0..30).filter(|n| *n != 17).map(person) {
            let id = &n.0["customerId"];
            acl.arg(format!("~profile:{id}"))
                .arg(format!("~session:{id}:*"));
            acl.arg(format!("~mail:{}", n.0["email"]));
        }
        let _: redis::Value = acl.query_async(&mut c).await.unwrap();
    }

    async fn cure(&self, _: &Identifiers) {
        self.server.user("~*").await;
    }

    async fn lose(&self) -> Option<String> {
        // Redis has no tables that could be missing.
        None
    }

    async fn stale(&self) -> Box<dyn Connector> {
        let port = PORT.to_string();
        let replica = Server::start(&["--replicaof", &self.server.address, &port]).await;
        replica.user("~*").await;
        let url = format!("redis://worker:{PASSWORD}@{}:{PORT}", replica.address);
        write_url(self.credentials.path(), "stale", &url);
        *self.replica.lock().unwrap() = Some(replica);
        let none = Path::new("/nonexistent");
        connect_within(
            &target("stale", &KEYS),
            none,
            self.credentials.path(),
            "x",
            LIMITS,
        )
        .unwrap()
    }
}
