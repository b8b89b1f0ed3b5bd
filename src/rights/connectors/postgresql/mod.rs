//! PostgreSQL: rows by key, in the order of their foreign keys, in one transaction.
//!
//! Owns the connections, one that erases and one that reads back, and what both do: looking at the tables, asking for many
//! people at once. [`erasing`] and [`reading`] are what is done with them.
//! Never: takes a table that it can't see whole for empty; keeps a connection of which it isn't certain; waits without a
//! limit.

mod catalogue;
mod erasing;
mod fault;
mod line;
mod order;
mod reading;
mod statements;
mod values;

use std::future::Future;
use std::path::{Path, PathBuf};

use futures::future::BoxFuture;
use futures::{FutureExt as _, join};
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
    fn who_is_forgotten_wasnt_erased() {
        let answers: Answer<()> = finished(vec![Some(Ok(())), None]);
        assert!(answers[0].is_ok() && answers[1].is_err());
    }
}
