//! What the controllers share: the client, the caches of cluster-scoped objects, the bounds on calls.
//!
//! Owns no decision. Every call to the API server made by the operator goes through [`bounded`].

use futures::Stream;
use k8s_openapi::api::core::v1::Node;
use kube::runtime::events::Recorder;
use kube::runtime::reflector::Store;
use kube::{Client, ResourceExt};
use std::collections::HashMap;
use std::future::Future;
use std::sync::{Arc, Mutex};
use std::time::Duration;
use tokio::sync::{Semaphore, watch};

pub use super::metrics::Metrics;
use super::rights::backlog::Backlogs;
use super::store::attest::Attestor;
use super::store::build::Settings;
use crate::api::{Region, ResidencyPolicy};
use crate::residency::NodeFacts;

/// The longest that one call may take. The client's own read timeout is none, and it repeats a refused call
/// for minutes: a pass that hangs would hold its place for ever.
const CALL: Duration = Duration::from_secs(15);

/// Runs one call under the bound.
///
/// # Errors
/// The call's own error, or that it took too long.
pub async fn bounded<T>(
    what: &'static str,
    call: impl Future<Output = kube::Result<T>>,
) -> anyhow::Result<T> {
    match tokio::time::timeout(CALL, call).await {
        Ok(Ok(value)) => Ok(value),
        Ok(Err(error)) => Err(anyhow::Error::new(error).context(what)),
        Err(_) => Err(anyhow::anyhow!(
            "{what}: no answer from the API server within {} s",
            CALL.as_secs()
        )),
    }
}

/// When to try again what failed so often in a row: 1, 2, 4, … 64 s. What can't be mended by trying costs little.
#[must_use]
pub fn backoff(failures: u32) -> Duration {
    Duration::from_secs(1 << failures.saturating_sub(1).min(6))
}

/// An error as a person reads it: of an answer of the API server its message, not its anatomy.
#[must_use]
pub fn words(error: &anyhow::Error) -> String {
    error
        .chain()
        .map(|cause| match cause.downcast_ref::<kube::Error>() {
            Some(kube::Error::Api(status)) => status.message.clone(),
            _ => cause.to_string(),
        })
        .collect::<Vec<_>>()
        .join(": ")
}

/// Shared by all controllers of one operator process.
pub struct Context {
    /// The API client.
    pub client: Client,
    /// Writes events.
    pub recorder: Recorder,
    /// Every Region.
    pub regions: Store<Region>,
    /// Every policy.
    pub policies: Store<ResidencyPolicy>,
    /// Every node.
    pub nodes: Store<Node>,
    /// What building objects needs.
    pub settings: Settings,
    /// What is counted, and shown to whoever asks.
    pub metrics: Metrics,
    /// Room for passes over stores. First come, first served: the controller's own bound takes any of those that
    /// wait, and where there is always one more, some would wait for ever.
    pub passes: Semaphore,
    /// This process, as events name it.
    pub identity: String,
    /// Failovers told, by store: only so that their events aren't tried again at every pass.
    pub told: Mutex<HashMap<String, i64>>,
    /// What attesting needs and remembers.
    pub attestor: Attestor,
    /// What the ledgers of requests said.
    pub backlogs: Backlogs,
}

impl Context {
    /// The term of the last failover that was told of this store.
    #[must_use]
    pub fn last_told(&self, uid: &str) -> Option<i64> {
        let told = self
            .told
            .lock()
            .unwrap_or_else(std::sync::PoisonError::into_inner);
        told.get(uid).copied()
    }

    /// The failover of this term was told.
    pub fn told_failover(&self, uid: &str, term: i64) {
        let mut told = self
            .told
            .lock()
            .unwrap_or_else(std::sync::PoisonError::into_inner);
        told.insert(uid.to_owned(), term);
    }

    /// What of each node matters, sorted by name: caches iterate in random order.
    #[must_use]
    pub fn node_facts(&self) -> Vec<NodeFacts> {
        let mut facts: Vec<NodeFacts> = self.nodes.state().iter().map(|n| node_facts(n)).collect();
        facts.sort();
        facts
    }
}

/// What of a node matters.
#[must_use]
pub fn node_facts(node: &Node) -> NodeFacts {
    let spec = node.spec.clone().unwrap_or_default();
    let conditions = node
        .status
        .as_ref()
        .and_then(|s| s.conditions.as_deref())
        .unwrap_or_default();
    let ready = conditions
        .iter()
        .any(|c| c.type_ == "Ready" && c.status == "True");
    let repels = spec
        .taints
        .iter()
        .flatten()
        .any(|t| t.effect == "NoSchedule" || t.effect == "NoExecute");
    NodeFacts {
        name: node.name_any(),
        labels: node.labels().clone(),
        provider_id: spec.provider_id,
        usable: ready && !repels && spec.unschedulable != Some(true),
    }
}

/// Tells the stores' controller that something changed which concerns all stores.
#[derive(Clone)]
pub struct Triggers {
    sender: Arc<watch::Sender<u64>>,
}

impl Default for Triggers {
    fn default() -> Self {
        Self {
            sender: Arc::new(watch::Sender::new(0)),
        }
    }
}

impl Triggers {
    /// Something changed. Many calls before the controller looks are one.
    pub fn pull(&self) {
        self.sender.send_modify(|n| *n = n.wrapping_add(1));
    }

    /// One item per change seen.
    pub fn stream(&self) -> impl Stream<Item = ()> + Send + Sync + use<> {
        futures::stream::unfold(self.sender.subscribe(), |mut receiver| async move {
            receiver.changed().await.ok()?;
            Some(((), receiver))
        })
    }

    /// As [`Self::stream`], but never two items within `pace`: what is asked for again and again before it has
    /// begun is put off each time, and would never begin.
    pub fn paced(&self, pace: Duration) -> impl Stream<Item = ()> + Send + Sync + use<> {
        let first = tokio::time::Instant::now();
        futures::stream::unfold(
            (self.sender.subscribe(), first),
            move |(mut receiver, next)| async move {
                receiver.changed().await.ok()?;
                tokio::time::sleep_until(next).await;
                // What came meanwhile is in this item.
                receiver.mark_unchanged();
                Some(((), (receiver, tokio::time::Instant::now() + pace)))
            },
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use futures::StreamExt;

    #[tokio::test(start_paused = true)]
    async fn triggers_come_at_once_and_then_no_faster_than_their_pace_and_none_is_lost() {
        const PACE: Duration = Duration::from_millis(200);
        let triggers = Triggers::default();
        let mut items = std::pin::pin!(triggers.paced(PACE));
        let begin = tokio::time::Instant::now();
        triggers.pull();
        items.next().await.unwrap();
        assert_eq!(begin.elapsed(), Duration::ZERO);
        for _ in 0..50 {
            triggers.pull();
        }
        items.next().await.unwrap();
        assert!(begin.elapsed() >= PACE, "{:?}", begin.elapsed());
        // All fifty were one.
        let third = tokio::time::timeout(PACE * 100, items.next()).await;
        assert!(third.is_err());
        triggers.pull();
        let before = begin.elapsed();
        items.next().await.unwrap();
        assert_eq!(begin.elapsed(), before);
    }
}
