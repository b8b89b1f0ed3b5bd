//! An API server that knows tokens and who may do what, and can be away.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex};

use axum::body::to_bytes;
use axum::http::{Request, StatusCode};
use axum::response::{IntoResponse as _, Response};
use serde_json::{Value, json};

/// How it answers.
#[derive(Clone, Copy, Default, PartialEq, Eq)]
pub enum Answers {
    #[default]
    Truly,
    /// With an error.
    Refusing,
    /// Never.
    Silent,
}

#[derive(Default)]
pub struct Fake {
    state: Mutex<State>,
}

struct State {
    /// Token to user and audience.
    tokens: BTreeMap<String, (String, String)>,
    /// User, namespace, name, verb.
    roles: BTreeSet<(String, String, String, String)>,
    answers: Answers,
    asked: usize,
}

impl Default for State {
    fn default() -> Self {
        let mut state = Self {
            tokens: BTreeMap::new(),
            roles: BTreeSet::new(),
            answers: Answers::default(),
            asked: 0,
        };
        for (token, user) in [("forms-token", "forms"), ("portal-token", "portal")] {
            let of = (user.to_owned(), "domicile".to_owned());
            state.tokens.insert(token.to_owned(), of);
            for verb in ["create", "get", "list", "update"] {
                let role = ["records", super::WORKFLOW, verb].map(str::to_owned);
                let [namespace, name, verb] = role;
                state.roles.insert((user.to_owned(), namespace, name, verb));
            }
        }
        // May do everything, in another namespace.
        let of = ("stranger".to_owned(), "domicile".to_owned());
        state.tokens.insert("stranger-token".to_owned(), of);
        for verb in ["create", "get", "list", "update"] {
            let role = ["stranger", "elsewhere", super::WORKFLOW, verb].map(str::to_owned);
            let [user, namespace, name, verb] = role;
            state.roles.insert((user, namespace, name, verb));
        }
        // May read only.
        let of = ("reader".to_owned(), "domicile".to_owned());
        state.tokens.insert("reader-token".to_owned(), of);
        let role = ["reader", "records", super::WORKFLOW, "get"].map(str::to_owned);
        let [user, namespace, name, verb] = role;
        state.roles.insert((user, namespace, name, verb));
        // For the API server itself, not for gateways.
        let of = ("forms".to_owned(), "kubernetes".to_owned());
        state.tokens.insert("api-server-token".to_owned(), of);
        state
    }
}

impl Fake {
    pub fn answers(&self, answers: Answers) {
        self.state.lock().unwrap().answers = answers;
    }

    /// How often it was asked.
    pub fn asked(&self) -> usize {
        self.state.lock().unwrap().asked
    }

    pub fn client(self: &Arc<Self>) -> kube::Client {
        let shared = self.clone();
        let service = tower::service_fn(move |request: Request<kube::client::Body>| {
            let fake = shared.clone();
            async move {
                if fake.state.lock().unwrap().answers == Answers::Silent {
                    std::future::pending::<()>().await;
                }
                let (parts, body) = request.into_parts();
                let bytes = to_bytes(axum::body::Body::new(body), 1 << 20)
                    .await
                    .unwrap();
                let body = serde_json::from_slice(&bytes).unwrap_or(Value::Null);
                Ok::<_, std::convert::Infallible>(fake.answer(parts.uri.path(), body))
            }
        });
        kube::Client::new(service, "records")
    }

    fn answer(&self, path: &str, mut body: Value) -> Response {
        let mut state = self.state.lock().unwrap();
        state.asked += 1;
        let refuse = |code: u16| {
            let status = json!({"kind": "Status", "apiVersion": "v1", "status": "Failure", "code": code,
                "reason": "InternalError", "message": "no"});
            (StatusCode::from_u16(code).unwrap(), axum::Json(status)).into_response()
        };
        if state.answers == Answers::Refusing {
            return refuse(500);
        }
        let spec = body["spec"].clone();
        let text = |v: &Value| v.as_str().unwrap_or_default().to_owned();
        body["status"] = match path {
            "/apis/authentication.k8s.io/v1/tokenreviews" => {
                let wanted: Vec<String> = spec["audiences"]
                    .as_array()
                    .map(|a| a.iter().map(text).collect())
                    .unwrap_or_default();
                match state.tokens.get(&text(&spec["token"])) {
                    Some((user, audience)) if wanted.contains(audience) => json!({
                        "authenticated": true, "audiences": [audience],
                        "user": {"username": user, "groups": ["system:authenticated"]}}),
                    _ => json!({"authenticated": false, "error": "unknown"}),
                }
            }
            "/apis/authorization.k8s.io/v1/subjectaccessreviews" => {
                let of = &spec["resourceAttributes"];
                let what = [&of["group"], &of["resource"], &of["subresource"]].map(text);
                assert_eq!(what, ["domicile.dev", "rightsworkflows", "requests"]);
                let wanted = (
                    text(&spec["user"]),
                    text(&of["namespace"]),
                    text(&of["name"]),
                    text(&of["verb"]),
                );
                json!({"allowed": state.roles.contains(&wanted)})
            }
            _ => return refuse(404),
        };
        (StatusCode::CREATED, axum::Json(body)).into_response()
    }
}
