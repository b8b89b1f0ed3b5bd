//! The statements that erase and that read back.
//!
//! Owns their text. Names are quoted, values are parameters, and everything that isn't the target's own is named with
//! its schema: the search path stays the target's, since its triggers may rely on it. Pure.

use std::fmt::Write as _;

use super::catalogue::Rule;

/// A name, in quotes: taken literally, upper and lower case included.
#[must_use]
pub fn quote(name: &str) -> String {
    format!("\"{}\"", name.replace('"', "\"\""))
}

/// How an erasure begins. `lock` and `statement` are milliseconds.
///
/// `row_security = off` turns rows that a policy would hide into an error: a DELETE that doesn't see them would succeed.
/// A commit is waited for until standbys show it (if the server has synchronous ones).
#[must_use]
pub fn begin(lock: u128, statement: u128) -> String {
    format!(
        "BEGIN ISOLATION LEVEL READ COMMITTED READ WRITE; \
         SET LOCAL synchronous_commit = remote_apply; SET LOCAL row_security = off; \
         SET LOCAL lock_timeout = {lock}; SET LOCAL statement_timeout = {statement}; \
         SET LOCAL idle_in_transaction_session_timeout = {statement}; \
         SET LOCAL log_parameter_max_length_on_error = 0; SET LOCAL client_min_messages = warning; \
         SET LOCAL jit = off"
    )
}

/// How a reading begins.
#[must_use]
pub fn begin_reading(lock: u128, statement: u128) -> String {
    format!(
        "BEGIN ISOLATION LEVEL READ COMMITTED READ ONLY; SET LOCAL row_security = off; \
         SET LOCAL lock_timeout = {lock}; SET LOCAL statement_timeout = {statement}; \
         SET LOCAL idle_in_transaction_session_timeout = {statement}; \
         SET LOCAL log_parameter_max_length_on_error = 0; SET LOCAL jit = off"
    )
}

/// Ends an erasure. Without a limit of the server's: a limit that strikes while a commit waits for standbys makes it
/// return as if they had it. The time is watched on this side.
pub const COMMIT: &str = "SET LOCAL statement_timeout = 0; COMMIT";

/// Makes every erasure write something, so that its commit waits for the standbys even if no row was left: the rows may
/// have gone by an earlier commit that nobody saw arrive there. Returns the transaction's number.
pub const MARK: &str = "SELECT pg_catalog.pg_current_xact_id()::pg_catalog.text \
     FROM pg_catalog.pg_logical_emit_message(true, 'domicile', '')";

/// What a reading asks instead.
pub const NO_MARK: &str = "SELECT ''::pg_catalog.text";

/// What became of the transaction, and where the log is now.
pub const COMMITTED: &str = "SELECT pg_catalog.pg_xact_status($1::pg_catalog.text::pg_catalog.xid8) = 'committed', \
     pg_catalog.pg_current_wal_flush_lsn()::pg_catalog.text, s.system_identifier::pg_catalog.text, \
     pg_catalog.clock_timestamp() FROM pg_catalog.pg_control_system() AS s";

/// Which server answers a probe, and how far it is.
pub const WHERE: &str = "SELECT pg_catalog.pg_is_in_recovery(), \
     CASE WHEN pg_catalog.pg_is_in_recovery() THEN NULL ELSE pg_catalog.pg_current_wal_flush_lsn()::pg_catalog.text END, \
     s.system_identifier::pg_catalog.text, pg_catalog.clock_timestamp() FROM pg_catalog.pg_control_system() AS s";

/// How many standbys stream, and how many show what was written up to a position. The store's instance manager makes
/// the function: the view beneath shows only part of itself to an ordinary role.
pub const REPLAYED: &str =
    "SELECT standbys, replayed FROM domicile.replayed($1::pg_catalog.text::pg_catalog.pg_lsn)";

/// Which subject it is, and a value per column. Parameter 1 has the numbers. With several arrays, `unnest` is syntax
/// rather than a name, and stands for PostgreSQL's own; a rule without columns is refused before it comes here.
fn people(rule: &Rule) -> String {
    let (mut arrays, mut names) = ("$1::pg_catalog.int4[]".to_owned(), "n".to_owned());
    // Writing to a String can't fail.
    for (i, column) in rule.columns.iter().enumerate() {
        let _ = write!(arrays, ", ${}{}", i + 2, column.kind.cast());
        let _ = write!(names, ", c{i}");
    }
    format!("unnest({arrays}) AS s({names})")
}

fn matches(rule: &Rule) -> String {
    let mut out = String::new();
    for (i, column) in rule.columns.iter().enumerate() {
        let and = if i == 0 { "" } else { " AND " };
        let (name, equals) = (quote(&column.name), column.kind.equals());
        let _ = write!(out, "{and}t.{name} {equals} s.c{i}");
    }
    if !rule.clear.is_empty() {
        let left: Vec<String> = rule
            .clear
            .iter()
            .map(|c| format!("t.{} IS NOT NULL", quote(c)))
            .collect();
        let _ = write!(out, " AND ({})", left.join(" OR "));
    }
    out
}

fn table(rule: &Rule) -> String {
    format!("{}.{}", quote(&rule.schema), quote(&rule.table))
}

/// Erases by a rule; returns how many rows per subject.
#[must_use]
pub fn erase(rule: &Rule) -> String {
    let (table, people, matches) = (table(rule), people(rule), matches(rule));
    let change = if rule.clear.is_empty() {
        format!("DELETE FROM {table} AS t USING {people} WHERE {matches}")
    } else {
        let cleared: Vec<String> = rule
            .clear
            .iter()
            .map(|c| format!("{} = NULL", quote(c)))
            .collect();
        format!(
            "UPDATE {table} AS t SET {} FROM {people} WHERE {matches}",
            cleared.join(", ")
        )
    };
    format!(
        "WITH gone AS ({change} RETURNING s.n) SELECT n, pg_catalog.count(*) FROM gone GROUP BY n"
    )
}

/// Reads by a rule; returns the subjects of whom something is left.
#[must_use]
pub fn probe(rule: &Rule) -> String {
    format!(
        "SELECT s.n FROM {} WHERE EXISTS (SELECT FROM {} AS t WHERE {})",
        people(rule),
        table(rule),
        matches(rule)
    )
}

#[cfg(test)]
mod tests {
    use super::super::catalogue::Column;
    use super::super::values::Kind;
    use super::*;

    fn rule(clear: &[&str]) -> Rule {
        let column = |name: &str, kind| Column {
            name: name.into(),
            identifier: "x".into(),
            kind,
        };
        Rule {
            name: "shop.Orders".into(),
            schema: "shop".into(),
            table: "Ord\"ers".into(),
            columns: vec![
                column("id", Kind::Integer),
                column("mail", Kind::CaseInsensitive("public".into())),
            ],
            clear: clear.iter().map(|c| (*c).to_owned()).collect(),
        }
    }

    #[test]
    fn rows_are_deleted_by_every_column() {
        assert_eq!(
            erase(&rule(&[])),
            "WITH gone AS (DELETE FROM \"shop\".\"Ord\"\"ers\" AS t USING unnest($1::pg_catalog.int4[], \
             $2::pg_catalog.int8[], $3::pg_catalog.text[]::\"public\".citext[]) AS s(n, c0, c1) \
             WHERE t.\"id\" OPERATOR(pg_catalog.=) s.c0 AND t.\"mail\" OPERATOR(\"public\".=) s.c1 RETURNING s.n) \
             SELECT n, pg_catalog.count(*) FROM gone GROUP BY n"
        );
    }

    #[test]
    fn cleared_columns_are_what_a_probe_looks_at() {
        let left = "AND (t.\"a\" IS NOT NULL OR t.\"b\" IS NOT NULL)";
        let erase = erase(&rule(&["a", "b"]));
        assert!(
            erase.contains("SET \"a\" = NULL, \"b\" = NULL FROM unnest("),
            "{erase}"
        );
        assert!(erase.contains(left), "{erase}");
        assert!(probe(&rule(&["a", "b"])).ends_with(&format!("{left})")));
        assert!(!probe(&rule(&[])).contains("NOT NULL"));
    }
}
