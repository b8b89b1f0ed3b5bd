//! What the API says: the forms of its answers.
//!
//! Owns their names, which are stable; the ledger's types may change behind them. Never: an identifier, or a hash of one.

use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use utoipa::ToSchema;
use uuid::Uuid;

use super::filing::{NewRequest, word};
use super::problem::Document;
use crate::deadlines::Clocks;
use crate::rights::ledger::{
    Counts, Listed, RequestCount, RequestView, StepCount, StepState, StepView,
};
use crate::rights::model::{Filing, Outcome, State};

/// A request.
#[derive(Clone, Debug, PartialEq, Serialize, ToSchema)]
#[serde(rename_all = "camelCase")]
#[schema(as = Request)]
pub struct Request {
    /// Its id.
    pub id: Uuid,
    /// What is asked for.
    #[schema(example = "deletion")]
    pub kind: String,
    /// awaiting-approval, open, closed or withdrawn.
    #[schema(example = "open")]
    pub state: String,
    /// Under which laws.
    pub regimes: Vec<String>,
    /// How it came.
    #[schema(example = "api")]
    pub channel: String,
    /// When the clocks began.
    #[schema(value_type = String, format = DateTime)]
    pub received_at: Timestamp,
    /// Until when its receipt must be confirmed to the person. Absent: no law asks for that.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<String>, format = DateTime, required = false)]
    pub acknowledge_by: Option<Timestamp>,
    /// The legal deadline, before any extension.
    #[schema(value_type = String, format = DateTime)]
    pub answer_by: Timestamp,
    /// The legal deadline after the extension.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<String>, format = DateTime, required = false)]
    pub extended_to: Option<Timestamp>,
    /// Why it was extended.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(required = false)]
    pub extension_reason: Option<String>,
    /// When it ended.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<String>, format = DateTime, required = false)]
    pub closed_at: Option<Timestamp>,
    /// One per target. Absent in the answer to a new filing, when nothing has happened yet.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    #[schema(required = false)]
    pub steps: Vec<Step>,
}

/// What is done at one target.
#[derive(Clone, Debug, PartialEq, Serialize, ToSchema)]
#[serde(rename_all = "camelCase")]
#[schema(as = Step)]
pub struct Step {
    /// The target.
    #[schema(example = "accounts")]
    pub target: String,
    /// Regions whose workers may touch it.
    pub regions: Vec<String>,
    /// parked (waits for approval), ready, leased (a worker is at it), waiting (it failed and is tried again),
    /// settling (erased and seen absent; looked at once more) or done.
    #[schema(example = "done")]
    pub state: String,
    /// How often it was begun.
    pub attempts: u32,
    /// How often it failed.
    pub failures: u32,
    /// Why it failed last.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(required = false)]
    pub last_failure: Option<String>,
    /// How it ended: absent (read back by another connection, and not there), bounded (gone; bytes leave by `until`) or
    /// excepted (the law keeps it, by `section`).
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(required = false, example = "absent")]
    pub outcome: Option<String>,
    /// By when bytes have left, if bounded.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<String>, format = DateTime, required = false)]
    pub until: Option<Timestamp>,
    /// Which section of which law, if excepted.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(required = false)]
    pub section: Option<String>,
    /// What was seen: numbers, times, names of objects.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<Object>, required = false)]
    pub evidence: Option<serde_json::Map<String, Value>>,
    /// When it ended.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<String>, format = DateTime, required = false)]
    pub finished_at: Option<Timestamp>,
}

impl Request {
    /// Of a filing that has just become durable.
    #[must_use]
    pub fn filed(filing: &Filing, clocks: &Clocks) -> Self {
        Self {
            id: filing.id,
            kind: word(filing.kind),
            state: word(if filing.needs_approval {
                State::AwaitingApproval
            } else {
                State::Open
            }),
            regimes: filing.regimes.iter().map(word).collect(),
            channel: word(filing.channel),
            received_at: filing.received_at,
            acknowledge_by: clocks.acknowledge_by,
            answer_by: clocks.answer_by,
            extended_to: None,
            extension_reason: None,
            closed_at: None,
            steps: Vec::new(),
        }
    }
}

impl From<RequestView> for Request {
    fn from(v: RequestView) -> Self {
        Self {
            id: v.id,
            kind: word(v.kind),
            state: word(v.state),
            regimes: v.regimes.iter().map(word).collect(),
            channel: word(v.channel),
            received_at: v.received_at,
            acknowledge_by: v.acknowledge_by,
            answer_by: v.answer_by,
            extended_to: v.extended_to,
            extension_reason: v.extension_reason,
            closed_at: v.closed_at,
            steps: v.steps.into_iter().map(Step::from).collect(),
        }
    }
}

impl From<StepView> for Step {
    fn from(s: StepView) -> Self {
        let state = match s.state {
            StepState::Parked => "parked",
            StepState::Ready => "ready",
            StepState::Leased => "leased",
            StepState::Waiting if s.settling => "settling",
            StepState::Waiting => "waiting",
            StepState::Done => "done",
        };
        let (outcome, until, section) = match s.outcome {
            None => (None, None, None),
            Some(Outcome::Absent) => (Some("absent"), None, None),
            Some(Outcome::Bounded { until }) => (Some("bounded"), Some(until), None),
            Some(Outcome::Excepted { section }) => (Some("excepted"), None, Some(section)),
        };
        Self {
            target: s.target,
            regions: s.regions,
            state: state.to_owned(),
            attempts: s.attempts,
            failures: s.failures,
            last_failure: s.last_failure,
            outcome: outcome.map(str::to_owned),
            until,
            section,
            evidence: s.evidence.map(|e| e.0),
            finished_at: s.finished_at,
        }
    }
}

/// Many requests to file.
#[derive(Debug, Serialize, ToSchema)]
#[schema(as = Bulk)]
pub struct Bulk {
    /// 1 to 1,000 of them.
    #[schema(min_items = 1, max_items = 1000)]
    pub requests: Vec<BulkItem>,
}

/// One of them.
#[derive(Debug, Serialize, ToSchema)]
#[serde(rename_all = "camelCase")]
#[schema(as = BulkItem)]
pub struct BulkItem {
    /// The request.
    pub request: NewRequest,
    /// What the header `Idempotency-Key` is to a single filing.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(required = false, max_length = 255)]
    pub idempotency_key: Option<String>,
}

/// Its fields.
pub const BULK_ITEM_FIELDS: &[&str] = &["request", "idempotencyKey"];

/// What became of a bulk.
#[derive(Debug, Serialize, ToSchema)]
#[serde(rename_all = "camelCase")]
#[schema(as = BulkResult)]
pub struct BulkResult {
    /// How many are new and durable.
    pub accepted: usize,
    /// How many were there already.
    pub repeated: usize,
    /// How many were refused.
    pub refused: usize,
    /// One per request, in the same order.
    pub results: Vec<ItemResult>,
}

/// What became of one of a bulk.
#[derive(Debug, Serialize, ToSchema)]
#[schema(as = ItemResult)]
pub struct ItemResult {
    /// As for a single filing: 201 (new), 200 (it was there already), 409, 422.
    #[schema(example = 201)]
    pub status: u16,
    /// Its id; the earlier one's, if it was there already.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(required = false)]
    pub id: Option<Uuid>,
    /// Until when it must be answered. Only if it is new.
    #[serde(rename = "answerBy", skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<String>, format = DateTime, required = false)]
    pub answer_by: Option<Timestamp>,
    /// Why it was refused.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(required = false)]
    pub problem: Option<Document>,
}

/// Why and since when a deadline is extended.
#[derive(Debug, Serialize, ToSchema)]
#[serde(rename_all = "camelCase")]
#[schema(as = Extension)]
pub struct Extension {
    /// When the person was told of the extension, with the reason.
    #[schema(value_type = String, format = DateTime)]
    pub notice_sent_at: Timestamp,
    /// complexity, number-of-requests or other.
    #[schema(example = "complexity")]
    pub reason: String,
}

/// Its fields.
pub const EXTENSION_FIELDS: &[&str] = &["noticeSentAt", "reason"];
/// What may be a reason. Words, not text: somebody would write the person's name into it.
pub const EXTENSION_REASONS: &[&str] = &["complexity", "number-of-requests", "other"];

/// A page of a list.
#[derive(Debug, Serialize, ToSchema)]
#[schema(as = Page)]
pub struct Page {
    /// Requests, by deadline; those that have ended by their end.
    pub items: Vec<Entry>,
    /// What to give as `after` for the next page. Absent: this is the last.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(required = false)]
    pub next: Option<String>,
}

/// A request in a list.
#[derive(Debug, Serialize, ToSchema)]
#[serde(rename_all = "camelCase")]
#[schema(as = Entry)]
pub struct Entry {
    /// Its id.
    pub id: Uuid,
    /// What is asked for.
    pub kind: String,
    /// Where it stands.
    pub state: String,
    /// Under which laws.
    pub regimes: Vec<String>,
    /// How it came.
    pub channel: String,
    /// When the clocks began.
    #[schema(value_type = String, format = DateTime)]
    pub received_at: Timestamp,
    /// Until when its receipt must be confirmed to the person.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<String>, format = DateTime, required = false)]
    pub acknowledge_by: Option<Timestamp>,
    /// The legal deadline as it stands.
    #[schema(value_type = String, format = DateTime)]
    pub deadline: Timestamp,
    /// Whether it was extended.
    pub extended: bool,
    /// When it ended.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<String>, format = DateTime, required = false)]
    pub closed_at: Option<Timestamp>,
    /// How many steps it has.
    pub steps: u32,
    /// How many are done.
    pub steps_done: u32,
    /// How many have failed and aren't done.
    pub steps_failing: u32,
}

impl From<Listed> for Entry {
    fn from(l: Listed) -> Self {
        Self {
            id: l.id,
            kind: word(l.kind),
            state: word(l.state),
            regimes: l.regimes.iter().map(word).collect(),
            channel: word(l.channel),
            received_at: l.received_at,
            acknowledge_by: l.acknowledge_by,
            deadline: l.deadline,
            extended: l.extended,
            closed_at: l.closed_at,
            steps: l.steps,
            steps_done: l.steps_done,
            steps_failing: l.steps_failing,
        }
    }
}

/// What isn't ended, counted.
#[derive(Debug, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "camelCase")]
#[schema(as = Counts)]
pub struct Tally {
    /// When, by the ledger's clock.
    #[schema(value_type = String, format = DateTime)]
    pub at: Timestamp,
    /// How many requests aren't ended.
    pub open: u64,
    /// The earliest legal deadline of one of them.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<String>, format = DateTime, required = false)]
    pub nearest_deadline: Option<Timestamp>,
    /// By state.
    pub requests: Vec<StateTally>,
    /// By target.
    pub targets: Vec<TargetTally>,
}

/// Requests of a state.
#[derive(Debug, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "camelCase")]
#[schema(as = StateCounts)]
pub struct StateTally {
    /// Which.
    pub state: String,
    /// How many.
    pub count: u64,
    /// How many are past their deadline.
    pub overdue: u64,
    /// How many have less than a day left; those overdue included.
    pub within_day: u64,
    /// Less than seven days.
    pub within_week: u64,
    /// Less than thirty days.
    pub within_month: u64,
}

/// Steps of a target, of requests that aren't ended.
#[derive(Debug, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "camelCase")]
#[schema(as = TargetCounts)]
pub struct TargetTally {
    /// The target.
    pub target: String,
    /// Regions whose workers may touch it.
    pub regions: Vec<String>,
    /// Wait for approval.
    pub parked: u64,
    /// Wait for a worker.
    pub ready: u64,
    /// In a worker's hands.
    pub leased: u64,
    /// Failed, and will be tried again.
    pub waiting: u64,
    /// Erased, to be looked at once more.
    pub settling: u64,
    /// Done, while another target isn't.
    pub done: u64,
    /// Have failed, and aren't done.
    pub failing: u64,
    /// Have failed, and little of their time is left: for a person to look at.
    pub raised: u64,
    /// Past their deadline.
    pub overdue: u64,
}

impl From<Counts> for Tally {
    fn from(c: Counts) -> Self {
        Self {
            at: c.at,
            open: c.open(),
            nearest_deadline: c.nearest_deadline(),
            requests: c.requests.into_iter().map(StateTally::from).collect(),
            targets: c.steps.into_iter().map(TargetTally::from).collect(),
        }
    }
}

impl From<RequestCount> for StateTally {
    fn from(r: RequestCount) -> Self {
        Self {
            state: word(r.state),
            count: r.count,
            overdue: r.overdue,
            within_day: r.within_day,
            within_week: r.within_week,
            within_month: r.within_month,
        }
    }
}

impl From<StepCount> for TargetTally {
    fn from(s: StepCount) -> Self {
        Self {
            target: s.target,
            regions: s.regions,
            parked: s.parked,
            ready: s.ready,
            leased: s.leased,
            waiting: s.waiting,
            settling: s.settling,
            done: s.done,
            failing: s.failing,
            raised: s.raised,
            overdue: s.overdue,
        }
    }
}
