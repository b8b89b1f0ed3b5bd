//! In which Region a node is.
//!
//! A node is in a Region only if every witness of that Region agrees, and no other Region claims it too.
//! Never trusts a single claim when a Region names two, and never settles a dispute by order or by name.

use std::collections::BTreeMap;

use crate::api::Region;
use crate::api::region::RegionSpec;

/// What of a node bears on where it is and whether it can take a pod.
#[derive(Clone, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
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

/// One witness of a Region about one node.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Account {
    /// Which witness: a label's key, or `providerID`.
    pub witness: String,
    /// What the Region wants it to say.
    pub wanted: String,
    /// What it says; `None`: nothing.
    pub found: Option<String>,
    /// Whether it places the node in the Region.
    pub agrees: bool,
}

impl std::fmt::Display for Account {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self {
            witness,
            wanted,
            found,
            agrees,
        } = self;
        match (found, agrees) {
            (_, true) => write!(f, "{witness} agrees"),
            (None, _) => write!(f, "it has no {witness} (wanted: {wanted})"),
            (Some(found), _) => write!(f, "{witness} is {found} (wanted: {wanted})"),
        }
    }
}

/// What every witness of `region` says of `node`. A Region without a witness has none.
#[must_use]
pub fn accounts(region: &RegionSpec, node: &NodeFacts) -> Vec<Account> {
    let labels = region.nodes.labels.iter().map(|(key, value)| {
        let found = node.labels.get(key).cloned();
        Account {
            witness: key.clone(),
            wanted: value.clone(),
            agrees: found.as_ref() == Some(value),
            found,
        }
    });
    let provider = region
        .nodes
        .provider_id_prefix
        .iter()
        .map(|prefix| Account {
            witness: "providerID".to_owned(),
            wanted: format!("{prefix}…"),
            agrees: node
                .provider_id
                .as_deref()
                .is_some_and(|id| has_prefix(id, prefix)),
            found: node.provider_id.clone(),
        });
    labels.chain(provider).collect()
}

/// Whether every witness of `region` agrees that `node` is there. Without a witness: no.
fn claims_node(region: &RegionSpec, node: &NodeFacts) -> bool {
    let accounts = accounts(region, node);
    !accounts.is_empty() && accounts.iter().all(|a| a.agrees)
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
