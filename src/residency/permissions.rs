//! Which regions a policy permits for which kind of data, and the words in which it refuses.
//!
//! Owns the refusal's wording: `plan`, the admission policy in the chart and the command line say the same
//! (a test on a real API server compares them).
//! Never permits what is not listed, and never lets an unknown jurisdiction or region widen anything.

use std::collections::{BTreeMap, BTreeSet};

use crate::api::residency_policy::{Basis, Data, NamespaceSelector, ResolvedPermit};
use crate::api::{Region, ResidencyPolicy, labels};

/// A policy with its jurisdictions resolved against the Regions there are.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Permissions {
    policy: String,
    basis: Basis,
    citation: String,
    regions: BTreeMap<Data, BTreeSet<String>>,
    /// What the policy names but nobody has defined.
    unknown: BTreeSet<String>,
    /// What the namespace's own policy permits; nothing beyond it is permitted.
    ceiling: Option<Box<Permissions>>,
}

/// A request that the policy doesn't permit.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("region {region} is not permitted for {data} by ResidencyPolicy {policy} (basis {basis}{}); permitted for {data}: {}", cite(.citation), list(.permitted))]
pub struct Refusal {
    /// The region asked for.
    pub region: String,
    /// For which kind of data.
    pub data: Data,
    /// The policy that refuses.
    pub policy: String,
    /// Why the policy exists.
    pub basis: Basis,
    /// Its citation; may be empty.
    pub citation: String,
    /// Where it would have been permitted, sorted.
    pub permitted: Vec<String>,
}

fn cite(citation: &str) -> String {
    if citation.is_empty() {
        String::new()
    } else {
        format!(": {citation}")
    }
}

fn list(regions: &[String]) -> String {
    if regions.is_empty() {
        "nowhere".to_owned()
    } else {
        regions.join(", ")
    }
}

impl Permissions {
    /// What `policy` permits, with the Regions as they are now.
    #[must_use]
    pub fn resolve<'a>(
        policy: &ResidencyPolicy,
        regions: impl IntoIterator<Item = &'a Region>,
    ) -> Self {
        let known: BTreeMap<&str, &Region> = regions
            .into_iter()
            .filter_map(|r| Some((r.metadata.name.as_deref()?, r)))
            .collect();
        let mut permitted: BTreeMap<Data, BTreeSet<String>> = BTreeMap::new();
        let mut unknown = BTreeSet::new();
        for permit in &policy.spec.permits {
            let set = permitted.entry(permit.data).or_default();
            for name in &permit.regions {
                // A name without a Region stays permitted: no node can be in it, so nothing can go there,
                // and the policy and its Regions may be applied in any order.
                set.insert(name.clone());
                if !known.contains_key(name.as_str()) {
                    unknown.insert(format!("region {name}"));
                }
            }
            for jurisdiction in &permit.jurisdictions {
                let mut found = known
                    .iter()
                    .filter(|(_, r)| r.spec.jurisdictions.contains(jurisdiction))
                    .peekable();
                if found.peek().is_none() {
                    unknown.insert(format!("jurisdiction {jurisdiction}"));
                }
                set.extend(found.map(|(name, _)| (*name).to_owned()));
            }
        }
        Self {
            policy: policy.metadata.name.clone().unwrap_or_default(),
            basis: policy.spec.basis,
            citation: policy.spec.citation.clone().unwrap_or_default(),
            regions: permitted,
            unknown,
            ceiling: None,
        }
    }

    /// These permissions under a ceiling: what both permit.
    #[must_use]
    pub fn under(self, ceiling: Self) -> Self {
        Self {
            ceiling: Some(Box::new(ceiling)),
            ..self
        }
    }

    /// Whether everything that this policy permits by itself is permitted by `other` too.
    #[must_use]
    pub fn lies_within(&self, other: &Self) -> bool {
        self.regions.iter().all(|(data, regions)| {
            regions.is_empty()
                || other
                    .regions
                    .get(data)
                    .is_some_and(|permitted| regions.is_subset(permitted))
        })
    }

    /// Name of the policy.
    #[must_use]
    pub fn policy(&self) -> &str {
        &self.policy
    }

    /// Why the policy exists.
    #[must_use]
    pub fn basis(&self) -> Basis {
        self.basis
    }

    /// Whether this kind of data may be in this region.
    #[must_use]
    pub fn permits(&self, data: Data, region: &str) -> bool {
        self.regions
            .get(&data)
            .is_some_and(|regions| regions.contains(region))
            && self
                .ceiling
                .as_ref()
                .is_none_or(|c| c.permits(data, region))
    }

    /// The regions permitted for this kind of data.
    pub fn regions(&self, data: Data) -> impl Iterator<Item = &str> {
        self.regions
            .get(&data)
            .into_iter()
            .flatten()
            .map(String::as_str)
            .filter(move |region| {
                self.ceiling
                    .as_ref()
                    .is_none_or(|c| c.permits(data, region))
            })
    }

    /// The kinds of data that are permitted somewhere.
    pub fn kinds(&self) -> impl Iterator<Item = Data> {
        self.regions.keys().copied()
    }

    /// `Ok` if permitted, else the refusal in words.
    ///
    /// # Errors
    /// [`Refusal`], which says policy, region, basis and what would be permitted.
    pub fn check(&self, data: Data, region: &str) -> Result<(), Box<Refusal>> {
        if self.permits(data, region) {
            return Ok(());
        }
        let own = self.regions.get(&data).is_some_and(|r| r.contains(region));
        if let Some(ceiling) = self.ceiling.as_ref().filter(|_| own) {
            // The policy that refuses is named, not the one that would have permitted it.
            return ceiling.check(data, region);
        }
        Err(Box::new(Refusal {
            region: region.to_owned(),
            data,
            policy: self.policy.clone(),
            basis: self.basis,
            citation: self.citation.clone(),
            permitted: self.regions(data).map(str::to_owned).collect(),
        }))
    }

    /// Regions and jurisdictions that the policy names but no Region defines, in words, sorted.
    pub fn unknown(&self) -> impl Iterator<Item = &str> {
        self.unknown.iter().map(String::as_str)
    }

    /// The form published in the policy's status, which admission reads: only Regions that exist.
    #[must_use]
    pub fn published<'a>(
        &self,
        regions: impl IntoIterator<Item = &'a Region>,
    ) -> Vec<ResolvedPermit> {
        let defined: Vec<(&str, &Region)> = regions
            .into_iter()
            .filter_map(|r| Some((r.metadata.name.as_deref()?, r)))
            .collect();
        self.regions
            .iter()
            .map(|(data, permitted)| {
                let existing: BTreeMap<&str, &Region> = defined
                    .iter()
                    .filter(|(name, _)| permitted.contains(*name))
                    .copied()
                    .collect();
                let node_regions: BTreeSet<String> = existing
                    .values()
                    .filter_map(|r| {
                        r.spec
                            .nodes
                            .labels
                            .get(labels::NODE_TOPOLOGY_REGION)
                            .cloned()
                    })
                    .collect();
                ResolvedPermit {
                    data: *data,
                    regions: existing.keys().map(|name| (*name).to_owned()).collect(),
                    node_regions: node_regions.into_iter().collect(),
                }
            })
            .collect()
    }
}

/// In which words a store is refused whose policy permits more than its namespace's.
#[must_use]
pub fn beyond_ceiling(policy: &str, ceiling: &str, namespace: &str) -> String {
    format!(
        "ResidencyPolicy {policy} does not lie within ResidencyPolicy {ceiling}, within which namespace {namespace} must stay (its label {}): refer to {ceiling}, or to a policy that permits no more",
        labels::RESIDENCY
    )
}

/// Whether a namespace with these labels may use a policy with this selector. No selector: any may.
#[must_use]
pub fn namespace_permitted(
    selector: Option<&NamespaceSelector>,
    labels: &BTreeMap<String, String>,
) -> bool {
    selector.is_none_or(|s| {
        s.match_labels
            .iter()
            .all(|(key, value)| labels.get(key) == Some(value))
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::api::region::{NodeWitnesses, RegionSpec};
    use crate::api::residency_policy::{Permit, ResidencyPolicySpec};
    use proptest::prelude::*;

    fn region(name: &str, jurisdictions: &[&str]) -> Region {
        let labels = [(labels::NODE_TOPOLOGY_REGION.to_owned(), format!("{name}-1"))].into();
        Region::new(
            name,
            RegionSpec {
                jurisdictions: jurisdictions.iter().map(|&j| j.to_owned()).collect(),
                nodes: NodeWitnesses {
                    labels,
                    provider_id_prefix: None,
                },
            },
        )
    }

    fn policy(permits: Vec<Permit>) -> ResidencyPolicy {
        ResidencyPolicy::new(
            "records",
            ResidencyPolicySpec {
                basis: Basis::Contract,
                citation: Some("Annex 2".into()),
                permits,
                namespaces: None,
                on_violation: Default::default(),
            },
        )
    }

    fn permit(data: Data, regions: &[&str], jurisdictions: &[&str]) -> Permit {
        let own = |s: &[&str]| s.iter().map(|&x| x.to_owned()).collect();
        Permit {
            data,
            regions: own(regions),
            jurisdictions: own(jurisdictions),
        }
    }

    #[test]
    fn the_refusal_names_region_policy_basis_and_what_is_permitted() {
        let p = Permissions::resolve(
            &policy(vec![permit(Data::Standby, &["us-east", "us-west"], &[])]),
            &[],
        );
        assert_eq!(
            p.check(Data::Standby, "eu-central")
                .unwrap_err()
                .to_string(),
            "region eu-central is not permitted for Standby by ResidencyPolicy records (basis Contract: Annex 2); permitted for Standby: us-east, us-west"
        );
        assert_eq!(
            p.check(Data::Primary, "us-west").unwrap_err().to_string(),
            "region us-west is not permitted for Primary by ResidencyPolicy records (basis Contract: Annex 2); permitted for Primary: nowhere"
        );
    }

    #[test]
    fn jurisdictions_are_the_regions_that_list_them() {
        let regions = [
            region("west", &["US", "US-CA"]),
            region("east", &["US"]),
            region("eu", &["DE"]),
        ];
        let p = Permissions::resolve(
            &policy(vec![permit(Data::Worker, &[], &["US-CA", "FR"])]),
            &regions,
        );
        assert!(p.permits(Data::Worker, "west") && !p.permits(Data::Worker, "east"));
        assert_eq!(p.unknown().collect::<Vec<_>>(), ["jurisdiction FR"]);
        assert_eq!(p.published(&regions)[0].node_regions, ["west-1"]);
    }

    #[test]
    fn under_a_ceiling_is_what_both_permit_and_the_one_that_refuses_is_named() {
        let wide = policy(vec![permit(Data::Standby, &["a", "b"], &[])]);
        let mut narrow = policy(vec![permit(Data::Standby, &["a"], &[])]);
        narrow.metadata.name = Some("ceiling".into());
        let (wide, narrow) = (
            Permissions::resolve(&wide, &[]),
            Permissions::resolve(&narrow, &[]),
        );
        assert!(narrow.lies_within(&wide) && !wide.lies_within(&narrow));
        assert!(narrow.lies_within(&narrow));
        let both = wide.under(narrow);
        assert_eq!(both.regions(Data::Standby).collect::<Vec<_>>(), ["a"]);
        let names = |region| both.check(Data::Standby, region).unwrap_err().policy;
        assert_eq!(
            (names("b").as_str(), names("c").as_str()),
            ("ceiling", "records")
        );
    }

    #[test]
    fn a_namespace_needs_every_label() {
        let selector = NamespaceSelector {
            match_labels: [("team".to_owned(), "records".to_owned())].into(),
        };
        let with = |k: &str, v: &str| [(k.to_owned(), v.to_owned())].into();
        assert!(namespace_permitted(None, &BTreeMap::new()));
        assert!(namespace_permitted(
            Some(&selector),
            &with("team", "records")
        ));
        assert!(!namespace_permitted(
            Some(&selector),
            &with("team", "other")
        ));
        assert!(!namespace_permitted(Some(&selector), &BTreeMap::new()));
    }

    fn any_permit() -> impl Strategy<Value = Permit> {
        let data = prop_oneof![Just(Data::Primary), Just(Data::Standby), Just(Data::Worker)];
        let names =
            |all: &'static [&'static str]| proptest::sample::subsequence(all, 0..=all.len());
        (
            data,
            names(&["a", "b", "c", "d"]),
            names(&["US", "DE", "FR"]),
        )
            .prop_map(|(d, r, j)| permit(d, &r, &j))
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(10_000))]

        /// Under a ceiling nothing is permitted that the ceiling doesn't permit, whatever either says; and a policy
        /// that lies within its ceiling loses nothing by it.
        #[test]
        fn a_ceiling_only_takes_away(own in proptest::collection::vec(any_permit(), 0..5), above in proptest::collection::vec(any_permit(), 0..5)) {
            let regions = [region("a", &["US"]), region("b", &["DE"]), region("c", &["US", "FR"])];
            let own = Permissions::resolve(&policy(own), &regions);
            let above = Permissions::resolve(&policy(above), &regions);
            let both = own.clone().under(above.clone());
            for data in [Data::Primary, Data::Standby, Data::Worker] {
                for name in ["a", "b", "c", "d"] {
                    prop_assert_eq!(both.permits(data, name), own.permits(data, name) && above.permits(data, name));
                    prop_assert_eq!(both.check(data, name).is_ok(), both.permits(data, name));
                    if own.lies_within(&above) {
                        prop_assert_eq!(both.permits(data, name), own.permits(data, name));
                    }
                }
            }
        }

        /// Adding a permit never forbids what was permitted, and whatever is permitted was written down.
        #[test]
        fn permits_only_ever_add(permits in proptest::collection::vec(any_permit(), 0..5), extra in any_permit()) {
            let regions = [region("a", &["US"]), region("b", &["DE"]), region("c", &["US", "FR"])];
            let before = Permissions::resolve(&policy(permits.clone()), &regions);
            let mut more = permits.clone();
            more.push(extra);
            let after = Permissions::resolve(&policy(more), &regions);
            for data in [Data::Primary, Data::Standby, Data::Worker, Data::Backup] {
                for name in ["a", "b", "c", "d", "e"] {
                    if before.permits(data, name) {
                        prop_assert!(after.permits(data, name));
                        let written = permits.iter().filter(|p| p.data == data).any(|p| {
                            p.regions.iter().any(|r| r == name)
                                || regions.iter().any(|r| r.metadata.name.as_deref() == Some(name)
                                    && r.spec.jurisdictions.iter().any(|j| p.jurisdictions.contains(j)))
                        });
                        prop_assert!(written);
                    }
                    prop_assert_eq!(before.permits(data, name), before.check(data, name).is_ok());
                }
            }
        }
    }
}
