//! A client of HTTP over real TLS.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use axum::body::{Body, Bytes};
use axum::http::{HeaderMap, Request};
use hyper::client::conn::http1::{SendRequest, handshake};
use hyper_util::rt::TokioIo;
use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use rustls::{ClientConfig, RootCertStore};
use serde_json::Value;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;

/// One connection at a time, made anew when it has ended.
pub struct Client {
    address: SocketAddr,
    tls: TlsConnector,
    token: Option<String>,
    sender: Option<SendRequest<Body>>,
}

/// An answer.
#[derive(Debug)]
pub struct Answer {
    pub status: u16,
    pub headers: HeaderMap,
    pub body: Value,
    pub text: String,
}

impl Answer {
    /// The last part of a problem's type.
    pub fn problem(&self) -> &str {
        assert_eq!(
            self.headers["content-type"], "application/problem+json",
            "{self:?}"
        );
        assert_eq!(self.body["status"], self.status, "{self:?}");
        let kind = self.body["type"].as_str().unwrap();
        kind.strip_prefix("https://domicile.dev/problems/").unwrap()
    }

    /// The id of the request that it speaks of.
    pub fn id(&self) -> String {
        self.body["id"]
            .as_str()
            .unwrap_or_else(|| panic!("{self:?}"))
            .to_owned()
    }
}

impl Client {
    pub fn new(
        address: SocketAddr,
        authority: &str,
        token: Option<&str>,
        certificate: Option<(String, String)>,
    ) -> Self {
        let mut roots = RootCertStore::empty();
        roots
            .add(CertificateDer::from_pem_slice(authority.as_bytes()).unwrap())
            .unwrap();
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let builder = ClientConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .unwrap()
            .with_root_certificates(roots);
        let config = match certificate {
            None => builder.with_no_client_auth(),
            Some((cert, key)) => builder
                .with_client_auth_cert(
                    vec![CertificateDer::from_pem_slice(cert.as_bytes()).unwrap()],
                    PrivateKeyDer::from_pem_slice(key.as_bytes()).unwrap(),
                )
                .unwrap(),
        };
        Self {
            address,
            tls: TlsConnector::from(Arc::new(config)),
            token: token.map(str::to_owned),
            sender: None,
        }
    }

    /// A connection to write bytes to.
    pub async fn raw(&self) -> std::io::Result<TlsStream<TcpStream>> {
        let stream = TcpStream::connect(self.address).await?;
        let name = ServerName::try_from("localhost").unwrap();
        self.tls.connect(name, stream).await
    }

    /// Asks. `Err`: there was no answer.
    pub async fn try_ask(&mut self, mut request: Request<Body>) -> Result<Answer, String> {
        let headers = request.headers_mut();
        headers.insert("host", "localhost".parse().unwrap());
        if let Some(token) = &self.token {
            let value = format!("Bearer {token}").parse().unwrap();
            headers.entry("authorization").or_insert(value);
        }
        let alive = match &mut self.sender {
            Some(sender) => sender.ready().await.is_ok(),
            None => false,
        };
        if !alive {
            let stream = self.raw().await.map_err(|e| e.to_string())?;
            let (sender, connection) = handshake(TokioIo::new(stream))
                .await
                .map_err(|e| e.to_string())?;
            tokio::spawn(connection);
            self.sender = Some(sender);
        }
        let sender = self.sender.as_mut().unwrap();
        let answer = async {
            let response = sender.send_request(request).await?;
            let (parts, body) = response.into_parts();
            let body: Bytes = http_body_util::BodyExt::collect(body).await?.to_bytes();
            Ok::<_, hyper::Error>((parts, body))
        };
        let (parts, body) = tokio::time::timeout(Duration::from_secs(40), answer)
            .await
            .map_err(|_| "no answer in time".to_owned())?
            .map_err(|e| e.to_string())?;
        Ok(Answer {
            status: parts.status.as_u16(),
            headers: parts.headers,
            body: serde_json::from_slice(&body).unwrap_or(Value::Null),
            text: String::from_utf8_lossy(&body).into_owned(),
        })
    }

    pub async fn ask(&mut self, request: Request<Body>) -> Answer {
        self.try_ask(request).await.expect("an answer")
    }

    pub async fn get(&mut self, path: &str) -> Answer {
        self.ask(Request::get(path).body(Body::empty()).unwrap())
            .await
    }

    /// Posts JSON.
    pub async fn post(&mut self, path: &str, body: &Value) -> Answer {
        self.ask(post(path, None, body)).await
    }

    /// Files a request.
    pub async fn file(&mut self, key: Option<&str>, body: &Value) -> Answer {
        self.ask(post("/v1/requests", key, body)).await
    }
}

pub fn post(path: &str, key: Option<&str>, body: &Value) -> Request<Body> {
    let mut request = Request::post(path).header("content-type", "application/json");
    if let Some(key) = key {
        request = request.header("idempotency-key", key);
    }
    request.body(Body::from(body.to_string())).unwrap()
}

/// A GET over plain HTTP. Status 0: there was no answer.
pub async fn plain(address: SocketAddr, path: &str) -> (u16, String) {
    let ask = async {
        let mut stream = TcpStream::connect(address).await?;
        let request = format!("GET {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n");
        stream.write_all(request.as_bytes()).await?;
        let mut text = String::new();
        stream.read_to_string(&mut text).await?;
        Ok::<_, std::io::Error>(text)
    };
    let text = ask.await.unwrap_or_default();
    let status = text.split(' ').nth(1).and_then(|s| s.parse().ok());
    let body = text.split_once("\r\n\r\n").map(|(_, b)| b.to_owned());
    (status.unwrap_or(0), body.unwrap_or_default())
}
