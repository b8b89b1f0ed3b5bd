//! The operator's metrics, in OpenMetrics' text.
//!
//! Owns their names and units, and what was last found of each store. Only the operator that leads looks at stores; the
//! others show none. Never: a label whose value isn't the name of an object of Kubernetes or one of a few words, so that
//! nothing of what a store holds can get here.

use std::collections::{BTreeMap, HashMap};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use jiff::Timestamp;
use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::encoding::text::encode;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::registry::{Registry, Unit};

use crate::api::residency_policy::Basis;

#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
struct Store {
    namespace: String,
    store: String,
}

#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
struct Found {
    namespace: String,
    store: String,
    policy: String,
    basis: &'static str,
    kind: &'static str,
}

#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
struct Drift {
    namespace: String,
    store: String,
    policy: String,
    basis: &'static str,
}

#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
struct Outcome {
    outcome: &'static str,
}

/// How a store's copies were found to be.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Residence {
    /// The policy that they were held against.
    pub policy: String,
    /// Why it exists.
    pub basis: Basis,
    /// Copies that run outside.
    pub running: usize,
    /// Copies that are stopped and whose volumes are kept outside.
    pub kept: usize,
    /// Who replicates and is none of the store's.
    pub strangers: usize,
    /// Copies of which it can't be known.
    pub unknown: usize,
    /// Since when something runs outside.
    pub since: Option<Timestamp>,
}

type Key = (String, String);

/// What is remembered of stores.
#[derive(Default)]
struct Known {
    /// How many passes in a row have failed, from which backoff follows.
    failures: HashMap<Key, u32>,
    /// What was last found. `None`: it wasn't held against a policy.
    residences: BTreeMap<Key, Option<Residence>>,
}

/// The operator's metrics. Clones are the same metrics.
#[derive(Clone)]
pub struct Metrics {
    registry: Arc<Registry>,
    known: Arc<Mutex<Known>>,
    leading: Gauge,
    passes: Family<Outcome, Counter>,
    violations: Family<Found, Gauge>,
    drift: Family<Drift, Gauge>,
    judged: Family<Store, Gauge>,
    fenced: Family<Store, Counter>,
    erased: Family<Store, Counter>,
}

impl std::fmt::Debug for Metrics {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Metrics(..)")
    }
}

impl Default for Metrics {
    fn default() -> Self {
        let mut r = Registry::with_prefix("domicile");
        let m = Self {
            registry: Arc::default(),
            known: Arc::default(),
            leading: Gauge::default(),
            passes: Family::default(),
            violations: Family::default(),
            drift: Family::default(),
            judged: Family::default(),
            fenced: Family::default(),
            erased: Family::default(),
        };
        r.register(
            "operator_leading",
            "1 in the process that leads",
            m.leading.clone(),
        );
        r.register("operator_passes", "Passes over stores", m.passes.clone());
        r.register(
            "residency_violations",
            "Copies that run outside, volumes kept outside, strangers that replicate, copies of which it can't be known",
            m.violations.clone(),
        );
        r.register_with_unit(
            "placement_drift",
            "For how long something of the store has run outside; 0: nothing does",
            Unit::Seconds,
            m.drift.clone(),
        );
        r.register(
            "residency_judged",
            "1 if the last pass held the store against a policy; 0: it is paused, or has no policy that it can be held against",
            m.judged.clone(),
        );
        r.register(
            "residency_fenced",
            "Copies stopped because they were outside",
            m.fenced.clone(),
        );
        r.register(
            "residency_erased",
            "Volume claims erased because they were outside",
            m.erased.clone(),
        );
        Self {
            registry: Arc::new(r),
            ..m
        }
    }
}

fn int(n: usize) -> i64 {
    i64::try_from(n).unwrap_or(i64::MAX)
}

fn basis(basis: Basis) -> &'static str {
    match basis {
        Basis::Policy => "Policy",
        Basis::Contract => "Contract",
        Basis::Statute => "Statute",
    }
}

fn store(namespace: &str, name: &str) -> Store {
    Store {
        namespace: namespace.to_owned(),
        store: name.to_owned(),
    }
}

impl Metrics {
    fn known(&self) -> MutexGuard<'_, Known> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// This process leads.
    pub fn leads(&self) {
        self.leading.set(1);
    }

    /// A pass succeeded.
    pub fn reconciled(&self, namespace: &str, name: &str) {
        let outcome = "succeeded";
        self.passes.get_or_create(&Outcome { outcome }).inc();
        let key = (namespace.to_owned(), name.to_owned());
        self.known().failures.remove(&key);
    }

    /// A pass failed: how many in a row by now.
    pub fn failed(&self, namespace: &str, name: &str) -> u32 {
        let outcome = "failed";
        self.passes.get_or_create(&Outcome { outcome }).inc();
        let key = (namespace.to_owned(), name.to_owned());
        let mut known = self.known();
        let count = known.failures.entry(key).or_default();
        *count = count.saturating_add(1);
        *count
    }

    /// What a pass has found of a store.
    pub fn found(&self, namespace: &str, name: &str, residence: Option<Residence>) {
        let key = (namespace.to_owned(), name.to_owned());
        self.known().residences.insert(key, residence);
    }

    /// Copies of a store were stopped or erased.
    pub fn acted(&self, namespace: &str, name: &str, fenced: u64, erased: u64) {
        let of = store(namespace, name);
        for (family, number) in [(&self.fenced, fenced), (&self.erased, erased)] {
            if number > 0 {
                family.get_or_create(&of).inc_by(number);
            }
        }
    }

    /// The store is gone.
    pub fn forget(&self, namespace: &str, name: &str) {
        let key = (namespace.to_owned(), name.to_owned());
        let of = store(namespace, name);
        self.fenced.remove(&of);
        self.erased.remove(&of);
        let mut known = self.known();
        known.failures.remove(&key);
        known.residences.remove(&key);
    }

    /// All of it as text, as of `now`.
    #[must_use]
    pub fn text(&self, now: Timestamp) -> String {
        // Held to the end: two that ask at the same time would clear each other's lines.
        let known = self.known();
        self.violations.clear();
        self.drift.clear();
        self.judged.clear();
        for ((namespace, name), residence) in &known.residences {
            let judged = self.judged.get_or_create(&store(namespace, name)).clone();
            judged.set(i64::from(residence.is_some()));
            let Some(found) = residence else {
                continue;
            };
            for (kind, number) in [
                ("running", found.running),
                ("kept", found.kept),
                ("stranger", found.strangers),
                ("unknown", found.unknown),
            ] {
                let labels = Found {
                    namespace: namespace.clone(),
                    store: name.clone(),
                    policy: found.policy.clone(),
                    basis: basis(found.basis),
                    kind,
                };
                self.violations.get_or_create(&labels).set(int(number));
            }
            let labels = Drift {
                namespace: namespace.clone(),
                store: name.clone(),
                policy: found.policy.clone(),
                basis: basis(found.basis),
            };
            // A clock that was set back is no drift.
            let seconds = found.since.map_or(0, |s| now.duration_since(s).as_secs());
            self.drift.get_or_create(&labels).set(seconds.max(0));
        }
        let mut out = String::new();
        // Writing to a String can't fail.
        let _ = encode(&mut out, &self.registry);
        out
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use jiff::SignedDuration;

    const AT: Timestamp = Timestamp::UNIX_EPOCH;

    fn outside() -> Residence {
        Residence {
            policy: "records".into(),
            basis: Basis::Statute,
            running: 1,
            kept: 2,
            since: Some(AT),
            ..Residence::default()
        }
    }

    #[test]
    fn a_violation_is_shown_with_its_policy_and_its_age_and_goes_with_its_store() {
        let metrics = Metrics::default();
        metrics.leads();
        metrics.found("n", "s", Some(outside()));
        metrics.found("n", "paused", None);
        metrics.acted("n", "s", 1, 0);
        let text = metrics.text(AT + SignedDuration::from_secs(7));
        let of = r#"namespace="n",store="s",policy="records",basis="Statute""#;
        for line in [
            "domicile_operator_leading 1".to_owned(),
            format!("domicile_residency_violations{{{of},kind=\"running\"}} 1"),
            format!("domicile_residency_violations{{{of},kind=\"kept\"}} 2"),
            format!("domicile_residency_violations{{{of},kind=\"stranger\"}} 0"),
            format!("domicile_placement_drift_seconds{{{of}}} 7"),
            r#"domicile_residency_judged{namespace="n",store="s"} 1"#.to_owned(),
            r#"domicile_residency_judged{namespace="n",store="paused"} 0"#.to_owned(),
            r#"domicile_residency_fenced_total{namespace="n",store="s"} 1"#.to_owned(),
        ] {
            assert!(text.contains(&line), "{line} in\n{text}");
        }
        // Back inside: the lines stay, at 0.
        metrics.found(
            "n",
            "s",
            Some(Residence {
                running: 0,
                kept: 0,
                since: None,
                ..outside()
            }),
        );
        let text = metrics.text(AT);
        assert!(
            text.contains(&format!("domicile_placement_drift_seconds{{{of}}} 0")),
            "{text}"
        );
        metrics.forget("n", "s");
        assert!(!metrics.text(AT).contains("store=\"s\""));
    }

    #[test]
    fn failures_in_a_row_are_counted_per_store() {
        let metrics = Metrics::default();
        assert_eq!([metrics.failed("n", "s"), metrics.failed("n", "s")], [1, 2]);
        assert_eq!(metrics.failed("n", "other"), 1);
        metrics.reconciled("n", "s");
        assert_eq!(metrics.failed("n", "s"), 1);
        let text = metrics.text(AT);
        assert!(
            text.contains("domicile_operator_passes_total{outcome=\"failed\"} 4"),
            "{text}"
        );
    }

    /// Of all: a family without a line of its own isn't shown.
    fn names() -> Vec<String> {
        let metrics = Metrics::default();
        metrics.found("n", "s", Some(outside()));
        metrics.acted("n", "s", 1, 1);
        metrics.failed("n", "s");
        let text = metrics.text(AT);
        let help = text.lines().filter_map(|l| l.strip_prefix("# HELP "));
        let names: Vec<String> = help
            .filter_map(|l| Some(l.split(' ').next()?.to_owned()))
            .collect();
        assert_eq!(names.len(), 7, "{names:?}");
        names
    }

    #[test]
    fn every_metric_is_documented() {
        let doc = include_str!("../../docs/residency-drift.md");
        for name in names() {
            assert!(
                doc.contains(&name),
                "{name} is missing in docs/residency-drift.md"
            );
        }
    }

    /// An alert on a metric that isn't there would never come.
    #[test]
    fn alerts_name_metrics_that_there_are() {
        let rules = include_str!("../../charts/domicile/templates/prometheusrule.yaml");
        let mut used = 0;
        for word in rules.split(|c: char| !c.is_ascii_alphanumeric() && c != '_') {
            if word.starts_with("domicile_") && !word.starts_with("domicile_instance_") {
                used += 1;
                let name = word.strip_suffix("_total").unwrap_or(word);
                assert!(names().iter().any(|n| n == name), "{word}");
            }
        }
        assert!(used >= 5, "only {used}");
        let instances = include_str!("../../docs/instance.md");
        for word in rules.split(|c: char| !c.is_ascii_alphanumeric() && c != '_') {
            if word.starts_with("domicile_instance_") {
                let name = word.strip_suffix("_total").unwrap_or(word);
                assert!(instances.contains(name), "{word}");
            }
        }
    }
}
