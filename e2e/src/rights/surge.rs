//! Traffic that comes whether it is answered or not, and four times as much of it within a minute.
//!
//! An open model: when each request is due is fixed beforehand, and how long it took counts from then, so that a gateway
//! that slows down can't slow its clients down with it (Tene: "coordinated omission"). A client that is told to try
//! later does as it is told, with the same Idempotency-Key, as the gateway's documentation says.
//!
//! Owns the load and the reckoning. Never takes a request for filed that the gateway hasn't answered for.

use std::collections::BTreeSet;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use k8s_openapi::api::core::v1::Pod;
use kube::api::DeleteParams;
use tokio::task::JoinSet;
use tokio::time::Instant;

use super::desk::{Desk, Gateway};
use super::people;
use super::workflow::ledger;
use crate::figures::hundredth;
use crate::harness::Scope;

/// Over how much time a percentile is taken while something changes.
const WINDOW: Duration = Duration::from_secs(5);
/// A window is back to normal at this many times the normal.
const NORMAL: f64 = 2.0;

/// How the load goes.
#[derive(Clone, Copy, Debug)]
pub struct Load {
    /// Requests in a second before and after the change.
    pub rates: (f64, f64),
    /// At the first rate, from the first to the second, at the second.
    pub phases: [Duration; 3],
    /// How long a client goes on with one request.
    pub patience: Duration,
    /// Seconds below which a percentile is normal whatever was before: of a few hundred requests on a busy machine it
    /// isn't known better.
    pub normal: f64,
}

impl Load {
    /// When each request is due: the moments at which the rate's integral passes the next whole number.
    #[must_use]
    pub fn due(&self) -> Vec<Duration> {
        let [before, ramp, after] = self.phases.map(|p| p.as_secs_f64());
        let (low, high) = self.rates;
        let slope = if ramp > 0.0 { (high - low) / ramp } else { 0.0 };
        let first = before * low;
        let second = first + ramp * f64::midpoint(low, high);
        let all = second + after * high;
        let mut due = Vec::new();
        let mut number = 1.0;
        while number <= all {
            let at = if number <= first {
                number / low
            } else if number <= second {
                let rest = number - first;
                // low * t + slope * t^2 / 2 = rest
                let root = (2.0f64.mul_add(slope * rest, low * low)).sqrt();
                before + 2.0 * rest / (low + root)
            } else {
                before + ramp + (number - second) / high
            };
            due.push(Duration::from_secs_f64(at));
            number += 1.0;
        }
        due
    }

    /// Four times as much within a minute: half a minute each of normal, rising and high, and as much again in which all
    /// has to be as before.
    #[must_use]
    pub fn quadrupled(rate: f64) -> Self {
        Self {
            rates: (rate, 4.0 * rate),
            phases: [30, 30, 60].map(Duration::from_secs),
            patience: Duration::from_secs(60),
            normal: 0.05,
        }
    }

    /// Seconds up to which a window's percentile is normal, if it was so much before.
    #[must_use]
    pub fn limit(&self, before: f64) -> f64 {
        (NORMAL * before).max(self.normal)
    }

    /// When the ramp is over.
    #[must_use]
    pub fn risen(&self) -> Duration {
        self.phases[0] + self.phases[1]
    }
}

/// What became of one request.
#[derive(Clone, Debug)]
pub struct Shot {
    /// When it was due, from the beginning.
    pub due: Duration,
    /// From then until it was accepted.
    pub took: Duration,
    /// How often the client was told to come again.
    pub later: usize,
    /// How often there was no answer.
    pub silent: usize,
    /// Its id.
    pub id: String,
}

/// Sends the load; `people` says whom the request number so and so is about. In the order in which they were due.
///
/// # Errors
/// If a request is refused for good, or not accepted in all its patience.
pub async fn fire(
    gateway: &Gateway,
    load: Load,
    prefix: &str,
    people: impl Fn(usize) -> usize,
) -> Result<Vec<Shot>> {
    let begin = Instant::now();
    let idle = Arc::new(Mutex::new(Vec::<Desk>::new()));
    let mut flying = JoinSet::new();
    let mut shots = Vec::new();
    for (number, due) in load.due().into_iter().enumerate() {
        tokio::time::sleep_until(begin + due).await;
        let (idle, gateway) = (idle.clone(), gateway.clone());
        let (key, person) = (format!("{prefix}-{number}"), people(number));
        flying.spawn(async move {
            let desk = idle.lock().unwrap_or_else(PoisonError::into_inner).pop();
            let mut desk = desk.unwrap_or_else(|| gateway.desk());
            let shot = one(&mut desk, begin, due, load.patience, &key, person).await;
            idle.lock()
                .unwrap_or_else(PoisonError::into_inner)
                .push(desk);
            shot
        });
        while let Some(done) = flying.try_join_next() {
            shots.push(done??);
        }
    }
    while let Some(done) = flying.join_next().await {
        shots.push(done??);
    }
    shots.sort_by_key(|s| s.due);
    Ok(shots)
}

async fn one(
    desk: &mut Desk,
    begin: Instant,
    due: Duration,
    patience: Duration,
    key: &str,
    person: usize,
) -> Result<Shot> {
    let (mut later, mut silent) = (0, 0);
    loop {
        let answer = desk
            .exchange(
                "POST",
                "/v1/requests",
                Some(key),
                Some(&people::deletion(person)),
            )
            .await;
        let (why, pause) = match answer {
            Ok(a) if a.status == 200 || a.status == 201 => {
                return Ok(Shot {
                    due,
                    took: (begin + due).elapsed(),
                    later,
                    silent,
                    id: a.body["id"]
                        .as_str()
                        .context("an answer without an id")?
                        .to_owned(),
                });
            }
            Ok(a) if a.status == 429 || a.status == 503 => {
                later += 1;
                let pause = Duration::from_secs(a.retry_after.unwrap_or(1));
                (format!("{} {}", a.status, a.body), pause)
            }
            Ok(a) => anyhow::bail!("refused: {} {}", a.status, a.body),
            Err(e) => {
                silent += 1;
                (format!("{e:#}"), Duration::from_millis(50))
            }
        };
        ensure!(
            (begin + due).elapsed() < patience,
            "{key} is not accepted after {patience:?}: {why}"
        );
        tokio::time::sleep(pause).await;
    }
}

/// The 99th percentile; of nothing, 0.
fn p99(took: &[f64]) -> f64 {
    hundredth(took, 99).unwrap_or_default()
}

/// The percentile of each whole window between two moments, with its beginning, of what was due at a moment and took so
/// many seconds.
#[must_use]
pub fn windows(shots: &[(Duration, f64)], from: Duration, to: Duration) -> Vec<(Duration, f64)> {
    let mut all = Vec::new();
    let mut start = from;
    while start + WINDOW <= to {
        let within = shots
            .iter()
            .filter(|(due, _)| *due >= start && *due < start + WINDOW);
        let took: Vec<f64> = within.map(|(_, took)| *took).collect();
        all.push((start, p99(&took)));
        start += WINDOW;
    }
    all
}

/// Percentiles as they are shown: in milliseconds, one after the other.
#[must_use]
pub fn shown(seconds: &[f64]) -> String {
    let all: Vec<String> = seconds.iter().map(|s| format!("{:.0}", s * 1e3)).collect();
    all.join(" ")
}

/// What a surge did.
#[derive(Clone, Debug)]
pub struct Surge {
    /// The percentile of each window from the first request on, in seconds.
    pub course: Vec<f64>,
    /// The percentile before it, in seconds.
    pub normal: f64,
    /// The worst window's after it began.
    pub worst: f64,
    /// The percentile of the last window.
    pub last: f64,
    /// Seconds from the last change until it was normal for good; none if it never was.
    pub back: Option<f64>,
    /// How many requests were told to come again, at least once.
    pub later: usize,
}

/// Reckons it. `changed` is when the last change was: the ramp's end or a failure, whichever is later.
#[must_use]
pub fn reckon(shots: &[Shot], load: &Load, changed: Duration) -> Surge {
    let rises = load.phases[0];
    let all: Vec<(Duration, f64)> = shots
        .iter()
        .map(|s| (s.due, s.took.as_secs_f64()))
        .collect();
    let before = all.iter().filter(|s| s.0 < rises).map(|s| s.1);
    let normal = p99(&before.collect::<Vec<f64>>());
    let limit = load.limit(normal);
    let earlier = windows(&all, Duration::ZERO, rises);
    let windows = windows(&all, rises, load.phases.iter().sum());
    let settled = windows.iter().rposition(|(_, p)| *p > limit);
    let back = match settled {
        None => Some(0.0),
        Some(last) if last + 1 == windows.len() => None,
        Some(last) => Some(
            (windows[last].0 + WINDOW)
                .saturating_sub(changed)
                .as_secs_f64(),
        ),
    };
    Surge {
        course: earlier.iter().chain(&windows).map(|w| w.1).collect(),
        normal,
        worst: windows.iter().map(|w| w.1).fold(0.0, f64::max),
        last: windows.last().map_or(0.0, |w| w.1),
        back,
        later: shots.iter().filter(|s| s.later > 0).count(),
    }
}

/// A surge in which the primary died.
#[derive(Clone, Debug)]
pub struct Outcome {
    /// All requests.
    pub shots: Vec<Shot>,
    /// In numbers.
    pub surge: Surge,
}

/// Sends the load, and kills the primary's pod in the middle of the ramp. Every request that was accepted is in the
/// ledger under its id.
///
/// # Errors
/// If a request isn't accepted, or was accepted and is lost, or the pod can't be killed.
pub async fn with_failover(
    scope: &Scope,
    store: &str,
    gateway: &Gateway,
    load: Load,
    prefix: &str,
    people: impl Fn(usize) -> usize,
) -> Result<Outcome> {
    let middle = load.phases[0] + load.phases[1] / 2;
    let killed = async {
        tokio::time::sleep(middle).await;
        let primary = scope.primary(store).await?;
        let now = DeleteParams::default().grace_period(0);
        scope.api::<Pod>().delete(&primary, &now).await?;
        anyhow::Ok(())
    };
    let (shots, killed) = tokio::join!(fire(gateway, load, prefix, people), killed);
    killed?;
    let shots = shots?;
    none_lost(scope, store, &shots).await?;
    let surge = reckon(&shots, &load, load.risen());
    Ok(Outcome { shots, surge })
}

/// Every request that was accepted is in the ledger under its id.
///
/// # Errors
/// If one isn't, or the ledger can't be read.
pub async fn none_lost(scope: &Scope, store: &str, shots: &[Shot]) -> Result<()> {
    let known = ledger(
        scope,
        store,
        "SELECT id FROM ledger.request UNION SELECT id FROM ledger.closed",
    )
    .await?;
    let known: BTreeSet<&str> = known.lines().collect();
    let lost = shots.iter().filter(|s| !known.contains(s.id.as_str()));
    let lost: Vec<&str> = lost.map(|s| s.id.as_str()).collect();
    ensure!(lost.is_empty(), "accepted and lost: {lost:?}");
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    const LOAD: Load = Load {
        rates: (10.0, 40.0),
        phases: [
            Duration::from_secs(10),
            Duration::from_secs(20),
            Duration::from_secs(10),
        ],
        patience: Duration::from_secs(30),
        normal: 0.05,
    };

    #[test]
    fn the_load_rises_as_it_says() {
        let due = LOAD.due();
        assert_eq!(due.len(), 100 + 500 + 400);
        assert!(due.is_sorted());
        let within = |from: u64, to: u64| {
            let range = Duration::from_secs(from)..Duration::from_secs(to);
            due.iter().filter(|d| range.contains(*d)).count()
        };
        assert!((9..=11).contains(&within(5, 6)));
        assert!((24..=26).contains(&within(20, 21)));
        assert!((39..=41).contains(&within(35, 36)));
    }

    fn shots(took: impl Fn(f64) -> f64) -> Vec<Shot> {
        let one = |due: Duration| Shot {
            due,
            took: Duration::from_secs_f64(took(due.as_secs_f64())),
            later: 0,
            silent: 0,
            id: String::new(),
        };
        LOAD.due().into_iter().map(one).collect()
    }

    #[test]
    fn windows_are_whole_and_each_its_own() {
        let slow = |at: f64| if (5.0..10.0).contains(&at) { 0.2 } else { 0.01 };
        let shots: Vec<(Duration, f64)> = (0..1700)
            .map(|n| f64::from(n) / 100.0)
            .map(|at| (Duration::from_secs_f64(at), slow(at)))
            .collect();
        let all = windows(&shots, Duration::ZERO, Duration::from_secs(17));
        assert_eq!(
            all.iter().map(|w| w.1).collect::<Vec<f64>>(),
            [0.01, 0.2, 0.01]
        );
        assert!(windows(&[], Duration::ZERO, Duration::ZERO).is_empty());
    }

    #[test]
    fn back_to_normal_is_when_no_later_window_is_worse() {
        let surge = reckon(&shots(|_| 0.01), &LOAD, LOAD.risen());
        assert_eq!(surge.back, Some(0.0));
        let burst = |at: f64| {
            if (25.0..31.0).contains(&at) {
                2.0
            } else {
                0.01
            }
        };
        let surge = reckon(&shots(burst), &LOAD, LOAD.risen());
        assert_eq!(surge.back, Some(5.0));
        assert!((surge.worst - 2.0).abs() < 0.001);
        let surge = reckon(
            &shots(|at| if at > 12.0 { 1.0 } else { 0.01 }),
            &LOAD,
            LOAD.risen(),
        );
        assert_eq!(surge.back, None);
    }
}
