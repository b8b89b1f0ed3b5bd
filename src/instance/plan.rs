//! What the instance does next: a pure function of what is seen.
//!
//! Owns the rules for when a volume may be initialised, cloned over, started or stopped.
//! Never: does I/O, reads a clock, or decides which instance is the primary (`status.primary` says so).
//!
//! Invariants, each a property test below:
//! - a database cluster is never initialised while any identifier is known, or from a remembered store;
//! - PostgreSQL is never started on, and nothing replaces, a volume that holds another system;
//! - the primary's volume is never cloned over, and clients are never let in before the store knows whose
//!   data they would write to.

use std::time::Duration;

/// What PGDATA on the volume is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Content {
    /// There is none.
    Empty,
    /// A database cluster.
    Cluster(Cluster),
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
    /// Whether the primary serves, and can be reached.
    pub primary_ready: bool,
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
    /// Accepts writes, reached by clients.
    Primary,
    /// Accepts writes, but is reached over the Unix socket only: its identifier isn't known to the store yet.
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
    /// This standby can't go on with its copy; in words.
    pub stranded: Option<String>,
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
        (Process::Running(now), Ok(mode)) if now == mode => Step::Serve(now),
        (Process::Running(now), Ok(mode)) => Step::Stop(match (now, mode) {
            (Mode::Founding, Mode::Primary) => {
                "the store knows this database cluster now: opening it to clients".to_owned()
            }
            _ => "it is to run in another mode".to_owned(),
        }),
        // A running server whose place is taken must not go on accepting writes beside the other.
        (Process::Running(_), Err(Step::Fail(why))) if displaced(seen) => Step::Stop(why),
        // A standby that can't go on is stopped before it's replaced.
        (Process::Running(Mode::Standby), Err(Step::Clone { .. } | Step::ClearLeftover)) => {
            Step::Stop("it is cloned anew".to_owned())
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

/// Whether the store names another primary than this running one.
fn displaced(seen: &Seen) -> bool {
    matches!(
        seen.process,
        Process::Running(Mode::Primary | Mode::Founding)
    ) && seen
        .store
        .as_ref()
        .and_then(|s| s.primary.as_deref())
        .is_some_and(|p| p != seen.me)
}

/// As what PostgreSQL is to run, or what has to come first.
fn wanted(seen: &Seen) -> Result<Mode, Step> {
    let wait = |why: &str| Err(Step::Wait(why.to_owned()));
    let fail = |why: String| Err(Step::Fail(why));

    let Some(store) = &seen.store else {
        return wait("waits for the API server: this instance has never seen its store");
    };
    let Some(primary) = &store.primary else {
        return wait("waits for the operator to choose a primary");
    };
    if store.source == Source::Asking {
        return wait("asks the API server for its store");
    }
    let major = match &seen.programs {
        Programs::Missing(why) => return fail(why.clone()),
        Programs::Major(major) => *major,
    };
    let i_am_primary = *primary == seen.me;

    match &seen.content {
        Content::Unusable(why) => fail(why.clone()),
        Content::Cluster(cluster) => {
            if let Some(known) = &store.system_identifier
                && *known != cluster.system_identifier
            {
                return fail(format!(
                    "this volume holds another database cluster ({}) than the store's ({known}): nothing \
                     was touched; if the volume's content isn't needed, delete the volume claim and the pod",
                    cluster.system_identifier
                ));
            }
            if cluster.major != major {
                return fail(format!(
                    "this volume was made by PostgreSQL {}, but the image has PostgreSQL {major}: nothing \
                     was touched; set postgres.image back to one of PostgreSQL {}",
                    cluster.major, cluster.major
                ));
            }
            match (i_am_primary, cluster.standby) {
                (true, true) => fail(
                    "the store names this instance its primary, but this volume holds a standby's copy, \
                     which this release doesn't promote: nothing was touched"
                        .to_owned(),
                ),
                (false, false) => fail(format!(
                    "this volume was a primary's, but the store names {primary} its primary: nothing was \
                     touched; if its content isn't needed, delete the volume claim and the pod, and it is \
                     cloned anew"
                )),
                (true, false) if store.system_identifier.is_some() => Ok(Mode::Primary),
                (true, false) => Ok(Mode::Founding),
                (false, true) => match &seen.stranded {
                    Some(_) if store.system_identifier.is_none() || !store.primary_ready => {
                        Ok(Mode::Standby)
                    }
                    Some(_) => Err(clear_or(seen, Step::Clone { replace: true })),
                    None => Ok(Mode::Standby),
                },
            }
        }
        Content::Empty if i_am_primary => {
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
            if store.source != Source::Live
                || !store.primary_ready
                || store.system_identifier.is_none()
            {
                return Err(Step::Wait(format!(
                    "waits for the primary {primary} to serve"
                )));
            }
            if !seen.certificate {
                return wait("waits for the Secret with its certificate");
            }
            Err(clear_or(seen, Step::Clone { replace: false }))
        }
    }
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
