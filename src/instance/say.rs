//! Saying how it is: to the store's status, the endpoints, the probes and the metrics.
//!
//! Owns the gathering of what `report` judges, and who is told. Never: blocks on anybody who is told.

use std::collections::BTreeSet;
use std::time::{Duration, Instant};

use super::agent::View;
use super::agent::names::instance_of;
use super::http::Published;
use super::manager::Manager;
use super::plan::{self, Content, Mode, Step};
use super::report::{self, Facts};
use super::status::{Receiver, Slot, Status, Synchronous};
use super::store::{self, Endpoints, Wish};
use super::{settings, sync};
use crate::api::privacy_data_store::{
    AgreedConfiguration, InstanceRole, InstanceStatus, LastFailover,
};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::MicroTime;

/// A term as the kinds have it.
fn term(term: u64) -> i64 {
    i64::try_from(term).unwrap_or(i64::MAX)
}

/// What the instances have agreed on, if this one is their primary.
fn agreed(view: &View) -> Option<AgreedConfiguration> {
    let c = view.configuration.as_ref().filter(|_| view.serving)?;
    Some(AgreedConfiguration {
        term: term(c.term),
        version: term(c.version),
        primary: Some(c.primary.clone()),
        voters: c.voters.iter().cloned().collect(),
        witness: c.witness.clone(),
        sync_members: c.sync.members.iter().cloned().collect(),
        acks: i32::try_from(c.sync.acks).unwrap_or(i32::MAX),
        may_be_primary: c.may_be_primary.iter().cloned().collect(),
    })
}

/// The failover that made this instance primary.
fn story(view: &View, instance: &str) -> Option<LastFailover> {
    let last = view.failover.as_ref().filter(|_| view.serving)?;
    let at = |t: Option<jiff::Timestamp>| t.map(MicroTime);
    Some(LastFailover {
        term: term(last.term),
        primary: instance.to_owned(),
        previous_primary: last.previous.clone(),
        reason: last.reason.to_owned(),
        detected_at: at(last.detected),
        fenced_at: at(last.fenced),
        elected_at: at(last.elected),
        promoted_at: at(last.promoted),
        routed_at: None,
    })
}

impl Manager {
    pub(super) fn report(&mut self, step: &Step) {
        let view = self.agent.view.borrow().clone();
        let asked = self.asked;
        let rule = view
            .ruled
            .filter(|since| asked.is_some_and(|asked| asked >= *since))
            .map(|_| view.rule.as_str());
        let mut notes = self.notes();
        notes.extend(plan::complaint(&self.seen()));
        let streaming = self.streaming();
        let configuration = view.configuration.as_ref();
        let present = configuration
            .into_iter()
            .flat_map(|c| &c.sync.members)
            .filter(|m| streaming.contains_key(*m))
            .count();
        let needed = configuration.map_or(0, |c| c.sync.acks);
        if view.serving && self.vitals.is_some() && present < needed {
            notes.push(format!(
                "writes wait: {needed} of the standbys must have each commit, and {present} stream"
            ));
        }
        let trouble = self
            .tend
            .trouble
            .clone()
            .or_else(|| match (&self.postgres, &self.failed) {
                (None, Some((why, _))) => Some(why.clone()),
                _ => None,
            });
        let primary = view
            .primary
            .as_deref()
            .or_else(|| self.store.as_deref().and_then(store::primary));
        let silence = settings::replication_timeout(self.detection());
        let verdict = report::judge(&Facts {
            step,
            vitals: self.vitals.as_ref(),
            primary,
            rule,
            serving: view.serving,
            silence: Duration::from_secs(u64::from(silence)),
            trouble: trouble.as_deref(),
            notes: &notes,
        });
        let in_force = self
            .vitals
            .as_ref()
            .is_some_and(|v| report::in_force(v, rule));
        let is_primary = verdict.role == InstanceRole::Primary;
        let durable =
            is_primary && configuration.is_some_and(|c| sync::durable(c, in_force, &streaming));
        let status = self.status(&view, &verdict, durable, in_force);
        if let Some(failover) = view.failover.as_ref().filter(|f| f.term > self.told_term) {
            self.told_term = failover.term;
            self.metrics.promoted(failover);
        }
        self.metrics
            .observe(&status, if is_primary { present } else { 0 });

        let (read_write, read_only) = self.endpoints(&view, is_primary && verdict.ready.is_ok());
        let entry = self.entry(&view, &verdict, is_primary.then_some(durable));
        let wish = Wish {
            uid: self.store.as_ref().and_then(|s| s.metadata.uid.clone()),
            entry,
            create: true,
            configuration: agreed(&view),
            failover: story(&view, &self.config.instance),
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

    fn endpoints(&self, view: &View, ready: bool) -> (Option<Endpoints>, Option<Endpoints>) {
        let (Some(store), Some(vitals), Some(configuration), true) =
            (&self.store, &self.vitals, &view.configuration, ready)
        else {
            return (None, None);
        };
        let term = term(configuration.term);
        let standbys = vitals
            .replicas
            .iter()
            .filter(|r| r.state == "streaming")
            .map(|r| instance_of(&r.name))
            .filter(|name| *name != self.config.instance)
            .filter_map(|name| store::entry(store, name))
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
            wish.configuration = None;
            wish.failover = None;
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
        notes.extend_from_slice(self.tend.rights.words());
        let view = self.agent.view.borrow();
        if view.primary.is_none()
            && let Some(stuck) = &view.stuck
        {
            notes.push(format!("there is no primary: {stuck}"));
        }
        if view.rebuilding {
            notes.push("its copy doesn't count until it is level with the primary".to_owned());
        }
        drop(view);
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
        for (name, floor) in settings::floors(&self.parameters, &self.tend.floors) {
            if self.parameters.contains_key(name) {
                notes.push(format!(
                    "{name} stays at {floor}: it can be raised but not lowered, since a copy isn't started with less \
                     than its primary had"
                ));
            }
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

    fn entry(
        &self,
        view: &View,
        verdict: &report::Verdict,
        durable: Option<bool>,
    ) -> InstanceStatus {
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
            term: view.configuration.as_ref().map(|c| term(c.term)),
            voter: view
                .configuration
                .as_ref()
                .map(|c| c.voters.contains(&view.me)),
            fenced: view.fenced.then_some(true),
            trusts: self.authorities.0.clone(),
            strangers: self.tend.strangers.told(),
            signed_by: self.authorities.1.clone(),
            pending_restart: (self.postgres.is_some() && !self.tend.pending_restart.is_empty())
                .then_some(true),
            ..InstanceStatus::default()
        }
    }

    fn status(
        &self,
        view: &View,
        verdict: &report::Verdict,
        durable: bool,
        in_force: bool,
    ) -> Status {
        let mut vitals = self.vitals.clone().unwrap_or_default();
        for replica in &mut vitals.replicas {
            replica.name = instance_of(&replica.name).to_owned();
        }
        let known = self.vitals.is_some();
        let standby = known && vitals.in_recovery;
        let configuration = view.configuration.as_ref();
        Status {
            instance: self.config.instance.clone(),
            id: self.volume.known_identity().map(|i| i.id),
            role: verdict.role,
            ready: verdict.ready.is_ok(),
            term: view.configuration.as_ref().map(|c| term(c.term)),
            primary: view.primary.clone(),
            message: verdict.message.clone(),
            postgres_version: self.version(),
            timeline: known.then_some(vitals.timeline),
            system_identifier: self.system_identifier(),
            position: known.then(|| vitals.position.clone()),
            durable,
            synchronous: (known && !standby).then(|| Synchronous {
                acks: configuration.map_or(0, |c| c.sync.acks),
                members: configuration
                    .into_iter()
                    .flat_map(|c| &c.sync.members)
                    .map(|m| instance_of(m).to_owned())
                    .collect(),
                in_force,
            }),
            replication: vitals.replicas,
            slots: known.then(|| {
                let slots = vitals.slots.iter();
                slots
                    .map(|s| Slot {
                        name: s.name.clone(),
                        active: s.active,
                    })
                    .collect()
            }),
            receiver: standby.then(|| Receiver {
                upstream: view
                    .following
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
            sessions: view.sessions.clone(),
        }
    }
}
