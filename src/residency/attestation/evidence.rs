//! What an attestation is made from.
//!
//! Owns the types in which a pass hands over what it saw, and whether a node meets a requirement. Pure.
//! Never carries the words of an error that vary from one look to the next: they would make each entry another.

use std::collections::{BTreeMap, BTreeSet};

use crate::api::residency_policy::Data;
use crate::api::{Region, ResidencyPolicy};
use crate::residency::{NodeFacts, Permissions};

/// What was seen of one store.
#[derive(Clone, Debug)]
pub struct Evidence<'a> {
    /// The store's name: it tells the names of its instances.
    pub store: &'a str,
    /// Whether it is being deleted.
    pub deleting: bool,
    /// The policy and what it permits, or why none applies.
    pub policy: Result<(&'a ResidencyPolicy, &'a Permissions), String>,
    /// Every Region.
    pub regions: Vec<&'a Region>,
    /// Every node.
    pub nodes: &'a [NodeFacts],
    /// The primary, by the instances' own word.
    pub primary: Option<&'a str>,
    /// What a copy other than the primary's counts as.
    pub copy: Data,
    /// Pods of the store that are bound to a node: name and node.
    pub bound: Vec<(String, String)>,
    /// The store's claims that have a volume.
    pub volumes: Vec<VolumeSeen>,
    /// What instances reported, or why not. Of instances that are bound to a node only.
    pub reports: BTreeMap<String, Result<Report, String>>,
    /// Where the store's EndpointSlices lead.
    pub endpoints: Vec<EndpointSeen>,
}

/// A volume of the store.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct VolumeSeen {
    /// The claim.
    pub claim: String,
    /// The PersistentVolume.
    pub volume: String,
    /// Its node affinity: any of the terms, all requirements of a term. `Ok(None)`: it has none. `Err`: the volume
    /// couldn't be read.
    pub affinity: Result<Option<Vec<Vec<Requirement>>>, String>,
}

/// A requirement on a node, as in a node selector.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Requirement {
    /// The label, or "" for the node's name.
    pub key: String,
    /// The operator, as Kubernetes writes it.
    pub operator: String,
    /// The values.
    pub values: Vec<String>,
}

impl Requirement {
    /// Whether a node meets it. `None`: this operator isn't understood here.
    pub(super) fn met(&self, node: &NodeFacts) -> Option<bool> {
        let value = if self.key.is_empty() {
            Some(&node.name)
        } else {
            node.labels.get(&self.key)
        };
        let listed = value.is_some_and(|v| self.values.contains(v));
        match self.operator.as_str() {
            "In" => Some(listed),
            "NotIn" => Some(!listed),
            "Exists" => Some(value.is_some()),
            "DoesNotExist" => Some(value.is_none()),
            _ => None,
        }
    }

    /// In words: key, operator, values.
    pub(super) fn words(&self) -> String {
        let key = if self.key.is_empty() {
            "metadata.name"
        } else {
            &self.key
        };
        if self.values.is_empty() {
            format!("{key} {}", self.operator)
        } else {
            format!("{key} {} {}", self.operator, self.values.join(", "))
        }
    }
}

/// What an instance says of its PostgreSQL.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Report {
    /// Names of those that stream from it. `None`: it follows, and doesn't report that.
    pub streams: Option<BTreeSet<String>>,
    /// Its physical slots and whether somebody uses them.
    pub slots: BTreeMap<String, bool>,
}

/// One address in an EndpointSlice.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct EndpointSeen {
    /// The slice: STORE-rw or STORE-ro.
    pub slice: String,
    /// The address.
    pub address: String,
    /// The store's pod that has it.
    pub pod: Option<String>,
}
