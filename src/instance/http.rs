//! Probes, metrics and status over HTTP: read-only, nothing secret.
//!
//! Owns the five paths and the bounds of a connection. Never: asks PostgreSQL or the API server anything; it
//! shows what the manager's last turn left behind, so that a probe can't hang.

use std::sync::Arc;
use std::time::{Duration, Instant};

use axum::Router;
use axum::extract::State;
use axum::http::StatusCode;
use axum::response::{IntoResponse as _, Response};
use axum::routing::get;
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::service::TowerToHyperService;
use tokio::net::TcpListener;
use tokio::sync::{Semaphore, watch};
use tracing::{debug, warn};

use super::metrics::Metrics;
use super::status::Status;
use crate::telemetry;

/// The manager's loop counts as stuck if its last turn is older than this. A turn's own waits are bounded well
/// below it.
pub const STUCK_AFTER: Duration = Duration::from_secs(30);
/// Connections at a time.
const CONNECTIONS: usize = 32;
/// A connection ends after this, whatever it does.
const CONNECTION: Duration = Duration::from_secs(60);

/// What the manager's last turn left behind.
#[derive(Clone, Debug)]
pub struct Published {
    /// When that was.
    pub turn: Instant,
    /// Whether it serves, and why not if it doesn't.
    pub ready: Result<(), String>,
    /// All of it.
    pub status: Status,
}

/// What the paths need.
#[derive(Clone)]
pub struct View {
    /// What the manager's last turn left behind.
    pub published: watch::Receiver<Published>,
    /// The metrics.
    pub metrics: Arc<Metrics>,
}

/// The paths.
pub fn router(view: View) -> Router {
    Router::new()
        .route("/livez", get(livez))
        .route("/readyz", get(readyz))
        .route("/startupz", get(startupz))
        .route("/metrics", get(metrics))
        .route("/status", get(status))
        .with_state(view)
}

fn answer(result: Result<&str, String>) -> Response {
    match result {
        Ok(text) => (StatusCode::OK, format!("{text}\n")).into_response(),
        Err(why) => (StatusCode::SERVICE_UNAVAILABLE, format!("{why}\n")).into_response(),
    }
}

async fn livez(State(view): State<View>) -> Response {
    let age = view.published.borrow().turn.elapsed();
    answer(if age < STUCK_AFTER {
        Ok("alive")
    } else {
        Err(format!(
            "the manager's last turn was {} s ago",
            age.as_secs()
        ))
    })
}

async fn readyz(State(view): State<View>) -> Response {
    let published = view.published.borrow().clone();
    answer(if published.turn.elapsed() >= STUCK_AFTER {
        Err("the manager is stuck".to_owned())
    } else {
        published.ready.map(|()| "ready")
    })
}

/// Up as soon as the manager turns. A clone or a recovery may take hours, and to be killed for that would only
/// begin it anew; a clone that makes no progress ends by itself, and what can't go on says so in the status.
async fn startupz(view: State<View>) -> Response {
    livez(view).await
}

async fn metrics(State(view): State<View>) -> Response {
    telemetry::metrics(view.metrics.text())
}

async fn status(State(view): State<View>) -> Response {
    axum::Json(view.published.borrow().status.clone()).into_response()
}

/// Serves the paths for ever.
pub async fn serve(listener: TcpListener, view: View) {
    serve_routes(listener, router(view)).await;
}

/// Serves any such paths for ever. Each connection is bounded in time and their number is bounded, so that whoever
/// reaches the port can't take the probes' place for long.
pub async fn serve_routes(listener: TcpListener, app: Router) {
    let room = Arc::new(Semaphore::new(CONNECTIONS));
    loop {
        let Ok(permit) = room.clone().acquire_owned().await else {
            return;
        };
        let stream = match listener.accept().await {
            Ok((stream, _)) => stream,
            Err(e) => {
                // Out of file descriptors, mostly: at once would be again.
                warn!("can't accept a connection for probes: {e}");
                tokio::time::sleep(Duration::from_millis(100)).await;
                continue;
            }
        };
        let service = TowerToHyperService::new(app.clone());
        tokio::spawn(async move {
            let _permit = permit;
            let connection = hyper::server::conn::http1::Builder::new()
                .timer(TokioTimer::new())
                .header_read_timeout(Duration::from_secs(5))
                .max_buf_size(16 << 10)
                .serve_connection(TokioIo::new(stream), service);
            match tokio::time::timeout(CONNECTION, connection).await {
                Ok(Ok(())) | Err(_) => {}
                Ok(Err(e)) => debug!("a probe's connection failed: {e}"),
            }
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use axum::body::{Body, to_bytes};
    use axum::http::Request;

    async fn ask(published: Published, path: &str) -> (u16, String) {
        use tower::ServiceExt as _;
        let (_tx, published) = watch::channel(published);
        let view = View {
            published,
            metrics: Arc::new(Metrics::default()),
        };
        let request = Request::get(path).body(Body::empty()).unwrap();
        let response = router(view).oneshot(request).await.unwrap();
        let status = response.status().as_u16();
        let body = to_bytes(response.into_body(), 1 << 20).await.unwrap();
        (status, String::from_utf8(body.to_vec()).unwrap())
    }

    fn published() -> Published {
        Published {
            turn: Instant::now(),
            ready: Err("streams from nobody".into()),
            status: Status::default(),
        }
    }

    #[tokio::test]
    async fn probes_say_what_the_last_turn_left() {
        assert_eq!(ask(published(), "/livez").await.0, 200);
        assert_eq!(
            ask(published(), "/readyz").await,
            (503, "streams from nobody\n".into())
        );
        assert_eq!(ask(published(), "/startupz").await.0, 200);
        let old = Published {
            turn: Instant::now().checked_sub(STUCK_AFTER).unwrap(),
            ready: Ok(()),
            ..published()
        };
        assert_eq!(ask(old.clone(), "/livez").await.0, 503);
        assert_eq!(ask(old, "/readyz").await.0, 503);
        assert!(ask(published(), "/metrics").await.1.contains("# EOF"));
        assert!(
            ask(published(), "/status")
                .await
                .1
                .contains("\"role\":\"Starting\"")
        );
        assert_eq!(ask(published(), "/other").await.0, 404);
    }
}
