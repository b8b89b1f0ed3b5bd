//! In which Region a node is.
//!
//! A node is in a Region only if every witness of that Region agrees, and no other Region claims it too.
//! Never trusts a single claim when a Region names two, and never settles a dispute by order or by name.

use std::collections::BTreeMap;

use crate::api::Region;
use crate::api::region::RegionSpec;

/// What of a node bears on where it is and whether it can take a pod.
#[derive(Clone, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct NodeFacts {
    /// Its name.
    pub name: String,
    /// Its labels.
    pub labels: BTreeMap<String, String>,
    /// Its `spec.providerID`.
    pub provider_id: Option<String>,
    /// Ready, not cordoned, without a taint that keeps pods off.
    pub usable: bool,
}

/// Where a node is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Whereabouts {
    /// Every witness of this Region agrees, and of no other.
    In(String),
    /// No Region claims it.
    Unclaimed,
    /// Several Regions claim it, so that none can be believed. Sorted.
    Disputed(Vec<String>),
}

impl Whereabouts {
    /// The Region, if it is certain.
    #[must_use]
    pub fn region(&self) -> Option<&str> {
        match self {
            Self::In(region) => Some(region),
            Self::Unclaimed | Self::Disputed(_) => None,
        }
    }
}

/// Where `node` is, given all Regions there are. A Region that is being deleted still counts: it may still
/// dispute, but the caller decides whether anything new goes there.
#[must_use]
pub fn locate<'a>(node: &NodeFacts, regions: impl IntoIterator<Item = &'a Region>) -> Whereabouts {
    let mut claims: Vec<String> = regions
        .into_iter()
        .filter(|region| claims_node(&region.spec, node))
        .filter_map(|region| region.metadata.name.clone())
        .collect();
    claims.sort();
    claims.dedup();
    match claims.len() {
        0 => Whereabouts::Unclaimed,
        1 => Whereabouts::In(claims.remove(0)),
        _ => Whereabouts::Disputed(claims),
    }
}

/// Whether every witness of `region` agrees that `node` is there. Without a witness: no.
fn claims_node(region: &RegionSpec, node: &NodeFacts) -> bool {
    let witnesses = &region.nodes;
    if witnesses.labels.is_empty() && witnesses.provider_id_prefix.is_none() {
        return false;
    }
    let labels_agree = witnesses
        .labels
        .iter()
        .all(|(key, value)| node.labels.get(key) == Some(value));
    let provider_agrees = witnesses
        .provider_id_prefix
        .as_deref()
        .is_none_or(|prefix| {
            node.provider_id
                .as_deref()
                .is_some_and(|id| has_prefix(id, prefix))
        });
    labels_agree && provider_agrees
}

/// `id` begins with `prefix`, and the prefix doesn't end in the middle of a number: "aws:///us-west-2" is a
/// prefix of "aws:///us-west-2a/i-1", but not of "aws:///us-west-20/i-1", which is another region.
fn has_prefix(id: &str, prefix: &str) -> bool {
    let ends_in_digit = prefix.ends_with(|c: char| c.is_ascii_digit());
    !prefix.is_empty()
        && id
            .strip_prefix(prefix)
            .is_some_and(|rest| !(ends_in_digit && rest.starts_with(|c: char| c.is_ascii_digit())))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::api::region::NodeWitnesses;
    use proptest::prelude::*;

    fn region(name: &str, label: Option<&str>, prefix: Option<&str>) -> Region {
        let labels = label
            .map(|v| ("region".to_owned(), v.to_owned()))
            .into_iter()
            .collect();
        let nodes = NodeWitnesses {
            labels,
            provider_id_prefix: prefix.map(str::to_owned),
        };
        Region::new(
            name,
            RegionSpec {
                jurisdictions: vec![],
                nodes,
            },
        )
    }

    fn node(label: Option<&str>, id: Option<&str>) -> NodeFacts {
        NodeFacts {
            name: "n".into(),
            labels: label
                .map(|v| ("region".to_owned(), v.to_owned()))
                .into_iter()
                .collect(),
            provider_id: id.map(str::to_owned),
            usable: true,
        }
    }

    #[test]
    fn every_witness_must_agree() {
        let regions = [region("west", Some("w"), Some("aws:///us-west-2"))];
        let at = |label, id| locate(&node(label, id), &regions);
        assert_eq!(
            at(Some("w"), Some("aws:///us-west-2a/i-1")),
            Whereabouts::In("west".into())
        );
        assert_eq!(
            at(Some("w"), Some("aws:///us-west-20/i-1")),
            Whereabouts::Unclaimed
        );
        assert_eq!(at(Some("w"), None), Whereabouts::Unclaimed);
        assert_eq!(
            at(None, Some("aws:///us-west-2a/i-1")),
            Whereabouts::Unclaimed
        );
        assert_eq!(
            at(Some("e"), Some("aws:///us-west-2a/i-1")),
            Whereabouts::Unclaimed
        );
    }

    #[test]
    fn a_disputed_node_is_nowhere() {
        let regions = [
            region("b", Some("w"), None),
            region("a", None, Some("aws:///")),
        ];
        let found = locate(&node(Some("w"), Some("aws:///x")), &regions);
        assert_eq!(found, Whereabouts::Disputed(vec!["a".into(), "b".into()]));
        assert_eq!(found.region(), None);
    }

    #[test]
    fn a_region_without_witness_has_no_nodes() {
        assert_eq!(
            locate(&node(Some("w"), Some("x")), &[region("a", None, None)]),
            Whereabouts::Unclaimed
        );
    }

    fn label() -> impl Strategy<Value = Option<String>> {
        proptest::option::of(prop_oneof![Just("w".to_owned()), Just("e".to_owned())])
    }

    fn prefix() -> impl Strategy<Value = Option<String>> {
        proptest::option::of(prop_oneof![
            Just("p:1".to_owned()),
            Just("p:12".to_owned()),
            Just("p:".to_owned())
        ])
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(20_000))]

        /// The order of Regions changes nothing, and one more Region never moves a node into another one:
        /// it can only add itself or make the node disputed.
        #[test]
        fn order_and_additions_never_move_a_node(
            specs in proptest::collection::vec((label(), prefix()), 0..5),
            extra in (label(), prefix()),
            node_label in label(),
            id in proptest::option::of("p:[0-9]{0,3}"),
        ) {
            let regions: Vec<Region> = specs.iter().enumerate()
                .map(|(i, (l, p))| region(&format!("r{i}"), l.as_deref(), p.as_deref())).collect();
            let node = node(node_label.as_deref(), id.as_deref());
            let before = locate(&node, &regions);
            let reversed: Vec<Region> = regions.iter().rev().cloned().collect();
            prop_assert_eq!(&before, &locate(&node, &reversed));
            let mut more = regions;
            more.push(region("extra", extra.0.as_deref(), extra.1.as_deref()));
            match (before.region(), locate(&node, &more).region()) {
                (Some(old), Some(new)) => prop_assert_eq!(old, new),
                (None, Some(new)) => prop_assert_eq!(new, "extra"),
                (_, None) => {}
            }
        }
    }
}
