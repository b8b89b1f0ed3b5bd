//! What stores, workflows and pods said and when it was seen, from three watches.
//!
//! Owns the times. Keeps everything that was seen, so that a question can be about the past as well.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use anyhow::{Result, bail};
use futures::TryStreamExt;
use k8s_openapi::api::core::v1::Pod;
use kube::api::DynamicObject;
use kube::runtime::{WatchStreamExt, watcher};
use kube::{Api, ResourceExt};
use tokio::sync::watch;
use tokio::task::JoinHandle;

use crate::harness::{Scope, condition};
use crate::rights::workflow::workflows;

/// A store or a workflow, as it was seen.
#[derive(Clone, Debug)]
pub struct Seen {
    /// When.
    pub at: Instant,
    /// Which.
    pub store: String,
    /// Who is primary.
    pub primary: String,
    /// Since which term.
    pub term: i64,
    /// The condition Resident: status, reason, message.
    pub resident: (String, String, String),
    /// The condition Available is True.
    pub available: bool,
    /// Who may be primary, as the operator has it.
    pub may: BTreeMap<String, bool>,
}

impl Seen {
    fn of(store: &DynamicObject) -> Self {
        let status = &store.data["status"];
        let entries = status["instances"].as_array().into_iter().flatten();
        let may = entries.filter_map(|e| {
            let name = e["name"].as_str()?.to_owned();
            Some((name, e["mayBePrimary"].as_bool()?))
        });
        Self {
            at: Instant::now(),
            store: store.name_any(),
            primary: status["primary"].as_str().unwrap_or_default().to_owned(),
            term: status["term"].as_i64().unwrap_or_default(),
            resident: condition(store, "Resident").unwrap_or_default(),
            available: condition(store, "Available").is_some_and(|c| c.0 == "True"),
            may: may.collect(),
        }
    }
}

#[derive(Clone, Debug, Default)]
struct Log {
    stores: Vec<Seen>,
    /// Instance and node, in the order in which they were seen.
    nodes: Vec<(String, String)>,
}

/// All that was seen since it was begun.
#[derive(Debug)]
pub struct History {
    log: watch::Receiver<Log>,
    tasks: Vec<JoinHandle<()>>,
}

impl Drop for History {
    fn drop(&mut self) {
        for task in &self.tasks {
            task.abort();
        }
    }
}

impl History {
    /// Begins to watch a namespace.
    #[must_use]
    pub fn begin(scope: &Scope) -> Self {
        let (log, receiver) = watch::channel(Log::default());
        let pods: Api<Pod> = scope.api();
        let told = [scope.stores(), workflows(scope)].map(|api| {
            let seen = log.clone();
            tokio::spawn(async move {
                let events = watcher(api, watcher::Config::default()).default_backoff();
                let mut events = std::pin::pin!(events.applied_objects());
                loop {
                    match events.try_next().await {
                        Ok(Some(object)) => seen.send_modify(|l| l.stores.push(Seen::of(&object))),
                        Ok(None) => return,
                        Err(_) => {}
                    }
                }
            })
        });
        let pods = tokio::spawn(async move {
            let events = watcher(pods, watcher::Config::default()).default_backoff();
            let mut events = std::pin::pin!(events.applied_objects());
            loop {
                match events.try_next().await {
                    Ok(Some(pod)) => {
                        let node = pod.spec.as_ref().and_then(|s| s.node_name.clone());
                        let Some(node) = node else { continue };
                        log.send_modify(|l| l.nodes.push((pod.name_any(), node)));
                    }
                    Ok(None) => return,
                    Err(_) => {}
                }
            }
        });
        Self {
            log: receiver,
            tasks: told.into_iter().chain([pods]).collect(),
        }
    }

    /// What was seen of a store from `since` on.
    #[must_use]
    pub fn since(&self, store: &str, since: Instant) -> Vec<Seen> {
        let log = self.log.borrow();
        let all = log.stores.iter();
        all.filter(|s| s.store == store && s.at >= since)
            .cloned()
            .collect()
    }

    /// On which node an instance was seen last.
    #[must_use]
    pub fn node(&self, instance: &str) -> Option<String> {
        let log = self.log.borrow();
        let found = log.nodes.iter().rev().find(|(i, _)| i == instance);
        found.map(|(_, node)| node.clone())
    }

    /// When a store was first seen as `wanted`, from `since` on.
    ///
    /// # Errors
    /// If it isn't within `patience`.
    pub async fn first(
        &self,
        store: &str,
        since: Instant,
        patience: Duration,
        wanted: impl Fn(&Seen) -> bool,
    ) -> Result<Instant> {
        let mut log = self.log.clone();
        let deadline = tokio::time::Instant::now() + patience;
        loop {
            let found = self.since(store, since).into_iter().find(|s| wanted(s));
            if let Some(seen) = found {
                return Ok(seen.at);
            }
            match tokio::time::timeout_at(deadline, log.changed()).await {
                Ok(Ok(())) => {}
                Ok(Err(_)) => bail!("the watches have ended"),
                Err(_) => {
                    let last = self.since(store, since).pop();
                    bail!("{store} isn't as expected after {patience:?}: {last:?}")
                }
            }
        }
    }
}
