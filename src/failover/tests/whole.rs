//! What the quiet phase has to reach.

use std::collections::BTreeSet;

use super::oracle::V;
use super::world::World;
use crate::failover::{Local, Node, Role};

impl World {
    /// Nobody who may be primary has a copy that counts: the store stays down by right (rule 3).
    pub fn down_by_right(&self) -> bool {
        if self.slots.iter().any(|s| s.pg.leads()) {
            return false;
        }
        let Some(c) = self
            .slots
            .iter()
            .filter_map(|s| s.disk.configuration.as_ref())
            .max_by_key(|c| c.at())
        else {
            return false;
        };
        // It might also have diverged from those who may not.
        self.slots.iter().any(|s| !c.may_be_primary.contains(&s.id))
            || self.slots.iter().all(|s| s.disk.rebuilding)
    }

    /// Why the store isn't whole, if it isn't.
    pub fn short_of(&self) -> Option<String> {
        let serving: Vec<usize> = (0..self.slots.len())
            .filter(|i| {
                self.slots[*i]
                    .node
                    .as_ref()
                    .is_some_and(|n| n.serving().is_some())
            })
            .collect();
        let [p] = serving.as_slice() else {
            return Some(format!("primaries: {serving:?}"));
        };
        let slot = &self.slots[*p];
        if !slot.pg.leads() || self.now >= slot.pg.until {
            return Some(format!("{p} has no lease"));
        }
        let Some(Role::Primary(primary)) = slot.node.as_ref().map(Node::role) else {
            return Some("none".to_owned());
        };
        if primary.change.is_some() || primary.renewal.is_some() {
            return Some("a change is under way".to_owned());
        }
        let c = &primary.committed;
        if c.voters != self.wish.voters
            || c.durability != self.wish.durability
            || c.witness != self.wish.witness
        {
            return Some(format!(
                "voters {:?}, wished {:?}",
                c.voters, self.wish.voters
            ));
        }
        if c.may_be_primary != self.wish.may_be_primary {
            return Some(format!(
                "may be primary {:?}, wished {:?}",
                c.may_be_primary, self.wish.may_be_primary
            ));
        }
        let others: BTreeSet<V> = c.copies().copied().filter(|v| *v != c.primary).collect();
        if c.sync.members != others || c.sync.acks != c.acks(others.len()) {
            return Some(format!("rule {:?}", c.sync));
        }
        for (i, slot) in self.slots.iter().enumerate() {
            if i == *p {
                continue;
            }
            let Some(node) = &slot.node else {
                return Some(format!("{i} is down"));
            };
            let follows =
                matches!(node.local(), Local::Following { upstream, .. } if *upstream == c.primary);
            if !follows || slot.pg.connection.is_none() {
                return Some(format!("{i} doesn't follow: {:?}", node.local()));
            }
            if node.durable().rebuilding {
                return Some(format!("{i} is marked as rebuilding"));
            }
        }
        None
    }
}
