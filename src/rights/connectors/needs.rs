//! What a target must know of a person.
//!
//! Owns which identifiers each rule of a target needs, and which values identify nobody. Pure.

use super::{Failure, Reason};
use crate::rights::config::{System, Target};
use crate::rights::model::Identifiers;

/// Names of the identifiers that each rule of a target needs, one list per rule (a table, a key), sorted, none twice.
/// A person can be erased from the target if they have all identifiers of every rule.
#[must_use]
pub fn needs(target: &Target) -> Vec<Vec<String>> {
    let sorted = |mut names: Vec<String>| {
        names.sort_unstable();
        names.dedup();
        names
    };
    match &target.system {
        System::PostgreSql { erase, .. } => erase
            .iter()
            .map(|rule| sorted(rule.columns.values().cloned().collect()))
            .collect(),
        System::Redis { keys } => keys
            .iter()
            .map(|key| sorted(placeholders(key).map(str::to_owned).collect()))
            .collect(),
    }
}

/// Every identifier that a target needs, sorted, none twice.
#[must_use]
pub fn required(target: &Target) -> Vec<String> {
    let mut all: Vec<String> = needs(target).into_iter().flatten().collect();
    all.sort_unstable();
    all.dedup();
    all
}

/// Names in braces, in their order.
fn placeholders(key: &str) -> impl Iterator<Item = &str> {
    key.split('{')
        .skip(1)
        .filter_map(|rest| rest.split_once('}').map(|(name, _)| name))
}

/// A person's identifier of this name. An empty one is refused: it is what everybody has whose identifier isn't known,
/// so it would match them all.
///
/// # Errors
/// If the person has none, or an empty one.
pub fn wanted<'a>(identifiers: &'a Identifiers, name: &str) -> Result<&'a str, Failure> {
    match identifiers.0.get(name) {
        None => Err(Failure::new(
            Reason::Identifier,
            format!(
                "the request carries no {name}, by which this target is keyed: find it out and file the request again with it"
            ),
        )),
        Some(value) if value.trim().is_empty() => Err(Failure::new(
            Reason::Identifier,
            format!("the request's {name} is empty, which identifies nobody"),
        )),
        Some(value) => Ok(value),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::api::rights_targets::TableErasure;
    use std::collections::BTreeMap;

    fn target(system: System) -> Target {
        Target {
            name: "t".into(),
            regions: vec!["r".into()],
            settle_seconds: 0,
            residue_days: None,
            system,
        }
    }

    #[test]
    fn each_table_needs_the_identifiers_of_its_columns() {
        let table = |table: &str, columns: &[(&str, &str)]| TableErasure {
            table: table.into(),
            columns: columns
                .iter()
                .map(|(c, i)| ((*c).to_owned(), (*i).to_owned()))
                .collect(),
            clear_columns: Vec::new(),
        };
        let t = target(System::PostgreSql {
            store: None,
            erase: vec![
                table("customers", &[("id", "customerId")]),
                table(
                    "mails",
                    &[("sender", "email"), ("recipient", "email"), ("a", "b")],
                ),
            ],
        });
        assert_eq!(needs(&t), [vec!["customerId"], vec!["b", "email"]]);
        assert_eq!(required(&t), ["b", "customerId", "email"]);
    }

    #[test]
    fn each_key_needs_its_placeholders() {
        let t = target(System::Redis {
            keys: vec![
                "s:{customerId}:*".into(),
                "{b}:x:{a}".into(),
                "{a}:{a}".into(),
            ],
        });
        assert_eq!(needs(&t), [vec!["customerId"], vec!["a", "b"], vec!["a"]]);
        assert_eq!(required(&t), ["a", "b", "customerId"]);
    }

    #[test]
    fn nobody_is_identified_by_nothing() {
        let of = |value: &str| Identifiers(BTreeMap::from([("a".to_owned(), value.to_owned())]));
        assert_eq!(wanted(&of("12"), "a"), Ok("12"));
        for empty in ["", " ", "\t\n"] {
            let failure = wanted(&of(empty), "a").unwrap_err();
            assert_eq!(failure.reason, Reason::Identifier);
        }
        let failure = wanted(&of("12"), "b").unwrap_err();
        assert_eq!(failure.reason, Reason::Identifier);
        assert!(failure.detail.contains(" b,"), "{failure}");
    }
}
