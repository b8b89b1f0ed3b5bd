use super::*;
use crate::api::region::{NodeWitnesses, RegionSpec};
use crate::api::residency_policy::{Data, Permit, ResidencyPolicySpec};
use crate::api::{Region, ResidencyPolicy};
use crate::residency::{NodeFacts, Permissions, locate};
use proptest::prelude::*;

fn site(region: &str, zone: &str) -> Site {
    Site {
        region: region.into(),
        zone: zone.into(),
        usable: true,
    }
}

fn want(region: &str, instances: u32) -> Want {
    Want {
        region: region.into(),
        instances,
    }
}

fn as_existing(placed: &[Placed], fixed: bool) -> Vec<Existing> {
    placed
        .iter()
        .map(|p| Existing {
            slot: p.slot,
            region: p.region.clone(),
            zone: p.zone.clone(),
            fixed,
        })
        .collect()
}

#[test]
fn the_sample_store_spreads_over_two_western_zones_and_the_east() {
    let sites = [
        site("us-west", "b"),
        site("us-west", "a"),
        site("us-west", "c"),
        site("us-east", "a"),
    ];
    let outcome = place(&[want("us-west", 2), want("us-east", 1)], &sites, &[], None);
    let at: Vec<_> = outcome
        .placed
        .iter()
        .map(|p| (p.slot, p.region.as_str(), p.zone.as_str()))
        .collect();
    assert_eq!(
        at,
        [
            (1, "us-west", "a"),
            (2, "us-west", "b"),
            (3, "us-east", "a")
        ]
    );
}

#[test]
fn without_a_usable_node_it_waits_and_goes_nowhere_else() {
    let mut closed = site("us-east", "a");
    closed.usable = false;
    let outcome = place(
        &[want("us-west", 1), want("us-east", 1)],
        &[site("us-west", "a"), closed],
        &[],
        None,
    );
    assert_eq!(outcome.placed.len(), 1);
    assert_eq!(outcome.waiting, [("us-east".to_owned(), 1)].into());
}

#[test]
fn an_instance_with_a_volume_stays_though_its_zone_is_gone() {
    let existing = [Existing {
        slot: 1,
        region: "r".into(),
        zone: "gone".into(),
        fixed: true,
    }];
    let outcome = place(&[want("r", 1)], &[site("r", "a")], &existing, None);
    assert_eq!(outcome.placed[0].zone, "gone");
}

#[test]
fn an_instance_without_a_volume_moves_when_its_zone_is_gone() {
    let existing = [Existing {
        slot: 1,
        region: "r".into(),
        zone: "gone".into(),
        fixed: false,
    }];
    let outcome = place(&[want("r", 1)], &[site("r", "a")], &existing, None);
    assert_eq!(outcome.placed[0].zone, "a");
}

#[test]
fn the_primary_is_the_last_to_become_surplus() {
    let existing: Vec<Existing> = (1..=3)
        .map(|slot| Existing {
            slot,
            region: "r".into(),
            zone: "a".into(),
            fixed: true,
        })
        .collect();
    let outcome = place(&[want("r", 1)], &[site("r", "a")], &existing, Some(3));
    assert_eq!(
        outcome.placed.iter().map(|p| p.slot).collect::<Vec<_>>(),
        [3]
    );
    assert_eq!(outcome.surplus, [1, 2]);
}

const REGIONS: [&str; 4] = ["ra", "rb", "rc", "rd"];
const ZONES: [&str; 3] = ["z1", "z2", "z3"];

/// A random world: Regions by label and provider, nodes that may lie about either, a policy, and a store.
#[derive(Clone, Debug)]
struct World {
    regions: Vec<Region>,
    nodes: Vec<NodeFacts>,
    permissions: Permissions,
    wants: Vec<Want>,
}

impl World {
    fn sites(&self) -> Vec<Site> {
        self.nodes
            .iter()
            .filter_map(|node| {
                let region = locate(node, &self.regions).region()?.to_owned();
                let zone = node.labels.get("zone").cloned().unwrap_or_default();
                Some(Site {
                    region,
                    zone,
                    usable: node.usable,
                })
            })
            .collect()
    }

    /// What a store may ask for: admission and `plan` refuse the rest before placement is asked.
    fn lawful(&self) -> Vec<Want> {
        let permitted = |w: &&Want| self.permissions.permits(Data::Standby, &w.region);
        self.wants.iter().filter(permitted).cloned().collect()
    }
}

fn world() -> impl Strategy<Value = World> {
    let regions = proptest::sample::subsequence(&REGIONS, 0..=4).prop_map(|names| {
        names
            .into_iter()
            .map(|name| {
                let labels = [("region".to_owned(), name.to_owned())].into();
                let nodes = NodeWitnesses {
                    labels,
                    provider_id_prefix: Some(format!("p:{name}/")),
                };
                Region::new(
                    name,
                    RegionSpec {
                        jurisdictions: vec![],
                        nodes,
                    },
                )
            })
            .collect::<Vec<_>>()
    });
    let node = (0..4usize, 0..4usize, 0..3usize, any::<bool>(), 0..8u8).prop_map(
        |(label, provider, zone, usable, lie)| {
            // One node in eight has a provider that contradicts its label.
            let provider = if lie == 0 { provider } else { label };
            NodeFacts {
                name: String::new(),
                labels: [("region", REGIONS[label]), ("zone", ZONES[zone])]
                    .map(|(k, v)| (k.to_owned(), v.to_owned()))
                    .into(),
                provider_id: Some(format!("p:{}/n", REGIONS[provider])),
                usable,
            }
        },
    );
    let permit = proptest::sample::subsequence(&REGIONS, 0..=4);
    let wants = (
        proptest::sample::subsequence(&REGIONS, 1..=4),
        proptest::collection::vec(1..4u32, 4),
    );
    (
        regions,
        proptest::collection::vec(node, 0..16),
        permit,
        wants,
    )
        .prop_map(|(regions, nodes, standby, (names, counts))| {
            let permits = vec![Permit {
                data: Data::Standby,
                regions: standby.into_iter().map(str::to_owned).collect(),
                jurisdictions: vec![],
            }];
            let policy = ResidencyPolicy::new(
                "p",
                ResidencyPolicySpec {
                    basis: Default::default(),
                    citation: None,
                    permits,
                    namespaces: None,
                    on_violation: Default::default(),
                },
            );
            let permissions = Permissions::resolve(&policy, &regions);
            let wants = names
                .into_iter()
                .zip(counts)
                .map(|(r, n)| want(r, n))
                .collect();
            World {
                regions,
                nodes,
                permissions,
                wants,
            }
        })
}

/// Whether `counts` is as even as it can be.
fn even(counts: &[usize]) -> bool {
    counts.iter().max().unwrap_or(&0) - counts.iter().min().unwrap_or(&0) <= 1
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(30_000))]

    #[test]
    fn never_outside_spread_whenever_it_can_be_and_stable(world in world(), fixed in any::<bool>()) {
        let sites = world.sites();
        let wants = world.lawful();
        let outcome = place(&wants, &sites, &[], None);

        for p in &outcome.placed {
            prop_assert!(world.permissions.permits(Data::Standby, &p.region), "outside: {:?}", p);
            prop_assert!(world.regions.iter().any(|r| r.metadata.name.as_deref() == Some(p.region.as_str())));
            prop_assert!(sites.iter().any(|s| s.usable && s.region == p.region && s.zone == p.zone), "no node: {:?}", p);
        }
        for w in &wants {
            let here: Vec<&Placed> = outcome.placed.iter().filter(|p| p.region == w.region).collect();
            let waiting = outcome.waiting.get(&w.region).copied().unwrap_or(0) as usize;
            prop_assert_eq!(here.len() + waiting, w.instances as usize);
            let zones: BTreeSet<&str> =
                sites.iter().filter(|s| s.usable && s.region == w.region).map(|s| s.zone.as_str()).collect();
            prop_assert_eq!(waiting > 0, zones.is_empty());
            let counts: Vec<usize> = zones.iter().map(|z| here.iter().filter(|p| p.zone == *z).count()).collect();
            prop_assert!(even(&counts), "not spread: {:?}", counts);
        }
        let slots: BTreeSet<u32> = outcome.placed.iter().map(|p| p.slot).collect();
        prop_assert_eq!(slots.len(), outcome.placed.len());

        // Unchanged input, unchanged placement, also from what was placed and in any order.
        let mut shuffled = sites;
        shuffled.reverse();
        prop_assert_eq!(&outcome, &place(&wants, &shuffled, &[], None));
        let mut existing = as_existing(&outcome.placed, fixed);
        existing.reverse();
        let again = place(&wants, &shuffled, &existing, outcome.placed.first().map(|p| p.slot));
        prop_assert_eq!(&outcome.placed, &again.placed);
        prop_assert!(again.surplus.is_empty());
    }

    /// Nodes come and go, the store grows and shrinks: what has a volume never moves, nothing is lost that is
    /// wanted, and nothing new is put where no node is.
    #[test]
    fn edits_never_move_a_volume(before in world(), after in world()) {
        let placed = place(&before.lawful(), &before.sites(), &[], None).placed;
        let keep = placed.first().map(|p| p.slot);
        let outcome = place(&after.lawful(), &after.sites(), &as_existing(&placed, true), keep);
        for p in &outcome.placed {
            prop_assert!(after.permissions.permits(Data::Standby, &p.region));
            match placed.iter().find(|old| old.slot == p.slot) {
                Some(old) => prop_assert_eq!(old, p),
                None => prop_assert!(after.sites().iter().any(|s| s.usable && s.region == p.region && s.zone == p.zone)),
            }
        }
        for old in &placed {
            let kept = outcome.placed.iter().any(|p| p.slot == old.slot);
            prop_assert!(kept != outcome.surplus.contains(&old.slot));
        }
        if let Some(old) = placed.first() {
            let wanted = after.lawful().iter().any(|w| w.region == old.region);
            prop_assert_eq!(wanted, outcome.placed.iter().any(|p| p.slot == old.slot));
        }
    }

    #[test]
    fn the_first_primary_is_where_a_primary_may_be(world in world(), may in proptest::sample::subsequence(&REGIONS, 0..=4)) {
        let placed = place(&world.lawful(), &world.sites(), &[], None).placed;
        match first_primary(&placed, |r| may.contains(&r)) {
            Some(slot) => {
                let region = placed.iter().find(|p| p.slot == slot).map(|p| p.region.clone()).unwrap();
                prop_assert!(may.contains(&region.as_str()));
            }
            None => prop_assert!(placed.iter().all(|p| !may.contains(&p.region.as_str()))),
        }
    }
}
