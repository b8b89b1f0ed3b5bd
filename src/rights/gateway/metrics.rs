//! The gateway's metrics, in OpenMetrics' text.
//!
//! Owns their names and units. Never: a label from what a client sent; label values are words of ours.

use std::sync::atomic::AtomicU64;
use std::time::Duration;

use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::encoding::text::encode;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::Histogram;
use prometheus_client::registry::{Registry, Unit};

use super::filing::word;
use super::problem::Kind as Trouble;
use crate::api::rights_workflow::Regime;
use crate::rights::model::{Channel, Filing};

/// How a filing ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// It is a new request, and durable.
    Accepted,
    /// It was there already.
    Repeated,
    /// Its key belongs to another.
    Conflict,
    /// The ledger couldn't take it.
    Unavailable,
}

#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
struct Request {
    r#type: String,
    regime: String,
    channel: String,
    outcome: &'static str,
}

#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
struct State {
    state: &'static str,
}

#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
struct Reason {
    reason: &'static str,
}

#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
struct Result_ {
    result: &'static str,
}

/// The gateway's metrics.
pub struct Metrics {
    registry: Registry,
    requests: Family<Request, Counter>,
    refused: Family<Reason, Counter>,
    reviews: Family<Result_, Counter>,
    open: Family<State, Gauge>,
    overdue: Gauge,
    slack: Gauge<f64, AtomicU64>,
    accept: Histogram,
    batch: Histogram,
    retries: Counter,
    in_flight: Gauge,
    connections: Gauge,
    ledger_reachable: Gauge,
}

impl std::fmt::Debug for Metrics {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Metrics(..)")
    }
}

/// Seconds; the goal, 20 ms, is a bound.
const ACCEPT: [f64; 13] = [
    0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0,
];
const BATCH: [f64; 9] = [1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0, 256.0];

impl Default for Metrics {
    fn default() -> Self {
        let mut r = Registry::with_prefix("rights");
        let m = Self {
            requests: Family::default(),
            refused: Family::default(),
            reviews: Family::default(),
            open: Family::default(),
            overdue: Gauge::default(),
            slack: Gauge::default(),
            accept: Histogram::new(ACCEPT),
            batch: Histogram::new(BATCH),
            retries: Counter::default(),
            in_flight: Gauge::default(),
            connections: Gauge::default(),
            ledger_reachable: Gauge::default(),
            registry: Registry::default(),
        };
        r.register(
            "requests",
            "Filings by type, governing regime, channel and outcome",
            m.requests.clone(),
        );
        r.register(
            "refused",
            "Answers that weren't what was asked for, by the problem's type",
            m.refused.clone(),
        );
        r.register(
            "authentication_reviews",
            "Questions to the API server, by what it said",
            m.reviews.clone(),
        );
        r.register(
            "open_requests",
            "Requests that aren't finished, by state",
            m.open.clone(),
        );
        r.register(
            "overdue_requests",
            "Requests that aren't finished and whose legal deadline has passed",
            m.overdue.clone(),
        );
        r.register_with_unit(
            "deadline_slack_min",
            "Time until the nearest legal deadline of a request that isn't finished; negative: it has passed. +Inf: there is none",
            Unit::Seconds,
            m.slack.clone(),
        );
        r.register_with_unit(
            "accept_duration",
            "From a filing's arrival until the ledger had it durably",
            Unit::Seconds,
            m.accept.clone(),
        );
        r.register(
            "accept_batch_size",
            "Filings in one transaction",
            m.batch.clone(),
        );
        r.register(
            "ledger_retries",
            "Transactions that were tried again because the ledger couldn't be reached",
            m.retries.clone(),
        );
        r.register(
            "requests_in_flight",
            "HTTP requests being worked on",
            m.in_flight.clone(),
        );
        r.register("connections", "Connections open", m.connections.clone());
        r.register(
            "ledger_reachable",
            "1 if the ledger could be read when last tried",
            m.ledger_reachable.clone(),
        );
        Self { registry: r, ..m }
    }
}

impl Metrics {
    /// A filing ended.
    pub fn filed(&self, what: &Labels, outcome: Outcome) {
        let outcome = match outcome {
            Outcome::Accepted => "accepted",
            Outcome::Repeated => "repeated",
            Outcome::Conflict => "conflict",
            Outcome::Unavailable => "unavailable",
        };
        let labels = Request {
            r#type: what.kind.clone(),
            regime: what.regime.clone(),
            channel: what.channel.clone(),
            outcome,
        };
        self.requests.get_or_create(&labels).inc();
    }

    /// A problem was answered.
    pub fn refused(&self, kind: Trouble) {
        let reason = kind.slug();
        self.refused.get_or_create(&Reason { reason }).inc();
    }

    /// The API server was asked.
    pub fn reviewed(&self, result: &'static str) {
        self.reviews.get_or_create(&Result_ { result }).inc();
    }

    /// A filing took this long until it was durable.
    pub fn accepted_after(&self, took: Duration) {
        self.accept.observe(took.as_secs_f64());
    }

    /// So many filings were in one transaction.
    pub fn batch(&self, filings: usize) {
        self.batch
            .observe(u32::try_from(filings).unwrap_or(u32::MAX).into());
    }

    /// A transaction is tried again.
    pub fn retried(&self) {
        self.retries.inc();
    }

    /// Requests in flight; up while the guard lives.
    #[must_use]
    pub fn in_flight(&self) -> Up {
        Up::of(&self.in_flight)
    }

    /// Connections; up while the guard lives.
    #[must_use]
    pub fn connection(&self) -> Up {
        Up::of(&self.connections)
    }

    /// What the ledger said: requests by state that isn't final, overdue ones, and seconds to the nearest deadline.
    pub fn backlog(&self, by_state: &[(&'static str, i64)], overdue: i64, slack: Option<f64>) {
        for (state, n) in by_state {
            self.open.get_or_create(&State { state }).set(*n);
        }
        self.overdue.set(overdue);
        self.slack.set(slack.unwrap_or(f64::INFINITY));
        self.ledger_reachable.set(1);
    }

    /// The ledger said nothing.
    pub fn ledger_away(&self) {
        self.ledger_reachable.set(0);
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

/// A gauge that is one up while this lives.
#[derive(Debug)]
pub struct Up(Gauge);

impl Up {
    fn of(gauge: &Gauge) -> Self {
        gauge.inc();
        Self(gauge.clone())
    }
}

impl Drop for Up {
    fn drop(&mut self) {
        self.0.dec();
    }
}

/// What a filing counts as.
#[derive(Clone, Debug)]
pub struct Labels {
    kind: String,
    regime: String,
    channel: String,
}

impl Labels {
    /// Of a filing whose earliest clock is a regime's.
    #[must_use]
    pub fn of(filing: &Filing, governing: Regime) -> Self {
        let channel: Channel = filing.channel;
        Self {
            kind: word(filing.kind),
            regime: word(governing),
            channel: word(channel),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_shown() {
        let metrics = Metrics::default();
        let labels = Labels {
            kind: "deletion".into(),
            regime: "eu-gdpr".into(),
            channel: "api".into(),
        };
        metrics.filed(&labels, Outcome::Accepted);
        metrics.refused(Trouble::TooLarge);
        metrics.backlog(&[("open", 3)], 1, None);
        let up = metrics.in_flight();
        let text = metrics.text();
        for line in [
            "rights_requests_total{type=\"deletion\",regime=\"eu-gdpr\",channel=\"api\",outcome=\"accepted\"} 1",
            "rights_refused_total{reason=\"too-large\"} 1",
            "rights_open_requests{state=\"open\"} 3",
            "rights_overdue_requests 1",
            "rights_requests_in_flight 1",
        ] {
            assert!(text.contains(line), "{line} in\n{text}");
        }
        drop(up);
        assert!(metrics.text().contains("rights_requests_in_flight 0"));
    }

    #[test]
    fn every_metric_is_documented() {
        let doc = include_str!("../../../docs/gateway.md");
        for line in Metrics::default().text().lines() {
            if let Some(name) = line
                .strip_prefix("# HELP ")
                .and_then(|l| l.split(' ').next())
            {
                assert!(doc.contains(name), "{name} is missing in docs/gateway.md");
            }
        }
    }
}
