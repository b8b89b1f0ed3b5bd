//! The command line of the test bed: reads arguments, calls the library, prints. Decides nothing.

use anyhow::{Context, Result};
use clap::{Args, Parser, Subcommand};
use e2e::api::ApiServer;
use e2e::faults::Cut;
use e2e::image::{self, Config};
use e2e::layout::Layout;
use e2e::testbed::TestBed;
use e2e::{cluster, daemon, metrics, provisioner, relay, run, status};
use std::path::PathBuf;
use std::process::ExitCode;

#[derive(Parser)]
#[command(
    about = "A real Kubernetes of several regions on one machine, and the means to break it.",
    version
)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Starts the test bed, or what is missing of it.
    Up,
    /// Stops and removes everything; fails if something is left.
    Down,
    /// Shows nodes, control plane and faults.
    Status,
    /// Silently drops packets of a node: both ways, unless one is named.
    Cut {
        /// w1, w2, w3, e1, e2 or c1.
        node: String,
        /// Only packets towards the node.
        #[arg(long = "in", conflicts_with = "outward")]
        inward: bool,
        /// Only packets from the node.
        #[arg(long = "out")]
        outward: bool,
    },
    /// Ends the cut of a node.
    Heal {
        /// The node; without one: every cut, latency and frozen pod.
        node: Option<String>,
    },
    /// Silently drops what crosses a region's border.
    CutRegion {
        /// us-west, us-east or eu-central.
        region: String,
    },
    /// Ends the cut of a region.
    HealRegion {
        /// us-west, us-east or eu-central.
        region: String,
    },
    /// Stops every process of a pod where it stands.
    Freeze(PodName),
    /// Lets a frozen pod go on.
    Thaw(PodName),
    /// Holds packets between two regions back; 0 ends it.
    Latency {
        /// One region.
        a: String,
        /// The other.
        b: String,
        /// Milliseconds, one way.
        milliseconds: u64,
    },
    /// Prints a component's log; without a name: which there are.
    Logs {
        /// For instance kube-apiserver or w1-kubelet.
        component: Option<String>,
        /// How many lines from its end.
        #[arg(long, default_value_t = 200)]
        lines: usize,
    },
    /// Imports an image archive on every node.
    Load {
        /// The archive.
        archive: PathBuf,
    },
    /// Installs the metrics server, which autoscalers and `kubectl top` ask.
    Metrics {
        /// Removes it.
        #[arg(long)]
        remove: bool,
    },
    /// Prints the path of the administrator's kubeconfig.
    Kubeconfig,
    /// Writes the image of one static program as an archive.
    Image {
        /// The program.
        #[arg(long)]
        binary: PathBuf,
        /// Where it lies in the image.
        #[arg(long)]
        path: Option<String>,
        /// Program and first arguments; by default the program.
        #[arg(long, num_args = 1..)]
        entrypoint: Vec<String>,
        /// Who runs it.
        #[arg(long, default_value = "65532:65532")]
        user: String,
        /// The image's name.
        #[arg(long)]
        tag: String,
        /// The archive.
        #[arg(long)]
        out: PathBuf,
    },
    /// An API server with fake nodes, without root.
    Api {
        #[command(subcommand)]
        command: ApiCommand,
    },
    /// Builds the programs and images that aren't in the cache.
    Prepare,
    /// Makes volumes (started by `up`).
    #[command(hide = true)]
    Provisioner(Internal),
    /// Holds packets back (started by `latency`).
    #[command(hide = true)]
    Relay(Internal),
}

#[derive(Args)]
struct PodName {
    /// The pod.
    pod: String,
    /// Its namespace.
    #[arg(short, long, default_value = "default")]
    namespace: String,
}

#[derive(Args)]
struct Internal {
    #[arg(long)]
    state: PathBuf,
}

#[derive(Subcommand)]
enum ApiCommand {
    /// Starts it and prints its kubeconfig's path.
    Up {
        /// Its folder; several run side by side.
        #[arg(long)]
        dir: Option<PathBuf>,
    },
    /// Stops it and removes its folder.
    Down {
        /// Its folder.
        #[arg(long)]
        dir: Option<PathBuf>,
    },
}

#[tokio::main]
async fn main() -> ExitCode {
    match Box::pin(execute(Cli::parse().command)).await {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => {
            eprintln!("error: {e:#}");
            ExitCode::FAILURE
        }
    }
}

async fn execute(command: Command) -> Result<()> {
    let layout = Layout::system();
    match command {
        Command::Up => cluster::up(&layout).await,
        Command::Down => cluster::down(&layout).await,
        Command::Prepare => cluster::prepare().await.map(drop),
        Command::Status => {
            print!("{}", status::table(&layout).await?);
            Ok(())
        }
        Command::Cut {
            node,
            inward,
            outward,
        } => {
            let cut = match (inward, outward) {
                (true, _) => Cut::IN,
                (_, true) => Cut::OUT,
                _ => Cut::BOTH,
            };
            TestBed::attach().await?.cut(&node, cut).await
        }
        Command::Heal { node: Some(node) } => TestBed::attach().await?.heal(&node).await,
        Command::Heal { node: None } => TestBed::attach().await?.heal_all().await,
        Command::CutRegion { region } => TestBed::attach().await?.cut_region(&region).await,
        Command::HealRegion { region } => TestBed::attach().await?.heal_region(&region).await,
        Command::Freeze(p) => TestBed::attach().await?.freeze(&p.namespace, &p.pod).await,
        Command::Thaw(p) => TestBed::attach().await?.thaw(&p.namespace, &p.pod).await,
        Command::Latency { a, b, milliseconds } => {
            TestBed::attach().await?.latency(&a, &b, milliseconds).await
        }
        Command::Logs {
            component: None, ..
        } => {
            println!("{}", daemon::names(&layout).join("\n"));
            Ok(())
        }
        Command::Logs {
            component: Some(name),
            lines,
        } => {
            let path = daemon::log_path(&layout, &name);
            anyhow::ensure!(
                path.exists(),
                "no log of {name}: there are {}",
                daemon::names(&layout).join(", ")
            );
            print!("{}", daemon::last_lines(&path, lines));
            Ok(())
        }
        Command::Load { archive } => {
            let name =
                image::inspect(&archive)?.map_or_else(|| archive.display().to_string(), |s| s.name);
            let bed = TestBed::attach().await?;
            let count = run::step(&format!("loaded {name}"), bed.load(&archive)).await?;
            run::say("ok", &format!("{count} nodes needed it"), None);
            Ok(())
        }
        Command::Metrics { remove } => {
            let bed = TestBed::attach().await?;
            if remove {
                run::step("metrics server removed", metrics::remove(&bed)).await
            } else {
                run::step("metrics server", metrics::install(&bed)).await
            }
        }
        Command::Kubeconfig => {
            println!("{}", layout.kubeconfig().display());
            Ok(())
        }
        Command::Image {
            binary,
            path,
            entrypoint,
            user,
            tag,
            out,
        } => {
            let name = binary
                .file_name()
                .context("the program has no name")?
                .to_string_lossy();
            let path = path.unwrap_or_else(|| format!("/usr/local/bin/{name}"));
            let entrypoint = if entrypoint.is_empty() {
                vec![path.clone()]
            } else {
                entrypoint
            };
            let env = vec![
                format!("PATH=/usr/local/bin:/usr/bin:/bin"),
                "SSL_CERT_FILE=/etc/ssl/certs/ca-certificates.crt".into(),
            ];
            let config = Config {
                entrypoint,
                env,
                user,
                ..Config::default()
            };
            let made = image::write_program(&out, &tag, &binary, &path, &config)?;
            println!("{} {}", made.name, made.digest);
            Ok(())
        }
        Command::Api {
            command: ApiCommand::Up { dir },
        } => {
            let kubeconfig = ApiServer::up(dir.as_deref()).await?;
            println!("{}", kubeconfig.display());
            Ok(())
        }
        Command::Api {
            command: ApiCommand::Down { dir },
        } => ApiServer::down(dir.as_deref()).await,
        Command::Provisioner(i) => provisioner::serve(&Layout::at(&i.state)).await,
        Command::Relay(i) => relay::serve(&Layout::at(&i.state)).await,
    }
}
