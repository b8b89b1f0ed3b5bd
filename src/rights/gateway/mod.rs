//! The gateway: `domicile gateway`. Takes requests in over HTTPS, and answers when they are durable.
//!
//! - [`serve`], [`tls`]: connections
//! - [`auth`], [`limits`]: who may, and how much
//! - [`strict`], [`filing`]: what was sent, and whether it can be carried out
//! - [`intake`], [`live`]: the way into the ledger
//! - [`api`], [`wire`], [`problem`]: paths, answers, problems
//! - [`probes`], [`metrics`]: how it is
//!
//! Stateless: any number of gateways may run, and each may be killed at any time. Never: answers 2xx for what isn't on
//! the ledger's quorum; is open to somebody it doesn't know; writes an identifier, a token or a user's name to a log.

pub mod api;
pub mod auth;
pub mod filing;
pub mod intake;
pub mod limits;
pub mod live;
pub mod metrics;
pub mod probes;
pub mod problem;
pub mod serve;
pub mod strict;
pub mod tls;
pub mod wire;

use std::collections::BTreeSet;
use std::net::SocketAddr;
use std::num::NonZeroU32;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context as _;
use kube::{Client, Config};
use rand::Rng as _;
use tokio::net::TcpListener;
use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio::time::{sleep, timeout};
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};

use crate::api::names::rights::{GATEWAY_PORT, paths};
use crate::rights::model::State;
use api::{Gateway, Shared};
use auth::Authentication;
use auth::reviews::{Subject, Tokens};
use metrics::Metrics;
use serve::{Phase, Server};
use wire::Tally;

/// For how long connections that are being answered are waited for, at the end.
const FINISH: Duration = Duration::from_secs(15);
/// Connections of probes.
const PROBES: serve::Bounds = serve::Bounds {
    connections: 32,
    age: Duration::from_secs(60),
};
/// How often the backlog is counted, and how often the ledger is tried before it was reached. Where counting takes long,
/// it is done less often: so many times as long as it took.
const COUNT: Duration = Duration::from_secs(10);
const COUNT_SHARE: u32 = 100;
const TRY: Duration = Duration::from_secs(1);

/// Settings of a gateway.
#[derive(Clone, Debug, clap::Args)]
pub struct Args {
    /// What the operator made of the workflow.
    #[arg(long, env = "DOMICILE_RIGHTS_CONFIG", default_value = paths::CONFIG)]
    pub config: PathBuf,
    /// Directory of the certificate by which the ledger knows the gateway (ca.crt, tls.crt, tls.key).
    #[arg(long, env = "DOMICILE_RIGHTS_TLS", default_value = paths::TLS)]
    pub tls: PathBuf,
    /// Directory of the workflow's keys.
    #[arg(long, env = "DOMICILE_RIGHTS_KEYS", default_value = paths::KEYS)]
    pub keys: PathBuf,
    /// Directory of the certificate that clients are shown (tls.crt, tls.key).
    #[arg(long, env = "DOMICILE_RIGHTS_SERVING", default_value = paths::SERVING)]
    pub serving: PathBuf,
    /// Address of the API (HTTPS).
    #[arg(long, env = "DOMICILE_HTTPS", default_value_t = SocketAddr::from(([0, 0, 0, 0], GATEWAY_PORT)))]
    pub https: SocketAddr,
    /// Address of probes and metrics (plain HTTP, nothing secret).
    #[arg(long, env = "DOMICILE_HTTP", default_value = "0.0.0.0:8008")]
    pub http: SocketAddr,
    /// Audiences of which a client's token must have one.
    #[arg(
        long = "audience",
        env = "DOMICILE_GATEWAY_AUDIENCES",
        value_delimiter = ',',
        default_value = "domicile"
    )]
    pub audiences: Vec<String>,
    /// Certificates (PEM) of the authority whose client certificates are taken. Absent: none are.
    #[arg(long, env = "DOMICILE_GATEWAY_CLIENT_CA", requires = "allow_cn")]
    pub client_ca: Option<PathBuf>,
    /// Common names of client certificates that may do everything.
    #[arg(
        long,
        env = "DOMICILE_GATEWAY_ALLOW_CN",
        value_delimiter = ',',
        requires = "client_ca"
    )]
    pub allow_cn: Vec<String>,
    /// Requests of one client a second; a bulk counts as many as it files.
    #[arg(long, env = "DOMICILE_GATEWAY_RATE", default_value = "5000")]
    pub rate: NonZeroU32,
    /// Requests of one client at once.
    #[arg(long, env = "DOMICILE_GATEWAY_BURST", default_value = "10000")]
    pub burst: NonZeroU32,
    /// Requests at a time.
    #[arg(long, env = "DOMICILE_GATEWAY_IN_FLIGHT", default_value = "1024")]
    pub in_flight: usize,
    /// MiB of bodies at a time.
    #[arg(long, env = "DOMICILE_GATEWAY_BODIES_MIB", default_value = "16")]
    pub bodies_mib: usize,
    /// Connections at a time.
    #[arg(long, env = "DOMICILE_GATEWAY_CONNECTIONS", default_value = "2048")]
    pub connections: usize,
    /// Seconds after which an answer is its connection's last, so that clients come to know new gateways.
    #[arg(
        long,
        env = "DOMICILE_GATEWAY_CONNECTION_SECONDS",
        default_value = "15"
    )]
    pub connection_seconds: u64,
    /// Connections to the ledger.
    #[arg(long, env = "DOMICILE_GATEWAY_LEDGER_CONNECTIONS", default_value = "8")]
    pub ledger_connections: usize,
    /// Seconds between the end of readiness and the end of the listener, until everybody has heard of it.
    #[arg(long, env = "DOMICILE_GATEWAY_LEAVE_SECONDS", default_value = "5")]
    pub leave_seconds: u64,
}

/// Where a gateway listens.
#[derive(Clone, Copy, Debug)]
pub struct Addresses {
    /// The API.
    pub https: SocketAddr,
    /// Probes and metrics.
    pub http: SocketAddr,
}

/// Runs until `stop`, and then until the last request is answered.
///
/// # Errors
/// If something that it needs isn't there.
pub async fn run(args: Args, stop: CancellationToken) -> anyhow::Result<()> {
    let mut config = Config::infer()
        .await
        .context("no way to reach an API server, which says who may use the gateway")?;
    config.connect_timeout = Some(Duration::from_secs(2));
    let client = Client::try_from(config)?;
    Box::pin(run_with(args, client, stop, |_| {})).await
}

/// As [`run`], with this way to the API server. `listening` hears where.
///
/// # Errors
/// If something that it needs isn't there.
pub async fn run_with(
    args: Args,
    client: Client,
    stop: CancellationToken,
    listening: impl FnOnce(Addresses),
) -> anyhow::Result<()> {
    let metrics = Arc::new(Metrics::default());
    let live = live::Live::follow(live::Places {
        config: args.config.clone(),
        tls: args.tls.clone(),
        keys: args.keys.clone(),
        connections: args.ledger_connections,
    })?;
    let tls = tls::follow(tls::Files {
        serving: args.serving.clone(),
        client_ca: args.client_ca.clone(),
    })?;
    let workflow = live.workflow();
    let subject = Subject {
        namespace: workflow.namespace.clone(),
        workflow: workflow.name.clone(),
        audiences: args.audiences.clone(),
    };
    anyhow::ensure!(
        subject.audiences.iter().any(|a| !a.is_empty()),
        "give --audience: tokens for any audience would include those made for others"
    );
    let tokens = Tokens::new(client, subject, metrics.clone());
    let allowed: BTreeSet<String> = args.allow_cn.iter().cloned().collect();
    let (intake, carriers) =
        intake::Intake::start(Arc::new(live.clone()), metrics.clone(), args.in_flight);
    let gateway: Shared = Arc::new(Gateway {
        live,
        authentication: Authentication::new(tokens, allowed),
        limits: limits::Limits::new(limits::Bounds {
            in_flight: args.in_flight,
            bytes: args.bodies_mib << 20,
            rate: args.rate,
            burst: args.burst,
        }),
        intake,
        metrics: metrics.clone(),
        counts: api::read::Counted::default(),
    });

    let bind = async |address: SocketAddr| {
        TcpListener::bind(address)
            .await
            .with_context(|| format!("can't listen at {address}"))
    };
    let (https, http) = (bind(args.https).await?, bind(args.http).await?);
    listening(Addresses {
        https: https.local_addr()?,
        http: http.local_addr()?,
    });
    info!(workflow = %workflow.name, namespace = %workflow.namespace, "taking requests");

    let (phase_tx, phase) = watch::channel(Phase::Serving);
    let (counted_tx, counted) = watch::channel(None);
    // Ends with the process: it outlives the other, so that probes see the end.
    let (_probing, forever) = watch::channel(Phase::Serving);
    let probes = Server {
        listener: http,
        tls: None,
        app: probes::router(probes::View {
            counted,
            phase: phase.clone(),
            metrics: metrics.clone(),
        }),
        bounds: PROBES,
        phase: forever,
        metrics: None,
    };
    let server = Server {
        listener: https,
        tls: Some(tls),
        app: api::router(gateway.clone()),
        bounds: serve::Bounds {
            connections: args.connections,
            age: Duration::from_secs(args.connection_seconds),
        },
        phase,
        metrics: Some(metrics),
    };
    let mut beside = JoinSet::new();
    beside.spawn(probes.run());
    beside.spawn(look(gateway, counted_tx));
    let mut serving = tokio::spawn(server.run());

    tokio::select! {
        () = stop.cancelled() => {}
        _ = &mut serving => anyhow::bail!("the server has ended"),
    }
    info!("leaving: no longer ready");
    phase_tx.send_replace(Phase::Leaving);
    // Until everybody who routes to here has heard of it, what comes is answered.
    sleep(Duration::from_secs(args.leave_seconds)).await;
    phase_tx.send_replace(Phase::Closing);
    if timeout(FINISH, &mut serving).await.is_err() {
        warn!("some requests weren't answered in time; none of them was said to be accepted");
        serving.abort();
    }
    drop(carriers);
    Ok(())
}

/// Counts the backlog now and then, and forgets who hasn't asked for long.
async fn look(gateway: Shared, last: watch::Sender<Option<Arc<Tally>>>) {
    loop {
        let ledger = gateway.live.ledger();
        let began = tokio::time::Instant::now();
        let counted = ledger.counts().await;
        let took = began.elapsed();
        gateway.limits.tidy();
        gateway.authentication.tidy();
        let wait = match counted {
            Ok(counts) => {
                if last.borrow().is_none() {
                    info!("the ledger is reached");
                }
                let of = |state: State| {
                    let n = counts.requests.iter().find(|r| r.state == state);
                    i64::try_from(n.map_or(0, |r| r.count)).unwrap_or(i64::MAX)
                };
                let overdue: u64 = counts.requests.iter().map(|r| r.overdue).sum();
                let slack = counts
                    .nearest_deadline()
                    .map(|at| at.duration_since(counts.at).as_secs_f64());
                gateway.metrics.backlog(
                    &[
                        ("open", of(State::Open)),
                        ("awaiting-approval", of(State::AwaitingApproval)),
                    ],
                    i64::try_from(overdue).unwrap_or(i64::MAX),
                    slack,
                );
                last.send_replace(Some(Arc::new(counts.into())));
                // Gateways that were started together must not count together.
                let jitter = rand::rng().random_range(0.8..1.2);
                COUNT.max(took * COUNT_SHARE).mul_f64(jitter)
            }
            Err(e) => {
                gateway.metrics.ledger_away();
                warn!("{e}");
                if last.borrow().is_some() {
                    COUNT / 2
                } else {
                    TRY
                }
            }
        };
        sleep(wait).await;
    }
}
