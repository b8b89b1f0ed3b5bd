//! The store's own certificate authority and its instances' certificates.
//!
//! Owns how they are made and when they are renewed. One authority per store: a certificate of one store is
//! worth nothing at another.
//! Never logs key material and never keeps it beyond the call that makes it.

use jiff::{SignedDuration, Timestamp};
use k8s_openapi::api::core::v1::Secret;
use rcgen::{
    BasicConstraints, CertificateParams, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair,
    KeyUsagePurpose, PublicKeyData,
};
use sha2::{Digest, Sha256};

/// How long an authority lasts.
const AUTHORITY_LIFE: SignedDuration = SignedDuration::from_hours(24 * 3650);
/// How long an instance's certificate lasts.
const LEAF_LIFE: SignedDuration = SignedDuration::from_hours(24 * 90);
/// How long before its end a certificate is renewed. A person has this long to notice a failing renewal.
const RENEW_BEFORE: SignedDuration = SignedDuration::from_hours(24 * 30);
/// Certificates begin this much earlier, for clocks that are behind.
const CLOCK_SKEW: SignedDuration = SignedDuration::from_hours(1);

/// What is known of a certificate without its key.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Facts {
    /// When it begins.
    pub not_before: Timestamp,
    /// When it ends.
    pub not_after: Timestamp,
    /// SHA-256 of the authority's certificate beside it, in hex.
    pub authority: String,
    /// Its DNS names, sorted.
    pub names: Vec<String>,
}

impl Facts {
    /// Whether it should be made anew: it ends soon, another authority signed it, or it lacks a name.
    #[must_use]
    pub fn outdated(&self, now: Timestamp, authority: &str, names: &[String]) -> bool {
        now.saturating_add(RENEW_BEFORE)
            .is_ok_and(|soon| soon >= self.not_after)
            // Made by a clock that has been set back since: nobody would accept it.
            || self.not_before > now
            || self.authority != authority
            || names.iter().any(|name| !self.names.contains(name))
    }
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
    let (_, pem) = x509_parser::pem::parse_x509_pem(&data.get(certificate)?.0).ok()?;
    let private = KeyPair::from_pem(std::str::from_utf8(&data.get(key)?.0).ok()?).ok()?;
    let authority = data
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
        authority,
        names,
    })
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
    let mut params = params(
        &format!("{store}.{namespace} store authority"),
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
    let issuer =
        Issuer::from_ca_cert_pem(&authority.certificate, KeyPair::from_pem(&authority.key)?)?;
    let key = KeyPair::generate()?;
    let mut params = params(instance, names, now, LEAF_LIFE)?;
    params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
    params.extended_key_usages = vec![
        ExtendedKeyUsagePurpose::ServerAuth,
        ExtendedKeyUsagePurpose::ClientAuth,
    ];
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
    let mut all: Vec<String> = [instance.to_owned(), names::rw(store), names::ro(store)]
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
    fn a_certificate_is_renewed_before_its_end_after_a_new_authority_and_for_a_new_name() {
        let now = Timestamp::from_second(1_800_000_000).unwrap();
        let ca = new_authority("consumers", "records", now).unwrap();
        let wanted = dns_names("consumers", "records", "consumers-1");
        let leaf = issue(&ca, "consumers-1", &wanted, now).unwrap();
        let facts = read(&leaf.certificate, &leaf.key, &ca.certificate).unwrap();
        let authority = fingerprint(ca.certificate.as_bytes());

        assert!(!facts.outdated(now, &authority, &wanted));
        assert!(!facts.outdated(
            now + SignedDuration::from_hours(24 * 59),
            &authority,
            &wanted
        ));
        assert!(facts.outdated(
            now + SignedDuration::from_hours(24 * 61),
            &authority,
            &wanted
        ));
        assert!(
            facts.outdated(now - SignedDuration::from_hours(2), &authority, &wanted),
            "the clock went back"
        );
        assert!(facts.outdated(now, "another", &wanted));
        assert!(facts.outdated(now, &authority, &["new.name".to_owned()]));
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
