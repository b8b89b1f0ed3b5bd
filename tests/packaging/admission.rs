//! The admission policy refuses what the operator refuses, in the same words.
//!
//! Its expressions are evaluated here; that an API server accepts them, and what they cost there, is for the tests
//! on a real one.

use std::collections::BTreeMap;

use domicile::api::residency_policy::{Basis, Data, Permit, ResidencyPolicyStatus};
use domicile::api::{PrivacyDataStore, Region, ResidencyPolicy};
use domicile::residency::binding;
use domicile::residency::{NodeFacts, Permissions};
use kube_cel::KubeCelExt as _;
use kube_cel::cel::{Context, ExecutionError, Program, Value as Cel};
use proptest::prelude::*;
use serde_json::{Value, json};
use std::sync::LazyLock;

use super::{documents, find, names, read, samples};

/// A policy, with its expressions ready to run.
struct Policy {
    conditions: Vec<Program>,
    variables: Vec<(String, Program)>,
    validations: Vec<(Program, Program)>,
}

static PLACEMENT: LazyLock<Policy> =
    LazyLock::new(|| Policy::read("placement.yaml", "domicile-placement"));
static BINDING: LazyLock<Policy> =
    LazyLock::new(|| Policy::read("binding.yaml", "domicile-binding"));

static WORKERS: LazyLock<Policy> =
    LazyLock::new(|| Policy::read("workers.yaml", "domicile-workers"));

impl Policy {
    fn read(file: &str, name: &str) -> Self {
        let objects = documents(&read(&format!("config/admission/{file}")));
        let spec = &find(&objects, "ValidatingAdmissionPolicy", name)["spec"];
        let list = |key: &str| spec[key].as_array().expect("a list").clone();
        let compile = |value: &Value, key: &str| {
            let text = value[key].as_str().expect("an expression");
            Program::compile(text).unwrap_or_else(|error| panic!("{error}: {text}"))
        };
        Self {
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
    }

    /// What it says with these variables: nothing, or its refusal.
    fn says(&self, given: &[(&'static str, &Value)]) -> Option<String> {
        let mut context = Context::default().with_all();
        // The API server's CEL has it; without types there is nothing for it to do.
        context.add_function("dyn", |value: Cel| Ok::<Cel, ExecutionError>(value));
        for (name, value) in given {
            context
                .add_variable(*name, *value)
                .expect("JSON is a value");
        }
        if self
            .conditions
            .iter()
            .any(|c| run(c, &context) != Cel::Bool(true))
        {
            return None;
        }
        let mut variables: std::collections::HashMap<String, Cel> =
            std::collections::HashMap::new();
        for (name, program) in &self.variables {
            context.add_variable_from_value("variables", variables.clone());
            variables.insert(name.clone(), run(program, &context));
        }
        context.add_variable_from_value("variables", variables);
        let failed = self
            .validations
            .iter()
            .find(|(rule, _)| run(rule, &context) != Cel::Bool(true));
        failed.map(|(_, message)| match run(message, &context) {
            Cel::String(text) => text.to_string(),
            other => panic!("a message that is no text: {other:?}"),
        })
    }
}

fn run(program: &Program, context: &Context<'_>) -> Cel {
    program
        .execute(context)
        .unwrap_or_else(|error| panic!("{error}: {program:?}"))
}

/// What admission says of a store: nothing, or its refusal.
fn admission(new: &Value, old: &Value, policy: &Value, namespace: &Value) -> Option<String> {
    PLACEMENT.says(&[
        ("object", new),
        ("oldObject", old),
        ("params", policy),
        ("namespaceObject", namespace),
    ])
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
        if !text.contains("By: admission") || text.contains("where pods are bound") {
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

#[test]
fn a_pod_that_is_not_bound_and_a_nodes_image_of_a_static_pod_are_not_asked_about() {
    let policy = value(&resolved(
        "records",
        &json!({ "permits": [{ "data": "Backup", "regions": ["a"] }] }),
        &[],
        &[],
        &[],
    ));
    let says = |object: &Value, groups: &[&str]| {
        let request =
            json!({ "resource": { "resource": "pods" }, "userInfo": { "groups": groups } });
        let ns = namespace("records", &BTreeMap::new());
        BINDING.says(&[
            ("object", object),
            ("request", &request),
            ("params", &policy),
            ("namespaceObject", &ns),
        ])
    };
    let mut pod = json!({ "metadata": { "name": "p", "annotations": { "kubernetes.io/config.mirror": "x" } }, "spec": {} });
    assert_eq!(says(&pod, &[]), None);
    pod["spec"]["nodeName"] = json!("n");
    assert!(
        says(&pod, &["people"]).is_some(),
        "anybody can write an annotation"
    );
    assert_eq!(says(&pod, &["system:nodes"]), None);
    pod["metadata"]["annotations"] = json!({});
    assert!(says(&pod, &["system:nodes"]).is_some());
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

/// A policy as it is after the operator has looked at it.
fn resolved(
    name: &str,
    spec: &Value,
    regions: &[Region],
    nodes: &[NodeFacts],
    others: &[&ResidencyPolicy],
) -> ResidencyPolicy {
    let spec = serde_json::from_value(spec.clone()).expect("a policy");
    let mut policy = ResidencyPolicy::new(name, spec);
    policy.metadata.generation = Some(3);
    let permissions = Permissions::resolve(&policy, regions);
    let published = binding::publish(&permissions, regions, nodes);
    policy.status = Some(ResidencyPolicyStatus {
        observed_generation: Some(3),
        permits: published.permits,
        nodes: published.nodes,
        within: others
            .iter()
            .filter(|other| permissions.lies_within(&Permissions::resolve(other, regions)))
            .filter_map(|other| other.metadata.name.clone())
            .collect(),
        ..Default::default()
    });
    policy
}

fn any_nodes() -> impl Strategy<Value = Vec<NodeFacts>> {
    let node = |name: &'static str| {
        let label = |key: &'static str| {
            proptest::option::of(proptest::sample::select(&REGIONS[..]))
                .prop_map(move |value| value.map(|v| (key.to_owned(), v.to_owned())))
        };
        // "a" is the witness of the Regions drawn here; the other is what admission sees.
        (label("a"), label("topology.kubernetes.io/region")).prop_map(move |(a, b)| NodeFacts {
            name: name.to_owned(),
            labels: a.into_iter().chain(b).collect(),
            ..NodeFacts::default()
        })
    };
    ["n1", "n2", "n3"].map(node).to_vec()
}

/// How a pod comes to be on a node.
#[derive(Clone, Copy, Debug)]
enum Way {
    Bound,
    BoundByOldAddress,
    BoundWithoutKind,
    Created { of_store: bool },
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
        ceiling in proptest::option::of(any_permits()),
        places in proptest::collection::btree_map(proptest::sample::select(&REGIONS[..]), 1..3i32, 1..4),
    ) {
        let spec = json!({
            "basis": Basis::Contract, "citation": citation, "permits": permits,
            "namespaces": wanted.map(|w| json!({ "matchLabels": w })),
        });
        let ceiling = ceiling.map(|permits| resolved("above", &json!({ "permits": permits }), &regions, &[], &[]));
        let policy = resolved("records", &spec, &regions, &[], &ceiling.iter().collect::<Vec<_>>());
        let mut labels = labels;
        if ceiling.is_some() {
            labels.insert("domicile.dev/residency".to_owned(), "above".to_owned());
        }
        let placement: Vec<Value> = places.iter().map(|(r, n)| json!({ "region": r, "instances": n })).collect();
        let spec = json!({ "residencyPolicyRef": { "name": "records" }, "placement": placement, "storage": { "size": "1Gi" } });
        let mut store = PrivacyDataStore::new("consumers", serde_json::from_value(spec).expect("a store"));
        store.metadata.namespace = Some("records".to_owned());

        let said = admission(&value(&store), &Value::Null, &value(&policy), &namespace("records", &labels));
        let operator = samples::refusal(&store, Some(&policy), ceiling.as_ref(), &regions, labels).map(|words| {
            let own = words.split("; ").filter(|w| !w.starts_with("Region ")).collect::<Vec<_>>();
            own.join("; ")
        });
        prop_assert_eq!(said, operator.filter(|words| !words.is_empty()));
    }
    /// Workers are refused where the policy doesn't permit them, in the words of every refusal.
    #[test]
    fn workers_are_refused_in_the_same_words(
        permits in any_permits(),
        regions in any_regions(),
        citation in proptest::option::of("[a-zé ]{0,12}"),
        pools in proptest::sample::subsequence(&REGIONS[..], 1..4),
    ) {
        let spec = json!({ "basis": Basis::Contract, "citation": citation, "permits": permits });
        let policy = resolved("records", &spec, &regions, &[], &[]);
        let permissions = Permissions::resolve(&policy, &regions);
        let places: Vec<Value> = pools.iter().map(|r| json!({ "region": r, "max": 1 })).collect();
        let workflow = json!({ "metadata": { "name": "w" }, "spec": {
            "residencyPolicyRef": { "name": "records" }, "workers": { "pools": places },
        } });
        let said = WORKERS.says(&[
            ("object", &workflow), ("oldObject", &Value::Null), ("params", &value(&policy)),
            ("namespaceObject", &namespace("records", &BTreeMap::new())),
        ]);
        let words: Vec<String> = pools.iter()
            .filter_map(|r| permissions.check(Data::Worker, r).err())
            .map(|refusal| refusal.to_string())
            .collect();
        prop_assert_eq!(said, (!words.is_empty()).then(|| words.join("; ")));
    }

    /// Whatever the policy, the Regions, the nodes and what they claim: whoever puts a pod on a node by whatever way,
    /// and invents whatever region, gets the operator's answer, to the letter.
    #[test]
    fn bind_time_and_operator_say_the_same(
        permits in any_permits(),
        regions in any_regions(),
        nodes in any_nodes(),
        citation in proptest::option::of("[a-zé ]{0,12}"),
        node in proptest::sample::select(&["n1", "n2", "n3", "not-there"][..]),
        invented in proptest::option::of(proptest::sample::select(&REGIONS[..])),
        way in prop_oneof![
            Just(Way::Bound), Just(Way::BoundByOldAddress), Just(Way::BoundWithoutKind),
            any::<bool>().prop_map(|of_store| Way::Created { of_store }),
        ],
        stale in proptest::bool::weighted(0.1),
        unnamed in proptest::bool::weighted(0.2),
    ) {
        let spec = json!({ "basis": Basis::Contract, "citation": citation, "permits": permits });
        let mut policy = resolved("records", &spec, &regions, &nodes, &[]);
        if stale {
            policy.metadata.generation = Some(4);
        }
        if let Some(status) = policy.status.as_mut().filter(|_| unnamed) {
            status.nodes = None;
        }
        // The API server's part: the node's own label on pods and on Bindings to a Node, over what the sender wrote.
        let own = nodes.iter().find(|n| n.name == node)
            .and_then(|n| n.labels.get("topology.kubernetes.io/region").map(String::as_str));
        let labelled = matches!(way, Way::Bound | Way::Created { .. });
        let region = if labelled { own.or(invented) } else { invented };
        let mut labels = serde_json::Map::new();
        if let Some(region) = region {
            labels.insert("topology.kubernetes.io/region".to_owned(), json!(region));
        }
        let (resource, sub) = match way {
            Way::Bound | Way::BoundWithoutKind => ("pods", Some("binding")),
            Way::BoundByOldAddress => ("bindings", None),
            Way::Created { .. } => ("pods", None),
        };
        let kinds = match way {
            Way::Created { of_store: true } => {
                labels.insert("domicile.dev/store".to_owned(), json!("consumers"));
                &binding::STORE_KINDS[..]
            }
            _ => &binding::POD_KINDS[..],
        };
        let object = match way {
            Way::Created { .. } => json!({ "metadata": { "name": "p", "labels": labels }, "spec": { "nodeName": node } }),
            Way::BoundWithoutKind => json!({ "metadata": { "name": "p", "labels": labels }, "target": { "name": node } }),
            _ => json!({ "metadata": { "name": "p", "labels": labels }, "target": { "kind": "Node", "name": node } }),
        };
        let mut request = json!({ "resource": { "resource": resource }, "userInfo": { "username": "u" } });
        if let Some(sub) = sub {
            request["subResource"] = json!(sub);
        }
        let said = BINDING.says(&[
            ("object", &object), ("request", &request), ("params", &value(&policy)),
            ("namespaceObject", &namespace("records", &BTreeMap::new())),
        ]);
        let bound = binding::Bound { namespace: "records", node, region: region.filter(|_| labelled), kinds };
        prop_assert_eq!(said, binding::check(&policy, &bound).err());
    }
}
