//! How certificate authorities are told apart: by their key identifiers (RFC 5280, 4.2.1.1 and 4.2.1.2).
//!
//! Owns the reading of identifiers from PEM, for whoever makes certificates and whoever uses them.
//! Pure. Never verifies a chain, and never sees a private key.

use std::collections::BTreeSet;
use std::fmt::Write as _;

use x509_parser::certificate::X509Certificate;
use x509_parser::extensions::ParsedExtension;
use x509_parser::pem::Pem;

/// The most authorities that are told of: a rotation has two, and one that is interrupted by another three.
pub const MOST: usize = 8;

/// The identifiers of the authorities in a bundle, in hex, each once and sorted. What isn't a certificate counts as
/// none.
#[must_use]
pub fn authorities(bundle: &[u8]) -> Vec<String> {
    let all = Pem::iter_from_buffer(bundle)
        .filter_map(Result::ok)
        .filter_map(|pem| id(&pem.parse_x509().ok()?));
    let all: BTreeSet<String> = all.collect();
    all.into_iter().take(MOST).collect()
}

/// The identifier of the authority that signed the first certificate, in hex.
#[must_use]
pub fn signer(certificate: &[u8]) -> Option<String> {
    let (_, pem) = x509_parser::pem::parse_x509_pem(certificate).ok()?;
    let parsed = pem.parse_x509().ok()?;
    parsed
        .extensions()
        .iter()
        .find_map(|e| match e.parsed_extension() {
            ParsedExtension::AuthorityKeyIdentifier(known) => {
                known.key_identifier.as_ref().map(|id| hex(id.0))
            }
            _ => None,
        })
}

/// The identifier of an authority's own key.
#[must_use]
pub fn id(authority: &X509Certificate<'_>) -> Option<String> {
    authority
        .extensions()
        .iter()
        .find_map(|e| match e.parsed_extension() {
            ParsedExtension::SubjectKeyIdentifier(own) => Some(hex(own.0)),
            _ => None,
        })
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().fold(String::new(), |mut all, b| {
        let _ = write!(all, "{b:02x}");
        all
    })
}
