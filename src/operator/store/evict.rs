//! Copies that are outside: found, told to leave, stopped, given up, and erased where the policy says so.
//!
//! Owns what of a store is outside, and the order: first nobody counts on the copy any more (or the primary hands
//! over), then its pod goes; only then is another made inside, in its place if its volume can be reached from there,
//! else beside it; and its volume goes last, if at all.
//! Pure. Never gives up the primary's volume, which may be the last good copy: a store whose primary can be nowhere
//! lawful is down, and says so. Never erases while another copy isn't durable. Never acts on what can't be known.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use jiff::{SignedDuration, Timestamp};
use kube::ResourceExt;

use super::assess::{desired, pod_ready};
use super::leader::Leader;
use super::lifecycle::{counted, ending, entry, ours};
use super::observe::Observed;
use super::plan::Instance;
use super::step::{Object, Step};
use super::validate::Lawful;
use crate::api::conditions::{self, reasons};
use crate::api::privacy_data_store::InstanceRole;
use crate::api::residency_policy::{Data, OnViolation};
use crate::api::{labels, names};
use crate::operator::hands::lingers;
use crate::operator::metrics::Residence;
use crate::residency::violations::{Finder, Verdict};

/// How long the others have to do without a copy before it is stopped all the same: so long a primary may take to
/// hand over, and so long a label that was changed by mistake may be put back at no cost. Design: five seconds from
/// found to fenced.
pub(super) const GRACE: SignedDuration = SignedDuration::from_secs(2);

/// What of a store is outside.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Outside {
    /// Instances that run outside, and where that is.
    pub running: BTreeMap<String, String>,
    /// Instances that don't run, and whose volumes lie outside.
    pub kept: BTreeMap<String, String>,
    /// Who replicates from it and is none of it.
    pub strangers: Vec<String>,
    /// What can't be known.
    pub unsure: Vec<String>,
    /// Of those whose volumes are kept: no node inside reaches them.
    out_of_reach: BTreeSet<String>,
    /// Since when something runs outside.
    since: Option<Timestamp>,
}

impl Outside {
    /// Finds it.
    #[must_use]
    pub fn of(observed: &Observed, lawful: &Lawful, primary: Option<&str>, now: Timestamp) -> Self {
        let finder = Finder {
            permissions: &lawful.permissions,
            regions: observed.regions.iter().map(AsRef::as_ref).collect(),
            nodes: &observed.nodes,
        };
        let alone = desired(observed) < 2;
        let kinds = |name: &str| -> &'static [Data] {
            if Some(name) == primary {
                &[Data::Primary]
            } else if alone {
                // It is to be the primary, or is a standby that is to go.
                &[Data::Primary, Data::Standby]
            } else {
                &[Data::Standby]
            }
        };
        // Within as one of these is within.
        let judged = |name: &str, judge: &dyn Fn(Data) -> Verdict| {
            let mut verdict = Verdict::Within;
            for data in kinds(name) {
                verdict = judge(*data);
                if !matches!(verdict, Verdict::Outside(_)) {
                    break;
                }
            }
            verdict
        };
        let lies = |name: &str| {
            let affinity = observed.volumes.get(name)?.affinity.as_ref()?;
            judged(name, &|data| finder.reached_by(affinity, data)).outside()
        };
        let store = observed.store.name_any();
        let mut found = Self::default();
        let mut bound = BTreeSet::new();
        for pod in &observed.pods {
            let name = pod.name_any();
            // Somebody's own pod may carry a store's label too.
            if names::slot(&store, &name).is_none() {
                continue;
            }
            let node = pod.spec.as_ref().and_then(|s| s.node_name.as_deref());
            let Some(node) = node.filter(|n| !n.is_empty()) else {
                continue;
            };
            match judged(&name, &|data| finder.on(node, data)) {
                Verdict::Outside(words) => {
                    found
                        .running
                        .insert(name.clone(), format!("{name} is on {words}"));
                }
                Verdict::Unknown(words) => found.unsure.push(format!("{name} is bound to {words}")),
                Verdict::Within => {
                    if let Some(words) = lies(&name) {
                        let words = format!("the volume of {name} is on {words}");
                        found.running.insert(name.clone(), words);
                    }
                }
            }
            bound.insert(name);
        }
        for claim in &observed.claims {
            let name = claim.name_any();
            if names::slot(&store, &name).is_none() || bound.contains(&name) {
                continue;
            }
            let labelled = claim.labels().get(labels::REGION);
            let refused = labelled.and_then(|r| {
                let check = |data| match lawful.permissions.check(data, r.as_str()) {
                    Ok(()) => Verdict::Within,
                    Err(refusal) => Verdict::Outside(refusal.to_string()),
                };
                judged(&name, &check).outside()
            });
            if let Some(words) = lies(&name) {
                let words = format!("volume claim {name} is kept on {words}");
                found.kept.insert(name.clone(), words);
                found.out_of_reach.insert(name);
            } else if let Some(refusal) = refused {
                found.kept.insert(
                    name.clone(),
                    format!("volume claim {name} is kept: {refusal}"),
                );
            }
        }
        found.strangers = strangers(observed);
        found.unsure.sort();
        found.since = (!found.running.is_empty()).then(|| first_told(observed).unwrap_or(now));
        found
    }

    /// Whether an instance's volume can't be used inside, so that another is made in its place: never the primary's.
    #[must_use]
    pub fn given_up(&self, name: &str, primary: Option<&str>) -> bool {
        self.out_of_reach.contains(name) && Some(name) != primary
    }

    /// Who is to be counted on no more. A primary only if another can take over: it stops last.
    #[must_use]
    pub fn leaving(
        &self,
        observed: &Observed,
        lawful: &Lawful,
        instances: &[Instance<'_>],
        leader: Leader<'_>,
    ) -> BTreeSet<String> {
        let present = |name: &String| {
            counted(observed, leader, name)
                || entry(observed, name).is_some_and(|e| e.role.is_some())
        };
        let successor = |i: &Instance<'_>| {
            i.name != leader.name
                && !self.running.contains_key(&i.name)
                && lawful.permissions.permits(Data::Primary, &i.place.region)
                && entry(observed, &i.name).is_some_and(|e| e.ready == Some(true))
        };
        let kept = self.kept.keys().filter(|n| present(n));
        let all = self.running.keys().chain(kept);
        all.filter(|n| *n != leader.name || instances.iter().any(successor))
            .cloned()
            .collect()
    }

    /// Stops what runs outside, once nobody counts on it or the grace is over. How long the rest has.
    pub fn stop(
        &self,
        observed: &Observed,
        leader: Leader<'_>,
        now: Timestamp,
        steps: &mut Vec<Step>,
    ) -> Option<Duration> {
        let left = now.duration_until(self.since? + GRACE);
        // A clock that was set back must not make it longer.
        let left = Duration::try_from(left.min(GRACE)).unwrap_or_default();
        let mut waits: Option<Duration> = None;
        for pod in &observed.pods {
            let name = pod.name_any();
            let Some(words) = self.running.get(&name) else {
                continue;
            };
            if !lingers(pod) {
                continue;
            }
            let claim = observed.claims.iter().find(|c| c.name_any() == name);
            if name == leader.name && claim.is_some_and(ending) {
                // Its end would be the volume's, and that may be the last copy.
                continue;
            }
            let told = entry(observed, &name).is_some_and(|e| e.leaving == Some(true));
            let released = told && name != leader.name && !counted(observed, leader, &name);
            // What was said before may be of another copy: nobody has been asked to do without this one yet.
            let left = if said_outside(observed, &name) {
                left
            } else {
                GRACE.unsigned_abs()
            };
            if !released && !left.is_zero() {
                // The first whose time is over is looked at then, not with the last.
                waits = Some(waits.map_or(left, |w| w.min(left)));
                continue;
            }
            steps.push(Step::Tell {
                reason: reasons::FENCED,
                warning: true,
                note: format!("{name} is stopped: {words}"),
            });
            steps.push(Step::Fence {
                uid: pod.uid().unwrap_or_default(),
                name,
            });
        }
        waits
    }

    /// Erases what is kept outside, if the store's policy says so and another copy is durable.
    pub fn erase(&self, observed: &Observed, leader: Leader<'_>, steps: &mut Vec<Step>) {
        let policy = observed.policy.as_ref();
        if policy.is_none_or(|p| p.spec.on_violation != OnViolation::FenceAndErase) {
            return;
        }
        let alone = desired(observed) < 2;
        let serves = observed
            .pods
            .iter()
            .any(|p| p.name_any() == leader.name && pod_ready(Some(p)));
        let durable = entry(observed, leader.name).is_some_and(|e| {
            e.role == Some(InstanceRole::Primary)
                && e.ready == Some(true)
                && (alone || e.durable == Some(true))
        });
        if !serves || !durable || self.kept.contains_key(leader.name) {
            return;
        }
        for claim in observed.claims.iter().filter(|c| ours(observed, c)) {
            let name = claim.name_any();
            let has_pod = observed.pods.iter().any(|p| p.name_any() == name);
            // While it counts, what the primary says of durability may rest on it.
            if counted(observed, leader, &name) {
                continue;
            }
            let (Some(words), false, false) = (self.kept.get(&name), has_pod, ending(claim)) else {
                continue;
            };
            steps.push(Step::Tell {
                reason: reasons::ERASED,
                warning: true,
                note: format!(
                    "its volume is erased, since {} carries the data: {words}",
                    leader.name
                ),
            });
            steps.push(Step::Delete {
                object: Object::Claim,
                name,
                uid: claim.uid().unwrap_or_default(),
            });
        }
    }

    /// The same in numbers.
    #[must_use]
    pub fn residence(&self, lawful: &Lawful) -> Residence {
        Residence {
            policy: lawful.permissions.policy().to_owned(),
            basis: lawful.permissions.basis(),
            running: self.running.len(),
            kept: self.kept.len(),
            strangers: self.strangers.len(),
            unknown: self.unsure.len(),
            since: self.since,
        }
    }

    /// The condition Resident.
    #[must_use]
    pub fn verdict(&self, lawful: &Lawful) -> conditions::Verdict {
        let said = |all: &BTreeMap<String, String>| all.values().cloned().collect::<Vec<_>>();
        let mut words = said(&self.running);
        words.extend(said(&self.kept).into_iter().map(|w| {
            format!("{w} (delete the claim once nobody needs it, or bring its node back inside)")
        }));
        words.extend(self.strangers.iter().cloned());
        let kind = conditions::RESIDENT;
        if !words.is_empty() {
            let reason = if !self.running.is_empty() {
                reasons::OUTSIDE
            } else if !self.strangers.is_empty() {
                reasons::STRANGER
            } else {
                reasons::FENCED
            };
            conditions::Verdict::new(kind, false, reason, words.join("; "))
        } else if !self.unsure.is_empty() {
            conditions::Verdict::unknown(kind, reasons::UNKNOWN, self.unsure.join("; "))
        } else {
            let policy = lawful.permissions.policy();
            let words = format!("every copy is where ResidencyPolicy {policy} permits");
            conditions::Verdict::new(kind, true, reasons::AS_SPECIFIED, words)
        }
    }
}

/// Who replicates from instances that run and is none of the store's, as they say.
fn strangers(observed: &Observed) -> Vec<String> {
    let entries = observed.store.status.iter().flat_map(|s| &s.instances);
    entries
        .filter(|e| observed.pods.iter().any(|p| p.name_any() == e.name))
        .flat_map(|e| {
            e.strangers
                .iter()
                .map(|words| format!("{words}; {} cuts it off", e.name))
        })
        .collect()
}

/// Whether the store's status says already that this copy runs outside.
fn said_outside(observed: &Observed, name: &str) -> bool {
    let conditions = observed.store.status.iter().flat_map(|s| &s.conditions);
    conditions
        .filter(|c| c.type_ == conditions::RESIDENT && c.reason == reasons::OUTSIDE)
        .any(|c| {
            c.message.split("; ").any(|words| {
                words.starts_with(&format!("{name} is on "))
                    || words.starts_with(&format!("the volume of {name} is on "))
            })
        })
}

/// Since when the store's status says that something is outside.
fn first_told(observed: &Observed) -> Option<Timestamp> {
    let conditions = &observed.store.status.as_ref()?.conditions;
    let told = conditions
        .iter()
        .find(|c| c.type_ == conditions::RESIDENT && c.status == "False")?;
    Some(told.last_transition_time.0)
}
