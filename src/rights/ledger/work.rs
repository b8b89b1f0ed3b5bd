//! What a worker does: claims, keeps, finishes, forgets. And what an observer does: counts.
//!
//! Owns the calls. Never: ends a step without evidence.

use std::borrow::Borrow;
use std::time::Duration;

use jiff::Timestamp;
use tokio_postgres::Row;
use tokio_postgres::types::{Json, Type};
use uuid::Uuid;

use super::Ledger;
use super::error::LedgerError;
use super::filing::{not_understood, view};
use super::pool::Call;
use super::types::{Claimed, Counts, Finished, How, Lease, StepId};
use crate::rights::model::{Evidence, Outcome};

const CLAIM: Call = Call {
    sql: "SELECT * FROM worker.claim($1, $2, $3, $4, $5)",
    types: &[Type::TEXT, Type::TEXT, Type::TEXT, Type::INT4, Type::FLOAT8],
    limit: Duration::from_secs(5),
};
const RENEW: Call = Call {
    sql: "SELECT worker.renew($1, $2, $3, $4)",
    types: &[
        Type::UUID_ARRAY,
        Type::INT4_ARRAY,
        Type::UUID_ARRAY,
        Type::FLOAT8,
    ],
    limit: Duration::from_secs(3),
};
const FINISH: Call = Call {
    sql: "SELECT worker.finish($1, $2, $3, $4, $5, $6, $7, $8, $9, $10)",
    types: &[
        Type::UUID_ARRAY,
        Type::INT4_ARRAY,
        Type::UUID_ARRAY,
        Type::TEXT_ARRAY,
        Type::FLOAT8_ARRAY,
        Type::TEXT_ARRAY,
        Type::TEXT_ARRAY,
        Type::TIMESTAMPTZ_ARRAY,
        Type::TEXT_ARRAY,
        Type::JSONB_ARRAY,
    ],
    limit: Duration::from_secs(5),
};
const FORGET: Call = Call {
    sql: "SELECT worker.forget($1, $2)",
    types: &[Type::INT4, Type::INT4],
    limit: Duration::from_secs(20),
};
const COUNTS: Call = Call {
    sql: "SELECT observer.counts()",
    types: &[],
    limit: Duration::from_secs(20),
};

/// Records that are removed in one transaction.
const FORGOTTEN_AT_ONCE: i32 = 2_000;
/// Without evidence, a step is tried again after this time: the connector is broken, and somebody should see it.
const UNPROVEN_AFTER: f64 = 60.0;

impl Ledger {
    /// Claims up to `most` steps of a target for a worker in this region, the earliest deadline first; those included
    /// whose lease ran out. Not on the quorum when this returns, and need not be: see `worker.claim`.
    ///
    /// # Errors
    /// See [`LedgerError`].
    pub async fn claim(
        &self,
        target: &str,
        region: &str,
        worker: &str,
        most: u32,
        lease: Duration,
    ) -> Result<Vec<Claimed>, LedgerError> {
        let most = i32::try_from(most).unwrap_or(i32::MAX);
        self.pool
            .rows(
                &CLAIM,
                &[&target, &region, &worker, &most, &lease.as_secs_f64()],
            )
            .await?
            .iter()
            .map(claimed)
            .collect()
    }

    /// Keeps leases for this long from now. For each, in their order: whether it is still held.
    ///
    /// # Errors
    /// See [`LedgerError`].
    pub async fn renew(
        &self,
        held: &[(StepId, Lease)],
        lease: Duration,
    ) -> Result<Vec<bool>, LedgerError> {
        if held.is_empty() {
            return Ok(Vec::new());
        }
        let requests: Vec<Uuid> = held.iter().map(|(step, _)| step.request).collect();
        let lanes: Vec<i32> = held.iter().map(|(step, _)| step.lane).collect();
        let leases: Vec<Uuid> = held.iter().map(|(_, lease)| lease.0).collect();
        let rows = self
            .pool
            .rows(&RENEW, &[&requests, &lanes, &leases, &lease.as_secs_f64()])
            .await?;
        counted(held.len(), &rows)
    }

    /// Says what became of claimed steps, all in one transaction, on the quorum when this returns. For each, in their
    /// order: whether it counts; it doesn't if the lease is another's by now, or if this is a repetition. A request
    /// whose last step is done is closed thereby: its key and its identifiers' ciphertext are gone, their keyed hashes
    /// on the list of who was erased.
    ///
    /// # Errors
    /// See [`LedgerError`]. Then nothing is certain, and the same may be said again.
    pub async fn finish<F: Borrow<Finished>>(
        &self,
        results: &[F],
    ) -> Result<Vec<bool>, LedgerError> {
        if results.is_empty() {
            return Ok(Vec::new());
        }
        let finished = || results.iter().map(F::borrow);
        let requests: Vec<Uuid> = finished().map(|r| r.step.request).collect();
        let lanes: Vec<i32> = finished().map(|r| r.step.lane).collect();
        let leases: Vec<Uuid> = finished().map(|r| r.lease.0).collect();
        let said: Vec<Said<'_>> = finished().map(|r| Said::of(&r.how)).collect();
        let hows: Vec<&str> = said.iter().map(|s| s.how).collect();
        let seconds: Vec<f64> = said.iter().map(|s| s.seconds).collect();
        let reasons: Vec<Option<&str>> = said.iter().map(|s| s.reason).collect();
        let outcomes: Vec<Option<&str>> = said.iter().map(|s| s.outcome).collect();
        let untils: Vec<Option<Timestamp>> = said.iter().map(|s| s.until).collect();
        let sections: Vec<Option<&str>> = said.iter().map(|s| s.section).collect();
        let evidences: Vec<Option<Json<&Evidence>>> =
            said.iter().map(|s| s.evidence.map(Json)).collect();
        let rows = self
            .pool
            .rows(
                &FINISH,
                &[
                    &requests, &lanes, &leases, &hows, &seconds, &reasons, &outcomes, &untils,
                    &sections, &evidences,
                ],
            )
            .await?;
        counted(results.len(), &rows)
    }

    /// Removes records of requests that ended more than so many months ago, as many as one transaction should; says
    /// how many. To be called again while there are any. The list of who was erased stays.
    ///
    /// # Errors
    /// See [`LedgerError`]. `DR003`: less than a month.
    pub async fn forget_old(&self, months: u32) -> Result<u64, LedgerError> {
        let months = i32::try_from(months).unwrap_or(i32::MAX);
        let rows = self
            .pool
            .rows(&FORGET, &[&months, &FORGOTTEN_AT_ONCE])
            .await?;
        let gone: i32 = match rows.first() {
            Some(row) => row.try_get(0)?,
            None => 0,
        };
        u64::try_from(gone).map_err(|_| not_understood())
    }

    /// Counts what is not ended. For observers.
    ///
    /// # Errors
    /// See [`LedgerError`].
    pub async fn counts(&self) -> Result<Counts, LedgerError> {
        let rows = self.pool.rows(&COUNTS, &[]).await?;
        let row = rows.first().ok_or_else(not_understood)?;
        view(row.try_get(0)?)
    }
}

/// A result, in the words of `worker.finish`.
struct Said<'a> {
    how: &'static str,
    seconds: f64,
    reason: Option<&'static str>,
    outcome: Option<&'static str>,
    until: Option<Timestamp>,
    section: Option<&'a str>,
    evidence: Option<&'a Evidence>,
}

impl<'a> Said<'a> {
    fn of(how: &'a How) -> Self {
        let only = |how| Self {
            how,
            seconds: 0.0,
            reason: None,
            outcome: None,
            until: None,
            section: None,
            evidence: None,
        };
        match how {
            // The ledger would refuse it, and the whole batch with it.
            How::Done(_, evidence) if evidence.0.is_empty() => Self {
                seconds: UNPROVEN_AFTER,
                reason: Some("no-evidence"),
                ..only("retry")
            },
            How::Done(outcome, evidence) => {
                let evidence = Some(evidence);
                match outcome {
                    Outcome::Absent => Self {
                        outcome: Some("absent"),
                        evidence,
                        ..only("done")
                    },
                    Outcome::Bounded { until } => Self {
                        outcome: Some("bounded"),
                        until: Some(*until),
                        evidence,
                        ..only("done")
                    },
                    // Nor does the ledger take a law without a section.
                    Outcome::Excepted { section } if section.is_empty() => Self {
                        seconds: UNPROVEN_AFTER,
                        reason: Some("no-section"),
                        ..only("retry")
                    },
                    Outcome::Excepted { section } => Self {
                        outcome: Some("excepted"),
                        section: Some(section),
                        evidence,
                        ..only("done")
                    },
                }
            }
            How::Settle { after, erasure } => Self {
                seconds: after.as_secs_f64(),
                evidence: Some(erasure),
                ..only("settle")
            },
            How::Retry { after, reason } => Self {
                seconds: after.as_secs_f64(),
                reason: Some(fit(reason)),
                ..only("retry")
            },
            How::Release => only("release"),
        }
    }
}

/// A reason as the ledger takes it: one bad word would make it refuse the whole batch, again and again.
fn fit(reason: &'static str) -> &'static str {
    let letters = reason.starts_with(|c: char| c.is_ascii_lowercase());
    let word = reason
        .bytes()
        .all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-');
    if letters && word && reason.len() <= 64 {
        reason
    } else {
        "other"
    }
}

fn claimed(row: &Row) -> Result<Claimed, LedgerError> {
    let number = |column: &str| -> Result<u32, LedgerError> {
        let n: i32 = row.try_get(column)?;
        u32::try_from(n).map_err(|_| not_understood())
    };
    Ok(Claimed {
        step: StepId {
            request: row.try_get("request")?,
            lane: row.try_get("lane")?,
        },
        lease: Lease(row.try_get("lease")?),
        leased_until: row.try_get("until")?,
        kind: view(serde_json::Value::String(row.try_get("kind")?))?,
        received_at: row.try_get("received_at")?,
        filed_at: row.try_get("filed_at")?,
        deadline: row.try_get("deadline")?,
        attempts: number("attempts")?,
        failures: number("failures")?,
        settling: row.try_get("settling")?,
        erasure: match row.try_get("erasure")? {
            Some(erasure) => view(erasure)?,
            None => None,
        },
        key_epoch: row.try_get("epoch")?,
        wrapped_key: row.try_get("wrapped_key")?,
        sealed: row.try_get("sealed")?,
    })
}

fn counted(results: usize, rows: &[Row]) -> Result<Vec<bool>, LedgerError> {
    let counted: Vec<bool> = match rows.first() {
        Some(row) => row.try_get(0)?,
        None => Vec::new(),
    };
    if counted.len() == results {
        Ok(counted)
    } else {
        Err(not_understood())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rights::model::Evidence;

    #[test]
    fn nothing_is_done_without_evidence_or_section() {
        let none = How::Done(Outcome::Absent, Evidence::default());
        assert_eq!(Said::of(&none).how, "retry");
        let mut some = Evidence::default();
        some.0.insert("rows".to_owned(), 1.into());
        let done = How::Done(Outcome::Absent, some.clone());
        assert_eq!(Said::of(&done).how, "done");
        let nowhere = How::Done(
            Outcome::Excepted {
                section: String::new(),
            },
            some,
        );
        assert_eq!(Said::of(&nowhere).how, "retry");
    }

    #[test]
    fn a_reason_is_a_word() {
        assert_eq!(fit("still-there"), "still-there");
        for bad in ["", "Still There", "-x", "it's"] {
            assert_eq!(fit(bad), "other");
        }
    }
}
