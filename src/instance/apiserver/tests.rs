use super::*;
use std::collections::BTreeSet;
use std::sync::Mutex;

use axum::body::{Bytes, to_bytes};
use axum::extract::Request;
use axum::http::{Method, StatusCode};
use axum::response::{IntoResponse as _, Response};
use serde_json::Value;

fn slice(term: Option<i64>, addresses: &[&str]) -> EndpointSlice {
    let mut slice = EndpointSlice {
        address_type: "IPv4".into(),
        ..EndpointSlice::default()
    };
    let wanted = endpoints(term.unwrap_or(0), addresses);
    if let Some(term) = term {
        slice = amended(slice, &wanted).unwrap();
        assert_eq!(slice.annotations()[labels::TERM], term.to_string());
    }
    slice
}

fn endpoints(term: i64, addresses: &[&str]) -> Endpoints {
    Endpoints {
        addresses: addresses.iter().map(|a| a.parse().unwrap()).collect(),
        term,
    }
}

#[test]
fn a_slice_is_written_on_change_and_never_over_a_later_term() {
    let one = endpoints(2, &["10.0.0.1"]);
    assert!(amended(slice(None, &[]), &one).is_some());
    assert!(amended(slice(Some(1), &["10.0.0.1"]), &one).is_some());
    assert!(amended(slice(Some(2), &["10.0.0.1"]), &one).is_none());
    assert!(amended(slice(Some(2), &["10.0.0.2"]), &one).is_some());
    assert!(amended(slice(Some(3), &["10.0.0.2"]), &one).is_none());
    // The other family has a slice of its own.
    let mixed = endpoints(2, &["10.0.0.1", "fd00::1"]);
    let written = amended(slice(None, &[]), &mixed).unwrap();
    assert_eq!(written.endpoints.unwrap().len(), 1);
}

#[test]
fn the_operators_fields_are_not_ours() {
    let entry = InstanceStatus {
        name: "s-1".into(),
        region: Some("r".into()),
        node: Some("n".into()),
        ready: Some(true),
        ..InstanceStatus::default()
    };
    let own = own_fields(&entry);
    assert_eq!((own.region, own.node, own.ready), (None, None, Some(true)));
}

#[test]
fn pauses_grow_to_a_bound() {
    let mut pause = Pause::default();
    for _ in 0..20 {
        assert!(pause.next() <= PAUSE_MAX);
    }
    assert!(pause.next() >= PAUSE_MAX / 2);
}

/// An API server that knows one slice and takes one status, and remembers what it was asked.
#[derive(Default)]
struct Fake {
    asked: Vec<(Method, String, Value)>,
    slice: Value,
    /// Somebody else writes the slice before the next write.
    meddle: bool,
    down: bool,
}

type Shared = Arc<Mutex<Fake>>;

fn answer(fake: &Shared, method: &Method, path: &str, body: &Value) -> Response {
    let mut fake = fake.lock().unwrap();
    fake.asked
        .push((method.clone(), path.to_owned(), body.clone()));
    let refuse = |code: u16| {
        let status = json!({"kind": "Status", "apiVersion": "v1", "status": "Failure", "code": code,
            "reason": if code == 409 { "Conflict" } else { "InternalError" }, "message": "no"});
        (StatusCode::from_u16(code).unwrap(), axum::Json(status)).into_response()
    };
    if fake.down {
        return refuse(500);
    }
    if path.contains("privacydatastores") {
        return axum::Json(store_object("1")).into_response();
    }
    if *method == Method::PUT {
        let bump = |v: &Value| (v.as_str().unwrap().parse::<u32>().unwrap() + 1).to_string();
        let version = fake.slice["metadata"]["resourceVersion"].clone();
        if std::mem::take(&mut fake.meddle) {
            let next = bump(&version);
            fake.slice["metadata"]["resourceVersion"] = json!(next);
            return refuse(409);
        }
        if body["metadata"]["resourceVersion"] != version {
            return refuse(409);
        }
        let next = bump(&version);
        fake.slice = body.clone();
        fake.slice["metadata"]["resourceVersion"] = json!(next);
    }
    axum::Json(fake.slice.clone()).into_response()
}

fn store_object(version: &str) -> Value {
    json!({
        "apiVersion": "domicile.dev/v1alpha1", "kind": "PrivacyDataStore",
        "metadata": {"name": "s", "uid": "u", "resourceVersion": version},
        "spec": {"residencyPolicyRef": {"name": "p"}, "placement": [{"region": "r", "instances": 2}],
                 "storage": {"size": "1Gi"}},
    })
}

fn client_of(fake: &Shared) -> Client {
    let shared = fake.clone();
    let service = tower::service_fn(move |request: Request<kube::client::Body>| {
        let fake = shared.clone();
        async move {
            let (parts, body) = request.into_parts();
            let bytes: Bytes = to_bytes(axum::body::Body::new(body), 1 << 20)
                .await
                .unwrap();
            let body = serde_json::from_slice(&bytes).unwrap_or(Value::Null);
            let path = parts.uri.to_string();
            Ok::<_, std::convert::Infallible>(answer(&fake, &parts.method, &path, &body))
        }
    });
    Client::new(service, "n")
}

fn writer() -> (Shared, Writer) {
    let fake = Shared::default();
    fake.lock().unwrap().slice = json!({
        "apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice", "addressType": "IPv4",
        "metadata": {"name": "s-rw", "resourceVersion": "5"}, "endpoints": [],
    });
    let client = client_of(&fake);
    let config = Config::from(super::super::config::Args {
        store: "s".into(),
        namespace: "n".into(),
        instance: "s-1".into(),
        address: "10.0.0.1".parse().unwrap(),
        volume: "/".into(),
        run_dir: "/".into(),
        tls: "/".into(),
        app: "/".into(),
        bin: None,
    });
    let writer = Writer {
        stores: Api::namespaced(client.clone(), "n"),
        slices: Api::namespaced(client, "n"),
        config,
        written: None,
        read_write: None,
        read_only: None,
        routed: None,
    };
    (fake, writer)
}

fn wish() -> Wish {
    Wish {
        uid: Some("u".into()),
        entry: InstanceStatus {
            name: "s-1".into(),
            ready: Some(true),
            ..InstanceStatus::default()
        },
        create: true,
        configuration: None,
        failover: None,
        read_write: Some(Endpoints {
            addresses: BTreeSet::from(["10.0.0.1".parse().unwrap()]),
            term: 1,
        }),
        read_only: None,
    }
}

fn writes(fake: &Shared) -> usize {
    let fake = fake.lock().unwrap();
    fake.asked
        .iter()
        .filter(|(m, _, _)| *m != Method::GET)
        .count()
}

fn view(instances: &Value) -> PrivacyDataStore {
    let mut object = store_object("2");
    object["status"] = json!({"instances": instances});
    serde_json::from_value(object).unwrap()
}

#[tokio::test]
async fn the_witness_is_written_only_as_it_was_read() {
    use super::super::store::Shelf as _;
    let fake = Shared::default();
    fake.lock().unwrap().slice = json!({
        "apiVersion": "v1", "kind": "ConfigMap",
        "metadata": {"name": "s-witness", "uid": "u", "resourceVersion": "5", "labels": {"a": "b"}},
    });
    let (tell, client) = watch::channel(None);
    let witness = Witness {
        client,
        namespace: "n".into(),
        name: names::witness("s"),
    };
    let early = witness.read().await.unwrap_err().to_string();
    assert!(early.contains("no way to the API server yet"), "{early}");
    tell.send_replace(Some(client_of(&fake)));
    let mut object = witness.read().await.unwrap().unwrap();
    let text = ("register".to_owned(), "{}".to_owned());
    object.data = Some(std::collections::BTreeMap::from([text]));
    assert!(witness.replace(object.clone()).await.unwrap());
    // As it was read, it isn't there any more.
    assert!(!witness.replace(object).await.unwrap());
    let fake = fake.lock().unwrap();
    assert_eq!(fake.slice["data"]["register"], "{}");
    assert_eq!(fake.slice["metadata"]["labels"]["a"], "b");
    let (_, path, _) = &fake.asked[1];
    assert!(
        path.contains("/api/v1/namespaces/n/configmaps/s-witness"),
        "{path}"
    );
}

#[tokio::test]
async fn a_wish_is_written_once_and_then_it_is_quiet() {
    let (fake, mut writer) = writer();
    assert!(writer.fulfil(&wish(), None).await.unwrap());
    let (method, path, body) = fake
        .lock()
        .unwrap()
        .asked
        .iter()
        .find(|(m, _, _)| *m == Method::PATCH)
        .cloned()
        .unwrap();
    assert_eq!(method, Method::PATCH);
    assert_eq!(
        path,
        "/apis/domicile.dev/v1alpha1/namespaces/n/privacydatastores/s/status?&force=true&fieldManager=domicile-instance%2Fs-1"
    );
    assert_eq!(
        body,
        json!({"apiVersion": "domicile.dev/v1alpha1", "kind": "PrivacyDataStore",
               "metadata": {"name": "s", "uid": "u"},
               "status": {"instances": [{"name": "s-1", "ready": true}]}})
    );
    assert_eq!(writes(&fake), 2, "the status and the slice");
    // Also before the watch has brought it back, and after, with the operator's fields beside ours.
    assert!(!writer.fulfil(&wish(), None).await.unwrap());
    let back = view(&json!([{"name": "s-1", "ready": true, "region": "r"}]));
    assert!(!writer.fulfil(&wish(), Some(&back)).await.unwrap());
    writer.written = None;
    assert!(!writer.fulfil(&wish(), Some(&back)).await.unwrap());
    assert_eq!(writes(&fake), 2);
    // Somebody else changed it.
    let changed = view(&json!([{"name": "s-1", "ready": false}]));
    assert!(writer.fulfil(&wish(), Some(&changed)).await.unwrap());
    assert_eq!(writes(&fake), 3);
}

#[tokio::test]
async fn an_entry_that_was_taken_out_is_not_brought_back_by_a_goodbye() {
    let (fake, mut writer) = writer();
    let goodbye = Wish {
        create: false,
        read_write: None,
        ..wish()
    };
    assert!(
        !writer
            .fulfil(&goodbye, Some(&view(&json!([]))))
            .await
            .unwrap()
    );
    assert_eq!(writes(&fake), 0);
}

#[tokio::test]
async fn a_conflict_is_read_again_and_a_later_term_is_left_alone() {
    let (fake, mut writer) = writer();
    fake.lock().unwrap().meddle = true;
    writer.fulfil(&wish(), None).await.unwrap();
    let slice = fake.lock().unwrap().slice.clone();
    assert_eq!(slice["endpoints"][0]["addresses"], json!(["10.0.0.1"]));
    assert_eq!(slice["metadata"]["annotations"]["domicile.dev/term"], "1");

    fake.lock().unwrap().slice["metadata"]["annotations"]["domicile.dev/term"] = json!("2");
    let before = writes(&fake);
    let mut moved = wish();
    moved.read_write.as_mut().unwrap().addresses = BTreeSet::from(["10.0.0.9".parse().unwrap()]);
    assert!(!writer.fulfil(&moved, None).await.unwrap());
    assert_eq!(writes(&fake), before);
}

#[tokio::test(start_paused = true)]
async fn what_could_not_be_written_is_written_when_the_api_server_is_back() {
    let (fake, writer) = writer();
    fake.lock().unwrap().down = true;
    let (wishes, wish_rx) = watch::channel(None);
    let (_views, view_rx) = watch::channel(None);
    let task = tokio::spawn(writer.run(wish_rx, view_rx));
    wishes.send_replace(Some(wish()));
    tokio::time::sleep(Duration::from_secs(120)).await;
    let attempts = fake.lock().unwrap().asked.len();
    assert!(
        (5..60).contains(&attempts),
        "{attempts} attempts in two minutes"
    );
    // The newest is written, not the queue of all that were wished.
    let newest = Wish {
        entry: InstanceStatus {
            message: Some("newest".into()),
            ..wish().entry
        },
        ..wish()
    };
    wishes.send_replace(Some(newest));
    fake.lock().unwrap().down = false;
    tokio::time::sleep(Duration::from_secs(60)).await;
    let after = fake.lock().unwrap().asked.clone();
    let taken: Vec<_> = after
        .iter()
        .filter(|(m, _, _)| *m == Method::PATCH)
        .collect();
    let last = taken.last().unwrap();
    assert_eq!(last.2["status"]["instances"][0]["message"], "newest");
    task.abort();
}
