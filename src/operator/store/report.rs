//! Writes what a pass found into the store's status, and tells changes as events.
//!
//! Owns the operator's part of the status. Byte-stable: an unchanged finding writes nothing, so that a
//! failing store isn't a hot loop and a quiet one costs the API server nothing.
//! Never writes what an instance says of itself.

use jiff::Timestamp;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Condition;
use kube::api::{Patch, PatchParams};
use kube::runtime::events::{Event, EventType};
use kube::{Api, Resource, ResourceExt};
use serde_json::json;

use super::assess::Draft;
use crate::api::conditions::reasons;
use crate::api::privacy_data_store::{InstanceStatus, PrivacyDataStoreStatus};
use crate::api::{PrivacyDataStore, conditions, names};
use crate::operator::context::{Context, bounded, words};

/// The operator's part of the status that `draft` comes to.
#[must_use]
pub fn status(store: &PrivacyDataStore, draft: &Draft, now: Timestamp) -> PrivacyDataStoreStatus {
    let old = store.status.clone().unwrap_or_default();
    PrivacyDataStoreStatus {
        conditions: conditions::merge(
            &old.conditions,
            &draft.verdicts,
            store.metadata.generation,
            now,
        ),
        observed_generation: store.metadata.generation,
        summary: draft.summary.clone(),
        term: draft.term,
        primary: draft.primary.clone(),
        system_identifier: draft.system_identifier.clone(),
        instances: draft.instances.clone(),
        // The instances' own.
        configuration: None,
        last_failover: None,
        // The workflows' controller's.
        rights: Vec::new(),
    }
}

/// The operator's part of a status as it stands.
fn operators_part(status: &PrivacyDataStoreStatus) -> PrivacyDataStoreStatus {
    let place = |i: &InstanceStatus| InstanceStatus {
        name: i.name.clone(),
        region: i.region.clone(),
        zone: i.zone.clone(),
        node: i.node.clone(),
        may_be_primary: i.may_be_primary,
        leaving: i.leaving,
        ..Default::default()
    };
    let mut part = PrivacyDataStoreStatus {
        instances: status
            .instances
            .iter()
            .filter(|i| i.region.is_some())
            .map(place)
            .collect(),
        configuration: None,
        last_failover: None,
        rights: Vec::new(),
        ..status.clone()
    };
    // The API server keeps the order in which entries came; it means nothing.
    part.instances.sort_by(|a, b| a.name.cmp(&b.name));
    part
}

/// Writes the status if it differs from what is there.
///
/// # Errors
/// If the API server refuses or doesn't answer in time.
pub async fn report(
    ctx: &Context,
    store: &PrivacyDataStore,
    draft: &Draft,
    now: Timestamp,
) -> anyhow::Result<()> {
    let new = status(store, draft, now);
    let old = store.status.clone().unwrap_or_default();
    if operators_part(&old) == operators_part(&new) {
        return Ok(());
    }
    let namespace = store.namespace().unwrap_or_default();
    let api: Api<PrivacyDataStore> = Api::namespaced(ctx.client.clone(), &namespace);
    let patch = json!({
        "apiVersion": "domicile.dev/v1alpha1", "kind": "PrivacyDataStore",
        // The uid: an apply would otherwise bring a deleted store's status onto its namesake.
        "metadata": { "uid": store.uid() }, "status": new,
    });
    let params = PatchParams::apply(names::OPERATOR_FIELD_MANAGER).force();
    let written = bounded(
        "write the status",
        api.patch_status(&store.name_any(), &params, &Patch::Apply(patch)),
    )
    .await;
    match written {
        Ok(_) => {}
        Err(error) if matches!(error.downcast_ref::<kube::Error>(), Some(kube::Error::Api(s)) if s.is_not_found() || s.is_conflict()) =>
        {
            return Ok(());
        }
        Err(error) => return Err(error),
    }
    if let Some(event) = event(&old.conditions, &new.conditions) {
        // An event that can't be written must not fail the pass.
        let told = bounded(
            "write an event",
            ctx.recorder.publish(&event, &store.object_ref(&())),
        )
        .await;
        if let Err(error) = told {
            tracing::warn!(store = %store.name_any(), %namespace, error = words(&error), "event not written");
        }
    }
    Ok(())
}

/// The event for a change of readiness or of its reason.
#[must_use]
pub fn event(old: &[Condition], new: &[Condition]) -> Option<Event> {
    let ready = |all: &[Condition]| all.iter().find(|c| c.type_ == conditions::READY).cloned();
    let now = ready(new)?;
    if ready(old).is_some_and(|before| before.status == now.status && before.reason == now.reason) {
        return None;
    }
    let outside =
        [reasons::OUTSIDE, reasons::FENCED, reasons::STRANGER].contains(&now.reason.as_str());
    let warns = outside || conditions::is_true(new, conditions::STALLED);
    // Events take at most 1 kB of note.
    let note: String = now.message.chars().take(900).collect();
    Some(Event {
        type_: if warns {
            EventType::Warning
        } else {
            EventType::Normal
        },
        reason: now.reason,
        note: Some(note),
        action: crate::operator::hands::ACTION.to_owned(),
        secondary: None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::api::conditions::Verdict;

    fn condition(status: bool, reason: &'static str) -> Vec<Condition> {
        conditions::merge(
            &[],
            &[Verdict::new(conditions::READY, status, reason, "m")],
            Some(1),
            Timestamp::UNIX_EPOCH,
        )
    }

    #[test]
    fn an_event_tells_a_change_and_nothing_else() {
        let starting = condition(false, reasons::STARTING);
        let ready = condition(true, reasons::AS_SPECIFIED);
        assert!(event(&[], &starting).is_some());
        assert!(event(&starting, &starting).is_none());
        assert!(event(&starting, &ready).is_some());
    }
}
