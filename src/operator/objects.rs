//! What the objects that the operator makes have in common: the hash of what one was made from, whether one must be
//! written again, how a pod is confined.
//!
//! Pure. Never puts a secret or personal data into an object's name, label or annotation.

use kube::ResourceExt;
use kube::api::{ApiResource, DynamicObject};
use serde_json::{Value, json};
use sha2::{Digest, Sha256};

use crate::api::privacy_data_store::{ResourceAmounts, Resources};

/// Annotation with the hash of what an object was made from: it tells that a field was dropped, which a
/// comparison of the wanted fields alone can't see.
pub const HASH: &str = "domicile.dev/hash";

/// Hash of a value, stable over runs: keys are sorted.
#[must_use]
pub fn hash(value: &Value) -> String {
    Sha256::digest(value.to_string().as_bytes())
        .iter()
        .take(8)
        .map(|b| format!("{b:02x}"))
        .collect()
}

/// The object that a value describes, with its hash.
#[must_use]
pub fn finish(resource: &ApiResource, mut value: Value) -> DynamicObject {
    let digest = hash(&value);
    value["metadata"]["annotations"][HASH] = Value::String(digest);
    let metadata = serde_json::from_value(value["metadata"].take()).unwrap_or_default();
    if let Value::Object(map) = &mut value {
        map.remove("metadata");
    }
    let mut object = DynamicObject::new("", resource).data(value);
    object.metadata = metadata;
    object
}

/// The object with its kind, for a plain create.
#[must_use]
pub fn complete(resource: &ApiResource, object: &DynamicObject) -> Value {
    let mut value = serde_json::to_value(object).unwrap_or_default();
    value["apiVersion"] = Value::String(resource.api_version.clone());
    value["kind"] = Value::String(resource.kind.clone());
    value
}

/// Whether what an object was made from, or one of its labels, is other than wanted.
#[must_use]
pub fn outdated(wanted: &DynamicObject, found: &DynamicObject) -> bool {
    let labels_kept = wanted
        .labels()
        .iter()
        .all(|(k, v)| found.labels().get(k) == Some(v));
    wanted.annotations().get(HASH) != found.annotations().get(HASH) || !labels_kept
}

/// Whether an object must be written: made from something else than now, or a field of ours changed by hand.
#[must_use]
pub fn differs(wanted: &DynamicObject, found: &DynamicObject) -> bool {
    outdated(wanted, found) || !covers(&found.data, &wanted.data)
}

/// Whether `found` says everything that `wanted` says. Lists are compared item by item, in order.
fn covers(found: &Value, wanted: &Value) -> bool {
    match (found, wanted) {
        (Value::Object(found), Value::Object(wanted)) => wanted
            .iter()
            .all(|(key, value)| found.get(key).is_some_and(|f| covers(f, value))),
        (Value::Array(found), Value::Array(wanted)) => {
            found.len() == wanted.len() && found.iter().zip(wanted).all(|(f, w)| covers(f, w))
        }
        _ => found == wanted,
    }
}

/// The strictest of the Pod Security Standards, for a container.
#[must_use]
pub fn container_security() -> Value {
    json!({
        "allowPrivilegeEscalation": false, "readOnlyRootFilesystem": true, "runAsNonRoot": true,
        "capabilities": { "drop": ["ALL"] },
    })
}

/// Requests and limits as a container has them.
#[must_use]
pub fn resources(resources: &Resources) -> Value {
    let amounts = |amounts: &ResourceAmounts| {
        let pairs = [("cpu", &amounts.cpu), ("memory", &amounts.memory)];
        pairs
            .into_iter()
            .filter_map(|(k, v)| Some((k.to_owned(), json!(v.as_ref()?))))
            .collect::<serde_json::Map<_, _>>()
    };
    let mut out = serde_json::Map::new();
    if let Some(requests) = &resources.requests {
        out.insert("requests".to_owned(), Value::Object(amounts(requests)));
    }
    if let Some(limits) = &resources.limits {
        out.insert("limits".to_owned(), Value::Object(amounts(limits)));
    }
    Value::Object(out)
}
