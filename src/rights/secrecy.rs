//! Keys of a workflow: identifiers encrypted per request, keyed hashes.
//!
//! Each request has a key of its own, which encrypts its identifiers, and lies beside them wrapped by the key of the
//! day it was filed on (its epoch). Both are bound to the request's id. Once a request ends, both are removed; what
//! remains of them in logs, standbys and backups is unreadable once the day's key is destroyed.
//! Never: shows a key or an identifier, in an error or otherwise. `ring` doesn't overwrite the keys that it holds when
//! they are dropped; what passes through here by itself is overwritten.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail, ensure};
use jiff::Timestamp;
use jiff::civil::Date;
use jiff::tz::TimeZone;
use ring::aead::{AES_256_GCM, Aad, LessSafeKey, NONCE_LEN, Nonce, UnboundKey};
use ring::hmac;
use ring::rand::{SecureRandom as _, SystemRandom};
use uuid::Uuid;
use zeroize::Zeroizing;

use super::ledger::types::{Hash, SealedFiling};
use super::model::{Filing, Identifiers};

/// Bytes of every key.
const KEY: usize = 32;
/// How long the files are taken for unchanged.
const FRESH: Duration = Duration::from_secs(1);
/// Plaintexts are padded to a multiple of this, so that a ciphertext's length says little.
const BLOCK: usize = 64;
/// First byte of everything encrypted: how it was.
const FORM: u8 = 1;
/// Name of the file with the key of the hashes.
const HASH: &str = "hash";
/// What precedes the day in the name of an epoch's file.
const EPOCH: &str = "epoch-";

/// Why something can't be encrypted or decrypted.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SecrecyError {
    /// No key for today. The operator makes one for today and tomorrow.
    #[error(
        "there is no key for {0}: the operator makes one every day, in the Secret of the workflow's keys"
    )]
    NoKey(Date),
    /// The key of that day was destroyed, or isn't in the pod yet.
    #[error(
        "the key of {0} isn't in the pod: it was destroyed, or will be there within a minute or two"
    )]
    KeyGone(Date),
    /// Changed, of another request, or by another key.
    #[error("the identifiers don't open: they were changed, or belong to another request or key")]
    Sealed,
    /// The system gave no random bytes, or the text is too long.
    #[error("can't encrypt")]
    Encrypt,
}

/// The keys, as they are in their directory now. Cheap to clone.
#[derive(Clone)]
pub struct Keyring {
    dir: PathBuf,
    known: Arc<Mutex<Known>>,
}

struct Known {
    keys: Arc<Keys>,
    read: Instant,
    /// What was last wrong with the files: said once, not every second.
    complaint: Option<String>,
}

struct Keys {
    hash: hmac::Key,
    epochs: BTreeMap<Date, LessSafeKey>,
}

impl std::fmt::Debug for Keyring {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Keyring(..)")
    }
}

impl Keyring {
    /// Reads the keys: `hash`, and `epoch-YYYY-MM-DD` of each day. Later they are read again when they changed.
    ///
    /// # Errors
    /// If `hash` isn't there, or a key hasn't 32 bytes: which.
    pub fn read(dir: &Path) -> anyhow::Result<Self> {
        let keys = Arc::new(Keys::read(dir)?);
        Ok(Self {
            dir: dir.to_owned(),
            known: Arc::new(Mutex::new(Known {
                keys,
                read: Instant::now(),
                complaint: None,
            })),
        })
    }

    /// The keys; read again if they are older than that. A directory that can't be read leaves what is known.
    fn keys(&self, fresh: Duration) -> Arc<Keys> {
        let mut known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        if known.read.elapsed() >= fresh {
            match Keys::read(&self.dir) {
                Ok(keys) => {
                    known.keys = Arc::new(keys);
                    known.complaint = None;
                }
                Err(e) => {
                    let words = format!("{e:#}");
                    if known.complaint.as_ref() != Some(&words) {
                        tracing::warn!("goes on with the keys it has: {words}");
                        known.complaint = Some(words);
                    }
                }
            }
            known.read = Instant::now();
        }
        known.keys.clone()
    }

    /// Encrypts a filing's identifiers and hashes what the ledger must compare. The clocks are the deadlines' business.
    ///
    /// # Errors
    /// If there is no key for today.
    pub fn seal(
        &self,
        filing: &Filing,
        acknowledge_by: Option<Timestamp>,
        answer_by: Timestamp,
    ) -> Result<SealedFiling, SecrecyError> {
        let today = Timestamp::now().to_zoned(TimeZone::UTC).date();
        self.seal_on(today, filing, acknowledge_by, answer_by)
    }

    fn seal_on(
        &self,
        today: Date,
        filing: &Filing,
        acknowledge_by: Option<Timestamp>,
        answer_by: Timestamp,
    ) -> Result<SealedFiling, SecrecyError> {
        let mut keys = self.keys(FRESH);
        if !keys.epochs.contains_key(&today) {
            keys = self.keys(Duration::ZERO);
        }
        let (key_epoch, epoch_key) = keys.of_today(today).ok_or(SecrecyError::NoKey(today))?;

        let random = SystemRandom::new();
        let mut own = Zeroizing::new([0_u8; KEY]);
        random
            .fill(&mut own[..])
            .map_err(|_| SecrecyError::Encrypt)?;
        let own_key = key(&own[..]).ok_or(SecrecyError::Encrypt)?;
        let mut text = Zeroizing::new(
            serde_json::to_vec(&filing.identifiers).map_err(|_| SecrecyError::Encrypt)?,
        );
        // JSON may end in spaces.
        let padded = text.len().next_multiple_of(BLOCK);
        text.resize(padded, b' ');
        let sealed = encrypt(&own_key, &text, &bound("identifiers", filing.id, None))?;
        let wrapped_key = encrypt(
            epoch_key,
            &own[..],
            &bound("key", filing.id, Some(key_epoch)),
        )?;

        let hashes = filing
            .identifiers
            .0
            .iter()
            .map(|(name, value)| (name.clone(), keys.hash(name, value)))
            .collect();
        Ok(SealedFiling {
            id: filing.id,
            kind: filing.kind,
            regimes: filing.regimes.clone(),
            channel: filing.channel,
            received_at: filing.received_at,
            needs_approval: filing.needs_approval,
            acknowledge_by,
            answer_by,
            subject: keys.subject(&filing.identifiers),
            idempotency: filing
                .idempotency_key
                .as_ref()
                .map(|k| keys.digest("idempotency", [k.as_str()])),
            content: keys.content(filing),
            key_epoch,
            wrapped_key,
            sealed,
            hashes,
        })
    }

    /// Decrypts the identifiers of a request.
    ///
    /// # Errors
    /// If its day's key isn't there, or what was encrypted isn't of this request or was changed.
    pub fn open(
        &self,
        request: Uuid,
        key_epoch: Date,
        wrapped_key: &[u8],
        sealed: &[u8],
    ) -> Result<Identifiers, SecrecyError> {
        let mut keys = self.keys(FRESH);
        if !keys.epochs.contains_key(&key_epoch) {
            keys = self.keys(Duration::ZERO);
        }
        let epoch_key = keys
            .epochs
            .get(&key_epoch)
            .ok_or(SecrecyError::KeyGone(key_epoch))?;
        let own = decrypt(
            epoch_key,
            wrapped_key,
            &bound("key", request, Some(key_epoch)),
        )?;
        let own_key = key(&own).ok_or(SecrecyError::Sealed)?;
        let text = decrypt(&own_key, sealed, &bound("identifiers", request, None))?;
        // The error isn't passed on: it could quote the text.
        serde_json::from_slice(&text).map_err(|_| SecrecyError::Sealed)
    }

    /// The keyed hash of one identifier: what the list of who was erased holds. Of the value as it is, upper and lower
    /// case included.
    #[must_use]
    pub fn hash(&self, name: &str, value: &str) -> Hash {
        self.keys(FRESH).hash(name, value)
    }

    /// Days for which there is a key.
    #[must_use]
    pub fn epochs(&self) -> Vec<Date> {
        self.keys(FRESH).epochs.keys().copied().collect()
    }
}

impl Keys {
    fn read(dir: &Path) -> anyhow::Result<Self> {
        let entries =
            std::fs::read_dir(dir).with_context(|| format!("can't read {}", dir.display()))?;
        let mut epochs = BTreeMap::new();
        for entry in entries {
            let name = entry
                .with_context(|| format!("can't read {}", dir.display()))?
                .file_name();
            let Some(day) = name.to_str().and_then(|n| n.strip_prefix(EPOCH)) else {
                continue;
            };
            let path = dir.join(&name);
            let day: Date = day.parse().ok().with_context(|| {
                format!("{} is named after no day: epoch-YYYY-MM-DD", path.display())
            })?;
            // Gone since it was listed: the kubelet exchanges all files at once.
            let Some(bytes) = read_key(&path)? else {
                continue;
            };
            let key =
                key(&bytes[..]).with_context(|| format!("{} is no AES-256 key", path.display()))?;
            epochs.insert(day, key);
        }
        let path = dir.join(HASH);
        let Some(bytes) = read_key(&path)? else {
            bail!("{} isn't there", path.display());
        };
        Ok(Self {
            hash: hmac::Key::new(hmac::HMAC_SHA256, &bytes[..]),
            epochs,
        })
    }

    /// Today's key. If it isn't there, tomorrow's: this clock may be late. Or yesterday's: the operator may be. No
    /// older one, because a key is destroyed at two days of age when no request uses it, and a request that is just
    /// being filed isn't counted yet.
    fn of_today(&self, today: Date) -> Option<(Date, &LessSafeKey)> {
        [Ok(today), today.tomorrow(), today.yesterday()]
            .into_iter()
            .filter_map(Result::ok)
            .find_map(|day| self.epochs.get(&day).map(|key| (day, key)))
    }

    fn hash(&self, name: &str, value: &str) -> Hash {
        self.digest("identifier", [name, value])
    }

    fn subject(&self, identifiers: &Identifiers) -> Hash {
        let parts = identifiers
            .0
            .iter()
            .flat_map(|(name, value)| [name.as_str(), value.as_str()]);
        self.digest("subject", parts)
    }

    /// What is asked, for whom, under which laws, by which channel. Not when: a repetition comes later.
    fn content(&self, filing: &Filing) -> Hash {
        let mut regimes: Vec<String> = filing.regimes.iter().map(super::ledger::word).collect();
        regimes.sort();
        regimes.dedup();
        let head = [
            super::ledger::word(&filing.kind),
            super::ledger::word(&filing.channel),
            regimes.join(","),
        ];
        let identifiers = filing
            .identifiers
            .0
            .iter()
            .flat_map(|(name, value)| [name.as_str(), value.as_str()]);
        self.digest(
            "content",
            head.iter().map(String::as_str).chain(identifiers),
        )
    }

    /// Each part with its length, so that no two lists are the same bytes; each use with a name of its own.
    fn digest<'a>(&self, purpose: &'a str, parts: impl IntoIterator<Item = &'a str>) -> Hash {
        let mut context = hmac::Context::with_key(&self.hash);
        for part in std::iter::once(purpose).chain(parts) {
            context.update(&(part.len() as u64).to_be_bytes());
            context.update(part.as_bytes());
        }
        let mut hash = [0; 32];
        hash.copy_from_slice(context.sign().as_ref());
        hash
    }
}

/// A key's bytes; `None`: there is no such file.
fn read_key(path: &Path) -> anyhow::Result<Option<Zeroizing<Vec<u8>>>> {
    let bytes = crate::instance::files::read_bounded(path, 4096)
        .with_context(|| format!("can't read {}", path.display()))?
        .map(Zeroizing::new);
    if let Some(bytes) = &bytes {
        ensure!(
            bytes.len() == KEY,
            "{} has {} bytes and must have {KEY}, as they are, in no encoding",
            path.display(),
            bytes.len()
        );
    }
    Ok(bytes)
}

fn key(bytes: &[u8]) -> Option<LessSafeKey> {
    UnboundKey::new(&AES_256_GCM, bytes)
        .ok()
        .map(LessSafeKey::new)
}

/// What a ciphertext is bound to: its purpose and its request, and a wrapped key to its day.
fn bound(purpose: &str, request: Uuid, epoch: Option<Date>) -> Vec<u8> {
    let day = epoch.map(|e| e.to_string()).unwrap_or_default();
    [
        b"domicile.dev/rights/1/",
        purpose.as_bytes(),
        b"/",
        day.as_bytes(),
        b"/",
        request.as_bytes(),
    ]
    .concat()
}

/// Form, nonce, ciphertext, tag. Nonces are random: a day's key would have to wrap four thousand million keys before
/// two of them were the same with a probability that matters, and a request's own key encrypts once.
fn encrypt(key: &LessSafeKey, text: &[u8], bound: &[u8]) -> Result<Vec<u8>, SecrecyError> {
    let mut nonce = [0; NONCE_LEN];
    SystemRandom::new()
        .fill(&mut nonce)
        .map_err(|_| SecrecyError::Encrypt)?;
    let mut out = Vec::with_capacity(1 + NONCE_LEN + text.len() + AES_256_GCM.tag_len());
    out.push(FORM);
    out.extend_from_slice(&nonce);
    let mut bytes = Zeroizing::new(text.to_vec());
    let tag = key
        .seal_in_place_separate_tag(
            Nonce::assume_unique_for_key(nonce),
            Aad::from(bound),
            &mut bytes,
        )
        .map_err(|_| SecrecyError::Encrypt)?;
    out.extend_from_slice(&bytes);
    out.extend_from_slice(tag.as_ref());
    Ok(out)
}

fn decrypt(
    key: &LessSafeKey,
    encrypted: &[u8],
    bound: &[u8],
) -> Result<Zeroizing<Vec<u8>>, SecrecyError> {
    let rest = encrypted
        .strip_prefix(&[FORM])
        .ok_or(SecrecyError::Sealed)?;
    let (nonce, rest) = rest
        .split_at_checked(NONCE_LEN)
        .ok_or(SecrecyError::Sealed)?;
    let nonce = Nonce::try_assume_unique_for_key(nonce).map_err(|_| SecrecyError::Sealed)?;
    let mut bytes = Zeroizing::new(rest.to_vec());
    let length = key
        .open_in_place(nonce, Aad::from(bound), &mut bytes)
        .map_err(|_| SecrecyError::Sealed)?
        .len();
    bytes.truncate(length);
    Ok(bytes)
}

#[cfg(test)]
mod tests;
