//! Which targets this worker works on: those of its own region, each in a lane of its own.
//!
//! Owns the difference between the lanes there are and those that the configuration wants. Pure.

use std::collections::BTreeMap;

use crate::rights::config::Target;

/// What to do to get from the lanes there are to those wanted.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Changes {
    /// To be ended: gone, of another region now, or changed.
    pub end: Vec<String>,
    /// To be begun: new, or changed.
    pub begin: Vec<Target>,
}

/// The changes. A target that is as it was keeps its lane, with its connections and what its breaker knows.
#[must_use]
pub fn changes(lanes: &BTreeMap<String, Target>, wanted: &[Target], region: &str) -> Changes {
    let ours: BTreeMap<&str, &Target> = wanted
        .iter()
        .filter(|target| target.regions.iter().any(|r| r == region))
        .map(|target| (target.name.as_str(), target))
        .collect();
    let end = lanes
        .iter()
        .filter(|(name, target)| ours.get(name.as_str()) != Some(target))
        .map(|(name, _)| name.clone())
        .collect();
    let begin = ours
        .values()
        .filter(|target| lanes.get(&target.name) != Some(**target))
        .map(|target| (*target).clone())
        .collect();
    Changes { end, begin }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rights::config::System;
    use proptest::prelude::*;

    fn target() -> impl Strategy<Value = Target> {
        (
            0u8..6,
            prop::collection::btree_set(0u8..3, 0..3),
            0i32..2,
            any::<bool>(),
        )
            .prop_map(|(name, regions, settle_seconds, more)| Target {
                name: format!("t{name}"),
                regions: regions.into_iter().map(|r| format!("r{r}")).collect(),
                settle_seconds,
                residue_days: None,
                system: System::Redis {
                    keys: if more {
                        vec!["a:{id}".to_owned(), "b:{id}".to_owned()]
                    } else {
                        vec!["a:{id}".to_owned()]
                    },
                },
            })
    }

    fn targets() -> impl Strategy<Value = Vec<Target>> {
        prop::collection::vec(target(), 0..8).prop_map(|all| {
            let named: BTreeMap<_, _> = all.into_iter().map(|t| (t.name.clone(), t)).collect();
            named.into_values().collect()
        })
    }

    fn apply(lanes: &mut BTreeMap<String, Target>, changes: Changes) {
        for name in changes.end {
            assert!(lanes.remove(&name).is_some(), "ended twice");
        }
        for target in changes.begin {
            assert!(
                lanes.insert(target.name.clone(), target).is_none(),
                "two lanes of one target"
            );
        }
    }

    proptest! {
        #[test]
        fn after_the_changes_there_is_one_lane_for_each_target_of_the_region(before in targets(), after in targets()) {
            let mut lanes = BTreeMap::new();
            apply(&mut lanes, changes(&BTreeMap::new(), &before, "r0"));
            let kept = lanes.clone();
            let next = changes(&lanes, &after, "r0");
            for target in &after {
                if kept.get(&target.name) == Some(target) && target.regions.contains(&"r0".to_owned()) {
                    prop_assert!(!next.end.contains(&target.name), "a lane was disturbed for nothing");
                }
            }
            apply(&mut lanes, next);
            let expected: BTreeMap<_, _> = after
                .iter()
                .filter(|t| t.regions.contains(&"r0".to_owned()))
                .map(|t| (t.name.clone(), t.clone()))
                .collect();
            prop_assert_eq!(&lanes, &expected);
            prop_assert_eq!(changes(&lanes, &after, "r0"), Changes::default());
        }
    }
}
