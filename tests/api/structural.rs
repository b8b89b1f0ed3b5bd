//! Does a value satisfy a structural schema, as an API server would find with strict field validation?
//!
//! A structural schema is a small part of JSON Schema. The crate `jsonschema` knows all of it, but its features
//! make cargo build serde_json, and with it every client crate, a second time for the tests.

use regex::Regex;
use serde_json::Value;

/// Everything in which the value differs from the schema, unknown fields included.
pub fn errors(schema: &Value, value: &Value) -> Vec<String> {
    let mut out = Vec::new();
    check("", schema, value, &mut out);
    out
}

fn check(path: &str, schema: &Value, value: &Value, out: &mut Vec<String>) {
    let mut complain = |what: String| out.push(format!("{path}: {what}"));
    let number = |keyword: &str| schema[keyword].as_f64();
    let size = |keyword: &str| schema[keyword].as_u64();
    let fits = match schema["type"].as_str() {
        Some("object") => value.is_object(),
        Some("array") => value.is_array(),
        Some("string") => value.is_string(),
        Some("integer") => value.is_i64(),
        Some("boolean") => value.is_boolean(),
        _ => false,
    };
    if !fits {
        complain(format!("{value} is not of type {}", schema["type"]));
        return;
    }
    if let Some(allowed) = schema["enum"].as_array()
        && !allowed.contains(value)
    {
        complain(format!("{value} is none of {allowed:?}"));
    }
    let mut within = |what: &str, is: usize, least: &str, most: &str| {
        let is = is as u64;
        if size(least).is_some_and(|least| is < least) || size(most).is_some_and(|most| is > most) {
            out.push(format!("{path}: {is} {what} are too few or too many"));
        }
    };
    match value {
        Value::String(text) => {
            within("characters", text.chars().count(), "minLength", "maxLength");
            if let Some(pattern) = schema["pattern"].as_str()
                && !Regex::new(pattern).is_ok_and(|r| r.is_match(text))
            {
                out.push(format!("{path}: {text:?} doesn't match {pattern}"));
            }
            if schema["format"] == "date-time" && text.parse::<jiff::Timestamp>().is_err() {
                out.push(format!("{path}: {text:?} is not a time"));
            }
        }
        Value::Number(is) => {
            let is = is.as_f64().unwrap_or(f64::NAN);
            if number("minimum").is_some_and(|least| is < least)
                || number("maximum").is_some_and(|most| is > most)
            {
                out.push(format!("{path}: {is} is out of bounds"));
            }
        }
        Value::Array(items) => {
            within("items", items.len(), "minItems", "maxItems");
            if let Some(keys) = identity(schema) {
                for (i, item) in items.iter().enumerate() {
                    if items[..i].iter().any(|other| keys(other) == keys(item)) {
                        out.push(format!("{path}[{i}]: {} is there twice", keys(item)));
                    }
                }
            }
            for (i, item) in items.iter().enumerate() {
                check(&format!("{path}[{i}]"), &schema["items"], item, out);
            }
        }
        Value::Object(fields) => {
            within("entries", fields.len(), "minProperties", "maxProperties");
            for name in schema["required"].as_array().into_iter().flatten() {
                if name.as_str().is_some_and(|name| !fields.contains_key(name)) {
                    out.push(format!("{path}: {name} is missing"));
                }
            }
            for (name, inner) in fields {
                let path = format!("{path}.{name}");
                let declared = &schema["properties"][name];
                if declared.is_object() {
                    check(&path, declared, inner, out);
                } else if schema["additionalProperties"].is_object() {
                    check(&path, &schema["additionalProperties"], inner, out);
                } else {
                    out.push(format!("{path}: unknown field"));
                }
            }
        }
        _ => {}
    }
}

/// What makes an item of a set or map unique.
fn identity(schema: &Value) -> Option<impl Fn(&Value) -> Value> {
    let kind = schema["x-kubernetes-list-type"].as_str()?;
    let keys = match kind {
        "map" => schema["x-kubernetes-list-map-keys"].as_array()?.clone(),
        "set" => Vec::new(),
        _ => return None,
    };
    Some(move |item: &Value| {
        if keys.is_empty() {
            item.clone()
        } else {
            keys.iter()
                .filter_map(Value::as_str)
                .map(|key| item[key].clone())
                .collect()
        }
    })
}

#[test]
fn each_kind_of_error_is_found() {
    use serde_json::json;
    let schema = json!({
        "type": "object", "required": ["name"], "maxProperties": 5,
        "properties": {
            "name": {"type": "string", "minLength": 2, "maxLength": 3, "pattern": "^[a-z]+$"},
            "mode": {"type": "string", "enum": ["On"]},
            "at": {"type": "string", "format": "date-time"},
            "count": {"type": "integer", "minimum": 1, "maximum": 2},
            "tags": {"type": "array", "maxItems": 2, "x-kubernetes-list-type": "set", "items": {"type": "string"}},
            "people": {"type": "array", "x-kubernetes-list-type": "map", "x-kubernetes-list-map-keys": ["id"],
                       "items": {"type": "object", "properties": {"id": {"type": "integer"}}}},
            "labels": {"type": "object", "additionalProperties": {"type": "string", "maxLength": 1}}
        }
    });
    let good = json!({"name": "ab", "mode": "On", "at": "2026-01-01T00:00:00Z", "count": 2,
        "tags": ["a", "b"]});
    assert_eq!(errors(&schema, &good), Vec::<String>::new());
    for bad in [
        json!([]),
        json!({}),
        json!({"name": null}),
        json!({"name": "a"}),
        json!({"name": "abcd"}),
        json!({"name": "AB"}),
        json!({"name": "ab", "mode": "Off"}),
        json!({"name": "ab", "at": "yesterday"}),
        json!({"name": "ab", "count": 0}),
        json!({"name": "ab", "count": 3}),
        json!({"name": "ab", "count": 1.5}),
        json!({"name": "ab", "tags": ["a", "a"]}),
        json!({"name": "ab", "tags": ["a", "b", "c"]}),
        json!({"name": "ab", "people": [{"id": 1}, {"id": 1}]}),
        json!({"name": "ab", "labels": {"a": "ab"}}),
        json!({"name": "ab", "nam": "ab"}),
    ] {
        assert_eq!(
            errors(&schema, &bad).len(),
            1,
            "{bad}: {:?}",
            errors(&schema, &bad)
        );
    }
}
