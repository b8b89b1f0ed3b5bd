//! Roles and database of a ledger, by the superuser.
//!
//! Owns who exists and who may connect. Everything can be said again and changes nothing then.
//! Never: gives a role a password, or a right on a table.

use postgres_protocol::escape::{escape_identifier, escape_literal};
use tokio_postgres::Client;

use super::migrate::words;
use crate::api::names::rights::{GROUP_ROLE, Role, database, owner, role};

/// What a role of ours is, and nothing more.
const NOTHING_MORE: &str =
    "NOSUPERUSER NOCREATEDB NOCREATEROLE NOREPLICATION NOBYPASSRLS PASSWORD NULL";

/// Makes the roles of a workflow, and the group that says they come by certificate. In any database.
#[must_use]
pub fn roles(workflow: &str) -> String {
    let mut body = "BEGIN ".to_owned();
    ensure(&mut body, GROUP_ROLE, false);
    ensure(&mut body, &owner(workflow), false);
    for who in [Role::Gateway, Role::Worker, Role::Observer] {
        let name = role(workflow, who);
        ensure(&mut body, &name, true);
        let group = escape_literal(GROUP_ROLE);
        body.push_str(&format!(
            "IF NOT EXISTS (SELECT FROM pg_catalog.pg_auth_members m \
                WHERE m.roleid = {group}::regrole AND m.member = {quoted}::regrole) \
             THEN GRANT {} TO {}; END IF; ",
            escape_identifier(GROUP_ROLE),
            escape_identifier(&name),
            quoted = escape_literal(&escape_identifier(&name)),
        ));
    }
    body.push_str("END");
    format!("DO {}", escape_literal(&body))
}

/// Makes one role, or takes from it what it shouldn't have.
fn ensure(body: &mut String, name: &str, login: bool) {
    let (word, sign) = if login {
        ("LOGIN", "")
    } else {
        ("NOLOGIN", "NOT ")
    };
    let (literal, quoted) = (escape_literal(name), escape_identifier(name));
    body.push_str(&format!(
        "IF NOT EXISTS (SELECT FROM pg_catalog.pg_roles WHERE rolname = {literal}) \
         THEN CREATE ROLE {quoted} {word} {NOTHING_MORE}; \
         ELSIF NOT EXISTS (SELECT FROM pg_catalog.pg_authid WHERE rolname = {literal} AND {sign}rolcanlogin \
            AND NOT rolsuper AND NOT rolcreatedb AND NOT rolcreaterole AND NOT rolreplication AND NOT rolbypassrls \
            AND rolpassword IS NULL) \
         THEN ALTER ROLE {quoted} {word} {NOTHING_MORE}; END IF; "
    ));
}

/// Whether the database is there: a query that returns a row then.
#[must_use]
pub fn database_is_there(workflow: &str) -> String {
    format!(
        "SELECT 1 FROM pg_catalog.pg_database WHERE datname = {}",
        escape_literal(&database(workflow))
    )
}

/// Makes the database. Not in a transaction; it copies files, which can take seconds.
#[must_use]
pub fn create_database(workflow: &str) -> String {
    format!(
        "CREATE DATABASE {} OWNER {} TEMPLATE template0 ENCODING 'UTF8'",
        escape_identifier(&database(workflow)),
        escape_identifier(&owner(workflow))
    )
}

/// Who may connect to the database: the workflow's roles and nobody else. In any database.
#[must_use]
pub fn connections(workflow: &str) -> String {
    let name = database(workflow);
    let (literal, quoted) = (escape_literal(&name), escape_identifier(&name));
    // A right that is granted again is written again, so it is looked at first.
    let mut body = format!(
        "BEGIN IF EXISTS (SELECT FROM pg_catalog.pg_database d \
            LEFT JOIN LATERAL pg_catalog.aclexplode(d.datacl) a ON true \
            WHERE d.datname = {literal} AND (d.datacl IS NULL OR a.grantee = 0)) \
         THEN REVOKE ALL ON DATABASE {quoted} FROM PUBLIC; END IF; "
    );
    for who in [Role::Gateway, Role::Worker, Role::Observer] {
        let role = role(workflow, who);
        body.push_str(&format!(
            "IF NOT pg_catalog.has_database_privilege({}, {literal}, 'CONNECT') \
             THEN GRANT CONNECT ON DATABASE {quoted} TO {}; END IF; ",
            escape_literal(&role),
            escape_identifier(&role)
        ));
    }
    body.push_str("END");
    format!("DO {}", escape_literal(&body))
}

/// Makes all of that which isn't there. By the superuser, in any database but the ledger's own; then
/// [`migrate`](super::migrate()) in the ledger's.
///
/// # Errors
/// PostgreSQL's code.
pub async fn prepare(client: &Client, workflow: &str) -> anyhow::Result<()> {
    let run = async |sql: &str| client.batch_execute(sql).await.map_err(|e| words(&e));
    run(&roles(workflow)).await?;
    let there = client
        .query_opt(&database_is_there(workflow), &[])
        .await
        .map_err(|e| words(&e))?;
    if there.is_none() {
        run(&create_database(workflow)).await?;
    }
    run(&connections(workflow)).await
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_quoted() {
        assert!(roles("a-b").contains("\"rights-a-b-gateway\""));
        assert!(create_database("a-b").starts_with("CREATE DATABASE \"rights-a-b\" OWNER"));
        assert!(connections("a-b").contains("REVOKE ALL ON DATABASE \"rights-a-b\" FROM PUBLIC;"));
    }
}
