//! PostgreSQL's process, as manager and agent share it.
//!
//! Owns which postmaster is the latest, whether it may accept writes, and whether the agent stops it.
//! Never: starts or stops one; takes one for another.

use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::instance::kill::Family;
use crate::instance::proc::Proc;

/// PostgreSQL's process, as manager and agent share it.
#[derive(Clone, Debug, Default)]
pub struct Server(Arc<Mutex<State>>);

#[derive(Debug, Default)]
struct State {
    family: Option<Family>,
    /// It accepts writes, or may in a moment: it was promoted, or started as a primary.
    leads: bool,
    /// The agent stops it.
    stopped: bool,
}

impl Server {
    fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// It was started, on this data directory.
    pub fn started(&self, pid: u32, data: &Path, leads: bool) {
        *self.state() = State {
            family: Proc::of(pid).map(|p| Family::on(p, data)),
            leads,
            stopped: false,
        };
    }

    /// It ended: which one, and whether the agent had stopped it.
    #[must_use]
    pub fn ended(&self) -> (Option<Proc>, bool) {
        let mut state = self.state();
        let process = state.family.as_ref().map(Family::postmaster);
        (process, std::mem::take(&mut state.stopped))
    }

    /// The postmaster that was started last. It may be over; what it started may not.
    #[must_use]
    pub fn latest(&self) -> Option<Proc> {
        self.state().family.as_ref().map(Family::postmaster)
    }

    /// Its process, while it lives.
    #[must_use]
    pub fn process(&self) -> Option<Proc> {
        let state = self.state();
        let process = state.family.as_ref()?.postmaster();
        process.alive().then_some(process)
    }

    /// Whether nothing lives any more of the one that was started last, not even a process that outlived its postmaster.
    ///
    /// # Errors
    /// If `/proc` can't be read.
    pub fn is_over(&self) -> std::io::Result<bool> {
        let family = self.state().family.clone();
        family.map_or(Ok(true), |mut family| Ok(family.living()?.is_empty()))
    }

    /// Whether it accepts writes, or may in a moment.
    #[must_use]
    pub fn leads(&self) -> bool {
        self.state().leads
    }

    pub(super) fn set_leads(&self) {
        self.state().leads = true;
    }

    /// The agent stops it: only this one, or all there is. Who that is; nobody, if another was started meanwhile. In
    /// one step: a mark that the next one bore would have its end taken for one that the agent knows of.
    pub(super) fn stops(&self, only: Option<Proc>) -> Option<Family> {
        let mut state = self.state();
        let family = state.family.clone()?;
        if only.is_some_and(|p| p != family.postmaster()) {
            return None;
        }
        state.stopped = true;
        Some(family)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::process::{Child, Command};

    fn process(dir: &Path) -> (Child, Proc) {
        let child = Command::new("sleep")
            .arg("1000")
            .current_dir(dir)
            .spawn()
            .unwrap();
        let process = Proc::of(child.id()).unwrap();
        (child, process)
    }

    #[test]
    fn the_end_of_an_earlier_one_is_not_its_successors() {
        let dir = tempfile::tempdir().unwrap();
        let (mut first, was) = process(dir.path());
        let (mut second, is) = process(dir.path());
        let server = Server::default();
        server.started(first.id(), dir.path(), true);
        assert_eq!(server.ended(), (Some(was), false));

        // Its end begins to be made sure of after the next one was started.
        server.started(second.id(), dir.path(), false);
        assert!(server.stops(Some(was)).is_none());
        assert_eq!(server.ended(), (Some(is), false), "it ended by itself");

        let family = server.stops(Some(is)).unwrap();
        assert_eq!(family.postmaster(), is);
        assert_eq!(server.ended(), (Some(is), true));
        assert!(server.stops(None).is_some());
        assert!(!server.is_over().unwrap());
        for child in [&mut first, &mut second] {
            child.kill().unwrap();
            child.wait().unwrap();
        }
        assert_eq!(server.process(), None);
        assert!(server.is_over().unwrap());
        assert_eq!(server.latest(), Some(is));
    }
}
