//! Filing, reading, changing, listing; and a request's whole life.

use std::time::Duration;

use domicile::api::names::rights::Role;
use domicile::rights::ledger::{Changed, Cursor, Filed, How, LedgerError, ListFilter, StepState};
use domicile::rights::model::{Evidence, Outcome, State};
use uuid::Uuid;

use crate::instance_bed::until;
use crate::ledger_bed::*;
use crate::{HERE, absent, bounded, claim, evidence, finished};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_request_lives_and_ends_and_leaves_nothing_of_the_person() {
    bounded(async {
        let bed = Bed::start(&[]).await;
        let root = bed.workflow("w").await;
        let (_dir, keyring) = keys();
        let (gateway, worker) = (
            bed.ledger("w", Role::Gateway),
            bed.ledger("w", Role::Worker),
        );
        let observer = bed.ledger("w", Role::Observer);
        let targets = [target("crm", &[HERE, "there"]), target("cache", &[HERE])];
        let it = filing("canary@example.org");
        let one = sealed(&keyring, &it, 30);
        assert_eq!(
            gateway.file(std::slice::from_ref(&one), &targets).await,
            Ok(vec![Filed::New])
        );

        let view = gateway.read(one.id).await.unwrap().unwrap();
        assert_eq!((view.state, view.steps.len()), (State::Open, 2));
        assert_eq!(view.deadline(), one.answer_by);
        assert!(view.steps.iter().all(|s| s.state == StepState::Ready));
        assert_eq!(gateway.read(Uuid::now_v7()).await, Ok(None));

        // In no other region, and of no other target.
        assert_eq!(
            worker.claim("cache", "there", "w", 9, crate::LEASE).await,
            Ok(vec![])
        );
        assert_eq!(claim(&worker, "nothing", 9).await, []);
        let crm = worker
            .claim("crm", "there", "w", 9, crate::LEASE)
            .await
            .unwrap();
        let cache = claim(&worker, "cache", 9).await;
        let opened = keyring
            .open(
                crm[0].step.request,
                crm[0].key_epoch,
                &crm[0].wrapped_key,
                &crm[0].sealed,
            )
            .unwrap();
        assert_eq!(opened, it.identifiers);
        assert_eq!(claim(&worker, "crm", 9).await, []);
        assert_eq!(
            worker
                .renew(&[(crm[0].step, crm[0].lease)], crate::LEASE)
                .await,
            Ok(vec![true])
        );

        // One fails, and is tried again later; the other settles first.
        let later = Duration::from_millis(50);
        let said = [
            finished(
                &crm[0],
                How::Retry {
                    after: later,
                    reason: "unreachable",
                },
            ),
            finished(
                &cache[0],
                How::Settle {
                    after: later,
                    erasure: Evidence::default(),
                },
            ),
        ];
        assert_eq!(worker.finish(&said).await, Ok(vec![true, true]));
        assert_eq!(
            worker.finish(&said).await,
            Ok(vec![false, false]),
            "said twice"
        );
        let view = gateway.read(one.id).await.unwrap().unwrap();
        let step = |target: &str| view.steps.iter().find(|s| s.target == target).unwrap();
        assert_eq!(step("crm").last_failure.as_deref(), Some("unreachable"));
        assert!(step("cache").settling);
        let counts = observer.counts().await.unwrap();
        assert_eq!((counts.open(), counts.epochs), (1, vec![one.key_epoch]));
        assert_eq!((counts.steps[0].settling, counts.steps[1].failing), (1, 1));
        assert_eq!(counts.steps[1].raised, 0);

        let mut again = Vec::new();
        until("both are due again", async || {
            again.extend(claim(&worker, "crm", 9).await);
            again.extend(claim(&worker, "cache", 9).await);
            again.len() == 2
        })
        .await;
        assert_eq!(again.iter().filter(|c| c.settling).count(), 1);
        assert_eq!(again.iter().map(|c| c.failures).sum::<u32>(), 1);
        assert_ne!(again[0].lease, again[1].lease);
        let until = now() + Duration::from_secs(86_400);
        let bounded = finished(&again[0], How::Done(Outcome::Bounded { until }, evidence()));
        assert_eq!(worker.finish(&[bounded]).await, Ok(vec![true]));
        assert_eq!(
            gateway.read(one.id).await.unwrap().unwrap().state,
            State::Open
        );
        assert_eq!(worker.finish(&[absent(&again[1])]).await, Ok(vec![true]));

        let view = gateway.read(one.id).await.unwrap().unwrap();
        assert_eq!(view.state, State::Closed);
        assert!(view.closed_at.is_some());
        assert!(view.steps.iter().all(|s| s.evidence == Some(evidence())));
        let outcomes = view.steps.iter().filter_map(|s| s.outcome.clone());
        assert_eq!(outcomes.filter(|o| *o == Outcome::Absent).count(), 1);
        assert_eq!(observer.counts().await.unwrap().epochs, []);

        // What is left of the person: keyed hashes on the list of who was erased.
        let rows = root
            .query("SELECT name, hash FROM ledger.erased ORDER BY name", &[])
            .await
            .unwrap();
        let erased: Vec<(String, Vec<u8>)> = rows.iter().map(|r| (r.get(0), r.get(1))).collect();
        let expected: Vec<(String, Vec<u8>)> = it
            .identifiers
            .0
            .iter()
            .map(|(n, v)| (n.clone(), keyring.hash(n, v).to_vec()))
            .collect();
        assert_eq!(erased, expected);
        for table in [
            "request",
            "step",
            "closed",
            "lane",
            "erased",
            "schema_version",
        ] {
            let rows = root
                .query(&format!("SELECT t::text FROM ledger.{table} t"), &[])
                .await
                .unwrap();
            for row in rows {
                let text: String = row.get(0);
                for trace in [&one.sealed, &one.wrapped_key] {
                    let hex: String = trace.iter().map(|b| format!("{b:02x}")).collect();
                    assert!(!text.contains(&hex), "{table}");
                }
                assert!(!text.contains("canary"), "{table}");
            }
        }
        assert!(!bed.log().contains("canary"));
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_same_is_filed_once_whenever_it_is_said_again() {
    bounded(async {
        let bed = Bed::start(&[]).await;
        bed.workflow("w").await;
        let (_dir, keyring) = keys();
        let (gateway, worker) = (
            bed.ledger("w", Role::Gateway),
            bed.ledger("w", Role::Worker),
        );
        let targets = [target("crm", &[HERE])];
        let with = |email: &str, key: &str| {
            let mut filing = filing(email);
            filing.idempotency_key = Some(key.to_owned());
            sealed(&keyring, &filing, 30)
        };
        let one = with("a@example.org", "k1");
        // Within one call: new, the same, another content by the same key, and the same id again.
        let (same, other) = (with("a@example.org", "k1"), with("b@example.org", "k1"));
        let two = with("c@example.org", "k2");
        let said = [one.clone(), same, other.clone(), two.clone(), two.clone()];
        let expected = vec![
            Filed::New,
            Filed::Same(one.id),
            Filed::Conflict(one.id),
            Filed::New,
            Filed::Same(two.id),
        ];
        assert_eq!(gateway.file(&said, &targets).await, Ok(expected));
        // Without a key, by id; and another content under an id that is taken.
        let plain = sealed(&keyring, &filing("d@example.org"), 30);
        assert_eq!(
            gateway.file(std::slice::from_ref(&plain), &targets).await,
            Ok(vec![Filed::New])
        );
        let mut forged = sealed(&keyring, &filing("e@example.org"), 30);
        forged.id = plain.id;
        assert_eq!(
            gateway.file(&[plain.clone(), forged], &targets).await,
            Ok(vec![Filed::Same(plain.id), Filed::Conflict(plain.id)])
        );
        // One step each, whatever was said.
        assert_eq!(claim(&worker, "crm", 100).await.len(), 3);

        // After it ended, one way or the other.
        let again = with("a@example.org", "k1");
        let three = with("f@example.org", "k3");
        gateway
            .file(std::slice::from_ref(&three), &targets)
            .await
            .unwrap();
        assert_eq!(gateway.withdraw(three.id).await, Ok(Changed::Yes));
        let view = gateway.read(one.id).await.unwrap().unwrap();
        assert_eq!(view.steps[0].state, StepState::Leased);
        let root = bed
            .superuser(&domicile::api::names::rights::database("w"))
            .await;
        root.batch_execute(
            "UPDATE ledger.step SET due_at = now() - interval '1 hour' WHERE state = 'leased'",
        )
        .await
        .unwrap();
        let claimed = claim(&worker, "crm", 100).await;
        let all: Vec<_> = claimed.iter().map(absent).collect();
        assert_eq!(worker.finish(&all).await.unwrap(), [true; 3]);
        assert_eq!(
            gateway
                .file(
                    &[
                        again,
                        other,
                        with("f@example.org", "k3"),
                        plain.clone(),
                        three.clone()
                    ],
                    &targets
                )
                .await,
            Ok(vec![
                Filed::Same(one.id),
                Filed::Conflict(one.id),
                Filed::Same(three.id),
                Filed::Same(plain.id),
                Filed::Same(three.id),
            ])
        );
        assert_eq!(claim(&worker, "crm", 100).await, []);
        assert_eq!(
            gateway.file(&[plain], &[]).await,
            Err(LedgerError::Refused("DR001".to_owned()))
        );
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn of_many_that_file_the_same_at_once_one_files_it() {
    bounded(async {
        let bed = Bed::start(&[]).await;
        bed.workflow("w").await;
        let (_dir, keyring) = keys();
        let gateway = bed.ledger("w", Role::Gateway);
        let worker = bed.ledger("w", Role::Worker);
        let targets = std::sync::Arc::new([target("crm", &[HERE])]);
        let mut tasks = Vec::new();
        for task in 0..8_u32 {
            // Ten keys, in another order each.
            let filings: Vec<_> = (0..10_u32)
                .map(|n| {
                    let n = (n * 7 + task * 3) % 10;
                    let mut filing = filing(&format!("{n}@example.org"));
                    filing.idempotency_key = Some(format!("k{n}"));
                    sealed(&keyring, &filing, 30)
                })
                .collect();
            let (gateway, targets) = (gateway.clone(), targets.clone());
            tasks.push(tokio::spawn(async move {
                loop {
                    match gateway.file(&filings, &targets[..]).await {
                        Ok(filed) => break (filings, filed),
                        Err(LedgerError::Unavailable(_)) => {}
                        Err(e) => panic!("{e}"),
                    }
                }
            }));
        }
        let (mut new, mut same) = (Vec::new(), Vec::new());
        for task in tasks {
            let (filings, filed) = task.await.unwrap();
            for (filing, filed) in filings.iter().zip(filed) {
                match filed {
                    Filed::New => new.push(filing.id),
                    Filed::Same(id) => same.push(id),
                    Filed::Conflict(_) => panic!("a conflict"),
                }
            }
        }
        assert_eq!((new.len(), same.len()), (10, 70));
        assert!(same.iter().all(|id| new.contains(id)));
        assert_eq!(claim(&worker, "crm", 100).await.len(), 10);
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_thousand_are_one_transaction_and_a_bad_one_spoils_all() {
    bounded(async {
        let bed = Bed::start(&[]).await;
        let root = bed.workflow("w").await;
        let (_dir, keyring) = keys();
        let gateway = bed.ledger("w", Role::Gateway);
        let targets = [target("crm", &[HERE]), target("cache", &[HERE])];
        let mut filings: Vec<_> = (0..1_000)
            .map(|n| sealed(&keyring, &filing(&format!("{n}@example.org")), 30))
            .collect();
        filings[700].hashes.clear();
        let refused = gateway.file(&filings, &targets).await;
        assert_eq!(refused, Err(LedgerError::Refused("23514".to_owned())));
        let count = async |sql: &str| -> i64 { root.query_one(sql, &[]).await.unwrap().get(0) };
        assert_eq!(count("SELECT count(*) FROM ledger.request").await, 0);
        filings[700] = sealed(&keyring, &filing("700@example.org"), 30);
        let filed = gateway.file(&filings, &targets).await.unwrap();
        assert_eq!(filed, vec![Filed::New; 1_000]);
        assert_eq!(
            count("SELECT count(DISTINCT xmin::text) FROM ledger.request").await,
            1
        );
        assert_eq!(count("SELECT count(*) FROM ledger.step").await, 2_000);
        filings.push(sealed(&keyring, &filing("1@example.org"), 30));
        assert_eq!(
            gateway.file(&filings, &targets).await,
            Err(LedgerError::Refused("DR004".to_owned()))
        );
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn approval_withdrawal_and_extension() {
    bounded(async {
        let bed = Bed::start(&[]).await;
        bed.workflow("w").await;
        let (_dir, keyring) = keys();
        let (gateway, worker) = (
            bed.ledger("w", Role::Gateway),
            bed.ledger("w", Role::Worker),
        );
        let targets = [target("crm", &[HERE]), target("cache", &[HERE])];
        let file = async |email: &str, days: i64, approval: bool| {
            let mut it = filing(email);
            it.needs_approval = approval;
            let it = sealed(&keyring, &it, days);
            assert_eq!(
                gateway.file(std::slice::from_ref(&it), &targets).await,
                Ok(vec![Filed::New])
            );
            it
        };
        // Not carried out before it is approved.
        let asked = file("a@example.org", 10, true).await;
        assert_eq!(claim(&worker, "crm", 9).await, []);
        let view = gateway.read(asked.id).await.unwrap().unwrap();
        assert_eq!(
            (view.state, view.steps[0].state),
            (State::AwaitingApproval, StepState::Parked)
        );
        assert_eq!(gateway.approve(asked.id).await, Ok(Changed::Yes));
        assert_eq!(gateway.approve(asked.id).await, Ok(Changed::Already));

        // What is extended comes later.
        let sooner = file("b@example.org", 20, false).await;
        let to = sooner.answer_by + Duration::from_secs(86_400);
        assert_eq!(
            gateway.extend(asked.id, to, "complexity").await,
            Ok(Changed::Yes)
        );
        let same = to;
        assert_eq!(
            gateway.extend(asked.id, same, "complexity").await,
            Ok(Changed::Already)
        );
        assert_eq!(
            gateway
                .extend(asked.id, to + Duration::from_secs(1), "complexity")
                .await,
            Ok(Changed::TooLate)
        );
        assert_eq!(
            gateway
                .extend(sooner.id, sooner.received_at, "complexity")
                .await,
            Err(LedgerError::Refused("DR002".to_owned()))
        );
        assert_eq!(
            gateway.extend(sooner.id, to, "Mrs. Miller asked").await,
            Err(LedgerError::Refused("23514".to_owned()))
        );
        let listed = gateway
            .list(&ListFilter::default(), None, 10)
            .await
            .unwrap();
        let ids: Vec<Uuid> = listed.iter().map(|l| l.id).collect();
        assert_eq!(ids, [sooner.id, asked.id]);
        assert!(listed[1].extended);
        assert_eq!(claim(&worker, "crm", 1).await[0].step.request, sooner.id);

        // In a worker's hands it can't be withdrawn, and after something is done neither.
        assert_eq!(gateway.withdraw(sooner.id).await, Ok(Changed::TooLate));
        let cache = claim(&worker, "cache", 1).await;
        let settle = How::Settle {
            after: Duration::from_secs(60),
            erasure: Evidence::default(),
        };
        worker.finish(&[finished(&cache[0], settle)]).await.unwrap();
        assert_eq!(gateway.withdraw(sooner.id).await, Ok(Changed::TooLate));
        // What only failed can.
        let crm = claim(&worker, "crm", 1).await;
        assert_eq!(crm[0].step.request, asked.id);
        assert_eq!(gateway.withdraw(asked.id).await, Ok(Changed::TooLate));
        let retry = How::Retry {
            after: Duration::ZERO,
            reason: "unreachable",
        };
        worker.finish(&[finished(&crm[0], retry)]).await.unwrap();
        assert_eq!(gateway.withdraw(asked.id).await, Ok(Changed::Yes));
        assert_eq!(gateway.withdraw(asked.id).await, Ok(Changed::Already));
        assert_eq!(gateway.approve(asked.id).await, Ok(Changed::TooLate));
        assert_eq!(
            gateway.extend(asked.id, to, "x").await,
            Ok(Changed::TooLate)
        );
        let unknown = Uuid::now_v7();
        assert_eq!(gateway.withdraw(unknown).await, Ok(Changed::Unknown));
        assert_eq!(gateway.approve(unknown).await, Ok(Changed::Unknown));
        assert_eq!(gateway.extend(unknown, to, "x").await, Ok(Changed::Unknown));
        assert_eq!(claim(&worker, "crm", 9).await, []);
        let view = gateway.read(asked.id).await.unwrap().unwrap();
        assert_eq!(view.state, State::Withdrawn);
        assert!(view.steps.iter().any(|s| s.failures == 1));
        let root = bed
            .superuser(&domicile::api::names::rights::database("w"))
            .await;
        let erased: i64 = root
            .query_one("SELECT count(*) FROM ledger.erased", &[])
            .await
            .unwrap()
            .get(0);
        assert_eq!(erased, 0);
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn lists_are_walked_page_by_page_without_a_gap() {
    bounded(async {
        let bed = Bed::start(&[]).await;
        bed.workflow("w").await;
        let (_dir, keyring) = keys();
        let (gateway, worker) = (
            bed.ledger("w", Role::Gateway),
            bed.ledger("w", Role::Worker),
        );
        let targets = [target("crm", &[HERE])];
        // Many with one deadline, half of them to be approved.
        let received = now();
        let filings: Vec<_> = (0..50_u32)
            .map(|n| {
                let mut it = filing(&format!("{n}@example.org"));
                it.received_at = received;
                it.needs_approval = n % 2 == 0;
                sealed(&keyring, &it, 10 + i64::from(n % 3))
            })
            .collect();
        gateway.file(&filings, &targets).await.unwrap();
        let walk = async |filter: ListFilter, page: u32| {
            let (mut all, mut after): (Vec<_>, Option<Cursor>) = (Vec::new(), None);
            loop {
                let some = gateway.list(&filter, after, page).await.unwrap();
                assert!(some.len() <= page as usize);
                let Some(last) = some.last() else { break };
                after = Some(last.cursor());
                all.extend(some);
            }
            all
        };
        let all = walk(ListFilter::default(), 7).await;
        let mut expected: Vec<_> = filings.iter().map(|f| (f.answer_by, f.id)).collect();
        expected.sort();
        let got: Vec<_> = all.iter().map(|l| (l.deadline, l.id)).collect();
        assert_eq!(got, expected);
        let of = |state, due_before| ListFilter { state, due_before };
        assert_eq!(walk(of(Some(State::Open), None), 4).await.len(), 25);
        let before = received + Duration::from_secs(86_400 * 11 - 60);
        assert_eq!(walk(of(None, Some(before)), 4).await.len(), 17);

        for claimed in claim(&worker, "crm", 100).await {
            worker.finish(&[absent(&claimed)]).await.unwrap();
        }
        let closed = walk(of(Some(State::Closed), None), 4).await;
        assert_eq!(closed.len(), 25);
        assert!(closed.windows(2).all(|w| w[0].closed_at <= w[1].closed_at));
        assert!(closed.iter().all(|l| l.steps_done == 1));
        assert_eq!(walk(of(Some(State::Withdrawn), None), 4).await.len(), 0);
    })
    .await;
}
