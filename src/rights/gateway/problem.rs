//! What the gateway answers when it can't do what was asked: RFC 9457 problem documents.
//!
//! Owns the `type` of every problem, which is stable and which programs may match on, its status and its title.
//! Never: repeats a value or a name that a client sent. A name may be a value in the wrong place
//! (`{"identifiers": {"alice@example.com": "email"}}`), so words say how many names are unknown, and which are known.

use std::time::Duration;

use axum::http::{HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use serde::Serialize;
use utoipa::ToSchema;

/// Begins the `type` of every problem. An identifier; nothing need be there to fetch.
pub const TYPES: &str = "https://domicile.dev/problems/";

/// The media type of a problem.
pub const MEDIA_TYPE: &str = "application/problem+json";

macro_rules! kinds {
    ($($(#[$doc:meta])* $name:ident => $status:literal, $slug:literal, $title:literal;)*) => {
        /// What kind of problem it is.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
        pub enum Kind { $($(#[$doc])* $name,)* }

        impl Kind {
            /// Every kind.
            pub const ALL: &[Kind] = &[$(Kind::$name,)*];

            /// The last part of its `type`; also its name in metrics.
            #[must_use]
            pub fn slug(self) -> &'static str {
                match self { $(Kind::$name => $slug,)* }
            }

            /// The HTTP status.
            #[must_use]
            pub fn status(self) -> u16 {
                match self { $(Kind::$name => $status,)* }
            }

            /// The title: the same for every problem of the kind.
            #[must_use]
            pub fn title(self) -> &'static str {
                match self { $(Kind::$name => $title,)* }
            }
        }
    };
}

kinds! {
    /// The body is no JSON.
    MalformedJson => 400, "malformed-json", "The body is not JSON";
    /// A header, a parameter or the path isn't what it should be.
    MalformedRequest => 400, "malformed-request", "A header or parameter is malformed";
    /// Nobody known asks.
    Unauthenticated => 401, "unauthenticated", "Who asks is not known";
    /// Who asks may not.
    Forbidden => 403, "forbidden", "Who asks may not do this";
    /// No request has that id.
    UnknownRequest => 404, "unknown-request", "There is no such request";
    /// No such path.
    UnknownPath => 404, "unknown-path", "There is no such path";
    /// Not this method on that path.
    MethodNotAllowed => 405, "method-not-allowed", "The path has no such method";
    /// The client was too slow.
    TooSlow => 408, "too-slow", "The request came in too slowly";
    /// The idempotency key belongs to another request.
    KeyReused => 409, "idempotency-key-reused", "The idempotency key belongs to a request with another content";
    /// The request is in another state than that takes.
    WrongState => 409, "wrong-state", "The request is not in a state in which this can be done";
    /// The body is too large.
    TooLarge => 413, "too-large", "The body is too large";
    /// The body isn't said to be JSON.
    UnsupportedMediaType => 415, "unsupported-media-type", "The body must be application/json";
    /// Several things are wrong with the content.
    Invalid => 422, "invalid-request", "The content is not valid";
    /// A field that nothing knows.
    UnknownField => 422, "unknown-field", "A field is unknown";
    /// A field that must be there.
    MissingField => 422, "missing-field", "A field is missing";
    /// A field of another type.
    WrongType => 422, "wrong-type", "A field has the wrong type";
    /// A regime that the workflow doesn't have.
    UnknownRegime => 422, "unknown-regime", "A regime is not one of the workflow's";
    /// An identifier that the workflow doesn't have.
    UnknownIdentifier => 422, "unknown-identifier", "An identifier is not one of the workflow's";
    /// An identifier's value is too long, empty, or has control characters.
    InvalidIdentifier => 422, "invalid-identifier", "An identifier's value can't be used";
    /// A target needs an identifier that wasn't given.
    MissingIdentifier => 422, "missing-identifier", "A target needs an identifier that was not given";
    /// A channel that nothing knows.
    UnknownChannel => 422, "unknown-channel", "The channel is unknown";
    /// A kind of request that isn't carried out (yet).
    UnsupportedKind => 422, "unsupported-kind", "This kind of request is not supported";
    /// A law forbids to let the request wait for approval.
    ApprovalForbidden => 422, "approval-forbidden", "The request may not wait for approval";
    /// A time that can't be.
    InvalidTime => 422, "invalid-time", "A time can't be right";
    /// The law doesn't permit the extension.
    NoExtension => 422, "no-extension", "The deadline can't be extended";
    /// More at once than the gateway takes.
    Overloaded => 429, "overloaded", "The gateway is busy";
    /// More often than the client may.
    RateLimited => 429, "rate-limited", "The client asks too often";
    /// Something here is broken.
    Internal => 500, "internal", "The gateway has an error";
    /// The ledger can't be reached.
    LedgerUnavailable => 503, "ledger-unavailable", "The ledger can't be reached";
    /// The ledger has no room.
    LedgerFull => 503, "ledger-full", "The ledger is full";
    /// Nobody can say who asks.
    AuthenticationUnavailable => 503, "authentication-unavailable", "Who asks can't be found out now";
}

/// One thing that is wrong, and where.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, ToSchema)]
#[schema(as = Fault)]
pub struct Fault {
    /// What kind it is.
    #[serde(rename = "type", serialize_with = "as_uri")]
    #[schema(value_type = String, example = "https://domicile.dev/problems/unknown-regime")]
    pub kind: Kind,
    /// Where in the body: an RFC 6901 JSON pointer. Empty: the body as a whole.
    #[schema(example = "/regimes/0")]
    pub pointer: String,
    /// What is wrong, and what to do.
    pub detail: String,
}

fn as_uri<S: serde::Serializer>(kind: &Kind, s: S) -> Result<S::Ok, S::Error> {
    s.collect_str(&format_args!("{TYPES}{}", kind.slug()))
}

impl Fault {
    /// A fault.
    pub fn new(kind: Kind, pointer: impl Into<String>, detail: impl Into<String>) -> Self {
        Self {
            kind,
            pointer: pointer.into(),
            detail: detail.into(),
        }
    }
}

/// A problem.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Problem {
    /// What kind it is.
    pub kind: Kind,
    /// What is wrong, and what to do.
    pub detail: String,
    /// Each thing that is wrong with the content.
    pub faults: Vec<Fault>,
    /// After how long it makes sense to try again.
    pub retry_after: Option<Duration>,
}

impl Problem {
    /// A problem.
    pub fn new(kind: Kind, detail: impl Into<String>) -> Self {
        Self {
            kind,
            detail: detail.into(),
            faults: Vec::new(),
            retry_after: None,
        }
    }

    /// A problem that passes.
    pub fn passing(kind: Kind, detail: impl Into<String>, retry_after: Duration) -> Self {
        Self {
            retry_after: Some(retry_after),
            ..Self::new(kind, detail)
        }
    }

    /// What is wrong with a content: of the kind of its faults if that is one, else [`Kind::Invalid`].
    #[must_use]
    pub fn of(faults: Vec<Fault>) -> Self {
        let kind = match faults.split_first() {
            Some((first, rest)) if rest.iter().all(|f| f.kind == first.kind) => first.kind,
            _ => Kind::Invalid,
        };
        let detail = match faults.as_slice() {
            [one] => one.detail.clone(),
            all => format!("{} things are wrong; see errors", all.len()),
        };
        Self {
            kind,
            detail,
            faults,
            retry_after: None,
        }
    }

    /// As it is sent.
    #[must_use]
    pub fn document(&self) -> Document {
        Document {
            kind: format!("{TYPES}{}", self.kind.slug()),
            title: self.kind.title().to_owned(),
            status: self.kind.status(),
            detail: self.detail.clone(),
            errors: self.faults.clone(),
        }
    }
}

/// A problem as it is sent: RFC 9457.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, ToSchema)]
#[schema(as = Problem)]
pub struct Document {
    /// Identifies the kind of problem, and never changes.
    #[serde(rename = "type")]
    #[schema(example = "https://domicile.dev/problems/unknown-regime")]
    kind: String,
    /// The same for all problems of the kind.
    title: String,
    /// The HTTP status.
    #[schema(example = 422)]
    status: u16,
    /// What is wrong here, and what to do.
    detail: String,
    /// Each thing that is wrong with the content.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    #[schema(required = false)]
    errors: Vec<Fault>,
}

impl IntoResponse for Problem {
    fn into_response(self) -> Response {
        let status =
            StatusCode::from_u16(self.kind.status()).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
        let body = serde_json::to_vec(&self.document()).unwrap_or_default();
        let mut response = (status, [(header::CONTENT_TYPE, MEDIA_TYPE)], body).into_response();
        let headers = response.headers_mut();
        if let Some(after) = self.retry_after {
            // Whole seconds, rounded up: half a second must not become "at once".
            let seconds = after.as_secs() + u64::from(after.subsec_nanos() > 0);
            headers.insert(header::RETRY_AFTER, seconds.max(1).into());
        }
        if self.kind == Kind::Unauthenticated {
            headers.insert(
                header::WWW_AUTHENTICATE,
                HeaderValue::from_static("Bearer realm=\"domicile\""),
            );
        }
        // For the metrics, which count refusals by kind.
        response.extensions_mut().insert(self.kind);
        response
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeSet;

    #[test]
    fn types_are_distinct_and_documented() {
        let slugs: BTreeSet<_> = Kind::ALL.iter().map(|k| k.slug()).collect();
        assert_eq!(slugs.len(), Kind::ALL.len());
        let doc = include_str!("../../../docs/gateway.md");
        for kind in Kind::ALL {
            let row = format!("| {} | `{}` |", kind.status(), kind.slug());
            assert!(doc.contains(&row), "{row} is missing in docs/gateway.md");
        }
    }

    #[test]
    fn one_kind_of_fault_gives_the_problem_its_type() {
        let fault = |kind| Fault::new(kind, "/x", "wrong");
        let of = |kinds: &[Kind]| Problem::of(kinds.iter().copied().map(fault).collect()).kind;
        assert_eq!(of(&[Kind::UnknownRegime]), Kind::UnknownRegime);
        assert_eq!(of(&[Kind::WrongType, Kind::WrongType]), Kind::WrongType);
        assert_eq!(of(&[Kind::WrongType, Kind::UnknownRegime]), Kind::Invalid);
    }

    #[test]
    fn when_to_come_back_is_never_at_once() {
        let after = |d| {
            let problem = Problem::passing(Kind::Overloaded, "busy", d);
            problem.into_response().headers()[header::RETRY_AFTER].clone()
        };
        assert_eq!(after(Duration::ZERO), "1");
        assert_eq!(after(Duration::from_millis(1500)), "2");
    }
}
