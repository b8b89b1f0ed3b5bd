//! What is particular to PostgreSQL.

use std::path::Path;
use std::time::{Duration, Instant};

use domicile::rights::connectors::{Connector, Failure, Limits, Presence, Reason, connect_within};
use domicile::rights::model::{Evidence, Identifiers};
use nix::sys::signal::Signal;

use crate::instance_bed::until;
use crate::postgres::{PORT, Postgres, Quiet, Server, rule, rules, target};
use crate::redis::write_url;
use crate::suite::{LIMITS, World, erase, erased, identifiers, person, probe, proven};

const WORKER: &str = "\"rights-w-worker\"";

/// A database with tables of its own, and a connector by these rules.
async fn world(schema: &str) -> Postgres {
    let world = Postgres::bare().await;
    world.server.sql(schema).await;
    world
}

fn id(value: &str) -> Identifiers {
    identifiers(&[("id", value)])
}

/// Both must fail in the same way.
async fn refused(c: &dyn Connector, who: &Identifiers) -> Failure {
    let who = std::slice::from_ref(who);
    let failure = erase(c, who).await.expect_err("erasing is refused");
    let probed = probe(c, who, &[]).await.expect_err("probing is refused");
    assert_eq!(failure, probed);
    failure
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_cant_be_seen_whole_is_refused() {
    let w = world(&format!(
        "CREATE TABLE hidden (id bigint); ALTER TABLE hidden ENABLE ROW LEVEL SECURITY; \
         CREATE TABLE blind (id bigint); CREATE TABLE kept (id bigint); \
         CREATE TABLE base (id bigint); CREATE VIEW seen AS SELECT * FROM base; \
         CREATE TABLE photos (id bytea); CREATE TABLE must (id bigint, name text NOT NULL); \
         CREATE SCHEMA closed; CREATE TABLE closed.t (id bigint); \
         GRANT ALL ON hidden, base, seen, photos, must, closed.t TO {WORKER}; \
         GRANT DELETE ON blind TO {WORKER}; GRANT SELECT ON kept TO {WORKER}"
    ))
    .await;
    for (rule, reason, words) in [
        (
            rule("hidden", "id", "id", &[]),
            Reason::Refused,
            "BYPASSRLS",
        ),
        (
            rule("blind", "id", "id", &[]),
            Reason::Refused,
            "GRANT SELECT",
        ),
        (
            rule("kept", "id", "id", &[]),
            Reason::Refused,
            "GRANT DELETE",
        ),
        (
            rule("seen", "id", "id", &[]),
            Reason::Refused,
            "seen is a view",
        ),
        (rule("photos", "id", "id", &[]), Reason::Refused, "bytea"),
        (
            rule("must", "id", "id", &["name"]),
            Reason::Refused,
            "NOT NULL",
        ),
        (
            rule("closed.t", "id", "id", &[]),
            Reason::Refused,
            "GRANT USAGE",
        ),
        (
            rule("nothing", "id", "id", &[]),
            Reason::Missing,
            "no table nothing in schema public",
        ),
        (
            rule("Base", "id", "id", &[]),
            Reason::Missing,
            "no table Base",
        ),
        (
            rule("base", "Id", "id", &[]),
            Reason::Missing,
            "no column Id",
        ),
        (
            rule("nowhere.base", "id", "id", &[]),
            Reason::Missing,
            "schema nowhere",
        ),
    ] {
        let failure = refused(&*w.by(vec![rule]), &id("7")).await;
        assert_eq!(failure.reason, reason, "{failure}");
        assert!(failure.detail.contains(words), "{failure}");
    }
    w.server
        .sql(&format!(
            "ALTER ROLE {WORKER} BYPASSRLS; INSERT INTO hidden VALUES (7)"
        ))
        .await;
    let evidence = erased(&*w.by(vec![rule("hidden", "id", "id", &[])]), &[id("7")]).await;
    assert_eq!(evidence[0].0["rows"]["hidden"], 1);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_value_is_of_the_columns_type_or_matches_nothing() {
    let w = world(&format!(
        "CREATE EXTENSION IF NOT EXISTS citext; CREATE DOMAIN number AS integer; \
         CREATE TABLE ints (id int); INSERT INTO ints VALUES (12), (0); \
         CREATE TABLE smalls (id smallint); INSERT INTO smalls VALUES (12), (0); \
         CREATE TABLE numbers (id numeric); INSERT INTO numbers VALUES (12), (0); \
         CREATE TABLE domains (id number); INSERT INTO domains VALUES (12), (0); \
         CREATE TABLE uuids (id uuid); INSERT INTO uuids VALUES ('550e8400-e29b-41d4-a716-446655440000'); \
         CREATE TABLE texts (id text COLLATE \"C\"); INSERT INTO texts VALUES ('12'), ('012'), (' 12'), ('Ab'); \
         CREATE TABLE shorts (id varchar(2)); INSERT INTO shorts VALUES ('12'); \
         CREATE TABLE padded (id char(5)); INSERT INTO padded VALUES ('12'); \
         CREATE TABLE cases (id citext); INSERT INTO cases VALUES ('12'), ('Ab'); \
         GRANT SELECT, DELETE ON ALL TABLES IN SCHEMA public TO {WORKER}"
    ))
    .await;
    let tables = [
        "ints", "smalls", "numbers", "domains", "uuids", "texts", "shorts", "padded", "cases",
    ];
    let c = w.by(tables.iter().map(|t| rule(t, "id", "id", &[])).collect());
    let before = w.everything().await;
    // None of these is anybody's here.
    for nobody in [
        "+12",
        "12 ",
        "120",
        "99999999999999999999999999",
        "1\x002",
        "12\0",
        "12.50",
        "-0",
        "ab ",
        "'12'",
    ] {
        let evidence = erased(&*c, &[id(nobody)]).await;
        assert_eq!(
            Postgres::removed(&evidence[0]),
            0,
            "{nobody:?}: {evidence:?}"
        );
        assert_eq!(w.everything().await, before, "{nobody:?}");
        let cant = evidence[0].0.get("cannotHold").and_then(|c| c.as_array());
        let says = cant.is_some_and(|c| c.iter().any(|t| t == "ints"));
        assert_eq!(says, nobody != "120", "{nobody:?}");
        proven(&*c, &[id(nobody)], &evidence).await;
    }
    let rows = |evidence: &Evidence| -> Vec<String> {
        let rows = evidence.0["rows"].as_object().unwrap();
        let some = rows.iter().filter(|(_, n)| n.as_u64() != Some(0));
        some.map(|(t, n)| format!("{t} {n}")).collect()
    };
    // All in one batch: each takes its own.
    let people = [
        id("012"),
        id(" 12"),
        id("550E8400-E29B-41D4-A716-446655440000"),
        id("aB"),
        id("12"),
    ];
    let evidence = erased(&*c, &people).await;
    assert_eq!(rows(&evidence[0]), ["texts 1"]);
    assert_eq!(rows(&evidence[1]), ["texts 1"]);
    assert_eq!(rows(&evidence[2]), ["uuids 1"]);
    assert_eq!(rows(&evidence[3]), ["cases 1"]);
    let twelve = [
        "cases 1",
        "domains 1",
        "ints 1",
        "numbers 1",
        "padded 1",
        "shorts 1",
        "smalls 1",
        "texts 1",
    ];
    assert_eq!(rows(&evidence[4]), twelve);
    proven(&*c, &people, &evidence).await;
    assert_eq!(w.everything().await.len(), 5, "{:?}", w.everything().await);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_column_must_match_and_an_index_is_used() {
    let w = world(&format!(
        "CREATE TABLE t (tenant text, id int, PRIMARY KEY (tenant, id)); \
         INSERT INTO t SELECT x, n FROM generate_series(1, 20000) AS n, unnest('{{a,b}}'::text[]) AS x; ANALYZE t; \
         GRANT SELECT, DELETE ON t TO {WORKER}"
    ))
    .await;
    let mut both = rule("t", "id", "id", &[]);
    both.columns.insert("tenant".into(), "tenant".into());
    let c = w.by(vec![both]);
    let people: Vec<_> = (1..=50)
        .map(|n| identifiers(&[("id", &n.to_string()), ("tenant", "a")]))
        .collect();
    // Backends tell their statistics at their end at the latest.
    let alone = async || {
        let others = "SELECT count(*) FROM pg_stat_activity WHERE backend_type = 'client backend'";
        until("nobody else is connected", async || {
            w.server.value(others).await == "1"
        })
        .await;
    };
    let scans = async |kind: &str| -> i64 {
        let sql = format!("SELECT {kind} FROM pg_stat_user_tables WHERE relname = 't'");
        w.server.value(&sql).await.parse().unwrap()
    };
    alone().await;
    let before = (scans("seq_scan").await, scans("idx_scan").await);
    let evidence = erased(&*c, &people).await;
    assert!(evidence.iter().all(|e| e.0["rows"]["t"] == 1));
    proven(&*c, &people, &evidence).await;
    drop(c);
    alone().await;
    assert_eq!(
        scans("seq_scan").await,
        before.0,
        "the table was read whole"
    );
    assert!(scans("idx_scan").await >= before.1 + 2);
    assert_eq!(w.server.value("SELECT count(*) FROM t").await, "39950");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn circles_of_foreign_keys() {
    let w = world(&format!(
        "CREATE TABLE a (id int PRIMARY KEY, other int); CREATE TABLE b (id int PRIMARY KEY, other int REFERENCES a); \
         ALTER TABLE a ADD CONSTRAINT a_b FOREIGN KEY (other) REFERENCES b; \
         CREATE TABLE self (id int PRIMARY KEY, boss int REFERENCES self); \
         INSERT INTO self VALUES (1, 1), (2, 1); \
         INSERT INTO a VALUES (1, NULL); INSERT INTO b VALUES (1, 1); UPDATE a SET other = 1; \
         GRANT ALL ON ALL TABLES IN SCHEMA public TO {WORKER}"
    ))
    .await;
    let c = w.by(vec![rule("a", "id", "id", &[]), rule("b", "id", "id", &[])]);
    let failure = refused(&*c, &id("1")).await;
    assert_eq!(failure.reason, Reason::Refused);
    assert!(
        failure
            .detail
            .contains("foreign keys of a, b go in a circle"),
        "{failure}"
    );
    w.server
        .sql("ALTER TABLE a ALTER CONSTRAINT a_b DEFERRABLE")
        .await;
    let evidence = erased(&*c, &[id("1")]).await;
    assert_eq!(Postgres::removed(&evidence[0]), 2);
    proven(&*c, &[id("1")], &evidence).await;
    // Somebody else's row refers to the person's own.
    let c = w.by(vec![rule("self", "id", "id", &[])]);
    let answers = erase(&*c, &[id("1"), id("3")]).await.unwrap();
    let failure = answers[0].as_ref().unwrap_err();
    assert!(
        failure.reason == Reason::Refused && failure.detail.contains("public.self"),
        "{failure}"
    );
    assert!(answers[1].is_ok());
    let evidence = erased(&*c, &[id("1"), id("2")]).await;
    assert_eq!(evidence.iter().map(Postgres::removed).sum::<u64>(), 2);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_unlisted_table_that_refers_is_named() {
    let w = Postgres::new().await;
    let people = [person(1)];
    w.plant(&people[0]).await;
    w.poison(&people[0]).await;
    let before = w.everything().await;
    let answers = erase(&*w.connector(), &people).await.unwrap();
    let failure = answers[0].as_ref().unwrap_err();
    assert_eq!(failure.reason, Reason::Refused);
    assert!(
        failure.detail.contains("rows of shop.disputes still refer"),
        "{failure}"
    );
    assert_eq!(w.everything().await, before, "all or nothing");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_turns_a_delete_into_nothing_is_caught() {
    let w = world(&format!(
        "CREATE TABLE t (id int); INSERT INTO t VALUES (1); \
         CREATE FUNCTION keep() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN RETURN NULL; END'; \
         CREATE TRIGGER keep BEFORE DELETE ON t FOR EACH ROW EXECUTE FUNCTION keep(); \
         CREATE TABLE r (id int); INSERT INTO r VALUES (1); \
         CREATE RULE keep AS ON DELETE TO r DO INSTEAD NOTHING; \
         GRANT SELECT, DELETE ON t, r TO {WORKER}"
    ))
    .await;
    let c = w.by(vec![rule("t", "id", "id", &[])]);
    let evidence = erased(&*c, &[id("1")]).await;
    assert_eq!(
        probe(&*c, &[id("1")], &evidence).await.unwrap(),
        [Ok(Presence::StillThere)]
    );
    let c = w.by(vec![rule("r", "id", "id", &[])]);
    assert_eq!(
        erase(&*c, &[id("1")]).await.unwrap_err().reason,
        Reason::Refused
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn triggers_find_their_own_search_path() {
    let w = world(&format!(
        "CREATE SCHEMA app; CREATE TABLE app.t (id int); CREATE TABLE app.audit (n int); INSERT INTO app.t VALUES (1); \
         ALTER ROLE {WORKER} SET search_path = app; \
         CREATE FUNCTION app.note() RETURNS trigger LANGUAGE plpgsql AS \
           'BEGIN INSERT INTO audit VALUES (1); RETURN OLD; END'; \
         CREATE TRIGGER note AFTER DELETE ON app.t FOR EACH ROW EXECUTE FUNCTION app.note(); \
         GRANT USAGE ON SCHEMA app TO {WORKER}; GRANT SELECT, DELETE ON app.t TO {WORKER}; \
         GRANT INSERT ON app.audit TO {WORKER}"
    ))
    .await;
    erased(&*w.by(vec![rule("app.t", "id", "id", &[])]), &[id("1")]).await;
    assert_eq!(w.server.value("SELECT count(*) FROM app.audit").await, "1");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_locked_row_holds_up_only_its_person() {
    let w = Postgres::new().await;
    let people: Vec<_> = (0..16).map(person).collect();
    for one in &people {
        w.plant(one).await;
    }
    let mut admin = w.server.admin().await;
    let lock = admin.transaction().await.unwrap();
    let sql = "SELECT FROM shop.customers WHERE email = $1 FOR UPDATE";
    lock.query(sql, &[&Quiet(people[5].0["email"].clone())])
        .await
        .unwrap();
    // A machine that is busy with other tests shall not look like a lock.
    let limits = Limits {
        answer: Duration::from_secs(30),
        halving: Duration::from_secs(30),
        ..LIMITS
    };
    let database = w.database(&[&w.server.address]);
    let c = w.of(&target("app", Some(database), rules()), limits);
    let begun = Instant::now();
    let answers = erase(&*c, &people).await.unwrap();
    assert!(begun.elapsed() < limits.halving, "{:?}", begun.elapsed());
    for (n, answer) in answers.iter().enumerate() {
        match answer {
            Ok(_) => assert_ne!(n, 5),
            Err(failure) => assert_eq!((n, failure.reason), (5, Reason::Locked)),
        }
    }
    lock.rollback().await.unwrap();
    let evidence = erased(&*c, &people).await;
    proven(&*c, &people, &evidence).await;
    // A table that is locked as a whole costs everybody, but not for long.
    let lock = admin.transaction().await.unwrap();
    lock.batch_execute("LOCK TABLE shop.customers")
        .await
        .unwrap();
    let begun = Instant::now();
    let answers = erase(&*c, &people).await.unwrap();
    assert!(
        answers
            .iter()
            .all(|a| a.as_ref().is_err_and(|f| f.reason == Reason::Locked))
    );
    assert!(
        begun.elapsed() < limits.halving + limits.answer,
        "{:?}",
        begun.elapsed()
    );
    assert_eq!(
        probe(&*c, &people, &[]).await.unwrap_err().reason,
        Reason::Locked
    );
}

/// Makes the standby one that commits wait for.
async fn synchronous(w: &Postgres) {
    w.server
        .sql("ALTER SYSTEM SET synchronous_standby_names = '*'")
        .await;
    w.server.sql("SELECT pg_reload_conf()").await;
    until("the standby is synchronous", async || {
        w.server
            .value("SELECT count(*) FROM pg_stat_replication WHERE sync_state = 'sync'")
            .await
            == "1"
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn standbys_that_are_away_are_said() {
    let w = Postgres::new().await;
    let standby = Server::standby(&w.server, &w.authority).await;
    synchronous(&w).await;
    let people = [person(1), person(2), person(3)];
    for one in &people {
        w.plant(one).await;
    }
    // The standby comes first, and isn't the primary.
    let database = w.database(&[&standby.address, &w.server.address]);
    let c = w.of(&target("app", Some(database), rules()), LIMITS);
    let one = &people[..1];
    let evidence = erased(&*c, one).await;
    // The commit waited until the standby shows it.
    let shown = standby.value("SELECT count(*) FROM shop.customers").await;
    assert_eq!(shown, "2");
    let seen = probe(&*c, one, &evidence).await.unwrap();
    let Ok(Presence::Absent {
        evidence: proof,
        bounded: None,
    }) = &seen[0]
    else {
        panic!("{seen:?}")
    };
    assert_eq!(proof.0["standbys"]["showIt"], 1);
    assert_eq!(proof.0["standbys"]["awayOrBehind"], 0);

    // Nobody is asked for acknowledgement, and the standby's replay stands still.
    w.server
        .sql("ALTER SYSTEM RESET synchronous_standby_names")
        .await;
    w.server.sql("SELECT pg_reload_conf()").await;
    until("nobody is synchronous", async || {
        w.server
            .value("SELECT count(*) FROM pg_stat_replication WHERE sync_state = 'sync'")
            .await
            == "0"
    })
    .await;
    standby.value("SELECT pg_wal_replay_pause()").await;
    let two = &people[1..2];
    let evidence = erased(&*c, two).await;
    let seen = probe(&*c, two, &evidence).await.unwrap();
    let Ok(Presence::Absent {
        evidence: proof,
        bounded: Some(until_then),
    }) = &seen[0]
    else {
        panic!("{seen:?}")
    };
    assert_eq!(proof.0["standbys"]["awayOrBehind"], 1);
    assert!(*until_then > jiff::Timestamp::now());

    // It is away.
    standby.stop();
    until("it is gone", async || {
        w.server
            .value("SELECT count(*) FROM pg_stat_replication")
            .await
            == "0"
    })
    .await;
    let three = &people[2..];
    let evidence = erased(&*c, three).await;
    let seen = probe(&*c, three, &evidence).await.unwrap();
    assert!(
        matches!(
            &seen[0],
            Ok(Presence::Absent {
                bounded: Some(_),
                ..
            })
        ),
        "{seen:?}"
    );

    // It is back.
    standby.run().await;
    until("the standby shows it", async || {
        let seen = probe(&*c, three, &evidence).await.unwrap();
        matches!(&seen[0], Ok(Presence::Absent { bounded: None, .. }))
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nothing_is_erased_before_the_quorum_has_it() {
    let w = Postgres::new().await;
    let standby = Server::standby(&w.server, &w.authority).await;
    let people = [person(1)];
    w.plant(&people[0]).await;
    synchronous(&w).await;
    let c = w.connector();
    standby.signal(Signal::SIGSTOP);
    let waiting =
        "SELECT count(pg_cancel_backend(pid)) FROM pg_stat_activity WHERE wait_event = 'SyncRep'";
    let cancelled = async || w.server.value(waiting).await != "0";
    assert_eq!(
        erase(&*c, &people).await.unwrap_err().reason,
        Reason::Timeout
    );
    // Somebody cancels the wait: PostgreSQL calls it a success. The rows are gone, here; a failover would bring them
    // back. So the next erasure, which finds nothing, must wait for the standby all the same.
    until("a commit waits", cancelled).await;
    until("the rows are gone", async || w.left(&people[0]).await == 0).await;
    assert_eq!(
        erase(&*c, &people).await.unwrap_err().reason,
        Reason::Timeout
    );
    until("a commit waits", cancelled).await;
    // And if it is cancelled while we listen, that is no success either.
    let (answer, ()) = tokio::join!(erase(&*c, &people), until("a commit waits", cancelled));
    let failure = answer.unwrap_err();
    assert_eq!(failure.reason, Reason::Timeout);
    assert!(failure.detail.contains("cancelled"), "{failure}");
    standby.signal(Signal::SIGCONT);
    let evidence = erased(&*c, &people).await;
    proven(&*c, &people, &evidence).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn another_system_proves_nothing() {
    let (one, same, other) = tokio::join!(Postgres::new(), Postgres::new(), Postgres::alien());
    let people = [person(1)];
    let evidence = erased(&*one.connector(), &people).await;
    // Neither is behind the erasure.
    for w in [&same, &other] {
        for _ in 0..3 {
            w.server.value("SELECT pg_switch_wal()").await;
            w.server.sql("CREATE TABLE more (); DROP TABLE more").await;
        }
    }
    proven(&*same.connector(), &people, &evidence).await;
    let seen = probe(&*other.connector(), &people, &evidence)
        .await
        .unwrap();
    let failure = seen[0].as_ref().unwrap_err();
    assert_eq!(failure.reason, Reason::Protocol);
    assert!(
        failure.detail.contains("another database system"),
        "{failure}"
    );
}

/// The same system as it was before: restored from a backup, say.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_system_from_before_the_erasure_proves_nothing() {
    let (one, before) = tokio::join!(Postgres::new(), Postgres::new());
    let people = [person(1)];
    for _ in 0..3 {
        one.server.value("SELECT pg_switch_wal()").await;
        one.server
            .sql("CREATE TABLE more (); DROP TABLE more")
            .await;
    }
    let evidence = erased(&*one.connector(), &people).await;
    let seen = probe(&*before.connector(), &people, &evidence)
        .await
        .unwrap();
    let failure = seen[0].as_ref().unwrap_err();
    assert_eq!(failure.reason, Reason::Protocol);
    assert!(failure.detail.contains("is behind"), "{failure}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_database_by_url() {
    let w = Postgres::new().await;
    let roles = "CREATE ROLE tls LOGIN PASSWORD 'p@ss'; CREATE ROLE plain LOGIN PASSWORD 'p@ss'";
    w.server.sql(roles).await;
    w.server
        .sql(&SCHEMA_GRANTS.replace("ROLE", "tls, plain"))
        .await;
    let people = [person(1), person(2)];
    for one in &people {
        w.plant(one).await;
    }
    let dir = tempfile::Builder::new().prefix("dom").tempdir().unwrap();
    let target = target("shop", None, rules());
    let connector =
        || connect_within(&target, Path::new("/"), dir.path(), "unused", LIMITS).unwrap();
    let at = format!("{}:{PORT}/app", w.server.address);
    let tls = format!("postgresql://tls:p%40ss@{at}");
    write_url(dir.path(), "shop", &format!("{tls}?sslmode=disable"));
    let failure = erase(&*connector(), &people).await.unwrap_err();
    assert_eq!(failure.reason, Reason::Credentials, "{failure}");
    // The test's authority is no public one.
    write_url(dir.path(), "shop", &format!("{tls}?sslmode=require"));
    let failure = erase(&*connector(), &people).await.unwrap_err();
    assert_eq!(failure.reason, Reason::Credentials, "{failure}");
    std::fs::copy(w.tls.path().join("ca.crt"), dir.path().join("shop/ca.crt")).unwrap();
    for url in [&tls, &format!("{tls}?sslmode=verify-full")] {
        write_url(dir.path(), "shop", url);
        let c = connector();
        let evidence = erased(&*c, &people[..1]).await;
        let seen = probe(&*c, &people[..1], &evidence).await.unwrap();
        let Ok(Presence::Absent {
            evidence: proof,
            bounded: None,
        }) = &seen[0]
        else {
            panic!("{seen:?}")
        };
        assert!(proof.0["standbys"].is_string());
    }
    // In another name than its own.
    write_url(
        dir.path(),
        "shop",
        &tls.replace(&w.server.address, "localhost")
            .replace("localhost:", "localhost.localdomain:"),
    );
    let failure = erase(&*connector(), &people).await.unwrap_err();
    assert!(
        matches!(failure.reason, Reason::Credentials | Reason::Unreachable),
        "{failure}"
    );
    write_url(dir.path(), "shop", &tls.replace("p%40ss", "geheim"));
    let failure = erase(&*connector(), &people).await.unwrap_err();
    assert_eq!(failure.reason, Reason::Credentials, "{failure}");
    assert!(!failure.detail.contains("geheim"), "{failure}");
    write_url(dir.path(), "shop", &tls.replace("/app", "/nothing"));
    assert_eq!(
        erase(&*connector(), &people).await.unwrap_err().reason,
        Reason::Missing
    );
    write_url(
        dir.path(),
        "shop",
        &format!("postgresql://plain:p%40ss@{at}?sslmode=disable"),
    );
    let c = connector();
    let evidence = erased(&*c, &people[1..]).await;
    proven(&*c, &people[1..], &evidence).await;
}

const SCHEMA_GRANTS: &str = "GRANT USAGE ON SCHEMA shop TO ROLE; \
    GRANT SELECT, DELETE ON shop.customers, shop.orders, shop.items, shop.messages, shop.newsletters, \
    public.\"Profiles\" TO ROLE; GRANT SELECT, UPDATE (customer_id, name, address) ON shop.invoices TO ROLE";

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_frozen_host_doesnt_hold_up_the_primary() {
    let w = Postgres::new().await;
    let standby = Server::standby(&w.server, &w.authority).await;
    standby.signal(Signal::SIGSTOP);
    let people = [person(1)];
    w.plant(&people[0]).await;
    let database = w.database(&[&standby.address, &w.server.address]);
    let c = w.of(&target("app", Some(database), rules()), LIMITS);
    let begun = Instant::now();
    erased(&*c, &people).await;
    assert!(
        begun.elapsed() < Duration::from_secs(3),
        "{:?}",
        begun.elapsed()
    );
}
