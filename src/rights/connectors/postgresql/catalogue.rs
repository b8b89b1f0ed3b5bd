//! What the database says of the tables that a target lists: whether they can be erased from, and in which order.
//!
//! Owns: which tables, columns and privileges are refused, with words. What is read here is read again with every
//! erasure and every probe, in its own transaction: a table may be dropped, or exchanged for a view, at any time.
//! Never: takes what can't be seen for what isn't there.

use std::collections::HashMap;

use tokio_postgres::Row;

use super::order::{Holds, Key, order};
use super::values::Kind;
use super::{Failure, Reason};
use crate::api::rights_targets::TableErasure;

/// Where a table is that is named without a schema.
const DEFAULT_SCHEMA: &str = "public";
/// What PostgreSQL cuts longer names to.
const LONGEST_NAME: usize = 63;

/// A rule, understood.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Rule {
    /// As the workflow names the table.
    pub name: String,
    /// Its schema.
    pub schema: String,
    /// Its name.
    pub table: String,
    /// All must match.
    pub columns: Vec<Column>,
    /// To be set to NULL; none: rows are deleted.
    pub clear: Vec<String>,
}

/// A column that a rule matches.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Column {
    /// Its name.
    pub name: String,
    /// Name of the identifier that it must equal.
    pub identifier: String,
    /// What it holds.
    pub kind: Kind,
}

/// What is to be done, in its order.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Plan {
    /// In order.
    pub rules: Vec<Rule>,
    /// Whether constraints must wait for the end of the transaction.
    pub defer: bool,
}

/// A table as the catalogue has it.
#[derive(Clone, Debug, Default)]
pub struct Table {
    /// Its number there.
    pub oid: u32,
    /// `relkind`.
    pub kind: String,
    /// Whether rows are hidden from us.
    pub hides: bool,
    /// Whether we may use its schema.
    pub usable: bool,
    /// Whether we may delete from it.
    pub may_delete: bool,
    /// By name.
    pub columns: HashMap<String, Facts>,
}

/// A column as the catalogue has it.
#[derive(Clone, Debug, Default)]
pub struct Facts {
    /// Schema of its type.
    pub type_schema: String,
    /// Its type; a domain's base type.
    pub type_name: String,
    /// Whether it can't be NULL.
    pub not_null: bool,
    /// Whether PostgreSQL computes it.
    pub generated: bool,
    /// Whether we may read it.
    pub may_select: bool,
    /// Whether we may change it.
    pub may_update: bool,
}

/// What was read of the catalogue.
#[derive(Clone, Debug, Default)]
pub struct Catalogue {
    /// By the rule's place.
    pub tables: HashMap<usize, Table>,
    /// Child's and parent's number, and what the key does.
    pub keys: Vec<(u32, u32, Holds)>,
}

/// The names of a rule's table: schema and table.
#[must_use]
pub fn split(name: &str) -> (&str, &str) {
    name.split_once('.').unwrap_or((DEFAULT_SCHEMA, name))
}

/// The tables. Parameters: schemas and names.
pub const TABLES: &str = "SELECT w.n::pg_catalog.int4, c.oid, c.relkind::pg_catalog.text, \
     pg_catalog.row_security_active(c.oid), pg_catalog.has_schema_privilege(c.relnamespace, 'USAGE'), \
     pg_catalog.has_table_privilege(c.oid, 'DELETE') \
     FROM ROWS FROM (unnest($1::pg_catalog.text[], $2::pg_catalog.text[])) WITH ORDINALITY AS w(s, t, n) \
     JOIN pg_catalog.pg_namespace AS s ON s.nspname OPERATOR(pg_catalog.=) w.s::pg_catalog.name \
     JOIN pg_catalog.pg_class AS c ON c.relnamespace OPERATOR(pg_catalog.=) s.oid \
       AND c.relname OPERATOR(pg_catalog.=) w.t::pg_catalog.name";

/// Their columns, as far as rules name them. Parameters: schemas, names, columns.
pub const COLUMNS: &str = "WITH RECURSIVE seen AS ( \
       SELECT a.attrelid, a.attname, a.attnotnull, a.attgenerated, a.atttypid, \
         pg_catalog.has_column_privilege(a.attrelid, a.attnum, 'SELECT') AS may_select, \
         pg_catalog.has_column_privilege(a.attrelid, a.attnum, 'UPDATE') AS may_update \
       FROM (SELECT DISTINCT c.oid FROM unnest($1::pg_catalog.text[], $2::pg_catalog.text[]) AS w(s, t) \
         JOIN pg_catalog.pg_namespace AS s ON s.nspname OPERATOR(pg_catalog.=) w.s::pg_catalog.name \
         JOIN pg_catalog.pg_class AS c ON c.relnamespace OPERATOR(pg_catalog.=) s.oid \
           AND c.relname OPERATOR(pg_catalog.=) w.t::pg_catalog.name) AS r \
       JOIN pg_catalog.pg_attribute AS a ON a.attrelid OPERATOR(pg_catalog.=) r.oid \
       WHERE a.attnum OPERATOR(pg_catalog.>) 0 AND NOT a.attisdropped \
         AND a.attname::pg_catalog.text OPERATOR(pg_catalog.=) ANY ($3::pg_catalog.text[])), \
     base(domain, oid) AS ( \
       SELECT DISTINCT atttypid, atttypid FROM seen \
       UNION ALL SELECT b.domain, t.typbasetype FROM base AS b \
         JOIN pg_catalog.pg_type AS t ON t.oid OPERATOR(pg_catalog.=) b.oid AND t.typtype::pg_catalog.text OPERATOR(pg_catalog.=) 'd') \
     SELECT c.attrelid, c.attname::pg_catalog.text, n.nspname::pg_catalog.text, t.typname::pg_catalog.text, \
       c.attnotnull, c.attgenerated::pg_catalog.text OPERATOR(pg_catalog.<>) '', c.may_select, c.may_update \
     FROM seen AS c JOIN base AS b ON b.domain OPERATOR(pg_catalog.=) c.atttypid \
     JOIN pg_catalog.pg_type AS t ON t.oid OPERATOR(pg_catalog.=) b.oid AND t.typtype::pg_catalog.text OPERATOR(pg_catalog.<>) 'd' \
     JOIN pg_catalog.pg_namespace AS n ON n.oid OPERATOR(pg_catalog.=) t.typnamespace";

/// Foreign keys between them, those of their partitions included. Parameters: schemas and names.
pub const KEYS: &str = "WITH listed AS (SELECT DISTINCT c.oid \
       FROM unnest($1::pg_catalog.text[], $2::pg_catalog.text[]) AS w(s, t) \
       JOIN pg_catalog.pg_namespace AS s ON s.nspname OPERATOR(pg_catalog.=) w.s::pg_catalog.name \
       JOIN pg_catalog.pg_class AS c ON c.relnamespace OPERATOR(pg_catalog.=) s.oid \
         AND c.relname OPERATOR(pg_catalog.=) w.t::pg_catalog.name), \
     part AS (SELECT l.oid AS listed, l.oid AS rel FROM listed AS l \
       UNION SELECT l.oid, p.relid::pg_catalog.oid FROM listed AS l, pg_catalog.pg_partition_tree(l.oid) AS p) \
     SELECT DISTINCT child.listed, parent.listed, k.confdeltype::pg_catalog.text, k.condeferrable \
     FROM pg_catalog.pg_constraint AS k \
     JOIN part AS child ON child.rel OPERATOR(pg_catalog.=) k.conrelid \
     JOIN part AS parent ON parent.rel OPERATOR(pg_catalog.=) k.confrelid \
     WHERE k.contype::pg_catalog.text OPERATOR(pg_catalog.=) 'f'";

impl Catalogue {
    /// From the answers to [`TABLES`], [`COLUMNS`] and [`KEYS`].
    ///
    /// # Errors
    /// If an answer hasn't the form asked for.
    pub fn from_rows(
        tables: &[Row],
        columns: &[Row],
        keys: &[Row],
    ) -> Result<Self, tokio_postgres::Error> {
        let mut by_oid: HashMap<u32, HashMap<String, Facts>> = HashMap::new();
        for row in columns {
            let facts = Facts {
                type_schema: row.try_get(2)?,
                type_name: row.try_get(3)?,
                not_null: row.try_get(4)?,
                generated: row.try_get(5)?,
                may_select: row.try_get(6)?,
                may_update: row.try_get(7)?,
            };
            let of = by_oid.entry(row.try_get(0)?).or_default();
            of.insert(row.try_get(1)?, facts);
        }
        let mut seen = Self::default();
        for row in tables {
            let place: i32 = row.try_get(0)?;
            let oid = row.try_get(1)?;
            let table = Table {
                oid,
                kind: row.try_get(2)?,
                hides: row.try_get(3)?,
                usable: row.try_get(4)?,
                may_delete: row.try_get(5)?,
                columns: by_oid.get(&oid).cloned().unwrap_or_default(),
            };
            // Counted from 1.
            if let Some(place) = usize::try_from(place).ok().and_then(|p| p.checked_sub(1)) {
                seen.tables.insert(place, table);
            }
        }
        for row in keys {
            let (action, deferrable): (String, bool) = (row.try_get(2)?, row.try_get(3)?);
            let holds = match (action.as_str(), deferrable) {
                ("c" | "n" | "d", _) => Holds::Never,
                // RESTRICT is checked at once even where the key is deferrable.
                ("a", true) => Holds::AtTheEnd,
                _ => Holds::AtOnce,
            };
            seen.keys.push((row.try_get(0)?, row.try_get(1)?, holds));
        }
        Ok(seen)
    }

    /// What to do.
    ///
    /// # Errors
    /// If a table or column is missing, can't be erased from, or can't be seen whole.
    pub fn plan(&self, rules: &[TableErasure]) -> Result<Plan, Failure> {
        let mut understood = Vec::with_capacity(rules.len());
        let mut oids: Vec<u32> = Vec::new();
        let mut node = Vec::with_capacity(rules.len());
        for (place, rule) in rules.iter().enumerate() {
            let table = self
                .tables
                .get(&place)
                .ok_or_else(|| missing(&rule.table))?;
            understood.push(understand(rule, table)?);
            let at = oids.iter().position(|o| *o == table.oid);
            node.push(at.unwrap_or(oids.len()));
            if at.is_none() {
                oids.push(table.oid);
            }
        }
        let at = |oid| oids.iter().position(|o| *o == oid);
        let keys: Vec<Key> = self
            .keys
            .iter()
            .filter_map(|(child, parent, holds)| {
                Some(Key {
                    child: at(*child)?,
                    parent: at(*parent)?,
                    holds: *holds,
                })
            })
            .collect();
        let name = |table: &usize| {
            let place = node.iter().position(|n| n == table);
            let rule = place.and_then(|p| rules.get(p));
            rule.map_or("?", |r| r.table.as_str())
        };
        let order = order(oids.len(), &keys).map_err(|circle| {
            let names: Vec<&str> = circle.iter().map(name).collect();
            refused(format!(
                "the foreign keys of {} go in a circle, so none can be emptied first: make one of them DEFERRABLE, or \
                 ON DELETE CASCADE or SET NULL",
                names.join(", ")
            ))
        })?;
        let mut ordered = Vec::with_capacity(rules.len());
        for table in &order.tables {
            for (rule, of) in understood.iter().zip(&node) {
                if of == table {
                    ordered.push(rule.clone());
                }
            }
        }
        Ok(Plan {
            rules: ordered,
            defer: order.defer,
        })
    }
}

fn refused(words: String) -> Failure {
    Failure::new(Reason::Refused, words)
}

fn missing(table: &str) -> Failure {
    let (schema, name) = split(table);
    Failure::new(
        Reason::Missing,
        format!(
            "there is no table {name} in schema {schema}: create it, or correct or remove it in the workflow (names are \
             taken literally, upper and lower case included)"
        ),
    )
}

fn understand(rule: &TableErasure, table: &Table) -> Result<Rule, Failure> {
    let name = &rule.table;
    let (schema, short) = split(name);
    if schema.len() > LONGEST_NAME || short.len() > LONGEST_NAME {
        // The catalogue was asked for the name cut off, which may be another table.
        return Err(missing(name));
    }
    match table.kind.as_str() {
        "r" | "p" => {}
        "v" | "m" => {
            return Err(refused(format!(
                "{name} is a view, which may hide rows: name the tables beneath it"
            )));
        }
        "f" => {
            return Err(refused(format!(
                "{name} is a foreign table: make the server that its rows are on a target of its own"
            )));
        }
        _ => return Err(refused(format!("{name} isn't a table"))),
    }
    if table.hides {
        return Err(refused(format!(
            "row-level security of {name} may hide rows from the worker's role, so nobody could say that they are gone: \
             only a role with BYPASSRLS can erase from it"
        )));
    }
    if !table.usable {
        return Err(refused(format!(
            "the worker's role may not use schema {schema}: GRANT USAGE ON SCHEMA is missing"
        )));
    }
    if rule.columns.is_empty() {
        return Err(refused(format!(
            "the rule of {name} has no column, so every row would match"
        )));
    }
    if rule.clear_columns.is_empty() && !table.may_delete {
        return Err(refused(format!(
            "the worker's role may not delete from {name}: GRANT DELETE is missing"
        )));
    }
    let facts = |column: &str| {
        table.columns.get(column).ok_or_else(|| {
            Failure::new(
                Reason::Missing,
                format!(
                    "table {name} has no column {column}: correct it in the workflow (names are taken literally, upper \
                     and lower case included)"
                ),
            )
        })
    };
    let readable = |column: &str, facts: &Facts| {
        if facts.may_select {
            Ok(())
        } else {
            Err(refused(format!(
                "the worker's role may not read {name}.{column}, so nobody could say what is there: GRANT SELECT is \
                 missing"
            )))
        }
    };
    let mut columns = Vec::with_capacity(rule.columns.len());
    for (column, identifier) in &rule.columns {
        let facts = facts(column)?;
        readable(column, facts)?;
        let kind = Kind::of(&facts.type_schema, &facts.type_name).ok_or_else(|| {
            refused(format!(
                "{name}.{column} is of type {}, which can't be compared with an identifier: smallint, integer, bigint, \
                 numeric, uuid, text, varchar, char and citext can",
                facts.type_name
            ))
        })?;
        columns.push(Column {
            name: column.clone(),
            identifier: identifier.clone(),
            kind,
        });
    }
    for column in &rule.clear_columns {
        let facts = facts(column)?;
        readable(column, facts)?;
        if !facts.may_update {
            return Err(refused(format!(
                "the worker's role may not change {name}.{column}: GRANT UPDATE is missing"
            )));
        }
        if facts.not_null || facts.generated {
            let why = if facts.generated {
                "is computed by PostgreSQL"
            } else {
                "is NOT NULL"
            };
            return Err(refused(format!(
                "{name}.{column} {why}, so it can't be cleared: take it out of clearColumns, or change the table"
            )));
        }
    }
    Ok(Rule {
        name: name.clone(),
        schema: schema.to_owned(),
        table: short.to_owned(),
        columns,
        clear: rule.clear_columns.clone(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rule(table: &str, column: &str, clear: &[&str]) -> TableErasure {
        TableErasure {
            table: table.into(),
            columns: [(column.to_owned(), "customerId".to_owned())].into(),
            clear_columns: clear.iter().map(|c| (*c).to_owned()).collect(),
        }
    }

    fn table(oid: u32) -> Table {
        let facts = |type_name: &str| Facts {
            type_schema: "pg_catalog".into(),
            type_name: type_name.into(),
            may_select: true,
            may_update: true,
            ..Facts::default()
        };
        Table {
            oid,
            kind: "r".into(),
            usable: true,
            may_delete: true,
            columns: [
                ("id".to_owned(), facts("int8")),
                ("name".to_owned(), facts("text")),
                ("photo".to_owned(), facts("bytea")),
            ]
            .into(),
            ..Table::default()
        }
    }

    fn plan(change: impl FnOnce(&mut Table), rule: TableErasure) -> Result<Plan, Failure> {
        let mut table = table(7);
        change(&mut table);
        let seen = Catalogue {
            tables: [(0, table)].into(),
            keys: Vec::new(),
        };
        seen.plan(&[rule])
    }

    #[test]
    fn what_cant_be_erased_from_is_said() {
        type Change = fn(&mut Table);
        let cases: [(Change, TableErasure, Reason, &str); 12] = [
            (
                |t| t.kind = "v".into(),
                rule("a", "id", &[]),
                Reason::Refused,
                "is a view",
            ),
            (
                |t| t.kind = "f".into(),
                rule("a", "id", &[]),
                Reason::Refused,
                "foreign table",
            ),
            (
                |t| t.kind = "S".into(),
                rule("a", "id", &[]),
                Reason::Refused,
                "isn't a table",
            ),
            (
                |t| t.hides = true,
                rule("a", "id", &[]),
                Reason::Refused,
                "BYPASSRLS",
            ),
            (
                |t| t.usable = false,
                rule("s.a", "id", &[]),
                Reason::Refused,
                "schema s:",
            ),
            (
                |t| t.may_delete = false,
                rule("a", "id", &[]),
                Reason::Refused,
                "GRANT DELETE",
            ),
            (
                |t| t.columns.get_mut("id").unwrap().may_select = false,
                rule("a", "id", &[]),
                Reason::Refused,
                "GRANT SELECT",
            ),
            (
                |t| t.columns.get_mut("name").unwrap().may_update = false,
                rule("a", "id", &["name"]),
                Reason::Refused,
                "GRANT UPDATE",
            ),
            (
                |t| t.columns.get_mut("name").unwrap().not_null = true,
                rule("a", "id", &["name"]),
                Reason::Refused,
                "a.name is NOT NULL",
            ),
            (
                |_| {},
                rule("a", "photo", &[]),
                Reason::Refused,
                "of type bytea",
            ),
            (
                |_| {},
                rule("a", "ID", &[]),
                Reason::Missing,
                "no column ID",
            ),
            (
                |_| {},
                rule(&"a".repeat(64), "id", &[]),
                Reason::Missing,
                "no table",
            ),
        ];
        for (change, rule, reason, words) in cases {
            let failure = plan(change, rule).unwrap_err();
            assert_eq!(failure.reason, reason, "{failure}");
            assert!(failure.detail.contains(words), "{failure}");
        }
        assert!(plan(|t| t.may_delete = false, rule("a", "id", &["name"])).is_ok());
        let failure = Catalogue::default()
            .plan(&[rule("s.a", "id", &[])])
            .unwrap_err();
        assert_eq!(failure.reason, Reason::Missing);
        assert!(
            failure.detail.contains("no table a in schema s:"),
            "{failure}"
        );
    }

    #[test]
    fn rules_of_one_table_stay_together_and_children_go_first() {
        let seen = Catalogue {
            tables: [(0, table(1)), (1, table(2)), (2, table(1))].into(),
            keys: vec![(2, 1, Holds::AtOnce)],
        };
        let rules = [
            rule("people", "id", &[]),
            rule("orders", "id", &[]),
            rule("people", "name", &[]),
        ];
        let plan = seen.plan(&rules).unwrap();
        let names: Vec<_> = plan
            .rules
            .iter()
            .map(|r| (r.name.as_str(), r.columns[0].name.as_str()))
            .collect();
        assert_eq!(
            names,
            [("orders", "id"), ("people", "id"), ("people", "name")]
        );
    }

    #[test]
    fn a_circle_is_refused_by_name() {
        let seen = Catalogue {
            tables: [(0, table(1)), (1, table(2))].into(),
            keys: vec![(2, 1, Holds::AtOnce), (1, 2, Holds::AtOnce)],
        };
        let rules = [rule("people", "id", &[]), rule("shop.orders", "id", &[])];
        let failure = seen.plan(&rules).unwrap_err();
        assert_eq!(failure.reason, Reason::Refused);
        assert!(
            failure
                .detail
                .contains("people, shop.orders go in a circle"),
            "{failure}"
        );
    }
}
