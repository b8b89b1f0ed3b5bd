//! The life of instances: made, replaced, retired, and let go.
//!
//! Pure. Never deletes the primary's pod while its volume claim is going away, never removes an instance
//! before those that stay or are to come are ready, and never makes one where the policy doesn't permit it.

use jiff::{SignedDuration, Timestamp};
use k8s_openapi::api::core::v1::{PersistentVolumeClaim, Pod};
use kube::ResourceExt;
use std::collections::{BTreeMap, BTreeSet};

use super::assess;
use super::build::{self, Settings};
use super::certificates;
use super::evict::Outside;
use super::found::initialised;
use super::leader::{Leader, instance_of};
use super::observe::Observed;
use super::plan::{Instance, bound};
use super::rotation;
use super::step::{Object, Step};
use super::validate::{Lawful, data_of_instance};
use crate::api::privacy_data_store::{DeletionPolicy, Durability, InstanceRole, InstanceStatus};
use crate::api::residency_policy::Data;
use crate::api::{labels, names};
use crate::placement::Placement;
use crate::residency::locate;

/// An instance's certificate.
pub fn certify(
    observed: &Observed,
    instance: &Instance<'_>,
    now: Timestamp,
    steps: &mut Vec<Step>,
) {
    let store = &observed.store;
    let wanted = certificates::dns_names(
        &store.name_any(),
        &store.namespace().unwrap_or_default(),
        &instance.name,
    );
    let authorities = observed.authorities.as_ref();
    let current = observed.certificates.get(&instance.name);
    match (authorities, current) {
        // The authority was lost, and is made anew first: others don't trust it yet.
        (None, Some(_)) => {}
        (Some(a), Some(c))
            if !c.outdated(now, &a.active.id, rotation::trusted(observed, a), &wanted) =>
        {
            if c.bundle != a.bundle {
                steps.push(Step::Entrust {
                    instance: instance.name.clone(),
                });
            }
        }
        _ => steps.push(Step::IssueCertificate {
            instance: instance.name.clone(),
            names: wanted,
        }),
    }
}

/// Whether this instance may be made, or made again, where it is placed: the primary where a primary may be.
#[must_use]
pub fn may_be_made(
    observed: &Observed,
    lawful: &Lawful,
    instance: &Instance<'_>,
    primary: &str,
) -> bool {
    let total = observed
        .store
        .spec
        .placement
        .iter()
        .map(|p| p.instances)
        .sum();
    let data = if instance.name == primary {
        Data::Primary
    } else {
        data_of_instance(total)
    };
    lawful.permissions.permits(data, &instance.place.region)
}

/// Whether this is the primary of an initialised store, without a volume: an empty one in its place would
/// pass for the store's data.
#[must_use]
pub fn volume_lost(observed: &Observed, instance: &Instance<'_>, primary: &str) -> bool {
    instance.name == primary && instance.claim.is_none() && initialised(observed)
}

/// An instance's volume claim and pod.
pub fn populate(
    observed: &Observed,
    lawful: &Lawful,
    instance: &Instance<'_>,
    leader: Leader<'_>,
    settings: &Settings,
    steps: &mut Vec<Step>,
) {
    let store = &observed.store;
    if !may_be_made(observed, lawful, instance, leader.name)
        || volume_lost(observed, instance, leader.name)
    {
        return;
    }
    match instance.claim {
        None => {
            // 0: the store is to begin here. The term follows once the volume is known to hold data.
            let mark = (instance.name == leader.name).then_some(0);
            steps.push(Step::Create(
                Object::Claim,
                Box::new(build::claim(store, &instance.place, mark)),
            ));
        }
        Some(claim) => tend_claim(observed, instance, claim, leader, steps),
    }
    match instance.pod {
        // A claim that is going away must go before its pod may use the name again.
        None if instance.claim.is_some_and(ending) => {}
        None if stale_stamp(observed, &instance.place.region) => {}
        None => {
            let witnesses = witnesses(observed, &instance.place.region);
            let bound = instance.claim.is_some_and(bound);
            let pod = build::pod(store, &instance.place, settings, bound, &witnesses);
            steps.push(Step::Create(Object::Pod, Box::new(pod)));
        }
        Some(pod)
            if (finished(pod) || (held_back(pod) && !instance.claim.is_some_and(ending)))
                && pod.metadata.deletion_timestamp.is_none() =>
        {
            steps.push(delete_pod(pod));
        }
        Some(_) => {}
    }
}

fn tend_claim(
    observed: &Observed,
    instance: &Instance<'_>,
    claim: &PersistentVolumeClaim,
    leader: Leader<'_>,
    steps: &mut Vec<Step>,
) {
    let marked = claim
        .annotations()
        .get(labels::PRIMARY_TERM)
        .and_then(|t| t.parse::<i64>().ok());
    let holds_data = observed
        .store
        .status
        .iter()
        .flat_map(|s| &s.instances)
        .any(|i| i.name == instance.name && i.system_identifier.is_some());
    if instance.name == leader.name && holds_data && marked.is_none_or(|m| m < leader.term) {
        steps.push(Step::MarkPrimaryVolume {
            name: instance.name.clone(),
            uid: claim.uid().unwrap_or_default(),
            term: leader.term,
        });
    }
    let labelled = claim
        .labels()
        .get(labels::ZONE)
        .map(String::as_str)
        .unwrap_or_default();
    if !bound(claim) && labelled != instance.place.zone {
        steps.push(Step::MoveClaim {
            name: instance.name.clone(),
            uid: claim.uid().unwrap_or_default(),
            version: claim.resource_version().unwrap_or_default(),
            zone: instance.place.zone.clone(),
        });
    }
}

/// The labels that a Region's nodes must carry: asked of the scheduler as well, so that a stamp which the
/// operator hasn't taken back yet doesn't attract a pod.
fn witnesses(observed: &Observed, region: &str) -> BTreeMap<String, String> {
    let found = observed.regions.iter().find(|r| r.name_any() == region);
    found
        .map(|r| r.spec.nodes.labels.clone())
        .unwrap_or_default()
}

/// Whether a node carries the region's stamp and isn't there (any more): the scheduler would still take it. The stamp
/// goes within a moment, and that change begins the next pass.
fn stale_stamp(observed: &Observed, region: &str) -> bool {
    let regions = || observed.regions.iter().map(AsRef::as_ref);
    observed.nodes.iter().any(|n| {
        n.labels
            .get(labels::NODE_REGION)
            .is_some_and(|r| r == region)
            && locate(n, regions()).region() != Some(region)
    })
}

/// On its way out.
#[must_use]
pub fn ending(claim: &PersistentVolumeClaim) -> bool {
    claim.metadata.deletion_timestamp.is_some()
}

/// Evicted, or ended otherwise: such a pod never runs again.
pub(super) fn finished(pod: &Pod) -> bool {
    let phase = pod.status.as_ref().and_then(|s| s.phase.as_deref());
    matches!(phase, Some("Failed" | "Succeeded"))
}

/// How long a container must have run, for its end to be nothing that it does again at once.
const RAN_WELL: SignedDuration = SignedDuration::from_secs(5);
/// How old a pod must have been when it was killed: so many seconds pass between two that are made anew for this.
const SETTLED: SignedDuration = SignedDuration::from_secs(60);

/// Killed after it had run well, and now kept from coming back by the kubelet, whose pauses grow to five minutes with
/// every kill: a standby is missing meanwhile, and with it perhaps the next failover. A new pod begins at once. One
/// that dies soon after its start, or again and again, is left to the kubelet's pauses.
fn held_back(pod: &Pod) -> bool {
    let Some(created) = &pod.metadata.creation_timestamp else {
        return false;
    };
    let containers = pod
        .status
        .iter()
        .flat_map(|s| s.container_statuses.iter().flatten());
    containers.into_iter().any(|c| {
        let waiting = c.state.as_ref().and_then(|s| s.waiting.as_ref());
        let waits = waiting.is_some_and(|w| w.reason.as_deref() == Some("CrashLoopBackOff"));
        let last = c.last_state.as_ref().and_then(|s| s.terminated.as_ref());
        let killed = last.is_some_and(|t| {
            let (Some(from), Some(to)) = (&t.started_at, &t.finished_at) else {
                return false;
            };
            t.exit_code == SIGKILLED
                && to.0.duration_since(from.0) >= RAN_WELL
                && to.0.duration_since(created.0) >= SETTLED
        });
        waits && killed
    })
}

/// 128 and the number of the signal, as container runtimes tell an end by one.
const SIGKILLED: i32 = 128 + 9;

/// Deletes exactly this pod.
#[must_use]
pub fn delete_pod(pod: &Pod) -> Step {
    Step::Delete {
        object: Object::Pod,
        name: pod.name_any(),
        uid: pod.uid().unwrap_or_default(),
    }
}

/// Pods made from an older description, and those that wait for a restart, are replaced one at a time, the
/// primary last, and only while every other instance is ready: a bad image then costs one standby and no more.
/// The primary hands over by itself when its pod is deleted. A pod that isn't ready itself may always be
/// replaced, or a bad image could never be mended. Whether one was.
///
/// A pod whose claim is going away is left: its end would be the volume's. While that is the primary's,
/// nobody is replaced, since the copies may be all there is soon.
pub fn renew(
    observed: &Observed,
    instances: &[Instance<'_>],
    primary: &str,
    settings: &Settings,
    steps: &mut Vec<Step>,
) -> bool {
    if instances
        .iter()
        .any(|i| i.name == primary && i.claim.is_none_or(ending))
    {
        return false;
    }
    let replaceable = |i: &&Instance<'_>| {
        !i.claim.is_some_and(ending)
            && i.pod.is_some_and(|pod| {
                pod.metadata.deletion_timestamp.is_none()
                    && (outdated(observed, i, pod, settings) || restartable(observed, i, pod))
            })
    };
    let mut candidates: Vec<&Instance<'_>> = instances.iter().filter(replaceable).collect();
    candidates.sort_by_key(|i| (assess::pod_ready(i.pod), i.name == primary, i.name.clone()));
    let Some(next) = candidates.first() else {
        return false;
    };
    // One that is ending isn't ready: no second is taken down before its successor is up.
    let others_ready = instances
        .iter()
        .filter(|i| i.name != next.name)
        .all(|i| assess::pod_ready(i.pod));
    match next.pod {
        Some(pod)
            if !assess::pod_ready(next.pod) || (others_ready && carried(observed, primary)) =>
        {
            steps.push(delete_pod(pod));
            true
        }
        _ => false,
    }
}

pub(super) fn entry<'a>(observed: &'a Observed, name: &str) -> Option<&'a InstanceStatus> {
    let status = observed.store.status.as_ref()?;
    status.instances.iter().find(|e| e.name == name)
}

/// Made from something else than now.
fn outdated(observed: &Observed, instance: &Instance<'_>, pod: &Pod, settings: &Settings) -> bool {
    pod.annotations().get(labels::TEMPLATE_HASH)
        != Some(&build::pod_hash(&observed.store, &instance.place, settings))
}

/// Says that it waits for a restart, and hasn't been made since the parameters changed. The second keeps a
/// parameter that a restart doesn't bring into effect (a lowered max_connections, which a standby may not have
/// before its primary has) from restarting the store for ever, and an old report from restarting a new pod.
fn restartable(observed: &Observed, instance: &Instance<'_>, pod: &Pod) -> bool {
    entry(observed, &instance.name).is_some_and(|e| e.pending_restart == Some(true))
        && pod.annotations().get(labels::PARAMETERS_HASH)
            != Some(&build::parameters_hash(&observed.store))
}

/// Whether another pod may be taken down as far as commits go: not while they already wait for a standby that
/// has just come back and isn't counted yet.
fn carried(observed: &Observed, primary: &str) -> bool {
    let required = observed.store.spec.durability == Durability::Required;
    let governed = observed
        .store
        .status
        .as_ref()
        .is_some_and(|s| s.configuration.is_some());
    let waits = entry(observed, primary)
        .is_some_and(|e| e.role == Some(InstanceRole::Primary) && e.durable == Some(false));
    !(required && governed && waits)
}

/// Instances that are to go. They are told first, by `leaving` in the status: the primary then takes them out
/// of the voters, and hands over if it is one itself; only then their pods go.
#[derive(Clone, Debug, Default)]
pub struct Farewell {
    /// Told, or to be told now.
    pub leaving: BTreeSet<String>,
    /// Nobody counts on them any more.
    pub released: BTreeSet<String>,
}

impl Farewell {
    /// Who goes, and how far that is.
    #[must_use]
    pub fn of(
        observed: &Observed,
        lawful: &Lawful,
        placement: &Placement,
        instances: &[Instance<'_>],
        outside: &Outside,
        leader: Leader<'_>,
    ) -> Self {
        let mut all = Self {
            leaving: outside.leaving(observed, lawful, instances, leader),
            ..Self::default()
        };
        if !lawful.problems.is_empty() {
            return all;
        }
        let complete = placement.waiting.is_empty()
            && instances
                .iter()
                .all(|i| i.pod.is_some_and(|p| assess::pod_ready(Some(p))));
        let told = |name: &str| entry(observed, name).is_some_and(|e| e.leaving == Some(true));
        let store = observed.store.name_any();
        for pod in &observed.pods {
            let name = pod.name_any();
            let surplus = names::slot(&store, &name).is_some()
                && name != leader.name
                && instances.iter().all(|i| i.name != name);
            if surplus && (complete || told(&name)) {
                if told(&name) && !counted(observed, leader, &name) {
                    all.released.insert(name.clone());
                }
                all.leaving.insert(name);
            }
        }
        // A primary where none is asked for stays until another can take over.
        let unasked = |i: &&Instance<'_>| {
            i.name == leader.name && lawful.wants.iter().all(|w| w.region != i.place.region)
        };
        let successor = |i: &Instance<'_>| {
            i.name != leader.name
                && lawful.permissions.permits(Data::Primary, &i.place.region)
                && entry(observed, &i.name).is_some_and(|e| e.ready == Some(true))
        };
        if let Some(primary) = instances.iter().find(unasked)
            && (told(&primary.name) || (complete && instances.iter().any(successor)))
        {
            all.leaving.insert(primary.name.clone());
        }
        all
    }
}

/// Whether the present primary still counts an instance among the voters, or may: what an earlier primary wrote
/// says nothing of now. A store whose instances have agreed on nothing yet counts nobody.
pub(super) fn counted(observed: &Observed, leader: Leader<'_>, name: &str) -> bool {
    let status = observed.store.status.as_ref();
    status
        .and_then(|s| s.configuration.as_ref())
        .is_some_and(|c| {
            c.term < leader.term
                || c.voters
                    .iter()
                    .chain(&c.sync_members)
                    .any(|v| instance_of(v) == name)
        })
}

/// Instances that are not wanted any more go once all that stay are ready, none is still to come and nobody
/// counts on them, never the primary; and objects named after instances that are gone go with them.
pub fn retire(
    observed: &Observed,
    placement: &Placement,
    farewell: &Farewell,
    primary: &str,
    steps: &mut Vec<Step>,
) {
    let store = observed.store.name_any();
    let staying: Vec<String> = placement
        .placed
        .iter()
        .map(|p| names::instance(&store, p.slot))
        .collect();
    let pod = |name: &str| observed.pods.iter().find(|p| p.name_any() == name);
    let complete =
        placement.waiting.is_empty() && staying.iter().all(|name| assess::pod_ready(pod(name)));
    if !placement.surplus.is_empty() && !complete {
        return;
    }
    let going = |name: &str| {
        name != primary
            && names::slot(&store, name).is_some()
            && staying.iter().all(|s| s != name)
            && pod(name).is_none_or(|p| {
                farewell.released.contains(name) || p.metadata.deletion_timestamp.is_some()
            })
    };
    for pod in &observed.pods {
        if going(&pod.name_any()) && pod.metadata.deletion_timestamp.is_none() {
            steps.push(delete_pod(pod));
        }
    }
    for ((kind, name), object) in observed
        .children
        .iter()
        .filter(|((_, name), _)| going(name))
    {
        let uid = object.metadata.uid.clone().unwrap_or_default();
        steps.push(Step::Delete {
            object: Object::Child(*kind),
            name: name.clone(),
            uid,
        });
    }
    for (secret, uid) in &observed.secrets {
        if secret.strip_suffix("-tls").is_some_and(going) {
            steps.push(Step::Delete {
                object: Object::Secret,
                name: secret.clone(),
                uid: uid.clone(),
            });
        }
    }
    if observed.store.spec.deletion_policy == DeletionPolicy::Delete {
        steps.extend(delete_claims(observed, going));
    }
    let known = observed.store.status.iter().flat_map(|s| &s.instances);
    for entry in known.filter(|e| going(&e.name) && pod(&e.name).is_none()) {
        steps.push(Step::ForgetInstance {
            name: entry.name.clone(),
        });
    }
}

/// What the operator has made: somebody's own claim may carry a store's label too.
pub(super) fn ours(observed: &Observed, claim: &PersistentVolumeClaim) -> bool {
    names::slot(&observed.store.name_any(), &claim.name_any()).is_some()
        && claim
            .labels()
            .get(labels::MANAGED_BY)
            .is_some_and(|v| v == labels::MANAGED_BY_VALUE)
}

fn delete_claims(observed: &Observed, chosen: impl Fn(&str) -> bool) -> Vec<Step> {
    observed
        .claims
        .iter()
        .filter(|c| ours(observed, c))
        .filter(|c| chosen(&c.name_any()) && !ending(c))
        .map(|c| Step::Delete {
            object: Object::Claim,
            name: c.name_any(),
            uid: c.uid().unwrap_or_default(),
        })
        .collect()
}

/// Deletion: volumes as the policy says, then the store may go. Everything else has it as owner.
#[must_use]
pub fn farewell(observed: &Observed) -> Vec<Step> {
    if !observed
        .store
        .finalizers()
        .iter()
        .any(|f| f == labels::STORE_FINALIZER)
    {
        return Vec::new();
    }
    let mut steps = match observed.store.spec.deletion_policy {
        DeletionPolicy::Delete => delete_claims(observed, |_| true),
        DeletionPolicy::Retain => Vec::new(),
    };
    steps.push(Step::RemoveFinalizer);
    steps
}
