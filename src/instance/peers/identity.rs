//! Who is who: TLS with certificates of the store's own authority on both sides.
//!
//! Owns how a certificate is used and the name in it is read. Never: resumes a session, which would let a peer in
//! by a certificate that was good once.

use std::sync::Arc;

use anyhow::{Context as _, ensure};
use rustls::client::Resumption;
use rustls::crypto::ring;
use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::server::{NoServerSessionStorage, WebPkiClientVerifier};
use rustls::version::TLS13;
use rustls::{ClientConfig, RootCertStore, ServerConfig};
use tokio::sync::watch;
use tracing::{info, warn};
use x509_parser::extensions::GeneralName;

use crate::api::names;
use crate::instance::tls::Certificate;

/// What the two sides speak; another version of it would be another name.
const PROTOCOL: &[u8] = b"domicile-peers/1";

/// A certificate in use.
#[derive(Debug)]
pub(super) struct Identity {
    pub(super) client: Arc<ClientConfig>,
    pub(super) server: Arc<ServerConfig>,
    /// Counts them.
    pub(super) generation: u64,
}

/// What a certificate's Secret holds, read.
struct Parts {
    roots: Arc<RootCertStore>,
    chain: Vec<CertificateDer<'static>>,
    key: PrivateKeyDer<'static>,
}

fn parts(certificate: &Certificate) -> anyhow::Result<Parts> {
    let mut roots = RootCertStore::empty();
    for root in CertificateDer::pem_slice_iter(certificate.ca()) {
        roots.add(root.context("ca.crt")?).context("ca.crt")?;
    }
    ensure!(!roots.is_empty(), "ca.crt has no certificate");
    let chain = CertificateDer::pem_slice_iter(certificate.cert())
        .collect::<Result<Vec<_>, _>>()
        .context("tls.crt")?;
    let key = PrivateKeyDer::from_pem_slice(certificate.key()).context("tls.key")?;
    Ok(Parts {
        roots: Arc::new(roots),
        chain,
        key,
    })
}

/// How this instance shows itself to another, whose certificate has to be in the other's name.
///
/// # Errors
/// If the certificate can't be used.
pub(in crate::instance) fn client_of(certificate: &Certificate) -> anyhow::Result<ClientConfig> {
    client(&parts(certificate)?)
}

fn client(parts: &Parts) -> anyhow::Result<ClientConfig> {
    let mut client = ClientConfig::builder_with_provider(Arc::new(ring::default_provider()))
        .with_protocol_versions(&[&TLS13])?
        .with_root_certificates(parts.roots.clone())
        .with_client_auth_cert(parts.chain.clone(), parts.key.clone_key())?;
    client.resumption = Resumption::disabled();
    Ok(client)
}

impl Identity {
    fn new(certificate: &Certificate, generation: u64) -> anyhow::Result<Self> {
        let parts = parts(certificate)?;
        let mut client = client(&parts)?;
        client.alpn_protocols = vec![PROTOCOL.to_vec()];
        let Parts { roots, chain, key } = parts;
        let provider = Arc::new(ring::default_provider());

        let verifier =
            WebPkiClientVerifier::builder_with_provider(roots, provider.clone()).build()?;
        let mut server = ServerConfig::builder_with_provider(provider)
            .with_protocol_versions(&[&TLS13])?
            .with_client_cert_verifier(verifier)
            .with_single_cert(chain, key)?;
        server.session_storage = Arc::new(NoServerSessionStorage {});
        server.send_tls13_tickets = 0;
        server.alpn_protocols = vec![PROTOCOL.to_vec()];

        Ok(Self {
            client: Arc::new(client),
            server: Arc::new(server),
            generation,
        })
    }
}

/// Keeps the identity up with the certificate. One that can't be used leaves the former in place.
pub(super) async fn follow(
    mut certificate: watch::Receiver<Option<Certificate>>,
    publish: watch::Sender<Option<Arc<Identity>>>,
) {
    let mut known = None;
    let mut generation = 0;
    loop {
        let now = certificate.borrow_and_update().clone();
        if let Some(now) = now
            && known.as_ref() != Some(&now)
        {
            generation += 1;
            match Identity::new(&now, generation) {
                Ok(identity) => {
                    info!(generation, "speaks to its peers with a new certificate");
                    publish.send_replace(Some(Arc::new(identity)));
                }
                Err(e) => {
                    warn!("the certificate in the Secret can't be used between instances: {e:#}");
                }
            }
            known = Some(now);
        }
        if certificate.changed().await.is_err() {
            // Nobody will bring another; the present one stays.
            std::future::pending::<()>().await;
        }
    }
}

/// The name of the instance at the other end, whose certificate the handshake has verified.
///
/// # Errors
/// In words, if the certificate isn't one of another instance of this store.
pub(super) fn name_of_client(
    store: &str,
    me: &str,
    chain: Option<&[CertificateDer<'_>]>,
) -> Result<String, String> {
    let certificate = chain
        .and_then(<[_]>::first)
        .ok_or("it has no certificate")?;
    let (_, parsed) = x509_parser::parse_x509_certificate(certificate)
        .map_err(|_| "its certificate can't be read")?;
    let subject = parsed
        .subject()
        .iter_common_name()
        .next()
        .and_then(|name| name.as_str().ok());
    let alternatives = parsed.subject_alternative_name().ok().flatten();
    let mut ours = alternatives
        .iter()
        .flat_map(|san| &san.value.general_names)
        .filter_map(|name| match name {
            GeneralName::DNSName(name) if names::slot(store, name).is_some() => Some(*name),
            _ => None,
        });
    // One that stands for two instances stands for none.
    match (ours.next(), ours.next()) {
        (Some(name), None) if name == me => {
            Err("its certificate is this instance's own".to_owned())
        }
        (Some(name), None) if subject == Some(name) => Ok(name.to_owned()),
        _ => Err(format!(
            "its certificate is for {:?}, which is no instance of {store}",
            subject
                .unwrap_or_default()
                .chars()
                .take(64)
                .collect::<String>()
        )),
    }
}
