//! Filing: one, and many.

use axum::Json;
use axum::extract::{Request as HttpRequest, State};
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse as _, Response};
use jiff::Timestamp;
use serde_json::Value;
use std::num::NonZeroU32;
use tokio::time::Instant;
use uuid::Uuid;

use super::{LEDGER, Shared, only, patiently};
use crate::deadlines::{Clocks, clocks};
use crate::rights::config::Workflow;
use crate::rights::gateway::auth::{Caller, Verb};
use crate::rights::gateway::filing;
use crate::rights::gateway::limits::{BULK, SINGLE};
use crate::rights::gateway::metrics::{Labels, Outcome};
use crate::rights::gateway::problem::{Fault, Kind, Problem};
use crate::rights::gateway::strict::Fields;
use crate::rights::gateway::wire::{self, BULK_ITEM_FIELDS, BulkResult, ItemResult};
use crate::rights::ledger::{Filed, SealedFiling};
use crate::rights::model::Filing;
use crate::rights::secrecy::Keyring;

/// The most requests of a bulk.
pub const BULK_MAX: usize = 1000;

/// A filing, ready for the ledger.
struct Prepared {
    filing: Filing,
    clocks: Clocks,
    labels: Labels,
    sealed: SealedFiling,
}

/// From a body to what the ledger takes.
fn prepare(
    body: Value,
    at: &str,
    key: Option<&str>,
    caller: &Caller,
    workflow: &Workflow,
    keyring: &Keyring,
) -> Result<Prepared, Problem> {
    let mut filing =
        filing::check(body, at, workflow, Timestamp::now(), Uuid::now_v7()).map_err(Problem::of)?;
    // Two clients may have the same idea of a key. A key has no NUL, so no two pairs are the same text.
    filing.idempotency_key = key.map(|key| format!("{}\0{key}", caller.0));
    let clocks = clocks(&filing.regimes, filing.kind, filing.received_at)
        .map_err(|e| Problem::of(vec![Fault::new(Kind::UnknownRegime, at, e.to_string())]))?;
    let sealed = keyring.seal(&filing, clocks.acknowledge_by, clocks.answer_by).map_err(|e| {
        tracing::error!("a filing can't be sealed: {e:#}");
        Problem::passing(
            Kind::Internal,
            "the workflow's keys for today aren't there; nothing was done. The operator makes them: try again, and look at its log",
            std::time::Duration::from_secs(10),
        )
    })?;
    Ok(Prepared {
        labels: Labels::of(&filing, clocks.governing),
        filing,
        clocks,
        sealed,
    })
}

fn key_reused() -> Problem {
    Problem::new(
        Kind::KeyReused,
        "this Idempotency-Key was used before, for a request with another content; nothing was done. Give each request a key of its own, and repeat a request exactly",
    )
}

/// File a request.
///
/// 201 says that it is durable. Send an `Idempotency-Key` (a UUID, say) and, if no answer comes, the same request with
/// the same key again: it is filed once, and the repetition is answered 200 with the first one's id.
#[utoipa::path(
    post, path = "/v1/requests", tag = "requests", operation_id = "fileRequest",
    params(("Idempotency-Key" = Option<String>, Header, description = "1 to 255 printable ASCII characters, chosen by the client; counts per client")),
    request_body = filing::NewRequest,
    responses(
        (status = 201, description = "It is new, and durable", body = wire::Request, headers(("Location" = String, description = "Where to read it"))),
        (status = 200, description = "It was there already: the same key with the same content", body = wire::Request, headers(("Location" = String, description = "Where to read it"))),
        (status = 400, description = "No JSON, or a malformed header", body = crate::rights::gateway::problem::Document, content_type = "application/problem+json"),
        (status = 401, description = "Nobody known asks", body = crate::rights::gateway::problem::Document, content_type = "application/problem+json"),
        (status = 403, description = "Who asks may not", body = crate::rights::gateway::problem::Document, content_type = "application/problem+json"),
        (status = 409, description = "The key belongs to a request with another content", body = crate::rights::gateway::problem::Document, content_type = "application/problem+json"),
        (status = 413, description = "The body is too large", body = crate::rights::gateway::problem::Document, content_type = "application/problem+json"),
        (status = 415, description = "The body isn't said to be JSON", body = crate::rights::gateway::problem::Document, content_type = "application/problem+json"),
        (status = 422, description = "The content isn't valid: `errors` has all that is wrong", body = crate::rights::gateway::problem::Document, content_type = "application/problem+json"),
        (status = 429, description = "Too much at a time; nothing was done. Try again after `Retry-After`", body = crate::rights::gateway::problem::Document, content_type = "application/problem+json"),
        (status = 503, description = "The ledger or the API server can't be reached, or the ledger is full. Try again after `Retry-After`, with the same key", body = crate::rights::gateway::problem::Document, content_type = "application/problem+json"),
    ),
    security(("bearer" = []), ("mutualTLS" = [])),
)]
pub async fn one(State(gateway): State<Shared>, request: HttpRequest) -> Result<Response, Problem> {
    let began = Instant::now();
    let caller = gateway
        .admit(request.headers(), request.extensions().get(), Verb::Create)
        .await?;
    let key = only(request.headers(), "idempotency-key")?
        .map(filing::key)
        .transpose()
        .map_err(|why| Problem::new(Kind::MalformedRequest, why))?;
    let (body, room) = gateway.limits.json(request, SINGLE).await?;
    let prepared = prepare(
        body,
        "",
        key.as_deref(),
        &caller,
        &gateway.live.workflow(),
        &gateway.live.keyring(),
    )?;
    drop(room);
    let (metrics, labels) = (&gateway.metrics, &prepared.labels);
    let id = prepared.filing.id;
    let filed = gateway
        .intake
        .file(prepared.sealed, Instant::now() + LEDGER)
        .await
        .inspect_err(|_| metrics.filed(labels, Outcome::Unavailable))?;
    match filed {
        Filed::Conflict(_) => {
            metrics.filed(labels, Outcome::Conflict);
            Err(key_reused())
        }
        Filed::Same(first) if first != id => {
            metrics.filed(labels, Outcome::Repeated);
            let view = patiently(
                &gateway.live,
                |ledger| async move { ledger.read(first).await },
            )
            .await?
            .ok_or_else(super::unknown)?;
            Ok(answer(StatusCode::OK, view.into()))
        }
        // Also the same as its own: its first answer from the ledger was lost.
        Filed::New | Filed::Same(_) => {
            metrics.filed(labels, Outcome::Accepted);
            metrics.accepted_after(began.elapsed());
            gateway.live.wake();
            let request = wire::Request::filed(&prepared.filing, &prepared.clocks);
            Ok(answer(StatusCode::CREATED, request))
        }
    }
}

fn answer(status: StatusCode, request: wire::Request) -> Response {
    let location = format!("/v1/requests/{}", request.id);
    (status, [(header::LOCATION, location)], Json(request)).into_response()
}

/// File many requests.
///
/// Those that are valid are filed in one transaction, all or none; each has a result of its own, and one that is wrong
/// keeps out none of the others.
#[utoipa::path(
    post, path = "/v1/requests/bulk", tag = "requests", operation_id = "fileRequests",
    request_body = wire::Bulk,
    responses(
        (status = 200, description = "What became of each; those with status 201 are durable", body = BulkResult),
        (status = 400, description = "No JSON", body = crate::rights::gateway::problem::Document, content_type = "application/problem+json"),
        (status = 401, description = "Nobody known asks", body = crate::rights::gateway::problem::Document, content_type = "application/problem+json"),
        (status = 403, description = "Who asks may not", body = crate::rights::gateway::problem::Document, content_type = "application/problem+json"),
        (status = 413, description = "The body is too large", body = crate::rights::gateway::problem::Document, content_type = "application/problem+json"),
        (status = 415, description = "The body isn't said to be JSON", body = crate::rights::gateway::problem::Document, content_type = "application/problem+json"),
        (status = 422, description = "No bulk of 1 to 1,000 requests", body = crate::rights::gateway::problem::Document, content_type = "application/problem+json"),
        (status = 429, description = "Too much at a time; nothing was done. Try again after `Retry-After`", body = crate::rights::gateway::problem::Document, content_type = "application/problem+json"),
        (status = 503, description = "The ledger or the API server can't be reached, or the ledger is full. Try again after `Retry-After`, with the same keys", body = crate::rights::gateway::problem::Document, content_type = "application/problem+json"),
    ),
    security(("bearer" = []), ("mutualTLS" = [])),
)]
pub async fn bulk(
    State(gateway): State<Shared>,
    request: HttpRequest,
) -> Result<Json<BulkResult>, Problem> {
    let began = Instant::now();
    let caller = gateway
        .admit(request.headers(), request.extensions().get(), Verb::Create)
        .await?;
    let (body, room) = gateway.limits.json(request, BULK).await?;
    let items = items(body)?;
    let more = u32::try_from(items.len().saturating_sub(1)).unwrap_or(u32::MAX);
    if let Some(more) = NonZeroU32::new(more) {
        gateway.limits.count(&caller, more)?;
    }
    let (workflow, keyring) = (gateway.live.workflow(), gateway.live.keyring());
    let prepare_all = move || -> Vec<Result<Prepared, Problem>> {
        items
            .into_iter()
            .enumerate()
            .map(|(n, item)| {
                let (body, key) = parts_of(item, n)?;
                let at = format!("/requests/{n}/request");
                prepare(body, &at, key.as_deref(), &caller, &workflow, &keyring)
            })
            .collect()
    };
    // A thousand encryptions would hold up whoever shares this thread.
    let prepared = tokio::task::spawn_blocking(prepare_all)
        .await
        .map_err(|_| {
            Problem::new(
                Kind::Internal,
                "the bulk couldn't be prepared; nothing was done",
            )
        })?;
    drop(room);
    let sealed: Vec<_> = prepared
        .iter()
        .flatten()
        .map(|p| p.sealed.clone())
        .collect();
    let filed = if sealed.is_empty() {
        Vec::new()
    } else {
        let together = gateway
            .intake
            .file_together(sealed, Instant::now() + LEDGER);
        together.await.inspect_err(|_| {
            for p in prepared.iter().flatten() {
                gateway.metrics.filed(&p.labels, Outcome::Unavailable);
            }
        })?
    };
    let result = result(prepared, filed, &gateway, began);
    if result.accepted > 0 {
        gateway.live.wake();
    }
    Ok(Json(result))
}

/// The requests of a bulk.
fn items(body: Value) -> Result<Vec<Value>, Problem> {
    let mut faults = Vec::new();
    let items = Fields::of(body, String::new(), &mut faults).and_then(|mut fields| {
        let items = fields.array("requests", &mut faults);
        if items.is_none() && faults.is_empty() {
            fields.missing(
                "requests",
                "give an array of 1 to 1,000 requests",
                &mut faults,
            );
        }
        fields.done(&["requests"], &mut faults);
        items
    });
    if let Some(n) = items.as_ref().map(Vec::len)
        && !(1..=BULK_MAX).contains(&n)
    {
        let detail = format!("a bulk has 1 to {BULK_MAX} requests, and this has {n}: split it");
        faults.push(Fault::new(Kind::Invalid, "/requests", detail));
    }
    match items {
        Some(items) if faults.is_empty() => Ok(items),
        _ => Err(Problem::of(faults)),
    }
}

/// A request of a bulk, and its key.
fn parts_of(item: Value, n: usize) -> Result<(Value, Option<String>), Problem> {
    let mut faults = Vec::new();
    let at = format!("/requests/{n}");
    let Some(mut fields) = Fields::of(item, at, &mut faults) else {
        return Err(Problem::of(faults));
    };
    let key = fields
        .string("idempotencyKey", &mut faults)
        .map(|text| filing::key(&text));
    if let Some(Err(why)) = &key {
        let pointer = fields.pointer("idempotencyKey");
        faults.push(Fault::new(Kind::Invalid, pointer, why));
    }
    let request = fields.take("request");
    if request.is_none() {
        fields.missing(
            "request",
            "it is what a single filing's body is",
            &mut faults,
        );
    }
    fields.done(BULK_ITEM_FIELDS, &mut faults);
    match request {
        Some(request) if faults.is_empty() => Ok((request, key.and_then(Result::ok))),
        _ => Err(Problem::of(faults)),
    }
}

/// What became of each. `filed` is of those that were prepared, in their order.
fn result(
    prepared: Vec<Result<Prepared, Problem>>,
    filed: Vec<Filed>,
    gateway: &super::Gateway,
    began: Instant,
) -> BulkResult {
    let (mut filed, took) = (filed.into_iter(), began.elapsed());
    let mut all = BulkResult {
        accepted: 0,
        repeated: 0,
        refused: 0,
        results: Vec::with_capacity(prepared.len()),
    };
    let refused = |problem: Problem| {
        gateway.metrics.refused(problem.kind);
        ItemResult {
            status: problem.kind.status(),
            id: None,
            answer_by: None,
            problem: Some(problem.document()),
        }
    };
    for item in prepared {
        let one = match item {
            Err(problem) => {
                all.refused += 1;
                refused(problem)
            }
            Ok(p) => match filed.next() {
                Some(Filed::Same(first)) if first != p.filing.id => {
                    all.repeated += 1;
                    gateway.metrics.filed(&p.labels, Outcome::Repeated);
                    ItemResult {
                        status: 200,
                        id: Some(first),
                        answer_by: None,
                        problem: None,
                    }
                }
                Some(Filed::New | Filed::Same(_)) => {
                    all.accepted += 1;
                    gateway.metrics.filed(&p.labels, Outcome::Accepted);
                    gateway.metrics.accepted_after(took);
                    ItemResult {
                        status: 201,
                        id: Some(p.filing.id),
                        answer_by: Some(p.clocks.answer_by),
                        problem: None,
                    }
                }
                Some(Filed::Conflict(_)) => {
                    all.refused += 1;
                    gateway.metrics.filed(&p.labels, Outcome::Conflict);
                    refused(key_reused())
                }
                // Can't be: there are as many answers as filings.
                None => {
                    all.refused += 1;
                    refused(super::broken())
                }
            },
        };
        all.results.push(one);
    }
    all
}
