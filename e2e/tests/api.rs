//! The kinds, the admission policies and the operator on a real API server with fake nodes. No root, no
//! containers: what the instances would say of themselves, the tests say.
//!
//! Feature `api`: the API server's programs must be built (`testbed prepare`).

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use e2e::api::ApiServer;
use e2e::harness::{condition, wait_for};
use k8s_openapi::api::coordination::v1::Lease;
use k8s_openapi::api::core::v1::{ConfigMap, Node, PersistentVolumeClaim, Pod, Secret, Service};
use k8s_openapi::apiextensions_apiserver::pkg::apis::apiextensions::v1::CustomResourceDefinition;
use kube::api::{DeleteParams, DynamicObject, ListParams, Patch, PatchParams};
use kube::core::{ApiResource, GroupVersionKind};
use kube::runtime::wait::await_condition;
use kube::runtime::wait::conditions::is_deleted;
use kube::{Api, Client, ResourceExt};
use serde_json::{Value, json};

const STAMP: &str = "node-restriction.kubernetes.io/domicile-region";
const PATIENCE: Duration = Duration::from_secs(90);

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..")
}

fn kind(name: &str) -> ApiResource {
    ApiResource::from_gvk(&GroupVersionKind::gvk("domicile.dev", "v1alpha1", name))
}

/// One API server with the kinds installed, and what runs against it.
struct World {
    server: ApiServer,
    operators: Vec<Child>,
    provisioner: tokio::task::JoinHandle<Result<()>>,
}

impl Drop for World {
    fn drop(&mut self) {
        self.provisioner.abort();
        for operator in &mut self.operators {
            drop(operator.kill());
            drop(operator.wait());
        }
    }
}

impl World {
    async fn new(admission: bool) -> Result<Self> {
        let server = ApiServer::start().await?;
        let layout = server.layout().clone();
        let world = Self {
            server,
            operators: vec![],
            provisioner: tokio::spawn(async move { e2e::provisioner::serve(&layout).await }),
        };
        world
            .apply(&json!({
                "apiVersion": "storage.k8s.io/v1", "kind": "StorageClass",
                "metadata": { "name": e2e::provisioner::CLASS, "annotations": { "storageclass.kubernetes.io/is-default-class": "true" } },
                "provisioner": e2e::provisioner::NAME, "volumeBindingMode": "WaitForFirstConsumer",
            }))
            .await?;
        let crds = root().join("crds");
        world
            .kubectl(&["apply", "--server-side", "-f", &crds.display().to_string()])
            .await?;
        for crd in std::fs::read_dir(crds)? {
            let name = crd?.file_name().to_string_lossy().replace(".yaml", "");
            let (group, plural) = name
                .split_once('_')
                .context("a CRD file is GROUP_PLURAL.yaml")?;
            let api: Api<CustomResourceDefinition> = Api::all(world.client());
            let name = format!("{plural}.{group}");
            let established = wait_for(api, &name, |crd| {
                crd.status
                    .iter()
                    .flat_map(|s| s.conditions.iter().flatten())
                    .any(|c| c.type_ == "Established" && c.status == "True")
            });
            tokio::time::timeout(PATIENCE, established)
                .await
                .with_context(|| format!("{plural} isn't established"))??;
        }
        if admission {
            let path = root().join("config/admission");
            world
                .kubectl(&["apply", "-k", &path.display().to_string()])
                .await?;
        }
        Ok(world)
    }

    fn client(&self) -> Client {
        self.server.client()
    }

    async fn kubectl(&self, arguments: &[&str]) -> Result<String> {
        let program = e2e::tools::KUBERNETES
            .path("kubectl")?
            .display()
            .to_string();
        let kubeconfig = self.server.kubeconfig().display().to_string();
        e2e::run::run(&[&[program.as_str(), "--kubeconfig", &kubeconfig], arguments].concat()).await
    }

    async fn apply(&self, manifest: &Value) -> Result<String> {
        let program = e2e::tools::KUBERNETES
            .path("kubectl")?
            .display()
            .to_string();
        let kubeconfig = self.server.kubeconfig().display().to_string();
        let command = [
            program.as_str(),
            "--kubeconfig",
            &kubeconfig,
            "apply",
            "--server-side",
            "-f",
            "-",
        ];
        e2e::run::run_with(&command, Some(&manifest.to_string())).await
    }

    /// Runs a command of the program. Its output, or an error with what it said.
    async fn domicile(&self, arguments: &[&str]) -> Result<String> {
        let program = std::env::current_exe()?
            .with_file_name("")
            .join("../domicile");
        let output = tokio::process::Command::new(&program)
            .args(arguments)
            .env("KUBECONFIG", self.server.kubeconfig())
            .output()
            .await
            .with_context(|| format!("{}: build it first (cargo build)", program.display()))?;
        ensure!(
            output.status.success(),
            "{}",
            String::from_utf8_lossy(&output.stderr)
        );
        Ok(String::from_utf8(output.stdout)?)
    }

    /// Starts an operator as a process of its own. Its lease is in `default`.
    fn operator(&mut self, identity: &str, port: u16) -> Result<()> {
        let program = std::env::current_exe()?
            .with_file_name("")
            .join("../domicile");
        let log = self.server.layout().logs().join(format!("{identity}.log"));
        let child = Command::new(&program)
            .args([
                "operator",
                "--image",
                "domicile:test",
                "--lease-namespace",
                "default",
                "--identity",
                identity,
            ])
            .args(["--http", &format!("127.0.0.1:{port}")])
            .env("KUBECONFIG", self.server.kubeconfig())
            .stderr(std::fs::File::create(&log)?)
            .stdout(Stdio::null())
            .spawn()
            .with_context(|| format!("{}: build it first (cargo build)", program.display()))?;
        self.operators.push(child);
        Ok(())
    }

    fn all(&self, of: &str) -> Api<DynamicObject> {
        Api::all_with(self.client(), &kind(of))
    }

    fn stores(&self) -> Api<DynamicObject> {
        Api::namespaced_with(self.client(), "default", &kind("PrivacyDataStore"))
    }

    fn within<K>(&self) -> Api<K>
    where
        K: kube::Resource<Scope = kube::core::NamespaceResourceScope>,
        K::DynamicType: Default,
    {
        Api::namespaced(self.client(), "default")
    }

    async fn regions(&self) -> Result<()> {
        let path = root().join("config/samples/10-regions.yaml");
        self.kubectl(&["apply", "-f", &path.display().to_string()])
            .await
            .map(drop)
    }

    async fn policy(&self) -> Result<()> {
        self.apply(&json!({
            "apiVersion": "domicile.dev/v1alpha1", "kind": "ResidencyPolicy", "metadata": { "name": "records" },
            "spec": { "basis": "Contract", "citation": "Annex 2", "permits": [
                { "data": "Primary", "regions": ["us-west"] }, { "data": "Standby", "regions": ["us-west", "us-east"] },
            ] },
        }))
        .await
        .map(drop)
    }

    fn store(name: &str, placement: &[(&str, i32)]) -> Value {
        let placement: Vec<Value> = placement
            .iter()
            .map(|(r, n)| json!({ "region": r, "instances": n }))
            .collect();
        json!({
            "apiVersion": "domicile.dev/v1alpha1", "kind": "PrivacyDataStore",
            "metadata": { "name": name, "namespace": "default" },
            "spec": { "residencyPolicyRef": { "name": "records" }, "placement": placement, "storage": { "size": "1Gi" } },
        })
    }

    async fn wait(
        &self,
        store: &str,
        wanted: impl Fn(&DynamicObject) -> bool,
    ) -> Result<DynamicObject> {
        let mut last = Value::Null;
        let found = tokio::time::timeout(
            PATIENCE,
            wait_for(self.stores(), store, |s| {
                last = s.data["status"].clone();
                wanted(s)
            }),
        )
        .await;
        found.map_err(|_| {
            anyhow::anyhow!(
                "store {store} isn't as expected: {last}; see the operators' logs in {}",
                self.server.layout().logs().display()
            )
        })?
    }

    async fn pods(&self) -> Result<Vec<Pod>> {
        let mut pods = self
            .within::<Pod>()
            .list(&ListParams::default())
            .await?
            .items;
        pods.sort_by_key(ResourceExt::name_any);
        Ok(pods)
    }
}

const REFUSAL: &str = "region eu-central is not permitted for Standby by ResidencyPolicy records (basis Contract: Annex 2); permitted for Standby: us-east, us-west";

#[tokio::test]
async fn the_samples_are_accepted_and_each_refused_one_is_refused() -> Result<()> {
    let world = World::new(true).await?;
    let samples = root().join("config/samples");
    world
        .kubectl(&["apply", "-k", &samples.display().to_string()])
        .await?;
    let policies: Api<DynamicObject> = Api::all_with(
        world.client(),
        &ApiResource::from_gvk(&GroupVersionKind::gvk(
            "admissionregistration.k8s.io",
            "v1",
            "ValidatingAdmissionPolicy",
        )),
    );
    for policy in policies.list(&ListParams::default()).await? {
        let warnings = &policy.data["status"]["typeChecking"]["expressionWarnings"];
        ensure!(warnings.is_null(), "{}: {warnings}", policy.name_any());
    }
    for file in std::fs::read_dir(samples.join("refused"))? {
        let path = file?.path();
        let text = std::fs::read_to_string(&path)?;
        if text.contains("By: admission where pods are bound") {
            // Takes an operator, which this world has none of; the corpus has many of these.
            continue;
        }
        let wanted = text
            .lines()
            .find_map(|l| l.strip_prefix("# Refused: "))
            .with_context(|| {
                format!(
                    "{}: say in a line '# Refused: WORDS' how it is refused",
                    path.display()
                )
            })?;
        let refused = world
            .kubectl(&["apply", "-f", &path.display().to_string()])
            .await;
        let words = format!(
            "{:#}",
            refused
                .err()
                .with_context(|| format!("{} was accepted", path.display()))?
        );
        ensure!(words.contains(wanted), "{}: {words}", path.display());
    }
    Ok(())
}

#[tokio::test]
async fn admission_and_plan_refuse_in_the_same_words() -> Result<()> {
    let mut world = World::new(true).await?;
    world.regions().await?;
    world.policy().await?;
    world.operator("one", 18101)?;
    let bad = World::store("bad", &[("us-west", 1), ("eu-central", 1)]);
    let refused = world
        .apply(&bad)
        .await
        .err()
        .context("admission let it through")?;
    ensure!(format!("{refused:#}").contains(REFUSAL), "{refused:#}");

    // Somebody deletes every admission policy: the operator alone still places nothing.
    world
        .kubectl(&[
            "delete",
            "validatingadmissionpolicybindings,validatingadmissionpolicies",
            "--all",
        ])
        .await?;
    let deadline = tokio::time::Instant::now() + PATIENCE;
    while let Err(error) = world.apply(&bad).await {
        // The API server forgets a policy a moment after its deletion, and tells nobody.
        ensure!(tokio::time::Instant::now() < deadline, "{error:#}");
        tokio::time::sleep(Duration::from_millis(200)).await;
    }
    let store = world
        .wait("bad", |s| {
            condition(s, "Stalled").is_some_and(|c| c.0 == "True")
        })
        .await?;
    let (_, reason, message) = condition(&store, "Stalled").context("no condition")?;
    assert_eq!(
        (reason.as_str(), message.as_str()),
        ("RegionNotPermitted", REFUSAL)
    );
    assert!(world.pods().await?.is_empty());
    assert!(
        world
            .within::<PersistentVolumeClaim>()
            .list(&ListParams::default())
            .await?
            .items
            .is_empty()
    );
    let refused = Api::<k8s_openapi::api::events::v1::Event>::namespaced(world.client(), "default");
    let told = refused
        .list(&ListParams::default())
        .await?
        .into_iter()
        .any(|e| e.note.as_deref() == Some(REFUSAL));
    assert!(told, "an event says it too");
    // An unlawful store can be deleted.
    world
        .stores()
        .delete("bad", &DeleteParams::default())
        .await?;
    Ok(())
}

#[tokio::test]
async fn nodes_are_stamped_by_every_witness_and_pods_follow_the_stamp() -> Result<()> {
    let mut world = World::new(false).await?;
    world.operator("one", 18102)?;
    // Everything in the wrong order: the store first.
    world
        .apply(&World::store(
            "consumers",
            &[("us-west", 2), ("us-east", 1)],
        ))
        .await?;
    world
        .wait("consumers", |s| {
            condition(s, "Stalled").is_some_and(|c| c.1 == "PolicyNotFound")
        })
        .await?;
    world.policy().await?;
    world
        .wait("consumers", |s| {
            condition(s, "Stalled").is_some_and(|c| c.1 == "RegionNotFound")
        })
        .await?;
    world.regions().await?;

    let nodes: Api<Node> = Api::all(world.client());
    let stamped =
        |region: &'static str| move |n: &Node| n.labels().get(STAMP).is_some_and(|r| r == region);
    for (node, region) in [
        ("w1", "us-west"),
        ("w2", "us-west"),
        ("w3", "us-west"),
        ("e1", "us-east"),
        ("c1", "eu-central"),
    ] {
        tokio::time::timeout(PATIENCE, wait_for(nodes.clone(), node, stamped(region)))
            .await
            .with_context(|| format!("{node} isn't stamped"))??;
    }
    world
        .wait("consumers", |s| {
            s.data["status"]["instances"]
                .as_array()
                .is_some_and(|all| all.len() == 3 && all.iter().all(|i| i["node"].is_string()))
        })
        .await?;
    let at: Vec<String> = world
        .pods()
        .await?
        .iter()
        .map(|p| p.spec.clone().and_then(|s| s.node_name).unwrap_or_default())
        .collect();
    assert!(
        at[0].starts_with('w')
            && at[1].starts_with('w')
            && at[0] != at[1]
            && at[2].starts_with('e'),
        "{at:?}"
    );

    // A node claims to be elsewhere: its stamp goes, and the copy on it is said to be outside.
    let patch = Patch::Merge(
        json!({ "metadata": { "labels": { "topology.kubernetes.io/region": "eu-central-1" } } }),
    );
    nodes.patch(&at[2], &PatchParams::default(), &patch).await?;
    tokio::time::timeout(
        PATIENCE,
        wait_for(nodes.clone(), &at[2], stamped("eu-central")),
    )
    .await
    .context("the stamp stays")??;
    let store = world
        .wait("consumers", |s| {
            condition(s, "Resident").is_some_and(|c| c.0 == "False")
        })
        .await?;
    let (_, reason, message) = condition(&store, "Resident").context("no condition")?;
    assert_eq!(reason, "Outside");
    assert!(
        message.contains(&format!(
            "consumers-3 is on node {}: region eu-central is not permitted",
            at[2]
        )),
        "{message}"
    );

    let regions = world.all("Region").get("us-east").await?;
    assert_eq!(regions.data["status"]["nodes"], 1);
    let policy = world.all("ResidencyPolicy").get("records").await?;
    assert_eq!(policy.data["status"]["usedBy"], 1);
    Ok(())
}

#[tokio::test]
async fn a_killed_operator_is_succeeded_and_the_world_is_complete() -> Result<()> {
    let mut world = World::new(false).await?;
    world.regions().await?;
    world.policy().await?;
    world.operator("one", 18103)?;
    world.operator("two", 18104)?;
    let leases: Api<Lease> = world.within();
    let led = |who: &'static str| {
        move |l: &Lease| {
            l.spec
                .as_ref()
                .and_then(|s| s.holder_identity.as_deref())
                .is_some_and(|h| {
                    if who.is_empty() {
                        !h.is_empty()
                    } else {
                        h != who
                    }
                })
        }
    };
    let lease = tokio::time::timeout(
        PATIENCE,
        wait_for(leases.clone(), "domicile-operator", led("")),
    )
    .await??;
    let leader = lease
        .spec
        .and_then(|s| s.holder_identity)
        .unwrap_or_default();
    for n in 0..5 {
        world
            .apply(&World::store(
                &format!("s{n}"),
                &[("us-west", 2), ("us-east", 1)],
            ))
            .await?;
    }
    // SIGKILL: no farewell to the lease.
    wait_for(world.within::<Secret>(), "s2-ca", |_| true).await?;
    let first = usize::from(leader != "one");
    world.operators[first].kill()?;
    let other = if first == 0 { led("one") } else { led("two") };
    tokio::time::timeout(PATIENCE, wait_for(leases, "domicile-operator", other))
        .await
        .context("nobody succeeds")??;
    for n in 0..5 {
        world
            .wait(&format!("s{n}"), |s| {
                s.data["status"]["instances"]
                    .as_array()
                    .is_some_and(|all| all.len() == 3 && all.iter().all(|i| i["node"].is_string()))
            })
            .await?;
    }
    assert_eq!(world.pods().await?.len(), 15);
    assert_eq!(
        world
            .within::<PersistentVolumeClaim>()
            .list(&ListParams::default())
            .await?
            .items
            .len(),
        15
    );
    let ours = ListParams::default().labels("app.kubernetes.io/managed-by=domicile.dev");
    assert_eq!(world.within::<Service>().list(&ours).await?.items.len(), 25);
    // Five of each store; the operator's own, which signs attestations, is beside them here.
    let secrets = world.within::<Secret>().list(&ours).await?.items;
    let of_stores = secrets
        .iter()
        .filter(|s| s.name_any() != "domicile-attestation-key");
    assert_eq!(of_stores.count(), 25);
    Ok(())
}

#[tokio::test]
async fn bad_input_is_refused_with_what_to_do() -> Result<()> {
    let world = World::new(true).await?;
    world.policy().await?;
    let store = |change: &dyn Fn(&mut Value)| {
        let mut store = World::store("bad", &[("us-west", 2)]);
        change(&mut store);
        store
    };
    let cases: [(Value, &str); 9] = [
        (
            store(&|s| s["spec"]["placement"] = json!([])),
            "should have at least 1 items",
        ),
        (
            store(
                &|s| s["spec"]["placement"] = json!([{ "region": "us-west", "instances": 1 }, { "region": "us-west", "instances": 1 }]),
            ),
            "duplicate entries",
        ),
        (
            store(&|s| s["spec"]["placement"][0]["instances"] = json!(1)),
            "durability Required needs at least 2 instances",
        ),
        (
            store(&|s| s["spec"]["placement"][0]["region"] = json!("US West!")),
            "should match",
        ),
        (
            store(&|s| s["spec"]["postgres"] = json!({ "parameters": { "fsync": "off" } })),
            "Domicile's own",
        ),
        (
            store(&|s| s["spec"]["database"] = json!({ "owner": "postgres" })),
            "choose another",
        ),
        (
            store(&|s| s["spec"]["storage"]["size"] = json!("ten")),
            "should match",
        ),
        (
            store(&|s| s["spec"]["replicas"] = json!(3)),
            "field not declared in schema",
        ),
        (
            store(&|s| s["metadata"]["name"] = json!("a".repeat(41))),
            "at most 40",
        ),
    ];
    for (manifest, wanted) in cases {
        let refused = world
            .apply(&manifest)
            .await
            .err()
            .with_context(|| format!("accepted: {manifest}"))?;
        ensure!(
            format!("{refused:#}").contains(wanted),
            "{wanted}: {refused:#}"
        );
    }
    world.apply(&store(&|_| {})).await?;
    let changed = world
        .apply(&store(&|s| s["spec"]["storage"]["size"] = json!("2Gi")))
        .await;
    let words = format!("{:#}", changed.err().context("storage was changed")?);
    ensure!(
        words.contains("storage can't be changed after creation"),
        "{words}"
    );
    Ok(())
}

impl World {
    /// What an instance would say of itself, and, as the primary, of the store.
    async fn say(&self, name: &str, entry: Value, store: Value) -> Result<()> {
        let mut status = store;
        status["instances"] = json!([entry]);
        status["instances"][0]["name"] = json!(name);
        let patch = json!({ "apiVersion": "domicile.dev/v1alpha1", "kind": "PrivacyDataStore", "status": status });
        let params = PatchParams::apply(&format!("domicile-instance/{name}")).force();
        self.stores()
            .patch_status("consumers", &params, &Patch::Apply(patch))
            .await?;
        Ok(())
    }

    async fn annotate(&self, annotation: &str, value: &str) -> Result<()> {
        let patch = json!({ "metadata": { "annotations": { annotation: value } } });
        self.stores()
            .patch("consumers", &PatchParams::default(), &Patch::Merge(patch))
            .await?;
        Ok(())
    }

    async fn notes(&self, reason: &str) -> Result<Vec<String>> {
        let events: Api<k8s_openapi::api::events::v1::Event> = self.within();
        Ok(events
            .list(&ListParams::default())
            .await?
            .into_iter()
            .filter(|e| e.reason.as_deref() == Some(reason))
            .filter_map(|e| e.note)
            .collect())
    }
}

/// What was seen is signed, can be checked offline by the program itself, and outlives the store.
#[tokio::test]
async fn what_was_seen_is_attested_and_outlives_the_store() -> Result<()> {
    let mut world = World::new(false).await?;
    world.regions().await?;
    world.policy().await?;
    world.operator("one", 18106)?;
    world
        .apply(&World::store("consumers", &[("us-west", 2)]))
        .await?;
    world
        .wait("consumers", |s| {
            condition(s, "Attested").is_some_and(|c| c.0 == "True")
        })
        .await?;
    let folder = tempfile::tempdir()?;
    let file = folder.path().join("consumers.json").display().to_string();
    world
        .domicile(&["attest", "consumers", "-n", "default", "-o", &file])
        .await?;
    let keys: Api<ConfigMap> = world.within();
    let keys = keys.get("domicile-attestation-keys").await?;
    let (name, pem) = keys
        .data
        .iter()
        .flatten()
        .next()
        .context("no key is published")?;
    let key = folder.path().join(name);
    std::fs::write(&key, pem)?;
    let key = key.display().to_string();
    world.domicile(&["verify", &file, "--key", &key]).await?;
    let other = "0".repeat(64);
    let refused = world.domicile(&["verify", &file, "--key", &other]).await;
    let words = format!("{:#}", refused.err().context("a wrong key was taken")?);
    ensure!(words.contains("none of those that you gave"), "{words}");

    let uid = world.stores().get("consumers").await?.uid();
    world
        .stores()
        .delete("consumers", &DeleteParams::default())
        .await?;
    let uid = uid.context("no uid")?;
    let gone = is_deleted(&uid);
    tokio::time::timeout(PATIENCE, await_condition(world.stores(), "consumers", gone))
        .await
        .context("the store isn't gone")??;
    world
        .domicile(&["attest", "consumers", "-n", "default", "-o", &file])
        .await?;
    world.domicile(&["verify", &file, "--key", &key]).await?;
    let shown = world
        .domicile(&["attest", "consumers", "-n", "default"])
        .await?;
    ensure!(shown.contains("deleted"), "{shown}");
    Ok(())
}

/// The instances decide and the operator follows; what people ask is answered; who leaves is told first.
#[tokio::test]
async fn the_operator_follows_the_instances() -> Result<()> {
    let mut world = World::new(false).await?;
    world.regions().await?;
    world.policy().await?;
    world.operator("one", 18105)?;
    world
        .apply(&World::store(
            "consumers",
            &[("us-west", 2), ("us-east", 1)],
        ))
        .await?;
    let store = world
        .wait("consumers", |s| {
            s.data["status"]["instances"]
                .as_array()
                .is_some_and(|all| all.len() == 3 && all.iter().all(|i| i["node"].is_string()))
        })
        .await?;
    let may: Vec<&Value> = store.data["status"]["instances"]
        .as_array()
        .into_iter()
        .flatten()
        .map(|i| &i["mayBePrimary"])
        .collect();
    assert_eq!(may, [&json!(true), &json!(true), &json!(false)]);

    let agreed = |term: i64, primary: &str, voters: &[&str]| json!({ "term": term, "version": 1, "primary": primary, "voters": voters, "syncMembers": [], "acks": 1 });
    let all = ["consumers-1/a", "consumers-2/b", "consumers-3/c"];
    let primary = |term: i64| json!({ "role": "Primary", "ready": true, "durable": true, "term": term, "systemIdentifier": "7" });
    let founded = json!({
        "configuration": agreed(2, all[0], &all),
        "lastFailover": { "term": 2, "primary": "consumers-1", "previousPrimary": "consumers-9", "reason": "Founding" },
    });
    world.say("consumers-1", primary(2), founded).await?;
    world
        .wait("consumers", |s| s.data["status"]["term"] == 2)
        .await?;

    let now = jiff::Timestamp::now();
    let moved = json!({
        "configuration": agreed(3, all[1], &all),
        "lastFailover": { "term": 3, "primary": "consumers-2", "reason": "PrimaryDead",
                          "detectedAt": now, "promotedAt": now, "routedAt": now },
    });
    world.say("consumers-2", primary(3), moved.clone()).await?;
    let store = world
        .wait("consumers", |s| {
            s.data["status"]["primary"] == "consumers-2" && s.data["status"]["term"] == 3
        })
        .await?;
    let last = &store.data["status"]["lastFailover"];
    ensure!(
        last["previousPrimary"].is_null(),
        "nothing of the one before is mixed in: {last}"
    );

    // Refused in words, then met; both are taken off.
    world
        .annotate("domicile.dev/promote", "consumers-3")
        .await?;
    let gone = |s: &DynamicObject| !s.annotations().contains_key("domicile.dev/promote");
    world.wait("consumers", gone).await?;
    let refused = world.notes("PromoteRefused").await?;
    ensure!(
        refused.len() == 1 && refused[0].contains("us-east is not permitted for Primary"),
        "{refused:?}"
    );
    world
        .annotate("domicile.dev/promote", "consumers-2")
        .await?;
    world.wait("consumers", gone).await?;
    assert_eq!(world.notes("PromoteRefused").await?.len(), 1);
    // Several passes later it was told once, and what the old primary said last hasn't changed anything.
    let told = world.notes("Failover").await?;
    ensure!(
        told.len() == 1 && told[0].starts_with("consumers-2 is primary in term 3: PrimaryDead"),
        "{told:?}"
    );
    let store = world.stores().get("consumers").await?;
    assert_eq!(store.data["status"]["primary"], "consumers-2");

    // The one that isn't wanted any more stays until the primary has taken it out of the voters.
    world
        .apply(&World::store("consumers", &[("us-west", 2)]))
        .await?;
    world
        .wait("consumers", |s| {
            s.data["status"]["instances"]
                .as_array()
                .into_iter()
                .flatten()
                .any(|i| i["name"] == "consumers-3" && i["leaving"] == true)
        })
        .await?;
    let pods = world.pods().await?;
    ensure!(
        pods.iter()
            .any(|p| p.name_any() == "consumers-3" && p.metadata.deletion_timestamp.is_none()),
        "it was taken away while it votes"
    );
    let mut without = moved;
    without["configuration"] = agreed(3, all[1], &all[..2]);
    world.say("consumers-2", primary(3), without).await?;
    world
        .wait("consumers", |s| {
            s.data["status"]["instances"]
                .as_array()
                .is_some_and(|all| all.iter().all(|i| i["name"] != "consumers-3"))
        })
        .await?;
    Ok(())
}
