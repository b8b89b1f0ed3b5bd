//! What the protocol does to PostgreSQL.
//!
//! Owns the operations (cut, follow, enforce, promote, stop, look) and the session they use. Each has a bound, and
//! each may be given up in the middle for a cut, which then makes certain by process, not by assumption.
//! Never: decides; answers that something is cut while a process lives that could still acknowledge.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail};
use tokio::time::sleep;
use tracing::{info, warn};

use super::server::Server;
use super::wal;
use crate::failover::{Lsn, Rule, Streaming};
use crate::instance::conninfo::Upstream;
use crate::instance::kill;
use crate::instance::proc::{self, Proc};
use crate::instance::receiver;
use crate::instance::relay::{Level, Relay};
use crate::instance::session::Session;
use crate::instance::settings;
use crate::instance::sync;
use crate::instance::tls::Certificate;
use crate::instance::volume;

/// Between two looks at something that takes a few milliseconds.
const GLANCE: Duration = Duration::from_millis(1);
/// How long a receiver may take to be cut before PostgreSQL is stopped instead.
const CUT_LIMIT: Duration = Duration::from_millis(1500);
/// How long a vote waits for the replay of what was received. Then it's given without the copy, and asked again.
const SETTLE_LIMIT: Duration = Duration::from_millis(800);
/// How long a walsender may take to show that it has read a new rule, before it's ended. It reports every second.
const RELOAD_LIMIT: Duration = Duration::from_millis(3500);

/// Everything an operation needs.
#[derive(Clone)]
pub struct Hands {
    /// PostgreSQL's process.
    pub server: Server,
    /// This voter, as PostgreSQL's synchronous rule names it.
    pub me: String,
    /// This instance.
    pub instance: String,
    /// Sockets and configuration.
    pub run: PathBuf,
    /// PGDATA.
    pub data: PathBuf,
    /// PostgreSQL's port.
    pub port: u16,
    /// How long one statement may take.
    pub limit: Duration,
    /// The session, kept from one operation to the next.
    pub session: Arc<tokio::sync::Mutex<Option<Session>>>,
    /// The way to an upstream far away.
    pub relay: Arc<Relay>,
}

/// What a primary sees of its standbys.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Standbys {
    /// The end of its WAL.
    pub position: Lsn,
    /// By voter: what it has flushed.
    pub flushed: BTreeMap<String, Lsn>,
}

impl Hands {
    /// Makes certain that nothing here acknowledges any more. The end of the copy, if it can be known now.
    pub async fn cut(&self) -> Option<Lsn> {
        loop {
            match self.try_cut().await {
                Ok(end) => return end,
                // Nothing may be said before it's true; a process that can't be killed waits for a disk.
                Err(e) => warn!("{e:#}; tries again"),
            }
            sleep(Duration::from_millis(50)).await;
        }
    }

    async fn try_cut(&self) -> anyhow::Result<Option<Lsn>> {
        self.relay.close();
        receiver::forsake(&self.run).context("can't take the upstream away")?;
        let Some(process) = self.server.process() else {
            self.stop_now().await?;
            return Ok(wal::clean_end(&self.data));
        };
        if self.server.leads() {
            self.stop_now().await?;
            return Ok(None);
        }
        let cut = match receiver::cut(&self.run, process, self.port, CUT_LIMIT).await {
            Ok(took) => took,
            Err(e) => {
                warn!("{e:#}: stops PostgreSQL instead");
                self.stop_now().await?;
                return Ok(None);
            }
        };
        let begun = Instant::now();
        let settled = tokio::time::timeout(SETTLE_LIMIT, self.settle()).await;
        // A vote waits for it, and so does a failover: how long, and for which of the two, can't be told afterwards.
        info!(
            cut_milliseconds = cut.as_millis(),
            replay_milliseconds = begun.elapsed().as_millis(),
            replayed = matches!(settled, Ok(Ok(_))),
            "is cut off from its upstream"
        );
        Ok(settled.ok().and_then(Result::ok))
    }

    /// Stops PostgreSQL at once, all of it.
    async fn stop_now(&self) -> anyhow::Result<()> {
        self.stop_within(None, Duration::from_secs(10)).await
    }

    async fn stop_within(&self, only: Option<Proc>, limit: Duration) -> anyhow::Result<()> {
        let Some(mut family) = self.server.stops(only) else {
            return Ok(());
        };
        // A session that is in use elsewhere was given up; PostgreSQL ends it.
        if let Ok(mut session) = self.session.try_lock() {
            *session = None;
        }
        let took = kill::stop_now(&mut family, limit).await?;
        if !took.is_zero() {
            info!(
                milliseconds = took.as_millis(),
                "PostgreSQL is stopped at once"
            );
        }
        Ok(())
    }

    /// Ends all of the PostgreSQL of this postmaster, not its successor's. Whatever is left after `limit` is told to
    /// die, and does so before anything else.
    pub async fn end(&self, postmaster: Proc, limit: Duration) {
        if let Err(e) = self.stop_within(Some(postmaster), limit).await {
            warn!("{e:#}");
        }
    }

    /// Makes certain that a standby that isn't to follow anybody doesn't: one whose upstream was set in the moment
    /// between its predecessor's end and the word of it would stream, and never be idle.
    ///
    /// # Errors
    /// As the file system's, or if PostgreSQL isn't there.
    pub fn alone(&self) -> anyhow::Result<()> {
        if receiver::forsaken(&self.run)? {
            return Ok(());
        }
        warn!("it follows somebody that it isn't to follow: takes the upstream away");
        self.relay.close();
        receiver::forsake(&self.run)?;
        let process = self.server.process().context("PostgreSQL isn't there")?;
        proc::reload(process.pid);
        Ok(())
    }

    /// Waits until a standby without an upstream has replayed all that it has.
    ///
    /// # Errors
    /// If PostgreSQL doesn't answer, or isn't a standby.
    pub async fn settle(&self) -> anyhow::Result<Lsn> {
        let mut pause = GLANCE;
        loop {
            let (recovering, idle, replayed) = {
                let mut held = self.session.lock().await;
                let session = self.connected(&mut held).await?;
                let row = session.row(SETTLED).await?;
                let replayed: String = row.try_get(2)?;
                (
                    row.try_get::<_, bool>(0)?,
                    row.try_get::<_, bool>(1)?,
                    wal::parse_lsn(&replayed).context("no position")?,
                )
            };
            if !recovering {
                bail!("PostgreSQL is no standby");
            }
            if idle {
                return Ok(replayed);
            }
            sleep(pause).await;
            pause = (pause * 2).min(Duration::from_millis(20));
        }
    }

    /// What a streaming standby has received.
    ///
    /// # Errors
    /// If PostgreSQL doesn't answer.
    pub async fn received(&self) -> anyhow::Result<Lsn> {
        let mut held = self.session.lock().await;
        let session = self.connected(&mut held).await?;
        let row = session.row(RECEIVED).await?;
        let text: String = row.try_get(0)?;
        wal::parse_lsn(&text).context("no position")
    }

    /// Streams from `upstream`: by a session that is ready, if there is one. `level`: where the copy ends, if that
    /// is known.
    ///
    /// # Errors
    /// If there is no PostgreSQL, or the file system refuses.
    pub fn follow(
        &self,
        certificate: &Certificate,
        upstream: &Upstream,
        timeout_seconds: u32,
        slot: bool,
        level: Option<Level>,
    ) -> anyhow::Result<()> {
        let process = self.server.process().context("PostgreSQL isn't there")?;
        if self.server.leads() {
            bail!("PostgreSQL is no standby");
        }
        let instance = if slot { &self.instance } else { "" };
        match self.relay.open(upstream, &settings::slot(instance), level) {
            Some(folder) => receiver::follow_by(
                &self.run,
                &folder,
                upstream.port,
                &self.me,
                instance,
                timeout_seconds,
            )?,
            None => receiver::follow(
                &self.run,
                certificate,
                upstream,
                &self.me,
                instance,
                timeout_seconds,
                volume::major(&self.data),
            )?,
        }
        proc::reload(process.pid);
        info!(upstream = upstream.name, address = %upstream.address, "follows");
        Ok(())
    }

    /// Has PostgreSQL enforce `rule`; the end of the log once it certainly does.
    ///
    /// # Errors
    /// If PostgreSQL doesn't take it.
    pub async fn enforce(&self, rule: &Rule<String>) -> anyhow::Result<Lsn> {
        let text = sync::render(rule);
        let changed = sync::write(&self.run, &text)?;
        let process = self.server.process().context("PostgreSQL isn't there")?;
        let mut held = self.session.lock().await;
        let session = self.connected(&mut held).await?;
        let before: String = session.row(RULE).await?.try_get(0)?;
        if changed || before != text {
            proc::reload(process.pid);
            let begun = Instant::now();
            while session.row(RULE).await?.try_get::<_, String>(0)? != text {
                if begun.elapsed() >= self.limit {
                    bail!(
                        "PostgreSQL doesn't take the synchronous rule: something else sets \
                         synchronous_standby_names; run ALTER SYSTEM RESET synchronous_standby_names"
                    );
                }
                sleep(GLANCE).await;
            }
            let primary = !session.row(RECOVERING).await?.try_get::<_, bool>(0)?;
            if primary {
                if before.is_empty() {
                    // Backends wait for standbys only once the checkpointer has read that there is a rule.
                    session
                        .execute_within("CHECKPOINT", Duration::from_secs(60))
                        .await?;
                }
                reloaded(session).await?;
            }
        }
        let position: String = session.row(END).await?.try_get(0)?;
        wal::parse_lsn(&position).context("no position")
    }

    /// Becomes the primary, under the rule enforced. Timeline and fork.
    ///
    /// # Errors
    /// If PostgreSQL isn't promoted. It may be on its way; a cut makes certain.
    pub async fn promote(&self, slots: &[String]) -> anyhow::Result<(u32, Lsn)> {
        let mut held = self.session.lock().await;
        let session = self.connected(&mut held).await?;
        for slot in slots {
            // A standby that asks for a slot that isn't there loses half a second.
            session.any(SLOT, &[slot.as_str()]).await?;
        }
        self.server.set_leads();
        let _ = session.any("SELECT pg_promote(wait => false)", &[]).await?;
        while session.row(RECOVERING).await?.try_get::<_, bool>(0)? {
            sleep(GLANCE).await;
        }
        let name: String = session
            .row("SELECT pg_walfile_name(pg_current_wal_lsn())")
            .await?
            .try_get(0)?;
        let timeline = name
            .get(..8)
            .and_then(|t| u32::from_str_radix(t, 16).ok())
            .context("no timeline")?;
        let start = wal::fork(&self.data, timeline).context("the timeline has no history")?;
        Ok((timeline, start))
    }

    /// Stops PostgreSQL so that connected standbys get all of it. The end of the log, if it went so.
    pub async fn stop_cleanly(&self, limit: Duration) -> Option<Lsn> {
        let begun = Instant::now();
        {
            let mut held = self.session.lock().await;
            if let Ok(session) = self.connected(&mut held).await {
                // So that the shutdown's own checkpoint, during which nobody can connect, is short.
                let _ = session.execute_within("CHECKPOINT", limit / 2).await;
            }
            *held = None;
        }
        let stopped = self.server.stops(None).map(|f| f.postmaster());
        let Some(process) = stopped.filter(Proc::alive) else {
            return wal::clean_end(&self.data);
        };
        let _ = process.signal(nix::sys::signal::Signal::SIGINT);
        while process.alive() {
            if begun.elapsed() >= limit {
                warn!("the graceful stop takes too long: stops PostgreSQL at once");
                let _ = self.stop_now().await;
                return None;
            }
            sleep(GLANCE * 2).await;
        }
        wal::clean_end(&self.data)
    }

    /// What a primary sees of its standbys.
    ///
    /// # Errors
    /// If PostgreSQL doesn't answer.
    pub async fn standbys(&self) -> anyhow::Result<Standbys> {
        let mut held = self.session.lock().await;
        let session = self.connected(&mut held).await?;
        let mut seen = Standbys::default();
        for row in session.rows(STANDBYS).await? {
            let position: String = row.try_get(0)?;
            seen.position = wal::parse_lsn(&position).context("no position")?;
            let name: Option<String> = row.try_get(1)?;
            let flushed: Option<String> = row.try_get(2)?;
            if let (Some(name), Some(flushed)) = (name, flushed.and_then(|f| wal::parse_lsn(&f))) {
                seen.flushed.insert(name, flushed);
            }
        }
        Ok(seen)
    }

    async fn connected<'a>(&self, held: &'a mut Option<Session>) -> anyhow::Result<&'a Session> {
        if held.as_ref().is_some_and(Session::closed) {
            *held = None;
        }
        if held.is_none() {
            let process = self.server.process().context("PostgreSQL isn't there")?;
            // A connection that comes too early costs PostgreSQL a line in its log.
            let pid = u32::try_from(process.pid)?;
            if !crate::instance::observe::accepting(&self.data, pid) {
                bail!("PostgreSQL doesn't accept connections yet");
            }
            *held = Some(Session::connect(&self.run, self.port, "postgres", self.limit).await?);
        }
        held.as_ref().context("no session")
    }
}

/// Waits until every walsender has read the rule. One that wakes up reads its configuration before it takes a
/// reply, so two more replies than at the time of the reload are proof; one that shows none in time is ended, and
/// its successor has read it. PostgreSQL was told to, and this session's own process has.
async fn reloaded(session: &Session) -> anyhow::Result<()> {
    let begun = Instant::now();
    let since: f64 = session.row(NOW).await?.try_get(0)?;
    let mut replies: BTreeMap<i32, (String, u8)> = BTreeMap::new();
    let mut first = true;
    loop {
        let mut open = Vec::new();
        for row in session.rows(SENDERS).await? {
            let pid: i32 = row.try_get(0)?;
            let reply: String = row.try_get(1)?;
            match replies.get_mut(&pid) {
                // One that began after the reload has read it. One that was ready before, and streams only now, may not.
                None if !first && row.try_get::<_, f64>(2)? > since => {}
                None => {
                    replies.insert(pid, (reply, 0));
                    open.push(pid);
                }
                Some((last, count)) => {
                    if *last != reply {
                        *last = reply;
                        *count += 1;
                    }
                    if *count < 2 {
                        open.push(pid);
                    }
                }
            }
        }
        first = false;
        if open.is_empty() {
            return Ok(());
        }
        if begun.elapsed() >= RELOAD_LIMIT {
            for pid in open {
                session
                    .execute(&format!("SELECT pg_terminate_backend({pid}, 1000)"))
                    .await?;
            }
            return Ok(());
        }
        sleep(Duration::from_millis(20)).await;
    }
}

/// Makes the streaming of each standby what the protocol wants to know.
#[must_use]
pub fn streaming(
    seen: &Standbys,
    since: &mut BTreeMap<String, Instant>,
    now: Instant,
) -> BTreeMap<String, Streaming> {
    since.retain(|name, _| seen.flushed.contains_key(name));
    seen.flushed
        .iter()
        .map(|(name, flushed)| {
            let since = *since.entry(name.clone()).or_insert(now);
            let streaming = Streaming {
                flushed: *flushed,
                since: u64::try_from((now - since).as_millis()).unwrap_or(u64::MAX),
            };
            (name.clone(), streaming)
        })
        .collect()
}

const RECOVERING: &str = "SELECT pg_is_in_recovery()";

const RULE: &str = "SELECT current_setting('synchronous_standby_names')";

/// Idle: the startup process has asked the log's own files and waits before it asks again.
const SETTLED: &str = "SELECT pg_is_in_recovery(), \
    coalesce((SELECT wait_event = 'RecoveryRetrieveRetryInterval' FROM pg_stat_activity \
        WHERE backend_type = 'startup'), false), \
    coalesce(pg_last_wal_replay_lsn(), '0/0')::text";

const RECEIVED: &str = "SELECT greatest(coalesce(pg_last_wal_receive_lsn(), '0/0'), \
    coalesce(pg_last_wal_replay_lsn(), '0/0'))::text";

const END: &str = "SELECT (CASE WHEN pg_is_in_recovery() THEN coalesce(pg_last_wal_replay_lsn(), '0/0') \
    ELSE pg_current_wal_flush_lsn() END)::text";

const STANDBYS: &str = "SELECT pg_current_wal_flush_lsn()::text, r.application_name, r.flush_lsn::text \
    FROM (SELECT 1) one LEFT JOIN pg_stat_replication r ON r.state = 'streaming'";

const SENDERS: &str = "SELECT pid, coalesce(reply_time, 'epoch')::text, \
    extract(epoch FROM backend_start)::float8 FROM pg_stat_replication WHERE state IN ('streaming', 'catchup')";

const NOW: &str = "SELECT extract(epoch FROM clock_timestamp())::float8";

const SLOT: &str = "SELECT CASE WHEN EXISTS (SELECT 1 FROM pg_replication_slots WHERE slot_name = $1::text::name) \
    THEN NULL ELSE (SELECT slot_name FROM pg_create_physical_replication_slot($1::text::name)) END";
