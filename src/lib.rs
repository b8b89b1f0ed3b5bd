//! Domicile: a Kubernetes operator for workloads that hold personal data.
//!
//! Dependency arrows point down this list. Nothing above the line does I/O or reads a clock:
//!
//! - [`api`]: the kinds
//! - `pki`: which authority is which
//! - `residency`: what may be where
//! - `placement`: which instance goes where
//! - `deadlines`: regimes, clocks, calendars
//! - `failover`: terms, votes, configurations: the decisions of an instance
//! - ---
//! - `operator`: observe → plan → apply → report
//! - `instance`: PID 1 of a store pod
//! - `rights`: ledger, gateway, worker, connectors
//! - `telemetry`: logs, metrics
//! - `cli`: `kubectl domicile`

pub mod api;
pub mod cli;
pub mod deadlines;
pub mod failover;
pub mod instance;
pub mod operator;
pub mod pki;
pub mod placement;
pub mod residency;
pub mod rights;
pub mod telemetry;
