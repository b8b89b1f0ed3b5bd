//! What the operator made of a workflow, as gateways and workers read it: `workflow.json`.
//!
//! Owns its form. An unknown field is no error: a pod may be older than the operator that wrote it.
//! Never: holds a secret; credentials are files beside it (`api::names::rights::paths`).

use anyhow::Context as _;
use serde::{Deserialize, Serialize};
use std::path::Path;

use crate::api::rights_targets::TableErasure;
use crate::api::rights_workflow::Regime;

/// A workflow, resolved.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Workflow {
    /// Name of the RightsWorkflow.
    pub name: String,
    /// Its namespace.
    pub namespace: String,
    /// The laws that requests may be filed under.
    pub regimes: Vec<Regime>,
    /// Names of identifiers that requests may carry.
    pub identifiers: Vec<String>,
    /// Service objective in seconds.
    pub promptness_seconds: i32,
    /// How many months the record of a closed request is kept.
    pub closed_requests_months: i32,
    /// Where the ledger is.
    pub ledger: Database,
    /// Every target.
    pub targets: Vec<Target>,
}

/// A database of a store.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Database {
    /// Names of the instances, each of which may be the primary; the certificates they show name these.
    pub hosts: Vec<String>,
    /// PostgreSQL's port.
    pub port: u16,
    /// Name of the database.
    pub name: String,
}

/// A system that holds personal data.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Target {
    /// Its name.
    pub name: String,
    /// The Regions whose workers may touch it.
    pub regions: Vec<String>,
    /// Seconds after which it is probed once more; 0: not.
    #[serde(default)]
    pub settle_seconds: i32,
    /// Days that erased data may live on in copies that the target makes of itself.
    #[serde(default)]
    pub residue_days: Option<i32>,
    /// What it is.
    pub system: System,
}

/// What a target is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "type", rename_all_fields = "camelCase")]
pub enum System {
    /// PostgreSQL.
    #[serde(rename = "PostgreSQL")]
    PostgreSql {
        /// Of a store, reached with the worker's certificate; absent: by the URL in the target's credentials.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        store: Option<Database>,
        /// What is a person's.
        erase: Vec<TableErasure>,
    },
    /// Redis or Valkey, by the URL in the target's credentials.
    Redis {
        /// Keys with placeholders.
        keys: Vec<String>,
    },
}

/// Reads the file.
///
/// # Errors
/// If it isn't there or isn't what it should be: which, and where.
pub fn read(path: &Path) -> anyhow::Result<Workflow> {
    let text =
        std::fs::read_to_string(path).with_context(|| format!("can't read {}", path.display()))?;
    serde_json::from_str(&text).with_context(|| format!("{} is no workflow", path.display()))
}
