//! An instance's metrics, in OpenMetrics' text.
//!
//! Owns their names and units. Never: a label from a user's object; the only label values are names of
//! instances, roles, and the two kinds of work.

use std::sync::atomic::AtomicU64;
use std::time::Duration;

use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::encoding::text::encode;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::registry::{Registry, Unit};

use super::status::Status;
use crate::api::privacy_data_store::InstanceRole;

#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
struct Standby {
    standby: String,
}

#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
struct Role {
    role: &'static str,
}

#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
struct Milestone {
    milestone: &'static str,
}

#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
struct Work {
    work: &'static str,
}

type Float = Gauge<f64, AtomicU64>;

/// An instance's metrics.
pub struct Metrics {
    registry: Registry,
    role: Family<Role, Gauge>,
    ready: Gauge,
    durable: Gauge,
    term: Gauge,
    lag_bytes: Family<Standby, Gauge>,
    lag_seconds: Family<Standby, Float>,
    replay_lag_bytes: Gauge,
    acks_needed: Gauge,
    acks_present: Gauge,
    promotions: Counter,
    milestones: Family<Milestone, Float>,
    starts: Counter,
    crashes: Counter,
    client_errors: Counter,
    strangers_cut: Counter,
    work_seconds: Family<Work, Float>,
    free_bytes: Gauge,
    size_bytes: Gauge,
}

impl std::fmt::Debug for Metrics {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Metrics(..)")
    }
}

impl Default for Metrics {
    fn default() -> Self {
        let mut r = Registry::with_prefix("domicile_instance");
        let m = Self {
            role: Family::default(),
            ready: Gauge::default(),
            durable: Gauge::default(),
            term: Gauge::default(),
            lag_bytes: Family::default(),
            lag_seconds: Family::default(),
            replay_lag_bytes: Gauge::default(),
            acks_needed: Gauge::default(),
            acks_present: Gauge::default(),
            promotions: Counter::default(),
            milestones: Family::default(),
            starts: Counter::default(),
            crashes: Counter::default(),
            client_errors: Counter::default(),
            strangers_cut: Counter::default(),
            work_seconds: Family::default(),
            free_bytes: Gauge::default(),
            size_bytes: Gauge::default(),
            registry: Registry::default(),
        };
        r.register("role", "1 for what the instance is", m.role.clone());
        r.register("ready", "1 while it serves", m.ready.clone());
        r.register(
            "durable",
            "1 while a commit waits for enough standbys that are there (primary)",
            m.durable.clone(),
        );
        r.register(
            "term",
            "The store's term as the instance knows it",
            m.term.clone(),
        );
        r.register_with_unit(
            "standby_lag",
            "WAL that a standby hasn't flushed (primary)",
            Unit::Bytes,
            m.lag_bytes.clone(),
        );
        r.register_with_unit(
            "standby_lag",
            "Time until a standby had flushed recent WAL, as last measured (primary)",
            Unit::Seconds,
            m.lag_seconds.clone(),
        );
        r.register_with_unit(
            "replay_lag",
            "WAL received but not replayed (standby)",
            Unit::Bytes,
            m.replay_lag_bytes.clone(),
        );
        r.register(
            "sync_acks_needed",
            "Acknowledgements that a commit waits for (primary)",
            m.acks_needed.clone(),
        );
        r.register(
            "sync_acks_present",
            "Synchronous standbys that stream now (primary)",
            m.acks_present.clone(),
        );
        r.register(
            "promotions",
            "Elections that this instance won",
            m.promotions.clone(),
        );
        r.register_with_unit(
            "failover_duration",
            "From the sign that the old primary is gone to each milestone of the last failover that this instance won",
            Unit::Seconds,
            m.milestones.clone(),
        );
        r.register("postgres_starts", "Starts of PostgreSQL", m.starts.clone());
        r.register(
            "postgres_crashes",
            "Ends of PostgreSQL that the manager didn't ask for",
            m.crashes.clone(),
        );
        r.register(
            "strangers_cut",
            "Replication connections ended that weren't of an instance of this store",
            m.strangers_cut.clone(),
        );
        r.register(
            "client_errors",
            "Warnings and errors of clients' statements and connections",
            m.client_errors.clone(),
        );
        r.register_with_unit(
            "work_duration",
            "How long the last initdb or clone took",
            Unit::Seconds,
            m.work_seconds.clone(),
        );
        r.register_with_unit(
            "volume_free",
            "Free space on the volume",
            Unit::Bytes,
            m.free_bytes.clone(),
        );
        r.register_with_unit(
            "volume_size",
            "Size of the volume",
            Unit::Bytes,
            m.size_bytes.clone(),
        );
        Self { registry: r, ..m }
    }
}

fn int(n: u64) -> i64 {
    i64::try_from(n).unwrap_or(i64::MAX)
}

impl Metrics {
    /// Takes over what the status says.
    pub fn observe(&self, status: &Status, acks_present: usize) {
        for (role, name) in [
            (InstanceRole::Starting, "Starting"),
            (InstanceRole::Primary, "Primary"),
            (InstanceRole::Standby, "Standby"),
            (InstanceRole::Failed, "Failed"),
        ] {
            let is = i64::from(status.role == role);
            self.role.get_or_create(&Role { role: name }).set(is);
        }
        self.ready.set(i64::from(status.ready));
        self.durable.set(i64::from(status.durable));
        self.term.set(status.term.unwrap_or(0));
        let needed = status.synchronous.as_ref().map_or(0, |s| s.acks);
        self.acks_needed.set(int(needed as u64));
        self.acks_present.set(int(acks_present as u64));
        self.lag_bytes.clear();
        self.lag_seconds.clear();
        for r in &status.replication {
            let label = Standby {
                standby: r.name.clone(),
            };
            self.lag_bytes.get_or_create(&label).set(r.lag_bytes);
            if let Some(seconds) = r.lag_seconds {
                self.lag_seconds.get_or_create(&label).set(seconds);
            }
        }
        let replay = status.receiver.as_ref().and_then(|r| r.replay_lag_bytes);
        self.replay_lag_bytes.set(replay.unwrap_or(0));
    }

    /// This instance has become primary.
    pub fn promoted(&self, failover: &super::agent::Failover) {
        self.promotions.inc();
        let Some(begun) = failover.detected else {
            return;
        };
        for (milestone, at) in [
            ("fenced", failover.fenced),
            ("elected", failover.elected),
            ("promoted", failover.promoted),
        ] {
            if let Some(at) = at {
                self.milestones
                    .get_or_create(&Milestone { milestone })
                    .set(at.duration_since(begun).as_secs_f64());
            }
        }
    }

    /// PostgreSQL was started.
    pub fn started(&self) {
        self.starts.inc();
    }

    /// PostgreSQL ended by itself.
    pub fn crashed(&self) {
        self.crashes.inc();
    }

    /// Somebody's replication was ended.
    pub fn cut_stranger(&self) {
        self.strangers_cut.inc();
    }

    /// How many errors clients have had so far.
    pub fn clients(&self, errors: u64) {
        self.client_errors
            .inc_by(errors.saturating_sub(self.client_errors.get()));
    }

    /// A piece of work took this long.
    pub fn worked(&self, work: &'static str, took: Duration) {
        self.work_seconds
            .get_or_create(&Work { work })
            .set(took.as_secs_f64());
    }

    /// The volume's space.
    pub fn space(&self, free: u64, size: u64) {
        self.free_bytes.set(int(free));
        self.size_bytes.set(int(size));
    }

    /// All of it as text.
    #[must_use]
    pub fn text(&self) -> String {
        let mut out = String::new();
        // Writing to a String can't fail.
        let _ = encode(&mut out, &self.registry);
        out
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::instance::status::Replica;

    #[test]
    fn what_is_shown() {
        let metrics = Metrics::default();
        let status = Status {
            role: InstanceRole::Primary,
            replication: vec![Replica {
                name: "s-2".into(),
                lag_bytes: 7,
                lag_seconds: Some(0.5),
                ..Replica::default()
            }],
            ..Status::default()
        };
        metrics.observe(&status, 1);
        metrics.clients(3);
        metrics.clients(3);
        let text = metrics.text();
        for line in [
            "domicile_instance_role{role=\"Primary\"} 1",
            "domicile_instance_role{role=\"Standby\"} 0",
            "domicile_instance_standby_lag_bytes{standby=\"s-2\"} 7",
            "domicile_instance_standby_lag_seconds{standby=\"s-2\"} 0.5",
            "domicile_instance_client_errors_total 3",
        ] {
            assert!(text.contains(line), "{line} in\n{text}");
        }
        // A standby that is gone leaves no line behind.
        metrics.observe(&Status::default(), 0);
        assert!(!metrics.text().contains("s-2"));
    }

    #[test]
    fn every_metric_is_documented() {
        let doc = include_str!("../../docs/instance.md");
        for line in Metrics::default().text().lines() {
            if let Some(name) = line
                .strip_prefix("# HELP ")
                .and_then(|l| l.split(' ').next())
            {
                assert!(doc.contains(name), "{name} is missing in docs/instance.md");
            }
        }
    }
}
