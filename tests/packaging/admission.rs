//! The admission policy refuses what the operator refuses, in the same words.
//!
//! Its expressions are evaluated here; that an API server accepts them, and what they cost there, is for the tests
//! on a real one.

use std::collections::BTreeMap;

use domicile::api::residency_policy::{Basis, Data, Permit, ResidencyPolicyStatus};
use domicile::api::{PrivacyDataStore, Region, ResidencyPolicy};
use domicile::residency::Permissions;
use kube_cel::KubeCelExt as _;
use kube_cel::cel::{Context, Program, Value as Cel};
use proptest::prelude::*;
use serde_json::{Value, json};
use std::sync::LazyLock;

use super::{documents, find, names, read, samples};

/// The policy, with its expressions ready to run.
struct Policy {
    conditions: Vec<Program>,
    variables: Vec<(String, Program)>,
    validations: Vec<(Program, Program)>,
}

static POLICY: LazyLock<Policy> = LazyLock::new(|| {
    let objects = documents(&read("config/admission/placement.yaml"));
    let spec = &find(&objects, "ValidatingAdmissionPolicy", "domicile-placement")["spec"];
    let list = |key: &str| spec[key].as_array().expect("a list").clone();
    let compile = |value: &Value, key: &str| {
        let text = value[key].as_str().expect("an expression");
        Program::compile(text).unwrap_or_else(|error| panic!("{error}: {text}"))
    };
    Policy {
        conditions: list("matchConditions")
            .iter()
            .map(|c| compile(c, "expression"))
            .collect(),
        variables: list("variables")
            .iter()
            .map(|v| {
                (
                    v["name"].as_str().expect("a name").to_owned(),
                    compile(v, "expression"),
                )
            })
            .collect(),
        validations: list("validations")
            .iter()
            .map(|v| (compile(v, "expression"), compile(v, "messageExpression")))
            .collect(),
    }
});

fn run(program: &Program, context: &Context<'_>) -> Cel {
    program
        .execute(context)
        .unwrap_or_else(|error| panic!("{error}: {program:?}"))
}

/// What admission says: nothing, or its refusal.
fn admission(new: &Value, old: &Value, policy: &Value, namespace: &Value) -> Option<String> {
    let mut context = Context::default().with_all();
    let mut add = |name: &'static str, value: &Value| {
        context.add_variable(name, value).expect("JSON is a value");
    };
    add("object", new);
    add("oldObject", old);
    add("params", policy);
    add("namespaceObject", namespace);
    if POLICY
        .conditions
        .iter()
        .any(|c| run(c, &context) != Cel::Bool(true))
    {
        return None;
    }
    let mut variables: std::collections::HashMap<String, Cel> = std::collections::HashMap::new();
    for (name, program) in &POLICY.variables {
        context.add_variable_from_value("variables", variables.clone());
        variables.insert(name.clone(), run(program, &context));
    }
    context.add_variable_from_value("variables", variables);
    let failed = POLICY
        .validations
        .iter()
        .find(|(rule, _)| run(rule, &context) != Cel::Bool(true));
    failed.map(|(_, message)| match run(message, &context) {
        Cel::String(text) => text.to_string(),
        other => panic!("a message that is no text: {other:?}"),
    })
}

fn namespace(name: &str, labels: &BTreeMap<String, String>) -> Value {
    if labels.is_empty() {
        json!({ "metadata": { "name": name } })
    } else {
        json!({ "metadata": { "name": name, "labels": labels } })
    }
}

fn value(object: &impl serde::Serialize) -> Value {
    serde_json::to_value(object).expect("an object is JSON")
}

#[test]
fn it_refuses_the_samples_that_it_should_in_the_words_given() {
    let (policy, _) = samples::law();
    let policy = value(&policy);
    let mut seen = 0;
    for name in names("config/samples/refused", ".yaml") {
        let text = read(&format!("config/samples/refused/{name}"));
        if !text.contains("By: admission") {
            continue;
        }
        seen += 1;
        let objects = documents(&text);
        let store = objects
            .iter()
            .find(|o| o["kind"] == "PrivacyDataStore")
            .expect("a store");
        let ns = store["metadata"]["namespace"].as_str();
        let ns = namespace(ns.unwrap_or_default(), &samples::labels_of(ns, &objects));
        assert_eq!(
            admission(store, &Value::Null, &policy, &ns),
            Some(samples::words(&text)),
            "{name}"
        );
    }
    assert!(seen >= 4);
}

fn lawful() -> (Value, Value, Value) {
    let (policy, _) = samples::law();
    let store = samples::store("config/samples/30-privacy-data-store.yaml");
    (
        value(&store),
        value(&policy),
        namespace("records", &samples::labels_of(Some("records"), &[])),
    )
}

fn unlawful() -> (Value, Value, Value) {
    let (mut store, policy, ns) = lawful();
    store["spec"]["placement"][1]["region"] = json!("eu-central");
    (store, policy, ns)
}

#[test]
fn it_accepts_the_sample_store() {
    let (store, policy, ns) = lawful();
    assert_eq!(admission(&store, &Value::Null, &policy, &ns), None);
}

#[test]
fn only_the_policy_that_the_store_names_has_a_say() {
    let (store, mut policy, ns) = unlawful();
    assert!(admission(&store, &Value::Null, &policy, &ns).is_some());
    policy["metadata"]["name"] = json!("another");
    assert_eq!(admission(&store, &Value::Null, &policy, &ns), None);
}

/// A store that has become unlawful can be looked after, mended and deleted.
#[test]
fn what_is_unlawful_already_is_not_stuck() {
    let (old, policy, ns) = unlawful();
    let mut new = old.clone();
    new["metadata"]["finalizers"] = json!([]);
    new["metadata"]["labels"] = json!({ "a": "b" });
    assert_eq!(admission(&new, &old, &policy, &ns), None, "metadata");
    new["spec"]["failover"]["detectionSeconds"] = json!(9);
    assert!(
        admission(&new, &old, &policy, &ns).is_some(),
        "its spec must be mended first"
    );
    new["metadata"]["deletionTimestamp"] = json!("2026-01-01T00:00:00Z");
    assert_eq!(admission(&new, &old, &policy, &ns), None, "being deleted");
    let (mended, ..) = lawful();
    assert_eq!(admission(&mended, &old, &policy, &ns), None, "mended");
}

#[test]
fn it_says_nothing_of_jurisdictions_that_are_not_resolved_for_this_generation() {
    let (mut store, mut policy, ns) = lawful();
    store["spec"]["placement"][1]["region"] = json!("eu-central");
    policy["spec"]["permits"][1] = json!({ "data": "Standby", "jurisdictions": ["US"] });
    policy["metadata"]["generation"] = json!(2);
    assert_eq!(
        admission(&store, &Value::Null, &policy, &ns),
        None,
        "no status yet"
    );
    let resolved =
        json!([{ "data": "Standby", "regions": ["us-east", "us-west"], "nodeRegions": [] }]);
    policy["status"] = json!({ "observedGeneration": 1, "permits": resolved });
    assert_eq!(
        admission(&store, &Value::Null, &policy, &ns),
        None,
        "of another generation"
    );
    policy["status"]["observedGeneration"] = json!(2);
    assert!(admission(&store, &Value::Null, &policy, &ns).is_some());
}

/// A message with a line break or of more than 5 kB would be dropped by the API server, and one in its place
/// would say nothing of the region.
#[test]
fn the_message_is_one_line_of_at_most_5_kb() {
    let (mut store, mut policy, ns) = unlawful();
    policy["spec"]["citation"] = json!(format!("{}\nsecond line", "x".repeat(1000)));
    store["spec"]["placement"] = (0..9)
        .map(|i| json!({ "region": format!("r{i}"), "instances": 1 }))
        .collect();
    let words = admission(&store, &Value::Null, &policy, &ns).expect("refused");
    assert!(!words.contains('\n') && words.len() < 5000, "{words}");
    assert!(words.starts_with("region r0 is not permitted for Standby"));
}

const REGIONS: [&str; 6] = ["a", "a-b", "a0", "b", "zz", "m"];
const JURISDICTIONS: [&str; 3] = ["US", "US-CA", "DE"];

fn some(all: &'static [&'static str]) -> impl Strategy<Value = Vec<String>> {
    proptest::sample::subsequence(all, 0..=all.len())
        .prop_shuffle()
        .prop_map(|names| names.into_iter().map(str::to_owned).collect())
}

fn any_permits() -> impl Strategy<Value = Vec<Permit>> {
    let permit = |data: Data| {
        proptest::option::of((some(&REGIONS), some(&JURISDICTIONS))).prop_map(move |p| {
            p.map(|(regions, jurisdictions)| Permit {
                data,
                regions,
                jurisdictions,
            })
        })
    };
    (
        permit(Data::Primary),
        permit(Data::Standby),
        permit(Data::Worker),
    )
        .prop_map(|(a, b, c)| [a, b, c].into_iter().flatten().collect())
}

fn any_regions() -> impl Strategy<Value = Vec<Region>> {
    let region = |name: &'static str| {
        proptest::option::of(some(&JURISDICTIONS)).prop_map(move |jurisdictions| {
            let spec =
                json!({ "jurisdictions": jurisdictions?, "nodes": { "labels": { "a": name } } });
            Some(Region::new(
                name,
                serde_json::from_value(spec).expect("a Region"),
            ))
        })
    };
    let each: Vec<_> = REGIONS.into_iter().map(region).collect();
    each.prop_map(|all| all.into_iter().flatten().collect())
}

fn any_labels() -> impl Strategy<Value = BTreeMap<String, String>> {
    let label = (
        proptest::sample::select(&["a", "a-b", "a.b/c", "team"][..]),
        proptest::sample::select(&["x", "y"][..]),
    );
    proptest::collection::btree_map(
        label.0.prop_map(str::to_owned),
        label.1.prop_map(str::to_owned),
        0..4,
    )
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(500))]

    /// Whatever the policy, the Regions, the namespace and the store: admission and operator say the same, to the
    /// letter. (Where a permitted Region doesn't exist the operator waits for it, and admission has no say.)
    #[test]
    fn admission_and_operator_say_the_same(
        permits in any_permits(),
        regions in any_regions(),
        citation in proptest::option::of("[a-zé ]{0,12}"),
        wanted in proptest::option::of(any_labels()),
        labels in any_labels(),
        places in proptest::collection::btree_map(proptest::sample::select(&REGIONS[..]), 1..3i32, 1..4),
    ) {
        let spec = json!({
            "basis": Basis::Contract, "citation": citation, "permits": permits,
            "namespaces": wanted.map(|w| json!({ "matchLabels": w })),
        });
        let mut policy = ResidencyPolicy::new("records", serde_json::from_value(spec).expect("a policy"));
        policy.metadata.generation = Some(3);
        policy.status = Some(ResidencyPolicyStatus {
            observed_generation: Some(3),
            permits: Permissions::resolve(&policy, &regions).published(&regions),
            ..Default::default()
        });
        let placement: Vec<Value> = places.iter().map(|(r, n)| json!({ "region": r, "instances": n })).collect();
        let spec = json!({ "residencyPolicyRef": { "name": "records" }, "placement": placement, "storage": { "size": "1Gi" } });
        let mut store = PrivacyDataStore::new("consumers", serde_json::from_value(spec).expect("a store"));
        store.metadata.namespace = Some("records".to_owned());

        let said = admission(&value(&store), &Value::Null, &value(&policy), &namespace("records", &labels));
        let operator = samples::refusal(&store, Some(&policy), &regions, labels).map(|words| {
            let own = words.split("; ").filter(|w| !w.starts_with("Region ")).collect::<Vec<_>>();
            own.join("; ")
        });
        prop_assert_eq!(said, operator.filter(|words| !words.is_empty()));
    }
}
