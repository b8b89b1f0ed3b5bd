//! The product on the test bed, through the interface a user has.
//!
//! Needs a running test bed with the chart installed (`scripts/test` brings both up), hence the feature
//! `cluster`. One test at a time: they share the nodes.

use std::collections::BTreeSet;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use e2e::harness::{Harness, Instance, PATIENCE, Scope, Write, condition, instances, wait_for};
use e2e::residency::failovers;
use e2e::residency::ground::Ground;
use k8s_openapi::api::apps::v1::Deployment;
use k8s_openapi::api::core::v1::{
    Node, PersistentVolume, PersistentVolumeClaim, Pod, Secret, Service, ServiceAccount,
};
use k8s_openapi::api::discovery::v1::EndpointSlice;
use k8s_openapi::api::policy::v1::PodDisruptionBudget;
use k8s_openapi::api::rbac::v1::{Role, RoleBinding};
use kube::api::{DeleteParams, DynamicObject, ListParams, Patch, PatchParams};
use kube::{Api, ResourceExt};
use serde_json::json;

const SAMPLE: [(&str, i32); 2] = [("us-west", 2), ("us-east", 1)];

/// Waits until `sql` on `instance` gives `wanted`. Replay on a standby is asynchronous, and PostgreSQL has no
/// event for it: asked again, bounded.
async fn sql_until(scope: &Scope, instance: &str, sql: &str, wanted: &str) -> Result<()> {
    let deadline = tokio::time::Instant::now() + Duration::from_secs(60);
    loop {
        let got = scope.sql(instance, "app", sql).await;
        match got {
            Ok(ref got) if got == wanted => return Ok(()),
            _ if tokio::time::Instant::now() > deadline => {
                anyhow::bail!("{instance}: {sql} gives {got:?} instead of {wanted} after 60 s")
            }
            _ => tokio::time::sleep(Duration::from_millis(200)).await,
        }
    }
}

#[tokio::test]
async fn a_store_is_placed_as_asked_and_rows_reach_every_standby() -> Result<()> {
    let harness = Harness::attach().await?;
    let scope = harness.namespace("e2e-created").await?;
    scope
        .apply(&scope.manifest("consumers", &SAMPLE, |_| {}))
        .await?;
    let store = scope.wait_ready("consumers").await?;

    let all = instances(&store)?;
    let regions: Vec<&str> = all.iter().map(|i| i.region.as_str()).collect();
    assert_eq!(regions, ["us-west", "us-west", "us-east"]);
    let zones: BTreeSet<&str> = all.iter().map(|i| i.zone.as_str()).collect();
    assert_eq!(zones.len(), 3, "spread over zones: {all:?}");
    for Instance {
        name,
        region,
        zone,
        node,
        ..
    } in &all
    {
        let found = Api::<Node>::all(harness.client()).get(node).await?;
        assert_eq!(
            found.labels()["node-restriction.kubernetes.io/domicile-region"],
            *region,
            "{name}"
        );
        assert_eq!(
            found.labels()["topology.kubernetes.io/zone"],
            *zone,
            "{name}"
        );
        let claim = scope.api::<PersistentVolumeClaim>().get(name).await?;
        let volume = claim
            .spec
            .and_then(|s| s.volume_name)
            .context("an unbound claim")?;
        let volume = Api::<PersistentVolume>::all(harness.client())
            .get(&volume)
            .await?;
        let affinity = serde_json::to_string(&volume.spec.and_then(|s| s.node_affinity))?;
        assert!(
            affinity.contains(&format!("\"{node}\"")),
            "the volume of {name} is where its pod is: {affinity}"
        );
    }

    scope.client("east", "us-east-1", "consumers").await?;
    scope.client_sql("east", "create table seen (id int primary key, note text); insert into seen select i, 'row ' || i from generate_series(1, 1000) i").await?;
    assert_eq!(
        scope
            .client_sql("east", "select count(*) from seen")
            .await?,
        "1000"
    );
    for Instance { name, .. } in &all {
        sql_until(
            &scope,
            name,
            "select count(*), sum(id) from seen",
            "1000|500500",
        )
        .await?;
    }
    // Through the -rw and -ro Services as well, each leading where its name says.
    let through = |service: &str, sql: &str| {
        format!(
            "export PGPASSWORD=$(cat /etc/domicile/consumers/password); exec psql \"host={service} user=app dbname=app sslmode=verify-full sslrootcert=/etc/domicile/consumers/ca.crt\" -XAtq -c \"{sql}\""
        )
    };
    for (service, standby) in [("consumers-rw", "f"), ("consumers-ro", "t")] {
        let command = through(service, "select pg_is_in_recovery()");
        let got = harness
            .bed
            .exec(&scope.namespace, "east", &["sh", "-c", &command])
            .await?;
        assert_eq!(got.trim(), standby, "{service}");
    }

    // What the promise rests on is really in force.
    let rule = scope
        .sql("consumers-1", "postgres", "show synchronous_standby_names")
        .await?;
    assert!(
        rule.starts_with("ANY 1 ") && rule.contains("consumers-2") && rule.contains("consumers-3"),
        "{rule}"
    );
    assert_eq!(
        scope
            .sql("consumers-1", "postgres", "show data_checksums")
            .await?,
        "on"
    );
    assert_eq!(scope.sql("consumers-1", "postgres", "select count(*) from pg_stat_ssl s join pg_stat_replication r using (pid) where s.ssl").await?, "2");
    assert_eq!(
        scope
            .sql(
                "consumers-1",
                "postgres",
                "select count(*) from pg_replication_slots where active and slot_type = 'physical'"
            )
            .await?,
        "2"
    );

    // Nobody gets in without TLS, and the superuser not at all over the network.
    for (options, said) in [
        ("user=app sslmode=disable", "no encryption"),
        ("user=postgres sslmode=require", "pg_hba.conf rejects"),
    ] {
        let command = format!(
            "PGPASSWORD=x psql 'host=consumers-rw dbname=app {options}' -c 'select 1' 2>&1; true"
        );
        let got = harness
            .bed
            .exec(&scope.namespace, "east", &["sh", "-c", &command])
            .await?;
        assert!(got.contains(said), "{options}: {got}");
    }
    scope.remove().await
}

#[tokio::test]
async fn a_standby_and_the_primary_come_back_on_their_volumes() -> Result<()> {
    let harness = Harness::attach().await?;
    let scope = harness.namespace("e2e-pods").await?;
    scope
        .apply(&scope.manifest("consumers", &SAMPLE, |_| {}))
        .await?;
    scope.wait_ready("consumers").await?;
    scope.sql("consumers-1", "app", "create table seen (id int primary key); insert into seen select generate_series(1, 100)").await?;
    let claims = || async {
        let all = scope
            .api::<PersistentVolumeClaim>()
            .list(&ListParams::default())
            .await?;
        anyhow::Ok(
            all.iter()
                .map(|c| (c.name_any(), c.uid()))
                .collect::<BTreeSet<_>>(),
        )
    };
    let before = claims().await?;

    for (pod, grace) in [
        ("consumers-3", None),
        ("consumers-2", Some(0)),
        ("consumers-1", None),
        ("consumers-1", Some(0)),
    ] {
        let old = scope
            .sql(
                pod,
                "postgres",
                "select system_identifier from pg_control_system()",
            )
            .await?;
        scope.replace_pod(pod, grace).await?;
        let store = scope
            .wait("consumers", PATIENCE, |s| {
                condition(s, "Ready").is_some_and(|c| c.0 == "True")
                    // A primary that goes hands over, or is replaced; both are primary in turn.
                    && s.data["status"]["primary"]
                        .as_str()
                        .is_some_and(|p| p != "consumers-3")
            })
            .await
            .with_context(|| format!("after the loss of {pod}"))?;
        assert_eq!(
            scope
                .sql(
                    pod,
                    "postgres",
                    "select system_identifier from pg_control_system()"
                )
                .await?,
            old
        );
        // A write goes through with synchronous replication, and reaches the one that came back.
        let primary = store.data["status"]["primary"]
            .as_str()
            .unwrap_or_default()
            .to_owned();
        scope
            .sql(
                &primary,
                "app",
                "insert into seen select max(id) + 1 from seen",
            )
            .await?;
        let count = scope
            .sql(&primary, "app", "select count(*) from seen")
            .await?;
        sql_until(&scope, pod, "select count(*) from seen", &count).await?;
    }
    for instance in ["consumers-1", "consumers-2", "consumers-3"] {
        sql_until(&scope, instance, "select count(*) from seen", "104").await?;
    }
    assert_eq!(claims().await?, before, "the same volumes");

    // A lost volume of a standby is made again by cloning.
    scope
        .api::<PersistentVolumeClaim>()
        .delete("consumers-3", &DeleteParams::default())
        .await?;
    scope.replace_pod("consumers-3", None).await?;
    scope.wait_ready("consumers").await?;
    sql_until(&scope, "consumers-3", "select count(*) from seen", "104").await?;
    assert_ne!(claims().await?, before);
    scope.remove().await
}

#[tokio::test]
async fn an_operator_killed_in_mid_creation_leaks_nothing() -> Result<()> {
    let harness = Harness::attach().await?;
    let scope = harness.namespace("e2e-killed").await?;
    let operators: Api<Pod> = Api::namespaced(harness.client(), "domicile-system");
    let killed = DeleteParams {
        grace_period_seconds: Some(0),
        ..DeleteParams::default()
    };
    // Killed at different depths: after the first Secret, after the first volume claim, after the first pod.
    for (n, depth) in ["secret", "claim", "pod"].iter().enumerate() {
        let store = format!("killed{n}");
        scope
            .apply(&scope.manifest(&store, &SAMPLE, |_| {}))
            .await?;
        let first = format!("{store}-1");
        match *depth {
            "secret" => {
                drop(wait_for(scope.api::<Secret>(), &format!("{store}-ca"), |_| true).await?);
            }
            "claim" => {
                drop(wait_for(scope.api::<PersistentVolumeClaim>(), &first, |_| true).await?);
            }
            _ => drop(wait_for(scope.api::<Pod>(), &first, |_| true).await?),
        }
        operators
            .delete_collection(&killed, &ListParams::default())
            .await?;
        scope
            .wait_ready(&store)
            .await
            .with_context(|| format!("killed after the first {depth}"))?;

        let instances: Vec<String> = (1..=3).map(|i| format!("{store}-{i}")).collect();
        assert_eq!(scope.owned::<Pod>(&store).await?, instances);
        assert_eq!(
            scope.owned::<PersistentVolumeClaim>(&store).await?,
            instances
        );
        let with = |extra: &[&str]| {
            let mut all = instances.clone();
            all.extend(extra.iter().map(|e| format!("{store}-{e}")));
            all.sort();
            all
        };
        assert_eq!(scope.owned::<Service>(&store).await?, with(&["ro", "rw"]));
        let mut secrets: Vec<String> = instances.iter().map(|i| format!("{i}-tls")).collect();
        secrets.extend([format!("{store}-app"), format!("{store}-ca")]);
        secrets.sort();
        assert_eq!(scope.owned::<Secret>(&store).await?, secrets);
        for owned in [
            scope.owned::<ServiceAccount>(&store).await?,
            scope.owned::<Role>(&store).await?,
            scope.owned::<RoleBinding>(&store).await?,
        ] {
            assert_eq!(owned, [format!("{store}-instance")]);
        }
    }
    // Deleted again, nothing stays: the volumes go too, as the deletion policy says.
    for n in 0..3 {
        let store = format!("killed{n}");
        scope.delete_store(&store).await?;
        nothing_left(&scope, &store).await?;
    }
    scope.remove().await
}

async fn nothing_left(scope: &Scope, store: &str) -> Result<()> {
    let deadline = tokio::time::Instant::now() + Duration::from_secs(90);
    loop {
        let mut left = Vec::new();
        left.extend(scope.owned::<Pod>(store).await?);
        left.extend(scope.owned::<PersistentVolumeClaim>(store).await?);
        left.extend(scope.owned::<Service>(store).await?);
        left.extend(scope.owned::<Secret>(store).await?);
        left.extend(scope.owned::<EndpointSlice>(store).await?);
        left.extend(scope.owned::<Role>(store).await?);
        left.extend(scope.owned::<RoleBinding>(store).await?);
        left.extend(scope.owned::<ServiceAccount>(store).await?);
        left.extend(scope.owned::<PodDisruptionBudget>(store).await?);
        if left.is_empty() {
            return Ok(());
        }
        // The garbage collector tells nobody when it's done.
        ensure!(
            tokio::time::Instant::now() < deadline,
            "left of {store} after 90 s: {left:?}"
        );
        tokio::time::sleep(Duration::from_millis(500)).await;
    }
}

#[tokio::test]
async fn without_a_lawful_node_a_store_waits_and_goes_nowhere_else() -> Result<()> {
    let harness = Harness::attach().await?;
    let scope = harness.namespace("e2e-no-node").await?;
    let cordon = |on: bool| {
        let nodes: Api<Node> = Api::all(harness.client());
        async move {
            for node in ["e1", "e2"] {
                let patch = Patch::Merge(json!({ "spec": { "unschedulable": on } }));
                nodes.patch(node, &PatchParams::default(), &patch).await?;
                wait_for(nodes.clone(), node, |n: &Node| {
                    // The taint follows the flag a moment later.
                    n.spec.as_ref().is_some_and(|s| {
                        s.taints
                            .iter()
                            .flatten()
                            .any(|t| t.key == "node.kubernetes.io/unschedulable")
                            == on
                    })
                })
                .await?;
            }
            anyhow::Ok(())
        }
    };
    cordon(true).await?;
    let outcome = async {
        scope
            .apply(&scope.manifest("consumers", &SAMPLE, |_| {}))
            .await?;
        let store = scope
            .wait("consumers", PATIENCE, |s| {
                s.data["status"]["summary"] == "2/3"
                    && condition(s, "Ready").is_some_and(|c| c.1 == "NoLawfulNode")
            })
            .await?;
        let (_, _, message) = condition(&store, "Ready").context("no Ready condition")?;
        ensure!(
            message.contains("wait for a node in region us-east")
                && message.contains("nothing is placed elsewhere"),
            "{message}"
        );
        ensure!(
            condition(&store, "Resident").is_some_and(|c| c.0 == "True"),
            "what is there is lawful"
        );
        ensure!(
            condition(&store, "Available").is_some_and(|c| c.0 == "True"),
            "and serves"
        );
        for pod in scope.api::<Pod>().list(&ListParams::default()).await? {
            let node = pod.spec.and_then(|s| s.node_name).unwrap_or_default();
            ensure!(node.starts_with('w'), "placed elsewhere: {node}");
        }
        ensure!(
            scope
                .owned::<PersistentVolumeClaim>("consumers")
                .await?
                .len()
                == 2,
            "no third volume anywhere"
        );
        anyhow::Ok(())
    }
    .await;
    cordon(false).await?;
    outcome?;
    scope.wait_ready("consumers").await?;
    scope.remove().await
}

#[tokio::test]
async fn a_copy_whose_node_moves_abroad_is_stopped_and_made_again_inside() -> Result<()> {
    let harness = Harness::attach().await?;
    let scope = harness.namespace("e2e-drift").await?;
    let manifest = scope.manifest("consumers", &SAMPLE, |store| {
        store["spec"]["deletionPolicy"] = json!("Retain");
    });
    scope.apply(&manifest).await?;
    let store = scope.wait_ready("consumers").await?;
    scope.client("east", "us-east-1", "consumers").await?;
    scope
        .client_sql("east", "create table seen as select 1 as id")
        .await?;
    let primary = store.data["status"]["primary"].as_str().unwrap_or_default();
    let all = instances(&store)?;
    let west = |i: &&Instance| i.region == "us-west" && i.name != primary;
    let standby = all.iter().find(west).context("no standby in the west")?;
    let label = |to: &str| {
        let nodes: Api<Node> = Api::all(harness.client());
        let patch = json!({ "metadata": { "labels": { "topology.kubernetes.io/region": to } } });
        let node = standby.node.clone();
        async move {
            nodes
                .patch(&node, &PatchParams::default(), &Patch::Merge(patch))
                .await
        }
    };
    let begin = tokio::time::Instant::now();
    label("eu-central-1").await?;
    let outcome = async {
        let found = scope
            .wait("consumers", PATIENCE, |s| {
                condition(s, "Resident").is_some_and(|c| c.1 == "Outside")
            })
            .await?;
        println!("found after {:.1} s", begin.elapsed().as_secs_f64());
        let (_, _, message) = condition(&found, "Resident").context("no Resident condition")?;
        ensure!(
            message.contains(&format!(
                "{} is on node {}: region eu-central is not permitted for Standby by ResidencyPolicy e2e-records (basis Policy: End-to-end tests)",
                standby.name, standby.node
            )),
            "{message}"
        );
        let fenced = scope
            .wait("consumers", PATIENCE, |s| {
                condition(s, "Resident").is_some_and(|c| c.1 == "Fenced")
            })
            .await?;
        println!("stopped after {:.1} s", begin.elapsed().as_secs_f64());
        let (status, _, message) = condition(&fenced, "Resident").context("no Resident")?;
        ensure!(status == "False" && message.contains("delete the claim"), "{message}");
        let whole = scope
            .wait("consumers", PATIENCE, |s| {
                s.data["status"]["summary"] == "3/3"
                    && instances(s).is_ok_and(|all| all.iter().all(|i| i.name != standby.name))
            })
            .await?;
        println!("whole again after {:.1} s", begin.elapsed().as_secs_f64());
        ensure!(
            condition(&whole, "Resident").is_some_and(|c| c.1 == "Fenced"),
            "the volume is still there, and that is said"
        );
        for i in instances(&whole)? {
            ensure!(i.node != standby.node, "{} is on {}", i.name, i.node);
            sql_until(&scope, &i.name, "select count(*) from seen", "1").await?;
        }
        for pod in scope.api::<Pod>().list(&ListParams::default()).await? {
            let name = pod.name_any();
            let node = pod.spec.and_then(|s| s.node_name).unwrap_or_default();
            ensure!(node != standby.node, "{name} is on {node}");
        }
        scope
            .api::<PersistentVolumeClaim>()
            .get(&standby.name)
            .await
            .context("its volume is kept: only FenceAndErase erases")?;
        anyhow::Ok(())
    }
    .await;
    label("us-west-2").await?;
    outcome?;
    // Back inside, the copy is one too many, and is put away as any other that the spec doesn't ask for.
    scope
        .wait("consumers", PATIENCE, |s| {
            ["Ready", "Resident"]
                .iter()
                .all(|kind| condition(s, kind).is_some_and(|c| c.0 == "True"))
                && instances(s).is_ok_and(|all| all.len() == 3)
        })
        .await?;
    scope.remove().await
}

/// A dozen of the failovers of which `make bench-residency` makes 300.
#[tokio::test]
async fn nobody_is_promoted_where_labels_are_missing_stale_or_forged() -> Result<()> {
    let ground = Ground::make(Harness::attach().await?).await?;
    let (mut promoted, mut wrong) = (0, Vec::new());
    let mut outcome = Ok(());
    for seed in 1..=4 {
        match Box::pin(failovers::round(&ground, seed)).await {
            Ok(all) => {
                for one in all {
                    promoted += one.promoted.len();
                    wrong.extend(one.violations.iter().map(|v| format!("{v}: {one:?}")));
                }
            }
            Err(e) => {
                outcome = Err(e.context(format!("round {seed}")));
                break;
            }
        }
    }
    ground.heal().await?;
    outcome?;
    ensure!(wrong.is_empty(), "{wrong:#?}");
    ensure!(promoted > 3, "hardly any failover: {promoted}");
    ground.scope.remove().await
}

#[tokio::test]
async fn an_authority_is_replaced_and_nobody_is_locked_out() -> Result<()> {
    let harness = Harness::attach().await?;
    let scope = harness.namespace("e2e-authority").await?;
    scope
        .apply(&scope.manifest("consumers", &SAMPLE, |_| {}))
        .await?;
    let before = scope.wait_ready("consumers").await?;
    scope.client("east", "us-east-1", "consumers").await?;
    scope
        .client_sql("east", "create table seen (id int primary key)")
        .await?;
    let authority = || async {
        let secret = scope.api::<Secret>().get("consumers-app").await?;
        let data = secret.data.context("an empty Secret")?;
        let ca = data.get("ca.crt").context("no ca.crt")?;
        let end = "-----END CERTIFICATE-----";
        let all = String::from_utf8(ca.0.clone())?;
        let all = all.split_inclusive(end).map(|c| c.trim().to_owned());
        anyhow::Ok(all.filter(|c| !c.is_empty()).collect::<Vec<_>>())
    };
    let old = authority().await?;
    ensure!(old.len() == 1, "{old:?}");
    // Clients have long enough for the kubelet to bring them the new certificate.
    let asked =
        json!({ "metadata": { "annotations": { "domicile.dev/rotate-authority": "15s" } } });
    scope.patch("consumers", asked).await?;
    let begin = tokio::time::Instant::now();
    let rotated = async {
        let is = |s: &DynamicObject, reason: &str| {
            condition(s, "Certified").is_some_and(|c| c.0 == "True" && c.1 == reason)
        };
        scope
            .wait("consumers", PATIENCE, |s| is(s, "Rotating"))
            .await?;
        println!("announced after {:.1} s", begin.elapsed().as_secs_f64());
        let both = authority().await?;
        ensure!(both.len() == 2 && both.contains(&old[0]), "{both:?}");
        scope
            .wait("consumers", PATIENCE + PATIENCE, |s| is(s, "AsSpecified"))
            .await
    };
    let writes = async {
        // New sessions all the while, each verifying the server by what the pod's Secret says then.
        let mut n = 0;
        loop {
            n += 1;
            scope
                .client_sql("east", &format!("insert into seen values ({n})"))
                .await
                .with_context(|| format!("insert {n}"))?;
            tokio::time::sleep(Duration::from_millis(250)).await;
            if n > 10_000 {
                return anyhow::Ok(());
            }
        }
    };
    let touches = async {
        // The kubelet looks at a pod's Secrets about once a minute, and at once when the pod changes.
        let pods = scope.api::<Pod>();
        for n in 0.. {
            let patch = json!({ "metadata": { "annotations": { "e2e/touched": n.to_string() } } });
            for name in ["consumers-1", "consumers-2", "consumers-3", "east"] {
                pods.patch(name, &PatchParams::default(), &Patch::Merge(&patch))
                    .await?;
            }
            tokio::time::sleep(Duration::from_secs(2)).await;
        }
        anyhow::Ok(())
    };
    let after = tokio::select! {
        after = rotated => after?,
        failed = touches => { failed?; anyhow::bail!("it doesn't end") }
        broken = writes => { broken?; anyhow::bail!("it doesn't end") }
    };
    println!("replaced after {:.1} s", begin.elapsed().as_secs_f64());
    let new = authority().await?;
    ensure!(new.len() == 1 && new != old, "{new:?}");
    for key in ["term", "primary"] {
        assert_eq!(
            after.data["status"][key], before.data["status"][key],
            "{key}"
        );
    }
    let signer = after.data["status"]["instances"][0]["signedBy"].clone();
    assert_ne!(signer, before.data["status"]["instances"][0]["signedBy"]);
    for entry in after.data["status"]["instances"]
        .as_array()
        .into_iter()
        .flatten()
    {
        assert_eq!(entry["trusts"], json!([signer]), "{entry}");
        assert_eq!(entry["signedBy"], signer, "{entry}");
    }
    // Whoever connects from now on knows the new one alone: a standby that comes back, and the next primary.
    scope.replace_pod("consumers-2", Some(0)).await?;
    scope.wait_ready("consumers").await?;
    scope
        .client_sql("east", "insert into seen values (0)")
        .await?;
    scope.remove().await
}

#[tokio::test]
async fn a_forbidden_region_is_refused_at_admission_with_policy_region_and_basis() -> Result<()> {
    let harness = Harness::attach().await?;
    let scope = harness.namespace("e2e-refused").await?;
    let refused = scope
        .apply(&scope.manifest("consumers", &[("us-west", 1), ("eu-central", 1)], |_| {}))
        .await;
    let words = format!("{:#}", refused.err().context("it was accepted")?);
    let wanted = "region eu-central is not permitted for Standby by ResidencyPolicy e2e-records (basis Policy: End-to-end tests); permitted for Standby: us-east, us-west";
    ensure!(words.contains(wanted), "{words}");
    scope.remove().await
}

/// Any PostgreSQL from 15 on, in an image made from another Debian with an older C library; and an image of
/// another major version costs one standby, touches no data, and is mended by setting the image back.
#[tokio::test]
async fn an_older_postgresql_serves_and_another_major_version_is_refused() -> Result<()> {
    let harness = Harness::attach().await?;
    let scope = harness.namespace("e2e-older").await?;
    let image = |image: &str| json!({ "spec": { "postgres": { "image": image } } });
    scope
        .apply(&scope.manifest("consumers", &SAMPLE, |s| {
            s["spec"]["postgres"]["image"] = json!("postgres:15");
        }))
        .await?;
    scope.wait_ready("consumers").await?;
    let version = scope
        .sql("consumers-1", "postgres", "show server_version_num")
        .await?;
    ensure!(version.starts_with("15"), "{version}");

    scope.patch("consumers", image("postgres:17")).await?;
    let store = scope
        .wait_condition("consumers", "Stalled", "True", "InstanceFailed")
        .await?;
    let (_, _, message) = condition(&store, "Stalled").context("no Stalled condition")?;
    ensure!(message.contains("PostgreSQL 15"), "{message}");
    ensure!(
        condition(&store, "Available").is_some_and(|c| c.0 == "True"),
        "it serves all the while: {:#}",
        store.data["status"]
    );
    scope
        .sql(
            "consumers-1",
            "app",
            "create table seen (id int); insert into seen values (1)",
        )
        .await?;

    scope.patch("consumers", image("postgres:15")).await?;
    scope.wait_ready("consumers").await?;
    for instance in ["consumers-2", "consumers-3"] {
        sql_until(&scope, instance, "select count(*) from seen", "1").await?;
    }
    scope.remove().await
}

#[tokio::test]
async fn retained_volumes_are_taken_up_by_a_store_of_the_same_name() -> Result<()> {
    let harness = Harness::attach().await?;
    let scope = harness.namespace("e2e-retained").await?;
    let manifest = scope.manifest("consumers", &SAMPLE, |s| {
        s["spec"]["deletionPolicy"] = json!("Retain");
    });
    scope.apply(&manifest).await?;
    let store = scope.wait_ready("consumers").await?;
    let term = store.data["status"]["term"].as_i64();
    scope
        .sql(
            "consumers-1",
            "app",
            "create table seen (id int); insert into seen values (42)",
        )
        .await?;
    scope.delete_store("consumers").await?;
    ensure!(
        scope
            .owned::<PersistentVolumeClaim>("consumers")
            .await?
            .len()
            == 3,
        "the volumes stay"
    );

    scope.apply(&manifest).await?;
    let store = scope.wait_ready("consumers").await?;
    ensure!(
        store.data["status"]["term"].as_i64() > term,
        "a later term: {}",
        store.data["status"]
    );
    sql_until(&scope, "consumers-1", "select id from seen", "42").await?;
    // A new Secret was made meanwhile; its password works.
    scope.client("east", "us-east-1", "consumers").await?;
    ensure!(scope.client_sql("east", "select current_user").await? == "app");
    scope.remove().await
}

#[tokio::test]
async fn two_stores_of_one_name_live_side_by_side_and_a_taken_name_is_said() -> Result<()> {
    let harness = Harness::attach().await?;
    let one = harness.namespace("e2e-one").await?;
    let two = harness.namespace("e2e-two").await?;
    for scope in [&one, &two] {
        scope
            .apply(&scope.manifest("consumers", &[("us-west", 2)], |_| {}))
            .await?;
    }
    // Somebody else's object has a name that a third store needs.
    let taken = json!({ "apiVersion": "v1", "kind": "Service", "metadata": { "name": "taken-rw", "namespace": "e2e-two" }, "spec": { "ports": [{ "port": 1 }] } });
    two.apply(&taken).await?;
    two.apply(&two.manifest("taken", &[("us-west", 2)], |_| {}))
        .await?;
    let store = two
        .wait_condition("taken", "Stalled", "True", "NameTaken")
        .await?;
    let (_, _, message) = condition(&store, "Stalled").context("no Stalled condition")?;
    ensure!(
        message.contains("Service taken-rw exists and is not this store's"),
        "{message}"
    );
    for scope in [&one, &two] {
        scope.wait_ready("consumers").await?;
    }
    ensure!(
        two.api::<Service>()
            .get("taken-rw")
            .await?
            .spec
            .and_then(|s| s.ports)
            .is_some_and(|p| p[0].port == 1),
        "left alone"
    );
    // It goes; the store comes up by itself.
    two.api::<Service>()
        .delete("taken-rw", &DeleteParams::default())
        .await?;
    two.wait_ready("taken").await?;
    one.remove().await?;
    two.remove().await
}

#[tokio::test]
async fn z_the_operator_is_upgraded_while_stores_serve() -> Result<()> {
    let harness = Harness::attach().await?;
    let scope = harness.namespace("e2e-upgrade").await?;
    scope
        .apply(&scope.manifest("consumers", &[("us-west", 2)], |_| {}))
        .await?;
    scope.wait_ready("consumers").await?;
    let before: Vec<_> = scope
        .api::<Pod>()
        .list(&ListParams::default())
        .await?
        .iter()
        .map(ResourceExt::uid)
        .collect();
    let deployments: Api<Deployment> = Api::namespaced(harness.client(), "domicile-system");
    for scale in [0, 2] {
        let patch = Patch::Merge(json!({ "spec": { "replicas": scale } }));
        deployments
            .patch("domicile-operator", &PatchParams::default(), &patch)
            .await?;
        wait_for(
            deployments.clone(),
            "domicile-operator",
            |d: &Deployment| {
                d.status.as_ref().is_some_and(|s| {
                    s.ready_replicas.unwrap_or(0) == scale && s.replicas.unwrap_or(0) == scale
                })
            },
        )
        .await?;
        // Without an operator the store serves all the same.
        scope
            .sql(
                "consumers-1",
                "app",
                "create table if not exists seen (id int); insert into seen values (1)",
            )
            .await?;
    }
    scope.wait_ready("consumers").await?;
    let after: Vec<_> = scope
        .api::<Pod>()
        .list(&ListParams::default())
        .await?
        .iter()
        .map(ResourceExt::uid)
        .collect();
    ensure!(before == after, "no pod was touched");
    scope.remove().await
}

/// Nothing happens, so nothing is written: neither by the operator nor by an instance, the leader's lease and what
/// is attested hourly aside.
#[tokio::test]
async fn zz_five_quiet_minutes_cost_the_api_server_nothing() -> Result<()> {
    const QUIET: Duration = Duration::from_secs(300);
    let harness = Harness::attach().await?;
    let scope = harness.namespace("e2e-quiet").await?;
    for store in ["one", "two"] {
        scope.apply(&scope.manifest(store, &SAMPLE, |_| {})).await?;
    }
    for store in ["one", "two"] {
        scope.wait_ready(store).await?;
    }
    // Whatever is still on its way has a minute to arrive; the log is all there is to ask.
    let deadline = tokio::time::Instant::now() + Duration::from_secs(60);
    loop {
        let begin = jiff::Timestamp::now();
        tokio::time::sleep(Duration::from_secs(10)).await;
        let writes = harness.writes(begin)?;
        let attests = |w: &Write| w.object.ends_with("-attestations");
        if writes.iter().all(|w| w.resource == "leases" || attests(w)) {
            break;
        }
        ensure!(
            tokio::time::Instant::now() < deadline,
            "still writing a minute after Ready: {writes:#?}"
        );
    }
    let begin = jiff::Timestamp::now();
    tokio::time::sleep(QUIET).await;
    let writes = harness.writes(begin)?;
    let (leases, rest): (Vec<_>, Vec<_>) = writes.into_iter().partition(|w| w.resource == "leases");
    // Each store is attested once an hour, and once more for what came last.
    let (attested, others): (Vec<_>, Vec<_>) = rest
        .into_iter()
        .partition(|w| w.resource == "configmaps" && w.object.ends_with("-attestations"));
    ensure!(attested.len() <= 4, "attested all the time: {attested:#?}");
    ensure!(
        others.is_empty(),
        "written in {QUIET:?} of quiet: {others:#?}"
    );
    ensure!(
        !leases.is_empty(),
        "the audit log shows the lease's renewals, or it shows nothing at all"
    );
    ensure!(
        leases.len() as u64 <= QUIET.as_secs(),
        "{} lease writes in {QUIET:?}",
        leases.len()
    );
    println!("{} lease writes in {QUIET:?}, and no other", leases.len());
    scope.remove().await
}
