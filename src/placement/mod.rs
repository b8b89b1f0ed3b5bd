//! Which instance goes to which region and zone.
//!
//! Owns the assignment of slots (numbered instances) to regions and zones, and the choice of the first
//! primary. The scheduler still picks the node, inside the bounds that this assignment sets.
//! Never reads a clock or a random number; never moves an instance that has a volume; never assigns a
//! region that was not asked for, nor a zone without a usable node. Whether a region may be asked for is
//! `residency`'s question, answered before.

use std::collections::{BTreeMap, BTreeSet};

/// How many instances are wanted in a region.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Want {
    /// The region.
    pub region: String,
    /// How many.
    pub instances: u32,
}

/// A node that certainly is in a region.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Site {
    /// The region, as verified by `residency::locate`.
    pub region: String,
    /// The zone; empty where the cluster knows no zones.
    pub zone: String,
    /// Whether it takes pods now.
    pub usable: bool,
}

/// An instance that exists already: it has a volume claim or a pod.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Existing {
    /// Its number.
    pub slot: u32,
    /// Where it was placed.
    pub region: String,
    /// The zone that was chosen; empty where the cluster knows no zones.
    pub zone: String,
    /// Its volume exists somewhere: it can't move any more.
    pub fixed: bool,
}

/// Where an instance belongs.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Placed {
    /// Its number.
    pub slot: u32,
    /// The region: required.
    pub region: String,
    /// The zone: required, unless empty.
    pub zone: String,
}

/// The outcome of [`place`].
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Placement {
    /// Where every instance belongs, by slot.
    pub placed: Vec<Placed>,
    /// Existing instances that are not wanted any more, by slot.
    pub surplus: Vec<u32>,
    /// How many instances per region wait for a usable node.
    pub waiting: BTreeMap<String, u32>,
}

/// Assigns `wants` to slots, keeping `existing` where it is and spreading what is new over zones.
///
/// `keep` is a slot that is never surplus while its region is wanted at all: the primary.
/// Guarantees: the result is a function of the *sets* given (their order doesn't matter, except that new
/// slots are numbered in the order of `wants`); feeding the result back as `existing` changes nothing.
#[must_use]
pub fn place(
    wants: &[Want],
    sites: &[Site],
    existing: &[Existing],
    keep: Option<u32>,
) -> Placement {
    let mut outcome = Placement::default();
    let mut taken: BTreeSet<u32> = existing.iter().map(|e| e.slot).collect();
    let mut by_slot = existing.to_vec();
    by_slot.sort();

    for want in wants {
        let mut zones: BTreeMap<&str, u32> = sites
            .iter()
            .filter(|s| s.usable && s.region == want.region)
            .map(|s| (s.zone.as_str(), 0))
            .collect();
        let mut here: Vec<&Existing> = by_slot.iter().filter(|e| e.region == want.region).collect();
        here.sort_by_key(|e| (Some(e.slot) != keep, e.slot));

        // Those that can't move come first, so that the others spread around them.
        let (fixed, loose): (Vec<&Existing>, Vec<&Existing>) = here
            .into_iter()
            .take(want.instances as usize)
            .partition(|e| e.fixed);
        for e in fixed {
            if let Some(count) = zones.get_mut(e.zone.as_str()) {
                *count += 1;
            }
            outcome.placed.push(Placed {
                slot: e.slot,
                region: e.region.clone(),
                zone: e.zone.clone(),
            });
        }
        let mut missing = want
            .instances
            .saturating_sub(outcome.in_region(&want.region));
        let mut unmoved = Vec::new();
        for e in loose {
            match zones.get_mut(e.zone.as_str()) {
                // Its zone still takes pods: unchanged input, unchanged placement.
                Some(count) => {
                    *count += 1;
                    outcome.placed.push(Placed {
                        slot: e.slot,
                        region: e.region.clone(),
                        zone: e.zone.clone(),
                    });
                }
                None => unmoved.push(e),
            }
            missing = missing.saturating_sub(1);
        }
        for e in unmoved {
            let zone = emptiest(&mut zones).unwrap_or_else(|| e.zone.clone());
            outcome.placed.push(Placed {
                slot: e.slot,
                region: e.region.clone(),
                zone,
            });
        }
        for _ in 0..missing {
            let Some(zone) = emptiest(&mut zones) else {
                *outcome.waiting.entry(want.region.clone()).or_default() += 1;
                continue;
            };
            let slot = (1..).find(|n| !taken.contains(n)).unwrap_or(u32::MAX);
            taken.insert(slot);
            outcome.placed.push(Placed {
                slot,
                region: want.region.clone(),
                zone,
            });
        }
    }
    outcome.placed.sort();
    let kept: BTreeSet<u32> = outcome.placed.iter().map(|p| p.slot).collect();
    outcome.surplus = by_slot
        .iter()
        .map(|e| e.slot)
        .filter(|slot| !kept.contains(slot))
        .collect();
    outcome.surplus.dedup();
    outcome
}

impl Placement {
    fn in_region(&self, region: &str) -> u32 {
        u32::try_from(self.placed.iter().filter(|p| p.region == region).count()).unwrap_or(u32::MAX)
    }
}

/// The zone with the fewest instances, the first by name among equals; counts one more there.
fn emptiest(zones: &mut BTreeMap<&str, u32>) -> Option<String> {
    let zone = zones
        .iter()
        .min_by_key(|(name, count)| (**count, **name))
        .map(|(name, _)| *name)?;
    *zones.entry(zone).or_default() += 1;
    Some(zone.to_owned())
}

/// The slot that becomes the first primary: the lowest whose region may hold a primary.
#[must_use]
pub fn first_primary(placed: &[Placed], may_be_primary: impl Fn(&str) -> bool) -> Option<u32> {
    placed
        .iter()
        .filter(|p| may_be_primary(&p.region))
        .map(|p| p.slot)
        .min()
}

#[cfg(test)]
mod tests;
