//! Identifiers as values of columns.
//!
//! Owns which types of columns can be matched with an identifier, and which identifiers a column of a type can hold. An
//! identifier is text; the column is never cast (that would leave its index unused), so the identifier becomes the
//! column's type, if it is the way that the type writes the value: `012` and ` 12` aren't the number 12, since a
//! person whose number is 12 may be somebody else. What can't be of the type matches no row.
//! Never: shows a value; parameters of queries have a `Debug` of their own, since the driver logs them.

use bytes::BytesMut;
use std::error::Error;
use std::fmt;
use tokio_postgres::types::{IsNull, ToSql, Type, to_sql_checked};
use uuid::Uuid;

/// Types of columns.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Kind {
    /// smallint, integer, bigint.
    Integer,
    /// numeric.
    Numeric,
    /// uuid.
    Uuid,
    /// text, varchar.
    Text,
    /// character(n), which doesn't count blanks at the end.
    Padded,
    /// citext, with the schema that the extension is in.
    CaseInsensitive(String),
}

impl Kind {
    /// Of a type by its schema and name (a domain's base type).
    #[must_use]
    pub fn of(schema: &str, name: &str) -> Option<Self> {
        match (schema, name) {
            ("pg_catalog", "int2" | "int4" | "int8") => Some(Self::Integer),
            ("pg_catalog", "numeric") => Some(Self::Numeric),
            ("pg_catalog", "uuid") => Some(Self::Uuid),
            ("pg_catalog", "text" | "varchar") => Some(Self::Text),
            ("pg_catalog", "bpchar") => Some(Self::Padded),
            (schema, "citext") => Some(Self::CaseInsensitive(schema.to_owned())),
            _ => None,
        }
    }

    /// Whether a column of this type can hold the identifier.
    #[must_use]
    pub fn holds(&self, identifier: &str) -> bool {
        match self {
            Self::Integer => integer(identifier).is_some(),
            Self::Numeric => is_numeric(identifier),
            Self::Uuid => uuid(identifier).is_some(),
            // PostgreSQL's text has no NUL.
            Self::Text | Self::CaseInsensitive(_) => !identifier.contains('\0'),
            // 'a ' would match the 'a' of somebody else.
            Self::Padded => !identifier.contains('\0') && !identifier.ends_with(' '),
        }
    }

    /// These identifiers, all of which the type holds, as one parameter, and that parameter's type.
    #[must_use]
    pub fn parameter(&self, identifiers: Vec<&str>) -> (Hidden, Type) {
        match self {
            Self::Integer => (
                Hidden::Integers(identifiers.into_iter().filter_map(integer).collect()),
                Type::INT8_ARRAY,
            ),
            Self::Uuid => (
                Hidden::Uuids(identifiers.into_iter().filter_map(uuid).collect()),
                Type::UUID_ARRAY,
            ),
            Self::Text | Self::Numeric | Self::Padded | Self::CaseInsensitive(_) => (
                Hidden::Texts(identifiers.into_iter().map(str::to_owned).collect()),
                Type::TEXT_ARRAY,
            ),
        }
    }

    /// What turns the parameter into the column's type.
    #[must_use]
    pub fn cast(&self) -> String {
        match self {
            Self::Integer => "::pg_catalog.int8[]".into(),
            Self::Uuid => "::pg_catalog.uuid[]".into(),
            Self::Text => "::pg_catalog.text[]".into(),
            Self::Numeric => "::pg_catalog.text[]::pg_catalog.numeric[]".into(),
            Self::Padded => "::pg_catalog.text[]::pg_catalog.bpchar[]".into(),
            Self::CaseInsensitive(schema) => {
                format!(
                    "::pg_catalog.text[]::{}.citext[]",
                    super::statements::quote(schema)
                )
            }
        }
    }

    /// The type's own `=`, whatever the search path says.
    #[must_use]
    pub fn equals(&self) -> String {
        match self {
            Self::CaseInsensitive(schema) => {
                format!("OPERATOR({}.=)", super::statements::quote(schema))
            }
            _ => "OPERATOR(pg_catalog.=)".into(),
        }
    }
}

fn integer(text: &str) -> Option<i64> {
    let value: i64 = text.parse().ok()?;
    (value.to_string() == text).then_some(value)
}

fn uuid(text: &str) -> Option<Uuid> {
    // Only with hyphens; upper and lower case are the same value.
    (text.len() == 36).then(|| Uuid::try_parse(text).ok())?
}

/// Digits, without leading zeros, at most the 131072 + 16383 that PostgreSQL takes; shorter here, as nobody's number is
/// longer.
fn is_numeric(text: &str) -> bool {
    let digits = text.strip_prefix('-').unwrap_or(text);
    let (whole, fraction) = digits
        .split_once('.')
        .map_or((digits, None), |(w, f)| (w, Some(f)));
    let only_digits = |s: &str| !s.is_empty() && s.bytes().all(|b| b.is_ascii_digit());
    text.len() <= 1000
        && only_digits(whole)
        && (whole == "0" || !whole.starts_with('0'))
        && fraction.is_none_or(only_digits)
        && text != "-0"
}

/// A parameter whose values no log shows.
pub enum Hidden {
    /// For integers.
    Integers(Vec<i64>),
    /// For UUIDs.
    Uuids(Vec<Uuid>),
    /// For everything else.
    Texts(Vec<String>),
}

impl fmt::Debug for Hidden {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Hidden(..)")
    }
}

impl ToSql for Hidden {
    fn to_sql(
        &self,
        ty: &Type,
        out: &mut BytesMut,
    ) -> Result<IsNull, Box<dyn Error + Sync + Send>> {
        match self {
            Self::Integers(values) => values.to_sql(ty, out),
            Self::Uuids(values) => values.to_sql(ty, out),
            Self::Texts(values) => values.to_sql(ty, out),
        }
    }

    fn accepts(ty: &Type) -> bool {
        matches!(*ty, Type::INT8_ARRAY | Type::UUID_ARRAY | Type::TEXT_ARRAY)
    }

    to_sql_checked!();
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn a_number_is_itself_only() {
        for yes in ["0", "12", "-7", "9223372036854775807"] {
            assert!(Kind::Integer.holds(yes), "{yes}");
        }
        for no in [
            "",
            "012",
            " 12",
            "12 ",
            "+12",
            "-0",
            "1e3",
            "0x10",
            "1_000",
            "12\0",
            "٣",
            "9223372036854775808",
            "99999999999999999999999999",
        ] {
            assert!(!Kind::Integer.holds(no), "{no:?}");
        }
    }

    #[test]
    fn numeric_is_without_ornaments() {
        for yes in ["0", "-1.50", "12", "99999999999999999999999999", "0.1"] {
            assert!(Kind::Numeric.holds(yes), "{yes}");
        }
        for no in [
            "", "-", "00", "01.5", ".5", "5.", "1e3", "NaN", "Infinity", "-0", " 1", "1.2.3",
        ] {
            assert!(!Kind::Numeric.holds(no), "{no:?}");
        }
        assert!(!Kind::Numeric.holds(&"9".repeat(1001)));
    }

    #[test]
    fn a_uuid_has_hyphens() {
        assert!(Kind::Uuid.holds("550e8400-e29b-41d4-a716-446655440000"));
        assert!(Kind::Uuid.holds("550E8400-E29B-41D4-A716-446655440000"));
        for no in [
            "",
            "550e8400e29b41d4a716446655440000",
            "{550e8400-e29b-41d4-a716-446655440000}",
            "urn:uuid:550e8400-e29b-41d4-a716-446655440000",
            "550e8400-e29b-41d4-a716-44665544000g",
        ] {
            assert!(!Kind::Uuid.holds(no), "{no}");
        }
    }

    #[test]
    fn text_is_anything_without_nul() {
        for kind in [
            Kind::Text,
            Kind::Padded,
            Kind::CaseInsensitive("public".into()),
        ] {
            assert!(kind.holds("'; DROP TABLE x; --"));
            assert!(kind.holds("é 😀 \\ \" %"));
            assert!(!kind.holds("a\0b"));
        }
        assert!(Kind::Text.holds("a "));
        assert!(!Kind::Padded.holds("a "));
    }

    #[test]
    fn what_isnt_known_cant_be_matched() {
        assert_eq!(Kind::of("pg_catalog", "bytea"), None);
        assert_eq!(Kind::of("pg_catalog", "char"), None);
        assert_eq!(Kind::of("public", "text"), None);
        assert_eq!(
            Kind::of("x", "citext"),
            Some(Kind::CaseInsensitive("x".into()))
        );
    }

    proptest! {
        #[test]
        fn every_identifier_held_becomes_a_value(text in "[-+0-9a-f. ]{0,40}|\\PC{0,20}") {
            for kind in [Kind::Integer, Kind::Uuid, Kind::Text, Kind::Numeric, Kind::Padded] {
                if kind.holds(&text) {
                    let (hidden, _) = kind.parameter(vec![&text]);
                    let count = match &hidden {
                        Hidden::Integers(v) => v.len(),
                        Hidden::Uuids(v) => v.len(),
                        Hidden::Texts(v) => v.len(),
                    };
                    prop_assert_eq!(count, 1);
                    prop_assert_eq!(format!("{:?}", hidden), "Hidden(..)");
                }
            }
        }

        #[test]
        fn two_ways_to_write_a_number_are_never_both_held(a in "[-+0-9 ]{0,6}", b in "[-+0-9 ]{0,6}") {
            if Kind::Integer.holds(&a) && Kind::Integer.holds(&b) && integer(&a) == integer(&b) {
                prop_assert_eq!(a, b);
            }
        }
    }
}
