//! What comes from outside: the peers, the manager, the store's object.
//!
//! Owns addresses, and what of the store's object is a wish to the protocol. Never: believes a name that isn't in a
//! certificate.

use super::*;

impl Agent {
    pub(super) fn heard(&mut self, event: PeerEvent) -> Option<Event<String>> {
        match event {
            PeerEvent::Message { from, body } => {
                let Ok(envelope) = Envelope::decode(&body) else {
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

    pub(super) fn learn(&mut self, name: &str, address: IpAddr) {
        if self.addresses.insert(name.to_owned(), address) != Some(address) {
            self.place_peers();
            // The upstream may be back with another address.
            if let Some(following) = &self.following
                && following.name == name
                && let Local::Following { upstream, .. } = self.node.local()
            {
                let upstream = upstream.clone();
                self.follow(&upstream, None);
            }
        }
    }

    pub(super) fn place_peers(&self) {
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

    pub(super) async fn told(&mut self, input: Input) -> Option<Event<String>> {
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
            Input::Ended {
                postmaster,
                by_agent,
            } => {
                self.hands.session = Arc::default();
                // One that this agent stopped itself is reported by the operation that stopped it.
                if !by_agent {
                    self.end(postmaster).await;
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

    pub(super) fn durability(&self) -> Durability {
        match self.store.as_ref().map(|s| s.spec.durability) {
            Some(Wished::Preferred) => Durability::Preferred,
            Some(Wished::Required) | None => Durability::Required,
        }
    }

    pub(super) fn detection(&self) -> u32 {
        self.store
            .as_ref()
            .and_then(|s| u32::try_from(s.spec.failover.detection_seconds).ok())
            .unwrap_or(3)
    }

    pub(super) fn timing(&self) -> Timing {
        Timing::new(u64::from(self.detection()) * 1_000)
    }

    /// The store's object: addresses, timing, and what it asks for.
    pub(super) async fn take_store(&mut self, new: Arc<PrivacyDataStore>) -> Option<Event<String>> {
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
    pub(super) fn asked(&mut self) -> Option<Event<String>> {
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
    pub(super) fn switchover(&mut self, store: &PrivacyDataStore) -> Option<Event<String>> {
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
    pub(super) fn wish(&mut self, store: &PrivacyDataStore) -> Wish<String> {
        let present = self.node.durable().configuration.clone();
        let present = present.as_ref();
        let mut wish = Wish {
            durability: self.durability(),
            ..Wish::default()
        };
        for entry in store.status.iter().flat_map(|s| &s.instances) {
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
            if entry.may_be_primary == Some(false) {
                wish.barred.extend(ids.iter().cloned());
            }
            if entry.leaving == Some(true) {
                continue;
            }
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
}
