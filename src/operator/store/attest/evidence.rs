//! What a pass saw, as evidence.
//!
//! Owns the reads that only attestations need (what instances say of themselves) and how objects become evidence. Never fails: what can't be read is evidence of that.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use futures::future::join_all;
use k8s_openapi::api::core::v1::Pod;
use kube::ResourceExt;

use super::super::assess::desired;
use super::super::kinds::ChildKind;
use super::super::leader;
use super::super::observe::Observed;
use super::super::validate::{data_of_instance, validate};
use super::ask::ask;
use crate::api::names;
use crate::api::privacy_data_store::InstanceRole;
use crate::instance::status::Status;
use crate::residency::attestation::Content;
use crate::residency::attestation::evidence::{EndpointSeen, Evidence, Report, VolumeSeen};
use crate::residency::attestation::judge::judge;

/// What instances reported.
pub type Reports = BTreeMap<String, Result<Report, String>>;

/// The volumes of the store's claims.
fn volumes(observed: &Observed) -> Vec<VolumeSeen> {
    let named = observed.claims.iter().filter_map(|claim| {
        let volume = claim.spec.as_ref()?.volume_name.clone()?;
        (!volume.is_empty()).then(|| (claim.name_any(), volume))
    });
    named
        .map(|(claim, volume)| VolumeSeen {
            affinity: match observed.volumes.get(&claim) {
                Some(seen) if !seen.gone => Ok(seen.affinity.clone()),
                _ => Err(format!("there is no PersistentVolume {volume} in the API")),
            },
            claim,
            volume,
        })
        .collect()
}

/// What the instances on nodes say of themselves. All are asked at the same time.
pub async fn reports(observed: &Observed) -> Reports {
    let asked = observed
        .pods
        .iter()
        .filter(|p| node(p).is_some())
        .map(|pod| async move {
            let name = pod.name_any();
            let said = match address(pod) {
                None => Err("it has no address yet, and was not asked".to_owned()),
                // Why exactly is a matter of the moment, and would make each entry another.
                Some(address) => match ask(address).await {
                    Ok(status) if status.instance == name => report(&status),
                    Ok(_) => Err("another instance answers at its address".to_owned()),
                    Err(_) => Err("it did not answer".to_owned()),
                },
            };
            (name, said)
        });
    join_all(asked).await.into_iter().collect()
}

/// What a status says of channels.
fn report(status: &Status) -> Result<Report, String> {
    let Some(slots) = &status.slots else {
        return Err("its PostgreSQL did not answer".to_owned());
    };
    let streams: BTreeSet<String> = status.replication.iter().map(|r| r.name.clone()).collect();
    let leads = status.role == InstanceRole::Primary || !streams.is_empty();
    Ok(Report {
        streams: leads.then_some(streams),
        slots: slots.iter().map(|s| (s.name.clone(), s.active)).collect(),
    })
}

fn node(pod: &Pod) -> Option<String> {
    let name = pod.spec.as_ref()?.node_name.clone()?;
    (!name.is_empty()).then_some(name)
}

fn address(pod: &Pod) -> Option<IpAddr> {
    pod.status.as_ref()?.pod_ip.as_deref()?.parse().ok()
}

/// What can be attested of this.
pub fn content(observed: &Observed, reports: Reports) -> Content {
    let store = observed.store.name_any();
    let lawful = validate(observed);
    let policy = match (&lawful, &observed.policy) {
        (Ok(lawful), Some(policy)) => Ok((policy.as_ref(), &lawful.permissions)),
        (Err(problem), _) => Err(problem.message.clone()),
        (Ok(_), None) => Err("there is no policy".to_owned()),
    };
    let bound = observed
        .pods
        .iter()
        .filter_map(|p| Some((p.name_any(), node(p)?)));
    judge(&Evidence {
        store: &store,
        deleting: observed.store.metadata.deletion_timestamp.is_some(),
        policy,
        regions: observed.regions.iter().map(AsRef::as_ref).collect(),
        nodes: &observed.nodes,
        primary: leader::of(&observed.store).map(|l| l.name),
        copy: data_of_instance(desired(observed)),
        bound: bound.collect(),
        volumes: volumes(observed),
        reports,
        endpoints: endpoints(observed),
    })
}

/// Where the store's EndpointSlices lead.
fn endpoints(observed: &Observed) -> Vec<EndpointSeen> {
    let store = observed.store.name_any();
    let ours = [names::rw(&store), names::ro(&store)];
    let slices = observed
        .children
        .iter()
        .filter(|((kind, name), _)| *kind == ChildKind::EndpointSlice && ours.contains(name));
    let mut all = Vec::new();
    for ((_, slice), object) in slices {
        let endpoints = object.data["endpoints"].as_array();
        let addresses = endpoints
            .into_iter()
            .flatten()
            .flat_map(|e| e["addresses"].as_array().into_iter().flatten())
            .filter_map(|a| a.as_str());
        for text in addresses {
            let has = |p: &&Pod| match (address(p), text.parse::<IpAddr>()) {
                (Some(own), Ok(wanted)) => own == wanted,
                _ => false,
            };
            all.push(EndpointSeen {
                slice: slice.clone(),
                address: text.to_owned(),
                pod: observed.pods.iter().find(has).map(ResourceExt::name_any),
            });
        }
    }
    all
}
