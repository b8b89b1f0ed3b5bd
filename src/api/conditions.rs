//! Condition types and reasons, and the one way to set a condition.
//!
//! Owns the rule that a condition's transition time moves only when its status does; without it a failing
//! object would be written, seen and reconciled again for ever.
//! Never reads a clock: the time is an argument.

use k8s_openapi::apimachinery::pkg::apis::meta::v1::{Condition, Time};
use k8s_openapi::jiff::Timestamp;

/// Everything is as specified (kstatus).
pub const READY: &str = "Ready";
/// Domicile is working towards what is specified (kstatus).
pub const RECONCILING: &str = "Reconciling";
/// A person must act before anything goes on (kstatus).
pub const STALLED: &str = "Stalled";
/// Writes are accepted.
pub const AVAILABLE: &str = "Available";
/// Every copy is where the policy permits.
pub const RESIDENT: &str = "Resident";
/// A commit survives the loss of an instance.
pub const DURABLE: &str = "Durable";
/// What was seen last is signed and kept.
pub const ATTESTED: &str = "Attested";

/// Instances have certificates that last, of an authority that lasts.
pub const CERTIFIED: &str = "Certified";

/// Of a policy: the API server refuses pods outside in namespaces that are labelled with it.
pub const ENFORCED: &str = "Enforced";
/// Of a policy: every copy of the stores under it is where it permits.
pub const RESPECTED: &str = "Respected";

/// Of a workflow: the ledger of requests could be read.
pub const BACKLOG_KNOWN: &str = "BacklogKnown";
/// Of a workflow: every legal deadline of an open request holds.
pub const DEADLINES_FEASIBLE: &str = "DeadlinesFeasible";

/// Reasons, one word each. They are part of the interface: alerts and scripts match them.
pub mod reasons {
    /// As specified.
    pub const AS_SPECIFIED: &str = "AsSpecified";
    /// Instances are being made or are starting.
    pub const STARTING: &str = "Starting";
    /// Some instances are not ready.
    pub const DEGRADED: &str = "Degraded";
    /// No primary serves.
    pub const NO_PRIMARY: &str = "NoPrimary";
    /// The referenced policy doesn't exist.
    pub const POLICY_NOT_FOUND: &str = "PolicyNotFound";
    /// The policy doesn't permit this namespace.
    pub const NAMESPACE_NOT_PERMITTED: &str = "NamespaceNotPermitted";
    /// A region is asked for that the policy doesn't permit.
    pub const REGION_NOT_PERMITTED: &str = "RegionNotPermitted";
    /// A named Region doesn't exist.
    pub const REGION_NOT_FOUND: &str = "RegionNotFound";
    /// No node is lawful for an instance that is needed.
    pub const NO_LAWFUL_NODE: &str = "NoLawfulNode";
    /// A copy is where it may not be.
    pub const OUTSIDE: &str = "Outside";
    /// A copy that was outside is stopped there; its volume is kept.
    pub const FENCED: &str = "Fenced";
    /// Somebody who is none of the store's instances replicates from it, and is cut off.
    pub const STRANGER: &str = "Stranger";
    /// The volume of a copy outside was erased, as its policy says.
    pub const ERASED: &str = "Erased";
    /// What was seen could not be signed or kept.
    pub const NOT_ATTESTED: &str = "NotAttested";
    /// One certificate authority takes the place of another.
    pub const ROTATING: &str = "Rotating";
    /// A certificate ends soon and could not be renewed.
    pub const ENDS_SOON: &str = "EndsSoon";
    /// The scheduler can't place a pod.
    pub const UNSCHEDULABLE: &str = "Unschedulable";
    /// The primary's volume claim is gone.
    pub const VOLUME_LOST: &str = "VolumeLost";
    /// An instance can't go on by itself.
    pub const INSTANCE_FAILED: &str = "InstanceFailed";
    /// An object of a needed name belongs to somebody else.
    pub const NAME_TAKEN: &str = "NameTaken";
    /// The object can't be understood or is contradictory.
    pub const INVALID: &str = "Invalid";
    /// Left alone as the pause annotation asks.
    pub const PAUSED: &str = "Paused";
    /// Too few standbys stream.
    pub const STANDBYS_MISSING: &str = "StandbysMissing";
    /// Being deleted.
    pub const DELETING: &str = "Deleting";
    /// No node carries the witnesses of the region.
    pub const NO_NODES: &str = "NoNodes";
    /// The store's policy permits more than its namespace's.
    pub const BEYOND_CEILING: &str = "BeyondCeiling";
    /// A volume could be made anywhere.
    pub const STORAGE_CLASS_NOT_PERMITTED: &str = "StorageClassNotPermitted";
    /// The StorageClass doesn't exist.
    pub const STORAGE_CLASS_NOT_FOUND: &str = "StorageClassNotFound";
    /// The admission policies are not installed.
    pub const ADMISSION_MISSING: &str = "AdmissionMissing";
    /// This version of Kubernetes doesn't show admission where a pod is bound.
    pub const KUBERNETES_TOO_OLD: &str = "KubernetesTooOld";
    /// A PrivacyDataStore that is referred to doesn't exist.
    pub const STORE_NOT_FOUND: &str = "StoreNotFound";
    /// This release has no connector for a target's type.
    pub const TARGET_NOT_SUPPORTED: &str = "TargetNotSupported";
    /// A target is where no pool of workers is.
    pub const NO_POOL: &str = "NoPool";
    /// The keys of a ledger that holds requests are gone or damaged.
    pub const KEYS_LOST: &str = "KeysLost";
    /// The ledger doesn't answer.
    pub const LEDGER_UNREACHABLE: &str = "LedgerUnreachable";
    /// Requests are open.
    pub const REQUESTS_OPEN: &str = "RequestsOpen";
    /// Open requests are past their legal deadline.
    pub const OVERDUE: &str = "Overdue";
    /// No forecast is made.
    pub const NOT_PROJECTED: &str = "NotProjected";
    /// It can't be known at present.
    pub const UNKNOWN: &str = "Unknown";
}

/// A condition as decided, without times: what `plan` and `report` speak in.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Verdict {
    /// The type.
    pub kind: &'static str,
    /// True, False or Unknown.
    pub status: Option<bool>,
    /// One word.
    pub reason: &'static str,
    /// A sentence.
    pub message: String,
}

impl Verdict {
    /// A condition that holds or doesn't.
    pub fn new(
        kind: &'static str,
        status: bool,
        reason: &'static str,
        message: impl Into<String>,
    ) -> Self {
        Self {
            kind,
            status: Some(status),
            reason,
            message: message.into(),
        }
    }

    /// A condition of which nothing can be said.
    pub fn unknown(kind: &'static str, reason: &'static str, message: impl Into<String>) -> Self {
        Self {
            kind,
            status: None,
            reason,
            message: message.into(),
        }
    }
}

/// The longest message that is kept. Longer ones are cut at a character's border.
const MESSAGE_MAX: usize = 2048;

/// The new condition list: `verdicts` in their order, transition times kept wherever the status is unchanged,
/// conditions of other types (set by others) kept at the end.
#[must_use]
pub fn merge(
    old: &[Condition],
    verdicts: &[Verdict],
    generation: Option<i64>,
    now: Timestamp,
) -> Vec<Condition> {
    let mut new: Vec<Condition> = verdicts
        .iter()
        .map(|v| {
            let status = match v.status {
                Some(true) => "True",
                Some(false) => "False",
                None => "Unknown",
            };
            let since = old
                .iter()
                .find(|c| c.type_ == v.kind && c.status == status)
                .map_or_else(|| Time(now), |c| c.last_transition_time.clone());
            let mut message = v.message.clone();
            if message.len() > MESSAGE_MAX {
                let cut = (0..=MESSAGE_MAX)
                    .rev()
                    .find(|i| message.is_char_boundary(*i))
                    .unwrap_or(0);
                message.truncate(cut);
            }
            Condition {
                type_: v.kind.to_owned(),
                status: status.to_owned(),
                reason: v.reason.to_owned(),
                message,
                last_transition_time: since,
                observed_generation: generation,
            }
        })
        .collect();
    new.extend(
        old.iter()
            .filter(|c| verdicts.iter().all(|v| v.kind != c.type_))
            .cloned(),
    );
    new
}

/// Whether a condition of this type is True.
#[must_use]
pub fn is_true(conditions: &[Condition], kind: &str) -> bool {
    conditions
        .iter()
        .any(|c| c.type_ == kind && c.status == "True")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(second: i64) -> Timestamp {
        Timestamp::from_second(second).unwrap()
    }

    #[test]
    fn an_unchanged_verdict_gives_identical_bytes_whatever_the_time() {
        let verdicts = [Verdict::new(READY, false, reasons::STARTING, "x")];
        let first = merge(&[], &verdicts, Some(1), at(1));
        assert_eq!(first, merge(&first, &verdicts, Some(1), at(99)));
    }

    #[test]
    fn the_transition_time_moves_with_the_status_only() {
        let first = merge(
            &[],
            &[Verdict::new(READY, false, reasons::STARTING, "x")],
            Some(1),
            at(1),
        );
        let reworded = merge(
            &first,
            &[Verdict::new(READY, false, reasons::DEGRADED, "y")],
            Some(2),
            at(5),
        );
        assert_eq!(reworded[0].last_transition_time, Time(at(1)));
        let turned = merge(
            &reworded,
            &[Verdict::new(READY, true, reasons::AS_SPECIFIED, "z")],
            Some(2),
            at(9),
        );
        assert_eq!(turned[0].last_transition_time, Time(at(9)));
    }

    #[test]
    fn a_long_message_is_cut_at_a_character() {
        let long = "é".repeat(MESSAGE_MAX);
        let cut = merge(
            &[],
            &[Verdict::new(READY, false, reasons::INVALID, long)],
            None,
            at(1),
        );
        assert!(cut[0].message.len() <= MESSAGE_MAX && cut[0].message.ends_with('é'));
    }
}
