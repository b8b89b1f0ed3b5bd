//! What a worker erases from: one file per kind of system.
//!
//! Owns the [`Connector`] trait, what an erasure and a probe answer, and what a target needs to know of a person
//! ([`needs`]). How to write another one: docs/connectors.md; it must pass the suite in tests/rights_connectors.
//! Never: says that something is gone because nothing was heard ([`Presence::Absent`] comes from reading only); puts an
//! identifier, or a value that a target sent, into a [`Failure`], an [`Evidence`] or a log.

mod failure;
mod needs;
mod postgresql;
mod redis;

pub use failure::{Failure, Reason};
pub use needs::{needs, required, wanted};

use futures::future::BoxFuture;
use jiff::{SignedDuration, Timestamp};
use std::path::Path;
use std::time::Duration;

use super::config::{System, Target};
use super::model::{Evidence, Identifiers};

/// A person, as a target is asked about them.
#[derive(Clone, Copy, Debug)]
pub struct Subject<'a> {
    /// What identifies them. Its `Debug` hides the values.
    pub identifiers: &'a Identifiers,
}

/// One per subject, in the same order.
pub type Answer<T> = Vec<Result<T, Failure>>;

/// What a probe saw of a person.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Presence {
    /// It read where they would be, and they weren't.
    Absent {
        /// What it read, when, and where.
        evidence: Evidence,
        /// A copy that serves nobody may hold bytes until then; none: no such copy is known.
        bounded: Option<Timestamp>,
    },
    /// They are there (still, or again).
    StillThere,
}

/// How long bytes may live on in copies that the target makes of itself: backups, snapshots, log segments.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Residue {
    /// Days after the erasure.
    pub days: u32,
}

impl Residue {
    /// The latest that a byte may live, of what was erased at `erased`.
    #[must_use]
    pub fn until(self, erased: Timestamp) -> Timestamp {
        erased
            .checked_add(SignedDuration::from_hours(i64::from(self.days) * 24))
            .unwrap_or(Timestamp::MAX)
    }
}

/// A system that people are erased from.
///
/// Every method may be called again, any number of times, with the same people, whatever came of the last time. Each is
/// bounded in time by itself. An outer error is the same failure for every person given; after it, as after a `Failure`
/// of one person, nothing is known of what was erased.
pub trait Connector: Send + Sync {
    /// Erases these people, and says per person what was done.
    fn erase<'a>(
        &'a self,
        subjects: &'a [Subject<'a>],
    ) -> BoxFuture<'a, Result<Answer<Evidence>, Failure>>;

    /// Reads whether anything of these people is there, by another connection than the eraser's. `erased` is what
    /// [`Connector::erase`] said per person, as long as it is known: empty evidence is allowed, and proves less.
    fn probe<'a>(
        &'a self,
        subjects: &'a [Subject<'a>],
        erased: &'a [Evidence],
    ) -> BoxFuture<'a, Result<Answer<Presence>, Failure>>;

    /// How long bytes may live on, if the target is said to keep copies.
    fn residue(&self) -> Option<Residue>;
}

/// How long a connector waits. A connector bounds whatever it waits for by these, and by nothing else.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// For a connection.
    pub connect: Duration,
    /// For one answer, a commit's included.
    pub answer: Duration,
    /// For somebody else's lock.
    pub lock: Duration,
    /// For finding out who of a failed batch it was; afterwards the rest is left for the next time.
    pub halving: Duration,
    /// For standbys and replicas to have what the primary has.
    pub standbys: Duration,
    /// For a whole erasure or probe, where it is many answers: a walk through a keyspace.
    pub whole: Duration,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            connect: Duration::from_secs(5),
            answer: Duration::from_secs(30),
            lock: Duration::from_secs(2),
            halving: Duration::from_secs(15),
            standbys: Duration::from_secs(2),
            whole: Duration::from_secs(300),
        }
    }
}

/// The connector of a target. Does no I/O: it connects when it is first used, and reads credentials again whenever it
/// connects. `tls` is where the workflow's certificate is, `credentials` the directory of all targets' credentials,
/// `role` whom the certificate stands for.
///
/// # Errors
/// If the target is none that this version knows how to erase from.
pub fn connect(
    target: &Target,
    tls: &Path,
    credentials: &Path,
    role: &str,
) -> anyhow::Result<Box<dyn Connector>> {
    connect_within(target, tls, credentials, role, Limits::default())
}

/// As [`connect`], with other limits.
///
/// # Errors
/// As [`connect`].
pub fn connect_within(
    target: &Target,
    tls: &Path,
    credentials: &Path,
    role: &str,
    limits: Limits,
) -> anyhow::Result<Box<dyn Connector>> {
    Ok(match &target.system {
        System::PostgreSql { store, erase } => Box::new(postgresql::PostgreSql::new(
            target,
            store.as_ref(),
            erase,
            tls,
            credentials,
            role,
            limits,
        )),
        System::Redis { keys } => Box::new(redis::Redis::new(target, keys, credentials, limits)?),
    })
}

/// What the target's own configuration says about its copies.
fn residue_of(target: &Target) -> Option<Residue> {
    let days = target.residue_days.and_then(|d| u32::try_from(d).ok())?;
    Some(Residue { days })
}

/// A target's credentials: the URL, and the authority that its server is checked against, if it has one of its own.
fn credentials(dir: &Path) -> Result<(String, Option<Vec<u8>>), Failure> {
    let cant = |name: &str, e: &std::io::Error| {
        let path = dir.join(name);
        Failure::new(
            Reason::Credentials,
            format!("can't read {}: {}", path.display(), e.kind()),
        )
    };
    let url = std::fs::read_to_string(dir.join("url")).map_err(|e| cant("url", &e))?;
    match std::fs::read(dir.join("ca.crt")) {
        Ok(ca) => Ok((url, Some(ca))),
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => Ok((url, None)),
        Err(e) => Err(cant("ca.crt", &e)),
    }
}
