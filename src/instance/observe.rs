//! Observing: the store, the mounted files, the volume, finished work, PostgreSQL.
//!
//! Owns how each is looked at, and what a look costs at most. Never: decides, or changes anything but what the
//! manager remembers (and PostgreSQL's copy of its certificate, which has to be there before it is asked for).

use std::collections::BTreeMap;
use std::time::Instant;

use futures::FutureExt as _;
use tracing::{info, warn};

use super::agent::Input;
use super::manager::{Manager, PARAMETERS_FACT, STORE_FACT, Task};
use super::plan::{self, Content, Duty, Mode, Process, Seen, Source};
use super::session::Session;
use super::tls::{Certificate, Credentials};
use super::{files, jobs, programs, store, vitals, volume};
use crate::failover::Wanted;
use crate::pki;

impl Manager {
    pub(super) async fn observe(&mut self) {
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
        self.tell_agent();
        self.collect_work();
        self.begin_trial();
        self.look().await;
    }

    fn take_store(&mut self) {
        self.keep_store();
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
        if differs {
            let _ = self.agent.input.send(Input::Store(newer.clone()));
        }
        self.store = Some(newer);
        if differs {
            self.unkept = true;
            self.keep_store();
        }
    }

    /// What the volume didn't take before (it was full, mostly) is offered again: a restart without the API server
    /// must not go by an older view.
    fn keep_store(&mut self) {
        if let Some(kept) = self.keeping.take_if(|k| k.is_finished()) {
            match kept.now_or_never() {
                Some(Ok(Ok(()))) => self.complained = false,
                // What is known in memory still counts.
                Some(Ok(Err(e))) if !self.complained => {
                    warn!("{e:#}");
                    (self.unkept, self.complained) = (true, true);
                }
                _ => self.unkept = true,
            }
        }
        if self.unkept
            && self.keeping.is_none()
            && let Some(store) = self.store.clone()
        {
            self.unkept = false;
            let root = self.volume.root().to_owned();
            let keep = move || volume::remember(&root, STORE_FACT, store.as_ref());
            self.keeping = Some(tokio::task::spawn_blocking(keep));
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
                    let _ = self.agent.input.send(Input::Certificate(new.clone()));
                    self.authorities = (pki::authorities(new.ca()), pki::signer(new.cert()));
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
                        self.signs.clear_wal_gone();
                    }
                    if let Some(history) = self.copying.take() {
                        let _ = self.agent.input.send(Input::Copied(history));
                        self.copied = true;
                    }
                }
                Ok(Err(why)) => {
                    self.copying = None;
                    self.fail(why);
                }
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
        let asked = Instant::now();
        match vitals::look(session).await {
            Ok(vitals) => {
                self.asked = Some(asked);
                if let Some(postgres) = &mut self.postgres
                    && postgres.mode() == Mode::Standby
                    && !vitals.in_recovery
                    && self.agent.server.leads()
                {
                    postgres.promoted();
                }
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
        if remembered.as_ref() != Some(&self.parameters_started) {
            let (root, parameters) = (
                self.volume.root().to_owned(),
                self.parameters_started.clone(),
            );
            tokio::task::spawn_blocking(move || {
                if let Err(e) = volume::remember(&root, PARAMETERS_FACT, &parameters) {
                    warn!("{e:#}");
                }
            });
        }
    }

    /// What the agent can't see by itself: that the volume holds no copy, and that a promoted server is no standby.
    fn tell_agent(&mut self) {
        // Only once there is somebody to copy: until then a volume that was mounted late, or is brought back, is
        // as good as it was. An empty one votes without a copy in any case.
        let empty = match &self.content {
            Content::Empty => true,
            // Of a copy that this volume held, and not somebody else's files.
            Content::Remains(_) => self.agent.view.borrow().held,
            _ => false,
        };
        let wiped = empty
            && self.postgres.is_none()
            && self.job.is_none()
            && self.store.is_some()
            && self.agent.view.borrow().source.is_some();
        if !matches!(
            self.agent.view.borrow().wanted,
            Wanted::Copy(_) | Wanted::CopyOfAnyone
        ) {
            self.copied = false;
        }
        if wiped && !self.wiped {
            let _ = self.agent.input.send(Input::Wiped);
        }
        self.wiped = wiped;
    }

    pub(super) fn duty(&self) -> Duty {
        let view = self.agent.view.borrow();
        match &view.wanted {
            Wanted::Nothing => Duty::Fenced,
            Wanted::Primary => Duty::Primary,
            // It was told, and will say so: not a second copy for the same wish.
            Wanted::Copy(_) | Wanted::CopyOfAnyone if self.copied => Duty::Standby,
            Wanted::Copy(_) | Wanted::CopyOfAnyone => Duty::Copy {
                ready: view.source.is_some(),
            },
            Wanted::Standby if view.configuration.is_none() => Duty::Unknown,
            Wanted::Standby => Duty::Standby,
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
            duty: self.duty(),
            held: self.agent.view.borrow().held,
        }
    }
}

/// Whether PostgreSQL says in its pid file that it accepts connections.
pub(super) fn accepting(data: &std::path::Path, pid: u32) -> bool {
    let Ok(Some(bytes)) = files::read_bounded(&data.join("postmaster.pid"), 64 << 10) else {
        return false;
    };
    let text = String::from_utf8_lossy(&bytes);
    let mut lines = text.lines();
    let own = lines.next().and_then(|l| l.trim().parse().ok()) == Some(pid);
    own && lines
        .nth(6)
        .is_some_and(|status| matches!(status.trim(), "ready" | "standby"))
}
