//! In which order tables are emptied of a person: what refers to something goes before it.
//!
//! Owns how foreign keys that go in a circle are dealt with. Pure.

/// What a foreign key does when what it refers to goes first.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Holds {
    /// Refuses at once.
    AtOnce,
    /// Can be told to refuse at the end of the transaction only.
    AtTheEnd,
    /// Doesn't refuse: it deletes the row that refers, or makes it refer to nothing.
    Never,
}

/// A foreign key.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Key {
    /// The table that has it.
    pub child: usize,
    /// The table it refers to.
    pub parent: usize,
    /// What it does.
    pub holds: Holds,
}

/// An order.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Order {
    /// Every table once.
    pub tables: Vec<usize>,
    /// Whether constraints must wait for the end of the transaction.
    pub defer: bool,
}

/// Orders tables `0..count`.
///
/// # Errors
/// The tables that refer to each other in a circle that nothing opens, ascending.
pub fn order(count: usize, keys: &[Key]) -> Result<Order, Vec<usize>> {
    // A row that refers to its own table goes by the same statement as what it refers to.
    let mut keys: Vec<Key> = keys
        .iter()
        .copied()
        .filter(|k| k.child != k.parent)
        .collect();
    let mut left: Vec<usize> = (0..count).collect();
    let mut tables = Vec::with_capacity(count);
    let mut defer = false;
    while !left.is_empty() {
        let free = left
            .iter()
            .position(|table| !keys.iter().any(|k| k.parent == *table));
        if let Some(at) = free {
            let table = left.remove(at);
            keys.retain(|k| k.child != table);
            tables.push(table);
            continue;
        }
        // Only keys that are part of a circle are given up, the harmless ones first.
        let circular: Vec<Key> = keys
            .iter()
            .copied()
            .filter(|k| reaches(&keys, k.parent, k.child))
            .collect();
        let open = |holds| circular.iter().any(|k| k.holds == holds);
        let given_up = if open(Holds::Never) {
            Holds::Never
        } else if open(Holds::AtTheEnd) {
            defer = true;
            Holds::AtTheEnd
        } else {
            let mut circle: Vec<usize> = circular.iter().map(|k| k.child).collect();
            circle.sort_unstable();
            circle.dedup();
            return Err(circle);
        };
        keys.retain(|k| k.holds != given_up || !circular.contains(k));
    }
    Ok(Order { tables, defer })
}

/// Whether one comes from `from` to `to` along the keys, child to parent.
fn reaches(keys: &[Key], from: usize, to: usize) -> bool {
    let mut seen = vec![from];
    let mut at = 0;
    while let Some(&table) = seen.get(at) {
        if table == to {
            return true;
        }
        at += 1;
        for key in keys.iter().filter(|k| k.child == table) {
            if !seen.contains(&key.parent) {
                seen.push(key.parent);
            }
        }
    }
    false
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn key(child: usize, parent: usize, holds: Holds) -> Key {
        Key {
            child,
            parent,
            holds,
        }
    }

    #[test]
    fn children_before_parents_and_otherwise_as_listed() {
        use Holds::AtOnce;
        let keys = [key(2, 0, AtOnce), key(1, 2, AtOnce), key(3, 3, AtOnce)];
        let got = order(4, &keys).unwrap();
        assert_eq!(got.tables, [1, 2, 0, 3]);
        assert!(!got.defer);
    }

    #[test]
    fn a_circle_is_opened_where_it_does_no_harm() {
        let keys = [key(0, 1, Holds::AtTheEnd), key(1, 0, Holds::Never)];
        let got = order(2, &keys).unwrap();
        assert_eq!((got.tables, got.defer), (vec![0, 1], false));
    }

    #[test]
    fn a_circle_is_opened_by_waiting() {
        let keys = [key(0, 1, Holds::AtOnce), key(1, 0, Holds::AtTheEnd)];
        let got = order(2, &keys).unwrap();
        assert_eq!((got.tables, got.defer), (vec![0, 1], true));
    }

    #[test]
    fn a_closed_circle_is_named_without_its_neighbours() {
        let keys = [
            key(1, 2, Holds::AtOnce),
            key(2, 1, Holds::AtOnce),
            key(2, 3, Holds::Never),
            key(0, 1, Holds::AtOnce),
        ];
        assert_eq!(order(4, &keys), Err(vec![1, 2]));
    }

    fn holds() -> impl Strategy<Value = Holds> {
        prop_oneof![
            Just(Holds::AtOnce),
            Just(Holds::AtTheEnd),
            Just(Holds::Never)
        ]
    }

    fn graph() -> impl Strategy<Value = (usize, Vec<Key>)> {
        (1_usize..9).prop_flat_map(|count| {
            let edge = (0..count, 0..count, holds());
            let edge = edge.prop_map(|(child, parent, holds)| key(child, parent, holds));
            (Just(count), prop::collection::vec(edge, 0..20))
        })
    }

    proptest! {
        #![proptest_config(ProptestConfig { cases: 2000, ..ProptestConfig::default() })]

        #[test]
        fn what_refers_goes_first((count, keys) in graph()) {
            match order(count, &keys) {
                Ok(got) => {
                    let mut all = got.tables.clone();
                    all.sort_unstable();
                    prop_assert_eq!(all, (0..count).collect::<Vec<_>>());
                    let place = |t: usize| got.tables.iter().position(|x| *x == t).unwrap();
                    for k in keys.iter().filter(|k| k.child != k.parent) {
                        let first = place(k.child) < place(k.parent);
                        let allowed = match k.holds {
                            Holds::AtOnce => false,
                            Holds::AtTheEnd => got.defer,
                            Holds::Never => true,
                        };
                        prop_assert!(first || allowed, "{:?} in {:?}", k, got);
                        // Outside circles the order is always kept.
                        prop_assert!(first || reaches(&keys, k.parent, k.child));
                    }
                }
                Err(circle) => {
                    // The same by brute force: no order of the tables satisfies the keys that refuse at once.
                    let hard: Vec<Key> =
                        keys.iter().copied().filter(|k| k.holds == Holds::AtOnce && k.child != k.parent).collect();
                    prop_assert!(!circle.is_empty());
                    for table in &circle {
                        let turns = hard
                            .iter()
                            .any(|k| k.child == *table && reaches(&hard, k.parent, *table));
                        prop_assert!(turns, "{} is in no circle of {:?}", table, hard);
                    }
                }
            }
        }

        #[test]
        fn what_can_be_ordered_is((count, keys) in graph()) {
            // Keys that go from a higher table to a lower one only have no circle.
            let keys: Vec<Key> = keys.iter().copied().filter(|k| k.child > k.parent).collect();
            prop_assert!(!order(count, &keys).unwrap().defer);
        }
    }
}
