//! What to do next for one store.
//!
//! Owns the order of steps: intent before effect (who is the first primary is recorded before any pod
//! exists), what pods need before pods, removal last. [`plan`] is a function of what was observed and of the
//! time; executed to its end and observed again it comes to nothing.
//! Never does I/O, never makes randomness, and never steps outside: every region in a step comes from
//! `placement` over what `validate` found lawful.

use std::time::Duration;

use jiff::Timestamp;
use k8s_openapi::api::core::v1::{PersistentVolumeClaim, Pod};
use kube::ResourceExt;
use kube::api::DynamicObject;

use super::assess;
use super::build::{self, AppSecret, Settings};
use super::evict::Outside;
use super::failovers;
use super::found::{Founding, found, initialised};
use super::kinds::ChildKind;
use super::leader::{self, Leader};
use super::lifecycle::{Farewell, certify, farewell, populate, renew, retire};
use super::observe::Observed;
use super::step::{Object, Step};
use super::validate::{Lawful, validate};
use super::{lost, requests, rotation};
use crate::api::residency_policy::Data;
use crate::api::{labels, names};
use crate::operator::metrics::Residence;
use crate::operator::objects;
use crate::placement::{self, Existing, Placed, Site};
use crate::residency::locate;

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
    /// When to look again, if it can't wait for the next change.
    pub again: Option<Duration>,
    /// How its copies were found to be. `None`: nothing was held against a policy.
    pub residence: Option<Residence>,
}

impl Plan {
    /// Touches nothing.
    fn only(draft: assess::Draft) -> Self {
        Self {
            steps: Vec::new(),
            draft,
            again: None,
            residence: None,
        }
    }
}

/// Decides.
#[must_use]
pub fn plan(observed: &Observed, settings: &Settings, now: Timestamp) -> Plan {
    let store = &observed.store;
    let deleted = store.metadata.deletion_timestamp.is_some();
    // While it keeps requests of a workflow that waits for them, it goes on as if it weren't deleted: they are to be closed.
    if deleted && observed.keeps.is_empty() {
        return Plan {
            steps: farewell(observed),
            draft: assess::deleting(observed),
            again: None,
            residence: None,
        };
    }
    if observed.namespace_ending {
        return Plan::only(assess::deleting(observed));
    }
    if store
        .annotations()
        .get(labels::PAUSE)
        .is_some_and(|v| v == "true")
    {
        return Plan::only(assess::paused(observed));
    }
    let Decided {
        lawful,
        outside,
        placement,
        primary,
        term,
        first,
        mut instances,
    } = match decide(observed, now) {
        Ok(decided) => decided,
        Err(draft) => return Plan::only(*draft),
    };
    let mut steps = Vec::new();
    if !store
        .finalizers()
        .iter()
        .any(|f| f == labels::STORE_FINALIZER)
        && !deleted
    {
        steps.push(Step::AddFinalizer);
    }
    steps.extend(first);
    let leader = Leader {
        name: &primary,
        term,
    };

    // The primary first: what fails for a standby must not keep it from coming back.
    instances.sort_by_key(|i| (i.name != primary, i.place.slot));
    // Before anything that can fail.
    let again = outside.stop(observed, leader, now, &mut steps);
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
        populate(observed, &lawful, instance, leader, settings, &mut steps);
    }
    let rotating = rotation::rotate(observed, &instances, now, &mut steps);
    lost::replace(observed, &instances, leader, now, &mut steps);
    let renewing = renew(observed, &instances, &primary, settings, &mut steps);
    let going = Farewell::of(observed, &lawful, &placement, &instances, &outside, leader);
    if lawful.problems.is_empty() && !renewing {
        retire(observed, &placement, &going, &primary, &mut steps);
    }
    outside.erase(observed, leader, &mut steps);
    requests::answer(observed, &lawful, leader, now, &mut steps);
    if let Some(told) = failovers::due(store, observed.told, now) {
        steps.push(Step::TellFailover(told));
    }
    instances.sort_by_key(|i| i.place.slot);
    let mut draft = assess::assess(
        observed, &lawful, &placement, &instances, &outside, &going, leader,
    );
    let certified = rotation::verdict(observed, &instances, now);
    draft.verdicts.push(certified);
    if deleted {
        assess::held(&mut draft, &observed.keeps);
    }
    Plan {
        steps,
        draft,
        again: again.into_iter().chain(rotating).min(),
        residence: Some(outside.residence(&lawful)),
    }
}

/// What everything else of a pass rests on: what may be where, what is outside, who is primary, who belongs where.
pub(super) struct Decided<'a> {
    /// What is permitted.
    pub(super) lawful: Lawful,
    /// What isn't where it may be.
    pub(super) outside: Outside,
    /// Where instances belong.
    pub(super) placement: placement::Placement,
    /// The primary.
    pub(super) primary: String,
    /// Its term.
    pub(super) term: i64,
    /// The step that names the first primary, if there was none.
    pub(super) first: Option<Step>,
    /// What there is of each instance.
    pub(super) instances: Vec<Instance<'a>>,
}

/// Decides that, or why nothing is to be done. Nothing is touched then: a policy that is briefly gone (renamed,
/// re-applied) must not take a store down.
pub(super) fn decide(
    observed: &Observed,
    now: Timestamp,
) -> Result<Decided<'_>, Box<assess::Draft>> {
    let stalled = |problems: &[_]| Box::new(assess::stalled(observed, problems));
    let store = &observed.store;
    let lawful = validate(observed).map_err(|problem| stalled(&[problem]))?;
    let known = leader::of(store);
    let primary = known.map(|l| l.name.to_owned());
    if primary.is_none() && !lawful.problems.is_empty() {
        return Err(stalled(&lawful.problems));
    }

    let outside = Outside::of(observed, &lawful, primary.as_deref(), now);
    let placement = place(observed, &lawful, primary.as_deref(), &outside);
    let on_record =
        primary.filter(|p| !unlawful_and_unmade(observed, &lawful, &placement.placed, p));
    let (primary, term, first) = match on_record {
        Some(primary) => (primary, known.map_or(1, |l| l.term), None),
        None => match found(observed, &lawful, &placement.placed) {
            Ok(Some(Founding { name, term })) => {
                let term = term.max(status_term(observed).map_or(0, |t| t.saturating_add(1)));
                let first = Step::RecordPrimary {
                    name: name.clone(),
                    term,
                    instead_of: store.status.as_ref().and_then(|s| s.primary.clone()),
                };
                (name, term, Some(first))
            }
            Ok(None) => return Err(Box::new(assess::waiting(observed, &lawful, &placement))),
            Err(problem) => return Err(stalled(&[problem])),
        },
    };
    let instances = instances(observed, &placement.placed);
    Ok(Decided {
        lawful,
        outside,
        placement,
        primary,
        term,
        first,
        instances,
    })
}

fn status_term(observed: &Observed) -> Option<i64> {
    observed.store.status.as_ref().and_then(|s| s.term)
}

/// The primary on record was never made (no volume, no identifier), and would now be made where no primary
/// may be, or nowhere: nodes or the spec have changed since it was recorded. Another may be named then.
fn unlawful_and_unmade(
    observed: &Observed,
    lawful: &Lawful,
    placed: &[Placed],
    primary: &str,
) -> bool {
    let store = observed.store.name_any();
    let made = observed.claims.iter().any(|c| c.name_any() == primary) || initialised(observed);
    let lawfully_placed = placed.iter().any(|p| {
        names::instance(&store, p.slot) == primary
            && lawful.permissions.permits(Data::Primary, &p.region)
    });
    !made && !lawfully_placed
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

fn place(
    observed: &Observed,
    lawful: &Lawful,
    primary: Option<&str>,
    outside: &Outside,
) -> placement::Placement {
    let store = observed.store.name_any();
    let existing: Vec<Existing> = observed
        .claims
        .iter()
        .filter_map(|claim| {
            let name = claim.name_any();
            let region = claim.labels().get(labels::REGION)?;
            // In no region, it takes nobody's place; its number stays taken.
            let given_up = outside.given_up(&name, primary);
            Some(Existing {
                slot: names::slot(&store, &name)?,
                region: if given_up {
                    String::new()
                } else {
                    region.clone()
                },
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
    keep_primary(&mut placement, &existing, keep);
    if !lawful.problems.is_empty() {
        placement.surplus.clear();
        placement.waiting.clear();
    }
    placement
}

/// The primary stays part of its store though its region isn't asked for (any more): its name stays in the
/// application's URI, and its certificate is renewed, until a person or a failover has moved it.
fn keep_primary(placement: &mut placement::Placement, existing: &[Existing], keep: Option<u32>) {
    let Some(primary) = existing.iter().find(|e| Some(e.slot) == keep) else {
        return;
    };
    if placement.placed.iter().all(|p| p.slot != primary.slot) {
        placement.placed.push(Placed {
            slot: primary.slot,
            region: primary.region.clone(),
            zone: primary.zone.clone(),
        });
        placement.placed.sort();
        placement.surplus.retain(|slot| *slot != primary.slot);
    }
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
                Box::new(objects::complete(&kind.resource(), &wanted)),
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
    let authorities = observed.authorities.as_ref();
    if authorities.is_none_or(|a| a.active.not_after <= now) {
        steps.push(Step::CreateAuthority);
    }
    let secret = AppSecret::new(&observed.store, placed, |r| {
        lawful.permissions.permits(Data::Primary, r)
    });
    let bundle = authorities.map(|a| a.bundle.as_str()).unwrap_or_default();
    if observed.app_secret.as_deref() != Some(secret.hash(bundle).as_str()) {
        steps.push(Step::WriteAppSecret(Box::new(secret)));
    }
}

/// Whether a child must be written.
fn differs(kind: ChildKind, wanted: &DynamicObject, found: &DynamicObject) -> bool {
    if kind == ChildKind::EndpointSlice {
        // What it says is the primary's business once it exists.
        objects::outdated(wanted, found)
    } else {
        objects::differs(wanted, found)
    }
}
