//! What goes wrong, when, for how long: drawn from a seed.

use std::time::Duration;

use nix::sys::signal::Signal;
use rand::Rng;
use rand::seq::IndexedRandom as _;

use crate::bed::Bed;
use crate::relay::Relay;

#[derive(Clone, Copy, Debug)]
pub enum What {
    /// A worker is killed, and started again after the time.
    KillWorker(usize),
    /// A worker stands still for the time, longer than its leases perhaps, and goes on as if nothing had been.
    FreezeWorker(usize),
    /// The ledger's PostgreSQL is killed, and started again after the time.
    KillLedger,
    /// The target's PostgreSQL is.
    KillShop,
    /// Redis is.
    KillRedis,
    /// The gateway is, while clients file.
    KillGateway,
    /// What gateway and workers send to the ledger, and what it answers, arrives after the time.
    CutLedger,
    /// Of one worker to the shop.
    CutShop(usize),
    /// Of one worker to Redis.
    CutRedis(usize),
    /// The volume under the ledger is full.
    FillLedger,
    /// A worker's clock is wrong by an hour, this way or that.
    SetClock(usize, bool),
    /// Redis stands still for the time.
    FreezeRedis,
    /// Somebody holds a lock on a table.
    LockTable,
    /// A table is away under another name.
    RenameTable,
}

#[derive(Clone, Copy, Debug)]
pub struct Fault {
    pub what: What,
    /// From the beginning of the schedule.
    pub begins: Duration,
    pub lasts: Duration,
}

/// Up to six faults, which may coincide. One worker at least is always left alone by the first of them.
pub fn draw(rng: &mut impl Rng) -> Vec<Fault> {
    let all = [
        What::KillWorker(0),
        What::KillWorker(1),
        What::FreezeWorker(0),
        What::FreezeWorker(1),
        What::KillLedger,
        What::KillShop,
        What::KillRedis,
        What::FreezeRedis,
        What::LockTable,
        What::RenameTable,
        What::KillGateway,
        What::CutLedger,
        What::CutShop(0),
        What::CutShop(1),
        What::CutRedis(0),
        What::CutRedis(1),
        What::FillLedger,
        What::SetClock(0, true),
        What::SetClock(1, false),
    ];
    let number = rng.random_range(1..=6);
    // Each at most once: a server that is killed while it is started again is not what is to be seen here.
    let drawn: Vec<What> = all.choose_multiple(rng, number).copied().collect();
    drawn
        .into_iter()
        .map(|what| Fault {
            what,
            begins: Duration::from_millis(rng.random_range(0..3_000)),
            lasts: Duration::from_millis(match what {
                What::FreezeWorker(_) | What::CutLedger | What::CutShop(_) => {
                    rng.random_range(500..7_000)
                }
                _ => rng.random_range(100..3_500),
            }),
        })
        .collect()
}

/// Lets a fault happen, and mends what it broke.
pub async fn happen(bed: &Bed, fault: Fault) {
    tokio::time::sleep(fault.begins).await;
    let lasts = tokio::time::sleep(fault.lasts);
    match fault.what {
        What::KillWorker(n) => {
            bed.workers[n].process.kill();
            lasts.await;
            bed.workers[n].process.start();
        }
        What::FreezeWorker(n) => {
            bed.workers[n].process.signal(Signal::SIGSTOP);
            lasts.await;
            bed.workers[n].process.signal(Signal::SIGCONT);
        }
        What::KillLedger => {
            bed.ledger.process.kill();
            lasts.await;
            bed.ledger.up().await;
        }
        What::KillShop => {
            bed.shop.process.kill();
            lasts.await;
            bed.shop.up().await;
        }
        What::KillRedis => {
            bed.redis.kill();
            lasts.await;
            bed.redis.start();
        }
        What::KillGateway => {
            bed.gateway.kill();
            lasts.await;
            bed.gateway.start();
        }
        What::CutLedger => cut(&bed.to_ledger, lasts).await,
        What::CutShop(n) => cut(&bed.to_shop[n], lasts).await,
        What::CutRedis(n) => cut(&bed.to_redis[n], lasts).await,
        What::FillLedger => {
            let Some(volume) = &bed.volume else {
                println!("  nobody here may mount: the ledger's volume isn't filled");
                return;
            };
            tokio::task::block_in_place(|| volume.fill());
            lasts.await;
            volume.empty();
            // It stops where it can't write its log any more.
            bed.ledger.up().await;
        }
        What::SetClock(n, ahead) => {
            let process = &bed.workers[n].process;
            process.set_clock(if ahead { 3_600 } else { -3_600 });
            process.kill();
            process.start();
            lasts.await;
            process.set_clock(0);
            process.kill();
            process.start();
        }
        What::FreezeRedis => {
            bed.redis.signal(Signal::SIGSTOP);
            lasts.await;
            bed.redis.signal(Signal::SIGCONT);
        }
        What::LockTable => {
            let shop = bed.shop_admin().await;
            // The server may be killed meanwhile: then so is the lock.
            let locked = shop
                .batch_execute("BEGIN; LOCK TABLE orders IN ACCESS EXCLUSIVE MODE")
                .await;
            lasts.await;
            if locked.is_ok() {
                let _ = shop.batch_execute("COMMIT").await;
            }
        }
        What::RenameTable => {
            rename(bed, "orders", "orders_away").await;
            lasts.await;
            rename(bed, "orders_away", "orders").await;
        }
    }
}

async fn cut(way: &Relay, lasts: tokio::time::Sleep) {
    way.cut(true);
    lasts.await;
    way.cut(false);
}

/// Until it is so, whatever happens to the server.
async fn rename(bed: &Bed, from: &str, to: &str) {
    loop {
        let shop = bed.shop_admin().await;
        let done = shop
            .batch_execute(&format!("ALTER TABLE IF EXISTS {from} RENAME TO {to}"))
            .await;
        let there = shop
            .query_one("SELECT to_regclass($1) IS NOT NULL", &[&to])
            .await;
        if done.is_ok() && there.is_ok_and(|row| row.get(0)) {
            return;
        }
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
}
