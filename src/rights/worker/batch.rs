//! How many steps a worker claims at once, and how often.
//!
//! Owns the size: it grows while full batches are quick, and shrinks when they are slow or fail, so that a batch stays
//! well within its lease and a poison is soon alone. And the pause between claims that get all there is. Pure.

use std::time::Duration;

/// The most: above it a batch gains nothing, and what a dead worker held would wait.
pub const MOST: u32 = 256;
/// To begin with.
const FIRST: u32 = 64;
/// How many may try a target that failed.
pub const PROBE: u32 = 4;
/// Below this, slowness is no reason for fewer, and quickness none for more: what a batch takes is then mostly what any
/// batch takes. A target that answers after a second would be asked for one person at a time for ever.
const FEW: u32 = 16;
/// A batch should take about this: less than a lease, so that few are ever renewed.
pub const AIM: Duration = Duration::from_millis(1_000);

/// From one claim to the next, if there was no more than it got: the least, the most, and for each step that it got.
const BETWEEN: (Duration, Duration) = (Duration::from_millis(20), Duration::from_millis(100));
const FOR_EACH: Duration = Duration::from_millis(20);

/// From one claim to the next, if all that there was came to `claimed`. One request after another is claimed at once; of
/// fifty a second each would be a batch of its own, and batches are what the ledger and the target pay for: so far from
/// loaded, they would be busier than with two hundred a second.
#[must_use]
pub fn between_claims(claimed: u32) -> Duration {
    let (least, most) = BETWEEN;
    FOR_EACH.saturating_mul(claimed).clamp(least, most)
}

/// How a batch went.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Went {
    /// Every call was answered.
    Through,
    /// A call failed as a whole, or had to be split.
    Split,
}

/// The size for one target.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Size(u32);

impl Default for Size {
    fn default() -> Self {
        Self(FIRST)
    }
}

impl Size {
    /// How many to claim.
    #[must_use]
    pub fn get(self) -> u32 {
        self.0
    }

    /// After a batch of `claimed` that took `took`.
    #[must_use]
    pub fn adapted(self, claimed: u32, took: Duration, went: Went) -> Self {
        let size = if went == Went::Split {
            // From what was really claimed: a small batch that fails says nothing good of larger ones.
            claimed.min(self.0) / 2
        } else if took > AIM.saturating_mul(2) && self.0 > FEW {
            (claimed.min(self.0) / 2).max(FEW)
        } else if claimed >= self.0 && (took < AIM || self.0 < FEW) {
            self.0.saturating_mul(2)
        } else {
            self.0
        };
        Self(size.clamp(1, MOST))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn quick_full_batches_make_it_large() {
        let mut size = Size::default();
        for _ in 0..3 {
            size = size.adapted(size.get(), AIM / 10, Went::Through);
        }
        assert_eq!(size.get(), MOST);
        assert_eq!(
            size.adapted(3, AIM / 10, Went::Through).get(),
            MOST,
            "few steps to do are no reason to claim fewer"
        );
    }

    #[test]
    fn of_a_stream_claims_are_few_and_of_a_trickle_prompt() {
        let (least, most) = BETWEEN;
        assert_eq!((between_claims(0), between_claims(1)), (least, least));
        for (rate, pause) in [(10.0, least), (25.0, least), (100.0, most), (5_000.0, most)] {
            let mut claimed = 1;
            for _ in 0..50 {
                let came = rate * between_claims(claimed).as_secs_f64();
                claimed = came.ceil() as u32;
            }
            assert_eq!(between_claims(claimed), pause, "{rate} a second");
        }
    }

    #[test]
    fn a_target_that_is_slow_for_anybody_is_not_asked_for_one_at_a_time() {
        let slow = Duration::from_secs(3);
        let mut size = Size(1);
        for _ in 0..20 {
            size = size.adapted(size.get(), slow, Went::Through);
        }
        assert_eq!(size.get(), FEW);
    }

    #[test]
    fn after_failures_it_becomes_small_and_then_large_again() {
        let mut size = Size::default();
        for _ in 0..20 {
            size = size.adapted(4, AIM, Went::Split);
        }
        assert_eq!(size.get(), 1);
        for _ in 0..8 {
            size = size.adapted(size.get(), AIM / 2, Went::Through);
        }
        assert_eq!(size.get(), MOST);
    }

    proptest! {
        /// Whatever a target costs for each subject, the size comes to where a batch takes about what it should.
        #[test]
        fn it_settles_where_a_batch_takes_what_it_should(micros in 1u64..2_000_000) {
            let cost = |n: u32| Duration::from_micros(micros).saturating_mul(n);
            let mut size = Size::default();
            for _ in 0..20 {
                size = size.adapted(size.get(), cost(size.get()), Went::Through);
            }
            prop_assert!(size.get() <= FEW || cost(size.get()) <= AIM * 2);
            prop_assert!(size.get() == MOST || cost(size.get()) >= AIM / 2);
        }

        #[test]
        fn it_stays_in_its_bounds(events in prop::collection::vec((0u32..2_000, 0u64..10_000, any::<bool>()), 0..50)) {
            let mut size = Size::default();
            for (claimed, ms, split) in events {
                let went = if split { Went::Split } else { Went::Through };
                size = size.adapted(claimed, Duration::from_millis(ms), went);
                prop_assert!((1..=MOST).contains(&size.get()));
            }
        }
    }
}
