//! What a failover costs, measured from outside: clients that never forget what a server told them, and a
//! checker that asks the last primary for all of it.
//!
//! Sees only what a user sees, and most of it works on any PostgreSQL cluster:
//! - [`target`]: where the instances are and how to log in. Made by hand for any cluster, or from the
//!   application's Secret.
//! - [`client`]: the clients, as a program of their own (`bench client`): reads a [`client::Spec`] as one line of
//!   JSON from its standard input, writes one [`event::Event`] per line to its standard output, and ends when its
//!   input ends. Started in a network namespace by [`process::Process`], which collects the events.
//! - [`ledger`]: pure computations on the events: the service's gap, the writer's own gap, rows lost, duplicates,
//!   commits and reads of a deposed primary.
//! - [`check`]: the table the clients write into: made before, read after a run.
//!
//! The rest is about stores on the test bed: [`store`] (a store and its status), [`inject`] (ways to break it),
//! [`cases`] (which fault, for how long, with what expected), [`watch`] (what its status said meanwhile), [`run`]
//! (one run of one case), [`sample`] and [`report`] (what is kept of it, figures and goals), [`mod@bench`] (all of them), [`show`] (one
//! of them, before one's eyes).
//!
//! **Who measures.** The writer and the probes are one process in the network namespace of a node in another
//! region than the primary's. It speaks to the hosts of the application Secret's URI, in the URI's order, with
//! the URI's time-outs, over TLS verified against the Secret's `ca.crt` by host name. The one thing it does not do
//! itself is ask the cluster's DNS: the addresses of the hosts (those of their Services, which never change) are
//! resolved before, as libpq's `hostaddr` would; kube-proxy's rules of that node take it from there. Times are of
//! the machine's monotonic clock, which all namespaces share.
//!
//! **What counts.** A commit is acknowledged if the server said so, and never otherwise; what got no answer is
//! unknown, whatever became of it. No client retries a row or cancels a statement (but for the case that is about
//! cancelling): it drops its connection. A primary's reign is told by its timeline, which every promotion raises,
//! so that "old" and "new" need no knowledge of the product.

pub mod bench;
pub mod cases;
pub mod check;
pub mod client;
pub mod event;
pub mod inject;
pub mod ledger;
pub mod probe;
pub mod process;
pub mod report;
pub mod run;
pub mod sample;
pub mod session;
pub mod show;
pub mod store;
pub mod target;
pub mod watch;
