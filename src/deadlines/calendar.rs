//! Business days, and holidays by rule.
//!
//! Owns which day is a holiday in which list, and the counting of business days. Holidays are rules ("the third Monday
//! in January"), so that no list of years runs out. Never: moves a calendar day's deadline to a later day.
//!
//! Written here since the crates that there are either bring a second time library or know the federal list only,
//! which alone is not what California's Civil Code means by a holiday.

use jiff::civil::{Date, Weekday};

use super::rules::FirstDay;

/// Which day of a year.
#[derive(Clone, Copy, Debug)]
pub enum Day {
    /// A date: month and day.
    Date(i8, i8),
    /// The n-th of a weekday in a month: month, weekday, n.
    Nth(i8, Weekday, i8),
    /// The last of a weekday in a month.
    Last(i8, Weekday),
}

/// What becomes of a holiday that falls on a weekend.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Moved {
    /// It stays.
    No,
    /// From Sunday to Monday; from Saturday not at all.
    FromSunday,
    /// From Sunday to Monday, from Saturday to Friday.
    FromWeekend,
}

/// A holiday.
#[derive(Clone, Copy, Debug)]
pub struct Holiday {
    /// Its name.
    pub name: &'static str,
    /// When it is.
    pub day: Day,
    /// What becomes of it on a weekend.
    pub moved: Moved,
}

impl Holiday {
    fn falls_on(&self, date: Date) -> bool {
        match self.day {
            Day::Date(month, day) => date.month() == month && date.day() == day,
            Day::Nth(month, weekday, n) => {
                date.month() == month && date.weekday() == weekday && (date.day() - 1) / 7 + 1 == n
            }
            Day::Last(month, weekday) => {
                date.month() == month
                    && date.weekday() == weekday
                    && date.day() + 7 > date.days_in_month()
            }
        }
    }

    /// Whether it is kept on a date: there, or moved there from a weekend.
    #[must_use]
    pub fn kept_on(&self, date: Date) -> bool {
        let from = match date.weekday() {
            Weekday::Monday if self.moved != Moved::No => date.yesterday().ok(),
            Weekday::Friday if self.moved == Moved::FromWeekend => date.tomorrow().ok(),
            _ => None,
        };
        self.falls_on(date) || from.is_some_and(|weekend| self.falls_on(weekend))
    }
}

/// The holidays that one law makes.
#[derive(Clone, Copy, Debug)]
pub struct Holidays {
    /// Whose.
    pub name: &'static str,
    /// Where they are written.
    pub citation: &'static str,
    /// Each.
    pub days: &'static [Holiday],
}

impl Holidays {
    /// The holiday that is kept on a date.
    #[must_use]
    pub fn on(&self, date: Date) -> Option<&'static Holiday> {
        self.days.iter().find(|h| h.kept_on(date))
    }
}

/// On which days business is done.
#[derive(Clone, Copy, Debug)]
pub struct Calendar {
    /// Its name.
    pub name: &'static str,
    /// Never on these.
    pub weekend: &'static [Weekday],
    /// Nor on a date that is a holiday in every one of these: of one that is a holiday in some only, it can be said
    /// that business is done on it, and counting it ends the period earlier.
    pub holidays: &'static [&'static Holidays],
}

impl Calendar {
    /// Whether business is done on a date.
    #[must_use]
    pub fn is_business_day(&self, date: Date) -> bool {
        let holiday =
            !self.holidays.is_empty() && self.holidays.iter().all(|list| list.on(date).is_some());
        !self.weekend.contains(&date.weekday()) && !holiday
    }

    /// The last of `amount` business days.
    ///
    /// # Errors
    /// If it is beyond the last year that there is.
    pub fn last_of(
        &self,
        amount: u16,
        received: Date,
        first: FirstDay,
    ) -> Result<Date, jiff::Error> {
        let mut date = match first {
            FirstDay::Receipt => received,
            FirstDay::AfterReceipt => received.tomorrow()?,
        };
        let mut left = amount;
        loop {
            if self.is_business_day(date) {
                left = left.saturating_sub(1);
                if left == 0 {
                    return Ok(date);
                }
            }
            date = date.tomorrow()?;
        }
    }
}

const WEEKEND: &[Weekday] = &[Weekday::Saturday, Weekday::Sunday];

const fn holiday(name: &'static str, day: Day, moved: Moved) -> Holiday {
    Holiday { name, day, moved }
}

/// Of the United States. Days that a president gives once (mourning, a Christmas Eve) are not in it: they are in no
/// rule, and without them periods end earlier.
pub static US_FEDERAL: Holidays = Holidays {
    name: "United States",
    citation: "5 U.S.C. 6103(a), (b); Executive Order 11582",
    days: &[
        holiday("New Year's Day", Day::Date(1, 1), Moved::FromWeekend),
        holiday(
            "Birthday of Martin Luther King, Jr.",
            Day::Nth(1, Weekday::Monday, 3),
            Moved::No,
        ),
        holiday(
            "Washington's Birthday",
            Day::Nth(2, Weekday::Monday, 3),
            Moved::No,
        ),
        holiday("Memorial Day", Day::Last(5, Weekday::Monday), Moved::No),
        holiday("Juneteenth", Day::Date(6, 19), Moved::FromWeekend),
        holiday("Independence Day", Day::Date(7, 4), Moved::FromWeekend),
        holiday("Labor Day", Day::Nth(9, Weekday::Monday, 1), Moved::No),
        holiday("Columbus Day", Day::Nth(10, Weekday::Monday, 2), Moved::No),
        holiday("Veterans Day", Day::Date(11, 11), Moved::FromWeekend),
        holiday(
            "Thanksgiving Day",
            Day::Nth(11, Weekday::Thursday, 4),
            Moved::No,
        ),
        holiday("Christmas Day", Day::Date(12, 25), Moved::FromWeekend),
    ],
};

/// Of California. Without Lunar New Year and Diwali, which follow the moon, and Good Friday, which is a holiday for
/// three hours: none of them is a federal holiday, so that none would count.
pub static CALIFORNIA: Holidays = Holidays {
    name: "California",
    citation: "Gov. Code 6700, 6701; Civ. Code 7",
    days: &[
        holiday("New Year's Day", Day::Date(1, 1), Moved::FromSunday),
        holiday(
            "Dr. Martin Luther King, Jr. Day",
            Day::Nth(1, Weekday::Monday, 3),
            Moved::No,
        ),
        holiday("Lincoln Day", Day::Date(2, 12), Moved::FromSunday),
        holiday(
            "the third Monday in February",
            Day::Nth(2, Weekday::Monday, 3),
            Moved::No,
        ),
        holiday("Cesar Chavez Day", Day::Date(3, 31), Moved::FromSunday),
        holiday("Genocide Remembrance Day", Day::Date(4, 24), Moved::No),
        holiday(
            "the last Monday in May",
            Day::Last(5, Weekday::Monday),
            Moved::No,
        ),
        // Gov. Code 6701 doesn't name it among those that move.
        holiday("Juneteenth", Day::Date(6, 19), Moved::No),
        holiday("July 4", Day::Date(7, 4), Moved::FromSunday),
        holiday(
            "the first Monday in September",
            Day::Nth(9, Weekday::Monday, 1),
            Moved::No,
        ),
        holiday("Admission Day", Day::Date(9, 9), Moved::FromSunday),
        holiday(
            "Native American Day",
            Day::Nth(9, Weekday::Friday, 4),
            Moved::No,
        ),
        holiday("Columbus Day", Day::Nth(10, Weekday::Monday, 2), Moved::No),
        holiday("Veterans Day", Day::Date(11, 11), Moved::FromWeekend),
        holiday(
            "Thanksgiving Day",
            Day::Nth(11, Weekday::Thursday, 4),
            Moved::No,
        ),
        holiday("December 25", Day::Date(12, 25), Moved::FromSunday),
    ],
};

/// Business days in California: Monday to Friday, but not what both the United States and California keep.
pub static CALIFORNIA_BUSINESS: Calendar = Calendar {
    name: "Monday to Friday, without the days that are holidays of the United States and of California alike",
    weekend: WEEKEND,
    holidays: &[&US_FEDERAL, &CALIFORNIA],
};
