//! `domicile instance`: the first process of every store pod, which runs and looks after PostgreSQL.
//!
//! Owns PostgreSQL as a process, its configuration and roles, the copy on its volume, its replication, its part in
//! elections, the probes, and the instance's own entry in the store's status.
//! Never: asks the operator or the API server who is primary (the instances agree on that, [`agent`]), writes outside its own store's
//! objects, needs the API server to go on serving, or lets personal data into a log, metric or object.
//!
//! One loop: observe → plan → act → report. [`plan`] is pure and decides; everything else only looks or does.
//! - pure: [`plan`], [`settings`], [`hba`], [`conninfo`], [`sync`], [`report`], [`status`]
//! - the volume and files: [`volume`], [`tls`], [`files`], [`install`]
//! - PostgreSQL: [`programs`], [`postmaster`], [`logs`], [`jobs`], [`session`], [`vitals`], [`roles`], [`rights`],
//!   [`receiver`], [`kill`], [`watchdog`], and what they need: [`proc`], [`clock`]
//! - the outside: [`store`] (the seam), [`apiserver`], [`peers`], [`http`], [`metrics`]
//! - failover: [`agent`], which carries out [`crate::failover`] beside the loop
//! - the loop: [`manager`], and its four parts `observe`, `act`, `tend`, `say`; process 1: [`reaper`]
//!
//! Replication is direct, from PostgreSQL to PostgreSQL; [`receiver`] says why, and how it's cut. Between regions a standby goes
//! by a session that was ready ([`relay`]).

mod act;
pub mod agent;
pub mod apiserver;
pub mod clock;
pub mod config;
pub mod conninfo;
pub mod files;
pub mod hba;
pub mod http;
mod install;
pub mod jobs;
pub mod kill;
pub mod logs;
pub mod manager;
pub mod metrics;
pub(crate) mod observe;
pub mod overlap;
pub mod peers;
pub mod plan;
pub mod postmaster;
pub mod proc;
pub mod programs;
pub mod reaper;
pub mod receiver;
pub mod relay;
pub mod report;
pub mod rights;
pub mod roles;
mod say;
pub mod session;
pub mod settings;
pub mod status;
pub mod store;
pub mod strangers;
pub mod sync;
mod tend;
pub mod tls;
pub mod vitals;
pub mod volume;
pub mod watchdog;

pub use config::{Args, Config};
pub use install::install;

use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::watch;
use tracing::info;

use postmaster::Stop;

/// Runs an instance until it's told to stop: SIGTERM or SIGINT stop PostgreSQL gracefully, SIGQUIT at once.
///
/// # Errors
/// If the instance can't even begin (its volume can't be written, its port is taken). Everything later is
/// reported and tried again.
pub async fn run(config: Config) -> anyhow::Result<()> {
    let (stop, stopping) = watch::channel(None);
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    let mut quit = signal(SignalKind::quit())?;
    tokio::spawn(async move {
        loop {
            let how = tokio::select! {
                _ = terminate.recv() => Stop::Fast,
                _ = interrupt.recv() => Stop::Fast,
                _ = quit.recv() => Stop::Immediate,
            };
            info!(?how, "told to stop");
            // A polite request doesn't soften an earlier urgent one.
            stop.send_modify(|now| {
                if *now != Some(Stop::Immediate) {
                    *now = Some(how);
                }
            });
        }
    });
    let (api, _tasks) = apiserver::connect(&config);
    Box::pin(run_with(config, api, stopping)).await
}

/// As [`run`], with the API server and the wish to stop given: what the tests call.
///
/// # Errors
/// As [`run`].
pub async fn run_with(
    config: Config,
    api: store::Api,
    stop: watch::Receiver<Option<Stop>>,
) -> anyhow::Result<()> {
    let listener = tokio::net::TcpListener::bind(config.http).await?;
    let (manager, view) = manager::Manager::new(config, api, stop)?;
    let children = manager.children();
    let mut tasks = tokio::task::JoinSet::new();
    tasks.spawn(http::serve(listener, view));
    if std::process::id() == 1 {
        tasks.spawn(reaper::run(children));
    }
    let result = Box::pin(manager.run()).await;
    // Until the port is free again.
    tasks.shutdown().await;
    result
}
