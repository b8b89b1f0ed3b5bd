//! The kinds of objects that a store is made of, beside pods, volume claims and Secrets.
//!
//! Owns their list and how they are addressed; never touches one.

use k8s_openapi::api::core::v1::{ConfigMap, Service, ServiceAccount};
use k8s_openapi::api::discovery::v1::EndpointSlice;
use k8s_openapi::api::policy::v1::PodDisruptionBudget;
use k8s_openapi::api::rbac::v1::{Role, RoleBinding};
use kube::core::ApiResource;

/// A kind of child that the operator keeps as specified.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum ChildKind {
    /// Identity of the store's pods.
    ServiceAccount,
    /// What that identity may do: read its own store, write its own status and endpoints.
    Role,
    /// Binds the two.
    RoleBinding,
    /// Stable names.
    Service,
    /// Where `-rw` and `-ro` lead; their content belongs to the primary.
    EndpointSlice,
    /// The witness of a store with an even number of instances; its content belongs to the instances.
    ConfigMap,
    /// At most one instance down by an eviction at a time.
    PodDisruptionBudget,
}

impl ChildKind {
    /// All, in the order in which they are made: what pods need comes before what pods use later.
    pub const ALL: [Self; 7] = [
        Self::ServiceAccount,
        Self::Role,
        Self::RoleBinding,
        Self::Service,
        Self::EndpointSlice,
        Self::ConfigMap,
        Self::PodDisruptionBudget,
    ];

    /// How the API addresses it.
    #[must_use]
    pub fn resource(self) -> ApiResource {
        match self {
            Self::ServiceAccount => ApiResource::erase::<ServiceAccount>(&()),
            Self::Role => ApiResource::erase::<Role>(&()),
            Self::RoleBinding => ApiResource::erase::<RoleBinding>(&()),
            Self::Service => ApiResource::erase::<Service>(&()),
            Self::EndpointSlice => ApiResource::erase::<EndpointSlice>(&()),
            Self::ConfigMap => ApiResource::erase::<ConfigMap>(&()),
            Self::PodDisruptionBudget => ApiResource::erase::<PodDisruptionBudget>(&()),
        }
    }
}
