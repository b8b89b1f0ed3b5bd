//! Attestations: what of a store was seen where, by which observation, under which policy, and what could not be
//! seen.
//!
//! Owns the document ([`Statement`]), how evidence ([`evidence`]) becomes one ([`judge`]), how it is signed ([`seal`]), and how one
//! is bound to the one before ([`chain`]).
//! Never does I/O, never reads a clock, never makes randomness, and never says more than was seen: what is not known
//! is Unknown, and what can't be observed is listed. Never carries personal data: names that Domicile didn't give
//! (of a strange standby, of a strange address) go in as a hash.

pub mod chain;
pub mod evidence;
pub mod judge;
pub mod seal;

use std::fmt;

use jiff::Timestamp;
use serde::{Deserialize, Serialize};

use super::permissions::Refusal;
use crate::api::residency_policy::{Basis, Data, ResolvedPermit};

/// What one entry of a chain says. The bytes of its JSON are what is signed.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Statement {
    /// Counts the entries of a store, from 1.
    pub sequence: u64,
    /// [`seal::Envelope::hash`] of the entry before. Absent: there is none that the operator could vouch for.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub previous: Option<String>,
    /// What a reader must know of this entry's place in the chain, in words: why it begins one, or that the key of
    /// the entries before is lost.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub note: Option<String>,
    /// When everything in it was observed, by the operator's clock.
    pub observed_at: Timestamp,
    /// Program and version that observed.
    pub program: String,
    /// The operator process that observed: a pod's name.
    pub operator: String,
    /// Of which store.
    pub store: StoreRef,
    /// The key with which the next entry is signed, if it isn't the one of this entry.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub introduces: Option<seal::NamedKey>,
    /// What was seen.
    pub content: Body,
}

/// A store, for those who have only the document.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct StoreRef {
    /// Its namespace.
    pub namespace: String,
    /// Its name.
    pub name: String,
    /// Its uid: another one is another store of the same name.
    pub uid: String,
}

/// What was seen, or that it is what an earlier entry says in full.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum Body {
    /// In full.
    Full(Box<Content>),
    /// Exactly what that entry says, seen again.
    Same(EntryRef),
}

/// Another entry of the same chain.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct EntryRef {
    /// Its sequence number.
    pub sequence: u64,
    /// Its [`seal::Envelope::hash`].
    pub hash: String,
}

/// What was seen of a store. Without times: two of them are equal if nothing has changed.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Content {
    /// Whether everything found is where the policy permits it.
    pub verdict: Verdict,
    /// Whether the store is being deleted. The entry after which none follows says so.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub deleting: bool,
    /// Under which policy. Absent: there was none that applies, and `notApplied` says why.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub policy: Option<PolicyRef>,
    /// Why no policy applies.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub not_applied: Option<String>,
    /// The Regions that the policy permits or in which something was found, as they were defined.
    pub regions: Vec<RegionRef>,
    /// Every copy and channel that was found.
    pub findings: Vec<Finding>,
    /// What could not be observed.
    pub unobserved: Vec<Unobserved>,
}

/// A policy as it was.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct PolicyRef {
    /// Its name.
    pub name: String,
    /// Its uid.
    pub uid: String,
    /// Its generation: it counts changes of the spec.
    pub generation: i64,
    /// SHA-256 of the JSON of its spec, in hex.
    pub spec_digest: String,
    /// Why it exists.
    pub basis: Basis,
    /// Where to look that up.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub citation: String,
    /// What it permitted where, jurisdictions resolved.
    pub permits: Vec<Permitted>,
}

/// A kind of data and the regions where it may be.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Permitted {
    /// Which kind of data.
    pub data: Data,
    /// Names of the Regions, sorted.
    pub regions: Vec<String>,
}

impl From<ResolvedPermit> for Permitted {
    fn from(permit: ResolvedPermit) -> Self {
        Self {
            data: permit.data,
            regions: permit.regions,
        }
    }
}

/// A Region as it was.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct RegionRef {
    /// Its name.
    pub name: String,
    /// Its uid.
    pub uid: String,
    /// Its generation.
    pub generation: i64,
    /// SHA-256 of the JSON of its spec, in hex.
    pub spec_digest: String,
    /// Whose law applies there, as it says.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub jurisdictions: Vec<String>,
}

/// One copy or channel.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Finding {
    /// What it is.
    pub kind: Kind,
    /// Its name.
    pub name: String,
    /// Which kind of data the policy takes it for. Absent: a channel, which is judged by where it leads.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub data: Option<Data>,
    /// Where it was seen.
    pub place: Place,
    /// By what.
    pub observed: Vec<Observation>,
    /// Whether it may be there.
    pub verdict: Verdict,
    /// Why not, or why that isn't known, in words.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub because: Option<String>,
}

/// Where something is. Everything absent: nowhere that could be told.
#[derive(Clone, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Place {
    /// The node.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub node: Option<String>,
    /// The Region: only if every witness agrees.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub region: Option<String>,
    /// The zone, as the node's label says.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub zone: Option<String>,
    /// For a channel: the copy that it leads to.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub leads_to: Option<String>,
}

/// A kind of copy or channel.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub enum Kind {
    /// A PostgreSQL of the store, in a pod on a node.
    Instance,
    /// A volume with a copy on it, whether or not a pod uses it.
    Volume,
    /// Who streams from the primary.
    Standby,
    /// What holds the primary's WAL back for somebody.
    ReplicationSlot,
    /// Where a Service of the store leads.
    Endpoint,
    /// Who streams from a standby.
    CascadedStandby,
    /// Logical replication and its slots.
    LogicalReplication,
    /// Who reads by SQL: dumps, exports, applications.
    SqlClient,
    /// Somebody else's pod that uses a store's volume.
    ForeignPod,
    /// A volume snapshot or clone.
    Snapshot,
    /// Base backups and archived WAL.
    Backup,
    /// A rights worker.
    Worker,
    /// A rights gateway.
    Gateway,
    /// Where logs and metrics go.
    Sink,
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Instance => "instance",
            Self::Volume => "volume",
            Self::Standby => "standby",
            Self::ReplicationSlot => "replication slot",
            Self::Endpoint => "endpoint",
            Self::CascadedStandby => "standby of a standby",
            Self::LogicalReplication => "logical replication",
            Self::SqlClient => "SQL clients",
            Self::ForeignPod => "other pods on the volumes",
            Self::Snapshot => "volume snapshots",
            Self::Backup => "backups",
            Self::Worker => "rights workers",
            Self::Gateway => "rights gateways",
            Self::Sink => "logs and metrics",
        })
    }
}

/// How something was seen.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Observation {
    /// The source.
    pub by: Source,
    /// Which object says it.
    pub of: String,
    /// What it says.
    pub says: String,
}

impl fmt::Display for Observation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { by, of, says } = self;
        match by {
            Source::PodBinding => write!(f, "{of} is bound to {says}"),
            Source::NodeLabel => write!(f, "label {says} of {of}"),
            Source::NodeStamp => write!(f, "stamp {says} of {of}"),
            Source::ProviderId => write!(f, "providerID {says} of {of}"),
            Source::VolumeAffinity => write!(f, "node affinity {says} of {of}"),
            Source::VolumeClaim => write!(f, "{of} is {says}"),
            Source::PgStatReplication => write!(f, "pg_stat_replication of {of}: {says}"),
            Source::PgReplicationSlots => write!(f, "pg_replication_slots of {of}: {says}"),
            Source::EndpointSlice => write!(f, "{of} leads to {says}"),
        }
    }
}

/// A source of evidence. What an instance says of itself comes over plain HTTP from the address that the API
/// server gives for its pod: it isn't signed by the instance.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub enum Source {
    /// `spec.nodeName` of a pod.
    PodBinding,
    /// A label of a node that a Region names as witness, or the zone's.
    NodeLabel,
    /// The operator's own stamp on a node, which no kubelet can set.
    NodeStamp,
    /// `spec.providerID` of a node.
    #[serde(rename = "ProviderID")]
    ProviderId,
    /// `spec.nodeAffinity` of a PersistentVolume.
    VolumeAffinity,
    /// `spec.volumeName` of a PersistentVolumeClaim.
    VolumeClaim,
    /// PostgreSQL's view of that name, as the primary's instance reports it.
    PgStatReplication,
    /// PostgreSQL's view of that name, as an instance reports it.
    PgReplicationSlots,
    /// An EndpointSlice of the store.
    EndpointSlice,
}

/// Something that could not be observed.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Unobserved {
    /// What.
    pub kind: Kind,
    /// Of which one. Absent: of all.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub subject: Option<String>,
    /// Why.
    pub why: String,
    /// Whether Domicile never observes this in its present version. Otherwise it should have been seen, and the
    /// verdict is Unknown for it.
    pub standing: bool,
}

/// Whether something is where it may be.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub enum Verdict {
    /// Where the policy permits it.
    Within,
    /// It can't be told.
    Unknown,
    /// Where the policy doesn't permit it, or nowhere that is certain.
    Outside,
}

impl fmt::Display for Verdict {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Within => "within",
            Self::Unknown => "unknown",
            Self::Outside => "OUTSIDE",
        })
    }
}

impl Verdict {
    /// Of a refusal.
    fn of(refused: Result<(), Box<Refusal>>) -> (Self, Option<String>) {
        match refused {
            Ok(()) => (Self::Within, None),
            Err(refusal) => (Self::Outside, Some(refusal.to_string())),
        }
    }
}

#[cfg(test)]
mod tests;
