//! Sealing and opening, with keys in files as the kubelet leaves them.

use proptest::prelude::*;

use super::*;
use crate::api::rights_workflow::Regime;
use crate::rights::model::{Channel, Kind};

const TODAY: &str = "2026-11-29";

fn day(text: &str) -> Date {
    text.parse().unwrap()
}

fn keys(days: &[&str]) -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    let write = |name: &str| {
        let mut bytes = [0; KEY];
        SystemRandom::new().fill(&mut bytes).unwrap();
        std::fs::write(dir.path().join(name), bytes).unwrap();
    };
    write(HASH);
    for day in days {
        write(&format!("{EPOCH}{day}"));
    }
    dir
}

fn filing(identifiers: &[(&str, &str)]) -> Filing {
    Filing {
        id: Uuid::now_v7(),
        kind: Kind::Deletion,
        regimes: vec![Regime::EuGdpr, Regime::UsCaCcpa],
        identifiers: Identifiers(
            identifiers
                .iter()
                .map(|(n, v)| ((*n).to_owned(), (*v).to_owned()))
                .collect(),
        ),
        channel: Channel::Api,
        received_at: Timestamp::UNIX_EPOCH,
        needs_approval: false,
        idempotency_key: Some("key-1".to_owned()),
    }
}

fn seal(keyring: &Keyring, filing: &Filing) -> SealedFiling {
    keyring
        .seal_on(day(TODAY), filing, None, Timestamp::UNIX_EPOCH)
        .unwrap()
}

fn open(keyring: &Keyring, of: &SealedFiling) -> Result<Identifiers, SecrecyError> {
    keyring.open(of.id, of.key_epoch, &of.wrapped_key, &of.sealed)
}

fn contains(haystack: &[u8], needle: &str) -> bool {
    haystack
        .windows(needle.len())
        .any(|w| w == needle.as_bytes())
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn what_is_sealed_opens_and_shows_nothing(
        map in proptest::collection::btree_map("[a-z][A-Za-z0-9]{3,8}", "\\PC{4,80}", 1..5)
    ) {
        let dir = keys(&[TODAY]);
        let keyring = Keyring::read(dir.path()).unwrap();
        let mut it = filing(&[]);
        it.identifiers = Identifiers(map);
        let sealed = seal(&keyring, &it);
        for value in it.identifiers.0.values() {
            prop_assert!(!contains(&sealed.sealed, value));
            prop_assert!(!contains(&sealed.wrapped_key, value));
        }
        prop_assert_eq!(open(&keyring, &sealed).unwrap(), it.identifiers);
    }

    #[test]
    fn whoever_changes_a_byte_or_cuts_it_off_opens_nothing(byte in any::<prop::sample::Index>(), bit in 0..8_u8) {
        let dir = keys(&[TODAY]);
        let keyring = Keyring::read(dir.path()).unwrap();
        let sealed = seal(&keyring, &filing(&[("email", "a@example.org")]));
        fn inner(s: &mut SealedFiling) -> &mut Vec<u8> { &mut s.sealed }
        fn outer(s: &mut SealedFiling) -> &mut Vec<u8> { &mut s.wrapped_key }
        for of in [inner as fn(&mut SealedFiling) -> &mut Vec<u8>, outer] {
            let mut changed = sealed.clone();
            let bytes = of(&mut changed);
            let at = byte.index(bytes.len());
            bytes[at] ^= 1 << bit;
            prop_assert_eq!(open(&keyring, &changed), Err(SecrecyError::Sealed));
            let mut cut = sealed.clone();
            of(&mut cut).truncate(at);
            prop_assert_eq!(open(&keyring, &cut), Err(SecrecyError::Sealed));
        }
    }

    #[test]
    fn two_lists_of_parts_never_have_one_hash(
        a in proptest::collection::vec("[a-c,=]{0,3}", 0..4), b in proptest::collection::vec("[a-c,=]{0,3}", 0..4)
    ) {
        let dir = keys(&[]);
        let keys = Keys::read(dir.path()).unwrap();
        let digest = |of: &[String]| keys.digest("p", of.iter().map(String::as_str));
        prop_assert_eq!(a == b, digest(&a) == digest(&b));
    }
}

#[test]
fn nothing_opens_for_another_request_or_another_day() {
    let dir = keys(&[TODAY, "2026-11-28"]);
    let keyring = Keyring::read(dir.path()).unwrap();
    let one = seal(&keyring, &filing(&[("email", "a@example.org")]));
    let two = seal(&keyring, &filing(&[("email", "a@example.org")]));
    assert!(open(&keyring, &one).is_ok());
    let mut wrong = one.clone();
    wrong.id = two.id;
    assert_eq!(open(&keyring, &wrong), Err(SecrecyError::Sealed));
    let mut wrong = one.clone();
    wrong.sealed = two.sealed;
    assert_eq!(open(&keyring, &wrong), Err(SecrecyError::Sealed));
    let mut wrong = one.clone();
    wrong.key_epoch = day("2026-11-28");
    assert_eq!(open(&keyring, &wrong), Err(SecrecyError::Sealed));
    // The same person is the same by hash, and by nothing else.
    assert_eq!((one.subject, one.hashes), (two.subject, two.hashes));
    assert_ne!(one.wrapped_key[1..], two.wrapped_key[1..]);
}

#[test]
fn the_same_content_is_the_same_whatever_the_order_and_the_time() {
    let dir = keys(&[TODAY]);
    let keyring = Keyring::read(dir.path()).unwrap();
    let first = filing(&[("email", "a@example.org"), ("customerId", "12")]);
    let of = |filing: &Filing| seal(&keyring, filing).content;
    let content = of(&first);
    let mut again = first.clone();
    again.id = Uuid::now_v7();
    again.regimes = vec![Regime::UsCaCcpa, Regime::EuGdpr, Regime::EuGdpr];
    again.received_at = "2026-11-29T10:00:00Z".parse().unwrap();
    assert_eq!(of(&again), content);
    let mut other = first.clone();
    other.regimes = vec![Regime::EuGdpr];
    assert_ne!(of(&other), content);
    let mut other = first.clone();
    other.kind = Kind::Access;
    assert_ne!(of(&other), content);
    let mut other = first.clone();
    other.channel = Channel::Agent;
    assert_ne!(of(&other), content);
    let mut other = first;
    other.identifiers.0.insert("customerId".into(), "13".into());
    assert_ne!(of(&other), content);
}

#[test]
fn the_length_says_little() {
    let dir = keys(&[TODAY]);
    let keyring = Keyring::read(dir.path()).unwrap();
    let length = |value: &str| seal(&keyring, &filing(&[("email", value)])).sealed.len();
    assert_eq!(length("a@b.c"), length("somebody@example.org"));
}

#[test]
fn a_new_key_is_used_without_a_restart_and_a_destroyed_one_opens_nothing() {
    let dir = keys(&["2026-11-28"]);
    let keyring = Keyring::read(dir.path()).unwrap();
    let it = filing(&[("email", "a@example.org")]);
    // Today's isn't there yet: yesterday's serves.
    let old = seal(&keyring, &it);
    assert_eq!(old.key_epoch, day("2026-11-28"));
    std::fs::write(dir.path().join("epoch-2026-11-29"), [7; KEY]).unwrap();
    assert_eq!(seal(&keyring, &it).key_epoch, day(TODAY));
    std::fs::remove_file(dir.path().join("epoch-2026-11-28")).unwrap();
    // Once it is known that it's gone.
    keyring.keys(Duration::ZERO);
    assert_eq!(
        open(&keyring, &old),
        Err(SecrecyError::KeyGone(day("2026-11-28")))
    );
    // A late clock finds tomorrow's key; a key of two days ago is none to begin with.
    let on = |d: &str| keyring.seal_on(day(d), &it, None, Timestamp::UNIX_EPOCH);
    assert!(on("2026-11-28").is_ok() && on("2026-11-30").is_ok());
    assert_eq!(
        on("2026-12-01"),
        Err(SecrecyError::NoKey(day("2026-12-01")))
    );
    // A directory that is gone for the moment.
    std::fs::remove_file(dir.path().join(HASH)).unwrap();
    keyring.keys(Duration::ZERO);
    assert_eq!(seal(&keyring, &it).key_epoch, day(TODAY));
}

#[test]
fn what_is_no_key_is_refused_in_clear_words() {
    let refused = |dir: &tempfile::TempDir| format!("{:#}", Keyring::read(dir.path()).unwrap_err());
    let dir = keys(&[TODAY]);
    std::fs::write(dir.path().join(format!("{EPOCH}{TODAY}")), [b'k'; 44]).unwrap();
    let words = refused(&dir);
    assert!(
        words.contains("has 44 bytes and must have 32") && words.contains(TODAY),
        "{words}"
    );
    assert!(!words.contains("kkk"), "{words}");
    let dir = keys(&["someday"]);
    assert!(refused(&dir).contains("named after no day"));
    let dir = keys(&[TODAY]);
    std::fs::remove_file(dir.path().join(HASH)).unwrap();
    assert!(refused(&dir).contains("hash isn't there"));
    // What else the kubelet has there is none of ours.
    let dir = keys(&[TODAY]);
    std::fs::create_dir(dir.path().join("..2026_11_29")).unwrap();
    assert!(Keyring::read(dir.path()).is_ok());
    assert_eq!(
        format!("{:?}", Keyring::read(dir.path()).unwrap()),
        "Keyring(..)"
    );
}
