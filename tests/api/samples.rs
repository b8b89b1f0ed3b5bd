//! A sample of each kind, complete and lawful, and what becomes of it when one thing is wrong.
//!
//! The CEL rules are evaluated by `kube-cel`; that an API server also accepts their cost is for the tests on a
//! real one.

use std::collections::BTreeMap;
use std::sync::LazyLock;

use domicile::api::{PrivacyDataStore, Region, ResidencyPolicy, RightsWorkflow};
use kube_cel::{CompiledSchema, Validator, compile_schema};
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::{Value, json};

use super::structural;

const REGION: &str = r#"
apiVersion: domicile.dev/v1alpha1
kind: Region
metadata: {name: us-west}
spec:
  jurisdictions: [US, US-CA]
  nodes:
    labels: {topology.kubernetes.io/region: us-west-2}
    providerIDPrefix: "aws:///us-west-2"
status:
  conditions:
  - {type: Ready, status: "True", reason: AsSpecified, message: "3 nodes", lastTransitionTime: "2026-01-02T03:04:05Z", observedGeneration: 1}
  observedGeneration: 1
  nodes: 3
  zones: [us-west-2a, us-west-2b]
"#;

const RESIDENCY_POLICY: &str = r#"
apiVersion: domicile.dev/v1alpha1
kind: ResidencyPolicy
metadata: {name: california-records}
spec:
  basis: Statute
  citation: "Records policy 12: consumer records stay in the United States"
  permits:
  - {data: Primary, regions: [us-west]}
  - {data: Standby, regions: [us-west, us-east]}
  - {data: Worker, jurisdictions: [US]}
  namespaces: {matchLabels: {team: records}}
  onViolation: FenceAndErase
status:
  conditions:
  - {type: Ready, status: "False", reason: RegionNotFound, message: "Region us-east doesn't exist", lastTransitionTime: "2026-01-02T03:04:05Z"}
  observedGeneration: 2
  usedBy: 3
  permits:
  - {data: Primary, regions: [us-west], nodeRegions: [us-west-2]}
"#;

const PRIVACY_DATA_STORE: &str = r#"
apiVersion: domicile.dev/v1alpha1
kind: PrivacyDataStore
metadata: {name: consumers, namespace: records}
spec:
  residencyPolicyRef: {name: california-records}
  placement:
  - {region: us-west, instances: 2}
  - {region: us-east, instances: 1}
  postgres:
    image: postgres:17
    imagePullSecrets: [{name: registry}]
    parameters: {shared_buffers: 256MB, pg_stat_statements.track: all}
  database: {name: app, owner: app}
  durability: Required
  failover: {detectionSeconds: 3}
  deletionPolicy: Retain
  storage: {size: 10Gi, storageClassName: local}
  resources: {requests: {cpu: 250m, memory: 512Mi}, limits: {memory: 512Mi}}
status:
  conditions:
  - {type: Ready, status: "Unknown", reason: Starting, message: "", lastTransitionTime: "2026-01-02T03:04:05Z"}
  observedGeneration: 1
  summary: 1/3
  term: 4
  primary: consumers-2
  systemIdentifier: "7450000000000000000"
  instances:
  - {name: consumers-2, region: us-west, zone: us-west-b, node: w2, id: 4f6a, role: Primary, ready: true, durable: true, address: 10.0.0.7, systemIdentifier: "7450000000000000000", postgresVersion: "17.6", message: serving}
"#;

const RIGHTS_WORKFLOW: &str = r#"
apiVersion: domicile.dev/v1alpha1
kind: RightsWorkflow
metadata: {name: consumers, namespace: records}
spec:
  ledgerRef: {name: consumers}
  residencyPolicyRef: {name: california-records}
  regimes: [us-ca-ccpa, eu-gdpr]
  identifiers: [email, customerId]
  targets:
  - name: accounts
    type: PostgreSQL
    residueDays: 30
    postgresql:
      storeRef: {name: consumers}
      erase:
      - {table: customer, where: {id: customerId}}
      - {table: shop.orders, where: {customer_id: customerId}, clearColumns: [name, street]}
  - name: sessions
    type: Redis
    region: us-west
    settleSeconds: 30
    redis:
      urlFrom: {secretKeyRef: {name: sessions, key: url}}
      keys: ["session:{customerId}:*", "mail:{email}"]
  - name: search
    type: OpenSearch
    region: us-west
    opensearch:
      urlFrom: {secretKeyRef: {name: search, key: url}}
      caFrom: {secretKeyRef: {name: search, key: ca.crt}}
      erase: [{index: orders-*, where: {customer.id: customerId}}]
  - name: queue
    type: NATS
    region: us-west
    nats: {urlFrom: {secretKeyRef: {name: queue, key: url}}, stream: ORDERS, subjects: ["orders.{customerId}.>"]}
  - name: events
    type: Kafka
    region: us-west
    kafka:
      brokers: ["kafka.events:9093"]
      caFrom: {secretKeyRef: {name: events, key: ca.crt}}
      sasl:
        mechanism: ScramSha512
        usernameFrom: {secretKeyRef: {name: events, key: username}}
        passwordFrom: {secretKeyRef: {name: events, key: password}}
      topics:
      - {name: profiles, erasedBy: Tombstone, key: "customer-{customerId}"}
      - {name: clicks, erasedBy: Retention}
  - name: uploads
    type: S3
    region: us-west
    s3:
      bucket: uploads
      endpoint: https://s3.storage:8333
      signingRegion: us-west-2
      accessKeyIdFrom: {secretKeyRef: {name: uploads, key: id}}
      secretAccessKeyFrom: {secretKeyRef: {name: uploads, key: secret}}
      prefixes: ["uploads/{customerId}/"]
      objects: ["avatars/{customerId}.png"]
  - name: newsletter
    type: Webhook
    region: us-west
    webhook:
      eraseURL: https://newsletter.example/erase
      probeURL: https://newsletter.example/erased
      signingKeyFrom: {secretKeyRef: {name: newsletter, key: hmac}}
      identifiers: [email]
      timeoutSeconds: 20
  - name: shop
    type: MySQL
    region: us-west
    mysql: {urlFrom: {secretKeyRef: {name: shop, key: url}}, erase: [{table: Customers, where: {Id: customerId}}]}
  - name: reviews
    type: MongoDB
    region: us-west
    mongodb:
      urlFrom: {secretKeyRef: {name: reviews, key: url}}
      erase: [{collection: reviews, where: {author._id: customerId}, clearFields: [author.name]}]
  promptnessSeconds: 10
  gateway: {replicas: {min: 2, max: 6}, resources: {requests: {memory: 32Mi}}}
  workers:
    scaling: Enforce
    pools:
    - {region: us-west, min: 1, max: 40, resources: {requests: {cpu: 100m, memory: 64Mi}}}
  retention: {closedRequestsMonths: 24}
status:
  conditions:
  - {type: Ready, status: "True", reason: AsSpecified, message: "", lastTransitionTime: "2026-01-02T03:04:05Z", observedGeneration: 1}
  observedGeneration: 1
  pools: [{region: us-west, desired: 3, ready: 3}]
  backlog: {open: 1204, nearestDeadline: "2026-12-04T09:00:00Z", projectedLate: 0}
"#;

/// A minimal one: everything that has a default is left out.
const SMALL_RIGHTS_WORKFLOW: &str = r#"
apiVersion: domicile.dev/v1alpha1
kind: RightsWorkflow
metadata: {name: consumers, namespace: records}
spec:
  ledgerRef: {name: consumers}
  residencyPolicyRef: {name: california-records}
  regimes: [us-ca-ccpa]
  identifiers: [customerId]
  targets:
  - name: accounts
    type: PostgreSQL
    postgresql: {storeRef: {name: consumers}, erase: [{table: customer, where: {id: customerId}}]}
  workers: {pools: [{region: us-west, max: 4}]}
"#;

fn parsed(yaml: &str) -> Value {
    serde_yaml::from_str(yaml).expect("the sample is YAML")
}

/// The schema of each kind, with what every object has besides, as the API server knows it; and its rules.
static SCHEMAS: LazyLock<BTreeMap<String, (Value, CompiledSchema)>> = LazyLock::new(|| {
    let text = json!({"type": "string"});
    let crds = super::crds().into_iter();
    crds.map(|crd| {
        let kind = crd["spec"]["names"]["kind"].as_str().expect("a kind");
        let mut schema = crd["spec"]["versions"][0]["schema"]["openAPIV3Schema"].clone();
        schema["properties"]["apiVersion"] = text.clone();
        schema["properties"]["kind"] = text.clone();
        schema["properties"]["metadata"] =
            json!({"type": "object", "properties": {"name": text, "namespace": text}});
        let rules = compile_schema(&schema);
        assert!(
            !rules.has_errors(),
            "{kind}: {:?}",
            rules.compilation_errors()
        );
        (kind.to_owned(), (schema, rules))
    })
    .collect()
});

/// Everything an API server would say against the object, the schema first, then the rules.
fn refusals(object: &Value, old: Option<&Value>) -> Vec<String> {
    let (schema, rules) = &SCHEMAS[object["kind"].as_str().expect("a kind")];
    let mut found = structural::errors(schema, object);
    if found.is_empty()
        && let Err(errors) = Validator::new().validate_compiled(rules, object, old)
    {
        found.extend(errors.iter().map(ToString::to_string));
    }
    found
}

/// Reads, writes and reads again; nothing that was given is lost, and what is written is accepted.
fn round_trip<K: Serialize + DeserializeOwned + PartialEq + std::fmt::Debug>(yaml: &str) {
    let given = parsed(yaml);
    assert_eq!(refusals(&given, None), Vec::<String>::new());
    let read: K = serde_json::from_value(given.clone()).expect("the type reads the sample");
    let written = serde_json::to_value(&read).expect("the type is written");
    assert_eq!(refusals(&written, None), Vec::<String>::new());
    assert_eq!(
        serde_json::from_value::<K>(written.clone()).expect("what is written is read"),
        read
    );
    if let Some(lost) = lost("", &given, &written) {
        panic!("{lost} is lost between reading and writing");
    }
    let text = serde_json::to_string(&read).expect("the type is written");
    assert!(
        !text.contains("\"status\":{") || text.contains("\"status\":{\"conditions\":"),
        "conditions come first in a status: {text}"
    );
}

/// The first thing in `given` that `written` doesn't have.
fn lost(path: &str, given: &Value, written: &Value) -> Option<String> {
    match (given, written) {
        (Value::Object(given), Value::Object(written)) => given.iter().find_map(|(key, inner)| {
            lost(
                &format!("{path}.{key}"),
                inner,
                written.get(key).unwrap_or(&Value::Null),
            )
        }),
        (Value::Array(given), Value::Array(written)) if given.len() == written.len() => given
            .iter()
            .zip(written)
            .enumerate()
            .find_map(|(i, (given, written))| lost(&format!("{path}[{i}]"), given, written)),
        _ if given == written => None,
        _ => Some(format!("{path} ({given})")),
    }
}

#[test]
fn samples_survive_a_round_trip() {
    round_trip::<Region>(REGION);
    round_trip::<ResidencyPolicy>(RESIDENCY_POLICY);
    round_trip::<PrivacyDataStore>(PRIVACY_DATA_STORE);
    round_trip::<RightsWorkflow>(RIGHTS_WORKFLOW);
    round_trip::<RightsWorkflow>(SMALL_RIGHTS_WORKFLOW);
}

#[test]
fn defaults_are_the_same_in_the_schema_and_in_the_type() {
    let spec = &SCHEMAS["RightsWorkflow"].0["properties"]["spec"]["properties"];
    let read: RightsWorkflow =
        serde_json::from_value(parsed(SMALL_RIGHTS_WORKFLOW)).expect("the type reads the sample");
    let written = serde_json::to_value(read).expect("the type is written");
    for field in ["promptnessSeconds", "gateway", "retention"] {
        assert_eq!(written["spec"][field], spec[field]["default"], "{field}");
    }
    assert_eq!(written["spec"]["workers"]["scaling"], "Enforce");
    assert_eq!(written["spec"]["workers"]["pools"][0]["min"], 1);
}

/// One change: the value at a pointer set, or removed if null.
fn changed(sample: &str, at: &str, value: &Value) -> Value {
    let mut object = parsed(sample);
    let (parent, key) = at.rsplit_once('/').expect("a pointer has a slash");
    match object.pointer_mut(parent).expect("the parent exists") {
        Value::Object(fields) if value.is_null() => {
            fields.remove(key);
        }
        Value::Object(fields) => {
            fields.insert(key.to_owned(), value.clone());
        }
        Value::Array(items) => items[key.parse::<usize>().expect("an index")] = value.clone(),
        _ => panic!("{at}: nothing can be put there"),
    }
    object
}

/// The sample with the change is refused for one reason, which says this.
fn refused(sample: &str, at: &str, value: &Value, says: &str) {
    let found = refusals(&changed(sample, at, value), None);
    assert!(
        found.len() == 1 && found[0].contains(says),
        "{at} = {value} should be refused with {says:?} alone: {found:#?}"
    );
}

/// The sample with the change is accepted.
fn accepted(sample: &str, at: &str, value: &Value) {
    let found = refusals(&changed(sample, at, value), None);
    assert!(found.is_empty(), "{at} = {value}: {found:#?}");
}

#[test]
fn a_target_has_exactly_the_block_of_its_type() {
    let w = RIGHTS_WORKFLOW;
    for (i, kind) in [
        "PostgreSQL",
        "Redis",
        "OpenSearch",
        "NATS",
        "Kafka",
        "S3",
        "Webhook",
        "MySQL",
        "MongoDB",
    ]
    .iter()
    .enumerate()
    {
        let target = parsed(w)["spec"]["targets"][i].clone();
        assert_eq!(target["type"], *kind);
        let block = kind.to_lowercase();
        let says =
            format!("is of type {kind}: give it the block {block} and the block of no other type");
        let mut without = target.clone();
        without.as_object_mut().expect("an object").remove(&block);
        without["region"] = json!("us-west");
        refused(w, &format!("/spec/targets/{i}"), &without, &says);

        let other = if i == 1 { 3 } else { 1 };
        let other = parsed(w)["spec"]["targets"][other].clone();
        let other_block = other["type"].as_str().expect("a type").to_lowercase();
        let mut with_both = target;
        with_both[&other_block] = other[&other_block].clone();
        refused(w, &format!("/spec/targets/{i}"), &with_both, &says);
    }
}

#[test]
fn a_target_says_where_it_is_unless_its_store_does() {
    let w = RIGHTS_WORKFLOW;
    refused(
        w,
        "/spec/targets/1/region",
        &Value::Null,
        "target sessions needs a region",
    );
    refused(
        w,
        "/spec/targets/0/region",
        &json!("us-west"),
        "target accounts takes its regions from its store",
    );
    refused(
        w,
        "/spec/targets/1/region",
        &json!("us-east"),
        "a target is in a region without workers",
    );
    let url = json!({"secretKeyRef": {"name": "accounts", "key": "url"}});
    refused(
        w,
        "/spec/targets/0/postgresql/urlFrom",
        &url,
        "say where the database is in one way",
    );
    let elsewhere = json!({"name": "accounts", "type": "PostgreSQL", "region": "us-west",
        "postgresql": {"urlFrom": url, "erase": [{"table": "customer", "where": {"id": "customerId"}}]}});
    accepted(w, "/spec/targets/0", &elsewhere);
}

#[test]
fn every_identifier_that_is_used_is_declared() {
    let w = RIGHTS_WORKFLOW;
    for (at, value, says) in [
        (
            "0/postgresql/erase/1/where/customer_id",
            "customer",
            "a where of a PostgreSQL or MySQL",
        ),
        (
            "7/mysql/erase/0/where/Id",
            "customer",
            "a where of a PostgreSQL or MySQL",
        ),
        (
            "2/opensearch/erase/0/where/id",
            "customer",
            "a where of an OpenSearch or MongoDB",
        ),
        (
            "8/mongodb/erase/0/where/id",
            "customer",
            "a where of an OpenSearch or MongoDB",
        ),
        ("1/redis/keys/1", "mail:{mail}", "a key of a Redis target"),
        (
            "1/redis/keys/1",
            "a:{email}:{email}:{email}:{mail}",
            "a key of a Redis target",
        ),
        (
            "1/redis/keys/1",
            "{mail}:{email}",
            "a key of a Redis target",
        ),
        (
            "3/nats/subjects/0",
            "orders.{customer}",
            "a subject of a NATS target",
        ),
        (
            "4/kafka/topics/0/key",
            "{customer}",
            "a key of a Kafka target",
        ),
        (
            "5/s3/prefixes/0",
            "uploads/{customer}/",
            "a prefix or object of an S3 target",
        ),
        (
            "5/s3/objects/0",
            "avatars/{customer}",
            "a prefix or object of an S3 target",
        ),
        (
            "6/webhook/identifiers/0",
            "phone",
            "a Webhook target is to be sent",
        ),
    ] {
        refused(w, &format!("/spec/targets/{at}"), &json!(value), says);
    }
    accepted(
        w,
        "/spec/targets/1/redis/keys/1",
        &json!("{email}:{customerId}:{email}:{customerId}"),
    );
}

#[test]
fn a_rule_that_would_match_more_than_one_person_is_refused() {
    let w = RIGHTS_WORKFLOW;
    for (at, value, says) in [
        ("0/postgresql/erase/0/where", json!({}), "too few"),
        (
            "0/postgresql/erase/0/where",
            json!({"id = id or id": "customerId"}),
            "a column's name",
        ),
        (
            "8/mongodb/erase/0/where",
            json!({"$where": "customerId"}),
            "a field's name",
        ),
        (
            "2/opensearch/erase/0/where",
            json!({"a b": "customerId"}),
            "a field's name",
        ),
        (
            "5/s3/objects/0",
            json!("avatars"),
            "an object has one to four placeholders",
        ),
        (
            "4/kafka/topics/0/key",
            json!("customer"),
            "a key has one to four placeholders",
        ),
        (
            "1/redis/keys/0",
            json!("session:*"),
            "a key has one to four placeholders",
        ),
        (
            "1/redis/keys/0",
            json!("session:{customerId}:{"),
            "a key has one to four placeholders",
        ),
        (
            "1/redis/keys/0",
            json!("session:{customerId}:?"),
            "a key has one to four placeholders",
        ),
        (
            "1/redis/keys/0",
            json!("session:{customerId}*"),
            "put a separator",
        ),
        ("1/redis/keys/0", json!("*{customerId}"), "put a separator"),
        (
            "1/redis/keys/0",
            json!("{customerId}{email}"),
            "put a separator",
        ),
        (
            "3/nats/subjects/0",
            json!("orders.>"),
            "a subject has one to four placeholders",
        ),
        (
            "3/nats/subjects/0",
            json!("{customerId}{email}"),
            "put a separator",
        ),
        (
            "4/kafka/topics/0/key",
            json!("{customerId}{email}"),
            "put a separator",
        ),
        (
            "5/s3/prefixes/0",
            json!("uploads/{customerId}"),
            "end a prefix with a separator",
        ),
        (
            "5/s3/prefixes/0",
            json!("uploads/"),
            "a prefix has one to four placeholders",
        ),
        (
            "5/s3/objects/0",
            json!("{customerId}{email}"),
            "put a separator",
        ),
    ] {
        refused(w, &format!("/spec/targets/{at}"), &value, says);
    }
}

#[test]
fn contradictions_in_a_workflow_are_refused() {
    let w = RIGHTS_WORKFLOW;
    for (at, value, says) in [
        ("/metadata/name", json!("9lives"), "a RightsWorkflow's name"),
        ("/spec/regimes", json!([]), "too few"),
        ("/spec/regimes", json!(["eu-gdrp"]), "is none of"),
        (
            "/spec/regimes",
            json!(["eu-gdpr", "eu-gdpr"]),
            "is there twice",
        ),
        (
            "/spec/workers/pools/0/min",
            json!(41),
            "in pool us-west, min is greater than max",
        ),
        (
            "/spec/gateway/replicas",
            json!({"min": 7}),
            "min is greater than max",
        ),
        (
            "/spec/retention/closedRequestsMonths",
            json!(12),
            "at least 24 months",
        ),
        ("/spec/targets/1/name", json!("accounts"), "is there twice"),
        (
            "/spec/targets/4/kafka/topics/0/key",
            Value::Null,
            "erased by Tombstone needs the key",
        ),
        (
            "/spec/targets/4/kafka/topics/1/key",
            json!("{customerId}"),
            "erased by Tombstone needs the key",
        ),
        (
            "/spec/targets/6/webhook/eraseURL",
            json!("http://newsletter.example"),
            "doesn't match",
        ),
        (
            "/spec/targets/6/webhook/eraseURL",
            json!("https://u:p@newsletter.example"),
            "doesn't match",
        ),
        (
            "/spec/targets/1/redis/urlFrom",
            json!("redis://u:p@sessions"),
            "is not of type",
        ),
    ] {
        refused(w, at, &value, says);
    }
    let mut nothing = parsed(w)["spec"]["targets"][5]["s3"].clone();
    nothing["prefixes"] = json!([]);
    nothing["objects"] = json!([]);
    refused(w, "/spec/targets/5/s3", &nothing, "say which objects");

    let mut pools = parsed(w)["spec"]["workers"]["pools"].clone();
    pools
        .as_array_mut()
        .expect("a list")
        .push(json!({"region": "us-west", "max": 1}));
    refused(w, "/spec/workers/pools", &pools, "is there twice");

    let mut european = changed(w, "/spec/regimes", &json!(["eu-gdpr"]));
    european["spec"]["retention"]["closedRequestsMonths"] = json!(12);
    assert_eq!(refusals(&european, None), Vec::<String>::new());
}

#[test]
fn contradictions_in_the_other_kinds_are_refused() {
    for (sample, at, value, says) in [
        (
            REGION,
            "/metadata/name",
            json!("us.west"),
            "a Region's name",
        ),
        (
            REGION,
            "/spec/nodes",
            json!({}),
            "give at least one witness",
        ),
        (
            REGION,
            "/spec/nodes",
            json!({"labels": {}}),
            "give at least one witness",
        ),
        (
            RESIDENCY_POLICY,
            "/metadata/name",
            json!("a.b"),
            "a ResidencyPolicy's name",
        ),
        (
            RESIDENCY_POLICY,
            "/spec/citation",
            Value::Null,
            "needs a citation",
        ),
        (
            RESIDENCY_POLICY,
            "/spec/permits/0",
            json!({"data": "Primary"}),
            "give at least one region or jurisdiction",
        ),
        (
            RESIDENCY_POLICY,
            "/spec/permits/0/data",
            json!("Standby"),
            "is there twice",
        ),
        (
            PRIVACY_DATA_STORE,
            "/metadata/name",
            json!("Consumers"),
            "a PrivacyDataStore's name",
        ),
        (
            PRIVACY_DATA_STORE,
            "/spec/placement/0/instances",
            json!(9),
            "at most 9 instances",
        ),
        (
            PRIVACY_DATA_STORE,
            "/spec/placement",
            json!([{"region": "a", "instances": 1}]),
            "needs at least 2 instances",
        ),
        (
            PRIVACY_DATA_STORE,
            "/spec/database/owner",
            json!("postgres"),
            "choose another",
        ),
        (
            PRIVACY_DATA_STORE,
            "/spec/database/name",
            json!("domicile"),
            "choose another",
        ),
        (
            PRIVACY_DATA_STORE,
            "/spec/postgres/parameters",
            json!({"fsync": "off"}),
            "Domicile's own",
        ),
        (
            PRIVACY_DATA_STORE,
            "/spec/postgres/parameters",
            json!({"Fsync": "off"}),
            "a parameter's name",
        ),
        (
            PRIVACY_DATA_STORE,
            "/spec/postgres/parameters",
            json!({"work_mem": "1\nfsync=off"}),
            "is one line",
        ),
    ] {
        refused(sample, at, &value, says);
    }
}

#[test]
fn what_can_not_change_is_kept() {
    for (sample, at, value, says) in [
        (
            RIGHTS_WORKFLOW,
            "/spec/ledgerRef/name",
            json!("other"),
            "ledgerRef can't be changed",
        ),
        (
            PRIVACY_DATA_STORE,
            "/spec/database/name",
            json!("other"),
            "can't be changed",
        ),
        (PRIVACY_DATA_STORE, "/spec/database", Value::Null, ""),
        (
            PRIVACY_DATA_STORE,
            "/spec/storage/size",
            json!("20Gi"),
            "storage can't be changed",
        ),
    ] {
        let (old, new) = (parsed(sample), changed(sample, at, &value));
        let found = refusals(&new, Some(&old));
        if says.is_empty() {
            // Absent is the default, which is what the sample has.
            assert_eq!(found, Vec::<String>::new());
        } else {
            assert!(
                found.len() == 1 && found[0].contains(says),
                "{at} = {value}: {found:#?}"
            );
        }
        assert_eq!(refusals(&old, Some(&old)), Vec::<String>::new());
    }
}
