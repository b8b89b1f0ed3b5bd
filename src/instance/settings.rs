//! PostgreSQL's configuration: what Domicile fixes, what it suggests, and what the user adds.
//!
//! Owns the content of `postgresql.conf` and of the small file with the upstream. Pure: the same input gives
//! the same bytes, so that "did anything change?" is a comparison.
//! Never: lets a user's parameter weaken durability, TLS, or the rule that no statement's text (and so no
//! personal data) reaches a log.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::path::Path;

use crate::api::names;

pub use crate::api::parameters::{RESERVED, is_reserved};

/// Parameters that on a standby may not be smaller than on its primary, as `pg_controldata` names them.
pub const FLOORS: &[&str] = &[
    "max_connections",
    "max_worker_processes",
    "max_wal_senders",
    "max_prepared_xacts",
    "max_locks_per_xact",
];

/// How each line of PostgreSQL's log begins; `logs` reads it back.
pub const LOG_LINE_PREFIX: &str = "domicile %p %e [%b] ";

/// The file with the upstream, beside `postgresql.conf`.
pub const UPSTREAM_FILE: &str = "upstream.conf";

/// What the configuration depends on.
#[derive(Clone, Debug)]
pub struct Input<'a> {
    /// PostgreSQL's major version.
    pub major: u32,
    /// This instance.
    pub instance: &'a str,
    /// Addresses to listen on; empty for none.
    pub listen: &'a str,
    /// The port.
    pub port: u16,
    /// Sockets and copies of the key.
    pub run: &'a Path,
    /// `failover.detectionSeconds`.
    pub detection_seconds: u32,
    /// Size of the volume in bytes.
    pub volume_bytes: u64,
    /// The user's parameters that were tried and work.
    pub user: &'a BTreeMap<String, String>,
    /// What the primary had for [`FLOORS`], if this is a standby.
    pub floors: &'a BTreeMap<String, u64>,
}

/// Seconds of silence after which a replication connection is given up: twice the detection, since it also
/// has to bear a busy moment, and not under five.
#[must_use]
pub fn replication_timeout(detection_seconds: u32) -> u32 {
    detection_seconds.saturating_mul(2).clamp(5, 600)
}

/// WAL files that are kept ready for use: a sixteenth of the volume, at most what PostgreSQL lets WAL grow to between two
/// checkpoints by default, at least PostgreSQL's own default. After a quiet week PostgreSQL would keep five, and with a
/// spike every commit would wait, once in 16 MiB, until primary and standbys have filled a new one with zeroes.
#[must_use]
pub fn ready_wal_megabytes(volume_bytes: u64) -> u64 {
    (volume_bytes / 16 / MEGABYTE).clamp(80, 1024)
}

/// How much WAL the slots of absent standbys may hold back: a quarter of the volume. Beyond it a standby is
/// cloned anew, which is better than a full volume, which stops the primary.
#[must_use]
pub fn slot_keep_megabytes(volume_bytes: u64) -> u64 {
    (volume_bytes / 4 / MEGABYTE).max(64)
}

const MEGABYTE: u64 = 1024 * 1024;

/// The user's parameters without the reserved ones, and the names of those left out.
#[must_use]
pub fn split(user: &BTreeMap<String, String>) -> (BTreeMap<String, String>, Vec<String>) {
    let mut kept = BTreeMap::new();
    let mut ignored = Vec::new();
    for (name, value) in user {
        let lower = name.to_ascii_lowercase();
        if is_reserved(&lower) || !well_formed(name) || value.contains(['\n', '\r', '\0']) {
            ignored.push(name.clone());
        } else {
            kept.insert(name.clone(), value.clone());
        }
    }
    (kept, ignored)
}

/// Whether it can be a parameter's name and nothing else.
fn well_formed(name: &str) -> bool {
    let part = |p: &str| {
        p.bytes()
            .next()
            .is_some_and(|b| b.is_ascii_lowercase() || b == b'_')
            && p.bytes()
                .all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'_')
    };
    name.len() <= 63 && name.split('.').count() <= 2 && name.split('.').all(part)
}

/// `postgresql.conf`.
#[must_use]
pub fn render(input: &Input<'_>) -> String {
    let mut out = String::from("# Written by Domicile; changes are overwritten.\n");
    let mut set = |name: &str, value: &str| {
        let _ = writeln!(out, "{name} = {}", quote(value));
    };

    // Suggestions, which a user's parameter replaces.
    let ready = format!("{}MB", ready_wal_megabytes(input.volume_bytes));
    for (name, value) in [
        ("timezone", "UTC"),
        ("log_timezone", "UTC"),
        ("default_text_search_config", "pg_catalog.english"),
        ("tcp_keepalives_idle", "15"),
        ("tcp_keepalives_interval", "5"),
        ("tcp_keepalives_count", "3"),
        // A client that vanished holds its connection no longer than this.
        ("tcp_user_timeout", "30s"),
        ("min_wal_size", ready.as_str()),
    ] {
        if !input.user.contains_key(name) {
            set(name, value);
        }
    }
    for (name, value) in input.user {
        set(name, value);
    }
    for (name, value) in floors(input.user, input.floors) {
        set(name, &value.to_string());
    }

    for (name, value) in fixed(input) {
        set(name, &value);
    }
    for file in [UPSTREAM_FILE, super::sync::SYNC_FILE] {
        let _ = writeln!(out, "include {}", quote(file));
    }
    out
}

/// Those of [`FLOORS`] that must be higher than asked for: a standby refuses to start with less than its primary had,
/// and every start is a standby's.
#[must_use]
pub fn floors(
    user: &BTreeMap<String, String>,
    floors: &BTreeMap<String, u64>,
) -> BTreeMap<&'static str, u64> {
    floors
        .iter()
        .filter_map(|(name, floor)| {
            let (name, default) = match name.as_str() {
                "max_prepared_xacts" => ("max_prepared_transactions", 0),
                "max_locks_per_xact" => ("max_locks_per_transaction", 64),
                "max_worker_processes" => ("max_worker_processes", 8),
                "max_connections" => ("max_connections", 100),
                _ => return None,
            };
            let own = user
                .get(name)
                .map_or(Some(default), |v| v.trim().parse().ok())?;
            (*floor > own).then_some((name, *floor))
        })
        .collect()
}

fn fixed(input: &Input<'_>) -> Vec<(&'static str, String)> {
    let path = |name: &str| input.run.join(name).display().to_string();
    let timeout = format!("{}s", replication_timeout(input.detection_seconds));
    let keep = (input.volume_bytes / 50 / MEGABYTE).clamp(16, 1024);
    let senders = input
        .floors
        .get("max_wal_senders")
        .copied()
        .unwrap_or(0)
        .max(20);
    let mut all: Vec<(&'static str, String)> = [
        ("listen_addresses", input.listen),
        ("unix_socket_permissions", "0700"),
        ("external_pid_file", ""),
        ("ssl", "on"),
        ("ssl_min_protocol_version", "TLSv1.2"),
        ("password_encryption", "scram-sha-256"),
        ("wal_level", "logical"),
        ("max_replication_slots", "20"),
        ("hot_standby", "on"),
        // So that a former primary can be rewound rather than cloned.
        ("wal_log_hints", "on"),
        ("fsync", "on"),
        ("full_page_writes", "on"),
        ("synchronous_commit", "on"),
        ("wal_receiver_status_interval", "1s"),
        // A follower that came before its upstream was promoted waits so long before it asks for the new timeline.
        ("wal_retrieve_retry_interval", "100ms"),
        ("recovery_target_timeline", "latest"),
        // A crash ends the postmaster, so that the manager sees and counts it.
        ("restart_after_crash", "off"),
        // For the manager: clients must not be able to lock it out.
        ("superuser_reserved_connections", "10"),
        ("shared_preload_libraries", ""),
        ("logging_collector", "off"),
        ("log_destination", "stderr"),
        ("lc_messages", "C"),
        ("log_line_prefix", LOG_LINE_PREFIX),
        // No statement, no parameter and no key value of a failing row may reach a log: they are personal
        // data. Messages of clients' errors, which may quote a value, are kept back by the manager.
        ("log_statement", "none"),
        ("log_duration", "off"),
        ("log_min_duration_statement", "-1"),
        ("log_min_duration_sample", "-1"),
        ("log_transaction_sample_rate", "0"),
        ("log_parameter_max_length", "0"),
        ("log_parameter_max_length_on_error", "0"),
        ("log_min_error_statement", "panic"),
        ("log_min_messages", "warning"),
        ("log_error_verbosity", "terse"),
    ]
    .into_iter()
    .map(|(k, v)| (k, v.to_owned()))
    .collect();
    all.extend([
        ("port", input.port.to_string()),
        ("unix_socket_directories", input.run.display().to_string()),
        ("hba_file", path("conf/pg_hba.conf")),
        ("ident_file", path("conf/pg_ident.conf")),
        ("ssl_ca_file", path("tls/ca.crt")),
        ("ssl_cert_file", path("tls/tls.crt")),
        ("ssl_key_file", path("tls/tls.key")),
        ("max_wal_senders", senders.to_string()),
        ("wal_keep_size", format!("{keep}MB")),
        (
            "max_slot_wal_keep_size",
            format!("{}MB", slot_keep_megabytes(input.volume_bytes)),
        ),
        ("wal_sender_timeout", timeout.clone()),
        ("wal_receiver_timeout", timeout),
        ("cluster_name", input.instance.to_owned()),
    ]);
    if input.major >= 16 {
        all.push(("reserved_connections", "0".to_owned()));
    }
    if input.major >= 17 {
        // ALTER SYSTEM would win over this file, and stay when the manager changes its mind.
        all.push(("allow_alter_system", "off".to_owned()));
    }
    if input.major >= 18 {
        all.push(("idle_replication_slot_timeout", "0".to_owned()));
    }
    all
}

/// The file with the upstream. Without one it says so, rather than being empty, so that nothing that
/// `postgresql.auto.conf` may hold from elsewhere connects.
#[must_use]
pub fn upstream(conninfo: Option<&str>, slot: &str) -> String {
    let slot = if conninfo.is_some() { slot } else { "" };
    // Cut off, a standby replays at once what it has: a vote waits for that, and a query must not hold it up.
    let hurry = if conninfo.is_some() {
        ""
    } else {
        "max_standby_streaming_delay = 0\nmax_standby_archive_delay = 0\n"
    };
    format!(
        "# Written by Domicile; changes are overwritten.\nprimary_conninfo = {}\nprimary_slot_name = {}\n{hurry}",
        quote(conninfo.unwrap_or_default()),
        quote(slot)
    )
}

/// The slot of an instance, as PostgreSQL names it.
#[must_use]
pub fn slot(instance: &str) -> String {
    names::replication_slot(instance)
}

/// A value in the configuration file's quotes: quotes are doubled, and a backslash begins an escape there.
#[must_use]
pub fn quote(value: &str) -> String {
    let mut out = String::with_capacity(value.len() + 2);
    out.push('\'');
    for c in value.chars() {
        match c {
            '\'' => out.push_str("''"),
            '\\' => out.push_str("\\\\"),
            '\n' => out.push_str("\\n"),
            '\r' => out.push_str("\\r"),
            c => out.push(c),
        }
    }
    out.push('\'');
    out
}

#[cfg(test)]
mod tests;
