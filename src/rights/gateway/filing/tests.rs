use super::*;
use proptest::prelude::*;
use serde_json::json;

fn workflow() -> Workflow {
    serde_json::from_value(json!({
        "name": "consumers", "namespace": "records",
        "regimes": ["us-ca-ccpa", "eu-gdpr"],
        "identifiers": ["customerId", "email"],
        "promptnessSeconds": 10, "closedRequestsMonths": 24,
        "ledger": {"hosts": ["s-1"], "port": 5432, "name": "rights-consumers"},
        "targets": [{"name": "accounts", "regions": ["here"], "system": {"type": "PostgreSQL",
            "erase": [{"table": "customer", "where": {"id": "customerId"}}]}}],
    }))
    .unwrap()
}

fn now() -> Timestamp {
    "2026-03-01T12:00:00Z".parse().unwrap()
}

fn of(body: Value) -> Result<Filing, Vec<Fault>> {
    check(body, "", &workflow(), now(), Uuid::nil())
}

#[test]
fn what_is_left_out_has_a_meaning() {
    let filing = of(json!({"kind": "deletion", "identifiers": {"customerId": "1"}})).unwrap();
    assert_eq!(filing.regimes, workflow().regimes);
    assert_eq!(filing.channel, Channel::Api);
    assert_eq!(filing.received_at, now());
    assert!(!filing.needs_approval);
    let nulls = json!({"kind": "deletion", "identifiers": {"customerId": "1"}, "regimes": null,
        "channel": null, "receivedAt": null, "needsApproval": null});
    assert_eq!(of(nulls).unwrap(), filing);
}

#[test]
fn all_that_is_wrong_is_said_at_once() {
    let faults = of(json!({"identifiers": {"phone": "1"}, "channel": 3, "x": 1})).unwrap_err();
    let found: Vec<_> = faults
        .iter()
        .map(|f| (f.kind, f.pointer.as_str()))
        .collect();
    let wanted = [
        (Trouble::MissingField, ""),
        (Trouble::UnknownIdentifier, "/identifiers"),
        (Trouble::WrongType, "/channel"),
        (Trouble::UnknownField, ""),
    ];
    assert_eq!(found, wanted);
}

#[test]
fn the_bounds_of_time() {
    let at = |ago: i64| {
        let received = Timestamp::from_second(now().as_second() - ago).unwrap();
        of(json!({"kind": "deletion", "identifiers": {"customerId": "1"}, "receivedAt": received}))
            .is_ok()
    };
    let days = 86_400;
    assert!(at(0) && at(-60) && at(90 * days));
    assert!(!at(-61) && !at(90 * days + 1));
}

#[test]
fn the_same_regime_twice_is_one() {
    let body = json!({"kind": "deletion", "identifiers": {"customerId": "1"},
        "regimes": ["eu-gdpr", "eu-gdpr"]});
    assert_eq!(of(body).unwrap().regimes, [Regime::EuGdpr]);
}

/// JSON of any kind, with the names that mean something now and then.
fn anything() -> impl Strategy<Value = Value> {
    let leaf = prop_oneof![
        Just(Value::Null),
        any::<bool>().prop_map(Value::from),
        any::<i64>().prop_map(Value::from),
        "\\PC{0,20}".prop_map(Value::from),
        Just(json!("deletion")),
        Just(json!("eu-gdpr")),
    ];
    let name = prop_oneof![
        prop::sample::select(vec![
            "kind",
            "regimes",
            "identifiers",
            "channel",
            "receivedAt",
            "needsApproval",
            "customerId",
            "email"
        ])
        .prop_map(str::to_owned),
        "[a-z]{1,8}",
    ];
    leaf.prop_recursive(4, 40, 8, move |inner| {
        prop_oneof![
            prop::collection::vec(inner.clone(), 0..5).prop_map(Value::from),
            prop::collection::btree_map(name.clone(), inner, 0..8)
                .prop_map(|m| Value::Object(m.into_iter().collect())),
        ]
    })
}

proptest! {
    /// Whatever is sent: either all is well, and the filing can be carried out, or it is said what is wrong.
    #[test]
    fn a_filing_can_be_carried_out_or_is_refused(body in anything()) {
        match of(body) {
            Err(faults) => prop_assert!(!faults.is_empty()),
            Ok(filing) => {
                prop_assert_eq!(filing.kind, Kind::Deletion);
                prop_assert!(!filing.regimes.is_empty());
                for target in &workflow().targets {
                    for name in required(target) {
                        prop_assert!(!filing.identifiers.0[&name].trim().is_empty());
                    }
                }
            }
        }
    }

    /// A value is taken as it is or refused; and no fault repeats it.
    #[test]
    fn values_are_kept_as_they_are(value in "\\PC{1,600}", other in "[qx]{12}") {
        let body = json!({"kind": "deletion", "identifiers": {"customerId": value, "email": other}});
        match of(body) {
            Ok(filing) => {
                prop_assert!(value.len() <= VALUE_MAX);
                prop_assert_eq!(&filing.identifiers.0["customerId"], &value);
            }
            Err(faults) => prop_assert!(value.len() > VALUE_MAX || value.trim().is_empty(), "{:?}", faults),
        }
        let wrong = json!({"kind": other, "identifiers": {other.clone(): value}, "regimes": [other], "channel": other,
            "receivedAt": other, "needsApproval": other, other.clone(): other});
        let said = format!("{:?}", of(wrong).unwrap_err());
        prop_assert!(!said.contains(&other), "{}", said);
    }

    #[test]
    fn control_characters_are_refused(before in "\\PC{0,10}", control in 0u32..32, after in "\\PC{0,10}") {
        let value = format!("{before}{}{after}", char::from_u32(control).unwrap());
        let body = json!({"kind": "deletion", "identifiers": {"customerId": value}});
        prop_assert!(of(body).is_err());
    }

    #[test]
    fn a_key_is_printable_or_none(text in "\\PC{0,300}") {
        let ok = !text.is_empty() && text.len() <= KEY_MAX && text.bytes().all(|b| (33..127).contains(&b));
        prop_assert_eq!(key(&text).is_ok(), ok);
    }
}
