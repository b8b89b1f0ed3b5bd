//! Three stores under one policy, in a namespace that has to stay within it, and how all is put back.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use k8s_openapi::api::core::v1::{Node, Pod};
use kube::api::{ListParams, Patch, PatchParams};
use kube::{Api, ResourceExt};
use serde_json::{Value, json};

use super::history::History;
use super::sample::Sample;
use crate::failover::inject::Victim;
use crate::harness::{Harness, PATIENCE, Scope, condition, instances};
use crate::topology::NODES;

/// The policy, the namespace that is labelled with it.
pub const NAME: &str = "bench-residency";
/// The stores.
pub const STORES: [&str; 3] = ["alpha", "beta", "gamma"];
/// Where an instance may be.
pub const PERMITTED: [&str; 2] = ["us-west", "us-east"];
/// The label by which the samples' Regions know their nodes.
pub const REGION: &str = "topology.kubernetes.io/region";
/// How long anything that is measured may take before the run counts as failed.
pub const LIMIT: Duration = Duration::from_secs(60);

/// An instance that runs.
#[derive(Clone, Debug)]
pub struct Copy {
    /// Its store.
    pub store: String,
    /// Its name.
    pub name: String,
    /// Its node.
    pub node: String,
    /// It is the primary.
    pub primary: bool,
}

/// Where the bench takes place.
pub struct Ground {
    /// The user.
    pub harness: Harness,
    /// The namespace.
    pub scope: Scope,
    /// What was seen.
    pub history: History,
}

impl Ground {
    /// Makes what isn't there, and waits until all is well.
    ///
    /// # Errors
    /// If it doesn't come to that.
    pub async fn make(harness: Harness) -> Result<Self> {
        permit(&harness, &PERMITTED).await?;
        relabel_all(&harness).await?;
        let scope = harness.keep_namespace(NAME).await?;
        let labelled = json!({
            "apiVersion": "v1", "kind": "Namespace",
            "metadata": { "name": NAME, "labels": {
                "pod-security.kubernetes.io/enforce": "restricted", "domicile.dev/residency": NAME,
            } },
        });
        scope.apply(&labelled).await?;
        for store in STORES {
            scope.apply(&manifest(&scope, store)).await?;
        }
        let history = History::begin(&scope);
        let ground = Self {
            harness,
            scope,
            history,
        };
        ground.whole().await?;
        Ok(ground)
    }

    /// Waits until every store is as specified, and every copy inside.
    ///
    /// # Errors
    /// If one isn't in time.
    pub async fn whole(&self) -> Result<()> {
        let each = STORES.map(|store| async move {
            let well = |s: &kube::api::DynamicObject| {
                let current =
                    s.data["status"]["observedGeneration"].as_i64() == s.metadata.generation;
                let good = ["Ready", "Resident", "Available"]
                    .iter()
                    .all(|kind| condition(s, kind).is_some_and(|c| c.0 == "True"));
                current && good && instances(s).is_ok_and(|all| all.len() == 3)
            };
            self.scope.wait(store, PATIENCE * 3, well).await
        });
        futures::future::try_join_all(each).await?;
        Ok(())
    }

    /// Every copy there is.
    ///
    /// # Errors
    /// If they can't be listed.
    pub async fn copies(&self) -> Result<Vec<Copy>> {
        let mut all = Vec::new();
        for store in STORES {
            let found = self.scope.stores().get(store).await?;
            let primary = found.data["status"]["primary"].as_str().unwrap_or_default();
            let ours = ListParams::default().labels(&format!("domicile.dev/store={store}"));
            for pod in self.scope.api::<Pod>().list(&ours).await? {
                let node = pod.spec.as_ref().and_then(|s| s.node_name.clone());
                all.push(Copy {
                    store: store.to_owned(),
                    name: pod.name_any(),
                    node: node.with_context(|| format!("{} is on no node", pod.name_any()))?,
                    primary: pod.name_any() == primary,
                });
            }
        }
        Ok(all)
    }

    /// Sets labels of a node; null takes one off.
    ///
    /// # Errors
    /// If the API server refuses.
    pub async fn label(&self, node: &str, labels: &Value) -> Result<()> {
        label(&self.harness, node, labels).await
    }

    /// How long after `begin` it was found that a pod is outside, by the condition of the object whose pod it is, and
    /// how long until nothing of a program ran in it any more.
    ///
    /// # Errors
    /// If it isn't found, or goes on.
    pub async fn outside(
        &self,
        owner: &str,
        victim: &Victim,
        program: &str,
        begin: Instant,
    ) -> Result<Sample> {
        let said = format!("{} is on node {}", victim.pod, victim.node);
        let found = self.history.first(owner, begin, LIMIT, |s| {
            s.resident.0 == "False" && s.resident.2.contains(&said)
        });
        let (found, stopped) = tokio::join!(found, stopped(victim, program));
        let seconds = |at: Instant| at.duration_since(begin).as_secs_f64();
        let fenced = stopped.map(seconds)?;
        // It may have been gone before there was anything to say.
        let found = found
            .map(seconds)
            .with_context(|| format!("{said}: stopped after {fenced:.2} s, and never said"))?;
        Ok(Sample::judged(found, fenced, said))
    }

    /// Puts policy, Regions and labels back.
    ///
    /// # Errors
    /// If the API server refuses.
    pub async fn heal(&self) -> Result<()> {
        permit(&self.harness, &PERMITTED).await?;
        region(&self.harness, "eu-central", "eu-central-1").await?;
        relabel_all(&self.harness).await
    }
}

/// When nothing of a program ran any more in a pod.
async fn stopped(victim: &Victim, program: &str) -> Result<Instant> {
    let begin = Instant::now();
    while victim.runs(program)? {
        ensure!(
            begin.elapsed() < LIMIT,
            "{} runs after {LIMIT:?}",
            victim.pod
        );
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    Ok(Instant::now())
}

/// A store of two instances in the west and one in the east.
#[must_use]
pub fn manifest(scope: &Scope, store: &str) -> Value {
    scope.manifest(store, &[("us-west", 2), ("us-east", 1)], |s| {
        s["spec"]["residencyPolicyRef"]["name"] = json!(NAME);
    })
}

/// Has the policy permit instances in these regions.
///
/// # Errors
/// If the API server refuses.
pub async fn permit(harness: &Harness, regions: &[&str]) -> Result<()> {
    let policy = json!({
        "apiVersion": "domicile.dev/v1alpha1", "kind": "ResidencyPolicy",
        "metadata": { "name": NAME },
        "spec": { "basis": "Policy", "citation": "Bench", "permits": [
            { "data": "Primary", "regions": regions },
            { "data": "Standby", "regions": regions },
            { "data": "Gateway", "regions": regions },
            { "data": "Worker", "regions": regions },
        ] },
    });
    harness.bed.apply(&policy.to_string()).await.map(drop)
}

/// Has a Region know its nodes by this label.
///
/// # Errors
/// If the API server refuses.
pub async fn region(harness: &Harness, name: &str, label: &str) -> Result<()> {
    let patch = json!({ "spec": { "nodes": { "labels": { REGION: label } } } }).to_string();
    let kubectl = ["patch", "region", name, "--type=merge", "-p", &patch];
    harness.bed.kubectl(&kubectl).await.map(drop)
}

async fn label(harness: &Harness, node: &str, labels: &Value) -> Result<()> {
    let nodes: Api<Node> = Api::all(harness.client());
    let patch = Patch::Merge(json!({ "metadata": { "labels": labels } }));
    nodes.patch(node, &PatchParams::default(), &patch).await?;
    Ok(())
}

async fn relabel_all(harness: &Harness) -> Result<()> {
    for node in NODES {
        label(harness, node.name, &json!({ REGION: node.region.label })).await?;
    }
    Ok(())
}
