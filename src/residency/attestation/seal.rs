//! Signing and opening.
//!
//! Owns the envelope: DSSE 1.0 (<https://github.com/secure-systems-lab/dsse/blob/master/protocol.md>), which signs
//! the statement's very bytes, so that nothing depends on how JSON is written. Ed25519 by `ring`, as TLS.
//! Never shows a private key: it has no `Debug` and is never written out from here.

use std::fmt;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use ring::signature::{ED25519, Ed25519KeyPair, KeyPair as _, UnparsedPublicKey};
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use super::Statement;

/// DSSE's `payloadType` of our statements.
pub const PAYLOAD_TYPE: &str = "application/vnd.domicile.attestation.v1+json";

/// What precedes the 32 bytes of an Ed25519 key in a `SubjectPublicKeyInfo`, by RFC 8410.
const SPKI: [u8; 12] = [
    0x30, 0x2a, 0x30, 0x05, 0x06, 0x03, 0x2b, 0x65, 0x70, 0x03, 0x21, 0x00,
];

/// Why an envelope doesn't open, or a key can't be used.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SealError {
    /// Not an Ed25519 key.
    #[error("not an Ed25519 {0}")]
    Key(&'static str),
    /// Not what DSSE prescribes.
    #[error("the envelope is malformed: {0}")]
    Envelope(String),
    /// The envelope names another key.
    #[error("the entry is signed with key {named}, not with key {expected}")]
    OtherKey {
        /// The key that it names.
        named: String,
        /// The key it was to be opened with.
        expected: String,
    },
    /// The signature isn't over these bytes with this key.
    #[error("the signature does not fit the entry: it was changed, or another key signed it")]
    Signature,
    /// Signed, but not understood.
    #[error(
        "the entry is signed but can't be understood, perhaps it was made by a newer version: {0}"
    )]
    Statement(String),
}

/// A public key.
#[derive(Clone, PartialEq, Eq)]
pub struct PublicKey([u8; 32]);

impl fmt::Debug for PublicKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "PublicKey({})", self.id())
    }
}

impl PublicKey {
    /// SHA-256 of the key's `SubjectPublicKeyInfo`, in hex. As
    /// `openssl pkey -pubin -in KEY.pem -outform DER | sha256sum`.
    #[must_use]
    pub fn id(&self) -> String {
        hex(&Sha256::digest(self.der()))
    }

    fn der(&self) -> Vec<u8> {
        [&SPKI[..], &self.0[..]].concat()
    }

    fn from_der(der: &[u8]) -> Result<Self, SealError> {
        der.strip_prefix(&SPKI[..])
            .and_then(|raw| raw.try_into().ok())
            .map(Self)
            .ok_or(SealError::Key("public key"))
    }

    /// As PEM.
    #[must_use]
    pub fn to_pem(&self) -> String {
        pem::encode_config(
            &pem::Pem::new("PUBLIC KEY", self.der()),
            pem::EncodeConfig::new().set_line_ending(pem::LineEnding::LF),
        )
    }

    /// From PEM.
    ///
    /// # Errors
    /// If it isn't an Ed25519 public key.
    pub fn from_pem(text: &str) -> Result<Self, SealError> {
        let pem = pem::parse(text).map_err(|_| SealError::Key("public key in PEM"))?;
        if pem.tag() != "PUBLIC KEY" {
            return Err(SealError::Key("public key in PEM"));
        }
        Self::from_der(pem.contents())
    }
}

/// A public key with its id, as documents carry it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct NamedKey {
    /// [`PublicKey::id`].
    pub keyid: String,
    /// Its `SubjectPublicKeyInfo`, base64.
    pub public_key: String,
}

impl From<&PublicKey> for NamedKey {
    fn from(key: &PublicKey) -> Self {
        Self {
            keyid: key.id(),
            public_key: STANDARD.encode(key.der()),
        }
    }
}

impl NamedKey {
    /// The key, if it is the one of that id.
    ///
    /// # Errors
    /// If it isn't, or isn't an Ed25519 key.
    pub fn open(&self) -> Result<PublicKey, SealError> {
        let der = STANDARD
            .decode(&self.public_key)
            .map_err(|_| SealError::Key("public key"))?;
        let key = PublicKey::from_der(&der)?;
        if key.id() == self.keyid {
            Ok(key)
        } else {
            Err(SealError::OtherKey {
                named: self.keyid.clone(),
                expected: key.id(),
            })
        }
    }
}

/// A private key. No `Debug`: it must not get into a log.
pub struct SigningKey(Ed25519KeyPair);

impl SigningKey {
    /// One whose every byte is this, without the public half, as OpenSSL writes it.
    #[cfg(test)]
    #[allow(
        clippy::unwrap_used,
        reason = "a test that can't go on should say so and stop"
    )]
    pub(crate) fn of_seed(seed: u8) -> Self {
        let mut der = vec![
            0x30, 0x2e, 0x02, 0x01, 0x00, 0x30, 0x05, 0x06, 0x03, 0x2b, 0x65, 0x70, 0x04, 0x22,
            0x04, 0x20,
        ];
        der.extend([seed; 32]);
        Self::from_pem(&pem::encode(&pem::Pem::new("PRIVATE KEY", der))).unwrap()
    }

    /// From PEM (PKCS #8), as `openssl genpkey -algorithm ed25519` writes it.
    ///
    /// # Errors
    /// If it isn't an Ed25519 private key. The text is not repeated.
    pub fn from_pem(text: &str) -> Result<Self, SealError> {
        let wrong = SealError::Key("private key in PEM (PKCS #8)");
        let pem = pem::parse(text).map_err(|_| wrong.clone())?;
        if pem.tag() != "PRIVATE KEY" {
            return Err(wrong);
        }
        // OpenSSL leaves the public half out, which is then computed.
        Ed25519KeyPair::from_pkcs8_maybe_unchecked(pem.contents())
            .map(Self)
            .map_err(|_| wrong)
    }

    /// Its public half.
    #[must_use]
    pub fn public(&self) -> PublicKey {
        let mut raw = [0; 32];
        raw.copy_from_slice(self.0.public_key().as_ref());
        PublicKey(raw)
    }

    /// Signs.
    ///
    /// # Errors
    /// If the statement can't be written as JSON.
    pub fn sign(&self, statement: &Statement) -> Result<Envelope, SealError> {
        let payload =
            serde_json::to_vec(statement).map_err(|e| SealError::Statement(e.to_string()))?;
        let signature = self.0.sign(&pae(PAYLOAD_TYPE, &payload));
        Ok(Envelope {
            payload_type: PAYLOAD_TYPE.to_owned(),
            payload: STANDARD.encode(payload),
            signatures: [Signature {
                keyid: self.public().id(),
                sig: STANDARD.encode(signature.as_ref()),
            }],
        })
    }
}

/// A signed statement.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Envelope {
    /// Always [`PAYLOAD_TYPE`].
    pub payload_type: String,
    /// The statement's JSON, base64.
    pub payload: String,
    /// Exactly one.
    pub signatures: [Signature; 1],
}

/// A signature.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Signature {
    /// [`PublicKey::id`] of the key.
    pub keyid: String,
    /// Ed25519 over the pre-authentication encoding, base64.
    pub sig: String,
}

impl Envelope {
    /// Id of the key that it says it is signed with.
    #[must_use]
    pub fn keyid(&self) -> &str {
        &self.signatures[0].keyid
    }

    fn payload(&self) -> Result<Vec<u8>, SealError> {
        if self.payload_type != PAYLOAD_TYPE {
            return Err(SealError::Envelope(format!(
                "payloadType is not {PAYLOAD_TYPE}"
            )));
        }
        // The decoder takes canonical base64 only: there is one text for these bytes.
        STANDARD
            .decode(&self.payload)
            .map_err(|e| SealError::Envelope(format!("payload: {e}")))
    }

    /// SHA-256 of what is signed (DSSE's pre-authentication encoding), in hex: by this the next entry names it.
    ///
    /// # Errors
    /// If it is malformed.
    pub fn hash(&self) -> Result<String, SealError> {
        let bytes = pae(PAYLOAD_TYPE, &self.payload()?);
        Ok(hex(&Sha256::digest(bytes)))
    }

    /// What it says, without asking who says so.
    ///
    /// # Errors
    /// If it is malformed.
    pub fn read(&self) -> Result<Statement, SealError> {
        serde_json::from_slice(&self.payload()?).map_err(|e| SealError::Statement(e.to_string()))
    }

    /// What it says, if that is signed with `key`.
    ///
    /// # Errors
    /// If it isn't, or it is malformed.
    pub fn open(&self, key: &PublicKey) -> Result<Statement, SealError> {
        if self.keyid() != key.id() {
            return Err(SealError::OtherKey {
                named: self.keyid().to_owned(),
                expected: key.id(),
            });
        }
        let signature = STANDARD
            .decode(&self.signatures[0].sig)
            .map_err(|e| SealError::Envelope(format!("sig: {e}")))?;
        UnparsedPublicKey::new(&ED25519, key.0)
            .verify(&pae(PAYLOAD_TYPE, &self.payload()?), &signature)
            .map_err(|_| SealError::Signature)?;
        self.read()
    }
}

/// DSSE's pre-authentication encoding.
fn pae(kind: &str, body: &[u8]) -> Vec<u8> {
    let mut out = format!("DSSEv1 {} {kind} {} ", kind.len(), body.len()).into_bytes();
    out.extend_from_slice(body);
    out
}

/// Lower-case hexadecimal.
#[must_use]
pub fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|b| format!("{b:02x}")).collect()
}

/// SHA-256 of a value's JSON, in hex.
#[must_use]
pub fn digest(value: &impl Serialize) -> String {
    hex(&Sha256::digest(
        serde_json::to_vec(value).unwrap_or_default(),
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The example of DSSE's own specification.
    #[test]
    fn the_encoding_is_dsse() {
        let encoded = pae("http://example.com/HelloWorld", b"hello world");
        assert_eq!(
            encoded,
            b"DSSEv1 29 http://example.com/HelloWorld 11 hello world"
        );
    }

    /// RFC 8032, section 7.1, TEST 1: the key as `openssl` would write it, without its public half.
    const SECRET: &str = "-----BEGIN PRIVATE KEY-----\n\
        MC4CAQAwBQYDK2VwBCIEIJ1hsZ3v/VpguoRK9JLsLMREScVpezJpGXA7rAMcrn9g\n\
        -----END PRIVATE KEY-----\n";

    #[test]
    fn keys_come_as_openssl_writes_them() {
        let public = SigningKey::from_pem(SECRET).unwrap().public();
        assert_eq!(
            hex(&public.0),
            "d75a980182b10ab7d54bfed3c964073a0ee172f3daa62325af021a68f707511a"
        );
        assert_eq!(PublicKey::from_pem(&public.to_pem()).unwrap(), public);
        assert_eq!(NamedKey::from(&public).open().unwrap(), public);
        assert!(PublicKey::from_pem(SECRET).is_err());
        assert!(SigningKey::from_pem(&public.to_pem()).is_err());
    }

    #[test]
    fn a_key_under_another_id_is_refused() {
        let public = SigningKey::from_pem(SECRET).unwrap().public();
        let mut named = NamedKey::from(&public);
        named.keyid.replace_range(0..1, "g");
        assert!(named.open().is_err());
    }
}
