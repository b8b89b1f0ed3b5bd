//! What is where it may not be: pods that run, and volumes that lie.
//!
//! Owns the comparison of one node, or of the nodes that reach one volume, with what a policy permits. The same
//! questions as at admission, asked of what is there already.
//! Pure. Never calls anything outside on a doubt: a node that isn't known (any more), a volume that no node reaches or
//! whose affinity isn't understood is [`Verdict::Unknown`], and nothing is stopped for that; what was certain and has
//! become uncertain in the cluster (a node in no Region, or in two) is outside.

use super::{NodeFacts, Permissions, Whereabouts, locate};
use crate::api::Region;
use crate::api::residency_policy::Data;

/// A requirement on a node, as in a node selector.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Requirement {
    /// The label, or "" for the node's name.
    pub key: String,
    /// The operator, as Kubernetes writes it.
    pub operator: String,
    /// The values.
    pub values: Vec<String>,
}

/// Alternatives, each of requirements that all have to be met.
pub type Affinity = Vec<Vec<Requirement>>;

impl Requirement {
    /// Whether a node meets it. `None`: this operator isn't understood here.
    #[must_use]
    pub fn met(&self, node: &NodeFacts) -> Option<bool> {
        let value = if self.key.is_empty() {
            Some(&node.name)
        } else {
            node.labels.get(&self.key)
        };
        let listed = value.is_some_and(|v| self.values.contains(v));
        match self.operator.as_str() {
            "In" => Some(listed),
            "NotIn" => Some(!listed),
            "Exists" => Some(value.is_some()),
            "DoesNotExist" => Some(value.is_none()),
            _ => None,
        }
    }

    /// In words: key, operator, values.
    #[must_use]
    pub fn words(&self) -> String {
        let key = if self.key.is_empty() {
            "metadata.name"
        } else {
            &self.key
        };
        if self.values.is_empty() {
            format!("{key} {}", self.operator)
        } else {
            format!("{key} {} {}", self.operator, self.values.join(", "))
        }
    }
}

/// The nodes that meet an affinity. `None`: it uses an operator that isn't understood here.
#[must_use]
pub fn reaching<'a>(affinity: &Affinity, nodes: &'a [NodeFacts]) -> Option<Vec<&'a NodeFacts>> {
    let mut all = Vec::new();
    for node in nodes {
        let mut meets = false;
        for term in affinity {
            let met = term.iter().map(|r| r.met(node));
            let met = met.collect::<Option<Vec<bool>>>()?;
            // A term without requirements matches nothing, as for the scheduler.
            meets |= !met.is_empty() && met.iter().all(|m| *m);
        }
        if meets {
            all.push(node);
        }
    }
    Some(all)
}

/// Whether something is where it may be.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// It is.
    Within,
    /// It isn't: where it is, and who refuses that.
    Outside(String),
    /// It can't be known: why.
    Unknown(String),
}

impl Verdict {
    /// The words, if it is certainly outside.
    #[must_use]
    pub fn outside(self) -> Option<String> {
        match self {
            Self::Outside(words) => Some(words),
            Self::Within | Self::Unknown(_) => None,
        }
    }
}

/// A policy, and the cluster that it is held against.
#[derive(Clone, Debug)]
pub struct Finder<'a> {
    /// What is permitted.
    pub permissions: &'a Permissions,
    /// Every Region.
    pub regions: Vec<&'a Region>,
    /// Every node.
    pub nodes: &'a [NodeFacts],
}

impl Finder<'_> {
    /// Of what runs on a node.
    #[must_use]
    pub fn on(&self, node: &str, data: Data) -> Verdict {
        match self.nodes.iter().find(|n| n.name == node) {
            Some(node) => match self.refusal(node, data) {
                Some(words) => Verdict::Outside(words),
                None => Verdict::Within,
            },
            None => Verdict::Unknown(format!("node {node}, which is not known")),
        }
    }

    /// Of a volume that only these nodes reach. It is outside if all of them are: one that is also reached from
    /// inside can be used there.
    #[must_use]
    pub fn reached_by(&self, affinity: &Affinity, data: Data) -> Verdict {
        let Some(reaching) = reaching(affinity, self.nodes) else {
            let words = "its node affinity uses an operator that isn't understood here";
            return Verdict::Unknown(words.to_owned());
        };
        let refusals: Option<Vec<String>> =
            reaching.iter().map(|n| self.refusal(n, data)).collect();
        match refusals.map(|all| all.into_iter().next()) {
            Some(Some(words)) => Verdict::Outside(words),
            Some(None) => Verdict::Unknown("no node reaches it now".to_owned()),
            None => Verdict::Within,
        }
    }

    fn refusal(&self, node: &NodeFacts, data: Data) -> Option<String> {
        let name = &node.name;
        match locate(node, self.regions.iter().copied()) {
            Whereabouts::In(region) => {
                let refusal = self.permissions.check(data, &region).err()?;
                Some(format!("node {name}: {refusal}"))
            }
            Whereabouts::Unclaimed => Some(format!("node {name}, which is in no Region")),
            Whereabouts::Disputed(regions) => Some(format!(
                "node {name}, which Regions {} dispute",
                regions.join(", ")
            )),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::api::ResidencyPolicy;
    use proptest::prelude::*;
    use serde_json::json;

    const REGIONS: [&str; 3] = ["west", "east", "eu"];

    fn region(name: &str) -> Region {
        let spec = json!({ "nodes": { "labels": { "region": name } } });
        Region::new(name, serde_json::from_value(spec).unwrap())
    }

    fn policy(permitted: &[&str]) -> ResidencyPolicy {
        let spec = json!({ "permits": [{ "data": "Standby", "regions": permitted }] });
        ResidencyPolicy::new("records", serde_json::from_value(spec).unwrap())
    }

    fn node(name: &str, region: &str) -> NodeFacts {
        let labels = [("region", region), ("zone", "a"), ("host", name)];
        NodeFacts {
            name: name.into(),
            labels: labels.map(|(k, v)| (k.to_owned(), v.to_owned())).into(),
            ..NodeFacts::default()
        }
    }

    fn on(key: &str, values: &[&str]) -> Affinity {
        vec![vec![Requirement {
            key: key.into(),
            operator: "In".into(),
            values: values.iter().map(|&v| v.to_owned()).collect(),
        }]]
    }

    fn with<T>(
        permitted: &[&str],
        regions: &[Region],
        nodes: &[NodeFacts],
        look: impl FnOnce(Finder<'_>) -> T,
    ) -> T {
        look(Finder {
            permissions: &Permissions::resolve(&policy(permitted), regions),
            regions: regions.iter().collect(),
            nodes,
        })
    }

    #[test]
    fn it_says_where_and_who_refuses_it_and_stays_out_of_what_it_cannot_know() {
        let regions = REGIONS.map(region);
        let nodes = [node("w", "west"), node("c", "eu"), node("x", "?")];
        with(&["west"], &regions, &nodes, |finder| {
            let on_node = |name| finder.on(name, Data::Standby);
            assert_eq!(on_node("w"), Verdict::Within);
            assert_eq!(
                on_node("c").outside().unwrap(),
                "node c: region eu is not permitted for Standby by ResidencyPolicy records (basis Policy); permitted for Standby: west"
            );
            assert_eq!(
                on_node("x").outside().unwrap(),
                "node x, which is in no Region"
            );
            assert!(matches!(on_node("gone"), Verdict::Unknown(_)));

            let volume = |affinity: &Affinity| finder.reached_by(affinity, Data::Standby);
            assert_eq!(volume(&on("host", &["w"])), Verdict::Within);
            assert!(volume(&on("host", &["c"])).outside().is_some());
            assert!(volume(&on("host", &["c", "x"])).outside().is_some());
            assert_eq!(volume(&on("zone", &["a"])), Verdict::Within);
            assert!(matches!(
                volume(&on("host", &["gone"])),
                Verdict::Unknown(_)
            ));
            assert!(matches!(volume(&vec![vec![]]), Verdict::Unknown(_)));
            let mut odd = on("host", &["c"]);
            odd[0][0].operator = "Gt".into();
            assert!(matches!(volume(&odd), Verdict::Unknown(_)));
        });
        let both = [region("west"), {
            let mut other = region("west");
            other.metadata.name = Some("twin".into());
            other
        }];
        with(&["west"], &both, &nodes, |finder| {
            assert_eq!(
                finder.on("w", Data::Standby).outside().unwrap(),
                "node w, which Regions twin, west dispute"
            );
        });
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(20_000))]

        /// Whatever the nodes say of themselves: what runs is within exactly where one Region, and a permitted one,
        /// claims its node; a volume is outside only if nobody inside reaches it; and one permit more never makes
        /// anything outside.
        #[test]
        fn outside_is_where_no_permitted_region_is_certain(
            permitted in proptest::sample::subsequence(&REGIONS[..], 0..=3),
            more in proptest::sample::subsequence(&REGIONS[..], 0..=3),
            claimed in proptest::collection::vec(prop_oneof![Just("west"), Just("east"), Just("eu"), Just("mars")], 1..5),
            hosts in proptest::collection::vec(0..6usize, 0..4),
        ) {
            let regions = REGIONS.map(region);
            let nodes: Vec<NodeFacts> = claimed.iter().enumerate().map(|(i, r)| node(&format!("n{i}"), r)).collect();
            let names: Vec<String> = hosts.iter().map(|h| format!("n{h}")).collect();
            let affinity = on("host", &names.iter().map(String::as_str).collect::<Vec<_>>());
            let (running, lying) = with(&permitted, &regions, &nodes, |f| {
                let running: Vec<Verdict> = nodes.iter().map(|n| f.on(&n.name, Data::Standby)).collect();
                (running, f.reached_by(&affinity, Data::Standby))
            });
            for (verdict, region) in running.iter().zip(&claimed) {
                prop_assert_eq!(*verdict == Verdict::Within, permitted.contains(region));
            }
            let reached: Vec<&&str> = hosts.iter().filter_map(|h| claimed.get(*h)).collect();
            let inside = reached.iter().any(|r| permitted.contains(*r));
            match &lying {
                Verdict::Within => prop_assert!(inside),
                Verdict::Outside(_) => prop_assert!(!inside && !reached.is_empty()),
                Verdict::Unknown(_) => prop_assert!(reached.is_empty()),
            }
            let wider: Vec<&str> = REGIONS.into_iter().filter(|r| permitted.contains(r) || more.contains(r)).collect();
            with(&wider, &regions, &nodes, |f| {
                for (before, n) in running.iter().zip(&nodes) {
                    let now = f.on(&n.name, Data::Standby);
                    prop_assert!(now == Verdict::Within || *before != Verdict::Within);
                }
                let now = f.reached_by(&affinity, Data::Standby);
                prop_assert!(now.outside().is_none() || lying.clone().outside().is_some());
                Ok(())
            })?;
        }
    }
}
