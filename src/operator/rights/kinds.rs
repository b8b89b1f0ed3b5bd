//! The kinds of objects that a workflow is made of, beside its Secrets.
//!
//! Owns their list and how they are addressed; never touches one.

use k8s_openapi::api::apps::v1::Deployment;
use k8s_openapi::api::autoscaling::v2::HorizontalPodAutoscaler;
use k8s_openapi::api::core::v1::{ConfigMap, Service, ServiceAccount};
use k8s_openapi::api::networking::v1::NetworkPolicy;
use k8s_openapi::api::policy::v1::PodDisruptionBudget;
use kube::core::ApiResource;

/// A kind of child that the operator keeps as specified.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum ChildKind {
    /// Identity of gateways, and of workers.
    ServiceAccount,
    /// The workflow, resolved; and the authority of the gateway's certificate.
    ConfigMap,
    /// Who may connect to gateways and workers.
    NetworkPolicy,
    /// Where clients find the gateway.
    Service,
    /// At most one gateway, and one worker of a region, down by an eviction at a time.
    PodDisruptionBudget,
    /// Gateways, and the workers of each region.
    Deployment,
    /// Gateways follow their load.
    HorizontalPodAutoscaler,
}

impl ChildKind {
    /// All, in the order in which they are made: what pods need comes first.
    pub const ALL: [Self; 7] = [
        Self::ServiceAccount,
        Self::ConfigMap,
        Self::NetworkPolicy,
        Self::Service,
        Self::PodDisruptionBudget,
        Self::Deployment,
        Self::HorizontalPodAutoscaler,
    ];

    /// How the API addresses it.
    #[must_use]
    pub fn resource(self) -> ApiResource {
        match self {
            Self::ServiceAccount => ApiResource::erase::<ServiceAccount>(&()),
            Self::ConfigMap => ApiResource::erase::<ConfigMap>(&()),
            Self::NetworkPolicy => ApiResource::erase::<NetworkPolicy>(&()),
            Self::Service => ApiResource::erase::<Service>(&()),
            Self::PodDisruptionBudget => ApiResource::erase::<PodDisruptionBudget>(&()),
            Self::Deployment => ApiResource::erase::<Deployment>(&()),
            Self::HorizontalPodAutoscaler => ApiResource::erase::<HorizontalPodAutoscaler>(&()),
        }
    }
}
