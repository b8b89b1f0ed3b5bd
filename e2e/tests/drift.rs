//! The drifts of `corpus/drift/` on a real API server with fake nodes, played instances and a running operator: what is
//! outside is found, said and stopped, and nothing else is.
//!
//! Feature `api`: the API server's programs must be built (`testbed prepare`).

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use e2e::api::ApiServer;
use e2e::drift::{self, Outcome, churn};
use e2e::figures::{self, Figure};
use futures::{StreamExt as _, TryStreamExt as _};
use serde_json::json;

/// When the operator is killed, in the middle of the day.
const OPERATOR_DIES: Duration = Duration::from_secs(30);
/// Stores that live through a day of churn, and how much happens to each.
const DAYS: u64 = 4;
const EVENTS: u32 = 25;
/// How many cases are under way at once.
const AT_ONCE: usize = 8;

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..")
}

struct World {
    server: ApiServer,
    operator: Option<Child>,
    provisioner: tokio::task::JoinHandle<Result<()>>,
}

impl Drop for World {
    fn drop(&mut self) {
        self.provisioner.abort();
        if let Some(operator) = &mut self.operator {
            drop(operator.kill());
            drop(operator.wait());
        }
    }
}

impl World {
    async fn new(port: u16) -> Result<Self> {
        let server = ApiServer::start().await?;
        let layout = server.layout().clone();
        let mut world = Self {
            server,
            operator: None,
            provisioner: tokio::spawn(async move { e2e::provisioner::serve(&layout).await }),
        };
        let class = json!({
            "apiVersion": "storage.k8s.io/v1", "kind": "StorageClass",
            "metadata": { "name": e2e::provisioner::CLASS, "annotations": { "storageclass.kubernetes.io/is-default-class": "true" } },
            "provisioner": e2e::provisioner::NAME, "volumeBindingMode": "WaitForFirstConsumer",
        });
        let crds = root().join("crds").display().to_string();
        world
            .kubectl(&["apply", "--server-side", "-f", &crds], None)
            .await?;
        world
            .kubectl(
                &[
                    "wait",
                    "--for=condition=Established",
                    "--timeout=60s",
                    "-f",
                    &crds,
                ],
                None,
            )
            .await?;
        world
            .kubectl(&["apply", "-f", "-"], Some(&class.to_string()))
            .await?;
        world.operator = Some(world.operator(port)?);
        Ok(world)
    }

    fn operator(&self, port: u16) -> Result<Child> {
        let program = std::env::current_exe()?
            .with_file_name("")
            .join("../domicile");
        let log = std::fs::File::options()
            .create(true)
            .append(true)
            .open(self.server.layout().logs().join("operator.log"))?;
        Command::new(&program)
            .args(["operator", "--image", "domicile:test", "--identity", "one"])
            .args(["--lease-namespace", "default"])
            .args(["--http", &format!("127.0.0.1:{port}")])
            .env("KUBECONFIG", self.server.kubeconfig())
            .stderr(log)
            .stdout(Stdio::null())
            .spawn()
            .with_context(|| format!("{}: build it first (cargo build)", program.display()))
    }

    async fn kubectl(&self, arguments: &[&str], input: Option<&str>) -> Result<String> {
        let program = e2e::tools::KUBERNETES.path("kubectl")?;
        let (program, kubeconfig) = (
            program.display().to_string(),
            self.server.kubeconfig().display().to_string(),
        );
        let command = [&[program.as_str(), "--kubeconfig", &kubeconfig], arguments].concat();
        e2e::run::run_with(&command, input).await
    }
}

#[tokio::test]
async fn what_drifts_outside_is_stopped_and_nothing_else_is() -> Result<()> {
    let folder = root().join("corpus/drift");
    let mut drifts = drift::read(&folder)?;
    if let Ok(part) = std::env::var("DOMICILE_DRIFT") {
        drifts.retain(|d| d.name.contains(&part));
        ensure!(
            !drifts.is_empty(),
            "DOMICILE_DRIFT={part}: no case has that in its name"
        );
    }
    let scene = std::fs::read_to_string(folder.join("_world.yaml"))?;
    let world = World::new(18151).await?;
    let client = world.server.client();
    let outcomes: Vec<(&str, Outcome)> = futures::stream::iter(drifts.iter().enumerate())
        .map(|(number, drift)| {
            let (client, scene) = (&client, &scene);
            async move {
                let outcome = drift::run(client, scene, number, drift).await?;
                anyhow::Ok((drift.name.as_str(), outcome))
            }
        })
        .buffer_unordered(AT_ONCE)
        .try_collect()
        .await
        .with_context(|| format!("logs: {}", world.server.layout().logs().display()))?;
    let (mut missed, mut alarms) = (Vec::new(), Vec::new());
    let (mut found_after, mut fenced_after) = (Vec::new(), Vec::new());
    for (name, outcome) in outcomes {
        match outcome {
            Outcome::Quiet => {}
            Outcome::Stopped { found, fenced } => {
                found_after.push(found);
                fenced_after.push(fenced);
            }
            Outcome::Missed(how) => missed.push(format!("{name}: {how}")),
            Outcome::FalseAlarm(how) => alarms.push(format!("{name}: {how}")),
        }
    }
    let violations = drifts.iter().filter(|d| d.violates()).count();
    println!(
        "{violations} that get outside, {} that don't; missed {}, false alarms {}",
        drifts.len() - violations,
        missed.len(),
        alarms.len()
    );
    let count = |all: &[String]| u32::try_from(all.len()).map(f64::from);
    let mut rows = vec![
        Figure::new("drift/missed", "cases", &[count(&missed)?])?,
        Figure::new("drift/false-alarms", "cases", &[count(&alarms)?])?,
    ];
    if !found_after.is_empty() {
        rows.push(Figure::new("found", "s", &found_after)?);
        rows.push(Figure::new("fenced", "s", &fenced_after)?);
    }
    figures::merge(&root().join("target/figures/residency.json"), &rows)?;
    ensure!(
        missed.is_empty() && alarms.is_empty(),
        "missed:\n  {}\nfalse alarms:\n  {}",
        missed.join("\n  "),
        alarms.join("\n  ")
    );
    Ok(())
}

/// Nodes upgraded, stores scaled, pods evicted, texts edited, and the operator killed in the middle of it.
#[tokio::test]
async fn a_day_of_ordinary_churn_raises_no_alarm() -> Result<()> {
    let scene = std::fs::read_to_string(root().join("corpus/drift/_world.yaml"))?;
    let mut world = World::new(18152).await?;
    let client = world.server.client();
    let base: u64 = match std::env::var("DOMICILE_SEED") {
        Ok(seed) => seed.parse().context("DOMICILE_SEED")?,
        Err(_) => 1,
    };
    let days = futures::future::join_all((0..DAYS).map(|n| {
        let (client, scene) = (&client, &scene);
        async move { churn::day(client, scene, &format!("c{n}"), base + n, EVENTS).await }
    }));
    tokio::pin!(days);
    let outcomes = tokio::select! {
        early = &mut days => early,
        () = tokio::time::sleep(OPERATOR_DIES) => {
            if let Some(mut operator) = world.operator.take() {
                operator.kill()?;
                operator.wait()?;
            }
            world.operator = Some(world.operator(18152)?);
            println!("the operator is killed");
            days.await
        }
    };
    let alarms: Vec<String> = outcomes
        .into_iter()
        .filter_map(Result::err)
        .map(|e| format!("{e:#}"))
        .collect();
    let count = f64::from(u32::try_from(alarms.len())?);
    let row = Figure::new("churn/false-alarms", "stores", &[count])?;
    figures::merge(&root().join("target/figures/residency.json"), &[row])?;
    ensure!(alarms.is_empty(), "{}", alarms.join("\n"));
    Ok(())
}
