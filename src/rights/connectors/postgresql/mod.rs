//! PostgreSQL: rows by key, in the order of their foreign keys, in one transaction.
//!
//! Owns: batches (and their halves, when somebody in one makes it fail), the commit that waits for synchronous standbys,
//! and the reading back on the primary by a connection of its own.
//! Never: erases part of a person (all tables or none); takes a table that it can't see whole for empty; reads from a
//! standby; waits without a limit.

mod catalogue;
mod fault;
mod line;
mod order;
mod statements;
mod values;

use std::future::Future;
use std::path::{Path, PathBuf};
use std::time::Instant;

use futures::future::{BoxFuture, join_all};
use futures::{FutureExt as _, join};
use jiff::Timestamp;
use serde_json::json;
use tokio::sync::Mutex;
use tokio_postgres::types::{ToSql, Type};

use self::catalogue::{Catalogue, Plan, Rule, split};
use self::fault::Fault;
use self::line::{Line, Parameter};
use self::values::Hidden;
use super::{
    Answer, Connector, Failure, Limits, Presence, Reason, Residue, Subject, required, residue_of,
    wanted,
};
use crate::api::rights_targets::TableErasure;
use crate::rights::config::{Database, Target};
use crate::rights::model::Evidence;
use crate::rights::postgres::Address;

/// People per transaction: what a poisoned one costs the others, and how long locks are held.
const BATCH: usize = 500;
/// What a standby that is away may still hold, and for how long, unless the target says (residueDays): it serves
/// nobody before it has replayed the erasure, but its files are there. By then, bring it back or delete its volume.
const AWAY_DAYS: u32 = 30;
/// How evidence names the place in the log.
const POSITION: &str = "position";
/// How evidence names the database system.
const SYSTEM: &str = "system";

/// A PostgreSQL database.
pub struct PostgreSql {
    source: Source,
    rules: Vec<TableErasure>,
    required: Vec<String>,
    residue: Option<Residue>,
    limits: Limits,
    eraser: Mutex<Option<Line>>,
    prober: Mutex<Option<Line>>,
}

enum Source {
    Store {
        database: Database,
        role: String,
        tls: PathBuf,
        /// Of a store that isn't the ledger's: a certificate of its own authority, in place of that in `tls`.
        own: PathBuf,
    },
    /// A directory with `url`, and maybe `ca.crt`.
    Url(PathBuf),
}

/// A person of a batch.
#[derive(Clone, Copy)]
struct Person<'a> {
    place: usize,
    subject: Subject<'a>,
}

/// A statement for several people.
struct Ask {
    sql: String,
    numbers: Vec<i32>,
    parameters: Vec<(Hidden, Type)>,
    /// People of whom the table can hold nothing, since an identifier can't be of the column's type.
    cant: Vec<usize>,
}

/// Who answered a probe, and when.
struct Reading {
    system: String,
    position: u64,
    written: String,
    at: Timestamp,
    still_there: Vec<bool>,
}

impl PostgreSql {
    /// A connector that hasn't connected yet.
    #[must_use]
    pub fn new(
        target: &Target,
        store: Option<&Database>,
        rules: &[TableErasure],
        tls: &Path,
        credentials: &Path,
        role: &str,
        limits: Limits,
    ) -> Self {
        let source = match store {
            Some(database) => Source::Store {
                database: database.clone(),
                role: role.to_owned(),
                tls: tls.to_owned(),
                own: credentials.join(&target.name),
            },
            None => Source::Url(credentials.join(&target.name)),
        };
        Self {
            source,
            rules: rules.to_vec(),
            required: required(target),
            residue: residue_of(target),
            limits,
            eraser: Mutex::new(None),
            prober: Mutex::new(None),
        }
    }

    /// Standbys that there should be; none: it isn't a store, so nobody says.
    fn standbys(&self) -> Option<usize> {
        match &self.source {
            Source::Store { database, .. } => Some(database.hosts.len().saturating_sub(1)),
            Source::Url(_) => None,
        }
    }

    async fn connect(&self, name: &str) -> Result<Line, Failure> {
        // Read again every time: certificates and passwords change while we run.
        let address = match &self.source {
            Source::Store {
                database,
                role,
                tls,
                own,
            } => {
                let own = Some(own).filter(|own| own.join("tls.crt").exists());
                Address::of_store(database, role, own.unwrap_or(tls), name)
            }
            Source::Url(dir) => {
                let (url, ca) = super::credentials(dir)?;
                Address::of_url(&url, ca.as_deref(), name)
            }
        };
        let address = address.map_err(|t| fault::of_trouble(&t))?;
        let connecting = address.primary(self.limits.connect);
        let session = connecting.await.map_err(|t| fault::of_trouble(&t))?;
        let prepares = matches!(self.source, Source::Store { .. });
        Ok(Line::new(session, prepares))
    }

    /// A connection for one piece of work, and whether it is one that was kept. It is out of its slot meanwhile: work
    /// that is dropped half-way must not leave a connection with half a transaction.
    async fn take(&self, slot: &mut Option<Line>, name: &str) -> Result<(Line, bool), Fault> {
        match slot.take().filter(|l| !l.session.client.is_closed()) {
            Some(line) => Ok((line, true)),
            None => Ok((self.connect(name).await.map_err(Fault::whole)?, false)),
        }
    }

    /// Puts the connection back, if it is still good. Returns whether the work should be done once more at once: the
    /// server went and came back since the connection was kept (and everything here may be done twice).
    async fn put(
        &self,
        slot: &mut Option<Line>,
        (line, kept): (Line, bool),
        fault: Option<&Fault>,
    ) -> bool {
        let Some(fault) = fault else {
            *slot = Some(line);
            return false;
        };
        if fault.broken {
            return kept && fault.failure.reason != Reason::Timeout;
        }
        let undo = self.asked(
            line.session.client.batch_execute("ROLLBACK"),
            "rolling back",
        );
        if undo.await.is_ok() {
            *slot = Some(line);
        }
        false
    }

    /// An answer, in time.
    async fn asked<T>(
        &self,
        answer: impl Future<Output = Result<T, tokio_postgres::Error>>,
        doing: &str,
    ) -> Result<T, Fault> {
        match tokio::time::timeout(self.limits.answer, answer).await {
            Ok(answer) => answer.map_err(|e| Fault::of(&e, doing)),
            Err(_) => Err(Fault::late(doing)),
        }
    }

    /// Begins a transaction and looks at the tables, in one round trip but for a connection's first.
    async fn begin(
        &self,
        line: &Line,
        begin: &str,
        mark: &'static str,
    ) -> Result<(Plan, String), Fault> {
        let (schemas, tables): (Vec<&str>, Vec<&str>) =
            self.rules.iter().map(|r| split(&r.table)).unzip();
        let columns: Vec<&str> = self
            .rules
            .iter()
            .flat_map(|r| r.columns.keys().chain(&r.clear_columns))
            .map(String::as_str)
            .collect();
        let of: [Parameter<'_>; 3] = [
            (&schemas, Type::TEXT_ARRAY),
            (&tables, Type::TEXT_ARRAY),
            (&columns, Type::TEXT_ARRAY),
        ];
        let (begun, mark, tables, columns, keys) = self
            .asked(
                async {
                    // Sent together, in this order.
                    Ok(join!(
                        line.session.client.batch_execute(begin),
                        line.row(mark, &[]),
                        line.rows(catalogue::TABLES, &of[..2]),
                        line.rows(catalogue::COLUMNS, &of),
                        line.rows(catalogue::KEYS, &of[..2]),
                    ))
                },
                "looking at the tables",
            )
            .await?;
        let doing = "looking at the tables";
        let at = |e| Fault::of(&e, doing);
        begun.map_err(at)?;
        let mark = mark.and_then(|row| row.try_get(0)).map_err(at)?;
        let (tables, columns, keys) =
            (tables.map_err(at)?, columns.map_err(at)?, keys.map_err(at)?);
        let seen = Catalogue::from_rows(&tables, &columns, &keys).map_err(at)?;
        let plan = seen.plan(&self.rules).map_err(Fault::whole)?;
        Ok((plan, mark))
    }

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

    fn statement_limit(&self) -> u128 {
        // Before we stop waiting, so that the reason is PostgreSQL's, and the connection stays good.
        (self.limits.answer * 4 / 5).as_millis()
    }

    /// Sorts out who lacks an identifier.
    fn people<'a, T>(
        &self,
        subjects: &'a [Subject<'a>],
    ) -> (Vec<Person<'a>>, Vec<Option<Result<T, Failure>>>) {
        let mut people = Vec::with_capacity(subjects.len());
        let mut answers = Vec::with_capacity(subjects.len());
        for (place, subject) in subjects.iter().enumerate() {
            let lacking = self
                .required
                .iter()
                .find_map(|name| wanted(subject.identifiers, name).err());
            if lacking.is_none() {
                people.push(Person {
                    place,
                    subject: *subject,
                });
            }
            answers.push(lacking.map(Err));
        }
        (people, answers)
    }

    async fn erase_all(&self, subjects: &[Subject<'_>]) -> Result<Answer<Evidence>, Failure> {
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
        let mut pause = std::time::Duration::from_millis(2);
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
            pause = (pause * 2).min(std::time::Duration::from_millis(50));
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

    async fn probe_all(
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

impl Ask {
    fn new(rule: &Rule, people: &[Person<'_>], sql: String) -> Self {
        let (mut numbers, mut cant) = (Vec::new(), Vec::new());
        let mut values: Vec<Vec<&str>> = vec![Vec::new(); rule.columns.len()];
        for (number, person) in people.iter().enumerate() {
            let of = |name: &str| person.subject.identifiers.0.get(name).map(String::as_str);
            let held: Option<Vec<&str>> = rule
                .columns
                .iter()
                .map(|c| of(&c.identifier).filter(|value| c.kind.holds(value)))
                .collect();
            match (held, i32::try_from(number)) {
                (Some(held), Ok(n)) => {
                    numbers.push(n);
                    for (values, value) in values.iter_mut().zip(held) {
                        values.push(value);
                    }
                }
                _ => cant.push(number),
            }
        }
        let parameters = rule
            .columns
            .iter()
            .zip(values)
            .map(|(column, values)| column.kind.parameter(values))
            .collect();
        Self {
            sql,
            numbers,
            parameters,
            cant,
        }
    }

    fn parameters(&self) -> Vec<Parameter<'_>> {
        let numbers: (&(dyn ToSql + Sync), Type) = (&self.numbers, Type::INT4_ARRAY);
        let values = self.parameters.iter().map(|(values, ty)| {
            let values: &(dyn ToSql + Sync) = values;
            (values, ty.clone())
        });
        std::iter::once(numbers).chain(values).collect()
    }
}

fn fill<T>(answers: &mut [Option<Result<T, Failure>>], people: &[Person<'_>], failure: &Failure) {
    for person in people {
        if let Some(answer) = answers.get_mut(person.place) {
            *answer = Some(Err(failure.clone()));
        }
    }
}

/// Whoever was forgotten wasn't erased.
fn finished<T>(answers: Vec<Option<Result<T, Failure>>>) -> Answer<T> {
    let none = || Failure::new(Reason::Protocol, "the batch gave no answer for this person");
    answers
        .into_iter()
        .map(|answer| answer.unwrap_or_else(|| Err(none())))
        .collect()
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

impl Connector for PostgreSql {
    fn erase<'a>(
        &'a self,
        subjects: &'a [Subject<'a>],
    ) -> BoxFuture<'a, Result<Answer<Evidence>, Failure>> {
        self.erase_all(subjects).boxed()
    }

    fn probe<'a>(
        &'a self,
        subjects: &'a [Subject<'a>],
        erased: &'a [Evidence],
    ) -> BoxFuture<'a, Result<Answer<Presence>, Failure>> {
        self.probe_all(subjects, erased).boxed()
    }

    fn residue(&self) -> Option<Residue> {
        self.residue
    }
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

    #[test]
    fn who_is_forgotten_wasnt_erased() {
        let answers: Answer<()> = finished(vec![Some(Ok(())), None]);
        assert!(answers[0].is_ok() && answers[1].is_err());
    }
}
