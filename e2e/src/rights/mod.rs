//! Requests of people on the test bed: a front desk that files them, a Redis that holds sessions, people with data.
//!
//! Sees the product only from outside: the gateway's HTTP API, kubectl, SQL and redis-cli. No type of its crate.

pub mod bench;
pub mod desk;
pub mod memory;
pub mod people;
pub mod sessions;
pub mod surge;
pub mod workflow;
