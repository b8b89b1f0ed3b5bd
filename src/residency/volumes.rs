//! Where the volumes of a StorageClass may come to be.
//!
//! A volume that is made before its instance is placed is made wherever its driver likes. So a class must either
//! wait for the instance (WaitForFirstConsumer), or be tied to nodes that are all where the store may be.
//! Never reads a driver's own topology into a region by its name: a topology counts as being where the nodes are
//! that carry it.

use std::collections::{BTreeMap, BTreeSet};

use super::{NodeFacts, locate};
use crate::api::Region;

/// What of a StorageClass matters.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Class {
    /// Its name.
    pub name: String,
    /// It binds before an instance is placed (volumeBindingMode Immediate, Kubernetes' default).
    pub immediate: bool,
    /// It takes volumes that are there already (provisioner kubernetes.io/no-provisioner), whatever its topologies.
    pub found: bool,
    /// Its allowedTopologies: alternatives, each of labels and the values that they may have.
    pub topologies: Vec<BTreeMap<String, BTreeSet<String>>>,
}

const REMEDY: &str =
    "choose a StorageClass with volumeBindingMode WaitForFirstConsumer, or make one";

/// `Ok` if no volume of `class` can come to be where `permitted` says no.
///
/// # Errors
/// What is wrong with the class, and what to do.
pub fn check<'a>(
    class: &Class,
    permitted: impl Fn(&str) -> bool,
    nodes: &[NodeFacts],
    regions: impl IntoIterator<Item = &'a Region>,
) -> Result<(), String> {
    if !class.immediate {
        return Ok(());
    }
    let name = &class.name;
    let at_once =
        format!("StorageClass {name} binds volumes at once (volumeBindingMode Immediate)");
    if class.found {
        return Err(format!(
            "{at_once} to those that are there, wherever they are: {REMEDY}"
        ));
    }
    if class.topologies.is_empty() {
        return Err(format!(
            "{at_once} and names no allowedTopologies, so that a volume could be made in any region: {REMEDY}"
        ));
    }
    let regions: Vec<&Region> = regions.into_iter().collect();
    for term in &class.topologies {
        let words = term
            .iter()
            .map(|(key, values)| {
                let values: Vec<&str> = values.iter().map(String::as_str).collect();
                format!("{key}={}", values.join("|"))
            })
            .collect::<Vec<_>>()
            .join(", ");
        let reached: Vec<&NodeFacts> = nodes
            .iter()
            .filter(|n| {
                term.iter().all(|(key, values)| {
                    n.labels
                        .get(key)
                        .is_some_and(|value| values.contains(value))
                })
            })
            .collect();
        if reached.is_empty() {
            return Err(format!(
                "{at_once} where {words}, and no node says where that is: {REMEDY}"
            ));
        }
        for node in reached {
            let found = locate(node, regions.iter().copied());
            match found.region() {
                Some(region) if permitted(region) => {}
                Some(region) => {
                    return Err(format!(
                        "{at_once} where {words}, which is in region {region} (node {}), and that is not permitted: {REMEDY}",
                        node.name
                    ));
                }
                None => {
                    return Err(format!(
                        "{at_once} where {words}, and node {} there is not verified to be in any region: {REMEDY}",
                        node.name
                    ));
                }
            }
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::api::region::{NodeWitnesses, RegionSpec};

    fn world() -> (Vec<NodeFacts>, Vec<Region>) {
        let node = |name: &str, region: &str, zone: &str| NodeFacts {
            name: name.into(),
            labels: [("region", region), ("zone", zone)]
                .map(|(k, v)| (k.to_owned(), v.to_owned()))
                .into(),
            ..NodeFacts::default()
        };
        let region = |name: &str| {
            Region::new(
                name,
                RegionSpec {
                    jurisdictions: vec![],
                    nodes: NodeWitnesses {
                        labels: [("region".to_owned(), name.to_owned())].into(),
                        provider_id_prefix: None,
                    },
                },
            )
        };
        (
            vec![
                node("w1", "west", "a"),
                node("w2", "west", "b"),
                node("c1", "eu", "c"),
                node("x", "?", "d"),
            ],
            vec![region("west"), region("eu")],
        )
    }

    fn class(immediate: bool, topologies: &[&[(&str, &[&str])]]) -> Class {
        Class {
            name: "fast".into(),
            immediate,
            found: false,
            topologies: topologies
                .iter()
                .map(|term| {
                    term.iter()
                        .map(|(k, v)| {
                            ((*k).to_owned(), v.iter().map(|v| (*v).to_owned()).collect())
                        })
                        .collect()
                })
                .collect(),
        }
    }

    fn verdict(class: &Class) -> Result<(), String> {
        let (nodes, regions) = world();
        check(class, |r| r == "west", &nodes, &regions)
    }

    #[test]
    fn who_waits_is_lawful_and_who_does_not_must_be_tied_to_lawful_nodes() {
        assert_eq!(verdict(&class(false, &[])), Ok(()));
        assert_eq!(verdict(&class(true, &[&[("zone", &["a", "b"])]])), Ok(()));
        assert_eq!(
            verdict(&class(true, &[&[("region", &["west"]), ("zone", &["a"])]])),
            Ok(())
        );
        assert_eq!(
            verdict(&class(true, &[])).unwrap_err(),
            "StorageClass fast binds volumes at once (volumeBindingMode Immediate) and names no allowedTopologies, so that a volume could be made in any region: choose a StorageClass with volumeBindingMode WaitForFirstConsumer, or make one"
        );
        let abroad = verdict(&class(true, &[&[("zone", &["a"])], &[("zone", &["c"])]]));
        assert!(abroad.unwrap_err().contains("is in region eu (node c1)"));
        let nowhere = verdict(&class(true, &[&[("zone", &["d"])]]));
        assert!(
            nowhere
                .unwrap_err()
                .contains("node x there is not verified")
        );
        let unknown = verdict(&class(true, &[&[("zone", &["z"])]]));
        assert!(unknown.unwrap_err().contains("no node says where that is"));
        let found = Class {
            found: true,
            ..class(true, &[&[("zone", &["a"])]])
        };
        assert!(verdict(&found).is_err());
    }
}
