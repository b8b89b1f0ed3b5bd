//! The agent: this instance's part in the failover protocol, on real PostgreSQL and a real network.
//!
//! Owns the loop that turns what happens into [`Event`]s and carries out [`Effect`]s in their order; the voter's file;
//! the peers; the watchdog; and, in [`hands`], the operations on PostgreSQL.
//! Never: decides (that is [`crate::failover`]); starts PostgreSQL or copies a database cluster (that is the manager);
//! does anything after an effect that failed to reach the disk.
//!
//! It runs beside the manager's loop, not in it: a manager that waits for a statement must not delay a vote.

pub mod hands;
mod keep;
pub mod names;
mod view;
pub mod wal;
pub mod witness;

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::Context as _;
use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use tokio::sync::{mpsc, watch};
use tokio::task::JoinHandle;
use tracing::{debug, error, info, warn};

use super::clock::boottime_ms;
use super::config::Config;
use super::conninfo::Upstream;
use super::peers::{PeerEvent, Peers, PeersConfig};
use super::reaper::Children;
use super::tls::Certificate;
use super::watchdog::{self, Watchdog};
use super::{settings, store, sync};
use crate::api::PrivacyDataStore;
use crate::api::privacy_data_store::Durability as Wished;
use crate::failover::{
    Durability, Durable, Effect, Event, History, Local, Message, Node, Phase, Role, Rule, Story,
    Streaming, Timing, Wish,
};
use hands::{Hands, Server, Standbys};
use keep::Keep;
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

impl Drop for Handle {
    fn drop(&mut self) {
        self.task.abort();
    }
}

/// What goes over the wire.
#[derive(Serialize, Deserialize)]
struct Envelope {
    from: String,
    to: String,
    address: IpAddr,
    message: Message<String>,
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
    End,
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
    rebuilt_from: Option<History>,
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
        story: Failover::default(),
        last: None,
        stuck: None,
        switched: None,
        loss: None,
        fence: false,
        handing: false,
        leaving: false,
        left: false,
        rebuilt_from: None,
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
        rebuilding: node.durable().rebuilding,
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
                    None => return,
                },
                done = finished(&mut self.running) => self.done(done).await,
                event = incoming.recv() => match event {
                    Some(event) => self.heard(event),
                    None => return,
                },
                event = watched(&mut self.watchdog) => self.watched(event),
                said = self.witness.said() => self.witness_said(said),
                () = tokio::time::sleep(pause) => self.asked(),
            };
            self.step(event.unwrap_or(Event::Tick)).await;
        }
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

    // --- effects

    async fn carry_out(&mut self, effect: Effect<String>) {
        match effect {
            Effect::Persist(state) => self.persist(state).await,
            Effect::Send(to, message) => self.send(to, message),
            Effect::Cut => {
                // What was under way is void; the cut finds out by itself what became of it.
                self.following = None;
                self.queue.retain(|op| *op == Op::Cut);
                self.give_up_running(&Op::Cut).await;
                self.queue.push_back(Op::Cut);
                self.begin_next();
            }
            Effect::Follow(upstream) => self.follow(&upstream),
            Effect::Rebuild { from, history } => {
                info!(from, "this copy can't go on: it is made anew");
                self.following = None;
                self.rebuilt_from = Some(history);
            }
            Effect::Enforce(rule) => self.queue.push_back(Op::Enforce(rule)),
            Effect::Promote => {
                // From the moment PostgreSQL may accept writes, not only from the first heartbeat on.
                if let Role::Electing(election) = self.node.role()
                    && let Phase::Promoting { sent, .. } = &election.phase
                {
                    let until = *sent + self.timing().lease;
                    self.guard(until);
                }
                self.queue.push_back(Op::Promote);
            }
            Effect::Serve { until } => self.guard(until),
            Effect::StopCleanly => self.queue.push_back(Op::StopCleanly),
            Effect::Tell(story) => self.tell(story),
        }
    }

    /// Ends what is under way, unless it is `keep`. It is certainly over when this returns: an operation that is
    /// only told to end could still promote PostgreSQL behind the back of the cut that follows.
    async fn give_up_running(&mut self, keep: &Op) {
        if let Some(mut running) = self.running.take_if(|r| r.op != *keep) {
            running.task.abort();
            let _ = (&mut running.task).await;
            self.hands.session = Arc::default();
        }
    }

    /// PostgreSQL ended, or is to: none of it is left before anybody is told that it's gone. Its processes may
    /// outlive their postmaster, and answer clients.
    async fn end(&mut self) {
        if self.queue.contains(&Op::Cut) || self.running.as_ref().is_some_and(|r| r.op == Op::Cut) {
            // It makes sure of the same.
            return;
        }
        self.queue.clear();
        self.give_up_running(&Op::End).await;
        if self.running.is_none() {
            self.queue.push_back(Op::End);
            self.begin_next();
        }
    }

    /// There is no primary to guard any more, as a process.
    fn release(&mut self) {
        if let Some(watchdog) = &mut self.watchdog {
            let _ = watchdog.release();
        }
    }

    /// Until the disk has it, nothing else happens: no vote, no heartbeat. If that lasts, the lease ends, and the
    /// watchdog sees to it that PostgreSQL does, too.
    async fn persist(&mut self, state: Durable<String>) {
        loop {
            match self.keep.write(&state) {
                Ok(()) => return,
                Err(e) => error!("can't keep what this instance has promised: {e:#}; tries again"),
            }
            tokio::time::sleep(Duration::from_millis(200)).await;
        }
    }

    fn send(&self, to: String, message: Message<String>) {
        if names::is_witness(&to) {
            return self.witness.ask(to, message);
        }
        let name = names::instance_of(&to).to_owned();
        let envelope = Envelope {
            from: self.hands.me.clone(),
            to,
            address: self.config.address,
            message,
        };
        match serde_json::to_vec(&envelope) {
            Ok(bytes) => {
                self.peers.send(&name, &bytes);
            }
            Err(e) => warn!("can't write a message: {e}"),
        }
    }

    fn follow(&mut self, upstream: &str) {
        let name = names::instance_of(upstream).to_owned();
        let (Some(address), Some(certificate)) = (
            self.addresses.get(&name).copied(),
            self.certificate.borrow().clone(),
        ) else {
            warn!(
                upstream,
                "can't follow yet: its address or the certificate is missing"
            );
            return;
        };
        let upstream = Upstream {
            name,
            address,
            port: self.config.port,
        };
        let timeout = settings::replication_timeout(self.detection());
        match self.hands.follow(&certificate, &upstream, timeout) {
            Ok(()) => self.following = Some(upstream),
            Err(e) => warn!("can't set the upstream: {e:#}"),
        }
    }

    fn guard(&mut self, until: u64) {
        let Some(process) = self.hands.server.process() else {
            return;
        };
        if self.watchdog.is_none() {
            match Watchdog::start(&self.children, &self.config.program) {
                Ok(watchdog) => self.watchdog = Some(watchdog),
                Err(e) => {
                    error!("can't start the watchdog: {e}");
                    return;
                }
            }
        }
        if let Some(watchdog) = &mut self.watchdog
            && let Err(e) = watchdog.guard(process, until)
        {
            warn!("the watchdog doesn't listen ({e}): starts it anew");
            if let Err(e) = watchdog.restart() {
                error!("can't start the watchdog: {e}");
                self.watchdog = None;
            }
        }
    }

    fn watched(&mut self, event: watchdog::Event) -> Option<Event<String>> {
        match event {
            watchdog::Event::Killed(0) => debug!("the watchdog found nothing to end"),
            watchdog::Event::Killed(count) => {
                error!(count, "the watchdog ended PostgreSQL: its lease was over");
            }
            watchdog::Event::Left(count) => {
                error!(
                    count,
                    "the lease is over, and processes of PostgreSQL can't be ended"
                );
            }
            watchdog::Event::Ended(why) => {
                error!("the watchdog ended: {why}");
                self.watchdog = None;
            }
        }
        None
    }

    fn tell(&mut self, story: Story<String>) {
        let now = Some(Timestamp::now());
        match story {
            Story::Detected { primary, direct } => {
                let reason = self.reason(direct);
                info!(primary, reason, "the primary is gone");
                self.story = Failover {
                    previous: primary.map(|p| names::instance_of(&p).to_owned()),
                    reason,
                    detected: now,
                    ..Failover::default()
                };
            }
            Story::Fenced { term } => {
                info!(term, "enough voters are cut off from the old primary");
                self.story.fenced = now;
            }
            Story::Elected { term } => {
                info!(term, "a majority accepted");
                self.story.elected = now;
            }
            Story::Promoted { term } => {
                info!(term, "serves");
                self.story.promoted = now;
                self.story.term = term;
                self.handing = false;
                self.last = Some(std::mem::take(&mut self.story));
                self.stuck = None;
                self.since.clear();
                self.left = false;
            }
            Story::SteppedDown { term, why } => {
                // The watchdog stays on guard until PostgreSQL is gone: this process may be frozen before that.
                warn!(term, "stops serving: {why}");
            }
            Story::Stuck(why) => {
                if self.stuck.as_deref() != Some(why) {
                    info!("no election: {why}");
                }
                self.stuck = Some(why.to_owned());
            }
        }
    }

    /// Why there is to be another primary, as the kinds name it.
    fn reason(&self, direct: bool) -> &'static str {
        use crate::api::privacy_data_store::failover_reasons as reasons;
        if self.node.durable().at().0 <= 1 {
            reasons::FOUNDING
        } else if self.handing {
            reasons::HAND_OVER
        } else if direct {
            reasons::PRIMARY_DEAD
        } else {
            reasons::PRIMARY_SILENT
        }
    }

    // --- operations on PostgreSQL

    fn begin_next(&mut self) {
        if self.running.is_some() {
            return;
        }
        let Some(op) = self.queue.pop_front() else {
            return;
        };
        let (hands, work) = (self.hands.clone(), op.clone());
        let slots: Vec<String> = self.slots();
        let task = tokio::spawn(async move { operate(&hands, work, &slots).await });
        self.running = Some(Running { op, task });
    }

    fn slots(&self) -> Vec<String> {
        let others = self.store.as_ref().map_or_else(BTreeSet::new, |s| {
            sync::others(
                &self.config.store,
                &self.config.instance,
                &store::listed(s),
                store::desired(s),
            )
        });
        others.iter().map(|o| settings::slot(o)).collect()
    }

    /// Looks at PostgreSQL: often while something depends on it.
    fn look(&mut self) {
        if self.running.is_some() || !self.queue.is_empty() || self.hands.server.process().is_none()
        {
            return;
        }
        let rebuilding = self.node.durable().rebuilding;
        let (op, every) = match self.node.local() {
            Local::Down { .. } if !self.hands.server.leads() => {
                (Op::Settle, Duration::from_millis(20))
            }
            Local::Following { upstream, .. } => {
                let catching =
                    matches!(self.node.role(), Role::Electing(_)) || self.node.levelling();
                let every = match (catching, rebuilding) {
                    (true, _) => BUSY,
                    (false, true) => Duration::from_millis(100),
                    (false, false) => LOOK,
                };
                (Op::Receive(upstream.clone()), every)
            }
            Local::Leading => {
                let changing = matches!(self.node.role(), Role::Primary(p) if p.change.is_some());
                let missing = self.node.serving().is_some_and(|c| {
                    c.copies()
                        .any(|v| *v != self.hands.me && !self.since.contains_key(v))
                });
                let every = match (changing, missing) {
                    (true, _) => Duration::from_millis(20),
                    (false, true) => Duration::from_millis(200),
                    (false, false) => LOOK,
                };
                // One that doesn't answer must not keep this from noticing in time that it doesn't.
                let left = self.patience().saturating_sub(self.answered.elapsed());
                (Op::Standbys(left.max(Duration::from_millis(500))), every)
            }
            _ => return,
        };
        if self.looked.is_some_and(|at| at.elapsed() < every) {
            return;
        }
        self.looked = Some(Instant::now());
        self.queue.push_back(op);
    }

    /// Has the witness looked at while that is of use: by a primary that is to have one, and by a standby that begins
    /// to doubt its primary. In quiet times nobody reads it.
    fn look_at_witness(&mut self) {
        let leads = self.even && self.node.serving().is_some();
        let every = match self.witness_seen {
            Some(Some(_)) => WITNESS_LOOK_AGAIN,
            _ => WITNESS_LOOK,
        };
        let due = leads && self.witness_looked.is_none_or(|at| at.elapsed() >= every);
        if due {
            self.witness_looked = Some(Instant::now());
        }
        if due || self.node.doubts(boottime_ms()).is_some() {
            self.witness.look();
        }
    }

    fn witness_said(&mut self, said: Said) -> Option<Event<String>> {
        match said {
            Said::Answer { from, message } => return Some(Event::Message { from, message }),
            Said::Trouble(trouble) => self.witness_trouble = trouble,
            Said::Seen(voter) => {
                self.witness_looked = Some(Instant::now());
                if self.witness_seen.as_ref() != Some(&voter) {
                    info!(voter, "the witness's object");
                    self.witness_seen = Some(voter);
                    let store = self.store.clone()?;
                    return Some(Event::Wish(self.wish(&store)));
                }
            }
        }
        None
    }

    async fn done(&mut self, done: Done) -> Option<Event<String>> {
        self.running = None;
        match done {
            Done::Cut(end) => {
                self.following = None;
                if self.hands.server.process().is_none() {
                    self.release();
                }
                Some(Event::Cut { end })
            }
            Done::Enforced(rule, position) => {
                self.rule = sync::render(&rule);
                self.answered = Instant::now();
                Some(Event::Enforced { rule, position })
            }
            Done::Promoted(timeline, start) => {
                self.answered = Instant::now();
                Some(Event::Promoted { timeline, start })
            }
            Done::Stopped(end) => {
                self.left = true;
                self.release();
                Some(Event::Stopped { end })
            }
            Done::Settled(end) => Some(Event::Standby { end }),
            Done::Received(from, end) => Some(Event::Received { from, end }),
            Done::Standbys(seen) => {
                self.answered = Instant::now();
                let now = Instant::now();
                let streaming: BTreeMap<String, Streaming> =
                    hands::streaming(&seen, &mut self.since, now);
                Some(Event::Standbys {
                    position: seen.position,
                    streaming,
                })
            }
            Done::Ended => {
                self.release();
                Some(Event::Lost { wiped: false })
            }
            Done::Failed(what, error) => self.failed(what, &error).await,
        }
    }

    /// A primary whose PostgreSQL doesn't answer for so long has none.
    fn patience(&self) -> Duration {
        Duration::from_secs(u64::from(self.detection()) * 2)
    }

    async fn failed(&mut self, what: &'static str, error: &anyhow::Error) -> Option<Event<String>> {
        let looking = matches!(what, "settle" | "receive");
        if looking {
            debug!("can't {what}: {error:#}");
            return None;
        }
        warn!("can't {what}: {error:#}");
        // Whatever is the matter with this session, the next need not have it.
        self.hands.session = Arc::default();
        // Asked again with the next attempt, change or look; a primary that doesn't answer for long has ended.
        let serving = self.node.serving().is_some();
        if what == "promote" || (serving && self.answered.elapsed() >= self.patience()) {
            error!("PostgreSQL doesn't do what it is asked: ends it");
            self.end().await;
            return None;
        }
        if what == "enforce"
            && let Role::Primary(primary) = self.node.role()
        {
            self.queue.push_back(Op::Enforce(primary.rule.clone()));
        }
        None
    }

    // --- what comes from outside

    fn heard(&mut self, event: PeerEvent) -> Option<Event<String>> {
        match event {
            PeerEvent::Message { from, body } => {
                let Ok(envelope) = serde_json::from_slice::<Envelope>(&body) else {
                    debug!(from, "a message that can't be understood");
                    return None;
                };
                // The certificate names the slot; a message for the volume that was here before isn't for this one.
                if names::instance_of(&envelope.from) != from || envelope.to != self.hands.me {
                    return None;
                }
                self.learn(&from, envelope.address);
                if let Message::Farewell { successor, .. } = &envelope.message {
                    self.handing = successor.is_some();
                }
                Some(Event::Message {
                    from: envelope.from,
                    message: envelope.message,
                })
            }
            PeerEvent::Down { name, why } => {
                let configuration = self.node.durable().configuration.as_ref()?;
                let voter = configuration
                    .voters
                    .iter()
                    .find(|v| names::instance_of(v) == name)?
                    .clone();
                debug!(name, why, "a peer is gone");
                Some(Event::Dead(voter))
            }
            PeerEvent::Up { .. } => None,
        }
    }

    fn learn(&mut self, name: &str, address: IpAddr) {
        if self.addresses.insert(name.to_owned(), address) != Some(address) {
            self.place_peers();
            // The upstream may be back with another address.
            if let Some(following) = &self.following
                && following.name == name
                && let Local::Following { upstream, .. } = self.node.local()
            {
                let upstream = upstream.clone();
                self.follow(&upstream);
            }
        }
    }

    fn place_peers(&self) {
        let port = self.config.peers.port();
        let peers = self
            .addresses
            .iter()
            .filter(|(name, _)| **name != self.config.instance)
            .map(|(name, at)| {
                let all = self.listed.get(name).into_iter().chain([at]);
                let all = all
                    .map(|at| SocketAddr::new(*at, port))
                    .collect::<BTreeSet<_>>();
                (name.clone(), all)
            })
            .collect();
        self.peers.set_peers(peers);
    }

    async fn told(&mut self, input: Input) -> Option<Event<String>> {
        match input {
            Input::Store(store) => return self.take_store(store).await,
            Input::Certificate(new) => {
                // The receiver reads it with its next connection.
                if self.following.is_some()
                    && let Err(e) = new.install_client(&self.config.run)
                {
                    warn!("can't write the client's certificate: {e}");
                }
                self.certificate.send_replace(Some(new));
            }
            Input::Started => self.looked = None,
            Input::Ended { by_agent } => {
                self.hands.session = Arc::default();
                // One that this agent stopped itself is reported by the operation that stopped it.
                if !by_agent {
                    self.end().await;
                }
            }
            Input::Wiped => {
                if !self.node.durable().history.is_empty() || !self.node.durable().rebuilding {
                    return Some(Event::Lost { wiped: true });
                }
            }
            Input::Founded => {
                if self.node.durable().configuration.is_none() {
                    info!("is the first voter of a new store");
                    let durable = Node::founding(&self.hands.me, self.durability());
                    self.persist(durable.clone()).await;
                    let now = boottime_ms();
                    let me = self.hands.me.clone();
                    self.node = Node::new(me, durable, self.timing(), now, rand::random());
                    if let Some(store) = self.store.clone() {
                        return self.take_store(store).await;
                    }
                }
            }
            Input::Copied(history) => {
                self.rebuilt_from = None;
                return Some(Event::Rebuilt { history });
            }
            Input::Stranded => return Some(Event::Stranded),
            Input::Leave => {
                self.leaving = true;
                if self.node.serving().is_some() {
                    return Some(Event::HandOver(None));
                }
            }
        }
        None
    }

    fn durability(&self) -> Durability {
        match self.store.as_ref().map(|s| s.spec.durability) {
            Some(Wished::Preferred) => Durability::Preferred,
            Some(Wished::Required) | None => Durability::Required,
        }
    }

    fn detection(&self) -> u32 {
        self.store
            .as_ref()
            .and_then(|s| u32::try_from(s.spec.failover.detection_seconds).ok())
            .unwrap_or(3)
    }

    fn timing(&self) -> Timing {
        Timing::new(u64::from(self.detection()) * 1_000)
    }

    /// The store's object: addresses, timing, and what it asks for.
    async fn take_store(&mut self, new: Arc<PrivacyDataStore>) -> Option<Event<String>> {
        self.store = Some(new.clone());
        self.node.set_timing(self.timing());
        self.peers
            .set_detection(Duration::from_secs(u64::from(self.detection())));
        let instances = new.status.iter().flat_map(|s| &s.instances);
        let mut moved = Vec::new();
        for entry in instances {
            if let Some(address) = entry.address.as_deref().and_then(|a| a.parse().ok()) {
                // News, also against what the instance itself said earlier on its own connection: two that are both
                // back with other addresses can't tell each other.
                if self.listed.insert(entry.name.clone(), address) != Some(address) {
                    moved.push((entry.name.clone(), address));
                }
            }
        }
        for (name, address) in moved {
            self.learn(&name, address);
        }
        self.place_peers();
        let wish = self.wish(&new);
        self.step(Event::Wish(wish)).await;
        let fence = store::fenced(&new, &self.config.instance);
        if fence != self.fence {
            self.fence = fence;
            self.step(Event::Fence(fence)).await;
        }
        self.asked()
    }

    /// What a person or the operator asks for by the store's object. Looked at again and again: it may not have been
    /// possible when it was read.
    fn asked(&mut self) -> Option<Event<String>> {
        let store = self.store.clone()?;
        if let Some(term) = store::accept_loss(&store, &self.config.instance)
            && self.node.durable().at().0 == term
            && matches!(self.node.role(), Role::Voter | Role::PreVoting { .. })
            && matches!(
                self.node.local(),
                Local::Standing { .. } | Local::Following { .. }
            )
            && self.loss.is_none_or(|at| at.elapsed() >= SWITCH_AGAIN)
        {
            warn!(term, "a person accepts that commits are lost");
            self.loss = Some(Instant::now());
            return Some(Event::AcceptLoss);
        }
        self.switchover(&store)
    }

    /// A planned switchover that the store's annotation asks for, once per wish and term, and again after a while.
    fn switchover(&mut self, store: &PrivacyDataStore) -> Option<Event<String>> {
        let configuration = self.node.serving()?;
        let target = if store::leaving(store, &self.config.instance) {
            None
        } else {
            let target = store::promote(store)?;
            if target == self.config.instance {
                return None;
            }
            Some(target)
        };
        let key = target.clone().unwrap_or_default();
        let term = configuration.term;
        if self
            .switched
            .as_ref()
            .is_some_and(|(k, t, at)| *k == key && *t == term && at.elapsed() < SWITCH_AGAIN)
        {
            return None;
        }
        let voter = match &target {
            None => None,
            Some(name) => Some(
                configuration
                    .voters
                    .iter()
                    .find(|v| names::instance_of(v) == name)?
                    .clone(),
            ),
        };
        self.switched = Some((key, term, Instant::now()));
        info!(target, "hands over as the store asks");
        Some(Event::HandOver(voter))
    }

    /// Who is to vote and may be primary: those whom the operator lists, by the volumes that they report.
    fn wish(&mut self, store: &PrivacyDataStore) -> Wish<String> {
        let present = self.node.durable().configuration.clone();
        let present = present.as_ref();
        let mut wish = Wish {
            durability: self.durability(),
            ..Wish::default()
        };
        for entry in store.status.iter().flat_map(|s| &s.instances) {
            if entry.leaving == Some(true) {
                continue;
            }
            let now = present.into_iter().flat_map(|c| &c.voters);
            let known: Vec<String> = now
                .filter(|v| names::instance_of(v) == entry.name)
                .cloned()
                .collect();
            let ids = match &entry.id {
                // The present one is certainly this instance's volume, whatever an old report says.
                _ if entry.name == self.config.instance => vec![self.hands.me.clone()],
                Some(id) => vec![names::voter(&entry.name, id)],
                None => known,
            };
            for id in ids {
                let may = match entry.may_be_primary {
                    Some(may) => may,
                    // Not said: as it is.
                    None => present.is_some_and(|c| c.may_be_primary.contains(&id)),
                };
                if may {
                    wish.may_be_primary.insert(id.clone());
                }
                wish.voters.insert(id);
            }
        }
        wish.voters.insert(self.hands.me.clone());
        // Of an even number, half are no majority: one vote more lets one half go on without the other.
        self.even = wish.voters.len().is_multiple_of(2);
        let witness = match &self.witness_seen {
            Some(seen) => seen.clone(),
            // Not looked at yet, or the API server is away: as it is.
            None => present.and_then(|c| c.witness.clone()),
        };
        if let Some(witness) = witness.filter(|_| self.even) {
            wish.voters.insert(witness.clone());
            wish.witness = Some(witness);
        }
        wish
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
                self.follow(&upstream);
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
        let view = View {
            primary,
            source,
            following: self.following.clone(),
            rule: self.rule.clone(),
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

async fn operate(hands: &Hands, op: Op, slots: &[String]) -> Done {
    let failed = |what: &'static str| move |e: anyhow::Error| Done::Failed(what, e);
    match op {
        Op::Cut => Done::Cut(hands.cut().await),
        Op::Enforce(rule) => match hands.enforce(&rule).await {
            Ok(at) => Done::Enforced(rule, at),
            Err(e) => {
                // It is tried again at once.
                tokio::time::sleep(Duration::from_millis(100)).await;
                Done::Failed("enforce", e)
            }
        },
        Op::Promote => hands
            .promote(slots)
            .await
            .map_or_else(failed("promote"), |(timeline, start)| {
                Done::Promoted(timeline, start)
            }),
        Op::StopCleanly => Done::Stopped(hands.stop_cleanly(CLEAN_STOP).await),
        Op::Settle => {
            if let Err(e) = hands.alone() {
                return Done::Failed("settle", e);
            }
            let settled = tokio::time::timeout(Duration::from_secs(2), hands.settle()).await;
            match settled {
                Ok(settled) => settled.map_or_else(failed("settle"), Done::Settled),
                Err(_) => Done::Failed("settle", anyhow::anyhow!("it still replays")),
            }
        }
        Op::Receive(from) => hands
            .received()
            .await
            .map_or_else(failed("receive"), |end| Done::Received(from, end)),
        Op::Standbys(limit) => match tokio::time::timeout(limit, hands.standbys()).await {
            Ok(Ok(seen)) => Done::Standbys(seen),
            Ok(Err(e)) => Done::Failed("look at the standbys", e),
            Err(_) => Done::Failed(
                "look at the standbys",
                anyhow::anyhow!("PostgreSQL doesn't answer"),
            ),
        },
        Op::End => {
            hands.end(END_LIMIT).await;
            Done::Ended
        }
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
