//! The loop: observe → plan → act → report.
//!
//! Owns what one turn leaves for the next, and the end. Each turn looks, lets [`plan`] choose one step, takes
//! it, and says what is; long work runs beside the loop and wakes it when it's done.
//! Never: decides (that is `plan`), or waits in a turn for anything without a bound.

use std::collections::BTreeMap;
use std::process::ExitStatus;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::Context as _;
use tokio::sync::watch;
use tokio::task::JoinHandle;
use tracing::{info, warn};

use super::agent::{self, Input};
use super::config::Config;
use super::http::{Published, View};
use super::jobs::{Tools, Tried};
use super::logs::Signs;
use super::metrics::Metrics;
use super::plan::{self, Content};
use super::postmaster::{Postmaster, Stop};
use super::programs::Programs;
use super::reaper::Children;
use super::rights;
use super::session::Session;
use super::status::Status;
use super::store;
use super::strangers::Strangers;
use super::tls::{self, Certificate, Credentials};
use super::vitals::Vitals;
use super::volume::Volume;
use crate::api::PrivacyDataStore;
use crate::failover::History;

pub(super) const STORE_FACT: &str = "store.json";
pub(super) const PARAMETERS_FACT: &str = "parameters.json";

/// Work beside the loop, and what came of it.
pub(super) struct Task<T> {
    pub(super) handle: JoinHandle<T>,
    pub(super) result: Option<Result<T, tokio::task::JoinError>>,
}

impl<T: Send + 'static> Task<T> {
    pub(super) fn spawn(work: impl Future<Output = T> + Send + 'static) -> Self {
        Self {
            handle: tokio::spawn(work),
            result: None,
        }
    }

    /// Waits for its end and keeps the result. May be given up and called again.
    async fn finished(task: Option<&mut Self>) {
        match task {
            Some(task) if task.result.is_none() => {
                task.result = Some((&mut task.handle).await);
            }
            _ => std::future::pending().await,
        }
    }
}

pub(super) struct Job {
    pub(super) name: &'static str,
    pub(super) words: String,
    pub(super) begun: Instant,
    pub(super) task: Task<Result<(), String>>,
}

/// The manager of an instance.
pub struct Manager {
    pub(super) config: Config,
    pub(super) api: store::Api,
    pub(super) stop: watch::Receiver<Option<Stop>>,
    pub(super) volume: Volume,
    pub(super) children: Children,
    /// This instance's part in the failover protocol.
    pub(super) agent: agent::Handle,
    /// A copy is being made; this is the history of whom it's made from.
    pub(super) copying: Option<History>,
    /// A copy is whole, and the agent hasn't taken note yet.
    pub(super) copied: bool,
    /// The latest failover that the metrics know of.
    pub(super) told_term: u64,
    /// What the agent was told of the volume.
    pub(super) wiped: bool,
    pub(super) signs: Arc<Signs>,
    pub(super) metrics: Arc<Metrics>,
    pub(super) published: watch::Sender<Published>,
    pub(super) begun: Instant,
    pub(super) store: Option<Arc<PrivacyDataStore>>,
    pub(super) live: bool,
    /// The store as last seen isn't on the volume yet.
    pub(super) unkept: bool,
    /// It is on its way there: beside the loop, since manager and agent share a thread, and a disk that takes
    /// seconds would cost a primary its lease.
    pub(super) keeping: Option<JoinHandle<anyhow::Result<()>>>,
    /// The volume doesn't take it, and that was said.
    pub(super) complained: bool,
    pub(super) programs: Option<Result<Programs, String>>,
    pub(super) content: Content,
    pub(super) space: (u64, u64),
    pub(super) certificate: Option<Certificate>,
    /// The authorities that it trusts, and the one that signed its own.
    pub(super) authorities: (Vec<String>, Option<String>),
    pub(super) credentials: Option<Credentials>,
    pub(super) files_read: Option<Instant>,
    pub(super) postgres: Option<Postmaster>,
    pub(super) stopping: Option<Instant>,
    pub(super) session: Option<Session>,
    pub(super) vitals: Option<Vitals>,
    /// When those were asked for.
    pub(super) asked: Option<Instant>,
    pub(super) served_since: Option<Instant>,
    pub(super) starts_in_vain: u32,
    pub(super) job: Option<Job>,
    pub(super) trial: Option<Task<Tried>>,
    pub(super) tried: Option<Tried>,
    /// The user's parameters that PostgreSQL runs, or is next started, with.
    pub(super) parameters: BTreeMap<String, String>,
    pub(super) parameters_started: BTreeMap<String, String>,
    pub(super) fallen_back: bool,
    pub(super) failures: u32,
    pub(super) failed: Option<(String, Instant)>,
    pub(super) tend: Tend,
}

/// What looking after a serving PostgreSQL remembers; forgotten when it ends.
#[derive(Default)]
pub(super) struct Tend {
    pub conf: String,
    pub floors: BTreeMap<String, u64>,
    pub stale_slots: Option<Instant>,
    pub streaming_since: BTreeMap<String, Instant>,
    pub gone_since: BTreeMap<String, Instant>,
    pub silent_since: Option<Instant>,
    pub roles_made: bool,
    pub applied: Option<Credentials>,
    pub pending_restart: Vec<String>,
    pub pending_asked: Option<Instant>,
    pub trouble: Option<String>,
    pub refusal: Option<String>,
    pub strangers: Strangers,
    pub rights: rights::Keeper,
}

enum Wake {
    Look,
    Ended(Option<ExitStatus>),
    Stop(Stop),
}

impl Manager {
    /// Takes the volume and reads what it remembers.
    ///
    /// # Errors
    /// If the volume or the run directory can't be used.
    pub fn new(
        config: Config,
        api: store::Api,
        stop: watch::Receiver<Option<Stop>>,
    ) -> anyhow::Result<(Self, View)> {
        let volume = Volume::open(&config.volume)?;
        tls::make_private(&config.run.join("conf")).context("can't use the run directory")?;
        // A fact that can't be understood is as good as none: the API server has it, too.
        let store = volume.recall(STORE_FACT).unwrap_or_else(|e| {
            warn!("{e:#}");
            None
        });
        let parameters = volume.recall(PARAMETERS_FACT).ok().flatten();
        let (published, view) = watch::channel(Published {
            turn: Instant::now(),
            ready: Err("has only just begun".to_owned()),
            status: Status {
                instance: config.instance.clone(),
                ..Status::default()
            },
        });
        let metrics = Arc::new(Metrics::default());
        let children = Children::default();
        let agent = agent::start(&config, &volume, &children, api.witness.clone())?;
        let view = View {
            published: view,
            metrics: metrics.clone(),
        };
        let store: Option<Arc<PrivacyDataStore>> = store.map(Arc::new);
        if let Some(store) = &store {
            // Whoever restarts while the API server is away still knows the others.
            let _ = agent.input.send(Input::Store(store.clone()));
        }
        let manager = Self {
            content: volume.content(),
            space: volume.space().unwrap_or((0, 0)),
            store,
            parameters: BTreeMap::new(),
            parameters_started: Option::unwrap_or_default(parameters),
            config,
            api,
            stop,
            volume,
            children,
            agent,
            copying: None,
            copied: false,
            told_term: 0,
            wiped: false,
            signs: Arc::default(),
            metrics,
            published,
            begun: Instant::now(),
            live: false,
            unkept: false,
            keeping: None,
            complained: false,
            programs: None,
            certificate: None,
            authorities: (Vec::new(), None),
            credentials: None,
            files_read: None,
            postgres: None,
            stopping: None,
            session: None,
            vitals: None,
            asked: None,
            served_since: None,
            starts_in_vain: 0,
            job: None,
            trial: None,
            tried: None,
            fallen_back: false,
            failures: 0,
            failed: None,
            tend: Tend::default(),
        };
        Ok((manager, view))
    }

    /// The processes that it starts and waits for.
    #[must_use]
    pub fn children(&self) -> Children {
        self.children.clone()
    }

    /// Runs until it's told to stop.
    ///
    /// # Errors
    /// None at present: whatever goes wrong is reported and tried again.
    pub async fn run(mut self) -> anyhow::Result<()> {
        loop {
            self.observe().await;
            let step = plan::next(&self.seen());
            self.act(&step).await;
            self.report(&step);
            match self.wait().await {
                Wake::Look => {}
                Wake::Ended(status) => self.ended(status),
                Wake::Stop(how) => {
                    Box::pin(self.shut_down(how)).await;
                    self.agent.close().await;
                    return Ok(());
                }
            }
        }
    }

    // --- wait

    async fn wait(&mut self) -> Wake {
        let timing = self.config.timing;
        let mut pause = match (&self.postgres, &self.vitals) {
            // A start that takes long is looked at less often.
            (Some(_), None) if self.tend.trouble.is_none() => timing.starting_tick,
            (None, _) if self.store.is_some() => timing.starting_tick * 5,
            _ => timing.tick,
        };
        if let Some((_, until)) = &self.failed
            && self.postgres.is_none()
        {
            let left = until.saturating_duration_since(Instant::now());
            pause = pause.max(left.min(timing.tick)) + Duration::from_millis(1);
        }
        if self.stopping.is_some() {
            pause = timing.tick;
        }
        let Self {
            api,
            stop,
            postgres,
            agent,
            job,
            trial,
            ..
        } = self;
        tokio::select! {
            biased;
            how = told(stop) => Wake::Stop(how),
            status = ended(postgres) => Wake::Ended(status),
            () = Task::finished(job.as_mut().map(|j| &mut j.task)) => Wake::Look,
            () = Task::finished(trial.as_mut()) => Wake::Look,
            () = changed(&mut api.store) => Wake::Look,
            () = altered(&mut agent.view) => Wake::Look,
            () = tokio::time::sleep(pause) => Wake::Look,
        }
    }

    // --- the end

    async fn shut_down(&mut self, how: Stop) {
        info!(?how, "stops");
        self.say_goodbye();
        if let Some(job) = self.job.take() {
            job.task.handle.abort();
        }
        if let Some(trial) = self.trial.take() {
            trial.handle.abort();
        }
        let limit = self.config.timing.stop;
        let begun = Instant::now();
        let mut how = how;
        if how == Stop::Fast {
            how = self.leave(begun, limit).await;
        }
        self.session = None;
        let Some(mut postgres) = self.postgres.take() else {
            return;
        };
        postgres.stop(how);
        loop {
            self.still_here();
            tokio::select! {
                _ = postgres.ended() => break,
                () = tokio::time::sleep(self.config.timing.tick) => {}
            }
            let hurry = begun.elapsed() >= limit || *self.stop.borrow() == Some(Stop::Immediate);
            if hurry && how != Stop::Immediate {
                warn!("the graceful stop takes too long: stops PostgreSQL at once");
                how = Stop::Immediate;
                postgres.stop(how);
            }
            if begun.elapsed() >= limit + Duration::from_secs(10) {
                postgres.kill();
            }
        }
        info!("PostgreSQL has stopped");
    }

    /// A primary hands over before it goes, and stays a moment longer as a voter, so that the others need not wait
    /// for its silence. Others leave at once.
    async fn leave(&mut self, begun: Instant, limit: Duration) -> Stop {
        let led = {
            let view = self.agent.view.borrow();
            let alone = |c: &crate::failover::Configuration<String>| c.voters.len() < 2;
            view.serving && !view.configuration.as_ref().is_none_or(alone)
        };
        let _ = self.agent.input.send(Input::Leave);
        let linger = Duration::from_secs(u64::from(self.detection())).min(limit / 4);
        let mut left_at: Option<Instant> = None;
        loop {
            self.still_here();
            let view = self.agent.view.borrow_and_update().clone();
            if view.left {
                let since = left_at.get_or_insert_with(Instant::now);
                let taken_over = view.primary.is_some_and(|p| p != self.config.instance);
                if !led || taken_over || since.elapsed() >= linger {
                    return Stop::Fast;
                }
            }
            if begun.elapsed() >= limit / 2 || *self.stop.borrow() == Some(Stop::Immediate) {
                warn!("nobody takes over in time");
                return Stop::Immediate;
            }
            tokio::select! {
                status = ended(&mut self.postgres) => self.ended(status),
                () = altered(&mut self.agent.view) => {}
                () = tokio::time::sleep(self.config.timing.tick.min(Duration::from_millis(100))) => {}
            }
        }
    }

    /// For the liveness probe.
    fn still_here(&self) {
        let turn = Published {
            turn: Instant::now(),
            ..self.published.borrow().clone()
        };
        self.published.send_replace(turn);
    }

    // --- what several parts need

    pub(super) fn tools(&self) -> Option<Tools> {
        match &self.programs {
            Some(Ok(programs)) => Some(Tools {
                programs: programs.clone(),
                root: self.volume.root().to_owned(),
                run: self.config.run.clone(),
                children: self.children.clone(),
            }),
            _ => None,
        }
    }

    pub(super) fn detection(&self) -> u32 {
        self.store
            .as_ref()
            .and_then(|s| u32::try_from(s.spec.failover.detection_seconds).ok())
            .unwrap_or(3)
    }
}

async fn told(stop: &mut watch::Receiver<Option<Stop>>) -> Stop {
    match stop.wait_for(Option::is_some).await {
        Ok(how) => how.unwrap_or(Stop::Fast),
        // Nobody is left to tell it: that is a stop, too.
        Err(_) => Stop::Fast,
    }
}

async fn ended(postgres: &mut Option<Postmaster>) -> Option<ExitStatus> {
    match postgres {
        Some(postgres) => postgres.ended().await,
        None => std::future::pending().await,
    }
}

async fn altered(view: &mut watch::Receiver<agent::View>) {
    if view.changed().await.is_err() {
        std::future::pending::<()>().await;
    }
}

async fn changed(store: &mut watch::Receiver<Option<Arc<PrivacyDataStore>>>) {
    if store.changed().await.is_err() {
        std::future::pending::<()>().await;
    }
}
