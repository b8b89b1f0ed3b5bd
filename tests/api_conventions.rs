//! The CRDs follow the Kubernetes API conventions, the files in `crds/` are what the types generate, samples
//! survive a round trip, the rules refuse what they should, and nothing released is broken.
//!
//! The conventions are those of <https://github.com/kubernetes/community/blob/main/contributors/devel/sig-architecture/api-conventions.md>
//! and of kube-api-linter. Each is one line of `CONVENTIONS`, with an example that breaks it.

#![allow(
    clippy::expect_used,
    clippy::panic,
    reason = "a test that can't go on should say so and stop"
)]

#[path = "api/compatibility.rs"]
mod compatibility;
#[path = "api/samples.rs"]
mod samples;
#[path = "api/structural.rs"]
mod structural;

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use regex::Regex;
use serde_json::{Value, json};

/// Every definition, as JSON.
fn crds() -> Vec<Value> {
    let all = domicile::api::crds::all().expect("the definitions are generated");
    let values = all
        .into_iter()
        .map(serde_json::to_value)
        .collect::<Result<_, _>>();
    values.expect("a definition is JSON")
}

/// A schema and where it is.
struct Node<'a> {
    /// As in `kubectl explain`, with "[]" for items and "{}" for values of a map.
    path: String,
    schema: &'a Value,
    /// For a property: its name, and whether it is required.
    property: Option<(&'a str, bool)>,
    /// The schema that has it as property, items or values.
    parent: Option<&'a Value>,
}

impl Node<'_> {
    fn is(&self, kind: &str) -> bool {
        self.schema["type"] == kind
    }

    fn has(&self, keyword: &str) -> bool {
        self.schema.get(keyword).is_some()
    }

    fn rules(&self) -> impl Iterator<Item = &Value> {
        self.schema["x-kubernetes-validations"]
            .as_array()
            .into_iter()
            .flatten()
    }

    fn strings<'a>(schema: &'a Value, keyword: &str) -> Vec<&'a str> {
        let all = schema[keyword].as_array().into_iter().flatten();
        all.filter_map(Value::as_str).collect()
    }
}

fn walk<'a>(node: Node<'a>, out: &mut Vec<Node<'a>>) {
    let schema = node.schema;
    let required = Node::strings(schema, "required");
    for (name, inner) in schema["properties"].as_object().into_iter().flatten() {
        let child = Node {
            path: format!("{}.{name}", node.path),
            schema: inner,
            property: Some((name, required.contains(&name.as_str()))),
            parent: Some(schema),
        };
        walk(child, out);
    }
    for (keyword, suffix) in [("items", "[]"), ("additionalProperties", "{}")] {
        if let Some(inner) = schema.get(keyword) {
            let child = Node {
                path: format!("{}{suffix}", node.path),
                schema: inner,
                property: None,
                parent: Some(schema),
            };
            walk(child, out);
        }
    }
    out.push(node);
}

/// What is wrong with a schema, if anything.
type Check = fn(&Node<'_>) -> Option<String>;

/// Booleans that will never need a third value, and why.
const BOOLEANS: [(&str, &str); 9] = [
    (
        "PrivacyDataStore.status.rights[].ledger",
        "the workflow's requests are kept in this store or aren't",
    ),
    (
        "PrivacyDataStore.status.rights[].tables[].delete",
        "its workers may delete rows or may not",
    ),
    (
        "PrivacyDataStore.status.instances[].ready",
        "as in core/v1 ContainerStatus",
    ),
    (
        "PrivacyDataStore.status.instances[].durable",
        "an observation: a commit waits for standbys or doesn't",
    ),
    (
        "PrivacyDataStore.status.instances[].voter",
        "an observation: it is a member of the list of voters or isn't",
    ),
    (
        "PrivacyDataStore.status.instances[].fenced",
        "an observation: the annotation names it and it has stopped, or not",
    ),
    (
        "PrivacyDataStore.status.instances[].pendingRestart",
        "an observation: as in PostgreSQL's pg_settings",
    ),
    (
        "PrivacyDataStore.status.instances[].mayBePrimary",
        "a permission: policies permit or don't, and doubt is no",
    ),
    (
        "PrivacyDataStore.status.instances[].leaving",
        "an intent: it is to stay or to go",
    ),
];

/// Enums whose values are somebody else's names.
const FOREIGN_ENUMS: [(&str, &str); 1] = [(
    "RightsWorkflow.spec.regimes[]",
    "ids of laws, as privacy teams write them",
)];

/// Alternatives without a discriminator, and why.
const PLAIN_ALTERNATIVES: [(&str, &str); 1] = [(
    "RightsWorkflow.spec.targets[].postgresql",
    "storeRef or urlFrom: two ways to say where one thing is, like value and valueFrom",
)];

fn listed(list: &[(&str, &str)], node: &Node<'_>) -> bool {
    list.iter().any(|(path, _)| *path == node.path)
}

/// Name, check, and a property that breaks it: planted as `bad` below the root of an otherwise good schema.
fn conventions() -> Vec<(&'static str, Check, Value)> {
    let text = json!({"type": "string", "maxLength": 9});
    vec![
        (
            "a list says how it merges, and by which keys",
            |node| {
                if !node.is("array") {
                    return None;
                }
                let items = &node.schema["items"];
                let scalar = |schema: &Value| {
                    !["object", "array"].contains(&schema["type"].as_str().unwrap_or("object"))
                };
                match node.schema["x-kubernetes-list-type"].as_str() {
                    Some("atomic") => None,
                    Some("set") => (!scalar(items)).then(|| "a set has scalars only".to_owned()),
                    Some("map") => {
                        let keys = Node::strings(node.schema, "x-kubernetes-list-map-keys");
                        let required = Node::strings(items, "required");
                        let good = |key: &&str| {
                            required.contains(key) && scalar(&items["properties"][*key])
                        };
                        (keys.is_empty() || !keys.iter().all(good))
                            .then(|| "keys must be required scalars of the items".to_owned())
                    }
                    _ => Some("x-kubernetes-list-type is missing".to_owned()),
                }
            },
            json!({"type": "array", "maxItems": 1, "x-kubernetes-list-type": "map", "x-kubernetes-list-map-keys": ["name"],
                   "items": {"type": "object", "properties": {"name": text}}}),
        ),
        (
            "a list has maxItems",
            |node| {
                (node.is("array") && !node.has("maxItems"))
                    .then(|| "maxItems is missing".to_owned())
            },
            json!({"type": "array", "x-kubernetes-list-type": "atomic", "items": text}),
        ),
        (
            "a string has maxLength, an enum or a format that bounds it",
            |node| {
                let bounded = node.has("maxLength")
                    || node.has("enum")
                    || node.schema["format"] == "date-time";
                (node.is("string") && !bounded).then(|| "maxLength is missing".to_owned())
            },
            json!({"type": "string"}),
        ),
        (
            "an object declares its fields, or is a bounded map of scalars",
            |node| {
                if !node.is("object") {
                    return None;
                }
                let Some(values) = node.schema.get("additionalProperties") else {
                    return (!node.has("properties")).then(|| "it declares no fields".to_owned());
                };
                if !node.has("maxProperties") {
                    Some("maxProperties is missing".to_owned())
                } else if values["type"] == "object" || values["type"] == "array" {
                    Some("a map of objects should be a list-map".to_owned())
                } else {
                    None
                }
            },
            json!({"type": "object", "maxProperties": 2, "additionalProperties": {"type": "object", "properties": {}}}),
        ),
        (
            "a number is int32 or int64, signed and bounded",
            |node| {
                if node.is("number") {
                    return Some("floats don't survive a round trip".to_owned());
                }
                let known = node.schema["format"] == "int32" || node.schema["format"] == "int64";
                let spec = node.path.contains(".spec.");
                (node.is("integer")
                    && !(known && node.has("minimum") && (node.has("maximum") || !spec)))
                    .then(|| {
                        "format int32 or int64, minimum, and in a spec maximum are needed"
                            .to_owned()
                    })
            },
            json!({"type": "integer", "format": "uint32", "minimum": 0, "maximum": 2}),
        ),
        (
            "every schema has a plain type and no way around it",
            |node| {
                let escapes = [
                    "nullable",
                    "x-kubernetes-preserve-unknown-fields",
                    "x-kubernetes-int-or-string",
                    "x-kubernetes-embedded-resource",
                    "anyOf",
                    "oneOf",
                    "allOf",
                    "not",
                    "$ref",
                ];
                let plain = ["object", "array", "string", "integer", "number", "boolean"];
                let kind = node.schema["type"].as_str().unwrap_or_default();
                if let Some(escape) = escapes.iter().find(|keyword| node.has(keyword)) {
                    Some(format!("{escape} isn't used here"))
                } else {
                    (!plain.contains(&kind)).then(|| "type is missing".to_owned())
                }
            },
            json!({"type": "string", "maxLength": 3, "nullable": true}),
        ),
        (
            "a boolean has a reason not to be an enum",
            |node| {
                (node.is("boolean") && !listed(&BOOLEANS, node))
                    .then(|| "use an enum, or list it in BOOLEANS".to_owned())
            },
            json!({"type": "boolean"}),
        ),
        (
            "a name is camelCase and says Ref, not Reference, and never Timestamp or phase",
            |node| {
                let (name, _) = node.property?;
                let camel = name.starts_with(|c: char| c.is_ascii_lowercase())
                    && name.chars().all(|c| c.is_ascii_alphanumeric());
                let bad_end = ["Reference", "Timestamp", "TimeStamp", "List"]
                    .iter()
                    .find(|end| name.ends_with(**end));
                if !camel || name == "phase" {
                    Some("not such a name".to_owned())
                } else {
                    bad_end.map(|end| format!("a name shouldn't end in {end}"))
                }
            },
            json!({"type": "object", "properties": {"phase": {"type": "string", "maxLength": 9, "description": "Where it is in its life."}}}),
        ),
        (
            "a reference is called so and is an object with a name",
            |node| {
                let (name, _) = node.property?;
                let fields: Vec<_> = node.schema["properties"]
                    .as_object()
                    .into_iter()
                    .flatten()
                    .map(|(k, _)| k.as_str())
                    .collect();
                let reference = name.ends_with("Ref");
                if reference && !fields.contains(&"name") {
                    Some("a reference has a name".to_owned())
                } else {
                    (fields == ["name"] && !reference).then(|| "it should end in Ref".to_owned())
                }
            },
            json!({"type": "string", "maxLength": 4, "propertyName": "storeRef"}),
        ),
        (
            "a duration is an integer with its unit in the name",
            |node| {
                let (name, _) = node.property?;
                let last_word = name
                    .rfind(|c: char| c.is_ascii_uppercase())
                    .map_or(name, |at| &name[at..])
                    .to_lowercase();
                let units = [
                    "seconds", "minutes", "hours", "days", "weeks", "months", "years",
                ];
                let spans = [
                    "timeout",
                    "period",
                    "interval",
                    "duration",
                    "delay",
                    "ttl",
                    "age",
                    "window",
                    "lag",
                    "retention",
                ];
                if node.schema["format"] == "duration" {
                    Some("use an integer with the unit in the name".to_owned())
                } else if units.contains(&last_word.as_str()) {
                    (!node.is("integer")).then(|| "a name with a unit is an integer".to_owned())
                } else {
                    (spans.contains(&last_word.as_str()) && !node.is("object"))
                        .then(|| "the unit is missing in the name".to_owned())
                }
            },
            json!({"type": "integer", "format": "int32", "minimum": 0, "maximum": 9, "propertyName": "callTimeout"}),
        ),
        (
            "a field is described in sentences, on one line",
            |node| {
                if node.property.is_none() && node.parent.is_some() {
                    return None;
                }
                let text = node.schema["description"].as_str().unwrap_or_default();
                let sentences = text.len() >= 10
                    && text.ends_with('.')
                    && !text.starts_with(|c: char| c.is_lowercase());
                (!sentences || text.replace("\n\n", "").contains('\n'))
                    .then(|| format!("not a description: {text:?}"))
            },
            json!({"type": "string", "maxLength": 4, "description": "the name"}),
        ),
        (
            "what has a default is not required",
            |node| {
                (node.has("default") && node.property.is_some_and(|(_, required)| required))
                    .then(|| "it is required".to_owned())
            },
            json!({"type": "string", "maxLength": 4, "default": "a", "required": true}),
        ),
        (
            "an enum's values are PascalCase",
            |node| {
                let pascal = |v: &&str| {
                    !v.starts_with(|c: char| c.is_ascii_uppercase())
                        || !v.chars().all(|c| c.is_ascii_alphanumeric())
                };
                let bad = Node::strings(node.schema, "enum")
                    .into_iter()
                    .find(pascal)?;
                (!listed(&FOREIGN_ENUMS, node)).then(|| format!("{bad} isn't"))
            },
            json!({"type": "string", "enum": ["on-off"]}),
        ),
        (
            "a pattern is a valid expression for the whole string",
            |node| {
                let pattern = node.schema["pattern"].as_str()?;
                let whole = pattern.starts_with('^')
                    && pattern.ends_with('$')
                    && Regex::new(pattern).is_ok();
                (!whole).then(|| format!("{pattern} isn't"))
            },
            json!({"type": "string", "maxLength": 4, "pattern": "[a-z]+"}),
        ),
        (
            "a rule says in words what is wrong and what to do",
            |node| {
                node.rules().find_map(|rule| {
                    let text = rule["message"]
                        .as_str()
                        .or(rule["messageExpression"].as_str())
                        .unwrap_or_default();
                    (text.len() < 30 || text.contains('\n'))
                        .then(|| format!("{} has no such message", rule["rule"]))
                })
            },
            json!({"type": "string", "maxLength": 4, "x-kubernetes-validations": [{"rule": "self != 'a'", "message": "no"}]}),
        ),
        (
            "a rule about the old value can't be got round by removing the field",
            |node| {
                let about_old = |rule: &Value| {
                    rule["rule"]
                        .as_str()
                        .is_some_and(|rule| rule.contains("oldSelf"))
                };
                if !node.rules().any(about_old) {
                    return None;
                }
                let stays =
                    node.has("default") || node.property.is_some_and(|(_, required)| required);
                let correlated = !node.path.contains("[]") && !node.path.contains("{}");
                (!stays || !correlated)
                    .then(|| "require the field or give it a default, outside of lists".to_owned())
            },
            json!({"type": "string", "maxLength": 4,
                   "x-kubernetes-validations": [{"rule": "self == oldSelf", "message": "the name can't be changed: make another"}]}),
        ),
        (
            "a union has a required discriminator, one optional block per value, and a rule about each",
            |node| {
                let discriminator = &node.schema["properties"]["type"];
                let blocks: Vec<String> = Node::strings(discriminator, "enum")
                    .iter()
                    .map(|v| v.to_lowercase())
                    .collect();
                let is_object = |name: &str| node.schema["properties"][name]["type"] == "object";
                if !blocks.iter().any(|block| is_object(block)) {
                    return None;
                }
                let required = Node::strings(node.schema, "required");
                let whole = blocks.iter().all(|block| {
                    let ruled = node.rules().any(|rule| {
                        rule["rule"]
                            .as_str()
                            .is_some_and(|r| r.contains(&format!("has(self.{block})")))
                    });
                    is_object(block) && !required.contains(&block.as_str()) && ruled
                });
                (!whole || !required.contains(&"type")).then(|| "the union isn't whole".to_owned())
            },
            json!({"type": "object", "required": ["type"], "properties": {
                "type": {"type": "string", "enum": ["Disk", "Tape"], "description": "What it is kept on."},
                "disk": {"type": "object", "description": "For type Disk.", "properties": {}}}}),
        ),
        (
            "alternatives have a discriminator, or a reason to have none",
            |node| {
                let exclusive = Regex::new(r"has\(self\.\w+\) (!=|==) has\(self\.\w+\)").ok()?;
                let bare = node
                    .rules()
                    .any(|rule| rule["rule"].as_str().is_some_and(|r| exclusive.is_match(r)));
                (bare && !listed(&PLAIN_ALTERNATIVES, node))
                    .then(|| "give it a type, or list it in PLAIN_ALTERNATIVES".to_owned())
            },
            json!({"type": "object", "properties": {},
                   "x-kubernetes-validations": [{"rule": "has(self.a) != has(self.b)", "message": "give either a or b, and not both of them"}]}),
        ),
    ]
}

#[test]
fn every_schema_follows_the_conventions() {
    let crds = crds();
    let mut nodes = Vec::new();
    for crd in &crds {
        for version in crd["spec"]["versions"].as_array().into_iter().flatten() {
            let root = Node {
                path: crd["spec"]["names"]["kind"]
                    .as_str()
                    .unwrap_or_default()
                    .to_owned(),
                schema: &version["schema"]["openAPIV3Schema"],
                property: None,
                parent: None,
            };
            walk(root, &mut nodes);
        }
    }
    assert!(nodes.len() > 200, "the schemas are walked");
    let found: Vec<String> = conventions()
        .iter()
        .flat_map(|(convention, check, _)| {
            nodes.iter().filter_map(move |node| {
                Some(format!("{}: {convention}: {}", node.path, check(node)?))
            })
        })
        .collect();
    assert!(
        found.is_empty(),
        "{} breaches:\n{}",
        found.len(),
        found.join("\n")
    );

    for (path, why) in BOOLEANS
        .iter()
        .chain(&FOREIGN_ENUMS)
        .chain(&PLAIN_ALTERNATIVES)
    {
        assert!(
            nodes.iter().any(|node| node.path == *path),
            "{path} ({why}) is no more: take it off its list"
        );
    }
}

/// What a check finds in a kind whose spec has this one property; `propertyName` and `required: true` in it say
/// how it is called and that it is required.
fn planted(check: Check, mut property: Value) -> Vec<String> {
    let fields = property.as_object_mut().expect("a schema is an object");
    let name = match fields.remove("propertyName") {
        Some(Value::String(name)) => name,
        _ => "planted".to_owned(),
    };
    let mut required = Vec::new();
    if fields.get("required") == Some(&json!(true)) {
        fields.remove("required");
        required.push(&name);
    }
    fields
        .entry("description")
        .or_insert(json!("What this test planted."));
    let root = json!({
        "type": "object", "description": "A kind of this test.",
        "properties": {"spec": {
            "type": "object", "description": "A spec of this test.",
            "required": required, "properties": {&name: property}
        }}
    });
    let mut nodes = Vec::new();
    let root = Node {
        path: "Planted".to_owned(),
        schema: &root,
        property: None,
        parent: None,
    };
    walk(root, &mut nodes);
    nodes
        .iter()
        .filter_map(|node| check(node).map(|_| node.path.clone()))
        .collect()
}

#[test]
fn a_breach_of_each_convention_is_found_where_it_is() {
    for (convention, check, bad) in conventions() {
        let good = json!({"type": "string", "maxLength": 9});
        assert!(
            planted(check, good).is_empty(),
            "a good schema is against: {convention}"
        );
        let found = planted(check, bad);
        assert!(
            found.len() == 1 && found[0].starts_with("Planted.spec."),
            "against {convention}: {found:?}"
        );
    }
}

#[test]
fn every_definition_follows_the_conventions() {
    let scopes = BTreeMap::from([
        ("Region", "Cluster"),
        ("ResidencyPolicy", "Cluster"),
        ("PrivacyDataStore", "Namespaced"),
        ("RightsWorkflow", "Namespaced"),
    ]);
    let mut short_names = Vec::new();
    let crds = crds();
    assert_eq!(crds.len(), scopes.len());
    for crd in &crds {
        let spec = &crd["spec"];
        let kind = spec["names"]["kind"].as_str().unwrap_or_default();
        assert_eq!(spec["group"], domicile::api::GROUP, "{kind}");
        assert_eq!(
            Some(&spec["scope"].as_str().unwrap_or_default()),
            scopes.get(kind),
            "{kind}"
        );
        assert_eq!(spec["names"]["categories"], json!(["domicile"]), "{kind}");
        assert_eq!(
            spec["names"]["singular"],
            json!(kind.to_lowercase()),
            "{kind}"
        );
        let short = Node::strings(&spec["names"], "shortNames");
        assert!(!short.is_empty(), "{kind} has no short name");
        short_names.extend(short.iter().map(|s| (*s).to_owned()));

        let versions = spec["versions"].as_array().cloned().unwrap_or_default();
        assert_eq!(
            versions.iter().filter(|v| v["storage"] == true).count(),
            1,
            "{kind}"
        );
        for version in versions {
            let schema = &version["schema"]["openAPIV3Schema"];
            assert!(
                version["subresources"]["status"].is_object(),
                "{kind} has no status subresource"
            );
            assert_eq!(
                schema["required"],
                json!(["spec"]),
                "{kind}: spec is required, status is not"
            );
            status_follows_the_conventions(kind, &schema["properties"]["status"]);
            columns_follow_the_conventions(kind, &version["additionalPrinterColumns"], schema);
        }
    }
    short_names.sort_unstable();
    let all = short_names.len();
    short_names.dedup();
    assert_eq!(short_names.len(), all, "two kinds have the same short name");
}

fn status_follows_the_conventions(kind: &str, status: &Value) {
    let conditions = &status["properties"]["conditions"];
    assert_eq!(conditions["x-kubernetes-list-type"], "map", "{kind}");
    assert_eq!(
        conditions["x-kubernetes-list-map-keys"],
        json!(["type"]),
        "{kind}"
    );
    for field in ["type", "status", "reason", "message", "lastTransitionTime"] {
        assert!(
            Node::strings(&conditions["items"], "required").contains(&field),
            "{kind}: {field}"
        );
    }
    let generation = &status["properties"]["observedGeneration"];
    assert_eq!(
        generation["format"], "int64",
        "{kind} has no observedGeneration in its status"
    );
    assert!(
        status.get("required").is_none(),
        "{kind}: a status begins empty, so nothing in it is required"
    );
}

fn columns_follow_the_conventions(kind: &str, columns: &Value, schema: &Value) {
    let columns = columns.as_array().cloned().unwrap_or_default();
    let name = |column: &Value| column["name"].as_str().unwrap_or_default().to_owned();
    assert_eq!(
        columns.first().map(name).as_deref(),
        Some("Ready"),
        "{kind}: Ready is the first column"
    );
    assert_eq!(
        columns.last().map(name).as_deref(),
        Some("Age"),
        "{kind}: Age is the last column"
    );
    assert_eq!(
        columns.last().map(|c| c["type"].clone()),
        Some(json!("date")),
        "{kind}"
    );
    let narrow = columns
        .iter()
        .filter(|c| c["priority"].as_i64().unwrap_or(0) == 0)
        .count();
    assert!(
        narrow <= 7,
        "{kind}: {narrow} columns are too many for a terminal: give some priority 1"
    );
    let filter = Regex::new(r#"\[\?\(@\.type=="[A-Za-z]+"\)\]"#).expect("it is an expression");
    for column in &columns {
        let name = name(column);
        assert!(
            column["description"]
                .as_str()
                .is_some_and(|d| d.len() >= 10),
            "{kind}: column {name} isn't described"
        );
        let path = column["jsonPath"].as_str().unwrap_or_default();
        if path.starts_with(".metadata.") {
            continue;
        }
        let plain = filter.replace_all(path, ".[]");
        let mut at = schema;
        for step in plain.trim_start_matches('.').split('.') {
            at = if step == "[]" {
                &at["items"]
            } else {
                &at["properties"][step]
            };
        }
        assert!(
            at.is_object(),
            "{kind}: column {name} shows {path}, which no field is"
        );
    }
}

/// Where `self == oldSelf` guards what could not be kept otherwise.
#[test]
fn what_can_not_change_has_a_rule() {
    let immutable = [
        ("PrivacyDataStore", "database"),
        ("PrivacyDataStore", "storage"),
        ("RightsWorkflow", "ledgerRef"),
    ];
    let crds = crds();
    for (kind, field) in immutable {
        let crd = crds
            .iter()
            .find(|crd| crd["spec"]["names"]["kind"] == kind)
            .expect("the kind exists");
        let spec = &crd["spec"]["versions"][0]["schema"]["openAPIV3Schema"]["properties"]["spec"];
        let rules = spec["properties"][field]["x-kubernetes-validations"]
            .as_array()
            .cloned()
            .unwrap_or_default();
        assert!(
            rules.iter().any(|rule| rule["rule"] == "self == oldSelf"),
            "{kind}.spec.{field}"
        );
    }
}

#[test]
fn the_files_are_what_the_types_generate() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("crds");
    let files = domicile::api::crds::files().expect("the files are generated");
    let mut wrong = Vec::new();
    for (name, generated) in &files {
        if fs::read_to_string(folder.join(name)).ok().as_ref() != Some(generated) {
            wrong.push(name.clone());
        }
    }
    for entry in fs::read_dir(&folder).into_iter().flatten().flatten() {
        let name = entry.file_name().to_string_lossy().into_owned();
        if name.ends_with(".yaml") && files.iter().all(|(kept, _)| *kept != name) {
            wrong.push(name);
        }
    }
    assert!(
        wrong.is_empty(),
        "not what src/api generates: {}. Run `make generate`.",
        wrong.join(", ")
    );
}

#[test]
fn the_files_say_the_same_as_the_types() {
    for ((name, yaml), crd) in domicile::api::crds::files()
        .expect("the files are generated")
        .iter()
        .zip(crds())
    {
        let read: k8s_openapi::apiextensions_apiserver::pkg::apis::apiextensions::v1::CustomResourceDefinition =
            serde_yaml::from_str(yaml).expect("a file is YAML");
        assert_eq!(
            serde_json::to_value(read).expect("it is JSON"),
            crd,
            "{name}"
        );
    }
}

#[test]
fn writing_replaces_what_is_old_and_leaves_the_rest() {
    let folder = tempfile::tempdir().expect("a folder");
    let target = folder.path().join("crds");
    fs::create_dir_all(target.join("released")).expect("a folder");
    for name in [
        "domicile.dev_old.yaml",
        "domicile.dev_regions.yaml",
        "README.md",
    ] {
        fs::write(target.join(name), "old").expect("a file");
    }
    domicile::api::crds::write_dir(&target).expect("the files are written");
    let mut left: Vec<String> = fs::read_dir(&target)
        .expect("the folder is there")
        .map(|entry| {
            entry
                .expect("an entry")
                .file_name()
                .to_string_lossy()
                .into_owned()
        })
        .collect();
    left.sort_unstable();
    let mut expected: Vec<String> = domicile::api::crds::files()
        .expect("the files are generated")
        .into_iter()
        .map(|(name, _)| name)
        .chain(["README.md".to_owned(), "released".to_owned()])
        .collect();
    expected.sort_unstable();
    assert_eq!(left, expected);
    assert_ne!(
        fs::read_to_string(target.join("domicile.dev_regions.yaml")).expect("a file"),
        "old"
    );
}
