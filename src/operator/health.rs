//! The operator's probes and metrics.
//!
//! Owns the HTTP answers; never touches the API server.

use axum::Router;
use axum::extract::State;
use axum::http::StatusCode;
use axum::response::Response;
use axum::routing::get;
use std::future::Future;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use super::metrics::Metrics;

/// What the probes tell.
#[derive(Clone)]
pub struct Health {
    ready: Arc<AtomicBool>,
    metrics: Metrics,
}

impl Health {
    /// Of a process that isn't ready yet, and these metrics.
    #[must_use]
    pub fn new(metrics: Metrics) -> Self {
        Self {
            ready: Arc::default(),
            metrics,
        }
    }

    /// The caches are filled.
    pub fn ready(&self) {
        self.ready.store(true, Ordering::Relaxed);
    }
}

/// Binds, and returns the server to be driven.
///
/// # Errors
/// If the address is taken.
pub async fn serve(
    address: SocketAddr,
    health: Health,
) -> anyhow::Result<impl Future<Output = std::io::Result<()>>> {
    let listener = tokio::net::TcpListener::bind(address).await?;
    Ok(async move { axum::serve(listener, router(health)).await })
}

fn router(health: Health) -> Router {
    Router::new()
        .route("/livez", get(|| async { "ok" }))
        .route("/readyz", get(ready))
        .route("/metrics", get(metrics))
        .with_state(health)
}

async fn ready(State(health): State<Health>) -> (StatusCode, &'static str) {
    if health.ready.load(Ordering::Relaxed) {
        (StatusCode::OK, "ok")
    } else {
        (
            StatusCode::SERVICE_UNAVAILABLE,
            "waiting for the first lists of Regions, policies, nodes and stores",
        )
    }
}

async fn metrics(State(health): State<Health>) -> Response {
    crate::telemetry::metrics(health.metrics.text(jiff::Timestamp::now()))
}
