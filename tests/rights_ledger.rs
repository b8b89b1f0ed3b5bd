//! The ledger on a real PostgreSQL: what is accepted is kept, what is claimed is one worker's, what is ended is proven,
//! and nobody may do more than it needs.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "a test that can't go on should say so and stop"
)]

mod instance_bed;
mod ledger_bed;

#[path = "rights_ledger/claims.rs"]
mod claims;
#[path = "rights_ledger/durability.rs"]
mod durability;
#[path = "rights_ledger/filing.rs"]
mod filing;
#[path = "rights_ledger/reach.rs"]
mod reach;
#[path = "rights_ledger/roles.rs"]
mod roles;
#[path = "rights_ledger/scale.rs"]
mod scale;
#[path = "rights_ledger/schema.rs"]
mod schema;

use std::time::Duration;

use domicile::rights::ledger::{Claimed, Finished, How, Ledger};
use domicile::rights::model::{Evidence, Outcome};

const LEASE: Duration = Duration::from_secs(30);
const HERE: &str = "here";

fn bounded<'a>(test: impl Future<Output = ()> + 'a) -> futures::future::LocalBoxFuture<'a, ()> {
    Box::pin(async {
        tokio::time::timeout(Duration::from_secs(240), Box::pin(test))
            .await
            .expect("the test ends in time");
    })
}

fn evidence() -> Evidence {
    let mut evidence = Evidence::default();
    evidence.0.insert("rows".to_owned(), 3.into());
    evidence
        .0
        .insert("nothing".to_owned(), serde_json::Value::Null);
    evidence
}

fn finished(claimed: &Claimed, how: How) -> Finished {
    Finished {
        step: claimed.step,
        lease: claimed.lease,
        how,
    }
}

fn absent(claimed: &Claimed) -> Finished {
    finished(claimed, How::Done(Outcome::Absent, evidence()))
}

async fn claim(worker: &Ledger, target: &str, most: u32) -> Vec<Claimed> {
    worker
        .claim(target, HERE, "worker-1", most, LEASE)
        .await
        .unwrap()
}
