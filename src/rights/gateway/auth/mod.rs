//! Who asks, and whether they may.
//!
//! Two ways, and no third: a token that the Kubernetes API server vouches for ([`reviews`], remembered for seconds by
//! [`memory`]), or a client certificate of an authority and a name that were given on the command line.
//! Never: open by default; writes a token, a hash of one or a user's name to a log (names of people are e-mail
//! addresses in many clusters).

pub mod memory;
pub mod reviews;

use std::collections::BTreeSet;
use std::fmt;
use std::net::IpAddr;
use std::sync::Arc;

use axum::http::{HeaderMap, header};

use super::problem::{Kind, Problem};
use reviews::Tokens;

/// What is asked for, as Kubernetes' RBAC names it: on `rightsworkflows/requests`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Verb {
    /// File.
    Create,
    /// Read one.
    Get,
    /// List and count.
    List,
    /// Withdraw, approve, extend.
    Update,
}

impl Verb {
    /// Its name.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Verb::Create => "create",
            Verb::Get => "get",
            Verb::List => "list",
            Verb::Update => "update",
        }
    }
}

/// Who asks: a user's name at the API server, or a certificate's.
#[derive(Clone, PartialEq, Eq, Hash)]
pub struct Caller(pub Arc<str>);

impl fmt::Debug for Caller {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Caller(..)")
    }
}

/// The other end of a connection.
#[derive(Clone, Debug)]
pub struct Peer {
    /// Its address; a load balancer's, if there is one.
    pub address: IpAddr,
    /// Its certificate, if it showed one and the authority given signed it.
    pub certificate: Certificate,
}

/// What a connection's certificate says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Certificate {
    /// There is none.
    None,
    /// One whose subject has exactly one common name.
    Named(Arc<str>),
    /// One without, or with several.
    Nameless,
}

impl Certificate {
    /// Reads a certificate that TLS has verified.
    #[must_use]
    pub fn of(der: &[u8]) -> Self {
        let Ok((_, cert)) = x509_parser::parse_x509_certificate(der) else {
            return Self::Nameless;
        };
        let mut names = cert.subject().iter_common_name();
        match (names.next().map(|n| n.as_str()), names.next()) {
            (Some(Ok(name)), None) if !name.is_empty() => Self::Named(name.into()),
            _ => Self::Nameless,
        }
    }
}

/// Who may do what.
#[derive(Debug)]
pub struct Authentication {
    tokens: Tokens,
    allowed: BTreeSet<String>,
}

impl Authentication {
    /// `allowed`: common names whose certificates may do everything.
    #[must_use]
    pub fn new(tokens: Tokens, allowed: BTreeSet<String>) -> Self {
        Self { tokens, allowed }
    }

    /// Forgets who hasn't asked for a while. To be called now and then.
    pub fn tidy(&self) {
        self.tokens.tidy();
    }

    /// Who asks, if they may.
    ///
    /// # Errors
    /// 401: nobody known; 403: known, and may not; 503: can't be found out now.
    pub async fn caller(
        &self,
        headers: &HeaderMap,
        peer: &Peer,
        verb: Verb,
    ) -> Result<Caller, Problem> {
        // A token says more precisely who asks than the connection it comes over, which may be a proxy's.
        if let Some(token) = bearer(headers)? {
            return self.tokens.caller(token, verb, peer.address).await;
        }
        match &peer.certificate {
            Certificate::Named(name) if self.allowed.contains(&**name) => {
                // Users of the API server begin with "user/": nobody is somebody else's namesake.
                Ok(Caller(format!("certificate/{name}").into()))
            }
            Certificate::None => Err(Problem::new(
                Kind::Unauthenticated,
                "send a token of Kubernetes: the header `Authorization: Bearer TOKEN`, for instance of a service account (projected volume, or `kubectl create token --audience`)",
            )),
            Certificate::Named(_) | Certificate::Nameless => Err(Problem::new(
                Kind::Forbidden,
                "the client certificate's common name is not among those that may use this gateway: have it added (--allow-cn), or send a token",
            )),
        }
    }
}

/// The token of a request.
///
/// # Errors
/// If there is an `Authorization`, but not one of these.
fn bearer(headers: &HeaderMap) -> Result<Option<&str>, Problem> {
    let wrong = |what: &str| {
        Err(Problem::new(
            Kind::Unauthenticated,
            format!("{what}: send one header `Authorization: Bearer TOKEN`"),
        ))
    };
    let mut all = headers.get_all(header::AUTHORIZATION).iter();
    let Some(value) = all.next() else {
        return Ok(None);
    };
    if all.next().is_some() {
        return wrong("there are several Authorization headers");
    }
    let parts = value.to_str().ok().and_then(|text| text.split_once(' '));
    match parts {
        Some((scheme, token)) if scheme.eq_ignore_ascii_case("bearer") => {
            let token = token.trim();
            if token.is_empty() || token.len() > 16 << 10 {
                return wrong("the token is empty or too long");
            }
            Ok(Some(token))
        }
        _ => wrong("the Authorization header has no bearer token"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use axum::http::HeaderValue;

    fn with(values: &[&'static str]) -> HeaderMap {
        let mut headers = HeaderMap::new();
        for v in values {
            headers.append(header::AUTHORIZATION, HeaderValue::from_static(v));
        }
        headers
    }

    #[test]
    fn what_is_a_token() {
        assert_eq!(bearer(&with(&[])), Ok(None));
        assert_eq!(bearer(&with(&["Bearer abc"])), Ok(Some("abc")));
        assert_eq!(bearer(&with(&["bearer  abc"])), Ok(Some("abc")));
        for wrong in [
            &["Basic abc"][..],
            &["Bearer "],
            &["Bearer"],
            &["Bearer a", "Bearer b"],
        ] {
            let problem = bearer(&with(wrong)).unwrap_err();
            assert_eq!(problem.kind, Kind::Unauthenticated, "{wrong:?}");
        }
    }

    #[test]
    fn a_certificate_has_exactly_one_name() {
        let of = |names: &[&str]| {
            let mut params = rcgen::CertificateParams::default();
            params.distinguished_name = rcgen::DistinguishedName::new();
            for name in names {
                params
                    .distinguished_name
                    .push(rcgen::DnType::CommonName, *name);
            }
            let key = rcgen::KeyPair::generate().unwrap();
            Certificate::of(params.self_signed(&key).unwrap().der())
        };
        assert_eq!(of(&["forms"]), Certificate::Named("forms".into()));
        assert_eq!(of(&[]), Certificate::Nameless);
        assert_eq!(of(&[""]), Certificate::Nameless);
        assert_eq!(Certificate::of(b"no certificate"), Certificate::Nameless);
    }
}
