//! Acting: the steps that `plan` chooses, and what follows from PostgreSQL's end.
//!
//! Owns starting and stopping PostgreSQL, the beginning of long work, and the pauses after failures.
//! Never: chooses a step.

use std::collections::BTreeMap;
use std::process::ExitStatus;
use std::time::{Duration, Instant};

use tracing::{error, info, warn};

use super::agent::Input;
use super::jobs::CloneFrom;
use super::manager::{Job, Manager, PARAMETERS_FACT, Task, Tend};
use super::plan::{Mode, Step};
use super::postmaster::{Postmaster, Stop};
use super::{files, hba, jobs, overlap, programs, receiver, settings, store, sync};

impl Manager {
    pub(super) async fn act(&mut self, step: &Step) {
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
            Step::Found => {
                let _ = self.agent.input.send(Input::Founded);
            }
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
        let source = self.agent.view.borrow().source.clone();
        let identifier = store::system_identifier(store);
        let (Some((upstream, history)), Some(identifier)) = (source, identifier) else {
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
        self.copying = Some(history);
        self.begin("clone", &words, async move {
            Box::pin(jobs::clone(&tools, &from, &certificate)).await
        });
    }

    async fn start(&mut self, mode: Mode) -> anyhow::Result<()> {
        let Some(Ok(programs)) = self.programs.clone() else {
            anyhow::bail!("no programs");
        };
        self.tend = Tend::default();
        let conf = self.config.run.join("conf");
        let user = std::fs::read_to_string("/etc/passwd")
            .ok()
            .and_then(|text| hba::user_name(&text, nix::unistd::geteuid().as_raw()))
            .unwrap_or_else(|| "postgres".to_owned());
        let write =
            |name: &str, text: String| files::replace(&conf.join(name), text.as_bytes(), 0o600);
        write("pg_hba.conf", hba::hba())?;
        write("pg_ident.conf", hba::ident(&self.config.store, &user))?;
        if let Some(certificate) = &self.certificate {
            certificate.install_server(&self.config.run)?;
        }
        // Always without an upstream first: whatever this instance promised before, it streams only once the
        // manager knows from whom.
        receiver::forsake(&self.config.run)?;
        // And always with a rule that nobody satisfies: a standby that is promoted by whatever accident must not
        // acknowledge a commit.
        sync::write(&self.config.run, sync::NOBODY)?;
        if mode == Mode::Standby {
            // PostgreSQL wouldn't start beside them either, but until then a receiver that hangs would go on
            // acknowledging what it writes to a file that is taken away below.
            if !self.agent.server.is_over()? {
                anyhow::bail!("processes of the last one live still");
            }
            let signal = self.volume.data().join("standby.signal");
            if !signal.exists() {
                files::replace_durably(&signal, b"", 0o600)?;
            }
            let data = self.volume.data();
            match programs::control_settings(&programs, &data, &self.children).await {
                Ok(floors) => self.tend.floors = floors,
                Err(e) => warn!("can't read what the primary's parameters were: {e}"),
            }
            match overlap::clear(&programs, &data, &self.children).await {
                Ok(gone) if gone.is_empty() => {}
                Ok(gone) => info!(
                    timelines = ?gone,
                    "takes away files of the log that were only begun to be copied: older ones hold more"
                ),
                Err(e) => warn!("can't look for files of the log that were only begun: {e}"),
            }
        }
        self.write_conf(mode)?;
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
        self.agent
            .server
            .started(postgres.pid(), &self.volume.data(), mode == Mode::Founding);
        let _ = self.agent.input.send(Input::Started);
        self.postgres = Some(postgres);
        self.stopping = None;
        self.served_since = None;
        Ok(())
    }

    pub(super) fn stop_postgres(&mut self, why: &str) {
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
    pub(super) fn ended(&mut self, status: Option<ExitStatus>) {
        let (postmaster, by_agent) = self.agent.server.ended();
        let _ = self.agent.input.send(Input::Ended {
            postmaster,
            by_agent,
        });
        let asked = self.stopping.take().is_some() || by_agent;
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
                "the volume is full ({} of {} MiB are free), and PostgreSQL stopped: make room or enlarge the \
                 volume",
                free >> 20,
                size >> 20
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
}
