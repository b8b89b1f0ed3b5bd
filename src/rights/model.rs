//! What a request, a step and an outcome are.
//!
//! Owns the types that gateway, ledger and worker share. Never: does I/O; shows an identifier ([`Identifiers`] has a
//! `Debug` of its own, and no `Display`).

use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::fmt;
use uuid::Uuid;

use crate::api::rights_workflow::Regime;
pub use crate::deadlines::Kind;

/// What identifies a person in a request: name of the identifier to its value.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Identifiers(pub BTreeMap<String, String>);

impl fmt::Debug for Identifiers {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let names: Vec<&String> = self.0.keys().collect();
        write!(f, "Identifiers({names:?}, values hidden)")
    }
}

/// How a request came.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Channel {
    /// A program of the controller's own: a web form, an app.
    Api,
    /// A person on behalf of the subject: mail, telephone, counter.
    Operator,
    /// An authorised agent.
    Agent,
    /// A list of a public body, such as California's DROP.
    Registry,
}

/// Where a request stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum State {
    /// Waits for a person to say that the subject is who they say they are. Its clocks run.
    AwaitingApproval,
    /// Is being carried out.
    Open,
    /// Every step ended with proof.
    Closed,
    /// Taken back by the subject before it was carried out.
    Withdrawn,
}

/// A request as it comes in.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Filing {
    /// UUIDv7, given by the gateway.
    pub id: Uuid,
    /// What is asked for.
    pub kind: Kind,
    /// Under which laws; at least one.
    pub regimes: Vec<Regime>,
    /// Who the person is.
    pub identifiers: Identifiers,
    /// How it came.
    pub channel: Channel,
    /// When the clocks begin.
    pub received_at: Timestamp,
    /// Whether a person must approve it before it is carried out.
    pub needs_approval: bool,
    /// The same key with the same content is the same request; with another content it is refused.
    pub idempotency_key: Option<String>,
}

/// How a step ended.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "outcome", rename_all = "kebab-case")]
pub enum Outcome {
    /// Read back by another connection, and not there.
    Absent,
    /// Logically gone; bytes leave by then.
    Bounded {
        /// The latest.
        until: Timestamp,
    },
    /// The law keeps it.
    Excepted {
        /// Which section of which law.
        section: String,
    },
}

/// What was seen of an erasure, for the proof. Numbers, times, names of objects; nothing of a person.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Evidence(pub serde_json::Map<String, serde_json::Value>);
