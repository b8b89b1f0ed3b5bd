//! Attestations against an API server in memory: what is kept, by whom, and what comes of tampering.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};

use axum::body::to_bytes;
use axum::http::{Method, Request, Response, StatusCode};
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use jiff::{SignedDuration, Timestamp};
use kube::Client;
use kube::client::Body;
use kube::runtime::events::{Recorder, Reporter};
use kube::runtime::reflector;
use serde_json::{Value, json};

use super::super::attest::{Attestor, Kept, attest};
use super::super::observe::Observed;
use super::world::{node, sample, settings};
use crate::api::conditions::{Verdict, reasons};
use crate::operator::context::{Context, Metrics};
use crate::residency::attestation::chain::{Checked, Export, Known, verify};
use crate::residency::attestation::seal::PublicKey;
use crate::residency::attestation::{Body as Said, Kind};

const MAP: &str = "/api/v1/namespaces/ns/configmaps/consumers-attestations";
const KEY: &str = "/api/v1/namespaces/system/secrets/domicile-attestation-key";
const PUBLISHED: &str = "/api/v1/namespaces/system/configmaps/domicile-attestation-keys";

/// Objects by path, as the API server keeps them.
#[derive(Clone, Default)]
struct Server {
    objects: Arc<Mutex<BTreeMap<String, Value>>>,
    versions: Arc<Mutex<u64>>,
    /// Writes other than of events.
    writes: Arc<Mutex<Vec<String>>>,
    events: Arc<Mutex<Vec<Value>>>,
    /// How many writes were refused since the object had changed.
    conflicts: Arc<Mutex<u32>>,
}

fn merge(into: &mut Value, patch: &Value) {
    match (into.as_object_mut(), patch.as_object()) {
        (Some(map), Some(changes)) => {
            for (key, value) in changes {
                if value.is_null() {
                    map.remove(key);
                } else {
                    merge(map.entry(key.clone()).or_insert(Value::Null), value);
                }
            }
        }
        _ if patch.is_object() => {
            *into = json!({});
            merge(into, patch);
        }
        _ => *into = patch.clone(),
    }
}

fn refusal(code: u16, reason: &str) -> (u16, Value) {
    let status = json!({ "kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Failure",
        "message": format!("refused: {reason}"), "reason": reason, "code": code });
    (code, status)
}

impl Server {
    fn client(&self) -> Client {
        let server = self.clone();
        let service = tower::service_fn(move |request: Request<Body>| {
            let server = server.clone();
            async move {
                let (parts, body) = request.into_parts();
                let bytes = to_bytes(axum::body::Body::new(body), 4 << 20)
                    .await
                    .unwrap();
                let body: Value = serde_json::from_slice(&bytes).unwrap_or_default();
                // Others are served between two requests of the same client.
                tokio::task::yield_now().await;
                let (code, value) = server.serve(&parts.method, parts.uri.path(), &body);
                Ok::<_, std::convert::Infallible>(
                    Response::builder()
                        .status(StatusCode::from_u16(code).unwrap())
                        .body(Body::from(value.to_string().into_bytes()))
                        .unwrap(),
                )
            }
        });
        Client::new(service, "ns")
    }

    fn serve(&self, method: &Method, path: &str, body: &Value) -> (u16, Value) {
        if path.ends_with("/events") {
            self.events.lock().unwrap().push(body.clone());
            return (201, body.clone());
        }
        let mut objects = self.objects.lock().unwrap();
        let mut version = self.versions.lock().unwrap();
        *version += 1;
        let note = |path: &str| {
            self.writes.lock().unwrap().push(path.to_owned());
        };
        match method.as_str() {
            "GET" => objects
                .get(path)
                .map_or_else(|| refusal(404, "NotFound"), |o| (200, o.clone())),
            "POST" => {
                let path = format!("{path}/{}", body["metadata"]["name"].as_str().unwrap());
                if objects.contains_key(&path) {
                    return refusal(409, "AlreadyExists");
                }
                let mut object = body.clone();
                for (key, text) in body["stringData"].as_object().into_iter().flatten() {
                    object["data"][key] = json!(STANDARD.encode(text.as_str().unwrap()));
                }
                object["metadata"]["uid"] = json!(format!("uid-{version}"));
                object["metadata"]["resourceVersion"] = json!(version.to_string());
                objects.insert(path.clone(), object.clone());
                note(&path);
                (201, object)
            }
            "PATCH" => {
                let Some(object) = objects.get_mut(path) else {
                    return refusal(404, "NotFound");
                };
                for key in ["uid", "resourceVersion"] {
                    let wanted = &body["metadata"][key];
                    if !wanted.is_null() && *wanted != object["metadata"][key] {
                        *self.conflicts.lock().unwrap() += 1;
                        return refusal(409, "Conflict");
                    }
                }
                merge(object, body);
                object["metadata"]["resourceVersion"] = json!(version.to_string());
                note(path);
                (200, object.clone())
            }
            other => panic!("{other} {path}"),
        }
    }

    fn get(&self, path: &str) -> Value {
        self.objects
            .lock()
            .unwrap()
            .get(path)
            .cloned()
            .unwrap_or_default()
    }

    fn change(&self, path: &str, change: impl FnOnce(&mut Value)) {
        let mut objects = self.objects.lock().unwrap();
        change(objects.get_mut(path).unwrap());
    }

    /// Changes one entry by hand.
    fn put(&self, key: &str, value: Option<Value>) {
        self.change(MAP, |map| {
            let data = map["data"].as_object_mut().unwrap();
            match value {
                Some(value) => data.insert(key.to_owned(), value),
                None => data.remove(key),
            };
        });
    }

    fn writes(&self) -> Vec<String> {
        std::mem::take(&mut self.writes.lock().unwrap())
    }

    fn alarms(&self) -> Vec<String> {
        let events = self.events.lock().unwrap();
        let broken = events
            .iter()
            .filter(|e| e["reason"] == "AttestationsBroken");
        broken
            .map(|e| e["note"].as_str().unwrap().to_owned())
            .collect()
    }

    fn export(&self) -> Export {
        let kept = Kept::of(&serde_json::from_value(self.get(MAP)).unwrap());
        let kept = kept.entries().unwrap();
        Export::new(kept.envelopes, &kept.keys)
    }

    /// What is kept, as it holds under the published keys with these numbers in the Secret.
    fn checked(&self, numbers: &[u32]) -> Vec<Checked> {
        let published = self.get(PUBLISHED)["data"].clone();
        let ids = numbers.iter().map(|n| {
            let secret = self.get(KEY)["data"][format!("{n}.pem")].clone();
            let pem = STANDARD.decode(secret.as_str().unwrap()).unwrap();
            let pem = String::from_utf8(pem).unwrap();
            let key = crate::residency::attestation::seal::SigningKey::from_pem(&pem).unwrap();
            let id = key.public().id();
            let public = published[format!("{id}.pem")].as_str().unwrap();
            assert_eq!(PublicKey::from_pem(public).unwrap(), key.public());
            id
        });
        let known = Known {
            keys: ids.collect(),
            ..Known::default()
        };
        verify(&self.export(), &known).unwrap()
    }
}

/// One operator process.
fn operator(server: &Server) -> Context {
    let client = server.client();
    let reporter = Reporter {
        controller: "domicile.dev/operator".into(),
        instance: Some("one".into()),
    };
    Context {
        recorder: Recorder::new(client.clone(), reporter),
        client,
        regions: reflector::store().0,
        policies: reflector::store().0,
        nodes: reflector::store().0,
        settings: settings(),
        metrics: Metrics::default(),
        passes: tokio::sync::Semaphore::new(1),
        identity: "one".into(),
        told: Mutex::default(),
        attestor: Attestor::new("system"),
        backlogs: crate::operator::rights::backlog::Backlogs::default(),
    }
}

fn at(minutes: i64) -> Timestamp {
    Timestamp::UNIX_EPOCH + SignedDuration::from_mins(minutes)
}

fn seen() -> Observed {
    let mut world = sample();
    world.settle();
    world.seen
}

/// The same store after its first instance has moved.
fn moved() -> Observed {
    let mut seen = seen();
    seen.nodes.push(node("w3", "us-west", "b"));
    seen.pods[0].spec.as_mut().unwrap().node_name = Some("w3".into());
    seen
}

fn kept(verdict: Option<Verdict>) {
    let verdict = verdict.unwrap();
    assert_eq!(
        (verdict.status, verdict.message.as_str()),
        (
            Some(true),
            "signed and kept in ConfigMap consumers-attestations"
        )
    );
}

#[tokio::test]
async fn an_entry_on_change_and_hourly_and_none_in_between() {
    let server = Server::default();
    let ctx = operator(&server);
    kept(attest(&ctx, &seen(), at(0)).await);
    assert_eq!(server.writes(), [KEY, PUBLISHED, MAP]);
    kept(attest(&ctx, &seen(), at(1)).await);
    assert!(server.writes().is_empty());
    kept(attest(&ctx, &moved(), at(2)).await);
    kept(attest(&ctx, &moved(), at(60)).await);
    assert_eq!(server.writes(), [MAP, MAP]);

    let checked = server.checked(&[1]);
    let full = |c: &Checked| matches!(c.statement.content, Said::Full(_));
    assert_eq!(
        checked.iter().map(full).collect::<Vec<_>>(),
        [true, true, false]
    );
    assert_eq!(
        checked[0].statement.note.as_deref(),
        Some("nothing was kept before")
    );
    let node = |c: &Checked| {
        let found = c.content.findings.iter().find(|f| f.kind == Kind::Instance);
        found.and_then(|f| f.place.node.clone())
    };
    assert_eq!(node(&checked[0]).as_deref(), Some("w1"));
    assert_eq!(node(&checked[2]).as_deref(), Some("w3"));
    // No owner: it outlives the store. No label by which a pass would read it.
    let metadata = &server.get(MAP)["metadata"];
    assert!(metadata["ownerReferences"].is_null());
    assert!(metadata["labels"]["domicile.dev/store"].is_null());
    assert!(server.alarms().is_empty());
}

#[tokio::test]
async fn the_private_key_is_nowhere_but_in_its_secret() {
    let server = Server::default();
    kept(attest(&operator(&server), &seen(), at(0)).await);
    let mut objects = server.objects.lock().unwrap().clone();
    let secret = objects.remove(KEY).unwrap();
    let pem = STANDARD
        .decode(secret["data"]["1.pem"].as_str().unwrap())
        .unwrap();
    let pem = String::from_utf8(pem).unwrap();
    let body = pem.lines().nth(1).unwrap();
    let rest = format!("{objects:?}");
    assert!(!rest.contains("PRIVATE") && !rest.contains(&body[..40]));
}

#[tokio::test]
async fn another_process_goes_on_and_two_at_once_do_not_fork() {
    let server = Server::default();
    let (one, two) = (operator(&server), operator(&server));
    kept(attest(&one, &seen(), at(0)).await);
    kept(attest(&two, &seen(), at(1)).await);
    assert_eq!(server.checked(&[1]).len(), 1);
    // Both see a change at the same time; each reads before the other writes.
    let (seen, moved) = (seen(), moved());
    let (a, b) = tokio::join!(attest(&one, &moved, at(2)), attest(&two, &moved, at(2)));
    kept(a);
    kept(b);
    assert_eq!(server.checked(&[1]).len(), 2);
    assert_eq!(*server.conflicts.lock().unwrap(), 1);
    // One comes back and the other has written meanwhile.
    kept(attest(&two, &seen, at(3)).await);
    kept(attest(&one, &seen, at(4)).await);
    kept(attest(&one, &moved, at(5)).await);
    let sequences: Vec<u64> = server
        .checked(&[1])
        .iter()
        .map(|c| c.statement.sequence)
        .collect();
    assert_eq!(sequences, [1, 2, 3, 4]);
    assert!(server.alarms().is_empty());
}

#[tokio::test]
async fn what_another_hand_changed_is_noticed_and_the_chain_begins_anew_from_what_is_remembered() {
    type Hand = fn(&Server);
    let hands: [(Hand, &str); 4] = [
        (
            |s| {
                s.objects.lock().unwrap().remove(MAP);
            },
            "were removed",
        ),
        (|s| s.put("000000000002.json", None), "ended with entry 1"),
        (
            |s| {
                let first = s.get(MAP)["data"]["000000000001.json"].clone();
                s.put("000000000002.json", Some(first));
            },
            "says that it is number 1",
        ),
        (
            |s| s.put("000000000002.json", Some(json!("{}"))),
            "doesn't hold",
        ),
    ];
    for (hand, words) in hands {
        let server = Server::default();
        let ctx = operator(&server);
        kept(attest(&ctx, &seen(), at(0)).await);
        kept(attest(&ctx, &moved(), at(2)).await);
        let head = server.checked(&[1])[1].hash.clone();
        hand(&server);
        kept(attest(&ctx, &moved(), at(60)).await);
        let checked = server.checked(&[1]);
        assert_eq!(checked.len(), 1, "{words}");
        assert_eq!(checked[0].statement.sequence, 3);
        assert_eq!(checked[0].statement.previous.as_ref(), Some(&head));
        let note = checked[0].statement.note.clone().unwrap();
        assert!(note.contains(words), "{note}");
        assert_eq!(server.alarms(), [note]);
    }
}

#[tokio::test]
async fn a_new_key_is_introduced_by_the_old_one_and_a_lost_one_is_told() {
    let server = Server::default();
    let ctx = operator(&server);
    kept(attest(&ctx, &seen(), at(0)).await);
    let other = Server::default();
    kept(attest(&operator(&other), &seen(), at(0)).await);
    let second = other.get(KEY)["data"]["1.pem"].clone();
    server.change(KEY, |s| s["data"]["2.pem"] = second.clone());
    kept(attest(&ctx, &seen(), at(60)).await);
    kept(attest(&ctx, &seen(), at(61)).await);
    let checked = server.checked(&[1]);
    assert_eq!(checked.len(), 3);
    assert!(checked[1].key == checked[0].key && checked[2].key != checked[1].key);

    // The Secret is lost: another key is made, and no reader takes it for the old one.
    server.objects.lock().unwrap().remove(KEY);
    kept(attest(&ctx, &seen(), at(120)).await);
    assert!(verify(&server.export(), &Known::default()).is_err());
    let alarm = server.alarms().remove(0);
    assert!(
        alarm.contains("which this operator doesn't have"),
        "{alarm}"
    );
    // The published keys are all still there.
    assert_eq!(server.get(PUBLISHED)["data"].as_object().unwrap().len(), 3);
}

#[tokio::test]
async fn what_keeps_it_from_attesting_is_said_and_nothing_of_others_is_touched() {
    let server = Server::default();
    let foreign = json!({ "metadata": { "name": "consumers-attestations" }, "data": { "a": "b" } });
    server
        .objects
        .lock()
        .unwrap()
        .insert(MAP.into(), foreign.clone());
    let ctx = operator(&server);
    let verdict = attest(&ctx, &seen(), at(0)).await.unwrap();
    assert_eq!(
        (verdict.status, verdict.reason),
        (Some(false), reasons::NAME_TAKEN)
    );
    assert_eq!(server.get(MAP), foreign);

    let server = Server::default();
    let bad =
        json!({ "metadata": { "name": "k" }, "data": { "1.pem": STANDARD.encode("not a key") } });
    server.objects.lock().unwrap().insert(KEY.into(), bad);
    let ctx = operator(&server);
    let verdict = attest(&ctx, &seen(), at(0)).await.unwrap();
    assert_eq!(
        (verdict.status, verdict.reason, verdict.message.as_str()),
        (
            Some(false),
            reasons::NOT_ATTESTED,
            "key 1.pem of Secret domicile-attestation-key: not an Ed25519 private key in PEM (PKCS #8)"
        )
    );
    // Mended: the next pass attests.
    server.objects.lock().unwrap().remove(KEY);
    kept(attest(&ctx, &seen(), at(1)).await);

    let mut ending = seen();
    ending.namespace_ending = true;
    assert!(attest(&ctx, &ending, at(2)).await.is_none());
}

#[tokio::test]
async fn what_is_kept_stays_within_its_bound() {
    let server = Server::default();
    let ctx = operator(&server);
    let (a, b) = (seen(), moved());
    for n in 0..160 {
        kept(attest(&ctx, if n % 2 == 0 { &a } else { &b }, at(n)).await);
    }
    let data = server.get(MAP)["data"].clone();
    let size: usize = data
        .as_object()
        .unwrap()
        .iter()
        .map(|(k, v)| k.len() + v.as_str().unwrap().len())
        .sum();
    assert!(size < 1 << 20, "{size}");
    let checked = server.checked(&[1]);
    assert_eq!(checked.last().unwrap().statement.sequence, 160);
    assert!(
        checked[0].statement.sequence > 1,
        "all {} fit",
        checked.len()
    );
}
