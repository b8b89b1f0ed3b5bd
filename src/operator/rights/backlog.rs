//! What the ledgers say of how much is open.
//!
//! Owns the reading: every few seconds per workflow, beside the passes and never on their way, bounded in time, as the
//! one role that can count and nothing else. A pass sees the latest answer; a change worth telling begins one.
//! Never holds anything of a person (the role can't ask for it), keeps the certificate anywhere but in memory, or tells
//! what a database said in its own words.

use std::collections::{BTreeSet, HashMap};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use anyhow::Context as _;
use futures::StreamExt as _;
use futures::channel::mpsc;
use jiff::Timestamp;
use jiff::civil::Date;
use k8s_openapi::api::core::v1::Secret;
use kube::core::DeserializeGuard;
use kube::runtime::reflector::ObjectRef;
use kube::{Api, ResourceExt};

use super::assess::of_tally;
use super::validate::database_of;
use crate::api::names::rights::{Role, database, role};
use crate::api::rights_workflow::Backlog;
use crate::api::{PrivacyDataStore, RightsWorkflow, names};
use crate::operator::context::{Context, bounded};
use crate::operator::geography::References;
use crate::operator::store::certificates::{self, Use};
use crate::rights::ledger::Counts;
use crate::rights::postgres::{Address, Identity, Trouble, code};

/// Between two looks at who is due.
const TICK: Duration = Duration::from_secs(1);
/// Between two readings of a ledger that answers.
const EVERY: Duration = Duration::from_secs(10);
/// Between two of one that doesn't.
const EVERY_IN_VAIN: Duration = Duration::from_secs(3);
/// The longest that a reading may take, its parts included.
const LIMIT: Duration = Duration::from_secs(6);
/// The longest that the connection may take.
const CONNECT: Duration = Duration::from_secs(3);
/// Ledgers read at the same time.
const CONCURRENCY: usize = 4;
/// After so many failures in a row what was read before counts no more: a failover takes about a second.
const FORGIVEN: u32 = 3;
/// Numbers that merely moved are told this often.
const TELL_EVERY: Duration = Duration::from_secs(30);
/// A certificate is used this long: it is made in a moment, and a new authority is noticed so.
const CERTIFICATE_FOR: Duration = Duration::from_secs(3600);

/// Settings of the session: it can't hold anything up, and can't be held up. Not read-only: it is by being read-write that a
/// primary is told from a standby. The role itself may call one function that reads.
const OPTIONS: &str = "-c search_path=pg_catalog -c statement_timeout=4s -c lock_timeout=1s \
    -c client_min_messages=warning";

/// What a ledger said.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Tally {
    /// Requests that are not ended.
    pub open: i64,
    /// Those past their legal deadline.
    pub overdue: i64,
    /// The earliest legal deadline, in whole seconds.
    pub nearest_deadline: Option<Timestamp>,
    /// Days whose keys open requests were sealed with.
    pub epochs: BTreeSet<Date>,
    /// Nothing was ever filed: no request, open or ended, and nobody remembered as erased.
    pub empty: bool,
}

impl From<&Counts> for Tally {
    fn from(counts: &Counts) -> Self {
        let number = |n: u64| i64::try_from(n).unwrap_or(i64::MAX);
        let nearest = counts.nearest_deadline();
        Self {
            open: number(counts.open()),
            overdue: number(counts.requests.iter().map(|r| r.overdue).sum()),
            nearest_deadline: nearest.and_then(|t| Timestamp::from_second(t.as_second()).ok()),
            epochs: counts.epochs.iter().copied().collect(),
            empty: counts.empty,
        }
    }
}

/// What is known of a ledger.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum Reading {
    /// It was not read yet.
    #[default]
    Never,
    /// It said so within the last half minute.
    Known(Tally),
    /// It can't be read.
    Failed {
        /// Why.
        why: &'static str,
        /// What it said before.
        last: Option<Tally>,
    },
}

impl Reading {
    /// The latest that it said.
    #[must_use]
    pub fn tally(&self) -> Option<&Tally> {
        match self {
            Self::Never => None,
            Self::Known(tally) => Some(tally),
            Self::Failed { last, .. } => last.as_ref(),
        }
    }

    /// The reading after an attempt, of which there were `failures` in vain by now, this one included.
    fn after(self, attempt: Result<Tally, &'static str>, failures: u32) -> Self {
        match (attempt, self) {
            (Ok(tally), _) => Self::Known(tally),
            (Err(_), Self::Known(tally)) if failures < FORGIVEN => Self::Known(tally),
            (Err(why), before) => Self::Failed {
                why,
                last: before.tally().cloned(),
            },
        }
    }
}

#[derive(Default)]
struct Entry {
    reading: Reading,
    failures: u32,
    asked: Option<Instant>,
    identity: Option<(Instant, Arc<Identity>)>,
    told: Option<(Instant, Backlog)>,
}

impl Entry {
    fn due(&self, now: Instant) -> bool {
        let pause = if self.failures == 0 {
            EVERY
        } else {
            EVERY_IN_VAIN
        };
        self.asked
            .is_none_or(|at| now.saturating_duration_since(at) >= pause)
    }

    /// Takes an answer. Whether it should be told now.
    fn take(&mut self, attempt: Result<Tally, &'static str>, now: Instant) -> bool {
        self.failures = if attempt.is_ok() {
            0
        } else {
            self.failures.saturating_add(1)
        };
        if self.failures > 0 {
            // It may be the certificate.
            self.identity = None;
        }
        let before = std::mem::take(&mut self.reading);
        self.reading = before.clone().after(attempt, self.failures);
        notable(&before, &self.reading)
            || self.reading.tally().map(of_tally).is_some_and(|backlog| {
                self.told.as_ref().is_none_or(|(at, told)| {
                    *told != backlog && now.saturating_duration_since(*at) >= TELL_EVERY
                })
            })
    }
}

/// Whether conditions, keys or a deletion may depend on the difference.
fn notable(before: &Reading, now: &Reading) -> bool {
    let facts = |reading: &Reading| {
        let failed = match reading {
            Reading::Failed { why, .. } => Some(*why),
            _ => None,
        };
        let tally = reading.tally();
        (
            failed,
            tally.is_some(),
            tally.map(|t| (t.empty, t.overdue > 0, t.open > 0)),
        )
    };
    facts(before) != facts(now)
}

/// The readings of all workflows, by uid.
#[derive(Default)]
pub struct Backlogs {
    entries: Mutex<HashMap<String, Entry>>,
}

impl Backlogs {
    fn with<T>(&self, uid: &str, use_it: impl FnOnce(&mut Entry) -> T) -> T {
        let mut entries = self
            .entries
            .lock()
            .unwrap_or_else(std::sync::PoisonError::into_inner);
        use_it(entries.entry(uid.to_owned()).or_default())
    }

    /// What is known of a workflow's ledger.
    #[must_use]
    pub fn reading(&self, uid: Option<&str>) -> Reading {
        uid.map_or(Reading::Never, |uid| self.with(uid, |e| e.reading.clone()))
    }

    /// As [`Self::reading`], but without forgiveness: what was read before the last attempt counts only if that was none.
    #[must_use]
    pub fn last_attempt(&self, uid: Option<&str>) -> Reading {
        let Some(uid) = uid else {
            return Reading::Never;
        };
        self.with(uid, |e| match e.reading.clone() {
            Reading::Known(tally) if e.failures > 0 => Reading::Failed {
                why: "it doesn't answer now",
                last: Some(tally),
            },
            reading => reading,
        })
    }

    /// Whether numbers that merely moved may be written to the status now.
    #[must_use]
    pub fn may_tell(&self, uid: &str) -> bool {
        self.with(uid, |e| {
            e.told
                .as_ref()
                .is_none_or(|(at, _)| at.elapsed() >= TELL_EVERY)
        })
    }

    /// They were written.
    pub fn told(&self, uid: &str, backlog: Option<&Backlog>) {
        self.with(uid, |e| {
            e.told = backlog.map(|b| (Instant::now(), b.clone()));
        });
    }

    fn keep_only(&self, uids: &BTreeSet<String>) {
        let mut entries = self
            .entries
            .lock()
            .unwrap_or_else(std::sync::PoisonError::into_inner);
        entries.retain(|uid, _| uids.contains(uid));
    }
}

/// A workflow that is to be looked at.
pub type Poke = ObjectRef<DeserializeGuard<RightsWorkflow>>;

/// Reads ledgers until the process ends. `poke` begins passes.
pub async fn run(
    ctx: Arc<Context>,
    references: Arc<References>,
    poke: mpsc::UnboundedSender<Poke>,
) {
    loop {
        let workflows = references.workflows.state();
        ctx.backlogs
            .keep_only(&workflows.iter().filter_map(|w| w.uid()).collect());
        let now = Instant::now();
        let due = workflows.into_iter().filter(|w| {
            w.uid()
                .is_some_and(|uid| ctx.backlogs.with(&uid, |e| e.due(now)))
        });
        futures::stream::iter(due)
            .for_each_concurrent(CONCURRENCY, |workflow| {
                let (ctx, references, poke) = (&ctx, &references, &poke);
                async move {
                    let namespace = workflow.namespace().unwrap_or_default();
                    let store = references.stores.find(|s| {
                        s.name_any() == workflow.spec.ledger_ref.name
                            && s.namespace().as_deref() == Some(&namespace)
                    });
                    if look(ctx, &workflow, store.as_deref()).await {
                        let reference = ObjectRef::new(&workflow.name_any()).within(&namespace);
                        let _ = poke.unbounded_send(reference);
                    }
                }
            })
            .await;
        tokio::time::sleep(TICK).await;
    }
}

/// Reads one ledger now. Whether the answer should be told.
pub async fn look(
    ctx: &Context,
    workflow: &RightsWorkflow,
    store: Option<&PrivacyDataStore>,
) -> bool {
    let Some(uid) = workflow.uid() else {
        return false;
    };
    ctx.backlogs.with(&uid, |e| e.asked = Some(Instant::now()));
    let attempt = match store {
        Some(store) => tokio::time::timeout(LIMIT, ask(ctx, &uid, workflow, store))
            .await
            .unwrap_or(Err("it doesn't answer in time")),
        None => Err("the store doesn't exist"),
    };
    if let Err(why) = attempt {
        let (name, namespace) = (workflow.name_any(), workflow.namespace());
        tracing::debug!(workflow = %name, ?namespace, why, "ledger not read");
    }
    ctx.backlogs.with(&uid, |e| e.take(attempt, Instant::now()))
}

async fn ask(
    ctx: &Context,
    uid: &str,
    workflow: &RightsWorkflow,
    store: &PrivacyDataStore,
) -> Result<Tally, &'static str> {
    let name = workflow.name_any();
    let database = database_of(store, database(&name)).ok_or("the store has no instance yet")?;
    let role = role(&name, Role::Observer);
    let known = ctx.backlogs.with(uid, |e| {
        let identity = e.identity.as_ref();
        identity
            .filter(|(made, _)| made.elapsed() < CERTIFICATE_FOR)
            .map(|(_, i)| i.clone())
    });
    let identity = match known {
        Some(identity) => identity,
        None => {
            let made = certificate(ctx, store, &role).await.map_err(|error| {
                tracing::warn!(workflow = %name, error = crate::operator::context::words(&error), "no certificate to read the ledger with");
                "the operator has no certificate of the store's authority"
            })?;
            let made = Arc::new(made);
            let kept = made.clone();
            ctx.backlogs
                .with(uid, |e| e.identity = Some((Instant::now(), kept)));
            made
        }
    };
    let trouble = |trouble: Trouble| match trouble {
        Trouble::Unreachable(_) => "no instance answers as the primary",
        Trouble::Credentials(_) => "the primary doesn't know the operator's role there yet",
        Trouble::NoDatabase(_) => "the database isn't there yet",
        Trouble::Setup(_) => "the operator's certificate can't be used",
    };
    let address = Address::of_store_with(&database, &role, &identity, "domicile-operator")
        .map_err(trouble)?
        .options(OPTIONS);
    let session = Box::pin(address.primary(CONNECT)).await.map_err(trouble)?;
    let asked = session.client.query_one("SELECT observer.counts()", &[]);
    let row = asked.await.map_err(|error| match code(&error) {
        Some(code) if ["42883", "3F000"].contains(&code.code()) => {
            "the database isn't complete yet"
        }
        Some(_) => "the primary refuses to count",
        None => "the connection failed",
    })?;
    let value: serde_json::Value = row
        .try_get(0)
        .map_err(|_| "what the primary counts isn't understood")?;
    let counts: Counts =
        serde_json::from_value(value).map_err(|_| "what the primary counts isn't understood")?;
    Ok(Tally::from(&counts))
}

/// The operator's own certificate at a store. It is made here and stays here.
async fn certificate(
    ctx: &Context,
    store: &PrivacyDataStore,
    role: &str,
) -> anyhow::Result<Identity> {
    let namespace = store.namespace().unwrap_or_default();
    let secrets: Api<Secret> = Api::namespaced(ctx.client.clone(), &namespace);
    let name = names::ca_secret(&store.name_any());
    let secret = bounded("read the authority", secrets.get_opt(&name))
        .await?
        .context("the store's authority isn't made yet")?;
    let signer = certificates::pair(&secret, certificates::keys::ACTIVE)?;
    let pair = certificates::issue_for(Use::Client, &signer, role, &[], Timestamp::now())?;
    Ok(Identity {
        ca: certificates::bundle(&secret).into_bytes(),
        certificate: pair.certificate.into_bytes(),
        key: pair.key.into_bytes(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tally(open: i64) -> Tally {
        Tally {
            open,
            ..Tally::default()
        }
    }

    #[test]
    fn a_failover_is_forgiven_and_a_ledger_that_is_away_is_told_once() {
        let begin = Instant::now();
        let at = |seconds| begin + Duration::from_secs(seconds);
        let mut entry = Entry::default();
        assert!(entry.due(begin));
        assert!(entry.take(Ok(tally(3)), begin), "the first");
        entry.told = Some((begin, of_tally(&tally(3))));
        for second in 1..u64::from(FORGIVEN) {
            assert!(!entry.take(Err("away"), at(second)), "{second}");
            assert_eq!(entry.reading, Reading::Known(tally(3)));
        }
        assert!(entry.take(Err("away"), at(9)));
        let last = Some(tally(3));
        assert_eq!(entry.reading, Reading::Failed { why: "away", last });
        assert!(!entry.take(Err("away"), at(12)));
        assert!(entry.take(Err("another reason"), at(15)));
        assert!(entry.take(Ok(tally(3)), at(18)));
    }

    #[test]
    fn numbers_that_merely_move_are_told_every_half_minute() {
        let begin = Instant::now();
        let mut entry = Entry::default();
        assert!(entry.take(Ok(tally(1)), begin));
        entry.told = Some((begin, of_tally(&tally(1))));
        let mut told = 0;
        for second in 1..=90 {
            let now = begin + Duration::from_secs(second);
            let count = i64::try_from(second).unwrap() + 1;
            if entry.take(Ok(tally(count)), now) {
                told += 1;
                entry.told = Some((now, of_tally(&tally(count))));
            }
        }
        assert_eq!(told, 3);
        // That nothing is open is no mere number: a deletion may wait for it.
        assert!(entry.take(Ok(tally(0)), begin + Duration::from_secs(91)));
        let late = Tally {
            overdue: 1,
            ..tally(1)
        };
        assert!(entry.take(Ok(late), begin + Duration::from_secs(92)));
    }
}
