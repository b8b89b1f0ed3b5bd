//! Stores that are as they should be, and what may become of the world around them.

use std::sync::Arc;

use k8s_openapi::api::core::v1::PodSpec;
use kube::ResourceExt;
use rand::Rng;
use rand::rngs::StdRng;
use rand::seq::IndexedRandom;

use super::super::world::{World, on_node, policy, region, store};
use crate::api::labels;
use crate::api::privacy_data_store::InstanceRole;
use crate::api::residency_policy::OnViolation;
use crate::residency::locate;

const REGIONS: [&str; 3] = ["us-west", "us-east", "eu-central"];
const VALUES: [&str; 4] = ["us-west", "us-east", "eu-central", "nowhere"];

/// Stores of several shapes that have come to rest, and one that was only just asked for.
pub fn scenes() -> Vec<World> {
    let shapes: [&[(&str, i32)]; 5] = [
        &[("us-west", 2), ("us-east", 1)],
        &[("us-west", 1)],
        &[("us-west", 1), ("us-east", 1), ("eu-central", 1)],
        &[("us-west", 3), ("us-east", 2)],
        &[("us-west", 1), ("us-east", 1)],
    ];
    let mut all = Vec::new();
    for shape in shapes {
        for (local, provider) in [(true, false), (false, true)] {
            let mut world = World::new(shape);
            world.local = local;
            let everywhere = policy(&REGIONS, &REGIONS);
            world.seen.policy = Some(everywhere);
            if provider {
                providers(&mut world);
            }
            world.settle();
            all.push(world);
        }
    }
    all.push(World::new(&[("us-west", 2), ("us-east", 1)]));
    for world in &mut all {
        lighten(world);
    }
    all
}

/// Takes away what bears on nothing here and would be copied a hundred thousand times.
fn lighten(world: &mut World) {
    for pod in &mut world.seen.pods {
        let spec = pod.spec.take().unwrap_or_default();
        pod.spec = Some(PodSpec {
            node_name: spec.node_name,
            ..PodSpec::default()
        });
    }
    world.seen.children.clear();
    world.seen.secrets.clear();
    world.seen.certificates.clear();
}

/// One of them; seldom the last, of which everything is still to be made: that takes longest.
pub fn scene<'a>(scenes: &'a [World], rng: &mut StdRng) -> &'a World {
    let last = scenes.len() - 1;
    let settled = rng.random_range(0..last);
    &scenes[if rng.random_ratio(1, 40) {
        last
    } else {
        settled
    }]
}

/// Regions that also go by what made the node.
fn providers(world: &mut World) {
    for region in &mut world.seen.regions {
        let mut new = (**region).clone();
        new.spec.nodes.provider_id_prefix = Some(format!("cloud://{}/", region.name_any()));
        *region = Arc::new(new);
    }
    for node in &mut world.seen.nodes {
        let region = node.labels[labels::NODE_TOPOLOGY_REGION].clone();
        node.provider_id = Some(format!("cloud://{region}/{}", node.name));
    }
}

/// The stamps follow, as the operator's other controller has it.
fn stamp(world: &mut World) {
    for node in &mut world.seen.nodes {
        let found = locate(node, world.seen.regions.iter().map(AsRef::as_ref));
        match found.region().map(str::to_owned) {
            Some(region) => node.labels.insert(labels::NODE_REGION.into(), region),
            None => node.labels.remove(labels::NODE_REGION),
        };
    }
}

fn some<'a>(rng: &mut StdRng, of: &[&'a str]) -> Vec<&'a str> {
    of.iter()
        .copied()
        .filter(|_| rng.random_ratio(3, 5))
        .collect()
}

/// Something happens; in words.
pub fn spoil(world: &mut World, rng: &mut StdRng) -> String {
    let at = rng.random_range(0..world.seen.nodes.len().max(1));
    let to = *VALUES.choose(rng).unwrap();
    let pod = world.seen.pods.choose(rng).map(ResourceExt::name_any);
    let node_name = world.seen.nodes.get(at).map(|n| n.name.clone());
    match (rng.random_range(0..20), node_name, pod) {
        // Labels: missing, another, with the stamp following or late; stamps forged or taken off; providers that disagree.
        (0..=3, Some(name), _) => {
            let missing = rng.random_ratio(1, 4);
            let labels = &mut world.seen.nodes[at].labels;
            if missing {
                labels.remove(labels::NODE_TOPOLOGY_REGION);
            } else {
                labels.insert(labels::NODE_TOPOLOGY_REGION.into(), to.into());
            }
            let late = rng.random_ratio(1, 2);
            if !late {
                stamp(world);
            }
            format!("{name} says {to} (missing: {missing}, stamp late: {late})")
        }
        (4, Some(name), _) => {
            let labels = &mut world.seen.nodes[at].labels;
            labels.insert(labels::NODE_REGION.into(), to.into());
            format!("the stamp of {name} is forged: {to}")
        }
        (5, Some(name), _) => {
            world.seen.nodes[at].labels.remove(labels::NODE_REGION);
            format!("the stamp of {name} is gone")
        }
        (6, Some(name), _) => {
            world.seen.nodes[at].provider_id = Some(format!("cloud://{to}/{name}"));
            stamp(world);
            format!("{name} was made in {to}")
        }
        (7, Some(name), _) => {
            let taken = rng.random_ratio(1, 3);
            if taken {
                world.seen.nodes.remove(at);
            } else {
                world.seen.nodes[at].usable = false;
            }
            format!("{name} is gone or closed ({taken})")
        }
        (8..=10, ..) => {
            let (primary, standby) = (some(rng, &REGIONS), some(rng, &REGIONS));
            let mut new = (*policy(&primary, &standby)).clone();
            if rng.random_ratio(1, 2) {
                new.spec.on_violation = OnViolation::FenceAndErase;
            }
            world.seen.policy = Some(Arc::new(new));
            format!("the policy permits {primary:?}, {standby:?}")
        }
        (11, ..) if rng.random_ratio(1, 4) => {
            world.seen.policy = None;
            "the policy is deleted".to_owned()
        }
        (11 | 12, ..) => {
            let permitted = some(rng, &REGIONS);
            let mut ceiling = (*policy(&permitted, &permitted)).clone();
            ceiling.metadata.name = Some("ceiling".into());
            let label = (labels::RESIDENCY.to_owned(), "ceiling".to_owned());
            world.seen.namespace_labels.extend([label]);
            world.seen.ceiling = Some(Arc::new(ceiling));
            format!("the namespace stays within {permitted:?}")
        }
        (13, ..) => {
            let of = *REGIONS.choose(rng).unwrap();
            let mut twin = (*region(of)).clone();
            twin.metadata.name = Some("twin".into());
            world.seen.regions.retain(|r| r.name_any() != "twin");
            world.seen.regions.push(Arc::new(twin));
            if rng.random_ratio(1, 2) {
                stamp(world);
            }
            format!("another Region claims what {of} claims")
        }
        (14, ..) => {
            let of = *REGIONS.choose(rng).unwrap();
            world.seen.regions.retain(|r| r.name_any() != of);
            stamp(world);
            format!("Region {of} is deleted")
        }
        (15, ..) => {
            let mut placement: Vec<(&str, i32)> = Vec::new();
            for name in some(rng, &REGIONS) {
                placement.push((name, rng.random_range(1..3)));
            }
            if placement.is_empty() {
                placement.push(("us-west", 2));
            }
            let spec = store(&placement).spec;
            world.store(|s| s.spec = spec);
            format!("asked for: {placement:?}")
        }
        (16, Some(node), Some(name)) => {
            let pods = world.seen.pods.iter_mut();
            for pod in pods.filter(|p| p.name_any() == name) {
                pod.spec.as_mut().unwrap().node_name = Some(node.clone());
            }
            if world.local {
                world.seen.volumes.insert(name.clone(), on_node(&node));
            }
            format!("{name} was bound to {node} by hand")
        }
        (17, Some(node), Some(name)) => {
            world.seen.volumes.insert(name.clone(), on_node(&node));
            format!("the volume of {name} is on {node}")
        }
        (18, _, Some(name)) => {
            world.seen.pods.retain(|p| p.name_any() != name);
            format!("the pod {name} is killed")
        }
        (_, _, Some(name)) => {
            // Somebody was elected meanwhile, and nobody has looked since.
            world.store(|s| {
                let Some(status) = s.status.as_mut() else {
                    return;
                };
                let term = status.term.unwrap_or(1) + 1;
                for entry in status.instances.iter_mut().filter(|i| i.name == name) {
                    entry.role = Some(InstanceRole::Primary);
                    entry.term = Some(term);
                }
            });
            format!("{name} says that it is primary")
        }
        _ => "nothing".to_owned(),
    }
}
