//! May a CRD replace the released one? Every object that the old one accepted must be accepted by the new one
//! and keep all its fields; what merged by a key must still merge by it.
//!
//! Released definitions are kept in `crds/released/`, as they were published. Without one, anything goes.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;

use serde_json::{Value, json};

/// Everything by which the new definition would break what the old one promised.
fn breaks(old: &Value, new: &Value) -> Vec<String> {
    let mut out = Vec::new();
    for what in [
        "/spec/group",
        "/spec/scope",
        "/spec/names/kind",
        "/spec/names/plural",
    ] {
        if old.pointer(what) != new.pointer(what) {
            out.push(format!("{what} changed"));
        }
    }
    let list = |crd: &Value, at: &str| {
        crd.pointer(at)
            .and_then(Value::as_array)
            .cloned()
            .unwrap_or_default()
    };
    for short in list(old, "/spec/names/shortNames") {
        if !list(new, "/spec/names/shortNames").contains(&short) {
            out.push(format!("short name {short} is gone"));
        }
    }
    for version in list(old, "/spec/versions") {
        if version["served"] != true {
            continue;
        }
        let name = version["name"].as_str().unwrap_or_default();
        let Some(successor) = list(new, "/spec/versions")
            .into_iter()
            .find(|v| v["name"] == version["name"] && v["served"] == true)
        else {
            out.push(format!("version {name} isn't served any more"));
            continue;
        };
        for subresource in version["subresources"].as_object().into_iter().flatten() {
            if successor["subresources"].get(subresource.0).is_none() {
                out.push(format!("{name}: subresource {} is gone", subresource.0));
            }
        }
        let schema = |v: &Value| v["schema"]["openAPIV3Schema"].clone();
        compare(name, &schema(&version), &schema(&successor), &mut out);
    }
    out
}

fn compare(path: &str, old: &Value, new: &Value, out: &mut Vec<String>) {
    for keyword in [
        "type",
        "format",
        "default",
        "x-kubernetes-list-type",
        "x-kubernetes-list-map-keys",
        "x-kubernetes-map-type",
        "x-kubernetes-int-or-string",
        "x-kubernetes-preserve-unknown-fields",
        "x-kubernetes-embedded-resource",
    ] {
        // A default where there was none is no break, if the field was optional and stays so.
        let added = keyword == "default" && old.get(keyword).is_none();
        if !added && old.get(keyword) != new.get(keyword) {
            out.push(format!("{path}: {keyword} changed"));
        }
    }
    if old["nullable"] == true && new["nullable"] != true {
        out.push(format!("{path}: null isn't allowed any more"));
    }
    if new.get("pattern").is_some() && old.get("pattern") != new.get("pattern") {
        out.push(format!("{path}: pattern is new or changed"));
    }
    bounds(path, old, new, out);
    if let Some(allowed) = new["enum"].as_array() {
        match old["enum"].as_array() {
            None => out.push(format!("{path}: enum is new")),
            Some(before) => out.extend(
                before
                    .iter()
                    .filter(|value| !allowed.contains(value))
                    .map(|value| format!("{path}: {value} isn't allowed any more")),
            ),
        }
    }
    let rules = |schema: &Value| -> BTreeSet<String> {
        let rules = schema["x-kubernetes-validations"]
            .as_array()
            .into_iter()
            .flatten();
        rules
            .filter_map(|rule| Some(rule["rule"].as_str()?.to_owned()))
            .collect()
    };
    for rule in rules(new).difference(&rules(old)) {
        out.push(format!("{path}: rule is new or changed: {rule}"));
    }
    let required = |schema: &Value| -> BTreeSet<String> {
        let names = schema["required"].as_array().into_iter().flatten();
        names
            .filter_map(|name| Some(name.as_str()?.to_owned()))
            .collect()
    };
    for name in required(new).difference(&required(old)) {
        out.push(format!("{path}.{name}: is required now"));
    }
    for (name, before) in old["properties"].as_object().into_iter().flatten() {
        match new["properties"].get(name) {
            Some(after) => compare(&format!("{path}.{name}"), before, after, out),
            None => out.push(format!("{path}.{name}: is gone")),
        }
    }
    for (inner, suffix) in [("items", "[]"), ("additionalProperties", "{}")] {
        match (old.get(inner), new.get(inner)) {
            (Some(before), Some(after)) => compare(&format!("{path}{suffix}"), before, after, out),
            (Some(_), None) => out.push(format!("{path}{suffix}: is gone")),
            _ => {}
        }
    }
}

fn bounds(path: &str, old: &Value, new: &Value, out: &mut Vec<String>) {
    for (keyword, upper) in [
        ("maxLength", true),
        ("maxItems", true),
        ("maxProperties", true),
        ("maximum", true),
        ("minLength", false),
        ("minItems", false),
        ("minProperties", false),
        ("minimum", false),
    ] {
        let tighter = match (old[keyword].as_f64(), new[keyword].as_f64()) {
            (_, None) => false,
            (None, Some(_)) => true,
            (Some(before), Some(after)) => (after < before) == upper && after != before,
        };
        if tighter {
            out.push(format!("{path}: {keyword} is tighter"));
        }
    }
    for keyword in ["exclusiveMaximum", "exclusiveMinimum", "uniqueItems"] {
        if new[keyword] == true && old[keyword] != true {
            out.push(format!("{path}: {keyword} is new"));
        }
    }
}

#[test]
fn nothing_released_is_broken() -> anyhow::Result<()> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("crds/released");
    if !folder.exists() {
        return Ok(());
    }
    let current = super::crds();
    for entry in fs::read_dir(folder)? {
        let path = entry?.path();
        if path.extension().is_none_or(|e| e != "yaml") {
            continue;
        }
        let old: Value = serde_yaml::from_str(&fs::read_to_string(&path)?)?;
        let Some(new) = current
            .iter()
            .find(|crd| crd["metadata"]["name"] == old["metadata"]["name"])
        else {
            panic!("{}: nothing defines this kind any more", path.display());
        };
        let breaks = breaks(&old, new);
        assert!(
            breaks.is_empty(),
            "{} would break:\n  {}\nSoften the change, or make a new version of the API.",
            path.display(),
            breaks.join("\n  ")
        );
    }
    Ok(())
}

/// A small definition to plant changes in.
fn released() -> Value {
    json!({
        "spec": {
            "group": "domicile.dev", "scope": "Namespaced",
            "names": {"kind": "Thing", "plural": "things", "shortNames": ["th"]},
            "versions": [{
                "name": "v1alpha1", "served": true, "subresources": {"status": {}},
                "schema": {"openAPIV3Schema": {"type": "object", "required": ["spec"], "properties": {"spec": {
                    "type": "object", "required": ["name"],
                    "properties": {
                        "name": {"type": "string", "maxLength": 63},
                        "mode": {"type": "string", "enum": ["On", "Off"], "default": "On"},
                        "count": {"type": "integer", "format": "int32", "minimum": 1, "maximum": 9},
                        "note": {"type": "string", "nullable": true},
                        "labels": {"type": "object", "maxProperties": 16, "additionalProperties": {"type": "string"}},
                        "parts": {
                            "type": "array", "maxItems": 8,
                            "x-kubernetes-list-type": "map", "x-kubernetes-list-map-keys": ["name"],
                            "items": {"type": "object", "required": ["name"], "properties": {
                                "name": {"type": "string"}, "size": {"type": "integer"}}}
                        }
                    },
                    "x-kubernetes-validations": [{"rule": "self.name != 'x'", "message": "no"}]
                }}}}
            }]
        }
    })
}

const SPEC: &str = "/spec/versions/0/schema/openAPIV3Schema/properties/spec";

/// `released` with the value at a place (below [`SPEC`] unless it begins with "//") set, or removed if null.
fn planted(at: &str, value: Value) -> Value {
    let mut crd = released();
    let full = match at.strip_prefix('/') {
        Some(rest) if rest.starts_with('/') => rest.to_owned(),
        _ => format!("{SPEC}{at}"),
    };
    let (parent, key) = full.rsplit_once('/').expect("a pointer has a slash");
    let parent = crd.pointer_mut(parent).expect("the parent exists");
    let parent = parent.as_object_mut().expect("the parent is an object");
    if value.is_null() {
        parent.remove(key);
    } else {
        parent.insert(key.to_owned(), value);
    }
    crd
}

#[test]
fn every_break_is_found_once_and_named() {
    for (at, value, found) in [
        ("//spec/group", json!("other.dev"), "/spec/group changed"),
        ("//spec/scope", json!("Cluster"), "/spec/scope changed"),
        (
            "//spec/names/kind",
            json!("Other"),
            "/spec/names/kind changed",
        ),
        (
            "//spec/names/shortNames",
            json!([]),
            "short name \"th\" is gone",
        ),
        ("//spec/versions", json!([]), "v1alpha1 isn't served"),
        (
            "//spec/versions/0/served",
            json!(false),
            "v1alpha1 isn't served",
        ),
        (
            "//spec/versions/0/subresources/status",
            Value::Null,
            "subresource status is gone",
        ),
        ("/properties/name", Value::Null, ".spec.name: is gone"),
        (
            "/properties/parts/items/properties/size",
            Value::Null,
            ".spec.parts[].size: is gone",
        ),
        (
            "/required",
            json!(["name", "note"]),
            ".spec.note: is required now",
        ),
        (
            "/required",
            json!(["name", "brandNew"]),
            ".spec.brandNew: is required now",
        ),
        (
            "/properties/parts/items/required",
            json!(["name", "size"]),
            "size: is required now",
        ),
        (
            "/properties/name/type",
            json!("integer"),
            ".spec.name: type changed",
        ),
        (
            "/properties/name/maxLength",
            json!(40),
            ".spec.name: maxLength is tighter",
        ),
        (
            "/properties/name/minLength",
            json!(1),
            ".spec.name: minLength is tighter",
        ),
        (
            "/properties/name/pattern",
            json!("^a$"),
            ".spec.name: pattern is new",
        ),
        (
            "/properties/name/enum",
            json!(["a"]),
            ".spec.name: enum is new",
        ),
        (
            "/properties/mode/enum",
            json!(["On"]),
            ".spec.mode: \"Off\" isn't allowed",
        ),
        (
            "/properties/mode/default",
            json!("Off"),
            ".spec.mode: default changed",
        ),
        (
            "/properties/mode/default",
            Value::Null,
            ".spec.mode: default changed",
        ),
        (
            "/properties/count/format",
            json!("int64"),
            ".spec.count: format changed",
        ),
        (
            "/properties/count/minimum",
            json!(2),
            ".spec.count: minimum is tighter",
        ),
        (
            "/properties/count/maximum",
            json!(8),
            ".spec.count: maximum is tighter",
        ),
        (
            "/properties/count/exclusiveMaximum",
            json!(true),
            "exclusiveMaximum is new",
        ),
        (
            "/properties/note/nullable",
            Value::Null,
            ".spec.note: null isn't allowed",
        ),
        (
            "/properties/labels/maxProperties",
            json!(8),
            "maxProperties is tighter",
        ),
        (
            "/properties/labels/additionalProperties/maxLength",
            json!(8),
            ".spec.labels{}: maxLength",
        ),
        (
            "/properties/labels/additionalProperties",
            Value::Null,
            ".spec.labels{}: is gone",
        ),
        (
            "/properties/parts/maxItems",
            json!(7),
            ".spec.parts: maxItems is tighter",
        ),
        (
            "/properties/parts/minItems",
            json!(1),
            ".spec.parts: minItems is tighter",
        ),
        (
            "/properties/parts/x-kubernetes-list-type",
            json!("atomic"),
            "x-kubernetes-list-type changed",
        ),
        (
            "/properties/parts/x-kubernetes-list-map-keys",
            json!(["size"]),
            "list-map-keys changed",
        ),
        (
            "/x-kubernetes-validations",
            json!([{"rule": "false", "message": "no"}]),
            "rule is new or changed: false",
        ),
    ] {
        let found_now = breaks(&released(), &planted(at, value.clone()));
        assert_eq!(found_now.len(), 1, "{at} = {value}: {found_now:?}");
        assert!(
            found_now[0].contains(found),
            "{at} = {value}: {found_now:?}"
        );
    }
}

#[test]
fn what_only_widens_is_no_break() {
    for (at, value) in [
        ("/properties/name/maxLength", json!(64)),
        ("/properties/name/maxLength", Value::Null),
        ("/properties/name/description", json!("Other words.")),
        ("/properties/name/default", json!("a")),
        ("/properties/mode/enum", json!(["On", "Off", "Auto"])),
        ("/properties/count/minimum", json!(0)),
        ("/properties/parts/maxItems", json!(9)),
        (
            "/properties/added",
            json!({"type": "string", "maxLength": 5, "pattern": "^a$"}),
        ),
        ("/required", Value::Null),
        ("/x-kubernetes-validations", Value::Null),
        (
            "/x-kubernetes-validations",
            json!([{"rule": "self.name != 'x'", "message": "other words"}]),
        ),
        ("//spec/names/shortNames", json!(["th", "thg"])),
    ] {
        let found = breaks(&released(), &planted(at, value.clone()));
        assert!(found.is_empty(), "{at} = {value}: {found:?}");
    }
}
