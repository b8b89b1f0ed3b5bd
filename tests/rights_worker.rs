//! Workers against a real ledger and real targets, while everything that can fail fails.
//!
//! `DOMICILE_SCHEDULES` (10): how many schedules of faults; `DOMICILE_SEED`: the first one's seed, printed at the start.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    clippy::large_futures,
    reason = "a test that can't go on should say so and stop; and each is one future, polled where it lies"
)]

#[path = "instance_bed/mod.rs"]
mod instance_bed;

#[path = "gateway_bed/client.rs"]
#[allow(
    dead_code,
    reason = "shared with the gateway's own tests, which use more of it"
)]
mod client;

#[path = "rights_worker/bed.rs"]
mod bed;
#[path = "rights_worker/checker.rs"]
mod checker;
#[path = "rights_worker/faults.rs"]
mod faults;
#[path = "rights_worker/people.rs"]
mod people;
#[path = "rights_worker/relay.rs"]
mod relay;
#[path = "rights_worker/volume.rs"]
mod volume;

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use nix::sys::signal::Signal;
use rand::SeedableRng as _;
use rand::rngs::StdRng;
use tokio::sync::Mutex;
use uuid::Uuid;

use bed::{Bed, cache, redis_target, shop, shop_and_cache, until};
use checker::held;
use people::{Person, ask, file, people, plant, targets};

/// One bed at a time: these tests measure times, and there are few cores.
static ALONE: Mutex<()> = Mutex::const_new(());

async fn drained(bed: &Bed, asked: &BTreeMap<Uuid, Person>) -> Duration {
    let ids: Vec<Uuid> = asked.keys().copied().collect();
    let ledger = bed.ledger_admin().await;
    until("nothing is left open", async || {
        checker::open(&ledger, &ids).await.unwrap() == 0
    })
    .await
}

/// One line of the checker's history, for a failure's sake.
async fn state(bed: &Bed, id: Uuid) -> Vec<(String, String, i32)> {
    let rows = bed
        .ledger_admin()
        .await
        .query(
            "SELECT l.target, s.state, s.failures FROM ledger.step s JOIN ledger.lane l ON l.id = s.lane
             WHERE s.request = $1 ORDER BY 1",
            &[&id],
        )
        .await
        .unwrap();
    rows.iter()
        .map(|r| (r.get(0), r.get(1), r.get(2)))
        .collect()
}

fn only(asked: &BTreeMap<Uuid, Person>) -> Uuid {
    *asked.keys().next().unwrap()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn one_person_is_gone_with_proof_at_once() {
    let _alone = ALONE.lock().await;
    let wanted = serde_json::json!([shop(), cache(0)]);
    let bed = Bed::new(1, &wanted).await;
    checker::install(&bed).await;
    bed.start();
    let (asks, others) = people("one", 12);
    let (shop, mut redis) = (bed.shop_admin().await, bed.redis().await.unwrap());
    plant(&shop, &mut redis, &asks).await;
    plant(&shop, &mut redis, &others).await;
    until("the worker is ready", async || {
        bed.workers[0]
            .get("/readyz")
            .await
            .is_some_and(|(s, _)| s == 200)
    })
    .await;
    let wanted = targets(&wanted);
    let mut all = BTreeMap::new();
    let mut took = Vec::new();
    for person in &asks {
        let asked = file(&bed, &wanted, std::slice::from_ref(person)).await;
        took.push(drained(&bed, &asked).await);
        all.extend(asked);
    }
    took.sort();
    println!("accepted -> closed, one at a time: {took:?}");
    checker::check(&bed, &all, &others).await;
    let worker = &bed.workers[0];
    assert_eq!(
        worker.metric("rights_propagation_seconds_count", "").await,
        2.0 * all.len() as f64
    );
    assert_eq!(worker.get("/livez").await.unwrap().0, 200);
}

/// A late writer: the cache is filled again after it was erased and read as empty.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_cache_that_is_filled_again_is_erased_again() {
    let _alone = ALONE.lock().await;
    let wanted = serde_json::json!([shop(), cache(2)]);
    let bed = Bed::new(1, &wanted).await;
    checker::install(&bed).await;
    bed.start();
    let (asks, others) = people("late", 3);
    let (shop, mut redis) = (bed.shop_admin().await, bed.redis().await.unwrap());
    plant(&shop, &mut redis, &asks).await;
    let asked = file(&bed, &targets(&wanted), &asks).await;
    let late = &asks[1];
    until("the cache is empty", async || {
        held(&shop, &mut redis, late).await.1 == 0
    })
    .await;
    let key = &late.keys()[0];
    redis::cmd("SET")
        .arg(key)
        .arg("stale")
        .exec_async(&mut redis)
        .await
        .unwrap();
    drained(&bed, &asked).await;
    let resurrections = bed.workers[0]
        .metric("rights_resurrections_total", "sink=\"cache\"")
        .await;
    assert_eq!(resurrections, 1.0);
    checker::check(&bed, &asked, &[]).await;
    drop(others);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_target_that_is_away_starves_nobody_and_is_found_again_at_once() {
    let _alone = ALONE.lock().await;
    let nowhere = redis_target("nowhere", 0, &["x:{customerId}"]);
    let wanted = serde_json::json!([shop(), cache(0), nowhere]);
    let bed = Bed::new(1, &wanted).await;
    bed.start();
    let (asks, _) = people("away", 40);
    let (shop, mut redis) = (bed.shop_admin().await, bed.redis().await.unwrap());
    plant(&shop, &mut redis, &asks).await;
    let asked = file(&bed, &targets(&wanted), &asks).await;
    let ledger = bed.ledger_admin().await;
    let done = async |target: &'static str| -> i64 {
        let sql = "SELECT count(*) FROM ledger.step s JOIN ledger.lane l ON l.id = s.lane
                   WHERE l.target = $1 AND s.state = 'done'";
        ledger.query_one(sql, &[&target]).await.unwrap().get(0)
    };
    let people = i64::try_from(asked.len()).unwrap();
    let took = until("the others are done", async || {
        done("shop").await + done("cache").await == 2 * people
    })
    .await;
    println!(
        "{people} people gone from two targets, a third being away, in {} ms",
        took.as_millis()
    );
    assert_eq!(done("nowhere").await, 0);
    let worker = &bed.workers[0];
    assert!(
        worker
            .metric("rights_breaker_state", "sink=\"nowhere\"")
            .await
            > 0.0
    );
    let failures: i32 = ledger
        .query_one("SELECT max(failures) FROM ledger.step", &[])
        .await
        .unwrap()
        .get(0);
    assert_eq!(
        failures, 0,
        "nobody's failure is counted while the target is away"
    );
    // It is there again: somebody corrects the URL. Credentials are read whenever a connection is made.
    let url = format!("redis://:r-secret@127.0.0.1:{}", bed.redis_port);
    std::fs::write(bed.dir.path().join("targets-a/nowhere/url"), url).unwrap();
    let took = drained(&bed, &asked).await;
    println!(
        "all closed {} ms after the target came back",
        took.as_millis()
    );
    assert!(took < Duration::from_secs(15));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_person_who_makes_the_target_fail_holds_up_nobody() {
    let _alone = ALONE.lock().await;
    let wanted = serde_json::json!([shop()]);
    let bed = Bed::new(1, &wanted).await;
    let (asks, _) = people("poison", 60);
    let (shop, mut redis) = (bed.shop_admin().await, bed.redis().await.unwrap());
    plant(&shop, &mut redis, &asks).await;
    let poison = &asks[17];
    shop.batch_execute(&format!(
        "CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
             IF OLD.id = '{}' THEN RAISE EXCEPTION 'no: %', OLD.id; END IF; RETURN OLD; END $$;
         CREATE TRIGGER refuse BEFORE DELETE ON customers FOR EACH ROW EXECUTE FUNCTION refuse();",
        poison.id
    ))
    .await
    .unwrap();
    let asked = file(&bed, &targets(&wanted), &asks).await;
    bed.start();
    let (bad, good): (BTreeMap<_, _>, BTreeMap<_, _>) =
        asked.into_iter().partition(|(_, p)| p.id == poison.id);
    let took = drained(&bed, &good).await;
    println!(
        "{} people gone beside one who can't be, in {} ms",
        good.len(),
        took.as_millis()
    );
    let id = only(&bad);
    until(
        "the one who can't be has failed more than once",
        async || state(&bed, id).await[0].2 > 1,
    )
    .await;
    assert!(
        !bed.logged().contains(&poison.id),
        "the server quoted the value, and it was passed on"
    );
    // Others aren't slowed down by it either.
    let (more, _) = people("after", 5);
    plant(&shop, &mut redis, &more).await;
    let asked = file(&bed, &targets(&wanted), &more).await;
    drained(&bed, &asked).await;
    shop.batch_execute("DROP TRIGGER refuse ON customers")
        .await
        .unwrap();
    drained(&bed, &bad).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn targets_come_and_go_without_a_restart() {
    let _alone = ALONE.lock().await;
    let late = redis_target("late", 0, &["late:{customerId}"]);
    let both = serde_json::json!([cache(0), late]);
    let one = serde_json::json!([cache(0)]);
    let elsewhere = {
        let mut late = late.clone();
        late["regions"] = serde_json::json!(["there"]);
        serde_json::json!([cache(0), late])
    };
    let bed = Bed::new(1, &one).await;
    bed.start();
    let (asks, _) = people("come", 3);
    let asked = file(&bed, &targets(&both), &asks[..1]).await;
    let id = only(&asked);
    until("the target that the worker knows is done", async || {
        state(&bed, id).await[0].1 == "done"
    })
    .await;
    assert_eq!(state(&bed, id).await[1].1, "ready");
    bed.targets(&both);
    drained(&bed, &asked).await;

    // Of another region from now on: what was filed for that region isn't touched.
    bed.targets(&elsewhere);
    until("the target is let go of", async || {
        bed.logged().contains("no longer worked on")
    })
    .await;
    let asked = file(&bed, &targets(&elsewhere), &asks[1..2]).await;
    let id = only(&asked);
    until("the target that is left is done", async || {
        state(&bed, id).await[0].1 == "done"
    })
    .await;
    // Whoever had claimed it would have done so by now: it polls every second.
    tokio::time::sleep(Duration::from_millis(1_500)).await;
    assert_eq!(state(&bed, id).await[1].1, "ready");
    // What is wrong is said once, and what was read before stays in force.
    std::fs::write(&bed.config, "{").unwrap();
    until("it is said", async || {
        bed.logged().contains("can't use the configuration")
    })
    .await;
    let asked = file(&bed, &targets(&one), &asks[2..]).await;
    drained(&bed, &asked).await;
    assert_eq!(
        bed.logged().matches("can't use the configuration").count(),
        1
    );
}

/// A worker that is asked to end gives back what it has: nobody waits for its leases.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_worker_that_is_asked_to_end_holds_nothing() {
    let _alone = ALONE.lock().await;
    let wanted = serde_json::json!([shop()]);
    let bed = Bed::new(1, &wanted).await;
    let (asks, _) = people("stop", 200);
    let (shop, mut redis) = (bed.shop_admin().await, bed.redis().await.unwrap());
    plant(&shop, &mut redis, &asks).await;
    // So that something is under way for long enough.
    shop.batch_execute("BEGIN; LOCK TABLE mails IN ACCESS EXCLUSIVE MODE")
        .await
        .unwrap();
    let asked = file(&bed, &targets(&wanted), &asks).await;
    bed.start();
    let ledger = bed.ledger_admin().await;
    let leased = async || -> i64 {
        let sql = "SELECT count(*) FROM ledger.step WHERE state = 'leased'";
        ledger.query_one(sql, &[]).await.unwrap().get(0)
    };
    until("steps are held", async || leased().await > 0).await;
    let began = Instant::now();
    bed.workers[0].process.signal(Signal::SIGTERM);
    until("the worker has ended", async || {
        bed.workers[0].process.ended().is_some()
    })
    .await;
    assert_eq!(bed.workers[0].process.ended(), Some(true));
    println!(
        "ended {} ms after it was asked to",
        began.elapsed().as_millis()
    );
    assert_eq!(leased().await, 0);
    shop.batch_execute("COMMIT").await.unwrap();
    bed.start();
    drained(&bed, &asked).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn whatever_fails_nothing_is_lost_and_nothing_closed_without_proof() {
    let _alone = ALONE.lock().await;
    let number =
        |name: &str, default: u64| std::env::var(name).map_or(default, |v| v.parse().unwrap());
    let schedules = number("DOMICILE_SCHEDULES", 10);
    let first = number("DOMICILE_SEED", rand::random::<u32>().into());
    let wanted = shop_and_cache();
    let bed = Bed::new(2, &wanted).await;
    checker::install(&bed).await;
    bed.start();
    bed.gateway.start();
    let mut desk = bed.desk();
    let (mut slowest, mut zombies) = (Duration::ZERO, 0.0);
    for seed in first..first + schedules {
        let mut rng = StdRng::seed_from_u64(seed);
        let faults = faults::draw(&mut rng);
        println!("schedule DOMICILE_SEED={seed} DOMICILE_SCHEDULES=1: {faults:?}");
        let (mut asks, others) = people(&format!("{seed:x}"), 60);
        let (last, _) = people(&format!("{seed:x}-last"), 1);
        let shop = bed.shop_admin().await;
        let mut redis = bed.redis().await.unwrap();
        for some in [&asks, &others, &last] {
            plant(&shop, &mut redis, some).await;
        }
        // Half of them first; the others in the middle of it, a few at a time.
        let later = asks.split_off(asks.len() / 2);
        let mut asked = ask(&mut desk, &asks).await;
        let filing = async {
            let mut asked = BTreeMap::new();
            for few in later.chunks(5) {
                asked.extend(ask(&mut desk, few).await);
                tokio::time::sleep(Duration::from_millis(400)).await;
            }
            asked
        };
        let happening = futures::future::join_all(faults.iter().map(|f| faults::happen(&bed, *f)));
        let (more, _) = tokio::join!(filing, happening);
        asked.extend(more);

        // The faults have ended: one more is as fast as ever, and nothing is left open.
        bed.start();
        let one_more = ask(&mut desk, &last[..1]).await;
        let normal = drained(&bed, &one_more).await;
        let rest = drained(&bed, &asked).await;
        println!(
            "  after the faults: one more closed after {} ms (its cache settles for 1000), all after {} ms",
            normal.as_millis(),
            (normal + rest).as_millis()
        );
        slowest = slowest.max(normal + rest);
        asked.extend(one_more);
        checker::check(&bed, &asked, &others).await;
        assert_eq!(bed.gateway.ended(), None, "the gateway ended by itself");
        for worker in &bed.workers {
            zombies += worker.metric("rights_outdated_results_total", "").await;
        }
    }
    println!(
        "{schedules} schedules; slowest end of all after faults: {} ms; results that came too late (summed, so far): {zombies}",
        slowest.as_millis()
    );
    // Five seconds are the promise, of which this machine may make more.
    assert!(slowest < Duration::from_secs(45));
}

/// Not asserted: how fast five thousand requests are carried out, by a build without optimisation.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn five_thousand_requests() {
    let _alone = ALONE.lock().await;
    let wanted = serde_json::json!([shop(), cache(0)]);
    let bed = Bed::new(1, &wanted).await;
    let asks: Vec<Person> = (0..5_000)
        .map(|n| Person::new(format!("many-{n}")))
        .collect();
    let (shop, mut redis) = (bed.shop_admin().await, bed.redis().await.unwrap());
    plant(&shop, &mut redis, &asks).await;
    let filed_for = targets(&wanted);
    let mut asked = BTreeMap::new();
    let began = Instant::now();
    for some in asks.chunks(500) {
        asked.extend(file(&bed, &filed_for, some).await);
    }
    println!("5000 requests filed in {} ms", began.elapsed().as_millis());
    bed.start();
    let began = Instant::now();
    drained(&bed, &asked).await;
    let took = began.elapsed().as_secs_f64();
    println!(
        "5000 requests, 10000 steps drained in {took:.2} s from the worker's start: {:.0} steps/s",
        10_000.0 / took
    );
    for person in asks.iter().step_by(97) {
        assert_eq!(held(&shop, &mut redis, person).await, (0, 0));
    }
}
