//! `RightsWorkflow`: placeholder until its types land in this change.
use kube::{CustomResource, KubeSchema};
use serde::{Deserialize, Serialize};
/// Spec.
#[derive(CustomResource, KubeSchema, Clone, Debug, PartialEq, Serialize, Deserialize)]
#[kube(
    group = "domicile.dev",
    version = "v1alpha1",
    kind = "RightsWorkflow",
    plural = "rightsworkflows",
    namespaced,
    status = "RightsWorkflowStatus",
    derive = "PartialEq"
)]
#[serde(rename_all = "camelCase")]
pub struct RightsWorkflowSpec {}
/// Status.
#[derive(KubeSchema, Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct RightsWorkflowStatus {}
