//! The table that `testbed status` prints.
//!
//! Only looks; also at a test bed that is half up or whose API server is dead.

use crate::addons::{self, PROVISIONER};
use crate::cgroups;
use crate::control::{self, PARTS};
use crate::daemon;
use crate::faults::{Faults, RELAY};
use crate::layout::Layout;
use crate::node;
use crate::topology::{NODES, Region};
use anyhow::Result;
use k8s_openapi::api::core::v1::Pod;
use kube::api::ListParams;
use kube::{Api, ResourceExt};
use std::fmt::Write;
use std::time::Duration;

/// The table.
///
/// # Errors
/// If the faults or the cgroups can't be read.
pub async fn table(layout: &Layout) -> Result<String> {
    let mut out = String::new();
    if !layout.root().exists() {
        return Ok("down\n".into());
    }
    if !layout.complete().exists() {
        let _ = writeln!(out, "half up: 'testbed up' hasn't come to its end");
    }
    let faults = Faults::read(layout)?;
    let asked = tokio::time::timeout(Duration::from_secs(5), ask(layout)).await;
    let (ready, pods) = match asked {
        Ok(Ok((ready, pods))) => (Some(ready), pods),
        Ok(Err(e)) => {
            let _ = writeln!(out, "the API server doesn't answer: {e:#}");
            (None, Vec::new())
        }
        Err(_) => {
            let _ = writeln!(out, "the API server doesn't answer within 5 s");
            (None, Vec::new())
        }
    };

    let _ = writeln!(
        out,
        "{:<6}{:<11}{:<12}{:<15}{:<8}{:<5}DEAD",
        "NODE", "READY", "REGION", "ZONE", "CUT", "PODS"
    );
    for n in &NODES {
        let state = match &ready {
            None => "?",
            Some(names) if names.iter().any(|r| r == n.name) => "Ready",
            Some(_) => "NotReady",
        };
        let dead: Vec<_> = node::daemons(n)
            .into_iter()
            .filter(|d| !daemon::alive(layout, d))
            .collect();
        let cut = faults
            .nodes
            .get(n.name)
            .map(ToString::to_string)
            .unwrap_or_default();
        let count = pods
            .iter()
            .filter(|p| p.spec.as_ref().and_then(|s| s.node_name.as_deref()) == Some(n.name))
            .count();
        let line = format!(
            "{:<6}{state:<11}{:<12}{:<15}{:<8}{count:<5}{}",
            n.name,
            n.region.name,
            n.zone_label(),
            if cut.is_empty() { "-" } else { &cut },
            dead.join(" ")
        );
        let _ = writeln!(out, "{}", line.trim_end());
    }
    let mut parts: Vec<&str> = PARTS.to_vec();
    parts.push(PROVISIONER);
    if !faults.latencies.is_empty() {
        parts.push(RELAY);
    }
    let shown: Vec<_> = parts
        .iter()
        .map(|p| {
            if daemon::alive(layout, p) {
                (*p).to_owned()
            } else {
                format!("{p} (DEAD)")
            }
        })
        .collect();
    let _ = writeln!(out, "\ncontrol plane  {}", shown.join(", "));
    if !faults.regions.is_empty() {
        let names: Vec<_> = faults
            .regions
            .iter()
            .filter_map(|r| Region::find(r))
            .map(|r| r.name)
            .collect();
        let _ = writeln!(out, "cut regions    {}", names.join(", "));
    }
    for (pair, ms) in &faults.latencies {
        let _ = writeln!(
            out,
            "latency        {} {ms} ms one way",
            pair.replace(' ', " <-> ")
        );
    }
    for uid in cgroups::frozen_pods()? {
        let known = pods
            .iter()
            .find(|p| p.metadata.uid.as_deref() == Some(&uid));
        let name = known.map_or_else(
            || uid.clone(),
            |p| format!("{}/{}", p.namespace().unwrap_or_default(), p.name_any()),
        );
        let _ = writeln!(out, "frozen         {name}");
    }
    Ok(out)
}

async fn ask(layout: &Layout) -> Result<(Vec<String>, Vec<Pod>)> {
    let client = control::client(&layout.kubeconfig()).await?;
    let ready = addons::ready_nodes(&client).await?;
    let pods: Api<Pod> = Api::all(client);
    let mut pods = pods.list(&ListParams::default()).await?.items;
    pods.retain(|p| {
        !matches!(
            p.status.as_ref().and_then(|s| s.phase.as_deref()),
            Some("Succeeded" | "Failed")
        )
    });
    Ok((ready, pods))
}
