//! The CustomResourceDefinitions, generated from the types.
//!
//! Owns the order of the kinds and the few corrections that the derive can't make. `domicile crds` prints
//! them; `crds/` holds them; a test compares the two.

use std::fs;
use std::path::Path;

use anyhow::Context as _;
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
        join_lines(&mut value);
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

/// A description is wrapped where the source is; `kubectl explain` wraps it again where the terminal is.
/// Single line breaks become spaces, so that only one of the two does; paragraphs stay.
fn join_lines(value: &mut Value) {
    match value {
        Value::Object(map) => {
            for (key, inner) in map {
                match inner {
                    Value::String(text) if key == "description" => {
                        let paragraphs: Vec<String> =
                            text.split("\n\n").map(|p| p.replace('\n', " ")).collect();
                        *text = paragraphs.join("\n\n");
                    }
                    other => join_lines(other),
                }
            }
        }
        Value::Array(items) => items.iter_mut().for_each(join_lines),
        _ => {}
    }
}

/// Bounds are kept as floats in the type of a definition; a bound such as `1.0` on an integer is written `1`.
#[expect(
    clippy::cast_possible_truncation,
    reason = "only whole numbers that an i64 holds exactly are turned"
)]
fn whole_numbers(value: &mut Value) {
    const EXACT: f64 = 9_007_199_254_740_992.0;
    match value {
        Value::Object(map) => map.values_mut().for_each(whole_numbers),
        Value::Array(items) => items.iter_mut().for_each(whole_numbers),
        Value::Number(number) if number.is_f64() => {
            if let Some(float) = number.as_f64()
                && float.fract() == 0.0
                && float.abs() <= EXACT
            {
                *value = Value::from(float as i64);
            }
        }
        _ => {}
    }
}

/// Says in each file where it comes from.
const HEADER: &str = "# Generated from src/api by `make generate`. Don't edit.\n";

/// The definitions as files: name and YAML, one per kind.
///
/// # Errors
/// As [`all`], or if a definition can't be written as YAML.
pub fn files() -> anyhow::Result<Vec<(String, String)>> {
    all()?
        .into_iter()
        .map(|crd| {
            let name = format!("{}_{}.yaml", crd.spec.group, crd.spec.names.plural);
            let mut value = serde_json::to_value(crd)?;
            whole_numbers(&mut value);
            let yaml = serde_yaml::to_string(&value)?;
            Ok((name, format!("{HEADER}{yaml}")))
        })
        .collect()
}

/// Writes [`files`] into a folder, made if need be, and removes files of definitions that are no more.
///
/// # Errors
/// As [`files`], or if the folder can't be written.
pub fn write_dir(folder: &Path) -> anyhow::Result<()> {
    let files = files()?;
    fs::create_dir_all(folder).with_context(|| format!("making {}", folder.display()))?;
    for entry in fs::read_dir(folder).with_context(|| format!("reading {}", folder.display()))? {
        let entry = entry?;
        let name = entry.file_name().to_string_lossy().into_owned();
        let generated = name.starts_with(&format!("{}_", super::GROUP)) && name.ends_with(".yaml");
        if generated && files.iter().all(|(kept, _)| *kept != name) {
            fs::remove_file(entry.path()).with_context(|| format!("removing {name}"))?;
        }
    }
    for (name, yaml) in files {
        let path = folder.join(name);
        fs::write(&path, yaml).with_context(|| format!("writing {}", path.display()))?;
    }
    Ok(())
}

/// The definitions as one YAML stream.
///
/// # Errors
/// As [`files`].
pub fn yaml() -> anyhow::Result<String> {
    let mut out = String::new();
    for (_, yaml) in files()? {
        out.push_str("---\n");
        out.push_str(&yaml);
    }
    Ok(out)
}
