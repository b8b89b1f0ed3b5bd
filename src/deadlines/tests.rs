//! `golden`: dates counted by hand, with their source. `properties`: what holds for every instant and every choice of
//! regimes. `document`: docs/deadlines.md says what the data say.

mod document;
mod golden;
mod properties;

use jiff::{Timestamp, Zoned};

use super::regimes::ALL;
use super::rules::Kind;
use crate::api::rights_workflow::Regime;

const KINDS: [Kind; 4] = [Kind::Deletion, Kind::Access, Kind::Correction, Kind::OptOut];

fn regimes() -> Vec<Regime> {
    ALL.iter().map(|rules| rules.regime).collect()
}

/// An instant said as people of a place say it: `2026-01-31T12:00[Europe/Berlin]`.
fn at(local: &str) -> Timestamp {
    local.parse::<Zoned>().unwrap().timestamp()
}
