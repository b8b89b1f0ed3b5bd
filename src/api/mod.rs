//! The kinds of group `domicile.dev`: what users write and what Domicile reports.
//!
//! Owns: the types, their schemas (bounds, CEL rules, descriptions), the names of conditions, reasons,
//! labels and annotations, and the names of a store's child objects.
//! Never: does I/O, reads a clock, or decides anything. A value that parses here is well-formed; whether it
//! is *lawful* is decided in `residency/`, and whether it can be *placed* in `placement/`.

pub mod conditions;
pub mod crds;
pub mod labels;
pub mod names;
pub mod parameters;
pub mod privacy_data_store;
pub mod region;
pub mod residency_policy;
pub mod rights_targets;
pub mod rights_workflow;
pub mod schema;

pub use privacy_data_store::{PrivacyDataStore, PrivacyDataStoreSpec, PrivacyDataStoreStatus};
pub use region::{Region, RegionSpec, RegionStatus};
pub use residency_policy::{ResidencyPolicy, ResidencyPolicySpec, ResidencyPolicyStatus};
pub use rights_workflow::{RightsWorkflow, RightsWorkflowSpec, RightsWorkflowStatus};

/// API group of every kind.
pub const GROUP: &str = "domicile.dev";
/// The served and stored version.
pub const VERSION: &str = "v1alpha1";
