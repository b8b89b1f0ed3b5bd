//! Telling workers that there is something to do, and hearing of it.
//!
//! Owns the channel. A notification is only a hint: workers also look by themselves, slowly.
//! Never: notifies in a transaction that files or claims. PostgreSQL holds one lock over all notifying transactions of
//! the server until each has committed, and theirs wait for the quorum: everybody would file one after the other.

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::Notify;
use tokio::task::JoinHandle;

use super::connect::Route;

/// Between two notifications at least.
const QUIET: Duration = Duration::from_millis(5);
/// Between two attempts to connect.
const PAUSE: Duration = Duration::from_millis(250);
/// One statement.
const LIMIT: Duration = Duration::from_secs(3);

/// Tells workers, by a connection of its own. Its task ends with it.
pub struct Waker {
    work: Arc<Notify>,
    task: JoinHandle<()>,
}

impl Drop for Waker {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl Waker {
    pub(super) fn new(route: Arc<Route>) -> Self {
        let work = Arc::new(Notify::new());
        let task = tokio::spawn(tell(route, work.clone()));
        Self { work, task }
    }

    /// There is something to do. Returns at once; many calls in a short time are one notification.
    pub fn wake(&self) {
        self.work.notify_one();
    }
}

async fn tell(route: Arc<Route>, work: Arc<Notify>) {
    let mut link = None;
    loop {
        work.notified().await;
        if link.is_none() {
            link = match route.connect(0, None).await {
                Ok(link) => Some(link),
                Err(_) => {
                    // Nobody would hear it now; whoever connects looks by himself first.
                    tokio::time::sleep(PAUSE).await;
                    continue;
                }
            };
        }
        if let Some(connected) = &link {
            // Nothing in it is worth waiting for the disk.
            let sql = "SET synchronous_commit = off; NOTIFY rights_work";
            let told = tokio::time::timeout(LIMIT, connected.client.batch_execute(sql)).await;
            if !matches!(told, Ok(Ok(()))) {
                link = None;
                // Once more, by another connection.
                work.notify_one();
                tokio::time::sleep(PAUSE).await;
            }
        }
        tokio::time::sleep(QUIET).await;
    }
}

/// Hears that there is something to do. Its task ends with it.
pub struct Listener {
    work: Arc<Notify>,
    task: JoinHandle<()>,
}

impl Drop for Listener {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl Listener {
    pub(super) fn new(route: Arc<Route>) -> Self {
        let work = Arc::new(Notify::new());
        let task = tokio::spawn(hear(route, work.clone()));
        Self { work, task }
    }

    /// Returns once there may be something to do: after a notification since the last call, and whenever the
    /// connection was made anew, since some may have been missed. To be awaited beside a slow clock.
    pub async fn heard(&self) {
        self.work.notified().await;
    }
}

async fn hear(route: Arc<Route>, work: Arc<Notify>) {
    loop {
        if let Ok(link) = route.connect(0, None).await {
            let listen = link.client.batch_execute("LISTEN rights_work");
            if matches!(tokio::time::timeout(LIMIT, listen).await, Ok(Ok(()))) {
                work.notify_one();
                while !link.client.is_closed() {
                    link.notified.notified().await;
                    work.notify_one();
                }
            }
        }
        tokio::time::sleep(PAUSE).await;
    }
}
