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
