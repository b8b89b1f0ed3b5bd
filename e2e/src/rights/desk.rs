//! A front desk: a program of the controller's own that files requests at a gateway.
//!
//! Owns one HTTPS connection, and its token. Never: takes a request for filed that the gateway hasn't answered for, or
//! trusts a gateway whose certificate isn't of the store's authority.

use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use http_body_util::{BodyExt, Full};
use hyper::body::Bytes;
use hyper::client::conn::http1::{SendRequest, handshake};
use hyper_util::rt::TokioIo;
use k8s_openapi::api::authentication::v1::{TokenRequest, TokenRequestSpec};
use k8s_openapi::api::core::v1::{ConfigMap, Service, ServiceAccount};
use kube::Api;
use kube::api::PostParams;
use rustls::pki_types::ServerName;
use serde_json::{Value, json};
use tokio::net::TcpStream;

use crate::failover::session::tls_config;
use crate::harness::Scope;

/// The longest that one exchange may take.
const LIMIT: Duration = Duration::from_secs(30);

/// Where a gateway is and how it is known.
#[derive(Clone)]
pub struct Gateway {
    address: SocketAddr,
    name: ServerName<'static>,
    tls: tokio_rustls::TlsConnector,
    token: String,
}

/// What a gateway answered.
#[derive(Clone, Debug)]
pub struct Answer {
    /// HTTP's status.
    pub status: u16,
    /// Seconds of Retry-After.
    pub retry_after: Option<u64>,
    /// The body.
    pub body: Value,
}

/// One connection to a gateway.
pub struct Desk {
    gateway: Gateway,
    connection: Option<SendRequest<Full<Bytes>>>,
}

impl Gateway {
    /// The gateway of a workflow, and a ServiceAccount `front-desk` that may do everything with its requests.
    ///
    /// # Errors
    /// If there is no such gateway, or the API server refuses.
    pub async fn of(scope: &Scope, workflow: &str) -> Result<Self> {
        let namespace = &scope.namespace;
        for manifest in [
            json!({ "apiVersion": "v1", "kind": "ServiceAccount",
                "metadata": { "name": "front-desk", "namespace": namespace } }),
            json!({ "apiVersion": "rbac.authorization.k8s.io/v1", "kind": "Role",
                "metadata": { "name": "front-desk", "namespace": namespace },
                "rules": [{ "apiGroups": ["domicile.dev"], "resources": ["rightsworkflows/requests"],
                    "resourceNames": [workflow], "verbs": ["create", "get", "list", "update"] }] }),
            json!({ "apiVersion": "rbac.authorization.k8s.io/v1", "kind": "RoleBinding",
                "metadata": { "name": "front-desk", "namespace": namespace },
                "roleRef": { "apiGroup": "rbac.authorization.k8s.io", "kind": "Role", "name": "front-desk" },
                "subjects": [{ "kind": "ServiceAccount", "name": "front-desk", "namespace": namespace }] }),
        ] {
            scope.apply(&manifest).await?;
        }
        let request = TokenRequest {
            spec: Some(TokenRequestSpec {
                audiences: Some(vec!["domicile".into()]),
                expiration_seconds: Some(7200),
                ..TokenRequestSpec::default()
            }),
            ..TokenRequest::default()
        };
        let accounts: Api<ServiceAccount> = scope.api();
        let token = accounts
            .create_token_request("front-desk", &PostParams::default(), &request)
            .await?;
        let service = format!("{workflow}-gateway");
        let found = scope.api::<Service>().get(&service).await?;
        let ip: IpAddr = found
            .spec
            .and_then(|s| s.cluster_ip)
            .context("the gateway's Service has no address")?
            .parse()?;
        let config = scope
            .api::<ConfigMap>()
            .get(&format!("{workflow}-gateway-ca"))
            .await?;
        let ca = config
            .data
            .and_then(|mut d| d.remove("ca.crt"))
            .context("no authority of the gateway's certificate")?;
        Ok(Self {
            address: (ip, 8443).into(),
            name: ServerName::try_from(format!("{service}.{namespace}.svc"))?,
            tls: tls_config(&ca)?,
            token: token.status.and_then(|s| s.token).context("no token")?,
        })
    }

    /// The same with another token, or with none.
    #[must_use]
    pub fn with_token(&self, token: &str) -> Self {
        Self {
            token: token.to_owned(),
            ..self.clone()
        }
    }

    /// A desk that isn't connected yet.
    #[must_use]
    pub fn desk(&self) -> Desk {
        Desk {
            gateway: self.clone(),
            connection: None,
        }
    }

    async fn connect(&self) -> Result<SendRequest<Full<Bytes>>> {
        let stream = TcpStream::connect(self.address).await?;
        stream.set_nodelay(true)?;
        let stream = self.tls.connect(self.name.clone(), stream).await?;
        let (sender, connection) = handshake(TokioIo::new(stream)).await?;
        // Its end shows as an error of the next request.
        tokio::spawn(connection);
        Ok(sender)
    }
}

impl Desk {
    /// One exchange. The connection is kept if it can be.
    ///
    /// # Errors
    /// If there was no answer: nothing is known then of what became of the request.
    pub async fn exchange(
        &mut self,
        method: &str,
        path: &str,
        key: Option<&str>,
        body: Option<&Value>,
    ) -> Result<Answer> {
        let bytes = body.map(|b| b.to_string().into_bytes()).unwrap_or_default();
        self.raw(method, path, key, bytes).await
    }

    /// As [`Self::exchange`], with a body that need not be JSON.
    ///
    /// # Errors
    /// As [`Self::exchange`].
    pub async fn raw(
        &mut self,
        method: &str,
        path: &str,
        key: Option<&str>,
        body: Vec<u8>,
    ) -> Result<Answer> {
        let mut request = http::Request::builder()
            .method(method)
            .uri(path)
            .header("host", self.gateway.name.to_str().as_ref())
            .header("content-type", "application/json");
        if !self.gateway.token.is_empty() {
            request = request.header("authorization", format!("Bearer {}", self.gateway.token));
        }
        if let Some(key) = key {
            request = request.header("idempotency-key", key);
        }
        let request = request.body(Full::new(Bytes::from(body)))?;
        tokio::time::timeout(LIMIT, self.send(request))
            .await
            .context("no answer from the gateway")?
    }

    async fn send(&mut self, request: http::Request<Full<Bytes>>) -> Result<Answer> {
        let mut sender = match self.connection.take() {
            Some(sender) if !sender.is_closed() => sender,
            _ => self.gateway.connect().await?,
        };
        sender.ready().await?;
        let answer = sender.send_request(request).await?;
        let status = answer.status().as_u16();
        let retry_after = answer
            .headers()
            .get("retry-after")
            .and_then(|v| v.to_str().ok()?.parse().ok());
        let bytes = answer.into_body().collect().await?.to_bytes();
        let body = if bytes.is_empty() {
            Value::Null
        } else {
            serde_json::from_slice(&bytes).context("the gateway's answer isn't JSON")?
        };
        self.connection = Some(sender);
        Ok(Answer {
            status,
            retry_after,
            body,
        })
    }

    /// Files one request, again with the same key until the gateway has answered for it or refused it for good. The
    /// answer is the request's id.
    ///
    /// # Errors
    /// If it is refused, or the time is up.
    pub async fn file(&mut self, key: &str, request: &Value, patience: Duration) -> Result<String> {
        let deadline = tokio::time::Instant::now() + patience;
        loop {
            let answer = self
                .exchange("POST", "/v1/requests", Some(key), Some(request))
                .await;
            let why = match answer {
                Ok(a) if a.status == 201 || a.status == 200 => {
                    return Ok(a.body["id"]
                        .as_str()
                        .context("an answer without an id")?
                        .to_owned());
                }
                Ok(a) if a.status == 429 || a.status == 503 => format!("{} {}", a.status, a.body),
                Ok(a) => anyhow::bail!("refused: {} {}", a.status, a.body),
                Err(e) => format!("{e:#}"),
            };
            ensure!(
                tokio::time::Instant::now() < deadline,
                "not filed in {patience:?}: {why}"
            );
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    }
}
