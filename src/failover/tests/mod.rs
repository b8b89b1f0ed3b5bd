//! Tests of the protocol as a whole: a seeded simulation with a model of PostgreSQL, and a model checker.

mod agent;
mod chaos;
mod checker;
mod oracle;
mod postgres;
mod replication;
mod simulation;
mod steps;
mod whole;
mod world;
