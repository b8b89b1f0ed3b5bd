//! How the schema comes to be, and what it makes impossible.

use domicile::api::names::rights::{Role, database};
use domicile::rights::ledger::migrate::KNOWN;
use domicile::rights::ledger::{LedgerError, Migrated, migrate, roles};

use crate::ledger_bed::*;
use crate::{HERE, absent, bounded, claim};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn four_that_migrate_at_once_make_one_schema() {
    bounded(async {
        let bed = Bed::start(&[]).await;
        let root = bed.superuser("postgres").await;
        roles::prepare(&root, "w").await.unwrap();
        let mut tasks = Vec::new();
        for _ in 0..4 {
            let mut session = bed.superuser(&database("w")).await;
            tasks.push(tokio::spawn(async move {
                migrate(&mut session.client, "w").await
            }));
        }
        let mut from_nothing = 0;
        for task in tasks {
            match task.await.unwrap().unwrap() {
                Migrated::From(0) => from_nothing += 1,
                Migrated::From(_) | Migrated::Current => {}
                other => panic!("{other:?}"),
            }
        }
        assert!(from_nothing >= 1);
        let mut session = bed.superuser(&database("w")).await;
        let rows = session
            .query("SELECT version FROM ledger.schema_version ORDER BY 1", &[])
            .await
            .unwrap();
        let versions: Vec<i32> = rows.iter().map(|r| r.get(0)).collect();
        assert_eq!(versions, (1..=KNOWN).collect::<Vec<_>>());
        assert_eq!(
            migrate(&mut session.client, "w").await.unwrap(),
            Migrated::Current
        );
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_newer_schema_is_gone_on_with_only_if_it_says_so() {
    bounded(async {
        let bed = Bed::start(&[]).await;
        let mut root = bed.workflow("w").await;
        let newer = KNOWN + 3;
        root.batch_execute(&format!(
            "INSERT INTO ledger.schema_version (version, name, compatible_since) VALUES ({newer}, 'later', {KNOWN})"
        ))
        .await
        .unwrap();
        assert_eq!(
            migrate(&mut root.client, "w").await.unwrap(),
            Migrated::Newer(newer)
        );
        let observer = bed.ledger("w", Role::Observer);
        assert!(observer.counts().await.is_ok());

        root.batch_execute(&format!(
            "UPDATE ledger.schema_version SET compatible_since = {newer} WHERE version = {newer}"
        ))
        .await
        .unwrap();
        let words = migrate(&mut root.client, "w").await.unwrap_err().to_string();
        assert!(words.contains("too old"), "{words}");
        let refused = bed.ledger("w", Role::Observer).counts().await.unwrap_err();
        assert!(refused.to_string().contains("upgrade this program"), "{refused}");

        // And a program that is newer than the schema waits for it.
        root.batch_execute(&format!(
            "DELETE FROM ledger.schema_version WHERE version >= {KNOWN}"
        ))
        .await
        .unwrap();
        let waits = bed.ledger("w", Role::Observer).counts().await.unwrap_err();
        assert!(
            matches!(waits, LedgerError::Unavailable(why) if why.contains("older than this program")),
            "{waits}"
        );
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_ledger_that_is_not_made_yet_is_unavailable_and_not_an_error_for_ever() {
    bounded(async {
        let bed = Bed::start(&[]).await;
        // Certificates are there, the database isn't.
        let worker = "rights-w-worker";
        bed.authority.issue(&bed.path(worker), worker);
        let ledger = bed.ledger("w", Role::Worker);
        let early = ledger.claim("t", HERE, "w", 1, crate::LEASE).await;
        assert!(
            matches!(early, Err(LedgerError::Unavailable(_))),
            "{early:?}"
        );
        bed.workflow("w").await;
        assert_eq!(claim(&ledger, "t", 1).await, []);
    })
    .await;
}

/// Not even the owner can write these: what a bug in a function would otherwise make true.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn false_states_are_impossible() {
    bounded(async {
        let bed = Bed::start(&[]).await;
        let root = bed.workflow("w").await;
        let (_dir, keyring) = keys();
        let (gateway, worker) = (bed.ledger("w", Role::Gateway), bed.ledger("w", Role::Worker));
        let targets = [target("a", &[HERE]), target("b", &[HERE])];
        let one = sealed(&keyring, &filing("a@example.org"), 30);
        let two = sealed(&keyring, &filing("b@example.org"), 31);
        gateway.file(&[one.clone(), two], &targets).await.unwrap();
        // The first is closed but for one step, the second has a step that is leased.
        let a = claim(&worker, "a", 2).await;
        worker.finish(&[absent(&a[0])]).await.unwrap();
        let impossible = async |what: &str, sql: &str| {
            let e = root.batch_execute(sql).await.expect_err(what);
            let code = e.code().unwrap().code().to_owned();
            assert!(["23514", "23503", "23502"].contains(&code.as_str()), "{what}: {code}");
        };
        impossible(
            "a request ends over a step that is left",
            "DELETE FROM ledger.request",
        )
        .await;
        impossible(
            "a step is done without an outcome",
            "UPDATE ledger.step SET state = 'done', lease = NULL, worker = NULL, due_at = NULL, finished_at = now(), \
             evidence = '{\"a\": 1}' WHERE state = 'leased'",
        )
        .await;
        for evidence in ["NULL", "'{}'", "'[1]'"] {
            impossible(
                "a step is done without evidence",
                &format!(
                    "UPDATE ledger.step SET state = 'done', lease = NULL, worker = NULL, due_at = NULL, \
                     finished_at = now(), outcome = 'absent', evidence = {evidence} WHERE state = 'leased'"
                ),
            )
            .await;
        }
        impossible(
            "bounded, by no time",
            "UPDATE ledger.step SET outcome = 'bounded' WHERE state = 'done'",
        )
        .await;
        impossible(
            "excepted, by no law",
            "UPDATE ledger.step SET outcome = 'excepted' WHERE state = 'done'",
        )
        .await;
        impossible(
            "an outcome that isn't one",
            "UPDATE ledger.step SET outcome = 'skipped' WHERE state = 'done'",
        )
        .await;
        impossible(
            "leased by nobody",
            "UPDATE ledger.step SET lease = NULL WHERE state = 'leased'",
        )
        .await;
        impossible(
            "an open request without its key",
            "UPDATE ledger.request SET wrapped_key = NULL",
        )
        .await;
        impossible(
            "an extension that shortens",
            "UPDATE ledger.request SET extended_to = answer_by - interval '1 day', extension_reason = 'x'",
        )
        .await;
        let closed = "INSERT INTO ledger.closed (id, kind, regimes, channel, state, received_at, filed_at, answer_by, \
             subject, content, steps) \
             SELECT gen_random_uuid(), kind, regimes, channel, STATE, received_at, filed_at, answer_by, subject, \
             content, STEPS FROM ledger.request LIMIT 1";
        let steps = [
            "'[]'",
            "'{}'",
            "'[{\"target\": \"a\", \"state\": \"ready\"}]'",
            "'[{\"outcome\": {\"outcome\": \"absent\"}}]'",
            "'[{\"outcome\": {\"outcome\": \"absent\"}, \"evidence\": {}}]'",
            "'[{\"outcome\": {\"outcome\": \"absent\"}, \"evidence\": {\"a\": 1}}, {\"target\": \"b\"}]'",
        ];
        for steps in steps {
            impossible(
                "closed without proof of every step",
                &closed.replace("STATE,", "'closed',").replace("STEPS", steps),
            )
            .await;
        }
        impossible(
            "withdrawn although something is done",
            &closed.replace("STATE,", "'withdrawn',").replace(
                "STEPS",
                "'[{\"outcome\": {\"outcome\": \"absent\"}, \"evidence\": {\"a\": 1}}]'",
            ),
        )
        .await;
        // And there is no column that a closed request's key or identifiers could be in.
        let columns: i64 = root
            .query_one(
                "SELECT count(*) FROM pg_attribute WHERE attrelid = 'ledger.closed'::regclass \
                 AND attname IN ('wrapped_key', 'sealed', 'names', 'hashes', 'epoch')",
                &[],
            )
            .await
            .unwrap()
            .get(0);
        assert_eq!(columns, 0);
    })
    .await;
}
