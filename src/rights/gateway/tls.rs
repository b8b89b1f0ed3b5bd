//! The certificate that the gateway shows, and whose client certificates it takes.
//!
//! Owns TLS's configuration, made anew when a file changes: a certificate that was renewed is shown without a restart.
//! Never: goes on with half of a change (a certificate and another's key), or without a certificate.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context as _;
use rustls::crypto::ring;
use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::server::WebPkiClientVerifier;
use rustls::{RootCertStore, ServerConfig};
use tokio::sync::watch;
use tracing::{info, warn};

/// How often files are looked at. The kubelet itself takes up to a minute to bring a change.
pub const LOOK: Duration = Duration::from_secs(5);

/// Where it comes from.
#[derive(Clone, Debug)]
pub struct Files {
    /// A directory with tls.crt and tls.key.
    pub serving: PathBuf,
    /// Certificates of the authority whose client certificates are taken.
    pub client_ca: Option<PathBuf>,
}

/// What the files hold.
#[derive(Clone, PartialEq, Eq)]
struct Content {
    cert: Vec<u8>,
    key: Vec<u8>,
    client_ca: Option<Vec<u8>>,
}

impl Files {
    fn read(&self) -> anyhow::Result<Content> {
        let read = |path: &Path| {
            std::fs::read(path).with_context(|| format!("can't read {}", path.display()))
        };
        Ok(Content {
            cert: read(&self.serving.join("tls.crt"))?,
            key: read(&self.serving.join("tls.key"))?,
            client_ca: self.client_ca.as_deref().map(read).transpose()?,
        })
    }

    fn configuration(&self, content: &Content) -> anyhow::Result<ServerConfig> {
        let at = self.serving.display();
        let chain: Vec<_> = CertificateDer::pem_slice_iter(&content.cert)
            .collect::<Result<_, _>>()
            .ok()
            .filter(|c: &Vec<_>| !c.is_empty())
            .with_context(|| format!("{at}/tls.crt has no certificate in PEM"))?;
        let key = PrivateKeyDer::from_pem_slice(&content.key)
            .ok()
            .with_context(|| format!("{at}/tls.key has no private key in PEM"))?;
        let provider = Arc::new(ring::default_provider());
        let builder = ServerConfig::builder_with_provider(provider.clone())
            .with_safe_default_protocol_versions()?;
        let builder = match &content.client_ca {
            None => builder.with_no_client_auth(),
            Some(pem) => {
                let mut roots = RootCertStore::empty();
                for cert in CertificateDer::pem_slice_iter(pem) {
                    roots.add(cert.ok().context("the client authority's file isn't PEM")?)?;
                }
                // A client without a certificate may have a token.
                let verifier =
                    WebPkiClientVerifier::builder_with_provider(Arc::new(roots), provider)
                        .allow_unauthenticated()
                        .build()
                        .context("the client authority's certificates can't be used")?;
                builder.with_client_cert_verifier(verifier)
            }
        };
        let mut config = builder
            .with_single_cert(chain, key)
            .with_context(|| format!("the certificate and the key in {at} don't fit"))?;
        config.alpn_protocols = vec![b"http/1.1".to_vec()];
        Ok(config)
    }
}

/// Reads the files, and again whenever they change, for as long as somebody listens.
///
/// # Errors
/// If what is there now can't be used.
pub fn follow(files: Files) -> anyhow::Result<watch::Receiver<Arc<ServerConfig>>> {
    let mut last = files.read()?;
    let (tx, rx) = watch::channel(Arc::new(files.configuration(&last)?));
    tokio::spawn(async move {
        loop {
            tokio::select! {
                () = tx.closed() => return,
                () = tokio::time::sleep(LOOK) => {}
            }
            let changed = files.read().and_then(|now| {
                if now == last {
                    return Ok(None);
                }
                let config = files.configuration(&now)?;
                Ok(Some((now, config)))
            });
            match changed {
                Ok(None) => {}
                Ok(Some((now, config))) => {
                    last = now;
                    tx.send_replace(Arc::new(config));
                    info!("the certificate has changed");
                }
                // Also while the kubelet is amid a change.
                Err(e) => warn!("the certificate in use stays: {e:#}"),
            }
        }
    });
    Ok(rx)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn write(dir: &Path, cert: &str, key: &str) {
        std::fs::write(dir.join("tls.crt"), cert).unwrap();
        std::fs::write(dir.join("tls.key"), key).unwrap();
    }

    fn pair() -> (String, String) {
        let made = rcgen::generate_simple_self_signed(["gateway".to_owned()]).unwrap();
        (made.cert.pem(), made.signing_key.serialize_pem())
    }

    #[tokio::test(start_paused = true)]
    async fn a_change_is_taken_whole_or_not_at_all() {
        let dir = tempfile::tempdir().unwrap();
        let files = Files {
            serving: dir.path().to_owned(),
            client_ca: None,
        };
        assert!(follow(files.clone()).is_err());
        let (one, two) = (pair(), pair());
        write(dir.path(), &one.0, &one.1);
        let mut config = follow(files).unwrap();
        // A certificate with another's key.
        write(dir.path(), &two.0, &one.1);
        tokio::time::sleep(LOOK * 3).await;
        assert!(!config.has_changed().unwrap());
        write(dir.path(), &two.0, &two.1);
        config.changed().await.unwrap();
    }

    #[tokio::test]
    async fn an_authority_of_clients_must_be_one() {
        let dir = tempfile::tempdir().unwrap();
        let (cert, key) = pair();
        write(dir.path(), &cert, &key);
        let ca = dir.path().join("ca.crt");
        let files = Files {
            serving: dir.path().to_owned(),
            client_ca: Some(ca.clone()),
        };
        assert!(follow(files.clone()).is_err());
        std::fs::write(&ca, "no certificate").unwrap();
        assert!(follow(files.clone()).is_err());
        std::fs::write(&ca, &cert).unwrap();
        assert!(follow(files).is_ok());
    }
}
