//! Which keys are a person's.
//!
//! Owns templates (`session:{customerId}:*`), what becomes of them with a person's identifiers, and which identifiers
//! could reach another person's keys. An identifier stands for itself: no character of it is a wildcard. Pure.
//! Never: shows a key.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::fmt;

use uuid::Uuid;

use crate::rights::connectors::{Failure, Reason, wanted};
use crate::rights::model::Identifiers;

/// A part of a template.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Piece {
    Text(String),
    /// The identifier of this name.
    Of(String),
    /// Anything.
    Any,
}

/// A key with placeholders, as the workflow has it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Template {
    /// As it is written.
    pub text: String,
    pieces: Vec<Piece>,
}

impl Template {
    /// Understands a template.
    ///
    /// # Errors
    /// If it has no placeholder, or something that the API's rules refuse.
    pub fn parse(text: &str) -> anyhow::Result<Self> {
        let mut pieces = Vec::new();
        let mut rest = text;
        while !rest.is_empty() {
            let end = rest.find(['{', '*']).unwrap_or(rest.len());
            let (literal, more) = rest.split_at(end);
            anyhow::ensure!(
                !literal.contains(['}', '?', '[', ']', '\\']),
                "key {text} has one of '}}', '?', '[', ']' and '\\' outside a placeholder"
            );
            if !literal.is_empty() {
                pieces.push(Piece::Text(literal.to_owned()));
            }
            rest = if let Some(more) = more.strip_prefix('*') {
                // Two are the same as one.
                if pieces.last() != Some(&Piece::Any) {
                    pieces.push(Piece::Any);
                }
                more
            } else if let Some(more) = more.strip_prefix('{') {
                let (name, more) = more
                    .split_once('}')
                    .ok_or_else(|| anyhow::anyhow!("key {text} has a '{{' without its '}}'"))?;
                pieces.push(Piece::Of(name.to_owned()));
                more
            } else {
                more
            };
        }
        let of = |p: &&Piece| matches!(p, Piece::Of(_));
        anyhow::ensure!(
            pieces.iter().any(|p| of(&p)),
            "key {text} has no placeholder: it would be everybody's"
        );
        let beside = pieces
            .windows(2)
            .any(|two| !two.iter().any(|p| matches!(p, Piece::Text(_))));
        anyhow::ensure!(
            !beside,
            "key {text} has nothing between a placeholder and '*' or another placeholder: it would be other people's, too"
        );
        Ok(Self {
            text: text.to_owned(),
            pieces,
        })
    }

    /// A glob for everybody's keys of this template.
    #[must_use]
    pub fn everybody(&self) -> Vec<u8> {
        let parts: Vec<Vec<u8>> = self
            .pieces
            .iter()
            .fold(vec![Vec::new()], |mut parts, piece| {
                match piece {
                    Piece::Text(text) => {
                        if let Some(last) = parts.last_mut() {
                            last.extend_from_slice(text.as_bytes());
                        }
                    }
                    Piece::Of(_) | Piece::Any => parts.push(Vec::new()),
                }
                parts
            });
        Pattern { parts }.glob()
    }

    /// The person's keys.
    ///
    /// # Errors
    /// If the person lacks an identifier, or one could reach another person's keys.
    fn fill(&self, identifiers: &Identifiers, guard: &Guard) -> Result<Pattern, Failure> {
        let mut parts = vec![Vec::new()];
        let mut before = String::new();
        for piece in &self.pieces {
            let text = match piece {
                Piece::Any => {
                    parts.push(Vec::new());
                    continue;
                }
                Piece::Text(text) => text.as_str(),
                Piece::Of(name) => {
                    let value = wanted(identifiers, name)?;
                    guard.pass(name, value, &before)?;
                    value
                }
            };
            if parts.len() == 1 && matches!(piece, Piece::Text(_)) {
                before.push_str(text);
            }
            if let Some(last) = parts.last_mut() {
                last.extend_from_slice(text.as_bytes());
            }
        }
        Ok(Pattern { parts })
    }
}

/// What an identifier must not have, so that it can't reach another person's keys.
///
/// In `session:{customerId}:*` the second `:` ends an identifier: with the identifier `12:34` it would be read as the
/// person 12, whose key `session:12:34:cart` it would match. And where there are `a:{id}` and `a:b:{id}`, the identifier
/// `b:12` of the first is the person 12 of the second.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Guard {
    /// Characters that end or begin an identifier.
    borders: BTreeSet<char>,
    /// What keys begin with, up to their first placeholder.
    beginnings: BTreeSet<String>,
}

impl Guard {
    /// Of all templates of a target.
    #[must_use]
    pub fn of(templates: &[Template]) -> Self {
        let mut guard = Self::default();
        for template in templates {
            let mut open = false;
            for (i, piece) in template.pieces.iter().enumerate() {
                match piece {
                    Piece::Any => open = true,
                    Piece::Text(_) => {}
                    Piece::Of(_) => {
                        let beside = |at: Option<usize>| match template.pieces.get(at?)? {
                            Piece::Text(text) => Some(text.as_str()),
                            _ => None,
                        };
                        guard
                            .borders
                            .extend(beside(Some(i + 1)).and_then(|t| t.chars().next()));
                        let before = beside(i.checked_sub(1)).and_then(|t| t.chars().last());
                        guard.borders.extend(before.filter(|_| open));
                    }
                }
            }
            if let [Piece::Text(first), Piece::Of(_), ..] = template.pieces.as_slice() {
                guard.beginnings.insert(first.clone());
            }
        }
        guard
    }

    /// Lets a value through that can stand for nobody else, behind the text `before`.
    fn pass(&self, name: &str, value: &str, before: &str) -> Result<(), Failure> {
        // A UUID has hyphens, and nobody is the beginning of a UUID.
        let uuid = value.len() == 36 && Uuid::try_parse(value).is_ok();
        let border = value
            .chars()
            .find(|c| self.borders.contains(c) && !(uuid && *c == '-'));
        if let Some(border) = border {
            return Err(Failure::new(
                Reason::Identifier,
                format!(
                    "the request's {name} has the character {border:?}, which ends an identifier in this target's keys: \
                     it could reach another person's keys, so they must be erased by hand"
                ),
            ));
        }
        let other = self.beginnings.iter().any(|b| {
            b.strip_prefix(before)
                .is_some_and(|more| !more.is_empty() && value.starts_with(more))
        });
        if other {
            return Err(Failure::new(
                Reason::Identifier,
                format!(
                    "the request's {name} begins as another kind of this target's keys does: it could reach another \
                     person's keys, so they must be erased by hand"
                ),
            ));
        }
        Ok(())
    }
}

/// A person's keys of one template: what stands between the `*`.
#[derive(Clone, PartialEq, Eq)]
pub struct Pattern {
    parts: Vec<Vec<u8>>,
}

impl fmt::Debug for Pattern {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Pattern(..)")
    }
}

impl Pattern {
    /// The key, if it is only one.
    #[must_use]
    pub fn exact(&self) -> Option<&[u8]> {
        match self.parts.as_slice() {
            [key] => Some(key),
            _ => None,
        }
    }

    /// What its keys begin with.
    fn head(&self) -> &[u8] {
        self.parts.first().map_or(&[], Vec::as_slice)
    }

    /// Whether a key is one of them.
    #[must_use]
    pub fn matches(&self, key: &[u8]) -> bool {
        let [first, middle @ .., last] = self.parts.as_slice() else {
            return self.exact() == Some(key);
        };
        let Some(mut rest) = key
            .strip_prefix(first.as_slice())
            .and_then(|k| k.strip_suffix(last.as_slice()))
        else {
            return false;
        };
        for part in middle.iter().filter(|p| !p.is_empty()) {
            let Some(at) = rest.windows(part.len()).position(|w| w == part.as_slice()) else {
                return false;
            };
            rest = rest.get(at + part.len()..).unwrap_or_default();
        }
        true
    }

    /// As Redis' `MATCH` takes it.
    #[must_use]
    pub fn glob(&self) -> Vec<u8> {
        let mut out = Vec::new();
        for (i, part) in self.parts.iter().enumerate() {
            if i > 0 {
                out.push(b'*');
            }
            for byte in part {
                if b"*?[]\\^".contains(byte) {
                    out.push(b'\\');
                }
                out.push(*byte);
            }
        }
        out
    }
}

/// A person's keys, by template.
///
/// # Errors
/// As [`Template::fill`].
pub fn fill(
    templates: &[Template],
    guard: &Guard,
    identifiers: &Identifiers,
) -> Result<Vec<Pattern>, Failure> {
    templates
        .iter()
        .map(|template| template.fill(identifiers, guard))
        .collect()
}

/// Finds whose a key is, among many.
pub struct Index<'p> {
    patterns: &'p [(usize, &'p Pattern)],
    /// Length of a beginning → the beginning → which patterns have it.
    heads: BTreeMap<usize, HashMap<&'p [u8], Vec<usize>>>,
}

impl<'p> Index<'p> {
    /// Of patterns, each with whose it is.
    #[must_use]
    pub fn new(patterns: &'p [(usize, &'p Pattern)]) -> Self {
        let mut heads: BTreeMap<usize, HashMap<&[u8], Vec<usize>>> = BTreeMap::new();
        for (i, (_, pattern)) in patterns.iter().enumerate() {
            let head = pattern.head();
            let of = heads.entry(head.len()).or_default();
            of.entry(head).or_default().push(i);
        }
        Self { patterns, heads }
    }

    /// Whose it is.
    #[must_use]
    pub fn whose(&self, key: &[u8]) -> Vec<usize> {
        let mut out = Vec::new();
        for (length, heads) in &self.heads {
            let Some(head) = key.get(..*length) else {
                break;
            };
            for i in heads.get(head).into_iter().flatten() {
                if let Some((who, pattern)) = self.patterns.get(*i)
                    && pattern.matches(key)
                {
                    out.push(*who);
                }
            }
        }
        out
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn identifiers(values: &[(&str, &str)]) -> Identifiers {
        let of = |(n, v): &(&str, &str)| ((*n).to_owned(), (*v).to_owned());
        Identifiers(values.iter().map(of).collect())
    }

    fn filled(templates: &[&str], value: &str) -> Result<Vec<Pattern>, Failure> {
        let templates: Vec<_> = templates
            .iter()
            .map(|t| Template::parse(t).unwrap())
            .collect();
        let guard = Guard::of(&templates);
        fill(
            &templates,
            &guard,
            &identifiers(&[("id", value), ("b", "7")]),
        )
    }

    /// What Redis documents of its globs.
    fn redis_matches(glob: &[u8], key: &[u8]) -> bool {
        match (glob, key) {
            ([], []) => true,
            ([b'*', more @ ..], _) => {
                redis_matches(more, key)
                    || key
                        .split_first()
                        .is_some_and(|(_, k)| redis_matches(glob, k))
            }
            ([b'?', g @ ..], [_, k @ ..]) => redis_matches(g, k),
            ([b'[', ..], [_, ..]) => panic!("a class in a glob of ours"),
            ([b'\\', c, g @ ..], [k, key @ ..]) => c == k && redis_matches(g, key),
            ([c, g @ ..], [k, key @ ..]) => c == k && redis_matches(g, key),
            _ => false,
        }
    }

    #[test]
    fn a_template_is_filled() {
        let one = &filled(&["session:{id}:*"], "12").unwrap()[0];
        assert_eq!(one.glob(), b"session:12:*");
        assert!(one.matches(b"session:12:") && one.matches(b"session:12:a:b"));
        for other in [
            "session:12",
            "session:123:x",
            "session:1:2",
            "xsession:12:x",
            "",
        ] {
            assert!(!one.matches(other.as_bytes()), "{other}");
        }
        let exact = &filled(&["p:{id}:{b}"], "12").unwrap()[0];
        assert_eq!(exact.exact(), Some(b"p:12:7".as_slice()));
        let middle = &filled(&["*:{id}:*-x"], "12").unwrap()[0];
        assert!(middle.matches(b":12:-x") && middle.matches(b"a:12:b-x"));
        assert!(!middle.matches(b"a:12-x") && !middle.matches(b":12-x"));
    }

    #[test]
    fn a_template_that_would_be_others_is_refused() {
        for bad in [
            "", "a", "*", "a:{id", "a:{id}*", "*{id}", "{a}{b}", "a?{id}", "[a]{id}", "a}{id}",
        ] {
            assert!(Template::parse(bad).is_err(), "{bad}");
        }
        assert_eq!(Template::parse("a**:{id}").unwrap().pieces.len(), 4);
    }

    #[test]
    fn an_identifier_that_reaches_others_is_refused() {
        let refused = |templates: &[&str], value| {
            filled(templates, value).is_err_and(|f| f.reason == Reason::Identifier)
        };
        assert!(refused(&["session:{id}:*"], "12:34"));
        assert!(refused(&["p:{id}", "p:{id}:settings"], "12:settings"));
        assert!(refused(&["*:{id}"], "x:12"));
        assert!(refused(&["a:{id}:{b}"], "1:2"));
        assert!(refused(&["a:{id}", "a:b:{id}"], "b:12"));
        assert!(refused(&["p:{id}"], ""));
        // Where nothing ends an identifier, it may have any character.
        assert!(!refused(&["p:{id}"], "urn:x:12"));
        assert!(!refused(&["p:{id}", "q:{id}"], "12:34"));
        assert!(!refused(
            &["cart-{id}-*"],
            "550e8400-e29b-41d4-a716-446655440000"
        ));
        assert!(refused(&["cart-{id}-*"], "550e8400-e29b"));
    }

    #[test]
    fn nothing_shows_a_key() {
        let pattern = &filled(&["p:{id}"], "geheim").unwrap()[0];
        assert!(!format!("{pattern:?}").contains("geheim"));
        let failure = filled(&["p:{id}:*"], "geheim:x").unwrap_err();
        assert!(!failure.to_string().contains("geheim"), "{failure}");
    }

    fn hostile() -> impl Strategy<Value = String> {
        prop_oneof![
            "[*?\\[\\]\\\\^:a1-]{1,6}",
            "\\PC{1,5}",
            Just("\0".to_owned()),
            Just("[^1]".to_owned()),
            Just("[0-9]".to_owned()),
            "[0-9]{1,3}",
        ]
    }

    fn template() -> impl Strategy<Value = &'static str> {
        prop::sample::select(vec![
            "s:{id}:*",
            "p:{id}",
            "s-{id}",
            "a:{id}:x",
            "*:{id}",
            "{id}:*",
            "a:{id}:*:z",
            "*:{id}:*",
            "p:q:{id}",
            "u.{id}.*",
        ])
    }

    proptest! {
        #![proptest_config(ProptestConfig { cases: 3000, ..ProptestConfig::default() })]

        /// What Redis finds by our glob is what we take for the person's.
        #[test]
        fn redis_and_we_agree(template in template(), value in hostile(), key in "[*?\\[\\]\\\\:sap1q.-]{0,10}", own in any::<bool>()) {
            let Ok(patterns) = filled(&[template], &value) else { return Ok(()) };
            let key = if own { template.replace('*', &key).replace("{id}", &value) } else { key };
            let (pattern, key) = (&patterns[0], key.as_bytes());
            prop_assert_eq!(redis_matches(&pattern.glob(), key), pattern.matches(key));
            if own {
                prop_assert!(pattern.matches(key));
                let everybody = Template::parse(template).unwrap().everybody();
                prop_assert!(redis_matches(&everybody, key));
            }
        }

        /// Whatever the identifier is, keys of people with another ordinary identifier aren't its.
        #[test]
        fn nobody_elses_keys(
            templates in prop::sample::subsequence(vec!["s:{id}:*", "p:{id}", "p:{id}:x", "p:q:{id}", "a-{id}", "a-{id}-*"], 1..4),
            value in hostile(),
            other in "[a-z0-9@*?\\[\\]]{1,4}",
            fill in "[a-z0-9*?]{0,4}",
        ) {
            // What begins another kind of key isn't an ordinary identifier.
            if other == value || other.starts_with('q') { return Ok(()) }
            let Ok(patterns) = filled(&templates, &value) else { return Ok(()) };
            for template in &templates {
                let key = template.replace('*', &fill).replace("{id}", &other);
                for pattern in &patterns {
                    prop_assert!(!pattern.matches(key.as_bytes()), "{} of {} is {}'s", key, other, value);
                }
            }
        }

        /// The index finds the same as asking one after the other.
        #[test]
        fn the_index_forgets_nobody(
            people in prop::collection::vec((template(), "[0-9*]{1,2}"), 1..20),
            key in "[sapu]?[:.-]?[0-9*]{0,2}[:.-]?[0-9xz:]{0,3}",
        ) {
            let patterns: Vec<Pattern> = people.iter().map(|(t, v)| filled(&[*t], v).unwrap().remove(0)).collect();
            let listed: Vec<(usize, &Pattern)> = patterns.iter().enumerate().collect();
            let mut found = Index::new(&listed).whose(key.as_bytes());
            found.sort_unstable();
            let expected: Vec<usize> = (0..patterns.len()).filter(|i| patterns[*i].matches(key.as_bytes())).collect();
            prop_assert_eq!(found, expected);
        }
    }
}
