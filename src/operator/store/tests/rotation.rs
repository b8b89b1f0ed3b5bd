//! A certificate authority is replaced: nobody is locked out at any moment, and it comes to an end.

use std::collections::{BTreeMap, BTreeSet};

use jiff::SignedDuration;
use kube::ResourceExt;
use proptest::prelude::*;

use super::super::rotation::CLIENTS_HAVE;
use super::super::step::Step;
use super::world::{World, sample};
use crate::api::conditions::{self, reasons};
use crate::api::labels;

fn settled() -> World {
    let mut world = sample();
    world.settle();
    assert_eq!(world.condition(conditions::READY).0, "True");
    world
}

fn ask(world: &mut World, value: &str) {
    world.store(|s| {
        s.annotations_mut()
            .insert(labels::ROTATE_AUTHORITY.into(), value.into());
    });
}

fn asked(world: &World) -> bool {
    world
        .seen
        .store
        .annotations()
        .contains_key(labels::ROTATE_AUTHORITY)
}

fn certified(world: &World) -> (String, String) {
    let (status, reason, message) = world.condition(conditions::CERTIFIED);
    assert_eq!(status, "True");
    (reason, message)
}

/// The authorities that are trusted, the one that signs first.
fn bundle(world: &World) -> &str {
    &world.seen.authorities.as_ref().unwrap().bundle
}

fn signers(world: &World) -> BTreeSet<String> {
    let all = world.seen.certificates.values();
    all.filter_map(|f| f.signer.clone()).collect()
}

fn one(signer: &str) -> BTreeSet<String> {
    [signer.to_owned()].into()
}

fn reasons_told(world: &World) -> Vec<&str> {
    let all = world.told.iter().map(|(reason, _)| reason.as_str());
    all.filter(|r| r.starts_with("Authority") || r.starts_with("Rotation"))
        .collect()
}

#[test]
fn an_authority_is_announced_signs_and_takes_the_place_of_the_former() {
    let mut world = settled();
    assert_eq!(bundle(&world), "ca-1");
    assert_eq!(
        certified(&world),
        (
            reasons::AS_SPECIFIED.to_owned(),
            "authority ca-1 signs, and ends on 1979-12-30".to_owned()
        )
    );
    ask(&mut world, "1h");
    world.settle();
    assert!(!asked(&world), "it is under way");
    assert_eq!(bundle(&world), "ca-1+ca-2");
    assert_eq!(signers(&world), one("ca-1"));
    assert_eq!(
        certified(&world).1,
        "authority ca-2 signs from 1970-01-01T01:00:00Z on; clients read its certificate until then"
    );
    let app = world.seen.app_secret.clone();
    let again = world.plan().again.unwrap();
    assert_eq!(again.as_secs(), 3600);

    world.now += SignedDuration::from_mins(59);
    assert_eq!(world.settle(), 1);
    assert_eq!(signers(&world), one("ca-1"));

    world.now += SignedDuration::from_mins(1);
    world.settle();
    assert_eq!(signers(&world), one("ca-2"));
    assert_eq!(bundle(&world), "ca-2");
    assert_ne!(world.seen.app_secret, app, "clients get it too");
    assert_eq!(certified(&world).0, reasons::AS_SPECIFIED);
    assert_eq!(
        reasons_told(&world),
        [
            "AuthorityAnnounced",
            "AuthoritySwitched",
            "AuthorityRetired"
        ]
    );
}

#[test]
fn it_waits_for_whoever_has_not_read_it_and_says_for_whom() {
    let mut world = settled();
    world.unread = ["consumers-2".to_owned()].into();
    ask(&mut world, "0s");
    world.settle();
    assert_eq!(bundle(&world), "ca-1+ca-2");
    assert_eq!(
        certified(&world),
        (
            reasons::ROTATING.to_owned(),
            "authority ca-2 is to take the place of ca-1 once it is trusted by consumers-2"
                .to_owned()
        )
    );
    world.unread.clear();
    world.run_pods();
    world.unread = ["consumers-3".to_owned()].into();
    world.settle();
    assert_eq!(bundle(&world), "ca-2+ca-1", "the old one is still used");
    assert_eq!(
        certified(&world).1,
        "authority ca-2 signs; the former one is trusted until new certificates are used by consumers-3"
    );
    world.unread.clear();
    world.run_pods();
    world.unread = ["consumers-1".to_owned()].into();
    world.settle();
    assert_eq!(bundle(&world), "ca-2");
    assert_eq!(
        certified(&world),
        (
            reasons::ROTATING.to_owned(),
            "authority ca-2 signs; a former one is still trusted by consumers-1".to_owned()
        )
    );
    ask(&mut world, "0s");
    world.settle();
    assert!(asked(&world), "one after the other");
    world.unread.clear();
    world.run_pods();
    world.settle();
    assert_eq!(bundle(&world), "ca-3");
}

#[test]
fn one_that_ends_within_half_a_year_is_replaced_unasked_and_certificates_are_renewed_meanwhile() {
    let mut world = settled();
    world.now += SignedDuration::from_hours(24 * (3650 - 181));
    world.settle();
    assert_eq!(bundle(&world), "ca-1", "certificates alone were renewed");
    world.now += SignedDuration::from_hours(48);
    world.settle();
    assert_eq!(bundle(&world), "ca-1+ca-2");
    world.now += CLIENTS_HAVE;
    world.settle();
    assert_eq!(bundle(&world), "ca-2");
}

#[test]
fn a_lost_authority_is_made_anew_and_instances_still_know_each_other() {
    let mut world = settled();
    world.seen.authorities = None;
    world.seen.secrets.remove("consumers-ca");
    world.unread = ["consumers-2".to_owned()].into();
    world.settle();
    assert_eq!(bundle(&world), "ca-2+ca-1");
    assert_eq!(signers(&world), one("ca-1"), "consumers-2 doesn't trust it");
    world.unread.clear();
    world.run_pods();
    world.settle();
    assert_eq!(signers(&world), one("ca-2"));
    assert_eq!(bundle(&world), "ca-2");
}

#[test]
fn what_is_no_duration_is_refused_in_words() {
    for (value, why) in [
        ("tomorrow", "it is no duration"),
        ("-1h", "it can't be negative"),
        ("1000h", "it can't be more than 30 days (720h)"),
        ("", "it is no duration"),
    ] {
        let mut world = settled();
        ask(&mut world, value);
        world.settle();
        assert!(!asked(&world));
        assert_eq!(bundle(&world), "ca-1");
        let (_, note) = world.told.last().unwrap();
        assert_eq!(
            *note,
            format!(
                "the annotation domicile.dev/rotate-authority is {value:?}: {why}; it says how long clients have to read the next authority's certificate, as \"10m\""
            )
        );
    }
}

#[test]
fn a_certificate_that_could_not_be_renewed_for_weeks_is_told() {
    let mut world = settled();
    world.now += SignedDuration::from_hours(24 * 85);
    let plan = world.plan();
    world.say(&plan);
    let (status, reason, message) = world.condition(conditions::CERTIFIED);
    assert_eq!(
        (status.as_str(), reason.as_str()),
        ("False", reasons::ENDS_SOON)
    );
    assert!(message.contains("that of consumers-1 ends on 1970-04-01"));
}

#[derive(Clone, Debug)]
enum Turn {
    Ask(u8),
    Wait(u16),
    Read(usize),
    ReadAll,
    Lose,
    Kill(usize),
    Pass(u8),
}

fn turn() -> impl Strategy<Value = Turn> {
    prop_oneof![
        2 => (0..3u8).prop_map(Turn::Ask),
        3 => (0..2000u16).prop_map(Turn::Wait),
        3 => (0..3usize).prop_map(Turn::Read),
        2 => Just(Turn::ReadAll),
        1 => Just(Turn::Lose),
        1 => (0..3usize).prop_map(Turn::Kill),
        4 => (1..8u8).prop_map(Turn::Pass),
    ]
}

/// What the instances that run have read: whom they trust, and who signed what they show.
fn read(world: &World) -> BTreeMap<String, (Vec<String>, String)> {
    let entries = world.seen.store.status.iter().flat_map(|s| &s.instances);
    entries
        .filter(|e| world.seen.pods.iter().any(|p| p.name_any() == e.name))
        .filter_map(|e| {
            let signer = e.signed_by.clone()?;
            Some((e.name.clone(), (e.trusts.clone(), signer)))
        })
        .collect()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    /// Whatever is asked, lost or slow: any two instances know each other at every moment, after every single step; and
    /// once everybody reads, one authority is left, which has signed everything.
    #[test]
    fn any_two_instances_know_each_other_at_every_moment(turns in proptest::collection::vec(turn(), 1..30)) {
        let mut world = settled();
        let all: BTreeSet<String> = world.seen.pods.iter().map(ResourceExt::name_any).collect();
        world.unread.clone_from(&all);
        let known = |world: &World| {
            let read = read(world);
            for (a, (_, signer)) in &read {
                for (b, (trusts, _)) in &read {
                    prop_assert!(trusts.contains(signer), "{} trusts {:?} and {} shows {}", b, trusts, a, signer);
                }
            }
            Ok(())
        };
        for turn in &turns {
            match turn {
                Turn::Ask(n) => ask(&mut world, ["0s", "5m", "soon"][usize::from(*n)]),
                Turn::Wait(hours) => world.now += SignedDuration::from_hours(i64::from(*hours)),
                Turn::Read(n) => {
                    let name = format!("consumers-{}", n + 1);
                    world.unread.remove(&name);
                    world.run_pods();
                    world.unread.clone_from(&all);
                }
                Turn::ReadAll => {
                    world.unread.clear();
                    world.run_pods();
                    world.unread.clone_from(&all);
                }
                Turn::Lose => {
                    world.seen.authorities = None;
                    world.seen.secrets.remove("consumers-ca");
                }
                Turn::Kill(n) => {
                    // It comes back with what its Secret holds then.
                    let name = format!("consumers-{}", n + 1);
                    world.seen.pods.retain(|p| p.name_any() != name);
                    world.unread.remove(&name);
                    for _ in 0..2 {
                        for step in world.plan().steps {
                            world.execute(&step);
                        }
                        world.run_pods();
                    }
                    world.unread.insert(name);
                }
                Turn::Pass(steps) => {
                    // Perhaps interrupted.
                    let plan = world.plan();
                    for step in plan.steps.iter().take(usize::from(*steps)) {
                        world.execute(step);
                        world.run_pods();
                        known(&world)?;
                    }
                    world.say(&plan);
                }
            }
            let late = matches!(turn, Turn::Wait(_)) && world.seen.certificates.values().any(|f| f.ending(world.now));
            if late {
                // Nobody renewed for two months: that is another promise's matter.
                return Ok(());
            }
            known(&world)?;
        }
        world.unread.clear();
        world.store(|s| { s.annotations_mut().clear(); });
        for _ in 0..3 {
            world.run_pods();
            world.settle();
            world.now += CLIENTS_HAVE;
        }
        let authorities = world.seen.authorities.clone().unwrap();
        prop_assert_eq!(&authorities.bundle, &authorities.active.id);
        prop_assert_eq!(signers(&world), one(&authorities.active.id));
        let issues = |s: &Step| matches!(s, Step::IssueCertificate { .. });
        prop_assert!(!world.plan().steps.iter().any(issues));
    }
}
