//! What privacy workflows need of this store, made so by its primary.
//!
//! Owns the ledger's database and roles (their SQL is `rights::ledger`'s), and the workers' rights to tables of the
//! application ([`access`]). Beside the loop: a turn only begins work, or takes its result. It is begun when what is
//! wanted changes, and every so often, since tables may be made later; what is as it should be costs a few queries.
//! Never: waits for a standby (every session is local), holds the loop up, deletes a ledger, or puts a row's content into
//! words.

pub mod access;

use std::collections::BTreeSet;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::Context as _;
use futures::FutureExt as _;
use postgres_protocol::escape::{escape_identifier, escape_literal};
use tokio_postgres::Client;
use tokio_util::task::AbortOnDropHandle;
use tracing::{info, warn};

use super::session::{Link, without_words};
use crate::api::PrivacyDataStore;
use crate::api::names::rights::{GROUP_ROLE, Role, database, role};
use crate::api::privacy_data_store::RightsAccess;
use crate::rights::ledger::{Migrated, migrate, roles};

/// How often it is looked at although nothing changed.
const AGAIN: Duration = Duration::from_secs(300);
/// How often while something is missing: a table is made, or an administrator mends it.
const AGAIN_INCOMPLETE: Duration = Duration::from_secs(30);
/// The first pause after a failure; it doubles.
const PAUSE: Duration = Duration::from_secs(2);
/// The longest.
const PAUSE_MAX: Duration = Duration::from_secs(60);
/// The longest that all of it may take.
const LIMIT: Duration = Duration::from_secs(180);
/// The longest that a connection may take.
const CONNECT: Duration = Duration::from_secs(5);
/// Settings of these sessions: a statement that was given up here ends there, too.
const OPTIONS: &str = "-c statement_timeout=60s -c idle_in_transaction_session_timeout=60s";

/// What is to be so.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Wanted {
    /// The application's database.
    pub database: String,
    /// What each workflow needs.
    pub workflows: Vec<RightsAccess>,
}

impl Wanted {
    /// What the store's status asks for.
    #[must_use]
    pub fn of(store: &PrivacyDataStore) -> Self {
        let status = store.status.as_ref();
        let mut workflows = status.map(|s| s.rights.clone()).unwrap_or_default();
        workflows.retain(|w| well_formed(&w.workflow));
        // The API server keeps the order in which entries came; it means nothing.
        workflows.sort_by(|a, b| a.workflow.cmp(&b.workflow));
        Self {
            database: store.spec.database.name.clone(),
            workflows,
        }
    }
}

/// The schema refuses other names, but an object may be older than its schema, and names of roles are made of this.
fn well_formed(workflow: &str) -> bool {
    let first = workflow
        .bytes()
        .next()
        .is_some_and(|b| b.is_ascii_lowercase());
    let rest = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-';
    first && workflow.len() <= 40 && workflow.bytes().all(rest)
}

/// Where PostgreSQL is.
#[derive(Clone, Debug)]
pub struct Place {
    /// The folder of its socket.
    pub run: PathBuf,
    /// Its port.
    pub port: u16,
}

/// What remembers what was done; forgotten when PostgreSQL ends, so that a new primary does all of it again.
#[derive(Debug, Default)]
pub struct Keeper {
    done: Option<(Wanted, Instant)>,
    work: Option<(Wanted, AbortOnDropHandle<Outcome>)>,
    failures: u32,
    not_before: Option<Instant>,
    words: Vec<String>,
}

/// What came of it: what is missing or failed, in words.
type Outcome = anyhow::Result<Vec<String>>;

impl Keeper {
    /// What a person should know.
    #[must_use]
    pub fn words(&self) -> &[String] {
        &self.words
    }

    /// One turn.
    pub fn turn(&mut self, wanted: &Wanted, place: &Place, now: Instant) {
        self.collect(now);
        if self.work.is_none() && self.due(wanted, now) {
            let (wanted, place) = (wanted.clone(), place.clone());
            let work = make(wanted.clone(), place);
            let work = async move {
                let limited = tokio::time::timeout(LIMIT, work).await;
                limited.context("it takes too long").and_then(|done| done)
            };
            self.work = Some((wanted, AbortOnDropHandle::new(tokio::spawn(work))));
        }
    }

    fn due(&self, wanted: &Wanted, now: Instant) -> bool {
        if self.not_before.is_some_and(|at| now < at) {
            return false;
        }
        match &self.done {
            None => true,
            Some((done, _)) if done != wanted => true,
            // Nothing is wanted, and nothing is left of what was.
            Some(_) if wanted.workflows.is_empty() => false,
            Some((_, at)) => {
                let pause = if self.words.is_empty() {
                    AGAIN
                } else {
                    AGAIN_INCOMPLETE
                };
                now.saturating_duration_since(*at) >= pause
            }
        }
    }

    fn collect(&mut self, now: Instant) {
        let Some((wanted, work)) = self.work.take_if(|(_, work)| work.is_finished()) else {
            return;
        };
        let outcome = match work.now_or_never() {
            Some(Ok(outcome)) => outcome,
            _ => Err(anyhow::anyhow!("it ended unexpectedly")),
        };
        match outcome {
            Ok(words) => {
                if words != self.words {
                    words.iter().for_each(|w| warn!("{w}"));
                }
                self.words = words;
                self.done = Some((wanted, now));
                (self.failures, self.not_before) = (0, None);
            }
            Err(e) => {
                let words = format!("can't make ready what privacy requests need: {e:#}");
                if self.words.first() != Some(&words) {
                    warn!("{words}");
                }
                self.words = vec![words];
                let pause = PAUSE
                    .saturating_mul(1 << self.failures.min(8))
                    .min(PAUSE_MAX);
                self.failures = self.failures.saturating_add(1);
                self.not_before = Some(now + pause);
            }
        }
    }
}

async fn connect(place: &Place, database: &str) -> anyhow::Result<Link> {
    Link::connect(&place.run, place.port, database, OPTIONS, CONNECT)
        .await
        .with_context(|| format!("database {database}"))
}

/// Makes it so.
async fn make(wanted: Wanted, place: Place) -> Outcome {
    let mut words = Vec::new();
    let link = connect(&place, "postgres").await?;
    for workflow in &wanted.workflows {
        let name = &workflow.workflow;
        if workflow.ledger {
            roles::prepare(&link.client, name)
                .await
                .with_context(|| format!("the roles of workflow {name}"))?;
        } else {
            execute(&link.client, &roles::roles(name))
                .await
                .with_context(|| format!("the roles of workflow {name}"))?;
        }
    }
    let members = retire(&link.client, &wanted).await?;
    drop(link);
    for workflow in wanted.workflows.iter().filter(|w| w.ledger) {
        let name = &workflow.workflow;
        let mut link = connect(&place, &database(name)).await?;
        let migrated = migrate(&mut link.client, name).await;
        match migrated.with_context(|| format!("the ledger of workflow {name}"))? {
            Migrated::Current => {}
            Migrated::From(version) => {
                info!(workflow = %name, from = version, "the ledger's schema is brought up to date");
            }
            Migrated::Newer(version) => words.push(format!(
                "the ledger of workflow {name} has schema version {version}, which is newer than this release's, and works with it"
            )),
        }
    }
    // Also if nothing is wanted: of what was granted once, nothing is left then.
    if !members.is_empty() {
        let mut link = connect(&place, &wanted.database).await?;
        let missing = access::apply(&mut link.client, &wanted, &members).await;
        words.extend(missing.context("rights to the application's tables")?);
    }
    Ok(words)
}

/// Roles of workflows that need nothing here any more can't log in. All roles of workflows that there are.
async fn retire(client: &Client, wanted: &Wanted) -> anyhow::Result<BTreeSet<String>> {
    let all = client
        .query(
            "SELECT m.rolname::text, m.rolcanlogin FROM pg_auth_members a \
             JOIN pg_roles g ON g.oid = a.roleid JOIN pg_roles m ON m.oid = a.member WHERE g.rolname = $1::text::name",
            &[&GROUP_ROLE],
        )
        .await
        .map_err(|e| without_words(&e))?;
    let needed: BTreeSet<String> = wanted
        .workflows
        .iter()
        .flat_map(|w| {
            [Role::Gateway, Role::Worker, Role::Observer].map(|who| role(&w.workflow, who))
        })
        .collect();
    let mut members = BTreeSet::new();
    for row in all {
        let name: String = row.try_get(0).map_err(|e| without_words(&e))?;
        let can_log_in: bool = row.try_get(1).map_err(|e| without_words(&e))?;
        if can_log_in && !needed.contains(&name) {
            info!(role = %name, "nobody needs this role any more: it can't log in");
            let (quoted, literal) = (escape_identifier(&name), escape_literal(&name));
            let sql = format!(
                "ALTER ROLE {quoted} NOLOGIN; \
                 SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE usename = {literal}::name"
            );
            execute(client, &sql).await?;
        }
        members.insert(name);
    }
    Ok(members)
}

/// Runs statements that return nothing.
async fn execute(client: &Client, sql: &str) -> anyhow::Result<()> {
    client
        .batch_execute(sql)
        .await
        .map_err(|e| without_words(&e))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn wanted(workflows: &[&str]) -> Wanted {
        Wanted {
            database: "app".into(),
            workflows: workflows
                .iter()
                .map(|w| RightsAccess {
                    workflow: (*w).into(),
                    ..RightsAccess::default()
                })
                .collect(),
        }
    }

    #[test]
    fn names_that_no_role_can_be_made_of_are_left_out() {
        for good in ["a", "consumers", "a-1"] {
            assert!(well_formed(good), "{good}");
        }
        for bad in ["", "A", "1a", "a\"b", "a'b", "a.b", &"a".repeat(41)] {
            assert!(!well_formed(bad), "{bad}");
        }
    }

    #[test]
    fn it_is_looked_at_again_when_something_changes_is_missing_or_time_has_passed() {
        let begin = Instant::now();
        let one = wanted(&["a"]);
        let mut keeper = Keeper::default();
        assert!(keeper.due(&one, begin) && keeper.due(&wanted(&[]), begin));
        keeper.done = Some((one.clone(), begin));
        assert!(!keeper.due(&one, begin + AGAIN / 2));
        assert!(keeper.due(&one, begin + AGAIN));
        assert!(keeper.due(&wanted(&["a", "b"]), begin));
        keeper.words = vec!["a table is missing".into()];
        assert!(keeper.due(&one, begin + AGAIN_INCOMPLETE));
        keeper.not_before = Some(begin + AGAIN_INCOMPLETE * 2);
        assert!(!keeper.due(&one, begin + AGAIN_INCOMPLETE));
        let nothing = wanted(&[]);
        let keeper = Keeper {
            done: Some((nothing.clone(), begin)),
            ..Keeper::default()
        };
        assert!(!keeper.due(&nothing, begin + AGAIN * 2), "costs nothing");
    }
}
