//! The bindings by which the API server keeps pods of labelled namespaces where their policy permits.
//!
//! The admission policies are installed with Domicile; a binding for each ResidencyPolicy is made and removed here,
//! since policies come and go.
//! Pure. Fails closed at every step: a namespace that names a policy without a binding of its own is held by the
//! binding for unknown ones, which lets go of a policy's namespaces only after the policy's own binding was seen.

use k8s_openapi::api::admissionregistration::v1::{
    MatchResources, ParamRef, ValidatingAdmissionPolicyBinding as Binding,
    ValidatingAdmissionPolicyBindingSpec,
};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{LabelSelector, LabelSelectorRequirement};
use kube::ResourceExt;
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use super::plan::Write;
use crate::api::conditions::{self, Verdict, reasons};
use crate::api::labels;
use crate::residency::binding::MOST_NODES;

/// The admission policy that reads a ResidencyPolicy's status where pods are bound.
pub const BINDING: &str = "domicile-binding";
/// The admission policy that refuses every pod of a namespace that names a policy which doesn't exist.
pub const UNKNOWN: &str = "domicile-unknown-residency";

/// The first version of Kubernetes that shows admission the region of the node where a pod is bound.
const REGION_AT_BINDING: (u32, u32) = (1, 35);

/// What the API server offers.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Gate {
    /// Both admission policies are there.
    pub installed: bool,
    /// Kubernetes' version: major, minor.
    pub version: (u32, u32),
}

impl Gate {
    fn shows_region(&self) -> bool {
        self.version >= REGION_AT_BINDING
    }

    /// Whether a policy with this many nodes (`None`: too many to name) can be enforced where pods are bound.
    #[must_use]
    pub fn enforces(&self, nodes: Option<&[String]>) -> bool {
        self.installed && (nodes.is_some() || self.shows_region())
    }
}

/// "1" and "35+" as numbers.
#[must_use]
pub fn version(major: &str, minor: &str) -> Option<(u32, u32)> {
    let number = |text: &str| {
        let end = text
            .find(|c: char| !c.is_ascii_digit())
            .unwrap_or(text.len());
        text[..end].parse().ok()
    };
    Some((number(major)?, number(minor)?))
}

/// What can be said of a policy: whether the API server refuses what it forbids.
#[must_use]
pub fn verdict(gate: &Gate, policy: &str, nodes: Option<&[String]>) -> Verdict {
    let what = format!(
        "in namespaces labelled {}={policy}, pods on other nodes are refused",
        labels::RESIDENCY
    );
    let (major, minor) = gate.version;
    let ours = "Domicile's own pods are placed only where it permits all the same";
    let (holds, reason, message) = match (gate.installed, gate.shows_region(), nodes) {
        (false, ..) => (
            false,
            reasons::ADMISSION_MISSING,
            format!(
                "the ValidatingAdmissionPolicies {BINDING} and {UNKNOWN} are not installed (the chart's value admission.enabled), so that other people's pods in namespaces labelled {}={policy} are not refused where this policy permits none; {ours}",
                labels::RESIDENCY
            ),
        ),
        (true, true, Some(_)) => (true, reasons::AS_SPECIFIED, what),
        (true, false, Some(_)) => (
            true,
            reasons::AS_SPECIFIED,
            format!(
                "{what}, by the node's name alone: Kubernetes {major}.{minor} doesn't show its region where a pod is bound (1.35 and later do), so that a node relabelled just before isn't noticed there"
            ),
        ),
        (true, true, None) => (
            true,
            reasons::AS_SPECIFIED,
            format!(
                "{what}, by the node's label topology.kubernetes.io/region alone, since it permits more than {MOST_NODES} nodes: a node whose other witnesses disagree isn't noticed there"
            ),
        ),
        (true, false, None) => (
            false,
            reasons::KUBERNETES_TOO_OLD,
            format!(
                "Kubernetes {major}.{minor} doesn't show admission in which region a pod is bound (1.35 and later do), and this policy permits more than {MOST_NODES} nodes, too many to name: other people's pods in namespaces labelled {}={policy} are not refused elsewhere; {ours}",
                labels::RESIDENCY
            ),
        ),
    };
    Verdict::new(conditions::ENFORCED, holds, reason, message)
}

/// The name of a policy's binding. No policy has a '.' in its name, so that it can't be another's.
#[must_use]
pub fn name(policy: &str) -> String {
    format!("{BINDING}.{policy}")
}

fn object(name: &str, spec: ValidatingAdmissionPolicyBindingSpec) -> Binding {
    let mut binding = Binding {
        spec,
        ..Binding::default()
    };
    binding.metadata.name = Some(name.to_owned());
    binding.metadata.labels = Some(BTreeMap::from([
        (labels::NAME.to_owned(), labels::NAME_VALUE.to_owned()),
        (
            labels::MANAGED_BY.to_owned(),
            labels::MANAGED_BY_VALUE.to_owned(),
        ),
    ]));
    binding
}

/// Every field that the API server would fill in is given, so that what is there can be compared.
fn spec(
    admission: &str,
    params: Option<ParamRef>,
    namespaces: LabelSelector,
) -> ValidatingAdmissionPolicyBindingSpec {
    ValidatingAdmissionPolicyBindingSpec {
        policy_name: admission.to_owned(),
        param_ref: params,
        match_resources: Some(MatchResources {
            namespace_selector: Some(namespaces),
            object_selector: Some(LabelSelector::default()),
            match_policy: Some("Equivalent".to_owned()),
            ..MatchResources::default()
        }),
        validation_actions: vec!["Deny".to_owned()],
    }
}

fn of_policy(policy: &str) -> Binding {
    let params = ParamRef {
        name: Some(policy.to_owned()),
        parameter_not_found_action: Some("Deny".to_owned()),
        ..ParamRef::default()
    };
    let labelled = LabelSelector {
        match_labels: Some([(labels::RESIDENCY.to_owned(), policy.to_owned())].into()),
        ..LabelSelector::default()
    };
    object(&name(policy), spec(BINDING, Some(params), labelled))
}

fn of_others(known: &BTreeSet<&str>) -> Binding {
    let requirement = |operator: &str, values: Option<Vec<String>>| LabelSelectorRequirement {
        key: labels::RESIDENCY.to_owned(),
        operator: operator.to_owned(),
        values,
    };
    let mut expressions = vec![requirement("Exists", None)];
    if !known.is_empty() {
        let values = known.iter().map(|k| (*k).to_owned()).collect();
        expressions.push(requirement("NotIn", Some(values)));
    }
    let labelled = LabelSelector {
        match_expressions: Some(expressions),
        ..LabelSelector::default()
    };
    object(UNKNOWN, spec(UNKNOWN, None, labelled))
}

/// What must be written so that every policy in `enforced` has its binding, those in `waived` (which can't be
/// enforced here) have none and are no unknown ones either, and no other has one.
#[must_use]
pub fn plan(
    gate: &Gate,
    enforced: &BTreeSet<String>,
    waived: &BTreeSet<String>,
    there: &[Arc<Binding>],
) -> Vec<Write> {
    let mut wanted: BTreeMap<String, Binding> = BTreeMap::new();
    let found = |name: &str| there.iter().find(|b| b.name_any() == name);
    let is = |wanted: &Binding| {
        found(&wanted.name_any())
            .is_some_and(|b| b.spec == wanted.spec && b.metadata.deletion_timestamp.is_none())
    };
    if gate.installed {
        let mut known: BTreeSet<&str> = waived.iter().map(String::as_str).collect();
        for policy in enforced {
            let binding = of_policy(policy);
            if is(&binding) {
                known.insert(policy);
            }
            wanted.insert(binding.name_any(), binding);
        }
        wanted.insert(UNKNOWN.to_owned(), of_others(&known));
    }
    let mut writes: Vec<Write> = wanted
        .values()
        .filter(|b| !is(b))
        .map(|b| Write::Bind(Box::new(b.clone())))
        .collect();
    let ours = |b: &Binding| {
        b.labels().get(labels::MANAGED_BY).map(String::as_str) == Some(labels::MANAGED_BY_VALUE)
    };
    let surplus = there
        .iter()
        .filter(|b| ours(b) && !wanted.contains_key(&b.name_any()))
        .filter(|b| b.metadata.deletion_timestamp.is_none());
    // Removed only once the one for unknown policies holds their namespaces.
    let held = !gate.installed || wanted.get(UNKNOWN).is_some_and(is);
    writes.extend(surplus.filter(|_| held).map(|b| Write::Unbind {
        name: b.name_any(),
        uid: b.uid().unwrap_or_default(),
    }));
    writes
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const NOW: Gate = Gate {
        installed: true,
        version: (1, 37),
    };

    fn set(names: &[&str]) -> BTreeSet<String> {
        names.iter().map(|n| (*n).to_owned()).collect()
    }

    fn execute(there: &mut Vec<Arc<Binding>>, write: &Write) {
        match write {
            Write::Bind(b) => {
                there.retain(|t| t.name_any() != b.name_any());
                there.push(Arc::new((**b).clone()));
            }
            Write::Unbind { name, .. } => there.retain(|t| t.name_any() != *name),
            other => panic!("{other:?}"),
        }
    }

    /// Whether a namespace with this label is held by some binding: its policy's, or that of the unknown ones.
    fn held(there: &[Arc<Binding>], label: &str) -> bool {
        there.iter().any(|b| {
            let resources = b.spec.match_resources.clone().unwrap();
            let selector = resources.namespace_selector.unwrap();
            let labels = selector.match_labels.unwrap_or_default();
            let expressions = selector.match_expressions.unwrap_or_default();
            labels.values().all(|v| v == label)
                && expressions.iter().all(|e| {
                    e.operator == "Exists" || !e.values.iter().flatten().any(|v| v == label)
                })
        })
    }

    #[test]
    fn versions_are_read_as_clouds_write_them() {
        assert_eq!(version("1", "34+"), Some((1, 34)));
        assert_eq!(version("1", "35"), Some((1, 35)));
        assert_eq!(version("1", ""), None);
    }

    #[test]
    fn what_is_not_covered_is_said() {
        let old = Gate {
            version: (1, 34),
            ..NOW
        };
        let nodes = vec!["n".to_owned()];
        let said = |gate: &Gate, nodes| {
            let v = verdict(gate, "records", nodes);
            (v.status, v.reason, v.message)
        };
        assert_eq!(
            said(&NOW, Some(&nodes[..])).2,
            "in namespaces labelled domicile.dev/residency=records, pods on other nodes are refused"
        );
        assert!(
            said(&old, Some(&nodes[..]))
                .2
                .contains("by the node's name alone")
        );
        assert!(
            said(&NOW, None)
                .2
                .contains("label topology.kubernetes.io/region alone")
        );
        let too_old = said(&old, None);
        assert_eq!(
            (too_old.0, too_old.1),
            (Some(false), reasons::KUBERNETES_TOO_OLD)
        );
        let missing = said(&Gate::default(), Some(&nodes[..]));
        assert_eq!(
            (missing.0, missing.1),
            (Some(false), reasons::ADMISSION_MISSING)
        );
        assert!(!old.enforces(None) && old.enforces(Some(&nodes)) && NOW.enforces(None));
    }

    #[test]
    fn without_the_admission_policies_there_are_no_bindings() {
        let there = plan(&NOW, &set(&["a"]), &set(&[]), &[]);
        assert_eq!(there.len(), 2);
        let mut bindings = vec![];
        there.iter().for_each(|w| execute(&mut bindings, w));
        let writes = plan(&Gate::default(), &set(&["a"]), &set(&[]), &bindings);
        assert!(writes.len() == 2 && writes.iter().all(|w| matches!(w, Write::Unbind { .. })));
    }

    #[test]
    fn a_stranger_with_our_name_is_left_alone_and_one_changed_by_hand_is_mended() {
        let mut changed = of_policy("a");
        changed.spec.validation_actions = vec!["Audit".to_owned()];
        let mut stranger = of_policy("b");
        stranger.metadata.labels = None;
        let writes = plan(
            &NOW,
            &set(&["a"]),
            &set(&[]),
            &[Arc::new(changed), Arc::new(stranger)],
        );
        assert!(writes.contains(&Write::Bind(Box::new(of_policy("a")))));
        assert!(writes.iter().all(|w| matches!(w, Write::Bind(_))));
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(2_000))]

        /// Policies come and go, any prefix of the writes is executed before the world is seen again: no namespace
        /// is ever without a binding that holds it, and in the end everything is as wanted.
        #[test]
        fn no_labelled_namespace_is_ever_free(
            steps in proptest::collection::vec((proptest::sample::subsequence(&["a", "b", "c"][..], 0..=3), 0usize..4), 1..8),
        ) {
            let mut there = vec![];
            let mut first = true;
            for (policies, count) in steps {
                let enforced = set(&policies);
                for write in plan(&NOW, &enforced, &set(&[]), &there).iter().take(count) {
                    execute(&mut there, write);
                }
                first &= there.iter().all(|b| b.name_any() != UNKNOWN);
                for label in ["a", "b", "c", "typo"] {
                    prop_assert!(first || held(&there, label), "{}", label);
                }
            }
            for _ in 0..4 {
                for write in plan(&NOW, &set(&["a"]), &set(&["old"]), &there) {
                    execute(&mut there, &write);
                }
            }
            prop_assert_eq!(plan(&NOW, &set(&["a"]), &set(&["old"]), &there), vec![]);
            prop_assert_eq!(there.len(), 2);
            prop_assert!(held(&there, "a") && held(&there, "typo") && !held(&there, "old"));
        }
    }
}
