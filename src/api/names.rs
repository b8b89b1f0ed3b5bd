//! Names of a store's child objects, ports, and paths inside a store pod. Deterministic, so that a crash
//! between two writes can leak nothing: the next pass finds what the last one made.

/// Port of PostgreSQL.
pub const POSTGRES_PORT: u16 = 5432;
/// Port of an instance's probes, metrics and status; plain HTTP, read-only, nothing secret.
pub const HTTP_PORT: u16 = 8008;
/// Name of the HTTP port in the pod and its Service.
pub const HTTP_PORT_NAME: &str = "http";

/// Port at which the instances of a store talk to each other; TLS with the store's own certificates on both
/// sides, instances only.
pub const PEER_PORT: u16 = 8009;
/// Name of the instances' port in the pod.
pub const PEER_PORT_NAME: &str = "peers";

/// User and group that every store pod runs as.
pub const POD_UID: i64 = 10001;

/// Role by which standbys stream; certificates only.
pub const REPLICATION_ROLE: &str = "domicile_replication";
/// Superuser, over the Unix socket only and only for the instance manager.
pub const SUPERUSER: &str = "postgres";

/// Paths inside a store pod.
pub mod paths {
    /// Where the init container puts the injected binary: `{BIN}/domicile`.
    pub const BIN: &str = "/domicile/bin";
    /// The volume.
    pub const VOLUME: &str = "/var/lib/domicile";
    /// Memory-backed: sockets, private keys.
    pub const RUN: &str = "/run/domicile";
    /// The instance's certificate: ca.crt, tls.crt, tls.key.
    pub const TLS: &str = "/etc/domicile/tls";
    /// The application's credentials: username, password.
    pub const APP: &str = "/etc/domicile/app";
}

/// Environment of a store pod's main container.
pub mod env {
    /// Name of the store.
    pub const STORE: &str = "DOMICILE_STORE";
    /// Namespace of the store.
    pub const NAMESPACE: &str = "DOMICILE_NAMESPACE";
    /// Name of this instance (and of its pod).
    pub const INSTANCE: &str = "DOMICILE_INSTANCE";
    /// The pod's address.
    pub const ADDRESS: &str = "DOMICILE_ADDRESS";
}

/// Name of instance `slot` (from 1), its pod, volume claim and Service.
#[must_use]
pub fn instance(store: &str, slot: u32) -> String {
    format!("{store}-{slot}")
}

/// The slot in an instance's name, if it is one of this store's.
#[must_use]
pub fn slot(store: &str, instance: &str) -> Option<u32> {
    let digits = instance.strip_prefix(store)?.strip_prefix('-')?;
    let canonical = !digits.is_empty()
        && !digits.starts_with('0')
        && digits.bytes().all(|b| b.is_ascii_digit());
    if canonical { digits.parse().ok() } else { None }
}

/// Service that reaches the primary; its EndpointSlice has the same name.
#[must_use]
pub fn rw(store: &str) -> String {
    format!("{store}-rw")
}

/// Service that reaches ready standbys; its EndpointSlice has the same name.
#[must_use]
pub fn ro(store: &str) -> String {
    format!("{store}-ro")
}

/// ConfigMap of the voter that a store with an even number of instances needs beside them.
#[must_use]
pub fn witness(store: &str) -> String {
    format!("{store}-witness")
}

/// Key of the witness's ConfigMap. Its content is the instances' business.
pub const WITNESS_KEY: &str = "register";

/// ConfigMap with the store's attestations. It outlives the store.
#[must_use]
pub fn attestations(store: &str) -> String {
    format!("{store}-attestations")
}

/// Secret in the operator's namespace with the keys that sign attestations: 1.pem, 2.pem, …; the highest signs.
pub const ATTESTATION_KEY: &str = "domicile-attestation-key";
/// ConfigMap in the operator's namespace with the public halves of these keys, as KEYID.pem. None is ever taken out.
pub const ATTESTATION_KEYS: &str = "domicile-attestation-keys";

/// Secret for the application: username, password, database, uri, jdbc-uri, ca.crt.
#[must_use]
pub fn app_secret(store: &str) -> String {
    format!("{store}-app")
}

/// Secret with the store's certificate authority; only the operator reads it.
#[must_use]
pub fn ca_secret(store: &str) -> String {
    format!("{store}-ca")
}

/// Secret with an instance's certificate and key.
#[must_use]
pub fn tls_secret(instance: &str) -> String {
    format!("{instance}-tls")
}

/// ServiceAccount, Role and RoleBinding of a store's instances.
#[must_use]
pub fn instance_account(store: &str) -> String {
    format!("{store}-instance")
}

/// Replication slot of an instance on the primary. PostgreSQL allows lower-case letters, digits and '_'.
#[must_use]
pub fn replication_slot(instance: &str) -> String {
    instance.replace('-', "_")
}

/// Field manager under which an instance applies its own entry of the store's status.
#[must_use]
pub fn instance_field_manager(instance: &str) -> String {
    format!("domicile-instance/{instance}")
}

/// Field manager of the operator.
pub const OPERATOR_FIELD_MANAGER: &str = "domicile-operator";

/// What a `RightsWorkflow` is made of: its database, roles, objects, and the paths inside its pods.
pub mod rights {
    /// Role of which every role of a workflow is a member: they come with a certificate, never with a password.
    pub const GROUP_ROLE: &str = "domicile_rights";
    /// Port of a gateway's API; HTTPS.
    pub const GATEWAY_PORT: u16 = 8443;

    /// Paths inside a gateway's or worker's pod.
    pub mod paths {
        /// What the operator made of the workflow: `workflow.json`.
        pub const CONFIG: &str = "/etc/domicile/rights/config/workflow.json";
        /// The certificate by which the pod is a role at the ledger: ca.crt, tls.crt, tls.key.
        pub const TLS: &str = "/etc/domicile/rights/tls";
        /// The workflow's keys: `hash`, and one `epoch-YYYY-MM-DD` per day, 32 bytes each.
        pub const KEYS: &str = "/etc/domicile/rights/keys";
        /// The certificate that a gateway shows its clients: tls.crt, tls.key.
        pub const SERVING: &str = "/etc/domicile/rights/serving";
        /// Credentials of targets: `TARGET/url`. Workers only.
        pub const TARGETS: &str = "/etc/domicile/rights/targets";
    }

    /// What a process of a workflow is at the ledger, and nothing more.
    #[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
    pub enum Role {
        /// Files requests, reads and withdraws them.
        Gateway,
        /// Claims steps and finishes them.
        Worker,
        /// Counts, and nothing else: the operator.
        Observer,
    }

    /// Database of a workflow's ledger, in the store that `ledgerRef` names.
    #[must_use]
    pub fn database(workflow: &str) -> String {
        format!("rights-{workflow}")
    }

    /// PostgreSQL's name of a role; also the common name of the certificate by which one is that role.
    #[must_use]
    pub fn role(workflow: &str, role: Role) -> String {
        let what = match role {
            Role::Gateway => "gateway",
            Role::Worker => "worker",
            Role::Observer => "observer",
        };
        format!("rights-{workflow}-{what}")
    }

    /// Role that owns the ledger; nobody can log in as it.
    #[must_use]
    pub fn owner(workflow: &str) -> String {
        format!("rights-{workflow}-owner")
    }

    /// ServiceAccount, Deployment and all that goes with it, of a workflow's gateway.
    #[must_use]
    pub fn gateway(workflow: &str) -> String {
        format!("{workflow}-rights-gateway")
    }

    /// Service by which a workflow's gateway is reached.
    #[must_use]
    pub fn gateway_service(workflow: &str) -> String {
        format!("{workflow}-gateway")
    }

    /// ConfigMap with the authority of the gateway's certificate, for its clients: ca.crt.
    #[must_use]
    pub fn gateway_ca(workflow: &str) -> String {
        format!("{workflow}-gateway-ca")
    }

    /// ServiceAccount and NetworkPolicy of a workflow's workers.
    #[must_use]
    pub fn workers(workflow: &str) -> String {
        format!("{workflow}-rights-worker")
    }

    /// Deployment of a workflow's workers in a region. Its name goes into those of its pods, of which 58 characters are
    /// kept: where it would be longer than a host's name may be, a hash takes the region's place.
    #[must_use]
    pub fn worker(workflow: &str, region: &str) -> String {
        use sha2::{Digest as _, Sha256};
        let plain = format!("{}-{region}", workers(workflow));
        if plain.len() <= LONGEST {
            return plain;
        }
        let digest = Sha256::digest(region.as_bytes());
        let short: String = digest.iter().take(4).map(|b| format!("{b:02x}")).collect();
        format!("{}-{short}", workers(workflow))
    }

    /// The longest name of a host. A workflow's name has at most 40 characters, so that it and a hash always fit.
    const LONGEST: usize = 63;

    /// ConfigMap of a workflow: workflow.json.
    #[must_use]
    pub fn config(workflow: &str) -> String {
        format!("{workflow}-rights")
    }

    /// Secret with a workflow's keys. It outlives the workflow.
    #[must_use]
    pub fn keys(workflow: &str) -> String {
        format!("{workflow}-rights-keys")
    }

    /// Secret with the certificate that a gateway shows its clients.
    #[must_use]
    pub fn serving(workflow: &str) -> String {
        format!("{workflow}-rights-serving")
    }

    /// Secret with the certificate by which a gateway is a role at the ledger.
    #[must_use]
    pub fn gateway_tls(workflow: &str) -> String {
        format!("{workflow}-rights-gateway-tls")
    }

    /// Secret with the certificate by which workers are a role at a store.
    #[must_use]
    pub fn worker_tls(workflow: &str, store: &str) -> String {
        format!("{workflow}-rights-worker-{store}-tls")
    }

    /// ClusterRole that a gateway is bound to: it may ask whose a token is and what its bearer may do.
    pub const GATEWAY_CLUSTER_ROLE: &str = "domicile-rights-gateway";

    /// ClusterRoleBinding of a workflow's gateway.
    #[must_use]
    pub fn gateway_binding(namespace: &str, workflow: &str) -> String {
        format!("{GATEWAY_CLUSTER_ROLE}:{namespace}:{workflow}")
    }

    /// Field manager under which the operator says what a workflow needs of a store.
    #[must_use]
    pub fn field_manager(workflow: &str) -> String {
        format!("domicile-rights/{workflow}")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn slot_is_the_inverse_of_instance() {
        for n in [1, 2, 10, 4_294_967_295] {
            assert_eq!(slot("a-1", &instance("a-1", n)), Some(n));
        }
    }

    #[test]
    fn foreign_names_have_no_slot() {
        for name in [
            "consumers",
            "consumers-",
            "consumers-0",
            "consumers-01",
            "consumers-x",
            "consumers-1-tls",
            "other-1",
            "consumers-99999999999",
        ] {
            assert_eq!(slot("consumers", name), None, "{name}");
        }
    }
}
