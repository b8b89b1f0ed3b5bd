//! Plans are executed on a world in memory, cut off after any step and begun again.

mod world;

use jiff::SignedDuration;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use kube::ResourceExt;
use proptest::prelude::*;
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::sync::Arc;

use super::backlog::{Reading, Tally};
use super::kinds::ChildKind;
use super::step::Step;
use super::{keys, report};
use crate::api::conditions::{self, reasons};
use crate::api::labels;
use crate::api::names::rights as names;
use crate::api::residency_policy::Data;
use crate::residency::{Permissions, Whereabouts, locate};
use crate::rights::config;
use world::{World, node, policy, signers, spec, store};

fn sample() -> World {
    World::new(&[("us-west", 2), ("us-east", 1)])
}

fn settled() -> World {
    let mut world = sample();
    world.settle();
    world
}

fn with_requests(open: i64) -> World {
    let mut world = settled();
    world.ledger = Tally {
        open,
        empty: false,
        epochs: ["2026-12-04".parse().unwrap()].into(),
        nearest_deadline: Some("2027-01-04T12:00:00Z".parse().unwrap()),
        ..Tally::default()
    };
    world.run();
    world
}

fn config_of(world: &World) -> config::Workflow {
    let found = &world.seen.children[&(ChildKind::ConfigMap, names::config("consumers"))];
    serde_json::from_str(found.data["data"]["workflow.json"].as_str().unwrap()).unwrap()
}

#[test]
fn a_workflow_comes_up_as_specified_and_is_then_left_alone() {
    let world = settled();
    let (status, reason, message) = world.condition(conditions::READY);
    assert_eq!(
        (status.as_str(), reason.as_str(), message.as_str()),
        (
            "True",
            reasons::AS_SPECIFIED,
            "2/2 gateways ready; 2/2 workers ready in us-west; 1/1 workers ready in us-east"
        )
    );
    assert_eq!(world.condition(conditions::BACKLOG_KNOWN).0, "True");
    assert_eq!(world.condition(conditions::DEADLINES_FEASIBLE).0, "Unknown");
    assert_eq!(world.condition(conditions::RESIDENT).0, "True");
    assert_eq!(world.steps(), [""; 0]);
    let config = config_of(&world);
    assert_eq!(config.ledger.hosts, ["main-1.ns.svc", "main-2.ns.svc"]);
    assert_eq!(config.ledger.name, "rights-consumers");
    let regions: Vec<_> = config.targets.iter().map(|t| t.regions.join(",")).collect();
    assert_eq!(regions, ["us-east,us-west", "us-west"]);
    let access = &world.seen.stores["main"].status.as_ref().unwrap().rights[0];
    assert!(access.ledger);
    let tables: Vec<_> = access
        .tables
        .iter()
        .map(|t| (t.table.as_str(), t.delete, t.clear_columns.join(",")))
        .collect();
    assert_eq!(
        tables,
        [
            ("customer", true, String::new()),
            ("orders", false, "name".to_owned())
        ]
    );
}

/// The operator dies after any step of any pass; its successor ends in the same world.
#[test]
fn a_crash_after_any_step_leaks_and_loses_nothing() {
    let reference = settled().digest();
    for passes in 0..3 {
        let mut begun = sample();
        for _ in 0..passes {
            for step in begun.plan().steps {
                begun.execute(&step);
            }
            begun.run();
        }
        for k in 0..=begun.plan().steps.len() {
            let mut world = begun.clone();
            for step in world.plan().steps.iter().take(k) {
                world.execute(step);
            }
            world.run();
            world.settle();
            assert_eq!(world.digest(), reference, "pass {passes}, step {k}");
        }
    }
}

#[test]
fn nothing_serves_before_the_ledger_answers_and_keys_are_made_for_an_empty_one_only() {
    let mut world = sample();
    world.answers = false;
    world.settle();
    assert!(world.seen.keys.is_none() && world.seen.pods.is_empty());
    let (status, reason, message) = world.condition(conditions::READY);
    assert_eq!(
        (status.as_str(), reason.as_str()),
        ("False", reasons::STARTING)
    );
    assert!(
        message.contains("waits for the ledger in store main"),
        "{message}"
    );
    world.answers = true;
    world.ledger.empty = false;
    world.run();
    world.settle();
    assert!(world.seen.keys.is_none(), "others sealed what is there");
    assert_eq!(world.condition(conditions::STALLED).1, reasons::KEYS_LOST);
    world.ledger.empty = true;
    world.run();
    world.settle();
    assert_eq!(world.condition(conditions::READY).0, "True");
}

#[test]
fn lost_keys_are_told_and_never_replaced() {
    let mut world = with_requests(3);
    world.seen.keys = None;
    let before = world.digest();
    world.settle();
    assert_eq!(world.digest(), before);
    let (status, reason, message) = world.condition(conditions::STALLED);
    assert_eq!(
        (status.as_str(), reason.as_str()),
        ("True", reasons::KEYS_LOST)
    );
    assert!(
        message.contains("Secret consumers-rights-keys is gone"),
        "{message}"
    );
    // Nor if the ledger can't be asked just now.
    world.answers = false;
    world.run();
    world.settle();
    assert_eq!(world.digest(), before);
}

#[test]
fn a_key_is_added_every_day_and_destroyed_when_nobody_needs_it() {
    let mut world = with_requests(1);
    let day = |d: &str| d.parse().unwrap();
    let days = |world: &World| -> Vec<String> {
        let keys = world.seen.keys.as_ref().unwrap();
        keys.epochs.iter().map(ToString::to_string).collect()
    };
    assert_eq!(days(&world), ["2026-12-04", "2026-12-05"]);
    for _ in 0..6 {
        world.now += SignedDuration::from_hours(24);
        world.settle();
    }
    // The first is still needed; of those between only the youngest are kept.
    assert_eq!(
        days(&world),
        ["2026-12-04", "2026-12-09", "2026-12-10", "2026-12-11"]
    );
    // What the ledger said once isn't enough.
    world.ledger.epochs.clear();
    world.ledger.open = 0;
    world.answers = false;
    world.run();
    world.settle();
    assert!(
        world
            .seen
            .keys
            .as_ref()
            .unwrap()
            .epochs
            .contains(&day("2026-12-04"))
    );
    world.answers = true;
    world.run();
    world.settle();
    assert_eq!(days(&world), ["2026-12-09", "2026-12-10", "2026-12-11"]);
}

#[test]
fn keys_are_known_by_their_names_and_lengths() {
    let mut secret = k8s_openapi::api::core::v1::Secret::default();
    let key = |n: usize| k8s_openapi::ByteString(vec![7; n]);
    secret.data = Some(
        [
            ("hash", 32),
            ("epoch-2026-12-04", 32),
            ("epoch-2026-12-05", 31),
            ("epoch-2026-12-4", 32),
            ("note", 32),
        ]
        .map(|(name, n)| (name.to_owned(), key(n)))
        .into(),
    );
    let seen = keys::Seen::of(&secret);
    assert!(seen.hash);
    assert_eq!(seen.epochs.len(), 1);
    assert_eq!(seen.damaged.len(), 3);
}

#[test]
fn a_forbidden_region_is_refused_in_words_and_nothing_is_made() {
    let mut world = World::new(&[("us-west", 1), ("eu-central", 1)]);
    world.settle();
    assert!(world.seen.children.is_empty() && world.seen.keys.is_none());
    let (status, reason, message) = world.condition(conditions::STALLED);
    assert_eq!(
        (status.as_str(), reason.as_str()),
        ("True", reasons::REGION_NOT_PERMITTED)
    );
    assert_eq!(
        message,
        "region eu-central is not permitted for Worker by ResidencyPolicy records (basis Policy: Records policy 12); permitted for Worker: us-east, us-west"
    );
    let mut world = sample();
    world.seen.policy = Some(policy(&[], &["us-west", "us-east"]));
    world.settle();
    assert!(world.seen.children.is_empty());
    let message = world.condition(conditions::STALLED).2;
    assert!(message.contains("permitted for Gateway"), "{message}");
}

#[test]
fn what_becomes_unlawful_is_stopped_and_the_rest_runs_on() {
    let mut world = settled();
    world.seen.policy = Some(policy(&["us-west"], &["us-west"]));
    let steps = world.steps();
    assert!(
        steps
            .iter()
            .any(|s| s.starts_with("fence consumers-rights-worker-us-east"))
    );
    world.settle();
    let workers: Vec<String> = world.pods().into_iter().map(|(name, _)| name).collect();
    assert!(
        !workers.iter().any(|n| n.contains("us-east")),
        "{workers:?}"
    );
    assert!(
        world
            .pods()
            .iter()
            .all(|(_, node)| node.as_deref() == Some("w1"))
    );
    assert_eq!(world.seen.pods.len(), 4, "two gateways and two workers");
    assert_eq!(
        world.condition(conditions::STALLED).1,
        reasons::REGION_NOT_PERMITTED
    );
}

#[test]
fn a_node_that_leaves_its_region_is_left() {
    let mut world = settled();
    world.seen.nodes.push(node("w2", "us-west"));
    for node in &mut world.seen.nodes {
        if node.name == "w1" {
            *node = world::node("w1", "eu-central");
        }
    }
    let words: Vec<Step> = world.plan().steps;
    let stopped = words.iter().filter(|s| matches!(s, Step::Fence { .. }));
    assert!(stopped.count() >= 2);
    let plan = world.plan();
    world.say(&plan);
    let (status, _, message) = world.condition(conditions::RESIDENT);
    assert_eq!(status, "False");
    assert!(
        message.contains("is on node w1: region eu-central"),
        "{message}"
    );
    world.settle();
    assert!(world.pods().iter().all(|(_, n)| n.as_deref() != Some("w1")));
    assert!(!world.told.is_empty());
    assert_eq!(world.condition(conditions::RESIDENT).0, "True");
}

#[test]
fn a_missing_policy_takes_nothing_down_and_keys_go_on() {
    let mut world = settled();
    let before = world.digest();
    world.seen.policy = None;
    world.settle();
    assert_eq!(world.digest(), before);
    assert_eq!(
        world.condition(conditions::STALLED).1,
        reasons::POLICY_NOT_FOUND
    );
    world.now += SignedDuration::from_hours(24);
    world.settle();
    let keys = world.seen.keys.as_ref().unwrap();
    assert!(keys.epochs.contains(&"2026-12-06".parse().unwrap()));
}

#[test]
fn targets_that_cannot_be_served_are_told() {
    let stalled = |change: &dyn Fn(&mut Value)| {
        let mut world = sample();
        let mut spec = spec(&[("us-west", 1)]);
        change(&mut spec);
        world.workflow(|w| w.spec = serde_json::from_value(spec).unwrap());
        world.settle();
        assert!(world.seen.children.is_empty());
        let (_, reason, message) = world.condition(conditions::STALLED);
        (reason, message)
    };
    let (reason, message) = stalled(&|s| {
        s["targets"][1] = json!({ "name": "mail", "type": "NATS", "region": "us-west", "nats": {
            "urlFrom": { "secretKeyRef": { "name": "n", "key": "u" } }, "stream": "s", "subjects": ["m.{id}.x"] } });
    });
    assert_eq!(reason, reasons::TARGET_NOT_SUPPORTED);
    assert!(message.contains("target mail"), "{message}");
    let (reason, _) = stalled(&|s| s["targets"][1]["region"] = json!("us-east"));
    assert_eq!(reason, reasons::NO_POOL);
    let (reason, _) = stalled(&|s| s["ledgerRef"]["name"] = json!("nowhere"));
    assert_eq!(reason, reasons::STORE_NOT_FOUND);
    let (reason, _) =
        stalled(&|s| s["targets"][0]["postgresql"]["storeRef"]["name"] = json!("nowhere"));
    assert_eq!(reason, reasons::STORE_NOT_FOUND);
}

#[test]
fn another_store_is_reached_by_a_certificate_of_its_own_and_forgotten_when_it_is_no_target() {
    let mut world = sample();
    world
        .seen
        .stores
        .insert("shop".into(), Arc::new(store("shop", &["us-west"])));
    world.seen.authorities.insert("shop".into(), signers());
    let with = |name: &str| {
        let mut spec = spec(&[("us-west", 1)]);
        spec["targets"][0]["postgresql"]["storeRef"]["name"] = json!(name);
        spec
    };
    world.workflow(|w| w.spec = serde_json::from_value(with("shop")).unwrap());
    world.settle();
    assert_eq!(world.condition(conditions::READY).0, "True");
    let rights = |world: &World, store: &str| {
        world.seen.stores[store]
            .status
            .as_ref()
            .unwrap()
            .rights
            .clone()
    };
    assert!(rights(&world, "main")[0].ledger && rights(&world, "main")[0].tables.is_empty());
    assert!(!rights(&world, "shop")[0].ledger && rights(&world, "shop")[0].tables.len() == 2);
    let secret = names::worker_tls("consumers", "shop");
    assert!(world.seen.certificates.contains_key(&secret));
    let worker = names::worker("consumers", "us-west");
    let worker = &world.seen.children[&(ChildKind::Deployment, worker)];
    let volumes = worker.data["spec"]["template"]["spec"]["volumes"].to_string();
    assert!(volumes.contains("accounts/tls.key"), "{volumes}");
    world.workflow(|w| w.spec = serde_json::from_value(with("main")).unwrap());
    world.settle();
    assert!(rights(&world, "shop").is_empty());
    assert!(!world.seen.certificates.contains_key(&secret));
}

#[test]
fn a_gateway_never_sees_targets_and_a_worker_never_the_gateways_certificate() {
    let world = settled();
    let volumes = |name: String| {
        let deployment = &world.seen.children[&(ChildKind::Deployment, name)];
        let pod = &deployment.data["spec"]["template"]["spec"];
        (pod["volumes"].to_string(), pod.clone())
    };
    let (gateway, pod) = volumes(names::gateway("consumers"));
    assert!(!gateway.contains("sessions") && !gateway.contains("rights-worker"));
    assert_eq!(pod["automountServiceAccountToken"], true);
    let (west, pod) = volumes(names::worker("consumers", "us-west"));
    assert!(!west.contains("serving") && !west.contains("gateway-tls"));
    assert!(
        west.contains(r#"{"key":"address","path":"sessions/url"}"#),
        "{west}"
    );
    assert_eq!(pod["automountServiceAccountToken"], false);
    assert_eq!(pod["securityContext"]["runAsNonRoot"], true);
    let container = &pod["containers"][0];
    assert_eq!(container["securityContext"]["readOnlyRootFilesystem"], true);
    assert_eq!(
        container["command"],
        json!(["/domicile", "worker", "--region", "us-west"])
    );
    // The Redis is in the west, and nobody in the east has its credentials.
    let (east, _) = volumes(names::worker("consumers", "us-east"));
    assert!(!east.contains("sessions"), "{east}");
}

#[test]
fn the_autoscaler_has_the_last_word_on_gateways() {
    let mut world = settled();
    let gateway = (ChildKind::Deployment, names::gateway("consumers"));
    world.seen.children.get_mut(&gateway).unwrap().data["spec"]["replicas"] = json!(5);
    world.run();
    world.settle();
    assert_eq!(world.seen.children[&gateway].data["spec"]["replicas"], 5);
    // Without a range there is none to ask.
    world.workflow(|w| {
        w.spec.gateway.replicas.min = 3;
        w.spec.gateway.replicas.max = 3;
    });
    world.settle();
    assert_eq!(world.seen.children[&gateway].data["spec"]["replicas"], 3);
    let scaler = (
        ChildKind::HorizontalPodAutoscaler,
        names::gateway("consumers"),
    );
    assert!(!world.seen.children.contains_key(&scaler));
    // Workers are the operator's own.
    let worker = (ChildKind::Deployment, names::worker("consumers", "us-west"));
    world.seen.children.get_mut(&worker).unwrap().data["spec"]["replicas"] = json!(9);
    world.settle();
    assert_eq!(world.seen.children[&worker].data["spec"]["replicas"], 2);
}

#[test]
fn a_changed_configuration_replaces_pods_and_an_unchanged_one_does_not() {
    let mut world = settled();
    let hash = |world: &World| {
        let worker = (ChildKind::Deployment, names::worker("consumers", "us-west"));
        let template = &world.seen.children[&worker].data["spec"]["template"];
        template["metadata"]["annotations"]["domicile.dev/config-hash"].clone()
    };
    let before = hash(&world);
    world.workflow(|w| w.spec.workers.pools[0].min = 3);
    world.settle();
    assert_eq!(hash(&world), before);
    world.workflow(|w| w.spec.promptness_seconds = 5);
    world.settle();
    assert_ne!(hash(&world), before);
}

#[test]
fn a_deletion_waits_for_open_requests_and_takes_no_others_in() {
    let mut world = with_requests(2);
    world.deleted();
    world.settle();
    assert!(!world.has_gateways(), "nothing is taken in any more");
    assert!(
        world
            .seen
            .pods
            .iter()
            .any(|p| p.name_any().contains("worker"))
    );
    assert!(!world.seen.workflow.finalizers().is_empty());
    let (status, reason, message) = world.condition(conditions::READY);
    assert_eq!(
        (status.as_str(), reason.as_str()),
        ("False", reasons::REQUESTS_OPEN)
    );
    assert!(message.contains(labels::ABANDON_REQUESTS), "{message}");
    // A ledger that can't be asked is no ledger without requests.
    world.ledger.open = 0;
    world.answers = false;
    world.run();
    world.settle();
    assert!(!world.seen.workflow.finalizers().is_empty());
    world.answers = true;
    world.run();
    world.settle();
    assert!(world.seen.workflow.finalizers().is_empty());
    assert!(world.seen.binding.is_none());
    assert!(
        world.seen.stores["main"]
            .status
            .as_ref()
            .unwrap()
            .rights
            .is_empty()
    );
    assert!(world.seen.keys.is_some(), "the keys stay with the ledger");
}

#[test]
fn a_persons_word_lets_a_workflow_go_with_open_requests() {
    let mut world = with_requests(2);
    world.deleted();
    world.workflow(|w| {
        w.annotations_mut()
            .insert(labels::ABANDON_REQUESTS.into(), "true".into());
    });
    let last = world.plan().steps;
    assert!(matches!(last.last(), Some(Step::RemoveFinalizer)));
    assert!(
        last.iter()
            .any(|s| matches!(s, Step::WithdrawAccess { .. }))
    );
}

#[test]
fn a_workflow_that_never_served_and_one_whose_store_is_gone_can_go() {
    let mut world = sample();
    world.answers = false;
    world.settle();
    world.deleted();
    world.settle();
    assert!(world.seen.workflow.finalizers().is_empty());
    let mut world = with_requests(2);
    world.deleted();
    world.seen.stores.clear();
    world.settle();
    assert!(world.seen.workflow.finalizers().is_empty());
}

#[test]
fn a_namespace_goes_if_the_last_word_was_that_nothing_is_open() {
    for (open, goes) in [(0, true), (2, false)] {
        let mut world = with_requests(open);
        world.settle();
        world.deleted();
        world.seen.namespace_ending = true;
        world.answers = false;
        world.run();
        world.settle();
        assert_eq!(world.seen.workflow.finalizers().is_empty(), goes, "{open}");
        if !goes {
            let (status, reason, _) = world.condition(conditions::STALLED);
            assert_eq!(
                (status.as_str(), reason.as_str()),
                ("True", reasons::REQUESTS_OPEN)
            );
        }
    }
}

#[test]
fn a_paused_workflow_is_left_alone() {
    let mut world = settled();
    world.workflow(|w| {
        w.annotations_mut()
            .insert(labels::PAUSE.into(), "true".into());
        w.spec.workers.pools[0].min = 7;
    });
    assert!(world.plan().steps.is_empty());
    let plan = world.plan();
    world.say(&plan);
    assert_eq!(world.condition(conditions::READY).1, reasons::PAUSED);
}

#[test]
fn a_new_authority_is_handed_out_and_then_signs() {
    let mut world = settled();
    let authorities = world.seen.authorities.get_mut("main").unwrap();
    authorities.known.bundle = "b-2".into();
    let steps = world.steps();
    assert!(
        steps.iter().all(|s| s.starts_with("hand the authorities")),
        "{steps:?}"
    );
    world.settle();
    let authorities = world.seen.authorities.get_mut("main").unwrap();
    authorities.known.active.id = "ca-2".into();
    // Not while an instance doesn't trust it.
    assert_eq!(world.steps(), [""; 0]);
    let mut store = (*world.seen.stores["main"]).clone();
    for instance in &mut store.status.as_mut().unwrap().instances {
        instance.trusts = vec!["ca-1".into(), "ca-2".into()];
    }
    world.seen.stores.insert("main".into(), Arc::new(store));
    let steps = world.steps();
    assert_eq!(steps.len(), 3);
    assert!(
        steps.iter().all(|s| s.starts_with("issue a certificate")),
        "{steps:?}"
    );
}

#[test]
fn a_binding_of_somebody_else_is_left_and_one_that_was_changed_is_mended() {
    let mut world = settled();
    let binding = world.seen.binding.as_mut().unwrap();
    binding.right = false;
    assert_eq!(world.steps(), ["unbind the gateway", "bind the gateway"]);
    let binding = world.seen.binding.as_mut().unwrap();
    binding.ours = false;
    world.settle();
    assert_eq!(world.condition(conditions::STALLED).1, reasons::NAME_TAKEN);
    assert!(!world.seen.binding.as_ref().unwrap().right);
}

#[test]
fn numbers_alone_are_not_written_at_once() {
    let world = with_requests(3);
    let plan = world.plan();
    let old = report::status(&world.seen.workflow, &plan.draft, world.now);
    let mut moved = old.clone();
    moved.backlog.as_mut().unwrap().open = 4;
    assert!(!report::due(&old, &moved, false));
    assert!(report::due(&old, &moved, true));
    moved.backlog.as_mut().unwrap().open = 0;
    assert!(report::due(&old, &moved, false));
    let mut said = old.clone();
    said.conditions[0].message = "x".into();
    assert!(report::due(&old, &said, false));
}

#[test]
fn late_requests_are_told() {
    let mut world = with_requests(3);
    world.ledger.overdue = 1;
    world.run();
    world.settle();
    let (status, reason, _) = world.condition(conditions::DEADLINES_FEASIBLE);
    assert_eq!(
        (status.as_str(), reason.as_str()),
        ("False", reasons::OVERDUE)
    );
    let backlog = world.seen.workflow.status.clone().unwrap().backlog.unwrap();
    assert_eq!((backlog.open, backlog.projected_late), (3, 1));
    assert_eq!(
        backlog.nearest_deadline,
        Some(Time("2027-01-04T12:00:00Z".parse().unwrap()))
    );
    world.answers = false;
    world.run();
    world.settle();
    let (status, reason, message) = world.condition(conditions::BACKLOG_KNOWN);
    assert_eq!(
        (status.as_str(), reason.as_str()),
        ("False", reasons::LEDGER_UNREACHABLE)
    );
    assert!(message.ends_with("away"), "{message}");
    assert!(matches!(world.seen.reading, Reading::Failed { .. }));
}

#[test]
fn names_fit_whatever_the_region_is_called() {
    let (workflow, region) = ("w".repeat(40), "r".repeat(63));
    let long = names::worker(&workflow, &region);
    assert!(long.len() <= 63, "{long}");
    assert_ne!(long, names::worker(&workflow, &"s".repeat(63)));
    assert_eq!(names::worker("a", "b"), "a-rights-worker-b");
}

const REGIONS: [&str; 3] = ["eu-central", "us-east", "us-west"];

fn subset() -> impl Strategy<Value = Vec<&'static str>> {
    prop::sample::subsequence(REGIONS.to_vec(), 0..=3)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(128))]
    /// Whatever the policy permits, the pools ask for and the nodes say, and however it changes: a pod is only ever where
    /// its kind of data may be, and what asks for one names permitted regions only.
    #[test]
    fn nothing_is_ever_where_it_may_not_be(
        laws in prop::collection::vec((subset(), subset()), 1..4),
        pools in prop::sample::subsequence(REGIONS.to_vec(), 1..=3),
        moves in prop::collection::vec((0usize..3, 0usize..3), 0..4),
    ) {
        let pools: Vec<(&str, i32)> = pools.into_iter().map(|r| (r, 1)).collect();
        let mut world = World::new(&pools);
        let mut moves = moves.into_iter();
        for (gateways, workers) in laws {
            world.seen.policy = Some(policy(&gateways, &workers));
            world.settle();
            check(&world)?;
            if let Some((n, region)) = moves.next() {
                let name = world.seen.nodes[n].name.clone();
                world.seen.nodes[n] = node(&name, REGIONS[region]);
                world.settle();
                check(&world)?;
            }
        }
    }
}

fn check(world: &World) -> Result<(), TestCaseError> {
    let permissions = Permissions::resolve(
        world.seen.policy.as_ref().unwrap(),
        world.seen.regions.iter().map(AsRef::as_ref),
    );
    let data = |labels: &BTreeMap<String, String>| match labels[labels::COMPONENT].as_str() {
        "gateway" => Data::Gateway,
        _ => Data::Worker,
    };
    for pod in &world.seen.pods {
        let Some(on) = pod.spec.as_ref().and_then(|s| s.node_name.clone()) else {
            continue;
        };
        let node = world.seen.nodes.iter().find(|n| n.name == on).unwrap();
        let regions = world.seen.regions.iter().map(AsRef::as_ref);
        let Whereabouts::In(region) = locate(node, regions) else {
            return Err(TestCaseError::fail("nowhere"));
        };
        prop_assert!(
            permissions.permits(data(pod.labels()), &region),
            "{} in {region}",
            pod.name_any()
        );
    }
    for ((kind, name), object) in &world.seen.children {
        if *kind != ChildKind::Deployment {
            continue;
        }
        let pod = &object.data["spec"]["template"]["spec"];
        let terms = &pod["affinity"]["nodeAffinity"]["requiredDuringSchedulingIgnoredDuringExecution"]
            ["nodeSelectorTerms"];
        let terms = terms.as_array().unwrap();
        prop_assert!(!terms.is_empty(), "{name} may be anywhere");
        for term in terms {
            let stamp = &term["matchExpressions"][0];
            prop_assert_eq!(&stamp["key"], labels::NODE_REGION);
            let region = stamp["values"][0].as_str().unwrap();
            prop_assert!(
                permissions.permits(data(object.labels()), region),
                "{name} asks for {region}"
            );
        }
    }
    Ok(())
}
