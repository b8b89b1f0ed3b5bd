//! What can be said of a store: conditions, counts, where its instances are.
//!
//! Owns the meaning of the store's conditions. Pure; no times, so that an unchanged world gives unchanged
//! words.
//! Never repeats what an instance says of itself without checking that its pod is ready: what a dead
//! instance said last is not how things are.

use k8s_openapi::api::core::v1::Pod;
use kube::ResourceExt;

use super::evict::Outside;
use super::leader::{self, Leader};
use super::lifecycle::{Farewell, ending, may_be_made, volume_lost};
use super::observe::Observed;
use super::plan::Instance;
use super::requests::fenced;
use super::validate::{Lawful, Problem};
use super::verdicts::{available, durable};
use crate::api::conditions::{self, Verdict, reasons};
use crate::api::labels;
use crate::api::privacy_data_store::{InstanceRole, InstanceStatus};
use crate::api::residency_policy::Data;
use crate::operator::law::told;
use crate::placement::Placement;
use crate::residency::locate;

/// The operator's part of the status, without times.
#[derive(Clone, Debug, PartialEq)]
pub struct Draft {
    /// Conditions, in their order.
    pub verdicts: Vec<Verdict>,
    /// Ready of desired instances.
    pub summary: Option<String>,
    /// Term of the primary.
    pub term: Option<i64>,
    /// The primary.
    pub primary: Option<String>,
    /// The database cluster's identifier, once known.
    pub system_identifier: Option<String>,
    /// Where each instance is (name, region, zone, node), whether it may be primary, whether it is to go.
    pub instances: Vec<InstanceStatus>,
}

/// Whether a pod is ready and not on its way out.
#[must_use]
pub fn pod_ready(pod: Option<&Pod>) -> bool {
    pod.is_some_and(|pod| {
        let conditions = pod
            .status
            .as_ref()
            .and_then(|s| s.conditions.as_deref())
            .unwrap_or_default();
        pod.metadata.deletion_timestamp.is_none()
            && conditions
                .iter()
                .any(|c| c.type_ == "Ready" && c.status == "True")
    })
}

/// A draft that leaves everything as it was recorded, with the three conditions of a pass in front.
fn kept(
    observed: &Observed,
    ready: (&'static str, String),
    reconciling: bool,
    stalled: bool,
) -> Draft {
    let status = observed.store.status.clone().unwrap_or_default();
    let (reason, message) = ready;
    let mut verdicts = vec![
        Verdict::new(conditions::READY, false, reason, message.clone()),
        Verdict::new(
            conditions::RECONCILING,
            reconciling,
            reason,
            if reconciling {
                message.clone()
            } else {
                String::new()
            },
        ),
        Verdict::new(
            conditions::STALLED,
            stalled,
            reason,
            if stalled { message } else { String::new() },
        ),
    ];
    // A failover needs no operator that is willing: who is primary is said all the same.
    let leader = leader::of(&observed.store);
    let (primary, term) = (leader.map(|l| l.name), leader.map(|l| l.term));
    verdicts.push(available(observed, primary));
    verdicts.push(Verdict::unknown(
        conditions::RESIDENT,
        reasons::UNKNOWN,
        "not checked while the store is not worked on; see Ready",
    ));
    verdicts.push(durable(observed, primary));
    Draft {
        verdicts,
        summary: status.summary,
        term: term.or(status.term),
        primary: primary.map(str::to_owned),
        system_identifier: status.system_identifier,
        instances: status
            .instances
            .into_iter()
            .filter(|i| i.region.is_some())
            .map(|i| InstanceStatus {
                name: i.name,
                region: i.region,
                zone: i.zone,
                node: i.node,
                may_be_primary: i.may_be_primary,
                leaving: i.leaving,
                ..Default::default()
            })
            .collect(),
    }
}

/// The store is being deleted.
#[must_use]
pub fn deleting(observed: &Observed) -> Draft {
    kept(
        observed,
        (reasons::DELETING, "the store is being deleted".to_owned()),
        true,
        false,
    )
}

/// The store is being deleted, and keeps requests of workflows that wait for them.
pub fn held(draft: &mut Draft, keeps: &[String]) {
    let message = format!(
        "being deleted, once the workflows are gone whose requests it keeps: delete RightsWorkflow {} first",
        keeps.join(", ")
    );
    for verdict in &mut draft.verdicts {
        let status = match verdict.kind {
            conditions::READY | conditions::STALLED => false,
            conditions::RECONCILING => true,
            _ => continue,
        };
        let said = if verdict.kind == conditions::STALLED {
            String::new()
        } else {
            message.clone()
        };
        *verdict = Verdict::new(verdict.kind, status, reasons::REQUESTS_OPEN, said);
    }
}

/// The store is to be left alone.
#[must_use]
pub fn paused(observed: &Observed) -> Draft {
    let message = format!(
        "left alone while the annotation {} is \"true\"",
        labels::PAUSE
    );
    kept(observed, (reasons::PAUSED, message), false, false)
}

/// A person must act.
#[must_use]
pub fn stalled(observed: &Observed, problems: &[Problem]) -> Draft {
    kept(observed, told(problems), false, true)
}

/// No instance that may be primary can be placed yet.
#[must_use]
pub fn waiting(observed: &Observed, lawful: &Lawful, placement: &Placement) -> Draft {
    let mut message = no_node(observed, placement);
    if message.is_empty() {
        message = format!(
            "no instance is in a region that ResidencyPolicy {} permits for Primary",
            lawful.permissions.policy()
        );
    }
    let mut draft = kept(observed, (reasons::NO_LAWFUL_NODE, message), true, false);
    draft.summary = Some(format!("0/{}", desired(observed)));
    draft
}

pub(super) fn desired(observed: &Observed) -> i32 {
    observed
        .store
        .spec
        .placement
        .iter()
        .map(|p| p.instances)
        .sum()
}

/// Which regions lack a usable node, and why the nodes there are don't count.
fn no_node(observed: &Observed, placement: &Placement) -> String {
    let parts: Vec<String> = placement
        .waiting
        .iter()
        .map(|(region, count)| {
            let located = |n: &&crate::residency::NodeFacts| {
                locate(n, observed.regions.iter().map(AsRef::as_ref)).region() == Some(region.as_str())
            };
            let there: Vec<&str> = observed.nodes.iter().filter(located).map(|n| n.name.as_str()).collect();
            let why = if there.is_empty() {
                "no node is verified to be there".to_owned()
            } else {
                format!("its nodes ({}) are not ready, cordoned, tainted or not stamped yet", there.join(", "))
            };
            format!("{count} instance(s) wait for a node in region {region}: {why}; nothing is placed elsewhere")
        })
        .collect();
    parts.join("; ")
}

/// The whole picture of a store that has, or is about to have, a primary.
#[must_use]
pub fn assess(
    observed: &Observed,
    lawful: &Lawful,
    placement: &Placement,
    instances: &[Instance<'_>],
    outside: &Outside,
    going: &Farewell,
    leader: Leader<'_>,
) -> Draft {
    let primary = leader.name;
    let status = observed.store.status.clone().unwrap_or_default();
    let entry = |name: &str| status.instances.iter().find(|i| i.name == name);
    let ready = |i: &Instance<'_>| {
        pod_ready(i.pod) && entry(&i.name).is_some_and(|e| e.ready == Some(true))
    };
    let ready_count = instances.iter().filter(|i| ready(i)).count();
    let desired = desired(observed);
    let summary = format!("{ready_count}/{desired}");

    let failed: Vec<String> = instances
        .iter()
        .filter_map(|i| entry(&i.name))
        .filter(|e| e.role == Some(InstanceRole::Failed))
        .map(|e| format!("{}: {}", e.name, e.message.as_deref().unwrap_or("failed")))
        .collect();
    let mut troubles: Vec<String> = Vec::new();
    troubles.extend(lawful.problems.iter().map(|p| p.message.clone()));
    troubles.extend(Some(no_node(observed, placement)).filter(|m| !m.is_empty()));
    let residence = outside.verdict(lawful);
    if residence.status != Some(true) {
        troubles.push(residence.message.clone());
    }
    let lost = instances.iter().any(|i| volume_lost(observed, i, primary));
    // The copies that are left decide among themselves who follows, and the volume is then made anew.
    let others: Vec<&str> = instances
        .iter()
        .filter(|i| i.name != primary && i.claim.is_some_and(|c| !ending(c)))
        .filter(|i| entry(&i.name).is_some_and(|e| e.system_identifier.is_some()))
        .map(|i| i.name.as_str())
        .collect();
    let gone = lost;
    let lost = gone && others.is_empty();
    if lost {
        troubles.push(format!(
            "the volume claim of the primary {primary} is gone, and an empty one in its place would pass for the store's data: restore it, or, if the data is not needed, delete the store and its volume claims and make it anew"
        ));
    } else if gone {
        troubles.push(format!(
            "the volume claim of the primary {primary} is gone: {} decide who follows, and it is made anew then",
            others.join(", ")
        ));
    }
    troubles.extend(oddities(observed, lawful, instances, primary));
    let mut pending = None;
    for instance in instances.iter().filter(|i| !ready(i)) {
        let (reason, words) = why_not_ready(observed, instance, entry(&instance.name));
        pending = pending.or(reason);
        troubles.push(format!("{}: {words}", instance.name));
    }

    let primary_serves = available(observed, Some(primary));
    let (reason, message) =
        if ready_count == usize::try_from(desired).unwrap_or(0) && troubles.is_empty() {
            let region = instances
                .iter()
                .find(|i| i.name == primary)
                .map(|i| i.place.region.as_str())
                .unwrap_or_default();
            (
                reasons::AS_SPECIFIED,
                format!("{summary} instances ready; {primary} in region {region} is primary"),
            )
        } else {
            let reason = if !lawful.problems.is_empty() {
                lawful
                    .problems
                    .first()
                    .map_or(reasons::UNKNOWN, |p| p.reason)
            } else if gone {
                reasons::VOLUME_LOST
            } else if residence.status == Some(false) {
                residence.reason
            } else if !failed.is_empty() {
                reasons::INSTANCE_FAILED
            } else if !placement.waiting.is_empty() {
                reasons::NO_LAWFUL_NODE
            } else if let Some(reason) = pending {
                reason
            } else if primary_serves.status == Some(true) {
                reasons::DEGRADED
            } else {
                reasons::STARTING
            };
            (
                reason,
                format!("{summary} instances ready; {}", troubles.join("; ")),
            )
        };
    let all_well = reason == reasons::AS_SPECIFIED;
    let stalled = !lawful.problems.is_empty() || !failed.is_empty() || lost;
    let verdicts = vec![
        Verdict::new(conditions::READY, all_well, reason, message.clone()),
        Verdict::new(
            conditions::RECONCILING,
            !all_well && !stalled,
            reason,
            if all_well || stalled {
                String::new()
            } else {
                message.clone()
            },
        ),
        Verdict::new(
            conditions::STALLED,
            stalled,
            reason,
            if stalled { message } else { String::new() },
        ),
        primary_serves,
        residence,
        durable(observed, Some(primary)),
    ];
    Draft {
        verdicts,
        summary: Some(summary),
        term: Some(leader.term),
        primary: Some(primary.to_owned()),
        system_identifier: status.system_identifier.clone().or_else(|| {
            status
                .instances
                .iter()
                .find(|i| i.name == primary)
                .and_then(|i| i.system_identifier.clone())
        }),
        instances: entries(observed, lawful, instances, going),
    }
}

/// The operator's part of each instance's entry: of those that stay, and of those that are to go and still run.
pub(super) fn entries(
    observed: &Observed,
    lawful: &Lawful,
    instances: &[Instance<'_>],
    going: &Farewell,
) -> Vec<InstanceStatus> {
    let said = observed.store.status.iter().flat_map(|s| &s.instances);
    let said: Vec<&InstanceStatus> = said.collect();
    let mut all: Vec<InstanceStatus> = instances
        .iter()
        .map(|i| {
            let before = said.iter().find(|e| e.name == i.name);
            let may = may_be_primary(observed, lawful, i);
            InstanceStatus {
                may_be_primary: may.or(before.and_then(|e| e.may_be_primary)),
                leaving: going.leaving.contains(&i.name).then_some(true),
                ..where_is(i)
            }
        })
        .collect();
    for name in &going.leaving {
        if all.iter().any(|e| e.name == *name) {
            continue;
        }
        let before = said.iter().find(|e| e.name == *name);
        let pod = observed.pods.iter().find(|p| p.name_any() == *name);
        let claim = observed.claims.iter().find(|c| c.name_any() == *name);
        let labelled = pod.map(|p| p.labels()).or(claim.map(|c| c.labels()));
        let label = labelled.and_then(|l| l.get(labels::REGION).cloned());
        all.push(InstanceStatus {
            name: name.clone(),
            region: before.and_then(|e| e.region.clone()).or(label),
            zone: before.and_then(|e| e.zone.clone()),
            node: before.and_then(|e| e.node.clone()),
            leaving: Some(true),
            ..Default::default()
        });
    }
    all
}

/// Whether an instance may be primary where it is: the policy permits one there, and every witness agrees that
/// its node is there. Doubt is no. `None`: it is on no node, and where it belongs one is permitted.
fn may_be_primary(observed: &Observed, lawful: &Lawful, instance: &Instance<'_>) -> Option<bool> {
    let region = &instance.place.region;
    if !lawful.permissions.permits(Data::Primary, region) {
        return Some(false);
    }
    let spec = instance.pod.and_then(|p| p.spec.as_ref());
    let name = spec
        .and_then(|s| s.node_name.as_deref())
        .filter(|n| !n.is_empty())?;
    let node = observed.nodes.iter().find(|n| n.name == name);
    Some(node.is_some_and(|n| {
        locate(n, observed.regions.iter().map(AsRef::as_ref)).region() == Some(region.as_str())
    }))
}

/// What is not as it should be, though nothing has failed.
fn oddities(
    observed: &Observed,
    lawful: &Lawful,
    instances: &[Instance<'_>],
    primary: &str,
) -> Vec<String> {
    let mut all = Vec::new();
    for instance in instances {
        let (name, region) = (&instance.name, &instance.place.region);
        if instance.claim.is_some_and(ending) {
            all.push(format!(
                "volume claim {name} is being deleted and goes, with its data, when the pod {name} ends"
            ));
        }
        if !may_be_made(observed, lawful, instance, primary) && instance.pod.is_none() {
            all.push(format!(
                "{name} is not made: region {region} is not permitted for it by ResidencyPolicy {}",
                lawful.permissions.policy()
            ));
        }
        if name == primary
            && observed
                .store
                .spec
                .placement
                .iter()
                .all(|p| p.region != *region)
        {
            all.push(format!(
                "primary {name} is in region {region}, for which spec.placement asks no instance"
            ));
        }
    }
    all
}

fn where_is(instance: &Instance<'_>) -> InstanceStatus {
    let node = instance
        .pod
        .and_then(|p| p.spec.as_ref())
        .and_then(|s| s.node_name.clone());
    InstanceStatus {
        name: instance.name.clone(),
        region: Some(instance.place.region.clone()),
        zone: Some(instance.place.zone.clone()).filter(|z| !z.is_empty()),
        node,
        ..Default::default()
    }
}

/// Why an instance isn't ready: by the most telling witness there is.
fn why_not_ready(
    observed: &Observed,
    instance: &Instance<'_>,
    entry: Option<&InstanceStatus>,
) -> (Option<&'static str>, String) {
    let Some(pod) = instance.pod else {
        return (None, "its pod is being made".to_owned());
    };
    if pod.metadata.deletion_timestamp.is_some() {
        return (None, "its pod is ending".to_owned());
    }
    if fenced(&observed.store, &instance.name) {
        let words = format!("is fenced by the annotation {}", labels::FENCE);
        return (None, words);
    }
    let status = pod.status.clone().unwrap_or_default();
    let unscheduled = status
        .conditions
        .iter()
        .flatten()
        .find(|c| c.type_ == "PodScheduled" && c.status == "False");
    if let Some(condition) = unscheduled {
        let there = observed.nodes.iter().any(|n| {
            n.usable
                && locate(n, observed.regions.iter().map(AsRef::as_ref)).region()
                    == Some(instance.place.region.as_str())
        });
        if !there {
            let words = format!(
                "waits for a node in region {}: no usable node is verified to be there, and nothing is placed elsewhere",
                instance.place.region
            );
            return (Some(reasons::NO_LAWFUL_NODE), words);
        }
        let words = format!(
            "can't be scheduled: {}",
            condition.message.as_deref().unwrap_or("no reason given")
        );
        return (Some(reasons::UNSCHEDULABLE), words);
    }
    let containers = status
        .init_container_statuses
        .iter()
        .flatten()
        .chain(status.container_statuses.iter().flatten());
    for container in containers {
        let waiting = container
            .state
            .as_ref()
            .and_then(|s| s.waiting.as_ref())
            .and_then(|w| w.reason.as_deref());
        match waiting {
            // The two alternate every few seconds; one word for both keeps the status still.
            Some("ErrImagePull" | "ImagePullBackOff") => {
                return (None, format!("image {} can't be pulled", container.image));
            }
            Some(
                reason @ ("CrashLoopBackOff"
                | "RunContainerError"
                | "CreateContainerConfigError"
                | "CreateContainerError"
                | "InvalidImageName"),
            ) => {
                return (
                    None,
                    format!("container {} waits: {reason}", container.name),
                );
            }
            _ => {}
        }
    }
    let said = entry
        .and_then(|e| e.message.as_deref())
        .filter(|m| !m.is_empty());
    (None, said.unwrap_or("starting").to_owned())
}
