//! PostgreSQL parameters that a store can't set, since Domicile's promises rest on them.
//!
//! Owns the one list: the CRD refuses what is on it, and the instance ignores and reports what got past.

/// Parameters that are Domicile's own: addresses, files, TLS, replication and durability, what keeps
/// statements (and so personal data) out of logs, and what loads foreign code into the server.
pub const RESERVED: &[&str] = &[
    "allow_alter_system",
    "allow_system_table_mods",
    "archive_cleanup_command",
    "archive_command",
    "archive_library",
    "archive_mode",
    "cluster_name",
    "config_file",
    "data_directory",
    "data_sync_retry",
    "db_user_namespace",
    "debug_print_parse",
    "debug_print_plan",
    "debug_print_rewritten",
    "dynamic_library_path",
    "external_pid_file",
    "fsync",
    "full_page_writes",
    "hba_file",
    "hot_standby",
    "ident_file",
    "idle_replication_slot_timeout",
    "ignore_checksum_failure",
    "ignore_invalid_pages",
    // Directives rather than parameters, but written the same way.
    "include",
    "include_dir",
    "include_if_exists",
    "jit_provider",
    "lc_messages",
    "listen_addresses",
    "local_preload_libraries",
    "log_destination",
    "log_directory",
    "log_duration",
    "log_error_verbosity",
    "log_line_prefix",
    "log_min_duration_sample",
    "log_min_duration_statement",
    "log_min_error_statement",
    "log_min_messages",
    "log_parameter_max_length",
    "log_parameter_max_length_on_error",
    "log_statement",
    "log_statement_sample_rate",
    "log_transaction_sample_rate",
    "logging_collector",
    "max_replication_slots",
    "max_slot_wal_keep_size",
    "max_wal_senders",
    "password_encryption",
    "port",
    "primary_conninfo",
    "primary_slot_name",
    "promote_trigger_file",
    "recovery_end_command",
    "recovery_target",
    "recovery_target_action",
    "recovery_target_inclusive",
    "recovery_target_lsn",
    "recovery_target_name",
    "recovery_target_time",
    "recovery_target_timeline",
    "recovery_target_xid",
    "reserved_connections",
    "restart_after_crash",
    "restore_command",
    "session_preload_libraries",
    "shared_preload_libraries",
    "ssl",
    "ssl_ca_file",
    "ssl_cert_file",
    "ssl_ciphers",
    "ssl_crl_dir",
    "ssl_crl_file",
    "ssl_key_file",
    "ssl_max_protocol_version",
    "ssl_min_protocol_version",
    "ssl_passphrase_command",
    "ssl_passphrase_command_supports_reload",
    "superuser_reserved_connections",
    "sync_replication_slots",
    "synchronized_standby_slots",
    "synchronous_commit",
    "synchronous_standby_names",
    "unix_socket_directories",
    "unix_socket_group",
    "unix_socket_permissions",
    "wal_keep_size",
    "wal_level",
    "wal_log_hints",
    "wal_receiver_status_interval",
    "wal_receiver_timeout",
    "wal_retrieve_retry_interval",
    "wal_sender_timeout",
    "zero_damaged_pages",
];

/// Every parameter of this extension writes statements into logs.
const RESERVED_PREFIX: &str = "auto_explain.";

/// Whether a store may not set this parameter (in lower case).
#[must_use]
pub fn is_reserved(name: &str) -> bool {
    RESERVED.contains(&name) || name.starts_with(RESERVED_PREFIX)
}

/// The CEL rule by which the API server refuses them.
#[must_use]
pub fn rule() -> String {
    let list = RESERVED
        .iter()
        .map(|name| format!("'{name}'"))
        .collect::<Vec<_>>()
        .join(", ");
    format!("self.all(k, !(k in [{list}]) && !k.startsWith('{RESERVED_PREFIX}'))")
}
