//! What goes into the ledger and what comes out of it.
//!
//! Owns types only. Nothing here holds an identifier in clear.

use std::fmt;

use jiff::Timestamp;
use jiff::civil::Date;
use serde::Deserialize;
use uuid::Uuid;

use crate::api::rights_workflow::Regime;
use crate::rights::model::{Channel, Evidence, Kind, Outcome, State};

/// A keyed hash.
pub type Hash = [u8; 32];

/// A request as the ledger takes it: clocks computed, identifiers encrypted. Made by
/// [`Keyring::seal`](crate::rights::secrecy::Keyring::seal).
#[derive(Clone, PartialEq, Eq)]
pub struct SealedFiling {
    /// UUIDv7.
    pub id: Uuid,
    /// What is asked for.
    pub kind: Kind,
    /// Under which laws.
    pub regimes: Vec<Regime>,
    /// How it came.
    pub channel: Channel,
    /// When the clocks began.
    pub received_at: Timestamp,
    /// Whether a person must approve it first.
    pub needs_approval: bool,
    /// Until when its receipt must be acknowledged.
    pub acknowledge_by: Option<Timestamp>,
    /// The legal deadline.
    pub answer_by: Timestamp,
    /// Keyed hash of all identifiers together.
    pub subject: Hash,
    /// Keyed hash of the idempotency key.
    pub idempotency: Option<Hash>,
    /// Keyed hash of what is asked, for whom, under which laws, by which channel.
    pub content: Hash,
    /// Day whose key wraps this request's key.
    pub key_epoch: Date,
    /// The request's key, wrapped.
    pub wrapped_key: Vec<u8>,
    /// The identifiers, encrypted.
    pub sealed: Vec<u8>,
    /// Name and keyed hash of every identifier.
    pub hashes: Vec<(String, Hash)>,
}

impl fmt::Debug for SealedFiling {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "SealedFiling({})", self.id)
    }
}

/// What became of a filing. In every case the ledger's answer is on the quorum.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Filed {
    /// It is in the ledger.
    New,
    /// It was there already, with this id: the same idempotency key or id, the same content. Also what a repetition of
    /// one's own filing gets whose first answer was lost; the id is its own then.
    Same(Uuid),
    /// Something else was filed by this idempotency key or id, with this id. Nothing was done.
    Conflict(Uuid),
}

/// What became of a change to a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Changed {
    /// Done.
    Yes,
    /// It was so already.
    Already,
    /// Not possible any more.
    TooLate,
    /// There is no such request.
    Unknown,
}

/// Where a step stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum StepState {
    /// The request waits for its approval.
    Parked,
    /// May be claimed.
    Ready,
    /// A worker has it.
    Leased,
    /// It failed and will be tried again, or it settles.
    Waiting,
    /// Ended, with proof.
    Done,
}

/// A step as others see it.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
pub struct StepView {
    /// Name of the target.
    pub target: String,
    /// Regions whose workers may touch it.
    pub regions: Vec<String>,
    /// Where it stands.
    pub state: StepState,
    /// Erased, seen absent, and to be looked at once more.
    #[serde(default)]
    pub settling: bool,
    /// How often it was claimed.
    pub attempts: u32,
    /// How often it failed.
    pub failures: u32,
    /// Why it failed last.
    #[serde(default)]
    pub last_failure: Option<String>,
    /// Leased: until when. Waiting: until when.
    #[serde(default)]
    pub due_at: Option<Timestamp>,
    /// How it ended.
    #[serde(default)]
    pub outcome: Option<Outcome>,
    /// What was seen.
    #[serde(default)]
    pub evidence: Option<Evidence>,
    /// When it ended.
    #[serde(default)]
    pub finished_at: Option<Timestamp>,
}

/// A request as others see it.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
pub struct RequestView {
    /// Its id.
    pub id: Uuid,
    /// What is asked for.
    pub kind: Kind,
    /// Under which laws.
    pub regimes: Vec<Regime>,
    /// How it came.
    pub channel: Channel,
    /// Where it stands.
    pub state: State,
    /// When the clocks began.
    pub received_at: Timestamp,
    /// Until when its receipt must be acknowledged.
    #[serde(default)]
    pub acknowledge_by: Option<Timestamp>,
    /// The legal deadline, before any extension.
    pub answer_by: Timestamp,
    /// The legal deadline after the extension.
    #[serde(default)]
    pub extended_to: Option<Timestamp>,
    /// Why it was extended.
    #[serde(default)]
    pub extension_reason: Option<String>,
    /// When it ended.
    #[serde(default)]
    pub closed_at: Option<Timestamp>,
    /// One per target.
    pub steps: Vec<StepView>,
}

impl RequestView {
    /// The legal deadline as it stands.
    #[must_use]
    pub fn deadline(&self) -> Timestamp {
        self.extended_to.unwrap_or(self.answer_by)
    }
}

/// Which requests to list.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ListFilter {
    /// Only of this state; absent: all that are not ended. Of ended ones only one state at a time.
    pub state: Option<State>,
    /// Only those whose deadline is before this. Not for ended ones.
    pub due_before: Option<Timestamp>,
}

/// A place in a list: after this entry.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Cursor {
    /// The deadline of the last one; of ended ones, when it ended.
    pub at: Timestamp,
    /// Its id.
    pub id: Uuid,
}

/// A request in a list.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Listed {
    /// Its id.
    pub id: Uuid,
    /// What is asked for.
    pub kind: Kind,
    /// Under which laws.
    pub regimes: Vec<Regime>,
    /// How it came.
    pub channel: Channel,
    /// Where it stands.
    pub state: State,
    /// When the clocks began.
    pub received_at: Timestamp,
    /// Until when its receipt must be acknowledged.
    pub acknowledge_by: Option<Timestamp>,
    /// The legal deadline as it stands.
    pub deadline: Timestamp,
    /// Whether it was extended.
    pub extended: bool,
    /// When it ended.
    pub closed_at: Option<Timestamp>,
    /// How many steps it has.
    pub steps: u32,
    /// How many of them are done. Of a withdrawn one: none.
    pub steps_done: u32,
    /// How many of those that are not done have failed.
    pub steps_failing: u32,
}

impl Listed {
    /// The place after this entry.
    #[must_use]
    pub fn cursor(&self) -> Cursor {
        Cursor {
            at: self.closed_at.unwrap_or(self.deadline),
            id: self.id,
        }
    }
}

/// A step.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct StepId {
    /// Its request.
    pub request: Uuid,
    /// The ledger's number for the target and its regions.
    pub lane: i32,
}

/// A worker's hold on a step. Drawn at random for every claim, so that two claims of one step never have the same,
/// also if a failover made the ledger forget the first.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Lease(pub Uuid);

/// A step that this worker has now.
#[derive(Clone, PartialEq, Eq)]
pub struct Claimed {
    /// Which.
    pub step: StepId,
    /// By what it is held.
    pub lease: Lease,
    /// Until when, by the ledger's clock.
    pub leased_until: Timestamp,
    /// What is asked for.
    pub kind: Kind,
    /// When the request was received.
    pub received_at: Timestamp,
    /// When it was filed, by the ledger's clock.
    pub filed_at: Timestamp,
    /// The legal deadline.
    pub deadline: Timestamp,
    /// How often it was claimed, this time included.
    pub attempts: u32,
    /// How often it failed before; leases that ran out included.
    pub failures: u32,
    /// It was erased and seen absent, and is to be looked at once more.
    pub settling: bool,
    /// Of one that settles: what was said of its erasure.
    pub erasure: Option<Evidence>,
    /// What [`Keyring::open`](crate::rights::secrecy::Keyring::open) needs.
    pub key_epoch: Date,
    /// The same.
    pub wrapped_key: Vec<u8>,
    /// The same.
    pub sealed: Vec<u8>,
}

impl fmt::Debug for Claimed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Claimed")
            .field("step", &self.step)
            .field("lease", &self.lease)
            .field("deadline", &self.deadline)
            .field("attempts", &self.attempts)
            .field("settling", &self.settling)
            .finish_non_exhaustive()
    }
}

/// What became of a claimed step.
#[derive(Clone, Debug, PartialEq)]
pub struct Finished {
    /// Which.
    pub step: StepId,
    /// The hold on it.
    pub lease: Lease,
    /// What became of it.
    pub how: How,
}

/// What became of a claimed step.
#[derive(Clone, Debug, PartialEq)]
pub enum How {
    /// It ended. Without evidence it doesn't, and is tried again.
    Done(Outcome, Evidence),
    /// Erased and seen absent; to be looked at once more after this time.
    Settle {
        /// How long.
        after: std::time::Duration,
        /// What was said of the erasure, to be given to whoever looks again.
        erasure: Evidence,
    },
    /// It failed; to be done again from the beginning after this time.
    Retry {
        /// How long.
        after: std::time::Duration,
        /// Why, in at most 64 lower-case letters, digits and `-`.
        reason: &'static str,
    },
    /// Given back untouched, as by a worker that stops. Counts as no attempt.
    Release,
}

/// Requests of one state.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
pub struct RequestCount {
    /// Which.
    pub state: State,
    /// How many.
    pub count: u64,
    /// The earliest deadline.
    #[serde(default)]
    pub nearest_deadline: Option<Timestamp>,
    /// How many are past their deadline.
    pub overdue: u64,
    /// How many have less than a day left; those overdue included.
    pub within_day: u64,
    /// Less than seven days.
    pub within_week: u64,
    /// Less than thirty days.
    pub within_month: u64,
}

/// Steps of one target, of requests that are not ended.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
pub struct StepCount {
    /// The target.
    pub target: String,
    /// Regions whose workers may touch it. After a change of these, older steps are counted apart.
    pub regions: Vec<String>,
    /// Wait for their request's approval.
    pub parked: u64,
    /// May be claimed.
    pub ready: u64,
    /// In a worker's hands.
    pub leased: u64,
    /// Failed, and will be tried again.
    pub waiting: u64,
    /// To be looked at once more.
    pub settling: u64,
    /// Done, while another step of the request isn't.
    pub done: u64,
    /// Have failed, and are not done.
    pub failing: u64,
    /// Have failed, are not done, and less than a fifth of their time is left: for a person to look at.
    pub raised: u64,
    /// Past their deadline.
    pub overdue: u64,
    /// The earliest deadline of one that isn't done.
    #[serde(default)]
    pub nearest_deadline: Option<Timestamp>,
    /// When the oldest of those that aren't done was received.
    #[serde(default)]
    pub oldest_received: Option<Timestamp>,
}

/// What is not ended, counted.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
pub struct Counts {
    /// When, by the ledger's clock.
    pub at: Timestamp,
    /// By state; a state without requests isn't there.
    pub requests: Vec<RequestCount>,
    /// By target.
    pub steps: Vec<StepCount>,
    /// Days whose keys are still needed.
    pub epochs: Vec<Date>,
    /// Nothing was ever filed: no request, open or ended, and nobody remembered as erased.
    #[serde(default)]
    pub empty: bool,
}

impl Counts {
    /// How many requests are not ended.
    #[must_use]
    pub fn open(&self) -> u64 {
        self.requests.iter().map(|r| r.count).sum()
    }

    /// The earliest legal deadline of a request that isn't ended.
    #[must_use]
    pub fn nearest_deadline(&self) -> Option<Timestamp> {
        self.requests
            .iter()
            .filter_map(|r| r.nearest_deadline)
            .min()
    }
}
