//! Probes, metrics and counts: plain HTTP, nothing secret, nothing of a person.
//!
//! Owns the four paths, and what ready means: the ledger was reached once, and the gateway isn't about to leave. A
//! ledger that is away later takes no gateway out of service: they all would be, and a client would see a connection
//! refused instead of what is wrong and when to come back.
//! Never: asks anything; a probe can't hang.

use std::sync::Arc;

use axum::Router;
use axum::extract::State;
use axum::http::StatusCode;
use axum::response::{IntoResponse as _, Response};
use axum::routing::get;
use tokio::sync::watch;

use super::metrics::Metrics;
use super::serve::Phase;
use super::wire::Tally;
use crate::telemetry;

/// What the paths need.
#[derive(Clone)]
pub struct View {
    /// What was counted last. None: the ledger wasn't reached yet.
    pub counted: watch::Receiver<Option<Arc<Tally>>>,
    /// Whether it serves.
    pub phase: watch::Receiver<Phase>,
    /// The metrics.
    pub metrics: Arc<Metrics>,
}

/// The paths.
pub fn router(view: View) -> Router {
    Router::new()
        .route("/livez", get(async || "alive\n"))
        .route("/readyz", get(readyz))
        .route("/metrics", get(metrics))
        .route("/counts", get(counts))
        .with_state(view)
}

async fn readyz(State(view): State<View>) -> (StatusCode, &'static str) {
    if *view.phase.borrow() != Phase::Serving {
        (StatusCode::SERVICE_UNAVAILABLE, "is leaving\n")
    } else if view.counted.borrow().is_some() {
        (StatusCode::OK, "ready\n")
    } else {
        (
            StatusCode::SERVICE_UNAVAILABLE,
            "the ledger wasn't reached yet: is the store there, and has its primary made the ledger?\n",
        )
    }
}

/// What was counted last, for `kubectl domicile requests`, which comes through the API server's proxy.
async fn counts(State(view): State<View>) -> Response {
    let counted = view.counted.borrow().clone();
    match counted {
        Some(tally) => axum::Json(&*tally).into_response(),
        None => (
            StatusCode::SERVICE_UNAVAILABLE,
            "the ledger wasn't reached yet\n",
        )
            .into_response(),
    }
}

async fn metrics(State(view): State<View>) -> Response {
    telemetry::metrics(view.metrics.text())
}

#[cfg(test)]
mod tests {
    use super::*;
    use axum::body::{Body, to_bytes};
    use axum::http::Request;
    use tower::ServiceExt as _;

    #[tokio::test]
    async fn ready_from_the_first_sight_of_the_ledger_until_it_leaves() {
        let (counted_tx, counted) = watch::channel(None);
        let (phase_tx, phase) = watch::channel(Phase::Serving);
        let view = View {
            counted,
            phase,
            metrics: Arc::default(),
        };
        let ask = async |path: &str| {
            let request = Request::get(path).body(Body::empty()).unwrap();
            let response = router(view.clone()).oneshot(request).await.unwrap();
            let status = response.status().as_u16();
            let body = to_bytes(response.into_body(), 1 << 20).await.unwrap();
            (status, String::from_utf8(body.to_vec()).unwrap())
        };
        assert_eq!(ask("/readyz").await.0, 503);
        assert_eq!(ask("/counts").await.0, 503);
        counted_tx.send_replace(Some(Arc::new(Tally {
            at: jiff::Timestamp::UNIX_EPOCH,
            open: 3,
            nearest_deadline: None,
            requests: Vec::new(),
            targets: Vec::new(),
        })));
        assert_eq!(ask("/readyz").await.0, 200);
        let (status, text) = ask("/counts").await;
        assert_eq!(status, 200);
        assert_eq!(serde_json::from_str::<Tally>(&text).unwrap().open, 3);
        phase_tx.send_replace(Phase::Leaving);
        assert_eq!(ask("/readyz").await.0, 503);
        assert_eq!(ask("/livez").await.0, 200);
        assert!(ask("/metrics").await.1.ends_with("# EOF\n"));
    }
}
