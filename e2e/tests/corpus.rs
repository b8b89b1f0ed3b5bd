//! The corpus of `corpus/residency/` on a real API server with fake nodes and a running operator: nothing that must
//! be refused is let through, and nothing lawful is refused; and the same stores with the operator alone.
//!
//! Feature `api`: the API server's programs must be built (`testbed prepare`).

use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use e2e::corpus::{self, Outcome, Trial};
use e2e::figures::{self, Figure};
use e2e::harness::condition;
use e2e::operated::{Operated, root};
use e2e::run::until;
use k8s_openapi::api::admissionregistration::v1::ValidatingAdmissionPolicy;
use k8s_openapi::api::core::v1::{PersistentVolumeClaim, Pod, ServiceAccount};
use kube::api::{DynamicObject, ListParams};
use kube::core::{ApiResource, GroupVersionKind};
use kube::{Api, Client, ResourceExt};

const PATIENCE: Duration = Duration::from_secs(90);
const PAUSE: Duration = Duration::from_millis(100);
/// Those of `_world.yaml`.
const NAMESPACES: [&str; 8] = [
    "records", "west", "eu", "vault", "split", "typo", "open", "wide",
];

struct World(Operated);

impl World {
    /// Installs everything and waits until the operator has resolved and bound what there is.
    async fn new(port: u16) -> Result<Self> {
        let mut world = Self(Operated::new().await?);
        world
            .0
            .kubectl(&["apply", "-k", "config/admission"])
            .await?;
        world
            .0
            .kubectl(&["apply", "-f", "corpus/residency/_world.yaml"])
            .await?;
        let pod = std::fs::read_to_string(root().join("corpus/residency/_pods.yaml"))?;
        for namespace in NAMESPACES {
            let accounts: Api<ServiceAccount> = Api::namespaced(world.client(), namespace);
            until("the default ServiceAccount", PATIENCE, PAUSE, || async {
                accounts.get("default").await.map_err(Into::into)
            })
            .await?;
            world.0.apply(&pod.replace("$NS", namespace)).await?;
        }
        world.0.start_operator(port)?;
        world.settled().await?;
        Ok(world)
    }

    fn client(&self) -> Client {
        self.0.client()
    }

    fn kind(name: &str) -> ApiResource {
        ApiResource::from_gvk(&GroupVersionKind::gvk("domicile.dev", "v1alpha1", name))
    }

    /// Every policy says that it is enforced, nodes are stamped, and the API server has taken notice of the bindings.
    async fn settled(&self) -> Result<()> {
        let policies: Api<DynamicObject> =
            Api::all_with(self.client(), &Self::kind("ResidencyPolicy"));
        let stores: Api<DynamicObject> =
            Api::namespaced_with(self.client(), "records", &Self::kind("PrivacyDataStore"));
        until("the policies' statuses", PATIENCE, PAUSE, || async {
            for policy in policies.list(&ListParams::default()).await? {
                let enforced = condition(&policy, "Enforced");
                ensure!(
                    enforced.as_ref().is_some_and(|c| c.0 == "True"),
                    "{}: {enforced:?}",
                    policy.name_any()
                );
                if ["records", "wide"].contains(&policy.name_any().as_str()) {
                    let nodes = &policy.data["status"]["nodes"];
                    let count = nodes.as_array().map_or(0, Vec::len);
                    ensure!(count >= 5, "{}: {nodes}", policy.name_any());
                }
            }
            let store = stores.get("consumers").await?;
            let placed = store.data["status"]["instances"]
                .as_array()
                .map_or(0, Vec::len);
            ensure!(placed == 3, "consumers: {}", store.data["status"]);
            Ok(())
        })
        .await?;
        // The API server tells nobody when it has read a binding; each is asked for until it answers. Those that are
        // lawful too: while a policy's own binding is read already, the one for unknown policies may not have been
        // read again since it let go of the policy's namespaces.
        let canaries: Vec<Trial> = self
            .trials()?
            .into_iter()
            .filter(|t| t.name.starts_with("a pod is bound by hand:"))
            .collect();
        ensure!(canaries.len() > 20, "no canaries");
        let client = self.client();
        for canary in &canaries {
            let answered = until("a binding", Duration::from_secs(20), PAUSE, || async {
                match corpus::run(&client, canary).await? {
                    Outcome::Right => Ok(()),
                    other => anyhow::bail!("{}: {other:?}", canary.name),
                }
            });
            // What never answers as it should is for the test to report.
            if answered.await.is_err() {
                break;
            }
        }
        Ok(())
    }

    fn trials(&self) -> Result<Vec<Trial>> {
        corpus::read(&root().join("corpus/residency"))
    }
}

#[tokio::test]
async fn nothing_is_missed_and_nothing_lawful_is_refused() -> Result<()> {
    let world = World::new(18141).await?;
    let policies: Api<ValidatingAdmissionPolicy> = Api::all(world.client());
    for policy in policies.list(&ListParams::default()).await? {
        let warnings = policy
            .status
            .as_ref()
            .and_then(|s| s.type_checking.as_ref())
            .and_then(|t| t.expression_warnings.clone());
        ensure!(warnings.is_none(), "{}: {warnings:?}", policy.name_any());
    }
    let trials = world.trials()?;
    let (mut missed, mut alarms) = (Vec::new(), Vec::new());
    for trial in &trials {
        match corpus::run(&world.client(), trial).await? {
            Outcome::Right => {}
            Outcome::Missed(how) => missed.push(format!("{}: {how}", trial.name)),
            Outcome::FalseAlarm(how) => alarms.push(format!("{}: {how}", trial.name)),
        }
    }
    let refused = trials.iter().filter(|t| t.refused.is_some()).count();
    println!(
        "{refused} to be refused, {} lawful; missed {}, false alarms {}",
        trials.len() - refused,
        missed.len(),
        alarms.len()
    );
    let path = publish(&[
        ("corpus/missed", missed.len()),
        ("corpus/false-alarms", alarms.len()),
    ])?;
    ensure!(
        missed.is_empty() && alarms.is_empty(),
        "missed:\n  {}\nfalse alarms:\n  {}\n({})",
        missed.join("\n  "),
        alarms.join("\n  "),
        path.display()
    );
    Ok(())
}

/// Writes the rows into `target/figures/residency.json`, beside those that others have written.
fn publish(rows: &[(&str, usize)]) -> Result<PathBuf> {
    let path = root().join("target/figures/residency.json");
    let rows = rows.iter().map(|(name, count)| {
        let count = u32::try_from(*count)?;
        Figure::new(name, "cases", &[f64::from(count)])
    });
    figures::merge(&path, &rows.collect::<Result<Vec<_>>>()?)?;
    Ok(path)
}

/// Somebody has deleted every admission policy. The stores of the corpus that only a policy refuses (not the
/// definition) are made for real: the operator says the same of each, and nothing of it comes to be.
#[tokio::test]
async fn without_admission_the_operator_refuses_the_same_in_the_same_words() -> Result<()> {
    let world = World::new(18142).await?;
    world
        .0
        .kubectl(&[
            "delete",
            "validatingadmissionpolicybindings,validatingadmissionpolicies",
            "--all",
        ])
        .await?;
    let client = world.client();
    let mut stores: Vec<(Trial, String, String)> = Vec::new();
    for (number, mut trial) in world.trials()?.into_iter().enumerate() {
        if trial.body["kind"] != "PrivacyDataStore" || !trial.name.starts_with("a store is placed")
        {
            continue;
        }
        let name = format!("case-{number}");
        trial.body["metadata"]["name"] = name.clone().into();
        let namespace = trial.body["metadata"]["namespace"].as_str();
        let namespace = namespace.context("a store's namespace")?.to_owned();
        // The API server forgets a policy a moment after its deletion, and tells nobody.
        until("to be let through", PATIENCE, PAUSE, || async {
            let (code, message, _) = corpus::send(&client, &trial, false).await?;
            ensure!(code == 201 || code == 409, "{}: {message}", trial.name);
            Ok(())
        })
        .await?;
        stores.push((trial, namespace, name));
    }
    let refused = stores.iter().filter(|s| s.0.refused.is_some()).count();
    ensure!(
        refused > 40 && stores.len() - refused > 20,
        "{refused} of {}",
        stores.len()
    );
    let mut wrong = Vec::new();
    for (trial, namespace, name) in &stores {
        let api: Api<DynamicObject> =
            Api::namespaced_with(client.clone(), namespace, &World::kind("PrivacyDataStore"));
        let said = until("the operator's word", PATIENCE, PAUSE, || async {
            let store = api.get(name).await?;
            condition(&store, "Stalled").context("nothing is said yet")
        })
        .await?;
        match &trial.refused {
            Some(words) if said.0 != "True" || !said.2.contains(words.as_str()) => {
                wrong.push(format!("{}: {said:?}", trial.name));
            }
            // One whose policy doesn't exist waits for it.
            None if said.0 == "True" && said.1 != "PolicyNotFound" => {
                wrong.push(format!("{}, lawful: {said:?}", trial.name));
            }
            _ => {}
        }
    }
    for (_, namespace, name) in stores.iter().filter(|s| s.0.refused.is_some()) {
        let ours = ListParams::default().labels(&format!("domicile.dev/store={name}"));
        let pods = Api::<Pod>::namespaced(client.clone(), namespace)
            .list(&ours)
            .await?;
        let claims = Api::<PersistentVolumeClaim>::namespaced(client.clone(), namespace)
            .list(&ours)
            .await?;
        if !pods.items.is_empty() || !claims.items.is_empty() {
            wrong.push(format!("{namespace}/{name}: something was made of it"));
        }
    }
    ensure!(wrong.is_empty(), "{}", wrong.join("\n"));
    Ok(())
}
