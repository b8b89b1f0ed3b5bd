//! A batch against a connector that does what it is told to.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Mutex;

use futures::FutureExt as _;
use futures::future::BoxFuture;

use super::*;
use crate::rights::config::{System, Target};
use crate::rights::connectors::Residue;
use crate::rights::worker::clock::Moment;
use crate::rights::worker::metrics::Metrics;

/// A system of people, and everything that can be wrong with it.
#[derive(Default)]
struct Fake {
    there: Mutex<BTreeSet<String>>,
    /// Comes back so many times after it was erased.
    refilled: Mutex<BTreeMap<String, u32>>,
    /// Makes every call fail that it is in.
    poison: BTreeSet<String>,
    /// Fails by itself, beside others that don't.
    locked: BTreeSet<String>,
    /// Lacks an identifier.
    nameless: BTreeSet<String>,
    /// Says nothing ever again.
    hangs: bool,
    /// Says that it erased, and didn't.
    lies: bool,
    /// Answers for one less than it was asked about.
    short: bool,
    /// Was started again since those who settle were erased.
    restarted: bool,
    erased: Mutex<Vec<Vec<String>>>,
    probed: Mutex<Vec<Vec<String>>>,
}

fn id<'a>(subject: &Subject<'a>) -> &'a str {
    &subject.identifiers.0["id"]
}

fn ids(subjects: &[Subject<'_>]) -> Vec<String> {
    subjects.iter().map(|s| id(s).to_owned()).collect()
}

impl Fake {
    fn of(people: &[&str]) -> Self {
        Self {
            there: Mutex::new(people.iter().map(|p| (*p).to_owned()).collect()),
            ..Self::default()
        }
    }

    fn trouble(&self, subjects: &[Subject<'_>]) -> Result<(), Failure> {
        if subjects.iter().any(|s| self.poison.contains(id(s))) {
            return Err(Failure::new(Reason::Timeout, "too much"));
        }
        Ok(())
    }
}

impl Connector for Fake {
    fn erase<'a>(
        &'a self,
        subjects: &'a [Subject<'a>],
    ) -> BoxFuture<'a, Result<Answer<Evidence>, Failure>> {
        async move {
            if self.hangs {
                std::future::pending::<()>().await;
            }
            self.erased.lock().unwrap().push(ids(subjects));
            self.trouble(subjects)?;
            let mut answer: Answer<Evidence> = subjects
                .iter()
                .map(|subject| {
                    if self.locked.contains(id(subject)) {
                        return Err(Failure::new(Reason::Locked, "somebody has it"));
                    }
                    if self.nameless.contains(id(subject)) {
                        return Err(Failure::new(Reason::Identifier, "who?"));
                    }
                    let mut refilled = self.refilled.lock().unwrap();
                    match refilled.get_mut(id(subject)).filter(|n| **n > 0) {
                        Some(n) => *n -= 1,
                        None if self.lies => {}
                        None => {
                            self.there.lock().unwrap().remove(id(subject));
                        }
                    }
                    Ok(Evidence::default())
                })
                .collect();
            if self.short {
                answer.pop();
            }
            Ok(answer)
        }
        .boxed()
    }

    fn probe<'a>(
        &'a self,
        subjects: &'a [Subject<'a>],
        erased: &'a [Evidence],
    ) -> BoxFuture<'a, Result<Answer<Presence>, Failure>> {
        async move {
            assert_eq!(subjects.len(), erased.len());
            self.probed.lock().unwrap().push(ids(subjects));
            if self.restarted && self.erased.lock().unwrap().is_empty() {
                return Err(Failure::new(Reason::Protocol, "another process"));
            }
            let there = self.there.lock().unwrap();
            let presence = |subject| {
                Ok(if there.contains(id(subject)) {
                    Presence::StillThere
                } else {
                    Presence::Absent {
                        evidence: Evidence::default(),
                        bounded: None,
                    }
                })
            };
            Ok(subjects.iter().map(presence).collect())
        }
        .boxed()
    }

    fn residue(&self) -> Option<Residue> {
        None
    }
}

fn person(id: &str) -> Person {
    Person {
        identifiers: Identifiers(BTreeMap::from([("id".to_owned(), id.to_owned())])),
        settling: false,
        before: Evidence::default(),
        failures: 0,
    }
}

fn settling(id: &str) -> Person {
    Person {
        settling: true,
        ..person(id)
    }
}

struct Run {
    carried: Carried,
    resurrections: usize,
}

async fn run_under(lease: &Lease, fake: &Fake, people: &[Person], worked: bool) -> Run {
    let metrics = Metrics::default();
    let target = Target {
        name: "t".to_owned(),
        regions: vec!["r".to_owned()],
        settle_seconds: 0,
        residue_days: None,
        system: System::Redis { keys: Vec::new() },
    };
    let stop = CancellationToken::new();
    let of_target = metrics.of(&target, "r");
    let carried = carry(fake, lease, &stop, people, worked, of_target).await;
    let text = metrics.text();
    let resurrections = text
        .lines()
        .find_map(|l| l.strip_prefix("rights_resurrections_total{sink=\"t\"} "))
        .map_or(0, |n| n.parse().unwrap());
    Run {
        carried,
        resurrections,
    }
}

async fn run(fake: &Fake, people: &[Person]) -> Run {
    run_under(&Lease::new(Moment::now()), fake, people, true).await
}

fn gone(seen: &Seen) -> bool {
    matches!(seen, Seen::Gone { .. })
}

#[tokio::test]
async fn everybody_is_erased_and_read_back_in_one_call_each() {
    let fake = Fake::of(&["a", "b", "c"]);
    let run = run(&fake, &[person("a"), person("b"), person("c")]).await;
    assert!(run.carried.seen.iter().all(gone));
    assert_eq!(run.carried.finding, Some(Finding::Works));
    let all = vec![vec!["a".to_owned(), "b".to_owned(), "c".to_owned()]];
    assert_eq!(*fake.erased.lock().unwrap(), all);
    assert_eq!(*fake.probed.lock().unwrap(), all);
}

#[tokio::test]
async fn what_is_there_after_it_was_erased_is_erased_again() {
    let fake = Fake::of(&["a", "b"]);
    fake.refilled.lock().unwrap().insert("a".to_owned(), 1);
    let run = run(&fake, &[person("a"), person("b")]).await;
    assert!(run.carried.seen.iter().all(gone));
    assert_eq!(run.resurrections, 1);
}

#[tokio::test]
async fn what_comes_back_twice_is_a_failure_of_that_person_alone() {
    let fake = Fake::of(&["a", "b"]);
    fake.refilled.lock().unwrap().insert("a".to_owned(), 2);
    let run = run(&fake, &[person("a"), person("b")]).await;
    assert_eq!(run.carried.seen[0], Seen::Failed(Reason::StillThere));
    assert!(gone(&run.carried.seen[1]));
    assert_eq!(run.carried.finding, Some(Finding::Works));
    assert_eq!(run.resurrections, 2);
}

#[tokio::test]
async fn a_connector_that_says_yes_and_does_nothing_ends_no_step() {
    let mut fake = Fake::of(&["a"]);
    fake.lies = true;
    let run = run(&fake, &[person("a")]).await;
    assert_eq!(run.carried.seen, [Seen::Failed(Reason::StillThere)]);
    assert_ne!(run.carried.finding, Some(Finding::Works));
}

#[tokio::test]
async fn who_settles_is_read_only_and_erased_again_only_if_there() {
    let fake = Fake::of(&["b"]);
    let run = run(&fake, &[settling("a"), settling("b")]).await;
    let [
        Seen::Gone { erased: none, .. },
        Seen::Gone { erased: some, .. },
    ] = &run.carried.seen[..]
    else {
        panic!("{:?}", run.carried.seen);
    };
    assert!(none.is_none() && some.is_some());
    assert_eq!(run.resurrections, 1);
    assert_eq!(*fake.erased.lock().unwrap(), [["b".to_owned()]]);
}

/// To be asked for a proof of what another server process was told, it would say the same for ever.
#[tokio::test]
async fn who_settles_is_erased_again_from_a_server_that_was_started_again() {
    let mut fake = Fake::of(&["b"]);
    fake.restarted = true;
    let run = run(&fake, &[settling("a"), settling("b")]).await;
    for seen in &run.carried.seen {
        assert!(
            matches!(
                seen,
                Seen::Gone {
                    erased: Some(_),
                    ..
                }
            ),
            "{:?}",
            run.carried.seen
        );
    }
    assert_eq!(run.resurrections, 0);
    let both = ["a".to_owned(), "b".to_owned()];
    assert_eq!(*fake.erased.lock().unwrap(), [both]);
}

#[tokio::test]
async fn a_poison_holds_up_nobody() {
    let names: Vec<String> = (0..50).map(|n| n.to_string()).collect();
    let mut fake = Fake::of(&names.iter().map(String::as_str).collect::<Vec<_>>());
    fake.poison.insert("17".to_owned());
    fake.locked.insert("18".to_owned());
    let people: Vec<Person> = names.iter().map(|n| person(n)).collect();
    let run = run(&fake, &people).await;
    for (name, seen) in names.iter().zip(&run.carried.seen) {
        match name.as_str() {
            "17" => assert_eq!(*seen, Seen::Failed(Reason::Timeout)),
            "18" => assert_eq!(*seen, Seen::Failed(Reason::Locked)),
            _ => assert!(gone(seen), "{name}: {seen:?}"),
        }
    }
    assert_eq!(run.carried.finding, Some(Finding::Works));
    assert!(run.carried.split);
}

/// A locked table, of which a connector says that every row is: it is the target, and nobody's count goes up for ever.
#[tokio::test]
async fn where_each_fails_by_itself_the_target_does() {
    let mut fake = Fake::of(&["a", "b", "c"]);
    fake.locked = ["a", "b"].map(str::to_owned).into();
    fake.nameless = ["c".to_owned()].into();
    let people = ["a", "b", "c"].map(person);
    for (worked, expected) in [
        (true, Seen::Failed(Reason::Locked)),
        (false, Seen::Tried(Reason::Locked)),
    ] {
        let run = run_under(&Lease::new(Moment::now()), &fake, &people, worked).await;
        assert_eq!(run.carried.finding, Some(Finding::Fails));
        assert_eq!(run.carried.seen[..2], [expected.clone(), expected]);
        assert_eq!(
            run.carried.seen[2],
            Seen::Failed(Reason::Identifier),
            "the request's own"
        );
    }
}

#[tokio::test]
async fn a_request_without_an_identifier_says_nothing_of_the_target() {
    let mut fake = Fake::of(&["a"]);
    fake.nameless = ["a".to_owned()].into();
    let run = run(&fake, &[person("a")]).await;
    assert_eq!(run.carried.seen, [Seen::Failed(Reason::Identifier)]);
    assert_eq!(run.carried.finding, Some(Finding::Unknown));
}

#[tokio::test]
async fn who_failed_before_is_called_apart() {
    let fake = Fake::of(&["a", "b", "c"]);
    let mut suspect = person("b");
    suspect.failures = 1;
    run(&fake, &[person("a"), suspect, person("c")]).await;
    assert_eq!(
        *fake.erased.lock().unwrap(),
        [vec!["a".to_owned(), "c".to_owned()], vec!["b".to_owned()]]
    );
}

#[tokio::test]
async fn fewer_answers_than_people_are_no_answer() {
    let mut fake = Fake::of(&["a", "b"]);
    fake.short = true;
    let run = run(&fake, &[person("a"), person("b")]).await;
    assert_eq!(run.carried.seen, [Seen::Untouched, Seen::Untouched]);
    assert_eq!(run.carried.finding, Some(Finding::Fails));
    let reason = run.carried.failure.map(|f| f.reason);
    assert_eq!(reason, Some(Reason::Protocol));
}

#[tokio::test]
async fn nothing_is_called_under_a_lease_that_is_over() {
    let fake = Fake::of(&["a"]);
    let long_ago = Moment(Moment::now().0.saturating_sub(60_000));
    let run = run_under(&Lease::new(long_ago), &fake, &[person("a")], true).await;
    assert!(run.carried.lost);
    assert_eq!(run.carried.finding, None);
    assert!(fake.erased.lock().unwrap().is_empty());
    assert_eq!(run.carried.seen, [Seen::Untouched]);
}

#[tokio::test]
async fn a_target_that_hangs_is_left_when_the_lease_ends() {
    let mut fake = Fake::of(&["a"]);
    fake.hangs = true;
    let lease = Lease::new(Moment::now());
    lease.renewed(Moment::now());
    let people = [person("a")];
    let (run, ()) = tokio::join!(run_under(&lease, &fake, &people, true), async {
        tokio::task::yield_now().await;
        lease.give_up();
    });
    assert!(run.carried.lost);
    assert_eq!(run.carried.seen, [Seen::Untouched]);
}

#[tokio::test]
async fn one_that_fails_alone_counts_only_while_the_target_works() {
    let mut fake = Fake::of(&["a"]);
    fake.poison.insert("a".to_owned());
    let lease = Lease::new(Moment::now());
    let run = run_under(&lease, &fake, &[person("a")], false).await;
    assert_eq!(run.carried.seen, [Seen::Tried(Reason::Timeout)]);
    let run = run_under(&lease, &fake, &[person("a")], true).await;
    assert_eq!(run.carried.seen, [Seen::Failed(Reason::Timeout)]);
    assert_eq!(run.carried.finding, Some(Finding::Fails));
}
