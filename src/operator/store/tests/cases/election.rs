//! An election among real instances' decisions, with a network that loses nothing and a PostgreSQL that only has an end.

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use rand::Rng;
use rand::rngs::StdRng;

use crate::failover::{
    Configuration, Durability, Durable, Effect, Era, Event, Message, Node, Rule, Timing,
};

type Name = String;

/// For so long they try: several rounds of all candidates.
const TRIES: u64 = 25;
const STEP: u64 = 50;

/// Who is promoted of `up` after `primary` has died, where only `may` may be.
pub fn hold(
    primary: &str,
    all: &BTreeSet<Name>,
    up: &BTreeSet<Name>,
    may: &BTreeSet<Name>,
    rng: &mut StdRng,
) -> BTreeSet<Name> {
    let members: BTreeSet<Name> = all.iter().filter(|n| *n != primary).cloned().collect();
    let agreed = Configuration {
        term: 1,
        version: 1,
        primary: primary.to_owned(),
        voters: all.clone(),
        witness: None,
        // So many that any majority of the rest holds all that was acknowledged.
        sync: Rule {
            acks: members.len().div_ceil(2),
            members,
        },
        durability: Durability::Required,
        may_be_primary: may.clone(),
    };
    let mut now = 10_000;
    let mut scene = Scene::default();
    for name in up {
        let durable = Durable {
            promised: 1,
            coordinator: Some(primary.to_owned()),
            configuration: Some(agreed.clone()),
            history: vec![Era {
                term: 1,
                timeline: 1,
                start: 0,
            }],
            ..Durable::default()
        };
        let mut node = Node::new(name.clone(), durable, Timing::new(600), 0, rng.random());
        let end = rng.random_range(100..103);
        let _ = node.step(0, Event::Standby { end });
        scene.nodes.insert(name.clone(), (node, end));
    }
    for name in up {
        scene.happens(name, Event::Dead(primary.to_owned()));
    }
    scene.settle(now);
    for _ in 0..TRIES {
        if !scene.promoted.is_empty() {
            break;
        }
        now += STEP;
        for name in up {
            scene.happens(name, Event::Tick);
        }
        scene.settle(now);
    }
    scene.promoted
}

#[derive(Default)]
struct Scene {
    nodes: BTreeMap<Name, (Node<Name>, u64)>,
    due: VecDeque<(Name, Event<Name>)>,
    promoted: BTreeSet<Name>,
}

impl Scene {
    fn happens(&mut self, name: &str, event: Event<Name>) {
        self.due.push_back((name.to_owned(), event));
    }

    fn settle(&mut self, now: u64) {
        while let Some((name, event)) = self.due.pop_front() {
            let Some((node, _)) = self.nodes.get_mut(&name) else {
                continue;
            };
            for effect in node.step(now, event) {
                self.act(&name, effect);
            }
        }
    }

    fn act(&mut self, name: &str, effect: Effect<Name>) {
        let end = self.nodes.get(name).map_or(0, |(_, end)| *end);
        match effect {
            Effect::Send(to, message) => self.send(name, &to, message),
            Effect::Cut => self.happens(name, Event::Cut { end: Some(end) }),
            Effect::Follow(from) => {
                let Some(theirs) = self.nodes.get(&from).map(|(_, end)| *end) else {
                    return;
                };
                let end = end.max(theirs);
                if let Some((_, mine)) = self.nodes.get_mut(name) {
                    *mine = end;
                }
                self.happens(name, Event::Received { from, end });
            }
            Effect::Enforce(rule) => self.happens(
                name,
                Event::Enforced {
                    rule,
                    position: end,
                },
            ),
            Effect::Promote => {
                self.promoted.insert(name.to_owned());
            }
            Effect::Persist(_)
            | Effect::Rebuild { .. }
            | Effect::Serve { .. }
            | Effect::StopCleanly
            | Effect::Tell(_) => {}
        }
    }

    fn send(&mut self, from: &str, to: &str, message: Message<Name>) {
        let from = from.to_owned();
        self.happens(to, Event::Message { from, message });
    }
}
