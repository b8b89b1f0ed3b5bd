//! The worker: `domicile worker`. Claims the steps of its own region's targets, erases, reads back, and says so.
//!
//! - [`lane`]: one target's work; [`lanes`]: which targets there are
//! - [`carry`], [`split`], [`verdict`]: a batch carried out, who is to blame for a failure, what becomes of a step
//! - [`lease`], [`clock`]: nothing begins under a lease that is over
//! - [`backoff`], [`batch`], [`breaker`], [`agenda`]: when, and how much
//! - [`ears`], [`finishing`]: calls for work, ends of batches
//! - [`metrics`], [`http`]: what it shows
//!
//! Owns the process: configuration, lanes, the end. Never: touches a target of another region; needs the API server;
//! reads the time of day, so that a node's wrong clock changes nothing.

pub mod agenda;
pub mod backoff;
pub mod batch;
pub mod breaker;
pub mod carry;
pub mod clock;
pub mod ears;
pub mod finishing;
pub mod http;
pub mod lane;
pub mod lanes;
pub mod lease;
pub mod metrics;
pub mod split;
pub mod verdict;

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use anyhow::Context as _;
use tokio::net::TcpListener;
use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;
use tracing::{debug, info, warn};

use self::clock::Moment;
use self::ears::Ears;
use self::http::{Health, View};
use self::lane::Lane;
use self::metrics::Metrics;
use super::config::{self, Target, Workflow};
use super::connectors::{self, Connector, Limits};
use super::ledger::Ledger;
use super::secrecy::Keyring;
use crate::api::names::HTTP_PORT;
use crate::api::names::rights::{Role, paths, role};
use crate::instance::http::serve_routes;

/// How often the configuration is read again. The kubelet takes up to a minute to bring a change, so this adds little.
const REREAD: Duration = Duration::from_secs(1);
/// Connections to the ledger beside the one that listens, for all lanes together: each is held for one call.
const CONNECTIONS: usize = 6;
/// After the grace of what is under way, the ledger is told; then the process ends.
const LAST_WORDS: Duration = Duration::from_secs(10);
/// Between two times that records are looked through for those that are kept no longer, after the first minute.
const FORGET: Duration = Duration::from_secs(3_600);

/// Arguments of `domicile worker`.
#[derive(clap::Args, Clone, Debug)]
pub struct Args {
    /// The Region whose targets it works on.
    #[arg(long, env = "DOMICILE_REGION")]
    pub region: String,
    /// What it is called in the ledger.
    #[arg(long, env = "HOSTNAME", default_value = "worker")]
    pub name: String,
    /// What the operator made of the workflow.
    #[arg(long, default_value = paths::CONFIG)]
    pub config: PathBuf,
    /// The certificate by which it is a role at the ledger.
    #[arg(long, default_value = paths::TLS)]
    pub tls: PathBuf,
    /// The workflow's keys.
    #[arg(long, default_value = paths::KEYS)]
    pub keys: PathBuf,
    /// Credentials of targets.
    #[arg(long, default_value = paths::TARGETS)]
    pub targets: PathBuf,
    /// Where probes and metrics are served.
    #[arg(long, default_value_t = SocketAddr::from(([0, 0, 0, 0], HTTP_PORT)))]
    pub listen: SocketAddr,
}

/// Runs until `stop`, and then until what is under way is over.
///
/// # Errors
/// If the port for probes can't be had.
pub async fn run(args: Args, stop: CancellationToken) -> anyhow::Result<()> {
    let listener = TcpListener::bind(args.listen)
        .await
        .with_context(|| format!("can't listen at {}", args.listen))?;
    let (health, seen) = watch::channel(Health {
        turn: Moment::now(),
        ready: Err("the configuration wasn't read yet"),
    });
    let metrics = Arc::new(Metrics::default());
    let view = View {
        health: seen,
        metrics: metrics.clone(),
    };
    let probes = tokio::spawn(serve_routes(listener, http::router(view)));
    let worker = Worker {
        keys: OnceLock::new(),
        args,
        metrics,
        health,
        stop,
    };
    worker.run().await;
    probes.abort();
    Ok(())
}

struct Worker {
    args: Args,
    /// Once they are there; later they read themselves again.
    keys: OnceLock<Keyring>,
    metrics: Arc<Metrics>,
    health: watch::Sender<Health>,
    stop: CancellationToken,
}

/// What a ledger is the ledger of, with everything that hangs on it.
struct Post {
    workflow: Workflow,
    ledger: Ledger,
    ears: Ears,
    /// Whether the ledger answered whoever asked it last.
    answers: Arc<AtomicBool>,
    lanes: BTreeMap<String, (Target, CancellationToken)>,
    /// Ends lanes and listener.
    stop: CancellationToken,
}

impl Worker {
    async fn run(self) {
        let mut tasks = JoinSet::new();
        let mut post: Option<Post> = None;
        let mut said = String::new();
        while !self.stop.is_cancelled() {
            match self.wanted() {
                Ok((workflow, keys)) => {
                    said.clear();
                    self.fit(&mut post, workflow, &keys, &mut tasks);
                }
                Err(error) => {
                    // Once: a file that is wrong stays wrong. What was read last stays in force.
                    let words = format!("{error:#}");
                    if words != said {
                        warn!("can't use the configuration: {words}");
                        said = words;
                    }
                }
            }
            let ready = match &post {
                None => Err("there is no configuration that can be used"),
                Some(post) if post.lanes.is_empty() || post.answers.load(Ordering::Relaxed) => {
                    Ok(())
                }
                Some(_) => Err("the ledger doesn't answer"),
            };
            self.health.send_replace(Health {
                turn: Moment::now(),
                ready,
            });
            tokio::select! {
                () = self.stop.cancelled() => {}
                () = tokio::time::sleep(REREAD) => {}
            }
            while tasks.try_join_next().is_some() {}
        }
        self.health.send_replace(Health {
            turn: Moment::now(),
            ready: Err("the worker stops"),
        });
        if let Some(post) = &post {
            post.stop.cancel();
        }
        let over = async { while tasks.join_next().await.is_some() {} };
        if tokio::time::timeout(lane::GRACE.saturating_add(LAST_WORDS), over)
            .await
            .is_err()
        {
            warn!("stops in the middle of something; its leases run out");
        }
    }

    /// What is to be worked on, and the keys without which nothing is claimed.
    fn wanted(&self) -> anyhow::Result<(Workflow, Keyring)> {
        let workflow = config::read(&self.args.config)?;
        let keys = match self.keys.get() {
            Some(keys) => keys.clone(),
            None => {
                let keys = Keyring::read(&self.args.keys)?;
                self.keys.get_or_init(|| keys).clone()
            }
        };
        Ok((workflow, keys))
    }

    /// Makes lanes as the workflow wants them.
    fn fit(
        &self,
        post: &mut Option<Post>,
        workflow: Workflow,
        keys: &Keyring,
        tasks: &mut JoinSet<()>,
    ) {
        if post.as_ref().is_some_and(|p| p.workflow == workflow) {
            return;
        }
        let same_ledger = post
            .as_ref()
            .is_some_and(|p| same_post(&p.workflow, &workflow));
        if !same_ledger {
            match self.open(workflow.clone(), tasks) {
                Ok(new) => {
                    if let Some(old) = post.replace(new) {
                        // Its lanes finish what they have with the ledger they had it from.
                        old.stop.cancel();
                    }
                }
                Err(error) => {
                    warn!("can't use the ledger's configuration: {error:#}");
                    return;
                }
            }
        }
        let Some(post) = post else { return };
        let lanes: BTreeMap<String, Target> = post
            .lanes
            .iter()
            .map(|(name, (target, _))| (name.clone(), target.clone()))
            .collect();
        let changes = lanes::changes(&lanes, &workflow.targets, &self.args.region);
        for name in changes.end {
            if let Some((_, stop)) = post.lanes.remove(&name) {
                info!(target_system = %name, "no longer worked on as it was");
                stop.cancel();
            }
        }
        let role = role(&workflow.name, Role::Worker);
        for target in changes.begin {
            let connector = connectors::connect_within(
                &target,
                &self.args.tls,
                &self.args.targets,
                &role,
                limits(),
            );
            match connector {
                Ok(connector) => {
                    tasks.spawn(self.lane(post, target, connector, keys).run());
                }
                Err(error) => {
                    // Its steps wait in the ledger, where they are seen.
                    warn!(target_system = %target.name, "can't work on this target: {error:#}");
                }
            }
        }
        // Also if not all of them could be begun: nothing but another configuration would change that.
        post.workflow = workflow;
    }

    fn open(&self, workflow: Workflow, tasks: &mut JoinSet<()>) -> anyhow::Result<Post> {
        let role = role(&workflow.name, Role::Worker);
        let application = format!("domicile worker {}", self.args.name);
        let ledger = Ledger::new(
            &workflow.ledger,
            &role,
            &self.args.tls,
            CONNECTIONS,
            &application,
        )?;
        let stop = CancellationToken::new();
        let (caller, ears) = ears::ears();
        tasks.spawn(caller.pass_on(ledger.listener(), stop.clone()));
        tasks.spawn(forget(
            ledger.clone(),
            workflow.closed_requests_months,
            stop.clone(),
        ));
        Ok(Post {
            workflow: Workflow {
                targets: Vec::new(),
                ..workflow
            },
            ledger,
            ears,
            answers: Arc::default(),
            lanes: BTreeMap::new(),
            stop,
        })
    }

    fn lane(
        &self,
        post: &mut Post,
        target: Target,
        connector: Box<dyn Connector>,
        keys: &Keyring,
    ) -> Lane {
        info!(target_system = %target.name, "worked on");
        let stop = post.stop.child_token();
        post.lanes
            .insert(target.name.clone(), (target.clone(), stop.clone()));
        Lane {
            target,
            region: self.args.region.as_str().into(),
            worker: self.args.name.as_str().into(),
            ledger: post.ledger.clone(),
            connector,
            keys: keys.clone(),
            metrics: self.metrics.clone(),
            ears: post.ears.clone(),
            answers: post.answers.clone(),
            stop,
        }
    }
}

/// How long connectors wait. For a connection less than they would by themselves: a target that was away is to be found
/// again within seconds, also if the last attempt to reach it hangs.
fn limits() -> Limits {
    Limits {
        connect: Duration::from_secs(2),
        ..Limits::default()
    }
}

/// Whether two configurations differ in nothing but their targets, as far as a worker is concerned.
fn same_post(a: &Workflow, b: &Workflow) -> bool {
    (&a.name, &a.ledger, a.closed_requests_months) == (&b.name, &b.ledger, b.closed_requests_months)
}

/// Removes records of requests that ended longer ago than they are to be kept.
async fn forget(ledger: Ledger, months: i32, stop: CancellationToken) {
    let Ok(months) = u32::try_from(months) else {
        return;
    };
    let mut pause = Duration::from_secs(60);
    loop {
        tokio::select! {
            () = stop.cancelled() => return,
            // Workers that started together needn't look together.
            () = tokio::time::sleep(pause.mul_f64(0.5 + rand::random::<f64>())) => {}
        }
        let forgotten = tokio::select! {
            () = stop.cancelled() => return,
            forgotten = ledger.forget_old(months) => forgotten,
        };
        pause = match forgotten {
            Ok(0) => FORGET,
            Ok(gone) => {
                debug!(gone, "records of old requests removed");
                Duration::from_secs(1)
            }
            Err(error) => {
                debug!(%error, "can't remove records of old requests");
                FORGET
            }
        };
    }
}
