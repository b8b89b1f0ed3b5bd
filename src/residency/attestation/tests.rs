//! Chains are made as the operator makes them, and then spoilt in every way.

use std::collections::BTreeMap;
use std::sync::LazyLock;

use jiff::{SignedDuration, Timestamp};
use proptest::prelude::*;
use serde_json::json;

use super::chain::{Checked, Export, Known, Maker, Tail, due, next, surplus, verify};
use super::evidence::{EndpointSeen, Evidence, Report, VolumeSeen};
use super::judge::judge;
use super::seal::{Envelope, NamedKey, PublicKey, SigningKey};
use super::*;
use crate::api::region::{NodeWitnesses, RegionSpec};
use crate::api::{Region, ResidencyPolicy, labels};
use crate::residency::violations::Requirement;
use crate::residency::{NodeFacts, Permissions};

fn region(name: &str) -> Region {
    Region::new(
        name,
        RegionSpec {
            jurisdictions: vec!["US".into()],
            nodes: NodeWitnesses {
                labels: [(labels::NODE_TOPOLOGY_REGION.to_owned(), name.to_owned())].into(),
                provider_id_prefix: Some(format!("cloud://{name}")),
            },
        },
    )
}

fn node(name: &str, region: &str) -> NodeFacts {
    NodeFacts {
        name: name.into(),
        labels: [
            (labels::NODE_TOPOLOGY_REGION, region),
            (labels::NODE_ZONE, "a"),
            (labels::NODE_REGION, region),
            (labels::NODE_HOSTNAME, name),
        ]
        .map(|(k, v)| (k.to_owned(), v.to_owned()))
        .into(),
        provider_id: Some(format!("cloud://{region}/{name}")),
        usable: true,
    }
}

fn policy(standby: &[&str]) -> ResidencyPolicy {
    let spec = json!({
        "basis": "Contract", "citation": "Annex 2",
        "permits": [{ "data": "Primary", "regions": ["us-west"] }, { "data": "Standby", "regions": standby }],
    });
    let mut policy = ResidencyPolicy::new("records", serde_json::from_value(spec).unwrap());
    policy.metadata.generation = Some(3);
    policy.metadata.uid = Some("p".into());
    policy
}

/// A store of two, as it should be; `spoil` changes what is seen of it.
fn seen(standby: &[&str], spoil: impl FnOnce(&mut Evidence<'_>)) -> Content {
    let regions = [region("us-west"), region("us-east"), region("eu-central")];
    let policy = policy(standby);
    let permissions = Permissions::resolve(&policy, &regions);
    let nodes = [
        node("w1", "us-west"),
        node("e1", "us-east"),
        node("c1", "eu-central"),
    ];
    let on = |name: &str| {
        Ok(Some(vec![vec![Requirement {
            key: labels::NODE_HOSTNAME.into(),
            operator: "In".into(),
            values: vec![name.into()],
        }]]))
    };
    let volume = |n: u32, node: &str| VolumeSeen {
        claim: format!("s-{n}"),
        volume: format!("pv-{n}"),
        affinity: on(node),
    };
    let mut evidence = Evidence {
        store: "s",
        deleting: false,
        policy: Ok((&policy, &permissions)),
        regions: regions.iter().collect(),
        nodes: &nodes,
        primary: Some("s-1"),
        copy: Data::Standby,
        bound: vec![("s-1".into(), "w1".into()), ("s-2".into(), "e1".into())],
        volumes: vec![volume(1, "w1"), volume(2, "e1")],
        reports: [
            (
                "s-1".to_owned(),
                Ok(Report {
                    streams: Some(["s-2".to_owned()].into()),
                    slots: [("s_2".to_owned(), true)].into(),
                }),
            ),
            ("s-2".to_owned(), Ok(Report::default())),
        ]
        .into(),
        endpoints: vec![EndpointSeen {
            slice: "s-rw".into(),
            address: "10.0.0.1".into(),
            pod: Some("s-1".into()),
        }],
    };
    spoil(&mut evidence);
    judge(&evidence)
}

fn good() -> Content {
    seen(&["us-west", "us-east"], |_| {})
}

fn of(content: &Content, kind: Kind, name: &str) -> Finding {
    let found = content
        .findings
        .iter()
        .find(|f| f.kind == kind && f.name == name);
    found
        .unwrap_or_else(|| panic!("{kind} {name} in {:#?}", content.findings))
        .clone()
}

#[test]
fn a_store_as_it_should_be_is_within_and_every_claim_has_its_observation() {
    let content = good();
    assert_eq!(content.verdict, Verdict::Within);
    assert_eq!(content.findings.len(), 7, "{:#?}", content.findings);
    assert!(content.findings.iter().all(|f| f.verdict == Verdict::Within
        && !f.observed.is_empty()
        && f.place.region.is_some()));
    let copy = of(&content, Kind::Instance, "s-1");
    let words: Vec<String> = copy.observed.iter().map(ToString::to_string).collect();
    assert_eq!(
        words,
        [
            "pod s-1 is bound to node w1",
            "label topology.kubernetes.io/region=us-west of node w1",
            "label topology.kubernetes.io/zone=a of node w1",
            "stamp node-restriction.kubernetes.io/domicile-region=us-west of node w1",
            "providerID cloud://us-west/w1 of node w1",
        ]
    );
    let policy = content.policy.unwrap();
    assert_eq!((policy.name.as_str(), policy.generation), ("records", 3));
    let names: Vec<&str> = content.regions.iter().map(|r| r.name.as_str()).collect();
    assert_eq!(names, ["us-east", "us-west"]);
    assert!(content.unobserved.iter().all(|u| u.standing));
}

#[test]
fn what_is_outside_is_said_in_the_words_of_a_refusal() {
    let content = seen(&["us-west"], |_| {});
    assert_eq!(content.verdict, Verdict::Outside);
    for (kind, name) in [
        (Kind::Instance, "s-2"),
        (Kind::Volume, "s-2"),
        (Kind::Standby, "s-1 to s-2"),
        (Kind::ReplicationSlot, "s_2 on s-1"),
    ] {
        let found = of(&content, kind, name);
        assert_eq!(found.verdict, Verdict::Outside, "{kind}");
        assert_eq!(
            found.because.unwrap(),
            "region us-east is not permitted for Standby by ResidencyPolicy records (basis Contract: Annex 2); permitted for Standby: us-west"
        );
    }
    assert_eq!(of(&content, Kind::Instance, "s-1").verdict, Verdict::Within);
}

#[test]
fn doubt_is_never_within() {
    let all = ["us-west", "us-east"];
    let verdict = |spoil: fn(&mut Evidence<'_>)| seen(&all, spoil).verdict;
    // A node that isn't known, or lies about itself.
    assert_eq!(verdict(|e| e.bound[1].1 = "x".into()), Verdict::Unknown);
    let lying = seen(&all, |e| e.bound[1].1 = "c1".into());
    assert_eq!(lying.verdict, Verdict::Outside);
    // A volume of which nothing is said.
    assert_eq!(
        verdict(|e| e.volumes[1].affinity = Ok(None)),
        Verdict::Unknown
    );
    assert_eq!(
        verdict(|e| e.volumes[1].affinity = Err("could not be read".into())),
        Verdict::Unknown
    );
    // An instance that doesn't answer, and a primary that doesn't say who streams.
    assert_eq!(
        verdict(|e| {
            e.reports.insert("s-1".into(), Err("did not answer".into()));
        }),
        Verdict::Unknown
    );
    assert_eq!(
        verdict(|e| {
            e.reports.insert("s-1".into(), Ok(Report::default()));
        }),
        Verdict::Unknown
    );
    assert_eq!(
        verdict(|e| e.policy = Err("it does not exist".into())),
        Verdict::Unknown
    );
}

#[test]
fn a_volume_is_where_every_node_is_that_reaches_it() {
    let all = ["us-west", "us-east"];
    let zone = |e: &mut Evidence<'_>, key: &str, values: &[&str]| {
        e.volumes[1].affinity = Ok(Some(vec![vec![Requirement {
            key: key.into(),
            operator: "In".into(),
            values: values.iter().map(|&v| v.to_owned()).collect(),
        }]]));
    };
    let found = |content: &Content| of(content, Kind::Volume, "s-2");
    let both = found(&seen(&all, |e| {
        zone(e, labels::NODE_TOPOLOGY_REGION, &["us-west", "us-east"]);
    }));
    assert_eq!((both.verdict, both.place.region), (Verdict::Within, None));
    let abroad = found(&seen(&all, |e| zone(e, labels::NODE_ZONE, &["a"])));
    assert_eq!(abroad.verdict, Verdict::Outside);
    let nowhere = found(&seen(&all, |e| zone(e, labels::NODE_ZONE, &["z"])));
    assert_eq!(nowhere.verdict, Verdict::Unknown);
    let odd = found(&seen(&all, |e| {
        zone(e, labels::NODE_ZONE, &["1"]);
        if let Ok(Some(terms)) = &mut e.volumes[1].affinity {
            terms[0][0].operator = "Gt".into();
        }
    }));
    assert_eq!(odd.verdict, Verdict::Unknown);
}

#[test]
fn a_stranger_is_outside_and_its_name_is_not_told() {
    let content = seen(&["us-west", "us-east"], |e| {
        let report = Report {
            streams: Some(["jane_doe".to_owned()].into()),
            slots: [("jane_doe".to_owned(), true), ("s_7".to_owned(), false)].into(),
        };
        e.reports.insert("s-1".into(), Ok(report));
        e.endpoints[0].pod = None;
    });
    assert_eq!(content.verdict, Verdict::Outside);
    let text = serde_json::to_string(&content).unwrap();
    assert!(
        !text.contains("jane") && !text.contains("10.0.0.1"),
        "{text}"
    );
    let strange = content
        .findings
        .iter()
        .filter(|f| f.verdict == Verdict::Outside);
    let kinds: Vec<Kind> = strange.map(|f| f.kind).collect();
    assert_eq!(
        kinds,
        [Kind::Standby, Kind::ReplicationSlot, Kind::Endpoint]
    );
    // Held for an instance that is away, and used by nobody: nothing flows.
    let idle = of(&content, Kind::ReplicationSlot, "s_7 on s-1");
    assert_eq!(
        (idle.verdict, idle.place.leads_to.as_deref()),
        (Verdict::Within, Some("s-7"))
    );
}

const START: Timestamp = Timestamp::UNIX_EPOCH;

fn maker(now: Timestamp) -> Maker {
    Maker {
        program: "domicile test".into(),
        operator: "one".into(),
        store: StoreRef {
            namespace: "records".into(),
            name: "s".into(),
            uid: "u".into(),
        },
        now,
    }
}

/// A chain in the making.
#[derive(Default)]
struct Log {
    entries: Vec<Envelope>,
    keys: BTreeMap<String, PublicKey>,
    tail: Option<Tail>,
}

impl Log {
    fn add(&mut self, content: Content, hours: i64, with: &SigningKey, new: Option<&SigningKey>) {
        let now = START + SignedDuration::from_hours(hours);
        let introduces = new.map(|k| NamedKey::from(&k.public()));
        let tail = self.tail.as_ref();
        let statement = next(tail, content, maker(now), None, introduces);
        let envelope = with.sign(&statement).unwrap();
        self.tail = Some(Tail::after(tail, &envelope, &statement).unwrap());
        self.keys.insert(with.public().id(), with.public());
        self.entries.push(envelope);
    }

    fn export(&self) -> Export {
        Export::new(self.entries.clone(), &self.keys)
    }
}

/// Six entries: the second says the same as the first, the fourth introduces another key.
fn log() -> Log {
    let (old, new) = (SigningKey::of_seed(1), SigningKey::of_seed(2));
    let mut log = Log::default();
    log.add(good(), 0, &old, None);
    log.add(good(), 1, &old, None);
    log.add(seen(&["us-west"], |_| {}), 2, &old, None);
    log.add(good(), 3, &old, Some(&new));
    log.add(good(), 4, &new, None);
    log.add(good(), 5, &new, None);
    log
}

fn holds(export: &Export) -> Result<Vec<Checked>, String> {
    verify(export, &Known::default()).map_err(|e| e.to_string())
}

#[test]
fn a_chain_holds_over_a_change_of_keys_and_repeats_say_what_they_repeat() {
    let checked = holds(&log().export()).unwrap();
    let said: Vec<Verdict> = checked.iter().map(|c| c.content.verdict).collect();
    assert_eq!(said[2], Verdict::Outside);
    assert_eq!(said.iter().filter(|v| **v == Verdict::Within).count(), 5);
    let full = |c: &Checked| matches!(c.statement.content, Body::Full(_));
    assert_eq!(
        checked.iter().map(full).collect::<Vec<_>>(),
        [true, false, true, true, false, false]
    );
    assert_eq!(checked[1].content, good());
}

#[test]
fn an_unchanged_store_is_still_said_in_full_once_a_day() {
    let one = SigningKey::of_seed(1);
    let mut log = Log::default();
    for hour in 0..50 {
        log.add(good(), hour, &one, None);
    }
    let full: Vec<u64> = holds(&log.export())
        .unwrap()
        .iter()
        .filter(|c| matches!(c.statement.content, Body::Full(_)))
        .map(|c| c.statement.sequence)
        .collect();
    assert_eq!(full, [1, 25, 49]);
}

#[test]
fn only_given_or_introduced_keys_are_trusted() {
    let export = log().export();
    let with = |keys: &[u8]| {
        let keys = keys
            .iter()
            .map(|k| SigningKey::of_seed(*k).public().id())
            .collect();
        let known = Known {
            keys,
            ..Known::default()
        };
        verify(&export, &known).map(|c| c.len())
    };
    assert_eq!(with(&[1]), Ok(6));
    assert_eq!(with(&[1, 2]), Ok(6));
    for wrong in [&[2][..], &[3], &[2, 3]] {
        let why = with(wrong).unwrap_err().to_string();
        assert!(why.starts_with("entry 1 "), "{why}");
    }
    // A key that was lost: the chain goes on with another that nobody introduced.
    let mut lost = Log::default();
    lost.add(good(), 0, &SigningKey::of_seed(1), None);
    lost.add(good(), 1, &SigningKey::of_seed(2), None);
    let why = holds(&lost.export()).unwrap_err();
    assert!(
        why.contains("entry 2 ") && why.contains("lost its key"),
        "{why}"
    );
    let both = Known {
        keys: [
            SigningKey::of_seed(1).public().id(),
            SigningKey::of_seed(2).public().id(),
        ]
        .into(),
        ..Known::default()
    };
    assert!(verify(&lost.export(), &both).is_ok());
    // The old key may sign nothing once another is introduced.
    let mut back = Log::default();
    back.add(
        good(),
        0,
        &SigningKey::of_seed(1),
        Some(&SigningKey::of_seed(2)),
    );
    back.add(good(), 1, &SigningKey::of_seed(1), None);
    assert!(holds(&back.export()).is_err());
}

#[test]
fn the_end_can_be_cut_off_unless_the_head_is_known() {
    let mut export = log().export();
    let whole = holds(&export).unwrap();
    export.entries.pop();
    assert!(holds(&export).is_ok());
    let known = |head: Option<&str>, since: Option<&str>| Known {
        head: head.map(str::to_owned),
        since: since.map(str::to_owned),
        ..Known::default()
    };
    let why = verify(&export, &known(Some(&whole[5].hash), None)).unwrap_err();
    assert!(why.to_string().contains("missing at the end"), "{why}");
    let why = verify(&export, &known(Some(&whole[3].hash), None)).unwrap_err();
    assert!(why.to_string().contains("entries follow it"), "{why}");
    assert!(verify(&export, &known(Some(&whole[4].hash), None)).is_ok());
    // What was fetched before is held, or was the one before the first.
    export.entries.drain(..2);
    export = Export::new(export.entries, &log().keys);
    for (since, held) in [(0, false), (1, true), (3, true), (5, false)] {
        let known = known(None, Some(&whole[since].hash));
        assert_eq!(verify(&export, &known).is_ok(), held, "{since}");
    }
}

#[test]
fn entries_of_two_stores_or_chains_do_not_mix() {
    let mut export = log().export();
    let mut other = Log::default();
    other.add(seen(&["us-west"], |_| {}), 0, &SigningKey::of_seed(1), None);
    other.add(good(), 1, &SigningKey::of_seed(1), None);
    export.entries[1] = other.entries[1].clone();
    assert!(holds(&export).unwrap_err().starts_with("entry 2 "));
}

#[test]
fn an_entry_is_due_on_change_hourly_and_at_once_if_something_is_outside() {
    let mut log = Log::default();
    log.add(good(), 0, &SigningKey::of_seed(1), None);
    let at = |seconds: i64| START + SignedDuration::from_secs(seconds);
    let last = log.tail.as_ref();
    let unknown = seen(&["us-west", "us-east"], |e| e.bound[1].1 = "x".into());
    let outside = seen(&["us-west"], |_| {});
    let going = seen(&["us-west", "us-east"], |e| e.deleting = true);
    assert!(due(None, &good(), at(0)));
    for (content, seconds, is) in [
        (&good(), 0, false),
        (&good(), 3400, false),
        (&good(), 3420, true),
        (&good(), -1, true),
        (&unknown, 29, false),
        (&unknown, 30, true),
        (&outside, 0, true),
        (&going, 0, true),
    ] {
        assert_eq!(due(last, content, at(seconds)), is, "{seconds}");
    }
    log.add(outside.clone(), 1, &SigningKey::of_seed(1), None);
    let after = |s: i64| START + SignedDuration::from_secs(3600 + s);
    assert!(!due(log.tail.as_ref(), &outside, after(1)));
    assert!(!due(log.tail.as_ref(), &good(), after(1)));
    assert!(due(log.tail.as_ref(), &good(), after(31)));
    // A change of keys is completed at once.
    log.add(
        good(),
        2,
        &SigningKey::of_seed(1),
        Some(&SigningKey::of_seed(2)),
    );
    assert!(due(log.tail.as_ref(), &good(), after(3601)));
}

/// Made once: every case spoils a copy.
static WHOLE: LazyLock<Log> = LazyLock::new(log);

proptest! {
    #![proptest_config(ProptestConfig::with_cases(1_000))]

    /// Any changed byte of a file is noticed, or is white space between the words of the JSON around the envelopes.
    #[test]
    fn a_changed_byte_is_noticed(at in any::<proptest::sample::Index>(), flip in 1u8..=255) {
        let export = WHOLE.export();
        let mut bytes = serde_json::to_vec_pretty(&export).unwrap();
        let at = at.index(bytes.len());
        bytes[at] ^= flip;
        match serde_json::from_slice::<Export>(&bytes) {
            Err(_) => {}
            Ok(changed) if changed == export => prop_assert!(bytes[at].is_ascii_whitespace()),
            Ok(changed) => prop_assert!(holds(&changed).is_err(), "byte {at}"),
        }
    }

    /// Leaving out, doubling or moving an entry is noticed, but for the ends.
    #[test]
    fn a_missing_doubled_or_moved_entry_is_noticed(what in 0..3, from in 0..6usize, to in 0..6usize) {
        let whole = &*WHOLE;
        let mut entries = whole.entries.clone();
        match what {
            0 => {
                // The first: what says the same as it has lost its meaning. The last: only the head tells.
                prop_assume!(from != 5);
                entries.remove(from);
            }
            1 => entries.insert(to, entries[from].clone()),
            _ => {
                prop_assume!(from != to);
                let moved = entries.remove(from);
                entries.insert(to, moved);
            }
        }
        prop_assert!(holds(&Export::new(entries, &whole.keys)).is_err());
    }

    /// What is kept fits, and begins with an entry in full.
    #[test]
    fn the_oldest_go_first_and_what_is_left_fits(
        kept in proptest::collection::vec((1..400usize, any::<bool>()), 0..40), adding in 1..400usize,
    ) {
        let gone = surplus(&kept, adding, 2_000);
        let left = &kept[gone..];
        prop_assert!(adding + left.iter().map(|(s, _)| s).sum::<usize>() <= 2_000);
        prop_assert!(left.first().is_none_or(|(_, full)| *full));
        // One more would not have done.
        if let Some(i) = kept[..gone].iter().rposition(|(_, full)| *full) {
            prop_assert!(adding + kept[i..].iter().map(|(s, _)| s).sum::<usize>() > 2_000);
        }
    }
}

/// The largest store: nine instances, long names, every channel, everything outside.
#[test]
fn the_largest_store_leaves_room_for_days() {
    let long = |name: &str| format!("{name:x<63}");
    let store = format!("{:s<40}", "s");
    let regions: Vec<Region> = (0..64).map(|i| region(&long(&format!("r{i}")))).collect();
    let names: Vec<String> = regions
        .iter()
        .filter_map(|r| r.metadata.name.clone())
        .collect();
    let permits: Vec<_> = [
        "Primary", "Standby", "Backup", "Snapshot", "Worker", "Gateway", "Export",
    ]
    .iter()
    .map(|data| json!({ "data": data, "regions": names }))
    .collect();
    let citation = "c".repeat(1024);
    let spec = json!({ "basis": "Statute", "citation": citation, "permits": permits });
    let policy = ResidencyPolicy::new(&long("p"), serde_json::from_value(spec).unwrap());
    let permissions = Permissions::resolve(&policy, &regions);
    let node_name = |i: usize| format!("{:n<253}", format!("n{i}"));
    // In no Region, so that each says why.
    let nodes: Vec<NodeFacts> = (0..9).map(|i| node(&node_name(i), "elsewhere")).collect();
    let instances: Vec<String> = (1..=9).map(|n| format!("{store}-{n}")).collect();
    let report = Report {
        streams: Some(instances.iter().cloned().collect()),
        slots: instances
            .iter()
            .map(|i| (i.replace('-', "_"), true))
            .collect(),
    };
    let affinity = |i: usize| {
        Ok(Some(vec![vec![Requirement {
            key: labels::NODE_HOSTNAME.into(),
            operator: "In".into(),
            values: vec![node_name(i)],
        }]]))
    };
    let evidence = Evidence {
        store: &store,
        deleting: false,
        policy: Ok((&policy, &permissions)),
        regions: regions.iter().collect(),
        nodes: &nodes,
        primary: Some(&instances[0]),
        copy: Data::Standby,
        bound: instances
            .iter()
            .cloned()
            .zip((0..9).map(node_name))
            .collect(),
        volumes: (0..9)
            .map(|i| VolumeSeen {
                claim: instances[i].clone(),
                volume: long("pv"),
                affinity: affinity(i),
            })
            .collect(),
        reports: instances
            .iter()
            .map(|i| (i.clone(), Ok(report.clone())))
            .collect(),
        endpoints: instances
            .iter()
            .map(|i| EndpointSeen {
                slice: format!("{store}-ro"),
                address: "10.0.0.1".into(),
                pod: Some(i.clone()),
            })
            .collect(),
    };
    let content = judge(&evidence);
    assert_eq!(content.verdict, Verdict::Outside);
    let mut log = Log::default();
    log.add(content.clone(), 0, &SigningKey::of_seed(1), None);
    log.add(content, 1, &SigningKey::of_seed(1), None);
    let size = |i: usize| serde_json::to_string(&log.entries[i]).unwrap().len();
    let day = size(0) + 23 * size(1);
    assert!(size(0) < chain::BUDGET / 2, "{} bytes", size(0));
    assert!(size(1) < 1_500, "{} bytes", size(1));
    assert!(chain::BUDGET / day >= 2, "{day} bytes a day");
    let mut usual = Log::default();
    usual.add(good(), 0, &SigningKey::of_seed(1), None);
    let text = serde_json::to_string(&usual.entries[0]).unwrap();
    let day = text.len() + 23 * size(1);
    assert!(chain::BUDGET / day >= 14, "{day} bytes a day");
}
