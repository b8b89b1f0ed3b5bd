//! What the API server said of tokens, remembered for seconds.
//!
//! Owns how long an answer is used. Tokens are known by their SHA-256; the memory is bounded, and a flood of worthless
//! tokens doesn't push out those in use (moka's admission is by frequency).
//! Pure but for its lock: the time is given. Never: keeps a token.

use std::sync::Arc;
use std::time::{Duration, Instant};

use sha2::{Digest as _, Sha256};
use tokio::sync::Mutex;

use super::{Caller, Verb};

/// For how long a yes is used without asking again: also how long a revoked token or role lives on.
pub const YES: Duration = Duration::from_secs(10);
/// For how long a no is. Short: somebody is waiting for a role just granted.
pub const NO: Duration = Duration::from_secs(3);
/// For how long a yes is used while the API server can't be asked.
pub const WITHOUT_SERVER: Duration = Duration::from_secs(300);
/// After a vain question, the next is asked this much later.
pub const PAUSE: Duration = Duration::from_secs(2);
/// The most answers remembered.
const ENTRIES: u64 = 10_000;

/// What the API server says of a token and a verb.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// Somebody who may.
    May(Caller),
    /// Somebody who may not.
    MayNot,
    /// Nobody.
    Unknown,
}

/// What is remembered of a token and a verb.
#[derive(Debug, Default)]
pub struct Slot {
    known: Option<(Verdict, Instant)>,
    failed: Option<Instant>,
}

/// What to do.
#[derive(Debug, PartialEq, Eq)]
pub enum Next {
    /// Use it.
    Use(Verdict),
    /// Ask.
    Ask,
    /// Asking has just failed, and nothing is known that could be used.
    Fail,
}

impl Slot {
    /// What to do now.
    #[must_use]
    pub fn next(&self, now: Instant) -> Next {
        let paused = self
            .failed
            .is_some_and(|at| now.saturating_duration_since(at) < PAUSE);
        if let Some((verdict, at)) = &self.known {
            let age = now.saturating_duration_since(*at);
            let (fresh, usable) = match verdict {
                Verdict::May(_) => (YES, WITHOUT_SERVER),
                Verdict::MayNot | Verdict::Unknown => (NO, NO),
            };
            if age < fresh || (paused && age < usable) {
                return Next::Use(verdict.clone());
            }
        }
        if paused { Next::Fail } else { Next::Ask }
    }

    /// The API server said so.
    pub fn said(&mut self, verdict: Verdict, now: Instant) {
        *self = Self {
            known: Some((verdict, now)),
            failed: None,
        };
    }

    /// The API server said nothing. What is left to do, which is never to ask at once.
    pub fn silent(&mut self, now: Instant) -> Next {
        self.failed = Some(now);
        self.next(now)
    }
}

/// All slots. A slot's lock is held while the API server is asked, so that thousands of requests with the same token
/// ask once.
pub struct Memory(moka::sync::Cache<[u8; 32], Arc<Mutex<Slot>>>);

impl std::fmt::Debug for Memory {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Memory({} entries)", self.0.entry_count())
    }
}

impl Default for Memory {
    fn default() -> Self {
        Self(
            moka::sync::Cache::builder()
                .max_capacity(ENTRIES)
                .time_to_idle(WITHOUT_SERVER)
                .build(),
        )
    }
}

impl Memory {
    /// The slot of a token and a verb.
    #[must_use]
    pub fn slot(&self, token: &str, verb: Verb) -> Arc<Mutex<Slot>> {
        let mut hash = Sha256::new();
        // A verb has no NUL, so no other pair gives the same bytes.
        hash.update(verb.name());
        hash.update([0]);
        hash.update(token);
        self.0.get_with(hash.finalize().into(), Arc::default)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn may() -> Verdict {
        Verdict::May(Caller("somebody".into()))
    }

    #[test]
    fn a_yes_outlives_the_api_server_for_a_while_and_a_no_does_not() {
        let begin = Instant::now();
        let at = |seconds| begin + Duration::from_secs(seconds);
        let mut slot = Slot::default();
        assert_eq!(slot.next(begin), Next::Ask);
        slot.said(may(), begin);
        assert_eq!(slot.next(at(9)), Next::Use(may()));
        assert_eq!(slot.next(at(10)), Next::Ask);
        assert_eq!(slot.silent(at(10)), Next::Use(may()));
        assert_eq!(slot.next(at(11)), Next::Use(may()));
        assert_eq!(slot.next(at(12)), Next::Ask);
        assert_eq!(slot.silent(at(299)), Next::Use(may()));
        assert_eq!(slot.silent(at(300)), Next::Fail);
        slot.said(Verdict::MayNot, at(400));
        assert_eq!(slot.next(at(402)), Next::Use(Verdict::MayNot));
        assert_eq!(slot.silent(at(403)), Next::Fail);
        assert_eq!(slot.next(at(404)), Next::Fail);
    }

    proptest! {
        /// Whatever happened: what is used was said by the server no longer ago than the bound, and a no that came
        /// later than a yes is never overridden by it.
        #[test]
        fn nothing_older_than_the_bound_is_used(
            events in prop::collection::vec((0u64..120, 0u8..4), 1..60),
        ) {
            let mut now = Instant::now();
            let mut slot = Slot::default();
            let mut last: Option<(Verdict, Instant)> = None;
            for (wait, what) in events {
                now += Duration::from_secs(wait);
                match slot.next(now) {
                    Next::Use(v) => {
                        let (said, at) = last.clone().unwrap();
                        prop_assert_eq!(&v, &said);
                        let bound = if matches!(v, Verdict::May(_)) { WITHOUT_SERVER } else { NO };
                        prop_assert!(now - at < bound);
                    }
                    Next::Fail => {}
                    Next::Ask => match what {
                        0 => { let _ = slot.silent(now); }
                        n => {
                            let v = [may(), Verdict::MayNot, Verdict::Unknown][usize::from(n - 1)].clone();
                            slot.said(v.clone(), now);
                            last = Some((v, now));
                        }
                    },
                }
            }
        }
    }
}
