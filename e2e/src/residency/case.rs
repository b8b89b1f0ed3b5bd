//! The ways out that are tried.

use anyhow::{Result, bail};

/// A way out.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Case {
    /// The node under a primary says that it is abroad.
    PrimaryRelabelled,
    /// The node under a standby does.
    StandbyRelabelled,
    /// The node under a standby does, and the standby hangs.
    HungRelabelled,
    /// The node under a worker, and whatever else of its workflow is there, does.
    WorkerRelabelled,
    /// A Region is edited so that two claim the same nodes.
    TwoRegionsMatch,
    /// The policy permits less than before, while in use.
    PolicyNarrowed,
    /// The volume that a claim is bound to is abroad.
    VolumeElsewhere,
    /// Somebody replicates with a stolen certificate.
    StolenCertificate,
    /// A kubelet registers with a region of its own choice.
    KubeletRegisters,
    /// A kubelet changes its region later.
    KubeletClaims,
    /// A pod is bound to a node abroad by hand.
    BoundByHand,
    /// A pod is created on a node abroad.
    CreatedOnNode,
    /// A policy in use is deleted.
    PolicyDeleted,
}

impl Case {
    /// All.
    pub const ALL: [Self; 13] = [
        Self::KubeletRegisters,
        Self::KubeletClaims,
        Self::BoundByHand,
        Self::CreatedOnNode,
        Self::PolicyDeleted,
        Self::StolenCertificate,
        Self::TwoRegionsMatch,
        Self::PolicyNarrowed,
        Self::PrimaryRelabelled,
        Self::StandbyRelabelled,
        Self::HungRelabelled,
        Self::VolumeElsewhere,
        Self::WorkerRelabelled,
    ];

    /// It is refused, so that nothing is there to be found.
    #[must_use]
    pub fn refused(self) -> bool {
        matches!(
            self,
            Self::KubeletRegisters
                | Self::KubeletClaims
                | Self::BoundByHand
                | Self::CreatedOnNode
                | Self::PolicyDeleted
        )
    }

    /// Its name in tables and on the command line.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::PrimaryRelabelled => "primary-relabelled",
            Self::StandbyRelabelled => "standby-relabelled",
            Self::HungRelabelled => "hung-relabelled",
            Self::WorkerRelabelled => "worker-relabelled",
            Self::TwoRegionsMatch => "two-regions-match",
            Self::PolicyNarrowed => "policy-narrowed",
            Self::VolumeElsewhere => "volume-elsewhere",
            Self::StolenCertificate => "stolen-certificate",
            Self::KubeletRegisters => "kubelet-registers",
            Self::KubeletClaims => "kubelet-claims",
            Self::BoundByHand => "bound-by-hand",
            Self::CreatedOnNode => "created-on-node",
            Self::PolicyDeleted => "policy-deleted",
        }
    }
}

/// The cases of a list with commas or spaces; all, if it is empty.
///
/// # Errors
/// If there is no such case.
pub fn choose(list: &str) -> Result<Vec<Case>> {
    let words = list.split([',', ' ']).filter(|w| !w.is_empty());
    let mut chosen = Vec::new();
    for word in words {
        let Some(case) = Case::ALL.into_iter().find(|c| c.name() == word) else {
            let all = Case::ALL.map(Case::name).join(", ");
            bail!("no case {word}: there are {all}");
        };
        chosen.push(case);
    }
    Ok(if chosen.is_empty() {
        Case::ALL.to_vec()
    } else {
        chosen
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_list_names_cases_and_nothing_means_all() {
        assert_eq!(choose("").unwrap(), Case::ALL);
        let two = choose("policy-deleted, bound-by-hand").unwrap();
        assert_eq!(two, [Case::PolicyDeleted, Case::BoundByHand]);
        let refused = choose("policy").unwrap_err();
        assert!(refused.to_string().contains("primary-relabelled"));
    }
}
