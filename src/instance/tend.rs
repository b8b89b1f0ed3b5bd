//! Looking after a PostgreSQL that runs as it should.
//!
//! Owns, on a primary: roles, slots, and what privacy workflows need; on a standby: the sign that it can't go on; on both: the configuration.
//! Upstream and synchronous rule are the agent's. Each is brought to what the store asks for on every turn, from
//! what is seen, so that nothing depends on a turn that was missed.
//! Never: drops a slot that isn't an instance's of this store.

use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, Instant};

use tracing::{info, warn};

use super::manager::Manager;
use super::plan::Mode;
use super::settings::{self, Input};
use super::{files, rights, roles, store, vitals};
use crate::api::names;

/// A slot of an instance that is listed no more is kept this long: a list may be incomplete for a moment.
const SLOT_GRACE: Duration = Duration::from_secs(60);
/// How often parameters that wait for a restart are looked for.
const PENDING_EVERY: Duration = Duration::from_secs(30);
/// How long a standby is without a stream before PostgreSQL's reason is told.
const SAY_WHY_AFTER: Duration = Duration::from_secs(5);

impl Manager {
    /// One turn of looking after.
    pub(super) async fn tend(&mut self, mode: Mode) {
        let Some(vitals) = self.vitals.clone() else {
            return;
        };
        // From a standby as well: it has the same log.
        self.cut_strangers(&vitals).await;
        match mode {
            Mode::Primary | Mode::Founding if !vitals.in_recovery => {
                self.note_streaming(&vitals);
                self.keep_conf(mode);
                let refusal = self.keep_roles(mode).await.err().map(|e| format!("{e:#}"));
                if let Some(why) = &refusal
                    && self.tend.refusal != refusal
                {
                    warn!("{why}");
                }
                self.tend.refusal = refusal;
                if let Err(e) = self.keep_slots(&vitals).await {
                    warn!("can't keep the replication slots: {e:#}");
                }
                self.keep_rights(mode);
            }
            Mode::Standby if vitals.in_recovery => {
                self.keep_conf(mode);
                if let Err(e) = self.drop_stale_slots(&vitals).await {
                    warn!("can't drop a slot of an earlier life: {e:#}");
                }
                self.note_silence(&vitals);
            }
            // Between the promotion and the agent's word of it.
            Mode::Standby if self.agent.server.leads() => return,
            Mode::Standby => {
                // Its log has an era that nobody voted for: it must not pass for a copy, however long it is.
                let _ = self.agent.input.send(super::agent::Input::Stranded);
                // A client that tries every host of the application's URI would take it for the primary.
                self.stop_postgres("it was promoted by hand");
                return;
            }
            Mode::Primary | Mode::Founding => {}
        }
        self.ask_pending().await;
    }

    // --- configuration

    /// Writes the configuration if it isn't as it should be. True if it changed.
    pub(super) fn write_conf(&mut self, mode: Mode) -> std::io::Result<bool> {
        let Some(Ok(programs)) = &self.programs else {
            return Ok(false);
        };
        let text = settings::render(&Input {
            major: programs.major,
            instance: &self.config.instance,
            listen: match mode {
                Mode::Founding => "",
                Mode::Primary | Mode::Standby => &self.config.listen,
            },
            port: self.config.port,
            run: &self.config.run,
            detection_seconds: self.detection(),
            volume_bytes: self.space.1,
            user: &self.parameters,
            floors: &self.tend.floors,
        });
        if text == self.tend.conf {
            return Ok(false);
        }
        let path = self.config.run.join("conf/postgresql.conf");
        files::replace(&path, text.as_bytes(), 0o600)?;
        self.tend.conf = text;
        Ok(true)
    }

    fn keep_conf(&mut self, mode: Mode) {
        match self.write_conf(mode) {
            Ok(true) => {
                info!("the configuration changed: PostgreSQL reads it again");
                self.tend.pending_asked = None;
                if let Some(postgres) = &self.postgres {
                    postgres.reload();
                }
            }
            Ok(false) => {}
            Err(e) => warn!("can't write PostgreSQL's configuration: {e}"),
        }
    }

    pub(super) fn others(&self) -> BTreeSet<String> {
        store::others(self.store.as_deref(), &self.config)
    }

    pub(super) fn streaming(&self) -> BTreeMap<String, Duration> {
        self.tend
            .streaming_since
            .iter()
            .map(|(name, since)| (name.clone(), since.elapsed()))
            .collect()
    }

    fn note_streaming(&mut self, vitals: &vitals::Vitals) {
        let now: BTreeSet<&str> = vitals
            .replicas
            .iter()
            .filter(|r| r.state == "streaming")
            .map(|r| r.name.as_str())
            .collect();
        let since = &mut self.tend.streaming_since;
        since.retain(|name, _| now.contains(name.as_str()));
        for name in now {
            since.entry(name.to_owned()).or_insert_with(Instant::now);
        }
    }

    async fn ask_pending(&mut self) {
        let due = self
            .tend
            .pending_asked
            .is_none_or(|at| at.elapsed() >= PENDING_EVERY);
        let Some(session) = &self.session else { return };
        if due && let Ok(pending) = vitals::pending_restart(session).await {
            // Right after a reload the answer may still be the old one: ask once more next turn.
            self.tend.pending_asked = (self.tend.pending_restart == pending).then(Instant::now);
            self.tend.pending_restart = pending;
        }
    }

    /// Ends the replication of whoever isn't one of the store's instances.
    async fn cut_strangers(&mut self, vitals: &vitals::Vitals) {
        let Some(session) = &self.session else { return };
        let others = store::others(self.store.as_deref(), &self.config);
        let addresses = self.agent.view.borrow().addresses.clone();
        // An instance's old walsender is gone by then.
        let patience = settings::replication_timeout(self.detection()) + 1;
        let patience = Duration::from_secs(u64::from(patience));
        let found = self.tend.strangers.look(
            &vitals.senders,
            &others,
            &addresses,
            patience,
            Instant::now(),
        );
        for stranger in found {
            let cut = format!("SELECT pg_terminate_backend({})", stranger.pid);
            match session.row(&cut).await.and_then(|r| Ok(r.try_get(0)?)) {
                // What was seen of it is a moment old: it has gone, or was cut off a turn ago.
                Ok(false) => {}
                Ok(true) => {
                    warn!("{}: it is cut off", stranger.words);
                    self.metrics.cut_stranger();
                }
                Err(e) => warn!("{}: it can't be cut off: {e:#}", stranger.words),
            }
        }
    }

    // --- primary

    async fn keep_roles(&mut self, mode: Mode) -> anyhow::Result<()> {
        let (Some(session), Some(store)) = (&self.session, &self.store) else {
            return Ok(());
        };
        if !self.tend.roles_made {
            roles::replication(session).await?;
        }
        if let Some(credentials) = &self.credentials
            && self.tend.applied.as_ref() != Some(credentials)
        {
            roles::application(session, &store.spec.database, credentials).await?;
            self.tend.applied = Some(credentials.clone());
            info!("the application's password is set");
        }
        if !self.tend.roles_made && mode == Mode::Founding {
            if self.tend.applied.is_none() {
                return Ok(());
            }
            roles::database(session, &store.spec.database).await?;
        }
        self.tend.roles_made = true;
        Ok(())
    }

    /// What privacy workflows need. Beside the loop: a turn only begins it, or takes its result.
    fn keep_rights(&mut self, mode: Mode) {
        let Some(store) = &self.store else { return };
        // A founding PostgreSQL has neither clients nor the application's database yet.
        if mode != Mode::Primary || !self.tend.roles_made {
            return;
        }
        let place = rights::Place {
            run: self.config.run.clone(),
            port: self.config.port,
        };
        let wanted = rights::Wanted::of(store);
        self.tend.rights.turn(&wanted, &place, Instant::now());
    }

    async fn keep_slots(&mut self, vitals: &vitals::Vitals) -> anyhow::Result<()> {
        let Some(session) = &self.session else {
            return Ok(());
        };
        let wanted: BTreeSet<String> = self.others().iter().map(|o| settings::slot(o)).collect();
        for slot in &wanted {
            let present = vitals.slots.iter().find(|s| s.name == *slot);
            if let Some(lost) = present.filter(|s| s.lost && !s.active) {
                warn!(
                    slot = lost.name,
                    "its WAL is gone: the standby has to be cloned anew"
                );
                drop_slot(session, slot).await?;
            }
            if present.is_none_or(|s| s.lost && !s.active) {
                info!(slot, "makes the replication slot");
                session
                    .any(
                        "SELECT pg_create_physical_replication_slot($1::text::name)",
                        &[slot],
                    )
                    .await?;
            }
        }
        let gone: BTreeSet<String> = vitals
            .slots
            .iter()
            .filter(|s| !s.active && !wanted.contains(&s.name))
            .filter(|s| is_instance_slot(&self.config.store, &s.name))
            .map(|s| s.name.clone())
            .collect();
        self.tend.gone_since.retain(|name, _| gone.contains(name));
        for slot in gone {
            let since = *self
                .tend
                .gone_since
                .entry(slot.clone())
                .or_insert_with(Instant::now);
            if since.elapsed() >= SLOT_GRACE {
                info!(
                    slot,
                    "drops the replication slot of an instance that is gone"
                );
                drop_slot(session, &slot).await?;
            }
        }
        Ok(())
    }

    // --- standby

    /// A slot that this instance filled when it was primary holds WAL back for nobody.
    async fn drop_stale_slots(&mut self, vitals: &vitals::Vitals) -> anyhow::Result<()> {
        let due = self
            .tend
            .stale_slots
            .is_none_or(|at| at.elapsed() >= SLOT_GRACE);
        let Some(session) = self.session.as_ref().filter(|_| due) else {
            return Ok(());
        };
        self.tend.stale_slots = Some(Instant::now());
        for slot in vitals.slots.iter().filter(|s| !s.active && s.reserves) {
            if is_instance_slot(&self.config.store, &slot.name) {
                info!(
                    slot = slot.name,
                    "drops a slot of an earlier life as primary"
                );
                drop_slot(session, &slot.name).await?;
            }
        }
        Ok(())
    }

    /// Notices a standby whose WAL is gone on the primary: it would ask for it for ever.
    fn note_silence(&mut self, vitals: &vitals::Vitals) {
        let streams = vitals
            .receiver
            .as_ref()
            .is_some_and(|r| r.state == "streaming");
        if streams {
            self.tend.silent_since = None;
            self.signs.clear_wal_gone();
            self.signs.clear_fatal();
            return;
        }
        let since = *self.tend.silent_since.get_or_insert_with(Instant::now);
        // Not for a short break: its words change with every attempt, and each change is a write.
        if since.elapsed() >= SAY_WHY_AFTER {
            self.tend.trouble = self.signs.last_fatal();
        }
        // Only of the primary that serves now: a copy isn't given up for the words of one that is gone.
        let follows = self.agent.view.borrow().following.is_some();
        if self.signs.wal_gone() && follows && since.elapsed() >= self.config.timing.stranded_after
        {
            warn!("the primary no longer has the WAL that this standby needs: it is copied anew");
            self.signs.clear_wal_gone();
            let _ = self.agent.input.send(super::agent::Input::Stranded);
        }
    }
}

async fn drop_slot(session: &super::session::Session, slot: &str) -> anyhow::Result<()> {
    session
        .any("SELECT pg_drop_replication_slot($1::text::name)", &[slot])
        .await
        .map(|_| ())
}

/// Whether a slot's name is that of an instance of this store.
fn is_instance_slot(store: &str, slot: &str) -> bool {
    slot.strip_prefix(&settings::slot(store))
        .and_then(|rest| rest.strip_prefix('_'))
        .and_then(|digits| digits.parse().ok())
        .is_some_and(|n: u32| settings::slot(&names::instance(store, n)) == slot)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_slots_of_this_stores_instances_are_ours() {
        assert!(is_instance_slot("my-store", "my_store_2"));
        for foreign in [
            "my_store",
            "my_store_x",
            "my_store_02",
            "other_2",
            "my_store_2_x",
        ] {
            assert!(!is_instance_slot("my-store", foreign), "{foreign}");
        }
    }
}
