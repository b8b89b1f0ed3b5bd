//! `kubectl domicile explain STORE`: why a store is as it is, who decides, and what would happen if an instance,
//! a zone or a region died now.
//!
//! Owns the words; the arithmetic is [`super::whatif`]'s. Reads the store alone, so that it says the same while
//! the instances can't be reached.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;

use kube::{Client, ResourceExt};

use super::status::{columns, get};
use super::whatif::{Commits, Outcome, Voter, configuration, well, what_if};
use crate::api::privacy_data_store::{Durability, InstanceStatus, PrivacyDataStoreStatus};
use crate::api::{PrivacyDataStore, conditions, labels};
use crate::failover::Configuration;
use crate::operator::store::leader::{self, instance_of};

/// Reads and explains.
///
/// # Errors
/// If the store can't be read.
pub async fn run(client: Client, namespace: &str, name: &str) -> anyhow::Result<String> {
    Ok(render(&get(&client, namespace, name).await?))
}

/// The explanation as text.
#[must_use]
pub fn render(store: &PrivacyDataStore) -> String {
    let status = store.status.clone().unwrap_or_default();
    let mut out = String::new();
    // Writing to a String can't fail.
    let _ = writeln!(
        out,
        "{}/{}",
        store.namespace().unwrap_or_default(),
        store.name_any()
    );
    for line in why(store, &status) {
        let _ = writeln!(out, "  {line}");
    }
    out.push('\n');
    let Some(agreed) = configuration(store) else {
        out.push_str("  The instances have agreed on nothing yet: there is nobody to vote.\n");
        return out;
    };
    for (label, text) in rules(store, &status, &agreed) {
        let _ = writeln!(out, "  {label:<8} {text}");
    }
    out.push('\n');
    out.push_str(&futures(store, &status, &agreed));
    out
}

/// Why it is as it is: what isn't well, and what was asked for.
fn why(store: &PrivacyDataStore, status: &PrivacyDataStoreStatus) -> Vec<String> {
    let mut lines = Vec::new();
    for condition in &status.conditions {
        // Ready and its two companions say the same.
        let doubled = [conditions::RECONCILING, conditions::STALLED];
        let good = condition.status == "True"
            && condition.type_ != conditions::READY
            && condition.reason != conditions::reasons::ROTATING;
        if !good && !doubled.contains(&condition.type_.as_str()) {
            lines.push(format!(
                "{:<10} {:<7} {}: {}",
                condition.type_, condition.status, condition.reason, condition.message
            ));
        }
    }
    if lines.is_empty() {
        lines.push("the operator has said nothing of it yet".to_owned());
    }
    for annotation in [
        labels::PROMOTE,
        labels::FENCE,
        labels::ACCEPT_DATA_LOSS,
        labels::PAUSE,
    ] {
        if let Some(value) = store.annotations().get(annotation) {
            lines.push(format!("asked for  {annotation}: {value}"));
        }
    }
    for entry in status.instances.iter().filter(|i| i.leaving == Some(true)) {
        lines.push(format!("{} is being taken out of the store", entry.name));
    }
    lines
}

fn names<'a>(voters: impl IntoIterator<Item = &'a Voter>) -> String {
    let names: Vec<&str> = voters.into_iter().map(|v| instance_of(v)).collect();
    if names.is_empty() {
        "none".to_owned()
    } else {
        names.join(", ")
    }
}

fn rules(
    store: &PrivacyDataStore,
    status: &PrivacyDataStoreStatus,
    agreed: &Configuration<Voter>,
) -> Vec<(&'static str, String)> {
    let mut all = Vec::new();
    if let Some(leader) = leader::of(store) {
        let place = status
            .instances
            .iter()
            .find(|i| i.name == leader.name)
            .map(place)
            .unwrap_or_default();
        all.push((
            "primary",
            format!("{} (term {}){place}", leader.name, leader.term),
        ));
    }
    let total = agreed.voters.len();
    let witness = agreed.witness.as_ref().map_or("", |_| ", one a witness");
    all.push((
        "voters",
        format!(
            "{}{witness}; a majority is {} of {total}",
            names(&agreed.voters),
            total / 2 + 1
        ),
    ));
    all.push(("commits", commits(store, agreed)));
    all.push((
        "primary?",
        format!("{} may be, by the policy", names(&agreed.may_be_primary)),
    ));
    let outside: Vec<&str> = status
        .instances
        .iter()
        .filter(|i| agreed.voters.iter().all(|v| instance_of(v) != i.name))
        .map(|i| i.name.as_str())
        .collect();
    if !outside.is_empty() {
        all.push((
            "no vote",
            format!("{}: not taken in yet, or to go", outside.join(", ")),
        ));
    }
    if let Some(last) = &status.last_failover {
        let at = last.promoted_at.as_ref().or(last.elected_at.as_ref());
        let from = last
            .previous_primary
            .as_deref()
            .map_or_else(String::new, |p| format!(" after {p}"));
        let at = at.map_or_else(String::new, |t| format!(", {}", t.0));
        all.push((
            "latest",
            format!(
                "{} became primary{from} in term {}: {}{at}",
                last.primary, last.term, last.reason
            ),
        ));
    }
    all
}

fn commits(store: &PrivacyDataStore, agreed: &Configuration<Voter>) -> String {
    let rule = &agreed.sync;
    if rule.acks == 0 {
        return "wait for no standby: one lost now may take the latest with it".to_owned();
    }
    let short = if rule.members.len() < rule.acks {
        ": there are too few, so they wait"
    } else {
        ""
    };
    let durability = match store.spec.durability {
        Durability::Required => "Required",
        Durability::Preferred => "Preferred",
    };
    format!(
        "wait until {} of {} {} flushed them (durability {durability}){short}",
        rule.acks,
        names(&rule.members),
        if rule.acks == 1 { "has" } else { "have" },
    )
}

fn place(entry: &InstanceStatus) -> String {
    let parts: Vec<&str> = [entry.zone.as_deref(), entry.region.as_deref()]
        .into_iter()
        .flatten()
        .collect();
    if parts.is_empty() {
        String::new()
    } else {
        format!(" in {}", parts.join(", "))
    }
}

/// The table of what would happen.
fn futures(
    store: &PrivacyDataStore,
    status: &PrivacyDataStoreStatus,
    agreed: &Configuration<Voter>,
) -> String {
    let serving = conditions::is_true(&status.conditions, conditions::AVAILABLE);
    let alive = well(agreed, &status.instances, serving);
    let mut groups: BTreeMap<(u8, String), BTreeSet<&str>> = BTreeMap::new();
    for entry in &status.instances {
        let name = entry.name.as_str();
        groups.entry((0, name.to_owned())).or_default().insert(name);
        if let Some(zone) = entry.zone.as_deref().filter(|z| !z.is_empty()) {
            let region = entry.region.as_deref().unwrap_or("?");
            let key = format!("zone {zone} of {region}");
            groups.entry((1, key)).or_default().insert(name);
        }
        if let Some(region) = &entry.region {
            let key = format!("region {region}");
            groups.entry((2, key)).or_default().insert(name);
        }
    }
    let mut rows = vec![["IF THIS DIED NOW", "THEN", "COMMITS", "LOST"].map(str::to_owned)];
    for ((_, what), who) in &groups {
        let dead: BTreeSet<Voter> = agreed
            .voters
            .iter()
            .filter(|v| who.contains(instance_of(v)))
            .cloned()
            .collect();
        let [then, commits, lost] = row(
            store,
            status,
            &what_if(agreed, &alive, &dead),
            &agreed.primary,
        );
        rows.push([what.clone(), then, commits, lost]);
    }
    columns(&rows)
}

fn row(
    store: &PrivacyDataStore,
    status: &PrivacyDataStoreStatus,
    outcome: &Outcome,
    primary: &Voter,
) -> [String; 3] {
    let flow = |commits: &Commits| match commits {
        Commits::GoOn => "go on".to_owned(),
        Commits::Wait(1) => "wait for 1 more standby".to_owned(),
        Commits::Wait(n) => format!("wait for {n} more standbys"),
    };
    let region = |voter: &str| {
        let name = instance_of(voter);
        let entry = status.instances.iter().find(|i| i.name == name);
        entry.and_then(|e| e.region.clone())
    };
    match outcome {
        Outcome::Stays(commits) => [
            format!("{} stays primary", instance_of(primary)),
            flow(commits),
            "nothing".to_owned(),
        ],
        Outcome::Elects(candidates, commits) => {
            let mut candidates = candidates.clone();
            candidates.sort_by_key(|v| region(v) != region(primary));
            let names: Vec<&str> = candidates.iter().map(|v| instance_of(v)).collect();
            [
                format!("{} is elected", names.join(" or ")),
                flow(commits),
                "nothing".to_owned(),
            ]
        }
        Outcome::Down { why, blind } => {
            let lost = match (blind, store.spec.durability) {
                (false, _) => "nothing",
                (true, Durability::Required) => "nothing, once they are back",
                (true, Durability::Preferred) => "the latest commits, if they don't come back",
            };
            [format!("down: {why}"), "stop".to_owned(), lost.to_owned()]
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn the_explanation() {
        let instance = |n: u32, region: &str, zone: &str, role: &str| {
            json!({ "name": format!("consumers-{n}"), "region": region, "zone": zone, "id": format!("v{n}"),
                    "role": role, "ready": true, "term": 4 })
        };
        let store: PrivacyDataStore = serde_json::from_value(json!({
            "apiVersion": "domicile.dev/v1alpha1", "kind": "PrivacyDataStore",
            "metadata": { "name": "consumers", "namespace": "records", "annotations": { "domicile.dev/promote": "consumers-1" } },
            "spec": { "residencyPolicyRef": { "name": "p" }, "storage": { "size": "1Gi" },
                      "placement": [{ "region": "us-west", "instances": 2 }, { "region": "us-east", "instances": 1 }] },
            "status": {
                "primary": "consumers-2", "term": 4,
                "conditions": [
                    { "type": "Ready", "status": "True", "reason": "AsSpecified", "message": "3/3 instances ready", "lastTransitionTime": "2026-01-01T00:00:00Z" },
                    { "type": "Stalled", "status": "False", "reason": "AsSpecified", "message": "", "lastTransitionTime": "2026-01-01T00:00:00Z" },
                    { "type": "Available", "status": "True", "reason": "AsSpecified", "message": "x", "lastTransitionTime": "2026-01-01T00:00:00Z" },
                ],
                "instances": [
                    instance(1, "us-west", "a", "Standby"), instance(2, "us-west", "b", "Primary"), instance(3, "us-east", "a", "Standby"),
                ],
                "configuration": {
                    "term": 4, "version": 3, "primary": "consumers-2/v2", "acks": 1,
                    "voters": ["consumers-1/v1", "consumers-2/v2", "consumers-3/v3"],
                    "syncMembers": ["consumers-1/v1", "consumers-3/v3"], "mayBePrimary": ["consumers-1/v1", "consumers-2/v2"],
                },
                "lastFailover": { "term": 4, "primary": "consumers-2", "previousPrimary": "consumers-1", "reason": "PrimarySilent",
                                  "promotedAt": "2026-01-01T00:00:00.250Z" },
            },
        }))
        .unwrap();
        let expected = "\
records/consumers
  Ready      True    AsSpecified: 3/3 instances ready
  asked for  domicile.dev/promote: consumers-1

  primary  consumers-2 (term 4) in b, us-west
  voters   consumers-1, consumers-2, consumers-3; a majority is 2 of 3
  commits  wait until 1 of consumers-1, consumers-3 has flushed them (durability Required)
  primary? consumers-1, consumers-2 may be, by the policy
  latest   consumers-2 became primary after consumers-1 in term 4: PrimarySilent, 2026-01-01T00:00:00.25Z

  IF THIS DIED NOW   THEN                                                               COMMITS  LOST
  consumers-1        consumers-2 stays primary                                          go on    nothing
  consumers-2        consumers-1 is elected                                             go on    nothing
  consumers-3        consumers-2 stays primary                                          go on    nothing
  zone a of us-east  consumers-2 stays primary                                          go on    nothing
  zone a of us-west  consumers-2 stays primary                                          go on    nothing
  zone b of us-west  consumers-1 is elected                                             go on    nothing
  region us-east     consumers-2 stays primary                                          go on    nothing
  region us-west     down: 1 of 3 voters are left, and a majority is needed             stop     nothing, once they are back
";
        let squeeze = |text: &str| -> Vec<String> {
            text.lines()
                .map(|l| l.split_whitespace().collect::<Vec<_>>().join(" "))
                .collect()
        };
        assert_eq!(squeeze(&render(&store)), squeeze(expected));
        let mut young = store;
        young.status.as_mut().unwrap().configuration = None;
        assert!(render(&young).contains("agreed on nothing yet"));
    }
}
