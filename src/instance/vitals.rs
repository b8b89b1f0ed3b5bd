//! What PostgreSQL says of itself when it is looked at.
//!
//! Owns the queries, which only read. Never: decides anything from the answers.

use std::time::Duration;

use anyhow::Context as _;
use tokio_postgres::{Client, Row, Statement};

use super::relay;
use super::session::Session;
use super::status::Replica;
use super::strangers::{Sender, common_name};

/// What PostgreSQL says of itself.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Vitals {
    /// Whether it follows.
    pub in_recovery: bool,
    /// Timeline.
    pub timeline: i32,
    /// End of its WAL: written on a primary, replayed on a standby.
    pub position: String,
    /// The synchronous rule that it enforces.
    pub sync_names: String,
    /// Who streams from it; not who is only ready to.
    pub replicas: Vec<Replica>,
    /// Whoever replicates from it, by certificate.
    pub senders: Vec<Sender>,
    /// Its physical slots.
    pub slots: Vec<Slot>,
    /// Its receiver.
    pub receiver: Option<ReceiverSeen>,
    /// Bytes received but not replayed.
    pub replay_lag_bytes: Option<i64>,
    /// Whether replay stands still until a restart (a parameter is too small).
    pub replay_paused: bool,
}

/// A physical slot.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Slot {
    /// Name.
    pub name: String,
    /// Whether somebody uses it.
    pub active: bool,
    /// Whether the WAL that it stood for is gone.
    pub lost: bool,
    /// Whether it holds WAL back.
    pub reserves: bool,
}

/// A receiver.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct ReceiverSeen {
    /// PostgreSQL's word.
    pub state: String,
    /// The host it is connected to, as in the connection string, or by a relay.
    pub host: String,
    /// Since it last heard from there.
    pub silent: Duration,
}

const BASE: &str = "SELECT pg_is_in_recovery(), \
    (SELECT timeline_id FROM pg_control_checkpoint()), \
    coalesce(CASE WHEN pg_is_in_recovery() THEN pg_last_wal_replay_lsn() \
        ELSE pg_current_wal_lsn() END, '0/0')::text, \
    current_setting('synchronous_standby_names')";

const PENDING: &str = "SELECT name::text FROM pg_settings WHERE pending_restart ORDER BY 1";

const REPLICAS: &str = "SELECT application_name, coalesce(state, 'startup'), coalesce(sync_state, ''), \
    coalesce(pg_wal_lsn_diff(pg_current_wal_lsn(), flush_lsn), 0)::bigint, \
    extract(epoch FROM flush_lag)::float8 FROM pg_stat_replication \
    WHERE state IS DISTINCT FROM 'startup' ORDER BY 1";

const SENDERS: &str = "SELECT r.pid, coalesce(s.client_dn, ''), coalesce(r.application_name, ''), host(r.client_addr) \
    FROM pg_stat_replication r LEFT JOIN pg_stat_ssl s USING (pid) ORDER BY 1";

const SLOTS: &str = "SELECT slot_name::text, active, coalesce(wal_status = 'lost', false), \
    restart_lsn IS NOT NULL \
    FROM pg_replication_slots WHERE slot_type = 'physical' AND NOT temporary ORDER BY 1";

const RECEIVER: &str = "SELECT status, coalesce(sender_host, ''), \
    coalesce(extract(epoch FROM clock_timestamp() - last_msg_receipt_time), 1e6)::float8 \
    FROM pg_stat_wal_receiver";

const REPLAY: &str = "SELECT pg_wal_lsn_diff(pg_last_wal_receive_lsn(), pg_last_wal_replay_lsn())::bigint, \
    pg_get_wal_replay_pause_state() = 'paused'";

/// The queries, prepared once per connection: they are asked every second.
pub struct Queries {
    base: Statement,
    replicas: Statement,
    senders: Statement,
    slots: Statement,
    receiver: Statement,
    replay: Statement,
}

impl Queries {
    /// Prepares them.
    ///
    /// # Errors
    /// If PostgreSQL doesn't answer.
    pub async fn prepare(client: &Client) -> Result<Self, tokio_postgres::Error> {
        Ok(Self {
            base: client.prepare(BASE).await?,
            replicas: client.prepare(REPLICAS).await?,
            senders: client.prepare(SENDERS).await?,
            slots: client.prepare(SLOTS).await?,
            receiver: client.prepare(RECEIVER).await?,
            replay: client.prepare(REPLAY).await?,
        })
    }
}

/// Looks.
///
/// # Errors
/// If PostgreSQL doesn't answer within the session's limit.
pub async fn look(session: &Session) -> anyhow::Result<Vitals> {
    tokio::time::timeout(session.limit(), read(session))
        .await
        .context("PostgreSQL doesn't answer")?
}

/// Names of the parameters that wait for a restart, sorted.
///
/// # Errors
/// As [`look`].
pub async fn pending_restart(session: &Session) -> anyhow::Result<Vec<String>> {
    let rows = tokio::time::timeout(session.limit(), session.client().query(PENDING, &[]))
        .await
        .context("PostgreSQL doesn't answer")??;
    Ok(rows
        .iter()
        .map(|row| row.try_get(0))
        .collect::<Result<_, _>>()?)
}

async fn read(session: &Session) -> anyhow::Result<Vitals> {
    let (client, queries) = (session.client(), session.queries());
    let row = client.query_one(&queries.base, &[]).await?;
    let mut vitals = Vitals {
        in_recovery: row.try_get(0)?,
        timeline: row.try_get(1)?,
        position: row.try_get(2)?,
        sync_names: row.try_get(3)?,
        ..Vitals::default()
    };
    if vitals.in_recovery {
        vitals.receiver = client
            .query_opt(&queries.receiver, &[])
            .await?
            .map(|row| receiver(&row))
            .transpose()?;
        let replay = client.query_one(&queries.replay, &[]).await?;
        vitals.replay_lag_bytes = replay.try_get(0)?;
        vitals.replay_paused = replay.try_get(1)?;
    } else {
        for row in client.query(&queries.replicas, &[]).await? {
            vitals.replicas.push(Replica {
                name: row.try_get(0)?,
                state: row.try_get(1)?,
                sync: row.try_get(2)?,
                lag_bytes: row.try_get(3)?,
                lag_seconds: row.try_get(4)?,
            });
        }
    }
    for row in client.query(&queries.senders, &[]).await? {
        let address: Option<&str> = row.try_get(3)?;
        vitals.senders.push(Sender {
            pid: row.try_get(0)?,
            certificate: common_name(row.try_get(1)?).to_owned(),
            name: row.try_get(2)?,
            address: address.and_then(|a| a.parse().ok()),
        });
    }
    for row in client.query(&queries.slots, &[]).await? {
        vitals.slots.push(Slot {
            name: row.try_get(0)?,
            active: row.try_get(1)?,
            lost: row.try_get(2)?,
            reserves: row.try_get(3)?,
        });
    }
    Ok(vitals)
}

fn receiver(row: &Row) -> anyhow::Result<ReceiverSeen> {
    let silent: f64 = row.try_get(2)?;
    let host: String = row.try_get(1)?;
    Ok(ReceiverSeen {
        state: row.try_get(0)?,
        host: relay::upstream_of(&host).unwrap_or(&host).to_owned(),
        silent: Duration::try_from_secs_f64(silent.max(0.0)).unwrap_or(Duration::MAX),
    })
}
