//! Mistakes that the tests plant, one at a time, to see that they are noticed.
//!
//! Owns their list. Outside of tests [`Node::errs`] is constantly false, and nothing of this remains.

use super::node::Node;
use super::types::Id;

/// A mistake. The first nine each followed from one careless reading of the rules.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[cfg_attr(not(test), expect(dead_code, reason = "only tests plant them"))]
pub(super) enum Mistake {
    /// A copy that is being made anew is counted as data.
    RebuildingIsData,
    /// The new members are the voters that live, although they lag.
    LaggardsAreMembers,
    /// A primary that was restarted resumes its term.
    ResumedTerm,
    /// The longest history is that with the highest timeline, whoever has it.
    NewestTimelineWins,
    /// The sitting primary takes a new term with a new rule that it doesn't enforce before.
    RenewalWithoutJointRule,
    /// A voter accepts an older version after a newer one.
    OlderVersionAccepted,
    /// Promotes although it has voted in a higher term.
    PromotedAfterHigherVote,
    /// Gives up a change that was sent.
    ChangeWithdrawn,
    /// Fewer members than acknowledgements: none needs to be heard.
    NoneNeedsToBeHeard,
    /// Votes first, cuts then.
    VoteBeforeCut,
    /// Doesn't write its promise down.
    PromiseForgotten,
    /// Enforces the new rule alone before it is accepted.
    NewRuleEarly,
    /// Proposes the new rule before its members have flushed.
    NotFlushed,
    /// The lease lasts longer than others wait.
    LeaseTooLong,
    /// Half of the voters are enough.
    HalfIsEnough,
    /// Becomes primary where none may be.
    PolicyIgnored,
    /// Counts on standbys that don't know the era yet.
    UninformedMembers,
    /// Takes any promise to the former primary for a renewal.
    EveryPromiseIsRenewal,
    /// Follows a primary again whose renewal isn't accepted yet.
    FollowsBeforeRenewed,
    /// Promotes before its rule is enforced.
    PromotedUnruled,
    /// Believes that the witness hasn't heard from the primary, without looking.
    WitnessNotWatched,
    /// Keeps the identity when the volume is lost.
    IdentityKept,
}

impl<I: Id> Node<I> {
    /// Whether this mistake is planted.
    #[cfg(test)]
    pub(super) fn errs(&self, mistake: Mistake) -> bool {
        self.planted == Some(mistake)
    }

    /// Whether this mistake is planted: never.
    #[cfg(not(test))]
    #[allow(clippy::unused_self)]
    pub(super) const fn errs(&self, _: Mistake) -> bool {
        false
    }
}
