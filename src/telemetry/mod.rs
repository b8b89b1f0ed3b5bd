//! Logs, and the form in which metrics are answered.
//!
//! Owns how logs are written: one JSON object a line on stderr, level by `DOMICILE_LOG` (tracing's filter
//! syntax, default `info`).
//! Never sees personal data: callers log names, states and counts.

use axum::http::header;
use axum::response::{IntoResponse as _, Response};
use tracing_subscriber::EnvFilter;

/// Installs the logger; a second call changes nothing.
pub fn init() {
    let filter = EnvFilter::try_from_env("DOMICILE_LOG")
        .unwrap_or_else(|_| EnvFilter::new("info,kube=warn,k8s_controller=info"));
    let installed = tracing_subscriber::fmt()
        .json()
        .flatten_event(true)
        .with_writer(std::io::stderr)
        .with_env_filter(filter)
        .try_init();
    drop(installed);
}

/// Metrics as a scraper takes them: `text` is OpenMetrics' exposition, as `prometheus-client` writes it.
#[must_use]
pub fn metrics(text: String) -> Response {
    let kind = "application/openmetrics-text; version=1.0.0; charset=utf-8";
    ([(header::CONTENT_TYPE, kind)], text).into_response()
}
