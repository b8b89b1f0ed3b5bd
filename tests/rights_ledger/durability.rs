//! What was said to be kept is kept, and nothing is said that isn't certain.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use domicile::api::names::rights::Role;
use domicile::rights::ledger::{Changed, Filed, LedgerError};
use domicile::rights::model::State;
use uuid::Uuid;

use crate::instance_bed::until;
use crate::ledger_bed::*;
use crate::{HERE, absent, bounded, claim};

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn every_acknowledged_request_is_there_after_a_sigkill() {
    bounded(async {
        let mut bed = Bed::start(&[]).await;
        bed.workflow("w").await;
        let (_dir, keyring) = keys();
        let gateway = bed.ledger("w", Role::Gateway);
        let targets = Arc::new([target("crm", &[HERE]), target("cache", &[HERE])]);
        let stop = Arc::new(AtomicBool::new(false));
        let done = Arc::new(std::sync::Mutex::new(Vec::<Uuid>::new()));
        let mut tasks = Vec::new();
        for task in 0..6 {
            let (gateway, keyring, targets) = (gateway.clone(), keyring.clone(), targets.clone());
            let (stop, done) = (stop.clone(), done.clone());
            tasks.push(tokio::spawn(async move {
                let mut again = 0;
                for n in 0.. {
                    if stop.load(Ordering::Relaxed) {
                        break;
                    }
                    let filings: Vec<_> = (0..1 + task * 3)
                        .map(|i| sealed(&keyring, &filing(&format!("{task}-{n}-{i}@example.org")), 30))
                        .collect();
                    // As a gateway does it: the same again until there is an answer.
                    loop {
                        match gateway.file(&filings, &targets[..]).await {
                            Ok(filed) => {
                                for (filed, filing) in filed.iter().zip(&filings) {
                                    match filed {
                                        Filed::New => {}
                                        Filed::Same(id) if *id == filing.id => again += 1,
                                        other => panic!("{other:?}"),
                                    }
                                    done.lock().unwrap().push(filing.id);
                                }
                                break;
                            }
                            Err(LedgerError::Unavailable(_)) => {}
                            Err(e) => panic!("{e}"),
                        }
                    }
                }
                again
            }));
        }
        let filed = || done.lock().unwrap().len();
        for _ in 0..3 {
            let before = filed();
            until("some are filed", async || filed() > before + 200).await;
            bed.kill();
            bed.run().await;
        }
        let before = filed();
        until("they go on", async || filed() > before + 200).await;
        stop.store(true, Ordering::Relaxed);
        for task in tasks {
            task.await.unwrap();
        }
        let done = done.lock().unwrap().clone();
        let root = bed
            .superuser(&domicile::api::names::rights::database("w"))
            .await;
        let rows = root
            .query(
                "SELECT r.id, count(s.lane) FROM ledger.request r LEFT JOIN ledger.step s ON s.request = r.id GROUP BY 1",
                &[],
            )
            .await
            .unwrap();
        let kept: std::collections::HashMap<Uuid, i64> =
            rows.iter().map(|r| (r.get(0), r.get(1))).collect();
        for id in &done {
            assert_eq!(kept.get(id), Some(&2), "{id}");
        }
        assert_eq!(kept.len(), done.len(), "and nothing that nobody was told of, all being said again");
    })
    .await;
}

/// A quorum that never acknowledges: a standby that isn't there.
const GHOST: &[(&str, &str)] = &[("synchronous_standby_names", "ghost")];

async fn appear(bed: &Bed) {
    let root = bed.superuser("postgres").await;
    root.batch_execute("ALTER SYSTEM SET synchronous_standby_names = ''")
        .await
        .unwrap();
    root.batch_execute("SELECT pg_reload_conf()").await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn nothing_is_promised_before_the_quorum_has_it() {
    bounded(async {
        let bed = Bed::start(GHOST).await;
        let root = bed.workflow("w").await;
        let (_dir, keyring) = keys();
        let gateway = bed.ledger("w", Role::Gateway);
        let targets = Arc::new([target("crm", &[HERE])]);
        let one = sealed(&keyring, &filing("a@example.org"), 30);
        let waits = async || -> i64 {
            root.query_one(
                "SELECT count(*) FROM pg_stat_activity WHERE wait_event = 'SyncRep'",
                &[],
            )
            .await
            .unwrap()
            .get(0)
        };
        let file = || {
            let (gateway, targets, one) = (gateway.clone(), targets.clone(), one.clone());
            tokio::spawn(async move { gateway.file(&[one], &targets[..]).await })
        };
        // Somebody cancels the statement while it waits. PostgreSQL says "success, and a warning".
        let filing_it = file();
        until("it waits for the quorum", async || waits().await == 1).await;
        root.batch_execute(
            "SELECT pg_cancel_backend(pid) FROM pg_stat_activity WHERE wait_event = 'SyncRep'",
        )
        .await
        .unwrap();
        let answer = filing_it.await.unwrap();
        assert_eq!(
            answer,
            Err(LedgerError::Unavailable(
                "the quorum didn't confirm what was written"
            ))
        );
        // It is visible now, and yet the same isn't "the same" before the quorum has it.
        assert!(gateway.read(one.id).await.unwrap().is_some());
        let again = file();
        until("it waits for the quorum", async || waits().await == 1).await;
        let answer = again.await.unwrap();
        assert!(
            matches!(answer, Err(LedgerError::Unavailable(_))),
            "{answer:?}"
        );
        // Nor do those that were given up pile up: there are no more than twice the connections.
        let mut tasks: Vec<_> = (0..40).map(|_| file()).collect();
        let mut refused = 0;
        for task in tasks.drain(..) {
            assert!(task.await.unwrap().is_err());
            refused += 1;
        }
        assert_eq!(refused, 40);
        assert!(waits().await <= 16, "{}", waits().await);
        appear(&bed).await;
        until("the quorum has it", async || {
            gateway.file(std::slice::from_ref(&one), &targets[..]).await
                == Ok(vec![Filed::Same(one.id)])
        })
        .await;
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn a_claim_waits_for_nobody_and_its_result_for_the_quorum() {
    bounded(async {
        let bed = Bed::start(&[]).await;
        let root = bed.workflow("w").await;
        let (_dir, keyring) = keys();
        let (gateway, worker) = (
            bed.ledger("w", Role::Gateway),
            bed.ledger("w", Role::Worker),
        );
        let filings: Vec<_> = (0..3)
            .map(|n| sealed(&keyring, &filing(&format!("{n}@example.org")), 30))
            .collect();
        gateway
            .file(&filings, &[target("crm", &[HERE])])
            .await
            .unwrap();
        root.batch_execute("ALTER SYSTEM SET synchronous_standby_names = 'ghost'")
            .await
            .unwrap();
        root.batch_execute("SELECT pg_reload_conf()").await.unwrap();
        until("the rule is in force", async || {
            let row = root
                .query_one("SELECT current_setting('synchronous_standby_names')", &[])
                .await
                .unwrap();
            row.get::<_, &str>(0) == "ghost"
        })
        .await;
        let claimed = claim(&worker, "crm", 1).await;
        assert_eq!(claimed.len(), 1);
        let kept = worker
            .renew(&[(claimed[0].step, claimed[0].lease)], crate::LEASE)
            .await;
        assert_eq!(kept, Ok(vec![true]));
        let said = [absent(&claimed[0])];
        let (a, b) = tokio::join!(worker.finish(&said), gateway.withdraw(filings[2].id));
        assert!(matches!(a, Err(LedgerError::Unavailable(_))), "{a:?}");
        assert!(matches!(b, Err(LedgerError::Unavailable(_))), "{b:?}");
        appear(&bed).await;
        until("both are done", async || {
            let state = async |id| gateway.read(id).await.ok().flatten().map(|v| v.state);
            state(filings[0].id).await == Some(State::Closed)
                && state(filings[2].id).await == Some(State::Withdrawn)
        })
        .await;
        assert_eq!(
            worker.finish(&[absent(&claimed[0])]).await,
            Ok(vec![false]),
            "said twice"
        );
        assert_eq!(gateway.withdraw(filings[2].id).await, Ok(Changed::Already));
    })
    .await;
}

/// Whatever the connection is set to.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_functions_choose_what_is_waited_for() {
    bounded(async {
        let bed = Bed::start(&[]).await;
        let mut root = bed.workflow("w").await;
        let unknown = "'00000000-0000-7000-8000-000000000000'";
        for (call, from, to) in [
            (format!("gateway.withdraw({unknown})"), "off", "on"),
            (format!("gateway.withdraw({unknown})"), "remote_apply", "remote_apply"),
            ("worker.finish('{}', '{}', '{}', '{}', '{}', '{}', '{}', '{}', '{}', '{}')".to_owned(), "local", "on"),
            ("worker.claim('t', 'r', 'w', 1, 1)".to_owned(), "on", "local"),
        ] {
            let transaction = root.client.transaction().await.unwrap();
            transaction
                .batch_execute(&format!("SET LOCAL synchronous_commit = {from}; SELECT * FROM {call}"))
                .await
                .unwrap();
            let row = transaction
                .query_one(
                    "SELECT current_setting('synchronous_commit'), pg_current_xact_id_if_assigned()::text",
                    &[],
                )
                .await
                .unwrap();
            assert_eq!(row.get::<_, &str>(0), to, "{call}");
            // A transaction without an id commits without waiting for anybody.
            assert!(to == "local" || row.get::<_, Option<&str>>(1).is_some(), "{call}");
        }
    })
    .await;
}
