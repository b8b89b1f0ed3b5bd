//! JSON from a stranger.
//!
//! Owns the reading: a name given twice is refused, since two readers could take different ones for the person; and
//! each field is taken out of its object with words for what is wrong with it, and where.
//! Never: repeats what it read in an error.

use std::fmt;

use jiff::Timestamp;
use serde::de::{DeserializeSeed, Error as _, MapAccess, SeqAccess, Visitor};
use serde::{Deserialize, Deserializer};
use serde_json::{Map, Value};

use super::problem::{Fault, Kind, Problem};

/// Said by the reader of objects, and known by [`parse`].
const TWICE: &str = "a name is given twice";

/// Reads a body.
///
/// # Errors
/// If it is no JSON, or an object gives a name twice.
pub fn parse(body: &[u8]) -> Result<Value, Problem> {
    match serde_json::from_slice::<Once>(body) {
        Ok(Once(value)) => Ok(value),
        // The parser's own words can quote what it read; its place can't.
        Err(e) => {
            let what = if e.is_data() {
                format!("{TWICE} in the same object")
            } else if e.is_eof() {
                "the body ends too early".to_owned()
            } else {
                "the body is not JSON".to_owned()
            };
            let place = format!("line {}, column {}", e.line(), e.column());
            Err(Problem::new(
                Kind::MalformedJson,
                format!("{what} ({place}): send one JSON object"),
            ))
        }
    }
}

/// A value in whose objects each name is there once.
struct Once(Value);

impl<'de> Deserialize<'de> for Once {
    fn deserialize<D: Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
        d.deserialize_any(Reader).map(Self)
    }
}

struct Reader;

impl<'de> DeserializeSeed<'de> for Reader {
    type Value = Value;
    fn deserialize<D: Deserializer<'de>>(self, d: D) -> Result<Value, D::Error> {
        d.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for Reader {
    type Value = Value;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("JSON")
    }
    fn visit_unit<E>(self) -> Result<Value, E> {
        Ok(Value::Null)
    }
    fn visit_bool<E>(self, v: bool) -> Result<Value, E> {
        Ok(v.into())
    }
    fn visit_i64<E>(self, v: i64) -> Result<Value, E> {
        Ok(v.into())
    }
    fn visit_u64<E>(self, v: u64) -> Result<Value, E> {
        Ok(v.into())
    }
    fn visit_f64<E>(self, v: f64) -> Result<Value, E> {
        Ok(v.into())
    }
    fn visit_str<E>(self, v: &str) -> Result<Value, E> {
        Ok(v.into())
    }
    fn visit_string<E>(self, v: String) -> Result<Value, E> {
        Ok(v.into())
    }
    fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Value, A::Error> {
        let mut all = Vec::new();
        while let Some(v) = seq.next_element_seed(Reader)? {
            all.push(v);
        }
        Ok(Value::Array(all))
    }
    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Value, A::Error> {
        let mut all = Map::new();
        while let Some(name) = map.next_key::<String>()? {
            if all.contains_key(&name) {
                return Err(A::Error::custom(TWICE));
            }
            all.insert(name, map.next_value_seed(Reader)?);
        }
        Ok(Value::Object(all))
    }
}

/// An object whose fields are taken out one by one. What is wrong is collected, so that a developer sees all of it.
pub struct Fields {
    pointer: String,
    map: Map<String, Value>,
}

fn type_of(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "a boolean",
        Value::Number(_) => "a number",
        Value::String(_) => "a string",
        Value::Array(_) => "an array",
        Value::Object(_) => "an object",
    }
}

fn wrong(pointer: String, expected: &str, value: &Value) -> Fault {
    let detail = format!("this must be {expected}, and is {}", type_of(value));
    Fault::new(Kind::WrongType, pointer, detail)
}

impl Fields {
    /// Of an object at a pointer.
    pub fn of(value: Value, pointer: String, faults: &mut Vec<Fault>) -> Option<Self> {
        match value {
            Value::Object(map) => Some(Self { pointer, map }),
            other => {
                faults.push(wrong(pointer, "an object", &other));
                None
            }
        }
    }

    /// Where a field is. For names that are known.
    #[must_use]
    pub fn pointer(&self, name: &str) -> String {
        format!("{}/{name}", self.pointer)
    }

    /// Takes a field. `null` counts as absent.
    pub fn take(&mut self, name: &str) -> Option<Value> {
        self.map.remove(name).filter(|v| !v.is_null())
    }

    /// Notes that a field must be there.
    pub fn missing(&self, name: &str, why: &str, faults: &mut Vec<Fault>) {
        let detail = format!("the field {name} is missing: {why}");
        faults.push(Fault::new(Kind::MissingField, self.pointer.clone(), detail));
    }

    /// Takes a string.
    pub fn string(&mut self, name: &str, faults: &mut Vec<Fault>) -> Option<String> {
        match self.take(name)? {
            Value::String(s) => Some(s),
            other => {
                faults.push(wrong(self.pointer(name), "a string", &other));
                None
            }
        }
    }

    /// Takes a boolean.
    pub fn boolean(&mut self, name: &str, faults: &mut Vec<Fault>) -> Option<bool> {
        match self.take(name)? {
            Value::Bool(b) => Some(b),
            other => {
                faults.push(wrong(self.pointer(name), "true or false", &other));
                None
            }
        }
    }

    /// Takes an array.
    pub fn array(&mut self, name: &str, faults: &mut Vec<Fault>) -> Option<Vec<Value>> {
        match self.take(name)? {
            Value::Array(all) => Some(all),
            other => {
                faults.push(wrong(self.pointer(name), "an array", &other));
                None
            }
        }
    }

    /// Takes a time.
    pub fn time(&mut self, name: &str, faults: &mut Vec<Fault>) -> Option<Timestamp> {
        let text = self.string(name, faults)?;
        let parsed = text.parse().ok();
        if parsed.is_none() {
            faults.push(Fault::new(
                Kind::InvalidTime,
                self.pointer(name),
                "this is no time: write it as RFC 3339, such as 2026-03-01T09:30:00Z",
            ));
        }
        parsed
    }

    /// Complains of what is left, naming what may be there.
    pub fn done(self, known: &[&str], faults: &mut Vec<Fault>) {
        if self.map.is_empty() {
            return;
        }
        let left = self.map.len();
        let detail = format!(
            "{left} unknown field{} here; known are: {}",
            if left == 1 { "" } else { "s" },
            known.join(", ")
        );
        faults.push(Fault::new(Kind::UnknownField, self.pointer, detail));
    }

    /// All that is left.
    pub fn rest(self) -> Map<String, Value> {
        self.map
    }
}

/// Takes a string out of an array.
pub fn item(value: Value, pointer: String, faults: &mut Vec<Fault>) -> Option<String> {
    match value {
        Value::String(s) => Some(s),
        other => {
            faults.push(wrong(pointer, "a string", &other));
            None
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn a_name_given_twice_is_refused_at_any_depth() {
        for body in [
            r#"{"a":1,"a":2}"#,
            r#"{"identifiers":{"email":"x@canary","email":"y"}}"#,
            r#"[{"a":{"b":1,"b":1}}]"#,
        ] {
            let problem = parse(body.as_bytes()).unwrap_err();
            assert!(problem.detail.contains("twice"), "{problem:?}");
            assert!(!problem.detail.contains("canary"));
        }
        assert!(parse(br#"[{"a":1},{"a":1}]"#).is_ok());
    }

    #[test]
    fn depth_is_bounded() {
        let deep = "[".repeat(100_000);
        assert_eq!(
            parse(deep.as_bytes()).unwrap_err().kind,
            Kind::MalformedJson
        );
    }

    proptest! {
        /// What isn't JSON is refused, without its content in the words; and what is gets read as it is.
        #[test]
        fn never_repeats(secret in "[qxz]{8,20}", cut in 0usize..60) {
            let whole = format!(r#"{{"identifiers":{{"email":"{secret}"}},"kind":"deletion"}}"#);
            let body = &whole.as_bytes()[..cut.min(whole.len())];
            match parse(body) {
                Ok(v) => prop_assert_eq!(v, serde_json::from_slice::<Value>(body).unwrap()),
                Err(problem) => {
                    let said = format!("{problem:?}");
                    prop_assert!(!said.contains(&secret));
                }
            }
        }
    }
}
