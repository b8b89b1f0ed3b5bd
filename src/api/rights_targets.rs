//! What a `RightsWorkflow` erases from: one block per kind of system.
//!
//! Owns the types of targets. Rules that could match more than one person's data are refused here, in CEL; the
//! connectors that act on these types are in `rights::connectors`, and a type that has none is refused by the
//! workflow's controller.

use kube::KubeSchema;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

use super::region::NameRef;
use super::schema::where_schema;

/// One system that holds personal data, and how a person is erased from it.
#[derive(KubeSchema, Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
#[x_kube(
    validation = Rule::new("has(self.postgresql) == (self.type == 'PostgreSQL') && has(self.redis) == (self.type == 'Redis') && has(self.opensearch) == (self.type == 'OpenSearch') && has(self.nats) == (self.type == 'NATS') && has(self.kafka) == (self.type == 'Kafka') && has(self.s3) == (self.type == 'S3') && has(self.webhook) == (self.type == 'Webhook') && has(self.mysql) == (self.type == 'MySQL') && has(self.mongodb) == (self.type == 'MongoDB')")
        .message(Message::Expression("'target ' + self.name + ' is of type ' + self.type + ': give it the block ' + self.type.lowerAscii() + ' and the block of no other type'".into())),
    validation = Rule::new("has(self.region) != (has(self.postgresql) && has(self.postgresql.storeRef))")
        .message(Message::Expression("'target ' + self.name + (has(self.region) ? ' takes its regions from its store: remove region, or use urlFrom instead of storeRef' : ' needs a region, so that only workers of that region touch it: name the Region that the system is in')".into()))
)]
pub struct Target {
    /// Name of the target in proofs, metrics and messages.
    #[schemars(
        length(min = 1, max = 63),
        regex(pattern = r"^[a-z0-9]([-a-z0-9]*[a-z0-9])?$")
    )]
    pub name: String,

    /// Which kind of system it is. Give the block of that type, and no other.
    #[serde(rename = "type")]
    pub kind: TargetType,

    /// The Region that the system is in. Needed wherever it doesn't follow from a storeRef.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(
        length(min = 1, max = 63),
        regex(pattern = r"^[a-z0-9]([-a-z0-9]*[a-z0-9])?$")
    )]
    pub region: Option<String>,

    /// How many seconds after the erasure the target is read once more, to catch what a late writer put back
    /// (a cache filled from a read that began before the erasure). Absent or 0: it is read back once only.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 0, max = 86400))]
    pub settle_seconds: Option<i32>,

    /// How many days erased data may live on in backups and snapshots that the target makes of itself. The
    /// proof then says until when bytes may remain, instead of saying that they are gone.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1, max = 3660))]
    pub residue_days: Option<i32>,

    /// How to erase from PostgreSQL. For type PostgreSQL.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub postgresql: Option<PostgreSqlTarget>,

    /// How to erase from Redis or Valkey. For type Redis.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub redis: Option<RedisTarget>,

    /// How to erase from OpenSearch or Elasticsearch. For type OpenSearch.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub opensearch: Option<OpenSearchTarget>,

    /// How to erase from a NATS JetStream stream. For type NATS.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub nats: Option<NatsTarget>,

    /// How to erase from Kafka topics. For type Kafka.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub kafka: Option<KafkaTarget>,

    /// How to erase from an S3-compatible object store. For type S3.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub s3: Option<S3Target>,

    /// How to have another service erase. For type Webhook.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub webhook: Option<WebhookTarget>,

    /// How to erase from MySQL or MariaDB. For type MySQL.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mysql: Option<MySqlTarget>,

    /// How to erase from MongoDB. For type MongoDB.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mongodb: Option<MongoDbTarget>,
}

/// Which kind of system a target is.
#[derive(JsonSchema, Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum TargetType {
    /// Rows of PostgreSQL tables.
    #[serde(rename = "PostgreSQL")]
    PostgreSql,
    /// Keys of Redis or Valkey.
    Redis,
    /// Documents of OpenSearch or Elasticsearch indices.
    OpenSearch,
    /// Messages of a NATS JetStream stream.
    #[serde(rename = "NATS")]
    Nats,
    /// Records of Kafka topics.
    Kafka,
    /// Objects of an S3-compatible store, every version of them.
    S3,
    /// Another service, asked over HTTPS.
    Webhook,
    /// Rows of MySQL or MariaDB tables.
    #[serde(rename = "MySQL")]
    MySql,
    /// Documents of MongoDB collections.
    #[serde(rename = "MongoDB")]
    MongoDb,
}

/// Where a secret value comes from. Credentials are never written into the workflow itself.
#[derive(KubeSchema, Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct SecretSource {
    /// A key of a Secret in the workflow's namespace.
    pub secret_key_ref: SecretKeyRef,
}

/// A key of a Secret in the same namespace.
#[derive(KubeSchema, Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct SecretKeyRef {
    /// Name of the Secret.
    #[schemars(
        length(min = 1, max = 253),
        regex(pattern = r"^[a-z0-9]([-a-z0-9.]*[a-z0-9])?$")
    )]
    pub name: String,

    /// Key within the Secret's data.
    #[schemars(length(min = 1, max = 253), regex(pattern = r"^[-._a-zA-Z0-9]+$"))]
    pub key: String,
}

/// Which rows of a table are a person's.
#[derive(KubeSchema, Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct TableErasure {
    /// Name of the table, with its schema or database if that isn't the default: orders, or shop.orders. It is
    /// taken literally, upper and lower case included.
    #[schemars(
        length(min = 1, max = 127),
        regex(pattern = r"^[A-Za-z_][A-Za-z0-9_$]*([.][A-Za-z_][A-Za-z0-9_$]*)?$")
    )]
    pub table: String,

    /// Column to identifier: the rows in which every column given equals the person's identifier. Give at least
    /// one, or every row would match.
    #[serde(rename = "where")]
    #[schemars(schema_with = "where_schema")]
    #[x_kube(validation = Rule::new("self.all(c, c.matches('^[A-Za-z_][A-Za-z0-9_$]{0,62}$'))").message("a column's name has letters, digits, '_' and '$', and at most 63 characters"))]
    pub columns: BTreeMap<String, String>,

    /// Columns to set to NULL instead of deleting the rows, where the rows must be kept, such as orders for the
    /// tax office. Absent: the rows are deleted.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(
        length(max = 64),
        inner(
            length(min = 1, max = 63),
            regex(pattern = r"^[A-Za-z_][A-Za-z0-9_$]*$")
        )
    )]
    #[x_kube(merge_strategy = ListMerge::Set)]
    pub clear_columns: Vec<String>,
}

/// Erasure from PostgreSQL: rows by key, tables in the order of their foreign keys, in one transaction; done when
/// the rows are absent on the primary and on the standbys.
#[derive(KubeSchema, Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
#[x_kube(validation = Rule::new("has(self.storeRef) != has(self.urlFrom)").message("say where the database is in one way: storeRef for a PrivacyDataStore of this namespace, or urlFrom for any other PostgreSQL"))]
pub struct PostgreSqlTarget {
    /// A PrivacyDataStore in the same namespace. The target's regions follow from it, and credentials are
    /// Domicile's own.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub store_ref: Option<NameRef>,

    /// Connection URL (postgresql://USER:PASSWORD@HOST/DATABASE) of a PostgreSQL that isn't a PrivacyDataStore.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub url_from: Option<SecretSource>,

    /// What is a person's. Where tables refer to each other, name each that holds personal data.
    #[schemars(length(min = 1, max = 64))]
    #[x_kube(merge_strategy = ListMerge::Atomic)]
    pub erase: Vec<TableErasure>,
}

/// Erasure from MySQL or MariaDB: rows by key, tables in the order of their foreign keys, in one transaction.
#[derive(KubeSchema, Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct MySqlTarget {
    /// Connection URL: mysql://USER:PASSWORD@HOST/DATABASE.
    pub url_from: SecretSource,

    /// What is a person's. Where tables refer to each other, name each that holds personal data.
    #[schemars(length(min = 1, max = 64))]
    #[x_kube(merge_strategy = ListMerge::Atomic)]
    pub erase: Vec<TableErasure>,
}

/// Erasure from Redis or Valkey: keys are found by SCAN and removed by UNLINK, on a single primary. A Redis Cluster is refused.
#[derive(KubeSchema, Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct RedisTarget {
    /// Connection URL: redis://USER:PASSWORD@HOST, or rediss:// for TLS.
    pub url_from: SecretSource,

    /// Keys with a placeholder, such as "profile:{customerId}", and '*' for any characters, such as
    /// "session:{customerId}:*".
    #[schemars(length(min = 1, max = 32), inner(length(min = 3, max = 256)))]
    #[x_kube(
        merge_strategy = ListMerge::Set,
        validation = Rule::new(r"self.all(k, k.matches(r'^[^{}?\[\]\\]*([{][a-z][A-Za-z0-9]*[}][^{}?\[\]\\]*){1,4}$'))").message("a key has one to four placeholders such as {customerId}, since it would match everybody without, and none of '?', '[', ']' and '\\' nor other braces"),
        validation = Rule::new("self.all(k, !k.contains('*{') && !k.contains('}*') && !k.contains('}{'))").message("put a separator between a placeholder and '*' or another placeholder: \"session:{customerId}*\" for 12 would also erase the sessions of 123, \"session:{customerId}:*\" doesn't")
    )]
    pub keys: Vec<String>,
}

/// Which documents of an index are a person's.
#[derive(KubeSchema, Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct IndexErasure {
    /// Name of the index, alias or data stream, or a pattern with '*' such as orders-*.
    #[schemars(
        length(min = 1, max = 255),
        regex(pattern = r"^[a-z0-9.*][-a-z0-9._*]*$")
    )]
    pub index: String,

    /// Field to identifier: the documents in which every field given is exactly the person's identifier. The
    /// fields must be of type keyword or a number. Give at least one, or every document would match.
    #[serde(rename = "where")]
    #[schemars(schema_with = "where_schema")]
    #[x_kube(validation = Rule::new("self.all(c, c.matches('^[A-Za-z_@][-A-Za-z0-9_.@]{0,254}$'))").message("a field's name has letters, digits, '_', '-', '@' and '.', and at most 255 characters"))]
    pub fields: BTreeMap<String, String>,
}

/// Erasure from OpenSearch or Elasticsearch: delete-by-query without conflicts, refreshed, and counted to none.
#[derive(KubeSchema, Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct OpenSearchTarget {
    /// Connection URL: https://USER:PASSWORD@HOST:9200.
    pub url_from: SecretSource,

    /// Certificate authority (PEM) of the server. Absent: the public ones.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ca_from: Option<SecretSource>,

    /// What is a person's.
    #[schemars(length(min = 1, max = 64))]
    #[x_kube(merge_strategy = ListMerge::Atomic)]
    pub erase: Vec<IndexErasure>,
}

/// Which documents of a collection are a person's.
#[derive(KubeSchema, Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct CollectionErasure {
    /// Name of the collection.
    #[schemars(
        length(min = 1, max = 255),
        regex(pattern = r"^[A-Za-z_][-A-Za-z0-9_.]*$")
    )]
    pub collection: String,

    /// Field to identifier: the documents in which every field given equals the person's identifier. Give at
    /// least one, or every document would match.
    #[serde(rename = "where")]
    #[schemars(schema_with = "where_schema")]
    #[x_kube(validation = Rule::new("self.all(c, c.matches('^[A-Za-z_][-A-Za-z0-9_.]{0,254}$'))").message("a field's name has letters, digits, '_', '-' and '.', and at most 255 characters"))]
    pub fields: BTreeMap<String, String>,

    /// Fields to remove instead of deleting the documents, where the documents must be kept. Absent: the
    /// documents are deleted.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(
        length(max = 64),
        inner(
            length(min = 1, max = 255),
            regex(pattern = r"^[A-Za-z_][-A-Za-z0-9_.]*$")
        )
    )]
    #[x_kube(merge_strategy = ListMerge::Set)]
    pub clear_fields: Vec<String>,
}

/// Erasure from MongoDB: documents by key, with majority write concern.
#[derive(KubeSchema, Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct MongoDbTarget {
    /// Connection URL: mongodb://USER:PASSWORD@HOST/DATABASE.
    pub url_from: SecretSource,

    /// What is a person's.
    #[schemars(length(min = 1, max = 64))]
    #[x_kube(merge_strategy = ListMerge::Atomic)]
    pub erase: Vec<CollectionErasure>,
}

/// Erasure from a NATS JetStream stream: subjects are purged, and no message is left on them.
#[derive(KubeSchema, Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct NatsTarget {
    /// Connection URL: nats://USER:PASSWORD@HOST, or tls:// for TLS.
    pub url_from: SecretSource,

    /// Name of the stream.
    #[schemars(length(min = 1, max = 255), regex(pattern = r"^[-A-Za-z0-9_]+$"))]
    pub stream: String,

    /// Subjects with a placeholder, such as "orders.{customerId}.>"; '*' stands for one token, '>' for the rest.
    #[schemars(length(min = 1, max = 32), inner(length(min = 3, max = 256)))]
    #[x_kube(
        merge_strategy = ListMerge::Set,
        validation = Rule::new(r"self.all(k, k.matches(r'^[^{}\s]*([{][a-z][A-Za-z0-9]*[}][^{}\s]*){1,4}$'))").message("a subject has one to four placeholders such as {customerId}, since it would match everybody without, and no blanks or other braces"),
        validation = Rule::new("self.all(k, !k.contains('}{'))").message("put a separator between two placeholders, or two people may share a subject")
    )]
    pub subjects: Vec<String>,
}

/// Erasure from Kafka topics: by a tombstone on a compacted topic, or by waiting for a topic's retention.
#[derive(KubeSchema, Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct KafkaTarget {
    /// Brokers to begin with, as HOST:PORT.
    #[schemars(
        length(min = 1, max = 16),
        inner(
            length(min = 3, max = 259),
            regex(pattern = r"^[A-Za-z0-9]([-A-Za-z0-9.]*[A-Za-z0-9])?:[0-9]{1,5}$")
        )
    )]
    #[x_kube(merge_strategy = ListMerge::Set)]
    pub brokers: Vec<String>,

    /// Certificate authority (PEM) of the brokers. Absent: TLS isn't used.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ca_from: Option<SecretSource>,

    /// How to log in. Absent: without.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub sasl: Option<Sasl>,

    /// Which records are a person's.
    #[schemars(length(min = 1, max = 32))]
    #[x_kube(merge_strategy = ListMerge::Map(vec!["name".into()]))]
    pub topics: Vec<Topic>,
}

/// How to log in to Kafka.
#[derive(KubeSchema, Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Sasl {
    /// The mechanism that the brokers ask for.
    pub mechanism: SaslMechanism,

    /// The user's name.
    pub username_from: SecretSource,

    /// The user's password.
    pub password_from: SecretSource,
}

/// A SASL mechanism.
#[derive(JsonSchema, Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum SaslMechanism {
    /// SCRAM-SHA-512.
    ScramSha512,
    /// SCRAM-SHA-256.
    ScramSha256,
    /// PLAIN.
    Plain,
}

/// Which records of a topic are a person's.
#[derive(KubeSchema, Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
#[x_kube(validation = Rule::new("has(self.key) == (self.erasedBy == 'Tombstone')").message("a topic erased by Tombstone needs the key of the person's records, and one erased by Retention has none"))]
pub struct Topic {
    /// Name of the topic.
    #[schemars(length(min = 1, max = 249), regex(pattern = r"^[-A-Za-z0-9._]+$"))]
    pub name: String,

    /// Tombstone: a record without value for the key, after which the topic's cleaner removes the older ones;
    /// the topic must be compacted. Retention: nothing is sent; the bytes leave with the topic's retention.
    pub erased_by: TopicErasure,

    /// Key of the person's records, with a placeholder, such as "customer-{customerId}". For Tombstone.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 3, max = 256))]
    #[x_kube(
        validation = Rule::new("self.matches('^[^{}]*([{][a-z][A-Za-z0-9]*[}][^{}]*){1,4}$')").message("a key has one to four placeholders such as {customerId}, since it would be everybody's without, and no other braces"),
        validation = Rule::new("!self.contains('}{')").message("put a separator between two placeholders, or two people may share a key")
    )]
    pub key: Option<String>,
}

/// How records leave a topic.
#[derive(JsonSchema, Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum TopicErasure {
    /// By a tombstone on a compacted topic.
    Tombstone,
    /// By the topic's own retention.
    Retention,
}

/// Erasure from an S3-compatible store: every version and delete marker; a lock on an object is honoured, and
/// the proof says until when it holds.
#[derive(KubeSchema, Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
#[x_kube(validation = Rule::new("(has(self.prefixes) && size(self.prefixes) > 0) || (has(self.objects) && size(self.objects) > 0)").message("say which objects are a person's: give prefixes, objects, or both"))]
pub struct S3Target {
    /// Name of the bucket.
    #[schemars(
        length(min = 3, max = 63),
        regex(pattern = r"^[a-z0-9][-a-z0-9.]*[a-z0-9]$")
    )]
    pub bucket: String,

    /// URL of the store. Absent: Amazon S3 in signingRegion.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 512), regex(pattern = r"^https?://[^\s/@?#]+/?$"))]
    pub endpoint: Option<String>,

    /// What the store itself calls its region, for signatures.
    #[serde(default = "default_signing_region")]
    #[schemars(length(min = 1, max = 63), regex(pattern = r"^[-a-z0-9]+$"))]
    pub signing_region: String,

    /// The access key's id.
    pub access_key_id_from: SecretSource,

    /// The access key's secret.
    pub secret_access_key_from: SecretSource,

    /// Certificate authority (PEM) of the store. Absent: the public ones.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ca_from: Option<SecretSource>,

    /// Prefixes of the person's objects, with a placeholder and a separator at the end: "uploads/{customerId}/".
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 32), inner(length(min = 3, max = 256)))]
    #[x_kube(
        merge_strategy = ListMerge::Set,
        validation = Rule::new("self.all(k, k.matches('^[^{}]*([{][a-z][A-Za-z0-9]*[}][^{}]*){1,4}$'))").message("a prefix has one to four placeholders such as {customerId}, since it would be everybody's without, and no other braces"),
        validation = Rule::new("self.all(k, !k.endsWith('}') && !k.contains('}{'))").message("end a prefix with a separator, and put one between two placeholders: \"uploads/{customerId}\" for 12 would also erase the uploads of 123, \"uploads/{customerId}/\" doesn't")
    )]
    pub prefixes: Vec<String>,

    /// Full names of the person's objects, with a placeholder: "avatars/{customerId}.png".
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 32), inner(length(min = 3, max = 256)))]
    #[x_kube(
        merge_strategy = ListMerge::Set,
        validation = Rule::new("self.all(k, k.matches('^[^{}]*([{][a-z][A-Za-z0-9]*[}][^{}]*){1,4}$'))").message("an object has one to four placeholders such as {customerId}, since it would be everybody's without, and no other braces"),
        validation = Rule::new("self.all(k, !k.contains('}{'))").message("put a separator between two placeholders, or two people may share an object")
    )]
    pub objects: Vec<String>,
}

fn default_signing_region() -> String {
    "us-east-1".to_owned()
}

/// Erasure by another service: asked by a signed request, then asked again whether the person is gone.
#[derive(KubeSchema, Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct WebhookTarget {
    /// URL that is asked by POST to erase. Identifiers are sent in the body, never in the URL.
    #[serde(rename = "eraseURL")]
    #[schemars(
        length(max = 1024),
        regex(pattern = r"^https://[^\s/@?#]+(/[^\s?#]*)?$")
    )]
    pub erase_url: String,

    /// URL that is asked by POST whether the person is gone. A request isn't finished before it says so.
    #[serde(rename = "probeURL")]
    #[schemars(
        length(max = 1024),
        regex(pattern = r"^https://[^\s/@?#]+(/[^\s?#]*)?$")
    )]
    pub probe_url: String,

    /// Key by which requests are signed (HMAC-SHA-256), so that the service can tell who asks.
    pub signing_key_from: SecretSource,

    /// Certificate authority (PEM) of the service. Absent: the public ones.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ca_from: Option<SecretSource>,

    /// Which identifiers are sent: those that the service needs, and no others.
    #[schemars(
        length(min = 1, max = 16),
        inner(length(min = 1, max = 32), regex(pattern = r"^[a-z][A-Za-z0-9]*$"))
    )]
    #[x_kube(merge_strategy = ListMerge::Set)]
    pub identifiers: Vec<String>,

    /// Seconds after which a call without an answer counts as failed, and is tried again.
    #[serde(default = "default_webhook_timeout")]
    #[schemars(range(min = 1, max = 300))]
    pub timeout_seconds: i32,
}

fn default_webhook_timeout() -> i32 {
    10
}
