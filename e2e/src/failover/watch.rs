//! What a store's status said, and when.
//!
//! Owns one watch, which outlives the API server's absence. Never writes.

use std::time::Duration;

use anyhow::{Context, Result};
use futures::StreamExt;
use kube::runtime::watcher;
use tokio::sync::watch;
use tokio::task::JoinHandle;

use super::event::now;
use super::store::Status;
use crate::harness::Scope;

/// While the API server is away, it is asked again after this.
const AGAIN: Duration = Duration::from_millis(200);

/// A status, and when it was seen.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Seen {
    /// When.
    pub at: u64,
    /// What.
    pub status: Status,
}

/// All that a store's status said since this began.
#[derive(Debug)]
pub struct Watch {
    task: JoinHandle<()>,
    seen: watch::Receiver<Vec<Seen>>,
}

impl Drop for Watch {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl Watch {
    /// Begins.
    #[must_use]
    pub fn start(scope: &Scope, store: &str) -> Self {
        let events = watcher::watch_object(scope.stores(), store);
        let (sender, seen) = watch::channel(Vec::new());
        let task = tokio::spawn(async move {
            let mut events = std::pin::pin!(events);
            while let Some(event) = events.next().await {
                match (event, now()) {
                    (Ok(Some(store)), Ok(at)) => {
                        let status = Status::of(&store);
                        sender.send_if_modified(|all: &mut Vec<Seen>| {
                            let new = all.last().is_none_or(|last| last.status != status);
                            if new {
                                all.push(Seen { at, status });
                            }
                            new
                        });
                    }
                    (Ok(_), _) => {}
                    (Err(_), _) => tokio::time::sleep(AGAIN).await,
                }
            }
        });
        Self { task, seen }
    }

    /// All of it.
    #[must_use]
    pub fn all(&self) -> Vec<Seen> {
        self.seen.borrow().clone()
    }

    /// The last one.
    #[must_use]
    pub fn last(&self) -> Option<Status> {
        self.seen.borrow().last().map(|s| s.status.clone())
    }

    /// Waits until the last one is as wanted.
    ///
    /// # Errors
    /// If that doesn't come about in time.
    pub async fn until(
        &mut self,
        what: &str,
        limit: Duration,
        wanted: impl Fn(&Status) -> bool,
    ) -> Result<()> {
        let found = self
            .seen
            .wait_for(|all| all.last().is_some_and(|s| wanted(&s.status)));
        tokio::time::timeout(limit, found)
            .await
            .with_context(|| format!("{what}: not within {} s", limit.as_secs()))?
            .with_context(|| format!("{what}: the watch has ended"))?;
        Ok(())
    }
}

/// Where a term went down, in words.
#[must_use]
pub fn falling_terms(seen: &[Seen]) -> Vec<String> {
    seen.windows(2)
        .filter_map(|pair| match pair {
            [a, b] if b.status.term < a.status.term => Some(format!(
                "the term went from {} to {}",
                a.status.term, b.status.term
            )),
            // A term has one primary: another one needs a later term.
            [a, b]
                if b.status.term == a.status.term
                    && !a.status.primary.is_empty()
                    && b.status.primary != a.status.primary =>
            {
                Some(format!(
                    "term {} had two primaries, {} and {}",
                    a.status.term, a.status.primary, b.status.primary
                ))
            }
            _ => None,
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_term_rises_and_has_one_primary() {
        let seen = |term, primary: &str| Seen {
            at: 0,
            status: Status {
                term,
                primary: primary.into(),
                ..Status::default()
            },
        };
        assert!(falling_terms(&[seen(1, "a"), seen(1, "a"), seen(3, "b")]).is_empty());
        assert_eq!(falling_terms(&[seen(2, "a"), seen(1, "a")]).len(), 1);
        assert_eq!(falling_terms(&[seen(2, "a"), seen(2, "b")]).len(), 1);
    }
}
