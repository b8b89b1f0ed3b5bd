//! People whose data an application holds: customers and their orders in PostgreSQL, sessions in Redis.
//!
//! Owns how they are planted and how they are looked for. Never asks the product whether they are gone: it looks in the
//! tables and keys themselves.

use anyhow::{Context, Result};
use serde_json::{Value, json};

use super::sessions;
use crate::harness::Scope;

/// The workflow's manifest under which their data is erased.
#[must_use]
pub fn workflow(namespace: &str, store: &str, policy: &str, region: &str) -> Value {
    json!({
        "apiVersion": "domicile.dev/v1alpha1", "kind": "RightsWorkflow",
        "metadata": { "name": store, "namespace": namespace },
        "spec": {
            "ledgerRef": { "name": store }, "residencyPolicyRef": { "name": policy },
            "regimes": ["us-ca-ccpa", "eu-gdpr", "kr-pipa"], "identifiers": ["customerId"],
            "targets": [
                { "name": "accounts", "type": "PostgreSQL", "postgresql": { "storeRef": { "name": store }, "erase": [
                    { "table": "customer", "where": { "id": "customerId" } },
                    { "table": "purchase", "where": { "customer_id": "customerId" } },
                ] } },
                { "name": "sessions", "type": "Redis", "region": region, "redis": {
                    "urlFrom": { "secretKeyRef": { "name": sessions::NAME, "key": "url" } },
                    "keys": ["session:{customerId}:*"],
                } },
            ],
            "gateway": { "replicas": { "min": 2, "max": 2 } },
            "workers": { "pools": [{ "region": region, "min": 1, "max": 2 }] },
        },
    })
}

/// Makes the tables, as the application's own role, and `count` customers from number 1 with their orders.
///
/// # Errors
/// If PostgreSQL refuses.
pub async fn tables(scope: &Scope, client: &str, count: usize) -> Result<()> {
    scope
        .client_sql(
            client,
            &format!(
                "CREATE TABLE IF NOT EXISTS customer (id bigint PRIMARY KEY, email text NOT NULL);
                 CREATE TABLE IF NOT EXISTS purchase (id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
                     customer_id bigint NOT NULL REFERENCES customer, what text NOT NULL);
                 CREATE INDEX IF NOT EXISTS purchase_customer ON purchase (customer_id);
                 INSERT INTO customer SELECT n, 'person' || n || '@canary.example' FROM generate_series(1, {count}) n;
                 INSERT INTO purchase (customer_id, what) SELECT n, 'thing ' || k
                     FROM generate_series(1, {count}) n, generate_series(1, 4) k"
            ),
        )
        .await
        .map(drop)
}

/// Makes [`tables`], and two sessions for each of these people.
///
/// # Errors
/// If PostgreSQL or Redis refuses.
pub async fn plant(scope: &Scope, client: &str, count: usize) -> Result<()> {
    tables(scope, client, count).await?;
    let script = format!(
        "for i = 1, {count} do redis.call('SET', 'session:' .. i .. ':web', 'x'); redis.call('SET', 'session:' .. i .. ':app', 'x') end"
    );
    sessions::command(scope, &["EVAL", &script, "0"]).await?;
    Ok(())
}

/// What is left of people `from` to `to`: customers, purchases, sessions.
///
/// # Errors
/// If PostgreSQL or Redis can't be read.
pub async fn left(scope: &Scope, client: &str, from: usize, to: usize) -> Result<[usize; 3]> {
    let sql = format!(
        "SELECT (SELECT count(*) FROM customer WHERE id BETWEEN {from} AND {to}) || ' ' ||
                (SELECT count(*) FROM purchase WHERE customer_id BETWEEN {from} AND {to})"
    );
    let rows = scope.client_sql(client, &sql).await?;
    let mut counts = rows.split_whitespace().map(str::parse::<usize>);
    let script = format!(
        "local n = 0; for i = {from}, {to} do n = n + redis.call('EXISTS', 'session:' .. i .. ':web', 'session:' .. i .. ':app') end; return n"
    );
    let keys = sessions::command(scope, &["EVAL", &script, "0"]).await?;
    Ok([
        counts.next().context("no count of customers")??,
        counts.next().context("no count of purchases")??,
        keys.parse()?,
    ])
}

/// The request of one person.
#[must_use]
pub fn deletion(customer: usize) -> Value {
    json!({ "kind": "deletion", "identifiers": { "customerId": customer.to_string() } })
}
