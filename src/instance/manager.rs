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
use tracing::{error, info, warn};

use super::config::Config;
use super::conninfo::Upstream;
use super::http::{Published, View};
use super::jobs::{self, CloneFrom, Tools, Tried};
use super::logs::Signs;
use super::metrics::Metrics;
use super::plan::{self, Content, Mode, Process, Seen, Source, Step};
use super::postmaster::{Postmaster, Stop};
use super::programs::{self, Programs};
use super::reaper::Children;
use super::session::Session;
use super::status::Status;
use super::sync::Rule;
use super::tls::{self, Certificate, Credentials};
use super::vitals::{self, Vitals};
use super::volume::Volume;
use super::{hba, receiver, settings, store};
use crate::api::PrivacyDataStore;

const STORE_FACT: &str = "store.json";
const PARAMETERS_FACT: &str = "parameters.json";

/// Work beside the loop, and what came of it.
struct Task<T> {
    handle: JoinHandle<T>,
    result: Option<Result<T, tokio::task::JoinError>>,
}

impl<T: Send + 'static> Task<T> {
    fn spawn(work: impl Future<Output = T> + Send + 'static) -> Self {
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

struct Job {
    name: &'static str,
    words: String,
    begun: Instant,
    task: Task<Result<(), String>>,
}

/// The manager of an instance.
pub struct Manager {
    pub(super) config: Config,
    pub(super) api: store::Api,
    stop: watch::Receiver<Option<Stop>>,
    pub(super) volume: Volume,
    children: Children,
    pub(super) signs: Arc<Signs>,
    pub(super) metrics: Arc<Metrics>,
    pub(super) published: watch::Sender<Published>,
    begun: Instant,
    pub(super) store: Option<Arc<PrivacyDataStore>>,
    live: bool,
    pub(super) programs: Option<Result<Programs, String>>,
    pub(super) content: Content,
    pub(super) space: (u64, u64),
    pub(super) certificate: Option<Certificate>,
    pub(super) credentials: Option<Credentials>,
    files_read: Option<Instant>,
    pub(super) postgres: Option<Postmaster>,
    stopping: Option<Instant>,
    pub(super) session: Option<Session>,
    pub(super) vitals: Option<Vitals>,
    served_since: Option<Instant>,
    starts_in_vain: u32,
    job: Option<Job>,
    trial: Option<Task<Tried>>,
    pub(super) tried: Option<Tried>,
    /// The user's parameters that PostgreSQL runs, or is next started, with.
    pub(super) parameters: BTreeMap<String, String>,
    parameters_started: BTreeMap<String, String>,
    pub(super) fallen_back: bool,
    failures: u32,
    pub(super) failed: Option<(String, Instant)>,
    pub(super) tend: Tend,
}

/// What looking after a serving PostgreSQL remembers; forgotten when it ends.
#[derive(Default)]
pub(super) struct Tend {
    pub conf: String,
    pub floors: BTreeMap<String, u64>,
    pub rule: Rule,
    pub streaming_since: BTreeMap<String, Instant>,
    pub gone_since: BTreeMap<String, Instant>,
    pub upstream: Option<Upstream>,
    pub silent_since: Option<Instant>,
    pub stranded: Option<String>,
    pub roles_made: bool,
    pub applied: Option<Credentials>,
    pub pending_restart: Vec<String>,
    pub pending_asked: Option<Instant>,
    pub trouble: Option<String>,
    pub refusal: Option<String>,
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
        let view = View {
            published: view,
            metrics: metrics.clone(),
        };
        let manager = Self {
            content: volume.content(),
            space: volume.space().unwrap_or((0, 0)),
            store: store.map(Arc::new),
            parameters: BTreeMap::new(),
            parameters_started: Option::unwrap_or_default(parameters),
            config,
            api,
            stop,
            volume,
            children: Children::default(),
            signs: Arc::default(),
            metrics,
            published,
            begun: Instant::now(),
            live: false,
            programs: None,
            certificate: None,
            credentials: None,
            files_read: None,
            postgres: None,
            stopping: None,
            session: None,
            vitals: None,
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
                    return Ok(());
                }
            }
        }
    }

    // --- observe

    async fn observe(&mut self) {
        self.take_store();
        self.read_files();
        if let Ok(space) = self.volume.space() {
            self.space = space;
            self.metrics.space(space.0, space.1);
        }
        self.metrics.clients(self.signs.client_errors());
        if self.postgres.is_none() && self.job.is_none() {
            self.content = self.volume.content();
        }
        if !matches!(self.programs, Some(Ok(_))) {
            let wanted = match &self.content {
                Content::Cluster(c) => Some(c.major),
                _ => None,
            };
            let found = programs::find(self.config.bin.as_deref(), wanted, &self.children).await;
            self.programs = Some(found);
        }
        self.collect_work();
        self.begin_trial();
        self.look().await;
    }

    fn take_store(&mut self) {
        let seen = self.api.store.borrow_and_update().clone();
        let Some(seen) = seen else { return };
        self.live = true;
        let Some(newer) = store::newer(self.store.as_ref(), &seen) else {
            return;
        };
        let differs = self
            .store
            .as_ref()
            .is_none_or(|old| !store::same(old, &newer));
        self.store = Some(newer);
        if differs
            && let Some(store) = &self.store
            && let Err(e) = self.volume.remember(STORE_FACT, store.as_ref())
        {
            // A full volume, mostly. What is known in memory still counts.
            warn!("{e:#}");
        }
    }

    fn read_files(&mut self) {
        let due = self
            .files_read
            .is_none_or(|at| at.elapsed() >= self.config.timing.files);
        let missing = self.certificate.is_none() || self.credentials.is_none();
        if !due && !missing {
            return;
        }
        self.files_read = Some(Instant::now());
        match Certificate::read(&self.config.tls) {
            Ok(Some(new)) if self.certificate.as_ref() != Some(&new) => {
                if let Err(e) = self.install_certificate(&new) {
                    warn!("can't write PostgreSQL's copy of its certificate: {e}");
                } else {
                    self.certificate = Some(new);
                }
            }
            Ok(_) => {}
            Err(e) => warn!("can't read the Secret with the certificate: {e}"),
        }
        match Credentials::read(&self.config.app) {
            Ok(Some(new)) => self.credentials = Some(new),
            Ok(None) => {}
            Err(e) => warn!("can't read the Secret with the application's credentials: {e}"),
        }
    }

    fn install_certificate(&self, new: &Certificate) -> std::io::Result<()> {
        new.install_server(&self.config.run)?;
        if self.tend.upstream.is_some() {
            new.install_client(&self.config.run)?;
        }
        if let Some(postgres) = &self.postgres {
            info!("the certificate changed: PostgreSQL reads it again");
            postgres.reload();
        }
        Ok(())
    }

    /// Takes the results of work that ended.
    fn collect_work(&mut self) {
        if let Some(job) = self.job.take_if(|j| j.task.result.is_some())
            && let Some(result) = job.task.result
        {
            let took = job.begun.elapsed();
            match result {
                Ok(Ok(())) => {
                    info!(seconds = took.as_secs_f64(), "{} is done", job.name);
                    self.metrics.worked(job.name, took);
                    self.failures = 0;
                    self.failed = None;
                    if job.name != "clear" {
                        self.tend.stranded = None;
                        self.signs.clear_wal_gone();
                        if let Err(e) = self.volume.identity() {
                            self.fail(format!("{e:#}"));
                        }
                    }
                }
                Ok(Err(why)) => self.fail(why),
                Err(e) => self.fail(format!("{} ended unexpectedly: {e}", job.name)),
            }
            self.content = self.volume.content();
        }
        if let Some(trial) = self.trial.take_if(|t| t.result.is_some())
            && let Some(Ok(tried)) = trial.result
        {
            self.parameters = tried.good.clone();
            self.fallen_back = false;
            self.starts_in_vain = 0;
            self.tried = Some(tried);
        }
    }

    fn begin_trial(&mut self) {
        let (Some(store), Some(tools)) = (&self.store, self.tools()) else {
            return;
        };
        let asked = &store.spec.postgres.parameters;
        if self.trial.is_none() && self.tried.as_ref().is_none_or(|t| t.asked != *asked) {
            let asked = asked.clone();
            self.trial = Some(Task::spawn(async move {
                jobs::try_parameters(&tools, asked).await
            }));
        }
    }

    /// Asks PostgreSQL.
    async fn look(&mut self) {
        self.vitals = None;
        let Some(postgres) = &self.postgres else {
            return;
        };
        if self.session.as_ref().is_some_and(Session::closed) {
            self.session = None;
        }
        let limit = self.config.timing.statement;
        if self.session.is_none() {
            // A connection that comes too early costs PostgreSQL a line in its log, ten times a second.
            if !accepting(&self.volume.data(), postgres.pid()) {
                return;
            }
            let (run, port) = (&self.config.run, self.config.port);
            match Session::connect(run, port, "postgres", limit).await {
                Ok(session) => self.session = Some(session),
                Err(e) => {
                    self.tend.trouble = Some(format!("{e:#}"));
                    return;
                }
            }
        }
        let Some(session) = &self.session else { return };
        match vitals::look(session).await {
            Ok(vitals) => {
                self.vitals = Some(vitals);
                self.tend.trouble = None;
                if self.served_since.is_none() {
                    self.accepted();
                }
            }
            Err(e) => {
                warn!("can't ask PostgreSQL: {e:#}");
                self.tend.trouble = Some(format!("{e:#}"));
                // A connection that didn't answer in time may answer the wrong question later.
                self.session = None;
            }
        }
    }

    /// PostgreSQL answers for the first time since its start.
    fn accepted(&mut self) {
        self.served_since = Some(Instant::now());
        self.starts_in_vain = 0;
        // What it started with works, whatever the next change brings.
        let remembered: Option<BTreeMap<String, String>> =
            self.volume.recall(PARAMETERS_FACT).ok().flatten();
        if remembered.as_ref() != Some(&self.parameters_started)
            && let Err(e) = self
                .volume
                .remember(PARAMETERS_FACT, &self.parameters_started)
        {
            warn!("{e:#}");
        }
    }

    pub(super) fn seen(&self) -> Seen {
        let source = if self.live {
            Source::Live
        } else if self.begun.elapsed() >= self.config.timing.remember_after {
            Source::Remembered
        } else {
            Source::Asking
        };
        let backing_off = self.failed.as_ref().and_then(|(why, until)| {
            let left = until.saturating_duration_since(Instant::now());
            (!left.is_zero()).then(|| (why.clone(), left))
        });
        Seen {
            me: self.config.instance.clone(),
            store: self.store.as_ref().map(|s| store::seen(s, source)),
            content: self.content.clone(),
            leftover: self.job.is_none() && self.volume.leftover(),
            programs: match &self.programs {
                Some(Ok(p)) => plan::Programs::Major(p.major),
                Some(Err(why)) => plan::Programs::Missing(why.clone()),
                None => plan::Programs::Missing("has not looked for PostgreSQL yet".to_owned()),
            },
            process: self
                .postgres
                .as_ref()
                .map_or(Process::Stopped, |p| Process::Running(p.mode())),
            job: self.job.as_ref().map(|j| j.words.clone()),
            certificate: self.certificate.is_some(),
            credentials: self.credentials.is_some(),
            parameters_tried: self.tried.is_some(),
            backing_off,
            stranded: self.tend.stranded.clone(),
        }
    }

    // --- act

    async fn act(&mut self, step: &Step) {
        match step {
            Step::Wait(_) | Step::Fail(_) => {}
            Step::ClearLeftover => {
                let root = self.volume.root().to_owned();
                self.begin(
                    "clear",
                    "removes what an interrupted copy left behind",
                    async move { jobs::clear(&root).await },
                );
            }
            Step::InitDb => {
                if let Some(tools) = self.tools() {
                    self.begin("initdb", "makes a new database cluster", async move {
                        jobs::initdb(&tools).await
                    });
                }
            }
            Step::Clone { replace } => self.begin_clone(*replace),
            Step::Start(mode) => {
                if let Err(e) = self.start(*mode).await {
                    self.fail(format!("PostgreSQL can't be started: {e:#}"));
                }
            }
            Step::Stop(why) => self.stop_postgres(why),
            Step::Serve(mode) => self.tend(*mode).await,
        }
    }

    fn begin(
        &mut self,
        name: &'static str,
        words: &str,
        work: impl Future<Output = Result<(), String>> + Send + 'static,
    ) {
        info!("{words}");
        self.job = Some(Job {
            name,
            words: words.to_owned(),
            begun: Instant::now(),
            task: Task::spawn(work),
        });
    }

    fn begin_clone(&mut self, replace: bool) {
        let (Some(store), Some(tools), Some(certificate)) =
            (&self.store, self.tools(), self.certificate.clone())
        else {
            return;
        };
        let upstream = store::upstream(store, &self.config.instance, self.config.port);
        let identifier = store::system_identifier(store);
        let (Some(upstream), Some(identifier)) = (upstream, identifier) else {
            return;
        };
        let words = format!("copies the primary {}", upstream.name);
        let from = CloneFrom {
            upstream,
            system_identifier: identifier.to_owned(),
            instance: self.config.instance.clone(),
            timeout_seconds: settings::replication_timeout(self.detection()),
            replace,
            stall: self.config.timing.clone_stall,
        };
        self.begin("clone", &words, async move {
            Box::pin(jobs::clone(&tools, &from, &certificate)).await
        });
    }

    async fn start(&mut self, mode: Mode) -> anyhow::Result<()> {
        let Some(Ok(programs)) = self.programs.clone() else {
            anyhow::bail!("no programs");
        };
        // The stranded copy's mark stays until it's cloned; all else is about the last run.
        self.tend = Tend {
            stranded: self.tend.stranded.take(),
            ..Tend::default()
        };
        let conf = self.config.run.join("conf");
        let user = std::fs::read_to_string("/etc/passwd")
            .ok()
            .and_then(|text| hba::user_name(&text, nix::unistd::geteuid().as_raw()))
            .unwrap_or_else(|| "postgres".to_owned());
        let write = |name: &str, text: String| {
            super::files::replace(&conf.join(name), text.as_bytes(), 0o600)
        };
        write("pg_hba.conf", hba::hba())?;
        write("pg_ident.conf", hba::ident(&self.config.store, &user))?;
        if let Some(certificate) = &self.certificate {
            certificate.install_server(&self.config.run)?;
        }
        // Always without an upstream first: whatever this instance promised before, it streams only once the
        // manager knows from whom.
        receiver::forsake(&self.config.run)?;
        if mode == Mode::Standby {
            let data = self.volume.data();
            match programs::control_settings(&programs, &data, &self.children).await {
                Ok(floors) => self.tend.floors = floors,
                Err(e) => warn!("can't read what the primary's parameters were: {e}"),
            }
        }
        self.write_conf(mode)?;
        self.volume.identity()?;
        self.parameters_started = self.parameters.clone();
        let postgres = Postmaster::start(
            &programs,
            &self.volume.data(),
            &self.config.run,
            mode,
            &self.signs,
            &self.children,
        )?;
        self.metrics.started();
        self.postgres = Some(postgres);
        self.stopping = None;
        self.served_since = None;
        Ok(())
    }

    fn stop_postgres(&mut self, why: &str) {
        let Some(postgres) = &self.postgres else {
            return;
        };
        match self.stopping {
            None => {
                info!("stops PostgreSQL: {why}");
                self.stopping = Some(Instant::now());
                self.session = None;
                postgres.stop(Stop::Fast);
            }
            Some(since) if since.elapsed() >= self.config.timing.stop => {
                postgres.stop(Stop::Immediate);
            }
            Some(_) => {}
        }
    }

    /// PostgreSQL ended.
    fn ended(&mut self, status: Option<ExitStatus>) {
        let asked = self.stopping.take().is_some();
        let served = self.served_since.take();
        self.postgres = None;
        self.session = None;
        self.vitals = None;
        let status = status.map_or_else(|| "an unknown status".to_owned(), |s| s.to_string());
        if asked {
            info!("PostgreSQL has stopped ({status})");
            return;
        }
        self.metrics.crashed();
        if served.is_some_and(|since| since.elapsed() >= Duration::from_secs(60)) {
            self.failures = 0;
        }
        if served.is_none() {
            self.starts_in_vain += 1;
            self.fall_back();
        }
        let full = self.signs.take_disk_full() || self.space.0 < (16 << 20);
        let why = if full {
            let (free, size) = self.volume.space().unwrap_or(self.space);
            // Tried again at the longest pause only: each attempt costs a recovery, and writes.
            self.failures = self.failures.max(16);
            format!(
                "the volume is full ({free} of {size} bytes are free), and PostgreSQL stopped: make room or \
                 enlarge the volume"
            )
        } else {
            let said = self.signs.last_fatal();
            let said = said.map(|s| format!(": {s}")).unwrap_or_default();
            format!("PostgreSQL ended by itself ({status}){said}")
        };
        self.fail(why);
    }

    /// With parameters that PostgreSQL understands but can't start with, it's started with those of its last
    /// start that worked.
    fn fall_back(&mut self) {
        if self.starts_in_vain < 2 || self.fallen_back {
            return;
        }
        let last: BTreeMap<String, String> = self
            .volume
            .recall(PARAMETERS_FACT)
            .ok()
            .flatten()
            .unwrap_or_default();
        if last != self.parameters {
            warn!(
                "PostgreSQL doesn't start with the parameters asked for; tries the last that worked"
            );
            self.parameters = last;
            self.fallen_back = true;
        }
    }

    pub(super) fn fail(&mut self, why: String) {
        self.failures = self.failures.saturating_add(1);
        let timing = &self.config.timing;
        let pause = timing
            .backoff
            .saturating_mul(1u32.checked_shl(self.failures - 1).unwrap_or(u32::MAX))
            .min(timing.backoff_max);
        error!(
            failures = self.failures,
            "{why}; tried again in {} ms",
            pause.as_millis()
        );
        self.failed = Some((why, Instant::now() + pause));
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
        if how == Stop::Fast
            && let Some(session) = &self.session
            && self.vitals.as_ref().is_some_and(|v| !v.in_recovery)
        {
            // So that the shutdown's own checkpoint, during which nobody can connect, is short.
            let _ = session.execute_within("CHECKPOINT", limit / 2).await;
        }
        self.session = None;
        let Some(mut postgres) = self.postgres.take() else {
            return;
        };
        postgres.stop(how);
        let mut how = how;
        loop {
            let turn = Published {
                turn: Instant::now(),
                ..self.published.borrow().clone()
            };
            self.published.send_replace(turn);
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

/// Whether PostgreSQL says in its pid file that it accepts connections.
fn accepting(data: &std::path::Path, pid: u32) -> bool {
    let Ok(Some(bytes)) = super::files::read_bounded(&data.join("postmaster.pid"), 64 << 10) else {
        return false;
    };
    let text = String::from_utf8_lossy(&bytes);
    let mut lines = text.lines();
    let own = lines.next().and_then(|l| l.trim().parse().ok()) == Some(pid);
    own && lines
        .nth(6)
        .is_some_and(|status| matches!(status.trim(), "ready" | "standby"))
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

async fn changed(store: &mut watch::Receiver<Option<Arc<PrivacyDataStore>>>) {
    if store.changed().await.is_err() {
        std::future::pending::<()>().await;
    }
}
