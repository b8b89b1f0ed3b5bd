//! The operator beside instances that decide for themselves: it follows, replaces, takes away, and never leads.

use jiff::{SignedDuration, Timestamp};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{MicroTime, Time};
use kube::ResourceExt;
use proptest::prelude::*;
use serde_json::json;

use super::super::lost::Volume;
use super::super::plan::{Plan, plan};
use super::super::step::{Object, Step};
use super::world::{NOW, World, policy, sample, settings, store};
use crate::api::conditions::{self, reasons};
use crate::api::labels;
use crate::api::privacy_data_store::LastFailover;

fn primary(world: &World) -> (String, i64) {
    let status = world.seen.store.status.clone().unwrap();
    (status.primary.unwrap(), status.term.unwrap())
}

fn everywhere() -> World {
    let mut world = sample();
    world.seen.policy = Some(policy(&["us-west", "us-east"], &["us-west", "us-east"]));
    world
}

fn at(world: &World, now: Timestamp) -> Plan {
    plan(&world.seen, &settings(), now)
}

fn deleted(plan: &Plan) -> Vec<String> {
    let name = |s: &Step| match s {
        Step::Delete { object, name, .. } => Some(format!("{object:?} {name}")),
        Step::Fence { name, .. } => Some(format!("{:?} {name}", Object::Pod)),
        _ => None,
    };
    plan.steps.iter().filter_map(name).collect()
}

#[test]
fn a_failover_is_followed_and_the_old_primary_comes_back_as_a_standby() {
    let mut world = sample();
    world.settle();
    assert_eq!(primary(&world), ("consumers-1".into(), 2));
    world.seen.pods.retain(|p| p.name_any() != "consumers-1");
    world.run_pods();
    world.settle();
    assert_eq!(primary(&world), ("consumers-2".into(), 3));
    assert_eq!(world.seen.pods.len(), 3);
    let (status, _, message) = world.condition(conditions::READY);
    assert_eq!(status, "True", "{message}");
    let mark = |name: &str| {
        let claim = world.seen.claims.iter().find(|c| c.name_any() == name);
        claim.unwrap().annotations()[labels::PRIMARY_TERM].clone()
    };
    assert_eq!(
        (mark("consumers-1"), mark("consumers-2")),
        ("2".into(), "3".into())
    );
}

#[test]
fn while_nobody_serves_the_last_primary_is_kept_and_the_instances_words_are_told() {
    let mut world = sample();
    world.settle();
    world.seen.pods.retain(|p| p.name_any() == "consumers-2");
    world.store(|s| {
        for entry in &mut s.status.as_mut().unwrap().instances {
            entry.role = Some(crate::api::privacy_data_store::InstanceRole::Starting);
            entry.ready = Some(false);
            entry.message = Some("hears no majority".into());
        }
    });
    let plan = world.plan();
    world.say(&plan);
    assert_eq!(primary(&world), ("consumers-1".into(), 2));
    let (status, _, message) = world.condition(conditions::AVAILABLE);
    assert_eq!(status, "False");
    assert!(
        message.contains("consumers-2: hears no majority"),
        "{message}"
    );
}

#[test]
fn who_may_be_primary_follows_policy_and_certainty() {
    let mut world = sample();
    world.settle();
    let may = |world: &World| -> Vec<Option<bool>> {
        let status = world.seen.store.status.as_ref().unwrap();
        status.instances.iter().map(|i| i.may_be_primary).collect()
    };
    assert_eq!(may(&world), [Some(true), Some(true), Some(false)]);
    // Another Region claims the first node, too.
    let mut other = (*super::world::region("us-gulf")).clone();
    other.spec.nodes.labels = world.seen.regions[2].spec.nodes.labels.clone();
    world.seen.regions.push(other.into());
    let plan = world.plan();
    world.say(&plan);
    assert_eq!(may(&world), [Some(false), Some(false), Some(false)]);
    // A policy that is away for a moment takes nobody's right.
    let mut world = sample();
    world.settle();
    world.seen.policy = None;
    let plan = world.plan();
    world.say(&plan);
    assert_eq!(may(&world), [Some(true), Some(true), Some(false)]);
}

#[test]
fn a_parameter_that_needs_a_restart_restarts_each_pod_once() {
    let mut world = sample();
    world.settle();
    let pending = |world: &mut World| {
        world.store(|s| {
            for entry in &mut s.status.as_mut().unwrap().instances {
                entry.pending_restart = Some(true);
            }
        });
    };
    pending(&mut world);
    assert!(
        world.plan().steps.is_empty(),
        "nothing has changed since they were made"
    );
    world.store(|s| {
        s.spec.postgres.parameters = [("max_connections".to_owned(), "50".to_owned())].into();
    });
    let mut order = Vec::new();
    for _ in 0..20 {
        let plan = world.plan();
        order.extend(deleted(&plan));
        for step in &plan.steps {
            world.execute(step);
        }
        world.say(&plan);
        world.run_pods();
        // It is never taken over, as with a lowered max_connections on a standby.
        pending(&mut world);
    }
    assert_eq!(
        order,
        ["Pod consumers-2", "Pod consumers-3", "Pod consumers-1"]
    );
}

#[test]
fn nobody_is_taken_down_while_commits_wait() {
    let mut world = sample();
    world.settle();
    world.store(|s| {
        s.spec.postgres.image = "postgres:17.9".into();
        for entry in &mut s.status.as_mut().unwrap().instances {
            entry.durable = entry.durable.map(|_| false);
        }
    });
    assert!(deleted(&world.plan()).is_empty());
}

#[test]
fn one_that_goes_is_told_first_and_goes_when_nobody_counts_on_it() {
    let mut world = sample();
    world.settle();
    let spec = store(&[("us-west", 2)]).spec;
    world.store(|s| s.spec = spec);
    let leaving = |world: &World| {
        let status = world.seen.store.status.as_ref().unwrap();
        status
            .instances
            .iter()
            .find(|i| i.name == "consumers-3")
            .and_then(|i| i.leaving)
    };
    let plan = world.plan();
    assert!(deleted(&plan).is_empty(), "{:?}", deleted(&plan));
    world.say(&plan);
    assert_eq!(leaving(&world), Some(true));
    let plan = world.plan();
    assert!(deleted(&plan).is_empty(), "it is still a voter");
    // The others have agreed without it, but in an older term: that says nothing of now.
    world.run_pods();
    let agreed = world
        .seen
        .store
        .status
        .as_ref()
        .unwrap()
        .configuration
        .clone()
        .unwrap();
    assert!(agreed.voters.iter().all(|v| !v.starts_with("consumers-3/")));
    world.store(|s| {
        s.status
            .as_mut()
            .unwrap()
            .configuration
            .as_mut()
            .unwrap()
            .term -= 1;
    });
    assert!(deleted(&world.plan()).is_empty());
    world.store(|s| s.status.as_mut().unwrap().configuration = Some(agreed));
    assert!(deleted(&world.plan()).contains(&"Pod consumers-3".to_owned()));
    world.settle();
    assert_eq!((world.seen.pods.len(), leaving(&world)), (2, None));
}

#[test]
fn a_primary_whose_region_is_not_asked_for_hands_over_and_goes() {
    let mut world = everywhere();
    world.settle();
    let spec = store(&[("us-east", 2)]).spec;
    world.store(|s| s.spec = spec);
    world.settle();
    assert_eq!(primary(&world).0, "consumers-3");
    let mut names: Vec<String> = world.seen.pods.iter().map(ResourceExt::name_any).collect();
    names.sort();
    assert_eq!(names.len(), 2, "{names:?}");
    assert!(
        !names.contains(&"consumers-1".to_owned()) && !names.contains(&"consumers-2".to_owned())
    );
    assert_eq!(world.condition(conditions::READY).0, "True");
}

/// An instance's node is gone for good, with its volume.
fn lose(world: &mut World, name: &str) {
    world.seen.nodes.retain(|n| n.name != "w9");
    let pod = world
        .seen
        .pods
        .iter_mut()
        .find(|p| p.name_any() == name)
        .unwrap();
    pod.metadata.creation_timestamp = Some(Time(NOW));
    pod.spec.as_mut().unwrap().node_name = None;
    pod.status = None;
    let gone = ("kubernetes.io/hostname".to_owned(), "w9".to_owned());
    world.seen.volumes.insert(
        name.to_owned(),
        Volume {
            gone: false,
            nodes: vec![gone],
            affinity: None,
        },
    );
}

#[test]
fn a_volume_lost_with_its_node_is_made_anew() {
    let late = NOW + SignedDuration::from_secs(60);
    let mut world = sample();
    world.settle();
    lose(&mut world, "consumers-2");
    assert!(deleted(&world.plan()).is_empty(), "it may come back");
    let plan = at(&world, late);
    assert_eq!(deleted(&plan), ["Claim consumers-2", "Pod consumers-2"]);
    let before: Vec<_> = world.seen.claims.iter().map(ResourceExt::uid).collect();
    for step in &plan.steps {
        world.execute(step);
    }
    world.seen.volumes.clear();
    world.settle();
    assert_eq!(world.told[0].0, reasons::VOLUME_LOST);
    assert_eq!(world.condition(conditions::READY).0, "True");
    let after: Vec<_> = world.seen.claims.iter().map(ResourceExt::uid).collect();
    assert_ne!(before, after);
    assert_eq!(after.len(), 3);
}

#[test]
fn no_volume_is_given_up_that_may_be_the_last_good_copy() {
    let late = NOW + SignedDuration::from_secs(3600);
    // The primary's own.
    let mut world = sample();
    world.settle();
    lose(&mut world, "consumers-1");
    assert!(deleted(&at(&world, late)).is_empty());
    // Another has taken over: then it's one among others.
    world.run_pods();
    lose(&mut world, "consumers-1");
    world.store(|s| {
        let status = s.status.as_mut().unwrap();
        status.instances[0].role = None;
        status.instances[1].role = Some(crate::api::privacy_data_store::InstanceRole::Primary);
        status.instances[1].term = Some(9);
        status.instances[1].durable = Some(true);
        status.instances[1].ready = Some(true);
    });
    assert_eq!(
        deleted(&at(&world, late)),
        ["Claim consumers-1", "Pod consumers-1"]
    );
    // The other standby isn't there, or commits wait, or the primary doesn't serve.
    for spoil in [
        (|w: &mut World| w.seen.pods.retain(|p| p.name_any() != "consumers-3")) as fn(&mut World),
        |w| w.store(|s| s.status.as_mut().unwrap().instances[0].durable = Some(false)),
        |w| w.store(|s| s.status.as_mut().unwrap().instances[0].ready = Some(false)),
    ] {
        let mut world = sample();
        world.settle();
        lose(&mut world, "consumers-2");
        spoil(&mut world);
        assert!(deleted(&at(&world, late)).is_empty());
    }
    // Of two copies, a serving primary has everything.
    let mut world = World::new(&[("us-west", 1), ("us-east", 1)]);
    world.settle();
    lose(&mut world, "consumers-2");
    world.store(|s| s.status.as_mut().unwrap().instances[0].durable = Some(false));
    assert_eq!(
        deleted(&at(&world, late)),
        ["Claim consumers-2", "Pod consumers-2"]
    );
}

fn ask(world: &mut World, annotation: &str, value: &str) {
    world.store(|s| {
        s.annotations_mut().insert(annotation.into(), value.into());
        let field = json!({ "f:metadata": { "f:annotations": { format!("f:{annotation}"): {} } } });
        s.metadata.managed_fields = serde_json::from_value(json!([
            { "manager": "kubectl", "operation": "Update", "time": "1970-01-01T00:00:00Z", "fieldsV1": field },
        ]))
        .unwrap();
    });
}

/// Whether it was removed, and what was told.
fn answered(world: &World, now: Timestamp) -> (bool, Vec<String>) {
    let steps = at(world, now).steps;
    let told = steps.iter().filter_map(|s| match s {
        Step::Tell { reason, note, .. } => Some(format!("{reason}: {note}")),
        _ => None,
    });
    let removed = steps
        .iter()
        .any(|s| matches!(s, Step::RemoveAnnotation { .. }));
    (removed, told.collect())
}

#[test]
fn a_switchover_is_waited_for_and_refused_in_words() {
    let mut world = sample();
    world.settle();
    ask(&mut world, labels::PROMOTE, "consumers-2");
    assert_eq!(answered(&world, NOW), (false, vec![]));
    let (removed, told) = answered(&world, NOW + SignedDuration::from_mins(10));
    assert!(removed && told[0].contains("within 10 minutes"), "{told:?}");
    ask(&mut world, labels::PROMOTE, "consumers-1");
    assert_eq!(answered(&world, NOW), (true, vec![]), "it is the primary");
    ask(&mut world, labels::PROMOTE, "consumers-9");
    let (removed, told) = answered(&world, NOW);
    assert!(
        removed && told[0].contains("no such instance; it has consumers-1, consumers-2"),
        "{told:?}"
    );
    ask(&mut world, labels::PROMOTE, "consumers-3");
    let (removed, told) = answered(&world, NOW);
    assert!(
        removed && told[0].contains("not permitted for Primary"),
        "{told:?}"
    );
    ask(&mut world, labels::PROMOTE, "consumers-2");
    ask(&mut world, labels::FENCE, "consumers-3, consumers-2");
    let (removed, told) = answered(&world, NOW);
    assert!(removed && told[0].contains("fenced"), "{told:?}");
}

#[test]
fn the_acceptance_of_loss_is_recorded_and_not_kept() {
    let mut world = sample();
    world.settle();
    ask(&mut world, labels::ACCEPT_DATA_LOSS, "consumers-2");
    assert!(answered(&world, NOW).1[0].contains("INSTANCE@TERM"));
    ask(&mut world, labels::ACCEPT_DATA_LOSS, "consumers-2@1");
    assert!(answered(&world, NOW).1[0].contains("consumers-1 is primary of term 2 meanwhile"));
    ask(&mut world, labels::ACCEPT_DATA_LOSS, "consumers-2@2");
    assert_eq!(answered(&world, NOW), (false, vec![]));
    assert!(answered(&world, NOW + SignedDuration::from_mins(11)).0);
    world.store(|s| {
        let status = s.status.as_mut().unwrap();
        status.last_failover = Some(LastFailover {
            term: 3,
            primary: "consumers-2".into(),
            reason: "ByHand".into(),
            ..LastFailover::default()
        });
    });
    let (removed, told) = answered(&world, NOW);
    assert!(
        removed && told[0].starts_with("DataLossAccepted: a person accepted"),
        "{told:?}"
    );
}

#[test]
fn a_failover_is_told_once() {
    let mut world = sample();
    world.settle();
    world.store(|s| {
        s.status.as_mut().unwrap().last_failover = Some(LastFailover {
            term: 3,
            primary: "consumers-2".into(),
            reason: "PrimaryDead".into(),
            routed_at: Some(MicroTime(NOW)),
            ..LastFailover::default()
        });
    });
    world.settle();
    world.settle();
    let told = world.told.iter().filter(|(reason, _)| reason == "Failover");
    assert_eq!(told.count(), 1);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]

    /// Whatever pods, nodes and placements come and go: no claim is deleted unless it was lost or its instance is
    /// not wanted, never the primary's, at most one pod that is ready goes at a time, and the term never falls.
    #[test]
    fn the_primary_and_its_volume_are_never_taken_away(
        events in proptest::collection::vec((0..6usize, 0..3usize), 1..8),
    ) {
        let mut world = everywhere();
        world.settle();
        let placements: [&[(&str, i32)]; 3] =
            [&[("us-west", 2), ("us-east", 1)], &[("us-east", 2)], &[("us-west", 3)]];
        for (event, which) in events {
            let name = world.seen.pods.get(which).map(ResourceExt::name_any);
            match (event, name) {
                (0, Some(name)) => world.seen.pods.retain(|p| p.name_any() != name),
                (1, Some(name)) => lose(&mut world, &name),
                (2, _) => {
                    let spec = store(placements[which]).spec;
                    world.store(|s| s.spec = spec);
                }
                (3, _) => world.store(|s| s.spec.postgres.image = format!("postgres:17.{which}")),
                (4, Some(name)) => ask(&mut world, labels::PROMOTE, &name),
                _ => world.run_pods(),
            }
            for round in 0..3 {
                let (old, term) = primary(&world);
                let plan = at(&world, NOW + SignedDuration::from_secs(100));
                let ready = |name: &str| world.seen.pods.iter().any(|p| p.name_any() == name && super::super::assess::pod_ready(Some(p)));
                let leaving = |name: &str| {
                    let status = world.seen.store.status.as_ref().unwrap();
                    status.instances.iter().any(|i| i.name == name && i.leaving == Some(true))
                };
                let mut down = 0;
                for step in &plan.steps {
                    if let Step::Fence { name, .. } = step {
                        down += usize::from(ready(name) && !leaving(name));
                    }
                    if let Step::Delete { object, name, .. } = step {
                        if *object == Object::Claim {
                            prop_assert!(*name != old, "the primary's volume");
                            prop_assert!(world.seen.volumes.contains_key(name), "{} isn't lost", name);
                        }
                        down += usize::from(*object == Object::Pod && ready(name) && !leaving(name));
                    }
                }
                prop_assert!(down <= 1, "{:?}", deleted(&plan));
                for step in &plan.steps {
                    world.execute(step);
                    if let Step::Delete { object: Object::Claim, name, .. } = step {
                        world.seen.volumes.remove(name);
                    }
                }
                world.say(&plan);
                prop_assert!(primary(&world).1 >= term);
                if round > 0 {
                    world.run_pods();
                }
            }
        }
    }
}
