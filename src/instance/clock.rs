//! The clock by which leases end.
//!
//! Owns its one reading. Never: tells the time of day, which may be set back.

use nix::time::{ClockId, clock_gettime};

/// Milliseconds since the machine started, those in which it was suspended included. The same in every process
/// of the machine, so that a deadline can be handed from one to another.
#[must_use]
pub fn boottime_ms() -> u64 {
    let read = clock_gettime(ClockId::CLOCK_BOOTTIME).ok().and_then(|t| {
        let seconds = u64::try_from(t.tv_sec()).ok()?;
        let nanos = u64::try_from(t.tv_nsec()).ok()?;
        Some(
            seconds
                .saturating_mul(1000)
                .saturating_add(nanos / 1_000_000),
        )
    });
    // Linux has had this clock since 2.6.39. Without it, every lease is over: never the other way round.
    read.unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_agrees_with_the_kernels_own_word() {
        let before = boottime_ms();
        let text = std::fs::read_to_string("/proc/uptime").unwrap();
        let uptime: f64 = text.split(' ').next().unwrap().parse().unwrap();
        let after = boottime_ms();
        assert!(before <= after && after < u64::MAX);
        // /proc/uptime has hundredths.
        #[allow(clippy::cast_precision_loss, reason = "far below 2^52")]
        let (low, high) = (before as f64 / 1000.0 - 0.02, after as f64 / 1000.0 + 0.02);
        assert!((low..=high).contains(&uptime), "{low} {uptime} {high}");
    }
}
