//! Each role does its own, and nothing else.

use domicile::api::names::rights::{Role, database, owner, role};
use domicile::rights::ledger::LedgerError;
use tokio_postgres::Client;

use crate::bounded;
use crate::instance_bed::Authority;
use crate::ledger_bed::*;

const ROLES: [(Role, &str); 3] = [
    (Role::Gateway, "gateway"),
    (Role::Worker, "worker"),
    (Role::Observer, "observer"),
];

async fn code(client: &Client, sql: &str) -> String {
    match client.simple_query(sql).await {
        Ok(_) => "done".to_owned(),
        Err(e) => e.code().unwrap().code().to_owned(),
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_role_can_call_its_own_functions_and_touch_nothing_else() {
    bounded(async {
        let bed = Bed::start(&[]).await;
        let root = bed.workflow("con-sumers").await;
        bed.workflow("other").await;
        let text = async |sql: &str| -> Vec<String> {
            let rows = root.query(sql, &[]).await.unwrap();
            rows.iter().map(|r| r.get(0)).collect()
        };
        let tables = text(
            "SELECT c.oid::regclass::text FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace \
             WHERE relkind IN ('r', 'v', 'm', 'p') AND nspname NOT IN ('pg_catalog', 'information_schema', 'pg_toast')",
        )
        .await;
        assert_eq!(tables.len(), 6, "{tables:?}");
        let functions = text(
            "SELECT p.oid::regprocedure::text FROM pg_proc p JOIN pg_namespace n ON n.oid = p.pronamespace \
             WHERE nspname NOT IN ('pg_catalog', 'information_schema')",
        )
        .await;
        assert!(functions.len() >= 15, "{functions:?}");
        // All of it is the owner's, as whom nobody logs in.
        let strangers = text(
            "SELECT relname::text FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace \
             WHERE nspname IN ('ledger', 'gateway', 'worker', 'observer', 'shared') \
             AND pg_get_userbyid(relowner) <> 'rights-con-sumers-owner' \
             UNION ALL SELECT proname::text FROM pg_proc p JOIN pg_namespace n ON n.oid = p.pronamespace \
             WHERE nspname IN ('ledger', 'gateway', 'worker', 'observer', 'shared') \
             AND (pg_get_userbyid(proowner) <> 'rights-con-sumers-owner' \
                  OR NOT EXISTS (SELECT FROM unnest(proconfig) c WHERE c LIKE 'search_path=pg_catalog, pg_temp'))",
        )
        .await;
        assert_eq!(strangers, Vec::<String>::new());

        for (who, schema) in ROLES {
            let name = role("con-sumers", who);
            let me = bed
                .connect(&database("con-sumers"), &name, &name)
                .await
                .unwrap();
            for table in &tables {
                for sql in [
                    format!("SELECT count(*) FROM {table}"),
                    format!("SELECT FROM {table} FOR UPDATE"),
                    format!("DELETE FROM {table}"),
                    format!("TRUNCATE {table}"),
                    format!("INSERT INTO {table} DEFAULT VALUES"),
                    format!("COPY {table} TO STDOUT"),
                ] {
                    assert_eq!(code(&me, &sql).await, "42501", "{name}: {sql}");
                }
            }
            let may: Vec<String> = root
                .query(
                    "SELECT p.oid::regprocedure::text FROM pg_proc p JOIN pg_namespace n ON n.oid = p.pronamespace \
                     WHERE nspname NOT IN ('pg_catalog', 'information_schema') \
                     AND has_function_privilege($1::text, p.oid, 'EXECUTE')",
                    &[&name],
                )
                .await
                .unwrap()
                .iter()
                .map(|r| r.get(0))
                .collect();
            // A gateway also counts.
            let mine = |sql: &str| {
                sql.contains(&format!("{schema}."))
                    || who == Role::Gateway && sql.contains("observer.")
            };
            let own: Vec<String> = functions
                .iter()
                .filter(|f| mine(f) || f.starts_with("shared."))
                .cloned()
                .collect();
            assert_eq!(sorted(may), sorted(own), "{name}");
            for sql in [
                "SELECT gateway.read('00000000-0000-7000-8000-000000000000')",
                "SELECT * FROM worker.claim('t', 'r', 'w', 1, 1)",
                "SELECT worker.forget(1, 1)",
                "SELECT observer.counts()",
            ] {
                let expected = if mine(sql) { "done" } else { "42501" };
                assert_eq!(code(&me, sql).await, expected, "{name}: {sql}");
            }
            for sql in [
                "SELECT ledger.end_requests('{}', 'closed')".to_owned(),
                "CREATE TABLE public.t ()".to_owned(),
                "CREATE TEMP TABLE t ()".to_owned(),
                "CREATE SCHEMA s".to_owned(),
                format!("SET ROLE \"{}\"", owner("con-sumers")),
                "ALTER FUNCTION gateway.read(uuid) SECURITY INVOKER".to_owned(),
                "SELECT pg_read_file('PG_VERSION')".to_owned(),
                "COPY (SELECT 1) TO PROGRAM 'true'".to_owned(),
            ] {
                assert_eq!(code(&me, &sql).await, "42501", "{name}: {sql}");
            }
            // Nor in another workflow's ledger.
            let other = bed.connect(&database("other"), &name, &name).await;
            assert_eq!(other.err().unwrap().code().unwrap().code(), "42501");
        }
        let nobody = bed
            .connect(
                &database("con-sumers"),
                &owner("con-sumers"),
                &role("con-sumers", Role::Gateway),
            )
            .await;
        assert!(nobody.is_err(), "and there is no password that one could try");
    })
    .await;
}

fn sorted(mut list: Vec<String>) -> Vec<String> {
    list.sort();
    list
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn one_is_a_role_by_its_certificate_and_by_nothing_else() {
    bounded(async {
        let bed = Bed::start(&[]).await;
        bed.workflow("w").await;
        let gateway = role("w", Role::Gateway);
        let db = database("w");
        assert!(bed.connect(&db, &gateway, &gateway).await.is_ok());
        // Another role's certificate, another authority's, and none.
        let worker = role("w", Role::Worker);
        let refused = bed.connect(&db, &gateway, &worker).await.err().unwrap();
        assert_eq!(refused.code().unwrap().code(), "28000");
        Authority::new().issue(&bed.path("foreign"), &gateway);
        assert!(bed.connect(&db, &gateway, "foreign").await.is_err());
        let password = format!(
            "host={} port={PORT} user={gateway} password=x dbname={db} sslmode=require",
            bed.address
        );
        let refused = crate::instance_bed::psql(&password, "SELECT 1")
            .await
            .unwrap_err();
        assert!(refused.contains("certificate"), "{refused}");
        let plain = password.replace("sslmode=require", "sslmode=disable");
        let refused = crate::instance_bed::psql(&plain, "SELECT 1")
            .await
            .unwrap_err();
        assert!(refused.contains("pg_hba.conf rejects"), "{refused}");
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_there_is_left_alone_and_what_a_role_should_not_have_is_taken() {
    bounded(async {
        let bed = Bed::start(&[]).await;
        bed.workflow("w").await;
        let root = bed.superuser("postgres").await;
        let xid = async || -> i64 {
            let row = root
                .query_one("SELECT pg_snapshot_xmax(pg_current_snapshot())::text::bigint", &[])
                .await
                .unwrap();
            row.get(0)
        };
        let before = xid().await;
        domicile::rights::ledger::roles::prepare(&root, "w")
            .await
            .unwrap();
        assert_eq!(xid().await, before, "quiet writes nothing");
        root.batch_execute(
            "ALTER ROLE \"rights-w-worker\" SUPERUSER PASSWORD 'x'; ALTER ROLE \"rights-w-owner\" LOGIN; \
             REVOKE domicile_rights FROM \"rights-w-worker\"",
        )
        .await
        .unwrap();
        bed.workflow("w").await;
        let row = root
            .query_one(
                "SELECT bool_or(rolsuper OR rolpassword IS NOT NULL), bool_or(rolcanlogin AND rolname LIKE '%owner'), \
                 bool_and(pg_has_role(oid, 'domicile_rights', 'member') OR rolname LIKE '%owner') \
                 FROM pg_authid WHERE rolname LIKE 'rights-w-%'",
                &[],
            )
            .await
            .unwrap();
        assert_eq!(
            (row.get::<_, bool>(0), row.get::<_, bool>(1), row.get::<_, bool>(2)),
            (false, false, true)
        );
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_role_without_the_right_is_told_postgresqls_code_and_nothing_more() {
    bounded(async {
        let bed = Bed::start(&[]).await;
        bed.workflow("w").await;
        let refused = bed
            .ledger("w", Role::Observer)
            .read(uuid::Uuid::nil())
            .await;
        assert_eq!(refused, Err(LedgerError::Refused("42501".to_owned())));
    })
    .await;
}
