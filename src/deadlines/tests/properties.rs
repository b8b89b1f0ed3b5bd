use jiff::civil::{Date, Weekday, date};
use jiff::tz::{TimeZone, TimeZoneDatabase};
use jiff::{SignedDuration, Timestamp};
use proptest::prelude::*;
use proptest::sample::select;
use std::collections::BTreeSet;

use super::super::calendar::CALIFORNIA_BUSINESS;
use super::super::clocks::last_day;
use super::super::rules::{FirstDay, Period, Unit, Verification};
use super::super::{
    Clocks, Error, Refusal, clocks, extend, needs_approval_allowed, rules, verification,
};
use super::*;

/// Instants of the years that this program will see, half of them within two days of where counting goes wrong: ends
/// of months and years, 28 and 29 February, holidays, changes of daylight saving in America and Europe.
fn received() -> impl Strategy<Value = Timestamp> {
    let any = (1_577_836_800_i64..7_258_118_400).prop_map(|s| Timestamp::from_second(s).unwrap());
    let edge = (2020_i16..2200, 0_usize..13, -172_800_i64..172_800).prop_map(|(year, edge, by)| {
        let day = match edge {
            0 => date(year, 1, 1),
            1 => date(year, 1, 31),
            2 => date(year, 2, 1).last_of_month(),
            3 => nth(year, 3, 2, Weekday::Sunday),
            4 => nth(year, 3, -1, Weekday::Sunday),
            5 => date(year, 3, 31),
            6 => date(year, 7, 4),
            7 => date(year, 8, 31),
            8 => nth(year, 10, -1, Weekday::Sunday),
            9 => nth(year, 11, 1, Weekday::Sunday),
            10 => nth(year, 11, 4, Weekday::Thursday),
            11 => date(year, 11, 11),
            _ => date(year, 12, 25),
        };
        day.to_zoned(TimeZone::UTC).unwrap().timestamp() + SignedDuration::from_secs(by)
    });
    prop_oneof![any, edge]
}

/// Some regimes, some twice, in any order.
fn some() -> impl Strategy<Value = Vec<Regime>> {
    prop::collection::vec(select(regimes()), 1..10)
}

fn kind() -> impl Strategy<Value = Kind> {
    select(KINDS.to_vec())
}

fn nth(year: i16, month: i8, n: i8, weekday: Weekday) -> Date {
    date(year, month, 1)
        .nth_weekday_of_month(n, weekday)
        .unwrap()
}

fn bundled(name: &str) -> TimeZone {
    TimeZoneDatabase::bundled().get(name).unwrap()
}

/// The regimes that give a right, each alone.
fn each(regimes: &[Regime], kind: Kind, received: Timestamp) -> Vec<Clocks> {
    regimes
        .iter()
        .filter(|r| rules(**r).grants.contains(&kind))
        .map(|r| clocks(&[*r], kind, received).unwrap())
        .collect()
}

/// A month on, on one's fingers.
fn months_on(from: Date, months: u16) -> Date {
    let month = i32::from(from.month()) - 1 + i32::from(months);
    let year = from.year() + i16::try_from(month / 12).unwrap();
    let month = i8::try_from(month % 12 + 1).unwrap();
    let leap = year % 4 == 0 && (year % 100 != 0 || year % 400 == 0);
    let days = match month {
        2 if leap => 29,
        2 => 28,
        4 | 6 | 9 | 11 => 30,
        _ => 31,
    };
    date(year, month, from.day().min(days))
}

/// Which days from Monday to Friday of a year the United States and California both keep, another way than the
/// calendar finds them: date by date.
fn kept_by_both(year: i16) -> BTreeSet<Date> {
    let mut kept: BTreeSet<Date> = [
        nth(year, 1, 3, Weekday::Monday),
        nth(year, 2, 3, Weekday::Monday),
        nth(year, 5, -1, Weekday::Monday),
        nth(year, 9, 1, Weekday::Monday),
        nth(year, 10, 2, Weekday::Monday),
        nth(year, 11, 4, Weekday::Thursday),
        date(year, 6, 19),
    ]
    .into();
    for (month, day) in [(1, 1), (7, 4), (11, 11), (12, 25)] {
        let day = date(year, month, day);
        kept.insert(match day.weekday() {
            Weekday::Sunday => day.tomorrow().unwrap(),
            Weekday::Saturday if month == 11 => day.yesterday().unwrap(),
            _ => day,
        });
    }
    kept
}

fn is_business_day(day: Date) -> bool {
    !matches!(day.weekday(), Weekday::Saturday | Weekday::Sunday)
        && !kept_by_both(day.year()).contains(&day)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(5_000))]

    #[test]
    fn a_later_receipt_never_has_an_earlier_deadline(
        one in received(),
        other in received(),
        apart in 0_i64..200_000,
        regimes in some(),
        kind in kind(),
        near: bool,
    ) {
        let other = if near { one + SignedDuration::from_secs(apart) } else { other };
        let (earlier, later) = (one.min(other), one.max(other));
        if let (Ok(a), Ok(b)) = (clocks(&regimes, kind, earlier), clocks(&regimes, kind, later)) {
            prop_assert!(a.answer_by <= b.answer_by);
            prop_assert!(a.acknowledge_by <= b.acknowledge_by);
            if let (Some(a), Some(b)) = (a.extension, b.extension) {
                prop_assert!(a.to <= b.to && a.notice_by <= b.notice_by);
            }
        }
    }

    #[test]
    fn a_deadline_is_ahead_and_an_extension_is_further(
        received in received(),
        regimes in some(),
        kind in kind(),
    ) {
        let Ok(c) = clocks(&regimes, kind, received) else {
            prop_assert!(regimes.iter().all(|r| !rules(*r).grants.contains(&kind)));
            return Ok(());
        };
        prop_assert!(c.answer_by > received);
        prop_assert_eq!(c.deadline(), c.answer_by);
        if let Some(by) = c.acknowledge_by {
            prop_assert!(received < by && by <= c.answer_by);
        }
        if let Some(extension) = c.extension {
            prop_assert!(extension.to > c.answer_by);
            prop_assert_eq!(extension.notice_by, c.answer_by);
        }
        prop_assert_eq!(c.acknowledge_by.is_some(), c.acknowledge_governing.is_some());
        // Alone, a confirmation is due before the answer by law, and not since it was put there.
        for alone in each(&regimes, kind, received) {
            prop_assert!(alone.acknowledge_by.is_none_or(|by| by < alone.answer_by));
        }
    }

    #[test]
    fn of_several_regimes_the_earliest_deadline_and_the_widest_deletion_hold(
        received in received(),
        regimes in some(),
        kind in kind(),
    ) {
        let alone = each(&regimes, kind, received);
        let Ok(all) = clocks(&regimes, kind, received) else {
            prop_assert!(alone.is_empty());
            return Ok(());
        };
        let earliest = alone.iter().map(|c| c.answer_by).min();
        prop_assert_eq!(Some(all.answer_by), earliest);
        prop_assert!(alone.iter().any(|c| c.governing == all.governing && c.answer_by == all.answer_by));

        let confirmed = alone.iter().filter_map(|c| c.acknowledge_by).min();
        prop_assert_eq!(all.acknowledge_by, confirmed.map(|by| by.min(all.answer_by)));

        let furthest = alone.iter().map(|c| c.extension.map_or(c.answer_by, |e| e.to)).min().unwrap();
        prop_assert_eq!(all.extension.map_or(all.answer_by, |e| e.to), furthest);
        // Who is told in time for all is told in time for each.
        if let Some(extension) = all.extension {
            prop_assert!(alone.iter().all(|c| extension.notice_by <= c.answer_by));
        }

        let widest = alone.iter().filter_map(|c| c.deletion).map(|d| d.0).max();
        prop_assert_eq!(all.deletion.map(|d| d.0), widest);
        prop_assert!(all.deletion.is_none_or(|(scope, regime)| rules(regime).deletion.scope == scope));

        let mut other: Vec<_> = regimes.iter().rev().copied().collect();
        other.extend(&regimes);
        prop_assert_eq!(clocks(&other, kind, received), Ok(all));
        other.sort();
        prop_assert_eq!(clocks(&other, kind, received), Ok(all));
    }

    #[test]
    fn every_clock_ends_with_the_last_second_of_its_last_day(
        received in received(),
        regime in select(regimes()),
        kind in kind(),
    ) {
        let rules = rules(regime);
        let Ok(c) = clocks(&[regime], kind, received) else { return Ok(()) };
        let ends_in = bundled(rules.zones.ends_in);
        let on = bundled(rules.zones.received_in).to_datetime(received).date();

        let mut ends = vec![(c.answer_by, rules.answer_to(kind).period)];
        ends.extend(c.acknowledge_by.zip(rules.acknowledgement_of(kind).map(|a| a.period)));
        ends.extend(c.extension.map(|e| e.to).zip(rules.extension_of(kind).map(|e| e.in_all)));
        for (end, period) in ends {
            let local = ends_in.to_datetime(end);
            prop_assert_eq!(local.time().to_string(), "23:59:59");
            let after = ends_in.to_datetime(end + SignedDuration::from_secs(1));
            prop_assert_eq!(after.date(), local.date().tomorrow().unwrap());

            let counted = match period.first {
                FirstDay::Receipt => local.date().tomorrow().unwrap(),
                FirstDay::AfterReceipt => local.date(),
            };
            match period.unit {
                Unit::CalendarDays => {
                    prop_assert_eq!((counted - on).get_days(), i32::from(period.amount));
                }
                Unit::Months => prop_assert_eq!(counted, months_on(on, period.amount)),
                Unit::BusinessDays(_) => {
                    prop_assert!(is_business_day(local.date()));
                    let days = on.series(jiff::Span::new().days(1)).skip(1).take_while(|d| *d <= local.date());
                    prop_assert_eq!(days.filter(|d| is_business_day(*d)).count(), usize::from(period.amount));
                }
            }
        }
    }

    #[test]
    fn no_reading_of_the_territory_ends_before_ours(received in received(), east in -4_i8..=4, kind in kind()) {
        // As a controller in some place of the Union counts: receipt and end of the day by the clock on its own wall.
        let wall = TimeZone::fixed(jiff::tz::offset(east));
        let last = months_on(wall.to_datetime(received).date(), 1);
        let end = wall.to_timestamp(last.tomorrow().unwrap().at(0, 0, 0, 0)).unwrap();
        prop_assert!(clocks(&[Regime::EuGdpr], kind, received).unwrap().answer_by < end);
    }

    #[test]
    fn business_days_are_counted_from_either_day(
        days_on in 0_i32..60_000,
        amount in 1_u16..40,
        first in select(vec![FirstDay::Receipt, FirstDay::AfterReceipt]),
    ) {
        let day = date(2020, 1, 1) + SignedDuration::from_hours(24 * i64::from(days_on));
        let unit = Unit::BusinessDays(&CALIFORNIA_BUSINESS);
        let last = last_day(day, Period { amount, unit, first }).unwrap();
        prop_assert!(is_business_day(last));
        let skip = usize::from(first == FirstDay::AfterReceipt);
        let days = day.series(jiff::Span::new().days(1)).skip(skip).take_while(|d| *d <= last);
        prop_assert_eq!(days.filter(|d| is_business_day(*d)).count(), usize::from(amount));
    }

    #[test]
    fn an_extension_counts_once_and_only_if_told_and_logged_in_time(
        received in received(),
        regimes in some(),
        kind in kind(),
        told in -100_000_i64..9_000_000,
        logged in -100_000_i64..9_000_000,
        edge in 0_u8..4,
    ) {
        let Ok(c) = clocks(&regimes, kind, received) else { return Ok(()) };
        let second = SignedDuration::from_secs(1);
        let notice = match edge {
            0 => c.answer_by,
            1 => c.answer_by + second,
            _ => received + SignedDuration::from_secs(told),
        };
        let now = if edge < 2 { notice } else { received + SignedDuration::from_secs(logged) };
        let in_time = received <= notice && notice <= now && now <= c.answer_by;
        match extend(&c, notice, now) {
            Ok(extended) => {
                prop_assert!(in_time);
                let extension = c.extension.unwrap();
                prop_assert_eq!(extended.deadline(), extension.to);
                prop_assert_eq!(Clocks { extended_to: None, ..extended }, c);
                prop_assert_eq!(extend(&extended, notice, now), Err(Refusal::Twice { to: extension.to }));
                // Not beyond what any regime grants, told by then: the CCPA's 90 days, the GDPR's three months.
                for alone in each(&regimes, kind, received) {
                    prop_assert!(extended.deadline() <= alone.extension.map_or(alone.answer_by, |e| e.to));
                }
            }
            Err(Refusal::Never { answer_by, regime }) => {
                prop_assert!(c.extension.is_none());
                prop_assert_eq!(answer_by, c.answer_by);
                let named = regimes.iter().map(|r| rules(*r)).find(|r| r.id == regime).unwrap();
                prop_assert!(named.extension_of(kind).is_none());
            }
            Err(refusal) => {
                let twice = matches!(refusal, Refusal::Twice { .. });
                prop_assert!(!in_time && c.extension.is_some() && !twice);
            }
        }
    }

    #[test]
    fn proof_is_asked_for_only_if_every_regime_lets_it(regimes in some(), kind in kind()) {
        let granting: Vec<_> = regimes.iter().map(|r| rules(*r)).filter(|r| r.grants.contains(&kind)).collect();
        let allowed = !granting.is_empty() && granting.iter().all(|r| r.proof.of(kind) != Verification::Never);
        prop_assert_eq!(needs_approval_allowed(&regimes, kind), allowed);
        if kind == Kind::OptOut && regimes.contains(&Regime::UsCaCcpa) {
            prop_assert!(!allowed);
        }
        let mut other = regimes.clone();
        other.reverse();
        prop_assert_eq!(verification(&other, kind), verification(&regimes, kind));
    }

    #[test]
    fn no_instant_makes_it_panic(
        nanos in Timestamp::MIN.as_nanosecond()..=Timestamp::MAX.as_nanosecond(),
        from_end in 0_i64..12_000_000,
        near_end: bool,
        regimes in some(),
        kind in kind(),
    ) {
        let received = if near_end {
            Timestamp::MAX - SignedDuration::from_secs(from_end)
        } else {
            Timestamp::from_nanosecond(nanos).unwrap()
        };
        match clocks(&regimes, kind, received) {
            Ok(c) => {
                prop_assert!(c.answer_by > received);
                let _ = extend(&c, received, received);
                let _ = extend(&c, Timestamp::MAX, Timestamp::MIN);
            }
            Err(Error::OutOfRange { .. }) => prop_assert!(near_end || received > at("9999-08-01T00:00[UTC]")),
            Err(Error::NoRight { .. }) => {}
            Err(other) => prop_assert!(false, "{}", other),
        }
    }
}
