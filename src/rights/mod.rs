//! Requests of people about their data: taken in, kept, carried out, proven.
//!
//! - [`model`]: what a request, a step and an outcome are
//! - [`config`]: what the operator made of a workflow, as gateways and workers read it
//! - [`secrecy`]: keys: identifiers encrypted per request, keyed hashes
//! - [`ledger`]: the database of requests
//! - [`gateway`]: takes requests in over HTTP
//! - [`connectors`]: one file per kind of system that holds personal data
//! - [`worker`]: claims steps, erases, proves
//! - [`postgres`]: connections to primaries, for ledger and connectors
//!
//! Never: writes an identifier of a person into a log, a metric, an error or a name; answers "accepted" for what isn't
//! durable; ends a step without proof.

pub mod config;
pub mod connectors;
pub mod gateway;
pub mod ledger;
pub mod model;
pub mod postgres;
pub mod secrecy;
pub mod worker;
