//! Where an instance lives and what it is called.
//!
//! Owns the command line of `domicile instance` and every path, port and bound that a test sets otherwise.
//! Never: holds anything that can change while the process lives; that is the store's object.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::path::PathBuf;
use std::time::Duration;

use crate::api::names::{self, env, paths};

/// Runs and looks after PostgreSQL as the first process of a store's pod.
#[derive(clap::Args, Clone, Debug)]
pub struct Args {
    /// Name of the store.
    #[arg(long, env = env::STORE)]
    pub store: String,
    /// Namespace of the store.
    #[arg(long, env = env::NAMESPACE)]
    pub namespace: String,
    /// Name of this instance.
    #[arg(long, env = env::INSTANCE)]
    pub instance: String,
    /// Address at which the other instances reach this one.
    #[arg(long, env = env::ADDRESS)]
    pub address: IpAddr,
    /// The volume.
    #[arg(long, default_value = paths::VOLUME)]
    pub volume: PathBuf,
    /// Sockets, private keys and configuration, in memory.
    #[arg(long, default_value = paths::RUN)]
    pub run_dir: PathBuf,
    /// Directory with ca.crt, tls.crt and tls.key.
    #[arg(long, default_value = paths::TLS)]
    pub tls: PathBuf,
    /// Directory with the application's username and password.
    #[arg(long, default_value = paths::APP)]
    pub app: PathBuf,
    /// Directory with PostgreSQL's programs; found by itself if not given.
    #[arg(long)]
    pub bin: Option<PathBuf>,
}

/// Where an instance lives, what it is called, and its bounds.
#[derive(Clone, Debug)]
pub struct Config {
    /// Name of the store.
    pub store: String,
    /// Namespace of the store.
    pub namespace: String,
    /// Name of this instance.
    pub instance: String,
    /// Address at which the other instances reach this one.
    pub address: IpAddr,
    /// The volume.
    pub volume: PathBuf,
    /// Sockets, private keys and configuration, in memory.
    pub run: PathBuf,
    /// Directory with ca.crt, tls.crt and tls.key.
    pub tls: PathBuf,
    /// Directory with the application's username and password.
    pub app: PathBuf,
    /// Directory with PostgreSQL's programs; found by itself if not given.
    pub bin: Option<PathBuf>,
    /// PostgreSQL's `listen_addresses`.
    pub listen: String,
    /// PostgreSQL's port, here and on the other instances.
    pub port: u16,
    /// Where probes, metrics and status are served.
    pub http: SocketAddr,
    /// Where the other instances of the store are listened to; they reach it at `address` and the same port.
    pub peers: SocketAddr,
    /// This program itself, for the watchdog.
    pub program: PathBuf,
    /// The bounds.
    pub timing: Timing,
}

/// How long things may take.
#[derive(Clone, Copy, Debug)]
pub struct Timing {
    /// Between two looks at a PostgreSQL that serves.
    pub tick: Duration,
    /// Between two looks at one that starts.
    pub starting_tick: Duration,
    /// Between two looks at certificates and credentials.
    pub files: Duration,
    /// How long the API server is given before a remembered store is gone by.
    pub remember_after: Duration,
    /// One statement of the manager's.
    pub statement: Duration,
    /// How long a standby whose WAL is gone on the primary waits before it is cloned anew.
    pub stranded_after: Duration,
    /// How long a clone may make no progress.
    pub clone_stall: Duration,
    /// First pause after a failure; it doubles.
    pub backoff: Duration,
    /// Longest pause after failures.
    pub backoff_max: Duration,
    /// A graceful stop becomes an immediate one after this.
    pub stop: Duration,
    /// How far away an instance is, there and back, with which a session is kept ready for the next failover.
    pub far: Duration,
}

impl Default for Timing {
    fn default() -> Self {
        Self {
            tick: Duration::from_secs(1),
            starting_tick: Duration::from_millis(100),
            files: Duration::from_secs(10),
            remember_after: Duration::from_secs(3),
            statement: Duration::from_secs(3),
            stranded_after: Duration::from_secs(60),
            clone_stall: Duration::from_secs(300),
            backoff: Duration::from_secs(1),
            backoff_max: Duration::from_secs(30),
            stop: Duration::from_secs(45),
            // Between zones it is one or two; the nearest regions are ten apart.
            far: Duration::from_millis(10),
        }
    }
}

impl From<Args> for Config {
    fn from(args: Args) -> Self {
        let any: IpAddr = match args.address {
            IpAddr::V4(_) => Ipv4Addr::UNSPECIFIED.into(),
            IpAddr::V6(_) => Ipv6Addr::UNSPECIFIED.into(),
        };
        Self {
            store: args.store,
            namespace: args.namespace,
            instance: args.instance,
            address: args.address,
            volume: args.volume,
            run: args.run_dir,
            tls: args.tls,
            app: args.app,
            bin: args.bin,
            listen: "*".to_owned(),
            port: names::POSTGRES_PORT,
            http: SocketAddr::new(any, names::HTTP_PORT),
            peers: SocketAddr::new(any, names::PEER_PORT),
            program: "/proc/self/exe".into(),
            timing: Timing::default(),
        }
    }
}
