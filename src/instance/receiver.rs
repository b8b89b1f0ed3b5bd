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
//! better: a receiver *process* that is gone acknowledges nothing, as surely as a closed socket. Only where the way itself
//! takes much longer than that do they go by a session that the manager has ready ([`super::relay`]).
//!
//! # How [`cut`] is certain
//! 1. `primary_conninfo` is emptied, so that no new receiver is asked for once that is read.
//! 2. The client's key is removed, and a relay's way is closed (by the caller, before). A receiver that begins after this
//!    can't authenticate, or finds nobody, also if step 1 is read late. libpq reads the key when it connects.
//! 3. Every receiver alive at that moment is ended and waited for, as a *process*; so is every child of the
//!    postmaster that hasn't said yet what it is, since it may be a receiver in its first microseconds. Unless it has a
//!    client over TCP: PostgreSQL names the process of one only when it has said who it is, which over a long way takes a
//!    while, and of one that says nothing a minute.
//! 4. All children of that moment are looked at once more: a name is written in place, and may have been read in half.
//!
//! If the postmaster ends while they are listed, one of them may be missing: then nothing is cut.
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
    set(run, &conninfo::render(to, &down), instance)
}

/// As [`follow`], by the relay whose socket is in `folder`. The receiver has no key, and needs none.
///
/// # Errors
/// As the file system's.
pub fn follow_by(
    run: &Path,
    folder: &Path,
    port: u16,
    voter: &str,
    instance: &str,
    timeout_seconds: u32,
) -> io::Result<()> {
    let conninfo = conninfo::render_local(folder, port, voter, timeout_seconds);
    set(run, &conninfo, instance)
}

fn set(run: &Path, conninfo: &str, instance: &str) -> io::Result<()> {
    let text = settings::upstream(Some(conninfo), &settings::slot(instance));
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

/// Cuts the standby off its upstream for certain: see the module's text. Clients connect to it at `port`. Returns how
/// long it took.
///
/// # Errors
/// If a receiver is still there after `limit`, or the postmaster ended meanwhile. The caller must then stop PostgreSQL at
/// once; until that is done, nothing is cut.
pub async fn cut(
    run: &Path,
    postmaster: Proc,
    port: u16,
    limit: Duration,
) -> anyhow::Result<Duration> {
    let begun = Instant::now();
    forsake(run).context("can't take the upstream away")?;
    proc::reload(postmaster.pid);

    let children = children(postmaster.pid).context("can't list PostgreSQL's processes")?;
    // Whoever it left behind then has another parent, and isn't in the list.
    if !postmaster.alive() {
        bail!("PostgreSQL ended while it was cut off");
    }
    let mut pause = Duration::from_millis(1);
    let mut suspects = children.clone();
    let mut again = true;
    loop {
        suspects = end_receivers(suspects, postmaster.pid, port);
        if suspects.is_empty() {
            if !std::mem::take(&mut again) {
                return Ok(begun.elapsed());
            }
            suspects.clone_from(&children);
            continue;
        }
        if begun.elapsed() >= limit {
            bail!(
                "{} receiver processes are still there after {} ms",
                suspects.len(),
                limit.as_millis()
            );
        }
        // A process that isn't our child has no event to wait for but its end, which is near.
        tokio::time::sleep(pause).await;
        pause = (pause * 2).min(Duration::from_millis(20));
    }
}

/// Tells those that are receivers to end. Those that are, and those that may be.
fn end_receivers(of: BTreeSet<Proc>, postmaster: i32, port: u16) -> BTreeSet<Proc> {
    let own = proc::title(postmaster).unwrap_or_default();
    // Before anybody's sockets: a client that comes later is only looked at once more.
    let mut clients: Option<BTreeSet<u64>> = None;
    let open = |suspect: &Proc| match kind(*suspect, &own) {
        Kind::Receiver => {
            let _ = kill(Pid::from_raw(suspect.pid), Signal::SIGTERM);
            true
        }
        Kind::Unnamed => {
            let clients = clients
                .get_or_insert_with(|| proc::connections(postmaster, port).unwrap_or_default());
            !has_client(*suspect, &own, clients)
        }
        Kind::Other | Kind::Gone => false,
    };
    of.into_iter().filter(open).collect()
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Receiver,
    Unnamed,
    Other,
    Gone,
}

/// The postmaster's children.
fn children(postmaster: i32) -> io::Result<BTreeSet<Proc>> {
    let all = proc::all()?.into_iter();
    Ok(all
        .filter(|(_, stat)| stat.parent == postmaster)
        .map(|(child, _)| child)
        .collect())
}

/// What a process is, by the title that PostgreSQL gives it; `own` is the postmaster's.
fn kind(of: Proc, own: &[u8]) -> Kind {
    if of.stat().is_none() {
        return Kind::Gone;
    }
    match proc::title(of.pid) {
        // A zombie has no title; it acknowledges nothing any more.
        Some(title) if !title.is_empty() => classify(&title, own),
        _ => Kind::Gone,
    }
}

/// Whether a child without a name was begun for one of the clients' connections. A receiver taken for one would go on
/// acknowledging after the vote: but its own end of a connection is at another port, and it has one only once it has its
/// name.
fn has_client(of: Proc, own: &[u8], clients: &BTreeSet<u64>) -> bool {
    // Its name last: between the two it may have become a receiver.
    proc::sockets(of.pid).is_ok_and(|its| !its.is_disjoint(clients))
        && kind(of, own) == Kind::Unnamed
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
    let own = proc::title(postmaster)?;
    children(postmaster)
        .ok()?
        .into_iter()
        .find(|p| kind(*p, &own) == Kind::Receiver)
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
