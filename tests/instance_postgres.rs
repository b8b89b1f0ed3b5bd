//! An instance on a real PostgreSQL: how it begins, who gets in, what survives.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "a test that can't go on should say so and stop"
)]

mod instance_bed;

use std::time::Duration;

use domicile::api::privacy_data_store::InstanceRole;
use domicile::instance::volume;
use instance_bed::*;

async fn bounded(test: impl Future<Output = ()>) {
    tokio::time::timeout(Duration::from_secs(240), test)
        .await
        .expect("the test ends in time");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_new_store_opens_to_clients_only_once_it_is_known() {
    bounded(async {
        let bed = Bed::new(1, "Preferred");
        // As an interrupted initdb leaves it.
        let half = bed.path(1, "volume/data.new/base");
        std::fs::create_dir_all(&half).unwrap();
        bed.deaf(true);
        let node = bed.start(1);
        until("it knows its identifier", async || {
            let wish = node.wish.borrow().clone();
            wish.is_some_and(|w| w.entry.system_identifier.is_some() && w.entry.id.is_some())
        })
        .await;
        until("it answers on its socket", async || {
            node.sql("SELECT 1").await.is_ok()
        })
        .await;
        until("database and roles are made", async || {
            let sql = "SELECT count(*) FROM pg_database d JOIN pg_roles r ON r.oid = d.datdba \
                       WHERE datname = 'app' AND rolname = 'app' AND rolcanlogin AND NOT rolsuper";
            node.sql(sql).await == Ok("1".into())
        })
        .await;
        let refused = node.app_sql("SELECT 1").await.unwrap_err();
        assert!(refused.contains("Connection refused"), "{refused}");
        assert_eq!(node.http("/readyz").await.unwrap().0, 503);
        assert_eq!(node.http("/livez").await.unwrap().0, 200);
        assert_eq!(node.http("/startupz").await.unwrap().0, 200);

        bed.deaf(false);
        bed.until_ready(1).await;
        node.until_answers("/readyz", 200).await;
        let entry = bed.entry(1);
        assert_eq!(entry.role, Some(InstanceRole::Primary));
        assert_eq!(entry.message, None);
        let identifier = node
            .sql("SELECT system_identifier FROM pg_control_system()")
            .await
            .unwrap();
        assert_eq!(entry.system_identifier, Some(identifier));
        for (setting, value) in [
            ("data_checksums", "on"),
            ("server_encoding", "UTF8"),
            ("fsync", "on"),
            ("cluster_name", "s-1"),
            ("log_min_error_statement", "panic"),
            ("shared_buffers", "16MB"),
            ("synchronous_standby_names", ""),
            ("password_encryption", "scram-sha-256"),
        ] {
            let got = node
                .sql(&format!("SELECT current_setting('{setting}')"))
                .await;
            assert_eq!(got, Ok(value.to_owned()), "{setting}");
        }

        // Who gets in, and how.
        assert_eq!(node.app_sql("SELECT current_user").await, Ok("app".into()));
        node.app_sql("CREATE TABLE t (v int)").await.unwrap();
        let wrong = psql_with(&node.app(""), "SELECT 1", "wrong")
            .await
            .unwrap_err();
        assert!(wrong.contains("password authentication failed"), "{wrong}");
        let plain = node
            .app("")
            .replace("sslmode=verify-full", "sslmode=disable");
        let plain = psql(&plain, "SELECT 1").await.unwrap_err();
        assert!(plain.contains("pg_hba.conf rejects"), "{plain}");
        for user in ["postgres", "domicile_replication"] {
            let other = node.app("").replace("user=app", &format!("user={user}"));
            let refused = psql(&other, "SELECT 1").await.unwrap_err();
            assert!(refused.contains("pg_hba.conf rejects"), "{refused}");
        }
        let verifier = node
            .sql("SELECT rolpassword FROM pg_authid WHERE rolname = 'app'")
            .await;
        assert!(verifier.unwrap().starts_with("SCRAM-SHA-256$4096:"));

        // Replication: by the certificate of an instance of this store, and by nothing else.
        let replicate = |dir: std::path::PathBuf| {
            let conninfo = node
                .app("")
                .replace("user=app dbname=app", "user=domicile_replication");
            let conninfo = format!(
                "{conninfo} replication=true sslcert={0}/tls.crt sslkey={0}/tls.key",
                dir.display()
            );
            async move { psql(&conninfo, "IDENTIFY_SYSTEM").await }
        };
        let dir = |name: &str| bed.dir.path().join(name);
        bed.authority.issue(&dir("right"), "s-7");
        assert!(replicate(dir("right")).await.is_ok());
        for (name, cn) in [("other", "x-1"), ("longer", "s-1-x"), ("client", "app")] {
            bed.authority.issue(&dir(name), cn);
            let refused = replicate(dir(name)).await.unwrap_err();
            assert!(
                refused.contains("certificate authentication failed"),
                "{refused}"
            );
        }
        Authority::new().issue(&dir("foreign"), "s-1");
        assert!(replicate(dir("foreign")).await.is_err());
        let none = replicate(dir("none")).await.unwrap_err();
        assert!(!none.is_empty());

        // A new password in the Secret.
        std::fs::write(node.config.app.join("password"), "another").unwrap();
        until("the new password works", async || {
            psql_with(&node.app(""), "SELECT 1", "another")
                .await
                .is_ok()
        })
        .await;
        assert!(node.app_sql("SELECT 1").await.is_err());

        // A new certificate of a new authority.
        let renewed = Authority::new();
        renewed.issue(&node.config.tls, "s-1");
        until("the new certificate is served", async || {
            psql_with(&node.app(""), "SELECT 1", "another")
                .await
                .is_ok()
        })
        .await;

        let text = node.http("/metrics").await.unwrap().1;
        assert!(
            text.contains("domicile_instance_role{role=\"Primary\"} 1"),
            "{text}"
        );
        node.stop().await;
        let data = bed.path(1, "volume/data");
        let control = std::process::Command::new(bin().join("pg_controldata"))
            .arg(data)
            .output()
            .unwrap();
        let control = String::from_utf8_lossy(&control.stdout).into_owned();
        assert!(
            control.contains("cluster state:               shut down\n"),
            "{control}"
        );
        let log = logged();
        assert!(!log.contains(PASSWORD) && !log.contains("another\""));
        assert!(
            !log.contains("SCRAM-SHA-256$"),
            "also not what stands for a password"
        );
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn no_value_of_a_failing_statement_is_logged() {
    bounded(async {
        let bed = Bed::new(1, "Preferred");
        let node = bed.start(1);
        bed.until_ready(1).await;
        node.app_sql("CREATE TABLE t (mail text PRIMARY KEY, n int)").await.unwrap();
        for sql in [
            "INSERT INTO t VALUES ('jane.roe@example.com', 'jane.roe@example.com')",
            "INSERT INTO t VALUES ('jane.roe@example.com'), ('jane.roe@example.com')",
            "SELECT 'jane.roe@example.com'::date",
            "DO $$ BEGIN RAISE LOG 'jane.roe@example.com'; RAISE WARNING 'jane.roe@example.com'; END $$",
            "DO $$ BEGIN RAISE EXCEPTION E'x\\njane.roe@example.com'; END $$",
        ] {
            let _ = node.app_sql(sql).await;
        }
        until("the errors are counted", async || {
            let text = node.http("/metrics").await.unwrap().1;
            text.lines()
                .find_map(|l| l.strip_prefix("domicile_instance_client_errors_total "))
                .is_some_and(|n| n.parse::<u64>().unwrap() >= 5)
        })
        .await;
        let log = logged();
        assert!(log.contains("22007"), "the code is");
        assert!(!log.contains("jane.roe"), "the value isn't");
        node.stop().await;
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_crash_is_restarted_in_place_and_a_start_needs_no_api_server() {
    bounded(async {
        let bed = Bed::new(1, "Preferred");
        let node = bed.start(1);
        bed.until_ready(1).await;
        node.app_sql("CREATE TABLE t AS SELECT 1 AS v")
            .await
            .unwrap();
        let kill = |pid: i32| {
            nix::sys::signal::kill(
                nix::unistd::Pid::from_raw(pid),
                nix::sys::signal::Signal::SIGKILL,
            )
            .unwrap();
        };
        // The postmaster, and then a process under it. Nobody else is there to be elected.
        let serves = "SELECT pg_is_in_recovery()";
        let first = node.postmaster().unwrap();
        kill(first);
        until("another postmaster serves", async || {
            node.postmaster().is_some_and(|p| p != first)
                && node.app_sql(serves).await == Ok("f".into())
        })
        .await;
        assert_eq!(node.app_sql("SELECT v FROM t").await, Ok("1".into()));
        let second = node.postmaster().unwrap();
        let walwriter =
            node.sql("SELECT pid FROM pg_stat_activity WHERE backend_type = 'walwriter'");
        kill(walwriter.await.unwrap().parse().unwrap());
        until("a third postmaster serves", async || {
            node.postmaster().is_some_and(|p| p != second)
                && node.app_sql(serves).await == Ok("f".into())
        })
        .await;
        let text = node.http("/metrics").await.unwrap().1;
        assert!(
            text.contains("domicile_instance_postgres_crashes_total 2"),
            "{text}"
        );
        node.kill().await;

        let alone = bed.start_alone(1);
        alone.until_answers("/readyz", 200).await;
        assert_eq!(alone.app_sql("SELECT v FROM t").await, Ok("1".into()));
        alone.stop().await;
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_bad_parameter_costs_itself_and_nothing_else() {
    bounded(async {
        let bed = Bed::new(1, "Preferred");
        let node = bed.start(1);
        bed.until_ready(1).await;
        let postmaster = node.postmaster();
        bed.parameters(&[
            ("shared_buffers", "nonsense"),
            ("no_such_parameter", "1"),
            ("work_mem", "8MB"),
            ("fsync", "off"),
        ]);
        let message = bed.until_message(1, "refuses these parameters").await;
        assert!(
            message.contains("no_such_parameter, shared_buffers"),
            "{message}"
        );
        assert!(
            message.contains("Domicile's and are left out: fsync"),
            "{message}"
        );
        until("the good one is applied", async || {
            node.app_sql("SHOW work_mem").await == Ok("8MB".into())
        })
        .await;
        assert_eq!(node.app_sql("SHOW fsync").await, Ok("on".into()));

        bed.parameters(&[("shared_buffers", "24MB"), ("huge_pages", "on")]);
        bed.until_message(1, "waits for restart: huge_pages, shared_buffers")
            .await;
        assert_eq!(node.postmaster(), postmaster, "nothing was restarted");
        assert_eq!(bed.entry(1).ready, Some(true));

        // Understood, but no start works with it where the kernel keeps no huge pages.
        node.stop().await;
        let node = bed.start(1);
        bed.until_message(1, "runs with the last that worked").await;
        bed.until_ready(1).await;
        assert_eq!(node.app_sql("SHOW shared_buffers").await, Ok("16MB".into()));
        bed.parameters(&[("shared_buffers", "24MB")]);
        until("it no longer says so", async || {
            bed.entry(1)
                .message
                .is_none_or(|m| !m.contains("last that worked"))
        })
        .await;
        node.stop().await;
        let mut node = bed.start(1);
        until("the restart applied it", async || {
            node.app_sql("SHOW shared_buffers").await == Ok("24MB".into())
        })
        .await;

        // What can be raised and not lowered.
        for (asked, message) in [("120", None), ("110", Some("max_connections stays at 120"))] {
            bed.parameters(&[("max_connections", asked)]);
            until("it is asked for", async || {
                let path = node.config.run.join("conf/postgresql.conf");
                let line = format!("max_connections = '{asked}'\n");
                std::fs::read_to_string(path).is_ok_and(|conf| conf.contains(&line))
            })
            .await;
            node.stop().await;
            node = bed.start(1);
            until("a restart leaves the higher", async || {
                // Only once promoted has it written down what it runs with.
                let asked =
                    "SELECT current_setting('max_connections') || ' ' || pg_is_in_recovery()";
                node.app_sql(asked).await == Ok("120 false".into())
            })
            .await;
            if let Some(message) = message {
                bed.until_message(1, message).await;
            }
        }
        node.stop().await;
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_volume_that_does_not_fit_is_left_alone() {
    bounded(async {
        let bed = Bed::new(1, "Preferred");
        let node = bed.start(1);
        bed.until_ready(1).await;
        node.stop().await;
        let data = bed.path(1, "volume/data");
        let control = || std::fs::read(data.join("global/pg_control")).unwrap();
        let before = control();
        let identifier = bed.entry(1).system_identifier;

        // Another major version.
        let version = std::fs::read(data.join("PG_VERSION")).unwrap();
        std::fs::write(data.join("PG_VERSION"), "14\n").unwrap();
        let node = bed.start(1);
        bed.until_message(1, "made by PostgreSQL 14").await;
        assert_eq!(bed.entry(1).role, Some(InstanceRole::Failed));
        node.stop().await;
        std::fs::write(data.join("PG_VERSION"), version).unwrap();

        // Another database cluster.
        bed.change(|o| o.status.as_mut().unwrap().system_identifier = Some("1".into()));
        let node = bed.start(1);
        bed.until_message(1, "holds another database cluster").await;
        assert_eq!(bed.entry(1).role, Some(InstanceRole::Failed));
        assert_eq!(node.http("/readyz").await.unwrap().0, 503);
        node.stop().await;
        assert_eq!(control(), before, "nothing was touched");
        bed.change(|o| {
            o.status
                .as_mut()
                .unwrap()
                .system_identifier
                .clone_from(&identifier);
        });

        // An emptied one.
        let aside = bed.path(1, "volume/elsewhere");
        std::fs::rename(&data, &aside).unwrap();
        let node = bed.start(1);
        bed.until_message(1, "volume is lost").await;
        assert_eq!(bed.entry(1).role, Some(InstanceRole::Starting));
        assert!(!data.exists());
        // And brought back while it watches.
        std::fs::rename(&aside, &data).unwrap();
        bed.until_ready(1).await;
        node.stop().await;
        assert!(matches!(
            volume::content(&data),
            domicile::instance::plan::Content::Cluster(_)
        ));
    })
    .await;
}
