//! Connectors on real servers: the suite that each must pass, and what is particular to each.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "a test that can't go on should say so and stop"
)]

#[path = "../instance_bed/mod.rs"]
mod instance_bed;
mod postgres;
mod postgres_more;
mod redis;
mod redis_more;
mod suite;

conformance!(postgresql, crate::postgres::Postgres);
conformance!(redis_server, crate::redis::Redis);
