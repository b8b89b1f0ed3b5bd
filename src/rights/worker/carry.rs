//! Carrying a batch out: erased, and read back.
//!
//! Owns the calls to a connector for the steps of one claim. Never: begins a call when the lease has ended or the worker
//! is to stop; takes an answer that isn't there for a good one; knows the ledger.

use std::time::Duration;

use tokio_util::sync::CancellationToken;
use tracing::{debug, warn};

use super::breaker::Fault;
use super::lease::{Ended, Lease, while_held};
use super::metrics::OfTarget;
use super::split::{Fate, Finding, Scope, Split};
use super::verdict::{Seen, last_erasure, scope};
use crate::rights::connectors::{Answer, Connector, Failure, Presence, Reason, Subject};
use crate::rights::model::{Evidence, Identifiers};

/// A connector bounds itself; one that doesn't is left after this, and its target counts as away.
const CALL: Duration = Duration::from_secs(600);

/// One person's step.
#[derive(Clone, Debug)]
pub struct Person {
    /// Who.
    pub identifiers: Identifiers,
    /// It is probed first, and erased only if it is there again.
    pub settling: bool,
    /// What earlier claims left as evidence.
    pub before: Evidence,
    /// How often it failed before.
    pub failures: u32,
}

/// What came of it.
#[derive(Debug)]
pub struct Carried {
    /// Per person, in the order given.
    pub seen: Vec<Seen>,
    /// What it says about the target; none: the batch was stopped before it said anything.
    pub finding: Option<Finding>,
    /// The last failure of a call as a whole.
    pub failure: Option<Failure>,
    /// A call failed as a whole.
    pub split: bool,
    /// The lease ended in the middle.
    pub lost: bool,
}

impl Carried {
    /// What a breaker is told of the failure.
    #[must_use]
    pub fn fault(&self) -> Fault {
        match &self.failure {
            Some(failure) if failure.reason == Reason::Credentials => Fault::Credentials,
            _ => Fault::Other,
        }
    }
}

/// Carries a batch out. `worked`: the target did when it was last tried.
pub async fn carry(
    connector: &dyn Connector,
    lease: &Lease,
    stop: &CancellationToken,
    people: &[Person],
    worked: bool,
    metrics: OfTarget<'_>,
) -> Carried {
    // Whoever failed before comes last, and apart.
    let (mut order, suspects): (Vec<usize>, Vec<usize>) = people
        .iter()
        .enumerate()
        .map(|(i, _)| i)
        .partition(|i| people.get(*i).is_some_and(|p| p.failures == 0));
    let clean = order.len();
    order.extend(suspects);

    let mut batch = Batch {
        connector,
        lease,
        people,
        metrics,
        seen: vec![None; people.len()],
        reasons: vec![None; people.len()],
    };
    let mut split = Split::new(order.len(), clean);
    let (mut failure, mut lost, mut tried) = (None, false, false);
    while !stop.is_cancelled()
        && let Some(part) = split.next_part()
    {
        let indices = order.get(part.clone()).unwrap_or_default();
        match batch.call(indices).await {
            Err(Ended) => {
                lost = true;
                break;
            }
            Ok(Ok(Call::Answered)) => split.answered(part),
            Ok(Ok(Call::ForNobody)) => split.skipped(part),
            Ok(Ok(Call::EachFailed(why))) => {
                split.failed_each(part);
                failure = Some(why);
            }
            Ok(Err(why)) => {
                debug!(people = indices.len(), %why, "a call failed");
                for i in indices {
                    batch.blame(*i, why.reason);
                }
                split.failed(part, scope(why.reason));
                failure = Some(why);
            }
        }
        tried = true;
    }

    let was_split = split.was_split();
    let failures: Vec<u32> = order
        .iter()
        .map(|i| people.get(*i).map_or(0, |p| p.failures))
        .collect();
    let (fates, finding) = split.end(worked, &failures);
    for (i, fate) in order.iter().zip(fates) {
        batch.judge(*i, fate);
    }
    Carried {
        seen: batch
            .seen
            .into_iter()
            .map(|seen| seen.unwrap_or(Seen::Untouched))
            .collect(),
        finding: tried.then_some(finding),
        failure,
        split: was_split,
        lost,
    }
}

struct Batch<'a> {
    connector: &'a dyn Connector,
    lease: &'a Lease,
    people: &'a [Person],
    metrics: OfTarget<'a>,
    seen: Vec<Option<Seen>>,
    /// Of the last call that failed as a whole.
    reasons: Vec<Option<Reason>>,
}

impl Batch<'_> {
    /// Probes those that settle, erases the others and those that came back, and probes these. The outer error: the
    /// lease ended; the inner one: the same failure for everybody.
    async fn call(&mut self, indices: &[usize]) -> Result<Result<Call, Failure>, Ended> {
        let settling = |i: &usize| self.people.get(*i).is_some_and(|p| p.settling);
        let (second, mut rest): (Vec<usize>, Vec<usize>) =
            indices.iter().partition(|i| settling(i));
        let mut answers = Answers::default();
        if !second.is_empty() {
            let before: Vec<Evidence> = second
                .iter()
                .map(|i| {
                    self.people
                        .get(*i)
                        .map_or_else(Evidence::default, |p| last_erasure(&p.before))
                })
                .collect();
            match self.probe(&second, &before).await? {
                Err(failure) if proves_nothing(&failure) => rest.extend(second),
                Err(failure) => return Ok(Err(failure)),
                Ok(answer) => {
                    for (i, presence) in second.into_iter().zip(answer) {
                        match presence {
                            Err(failure) if proves_nothing(&failure) => rest.push(i),
                            Ok(Presence::StillThere) => {
                                self.metrics.resurrected();
                                rest.push(i);
                            }
                            other => answers.take(i, None, other),
                        }
                    }
                }
            }
        }
        // What is there after it was erased is erased once more at once: a writer that was in the middle of something.
        for last in [false, true] {
            if rest.is_empty() {
                break;
            }
            let erased = match self.erase(&rest).await? {
                Err(failure) => return Ok(Err(failure)),
                Ok(answer) => answer,
            };
            let (mut gone, mut evidence) = (Vec::new(), Vec::new());
            for (i, erased) in rest.drain(..).zip(erased) {
                match erased {
                    Ok(erased) => {
                        gone.push(i);
                        evidence.push(erased);
                    }
                    Err(failure) => answers.fail(i, failure),
                }
            }
            if gone.is_empty() {
                break;
            }
            let presences = match self.probe(&gone, &evidence).await? {
                Err(failure) if !last && proves_nothing(&failure) => {
                    rest = gone;
                    continue;
                }
                Err(failure) => return Ok(Err(failure)),
                Ok(answer) => answer,
            };
            for ((i, erased), presence) in gone.into_iter().zip(evidence).zip(presences) {
                match presence {
                    Err(failure) if !last && proves_nothing(&failure) => rest.push(i),
                    Ok(Presence::StillThere) => {
                        self.metrics.resurrected();
                        if last {
                            let words = "what was erased twice is there again";
                            answers.fail(i, Failure::new(Reason::StillThere, words));
                        } else {
                            rest.push(i);
                        }
                    }
                    other => answers.take(i, Some(erased), other),
                }
            }
        }
        if let Some(failure) = answers.away(indices.len()) {
            return Ok(Err(failure));
        }
        let call = answers.call();
        let undecided = matches!(call, Call::EachFailed(_));
        for (i, answer) in answers.all {
            let seen = match answer {
                Ok(seen) => seen,
                // Whose fault it is shows only when the batch is over.
                Err(failure) if undecided && !of_person(&failure) => {
                    self.blame(i, failure.reason);
                    continue;
                }
                Err(failure) => {
                    self.metrics.error(failure.reason);
                    if scope(failure.reason) == Scope::Target {
                        // It works for others in the same call: a connection that broke in the middle.
                        Seen::Tried(failure.reason)
                    } else {
                        warn!(reason = failure.reason.as_str(), detail = %failure.detail, "a step failed");
                        Seen::Failed(failure.reason)
                    }
                }
            };
            if let Some(place) = self.seen.get_mut(i) {
                *place = Some(seen);
            }
        }
        Ok(Ok(call))
    }

    fn subjects(&self, indices: &[usize]) -> Vec<Subject<'_>> {
        indices
            .iter()
            .filter_map(|i| self.people.get(*i))
            .map(|person| Subject {
                identifiers: &person.identifiers,
            })
            .collect()
    }

    async fn erase(&self, indices: &[usize]) -> Result<Result<Answer<Evidence>, Failure>, Ended> {
        let subjects = self.subjects(indices);
        let call = tokio::time::timeout(CALL, self.connector.erase(&subjects));
        Ok(whole(while_held(self.lease, call).await?, indices.len()))
    }

    async fn probe(
        &self,
        indices: &[usize],
        erased: &[Evidence],
    ) -> Result<Result<Answer<Presence>, Failure>, Ended> {
        let subjects = self.subjects(indices);
        let call = tokio::time::timeout(CALL, self.connector.probe(&subjects, erased));
        let answer = whole(while_held(self.lease, call).await?, indices.len());
        match &answer {
            Err(_) => self.metrics.probe_failed(),
            Ok(answer) => {
                for _ in answer.iter().filter(|one| one.is_err()) {
                    self.metrics.probe_failed();
                }
            }
        }
        Ok(answer)
    }

    fn blame(&mut self, i: usize, reason: Reason) {
        if let Some(place) = self.reasons.get_mut(i) {
            *place = Some(reason);
        }
    }

    fn judge(&mut self, i: usize, fate: Fate) {
        if self.seen.get(i).is_some_and(Option::is_some) {
            return;
        }
        let reason = self.reasons.get(i).copied().flatten();
        let seen = match fate {
            Fate::Answered => return,
            Fate::Untouched => Seen::Untouched,
            Fate::Tried => Seen::Tried(reason.unwrap_or(Reason::Unreachable)),
            Fate::Guilty => Seen::Failed(reason.unwrap_or(Reason::Protocol)),
        };
        if let Some(reason) = reason {
            self.metrics.error(reason);
        }
        if let Some(place) = self.seen.get_mut(i) {
            *place = Some(seen);
        }
    }
}

/// An answer for each, or none that counts.
fn whole<T>(
    answer: Result<Result<Answer<T>, Failure>, tokio::time::error::Elapsed>,
    people: usize,
) -> Result<Answer<T>, Failure> {
    let Ok(answer) = answer else {
        let words = "the target doesn't answer";
        return Err(Failure::new(Reason::Unreachable, words));
    };
    let answer = answer?;
    if answer.len() == people {
        Ok(answer)
    } else {
        let words = format!("{} answers for {people} people", answer.len());
        Err(Failure::new(Reason::Protocol, words))
    }
}

/// How a call went.
enum Call {
    /// At least for one.
    Answered,
    /// For none, but for each by itself.
    EachFailed(Failure),
    /// The target was asked for nobody.
    ForNobody,
}

/// Whether an erasure must be done again before anything can be proven of it: another server process answers than the
/// one erased from, which may have begun with older data. To ask it again and again would hold the step up for ever.
fn proves_nothing(failure: &Failure) -> bool {
    failure.reason == Reason::Protocol
}

/// Whether a failure is the request's own, wherever it is tried.
fn of_person(failure: &Failure) -> bool {
    failure.reason == Reason::Identifier
}

/// What one call says of each.
#[derive(Default)]
struct Answers {
    all: Vec<(usize, Result<Seen, Failure>)>,
}

impl Answers {
    fn take(&mut self, i: usize, erased: Option<Evidence>, presence: Result<Presence, Failure>) {
        match presence {
            Ok(Presence::Absent { evidence, bounded }) => {
                let seen = Seen::Gone {
                    erased,
                    probed: evidence,
                    bounded,
                };
                self.all.push((i, Ok(seen)));
            }
            Ok(Presence::StillThere) => {
                self.fail(i, Failure::new(Reason::StillThere, "it is there again"));
            }
            Err(failure) => self.fail(i, failure),
        }
    }

    fn fail(&mut self, i: usize, failure: Failure) {
        self.all.push((i, Err(failure)));
    }

    /// Of whom the request itself is wrong doesn't count: the target wasn't asked.
    fn call(&self) -> Call {
        let asked = || {
            let all = self.all.iter().map(|(_, answer)| answer);
            all.filter(|answer| !answer.as_ref().is_err_and(of_person))
        };
        let last = asked()
            .filter_map(|answer| answer.as_ref().err())
            .next_back();
        match last {
            Some(failure) if asked().all(Result::is_err) => Call::EachFailed(failure.clone()),
            None if asked().next().is_none() => Call::ForNobody,
            _ => Call::Answered,
        }
    }

    /// The failure, if everybody failed and it can only be the target's.
    fn away(&self, people: usize) -> Option<Failure> {
        let mut failures = self
            .all
            .iter()
            .filter_map(|(_, answer)| answer.as_ref().err());
        let targets = |f: &&Failure| scope(f.reason) == Scope::Target;
        (failures.clone().filter(targets).count() == people && people > 0)
            .then(|| failures.next().cloned())
            .flatten()
    }
}

#[cfg(test)]
mod tests;
