//! `Region`: a place on Earth where nodes are, and by which evidence a node counts as being there.
//!
//! Owns the type only; matching nodes to regions is `residency::region_of`.

use k8s_openapi::apimachinery::pkg::apis::meta::v1::Condition;
use kube::{CustomResource, KubeSchema};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

use super::schema::{conditions_schema, label_map_schema};

/// Where nodes are. A node is in a Region only if every witness given in `nodes` agrees; a node that no
/// Region or more than one Region claims is nowhere, and nowhere is never permitted.
#[derive(CustomResource, KubeSchema, Clone, Debug, PartialEq, Serialize, Deserialize)]
#[kube(
    group = "domicile.dev",
    version = "v1alpha1",
    kind = "Region",
    plural = "regions",
    status = "RegionStatus",
    category = "domicile",
    shortname = "rgn",
    derive = "PartialEq",
    doc = "Region says where nodes are. A node is in a Region only if every witness given in spec.nodes agrees; a node that no Region, or more than one, claims is nowhere, and nowhere is never permitted.",
    printcolumn(name = "Ready", type_ = "string", json_path = ".status.conditions[?(@.type==\"Ready\")].status", description = "Whether at least one node is in this region"),
    printcolumn(name = "Nodes", type_ = "integer", json_path = ".status.nodes", description = "Nodes verified to be in this region"),
    printcolumn(name = "Used by", type_ = "integer", json_path = ".status.usedBy", description = "Policies, stores and workflows that name this region"),
    printcolumn(name = "Jurisdictions", type_ = "string", json_path = ".spec.jurisdictions", description = "Whose law applies there"),
    printcolumn(name = "Zones", type_ = "string", json_path = ".status.zones", priority = 1, description = "Zones of these nodes"),
    printcolumn(name = "Age", type_ = "date", json_path = ".metadata.creationTimestamp", description = "Time since creation"),
    validation = Rule::new("self.metadata.name.matches('^[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?$')").message("a Region's name becomes a label value: use at most 63 lower-case letters, digits and '-'")
)]
#[serde(rename_all = "camelCase")]
pub struct RegionSpec {
    /// Whose law applies in this region, as ISO 3166 codes: a country (US) or a subdivision (US-CA).
    /// Policies may permit by jurisdiction instead of by region.
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

    /// The witnesses by which a node counts as being in this region.
    pub nodes: NodeWitnesses,
}

/// Evidence for where a node is. Every witness given must agree.
#[derive(KubeSchema, Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
#[x_kube(validation = Rule::new("(has(self.labels) && size(self.labels) > 0) || has(self.providerIDPrefix)").message("give at least one witness: labels, providerIDPrefix, or both; a Region without a witness has no nodes"))]
pub struct NodeWitnesses {
    /// Labels that a node must carry, all of them. A kubelet can set topology.kubernetes.io/region on
    /// itself, so that label alone is a claim: add a node-restriction.kubernetes.io/ label, which no kubelet
    /// can set, or providerIDPrefix.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    #[schemars(schema_with = "label_map_schema")]
    pub labels: BTreeMap<String, String>,

    /// What a node's spec.providerID must begin with, for example "aws:///us-west-2". A prefix that ends in a
    /// digit does not match where another digit follows: "aws:///us-west-2" matches "aws:///us-west-2a/i-1" but
    /// not "aws:///us-west-20/i-1".
    #[serde(
        default,
        rename = "providerIDPrefix",
        skip_serializing_if = "Option::is_none"
    )]
    #[schemars(length(min = 1, max = 253))]
    pub provider_id_prefix: Option<String>,
}

/// What was seen of a Region.
#[derive(KubeSchema, Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct RegionStatus {
    /// Ready: at least one node is verified to be in this region.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(schema_with = "conditions_schema")]
    pub conditions: Vec<Condition>,

    /// The generation that this status speaks of.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 0))]
    pub observed_generation: Option<i64>,

    /// How many nodes are verified to be in this region.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 0))]
    pub nodes: Option<i32>,

    /// How many policies in use permit something here, and how many stores and workflows name it. While there is one, the
    /// Region isn't deleted.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 0))]
    pub used_by: Option<i32>,

    /// The zones (topology.kubernetes.io/zone) of these nodes, sorted.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 64), inner(length(max = 63)))]
    #[x_kube(merge_strategy = ListMerge::Set)]
    pub zones: Vec<String>,
}

/// A reference to an object of a known kind in the same namespace, or of a cluster-scoped kind.
#[derive(JsonSchema, Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct NameRef {
    /// Name of the object.
    #[schemars(
        length(min = 1, max = 63),
        regex(pattern = r"^[a-z0-9]([-a-z0-9]*[a-z0-9])?$")
    )]
    pub name: String,
}
