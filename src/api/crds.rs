//! The CustomResourceDefinitions, generated from the types.
//!
//! Owns the order of the kinds and the few corrections that the derive can't make. `domicile crds` prints
//! them; `crds/` holds them; a test compares the two.

use k8s_openapi::apiextensions_apiserver::pkg::apis::apiextensions::v1::CustomResourceDefinition;
use kube::CustomResourceExt;
use serde_json::Value;

use super::{PrivacyDataStore, Region, ResidencyPolicy, RightsWorkflow};

/// Every kind's definition, in the order in which they build on each other.
///
/// # Errors
/// If a generated schema can't be read back, which a test rules out.
pub fn all() -> Result<Vec<CustomResourceDefinition>, serde_json::Error> {
    [
        Region::crd(),
        ResidencyPolicy::crd(),
        PrivacyDataStore::crd(),
        RightsWorkflow::crd(),
    ]
    .into_iter()
    .map(|crd| {
        let mut value = serde_json::to_value(crd)?;
        strip_nullable(&mut value);
        serde_json::from_value(value)
    })
    .collect()
}

/// `Option<T>` is generated as `nullable: true`. An explicit null is not something a user means, and the API
/// conventions advise against it: absent is enough.
fn strip_nullable(value: &mut Value) {
    match value {
        Value::Object(map) => {
            if map.get("nullable") == Some(&Value::Bool(true)) {
                map.remove("nullable");
                if let Some(Value::Array(allowed)) = map.get_mut("enum") {
                    allowed.retain(|v| !v.is_null());
                }
            }
            map.values_mut().for_each(strip_nullable);
        }
        Value::Array(items) => items.iter_mut().for_each(strip_nullable),
        _ => {}
    }
}

/// The definitions as one YAML stream.
///
/// # Errors
/// As [`all`], or if a definition can't be written as YAML.
pub fn yaml() -> anyhow::Result<String> {
    let mut out = String::new();
    for crd in all()? {
        out.push_str("---\n");
        out.push_str(&serde_yaml::to_string(&crd)?);
    }
    Ok(out)
}
