//! Claims: the earliest deadline first, one worker each, and only the present lease counts.

use std::collections::HashSet;
use std::time::Duration;

use domicile::api::names::rights::Role;
use domicile::rights::ledger::{Claimed, How, Lease};
use domicile::rights::model::Evidence;
use domicile::rights::model::Outcome;
use uuid::Uuid;

use crate::instance_bed::until;
use crate::ledger_bed::*;
use crate::{HERE, LEASE, absent, bounded, claim, finished};

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn eight_that_claim_at_once_never_get_the_same_and_keep_the_order() {
    bounded(async {
        let bed = Bed::start(&[]).await;
        bed.workflow("w").await;
        let (_dir, keyring) = keys();
        let gateway = bed.ledger("w", Role::Gateway);
        let targets = [target("crm", &[HERE])];
        let received = now();
        for batch in 0..4_u64 {
            let filings: Vec<_> = (0..500_u64)
                .map(|n| {
                    let mut it = filing(&format!("{batch}-{n}@example.org"));
                    it.received_at = received;
                    let due =
                        received + Duration::from_secs(86_400 + (n * 7_919 + batch * 13) % 5_000);
                    keyring.seal(&it, None, due).unwrap()
                })
                .collect();
            gateway.file(&filings, &targets).await.unwrap();
        }
        let worker = bed.ledger("w", Role::Worker);
        let mut tasks = Vec::new();
        for n in 0..8 {
            let worker = worker.clone();
            tasks.push(tokio::spawn(async move {
                let mut mine: Vec<Claimed> = Vec::new();
                loop {
                    let some = worker
                        .claim("crm", HERE, &format!("w{n}"), 10, LEASE)
                        .await
                        .unwrap();
                    if some.is_empty() {
                        break mine;
                    }
                    mine.extend(some);
                }
            }));
        }
        let mut seen = HashSet::new();
        for task in tasks {
            let mine = task.await.unwrap();
            // Nothing came in meanwhile, so nobody finds an earlier one after a later one.
            assert!(mine.windows(2).all(|w| w[0].deadline <= w[1].deadline));
            for claimed in mine {
                assert!(seen.insert(claimed.step), "twice");
            }
        }
        assert_eq!(seen.len(), 2_000);
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn by_deadline_then_by_receipt_also_across_regions_that_changed() {
    bounded(async {
        let bed = Bed::start(&[]).await;
        bed.workflow("w").await;
        let (_dir, keyring) = keys();
        let (gateway, worker) = (
            bed.ledger("w", Role::Gateway),
            bed.ledger("w", Role::Worker),
        );
        let now = now();
        let mut expected = Vec::new();
        for (n, (due, received)) in [(3, 0), (1, 9), (2, 5), (1, 4), (2, 8), (3, 1)]
            .into_iter()
            .enumerate()
        {
            let mut it = filing(&format!("{n}@example.org"));
            it.received_at = now + Duration::from_secs(received);
            let due = now + Duration::from_secs(86_400 * due);
            let it = keyring.seal(&it, None, due).unwrap();
            // The target's regions were changed in the middle, and written in another order.
            let regions: &[&str] = if n % 2 == 0 {
                &[HERE]
            } else {
                &["there", HERE]
            };
            gateway
                .file(std::slice::from_ref(&it), &[target("crm", regions)])
                .await
                .unwrap();
            expected.push((due, it.received_at, it.id));
        }
        expected.sort();
        let mut got = Vec::new();
        for _ in 0..3 {
            got.extend(
                claim(&worker, "crm", 2)
                    .await
                    .iter()
                    .map(|c| c.step.request),
            );
        }
        assert_eq!(got, expected.iter().map(|e| e.2).collect::<Vec<_>>());
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_lease_that_ran_out_is_anothers_and_the_first_changes_nothing() {
    bounded(async {
        let bed = Bed::start(&[]).await;
        bed.workflow("w").await;
        let (_dir, keyring) = keys();
        let (gateway, worker) = (
            bed.ledger("w", Role::Gateway),
            bed.ledger("w", Role::Worker),
        );
        let it = sealed(&keyring, &filing("a@example.org"), 30);
        gateway
            .file(std::slice::from_ref(&it), &[target("crm", &[HERE])])
            .await
            .unwrap();
        let short = Duration::from_millis(100);
        let stalled = worker
            .claim("crm", HERE, "stalled", 1, short)
            .await
            .unwrap();
        let mut second = Vec::new();
        until("the lease ran out", async || {
            second = claim(&worker, "crm", 1).await;
            !second.is_empty()
        })
        .await;
        assert_eq!(second[0].step, stalled[0].step);
        assert_ne!(second[0].lease, stalled[0].lease);
        // A worker that died there is to be seen.
        assert_eq!((second[0].attempts, second[0].failures), (2, 1));
        assert_eq!(worker.finish(&[absent(&stalled[0])]).await, Ok(vec![false]));
        assert_eq!(
            worker
                .renew(
                    &[
                        (stalled[0].step, stalled[0].lease),
                        (second[0].step, second[0].lease)
                    ],
                    LEASE
                )
                .await,
            Ok(vec![false, true])
        );
        let mut guessed = absent(&second[0]);
        guessed.lease = Lease(Uuid::now_v7());
        assert_eq!(worker.finish(&[guessed]).await, Ok(vec![false]));
        let view = gateway.read(it.id).await.unwrap().unwrap();
        assert_eq!(view.steps[0].outcome, None);
        assert_eq!(
            worker
                .finish(&[absent(&stalled[0]), absent(&second[0])])
                .await,
            Ok(vec![false, true])
        );
    })
    .await;
}

/// A claim isn't waited for by the quorum: what a failover makes of it.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_claim_that_a_failover_forgot_counts_for_nothing() {
    bounded(async {
        let bed = Bed::start(&[]).await;
        let root = bed.workflow("w").await;
        let (_dir, keyring) = keys();
        let (gateway, worker) = (
            bed.ledger("w", Role::Gateway),
            bed.ledger("w", Role::Worker),
        );
        let it = sealed(&keyring, &filing("a@example.org"), 30);
        gateway
            .file(&[it], &[target("crm", &[HERE])])
            .await
            .unwrap();
        root.batch_execute("CREATE TABLE public.before AS SELECT * FROM ledger.step")
            .await
            .unwrap();
        let forgotten = claim(&worker, "crm", 1).await;
        // The new primary has the row as it was before the claim.
        root.batch_execute(
            "DELETE FROM ledger.step; INSERT INTO ledger.step SELECT * FROM public.before",
        )
        .await
        .unwrap();
        assert_eq!(
            worker.finish(&[absent(&forgotten[0])]).await,
            Ok(vec![false]),
            "nobody has it"
        );
        let second = claim(&worker, "crm", 1).await;
        // A counter would be the same for both.
        assert_eq!(second[0].attempts, forgotten[0].attempts);
        assert_eq!(
            worker.finish(&[absent(&forgotten[0])]).await,
            Ok(vec![false])
        );
        assert_eq!(worker.finish(&[absent(&second[0])]).await, Ok(vec![true]));
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn the_last_two_steps_finished_at_once_close_the_request() {
    bounded(async {
        let bed = Bed::start(&[]).await;
        let root = bed.workflow("w").await;
        let (_dir, keyring) = keys();
        let (gateway, worker) = (
            bed.ledger("w", Role::Gateway),
            bed.ledger("w", Role::Worker),
        );
        let targets = [
            target("a", &[HERE]),
            target("b", &[HERE]),
            target("c", &[HERE]),
        ];
        for round in 0..10 {
            let filings: Vec<_> = (0..40)
                .map(|n| sealed(&keyring, &filing(&format!("{round}-{n}@example.org")), 30))
                .collect();
            gateway.file(&filings, &targets).await.unwrap();
            let mut tasks = Vec::new();
            for target in ["a", "b", "c"] {
                let worker = worker.clone();
                tasks.push(tokio::spawn(async move {
                    let mut claimed = claim(&worker, target, 100).await;
                    // In any order.
                    claimed.sort_by_key(|c| {
                        c.step
                            .request
                            .as_u128()
                            .wrapping_mul(u128::MAX / 3 + target.len() as u128)
                    });
                    for some in claimed.chunks(13) {
                        let some: Vec<_> = some.iter().map(absent).collect();
                        assert!(worker.finish(&some).await.unwrap().iter().all(|b| *b));
                    }
                }));
            }
            for task in tasks {
                task.await.unwrap();
            }
        }
        let row = root
            .query_one(
                "SELECT (SELECT count(*) FROM ledger.request), (SELECT count(*) FROM ledger.step), \
                 (SELECT count(*) FROM ledger.closed), (SELECT count(*) FROM ledger.erased)",
                &[],
            )
            .await
            .unwrap();
        let counts: Vec<i64> = (0..4).map(|i| row.get(i)).collect();
        assert_eq!(counts, [0, 0, 400, 800]);
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn given_back_untouched_unproven_and_raised() {
    bounded(async {
        let bed = Bed::start(&[]).await;
        let root = bed.workflow("w").await;
        let (_dir, keyring) = keys();
        let (gateway, worker) = (
            bed.ledger("w", Role::Gateway),
            bed.ledger("w", Role::Worker),
        );
        let observer = bed.ledger("w", Role::Observer);
        let targets = [target("crm", &[HERE])];
        let mut it = filing("a@example.org");
        it.received_at = now() - Duration::from_secs(86_400 * 9);
        let it = sealed(&keyring, &it, 10);
        gateway
            .file(std::slice::from_ref(&it), &targets)
            .await
            .unwrap();
        assert_eq!(
            observer.counts().await.unwrap().steps[0].raised,
            0,
            "nothing failed yet"
        );

        let first = claim(&worker, "crm", 1).await;
        assert_eq!(
            worker.finish(&[finished(&first[0], How::Release)]).await,
            Ok(vec![true])
        );
        let second = claim(&worker, "crm", 1).await;
        assert_eq!((second[0].attempts, second[0].failures), (1, 0));
        // A connector that has nothing to show has done nothing.
        let unproven = finished(&second[0], How::Done(Outcome::Absent, Evidence::default()));
        assert_eq!(worker.finish(&[unproven]).await, Ok(vec![true]));
        let view = gateway.read(it.id).await.unwrap().unwrap();
        assert_eq!(view.steps[0].outcome, None);
        assert_eq!(view.steps[0].last_failure.as_deref(), Some("no-evidence"));
        assert_eq!(claim(&worker, "crm", 1).await, [], "later");

        let counts = observer.counts().await.unwrap();
        assert_eq!((counts.steps[0].raised, counts.steps[0].waiting), (1, 1));
        assert_eq!(
            (
                counts.requests[0].within_day,
                counts.requests[0].within_week
            ),
            (1, 1)
        );
        assert_eq!(counts.requests[0].overdue, 0);
        assert_eq!(counts.nearest_deadline(), Some(it.answer_by));
        root.batch_execute(
            "UPDATE ledger.request SET answer_by = now() - interval '1 minute'; \
             UPDATE ledger.step SET deadline = now() - interval '1 minute'",
        )
        .await
        .unwrap();
        let counts = observer.counts().await.unwrap();
        assert_eq!(
            (counts.requests[0].overdue, counts.steps[0].overdue),
            (1, 1)
        );
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn old_records_are_forgotten_and_who_was_erased_is_not() {
    bounded(async {
        let bed = Bed::start(&[]).await;
        let root = bed.workflow("w").await;
        let (_dir, keyring) = keys();
        let (gateway, worker) = (
            bed.ledger("w", Role::Gateway),
            bed.ledger("w", Role::Worker),
        );
        let filings: Vec<_> = (0..10)
            .map(|n| sealed(&keyring, &filing(&format!("{n}@example.org")), 30))
            .collect();
        gateway
            .file(&filings, &[target("crm", &[HERE])])
            .await
            .unwrap();
        gateway.withdraw(filings[9].id).await.unwrap();
        let claimed = claim(&worker, "crm", 100).await;
        let all: Vec<_> = claimed.iter().map(absent).collect();
        worker.finish(&all).await.unwrap();
        assert_eq!(worker.forget_old(1).await, Ok(0));
        assert!(worker.forget_old(0).await.is_err());
        root.execute(
            "UPDATE ledger.closed SET closed_at = now() - interval '25 months' WHERE id = ANY ($1)",
            &[&filings[5..].iter().map(|f| f.id).collect::<Vec<_>>()],
        )
        .await
        .unwrap();
        assert_eq!(worker.forget_old(24).await, Ok(5));
        assert_eq!(worker.forget_old(24).await, Ok(0));
        assert!(gateway.read(filings[0].id).await.unwrap().is_some());
        assert_eq!(gateway.read(filings[9].id).await, Ok(None));
        let erased: i64 = root
            .query_one("SELECT count(*) FROM ledger.erased", &[])
            .await
            .unwrap()
            .get(0);
        assert_eq!(erased, 18);
    })
    .await;
}
