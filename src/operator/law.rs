//! Whether a namespaced object may use the policy that it names, and what that permits.
//!
//! Owns the order of the questions that stores and workflows have in common: is there a policy, may this namespace use
//! it, does it lie within the namespace's own. The words of a refusal are `residency`'s own, the same that admission
//! uses.
//! Pure. Never widens: without a policy nothing is permitted.

use std::collections::BTreeMap;
use std::sync::Arc;

use crate::api::conditions::reasons;
use crate::api::{Region, ResidencyPolicy, labels};
use crate::residency::Permissions;
use crate::residency::permissions::{beyond_ceiling, namespace_permitted};

/// Why something can't be done as asked.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Problem {
    /// One word.
    pub reason: &'static str,
    /// What is wrong, where, and what to do.
    pub message: String,
}

/// All problems in one message, and the reason of the first.
#[must_use]
pub fn told(problems: &[Problem]) -> (&'static str, String) {
    let messages: Vec<&str> = problems.iter().map(|p| p.message.as_str()).collect();
    let reason = problems.first().map_or(reasons::UNKNOWN, |p| p.reason);
    (reason, messages.join("; "))
}

/// An object that names a policy, and what surrounds it.
#[derive(Clone, Copy, Debug)]
pub struct Subject<'a> {
    /// The policy's name.
    pub policy_name: &'a str,
    /// The policy, if it exists.
    pub policy: Option<&'a ResidencyPolicy>,
    /// The policy that the namespace names as its ceiling, if it names one and that exists.
    pub ceiling: Option<&'a ResidencyPolicy>,
    /// The namespace.
    pub namespace: &'a str,
    /// Its labels.
    pub namespace_labels: &'a BTreeMap<String, String>,
    /// Every Region.
    pub regions: &'a [Arc<Region>],
}

/// What the policy comes to.
#[derive(Clone, Debug)]
pub struct Law {
    /// What the policy permits by itself.
    pub own: Permissions,
    /// What it permits within the namespace's ceiling.
    pub permissions: Permissions,
    /// It permits more than the ceiling.
    pub beyond: Option<Problem>,
}

impl Subject<'_> {
    /// What the policy permits.
    ///
    /// # Errors
    /// A [`Problem`] if there is no policy to go by; then nothing can be called lawful.
    pub fn law(&self) -> Result<Law, Problem> {
        let name = self.policy_name;
        let Some(policy) = self.policy else {
            return Err(Problem {
                reason: reasons::POLICY_NOT_FOUND,
                message: format!(
                    "ResidencyPolicy {name} does not exist, so nothing is permitted: create it, or correct spec.residencyPolicyRef.name"
                ),
            });
        };
        let selector = policy.spec.namespaces.as_ref();
        if !namespace_permitted(selector, self.namespace_labels) {
            let wanted: Vec<String> = selector
                .into_iter()
                .flat_map(|s| &s.match_labels)
                .map(|(k, v)| format!("{k}={v}"))
                .collect();
            return Err(Problem {
                reason: reasons::NAMESPACE_NOT_PERMITTED,
                message: format!(
                    "namespace {} may not use ResidencyPolicy {name}: the policy is for namespaces labelled {}",
                    self.namespace,
                    wanted.join(", ")
                ),
            });
        }
        let regions = || self.regions.iter().map(AsRef::as_ref);
        let own = Permissions::resolve(policy, regions());
        let ceiling = self
            .ceiling()?
            .map(|policy| Permissions::resolve(policy, regions()));
        let Some(ceiling) = ceiling else {
            return Ok(Law {
                permissions: own.clone(),
                own,
                beyond: None,
            });
        };
        let beyond = (!own.lies_within(&ceiling)).then(|| Problem {
            reason: reasons::BEYOND_CEILING,
            message: beyond_ceiling(name, ceiling.policy(), self.namespace),
        });
        Ok(Law {
            permissions: own.clone().under(ceiling),
            own,
            beyond,
        })
    }

    /// The policy within which the namespace must stay, if it has a label that says so.
    fn ceiling(&self) -> Result<Option<&ResidencyPolicy>, Problem> {
        let Some(name) = self.namespace_labels.get(labels::RESIDENCY) else {
            return Ok(None);
        };
        match self.ceiling {
            Some(policy) => Ok(Some(policy)),
            None => Err(Problem {
                reason: reasons::POLICY_NOT_FOUND,
                message: format!(
                    "ResidencyPolicy {name}, within which namespace {} must stay (its label {}), does not exist, so nothing is permitted: create it, or correct the label",
                    self.namespace,
                    labels::RESIDENCY
                ),
            }),
        }
    }
}
