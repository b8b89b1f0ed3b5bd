//! What can be said of a workflow: conditions, pools, backlog.
//!
//! Owns the meaning of the workflow's conditions. Pure; no times and no counts of requests in words, so that an unchanged
//! world gives unchanged words, and a busy ledger doesn't make a write of every request.

use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use kube::ResourceExt;

use super::backlog::{Reading, Tally};
use super::build::{GATEWAY, WORKER};
use super::kinds::ChildKind;
use super::observe::Observed;
use super::plan::State;
use super::validate::Lawful;
use crate::api::conditions::{self, Verdict, reasons};
use crate::api::labels;
use crate::api::names::rights as names;
use crate::api::rights_workflow::{Backlog, PoolStatus};
use crate::operator::law::{Problem, told};
use crate::operator::store::assess::pod_ready;

/// The status, without times.
#[derive(Clone, Debug, PartialEq)]
pub struct Draft {
    /// Conditions, in their order.
    pub verdicts: Vec<Verdict>,
    /// The workers of each region.
    pub pools: Vec<PoolStatus>,
    /// What is still to be done, when the ledger was last read.
    pub backlog: Option<Backlog>,
}

/// The three conditions of a pass.
fn progress(
    ready: bool,
    reconciling: bool,
    stalled: bool,
    (reason, message): (&'static str, String),
) -> Vec<Verdict> {
    let said = |on: bool| if on { message.clone() } else { String::new() };
    vec![
        Verdict::new(conditions::READY, ready, reason, message.clone()),
        Verdict::new(
            conditions::RECONCILING,
            reconciling,
            reason,
            said(reconciling),
        ),
        Verdict::new(conditions::STALLED, stalled, reason, said(stalled)),
    ]
}

fn draft(observed: &Observed, mut verdicts: Vec<Verdict>, resident: Verdict) -> Draft {
    verdicts.push(resident);
    verdicts.extend(of_ledger(observed));
    Draft {
        verdicts,
        pools: pools(observed),
        backlog: backlog(observed),
    }
}

fn unchecked() -> Verdict {
    Verdict::unknown(
        conditions::RESIDENT,
        reasons::UNKNOWN,
        "not checked while the workflow is not worked on; see Ready",
    )
}

/// Nothing is worked on.
#[must_use]
pub fn resting(observed: &Observed, words: (&'static str, String), reconciling: bool) -> Draft {
    draft(
        observed,
        progress(false, reconciling, false, words),
        unchecked(),
    )
}

/// A person must act.
#[must_use]
pub fn stalled(observed: &Observed, problems: &[Problem]) -> Draft {
    draft(
        observed,
        progress(false, false, true, told(problems)),
        unchecked(),
    )
}

/// Its namespace is being deleted, and its requests are open.
#[must_use]
pub fn held(observed: &Observed) -> Draft {
    draft(
        observed,
        progress(false, false, true, closing(observed)),
        unchecked(),
    )
}

/// What is said of a workflow that is being deleted and may not go yet.
fn closing(observed: &Observed) -> (&'static str, String) {
    let how = format!(
        "to delete it all the same, and leave them unanswered, set the annotation {}: \"true\"",
        labels::ABANDON_REQUESTS
    );
    let tally = observed.reading.tally();
    let what = if tally.is_some_and(|t| t.open > 0) {
        "it goes once its open requests are closed (status.backlog.open), and no others are taken in"
    } else if matches!(observed.reading, Reading::Known(_)) {
        "it goes once its gateways have stopped"
    } else {
        "it goes once its ledger says that no request is open, and at present that can't be asked"
    };
    (
        reasons::REQUESTS_OPEN,
        format!("being deleted: {what}; {how}"),
    )
}

/// The whole picture of a workflow that is worked on.
#[must_use]
pub fn assess(
    observed: &Observed,
    lawful: &Lawful<'_>,
    state: &State,
    problems: &[Problem],
) -> Draft {
    let (counts, short) = counts(observed, lawful);
    let verdicts = if !problems.is_empty() {
        progress(false, false, true, told(problems))
    } else if state.closing {
        progress(false, true, false, closing(observed))
    } else if !state.waits.is_empty() {
        let words = state.waits.join("; ");
        progress(false, true, false, (reasons::STARTING, words))
    } else if short {
        let was_ready = observed.workflow.status.as_ref();
        let was_ready =
            was_ready.is_some_and(|s| conditions::is_true(&s.conditions, conditions::READY));
        let degraded = observed.workflow.status.iter().flat_map(|s| &s.conditions);
        let degraded = degraded
            .filter(|c| c.type_ == conditions::READY)
            .any(|c| c.reason == reasons::DEGRADED);
        let reason = if was_ready || degraded {
            reasons::DEGRADED
        } else {
            reasons::STARTING
        };
        progress(false, true, false, (reason, counts))
    } else {
        progress(true, false, false, (reasons::AS_SPECIFIED, counts))
    };
    draft(observed, verdicts, resident(lawful, state))
}

fn resident(lawful: &Lawful<'_>, state: &State) -> Verdict {
    let kind = conditions::RESIDENT;
    if !state.outside.is_empty() {
        return Verdict::new(kind, false, reasons::OUTSIDE, state.outside.join("; "));
    }
    if !state.unsure.is_empty() {
        return Verdict::unknown(kind, reasons::UNKNOWN, state.unsure.join("; "));
    }
    let policy = lawful.permissions.policy();
    Verdict::new(
        kind,
        true,
        reasons::AS_SPECIFIED,
        format!("gateways and workers are where ResidencyPolicy {policy} permits"),
    )
}

fn ready(observed: &Observed, component: &str, region: Option<&str>) -> i32 {
    let all = observed.pods.iter().filter(|pod| {
        let label = |key: &str| pod.labels().get(key).map(String::as_str);
        label(labels::COMPONENT) == Some(component)
            && (region.is_none() || label(labels::REGION) == region)
            && pod_ready(Some(pod))
    });
    i32::try_from(all.count()).unwrap_or(i32::MAX)
}

/// How many are ready of how many, in words; and whether any are missing.
fn counts(observed: &Observed, lawful: &Lawful<'_>) -> (String, bool) {
    let workflow = &observed.workflow;
    let name = workflow.name_any();
    let gateway = observed
        .children
        .get(&(ChildKind::Deployment, names::gateway(&name)));
    let asked = gateway.and_then(|d| d.data["spec"]["replicas"].as_i64());
    let asked = asked.and_then(|n| i32::try_from(n).ok()).unwrap_or(0);
    let wanted = asked.max(workflow.spec.gateway.replicas.min);
    let up = ready(observed, GATEWAY, None);
    // One that the autoscaler has just asked for is on its way, and missing to nobody.
    let mut short = up < workflow.spec.gateway.replicas.min;
    let mut words = vec![format!("{up}/{wanted} gateways ready")];
    for pool in &lawful.pools {
        let up = ready(observed, WORKER, Some(&pool.region));
        short |= up < pool.min;
        words.push(format!(
            "{up}/{} workers ready in {}",
            pool.min, pool.region
        ));
    }
    (words.join("; "), short)
}

fn pools(observed: &Observed) -> Vec<PoolStatus> {
    let mut all: Vec<PoolStatus> = observed
        .workflow
        .spec
        .workers
        .pools
        .iter()
        .map(|pool| PoolStatus {
            region: pool.region.clone(),
            // Nobody reckons yet what the deadlines need.
            desired: Some(pool.min),
            ready: Some(ready(observed, WORKER, Some(&pool.region))),
        })
        .collect();
    all.sort_by(|a, b| a.region.cmp(&b.region));
    all
}

/// BacklogKnown and DeadlinesFeasible.
fn of_ledger(observed: &Observed) -> [Verdict; 2] {
    let store = &observed.workflow.spec.ledger_ref.name;
    let (known, feasible) = (conditions::BACKLOG_KNOWN, conditions::DEADLINES_FEASIBLE);
    let backlog = match &observed.reading {
        Reading::Known(_) => Verdict::new(
            known,
            true,
            reasons::AS_SPECIFIED,
            format!("the ledger in store {store} is read every few seconds"),
        ),
        Reading::Failed { why, .. } => Verdict::new(
            known,
            false,
            reasons::LEDGER_UNREACHABLE,
            format!("the ledger in store {store} can't be read: {why}"),
        ),
        Reading::Never => Verdict::unknown(
            known,
            reasons::UNKNOWN,
            format!("the ledger in store {store} was not read yet"),
        ),
    };
    let deadlines = match observed.reading.tally() {
        Some(tally) if tally.overdue > 0 => Verdict::new(
            feasible,
            false,
            reasons::OVERDUE,
            "open requests are past their legal deadline: status.backlog.projectedLate says how many",
        ),
        Some(_) => Verdict::unknown(
            feasible,
            reasons::NOT_PROJECTED,
            "no open request is past its legal deadline; whether all will be done in time is not reckoned in this release",
        ),
        None => Verdict::unknown(
            feasible,
            reasons::UNKNOWN,
            "nothing is known of the open requests; see BacklogKnown",
        ),
    };
    [backlog, deadlines]
}

fn backlog(observed: &Observed) -> Option<Backlog> {
    match observed.reading.tally() {
        Some(tally) => Some(of_tally(tally)),
        None => observed.workflow.status.as_ref()?.backlog.clone(),
    }
}

/// A tally as the status has it.
#[must_use]
pub fn of_tally(tally: &Tally) -> Backlog {
    Backlog {
        open: tally.open,
        nearest_deadline: tally.nearest_deadline.map(Time),
        // Only what is late already: nobody reckons yet what will be.
        projected_late: tally.overdue,
    }
}
