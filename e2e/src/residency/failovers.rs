//! Failovers while labels are missing, stale or forged: nobody may be promoted where no primary may be.
//!
//! A round spoils the labels of some nodes, kills the PostgreSQL of every store's primary, and sees who is promoted on
//! which node. In most rounds the operator has had its one pass before. In some, primary and labels go at the same moment:
//! the instances elect among themselves, without asking the API server anything, so that one whose node has just
//! changed may win before anybody was told; these are counted apart, and such a primary must be stopped like any other
//! copy outside.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use rand::rngs::StdRng;
use rand::seq::{IndexedRandom, SliceRandom};
use rand::{Rng, SeedableRng};
use serde_json::{Value, json};

use super::ground::{Copy, Ground, LIMIT, REGION};
use super::sample::Failover;
use crate::failover::inject::Victim;
use crate::topology::{NODES, Node};

/// The operator's stamp.
const STAMP: &str = "node-restriction.kubernetes.io/domicile-region";
/// How long it is seen who is promoted: an election takes about a second, and a fence two.
const LOOK: Duration = Duration::from_secs(6);
/// A store that is down says so within this: one pass, on a busy machine.
const SAID: f64 = 5.0;

/// What is done to a node's labels.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Spoilt {
    /// None says where it is.
    Missing,
    /// They say that it is abroad.
    Abroad,
    /// They say that it is abroad, and its stamp is forged to say that it isn't.
    Forged,
}

impl Spoilt {
    fn labels(self, node: &Node) -> Value {
        match self {
            Self::Missing => json!({ REGION: null }),
            Self::Abroad => json!({ REGION: "eu-central-1" }),
            Self::Forged => json!({ REGION: "eu-central-1", STAMP: node.region.name }),
        }
    }
}

/// One round: a failover of each store.
///
/// # Errors
/// If it can't be made, or all isn't well again after it.
pub async fn round(ground: &Ground, seed: u64) -> Result<Vec<Failover>> {
    ground.whole().await?;
    let mut rng = StdRng::seed_from_u64(seed);
    let copies = ground.copies().await?;
    let inside: Vec<&Node> = NODES
        .iter()
        .filter(|n| n.region.name != "eu-central")
        .collect();
    let many = *[1, 1, 2, 2, 3, inside.len()]
        .choose(&mut rng)
        .context("a number")?;
    let mut order = inside.clone();
    order.shuffle(&mut rng);
    let mut spoilt = BTreeMap::new();
    for node in order.into_iter().take(many) {
        let ways = [Spoilt::Missing, Spoilt::Abroad, Spoilt::Forged];
        spoilt.insert(node.name, (node, *ways.choose(&mut rng).context("a way")?));
    }
    let race = rng.random_ratio(1, 5);
    let delay = Duration::from_millis(rng.random_range(0..1500));
    let mut primaries = Vec::new();
    for copy in copies.iter().filter(|c| c.primary) {
        primaries.push((copy, Victim::find(&ground.scope, &copy.name).await?));
    }
    let begin = Instant::now();
    let spoil = spoilt.values().map(|(node, how)| {
        let labels = how.labels(node);
        async move { ground.label(node.name, &labels).await }
    });
    let spoil = futures::future::try_join_all(spoil);
    let kill = primaries.iter().map(|(copy, victim)| async move {
        if !race {
            told(ground, copy, begin).await;
            tokio::time::sleep(delay).await;
        }
        // It may have been stopped by then, for being outside: that is a failover too.
        let _ = victim.kill_postmaster();
    });
    let kill = futures::future::join_all(kill);
    let (spoilt_all, _) = tokio::join!(spoil, kill);
    let killed = Instant::now();
    tokio::time::sleep(LOOK).await;
    let each = primaries.iter().map(|(copy, _)| {
        let bad = |node: &str| spoilt.contains_key(node);
        judge(ground, copy, &copies, begin, race, &bad)
    });
    let mut all: Vec<Failover> = each.collect();
    for one in &mut all {
        one.seed = seed;
        let words = |(n, (_, how)): (&&str, &(&Node, Spoilt))| format!("{n} {how:?}");
        one.spoilt = spoilt.iter().map(words).collect();
    }
    println!(
        "round {seed}: {many} nodes, race: {race}, killed after {:.1} s",
        killed.duration_since(begin).as_secs_f64()
    );
    ground.heal().await?;
    spoilt_all?;
    ground.whole().await?;
    Ok(all)
}

/// Waits until the operator has looked at a store: something is outside, or nothing was to be said of it.
async fn told(ground: &Ground, copy: &Copy, begin: Instant) {
    let short = Duration::from_secs(5);
    let said = ground
        .history
        .first(&copy.store, begin, short, |s| s.resident.0 == "False");
    // A store none of whose copies is on those nodes has nothing to say.
    let _ = said.await;
}

fn judge(
    ground: &Ground,
    copy: &Copy,
    copies: &[Copy],
    begin: Instant,
    race: bool,
    bad: &dyn Fn(&str) -> bool,
) -> Failover {
    let seen = ground.history.since(&copy.store, begin);
    let ours = || copies.iter().filter(|c| c.store == copy.store);
    let nowhere = ours().all(|c| bad(&c.node));
    let said = seen.iter().find(|s| s.resident.0 == "False");
    let mut one = Failover {
        race,
        nowhere,
        said: said.map(|s| s.at.duration_since(begin).as_secs_f64()),
        ..Failover::default()
    };
    let mut last = (copy.name.clone(), 0);
    for state in &seen {
        let now = (state.primary.clone(), state.term);
        if last.1 == 0 || now.1 <= last.1 {
            last = (last.0, last.1.max(now.1));
            // The first that is seen may be a promotion already, if it is another's.
            if now.0 == last.0 {
                continue;
            }
        }
        last = now;
        let before = ours()
            .find(|c| c.name == state.primary)
            .map(|c| c.node.clone());
        let node = before
            .or_else(|| ground.history.node(&state.primary))
            .unwrap_or_default();
        let words = format!("{} on {node}, term {}", state.primary, state.term);
        if bad(&node) {
            one.outside.push(words.clone());
        }
        one.promoted.push(words);
    }
    if !one.outside.is_empty() && !race {
        one.violations
            .push(format!("promoted outside: {}", one.outside.join(", ")));
    }
    if nowhere {
        let down = seen
            .last()
            .is_some_and(|s| !s.available && s.resident.0 == "False");
        if !down {
            one.violations.push(format!(
                "nothing lawful is left, and it doesn't say that it is down: {:?}",
                seen.last()
            ));
        }
    }
    let concerned = ours().any(|c| bad(&c.node));
    if concerned && one.said.is_none_or(|s| s > SAID.min(LIMIT.as_secs_f64())) {
        one.violations.push(format!("said after {:?} s", one.said));
    }
    one
}
