//! What the agent tells the rest of the instance, and what it's told.
//!
//! Owns the two alphabets between agent and manager. Never: carries a decision the other way: the manager starts and
//! copies what [`View::wanted`] says.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::sync::Arc;
use std::time::Instant;

use jiff::Timestamp;

use crate::api::PrivacyDataStore;
use crate::failover::{Configuration, History, Wanted};
use crate::instance::conninfo::Upstream;
use crate::instance::proc::Proc;
use crate::instance::tls::Certificate;

/// What the agent is told.
#[derive(Clone)]
pub enum Input {
    /// The store's object, as it is now.
    Store(Arc<PrivacyDataStore>),
    /// The certificate, as it is now.
    Certificate(Certificate),
    /// PostgreSQL was started.
    Started,
    /// PostgreSQL ended.
    Ended {
        /// This one: another may have been started since.
        postmaster: Option<Proc>,
        /// This agent had stopped it.
        by_agent: bool,
    },
    /// There is no database cluster on the volume, though the store has one.
    Wiped,
    /// The database cluster was just made, and the store knows it: this is the first voter.
    Founded,
    /// A copy of a primary with this history is whole.
    Copied(History),
    /// This standby can't go on with its copy.
    Stranded,
    /// The instance is told to stop: hand over.
    Leave,
}

/// What the agent says.
#[derive(Clone, Debug, PartialEq)]
pub struct View {
    /// This voter.
    pub me: String,
    /// As what PostgreSQL is to run.
    pub wanted: Wanted<String>,
    /// It serves, under this configuration.
    pub serving: bool,
    /// The configuration that it goes by.
    pub configuration: Option<Configuration<String>>,
    /// The serving primary's instance, if one is known.
    pub primary: Option<String>,
    /// From where a copy can be made, with what history.
    pub source: Option<(Upstream, History)>,
    /// Whose stream it was told to follow.
    pub following: Option<Upstream>,
    /// What PostgreSQL enforces, as `synchronous_standby_names`.
    pub rule: String,
    /// Since when; none while another is being put in its place.
    pub ruled: Option<Instant>,
    /// Its copy doesn't count as data.
    pub rebuilding: bool,
    /// There is, or was, a copy on this volume.
    pub held: bool,
    /// Where the other instances are, as they say themselves.
    pub addresses: BTreeMap<String, IpAddr>,
    /// Instances far away with whom a session is ready.
    pub sessions: Vec<String>,
    /// Fenced by hand.
    pub fenced: bool,
    /// Why there is no primary, as far as this instance knows.
    pub stuck: Option<String>,
    /// The last failover that this instance won.
    pub failover: Option<Failover>,
    /// This instance has handed over, or has nothing to hand over.
    pub left: bool,
}

/// A failover, by its milestones.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Failover {
    /// The new term.
    pub term: u64,
    /// The primary before.
    pub previous: Option<String>,
    /// Why.
    pub reason: &'static str,
    /// The old primary counted as dead.
    pub detected: Option<Timestamp>,
    /// Enough voters were cut off from it.
    pub fenced: Option<Timestamp>,
    /// A majority accepted.
    pub elected: Option<Timestamp>,
    /// PostgreSQL accepts writes.
    pub promoted: Option<Timestamp>,
}
