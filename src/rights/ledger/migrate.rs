//! The ledger's schema, and how it gets from one version to the next.
//!
//! Owns the order of migrations and who may begin one. Forward only, each in a transaction of its own, one process at a
//! time. An old worker must go on while a new schema is put in place, so a change comes in two releases: one that
//! adds (columns with defaults, functions under new names) and leaves `compatible_since` where it was, and, once
//! nobody runs the older program any more, one that takes away and raises it. docs/ledger.md has the rule.
//! Never: goes back, or changes a schema that is newer than this program.

use anyhow::{Context as _, bail};
use postgres_protocol::escape::escape_identifier;
use tokio_postgres::Client;

use super::error::{LedgerError, SLOW};
use crate::api::names::rights::{Role, owner, role};

/// A step from one version to the next.
struct Migration {
    version: i32,
    name: &'static str,
    /// The oldest version that a program may know and still work with this one.
    compatible_since: i32,
    sql: &'static str,
}

const MIGRATIONS: &[Migration] = &[
    Migration {
        version: 1,
        name: "requests",
        compatible_since: 1,
        sql: include_str!("migrations/0001_requests.sql"),
    },
    Migration {
        version: 2,
        name: "gateway",
        compatible_since: 2,
        sql: include_str!("migrations/0002_gateway.sql"),
    },
    Migration {
        version: 3,
        name: "worker",
        compatible_since: 3,
        sql: include_str!("migrations/0003_worker.sql"),
    },
    Migration {
        version: 4,
        name: "observer",
        compatible_since: 4,
        sql: include_str!("migrations/0004_observer.sql"),
    },
    Migration {
        version: 5,
        name: "vacuum",
        compatible_since: 4,
        sql: include_str!("migrations/0005_vacuum.sql"),
    },
];

/// The version that this program knows, and the least that it needs.
pub const KNOWN: i32 = 5;

/// Any number; all that migrate a ledger use this one.
const LOCK: i64 = 0x0064_6f6d_6963_696c;

/// What came of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Migrated {
    /// It was at this program's version already.
    Current,
    /// From one version to another; 0: there was none.
    From(i32),
    /// It is newer, by this version, and this program can work with it.
    Newer(i32),
}

/// Brings the schema of a workflow's ledger to this program's version. By the superuser, in the workflow's database,
/// which [`roles`](super::roles) made; everything will belong to the ledger's owner.
///
/// # Errors
/// If a statement fails, with PostgreSQL's code; or if the schema is so new that this program can't work with it.
pub async fn migrate(client: &mut Client, workflow: &str) -> anyhow::Result<Migrated> {
    migrate_with(client, workflow, MIGRATIONS).await
}

async fn migrate_with(
    client: &mut Client,
    workflow: &str,
    migrations: &[Migration],
) -> anyhow::Result<Migrated> {
    let known = migrations.last().map_or(0, |m| m.version);
    // Without the lock first: quiet costs nothing.
    let before = version(client).await?;
    if let Some(done) = settled(before, known)? {
        return Ok(done);
    }
    let mut from = None;
    for migration in migrations {
        let transaction = client.transaction().await.map_err(|e| words(&e))?;
        let owner = escape_identifier(&owner(workflow));
        let begin = format!(
            "SET LOCAL lock_timeout = '5s'; SET LOCAL statement_timeout = '60s'; \
             SELECT pg_advisory_xact_lock({LOCK}); SET LOCAL ROLE {owner}; SET LOCAL search_path = pg_catalog; \
             CREATE SCHEMA IF NOT EXISTS ledger; \
             CREATE TABLE IF NOT EXISTS ledger.schema_version ( \
                 version integer PRIMARY KEY, name text NOT NULL, compatible_since integer NOT NULL, \
                 applied_at timestamptz NOT NULL DEFAULT now(), CHECK (compatible_since <= version))"
        );
        transaction
            .batch_execute(&begin)
            .await
            .map_err(|e| words(&e))
            .context("beginning")?;
        // Another may have been here before the lock was ours.
        let now: i32 = transaction
            .query_one(
                "SELECT coalesce(max(version), 0) FROM ledger.schema_version",
                &[],
            )
            .await
            .and_then(|row| row.try_get(0))
            .map_err(|e| words(&e))?;
        let _ = from.get_or_insert(now);
        if now >= migration.version {
            continue;
        }
        if now != migration.version - 1 {
            bail!(
                "the ledger's schema is at version {now}, and migration {} can't begin there",
                migration.version
            );
        }
        transaction
            .batch_execute(migration.sql)
            .await
            .map_err(|e| words(&e))
            .with_context(|| format!("migration {} ({})", migration.version, migration.name))?;
        transaction
            .execute(
                "INSERT INTO ledger.schema_version (version, name, compatible_since) VALUES ($1, $2, $3)",
                &[&migration.version, &migration.name, &migration.compatible_since],
            )
            .await
            .map_err(|e| words(&e))?;
        transaction
            .batch_execute(&grants(workflow))
            .await
            .map_err(|e| words(&e))
            .context("granting what each role may do")?;
        transaction
            .commit()
            .await
            .map_err(|e| words(&e))
            .with_context(|| format!("migration {}", migration.version))?;
    }
    let after = version(client).await?;
    match settled(after, known)? {
        Some(Migrated::Current) => Ok(Migrated::From(from.unwrap_or(0))),
        Some(other) => Ok(other),
        None => bail!("the ledger's schema isn't at version {known} after all migrations"),
    }
}

/// Each role gets the functions of its own schema, and what all may call. A gateway may also count: it tells who asks how
/// many requests there are.
fn grants(workflow: &str) -> String {
    let mut sql = "REVOKE ALL ON SCHEMA ledger FROM PUBLIC;".to_owned();
    for (schemas, who) in [
        (&["gateway", "observer", "shared"][..], Role::Gateway),
        (&["worker", "shared"], Role::Worker),
        (&["observer", "shared"], Role::Observer),
    ] {
        let who = escape_identifier(&role(workflow, who));
        for schema in schemas {
            sql.push_str(&format!(
                "GRANT USAGE ON SCHEMA {schema} TO {who}; GRANT EXECUTE ON ALL FUNCTIONS IN SCHEMA {schema} TO {who};"
            ));
        }
    }
    sql
}

/// The schema's version and what it is compatible with; `None`: there is none.
async fn version(client: &Client) -> anyhow::Result<Option<(i32, i32)>> {
    let made: bool = client
        .query_one(
            "SELECT pg_catalog.to_regclass('ledger.schema_version') IS NOT NULL",
            &[],
        )
        .await
        .and_then(|row| row.try_get(0))
        .map_err(|e| words(&e))?;
    if !made {
        return Ok(None);
    }
    let row = client
        .query_opt(
            "SELECT version, compatible_since FROM ledger.schema_version ORDER BY version DESC LIMIT 1",
            &[],
        )
        .await
        .map_err(|e| words(&e))?;
    Ok(match row {
        Some(row) => Some((
            row.try_get(0).map_err(|e| words(&e))?,
            row.try_get(1).map_err(|e| words(&e))?,
        )),
        None => None,
    })
}

/// What there is to do for a program that knows version `known`: nothing, or `None`: migrate.
fn settled(found: Option<(i32, i32)>, known: i32) -> anyhow::Result<Option<Migrated>> {
    match found {
        Some((version, _)) if version == known => Ok(Some(Migrated::Current)),
        Some((version, since)) if version > known => {
            if since > known {
                bail!(
                    "the ledger's schema is at version {version}, and programs must know at least version {since} to \
                     work with it; this one knows {known}: it is too old, use a newer release of Domicile"
                );
            }
            Ok(Some(Migrated::Newer(version)))
        }
        _ => Ok(None),
    }
}

/// Whether this program can work with the schema that a gateway, worker or observer finds.
pub(super) async fn check(client: &Client) -> Result<(), LedgerError> {
    let query = client.query_one(
        "SELECT version, compatible_since FROM shared.version()",
        &[],
    );
    let row = tokio::time::timeout(std::time::Duration::from_secs(3), query)
        .await
        .map_err(|_| LedgerError::Unavailable(SLOW))??;
    let (version, since): (Option<i32>, Option<i32>) = (row.try_get(0)?, row.try_get(1)?);
    match (version, since) {
        (Some(version), _) if version < KNOWN => Err(LedgerError::Unavailable(
            "its schema is older than this program: the primary's instance manager must be upgraded",
        )),
        (Some(_), Some(since)) if since > KNOWN => Err(LedgerError::Unavailable(
            "its schema is newer than this program can work with: upgrade this program",
        )),
        (Some(_), Some(_)) => Ok(()),
        _ => Err(LedgerError::Unavailable("it isn't prepared")),
    }
}

/// PostgreSQL's code and nothing of its message.
pub(super) fn words(error: &tokio_postgres::Error) -> anyhow::Error {
    match error.code() {
        Some(code) => anyhow::anyhow!("PostgreSQL refused a statement: error {}", code.code()),
        None => anyhow::anyhow!("the connection to PostgreSQL failed"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn migrations_are_numbered_without_a_gap() {
        for (i, migration) in MIGRATIONS.iter().enumerate() {
            assert_eq!(migration.version, i32::try_from(i).unwrap() + 1);
            assert!(migration.compatible_since <= migration.version);
        }
        assert_eq!(MIGRATIONS.last().map(|m| m.version), Some(KNOWN));
    }

    #[test]
    fn a_program_that_is_too_old_is_told_so() {
        assert_eq!(settled(None, 4).unwrap(), None);
        assert_eq!(settled(Some((3, 3)), 4).unwrap(), None);
        assert_eq!(settled(Some((4, 4)), 4).unwrap(), Some(Migrated::Current));
        assert_eq!(settled(Some((6, 4)), 4).unwrap(), Some(Migrated::Newer(6)));
        let e = settled(Some((6, 5)), 4).unwrap_err().to_string();
        assert!(
            e.contains("at least version 5") && e.contains("knows 4"),
            "{e}"
        );
    }
}
