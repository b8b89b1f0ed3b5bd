//! The binary: subcommands only.

use clap::{Parser, Subcommand};
use domicile::{api, cli, instance, operator, rights, telemetry};
use std::path::PathBuf;
use std::process::ExitCode;
use tokio::signal::unix::{SignalKind, signal};
use tokio_util::sync::CancellationToken;

/// PostgreSQL stores for personal data that stay in their regions, survive, and forget on request.
#[derive(Parser)]
#[command(name = "domicile", version, about, arg_required_else_help = true)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Show a store: regions, zones, roles, lag.
    Status {
        /// Name of the PrivacyDataStore.
        store: String,
        #[command(flatten)]
        cluster: cli::ClusterArgs,
    },
    /// Explain a store: why it is as it is, who votes, what a commit waits for, what would happen if something died.
    /// Or a policy (`explain policy NAME`): what it permits, which nodes count and why the others don't, what it
    /// forbids today.
    Explain {
        /// Name of the PrivacyDataStore, or the word `policy`.
        #[arg(value_name = "STORE|policy")]
        what: String,
        /// After `policy`: name of the ResidencyPolicy.
        policy: Option<String>,
        #[command(flatten)]
        cluster: cli::ClusterArgs,
    },
    /// Show a workflow's requests, counted by state, target and deadline. Nothing of a person.
    Requests {
        /// Name of the RightsWorkflow.
        workflow: String,
        #[command(flatten)]
        cluster: cli::ClusterArgs,
    },
    /// Make another instance the primary.
    Promote {
        /// Name of the PrivacyDataStore.
        store: String,
        #[command(flatten)]
        args: cli::act::Promote,
        #[command(flatten)]
        cluster: cli::ClusterArgs,
    },
    /// Stop PostgreSQL on an instance and keep it from becoming primary.
    Fence {
        /// Name of the PrivacyDataStore.
        store: String,
        /// The instance.
        instance: String,
        #[command(flatten)]
        cluster: cli::ClusterArgs,
    },
    /// Replace a store's certificate authority without locking anybody out.
    RotateAuthority {
        /// Name of the PrivacyDataStore.
        store: String,
        #[command(flatten)]
        args: cli::rotate::Rotate,
        #[command(flatten)]
        cluster: cli::ClusterArgs,
    },
    /// Let a fenced instance take part again.
    Unfence {
        /// Name of the PrivacyDataStore.
        store: String,
        /// The instance.
        instance: String,
        #[command(flatten)]
        cluster: cli::ClusterArgs,
    },
    /// Show what was last seen of a store where, by which observation, and what could not be seen; or write it all.
    Attest {
        /// Name of the PrivacyDataStore; it may be gone.
        store: String,
        #[command(flatten)]
        args: cli::attest::Attest,
        #[command(flatten)]
        cluster: cli::ClusterArgs,
    },
    /// Check a file of attestations offline: signatures, links, numbers, keys.
    Verify(cli::attest::Verify),
    /// Print the CustomResourceDefinitions, or write them to a folder.
    Crds {
        /// Write one file per kind here instead of printing.
        #[arg(long)]
        dir: Option<PathBuf>,
    },
    /// Run the operator (in a cluster).
    #[command(hide = true)]
    Operator(operator::Args),
    /// Run the instance manager (as PID 1 of a store pod).
    #[command(hide = true)]
    Instance(Box<instance::Args>),
    /// Take requests in for a RightsWorkflow (in a cluster).
    #[command(hide = true)]
    Gateway(Box<rights::gateway::Args>),
    /// End PostgreSQL if the instance manager stalls (started by it).
    #[command(hide = true)]
    Watchdog,
    /// Carry requests to the targets of a region (in a cluster).
    #[command(hide = true)]
    Worker(rights::worker::Args),
    /// Copy this program into a store pod (as its init container).
    #[command(hide = true)]
    Install {
        /// The folder.
        target: PathBuf,
    },
}

fn main() -> ExitCode {
    // Before anything else is set up: it must stay tiny.
    if std::env::args_os()
        .nth(1)
        .is_some_and(|a| a == instance::watchdog::SUBCOMMAND)
    {
        return instance::watchdog::process::main();
    }
    let cli = Cli::parse();
    let runtime = match &cli.command {
        // One thread: an instance manager is beside a database that needs the cores.
        Command::Instance(_) => tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build(),
        _ => tokio::runtime::Builder::new_multi_thread()
            .worker_threads(2)
            .enable_all()
            .build(),
    };
    let outcome = runtime.map_err(anyhow::Error::from).and_then(|runtime| {
        let outcome = runtime.block_on(run(cli));
        // A blocking call that never returns must not hold the process.
        runtime.shutdown_timeout(std::time::Duration::from_secs(1));
        outcome
    });
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("domicile: {error:#}");
            ExitCode::FAILURE
        }
    }
}

async fn run(cli: Cli) -> anyhow::Result<()> {
    match cli.command {
        Command::Status { store, cluster } => {
            let (client, namespace) = cluster.connect().await?;
            print!("{}", cli::status::run(client, &namespace, &store).await?);
            Ok(())
        }
        Command::Explain {
            what,
            policy,
            cluster,
        } => {
            let (client, namespace) = cluster.connect().await?;
            let text = match policy {
                Some(policy) if what == "policy" => {
                    cli::explain_policy::run(client, &policy).await?
                }
                Some(_) => anyhow::bail!(
                    "write `explain STORE` or `explain policy NAME`; {what} is neither"
                ),
                None => cli::explain::run(client, &namespace, &what).await?,
            };
            print!("{text}");
            Ok(())
        }
        Command::Requests { workflow, cluster } => {
            let (client, namespace) = cluster.connect().await?;
            print!(
                "{}",
                cli::requests::run(client, &namespace, &workflow).await?
            );
            Ok(())
        }
        Command::Promote {
            store,
            args,
            cluster,
        } => {
            let (client, namespace) = cluster.connect().await?;
            let done = cli::act::promote(client, &namespace, &store, args).await?;
            print!("{done}");
            Ok(())
        }
        Command::Fence {
            store,
            instance,
            cluster,
        } => fence(&cluster, &store, &instance, true).await,
        Command::RotateAuthority {
            store,
            args,
            cluster,
        } => {
            let (client, namespace) = cluster.connect().await?;
            let done = cli::rotate::rotate(client, &namespace, &store, args).await?;
            print!("{done}");
            Ok(())
        }
        Command::Unfence {
            store,
            instance,
            cluster,
        } => fence(&cluster, &store, &instance, false).await,
        Command::Attest {
            store,
            args,
            cluster,
        } => {
            let (client, namespace) = cluster.connect().await?;
            let shown = cli::attest::attest(client, &namespace, &store, args).await?;
            print!("{shown}");
            Ok(())
        }
        Command::Verify(args) => {
            print!("{}", cli::attest::verify(&args)?);
            Ok(())
        }
        Command::Crds { dir: Some(dir) } => api::crds::write_dir(&dir),
        Command::Crds { dir: None } => {
            print!("{}", api::crds::yaml()?);
            Ok(())
        }
        Command::Operator(args) => {
            telemetry::init();
            Box::pin(operator::run(args, stop_signal()?)).await
        }
        Command::Instance(args) => {
            telemetry::init();
            Box::pin(instance::run((*args).into())).await
        }
        Command::Gateway(args) => {
            telemetry::init();
            Box::pin(rights::gateway::run(*args, stop_signal()?)).await
        }
        Command::Worker(args) => {
            telemetry::init();
            Box::pin(rights::worker::run(args, stop_signal()?)).await
        }
        // Never reached: see `main`.
        Command::Watchdog => Ok(()),
        Command::Install { target } => instance::install(&target),
    }
}

async fn fence(
    cluster: &cli::ClusterArgs,
    store: &str,
    instance: &str,
    on: bool,
) -> anyhow::Result<()> {
    let (client, namespace) = cluster.connect().await?;
    let done = cli::act::fence(client, &namespace, store, instance, on).await?;
    print!("{done}");
    Ok(())
}

/// Cancelled at SIGTERM or SIGINT.
fn stop_signal() -> anyhow::Result<CancellationToken> {
    let token = CancellationToken::new();
    let (mut term, mut int) = (
        signal(SignalKind::terminate())?,
        signal(SignalKind::interrupt())?,
    );
    let stop = token.clone();
    tokio::spawn(async move {
        tokio::select! {
            _ = term.recv() => {}
            _ = int.recv() => {}
        }
        stop.cancel();
    });
    Ok(token)
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory as _;

    /// What clap itself finds wrong with the commands it finds only when one of them is used.
    #[test]
    fn the_commands_are_well_formed() {
        Cli::command().debug_assert();
    }
}
