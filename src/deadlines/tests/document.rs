//! docs/deadlines.md is read by people who decide by it: its tables are made from the data.

use super::super::calendar::US_FEDERAL;
use super::super::rules::{FirstDay, Rules, Scope, Verification};
use super::golden::EXAMPLES;
use super::*;

const DOCUMENT: &str = include_str!("../../../docs/deadlines.md");

fn table(head: &[&str], rows: impl IntoIterator<Item = Vec<String>>) -> String {
    let line = |cells: &[String]| format!("| {} |\n", cells.join(" | "));
    let head: Vec<String> = head.iter().map(|&h| h.to_owned()).collect();
    let mut table = line(&head);
    table += &format!("|{}\n", "---|".repeat(head.len()));
    for row in rows {
        assert_eq!(row.len(), head.len());
        table += &line(&row);
    }
    table
}

/// It is there, whole: another row, or one less, is another table.
fn assert_in_document(table: &str) {
    assert!(
        DOCUMENT.contains(&format!("\n\n{table}\n")),
        "docs/deadlines.md lacks this table, or has another:\n\n{table}"
    );
}

fn or_none<T>(value: Option<T>, f: impl FnOnce(T) -> String, none: &str) -> String {
    value.map_or_else(|| none.to_owned(), f)
}

fn id(rules: &Rules) -> String {
    format!("`{}`", rules.id)
}

#[test]
fn the_clocks() {
    assert_in_document(&table(
        &[
            "regime",
            "law",
            "answer",
            "extended: in all",
            "acknowledge",
            "opt-out",
        ],
        ALL.iter().map(|r| {
            vec![
                id(r),
                r.title.to_owned(),
                r.answer.period.to_string(),
                or_none(r.extension, |e| e.in_all.to_string(), "never"),
                or_none(r.acknowledge, |c| c.period.to_string(), "no duty"),
                if r.grants.contains(&Kind::OptOut) {
                    or_none(r.opt_out, |c| c.period.to_string(), "as an answer")
                } else {
                    "no right".to_owned()
                },
            ]
        }),
    ));
}

#[test]
fn where_they_are_written() {
    let none = "";
    assert_in_document(&table(
        &["regime", "answer", "extension", "acknowledge", "opt-out"],
        ALL.iter().map(|r| {
            vec![
                id(r),
                r.answer.citation.to_owned(),
                or_none(r.extension, |e| e.citation.to_owned(), none),
                or_none(r.acknowledge, |c| c.citation.to_owned(), none),
                or_none(r.opt_out, |c| c.citation.to_owned(), none),
            ]
        }),
    ));
}

#[test]
fn how_days_are_counted() {
    assert_in_document(&table(
        &[
            "regime",
            "first day of the answer",
            "received on the day in",
            "ends with the day in",
            "by",
        ],
        ALL.iter().map(|r| {
            vec![
                id(r),
                match r.answer.period.first {
                    FirstDay::Receipt => "of the receipt".to_owned(),
                    FirstDay::AfterReceipt => "after the receipt".to_owned(),
                },
                r.zones.received_in.to_owned(),
                r.zones.ends_in.to_owned(),
                r.counting.to_owned(),
            ]
        }),
    ));
}

#[test]
fn proof_and_deletion() {
    let may = |v| match v {
        Verification::Never => "never".to_owned(),
        Verification::OnDoubt => "on reasonable doubt".to_owned(),
        Verification::Allowed => "yes".to_owned(),
    };
    assert_in_document(&table(
        &[
            "regime",
            "kinds",
            "proof for requests",
            "proof for opt-outs",
            "by",
            "deletion reaches",
            "by",
        ],
        ALL.iter().map(|r| {
            let kinds: Vec<_> = r.grants.iter().map(ToString::to_string).collect();
            vec![
                id(r),
                kinds.join(", "),
                may(r.proof.requests),
                may(r.proof.opt_out),
                r.proof.citation.to_owned(),
                match r.deletion.scope {
                    Scope::FromThePerson => "what was collected from the person",
                    Scope::AboutThePerson => "what is held about the person",
                    Scope::AboutThePersonForGood => "that, inferences, and what comes back later",
                }
                .to_owned(),
                r.deletion.citation.to_owned(),
            ]
        }),
    ));
}

#[test]
fn examples() {
    let plain = |local: &str| local.replace(['T', '['], " ").replace(']', "");
    assert_in_document(&table(
        &[
            "received",
            "regime",
            "kind",
            "acknowledge by",
            "answer by",
            "extended to",
            "why",
        ],
        EXAMPLES.iter().map(|e| {
            vec![
                plain(e.received),
                id(super::super::rules(e.regime)),
                e.kind.to_string(),
                or_none(e.acknowledge, plain, ""),
                plain(e.answer),
                or_none(e.extended, plain, "never"),
                e.why.to_owned(),
            ]
        }),
    ));
}

#[test]
fn what_is_uncertain() {
    for r in ALL {
        let Some(uncertain) = r.uncertain else {
            continue;
        };
        let line = format!("\n- `{}`: {uncertain}\n", r.id);
        assert!(DOCUMENT.contains(&line), "docs/deadlines.md lacks:\n{line}");
    }
    let lines = DOCUMENT.lines().filter(|l| l.starts_with("- `")).count();
    assert_eq!(lines, ALL.iter().filter(|r| r.uncertain.is_some()).count());
}

#[test]
fn holidays_and_the_warning() {
    for holiday in US_FEDERAL.days {
        assert!(DOCUMENT.contains(holiday.name), "{}", holiday.name);
    }
    assert!(DOCUMENT.contains("not legal advice"));
}
