//! Connections: TLS, their bounds, their end.
//!
//! Owns everything below HTTP's meaning. A connection is bounded in all it does: handshake, headers, age. Since clients
//! keep connections, and a replica that has just come would get none of them, an answer on an old connection says that
//! it is the last: it is the client that closes, so no request is lost in between.
//! Never: cuts a request that is being answered, while it drains; reads on for the sake of a body that was refused,
//! but for the moment that it takes the answer to arrive.

use std::convert::Infallible;
use std::future::poll_fn;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use axum::body::Body;
use axum::http::{HeaderValue, Request, Response, header};
use futures::FutureExt as _;
use hyper::body::Incoming;
use hyper::service::Service as _;
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::service::TowerToHyperService;
use rand::Rng as _;
use rustls::ServerConfig;
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{Semaphore, watch};
use tokio::task::JoinSet;
use tokio::time::{Instant, timeout};
use tokio_rustls::TlsAcceptor;
use tracing::{debug, warn};

use super::auth::{Certificate, Peer};
use super::metrics::Metrics;

/// A handshake.
const HANDSHAKE: Duration = Duration::from_secs(5);
/// From the end of an answer, or the handshake, to the end of the next request's headers.
const HEADERS: Duration = Duration::from_secs(20);
/// Headers in all, and their number.
const HEADER_BYTES: usize = 32 << 10;
const HEADER_COUNT: usize = 64;
/// A connection that is still there so long after its last answer should have been is stuck.
const STUCK: Duration = Duration::from_secs(60);
/// For how long, and how much, is read of a connection after its last answer. Closing at once would make the kernel
/// reset the connection if the client still sends, and the client would lose the answer that tells it why to stop.
const LINGER: Duration = Duration::from_millis(500);
const LINGER_BYTES: usize = 256 << 10;

/// Where a server stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Phase {
    /// Takes requests.
    Serving,
    /// Takes them, but each answer is its connection's last: others are asked from now on.
    Leaving,
    /// Takes no connection, and ends those that are idle.
    Closing,
}

/// Bounds of a server.
#[derive(Clone, Copy, Debug)]
pub struct Bounds {
    /// Connections at a time.
    pub connections: usize,
    /// After how long an answer is its connection's last.
    pub age: Duration,
}

/// A listener's connections.
pub struct Server {
    /// Where they come from.
    pub listener: TcpListener,
    /// How they are protected. `None`: not at all, for probes.
    pub tls: Option<watch::Receiver<Arc<ServerConfig>>>,
    /// What answers.
    pub app: Router,
    /// How many, how long.
    pub bounds: Bounds,
    /// Until when.
    pub phase: watch::Receiver<Phase>,
    /// Where they are counted; those of probes aren't.
    pub metrics: Option<Arc<Metrics>>,
}

impl Server {
    /// Serves until [`Phase::Closing`], and then until the last connection has ended.
    pub async fn run(self) {
        let Self {
            listener,
            tls,
            app,
            bounds,
            mut phase,
            metrics,
        } = self;
        let room = Arc::new(Semaphore::new(bounds.connections));
        let mut tasks = JoinSet::new();
        loop {
            // Without room nothing is accepted: the kernel holds what comes, and then refuses.
            let next = async {
                let permit = room.clone().acquire_owned().await.ok()?;
                Some((permit, listener.accept().await))
            };
            let (permit, accepted) = tokio::select! {
                next = next => match next {
                    Some(next) => next,
                    None => break,
                },
                _ = phase.wait_for(|p| *p == Phase::Closing) => break,
                // The set holds no more than the connections that are open.
                Some(_) = tasks.join_next() => continue,
            };
            let (stream, from) = match accepted {
                Ok(accepted) => accepted,
                Err(e) => {
                    // Out of file descriptors, mostly: at once would be again.
                    warn!("can't accept a connection: {e}");
                    tokio::time::sleep(Duration::from_millis(100)).await;
                    continue;
                }
            };
            let one = One {
                app: app.clone(),
                age: bounds.age,
                phase: phase.clone(),
            };
            let acceptor = tls
                .as_ref()
                .map(|tls| TlsAcceptor::from(tls.borrow().clone()));
            let up = metrics.as_ref().map(|m| m.connection());
            tasks.spawn(async move {
                let _held = (permit, up);
                one.serve(stream, from, acceptor).await;
            });
        }
        // Nobody waits in vain for an address that nobody listens at.
        drop(listener);
        while tasks.join_next().await.is_some() {}
    }
}

/// One connection.
struct One {
    app: Router,
    age: Duration,
    phase: watch::Receiver<Phase>,
}

impl One {
    async fn serve(self, stream: TcpStream, from: SocketAddr, acceptor: Option<TlsAcceptor>) {
        // Answers are small, and each is waited for.
        let _ = stream.set_nodelay(true);
        let mut peer = Peer {
            address: from.ip(),
            certificate: Certificate::None,
        };
        let Some(acceptor) = acceptor else {
            return self.speak(stream, peer).await;
        };
        match timeout(HANDSHAKE, acceptor.accept(stream)).await {
            Ok(Ok(stream)) => {
                if let Some([leaf, ..]) = stream.get_ref().1.peer_certificates() {
                    peer.certificate = Certificate::of(leaf);
                }
                self.speak(stream, peer).await;
            }
            Ok(Err(e)) => debug!("a TLS handshake failed: {e}"),
            Err(_) => debug!("a TLS handshake took too long"),
        }
    }

    async fn speak<S>(self, stream: S, peer: Peer)
    where
        S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
    {
        // Not all at once, if all came at once.
        let jitter = rand::rng().random_range(0.75..1.25);
        let last_after = Instant::now() + self.age.mul_f64(jitter);
        let (app, phase) = (TowerToHyperService::new(self.app), self.phase.clone());
        let answer = move |mut request: Request<Incoming>| {
            request.extensions_mut().insert(peer.clone());
            let (answer, phase) = (app.call(request), phase.clone());
            async move {
                let Ok(mut response) = answer.await;
                if Instant::now() >= last_after || *phase.borrow() != Phase::Serving {
                    let close = HeaderValue::from_static("close");
                    response.headers_mut().insert(header::CONNECTION, close);
                }
                Ok::<Response<Body>, Infallible>(response)
            }
            .boxed()
        };
        let mut connection = hyper::server::conn::http1::Builder::new()
            .timer(TokioTimer::new())
            .header_read_timeout(HEADERS)
            .max_headers(HEADER_COUNT)
            .max_buf_size(HEADER_BYTES)
            .serve_connection(TokioIo::new(stream), hyper::service::service_fn(answer));
        let mut phase = self.phase;
        let mut closing = false;
        let end = tokio::time::sleep_until(last_after + STUCK);
        tokio::pin!(end);
        let ended = loop {
            tokio::select! {
                ended = poll_fn(|cx| connection.poll_without_shutdown(cx)) => break ended,
                _ = phase.wait_for(|p| *p == Phase::Closing), if !closing => {
                    closing = true;
                    // What is being answered is answered.
                    std::pin::Pin::new(&mut connection).graceful_shutdown();
                }
                () = &mut end => return debug!("a connection was stuck"),
            }
        };
        if let Err(e) = ended {
            debug!("a connection failed: {}", kind_of(&e));
        }
        linger(connection.into_parts().io.into_inner()).await;
    }
}

/// What kind of error it is. Its words could quote a header.
fn kind_of(e: &hyper::Error) -> &'static str {
    if e.is_timeout() {
        "headers were too slow"
    } else if e.is_parse() {
        "it isn't HTTP"
    } else if e.is_incomplete_message() {
        "it ended in a message"
    } else {
        "it was cut"
    }
}

/// Says goodbye, and hears the other end out for a moment.
async fn linger<S: AsyncRead + AsyncWrite + Unpin>(mut stream: S) {
    let farewell = async {
        stream.shutdown().await?;
        let mut room = vec![0; 16 << 10];
        let mut read = 0;
        while read < LINGER_BYTES {
            match stream.read(&mut room).await? {
                0 => break,
                n => read += n,
            }
        }
        Ok::<(), std::io::Error>(())
    };
    // Whoever is rude is cut.
    let _ = timeout(LINGER, farewell).await;
}
