//! The connection to one peer: dialled, kept, made anew.
//!
//! Owns what is a sign of death, and the pauses between dials. Never: takes silence for death, or a sign for it
//! without one more dial.

use std::io;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use futures::StreamExt as _;
use futures::stream::FuturesUnordered;
use rand::Rng as _;
use rustls::pki_types::ServerName;
use tokio::io::AsyncWriteExt as _;
use tokio::net::TcpStream;
use tokio::time::{Instant, sleep, sleep_until, timeout, timeout_at};
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;
use tokio_util::sync::CancellationToken;
use tracing::{debug, info};

use super::frames::{Hello, Reader};
use super::identity::Identity;
use super::{Peer, PeerEvent, Shared, socket_for, tune};

/// How long the dial that confirms a sign may take, unless the peer is known to be farther away.
const CONFIRM: Duration = Duration::from_millis(150);
/// Between two reports of the same outage.
const AGAIN: Duration = Duration::from_secs(1);
/// A connection that lasted this long counts as one: after a shorter one, the next waits a little.
const STEADY: Duration = Duration::from_secs(1);
/// Longest pause between dials.
const PAUSE: Duration = Duration::from_millis(500);
/// Longest pause between attempts to replace a connection that works.
const RENEWAL_PAUSE: Duration = Duration::from_secs(30);

const CLOSED: &str = "it closed the connection";

struct Connection {
    stream: TlsStream<TcpStream>,
    reader: Reader,
    address: SocketAddr,
    /// What it took to make it.
    took: Duration,
    made_for: Generations,
}

/// Of the certificate and of the best address.
type Generations = (u64, u64);

#[derive(Debug)]
enum Failure {
    Refused(String),
    /// Of any other kind: an answer may come later.
    Silent(String),
}

impl Failure {
    fn words(&self) -> &str {
        match self {
            Self::Refused(why) | Self::Silent(why) => why,
        }
    }
}

/// How a connection ended.
enum End {
    /// By the peer.
    Sign(String),
    Silent(String),
}

/// Doubles from 50 ms.
struct Backoff {
    next: Duration,
    longest: Duration,
}

impl Backoff {
    fn new(longest: Duration) -> Self {
        let next = Duration::from_millis(50);
        Self { next, longest }
    }

    fn pause(&mut self) -> Duration {
        let pause = self.next;
        self.next = (pause * 2).min(self.longest);
        // Several that lost the same peer must not dial it in step.
        pause.mul_f64(rand::rng().random_range(0.75..1.25))
    }
}

/// Keeps a connection to the peer for as long as it's let.
pub(super) async fn run(shared: Arc<Shared>, peer: Arc<Peer>) {
    let mut outgoing = Outgoing {
        shared,
        peer,
        up: false,
        down: None,
        took: Duration::ZERO,
    };
    Box::pin(outgoing.run()).await;
}

struct Outgoing {
    shared: Arc<Shared>,
    peer: Arc<Peer>,
    /// Whether it was said to be up, and nothing else since.
    up: bool,
    /// When it was last said to be down in this outage.
    down: Option<Instant>,
    /// What the last connection took to be made.
    took: Duration,
}

impl Outgoing {
    async fn run(&mut self) {
        let mut backoff = Backoff::new(PAUSE);
        // Once per outage, at a level that is seen.
        let mut said = false;
        loop {
            self.ready().await;
            let bound = self.shared.dial();
            let failure = match self.dial(bound).await {
                Ok(connection) => {
                    said = false;
                    self.keep(connection, &mut backoff).await;
                    None
                }
                Err(Failure::Refused(why)) if self.down.is_none_or(|at| at.elapsed() >= AGAIN) => {
                    match self.confirm().await {
                        Ok(connection) => {
                            said = false;
                            self.keep(connection, &mut backoff).await;
                            None
                        }
                        Err(_) => {
                            self.report_down(why).await;
                            None
                        }
                    }
                }
                Err(failure) => Some(failure),
            };
            if let Some(failure) = failure {
                let (peer, why) = (&self.peer.name, failure.words());
                if said {
                    debug!(peer, "can't be reached: {why}");
                } else {
                    info!(peer, "can't be reached: {why}");
                }
                said = true;
            }
            tokio::select! {
                () = sleep(backoff.pause()) => {}
                () = self.peer.moved.notified() => {}
            }
        }
    }

    /// Waits until there is something to dial and something to dial with.
    async fn ready(&self) {
        let mut identity = self.shared.identity.clone();
        if identity.wait_for(Option::is_some).await.is_err() {
            std::future::pending::<()>().await;
        }
        while self.peer.addresses().list().is_empty() {
            self.peer.moved.notified().await;
        }
    }

    /// Keeps a connection, and its successors, until the peer is down or silent.
    async fn keep(&mut self, mut connection: Connection, backoff: &mut Backoff) {
        self.down = None;
        if !self.up {
            info!(peer = self.peer.name, address = %connection.address, "is connected");
            let name = self.peer.name.clone();
            self.shared.tell(PeerEvent::Up { name }).await;
            self.up = true;
        }
        loop {
            let begun = Instant::now();
            let end = self.hold(connection).await;
            let steady = begun.elapsed() >= STEADY;
            if steady {
                *backoff = Backoff::new(PAUSE);
            }
            match end {
                End::Sign(why) => {
                    if !steady {
                        // Two that drop each other's connections at once must not do so in a loop.
                        sleep(backoff.pause()).await;
                    }
                    match self.confirm().await {
                        Ok(next) => {
                            debug!(peer = self.peer.name, "is there again: {why}");
                            connection = next;
                        }
                        Err(more) => {
                            self.report_down(format!("{why}; {}", more.words())).await;
                            return;
                        }
                    }
                }
                End::Silent(why) => {
                    info!(peer = self.peer.name, "lost the connection: {why}");
                    self.up = false;
                    return;
                }
            }
        }
    }

    async fn report_down(&mut self, why: String) {
        if self.down.is_none() {
            info!(peer = self.peer.name, "is gone: {why}");
        }
        self.up = false;
        self.down = Some(Instant::now());
        let name = self.peer.name.clone();
        self.shared.tell(PeerEvent::Down { name, why }).await;
    }

    /// One more dial after a sign.
    async fn confirm(&mut self) -> Result<Connection, Failure> {
        let bound = CONFIRM.max(self.took * 2).min(self.shared.dial());
        self.dial(bound).await
    }

    async fn dial(&mut self, bound: Duration) -> Result<Connection, Failure> {
        let made = dial(self.shared.clone(), self.peer.clone(), bound).await?;
        self.took = made.took;
        Ok(made)
    }

    /// Sends and listens until the connection ends; replaces it when the certificate or the best address changed,
    /// or the peer asks for it.
    async fn hold(&mut self, mut connection: Connection) -> End {
        let (shared, peer) = (self.shared.clone(), self.peer.clone());
        let mut identity = shared.identity.clone();
        let mut backoff = Backoff::new(RENEWAL_PAUSE);
        let mut asked = false;
        let mut not_before = Instant::now();
        let mut renewal: Option<Renewal> = None;
        loop {
            let _ = identity.borrow_and_update();
            let outdated = asked || connection.made_for != generations(&shared, &peer);
            let due = outdated && renewal.is_none();
            if due && Instant::now() >= not_before {
                let bound = shared.dial();
                renewal = Some(Box::pin(dial(shared.clone(), peer.clone(), bound)));
            }
            let Connection { stream, reader, .. } = &mut connection;
            tokio::select! {
                frame = reader.next(stream) => match frame {
                    Ok(Some(_)) => asked = true,
                    Ok(None) => return End::Sign(CLOSED.to_owned()),
                    Err(e) => return end(&e),
                },
                () = peer.outbox.filled() => {
                    if let Some(end) = write(&shared, &peer, stream).await {
                        return end;
                    }
                }
                made = made(&mut renewal) => {
                    renewal = None;
                    match made {
                        Ok(next) => {
                            // What was sent on it arrives all the same.
                            let _ = timeout(Duration::from_millis(100), stream.shutdown()).await;
                            self.took = next.took;
                            debug!(peer = peer.name, address = %next.address, "has a new connection");
                            connection = next;
                            asked = false;
                            // A peer that asks again and again gets no more than this.
                            not_before = Instant::now() + STEADY;
                            backoff = Backoff::new(RENEWAL_PAUSE);
                        }
                        Err(failure) => {
                            debug!(peer = peer.name, "keeps the old connection: {}", failure.words());
                            not_before = Instant::now() + backoff.pause();
                        }
                    }
                }
                () = sleep_until(not_before), if due && renewal.is_none() => {}
                _ = identity.changed() => {}
                () = peer.moved.notified() => {}
            }
        }
    }
}

type Renewal = Pin<Box<dyn Future<Output = Result<Connection, Failure>> + Send>>;

async fn made(renewal: &mut Option<Renewal>) -> Result<Connection, Failure> {
    match renewal {
        Some(renewal) => renewal.await,
        None => std::future::pending().await,
    }
}

/// Writes what is fresh. Says how the connection ended, if it did.
async fn write(shared: &Shared, peer: &Peer, stream: &mut TlsStream<TcpStream>) -> Option<End> {
    while let Some(frame) = peer.outbox.take() {
        let write = async {
            stream.write_all(&frame).await?;
            stream.flush().await
        };
        match timeout(shared.detection(), write).await {
            Ok(Ok(())) => {}
            Ok(Err(e)) => return Some(end(&e)),
            Err(_) => return Some(End::Silent("it doesn't read".to_owned())),
        }
    }
    None
}

fn end(e: &io::Error) -> End {
    use io::ErrorKind as Kind;
    match e.kind() {
        // Without TLS's own goodbye, as a process that is killed does.
        Kind::UnexpectedEof => End::Sign(CLOSED.to_owned()),
        Kind::ConnectionReset
        | Kind::ConnectionAborted
        | Kind::ConnectionRefused
        | Kind::BrokenPipe
        | Kind::WriteZero => End::Sign(format!("its connection ended: {e}")),
        // The kernel gave up waiting, or a router did for it; or it was refused by name.
        _ => End::Silent(e.to_string()),
    }
}

fn generations(shared: &Shared, peer: &Peer) -> Generations {
    let identity = shared.identity.borrow().as_ref().map(|i| i.generation);
    (identity.unwrap_or(0), peer.addresses().generation)
}

/// Dials all addresses of a peer; the first that stands wins. Where it was seen last has a head start: at another
/// address there may still be its predecessor.
async fn dial(
    shared: Arc<Shared>,
    peer: Arc<Peer>,
    bound: Duration,
) -> Result<Connection, Failure> {
    let made_for = generations(&shared, &peer);
    let Some(identity) = shared.identity.borrow().clone() else {
        return Err(Failure::Silent("there is no certificate yet".to_owned()));
    };
    let (addresses, authenticated) = {
        let addresses = peer.addresses();
        (addresses.list(), !addresses.learned.is_empty())
    };
    let (shared, name) = (&shared, &peer.name);
    let head_start = if authenticated {
        bound / 2
    } else {
        Duration::ZERO
    };
    let best_failed = &CancellationToken::new();
    let deadline = Instant::now() + bound;
    let mut dials: FuturesUnordered<_> = addresses
        .into_iter()
        .zip(0u32..)
        .map(|(address, nth)| {
            let identity = identity.clone();
            async move {
                if nth > 0 {
                    let _ = timeout(head_start, best_failed.cancelled()).await;
                }
                let dial = Box::pin(dial_one(shared, &identity, name, address, made_for));
                let made = match timeout_at(deadline, dial).await {
                    Ok(made) => made,
                    Err(_) => Err(Failure::Silent("no answer".to_owned())),
                };
                if nth == 0 {
                    best_failed.cancel();
                }
                (nth, address, made)
            }
        })
        .collect();
    let mut verdict = None;
    while let Some((nth, address, made)) = dials.next().await {
        let failure = match made {
            Ok(made) => {
                // Known to be good; no reason to make a connection anew.
                peer.addresses().prefer(address);
                return Ok(made);
            }
            Err(Failure::Refused(why)) => Failure::Refused(format!("{address}: {why}")),
            Err(Failure::Silent(why)) => Failure::Silent(format!("{address}: {why}")),
        };
        // Where it was seen last counts. If it never was, one place that doesn't answer may be the right one.
        let counts = match &verdict {
            None => true,
            Some(_) if authenticated => nth == 0,
            Some(_) => matches!(failure, Failure::Silent(_)),
        };
        if counts {
            verdict = Some(failure);
        }
    }
    Err(verdict.unwrap_or_else(|| Failure::Silent("no address is known".to_owned())))
}

async fn dial_one(
    shared: &Shared,
    identity: &Identity,
    name: &str,
    address: SocketAddr,
    made_for: Generations,
) -> Result<Connection, Failure> {
    let begun = Instant::now();
    let silent = |e: io::Error| Failure::Silent(e.to_string());
    let socket = socket_for(address).map_err(silent)?;
    tune(&socket, shared.detection()).map_err(silent)?;
    let stream = match socket.connect(address).await {
        Ok(stream) => stream,
        Err(e) if e.kind() == io::ErrorKind::ConnectionRefused => {
            return Err(Failure::Refused(e.to_string()));
        }
        Err(e) => return Err(silent(e)),
    };
    let server = ServerName::try_from(name.to_owned())
        .map_err(|_| Failure::Silent(format!("{name:?} is no name")))?;
    let mut stream = TlsConnector::from(identity.client.clone())
        .connect(server, stream)
        .await
        .map_err(silent)?;
    let own = Hello {
        address: shared.advertise,
    };
    stream
        .write_all(&own.frame().map_err(silent)?)
        .await
        .map_err(silent)?;
    stream.flush().await.map_err(silent)?;
    // In TLS 1.3 the client is done before the server has looked at its certificate: only an answer says that it
    // was accepted.
    let mut reader = Reader::default();
    match reader.next(&mut stream).await.map_err(silent)? {
        Some(body) => Hello::parse(&body).map_err(silent)?,
        None => return Err(Failure::Silent(CLOSED.to_owned())),
    };
    Ok(Connection {
        stream,
        reader,
        address,
        took: begun.elapsed(),
        made_for,
    })
}
