//! What the operator itself refuses, with no admission policy there.

use std::sync::Arc;

use kube::ResourceExt;

use super::super::observe::StorageClassSeen;
use super::world::{World, policy, sample};
use crate::api::conditions::{self, reasons};
use crate::api::{ResidencyPolicy, labels};
use crate::residency::volumes::Class;

/// Every instance where the ceiling permits it, and the primary.
fn held_to(world: &mut World, ceiling: Option<ResidencyPolicy>, name: &str) {
    world
        .seen
        .namespace_labels
        .insert(labels::RESIDENCY.to_owned(), name.to_owned());
    world.seen.ceiling = ceiling.map(|mut policy| {
        policy.metadata.name = Some(name.to_owned());
        Arc::new(policy)
    });
}

fn west() -> ResidencyPolicy {
    (*policy(&["us-west"], &["us-west"])).clone()
}

#[test]
fn a_store_beyond_its_namespaces_policy_is_not_made() {
    let mut world = sample();
    held_to(&mut world, Some(west()), "west-only");
    world.settle();
    let (status, reason, message) = world.condition(conditions::STALLED);
    assert_eq!(
        (status.as_str(), reason.as_str()),
        ("True", reasons::BEYOND_CEILING),
        "{message}"
    );
    assert!(
        message.contains("does not lie within ResidencyPolicy west-only"),
        "{message}"
    );
    assert!(world.seen.pods.is_empty() && world.seen.claims.is_empty());
}

#[test]
fn a_ceiling_that_does_not_exist_permits_nothing() {
    let mut world = sample();
    held_to(&mut world, None, "typo");
    world.settle();
    let (status, reason, message) = world.condition(conditions::STALLED);
    assert_eq!(
        (status.as_str(), reason.as_str()),
        ("True", reasons::POLICY_NOT_FOUND),
        "{message}"
    );
    assert!(
        message.starts_with("ResidencyPolicy typo, within which namespace"),
        "{message}"
    );
    assert!(world.seen.pods.is_empty());
}

#[test]
fn a_store_within_its_namespaces_policy_is_made() {
    let mut world = sample();
    let wide = policy(
        &["us-west", "us-east"],
        &["us-west", "us-east", "eu-central"],
    );
    held_to(&mut world, Some((*wide).clone()), "wide");
    world.settle();
    assert_eq!(world.condition(conditions::READY).0, "True");
}

/// The label comes to a namespace with a running store: what is outside now is said, nothing new is made there, and
/// a pod that ends there isn't made again.
#[test]
fn under_a_later_ceiling_nothing_is_made_outside_again() {
    let mut world = sample();
    world.settle();
    held_to(&mut world, Some(west()), "west-only");
    world.settle();
    let (status, _, message) = world.condition(conditions::RESIDENT);
    assert_eq!(status, "False");
    assert!(
        message.contains("not permitted for Standby by ResidencyPolicy west-only"),
        "{message}"
    );
    world.seen.pods.retain(|p| p.name_any() != "consumers-3");
    world.settle();
    assert!(
        world
            .seen
            .pods
            .iter()
            .all(|p| p.labels()[labels::REGION] == "us-west"),
        "made again outside"
    );
    assert!(
        world
            .seen
            .pods
            .iter()
            .any(|p| p.labels()[labels::REGION] == "us-west"),
        "what is lawful goes on"
    );
}

fn class(immediate: bool) -> StorageClassSeen {
    StorageClassSeen::Found(Class {
        name: "standard".into(),
        immediate,
        ..Class::default()
    })
}

#[test]
fn a_class_that_binds_at_once_is_refused_before_a_volume_is_asked_for() {
    for (seen, wanted) in [
        (class(true), reasons::STORAGE_CLASS_NOT_PERMITTED),
        (
            StorageClassSeen::Missing(Some("x".into())),
            reasons::STORAGE_CLASS_NOT_FOUND,
        ),
        (
            StorageClassSeen::Missing(None),
            reasons::STORAGE_CLASS_NOT_FOUND,
        ),
    ] {
        let mut world = sample();
        world.seen.storage_class = seen;
        world.settle();
        let (status, reason, message) = world.condition(conditions::STALLED);
        assert_eq!((status.as_str(), reason.as_str()), ("True", wanted));
        assert!(message.contains("StorageClass"), "{message}");
        assert!(world.seen.claims.is_empty());
    }
    let mut world = sample();
    world.seen.storage_class = class(false);
    world.settle();
    assert_eq!(world.condition(conditions::READY).0, "True");
}
