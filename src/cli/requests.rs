//! `kubectl domicile requests WORKFLOW`: how many requests are where, and how near their deadlines are.
//!
//! Owns the picture. Numbers come from a gateway, through the API server's pod proxy; without the right to use it, from
//! the workflow's status, which is up to half a minute old.
//! Never: an identity. What a gateway says of one request is read at its API, by who may.

use anyhow::Context as _;
use jiff::{SignedDuration, Timestamp};
use k8s_openapi::api::core::v1::Pod;
use kube::api::ListParams;
use kube::{Api, Client, ResourceExt};
use std::fmt::Write as _;
use std::time::Duration;

use crate::api::rights_workflow::RightsWorkflow;
use crate::api::{conditions, labels, names};
use crate::rights::gateway::wire::Tally;

/// How long a gateway has to answer.
const ASK: Duration = Duration::from_secs(3);

/// What was read.
#[derive(Debug)]
pub struct Picture {
    /// The workflow.
    pub workflow: RightsWorkflow,
    /// What a gateway says, or why none can be asked.
    pub counts: Result<Tally, String>,
}

/// Reads and prints.
///
/// # Errors
/// If the workflow can't be read.
pub async fn run(client: Client, namespace: &str, name: &str) -> anyhow::Result<String> {
    let workflows: Api<RightsWorkflow> = Api::namespaced(client.clone(), namespace);
    let Some(workflow) = workflows
        .get_opt(name)
        .await
        .context("the API server can't be asked")?
    else {
        anyhow::bail!(
            "there is no RightsWorkflow {name} in namespace {namespace}; `kubectl get rwf -A` lists all"
        );
    };
    let counts = count(&client, namespace, name).await;
    Ok(render(&Picture { workflow, counts }, Timestamp::now()))
}

async fn count(client: &Client, namespace: &str, workflow: &str) -> Result<Tally, String> {
    let selector = format!(
        "{}={workflow},{}=gateway",
        labels::WORKFLOW,
        labels::COMPONENT
    );
    let pods: Api<Pod> = Api::namespaced(client.clone(), namespace);
    let pods = pods
        .list(&ListParams::default().labels(&selector))
        .await
        .map_err(|e| format!("the gateway's pods can't be listed: {e}"))?;
    let mut why = "no gateway runs".to_owned();
    for pod in pods {
        match ask(client, namespace, &pod.name_any()).await {
            Ok(tally) => return Ok(tally),
            Err(e) => why = e,
        }
    }
    Err(why)
}

async fn ask(client: &Client, namespace: &str, pod: &str) -> Result<Tally, String> {
    let path = format!(
        "/api/v1/namespaces/{namespace}/pods/{pod}:{}/proxy/counts",
        names::HTTP_PORT
    );
    let request = axum::http::Request::get(path)
        .body(Vec::new())
        .map_err(|e| e.to_string())?;
    match tokio::time::timeout(ASK, client.request::<Tally>(request)).await {
        Ok(Ok(tally)) => Ok(tally),
        Ok(Err(kube::Error::Api(status))) if status.is_forbidden() => {
            Err("you may not use pods/proxy here".to_owned())
        }
        Ok(Err(error)) => Err(format!("{pod} can't be asked: {error}")),
        Err(_) => Err(format!("{pod} doesn't answer within {} s", ASK.as_secs())),
    }
}

/// The picture as text.
#[must_use]
pub fn render(picture: &Picture, now: Timestamp) -> String {
    let workflow = &picture.workflow;
    let status = workflow.status.clone().unwrap_or_default();
    let mut out = String::new();
    // Writing to a String can't fail.
    let _ = writeln!(
        out,
        "{}/{}  ledger in store {}",
        workflow.namespace().unwrap_or_default(),
        workflow.name_any(),
        workflow.spec.ledger_ref.name
    );
    match &picture.counts {
        Ok(tally) => counted(&mut out, tally, now),
        Err(why) => {
            let _ = writeln!(out, "  no gateway could be asked ({why}); from the status:");
            match &status.backlog {
                Some(backlog) => {
                    let next = backlog.nearest_deadline.as_ref().map(|t| t.0);
                    let _ = writeln!(out, "  open     {}", backlog.open);
                    let _ = writeln!(out, "  next     {}", deadline(next, now));
                    let _ = writeln!(out, "  late     {}", backlog.projected_late);
                }
                None => {
                    let _ = writeln!(out, "  open     unknown: the ledger was not read yet");
                }
            }
        }
    }
    for kind in [
        conditions::READY,
        conditions::STALLED,
        conditions::DEADLINES_FEASIBLE,
        conditions::BACKLOG_KNOWN,
    ] {
        let Some(found) = status.conditions.iter().find(|c| c.type_ == kind) else {
            continue;
        };
        // What is as it should be needs no word.
        let good = if kind == conditions::STALLED {
            "False"
        } else {
            "True"
        };
        if found.status != good {
            let _ = writeln!(out, "  {kind}={}: {}", found.status, found.message);
        }
    }
    out
}

fn counted(out: &mut String, tally: &Tally, now: Timestamp) {
    let _ = writeln!(
        out,
        "  open     {}, next deadline {}",
        tally.open,
        deadline(tally.nearest_deadline, now)
    );
    if !tally.requests.is_empty() {
        let _ = writeln!(
            out,
            "\n  {:<18} {:>9} {:>9} {:>9} {:>9} {:>9}",
            "STATE", "REQUESTS", "< 30 D", "< 7 D", "< 1 D", "OVERDUE"
        );
    }
    for state in &tally.requests {
        let _ = writeln!(
            out,
            "  {:<18} {:>9} {:>9} {:>9} {:>9} {:>9}",
            state.state,
            state.count,
            state.within_month,
            state.within_week,
            state.within_day,
            state.overdue
        );
    }
    if !tally.targets.is_empty() {
        let _ = writeln!(
            out,
            "\n  {:<18} {:>9} {:>9} {:>9} {:>9} {:>9} {:>9}",
            "TARGET", "TO DO", "AT WORK", "SETTLING", "FAILING", "RAISED", "OVERDUE"
        );
    }
    for target in &tally.targets {
        let _ = writeln!(
            out,
            "  {:<18} {:>9} {:>9} {:>9} {:>9} {:>9} {:>9}",
            target.target,
            target.ready + target.waiting + target.parked,
            target.leased,
            target.settling,
            target.failing,
            target.raised,
            target.overdue
        );
    }
}

/// When, and how far away that is.
fn deadline(at: Option<Timestamp>, now: Timestamp) -> String {
    let Some(at) = at else {
        return "none".to_owned();
    };
    let left = at.duration_since(now);
    let far = |d: SignedDuration| {
        let hours = d.as_hours().abs();
        if hours >= 48 {
            format!("{} days", hours / 24)
        } else {
            format!("{hours} hours")
        }
    };
    let day = at.strftime("%Y-%m-%d %H:%M UTC");
    if left.is_negative() {
        format!("{day} ({} ago)", far(left))
    } else {
        format!("{day} (in {})", far(left))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn picture(counts: Result<serde_json::Value, &str>) -> Picture {
        Picture {
            workflow: serde_json::from_value(json!({
                "apiVersion": "domicile.dev/v1alpha1", "kind": "RightsWorkflow",
                "metadata": { "name": "consumers", "namespace": "records" },
                "spec": {
                    "ledgerRef": { "name": "consumers" }, "residencyPolicyRef": { "name": "p" },
                    "regimes": ["eu-gdpr"], "identifiers": ["customerId"], "targets": [],
                    "workers": { "pools": [] },
                },
                "status": {
                    "backlog": { "open": 7, "projectedLate": 2, "nearestDeadline": "2027-02-01T00:00:00Z" },
                    "conditions": [
                        { "type": "Ready", "status": "True", "reason": "AsSpecified", "message": "m", "lastTransitionTime": "2027-01-01T00:00:00Z" },
                        { "type": "DeadlinesFeasible", "status": "False", "reason": "Late", "message": "2 requests are late", "lastTransitionTime": "2027-01-01T00:00:00Z" },
                    ],
                },
            }))
            .unwrap(),
            counts: counts
                .map(|v| serde_json::from_value(v).unwrap())
                .map_err(str::to_owned),
        }
    }

    fn now() -> Timestamp {
        "2027-01-28T00:00:00Z".parse().unwrap()
    }

    #[test]
    fn what_the_gateway_counts_is_shown_by_state_and_target() {
        let text = render(
            &picture(Ok(json!({
                "at": "2027-01-28T00:00:00Z", "open": 12, "nearestDeadline": "2027-02-01T00:00:00Z",
                "requests": [{ "state": "open", "count": 12, "overdue": 0, "withinDay": 1, "withinWeek": 3, "withinMonth": 9 }],
                "targets": [{ "target": "accounts", "regions": ["us-west"], "parked": 1, "ready": 2, "leased": 3, "waiting": 4,
                    "settling": 5, "done": 6, "failing": 4, "raised": 1, "overdue": 0 }],
            }))),
            now(),
        );
        assert!(
            text.contains("open     12, next deadline 2027-02-01 00:00 UTC (in 4 days)"),
            "{text}"
        );
        let line = |begin: &str| {
            let found = text.lines().find(|l| l.trim_start().starts_with(begin));
            found
                .unwrap()
                .split_whitespace()
                .skip(1)
                .collect::<Vec<_>>()
                .join(" ")
        };
        assert_eq!(
            line("open  "),
            "12, next deadline 2027-02-01 00:00 UTC (in 4 days)"
        );
        assert!(
            text.contains(&format!(
                "{:<18} {:>9} {:>9} {:>9} {:>9} {:>9}",
                "open", 12, 9, 3, 1, 0
            )),
            "{text}"
        );
        assert_eq!(line("accounts"), "7 3 5 4 1 0");
        assert!(text.contains("DeadlinesFeasible=False: 2 requests are late"));
        assert!(!text.contains("Ready=True"));
    }

    #[test]
    fn without_a_gateway_the_status_speaks() {
        let text = render(&picture(Err("you may not use pods/proxy here")), now());
        assert!(text.contains(
            "no gateway could be asked (you may not use pods/proxy here); from the status:"
        ));
        assert!(
            text.contains("open     7") && text.contains("late     2"),
            "{text}"
        );
    }

    #[test]
    fn a_deadline_that_has_passed_says_so() {
        let at = "2027-01-27T12:00:00Z".parse().unwrap();
        assert_eq!(
            deadline(Some(at), now()),
            "2027-01-27 12:00 UTC (12 hours ago)"
        );
        assert_eq!(deadline(None, now()), "none");
    }
}
