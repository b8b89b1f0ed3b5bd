//! What is checked: every order within bounds, and random walks beyond them.

use std::collections::BTreeSet;
use std::time::{Duration, Instant};

use stateright::{Checker, Model};

use super::{Failure, Left, Scenario};
use crate::failover::planted::Mistake;
use crate::failover::tests::world::Rng;
use crate::failover::{Durability, Wish};

fn scenarios(large: bool) -> Vec<(&'static str, Scenario)> {
    let left = Left {
        elections: 1,
        writes: 1,
        crashes: 0,
        wipes: 0,
        polls: 0,
        wishes: 0,
        repeats: 0,
    };
    let three = Scenario {
        copies: 3,
        witness: false,
        durability: Durability::Required,
        members: vec![1, 2],
        left,
        wish: None,
        mistake: None,
    };
    let two = Scenario {
        copies: 2,
        witness: true,
        members: vec![1],
        ..three.clone()
    };
    let more = |left: Left| {
        if large {
            Left {
                crashes: 1,
                repeats: 1,
                ..left
            }
        } else {
            left
        }
    };
    vec![
        (
            "3 voters, an election",
            Scenario {
                left: more(Left { writes: 2, ..left }),
                ..three.clone()
            },
        ),
        (
            "3 voters, two elections",
            Scenario {
                left: more(Left {
                    elections: 2,
                    ..left
                }),
                ..three.clone()
            },
        ),
        (
            "2 + witness, an election, a crash",
            Scenario {
                left: more(Left { crashes: 1, ..left }),
                ..two.clone()
            },
        ),
        (
            "2 + witness, two elections",
            Scenario {
                left: more(Left {
                    elections: 2,
                    ..left
                }),
                ..two
            },
        ),
        (
            "3 voters, Preferred, the rule shrinks in flight",
            Scenario {
                durability: Durability::Preferred,
                left: more(Left { polls: 1, ..left }),
                ..three.clone()
            },
        ),
        (
            "3 voters, one leaves",
            Scenario {
                left: more(Left {
                    polls: 1,
                    wishes: 1,
                    ..left
                }),
                wish: Some(Wish {
                    voters: BTreeSet::from([0, 1]),
                    witness: None,
                    may_be_primary: BTreeSet::from([0, 1]),
                    barred: BTreeSet::new(),
                    durability: Durability::Required,
                }),
                ..three
            },
        ),
    ]
}

fn seconds(name: &str, otherwise: u64) -> u64 {
    std::env::var(name)
        .ok()
        .and_then(|s| s.parse().ok())
        .unwrap_or(otherwise)
}

#[test]
fn every_order_of_events() {
    let large = std::env::var("DOMICILE_MODEL_LARGE").is_ok();
    let limit = Duration::from_secs(seconds(
        "DOMICILE_MODEL_SECONDS",
        if large { 600 } else { 10 },
    ));
    for (name, scenario) in scenarios(large) {
        let begin = Instant::now();
        let checker = scenario
            .checker()
            .threads(2)
            .timeout(limit)
            .spawn_bfs()
            .join();
        println!(
            "{name}: {} states, {} unique, depth {}, {:.1} s{}",
            checker.state_count(),
            checker.unique_state_count(),
            checker.max_depth(),
            begin.elapsed().as_secs_f64(),
            if checker.is_done() { "" } else { ", stopped" }
        );
        for (property, path) in checker.discoveries() {
            if property != "another primary acknowledges" {
                let actions = path.into_actions();
                panic!("{name}: {property}: {actions:#?}");
            }
        }
    }
}

/// Random walks through the same states: deeper than every order can be followed.
fn walk(scenario: &Scenario, seeds: u64, until: Instant) -> (u64, u64, Option<(u64, Failure)>) {
    let mut steps = 0;
    for seed in 0..seeds {
        let mut rng = Rng::new(seed);
        let mut state = scenario.first();
        for _ in 0..200 {
            let mut actions = Vec::new();
            scenario.actions(&state, &mut actions);
            let Some(action) = rng.pick(&actions) else {
                break;
            };
            if let Some(next) = scenario.next_state(&state, action) {
                state = next;
                steps += 1;
            }
            if let Some(failure) = state.failure {
                return (seed, steps, Some((seed, failure)));
            }
        }
        if Instant::now() > until {
            return (seed, steps, None);
        }
    }
    (seeds, steps, None)
}

fn deep(scenario: Scenario, mistake: Option<Mistake>) -> Scenario {
    let left = Left {
        elections: 3,
        writes: 3,
        crashes: 2,
        wipes: u8::from(mistake.is_none()),
        repeats: 2,
        polls: scenario.left.polls * 3,
        ..scenario.left
    };
    Scenario {
        mistake,
        left,
        ..scenario
    }
}

#[test]
fn random_walks() {
    let limit = Duration::from_secs(seconds("DOMICILE_WALK_SECONDS", 3));
    for (name, scenario) in scenarios(false) {
        let (walks, steps, failure) = walk(&deep(scenario, None), u64::MAX, Instant::now() + limit);
        println!("{name}: {walks} walks, {steps} steps");
        assert!(failure.is_none(), "{name}: {failure:?}");
    }
}

/// What the simulation is unlikely to hit, walks through every order of events do.
#[test]
fn planted_mistakes_are_found_by_walks() {
    let limit = Duration::from_secs(seconds("DOMICILE_WALK_SECONDS", 240));
    let mut missed = Vec::new();
    // With the scenario in which each shows soonest.
    for (mistake, at) in [
        (Mistake::PromotedAfterHigherVote, 4),
        (Mistake::VoteBeforeCut, 0),
        (Mistake::NotFlushed, 4),
        (Mistake::NewRuleEarly, 4),
    ] {
        let begin = Instant::now();
        let found = scenarios(false)
            .into_iter()
            .nth(at)
            .and_then(|(name, scenario)| {
                let scenario = deep(scenario, Some(mistake));
                let (_, steps, found) = walk(&scenario, u64::MAX, Instant::now() + limit);
                found.map(|(seed, failure)| {
                    format!("{name}: {failure:?}, walk {seed}, step {steps}")
                })
            });
        let took = begin.elapsed().as_secs_f64();
        println!("{mistake:?}: {found:?}, {took:.1} s");
        if found.is_none() {
            missed.push(mistake);
        }
    }
    assert!(missed.is_empty(), "{missed:?}");
}
