//! What a gateway does: files, reads, changes, lists.
//!
//! Owns the calls and how their parameters and rows are written. Never: decides anything; the decisions are the
//! functions' in `migrations/`, which see all there is in one transaction.

use std::time::Duration;

use jiff::Timestamp;
use jiff::civil::Date;
use serde::Serialize;
use serde::de::DeserializeOwned;
use tokio_postgres::Row;
use tokio_postgres::types::Type;
use uuid::Uuid;

use super::Ledger;
use super::error::LedgerError;
use super::pool::Call;
use super::types::{Changed, Cursor, Filed, ListFilter, Listed, RequestView, SealedFiling};
use crate::rights::config::Target;
use crate::rights::model::State;

/// The most filings of one call.
pub const MOST_FILINGS: usize = 1_000;
/// The most entries of one list.
pub const MOST_LISTED: u32 = 1_000;

const FILE: Call = Call {
    sql: "SELECT number, how, request FROM gateway.file($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, $12, $13, $14, \
          $15, $16, $17, $18)",
    types: &[
        Type::UUID_ARRAY,
        Type::TEXT_ARRAY,
        Type::TEXT_ARRAY,
        Type::TEXT_ARRAY,
        Type::BOOL_ARRAY,
        Type::TIMESTAMPTZ_ARRAY,
        Type::TIMESTAMPTZ_ARRAY,
        Type::TIMESTAMPTZ_ARRAY,
        Type::BYTEA_ARRAY,
        Type::BYTEA_ARRAY,
        Type::BYTEA_ARRAY,
        Type::DATE_ARRAY,
        Type::BYTEA_ARRAY,
        Type::BYTEA_ARRAY,
        Type::TEXT_ARRAY,
        Type::BYTEA_ARRAY,
        Type::TEXT_ARRAY,
        Type::TEXT_ARRAY,
    ],
    limit: Duration::from_secs(5),
};
const READ: Call = Call {
    sql: "SELECT gateway.read($1)",
    types: &[Type::UUID],
    limit: Duration::from_secs(3),
};
const WITHDRAW: Call = Call {
    sql: "SELECT gateway.withdraw($1)",
    types: &[Type::UUID],
    limit: Duration::from_secs(5),
};
const APPROVE: Call = Call {
    sql: "SELECT gateway.approve($1)",
    types: &[Type::UUID],
    limit: Duration::from_secs(5),
};
const EXTEND: Call = Call {
    sql: "SELECT gateway.extend($1, $2, $3)",
    types: &[Type::UUID, Type::TIMESTAMPTZ, Type::TEXT],
    limit: Duration::from_secs(5),
};
const LIST_OPEN: Call = Call {
    sql: "SELECT * FROM gateway.list_open($1, coalesce($2, 'infinity'), coalesce($3, '-infinity'), $4, $5)",
    types: &[
        Type::TEXT_ARRAY,
        Type::TIMESTAMPTZ,
        Type::TIMESTAMPTZ,
        Type::UUID,
        Type::INT4,
    ],
    limit: Duration::from_secs(5),
};
const LIST_ENDED: Call = Call {
    sql: "SELECT * FROM gateway.list_ended($1, coalesce($2, '-infinity'), $3, $4)",
    types: &[Type::TEXT, Type::TIMESTAMPTZ, Type::UUID, Type::INT4],
    limit: Duration::from_secs(5),
};

impl Ledger {
    /// Takes requests in, each with a step for every target: all of them in one transaction, on the quorum when this
    /// returns. One answer for each, in their order. Whoever gets an error asks again with the same filings, and
    /// learns by [`Filed::Same`] of those that were taken in after all.
    ///
    /// # Errors
    /// If the outcome isn't certain, or nothing was done: see [`LedgerError`]. `DR001`: there is no target.
    pub async fn file(
        &self,
        filings: &[SealedFiling],
        targets: &[Target],
    ) -> Result<Vec<Filed>, LedgerError> {
        if filings.is_empty() {
            return Ok(Vec::new());
        }
        if filings.len() > MOST_FILINGS {
            return Err(LedgerError::Refused("DR004".to_owned()));
        }
        let columns = Columns::of(filings);
        let (names, regions) = steps(targets);
        let rows = self
            .pool
            .rows(
                &FILE,
                &[
                    &columns.ids,
                    &columns.kinds,
                    &columns.regimes,
                    &columns.channels,
                    &columns.approvals,
                    &columns.received,
                    &columns.acknowledge,
                    &columns.answer,
                    &columns.subjects,
                    &columns.idempotencies,
                    &columns.contents,
                    &columns.epochs,
                    &columns.wrapped_keys,
                    &columns.sealeds,
                    &columns.names,
                    &columns.hashes,
                    &names,
                    &regions,
                ],
            )
            .await?;
        answers(filings.len(), &rows)
    }

    /// A request, if there is one of this id.
    ///
    /// # Errors
    /// See [`LedgerError`].
    pub async fn read(&self, id: Uuid) -> Result<Option<RequestView>, LedgerError> {
        let rows = self.pool.rows(&READ, &[&id]).await?;
        let found: Option<serde_json::Value> = match rows.first() {
            Some(row) => row.try_get(0)?,
            None => None,
        };
        found.map(view).transpose()
    }

    /// Takes a request back, for its subject. [`Changed::TooLate`] once one of its steps is done, settles, or is in a
    /// worker's hands: what is erased can't be taken back, and the record must not say that it was.
    ///
    /// # Errors
    /// See [`LedgerError`].
    pub async fn withdraw(&self, id: Uuid) -> Result<Changed, LedgerError> {
        changed(&self.pool.rows(&WITHDRAW, &[&id]).await?)
    }

    /// Lets a request that awaits approval be carried out.
    ///
    /// # Errors
    /// See [`LedgerError`].
    pub async fn approve(&self, id: Uuid) -> Result<Changed, LedgerError> {
        changed(&self.pool.rows(&APPROVE, &[&id]).await?)
    }

    /// Extends the legal deadline, once. Why is a word, not a text, which could be about the person: at most 64
    /// lower-case letters, digits and `-`.
    ///
    /// # Errors
    /// See [`LedgerError`]. `DR002`: it isn't later than the deadline; `23514`: why is no such word.
    pub async fn extend(
        &self,
        id: Uuid,
        extended_to: Timestamp,
        reason: &str,
    ) -> Result<Changed, LedgerError> {
        changed(
            &self
                .pool
                .rows(&EXTEND, &[&id, &extended_to, &reason])
                .await?,
        )
    }

    /// Requests by deadline, those that are ended in the order in which they ended; after that place, at most so many.
    ///
    /// # Errors
    /// See [`LedgerError`].
    pub async fn list(
        &self,
        filter: &ListFilter,
        after: Option<Cursor>,
        limit: u32,
    ) -> Result<Vec<Listed>, LedgerError> {
        let most = i32::try_from(limit.clamp(1, MOST_LISTED)).unwrap_or(1);
        let after_time = after.map(|a| a.at);
        let after_id = after.map_or(Uuid::nil(), |a| a.id);
        match filter.state {
            Some(state @ (State::Closed | State::Withdrawn)) => self
                .pool
                .rows(&LIST_ENDED, &[&word(&state), &after_time, &after_id, &most])
                .await?
                .iter()
                .map(|row| listed(row, true))
                .collect(),
            open => {
                let states = match open {
                    Some(state) => vec![word(&state)],
                    None => vec![word(&State::AwaitingApproval), word(&State::Open)],
                };
                self.pool
                    .rows(
                        &LIST_OPEN,
                        &[&states, &filter.due_before, &after_time, &after_id, &most],
                    )
                    .await?
                    .iter()
                    .map(|row| listed(row, false))
                    .collect()
            }
        }
    }
}

/// Filings, column by column: a thousand of them are one statement with as many parameters as one has.
struct Columns<'a> {
    ids: Vec<Uuid>,
    kinds: Vec<String>,
    regimes: Vec<String>,
    channels: Vec<String>,
    approvals: Vec<bool>,
    received: Vec<Timestamp>,
    acknowledge: Vec<Option<Timestamp>>,
    answer: Vec<Timestamp>,
    subjects: Vec<&'a [u8]>,
    idempotencies: Vec<Option<&'a [u8]>>,
    contents: Vec<&'a [u8]>,
    epochs: Vec<Date>,
    wrapped_keys: Vec<&'a [u8]>,
    sealeds: Vec<&'a [u8]>,
    names: Vec<String>,
    hashes: Vec<Vec<u8>>,
}

impl<'a> Columns<'a> {
    fn of(filings: &'a [SealedFiling]) -> Self {
        let each = filings.iter();
        Self {
            ids: each.clone().map(|f| f.id).collect(),
            kinds: each.clone().map(|f| word(&f.kind)).collect(),
            regimes: each
                .clone()
                .map(|f| f.regimes.iter().map(word).collect::<Vec<_>>().join(","))
                .collect(),
            channels: each.clone().map(|f| word(&f.channel)).collect(),
            approvals: each.clone().map(|f| f.needs_approval).collect(),
            received: each.clone().map(|f| f.received_at).collect(),
            acknowledge: each.clone().map(|f| f.acknowledge_by).collect(),
            answer: each.clone().map(|f| f.answer_by).collect(),
            subjects: each.clone().map(|f| &f.subject[..]).collect(),
            idempotencies: each
                .clone()
                .map(|f| f.idempotency.as_ref().map(|i| &i[..]))
                .collect(),
            contents: each.clone().map(|f| &f.content[..]).collect(),
            epochs: each.clone().map(|f| f.key_epoch).collect(),
            wrapped_keys: each.clone().map(|f| &f.wrapped_key[..]).collect(),
            sealeds: each.clone().map(|f| &f.sealed[..]).collect(),
            names: each
                .clone()
                .map(|f| {
                    let names: Vec<&str> = f.hashes.iter().map(|(name, _)| name.as_str()).collect();
                    names.join(",")
                })
                .collect(),
            hashes: each
                .map(|f| f.hashes.iter().flat_map(|(_, hash)| *hash).collect())
                .collect(),
        }
    }
}

/// Targets and their regions, each in one order: the ledger takes another order for another set.
fn steps(targets: &[Target]) -> (Vec<&str>, Vec<String>) {
    targets
        .iter()
        .map(|t| {
            let mut regions: Vec<&str> = t.regions.iter().map(String::as_str).collect();
            regions.sort_unstable();
            regions.dedup();
            (t.name.as_str(), regions.join(","))
        })
        .unzip()
}

fn answers(filings: usize, rows: &[Row]) -> Result<Vec<Filed>, LedgerError> {
    let mut answers = vec![None; filings];
    for row in rows {
        let (number, how, id): (i32, &str, Uuid) =
            (row.try_get(0)?, row.try_get(1)?, row.try_get(2)?);
        let slot = usize::try_from(number)
            .ok()
            .and_then(|n| n.checked_sub(1))
            .and_then(|n| answers.get_mut(n));
        if let Some(slot) = slot {
            *slot = match how {
                "new" => Some(Filed::New),
                "same" => Some(Filed::Same(id)),
                "conflict" => Some(Filed::Conflict(id)),
                _ => None,
            };
        }
    }
    // What was in the way of one is gone by now: nothing that can be said about it but "again".
    answers
        .into_iter()
        .collect::<Option<_>>()
        .ok_or(LedgerError::Unavailable("others were in the way"))
}

fn changed(rows: &[Row]) -> Result<Changed, LedgerError> {
    let said: Option<&str> = match rows.first() {
        Some(row) => row.try_get(0)?,
        None => None,
    };
    match said {
        Some("changed") => Ok(Changed::Yes),
        Some("already") => Ok(Changed::Already),
        Some("too-late") => Ok(Changed::TooLate),
        Some("unknown") => Ok(Changed::Unknown),
        _ => Err(not_understood()),
    }
}

fn listed(row: &Row, ended: bool) -> Result<Listed, LedgerError> {
    let number = |column: &str| -> Result<u32, LedgerError> {
        let n: i32 = row.try_get(column)?;
        u32::try_from(n).map_err(|_| not_understood())
    };
    let state: State = from_word(row.try_get("state")?)?;
    let steps = number("steps")?;
    Ok(Listed {
        id: row.try_get("id")?,
        kind: from_word(row.try_get("kind")?)?,
        regimes: row
            .try_get::<_, Vec<String>>("regimes")?
            .into_iter()
            .map(from_word)
            .collect::<Result<_, _>>()?,
        channel: from_word(row.try_get("channel")?)?,
        state,
        received_at: row.try_get("received_at")?,
        acknowledge_by: row.try_get("acknowledge_by")?,
        deadline: row.try_get("deadline")?,
        extended: row.try_get("extended")?,
        closed_at: if ended {
            row.try_get("closed_at")?
        } else {
            None
        },
        steps,
        steps_done: match state {
            State::Closed => steps,
            State::Withdrawn => 0,
            _ => number("steps_done")?,
        },
        steps_failing: if ended { 0 } else { number("steps_failing")? },
    })
}

/// The word that stands for it, as in JSON.
pub(crate) fn word<T: Serialize>(value: &T) -> String {
    match serde_json::to_value(value) {
        Ok(serde_json::Value::String(word)) => word,
        // The ledger's own checks refuse it.
        _ => String::new(),
    }
}

fn from_word<T: DeserializeOwned>(word: String) -> Result<T, LedgerError> {
    view(serde_json::Value::String(word))
}

/// What the ledger says as JSON.
pub(super) fn view<T: DeserializeOwned>(value: serde_json::Value) -> Result<T, LedgerError> {
    // The error isn't passed on: it quotes the value.
    serde_json::from_value(value).map_err(|_| not_understood())
}

/// A newer gateway may have written what this one doesn't know, a regime say.
pub(super) fn not_understood() -> LedgerError {
    LedgerError::Refused("DR005".to_owned())
}
