//! Erasing: batches, and their halves when somebody in one makes it fail.
//!
//! Owns one transaction for many people, and what its evidence says. Never: leaves one table of a person erased and
//! another not; takes a commit for done that the standbys didn't wait for.

use std::time::Instant;

use futures::join;
use jiff::Timestamp;
use serde_json::json;
use tokio_postgres::types::Type;

use super::fault::Fault;
use super::line::{Line, Parameter};
use super::reading::{POSITION, SYSTEM};
use super::{Ask, Person, PostgreSql, fill, finished, statements};
use crate::rights::connectors::{Answer, Failure, Reason, Subject};
use crate::rights::model::Evidence;

/// People per transaction: what a poisoned one costs the others, and how long locks are held.
pub(super) const BATCH: usize = 500;

impl PostgreSql {
    /// One transaction: everything of these people.
    async fn erase_batch(
        &self,
        line: &Line,
        people: &[Person<'_>],
        lock: u128,
    ) -> Result<Vec<Evidence>, Fault> {
        let (session, client) = (&line.session, &line.session.client);
        let begin = statements::begin(lock, self.statement_limit());
        let (plan, transaction) = self.begin(line, &begin, statements::MARK).await?;
        if plan.defer {
            let defer = client.batch_execute("SET CONSTRAINTS ALL DEFERRED");
            self.asked(defer, "deferring constraints").await?;
        }
        let mut rows = vec![serde_json::Map::new(); people.len()];
        let mut cant = vec![Vec::new(); people.len()];
        for rule in &plan.rules {
            let ask = Ask::new(rule, people, statements::erase(rule));
            for person in &ask.cant {
                if let Some(cant) = cant.get_mut(*person) {
                    cant.push(rule.name.clone());
                }
            }
            let doing = format!("erasing from {}", rule.name);
            let parameters = ask.parameters();
            let counts = self
                .asked(client.query_typed(&ask.sql, &parameters), &doing)
                .await?;
            let mut gone = vec![0_i64; people.len()];
            for row in counts {
                let (person, count): (i32, i64) = row
                    .try_get(0)
                    .and_then(|n| Ok((n, row.try_get(1)?)))
                    .map_err(|e| Fault::of(&e, &doing))?;
                if let Some(gone) = usize::try_from(person).ok().and_then(|p| gone.get_mut(p)) {
                    *gone = count;
                }
            }
            for (rows, gone) in rows.iter_mut().zip(gone) {
                let before = rows.get(&rule.name).and_then(serde_json::Value::as_i64);
                rows.insert(rule.name.clone(), json!(before.unwrap_or(0) + gone));
            }
        }
        session.take_unreplicated();
        let facts: [Parameter<'_>; 1] = [(&transaction, Type::TEXT)];
        let doing = "committing";
        let (committed, facts) = self
            .asked(
                async {
                    Ok(join!(
                        client.batch_execute(statements::COMMIT),
                        line.row(statements::COMMITTED, &facts),
                    ))
                },
                doing,
            )
            .await?;
        let at = |e| Fault::of(&e, doing);
        committed.map_err(at)?;
        let facts = facts.map_err(at)?;
        if !facts.try_get::<_, bool>(0).map_err(at)? {
            return Err(Fault::whole(Failure::new(
                Reason::Protocol,
                "PostgreSQL says that the erasure was committed, and that it wasn't",
            )));
        }
        if session.take_unreplicated() {
            return Err(Fault::whole(Failure::new(
                Reason::Timeout,
                "somebody cancelled the commit's wait for the standbys",
            )));
        }
        let position: String = facts.try_get(1).map_err(at)?;
        let system: String = facts.try_get(2).map_err(at)?;
        let time: Timestamp = facts.try_get(3).map_err(at)?;
        let evidence = rows.into_iter().zip(cant).map(|(rows, cant)| {
            let mut evidence = serde_json::Map::new();
            evidence.insert("rows".into(), rows.into());
            evidence.insert(POSITION.into(), json!(position));
            evidence.insert(SYSTEM.into(), json!(system));
            evidence.insert("erasedAt".into(), json!(time));
            if !cant.is_empty() {
                // Their columns are of a type that the identifier can't be of.
                evidence.insert("cannotHold".into(), json!(cant));
            }
            Evidence(evidence)
        });
        Ok(evidence.collect())
    }

    pub(super) async fn erase_all(
        &self,
        subjects: &[Subject<'_>],
    ) -> Result<Answer<Evidence>, Failure> {
        let (people, mut answers) = self.people(subjects);
        let begun = Instant::now();
        // Batches to do; whether each is what was left of one that failed.
        let mut batches: Vec<(&[Person<'_>], bool)> =
            people.chunks(BATCH).map(|b| (b, false)).rev().collect();
        let mut done_any = false;
        let mut last: Option<Failure> = None;
        let mut end: Option<Failure> = None;
        while let Some((batch, halved)) = batches.pop() {
            // A locked table would cost every half its wait; who isn't reached now is next time.
            let late = begun.elapsed() > self.limits.halving;
            let given_up = end
                .clone()
                .or_else(|| last.clone().filter(|_| halved && late));
            if let Some(failure) = given_up {
                fill(&mut answers, batch, &failure);
                continue;
            }
            let lock = if halved {
                self.limits.lock / 8
            } else {
                self.limits.lock
            }
            .as_millis();
            match self.erase_once(batch, lock).await {
                Ok(evidence) => {
                    done_any = true;
                    for (person, evidence) in batch.iter().zip(evidence) {
                        if let Some(answer) = answers.get_mut(person.place) {
                            *answer = Some(Ok(evidence));
                        }
                    }
                }
                Err(fault) if fault.whole && !done_any => return Err(fault.failure),
                Err(fault) if fault.whole => {
                    fill(&mut answers, batch, &fault.failure);
                    end = Some(fault.failure);
                }
                Err(fault) if batch.len() < 2 => fill(&mut answers, batch, &fault.failure),
                Err(fault) => {
                    last = Some(fault.failure);
                    let (first, second) = batch.split_at(batch.len() / 2);
                    batches.push((second, true));
                    batches.push((first, true));
                }
            }
        }
        Ok(finished(answers))
    }

    async fn erase_once(&self, people: &[Person<'_>], lock: u128) -> Result<Vec<Evidence>, Fault> {
        let mut slot = self.eraser.lock().await;
        loop {
            let taken = self.take(&mut slot, "domicile-rights-eraser").await?;
            let done = self.erase_batch(&taken.0, people, lock).await;
            if !self.put(&mut slot, taken, done.as_ref().err()).await {
                return done;
            }
        }
    }
}
