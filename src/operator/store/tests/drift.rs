//! What was placed lawfully is outside later: nodes relabelled, policies narrowed, volumes elsewhere.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use jiff::{SignedDuration, Timestamp};
use kube::ResourceExt;
use proptest::prelude::*;

use super::super::evict::GRACE;
use super::super::leader;
use super::super::step::{Object, Step};
use super::world::{World, node, on_node, policy, region, sample, store};
use crate::api::conditions::{self, reasons};
use crate::api::labels;
use crate::api::residency_policy::OnViolation;
use crate::operator::geography::concern::{self, Geography};
use crate::residency::{NodeFacts, locate};

/// Two of three in the west, each on a node of its own, with local volumes; any of them may be primary.
fn spread() -> World {
    let mut world = sample();
    world.local = true;
    world.seen.policy = Some(policy(&["us-west", "us-east"], &["us-west", "us-east"]));
    world.settle();
    for (name, to) in [
        ("consumers-1", "w1"),
        ("consumers-2", "w2"),
        ("consumers-3", "e1"),
    ] {
        world.seen.volumes.insert(name.into(), on_node(to));
        let pods = world.seen.pods.iter_mut();
        for pod in pods.filter(|p| p.name_any() == name) {
            pod.spec.as_mut().unwrap().node_name = Some(to.to_owned());
        }
    }
    world.settle();
    assert_eq!(world.condition(conditions::READY).0, "True");
    world
}

/// A node says that it is elsewhere, and its stamp follows.
fn relabel(world: &mut World, name: &str, to: &str) {
    label(world, name, to);
    stamp(world);
}

fn label(world: &mut World, name: &str, to: &str) {
    let node = world.seen.nodes.iter_mut().find(|n| n.name == name);
    let labels = &mut node.unwrap().labels;
    labels.insert(labels::NODE_TOPOLOGY_REGION.into(), to.into());
}

/// Nodes are stamped as the operator's other controller does it.
fn stamp(world: &mut World) {
    for node in &mut world.seen.nodes {
        let found = locate(node, world.seen.regions.iter().map(AsRef::as_ref));
        match found.region() {
            Some(region) => {
                let region = region.to_owned();
                node.labels.insert(labels::NODE_REGION.into(), region);
            }
            None => {
                node.labels.remove(labels::NODE_REGION);
            }
        }
    }
}

/// One pass, as the operator makes it, and what the instances do then.
fn pass(world: &mut World) -> Vec<String> {
    let plan = world.plan();
    for step in &plan.steps {
        world.execute(step);
    }
    world.say(&plan);
    world.run_pods();
    plan.steps.iter().map(ToString::to_string).collect()
}

fn wait(world: &mut World, time: SignedDuration) {
    world.now += time;
}

fn on(world: &World, name: &str) -> Option<String> {
    let pod = world.seen.pods.iter().find(|p| p.name_any() == name)?;
    pod.spec.as_ref()?.node_name.clone()
}

fn primary(world: &World) -> String {
    let status = world.seen.store.status.as_ref().unwrap();
    status.primary.clone().unwrap()
}

fn names(world: &World) -> BTreeSet<String> {
    world.seen.pods.iter().map(ResourceExt::name_any).collect()
}

fn set(names: &[&str]) -> BTreeSet<String> {
    names.iter().map(|&n| n.to_owned()).collect()
}

fn notes(world: &World, reason: &str) -> Vec<String> {
    let told = world.told.iter().filter(|(r, _)| r == reason);
    told.map(|(_, note)| note.clone()).collect()
}

#[test]
fn a_standby_whose_node_moves_abroad_is_stopped_and_made_again_inside() {
    let mut world = spread();
    relabel(&mut world, "w2", "eu-central");
    // Found: said, and told to leave.
    let plan = world.plan();
    assert!(plan.again.is_some_and(|a| a <= GRACE.unsigned_abs()));
    pass(&mut world);
    let (status, reason, message) = world.condition(conditions::RESIDENT);
    assert_eq!(
        (status.as_str(), reason.as_str()),
        ("False", reasons::OUTSIDE)
    );
    assert_eq!(
        message,
        "consumers-2 is on node w2: region eu-central is not permitted for Standby by ResidencyPolicy records (basis Policy: Records policy 12); permitted for Standby: us-east, us-west"
    );
    assert!(names(&world).contains("consumers-2"));
    // Nobody counts on it any more: it goes before the grace is over, and another comes beside it.
    pass(&mut world);
    assert!(!names(&world).contains("consumers-2"));
    assert_eq!(notes(&world, reasons::FENCED).len(), 1);
    world.settle();
    assert_eq!(
        names(&world),
        set(&["consumers-1", "consumers-3", "consumers-4"])
    );
    assert_eq!(on(&world, "consumers-4").as_deref(), Some("w1"));
    let (_, reason, message) = world.condition(conditions::RESIDENT);
    assert_eq!(reason, reasons::FENCED);
    assert!(
        message.starts_with("volume claim consumers-2 is kept on node w2: region eu-central"),
        "{message}"
    );
    assert!(
        world.seen.store.status.as_ref().unwrap().summary.as_deref() == Some("3/3"),
        "whole again"
    );
    // A person takes it away.
    world.seen.claims.retain(|c| c.name_any() != "consumers-2");
    world.seen.volumes.remove("consumers-2");
    world.settle();
    assert_eq!(world.condition(conditions::READY).0, "True");
}

#[test]
fn a_label_put_back_within_the_grace_costs_nothing_to_a_single_instance() {
    let mut world = World::new(&[("us-west", 1)]);
    world.local = true;
    world.settle();
    let before = world.digest();
    relabel(&mut world, "w1", "eu-central");
    pass(&mut world);
    wait(&mut world, SignedDuration::from_millis(1900));
    pass(&mut world);
    assert_eq!(world.condition(conditions::RESIDENT).0, "False");
    relabel(&mut world, "w1", "us-west");
    wait(&mut world, GRACE);
    world.settle();
    assert_eq!(world.digest(), before);
    assert_eq!(world.condition(conditions::RESIDENT).0, "True");
}

#[test]
fn a_primary_hands_over_first_and_its_old_copy_goes_then() {
    let mut world = spread();
    let old = primary(&world);
    relabel(&mut world, "w1", "nowhere");
    pass(&mut world);
    assert!(names(&world).contains(&old), "it may hand over");
    world.settle();
    assert_ne!(primary(&world), old);
    assert!(!names(&world).contains(&old));
    assert_eq!(world.condition(conditions::AVAILABLE).0, "True");
    let (_, _, message) = world.condition(conditions::RESIDENT);
    assert_eq!(
        message,
        "volume claim consumers-1 is kept on node w1, which is in no Region (delete the claim once nobody needs it, or bring its node back inside)"
    );
}

#[test]
fn where_nothing_lawful_is_left_the_store_is_down_and_says_so_and_its_last_copy_is_kept() {
    let mut world = World::new(&[("us-west", 1)]);
    world.local = true;
    let mut erasing = (*policy(&["us-west"], &["us-west"])).clone();
    erasing.spec.on_violation = OnViolation::FenceAndErase;
    world.seen.policy = Some(Arc::new(erasing));
    world.settle();
    for name in ["w1", "w2"] {
        relabel(&mut world, name, "eu-central");
    }
    pass(&mut world);
    wait(&mut world, GRACE);
    world.settle();
    assert_eq!(on(&world, "consumers-1"), None, "stopped");
    assert_eq!(world.condition(conditions::AVAILABLE).0, "False");
    assert_eq!(world.condition(conditions::RESIDENT).1, reasons::FENCED);
    assert_eq!(world.seen.claims.len(), 1, "the last copy is kept");
    relabel(&mut world, "w1", "us-west");
    world.run_pods();
    world.settle();
    assert_eq!(on(&world, "consumers-1").as_deref(), Some("w1"));
    assert_eq!(world.condition(conditions::READY).0, "True");
}

#[test]
fn fence_and_erase_erases_once_another_copy_is_durable() {
    let mut world = spread();
    let mut erasing = (**world.seen.policy.as_ref().unwrap()).clone();
    erasing.spec.on_violation = OnViolation::FenceAndErase;
    world.seen.policy = Some(Arc::new(erasing));
    relabel(&mut world, "w2", "eu-central");
    pass(&mut world);
    // The primary waits for standbys: nothing is erased now.
    let durable = |world: &mut World, is: bool| {
        world.store(|s| {
            for entry in &mut s.status.as_mut().unwrap().instances {
                entry.durable = entry.durable.map(|_| is);
            }
        });
    };
    durable(&mut world, false);
    let plan = world.plan();
    for step in &plan.steps {
        world.execute(step);
    }
    assert!(!names(&world).contains("consumers-2"));
    assert!(notes(&world, reasons::ERASED).is_empty());
    assert!(world.plan().steps.iter().all(|s| !matches!(
        s,
        Step::Delete {
            object: Object::Claim,
            ..
        }
    )));
    durable(&mut world, true);
    world.settle();
    assert_eq!(notes(&world, reasons::ERASED).len(), 1);
    let claims = world.seen.claims.iter().map(ResourceExt::name_any);
    // The number is free again, and taken by the one that is made inside.
    let claims: BTreeSet<String> = claims.collect();
    assert_eq!(claims.len(), 3, "{claims:?}");
    assert_eq!(world.condition(conditions::READY).0, "True");
}

/// Kubernetes lets an end that has begun be shortened, and a kubelet that is told so kills what is left then.
#[test]
fn an_end_that_has_begun_is_shortened_once_if_the_pod_is_outside() {
    let mut world = spread();
    let mut ending = world.seen.pods.remove(0);
    let name = ending.name_any();
    ending.metadata.deletion_timestamp =
        Some(serde_json::from_value("2026-01-01T00:00:00Z".into()).unwrap());
    ending.metadata.deletion_grace_period_seconds = Some(75);
    let node = ending.spec.as_ref().unwrap().node_name.clone().unwrap();
    world.seen.pods.insert(0, ending);
    let fenced = |world: &World| {
        let steps = world.plan().steps;
        steps
            .iter()
            .any(|s| matches!(s, Step::Fence { name: n, .. } if *n == name))
    };
    assert!(!fenced(&world), "inside, it has all its grace");
    relabel(&mut world, &node, "eu-central");
    pass(&mut world);
    wait(&mut world, GRACE);
    assert!(fenced(&world));
    let pod = world
        .seen
        .pods
        .iter_mut()
        .find(|p| p.name_any() == name)
        .unwrap();
    pod.metadata.deletion_grace_period_seconds = Some(2);
    assert!(!fenced(&world), "again");
}

#[test]
fn a_policy_narrowed_while_in_use_stops_what_it_forbids_and_nothing_else() {
    let mut world = spread();
    world.seen.policy = Some(policy(&["us-west"], &["us-west"]));
    pass(&mut world);
    wait(&mut world, GRACE);
    world.settle();
    assert_eq!(names(&world), set(&["consumers-1", "consumers-2"]));
    assert_eq!(world.condition(conditions::AVAILABLE).0, "True");
    assert_eq!(
        world.condition(conditions::STALLED).1,
        reasons::REGION_NOT_PERMITTED
    );
    // The spec follows: it's whole again, but for the volume.
    let spec = store(&[("us-west", 2)]).spec;
    world.store(|s| s.spec = spec);
    world.settle();
    assert_eq!(world.condition(conditions::RESIDENT).1, reasons::FENCED);
    assert_eq!(
        world.seen.store.status.as_ref().unwrap().summary.as_deref(),
        Some("2/2")
    );
}

#[test]
fn a_volume_that_only_nodes_outside_reach_is_given_up() {
    let mut world = spread();
    // Bound by hand to a volume abroad, and its pod can't come up inside.
    world
        .seen
        .volumes
        .insert("consumers-2".into(), on_node("c1"));
    let pods = world.seen.pods.iter_mut();
    for pod in pods.filter(|p| p.name_any() == "consumers-2") {
        pod.spec.as_mut().unwrap().node_name = None;
        pod.status = None;
    }
    world.settle();
    assert_eq!(world.condition(conditions::RESIDENT).1, reasons::FENCED);
    assert_eq!(
        names(&world),
        set(&["consumers-1", "consumers-3", "consumers-4"])
    );
}

#[test]
fn no_pod_is_made_while_a_stamp_that_is_no_longer_true_would_attract_it() {
    let mut world = spread();
    let mut twin = (*region("us-west")).clone();
    twin.metadata.name = Some("twin".into());
    world.seen.regions.push(Arc::new(twin));
    world.seen.pods.retain(|p| p.name_any() == "consumers-1");
    let plan = world.plan();
    let made: Vec<String> = plan.steps.iter().map(ToString::to_string).collect();
    assert!(
        !made.iter().any(|s| s.contains("consumers-2"))
            && made.iter().any(|s| s.contains("consumers-3")),
        "{made:?}"
    );
    world.seen.regions.pop();
    world.settle();
    assert_eq!(world.condition(conditions::READY).0, "True");
}

#[test]
fn what_cannot_be_known_stops_nothing() {
    let mut world = spread();
    world.seen.nodes.retain(|n| n.name != "w2");
    world
        .seen
        .volumes
        .insert("consumers-3".into(), on_node("gone"));
    let before = names(&world);
    pass(&mut world);
    wait(&mut world, GRACE + GRACE);
    pass(&mut world);
    assert_eq!(names(&world), before);
    let (status, _, message) = world.condition(conditions::RESIDENT);
    assert_eq!(status, "Unknown");
    assert_eq!(
        message,
        "consumers-2 is bound to node w2, which is not known"
    );
}

#[derive(Clone, Debug)]
enum Drift {
    Relabel(usize, usize),
    Narrow(Vec<&'static str>, Vec<&'static str>),
    Twin(bool),
    Kill(usize),
    Wait(u8),
}

const REGIONS: [&str; 3] = ["us-west", "us-east", "eu-central"];

fn drift() -> impl Strategy<Value = Drift> {
    let subset = || proptest::sample::subsequence(&REGIONS[..], 1..=3);
    prop_oneof![
        4 => (0..4usize, 0..4usize).prop_map(|(n, r)| Drift::Relabel(n, r)),
        2 => (subset(), subset()).prop_map(|(p, s)| Drift::Narrow(p, s)),
        1 => any::<bool>().prop_map(Drift::Twin),
        1 => (0..4usize).prop_map(Drift::Kill),
        3 => (0..4u8).prop_map(Drift::Wait),
    ]
}

fn make(world: &mut World, drift: &Drift) {
    match drift {
        Drift::Relabel(n, r) => {
            let to = ["us-west", "us-east", "eu-central", "nowhere"][*r];
            let name = world.seen.nodes[*n].name.clone();
            relabel(world, &name, to);
        }
        Drift::Narrow(primary, standby) => {
            let mut new = (*policy(primary, standby)).clone();
            new.spec.on_violation = OnViolation::FenceAndErase;
            let old = world
                .seen
                .policy
                .as_ref()
                .and_then(|p| p.metadata.generation);
            new.metadata.generation = Some(old.unwrap_or_default() + 1);
            world.seen.policy = Some(Arc::new(new));
        }
        Drift::Twin(there) => {
            world.seen.regions.retain(|r| r.name_any() != "twin");
            if *there {
                let mut twin = (*region("us-east")).clone();
                twin.metadata.name = Some("twin".into());
                world.seen.regions.push(Arc::new(twin));
            }
            stamp(world);
        }
        Drift::Kill(n) => {
            if !world.seen.pods.is_empty() {
                let n = n % world.seen.pods.len();
                world.seen.pods.remove(n);
            }
        }
        Drift::Wait(half) => wait(world, SignedDuration::from_millis(500 * i64::from(*half))),
    }
}

/// Where each pod runs that the policy, as it is now, doesn't permit there.
fn outside(world: &World) -> Vec<String> {
    let Some(policy) = &world.seen.policy else {
        return vec![];
    };
    let regions = || world.seen.regions.iter().map(AsRef::as_ref);
    let permissions = crate::residency::Permissions::resolve(policy, regions());
    let leader = primary(world);
    let located = |name: &str| {
        let node: &NodeFacts = world.seen.nodes.iter().find(|n| n.name == name)?;
        locate(node, regions()).region().map(str::to_owned)
    };
    let data = |name: &str| {
        if name == leader {
            crate::api::residency_policy::Data::Primary
        } else {
            crate::api::residency_policy::Data::Standby
        }
    };
    let all = names(world).into_iter();
    all.filter(|name| {
        on(world, name)
            .is_some_and(|at| located(&at).is_none_or(|r| !permissions.permits(data(name), &r)))
    })
    .collect()
}

/// The mark by which the operator tells whether the geography around the store is another.
fn mark(world: &World) -> u64 {
    let policies: Vec<_> = world.seen.policy.iter().cloned().collect();
    let geography = Geography {
        regions: &world.seen.regions,
        policies: &policies,
        nodes: &world.seen.nodes,
        namespaces: &BTreeMap::new(),
    };
    let marks = concern::marks(&geography, std::slice::from_ref(&world.seen.store));
    *marks.values().next().unwrap()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    /// Whatever of the geography makes a pass do something else is in the mark: no store waits for a minute because
    /// nobody thought that it was concerned.
    #[test]
    fn a_plan_that_changes_has_a_mark_that_does(
        drifts in proptest::collection::vec(proptest::option::of(drift()), 1..8)
    ) {
        let mut world = spread();
        for drift in drifts {
            let (steps, before) = (world.plan().steps, mark(&world));
            let asked = (world.now, names(&world));
            match &drift {
                // The stamp follows later, or never.
                None => stamp(&mut world),
                Some(Drift::Relabel(n, r)) => {
                    let name = world.seen.nodes[*n].name.clone();
                    label(&mut world, &name, ["us-west", "us-east", "eu-central", "nowhere"][*r]);
                }
                Some(drift) => make(&mut world, drift),
            }
            if (world.now, names(&world)) == asked && format!("{:?}", world.plan().steps) != format!("{steps:?}") {
                prop_assert_ne!(mark(&world), before, "{:?}", drift);
            }
            pass(&mut world);
        }
    }

    /// Whatever happens: after it, nothing runs outside for longer than the grace and two passes; nothing runs inside
    /// that is stopped for being outside; the primary's volume is never deleted; and the operator comes to rest.
    #[test]
    fn nothing_stays_outside_and_nothing_inside_is_stopped(drifts in proptest::collection::vec(drift(), 1..8)) {
        let mut world = spread();
        for drift in &drifts {
            make(&mut world, drift);
            let before: Timestamp = world.now;
            for round in 0..6 {
                let unlawful = outside(&world);
                // As reported, in the highest term: what is on record follows with the pass.
                let leader = leader::of(&world.seen.store).map(|l| l.name.to_owned());
                let told = world.told.len();
                let plan = world.plan();
                for step in &plan.steps {
                    if let Step::Delete { object: Object::Claim, name, .. } = step {
                        prop_assert!(Some(name) != leader.as_ref(), "the primary's volume");
                    }
                    world.execute(step);
                }
                let fenced: Vec<String> = world.told[told..].iter()
                    .filter(|(reason, _)| reason == reasons::FENCED)
                    .map(|(_, note)| note.split(' ').next().unwrap().to_owned()).collect();
                for name in &fenced {
                    let volume = world.told.iter().any(|(_, n)| n.starts_with(&format!("{name} is stopped: the volume of")));
                    prop_assert!(unlawful.contains(name) || volume, "{name} was inside: {:?}", world.told);
                }
                world.say(&plan);
                world.run_pods();
                if round == 1 {
                    wait(&mut world, GRACE);
                }
                if world.now >= before + GRACE && round >= 3 {
                    prop_assert_eq!(outside(&world), Vec::<String>::new(), "round {}", round);
                }
            }
        }
        for node in &mut world.seen.nodes {
            node.usable = true;
        }
        wait(&mut world, GRACE);
        for _ in 0..30 {
            pass(&mut world);
        }
        let left = world.plan().steps;
        prop_assert!(left.is_empty(), "{:?}", left.iter().map(ToString::to_string).collect::<Vec<_>>());
    }
}

#[test]
fn a_new_node_is_no_reason_to_move() {
    let mut world = spread();
    let before = world.digest();
    world.seen.nodes.push(node("w3", "us-west", "c"));
    world.settle();
    assert_eq!(world.digest(), before);
}
