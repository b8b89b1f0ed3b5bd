//! What to do next for one store.
//!
//! Owns the order of steps: intent before effect (who is the first primary is recorded before any pod
//! exists), what pods need before pods, removal last. [`plan`] is a function of what was observed and of the
//! time; executed to its end and observed again it comes to nothing.
//! Never does I/O, never makes randomness, and never steps outside: every region in a step comes from
//! `placement` over what `validate` found lawful.

use jiff::Timestamp;
use k8s_openapi::api::core::v1::{PersistentVolumeClaim, Pod};
use kube::ResourceExt;
use kube::api::DynamicObject;
use serde_json::Value;
use std::fmt;

use super::assess;
use super::build::{self, AppSecret, Settings};
use super::certificates;
use super::kinds::ChildKind;
use super::observe::Observed;
use super::validate::{Lawful, Problem, validate};
use crate::api::conditions::reasons;
use crate::api::privacy_data_store::DeletionPolicy;
use crate::api::residency_policy::Data;
use crate::api::{labels, names};
use crate::placement::{self, Existing, Placed, Site};
use crate::residency::locate;

/// One write.
#[derive(Clone, Debug)]
pub enum Step {
    /// Hold the store's deletion until its volumes are dealt with.
    AddFinalizer,
    /// Let the store go.
    RemoveFinalizer,
    /// Durably say who is primary in which term.
    RecordPrimary {
        /// The instance.
        name: String,
        /// Its term.
        term: i64,
    },
    /// Make the store's certificate authority.
    CreateAuthority,
    /// Make or renew an instance's certificate.
    IssueCertificate {
        /// The instance.
        instance: String,
        /// Its DNS names.
        names: Vec<String>,
    },
    /// Make the application's Secret, or bring it up to date with its password kept.
    WriteAppSecret(Box<AppSecret>),
    /// Make an object that must not exist yet.
    Create(Object, Box<Value>),
    /// Bring an object of ours to what it should be.
    Update(ChildKind, Box<DynamicObject>),
    /// Delete exactly this object, not a namesake.
    Delete {
        /// Its kind.
        object: Object,
        /// Its name.
        name: String,
        /// Its uid: a re-created namesake is left alone.
        uid: String,
    },
    /// Say on a volume claim since which term it holds the primary's data.
    MarkPrimaryVolume {
        /// The claim.
        name: String,
        /// Its uid.
        uid: String,
        /// The term.
        term: i64,
    },
    /// Remove what an instance that is gone said of itself from the store's status.
    ForgetInstance {
        /// The instance.
        name: String,
    },
}

/// The kind of object that a step makes or deletes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Object {
    /// A pod.
    Pod,
    /// A volume claim.
    Claim,
    /// A Secret.
    Secret,
    /// One of [`ChildKind`].
    Child(ChildKind),
}

impl fmt::Display for Step {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::AddFinalizer => write!(f, "add the finalizer"),
            Self::RemoveFinalizer => write!(f, "remove the finalizer"),
            Self::RecordPrimary { name, term } => {
                write!(f, "record {name} as primary of term {term}")
            }
            Self::CreateAuthority => write!(f, "create the certificate authority"),
            Self::IssueCertificate { instance, .. } => {
                write!(f, "issue a certificate to {instance}")
            }
            Self::WriteAppSecret(_) => write!(f, "write the application's Secret"),
            Self::Create(object, value) => {
                write!(
                    f,
                    "create {object:?} {}",
                    value["metadata"]["name"].as_str().unwrap_or_default()
                )
            }
            Self::Update(kind, object) => write!(f, "update {kind:?} {}", object.name_any()),
            Self::Delete { object, name, .. } => write!(f, "delete {object:?} {name}"),
            Self::MarkPrimaryVolume { name, term, .. } => {
                write!(f, "mark volume {name} as the primary's of term {term}")
            }
            Self::ForgetInstance { name } => write!(f, "forget instance {name}"),
        }
    }
}

/// Where an instance is wanted and what is there of it.
#[derive(Clone, Debug)]
pub struct Instance<'a> {
    /// Its name.
    pub name: String,
    /// Where it belongs.
    pub place: Placed,
    /// Its pod.
    pub pod: Option<&'a Pod>,
    /// Its volume claim.
    pub claim: Option<&'a PersistentVolumeClaim>,
}

/// What comes of a pass.
#[derive(Clone, Debug)]
pub struct Plan {
    /// What to write, in this order; the first failure ends the pass.
    pub steps: Vec<Step>,
    /// What to say.
    pub draft: assess::Draft,
}

/// Decides.
#[must_use]
pub fn plan(observed: &Observed, settings: &Settings, now: Timestamp) -> Plan {
    let store = &observed.store;
    if store.metadata.deletion_timestamp.is_some() {
        return Plan {
            steps: farewell(observed),
            draft: assess::deleting(observed),
        };
    }
    if observed.namespace_ending {
        return Plan {
            steps: Vec::new(),
            draft: assess::deleting(observed),
        };
    }
    if store
        .annotations()
        .get(labels::PAUSE)
        .is_some_and(|v| v == "true")
    {
        return Plan {
            steps: Vec::new(),
            draft: assess::paused(observed),
        };
    }
    let lawful = match validate(observed) {
        Ok(lawful) => lawful,
        // Nothing is touched: a policy that is briefly gone (renamed, re-applied) must not take a store down.
        Err(problem) => {
            return Plan {
                steps: Vec::new(),
                draft: assess::stalled(observed, &[problem]),
            };
        }
    };
    let primary = store.status.as_ref().and_then(|s| s.primary.clone());
    if primary.is_none() && !lawful.problems.is_empty() {
        return Plan {
            steps: Vec::new(),
            draft: assess::stalled(observed, &lawful.problems),
        };
    }

    let placement = place(observed, &lawful, primary.as_deref());
    let mut steps = Vec::new();
    if !store
        .finalizers()
        .iter()
        .any(|f| f == labels::STORE_FINALIZER)
    {
        steps.push(Step::AddFinalizer);
    }
    let term;
    let primary = match primary {
        Some(primary) => {
            term = store.status.as_ref().and_then(|s| s.term).unwrap_or(1);
            primary
        }
        None => match found(observed, &lawful, &placement.placed) {
            Ok(Some(Founding { name, term: first })) => {
                steps.push(Step::RecordPrimary {
                    name: name.clone(),
                    term: first,
                });
                term = first;
                name
            }
            Ok(None) => {
                return Plan {
                    steps: Vec::new(),
                    draft: assess::waiting(observed, &lawful, &placement),
                };
            }
            Err(problem) => {
                return Plan {
                    steps: Vec::new(),
                    draft: assess::stalled(observed, &[problem]),
                };
            }
        },
    };

    let instances = instances(observed, &placement.placed);
    furnish(
        observed,
        &lawful,
        &placement.placed,
        settings,
        now,
        &mut steps,
    );
    for instance in &instances {
        certify(observed, instance, now, &mut steps);
        populate(
            observed,
            instance,
            (instance.name == primary).then_some(term),
            settings,
            &mut steps,
        );
    }
    renew(observed, &instances, &primary, settings, &mut steps);
    if lawful.problems.is_empty() {
        retire(
            observed,
            &placement.placed,
            &placement.surplus,
            &primary,
            &mut steps,
        );
    }
    let draft = assess::assess(observed, &lawful, &placement, &instances, &primary, term);
    Plan { steps, draft }
}

/// Nodes whose whereabouts are certain, as sites. A node also needs the operator's stamp, which affinity
/// names: without it the scheduler could not put the pod there.
#[must_use]
pub fn sites(observed: &Observed) -> Vec<Site> {
    observed
        .nodes
        .iter()
        .filter_map(|node| {
            let region = locate(node, observed.regions.iter().map(AsRef::as_ref))
                .region()?
                .to_owned();
            let stamped = node.labels.get(labels::NODE_REGION) == Some(&region);
            let zone = node
                .labels
                .get(labels::NODE_ZONE)
                .cloned()
                .unwrap_or_default();
            Some(Site {
                usable: node.usable && stamped,
                region,
                zone,
            })
        })
        .collect()
}

fn place(observed: &Observed, lawful: &Lawful, primary: Option<&str>) -> placement::Placement {
    let store = observed.store.name_any();
    let existing: Vec<Existing> = observed
        .claims
        .iter()
        .filter_map(|claim| {
            let slot = names::slot(&store, &claim.name_any())?;
            Some(Existing {
                slot,
                region: claim.labels().get(labels::REGION)?.clone(),
                zone: claim
                    .labels()
                    .get(labels::ZONE)
                    .cloned()
                    .unwrap_or_default(),
                fixed: bound(claim),
            })
        })
        .collect();
    // While something unlawful is asked for, nothing new is made: no wants beyond what exists.
    let wants = if lawful.problems.is_empty() {
        lawful.wants.clone()
    } else {
        at_most_existing(&lawful.wants, &existing)
    };
    let keep = primary.and_then(|p| names::slot(&store, p));
    let mut placement = placement::place(&wants, &sites(observed), &existing, keep);
    if !lawful.problems.is_empty() {
        placement.surplus.clear();
        placement.waiting.clear();
    }
    placement
}

fn at_most_existing(wants: &[placement::Want], existing: &[Existing]) -> Vec<placement::Want> {
    let count = |region: &str| {
        u32::try_from(existing.iter().filter(|e| e.region == region).count()).unwrap_or(0)
    };
    wants
        .iter()
        .map(|w| placement::Want {
            region: w.region.clone(),
            instances: w.instances.min(count(&w.region)),
        })
        .collect()
}

/// Whether the claim's volume exists.
#[must_use]
pub fn bound(claim: &PersistentVolumeClaim) -> bool {
    claim
        .spec
        .as_ref()
        .and_then(|s| s.volume_name.as_deref())
        .is_some_and(|v| !v.is_empty())
}

struct Founding {
    name: String,
    term: i64,
}

/// Who is the first primary of a store that has none on record. A store that takes up retained volumes
/// begins with the one that was primary last.
fn found(
    observed: &Observed,
    lawful: &Lawful,
    placed: &[Placed],
) -> Result<Option<Founding>, Problem> {
    let store = observed.store.name_any();
    let may = |region: &str| lawful.permissions.permits(Data::Primary, region);
    if observed.claims.is_empty() {
        let slot = placement::first_primary(placed, may);
        return Ok(slot.map(|slot| Founding {
            name: names::instance(&store, slot),
            term: 1,
        }));
    }
    let last = observed
        .claims
        .iter()
        .filter_map(|c| {
            Some((
                c.annotations()
                    .get(labels::PRIMARY_TERM)?
                    .parse::<i64>()
                    .ok()?,
                c,
            ))
        })
        .max_by_key(|(term, c)| (*term, c.name_any()));
    let Some((term, claim)) = last else {
        let volumes: Vec<String> = observed.claims.iter().map(ResourceExt::name_any).collect();
        return Err(Problem {
            reason: reasons::INVALID,
            message: format!(
                "volume claims of an earlier store of this name exist ({}), and none says that it was the primary's: annotate the right one with {}=1, or delete them if their data is not wanted",
                volumes.join(", "),
                labels::PRIMARY_TERM
            ),
        });
    };
    let region = claim
        .labels()
        .get(labels::REGION)
        .map(String::as_str)
        .unwrap_or_default();
    if !may(region) {
        return Err(Problem {
            reason: reasons::REGION_NOT_PERMITTED,
            message: format!(
                "the retained volume {} of the last primary is in region {region}, which ResidencyPolicy {} does not permit for Primary",
                claim.name_any(),
                lawful.permissions.policy()
            ),
        });
    }
    if placed
        .iter()
        .all(|p| names::instance(&store, p.slot) != claim.name_any())
    {
        return Err(Problem {
            reason: reasons::INVALID,
            message: format!(
                "the retained volume {} of the last primary is in region {region}, for which spec.placement asks no instance: add the region, or delete the claim if its data is not wanted",
                claim.name_any()
            ),
        });
    }
    Ok(Some(Founding {
        name: claim.name_any(),
        term: term.saturating_add(1),
    }))
}

fn instances<'a>(observed: &'a Observed, placed: &[Placed]) -> Vec<Instance<'a>> {
    let store = observed.store.name_any();
    placed
        .iter()
        .map(|place| {
            let name = names::instance(&store, place.slot);
            Instance {
                place: place.clone(),
                pod: observed.pods.iter().find(|p| p.name_any() == name),
                claim: observed.claims.iter().find(|c| c.name_any() == name),
                name,
            }
        })
        .collect()
}

/// What the store has once: identity, Services, authority, the application's Secret.
fn furnish(
    observed: &Observed,
    lawful: &Lawful,
    placed: &[Placed],
    settings: &Settings,
    now: Timestamp,
    steps: &mut Vec<Step>,
) {
    for (kind, wanted) in build::children(&observed.store, placed, settings) {
        match observed.children.get(&(kind, wanted.name_any())) {
            None => steps.push(Step::Create(
                Object::Child(kind),
                Box::new(complete(kind, &wanted)),
            )),
            Some(found) if found.metadata.deletion_timestamp.is_some() => {}
            Some(found) if differs(kind, &wanted, found) => {
                let mut wanted = wanted;
                wanted.metadata.uid.clone_from(&found.metadata.uid);
                steps.push(Step::Update(kind, Box::new(wanted)));
            }
            Some(_) => {}
        }
    }
    let authority = observed.authority.as_ref();
    if authority.is_none_or(|a| a.not_after <= now) {
        steps.push(Step::CreateAuthority);
    }
    let secret = AppSecret::new(&observed.store, placed, |r| {
        lawful.permissions.permits(Data::Primary, r)
    });
    let fingerprint = authority.map(|a| a.authority.as_str()).unwrap_or_default();
    if observed.app_secret.as_deref() != Some(secret.hash(fingerprint).as_str()) {
        steps.push(Step::WriteAppSecret(Box::new(secret)));
    }
}

/// The object with its kind, for a plain create.
fn complete(kind: ChildKind, object: &DynamicObject) -> Value {
    let resource = kind.resource();
    let mut value = serde_json::to_value(object).unwrap_or_default();
    value["apiVersion"] = Value::String(resource.api_version);
    value["kind"] = Value::String(resource.kind);
    value
}

/// Whether a child must be written: made from something else than now, or a field of ours changed by hand.
fn differs(kind: ChildKind, wanted: &DynamicObject, found: &DynamicObject) -> bool {
    if wanted.annotations().get(build::HASH) != found.annotations().get(build::HASH) {
        return true;
    }
    let labels_kept = wanted
        .labels()
        .iter()
        .all(|(k, v)| found.labels().get(k) == Some(v));
    // What an EndpointSlice says is the primary's business once it exists.
    let same = kind == ChildKind::EndpointSlice || covers(&found.data, &wanted.data);
    !labels_kept || !same
}

/// Whether `found` says everything that `wanted` says. Lists are compared item by item, in order.
fn covers(found: &Value, wanted: &Value) -> bool {
    match (found, wanted) {
        (Value::Object(found), Value::Object(wanted)) => wanted
            .iter()
            .all(|(key, value)| found.get(key).is_some_and(|f| covers(f, value))),
        (Value::Array(found), Value::Array(wanted)) => {
            found.len() == wanted.len() && found.iter().zip(wanted).all(|(f, w)| covers(f, w))
        }
        _ => found == wanted,
    }
}

fn certify(observed: &Observed, instance: &Instance<'_>, now: Timestamp, steps: &mut Vec<Step>) {
    let store = &observed.store;
    let wanted = certificates::dns_names(
        &store.name_any(),
        &store.namespace().unwrap_or_default(),
        &instance.name,
    );
    let authority = observed.authority.as_ref().map(|a| a.authority.as_str());
    let current = observed.certificates.get(&instance.name);
    let good = authority.is_some_and(|a| current.is_some_and(|c| !c.outdated(now, a, &wanted)));
    if !good {
        steps.push(Step::IssueCertificate {
            instance: instance.name.clone(),
            names: wanted,
        });
    }
}

/// An instance's volume claim and pod.
fn populate(
    observed: &Observed,
    instance: &Instance<'_>,
    primary_term: Option<i64>,
    settings: &Settings,
    steps: &mut Vec<Step>,
) {
    let store = &observed.store;
    let mut terminating = false;
    match instance.claim {
        None => steps.push(Step::Create(
            Object::Claim,
            Box::new(build::claim(store, &instance.place, primary_term)),
        )),
        Some(claim) => {
            terminating = claim.metadata.deletion_timestamp.is_some();
            let marked = claim
                .annotations()
                .get(labels::PRIMARY_TERM)
                .and_then(|t| t.parse::<i64>().ok());
            if let Some(term) = primary_term.filter(|t| marked.is_none_or(|m| m < *t)) {
                steps.push(Step::MarkPrimaryVolume {
                    name: instance.name.clone(),
                    uid: claim.uid().unwrap_or_default(),
                    term,
                });
            }
        }
    }
    match instance.pod {
        // A claim that is going away must go before its pod may use the name again.
        None if terminating => {}
        None => {
            let bound = instance.claim.is_some_and(bound);
            steps.push(Step::Create(
                Object::Pod,
                Box::new(build::pod(store, &instance.place, settings, bound)),
            ));
        }
        Some(pod) if finished(pod) && pod.metadata.deletion_timestamp.is_none() => {
            steps.push(delete_pod(pod));
        }
        Some(_) => {}
    }
}

/// Evicted, or ended otherwise: such a pod never runs again.
fn finished(pod: &Pod) -> bool {
    let phase = pod.status.as_ref().and_then(|s| s.phase.as_deref());
    matches!(phase, Some("Failed" | "Succeeded"))
}

fn delete_pod(pod: &Pod) -> Step {
    Step::Delete {
        object: Object::Pod,
        name: pod.name_any(),
        uid: pod.uid().unwrap_or_default(),
    }
}

/// Pods made from an older description are replaced one at a time, the primary last, and only while every
/// other instance is ready: a bad image then costs one standby and no more. A pod that isn't ready itself
/// may always be replaced, or a bad image could never be mended.
fn renew(
    observed: &Observed,
    instances: &[Instance<'_>],
    primary: &str,
    settings: &Settings,
    steps: &mut Vec<Step>,
) {
    let outdated = |i: &&Instance<'_>| {
        i.pod.is_some_and(|pod| {
            pod.annotations().get(labels::TEMPLATE_HASH)
                != Some(&build::pod_hash(&observed.store, &i.place, settings))
        })
    };
    if instances.iter().any(|i| {
        i.pod
            .is_some_and(|p| p.metadata.deletion_timestamp.is_some())
    }) {
        return;
    }
    let mut candidates: Vec<&Instance<'_>> = instances.iter().filter(outdated).collect();
    candidates.sort_by_key(|i| (assess::pod_ready(i.pod), i.name == primary, i.name.clone()));
    let Some(next) = candidates.first() else {
        return;
    };
    let others_ready = instances
        .iter()
        .filter(|i| i.name != next.name)
        .all(|i| assess::pod_ready(i.pod));
    if let Some(pod) = next
        .pod
        .filter(|_| others_ready || !assess::pod_ready(next.pod))
    {
        steps.push(delete_pod(pod));
    }
}

/// Instances that are not wanted any more go once all that stay are ready, never the primary; and objects
/// named after instances that are gone go with them.
fn retire(
    observed: &Observed,
    placed: &[Placed],
    surplus: &[u32],
    primary: &str,
    steps: &mut Vec<Step>,
) {
    let store = observed.store.name_any();
    let staying: Vec<String> = placed
        .iter()
        .map(|p| names::instance(&store, p.slot))
        .collect();
    let ready = staying
        .iter()
        .all(|name| assess::pod_ready(observed.pods.iter().find(|p| p.name_any() == *name)));
    if !surplus.is_empty() && !ready {
        return;
    }
    let going = |name: &str| {
        name != primary && names::slot(&store, name).is_some() && staying.iter().all(|s| s != name)
    };
    for pod in observed
        .pods
        .iter()
        .filter(|p| going(&p.name_any()) && p.metadata.deletion_timestamp.is_none())
    {
        steps.push(delete_pod(pod));
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
    for entry in
        known.filter(|e| going(&e.name) && observed.pods.iter().all(|p| p.name_any() != e.name))
    {
        steps.push(Step::ForgetInstance {
            name: entry.name.clone(),
        });
    }
}

fn delete_claims(observed: &Observed, chosen: impl Fn(&str) -> bool) -> Vec<Step> {
    observed
        .claims
        .iter()
        .filter(|c| chosen(&c.name_any()) && c.metadata.deletion_timestamp.is_none())
        .map(|c| Step::Delete {
            object: Object::Claim,
            name: c.name_any(),
            uid: c.uid().unwrap_or_default(),
        })
        .collect()
}

/// Deletion: volumes as the policy says, then the store may go. Everything else has it as owner.
fn farewell(observed: &Observed) -> Vec<Step> {
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
