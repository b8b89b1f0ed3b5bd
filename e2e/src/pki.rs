//! The test bed's certificate authorities, the certificates they give and the kubeconfigs with them.
//!
//! Owns the keys. Never overwrites one that is there: running components rely on it.

use crate::layout::write_atomically;
use crate::topology::{CONTROL_PLANE, KUBERNETES_SERVICE, NODES};
use anyhow::{Context, Result};
use rcgen::{
    BasicConstraints, CertificateParams, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair,
    KeyUsagePurpose, SanType,
};
use serde_json::json;
use std::fs;
use std::net::{IpAddr, Ipv4Addr};
use std::path::{Path, PathBuf};

/// Where the keys lie and where the API server is.
#[derive(Clone, Debug)]
pub struct Pki {
    folder: PathBuf,
    server: String,
}

struct Identity<'a> {
    file: &'a str,
    user: &'a str,
    group: Option<&'a str>,
    names: Vec<String>,
    addresses: Vec<Ipv4Addr>,
}

impl<'a> Identity<'a> {
    fn client(file: &'a str, user: &'a str, group: Option<&'a str>) -> Self {
        Self {
            file,
            user,
            group,
            names: Vec::new(),
            addresses: Vec::new(),
        }
    }
}

/// Whom an API server behind the API server takes the word of, as to who asks.
pub const FRONT_PROXY: &str = "front-proxy-client";
/// The group that may do everything.
const MASTERS: &str = "system:masters";

impl Pki {
    /// Names a folder for the keys and the address (host:port) of the API server.
    #[must_use]
    pub fn new(folder: PathBuf, server: &str) -> Self {
        Self {
            folder,
            server: server.to_owned(),
        }
    }

    /// The certificate of a component, or of an authority: `ca`, `front-proxy-ca`.
    #[must_use]
    pub fn certificate(&self, name: &str) -> PathBuf {
        self.folder.join(format!("{name}.crt"))
    }

    /// The key of a component or an authority, or `service-accounts`.
    #[must_use]
    pub fn key(&self, name: &str) -> PathBuf {
        self.folder.join(format!("{name}.key"))
    }

    /// The public half of the key that signs the tokens of ServiceAccounts.
    #[must_use]
    pub fn service_account_public(&self) -> PathBuf {
        self.folder.join("service-accounts.pub")
    }

    /// The kubeconfig of a component, or `admin`.
    #[must_use]
    pub fn kubeconfig(&self, name: &str) -> PathBuf {
        self.folder.join(format!("{name}.kubeconfig"))
    }

    /// Makes what isn't there yet.
    ///
    /// # Errors
    /// If a key can't be made or written.
    pub fn ensure(&self) -> Result<()> {
        fs::create_dir_all(&self.folder)
            .with_context(|| format!("making {}", self.folder.display()))?;
        let issuer = self.authority("ca", "domicile-testbed-ca")?;
        let front_proxy = self.authority("front-proxy-ca", "domicile-testbed-front-proxy-ca")?;
        self.service_accounts()?;
        let cluster_names = [
            "kubernetes",
            "kubernetes.default",
            "kubernetes.default.svc",
            "kubernetes.default.svc.cluster.local",
            "localhost",
        ];
        let mut identities = vec![
            Identity {
                file: "apiserver",
                user: "kube-apiserver",
                group: None,
                names: cluster_names.map(str::to_owned).to_vec(),
                addresses: vec![Ipv4Addr::LOCALHOST, KUBERNETES_SERVICE, CONTROL_PLANE],
            },
            Identity::client("admin", "admin", Some(MASTERS)),
            Identity::client(
                "kubelet-client",
                "kube-apiserver-kubelet-client",
                Some(MASTERS),
            ),
            Identity::client("controller-manager", "system:kube-controller-manager", None),
            Identity::client("scheduler", "system:kube-scheduler", None),
            Identity::client("proxy", "system:kube-proxy", None),
        ];
        let users: Vec<_> = NODES
            .iter()
            .map(|n| {
                (
                    format!("node-{}", n.name),
                    format!("system:node:{}", n.name),
                    n,
                )
            })
            .collect();
        for (file, user, node) in &users {
            identities.push(Identity {
                file,
                user,
                group: Some("system:nodes"),
                names: vec![node.name.to_owned()],
                addresses: vec![node.address()],
            });
        }
        for identity in identities {
            self.issue(&issuer, &identity)?;
        }
        // Whoever has it may say on whose behalf it asks, so that nothing else is signed by this authority.
        self.issue(
            &front_proxy,
            &Identity::client(FRONT_PROXY, FRONT_PROXY, None),
        )
    }

    fn authority(&self, file: &str, name: &str) -> Result<Issuer<'static, KeyPair>> {
        let (certificate, key) = (self.certificate(file), self.key(file));
        if !certificate.exists() || !key.exists() {
            let pair = KeyPair::generate().context("making the authority's key")?;
            let mut params = parameters(name, None);
            params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
            params.key_usages = vec![
                KeyUsagePurpose::KeyCertSign,
                KeyUsagePurpose::CrlSign,
                KeyUsagePurpose::DigitalSignature,
            ];
            let made = params
                .self_signed(&pair)
                .context("signing the authority's certificate")?;
            write_secret(&key, &pair.serialize_pem())?;
            write_atomically(&certificate, made.pem().as_bytes())?;
        }
        let pair =
            KeyPair::from_pem(&fs::read_to_string(&key)?).context("reading the authority's key")?;
        Issuer::from_ca_cert_pem(&fs::read_to_string(&certificate)?, pair)
            .context("reading the authority's certificate")
    }

    fn service_accounts(&self) -> Result<()> {
        let key = self.key("service-accounts");
        if !key.exists() || !self.service_account_public().exists() {
            let pair = KeyPair::generate().context("making the key of the ServiceAccounts")?;
            write_atomically(
                &self.service_account_public(),
                pair.public_key_pem().as_bytes(),
            )?;
            write_secret(&key, &pair.serialize_pem())?;
        }
        Ok(())
    }

    fn issue(&self, issuer: &Issuer<'_, KeyPair>, identity: &Identity<'_>) -> Result<()> {
        let (certificate, key) = (self.certificate(identity.file), self.key(identity.file));
        let kubeconfig = self.kubeconfig(identity.file);
        if certificate.exists() && key.exists() && kubeconfig.exists() {
            return Ok(());
        }
        let pair =
            KeyPair::generate().with_context(|| format!("making the key of {}", identity.file))?;
        let mut params = parameters(identity.user, identity.group);
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.extended_key_usages = vec![
            ExtendedKeyUsagePurpose::ServerAuth,
            ExtendedKeyUsagePurpose::ClientAuth,
        ];
        for name in &identity.names {
            params
                .subject_alt_names
                .push(SanType::DnsName(name.as_str().try_into()?));
        }
        params.subject_alt_names.extend(
            identity
                .addresses
                .iter()
                .map(|a| SanType::IpAddress(IpAddr::V4(*a))),
        );
        let made = params
            .signed_by(&pair, issuer)
            .with_context(|| format!("signing for {}", identity.file))?;
        write_secret(&key, &pair.serialize_pem())?;
        write_atomically(&certificate, made.pem().as_bytes())?;

        // JSON is YAML. Files are named, not embedded, except for the administrator, whose
        // kubeconfig people copy.
        let (cluster, user) = if identity.file == "admin" {
            use base64::{Engine, engine::general_purpose::STANDARD};
            let read = |p: PathBuf| {
                fs::read(&p)
                    .map(|b| STANDARD.encode(b))
                    .with_context(|| format!("reading {}", p.display()))
            };
            (
                json!({"server": format!("https://{}", self.server), "certificate-authority-data": read(self.certificate("ca"))?}),
                json!({"client-certificate-data": read(certificate)?, "client-key-data": read(key)?}),
            )
        } else {
            (
                json!({"server": format!("https://{}", self.server), "certificate-authority": self.certificate("ca")}),
                json!({"client-certificate": certificate, "client-key": key}),
            )
        };
        let content = json!({
            "apiVersion": "v1", "kind": "Config", "current-context": "testbed",
            "clusters": [{"name": "testbed", "cluster": cluster}],
            "users": [{"name": identity.file, "user": user}],
            "contexts": [{"name": "testbed", "context": {"cluster": "testbed", "user": identity.file}}],
        });
        write_secret(&kubeconfig, &serde_json::to_string_pretty(&content)?)
    }
}

fn parameters(common_name: &str, organization: Option<&str>) -> CertificateParams {
    let mut params = CertificateParams::default();
    params.distinguished_name = rcgen::DistinguishedName::new();
    if let Some(o) = organization {
        params.distinguished_name.push(DnType::OrganizationName, o);
    }
    params
        .distinguished_name
        .push(DnType::CommonName, common_name);
    params.not_before = rcgen::date_time_ymd(2020, 1, 1);
    params.not_after = rcgen::date_time_ymd(2040, 1, 1);
    params
}

fn write_secret(path: &Path, content: &str) -> Result<()> {
    use std::os::unix::fs::PermissionsExt;
    write_atomically(path, content.as_bytes())?;
    fs::set_permissions(path, fs::Permissions::from_mode(0o600))
        .with_context(|| format!("closing {}", path.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn everything_is_made_once() {
        let folder = tempfile::tempdir().unwrap();
        let pki = Pki::new(folder.path().to_owned(), "198.18.0.10:6443");
        pki.ensure().unwrap();
        let read = |p: PathBuf| fs::read_to_string(p).unwrap();
        let before = (
            read(pki.key("ca")),
            read(pki.certificate("node-w1")),
            read(pki.kubeconfig("admin")),
        );
        pki.ensure().unwrap();
        assert_eq!(
            before,
            (
                read(pki.key("ca")),
                read(pki.certificate("node-w1")),
                read(pki.kubeconfig("admin"))
            )
        );
        assert!(before.2.contains("198.18.0.10:6443"));
        let config = kube::config::Kubeconfig::read_from(pki.kubeconfig("admin")).unwrap();
        assert_eq!(config.current_context.as_deref(), Some("testbed"));
    }
}
