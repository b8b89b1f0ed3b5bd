use super::*;
use crate::api::PrivacyDataStore;
use kube::CustomResourceExt;
use proptest::prelude::*;

fn map(pairs: &[(&str, &str)]) -> BTreeMap<String, String> {
    pairs
        .iter()
        .map(|(k, v)| ((*k).to_owned(), (*v).to_owned()))
        .collect()
}

fn rendered(major: u32, user: &BTreeMap<String, String>, floors: &BTreeMap<String, u64>) -> String {
    render(&Input {
        major,
        instance: "s-1",
        listen: "*",
        port: 5432,
        run: Path::new("/run/domicile"),
        detection_seconds: 3,
        volume_bytes: 10 * 1024 * MEGABYTE,
        user,
        floors,
    })
}

/// The last value of a parameter, which is the one PostgreSQL takes.
fn value<'a>(conf: &'a str, name: &str) -> Option<&'a str> {
    conf.lines()
        .filter_map(|l| l.split_once(" = "))
        .filter(|(k, _)| *k == name)
        .map(|(_, v)| v.trim_matches('\''))
        .next_back()
}

#[test]
fn the_whole_file() {
    let conf = rendered(17, &map(&[("shared_buffers", "256MB")]), &BTreeMap::new());
    assert_eq!(conf, include_str!("../testdata/postgresql.conf"));
}

#[test]
fn versions_differ_in_what_they_know() {
    let none = BTreeMap::new();
    let floors = BTreeMap::new();
    assert_eq!(
        value(&rendered(15, &none, &floors), "reserved_connections"),
        None
    );
    assert_eq!(
        value(&rendered(16, &none, &floors), "allow_alter_system"),
        None
    );
    let newest = rendered(18, &none, &floors);
    assert_eq!(value(&newest, "allow_alter_system"), Some("off"));
    assert_eq!(value(&newest, "idle_replication_slot_timeout"), Some("0"));
}

#[test]
fn a_user_parameter_replaces_a_suggestion() {
    let conf = rendered(17, &map(&[("tcp_keepalives_idle", "60")]), &BTreeMap::new());
    assert_eq!(value(&conf, "tcp_keepalives_idle"), Some("60"));
    assert_eq!(conf.matches("tcp_keepalives_idle").count(), 1);
}

#[test]
fn wal_that_is_kept_ready_follows_the_volume() {
    let ready = |gibibytes: u64| ready_wal_megabytes(gibibytes * 1024 * MEGABYTE);
    assert_eq!([1, 8, 100].map(ready), [80, 512, 1024]);
    let own = rendered(17, &map(&[("min_wal_size", "2GB")]), &BTreeMap::new());
    assert_eq!(own.matches("min_wal_size").count(), 1);
    assert_eq!(value(&own, "min_wal_size"), Some("2GB"));
}

#[test]
fn reserved_parameters_are_left_out_and_named() {
    let (kept, ignored) = split(&map(&[
        ("fsync", "off"),
        ("auto_explain.log_min_duration", "0"),
        ("include", "/etc/passwd"),
        ("work_mem", "8MB"),
        ("bad name", "1"),
        ("jit", "off\nfsync = off"),
    ]));
    assert_eq!(kept, map(&[("work_mem", "8MB")]));
    assert_eq!(
        ignored,
        [
            "auto_explain.log_min_duration",
            "bad name",
            "fsync",
            "include",
            "jit"
        ]
    );
}

#[test]
fn what_the_schema_refuses_is_reserved_here_too() {
    let crd = serde_json::to_string(&PrivacyDataStore::crd()).unwrap();
    let list = crd
        .split("k in [")
        .nth(1)
        .and_then(|s| s.split(']').next())
        .unwrap();
    let names: Vec<_> = list
        .split(',')
        .map(|n| n.trim().trim_matches('\''))
        .collect();
    assert!(names.len() > 40, "{names:?}");
    for name in names {
        assert!(RESERVED.contains(&name), "{name}");
    }
}

#[test]
fn a_standby_has_at_least_what_its_primary_had() {
    let floors: BTreeMap<String, u64> = [
        ("max_connections", 300),
        ("max_prepared_xacts", 10),
        ("max_worker_processes", 8),
        ("max_wal_senders", 30),
    ]
    .into_iter()
    .map(|(k, v)| (k.to_owned(), v))
    .collect();
    let conf = rendered(17, &map(&[("max_connections", "200")]), &floors);
    assert_eq!(value(&conf, "max_connections"), Some("300"));
    assert_eq!(value(&conf, "max_prepared_transactions"), Some("10"));
    assert_eq!(value(&conf, "max_worker_processes"), None);
    assert_eq!(value(&conf, "max_wal_senders"), Some("30"));
    let conf = rendered(17, &map(&[("max_connections", "400")]), &floors);
    assert_eq!(value(&conf, "max_connections"), Some("400"));
}

#[test]
fn the_upstream_file() {
    assert_eq!(
        upstream(None, "s_2"),
        "# Written by Domicile; changes are overwritten.\nprimary_conninfo = ''\nprimary_slot_name = ''\n\
         max_standby_streaming_delay = 0\nmax_standby_archive_delay = 0\n"
    );
    let text = upstream(Some("host='s-1' hostaddr='10.0.0.1'"), "s_2");
    assert!(text.contains("primary_conninfo = 'host=''s-1'' hostaddr=''10.0.0.1''"));
    assert!(text.ends_with("primary_slot_name = 's_2'\n"));
}

proptest! {
    #[test]
    fn no_value_leaves_its_line(value in "\\PC{0,30}", extra in "[\n\r'\\\\]{0,4}") {
        let quoted = quote(&format!("{value}{extra}"));
        prop_assert!(!quoted.contains('\n') && !quoted.contains('\r'));
        // Inside the quotes, quotes come in pairs and no backslash stands before the last one alone.
        let inner = &quoted[1..quoted.len() - 1];
        let mut chars = inner.chars().peekable();
        while let Some(c) = chars.next() {
            match c {
                '\'' => prop_assert_eq!(chars.next(), Some('\'')),
                '\\' => prop_assert!(chars.next().is_some()),
                _ => {}
            }
        }
    }

    #[test]
    fn no_user_parameter_beats_a_fixed_one(name in "[a-z_]{1,12}", which in 0usize..RESERVED.len()) {
        let user = map(&[(RESERVED[which], "evil"), (name.as_str(), "evil")]);
        let (kept, _) = split(&user);
        let conf = rendered(17, &kept, &BTreeMap::new());
        for reserved in RESERVED {
            prop_assert_ne!(value(&conf, reserved), Some("evil"));
        }
    }
}
