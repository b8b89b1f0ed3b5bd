//! Attests what a pass saw, on change and at least hourly.
//!
//! Owns the ConfigMap `STORE-attestations` and what this process remembers of each store's chain. What is said is
//! `residency::attestation`'s business.
//! Never holds up or fails a pass: what doesn't succeed is said in the condition Attested and tried again in the next
//! one. Never writes over what another operator wrote: every write carries the version that was read. Never goes on
//! from an entry that isn't the last one that it knows: what was changed by another hand begins anew, and says so.

mod ask;
mod evidence;
mod keyring;

use std::collections::{BTreeMap, HashMap};
use std::sync::{Mutex, PoisonError};

use anyhow::Context as _;
use jiff::Timestamp;
use k8s_openapi::api::core::v1::ConfigMap;
use kube::api::{Patch, PatchParams, PostParams};
use kube::runtime::events::{Event, EventType};
use kube::{Api, Resource, ResourceExt};
use serde_json::{Map, Value, json};

use super::observe::Observed;
use crate::api::conditions::{self, Verdict, reasons};
use crate::api::{labels, names};
use crate::operator::context::{Context, bounded, words};
use crate::residency::attestation::chain::{self, BUDGET, Maker, Tail};
use crate::residency::attestation::seal::{Envelope, NamedKey, PublicKey};
use crate::residency::attestation::{Body, Content, StoreRef};
use keyring::Keyring;

/// What attesting needs beside the client.
#[derive(Default)]
pub struct Attestor {
    /// The operator's own namespace: its key is there.
    pub namespace: String,
    /// Ends of chains, by namespace and name of the store.
    tails: Mutex<HashMap<(String, String), Tail>>,
}

impl Attestor {
    /// Of an operator in this namespace.
    #[must_use]
    pub fn new(namespace: &str) -> Self {
        Self {
            namespace: namespace.to_owned(),
            tails: Mutex::default(),
        }
    }

    fn with<T>(&self, act: impl FnOnce(&mut HashMap<(String, String), Tail>) -> T) -> T {
        act(&mut self.tails.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

/// Somebody else's ConfigMap has the name.
#[derive(Debug, thiserror::Error)]
#[error(
    "ConfigMap {0} exists and is not this store's: rename the store, or remove the ConfigMap if nobody needs it"
)]
struct Taken(String);

/// Attests what was observed, if that is due. `None`: it can't be now, and there is nothing to say about it.
pub async fn attest(ctx: &Context, observed: &Observed, now: Timestamp) -> Option<Verdict> {
    if observed.namespace_ending {
        // Nothing can be made there any more, and what is there goes with it.
        return None;
    }
    let store = Store::of(ctx, observed);
    Some(match store.attest(now).await {
        Ok(()) => Verdict::new(
            conditions::ATTESTED,
            true,
            reasons::AS_SPECIFIED,
            format!("signed and kept in ConfigMap {}", store.config_map),
        ),
        Err(error) => {
            let said = words(&error);
            tracing::warn!(store = %store.name, namespace = %store.namespace, error = said, "not attested");
            let reason = if error.is::<Taken>() {
                reasons::NAME_TAKEN
            } else {
                reasons::NOT_ATTESTED
            };
            Verdict::new(conditions::ATTESTED, false, reason, said)
        }
    })
}

/// One store, in this pass.
struct Store<'a> {
    ctx: &'a Context,
    observed: &'a Observed,
    namespace: String,
    name: String,
    config_map: String,
    api: Api<ConfigMap>,
}

impl<'a> Store<'a> {
    fn of(ctx: &'a Context, observed: &'a Observed) -> Self {
        let name = observed.store.name_any();
        let namespace = observed.store.namespace().unwrap_or_default();
        Self {
            ctx,
            observed,
            api: Api::namespaced(ctx.client.clone(), &namespace),
            config_map: names::attestations(&name),
            namespace,
            name,
        }
    }

    fn key(&self) -> (String, String) {
        (self.namespace.clone(), self.name.clone())
    }

    async fn attest(&self, now: Timestamp) -> anyhow::Result<()> {
        let reports = evidence::reports(self.observed).await;
        let content = evidence::content(self.observed, reports);
        // What this process wrote last is in memory: most passes read nothing more.
        let last = self.ctx.attestor.with(|t| t.get(&self.key()).cloned());
        if last.is_some() && !chain::due(last.as_ref(), &content, now) {
            return Ok(());
        }
        let keyring = keyring::read(&self.ctx.client, &self.ctx.attestor.namespace).await?;
        match self.append(&keyring, &content, now).await {
            Err(error) if outrun(&error) => self.append(&keyring, &content, now).await,
            done => done,
        }
    }

    /// Adds an entry to what is kept, if that is due by what is kept.
    async fn append(
        &self,
        keyring: &Keyring,
        content: &Content,
        now: Timestamp,
    ) -> anyhow::Result<()> {
        let kept = self.read().await?;
        let remembered = self.ctx.attestor.with(|t| t.get(&self.key()).cloned());
        let Footing {
            tail,
            note,
            anew,
            alarm,
        } = footing(kept.as_ref(), remembered, keyring);
        if note.is_none() && !chain::due(tail.as_ref(), content, now) {
            // Another operator process wrote it, mostly the one before this.
            if let Some(tail) = tail {
                self.ctx.attestor.with(|t| t.insert(self.key(), tail));
            }
            return Ok(());
        }
        let (signer, lost) = match tail.as_ref().map(|t| t.key.as_str()) {
            Some(key) => match keyring.get(key) {
                Some(signer) => (signer, None),
                None => (
                    keyring.current(),
                    Some(format!(
                        "the entries before ask for key {key}, which this operator doesn't have"
                    )),
                ),
            },
            None => (keyring.current(), None),
        };
        let introduces = (signer.public() != keyring.current().public())
            .then(|| NamedKey::from(&keyring.current().public()));
        let alarms: Vec<String> = [alarm.then(|| note.clone()).flatten(), lost.clone()]
            .into_iter()
            .flatten()
            .collect();
        let notes: Vec<String> = [note, lost].into_iter().flatten().collect();
        let maker = Maker {
            program: concat!("domicile ", env!("CARGO_PKG_VERSION")).to_owned(),
            operator: self.ctx.identity.clone(),
            store: StoreRef {
                namespace: self.namespace.clone(),
                name: self.name.clone(),
                uid: self.observed.store.uid().unwrap_or_default(),
            },
            now,
        };
        let note = (!notes.is_empty()).then(|| notes.join("; "));
        let statement = chain::next(tail.as_ref(), content.clone(), maker, note, introduces);
        let envelope = signer.sign(&statement)?;
        let tail = Tail::after(tail.as_ref(), &envelope, &statement)?;
        self.write(kept.as_ref(), anew, &envelope, &signer.public(), &tail)
            .await?;
        // The log is a second place for the hash: with it a reader knows that nothing is missing at the end.
        tracing::info!(
            store = %self.name, namespace = %self.namespace, sequence = tail.sequence, hash = %tail.hash,
            verdict = %content.verdict, "attested"
        );
        self.ctx.attestor.with(|t| t.insert(self.key(), tail));
        for alarm in alarms {
            self.warn(alarm).await;
        }
        Ok(())
    }

    async fn read(&self) -> anyhow::Result<Option<Kept>> {
        let found = bounded("read the attestations", self.api.get_opt(&self.config_map)).await?;
        let Some(found) = found else { return Ok(None) };
        let ours = found.labels().get(labels::ATTESTATIONS_OF) == Some(&self.name);
        if !ours {
            return Err(Taken(self.config_map.clone()).into());
        }
        Ok(Some(Kept::of(&found)))
    }

    async fn write(
        &self,
        kept: Option<&Kept>,
        anew: bool,
        envelope: &Envelope,
        key: &PublicKey,
        tail: &Tail,
    ) -> anyhow::Result<()> {
        let text = serde_json::to_string(envelope)?;
        let data = changes(kept, anew, (entry_key(tail.sequence), text), key);
        match kept {
            None => {
                let new = json!({
                    "apiVersion": "v1", "kind": "ConfigMap",
                    // No owner: it outlives the store, for those who ask where its data was.
                    "metadata": { "name": self.config_map, "namespace": self.namespace, "labels": {
                        labels::MANAGED_BY: labels::MANAGED_BY_VALUE, labels::ATTESTATIONS_OF: self.name,
                    } },
                    "data": data,
                });
                let new: ConfigMap = serde_json::from_value(new)?;
                let params = PostParams {
                    field_manager: Some(names::OPERATOR_FIELD_MANAGER.to_owned()),
                    ..PostParams::default()
                };
                bounded("keep the attestation", self.api.create(&params, &new)).await?;
            }
            Some(kept) => {
                let patch = json!({
                    "metadata": { "uid": kept.uid, "resourceVersion": kept.version }, "data": data,
                });
                let params = PatchParams {
                    field_manager: Some(names::OPERATOR_FIELD_MANAGER.to_owned()),
                    ..PatchParams::default()
                };
                let patch = Patch::Merge(patch);
                bounded(
                    "keep the attestation",
                    self.api.patch(&self.config_map, &params, &patch),
                )
                .await?;
            }
        }
        Ok(())
    }

    /// An event: a person should look.
    async fn warn(&self, what: String) {
        tracing::warn!(store = %self.name, namespace = %self.namespace, "attestations: {what}");
        let event = Event {
            type_: EventType::Warning,
            reason: "AttestationsBroken".to_owned(),
            note: Some(what.chars().take(900).collect()),
            action: "Attest".to_owned(),
            secondary: None,
        };
        let reference = self.observed.store.object_ref(&());
        let told = bounded(
            "write an event",
            self.ctx.recorder.publish(&event, &reference),
        )
        .await;
        if let Err(error) = told {
            tracing::warn!(store = %self.name, namespace = %self.namespace, error = words(&error), "event not written");
        }
    }
}

/// Somebody else wrote, made or removed the ConfigMap between reading and writing.
fn outrun(error: &anyhow::Error) -> bool {
    matches!(
        error.downcast_ref::<kube::Error>(),
        Some(kube::Error::Api(s)) if s.is_conflict() || s.is_already_exists() || s.is_not_found()
    )
}

/// Key of an entry in the ConfigMap. Their order is the order of the entries.
fn entry_key(sequence: u64) -> String {
    format!("{sequence:012}.json")
}

/// What a ConfigMap holds.
#[derive(Clone, Debug, Default)]
pub struct Kept {
    uid: Option<String>,
    version: Option<String>,
    /// Entries by their key.
    entries: BTreeMap<String, String>,
    /// Public keys by their key.
    keys: BTreeMap<String, String>,
}

/// What comes out of a ConfigMap that can be read.
pub struct Entries {
    /// The entries, oldest first.
    pub envelopes: Vec<Envelope>,
    /// The public keys beside them, by id.
    pub keys: BTreeMap<String, PublicKey>,
}

impl Kept {
    /// Of a ConfigMap.
    #[must_use]
    pub fn of(found: &ConfigMap) -> Self {
        let data = found.data.clone().unwrap_or_default();
        let (entries, rest): (BTreeMap<_, _>, BTreeMap<_, _>) =
            data.into_iter().partition(|(k, _)| k.ends_with(".json"));
        Self {
            uid: found.uid(),
            version: found.resource_version(),
            entries,
            keys: rest
                .into_iter()
                .filter(|(k, _)| k.ends_with(".pem"))
                .collect(),
        }
    }

    /// Reads all of it, without checking any of it.
    ///
    /// # Errors
    /// If an entry or a key can't be understood.
    pub fn entries(&self) -> anyhow::Result<Entries> {
        let mut envelopes = Vec::new();
        for (key, text) in &self.entries {
            envelopes.push(serde_json::from_str(text).with_context(|| key.clone())?);
        }
        let mut keys = BTreeMap::new();
        for (key, text) in &self.keys {
            let public = PublicKey::from_pem(text).with_context(|| key.clone())?;
            keys.insert(public.id(), public);
        }
        Ok(Entries { envelopes, keys })
    }

    fn entry(&self, key: &str) -> anyhow::Result<Envelope> {
        let text = self.entries.get(key);
        let text = text.with_context(|| format!("entry {key} isn't there"))?;
        serde_json::from_str(text).with_context(|| format!("entry {key}"))
    }

    /// The end of what is kept, if its last entry is signed and says where all is said in full. The rest is for
    /// whoever reads it to check: an entry that follows binds to the last one only.
    fn tail(&self, keyring: &Keyring) -> anyhow::Result<Option<Tail>> {
        let Some(last) = self.entries.keys().next_back() else {
            return Ok(None);
        };
        let envelope = self.entry(last)?;
        let statement = envelope.open(&self.public(&envelope, keyring)?)?;
        anyhow::ensure!(
            *last == entry_key(statement.sequence),
            "entry {last} says that it is number {}",
            statement.sequence
        );
        let before = match &statement.content {
            Body::Full(_) => None,
            Body::Same(full) => {
                let full = self.entry(&entry_key(full.sequence))?;
                let said = full.open(&self.public(&full, keyring)?)?;
                Some(Tail::after(None, &full, &said)?)
            }
        };
        Ok(Some(Tail::after(before.as_ref(), &envelope, &statement)?))
    }

    fn public(&self, envelope: &Envelope, keyring: &Keyring) -> anyhow::Result<PublicKey> {
        if let Some(key) = keyring.get(envelope.keyid()) {
            return Ok(key.public());
        }
        let name = format!("{}.pem", envelope.keyid());
        let pem = self.keys.get(&name);
        let pem = pem.with_context(|| format!("key {} isn't there", envelope.keyid()))?;
        Ok(PublicKey::from_pem(pem)?)
    }
}

/// From where a chain goes on.
#[derive(Debug, Default)]
struct Footing {
    tail: Option<Tail>,
    /// What the next entry says about that.
    note: Option<String>,
    /// Whether what is kept is left out from now on.
    anew: bool,
    /// Whether a person should hear of it.
    alarm: bool,
}

/// Decides from where a chain goes on: from what is kept, unless that isn't what this process wrote last or
/// something that came after.
fn footing(kept: Option<&Kept>, remembered: Option<Tail>, keyring: &Keyring) -> Footing {
    let found = kept.map_or(Ok(None), |k| k.tail(keyring));
    let broken = |note: String, tail: Option<Tail>| Footing {
        tail,
        note: Some(note),
        anew: true,
        alarm: true,
    };
    match (found, remembered) {
        (Err(why), remembered) => broken(
            format!("what was kept before doesn't hold and was left out: {why:#}"),
            remembered,
        ),
        (Ok(None), None) => Footing {
            note: Some("nothing was kept before".to_owned()),
            ..Footing::default()
        },
        (Ok(None), Some(remembered)) => broken(
            "the entries before were removed".to_owned(),
            Some(remembered),
        ),
        (Ok(Some(tail)), None) => Footing {
            tail: Some(tail),
            ..Footing::default()
        },
        (Ok(Some(tail)), Some(remembered)) => {
            let same = tail.sequence == remembered.sequence && tail.hash == remembered.hash;
            let later = tail.sequence > remembered.sequence && keyring.get(&tail.key).is_some();
            if same || later {
                Footing {
                    tail: Some(tail),
                    ..Footing::default()
                }
            } else {
                let note = format!(
                    "what was kept before ended with entry {}, not with the one that was written last, and was left out: somebody else changed it",
                    tail.sequence
                );
                broken(note, Some(remembered))
            }
        }
    }
}

/// The changes of the ConfigMap's data that add an entry, take out what no longer fits, and keep the public keys of
/// what is left.
fn changes(
    kept: Option<&Kept>,
    anew: bool,
    (key, text): (String, String),
    signer: &PublicKey,
) -> Map<String, Value> {
    let none = BTreeMap::new();
    let entries = kept.map_or(&none, |k| &k.entries);
    let parsed: Vec<(&String, Option<Envelope>)> = entries
        .iter()
        .map(|(k, t)| (k, serde_json::from_str::<Envelope>(t).ok()))
        .collect();
    let full = |e: &Option<Envelope>| {
        let said = e.as_ref().and_then(|e| e.read().ok());
        said.is_some_and(|s| matches!(s.content, Body::Full(_)))
    };
    let sizes: Vec<(usize, bool)> = parsed
        .iter()
        .map(|(k, e)| (k.len() + entries[*k].len(), full(e)))
        .collect();
    let pem = signer.to_pem();
    let keys: usize = kept.map_or(0, |k| k.keys.iter().map(|(k, t)| k.len() + t.len()).sum());
    let adding = key.len() + text.len() + keys + pem.len() + 128;
    let gone = if anew {
        parsed.len()
    } else {
        chain::surplus(&sizes, adding, BUDGET)
    };
    let mut data = Map::new();
    for (key, _) in &parsed[..gone] {
        data.insert((*key).clone(), Value::Null);
    }
    let used: Vec<String> = parsed[gone..]
        .iter()
        .filter_map(|(_, e)| e.as_ref().map(|e| format!("{}.pem", e.keyid())))
        .collect();
    for key in kept.map_or(&none, |k| &k.keys).keys() {
        if !used.contains(key) {
            data.insert(key.clone(), Value::Null);
        }
    }
    data.insert(format!("{}.pem", signer.id()), Value::String(pem));
    data.insert(key, Value::String(text));
    data
}
