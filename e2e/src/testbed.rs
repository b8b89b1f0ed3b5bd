//! A running test bed, for tests and for the command line: its API, and the ways to break it.
//!
//! Owns nothing but a client: several of these may be used at once, also from several processes,
//! as long as each heals what it has broken.

use crate::faults::{Cut, Faults};
use crate::layout::{Layout, cache};
use crate::run::{run, run_with};
use crate::tools::{self, HELM, KUBERNETES};
use crate::topology::{NODES, Node, Region};
use crate::{cgroups, cluster, control, images};
use anyhow::{Context, Result, ensure};
use k8s_openapi::api::core::v1::Pod;
use kube::{Api, Client, ResourceExt};
use std::path::{Path, PathBuf};

/// A running test bed.
#[derive(Clone)]
pub struct TestBed {
    layout: Layout,
    client: Client,
}

impl std::fmt::Debug for TestBed {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("TestBed")
            .field("layout", &self.layout)
            .finish_non_exhaustive()
    }
}

impl TestBed {
    /// The one that runs on this machine.
    ///
    /// # Errors
    /// If none runs.
    pub async fn attach() -> Result<Self> {
        let layout = Layout::system();
        ensure!(cluster::is_up(&layout), "no test bed runs here: testbed up");
        let client = control::client(&layout.kubeconfig()).await?;
        Ok(Self { layout, client })
    }

    /// The one that runs on this machine; it's started if there is none. It stays when this value
    /// is dropped.
    ///
    /// # Errors
    /// If it can't be started.
    pub async fn start() -> Result<Self> {
        let layout = Layout::system();
        if !cluster::is_up(&layout) {
            cluster::up(&layout).await?;
        }
        Self::attach().await
    }

    /// The administrator's client.
    #[must_use]
    pub fn client(&self) -> Client {
        self.client.clone()
    }

    /// The administrator's kubeconfig.
    #[must_use]
    pub fn kubeconfig(&self) -> PathBuf {
        self.layout.kubeconfig()
    }

    /// Where its files are.
    #[must_use]
    pub fn layout(&self) -> &Layout {
        &self.layout
    }

    /// The faults in force.
    ///
    /// # Errors
    /// If they can't be read.
    pub fn faults(&self) -> Result<Faults> {
        Faults::read(&self.layout)
    }

    async fn change(&self, change: impl FnOnce(&mut Faults) -> Result<()>) -> Result<()> {
        // Two at once would each undo what the other did.
        let _lock = tools::lock(
            &cache()?.join("faults.lock"),
            "another change of the faults",
        )
        .await?;
        let mut faults = self.faults()?;
        change(&mut faults)?;
        faults.apply(&self.layout).await
    }

    /// Silently drops what goes towards a node, comes from it, or both: its own and its pods'.
    ///
    /// # Errors
    /// If there's no such node, or the packet filter refuses.
    pub async fn cut(&self, node: &str, cut: Cut) -> Result<()> {
        let node = find_node(node)?;
        self.change(|f| {
            f.nodes.insert(node.name.to_owned(), cut);
            Ok(())
        })
        .await
    }

    /// Ends a node's cut.
    ///
    /// # Errors
    /// As [`Self::cut`].
    pub async fn heal(&self, node: &str) -> Result<()> {
        let node = find_node(node)?;
        self.change(|f| {
            f.nodes.remove(node.name);
            Ok(())
        })
        .await
    }

    /// Silently drops what crosses a region's border. The control plane is outside every region.
    ///
    /// # Errors
    /// If there's no such region, or the packet filter refuses.
    pub async fn cut_region(&self, region: &str) -> Result<()> {
        let region = find_region(region)?;
        self.change(|f| {
            f.regions.insert(region.name.to_owned());
            Ok(())
        })
        .await
    }

    /// Ends a region's cut.
    ///
    /// # Errors
    /// As [`Self::cut_region`].
    pub async fn heal_region(&self, region: &str) -> Result<()> {
        let region = find_region(region)?;
        self.change(|f| {
            f.regions.remove(region.name);
            Ok(())
        })
        .await
    }

    /// Holds packets between two regions back, each way, this many milliseconds; zero ends it.
    ///
    /// # Errors
    /// If there's no such region, or the relay doesn't start.
    pub async fn latency(&self, a: &str, b: &str, milliseconds: u64) -> Result<()> {
        let (a, b) = (find_region(a)?, find_region(b)?);
        self.change(|f| f.set_latency(a, b, milliseconds)).await
    }

    /// Ends every cut, and lets every frozen pod go on; latencies stay.
    ///
    /// # Errors
    /// As [`Self::heal_all`].
    pub async fn mend(&self) -> Result<()> {
        self.change(|f| {
            f.nodes.clear();
            f.regions.clear();
            Ok(())
        })
        .await?;
        for uid in cgroups::frozen_pods()? {
            cgroups::freeze_pod(&uid, false).await?;
        }
        Ok(())
    }

    /// Ends every cut and every latency, and lets every frozen pod go on.
    ///
    /// # Errors
    /// If the packet filter or a cgroup refuses.
    pub async fn heal_all(&self) -> Result<()> {
        self.change(|f| {
            *f = Faults::default();
            Ok(())
        })
        .await?;
        for uid in cgroups::frozen_pods()? {
            cgroups::freeze_pod(&uid, false).await?;
        }
        Ok(())
    }

    /// Stops every process of a pod where it stands. Comes back once all have stopped.
    ///
    /// # Errors
    /// If the pod doesn't run here.
    pub async fn freeze(&self, namespace: &str, pod: &str) -> Result<()> {
        cgroups::freeze_pod(&self.uid(namespace, pod).await?, true).await
    }

    /// Lets a frozen pod go on.
    ///
    /// # Errors
    /// If the pod doesn't run here.
    pub async fn thaw(&self, namespace: &str, pod: &str) -> Result<()> {
        cgroups::freeze_pod(&self.uid(namespace, pod).await?, false).await
    }

    async fn uid(&self, namespace: &str, pod: &str) -> Result<String> {
        let api: Api<Pod> = Api::namespaced(self.client(), namespace);
        let found = api
            .get(pod)
            .await
            .with_context(|| format!("the pod {namespace}/{pod}"))?;
        found
            .uid()
            .with_context(|| format!("the pod {namespace}/{pod} has no uid"))
    }

    /// Imports an image archive on every node that hasn't got that very image. How many needed it
    /// is the answer.
    ///
    /// # Errors
    /// If the archive can't be read, or a containerd refuses.
    pub async fn load(&self, archive: &Path) -> Result<usize> {
        images::load(&self.layout, archive).await
    }

    /// Runs kubectl as the administrator; what it prints is the answer.
    ///
    /// # Errors
    /// If kubectl fails: with what it said.
    pub async fn kubectl(&self, arguments: &[&str]) -> Result<String> {
        self.tool(&KUBERNETES, "kubectl", arguments, None).await
    }

    /// Applies manifests.
    ///
    /// # Errors
    /// If the API server refuses one.
    pub async fn apply(&self, manifests: &str) -> Result<String> {
        self.tool(
            &KUBERNETES,
            "kubectl",
            &["apply", "--server-side", "-f", "-"],
            Some(manifests),
        )
        .await
    }

    /// Deletes what manifests describe, as far as it's there.
    ///
    /// # Errors
    /// If the API server refuses.
    pub async fn delete(&self, manifests: &str) -> Result<()> {
        let arguments = ["delete", "--ignore-not-found", "-f", "-"];
        self.tool(&KUBERNETES, "kubectl", &arguments, Some(manifests))
            .await
            .map(drop)
    }

    /// Runs a command in a pod's container; what it prints is the answer.
    ///
    /// # Errors
    /// If the command fails.
    pub async fn exec(&self, namespace: &str, pod: &str, command: &[&str]) -> Result<String> {
        self.kubectl(&[&["exec", "-n", namespace, pod, "--"], command].concat())
            .await
    }

    /// Runs Helm as the administrator; what it prints is the answer.
    ///
    /// # Errors
    /// If Helm fails: with what it said.
    pub async fn helm(&self, arguments: &[&str]) -> Result<String> {
        self.tool(&HELM, "helm", arguments, None).await
    }

    async fn tool(
        &self,
        set: &tools::Tool,
        program: &str,
        arguments: &[&str],
        input: Option<&str>,
    ) -> Result<String> {
        let program = set.path(program)?.display().to_string();
        let kubeconfig = self.kubeconfig().display().to_string();
        let command = [&[program.as_str(), "--kubeconfig", &kubeconfig], arguments].concat();
        if input.is_some() {
            run_with(&command, input).await
        } else {
            run(&command).await
        }
    }
}

fn find_node(name: &str) -> Result<&'static Node> {
    Node::find(name).with_context(|| {
        format!(
            "no node {name}: there are {}",
            NODES.map(|n| n.name).join(", ")
        )
    })
}

fn find_region(name: &str) -> Result<Region> {
    let known = || crate::topology::REGIONS.map(|r| r.name).join(", ");
    Region::find(name).with_context(|| format!("no region {name}: there are {}", known()))
}
