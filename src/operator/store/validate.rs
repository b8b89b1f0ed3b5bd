//! Whether a store asks for something lawful.
//!
//! Owns the order of the questions: is there a policy, may this namespace use it, does it permit these
//! regions. The words of a refusal are `residency`'s own, the same that admission uses.
//! Never does I/O. Never widens: a store that asks for one forbidden region gets no *new* instance anywhere
//! until that is mended, while what it has already and lawfully keeps running.

use kube::ResourceExt;

use super::observe::Observed;
use crate::api::conditions::reasons;
use crate::api::residency_policy::Data;
use crate::placement::Want;
use crate::residency::Permissions;
use crate::residency::permissions::namespace_permitted;

/// Why a store can't be served as asked.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Problem {
    /// One word.
    pub reason: &'static str,
    /// What is wrong, where, and what to do.
    pub message: String,
}

/// The lawful part of what a store asks for.
#[derive(Clone, Debug)]
pub struct Lawful {
    /// What its policy permits.
    pub permissions: Permissions,
    /// The instances it asks for in permitted regions.
    pub wants: Vec<Want>,
    /// What it asks for that isn't permitted. Nothing new is made while this is not empty.
    pub problems: Vec<Problem>,
}

/// Which kind of data an instance of this store is, wherever it is: a standby, unless it is the only one.
#[must_use]
pub fn data_of_instance(total: i32) -> Data {
    if total > 1 {
        Data::Standby
    } else {
        Data::Primary
    }
}

/// Checks a store against its policy.
///
/// # Errors
/// A [`Problem`] if there is no policy to check against; then nothing can be called lawful.
pub fn validate(observed: &Observed) -> Result<Lawful, Problem> {
    let spec = &observed.store.spec;
    let name = &spec.residency_policy_ref.name;
    let Some(policy) = &observed.policy else {
        return Err(Problem {
            reason: reasons::POLICY_NOT_FOUND,
            message: format!(
                "ResidencyPolicy {name} does not exist, so nothing is permitted: create it, or correct spec.residencyPolicyRef.name"
            ),
        });
    };
    let selector = policy.spec.namespaces.as_ref();
    if !namespace_permitted(selector, &observed.namespace_labels) {
        let wanted: Vec<String> = selector
            .into_iter()
            .flat_map(|s| &s.match_labels)
            .map(|(k, v)| format!("{k}={v}"))
            .collect();
        return Err(Problem {
            reason: reasons::NAMESPACE_NOT_PERMITTED,
            message: format!(
                "namespace {} may not use ResidencyPolicy {name}: the policy is for namespaces labelled {}",
                observed.store.namespace().unwrap_or_default(),
                wanted.join(", ")
            ),
        });
    }
    let permissions = Permissions::resolve(policy, observed.regions.iter().map(AsRef::as_ref));
    let total = spec.placement.iter().map(|p| p.instances).sum();
    let data = data_of_instance(total);
    let mut lawful = Lawful {
        wants: Vec::new(),
        problems: Vec::new(),
        permissions,
    };
    for placement in &spec.placement {
        match lawful.permissions.check(data, &placement.region) {
            Ok(()) => lawful.wants.push(Want {
                region: placement.region.clone(),
                instances: u32::try_from(placement.instances).unwrap_or(0),
            }),
            Err(refusal) => {
                lawful.problems.push(Problem {
                    reason: reasons::REGION_NOT_PERMITTED,
                    message: refusal.to_string(),
                });
                continue;
            }
        }
        if !observed
            .regions
            .iter()
            .any(|r| r.name_any() == placement.region)
        {
            lawful.problems.push(Problem {
                reason: reasons::REGION_NOT_FOUND,
                message: format!(
                    "Region {} does not exist: create it, or correct spec.placement",
                    placement.region
                ),
            });
        }
    }
    if !spec
        .placement
        .iter()
        .any(|p| lawful.permissions.permits(Data::Primary, &p.region))
    {
        let permitted: Vec<&str> = lawful.permissions.regions(Data::Primary).collect();
        lawful.problems.push(Problem {
            reason: reasons::REGION_NOT_PERMITTED,
            message: format!(
                "no region of spec.placement is permitted for Primary by ResidencyPolicy {name}; permitted for Primary: {}",
                if permitted.is_empty() { "nowhere".to_owned() } else { permitted.join(", ") }
            ),
        });
    }
    Ok(lawful)
}
