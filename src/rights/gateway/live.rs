//! What the gateway works by, as it is now: the workflow, its keys, its ledger.
//!
//! Owns their renewal: when the operator writes another `workflow.json`, what is filed from then on goes by it, and a
//! ledger that is elsewhere is looked for there. Keys and certificates are read again by those who use them.
//! Never: goes on without a workflow that it once had; a file that can't be read changes nothing.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context as _;
use futures::FutureExt as _;
use futures::future::BoxFuture;
use tokio::sync::watch;
use tracing::{info, warn};

use super::intake::Book;
use crate::api::names::rights::{Role, role};
use crate::rights::config::{self, Database, Target, Workflow};
use crate::rights::ledger::{Filed, Ledger, LedgerError, SealedFiling, Waker};
use crate::rights::secrecy::Keyring;

/// How often the file is looked at.
const LOOK: Duration = Duration::from_secs(5);

/// Where things are.
#[derive(Clone, Debug)]
pub struct Places {
    /// workflow.json.
    pub config: PathBuf,
    /// Of the certificate by which the ledger knows the gateway.
    pub tls: PathBuf,
    /// Of the workflow's keys.
    pub keys: PathBuf,
    /// Connections to the ledger.
    pub connections: usize,
}

/// The ledger, and the way to tell its workers.
#[derive(Clone)]
struct Reach {
    ledger: Ledger,
    waker: Arc<Waker>,
}

/// What is now.
#[derive(Clone)]
pub struct Live {
    workflow: watch::Receiver<Arc<Workflow>>,
    reach: watch::Receiver<Reach>,
    keyring: Arc<Keyring>,
}

impl std::fmt::Debug for Live {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Live(..)")
    }
}

impl Live {
    /// Reads everything, and goes on reading for as long as somebody has this.
    ///
    /// # Errors
    /// If something isn't there, or isn't what it should be.
    pub fn follow(places: Places) -> anyhow::Result<Self> {
        let first = config::read(&places.config)?;
        check(&first)?;
        let keyring = Keyring::read(&places.keys)
            .with_context(|| format!("the keys in {} can't be used", places.keys.display()))?;
        let reach = reach(&places, &first)?;
        let (workflow_tx, workflow) = watch::channel(Arc::new(first));
        let (reach_tx, reach) = watch::channel(reach);
        tokio::spawn(async move {
            loop {
                tokio::select! {
                    () = workflow_tx.closed() => return,
                    () = tokio::time::sleep(LOOK) => {}
                }
                let before = workflow_tx.borrow().clone();
                match renewed(&places, &before) {
                    Ok(None) => {}
                    Ok(Some((now, elsewhere))) => {
                        if let Some(reach) = elsewhere {
                            info!("the ledger's hosts have changed");
                            reach_tx.send_replace(reach);
                        }
                        info!("the workflow has changed");
                        workflow_tx.send_replace(Arc::new(now));
                    }
                    // Also while the kubelet is amid a change.
                    Err(e) => warn!("the workflow stays as it was: {e:#}"),
                }
            }
        });
        Ok(Self {
            workflow,
            reach,
            keyring: Arc::new(keyring),
        })
    }

    /// The workflow.
    #[must_use]
    pub fn workflow(&self) -> Arc<Workflow> {
        self.workflow.borrow().clone()
    }

    /// The ledger.
    #[must_use]
    pub fn ledger(&self) -> Ledger {
        self.reach.borrow().ledger.clone()
    }

    /// The keys.
    #[must_use]
    pub fn keyring(&self) -> Arc<Keyring> {
        self.keyring.clone()
    }

    /// Tells workers that there is something to do.
    pub fn wake(&self) {
        self.reach.borrow().waker.wake();
    }
}

impl Book for Live {
    fn file<'a>(
        &'a self,
        sealed: &'a [SealedFiling],
    ) -> BoxFuture<'a, Result<Vec<Filed>, LedgerError>> {
        async move {
            // Of now, not of when they were sealed: a target that has come meanwhile is one of theirs, too.
            let (ledger, workflow) = (self.ledger(), self.workflow());
            let targets: &[Target] = &workflow.targets;
            ledger.file(sealed, targets).await
        }
        .boxed()
    }
}

/// A request without a target, or without an identifier to go by, would be closed with nothing done.
fn check(workflow: &Workflow) -> anyhow::Result<()> {
    anyhow::ensure!(
        !workflow.targets.is_empty()
            && !workflow.identifiers.is_empty()
            && !workflow.regimes.is_empty(),
        "the workflow {} has no targets, no identifiers or no regimes",
        workflow.name
    );
    Ok(())
}

fn reach(places: &Places, workflow: &Workflow) -> anyhow::Result<Reach> {
    let user = role(&workflow.name, Role::Gateway);
    let database: &Database = &workflow.ledger;
    let tls: &Path = &places.tls;
    let ledger = Ledger::new(database, &user, tls, places.connections, "domicile gateway")?;
    let waker = Arc::new(ledger.waker());
    Ok(Reach { ledger, waker })
}

/// The workflow if it has changed, and the ledger if that has.
fn renewed(
    places: &Places,
    before: &Workflow,
) -> anyhow::Result<Option<(Workflow, Option<Reach>)>> {
    let now = config::read(&places.config)?;
    if now == *before {
        return Ok(None);
    }
    check(&now)?;
    // Requests are known by the workflow's name: another's file is a mistake.
    anyhow::ensure!(
        now.name == before.name && now.namespace == before.namespace,
        "the file is of another workflow now; restart the gateway if that is meant"
    );
    let elsewhere = (now.ledger != before.ledger)
        .then(|| reach(places, &now))
        .transpose()?;
    Ok(Some((now, elsewhere)))
}
