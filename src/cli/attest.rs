//! `kubectl domicile attest STORE` and `kubectl domicile verify FILE`: what was seen of a store where, and whether
//! that is what the operator signed.
//!
//! Owns the words and the file. `attest` reads one ConfigMap, so that it works while the operator is down and after
//! the store is gone; `verify` reads files only. Neither shows an entry that doesn't hold as if it did.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, bail, ensure};
use k8s_openapi::api::core::v1::ConfigMap;
use kube::{Api, Client};

use super::status::columns;
use crate::api::names;
use crate::operator::store::attest::Kept;
use crate::residency::attestation::chain::{self, Broken, Checked, Export, Known};
use crate::residency::attestation::seal::PublicKey;
use crate::residency::attestation::{Body, Content, Finding, Verdict};

/// What `attest` is told.
#[derive(Clone, Debug, Default, clap::Args)]
#[group(id = "attest-options")]
pub struct Attest {
    /// List every entry that is kept, not only the newest.
    #[arg(long, conflicts_with = "output")]
    pub all: bool,
    /// Write the whole chain with its public keys to this file, for `verify`.
    #[arg(short, long, value_name = "FILE")]
    pub output: Option<PathBuf>,
}

/// What `verify` is told.
#[derive(Clone, Debug, Default, clap::Args)]
pub struct Verify {
    /// A file that `attest -o` wrote.
    pub file: PathBuf,
    /// A key that you know to be the operator's: a file with the public key in PEM, or its id (64 hex digits). May be
    /// repeated.
    #[arg(long = "key", value_name = "PEM|ID")]
    pub keys: Vec<String>,
    /// Hash of the entry that must be the last: without it, entries missing at the end can't be noticed.
    #[arg(long, value_name = "HASH")]
    pub head: Option<String>,
    /// Hash of the last entry of the file fetched before: the new file must hold it, or begin right behind it.
    #[arg(long, value_name = "HASH")]
    pub since: Option<String>,
}

/// Shows the newest attestation or all, or writes them to a file.
///
/// # Errors
/// If there are none, they can't be read, or they don't hold.
pub async fn attest(
    client: Client,
    namespace: &str,
    store: &str,
    args: Attest,
) -> anyhow::Result<String> {
    let name = names::attestations(store);
    let maps: Api<ConfigMap> = Api::namespaced(client, namespace);
    let found = maps
        .get_opt(&name)
        .await
        .context("the API server can't be asked")?;
    let Some(found) = found else {
        bail!(
            "there is no ConfigMap {name} in namespace {namespace}: the store {store} doesn't exist, or was not attested yet; its condition Attested says why (`kubectl domicile status {store}`)"
        );
    };
    let kept = Kept::of(&found)
        .entries()
        .with_context(|| format!("ConfigMap {name} holds something that isn't an attestation"))?;
    let export = Export::new(kept.envelopes, &kept.keys);
    let checked = chain::verify(&export, &Known::default());
    if let Some(file) = args.output {
        let text = serde_json::to_string_pretty(&export)?;
        std::fs::write(&file, text + "\n")
            .with_context(|| format!("can't write {}", file.display()))?;
        let checked =
            checked.with_context(|| format!("{} is written, but does not hold", file.display()))?;
        return Ok(summary(&file, &checked, &Known::default()));
    }
    let checked = checked.with_context(|| {
        format!("ConfigMap {name} does not hold; `-o FILE` writes it as it is, for evidence")
    })?;
    Ok(if args.all {
        list(&checked)
    } else {
        newest(&checked)
    })
}

/// Checks a file offline.
///
/// # Errors
/// If it can't be read, or anything in it doesn't hold: which entry, and why.
pub fn verify(args: &Verify) -> anyhow::Result<String> {
    let known = Known {
        keys: args
            .keys
            .iter()
            .map(|k| key_id(k))
            .collect::<Result<_, _>>()?,
        head: args
            .head
            .as_deref()
            .map(|h| hash("--head", h))
            .transpose()?,
        since: args
            .since
            .as_deref()
            .map(|h| hash("--since", h))
            .transpose()?,
    };
    let text = std::fs::read_to_string(&args.file)
        .with_context(|| format!("can't read {}", args.file.display()))?;
    let checked =
        check(&text, &known).with_context(|| format!("{} does NOT hold", args.file.display()))?;
    Ok(summary(&args.file, &checked, &known))
}

/// Checks a file's text.
fn check(text: &str, known: &Known) -> anyhow::Result<Vec<Checked>> {
    let export: Export = serde_json::from_str(text).map_err(|e| {
        Broken::File(format!(
            "it isn't a file of attestations, or was changed: {e}"
        ))
    })?;
    Ok(chain::verify(&export, known)?)
}

fn is_hash(text: &str) -> bool {
    text.len() == 64 && text.bytes().all(|b| b.is_ascii_hexdigit())
}

fn hash(option: &str, text: &str) -> anyhow::Result<String> {
    ensure!(
        is_hash(text),
        "{option} takes a hash of 64 hex digits, as `verify` prints it"
    );
    Ok(text.to_ascii_lowercase())
}

/// The id of a key that is given by its file or by its id.
fn key_id(given: &str) -> anyhow::Result<String> {
    if is_hash(given) {
        return Ok(given.to_ascii_lowercase());
    }
    let text = std::fs::read_to_string(given).with_context(|| {
        format!(
            "--key takes a key's id (64 hex digits) or a file with it in PEM; can't read {given}"
        )
    })?;
    let key = PublicKey::from_pem(&text).with_context(|| given.to_owned())?;
    Ok(key.id())
}

/// What holds, and what that rests on.
fn summary(file: &Path, checked: &[Checked], known: &Known) -> String {
    let mut out = String::new();
    let (Some(first), Some(last)) = (checked.first(), checked.last()) else {
        return out;
    };
    let count = |v: Verdict| checked.iter().filter(|c| c.content.verdict == v).count();
    let store = &last.statement.store;
    // Writing to a String can't fail.
    let _ = writeln!(
        out,
        "{}: {} of {}/{} {}",
        file.display(),
        entries(checked.len()),
        store.namespace,
        store.name,
        if checked.len() == 1 { "holds" } else { "hold" },
    );
    let _ = writeln!(
        out,
        "  entries   {} to {}, {} to {}",
        first.statement.sequence,
        last.statement.sequence,
        first.statement.observed_at,
        last.statement.observed_at
    );
    let _ = writeln!(
        out,
        "  verdicts  {} within, {} unknown, {} outside",
        count(Verdict::Within),
        count(Verdict::Unknown),
        count(Verdict::Outside)
    );
    for (key, range) in signers(checked) {
        let how = if known.keys.contains(&key) {
            "given by you"
        } else if first.key == key {
            "taken from the file"
        } else {
            "introduced by an entry signed with the one before"
        };
        let _ = writeln!(out, "  key       {key} signs {range}: {how}");
    }
    let _ = writeln!(
        out,
        "  head      {} is the last entry's hash{}",
        last.hash,
        match &known.head {
            Some(_) => ", as you said",
            None => "",
        }
    );
    match &first.statement.previous {
        Some(previous) => {
            let _ = writeln!(
                out,
                "  before    {previous} is the hash of the entry before the first"
            );
        }
        None => {
            let _ = writeln!(out, "  before    the first entry follows none");
        }
    }
    out.push_str(&notes(checked));
    if known.keys.is_empty() {
        let _ = writeln!(
            out,
            "\nThe key was taken from the file, so this shows only that whoever has that key made all of it. Compare its id\nwith the one that the operator publishes (ConfigMap {} in its namespace), then give it with --key.",
            names::ATTESTATION_KEYS
        );
    }
    if known.head.is_none() {
        let _ = writeln!(
            out,
            "\nEntries missing at the end can't be noticed from the file alone: compare head with what the operator logged,\nor give it with --head. Next time give it with --since."
        );
    }
    out
}

fn entries(count: usize) -> String {
    match count {
        1 => "1 entry".to_owned(),
        n => format!("{n} entries"),
    }
}

/// Which key signs which entries, in their order.
fn signers(checked: &[Checked]) -> Vec<(String, String)> {
    let mut order: Vec<&str> = Vec::new();
    let mut numbers: BTreeMap<&str, (u64, u64)> = BTreeMap::new();
    for entry in checked {
        let sequence = entry.statement.sequence;
        if !numbers.contains_key(entry.key.as_str()) {
            order.push(&entry.key);
        }
        let range = numbers.entry(&entry.key).or_insert((sequence, sequence));
        range.1 = sequence;
    }
    let words = |(first, last): (u64, u64)| {
        if first == last {
            format!("{first}")
        } else {
            format!("{first} to {last}")
        }
    };
    order
        .into_iter()
        .filter_map(|key| Some((key.to_owned(), words(*numbers.get(key)?))))
        .collect()
}

/// What entries say of their place in the chain.
fn notes(checked: &[Checked]) -> String {
    let mut out = String::new();
    for entry in checked {
        if let Some(note) = &entry.statement.note {
            let _ = writeln!(
                out,
                "  note      entry {}: {note}",
                entry.statement.sequence
            );
        }
    }
    out
}

/// One line per entry.
fn list(checked: &[Checked]) -> String {
    let mut rows = vec![["ENTRY", "OBSERVED", "VERDICT", "FOUND", "HASH", ""].map(str::to_owned)];
    for entry in checked {
        let statement = &entry.statement;
        let what = match &statement.content {
            Body::Full(_) => format!("{} copies and channels", entry.content.findings.len()),
            Body::Same(full) => format!("as in entry {}", full.sequence),
        };
        rows.push([
            statement.sequence.to_string(),
            statement.observed_at.to_string(),
            entry.content.verdict.to_string(),
            what,
            entry.hash.clone(),
            statement.note.clone().unwrap_or_default(),
        ]);
    }
    columns(&rows)
}

/// The newest entry in words.
fn newest(checked: &[Checked]) -> String {
    let mut out = String::new();
    let (Some(first), Some(last)) = (checked.first(), checked.last()) else {
        return out;
    };
    let Checked {
        statement, content, ..
    } = last;
    let _ = writeln!(
        out,
        "{}/{}  entry {}, observed {}",
        statement.store.namespace, statement.store.name, statement.sequence, statement.observed_at
    );
    let _ = writeln!(out, "  verdict  {}", verdict_words(content));
    match (&content.policy, &content.not_applied) {
        (Some(policy), _) => {
            let citation = if policy.citation.is_empty() {
                String::new()
            } else {
                format!(": {}", policy.citation)
            };
            let _ = writeln!(
                out,
                "  policy   {}, generation {} (basis {}{citation})",
                policy.name, policy.generation, policy.basis
            );
            for permit in &policy.permits {
                let _ = writeln!(
                    out,
                    "           {} in {}",
                    permit.data,
                    permit.regions.join(", ")
                );
            }
        }
        (None, why) => {
            let _ = writeln!(
                out,
                "  policy   none applies: {}",
                why.as_deref().unwrap_or("-")
            );
        }
    }
    let _ = writeln!(
        out,
        "  signed   with key {} by {} ({})",
        last.key, statement.operator, statement.program
    );
    let _ = writeln!(
        out,
        "  kept     entries {} to {}; the last one's hash is {}",
        first.statement.sequence, statement.sequence, last.hash
    );
    if content.deleting {
        let _ = writeln!(
            out,
            "  store    was being deleted: volumes that are listed were left behind, unless a later store took them up"
        );
    }
    if let Some(note) = &statement.note {
        let _ = writeln!(out, "  note     {note}");
    }
    out.push('\n');
    out.push_str(&findings(&content.findings));
    out.push('\n');
    let mut rows = vec![["NOT OBSERVED", "WHY"].map(str::to_owned)];
    // What should have been seen comes first.
    let (now, standing): (Vec<_>, Vec<_>) = content.unobserved.iter().partition(|u| !u.standing);
    for unobserved in now.into_iter().chain(standing) {
        let of = unobserved.subject.as_deref();
        rows.push([
            of.map_or_else(
                || unobserved.kind.to_string(),
                |of| format!("{} of {of}", unobserved.kind),
            ),
            unobserved.why.clone(),
        ]);
    }
    out.push_str(&columns(&rows));
    out
}

fn verdict_words(content: &Content) -> &'static str {
    match content.verdict {
        Verdict::Within => "within: everything that was found is where the policy permits it",
        Verdict::Unknown => "unknown: not everything could be seen or judged",
        Verdict::Outside => "OUTSIDE: something is where the policy does not permit it",
    }
}

fn findings(findings: &[Finding]) -> String {
    let mut rows = vec![
        [
            "WHAT", "NAME", "REGION", "ZONE", "NODE", "VERDICT", "SEEN BY",
        ]
        .map(str::to_owned),
    ];
    let or = |text: &Option<String>| text.clone().unwrap_or_else(|| "-".to_owned());
    for finding in findings {
        let seen: Vec<String> = finding.observed.iter().map(ToString::to_string).collect();
        rows.push([
            finding.kind.to_string(),
            finding.name.clone(),
            or(&finding.place.region),
            or(&finding.place.zone),
            or(&finding.place.node),
            finding.verdict.to_string(),
            seen.join("; "),
        ]);
    }
    let mut out = columns(&rows);
    // Several findings may have the same reason: a channel has that of the copy it leads to.
    let mut said = BTreeSet::new();
    for finding in findings {
        if let Some(because) = &finding.because
            && said.insert(because)
        {
            let _ = writeln!(out, "  {} {}: {because}", finding.kind, finding.name);
        }
    }
    out
}

#[cfg(test)]
mod tests;
