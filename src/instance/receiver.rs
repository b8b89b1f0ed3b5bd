//! The standby's connection to its upstream: set by a file and a reload, and cut for certain.
//!
//! Owns `upstream.conf`, the client's key, and the receiver process's end.
//! Never: believes `pg_stat_wal_receiver`, which doesn't show a receiver that is just connecting; nor a
//! cleared `primary_conninfo`, which a recovery conflict keeps from being read for as long as it lasts.
//!
//! # Why replication is direct, and cut by the manager
//! Standbys stream from PostgreSQL to PostgreSQL, over TLS with certificates on both sides, and not through a
//! tunnel between the managers. A tunnel would put two more hops and the managers' own liveness on the path
//! of every commit (6 to 17 % of the commit rate in a rough measurement), while what it would give is no
//! better: a receiver *process* that is gone acknowledges nothing, as surely as a closed socket.
//!
//! # How [`cut`] is certain
//! 1. `primary_conninfo` is emptied, so that no new receiver is asked for once that is read.
//! 2. The client's key is removed. A receiver that begins after this can't authenticate, also if step 1 is
//!    read late. libpq reads the key when it connects.
//! 3. Every receiver alive at that moment is ended and waited for, as a *process*; so is every child of the
//!    postmaster that hasn't said yet what it is, since it may be a receiver in its first microseconds. Unless it has a
//!    client: PostgreSQL names the process of one only when it has said who it is, which over a long way takes a while,
//!    and of one that says nothing a minute.
//!
//! After that nothing of this standby can acknowledge anything to anybody, until [`follow`].

use std::collections::BTreeSet;
use std::io;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use super::conninfo::{self, Downstream, Upstream};
use super::proc::{self, Proc};
use super::{files, settings, tls};

/// Lets the standby stream from `to`. Takes effect with the next reload. `major` is the database cluster's version.
///
/// # Errors
/// As the file system's.
pub fn follow(
    run: &Path,
    certificate: &tls::Certificate,
    to: &Upstream,
    voter: &str,
    instance: &str,
    timeout_seconds: u32,
    major: Option<u32>,
) -> io::Result<()> {
    certificate.install_client(run)?;
    let dir = tls::client_dir(run);
    let down = Downstream {
        // The volume, not the slot: a copy made anew must not acknowledge under the name of the one before it.
        application_name: voter.to_owned(),
        ca: dir.join("ca.crt"),
        cert: dir.join("tls.crt"),
        key: dir.join("tls.key"),
        timeout_seconds,
        direct_tls: major.is_some_and(|major| major >= conninfo::DIRECT_TLS_SINCE),
    };
    let text = settings::upstream(Some((to, &down)), &settings::slot(instance));
    files::replace(
        &run.join("conf").join(settings::UPSTREAM_FILE),
        text.as_bytes(),
        0o600,
    )
}

/// Makes sure that PostgreSQL, when started, has no upstream.
///
/// # Errors
/// As the file system's.
pub fn forsake(run: &Path) -> io::Result<()> {
    let text = settings::upstream(None, "");
    files::replace(
        &run.join("conf").join(settings::UPSTREAM_FILE),
        text.as_bytes(),
        0o600,
    )?;
    tls::remove_client_key(run)
}

/// Whether [`forsake`] was the last word.
///
/// # Errors
/// As the file system's.
pub fn forsaken(run: &Path) -> io::Result<bool> {
    let path = run.join("conf").join(settings::UPSTREAM_FILE);
    let now = files::read_bounded(&path, 64 << 10)?;
    Ok(now.as_deref() == Some(settings::upstream(None, "").as_bytes()))
}

/// Cuts the standby off its upstream for certain: see the module's text. Returns how long it took.
///
/// # Errors
/// If a receiver is still there after `limit`. The caller must then stop PostgreSQL at once; until that is
/// done, nothing is cut.
pub async fn cut(run: &Path, postmaster: u32, limit: Duration) -> anyhow::Result<Duration> {
    let begun = Instant::now();
    forsake(run).context("can't take the upstream away")?;
    let postmaster = i32::try_from(postmaster).context("no such process")?;
    // The postmaster's death is as good: its receiver dies with it, and is waited for below.
    proc::reload(postmaster);

    let mut suspects = suspects(postmaster).context("can't list PostgreSQL's processes")?;
    let mut pause = Duration::from_millis(1);
    loop {
        let mut left = BTreeSet::new();
        for suspect in suspects {
            match kind(suspect, postmaster) {
                Kind::Receiver => {
                    let _ = kill(Pid::from_raw(suspect.pid), Signal::SIGTERM);
                    left.insert(suspect);
                }
                Kind::Unnamed => {
                    left.insert(suspect);
                }
                Kind::Other | Kind::Gone => {}
            }
        }
        if left.is_empty() {
            return Ok(begun.elapsed());
        }
        if begun.elapsed() >= limit {
            bail!(
                "{} receiver processes are still there after {} ms",
                left.len(),
                limit.as_millis()
            );
        }
        suspects = left;
        // A process that isn't our child has no event to wait for but its end, which is near.
        tokio::time::sleep(pause).await;
        pause = (pause * 2).min(Duration::from_millis(20));
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Receiver,
    Unnamed,
    Other,
    Gone,
}

/// The postmaster's children that are, or may be, receivers; and those it left behind if it died.
fn suspects(postmaster: i32) -> io::Result<BTreeSet<Proc>> {
    let suspicious = |p: &Proc| matches!(kind(*p, postmaster), Kind::Receiver | Kind::Unnamed);
    Ok(proc::all()?
        .into_iter()
        .filter(|(_, stat)| stat.parent == postmaster)
        .map(|(candidate, _)| candidate)
        .filter(suspicious)
        .collect())
}

/// What a process is, by the title that PostgreSQL gives it.
fn kind(of: Proc, postmaster: i32) -> Kind {
    if of.stat().is_none() {
        return Kind::Gone;
    }
    let Some(title) = proc::title(of.pid) else {
        return Kind::Gone;
    };
    // A zombie has no title; it acknowledges nothing any more.
    if title.is_empty() {
        return Kind::Gone;
    }
    let own = proc::title(postmaster).unwrap_or_default();
    match classify(&title, &own) {
        Kind::Unnamed if has_client(of, &own) => Kind::Other,
        kind => kind,
    }
}

/// Whether a child without a name was begun for a client's connection. A receiver has a connection only once it has its
/// name, and the postmaster, from which it has everything else, keeps none while it begins one.
fn has_client(of: Proc, own: &[u8]) -> bool {
    // Its name last: between the two it may have become a receiver that has connected.
    let unnamed = || proc::title(of.pid).is_some_and(|t| classify(&t, own) == Kind::Unnamed);
    proc::connected(of.pid).unwrap_or(false) && unnamed()
}

fn classify(title: &[u8], postmaster: &[u8]) -> Kind {
    let text = String::from_utf8_lossy(title);
    if !text.starts_with("postgres:") || title == postmaster {
        // Forked, and not yet told what it is.
        return Kind::Unnamed;
    }
    // "postgres: CLUSTER: walreceiver …";
    if text
        .split([' ', '\0'])
        .any(|word| word == "walreceiver" || word == "wal_receiver")
    {
        Kind::Receiver
    } else {
        Kind::Other
    }
}

/// The number of the receiver process, if there is one. For tests and for saying what is.
#[must_use]
pub fn process(postmaster: u32) -> Option<i32> {
    let postmaster = i32::try_from(postmaster).ok()?;
    suspects(postmaster)
        .ok()?
        .into_iter()
        .find(|p| kind(*p, postmaster) == Kind::Receiver)
        .map(|p| p.pid)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn titles() {
        let postmaster = b"/usr/bin/postgres\0-D\0/data\0";
        let of = |t: &[u8]| classify(t, postmaster);
        assert_eq!(
            of(b"postgres: s-2: walreceiver streaming 0/3000060\0\0"),
            Kind::Receiver
        );
        assert_eq!(of(b"postgres: s-2: walreceiver \0"), Kind::Receiver);
        assert_eq!(of(b"postgres: s-2: startup recovering 0001"), Kind::Other);
        assert_eq!(of(postmaster), Kind::Unnamed);
    }
}
