//! Requests of people on the test bed: filed over HTTP, carried to PostgreSQL and Redis, proven, while things die.
//!
//! Needs a running test bed with the chart installed, as `cluster` does. What is left of a person is looked for in
//! the tables and keys themselves, and what the ledger says is read as the superuser: nothing of the product's own
//! code judges the product.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use e2e::harness::{Harness, PATIENCE, POLICY, Scope, wait_for};
use e2e::metrics;
use e2e::rights::desk::Gateway;
use e2e::rights::surge::{self, Load};
use e2e::rights::workflow::{ledger, wait_workflow, workflows};
use e2e::rights::{people, sessions};
use k8s_openapi::api::apps::v1::Deployment;
use k8s_openapi::api::autoscaling::v2::HorizontalPodAutoscaler;
use k8s_openapi::api::core::v1::{Pod, PodCondition};
use kube::ResourceExt;
use kube::api::{DeleteParams, ListParams, LogParams, Patch, PatchParams};
use serde_json::{Value, json};

const REGION: &str = "us-west";

/// A store, Redis, people and a workflow over them.
async fn begin(scope: &Scope, people: usize) -> Result<Gateway> {
    scope
        .apply(&scope.manifest("consumers", &[("us-west", 2), ("us-east", 1)], |_| {}))
        .await?;
    sessions::start(scope, "us-west-2").await?;
    scope.wait_ready("consumers").await?;
    scope.client("app", "us-east-1", "consumers").await?;
    people::plant(scope, "app", people).await?;
    scope
        .apply(&people::workflow(
            &scope.namespace,
            "consumers",
            POLICY,
            REGION,
        ))
        .await?;
    wait_workflow(scope, "consumers", "Ready", "True").await?;
    Gateway::of(scope, "consumers").await
}

/// Waits until every one of these requests is closed; the gateway's word, which is then checked elsewhere.
async fn closed(
    gateway: &Gateway,
    ids: &[String],
    patience: Duration,
) -> Result<BTreeMap<String, Value>> {
    let deadline = Instant::now() + patience;
    let mut desk = gateway.desk();
    let mut done = BTreeMap::new();
    while done.len() < ids.len() {
        for id in ids {
            if done.contains_key(id) {
                continue;
            }
            match desk
                .exchange("GET", &format!("/v1/requests/{id}"), None, None)
                .await
            {
                Ok(answer) if answer.status == 200 => {
                    if answer.body["state"] == "closed" {
                        done.insert(id.clone(), answer.body);
                    } else {
                        break;
                    }
                }
                Ok(answer) if answer.status == 404 => {
                    anyhow::bail!("request {id} was acknowledged and is lost")
                }
                _ => break,
            }
        }
        ensure!(
            Instant::now() < deadline,
            "{} of {} requests are closed after {patience:?}",
            done.len(),
            ids.len()
        );
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    Ok(done)
}

#[tokio::test]
async fn deletions_end_with_proof_while_the_primary_dies_and_while_traffic_quadruples() -> Result<()>
{
    const PEOPLE: usize = 600;
    const LEAVING: usize = 300;
    let harness = Harness::attach().await?;
    let scope = harness.namespace("e2e-rights").await?;
    let gateway = begin(&scope, PEOPLE).await?;

    // One alone, to see it happen at once.
    let begin = Instant::now();
    let mut desk = gateway.desk();
    let first = desk
        .file("first", &people::deletion(1), Duration::from_secs(30))
        .await?;
    closed(
        &gateway,
        std::slice::from_ref(&first),
        Duration::from_secs(60),
    )
    .await?;
    println!(
        "one request, filed to closed: {:.3} s",
        begin.elapsed().as_secs_f64()
    );
    assert_eq!(people::left(&scope, "app", 1, 1).await?, [0, 0, 0]);

    // The same key is the same request, and another content under it is refused.
    let again = desk
        .file("first", &people::deletion(1), Duration::from_secs(30))
        .await?;
    assert_eq!(again, first);
    let other = desk
        .exchange(
            "POST",
            "/v1/requests",
            Some("first"),
            Some(&people::deletion(2)),
        )
        .await?;
    assert_eq!(other.status, 409, "{}", other.body);

    // Many, while the primary's pod is killed.
    let filing = async {
        let mut ids = vec![first.clone()];
        for person in 2..=LEAVING {
            let key = format!("person-{person}");
            let id = desk
                .file(&key, &people::deletion(person), Duration::from_secs(60))
                .await?;
            ids.push(id);
            if person == LEAVING / 3 {
                let primary = scope.primary("consumers").await?;
                let now = DeleteParams::default().grace_period(0);
                scope.api::<Pod>().delete(&primary, &now).await?;
            }
        }
        anyhow::Ok(ids)
    };
    let ids = filing.await?;
    let all = closed(&gateway, &ids, Duration::from_secs(120)).await?;
    println!(
        "{} requests with a killed primary: closed {:.1} s after the first",
        ids.len(),
        begin.elapsed().as_secs_f64()
    );

    // Looked for where the data is, not where the product says.
    assert_eq!(people::left(&scope, "app", 1, LEAVING).await?, [0, 0, 0]);
    let others = PEOPLE - LEAVING;
    assert_eq!(
        people::left(&scope, "app", LEAVING + 1, PEOPLE).await?,
        [others, others * 4, others * 2],
        "somebody else's data was deleted"
    );
    for (id, request) in &all {
        let steps = request["steps"].as_array().context("no steps")?;
        let mut names: Vec<&str> = steps.iter().filter_map(|s| s["target"].as_str()).collect();
        names.sort_unstable();
        assert_eq!(names, ["accounts", "sessions"], "{id}");
        for step in steps {
            let outcome = step["outcome"].as_str().unwrap_or_default();
            assert!(["absent", "bounded"].contains(&outcome), "{id}: {step}");
            assert!(
                step["evidence"].as_object().is_some_and(|e| !e.is_empty()),
                "{id}: {step}"
            );
        }
    }

    no_canary(&scope).await?;
    traffic_quadruples(&scope, &gateway).await?;
    scope.remove().await
}

/// Four times the traffic, and the primary's pod killed while it rises: nobody is turned away, nothing is lost, and
/// accepting is as fast as before half a minute later. By requests about people of whom nothing is there.
async fn traffic_quadruples(scope: &Scope, gateway: &Gateway) -> Result<()> {
    let load = Load {
        rates: (20.0, 80.0),
        phases: [10, 20, 40].map(Duration::from_secs),
        patience: Duration::from_secs(60),
        normal: 0.25,
    };
    let person = |number| 1_000_000 + number;
    let outcome = surge::with_failover(scope, "consumers", gateway, load, "surge", person).await?;
    println!(
        "{} requests, from 20 to 80 a second with a killed primary: {:?}",
        outcome.shots.len(),
        outcome.surge
    );
    assert_eq!(outcome.surge.later, 0, "some were told to come again");
    let back = outcome.surge.back.context("it never was as before again")?;
    assert!(back <= 30.0, "as before only after {back} s");
    let deadline = Instant::now() + Duration::from_secs(60);
    let open = "SELECT count(*) FROM ledger.request";
    while ledger(scope, "consumers", open).await? != "0" {
        ensure!(Instant::now() < deadline, "some are still open");
        tokio::time::sleep(Duration::from_millis(200)).await;
    }
    let unproven = ledger(
        scope,
        "consumers",
        "SELECT count(*) FROM ledger.closed c WHERE c.state <> 'closed' OR EXISTS (
            SELECT FROM jsonb_array_elements(c.steps) s WHERE s -> 'outcome' IS NULL OR s -> 'evidence' IS NULL)",
    )
    .await?;
    assert_eq!(unproven, "0", "closed without proof");
    Ok(())
}

/// No identifier is in any log, event, object or ledger column.
async fn no_canary(scope: &Scope) -> Result<()> {
    // Person 217's session key and the number as an identifier's value.
    let mut places: BTreeMap<String, String> = BTreeMap::new();
    let pods = scope.api::<Pod>();
    for pod in pods.list(&ListParams::default()).await? {
        let name = pod.name_any();
        if ["app", sessions::NAME].contains(&name.as_str()) {
            continue;
        }
        let log = pods
            .logs(&name, &LogParams::default())
            .await
            .unwrap_or_default();
        places.insert(format!("log of {name}"), log);
    }
    let workflow = workflows(scope).get("consumers").await?;
    places.insert("workflow".into(), serde_json::to_string(&workflow)?);
    let rows = ledger(
        scope,
        "consumers",
        "SELECT string_agg(query_to_xml('SELECT * FROM ' || quote_ident(schemaname) || '.' || quote_ident(tablename), true, false, '')::text, ' ')
           FROM pg_tables WHERE schemaname NOT IN ('pg_catalog', 'information_schema')",
    )
    .await?;
    ensure!(
        rows.len() > 1000,
        "the ledger is empty: nothing was looked at"
    );
    places.insert("ledger".into(), rows);
    for (place, text) in places {
        for canary in [
            "canary.example",
            "session:217",
            "\"217\"",
            "customerId=217",
            "customerId\":\"217",
        ] {
            assert!(!text.contains(canary), "{canary} is in the {place}");
        }
    }
    Ok(())
}

#[tokio::test]
async fn bad_requests_get_a_clear_answer_and_nothing_else_is_deleted() -> Result<()> {
    let harness = Harness::attach().await?;
    let scope = harness.namespace("e2e-rights-bad").await?;
    let gateway = begin(&scope, 20).await?;
    let mut desk = gateway.desk();
    let cases: [(&str, Vec<u8>, u16, &str); 7] = [
        ("not JSON", b"{\"kind\": ".to_vec(), 400, "json"),
        ("too large", vec![b' '; 10 << 20], 413, ""),
        ("regime", json!({ "kind": "deletion", "regimes": ["mars"], "identifiers": { "customerId": "3" } }).to_string().into_bytes(), 422, "regimes"),
        ("identifier", json!({ "kind": "deletion", "identifiers": { "passport": "3" } }).to_string().into_bytes(), 422, "unknown-identifier"),
        ("kind", json!({ "kind": "access", "identifiers": { "customerId": "3" } }).to_string().into_bytes(), 422, "kind"),
        ("field", json!({ "kind": "deletion", "identifers": { "customerId": "3" } }).to_string().into_bytes(), 422, "field"),
        ("nobody", json!({ "kind": "deletion", "identifiers": {} }).to_string().into_bytes(), 422, "identifier"),
    ];
    for (what, body, status, word) in cases {
        // Each on a connection of its own: one is over after a body that was too large.
        match gateway.desk().raw("POST", "/v1/requests", None, body).await {
            Ok(answer) => {
                // Which of the two a client error is is not what matters here.
                let close = answer.status == status || (status == 422 && answer.status == 400);
                assert!(close, "{what}: {} {}", answer.status, answer.body);
                assert!(
                    answer.body.to_string().to_lowercase().contains(word),
                    "{what}: {}",
                    answer.body
                );
            }
            // A server may end the connection over a body that it doesn't want to read.
            Err(e) => assert_eq!(status, 413, "{what}: {e:#}"),
        }
    }
    // Hostile values are values.
    let mut ids = Vec::new();
    for (n, hostile) in ["4'; DROP TABLE customer; --", "*", "?", "[0-9]", "5 OR 1=1"]
        .iter()
        .enumerate()
    {
        let request = json!({ "kind": "deletion", "identifiers": { "customerId": hostile } });
        ids.push(
            desk.file(&format!("hostile-{n}"), &request, Duration::from_secs(30))
                .await?,
        );
    }
    closed(&gateway, &ids, Duration::from_secs(60)).await?;
    // One that could be two people in a cache's keys is nobody's until a person has looked: never called done.
    let request = json!({ "kind": "deletion", "identifiers": { "customerId": "1:*" } });
    let id = desk
        .file("two-people", &request, Duration::from_secs(30))
        .await?;
    let waiting = Instant::now();
    loop {
        let path = format!("/v1/requests/{id}");
        let answer = desk.exchange("GET", &path, None, None).await?;
        assert_eq!(answer.body["state"], "open", "{}", answer.body);
        if answer.body["steps"]
            .as_array()
            .is_some_and(|s| s.iter().any(|s| s["lastFailure"] == "identifier"))
        {
            break;
        }
        ensure!(
            waiting.elapsed() < Duration::from_secs(60),
            "{}",
            answer.body
        );
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    assert_eq!(people::left(&scope, "app", 1, 20).await?, [20, 80, 40]);

    // Without a token, and with one that may not.
    for (token, status) in [("", 401), ("not.a.token", 401)] {
        let answer = gateway
            .with_token(token)
            .desk()
            .exchange("POST", "/v1/requests", None, Some(&people::deletion(3)))
            .await?;
        assert_eq!(answer.status, status, "{}", answer.body);
    }
    // It would hold the workflow, and with it the namespace: a person's word lets both go.
    let word =
        json!({ "metadata": { "annotations": { "domicile.dev/abandon-requests": "true" } } });
    workflows(&scope)
        .patch("consumers", &PatchParams::default(), &Patch::Merge(word))
        .await?;
    scope.remove().await
}

#[tokio::test]
async fn a_workflow_outside_its_policy_is_refused_and_one_with_a_missing_table_says_so()
-> Result<()> {
    let harness = Harness::attach().await?;
    let scope = harness.namespace("e2e-rights-unlawful").await?;
    let mut outside = people::workflow(&scope.namespace, "consumers", POLICY, "eu-central");
    outside["spec"]["targets"] = json!([outside["spec"]["targets"][1]]);
    let refused = scope.apply(&outside).await.expect_err("accepted");
    assert!(
        format!("{refused:#}").contains("region eu-central is not permitted for Worker"),
        "{refused:#}"
    );

    // The table is made later: nothing is lost meanwhile.
    scope
        .apply(&scope.manifest("consumers", &[("us-west", 2)], |_| {}))
        .await?;
    sessions::start(&scope, "us-west-2").await?;
    scope.wait_ready("consumers").await?;
    scope.client("app", "us-west-2", "consumers").await?;
    scope
        .apply(&people::workflow(
            &scope.namespace,
            "consumers",
            POLICY,
            REGION,
        ))
        .await?;
    wait_workflow(&scope, "consumers", "Ready", "True").await?;
    let gateway = Gateway::of(&scope, "consumers").await?;
    let mut desk = gateway.desk();
    let id = desk
        .file("early", &people::deletion(7), Duration::from_secs(30))
        .await?;
    let tried = Instant::now();
    loop {
        let answer = desk
            .exchange("GET", &format!("/v1/requests/{id}"), None, None)
            .await?;
        assert_eq!(
            answer.body["state"], "open",
            "closed without its table: {}",
            answer.body
        );
        let accounts = answer.body["steps"]
            .as_array()
            .and_then(|s| s.iter().find(|s| s["target"] == "accounts").cloned())
            .context("no step for accounts")?;
        if accounts["attempts"].as_i64().unwrap_or_default() > 0
            || tried.elapsed() > Duration::from_secs(5)
        {
            break;
        }
        tokio::time::sleep(Duration::from_millis(200)).await;
    }
    people::plant(&scope, "app", 20).await?;
    closed(&gateway, std::slice::from_ref(&id), PATIENCE).await?;
    // Sessions that were begun after theirs had ended are no part of the request.
    assert_eq!(people::left(&scope, "app", 7, 7).await?[..2], [0, 0]);
    assert_eq!(people::left(&scope, "app", 8, 20).await?, [13, 52, 26]);
    scope.remove().await
}

/// More traffic than one gateway's share of a processor is enough for: the autoscaler asks for more gateways, which
/// then take their part of it.
#[tokio::test]
async fn the_gateway_grows_with_its_traffic_and_nobody_is_turned_away() -> Result<()> {
    let harness = Harness::attach().await?;
    // One that another run has left would keep that run's namespace from ending.
    metrics::remove(&harness.bed).await?;
    let scope = harness.namespace("e2e-rights-scale").await?;
    scope
        .apply(&scope.manifest("consumers", &[("us-west", 2)], |_| {}))
        .await?;
    scope.wait_ready("consumers").await?;
    scope.client("app", "us-west-2", "consumers").await?;
    people::tables(&scope, "app", 1).await?;
    let mut workflow = people::workflow(&scope.namespace, "consumers", POLICY, REGION);
    workflow["spec"]["targets"] = json!([workflow["spec"]["targets"][0]]);
    workflow["spec"]["gateway"] = json!({
        "replicas": { "min": 1, "max": 3 }, "resources": { "requests": { "cpu": "20m", "memory": "64Mi" } },
    });
    scope.apply(&workflow).await?;
    wait_workflow(&scope, "consumers", "Ready", "True").await?;
    let grown = async {
        metrics::install(&harness.bed).await?;
        grows(&scope).await?;
        // Whatever the operator does to the workflow, the number of its gateways is the autoscaler's.
        workflow["spec"]["workers"]["pools"][0]["max"] = json!(3);
        scope.apply(&workflow).await?;
        wait_workflow(&scope, "consumers", "Ready", "True").await?;
        let after = scope.api::<Deployment>().get(GATEWAYS).await?;
        let asked = after.spec.replicas;
        ensure!(asked > Some(1), "the operator took it back: {asked:?}");
        Ok(())
    };
    let grown = grown.await;
    let removed = metrics::remove(&harness.bed).await;
    grown?;
    removed?;
    scope.remove().await
}

/// The Deployment of the gateways of the workflow `consumers`, and its autoscaler.
const GATEWAYS: &str = "consumers-rights-gateway";

/// Never panics: whoever calls it has to clean up.
async fn grows(scope: &Scope) -> Result<()> {
    let measures = |scaler: &HorizontalPodAutoscaler| {
        let conditions = scaler.status.as_ref().and_then(|s| s.conditions.as_ref());
        conditions.is_some_and(|all| {
            all.iter()
                .any(|c| c.type_ == "ScalingActive" && c.status == "True")
        })
    };
    let measured = wait_for(scope.api(), GATEWAYS, measures);
    let scaler = tokio::time::timeout(PATIENCE, measured)
        .await
        .context("the autoscaler measures nothing")??;
    let desired = scaler.status.map(|s| s.desired_replicas);
    ensure!(desired == Some(1), "without traffic it wants {desired:?}");

    let gateway = Gateway::of(scope, "consumers").await?;
    let load = Load {
        rates: (25.0, 100.0),
        phases: [5, 10, 60].map(Duration::from_secs),
        patience: Duration::from_secs(60),
        normal: 0.25,
    };
    // As long as a connection lives, and some: then the new one has had its part.
    let early = load.phases.iter().sum::<Duration>() - Duration::from_secs(25);
    let begin = Instant::now();
    let grown = async {
        let more = |deployment: &Deployment| {
            let status = deployment.status.as_ref();
            status.and_then(|s| s.ready_replicas) > Some(1)
        };
        let waited = tokio::time::timeout(early, wait_for(scope.api(), GATEWAYS, more)).await;
        waited.with_context(|| format!("there was one gateway for {early:?} of the load"))??;
        anyhow::Ok(begin.elapsed())
    };
    let person = |number| 1_000_000 + number;
    let (shots, grown) = tokio::join!(surge::fire(&gateway, load, "scale", person), grown);
    let (shots, grown) = (shots?, grown?);
    let surge = surge::reckon(&shots, &load, load.risen());
    println!(
        "{} requests, from 25 to 100 a second: a second gateway {:.1} s after the first request; {} without an answer at \
         first; {surge:?}",
        shots.len(),
        grown.as_secs_f64(),
        shots.iter().filter(|s| s.silent > 0).count(),
    );
    surge::none_lost(scope, "consumers", &shots).await?;
    ensure!(surge.later == 0, "some were told to come again: {surge:?}");

    // Where traffic went only the gateways know.
    let selector = "domicile.dev/workflow=consumers,app.kubernetes.io/component=gateway";
    let gateways = ListParams::default().labels(selector);
    let mut took = BTreeMap::new();
    for pod in scope.api::<Pod>().list(&gateways).await? {
        let conditions = pod.status.as_ref().and_then(|s| s.conditions.as_ref());
        let ready =
            |all: &Vec<PodCondition>| all.iter().any(|c| c.type_ == "Ready" && c.status == "True");
        if !conditions.is_some_and(ready) {
            continue;
        }
        let name = pod.name_any();
        let path = format!(
            "/api/v1/namespaces/{}/pods/{name}:8008/proxy/metrics",
            scope.namespace
        );
        let text = scope
            .harness()
            .bed
            .kubectl(&["get", "--raw", &path])
            .await?;
        let filed: f64 = text
            .lines()
            .filter(|l| l.starts_with("rights_requests_total{"))
            .filter_map(|l| l.rsplit(' ').next()?.parse::<f64>().ok())
            .sum();
        took.insert(name, filed);
    }
    println!("requests by gateway: {took:?}");
    // A third may have come when all was over.
    ensure!(
        took.values().filter(|n| **n > 0.0).count() > 1,
        "one had it all to do: {took:?}"
    );
    Ok(())
}
