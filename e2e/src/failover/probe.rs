//! Probes: to one host, a fresh session every few milliseconds: connect, see that it is no standby, commit a row,
//! disconnect.
//!
//! Owns their pace. A probe that hangs never holds the next one back; all are bounded in time, and thereby in
//! number.

use anyhow::Result;
use tokio::time::{MissedTickBehavior, interval};

use super::client::{Desk, Keys, Pace, write};
use super::target::Host;

/// Probes one host until it is told to end.
pub(super) async fn probes(desk: Desk, keys: Keys, host: Host, pace: Pace) -> Result<()> {
    let mut tick = interval(pace.every());
    // After a pause of this process itself, no burst.
    tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut probes = tokio::task::JoinSet::new();
    loop {
        tokio::select! {
            _ = tick.tick() => {
                probes.spawn(probe(desk.clone(), keys.clone(), host.clone(), pace));
            }
            Some(ended) = probes.join_next() => ended??,
        }
    }
}

async fn probe(desk: Desk, keys: Keys, host: Host, pace: Pace) -> Result<()> {
    // A host that can't be reached is what a probe is for; that it couldn't shows in the lack of commits.
    let Ok((session, identity)) = desk.connector.open(&host, pace.limit()).await else {
        return Ok(());
    };
    if let Some(timeline) = identity.timeline
        && !write(&desk, &keys, &session, &host, timeline, pace.limit()).await?
    {
        return Ok(());
    }
    session.close().await;
    Ok(())
}
