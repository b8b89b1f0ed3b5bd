//! The operator's probes and metrics.
//!
//! Owns the HTTP answers; never touches the API server.

use axum::Router;
use axum::extract::State;
use axum::http::StatusCode;
use axum::routing::get;
use std::future::Future;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

/// What the probes tell.
#[derive(Clone, Default)]
pub struct Health {
    flags: Arc<Flags>,
}

#[derive(Default)]
struct Flags {
    ready: AtomicBool,
    leading: AtomicBool,
}

impl Health {
    /// The caches are filled.
    pub fn ready(&self) {
        self.flags.ready.store(true, Ordering::Relaxed);
    }

    /// This process leads.
    pub fn leading(&self) {
        self.flags.leading.store(true, Ordering::Relaxed);
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
    if health.flags.ready.load(Ordering::Relaxed) {
        (StatusCode::OK, "ok")
    } else {
        (
            StatusCode::SERVICE_UNAVAILABLE,
            "waiting for the first lists of Regions, policies, nodes and stores",
        )
    }
}

async fn metrics(State(health): State<Health>) -> String {
    let leading = u8::from(health.flags.leading.load(Ordering::Relaxed));
    format!(
        "# HELP domicile_operator_leading Whether this process leads.\n# TYPE domicile_operator_leading gauge\ndomicile_operator_leading {leading}\n# EOF\n"
    )
}
