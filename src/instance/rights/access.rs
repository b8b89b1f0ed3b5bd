//! The rights of workers to tables of the application.
//!
//! Owns which there are: those that the workflows ask for, on tables that are there, and no others; and the function by
//! which workers learn how far standbys have replayed. All in one transaction: at no moment has a worker more, or less of
//! what it keeps.
//! Never: grants on a table whose row-level security would hide rows (what isn't seen would pass for erased), or calls
//! anything that the application made.

use std::collections::{BTreeMap, BTreeSet};

use postgres_protocol::escape::{escape_identifier, escape_literal};
use tokio_postgres::{Client, Transaction};

use super::Wanted;
use crate::api::names::REPLICATION_ROLE;
use crate::api::names::rights::{Role, role};
use crate::api::privacy_data_store::TableAccess;
use crate::instance::session::without_words;

/// Schema of what Domicile adds to the application's database.
const SCHEMA: &str = "domicile";
/// The function in it.
const FUNCTION: &str = "domicile.replayed(pg_lsn)";
/// Where tables are whose schema isn't given.
const DEFAULT_SCHEMA: &str = "public";
/// So many of what is missing are named.
const NAMED: usize = 5;

/// A right: on a table, or on one of its columns.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Right {
    schema: String,
    table: String,
    privilege: String,
    column: Option<String>,
}

/// What is there of a table.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct Table {
    /// PostgreSQL's letter: r, p, v, …
    kind: String,
    row_security: bool,
    columns: BTreeSet<String>,
}

type Tables = BTreeMap<(String, String), Table>;

/// Brings the rights of `members` in this database to what is wanted. What is missing, in words.
///
/// # Errors
/// PostgreSQL's code; nothing is changed then.
pub async fn apply(
    client: &mut Client,
    wanted: &Wanted,
    members: &BTreeSet<String>,
) -> anyhow::Result<Vec<String>> {
    let transaction = client.transaction().await.map_err(|e| without_words(&e))?;
    let mut words = Vec::new();
    let mut workers = BTreeMap::new();
    for workflow in wanted.workflows.iter().filter(|w| !w.tables.is_empty()) {
        let named: Vec<(String, String)> =
            workflow.tables.iter().map(|t| split(&t.table)).collect();
        let tables = tables(&transaction, &named).await?;
        let (rights, missing) = rights(&workflow.tables, &tables);
        if !missing.is_empty() {
            words.push(told(&workflow.workflow, &wanted.database, &missing));
        }
        workers.insert(role(&workflow.workflow, Role::Worker), rights);
    }
    let callable = !workers.is_empty() && function(&transaction).await?;
    if !workers.is_empty() && !callable {
        words.push(format!(
            "schema {SCHEMA} of database {} is somebody else's: workers can't learn what standbys have replayed; rename it",
            wanted.database
        ));
    }
    let mut sql = String::new();
    for member in members {
        let rights = workers.get(member);
        let found = found(&transaction, member).await?;
        let usages = usages(&transaction, member).await?;
        let none = BTreeSet::new();
        let calls = callable && rights.is_some();
        sql.push_str(&changes(
            member,
            &found,
            rights.unwrap_or(&none),
            &usages,
            calls,
        ));
        let who = escape_identifier(member);
        match (may_call(&transaction, member).await?, calls) {
            (true, false) => {
                sql.push_str(&format!("REVOKE ALL ON FUNCTION {FUNCTION} FROM {who};"));
            }
            (false, true) => {
                sql.push_str(&format!("GRANT EXECUTE ON FUNCTION {FUNCTION} TO {who};"));
            }
            _ => {}
        }
    }
    if !sql.is_empty() {
        transaction
            .batch_execute(&sql)
            .await
            .map_err(|e| without_words(&e))?;
    }
    transaction.commit().await.map_err(|e| without_words(&e))?;
    Ok(words)
}

/// Schema and table of a name as a workflow has it.
fn split(name: &str) -> (String, String) {
    let (schema, table) = name.split_once('.').unwrap_or((DEFAULT_SCHEMA, name));
    (schema.to_owned(), table.to_owned())
}

/// The rights that are wanted on what is there, and what isn't, in words.
fn rights(wanted: &[TableAccess], tables: &Tables) -> (BTreeSet<Right>, Vec<String>) {
    let mut rights = BTreeSet::new();
    let mut missing = Vec::new();
    for access in wanted {
        let (schema, name) = split(&access.table);
        let Some(table) = tables.get(&(schema.clone(), name.clone())) else {
            missing.push(format!("table {} isn't there", access.table));
            continue;
        };
        if !["r", "p"].contains(&table.kind.as_str()) {
            missing.push(format!("{} is no table", access.table));
            continue;
        }
        if table.row_security {
            missing.push(format!(
                "table {} has row-level security, which would hide rows from the workers",
                access.table
            ));
            continue;
        }
        let mut add = |privilege: &str, column: Option<&String>| {
            rights.insert(Right {
                schema: schema.clone(),
                table: name.clone(),
                privilege: privilege.to_owned(),
                column: column.cloned(),
            });
        };
        add("SELECT", None);
        if access.delete {
            add("DELETE", None);
        }
        for column in &access.clear_columns {
            if table.columns.contains(column) {
                add("UPDATE", Some(column));
            } else {
                missing.push(format!("table {} has no column {column}", access.table));
            }
        }
    }
    (rights, missing)
}

fn told(workflow: &str, database: &str, missing: &[String]) -> String {
    let named = missing.iter().take(NAMED).cloned().collect::<Vec<_>>();
    let more = match missing.len().saturating_sub(NAMED) {
        0 => String::new(),
        more => format!(", and {more} more like these"),
    };
    format!(
        "workflow {workflow} can't erase from all of database {database}: {}{more}; requests wait until that is mended",
        named.join(", ")
    )
}

/// The statements that bring a role's rights from what it has to what is wanted.
fn changes(
    member: &str,
    found: &BTreeSet<Right>,
    wanted: &BTreeSet<Right>,
    usages: &BTreeSet<String>,
    calls: bool,
) -> String {
    let who = escape_identifier(member);
    let mut sql = String::new();
    let on = |right: &Right| {
        let column = right.column.as_deref();
        let column = column.map_or_else(String::new, |c| format!(" ({})", escape_identifier(c)));
        format!(
            "{}{column} ON TABLE {}.{}",
            right.privilege,
            escape_identifier(&right.schema),
            escape_identifier(&right.table)
        )
    };
    for right in found.difference(wanted) {
        sql.push_str(&format!("REVOKE {} FROM {who} CASCADE;", on(right)));
    }
    for right in wanted.difference(found) {
        sql.push_str(&format!("GRANT {} TO {who};", on(right)));
    }
    let mut schemas: BTreeSet<String> = wanted.iter().map(|r| r.schema.clone()).collect();
    if calls {
        schemas.insert(SCHEMA.to_owned());
    }
    for schema in usages.difference(&schemas) {
        let schema = escape_identifier(schema);
        sql.push_str(&format!(
            "REVOKE ALL ON SCHEMA {schema} FROM {who} CASCADE;"
        ));
    }
    for schema in schemas.difference(usages) {
        let schema = escape_identifier(schema);
        sql.push_str(&format!("GRANT USAGE ON SCHEMA {schema} TO {who};"));
    }
    sql
}

/// What is there of these tables.
async fn tables(
    transaction: &Transaction<'_>,
    named: &[(String, String)],
) -> anyhow::Result<Tables> {
    let (schemas, names): (Vec<&str>, Vec<&str>) = named
        .iter()
        .map(|(schema, name)| (schema.as_str(), name.as_str()))
        .unzip();
    let rows = transaction
        .query(
            "SELECT w.schema, w.name, c.relkind::text, c.relrowsecurity, \
               ARRAY(SELECT a.attname::text FROM pg_attribute a \
                     WHERE a.attrelid = c.oid AND a.attnum > 0 AND NOT a.attisdropped) \
             FROM unnest($1::text[], $2::text[]) AS w(schema, name) \
             JOIN pg_namespace n ON n.nspname = w.schema::name \
             JOIN pg_class c ON c.relnamespace = n.oid AND c.relname = w.name::name",
            &[&schemas, &names],
        )
        .await
        .map_err(|e| without_words(&e))?;
    rows.iter()
        .map(|row| {
            let columns: Vec<String> = row.try_get(4)?;
            let table = Table {
                kind: row.try_get(2)?,
                row_security: row.try_get(3)?,
                columns: columns.into_iter().collect(),
            };
            Ok(((row.try_get(0)?, row.try_get(1)?), table))
        })
        .collect::<Result<_, tokio_postgres::Error>>()
        .map_err(|e| without_words(&e))
}

/// The rights that a role has on tables and columns of this database, whoever granted them.
async fn found(transaction: &Transaction<'_>, member: &str) -> anyhow::Result<BTreeSet<Right>> {
    let rows = transaction
        .query(
            "SELECT n.nspname::text, c.relname::text, x.privilege_type, NULL::text \
             FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace, aclexplode(c.relacl) x \
             WHERE x.grantee = (SELECT oid FROM pg_roles WHERE rolname = $1::text::name) AND c.relkind <> 'S' \
             UNION \
             SELECT n.nspname::text, c.relname::text, x.privilege_type, a.attname::text \
             FROM pg_attribute a JOIN pg_class c ON c.oid = a.attrelid \
             JOIN pg_namespace n ON n.oid = c.relnamespace, aclexplode(a.attacl) x \
             WHERE x.grantee = (SELECT oid FROM pg_roles WHERE rolname = $1::text::name) AND NOT a.attisdropped",
            &[&member],
        )
        .await
        .map_err(|e| without_words(&e))?;
    rows.iter()
        .map(|row| {
            Ok(Right {
                schema: row.try_get(0)?,
                table: row.try_get(1)?,
                privilege: row.try_get(2)?,
                column: row.try_get(3)?,
            })
        })
        .collect::<Result<_, tokio_postgres::Error>>()
        .map_err(|e| without_words(&e))
}

/// The schemas that a role was granted the use of.
async fn usages(transaction: &Transaction<'_>, member: &str) -> anyhow::Result<BTreeSet<String>> {
    let rows = transaction
        .query(
            "SELECT n.nspname::text FROM pg_namespace n, aclexplode(n.nspacl) x \
             WHERE x.grantee = (SELECT oid FROM pg_roles WHERE rolname = $1::text::name)",
            &[&member],
        )
        .await
        .map_err(|e| without_words(&e))?;
    rows.iter()
        .map(|row| row.try_get(0))
        .collect::<Result<_, tokio_postgres::Error>>()
        .map_err(|e| without_words(&e))
}

/// The body of the function. Only standbys count, and only those that stream: of one that is away nothing is known.
fn body() -> String {
    format!(
        " SELECT count(*)::integer, (count(*) FILTER (WHERE r.replay_lsn >= $1))::integer \
         FROM pg_catalog.pg_stat_replication r WHERE r.state = 'streaming' AND r.usename = '{REPLICATION_ROLE}' "
    )
}

/// `domicile.replayed(position)`: how many standbys stream, and how many of them have replayed up to there. Workers may
/// not see the whole of pg_stat_replication, which would also tell them who else is connected. False: the schema is
/// somebody else's, who could put anything in the function's place.
async fn function(transaction: &Transaction<'_>) -> anyhow::Result<bool> {
    let row = transaction
        .query_one(
            "SELECT (SELECT n.nspowner = (SELECT oid FROM pg_roles WHERE rolname = current_user) \
                     FROM pg_namespace n WHERE n.nspname = $1::text::name), \
               EXISTS (SELECT FROM pg_proc p JOIN pg_namespace n ON n.oid = p.pronamespace \
                 WHERE n.nspname = $1::text::name AND p.proname = 'replayed' AND p.prosecdef AND p.prosrc = $2 \
                   AND p.proowner = (SELECT oid FROM pg_roles WHERE rolname = current_user))",
            &[&SCHEMA, &body()],
        )
        .await
        .map_err(|e| without_words(&e))?;
    let ours: Option<bool> = row.try_get(0).map_err(|e| without_words(&e))?;
    let there: bool = row.try_get(1).map_err(|e| without_words(&e))?;
    if ours == Some(false) {
        return Ok(false);
    }
    if !there {
        let schema = escape_identifier(SCHEMA);
        let sql = format!(
            "CREATE SCHEMA IF NOT EXISTS {schema}; REVOKE ALL ON SCHEMA {schema} FROM PUBLIC; \
             DROP FUNCTION IF EXISTS {schema}.replayed(pg_lsn); \
             CREATE FUNCTION {schema}.replayed(\"position\" pg_lsn) RETURNS TABLE(standbys integer, replayed integer) \
             LANGUAGE sql STABLE STRICT SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS {}; \
             REVOKE ALL ON FUNCTION {FUNCTION} FROM PUBLIC;",
            escape_literal(&body())
        );
        transaction
            .batch_execute(&sql)
            .await
            .map_err(|e| without_words(&e))?;
    }
    Ok(true)
}

/// Whether a role was granted the function.
async fn may_call(transaction: &Transaction<'_>, member: &str) -> anyhow::Result<bool> {
    let row = transaction
        .query_one(
            "SELECT EXISTS (SELECT FROM pg_proc p JOIN pg_namespace n ON n.oid = p.pronamespace, aclexplode(p.proacl) x \
               WHERE n.nspname = $2::text::name AND p.proname = 'replayed' \
                 AND x.grantee = (SELECT oid FROM pg_roles WHERE rolname = $1::text::name))",
            &[&member, &SCHEMA],
        )
        .await
        .map_err(|e| without_words(&e))?;
    row.try_get(0).map_err(|e| without_words(&e))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn access(table: &str, delete: bool, clear: &[&str]) -> TableAccess {
        TableAccess {
            table: table.into(),
            delete,
            clear_columns: clear.iter().map(|c| (*c).to_owned()).collect(),
        }
    }

    fn table(kind: &str, row_security: bool, columns: &[&str]) -> Table {
        Table {
            kind: kind.into(),
            row_security,
            columns: columns.iter().map(|c| (*c).to_owned()).collect(),
        }
    }

    fn there(all: &[(&str, Table)]) -> Tables {
        all.iter()
            .map(|(name, table)| (split(name), table.clone()))
            .collect()
    }

    #[test]
    fn what_is_asked_for_is_granted_on_what_is_there() {
        let tables = there(&[
            ("customer", table("r", false, &["id"])),
            ("shop.orders", table("p", false, &["id", "name"])),
            ("hidden", table("r", true, &["id"])),
            ("seen", table("v", false, &["id"])),
        ]);
        let wanted = [
            access("customer", true, &[]),
            access("shop.orders", false, &["name", "gone"]),
            access("hidden", true, &[]),
            access("seen", true, &[]),
            access("nowhere", true, &[]),
        ];
        let (rights, missing) = rights(&wanted, &tables);
        let sql = changes("w", &BTreeSet::new(), &rights, &BTreeSet::new(), true);
        assert_eq!(
            sql.split_terminator(';').collect::<Vec<_>>(),
            [
                "GRANT DELETE ON TABLE \"public\".\"customer\" TO \"w\"",
                "GRANT SELECT ON TABLE \"public\".\"customer\" TO \"w\"",
                "GRANT SELECT ON TABLE \"shop\".\"orders\" TO \"w\"",
                "GRANT UPDATE (\"name\") ON TABLE \"shop\".\"orders\" TO \"w\"",
                "GRANT USAGE ON SCHEMA \"domicile\" TO \"w\"",
                "GRANT USAGE ON SCHEMA \"public\" TO \"w\"",
                "GRANT USAGE ON SCHEMA \"shop\" TO \"w\"",
            ]
        );
        assert_eq!(
            told("consumers", "app", &missing),
            "workflow consumers can't erase from all of database app: table shop.orders has no column gone, table \
             hidden has row-level security, which would hide rows from the workers, seen is no table, table nowhere \
             isn't there; requests wait until that is mended"
        );
    }

    fn any_rights() -> impl Strategy<Value = BTreeSet<Right>> {
        let right = (
            "[ab]",
            "[tu]",
            "SELECT|DELETE|UPDATE",
            proptest::option::of("[xy]"),
        )
            .prop_map(|(schema, table, privilege, column)| Right {
                schema,
                table,
                privilege,
                column,
            });
        prop::collection::btree_set(right, 0..8)
    }

    proptest! {
        /// Every statement grants something that is wanted and wasn't there, or revokes something that was there and
        /// isn't wanted; what is as it should be costs none.
        #[test]
        fn nothing_is_granted_that_is_not_wanted(found in any_rights(), wanted in any_rights()) {
            let none = BTreeSet::new();
            let sql = changes("w", &found, &wanted, &none, false);
            let on_tables = sql.split_terminator(';').filter(|s| s.contains(" ON TABLE "));
            prop_assert_eq!(on_tables.count(), found.symmetric_difference(&wanted).count());
            let schemas: BTreeSet<String> = wanted.iter().map(|r| r.schema.clone()).collect();
            prop_assert_eq!(changes("w", &wanted, &wanted, &schemas, false), "");
        }
    }
}
