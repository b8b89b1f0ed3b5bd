//! When a subject that failed is tried again.
//!
//! Owns the range from which the pause is drawn: exponential, with full jitter, and never so long that it eats up the
//! time that is left before the law's deadline. Pure.

use rand::Rng;
use std::time::Duration;

/// The longest pause after the first failure.
const FIRST: Duration = Duration::from_secs(1);
/// The longest pause of all.
pub const LONGEST: Duration = Duration::from_secs(300);
/// The shortest: without it, full jitter would now and then try again at once, and again.
pub const SHORTEST: Duration = Duration::from_millis(100);
/// However near the deadline is, and when it has passed: no subject takes a target's attention more often than this.
const URGENT: Duration = Duration::from_secs(5);
/// At least so many tries fit into the time that is left.
const TRIES_LEFT: u32 = 16;

/// From the shortest to the longest pause, after `attempts` failures (this one included), with `left` until the deadline.
#[must_use]
pub fn range(attempts: u32, left: Duration) -> (Duration, Duration) {
    let doublings = attempts.saturating_sub(1).min(16);
    let grown = FIRST.saturating_mul(1 << doublings);
    let longest = grown.min(LONGEST).min((left / TRIES_LEFT).max(URGENT));
    (SHORTEST, longest.max(SHORTEST))
}

/// A pause out of the range.
pub fn pick(range: (Duration, Duration), rng: &mut impl Rng) -> Duration {
    rng.random_range(range.0..=range.1.max(range.0))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use rand::SeedableRng;
    use rand::rngs::StdRng;

    #[test]
    fn it_doubles_up_to_five_minutes() {
        let month = Duration::from_secs(30 * 86_400);
        let longest: Vec<_> = (0..12).map(|n| range(n, month).1.as_secs()).collect();
        assert_eq!(
            longest,
            [1, 1, 2, 4, 8, 16, 32, 64, 128, 256, 300, 300],
            "by attempts"
        );
    }

    proptest! {
        #[test]
        fn a_pause_is_in_its_range_and_leaves_time_for_more(
            attempts: u32, left in 0u64..10_000_000, seed: u64
        ) {
            let left = Duration::from_secs(left);
            let (low, high) = range(attempts, left);
            prop_assert!(SHORTEST <= low && low <= high && high <= LONGEST);
            prop_assert!(high <= (left / TRIES_LEFT).max(URGENT));
            let pause = pick((low, high), &mut StdRng::seed_from_u64(seed));
            prop_assert!(low <= pause && pause <= high);
        }

        #[test]
        fn more_failures_never_shorten_it(attempts in 0u32..u32::MAX, left in 0u64..10_000_000) {
            let left = Duration::from_secs(left);
            prop_assert!(range(attempts, left).1 <= range(attempts + 1, left).1);
        }

        #[test]
        fn a_nearer_deadline_never_lengthens_it(attempts: u32, a in 0u64..10_000_000, b in 0u64..10_000_000) {
            let (near, far) = (a.min(b), a.max(b));
            prop_assert!(
                range(attempts, Duration::from_secs(near)).1 <= range(attempts, Duration::from_secs(far)).1
            );
        }
    }
}
