//! The cases: which fault, how it is varied from run to run, how long it lasts, and what is expected of the store.
//!
//! Owns names, goals and expectations; how a fault is done is [`super::inject`]'s and the test bed's.

use std::time::Duration;

use anyhow::{Context, Result, bail};

/// A kind of fault.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Kind {
    /// SIGKILL to PostgreSQL's first process on the primary.
    PostmasterKill,
    /// The primary's pod deleted without grace, or all its processes killed.
    PodKill,
    /// The primary's node cut off silently, both ways.
    NodeCut,
    /// Every process of the primary's pod stopped, and let go on later.
    PodFreeze,
    /// The primary's pod deleted with grace, a switchover asked for, or a drain.
    Graceful,
    /// The primary's node hears nothing.
    CutIn,
    /// The primary's node isn't heard.
    CutOut,
    /// The primary's region cut off, under a policy that permits a primary in the others.
    RegionCut,
    /// The primary's region cut off, under a policy that permits a primary nowhere else.
    RegionCutHome,
    /// The operator scaled to zero, then the primary's pod killed.
    OperatorDown,
    /// The API server stopped, then all processes of the primary's pod killed.
    ApiDown,
    /// API server and operator stopped, and nothing else.
    QuietApiDown,
    /// The primary's node cut off for three seconds and back for three, for two minutes.
    Flapping,
    /// The primary's volume filled to its last byte.
    DiskFull,
    /// The data directory of a standby, or of the primary, removed and its processes killed.
    PgdataWiped,
    /// Both standbys frozen, or killed.
    StandbysLost,
    /// As `NodeCut`, with a client on the primary that cancels what waits.
    Cancelled,
}

use Kind::{
    ApiDown, Cancelled, CutIn, CutOut, DiskFull, Flapping, Graceful, NodeCut, OperatorDown,
    PgdataWiped, PodFreeze, PodKill, PostmasterKill, QuietApiDown, RegionCut, RegionCutHome,
    StandbysLost,
};

const NAMES: [(Kind, &str); 17] = [
    (PostmasterKill, "postmaster-kill"),
    (PodKill, "pod-kill"),
    (NodeCut, "node-cut"),
    (PodFreeze, "pod-freeze"),
    (Graceful, "graceful"),
    (CutIn, "cut-in"),
    (CutOut, "cut-out"),
    (RegionCut, "region-cut"),
    (RegionCutHome, "region-cut-home"),
    (OperatorDown, "operator-down"),
    (ApiDown, "api-down"),
    (QuietApiDown, "quiet-api-down"),
    (Flapping, "flapping"),
    (DiskFull, "disk-full"),
    (PgdataWiped, "pgdata-wiped"),
    (StandbysLost, "standbys-lost"),
    (Cancelled, "cancelled"),
];

/// What the case is called after this, if the API server is stopped during the fault as well.
const WITH_API_DOWN: &str = "+api-down";

/// Whether another instance is to become primary.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Failover {
    /// It must.
    Must,
    /// It may.
    May,
    /// It must not; the same one may be elected again, in a term of its own.
    Home,
    /// Nobody is to be elected.
    Never,
}

/// The store a case needs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Shape {
    /// Two instances in the only region that may have the primary, one in another.
    Home,
    /// One instance in each of three regions, each of which may have the primary.
    Anywhere,
    /// One instance in the only region that may have the primary, two in another.
    Lonely,
    /// As `Home`, with bounded volumes where the primary may be.
    Bounded,
}

impl Shape {
    /// The store's name.
    #[must_use]
    pub fn store(self) -> &'static str {
        match self {
            Shape::Home => "consumers",
            Shape::Anywhere => "anywhere",
            Shape::Lonely => "lonely",
            Shape::Bounded => "bounded",
        }
    }

    /// Its placement.
    #[must_use]
    pub fn placement(self) -> &'static [(&'static str, i32)] {
        match self {
            Shape::Home | Shape::Bounded => &[("us-west", 2), ("us-east", 1)],
            Shape::Anywhere => &[("us-west", 1), ("us-east", 1), ("eu-central", 1)],
            Shape::Lonely => &[("us-west", 1), ("us-east", 2)],
        }
    }
}

/// A case.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Case {
    /// The fault.
    pub kind: Kind,
    /// With the API server stopped during it.
    pub api_down: bool,
}

impl std::fmt::Display for Case {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let name = NAMES.iter().find(|(kind, _)| *kind == self.kind);
        f.write_str(name.map_or("?", |(_, name)| name))?;
        f.write_str(if self.api_down { WITH_API_DOWN } else { "" })
    }
}

impl Case {
    /// A fault, with the API server at work.
    #[must_use]
    pub fn of(kind: Kind) -> Self {
        Self {
            kind,
            api_down: false,
        }
    }

    /// Finds a case by its name.
    ///
    /// # Errors
    /// If there is none: with those that there are.
    pub fn parse(name: &str) -> Result<Self> {
        let known = || all().iter().map(ToString::to_string).collect::<Vec<_>>();
        let found = all().into_iter().find(|case| case.to_string() == name);
        found.with_context(|| format!("no case {name}: there are {}", known().join(", ")))
    }

    /// The store it needs.
    #[must_use]
    pub fn shape(self) -> Shape {
        match self.kind {
            RegionCut => Shape::Anywhere,
            RegionCutHome => Shape::Lonely,
            DiskFull => Shape::Bounded,
            _ => Shape::Home,
        }
    }

    /// How this run of it is done, in a word; runs are numbered from 1.
    #[must_use]
    pub fn variant(self, run: usize) -> &'static str {
        match (self.kind, self.api_down) {
            // Without an API server nobody can delete, evict or annotate.
            (PodKill, true) | (ApiDown, _) => "kill",
            (Graceful, true) => "terminate",
            (PodKill | OperatorDown, _) => ["delete", "kill"][(run + 1) % 2],
            (Graceful, _) => ["delete", "promote", "drain"][(run + 2) % 3],
            (PgdataWiped, _) => ["standby", "primary"][(run + 1) % 2],
            (StandbysLost, _) => ["freeze", "kill"][(run + 1) % 2],
            _ => "",
        }
    }

    /// How long the fault lasts, before it is ended.
    #[must_use]
    pub fn lasts(self) -> Duration {
        let seconds = match self.kind {
            PostmasterKill | PodKill | Graceful | PgdataWiped if !self.api_down => 0,
            Flapping => 120,
            QuietApiDown => 10,
            _ => 8,
        };
        Duration::from_secs(seconds)
    }

    /// Whether another instance is to become primary.
    #[must_use]
    pub fn failover(self, run: usize) -> Failover {
        match self.kind {
            RegionCutHome => Failover::Home,
            QuietApiDown => Failover::Never,
            Flapping | StandbysLost => Failover::May,
            // A switch-over may be quicker than a restart in place, or not.
            PgdataWiped if self.variant(run) == "standby" => Failover::Never,
            _ => Failover::Must,
        }
    }

    /// The goal of the service's gap, in seconds: of 95 in 100 runs.
    #[must_use]
    pub fn goal(self) -> Option<f64> {
        Some(match self.kind {
            PostmasterKill | Graceful => 1.0,
            PodKill => 2.0,
            NodeCut | PodFreeze => 4.0,
            CutIn | CutOut | RegionCut => 6.0,
            _ => return None,
        })
    }
}

/// All cases, in the order in which they run.
#[must_use]
pub fn all() -> Vec<Case> {
    let mut all: Vec<Case> = NAMES.iter().map(|(kind, _)| Case::of(*kind)).collect();
    let with_api_down = [
        PostmasterKill,
        PodKill,
        NodeCut,
        PodFreeze,
        Graceful,
        CutIn,
        CutOut,
    ];
    all.extend(with_api_down.map(|kind| Case {
        kind,
        api_down: true,
    }));
    // Those that share a store run together.
    all.sort_by_key(|case| case.shape());
    all
}

/// The cases of a list with commas or spaces; all, if it is empty.
///
/// # Errors
/// If one isn't known.
pub fn choose(list: &str) -> Result<Vec<Case>> {
    let chosen: Vec<Case> = words(list).map(Case::parse).collect::<Result<_>>()?;
    Ok(if chosen.is_empty() { all() } else { chosen })
}

/// The milliseconds of a list with commas or spaces.
///
/// # Errors
/// If it is empty, or something in it isn't a number.
pub fn latencies(list: &str) -> Result<Vec<u64>> {
    let all: Vec<u64> = words(list)
        .map(|w| w.parse().with_context(|| format!("the latency {w}")))
        .collect::<Result<_>>()?;
    if all.is_empty() {
        bail!("no latency: write LATENCY=\"0 40\"");
    }
    Ok(all)
}

fn words(list: &str) -> impl Iterator<Item = &str> {
    list.split([',', ' ']).filter(|w| !w.is_empty())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeSet;

    #[test]
    fn every_case_is_found_by_its_name() {
        let names: BTreeSet<String> = all().iter().map(ToString::to_string).collect();
        assert_eq!(names.len(), all().len());
        for case in all() {
            assert_eq!(Case::parse(&case.to_string()).unwrap(), case);
        }
        let case = Case::parse("node-cut+api-down").unwrap();
        assert_eq!((case.kind, case.api_down), (NodeCut, true));
        assert!(Case::parse("flapping+api-down").is_err());
        assert_eq!(choose("pod-kill, graceful").unwrap().len(), 2);
        assert_eq!(choose("").unwrap(), all());
        assert_eq!(latencies("0 40").unwrap(), [0, 40]);
        assert!(latencies("").is_err() && latencies("much").is_err());
    }

    #[test]
    fn variants_take_turns() {
        let graceful = Case::of(Graceful);
        let turns: Vec<_> = (1..=4).map(|run| graceful.variant(run)).collect();
        assert_eq!(turns, ["delete", "promote", "drain", "delete"]);
        assert_eq!(Case::of(PodKill).variant(1), "delete");
        assert_eq!(Case::of(PodKill).variant(2), "kill");
        let wiped = Case::of(PgdataWiped);
        assert_eq!(
            (wiped.variant(1), wiped.failover(1)),
            ("standby", Failover::Never)
        );
        assert_eq!(
            (wiped.variant(2), wiped.failover(2)),
            ("primary", Failover::Must)
        );
    }
}
