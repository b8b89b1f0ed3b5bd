//! One certificate authority takes the place of another, and nobody is locked out meanwhile.
//!
//! Owns the order: the next authority is *announced* (instances and clients come to trust it beside the one that signs);
//! once every instance that runs says that it does, and clients have had their time, it *signs* (instances get
//! certificates from it, and trust both); once every instance says that it uses one, the old one is *retired*.
//! Each step waits for what instances report and not for a guess at how fast a Secret reaches a pod.
//! Pure. Never lets an authority sign that a running instance doesn't trust, nor retires one whose certificate a running
//! instance uses.

use std::collections::BTreeSet;
use std::time::Duration;

use jiff::{SignedDuration, Timestamp};
use kube::ResourceExt;

use super::certificates::{Authorities, Known};
use super::lifecycle::{entry, finished};
use super::observe::Observed;
use super::plan::Instance;
use super::step::Step;
use crate::api::conditions::{self, Verdict, reasons};
use crate::api::privacy_data_store::InstanceStatus;
use crate::api::{PrivacyDataStore, labels, names};

/// How long before its end an authority is replaced. All of a rotation's waiting has room in it.
const ROTATE_BEFORE: SignedDuration = SignedDuration::from_hours(24 * 180);
/// How long clients have to read the next authority's certificate if nobody says otherwise: the kubelet takes up to two
/// minutes to bring a changed Secret into a pod, and libpq and JDBC drivers read it with every connection.
pub const CLIENTS_HAVE: SignedDuration = SignedDuration::from_mins(10);
/// The longest that a person may ask for.
const CLIENTS_HAVE_MAX: SignedDuration = SignedDuration::from_hours(24 * 30);

/// Reasons of the events.
mod told {
    pub const ANNOUNCED: &str = "AuthorityAnnounced";
    pub const SWITCHED: &str = "AuthoritySwitched";
    pub const RETIRED: &str = "AuthorityRetired";
    pub const REFUSED: &str = "RotationRefused";
}

/// How far a rotation is.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Stage<'a> {
    /// There is none.
    Settled,
    /// The next authority is announced; these don't trust it yet.
    Announced(&'a Known, BTreeSet<String>),
    /// The next authority signs; these use another's certificate yet.
    Signing(BTreeSet<String>),
    /// The former authority is taken away; these still trust it.
    Retiring(BTreeSet<String>),
}

/// Whether every instance that runs trusts the authority that signs.
#[must_use]
pub fn trusted(observed: &Observed, authorities: &Authorities) -> bool {
    running(observed, |e| e.trusts.contains(&authorities.active.id)).is_empty()
}

/// The same, as a client of the store sees it: of the instances that have said what they trust.
#[must_use]
pub fn trusted_by_all(store: &PrivacyDataStore, authority: &str) -> bool {
    let mut said = store.status.iter().flat_map(|s| &s.instances);
    said.all(|e| e.trusts.is_empty() || e.trusts.iter().any(|id| id == authority))
}

/// The next step, and how long to wait for it if nothing changes meanwhile.
pub fn rotate(
    observed: &Observed,
    instances: &[Instance<'_>],
    now: Timestamp,
    steps: &mut Vec<Step>,
) -> Option<Duration> {
    let authorities = observed.authorities.as_ref()?;
    let active = &authorities.active.id;
    let stage = stage(observed, authorities, instances);
    let request = observed.store.annotations().get(labels::ROTATE_AUTHORITY);
    let asked = request.map(|value| clients_have(value));
    if let (Some(value), Some(asked)) = (request, &asked) {
        if let Err(why) = asked {
            steps.push(tell(told::REFUSED, true, why.clone()));
        }
        // Once it is under way, or can't be.
        if asked.is_err() || matches!(stage, Stage::Announced(..) | Stage::Signing(_)) {
            steps.push(Step::RemoveAnnotation {
                name: labels::ROTATE_AUTHORITY,
                value: value.clone(),
            });
        }
    }
    match stage {
        Stage::Settled => {
            let ends = now
                .saturating_add(ROTATE_BEFORE)
                .is_ok_and(|soon| soon >= authorities.active.not_after);
            let due = ends.then_some(CLIENTS_HAVE);
            let time = asked.and_then(Result::ok).or(due)?;
            let switch_after = now.saturating_add(time).ok()?;
            steps.push(Step::AnnounceAuthority { switch_after });
            steps.push(tell(
                told::ANNOUNCED,
                false,
                format!(
                    "a new certificate authority is announced, and signs from {switch_after:.0} on, once every instance trusts it"
                ),
            ));
            None
        }
        Stage::Announced(next, waits) if waits.is_empty() => {
            let left = authorities
                .switch_after
                .map(|at| now.duration_until(at))
                // Nobody may ask for more: the clock was set back.
                .filter(|left| *left <= CLIENTS_HAVE_MAX)
                .unwrap_or_default();
            if let Some(left) = Duration::try_from(left).ok().filter(|d| !d.is_zero()) {
                return Some(left);
            }
            let next = next.id.clone();
            let note = format!(
                "authority {} signs from now on; {} is trusted until every instance uses its new certificate",
                short(&next),
                short(active)
            );
            steps.push(Step::SwitchAuthority { next });
            steps.push(tell(told::SWITCHED, false, note));
            None
        }
        Stage::Signing(waits) if waits.is_empty() => {
            let old: Vec<&str> = authorities.old.iter().map(|o| short(o)).collect();
            let note = format!(
                "{} is taken away, and nobody is to trust it any more; authority {} signs",
                old.join(", "),
                short(active)
            );
            steps.push(Step::RetireAuthorities {
                active: active.clone(),
            });
            steps.push(tell(told::RETIRED, false, note));
            None
        }
        Stage::Announced(..) | Stage::Signing(_) | Stage::Retiring(_) => None,
    }
}

/// The condition Certified.
#[must_use]
pub fn verdict(observed: &Observed, instances: &[Instance<'_>], now: Timestamp) -> Verdict {
    let kind = conditions::CERTIFIED;
    let Some(authorities) = &observed.authorities else {
        let words = "the store's certificate authority is being made";
        return Verdict::unknown(kind, reasons::STARTING, words);
    };
    let ending: Vec<String> = instances
        .iter()
        .filter_map(|i| {
            let facts = observed.certificates.get(&i.name)?;
            let day = facts.not_after.strftime("%Y-%m-%d");
            facts
                .ending(now)
                .then(|| format!("that of {} ends on {day}", i.name))
        })
        .collect();
    if !ending.is_empty() {
        let words = format!(
            "certificates could not be renewed for weeks: {}; see what the operator says of the store's Secrets",
            ending.join(", ")
        );
        return Verdict::new(kind, false, reasons::ENDS_SOON, words);
    }
    let active = short(&authorities.active.id);
    match stage(observed, authorities, instances) {
        Stage::Settled => {
            let day = authorities.active.not_after.strftime("%Y-%m-%d");
            let words = format!("authority {active} signs, and ends on {day}");
            Verdict::new(kind, true, reasons::AS_SPECIFIED, words)
        }
        Stage::Announced(next, waits) => {
            let next = short(&next.id);
            let words = if waits.is_empty() {
                let at = authorities.switch_after.unwrap_or(now);
                format!(
                    "authority {next} signs from {at:.0} on; clients read its certificate until then"
                )
            } else {
                format!(
                    "authority {next} is to take the place of {active} once it is trusted by {}",
                    listed(&waits)
                )
            };
            Verdict::new(kind, true, reasons::ROTATING, words)
        }
        Stage::Retiring(waits) => {
            let words = format!(
                "authority {active} signs; a former one is still trusted by {}",
                listed(&waits)
            );
            Verdict::new(kind, true, reasons::ROTATING, words)
        }
        Stage::Signing(waits) => {
            let words = format!(
                "authority {active} signs; the former one is trusted until new certificates are used by {}",
                listed(&waits)
            );
            Verdict::new(kind, true, reasons::ROTATING, words)
        }
    }
}

fn stage<'a>(
    observed: &Observed,
    authorities: &'a Authorities,
    instances: &[Instance<'_>],
) -> Stage<'a> {
    let mut waits = BTreeSet::new();
    // What runs is what counts; what is made later finds its Secret as it is now.
    let mut secrets = |good: &dyn Fn(&super::certificates::Facts) -> bool| {
        for i in instances {
            if !observed.certificates.get(&i.name).is_some_and(good) {
                waits.insert(i.name.clone());
            }
        }
    };
    if let Some(next) = &authorities.next {
        secrets(&|f| f.bundle == authorities.bundle);
        waits.extend(running(observed, |e| e.trusts.contains(&next.id)));
        return Stage::Announced(next, waits);
    }
    let active = Some(authorities.active.id.as_str());
    if authorities.old.is_empty() {
        let alone = |e: &InstanceStatus| e.trusts.iter().all(|id| Some(id.as_str()) == active);
        let mut late = running(observed, alone);
        // Whoever hasn't said anything yet doesn't hold up anything.
        late.retain(|name| entry(observed, name).is_some());
        return if late.is_empty() {
            Stage::Settled
        } else {
            Stage::Retiring(late)
        };
    }
    secrets(&|f| f.signer.as_deref() == active);
    waits.extend(running(observed, |e| e.signed_by.as_deref() == active));
    Stage::Signing(waits)
}

/// The instances that run and haven't said that it is so with them.
fn running(observed: &Observed, so: impl Fn(&InstanceStatus) -> bool) -> BTreeSet<String> {
    observed
        .pods
        .iter()
        // One that waits for a node reads its Secret when it starts.
        .filter(|p| !finished(p) && p.spec.as_ref().is_some_and(|s| s.node_name.is_some()))
        .map(ResourceExt::name_any)
        .filter(|name| names::slot(&observed.store.name_any(), name).is_some())
        .filter(|name| !entry(observed, name).is_some_and(&so))
        .collect()
}

/// How long clients are to have, as a person says it.
///
/// # Errors
/// In words, if it is no duration or out of bounds.
pub fn clients_have(value: &str) -> Result<SignedDuration, String> {
    let refuse = |why: &str| {
        Err(format!(
            "the annotation {} is {value:?}: {why}; it says how long clients have to read the next authority's certificate, as \"10m\"",
            labels::ROTATE_AUTHORITY
        ))
    };
    match value.trim().parse::<SignedDuration>() {
        Ok(time) if time.is_negative() => refuse("it can't be negative"),
        Ok(time) if time > CLIENTS_HAVE_MAX => refuse("it can't be more than 30 days (720h)"),
        Ok(time) => Ok(time),
        Err(_) => refuse("it is no duration"),
    }
}

fn listed(names: &BTreeSet<String>) -> String {
    let names: Vec<&str> = names.iter().map(String::as_str).collect();
    names.join(", ")
}

fn tell(reason: &'static str, warning: bool, note: String) -> Step {
    Step::Tell {
        reason,
        warning,
        note,
    }
}

/// Enough of an identifier to tell two apart.
fn short(id: &str) -> &str {
    id.get(..12).unwrap_or(id)
}
