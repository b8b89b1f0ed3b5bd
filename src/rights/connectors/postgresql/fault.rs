//! What an error of PostgreSQL means for a batch.
//!
//! Owns the words. Never: passes on PostgreSQL's message or detail, which quote values; only codes and names of objects.

use tokio_postgres::error::DbError;

use super::{Failure, Reason};
use crate::rights::postgres::Trouble;

/// A batch that failed.
#[derive(Clone, Debug)]
pub struct Fault {
    /// Why.
    pub failure: Failure,
    /// Whether it would be the same for every person: no use in trying them one by one.
    pub whole: bool,
    /// Whether the connection may not be used again.
    pub broken: bool,
}

impl Fault {
    /// One that is the same for everybody, on a connection that is still good.
    #[must_use]
    pub fn whole(failure: Failure) -> Self {
        Self {
            failure,
            whole: true,
            broken: false,
        }
    }

    /// The connection answered too late, so that nothing can be said of it any more.
    #[must_use]
    pub fn late(doing: &str) -> Self {
        Self {
            failure: Failure::new(
                Reason::Timeout,
                format!("PostgreSQL didn't answer in time while {doing}"),
            ),
            whole: true,
            broken: true,
        }
    }

    /// Of an error while `doing` something.
    #[must_use]
    pub fn of(error: &tokio_postgres::Error, doing: &str) -> Self {
        let Some(db) = error.as_db_error() else {
            return Self {
                failure: Failure::new(
                    if error.is_closed() || source_is_io(error) {
                        Reason::Unreachable
                    } else {
                        Reason::Protocol
                    },
                    format!("the connection to PostgreSQL failed while {doing}"),
                ),
                whole: true,
                broken: true,
            };
        };
        let (reason, whole, words) = meaning(db);
        let code = db.code().code();
        Self {
            failure: Failure::new(reason, format!("{words} while {doing} (error {code})")),
            whole,
            // 25006: it has become a standby. 26000: somebody's trigger took away what is prepared.
            broken: code.starts_with("57P")
                || code.starts_with("08")
                || ["25006", "26000"].contains(&code),
        }
    }
}

fn source_is_io(error: &tokio_postgres::Error) -> bool {
    std::error::Error::source(error).is_some_and(|e| e.is::<std::io::Error>())
}

fn meaning(db: &DbError) -> (Reason, bool, String) {
    let table = || match (db.schema(), db.table()) {
        (Some(schema), Some(table)) => format!("{schema}.{table}"),
        (None, Some(table)) => table.to_owned(),
        _ => "a table".to_owned(),
    };
    let constraint = || db.constraint().unwrap_or("without a name").to_owned();
    match db.code().code() {
        "42P01" | "3F000" | "42703" | "42883" | "42704" => (
            Reason::Missing,
            true,
            "a table or column went missing".into(),
        ),
        "42501" => (
            Reason::Refused,
            true,
            "the worker's role lacks a privilege, or row-level security hides rows from it".into(),
        ),
        "23503" | "23001" => (
            Reason::Refused,
            false,
            format!(
                "rows of {} still refer to the person's, by foreign key {}: add the table to the workflow, or make the \
                 key ON DELETE CASCADE or SET NULL;",
                table(),
                constraint()
            ),
        ),
        "23502" => (
            Reason::Refused,
            false,
            format!(
                "column {} of {} is NOT NULL and can't be cleared",
                db.column().unwrap_or("without a name"),
                table()
            ),
        ),
        "55P03" => (
            Reason::Locked,
            false,
            "somebody else holds a lock on the rows or the table".into(),
        ),
        "40P01" | "40001" => (
            Reason::Locked,
            false,
            "another transaction was in the way".into(),
        ),
        "57014" => (
            Reason::Timeout,
            false,
            "PostgreSQL took too long: is there an index on the columns that the workflow names?"
                .into(),
        ),
        "25006" => (
            Reason::Unreachable,
            true,
            "the server takes no writes (any more)".into(),
        ),
        "53100" => (
            Reason::Unreachable,
            true,
            "the server's disk is full".into(),
        ),
        "25P02" => (
            Reason::Protocol,
            true,
            "the transaction had failed before".into(),
        ),
        "0A000" => (
            Reason::Refused,
            true,
            "PostgreSQL can't do this to the table: has it a rule?".into(),
        ),
        "P0001" => (Reason::Refused, false, "a trigger refused".into()),
        code => match code.get(..2) {
            Some("23") => (
                Reason::Refused,
                false,
                format!("constraint {} of {} refused", constraint(), table()),
            ),
            Some("53" | "57" | "58" | "08") => (
                Reason::Unreachable,
                true,
                "the server has no room or goes down".into(),
            ),
            _ => (Reason::Refused, false, "PostgreSQL refused".into()),
        },
    }
}

/// Of a connection that didn't come about.
#[must_use]
pub fn of_trouble(trouble: &Trouble) -> Failure {
    let reason = match trouble {
        Trouble::Setup(_) | Trouble::Credentials(_) => Reason::Credentials,
        Trouble::NoDatabase(_) => Reason::Missing,
        Trouble::Unreachable(_) => Reason::Unreachable,
    };
    Failure::new(reason, trouble.to_string())
}
