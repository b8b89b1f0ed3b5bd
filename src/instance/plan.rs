//! What the instance does next: a pure function of what is seen.
//!
//! Owns the rules for when a volume may be initialised, cloned over, started or stopped.
//! Never: does I/O, reads a clock, or decides which instance is the primary: that is the failover protocol's, whose
//! word is [`Duty`].
//!
//! Invariants, each a property test below:
//! - a database cluster is never initialised while any identifier is known, or from a remembered store;
//! - PostgreSQL is never started on, and nothing replaces, a volume that holds another system;
//! - nothing is cloned over a copy unless the protocol has marked it as one that doesn't count any more; clients are
//!   never let in before the store knows whose data they would write to; PostgreSQL is never started as a primary,
//!   except once, over its socket, to found a store.

use std::time::Duration;

use super::volume::UNTOUCHED;

/// What PGDATA on the volume is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Content {
    /// There is none.
    Empty,
    /// A database cluster.
    Cluster(Cluster),
    /// What is left of one where only its version and its control file would tell whose it was; in words.
    Remains(String),
    /// Something that can't be read as one; in words.
    Unusable(String),
}

/// A database cluster on the volume.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Cluster {
    /// PostgreSQL's major version that made it.
    pub major: u32,
    /// PostgreSQL's identifier of it.
    pub system_identifier: String,
    /// Whether it is a standby's copy (`standby.signal`).
    pub standby: bool,
}

/// How current the view of the store is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Source {
    /// The API server answered in this life of the manager.
    Live,
    /// From the volume; the API server was given its time to answer.
    Remembered,
    /// From the volume; the API server may still answer in a moment.
    Asking,
}

/// What the store's object says, as far as this instance's life depends on it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StoreSeen {
    /// How current it is.
    pub source: Source,
    /// The instance that is to accept writes.
    pub primary: Option<String>,
    /// The system identifier of the store, if it has one: `status.systemIdentifier`, else the primary's.
    pub system_identifier: Option<String>,
    /// Whether any instance ever reported a system identifier, this one included.
    pub any_identifier: bool,
    /// Whether instances have ever agreed on a configuration: who is primary is theirs to say since then.
    pub governed: bool,
}

/// What the failover protocol wants of this instance.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Duty {
    /// It knows no configuration: a new store, or a new volume.
    Unknown,
    /// Run as a standby; whom it follows is not this plan's matter.
    Standby,
    /// It's the primary, or about to be.
    Primary,
    /// Its copy doesn't count any more, and is to be replaced.
    Copy {
        /// Whether somebody serves from whom it can be made.
        ready: bool,
    },
    /// A person has fenced it.
    Fenced,
}

/// Which programs there are.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Programs {
    /// PostgreSQL of this major version.
    Major(u32),
    /// None, or none that is supported; in words.
    Missing(String),
}

/// As what PostgreSQL is run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    /// Was promoted: accepts writes. Never started as such.
    Primary,
    /// Accepts writes, but is reached over the Unix socket only: a database cluster that was just made.
    Founding,
    /// Follows, started without an upstream.
    Standby,
}

/// PostgreSQL as a process.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Process {
    /// Not there.
    Stopped,
    /// There, in this mode.
    Running(Mode),
}

/// Everything the next step depends on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Seen {
    /// This instance.
    pub me: String,
    /// The store, unless it was never seen.
    pub store: Option<StoreSeen>,
    /// PGDATA.
    pub content: Content,
    /// Whether something unfinished lies beside PGDATA.
    pub leftover: bool,
    /// PostgreSQL's programs.
    pub programs: Programs,
    /// PostgreSQL's process.
    pub process: Process,
    /// A long piece of work under way, in words.
    pub job: Option<String>,
    /// Whether certificate, key and authority are there.
    pub certificate: bool,
    /// Whether the application's credentials are there.
    pub credentials: bool,
    /// Whether the user's parameters were tried.
    pub parameters_tried: bool,
    /// After a failure: why, and how long to wait.
    pub backing_off: Option<(String, Duration)>,
    /// What the failover protocol wants.
    pub duty: Duty,
    /// Whether this volume has held a copy of the store's data, as what it keeps beside them says.
    pub held: bool,
}

/// The one next step.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Step {
    /// Nothing can be done yet; in words.
    Wait(String),
    /// Nothing can be done until a person acts; in words.
    Fail(String),
    /// Remove what lies unfinished beside PGDATA.
    ClearLeftover,
    /// Make a new database cluster.
    InitDb,
    /// Copy the primary's.
    Clone {
        /// Whether a present copy is replaced.
        replace: bool,
    },
    /// The store knows the new database cluster: this instance is its first voter.
    Found,
    /// Run PostgreSQL.
    Start(Mode),
    /// Stop PostgreSQL; in words.
    Stop(String),
    /// PostgreSQL runs as it should: look after it.
    Serve(Mode),
}

/// The next step.
#[must_use]
pub fn next(seen: &Seen) -> Step {
    if let Some(job) = &seen.job {
        return Step::Wait(job.clone());
    }
    let wanted = wanted(seen);
    match (seen.process, wanted) {
        (Process::Running(_), _) if seen.duty == Duty::Fenced => {
            Step::Stop("it is fenced by hand".to_owned())
        }
        (Process::Running(now), Ok(mode)) if now == mode => Step::Serve(now),
        (Process::Running(now), Ok(mode)) => Step::Stop(match (now, mode) {
            (Mode::Founding, Mode::Standby) => {
                "the store knows this database cluster now: opening it to clients".to_owned()
            }
            _ => "it is to run in another mode".to_owned(),
        }),
        (Process::Running(Mode::Founding) | Process::Stopped, Err(Step::Found)) => Step::Found,
        // A standby that can't go on is stopped before it's replaced.
        (Process::Running(_), Err(Step::Clone { .. } | Step::ClearLeftover))
            if seen.duty == (Duty::Copy { ready: true }) =>
        {
            Step::Stop("it is copied anew".to_owned())
        }
        // Whatever else can't be satisfied now would have kept it from starting; it's no reason to take a
        // serving PostgreSQL down (a lost certificate mount, a changed image, an unreachable API server).
        (Process::Running(now), Err(_)) => Step::Serve(now),
        (Process::Stopped, Ok(mode)) => startable(seen, mode),
        (Process::Stopped, Err(step)) => step,
    }
}

/// What keeps a PostgreSQL that runs from being started again, if it were stopped now; in words.
#[must_use]
pub fn complaint(seen: &Seen) -> Option<String> {
    match wanted(seen) {
        Err(Step::Fail(why)) if seen.process != Process::Stopped => Some(why),
        _ => None,
    }
}

/// As what PostgreSQL is to run, or what has to come first.
fn wanted(seen: &Seen) -> Result<Mode, Step> {
    let wait = |why: &str| Err(Step::Wait(why.to_owned()));
    let fail = |why: String| Err(Step::Fail(why));

    let Some(store) = &seen.store else {
        return wait("waits for the API server: this instance has never seen its store");
    };
    let unknown = seen.duty == Duty::Unknown;
    if unknown && store.primary.is_none() {
        return wait("waits for the operator to choose the first primary");
    }
    if unknown && store.source == Source::Asking {
        return wait("asks the API server for its store");
    }
    let major = match &seen.programs {
        Programs::Missing(why) => return fail(why.clone()),
        Programs::Major(major) => *major,
    };
    // Only as long as the instances themselves have never agreed on anything.
    let first = unknown && !store.governed && store.primary.as_deref() == Some(&seen.me);

    match &seen.content {
        Content::Unusable(why) => fail(why.clone()),
        Content::Cluster(cluster) => {
            fits(seen, store, cluster, major)?;
            present(seen, store, cluster, first)
        }
        Content::Remains(why) => remains(seen, store, why),
        Content::Empty if first => {
            if store.any_identifier || store.system_identifier.is_some() {
                return fail(
                    "the primary's volume is lost: it is empty, but the store has been initialised before. \
                     A new database cluster is never made in its place; bring the volume back, or restore \
                     the store from another copy"
                        .to_owned(),
                );
            }
            if store.source != Source::Live {
                return wait(
                    "waits for the API server: a store is initialised only with its consent",
                );
            }
            if !seen.credentials {
                return wait("waits for the Secret with the application's credentials");
            }
            Err(clear_or(seen, Step::InitDb))
        }
        Content::Empty => {
            if seen.duty == Duty::Fenced {
                return wait("is fenced by hand");
            }
            if seen.duty == Duty::Primary || seen.duty == Duty::Standby {
                return wait(
                    "the volume is lost: it is empty; waits for a primary that serves, to copy it. If there is \
                     no other copy, bring the volume back",
                );
            }
            if seen.duty != (Duty::Copy { ready: true }) || store.system_identifier.is_none() {
                return wait("waits for a primary that serves, to copy it");
            }
            Err(copy(seen, false))
        }
    }
}

/// Whether the volume's database cluster is the store's, and of the image's version.
fn fits(seen: &Seen, store: &StoreSeen, cluster: &Cluster, major: u32) -> Result<(), Step> {
    if let Some(known) = &store.system_identifier
        && *known != cluster.system_identifier
    {
        return Err(Step::Fail(format!(
            "this volume holds another database cluster ({}) than the store's ({known}): nothing was touched; \
             if the volume's content isn't needed, delete the volume claim and the pod of {}",
            cluster.system_identifier, seen.me
        )));
    }
    if cluster.major != major {
        return Err(Step::Fail(format!(
            "this volume was made by PostgreSQL {}, but the image has PostgreSQL {major}: nothing was touched; \
             set postgres.image back to one of PostgreSQL {}",
            cluster.major, cluster.major
        )));
    }
    Ok(())
}

/// What is to become of the remains of a copy. If this volume has held one, they are that, and are replaced as an empty
/// volume is filled, as soon as another copy serves; else they are somebody's, and stay as they are.
fn remains(seen: &Seen, store: &StoreSeen, why: &str) -> Result<Mode, Step> {
    match seen.duty {
        Duty::Fenced => Err(Step::Wait("is fenced by hand".to_owned())),
        Duty::Copy { ready: true } if seen.held && store.system_identifier.is_some() => {
            Err(copy(seen, true))
        }
        _ if seen.held => Err(Step::Fail(format!(
            "{why}; it is replaced as soon as a primary serves. If there is no other copy, restore this one"
        ))),
        _ => Err(Step::Fail(format!("{why}{UNTOUCHED}"))),
    }
}

/// What is to become of the database cluster that is there.
fn present(seen: &Seen, store: &StoreSeen, cluster: &Cluster, first: bool) -> Result<Mode, Step> {
    match seen.duty {
        Duty::Unknown if first && !cluster.standby => {
            if store.system_identifier.is_some() {
                Err(Step::Found)
            } else {
                Ok(Mode::Founding)
            }
        }
        Duty::Unknown | Duty::Standby => Ok(Mode::Standby),
        Duty::Primary => match seen.process {
            Process::Running(mode @ (Mode::Standby | Mode::Primary)) => Ok(mode),
            _ => Err(Step::Wait(
                "waits for its own part in the failover to end".to_owned(),
            )),
        },
        Duty::Copy { ready: true } if store.system_identifier.is_some() => {
            Err(clear_or(seen, Step::Clone { replace: true }))
        }
        Duty::Copy { .. } => match seen.process {
            Process::Running(Mode::Standby) => Ok(Mode::Standby),
            _ => Err(Step::Wait(
                "waits for a primary that serves, to copy it".to_owned(),
            )),
        },
        Duty::Fenced => Err(Step::Wait("is fenced by hand".to_owned())),
    }
}

/// A copy of the primary's where there is none that counts.
fn copy(seen: &Seen, replace: bool) -> Step {
    if !seen.certificate {
        return Step::Wait("waits for the Secret with its certificate".to_owned());
    }
    clear_or(seen, Step::Clone { replace })
}

/// Work that writes beside PGDATA: after any back-off, and never over leftovers.
fn clear_or(seen: &Seen, step: Step) -> Step {
    if let Some((why, _)) = &seen.backing_off {
        return Step::Wait(why.clone());
    }
    if seen.leftover {
        Step::ClearLeftover
    } else {
        step
    }
}

/// What is still needed to start.
fn startable(seen: &Seen, mode: Mode) -> Step {
    if let Some((why, _)) = &seen.backing_off {
        return Step::Wait(why.clone());
    }
    if seen.leftover {
        return Step::ClearLeftover;
    }
    if !seen.certificate {
        return Step::Wait("waits for the Secret with its certificate".to_owned());
    }
    if mode == Mode::Founding && !seen.credentials {
        return Step::Wait("waits for the Secret with the application's credentials".to_owned());
    }
    if !seen.parameters_tried {
        return Step::Wait("tries the PostgreSQL parameters".to_owned());
    }
    Step::Start(mode)
}

#[cfg(test)]
mod tests;
