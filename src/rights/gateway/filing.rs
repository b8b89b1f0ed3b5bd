//! From what a client sent to a filing, or to all that is wrong with it.
//!
//! Owns the rules of what may be filed. Pure: the time is given. Never: repeats a value; lets through what a worker
//! could not carry out (a target that needs an identifier that isn't there would hold the request open for ever).

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use utoipa::ToSchema;
use uuid::Uuid;

use super::problem::{Fault, Kind as Trouble};
use super::strict::{Fields, item};
use crate::api::rights_workflow::Regime;
use crate::deadlines::needs_approval_allowed;
use crate::rights::config::Workflow;
use crate::rights::connectors::required;
use crate::rights::model::{Channel, Filing, Identifiers, Kind};

/// The longest value of an identifier, in bytes.
pub const VALUE_MAX: usize = 512;
/// The most identifiers of a request.
pub const IDENTIFIERS_MAX: usize = 16;
/// How long ago a request may have come in: paper mail takes its time, but who files for last year is mistaken.
pub const RECEIVED_AGO_MAX: Duration = Duration::from_secs(90 * 86_400);
/// How far a client's clock may be ahead of the gateway's.
pub const AHEAD_MAX: Duration = Duration::from_secs(60);
/// The longest idempotency key.
pub const KEY_MAX: usize = 255;

/// A request as a client files it.
#[derive(Clone, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
#[schema(as = NewRequest)]
pub struct NewRequest {
    /// What is asked for. In this release: deletion.
    #[schema(example = "deletion")]
    pub kind: String,
    /// Under which laws: of the workflow's. Absent: all of the workflow's.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(required = false, example = json!(["us-ca-ccpa"]), min_items = 1)]
    pub regimes: Option<Vec<String>>,
    /// Who the person is: the workflow's names to values of 1 to 512 bytes, at most 16.
    #[schema(value_type = BTreeMap<String, String>, example = json!({"customerId": "c-4711", "email": "person@example.com"}))]
    pub identifiers: BTreeMap<String, String>,
    /// How the request came: api (the default), operator, agent or registry.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(required = false, example = "api")]
    pub channel: Option<String>,
    /// When the request came in, if that was before it is filed (a letter): the clocks run from then. Not in the
    /// future, and at most 90 days ago.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<String>, format = DateTime, required = false)]
    pub received_at: Option<Timestamp>,
    /// Whether a person must approve the request (`POST /v1/requests/{id}/approve`) before it is carried out. Its
    /// clocks run meanwhile.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(required = false)]
    pub needs_approval: Option<bool>,
}

impl std::fmt::Debug for NewRequest {
    // It holds identifiers.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("NewRequest(..)")
    }
}

/// Its fields.
pub const FIELDS: &[&str] = &[
    "kind",
    "regimes",
    "identifiers",
    "channel",
    "receivedAt",
    "needsApproval",
];

/// A word as it is written.
pub fn word<T: Serialize>(of: T) -> String {
    match serde_json::to_value(of) {
        Ok(Value::String(s)) => s,
        _ => String::new(),
    }
}

fn parse_word<T: for<'de> Deserialize<'de>>(text: &str) -> Option<T> {
    T::deserialize(serde::de::value::StrDeserializer::<serde::de::value::Error>::new(text)).ok()
}

/// Reads an idempotency key.
///
/// # Errors
/// If it is none: why.
pub fn key(text: &str) -> Result<String, String> {
    let ok =
        !text.is_empty() && text.len() <= KEY_MAX && text.bytes().all(|b| b.is_ascii_graphic());
    ok.then(|| text.to_owned()).ok_or_else(|| {
        format!("an idempotency key has 1 to {KEY_MAX} printable ASCII characters and no spaces; a UUID is a good one")
    })
}

/// The filing that a body asks for.
///
/// # Errors
/// All that is wrong with it.
pub fn check(
    body: Value,
    at: &str,
    workflow: &Workflow,
    now: Timestamp,
    id: Uuid,
) -> Result<Filing, Vec<Fault>> {
    let mut faults = Vec::new();
    let Some(mut fields) = Fields::of(body, at.to_owned(), &mut faults) else {
        return Err(faults);
    };
    let kind = kind(&mut fields, &mut faults);
    let regimes = regimes(&mut fields, workflow, &mut faults);
    let identifiers = identifiers(&mut fields, workflow, &mut faults);
    let channel = channel(&mut fields, &mut faults);
    let received_at = received(&mut fields, now, &mut faults);
    let needs_approval = fields
        .boolean("needsApproval", &mut faults)
        .unwrap_or(false);
    if let (true, Some(kind)) = (needs_approval && !regimes.is_empty(), kind)
        && !needs_approval_allowed(&regimes, kind)
    {
        faults.push(Fault::new(
            Trouble::ApprovalForbidden,
            fields.pointer("needsApproval"),
            "one of the regimes forbids to ask the person for proof, so such a request can't wait for approval: leave needsApproval out",
        ));
    }
    fields.done(FIELDS, &mut faults);
    match (kind, identifiers, faults.is_empty()) {
        (Some(kind), Some(identifiers), true) => Ok(Filing {
            id,
            kind,
            regimes,
            identifiers,
            channel,
            received_at: received_at.unwrap_or(now),
            needs_approval,
            idempotency_key: None,
        }),
        _ => Err(faults),
    }
}

fn kind(fields: &mut Fields, faults: &mut Vec<Fault>) -> Option<Kind> {
    let before = faults.len();
    let Some(text) = fields.string("kind", faults) else {
        if faults.len() == before {
            fields.missing("kind", "say what is asked for: deletion", faults);
        }
        return None;
    };
    let detail = match parse_word::<Kind>(&text) {
        Some(Kind::Deletion) => return Some(Kind::Deletion),
        Some(other) => format!(
            "requests of kind {} can't be carried out in this release, so they aren't taken in: file deletions here, and handle this one as you do today",
            word(other)
        ),
        None => "this is no kind of request; known is: deletion".to_owned(),
    };
    faults.push(Fault::new(
        Trouble::UnsupportedKind,
        fields.pointer("kind"),
        detail,
    ));
    None
}

fn regimes(fields: &mut Fields, workflow: &Workflow, faults: &mut Vec<Fault>) -> Vec<Regime> {
    let at = fields.pointer("regimes");
    let before = faults.len();
    let Some(all) = fields.array("regimes", faults) else {
        return if faults.len() == before {
            workflow.regimes.clone()
        } else {
            Vec::new()
        };
    };
    let known = || {
        let known: Vec<String> = workflow.regimes.iter().map(word).collect();
        known.join(", ")
    };
    if all.is_empty() {
        faults.push(Fault::new(
            Trouble::UnknownRegime,
            at,
            format!(
                "give at least one regime, or leave the field out for all of the workflow's: {}",
                known()
            ),
        ));
        return Vec::new();
    }
    let mut chosen = BTreeSet::new();
    for (n, value) in all.into_iter().enumerate() {
        let at = format!("{at}/{n}");
        let Some(text) = item(value, at.clone(), faults) else {
            continue;
        };
        match parse_word::<Regime>(&text).filter(|r| workflow.regimes.contains(r)) {
            Some(regime) => {
                chosen.insert(regime);
            }
            None => faults.push(Fault::new(
                Trouble::UnknownRegime,
                at,
                format!(
                    "this is none of the regimes of the workflow {}; they are: {}",
                    workflow.name,
                    known()
                ),
            )),
        }
    }
    chosen.into_iter().collect()
}

fn identifiers(
    fields: &mut Fields,
    workflow: &Workflow,
    faults: &mut Vec<Fault>,
) -> Option<Identifiers> {
    let at = fields.pointer("identifiers");
    let known = workflow.identifiers.join(", ");
    let Some(value) = fields.take("identifiers") else {
        let why = format!("say who the person is by these names: {known}");
        fields.missing("identifiers", &why, faults);
        return None;
    };
    let given = Fields::of(value, at.clone(), faults)?.rest();
    let before = faults.len();
    if given.is_empty() || given.len() > IDENTIFIERS_MAX {
        let detail = format!(
            "give 1 to {IDENTIFIERS_MAX} identifiers, not {}; known are: {known}",
            given.len()
        );
        faults.push(Fault::new(Trouble::InvalidIdentifier, at, detail));
        return None;
    }
    let (given, strange): (Vec<_>, Vec<_>) = given
        .into_iter()
        .partition(|(name, _)| workflow.identifiers.contains(name));
    if !strange.is_empty() {
        let detail = format!(
            "{} of these names {} no identifier of the workflow {}; known are: {known}",
            strange.len(),
            if strange.len() == 1 { "is" } else { "are" },
            workflow.name,
        );
        faults.push(Fault::new(Trouble::UnknownIdentifier, at.clone(), detail));
    }
    let mut all = BTreeMap::new();
    for (name, value) in given {
        let at = format!("{at}/{name}");
        let Some(value) = item(value, at.clone(), faults) else {
            continue;
        };
        if let Some(why) = unusable(&value) {
            faults.push(Fault::new(Trouble::InvalidIdentifier, at, why));
            continue;
        }
        all.insert(name, value);
    }
    if faults.len() == before {
        lacking(workflow, &all, &at, faults);
    }
    (faults.len() == before).then_some(Identifiers(all))
}

/// Why a value can't be an identifier's.
fn unusable(value: &str) -> Option<String> {
    if value.trim().is_empty() {
        return Some(
            "an empty value identifies nobody: leave the identifier out if it isn't known"
                .to_owned(),
        );
    }
    let len = value.len();
    if len > VALUE_MAX {
        return Some(format!(
            "a value has 1 to {VALUE_MAX} bytes in UTF-8, and this has {len}"
        ));
    }
    // NUL can't be stored, and no person is known by a line feed: it comes from a form gone wrong.
    value
        .chars()
        .any(char::is_control)
        .then(|| "a value has no control characters, such as line feeds".to_owned())
}

fn lacking(
    workflow: &Workflow,
    given: &BTreeMap<String, String>,
    at: &str,
    faults: &mut Vec<Fault>,
) {
    for target in &workflow.targets {
        let lacks: Vec<String> = required(target)
            .into_iter()
            .filter(|name| !given.contains_key(name))
            .collect();
        if !lacks.is_empty() {
            let detail = format!(
                "the target {} can't be served without {}: give every identifier that a target needs",
                target.name,
                lacks.join(" and ")
            );
            faults.push(Fault::new(Trouble::MissingIdentifier, at, detail));
        }
    }
}

fn channel(fields: &mut Fields, faults: &mut Vec<Fault>) -> Channel {
    let Some(text) = fields.string("channel", faults) else {
        return Channel::Api;
    };
    parse_word(&text).unwrap_or_else(|| {
        faults.push(Fault::new(
            Trouble::UnknownChannel,
            fields.pointer("channel"),
            "this is no channel; known are: api, operator, agent, registry",
        ));
        Channel::Api
    })
}

fn received(fields: &mut Fields, now: Timestamp, faults: &mut Vec<Fault>) -> Option<Timestamp> {
    let at = fields.time("receivedAt", faults)?;
    let ago = now.duration_since(at);
    let detail = if ago.is_negative() && ago.unsigned_abs() > AHEAD_MAX {
        "this is in the future: say when the request came in, or leave the field out for now"
    } else if !ago.is_negative() && ago.unsigned_abs() > RECEIVED_AGO_MAX {
        "this is more than 90 days ago: file what came in since, and treat older ones as late by hand"
    } else {
        return Some(at);
    };
    let pointer = fields.pointer("receivedAt");
    faults.push(Fault::new(Trouble::InvalidTime, pointer, detail));
    None
}

#[cfg(test)]
mod tests;
