//! What every connector must do, whatever it erases from.
//!
//! Owns the promises of `Connector`, as tests over a [`World`]: a real server, people planted in it, and ways to break
//! it. What is there is looked at by the world itself, never by the connector. How to add a world: docs/connectors.md.

use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, Instant};

use domicile::rights::connectors::{Answer, Connector, Failure, Limits, Presence, Reason, Subject};
use domicile::rights::model::{Evidence, Identifiers};
use futures::FutureExt as _;
use futures::future::BoxFuture;

use crate::instance_bed::{logged, until};

/// Stands in every identifier of a person who is nobody's business.
pub const CANARY: &str = "canary7301994";

/// Short, so that tests of time end.
pub const LIMITS: Limits = Limits {
    connect: Duration::from_secs(5),
    answer: Duration::from_secs(6),
    lock: Duration::from_millis(800),
    halving: Duration::from_secs(10),
    standbys: Duration::from_millis(1500),
    whole: Duration::from_secs(30),
};

/// A real system that holds people's data.
pub trait World: Sized {
    /// A system of its own.
    async fn new() -> Self;
    /// A connector to it, as a worker has one.
    fn connector(&self) -> Box<dyn Connector>;
    /// Puts there everything that such a system may hold of a person.
    async fn plant(&self, person: &Identifiers);
    /// How many things of this person are there.
    async fn left(&self, person: &Identifiers) -> usize;
    /// Everything that is there, one line each.
    async fn everything(&self) -> BTreeSet<String>;
    /// How many things an erasure says that it removed.
    fn removed(evidence: &Evidence) -> u64;
    /// People whose identifiers would be dangerous if they were taken for anything but themselves.
    fn hostile() -> Vec<Identifiers>;
    /// Stops the server without ending it: it accepts connections and never answers.
    fn freeze(&self);
    /// Goes on.
    fn thaw(&self);
    /// Ends the server.
    async fn down(&mut self);
    /// Starts it again.
    async fn up(&mut self);
    /// Makes the credentials wrong.
    fn forge(&self);
    /// Makes them right again.
    fn mend(&self);
    /// Makes this one person's erasure fail.
    async fn poison(&self, person: &Identifiers);
    /// And succeed again.
    async fn cure(&self, person: &Identifiers);
    /// Takes away an object that the workflow names, and returns its name. None: the system has no such thing.
    async fn lose(&self) -> Option<String>;
    /// A connector to a copy that stopped following; nothing that is planted after it is there.
    async fn stale(&self) -> Box<dyn Connector>;
}

/// An ordinary person.
pub fn person(n: u32) -> Identifiers {
    let uuid = uuid::Uuid::from_u128(0x7301_9940_0000_4000_8000_0000_0000_0000 + u128::from(n));
    identifiers(&[
        (
            "customerId",
            &format!("{}", 7_301_994_000_u64 + u64::from(n)),
        ),
        ("email", &format!("{CANARY}-{n}@example.org")),
        ("account", &uuid.to_string()),
    ])
}

pub fn identifiers(values: &[(&str, &str)]) -> Identifiers {
    let owned: BTreeMap<String, String> = values
        .iter()
        .map(|(n, v)| ((*n).to_owned(), (*v).to_owned()))
        .collect();
    Identifiers(owned)
}

pub fn subjects(people: &[Identifiers]) -> Vec<Subject<'_>> {
    people
        .iter()
        .map(|identifiers| Subject { identifiers })
        .collect()
}

/// Erases and says of whom it succeeded.
pub async fn erase(c: &dyn Connector, people: &[Identifiers]) -> Result<Answer<Evidence>, Failure> {
    let answer = c.erase(&subjects(people)).await;
    silent(&format!("{answer:?}"), people);
    if let Ok(answers) = &answer {
        assert_eq!(answers.len(), people.len(), "one answer per person");
    }
    answer
}

pub async fn probe(
    c: &dyn Connector,
    people: &[Identifiers],
    erased: &[Evidence],
) -> Result<Answer<Presence>, Failure> {
    let answer = c.probe(&subjects(people), erased).await;
    silent(&format!("{answer:?}"), people);
    if let Ok(answers) = &answer {
        assert_eq!(answers.len(), people.len(), "one answer per person");
    }
    answer
}

/// Erases people of whom each must succeed.
pub async fn erased(c: &dyn Connector, people: &[Identifiers]) -> Vec<Evidence> {
    let answers = erase(c, people).await.expect("the batch succeeds");
    answers
        .into_iter()
        .map(|a| a.expect("each succeeds"))
        .collect()
}

pub fn is_absent(presence: &Result<Presence, Failure>) -> bool {
    matches!(presence, Ok(Presence::Absent { .. }))
}

/// Probes people, each of whom must be proven absent.
pub async fn proven(c: &dyn Connector, people: &[Identifiers], evidence: &[Evidence]) {
    let seen = probe(c, people, evidence)
        .await
        .expect("the probe succeeds");
    for (n, presence) in seen.iter().enumerate() {
        assert!(is_absent(presence), "{n}: {presence:?}");
    }
}

/// Nothing that was said, and nothing that was logged, has a value of a person.
fn silent(said: &str, people: &[Identifiers]) {
    let logged = logged();
    for value in people.iter().flat_map(|p| p.0.values()) {
        // Short ones occur by chance.
        if value.len() >= 6 {
            assert!(
                !said.contains(value.as_str()),
                "an identifier is told: {said}"
            );
            assert!(!logged.contains(value.as_str()), "an identifier is logged");
        }
    }
    assert!(!said.contains(CANARY) && !logged.contains(CANARY));
}

/// The reason of an outer failure.
fn outer<T: std::fmt::Debug>(answer: Result<Answer<T>, Failure>) -> Reason {
    answer.expect_err("the whole batch fails").reason
}

/// Half of the people are erased; of the others everything stays, to the last byte.
pub async fn a_batch_and_nobody_else<W: World>() {
    let world = W::new().await;
    let all: Vec<Identifiers> = (0..40).map(person).chain(W::hostile()).collect();
    let mut lines = BTreeMap::new();
    for one in &all {
        let before = world.everything().await;
        world.plant(one).await;
        let after = world.everything().await;
        let own: BTreeSet<String> = after.difference(&before).cloned().collect();
        assert!(!own.is_empty() && world.left(one).await > 0);
        lines.insert(one.0.clone(), own);
    }
    let everything = world.everything().await;
    let (go, stay): (Vec<_>, Vec<_>) = all.into_iter().enumerate().partition(|(n, _)| n % 2 == 0);
    let go: Vec<Identifiers> = go.into_iter().map(|(_, p)| p).collect();
    let c = world.connector();
    let evidence = erased(&*c, &go).await;
    for (one, evidence) in go.iter().zip(&evidence) {
        assert!(W::removed(evidence) > 0);
        assert_eq!(world.left(one).await, 0);
    }
    let gone: BTreeSet<String> = go.iter().flat_map(|p| lines[&p.0].clone()).collect();
    // A row whose columns are cleared stays, and is another line then.
    let left: BTreeSet<String> = world.everything().await;
    for (n, one) in &stay {
        let missing: Vec<_> = lines[&one.0].difference(&left).collect();
        assert!(missing.is_empty(), "{n} lost {missing:?}");
    }
    let kept: BTreeSet<String> = everything.difference(&gone).cloned().collect();
    assert!(kept.is_subset(&left), "somebody else lost something");
    assert!(
        left.is_disjoint(&gone),
        "something is left of who was erased"
    );
    proven(&*c, &go, &evidence).await;
    let stay: Vec<Identifiers> = stay.into_iter().map(|(_, p)| p).collect();
    let seen = probe(&*c, &stay, &[]).await.unwrap();
    assert!(
        seen.iter().all(|s| *s == Ok(Presence::StillThere)),
        "{seen:?}"
    );
}

/// Every hostile identifier by itself, beside everybody else.
pub async fn hostile_identifiers<W: World>() {
    let world = W::new().await;
    let (bystander, people) = (person(1), W::hostile());
    world.plant(&bystander).await;
    for one in &people {
        world.plant(one).await;
    }
    let c = world.connector();
    for (n, one) in people.iter().enumerate() {
        let before = world.everything().await.len();
        let own = world.left(one).await;
        assert!(own > 0, "{n}");
        let evidence = erased(&*c, std::slice::from_ref(one)).await;
        assert_eq!(world.left(one).await, 0, "{n}");
        assert!(
            before - world.everything().await.len() <= own,
            "{n} took others along"
        );
        proven(&*c, std::slice::from_ref(one), &evidence).await;
    }
    assert!(world.left(&bystander).await > 0);
}

pub async fn twice_is_as_good_as_once<W: World>() {
    let world = W::new().await;
    let people = [person(1), person(2), person(1)];
    world.plant(&people[0]).await;
    world.plant(&people[1]).await;
    let c = world.connector();
    let first = erased(&*c, &people).await;
    assert!(first.iter().map(W::removed).sum::<u64>() > 0);
    let again = erased(&*c, &people).await;
    assert!(again.iter().all(|e| W::removed(e) == 0), "{again:?}");
    proven(&*c, &people, &again).await;
    // By somebody who never heard of it, and without evidence.
    proven(&*world.connector(), &people, &[]).await;
    assert!(erased(&*c, &[]).await.is_empty());
}

pub async fn one_poisoned_person_fails_alone<W: World>() {
    let world = W::new().await;
    let people: Vec<Identifiers> = (0..30).map(person).collect();
    for one in &people {
        world.plant(one).await;
    }
    let poisoned = &people[17];
    world.poison(poisoned).await;
    let c = world.connector();
    let answers = erase(&*c, &people).await.unwrap();
    for (n, answer) in answers.iter().enumerate() {
        assert_eq!(answer.is_err(), n == 17, "{n}: {answer:?}");
        assert_eq!(world.left(&people[n]).await > 0, n == 17, "{n}");
    }
    let failure = answers[17].as_ref().unwrap_err();
    assert_eq!(failure.reason, Reason::Refused, "{failure}");
    world.cure(poisoned).await;
    let evidence = erased(&*world.connector(), std::slice::from_ref(poisoned)).await;
    assert!(W::removed(&evidence[0]) > 0);
    assert_eq!(world.left(poisoned).await, 0);
}

pub async fn a_frozen_server_costs_a_bounded_time<W: World>() {
    let world = W::new().await;
    let people = [person(1)];
    world.plant(&people[0]).await;
    // One that is connected, and one that isn't.
    let (old, new) = (world.connector(), world.connector());
    let seen = probe(&*old, &people, &[]).await.unwrap();
    assert_eq!(seen, [Ok(Presence::StillThere)]);
    world.freeze();
    let begun = Instant::now();
    let (a, b) = (&*old, &*new);
    let (erased, erased_anew, probed, probed_anew) = tokio::join!(
        erase(a, &people),
        erase(b, &people),
        probe(a, &people, &[]),
        probe(b, &people, &[]),
    );
    let took = begun.elapsed();
    for reason in [
        outer(erased),
        outer(erased_anew),
        outer(probed),
        outer(probed_anew),
    ] {
        assert!(
            matches!(reason, Reason::Timeout | Reason::Unreachable),
            "{reason}"
        );
    }
    assert!(took < (LIMITS.connect + LIMITS.answer) * 2, "{took:?}");
    world.thaw();
    for c in [a, b] {
        // What it was asked while it was frozen, it does now; who waits for that isn't frozen out for ever.
        until("it works again", async || {
            match erase(c, &people).await.map(|mut a| a.remove(0)) {
                Ok(Ok(evidence)) => {
                    let seen = probe(c, &people, &[evidence]).await;
                    seen.is_ok_and(|seen| is_absent(&seen[0]))
                }
                _ => false,
            }
        })
        .await;
    }
    assert_eq!(world.left(&people[0]).await, 0);
}

pub async fn a_server_that_is_away_comes_back<W: World>() {
    let mut world = W::new().await;
    let people = [person(1)];
    world.plant(&people[0]).await;
    let c = world.connector();
    assert_eq!(
        probe(&*c, &people, &[]).await.unwrap(),
        [Ok(Presence::StillThere)]
    );
    world.down().await;
    assert_eq!(outer(erase(&*c, &people).await), Reason::Unreachable);
    assert_eq!(outer(probe(&*c, &people, &[]).await), Reason::Unreachable);
    world.up().await;
    world.plant(&people[0]).await;
    let evidence = erased(&*c, &people).await;
    proven(&*c, &people, &evidence).await;
}

pub async fn wrong_credentials<W: World>() {
    let world = W::new().await;
    let people = [person(1)];
    world.plant(&people[0]).await;
    world.forge();
    let c = world.connector();
    for reason in [
        outer(erase(&*c, &people).await),
        outer(probe(&*c, &people, &[]).await),
    ] {
        assert_eq!(reason, Reason::Credentials);
    }
    assert!(world.left(&people[0]).await > 0);
    // Without a restart.
    world.mend();
    let evidence = erased(&*c, &people).await;
    proven(&*c, &people, &evidence).await;
}

pub async fn a_missing_object_is_no_success<W: World>() {
    let world = W::new().await;
    let people = [person(1)];
    world.plant(&people[0]).await;
    let c = world.connector();
    assert_eq!(
        probe(&*c, &people, &[]).await.unwrap(),
        [Ok(Presence::StillThere)]
    );
    let Some(name) = world.lose().await else {
        return;
    };
    let before = world.everything().await;
    for failure in [
        erase(&*c, &people).await.unwrap_err(),
        probe(&*c, &people, &[]).await.unwrap_err(),
    ] {
        assert_eq!(failure.reason, Reason::Missing);
        assert!(failure.detail.contains(&name), "{failure}");
    }
    assert_eq!(
        world.everything().await,
        before,
        "something was erased all the same"
    );
}

pub async fn who_lacks_an_identifier_isnt_erased<W: World>() {
    let world = W::new().await;
    let lacking = identifiers(&[("somethingElse", CANARY)]);
    let mut empty = person(2);
    for value in empty.0.values_mut() {
        value.clear();
    }
    let people = [person(1), lacking, empty];
    world.plant(&people[0]).await;
    let c = world.connector();
    let answers = erase(&*c, &people).await.unwrap();
    assert!(answers[0].is_ok());
    for answer in &answers[1..] {
        assert_eq!(answer.as_ref().unwrap_err().reason, Reason::Identifier);
    }
    let seen = probe(&*c, &people, &[]).await.unwrap();
    assert!(is_absent(&seen[0]));
    for presence in &seen[1..] {
        assert_eq!(presence.as_ref().unwrap_err().reason, Reason::Identifier);
    }
}

/// What a writer puts back after the erasure is found by whoever probes later.
pub async fn a_late_writer_is_caught<W: World>() {
    let world = W::new().await;
    let people = [person(1), person(2)];
    world.plant(&people[0]).await;
    let c = world.connector();
    let evidence = erased(&*c, &people).await;
    proven(&*c, &people, &evidence).await;
    world.plant(&people[0]).await;
    let seen = probe(&*c, &people, &evidence).await.unwrap();
    assert_eq!(seen[0], Ok(Presence::StillThere));
    assert!(is_absent(&seen[1]));
}

/// Says that it erased, and did nothing.
struct Liar(Box<dyn Connector>);

impl Connector for Liar {
    fn erase<'a>(
        &'a self,
        subjects: &'a [Subject<'a>],
    ) -> BoxFuture<'a, Result<Answer<Evidence>, Failure>> {
        let answer = subjects.iter().map(|_| Ok(Evidence::default())).collect();
        async { Ok(answer) }.boxed()
    }

    fn probe<'a>(
        &'a self,
        subjects: &'a [Subject<'a>],
        erased: &'a [Evidence],
    ) -> BoxFuture<'a, Result<Answer<Presence>, Failure>> {
        self.0.probe(subjects, erased)
    }

    fn residue(&self) -> Option<domicile::rights::connectors::Residue> {
        self.0.residue()
    }
}

pub async fn a_false_success_is_caught<W: World>() {
    let world = W::new().await;
    let people = [person(1)];
    world.plant(&people[0]).await;
    let liar = Liar(world.connector());
    let evidence = erased(&liar, &people).await;
    let seen = probe(&liar, &people, &evidence).await.unwrap();
    assert_eq!(seen, [Ok(Presence::StillThere)]);
    assert!(world.left(&people[0]).await > 0);
}

/// A copy that lags doesn't have the person yet, so it would call them absent.
pub async fn a_stale_copy_proves_nothing<W: World>() {
    let world = W::new().await;
    let stale = world.stale().await;
    let people = [person(1)];
    world.plant(&people[0]).await;
    let evidence = erased(&Liar(world.connector()), &people).await;
    for erased in [evidence.as_slice(), &[]] {
        match probe(&*stale, &people, erased).await {
            Err(_) => {}
            Ok(seen) => assert!(seen[0].is_err(), "a stale copy proved {seen:?}"),
        }
    }
    match erase(&*stale, &people).await {
        Err(_) => {}
        Ok(done) => assert!(done[0].is_err(), "a stale copy erased {done:?}"),
    }
    assert!(world.left(&people[0]).await > 0);
}

/// Work that is dropped half-way leaves a connector that can go on.
pub async fn dropped_work_does_no_harm<W: World>() {
    let world = W::new().await;
    let people: Vec<Identifiers> = (0..20).map(person).collect();
    for one in &people {
        world.plant(one).await;
    }
    let c = world.connector();
    let subjects = subjects(&people);
    for micros in (0..40).map(|n| n * 250) {
        let work = c.erase(&subjects);
        let _ = tokio::time::timeout(Duration::from_micros(micros), work).await;
        let work = c.probe(&subjects, &[]);
        let _ = tokio::time::timeout(Duration::from_micros(micros), work).await;
    }
    let evidence = erased(&*c, &people).await;
    proven(&*c, &people, &evidence).await;
    for one in &people {
        assert_eq!(world.left(one).await, 0);
    }
}

/// The whole suite for one world.
#[macro_export]
macro_rules! conformance {
    ($module:ident, $world:ty) => {
        mod $module {
            $crate::conformance!(@ $world:
                a_batch_and_nobody_else
                hostile_identifiers
                twice_is_as_good_as_once
                one_poisoned_person_fails_alone
                a_frozen_server_costs_a_bounded_time
                a_server_that_is_away_comes_back
                wrong_credentials
                a_missing_object_is_no_success
                who_lacks_an_identifier_isnt_erased
                a_late_writer_is_caught
                a_false_success_is_caught
                a_stale_copy_proves_nothing
                dropped_work_does_no_harm
            );
        }
    };
    (@ $world:ty: $($name:ident)*) => {
        $(
            #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
            async fn $name() {
                $crate::suite::$name::<$world>().await;
            }
        )*
    };
}
