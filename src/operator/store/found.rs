//! Who is the first primary of a store.
//!
//! Pure. Never guesses which of several volumes holds the last data, and never names a primary in a region
//! that the policy doesn't permit for one.

use kube::ResourceExt;

use super::observe::Observed;
use super::validate::{Lawful, Problem};
use crate::api::conditions::reasons;
use crate::api::residency_policy::Data;
use crate::api::{labels, names};
use crate::placement::{self, Placed};

/// Who begins, in which term.
pub struct Founding {
    /// The instance.
    pub name: String,
    /// Its term.
    pub term: i64,
}

/// Who is the first primary of a store that has none on record. A store that takes up retained volumes
/// begins with the one that was primary last.
///
/// `None`: nobody can be yet. Volumes are told apart by their mark: 0 for the volume on which a store was to
/// begin, the term once it is known to hold the primary's data.
///
/// # Errors
/// A [`Problem`] if only a person can tell.
pub fn found(
    observed: &Observed,
    lawful: &Lawful,
    placed: &[Placed],
) -> Result<Option<Founding>, Problem> {
    let store = observed.store.name_any();
    let may = |region: &str| lawful.permissions.permits(Data::Primary, region);
    if observed.claims.is_empty() {
        let slot = placement::first_primary(placed, may);
        return Ok(slot.map(|slot| Founding {
            name: names::instance(&store, slot),
            term: 1,
        }));
    }
    let last = observed
        .claims
        .iter()
        .filter_map(|c| {
            Some((
                c.annotations()
                    .get(labels::PRIMARY_TERM)?
                    .parse::<i64>()
                    .ok()?,
                c,
            ))
        })
        .max_by_key(|(term, c)| (*term, c.name_any()));
    let Some((term, claim)) = last else {
        let volumes: Vec<String> = observed.claims.iter().map(ResourceExt::name_any).collect();
        return Err(Problem {
            reason: reasons::INVALID,
            message: format!(
                "volume claims of an earlier store of this name exist ({}), and none says that it was the primary's: annotate the right one with {}=1, or delete them if their data is not wanted",
                volumes.join(", "),
                labels::PRIMARY_TERM
            ),
        });
    };
    let name = claim.name_any();
    let region = claim
        .labels()
        .get(labels::REGION)
        .map(String::as_str)
        .unwrap_or_default();
    if !may(region) {
        return Err(Problem {
            reason: reasons::REGION_NOT_PERMITTED,
            message: format!(
                "the retained volume {name} of the last primary is in region {region}, which ResidencyPolicy {} does not permit for Primary",
                lawful.permissions.policy()
            ),
        });
    }
    if placed
        .iter()
        .all(|p| names::instance(&store, p.slot) != name)
    {
        return Err(Problem {
            reason: reasons::INVALID,
            message: format!(
                "the retained volume {name} of the last primary is in region {region}, for which spec.placement asks no instance: add the region, or delete the claim if its data is not wanted"
            ),
        });
    }
    Ok(Some(Founding {
        name,
        term: term.saturating_add(1),
    }))
}

/// Whether the store was ever initialised, as far as its status tells.
#[must_use]
pub fn initialised(observed: &Observed) -> bool {
    observed.store.status.iter().any(|status| {
        status.system_identifier.is_some()
            || status
                .instances
                .iter()
                .any(|i| i.system_identifier.is_some())
    })
}
