//! The writes of which a plan is made.
//!
//! Data only: printable, comparable by eye, executed by `apply` and decided by `plan`.

use jiff::Timestamp;
use kube::ResourceExt;
use kube::api::DynamicObject;
use serde_json::Value;
use std::fmt;

use super::build::AppSecret;
use super::failovers::Told;
use super::kinds::ChildKind;

/// One write.
#[derive(Clone, Debug)]
pub enum Step {
    /// Hold the store's deletion until its volumes are dealt with.
    AddFinalizer,
    /// Let the store go.
    RemoveFinalizer,
    /// Durably say who is primary in which term.
    RecordPrimary {
        /// The instance.
        name: String,
        /// Its term.
        term: i64,
        /// Who was on record when this was decided.
        instead_of: Option<String>,
    },
    /// Make the store's certificate authority. Those that instances trust already go on being trusted.
    CreateAuthority,
    /// Make the authority that is to follow, and have it trusted.
    AnnounceAuthority {
        /// It doesn't sign before.
        switch_after: Timestamp,
    },
    /// Let the next authority sign.
    SwitchAuthority {
        /// Its identifier.
        next: String,
    },
    /// Trust no other authority than this any more.
    RetireAuthorities {
        /// The identifier of the one that signs.
        active: String,
    },
    /// Hand the present authorities to an instance, which keeps its certificate.
    Entrust {
        /// The instance.
        instance: String,
    },
    /// Make or renew an instance's certificate.
    IssueCertificate {
        /// The instance.
        instance: String,
        /// Its DNS names.
        names: Vec<String>,
    },
    /// Make the application's Secret, or bring it up to date with its password kept.
    WriteAppSecret(Box<AppSecret>),
    /// Make an object that must not exist yet.
    Create(Object, Box<Value>),
    /// Bring an object of ours to what it should be.
    Update(ChildKind, Box<DynamicObject>),
    /// Delete exactly this object, not a namesake.
    Delete {
        /// Its kind.
        object: Object,
        /// Its name.
        name: String,
        /// Its uid: a re-created namesake is left alone.
        uid: String,
    },
    /// Say on a volume claim since which term it holds the primary's data.
    MarkPrimaryVolume {
        /// The claim.
        name: String,
        /// Its uid.
        uid: String,
        /// The term.
        term: i64,
    },
    /// Say on a volume claim that has no volume yet that its zone is another one.
    MoveClaim {
        /// The claim.
        name: String,
        /// Its uid.
        uid: String,
        /// Its version when this was decided: it may have got its volume meanwhile.
        version: String,
        /// The zone.
        zone: String,
    },
    /// Stop exactly this pod, not a namesake, which runs outside: it has seconds to end by itself.
    Fence {
        /// Its name.
        name: String,
        /// Its uid.
        uid: String,
    },
    /// Tell something as an event.
    Tell {
        /// One word.
        reason: &'static str,
        /// Whether a person should look.
        warning: bool,
        /// A sentence, without personal data.
        note: String,
    },
    /// Tell a failover as an event, once.
    TellFailover(Told),
    /// Remove an annotation of the store that still has this value.
    RemoveAnnotation {
        /// The annotation.
        name: &'static str,
        /// The value that was answered.
        value: String,
    },
    /// Remove what an instance that is gone said of itself from the store's status.
    ForgetInstance {
        /// The instance.
        name: String,
    },
}

/// The kind of object that a step makes or deletes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Object {
    /// A pod.
    Pod,
    /// A volume claim.
    Claim,
    /// A Secret.
    Secret,
    /// One of [`ChildKind`].
    Child(ChildKind),
}

impl fmt::Display for Step {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::AddFinalizer => write!(f, "add the finalizer"),
            Self::RemoveFinalizer => write!(f, "remove the finalizer"),
            Self::RecordPrimary { name, term, .. } => {
                write!(f, "record {name} as primary of term {term}")
            }
            Self::CreateAuthority => write!(f, "create the certificate authority"),
            Self::AnnounceAuthority { switch_after } => {
                write!(f, "announce an authority that signs after {switch_after}")
            }
            Self::SwitchAuthority { next } => write!(f, "let authority {next} sign"),
            Self::RetireAuthorities { active } => {
                write!(f, "retire all authorities but {active}")
            }
            Self::Entrust { instance } => write!(f, "hand the authorities to {instance}"),
            Self::IssueCertificate { instance, .. } => {
                write!(f, "issue a certificate to {instance}")
            }
            Self::WriteAppSecret(_) => write!(f, "write the application's Secret"),
            Self::Create(object, value) => {
                write!(
                    f,
                    "create {object:?} {}",
                    value["metadata"]["name"].as_str().unwrap_or_default()
                )
            }
            Self::Update(kind, object) => write!(f, "update {kind:?} {}", object.name_any()),
            Self::Delete { object, name, .. } => write!(f, "delete {object:?} {name}"),
            Self::Fence { name, .. } => write!(f, "fence {name}"),
            Self::MarkPrimaryVolume { name, term, .. } => {
                write!(f, "mark volume {name} as the primary's of term {term}")
            }
            Self::MoveClaim { name, zone, .. } => write!(f, "move claim {name} to zone {zone}"),
            Self::Tell { reason, note, .. } => write!(f, "tell {reason}: {note}"),
            Self::TellFailover(told) => write!(f, "tell the failover: {}", told.note),
            Self::RemoveAnnotation { name, .. } => write!(f, "remove the annotation {name}"),
            Self::ForgetInstance { name } => write!(f, "forget instance {name}"),
        }
    }
}
