//! The synchronous rule as PostgreSQL has it: whose acknowledgement a commit waits for.
//!
//! Owns `synchronous_standby_names` and the small file that sets it. Which rule it is, the failover protocol says.
//! Never: leaves a standby without a rule: promoted by whatever accident, it would acknowledge commits alone.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;
use std::io;
use std::path::Path;

use super::{files, settings};
use crate::api::names;
use crate::failover::{Configuration, Rule};

/// The file with the rule, beside `postgresql.conf`.
pub const SYNC_FILE: &str = "sync.conf";

/// A rule that nobody satisfies: no voter has this name.
pub const NOBODY: &str = "ANY 1 (\"-\")";

/// As PostgreSQL's `synchronous_standby_names`.
#[must_use]
pub fn render(rule: &Rule<String>) -> String {
    if rule.acks == 0 {
        return String::new();
    }
    if rule.members.is_empty() {
        return NOBODY.to_owned();
    }
    let mut out = format!("ANY {} (", rule.acks);
    for (i, member) in rule.members.iter().enumerate() {
        let separator = if i == 0 { "" } else { ", " };
        let _ = write!(out, "{separator}\"{}\"", member.replace('"', "\"\""));
    }
    out.push(')');
    out
}

/// Writes the file. True if it changed.
///
/// # Errors
/// As the file system's.
pub fn write(run: &Path, rule: &str) -> io::Result<bool> {
    let path = run.join("conf").join(SYNC_FILE);
    let text = format!(
        "# Written by Domicile; changes are overwritten.\nsynchronous_standby_names = {}\n",
        settings::quote(rule)
    );
    if files::read_bounded(&path, 64 << 10)?.as_deref() == Some(text.as_bytes()) {
        return Ok(false);
    }
    files::replace(&path, text.as_bytes(), 0o600)?;
    Ok(true)
}

/// The names of the other instances: those listed in the store's status, or, as long as nobody else is
/// listed, those its placement will bring.
#[must_use]
pub fn others(
    store: &str,
    me: &str,
    listed: &BTreeSet<String>,
    desired: usize,
) -> BTreeSet<String> {
    let listed: BTreeSet<String> = listed.iter().filter(|n| *n != me).cloned().collect();
    if !listed.is_empty() {
        return listed;
    }
    (1..=u32::try_from(desired).unwrap_or(u32::MAX).min(64))
        .map(|slot| names::instance(store, slot))
        .filter(|n| n != me)
        .take(desired.saturating_sub(1))
        .collect()
}

/// Whether a commit now waits for enough standbys that are there: the rule is in force, asks for half of the copies
/// (at least one), whatever durability lets it do with, and that many of its members stream.
#[must_use]
pub fn durable<T>(
    configuration: &Configuration<String>,
    in_force: bool,
    streaming: &BTreeMap<String, T>,
) -> bool {
    let wanted = (configuration.copies().count() / 2).max(1);
    let present = configuration
        .sync
        .members
        .iter()
        .filter(|m| streaming.contains_key(*m))
        .count();
    in_force && configuration.sync.acks >= wanted && present >= configuration.sync.acks
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rule(members: &[&str], acks: usize) -> Rule<String> {
        Rule {
            members: members.iter().map(|m| (*m).to_owned()).collect(),
            acks,
        }
    }

    #[test]
    fn as_postgresql_reads_it() {
        assert_eq!(
            render(&rule(&["s-2/b", "s-1/a"], 1)),
            r#"ANY 1 ("s-1/a", "s-2/b")"#
        );
        assert_eq!(render(&rule(&[], 1)), NOBODY);
        assert_eq!(render(&rule(&[], 0)), "");
        // More than there are: commits wait.
        assert_eq!(render(&rule(&["s-1/a"], 2)), r#"ANY 2 ("s-1/a")"#);
    }

    #[test]
    fn the_file_is_written_when_it_changes() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::create_dir(dir.path().join("conf")).unwrap();
        assert!(write(dir.path(), NOBODY).unwrap());
        assert!(!write(dir.path(), NOBODY).unwrap());
        assert!(write(dir.path(), "").unwrap());
    }

    #[test]
    fn names_come_from_the_list_or_from_the_placement() {
        let set = |names: &[&str]| {
            names
                .iter()
                .map(|n| (*n).to_owned())
                .collect::<BTreeSet<_>>()
        };
        assert_eq!(others("s", "s-1", &set(&["s-1", "s-3"]), 3), set(&["s-3"]));
        assert_eq!(others("s", "s-1", &set(&["s-1"]), 3), set(&["s-2", "s-3"]));
        assert_eq!(others("s", "s-2", &set(&[]), 3), set(&["s-1", "s-3"]));
    }
}
