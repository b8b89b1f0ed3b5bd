//! Whether a workflow asks for something lawful, and what it comes to.
//!
//! Owns the order of the questions beyond those of `law`: does the policy permit a gateway anywhere and workers where
//! they are asked for, and does every target have workers that may touch it; and the workflow as its processes read it.
//! Pure. Never widens: a workflow that asks for one forbidden region gets nothing *new* anywhere until that is mended,
//! while what it has already and lawfully keeps running.

use kube::ResourceExt;
use std::collections::{BTreeMap, BTreeSet};

use super::observe::Observed;
use crate::api::conditions::reasons;
use crate::api::privacy_data_store::{RightsAccess, TableAccess};
use crate::api::residency_policy::Data;
use crate::api::rights_targets::{PostgreSqlTarget, Target};
use crate::api::rights_workflow::WorkerPool;
use crate::api::{PrivacyDataStore, names};
use crate::operator::law::{Problem, Subject};
use crate::residency::Permissions;
use crate::rights::config;

/// The lawful part of what a workflow asks for.
#[derive(Clone, Debug)]
pub struct Lawful<'a> {
    /// What its policy permits.
    pub permissions: Permissions,
    /// Where its gateways may run, sorted. Empty: nowhere.
    pub gateways: Vec<String>,
    /// The pools that are permitted.
    pub pools: Vec<&'a WorkerPool>,
    /// What its processes are to know, if every target can be served.
    pub config: Option<config::Workflow>,
    /// What it needs of which store.
    pub access: BTreeMap<String, RightsAccess>,
    /// What is wrong. Nothing new is made while this is not empty.
    pub problems: Vec<Problem>,
}

/// Checks a workflow against its policy and the stores that it names.
///
/// # Errors
/// A [`Problem`] if there is no policy to check against; then nothing can be called lawful.
pub fn validate(observed: &Observed) -> Result<Lawful<'_>, Problem> {
    let spec = &observed.workflow.spec;
    let namespace = observed.workflow.namespace().unwrap_or_default();
    let law = Subject {
        policy_name: &spec.residency_policy_ref.name,
        policy: observed.policy.as_deref(),
        ceiling: observed.ceiling.as_deref(),
        namespace: &namespace,
        namespace_labels: &observed.namespace_labels,
        regions: &observed.regions,
    }
    .law()?;
    let permissions = law.permissions;
    let mut problems: Vec<Problem> = law.beyond.into_iter().collect();
    let known = |name: &str| observed.regions.iter().any(|r| r.name_any() == name);
    let mut pools = Vec::new();
    for pool in &spec.workers.pools {
        if let Err(refusal) = permissions.check(Data::Worker, &pool.region) {
            problems.push(Problem {
                reason: reasons::REGION_NOT_PERMITTED,
                message: refusal.to_string(),
            });
            continue;
        }
        pools.push(pool);
        if !known(&pool.region) {
            problems.push(Problem {
                reason: reasons::REGION_NOT_FOUND,
                message: format!(
                    "Region {} does not exist: create it, or correct spec.workers.pools",
                    pool.region
                ),
            });
        }
    }
    let gateways: Vec<String> = permissions
        .regions(Data::Gateway)
        .filter(|r| known(r))
        .map(str::to_owned)
        .collect();
    if gateways.is_empty() {
        problems.push(Problem {
            reason: reasons::REGION_NOT_PERMITTED,
            message: format!(
                "no region that exists is permitted for Gateway by ResidencyPolicy {}: permit one, since requests are taken in nowhere else",
                permissions.policy()
            ),
        });
    }
    let mut lawful = Lawful {
        permissions,
        gateways,
        pools,
        config: None,
        access: BTreeMap::new(),
        problems,
    };
    match resolve(observed, &mut lawful.access) {
        Ok(config) => lawful.config = Some(config),
        Err(problems) => lawful.problems.extend(problems),
    }
    Ok(lawful)
}

/// The workflow as its processes read it. `access`: what is needed of each store.
fn resolve(
    observed: &Observed,
    access: &mut BTreeMap<String, RightsAccess>,
) -> Result<config::Workflow, Vec<Problem>> {
    let workflow = &observed.workflow;
    let (name, spec) = (workflow.name_any(), &workflow.spec);
    let mut problems = Vec::new();
    let ledger = &spec.ledger_ref.name;
    let entry = |access: &mut BTreeMap<String, RightsAccess>, store: &str| {
        let made = RightsAccess {
            workflow: name.clone(),
            ..RightsAccess::default()
        };
        access.entry(store.to_owned()).or_insert(made).clone()
    };
    let mut kept = entry(access, ledger);
    kept.ledger = true;
    access.insert(ledger.clone(), kept);
    let database = names::rights::database(&name);
    let ledger = match observed.stores.get(ledger) {
        Some(store) => database_of(store, database),
        None => {
            problems.push(not_found(ledger, "spec.ledgerRef"));
            None
        }
    };
    let mut targets = Vec::new();
    for target in &spec.targets {
        match resolve_target(observed, target) {
            Ok(resolved) => targets.extend(resolved),
            Err(problem) => problems.push(problem),
        }
        if let Some(postgres) = &target.postgresql
            && let Some(store) = &postgres.store_ref
            && observed.stores.contains_key(&store.name)
        {
            let mut wanted = entry(access, &store.name);
            wanted.tables.extend(tables(postgres));
            access.insert(store.name.clone(), wanted);
        }
    }
    for wanted in access.values_mut() {
        wanted.tables = merged(std::mem::take(&mut wanted.tables));
    }
    // A store that has no instance yet is waited for in silence: its own status says why.
    let waits = targets.len() < spec.targets.len();
    match ledger {
        Some(ledger) if problems.is_empty() && !waits => Ok(config::Workflow {
            name,
            namespace: workflow.namespace().unwrap_or_default(),
            regimes: spec.regimes.clone(),
            identifiers: spec.identifiers.clone(),
            promptness_seconds: spec.promptness_seconds,
            closed_requests_months: spec.retention.closed_requests_months,
            ledger,
            targets,
        }),
        _ => Err(problems),
    }
}

fn not_found(store: &str, field: &str) -> Problem {
    Problem {
        reason: reasons::STORE_NOT_FOUND,
        message: format!(
            "PrivacyDataStore {store} does not exist in this namespace: create it, or correct {field}"
        ),
    }
}

/// A target with the regions whose workers may touch it; none while its store has no instance yet.
fn resolve_target(observed: &Observed, target: &Target) -> Result<Option<config::Target>, Problem> {
    let pools: BTreeSet<&str> = observed
        .workflow
        .spec
        .workers
        .pools
        .iter()
        .map(|p| p.region.as_str())
        .collect();
    let (mut regions, system) = match (&target.postgresql, &target.redis) {
        (Some(postgres), _) => {
            let (store, regions) = match &postgres.store_ref {
                Some(reference) => {
                    let field = format!("target {}", target.name);
                    let store = observed.stores.get(&reference.name);
                    let store = store.ok_or_else(|| not_found(&reference.name, &field))?;
                    let Some(database) = database_of(store, store.spec.database.name.clone())
                    else {
                        return Ok(None);
                    };
                    let placed = store.spec.placement.iter().map(|p| p.region.clone());
                    (Some(database), placed.collect())
                }
                None => (None, target.region.iter().cloned().collect::<Vec<_>>()),
            };
            let erase = postgres.erase.clone();
            (regions, config::System::PostgreSql { store, erase })
        }
        (None, Some(redis)) => {
            let keys = redis.keys.clone();
            let regions = target.region.iter().cloned().collect();
            (regions, config::System::Redis { keys })
        }
        (None, None) => {
            return Err(Problem {
                reason: reasons::TARGET_NOT_SUPPORTED,
                message: format!(
                    "target {} is of type {:?}, from which this release can't erase: no request could ever be finished; take the target out, or wait for a release that can",
                    target.name, target.kind
                ),
            });
        }
    };
    let all = regions.join(", ");
    regions.retain(|r| pools.contains(r.as_str()));
    regions.sort();
    regions.dedup();
    if regions.is_empty() {
        return Err(Problem {
            reason: reasons::NO_POOL,
            message: format!(
                "target {} is in {all}, where spec.workers.pools has no workers, and workers touch only targets of their own region: add a pool there",
                target.name
            ),
        });
    }
    Ok(Some(config::Target {
        name: target.name.clone(),
        regions,
        settle_seconds: target.settle_seconds.unwrap_or(0),
        residue_days: target.residue_days,
        system,
    }))
}

/// A database of a store, on every instance that may serve it; none while there is no instance.
#[must_use]
pub fn database_of(store: &PrivacyDataStore, name: String) -> Option<config::Database> {
    let namespace = store.namespace().unwrap_or_default();
    let mut instances: Vec<_> = store.status.iter().flat_map(|s| &s.instances).collect();
    // Those that are placed: an entry without a region is one of an instance that is gone.
    instances.retain(|i| i.region.is_some());
    // By number: every host is tried at once, and an order that followed the primary would restart everybody with it.
    instances.sort_by_key(|i| names::slot(&store.name_any(), &i.name));
    // As the application's Secret has them: whole names, since the operator asks from another namespace.
    let hosts: Vec<String> = instances
        .iter()
        .map(|i| format!("{}.{namespace}.svc", i.name))
        .collect();
    let port = names::POSTGRES_PORT;
    (!hosts.is_empty()).then_some(config::Database { hosts, port, name })
}

fn tables(postgres: &PostgreSqlTarget) -> impl Iterator<Item = TableAccess> {
    postgres.erase.iter().map(|e| TableAccess {
        table: e.table.clone(),
        delete: e.clear_columns.is_empty(),
        clear_columns: e.clear_columns.clone(),
    })
}

/// One entry per table, sorted: several rules, or targets, may name the same.
fn merged(all: Vec<TableAccess>) -> Vec<TableAccess> {
    let mut by_name: BTreeMap<String, TableAccess> = BTreeMap::new();
    for one in all {
        let table = by_name.entry(one.table.clone()).or_insert(TableAccess {
            table: one.table,
            ..TableAccess::default()
        });
        table.delete |= one.delete;
        table.clear_columns.extend(one.clear_columns);
        table.clear_columns.sort();
        table.clear_columns.dedup();
    }
    by_name.into_values().collect()
}
