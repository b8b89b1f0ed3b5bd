//! Asks an instance what it says of itself: `/status` at its pod's address.
//!
//! Owns the bounds of that: a second, and a few kilobytes. Plain HTTP, as for probes: what comes back is the word of
//! whoever has the address, and attestations say so.

use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use anyhow::{Context as _, ensure};
use axum::body::{Body, to_bytes};
use axum::http::{Request, StatusCode, header};
use hyper_util::rt::TokioIo;
use tokio::net::TcpStream;

use crate::api::names;
use crate::instance::status::Status;

/// The longest that an answer may take. A pass waits for it.
const PATIENCE: Duration = Duration::from_secs(1);
/// The largest answer. A status is a few hundred bytes per instance.
const LARGEST: usize = 64 << 10;

/// Asks the instance at this address.
///
/// # Errors
/// If it doesn't answer in time, or with something else than its status.
pub async fn ask(address: IpAddr) -> anyhow::Result<Status> {
    let to = SocketAddr::new(address, names::HTTP_PORT);
    tokio::time::timeout(PATIENCE, get(to))
        .await
        .context("no answer in time")?
}

async fn get(to: SocketAddr) -> anyhow::Result<Status> {
    let stream = TcpStream::connect(to).await?;
    let (mut sender, connection) =
        hyper::client::conn::http1::handshake::<_, Body>(TokioIo::new(stream)).await?;
    let request = Request::get("/status")
        .header(header::HOST, to.to_string())
        .body(Body::empty())?;
    let exchange = async {
        let response = sender.send_request(request).await?;
        ensure!(
            response.status() == StatusCode::OK,
            "answered {}",
            response.status()
        );
        let body = to_bytes(Body::new(response.into_body()), LARGEST).await?;
        Ok(serde_json::from_slice(&body)?)
    };
    tokio::pin!(exchange);
    tokio::select! {
        done = &mut exchange => done,
        // It ends first when the other side closes at once: what came is still there to be read.
        _ = connection => exchange.await,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use axum::Router;
    use axum::routing::get as route;

    async fn serve(app: Router) -> SocketAddr {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        tokio::spawn(async move { axum::serve(listener, app).await });
        address
    }

    #[tokio::test]
    async fn a_status_is_read_and_anything_else_is_an_error() {
        let status = Status {
            instance: "s-1".into(),
            ..Status::default()
        };
        let said = status.clone();
        let app = Router::new().route(
            "/status",
            route(move || async move { axum::Json(said.clone()) }),
        );
        assert_eq!(get(serve(app).await).await.unwrap(), status);
        let app = Router::new().route("/status", route(|| async { "{}x".repeat(LARGEST) }));
        assert!(get(serve(app).await).await.is_err());
        assert!(get(serve(Router::new()).await).await.is_err());
    }
}
