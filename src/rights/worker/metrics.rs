//! A worker's metrics, in OpenMetrics' text.
//!
//! Owns their names and units. Never: a label that stands for a person or a request. Label values are names of targets,
//! kinds of systems, the worker's region, and words of [`Reason`] and of outcomes.

use std::time::Duration;

use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::encoding::text::encode;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::{Histogram, exponential_buckets};
use prometheus_client::registry::{Registry, Unit};

use super::breaker::State;
use crate::rights::config::{System, Target};
use crate::rights::connectors::Reason;

#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
struct Task {
    sink: String,
    sink_kind: &'static str,
    region: String,
    outcome: &'static str,
}

#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
struct Stage {
    sink_kind: &'static str,
    stage: &'static str,
}

#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
struct Sink {
    sink: String,
}

#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
struct Copies {
    sink: String,
    copy_kind: &'static str,
}

#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
struct Call {
    sink: String,
    call: &'static str,
}

type Seconds = Family<Task, Histogram, fn() -> Histogram>;

/// A worker's metrics.
pub struct Metrics {
    registry: Registry,
    task: Seconds,
    errors: Family<Task, Counter>,
    propagation: Family<Stage, Histogram, fn() -> Histogram>,
    probe_failures: Family<Sink, Counter>,
    resurrections: Family<Sink, Counter>,
    residual: Family<Copies, Gauge>,
    claims: Family<Sink, Counter>,
    claimed: Family<Sink, Counter>,
    lease_losses: Family<Sink, Counter>,
    outdated: Family<Sink, Counter>,
    breaker: Family<Sink, Gauge>,
    ledger_errors: Family<Call, Counter>,
}

impl std::fmt::Debug for Metrics {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Metrics(..)")
    }
}

/// From a millisecond to about half a minute.
fn short() -> Histogram {
    Histogram::new(exponential_buckets(0.001, 2.0, 16))
}

/// From five milliseconds to about a month and a half.
fn long() -> Histogram {
    Histogram::new(exponential_buckets(0.005, 3.0, 19))
}

impl Default for Metrics {
    fn default() -> Self {
        let mut m = Self {
            registry: Registry::default(),
            task: Family::new_with_constructor(short),
            errors: Family::default(),
            propagation: Family::new_with_constructor(long),
            probe_failures: Family::default(),
            resurrections: Family::default(),
            residual: Family::default(),
            claims: Family::default(),
            claimed: Family::default(),
            lease_losses: Family::default(),
            outdated: Family::default(),
            breaker: Family::default(),
            ledger_errors: Family::default(),
        };
        let mut r = Registry::with_prefix("rights");
        r.register_with_unit(
            "sink_task",
            "Time that a target takes for a batch: erased and probed",
            Unit::Seconds,
            m.task.clone(),
        );
        r.register(
            "sink_errors",
            "Steps that a target failed, by reason",
            m.errors.clone(),
        );
        r.register_with_unit(
            "propagation",
            "From when a request was accepted until the person was read as absent",
            Unit::Seconds,
            m.propagation.clone(),
        );
        r.register(
            "probe_failures",
            "Probes that couldn't tell",
            m.probe_failures.clone(),
        );
        r.register(
            "resurrections",
            "Data found again after it was erased",
            m.resurrections.clone(),
        );
        r.register_with_unit(
            "residual_bound",
            "How long erased bytes may live on in copies that the target makes of itself",
            Unit::Seconds,
            m.residual.clone(),
        );
        r.register("claims", "Batches claimed", m.claims.clone());
        r.register("steps_claimed", "Steps claimed", m.claimed.clone());
        r.register(
            "lease_losses",
            "Batches that were stopped since their lease ended",
            m.lease_losses.clone(),
        );
        r.register(
            "outdated_results",
            "Results that the ledger didn't take, since another worker held the step",
            m.outdated.clone(),
        );
        r.register(
            "breaker_state",
            "Circuit breaker of a target: 0 closed, 1 half open, 2 open",
            m.breaker.clone(),
        );
        r.register(
            "ledger_errors",
            "Calls to the ledger that failed",
            m.ledger_errors.clone(),
        );
        m.registry = r;
        m
    }
}

/// What a system is called in metrics.
#[must_use]
pub fn kind(system: &System) -> &'static str {
    match system {
        System::PostgreSql { .. } => "PostgreSQL",
        System::Redis { .. } => "Redis",
    }
}

impl Metrics {
    /// Those of one target, worked on from `region`.
    #[must_use]
    pub fn of<'a>(&'a self, target: &'a Target, region: &'a str) -> OfTarget<'a> {
        OfTarget {
            all: self,
            target,
            region,
        }
    }

    /// All of them, as they are scraped.
    #[must_use]
    pub fn text(&self) -> String {
        let mut out = String::new();
        // Writing to a String can't fail.
        let _ = encode(&mut out, &self.registry);
        out
    }
}

/// One target's.
#[derive(Clone, Copy, Debug)]
pub struct OfTarget<'a> {
    all: &'a Metrics,
    target: &'a Target,
    region: &'a str,
}

impl OfTarget<'_> {
    fn sink(&self) -> Sink {
        Sink {
            sink: self.target.name.clone(),
        }
    }

    fn task_labels(&self, outcome: &'static str) -> Task {
        Task {
            sink: self.target.name.clone(),
            sink_kind: kind(&self.target.system),
            region: self.region.to_owned(),
            outcome,
        }
    }

    /// The lane begins.
    pub fn begin(&self, residue: Option<Duration>) {
        self.breaker(State::Closed);
        // So that they are there, as 0, before the first of them happens: they are alerted on.
        drop(self.all.probe_failures.get_or_create(&self.sink()));
        drop(self.all.resurrections.get_or_create(&self.sink()));
        drop(self.all.lease_losses.get_or_create(&self.sink()));
        if let Some(residue) = residue {
            let labels = Copies {
                sink: self.target.name.clone(),
                copy_kind: "own",
            };
            let seconds = i64::try_from(residue.as_secs()).unwrap_or(i64::MAX);
            self.all.residual.get_or_create(&labels).set(seconds);
        }
    }

    /// The lane has ended, and shows nothing any more that could be taken for how things are.
    pub fn end(&self) {
        self.all.breaker.remove(&self.sink());
        let labels = Copies {
            sink: self.target.name.clone(),
            copy_kind: "own",
        };
        self.all.residual.remove(&labels);
    }

    /// A batch was claimed.
    pub fn claimed(&self, steps: usize) {
        self.all.claims.get_or_create(&self.sink()).inc();
        let steps = u64::try_from(steps).unwrap_or(u64::MAX);
        self.all.claimed.get_or_create(&self.sink()).inc_by(steps);
    }

    /// A batch was carried out.
    pub fn task(&self, took: Duration, outcome: &'static str) {
        let labels = self.task_labels(outcome);
        self.all
            .task
            .get_or_create(&labels)
            .observe(took.as_secs_f64());
    }

    /// Steps failed.
    pub fn error(&self, reason: Reason) {
        let labels = self.task_labels(reason.as_str());
        self.all.errors.get_or_create(&labels).inc();
    }

    /// A person was read as absent, so long after the request was accepted.
    pub fn absent_after(&self, time: Duration) {
        let labels = Stage {
            sink_kind: kind(&self.target.system),
            stage: "logical",
        };
        self.all
            .propagation
            .get_or_create(&labels)
            .observe(time.as_secs_f64());
    }

    /// A probe couldn't tell.
    pub fn probe_failed(&self) {
        self.all.probe_failures.get_or_create(&self.sink()).inc();
    }

    /// What was erased is there again.
    pub fn resurrected(&self) {
        self.all.resurrections.get_or_create(&self.sink()).inc();
    }

    /// A batch was stopped.
    pub fn lease_lost(&self) {
        self.all.lease_losses.get_or_create(&self.sink()).inc();
    }

    /// Results weren't taken.
    pub fn outdated(&self, results: usize) {
        let results = u64::try_from(results).unwrap_or(u64::MAX);
        self.all
            .outdated
            .get_or_create(&self.sink())
            .inc_by(results);
    }

    /// Where the breaker stands.
    pub fn breaker(&self, state: State) {
        let value = match state {
            State::Closed => 0,
            State::HalfOpen => 1,
            State::Open { .. } => 2,
        };
        self.all.breaker.get_or_create(&self.sink()).set(value);
    }

    /// The ledger didn't do what it was asked.
    pub fn ledger_error(&self, call: &'static str) {
        let labels = Call {
            sink: self.target.name.clone(),
            call,
        };
        self.all.ledger_errors.get_or_create(&labels).inc();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_names_that_alerts_and_dashboards_use() {
        let metrics = Metrics::default();
        let target = Target {
            name: "sessions".to_owned(),
            regions: vec!["eu".to_owned()],
            settle_seconds: 0,
            residue_days: Some(2),
            system: System::Redis { keys: Vec::new() },
        };
        let m = metrics.of(&target, "eu");
        m.begin(Some(Duration::from_secs(172_800)));
        m.claimed(3);
        m.task(Duration::from_millis(5), "answered");
        m.error(Reason::Locked);
        m.absent_after(Duration::from_millis(20));
        m.probe_failed();
        m.resurrected();
        m.lease_lost();
        m.outdated(2);
        m.breaker(State::HalfOpen);
        m.ledger_error("claim");
        let text = metrics.text();
        for line in [
            "rights_sink_task_seconds_count{sink=\"sessions\",sink_kind=\"Redis\",region=\"eu\",outcome=\"answered\"} 1",
            "rights_sink_errors_total{sink=\"sessions\",sink_kind=\"Redis\",region=\"eu\",outcome=\"locked\"} 1",
            "rights_propagation_seconds_count{sink_kind=\"Redis\",stage=\"logical\"} 1",
            "rights_probe_failures_total{sink=\"sessions\"} 1",
            "rights_resurrections_total{sink=\"sessions\"} 1",
            "rights_residual_bound_seconds{sink=\"sessions\",copy_kind=\"own\"} 172800",
            "rights_claims_total{sink=\"sessions\"} 1",
            "rights_steps_claimed_total{sink=\"sessions\"} 3",
            "rights_lease_losses_total{sink=\"sessions\"} 1",
            "rights_outdated_results_total{sink=\"sessions\"} 2",
            "rights_breaker_state{sink=\"sessions\"} 1",
            "rights_ledger_errors_total{sink=\"sessions\",call=\"claim\"} 1",
        ] {
            assert!(text.lines().any(|l| l == line), "no line {line} in\n{text}");
        }
        m.end();
        assert!(!metrics.text().contains("breaker_state{"));
    }
}
