//! Messages between the instances of a store.
//!
//! Owns the connections, who is at their other end, and the signs that a peer is gone. What a message means is its
//! reader's matter.
//! Never: believes a name that isn't in a certificate of the store's own authority; waits for a peer; hands over an
//! old message as if it were new; or lets a peer that floods, or doesn't read, cost more than its own connection.
//!
//! # How
//! Each instance dials every peer that it knows an address of, and sends its messages there; it only reads from the
//! connections that are dialled to it. Both sides verify certificate chain and name (`identity`). The first frame
//! of either side is a hello (`frames`): with it a dialler knows that it was accepted, by a process that runs, and
//! the accepting side learns the address at which the dialler itself listens. So a pod that is back with another
//! address is found again without the API server.
//!
//! A new certificate, or a newer address of the peer, makes a new connection beside the old one, which is closed
//! when the new one stands. The accepting side asks its diallers for the same (an empty frame), and drops what was
//! accepted under the old certificate after a while.
//!
//! # Signs of death
//! The end of a connection by the peer (end of stream, reset, a failed write) and a refused dial are signs. Each is
//! confirmed by one more dial at once; if that brings no connection, [`PeerEvent::Down`] says so. Silence (no answer
//! to a dial, a connection that times out) is no sign: others measure that.

mod frames;
mod identity;
mod incoming;
mod outgoing;

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::io;
use std::net::SocketAddr;
use std::os::fd::AsFd;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use nix::sys::socket::{setsockopt, sockopt};
use tokio::net::TcpSocket;
use tokio::sync::{Notify, mpsc, watch};
use tokio::task::{AbortHandle, JoinHandle};

use super::{clock, tls};
use crate::api::names;
pub use frames::LIMIT;
use identity::Identity;
pub(super) use identity::client_of;

/// Peers of one instance; a store has far fewer.
const PEERS: usize = 64;
/// Frames that wait for one peer.
const OUTBOX: usize = 64;
/// A frame that waited longer is not sent: what it says may no longer be so.
const FRESH_MS: u64 = 1000;
/// Addresses tried for one peer.
const ADDRESSES: usize = 4;
/// Of these, ones that it was authenticated with or named itself.
const LEARNED: usize = 2;

/// What there is to know.
#[derive(Clone, Debug)]
pub struct PeersConfig {
    /// Name of the store.
    pub store: String,
    /// Name of this instance.
    pub me: String,
    /// Where to listen.
    pub listen: SocketAddr,
    /// Where the others reach this.
    pub advertise: SocketAddr,
    /// How long a silent peer is waited for: bounds dialling, writing, and a dead link.
    pub detection: Duration,
}

/// What happened.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum PeerEvent {
    /// A peer said something.
    Message {
        /// Who, by its certificate.
        from: String,
        /// What.
        body: Vec<u8>,
    },
    /// A peer can be reached, for the first time or again.
    Up {
        /// Who.
        name: String,
    },
    /// A peer's process is gone, seen directly. Said again, at most once a second, while dialling it is refused.
    Down {
        /// Who.
        name: String,
        /// What was seen.
        why: String,
    },
}

/// The connections of an instance. Dropping it closes all of them.
#[derive(Debug)]
pub struct Peers {
    shared: Arc<Shared>,
    tasks: Vec<JoinHandle<()>>,
}

impl Peers {
    /// Begins to listen, and to dial once [`Peers::set_peers`] has named somebody. Until there is a certificate it
    /// does neither.
    ///
    /// The events' channel is bounded: while nobody takes them, the peers' messages wait where they are, in turns.
    ///
    /// # Errors
    /// If it can't listen there.
    pub fn start(
        config: PeersConfig,
        certificate: watch::Receiver<Option<tls::Certificate>>,
        events: mpsc::Sender<PeerEvent>,
    ) -> io::Result<Self> {
        let socket = socket_for(config.listen)?;
        // A restarted manager must not wait for what its predecessor's connections leave behind.
        socket.set_reuseaddr(true)?;
        socket.bind(config.listen)?;
        let listener = socket.listen(128)?;
        let (publish, identity) = watch::channel(None);
        let shared = Arc::new(Shared {
            store: config.store,
            me: config.me,
            advertise: config.advertise,
            detection: AtomicU64::new(millis(config.detection)),
            identity,
            events,
            peers: Mutex::default(),
        });
        Ok(Self {
            tasks: vec![
                tokio::spawn(identity::follow(certificate, publish)),
                tokio::spawn(incoming::run(shared.clone(), listener)),
            ],
            shared,
        })
    }

    /// Sends something to a peer, if it can be reached within a moment. Never waits; of too many, the oldest are
    /// dropped. False if there is no such peer or the message is longer than [`LIMIT`].
    pub fn send(&self, to: &str, body: &[u8]) -> bool {
        let Some(frame) = frames::framed(body) else {
            return false;
        };
        let peers = self.shared.peers();
        let Some(entry) = peers.get(to) else {
            return false;
        };
        entry.peer.outbox.put(frame);
        true
    }

    /// Who there is, and where each is thought to be; addresses that were learned stay. Whoever was named before
    /// and isn't any more is no longer dialled.
    pub fn set_peers(&self, peers: BTreeMap<String, BTreeSet<SocketAddr>>) {
        let gone: Vec<String> = {
            let all = self.shared.peers();
            let named = |(name, entry): &(&String, &Entry)| {
                entry.peer.addresses().named && !peers.contains_key(*name)
            };
            all.iter().filter(named).map(|(n, _)| n.clone()).collect()
        };
        for name in gone {
            if let Some(entry) = self.shared.peers().remove(&name) {
                entry.task.abort();
            }
        }
        for (name, addresses) in peers {
            if let Some(peer) = self.shared.peer(&name) {
                peer.place(addresses);
            }
        }
    }

    /// Another [`PeersConfig::detection`], for the connections made from now on.
    pub fn set_detection(&self, detection: Duration) {
        let ms = millis(detection);
        self.shared.detection.store(ms, Ordering::Relaxed);
    }

    /// Closes everything, and waits until the port is free again.
    pub async fn shutdown(mut self) {
        self.abort();
        for task in std::mem::take(&mut self.tasks) {
            let _ = task.await;
        }
    }

    fn abort(&self) {
        for task in &self.tasks {
            task.abort();
        }
        for (_, entry) in std::mem::take(&mut *self.shared.peers()) {
            entry.task.abort();
        }
    }
}

impl Drop for Peers {
    fn drop(&mut self) {
        self.abort();
    }
}

#[derive(Debug)]
struct Entry {
    peer: Arc<Peer>,
    task: AbortHandle,
}

/// What all connections need.
#[derive(Debug)]
struct Shared {
    store: String,
    me: String,
    advertise: SocketAddr,
    detection: AtomicU64,
    identity: watch::Receiver<Option<Arc<Identity>>>,
    events: mpsc::Sender<PeerEvent>,
    peers: Mutex<BTreeMap<String, Entry>>,
}

impl Shared {
    fn peers(&self) -> MutexGuard<'_, BTreeMap<String, Entry>> {
        self.peers.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn detection(&self) -> Duration {
        Duration::from_millis(self.detection.load(Ordering::Relaxed))
    }

    /// How long a dial may take, handshake and hello included.
    fn dial(&self) -> Duration {
        (self.detection() / 4).max(Duration::from_millis(250))
    }

    /// The peer of this name; from now on it's dialled. `None` for a name that isn't one of the store's others.
    fn peer(self: &Arc<Self>, name: &str) -> Option<Arc<Peer>> {
        if name == self.me || names::slot(&self.store, name).is_none() {
            return None;
        }
        let mut peers = self.peers();
        if let Some(entry) = peers.get(name) {
            return Some(entry.peer.clone());
        }
        if peers.len() >= PEERS {
            return None;
        }
        let peer = Arc::new(Peer::new(name));
        let task = tokio::spawn(outgoing::run(self.clone(), peer.clone())).abort_handle();
        let entry = Entry {
            peer: peer.clone(),
            task,
        };
        peers.insert(name.to_owned(), entry);
        Some(peer)
    }

    /// An authenticated peer says where it listens.
    fn learn(self: &Arc<Self>, name: &str, address: SocketAddr) {
        if let Some(peer) = self.peer(name) {
            peer.learn(address);
        }
    }

    /// Waits for room. False if nobody takes events any more.
    async fn tell(&self, event: PeerEvent) -> bool {
        self.events.send(event).await.is_ok()
    }
}

/// One of the others.
#[derive(Debug)]
struct Peer {
    name: String,
    outbox: Outbox,
    addresses: Mutex<Addresses>,
    /// Its addresses changed.
    moved: Notify,
}

/// Where a peer may be.
#[derive(Debug, Default)]
struct Addresses {
    /// Authenticated, the latest first.
    learned: VecDeque<SocketAddr>,
    placed: BTreeSet<SocketAddr>,
    /// Whether [`Peers::set_peers`] named it.
    named: bool,
    /// Counts the changes of the best address: a connection made for an older one is made anew.
    generation: u64,
}

impl Addresses {
    /// The best first.
    fn list(&self) -> Vec<SocketAddr> {
        let placed = self.placed.iter().filter(|a| !self.learned.contains(a));
        let all = self.learned.iter().chain(placed);
        all.copied().take(ADDRESSES).collect()
    }

    /// True if that changed which is the best.
    fn prefer(&mut self, address: SocketAddr) -> bool {
        if self.learned.front() == Some(&address) {
            return false;
        }
        self.learned.retain(|a| *a != address);
        self.learned.push_front(address);
        self.learned.truncate(LEARNED);
        true
    }
}

impl Peer {
    fn new(name: &str) -> Self {
        Self {
            name: name.to_owned(),
            outbox: Outbox::default(),
            addresses: Mutex::default(),
            moved: Notify::new(),
        }
    }

    fn addresses(&self) -> MutexGuard<'_, Addresses> {
        self.addresses
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }

    fn place(&self, placed: BTreeSet<SocketAddr>) {
        let mut addresses = self.addresses();
        addresses.named = true;
        if addresses.placed != placed {
            addresses.placed = placed;
            self.moved.notify_one();
        }
    }

    fn learn(&self, address: SocketAddr) {
        // Nobody can be dialled there.
        if address.ip().is_unspecified() || address.ip().is_multicast() || address.port() == 0 {
            return;
        }
        let mut addresses = self.addresses();
        if addresses.prefer(address) {
            addresses.generation += 1;
            self.moved.notify_one();
        }
    }
}

/// Frames that wait for a connection.
#[derive(Debug, Default)]
struct Outbox {
    frames: Mutex<VecDeque<(u64, Vec<u8>)>>,
    filled: Notify,
}

impl Outbox {
    fn frames(&self) -> MutexGuard<'_, VecDeque<(u64, Vec<u8>)>> {
        self.frames.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn put(&self, frame: Vec<u8>) {
        let mut frames = self.frames();
        while frames.len() >= OUTBOX {
            frames.pop_front();
        }
        frames.push_back((clock::boottime_ms(), frame));
        self.filled.notify_one();
    }

    /// The oldest that is still fresh.
    fn take(&self) -> Option<Vec<u8>> {
        let mut frames = self.frames();
        let now = clock::boottime_ms();
        loop {
            let (put, frame) = frames.pop_front()?;
            if now.saturating_sub(put) <= FRESH_MS {
                return Some(frame);
            }
        }
    }

    /// Waits until there is one. For one waiter at a time.
    async fn filled(&self) {
        while self.frames().is_empty() {
            self.filled.notified().await;
        }
    }
}

fn millis(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}

pub(super) fn socket_for(address: SocketAddr) -> io::Result<TcpSocket> {
    match address {
        SocketAddr::V4(_) => TcpSocket::new_v4(),
        SocketAddr::V6(_) => TcpSocket::new_v6(),
    }
}

/// Makes a connection's end noticed within about `detection`, also if nothing is being sent.
pub(super) fn tune(socket: &impl AsFd, detection: Duration) -> io::Result<()> {
    let seconds = u32::try_from(detection.as_secs().div_ceil(2)).unwrap_or(30);
    let ms = u32::try_from(detection.as_millis()).unwrap_or(u32::MAX);
    setsockopt(socket, sockopt::TcpNoDelay, &true)?;
    setsockopt(socket, sockopt::KeepAlive, &true)?;
    setsockopt(socket, sockopt::TcpKeepIdle, &seconds.max(1))?;
    setsockopt(socket, sockopt::TcpKeepInterval, &1)?;
    setsockopt(socket, sockopt::TcpKeepCount, &3)?;
    setsockopt(socket, sockopt::TcpUserTimeout, &ms)?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_outbox_keeps_the_newest_and_stays_small() {
        let outbox = Outbox::default();
        for n in 0..1000u32 {
            outbox.put(n.to_be_bytes().to_vec());
        }
        assert_eq!(outbox.frames().len(), OUTBOX);
        assert_eq!(outbox.take().unwrap(), 936u32.to_be_bytes());
        for (put, _) in outbox.frames().iter_mut() {
            *put = clock::boottime_ms() - FRESH_MS - 1;
        }
        outbox.put(vec![7]);
        assert_eq!(outbox.take(), Some(vec![7]), "nothing stale");
        assert_eq!(outbox.take(), None);
    }

    #[test]
    fn the_latest_address_is_the_best_and_their_number_is_bounded() {
        let at = |n: u16| SocketAddr::from(([127, 0, 0, 1], n));
        let peer = Peer::new("s-2");
        peer.place((1..=9).map(at).collect());
        assert_eq!(peer.addresses().list(), [at(1), at(2), at(3), at(4)]);
        for n in [20, 21, 22] {
            peer.learn(at(n));
        }
        assert_eq!(peer.addresses().list(), [at(22), at(21), at(1), at(2)]);
        assert_eq!(peer.addresses().generation, 3);
        peer.learn(at(22));
        peer.learn(SocketAddr::from(([0, 0, 0, 0], 5)));
        assert_eq!(peer.addresses().generation, 3);
    }
}
