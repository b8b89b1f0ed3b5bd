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

/// For how long a yes is used: also how long a revoked token or role lives on.
pub const YES: Duration = Duration::from_secs(10);
/// From this age on a yes is asked for again while it is still used: whoever comes when it runs out would wait for the
/// API server, and behind them everybody else with the same token.
pub const AHEAD: Duration = Duration::from_secs(5);
/// For how long a no is. Short: somebody is waiting for a role just granted.
pub const NO: Duration = Duration::from_secs(3);
/// For how long a yes is used while the API server can't be asked.
pub const WITHOUT_SERVER: Duration = Duration::from_secs(300);
/// After a vain question, the next is asked this much later.
pub const PAUSE: Duration = Duration::from_secs(2);
/// A question that isn't answered by then never will be: longer than it may take.
const LOST: Duration = Duration::from_secs(10);
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
    /// The answer, and when it was asked for.
    known: Option<(Verdict, Instant)>,
    /// When the last question failed, if none was answered since.
    failed: Option<Instant>,
    /// Since when it is asked for while it is used.
    asking: Option<Instant>,
}

/// What to do.
#[derive(Debug, PartialEq, Eq)]
pub enum Next {
    /// Use it.
    Use(Verdict),
    /// Use it, and ask meanwhile.
    Renew(Verdict),
    /// Ask.
    Ask,
    /// Asking has just failed, and nothing is known that could be used.
    Fail,
}

impl Slot {
    /// What to do now.
    #[must_use]
    pub fn next(&mut self, now: Instant) -> Next {
        let since = |at: &Instant| now.saturating_duration_since(*at);
        let paused = self.failed.is_some_and(|at| since(&at) < PAUSE);
        if let Some((verdict, at)) = &self.known {
            let age = since(at);
            let may = matches!(verdict, Verdict::May(_));
            // Whoever asked a moment ago found nobody: to let everybody wait while it is tried again would be an outage of
            // ours. A failure of long ago says nothing of now.
            let alone = self.failed.is_some_and(|at| since(&at) < YES) && age < WITHOUT_SERVER;
            let alone = may && alone;
            if age < if may { YES } else { NO } || alone {
                let asking = self.asking.is_some_and(|at| since(&at) < LOST);
                if may && age >= AHEAD && !paused && !asking {
                    self.asking = Some(now);
                    return Next::Renew(verdict.clone());
                }
                return Next::Use(verdict.clone());
            }
        }
        if paused { Next::Fail } else { Next::Ask }
    }

    /// The API server said so, when it was asked at this time.
    pub fn said(&mut self, verdict: Verdict, asked: Instant) {
        // Of two that asked at the same time, the later question's answer holds.
        if self.outdated(asked) {
            return;
        }
        *self = Self {
            known: Some((verdict, asked)),
            ..Self::default()
        };
    }

    /// The API server said nothing, when it was asked at this time. What is left to do, which is never to ask at once.
    pub fn silent(&mut self, asked: Instant, now: Instant) -> Next {
        if !self.outdated(asked) {
            self.asking = None;
            self.failed = Some(now);
        }
        self.next(now)
    }

    fn outdated(&self, asked: Instant) -> bool {
        self.known.as_ref().is_some_and(|(_, at)| *at > asked)
    }
}

/// All slots. A slot's lock is held while the API server is asked and nothing is known that could be used meanwhile, so
/// that thousands of requests with the same token ask once.
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

    fn used(next: Next) -> Option<Verdict> {
        match next {
            Next::Use(verdict) | Next::Renew(verdict) => Some(verdict),
            Next::Ask | Next::Fail => None,
        }
    }

    #[test]
    fn a_yes_in_use_is_renewed_before_it_runs_out_by_one() {
        let begin = Instant::now();
        let at = |seconds| begin + Duration::from_secs(seconds);
        let mut slot = Slot::default();
        assert_eq!(slot.next(begin), Next::Ask);
        slot.said(may(), begin);
        assert_eq!(slot.next(at(4)), Next::Use(may()));
        assert_eq!(slot.next(at(5)), Next::Renew(may()));
        assert_eq!(slot.next(at(6)), Next::Use(may()), "one asks");
        slot.said(may(), at(5));
        assert_eq!(slot.next(at(9)), Next::Use(may()));
        assert_eq!(slot.next(at(15)), Next::Ask, "nobody used it meanwhile");
        slot.said(Verdict::MayNot, at(15));
        assert_eq!(slot.next(at(17)), Next::Use(Verdict::MayNot));
        assert_eq!(slot.next(at(18)), Next::Ask);
    }

    #[test]
    fn a_yes_outlives_the_api_server_for_a_while_and_a_no_does_not() {
        let begin = Instant::now();
        let at = |seconds| begin + Duration::from_secs(seconds);
        let mut slot = Slot::default();
        slot.said(may(), begin);
        assert_eq!(slot.next(at(10)), Next::Ask);
        assert_eq!(slot.silent(at(10), at(13)), Next::Use(may()));
        assert_eq!(slot.next(at(14)), Next::Use(may()));
        assert_eq!(slot.next(at(15)), Next::Renew(may()), "nobody waits for it");
        assert_eq!(slot.next(at(16)), Next::Use(may()));
        assert_eq!(slot.silent(at(15), at(18)), Next::Use(may()));
        assert_eq!(slot.silent(at(290), at(299)), Next::Use(may()));
        assert_eq!(slot.silent(at(299), at(300)), Next::Fail);
        slot.said(Verdict::MayNot, at(400));
        assert_eq!(slot.next(at(402)), Next::Use(Verdict::MayNot));
        assert_eq!(slot.silent(at(403), at(403)), Next::Fail);
        assert_eq!(slot.next(at(404)), Next::Fail);
    }

    #[test]
    fn a_failure_of_long_ago_says_nothing_of_now() {
        let begin = Instant::now();
        let at = |seconds| begin + Duration::from_secs(seconds);
        let mut slot = Slot::default();
        slot.said(may(), begin);
        assert_eq!(slot.silent(at(6), at(9)), Next::Use(may()));
        assert_eq!(slot.next(at(18)), Next::Renew(may()));
        assert_eq!(slot.next(at(19)), Next::Ask);
    }

    #[test]
    fn the_later_questions_answer_holds() {
        let begin = Instant::now();
        let at = |seconds| begin + Duration::from_secs(seconds);
        let mut slot = Slot::default();
        slot.said(Verdict::MayNot, at(2));
        slot.said(may(), at(1));
        assert_eq!(slot.next(at(3)), Next::Use(Verdict::MayNot));
        assert_eq!(slot.silent(at(1), at(3)), Next::Use(Verdict::MayNot));
        assert_eq!(
            slot.next(at(5)),
            Next::Ask,
            "no pause: it was answered since"
        );
    }

    proptest! {
        /// Whatever happened: what is used is what was last asked for, no longer ago than the bound; beyond the shorter
        /// one only if a question has just failed; and a no is never overridden by an earlier yes.
        #[test]
        fn nothing_older_than_the_bound_is_used(
            events in prop::collection::vec((0u64..60, 0u8..4, 0u64..5), 1..60),
        ) {
            let mut now = Instant::now();
            let mut slot = Slot::default();
            let mut last: Option<(Verdict, Instant)> = None;
            let mut failed: Option<Instant> = None;
            for (wait, what, takes) in events {
                now += Duration::from_secs(wait);
                let next = slot.next(now);
                let ask = matches!(next, Next::Ask | Next::Renew(_));
                if let Some(verdict) = used(next) {
                    let (said, at) = last.clone().unwrap();
                    prop_assert_eq!(&verdict, &said);
                    let may = matches!(verdict, Verdict::May(_));
                    let bound = match failed {
                        _ if !may => NO,
                        Some(at) if now - at < YES => WITHOUT_SERVER,
                        _ => YES,
                    };
                    prop_assert!(now - at < bound);
                }
                if ask {
                    let asked = now;
                    now += Duration::from_secs(takes);
                    if what == 0 {
                        let _ = slot.silent(asked, now);
                        failed = Some(now);
                    } else {
                        let verdict = [may(), Verdict::MayNot, Verdict::Unknown][usize::from(what - 1)].clone();
                        slot.said(verdict.clone(), asked);
                        last = Some((verdict, asked));
                        failed = None;
                    }
                }
            }
        }
    }
}
