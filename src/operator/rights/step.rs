//! The writes of which a workflow's plan is made.
//!
//! Data only: printable, comparable by eye, executed by `apply` and decided by `plan`.

use jiff::civil::Date;
use kube::ResourceExt;
use kube::api::DynamicObject;
use serde_json::Value;
use std::collections::BTreeSet;
use std::fmt;

use super::kinds::ChildKind;
use crate::api::privacy_data_store::RightsAccess;
use crate::operator::store::certificates::Use;

/// One write.
#[derive(Clone, Debug)]
pub enum Step {
    /// Hold the workflow's deletion until its requests are closed.
    AddFinalizer,
    /// Let the workflow go.
    RemoveFinalizer,
    /// Say on a store what the workflow needs of it.
    GrantAccess {
        /// The store.
        store: String,
        /// Its uid.
        uid: String,
        /// What is needed.
        access: Box<RightsAccess>,
    },
    /// Take that back.
    WithdrawAccess {
        /// The store.
        store: String,
        /// Its uid.
        uid: String,
    },
    /// Make the workflow's keys, which must not exist yet.
    CreateKeys {
        /// The days.
        epochs: BTreeSet<Date>,
    },
    /// Make keys of more days.
    AddEpochs {
        /// The days.
        epochs: BTreeSet<Date>,
        /// The Secret's version when this was decided.
        version: String,
    },
    /// Destroy the keys of days that no open request was filed on.
    DestroyEpochs {
        /// The days.
        epochs: BTreeSet<Date>,
        /// The Secret's version when this was decided.
        version: String,
    },
    /// Make or renew a certificate.
    IssueCertificate(Certificate),
    /// Hand the present authorities to whoever has a certificate, which stays.
    Entrust(Certificate),
    /// Make an object that must not exist yet.
    Create(ChildKind, Box<Value>),
    /// Bring an object of ours to what it should be.
    Update(ChildKind, Box<DynamicObject>),
    /// Delete exactly this object, not a namesake.
    Delete {
        /// Its kind.
        object: Object,
        /// Its name.
        name: String,
        /// Its uid.
        uid: String,
    },
    /// Stop exactly this pod, not a namesake, which runs outside: it has seconds to end by itself.
    Fence {
        /// Its name.
        name: String,
        /// Its uid.
        uid: String,
    },
    /// Let the gateway ask whose a token is, and what its bearer may do.
    BindGateway,
    /// Take that right back.
    UnbindGateway {
        /// The binding's uid.
        uid: String,
    },
    /// Tell something as an event.
    Tell {
        /// One word.
        reason: &'static str,
        /// A sentence, without personal data. Always a warning.
        note: String,
    },
}

/// A certificate that is wanted.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Certificate {
    /// The Secret.
    pub secret: String,
    /// The store whose authority signs it.
    pub store: String,
    /// The common name.
    pub common_name: String,
    /// DNS names, sorted.
    pub names: Vec<String>,
    /// What for.
    pub purpose: Use,
}

/// The kind of object that a step deletes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Object {
    /// A Secret.
    Secret,
    /// One of [`ChildKind`].
    Child(ChildKind),
}

fn days(all: &BTreeSet<Date>) -> String {
    let all: Vec<String> = all.iter().map(ToString::to_string).collect();
    all.join(", ")
}

impl fmt::Display for Step {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::AddFinalizer => write!(f, "add the finalizer"),
            Self::RemoveFinalizer => write!(f, "remove the finalizer"),
            Self::GrantAccess { store, .. } => write!(f, "say on store {store} what is needed"),
            Self::WithdrawAccess { store, .. } => {
                write!(f, "say on store {store} that nothing is needed")
            }
            Self::CreateKeys { .. } => write!(f, "create the keys"),
            Self::AddEpochs { epochs, .. } => write!(f, "add the keys of {}", days(epochs)),
            Self::DestroyEpochs { epochs, .. } => write!(f, "destroy the keys of {}", days(epochs)),
            Self::IssueCertificate(c) => {
                write!(f, "issue a certificate to {} by {}", c.common_name, c.store)
            }
            Self::Entrust(c) => write!(f, "hand the authorities of {} to {}", c.store, c.secret),
            Self::Create(kind, value) => write!(
                f,
                "create {kind:?} {}",
                value["metadata"]["name"].as_str().unwrap_or_default()
            ),
            Self::Update(kind, object) => write!(f, "update {kind:?} {}", object.name_any()),
            Self::Delete { object, name, .. } => write!(f, "delete {object:?} {name}"),
            Self::Fence { name, .. } => write!(f, "fence {name}"),
            Self::BindGateway => write!(f, "bind the gateway"),
            Self::UnbindGateway { .. } => write!(f, "unbind the gateway"),
            Self::Tell { reason, note } => write!(f, "tell {reason}: {note}"),
        }
    }
}
