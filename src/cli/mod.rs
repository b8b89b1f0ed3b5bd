//! `kubectl domicile …`: what people ask of a store from their terminal.
//!
//! Owns the questions, and how the answers are laid out. Each answer is made by a pure function from what
//! was read, so that it can be tested without a cluster.
//! Reading needs no more rights than reading the store and its pods; asking needs to change the store. Says which
//! are missing if they are.

pub mod act;
pub mod attest;
pub mod explain;
pub mod explain_policy;
pub mod requests;
pub mod rotate;
pub mod status;
pub mod whatif;

use kube::Client;
use kube::config::{KubeConfigOptions, Kubeconfig};

/// How to reach the cluster: as kubectl does.
#[derive(Clone, Debug, Default, clap::Args)]
pub struct ClusterArgs {
    /// Namespace of the object; default: the context's.
    #[arg(short, long)]
    pub namespace: Option<String>,
    /// Context of the kubeconfig; default: the current one.
    #[arg(long)]
    pub context: Option<String>,
    /// Path of the kubeconfig; default: $KUBECONFIG, then ~/.kube/config, then the pod's own account.
    #[arg(long)]
    pub kubeconfig: Option<std::path::PathBuf>,
}

impl ClusterArgs {
    /// A client and the namespace to look in.
    ///
    /// # Errors
    /// If the kubeconfig can't be read or names no reachable cluster.
    pub async fn connect(&self) -> anyhow::Result<(Client, String)> {
        let options = KubeConfigOptions {
            context: self.context.clone(),
            ..KubeConfigOptions::default()
        };
        let mut config = match &self.kubeconfig {
            Some(path) => {
                kube::Config::from_custom_kubeconfig(Kubeconfig::read_from(path)?, &options).await?
            }
            None if self.context.is_some() => kube::Config::from_kubeconfig(&options).await?,
            None => kube::Config::infer().await?,
        };
        // A person waits: an answer or an error, not minutes of silent retries.
        config.default_retry = false;
        config.connect_timeout = Some(std::time::Duration::from_secs(5));
        config.read_timeout = Some(std::time::Duration::from_secs(10));
        let namespace = self
            .namespace
            .clone()
            .unwrap_or_else(|| config.default_namespace.clone());
        Ok((Client::try_from(config)?, namespace))
    }
}
