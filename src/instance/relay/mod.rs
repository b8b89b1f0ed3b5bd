//! The way from a standby's receiver to an upstream that is far away.
//!
//! Owns the sessions that are kept ready with instances in other regions, and the socket by which PostgreSQL's receiver
//! comes to one of them. Never: is on the way to an upstream nearby; keeps a way open that was cut ([`Relay::close`]);
//! sends, or acknowledges, anything by itself.
//!
//! # Why
//! A new primary can't acknowledge a commit before a standby streams from it. Between regions that is what a failover takes
//! most of its time for: a receiver that is told of its upstream needs ten ways there and back (TCP, TLS, a greeting, five
//! questions, one after the other), and receives the log from its file's beginning on, over a connection that the network
//! doesn't trust yet (RFC 5681, slow start), twice: once for the timeline that ended. At 80 ms there and back that is 1.3 s.
//!
//! So each instance keeps a replication session with every voter that is far away, and hands its receiver to that one
//! when it is told to follow it. What the receiver is going to ask is asked for it at once; and what it wants to be sent
//! though the copy has it already is read from the copy's own files. Then it is one way there and back.
//!
//! # Why it is safe
//! Only the receiver acknowledges, what it has on disk, as ever; a relay may lose an acknowledgement, which its end does
//! too, but makes none. A cut closes the way and ends the receiver, as a process. The first is what keeps one out that begins
//! late, by a `primary_conninfo` that was read before the cut, as the missing key does on the direct way. What comes from the
//! copy's own files is what the upstream begins with: its history says that its timeline goes on from this copy's at
//! exactly the place where this copy ends, and the protocol's eras, which unlike timelines have no two of the same name, say
//! the same.
//!
//! # Why only there
//! Nearby it gains a few milliseconds, and costs every commit two hops more ([`super::receiver`]). Far away those are
//! nothing beside the way itself.

mod passage;
mod session;
mod wire;

use std::collections::{BTreeMap, VecDeque};
use std::net::{IpAddr, SocketAddr};
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use anyhow::Context as _;
use futures::future::join_all;
use rustls::ClientConfig;
use tokio::net::{TcpStream, UnixListener};
use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio::time::timeout;
use tokio_util::task::AbortOnDropHandle;
use tracing::{debug, info, warn};

use super::agent::wal;
use super::conninfo::Upstream;
use super::peers;
use super::tls::{self, Certificate};
pub use passage::Level;
use passage::Way;
use session::Session;

/// Between two looks at who is far away and whether the sessions stand.
const EVERY: Duration = Duration::from_secs(5);
/// How many looks say how far away somebody is: the nearest counts, since a busy machine only makes it seem farther.
const LOOKS: usize = 3;
/// How long a connection may take to be made.
const LIMIT: Duration = Duration::from_secs(LIMIT_SECONDS as u64);
const LIMIT_SECONDS: u32 = 3;

/// What there is to know.
pub struct RelayConfig {
    /// This voter, as an upstream's synchronous rule names it.
    pub me: String,
    /// Where sockets are.
    pub run: PathBuf,
    /// PGDATA.
    pub data: PathBuf,
    /// PostgreSQL's port.
    pub port: u16,
    /// The port at which managers listen, which answers without PostgreSQL's having to begin a process.
    pub peers: u16,
    /// How long a way there and back takes, at least, for which this is worth while.
    pub beyond: Duration,
}

/// The sessions that are kept ready, and the way of the receiver that uses one. Dropping it closes all.
pub struct Relay {
    shared: Arc<Shared>,
    _keeper: AbortOnDropHandle<()>,
}

struct Shared {
    config: RelayConfig,
    certificate: watch::Receiver<Option<Certificate>>,
    /// Whom to be ready for, and where they are.
    wanted: watch::Sender<BTreeMap<String, IpAddr>>,
    ready: Mutex<BTreeMap<String, Session>>,
    way: Mutex<Option<Open>>,
    /// Seconds of silence after which a connection counts as dead, as on the direct way.
    silence: AtomicU32,
}

/// A way that is open.
struct Open {
    upstream: String,
    way: Arc<Way>,
    serves: watch::Sender<Option<u32>>,
    _task: AbortOnDropHandle<()>,
}

impl Drop for Open {
    fn drop(&mut self) {
        // A task that is told to end goes on to its next pause.
        self.way.closed.store(true, Ordering::SeqCst);
    }
}

impl Drop for Relay {
    fn drop(&mut self) {
        // The way's task holds what the way is in.
        self.close();
        lock(&self.shared.ready).clear();
    }
}

impl Relay {
    /// Begins to be ready for those whom [`Relay::attend`] names, once there is a certificate.
    #[must_use]
    pub fn start(config: RelayConfig, certificate: watch::Receiver<Option<Certificate>>) -> Self {
        let shared = Arc::new(Shared {
            config,
            certificate,
            wanted: watch::Sender::default(),
            ready: Mutex::default(),
            way: Mutex::default(),
            silence: AtomicU32::new(LIMIT_SECONDS),
        });
        let keeper = tokio::spawn(keep(shared.clone()));
        Self {
            shared,
            _keeper: AbortOnDropHandle::new(keeper),
        }
    }

    /// Whom this instance may have to follow next, and where each is; and after how many seconds of silence a connection
    /// counts as dead.
    pub fn attend(&self, wanted: BTreeMap<String, IpAddr>, silence: u32) {
        self.shared.silence.store(silence, Ordering::Relaxed);
        self.shared.wanted.send_if_modified(|now| {
            let differs = *now != wanted;
            *now = wanted;
            differs
        });
    }

    /// Opens the way to `upstream`, if a session with it is ready: the folder that a receiver is to take for its host. Any
    /// other way is closed. `level`: where the copy ends, which is a beginning of the upstream's.
    pub fn open(&self, upstream: &Upstream, slot: &str, level: Option<Level>) -> Option<PathBuf> {
        self.close();
        let session = self.shared.take(upstream)?;
        match self.listen(upstream, slot, level, session) {
            Ok(folder) => Some(folder),
            Err(e) => {
                warn!("can't open the way to {}: {e:#}", upstream.name);
                None
            }
        }
    }

    fn listen(
        &self,
        upstream: &Upstream,
        slot: &str,
        level: Option<Level>,
        session: Session,
    ) -> anyhow::Result<PathBuf> {
        let config = &self.shared.config;
        // PostgreSQL says whom it streams from by the host it was given, and that is the folder.
        let folder = config.run.join("relay").join(&upstream.name);
        tls::make_private(&folder)?;
        let path = folder.join(format!(".s.PGSQL.{}", upstream.port));
        let _ = std::fs::remove_file(&path);
        let listener = UnixListener::bind(&path)
            .with_context(|| format!("can't listen at {}", path.display()))?;
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o600))?;
        let (serves, serving) = watch::channel(None);
        let way = Arc::new(Way {
            level,
            spent: AtomicBool::new(false),
            closed: AtomicBool::new(false),
            slot: slot.to_owned(),
            serves: serving,
        });
        info!(
            upstream = upstream.name,
            end = level.map(|l| wal::show_lsn(l.at)),
            begins = level.map(|l| l.begins),
            "goes by a session that was ready"
        );
        let task = tokio::spawn(accept(
            self.shared.clone(),
            listener,
            upstream.clone(),
            way.clone(),
            session,
        ));
        *lock(&self.shared.way) = Some(Open {
            upstream: upstream.name.clone(),
            way,
            serves,
            _task: AbortOnDropHandle::new(task),
        });
        Ok(folder)
    }

    /// With whom a session is ready.
    #[must_use]
    pub fn ready(&self) -> Vec<String> {
        lock(&self.shared.ready).keys().cloned().collect()
    }

    /// `upstream` serves, on this timeline.
    pub fn serves(&self, upstream: &str, timeline: u32) {
        if let Some(way) = &*lock(&self.shared.way)
            && way.upstream == upstream
        {
            way.serves.send_if_modified(|now| {
                let differs = *now != Some(timeline);
                *now = Some(timeline);
                differs
            });
        }
    }

    /// No receiver gets anywhere any more, until another way is opened.
    pub fn close(&self) {
        *lock(&self.shared.way) = None;
    }
}

fn lock<T>(of: &Mutex<T>) -> MutexGuard<'_, T> {
    of.lock().unwrap_or_else(PoisonError::into_inner)
}

fn standing(mut session: Session) -> Option<Session> {
    (!session.ended()).then_some(session)
}

impl Shared {
    /// The session with this instance, if it stands. At another address may be another volume under the same name.
    fn take(&self, upstream: &Upstream) -> Option<Session> {
        let session = lock(&self.ready).remove(&upstream.name)?;
        standing(session).filter(|session| session.address == upstream.address)
    }

    /// Forgets a session that has ended, or is with somebody who was there before. True: one stands.
    fn holds(&self, upstream: &Upstream) -> bool {
        let mut ready = lock(&self.ready);
        let stands = ready
            .get_mut(&upstream.name)
            .map(|session| session.address == upstream.address && !session.ended());
        if stands == Some(false) {
            ready.remove(&upstream.name);
        }
        stands == Some(true)
    }

    async fn connect(&self, upstream: &Upstream) -> anyhow::Result<Session> {
        let certificate = self.certificate.borrow().clone();
        let certificate = certificate.context("there is no certificate yet")?;
        let tls: ClientConfig = peers::client_of(&certificate)?;
        let silence = Duration::from_secs(self.silence.load(Ordering::Relaxed).into());
        let open = Session::open(upstream, &self.config.me, Arc::new(tls), silence);
        timeout(LIMIT, Box::pin(open)).await.context("no answer")?
    }

    /// Sees to it that a session with this instance stands, if it is far away.
    async fn tend(&self, upstream: Upstream, looks: &mut VecDeque<Duration>) {
        let stands = self.holds(&upstream);
        let begun = Instant::now();
        let at = SocketAddr::new(upstream.address, self.config.peers);
        match timeout(LIMIT, TcpStream::connect(at)).await {
            Ok(Ok(_)) => looks.push_back(begun.elapsed()),
            // Nobody there has a session, either.
            _ => return,
        }
        while looks.len() > LOOKS {
            looks.pop_front();
        }
        let far = looks.len() == LOOKS && looks.iter().all(|took| *took >= self.config.beyond);
        let name = upstream.name.clone();
        if !far {
            lock(&self.ready).remove(&name);
        }
        if stands || !far {
            return;
        }
        match self.connect(&upstream).await {
            Ok(session) => {
                debug!(upstream = name, "a session is ready");
                lock(&self.ready).insert(name, session);
            }
            Err(e) => debug!(upstream = name, "no session can be made ready: {e:#}"),
        }
    }
}

async fn keep(shared: Arc<Shared>) {
    let mut wanted = shared.wanted.subscribe();
    let mut certificate = shared.certificate.clone();
    let mut looks: BTreeMap<String, VecDeque<Duration>> = BTreeMap::new();
    loop {
        let all = wanted.borrow_and_update().clone();
        looks.retain(|name, _| all.contains_key(name));
        if certificate.has_changed().unwrap_or(false) {
            // Nobody is let in for ever by what was good once.
            certificate.mark_unchanged();
            lock(&shared.ready).clear();
        }
        lock(&shared.ready).retain(|name, _| all.contains_key(name));
        for name in all.keys() {
            looks.entry(name.clone()).or_default();
        }
        let tended = looks.iter_mut().filter_map(|(name, looks)| {
            let upstream = Upstream {
                name: name.clone(),
                address: *all.get(name)?,
                port: shared.config.port,
            };
            Some(shared.tend(upstream, looks))
        });
        join_all(tended).await;
        let _ = timeout(EVERY, wanted.changed()).await;
    }
}

/// Brings the receivers that come, one at a time, to the upstream.
async fn accept(
    shared: Arc<Shared>,
    listener: UnixListener,
    upstream: Upstream,
    way: Arc<Way>,
    session: Session,
) {
    let mut ready = Some(session);
    let mut served = JoinSet::new();
    loop {
        let receiver = match listener.accept().await {
            Ok((receiver, _)) => receiver,
            Err(e) => {
                warn!("can't accept a receiver: {e}");
                tokio::time::sleep(Duration::from_millis(100)).await;
                continue;
            }
        };
        if way.closed.load(Ordering::SeqCst) {
            return;
        }
        // PostgreSQL has one receiver: the one before has ended, or is about to.
        served.shutdown().await;
        let session = match ready.take().and_then(standing) {
            Some(session) => Ok(session),
            None => shared.connect(&upstream).await,
        };
        match session {
            Ok(session) => {
                let (shared, way, name) = (shared.clone(), way.clone(), upstream.name.clone());
                served.spawn(async move {
                    let data = &shared.config.data;
                    if let Err(e) = passage::serve(receiver, session, &way, data).await {
                        info!(upstream = name, "a receiver's way ends: {e:#}");
                    }
                });
            }
            // Its PostgreSQL asks for another one.
            Err(e) => info!(upstream = upstream.name, "no way for a receiver: {e:#}"),
        }
    }
}

/// The upstream's name, if this is the host of a way to one.
#[must_use]
pub fn upstream_of(host: &str) -> Option<&str> {
    let path = Path::new(host);
    let parent = path.parent()?.file_name()?;
    (path.is_absolute() && parent == "relay").then(|| path.file_name()?.to_str())?
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_folder_names_its_upstream() {
        assert_eq!(upstream_of("/run/domicile/relay/s-1"), Some("s-1"));
        for other in ["s-1", "relay/s-1", "/run/domicile", "/", ""] {
            assert_eq!(upstream_of(other), None, "{other}");
        }
    }
}
