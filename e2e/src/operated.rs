//! An API server with fake nodes, a provisioner of volumes and, once it is started, an operator.
//!
//! Owns the operator's process. Never installs anything but the kinds, and leaves nothing running behind.

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use anyhow::{Context, Result};
use kube::Client;

use crate::api::ApiServer;

/// The repository.
#[must_use]
pub fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..")
}

/// See the module.
#[derive(Debug)]
pub struct Operated {
    server: ApiServer,
    operator: Option<Child>,
    provisioner: tokio::task::JoinHandle<Result<()>>,
}

impl Drop for Operated {
    fn drop(&mut self) {
        self.provisioner.abort();
        drop(self.kill_operator());
    }
}

impl Operated {
    /// Starts the API server and installs the kinds; no operator yet.
    ///
    /// # Errors
    /// If a part doesn't start, or a kind isn't accepted.
    pub async fn new() -> Result<Self> {
        let server = ApiServer::start().await?;
        let layout = server.layout().clone();
        let new = Self {
            server,
            operator: None,
            provisioner: tokio::spawn(async move { crate::provisioner::serve(&layout).await }),
        };
        new.kubectl(&["apply", "--server-side", "-f", "crds"])
            .await?;
        new.kubectl(&[
            "wait",
            "--for=condition=Established",
            "--timeout=60s",
            "-f",
            "crds",
        ])
        .await?;
        Ok(new)
    }

    /// The API server.
    #[must_use]
    pub fn server(&self) -> &ApiServer {
        &self.server
    }

    /// The administrator's client.
    #[must_use]
    pub fn client(&self) -> Client {
        self.server.client()
    }

    /// Starts the operator that `cargo build` has made. Its log goes on where the last one's ended.
    ///
    /// # Errors
    /// If there is none.
    pub fn start_operator(&mut self, port: u16) -> Result<()> {
        let program = std::env::current_exe()?
            .with_file_name("")
            .join("../domicile");
        let log = std::fs::File::options()
            .create(true)
            .append(true)
            .open(self.server.layout().logs().join("operator.log"))?;
        let operator = Command::new(&program)
            .args(["operator", "--image", "domicile:test", "--identity", "one"])
            .args(["--lease-namespace", "default"])
            .args(["--http", &format!("127.0.0.1:{port}")])
            .env("KUBECONFIG", self.server.kubeconfig())
            .stderr(log)
            .stdout(Stdio::null())
            .spawn()
            .with_context(|| format!("{}: build it first (cargo build)", program.display()))?;
        self.operator = Some(operator);
        Ok(())
    }

    /// Kills it, if there is one.
    ///
    /// # Errors
    /// As the kernel's.
    pub fn kill_operator(&mut self) -> Result<()> {
        if let Some(mut operator) = self.operator.take() {
            operator.kill()?;
            operator.wait()?;
        }
        Ok(())
    }

    fn command(&self) -> Result<[String; 3]> {
        Ok([
            crate::tools::KUBERNETES
                .path("kubectl")?
                .display()
                .to_string(),
            "--kubeconfig".to_owned(),
            self.server.kubeconfig().display().to_string(),
        ])
    }

    /// Runs kubectl; what it says is the answer. Paths are the repository's.
    ///
    /// # Errors
    /// If it fails.
    pub async fn kubectl(&self, arguments: &[&str]) -> Result<String> {
        let mut command = self.command()?.to_vec();
        for argument in arguments {
            let path = root().join(argument);
            let is_path = argument.contains('/') || *argument == "crds";
            command.push(if is_path && path.exists() {
                path.display().to_string()
            } else {
                (*argument).to_owned()
            });
        }
        crate::run::run(&command).await
    }

    /// Applies a manifest.
    ///
    /// # Errors
    /// If it isn't accepted.
    pub async fn apply(&self, manifest: &str) -> Result<String> {
        let mut command = self.command()?.to_vec();
        command.extend(["apply", "-f", "-"].map(str::to_owned));
        crate::run::run_with(&command, Some(manifest)).await
    }
}
