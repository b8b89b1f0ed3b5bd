//! What goes over the wire between two agents.
//!
//! Owns the form of a message's body, which fits a frame however long a store has lived. Never: knows what a message
//! means.

use std::net::IpAddr;

use serde::{Deserialize, Serialize};

use crate::failover::Message;

/// A message, from which voter to which, and where its sender is.
#[derive(Serialize, Deserialize)]
pub(super) struct Envelope {
    pub(super) from: String,
    pub(super) to: String,
    pub(super) address: IpAddr,
    pub(super) message: Message<String>,
}

impl Envelope {
    /// As a frame's body.
    pub(super) fn encode(&self) -> serde_json::Result<Vec<u8>> {
        serde_json::to_vec(self)
    }

    /// From a frame's body.
    pub(super) fn decode(body: &[u8]) -> serde_json::Result<Self> {
        serde_json::from_slice(body)
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;
    use std::net::Ipv6Addr;

    use super::*;
    use crate::failover::{Configuration, Copy, Durability, Era, KEPT, Rule};
    use crate::instance::peers::LIMIT;

    /// What the store's status has room for.
    const VOTERS: usize = 32;
    const NAME: usize = 128;

    #[test]
    fn the_longest_message_fits_a_frame() {
        let voters: BTreeSet<String> = (0..VOTERS).map(|n| format!("{n:0>NAME$}")).collect();
        let one = voters.first().unwrap().clone();
        let configuration = Configuration {
            term: u64::MAX,
            version: u64::MAX,
            primary: one.clone(),
            voters: voters.clone(),
            witness: Some(one.clone()),
            sync: Rule {
                members: voters.clone(),
                acks: usize::MAX,
            },
            durability: Durability::Preferred,
            may_be_primary: voters,
        };
        let era = Era {
            term: u64::MAX,
            timeline: u32::MAX,
            start: u64::MAX,
        };
        let history = vec![era; KEPT];
        let longest = [
            Message::Heartbeat {
                configuration: configuration.clone(),
                seq: u64::MAX,
                history: history.clone(),
                position: u64::MAX,
            },
            Message::Vote {
                term: u64::MAX,
                copy: Some(Copy {
                    end: u64::MAX,
                    history: history.clone(),
                }),
                configuration: Some(configuration.clone()),
            },
            Message::Accept {
                configuration,
                history,
            },
        ];
        for message in longest {
            let envelope = Envelope {
                from: one.clone(),
                to: one.clone(),
                address: Ipv6Addr::from(u128::MAX).into(),
                message,
            };
            let body = envelope.encode().unwrap();
            assert!(body.len() * 2 < LIMIT, "{} bytes", body.len());
            assert!(Envelope::decode(&body).unwrap().message == envelope.message);
        }
    }
}
