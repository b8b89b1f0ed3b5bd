//! A user with kubectl: makes stores on the test bed, waits for what their conditions say, and runs SQL as
//! an application would.
//!
//! Sees the product only from outside: no type of its own crate is used here. Never sleeps where a watch can
//! tell.

use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use futures::TryStreamExt;
use k8s_openapi::api::core::v1::{Namespace, Pod};
use kube::api::{DeleteParams, DynamicObject, ListParams, Patch, PatchParams, PropagationPolicy};
use kube::core::{ApiResource, GroupVersionKind};
use kube::runtime::{WatchStreamExt, watcher};
use kube::{Api, Client, ResourceExt};
use serde_json::{Value, json};

use crate::control::audit_log;
use crate::testbed::TestBed;

/// The policy under which the tests' stores live: primaries in us-west, standbys in us-west and us-east.
pub const POLICY: &str = "e2e-records";
/// How long anything may take that has no bound of its own.
pub const PATIENCE: Duration = Duration::from_secs(180);

/// A user of the test bed.
#[derive(Clone, Debug)]
pub struct Harness {
    /// The test bed.
    pub bed: TestBed,
}

impl Harness {
    /// Attaches to the running test bed and makes sure that the tests' policy is there.
    ///
    /// # Errors
    /// If no test bed runs, or the product isn't installed on it.
    pub async fn attach() -> Result<Self> {
        let harness = Self {
            bed: TestBed::attach().await?,
        };
        harness
            .bed
            .apply(
                &json!({
                    "apiVersion": "domicile.dev/v1alpha1", "kind": "ResidencyPolicy",
                    "metadata": { "name": POLICY },
                    "spec": { "basis": "Policy", "citation": "End-to-end tests", "permits": [
                        { "data": "Primary", "regions": ["us-west"] },
                        { "data": "Standby", "regions": ["us-west", "us-east"] },
                        { "data": "Worker", "regions": ["us-west", "us-east"] },
                        { "data": "Gateway", "regions": ["us-west", "us-east"] },
                    ] },
                })
                .to_string(),
            )
            .await
            .context("is the product installed on the test bed?")?;
        Ok(harness)
    }

    /// The administrator's client.
    #[must_use]
    pub fn client(&self) -> Client {
        self.bed.client()
    }

    /// A fresh namespace under the `restricted` Pod Security Standard; a leftover of this name goes first.
    ///
    /// # Errors
    /// If the leftover doesn't go, or the API server refuses.
    pub async fn namespace(&self, name: &str) -> Result<Scope> {
        self.scope(name).remove().await?;
        self.keep_namespace(name).await
    }

    /// A namespace as it is.
    #[must_use]
    pub fn scope(&self, name: &str) -> Scope {
        Scope {
            harness: self.clone(),
            namespace: name.to_owned(),
        }
    }

    /// A namespace under the `restricted` Pod Security Standard, with what is in it already.
    ///
    /// # Errors
    /// If the API server refuses.
    pub async fn keep_namespace(&self, name: &str) -> Result<Scope> {
        let namespace = json!({
            "apiVersion": "v1", "kind": "Namespace",
            "metadata": { "name": name, "labels": { "pod-security.kubernetes.io/enforce": "restricted" } },
        });
        self.bed.apply(&namespace.to_string()).await?;
        Ok(self.scope(name))
    }
}

/// A write that the API server has written down.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Write {
    /// By whom.
    pub user: String,
    /// create, update, patch, delete …
    pub verb: String,
    /// Of which kind, in the plural.
    pub resource: String,
    /// Of which object.
    pub object: String,
}

impl Harness {
    /// The writes that the product (the operator's and the instances' accounts) has made since `begin`, read
    /// from the API server's audit log: also those that changed nothing.
    ///
    /// # Errors
    /// If the log can't be read.
    pub fn writes(&self, begin: jiff::Timestamp) -> Result<Vec<Write>> {
        let path = audit_log(self.bed.layout());
        let log = std::fs::read_to_string(&path)
            .with_context(|| format!("reading {}", path.display()))?;
        let mut writes = Vec::new();
        // The last line may still be being written.
        for event in log
            .lines()
            .filter_map(|line| serde_json::from_str::<Value>(line).ok())
        {
            let text = |pointer: &str| {
                event
                    .pointer(pointer)
                    .and_then(Value::as_str)
                    .unwrap_or_default()
                    .to_owned()
            };
            let user = text("/user/username");
            let ours = user.starts_with("system:serviceaccount:domicile-system:")
                || (user.starts_with("system:serviceaccount:") && user.ends_with("-instance"));
            let at: jiff::Timestamp = text("/requestReceivedTimestamp").parse()?;
            if ours && at >= begin {
                let (resource, object) = (text("/objectRef/resource"), text("/objectRef/name"));
                writes.push(Write {
                    user,
                    verb: text("/verb"),
                    resource,
                    object,
                });
            }
        }
        Ok(writes)
    }
}

/// What happens in one namespace.
#[derive(Clone, Debug)]
pub struct Scope {
    harness: Harness,
    /// Its name.
    pub namespace: String,
}

fn stores() -> ApiResource {
    ApiResource::from_gvk(&GroupVersionKind::gvk(
        "domicile.dev",
        "v1alpha1",
        "PrivacyDataStore",
    ))
}

/// A condition of an object, as (status, reason, message).
#[must_use]
pub fn condition(object: &DynamicObject, kind: &str) -> Option<(String, String, String)> {
    let conditions = object.data["status"]["conditions"].as_array()?;
    let found = conditions.iter().find(|c| c["type"] == kind)?;
    let text = |key: &str| found[key].as_str().unwrap_or_default().to_owned();
    Some((text("status"), text("reason"), text("message")))
}

impl Scope {
    /// Objects of a kind in this namespace.
    #[must_use]
    pub fn api<K>(&self) -> Api<K>
    where
        K: kube::Resource<Scope = kube::core::NamespaceResourceScope>,
        K::DynamicType: Default,
    {
        Api::namespaced(self.harness.client(), &self.namespace)
    }

    /// The user whose namespace it is.
    #[must_use]
    pub fn harness(&self) -> &Harness {
        &self.harness
    }

    /// The stores of this namespace.
    #[must_use]
    pub fn stores(&self) -> Api<DynamicObject> {
        Api::namespaced_with(self.harness.client(), &self.namespace, &stores())
    }

    /// A store's manifest: small, quick, its volumes deleted with it. `change` has the last word.
    #[must_use]
    pub fn manifest(
        &self,
        name: &str,
        placement: &[(&str, i32)],
        change: impl FnOnce(&mut Value),
    ) -> Value {
        let placement: Vec<Value> = placement
            .iter()
            .map(|(r, n)| json!({ "region": r, "instances": n }))
            .collect();
        let mut store = json!({
            "apiVersion": "domicile.dev/v1alpha1", "kind": "PrivacyDataStore",
            "metadata": { "name": name, "namespace": self.namespace },
            "spec": {
                "residencyPolicyRef": { "name": POLICY }, "placement": placement,
                "postgres": { "parameters": { "shared_buffers": "32MB" } },
                "storage": { "size": "1Gi" }, "deletionPolicy": "Delete",
                "resources": { "requests": { "cpu": "10m", "memory": "64Mi" } },
            },
        });
        change(&mut store);
        store
    }

    /// Applies a manifest.
    ///
    /// # Errors
    /// If the API server refuses.
    pub async fn apply(&self, manifest: &Value) -> Result<()> {
        self.harness
            .bed
            .apply(&manifest.to_string())
            .await
            .map(drop)
    }

    /// Waits until a store is as `wanted` sees it; the error says what it is instead.
    ///
    /// # Errors
    /// If that doesn't come about in time.
    pub async fn wait(
        &self,
        name: &str,
        patience: Duration,
        wanted: impl Fn(&DynamicObject) -> bool,
    ) -> Result<DynamicObject> {
        let mut last = None;
        let found = tokio::time::timeout(
            patience,
            wait_for(self.stores(), name, |store| {
                last = Some(store.clone());
                wanted(store)
            }),
        )
        .await;
        match found {
            Ok(found) => found,
            Err(_) => bail!(
                "store {}/{name} isn't as expected after {patience:?}: {}",
                self.namespace,
                last.map_or_else(
                    || "it doesn't exist".to_owned(),
                    |s| s.data["status"].to_string()
                )
            ),
        }
    }

    /// Waits until a condition of a store has this status and, unless empty, this reason.
    ///
    /// # Errors
    /// If it doesn't come to that in time.
    pub async fn wait_condition(
        &self,
        store: &str,
        kind: &str,
        status: &str,
        reason: &str,
    ) -> Result<DynamicObject> {
        self.wait(store, PATIENCE, |object| {
            let current =
                object.data["status"]["observedGeneration"].as_i64() == object.metadata.generation;
            current
                && condition(object, kind)
                    .is_some_and(|(s, r, _)| s == status && (reason.is_empty() || r == reason))
        })
        .await
    }

    /// Waits until a store is Ready, as `kubectl wait` does.
    ///
    /// # Errors
    /// If it isn't in time.
    pub async fn wait_ready(&self, store: &str) -> Result<DynamicObject> {
        self.wait_condition(store, "Ready", "True", "").await
    }

    /// Runs a command in a pod of this namespace; what it prints is the answer.
    ///
    /// # Errors
    /// If the command fails.
    pub async fn exec(&self, pod: &str, command: &[&str]) -> Result<String> {
        self.harness.bed.exec(&self.namespace, pod, command).await
    }

    /// The store's primary, as its status names it.
    ///
    /// # Errors
    /// If it names none.
    pub async fn primary(&self, store: &str) -> Result<String> {
        let found = self.stores().get(store).await?;
        let primary = found.data["status"]["primary"].as_str();
        Ok(primary.context("no primary")?.to_owned())
    }

    /// SQL as the superuser on one instance, over its Unix socket.
    ///
    /// # Errors
    /// If psql fails.
    pub async fn sql(&self, instance: &str, database: &str, sql: &str) -> Result<String> {
        let psql = [
            "psql",
            "-h",
            "/run/domicile",
            "-U",
            "postgres",
            "-d",
            database,
            "-XAtqv",
            "ON_ERROR_STOP=1",
            "-c",
            sql,
        ];
        Ok(self
            .harness
            .bed
            .exec(&self.namespace, instance, &psql)
            .await?
            .trim()
            .to_owned())
    }

    /// A pod in `region` with a store's application Secret mounted where its URI expects it.
    ///
    /// # Errors
    /// If it doesn't start in time.
    pub async fn client(&self, name: &str, region: &str, store: &str) -> Result<()> {
        let pod = json!({
            "apiVersion": "v1", "kind": "Pod", "metadata": { "name": name, "namespace": self.namespace },
            "spec": {
                "nodeSelector": { "topology.kubernetes.io/region": region },
                "terminationGracePeriodSeconds": 0,
                "securityContext": { "runAsNonRoot": true, "runAsUser": 10002, "seccompProfile": { "type": "RuntimeDefault" } },
                "containers": [{
                    "name": "psql", "image": "postgres:17", "imagePullPolicy": "IfNotPresent", "command": ["sleep", "infinity"],
                    "env": [{ "name": "URI", "valueFrom": { "secretKeyRef": { "name": format!("{store}-app"), "key": "uri" } } }],
                    "securityContext": { "allowPrivilegeEscalation": false, "capabilities": { "drop": ["ALL"] } },
                    "volumeMounts": [{ "name": "app", "mountPath": format!("/etc/domicile/{store}"), "readOnly": true }],
                }],
                "volumes": [{ "name": "app", "secret": { "secretName": format!("{store}-app") } }],
            },
        });
        self.apply(&pod).await?;
        let running = wait_for(self.api::<Pod>(), name, |pod| {
            pod.status.as_ref().and_then(|s| s.phase.as_deref()) == Some("Running")
        });
        tokio::time::timeout(PATIENCE, running)
            .await
            .with_context(|| format!("the client pod {name} doesn't start"))??;
        Ok(())
    }

    /// SQL through the application Secret's URI, from a client pod.
    ///
    /// # Errors
    /// If psql fails.
    pub async fn client_sql(&self, client: &str, sql: &str) -> Result<String> {
        let psql = [
            "sh",
            "-c",
            "exec psql \"$URI\" -XAtqv ON_ERROR_STOP=1 -c \"$1\"",
            "psql",
            sql,
        ];
        Ok(self
            .harness
            .bed
            .exec(&self.namespace, client, &psql)
            .await?
            .trim()
            .to_owned())
    }

    /// Deletes a pod (grace as given) and waits until another of the same name has taken its place.
    ///
    /// # Errors
    /// If none does in time.
    pub async fn replace_pod(&self, name: &str, grace: Option<u32>) -> Result<Pod> {
        let pods = self.api::<Pod>();
        let old = pods.get(name).await?.uid();
        let params = DeleteParams {
            grace_period_seconds: grace,
            ..DeleteParams::default()
        };
        pods.delete(name, &params).await?;
        tokio::time::timeout(
            PATIENCE,
            wait_for(pods, name, |pod| {
                let conditions = pod
                    .status
                    .iter()
                    .flat_map(|s| s.conditions.iter().flatten());
                pod.uid() != old && { conditions }.any(|c| c.type_ == "Ready" && c.status == "True")
            }),
        )
        .await
        .with_context(|| format!("no new pod {name} that is ready after {PATIENCE:?}"))?
    }

    /// Names of this namespace's objects of a kind that belong to a store.
    ///
    /// # Errors
    /// If they can't be listed.
    pub async fn owned<K>(&self, store: &str) -> Result<Vec<String>>
    where
        K: kube::Resource<Scope = kube::core::NamespaceResourceScope>
            + Clone
            + std::fmt::Debug
            + serde::de::DeserializeOwned,
        K::DynamicType: Default,
    {
        let ours = ListParams::default().labels(&format!("domicile.dev/store={store}"));
        let mut all: Vec<String> = self
            .api::<K>()
            .list(&ours)
            .await?
            .iter()
            .map(ResourceExt::name_any)
            .collect();
        all.sort();
        Ok(all)
    }

    /// Changes a store by a merge patch.
    ///
    /// # Errors
    /// If the API server refuses.
    pub async fn patch(&self, store: &str, patch: Value) -> Result<()> {
        self.stores()
            .patch(store, &PatchParams::default(), &Patch::Merge(patch))
            .await?;
        Ok(())
    }

    /// Deletes a store and waits until it is gone.
    ///
    /// # Errors
    /// If it doesn't go.
    pub async fn delete_store(&self, name: &str) -> Result<()> {
        let params = DeleteParams {
            propagation_policy: Some(PropagationPolicy::Foreground),
            ..DeleteParams::default()
        };
        self.stores().delete(name, &params).await?;
        let gone = gone(self.stores(), name);
        tokio::time::timeout(PATIENCE, gone)
            .await
            .with_context(|| format!("store {name} isn't gone after {PATIENCE:?}"))?
    }

    /// Deletes the namespace and all in it, and waits until it is gone. Nothing there: nothing done.
    ///
    /// # Errors
    /// If it doesn't go.
    pub async fn remove(&self) -> Result<()> {
        let namespaces: Api<Namespace> = Api::all(self.harness.client());
        if namespaces.get_opt(&self.namespace).await?.is_none() {
            return Ok(());
        }
        namespaces
            .delete(&self.namespace, &DeleteParams::default())
            .await?;
        tokio::time::timeout(PATIENCE, gone(namespaces, &self.namespace))
            .await
            .with_context(|| {
                format!("namespace {} isn't gone after {PATIENCE:?}", self.namespace)
            })?
    }
}

/// Watches one object until it is as wanted.
///
/// # Errors
/// If the watch fails for good.
pub async fn wait_for<K>(api: Api<K>, name: &str, mut wanted: impl FnMut(&K) -> bool) -> Result<K>
where
    K: kube::Resource + Clone + std::fmt::Debug + serde::de::DeserializeOwned + Send + 'static,
{
    let events = watcher::watch_object(api, name).default_backoff();
    let mut events = std::pin::pin!(events);
    loop {
        match events.try_next().await {
            Ok(Some(Some(object))) if wanted(&object) => return Ok(object),
            Ok(Some(_)) => {}
            Ok(None) => bail!("the watch of {name} ended"),
            // The API server may be away for a moment: that is what some tests are about.
            Err(_) => {}
        }
    }
}

/// Watches one object until it is gone.
///
/// # Errors
/// If the watch fails for good.
async fn gone<K>(api: Api<K>, name: &str) -> Result<()>
where
    K: kube::Resource + Clone + std::fmt::Debug + serde::de::DeserializeOwned + Send + 'static,
{
    let events = watcher::watch_object(api, name).default_backoff();
    let mut events = std::pin::pin!(events);
    loop {
        match events.try_next().await {
            Ok(Some(None)) => return Ok(()),
            Ok(None) => bail!("the watch of {name} ended"),
            Ok(Some(Some(_))) | Err(_) => {}
        }
    }
}

/// One instance of a store's status.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, serde::Deserialize)]
pub struct Instance {
    /// Its name.
    pub name: String,
    /// Its region.
    pub region: String,
    /// Its zone.
    pub zone: String,
    /// Its node.
    pub node: String,
    /// Its role.
    pub role: String,
    /// Whether it serves.
    pub ready: bool,
}

/// The instances of a store's status, by name.
///
/// # Errors
/// If there are none, or an entry lacks something.
pub fn instances(store: &DynamicObject) -> Result<Vec<Instance>> {
    let mut all: Vec<Instance> = serde_json::from_value(store.data["status"]["instances"].clone())
        .context("the status lists no instances")?;
    ensure!(!all.is_empty(), "the status lists no instances");
    all.sort();
    Ok(all)
}
