//! The deadlines of one request, and their extension.
//!
//! Owns the arithmetic: which day is the last, when it ends, which of several regimes governs. Never: reads a clock;
//! gives a deadline that some reading of a regime's law calls late (`docs/deadlines.md`).
//!
//! A deadline is the last second of its last day. A last day on a weekend or holiday is left where it is, although
//! several laws let the period end on the next working day: which days these are differs from place to place.

use jiff::civil::Date;
use jiff::tz::{TimeZone, TimeZoneDatabase};
use jiff::{SignedDuration, Span, Timestamp};
use std::collections::BTreeSet;

use super::regimes::rules;
use super::rules::{FirstDay, Kind, Period, Rules, Scope, Unit};
use crate::api::rights_workflow::Regime;

/// The deadlines of a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Clocks {
    /// When it was received: every period is counted from here.
    pub received: Timestamp,
    /// Until when its receipt is to be confirmed; never later than `answer_by`. Absent: no regime asks for it.
    pub acknowledge_by: Option<Timestamp>,
    /// The regime that asks for confirmation first.
    pub acknowledge_governing: Option<Regime>,
    /// Until when it is to be answered, unless extended.
    pub answer_by: Timestamp,
    /// The regime whose answer is due first.
    pub governing: Regime,
    /// How it may be extended. Absent: it can't be.
    pub extension: Option<Extendable>,
    /// Until when it was extended.
    pub extended_to: Option<Timestamp>,
    /// For a deletion: what it reaches, and the regime that reaches so far.
    pub deletion: Option<(Scope, Regime)>,
}

impl Clocks {
    /// Until when it is to be answered, as things are.
    #[must_use]
    pub fn deadline(&self) -> Timestamp {
        self.extended_to.unwrap_or(self.answer_by)
    }
}

/// How the answer may be put off, once.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Extendable {
    /// To when.
    pub to: Timestamp,
    /// Until when the person must have been told, and that been logged.
    pub notice_by: Timestamp,
    /// The regime that doesn't let it be put off further.
    pub governing: Regime,
    /// Where that regime's limit is written.
    pub citation: &'static str,
}

/// Why there are no clocks.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    /// Nothing to count by.
    #[error("no regime is named: name at least one, since it sets the deadlines")]
    NoRegime,
    /// No right.
    #[error("none of the regimes named gives a person a right to {kind}: name one that does")]
    NoRight {
        /// To what.
        kind: Kind,
    },
    /// Beyond the end of time.
    #[error("deadlines under {regime} can't be counted from {received}: no such date")]
    OutOfRange {
        /// Under which regime.
        regime: &'static str,
        /// From when.
        received: Timestamp,
    },
    /// Can't be, unless this program was built without its time zones.
    #[error("time zone {0} isn't part of this program")]
    NoZone(&'static str),
}

/// Why a request isn't extended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    /// Once is all.
    #[error(
        "the request was extended to {to} already, and no law extends one twice: answer by then"
    )]
    Twice {
        /// To when.
        to: Timestamp,
    },
    /// The law has none.
    #[error("{regime} permits no extension: answer by {answer_by}")]
    Never {
        /// Under which regime.
        regime: &'static str,
        /// Until when.
        answer_by: Timestamp,
    },
    /// Nobody can be told of it before.
    #[error(
        "the notice is dated {notice}, before the request was received ({received}): correct its time"
    )]
    BeforeReceipt {
        /// When the person is said to have been told.
        notice: Timestamp,
        /// When the request came.
        received: Timestamp,
    },
    /// Will be is not has been.
    #[error(
        "the notice is dated {notice}, which is to come (now {now}): tell the person first, then extend"
    )]
    Ahead {
        /// When the person is said to have been told.
        notice: Timestamp,
        /// What the time is.
        now: Timestamp,
    },
    /// Told too late.
    #[error(
        "the person was told at {notice}, and the first period had ended at {notice_by}: an extension counts only \
         if the person is told of it, with the reason, within the first period; the answer is overdue"
    )]
    Late {
        /// When the person was told.
        notice: Timestamp,
        /// Until when they had to be.
        notice_by: Timestamp,
    },
    /// Told in time, it is said afterwards.
    #[error(
        "the notice of {notice} was not logged before the first period ended at {notice_by} (now {now}): a notice \
         that is dated back proves nothing; the answer is overdue"
    )]
    LoggedLate {
        /// When the person is said to have been told.
        notice: Timestamp,
        /// Until when that had to be logged.
        notice_by: Timestamp,
        /// What the time is.
        now: Timestamp,
    },
}

/// The rules of the regimes that give a right to `kind`, each once, in their order.
pub(super) fn granting(regimes: &[Regime], kind: Kind) -> Result<Vec<&'static Rules>, Error> {
    if regimes.is_empty() {
        return Err(Error::NoRegime);
    }
    let distinct: BTreeSet<Regime> = regimes.iter().copied().collect();
    let granting: Vec<_> = distinct
        .into_iter()
        .map(rules)
        .filter(|rules| rules.grants.contains(&kind))
        .collect();
    if granting.is_empty() {
        return Err(Error::NoRight { kind });
    }
    Ok(granting)
}

/// The deadlines of a request. Of several regimes the earliest deadline holds for each clock, and the widest deletion;
/// a regime that doesn't give a right to this kind of request has no say.
///
/// # Errors
/// If no regime is named, none gives a right to this kind of request, or a deadline would be beyond the year 9999.
pub fn clocks(regimes: &[Regime], kind: Kind, received: Timestamp) -> Result<Clocks, Error> {
    let regimes = granting(regimes, kind)?;
    let limits = regimes
        .iter()
        .map(|rules| Limits::of(rules, kind, received))
        .collect::<Result<Vec<_>, _>>()?;

    // Of two that end alike, the one that can't be put off governs, then the one that is listed first: the answer
    // doesn't depend on their order in a request.
    let answer = limits
        .iter()
        .min_by_key(|l| (l.answer, l.extended, l.rules.regime))
        .ok_or(Error::NoRegime)?;
    // What the others would grant doesn't help: a regime without extension holds for the same answer.
    let extended = limits
        .iter()
        .min_by_key(|l| (l.extended, l.rules.regime))
        .ok_or(Error::NoRegime)?;
    let acknowledge = limits
        .iter()
        .filter_map(|l| Some((l.acknowledge?, l.rules.regime)))
        .min();
    let deletion = regimes
        .iter()
        .map(|r| (r.deletion.scope, r.regime))
        .reduce(|widest, other| if other.0 > widest.0 { other } else { widest })
        .filter(|_| kind == Kind::Deletion);

    Ok(Clocks {
        received,
        // A confirmation after the answer would confirm nothing.
        acknowledge_by: acknowledge.map(|(by, _)| by.min(answer.answer)),
        acknowledge_governing: acknowledge.map(|(_, regime)| regime),
        answer_by: answer.answer,
        governing: answer.rules.regime,
        extension: (extended.extended > answer.answer).then(|| Extendable {
            to: extended.extended,
            // Told by then, they are told within the first period of every regime: all others end later.
            notice_by: answer.answer,
            governing: extended.rules.regime,
            citation: extended
                .rules
                .extension_of(kind)
                .map_or(extended.rules.answer_to(kind).citation, |e| e.citation),
        }),
        extended_to: None,
        deletion,
    })
}

/// The clocks with the answer put off as far as the law lets it be. For a request that was extended before, set
/// `extended_to` first.
///
/// # Errors
/// If it was extended before, can't be extended, or the person wasn't told, or that wasn't logged, in time.
pub fn extend(
    clocks: &Clocks,
    notice_given_at: Timestamp,
    now: Timestamp,
) -> Result<Clocks, Refusal> {
    let notice = notice_given_at;
    if let Some(to) = clocks.extended_to {
        return Err(Refusal::Twice { to });
    }
    let Some(extension) = clocks.extension else {
        return Err(Refusal::Never {
            regime: rules(clocks.governing).id,
            answer_by: clocks.answer_by,
        });
    };
    let notice_by = extension.notice_by;
    if notice < clocks.received {
        return Err(Refusal::BeforeReceipt {
            notice,
            received: clocks.received,
        });
    }
    if notice > now {
        return Err(Refusal::Ahead { notice, now });
    }
    if notice > notice_by {
        return Err(Refusal::Late { notice, notice_by });
    }
    if now > notice_by {
        return Err(Refusal::LoggedLate {
            notice,
            notice_by,
            now,
        });
    }
    Ok(Clocks {
        extended_to: Some(extension.to),
        ..*clocks
    })
}

/// What one regime asks.
struct Limits {
    rules: &'static Rules,
    acknowledge: Option<Timestamp>,
    answer: Timestamp,
    /// With an extension, if there is one.
    extended: Timestamp,
}

impl Limits {
    fn of(rules: &'static Rules, kind: Kind, received: Timestamp) -> Result<Self, Error> {
        let received_on = zone(rules.zones.received_in)?.to_datetime(received).date();
        let ends_in = zone(rules.zones.ends_in)?;
        let end = |period: Period| {
            last_day(received_on, period)
                .and_then(|last| end_of(last, &ends_in))
                .ok_or(Error::OutOfRange {
                    regime: rules.id,
                    received,
                })
        };
        let answer = end(rules.answer_to(kind).period)?;
        Ok(Self {
            rules,
            acknowledge: rules
                .acknowledgement_of(kind)
                .map(|clock| end(clock.period))
                .transpose()?,
            answer,
            extended: rules
                .extension_of(kind)
                .map_or(Ok(answer), |e| end(e.in_all))?,
        })
    }
}

/// From the program, not from the image's files: a scratch image has none, and two nodes' may differ.
fn zone(name: &'static str) -> Result<TimeZone, Error> {
    TimeZoneDatabase::bundled()
        .get(name)
        .map_err(|_| Error::NoZone(name))
}

/// The last day of a period.
pub(super) fn last_day(received: Date, period: Period) -> Option<Date> {
    let whole = match period.unit {
        Unit::BusinessDays(calendar) => {
            return calendar.last_of(period.amount, received, period.first).ok();
        }
        Unit::CalendarDays => Span::new().days(period.amount),
        Unit::Months => Span::new().months(period.amount),
    };
    let last = received.checked_add(whole).ok()?;
    match period.first {
        FirstDay::AfterReceipt => Some(last),
        FirstDay::Receipt => last.yesterday().ok(),
    }
}

/// The last second of a day. Where midnight comes twice or not at all, the earlier end.
fn end_of(day: Date, zone: &TimeZone) -> Option<Timestamp> {
    let midnight = day.tomorrow().ok()?.at(0, 0, 0, 0);
    let next = zone.to_timestamp(midnight).ok()?;
    next.checked_sub(SignedDuration::from_secs(1)).ok()
}
