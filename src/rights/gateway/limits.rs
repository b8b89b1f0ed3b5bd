//! How much is taken in at a time, and from whom.
//!
//! Owns the bounds that keep a flood from taking the gateway's memory, and one client from taking all of it. What is
//! over a bound is refused with 429 before anything of it was read or done, so nothing can be lost by it.
//! Never: waits. A queue in front of the queue would only hide the load from those who could go elsewhere.

use std::num::NonZeroU32;
use std::sync::Arc;
use std::time::Duration;

use axum::body::Body;
use axum::extract::Request;
use axum::http::{HeaderMap, header};
use governor::clock::{Clock as _, DefaultClock};
use governor::{DefaultKeyedRateLimiter, Quota};
use serde_json::Value;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::time::timeout;

use super::auth::Caller;
use super::problem::{Kind, Problem};
use super::strict;

/// The largest body of one filing.
pub const SINGLE: usize = 256 << 10;
/// The largest body of a bulk.
pub const BULK: usize = 4 << 20;
/// A body's arrival.
pub const BODY: Duration = Duration::from_secs(10);
/// A body is counted in pieces of this size.
const PIECE: usize = 1 << 10;

/// Bounds.
#[derive(Clone, Copy, Debug)]
pub struct Bounds {
    /// Requests at a time.
    pub in_flight: usize,
    /// Bytes of bodies at a time.
    pub bytes: usize,
    /// Requests of one client: a second, and at once. A bulk counts as many as it files.
    pub rate: NonZeroU32,
    /// At once.
    pub burst: NonZeroU32,
}

/// Bounds, and what is in use of them.
pub struct Limits {
    in_flight: Arc<Semaphore>,
    pieces: Arc<Semaphore>,
    rates: DefaultKeyedRateLimiter<Caller>,
    clock: DefaultClock,
}

impl std::fmt::Debug for Limits {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Limits(..)")
    }
}

fn busy() -> Problem {
    Problem::passing(
        Kind::Overloaded,
        "more is going on than this gateway takes at a time; nothing was done. Try again, with the same Idempotency-Key",
        Duration::from_secs(1),
    )
}

impl Limits {
    /// All of it is free.
    #[must_use]
    pub fn new(bounds: Bounds) -> Self {
        let quota = Quota::per_second(bounds.rate).allow_burst(bounds.burst);
        Self {
            in_flight: Arc::new(Semaphore::new(bounds.in_flight)),
            // The largest body must fit.
            pieces: Arc::new(Semaphore::new(bounds.bytes.max(BULK) / PIECE)),
            rates: DefaultKeyedRateLimiter::keyed(quota),
            clock: DefaultClock::default(),
        }
    }

    /// Takes a place for a request, for as long as the permit lives.
    ///
    /// # Errors
    /// 429 if there is none.
    pub fn enter(&self) -> Result<OwnedSemaphorePermit, Problem> {
        self.in_flight
            .clone()
            .try_acquire_owned()
            .map_err(|_| busy())
    }

    /// Counts requests of a client.
    ///
    /// # Errors
    /// 429 if it is over its rate; 422 if so many can never be at once.
    pub fn count(&self, caller: &Caller, requests: NonZeroU32) -> Result<(), Problem> {
        match self.rates.check_key_n(caller, requests) {
            Ok(Ok(())) => Ok(()),
            Ok(Err(until)) => Err(Problem::passing(
                Kind::RateLimited,
                "this client asks more often than it may; nothing was done. Try again then, with the same Idempotency-Key",
                until.wait_time_from(self.clock.now()),
            )),
            Err(capacity) => Err(Problem::new(
                Kind::Invalid,
                format!(
                    "a client may file no more than {} at once: send smaller bulks",
                    capacity.0
                ),
            )),
        }
    }

    /// Forgets clients that haven't asked for a while. To be called now and then.
    pub fn tidy(&self) {
        self.rates.retain_recent();
    }

    /// Reads a body of JSON. Its room is taken for as long as the permit lives.
    ///
    /// # Errors
    /// 400, 408, 413, 415; 429 if there is no room.
    pub async fn json(
        &self,
        request: Request,
        most: usize,
    ) -> Result<(Value, OwnedSemaphorePermit), Problem> {
        let (parts, body) = request.into_parts();
        is_json(&parts.headers)?;
        let too_large = || {
            Problem::new(
                Kind::TooLarge,
                format!(
                    "the body has more than {} KiB, the most that is taken here",
                    most >> 10
                ),
            )
        };
        let room = match length(&parts.headers) {
            Some(length) if length > most as u64 => return Err(too_large()),
            Some(length) => usize::try_from(length).unwrap_or(most),
            // Not said: it may become the largest.
            None => most,
        };
        let pieces = u32::try_from(room.div_ceil(PIECE)).unwrap_or(u32::MAX);
        let held = self
            .pieces
            .clone()
            .try_acquire_many_owned(pieces)
            .map_err(|_| busy())?;
        let bytes = match timeout(BODY, axum::body::to_bytes(body, most)).await {
            Ok(Ok(bytes)) => bytes,
            Ok(Err(e)) if is_too_large(&e) => return Err(too_large()),
            Ok(Err(_)) => {
                return Err(Problem::new(
                    Kind::MalformedRequest,
                    "the body broke off before its end; nothing was done",
                ));
            }
            Err(_) => {
                return Err(Problem::new(
                    Kind::TooSlow,
                    format!(
                        "the body didn't arrive within {} s; nothing was done",
                        BODY.as_secs()
                    ),
                ));
            }
        };
        Ok((strict::parse(&bytes)?, held))
    }

    /// Makes sure that there is no body worth mentioning: what takes none must not be made to read one.
    ///
    /// # Errors
    /// 413.
    pub fn none(request: &Request<Body>) -> Result<(), Problem> {
        match length(request.headers()) {
            Some(length) if length > SINGLE as u64 => Err(Problem::new(
                Kind::TooLarge,
                "no body is needed here, and this is a large one",
            )),
            _ => Ok(()),
        }
    }
}

fn length(headers: &HeaderMap) -> Option<u64> {
    headers
        .get(header::CONTENT_LENGTH)?
        .to_str()
        .ok()?
        .parse()
        .ok()
}

fn is_json(headers: &HeaderMap) -> Result<(), Problem> {
    let essence = headers
        .get(header::CONTENT_TYPE)
        .and_then(|v| v.to_str().ok())
        .and_then(|v| v.split(';').next())
        .map(|v| v.trim().to_ascii_lowercase());
    if essence.as_deref() == Some("application/json") {
        return Ok(());
    }
    Err(Problem::new(
        Kind::UnsupportedMediaType,
        "send JSON, and say so: the header `Content-Type: application/json`",
    ))
}

fn is_too_large(e: &axum::Error) -> bool {
    let mut source: Option<&dyn std::error::Error> = Some(e);
    while let Some(e) = source {
        if e.is::<http_body_util::LengthLimitError>() {
            return true;
        }
        source = e.source();
    }
    false
}

#[cfg(test)]
mod tests {
    use super::*;

    fn limits() -> Limits {
        Limits::new(Bounds {
            in_flight: 2,
            bytes: BULK,
            rate: NonZeroU32::MIN,
            burst: NonZeroU32::new(3).unwrap(),
        })
    }

    fn post(body: Body, length: Option<usize>) -> Request {
        let mut request =
            Request::post("/").header("content-type", "application/json; charset=utf-8");
        if let Some(n) = length {
            request = request.header("content-length", n);
        }
        request.body(body).unwrap()
    }

    async fn kind(limits: &Limits, request: Request, most: usize) -> Option<Kind> {
        limits.json(request, most).await.err().map(|p| p.kind)
    }

    #[tokio::test]
    async fn a_large_body_is_refused_whether_or_not_its_length_is_said() {
        let limits = limits();
        // Never read: it would never end.
        let endless =
            || Body::from_stream(futures::stream::pending::<Result<Vec<u8>, std::io::Error>>());
        assert_eq!(
            kind(&limits, post(endless(), Some(10 << 20)), SINGLE).await,
            Some(Kind::TooLarge)
        );
        let large = vec![b' '; SINGLE + 1];
        assert_eq!(
            kind(&limits, post(large.into(), None), SINGLE).await,
            Some(Kind::TooLarge)
        );
        assert_eq!(
            kind(&limits, post("{}".into(), Some(2)), SINGLE).await,
            None
        );
    }

    #[tokio::test(start_paused = true)]
    async fn a_body_that_never_ends_is_given_up() {
        let endless =
            Body::from_stream(futures::stream::pending::<Result<Vec<u8>, std::io::Error>>());
        assert_eq!(
            kind(&limits(), post(endless, Some(100)), SINGLE).await,
            Some(Kind::TooSlow)
        );
    }

    #[tokio::test]
    async fn room_is_for_all_bodies_together() {
        let limits = limits();
        let (_, held) = limits.json(post("{}".into(), None), BULK).await.unwrap();
        assert_eq!(
            kind(&limits, post("{}".into(), Some(2)), SINGLE).await,
            Some(Kind::Overloaded)
        );
        drop(held);
        assert_eq!(
            kind(&limits, post("{}".into(), Some(2)), SINGLE).await,
            None
        );
    }

    #[test]
    fn places_come_back() {
        let limits = limits();
        let (one, _two) = (limits.enter().unwrap(), limits.enter().unwrap());
        assert_eq!(limits.enter().unwrap_err().kind, Kind::Overloaded);
        drop(one);
        assert!(limits.enter().is_ok());
    }

    #[test]
    fn one_client_does_not_take_anothers_share() {
        let limits = limits();
        let (a, b) = (Caller("a".into()), Caller("b".into()));
        let three = NonZeroU32::new(3).unwrap();
        assert!(limits.count(&a, three).is_ok());
        let problem = limits.count(&a, NonZeroU32::MIN).unwrap_err();
        assert_eq!(problem.kind, Kind::RateLimited);
        assert!(problem.retry_after.is_some());
        assert!(limits.count(&b, three).is_ok());
        let never = limits.count(&b, NonZeroU32::new(4).unwrap()).unwrap_err();
        assert_eq!(never.kind, Kind::Invalid);
    }
}
