//! The operator: `domicile operator`.
//!
//! Owns the wiring: client, caches, leader election, health and the controllers, one folder per kind.
//! Never decides a failover, never holds personal data, and is never needed for a store to keep serving.

pub mod context;
pub mod geography;
pub mod hands;
mod health;
pub mod law;
pub mod metrics;
pub mod objects;
pub mod rights;
pub mod store;
mod unreadable;

use anyhow::Context as _;
use kube::runtime::events::{Recorder, Reporter};
use kube::{Client, Config};
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;
use tokio_util::sync::CancellationToken;

use context::{Context, Metrics, Triggers};

/// Settings of the operator.
#[derive(Clone, Debug, clap::Args)]
pub struct Args {
    /// The operator's own image: store pods take the instance manager from it.
    #[arg(long, env = "DOMICILE_IMAGE")]
    pub image: String,
    /// The operator's own namespace: the leader's lease is there, and the key that signs attestations.
    #[arg(
        long,
        env = "DOMICILE_LEASE_NAMESPACE",
        default_value = "domicile-system"
    )]
    pub lease_namespace: String,
    /// This process among those that may lead: the pod's name.
    #[arg(long, env = "DOMICILE_IDENTITY")]
    pub identity: Option<String>,
    /// Address of probes and metrics (plain HTTP, nothing secret).
    #[arg(long, env = "DOMICILE_HTTP", default_value = "0.0.0.0:8008")]
    pub http: SocketAddr,
}

/// Name of the leader's lease.
const LEASE: &str = "domicile-operator";
/// A leader that can't renew for this long has stopped (at the renew deadline, earlier) before another starts.
const LEASE_DURATION: Duration = Duration::from_secs(15);
const RENEW_DEADLINE: Duration = Duration::from_secs(10);
const RETRY_PERIOD: Duration = Duration::from_secs(3);

/// Runs until `stop`.
///
/// # Errors
/// If the API server can't be reached at the start, or leadership is lost: the process then ends, and its
/// successor begins with a clean slate.
pub async fn run(args: Args, stop: CancellationToken) -> anyhow::Result<()> {
    let mut config = Config::infer()
        .await
        .context("no way to reach an API server")?;
    config.connect_timeout = Some(Duration::from_secs(5));
    let client = Client::try_from(config)?;
    let metrics = Metrics::default();
    let health = health::Health::new(metrics.clone());
    let server = health::serve(args.http, health.clone()).await?;

    let (changed, counted) = (Triggers::default(), Triggers::default());
    let identity = args
        .identity
        .clone()
        .or_else(|| std::env::var("HOSTNAME").ok())
        .context("give --identity")?;
    let service_host = std::env::var("KUBERNETES_SERVICE_HOST").unwrap_or_default();
    let work = async {
        let caches = geography::start(&client, &changed, &counted).await?;
        let references = Arc::new(geography::References {
            stores: caches.stores,
            workflows: caches.workflows,
            namespaces: caches.namespaces,
            admission: caches.admission,
            bindings: caches.bindings,
        });
        let reporter = Reporter {
            controller: hands::REPORTER.into(),
            instance: Some(identity.clone()),
        };
        let ctx = Arc::new(Context {
            recorder: Recorder::new(client.clone(), reporter),
            client: client.clone(),
            regions: caches.regions,
            policies: caches.policies,
            nodes: caches.nodes,
            settings: store::build::Settings {
                image: args.image.clone(),
                ipv6: service_host.contains(':'),
            },
            metrics: metrics.clone(),
            passes: tokio::sync::Semaphore::new(store::CONCURRENCY),
            identity: identity.clone(),
            told: std::sync::Mutex::default(),
            attestor: store::attest::Attestor::new(&args.lease_namespace),
            backlogs: rights::backlog::Backlogs::default(),
        });
        health.ready();
        tracing::info!(%identity, "waiting for leadership");
        let election = k8s_controller::LeaderElection::new(
            client.clone(),
            &args.lease_namespace,
            LEASE,
            &identity,
        )
        .with_lease_duration(LEASE_DURATION)
        .with_renew_deadline(RENEW_DEADLINE)
        .with_retry_period(RETRY_PERIOD);
        let lead = async {
            tracing::info!(%identity, "leading");
            metrics.leads();
            tokio::join!(
                geography::run(ctx.clone(), references.clone(), counted.clone()),
                store::run(ctx.clone(), references.clone(), changed.clone()),
                rights::run(ctx.clone(), references.clone(), changed.clone()),
            );
        };
        tokio::select! {
            led = election.with_lease(lead) => match led {
                Some(_) => anyhow::bail!("the controllers ended"),
                None => anyhow::bail!("leadership lost: another operator may lead now"),
            },
            () = stop.cancelled() => {
                // The lease is handed on, so that a rolling update doesn't wait for it to expire.
                election.release().await;
                Ok(())
            }
        }
    };
    tokio::select! {
        done = work => done,
        served = server => served.context("health server"),
    }
}
