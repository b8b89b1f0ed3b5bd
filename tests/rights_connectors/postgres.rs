//! PostgreSQL, for the suite: as a store has it, by certificate, with only the grants of docs/connectors.md.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Mutex;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU8, Ordering};

use domicile::api::rights_targets::TableErasure;
use domicile::rights::config::{Database, System, Target};
use domicile::rights::connectors::{Connector, Limits, connect_within};
use domicile::rights::model::{Evidence, Identifiers};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use tokio_postgres::NoTls;
use tokio_postgres::types::{IsNull, ToSql, Type, to_sql_checked};

use crate::instance_bed::{Authority, bin, drop_root, until};
use crate::suite::{CANARY, LIMITS, World, identifiers};

pub const PORT: u16 = 15433;
pub const ROLE: &str = "rights-w-worker";

pub const SCHEMA: &str = r#"
CREATE SCHEMA shop;
CREATE TABLE shop.customers (id bigint PRIMARY KEY, email text, row serial);
CREATE TABLE shop.orders (id bigserial PRIMARY KEY, customer_id bigint REFERENCES shop.customers);
CREATE TABLE shop.items (id bigserial PRIMARY KEY, order_id bigint REFERENCES shop.orders, customer_id bigint);
CREATE TABLE shop.invoices (id bigserial PRIMARY KEY, customer_id bigint REFERENCES shop.customers, name text, address text);
CREATE TABLE shop.messages (row serial, at date NOT NULL, customer_id bigint REFERENCES shop.customers,
  sender text, recipient text) PARTITION BY RANGE (at);
CREATE TABLE shop.messages_old PARTITION OF shop.messages FOR VALUES FROM ('2000-01-01') TO ('2020-01-01');
CREATE TABLE shop.messages_new PARTITION OF shop.messages FOR VALUES FROM ('2020-01-01') TO ('2040-01-01');
CREATE TABLE public."Profiles" (row serial, "Account" uuid, "Bio" text);
CREATE TABLE shop.newsletters (row serial, email varchar(200));
CREATE TABLE shop.disputes (customer_id bigint REFERENCES shop.customers);
GRANT USAGE ON SCHEMA shop TO "rights-w-worker";
GRANT SELECT, DELETE ON shop.customers, shop.orders, shop.items, shop.messages, shop.newsletters, public."Profiles"
  TO "rights-w-worker";
GRANT SELECT, UPDATE (customer_id, name, address) ON shop.invoices TO "rights-w-worker";
"#;

/// As the instance manager makes it.
const REPLAYED_FUNCTION: &str = "CREATE SCHEMA domicile; \
    CREATE FUNCTION domicile.replayed(\"position\" pg_lsn) RETURNS TABLE (standbys integer, replayed integer) \
    LANGUAGE sql STABLE STRICT SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS \
    'SELECT count(*)::integer, (count(*) FILTER (WHERE r.replay_lsn >= $1))::integer \
     FROM pg_catalog.pg_stat_replication r WHERE r.state = ''streaming'''; \
    REVOKE ALL ON FUNCTION domicile.replayed(pg_lsn) FROM PUBLIC; \
    GRANT USAGE ON SCHEMA domicile TO \"rights-w-worker\"; \
    GRANT EXECUTE ON FUNCTION domicile.replayed TO \"rights-w-worker\"";

pub fn rule(table: &str, column: &str, identifier: &str, clear: &[&str]) -> TableErasure {
    TableErasure {
        table: table.into(),
        columns: [(column.to_owned(), identifier.to_owned())].into(),
        clear_columns: clear.iter().map(|c| (*c).to_owned()).collect(),
    }
}

/// Parents first: the order is the connector's business.
pub fn rules() -> Vec<TableErasure> {
    vec![
        rule("shop.customers", "id", "customerId", &[]),
        rule("shop.orders", "customer_id", "customerId", &[]),
        rule("shop.items", "customer_id", "customerId", &[]),
        rule(
            "shop.invoices",
            "customer_id",
            "customerId",
            &["customer_id", "name", "address"],
        ),
        rule("shop.messages", "sender", "email", &[]),
        rule("shop.messages", "recipient", "email", &[]),
        rule("Profiles", "Account", "account", &[]),
        rule("shop.newsletters", "email", "email", &[]),
    ]
}

pub fn target(name: &str, store: Option<Database>, erase: Vec<TableErasure>) -> Target {
    Target {
        name: name.into(),
        regions: vec!["here".into()],
        settle_seconds: 0,
        residue_days: None,
        system: System::PostgreSql { store, erase },
    }
}

/// A parameter that the driver doesn't log: what is in the log shall be the connector's.
pub struct Quiet(pub String);

impl std::fmt::Debug for Quiet {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Quiet")
    }
}

impl ToSql for Quiet {
    fn to_sql(
        &self,
        ty: &Type,
        out: &mut bytes::BytesMut,
    ) -> Result<IsNull, Box<dyn std::error::Error + Sync + Send>> {
        self.0.to_sql(ty, out)
    }

    fn accepts(ty: &Type) -> bool {
        <String as ToSql>::accepts(ty)
    }

    to_sql_checked!();
}

fn address() -> String {
    static NEXT: AtomicU8 = AtomicU8::new(1);
    let process = 64 + std::process::id() % 128;
    format!("127.{process}.{}.78", NEXT.fetch_add(1, Ordering::Relaxed))
}

/// Makes an empty cluster.
fn initdb(dir: &Path) {
    let made = Command::new(bin().join("initdb"))
        .args(["-U", "postgres", "-A", "trust", "-E", "UTF8"])
        .args(["--locale=C", "--no-sync", "-D"])
        .arg(dir)
        .current_dir("/")
        .output()
        .unwrap();
    assert!(
        made.status.success(),
        "{}",
        String::from_utf8_lossy(&made.stderr)
    );
}

/// An empty cluster, made once per test process: copying is faster than initdb. All copies are the same system.
fn empty() -> &'static Path {
    static EMPTY: OnceLock<tempfile::TempDir> = OnceLock::new();
    let dir = EMPTY.get_or_init(|| {
        let dir = tempfile::Builder::new().prefix("dom").tempdir().unwrap();
        initdb(&dir.path().join("data"));
        dir
    });
    dir.path()
}

/// A server.
pub struct Server {
    pub address: String,
    pub dir: tempfile::TempDir,
    process: Mutex<Option<Child>>,
}

impl Drop for Server {
    fn drop(&mut self) {
        // Not before its children are gone would the directory be empty.
        if let Some(mut child) = self.process.lock().unwrap().take() {
            let pid = Pid::from_raw(i32::try_from(child.id()).unwrap());
            let _ = kill(pid, Signal::SIGCONT);
            let _ = kill(pid, Signal::SIGQUIT);
            let _ = child.wait();
        }
    }
}

impl Server {
    fn new(authority: &Authority) -> Self {
        drop_root();
        let server = Self {
            address: address(),
            dir: tempfile::Builder::new().prefix("dom").tempdir().unwrap(),
            process: Mutex::new(None),
        };
        authority.issue(&server.dir.path().join("tls"), &server.address);
        server
    }

    fn data(&self) -> PathBuf {
        self.dir.path().join("data")
    }

    /// `alien`: a system of its own.
    pub async fn primary(authority: &Authority, alien: bool) -> Self {
        let server = Self::new(authority);
        if alien {
            initdb(&server.data());
        } else {
            let from = empty().join("data");
            let mut copied = Command::new("cp");
            copied.arg("-a").arg(from).arg(server.data());
            copied.current_dir("/");
            assert!(copied.status().unwrap().success());
        }
        let hba = "local all postgres trust\n\
                   hostnossl replication postgres 127.0.0.0/8 trust\n\
                   hostssl all +domicile_rights all cert\n\
                   hostssl all all all scram-sha-256\n\
                   hostnossl all plain all scram-sha-256\n";
        std::fs::write(server.data().join("pg_hba.conf"), hba).unwrap();
        server.run().await;
        server
    }

    /// A standby of it that streams.
    pub async fn standby(primary: &Self, authority: &Authority) -> Self {
        let server = Self::new(authority);
        let conninfo = format!(
            "host={} port={PORT} user=postgres sslmode=disable",
            primary.address
        );
        let made = Command::new(bin().join("pg_basebackup"))
            .args([
                "-R",
                "-X",
                "stream",
                "-c",
                "fast",
                "--no-sync",
                "-d",
                &conninfo,
                "-D",
            ])
            .arg(server.data())
            .current_dir("/")
            .output()
            .unwrap();
        assert!(
            made.status.success(),
            "{}",
            String::from_utf8_lossy(&made.stderr)
        );
        server.run().await;
        server
    }

    pub async fn run(&self) {
        let dir = self.dir.path();
        let log = std::fs::OpenOptions::new()
            .create(true)
            .append(true)
            .open(dir.join("log"))
            .unwrap();
        let mut command = Command::new(bin().join("postgres"));
        command.arg("-D").arg(self.data());
        for setting in [
            format!("listen_addresses={}", self.address),
            format!("port={PORT}"),
            format!("unix_socket_directories={}", dir.display()),
            "ssl=on".into(),
            format!("ssl_ca_file={}", dir.join("tls/ca.crt").display()),
            format!("ssl_cert_file={}", dir.join("tls/tls.crt").display()),
            format!("ssl_key_file={}", dir.join("tls/tls.key").display()),
            "fsync=off".into(),
            "shared_buffers=16MB".into(),
            "max_connections=40".into(),
        ] {
            command.arg("-c").arg(setting);
        }
        let child = command
            .current_dir("/")
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(log)
            .spawn()
            .unwrap();
        *self.process.lock().unwrap() = Some(child);
        until("PostgreSQL answers", async || {
            self.try_admin("postgres").await.is_ok()
        })
        .await;
    }

    pub fn stop(&self) {
        let mut child = self.process.lock().unwrap().take().unwrap();
        let pid = i32::try_from(child.id()).unwrap();
        kill(Pid::from_raw(pid), Signal::SIGINT).unwrap();
        child.wait().unwrap();
    }

    /// To the server and all its backends.
    pub fn signal(&self, signal: Signal) {
        let process = self.process.lock().unwrap();
        let pid = i32::try_from(process.as_ref().unwrap().id()).unwrap();
        kill(Pid::from_raw(pid), signal).unwrap();
        // It may have been about to fork: none of its children is missed once it stands.
        while signal == Signal::SIGSTOP
            && !std::fs::read_to_string(format!("/proc/{pid}/status"))
                .unwrap()
                .contains("State:\tT")
        {
            std::thread::yield_now();
        }
        let children = std::fs::read_to_string(format!("/proc/{pid}/task/{pid}/children")).unwrap();
        for child in children.split_whitespace() {
            let _ = kill(Pid::from_raw(child.parse().unwrap()), signal);
        }
    }

    async fn try_admin(
        &self,
        database: &str,
    ) -> Result<tokio_postgres::Client, tokio_postgres::Error> {
        let mut config = tokio_postgres::Config::new();
        config
            .host_path(self.dir.path())
            .port(PORT)
            .user("postgres")
            .dbname(database);
        let (client, connection) = config.connect(NoTls).await?;
        tokio::spawn(async move {
            let _ = connection.await;
        });
        client.simple_query("SELECT 1").await?;
        Ok(client)
    }

    /// As the superuser.
    pub async fn admin(&self) -> tokio_postgres::Client {
        self.try_admin("app").await.unwrap()
    }

    pub async fn sql(&self, sql: &str) {
        self.admin().await.batch_execute(sql).await.unwrap();
    }

    pub async fn value(&self, sql: &str) -> String {
        let rows = self.admin().await.simple_query(sql).await.unwrap();
        rows.iter()
            .find_map(|m| match m {
                tokio_postgres::SimpleQueryMessage::Row(row) => {
                    Some(row.get(0).unwrap_or("").to_owned())
                }
                _ => None,
            })
            .unwrap_or_default()
    }
}

/// A store of one instance, with an application's database.
pub struct Postgres {
    pub server: Server,
    pub authority: Authority,
    standby: Mutex<Option<Server>>,
    pub tls: tempfile::TempDir,
}

impl Postgres {
    /// Empty: a database, the roles, and the function of the instance manager.
    pub async fn bare() -> Self {
        Self::on(false).await
    }

    /// As [`Postgres::new`], on a system of its own.
    pub async fn alien() -> Self {
        let world = Self::on(true).await;
        world.server.sql(SCHEMA).await;
        world
    }

    async fn on(alien: bool) -> Self {
        let authority = Authority::new();
        let server = Server::primary(&authority, alien).await;
        let admin = server.try_admin("postgres").await.unwrap();
        for sql in [
            "CREATE ROLE domicile_rights NOLOGIN",
            "CREATE ROLE \"rights-w-worker\" LOGIN IN ROLE domicile_rights",
            "CREATE DATABASE app",
        ] {
            admin.batch_execute(sql).await.unwrap();
        }
        server.sql(REPLAYED_FUNCTION).await;
        let world = Self {
            server,
            authority,
            standby: Mutex::new(None),
            tls: tempfile::Builder::new().prefix("dom").tempdir().unwrap(),
        };
        world.mend();
        world
    }

    pub fn database(&self, hosts: &[&str]) -> Database {
        Database {
            hosts: hosts.iter().map(|h| (*h).to_owned()).collect(),
            port: PORT,
            name: "app".into(),
        }
    }

    /// A connector by other rules.
    pub fn by(&self, rules: Vec<TableErasure>) -> Box<dyn Connector> {
        self.of(
            &target("app", Some(self.database(&[&self.server.address])), rules),
            LIMITS,
        )
    }

    pub fn of(&self, target: &Target, limits: Limits) -> Box<dyn Connector> {
        connect_within(
            target,
            self.tls.path(),
            Path::new("/nonexistent"),
            ROLE,
            limits,
        )
        .unwrap()
    }
}

impl World for Postgres {
    async fn new() -> Self {
        let world = Self::bare().await;
        world.server.sql(SCHEMA).await;
        world
    }

    fn connector(&self) -> Box<dyn Connector> {
        self.by(rules())
    }

    async fn plant(&self, person: &Identifiers) {
        let of = |name: &str| Quiet(person.0.get(name).cloned().unwrap_or_default());
        let (id, mail, account) = (of("customerId"), of("email"), of("account"));
        let mut admin = self.server.admin().await;
        let plant = admin.transaction().await.unwrap();
        for sql in [
            "INSERT INTO shop.customers VALUES ($1::text::bigint, $2::text)",
            "INSERT INTO shop.orders (customer_id) SELECT $1::text::bigint FROM (SELECT $2::text) AS unused, generate_series(1, 3)",
            "INSERT INTO shop.items (order_id, customer_id) SELECT id, $1::text::bigint FROM shop.orders, (SELECT $2::text) AS unused \
             WHERE customer_id = $1::text::bigint",
            "INSERT INTO shop.invoices (customer_id, name, address) VALUES ($1::text::bigint, $2::text, 'somewhere')",
            "INSERT INTO shop.messages (at, customer_id, sender, recipient) VALUES \
             ('2010-01-01', $1::text::bigint, $2::text, 'nobody'), ('2030-01-01', $1::text::bigint, 'nobody', $2::text)",
            "INSERT INTO shop.newsletters (email) SELECT $2::text FROM (SELECT $1::text) AS unused",
        ] {
            plant.execute(sql, &[&id, &mail]).await.unwrap();
        }
        let sql = "INSERT INTO \"Profiles\" (\"Account\", \"Bio\") VALUES ($1::text::uuid, 'x')";
        plant.execute(sql, &[&account]).await.unwrap();
        plant.commit().await.unwrap();
    }

    async fn left(&self, person: &Identifiers) -> usize {
        let of = |name: &str| Quiet(person.0.get(name).cloned().unwrap_or_default());
        let sql = "SELECT (SELECT count(*) FROM shop.customers WHERE id::text = $1 OR email = $2) \
             + (SELECT count(*) FROM shop.orders WHERE customer_id::text = $1) \
             + (SELECT count(*) FROM shop.items WHERE customer_id::text = $1) \
             + (SELECT count(*) FROM shop.invoices WHERE customer_id::text = $1 OR name = $2) \
             + (SELECT count(*) FROM shop.messages WHERE customer_id::text = $1 OR sender = $2 OR recipient = $2) \
             + (SELECT count(*) FROM \"Profiles\" WHERE \"Account\"::text = $3) \
             + (SELECT count(*) FROM shop.newsletters WHERE email = $2)";
        let admin = self.server.admin().await;
        let row = admin
            .query_one(sql, &[&of("customerId"), &of("email"), &of("account")])
            .await
            .unwrap();
        usize::try_from(row.get::<_, i64>(0)).unwrap()
    }

    async fn everything(&self) -> BTreeSet<String> {
        let admin = self.server.admin().await;
        let sql = "SELECT format('SELECT %L || row_to_json(t)::text FROM %s AS t', c.oid::regclass || ' ', c.oid::regclass) \
             FROM pg_class AS c WHERE c.relkind = 'r' AND c.oid >= 16384";
        let mut lines = BTreeSet::new();
        for row in admin.query(sql, &[]).await.unwrap() {
            for row in admin.query(row.get::<_, &str>(0), &[]).await.unwrap() {
                lines.insert(row.get(0));
            }
        }
        lines
    }

    fn removed(evidence: &Evidence) -> u64 {
        evidence.0["rows"]
            .as_object()
            .unwrap()
            .values()
            .map(|n| n.as_u64().unwrap())
            .sum()
    }

    fn hostile() -> Vec<Identifiers> {
        [
            "'; DROP TABLE shop.customers; --",
            "' OR '1'='1",
            "%",
            "_",
            "%canary%",
            "*",
            "\\",
            "\\'",
            "\"",
            "a b",
            " x",
            "x ",
            "X",
            "$1",
            "$$",
            "{x}",
            "{\"x\",\"y\"}",
            "NULL",
            "é😀",
            "e\u{301}",
            "\u{1}",
            "\r\n",
            "[x]",
            "--",
            "x",
        ]
        .iter()
        .enumerate()
        .map(|(n, mail)| {
            let uuid = uuid::Uuid::from_u128(0x7301_9940_0000_4000_8000_0000_0001_0000 + n as u128);
            identifiers(&[
                ("customerId", &format!("{}", 7_301_994_900 + n)),
                (
                    "email",
                    &if n % 2 == 0 {
                        (*mail).to_owned()
                    } else {
                        format!("{CANARY}{mail}")
                    },
                ),
                ("account", &uuid.to_string()),
            ])
        })
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
        self.server.sql("TRUNCATE shop.customers CASCADE").await;
    }

    fn forge(&self) {
        Authority::new().issue(self.tls.path(), ROLE);
    }

    fn mend(&self) {
        self.authority.issue(self.tls.path(), ROLE);
    }

    async fn poison(&self, person: &Identifiers) {
        let sql = "INSERT INTO shop.disputes VALUES ($1::text::bigint)";
        let id = Quiet(person.0["customerId"].clone());
        self.server
            .admin()
            .await
            .execute(sql, &[&id])
            .await
            .unwrap();
    }

    async fn cure(&self, _: &Identifiers) {
        self.server.sql("DELETE FROM shop.disputes").await;
    }

    async fn lose(&self) -> Option<String> {
        self.server
            .sql("ALTER TABLE shop.messages RENAME TO letters")
            .await;
        Some("messages".into())
    }

    async fn stale(&self) -> Box<dyn Connector> {
        let standby = Server::standby(&self.server, &self.authority).await;
        standby.value("SELECT pg_wal_replay_pause()").await;
        let database = self.database(&[&standby.address]);
        *self.standby.lock().unwrap() = Some(standby);
        self.of(&target("app", Some(database), rules()), LIMITS)
    }
}
