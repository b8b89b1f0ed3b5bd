use super::*;
use std::collections::BTreeMap;
use std::sync::Mutex as StdMutex;

use futures::FutureExt as _;
use jiff::Timestamp;
use uuid::Uuid;

use crate::api::rights_workflow::Regime;
use crate::rights::model::{Channel, Kind};

fn sealed(n: u128) -> SealedFiling {
    SealedFiling {
        id: Uuid::from_u128(n),
        kind: Kind::Deletion,
        regimes: vec![Regime::EuGdpr],
        channel: Channel::Api,
        received_at: Timestamp::UNIX_EPOCH,
        needs_approval: false,
        acknowledge_by: None,
        answer_by: Timestamp::UNIX_EPOCH,
        subject: [0; 32],
        idempotency: None,
        content: [0; 32],
        key_epoch: jiff::civil::date(2026, 1, 1),
        wrapped_key: Vec::new(),
        sealed: Vec::new(),
        hashes: Vec::new(),
    }
}

/// What a ledger does with one transaction.
#[derive(Clone, Copy, Debug)]
enum Does {
    /// It commits, and says so.
    Commits,
    /// It commits, and nobody hears of it.
    CommitsUnheard,
    /// It isn't there.
    Away,
    /// Its disk is full.
    Full,
    /// It commits, after two seconds.
    Hangs,
}

/// A ledger that does what it is told, and then commits.
#[derive(Default)]
struct Fake {
    rows: StdMutex<BTreeMap<Uuid, usize>>,
    sizes: StdMutex<Vec<usize>>,
    next: StdMutex<Vec<Does>>,
    /// Filings that it refuses.
    poison: Option<Uuid>,
}

impl Book for Fake {
    fn file<'a>(
        &'a self,
        sealed: &'a [SealedFiling],
    ) -> BoxFuture<'a, Result<Vec<Filed>, LedgerError>> {
        async move {
            sleep(Duration::from_millis(5)).await;
            self.sizes.lock().unwrap().push(sealed.len());
            if sealed.iter().any(|s| Some(s.id) == self.poison) {
                return Err(LedgerError::Refused("23514".into()));
            }
            let does = self.next.lock().unwrap().pop().unwrap_or(Does::Commits);
            match does {
                Does::Away => return Err(LedgerError::Unavailable("away")),
                Does::Full => return Err(LedgerError::Full("its disk is full")),
                Does::Hangs => sleep(Duration::from_secs(2)).await,
                Does::Commits | Does::CommitsUnheard => {}
            }
            let mut rows = self.rows.lock().unwrap();
            let filed = sealed
                .iter()
                .map(|s| {
                    let there = rows.contains_key(&s.id);
                    rows.entry(s.id).or_insert(1);
                    if there { Filed::Same(s.id) } else { Filed::New }
                })
                .collect();
            match does {
                Does::CommitsUnheard => Err(LedgerError::Unavailable("unheard")),
                _ => Ok(filed),
            }
        }
        .boxed()
    }
}

fn start(fake: Fake, room: usize) -> (Arc<Fake>, Intake, JoinSet<()>) {
    let fake = Arc::new(fake);
    let (intake, tasks) = Intake::start(fake.clone(), Arc::default(), room);
    (fake, intake, tasks)
}

fn until() -> Instant {
    Instant::now() + Duration::from_secs(5)
}

#[tokio::test(start_paused = true)]
async fn what_comes_together_goes_together() {
    let (fake, intake, _tasks) = start(Fake::default(), 2000);
    let all = (0..1000).map(|n| {
        let intake = intake.clone();
        async move { intake.file(sealed(n), until()).await }
    });
    for filed in futures::future::join_all(all).await {
        assert_eq!(filed, Ok(Filed::New));
    }
    assert_eq!(fake.rows.lock().unwrap().len(), 1000);
    let sizes = fake.sizes.lock().unwrap().clone();
    assert!(sizes.len() <= 10, "{sizes:?}");
    assert!(sizes.iter().all(|n| *n <= BATCH), "{sizes:?}");
}

#[tokio::test(start_paused = true)]
async fn what_comes_during_a_commit_goes_in_the_next() {
    let (fake, intake, _tasks) = start(Fake::default(), 2000);
    let all = (0..500u64).map(|n| {
        let intake = intake.clone();
        async move {
            sleep(Duration::from_millis(n)).await;
            let began = Instant::now();
            assert_eq!(intake.file(sealed(n.into()), until()).await, Ok(Filed::New));
            began.elapsed()
        }
    });
    let took = futures::future::join_all(all).await;
    // The rest of the one that is under way, and its own; a few milliseconds of the clock's grain.
    assert!(
        took.iter().all(|t| *t <= Duration::from_millis(14)),
        "{took:?}"
    );
    let transactions = fake.sizes.lock().unwrap().len();
    assert!(transactions <= 110, "{transactions}");
}

#[tokio::test(start_paused = true)]
async fn one_that_hangs_holds_up_nobody_for_long() {
    let fake = Fake::default();
    *fake.next.lock().unwrap() = vec![Does::Hangs];
    let (_fake, intake, _tasks) = start(fake, 10);
    let began = Instant::now();
    let first = tokio::spawn({
        let intake = intake.clone();
        async move { intake.file(sealed(1), until()).await }
    });
    sleep(Duration::from_millis(6)).await;
    assert_eq!(intake.file(sealed(2), until()).await, Ok(Filed::New));
    assert!(began.elapsed() < 3 * TURN, "{:?}", began.elapsed());
    assert_eq!(first.await.unwrap(), Ok(Filed::New));
}

#[tokio::test(start_paused = true)]
async fn a_commit_that_nobody_heard_of_is_found_again() {
    let fake = Fake::default();
    // From the end.
    *fake.next.lock().unwrap() = vec![Does::Commits, Does::Away, Does::CommitsUnheard];
    let (fake, intake, _tasks) = start(fake, 10);
    let filed = intake.file(sealed(7), until()).await;
    assert_eq!(filed, Ok(Filed::Same(Uuid::from_u128(7))));
    assert_eq!(fake.rows.lock().unwrap().len(), 1);
}

#[tokio::test(start_paused = true)]
async fn who_waits_too_long_is_told_so_in_time() {
    let fake = Fake::default();
    *fake.next.lock().unwrap() = vec![Does::Away; 10_000];
    let (_fake, intake, _tasks) = start(fake, 10);
    let began = Instant::now();
    assert_eq!(intake.file(sealed(1), until()).await, Err(Trouble::Away));
    let together = intake.file_together(vec![sealed(2), sealed(3)], until());
    assert_eq!(together.await, Err(Trouble::Away));
    assert!(began.elapsed() <= Duration::from_secs(10));
}

#[tokio::test(start_paused = true)]
async fn a_full_ledger_is_not_asked_again() {
    let fake = Fake::default();
    *fake.next.lock().unwrap() = vec![Does::Full];
    let (fake, intake, _tasks) = start(fake, 10);
    let full = Err(Trouble::Full("its disk is full"));
    assert_eq!(intake.file(sealed(1), until()).await, full);
    assert_eq!(fake.sizes.lock().unwrap().len(), 1);
}

#[tokio::test(start_paused = true)]
async fn one_that_the_ledger_refuses_keeps_out_none_of_the_others() {
    let fake = Fake {
        poison: Some(Uuid::from_u128(3)),
        ..Fake::default()
    };
    let (fake, intake, _tasks) = start(fake, 100);
    let all = (0..50).map(|n| {
        let intake = intake.clone();
        async move { (n, intake.file(sealed(n), until()).await) }
    });
    for (n, filed) in futures::future::join_all(all).await {
        let wanted = if n == 3 {
            Err(Trouble::Refused)
        } else {
            Ok(Filed::New)
        };
        assert_eq!(filed, wanted, "{n}");
    }
    assert_eq!(fake.rows.lock().unwrap().len(), 49);
}

#[tokio::test(start_paused = true)]
async fn without_room_nothing_is_taken() {
    let fake = Fake::default();
    *fake.next.lock().unwrap() = vec![Does::Away; 100_000];
    let (fake, intake, _tasks) = start(fake, 4);
    let all = (0..2000).map(|n| {
        let intake = intake.clone();
        async move { intake.file(sealed(n), until()).await }
    });
    let answers = futures::future::join_all(all).await;
    let busy = answers.iter().filter(|a| **a == Err(Trouble::Busy)).count();
    assert!(busy >= 2000 - IN_FLIGHT * BATCH - 4, "{busy}");
    assert!(answers.iter().all(Result::is_err));
    assert!(fake.rows.lock().unwrap().is_empty());
}

/// Whatever the ledger does: who is told that it is in the ledger finds it there, once.
#[tokio::test(start_paused = true)]
async fn nobody_is_told_what_is_not_so() {
    use rand::SeedableRng as _;
    for seed in 0..200 {
        let mut rng = rand::rngs::StdRng::seed_from_u64(seed);
        let fake = Fake::default();
        *fake.next.lock().unwrap() = (0..300)
            .map(|_| match rng.random_range(0..6) {
                0..2 => Does::Commits,
                2..4 => Does::CommitsUnheard,
                4 => Does::Away,
                _ => Does::Full,
            })
            .collect();
        let (fake, intake, _tasks) = start(fake, 64);
        let all = (0..200).map(|n| {
            let intake = intake.clone();
            let wait = Duration::from_millis(rng.random_range(0..50));
            async move {
                sleep(wait).await;
                (Uuid::from_u128(n), intake.file(sealed(n), until()).await)
            }
        });
        for (id, answer) in futures::future::join_all(all).await {
            let there = fake.rows.lock().unwrap().contains_key(&id);
            match answer {
                Ok(Filed::New) => assert!(there, "seed {seed}"),
                Ok(Filed::Same(own)) => assert!(there && own == id, "seed {seed}"),
                Ok(Filed::Conflict(_)) => panic!("seed {seed}"),
                Err(Trouble::Busy | Trouble::Refused) => assert!(!there, "seed {seed}"),
                Err(Trouble::Away | Trouble::Full(_)) => {}
            }
        }
    }
}
