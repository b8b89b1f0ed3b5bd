//! People, what is held of them, and their requests.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use domicile::api::rights_workflow::Regime;
use domicile::rights::config::Target;
use domicile::rights::ledger::{Filed, SealedFiling};
use domicile::rights::model::{Channel, Filing, Identifiers, Kind};
use jiff::{SignedDuration, Timestamp};
use serde_json::json;
use tokio_postgres::Client;
use uuid::Uuid;

use crate::bed::{Bed, PATIENCE};
use crate::client::{Client as Desk, post};

#[derive(Clone, Debug)]
pub struct Person {
    pub id: String,
    pub email: String,
}

impl Person {
    pub fn new(id: String) -> Self {
        Self {
            email: format!("{id}@example.org"),
            id,
        }
    }

    /// Two keys, of which one is found by walking.
    pub fn keys(&self) -> Vec<String> {
        vec![
            format!("profile:{}", self.id),
            format!("session:{}:x", self.id),
        ]
    }

    /// Rows and keys that [`plant`] makes.
    pub fn planted(&self) -> (i64, i64) {
        (4, 2)
    }

    pub fn filing(&self) -> Filing {
        let identifiers = [("customerId", &self.id), ("email", &self.email)];
        Filing {
            id: Uuid::now_v7(),
            kind: Kind::Deletion,
            regimes: vec![Regime::EuGdpr],
            identifiers: Identifiers(
                identifiers
                    .into_iter()
                    .map(|(name, value)| (name.to_owned(), value.clone()))
                    .collect(),
            ),
            channel: Channel::Api,
            received_at: Timestamp::now(),
            needs_approval: false,
            idempotency_key: None,
        }
    }
}

/// People of a schedule, and others whose names look like theirs. Some of those who ask have names that are patterns.
pub fn people(prefix: &str, number: usize) -> (Vec<Person>, Vec<Person>) {
    let name = |what: &str| Person::new(format!("canary-{prefix}-{what}"));
    let mut asks: Vec<Person> = (0..number).map(|n| name(&format!("{n:03}"))).collect();
    for pattern in ["*", "0?0", "%", "[0-9]00", "'; DROP TABLE customers; --"] {
        asks.push(name(pattern));
    }
    let mut others: Vec<Person> = (0..number)
        .step_by(4)
        .flat_map(|n| [format!("{n:03}0"), format!("{n:03}*"), format!("{n:02}")])
        .map(|what| name(&what))
        .collect();
    others.push(Person::new(format!("*{prefix}")));
    others.push(Person::new(format!("{prefix}-%")));
    others.retain(|other| asks.iter().all(|asking| asking.id != other.id));
    (asks, others)
}

pub async fn plant(
    shop: &Client,
    redis: &mut redis::aio::MultiplexedConnection,
    people: &[Person],
) {
    let ids: Vec<&str> = people.iter().map(|p| p.id.as_str()).collect();
    let emails: Vec<&str> = people.iter().map(|p| p.email.as_str()).collect();
    shop.execute(
        "INSERT INTO customers SELECT i, e, 'name' FROM unnest($1::text[], $2::text[]) AS t (i, e)",
        &[&ids, &emails],
    )
    .await
    .unwrap();
    shop.execute(
        "INSERT INTO orders (customer_id, what) SELECT i, 'thing' FROM unnest($1::text[]) AS t (i), generate_series(1, 2)",
        &[&ids],
    )
    .await
    .unwrap();
    shop.execute(
        "INSERT INTO mails (address, body) SELECT e, 'text' FROM unnest($1::text[]) AS t (e)",
        &[&emails],
    )
    .await
    .unwrap();
    for chunk in people.chunks(500) {
        let mut pipe = redis::pipe();
        for person in chunk {
            for key in person.keys() {
                pipe.set(key, "value").ignore();
            }
        }
        pipe.query_async::<()>(redis).await.unwrap();
    }
}

pub fn targets(value: &serde_json::Value) -> Vec<Target> {
    serde_json::from_value(value.clone()).unwrap()
}

pub fn sealed(bed: &Bed, person: &Person) -> SealedFiling {
    let filing = person.filing();
    let answer_by = filing.received_at + SignedDuration::from_hours(24 * 30);
    bed.keyring.seal(&filing, None, answer_by).unwrap()
}

/// Files for these people until it is acknowledged, whatever happens to the ledger meanwhile.
pub async fn file(bed: &Bed, targets: &[Target], people: &[Person]) -> BTreeMap<Uuid, Person> {
    let filings: Vec<SealedFiling> = people.iter().map(|p| sealed(bed, p)).collect();
    loop {
        match bed.filer.file(&filings, targets).await {
            Ok(answers) => {
                bed.waker.wake();
                for answer in answers {
                    assert!(!matches!(answer, Filed::Conflict(_)));
                }
                let ids = filings.iter().map(|f| f.id);
                return ids.zip(people.iter().cloned()).collect();
            }
            Err(_) => tokio::time::sleep(Duration::from_millis(50)).await,
        }
    }
}

/// Files for these people at the gateway, each with a key of its own, until it is answered for, whatever happens to gateway
/// and ledger meanwhile. The ids are the gateway's.
pub async fn ask(desk: &mut Desk, people: &[Person]) -> BTreeMap<Uuid, Person> {
    let mut asked = BTreeMap::new();
    for person in people {
        let body = json!({ "kind": "deletion",
            "identifiers": { "customerId": person.id, "email": person.email } });
        let key = Uuid::now_v7().to_string();
        let began = Instant::now();
        let id = loop {
            assert!(began.elapsed() < PATIENCE, "the gateway takes nothing");
            let answer = desk.try_ask(post("/v1/requests", Some(&key), &body)).await;
            match answer {
                Ok(answer) if [200, 201].contains(&answer.status) => break answer.id(),
                Ok(answer) => assert!(
                    [429, 503].contains(&answer.status),
                    "{} {}",
                    answer.status,
                    answer.text
                ),
                // No answer: it may have been filed, and is asked for again under the same key.
                Err(_) => {}
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        };
        asked.insert(id.parse().unwrap(), person.clone());
    }
    asked
}
