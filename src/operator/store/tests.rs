//! Plans are executed on a world in memory, cut off after any step and begun again.

mod attest;
mod cases;
mod drift;
mod failover;
mod residency;
mod rotation;
mod world;

use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use kube::ResourceExt;
use proptest::prelude::*;
use serde_json::json;
use std::collections::BTreeMap;

use super::build;
use super::step::{Object, Step};
use crate::api::conditions::{self, reasons};
use crate::api::labels;
use world::{NOW, World, node, policy, sample, store};

#[test]
fn a_store_comes_up_as_specified_and_is_then_left_alone() {
    let mut world = sample();
    world.settle();
    let (status, reason, message) = world.condition(conditions::READY);
    assert_eq!(
        (status.as_str(), reason.as_str()),
        ("True", reasons::AS_SPECIFIED),
        "{message}"
    );
    assert_eq!(
        message,
        "3/3 instances ready; consumers-1 in region us-west is primary"
    );
    assert_eq!(world.condition(conditions::RESIDENT).0, "True");
    assert_eq!(world.condition(conditions::DURABLE).0, "True");
    assert!(world.plan().steps.is_empty());
    let zones: Vec<_> = world
        .seen
        .claims
        .iter()
        .map(|c| c.labels()[labels::ZONE].clone())
        .collect();
    assert_eq!(zones, ["a", "b", "a"]);
}

/// The operator dies after any step of any pass; its successor ends in the same world.
#[test]
fn a_crash_after_any_step_leaks_and_loses_nothing() {
    let mut reference = sample();
    reference.settle();
    let steps = sample().plan().steps.len();
    assert!(steps > 15, "{steps}");
    for k in 0..=steps {
        let mut world = sample();
        let plan = world.plan();
        for step in plan.steps.iter().take(k) {
            world.execute(step);
        }
        world.settle();
        assert_eq!(world.digest(), reference.digest(), "crashed after step {k}");
        assert_eq!(
            world.seen.store.status.as_ref().unwrap().primary.as_deref(),
            Some("consumers-1")
        );
    }
}

#[test]
fn a_forbidden_region_is_refused_in_words_and_nothing_is_made() {
    let mut world = World::new(&[("us-west", 1), ("eu-central", 1)]);
    let plan = world.plan();
    assert!(plan.steps.is_empty());
    world.say(&plan);
    let (status, reason, message) = world.condition(conditions::STALLED);
    assert_eq!(
        (status.as_str(), reason.as_str()),
        ("True", reasons::REGION_NOT_PERMITTED)
    );
    assert_eq!(
        message,
        "region eu-central is not permitted for Standby by ResidencyPolicy records (basis Policy: Records policy 12); permitted for Standby: us-east, us-west"
    );
}

#[test]
fn a_missing_policy_permits_nothing_but_takes_nothing_down() {
    let mut world = sample();
    world.seen.policy = None;
    assert!(world.plan().steps.is_empty());
    let mut world = sample();
    world.settle();
    world.seen.policy = None;
    let plan = world.plan();
    assert!(plan.steps.is_empty());
    world.say(&plan);
    assert_eq!(
        world.condition(conditions::STALLED).1,
        reasons::POLICY_NOT_FOUND
    );
    assert_eq!(world.condition(conditions::AVAILABLE).0, "True");
}

#[test]
fn a_region_added_unlawfully_to_a_running_store_stops_nothing() {
    let mut world = sample();
    world.settle();
    let before = world.digest();
    let spec = store(&[("us-west", 2), ("us-east", 1), ("eu-central", 1)]).spec;
    world.store(|s| s.spec = spec);
    // The primary's pod is lost meanwhile: it must come back in spite of the bad spec.
    world.seen.pods.retain(|p| p.name_any() != "consumers-1");
    world.settle();
    assert_eq!(world.digest(), before);
    assert_eq!(
        world.condition(conditions::STALLED).1,
        reasons::REGION_NOT_PERMITTED
    );
    assert_eq!(world.condition(conditions::AVAILABLE).0, "True");
}

#[test]
fn without_a_lawful_node_the_store_waits_and_says_so() {
    let mut world = sample();
    world.seen.nodes.retain(|n| n.name != "e1");
    world.settle();
    let (_, reason, message) = world.condition(conditions::READY);
    assert_eq!(reason, reasons::NO_LAWFUL_NODE);
    assert_eq!(
        message,
        "2/3 instances ready; 1 instance(s) wait for a node in region us-east: no node is verified to be there; nothing is placed elsewhere"
    );
    world.seen.nodes.push(node("e2", "us-east", "a"));
    world.settle();
    assert_eq!(world.condition(conditions::READY).0, "True");
}

#[test]
fn a_node_without_the_stamp_takes_nothing() {
    let mut world = sample();
    for node in &mut world.seen.nodes {
        node.labels.remove(labels::NODE_REGION);
    }
    let plan = world.plan();
    assert!(plan.steps.is_empty());
    world.say(&plan);
    assert_eq!(
        world.condition(conditions::READY).1,
        reasons::NO_LAWFUL_NODE
    );
}

#[test]
fn a_lost_pod_comes_back_on_its_volume_and_an_evicted_one_is_replaced() {
    let mut world = sample();
    world.settle();
    let before = world.digest();
    let claims: Vec<_> = world.seen.claims.iter().map(ResourceExt::uid).collect();
    world.seen.pods.retain(|p| p.name_any() != "consumers-2");
    let evicted = world.seen.pods.last_mut().unwrap();
    assert_eq!(evicted.name_any(), "consumers-3");
    evicted.status.as_mut().unwrap().phase = Some("Failed".into());
    world.settle();
    assert_eq!(world.digest(), before);
    assert_eq!(
        claims,
        world
            .seen
            .claims
            .iter()
            .map(ResourceExt::uid)
            .collect::<Vec<_>>()
    );
}

#[test]
fn a_pod_that_was_killed_does_not_wait_for_the_kubelets_pauses() {
    // What the kubelet says of a container that waits, the pod's age, how long it ran and how it ended; and whether a
    // new pod is due.
    let cases = [
        ("CrashLoopBackOff", 60, 5, 137, true),
        ("CrashLoopBackOff", 59, 5, 137, false),
        ("CrashLoopBackOff", 60, 4, 137, false),
        ("CrashLoopBackOff", 500, 400, 1, false),
        ("ContainerCreating", 500, 400, 137, false),
    ];
    for (reason, age, ran, code, due) in cases {
        let mut world = sample();
        world.settle();
        let at = |s: i64| json!(jiff::Timestamp::from_second(1_800_000_000 + s).unwrap());
        let status = json!({
            "phase": "Running",
            "containerStatuses": [{
                "name": "postgres", "image": "i", "imageID": "i", "ready": false, "restartCount": 2,
                "state": {"waiting": {"reason": reason}},
                "lastState": {"terminated": {"exitCode": code, "startedAt": at(age - ran), "finishedAt": at(age)}},
            }],
        });
        let pod = world.seen.pods.last_mut().unwrap();
        pod.status = Some(serde_json::from_value(status).unwrap());
        pod.metadata.creation_timestamp = Some(serde_json::from_value(at(0)).unwrap());
        let uid = pod.uid().unwrap();
        let deleted =
            world.plan().steps.iter().any(
                |s| matches!(s, Step::Delete { object: Object::Pod, uid: u, .. } if *u == uid),
            );
        assert_eq!(deleted, due, "{reason}, {age} s, {ran} s, {code}");
    }
}

#[test]
fn a_new_image_is_rolled_out_one_at_a_time_with_the_primary_last() {
    let mut world = sample();
    world.settle();
    world.store(|s| s.spec.postgres.image = "postgres:17.9".into());
    let mut order = Vec::new();
    for _ in 0..10 {
        let plan = world.plan();
        for step in &plan.steps {
            if let Step::Delete { name, .. } = step {
                order.push(name.clone());
            }
            world.execute(step);
        }
        world.run_pods();
    }
    assert_eq!(order, ["consumers-2", "consumers-3", "consumers-1"]);
}

#[test]
fn a_bad_image_costs_one_standby() {
    let mut world = sample();
    world.settle();
    world.store(|s| s.spec.postgres.image = "no:such".into());
    for step in world.plan().steps {
        world.execute(&step);
    }
    // The replacement never becomes ready.
    for step in world.plan().steps {
        world.execute(&step);
    }
    assert!(world.plan().steps.is_empty(), "{:?}", world.plan().steps);
    world.store(|s| s.spec.postgres.image = "postgres:17".into());
    assert_eq!(
        world.plan().steps.len(),
        1,
        "the bad pod is replaced though it isn't ready"
    );
}

#[test]
fn shrinking_removes_the_instance_and_keeps_its_volume() {
    let mut world = sample();
    world.settle();
    let spec = store(&[("us-west", 2)]).spec;
    world.store(|s| s.spec = spec);
    world.settle();
    assert_eq!(world.seen.pods.len(), 2);
    assert_eq!(world.seen.claims.len(), 3);
    assert!(
        world
            .digest()
            .iter()
            .all(|d| !d.contains("consumers-3") || d.starts_with("claim")),
        "{:?}",
        world.digest()
    );
    let spec = store(&[("us-west", 2), ("us-east", 1)]).spec;
    world.store(|s| s.spec = spec);
    world.settle();
    assert_eq!(world.seen.pods.len(), 3, "and takes it up again");
    assert_eq!(world.seen.claims.len(), 3);
}

#[test]
fn nobody_is_retired_before_the_successor_is_there() {
    let mut world = World::new(&[("us-west", 2)]);
    world.settle();
    // The second instance is to move east, where no node is.
    world.seen.nodes.retain(|n| n.name != "e1");
    let spec = store(&[("us-west", 1), ("us-east", 1)]).spec;
    world.store(|s| s.spec = spec);
    world.settle();
    assert_eq!(world.seen.pods.len(), 2, "the standby stays until then");
    world.seen.nodes.push(node("e2", "us-east", "a"));
    world.settle();
    let names: Vec<String> = world.seen.pods.iter().map(ResourceExt::name_any).collect();
    assert_eq!(names, ["consumers-1", "consumers-3"]);
}

#[test]
fn a_primary_whose_region_is_not_asked_for_stays_in_its_store() {
    let mut world = World::new(&[("us-west", 2), ("us-east", 1)]);
    world.seen.policy = Some(policy(&["us-west", "us-east"], &["us-west", "us-east"]));
    world.settle();
    // Nobody else may be primary.
    world.seen.policy = Some(policy(&["us-west"], &["us-west", "us-east"]));
    let spec = store(&[("us-east", 2)]).spec;
    world.store(|s| s.spec = spec);
    world.seen.pods.retain(|p| p.name_any() != "consumers-1");
    world.settle();
    assert!(
        world
            .seen
            .pods
            .iter()
            .any(|p| p.name_any() == "consumers-1"),
        "and is made again"
    );
    assert!(world.seen.secrets.contains_key("consumers-1-tls"));
    let (status, _, message) = world.condition(conditions::READY);
    assert_eq!(status, "False");
    assert!(
        message.contains(
            "primary consumers-1 is in region us-west, for which spec.placement asks no instance"
        ),
        "{message}"
    );
}

#[test]
fn a_primary_in_a_region_no_longer_permitted_for_one_is_said_and_not_made_again() {
    let mut world = World::new(&[("us-west", 1), ("us-east", 1)]);
    world.settle();
    // Nobody may be primary any more.
    world.seen.policy = Some(policy(&["eu-central"], &["us-west", "us-east"]));
    world.settle();
    assert_eq!(world.condition(conditions::RESIDENT).0, "False");
    let instances = world.seen.store.status.as_ref().unwrap().instances.clone();
    assert!(instances.iter().all(|i| i.may_be_primary == Some(false)));
    world.seen.pods.retain(|p| p.name_any() != "consumers-1");
    world.settle();
    assert!(
        world
            .seen
            .pods
            .iter()
            .all(|p| p.name_any() != "consumers-1")
    );
}

/// The primary is recorded, then nothing more comes to pass, and the world changes.
#[test]
fn a_primary_on_record_that_was_never_made_is_not_made_where_none_may_be() {
    let mut world = World::new(&[("us-west", 1), ("us-east", 1)]);
    let plan = world.plan();
    for step in &plan.steps {
        world.execute(step);
        if matches!(step, Step::RecordPrimary { .. }) {
            break;
        }
    }
    world.seen.nodes.retain(|n| !n.name.starts_with('w'));
    for _ in 0..5 {
        let plan = world.plan();
        for step in &plan.steps {
            world.execute(step);
        }
        world.run_pods();
    }
    assert!(
        world.seen.claims.is_empty() && world.seen.pods.is_empty(),
        "{:?}",
        world.digest()
    );
    world.seen.nodes.push(node("w9", "us-west", "a"));
    world.settle();
    let status = world.seen.store.status.clone().unwrap();
    let primary = status.primary.unwrap();
    let claim = world
        .seen
        .claims
        .iter()
        .find(|c| c.name_any() == primary)
        .unwrap();
    assert_eq!(claim.labels()[labels::REGION], "us-west");
}

#[test]
fn a_volume_claim_deleted_by_hand_is_said_and_its_pod_is_left_alone() {
    let mut world = sample();
    world.settle();
    for claim in &mut world.seen.claims {
        claim.metadata.deletion_timestamp = Some(Time(NOW));
    }
    world.store(|s| s.spec.postgres.image = "postgres:17.9".into());
    let plan = world.plan();
    assert!(plan.steps.is_empty(), "{:?}", plan.steps);
    world.say(&plan);
    let (_, _, message) = world.condition(conditions::READY);
    assert!(
        message.contains("volume claim consumers-1 is being deleted"),
        "{message}"
    );
}

#[test]
fn the_last_copys_lost_volume_is_never_replaced_by_an_empty_one() {
    let mut world = World::new(&[("us-west", 1), ("us-east", 1)]);
    world.settle();
    world.seen.claims.clear();
    world.seen.pods.clear();
    world.store(|s| {
        s.status.as_mut().unwrap().instances[1].system_identifier = None;
    });
    let plan = world.plan();
    for step in &plan.steps {
        world.execute(step);
    }
    world.say(&plan);
    assert!(
        world
            .seen
            .claims
            .iter()
            .all(|c| c.name_any() != "consumers-1")
    );
    assert_eq!(world.condition(conditions::STALLED).1, reasons::VOLUME_LOST);
    assert_eq!(world.condition(conditions::STALLED).0, "True");
    // Made anew, the store doesn't begin with whatever volume there is.
    let mut again = sample();
    again.seen.claims = world.seen.claims.clone();
    assert!(again.plan().steps.is_empty());
}

#[test]
fn a_volume_is_marked_only_once_it_holds_the_data() {
    let mut world = sample();
    for step in world.plan().steps {
        world.execute(&step);
    }
    let mark = |world: &World| {
        world.seen.claims[0]
            .annotations()
            .get(labels::PRIMARY_TERM)
            .cloned()
    };
    assert_eq!(mark(&world).as_deref(), Some("0"));
    world.settle();
    // The first term that an instance has of its own.
    assert_eq!(mark(&world).as_deref(), Some("2"));
}

#[test]
fn an_unbound_claim_follows_its_instance_to_another_zone() {
    let mut world = sample();
    for step in world.plan().steps {
        world.execute(&step);
    }
    // Before any volume exists, the first zone is closed.
    for node in world.seen.nodes.iter_mut().filter(|n| n.name == "w1") {
        node.usable = false;
    }
    world.settle();
    for claim in &world.seen.claims {
        assert_ne!(
            (
                claim.labels()[labels::REGION].as_str(),
                claim.labels()[labels::ZONE].as_str()
            ),
            ("us-west", "a")
        );
    }
}

#[test]
fn a_bad_image_is_mended_though_another_pod_hangs_on_a_dead_node() {
    let mut world = sample();
    world.settle();
    world.store(|s| s.spec.postgres.image = "no:such".into());
    for _ in 0..2 {
        for step in world.plan().steps {
            world.execute(&step);
        }
    }
    let stuck = world
        .seen
        .pods
        .iter_mut()
        .find(|p| p.name_any() == "consumers-3")
        .unwrap();
    stuck.metadata.deletion_timestamp = Some(Time(NOW));
    world.store(|s| s.spec.postgres.image = "postgres:17".into());
    let steps = world.plan().steps;
    assert!(
        matches!(&steps[..], [Step::Delete { name, .. }] if name == "consumers-2"),
        "{steps:?}"
    );
}

#[test]
fn deleting_a_store_leaves_a_persons_own_claim() {
    let mut world = sample();
    world.store(|s| s.spec.deletion_policy = serde_json::from_value(json!("Delete")).unwrap());
    world.settle();
    let mut own = world.seen.claims[0].clone();
    own.metadata.name = Some("restored".into());
    world.seen.claims.push(own);
    world.store(|s| s.metadata.deletion_timestamp = Some(Time(NOW)));
    for step in world.plan().steps {
        world.execute(&step);
    }
    let left: Vec<String> = world
        .seen
        .claims
        .iter()
        .map(ResourceExt::name_any)
        .collect();
    assert_eq!(left, ["restored"]);
}

#[test]
fn deletion_keeps_or_removes_the_volumes_as_asked() {
    for (policy, left) in [("Retain", 3), ("Delete", 0)] {
        let mut world = sample();
        world.store(|s| s.spec.deletion_policy = serde_json::from_value(json!(policy)).unwrap());
        world.settle();
        world.store(|s| s.metadata.deletion_timestamp = Some(Time(NOW)));
        for step in world.plan().steps {
            world.execute(&step);
        }
        assert_eq!(world.seen.claims.len(), left, "{policy}");
        assert!(world.seen.store.finalizers().is_empty());
        assert!(world.plan().steps.is_empty());
    }
}

#[test]
fn retained_volumes_are_taken_up_beginning_with_the_last_primary() {
    let mut world = sample();
    world.settle();
    let mut again = sample();
    again.seen.claims = world.seen.claims.clone();
    // In another order, and the last primary isn't the lowest slot.
    for claim in &mut again.seen.claims {
        claim.annotations_mut().remove(labels::PRIMARY_TERM);
    }
    again.seen.claims[1]
        .annotations_mut()
        .insert(labels::PRIMARY_TERM.into(), "4".into());
    again.settle();
    let status = again.seen.store.status.clone().unwrap();
    assert_eq!(
        (status.primary.as_deref(), status.term),
        (Some("consumers-2"), Some(5))
    );

    let mut unknown = sample();
    unknown.seen.claims = world.seen.claims.clone();
    for claim in &mut unknown.seen.claims {
        claim.annotations_mut().remove(labels::PRIMARY_TERM);
    }
    let plan = unknown.plan();
    assert!(
        plan.steps.is_empty(),
        "nobody guesses which volume is the last"
    );
    unknown.say(&plan);
    assert_eq!(unknown.condition(conditions::STALLED).0, "True");
}

#[test]
fn in_a_namespace_that_is_being_deleted_nothing_is_made_again() {
    let mut world = sample();
    world.settle();
    world.seen.namespace_ending = true;
    world.seen.pods.clear();
    assert!(world.plan().steps.is_empty());
}

#[test]
fn a_pause_leaves_everything_alone() {
    let mut world = sample();
    world.store(|s| {
        s.annotations_mut()
            .insert(labels::PAUSE.into(), "true".into());
    });
    assert!(world.plan().steps.is_empty());
}

#[test]
fn a_service_changed_by_hand_is_mended_and_endpoints_are_not_touched() {
    let mut world = sample();
    world.settle();
    for ((kind, _), object) in &mut world.seen.children {
        match kind {
            super::kinds::ChildKind::Service => object.data["spec"]["ports"][0]["port"] = json!(1),
            super::kinds::ChildKind::EndpointSlice => {
                object.data["endpoints"] = json!([{ "addresses": ["198.18.0.1"] }]);
            }
            _ => {}
        }
    }
    let plan = world.plan();
    assert_eq!(
        plan.steps.len(),
        5,
        "{:?}",
        plan.steps
            .iter()
            .map(ToString::to_string)
            .collect::<Vec<_>>()
    );
    assert!(
        plan.steps
            .iter()
            .all(|s| matches!(s, Step::Update(super::kinds::ChildKind::Service, _)))
    );
}

#[test]
fn an_even_number_has_a_witness_and_what_it_holds_is_left_alone() {
    let witness = (
        super::kinds::ChildKind::ConfigMap,
        "consumers-witness".to_owned(),
    );
    let mut world = World::new(&[("us-west", 2)]);
    world.settle();
    let object = world.seen.children.get_mut(&witness).unwrap();
    assert_eq!(object.data.get("data"), None, "made empty");
    object.data["data"] = json!({ "register": "{}" });
    object.labels_mut().clear();
    let plan = world.plan();
    let [Step::Update(_, update)] = plan.steps.as_slice() else {
        panic!("only its labels are mended");
    };
    assert_eq!(update.data.get("data"), None);
    // One more, and it may go on voting until the instances have let go of it.
    world.store(|s| s.spec.placement = store(&[("us-west", 2), ("us-east", 1)]).spec.placement);
    world.settle();
    assert!(world.seen.children.contains_key(&witness));
    let mut odd = sample();
    odd.settle();
    assert!(!odd.seen.children.contains_key(&witness));
}

#[test]
fn pods_are_restricted_and_placed_by_the_stamp() {
    let mut world = sample();
    world.settle();
    for pod in &world.seen.pods {
        let spec = pod.spec.as_ref().unwrap();
        let security = spec.security_context.as_ref().unwrap();
        assert_eq!(security.run_as_non_root, Some(true));
        assert_eq!(
            security.seccomp_profile.as_ref().unwrap().type_,
            "RuntimeDefault"
        );
        for container in spec
            .containers
            .iter()
            .chain(spec.init_containers.iter().flatten())
        {
            let security = container.security_context.as_ref().unwrap();
            assert_eq!(security.read_only_root_filesystem, Some(true));
            assert_eq!(security.allow_privilege_escalation, Some(false));
            assert_eq!(
                security.capabilities.as_ref().unwrap().drop.as_deref(),
                Some(&["ALL".to_owned()][..])
            );
        }
        let affinity =
            serde_json::to_string(&spec.affinity.as_ref().unwrap().node_affinity).unwrap();
        assert!(
            affinity.contains("requiredDuringScheduling") && affinity.contains(labels::NODE_REGION),
            "{affinity}"
        );
    }
}

#[test]
fn the_secret_reaches_hosts_that_may_be_primary_first() {
    let world = World::new(&[("us-east", 1), ("us-west", 1)]);
    let placed = crate::placement::place(
        &[("us-east", 1), ("us-west", 1)].map(|(r, n)| crate::placement::Want {
            region: r.into(),
            instances: n,
        }),
        &super::plan::sites(&world.seen),
        &[],
        None,
    )
    .placed;
    let secret = build::AppSecret::new(&world.seen.store, &placed, |r| r == "us-west");
    assert_eq!(secret.hosts, ["consumers-2.ns.svc", "consumers-1.ns.svc"]);
    let data = secret.data("pw", "CA");
    assert_eq!(
        data["uri"],
        "postgresql://app:pw@consumers-2.ns.svc:5432,consumers-1.ns.svc:5432/app?target_session_attrs=read-write&connect_timeout=2&tcp_user_timeout=3000&sslmode=verify-full&sslrootcert=/etc/domicile/consumers/ca.crt"
    );
}

const REGIONS: [&str; 3] = ["eu-central", "us-east", "us-west"];

fn subset() -> impl Strategy<Value = Vec<&'static str>> {
    proptest::sample::subsequence(&REGIONS, 0..=3)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]

    /// Whatever is edited, in whatever order: no pod or volume claim is ever made for a region that the
    /// policy of that moment doesn't permit, and every history of edits settles.
    #[test]
    fn nothing_is_ever_made_outside(
        edits in proptest::collection::vec((subset(), subset(), proptest::collection::vec((0..3usize, 1..3i32), 1..3), subset()), 1..4),
    ) {
        let mut world = sample();
        for (primary, standby, placement, usable) in edits {
            world.seen.policy = Some(policy(&primary, &standby));
            let placement: BTreeMap<&str, i32> = placement.into_iter().map(|(r, n)| (REGIONS[r], n)).collect();
            let placement: Vec<(&str, i32)> = placement.into_iter().collect();
            let spec = store(&placement).spec;
            world.store(|s| s.spec = spec);
            for node in &mut world.seen.nodes {
                node.usable = usable.iter().any(|r| node.labels[labels::NODE_REGION] == *r);
            }
            let total: i32 = placement.iter().map(|(_, n)| n).sum();
            for _ in 0..30 {
                let plan = world.plan();
                for step in &plan.steps {
                    if let Step::Create(Object::Pod | Object::Claim, value) = step {
                        let region = value["metadata"]["labels"][labels::REGION].as_str().unwrap();
                        let permitted = if total > 1 { &standby } else { &primary };
                        prop_assert!(permitted.contains(&region), "{} in {}", step, region);
                        let affinity = value["spec"]["affinity"].to_string();
                        let elsewhere = REGIONS.iter().filter(|r| **r != region).any(|r| affinity.contains(&format!("\"{r}\"")));
                        prop_assert!(!elsewhere);
                    }
                    world.execute(step);
                }
                world.say(&plan);
                world.run_pods();
            }
            let left = world.plan().steps;
            prop_assert!(left.is_empty(), "{:?}", left.iter().map(ToString::to_string).collect::<Vec<_>>());
        }
    }
}

/// The requests that it keeps are to be closed first: until then it is looked after as if nobody had deleted it.
#[test]
fn a_store_that_keeps_requests_serves_until_their_workflow_is_gone() {
    let mut world = sample();
    world.settle();
    let before = world.digest();
    world.store(|s| s.metadata.deletion_timestamp = Some(Time(NOW)));
    world.seen.keeps = vec!["consumers".into()];
    world.seen.pods.retain(|p| p.name_any() != "consumers-2");
    world.settle();
    assert_eq!(world.digest(), before);
    let (status, reason, message) = world.condition(conditions::READY);
    assert_eq!(
        (status.as_str(), reason.as_str()),
        ("False", reasons::REQUESTS_OPEN)
    );
    assert!(message.ends_with("delete RightsWorkflow consumers first"));
    world.seen.keeps.clear();
    let steps = world.plan().steps;
    assert!(matches!(steps.last(), Some(Step::RemoveFinalizer)));
}
