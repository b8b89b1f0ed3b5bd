//! Reading back, on the primary, that nothing is left; and which standbys show it.
//!
//! Owns what a reading proves. Never: reads from a standby; takes a reading for proof that is older than the erasure, or
//! of another database system; waits for a standby without a limit.

use std::time::{Duration, Instant};

use futures::future::join_all;
use jiff::Timestamp;
use serde_json::json;
use tokio_postgres::types::Type;

use super::catalogue::Rule;
use super::erasing::BATCH;
use super::fault::Fault;
use super::line::{Line, Parameter};
use super::{Ask, Person, PostgreSql, Source, finished, statements};
use crate::rights::connectors::{Answer, Failure, Presence, Reason, Residue, Subject};
use crate::rights::model::Evidence;

/// What a standby that is away may still hold, and for how long, unless the target says (residueDays): it serves
/// nobody before it has replayed the erasure, but its files are there. By then, bring it back or delete its volume.
const AWAY_DAYS: u32 = 30;
/// How evidence names the place in the log.
pub(super) const POSITION: &str = "position";
/// How evidence names the database system.
pub(super) const SYSTEM: &str = "system";

/// Who answered a probe, and when.
struct Reading {
    system: String,
    position: u64,
    written: String,
    at: Timestamp,
    still_there: Vec<bool>,
}

impl PostgreSql {
    /// Standbys that there should be; none: it isn't a store, so nobody says.
    fn standbys(&self) -> Option<usize> {
        match &self.source {
            Source::Store { database, .. } => Some(database.hosts.len().saturating_sub(1)),
            Source::Url(_) => None,
        }
    }

    /// Reads on the primary whether something is left of these people.
    async fn read(&self, line: &Line, people: &[Person<'_>]) -> Result<Reading, Fault> {
        let client = &line.session.client;
        let begin = statements::begin_reading(self.limits.lock.as_millis(), self.statement_limit());
        let (plan, _) = self.begin(line, &begin, statements::NO_MARK).await?;
        let asks: Vec<(&Rule, Ask)> = plan
            .rules
            .iter()
            .map(|rule| (rule, Ask::new(rule, people, statements::probe(rule))))
            .collect();
        let answers = asks.iter().map(|(rule, ask)| async move {
            let parameters = ask.parameters();
            let doing = format!("reading {}", rule.name);
            let rows = self.asked(client.query_typed(&ask.sql, &parameters), &doing);
            let rows = rows.await?;
            let numbers: Result<Vec<i32>, _> = rows.iter().map(|row| row.try_get(0)).collect();
            numbers.map_err(|e| Fault::of(&e, &doing))
        });
        let mut still_there = vec![false; people.len()];
        for answer in join_all(answers).await {
            for number in answer? {
                let there = usize::try_from(number)
                    .ok()
                    .and_then(|n| still_there.get_mut(n));
                if let Some(there) = there {
                    *there = true;
                }
            }
        }
        let doing = "reading where the primary is";
        let facts = self.asked(line.row(statements::WHERE, &[]), doing);
        let facts = facts.await?;
        self.asked(client.batch_execute("COMMIT"), "ending a reading")
            .await?;
        let at = |e| Fault::of(&e, doing);
        let standby: bool = facts.try_get(0).map_err(at)?;
        let written: Option<String> = facts.try_get(1).map_err(at)?;
        let (Some(written), false) = (written, standby) else {
            return Err(Fault::whole(Failure::new(
                Reason::Protocol,
                "a standby answered the probe, which can't say what the primary has",
            )));
        };
        Ok(Reading {
            system: facts.try_get(2).map_err(at)?,
            position: position(&written).unwrap_or(0),
            written,
            at: facts.try_get(3).map_err(at)?,
            still_there,
        })
    }

    /// How many standbys stream, and how many of them show what is written up to this position. Waits a little for
    /// those that stream.
    async fn followers(&self, line: &Line, position: &str) -> Result<(usize, usize), Fault> {
        let doing = "asking for the standbys: does domicile.replayed exist, and may the worker's role use it";
        let begun = Instant::now();
        let mut pause = Duration::from_millis(2);
        loop {
            let of: [Parameter<'_>; 1] = [(&position, Type::TEXT)];
            let row = self.asked(line.row(statements::REPLAYED, &of), doing);
            let row = row.await?;
            let at = |e| Fault::of(&e, doing);
            let (streaming, replayed): (i32, i32) =
                (row.try_get(0).map_err(at)?, row.try_get(1).map_err(at)?);
            if replayed >= streaming || begun.elapsed() >= self.limits.standbys {
                let count = |n| usize::try_from(n).unwrap_or(0);
                return Ok((count(streaming), count(replayed)));
            }
            tokio::time::sleep(pause).await;
            pause = (pause * 2).min(Duration::from_millis(50));
        }
    }

    /// A reading, and who of the standbys shows what it saw.
    async fn look(
        &self,
        line: &Line,
        people: &[Person<'_>],
        erased: &[Evidence],
    ) -> Result<(Reading, Option<(usize, usize)>), Fault> {
        let reading = self.read(line, people).await?;
        let mut followers = None;
        if self.standbys().is_some() {
            // The latest erasure's place; if it isn't known, where the log was when we read.
            let furthest = people
                .iter()
                .map(|person| erased.get(person.place).and_then(|e| text(e, POSITION)))
                .collect::<Option<Vec<&str>>>()
                .and_then(|all| all.into_iter().max_by_key(|p| position(p)))
                .unwrap_or(&reading.written);
            followers = Some(self.followers(line, furthest).await?);
        }
        Ok((reading, followers))
    }

    pub(super) async fn probe_all(
        &self,
        subjects: &[Subject<'_>],
        erased: &[Evidence],
    ) -> Result<Answer<Presence>, Failure> {
        let (people, mut answers) = self.people(subjects);
        for batch in people.chunks(BATCH) {
            let mut slot = self.prober.lock().await;
            let seen = loop {
                let taken = self
                    .take(&mut slot, "domicile-rights-prober")
                    .await
                    .map_err(|f| f.failure)?;
                let seen = self.look(&taken.0, batch, erased).await;
                if !self.put(&mut slot, taken, seen.as_ref().err()).await {
                    break seen;
                }
            };
            let (reading, followers) = seen.map_err(|f| f.failure)?;
            for (person, still_there) in batch.iter().zip(&reading.still_there) {
                let presence = if *still_there {
                    Ok(Presence::StillThere)
                } else {
                    reading
                        .proves(erased.get(person.place))
                        .map(|()| self.absent(&reading, followers))
                };
                if let Some(answer) = answers.get_mut(person.place) {
                    *answer = Some(presence);
                }
            }
        }
        Ok(finished(answers))
    }

    fn absent(&self, reading: &Reading, followers: Option<(usize, usize)>) -> Presence {
        let mut evidence = serde_json::Map::new();
        evidence.insert("readAt".into(), json!(reading.at));
        evidence.insert("readFrom".into(), json!("primary"));
        let mut bounded = None;
        match (self.standbys(), followers) {
            (Some(expected), Some((streaming, replayed))) => {
                let behind = expected.max(streaming).saturating_sub(replayed);
                evidence.insert(
                    "standbys".into(),
                    json!({"showIt": replayed, "awayOrBehind": behind}),
                );
                if behind > 0 {
                    let days = self.residue.map_or(AWAY_DAYS, |r| r.days.max(AWAY_DAYS));
                    bounded = Some(Residue { days }.until(reading.at));
                }
            }
            _ => {
                evidence.insert(
                    "standbys".into(),
                    json!("as the database's own synchronous commit"),
                );
            }
        }
        Presence::Absent {
            evidence: Evidence(evidence),
            bounded,
        }
    }
}

impl Reading {
    /// Whether this was read from what was erased from, after it was.
    fn proves(&self, erased: Option<&Evidence>) -> Result<(), Failure> {
        let system = erased.and_then(|e| text(e, SYSTEM));
        if system.is_some_and(|s| s != self.system) {
            return Err(Failure::new(
                Reason::Protocol,
                "another database system answers than the one erased from: the person must be erased again",
            ));
        }
        let erased = erased.and_then(|e| text(e, POSITION)).and_then(position);
        if erased.is_some_and(|p| p > self.position) {
            return Err(Failure::new(
                Reason::Protocol,
                "the server that answers the probe is behind the erasure: the person must be erased again",
            ));
        }
        Ok(())
    }
}

fn text<'e>(evidence: &'e Evidence, name: &str) -> Option<&'e str> {
    evidence.0.get(name)?.as_str()
}

/// A place in the log, as a number.
fn position(text: &str) -> Option<u64> {
    let (high, low) = text.split_once('/')?;
    let (high, low) = (
        u32::from_str_radix(high, 16).ok()?,
        u32::from_str_radix(low, 16).ok()?,
    );
    Some(u64::from(high) << 32 | u64::from(low))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn positions_are_numbers() {
        assert_eq!(position("0/0"), Some(0));
        assert_eq!(position("1/A0"), Some((1 << 32) + 160));
        assert!(position("A/0") > position("9/FFFFFFFF"));
        for bad in ["", "0", "/", "x/0", "1/100000000"] {
            assert_eq!(position(bad), None, "{bad}");
        }
    }

    #[test]
    fn a_reading_proves_only_what_was_erased_there_before() {
        let reading = Reading {
            system: "1".into(),
            position: 0x10,
            written: "0/10".into(),
            at: Timestamp::UNIX_EPOCH,
            still_there: Vec::new(),
        };
        let erased = |system: &str, position: &str| {
            let map = json!({SYSTEM: system, POSITION: position});
            Evidence(map.as_object().unwrap().clone())
        };
        assert_eq!(reading.proves(None), Ok(()));
        assert_eq!(reading.proves(Some(&Evidence::default())), Ok(()));
        assert_eq!(reading.proves(Some(&erased("1", "0/10"))), Ok(()));
        for other in [erased("2", "0/10"), erased("1", "0/11")] {
            let failure = reading.proves(Some(&other)).unwrap_err();
            assert_eq!(failure.reason, Reason::Protocol);
        }
    }
}
