//! Reads targets and ledger by itself, and finds what must never be. Shares no code with the worker.
//!
//! Owns its own schema in both databases: what was done to a step, by whom, when; and which rows were deleted, by whom,
//! when. Never: believes what the worker or the ledger's functions say.

use std::collections::{BTreeMap, BTreeSet};

use jiff::Timestamp;
use tokio_postgres::Client;
use uuid::Uuid;

use crate::bed::{Bed, WORKFLOW};
use crate::people::Person;
use domicile::api::names::rights::database;

/// Every change of a step, by whichever connection.
const HISTORY: &str = "
    CREATE SCHEMA checker;
    CREATE TABLE checker.history (n bigint GENERATED ALWAYS AS IDENTITY, at timestamptz, caller text,
        request uuid, lane integer, old_state text, state text, old_worker text, worker text,
        old_lease uuid, lease uuid, old_due timestamptz, due timestamptz);
    CREATE FUNCTION checker.write() RETURNS trigger LANGUAGE plpgsql SECURITY DEFINER AS $$ BEGIN
        INSERT INTO checker.history (at, caller, request, lane, old_state, state, old_worker, worker, old_lease, lease,
                                     old_due, due)
        VALUES (clock_timestamp(), current_setting('application_name'), NEW.request, NEW.lane, OLD.state, NEW.state,
                OLD.worker, NEW.worker, OLD.lease, NEW.lease, OLD.due_at, NEW.due_at);
        RETURN NULL;
    END $$;
    CREATE TRIGGER checker AFTER UPDATE ON ledger.step FOR EACH ROW EXECUTE FUNCTION checker.write();";

/// Every row that was deleted: when its statement reached the server, and who sent it.
const EFFECTS: &str = "
    CREATE SCHEMA checker;
    CREATE TABLE checker.effects (at timestamptz, who text, id text);
    CREATE FUNCTION checker.write() RETURNS trigger LANGUAGE plpgsql SECURITY DEFINER AS $$ BEGIN
        INSERT INTO checker.effects VALUES (statement_timestamp(), session_user, to_jsonb(OLD) ->> TG_ARGV[0]);
        RETURN OLD;
    END $$;
    CREATE TRIGGER checker BEFORE DELETE ON customers FOR EACH ROW EXECUTE FUNCTION checker.write('id');
    CREATE TRIGGER checker BEFORE DELETE ON orders FOR EACH ROW EXECUTE FUNCTION checker.write('customer_id');";

pub async fn install(bed: &Bed) {
    bed.ledger_admin()
        .await
        .batch_execute(HISTORY)
        .await
        .unwrap();
    bed.shop_admin().await.batch_execute(EFFECTS).await.unwrap();
}

/// How many rows and keys there are of a person.
pub async fn held(
    shop: &Client,
    redis: &mut redis::aio::MultiplexedConnection,
    person: &Person,
) -> (i64, i64) {
    let rows: i64 = shop
        .query_one(
            "SELECT (SELECT count(*) FROM customers WHERE id = $1) + (SELECT count(*) FROM orders WHERE customer_id = $1)
                  + (SELECT count(*) FROM mails WHERE address = $2)",
            &[&person.id, &person.email],
        )
        .await
        .unwrap()
        .get(0);
    let keys: i64 = redis::cmd("EXISTS")
        .arg(person.keys())
        .query_async(redis)
        .await
        .unwrap();
    (rows, keys)
}

/// Requests that are not ended, of these.
pub async fn open(ledger: &Client, ids: &[Uuid]) -> Result<i64, tokio_postgres::Error> {
    let row = ledger
        .query_one(
            "SELECT count(*) FROM ledger.request WHERE id = ANY ($1)",
            &[&ids],
        )
        .await?;
    Ok(row.get(0))
}

/// What must hold of these acknowledged requests, each with its person, once nothing is left open. `bystanders` are
/// people who asked for nothing.
pub async fn check(bed: &Bed, asked: &BTreeMap<Uuid, Person>, bystanders: &[Person]) {
    let (ledger, shop) = (bed.ledger_admin().await, bed.shop_admin().await);
    let mut redis = bed.redis().await.unwrap();
    let ids: Vec<Uuid> = asked.keys().copied().collect();
    let text = |row: &tokio_postgres::Row, i: usize| row.get::<_, Option<String>>(i);

    // Nothing that was acknowledged is lost, and nothing is left of its key or ciphertext.
    let ended = ledger
        .query(
            "SELECT id, state, steps::text FROM ledger.closed WHERE id = ANY ($1)",
            &[&ids],
        )
        .await
        .unwrap();
    let found: BTreeSet<Uuid> = ended.iter().map(|row| row.get(0)).collect();
    assert_eq!(
        found.len(),
        asked.len(),
        "requests were lost, or are still open"
    );
    assert_eq!(open(&ledger, &ids).await.unwrap(), 0);
    let left: i64 = ledger
        .query_one(
            "SELECT count(*) FROM ledger.step WHERE request = ANY ($1)",
            &[&ids],
        )
        .await
        .unwrap()
        .get(0);
    assert_eq!(left, 0);

    // Nothing was closed without proof, and the proof is true.
    for row in &ended {
        let id: Uuid = row.get(0);
        assert_eq!(text(row, 1).as_deref(), Some("closed"));
        let steps: Vec<serde_json::Value> = serde_json::from_str(&text(row, 2).unwrap()).unwrap();
        let targets: BTreeSet<&str> = steps.iter().filter_map(|s| s["target"].as_str()).collect();
        assert_eq!(targets, BTreeSet::from(["cache", "shop"]));
        for step in &steps {
            let outcome = step["outcome"]["outcome"].as_str().unwrap();
            assert!(
                ["absent", "bounded"].contains(&outcome),
                "{outcome} of {step}"
            );
            let evidence = step["evidence"].as_object().unwrap();
            assert!(
                evidence["probed"]
                    .as_object()
                    .is_some_and(|p| !p.is_empty())
            );
        }
        assert_eq!(
            held(&shop, &mut redis, &asked[&id]).await,
            (0, 0),
            "closed, and something is there"
        );
    }

    // Nobody else lost anything.
    for person in bystanders {
        assert_eq!(
            held(&shop, &mut redis, person).await,
            person.planted(),
            "data of somebody else was erased"
        );
    }

    check_leases(&ledger, &shop, asked).await;
    check_silence(bed, asked).await;
}

/// No result by anybody but the holder, and no effect outside of a lease.
async fn check_leases(ledger: &Client, shop: &Client, asked: &BTreeMap<Uuid, Person>) {
    let wrong = ledger
        .query(
            "SELECT caller, old_worker, old_state, state FROM checker.history
             WHERE (state IN ('done', 'waiting') OR (state = 'ready' AND old_due > at))
               AND (old_state <> 'leased' OR caller IS DISTINCT FROM 'domicile worker ' || old_worker)",
            &[],
        )
        .await
        .unwrap();
    assert!(
        wrong.is_empty(),
        "{} results of somebody who didn't hold the step: {:?}",
        wrong.len(),
        wrong.first()
    );
    let taken: i64 = ledger
        .query_one(
            "SELECT count(*) FROM checker.history WHERE state = 'leased' AND old_state = 'leased' AND lease <> old_lease",
            &[],
        )
        .await
        .unwrap()
        .get(0);
    assert_eq!(taken, 0, "a lease was taken over without having ended");

    let by_id: BTreeMap<&str, Uuid> = asked.iter().map(|(id, p)| (p.id.as_str(), *id)).collect();
    let mut leases: BTreeMap<(Uuid, String), Vec<(Timestamp, Timestamp)>> = BTreeMap::new();
    let rows = ledger
        .query(
            "SELECT h.request, h.worker, h.at, h.due FROM checker.history h JOIN ledger.lane l ON l.id = h.lane
             WHERE h.state = 'leased' AND l.target = 'shop'",
            &[],
        )
        .await
        .unwrap();
    for row in rows {
        let holder = (row.get(0), row.get(1));
        leases
            .entry(holder)
            .or_default()
            .push((row.get(2), row.get(3)));
    }
    let effects = shop
        .query("SELECT at, who, id FROM checker.effects", &[])
        .await
        .unwrap();
    for row in effects {
        let (at, who, id): (Timestamp, String, String) = (row.get(0), row.get(1), row.get(2));
        let Some(request) = by_id.get(id.as_str()) else {
            continue;
        };
        let worker = who.strip_prefix("eraser_").unwrap().to_owned();
        let held = leases.get(&(*request, worker.clone()));
        assert!(
            held.is_some_and(|held| held.iter().any(|(from, to)| *from <= at && at <= *to)),
            "worker {worker} erased at {at} under no lease; it had {held:?}"
        );
    }
}

/// No identifier anywhere but in the targets: all that was logged, and all that the ledger holds.
async fn check_silence(bed: &Bed, asked: &BTreeMap<Uuid, Person>) {
    let mut places = vec![
        ("the logs".to_owned(), bed.logged_since()),
        ("the ledger's server log".to_owned(), bed.ledger.log()),
    ];
    for worker in &bed.workers {
        if let Some((_, text)) = worker.get("/metrics").await {
            places.push(("metrics".to_owned(), text));
        }
    }
    let dump = std::process::Command::new(crate::instance_bed::bin().join("pg_dump"))
        .args(["-U", "postgres", "-h"])
        .arg(&bed.ledger.dir)
        .args(["-p", &bed.ledger.port.to_string(), &database(WORKFLOW)])
        .output()
        .unwrap();
    assert!(dump.status.success());
    places.push((
        "pg_dump".to_owned(),
        String::from_utf8(dump.stdout).unwrap(),
    ));
    for person in asked.values() {
        for word in [&person.id, &person.email] {
            let hex: String = word.bytes().map(|b| format!("{b:02x}")).collect();
            for (place, text) in &places {
                assert!(!text.contains(word.as_str()), "an identifier is in {place}");
                assert!(
                    !text.contains(&hex),
                    "an identifier is in {place}, in hexadecimal"
                );
            }
        }
    }
}
