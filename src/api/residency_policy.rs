//! `ResidencyPolicy`: where which kind of data may be, and why.
//!
//! Owns the type only; what a policy permits is decided in `residency/`.

use k8s_openapi::apimachinery::pkg::apis::meta::v1::Condition;
use kube::{CustomResource, KubeSchema};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

use super::schema::{conditions_schema, label_map_schema};

/// Where which kind of data may be. What is not listed in `permits` is not permitted.
#[derive(CustomResource, KubeSchema, Clone, Debug, PartialEq, Serialize, Deserialize)]
#[kube(
    group = "domicile.dev",
    version = "v1alpha1",
    kind = "ResidencyPolicy",
    plural = "residencypolicies",
    status = "ResidencyPolicyStatus",
    category = "domicile",
    shortname = "respol",
    derive = "PartialEq",
    doc = "ResidencyPolicy says in which regions which kind of data may be, and on what basis. What is not listed in spec.permits is not permitted. Domicile places nothing outside, and says in a store's condition Resident what it finds there.",
    printcolumn(name = "Ready", type_ = "string", json_path = ".status.conditions[?(@.type==\"Ready\")].status", description = "Whether every region it names exists"),
    printcolumn(name = "Basis", type_ = "string", json_path = ".spec.basis", description = "Why the rule exists"),
    printcolumn(name = "Used by", type_ = "integer", json_path = ".status.usedBy", description = "Objects that refer to this policy"),
    printcolumn(name = "On violation", type_ = "string", json_path = ".spec.onViolation", priority = 1, description = "What happens to a copy found outside"),
    printcolumn(name = "Age", type_ = "date", json_path = ".metadata.creationTimestamp", description = "Time since creation"),
    validation = Rule::new("self.metadata.name.matches('^[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?$')").message("a ResidencyPolicy's name becomes a label value: use at most 63 lower-case letters, digits and '-'")
)]
#[serde(rename_all = "camelCase")]
#[x_kube(validation = Rule::new("self.basis != 'Statute' || (has(self.citation) && size(self.citation) > 0)").message("basis Statute needs a citation: name the statute and section that demands this, or use basis Policy or Contract"))]
pub struct ResidencyPolicySpec {
    /// Why the rule exists, for the auditor: an own policy, a contract, or a statute (which needs a
    /// citation: few statutes demand localisation; the CCPA, for one, does not).
    #[serde(default)]
    pub basis: Basis,

    /// The words that an auditor can look up, such as "Records policy 12: consumer records stay in the
    /// United States". No personal data.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 1024))]
    pub citation: Option<String>,

    /// Which kind of data may be where. A kind that is not listed is permitted nowhere.
    #[schemars(length(min = 1, max = 7))]
    #[x_kube(merge_strategy = ListMerge::Map(vec!["data".into()]))]
    pub permits: Vec<Permit>,

    /// Which namespaces may use this policy. Absent: all.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub namespaces: Option<NamespaceSelector>,

    /// What is to happen to a copy that is found outside: Fence stops it and cuts its replication;
    /// FenceAndErase also deletes its volume claim, once another copy is durable (what becomes of the volume then is
    /// its reclaim policy's). The last copy is stopped, never erased.
    #[serde(default)]
    pub on_violation: OnViolation,
}

/// Why a residency rule exists.
#[derive(JsonSchema, Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum Basis {
    /// The organisation's own policy.
    #[default]
    Policy,
    /// A contract with a customer or partner.
    Contract,
    /// A statute or regulation; needs a citation.
    Statute,
}

impl std::fmt::Display for Basis {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        std::fmt::Debug::fmt(self, f)
    }
}

/// What happens to a copy found outside its regions.
#[derive(JsonSchema, Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum OnViolation {
    /// Stop the copy and cut its replication; keep the volume.
    #[default]
    Fence,
    /// Fence, then erase the volume once another copy is durable.
    FenceAndErase,
}

/// A kind of data, or of work on data, that a policy can permit.
#[derive(
    JsonSchema, Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize,
)]
pub enum Data {
    /// The copy that accepts writes.
    Primary,
    /// A streaming copy.
    Standby,
    /// Base backups and archived WAL.
    Backup,
    /// Volume snapshots.
    Snapshot,
    /// Rights workers: they read and erase personal data.
    Worker,
    /// Rights gateways: they take requests in.
    Gateway,
    /// Exports handed to a person or processor.
    Export,
}

impl std::fmt::Display for Data {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        std::fmt::Debug::fmt(self, f)
    }
}

/// One line of a policy: this kind of data may be in these regions, or in every Region of these jurisdictions.
#[derive(KubeSchema, Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
#[x_kube(validation = Rule::new("(has(self.regions) && size(self.regions) > 0) || (has(self.jurisdictions) && size(self.jurisdictions) > 0)").message("give at least one region or jurisdiction; to permit a kind of data nowhere, leave its line out"))]
pub struct Permit {
    /// Which kind of data.
    pub data: Data,

    /// Names of Region objects.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(
        length(max = 64),
        inner(
            length(min = 1, max = 63),
            regex(pattern = r"^[a-z0-9]([-a-z0-9]*[a-z0-9])?$")
        )
    )]
    #[x_kube(merge_strategy = ListMerge::Set)]
    pub regions: Vec<String>,

    /// Every Region that lists one of these in its jurisdictions.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(
        length(max = 16),
        inner(
            length(min = 2, max = 10),
            regex(pattern = r"^[A-Z]{2}(-[A-Z0-9]{1,3})?$")
        )
    )]
    #[x_kube(merge_strategy = ListMerge::Set)]
    pub jurisdictions: Vec<String>,
}

/// Selects namespaces by their labels; all given labels must match.
#[derive(KubeSchema, Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct NamespaceSelector {
    /// Labels that a namespace must carry, all of them.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    #[schemars(schema_with = "label_map_schema")]
    pub match_labels: BTreeMap<String, String>,
}

/// What a ResidencyPolicy comes to, with the Regions as they are now.
#[derive(KubeSchema, Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct ResidencyPolicyStatus {
    /// Ready: every region it names exists, and every jurisdiction has a Region. Enforced: whether the API server
    /// refuses pods outside in namespaces labelled with this policy. Respected: whether every copy of the stores
    /// under this policy is where it permits.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(schema_with = "conditions_schema")]
    pub conditions: Vec<Condition>,

    /// The generation that this status speaks of.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 0))]
    pub observed_generation: Option<i64>,

    /// How many stores, workflows and namespaces (by the label domicile.dev/residency) refer to this policy. While
    /// there is one, the policy isn't deleted.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 0))]
    pub used_by: Option<i32>,

    /// What is permitted where, with jurisdictions resolved to regions. Admission reads this.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 7))]
    #[x_kube(merge_strategy = ListMerge::Map(vec!["data".into()]))]
    pub permits: Vec<ResolvedPermit>,

    /// The nodes on which pods may be at all, sorted: every witness places them in a region that is permitted for
    /// Primary, Standby, Worker or Gateway. Admission reads this where pods are bound. Absent if there are more
    /// than 1000.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 1000), inner(length(max = 253)))]
    #[x_kube(merge_strategy = ListMerge::Atomic)]
    pub nodes: Option<Vec<String>>,

    /// The other policies that permit everything that this one permits, sorted, at most 256: in a namespace with one
    /// of these as its ceiling, this policy can be used. Admission reads this.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 256), inner(length(max = 63)))]
    #[x_kube(merge_strategy = ListMerge::Set)]
    pub within: Vec<String>,
}

/// A permit with its regions spelt out.
#[derive(KubeSchema, Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct ResolvedPermit {
    /// Which kind of data.
    pub data: Data,

    /// Names of the Regions that exist and are permitted, sorted.
    #[serde(default)]
    #[schemars(length(max = 256), inner(length(max = 63)))]
    #[x_kube(merge_strategy = ListMerge::Set)]
    pub regions: Vec<String>,

    /// The values of topology.kubernetes.io/region that these Regions give as witness or that nodes verified to be
    /// there carry, sorted.
    #[serde(default)]
    #[schemars(length(max = 256), inner(length(max = 63)))]
    #[x_kube(merge_strategy = ListMerge::Set)]
    pub node_regions: Vec<String>,
}
