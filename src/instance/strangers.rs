//! Who takes the store's log from here and isn't one of its instances.
//!
//! Owns the comparison of what PostgreSQL's walsenders say of their clients (certificate, name, address) with who the
//! store's instances are. A stranger has the key of an instance: nobody else gets this far (`hba`).
//! Pure. Never calls one of the store's own a stranger for an address alone, as long as nobody else shows the same
//! certificate: between clusters and behind some networks an instance is seen at another address than it knows.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::time::{Duration, Instant};

use super::agent::names::instance_of;

/// A client that replicates, as PostgreSQL sees it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Sender {
    /// The walsender's process.
    pub pid: i32,
    /// The common name of its certificate.
    pub certificate: String,
    /// What it calls itself (`application_name`).
    pub name: String,
    /// Where it comes from.
    pub address: Option<IpAddr>,
}

/// A client that replicates and isn't one of the store's.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Stranger {
    /// The walsender's process.
    pub pid: i32,
    /// Who it pretends to be, from where, and why it isn't.
    pub words: String,
}

/// How long somebody who is told of is remembered, so that one who comes back every second doesn't make the status
/// change every second.
const REMEMBER: Duration = Duration::from_secs(60);
/// The most that are told of.
const MOST: usize = 4;

/// What is remembered from one look to the next.
#[derive(Debug, Default)]
pub struct Strangers {
    /// Of two that show the same certificate, those that aren't where the instance is; and since when.
    elsewhere: BTreeMap<i32, Instant>,
    /// What was told of, and when last.
    told: BTreeMap<String, Instant>,
}

impl Strangers {
    /// Who is to be cut off now. `others` are the store's other instances, `addresses` where they are known to be;
    /// `patience` is how long an instance that has moved may take to be known there, and its old walsender to end.
    pub fn look(
        &mut self,
        senders: &[Sender],
        others: &BTreeSet<String>,
        addresses: &BTreeMap<String, IpAddr>,
        patience: Duration,
        now: Instant,
    ) -> Vec<Stranger> {
        let mut found = Vec::new();
        let mut elsewhere = BTreeMap::new();
        for sender in senders {
            let Sender {
                pid,
                certificate,
                name,
                ..
            } = sender;
            let from = sender
                .address
                .map_or_else(|| "a local socket".to_owned(), |a| a.to_string());
            let mut stranger = |why: &str| {
                let words = format!(
                    "somebody at {from} replicates with the certificate of {certificate}, as {name:?}: {why}"
                );
                found.push(Stranger { pid: *pid, words });
            };
            if !others.contains(certificate) {
                stranger("that is no other instance of this store");
            } else if !calls_itself(name, certificate) {
                stranger("instances don't call themselves so");
            } else if double(sender, senders, addresses) {
                let since = *self.elsewhere.get(pid).unwrap_or(&now);
                elsewhere.insert(*pid, since);
                if now.duration_since(since) >= patience {
                    stranger("that instance replicates from where it is known to be");
                }
            }
        }
        self.elsewhere = elsewhere;
        for stranger in &found {
            if self.told.len() < MOST || self.told.contains_key(&stranger.words) {
                self.told.insert(stranger.words.clone(), now);
            }
        }
        self.told.retain(|_, at| now.duration_since(*at) < REMEMBER);
        found
    }

    /// Who was found within the last minute, in words.
    #[must_use]
    pub fn told(&self) -> Vec<String> {
        self.told.keys().cloned().collect()
    }
}

/// Whether an instance calls its stream, or its copying, by this name.
fn calls_itself(name: &str, instance: &str) -> bool {
    name.contains('/') && instance_of(name) == instance
}

/// Whether another with the same certificate comes from where that instance is known to be, and this one doesn't.
fn double(sender: &Sender, senders: &[Sender], addresses: &BTreeMap<String, IpAddr>) -> bool {
    let Some(known) = addresses.get(&sender.certificate) else {
        return false;
    };
    let there = |s: &Sender| s.address == Some(*known);
    !there(sender)
        && senders
            .iter()
            .any(|s| s.certificate == sender.certificate && there(s))
}

/// The common name in a distinguished name as PostgreSQL writes it (`/O=x/CN=consumers-2`).
#[must_use]
pub fn common_name(dn: &str) -> &str {
    dn.split('/')
        .find_map(|part| part.strip_prefix("CN="))
        .unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    const PATIENCE: Duration = Duration::from_secs(7);

    fn sender(pid: i32, certificate: &str, name: &str, address: &str) -> Sender {
        Sender {
            pid,
            certificate: certificate.into(),
            name: name.into(),
            address: Some(address.parse().unwrap()),
        }
    }

    fn look(strangers: &mut Strangers, senders: &[Sender], now: Instant) -> Vec<i32> {
        let others = ["s-2".to_owned(), "s-3".to_owned()].into();
        let addresses = [("s-2".to_owned(), "10.0.0.2".parse().unwrap())].into();
        let found = strangers.look(senders, &others, &addresses, PATIENCE, now);
        found.iter().map(|s| s.pid).collect()
    }

    #[test]
    fn the_stores_own_are_no_strangers_wherever_they_are_seen() {
        let mut strangers = Strangers::default();
        let now = Instant::now();
        let ours = [
            sender(1, "s-2", "s-2/k3x9", "10.0.0.2"),
            sender(2, "s-2", "s-2/clone", "10.0.0.2"),
            sender(3, "s-3", "s-3/aaaa", "192.0.2.7"),
        ];
        assert_eq!(look(&mut strangers, &ours, now), [0; 0]);
        // Seen at another address than it is known at, and alone: it may be the network, or it has moved.
        let moved = [sender(1, "s-2", "s-2/k3x9", "192.0.2.2")];
        for seconds in [0, 60, 600] {
            let at = now + Duration::from_secs(seconds);
            assert_eq!(look(&mut strangers, &moved, at), [0; 0]);
        }
        assert!(strangers.told().is_empty());
    }

    #[test]
    fn whoever_is_none_of_them_is_cut_at_once() {
        let mut strangers = Strangers::default();
        let now = Instant::now();
        let all = [
            sender(1, "s-2", "s-2/k3x9", "10.0.0.2"),
            sender(2, "s-2", "pg_receivewal", "10.0.0.9"),
            sender(3, "s-7", "s-7/k3x9", "10.0.0.9"),
            sender(4, "s-2", "s-3/k3x9", "10.0.0.9"),
            sender(5, "s-1", "s-1/k3x9", "10.0.0.9"),
            sender(6, "", "walreceiver", "10.0.0.9"),
            sender(7, "s-2", "s-2", "10.0.0.2"),
        ];
        assert_eq!(look(&mut strangers, &all, now), [2, 3, 4, 5, 6, 7]);
        assert_eq!(strangers.told().len(), MOST, "bounded");
        assert!(strangers.told().contains(
            &"somebody at 10.0.0.9 replicates with the certificate of s-2, as \"pg_receivewal\": instances don't call themselves so".to_owned()
        ));
        look(&mut strangers, &[], now + REMEMBER);
        assert!(strangers.told().is_empty());
    }

    #[test]
    fn of_two_with_one_certificate_the_one_that_is_elsewhere_is_cut_after_a_while() {
        let mut strangers = Strangers::default();
        let now = Instant::now();
        let both = [
            sender(1, "s-2", "s-2/k3x9", "10.0.0.2"),
            sender(2, "s-2", "s-2/k3x9", "10.0.0.9"),
        ];
        assert_eq!(look(&mut strangers, &both, now), [0; 0]);
        assert_eq!(look(&mut strangers, &both, now + PATIENCE), [2]);
        // One that was only seen once in between begins anew.
        look(&mut strangers, &both[..1], now + PATIENCE);
        assert_eq!(look(&mut strangers, &both, now + PATIENCE), [0; 0]);
    }

    #[test]
    fn names_in_certificates() {
        assert_eq!(common_name("/CN=s-2"), "s-2");
        assert_eq!(common_name("/O=a/CN=s-2/L=b"), "s-2");
        assert_eq!(common_name(""), "");
    }
}
