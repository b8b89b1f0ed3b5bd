//! What an erasure or a probe failed of.
//!
//! Owns the reasons, which are also the labels of metrics. Never: carries an identifier or a value that a target sent.
//! Errors of databases quote keys and values, so nothing of their text is passed on: only codes, and names of objects.

use std::fmt;

/// Why.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Reason {
    /// Nobody answers, or it isn't ready to serve.
    Unreachable,
    /// The target refuses who we say we are, or there are no credentials.
    Credentials,
    /// An object that the workflow names isn't there: a table, a column.
    Missing,
    /// The person lacks an identifier that the target is keyed by, or has one that can't be used.
    Identifier,
    /// No answer in time; what was asked may have been done.
    Timeout,
    /// The target refuses what was asked: a privilege, a constraint, a kind of object. A person must look at it.
    Refused,
    /// Somebody else holds a lock.
    Locked,
    /// The probe found what was to be erased.
    StillThere,
    /// The target answered what it never should, such as a standby that says it is the primary.
    Protocol,
}

impl Reason {
    /// In metrics and in the ledger.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Unreachable => "unreachable",
            Self::Credentials => "credentials",
            Self::Missing => "missing",
            Self::Identifier => "identifier",
            Self::Timeout => "timeout",
            Self::Refused => "refused",
            Self::Locked => "locked",
            Self::StillThere => "still-there",
            Self::Protocol => "protocol",
        }
    }

    /// Whether it is the target that is in trouble, rather than one person's request: it counts for a circuit breaker.
    #[must_use]
    pub fn is_of_target(self) -> bool {
        match self {
            Self::Unreachable
            | Self::Credentials
            | Self::Missing
            | Self::Timeout
            | Self::Protocol => true,
            Self::Identifier | Self::Refused | Self::Locked | Self::StillThere => false,
        }
    }
}

/// A failure: a reason, and words for a person.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{reason}: {detail}")]
pub struct Failure {
    /// Why.
    pub reason: Reason,
    /// What is wrong, where, and what to do. No identifier, no value.
    pub detail: String,
}

impl fmt::Display for Reason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

impl Failure {
    /// A failure.
    #[must_use]
    pub fn new(reason: Reason, detail: impl Into<String>) -> Self {
        Self {
            reason,
            detail: detail.into(),
        }
    }
}
