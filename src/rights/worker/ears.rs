//! Hearing that there is something to do.
//!
//! Owns what lanes wait for. One connection listens for all lanes of a worker; it is a hint and no more: a call that
//! isn't heard costs the pause of a poll. Never: counts calls; one that comes while a lane is busy is kept, two are one.

use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use crate::rights::ledger;

/// A lane's ears.
#[derive(Clone, Debug)]
pub struct Ears(watch::Receiver<()>);

/// Whoever calls.
#[derive(Debug)]
pub struct Caller(watch::Sender<()>);

/// A caller, and the ears that hear it.
#[must_use]
pub fn ears() -> (Caller, Ears) {
    let (caller, ears) = watch::channel(());
    (Caller(caller), Ears(ears))
}

impl Caller {
    /// There is something to do.
    pub fn call(&self) {
        self.0.send_replace(());
    }

    /// Passes on what the ledger's listener hears, until `stop`.
    pub async fn pass_on(self, listener: ledger::Listener, stop: CancellationToken) {
        let pass_on = async {
            loop {
                listener.heard().await;
                self.call();
            }
        };
        tokio::select! {
            () = stop.cancelled() => {}
            () = pass_on => {}
        }
    }
}

impl Ears {
    /// Returns at the next call, or at once if one came since the last.
    pub async fn called(&mut self) {
        if self.0.changed().await.is_err() {
            // Nobody calls any more: the worker ends. The lane's poll goes on until it does.
            std::future::pending::<()>().await;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use futures::FutureExt as _;

    #[tokio::test]
    async fn a_call_is_kept_for_who_was_busy_and_heard_once() {
        let (caller, mut ears) = ears();
        assert!(ears.called().now_or_never().is_none());
        caller.call();
        caller.call();
        let mut other = ears.clone();
        for ears in [&mut ears, &mut other] {
            assert!(ears.called().now_or_never().is_some());
            assert!(ears.called().now_or_never().is_none());
        }
        drop(caller);
        assert!(ears.called().now_or_never().is_none());
    }
}
