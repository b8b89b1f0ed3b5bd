//! The agent: this instance's part in the failover protocol, on real PostgreSQL and a real network.
//!
//! Owns the loop that turns what happens into [`Event`]s and carries out [`Effect`]s in their order; the voter's file;
//! the peers; the watchdog; and, in [`hands`], the operations on PostgreSQL.
//! Never: decides (that is [`crate::failover`]); starts PostgreSQL or copies a database cluster (that is the manager);
//! does anything after an effect that failed to reach the disk.
//!
//! It runs beside the manager's loop, not in it: a manager that waits for a statement must not delay a vote.

mod effects;
mod envelope;
pub mod hands;
mod keep;
pub mod names;
mod outside;
pub mod server;
mod view;
pub mod wal;
pub mod witness;
mod work;

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::Context as _;
use jiff::Timestamp;
use tokio::sync::{mpsc, watch};
use tokio::task::JoinHandle;
use tracing::{debug, error, info, warn};

use super::clock::boottime_ms;
use super::config::Config;
use super::conninfo::Upstream;
use super::peers::{PeerEvent, Peers, PeersConfig};
use super::proc::Proc;
use super::reaper::Children;
use super::relay::{Level, Relay, RelayConfig};
use super::tls::Certificate;
use super::watchdog::{self, Watchdog};
use super::{settings, store, sync};
use crate::api::PrivacyDataStore;
use crate::api::privacy_data_store::Durability as Wished;
use crate::failover::{
    Durability, Durable, Effect, Event, Local, Message, Node, Phase, Role, Rule, Story, Streaming,
    Timing, Wish,
};
use envelope::Envelope;
use hands::{Hands, Standbys};
use keep::Keep;
use server::Server;
pub use view::{Failover, Input, View};
use witness::{Facts, Said, Witness};

/// Between two looks while something is under way, and while nothing is.
const BUSY: Duration = Duration::from_millis(5);
const CALM: Duration = Duration::from_millis(100);
/// Between two looks at PostgreSQL while nothing is under way.
const LOOK: Duration = Duration::from_secs(1);
/// How long a clean stop may take before it is an immediate one.
const CLEAN_STOP: Duration = Duration::from_secs(5);
/// Between two looks at the witness's object by a primary: while it isn't there, and while it is. Somebody may delete
/// it, and the next one is another voter.
const WITNESS_LOOK: Duration = Duration::from_secs(1);
const WITNESS_LOOK_AGAIN: Duration = Duration::from_secs(15);
/// How long the others wait to be told of PostgreSQL's end, until all its processes are gone. One that isn't by then
/// waits for a disk, and is killed before it does anything else.
const END_LIMIT: Duration = Duration::from_secs(1);
/// A switchover that came to nothing is tried again after this.
const SWITCH_AGAIN: Duration = Duration::from_secs(5);

/// The other end of the agent.
#[derive(Debug)]
pub struct Handle {
    /// What it is told.
    pub input: mpsc::UnboundedSender<Input>,
    /// What it says.
    pub view: watch::Receiver<View>,
    /// PostgreSQL's process, shared.
    pub server: Server,
    task: JoinHandle<()>,
}

impl Handle {
    /// Ends the agent, and waits until its port is free for whoever comes next; not for a disk that doesn't answer.
    pub async fn close(&mut self) {
        self.input = mpsc::unbounded_channel().0;
        let _ = tokio::time::timeout(END_LIMIT, &mut self.task).await;
    }
}

impl Drop for Handle {
    fn drop(&mut self) {
        self.task.abort();
    }
}

/// What came of an operation.
enum Done {
    Cut(Option<u64>),
    Enforced(Rule<String>, u64),
    Promoted(u32, u64),
    Stopped(Option<u64>),
    Settled(u64),
    Received(String, u64),
    Standbys(Standbys),
    Ended,
    Failed(&'static str, anyhow::Error),
}

#[derive(Clone, Debug, PartialEq)]
enum Op {
    Cut,
    Enforce(Rule<String>),
    Promote,
    StopCleanly,
    Settle,
    Receive(String),
    Standbys(Duration),
    End(Option<Proc>),
}

struct Running {
    op: Op,
    task: JoinHandle<Done>,
}

struct Agent {
    config: Config,
    hands: Hands,
    node: Node<String>,
    keep: Keep,
    peers: Peers,
    witness: Witness,
    /// The voter that the witness's object is, once it was looked at, and when that was last asked for.
    witness_seen: Option<Option<String>>,
    witness_looked: Option<Instant>,
    witness_trouble: Option<String>,
    /// The store's instances are even in number: it needs a witness.
    even: bool,
    certificate: watch::Sender<Option<Certificate>>,
    watchdog: Option<Watchdog>,
    children: Children,
    view: watch::Sender<View>,
    store: Option<Arc<PrivacyDataStore>>,
    /// Where each instance was last said to be, by whomever.
    addresses: BTreeMap<String, IpAddr>,
    /// Where the store's object says it is.
    listed: BTreeMap<String, IpAddr>,
    queue: VecDeque<Op>,
    running: Option<Running>,
    looked: Option<Instant>,
    answered: Instant,
    since: BTreeMap<String, Instant>,
    following: Option<Upstream>,
    rule: String,
    /// Since when PostgreSQL enforces it.
    ruled: Instant,
    /// PostgreSQL didn't take the last one.
    unruly: bool,
    story: Failover,
    last: Option<Failover>,
    stuck: Option<String>,
    switched: Option<(String, u64, Instant)>,
    loss: Option<Instant>,
    fence: bool,
    /// The primary has said that it hands over.
    handing: bool,
    leaving: bool,
    left: bool,
}

/// Starts the agent.
///
/// # Errors
/// If the voter's file can't be read or made, or the port is taken.
pub fn start(
    config: &Config,
    volume: &super::volume::Volume,
    children: &Children,
    shelf: Arc<dyn store::Shelf>,
) -> anyhow::Result<Handle> {
    let identity = volume.identity()?;
    let me = names::voter(&config.instance, &identity.id);
    let (keep, durable) = Keep::open(&volume.root().join("state"))?;
    let server = Server::default();
    let detection = Duration::from_secs(3);
    let (certificate, certificates) = watch::channel(None);
    let relay = Relay::start(
        RelayConfig {
            me: me.clone(),
            run: config.run.clone(),
            data: volume.data(),
            port: config.port,
            peers: config.peers.port(),
            beyond: config.timing.far,
        },
        certificates.clone(),
    );
    let (events, incoming) = mpsc::channel(256);
    let peers = Peers::start(
        PeersConfig {
            store: config.store.clone(),
            me: config.instance.clone(),
            listen: config.peers,
            advertise: SocketAddr::new(config.address, config.peers.port()),
            detection,
        },
        certificates,
        events,
    )
    .with_context(|| format!("can't listen for the other instances at {}", config.peers))?;
    let hands = Hands {
        server: server.clone(),
        me: me.clone(),
        instance: config.instance.clone(),
        run: config.run.clone(),
        data: volume.data(),
        port: config.port,
        limit: config.timing.statement,
        session: Arc::default(),
        relay: Arc::new(relay),
    };
    let node = Node::new(
        me.clone(),
        durable.unwrap_or_default(),
        Timing::new(3_000),
        boottime_ms(),
        rand::random(),
    );
    let (tell, view) = watch::channel(view_of(&node, &me));
    let (input, inputs) = mpsc::unbounded_channel();
    let agent = Agent {
        config: config.clone(),
        hands,
        node,
        keep,
        peers,
        witness: Witness::start(me, shelf),
        witness_seen: None,
        witness_looked: None,
        witness_trouble: None,
        even: false,
        certificate,
        watchdog: None,
        children: children.clone(),
        view: tell,
        store: None,
        addresses: BTreeMap::new(),
        listed: BTreeMap::new(),
        queue: VecDeque::new(),
        running: None,
        looked: None,
        answered: Instant::now(),
        since: BTreeMap::new(),
        following: None,
        rule: sync::NOBODY.to_owned(),
        ruled: Instant::now(),
        unruly: false,
        story: Failover::default(),
        last: None,
        stuck: None,
        switched: None,
        loss: None,
        fence: false,
        handing: false,
        leaving: false,
        left: false,
    };
    let task = tokio::spawn(Box::pin(agent.run(inputs, incoming)));
    Ok(Handle {
        input,
        view,
        server,
        task,
    })
}

fn view_of(node: &Node<String>, me: &str) -> View {
    View {
        me: me.to_owned(),
        wanted: node.wanted(),
        serving: node.serving().is_some(),
        configuration: node.durable().configuration.clone(),
        primary: None,
        source: None,
        following: None,
        rule: sync::NOBODY.to_owned(),
        ruled: None,
        rebuilding: node.durable().rebuilding,
        held: node.durable().rebuilding || !node.durable().history.is_empty(),
        addresses: BTreeMap::new(),
        sessions: Vec::new(),
        fenced: false,
        stuck: None,
        failover: None,
        left: false,
    }
}

impl Agent {
    async fn run(
        mut self,
        mut inputs: mpsc::UnboundedReceiver<Input>,
        mut incoming: mpsc::Receiver<PeerEvent>,
    ) {
        loop {
            self.look();
            self.look_at_witness();
            self.begin_next();
            self.publish();
            let pause = if self.busy() { BUSY } else { CALM };
            let event = tokio::select! {
                biased;
                input = inputs.recv() => match input {
                    Some(input) => self.told(input).await,
                    None => break,
                },
                done = finished(&mut self.running) => self.done(done).await,
                event = incoming.recv() => match event {
                    Some(event) => self.heard(event),
                    None => break,
                },
                event = watched(&mut self.watchdog) => self.watched(event),
                said = self.witness.said() => self.witness_said(said),
                () = tokio::time::sleep(pause) => self.asked(),
            };
            self.step(event.unwrap_or(Event::Tick)).await;
        }
        self.peers.shutdown().await;
    }

    /// Something is under way: the next few milliseconds matter.
    fn busy(&self) -> bool {
        let settled = match self.node.role() {
            Role::Primary(primary) => {
                primary.change.is_none() && primary.renewal.is_none() && primary.handing.is_none()
            }
            // Whoever belongs to no store yet waits for the manager, or for a primary's message.
            Role::Voter => {
                self.node.durable().configuration.is_none()
                    || self.node.primary(boottime_ms()).is_some()
            }
            Role::PreVoting { .. } | Role::Electing(_) => false,
        };
        !settled || !self.queue.is_empty()
    }

    /// PostgreSQL is being given another rule: until that is done, it may go by either.
    fn ruling(&self) -> bool {
        let enforces = |op: &Op| matches!(op, Op::Enforce(_));
        self.queue.iter().any(enforces) || self.running.as_ref().is_some_and(|r| enforces(&r.op))
    }

    async fn step(&mut self, event: Event<String>) {
        let effects = self.node.step(boottime_ms(), event);
        let term = self.node.durable().at().0;
        self.witness.brief(Facts {
            detection: self.timing().detection,
            dead: self.node.knows_dead(term).then_some(term),
        });
        for effect in effects {
            self.carry_out(effect).await;
        }
    }
    /// Why there is no primary, as far as this instance knows.
    fn why_stuck(&self) -> Option<String> {
        let stuck = self.stuck.as_ref()?;
        let witness = self.node.durable().configuration.as_ref()?.witness.as_ref();
        Some(
            match self.witness_trouble.as_ref().filter(|_| witness.is_some()) {
                Some(trouble) => format!("{stuck}; the witness can't be asked: {trouble}"),
                None => stuck.clone(),
            },
        )
    }

    fn publish(&mut self) {
        if self.running.is_none()
            && self.following.is_none()
            && self.hands.server.process().is_some()
            && let Local::Following { upstream, .. } = self.node.local()
        {
            // Its address wasn't known when it was to be followed.
            let upstream = upstream.clone();
            if self.addresses.contains_key(names::instance_of(&upstream)) {
                self.follow(&upstream, None);
            }
        }
        let now = boottime_ms();
        let primary = self
            .node
            .primary(now)
            .map(|p| names::instance_of(p).to_owned());
        let source = primary
            .as_ref()
            .filter(|p| **p != self.config.instance)
            .and_then(|name| {
                let upstream = Upstream {
                    name: name.clone(),
                    address: *self.addresses.get(name)?,
                    port: self.config.port,
                };
                Some((upstream, self.node.seen_history()?.clone()))
            });
        if primary.is_some() {
            self.stuck = None;
        }
        self.attend(source.as_ref());
        let view = View {
            primary,
            source,
            following: self.following.clone(),
            rule: self.rule.clone(),
            ruled: (self.unruly || !self.ruling()).then_some(self.ruled),
            addresses: self.addresses.clone(),
            sessions: self.hands.relay.ready(),
            fenced: self.fence,
            stuck: self.why_stuck(),
            failover: self.last.clone(),
            // Also if it stopped serving for another reason than its hand-over.
            left: self.left || (self.leaving && self.node.serving().is_none()),
            ..view_of(&self.node, &self.hands.me)
        };
        self.view.send_if_modified(|now| {
            let differs = *now != view;
            if now.configuration != view.configuration
                && let Some(c) = &view.configuration
            {
                info!(
                    term = c.term,
                    version = c.version,
                    voters = ?c.voters,
                    acks = c.sync.acks,
                    members = ?c.sync.members,
                    "goes by a new configuration"
                );
            }
            if differs {
                *now = view;
            }
            differs
        });
    }
}

async fn finished(running: &mut Option<Running>) -> Done {
    match running {
        Some(running) => match (&mut running.task).await {
            Ok(done) => done,
            Err(e) => Done::Failed("finish", e.into()),
        },
        None => std::future::pending().await,
    }
}

async fn watched(watchdog: &mut Option<Watchdog>) -> watchdog::Event {
    match watchdog {
        Some(watchdog) => watchdog.event().await,
        None => std::future::pending().await,
    }
}
