//! Whether a store asks for something lawful.
//!
//! Owns the order of the questions beyond those of `law`: does the policy permit these regions, and could the volumes
//! come to be elsewhere. The words of a refusal are `residency`'s own, the same that admission uses.
//! Never does I/O. Never widens: a store that asks for one forbidden region gets no *new* instance anywhere
//! until that is mended, while what it has already and lawfully keeps running.

use kube::ResourceExt;

use super::observe::{Observed, StorageClassSeen};
use crate::api::conditions::reasons;
use crate::api::residency_policy::Data;
use crate::operator::law::Subject;
use crate::placement::Want;
use crate::residency::{Permissions, volumes};

pub use crate::operator::law::Problem;

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
    let namespace = observed.store.namespace().unwrap_or_default();
    let law = Subject {
        policy_name: name,
        policy: observed.policy.as_deref(),
        ceiling: observed.ceiling.as_deref(),
        namespace: &namespace,
        namespace_labels: &observed.namespace_labels,
        regions: &observed.regions,
    }
    .law()?;
    let own = law.own;
    let total = spec.placement.iter().map(|p| p.instances).sum();
    let data = data_of_instance(total);
    let mut lawful = Lawful {
        wants: Vec::new(),
        problems: law.beyond.into_iter().collect(),
        permissions: law.permissions,
    };
    for placement in &spec.placement {
        match own.check(data, &placement.region) {
            // Where only the ceiling forbids it, that was said already, and nothing goes there.
            Ok(()) if !lawful.permissions.permits(data, &placement.region) => continue,
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
        .any(|p| own.permits(Data::Primary, &p.region))
    {
        let permitted: Vec<&str> = own.regions(Data::Primary).collect();
        lawful.problems.push(Problem {
            reason: reasons::REGION_NOT_PERMITTED,
            message: format!(
                "no region of spec.placement is permitted for Primary by ResidencyPolicy {name}; permitted for Primary: {}",
                if permitted.is_empty() { "nowhere".to_owned() } else { permitted.join(", ") }
            ),
        });
    }
    lawful
        .problems
        .extend(storage_class(observed, &lawful.permissions, data));
    Ok(lawful)
}

/// What is wrong with the class that new volumes would be of.
fn storage_class(observed: &Observed, permissions: &Permissions, data: Data) -> Option<Problem> {
    let (reason, message) = match &observed.storage_class {
        StorageClassSeen::NotNeeded => return None,
        StorageClassSeen::Missing(Some(name)) => (
            reasons::STORAGE_CLASS_NOT_FOUND,
            format!(
                "StorageClass {name} does not exist: create it (spec.storage can't be changed later)"
            ),
        ),
        StorageClassSeen::Missing(None) => (
            reasons::STORAGE_CLASS_NOT_FOUND,
            "no StorageClass is the cluster's default: name one in spec.storage.storageClassName, or make one the default".to_owned(),
        ),
        StorageClassSeen::Found(class) => {
            let regions = observed.regions.iter().map(AsRef::as_ref);
            let permitted = |region: &str| permissions.permits(data, region);
            let wrong = volumes::check(class, permitted, &observed.nodes, regions).err()?;
            (reasons::STORAGE_CLASS_NOT_PERMITTED, wrong)
        }
    };
    Some(Problem { reason, message })
}
