//! A day of ordinary churn in minutes: nodes upgraded one after another, stores scaled up and down, pods evicted, nodes
//! joining and leaving, labels and texts edited. Nothing of it is a violation.
//!
//! Owns what happens and in which order (by a seed), and what counts as an alarm: the condition Resident saying False at
//! any instant, or an event that something was stopped or erased for being outside.
//! Never does what could bring a copy outside.

use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use k8s_openapi::api::core::v1::{Node, Pod};
use k8s_openapi::api::events::v1::Event;
use kube::api::{DeleteParams, DynamicObject, ListParams, Patch, PatchParams};
use kube::{Api, Client, ResourceExt};
use rand::rngs::StdRng;
use rand::{Rng as _, SeedableRng as _};
use serde_json::json;
use tokio::time::{sleep, timeout};

use super::scene::{PATIENCE, STORE, Scene, kind};
use crate::harness::{condition, wait_for};
use crate::run::until;

/// The most between two events, in milliseconds.
const SPACING: u64 = 1200;
/// For a pod to be gone from a node that is emptied.
const DRAINED: Duration = Duration::from_secs(20);

/// Makes a store, lets so many events happen to it, and waits until it is whole again. Each event is told.
///
/// # Errors
/// With the event before it, if there is an alarm; or if the store doesn't come to rest.
pub async fn day(client: &Client, world: &str, name: &str, seed: u64, events: u32) -> Result<()> {
    let scene = Scene {
        client,
        prefix: name.to_owned(),
    };
    scene.make(world).await.context("the scene")?;
    let outcome = {
        let played = scene.play();
        tokio::pin!(played);
        tokio::select! {
            outcome = scene.day(seed, events) => outcome,
            broken = &mut played => broken.and_then(|()| bail!("the instances went")),
        }
    };
    scene.clear().await.context("clearing the scene")?;
    outcome.with_context(|| format!("{name}, seed {seed}"))
}

impl Scene<'_> {
    async fn whole(&self) -> Result<()> {
        let is = |s: &DynamicObject, kind: &str| condition(s, kind).is_some_and(|c| c.0 == "True");
        self.until(|s| is(s, "Ready") && is(s, "Resident"))
            .await
            .map(drop)
    }

    async fn day(&self, seed: u64, events: u32) -> Result<()> {
        self.whole().await.context("it never was ready")?;
        let mut rng = StdRng::seed_from_u64(seed);
        let mut last = String::new();
        let alarm = wait_for(self.stores(), STORE, |s: &DynamicObject| {
            condition(s, "Resident").is_some_and(|c| c.0 == "False")
        });
        tokio::pin!(alarm);
        for number in 1..=events {
            let pause = Duration::from_millis(rng.random_range(0..SPACING));
            tokio::select! {
                alarm = &mut alarm => bail!("after {last}: {:?}", condition(&alarm?, "Resident")),
                done = self.happen(&mut rng) => {
                    last = done.with_context(|| format!("event {number}"))?;
                    println!("{} {number}: {last}", self.prefix);
                }
            }
            tokio::select! {
                alarm = &mut alarm => bail!("after {last}: {:?}", condition(&alarm?, "Resident")),
                () = sleep(pause) => {}
            }
        }
        self.scale(2, 1).await?;
        tokio::select! {
            alarm = &mut alarm => bail!("after the last: {:?}", condition(&alarm?, "Resident")),
            whole = self.whole() => whole.context("it doesn't come to rest")?,
        }
        let all: Api<Event> = Api::namespaced(self.client.clone(), &self.prefix);
        for event in all.list(&ListParams::default()).await? {
            let reason = event.reason.unwrap_or_default();
            ensure!(
                !["Fenced", "Erased"].contains(&reason.as_str()),
                "{reason}: {:?}",
                event.note
            );
        }
        Ok(())
    }

    /// One event, in words.
    async fn happen(&self, rng: &mut StdRng) -> Result<String> {
        let nodes = self.nodes();
        let at = rng.random_range(0..nodes.len());
        let (node, region, zone) = &nodes[at];
        Ok(match rng.random_range(0..10) {
            0..=3 => {
                self.upgrade(node, region, zone).await?;
                format!("{node} upgraded")
            }
            4 | 5 => {
                let (west, east) = (rng.random_range(2..=3), rng.random_range(1..=2));
                self.scale(west, east).await?;
                format!("scaled to {west} and {east}")
            }
            6 => {
                let pods = self.pods().list(&ListParams::default()).await?;
                let names: Vec<String> = pods.iter().map(ResourceExt::name_any).collect();
                let Some(name) = names.get(rng.random_range(0..names.len().max(1))) else {
                    return Ok("nothing to evict".to_owned());
                };
                drop(self.pods().delete(name, &DeleteParams::default()).await);
                format!("{name} evicted")
            }
            7 => {
                let extra = format!("{}-extra-{at}", self.prefix);
                let nodes: Api<Node> = Api::all(self.client.clone());
                if nodes.get_opt(&extra).await?.is_some() {
                    self.leave(&extra).await?;
                    format!("{extra} left")
                } else {
                    self.node(&extra, region, zone).await?;
                    format!("{extra} joined in the {region}")
                }
            }
            8 => {
                let labels = json!({ "team": format!("t{at}"), "image-generation": rng.random_range(0..1000).to_string() });
                let nodes: Api<Node> = Api::all(self.client.clone());
                let patch = Patch::Merge(json!({ "metadata": { "labels": labels } }));
                nodes.patch(node, &PatchParams::default(), &patch).await?;
                format!("{node} labelled")
            }
            _ => {
                let text = format!("Annex {}", rng.random_range(3..1000));
                let policies: Api<DynamicObject> =
                    Api::all_with(self.client.clone(), &kind("ResidencyPolicy"));
                let patch = Patch::Merge(json!({ "spec": { "citation": text } }));
                policies
                    .patch(&self.prefix, &PatchParams::default(), &patch)
                    .await?;
                format!("the policy cites {text}")
            }
        })
    }

    async fn scale(&self, west: u32, east: u32) -> Result<()> {
        let n = &self.prefix;
        let patch = Patch::Merge(json!({ "spec": { "placement": [
            { "region": format!("{n}-west"), "instances": west }, { "region": format!("{n}-east"), "instances": east },
        ] } }));
        self.stores()
            .patch(STORE, &PatchParams::default(), &patch)
            .await?;
        Ok(())
    }

    /// Emptied, taken away, and made anew under its name.
    async fn upgrade(&self, name: &str, region: &str, zone: &str) -> Result<()> {
        self.leave(name).await?;
        self.node(name, region, zone).await
    }

    /// A node is cordoned, emptied and taken away, as `kubectl drain` and an autoscaler do it.
    async fn leave(&self, name: &str) -> Result<()> {
        let nodes: Api<Node> = Api::all(self.client.clone());
        let cordon = Patch::Merge(json!({ "spec": { "unschedulable": true } }));
        nodes.patch(name, &PatchParams::default(), &cordon).await?;
        let here = ListParams::default().fields(&format!("spec.nodeName={name}"));
        until(
            "the pods to be gone",
            DRAINED,
            Duration::from_millis(200),
            || async {
                let pods: Vec<Pod> = self.pods().list(&here).await?.items;
                let (api, now) = (self.pods(), DeleteParams::default());
                for pod in &pods {
                    drop(api.delete(&pod.name_any(), &now).await);
                }
                ensure!(pods.is_empty(), "{name} has pods");
                Ok(())
            },
        )
        .await?;
        nodes.delete(name, &DeleteParams::default()).await?;
        let gone = timeout(
            PATIENCE,
            until(
                "the node to be gone",
                PATIENCE,
                Duration::from_millis(50),
                || async {
                    ensure!(nodes.get_opt(name).await?.is_none(), "{name} is there");
                    Ok(())
                },
            ),
        );
        gone.await.context("the node stays")?
    }
}
