//! `RightsWorkflow`: which systems hold a person's data, how it is erased in each, and with how many workers.
//!
//! Owns the type only. No personal data ever enters it: requests are in the ledger, credentials in Secrets,
//! and what is written here are names of tables, keys and fields.
//!
//! Two decisions that the schema embodies:
//! - `regimes` is an enum, not a pattern. Each id stands for clocks and rules that are compiled in, so an id
//!   that this version doesn't know means nothing: better refused when it is written than found out when a
//!   deadline has passed. A version that knows more regimes widens the enum, which is a compatible change.
//! - A rule that would match more than one person is refused: an empty `where`, a key without a placeholder, a
//!   wildcard next to a placeholder (`{customerId}*` with 12 also matches 123).

use k8s_openapi::apimachinery::pkg::apis::meta::v1::{Condition, Time};
use kube::{CustomResource, KubeSchema};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::privacy_data_store::Resources;
use super::region::NameRef;
use super::rights_targets::Target;
use super::schema::{conditions_schema, date_time_schema};

/// Which systems hold a person's data, and what it takes to erase it from all of them in time.
#[derive(CustomResource, KubeSchema, Clone, Debug, PartialEq, Serialize, Deserialize)]
#[kube(
    group = "domicile.dev",
    version = "v1alpha1",
    kind = "RightsWorkflow",
    plural = "rightsworkflows",
    namespaced,
    status = "RightsWorkflowStatus",
    category = "domicile",
    shortname = "rwf",
    derive = "PartialEq",
    doc = "RightsWorkflow takes privacy requests (deletion, access, correction, opt-out) in, carries each to every system that holds the person's data, and ends it only with proof. Requests are kept in the ledger of a PrivacyDataStore, never in this object.",
    printcolumn(name = "Ready", type_ = "string", json_path = ".status.conditions[?(@.type==\"Ready\")].status", description = "Whether gateway and workers are up and as specified"),
    printcolumn(name = "Open", type_ = "integer", json_path = ".status.backlog.open", description = "Requests that are not finished"),
    printcolumn(name = "Late", type_ = "integer", json_path = ".status.backlog.projectedLate", description = "Requests that will miss their legal deadline as things are"),
    printcolumn(name = "Next deadline", type_ = "string", json_path = ".status.backlog.nearestDeadline", description = "The earliest legal deadline of an open request"),
    printcolumn(name = "Feasible", type_ = "string", json_path = ".status.conditions[?(@.type==\"DeadlinesFeasible\")].status", description = "Whether every deadline holds with the workers that are permitted"),
    printcolumn(name = "Ledger", type_ = "string", json_path = ".spec.ledgerRef.name", priority = 1, description = "The PrivacyDataStore that keeps the requests"),
    printcolumn(name = "Policy", type_ = "string", json_path = ".spec.residencyPolicyRef.name", priority = 1, description = "The ResidencyPolicy"),
    printcolumn(name = "Reason", type_ = "string", json_path = ".status.conditions[?(@.type==\"Ready\")].message", priority = 1, description = "Why it is or is not Ready"),
    printcolumn(name = "Age", type_ = "date", json_path = ".metadata.creationTimestamp", description = "Time since creation"),
    validation = Rule::new("self.metadata.name.matches('^[a-z]([-a-z0-9]{0,38}[a-z0-9])?$')").message("a RightsWorkflow's name becomes part of the names of Deployments and Services: begin with a letter and use at most 40 lower-case letters, digits and '-'")
)]
#[serde(rename_all = "camelCase")]
#[x_kube(
    validation = Rule::new("self.targets.all(t, (!has(t.postgresql) || t.postgresql.erase.all(e, e.where.all(c, e.where[c] in self.identifiers))) && (!has(t.mysql) || t.mysql.erase.all(e, e.where.all(c, e.where[c] in self.identifiers))))")
        .message("a where of a PostgreSQL or MySQL target uses an identifier that spec.identifiers doesn't list: correct the name, or add it to spec.identifiers").field_path(".targets"),
    validation = Rule::new("self.targets.all(t, (!has(t.opensearch) || t.opensearch.erase.all(e, e.where.all(c, e.where[c] in self.identifiers))) && (!has(t.mongodb) || t.mongodb.erase.all(e, e.where.all(c, e.where[c] in self.identifiers))))")
        .message("a where of an OpenSearch or MongoDB target uses an identifier that spec.identifiers doesn't list: correct the name, or add it to spec.identifiers").field_path(".targets"),
    validation = Rule::new("self.targets.all(t, !has(t.redis) || t.redis.keys.all(k, k.split('{', 5).all(p, !p.contains('}') || p.split('}', 2)[0] in self.identifiers)))")
        .message("a key of a Redis target has a placeholder that spec.identifiers doesn't list: correct it, or add it to spec.identifiers").field_path(".targets"),
    validation = Rule::new("self.targets.all(t, !has(t.nats) || t.nats.subjects.all(k, k.split('{', 5).all(p, !p.contains('}') || p.split('}', 2)[0] in self.identifiers)))")
        .message("a subject of a NATS target has a placeholder that spec.identifiers doesn't list: correct it, or add it to spec.identifiers").field_path(".targets"),
    validation = Rule::new("self.targets.all(t, !has(t.kafka) || t.kafka.topics.all(k, !has(k.key) || k.key.split('{', 5).all(p, !p.contains('}') || p.split('}', 2)[0] in self.identifiers)))")
        .message("a key of a Kafka target has a placeholder that spec.identifiers doesn't list: correct it, or add it to spec.identifiers").field_path(".targets"),
    validation = Rule::new("self.targets.all(t, !has(t.s3) || ((!has(t.s3.prefixes) || t.s3.prefixes.all(k, k.split('{', 5).all(p, !p.contains('}') || p.split('}', 2)[0] in self.identifiers))) && (!has(t.s3.objects) || t.s3.objects.all(k, k.split('{', 5).all(p, !p.contains('}') || p.split('}', 2)[0] in self.identifiers)))))")
        .message("a prefix or object of an S3 target has a placeholder that spec.identifiers doesn't list: correct it, or add it to spec.identifiers").field_path(".targets"),
    validation = Rule::new("self.targets.all(t, !has(t.webhook) || t.webhook.identifiers.all(i, i in self.identifiers))")
        .message("a Webhook target is to be sent an identifier that spec.identifiers doesn't list: correct the name, or add it to spec.identifiers").field_path(".targets"),
    validation = Rule::new("self.targets.all(t, !has(t.region) || self.workers.pools.exists(p, p.region == t.region))")
        .message("a target is in a region without workers, and workers touch only targets of their own region: add a pool for that region to spec.workers.pools").field_path(".workers.pools"),
    validation = Rule::new("!('us-ca-ccpa' in self.regimes) || self.retention.closedRequestsMonths >= 24")
        .message("regime us-ca-ccpa asks for records of requests for at least 24 months (11 CCR 7101): set spec.retention.closedRequestsMonths to 24 or more").field_path(".retention.closedRequestsMonths")
)]
pub struct RightsWorkflowSpec {
    /// The PrivacyDataStore, in the same namespace, that keeps the requests: they are replicated, fail over and
    /// stay in their regions as that store's data does. It can't be changed, since the requests lie there.
    #[x_kube(validation = Rule::new("self == oldSelf").message("ledgerRef can't be changed, since the requests lie in that store: make another RightsWorkflow, and delete this one when its requests are closed"))]
    pub ledger_ref: NameRef,

    /// The ResidencyPolicy that says in which regions gateways (Gateway) and workers (Worker) may run.
    pub residency_policy_ref: NameRef,

    /// Under which laws requests are answered. Of several that apply to one request, the earliest deadline and
    /// the widest deletion hold.
    #[schemars(length(min = 1, max = 8))]
    #[x_kube(merge_strategy = ListMerge::Set)]
    pub regimes: Vec<Regime>,

    /// Names of what a request identifies a person by, such as customerId or email; targets use them in where
    /// and as placeholders: {customerId}. Names only, never values.
    #[schemars(
        length(min = 1, max = 16),
        inner(length(min = 1, max = 32), regex(pattern = r"^[a-z][A-Za-z0-9]*$"))
    )]
    #[x_kube(merge_strategy = ListMerge::Set)]
    pub identifiers: Vec<String>,

    /// Every system that holds the person's data. A request is finished only when it is done in all of them.
    #[schemars(length(min = 1, max = 64))]
    #[x_kube(merge_strategy = ListMerge::Map(vec!["name".into()]))]
    pub targets: Vec<Target>,

    /// How many seconds a request should take, since people expect "delete me" to happen now. It orders work
    /// inside the legal deadlines and never replaces them.
    #[serde(default = "default_promptness")]
    #[schemars(range(min = 1, max = 86400))]
    pub promptness_seconds: i32,

    /// The gateway, which takes requests in over HTTP and answers only when they are durable.
    #[serde(default)]
    pub gateway: Gateway,

    /// The workers, which carry requests to the targets.
    pub workers: Workers,

    /// How long records are kept.
    #[serde(default)]
    pub retention: Retention,
}

fn default_promptness() -> i32 {
    10
}

/// A law, or a group of laws with the same clocks, whose deadlines and duties are built in.
#[derive(
    JsonSchema, Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize,
)]
pub enum Regime {
    /// California Consumer Privacy Act: acknowledged in 10 business days, answered in 45 days, extended once by 45.
    #[serde(rename = "us-ca-ccpa")]
    UsCaCcpa,
    /// California Delete Act (data brokers): in each cycle of 45 days, no extension.
    #[serde(rename = "us-ca-delete-act")]
    UsCaDeleteAct,
    /// General Data Protection Regulation: one month, extended by two.
    #[serde(rename = "eu-gdpr")]
    EuGdpr,
    /// The United Kingdom's GDPR: one month, extended by two.
    #[serde(rename = "uk-gdpr")]
    UkGdpr,
    /// Virginia Consumer Data Protection Act: 45 days, extended once by 45.
    #[serde(rename = "us-va")]
    UsVa,
    /// Colorado Privacy Act: 45 days, extended once by 45.
    #[serde(rename = "us-co")]
    UsCo,
    /// Brazil's LGPD: 15 days, no extension.
    #[serde(rename = "br-lgpd")]
    BrLgpd,
    /// Korea's PIPA: 10 days.
    #[serde(rename = "kr-pipa")]
    KrPipa,
}

/// The gateway, which takes requests in.
#[derive(KubeSchema, Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Gateway {
    /// Between how many replicas it is scaled, by its own load.
    #[serde(default)]
    pub replicas: ReplicaRange,

    /// What each replica may use.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub resources: Option<Resources>,
}

/// The fewest and the most replicas.
#[derive(KubeSchema, Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
#[x_kube(validation = Rule::new("self.min <= self.max").message("min is greater than max: raise max, or lower min"))]
pub struct ReplicaRange {
    /// The fewest replicas. With 1, no requests are taken in while its node is down.
    #[serde(default = "default_gateway_min")]
    #[schemars(range(min = 1, max = 100))]
    pub min: i32,

    /// The most replicas.
    #[serde(default = "default_gateway_max")]
    #[schemars(range(min = 1, max = 100))]
    pub max: i32,
}

impl Default for ReplicaRange {
    fn default() -> Self {
        Self {
            min: default_gateway_min(),
            max: default_gateway_max(),
        }
    }
}

fn default_gateway_min() -> i32 {
    2
}

fn default_gateway_max() -> i32 {
    6
}

/// The workers, which carry requests to the targets.
#[derive(KubeSchema, Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Workers {
    /// Enforce: the number of workers is set to what the deadlines need. Recommend: that number is only reported
    /// in the status, and something else sets the replicas.
    #[serde(default)]
    pub scaling: Scaling,

    /// The workers of each region. Workers touch only targets of their own region, so every region of a target
    /// needs a pool, and the policy must permit it for Worker.
    #[schemars(length(min = 1, max = 16))]
    #[x_kube(merge_strategy = ListMerge::Map(vec!["region".into()]))]
    pub pools: Vec<WorkerPool>,
}

/// Whether the number of workers is set or only reported.
#[derive(JsonSchema, Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum Scaling {
    /// Set it.
    #[default]
    Enforce,
    /// Report it only.
    Recommend,
}

/// The workers of one region.
#[derive(KubeSchema, Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
#[x_kube(validation = Rule::new("self.min <= self.max").message(Message::Expression("'in pool ' + self.region + ', min is greater than max: raise max, or lower min'".into())))]
pub struct WorkerPool {
    /// Name of a Region object.
    #[schemars(
        length(min = 1, max = 63),
        regex(pattern = r"^[a-z0-9]([-a-z0-9]*[a-z0-9])?$")
    )]
    pub region: String,

    /// The fewest workers. With 0, there are none while there is nothing to do.
    #[serde(default = "default_pool_min")]
    #[schemars(range(min = 0, max = 1000))]
    pub min: i32,

    /// The most workers. If the deadlines need more, the condition DeadlinesFeasible says so at once.
    #[schemars(range(min = 1, max = 1000))]
    pub max: i32,

    /// What each worker may use.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub resources: Option<Resources>,
}

fn default_pool_min() -> i32 {
    1
}

/// How long records are kept.
#[derive(KubeSchema, Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Retention {
    /// How many months the record of a closed request is kept: its dates, nature, outcome and proof. The keyed
    /// hash that keeps erased data from coming back with a restored backup is kept for good.
    #[serde(default = "default_closed_requests_months")]
    #[schemars(range(min = 1, max = 120))]
    pub closed_requests_months: i32,
}

impl Default for Retention {
    fn default() -> Self {
        Self {
            closed_requests_months: default_closed_requests_months(),
        }
    }
}

fn default_closed_requests_months() -> i32 {
    24
}

/// What was seen of a workflow: numbers and times, nothing of a person.
#[derive(KubeSchema, Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct RightsWorkflowStatus {
    /// Ready (all as specified), Reconciling, Stalled (a person must act), Resident (gateways and workers are where the
    /// policy permits), DeadlinesFeasible (every deadline holds with the workers permitted), BacklogKnown (the ledger
    /// could be read).
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(schema_with = "conditions_schema")]
    pub conditions: Vec<Condition>,

    /// The generation that this status speaks of.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 0))]
    pub observed_generation: Option<i64>,

    /// The workers of each region.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 32))]
    #[x_kube(merge_strategy = ListMerge::Map(vec!["region".into()]))]
    pub pools: Vec<PoolStatus>,

    /// What is still to be done, when the ledger was last read.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub backlog: Option<Backlog>,
}

/// The workers of one region, as they are.
#[derive(KubeSchema, Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct PoolStatus {
    /// Name of the Region.
    #[schemars(length(min = 1, max = 63))]
    pub region: String,

    /// How many workers the deadlines need, within min and max.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 0))]
    pub desired: Option<i32>,

    /// How many workers are ready.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 0))]
    pub ready: Option<i32>,
}

/// What is still to be done.
#[derive(KubeSchema, Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Backlog {
    /// How many requests are not finished.
    #[serde(default)]
    #[schemars(range(min = 0))]
    pub open: i64,

    /// The earliest legal deadline of an open request. Absent: nothing is open.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(schema_with = "date_time_schema")]
    pub nearest_deadline: Option<Time>,

    /// How many open requests will miss their legal deadline with the workers permitted, as things are.
    #[serde(default)]
    #[schemars(range(min = 0))]
    pub projected_late: i64,
}
