use jiff::civil::{Date, date};
use jiff::tz::TimeZone;
use schemars::schema_for;
use serde_json::json;

use super::super::calendar::{CALIFORNIA, CALIFORNIA_BUSINESS, US_FEDERAL};
use super::super::rules::{Scope, Verification};
use super::super::{Error, Refusal, clocks, extend, needs_approval_allowed, rules, verification};
use super::*;

/// Received, regime, kind; the last second to acknowledge, to answer, and with an extension; why.
pub struct Example {
    pub received: &'static str,
    pub regime: Regime,
    pub kind: Kind,
    pub acknowledge: Option<&'static str>,
    pub answer: &'static str,
    pub extended: Option<&'static str>,
    pub why: &'static str,
}

/// Counted by hand.
pub const EXAMPLES: &[Example] = &[
    Example {
        received: "2026-03-02T10:00[America/Los_Angeles]",
        regime: Regime::UsCaCcpa,
        kind: Kind::Deletion,
        acknowledge: Some("2026-03-16T23:59:59[America/Los_Angeles]"),
        answer: "2026-04-15T23:59:59[America/Los_Angeles]",
        extended: Some("2026-05-30T23:59:59[America/Los_Angeles]"),
        why: "11 CCR 7021: 2 March is the first of 45 and of 90 days; daylight saving began in between",
    },
    Example {
        received: "2026-06-22T16:00[America/Los_Angeles]",
        regime: Regime::UsCaCcpa,
        kind: Kind::Access,
        acknowledge: Some("2026-07-06T23:59:59[America/Los_Angeles]"),
        answer: "2026-08-05T23:59:59[America/Los_Angeles]",
        extended: Some("2026-09-19T23:59:59[America/Los_Angeles]"),
        why: "4 July is a Saturday: the United States keep Friday the 3rd (5 U.S.C. 6103(b)), California doesn't (Gov. Code 6701), so it is a business day",
    },
    Example {
        received: "2026-11-16T09:00[America/Los_Angeles]",
        regime: Regime::UsCaCcpa,
        kind: Kind::Correction,
        acknowledge: Some("2026-12-01T23:59:59[America/Los_Angeles]"),
        answer: "2026-12-30T23:59:59[America/Los_Angeles]",
        extended: Some("2027-02-13T23:59:59[America/Los_Angeles]"),
        why: "Thanksgiving (26 November) is no business day, the Friday after it is one",
    },
    Example {
        received: "2026-03-07T22:00[America/Los_Angeles]",
        regime: Regime::UsCaCcpa,
        kind: Kind::OptOut,
        acknowledge: None,
        answer: "2026-03-27T23:59:59[America/Los_Angeles]",
        extended: None,
        why: "11 CCR 7026(f): 15 business days, the first of them Monday 9 March",
    },
    Example {
        received: "2026-08-01T08:00[America/Los_Angeles]",
        regime: Regime::UsCaDeleteAct,
        kind: Kind::Deletion,
        acknowledge: None,
        answer: "2026-09-15T23:59:59[America/Los_Angeles]",
        extended: None,
        why: "Civ. Code 1798.99.86(c): within 45 days after receiving it",
    },
    Example {
        received: "2026-01-31T12:00[Europe/Berlin]",
        regime: Regime::EuGdpr,
        kind: Kind::Deletion,
        acknowledge: None,
        answer: "2026-02-28T23:59:59[Indian/Reunion]",
        extended: Some("2026-04-30T23:59:59[Indian/Reunion]"),
        why: "Regulation 1182/71 Art. 3(2)(c): a month without a 31st ends the period on its last day",
    },
    Example {
        received: "2028-01-31T12:00[Europe/Berlin]",
        regime: Regime::EuGdpr,
        kind: Kind::Deletion,
        acknowledge: None,
        answer: "2028-02-29T23:59:59[Indian/Reunion]",
        extended: Some("2028-04-30T23:59:59[Indian/Reunion]"),
        why: "the same in a leap year",
    },
    Example {
        received: "2026-03-03T02:00[Europe/Helsinki]",
        regime: Regime::EuGdpr,
        kind: Kind::Access,
        acknowledge: None,
        answer: "2026-04-02T23:59:59[Indian/Reunion]",
        extended: Some("2026-06-02T23:59:59[Indian/Reunion]"),
        why: "it is still 2 March in the west of the Union",
    },
    Example {
        received: "2026-09-03T09:00[Europe/London]",
        regime: Regime::UkGdpr,
        kind: Kind::Access,
        acknowledge: None,
        answer: "2026-10-02T23:59:59[Europe/London]",
        extended: Some("2026-12-02T23:59:59[Europe/London]"),
        why: "UK GDPR Art. 12A: the month begins with the receipt; the ICO's example has until 3 October",
    },
    Example {
        received: "2026-01-15T09:00[America/New_York]",
        regime: Regime::UsVa,
        kind: Kind::Deletion,
        acknowledge: None,
        answer: "2026-03-01T23:59:59[America/New_York]",
        extended: Some("2026-04-15T23:59:59[America/New_York]"),
        why: "Va. Code 59.1-577(B)(1): a Sunday stays the last day",
    },
    Example {
        received: "2027-12-31T23:59:59[America/Denver]",
        regime: Regime::UsCo,
        kind: Kind::OptOut,
        acknowledge: None,
        answer: "2028-02-14T23:59:59[America/Denver]",
        extended: Some("2028-03-30T23:59:59[America/Denver]"),
        why: "C.R.S. 6-1-1306(2)(a), over the end of a year and 29 February",
    },
    Example {
        received: "2026-02-20T10:00[America/Sao_Paulo]",
        regime: Regime::BrLgpd,
        kind: Kind::Access,
        acknowledge: None,
        answer: "2026-03-07T23:59:59[America/Noronha]",
        extended: None,
        why: "Lei 13.709/2018 Art. 19(II): 15 days from the date of the request",
    },
    Example {
        received: "2026-03-02T09:00[Asia/Seoul]",
        regime: Regime::KrPipa,
        kind: Kind::Correction,
        acknowledge: None,
        answer: "2026-03-12T23:59:59[Asia/Seoul]",
        extended: None,
        why: "PIPA Enforcement Decree Art. 43(3): within 10 days from the receipt",
    },
];

#[test]
fn examples_counted_by_hand() {
    for e in EXAMPLES {
        let c = clocks(&[e.regime], e.kind, at(e.received)).unwrap();
        assert_eq!(c.answer_by, at(e.answer), "{}: {}", e.received, e.why);
        assert_eq!(
            c.acknowledge_by,
            e.acknowledge.map(at),
            "{}: {}",
            e.received,
            e.why
        );
        assert_eq!(
            c.extension.map(|x| x.to),
            e.extended.map(at),
            "{}: {}",
            e.received,
            e.why
        );
        assert_eq!(c.governing, e.regime);
        assert_eq!(c.deletion.is_some(), e.kind == Kind::Deletion);
    }
}

/// A regime that the CRD knows and this doesn't, or under another id, would be found here.
#[test]
fn the_regimes_are_those_of_the_crd() {
    let schema = serde_json::to_value(schema_for!(Regime)).unwrap();
    let mut known: Vec<String> = schema["oneOf"]
        .as_array()
        .unwrap()
        .iter()
        .map(|s| s["const"].as_str().unwrap().to_owned())
        .collect();
    known.sort();
    let mut ours: Vec<String> = ALL.iter().map(|r| r.id.to_owned()).collect();
    ours.sort();
    assert_eq!(known, ours);
    for r in ALL {
        assert_eq!(json!(r.regime), json!(r.id));
        assert_eq!(rules(r.regime).id, r.id);
    }
    assert!(regimes().is_sorted(), "listed in the CRD's order");
}

#[test]
fn every_rule_says_where_it_is_written() {
    for r in ALL {
        let citations = [
            Some(r.answer.citation),
            r.opt_out.map(|c| c.citation),
            r.acknowledge.map(|c| c.citation),
            r.extension.map(|e| e.citation),
            Some(r.proof.citation),
            Some(r.deletion.citation),
            Some(r.counting),
        ];
        for citation in citations.into_iter().flatten() {
            assert!(
                citation.chars().any(|c| c.is_ascii_digit()),
                "{}: {citation:?} names no section",
                r.id
            );
        }
    }
}

/// The days in a year that are Monday to Friday and in a list.
fn kept(year: i16, is: impl Fn(Date) -> bool) -> Vec<String> {
    let mut days = vec![];
    let mut day = date(year, 1, 1);
    while day.year() == year {
        if day.weekday().to_monday_zero_offset() < 5 && is(day) {
            days.push(day.strftime("%m-%d").to_string());
        }
        day = day.tomorrow().unwrap();
    }
    days
}

/// As the Office of Personnel Management publishes them.
#[test]
fn holidays_of_the_united_states() {
    let federal = |year| kept(year, |d| US_FEDERAL.on(d).is_some()).join(" ");
    assert_eq!(
        federal(2026),
        "01-01 01-19 02-16 05-25 06-19 07-03 09-07 10-12 11-11 11-26 12-25"
    );
    // Christmas Day 2027 and New Year's Day 2028 are Saturdays.
    assert_eq!(
        federal(2027),
        "01-01 01-18 02-15 05-31 06-18 07-05 09-06 10-11 11-11 11-25 12-24 12-31"
    );
    assert_eq!(
        federal(2028),
        "01-17 02-21 05-29 06-19 07-04 09-04 10-09 11-10 11-23 12-25"
    );
}

/// Gov. Code 6700 and 6701.
#[test]
fn holidays_of_california() {
    let california = |year| kept(year, |d| CALIFORNIA.on(d).is_some()).join(" ");
    assert_eq!(
        california(2026),
        "01-01 01-19 02-12 02-16 03-31 04-24 05-25 06-19 09-07 09-09 09-25 10-12 11-11 11-26 12-25"
    );
    // 4 July 2027 is a Sunday, 11 November 2028 a Saturday.
    assert!(california(2027).contains("07-05"));
    assert!(california(2028).contains("11-10"));
}

#[test]
fn business_is_done_unless_both_keep_the_day() {
    let off = |year| kept(year, |d| !CALIFORNIA_BUSINESS.is_business_day(d)).join(" ");
    assert_eq!(
        off(2026),
        "01-01 01-19 02-16 05-25 06-19 09-07 10-12 11-11 11-26 12-25"
    );
    assert_eq!(
        off(2027),
        "01-01 01-18 02-15 05-31 07-05 09-06 10-11 11-11 11-25"
    );
    assert_eq!(
        off(2028),
        "01-17 02-21 05-29 06-19 07-04 09-04 10-09 11-10 11-23 12-25"
    );
}

/// 10 days of Korea end before 45 of California; California's confirmation is not asked for after the answer; Korea
/// lets nothing be put off; the Delete Act deletes the most.
#[test]
fn the_strictest_of_several_holds_for_each_clock() {
    let received = at("2026-03-02T09:00[Asia/Seoul]");
    let all = clocks(&regimes(), Kind::Deletion, received).unwrap();
    assert_eq!(all.answer_by, at("2026-03-12T23:59:59[Asia/Seoul]"));
    assert_eq!(all.governing, Regime::KrPipa);
    assert_eq!(all.acknowledge_by, Some(all.answer_by));
    assert_eq!(all.acknowledge_governing, Some(Regime::UsCaCcpa));
    assert_eq!(
        all.deletion,
        Some((Scope::AboutThePersonForGood, Regime::UsCaDeleteAct))
    );
    assert_eq!(
        extend(&all, received, received),
        Err(Refusal::Never {
            regime: "kr-pipa",
            answer_by: all.answer_by
        })
    );
}

/// A month, extended by the GDPR to three, ends where the CCPA's 90 days do; told within the month.
#[test]
fn an_extension_goes_as_far_as_every_regime_lets_it() {
    let received = at("2026-03-02T10:00[America/Los_Angeles]");
    let both = clocks(
        &[Regime::UsCaCcpa, Regime::EuGdpr],
        Kind::Deletion,
        received,
    )
    .unwrap();
    assert_eq!(both.governing, Regime::EuGdpr);
    let extension = both.extension.unwrap();
    assert_eq!(extension.notice_by, both.answer_by);
    assert_eq!(extension.governing, Regime::UsCaCcpa);
    assert_eq!(extension.to, at("2026-05-30T23:59:59[America/Los_Angeles]"));

    let extended = extend(&both, received, both.answer_by).unwrap();
    assert_eq!(extended.deadline(), extension.to);
    let again = extend(&extended, received, both.answer_by).unwrap_err();
    assert_eq!(again, Refusal::Twice { to: extension.to });
    assert!(again.to_string().contains("already"), "{again}");
}

#[test]
fn a_late_extension_is_refused_with_words() {
    let received = at("2026-03-02T10:00[America/Los_Angeles]");
    let c = clocks(&[Regime::UsCaCcpa], Kind::Access, received).unwrap();
    let second = jiff::SignedDuration::from_secs(1);
    let after = c.answer_by + second;

    let late = extend(&c, after, after).unwrap_err();
    assert!(
        matches!(late, Refusal::Late { .. })
            && late.to_string().contains("within the first period"),
        "{late}"
    );
    let logged = extend(&c, c.answer_by, after).unwrap_err();
    assert!(
        matches!(logged, Refusal::LoggedLate { .. }) && logged.to_string().contains("dated back"),
        "{logged}"
    );
    let ahead = extend(&c, received + second, received).unwrap_err();
    assert!(
        matches!(ahead, Refusal::Ahead { .. })
            && ahead.to_string().contains("tell the person first"),
        "{ahead}"
    );
    let before = extend(&c, received - second, received).unwrap_err();
    assert!(matches!(before, Refusal::BeforeReceipt { .. }), "{before}");
    assert!(extend(&c, c.answer_by, c.answer_by).is_ok());
}

#[test]
fn proof_may_be_asked_for_where_the_law_lets_it() {
    use Regime::{EuGdpr, UsCaCcpa, UsCaDeleteAct, UsCo, UsVa};
    // 11 CCR 7060(b).
    assert!(!needs_approval_allowed(&[UsCaCcpa], Kind::OptOut));
    assert!(needs_approval_allowed(&[UsCaCcpa], Kind::Deletion));
    // The agency has verified.
    assert!(!needs_approval_allowed(&[UsCaDeleteAct], Kind::Deletion));
    assert!(!needs_approval_allowed(
        &[UsVa, UsCaDeleteAct],
        Kind::Deletion
    ));
    // It has no say about what it gives no right to.
    assert!(needs_approval_allowed(
        &[UsCaCcpa, UsCaDeleteAct],
        Kind::Access
    ));
    assert_eq!(
        verification(&[UsVa, EuGdpr], Kind::Access),
        Ok((Verification::OnDoubt, EuGdpr))
    );
    assert_eq!(
        verification(&[UsCo, UsVa], Kind::OptOut),
        Ok((Verification::OnDoubt, UsCo))
    );
    assert!(!needs_approval_allowed(&[], Kind::Deletion));
}

#[test]
fn what_has_no_clocks() {
    let now = at("2026-03-02T10:00[UTC]");
    assert_eq!(clocks(&[], Kind::Deletion, now), Err(Error::NoRegime));
    let error = clocks(&[Regime::UsCaDeleteAct], Kind::Access, now).unwrap_err();
    assert_eq!(error, Error::NoRight { kind: Kind::Access });
    assert!(
        error
            .to_string()
            .ends_with("a right to access: name one that does")
    );
    for regime in regimes() {
        for kind in KINDS {
            if rules(regime).grants.contains(&kind) {
                let error = clocks(&[regime], kind, Timestamp::MAX).unwrap_err();
                assert!(matches!(error, Error::OutOfRange { .. }), "{error}");
            }
        }
    }
}

/// The night in which Los Angeles has no two o'clock, and the one in which it has two of one.
#[test]
fn a_day_ends_at_midnight_whatever_its_length() {
    for (received, answer) in [
        // 44 days later is 8 March 2026, which has 23 hours, and 1 November, which has 25.
        (
            "2026-01-23T12:00[America/Los_Angeles]",
            "2026-03-09T06:59:59Z[UTC]",
        ),
        (
            "2026-09-18T12:00[America/Los_Angeles]",
            "2026-11-02T07:59:59Z[UTC]",
        ),
    ] {
        let c = clocks(&[Regime::UsCaCcpa], Kind::Access, at(received)).unwrap();
        assert_eq!(c.answer_by, at(answer));
    }
    let zone = TimeZone::get("America/Los_Angeles").unwrap();
    let hours = |day: Date| {
        let begin = zone.to_timestamp(day.at(0, 0, 0, 0)).unwrap();
        let end = zone
            .to_timestamp(day.tomorrow().unwrap().at(0, 0, 0, 0))
            .unwrap();
        end.duration_since(begin).as_hours()
    };
    assert_eq!(hours(date(2026, 3, 8)), 23);
    assert_eq!(hours(date(2026, 11, 1)), 25);
}
