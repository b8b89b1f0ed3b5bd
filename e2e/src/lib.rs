//! The test bed of Domicile: a real Kubernetes of several regions on one machine, and the means to
//! break it.
//!
//! [`testbed::TestBed`] is the whole cluster (needs root); [`api::ApiServer`] is an API server with
//! fake nodes (needs no root). Never part of what is shipped.

pub mod addons;
pub mod api;
pub mod cgroups;
pub mod cluster;
pub mod commit;
pub mod control;
pub mod corpus;
pub mod daemon;
pub mod drift;
pub mod failover;
pub mod faults;
pub mod figures;
pub mod harness;
pub mod image;
pub mod images;
pub mod layout;
pub mod leftovers;
pub mod metrics;
pub mod net;
pub mod node;
pub mod operated;
pub mod patroni;
pub mod pki;
pub mod provisioner;
pub mod relay;
pub mod residency;
pub mod rights;
pub mod run;
pub mod seed;
pub mod status;
pub mod testbed;
pub mod tools;
pub mod topology;
