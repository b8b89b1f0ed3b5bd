//! How entries are bound to each other, when another is due, how many are kept, and how all of it is checked.
//!
//! Owns the link (each entry names the hash of the one before), the change of keys (an entry signed with the old one
//! introduces the new one, with which the next is signed), the bound on what is kept, and the exported file.
//! Never reads a clock: the time is an argument.

use std::collections::{BTreeMap, BTreeSet};

use jiff::{SignedDuration, Timestamp};
use serde::{Deserialize, Serialize};

use super::seal::{Envelope, NamedKey, PublicKey, SealError};
use super::{Body, Content, EntryRef, Statement, StoreRef, Verdict};

/// An entry is made at least this often. Passes come every minute and may take a while: it is an hour at the most.
const INTERVAL: SignedDuration = SignedDuration::from_mins(57);
/// A change is written at once unless another entry was made this recently, so that a store that is being rolled
/// or flaps doesn't push its own history out. What turns out to be outside doesn't wait, nor does a store's end.
const GAP: SignedDuration = SignedDuration::from_secs(30);
/// An unchanged entry refers to one that says it in full; that one is at most this old.
const FULL: SignedDuration = SignedDuration::from_hours(24);
/// Bytes kept per store, names of keys included. A ConfigMap takes 1 MiB:
/// <https://kubernetes.io/docs/concepts/configuration/configmap/>.
pub const BUDGET: usize = 768 << 10;

/// The end of a chain, as it is needed to go on.
#[derive(Clone, Debug, PartialEq)]
pub struct Tail {
    /// Sequence number of the last entry.
    pub sequence: u64,
    /// Its hash.
    pub hash: String,
    /// When what it says was observed.
    pub observed_at: Timestamp,
    /// Id of the key that the next entry is to be signed with.
    pub key: String,
    /// Whether it introduced that key: the change is completed with the next entry.
    pub introduced: bool,
    /// The latest entry that says all in full.
    pub full: EntryRef,
    /// When that was observed.
    pub full_at: Timestamp,
    /// What it says.
    pub content: Content,
}

impl Tail {
    /// The end of a chain that now has this entry too.
    ///
    /// # Errors
    /// If the entry refers to another one than `before` has in full.
    pub fn after(
        before: Option<&Tail>,
        envelope: &Envelope,
        statement: &Statement,
    ) -> Result<Self, SealError> {
        let hash = envelope.hash()?;
        let (full, full_at, content) = match &statement.content {
            Body::Full(content) => (
                EntryRef {
                    sequence: statement.sequence,
                    hash: hash.clone(),
                },
                statement.observed_at,
                (**content).clone(),
            ),
            Body::Same(reference) => {
                let before = before.filter(|t| t.full == *reference).ok_or_else(|| {
                    SealError::Statement(format!(
                        "it says the same as entry {}, which isn't the latest that says all in full",
                        reference.sequence
                    ))
                })?;
                (before.full.clone(), before.full_at, before.content.clone())
            }
        };
        let introduced = statement.introduces.as_ref().map(|k| k.keyid.clone());
        Ok(Self {
            sequence: statement.sequence,
            hash,
            observed_at: statement.observed_at,
            introduced: introduced.is_some(),
            key: introduced.unwrap_or_else(|| envelope.keyid().to_owned()),
            full,
            full_at,
            content,
        })
    }
}

/// Whether an entry is to be made now: none was, the last is nearly an hour old (or from the future: a clock was
/// set back), what would be said differs, or a change of keys is to be completed.
#[must_use]
pub fn due(last: Option<&Tail>, content: &Content, now: Timestamp) -> bool {
    let Some(last) = last else { return true };
    let age = now.duration_since(last.observed_at);
    if age < SignedDuration::ZERO || age >= INTERVAL || last.introduced {
        return true;
    }
    let worse = content.verdict == Verdict::Outside && last.content.verdict != Verdict::Outside;
    // Of a store that goes, the last word is what it left behind: nobody comes back to say it later.
    last.content != *content && (worse || content.deleting || age >= GAP)
}

/// Who makes an entry, and when.
#[derive(Clone, Debug)]
pub struct Maker {
    /// Program and version.
    pub program: String,
    /// The operator process.
    pub operator: String,
    /// Of which store.
    pub store: StoreRef,
    /// When everything was observed.
    pub now: Timestamp,
}

/// The next entry's statement. `note`: see [`Statement::note`].
#[must_use]
pub fn next(
    last: Option<&Tail>,
    content: Content,
    maker: Maker,
    note: Option<String>,
    introduces: Option<NamedKey>,
) -> Statement {
    let recent = |t: &Tail| {
        t.content == content && maker.now.duration_since(t.full_at).abs() < FULL && note.is_none()
    };
    let same = last.filter(|t| recent(t)).map(|t| t.full.clone());
    Statement {
        sequence: last.map_or(0, |t| t.sequence).saturating_add(1),
        previous: last.map(|t| t.hash.clone()),
        note,
        observed_at: maker.now,
        program: maker.program,
        operator: maker.operator,
        store: maker.store,
        introduces,
        content: match same {
            Some(reference) => Body::Same(reference),
            None => Body::Full(Box::new(content)),
        },
    }
}

/// Which of the kept entries, oldest first with their sizes in bytes and whether they say all in full, must go so
/// that `adding` more bytes fit into `budget`: how many of the oldest. What is left begins with a full one.
#[must_use]
pub fn surplus(kept: &[(usize, bool)], adding: usize, budget: usize) -> usize {
    let mut total = adding + kept.iter().map(|(size, _)| size).sum::<usize>();
    let mut gone = 0;
    while let Some((size, full)) = kept.get(gone) {
        if total <= budget && *full {
            break;
        }
        total -= size;
        gone += 1;
    }
    gone
}

/// A chain as it is exported.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Export {
    /// Always [`FORMAT`].
    pub format: String,
    /// The keys with which the entries are signed, and no others, by id.
    pub keys: Vec<NamedKey>,
    /// The entries, oldest first.
    pub entries: Vec<Envelope>,
}

/// The format of an exported file.
pub const FORMAT: &str = "domicile.dev/attestations.v1";

impl Export {
    /// Of these entries, with those of the keys that they are signed with.
    #[must_use]
    pub fn new(entries: Vec<Envelope>, keys: &BTreeMap<String, PublicKey>) -> Self {
        let used: BTreeSet<&str> = entries.iter().map(Envelope::keyid).collect();
        Self {
            format: FORMAT.to_owned(),
            keys: keys
                .iter()
                .filter(|(id, _)| used.contains(id.as_str()))
                .map(|(_, key)| key.into())
                .collect(),
            entries,
        }
    }
}

/// What the reader of a file knows from elsewhere.
#[derive(Clone, Debug, Default)]
pub struct Known {
    /// Ids of keys that are the operator's. Empty: the first entry's key is taken for it.
    pub keys: BTreeSet<String>,
    /// Hash of the entry that is last.
    pub head: Option<String>,
    /// Hash of an entry that was seen before: the file must hold it, or begin right behind it.
    pub since: Option<String>,
}

/// An entry that holds.
#[derive(Clone, Debug)]
pub struct Checked {
    /// Its hash.
    pub hash: String,
    /// Id of the key it is signed with.
    pub key: String,
    /// What it says.
    pub statement: Statement,
    /// What it says in full, its own or another's words.
    pub content: Content,
}

/// Why a file can't be believed.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Broken {
    /// Not of one entry.
    #[error("{0}")]
    File(String),
    /// Of this entry.
    #[error("entry {index} of the file (it says of itself: {claims}): {why}")]
    Entry {
        /// Its place in the file, from 1.
        index: usize,
        /// The sequence number in it, whether or not that is true.
        claims: String,
        /// Why.
        why: String,
    },
}

/// Checks a whole file: every signature, every link, every number, every key.
///
/// # Errors
/// The first thing that doesn't hold.
pub fn verify(export: &Export, known: &Known) -> Result<Vec<Checked>, Broken> {
    let file = |why: String| Err(Broken::File(why));
    if export.format != FORMAT {
        return file(format!("the file's format is not {FORMAT}"));
    }
    if export.entries.is_empty() {
        return file("the file has no entries".to_owned());
    }
    let mut keys = BTreeMap::new();
    for named in &export.keys {
        let key = named
            .open()
            .map_err(|e| Broken::File(format!("key {}: {e}", named.keyid)))?;
        if keys.insert(named.keyid.as_str(), key).is_some() {
            return file(format!("key {} is there twice", named.keyid));
        }
    }
    let mut checked: Vec<Checked> = Vec::new();
    let mut tail: Option<Tail> = None;
    for (index, envelope) in export.entries.iter().enumerate() {
        let entry = |why: String| Broken::Entry {
            index: index + 1,
            claims: envelope
                .read()
                .map_or_else(|_| "nothing".to_owned(), |s| s.sequence.to_string()),
            why,
        };
        let key = keys.get(envelope.keyid()).ok_or_else(|| {
            entry(format!(
                "it is signed with key {}, which the file doesn't have",
                envelope.keyid()
            ))
        })?;
        let statement = envelope.open(key).map_err(|e| entry(e.to_string()))?;
        trusted(envelope.keyid(), tail.as_ref(), known).map_err(entry)?;
        if let Some(introduced) = &statement.introduces {
            introduced
                .open()
                .map_err(|e| entry(format!("the key that it introduces: {e}")))?;
        }
        if let (Some(last), Some(before)) = (&tail, checked.last()) {
            follows(&statement, last, &before.statement).map_err(entry)?;
        }
        let now =
            Tail::after(tail.as_ref(), envelope, &statement).map_err(|e| entry(e.to_string()))?;
        checked.push(Checked {
            hash: now.hash.clone(),
            key: envelope.keyid().to_owned(),
            content: now.content.clone(),
            statement,
        });
        tail = Some(now);
    }
    let used: BTreeSet<&str> = checked.iter().map(|c| c.key.as_str()).collect();
    if let Some(unused) = keys.keys().find(|id| !used.contains(*id)) {
        return file(format!("key {unused} signs none of the entries"));
    }
    anchored(&checked, known)?;
    Ok(checked)
}

/// Whether a key may sign the entry behind `last`.
fn trusted(key: &str, last: Option<&Tail>, known: &Known) -> Result<(), String> {
    if known.keys.contains(key) || last.is_some_and(|t| t.key == key) {
        return Ok(());
    }
    match last {
        None if known.keys.is_empty() => Ok(()),
        None => Err(format!(
            "it is signed with key {key}, which is none of those that you gave"
        )),
        Some(last) => Err(format!(
            "it is signed with key {key}, but the entry before asks for key {}: the operator lost its key, or somebody else made this entry. If you know both keys to be the operator's, give both",
            last.key
        )),
    }
}

/// Whether an entry follows the one before.
fn follows(statement: &Statement, last: &Tail, before: &Statement) -> Result<(), String> {
    if statement.sequence != last.sequence.saturating_add(1) {
        return Err(format!(
            "it must be number {}, the one after {}: entries are missing, doubled or out of order",
            last.sequence.saturating_add(1),
            last.sequence
        ));
    }
    if statement.previous.as_ref() != Some(&last.hash) {
        return Err("it follows another entry than the one before it in the file".to_owned());
    }
    let name = |s: &Statement| (s.store.namespace.clone(), s.store.name.clone());
    if name(statement) != name(before) {
        return Err("it speaks of another store than the one before it".to_owned());
    }
    Ok(())
}

fn anchored(checked: &[Checked], known: &Known) -> Result<(), Broken> {
    let (Some(first), Some(last)) = (checked.first(), checked.last()) else {
        return Ok(());
    };
    if let Some(head) = known.head.as_ref().filter(|head| **head != last.hash) {
        let inside = checked.iter().find(|c| c.hash == *head);
        return Err(Broken::File(match inside {
            Some(entry) => format!(
                "entry {} has the hash that you gave, but entries follow it",
                entry.statement.sequence
            ),
            None => format!(
                "the last entry is {} with hash {}, not the one that you gave: entries are missing at the end, or this is another chain",
                last.statement.sequence, last.hash
            ),
        }));
    }
    if let Some(since) = &known.since {
        let held = checked.iter().any(|c| c.hash == *since)
            || first.statement.previous.as_ref() == Some(since);
        if !held {
            return Err(Broken::File(format!(
                "the entry with hash {since} is neither in the file nor the one before its first, which is number {}: entries between are missing, or this is another chain",
                first.statement.sequence
            )));
        }
    }
    Ok(())
}
