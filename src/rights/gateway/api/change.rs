//! Changes: withdraw, approve, extend.

use axum::Json;
use axum::extract::{Path, Request as HttpRequest, State};
use jiff::Timestamp;
use uuid::Uuid;

use super::{Shared, id_of, patiently, unknown};
use crate::deadlines::{Clocks, clocks};
use crate::rights::gateway::auth::Verb;
use crate::rights::gateway::limits::{Limits, SINGLE};
use crate::rights::gateway::problem::{Fault, Kind, Problem};
use crate::rights::gateway::strict::Fields;
use crate::rights::gateway::wire::{self, EXTENSION_FIELDS, EXTENSION_REASONS};
use crate::rights::ledger::{Changed, RequestView};
use crate::rights::model::State as Stand;

type Answer = Result<Json<wire::Request>, Problem>;

/// Withdraw a request.
///
/// The person takes it back. Possible until a worker has begun with it; its identifiers' key is destroyed. A repetition
/// changes nothing.
#[utoipa::path(
    post, path = "/v1/requests/{id}/withdraw", tag = "requests", operation_id = "withdrawRequest",
    params(("id" = Uuid, Path, description = "The request's id")),
    responses(
        (status = 200, description = "It is withdrawn", body = wire::Request),
        (status = 401, description = "Nobody known asks", body = crate::rights::gateway::problem::Document, content_type = "application/problem+json"),
        (status = 403, description = "Who asks may not", body = crate::rights::gateway::problem::Document, content_type = "application/problem+json"),
        (status = 404, description = "There is none", body = crate::rights::gateway::problem::Document, content_type = "application/problem+json"),
        (status = 409, description = "It is too late: erasing has begun, or is done", body = crate::rights::gateway::problem::Document, content_type = "application/problem+json"),
        (status = 429, description = "Too much at a time", body = crate::rights::gateway::problem::Document, content_type = "application/problem+json"),
        (status = 503, description = "The ledger or the API server can't be reached", body = crate::rights::gateway::problem::Document, content_type = "application/problem+json"),
    ),
    security(("bearer" = []), ("mutualTLS" = [])),
)]
pub async fn withdraw(
    State(gateway): State<Shared>,
    Path(id): Path<String>,
    request: HttpRequest,
) -> Answer {
    gateway
        .admit(request.headers(), request.extensions().get(), Verb::Update)
        .await?;
    Limits::none(&request)?;
    let id = id_of(&id)?;
    let changed = patiently(
        &gateway.live,
        |ledger| async move { ledger.withdraw(id).await },
    )
    .await?;
    done(
        &gateway,
        id,
        changed,
        "erasing has begun or is done, and what is erased can't be brought back",
    )
    .await
}

/// Approve a request.
///
/// For one that was filed with `needsApproval`: the person is who they say they are. It is carried out now. A
/// repetition changes nothing.
#[utoipa::path(
    post, path = "/v1/requests/{id}/approve", tag = "requests", operation_id = "approveRequest",
    params(("id" = Uuid, Path, description = "The request's id")),
    responses(
        (status = 200, description = "It is approved", body = wire::Request),
        (status = 401, description = "Nobody known asks", body = crate::rights::gateway::problem::Document, content_type = "application/problem+json"),
        (status = 403, description = "Who asks may not", body = crate::rights::gateway::problem::Document, content_type = "application/problem+json"),
        (status = 404, description = "There is none", body = crate::rights::gateway::problem::Document, content_type = "application/problem+json"),
        (status = 409, description = "It was withdrawn", body = crate::rights::gateway::problem::Document, content_type = "application/problem+json"),
        (status = 429, description = "Too much at a time", body = crate::rights::gateway::problem::Document, content_type = "application/problem+json"),
        (status = 503, description = "The ledger or the API server can't be reached", body = crate::rights::gateway::problem::Document, content_type = "application/problem+json"),
    ),
    security(("bearer" = []), ("mutualTLS" = [])),
)]
pub async fn approve(
    State(gateway): State<Shared>,
    Path(id): Path<String>,
    request: HttpRequest,
) -> Answer {
    gateway
        .admit(request.headers(), request.extensions().get(), Verb::Update)
        .await?;
    Limits::none(&request)?;
    let id = id_of(&id)?;
    let changed = patiently(
        &gateway.live,
        |ledger| async move { ledger.approve(id).await },
    )
    .await?;
    if changed == Changed::Yes {
        gateway.live.wake();
    }
    done(&gateway, id, changed, "it was withdrawn: file it anew").await
}

/// Extend a request's deadline.
///
/// Once, as far as the laws of the request permit, if the person was told in time (`noticeSentAt`).
#[utoipa::path(
    post, path = "/v1/requests/{id}/extend", tag = "requests", operation_id = "extendRequest",
    params(("id" = Uuid, Path, description = "The request's id")),
    request_body = wire::Extension,
    responses(
        (status = 200, description = "It is extended", body = wire::Request),
        (status = 400, description = "No JSON", body = crate::rights::gateway::problem::Document, content_type = "application/problem+json"),
        (status = 401, description = "Nobody known asks", body = crate::rights::gateway::problem::Document, content_type = "application/problem+json"),
        (status = 403, description = "Who asks may not", body = crate::rights::gateway::problem::Document, content_type = "application/problem+json"),
        (status = 404, description = "There is none", body = crate::rights::gateway::problem::Document, content_type = "application/problem+json"),
        (status = 409, description = "It has ended", body = crate::rights::gateway::problem::Document, content_type = "application/problem+json"),
        (status = 413, description = "The body is too large", body = crate::rights::gateway::problem::Document, content_type = "application/problem+json"),
        (status = 415, description = "The body isn't said to be JSON", body = crate::rights::gateway::problem::Document, content_type = "application/problem+json"),
        (status = 422, description = "The laws of the request don't permit it, or the content isn't valid", body = crate::rights::gateway::problem::Document, content_type = "application/problem+json"),
        (status = 429, description = "Too much at a time", body = crate::rights::gateway::problem::Document, content_type = "application/problem+json"),
        (status = 503, description = "The ledger or the API server can't be reached", body = crate::rights::gateway::problem::Document, content_type = "application/problem+json"),
    ),
    security(("bearer" = []), ("mutualTLS" = [])),
)]
pub async fn extend(
    State(gateway): State<Shared>,
    Path(id): Path<String>,
    request: HttpRequest,
) -> Answer {
    gateway
        .admit(request.headers(), request.extensions().get(), Verb::Update)
        .await?;
    let id = id_of(&id)?;
    let (body, _room) = gateway.limits.json(request, SINGLE).await?;
    let (notice, reason) = extension(body)?;
    let view = patiently(&gateway.live, |ledger| async move { ledger.read(id).await })
        .await?
        .ok_or_else(unknown)?;
    let too_late = "it has ended, or was extended before, which is possible once";
    if matches!(view.state, Stand::Closed | Stand::Withdrawn) {
        return done(&gateway, id, Changed::TooLate, too_late).await;
    }
    let to = extended(&view, notice, Timestamp::now())?;
    let changed = patiently(&gateway.live, |ledger| async move {
        ledger.extend(id, to, reason).await
    })
    .await?;
    done(&gateway, id, changed, too_late).await
}

/// What an extension's body says.
fn extension(body: serde_json::Value) -> Result<(Timestamp, &'static str), Problem> {
    let mut faults = Vec::new();
    let Some(mut fields) = Fields::of(body, String::new(), &mut faults) else {
        return Err(Problem::of(faults));
    };
    let notice = fields.time("noticeSentAt", &mut faults);
    if notice.is_none() && faults.is_empty() {
        fields.missing("noticeSentAt", "say when the person was told", &mut faults);
    }
    let before = faults.len();
    let reason = fields.string("reason", &mut faults).and_then(|text| {
        let known = EXTENSION_REASONS.iter().find(|r| **r == text);
        if known.is_none() {
            let detail = format!(
                "this is no reason; known are: {}",
                EXTENSION_REASONS.join(", ")
            );
            faults.push(Fault::new(Kind::Invalid, fields.pointer("reason"), detail));
        }
        known.copied()
    });
    if reason.is_none() && faults.len() == before {
        let why = format!("it is one of {}", EXTENSION_REASONS.join(", "));
        fields.missing("reason", &why, &mut faults);
    }
    fields.done(EXTENSION_FIELDS, &mut faults);
    match (notice, reason) {
        (Some(notice), Some(reason)) if faults.is_empty() => Ok((notice, reason)),
        _ => Err(Problem::of(faults)),
    }
}

/// Until when the request's laws permit to extend it.
fn extended(view: &RequestView, notice: Timestamp, now: Timestamp) -> Result<Timestamp, Problem> {
    let no = |why: String| Problem::new(Kind::NoExtension, why);
    let first =
        clocks(&view.regimes, view.kind, view.received_at).map_err(|e| no(e.to_string()))?;
    let as_filed = Clocks {
        // What the person was promised counts, also if this version counts otherwise.
        answer_by: view.answer_by,
        // The ledger knows whether it was extended before, and tells a repetition from a second time.
        extended_to: None,
        ..first
    };
    let clocks = crate::deadlines::extend(&as_filed, notice, now).map_err(|e| no(e.to_string()))?;
    Ok(clocks.deadline())
}

/// What became of a change, and the request as it is now.
async fn done(gateway: &Shared, id: Uuid, changed: Changed, too_late: &str) -> Answer {
    match changed {
        Changed::Unknown => Err(unknown()),
        Changed::TooLate => Err(Problem::new(
            Kind::WrongState,
            format!("nothing was changed: {too_late}"),
        )),
        Changed::Yes | Changed::Already => {
            let view =
                patiently(&gateway.live, |ledger| async move { ledger.read(id).await }).await?;
            Ok(Json(view.ok_or_else(unknown)?.into()))
        }
    }
}
