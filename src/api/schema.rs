//! Schemas that several kinds share, each with a bound on everything: an unbounded list or map makes the API
//! server refuse CEL rules for their cost, and lets one object fill etcd.

use schemars::{Schema, SchemaGenerator, json_schema};

/// A map of label keys and values, at most 16, in the forms Kubernetes accepts.
#[must_use]
pub fn label_map_schema(_: &mut SchemaGenerator) -> Schema {
    json_schema!({
        "type": "object",
        "maxProperties": 16,
        "additionalProperties": {
            "type": "string", "maxLength": 63,
            "pattern": "^(([A-Za-z0-9][-A-Za-z0-9_.]*)?[A-Za-z0-9])?$"
        }
    })
}

/// A map of PostgreSQL parameters, at most 128.
#[must_use]
pub fn parameters_schema(_: &mut SchemaGenerator) -> Schema {
    json_schema!({
        "type": "object",
        "maxProperties": 128,
        "additionalProperties": { "type": "string", "maxLength": 512 }
    })
}

/// The standard condition list: a list-map by type, as in `metav1.Condition`.
#[must_use]
pub fn conditions_schema(_: &mut SchemaGenerator) -> Schema {
    json_schema!({
        "type": "array",
        "maxItems": 16,
        "x-kubernetes-list-type": "map",
        "x-kubernetes-list-map-keys": ["type"],
        "items": {
            "type": "object",
            "required": ["type", "status", "lastTransitionTime", "reason", "message"],
            "properties": {
                "type": { "type": "string", "maxLength": 316,
                          "description": "What the condition speaks of." },
                "status": { "type": "string", "enum": ["True", "False", "Unknown"],
                            "description": "Whether it holds." },
                "observedGeneration": { "type": "integer", "format": "int64", "minimum": 0,
                                        "description": "The generation that this condition speaks of." },
                "lastTransitionTime": { "type": "string", "format": "date-time",
                                        "description": "When the status last changed." },
                "reason": { "type": "string", "minLength": 1, "maxLength": 1024,
                            "pattern": "^[A-Za-z]([A-Za-z0-9_,:]*[A-Za-z0-9_])?$",
                            "description": "Why, as one word for machines." },
                "message": { "type": "string", "maxLength": 32768,
                             "description": "Why, and what to do, in words." }
            }
        }
    })
}

/// A Kubernetes quantity such as "10Gi" or "250m".
#[must_use]
pub fn quantity_schema(_: &mut SchemaGenerator) -> Schema {
    json_schema!({
        "type": "string", "minLength": 1, "maxLength": 32,
        "pattern": "^[0-9]+(\\.[0-9]+)?(m|k|Ki|M|Mi|G|Gi|T|Ti|P|Pi)?$"
    })
}

/// A point in time, as RFC 3339.
#[must_use]
pub fn date_time_schema(_: &mut SchemaGenerator) -> Schema {
    json_schema!({ "type": "string", "format": "date-time" })
}

/// What a row or document must have to be a person's: a map from column or field to an identifier's name, at
/// least one and at most 4. An empty one would match everything.
#[must_use]
pub fn where_schema(_: &mut SchemaGenerator) -> Schema {
    json_schema!({
        "type": "object",
        "minProperties": 1,
        "maxProperties": 4,
        "additionalProperties": {
            "type": "string", "minLength": 1, "maxLength": 32,
            "pattern": "^[a-z][A-Za-z0-9]*$"
        }
    })
}
