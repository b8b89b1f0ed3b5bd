//! What an instance says of itself over HTTP at `/status`, as JSON.
//!
//! Owns the types, which `kubectl domicile status` reads too. Never: carries a secret or personal data;
//! names here are names of instances.

use serde::{Deserialize, Serialize};

use crate::api::privacy_data_store::InstanceRole;

/// What an instance says of itself.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Status {
    /// Its name.
    pub instance: String,
    /// The identity of its volume's content.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub id: Option<String>,
    /// What it is.
    pub role: InstanceRole,
    /// Whether it serves.
    pub ready: bool,
    /// The store's term, as it knows it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub term: Option<i64>,
    /// The primary, as it knows it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub primary: Option<String>,
    /// What it is doing, or why it can't.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub message: Option<String>,
    /// PostgreSQL's version.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub postgres_version: Option<String>,
    /// PostgreSQL's timeline.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub timeline: Option<i32>,
    /// PostgreSQL's identifier of the database cluster.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub system_identifier: Option<String>,
    /// The end of its WAL: written on a primary, replayed on a standby.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub position: Option<String>,
    /// Whether a commit now waits for enough standbys (primary only).
    pub durable: bool,
    /// The synchronous rule (primary only).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub synchronous: Option<Synchronous>,
    /// Who streams from it.
    #[serde(default)]
    pub replication: Vec<Replica>,
    /// Its physical replication slots. Absent: PostgreSQL didn't answer.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub slots: Option<Vec<Slot>>,
    /// From whom it streams.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub receiver: Option<Receiver>,
    /// Instances far away with whom a session is ready, should it have to follow one.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub sessions: Vec<String>,
}

/// The synchronous rule.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Synchronous {
    /// How many acknowledgements a commit waits for.
    pub acks: usize,
    /// Of whom.
    pub members: Vec<String>,
    /// Whether PostgreSQL enforces it now.
    pub in_force: bool,
}

/// A standby that streams from here.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Replica {
    /// The instance.
    pub name: String,
    /// PostgreSQL's word: startup, catchup, streaming, backup, stopping.
    pub state: String,
    /// PostgreSQL's word: async, potential, sync, quorum.
    pub sync: String,
    /// Bytes of WAL that it hasn't flushed.
    pub lag_bytes: i64,
    /// Seconds between a commit here and its flush there, as last measured.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub lag_seconds: Option<f64>,
}

/// A physical replication slot.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Slot {
    /// Its name.
    pub name: String,
    /// Whether somebody uses it.
    pub active: bool,
}

/// The connection to the upstream.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Receiver {
    /// The instance it is to stream from.
    pub upstream: String,
    /// PostgreSQL's word, or "absent".
    pub state: String,
    /// Seconds since it last heard from there.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub silent_seconds: Option<f64>,
    /// Bytes received but not replayed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub replay_lag_bytes: Option<i64>,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_names_on_the_wire() {
        let status = Status {
            instance: "s-1".into(),
            synchronous: Some(Synchronous::default()),
            replication: vec![Replica {
                lag_seconds: Some(0.5),
                ..Replica::default()
            }],
            ..Status::default()
        };
        assert_eq!(
            serde_json::to_value(&status).unwrap(),
            serde_json::json!({
                "instance": "s-1", "role": "Starting", "ready": false, "durable": false,
                "synchronous": {"acks": 0, "members": [], "inForce": false},
                "replication": [{"name": "", "state": "", "sync": "", "lagBytes": 0, "lagSeconds": 0.5}],
            })
        );
        let text = serde_json::to_string(&status).unwrap();
        assert_eq!(serde_json::from_str::<Status>(&text).unwrap(), status);
    }
}
