//! Reaching the primary: whichever host it is, with whatever certificate is there now.

use std::time::{Duration, Instant};

use domicile::api::names::rights::{Role, role};
use domicile::rights::ledger::{Ledger, LedgerError};
use uuid::Uuid;

use crate::bounded;
use crate::instance_bed::Authority;
use crate::ledger_bed::*;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn hosts_that_say_nothing_cost_nothing() {
    bounded(async {
        let bed = Bed::start(&[]).await;
        bed.workflow("w").await;
        let mut database = bed.database("w");
        // Their kernels accept, and nobody is there: frozen. The last before the primary refuses.
        let frozen: Vec<_> = (101..104)
            .map(|host| {
                let address = format!("{}{host}", bed.address.strip_suffix('1').unwrap());
                let listener = std::net::TcpListener::bind((address.as_str(), PORT)).unwrap();
                database.hosts.insert(0, address);
                listener
            })
            .collect();
        database
            .hosts
            .insert(3, format!("{}99", bed.address.strip_suffix('1').unwrap()));
        let name = role("w", Role::Gateway);
        let ledger = Ledger::new(&database, &name, &bed.path(&name), 4, "test").unwrap();
        let began = Instant::now();
        assert_eq!(ledger.read(Uuid::nil()).await, Ok(None));
        assert!(
            began.elapsed() < Duration::from_millis(1_500),
            "{:?}",
            began.elapsed()
        );
        drop(frozen);
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_standby_is_no_primary_and_nobody_is_waited_for_without_a_limit() {
    bounded(async {
        let bed = Bed::start(&[]).await;
        bed.workflow("w").await;
        let root = bed.superuser("postgres").await;
        root.batch_execute("ALTER SYSTEM SET default_transaction_read_only = on")
            .await
            .unwrap();
        root.batch_execute("SELECT pg_reload_conf()").await.unwrap();
        // What is chosen at the start of a session isn't overruled by the server's default, so a standby is made of it.
        let ledger = bed.ledger("w", Role::Gateway);
        assert!(ledger.read(Uuid::nil()).await.is_ok());
        drop(root);
        let mut bed = bed;
        bed.kill();
        std::fs::write(bed.path("data").join("standby.signal"), "").unwrap();
        bed.run().await;
        let began = Instant::now();
        let refused = ledger.read(Uuid::nil()).await;
        assert!(
            matches!(refused, Err(LedgerError::Unavailable(_))),
            "{refused:?}"
        );
        let refused = ledger.read(Uuid::nil()).await;
        assert_eq!(
            refused,
            Err(LedgerError::Unavailable("no instance is the primary"))
        );
        assert!(began.elapsed() < Duration::from_secs(12));
        // A call that is made during a failover gets its answer after it.
        let waiting = {
            let ledger = ledger.clone();
            tokio::spawn(async move { ledger.read(Uuid::nil()).await })
        };
        let root = bed.superuser("postgres").await;
        root.batch_execute("SELECT pg_promote()").await.unwrap();
        assert_eq!(waiting.await.unwrap(), Ok(None));
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn after_a_restart_at_most_the_calls_under_way_notice() {
    bounded(async {
        let mut bed = Bed::start(&[]).await;
        bed.workflow("w").await;
        let ledger = bed.ledger("w", Role::Gateway);
        let all = async || {
            let reads = (0..8).map(|_| ledger.read(Uuid::nil()));
            futures::future::join_all(reads).await
        };
        assert!(all().await.iter().all(Result::is_ok));
        bed.kill();
        bed.run().await;
        // The connections were closed while they idled.
        assert!(all().await.iter().all(Result::is_ok));
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_renewed_certificate_is_used_without_a_restart() {
    bounded(async {
        let bed = Bed::start(&[]).await;
        bed.workflow("w").await;
        let name = role("w", Role::Gateway);
        let foreign = Authority::new();
        foreign.issue(&bed.path(&name), &name);
        let ledger = bed.ledger("w", Role::Gateway);
        let refused = ledger.read(Uuid::nil()).await.unwrap_err();
        assert!(matches!(refused, LedgerError::Unavailable(_)), "{refused}");
        std::fs::remove_file(bed.path(&name).join("tls.key")).unwrap();
        let refused = ledger.read(Uuid::nil()).await.unwrap_err();
        assert!(refused.to_string().contains("certificate"), "{refused}");
        bed.authority.issue(&bed.path(&name), &name);
        assert_eq!(ledger.read(Uuid::nil()).await, Ok(None));
        // Nor is a server believed that another authority vouches for, or that has another name.
        let mut database = bed.database("w");
        database.hosts = vec!["localhost".to_owned()];
        assert!(
            Ledger::new(&database, &name, &bed.path(&name), 1, "test")
                .unwrap()
                .read(Uuid::nil())
                .await
                .is_err()
        );
        database.hosts.clear();
        assert!(Ledger::new(&database, &name, &bed.path(&name), 1, "test").is_err());
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn who_listens_hears_also_after_the_server_was_away() {
    bounded(async {
        let mut bed = Bed::start(&[]).await;
        bed.workflow("w").await;
        let listener = bed.ledger("w", Role::Worker).listener();
        let waker = bed.ledger("w", Role::Gateway).waker();
        let heard = async || {
            tokio::time::timeout(Duration::from_secs(20), listener.heard())
                .await
                .is_ok()
        };
        assert!(heard().await, "once it is connected");
        for _ in 0..100 {
            waker.wake();
        }
        assert!(heard().await);
        let notifications = async || -> i64 {
            let root = bed.superuser("postgres").await;
            root.query_one(
                "SELECT count(*) FROM pg_stat_activity WHERE query LIKE 'LISTEN%'",
                &[],
            )
            .await
            .unwrap()
            .get(0)
        };
        assert_eq!(notifications().await, 1);
        bed.kill();
        assert!(heard().await, "that the connection is gone");
        bed.run().await;
        assert!(heard().await, "that it is back");
        waker.wake();
        assert!(heard().await);
    })
    .await;
}
