//! The API: what each path does.
//!
//! Owns the paths, in the order that everything takes here: who asks, how often, how large, what; then the ledger.
//! Never: answers 2xx for what isn't durable; says whether a request exists to somebody who may not read it.

mod change;
mod file;
pub mod read;

use std::future::Future;
use std::sync::Arc;
use std::time::Duration;

use axum::extract::{Request, State};
use axum::http::{HeaderMap, HeaderValue, header};
use axum::middleware::{self, Next};
use axum::response::{IntoResponse as _, Response};
use axum::routing::get;
use axum::{Json, Router};
use rand::Rng as _;
use tokio::time::{Instant, sleep, timeout};
use utoipa::openapi::security::{Http, HttpAuthScheme, SecurityScheme};
use utoipa::{Modify, OpenApi};
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;
use uuid::Uuid;

use super::auth::{Authentication, Caller, Peer, Verb};
use super::intake::{Intake, Trouble};
use super::limits::Limits;
use super::live::Live;
use super::metrics::Metrics;
use super::problem::{Kind, Problem};
use crate::rights::ledger::{Ledger, LedgerError};

/// How long a request waits for the ledger: a failover, twice and a bit.
pub const LEDGER: Duration = Duration::from_secs(5);
/// The whole of a request: its body, the API server, the ledger, and a bit.
const REQUEST: Duration = Duration::from_secs(20);
/// When to try again after the ledger couldn't be reached for [`LEDGER`].
const LATER: Duration = Duration::from_secs(2);

/// What the paths need.
#[derive(Debug)]
pub struct Gateway {
    /// What the files say.
    pub live: Live,
    /// Who may.
    pub authentication: Authentication,
    /// How much.
    pub limits: Limits,
    /// The way into the ledger.
    pub intake: Intake,
    /// The metrics.
    pub metrics: Arc<Metrics>,
    /// What was counted last.
    pub counts: read::Counted,
}

/// Shared by all requests.
pub type Shared = Arc<Gateway>;

impl Gateway {
    /// Who asks, if they may, and not too often.
    async fn admit(
        &self,
        headers: &HeaderMap,
        peer: Option<&Peer>,
        verb: Verb,
    ) -> Result<Caller, Problem> {
        // Can't be: every connection has another end.
        let peer =
            peer.ok_or_else(|| Problem::new(Kind::Internal, "the connection has no other end"))?;
        let caller = self.authentication.caller(headers, peer, verb).await?;
        self.limits.count(&caller, std::num::NonZeroU32::MIN)?;
        Ok(caller)
    }
}

/// Asks the ledger, again while it can't be reached. What is asked can be repeated.
async fn patiently<T, F>(live: &Live, ask: impl Fn(Ledger) -> F) -> Result<T, Problem>
where
    F: Future<Output = Result<T, LedgerError>>,
{
    let until = Instant::now() + LEDGER;
    let mut pause = Duration::from_millis(20);
    loop {
        match timeout(LEDGER, ask(live.ledger())).await {
            Ok(Ok(answer)) => return Ok(answer),
            Ok(Err(LedgerError::Full(what))) => return Err(full(what)),
            Ok(Err(e @ LedgerError::Refused(_))) => {
                tracing::error!("{e}");
                return Err(broken());
            }
            Ok(Err(LedgerError::Unavailable(_))) | Err(_) => {}
        }
        let wait = pause.mul_f64(rand::rng().random_range(0.5..1.0));
        if Instant::now() + wait >= until {
            return Err(away());
        }
        sleep(wait).await;
        pause = (pause * 2).min(Duration::from_millis(250));
    }
}

fn away() -> Problem {
    Problem::passing(
        Kind::LedgerUnavailable,
        "the ledger couldn't be reached in time; whether this was done isn't known. Try again with the same Idempotency-Key: it is done once",
        LATER,
    )
}

fn full(what: &str) -> Problem {
    let what = what.strip_prefix("its ").map_or_else(
        || format!("the ledger has no room: {what}"),
        |rest| format!("the ledger's {rest}"),
    );
    Problem::passing(
        Kind::LedgerFull,
        format!(
            "{what}; nothing was done. Try again later, and tell the administrator of the store"
        ),
        Duration::from_secs(10),
    )
}

fn broken() -> Problem {
    Problem::new(
        Kind::Internal,
        "the ledger refuses what the gateway asks of it; nothing was done. The gateway's log says more",
    )
}

impl From<Trouble> for Problem {
    fn from(trouble: Trouble) -> Self {
        match trouble {
            Trouble::Busy => Problem::passing(
                Kind::Overloaded,
                "more filings wait for the ledger than this gateway holds; nothing was done. Try again, with the same Idempotency-Key",
                Duration::from_secs(1),
            ),
            Trouble::Away => away(),
            Trouble::Full(what) => full(what),
            Trouble::Refused => broken(),
        }
    }
}

/// The id in a path.
fn id_of(text: &str) -> Result<Uuid, Problem> {
    Uuid::try_parse(text).map_err(|_| unknown())
}

fn unknown() -> Problem {
    Problem::new(
        Kind::UnknownRequest,
        "no request of this workflow has this id; records of ended requests are removed when the workflow's retention is over",
    )
}

/// The only value of a header, if it is there.
fn only<'a>(headers: &'a HeaderMap, name: &str) -> Result<Option<&'a str>, Problem> {
    let mut all = headers.get_all(name).iter();
    let Some(value) = all.next() else {
        return Ok(None);
    };
    match (value.to_str(), all.next()) {
        (Ok(text), None) => Ok(Some(text)),
        _ => Err(Problem::new(
            Kind::MalformedRequest,
            format!("give the header {name} once, in ASCII"),
        )),
    }
}

/// The document, but for its paths.
#[derive(OpenApi)]
#[openapi(
    info(
        title = "Domicile: rights requests",
        description = "Files requests of people about their data, and tells what became of them. An answer 2xx to a filing says that it is on the disks of the ledger's quorum. Problems are RFC 9457 documents; their `type` is stable.",
        license(name = "Apache-2.0", identifier = "Apache-2.0"),
    ),
    modifiers(&Ways),
    tags((name = "requests", description = "Requests of people about their data")),
)]
struct Document;

struct Ways;

impl Modify for Ways {
    fn modify(&self, api: &mut utoipa::openapi::OpenApi) {
        let parts = api.components.get_or_insert_default();
        let mut bearer = Http::new(HttpAuthScheme::Bearer);
        bearer.description = Some(
            "A token of Kubernetes, made for the gateway's audience (domicile, unless configured otherwise).".into(),
        );
        parts.add_security_scheme("bearer", SecurityScheme::Http(bearer));
        parts.add_security_scheme(
            "mutualTLS",
            SecurityScheme::MutualTls {
                description: Some(
                    "A client certificate, if the administrator permits them.".into(),
                ),
                deprecated: None,
                extensions: None,
            },
        );
    }
}

fn paths() -> OpenApiRouter<Shared> {
    OpenApiRouter::with_openapi(Document::openapi())
        .routes(routes!(file::one, read::list))
        .routes(routes!(file::bulk))
        .routes(routes!(read::one))
        .routes(routes!(change::withdraw))
        .routes(routes!(change::approve))
        .routes(routes!(change::extend))
        .routes(routes!(read::counts))
}

/// The OpenAPI document.
#[must_use]
pub fn document() -> utoipa::openapi::OpenApi {
    paths().into_openapi()
}

/// The paths.
pub fn router(gateway: Shared) -> Router {
    let (router, document) = paths().split_for_parts();
    let document = Arc::new(document);
    router
        .route(
            "/openapi.json",
            get(move || async move { Json(document.as_ref().clone()) }),
        )
        .fallback(async || {
            Problem::new(
                Kind::UnknownPath,
                "there is nothing here; /openapi.json has all paths",
            )
        })
        .method_not_allowed_fallback(async || {
            Problem::new(
                Kind::MethodNotAllowed,
                "this path doesn't know this method; /openapi.json has all of them",
            )
        })
        .layer(middleware::from_fn_with_state(gateway.clone(), around))
        .with_state(gateway)
}

/// Around every request: a place for it, its time, its count.
async fn around(State(gateway): State<Shared>, request: Request, next: Next) -> Response {
    let _up = gateway.metrics.in_flight();
    let mut response = match gateway.limits.enter() {
        Err(problem) => problem.into_response(),
        Ok(_place) => match timeout(REQUEST, next.run(request)).await {
            Ok(response) => response,
            Err(_) => away().into_response(),
        },
    };
    if let Some(kind) = response.extensions().get::<Kind>() {
        gateway.metrics.refused(*kind);
    }
    // What is said of requests is for who asked, and true now.
    response
        .headers_mut()
        .insert(header::CACHE_CONTROL, HeaderValue::from_static("no-store"));
    response
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rights::gateway::{filing, wire};
    use serde_json::Value;

    fn doc() -> Value {
        serde_json::to_value(document()).unwrap()
    }

    #[test]
    fn the_document_is_of_openapi_3_1_and_protects_every_path() {
        let doc = doc();
        assert!(doc["openapi"].as_str().unwrap().starts_with("3.1"), "{doc}");
        let paths = doc["paths"].as_object().unwrap();
        assert_eq!(paths.len(), 7, "{:?}", paths.keys());
        for (path, methods) in paths {
            for (method, operation) in methods.as_object().unwrap() {
                let security = operation["security"].to_string();
                assert!(security.contains("bearer"), "{method} {path}: {security}");
                for status in ["401", "403", "429", "503"] {
                    assert!(
                        operation["responses"].get(status).is_some(),
                        "{method} {path}: {status} isn't documented"
                    );
                }
            }
        }
    }

    #[test]
    fn a_full_ledger_says_what_is_full() {
        let problem = Problem::from(Trouble::Full("its disk is full"));
        assert_eq!(problem.kind, Kind::LedgerFull);
        assert!(problem.detail.starts_with("the ledger's disk is full;"));
        assert!(problem.retry_after.is_some());
        let problem = full("a limit of it is reached");
        assert!(problem.detail.contains("a limit of it is reached"));
    }

    /// The reader of bodies is written by hand: it and the document must know the same fields.
    #[test]
    fn the_document_and_the_reader_know_the_same_fields() {
        let doc = doc();
        for (schema, fields) in [
            ("NewRequest", filing::FIELDS),
            ("BulkItem", wire::BULK_ITEM_FIELDS),
            ("Extension", wire::EXTENSION_FIELDS),
        ] {
            let properties = doc["components"]["schemas"][schema]["properties"]
                .as_object()
                .unwrap_or_else(|| panic!("{schema} in {doc}"));
            let mut documented: Vec<_> = properties.keys().map(String::as_str).collect();
            let mut read = fields.to_vec();
            documented.sort_unstable();
            read.sort_unstable();
            assert_eq!(documented, read, "{schema}");
        }
    }
}
