//! The pair configured by hand: two pods that run `postgres` and nothing else.
//!
//! Owns their manifests. No manager, no probes: nothing that a person with two machines wouldn't have.

use std::time::Duration;

use anyhow::{Context, Result};
use k8s_openapi::api::core::v1::Pod;
use rcgen::generate_simple_self_signed;
use serde_json::{Value, json};

use crate::harness::{PATIENCE, Scope, wait_for};
use crate::provisioner::CLASS;
use crate::run::until;

/// The primary's pod.
pub const PRIMARY: &str = "by-hand-1";
const STANDBY: &str = "by-hand-2";
/// Where its Unix socket is.
pub const SOCKETS: &str = "/run/by-hand";
/// Where clients connect to: through a Service, as the store's do. Nobody is asked for a password; that is a matter
/// of a connection's beginning, and connections last.
pub const URI: &str = "postgresql://app@by-hand-1:5432/app?sslmode=require";
/// One of the test bed's images.
const IMAGE: &str = "postgres:17";
const DATA: &str = "/var/lib/by-hand/data";

/// Those settings of the store's primary that somebody has set, as lines of a configuration file; without what is
/// about places, names and who follows whom.
pub const SETTINGS: &str = "select name || ' = ' || quote_literal(current_setting(name)) from pg_settings \
    where source = 'configuration file' and name not in ('hba_file', 'ident_file', 'config_file', 'data_directory', \
    'ssl_ca_file', 'ssl_cert_file', 'ssl_key_file', 'unix_socket_directories', 'listen_addresses', 'cluster_name', \
    'synchronous_standby_names', 'primary_conninfo', 'primary_slot_name', 'external_pid_file', 'log_line_prefix') order by name";

/// All settings but those, to compare.
pub const COMPARED: &str = "select name || '=' || setting from pg_settings \
    where name not in ('hba_file', 'ident_file', 'config_file', 'data_directory', \
    'ssl_ca_file', 'ssl_cert_file', 'ssl_key_file', 'unix_socket_directories', 'listen_addresses', 'cluster_name', \
    'synchronous_standby_names', 'primary_conninfo', 'primary_slot_name', 'external_pid_file', 'log_line_prefix') order by name";

/// What the pair is made of.
pub struct ByHand<'a> {
    /// Where.
    pub scope: &'a Scope,
    /// The primary's node.
    pub primary_node: &'a str,
    /// The standby's node.
    pub standby_node: &'a str,
    /// Lines of the configuration file.
    pub settings: &'a str,
}

impl ByHand<'_> {
    /// Brings the pair up.
    ///
    /// # Errors
    /// If it doesn't come up in time.
    pub async fn up(&self) -> Result<()> {
        let identity =
            generate_simple_self_signed(vec![PRIMARY.to_owned()]).context("a certificate")?;
        let hba = "local all all trust\nhostssl replication postgres all trust\nhostssl all app all trust\n";
        let config = format!(
            "{}\nlisten_addresses = '*'\nunix_socket_directories = '{SOCKETS}'\nhba_file = '/etc/by-hand/pg_hba.conf'\n\
             ssl_cert_file = '/etc/by-hand-tls/tls.crt'\nssl_key_file = '/etc/by-hand-tls/tls.key'\n",
            self.settings
        );
        let namespace = &self.scope.namespace;
        let named = |kind: &str, name: &str| json!({ "apiVersion": "v1", "kind": kind, "metadata": { "name": name, "namespace": namespace } });
        let mut files = named("ConfigMap", "by-hand");
        files["data"] = json!({ "postgresql.conf": config, "pg_hba.conf": hba });
        let mut secret = named("Secret", "by-hand-tls");
        secret["stringData"] = json!({
            "tls.crt": identity.cert.pem(), "tls.key": identity.signing_key.serialize_pem(),
        });
        let mut service = named("Service", PRIMARY);
        service["spec"] = json!({ "selector": { "pair": PRIMARY }, "ports": [{ "port": 5432 }] });
        for object in [files, secret, service] {
            self.scope.apply(&object).await?;
        }
        // As the store's manager does it, so that both have the same sort order and checksums.
        let make = format!(
            "initdb -D {DATA} --data-checksums --encoding=UTF8 --username=postgres --auth=trust \
             --locale-provider=builtin --builtin-locale=C.UTF-8 --locale=C"
        );
        self.server(
            PRIMARY,
            self.primary_node,
            &make,
            "-c synchronous_standby_names='ANY 1 (\"by_hand_2\")'",
        )
        .await?;
        let sql =
            "set synchronous_commit = local; create role app login; create database app owner app";
        // One statement at a time: a database can't be made in a transaction block.
        let make = sql
            .split("; ")
            .map(|s| format!("-c '{s}'"))
            .collect::<Vec<_>>()
            .join(" ");
        let psql =
            format!("psql -h {SOCKETS} -U postgres -d postgres -XAtqv ON_ERROR_STOP=1 {make}");
        let (limit, every) = (Duration::from_secs(60), Duration::from_millis(500));
        until("the primary made by hand", limit, every, || {
            self.scope
                .exec(PRIMARY, &["pg_isready", "-q", "-h", SOCKETS])
        })
        .await?;
        self.scope.exec(PRIMARY, &["sh", "-ec", &psql]).await?;
        let source =
            format!("host={PRIMARY} user=postgres sslmode=require application_name=by_hand_2");
        let copy = format!(
            "pg_basebackup -D {DATA} -d '{source}' --wal-method=stream --checkpoint=fast -C --slot=by_hand_2; \
             touch {DATA}/standby.signal"
        );
        self.server(
            STANDBY,
            self.standby_node,
            &copy,
            &format!("-c primary_conninfo='{source}' -c primary_slot_name=by_hand_2"),
        )
        .await
    }

    /// A pod with a volume, on a node; waits until it runs.
    async fn server(&self, name: &str, node: &str, make: &str, options: &str) -> Result<()> {
        let namespace = &self.scope.namespace;
        let claim = json!({
            "apiVersion": "v1", "kind": "PersistentVolumeClaim",
            "metadata": { "name": name, "namespace": namespace },
            "spec": {
                "storageClassName": CLASS, "accessModes": ["ReadWriteOnce"],
                "resources": { "requests": { "storage": "4Gi" } },
            },
        });
        self.scope.apply(&claim).await?;
        let script = format!(
            "umask 077; test -s {DATA}/PG_VERSION || {{ {make}; }}; \
             exec postgres -D {DATA} -c config_file=/etc/by-hand/postgresql.conf {options}"
        );
        self.scope
            .apply(&pod(namespace, name, node, &script))
            .await?;
        let running = wait_for(self.scope.api::<Pod>(), name, |pod| {
            pod.status.as_ref().and_then(|s| s.phase.as_deref()) == Some("Running")
        });
        tokio::time::timeout(PATIENCE, running)
            .await
            .with_context(|| format!("the pod {name} doesn't start"))??;
        Ok(())
    }
}

fn pod(namespace: &str, name: &str, node: &str, script: &str) -> Value {
    let memory = || json!({ "medium": "Memory" });
    json!({
        "apiVersion": "v1", "kind": "Pod",
        "metadata": { "name": name, "namespace": namespace, "labels": { "pair": name } },
        "spec": {
            "nodeSelector": { "kubernetes.io/hostname": node },
            "terminationGracePeriodSeconds": 5, "enableServiceLinks": false,
            "securityContext": {
                "runAsNonRoot": true, "runAsUser": 999, "runAsGroup": 999, "fsGroup": 999,
                "seccompProfile": { "type": "RuntimeDefault" },
            },
            "containers": [{
                "name": "postgres", "image": IMAGE, "imagePullPolicy": "IfNotPresent",
                "command": ["sh", "-ec", script],
                "resources": { "requests": { "cpu": "10m", "memory": "64Mi" } },
                "securityContext": { "allowPrivilegeEscalation": false, "capabilities": { "drop": ["ALL"] } },
                "volumeMounts": [
                    { "name": "data", "mountPath": "/var/lib/by-hand" },
                    { "name": "run", "mountPath": SOCKETS },
                    { "name": "shm", "mountPath": "/dev/shm" },
                    { "name": "files", "mountPath": "/etc/by-hand", "readOnly": true },
                    { "name": "tls", "mountPath": "/etc/by-hand-tls", "readOnly": true },
                ],
            }],
            "volumes": [
                { "name": "data", "persistentVolumeClaim": { "claimName": name } },
                { "name": "run", "emptyDir": memory() }, { "name": "shm", "emptyDir": memory() },
                { "name": "files", "configMap": { "name": "by-hand" } },
                { "name": "tls", "secret": { "secretName": "by-hand-tls", "defaultMode": 0o440 } },
            ],
        },
    })
}
