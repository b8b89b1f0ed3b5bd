//! Connections that peers have dialled: accepted, verified, read.
//!
//! Owns their number and their bounds. Never: reads a message before it knows whose it is.

use std::collections::VecDeque;
use std::io;
use std::sync::Arc;
use std::time::Duration;

use rand::Rng as _;
use tokio::io::AsyncWriteExt as _;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;
use tokio::task::{AbortHandle, JoinSet};
use tokio::time::{Instant, sleep_until, timeout};
use tokio_rustls::TlsAcceptor;
use tokio_rustls::server::TlsStream;
use tracing::{debug, warn};

use super::frames::{Hello, RENEW, Reader};
use super::identity::{Identity, name_of_client};
use super::{PeerEvent, Shared, tune};

/// Connections at a time.
const CONNECTIONS: usize = 64;
/// Of one peer: the one in use, and its successor.
const OF_ONE: usize = 2;
/// Strangers at a time.
const HANDSHAKES: usize = 8;
/// How long a stranger has to become a peer.
const HANDSHAKE: Duration = Duration::from_secs(2);
/// After a new certificate, how long those who were accepted under the old one may stay. The kubelets bring new
/// Secrets to the other pods within less; after a change of the authority, old connections are all there is.
const GRACE: Duration = Duration::from_secs(120);
/// Between two lines about refused strangers.
const LINE: Duration = Duration::from_secs(10);

struct Incoming {
    name: String,
    stream: TlsStream<TcpStream>,
    reader: Reader,
    /// Has seen the identity that this was accepted under.
    identity: watch::Receiver<Option<Arc<Identity>>>,
}

/// Accepts for as long as it's let.
pub(super) async fn run(shared: Arc<Shared>, listener: TcpListener) {
    let mut identity = shared.identity.clone();
    if identity.wait_for(Option::is_some).await.is_err() {
        return;
    }
    let mut handshakes: JoinSet<Result<Option<Incoming>, String>> = JoinSet::new();
    let mut strangers: VecDeque<AbortHandle> = VecDeque::new();
    let mut readers = JoinSet::new();
    let mut open: VecDeque<(String, AbortHandle)> = VecDeque::new();
    let mut refused = Refused::default();
    loop {
        tokio::select! {
            accepted = listener.accept() => match accepted {
                Ok((stream, _)) => {
                    strangers.retain(|s| !s.is_finished());
                    // The oldest goes: a peer needs milliseconds, so whoever holds a place for long is none.
                    if strangers.len() >= HANDSHAKES && let Some(oldest) = strangers.pop_front() {
                        oldest.abort();
                    }
                    strangers.push_back(handshakes.spawn(meet(shared.clone(), stream)));
                }
                Err(e) => {
                    // Out of file descriptors, mostly: at once would be again.
                    warn!("can't accept a connection of a peer: {e}");
                    tokio::time::sleep(Duration::from_millis(100)).await;
                }
            },
            Some(met) = handshakes.join_next(), if !handshakes.is_empty() => match met {
                Ok(Ok(None)) => {}
                Ok(Ok(Some(incoming))) => {
                    open.retain(|(_, task)| !task.is_finished());
                    let same = open.iter().filter(|(name, _)| *name == incoming.name).count();
                    if same >= OF_ONE
                        && let Some(at) = open.iter().position(|(name, _)| *name == incoming.name)
                        && let Some((_, oldest)) = open.remove(at)
                    {
                        oldest.abort();
                    }
                    if open.len() < CONNECTIONS {
                        let name = incoming.name.clone();
                        open.push_back((name, readers.spawn(read(shared.clone(), incoming))));
                    }
                }
                Ok(Err(why)) => refused.note(&why),
                // Took the place of none.
                Err(_) => {}
            },
            Some(_) = readers.join_next(), if !readers.is_empty() => {}
        }
    }
}

/// Says that strangers were refused, not more often than is useful.
#[derive(Default)]
struct Refused {
    last: Option<Instant>,
    more: u32,
}

impl Refused {
    fn note(&mut self, why: &str) {
        if self.last.is_some_and(|last| last.elapsed() < LINE) {
            self.more = self.more.saturating_add(1);
            return;
        }
        warn!(
            before = self.more,
            "refused a connection to the instances' port: {why}"
        );
        self.last = Some(Instant::now());
        self.more = 0;
    }
}

async fn meet(shared: Arc<Shared>, stream: TcpStream) -> Result<Option<Incoming>, String> {
    let from = stream
        .peer_addr()
        .map(|a| a.to_string())
        .unwrap_or_default();
    let met = timeout(HANDSHAKE, Box::pin(shake(&shared, stream))).await;
    met.unwrap_or_else(|_| Err("no handshake in time".to_owned()))
        .map_err(|why| format!("{from}: {why}"))
}

async fn shake(shared: &Arc<Shared>, stream: TcpStream) -> Result<Option<Incoming>, String> {
    let words = |e: io::Error| e.to_string();
    tune(&stream, shared.detection()).map_err(words)?;
    let mut identity = shared.identity.clone();
    let server = match &*identity.borrow_and_update() {
        Some(identity) => identity.server.clone(),
        None => return Err("no certificate yet".to_owned()),
    };
    // Whoever only wants to know how far away this is says nothing, and is no stranger.
    if matches!(stream.peek(&mut [0]).await, Ok(0)) {
        return Ok(None);
    }
    let mut stream = TlsAcceptor::from(server)
        .accept(stream)
        .await
        .map_err(words)?;
    let name = name_of_client(
        &shared.store,
        &shared.me,
        stream.get_ref().1.peer_certificates(),
    )?;
    let mut reader = Reader::default();
    let first = reader.next(&mut stream).await.map_err(words)?;
    let hello = Hello::parse(&first.ok_or("it said nothing")?).map_err(words)?;
    let own = Hello {
        address: shared.advertise,
    };
    stream
        .write_all(&own.frame().map_err(words)?)
        .await
        .map_err(words)?;
    stream.flush().await.map_err(words)?;
    shared.learn(&name, hello.address);
    Ok(Some(Incoming {
        name,
        stream,
        reader,
        identity,
    }))
}

async fn read(shared: Arc<Shared>, incoming: Incoming) {
    let Incoming {
        name,
        mut stream,
        mut reader,
        mut identity,
    } = incoming;
    let mut leave: Option<Instant> = None;
    loop {
        tokio::select! {
            frame = reader.next(&mut stream) => match frame {
                Ok(Some(body)) => {
                    let event = PeerEvent::Message { from: name.clone(), body };
                    if !shared.tell(event).await {
                        return;
                    }
                }
                Ok(None) => return,
                Err(e) => {
                    debug!(peer = name, "its connection ended: {e}");
                    return;
                }
            },
            changed = identity.changed(), if leave.is_none() => {
                let spread = rand::rng().random_range(0..10_000);
                leave = Some(Instant::now() + GRACE + Duration::from_millis(spread));
                if changed.is_ok() {
                    let ask = async {
                        stream.write_all(&RENEW).await?;
                        stream.flush().await
                    };
                    if !matches!(timeout(Duration::from_secs(1), ask).await, Ok(Ok(()))) {
                        return;
                    }
                }
            }
            () = until(leave) => return,
        }
    }
}

async fn until(instant: Option<Instant>) {
    match instant {
        Some(instant) => sleep_until(instant).await,
        None => std::future::pending().await,
    }
}
