//! `PrivacyDataStore`: a PostgreSQL store whose copies stay inside the regions of a policy.
//!
//! Owns the type only. What the operator makes of it is `operator::store`.

use k8s_openapi::apimachinery::pkg::apis::meta::v1::{Condition, MicroTime};
use kube::{CustomResource, KubeSchema};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

use super::region::NameRef;
use super::schema::{conditions_schema, date_time_schema, parameters_schema, quantity_schema};

/// A PostgreSQL store with replicas in several regions, all of them permitted by a ResidencyPolicy.
#[derive(CustomResource, KubeSchema, Clone, Debug, PartialEq, Serialize, Deserialize)]
#[kube(
    group = "domicile.dev",
    version = "v1alpha1",
    kind = "PrivacyDataStore",
    plural = "privacydatastores",
    namespaced,
    status = "PrivacyDataStoreStatus",
    category = "domicile",
    shortname = "pds",
    derive = "PartialEq",
    doc = "PrivacyDataStore is a PostgreSQL store for personal data: its copies are placed only in regions that its ResidencyPolicy permits, replicate synchronously, and are kept there. Connect with the Secret STORE-app, or through the Services STORE-rw and STORE-ro.",
    printcolumn(name = "Ready", type_ = "string", json_path = ".status.conditions[?(@.type==\"Ready\")].status", description = "Whether every instance is up and as specified"),
    printcolumn(name = "Instances", type_ = "string", json_path = ".status.summary", description = "Ready of desired instances"),
    printcolumn(name = "Primary", type_ = "string", json_path = ".status.primary", description = "The instance that accepts writes"),
    printcolumn(name = "Resident", type_ = "string", json_path = ".status.conditions[?(@.type==\"Resident\")].status", description = "Whether every copy is where the policy permits"),
    printcolumn(name = "Durable", type_ = "string", json_path = ".status.conditions[?(@.type==\"Durable\")].status", description = "Whether a commit survives the loss of an instance"),
    printcolumn(name = "Policy", type_ = "string", json_path = ".spec.residencyPolicyRef.name", priority = 1, description = "The ResidencyPolicy"),
    printcolumn(name = "Reason", type_ = "string", json_path = ".status.conditions[?(@.type==\"Ready\")].message", priority = 1, description = "Why it is or is not Ready"),
    printcolumn(name = "Age", type_ = "date", json_path = ".metadata.creationTimestamp", description = "Time since creation"),
    validation = Rule::new("self.metadata.name.matches('^[a-z]([-a-z0-9]{0,38}[a-z0-9])?$')").message("a PrivacyDataStore's name becomes part of the names of pods, Services and certificates: begin with a letter and use at most 40 lower-case letters, digits and '-'")
)]
#[serde(rename_all = "camelCase")]
#[x_kube(
    validation = Rule::new("self.placement.map(p, p.instances).sum() <= 9").message("a store has at most 9 instances: more would only slow its quorum down").field_path(".placement"),
    validation = Rule::new("self.durability != 'Required' || self.placement.map(p, p.instances).sum() >= 2").message("durability Required needs at least 2 instances, since a commit is acknowledged only when a standby has it too: add an instance, or choose durability Preferred").field_path(".durability")
)]
pub struct PrivacyDataStoreSpec {
    /// The ResidencyPolicy that says where copies may be.
    pub residency_policy_ref: NameRef,

    /// How many instances in which region. Every region must be permitted by the policy for Standby, and at
    /// least one also for Primary; a request for any other region is refused.
    #[schemars(length(min = 1, max = 9))]
    #[x_kube(merge_strategy = ListMerge::Map(vec!["region".into()]))]
    pub placement: Vec<RegionPlacement>,

    /// The PostgreSQL that every instance runs.
    #[serde(default)]
    pub postgres: Postgres,

    /// The database made for the application.
    #[serde(default)]
    #[x_kube(validation = Rule::new("self == oldSelf").message("the database's name and owner can't be changed: make another database with SQL, or another store"))]
    pub database: Database,

    /// Required: a commit is acknowledged only when enough standbys (half of the instances, at least one)
    /// have flushed it; if they are away, writes wait. Preferred: writes go on with fewer, down to none.
    #[serde(default)]
    pub durability: Durability,

    /// How failures are detected.
    #[serde(default)]
    pub failover: Failover,

    /// What happens to the volumes when the store is deleted.
    #[serde(default)]
    pub deletion_policy: DeletionPolicy,

    /// The volume of each instance.
    #[x_kube(validation = Rule::new("self == oldSelf").message("storage can't be changed after creation: make a new store and move the data"))]
    pub storage: Storage,

    /// What each instance may use.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub resources: Option<Resources>,
}

/// How many instances in one region.
#[derive(KubeSchema, Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct RegionPlacement {
    /// Name of a Region object.
    #[schemars(
        length(min = 1, max = 63),
        regex(pattern = r"^[a-z0-9]([-a-z0-9]*[a-z0-9])?$")
    )]
    pub region: String,

    /// How many instances there. They are spread over the region's zones and hosts.
    #[schemars(range(min = 1, max = 9))]
    pub instances: i32,
}

/// Which PostgreSQL, with which parameters.
#[derive(KubeSchema, Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Postgres {
    /// A container image with PostgreSQL 15 to 18. Any will do: Domicile brings its own instance manager
    /// along and needs nothing but the server's programs. The major version can't be changed by changing the
    /// image; an image of another major is refused by the instance.
    #[serde(default = "default_image")]
    #[schemars(length(min = 1, max = 512))]
    pub image: String,

    /// Secrets in the store's namespace with which to pull the image.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 8))]
    #[x_kube(merge_strategy = ListMerge::Map(vec!["name".into()]))]
    pub image_pull_secrets: Vec<NameRef>,

    /// PostgreSQL parameters (postgresql.conf). Those on which Domicile's promises rest can't be set.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    #[schemars(schema_with = "parameters_schema")]
    #[x_kube(
        validation = Rule::new("self.all(k, k.matches('^[a-z_][a-z0-9_]*([.][a-z_][a-z0-9_]*)?$') && size(k) <= 63)").message("a parameter's name has lower-case letters, digits and '_'"),
        validation = Rule::new("self.all(k, !self[k].contains('\\n'))").message("a parameter's value is one line"),
        validation = Rule::new(super::parameters::rule()).message("one of these parameters is Domicile's own, since its promises rest on it: remove addresses, ports, sockets, file locations, TLS, replication, synchronous commit, fsync, archiving, preloading and statement logging from postgres.parameters (docs/instance.md lists them)")
    )]
    pub parameters: BTreeMap<String, String>,
}

impl Default for Postgres {
    fn default() -> Self {
        Self {
            image: default_image(),
            image_pull_secrets: Vec::new(),
            parameters: BTreeMap::new(),
        }
    }
}

fn default_image() -> String {
    "postgres:17".to_owned()
}

/// The database made for the application.
#[derive(KubeSchema, Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
#[x_kube(validation = Rule::new("!(self.owner in ['postgres', 'domicile', 'domicile_replication', 'domicile_monitor']) && !self.owner.startsWith('pg_') && !(self.name in ['postgres', 'template0', 'template1', 'domicile'])").message("that database or role name is PostgreSQL's or Domicile's own: choose another"))]
pub struct Database {
    /// Name of the database.
    #[serde(default = "default_database")]
    #[schemars(length(min = 1, max = 63), regex(pattern = r"^[a-z_][a-z0-9_]*$"))]
    pub name: String,

    /// Role that owns it and with which the application connects.
    #[serde(default = "default_database")]
    #[schemars(length(min = 1, max = 63), regex(pattern = r"^[a-z_][a-z0-9_]*$"))]
    pub owner: String,
}

impl Default for Database {
    fn default() -> Self {
        Self {
            name: default_database(),
            owner: default_database(),
        }
    }
}

fn default_database() -> String {
    "app".to_owned()
}

/// Whether a commit waits for standbys.
#[derive(JsonSchema, Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum Durability {
    /// A commit is acknowledged only when enough standbys have flushed it.
    #[default]
    Required,
    /// A commit waits for the standbys that are there.
    Preferred,
}

/// How failures are detected.
#[derive(KubeSchema, Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Failover {
    /// Seconds of silence after which an instance counts as dead.
    #[serde(default = "default_detection")]
    #[schemars(range(min = 1, max = 300))]
    pub detection_seconds: i32,
}

impl Default for Failover {
    fn default() -> Self {
        Self {
            detection_seconds: default_detection(),
        }
    }
}

fn default_detection() -> i32 {
    3
}

/// What happens to the volumes when the store is deleted.
#[derive(JsonSchema, Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum DeletionPolicy {
    /// The volumes stay; a store of the same name takes them up again.
    #[default]
    Retain,
    /// The volumes are deleted with the store.
    Delete,
}

/// The volume of each instance.
#[derive(KubeSchema, Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Storage {
    /// Size of each volume, for example 10Gi.
    #[schemars(schema_with = "quantity_schema")]
    pub size: String,

    /// StorageClass of the volumes; absent: the cluster's default. It should bind on first use
    /// (WaitForFirstConsumer), so that the volume is made where the instance may be.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 253))]
    pub storage_class_name: Option<String>,
}

/// What each pod requests and may use at most.
#[derive(KubeSchema, Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Resources {
    /// What the scheduler sets aside.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub requests: Option<ResourceAmounts>,

    /// What can't be exceeded. Set the memory limit equal to its request, or a busy node may kill the pod for
    /// its memory at any time.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub limits: Option<ResourceAmounts>,
}

/// Amounts of CPU and memory.
#[derive(KubeSchema, Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct ResourceAmounts {
    /// CPU, for example 250m.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(schema_with = "optional_quantity_schema")]
    pub cpu: Option<String>,

    /// Memory, for example 512Mi.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(schema_with = "optional_quantity_schema")]
    pub memory: Option<String>,
}

fn optional_quantity_schema(generator: &mut schemars::SchemaGenerator) -> schemars::Schema {
    quantity_schema(generator)
}

/// What was seen of a store. The operator writes everything but what an instance reports of itself.
#[derive(KubeSchema, Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct PrivacyDataStoreStatus {
    /// Ready (all as specified), Reconciling, Stalled (a person must act), Available (writes are accepted),
    /// Resident (every copy is where the policy permits), Durable (a commit survives the loss of an instance),
    /// Attested (what was seen last is signed and kept in the ConfigMap STORE-attestations), Certified (instances have
    /// certificates that last).
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(schema_with = "conditions_schema")]
    pub conditions: Vec<Condition>,

    /// The generation that this status speaks of.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 0))]
    pub observed_generation: Option<i64>,

    /// Ready of desired instances, as "3/3".
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 16))]
    pub summary: Option<String>,

    /// The term of the present primary. It only ever rises.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 0))]
    pub term: Option<i64>,

    /// The instance that accepts writes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 63))]
    pub primary: Option<String>,

    /// PostgreSQL's identifier of the database cluster, once it is initialised. While it is set, no instance
    /// ever initialises another.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 32))]
    pub system_identifier: Option<String>,

    /// The instances.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 32))]
    #[x_kube(merge_strategy = ListMerge::Map(vec!["name".into()]))]
    pub instances: Vec<InstanceStatus>,

    /// What the instances have agreed on, as their primary knows it. By the primary.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    // kube's StructMerge writes a key that definitions don't have.
    #[x_kube(merge_strategy = MapMerge::Atomic)]
    pub configuration: Option<AgreedConfiguration>,

    /// The latest change of the primary, by its milestones. By the new primary.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    // kube's StructMerge writes a key that definitions don't have.
    #[x_kube(merge_strategy = MapMerge::Atomic)]
    pub last_failover: Option<LastFailover>,

    /// What RightsWorkflows need of this store: a database for requests, and rights to the tables from which people are
    /// erased. By the operator, one entry per workflow; the primary makes it so.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 32))]
    #[x_kube(merge_strategy = ListMerge::Map(vec!["workflow".into()]))]
    pub rights: Vec<RightsAccess>,
}

/// What one RightsWorkflow needs of a store.
#[derive(KubeSchema, Clone, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct RightsAccess {
    /// Name of the RightsWorkflow.
    #[schemars(
        length(min = 1, max = 40),
        regex(pattern = r"^[a-z]([-a-z0-9]*[a-z0-9])?$")
    )]
    pub workflow: String,

    /// Whether its requests are kept here.
    #[serde(default)]
    pub ledger: bool,

    /// The tables of the application's database from which its workers erase.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 1024))]
    #[x_kube(merge_strategy = ListMerge::Atomic)]
    pub tables: Vec<TableAccess>,
}

/// A table from which a workflow's workers erase.
#[derive(
    KubeSchema, Clone, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize,
)]
#[serde(rename_all = "camelCase")]
pub struct TableAccess {
    /// Name of the table, with its schema if that isn't public.
    #[schemars(length(min = 1, max = 127))]
    pub table: String,

    /// Whether rows are deleted.
    #[serde(default)]
    pub delete: bool,

    /// Columns that are set to NULL.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 64), inner(length(min = 1, max = 63)))]
    #[x_kube(merge_strategy = ListMerge::Atomic)]
    pub clear_columns: Vec<String>,
}

/// What the instances have agreed on: who votes, whom a commit waits for, who may become primary. A voter is
/// named by its instance and its volume, as "consumers-2/k3x9": on another volume it is another voter.
///
/// Atomic: an instance that becomes primary writes all of it, so that nothing of its predecessor's is mixed in.
#[derive(KubeSchema, Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct AgreedConfiguration {
    /// The term: one election, one primary.
    #[schemars(range(min = 0))]
    pub term: i64,

    /// Counts changes within the term.
    #[serde(default)]
    #[schemars(range(min = 0))]
    pub version: i64,

    /// The voter that is primary in this term.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 128))]
    pub primary: Option<String>,

    /// Who votes, the witness included.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 32), inner(length(min = 1, max = 128)))]
    #[x_kube(merge_strategy = ListMerge::Set)]
    pub voters: Vec<String>,

    /// The voter without data, if there is one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 128))]
    pub witness: Option<String>,

    /// Whose flush a commit waits for.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 32), inner(length(min = 1, max = 128)))]
    #[x_kube(merge_strategy = ListMerge::Set)]
    pub sync_members: Vec<String>,

    /// How many of syncMembers must have flushed a commit before it is acknowledged. More than there are: commits
    /// wait until there are.
    #[serde(default)]
    #[schemars(range(min = 0))]
    pub acks: i32,

    /// Which voters may become primary: those where the residency policy permits one.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 32), inner(length(min = 1, max = 128)))]
    #[x_kube(merge_strategy = ListMerge::Set)]
    pub may_be_primary: Vec<String>,
}

/// A change of the primary. Times are those of the new primary's clock; a milestone that isn't known is absent.
///
/// Atomic, for the same reason as [`AgreedConfiguration`].
#[derive(KubeSchema, Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct LastFailover {
    /// The term that began with it.
    #[schemars(range(min = 0))]
    pub term: i64,

    /// The new primary.
    #[schemars(length(min = 1, max = 63))]
    pub primary: String,

    /// The primary before it, if there was one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 63))]
    pub previous_primary: Option<String>,

    /// Why, as one word: PrimarySilent (nothing was heard for detectionSeconds), PrimaryDead (its end was seen),
    /// HandOver (it asked for it itself), ByHand (a person accepted the loss of data), Founding (the store began).
    #[schemars(length(min = 1, max = 32), regex(pattern = r"^[A-Z][A-Za-z]*$"))]
    pub reason: String,

    /// When the primary before counted as gone.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(schema_with = "date_time_schema")]
    pub detected_at: Option<MicroTime>,

    /// When enough voters had cut themselves off from it: it could acknowledge nothing any more.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(schema_with = "date_time_schema")]
    pub fenced_at: Option<MicroTime>,

    /// When a majority had accepted the new primary.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(schema_with = "date_time_schema")]
    pub elected_at: Option<MicroTime>,

    /// When its PostgreSQL accepted writes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(schema_with = "date_time_schema")]
    pub promoted_at: Option<MicroTime>,

    /// When the Service STORE-rw led to it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(schema_with = "date_time_schema")]
    pub routed_at: Option<MicroTime>,
}

/// Values of [`LastFailover::reason`].
pub mod failover_reasons {
    /// Nothing was heard of the primary for `detectionSeconds`.
    pub const PRIMARY_SILENT: &str = "PrimarySilent";
    /// The primary's end was seen: connections refused, or PostgreSQL gone under a live manager.
    pub const PRIMARY_DEAD: &str = "PrimaryDead";
    /// The primary asked for it itself: a switchover, or its pod was stopped.
    pub const HAND_OVER: &str = "HandOver";
    /// A person accepted the loss of data.
    pub const BY_HAND: &str = "ByHand";
    /// The store began.
    pub const FOUNDING: &str = "Founding";
}

/// One instance. Where it is, the operator says; how it is, the instance says of itself.
#[derive(KubeSchema, Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct InstanceStatus {
    /// Name of the instance, its pod, its volume claim and its Service.
    #[schemars(length(min = 1, max = 63))]
    pub name: String,

    /// The Region it is placed in. By the operator.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 63))]
    pub region: Option<String>,

    /// The zone it is placed in. By the operator.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 63))]
    pub zone: Option<String>,

    /// The node it runs on. By the operator.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 253))]
    pub node: Option<String>,

    /// The identity of its volume's content: it changes when a volume is lost. By the instance.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 63))]
    pub id: Option<String>,

    /// Whether it serves as Primary or Standby, or is Starting. By the instance.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub role: Option<InstanceRole>,

    /// Whether it serves: a primary accepts writes, a standby streams from the primary. By the instance.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ready: Option<bool>,

    /// Whether a commit now waits for enough standbys (primary only). By the instance.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub durable: Option<bool>,

    /// The address it is reached at by the other instances. By the instance.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 45))]
    pub address: Option<String>,

    /// PostgreSQL's identifier of the database cluster it holds. By the instance.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 32))]
    pub system_identifier: Option<String>,

    /// PostgreSQL's version, such as "17.6". By the instance.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 32))]
    pub postgres_version: Option<String>,

    /// The term of the configuration that it knows. By the instance.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 0))]
    pub term: Option<i64>,

    /// Whether it is a voter of that configuration. By the instance.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub voter: Option<bool>,

    /// Whether it has stopped PostgreSQL as the annotation domicile.dev/fence asks. By the instance.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub fenced: Option<bool>,

    /// Whether a changed parameter takes effect only when PostgreSQL is started again. By the instance.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pending_restart: Option<bool>,

    /// The certificate authorities that it trusts, by their key identifiers. By the instance.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 8), inner(length(max = 128)))]
    #[x_kube(merge_strategy = ListMerge::Atomic)]
    pub trusts: Vec<String>,

    /// The authority that signed the certificate which it uses. By the instance.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 128))]
    pub signed_by: Option<String>,

    /// Who replicated from it within the last minute and is none of the store's instances. By the instance, which cuts
    /// them off.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 4), inner(length(max = 512)))]
    #[x_kube(merge_strategy = ListMerge::Atomic)]
    pub strangers: Vec<String>,

    /// Whether the policy permits a primary where it is, and where it is is certain. By the operator.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub may_be_primary: Option<bool>,

    /// Whether it is to go: it is taken out of the voters first, and hands over if it is the primary. By the
    /// operator.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub leaving: Option<bool>,

    /// What it is doing or why it can't, in words, without personal data. By the instance.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 512))]
    pub message: Option<String>,
}

/// What an instance is.
#[derive(JsonSchema, Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum InstanceRole {
    /// Not serving yet, or not any more.
    #[default]
    Starting,
    /// Accepts writes.
    Primary,
    /// Streams from the primary.
    Standby,
    /// Can't go on without a person; `message` says why.
    Failed,
}
