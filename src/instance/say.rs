//! Saying how it is: to the store's status, the endpoints, the probes and the metrics.
//!
//! Owns the gathering of what `report` judges, and who is told. Never: blocks on anybody who is told.

use std::collections::BTreeSet;
use std::time::{Duration, Instant};

use super::http::Published;
use super::manager::Manager;
use super::plan::{self, Content, Mode, Step};
use super::report::{self, Facts};
use super::status::{Receiver, Status, Synchronous};
use super::store::{self, Endpoints, Wish};
use super::{settings, sync};
use crate::api::privacy_data_store::{InstanceRole, InstanceStatus};

impl Manager {
    pub(super) fn report(&mut self, step: &Step) {
        let rule = self.tend.rule.render();
        let mut notes = self.notes();
        notes.extend(plan::complaint(&self.seen()));
        let trouble = self
            .tend
            .trouble
            .clone()
            .or_else(|| match (&self.postgres, &self.failed) {
                (None, Some((why, _))) => Some(why.clone()),
                _ => None,
            });
        let primary = self.store.as_deref().and_then(store::primary);
        let silence = settings::replication_timeout(self.detection());
        let verdict = report::judge(&Facts {
            step,
            vitals: self.vitals.as_ref(),
            primary,
            rule: &rule,
            silence: Duration::from_secs(u64::from(silence)),
            trouble: trouble.as_deref(),
            notes: &notes,
        });
        let streaming = self.streaming();
        let in_force = self.vitals.as_ref().is_some_and(|v| v.sync_names == rule);
        let is_primary = verdict.role == InstanceRole::Primary;
        let durable =
            is_primary && sync::durable(&self.tend.rule, in_force, self.others().len(), &streaming);
        let status = self.status(&verdict, durable, in_force);
        let present = self
            .tend
            .rule
            .members
            .iter()
            .filter(|m| streaming.contains_key(*m))
            .count();
        self.metrics
            .observe(&status, if is_primary { present } else { 0 });

        let (read_write, read_only) = self.endpoints(is_primary && verdict.ready.is_ok());
        let entry = self.entry(&verdict, is_primary.then_some(durable));
        let wish = Wish {
            uid: self.store.as_ref().and_then(|s| s.metadata.uid.clone()),
            entry,
            create: true,
            read_write,
            read_only,
        };
        self.wish(wish);
        self.published.send_replace(Published {
            turn: Instant::now(),
            ready: verdict.ready,
            status,
        });
    }

    fn endpoints(&self, ready: bool) -> (Option<Endpoints>, Option<Endpoints>) {
        let (Some(store), Some(vitals), true) = (&self.store, &self.vitals, ready) else {
            return (None, None);
        };
        let term = store::term(store);
        let standbys = vitals
            .replicas
            .iter()
            .filter(|r| r.state == "streaming" && r.name != self.config.instance)
            .filter_map(|r| store::entry(store, &r.name))
            .filter(|e| e.ready == Some(true))
            .filter_map(|e| e.address.as_deref()?.parse().ok())
            .collect();
        let endpoints = |addresses| Some(Endpoints { addresses, term });
        (
            endpoints(BTreeSet::from([self.config.address])),
            endpoints(standbys),
        )
    }

    fn wish(&self, mut wish: Wish) {
        self.api.wish.send_if_modified(|now| {
            if let Some(now) = now {
                // While it can't tell who serves, what it said last stands: an address that is taken away
                // for a second is a failed connection for nothing.
                wish.read_write = wish.read_write.take().or_else(|| now.read_write.clone());
                wish.read_only = wish.read_only.take().or_else(|| now.read_only.clone());
            }
            let differs = now.as_ref() != Some(&wish);
            *now = Some(wish);
            differs
        });
    }

    /// The last words: not serving any more.
    pub(super) fn say_goodbye(&self) {
        self.api.wish.send_if_modified(|now| {
            let Some(wish) = now else { return false };
            wish.entry.role = Some(InstanceRole::Starting);
            wish.entry.ready = Some(false);
            wish.entry.durable = wish.entry.durable.map(|_| false);
            wish.entry.message = Some("is stopping".to_owned());
            wish.create = false;
            true
        });
        self.published.send_modify(|p| {
            p.ready = Err("is stopping".to_owned());
            p.status.ready = false;
            p.status.message = Some("is stopping".to_owned());
        });
    }

    /// What a person should know though it keeps nobody from working.
    fn notes(&self) -> Vec<String> {
        let mut notes: Vec<String> = self.tend.refusal.iter().cloned().collect();
        if let Some(tried) = &self.tried {
            if !tried.refused.is_empty() {
                notes.push(format!(
                    "PostgreSQL refuses these parameters, which are left out: {}",
                    tried.refused.join(", ")
                ));
            }
            if !tried.reserved.is_empty() {
                notes.push(format!(
                    "these parameters are Domicile's and are left out: {}",
                    tried.reserved.join(", ")
                ));
            }
        }
        if self.fallen_back {
            notes.push(
                "PostgreSQL doesn't start with the parameters asked for, and runs with the last that worked"
                    .to_owned(),
            );
        }
        if self.postgres.is_some() && !self.tend.pending_restart.is_empty() {
            notes.push(format!(
                "waits for restart: {}",
                self.tend.pending_restart.join(", ")
            ));
        }
        notes
    }

    fn system_identifier(&self) -> Option<String> {
        match &self.content {
            Content::Cluster(c) => Some(c.system_identifier.clone()),
            _ => None,
        }
    }

    /// The identifier for the store to know. It's what opens a new database cluster to clients, so it is said
    /// only once the application's role and database are made.
    fn reported_identifier(&self) -> Option<String> {
        let founding = self
            .postgres
            .as_ref()
            .map_or_else(|| self.unknown_primary(), |p| p.mode() == Mode::Founding);
        if founding && !self.tend.roles_made {
            return None;
        }
        self.system_identifier()
    }

    /// Whether this is the primary of a store that knows no identifier.
    fn unknown_primary(&self) -> bool {
        self.store.as_ref().is_none_or(|s| {
            store::primary(s) == Some(&self.config.instance)
                && store::system_identifier(s).is_none()
        })
    }

    fn version(&self) -> Option<String> {
        match &self.programs {
            Some(Ok(p)) => Some(p.version.clone()),
            _ => None,
        }
    }

    fn entry(&self, verdict: &report::Verdict, durable: Option<bool>) -> InstanceStatus {
        InstanceStatus {
            name: self.config.instance.clone(),
            id: self.volume.known_identity().map(|i| i.id),
            role: Some(verdict.role),
            ready: Some(verdict.ready.is_ok()),
            durable,
            address: Some(self.config.address.to_string()),
            system_identifier: self.reported_identifier(),
            postgres_version: self.version(),
            message: verdict.message.clone(),
            ..InstanceStatus::default()
        }
    }

    fn status(&self, verdict: &report::Verdict, durable: bool, in_force: bool) -> Status {
        let vitals = self.vitals.clone().unwrap_or_default();
        let known = self.vitals.is_some();
        let standby = known && vitals.in_recovery;
        Status {
            instance: self.config.instance.clone(),
            id: self.volume.known_identity().map(|i| i.id),
            role: verdict.role,
            ready: verdict.ready.is_ok(),
            term: self.store.as_deref().map(store::term),
            primary: self
                .store
                .as_deref()
                .and_then(store::primary)
                .map(str::to_owned),
            message: verdict.message.clone(),
            postgres_version: self.version(),
            timeline: known.then_some(vitals.timeline),
            system_identifier: self.system_identifier(),
            position: known.then(|| vitals.position.clone()),
            durable,
            synchronous: (known && !standby).then(|| Synchronous {
                acks: self.tend.rule.acks,
                members: self.tend.rule.members.iter().cloned().collect(),
                in_force,
            }),
            replication: vitals.replicas,
            receiver: standby.then(|| Receiver {
                upstream: self
                    .tend
                    .upstream
                    .as_ref()
                    .map(|u| u.name.clone())
                    .unwrap_or_default(),
                state: vitals
                    .receiver
                    .as_ref()
                    .map_or_else(|| "absent".to_owned(), |r| r.state.clone()),
                silent_seconds: vitals.receiver.as_ref().map(|r| r.silent.as_secs_f64()),
                replay_lag_bytes: vitals.replay_lag_bytes,
            }),
        }
    }
}
