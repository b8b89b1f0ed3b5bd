//! A model checker's view of the same `step`: every order of every message and every completion, time left out.
//!
//! Whoever may consider the primary silent does so at any moment (detection 0), messages stay in flight for
//! ever (so they are lost, repeated and reordered at will), and no lease runs out.

mod orders;

use std::collections::{BTreeMap, BTreeSet};

use stateright::{Model, Property};

use crate::failover::planted::Mistake;
use crate::failover::primary::Primary;
use crate::failover::{
    Configuration, Durability, Durable, Effect, Era, Event, History, Local, Message, Node,
    Register, Role, Rule, Streaming, Term, Timing, Wish,
};

type V = u8;
const WITNESS: V = 9;
const FOREVER: u64 = u64::MAX >> 10;

/// A record: the term in which it was written, and a number that no other has.
type Rec = (Term, u8);

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct Instance {
    node: Node<V>,
    disk: Durable<V>,
    wal: Vec<Rec>,
    /// From whom it streams.
    upstream: Option<V>,
    cuts: u8,
    enforcing: Vec<Rule<V>>,
    promoting: Option<Configuration<V>>,
    leads: Option<Lead>,
    copying: Option<(V, History)>,
    /// A copy that can be started at all.
    whole: bool,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct Lead {
    term: Term,
    flushed: BTreeMap<V, usize>,
    acknowledged: usize,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Failure {
    Lost,
    TwoConfigurations,
    TwoPrimaries,
    NotPermitted,
    Unruled,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct State {
    instances: BTreeMap<V, Instance>,
    /// The rules that each may still use, the one in force first.
    rules: BTreeMap<V, Vec<Rule<V>>>,
    witness: Option<Register<V>>,
    /// What was ever sent, and whether it has arrived once.
    network: BTreeMap<(V, V, Packet), bool>,
    /// Acknowledgements on their way: to, from, up to.
    acks: BTreeSet<(V, V, usize)>,
    acknowledged: BTreeSet<(Term, usize, Rec)>,
    promoted: BTreeMap<Term, (V, Vec<Rec>)>,
    configurations: BTreeMap<(Term, u64), Configuration<V>>,
    left: Left,
    failure: Option<Failure>,
}

/// What may still happen.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct Left {
    elections: u8,
    writes: u8,
    crashes: u8,
    wipes: u8,
    polls: u8,
    wishes: u8,
    repeats: u8,
}

/// A message, ordered by its hash: any total order does.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct Packet(u64, std::sync::Arc<Message<V>>);

impl Packet {
    fn new(message: Message<V>) -> Self {
        use std::hash::{DefaultHasher, Hash, Hasher};
        let mut hasher = DefaultHasher::new();
        message.hash(&mut hasher);
        Self(hasher.finish(), std::sync::Arc::new(message))
    }
}

impl PartialOrd for Packet {
    fn partial_cmp(&self, other: &Self) -> Option<std::cmp::Ordering> {
        Some(self.cmp(other))
    }
}

impl Ord for Packet {
    fn cmp(&self, other: &Self) -> std::cmp::Ordering {
        self.0.cmp(&other.0)
    }
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
enum Action {
    Elect(V),
    Tick(V),
    Deliver(V, V, Packet),
    CutDone(V),
    EnforceDone(V),
    PromoteDone(V),
    Copied(V),
    Write(V),
    Receive(V),
    Acknowledge(V, V, usize),
    Poll(V),
    Crash(V),
    Wipe(V),
    Wish(V),
}

#[derive(Clone)]
struct Scenario {
    copies: V,
    witness: bool,
    durability: Durability,
    members: Vec<V>,
    left: Left,
    wish: Option<Wish<V>>,
    mistake: Option<Mistake>,
}

fn timing() -> Timing {
    Timing {
        heartbeat: FOREVER,
        detection: 0,
        lease: FOREVER,
        gather: 0,
        round: FOREVER,
        retry: FOREVER,
        stagger: FOREVER,
        steady: 0,
    }
}

impl Scenario {
    fn configuration(&self) -> Configuration<V> {
        let copies: BTreeSet<V> = (0..self.copies).collect();
        let voters = copies
            .iter()
            .copied()
            .chain(self.witness.then_some(WITNESS))
            .collect();
        let mut c = Configuration {
            term: 1,
            version: 1,
            primary: 0,
            voters,
            witness: self.witness.then_some(WITNESS),
            sync: Rule {
                members: self.members.iter().copied().collect(),
                acks: 0,
            },
            durability: self.durability,
            may_be_primary: copies,
        };
        c.sync.acks = c.acks(c.sync.members.len());
        c
    }

    fn node(&self, id: V, disk: &Durable<V>) -> Node<V> {
        let mut node = Node::new(id, disk.clone(), timing(), 0, 1);
        node.passive = true;
        node.planted = self.mistake;
        node
    }

    fn first(&self) -> State {
        let c = self.configuration();
        let era = Era {
            term: 1,
            timeline: 1,
            start: 0,
        };
        let mut instances = BTreeMap::new();
        for id in 0..self.copies {
            let disk = Durable {
                promised: 1,
                coordinator: Some(0),
                configuration: Some(c.clone()),
                rebuilding: false,
                history: vec![era.clone()],
            };
            let mut node = self.node(id, &disk);
            let mut leads = None;
            if id == 0 {
                let mut primary = Primary::new(c.clone(), &c.voters, 0, 1);
                primary.due = FOREVER;
                primary.until = FOREVER;
                node.role = Role::Primary(Box::new(primary));
                node.local = Local::Leading;
                leads = Some(Lead {
                    term: 1,
                    flushed: BTreeMap::new(),
                    acknowledged: 1,
                });
            } else {
                node.local = Local::Following {
                    upstream: 0,
                    end: 1,
                };
            }
            instances.insert(
                id,
                Instance {
                    node,
                    disk,
                    wal: vec![(1, 0)],
                    upstream: (id != 0).then_some(0),
                    cuts: 0,
                    enforcing: Vec::new(),
                    promoting: None,
                    leads,
                    copying: None,
                    whole: true,
                },
            );
        }
        State {
            instances,
            rules: BTreeMap::from([(0, vec![c.sync.clone()])]),
            witness: self.witness.then(|| {
                let mut w = Register::new(WITNESS);
                w.promised = 1;
                w.coordinator = Some(0);
                w.configuration = Some(c.clone());
                w
            }),
            network: BTreeMap::new(),
            acks: BTreeSet::new(),
            acknowledged: BTreeSet::new(),
            promoted: BTreeMap::from([(1, (0, vec![(1, 0)]))]),
            configurations: BTreeMap::from([(c.at(), c)]),
            left: self.left,
            failure: None,
        }
    }
}

fn eras(wal: &[Rec]) -> Vec<Term> {
    let mut terms: Vec<Term> = wal.iter().map(|(t, _)| *t).collect();
    terms.dedup();
    terms
}

impl State {
    fn fail(&mut self, failure: Failure) {
        self.failure.get_or_insert(failure);
    }

    fn step(&mut self, id: V, event: Event<V>) {
        let Some(instance) = self.instances.get_mut(&id) else {
            return;
        };
        let effects = instance.node.step(0, event);
        self.execute(id, effects);
    }

    fn execute(&mut self, id: V, effects: Vec<Effect<V>>) {
        for effect in effects {
            let Some(i) = self.instances.get_mut(&id) else {
                return;
            };
            match effect {
                Effect::Persist(durable) => {
                    if let Some(c) = durable.configuration.clone() {
                        self.know(&c);
                    }
                    if let Some(i) = self.instances.get_mut(&id) {
                        i.disk = durable;
                    }
                }
                Effect::Send(to, message) => {
                    if let Message::Accept { configuration, .. } = &message {
                        self.know(&configuration.clone());
                    }
                    let silent = matches!(
                        message,
                        Message::Heartbeat { .. } | Message::Heard { .. } | Message::Refused { .. }
                    );
                    if !silent {
                        self.network
                            .entry((to, id, Packet::new(message)))
                            .or_insert(false);
                    }
                }
                Effect::Cut => i.cuts += 1,
                Effect::Follow(upstream) => i.upstream = Some(upstream),
                Effect::Rebuild { from, history } => {
                    i.upstream = None;
                    i.copying = Some((from, history));
                    // A rewind that is interrupted leaves something that starts, and lacks what was there.
                    i.wal.truncate(1);
                }
                Effect::Enforce(rule) => {
                    i.enforcing.push(rule.clone());
                    self.rules.entry(id).or_default().push(rule);
                }
                Effect::Promote => i.promoting = i.disk.configuration.clone(),
                Effect::StopCleanly | Effect::Serve { .. } | Effect::Tell(_) => {}
            }
        }
    }

    fn know(&mut self, c: &Configuration<V>) {
        let known = self
            .configurations
            .entry(c.at())
            .or_insert_with(|| c.clone());
        let two = known != c
            || self
                .configurations
                .range((c.term, 0)..(c.term + 1, 0))
                .any(|(_, o)| o.primary != c.primary);
        if two {
            self.fail(Failure::TwoConfigurations);
        }
    }

    fn cut_done(&mut self, id: V) {
        let Some(i) = self.instances.get_mut(&id) else {
            return;
        };
        i.cuts -= 1;
        i.upstream = None;
        let led = i.leads.take().is_some() || i.promoting.take().is_some();
        if led {
            i.enforcing.clear();
            self.rules.remove(&id);
        }
        let Some(i) = self.instances.get(&id) else {
            return;
        };
        let end = i.wal.len() as u64;
        let known = !led && i.copying.is_none() && i.whole;
        self.step(
            id,
            Event::Cut {
                end: known.then_some(end),
            },
        );
        if led {
            // It starts again, as a standby.
            self.step(id, Event::Standby { end });
        }
    }

    fn promote_done(&mut self, id: V) {
        let Some(i) = self.instances.get_mut(&id) else {
            return;
        };
        let Some(c) = i.promoting.take() else { return };
        let start = i.wal.len() as u64;
        i.leads = Some(Lead {
            term: c.term,
            flushed: BTreeMap::new(),
            acknowledged: i.wal.len() + 1,
        });
        let before = i.wal.clone();
        i.wal.push((c.term, 0));
        if self.rules.get(&id).is_none_or(|r| *r != [c.sync.clone()]) {
            self.fail(Failure::Unruled);
        }
        if !c.may_be_primary.contains(&id) {
            self.fail(Failure::NotPermitted);
        }
        let lost = self
            .acknowledged
            .iter()
            .any(|(term, at, rec)| *term < c.term && before.get(*at) != Some(rec));
        if lost {
            self.fail(Failure::Lost);
        }
        if self.promoted.insert(c.term, (id, before)).is_some() {
            self.fail(Failure::TwoPrimaries);
        }
        self.step(id, Event::Promoted { timeline: 1, start });
    }

    fn release(&mut self, id: V) {
        let Some(i) = self.instances.get_mut(&id) else {
            return;
        };
        let Some(lead) = &mut i.leads else { return };
        let upto = self
            .rules
            .get(&id)
            .into_iter()
            .flatten()
            .map(|rule| {
                if rule.acks == 0 {
                    return i.wal.len();
                }
                let mut at: Vec<usize> = rule
                    .members
                    .iter()
                    .filter_map(|m| lead.flushed.get(m).copied())
                    .collect();
                at.sort_unstable_by(|a, b| b.cmp(a));
                at.get(rule.acks - 1).copied().unwrap_or(0)
            })
            .max()
            .unwrap_or(0);
        let (from, term) = (lead.acknowledged, lead.term);
        if upto <= from {
            return;
        }
        lead.acknowledged = upto;
        let new: Vec<(usize, Rec)> = (from..upto)
            .filter_map(|at| Some((at, *i.wal.get(at)?)))
            .collect();
        for (at, rec) in new {
            let lost = self
                .promoted
                .range(term + 1..)
                .any(|(_, (_, wal))| wal.get(at) != Some(&rec));
            if lost {
                self.fail(Failure::Lost);
            }
            self.acknowledged.insert((term, at, rec));
        }
    }
}

impl Model for Scenario {
    type State = State;
    type Action = Action;

    fn init_states(&self) -> Vec<State> {
        vec![self.first()]
    }

    fn actions(&self, s: &State, actions: &mut Vec<Action>) {
        if s.failure.is_some() {
            return;
        }
        for (id, i) in &s.instances {
            let id = *id;
            if s.left.elections > 0
                && i.node.role == Role::Voter
                && i.node.eligible()
                && i.node.pending.is_none()
            {
                actions.push(Action::Elect(id));
            }
            if matches!(&i.node.role, Role::Electing(e) if i.cuts == 0 && e.votes.len() > 1) {
                actions.push(Action::Tick(id));
            }
            if i.cuts > 0 {
                actions.push(Action::CutDone(id));
            }
            if !i.enforcing.is_empty() {
                actions.push(Action::EnforceDone(id));
            }
            if i.promoting.is_some() {
                actions.push(Action::PromoteDone(id));
            }
            if i.copying.is_some() {
                actions.push(Action::Copied(id));
            }
            if i.leads.is_some() && s.left.writes > 0 && matches!(i.node.role, Role::Primary(_)) {
                actions.push(Action::Write(id));
            }
            if let Some(up) = i.upstream.and_then(|u| s.instances.get(&u))
                && up.wal.len() > i.wal.len()
                && up.wal.starts_with(&i.wal)
            {
                actions.push(Action::Receive(id));
            }
            if s.left.polls > 0 && i.leads.is_some() && matches!(i.node.role, Role::Primary(_)) {
                actions.push(Action::Poll(id));
            }
            if s.left.crashes > 0 {
                actions.push(Action::Crash(id));
            }
            if s.left.wipes > 0 && i.leads.is_none() && i.promoting.is_none() && i.whole {
                actions.push(Action::Wipe(id));
            }
            if s.left.wishes > 0 && matches!(i.node.role, Role::Primary(_)) {
                actions.push(Action::Wish(id));
            }
        }
        for ((to, from, message), arrived) in &s.network {
            if *arrived && s.left.repeats == 0 {
                continue;
            }
            actions.push(Action::Deliver(*to, *from, message.clone()));
        }
        for (to, from, upto) in &s.acks {
            actions.push(Action::Acknowledge(*to, *from, *upto));
        }
    }

    fn next_state(&self, s: &State, action: Action) -> Option<State> {
        let mut next = s.clone();
        match action {
            Action::Elect(id) => {
                next.left.elections -= 1;
                let i = next.instances.get_mut(&id)?;
                let term = i.node.highest.max(i.node.durable.promised) + 1;
                i.node.elect(0, term);
                let effects = std::mem::take(&mut i.node.out);
                next.execute(id, effects);
            }
            Action::Tick(id) => next.step(id, Event::Tick),
            Action::Deliver(to, from, packet) => {
                let arrived = next.network.get_mut(&(to, from, packet.clone()))?;
                if *arrived {
                    next.left.repeats -= 1;
                }
                *arrived = true;
                let message = (*packet.1).clone();
                if to == WITNESS {
                    let register = next.witness.as_mut()?;
                    let answer = register.answer(true, &from, &message)?;
                    next.network
                        .entry((from, WITNESS, Packet::new(answer)))
                        .or_insert(false);
                } else {
                    next.step(to, Event::Message { from, message });
                }
            }
            Action::CutDone(id) => next.cut_done(id),
            Action::EnforceDone(id) => {
                let i = next.instances.get_mut(&id)?;
                let rule = i.enforcing.remove(0);
                let position = i.wal.len() as u64;
                let rules = next.rules.get_mut(&id)?;
                let at = rules.iter().position(|r| *r == rule)?;
                rules.drain(..at);
                if rules.len() == 1 {
                    next.step(id, Event::Enforced { rule, position });
                }
            }
            Action::PromoteDone(id) => next.promote_done(id),
            Action::Copied(id) => {
                let (from, history) = next.instances.get_mut(&id)?.copying.take()?;
                let source = next.instances.get(&from)?.clone();
                source.leads.as_ref()?;
                let i = next.instances.get_mut(&id)?;
                i.wal = source.wal;
                i.whole = true;
                let end = i.wal.len() as u64;
                next.step(id, Event::Rebuilt { history });
                next.step(id, Event::Standby { end });
            }
            Action::Write(id) => {
                let number = 10 - next.left.writes;
                next.left.writes -= 1;
                let i = next.instances.get_mut(&id)?;
                let term = i.leads.as_ref()?.term;
                i.wal.push((term, number));
                next.release(id);
            }
            Action::Receive(id) => {
                let upstream = next.instances.get(&id)?.upstream?;
                let wal = next.instances.get(&upstream)?.wal.clone();
                let i = next.instances.get_mut(&id)?;
                let rec = *wal.get(i.wal.len())?;
                i.wal.push(rec);
                let upto = i.wal.len();
                next.acks.insert((upstream, id, upto));
                next.step(
                    id,
                    Event::Received {
                        from: upstream,
                        end: upto as u64,
                    },
                );
            }
            Action::Acknowledge(to, from, upto) => {
                next.acks.remove(&(to, from, upto));
                let lead = next.instances.get_mut(&to)?.leads.as_mut()?;
                let at = lead.flushed.entry(from).or_default();
                *at = upto.max(*at);
                next.release(to);
            }
            Action::Poll(id) => {
                next.left.polls -= 1;
                let mut streaming = BTreeMap::new();
                let terms = eras(&next.instances.get(&id)?.wal);
                let mut informed = BTreeSet::new();
                for (other, o) in &next.instances {
                    if o.upstream == Some(id) {
                        let known = next
                            .instances
                            .get(&id)?
                            .leads
                            .as_ref()?
                            .flushed
                            .get(other)
                            .copied()
                            .unwrap_or(0);
                        streaming.insert(
                            *other,
                            Streaming {
                                flushed: known as u64,
                                since: 0,
                            },
                        );
                        if o.disk
                            .history
                            .iter()
                            .map(|e| e.term)
                            .eq(terms.iter().copied())
                        {
                            informed.insert(*other);
                        }
                    }
                }
                let i = next.instances.get_mut(&id)?;
                let position = i.wal.len() as u64;
                if let Role::Primary(primary) = &mut i.node.role {
                    primary.informed.extend(informed);
                }
                next.step(
                    id,
                    Event::Standbys {
                        position,
                        streaming,
                    },
                );
            }
            Action::Crash(id) => {
                next.left.crashes -= 1;
                let i = next.instances.get_mut(&id)?;
                i.node = self.node(id, &i.disk);
                i.upstream = None;
                i.cuts = 0;
                i.enforcing.clear();
                i.promoting = None;
                i.leads = None;
                i.copying = None;
                let (whole, end) = (i.whole, i.wal.len() as u64);
                next.rules.remove(&id);
                let event = if whole {
                    Event::Standby { end }
                } else {
                    Event::Lost { wiped: true }
                };
                next.step(id, event);
            }
            Action::Wipe(id) => {
                next.left.wipes -= 1;
                let i = next.instances.get_mut(&id)?;
                i.wal.clear();
                i.whole = false;
                i.upstream = None;
                i.copying = None;
                next.step(id, Event::Lost { wiped: true });
            }
            Action::Wish(id) => {
                next.left.wishes -= 1;
                next.step(id, Event::Wish(self.wish.clone()?));
            }
        }
        (next != *s).then_some(next)
    }

    fn properties(&self) -> Vec<Property<Self>> {
        vec![
            Property::always("nothing acknowledged is lost", |_, s: &State| {
                s.failure != Some(Failure::Lost)
            }),
            Property::always("one configuration per term and version", |_, s: &State| {
                s.failure != Some(Failure::TwoConfigurations)
            }),
            Property::always("one primary per term", |_, s: &State| {
                s.failure != Some(Failure::TwoPrimaries)
            }),
            Property::always("no promotion outside may_be_primary", |_, s: &State| {
                s.failure != Some(Failure::NotPermitted)
            }),
            Property::always(
                "no promotion before the rule is in force",
                |_, s: &State| s.failure != Some(Failure::Unruled),
            ),
            Property::sometimes("another primary acknowledges", |_, s: &State| {
                s.acknowledged.iter().any(|(term, _, _)| *term > 1)
            }),
        ]
    }
}
