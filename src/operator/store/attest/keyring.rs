//! The keys with which attestations are signed.
//!
//! Owns the Secret `domicile-attestation-key` and its public half, the ConfigMap `domicile-attestation-keys`, both in
//! the operator's own namespace. Keys are numbered; the highest signs, those below it only introduce it where they
//! signed last. A person adds one by adding a number.
//! Never logs a private key, never keeps one beyond the call that needs it, and never removes or replaces one.

use anyhow::Context as _;
use k8s_openapi::api::core::v1::{ConfigMap, Secret};
use kube::api::{Patch, PatchParams, PostParams};
use kube::{Api, Client};
use ring::rand::SystemRandom;
use ring::signature::Ed25519KeyPair;
use serde_json::{Map, Value, json};
use std::collections::BTreeMap;

use crate::api::{labels, names};
use crate::operator::context::bounded;
use crate::residency::attestation::seal::SigningKey;

/// The operator's keys. No `Debug`: it must not get into a log.
pub struct Keyring {
    current: SigningKey,
    /// Those that were current before.
    older: Vec<SigningKey>,
}

impl Keyring {
    /// The key that signs.
    pub fn current(&self) -> &SigningKey {
        &self.current
    }

    /// The key of this id.
    pub fn get(&self, id: &str) -> Option<&SigningKey> {
        self.all().find(|k| k.public().id() == id)
    }

    fn all(&self) -> impl Iterator<Item = &SigningKey> {
        self.older.iter().chain([&self.current])
    }

    /// From PEM texts by number.
    ///
    /// # Errors
    /// If there is none, or one isn't an Ed25519 key: the number is said, nothing of the key.
    pub fn new(texts: BTreeMap<u32, String>) -> anyhow::Result<Self> {
        let mut all = Vec::new();
        for (number, text) in texts {
            let key = SigningKey::from_pem(&text).with_context(|| {
                format!("key {number}.pem of Secret {}", names::ATTESTATION_KEY)
            })?;
            all.push(key);
        }
        let current = all.pop().with_context(|| {
            format!(
                "Secret {} has no key: it must have one named 1.pem; delete it and another is made, which those who check attestations must learn of",
                names::ATTESTATION_KEY
            )
        })?;
        Ok(Self {
            current,
            older: all,
        })
    }
}

/// Reads the keys; makes the first, if there is no Secret, and publishes their public halves.
///
/// # Errors
/// If that fails; no key is in the words.
pub async fn read(client: &Client, namespace: &str) -> anyhow::Result<Keyring> {
    let secrets: Api<Secret> = Api::namespaced(client.clone(), namespace);
    let name = names::ATTESTATION_KEY;
    let secret = match bounded("read the attestation key", secrets.get_opt(name)).await? {
        Some(secret) => secret,
        None => make(&secrets).await?,
    };
    let mut texts = BTreeMap::new();
    for (key, value) in secret.data.unwrap_or_default() {
        let number = key.strip_suffix(".pem").and_then(|n| n.parse().ok());
        if let Some(number) = number {
            let text = String::from_utf8(value.0)
                .map_err(|_| anyhow::anyhow!("key {key} of Secret {name} is not text"))?;
            texts.insert(number, text);
        }
    }
    let keyring = Keyring::new(texts)?;
    publish(client, namespace, &keyring).await?;
    Ok(keyring)
}

async fn make(secrets: &Api<Secret>) -> anyhow::Result<Secret> {
    let document = Ed25519KeyPair::generate_pkcs8(&SystemRandom::new())
        .map_err(|_| anyhow::anyhow!("no randomness for an attestation key"))?;
    let pem = pem::encode(&pem::Pem::new("PRIVATE KEY", document.as_ref()));
    let secret: Secret = serde_json::from_value(json!({
        "apiVersion": "v1", "kind": "Secret", "type": "Opaque",
        "metadata": { "name": names::ATTESTATION_KEY, "labels": { labels::MANAGED_BY: labels::MANAGED_BY_VALUE } },
        "stringData": { "1.pem": pem },
    }))?;
    let params = PostParams {
        field_manager: Some(names::OPERATOR_FIELD_MANAGER.to_owned()),
        ..PostParams::default()
    };
    match bounded("make the attestation key", secrets.create(&params, &secret)).await {
        Ok(made) => {
            tracing::info!(
                secret = names::ATTESTATION_KEY,
                "made a key for attestations"
            );
            Ok(made)
        }
        // Another pass, or another operator, was first: its key counts.
        Err(_) => bounded(
            "read the attestation key",
            secrets.get(names::ATTESTATION_KEY),
        )
        .await
        .context("the attestation key could neither be made nor read"),
    }
}

/// Adds to the published keys those that aren't there. None is ever taken out: what was signed with it stays.
async fn publish(client: &Client, namespace: &str, keyring: &Keyring) -> anyhow::Result<()> {
    let api: Api<ConfigMap> = Api::namespaced(client.clone(), namespace);
    let name = names::ATTESTATION_KEYS;
    let found = bounded("read the published keys", api.get_opt(name)).await?;
    let there = found
        .as_ref()
        .and_then(|f| f.data.clone())
        .unwrap_or_default();
    let missing: Map<String, Value> = keyring
        .all()
        .map(SigningKey::public)
        .map(|key| (format!("{}.pem", key.id()), key.to_pem()))
        .filter(|(id, pem)| there.get(id) != Some(pem))
        .map(|(id, pem)| (id, Value::String(pem)))
        .collect();
    if missing.is_empty() {
        return Ok(());
    }
    let object = json!({
        "apiVersion": "v1", "kind": "ConfigMap",
        "metadata": { "name": name, "labels": { labels::MANAGED_BY: labels::MANAGED_BY_VALUE } },
        "data": missing,
    });
    let manager = Some(names::OPERATOR_FIELD_MANAGER.to_owned());
    if found.is_none() {
        let params = PostParams {
            field_manager: manager,
            ..PostParams::default()
        };
        let object: ConfigMap = serde_json::from_value(object)?;
        bounded("publish the attestation key", api.create(&params, &object)).await?;
    } else {
        let params = PatchParams {
            field_manager: manager,
            ..PatchParams::default()
        };
        let patch = Patch::Merge(object);
        bounded(
            "publish the attestation key",
            api.patch(name, &params, &patch),
        )
        .await?;
    }
    Ok(())
}
