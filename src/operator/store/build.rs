//! The objects of a store, as they should be.
//!
//! Owns their content. Pure and infallible: what reaches here has been validated, and the same input gives
//! the same bytes.
//! Never puts a secret or personal data into an object's name, label or annotation.

use kube::ResourceExt;
use kube::api::DynamicObject;
use serde_json::{Value, json};
use std::collections::BTreeMap;

use super::kinds::ChildKind;
use crate::api::names::{self, env, paths};
use crate::api::{GROUP, PrivacyDataStore, VERSION, labels};
use crate::operator::objects::{container_security, finish, resources};
use crate::placement::Placed;

pub use crate::operator::objects::{HASH, hash};

/// Where the init container sees the folder that the main container sees as [`paths::BIN`].
const INJECT: &str = "/inject";

/// What building needs beside the store.
#[derive(Clone, Debug)]
pub struct Settings {
    /// The operator's own image: the init container takes the instance manager from it.
    pub image: String,
    /// Whether the cluster's Services have IPv6 addresses.
    pub ipv6: bool,
}

/// Labels of every object of a store.
#[must_use]
pub fn store_labels(store: &PrivacyDataStore) -> BTreeMap<String, String> {
    BTreeMap::from([
        (
            labels::MANAGED_BY.to_owned(),
            labels::MANAGED_BY_VALUE.to_owned(),
        ),
        (labels::STORE.to_owned(), store.name_any()),
    ])
}

/// The owner reference by which the API server removes a store's objects with it.
#[must_use]
pub fn owner(store: &PrivacyDataStore) -> Value {
    json!({
        "apiVersion": format!("{GROUP}/{VERSION}"), "kind": "PrivacyDataStore",
        "name": store.name_any(), "uid": store.uid().unwrap_or_default(),
        "controller": true, "blockOwnerDeletion": true,
    })
}

/// Metadata of an owned object.
#[must_use]
pub fn metadata(store: &PrivacyDataStore, name: &str, extra: &[(&str, &str)]) -> Value {
    let mut all = store_labels(store);
    all.extend(
        extra
            .iter()
            .map(|(k, v)| ((*k).to_owned(), (*v).to_owned())),
    );
    json!({
        "name": name, "namespace": store.namespace().unwrap_or_default(),
        "labels": all, "ownerReferences": [owner(store)],
    })
}

/// Every child but pods, volume claims and Secrets, for the instances `placed`.
#[must_use]
pub fn children(
    store: &PrivacyDataStore,
    placed: &[Placed],
    settings: &Settings,
) -> Vec<(ChildKind, DynamicObject)> {
    let name = store.name_any();
    let total: i32 = store.spec.placement.iter().map(|p| p.instances).sum();
    let account = names::instance_account(&name);
    let selector = json!({ labels::STORE: name, labels::MANAGED_BY: labels::MANAGED_BY_VALUE });
    let postgres = json!({ "name": "postgres", "port": names::POSTGRES_PORT, "targetPort": names::POSTGRES_PORT, "protocol": "TCP" });
    let mut all = vec![
        (
            ChildKind::ServiceAccount,
            json!({ "metadata": metadata(store, &account, &[]), "automountServiceAccountToken": false }),
        ),
        (
            ChildKind::Role,
            json!({
                "metadata": metadata(store, &account, &[]),
                "rules": [
                    { "apiGroups": [GROUP], "resources": ["privacydatastores"], "resourceNames": [name], "verbs": ["get", "list", "watch"] },
                    { "apiGroups": [GROUP], "resources": ["privacydatastores/status"], "resourceNames": [name], "verbs": ["patch"] },
                    // Also with an odd number: the witness stays until the instances have let go of it.
                    { "apiGroups": [""], "resources": ["configmaps"], "resourceNames": [names::witness(&name)], "verbs": ["get", "update"] },
                    { "apiGroups": ["discovery.k8s.io"], "resources": ["endpointslices"], "resourceNames": [names::rw(&name), names::ro(&name)], "verbs": ["get", "patch", "update"] },
                ],
            }),
        ),
        (
            ChildKind::RoleBinding,
            json!({
                "metadata": metadata(store, &account, &[]),
                "roleRef": { "apiGroup": "rbac.authorization.k8s.io", "kind": "Role", "name": account },
                "subjects": [{ "kind": "ServiceAccount", "name": account, "namespace": store.namespace().unwrap_or_default() }],
            }),
        ),
        (
            ChildKind::PodDisruptionBudget,
            json!({
                "metadata": metadata(store, &name, &[]),
                // Not maxUnavailable: that asks the pods' controller for its scale, which a store has none of,
                // and then no eviction is ever allowed.
                "spec": { "minAvailable": (total - 1).max(0), "selector": { "matchLabels": selector } },
            }),
        ),
    ];
    if !placed.is_empty() && placed.len().is_multiple_of(2) {
        // No data here: it's made empty, and what it holds is the instances' business. Once made it stays, also
        // when the number becomes odd: one that is still a voter must not vanish, and one that isn't is harmless.
        all.push((
            ChildKind::ConfigMap,
            json!({ "metadata": metadata(store, &names::witness(&name), &[]) }),
        ));
    }
    for service in [names::rw(&name), names::ro(&name)] {
        all.push((
            ChildKind::Service,
            json!({
                // No selector: the primary itself writes where these lead, so that a failover needs no operator.
                "metadata": metadata(store, &service, &[]),
                "spec": { "type": "ClusterIP", "ports": [postgres] },
            }),
        ));
        all.push((
            ChildKind::EndpointSlice,
            json!({
                "metadata": metadata(store, &service, &[
                    ("kubernetes.io/service-name", &service),
                    ("endpointslice.kubernetes.io/managed-by", labels::MANAGED_BY_VALUE),
                ]),
                "addressType": if settings.ipv6 { "IPv6" } else { "IPv4" },
                "ports": [{ "name": "postgres", "port": names::POSTGRES_PORT, "protocol": "TCP" }],
                "endpoints": [],
            }),
        ));
    }
    for place in placed {
        let instance = names::instance(&name, place.slot);
        let mut selector = selector.clone();
        selector[labels::INSTANCE] = json!(instance);
        all.push((ChildKind::Service, json!({
            "metadata": metadata(store, &instance, &[(labels::INSTANCE, &instance)]),
            "spec": {
                // Also while not ready: a standby must be reachable to become ready, and a client that tries
                // every host must be refused at once rather than wait.
                "type": "ClusterIP", "publishNotReadyAddresses": true, "selector": selector,
                "ports": [postgres, { "name": names::HTTP_PORT_NAME, "port": names::HTTP_PORT, "targetPort": names::HTTP_PORT, "protocol": "TCP" }],
            },
        })));
    }
    all.into_iter()
        .map(|(kind, value)| (kind, finish(&kind.resource(), value)))
        .collect()
}

/// An instance's volume claim. No owner: it outlives the store unless the deletion policy says otherwise,
/// and then it is deleted by name and uid.
#[must_use]
pub fn claim(store: &PrivacyDataStore, place: &Placed, primary_term: Option<i64>) -> Value {
    let instance = names::instance(&store.name_any(), place.slot);
    let mut metadata = metadata(
        store,
        &instance,
        &[
            (labels::INSTANCE, &instance),
            (labels::REGION, &place.region),
            (labels::ZONE, &place.zone),
        ],
    );
    if let Value::Object(map) = &mut metadata {
        map.remove("ownerReferences");
    }
    if let Some(term) = primary_term {
        metadata["annotations"] = json!({ labels::PRIMARY_TERM: term.to_string() });
    }
    let mut spec = json!({
        "accessModes": ["ReadWriteOnce"],
        "resources": { "requests": { "storage": store.spec.storage.size } },
    });
    if let Some(class) = &store.spec.storage.storage_class_name {
        spec["storageClassName"] = json!(class);
    }
    json!({ "apiVersion": "v1", "kind": "PersistentVolumeClaim", "metadata": metadata, "spec": spec })
}

/// Hash of everything that makes a running pod out of date when it changes.
#[must_use]
pub fn pod_hash(store: &PrivacyDataStore, place: &Placed, settings: &Settings) -> String {
    hash(&pod_spec(store, place, settings, false, &BTreeMap::new()))
}

/// Hash of the PostgreSQL parameters. Not part of [`pod_hash`]: most take effect without a restart, and the
/// instance says which don't.
#[must_use]
pub fn parameters_hash(store: &PrivacyDataStore) -> String {
    hash(&json!(store.spec.postgres.parameters))
}

/// An instance's pod. `bound`: its volume exists, so the scheduler has no choice left. `witnesses`: labels
/// that its node must carry beside the stamp; not part of the hash, so that an edited Region restarts nobody.
#[must_use]
pub fn pod(
    store: &PrivacyDataStore,
    place: &Placed,
    settings: &Settings,
    bound: bool,
    witnesses: &BTreeMap<String, String>,
) -> Value {
    let instance = names::instance(&store.name_any(), place.slot);
    let mut metadata = metadata(
        store,
        &instance,
        &[
            (labels::INSTANCE, &instance),
            (labels::REGION, &place.region),
        ],
    );
    metadata["annotations"] = json!({
        labels::TEMPLATE_HASH: pod_hash(store, place, settings),
        labels::PARAMETERS_HASH: parameters_hash(store),
    });
    json!({
        "apiVersion": "v1", "kind": "Pod", "metadata": metadata,
        "spec": pod_spec(store, place, settings, bound, witnesses),
    })
}

fn pod_spec(
    store: &PrivacyDataStore,
    place: &Placed,
    settings: &Settings,
    bound: bool,
    witnesses: &BTreeMap<String, String>,
) -> Value {
    let name = store.name_any();
    let instance = names::instance(&name, place.slot);
    let mut spec = json!({
        "hostname": instance,
        "serviceAccountName": names::instance_account(&name),
        "automountServiceAccountToken": true,
        "enableServiceLinks": false,
        "restartPolicy": "Always",
        // A primary hands over first (5 s at most), then PostgreSQL stops by itself (45 s), then at once (10 s).
        "terminationGracePeriodSeconds": 75,
        "securityContext": {
            "runAsNonRoot": true, "runAsUser": names::POD_UID, "runAsGroup": names::POD_UID,
            "fsGroup": names::POD_UID, "fsGroupChangePolicy": "OnRootMismatch",
            "seccompProfile": { "type": "RuntimeDefault" },
        },
        "affinity": affinity(store, place, witnesses),
        "topologySpreadConstraints": [{
            "topologyKey": labels::NODE_HOSTNAME, "maxSkew": 1,
            // Strict only while the choice is open: a volume that exists decides the node, and a strict rule
            // could then keep its pod from ever starting again after another node has joined.
            "whenUnsatisfiable": if bound { "ScheduleAnyway" } else { "DoNotSchedule" },
            "nodeAffinityPolicy": "Honor", "nodeTaintsPolicy": "Honor",
            "labelSelector": { "matchLabels": { labels::STORE: name, labels::REGION: place.region } },
        }],
        "initContainers": [{
            "name": "install", "image": settings.image, "imagePullPolicy": "IfNotPresent",
            "command": ["/domicile", "install", INJECT],
            "securityContext": container_security(),
            "resources": { "requests": { "cpu": "10m", "memory": "16Mi" } },
            "volumeMounts": [{ "name": "bin", "mountPath": INJECT }],
        }],
        "containers": [container(store, &instance)],
        "volumes": [
            { "name": "data", "persistentVolumeClaim": { "claimName": instance } },
            { "name": "bin", "emptyDir": { "sizeLimit": "128Mi" } },
            { "name": "run", "emptyDir": { "medium": "Memory", "sizeLimit": "16Mi" } },
            { "name": "tmp", "emptyDir": { "medium": "Memory", "sizeLimit": "64Mi" } },
            { "name": "shm", "emptyDir": { "medium": "Memory" } },
            { "name": "tls", "secret": { "secretName": names::tls_secret(&instance), "defaultMode": 0o440 } },
            { "name": "app", "secret": {
                "secretName": names::app_secret(&name), "defaultMode": 0o440,
                "items": [{ "key": "username", "path": "username" }, { "key": "password", "path": "password" }],
            } },
        ],
    });
    if !store.spec.postgres.image_pull_secrets.is_empty() {
        spec["imagePullSecrets"] = json!(store.spec.postgres.image_pull_secrets);
    }
    spec
}

/// The region is required, on the label that only the operator sets; so is the zone, where there is one.
fn affinity(
    store: &PrivacyDataStore,
    place: &Placed,
    witnesses: &BTreeMap<String, String>,
) -> Value {
    let mut expressions =
        vec![json!({ "key": labels::NODE_REGION, "operator": "In", "values": [place.region] })];
    for (key, value) in witnesses {
        expressions.push(json!({ "key": key, "operator": "In", "values": [value] }));
    }
    if !place.zone.is_empty() {
        expressions
            .push(json!({ "key": labels::NODE_ZONE, "operator": "In", "values": [place.zone] }));
    }
    json!({
        "nodeAffinity": { "requiredDuringSchedulingIgnoredDuringExecution": {
            "nodeSelectorTerms": [{ "matchExpressions": expressions }],
        } },
        "podAntiAffinity": { "preferredDuringSchedulingIgnoredDuringExecution": [{
            "weight": 100,
            "podAffinityTerm": {
                "topologyKey": labels::NODE_HOSTNAME,
                "labelSelector": { "matchLabels": { labels::STORE: store.name_any() } },
            },
        }] },
    })
}

fn container(store: &PrivacyDataStore, instance: &str) -> Value {
    let probe = |path: &str| json!({ "path": path, "port": names::HTTP_PORT_NAME });
    let mut container = json!({
        "name": "postgres", "image": store.spec.postgres.image, "imagePullPolicy": "IfNotPresent",
        "command": [format!("{}/domicile", paths::BIN), "instance"],
        "env": [
            { "name": env::STORE, "value": store.name_any() },
            { "name": env::NAMESPACE, "valueFrom": { "fieldRef": { "fieldPath": "metadata.namespace" } } },
            { "name": env::INSTANCE, "value": instance },
            { "name": env::ADDRESS, "valueFrom": { "fieldRef": { "fieldPath": "status.podIP" } } },
        ],
        "ports": [
            { "name": "postgres", "containerPort": names::POSTGRES_PORT, "protocol": "TCP" },
            { "name": names::HTTP_PORT_NAME, "containerPort": names::HTTP_PORT, "protocol": "TCP" },
            { "name": names::PEER_PORT_NAME, "containerPort": names::PEER_PORT, "protocol": "TCP" },
        ],
        // A clone of a large store takes hours: the manager says for itself whether it still makes progress.
        "startupProbe": { "httpGet": probe("/startupz"), "periodSeconds": 1, "timeoutSeconds": 3, "failureThreshold": 600 },
        "livenessProbe": { "httpGet": probe("/livez"), "periodSeconds": 10, "timeoutSeconds": 5, "failureThreshold": 6 },
        "readinessProbe": { "httpGet": probe("/readyz"), "periodSeconds": 2, "timeoutSeconds": 3, "failureThreshold": 2 },
        "securityContext": container_security(),
        "volumeMounts": [
            { "name": "data", "mountPath": paths::VOLUME },
            { "name": "bin", "mountPath": paths::BIN, "readOnly": true },
            // initdb refuses a user without a name, and the image's own list is not ours to change.
            { "name": "bin", "mountPath": "/etc/passwd", "subPath": "passwd", "readOnly": true },
            { "name": "bin", "mountPath": "/etc/group", "subPath": "group", "readOnly": true },
            { "name": "run", "mountPath": paths::RUN },
            { "name": "tmp", "mountPath": "/tmp" },
            { "name": "shm", "mountPath": "/dev/shm" },
            { "name": "tls", "mountPath": paths::TLS, "readOnly": true },
            { "name": "app", "mountPath": paths::APP, "readOnly": true },
        ],
    });
    if let Some(resources) = store.spec.resources.as_ref().map(resources) {
        container["resources"] = resources;
    }
    container
}

/// The application's Secret without its password: everything else follows from the store and its instances.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AppSecret {
    /// Name of the role, the database.
    pub username: String,
    /// Name of the database.
    pub database: String,
    /// Stable names of the instances' Services: those that may be primary first.
    pub hosts: Vec<String>,
    /// Name of the read-write Service.
    pub service: String,
    /// Where an application mounts the Secret, so that its driver finds `ca.crt`.
    pub mount: String,
}

/// The keys of the application's Secret.
const APP_KEYS: [&str; 9] = [
    "username", "password", "database", "host", "port", "hosts", "uri", "jdbc-uri", "ca.crt",
];

/// Whether the application's Secret has all its keys, and its URIs its password.
#[must_use]
pub fn coherent(secret: &k8s_openapi::api::core::v1::Secret) -> bool {
    let text = |key: &str| {
        let bytes = secret.data.as_ref().and_then(|d| d.get(key))?;
        std::str::from_utf8(&bytes.0).ok()
    };
    let password = text("password").filter(|p| !p.is_empty());
    let carried = |key: &str| {
        password
            .zip(text(key))
            .is_some_and(|(p, uri)| uri.contains(p))
    };
    APP_KEYS.iter().all(|key| text(key).is_some()) && carried("uri") && carried("jdbc-uri")
}

/// How libpq finds the primary. `connect_timeout` (seconds for one host; 2 is libpq's least) is what a silently
/// dead host costs before the next is tried; `tcp_user_timeout` (milliseconds) ends a connection whose peer
/// acknowledges nothing any more. No `load_balance_hosts`: libpq before 16 refuses a URI that has it.
const URI_OPTIONS: &str = "target_session_attrs=read-write&connect_timeout=2&tcp_user_timeout=3000";
/// The same for pgJDBC. `hostRecheckSeconds`: it remembers which host was the primary, and for that long (10 s
/// unless told) it would not even try the others for one.
const JDBC_OPTIONS: &str =
    "targetServerType=primary&connectTimeout=2&tcpKeepAlive=true&hostRecheckSeconds=1";

impl AppSecret {
    /// What it should say for the instances `placed`.
    #[must_use]
    pub fn new(
        store: &PrivacyDataStore,
        placed: &[Placed],
        may_be_primary: impl Fn(&str) -> bool,
    ) -> Self {
        let name = store.name_any();
        let namespace = store.namespace().unwrap_or_default();
        let mut ordered: Vec<&Placed> = placed.iter().collect();
        ordered.sort_by_key(|p| (!may_be_primary(&p.region), p.slot));
        Self {
            username: store.spec.database.owner.clone(),
            database: store.spec.database.name.clone(),
            hosts: ordered
                .iter()
                .map(|p| format!("{}.{namespace}.svc", names::instance(&name, p.slot)))
                .collect(),
            service: format!("{}.{namespace}.svc", names::rw(&name)),
            mount: format!("/etc/domicile/{name}"),
        }
    }

    /// Hash of everything but the password, with the authority that `ca.crt` holds.
    #[must_use]
    pub fn hash(&self, authority: &str) -> String {
        hash(&json!([
            self.username,
            self.database,
            self.hosts,
            self.service,
            self.mount,
            authority,
            URI_OPTIONS,
            JDBC_OPTIONS
        ]))
    }

    /// The Secret's content. The password must be URL-safe.
    #[must_use]
    pub fn data(&self, password: &str, ca: &str) -> BTreeMap<String, String> {
        let port = names::POSTGRES_PORT;
        let hosts = self
            .hosts
            .iter()
            .map(|h| format!("{h}:{port}"))
            .collect::<Vec<_>>()
            .join(",");
        let (user, database, mount) = (&self.username, &self.database, &self.mount);
        let uri = format!(
            "postgresql://{user}:{password}@{hosts}/{database}?{URI_OPTIONS}&sslmode=verify-full&sslrootcert={mount}/ca.crt"
        );
        let jdbc = format!(
            "jdbc:postgresql://{hosts}/{database}?user={user}&password={password}&{JDBC_OPTIONS}&sslmode=verify-full&sslrootcert={mount}/ca.crt"
        );
        let pairs = [
            ("username", user.clone()),
            ("password", password.to_owned()),
            ("database", database.clone()),
            ("host", self.service.clone()),
            ("port", port.to_string()),
            ("hosts", hosts),
            ("uri", uri),
            ("jdbc-uri", jdbc),
            ("ca.crt", ca.to_owned()),
        ];
        pairs.into_iter().map(|(k, v)| (k.to_owned(), v)).collect()
    }
}
