//! Roles and database: what is made in a new database cluster, and the application's password.
//!
//! Owns the replication role, the application's role and its database. Never: grants anything else, sends a
//! password in clear to PostgreSQL (its SCRAM verifier is made here), or changes a role of PostgreSQL's own.

use anyhow::bail;
use postgres_protocol::escape::{escape_identifier, escape_literal};
use postgres_protocol::password::scram_sha_256;

use super::session::Session;
use super::tls::Credentials;
use crate::api::names::{REPLICATION_ROLE, SUPERUSER};
use crate::api::privacy_data_store::Database;

/// Makes the role by which standbys stream, if it isn't there.
///
/// # Errors
/// As PostgreSQL's.
pub async fn replication(session: &Session) -> anyhow::Result<()> {
    if role_exists(session, REPLICATION_ROLE).await? {
        return Ok(());
    }
    session
        .execute(&format!("CREATE ROLE {REPLICATION_ROLE} LOGIN REPLICATION"))
        .await
}

/// Makes the application's role, if it isn't there, and gives it the Secret's password.
///
/// # Errors
/// As PostgreSQL's, or if the names can't be.
pub async fn application(
    session: &Session,
    database: &Database,
    credentials: &Credentials,
) -> anyhow::Result<()> {
    check(database)?;
    if credentials.username != database.owner {
        bail!(
            "the username in the application's Secret isn't database.owner: set it to that, the password \
             wasn't applied"
        );
    }
    let verb = if role_exists(session, &database.owner).await? {
        "ALTER"
    } else {
        "CREATE"
    };
    // As a parameter, and from there by name: a statement's text is shown in pg_stat_activity, and libraries
    // log it when they are asked to.
    let verifier = scram_sha_256(credentials.password.as_bytes());
    session.set(VERIFIER, &verifier).await?;
    let body = format!(
        "BEGIN EXECUTE format('{verb} ROLE %I LOGIN PASSWORD %L', {}, current_setting('{VERIFIER}')); END",
        escape_literal(&database.owner)
    );
    let done = session
        .execute(&format!("DO {}", escape_literal(&body)))
        .await;
    session.set(VERIFIER, "").await?;
    done
}

/// The setting that carries a password's verifier from a parameter into a statement.
const VERIFIER: &str = "domicile.verifier";

/// Makes the application's database, if it isn't there.
///
/// # Errors
/// As PostgreSQL's, or if the names can't be.
pub async fn database(session: &Session, database: &Database) -> anyhow::Result<()> {
    check(database)?;
    if session
        .any(
            "SELECT 1 FROM pg_database WHERE datname = $1",
            &[&database.name],
        )
        .await?
    {
        return Ok(());
    }
    // It copies files, which can take longer than a statement may.
    session
        .execute_within(
            &format!(
                "CREATE DATABASE {} OWNER {}",
                escape_identifier(&database.name),
                escape_identifier(&database.owner)
            ),
            std::time::Duration::from_secs(60),
        )
        .await
}

/// The schema refuses these names, but an object may be older than its schema, and giving the superuser the
/// application's password would hand the whole store over.
fn check(database: &Database) -> anyhow::Result<()> {
    let own = [SUPERUSER, REPLICATION_ROLE];
    if own.contains(&database.owner.as_str())
        || database.owner.starts_with("pg_")
        || ["postgres", "template0", "template1"].contains(&database.name.as_str())
    {
        bail!(
            "database.name or database.owner is a name of PostgreSQL's or Domicile's own: choose another"
        );
    }
    Ok(())
}

async fn role_exists(session: &Session, role: &str) -> anyhow::Result<bool> {
    session
        .any("SELECT 1 FROM pg_roles WHERE rolname = $1", &[role])
        .await
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn own_names_are_refused() {
        let of = |name: &str, owner: &str| {
            check(&Database {
                name: name.into(),
                owner: owner.into(),
            })
        };
        assert!(of("app", "app").is_ok());
        for (name, owner) in [
            ("app", "postgres"),
            ("app", "domicile_replication"),
            ("app", "pg_x"),
            ("postgres", "app"),
        ] {
            assert!(of(name, owner).is_err(), "{name} {owner}");
        }
    }
}
