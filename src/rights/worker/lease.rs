//! A lease as its holder sees it: over before the ledger thinks so, never after.
//!
//! Owns the local end of a batch's lease, counted from before the claim was sent. Never: lets work go on that began
//! under a lease and finds it over; [`while_held`] looks at the clock before each turn of the work, not after.
//!
//! What this can't do: a statement that was sent before the lease ended arrives when it arrives. Erasing what is erased
//! already changes nothing, and a result is taken by the ledger only from the current holder.

use std::future::poll_fn;
use std::pin::pin;
use std::sync::atomic::{AtomicU64, Ordering};
use std::task::Poll;
use std::time::Duration;

use tokio_util::sync::CancellationToken;

use super::clock::Moment;

/// How long the ledger is asked to keep others off. What a killed worker held waits so long.
pub const LENGTH: Duration = Duration::from_secs(4);
/// So much earlier it ends for the holder. The ledger's clock and ours run at nearly the same speed, not quite.
const MARGIN: Duration = Duration::from_millis(200);
/// A lease is renewed after this, three times before it ends.
pub const RENEW: Duration = Duration::from_secs(1);

/// The lease has ended; nothing more may be done under it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ended;

/// A batch's lease.
#[derive(Debug)]
pub struct Lease {
    ends: AtomicU64,
    given_up: CancellationToken,
}

/// Never again.
const GIVEN_UP: u64 = 0;

impl Lease {
    /// Of a claim that was sent at `sent`, or later.
    #[must_use]
    pub fn new(sent: Moment) -> Self {
        Self {
            ends: AtomicU64::new(end(sent)),
            given_up: CancellationToken::new(),
        }
    }

    /// A renewal that was sent at `sent` succeeded. A lease that was given up stays so, and none becomes shorter.
    pub fn renewed(&self, sent: Moment) {
        let longer = |ends: u64| (ends != GIVEN_UP && ends < end(sent)).then(|| end(sent));
        // That it isn't raised is no error.
        let _ = self
            .ends
            .fetch_update(Ordering::AcqRel, Ordering::Acquire, longer);
    }

    /// Others may hold it now, since the ledger refused to renew it; or the worker stops.
    pub fn give_up(&self) {
        self.ends.store(GIVEN_UP, Ordering::Release);
        self.given_up.cancel();
    }

    /// Whether something may begin at `now`.
    #[must_use]
    pub fn holds(&self, now: Moment) -> bool {
        now.0 < self.ends.load(Ordering::Acquire)
    }

    /// How much is left.
    #[must_use]
    pub fn left(&self, now: Moment) -> Duration {
        Moment(self.ends.load(Ordering::Acquire)).since(now)
    }
}

fn end(sent: Moment) -> u64 {
    sent.after(LENGTH.saturating_sub(MARGIN)).0
}

/// Does `work` while the lease holds; when it has ended, not one turn more.
///
/// # Errors
/// The lease ended first.
pub async fn while_held<T>(lease: &Lease, work: impl Future<Output = T>) -> Result<T, Ended> {
    let mut work = pin!(work);
    let mut alarm = pin!(tokio::time::sleep(lease.left(Moment::now())));
    let mut given_up = pin!(lease.given_up.cancelled());
    poll_fn(|cx| {
        loop {
            let now = Moment::now();
            if given_up.as_mut().poll(cx).is_ready() || !lease.holds(now) {
                return Poll::Ready(Err(Ended));
            }
            if let Poll::Ready(done) = work.as_mut().poll(cx) {
                return Poll::Ready(Ok(done));
            }
            if alarm.as_mut().poll(cx).is_pending() {
                return Poll::Pending;
            }
            // Renewed meanwhile, or the timer was a little early.
            let again = lease
                .left(Moment::now())
                .saturating_add(Duration::from_millis(1));
            let at = tokio::time::Instant::now() + again;
            alarm.as_mut().reset(at);
        }
    })
    .await
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[tokio::test]
    async fn work_is_not_begun_under_a_lease_that_is_over() {
        let long_ago = Moment(Moment::now().0.saturating_sub(60_000));
        let lease = Lease::new(long_ago);
        let mut begun = false;
        let done = while_held(&lease, async { begun = true }).await;
        assert_eq!(done, Err(Ended));
        assert!(!begun);
    }

    /// As when the process was stopped and goes on: the work could go on at once, and mustn't.
    #[tokio::test]
    async fn work_that_waits_gets_no_turn_after_the_end() {
        let lease = Lease::new(Moment::now());
        let (wake, woken) = tokio::sync::oneshot::channel();
        let mut went_on = false;
        let work = async {
            let _ = woken.await;
            went_on = true;
        };
        let stopped = async {
            tokio::task::yield_now().await;
            lease.give_up();
            wake.send(()).unwrap();
        };
        let (done, ()) = tokio::join!(while_held(&lease, work), stopped);
        assert_eq!(done, Err(Ended));
        assert!(!went_on);
    }

    #[tokio::test]
    async fn a_lease_that_is_given_up_ends_work_that_hangs() {
        let lease = Lease::new(Moment::now());
        let given_up = async {
            tokio::task::yield_now().await;
            lease.give_up();
        };
        let work = while_held(&lease, std::future::pending::<()>());
        let began = Moment::now();
        let (done, ()) = tokio::join!(work, given_up);
        assert_eq!(done, Err(Ended));
        assert!(Moment::now().since(began) < LENGTH / 2);
        lease.renewed(Moment::now());
        assert!(!lease.holds(Moment::now()));
    }

    #[tokio::test]
    async fn a_renewal_keeps_the_work_going_past_the_first_end() {
        let now = Moment::now();
        // 50 ms are left of it.
        let sent = Moment(now.0.saturating_sub(3_750));
        let lease = Lease::new(sent);
        let work = tokio::time::sleep(Duration::from_millis(200));
        let renewal = async { lease.renewed(now) };
        let (done, ()) = tokio::join!(while_held(&lease, work), renewal);
        assert_eq!(done, Ok(()));
    }

    #[tokio::test]
    async fn work_that_never_ends_is_left_when_the_lease_ends() {
        let lease = Lease::new(Moment(Moment::now().0.saturating_sub(3_750)));
        let done = while_held(&lease, std::future::pending::<()>()).await;
        assert_eq!(done, Err(Ended));
    }

    proptest! {
        /// However claims and renewals travel: the holder stops before the ledger, which counts from when it got them.
        #[test]
        fn it_ends_for_the_holder_before_it_ends_for_the_ledger(
            claim in (0u64..10_000, 0u64..5_000),
            renewals in prop::collection::vec((0u64..20_000, 0u64..5_000, any::<bool>()), 0..8),
        ) {
            let length = u64::try_from(LENGTH.as_millis()).unwrap();
            let lease = Lease::new(Moment(claim.0));
            let mut ledger = claim.0 + claim.1 + length;
            for (sent, travels, answered) in renewals {
                // The ledger refuses a lease that is over; an answer may be lost.
                if sent + travels < ledger {
                    ledger = ledger.max(sent + travels + length);
                    if answered {
                        lease.renewed(Moment(sent));
                    }
                }
            }
            prop_assert!(!lease.holds(Moment(ledger)));
            prop_assert!(!lease.holds(Moment(ledger - 1)));
        }
    }
}
