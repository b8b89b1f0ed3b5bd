//! What gets outside by a change around it: nodes, Regions, the policy.

use std::collections::BTreeSet;
use std::time::Instant;

use anyhow::{Context, Result};
use serde_json::json;

use super::case::Case;
use super::ground::{Copy, Ground, REGION, permit, region};
use super::sample::Sample;
use crate::failover::inject::Victim;
use crate::topology::NODES;

/// Makes the change once, and puts it back. A sample for each copy that got outside by it, with its case.
///
/// # Errors
/// If something isn't found or stopped at all, or all isn't well again after it.
pub async fn run(ground: &Ground, case: Case) -> Result<Vec<(Case, Sample)>> {
    ground.whole().await?;
    let copies = ground.copies().await?;
    let node = match case {
        Case::PrimaryRelabelled => busiest(&copies, true)?,
        Case::StandbyRelabelled | Case::HungRelabelled => busiest(&copies, false)?,
        _ => String::new(),
    };
    let east: BTreeSet<&str> = NODES
        .iter()
        .filter(|n| n.region.name == "us-east")
        .map(|n| n.name)
        .collect();
    let outside: Vec<&Copy> = copies
        .iter()
        .filter(|c| {
            if node.is_empty() {
                east.contains(c.node.as_str())
            } else {
                c.node == node
            }
        })
        .collect();
    let mut victims = Vec::new();
    for copy in outside {
        victims.push((copy, Victim::find(&ground.scope, &copy.name).await?));
    }
    // Of those that were stopped meanwhile there is nothing left to go on.
    let wake = || {
        for (_, victim) in &victims {
            let _ = victim.stall(false);
        }
    };
    if case == Case::HungRelabelled {
        // It does nothing of what it is asked any more, its own end included.
        let mut standbys = victims.iter().filter(|(copy, _)| !copy.primary);
        standbys
            .try_for_each(|(_, victim)| victim.stall(true))
            .inspect_err(|_| wake())?;
    }
    let begin = Instant::now();
    let changed = match case {
        Case::TwoRegionsMatch => region(&ground.harness, "eu-central", "us-east-1").await,
        Case::PolicyNarrowed => permit(&ground.harness, &["us-west"]).await,
        _ => {
            let abroad = json!({ REGION: "eu-central-1" });
            ground.label(&node, &abroad).await
        }
    };
    changed.inspect_err(|_| wake())?;
    let measured = victims
        .iter()
        .map(|(copy, victim)| measure(ground, case, copy, victim, begin));
    let measured = futures::future::try_join_all(measured).await;
    let alarms = alarms(
        ground,
        &victims.iter().map(|(c, _)| c.name.as_str()).collect(),
        begin,
    );
    if measured.is_err() {
        wake();
    }
    ground.heal().await?;
    let mut measured = measured?;
    if let Some((_, first)) = measured.first_mut() {
        first.violations.extend(alarms);
    }
    ground.whole().await?;
    Ok(measured)
}

/// The node with most copies that are primaries, or that aren't.
fn busiest(copies: &[Copy], primary: bool) -> Result<String> {
    let on = |node: &str| {
        copies
            .iter()
            .filter(|c| c.node == node && c.primary == primary)
            .count()
    };
    let node = copies.iter().max_by_key(|c| (on(&c.node), c.node.clone()));
    node.map(|c| c.node.clone()).context("no copies")
}

async fn measure(
    ground: &Ground,
    case: Case,
    copy: &Copy,
    victim: &Victim,
    begin: Instant,
) -> Result<(Case, Sample)> {
    let sample = ground
        .outside(&copy.store, victim, "postgres", begin)
        .await?;
    let case = match case {
        Case::PrimaryRelabelled | Case::StandbyRelabelled | Case::HungRelabelled
            if copy.primary =>
        {
            Case::PrimaryRelabelled
        }
        Case::PrimaryRelabelled | Case::StandbyRelabelled => Case::StandbyRelabelled,
        other => other,
    };
    Ok((case, sample))
}

/// Copies that were called outside and weren't.
fn alarms(ground: &Ground, outside: &BTreeSet<&str>, begin: Instant) -> BTreeSet<String> {
    let mut alarms = BTreeSet::new();
    for store in super::ground::STORES {
        for seen in ground.history.since(store, begin) {
            for words in seen
                .resident
                .2
                .split("; ")
                .filter(|_| seen.resident.1 == "Outside")
            {
                let name = words.split(' ').next().unwrap_or_default();
                if words.contains(" is on node ")
                    && name.starts_with(store)
                    && !outside.contains(name)
                {
                    alarms.insert(format!("false alarm: {words}"));
                }
            }
        }
    }
    alarms
}
