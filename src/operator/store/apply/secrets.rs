//! The Secrets: a store's authorities, its instances' certificates, the application's credentials.
//!
//! Owns what only whoever holds a key can do. Never logs key material, keeps it beyond a call, or replaces a password that
//! is there.

use anyhow::bail;
use jiff::Timestamp;
use k8s_openapi::api::core::v1::Secret;
use kube::ResourceExt;
use kube::api::ListParams;
use rand::RngCore;
use serde_json::json;

use super::Writer;
use crate::api::{labels, names};
use crate::operator::context::bounded;
use crate::operator::store::build::{self, AppSecret};
use crate::operator::store::certificates::{self, Pair, keys, text};

impl Writer<'_> {
    /// A new authority signs from now on. What instances trust already stays trusted, so that they know each other until
    /// they have its certificates.
    pub(super) async fn create_authority(&self) -> anyhow::Result<()> {
        let now = Timestamp::now();
        let pair = certificates::new_authority(&self.name, &self.namespace, now)?;
        let ours = ListParams::default().labels(&format!("{}={}", labels::STORE, self.name));
        let all = bounded("list the Secrets", self.secrets().list(&ours)).await?;
        let trusted: String = all
            .iter()
            .filter(|s| s.labels().contains_key(labels::INSTANCE))
            .filter_map(|s| text(s, keys::ACTIVE.0).ok())
            .collect();
        let mut content = pair_of(keys::ACTIVE, pair);
        content.extend(old(&certificates::distinct(&trusted, now)));
        self.put_authorities(None, &content).await
    }

    /// A second authority, that doesn't sign yet.
    pub(super) async fn announce(&self, switch_after: Timestamp) -> anyhow::Result<()> {
        let secret = self.authorities().await?;
        if certificates::authorities(&secret).is_some_and(|a| a.next.is_some()) {
            return Ok(());
        }
        let pair = certificates::new_authority(&self.name, &self.namespace, Timestamp::now())?;
        let mut content = pair_of(keys::ACTIVE, signing(&secret)?);
        content.extend(pair_of(keys::NEXT, pair));
        content.extend(old(&text(&secret, keys::OLD).unwrap_or_default()));
        let at = switch_after.to_string();
        self.put_authorities(Some(&at), &content).await
    }

    pub(super) async fn switch_authority(&self, next: &str) -> anyhow::Result<()> {
        let secret = self.authorities().await?;
        let known = certificates::authorities(&secret).and_then(|a| a.next);
        if known.is_none_or(|known| known.id != next) {
            bail!("the next authority is another one than {next}");
        }
        let next = certificates::pair(&secret, keys::NEXT)?;
        let mut trusted = text(&secret, keys::ACTIVE.0)?;
        trusted.push_str(&text(&secret, keys::OLD).unwrap_or_default());
        let mut content = pair_of(keys::ACTIVE, next);
        content.extend(old(&certificates::distinct(&trusted, Timestamp::now())));
        self.put_authorities(None, &content).await
    }

    pub(super) async fn retire_authorities(&self, active: &str) -> anyhow::Result<()> {
        let secret = self.authorities().await?;
        let known = certificates::authorities(&secret);
        if known.is_none_or(|known| known.active.id != active || known.next.is_some()) {
            bail!("another authority signs than {active}");
        }
        self.put_authorities(None, &pair_of(keys::ACTIVE, signing(&secret)?))
            .await
    }

    /// The authorities that are trusted now, beside the certificate that the instance has.
    pub(super) async fn entrust(&self, instance: &str) -> anyhow::Result<()> {
        let bundle = certificates::bundle(&self.authorities().await?);
        let name = names::tls_secret(instance);
        let secret = bounded("read a certificate", self.secrets().get(&name)).await?;
        let pair = certificates::pair(&secret, ("tls.crt", "tls.key"))?;
        self.put_certificate(instance, bundle, pair).await
    }

    pub(super) async fn issue_certificate(
        &self,
        instance: &str,
        dns: &[String],
    ) -> anyhow::Result<()> {
        let secret = self.authorities().await?;
        let pair = certificates::issue(&signing(&secret)?, instance, dns, Timestamp::now())?;
        self.put_certificate(instance, certificates::bundle(&secret), pair)
            .await
    }

    pub(super) async fn write_app_secret(&self, wanted: &AppSecret) -> anyhow::Result<()> {
        let bundle = certificates::bundle(&self.authorities().await?);
        let name = names::app_secret(&self.name);
        let existing = bounded(
            "read the application's Secret",
            self.secrets().get_opt(&name),
        )
        .await?;
        let kept = existing
            .as_ref()
            .and_then(|s| text(s, "password").ok())
            .filter(|p| !p.is_empty());
        let password = kept.unwrap_or_else(new_password);
        let data = wanted.data(&password, &bundle);
        let content: Vec<(&str, String)> =
            data.iter().map(|(k, v)| (k.as_str(), v.clone())).collect();
        let hash = wanted.hash(&certificates::fingerprint(bundle.as_bytes()));
        self.put_secret(&name, &[], Some((build::HASH, &hash)), &content)
            .await
    }

    async fn authorities(&self) -> anyhow::Result<Secret> {
        let name = names::ca_secret(&self.name);
        bounded("read the authority", self.secrets().get(&name)).await
    }

    async fn put_authorities(
        &self,
        switch_after: Option<&str>,
        content: &[(&str, String)],
    ) -> anyhow::Result<()> {
        let name = names::ca_secret(&self.name);
        let annotation = switch_after.map(|at| (keys::SWITCH_AFTER, at));
        self.put_secret(&name, &[], annotation, content).await
    }

    async fn put_certificate(
        &self,
        instance: &str,
        bundle: String,
        pair: Pair,
    ) -> anyhow::Result<()> {
        let content = [
            ("ca.crt", bundle),
            ("tls.crt", pair.certificate),
            ("tls.key", pair.key),
        ];
        let name = names::tls_secret(instance);
        self.put_secret(&name, &[(labels::INSTANCE, instance)], None, &content)
            .await
    }

    /// Makes or brings up to date a Secret of this store; never one of somebody else.
    async fn put_secret(
        &self,
        name: &str,
        extra: &[(&str, &str)],
        annotation: Option<(&str, &str)>,
        content: &[(&str, String)],
    ) -> anyhow::Result<()> {
        let mut metadata = build::metadata(self.store, name, extra);
        if let Some((key, value)) = annotation {
            metadata["annotations"] = json!({ key: value });
        }
        self.hands.put_secret(metadata, content).await
    }
}

/// The authority that signs.
fn signing(secret: &Secret) -> anyhow::Result<Pair> {
    certificates::pair(secret, keys::ACTIVE)
}

fn pair_of(keys: (&'static str, &'static str), pair: Pair) -> Vec<(&'static str, String)> {
    vec![(keys.0, pair.certificate), (keys.1, pair.key)]
}

fn old(bundle: &str) -> Option<(&'static str, String)> {
    (!bundle.is_empty()).then(|| (keys::OLD, bundle.to_owned()))
}

/// 192 bits, URL-safe.
fn new_password() -> String {
    use base64::Engine as _;
    let mut bytes = [0u8; 24];
    rand::rng().fill_bytes(&mut bytes);
    base64::engine::general_purpose::URL_SAFE_NO_PAD.encode(bytes)
}
