//! The store's own certificate authority and its instances' certificates.
//!
//! Owns how they are made and when an instance's is renewed (when an authority is: `rotation`). Authorities are a
//! store's own: a certificate of one store is worth nothing at another.
//! Never logs key material and never keeps it beyond the call that makes it.

use std::collections::BTreeMap;

use anyhow::Context as _;
use jiff::{SignedDuration, Timestamp};
use k8s_openapi::api::core::v1::Secret;
use kube::ResourceExt;
use rcgen::{
    BasicConstraints, CertificateParams, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair,
    KeyUsagePurpose, PublicKeyData,
};
use sha2::{Digest, Sha256};

use crate::pki;

/// How long an authority lasts.
const AUTHORITY_LIFE: SignedDuration = SignedDuration::from_hours(24 * 3650);
/// How long an instance's certificate lasts.
const LEAF_LIFE: SignedDuration = SignedDuration::from_hours(24 * 90);
/// How long before its end a certificate is renewed. A person has this long to notice a failing renewal.
const RENEW_BEFORE: SignedDuration = SignedDuration::from_hours(24 * 30);
/// Certificates begin this much earlier, for clocks that are behind.
const CLOCK_SKEW: SignedDuration = SignedDuration::from_hours(1);

/// How long before its end an instance's certificate is signed by an authority that not all are known to trust:
/// later nobody would accept it anyway.
const LAST_RESORT: SignedDuration = SignedDuration::from_hours(24 * 7);

/// What is known of an instance's certificate without its key.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Facts {
    /// When it begins.
    pub not_before: Timestamp,
    /// When it ends.
    pub not_after: Timestamp,
    /// [`fingerprint`] of the authorities beside it.
    pub bundle: String,
    /// Who signed it ([`pki::signer`]).
    pub signer: Option<String>,
    /// Its DNS names, sorted.
    pub names: Vec<String>,
}

impl Facts {
    /// Whether it should be made anew: it ends soon, another authority signed it than the one that signs now, or it
    /// lacks a name. While not all instances are known to trust `signer`, one that another authority signed is kept
    /// as long as it can be.
    #[must_use]
    pub fn outdated(&self, now: Timestamp, signer: &str, trusted: bool, names: &[String]) -> bool {
        let same = self.signer.as_deref() == Some(signer);
        // Made by a clock that has been set back since: nobody would accept it.
        let unusable = self.not_before > now || self.ending(now);
        let wanting = !same
            || self.ends_within(RENEW_BEFORE, now)
            || names.iter().any(|name| !self.names.contains(name));
        unusable || (wanting && (same || trusted))
    }

    /// Whether it ends so soon that its renewal must have failed for weeks.
    #[must_use]
    pub fn ending(&self, now: Timestamp) -> bool {
        self.ends_within(LAST_RESORT, now)
    }

    fn ends_within(&self, time: SignedDuration, now: Timestamp) -> bool {
        now.saturating_add(time)
            .is_ok_and(|soon| soon >= self.not_after)
    }
}

/// What is known of an authority without its key.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Known {
    /// Its identifier ([`pki::id`]).
    pub id: String,
    /// When it ends.
    pub not_after: Timestamp,
}

/// What is known of a store's authorities: the one that signs, and in a rotation its successor or predecessors.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Authorities {
    /// It signs.
    pub active: Known,
    /// It is to sign once it is trusted.
    pub next: Option<Known>,
    /// They signed, and are still trusted.
    pub old: Vec<String>,
    /// Before this `next` doesn't sign: clients read its certificate until then.
    pub switch_after: Option<Timestamp>,
    /// [`fingerprint`] of all of them together, as instances and clients get them.
    pub bundle: String,
}

/// The keys of the Secret with a store's authorities.
pub mod keys {
    /// Who signs.
    pub const ACTIVE: (&str, &str) = ("ca.crt", "ca.key");
    /// Who is to sign.
    pub const NEXT: (&str, &str) = ("next.crt", "next.key");
    /// Who signed.
    pub const OLD: &str = "old.crt";
    /// Annotation: when the next may sign at the earliest.
    pub const SWITCH_AFTER: &str = "domicile.dev/switch-after";
}

/// Reads what is known of a store's authorities. `None` if the one that signs is damaged.
#[must_use]
pub fn authorities(secret: &Secret) -> Option<Authorities> {
    let known = |(certificate, key)| {
        let facts = facts(secret, certificate, key)?;
        let pem = secret.data.as_ref()?.get(certificate)?;
        Some(Known {
            id: pki::authorities(&pem.0).into_iter().next()?,
            not_after: facts.not_after,
        })
    };
    let old = secret.data.as_ref()?.get(keys::OLD);
    Some(Authorities {
        active: known(keys::ACTIVE)?,
        next: known(keys::NEXT),
        old: old.map(|o| pki::authorities(&o.0)).unwrap_or_default(),
        switch_after: secret
            .annotations()
            .get(keys::SWITCH_AFTER)
            .and_then(|at| at.parse().ok()),
        bundle: fingerprint(bundle(secret).as_bytes()),
    })
}

/// All authorities of a store's Secret, PEM, the one that signs first. A store that has never rotated has one.
#[must_use]
pub fn bundle(secret: &Secret) -> String {
    // One whose key is damaged will never sign.
    let next = facts(secret, keys::NEXT.0, keys::NEXT.1).map(|_| keys::NEXT.0);
    let part = |key: &str| {
        let bytes = secret.data.as_ref()?.get(key)?;
        Some(std::str::from_utf8(&bytes.0).ok()?.to_owned())
    };
    [Some(keys::ACTIVE.0), next, Some(keys::OLD)]
        .into_iter()
        .flatten()
        .filter_map(part)
        .collect()
}

/// A certificate and its key, PEM. No `Debug`: it would print the key.
pub struct Pair {
    /// The certificate.
    pub certificate: String,
    /// The private key.
    pub key: String,
}

/// Reads what is known of the certificate under `certificate` of a Secret, whose key is under `key`. `None` if
/// it isn't a certificate or the key isn't its own, so that a damaged Secret is made anew.
#[must_use]
pub fn facts(secret: &Secret, certificate: &str, key: &str) -> Option<Facts> {
    let data = secret.data.as_ref()?;
    let pem_bytes = &data.get(certificate)?.0;
    let (_, pem) = x509_parser::pem::parse_x509_pem(pem_bytes).ok()?;
    let private = KeyPair::from_pem(std::str::from_utf8(&data.get(key)?.0).ok()?).ok()?;
    let bundle = data
        .get("ca.crt")
        .map(|ca| fingerprint(&ca.0))
        .unwrap_or_default();
    let parsed = pem.parse_x509().ok()?;
    if parsed.public_key().raw != private.subject_public_key_info() {
        return None;
    }
    let mut names: Vec<String> = parsed
        .subject_alternative_name()
        .ok()
        .flatten()
        .map(|san| {
            san.value
                .general_names
                .iter()
                .filter_map(|name| match name {
                    x509_parser::extensions::GeneralName::DNSName(dns) => Some((*dns).to_owned()),
                    _ => None,
                })
                .collect()
        })
        .unwrap_or_default();
    names.sort();
    Some(Facts {
        not_before: Timestamp::from_second(parsed.validity().not_before.timestamp()).ok()?,
        not_after: Timestamp::from_second(parsed.validity().not_after.timestamp()).ok()?,
        bundle,
        signer: pki::signer(pem_bytes),
        names,
    })
}

/// The certificate and the key under these keys of a Secret.
///
/// # Errors
/// If one isn't there, or isn't text.
pub fn pair(secret: &Secret, keys: (&str, &str)) -> anyhow::Result<Pair> {
    Ok(Pair {
        certificate: text(secret, keys.0)?,
        key: text(secret, keys.1)?,
    })
}

/// What is under a key of a Secret.
///
/// # Errors
/// If nothing is, or isn't text.
pub fn text(secret: &Secret, key: &str) -> anyhow::Result<String> {
    let bytes = secret
        .data
        .as_ref()
        .and_then(|d| d.get(key))
        .with_context(|| format!("Secret {} has no key {key}", secret.name_any()))?;
    Ok(String::from_utf8(bytes.0.clone())?)
}

/// The authorities of a bundle, each once and at most [`pki::MOST`], without those that have ended.
#[must_use]
pub fn distinct(bundle: &str, now: Timestamp) -> String {
    let lines = pem::EncodeConfig::new().set_line_ending(pem::LineEnding::LF);
    let mut seen = BTreeMap::new();
    for pem in pem::parse_many(bundle).unwrap_or_default() {
        let Ok((_, parsed)) = x509_parser::parse_x509_certificate(pem.contents()) else {
            continue;
        };
        if let Some(id) = pki::id(&parsed)
            && parsed.validity().not_after.timestamp() > now.as_second()
            && seen.len() < pki::MOST - 2
        {
            seen.entry(id)
                .or_insert_with(|| pem::encode_config(&pem, lines));
        }
    }
    seen.into_values().collect()
}

/// SHA-256 of a PEM file's bytes, in hex.
#[must_use]
pub fn fingerprint(pem: &[u8]) -> String {
    Sha256::digest(pem)
        .iter()
        .map(|b| format!("{b:02x}"))
        .collect()
}

/// A new authority for a store.
///
/// # Errors
/// If the system has no randomness or the names can't be encoded.
pub fn new_authority(store: &str, namespace: &str, now: Timestamp) -> anyhow::Result<Pair> {
    let key = KeyPair::generate()?;
    // The hour tells it from its successor, for clients that look for an authority by its name.
    let hour = now.strftime("%Y-%m-%dT%HZ");
    let mut params = params(
        &format!("{hour} {store}.{namespace} store authority"),
        &[],
        now,
        AUTHORITY_LIFE,
    )?;
    params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    Ok(Pair {
        certificate: params.self_signed(&key)?.pem(),
        key: key.serialize_pem(),
    })
}

/// A certificate for an instance: common name = instance, so that PostgreSQL can map it to its role.
///
/// # Errors
/// If the authority's Secret is damaged or a name can't be encoded.
pub fn issue(
    authority: &Pair,
    instance: &str,
    names: &[String],
    now: Timestamp,
) -> anyhow::Result<Pair> {
    issue_for(Use::Both, authority, instance, names, now)
}

/// What a certificate is good for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Use {
    /// To be connected to.
    Server,
    /// To connect.
    Client,
    /// Both.
    Both,
}

/// A certificate with this common name.
///
/// # Errors
/// As [`issue`].
pub fn issue_for(
    purpose: Use,
    authority: &Pair,
    common_name: &str,
    names: &[String],
    now: Timestamp,
) -> anyhow::Result<Pair> {
    let issuer =
        Issuer::from_ca_cert_pem(&authority.certificate, KeyPair::from_pem(&authority.key)?)?;
    let key = KeyPair::generate()?;
    let mut params = params(common_name, names, now, LEAF_LIFE)?;
    params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
    params.extended_key_usages = match purpose {
        Use::Server => vec![ExtendedKeyUsagePurpose::ServerAuth],
        Use::Client => vec![ExtendedKeyUsagePurpose::ClientAuth],
        Use::Both => vec![
            ExtendedKeyUsagePurpose::ServerAuth,
            ExtendedKeyUsagePurpose::ClientAuth,
        ],
    };
    params.use_authority_key_identifier_extension = true;
    Ok(Pair {
        certificate: params.signed_by(&key, &issuer)?.pem(),
        key: key.serialize_pem(),
    })
}

fn params(
    common_name: &str,
    names: &[String],
    now: Timestamp,
    life: SignedDuration,
) -> anyhow::Result<CertificateParams> {
    let mut params = CertificateParams::new(names.to_vec())?;
    params.distinguished_name = rcgen::DistinguishedName::new();
    // X.509 allows 64 characters here; the full names are in the alternative names.
    params.distinguished_name.push(
        DnType::CommonName,
        common_name.chars().take(64).collect::<String>(),
    );
    let at = |t: Timestamp| time::OffsetDateTime::from_unix_timestamp(t.as_second());
    params.not_before = at(now.saturating_sub(CLOCK_SKEW)?)?;
    params.not_after = at(now.saturating_add(life)?)?;
    Ok(params)
}

/// The DNS names of an instance's certificate: its own Service's and those of `-rw` and `-ro`, in every form
/// in which a client may write them.
#[must_use]
pub fn dns_names(store: &str, namespace: &str, instance: &str) -> Vec<String> {
    use crate::api::names;
    service_names(
        &[instance.to_owned(), names::rw(store), names::ro(store)],
        namespace,
    )
}

/// Services in every form in which a client may write them, sorted.
#[must_use]
pub fn service_names(services: &[String], namespace: &str) -> Vec<String> {
    let mut all: Vec<String> = services
        .iter()
        .flat_map(|service| {
            [
                service.clone(),
                format!("{service}.{namespace}"),
                format!("{service}.{namespace}.svc"),
                format!("{service}.{namespace}.svc.cluster.local"),
            ]
        })
        .collect();
    all.sort();
    all
}

#[cfg(test)]
mod tests {
    use super::*;
    use k8s_openapi::ByteString;

    fn secret(certificate: &str, key: &str, ca: &str) -> Secret {
        let data = [("tls.crt", certificate), ("tls.key", key), ("ca.crt", ca)];
        Secret {
            data: Some(
                data.iter()
                    .map(|(k, v)| ((*k).to_owned(), ByteString(v.as_bytes().to_vec())))
                    .collect(),
            ),
            ..Secret::default()
        }
    }

    fn read(certificate: &str, key: &str, ca: &str) -> Option<Facts> {
        facts(&secret(certificate, key, ca), "tls.crt", "tls.key")
    }

    #[test]
    fn a_certificate_is_renewed_before_its_end_for_a_new_authority_and_for_a_new_name() {
        let now = Timestamp::from_second(1_800_000_000).unwrap();
        let ca = new_authority("consumers", "records", now).unwrap();
        let wanted = dns_names("consumers", "records", "consumers-1");
        let leaf = issue(&ca, "consumers-1", &wanted, now).unwrap();
        let facts = read(&leaf.certificate, &leaf.key, &ca.certificate).unwrap();
        let id = pki::authorities(ca.certificate.as_bytes()).remove(0);
        assert_eq!(facts.signer.as_deref(), Some(id.as_str()));
        let after = |days: i64| now + SignedDuration::from_hours(24 * days);

        assert!(!facts.outdated(now, &id, false, &wanted));
        assert!(!facts.outdated(after(59), &id, false, &wanted));
        assert!(facts.outdated(after(61), &id, false, &wanted));
        let before = now - SignedDuration::from_hours(2);
        assert!(
            facts.outdated(before, &id, false, &wanted),
            "the clock went back"
        );
        assert!(facts.outdated(now, &id, false, &["new.name".to_owned()]));
        assert!(facts.outdated(now, "another", true, &wanted));
        assert!(
            !facts.outdated(after(82), "another", false, &wanted),
            "nobody would believe it"
        );
        assert!(
            facts.outdated(after(84), "another", false, &wanted),
            "in a week nobody would believe the old one either"
        );
        assert!(facts.ending(after(84)) && !facts.ending(after(82)));
    }

    #[test]
    fn authorities_are_told_apart_and_handed_out_together() {
        let now = Timestamp::from_second(1_800_000_000).unwrap();
        let made = || new_authority("consumers", "records", now).unwrap();
        let (first, second, third) = (made(), made(), made());
        let id = |pair: &Pair| pki::authorities(pair.certificate.as_bytes()).remove(0);
        let mut secret = secret("", "", &first.certificate);
        let data = secret.data.as_mut().unwrap();
        for (key, value) in [
            ("ca.key", &first.key),
            ("next.crt", &second.certificate),
            ("next.key", &second.key),
            ("old.crt", &third.certificate),
        ] {
            data.insert(key.into(), ByteString(value.as_bytes().to_vec()));
        }
        let known = authorities(&secret).unwrap();
        assert_eq!(known.active.id, id(&first));
        assert_eq!(known.next.unwrap().id, id(&second));
        assert_eq!(known.old, [id(&third)]);
        let mut all = [id(&first), id(&second), id(&third)];
        all.sort();
        let bundle = bundle(&secret);
        assert_eq!(pki::authorities(bundle.as_bytes()), all);
        assert!(bundle.starts_with(&first.certificate));

        let data = secret.data.as_mut().unwrap();
        data.insert("next.key".into(), ByteString(third.key.into_bytes()));
        assert_eq!(authorities(&secret).unwrap().next, None, "another's key");
        secret.data.as_mut().unwrap().remove("ca.key");
        assert_eq!(authorities(&secret), None);
    }

    #[test]
    fn a_damaged_secret_has_no_facts() {
        let now = Timestamp::from_second(1_800_000_000).unwrap();
        let ca = new_authority("consumers", "records", now).unwrap();
        let other = new_authority("consumers", "records", now).unwrap();
        assert!(read(&ca.certificate, &ca.key, "").is_some());
        assert_eq!(read(&ca.certificate, &other.key, ""), None, "another's key");
        assert_eq!(read(&ca.certificate, "", ""), None, "no key");
        let broken = "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----";
        assert_eq!(read(broken, &ca.key, ""), None);
    }
}
