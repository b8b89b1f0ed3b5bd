use super::*;
use crate::api::residency_policy::{Basis, Data};
use crate::residency::attestation::chain::{Maker, Tail, next};
use crate::residency::attestation::seal::{Envelope, NamedKey, SigningKey};
use crate::residency::attestation::{
    Kind, Observation, Permitted, Place, PolicyRef, Source, StoreRef, Unobserved,
};
use jiff::{SignedDuration, Timestamp};

fn content(verdict: Verdict) -> Content {
    let see = |by, of: &str, says: &str| Observation {
        by,
        of: of.into(),
        says: says.into(),
    };
    Content {
        verdict,
        deleting: false,
        policy: Some(PolicyRef {
            name: "california-records".into(),
            uid: "u".into(),
            generation: 3,
            spec_digest: "d".into(),
            basis: Basis::Policy,
            citation: "Records policy 12".into(),
            permits: vec![Permitted {
                data: Data::Standby,
                regions: vec!["us-east".into(), "us-west".into()],
            }],
        }),
        not_applied: None,
        regions: vec![],
        findings: vec![
            Finding {
                kind: Kind::Instance,
                name: "consumers-1".into(),
                data: Some(Data::Primary),
                place: Place {
                    node: Some("w1".into()),
                    region: Some("us-west".into()),
                    zone: Some("us-west-2a".into()),
                    leads_to: None,
                },
                observed: vec![
                    see(Source::PodBinding, "pod consumers-1", "node w1"),
                    see(Source::ProviderId, "node w1", "cloud://us-west/w1"),
                ],
                verdict: Verdict::Within,
                because: None,
            },
            Finding {
                kind: Kind::Standby,
                name: "consumers-1 to stranger-1".into(),
                data: None,
                place: Place::default(),
                observed: vec![see(
                    Source::PgStatReplication,
                    "consumers-1",
                    "stranger-1 streams",
                )],
                verdict,
                because: Some("it is nobody's".into()),
            },
        ],
        unobserved: vec![
            Unobserved {
                kind: Kind::Backup,
                subject: None,
                why: "Domicile makes none".into(),
                standing: true,
            },
            Unobserved {
                kind: Kind::ReplicationSlot,
                subject: Some("consumers-2".into()),
                why: "it did not answer".into(),
                standing: false,
            },
        ],
    }
}

/// Three entries; the second introduces another key, and something is outside in the third.
fn export() -> Export {
    let (old, new) = (SigningKey::of_seed(1), SigningKey::of_seed(2));
    let steps = [
        (&old, None, Verdict::Within),
        (&old, Some(NamedKey::from(&new.public())), Verdict::Within),
        (&new, None, Verdict::Outside),
    ];
    let mut tail: Option<Tail> = None;
    let mut entries: Vec<Envelope> = Vec::new();
    for (hour, (signer, introduces, verdict)) in steps.into_iter().enumerate() {
        let maker = Maker {
            program: "domicile 0.1.0".into(),
            operator: "operator-1".into(),
            store: StoreRef {
                namespace: "records".into(),
                name: "consumers".into(),
                uid: "u".into(),
            },
            now: Timestamp::UNIX_EPOCH + SignedDuration::from_hours(i64::try_from(hour).unwrap()),
        };
        let note = (hour == 0).then(|| "nothing was kept before".to_owned());
        let statement = next(tail.as_ref(), content(verdict), maker, note, introduces);
        let envelope = signer.sign(&statement).unwrap();
        tail = Some(Tail::after(tail.as_ref(), &envelope, &statement).unwrap());
        entries.push(envelope);
    }
    let keys = [&old, &new].map(|k| (k.public().id(), k.public())).into();
    Export::new(entries, &keys)
}

fn squeeze(text: &str) -> Vec<String> {
    text.lines()
        .map(|l| l.split_whitespace().collect::<Vec<_>>().join(" "))
        .collect()
}

/// Hashes and ids vary with every word of the document; these are the ones that it has now.
fn named(text: &str, checked: &[Checked]) -> String {
    let mut text = text.to_owned();
    for (i, entry) in checked.iter().enumerate() {
        text = text.replace(&entry.hash, &format!("HASH{}", i + 1));
    }
    for (i, seed) in [1, 2].into_iter().enumerate() {
        text = text.replace(
            &SigningKey::of_seed(seed).public().id(),
            &format!("KEY{}", i + 1),
        );
    }
    text
}

fn checked() -> Vec<Checked> {
    chain::verify(&export(), &Known::default()).unwrap()
}

#[test]
fn the_newest_in_words() {
    let checked = checked();
    let expected = "\
records/consumers  entry 3, observed 1970-01-01T02:00:00Z
  verdict  OUTSIDE: something is where the policy does not permit it
  policy   california-records, generation 3 (basis Policy: Records policy 12)
           Standby in us-east, us-west
  signed   with key KEY2 by operator-1 (domicile 0.1.0)
  kept     entries 1 to 3; the last one's hash is HASH3

  WHAT      NAME                       REGION   ZONE        NODE  VERDICT  SEEN BY
  instance  consumers-1                us-west  us-west-2a  w1    within   pod consumers-1 is bound to node w1; providerID cloud://us-west/w1 of node w1
  standby   consumers-1 to stranger-1  -        -           -     OUTSIDE  pg_stat_replication of consumers-1: stranger-1 streams
  standby consumers-1 to stranger-1: it is nobody's

  NOT OBSERVED                     WHY
  replication slot of consumers-2  it did not answer
  backups                          Domicile makes none
";
    assert_eq!(
        squeeze(&named(&newest(&checked), &checked)),
        squeeze(expected)
    );
}

#[test]
fn all_in_a_line_each() {
    let checked = checked();
    let expected = "\
  ENTRY  OBSERVED              VERDICT  FOUND                  HASH
  1      1970-01-01T00:00:00Z  within   2 copies and channels  HASH1  nothing was kept before
  2      1970-01-01T01:00:00Z  within   as in entry 1          HASH2
  3      1970-01-01T02:00:00Z  OUTSIDE  2 copies and channels  HASH3
";
    assert_eq!(
        squeeze(&named(&list(&checked), &checked)),
        squeeze(expected)
    );
}

struct Folder(tempfile::TempDir);

impl Folder {
    fn new() -> Self {
        Self(tempfile::tempdir().unwrap())
    }

    fn file(&self, name: &str, text: &str) -> PathBuf {
        let path = self.0.path().join(name);
        std::fs::write(&path, text).unwrap();
        path
    }
}

fn written() -> String {
    serde_json::to_string_pretty(&export()).unwrap()
}

fn ask(file: PathBuf, keys: &[&str], head: Option<&str>) -> Result<String, String> {
    let args = Verify {
        file,
        keys: keys.iter().map(|&k| k.to_owned()).collect(),
        head: head.map(str::to_owned),
        since: None,
    };
    verify(&args).map_err(|e| format!("{e:#}"))
}

#[test]
fn a_file_is_checked_and_what_that_rests_on_is_said() {
    let folder = Folder::new();
    let file = folder.file("a.json", &written());
    let checked = checked();
    let said = ask(file.clone(), &[], None).unwrap();
    let said = named(&said.replace(&file.display().to_string(), "FILE"), &checked);
    let expected = "\
FILE: 3 entries of records/consumers hold
  entries   1 to 3, 1970-01-01T00:00:00Z to 1970-01-01T02:00:00Z
  verdicts  2 within, 0 unknown, 1 outside
  key       KEY1 signs 1 to 2: taken from the file
  key       KEY2 signs 3: introduced by an entry signed with the one before
  head      HASH3 is the last entry's hash
  before    the first entry follows none
  note      entry 1: nothing was kept before

The key was taken from the file, so this shows only that whoever has that key made all of it. Compare its id
with the one that the operator publishes (ConfigMap domicile-attestation-keys in its namespace), then give it with --key.

Entries missing at the end can't be noticed from the file alone: compare head with what the operator logged,
or give it with --head. Next time give it with --since.
";
    assert_eq!(squeeze(&said), squeeze(expected));

    let pem = folder.file("key.pem", &SigningKey::of_seed(1).public().to_pem());
    let by_file = ask(
        file.clone(),
        &[&pem.display().to_string()],
        Some(&checked[2].hash),
    )
    .unwrap();
    let by_id = ask(
        file,
        &[&SigningKey::of_seed(1).public().id().to_uppercase()],
        Some(&checked[2].hash),
    )
    .unwrap();
    assert_eq!(by_file, by_id);
    assert!(by_file.contains("signs 1 to 2: given by you") && by_file.contains("as you said"));
    assert!(!by_file.contains("can't be noticed") && !by_file.contains("taken from"));
}

#[test]
fn what_does_not_hold_is_refused_with_the_entry_and_the_reason() {
    let folder = Folder::new();
    let good = written();
    let file = folder.file("a.json", &good);
    let of = |keys: &[&str], head: Option<&str>| ask(file.clone(), keys, head).unwrap_err();
    let why = of(&[&SigningKey::of_seed(3).public().id()], None);
    assert!(
        why.contains(
            "does NOT hold: entry 1 of the file (it says of itself: 1): it is signed with key"
        ) && why.ends_with("which is none of those that you gave"),
        "{why}"
    );
    let why = of(&[], Some(&"0".repeat(64)));
    assert!(why.contains("entries are missing at the end"), "{why}");
    let why = of(&["nosuch.pem"], None);
    assert!(why.contains("can't read nosuch.pem"), "{why}");
    let pem = folder.file(
        "private.pem",
        "-----BEGIN PRIVATE KEY-----\n-----END PRIVATE KEY-----\n",
    );
    assert!(of(&[&pem.display().to_string()], None).contains("not an Ed25519 public key"));

    // The last character of the second entry's signature's first group.
    let mut changed = export();
    let sig = &mut changed.entries[1].signatures[0].sig;
    let other = if sig.starts_with('A') { "B" } else { "A" };
    sig.replace_range(0..1, other);
    let text = serde_json::to_string(&changed).unwrap();
    let why = ask(folder.file("b.json", &text), &[], None).unwrap_err();
    assert!(
        why.contains("entry 2 of the file (it says of itself: 2): the signature does not fit"),
        "{why}"
    );
    let why = ask(folder.file("c.json", "{}"), &[], None).unwrap_err();
    assert!(why.contains("it isn't a file of attestations"), "{why}");
    let why = ask(folder.file("d.json", &good[..good.len() / 2]), &[], None).unwrap_err();
    assert!(why.contains("or was changed"), "{why}");
}
