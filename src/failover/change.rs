//! Changes of the configuration within a term: who votes, whose acknowledgement counts, who may be primary.
//!
//! Owns rule 5. One change at a time, one voter at a time. PostgreSQL first satisfies the old and the new rule;
//! then every member of the new rule has flushed all that was acknowledged before; then majorities of the old
//! and of the new voters accept; then the old rule is dropped.
//! Never: withdraws a change that was sent. Its rule stays in force until a higher version has its majorities.

use std::collections::{BTreeMap, BTreeSet};

use super::message::{Message, Streaming, Wish};
use super::node::{Node, Role};
use super::planted::Mistake;
use super::primary::Primary;
use super::types::{Configuration, Durability, Id, Lsn, Millis, Rule, Term};

/// A change under way.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Change<I: Id> {
    /// To what.
    pub to: Configuration<I>,
    /// How far it is.
    pub stage: Stage<I>,
    /// Since when it's there.
    pub since: Millis,
}

/// How far a change is.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Stage<I: Id> {
    /// PostgreSQL is being told to satisfy both rules.
    Joint(Rule<I>),
    /// The members of the new rule have to flush up to here.
    Flushing(Lsn),
    /// It was sent.
    Accepting {
        /// Who accepted.
        accepted: BTreeSet<I>,
        /// When those who haven't were asked last.
        asked: Millis,
    },
}

impl<I: Id> Primary<I> {
    /// What was sent and has no majority yet.
    pub(super) fn proposed(&self) -> Option<&Configuration<I>> {
        let renewal = self.renewal.as_ref().and_then(|r| r.proposed.as_ref());
        renewal.or_else(|| {
            self.change
                .as_ref()
                .filter(|c| matches!(c.stage, Stage::Accepting { .. }))
                .map(|c| &c.to)
        })
    }

    /// The next change, if one is due.
    fn due_change(
        &self,
        now: Millis,
        me: &I,
        wish: Option<&Wish<I>>,
        timing: &super::Timing,
        hasty: bool,
    ) -> Option<Configuration<I>> {
        let old = &self.committed;
        let durability = wish.map_or(old.durability, |w| w.durability);
        let kept = |id: &I| wish.is_none_or(|w| w.voters.contains(id));
        let live: BTreeSet<I> = old
            .copies()
            // One that streams and hasn't heard of this era can't say in which its copy ends.
            .filter(|id| *id != me && kept(id) && (self.informed.contains(*id) || hasty))
            .filter(|id| {
                self.streaming.get(id).is_some_and(|s| {
                    durability == Durability::Required
                        || s.since >= timing.steady
                        || old.sync.members.contains(id)
                })
            })
            .cloned()
            .collect();
        let mut new = Configuration {
            version: old.version + 1,
            durability,
            ..old.clone()
        };
        // Before anything that PostgreSQL has a part in: until a majority knows, who may be primary no more could be elected.
        let may: Option<BTreeSet<I>> = wish.map(|w| {
            w.may_be_primary
                .intersection(&old.voters)
                .cloned()
                .collect()
        });
        // Never on nobody: that could be taken back by a primary only. Whoever is barred isn't elected all the same.
        if let Some(may) = may.filter(|may| !may.is_empty() && *may != old.may_be_primary) {
            return Some(Configuration {
                may_be_primary: may,
                durability: old.durability,
                ..new
            });
        }
        let obsolete = old.sync.members.iter().any(|m| !kept(m));
        let sync = next_rule(&new, &live, obsolete);
        if durability != old.durability || sync != old.sync {
            new.sync = sync;
            return Some(new);
        }
        let wish = wish?;
        let joining = wish.voters.difference(&old.voters).filter(|id| {
            if wish.witness.as_ref() == Some(*id) {
                // Never two of them, and not beside a primary that is still alone: it would depend on it.
                old.witness.is_none() && old.copies().count().is_multiple_of(2)
            } else {
                self.streaming.contains_key(*id)
            }
        });
        let joined = joining.map(|id| {
            let mut new = new.clone();
            new.voters.insert(id.clone());
            if wish.witness.as_ref() == Some(id) {
                new.witness = Some(id.clone());
            }
            new
        });
        let leaving = old
            .voters
            .difference(&wish.voters)
            .filter(|id| *id != me && !old.sync.members.contains(*id) && !wish.voters.is_empty());
        let left = leaving.map(|id| {
            let mut new = new.clone();
            new.voters.remove(id);
            new.may_be_primary.remove(id);
            if new.witness.as_ref() == Some(id) {
                new.witness = None;
            }
            new
        });
        let left = left.filter(|new| !new.may_be_primary.is_empty());
        // A change that was sent can't be withdrawn: one without a majority at hand would end the lease.
        let mut at_hand: BTreeSet<I> = self
            .answered
            .iter()
            .filter(|(_, at)| now < **at + timing.lease / 2)
            .map(|(id, _)| id.clone())
            .collect();
        at_hand.insert(me.clone());
        joined.chain(left).find(|new| new.majority(&at_hand))
    }
}

/// The rule for those who stream now.
fn next_rule<I: Id>(new: &Configuration<I>, live: &BTreeSet<I>, obsolete: bool) -> Rule<I> {
    let old = &new.sync;
    if new.durability == Durability::Preferred {
        return Rule {
            acks: new.acks(live.len()),
            members: live.clone(),
        };
    }
    let acks = new.acks(0);
    // A rule that shrinks to what is alive would acknowledge commits that one more loss takes away; so under
    // Required members only change to let more of those that are there acknowledge.
    let better = !live.is_subset(&old.members) || old.members.intersection(live).count() < acks;
    if live.len() >= acks && live != &old.members && (better || obsolete) {
        return Rule {
            acks,
            members: live.clone(),
        };
    }
    if acks < old.acks || live.len() >= acks {
        return Rule {
            acks,
            members: old.members.clone(),
        };
    }
    old.clone()
}

impl<I: Id> Node<I> {
    pub(super) fn on_standbys(
        &mut self,
        now: Millis,
        position: Lsn,
        streaming: BTreeMap<I, Streaming>,
    ) {
        if let Role::Primary(primary) = &mut self.role {
            primary.position = primary.position.max(position);
            primary.streaming = streaming;
            self.tick_primary(now);
        }
    }

    pub(super) fn on_enforced(&mut self, now: Millis, rule: &Rule<I>, position: Lsn) {
        if let Role::Primary(primary) = &mut self.role {
            primary.position = primary.position.max(position);
            if let Some(change) = &mut primary.change
                && matches!(&change.stage, Stage::Joint(joint) if joint == rule)
            {
                change.stage = Stage::Flushing(position);
                change.since = now;
            }
            self.tick_primary(now);
        } else {
            self.election_enforced(now, rule);
        }
    }

    pub(super) fn tick_change(&mut self, now: Millis) {
        let Role::Primary(primary) = &self.role else {
            return;
        };
        if primary.renewal.is_some() || primary.handing.is_some() || self.cutting > 0 {
            return;
        }
        let Some(change) = &primary.change else {
            if let Some(to) = primary.due_change(
                now,
                &self.me,
                self.wish.as_ref(),
                &self.timing,
                self.errs(Mistake::UninformedMembers),
            ) {
                self.begin_change(now, to);
            }
            return;
        };
        match &change.stage {
            Stage::Joint(_) => {}
            Stage::Flushing(position) => {
                let flushed = |m: &I| {
                    primary
                        .streaming
                        .get(m)
                        .is_some_and(|s| s.flushed >= *position)
                };
                if change.to.sync.members.iter().all(flushed) || self.errs(Mistake::NotFlushed) {
                    self.propose_change(now);
                } else if now >= change.since + self.timing.round {
                    // Not sent yet: a member that went away must not hold commits up under the joint rule.
                    self.drop_unsent_change();
                }
            }
            Stage::Accepting { asked, .. } => {
                if self.errs(Mistake::ChangeWithdrawn) && now >= change.since + self.timing.round {
                    self.withdraw();
                } else if now >= asked + self.timing.retry {
                    self.ask_change(now);
                }
            }
        }
    }

    fn begin_change(&mut self, now: Millis, to: Configuration<I>) {
        let old = match &self.role {
            Role::Primary(primary) => primary.committed.sync.clone(),
            _ => return,
        };
        if old == to.sync {
            let Role::Primary(primary) = &mut self.role else {
                return;
            };
            primary.change = Some(Change {
                to,
                stage: Stage::Joint(old),
                since: now,
            });
            return self.propose_change(now);
        }
        let joint = if self.errs(Mistake::NewRuleEarly) {
            to.sync.clone()
        } else {
            old.joint(&to.sync)
        };
        let Role::Primary(primary) = &mut self.role else {
            return;
        };
        primary.change = Some(Change {
            to,
            stage: Stage::Joint(joint.clone()),
            since: now,
        });
        primary.rule = joint.clone();
        // Also if it's what is enforced already: the answer says where the log was when it certainly was.
        self.out.push(super::Effect::Enforce(joint));
    }

    /// Gives up a change that nobody was asked to accept yet.
    pub(super) fn drop_unsent_change(&mut self) {
        let Role::Primary(primary) = &mut self.role else {
            return;
        };
        let unsent = primary
            .change
            .as_ref()
            .is_some_and(|c| !matches!(c.stage, Stage::Accepting { .. }));
        if unsent {
            primary.change = None;
            let rule = primary.committed.sync.clone();
            self.enforce(&rule);
        }
    }

    /// Planted: what must never be done with a change that was sent.
    fn withdraw(&mut self) {
        if let Role::Primary(primary) = &mut self.role {
            primary.change = None;
            let rule = primary.committed.sync.clone();
            self.enforce(&rule);
        }
    }

    fn propose_change(&mut self, now: Millis) {
        let me = self.me.clone();
        let Role::Primary(primary) = &mut self.role else {
            return;
        };
        let Some(change) = &mut primary.change else {
            return;
        };
        change.stage = Stage::Accepting {
            accepted: BTreeSet::from([me]),
            asked: now,
        };
        let to = change.to.clone();
        self.note_configuration(&to);
        self.durable.configuration = Some(to);
        self.persist();
        self.ask_change(now);
        self.settle_change(now);
    }

    fn ask_change(&mut self, now: Millis) {
        let history = self.durable.history.clone();
        let Role::Primary(primary) = &mut self.role else {
            return;
        };
        let old = primary.committed.voters.clone();
        let Some(change) = &mut primary.change else {
            return;
        };
        let Stage::Accepting { accepted, asked } = &mut change.stage else {
            return;
        };
        *asked = now;
        let missing: Vec<I> = old
            .union(&change.to.voters)
            .filter(|v| !accepted.contains(*v))
            .cloned()
            .collect();
        let message = Message::Accept {
            configuration: change.to.clone(),
            history,
        };
        for voter in missing {
            self.send(&voter, message.clone());
        }
    }

    pub(super) fn on_change_accepted(&mut self, now: Millis, from: I, term: Term, version: u64) {
        if self.renewal_accepted(now, &from, (term, version)) {
            return;
        }
        let Role::Primary(primary) = &mut self.role else {
            return;
        };
        if let Some(change) = &mut primary.change
            && change.to.at() == (term, version)
            && let Stage::Accepting { accepted, .. } = &mut change.stage
        {
            accepted.insert(from);
            self.settle_change(now);
        }
    }

    /// With both majorities the old rule is dropped.
    fn settle_change(&mut self, now: Millis) {
        let Role::Primary(primary) = &mut self.role else {
            return;
        };
        let Some(change) = &primary.change else {
            return;
        };
        let Stage::Accepting { accepted, .. } = &change.stage else {
            return;
        };
        if !primary.committed.majority(accepted) || !change.to.majority(accepted) {
            return;
        }
        let to = change.to.clone();
        primary.commit(to.clone());
        primary.change = None;
        self.enforce(&to.sync);
        self.tick_primary(now);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const W: u8 = 90;
    const X: u8 = 91;

    fn set(of: &[u8]) -> BTreeSet<u8> {
        of.iter().copied().collect()
    }

    fn wish(voters: &[u8], witness: Option<u8>) -> Wish<u8> {
        Wish {
            voters: set(voters),
            witness,
            may_be_primary: set(&[1]),
            barred: BTreeSet::new(),
            durability: Durability::Required,
        }
    }

    /// Primary 1 of these voters, of whom these have just answered, and stream unless they're a witness.
    fn next(voters: &[u8], answering: &[u8], wish: &Wish<u8>) -> Option<BTreeSet<u8>> {
        let voters = set(voters);
        let witness = voters.iter().copied().find(|v| *v >= W);
        let mut committed = Configuration {
            term: 1,
            version: 1,
            primary: 1,
            voters,
            witness,
            sync: Rule::default(),
            durability: Durability::Required,
            may_be_primary: set(&[1]),
        };
        committed.sync.acks = committed.acks(0);
        let mut primary = Primary::new(committed, &set(answering), 10_000, 0);
        primary.streaming = answering
            .iter()
            .filter(|id| **id < W)
            .map(|id| {
                let streaming = Streaming {
                    flushed: 0,
                    since: 0,
                };
                (*id, streaming)
            })
            .collect();
        let timing = crate::failover::Timing::new(3_000);
        let to = primary.due_change(10_100, &1, Some(wish), &timing, false)?;
        assert_eq!(
            to.witness,
            to.voters.iter().copied().find(|v| *v >= W),
            "{to:?}"
        );
        assert!(to.voters.iter().filter(|v| **v >= W).count() < 2, "{to:?}");
        Some(to.voters)
    }

    /// An instance whose node has just moved abroad would be taken out of the synchronous rule first, which PostgreSQL has
    /// to enforce and others to flush; were the primary killed meanwhile, that instance could be elected.
    #[test]
    fn who_may_be_primary_no_more_is_told_before_the_rule_changes() {
        let mut committed = Configuration {
            term: 1,
            version: 1,
            primary: 1,
            voters: set(&[1, 2, 3]),
            witness: None,
            sync: Rule {
                members: set(&[2, 3]),
                acks: 1,
            },
            durability: Durability::Required,
            may_be_primary: set(&[1, 2, 3]),
        };
        let mut wish = wish(&[1, 3], None);
        wish.may_be_primary = set(&[1, 3]);
        let timing = crate::failover::Timing::new(3_000);
        let due_by = |committed: &Configuration<u8>, wish: &Wish<u8>| {
            let mut primary = Primary::new(committed.clone(), &set(&[2, 3]), 10_000, 0);
            let streaming = Streaming {
                flushed: 0,
                since: 0,
            };
            primary.streaming = [(2, streaming), (3, streaming)].into();
            primary.due_change(10_100, &1, Some(wish), &timing, true)
        };
        let first = due_by(&committed, &wish).unwrap();
        assert_eq!(first.may_be_primary, set(&[1, 3]));
        assert_eq!(
            (&first.sync, &first.voters),
            (&committed.sync, &committed.voters)
        );
        committed = first;
        let second = due_by(&committed, &wish).unwrap();
        assert_eq!(second.sync.members, set(&[3]));
        assert_eq!(second.may_be_primary, set(&[1, 3]));

        // Nobody may any more: agreed on, it could be taken back by a primary only, and there would be none.
        wish.may_be_primary = set(&[]);
        let third = due_by(&committed, &wish).unwrap();
        assert_eq!(third.may_be_primary, set(&[1, 3]));
    }

    #[test]
    fn a_witness_joins_two_and_not_one() {
        let two = wish(&[1, 2, W], Some(W));
        assert_eq!(next(&[1], &[], &two), None);
        assert_eq!(next(&[1], &[2], &two), Some(set(&[1, 2])));
        assert_eq!(next(&[1, 2], &[2], &two), Some(set(&[1, 2, W])));
        assert_eq!(next(&[1, 2, W], &[2], &two), None);
    }

    #[test]
    fn another_witness_takes_the_place_of_the_first_one_change_at_a_time() {
        let other = wish(&[1, 2, X], Some(X));
        assert_eq!(next(&[1, 2, W], &[2], &other), Some(set(&[1, 2])));
        assert_eq!(next(&[1, 2], &[2], &other), Some(set(&[1, 2, X])));
    }

    #[test]
    fn a_third_instance_takes_the_place_of_the_witness() {
        let three = wish(&[1, 2, 3], None);
        assert_eq!(next(&[1, 2, W], &[2, 3], &three), Some(set(&[1, 2, 3, W])));
        assert_eq!(next(&[1, 2, 3, W], &[2, 3], &three), Some(set(&[1, 2, 3])));
    }

    #[test]
    fn no_change_goes_where_the_majority_is_not_at_hand() {
        let one = wish(&[1], None);
        // The witness wasn't asked for long; the instance that leaves is still there.
        assert_eq!(next(&[1, 2, W], &[2], &one), Some(set(&[1, 2])));
        assert_eq!(next(&[1, 2], &[2], &one), Some(set(&[1])));
        // It is gone, and the witness carries the lease.
        assert_eq!(next(&[1, 2, W], &[W], &one), Some(set(&[1, W])));
        assert_eq!(next(&[1, W], &[W], &one), Some(set(&[1])));
    }
}
