//! Gateways over real TLS, with a ledger in a real PostgreSQL.

// Each test is one future, and it is polled where it lies.
#![allow(clippy::large_futures)]
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "a test that can't go on should say so and stop"
)]

mod gateway_bed;

use std::collections::BTreeSet;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use axum::body::Body;
use axum::http::Request;
use domicile::rights::secrecy::Keyring;
use gateway_bed::client::{Answer, Client, post};
use gateway_bed::kube::Answers;
use gateway_bed::*;
use jiff::{Timestamp, ToSpan as _};
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

async fn bounded(test: impl Future<Output = ()>) {
    tokio::time::timeout(Duration::from_secs(240), test)
        .await
        .expect("the test ends in time");
}

fn deletion(customer: &str) -> Value {
    json!({"kind": "deletion", "identifiers": {"customerId": customer}})
}

/// A canary as a person's identifiers.
fn canary(n: impl std::fmt::Display) -> Value {
    json!({"kind": "deletion", "identifiers": {
        "customerId": format!("{CANARY}-{n}"), "email": format!("{n}@{CANARY}.example")}})
}

/// What is wrong by an answer 422, if it is one kind of thing at one place: its type and its place.
fn fault(answer: &Answer) -> (String, String) {
    assert_eq!(answer.status, 422, "{answer:?}");
    let errors = answer.body["errors"].as_array().unwrap();
    let of = |e: &Value, what: &str| e[what].as_str().unwrap().to_owned();
    let found: BTreeSet<(String, String)> = errors
        .iter()
        .map(|e| (of(e, "type"), of(e, "pointer")))
        .collect();
    assert_eq!(found.len(), 1, "{answer:?}");
    let (kind, pointer) = found.into_iter().next().unwrap();
    assert_eq!(answer.body["type"], kind.as_str());
    (kind.rsplit('/').next().unwrap().to_owned(), pointer)
}

async fn count(bed: &Bed) -> i64 {
    let client = bed.postgres.superuser().await;
    let row = client
        .query_one("SELECT count(*) FROM ledger.request", &[])
        .await;
    row.unwrap().get(0)
}

/// No identifier in any log, ours or PostgreSQL's.
fn assert_no_leak(bed: &Bed) {
    let (ours, theirs) = (logged(), bed.postgres.log());
    for (whose, log) in [("ours", &ours), ("PostgreSQL's", &theirs)] {
        assert!(log.len() > 100, "{whose} is empty");
        for secret in [CANARY, "forms-token", "portal-token"] {
            // PostgreSQL shows bytes in hexadecimal.
            let hex: String = secret.bytes().map(|b| format!("{b:02x}")).collect();
            for form in [secret, &hex] {
                let line = log.lines().find(|l| l.contains(form));
                assert!(line.is_none(), "{whose}: {line:?}");
            }
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn bad_input_is_refused_with_words_and_good_input_is_kept_as_it_is() {
    bounded(async {
        let bed = Bed::new().await;
        let gateway = bed.gateway(&[]).await;
        let mut client = gateway.client("forms-token");
        let secret = format!("{CANARY}-in-a-wrong-place");

        // JSON.
        for broken in [
            format!(r#"{{"kind": "deletion", "identifiers": {{"customerId": "{secret}""#),
            secret.clone(),
            String::new(),
            format!(r#"{{"identifiers":{{"email":"{secret}","email":"{secret}"}}}}"#),
        ] {
            let mut request = post("/v1/requests", None, &Value::Null);
            *request.body_mut() = Body::from(broken);
            let answer = client.ask(request).await;
            assert_eq!((answer.status, answer.problem()), (400, "malformed-json"));
            assert!(!answer.text.contains(&secret), "{answer:?}");
        }
        let mut request = post("/v1/requests", None, &deletion("1"));
        request.headers_mut().insert("content-type", "text/plain".parse().unwrap());
        assert_eq!(client.ask(request).await.problem(), "unsupported-media-type");

        // Content.
        for (body, kind, pointer) in [
            (json!([]), "wrong-type", ""),
            (json!({"identifiers": {"customerId": "1"}}), "missing-field", ""),
            (json!({"kind": "deletion"}), "missing-field", ""),
            (json!({"kind": secret, "identifiers": {"customerId": "1"}}), "unsupported-kind", "/kind"),
            (json!({"kind": "access", "identifiers": {"customerId": "1"}}), "unsupported-kind", "/kind"),
            (json!({"kind": "deletion", "identifiers": {"customerId": "1"}, secret.clone(): 1}), "unknown-field", ""),
            (json!({"kind": "deletion", "identifiers": {"customerId": "1"}, "regimes": ["eu-gdpr", secret]}), "unknown-regime", "/regimes/1"),
            (json!({"kind": "deletion", "identifiers": {"customerId": "1"}, "regimes": ["kr-pipa"]}), "unknown-regime", "/regimes/0"),
            (json!({"kind": "deletion", "identifiers": {"customerId": "1"}, "regimes": []}), "unknown-regime", "/regimes"),
            (json!({"kind": "deletion", "identifiers": {"customerId": "1", secret.clone(): "email"}}), "unknown-identifier", "/identifiers"),
            (json!({"kind": "deletion", "identifiers": {"email": secret}}), "missing-identifier", "/identifiers"),
            (json!({"kind": "deletion", "identifiers": {"customerId": 1}}), "wrong-type", "/identifiers/customerId"),
            (json!({"kind": "deletion", "identifiers": {"customerId": "   "}}), "invalid-identifier", "/identifiers/customerId"),
            (json!({"kind": "deletion", "identifiers": {"customerId": "a\u{0}b"}}), "invalid-identifier", "/identifiers/customerId"),
            (json!({"kind": "deletion", "identifiers": {"customerId": format!("{secret}\n")}}), "invalid-identifier", "/identifiers/customerId"),
            (json!({"kind": "deletion", "identifiers": {"customerId": "x".repeat(513)}}), "invalid-identifier", "/identifiers/customerId"),
            (json!({"kind": "deletion", "identifiers": {"customerId": "1"}, "channel": secret}), "unknown-channel", "/channel"),
            (json!({"kind": "deletion", "identifiers": {"customerId": "1"}, "receivedAt": secret}), "invalid-time", "/receivedAt"),
            (json!({"kind": "deletion", "identifiers": {"customerId": "1"}, "receivedAt": Timestamp::now().checked_add(1.hour()).unwrap()}), "invalid-time", "/receivedAt"),
            (json!({"kind": "deletion", "identifiers": {"customerId": "1"}, "receivedAt": Timestamp::now().checked_sub((91 * 24).hours()).unwrap()}), "invalid-time", "/receivedAt"),
            (json!({"kind": "deletion", "identifiers": {"customerId": "1"}, "needsApproval": "yes"}), "wrong-type", "/needsApproval"),
        ] {
            let answer = client.post("/v1/requests", &body).await;
            assert_eq!(fault(&answer), (kind.to_owned(), pointer.to_owned()), "{body}");
            assert!(!answer.text.contains(CANARY), "{answer:?}");
        }
        // What is known is said.
        let answer = client.post("/v1/requests", &json!({"kind": "deletion", "identifiers": {"phone": "1"}, "regimes": ["br-lgpd"]})).await;
        assert_eq!(answer.problem(), "invalid-request");
        for known in ["us-ca-ccpa, eu-gdpr", "customerId, email"] {
            assert!(answer.text.contains(known), "{answer:?}");
        }
        for key in ["", "a b", &"k".repeat(256)] {
            let answer = client.file(Some(key), &deletion("1")).await;
            assert_eq!(answer.problem(), "malformed-request", "{key}");
        }
        assert_eq!(client.get("/v2").await.problem(), "unknown-path");
        assert_eq!(client.get("/v1/requests/1").await.problem(), "unknown-request");
        assert_eq!(client.get(&format!("/v1/requests/{}", uuid::Uuid::nil())).await.problem(), "unknown-request");
        let delete = Request::delete("/v1/requests").body(Body::empty()).unwrap();
        assert_eq!(client.ask(delete).await.problem(), "method-not-allowed");
        assert_eq!(client.get("/v1/requests?order=asc").await.problem(), "malformed-request");
        assert_eq!(count(&bed).await, 0);

        // Values that would be something else if they were ever pasted into a statement, a pattern or a path.
        let worker = bed.worker();
        let keyring = Keyring::read(&bed.keys()).unwrap();
        let values = [
            "'; DROP TABLE ledger.request; --", "$1", "\\", "%_", "*", "session:*", "[a-z]?", "{customerId}",
            "../../etc/passwd", "\" OR \"\"=\"", "\u{202e}drowssap", "$(reboot)", "null", "é\u{301}",
        ];
        for value in values {
            let answer = client.file(None, &deletion(value)).await;
            assert_eq!(answer.status, 201, "{value}: {answer:?}");
        }
        assert_eq!(count(&bed).await, values.len() as i64);
        let claimed = worker.claim("accounts", "here", "w", 100, Duration::from_secs(60)).await.unwrap();
        let opened: BTreeSet<String> = claimed
            .iter()
            .map(|c| keyring.open(c.step.request, c.key_epoch, &c.wrapped_key, &c.sealed).unwrap())
            .map(|identifiers| identifiers.0["customerId"].clone())
            .collect();
        let wanted: BTreeSet<String> = values.iter().map(|v| (*v).to_owned()).collect();
        assert_eq!(opened, wanted);
        assert_no_leak(&bed);
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn large_and_slow_requests_take_nobodys_place() {
    bounded(async {
        let bed = Bed::new().await;
        let gateway = bed.gateway(&[]).await;
        let client = gateway.client("forms-token");
        let head = |more: &str| {
            format!(
                "POST /v1/requests HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer forms-token\r\n\
                 Content-Type: application/json\r\n{more}\r\n"
            )
        };

        // Ten megabytes, said beforehand: refused at the sight of the header, while the client still has all of it.
        let mut stream = client.raw().await.unwrap();
        let length = format!("Content-Length: {}\r\n", 10 << 20);
        stream.write_all(head(&length).as_bytes()).await.unwrap();
        stream.flush().await.unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).await.unwrap();
        assert!(answer.starts_with("HTTP/1.1 413"), "{answer}");
        assert!(answer.contains("problems/too-large"), "{answer}");

        // Ten megabytes in pieces, without a word: refused once the limit is passed, and not read to the end.
        let mut stream = client.raw().await.unwrap();
        stream
            .write_all(head("Transfer-Encoding: chunked\r\n").as_bytes())
            .await
            .unwrap();
        let (mut read, mut write) = tokio::io::split(stream);
        let sender = tokio::spawn(async move {
            let piece = [b"10000\r\n".as_slice(), &[b' '; 0x10000], b"\r\n"].concat();
            let mut sent = 0;
            while sent < 10 << 20 && write.write_all(&piece).await.is_ok() {
                sent += 0x10000;
            }
            sent
        });
        let mut answer = vec![0; 12];
        read.read_exact(&mut answer).await.unwrap();
        assert_eq!(answer, b"HTTP/1.1 413");
        drop(read);
        let sent = sender.await.unwrap();
        assert!(sent < 10 << 20, "all of it was read");

        // Headers without end, in size and in time.
        let mut stream = client.raw().await.unwrap();
        let endless = format!("X: {}\r\n", "x".repeat(1000)).repeat(60);
        let _ = stream.write_all(head(&endless).as_bytes()).await;
        let mut answer = String::new();
        let _ = stream.read_to_string(&mut answer).await;
        assert!(answer.is_empty() || answer.starts_with("HTTP/1.1 431"), "{answer}");
        let mut slow = client.raw().await.unwrap();
        slow.write_all(b"GET /v1/counts HTTP/1.1\r\nHost: ").await.unwrap();
        // And a body that never comes.
        let mut waiting = client.raw().await.unwrap();
        waiting
            .write_all(head("Content-Length: 100\r\n").as_bytes())
            .await
            .unwrap();
        let began = Instant::now();
        let mut answer = String::new();
        waiting.read_to_string(&mut answer).await.unwrap();
        assert!(answer.starts_with("HTTP/1.1 408"), "{answer}");
        let mut rest = Vec::new();
        let _ = slow.read_to_end(&mut rest).await;
        assert!(began.elapsed() < Duration::from_secs(40), "{rest:?}");
        until("all places are free again", async || {
            gateway.metric("rights_connections ").await == Some(0.0)
                && gateway.metric("rights_requests_in_flight ").await == Some(0.0)
        })
        .await;
        assert_eq!(count(&bed).await, 0);
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn nobody_unknown_and_nobody_without_the_right_gets_in() {
    bounded(async {
        let bed = Bed::new().await;
        let clients = Authority::new("authority of clients");
        let ca = bed.dir.path().join("clients.crt");
        std::fs::write(&ca, &clients.pem).unwrap();
        let ca = format!("--client-ca={}", ca.display());
        let gateway = bed.gateway(&[&ca, "--allow-cn=mailroom"]).await;
        let https = gateway.addresses.https;
        let file = deletion("1");

        // Without, with a wrong, with another's token.
        let mut nobody = Client::new(https, &gateway.authority, None, None);
        let answer = nobody.file(None, &file).await;
        assert_eq!((answer.status, answer.problem()), (401, "unauthenticated"));
        assert!(
            answer.headers["www-authenticate"]
                .to_str()
                .unwrap()
                .starts_with("Bearer")
        );
        for (method, path) in [
            ("GET", "/v1/requests"),
            ("GET", "/v1/counts"),
            ("POST", "/v1/requests/bulk"),
            ("GET", "/v1/requests/0197f1d2-0000-7000-8000-000000000000"),
            (
                "POST",
                "/v1/requests/0197f1d2-0000-7000-8000-000000000000/withdraw",
            ),
            (
                "POST",
                "/v1/requests/0197f1d2-0000-7000-8000-000000000000/approve",
            ),
            (
                "POST",
                "/v1/requests/0197f1d2-0000-7000-8000-000000000000/extend",
            ),
        ] {
            let ask = || {
                Request::builder()
                    .method(method)
                    .uri(path)
                    .body(Body::empty())
                    .unwrap()
            };
            assert_eq!(nobody.ask(ask()).await.status, 401, "{method} {path}");
            let answer = gateway.client("stranger-token").ask(ask()).await;
            assert_eq!(
                (answer.status, answer.problem()),
                (403, "forbidden"),
                "{method} {path}"
            );
        }
        for token in ["wrong", "api-server-token"] {
            assert_eq!(
                gateway.client(token).file(None, &file).await.status,
                401,
                "{token}"
            );
        }
        let answer = gateway.client("stranger-token").file(None, &file).await;
        assert!(
            answer
                .text
                .contains("verb create on rightsworkflows/requests"),
            "{answer:?}"
        );
        let mut reader = gateway.client("reader-token");
        assert_eq!(reader.file(None, &file).await.status, 403);
        assert_eq!(reader.get("/v1/counts").await.status, 403);
        assert_eq!(count(&bed).await, 0);
        let accepted = gateway.client("forms-token").file(None, &file).await;
        assert_eq!(accepted.status, 201);
        assert_eq!(
            reader
                .get(&format!("/v1/requests/{}", accepted.id()))
                .await
                .status,
            200
        );
        // The document says nothing of anybody.
        let document = nobody.get("/openapi.json").await;
        assert_eq!(document.status, 200);
        assert!(document.body["paths"]["/v1/requests"]["post"].is_object());

        // Certificates: of the right authority and name; of the right authority; of another authority.
        let with = |pair| Client::new(https, &gateway.authority, None, Some(pair));
        assert_eq!(
            with(clients.pair("mailroom", "x"))
                .file(None, &file)
                .await
                .status,
            201
        );
        let answer = with(clients.pair("cellar", "x")).file(None, &file).await;
        assert_eq!((answer.status, answer.problem()), (403, "forbidden"));
        let forged = Authority::new("authority of clients").pair("mailroom", "x");
        let refused = with(forged)
            .try_ask(post("/v1/requests", None, &file))
            .await;
        assert!(refused.is_err(), "{refused:?}");
        // A gateway that wasn't told of an authority takes no certificate for anything.
        let plain = bed.gateway(&[]).await;
        let pair = clients.pair("mailroom", "x");
        let mut client = Client::new(plain.addresses.https, &plain.authority, None, Some(pair));
        assert_eq!(client.file(None, &file).await.status, 401);

        // One question for a token and verb, however many ask; and known ones go on while the API server is away.
        let before = bed.kube.asked();
        let mut client = gateway.client("portal-token");
        for _ in 0..20 {
            assert_eq!(client.file(None, &file).await.status, 201);
        }
        let asked = bed.kube.asked() - before;
        assert!(asked <= 4, "{asked} questions for 20 requests");
        bed.kube.answers(Answers::Refusing);
        let path = format!("/v1/requests/{}/withdraw", accepted.id());
        let answer = gateway
            .client("reader-token")
            .post(&path, &Value::Null)
            .await;
        assert_eq!(
            (answer.status, answer.problem()),
            (503, "authentication-unavailable")
        );
        assert!(answer.headers.contains_key("retry-after"));
        // Longer than an answer is used without asking again; also if it hangs, nobody who is known waits for it.
        bed.kube.answers(Answers::Silent);
        let deadline = Instant::now() + Duration::from_secs(16);
        while Instant::now() < deadline {
            let begin = Instant::now();
            assert_eq!(client.file(None, &file).await.status, 201);
            let took = begin.elapsed();
            assert!(took < Duration::from_secs(2), "{took:?} for somebody known");
            tokio::time::sleep(Duration::from_millis(200)).await;
        }
        assert_no_leak(&bed);
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_request_from_filing_to_its_end() {
    bounded(async {
        let bed = Bed::new().await;
        let gateway = bed.gateway(&[]).await;
        let mut client = gateway.client("forms-token");

        // The same key.
        let first = client.file(Some("key-1"), &canary(1)).await;
        assert_eq!(first.status, 201, "{first:?}");
        let id = first.id();
        assert_eq!(first.headers["location"], format!("/v1/requests/{id}"));
        assert_eq!(first.headers["cache-control"], "no-store");
        assert_eq!(first.body["state"], "open");
        assert_eq!(first.body["regimes"], json!(["us-ca-ccpa", "eu-gdpr"]));
        assert!(first.body["acknowledgeBy"].is_string(), "{first:?}");
        let again = client.file(Some("key-1"), &canary(1)).await;
        assert_eq!((again.status, again.id()), (200, id.clone()), "{again:?}");
        let other = client.file(Some("key-1"), &canary(2)).await;
        assert_eq!((other.status, other.problem()), (409, "idempotency-key-reused"));
        // Another client's key of the same name is another key; no key is no key.
        let foreign = gateway.client("portal-token").file(Some("key-1"), &canary(1)).await;
        assert_eq!(foreign.status, 201, "{foreign:?}");
        let keyless = [client.file(None, &canary(1)).await, client.file(None, &canary(1)).await];
        let ids: BTreeSet<String> = keyless.iter().map(Answer::id).chain([id.clone(), foreign.id()]).collect();
        assert_eq!(ids.len(), 4);
        assert_eq!(count(&bed).await, 4);

        // Workers hear of it.
        let worker = bed.worker();
        let listener = worker.listener();
        listener.heard().await;
        let heard = tokio::spawn(async move { listener.heard().await });
        until("workers hear of a filing", async || {
            client.file(None, &canary("wake")).await;
            heard.is_finished()
        })
        .await;

        // Read, approve, withdraw, extend.
        let path = format!("/v1/requests/{id}");
        let read = client.get(&path).await;
        let targets: Vec<&str> = read.body["steps"].as_array().unwrap().iter()
            .map(|s| s["target"].as_str().unwrap()).collect();
        assert_eq!(targets, ["accounts", "sessions"]);
        let mut waiting = canary(3);
        waiting["needsApproval"] = json!(true);
        let waiting = client.file(None, &waiting).await;
        assert_eq!(waiting.body["state"], "awaiting-approval");
        let its = format!("/v1/requests/{}", waiting.id());
        for _ in 0..2 {
            let approved = client.post(&format!("{its}/approve"), &Value::Null).await;
            assert_eq!((approved.status, &approved.body["state"]), (200, &json!("open")), "{approved:?}");
        }
        let notice = |reason: &str, at: Timestamp| json!({"noticeSentAt": at, "reason": reason});
        let now = Timestamp::now();
        for (body, status) in [
            (notice("because", now), 422),
            (json!({"reason": "complexity"}), 422),
            (notice("complexity", now.checked_add(1.hour()).unwrap()), 422),
            (notice("complexity", now), 200),
            (notice("complexity", now), 200),
        ] {
            let extended = client.post(&format!("{its}/extend"), &body).await;
            assert_eq!(extended.status, status, "{body}: {extended:?}");
        }
        let extended = client.get(&its).await;
        let time = |v: &Value| v.as_str().unwrap().parse::<Timestamp>().unwrap();
        assert!(time(&extended.body["extendedTo"]) > time(&extended.body["answerBy"]));
        for _ in 0..2 {
            let withdrawn = client.post(&format!("{its}/withdraw"), &Value::Null).await;
            assert_eq!((withdrawn.status, &withdrawn.body["state"]), (200, &json!("withdrawn")), "{withdrawn:?}");
        }
        for (what, body) in [("approve", Value::Null), ("extend", notice("complexity", now))] {
            let late = client.post(&format!("{its}/{what}"), &body).await;
            assert_eq!((late.status, late.problem()), (409, "wrong-state"), "{what}");
        }
        // Begun with, it can't be withdrawn.
        let claimed = worker.claim("accounts", "here", "w", 1000, Duration::from_secs(60)).await.unwrap();
        assert!(claimed.iter().any(|c| c.step.request.to_string() == id));
        let late = client.post(&format!("{path}/withdraw"), &Value::Null).await;
        assert_eq!((late.status, late.problem()), (409, "wrong-state"));

        // Paper mail that is nearly due comes first; pages; counts.
        let mut letter = canary(4);
        letter["channel"] = json!("operator");
        letter["receivedAt"] = json!(now.checked_sub((20 * 24).hours()).unwrap());
        let letter = client.file(None, &letter).await;
        assert_eq!(letter.status, 201, "{letter:?}");
        let all = client.get("/v1/requests?limit=500").await;
        let all: Vec<String> = all.body["items"].as_array().unwrap().iter().map(|i| i["id"].as_str().unwrap().to_owned()).collect();
        assert_eq!(all[0], letter.id());
        let (mut paged, mut next) = (Vec::new(), String::new());
        loop {
            let page = client.get(&format!("/v1/requests?limit=2{next}")).await;
            assert_eq!(page.status, 200, "{page:?}");
            for item in page.body["items"].as_array().unwrap() {
                paged.push(item["id"].as_str().unwrap().to_owned());
            }
            match page.body["next"].as_str() {
                Some(cursor) => next = format!("&after={cursor}"),
                None => break,
            }
        }
        assert_eq!(paged, all);
        let due = now.checked_add((15 * 24).hours()).unwrap();
        let soon = client.get(&format!("/v1/requests?due-before={due}")).await;
        assert_eq!(soon.body["items"].as_array().unwrap().len(), 1, "{soon:?}");
        let ended = client.get("/v1/requests?state=withdrawn").await;
        assert_eq!(ended.body["items"][0]["id"], waiting.id());
        let counts = client.get("/v1/counts").await;
        assert_eq!(counts.body["open"], all.len(), "{counts:?}");
        assert_eq!(counts.body["nearestDeadline"], letter.body["answerBy"]);
        let metric = r#"rights_requests_total{type="deletion",regime="eu-gdpr",channel="operator",outcome="accepted"} "#;
        assert_eq!(gateway.metric(metric).await, Some(1.0));
        assert!(!gateway.probe("/metrics").await.1.contains(CANARY));
        assert_no_leak(&bed);
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn one_bad_request_of_a_bulk_keeps_out_none_of_the_others() {
    bounded(async {
        let bed = Bed::new().await;
        let gateway = bed.gateway(&["--rate=10", "--burst=3000"]).await;
        let mut client = gateway.client("forms-token");
        let item = |n: usize| json!({"request": canary(n), "idempotencyKey": format!("k-{n}")});
        let mut items: Vec<Value> = (0..100).map(item).collect();
        items[41]["request"]["identifiers"] = json!({"email": format!("{CANARY}-41")});
        items[42]["request"]["regimes"] = json!([format!("{CANARY}-42")]);
        // The same again, and the same key for another.
        items.push(item(7));
        items.push(json!({"request": canary("other"), "idempotencyKey": "k-8"}));
        let answer = client
            .post("/v1/requests/bulk", &json!({"requests": items}))
            .await;
        assert_eq!(answer.status, 200, "{answer:?}");
        assert!(!answer.text.contains(CANARY));
        let results = answer.body["results"].as_array().unwrap();
        let statuses: Vec<u64> = results
            .iter()
            .map(|r| r["status"].as_u64().unwrap())
            .collect();
        for (n, status) in statuses.iter().enumerate() {
            let wanted = match n {
                41 | 42 => 422,
                100 => 200,
                101 => 409,
                _ => 201,
            };
            assert_eq!(*status, wanted, "{n}: {}", results[n]);
        }
        assert_eq!(results[100]["id"], results[7]["id"]);
        assert_eq!(
            results[42]["problem"]["errors"][0]["pointer"],
            "/requests/42/request/regimes/0"
        );
        let numbers = ["accepted", "repeated", "refused"].map(|n| answer.body[n].as_u64().unwrap());
        assert_eq!(numbers, [98, 1, 3]);
        assert_eq!(count(&bed).await, 98);
        for n in [0, 40, 43, 99] {
            let id = results[n]["id"].as_str().unwrap();
            assert_eq!(client.get(&format!("/v1/requests/{id}")).await.status, 200);
        }
        // The whole again: nothing new.
        let again = client
            .post("/v1/requests/bulk", &json!({"requests": items}))
            .await;
        assert_eq!(again.body["accepted"], 0, "{again:?}");
        assert_eq!(count(&bed).await, 98);

        for (body, kind) in [
            (json!({"requests": []}), "invalid-request"),
            (json!({}), "missing-field"),
            (
                json!({"requests": (0..1001).map(item).collect::<Vec<_>>()}),
                "invalid-request",
            ),
            (json!([]), "wrong-type"),
        ] {
            assert_eq!(
                client.post("/v1/requests/bulk", &body).await.problem(),
                kind
            );
        }
        // A thousand are one transaction.
        let thousand: Vec<Value> = (1000..2000).map(item).collect();
        let answer = client
            .post("/v1/requests/bulk", &json!({"requests": thousand}))
            .await;
        assert_eq!(answer.body["accepted"], 1000, "{}", answer.status);
        // More than the client may.
        let more: Vec<Value> = (3000..4000).map(item).collect();
        let mut limited = None;
        for _ in 0..3 {
            let answer = client
                .post("/v1/requests/bulk", &json!({"requests": more}))
                .await;
            if answer.status != 200 {
                limited = Some(answer);
                break;
            }
        }
        let limited = limited.expect("a limit");
        assert_eq!((limited.status, limited.problem()), (429, "rate-limited"));
        assert!(limited.headers.contains_key("retry-after"));
        assert_no_leak(&bed);
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_too_much_is_refused_before_anything_is_lost_and_a_stop_loses_nothing() {
    bounded(async {
        let bed = Bed::new().await;
        let gateway = bed.gateway(&["--in-flight=8"]).await;
        let https = gateway.addresses.https;
        // A ledger that takes nothing for the moment.
        let superuser = bed.postgres.superuser().await;
        superuser
            .batch_execute("BEGIN; LOCK TABLE ledger.request IN ACCESS EXCLUSIVE MODE")
            .await
            .unwrap();
        let mut tasks = tokio::task::JoinSet::new();
        for n in 0..40 {
            let mut client = gateway.client("forms-token");
            tasks.spawn(async move { client.file(Some(&format!("load-{n}")), &canary(n)).await });
        }
        until("all places are taken and the rest is refused", async || {
            gateway.metric("rights_requests_in_flight ").await == Some(8.0)
                && gateway
                    .metric(r#"rights_refused_total{reason="overloaded"} "#)
                    .await
                    == Some(32.0)
        })
        .await;
        superuser.batch_execute("COMMIT").await.unwrap();
        let mut accepted = Vec::new();
        while let Some(answer) = tasks.join_next().await {
            let answer = answer.unwrap();
            match answer.status {
                201 => accepted.push(answer.id()),
                429 => {
                    assert_eq!(answer.problem(), "overloaded");
                    let after: u64 = answer.headers["retry-after"]
                        .to_str()
                        .unwrap()
                        .parse()
                        .unwrap();
                    assert!((1..10).contains(&after));
                }
                _ => panic!("{answer:?}"),
            }
        }
        assert_eq!(accepted.len(), 8);
        let mut client = gateway.client("forms-token");
        for id in &accepted {
            assert_eq!(client.get(&format!("/v1/requests/{id}")).await.status, 200);
        }
        assert_eq!(count(&bed).await, 8);

        // A stop while filings are under way: they are answered, and the connections end; nobody new gets in.
        superuser
            .batch_execute("BEGIN; LOCK TABLE ledger.request IN ACCESS EXCLUSIVE MODE")
            .await
            .unwrap();
        let mut tasks = tokio::task::JoinSet::new();
        for n in 100..104 {
            let mut client = gateway.client("forms-token");
            tasks.spawn(async move { client.file(None, &canary(n)).await });
        }
        until("four are under way", async || {
            gateway.metric("rights_requests_in_flight ").await == Some(4.0)
        })
        .await;
        gateway.stop.cancel();
        until("it is no longer ready", async || {
            gateway.probe("/readyz").await.0 != 200
        })
        .await;
        until("nobody listens", async || {
            tokio::net::TcpStream::connect(https).await.is_err()
        })
        .await;
        assert_eq!(gateway.probe("/readyz").await.0, 503);
        superuser.batch_execute("COMMIT").await.unwrap();
        while let Some(answer) = tasks.join_next().await {
            let answer = answer.unwrap();
            assert_eq!(answer.status, 201, "{answer:?}");
            accepted.push(answer.id());
        }
        let mut gateway = gateway;
        let ended = tokio::time::timeout(Duration::from_secs(20), &mut gateway.task).await;
        ended.expect("it ends").unwrap().unwrap();
        assert_eq!(count(&bed).await, 12);
        assert_no_leak(&bed);
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn every_acknowledged_request_is_found_after_the_ledger_was_killed() {
    bounded(async {
        let mut bed = Bed::new().await;
        let gateway = Arc::new(bed.gateway(&[]).await);
        let enough = Arc::new(AtomicBool::new(false));
        let mut tasks = tokio::task::JoinSet::new();
        for c in 0..16 {
            let (gateway, enough) = (gateway.clone(), enough.clone());
            tasks.spawn(async move {
                let mut client = gateway.client("forms-token");
                let (mut acknowledged, mut away) = (Vec::new(), 0u32);
                for n in 0.. {
                    if enough.load(Ordering::Relaxed) {
                        break;
                    }
                    let key = format!("kill-{c}-{n}");
                    // As a client does: the same again until it is answered.
                    loop {
                        let request = post("/v1/requests", Some(&key), &canary(&key));
                        let answer = client.try_ask(request).await.expect("an answer");
                        match answer.status {
                            200 | 201 => break acknowledged.push(answer.id()),
                            503 => {
                                assert_eq!(answer.problem(), "ledger-unavailable");
                                assert!(answer.headers.contains_key("retry-after"));
                                away += 1;
                            }
                            429 => {}
                            _ => panic!("{answer:?}"),
                        }
                        tokio::time::sleep(Duration::from_millis(50)).await;
                    }
                }
                (acknowledged, away)
            });
        }
        for round in 0..3 {
            let before = count(&bed).await;
            until("filings go in", async || count(&bed).await > before + 100).await;
            bed.postgres.kill();
            if round == 1 {
                // Longer than a request waits: clients must be told, and not be left hanging.
                until("some are told to come back", async || {
                    gateway
                        .metric(r#"rights_refused_total{reason="ledger-unavailable"} "#)
                        .await
                        .is_some_and(|n| n > 0.0)
                })
                .await;
            }
            bed.postgres.start().await;
        }
        let before = count(&bed).await;
        until("filings go in", async || count(&bed).await > before + 100).await;
        enough.store(true, Ordering::Relaxed);
        let (mut ids, mut away) = (Vec::new(), 0);
        while let Some(done) = tasks.join_next().await {
            let (mut acknowledged, told) = done.unwrap();
            ids.append(&mut acknowledged);
            away += told;
        }
        assert!(away > 0, "nobody was told to come back");
        let distinct: BTreeSet<uuid::Uuid> = ids.iter().map(|id| id.parse().unwrap()).collect();
        assert_eq!(distinct.len(), ids.len(), "two keys gave the same request");
        let superuser = bed.postgres.superuser().await;
        let rows = superuser
            .query("SELECT id FROM ledger.request", &[])
            .await
            .unwrap();
        let there: BTreeSet<uuid::Uuid> = rows.iter().map(|r| r.get(0)).collect();
        let lost = distinct.difference(&there).count();
        assert_eq!(lost, 0, "of {} acknowledged", distinct.len());
        // Each key once: what was tried again is the same request.
        assert_eq!(there.len(), distinct.len());
        println!(
            "{} acknowledged, {away} times told to come back",
            distinct.len()
        );
        assert_no_leak(&bed);
    })
    .await;
}
