//! Objects that can't be understood: written by a newer version, or past their schema.
//!
//! Owns what is done about them, which is as good as nothing: they are told so, and let go when they are deleted.
//! Never touches anything else of them.

use k8s_openapi::NamespaceResourceScope;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Condition;
use kube::api::{ApiResource, DynamicObject, Patch, PatchParams};
use kube::{Api, Resource, ResourceExt};
use serde_json::json;

use super::context::{Context, bounded};
use crate::api::conditions::{self, Verdict, reasons};

/// Says on an object that can't be understood that it can't. One that is being deleted loses our finalizer, if
/// `may_go`.
///
/// # Errors
/// As the API server's.
pub async fn complain<K>(
    ctx: &Context,
    namespace: &str,
    name: &str,
    error: &str,
    finalizer: &str,
    may_go: impl Fn(&DynamicObject) -> bool,
) -> anyhow::Result<()>
where
    K: Resource<Scope = NamespaceResourceScope>,
    K::DynamicType: Default,
{
    let resource = ApiResource::erase::<K>(&K::DynamicType::default());
    let api: Api<DynamicObject> = Api::namespaced_with(ctx.client.clone(), namespace, &resource);
    let Some(object) = bounded("read the object", api.get_opt(name)).await? else {
        return Ok(());
    };
    if object.metadata.deletion_timestamp.is_some() && may_go(&object) {
        return release(&api, &object, finalizer).await;
    }
    let old: Vec<Condition> =
        serde_json::from_value(object.data["status"]["conditions"].clone()).unwrap_or_default();
    let message = format!("this object can't be understood, and is left alone: {error}");
    let verdicts = [
        Verdict::new(conditions::READY, false, reasons::INVALID, message.clone()),
        Verdict::new(conditions::STALLED, true, reasons::INVALID, message),
    ];
    let new = conditions::merge(
        &old,
        &verdicts,
        object.meta().generation,
        jiff::Timestamp::now(),
    );
    if new == old {
        return Ok(());
    }
    let patch = json!({ "metadata": { "uid": object.uid() }, "status": { "conditions": new } });
    bounded(
        "write the status",
        api.patch_status(name, &PatchParams::default(), &Patch::Merge(patch)),
    )
    .await?;
    Ok(())
}

async fn release(
    api: &Api<DynamicObject>,
    object: &DynamicObject,
    finalizer: &str,
) -> anyhow::Result<()> {
    if !object.finalizers().iter().any(|f| f == finalizer) {
        return Ok(());
    }
    let left: Vec<&String> = object
        .finalizers()
        .iter()
        .filter(|f| *f != finalizer)
        .collect();
    let patch = json!({ "metadata": {
        "uid": object.uid(), "resourceVersion": object.resource_version(), "finalizers": left,
    } });
    let name = object.name_any();
    bounded(
        "remove the finalizer",
        api.patch(&name, &PatchParams::default(), &Patch::Merge(patch)),
    )
    .await?;
    Ok(())
}
