//! What privacy workflows need of a store, made so by a real PostgreSQL's instance manager: the ledger, the roles, the
//! certificates by which one logs in, and rights to exactly what was asked for.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "a test that can't go on should say so and stop"
)]

#[path = "instance_bed/mod.rs"]
mod bed;

use std::path::PathBuf;

use bed::{Bed, Node, PORT, psql, until};
use domicile::api::names::rights::{Role, database, role};
use domicile::api::privacy_data_store::{RightsAccess, TableAccess};

const WORKFLOW: &str = "consumers";

fn table(name: &str, delete: bool, clear: &[&str]) -> TableAccess {
    TableAccess {
        table: name.into(),
        delete,
        clear_columns: clear.iter().map(|c| (*c).to_owned()).collect(),
    }
}

fn wanted(tables: Vec<TableAccess>) -> Vec<RightsAccess> {
    vec![RightsAccess {
        workflow: WORKFLOW.into(),
        ledger: true,
        tables,
    }]
}

fn ask(bed: &Bed, rights: Vec<RightsAccess>) {
    bed.change(|o| o.status.as_mut().unwrap().rights = rights);
}

/// The folder with the certificate of a common name.
fn certificate(bed: &Bed, name: &str) -> PathBuf {
    let dir = bed.dir.path().join(format!("client-{name}"));
    bed.authority.issue(&dir, name);
    dir
}

/// How one connects as a role with the certificate of a name.
fn conninfo(bed: &Bed, node: &Node, database: &str, user: &str, name: Option<&str>) -> String {
    let mut conninfo = format!(
        "host={} hostaddr={} port={PORT} user={user} dbname={database} sslmode=verify-full sslrootcert={} \
         connect_timeout=5",
        node.config.instance,
        node.config.address,
        node.config.tls.join("ca.crt").display(),
    );
    if let Some(name) = name {
        let dir = certificate(bed, name);
        let (cert, key) = (dir.join("tls.crt"), dir.join("tls.key"));
        conninfo.push_str(&format!(
            " sslcert={} sslkey={}",
            cert.display(),
            key.display()
        ));
    }
    conninfo
}

async fn until_ledger(node: &Node) {
    until("the ledger is there", async || {
        let version = "SELECT max(version) > 0 FROM ledger.schema_version";
        node.sql_in(&database(WORKFLOW), version).await == Ok("t".into())
    })
    .await;
}

#[tokio::test]
async fn a_certificate_is_a_role_that_may_do_what_was_asked_for_and_nothing_else() {
    let bed = Bed::new(1, "Preferred");
    let node = bed.start(1);
    bed.until_ready(1).await;
    let tables = "CREATE TABLE customer (id text PRIMARY KEY, name text); \
                  CREATE SCHEMA shop; CREATE TABLE shop.orders (id int, customer text, name text); \
                  CREATE TABLE payroll (id int); INSERT INTO payroll VALUES (1); \
                  CREATE TABLE hidden (id text); ALTER TABLE hidden ENABLE ROW LEVEL SECURITY; \
                  INSERT INTO customer VALUES ('1', 'a'), ('2', 'b'); INSERT INTO shop.orders VALUES (1, '1', 'a')";
    node.app_sql(tables).await.unwrap();
    let asked = || {
        vec![
            table("customer", true, &[]),
            table("shop.orders", false, &["name"]),
            table("hidden", true, &[]),
            table("later", true, &[]),
        ]
    };
    ask(&bed, wanted(asked()));
    until_ledger(&node).await;
    let told = bed.until_message(1, "table later isn't there").await;
    assert!(
        told.contains("table hidden has row-level security"),
        "{told}"
    );

    let worker = role(WORKFLOW, Role::Worker);
    let as_worker = conninfo(&bed, &node, "app", &worker, Some(&worker));
    let run = async |sql: &str| psql(&as_worker, sql).await;
    let refused = async |sql: &str| {
        let why = run(sql).await.expect_err(sql);
        assert!(why.contains("permission denied"), "{sql}: {why}");
    };
    assert_eq!(run("SELECT count(*) FROM customer").await.unwrap(), "2");
    run("DELETE FROM customer WHERE id = '1'").await.unwrap();
    run("UPDATE shop.orders SET name = NULL WHERE customer = '1'")
        .await
        .unwrap();
    let replayed = run("SELECT standbys, replayed FROM domicile.replayed(pg_current_wal_lsn())");
    assert_eq!(replayed.await.unwrap(), "0|0");
    for sql in [
        "SELECT * FROM payroll",
        "SELECT * FROM hidden",
        "DELETE FROM shop.orders",
        "UPDATE shop.orders SET customer = 'x'",
        "UPDATE customer SET name = 'x'",
        "INSERT INTO customer VALUES ('3', 'c')",
        "TRUNCATE customer",
        "CREATE TABLE public.mine (id int)",
        "CREATE TABLE domicile.mine (id int)",
        "CREATE ROLE mine",
        "SELECT pg_read_file('postgresql.conf')",
    ] {
        refused(sql).await;
    }
    let gateway = role(WORKFLOW, Role::Gateway);
    let as_gateway = conninfo(&bed, &node, "app", &gateway, Some(&gateway));
    for sql in [
        "SELECT * FROM customer",
        "SELECT * FROM domicile.replayed('0/0')",
    ] {
        let why = psql(&as_gateway, sql).await.expect_err(sql);
        assert!(why.contains("permission denied"), "{sql}: {why}");
    }

    // The ledger: by functions only.
    let ledger = database(WORKFLOW);
    let observer = role(WORKFLOW, Role::Observer);
    let as_observer = conninfo(&bed, &node, &ledger, &observer, Some(&observer));
    let counts = psql(&as_observer, "SELECT observer.counts()->>'empty'").await;
    assert_eq!(counts.unwrap(), "true");
    for (who, sql) in [
        (&observer, "SELECT * FROM ledger.request"),
        (&worker, "SELECT observer.counts()"),
        (&gateway, "SELECT * FROM ledger.request"),
    ] {
        let at = conninfo(&bed, &node, &ledger, who, Some(who));
        let why = psql(&at, sql).await.expect_err(sql);
        assert!(why.contains("permission denied"), "{who}: {sql}: {why}");
    }
    let why = psql(
        &node
            .app("")
            .replace("dbname=app", &format!("dbname={ledger}")),
        "SELECT 1",
    )
    .await
    .expect_err("the application is no role of the workflow");
    assert!(why.contains("permission denied"), "{why}");

    // In nobody else's name, not without a certificate, and not by one of the store's own.
    for (user, name) in [
        (&worker, Some(gateway.as_str())),
        (&worker, Some("s-1")),
        (&worker, None),
        (&"app".to_owned(), Some(worker.as_str())),
        (&"postgres".to_owned(), Some("postgres")),
    ] {
        let at = conninfo(&bed, &node, "app", user, name);
        let at = if user == "app" {
            at + " password=wrong"
        } else {
            at
        };
        assert!(psql(&at, "SELECT 1").await.is_err(), "{user} by {name:?}");
    }

    // What is made later is granted then; what isn't asked for any more is taken back.
    node.app_sql("CREATE TABLE later (id text)").await.unwrap();
    until("the new table is granted", async || {
        run("SELECT count(*) FROM later").await.is_ok()
    })
    .await;
    ask(&bed, wanted(vec![table("customer", true, &[])]));
    until("the rights are taken back", async || {
        run("SELECT count(*) FROM later").await.is_err()
            && run("SELECT count(*) FROM shop.orders").await.is_err()
    })
    .await;
    assert_eq!(run("SELECT count(*) FROM customer").await.unwrap(), "1");
    ask(&bed, Vec::new());
    until("the roles can't log in", async || {
        run("SELECT 1").await.is_err() && psql(&as_observer, "SELECT 1").await.is_err()
    })
    .await;
    let kept = node
        .sql_in(&ledger, "SELECT count(*) > 0 FROM ledger.schema_version")
        .await;
    assert_eq!(kept.as_deref(), Ok("t"), "the ledger stays");
    // The workflow comes back.
    ask(&bed, wanted(vec![table("customer", true, &[])]));
    until("the roles can log in again", async || {
        run("SELECT count(*) FROM customer").await.is_ok()
    })
    .await;
}

/// Its own work never waits for a standby, or a store whose standbys are away could never be made ready.
#[tokio::test]
async fn nothing_of_it_waits_for_a_standby() {
    let bed = Bed::new(3, "Required").only_first();
    let primary = bed.start(1);
    bed.until_ready(1).await;
    let waits = bed::commit(&primary, "CREATE TABLE customer (id text)");
    bed::until_waiting(&primary, 1).await;
    ask(&bed, wanted(Vec::new()));
    until_ledger(&primary).await;
    let observer = role(WORKFLOW, Role::Observer);
    let at = conninfo(
        &bed,
        &primary,
        &database(WORKFLOW),
        &observer,
        Some(&observer),
    );
    until("the observer counts", async || {
        psql(&at, "SELECT observer.counts()->>'empty'")
            .await
            .as_deref()
            == Ok("true")
    })
    .await;
    assert!(!waits.is_finished());
    waits.abort();
}

/// Names and grants are data: whatever is in a table's name, nothing else is touched.
#[tokio::test]
async fn names_are_taken_literally() {
    let bed = Bed::new(1, "Preferred");
    let node = bed.start(1);
    bed.until_ready(1).await;
    node.app_sql("CREATE TABLE customer (id text); CREATE TABLE \"Or$ders\" (\"Na$me\" text)")
        .await
        .unwrap();
    ask(
        &bed,
        wanted(vec![
            table("Or$ders", false, &["Na$me"]),
            table("customer\"; DROP TABLE customer; --", true, &[]),
        ]),
    );
    bed.until_message(1, "isn't there").await;
    let worker = role(WORKFLOW, Role::Worker);
    let at = conninfo(&bed, &node, "app", &worker, Some(&worker));
    let update = psql(&at, "UPDATE \"Or$ders\" SET \"Na$me\" = NULL").await;
    update.unwrap();
    assert_eq!(
        node.app_sql("SELECT count(*) FROM customer")
            .await
            .as_deref(),
        Ok("0")
    );
}
