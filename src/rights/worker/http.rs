//! Probes and metrics over HTTP: read-only, nothing of a person.
//!
//! Owns the three paths. Never: asks the ledger or a target anything, so that a probe can't hang. A worker whose ledger
//! or target is away is alive, and is not ready: nothing would be gained by restarting it.

use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use axum::extract::State;
use axum::http::StatusCode;
use axum::response::{IntoResponse as _, Response};
use axum::routing::get;
use tokio::sync::watch;

use super::clock::Moment;
use super::metrics::Metrics;
use crate::telemetry;

/// The worker's loop turns at least every few seconds, whatever targets and ledger do.
const STUCK_AFTER: Duration = Duration::from_secs(30);

/// What the paths show.
#[derive(Clone, Debug)]
pub struct Health {
    /// The last turn of the loop that watches everything else.
    pub turn: Moment,
    /// Why it isn't ready.
    pub ready: Result<(), &'static str>,
}

/// What the paths need.
#[derive(Clone)]
pub struct View {
    /// How it is.
    pub health: watch::Receiver<Health>,
    /// The metrics.
    pub metrics: Arc<Metrics>,
}

/// The paths.
pub fn router(view: View) -> Router {
    Router::new()
        .route("/livez", get(livez))
        .route("/readyz", get(readyz))
        .route("/metrics", get(metrics))
        .with_state(view)
}

fn answer(result: Result<&'static str, &'static str>) -> Response {
    match result {
        Ok(text) => (StatusCode::OK, format!("{text}\n")).into_response(),
        Err(why) => (StatusCode::SERVICE_UNAVAILABLE, format!("{why}\n")).into_response(),
    }
}

fn turning(health: &Health) -> Result<&'static str, &'static str> {
    if Moment::now().since(health.turn) < STUCK_AFTER {
        Ok("alive")
    } else {
        Err("the worker is stuck")
    }
}

async fn livez(State(view): State<View>) -> Response {
    answer(turning(&view.health.borrow()))
}

async fn readyz(State(view): State<View>) -> Response {
    let health = view.health.borrow().clone();
    answer(turning(&health).and_then(|_| health.ready.map(|()| "ready")))
}

async fn metrics(State(view): State<View>) -> Response {
    telemetry::metrics(view.metrics.text())
}

#[cfg(test)]
mod tests {
    use super::*;
    use axum::body::{Body, to_bytes};
    use axum::http::Request;

    async fn ask(health: Health, path: &str) -> (u16, String) {
        use tower::ServiceExt as _;
        let (_tx, health) = watch::channel(health);
        let view = View {
            health,
            metrics: Arc::new(Metrics::default()),
        };
        let request = Request::get(path).body(Body::empty()).unwrap();
        let response = router(view).oneshot(request).await.unwrap();
        let status = response.status().as_u16();
        let body = to_bytes(response.into_body(), 1 << 20).await.unwrap();
        (status, String::from_utf8(body.to_vec()).unwrap())
    }

    #[tokio::test]
    async fn a_worker_without_its_ledger_is_alive_and_not_ready() {
        let health = Health {
            turn: Moment::now(),
            ready: Err("the ledger doesn't answer"),
        };
        assert_eq!(ask(health.clone(), "/livez").await.0, 200);
        let (status, why) = ask(health, "/readyz").await;
        assert_eq!((status, why.as_str()), (503, "the ledger doesn't answer\n"));
    }

    #[tokio::test]
    async fn a_worker_that_no_longer_turns_is_stuck() {
        let health = Health {
            turn: Moment(Moment::now().0.saturating_sub(31_000)),
            ready: Ok(()),
        };
        for path in ["/livez", "/readyz"] {
            assert_eq!(ask(health.clone(), path).await.0, 503);
        }
    }

    #[tokio::test]
    async fn metrics_are_open_metrics() {
        let health = Health {
            turn: Moment::now(),
            ready: Ok(()),
        };
        let (status, text) = ask(health, "/metrics").await;
        assert_eq!(status, 200);
        assert!(text.ends_with("# EOF\n"), "{text}");
    }
}
