//! What a regime is made of: periods, what may be extended, what may be asked of the person, how far deletion goes.
//!
//! Owns the types and the question whether a person may be asked for proof. Never: says what a law is
//! ([`super::regimes`] does), or counts days ([`mod@super::clocks`] does).

use serde::{Deserialize, Serialize};
use std::fmt;

use super::calendar::Calendar;
use super::clocks::{Error, granting};
use crate::api::rights_workflow::Regime;

/// What a person asks for. Here rather than with requests, since laws tell rights apart before there are requests.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Kind {
    /// Erase what is held of me.
    Deletion,
    /// Tell me what is held of me.
    Access,
    /// Correct what is held of me.
    Correction,
    /// Don't sell or share it; where a law knows no sale, I object to its use.
    OptOut,
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Deletion => "deletion",
            Self::Access => "access",
            Self::Correction => "correction",
            Self::OptOut => "opt-out",
        })
    }
}

/// What periods are counted in.
#[derive(Clone, Copy, Debug)]
pub enum Unit {
    /// Days, whatever they are.
    CalendarDays,
    /// Calendar months: to the same date, or to the last day of a month that doesn't have it.
    Months,
    /// Days on which business is done.
    BusinessDays(&'static Calendar),
}

/// Which day is the first of a period.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FirstDay {
    /// The day after the receipt: the rule of most laws.
    AfterReceipt,
    /// The day of the receipt, where the text lets the period begin with it.
    Receipt,
}

/// A period of time, counted from the receipt of a request.
#[derive(Clone, Copy, Debug)]
pub struct Period {
    /// How many.
    pub amount: u16,
    /// Of what.
    pub unit: Unit,
    /// Beginning when.
    pub first: FirstDay,
}

impl fmt::Display for Period {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let unit = match self.unit {
            Unit::CalendarDays => "day",
            Unit::Months => "month",
            Unit::BusinessDays(_) => "business day",
        };
        let plural = if self.amount == 1 { "" } else { "s" };
        write!(f, "{} {unit}{plural}", self.amount)
    }
}

/// A period that a law sets, and where.
#[derive(Clone, Copy, Debug)]
pub struct Clock {
    /// How long.
    pub period: Period,
    /// Where that is written.
    pub citation: &'static str,
}

/// How far the answer may be put off: once, and only if the person is told, with the reason, before the first period
/// ends. Every law here asks for that, so it isn't data.
#[derive(Clone, Copy, Debug)]
pub struct Extension {
    /// All the time there is with it, counted from the receipt.
    pub in_all: Period,
    /// Where that is written.
    pub citation: &'static str,
}

/// Whether a person may be asked to prove who they are before a request is carried out. The strictest is least.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Verification {
    /// Not at all.
    Never,
    /// Only where there is reasonable doubt.
    OnDoubt,
    /// Yes.
    Allowed,
}

/// Whether proof may be asked for, and where that is written.
#[derive(Clone, Copy, Debug)]
pub struct Proof {
    /// For deletion, access and correction.
    pub requests: Verification,
    /// For opting out.
    pub opt_out: Verification,
    /// Where that is written.
    pub citation: &'static str,
}

impl Proof {
    /// For one kind of request.
    #[must_use]
    pub fn of(&self, kind: Kind) -> Verification {
        match kind {
            Kind::OptOut => self.opt_out,
            Kind::Deletion | Kind::Access | Kind::Correction => self.requests,
        }
    }
}

/// What a deletion reaches. The widest is greatest.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Scope {
    /// What was collected from the person.
    FromThePerson,
    /// What is held about the person, from whatever source.
    AboutThePerson,
    /// That, what was inferred from it, and whatever of it comes back later.
    AboutThePersonForGood,
}

/// What a deletion reaches, and where that is written.
#[derive(Clone, Copy, Debug)]
pub struct Deletion {
    /// What it reaches.
    pub scope: Scope,
    /// Where that is written.
    pub citation: &'static str,
}

/// Where days begin and end. One zone, or the two edges of a law's territory: a request is received on the day that it
/// is in the west, where the date is the older one, and the last day ends when it does in the east, where it ends
/// first. Whichever zone inside a controller's clocks are in, their day doesn't end before that.
#[derive(Clone, Copy, Debug)]
pub struct Zones {
    /// The zone that says on which day a request was received.
    pub received_in: &'static str,
    /// The zone in which the last day ends.
    pub ends_in: &'static str,
}

/// A regime.
#[derive(Clone, Copy, Debug)]
pub struct Rules {
    /// Which.
    pub regime: Regime,
    /// Its id, as in `spec.regimes`.
    pub id: &'static str,
    /// The law's name.
    pub title: &'static str,
    /// The kinds of request that it gives a person a right to.
    pub grants: &'static [Kind],
    /// Until when a request is answered.
    pub answer: Clock,
    /// Until when opting out is honoured, if other than `answer`; it can't be extended then.
    pub opt_out: Option<Clock>,
    /// Until when the receipt of a request other than opting out is confirmed.
    pub acknowledge: Option<Clock>,
    /// How far `answer` may be put off.
    pub extension: Option<Extension>,
    /// What may be asked of the person.
    pub proof: Proof,
    /// What deletion reaches.
    pub deletion: Deletion,
    /// Where days begin and end.
    pub zones: Zones,
    /// How days are counted, and where that is written.
    pub counting: &'static str,
    /// What is uncertain about the above, and which reading was taken.
    pub uncertain: Option<&'static str>,
}

impl Rules {
    /// The clock by which a kind of request is answered.
    #[must_use]
    pub fn answer_to(&self, kind: Kind) -> Clock {
        match (kind, self.opt_out) {
            (Kind::OptOut, Some(clock)) => clock,
            _ => self.answer,
        }
    }

    /// How far the answer to a kind of request may be put off.
    #[must_use]
    pub fn extension_of(&self, kind: Kind) -> Option<Extension> {
        match (kind, self.opt_out) {
            (Kind::OptOut, Some(_)) => None,
            _ => self.extension,
        }
    }

    /// The clock by which the receipt of a kind of request is confirmed.
    #[must_use]
    pub fn acknowledgement_of(&self, kind: Kind) -> Option<Clock> {
        match kind {
            Kind::OptOut => None,
            Kind::Deletion | Kind::Access | Kind::Correction => self.acknowledge,
        }
    }
}

/// What may be asked of the person, and by which regime: the strictest of several holds, since an answer to the person
/// is one answer.
///
/// # Errors
/// If no regime is named, or none gives a right to this kind of request.
pub fn verification(regimes: &[Regime], kind: Kind) -> Result<(Verification, Regime), Error> {
    granting(regimes, kind)?
        .iter()
        .map(|rules| (rules.proof.of(kind), rules.regime))
        .min()
        .ok_or(Error::NoRegime)
}

/// Whether a request may wait for a person's approval. Not if any regime forbids to ask for proof: opting out under
/// the CCPA waits for nobody (11 CCR 7060(b)).
#[must_use]
pub fn needs_approval_allowed(regimes: &[Regime], kind: Kind) -> bool {
    matches!(verification(regimes, kind), Ok((v, _)) if v != Verification::Never)
}
