//! Somebody who replicates with a stolen certificate: `pg_receivewal` in a pod beside the store.
//!
//! The pod itself says when it began and when it was cut off, by the machine's one clock.

use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result, ensure};
use k8s_openapi::api::core::v1::Pod;
use serde_json::json;

use super::ground::{Copy, Ground, LIMIT, NAME, REGION};
use super::sample::{GOAL, Sample};
use crate::harness::wait_for;

/// Replicates from `victim` with the certificate of `thief`, another instance of its store, until it is cut off.
///
/// # Errors
/// If it isn't cut off, or not told of.
pub async fn run(ground: &Ground, victim: &Copy, thief: &str) -> Result<Sample> {
    let scope = &ground.scope;
    let pod = format!("thief-{thief}");
    let manifest = json!({
        "apiVersion": "v1", "kind": "Pod", "metadata": { "name": pod, "namespace": NAME },
        "spec": {
            "terminationGracePeriodSeconds": 0,
            // Elsewhere it would be refused, and that is another case.
            "nodeSelector": { (REGION): "us-west-2" },
            "securityContext": { "runAsNonRoot": true, "runAsUser": 10002, "fsGroup": 10002, "seccompProfile": { "type": "RuntimeDefault" } },
            "containers": [{
                "name": "thief", "image": "postgres:17", "imagePullPolicy": "IfNotPresent", "command": ["sleep", "infinity"],
                "securityContext": { "allowPrivilegeEscalation": false, "capabilities": { "drop": ["ALL"] } },
                "volumeMounts": [{ "name": "tls", "mountPath": "/stolen", "readOnly": true }],
            }],
            "volumes": [{ "name": "tls", "secret": { "secretName": format!("{thief}-tls") } }],
        },
    });
    scope.apply(&manifest).await?;
    let running = wait_for(scope.api::<Pod>(), &pod, |p| {
        p.status.as_ref().and_then(|s| s.phase.as_deref()) == Some("Running")
    });
    tokio::time::timeout(LIMIT, running)
        .await
        .context("the thief doesn't start")??;
    let script = format!(
        "cd /tmp; rm -rf wal key; mkdir wal; cat /stolen/tls.key > key; chmod 600 key; date +%s.%N; \
         pg_receivewal --no-loop --directory wal --dbname 'host={} port=5432 user=domicile_replication \
         sslmode=verify-full sslrootcert=/stolen/ca.crt sslcert=/stolen/tls.crt sslkey=/tmp/key' 2>said; date +%s.%N; cat said",
        victim.name
    );
    let (before, wall) = (Instant::now(), wall());
    let command = ["timeout", "60", "bash", "-c", &script];
    let said = scope.exec(&pod, &command).await?;
    let mut lines = said.lines();
    let mut number = || -> Result<f64> {
        let line = lines.next().context("the thief says nothing")?;
        line.parse()
            .with_context(|| format!("the thief says {line}"))
    };
    let (begin, end) = (number()?, number()?);
    ensure!(
        said.contains("terminating connection due to administrator command"),
        "{}: {said}",
        victim.name
    );
    let words = format!("with the certificate of {thief}");
    let by = format!("{} cuts it off", victim.name);
    let found = ground.history.first(&victim.store, before, LIMIT, |s| {
        let mut all = s.resident.2.split("; somebody");
        s.resident.0 == "False" && all.any(|w| w.contains(&words) && w.contains(&by))
    });
    // Both by the wall's clock, in seconds since `begin`.
    let found = found.await?.duration_since(before).as_secs_f64() + wall - begin;
    let fenced = end - begin;
    let mut violations = Vec::new();
    if found > GOAL || fenced > GOAL {
        violations.push(format!(
            "cut off after {fenced:.2} s, said after {found:.2} s"
        ));
    }
    let what = format!("{} by {thief}", victim.name);
    Ok(Sample {
        found: found.max(0.0),
        fenced,
        what,
        violations,
    })
}

fn wall() -> f64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH);
    since.unwrap_or(Duration::ZERO).as_secs_f64()
}
