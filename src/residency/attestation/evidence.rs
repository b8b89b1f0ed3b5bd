//! What an attestation is made from.
//!
//! Owns the types in which a pass hands over what it saw. Pure.
//! Never carries the words of an error that vary from one look to the next: they would make each entry another.

use std::collections::{BTreeMap, BTreeSet};

use crate::api::residency_policy::Data;
use crate::api::{Region, ResidencyPolicy};
use crate::residency::violations::Affinity;
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
    pub affinity: Result<Option<Affinity>, String>,
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
