//! What a policy forbids of what is there now: the report after a policy was narrowed, a Region edited or a node
//! relabelled.
//!
//! Owns the words only. What is done about it is the stores' own business.

use kube::ResourceExt;

use super::{NodeFacts, Permissions, Whereabouts, locate};
use crate::api::conditions::{self, reasons};
use crate::api::residency_policy::Data;
use crate::api::{PrivacyDataStore, Region, RightsWorkflow};

/// What of `store` is where `permissions` don't permit it, and what it asks for that they don't. Sorted.
#[must_use]
pub fn of_store<'a>(
    store: &PrivacyDataStore,
    permissions: &Permissions,
    regions: impl IntoIterator<Item = &'a Region>,
    nodes: &[NodeFacts],
) -> Vec<String> {
    let name = format!(
        "{}/{}",
        store.namespace().unwrap_or_default(),
        store.name_any()
    );
    let total: i32 = store.spec.placement.iter().map(|p| p.instances).sum();
    let usual = if total > 1 {
        Data::Standby
    } else {
        Data::Primary
    };
    let status = store.status.as_ref();
    let primary = status.and_then(|s| s.primary.as_deref());
    let regions: Vec<&Region> = regions.into_iter().collect();
    let mut found = Vec::new();
    // The store's own pass has looked at its pods and volumes; the entries say less once an instance is to go.
    let resident = status.and_then(|s| {
        s.conditions.iter().find(|c| {
            c.type_ == conditions::RESIDENT
                && [reasons::OUTSIDE, reasons::FENCED].contains(&c.reason.as_str())
        })
    });
    found.extend(resident.map(|c| format!("{name}: {}", c.message)));
    let entries = status.iter().flat_map(|s| &s.instances);
    for instance in entries.filter(|_| resident.is_none()) {
        let data = if primary == Some(instance.name.as_str()) {
            Data::Primary
        } else {
            usual
        };
        let what = format!("{name}: instance {}", instance.name);
        let node = instance.node.as_deref();
        // A node that isn't known (any more) can't be judged; where the instance belongs can.
        match node.and_then(|n| nodes.iter().find(|k| k.name == n)) {
            Some(node) => match locate(node, regions.iter().copied()) {
                Whereabouts::In(region) => {
                    if let Err(refusal) = permissions.check(data, &region) {
                        found.push(format!("{what} is on node {}: {refusal}", node.name));
                    }
                }
                _ => found.push(format!(
                    "{what} is on node {}, which is verified to be in no Region",
                    node.name
                )),
            },
            None => {
                if let Some(Err(refusal)) = instance
                    .region
                    .as_deref()
                    .map(|r| permissions.check(data, r))
                {
                    found.push(format!("{what} is kept: {refusal}"));
                }
            }
        }
    }
    for placement in &store.spec.placement {
        if let Err(refusal) = permissions.check(usual, &placement.region) {
            found.push(format!("{name}: spec.placement asks for more: {refusal}"));
        }
    }
    found.sort();
    found
}

/// What `workflow` asks for that `permissions` don't permit. Sorted.
#[must_use]
pub fn of_workflow(workflow: &RightsWorkflow, permissions: &Permissions) -> Vec<String> {
    let name = format!(
        "{}/{}",
        workflow.namespace().unwrap_or_default(),
        workflow.name_any()
    );
    let mut found: Vec<String> = workflow
        .spec
        .workers
        .pools
        .iter()
        .filter_map(|pool| permissions.check(Data::Worker, &pool.region).err())
        .map(|refusal| format!("{name}: workers: {refusal}"))
        .collect();
    found.sort();
    found
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::api::labels;
    use serde_json::json;

    #[test]
    fn it_says_which_instance_is_where_it_may_not_be_and_by_which_policy() {
        let regions: Vec<Region> = ["west", "eu"]
            .iter()
            .map(|name| {
                serde_json::from_value(json!({
                    "apiVersion": "domicile.dev/v1alpha1", "kind": "Region", "metadata": { "name": name },
                    "spec": { "nodes": { "labels": { labels::NODE_TOPOLOGY_REGION: name } } },
                }))
                .unwrap()
            })
            .collect();
        let policy = serde_json::from_value(json!({
            "apiVersion": "domicile.dev/v1alpha1", "kind": "ResidencyPolicy", "metadata": { "name": "records" },
            "spec": { "permits": [{ "data": "Primary", "regions": ["west"] }, { "data": "Standby", "regions": ["west"] }] },
        }))
        .unwrap();
        let node = |name: &str, region: &str| NodeFacts {
            name: name.into(),
            labels: [(labels::NODE_TOPOLOGY_REGION.to_owned(), region.to_owned())].into(),
            ..NodeFacts::default()
        };
        let nodes = [node("w", "west"), node("c", "eu"), node("x", "?")];
        let mut store: PrivacyDataStore = serde_json::from_value(json!({
            "apiVersion": "domicile.dev/v1alpha1", "kind": "PrivacyDataStore", "metadata": { "name": "s", "namespace": "n" },
            "spec": { "residencyPolicyRef": { "name": "records" }, "storage": { "size": "1Gi" },
                      "placement": [{ "region": "west", "instances": 2 }, { "region": "eu", "instances": 1 }] },
            "status": { "primary": "s-1", "instances": [
                { "name": "s-1", "region": "west", "node": "w" }, { "name": "s-2", "region": "west", "node": "x" },
                { "name": "s-3", "region": "eu", "node": "c" }, { "name": "s-4", "region": "eu" },
            ] },
        }))
        .unwrap();
        let permissions = Permissions::resolve(&policy, &regions);
        let refusal = "region eu is not permitted for Standby by ResidencyPolicy records (basis Policy); permitted for Standby: west";
        assert_eq!(
            of_store(&store, &permissions, &regions, &nodes),
            [
                "n/s: instance s-2 is on node x, which is verified to be in no Region".to_owned(),
                format!("n/s: instance s-3 is on node c: {refusal}"),
                format!("n/s: instance s-4 is kept: {refusal}"),
                format!("n/s: spec.placement asks for more: {refusal}"),
            ]
        );
        // What the store's own pass has found is not said twice.
        let resident = json!([{ "type": "Resident", "status": "False", "reason": "Outside", "message": "s-3 is on node c",
                                "lastTransitionTime": "2026-01-01T00:00:00Z" }]);
        store.status.as_mut().unwrap().conditions = serde_json::from_value(resident).unwrap();
        assert_eq!(
            of_store(&store, &permissions, &regions, &nodes),
            [
                "n/s: s-3 is on node c".to_owned(),
                format!("n/s: spec.placement asks for more: {refusal}"),
            ]
        );
    }
}
