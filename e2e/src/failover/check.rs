//! The table that clients write into: made and emptied before a run, read after it.
//!
//! The table has no unique key on purpose: a row that is there twice must be seen, not refused.

use std::collections::BTreeMap;
use std::time::Duration;

use anyhow::{Context, Result, bail};

use super::session::{Connector, Session};
use super::target::Target;

/// How long finding the primary, and each statement, may take.
const PATIENCE: Duration = Duration::from_secs(30);

/// How often which key is in the table.
pub type Found = BTreeMap<(String, u64), u64>;

/// Opens a session with the primary, whichever host that is; its name is told too.
///
/// # Errors
/// If no host is a primary in time.
pub async fn primary(target: &Target) -> Result<(Session, String)> {
    let connector = Connector::new(target.clone())?;
    let begin = tokio::time::Instant::now();
    let mut last = String::new();
    while begin.elapsed() < PATIENCE {
        for host in &target.hosts {
            match connector.open(host, target.connect_timeout()).await {
                Ok((session, identity)) if identity.writable().is_some() => {
                    return Ok((session, host.name.clone()));
                }
                Ok(_) => last = format!("{} is a standby", host.name),
                Err(e) => last = format!("{}: {e:#}", host.name),
            }
        }
        // PostgreSQL tells nobody when it begins to serve.
        tokio::time::sleep(Duration::from_millis(200)).await;
    }
    bail!("no primary among the hosts after {PATIENCE:?}; the last one tried: {last}")
}

/// Makes the table if it isn't there, and empties it.
///
/// # Errors
/// If no primary takes it.
pub async fn prepare(target: &Target) -> Result<()> {
    let (session, host) = primary(target).await?;
    let table = &target.table;
    for sql in [
        format!(
            "create table if not exists {table} (writer text not null, seq bigint not null, at timestamptz not null default clock_timestamp())"
        ),
        format!("truncate {table}"),
    ] {
        tokio::time::timeout(PATIENCE, session.commit(&sql))
            .await
            .with_context(|| format!("{host} doesn't answer: {sql}"))?
            .with_context(|| format!("{host}: {sql}"))?;
    }
    session.close().await;
    Ok(())
}

/// Removes the table.
///
/// # Errors
/// If no primary takes it.
pub async fn remove(target: &Target) -> Result<()> {
    let (session, host) = primary(target).await?;
    let sql = format!("drop table if exists {}", target.table);
    tokio::time::timeout(PATIENCE, session.commit(&sql))
        .await
        .with_context(|| format!("{host} doesn't answer: {sql}"))?
        .with_context(|| format!("{host}: {sql}"))?;
    session.close().await;
    Ok(())
}

/// Reads the whole table from the primary.
///
/// # Errors
/// If it can't be read.
pub async fn read(target: &Target) -> Result<Found> {
    let (session, host) = primary(target).await?;
    let sql = format!(
        "select writer, seq, count(*) from {} group by 1, 2",
        target.table
    );
    let rows = tokio::time::timeout(PATIENCE, session.rows(&sql))
        .await
        .with_context(|| format!("{host} doesn't answer: {sql}"))?
        .with_context(|| format!("{host}: {sql}"))?;
    session.close().await;
    let mut found = Found::new();
    for row in rows {
        let [writer, seq, count] = <[String; 3]>::try_from(row)
            .map_err(|row| anyhow::anyhow!("a strange row: {row:?}"))?;
        found.insert(
            (writer, seq.parse().context("seq")?),
            count.parse().context("count")?,
        );
    }
    Ok(found)
}
