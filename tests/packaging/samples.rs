//! The samples are read in full and are lawful; those in `refused/` are refused in the words they give.

use std::collections::BTreeMap;
use std::sync::Arc;

use domicile::api::residency_policy::ResidencyPolicyStatus;
use domicile::api::{PrivacyDataStore, Region, ResidencyPolicy, RightsWorkflow};
use domicile::operator::store::observe::{Observed, StorageClassSeen};
use domicile::operator::store::validate;
use domicile::residency::binding::{self, Bound, POD_KINDS};
use domicile::residency::{NodeFacts, Permissions};
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::Value;

use super::{documents, kustomize, names, read};

/// Reads a value into its type, and fails if something of it got lost on the way.
fn strictly<T: DeserializeOwned + Serialize>(value: &Value) -> T {
    let typed: T =
        serde_json::from_value(value.clone()).unwrap_or_else(|error| panic!("{error}: {value}"));
    let back = serde_json::to_value(&typed).expect("what was read can be written");
    kept("", value, &back);
    typed
}

fn kept(at: &str, before: &Value, after: &Value) {
    match (before, after) {
        (Value::Object(before), Value::Object(after)) => {
            for (key, value) in before {
                let at = format!("{at}.{key}");
                kept(
                    &at,
                    value,
                    after.get(key).unwrap_or_else(|| panic!("{at} is no field")),
                );
            }
        }
        (Value::Array(before), Value::Array(after)) if before.len() == after.len() => {
            for (index, (before, after)) in before.iter().zip(after).enumerate() {
                kept(&format!("{at}[{index}]"), before, after);
            }
        }
        _ => assert_eq!(before, after, "{at}"),
    }
}

fn check(object: &Value) {
    match object["kind"].as_str().expect("a kind") {
        "Region" => drop(strictly::<Region>(object)),
        "ResidencyPolicy" => drop(strictly::<ResidencyPolicy>(object)),
        "PrivacyDataStore" => drop(strictly::<PrivacyDataStore>(object)),
        "RightsWorkflow" => drop(strictly::<RightsWorkflow>(object)),
        "Pod" => drop(strictly::<k8s_openapi::api::core::v1::Pod>(object)),
        "Namespace" => drop(strictly::<k8s_openapi::api::core::v1::Namespace>(object)),
        "Secret" => drop(strictly::<k8s_openapi::api::core::v1::Secret>(object)),
        "Service" => drop(strictly::<k8s_openapi::api::core::v1::Service>(object)),
        "ServiceAccount" => drop(strictly::<k8s_openapi::api::core::v1::ServiceAccount>(
            object,
        )),
        "Deployment" => drop(strictly::<k8s_openapi::api::apps::v1::Deployment>(object)),
        "RoleBinding" => drop(strictly::<k8s_openapi::api::rbac::v1::RoleBinding>(object)),
        other => panic!("a sample of {other}"),
    }
}

fn of<T: DeserializeOwned>(objects: &[Value], kind: &str) -> Vec<T> {
    let of_kind = objects.iter().filter(|object| object["kind"] == kind);
    of_kind
        .map(|object| serde_json::from_value(object.clone()).expect("a sample"))
        .collect()
}

/// The store in a file.
pub fn store(file: &str) -> PrivacyDataStore {
    of(&documents(&read(file)), "PrivacyDataStore").remove(0)
}

/// The sample's policy and Regions.
pub fn law() -> (ResidencyPolicy, Vec<Region>) {
    let objects = kustomize("config/samples");
    (
        of(&objects, "ResidencyPolicy").remove(0),
        of(&objects, "Region"),
    )
}

/// What the operator says of a store: nothing, or its refusal.
pub fn refusal(
    store: &PrivacyDataStore,
    policy: Option<&ResidencyPolicy>,
    ceiling: Option<&ResidencyPolicy>,
    regions: &[Region],
    namespace_labels: BTreeMap<String, String>,
) -> Option<String> {
    let observed = Observed {
        store: Arc::new(store.clone()),
        namespace_labels,
        namespace_ending: false,
        policy: policy.cloned().map(Arc::new),
        // The samples' namespace names the samples' policy.
        ceiling: ceiling.or(policy).cloned().map(Arc::new),
        storage_class: StorageClassSeen::NotNeeded,
        regions: regions.iter().cloned().map(Arc::new).collect(),
        nodes: Vec::new(),
        pods: Vec::new(),
        claims: Vec::new(),
        children: BTreeMap::new(),
        authorities: None,
        certificates: BTreeMap::new(),
        app_secret: None,
        secrets: BTreeMap::new(),
        told: None,
        keeps: vec![],
        volumes: BTreeMap::new(),
    };
    let problems = match validate::validate(&observed) {
        Ok(lawful) => lawful.problems,
        Err(problem) => vec![problem],
    };
    let words: Vec<String> = problems
        .into_iter()
        .map(|problem| problem.message)
        .collect();
    (!words.is_empty()).then(|| words.join("; "))
}

/// The labels of the namespace that a file, or the samples, define.
pub fn labels_of(namespace: Option<&str>, objects: &[Value]) -> BTreeMap<String, String> {
    let mut all = kustomize("config/samples");
    all.extend_from_slice(objects);
    all.iter()
        .find(|o| o["kind"] == "Namespace" && o["metadata"]["name"].as_str() == namespace)
        .and_then(|o| serde_json::from_value(o["metadata"]["labels"].clone()).ok())
        .unwrap_or_default()
}

/// The words that a file in `refused/` gives.
pub fn words(text: &str) -> String {
    let line = text
        .lines()
        .find_map(|line| line.strip_prefix("# Refused: "));
    line.expect("a line '# Refused: …'").to_owned()
}

/// What is said of a pod that names node c1 of the test bed, in eu-central-1.
fn pod_refusal(pod: &Value, policy: &ResidencyPolicy, regions: &[Region]) -> Option<String> {
    let node = |name: &str, region: &str| NodeFacts {
        name: name.to_owned(),
        labels: [(
            "topology.kubernetes.io/region".to_owned(),
            region.to_owned(),
        )]
        .into(),
        ..NodeFacts::default()
    };
    let nodes = [node("c1", "eu-central-1"), node("w1", "us-west-2")];
    let permissions = Permissions::resolve(policy, regions);
    let published = binding::publish(&permissions, regions, &nodes);
    let mut policy = policy.clone();
    policy.status = Some(ResidencyPolicyStatus {
        observed_generation: Some(0),
        permits: published.permits,
        nodes: published.nodes,
        ..Default::default()
    });
    let bound = Bound {
        namespace: pod["metadata"]["namespace"].as_str().expect("a namespace"),
        node: pod["spec"]["nodeName"].as_str().expect("a node"),
        region: Some("eu-central-1"),
        kinds: &POD_KINDS,
    };
    binding::check(&policy, &bound).err()
}

#[test]
fn samples_are_read_in_full() {
    let objects = kustomize("config/samples");
    assert_eq!(objects.len(), 12);
    objects.iter().for_each(check);
    for name in names("config/samples/refused", ".yaml") {
        documents(&read(&format!("config/samples/refused/{name}")))
            .iter()
            .for_each(check);
    }
}

#[test]
#[should_panic(expected = ".spec.storage.sise is no field")]
fn an_unknown_field_is_noticed() {
    let text =
        read("config/samples/30-privacy-data-store.yaml").replace("size:", "size: 1Gi\n    sise:");
    documents(&text).iter().for_each(check);
}

#[test]
fn every_sample_is_in_the_kustomization_and_none_that_is_refused() {
    let text = read("config/samples/kustomization.yaml");
    for name in names("config/samples", ".yaml")
        .iter()
        .filter(|n| *n != "kustomization.yaml")
    {
        assert!(text.contains(&format!("\n- {name}")), "{name}");
    }
    assert!(!text.contains("- refused"));
}

#[test]
fn the_sample_store_is_lawful() {
    let (policy, regions) = law();
    let store = store("config/samples/30-privacy-data-store.yaml");
    assert_eq!(
        store.spec.storage.storage_class_name, None,
        "the cluster's default"
    );
    let labels = labels_of(store.metadata.namespace.as_deref(), &[]);
    assert_eq!(labels["pod-security.kubernetes.io/enforce"], "restricted");
    assert_eq!(refusal(&store, Some(&policy), None, &regions, labels), None);
}

/// Whoever changes the words of a refusal changes them everywhere.
#[test]
fn what_is_refused_is_refused_in_the_words_given() {
    let (policy, regions) = law();
    let definitions = names("crds", ".yaml")
        .iter()
        .map(|n| read(&format!("crds/{n}")))
        .collect::<String>();
    let definitions = definitions.split_whitespace().collect::<Vec<_>>().join(" ");
    for name in names("config/samples/refused", ".yaml") {
        let text = read(&format!("config/samples/refused/{name}"));
        let words = words(&text);
        if text.contains("By: the CustomResourceDefinition") {
            assert!(
                definitions.contains(&words),
                "{name}: no rule of a definition says so"
            );
            continue;
        }
        assert!(text.contains("By: admission"), "{name} says who refuses");
        let objects = documents(&text);
        if text.contains("By: admission where pods are bound") {
            assert_eq!(pod_refusal(&objects[0], &policy, &regions), Some(words));
            continue;
        }
        let store: PrivacyDataStore = of(&objects, "PrivacyDataStore").remove(0);
        let labels = labels_of(store.metadata.namespace.as_deref(), &objects);
        assert_eq!(
            refusal(&store, Some(&policy), None, &regions, labels),
            Some(words),
            "{name}"
        );
    }
}
