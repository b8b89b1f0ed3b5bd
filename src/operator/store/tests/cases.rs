//! A hundred thousand random states of the cluster: what the operator decides about each, and an election among the
//! instances after it.
//!
//! What is asked of each: nothing is made where it may not be, whatever runs where it may not is said at once and told
//! to stop within the grace, nothing else is, and nobody is promoted where no primary may be. What may be where is
//! worked out here a second time, from the objects alone, and not by the code that is tried. Of a plan only those
//! parts are made that decide this; of one case in a hundred the whole, which has to come to the same.
//! `DOMICILE_SEED=n` makes one case and prints it; `DOMICILE_CASES=n` makes that many.

mod election;
mod spoil;

use std::collections::BTreeSet;

use jiff::SignedDuration;
use kube::ResourceExt;
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};

use super::super::evict::GRACE;
use super::super::leader::{self, Leader};
use super::super::lifecycle::{Farewell, populate};
use super::super::plan::decide;
use super::super::step::{Object, Step};
use super::super::{assess, verdicts};
use super::world::{World, settings};
use crate::api::conditions::{self, Verdict, reasons};
use crate::api::labels;
use crate::api::privacy_data_store::InstanceStatus;
use crate::api::residency_policy::Data;
use crate::residency::NodeFacts;

/// In so many states, at least, something is at stake.
const CASES: u64 = 100_000;

/// What was at stake in the cases, and how it came out.
#[derive(Clone, Copy, Debug, Default)]
struct Count {
    /// All.
    cases: u64,
    /// States in which something was at stake: something was made, found outside, kept from being made, or elected beside
    /// one that may not be primary; and the same world again once the grace was over, and once the primary was stopped.
    at_stake: u64,
    /// Pods and volume claims that were made.
    made: u64,
    /// Instances that the policy or the nodes kept from being made.
    withheld: u64,
    /// Pods that ran outside, and had to go.
    outside: u64,
    /// Pods that ran inside, and had to stay.
    inside: u64,
    /// Elections with somebody in them who may not be primary where it is.
    elections: u64,
    /// Of these, those that somebody won.
    promoted: u64,
    /// Of these, those that nobody may win.
    down: u64,
}

impl Count {
    fn add(&mut self, o: &Self) {
        for (mine, other) in [
            (&mut self.cases, o.cases),
            (&mut self.at_stake, o.at_stake),
            (&mut self.made, o.made),
            (&mut self.withheld, o.withheld),
            (&mut self.outside, o.outside),
            (&mut self.inside, o.inside),
            (&mut self.elections, o.elections),
            (&mut self.promoted, o.promoted),
            (&mut self.down, o.down),
        ] {
            *mine += other;
        }
    }
}

/// What the objects say, read a second time.
struct Truth<'a> {
    world: &'a World,
    leader: Option<String>,
}

impl<'a> Truth<'a> {
    fn of(world: &'a World) -> Self {
        let leader = leader::of(&world.seen.store).map(|l| l.name.to_owned());
        Self { world, leader }
    }

    /// There is something to hold the store against.
    fn judged(&self) -> bool {
        let named = self.world.seen.namespace_labels.get(labels::RESIDENCY);
        self.world.seen.policy.is_some() && (named.is_none() || self.world.seen.ceiling.is_some())
    }

    fn permits(&self, data: Data, region: &str) -> bool {
        let listed = |policy: &crate::api::ResidencyPolicy| {
            let permits = policy.spec.permits.iter().filter(|p| p.data == data);
            permits.flat_map(|p| &p.regions).any(|r| r == region)
        };
        let policy = self.world.seen.policy.as_deref();
        policy.is_some_and(listed) && self.world.seen.ceiling.as_deref().is_none_or(listed)
    }

    /// The one Region all of whose witnesses agree about this node.
    fn region(&self, node: &NodeFacts) -> Option<String> {
        let claims = self.world.seen.regions.iter().filter(|region| {
            let wanted = &region.spec.nodes;
            let provider = wanted.provider_id_prefix.as_deref();
            wanted
                .labels
                .iter()
                .all(|(k, v)| node.labels.get(k) == Some(v))
                && provider.is_none_or(|p| {
                    node.provider_id
                        .as_deref()
                        .is_some_and(|id| id.starts_with(p))
                })
        });
        let names: Vec<String> = claims.map(|r| r.name_any()).collect();
        (names.len() == 1).then(|| names.concat())
    }

    fn node(&self, name: &str) -> Option<&NodeFacts> {
        self.world.seen.nodes.iter().find(|n| n.name == name)
    }

    fn alone(&self) -> bool {
        let placement = &self.world.seen.store.spec.placement;
        placement.iter().map(|p| p.instances).sum::<i32>() < 2
    }

    /// As which kinds of data an instance may be where it is: any of them is enough.
    fn kinds(&self, instance: &str) -> &'static [Data] {
        if self.leader.as_deref() == Some(instance) {
            &[Data::Primary]
        } else if self.alone() {
            &[Data::Primary, Data::Standby]
        } else {
            &[Data::Standby]
        }
    }

    fn may_be_on(&self, node: &NodeFacts, kinds: &[Data]) -> bool {
        let region = self.region(node);
        region.is_some_and(|r| kinds.iter().any(|data| self.permits(*data, &r)))
    }

    /// Whether what runs as this instance is outside: its node, or all nodes that reach its volume. `None`: it isn't known.
    fn outside(&self, instance: &str) -> Option<bool> {
        let node = self.node(&bound_to(self.world, instance)?)?;
        let kinds = self.kinds(instance);
        if !self.may_be_on(node, kinds) {
            return Some(true);
        }
        let volume = self.world.seen.volumes.get(instance);
        let Some(only) = volume.and_then(|v| v.affinity.as_ref()) else {
            return Some(false);
        };
        // Here a volume is on one node, or on none.
        let only = only.iter().flatten().flat_map(|r| &r.values);
        let nodes: Vec<&NodeFacts> = only.filter_map(|n| self.node(n)).collect();
        Some(!nodes.is_empty() && nodes.iter().all(|n| !self.may_be_on(n, kinds)))
    }
}

fn bound_to(world: &World, instance: &str) -> Option<String> {
    let pod = world.seen.pods.iter().find(|p| p.name_any() == instance)?;
    pod.spec.as_ref()?.node_name.clone()
}

/// What the operator decides.
struct Decision {
    /// Of a plan's steps: who is to be primary, what is stopped for being outside, what is made.
    steps: Vec<Step>,
    primary: String,
    instances: Vec<InstanceStatus>,
    resident: Verdict,
    available: Verdict,
}

impl Decision {
    /// `None`: nothing is touched.
    fn of(world: &World) -> Option<Self> {
        let observed = &world.seen;
        let decided = decide(observed, world.now).ok()?;
        let leader = Leader {
            name: &decided.primary,
            term: decided.term,
        };
        let lawful = &decided.lawful;
        let mut steps: Vec<Step> = decided.first.clone().into_iter().collect();
        decided
            .outside
            .stop(observed, leader, world.now, &mut steps);
        for instance in &decided.instances {
            populate(observed, lawful, instance, leader, &settings(), &mut steps);
        }
        let instances = &decided.instances;
        let going = Farewell::of(
            observed,
            lawful,
            &decided.placement,
            instances,
            &decided.outside,
            leader,
        );
        Some(Self {
            steps,
            instances: assess::entries(observed, lawful, instances, &going),
            resident: decided.outside.verdict(lawful),
            available: verdicts::available(observed, Some(leader.name)),
            primary: decided.primary,
        })
    }

    fn words(&self) -> Vec<String> {
        self.steps.iter().filter_map(telling).collect()
    }
}

/// A step that bears on what is where, in words; who is made is made once for all of it.
fn telling(step: &Step) -> Option<String> {
    let told = matches!(step, Step::Tell { reason, .. } if *reason == reasons::FENCED);
    let made = matches!(step, Step::Create(Object::Pod | Object::Claim, _));
    let named = matches!(step, Step::RecordPrimary { .. });
    (told || made || named).then(|| step.to_string())
}

/// The whole plan comes to the same.
fn same(world: &World, decision: Option<&Decision>) {
    let plan = world.plan();
    let mut whole: Vec<String> = plan.steps.iter().filter_map(telling).collect();
    let mut part = decision.map(Decision::words).unwrap_or_default();
    whole.sort();
    part.sort();
    assert_eq!(whole, part);
    if let Some(decision) = decision {
        assert_eq!(plan.draft.instances, decision.instances);
        assert!(plan.draft.verdicts.contains(&decision.resident));
    }
}

/// The nodes to which the scheduler could bind a pod.
fn attracted<'a>(pod: &serde_json::Value, nodes: &'a [NodeFacts]) -> Vec<&'a NodeFacts> {
    let affinity = &pod["spec"]["affinity"]["nodeAffinity"];
    let required = &affinity["requiredDuringSchedulingIgnoredDuringExecution"];
    let terms = required["nodeSelectorTerms"].as_array().unwrap();
    assert!(!terms.is_empty(), "bound anywhere");
    let meets = |node: &&NodeFacts| {
        terms.iter().any(|term| {
            let all = term["matchExpressions"].as_array().unwrap();
            assert!(!all.is_empty(), "bound anywhere");
            all.iter().all(|e| {
                assert_eq!(e["operator"], "In");
                let value = node.labels.get(e["key"].as_str().unwrap());
                let listed = e["values"].as_array().unwrap();
                value.is_some_and(|v| listed.iter().any(|l| l == v))
            })
        })
    };
    nodes.iter().filter(meets).collect()
}

/// Nothing is made outside, and nothing that the scheduler could bind outside.
fn placed(world: &World, decision: &Decision, count: &mut Count) {
    let truth = Truth::of(world);
    let mut made = 0;
    for step in &decision.steps {
        let Step::Create(object @ (Object::Pod | Object::Claim), value) = step else {
            continue;
        };
        let region = value["metadata"]["labels"][labels::REGION]
            .as_str()
            .unwrap();
        let name = value["metadata"]["name"].as_str().unwrap();
        let data = if name == decision.primary || truth.alone() {
            Data::Primary
        } else {
            Data::Standby
        };
        assert!(truth.permits(data, region), "{step}: {data} in {region}");
        count.made += 1;
        if *object == Object::Pod {
            made += 1;
            for node in attracted(value, &world.seen.nodes) {
                assert_eq!(
                    truth.region(node).as_deref(),
                    Some(region),
                    "{step}: {node:?}"
                );
            }
        }
    }
    let placement = &world.seen.store.spec.placement;
    let wanted: i32 = placement.iter().map(|p| p.instances).sum();
    let there = world.seen.pods.len() + made;
    count.withheld += u64::from(usize::try_from(wanted).unwrap() > there);
}

/// Said in this pass, stopped within the grace, and nothing else is.
fn kept(world: &mut World, decision: &Decision, count: &mut Count) {
    let truth = Truth::of(world);
    let names: Vec<String> = world.seen.pods.iter().map(ResourceExt::name_any).collect();
    let known = names
        .iter()
        .filter_map(|n| Some((n.clone(), truth.outside(n)?)));
    let (outside, inside): (Vec<_>, Vec<_>) = known.partition(|(_, out)| *out);
    let outside: BTreeSet<String> = outside.into_iter().map(|(n, _)| n).collect();
    let stopped = |decision: &Decision| -> BTreeSet<String> {
        let told = decision.steps.iter().filter_map(|s| match s {
            Step::Tell {
                reason: reasons::FENCED,
                note,
                ..
            } => note.split(' ').next(),
            _ => None,
        });
        told.map(str::to_owned).collect()
    };
    let at_once = stopped(decision);
    assert!(at_once.is_subset(&outside), "{at_once:?} {outside:?}");
    if truth.leader.is_none() || outside.is_empty() {
        count.inside += u64::from(!inside.is_empty());
        return;
    }
    count.outside += 1;
    // One pass is enough to say so.
    let message = decision.resident.message.clone();
    assert_eq!(decision.resident.status, Some(false), "{message}");
    for name in &outside {
        assert!(message.contains(name), "{name} isn't in: {message}");
    }
    let leader = truth.leader.clone();
    let (entries, verdicts) = (decision.instances.clone(), [decision.resident.clone()]);
    let now = world.now;
    world.store(|s| {
        let generation = s.metadata.generation;
        let status = s.status.get_or_insert_default();
        status.conditions = conditions::merge(&status.conditions, &verdicts, generation, now);
        for entry in entries {
            for mine in status.instances.iter_mut().filter(|i| i.name == entry.name) {
                mine.leaving = entry.leaving;
                mine.may_be_primary = entry.may_be_primary;
            }
        }
    });
    world.seen.pods.retain(|p| !at_once.contains(&p.name_any()));
    world.now += GRACE + SignedDuration::from_millis(1);
    let late = Decision::of(world).unwrap();
    count.at_stake += 1;
    let mut stopped = stopped(&late);
    stopped.extend(at_once);
    assert_eq!(stopped, outside, "{message}");
    // Without one that may be primary it is down, and says so with the first pass that finds nobody.
    if leader.is_some_and(|l| stopped.contains(&l)) {
        world.seen.pods.retain(|p| !stopped.contains(&p.name_any()));
        let down = Decision::of(world).unwrap();
        count.at_stake += 1;
        assert_eq!(down.available.status, Some(false), "{:?}", down.available);
    }
}

/// Nobody is promoted where no primary may be, once the operator's pass has been heard.
fn promoted(world: &World, decision: &Decision, rng: &mut StdRng, count: &mut Count) {
    let truth = Truth::of(world);
    let runs = |name: &str| bound_to(world, name).is_some();
    let lawful = |name: &str| {
        let node = bound_to(world, name).and_then(|n| truth.node(&n).cloned());
        node.is_some_and(|n| truth.may_be_on(&n, &[Data::Primary]))
    };
    let entries = decision.instances.iter();
    let voters: Vec<&InstanceStatus> = entries.filter(|i| i.leaving != Some(true)).collect();
    let may = voters.iter().filter(|i| i.may_be_primary == Some(true));
    let may: BTreeSet<String> = may.map(|i| i.name.clone()).collect();
    for name in may.iter().filter(|n| runs(n)) {
        assert!(lawful(name), "{name} may be primary");
    }
    let primary = &decision.primary;
    let all: BTreeSet<String> = voters
        .iter()
        .map(|i| &i.name)
        .chain([primary])
        .cloned()
        .collect();
    let up = all.iter().filter(|n| *n != primary && runs(n));
    let up: BTreeSet<String> = up.cloned().collect();
    // Only where it matters who wins, and where somebody can.
    if up.len() * 2 <= all.len() || up.is_subset(&may) {
        return;
    }
    count.elections += 1;
    let won = election::hold(primary, &all, &up, &may, rng);
    for name in &won {
        assert!(lawful(name), "{name} is promoted outside, of {up:?}");
    }
    assert_eq!(
        won.len(),
        usize::from(!up.is_disjoint(&may)),
        "{up:?} {may:?}"
    );
    count.promoted += won.len() as u64;
    count.down += u64::from(won.is_empty());
}

/// One case, from its seed.
fn case(scenes: &[World], seed: u64, trace: bool) -> Count {
    let mut rng = StdRng::seed_from_u64(seed);
    let mut world = spoil::scene(scenes, &mut rng).clone();
    for _ in 0..rng.random_range(1..=4) {
        let did = spoil::spoil(&mut world, &mut rng);
        if trace {
            println!("{did}");
        }
    }
    let mut count = Count {
        cases: 1,
        ..Count::default()
    };
    let decision = Decision::of(&world);
    if seed.is_multiple_of(100) {
        same(&world, decision.as_ref());
    }
    let Some(decision) = decision else {
        // Not judged, or nowhere to begin: nothing is touched.
        count.withheld += 1;
        count.at_stake += 1;
        return count;
    };
    assert!(Truth::of(&world).judged(), "acted upon without a policy");
    if trace {
        println!(
            "{:#?}\n{:#?}\n{:?}",
            decision.words(),
            decision.instances,
            decision.resident
        );
    }
    placed(&world, &decision, &mut count);
    promoted(&world, &decision, &mut rng, &mut count);
    kept(&mut world, &decision, &mut count);
    count.at_stake += u64::from(count.made + count.withheld + count.outside + count.elections > 0);
    count
}

fn number(name: &str) -> Option<u64> {
    std::env::var(name).ok()?.parse().ok()
}

#[test]
fn nothing_is_placed_kept_or_promoted_outside() {
    let scenes = spoil::scenes();
    if let Some(seed) = number("DOMICILE_SEED") {
        println!("{:?}", case(&scenes, seed, true));
        return;
    }
    let wanted = number("DOMICILE_CASES").unwrap_or(CASES);
    let next = std::sync::atomic::AtomicU64::new(0);
    let total = std::sync::Mutex::new(Count::default());
    let begin = std::time::Instant::now();
    std::thread::scope(|scope| {
        for _ in 0..std::thread::available_parallelism().map_or(2, usize::from) {
            scope.spawn(|| {
                loop {
                    let mut some = Count::default();
                    for _ in 0..100 {
                        let seed = next.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
                        let tried = std::panic::catch_unwind(|| case(&scenes, seed, false));
                        some.add(
                            &tried.unwrap_or_else(|_| panic!("replay with DOMICILE_SEED={seed}")),
                        );
                    }
                    let mut total = total.lock().unwrap();
                    total.add(&some);
                    if total.at_stake >= wanted {
                        return;
                    }
                }
            });
        }
    });
    let total = total.into_inner().unwrap();
    println!("{total:?} in {:.1} s", begin.elapsed().as_secs_f64());
    assert!(total.at_stake >= wanted);
    // None of the questions was only asked where the answer is plain.
    for (what, number) in [
        ("made", total.made),
        ("withheld", total.withheld),
        ("outside", total.outside),
        ("inside", total.inside),
        ("elections", total.elections),
        ("promoted", total.promoted),
        ("down", total.down),
    ] {
        assert!(
            number >= wanted / 100,
            "{what}: only {number} of {}",
            total.cases
        );
    }
}
