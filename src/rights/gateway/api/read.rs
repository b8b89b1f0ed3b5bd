//! Reading: one, a list, counts.

use std::time::Duration;

use axum::Json;
use axum::extract::{Path, Query, Request as HttpRequest, State};
use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use jiff::Timestamp;
use serde::Deserialize as _;
use tokio::sync::Mutex;
use tokio::time::{Instant, timeout};
use uuid::Uuid;

use super::{LEDGER, Shared, id_of, patiently, unknown};
use crate::rights::gateway::auth::Verb;
use crate::rights::gateway::limits::Limits;
use crate::rights::gateway::problem::{Kind, Problem};
use crate::rights::gateway::wire::{self, Entry, Page, Tally};
use crate::rights::ledger::{Counts, Cursor, ListFilter};
use crate::rights::model::State as Stand;

/// For how long a count is used: counting a million requests isn't free.
const COUNTED: Duration = Duration::from_secs(5);
/// The most entries of a page.
const PAGE_MAX: u32 = 500;
/// Entries of a page if nothing is said.
const PAGE: u32 = 100;

/// What was counted last, and when.
pub type Counted = Mutex<Option<(Instant, Counts)>>;

/// Read a request.
#[utoipa::path(
    get, path = "/v1/requests/{id}", tag = "requests", operation_id = "readRequest",
    params(("id" = Uuid, Path, description = "The request's id")),
    responses(
        (status = 200, description = "Where it stands, and the proof of what is done", body = wire::Request),
        (status = 401, description = "Nobody known asks", body = crate::rights::gateway::problem::Document, content_type = "application/problem+json"),
        (status = 403, description = "Who asks may not", body = crate::rights::gateway::problem::Document, content_type = "application/problem+json"),
        (status = 404, description = "There is none", body = crate::rights::gateway::problem::Document, content_type = "application/problem+json"),
        (status = 429, description = "Too much at a time", body = crate::rights::gateway::problem::Document, content_type = "application/problem+json"),
        (status = 503, description = "The ledger or the API server can't be reached", body = crate::rights::gateway::problem::Document, content_type = "application/problem+json"),
    ),
    security(("bearer" = []), ("mutualTLS" = [])),
)]
pub async fn one(
    State(gateway): State<Shared>,
    Path(id): Path<String>,
    request: HttpRequest,
) -> Result<Json<wire::Request>, Problem> {
    gateway
        .admit(request.headers(), request.extensions().get(), Verb::Get)
        .await?;
    Limits::none(&request)?;
    let id = id_of(&id)?;
    let view = patiently(&gateway.live, |ledger| async move { ledger.read(id).await }).await?;
    Ok(Json(view.ok_or_else(unknown)?.into()))
}

/// List requests.
///
/// By legal deadline, the nearest first; those that have ended (`state=closed` or `withdrawn`) by when they did.
#[utoipa::path(
    get, path = "/v1/requests", tag = "requests", operation_id = "listRequests",
    params(
        ("state" = Option<String>, Query, description = "awaiting-approval, open, closed or withdrawn. Absent: all that haven't ended"),
        ("due-before" = Option<String>, Query, description = "Only those whose deadline is before this time (RFC 3339). Not with closed or withdrawn"),
        ("after" = Option<String>, Query, description = "What the page before said as `next`"),
        ("limit" = Option<u32>, Query, description = "1 to 500; 100 if absent"),
    ),
    responses(
        (status = 200, description = "A page", body = Page),
        (status = 400, description = "A parameter is malformed", body = crate::rights::gateway::problem::Document, content_type = "application/problem+json"),
        (status = 401, description = "Nobody known asks", body = crate::rights::gateway::problem::Document, content_type = "application/problem+json"),
        (status = 403, description = "Who asks may not", body = crate::rights::gateway::problem::Document, content_type = "application/problem+json"),
        (status = 429, description = "Too much at a time", body = crate::rights::gateway::problem::Document, content_type = "application/problem+json"),
        (status = 503, description = "The ledger or the API server can't be reached", body = crate::rights::gateway::problem::Document, content_type = "application/problem+json"),
    ),
    security(("bearer" = []), ("mutualTLS" = [])),
)]
pub async fn list(
    State(gateway): State<Shared>,
    request: HttpRequest,
) -> Result<Json<Page>, Problem> {
    gateway
        .admit(request.headers(), request.extensions().get(), Verb::List)
        .await?;
    Limits::none(&request)?;
    let pairs = Query::<Vec<(String, String)>>::try_from_uri(request.uri())
        .map_err(|_| malformed("the query isn't one: write ?name=value&name=value"))?;
    let wanted = wanted(pairs.0)?;
    let listed = patiently(&gateway.live, |ledger| async move {
        ledger
            .list(&wanted.filter, wanted.after, wanted.limit)
            .await
    })
    .await?;
    let full = listed.len() >= wanted.limit as usize;
    let next = listed.last().filter(|_| full).map(|l| text_of(l.cursor()));
    Ok(Json(Page {
        items: listed.into_iter().map(Entry::from).collect(),
        next,
    }))
}

/// Count requests.
///
/// Numbers and deadlines of what hasn't ended; up to five seconds old.
#[utoipa::path(
    get, path = "/v1/counts", tag = "requests", operation_id = "countRequests",
    responses(
        (status = 200, description = "The numbers", body = Tally),
        (status = 401, description = "Nobody known asks", body = crate::rights::gateway::problem::Document, content_type = "application/problem+json"),
        (status = 403, description = "Who asks may not", body = crate::rights::gateway::problem::Document, content_type = "application/problem+json"),
        (status = 429, description = "Too much at a time", body = crate::rights::gateway::problem::Document, content_type = "application/problem+json"),
        (status = 503, description = "The ledger or the API server can't be reached", body = crate::rights::gateway::problem::Document, content_type = "application/problem+json"),
    ),
    security(("bearer" = []), ("mutualTLS" = [])),
)]
pub async fn counts(
    State(gateway): State<Shared>,
    request: HttpRequest,
) -> Result<Json<Tally>, Problem> {
    gateway
        .admit(request.headers(), request.extensions().get(), Verb::List)
        .await?;
    Limits::none(&request)?;
    // Held while counting: who comes meanwhile gets the same numbers.
    let mut last = timeout(LEDGER, gateway.counts.lock())
        .await
        .map_err(|_| super::away())?;
    if let Some((at, counts)) = &*last
        && at.elapsed() < COUNTED
    {
        return Ok(Json(counts.clone().into()));
    }
    let counts = patiently(&gateway.live, |ledger| async move { ledger.counts().await }).await?;
    *last = Some((Instant::now(), counts.clone()));
    Ok(Json(counts.into()))
}

/// What a list is asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Wanted {
    filter: ListFilter,
    after: Option<Cursor>,
    limit: u32,
}

fn malformed(detail: &str) -> Problem {
    Problem::new(Kind::MalformedRequest, detail)
}

fn wanted(pairs: Vec<(String, String)>) -> Result<Wanted, Problem> {
    let mut wanted = Wanted {
        filter: ListFilter::default(),
        after: None,
        limit: PAGE,
    };
    let mut seen = std::collections::BTreeSet::new();
    for (name, value) in pairs {
        match name.as_str() {
            "state" => {
                let text =
                    serde::de::value::StrDeserializer::<serde::de::value::Error>::new(&value);
                let state = Stand::deserialize(text).map_err(|_| {
                    malformed("state is awaiting-approval, open, closed or withdrawn")
                })?;
                wanted.filter.state = Some(state);
            }
            "due-before" => {
                let at: Timestamp = value.parse().map_err(|_| {
                    malformed("due-before is a time in RFC 3339, such as 2026-03-01T00:00:00Z (a + is written %2B)")
                })?;
                wanted.filter.due_before = Some(at);
            }
            "after" => {
                let cursor = cursor_of(&value)
                    .ok_or_else(|| malformed("after is what the page before said as next"))?;
                wanted.after = Some(cursor);
            }
            "limit" => {
                wanted.limit = value
                    .parse()
                    .ok()
                    .filter(|n| (1..=PAGE_MAX).contains(n))
                    .ok_or_else(|| malformed("limit is a number from 1 to 500"))?;
            }
            _ => {
                return Err(malformed(
                    "a parameter is unknown; known are: state, due-before, after, limit",
                ));
            }
        }
        if !seen.insert(name) {
            return Err(malformed("a parameter is given twice"));
        }
    }
    let ended = matches!(wanted.filter.state, Some(Stand::Closed | Stand::Withdrawn));
    if ended && wanted.filter.due_before.is_some() {
        return Err(malformed(
            "due-before is for requests that haven't ended: leave it out, or ask for open ones",
        ));
    }
    Ok(wanted)
}

/// A place in a list, as clients get it: not for them to read.
fn text_of(cursor: Cursor) -> String {
    let mut bytes = cursor.at.as_microsecond().to_be_bytes().to_vec();
    bytes.extend(cursor.id.as_bytes());
    URL_SAFE_NO_PAD.encode(bytes)
}

fn cursor_of(text: &str) -> Option<Cursor> {
    let bytes = URL_SAFE_NO_PAD.decode(text).ok()?;
    let (at, id) = bytes.split_first_chunk::<8>()?;
    Some(Cursor {
        at: Timestamp::from_microsecond(i64::from_be_bytes(*at)).ok()?,
        id: Uuid::from_slice(id).ok()?,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn of(query: &str) -> Result<Wanted, Problem> {
        let uri = format!("/v1/requests?{query}").parse().unwrap();
        wanted(
            Query::<Vec<(String, String)>>::try_from_uri(&uri)
                .unwrap()
                .0,
        )
    }

    #[test]
    fn parameters() {
        let all = of("state=open&due-before=2026-03-01T00:00:00Z&limit=7").unwrap();
        assert_eq!(all.filter.state, Some(Stand::Open));
        assert_eq!(all.limit, 7);
        assert_eq!(of("").unwrap().limit, PAGE);
        for wrong in [
            "state=lost",
            "limit=0",
            "limit=501",
            "limit=x",
            "due-before=tomorrow",
            "after=x",
            "order=asc",
            "limit=1&limit=2",
            "state=closed&due-before=2026-03-01T00:00:00Z",
        ] {
            assert_eq!(
                of(wrong).unwrap_err().kind,
                Kind::MalformedRequest,
                "{wrong}"
            );
        }
    }

    proptest! {
        #[test]
        fn a_cursor_is_read_back(micros in -1_000_000_000_000_000i64..4_000_000_000_000_000, id: u128) {
            let cursor = Cursor {
                at: Timestamp::from_microsecond(micros).unwrap(),
                id: Uuid::from_u128(id),
            };
            prop_assert_eq!(cursor_of(&text_of(cursor)), Some(cursor));
        }

        #[test]
        fn anything_else_is_no_cursor_or_one(text in ".{0,60}") {
            let _ = cursor_of(&text);
        }
    }
}
