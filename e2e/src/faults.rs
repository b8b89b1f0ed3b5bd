//! The faults in force: cuts of nodes and regions, and latencies between regions.
//!
//! Owns one table of the packet filter, in the router's namespace, and the file that says what is
//! in it. A cut drops silently: nobody is told "unreachable". Never touches a link or an address.

use crate::daemon::{self, Daemon};
use crate::layout::{Layout, write_atomically};
use crate::net;
use crate::run::{run_with, sh, succeeds, until};
use crate::topology::{Node, ROUTER_NS, Region};
use anyhow::{Context, Result, bail};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write;
use std::fs;
use std::time::Duration;

/// The link through which packets are held back.
pub const DELAY_LINK: &str = "dmc-delay";
/// The name of the daemon that holds packets back.
pub const RELAY: &str = "relay";
const TABLE: &str = "domicile_testbed";
const DELAY_MARK: &str = "0x2e57";
const DELAY_ROUTES: &str = "101";

/// Which packets a cut node loses.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Cut {
    /// Those towards it.
    pub inward: bool,
    /// Those from it.
    pub outward: bool,
}

impl Cut {
    /// Nothing comes and nothing goes.
    pub const BOTH: Cut = Cut {
        inward: true,
        outward: true,
    };
    /// The node hears nothing, but is heard.
    pub const IN: Cut = Cut {
        inward: true,
        outward: false,
    };
    /// The node hears everything, but isn't heard.
    pub const OUT: Cut = Cut {
        inward: false,
        outward: true,
    };
}

impl std::fmt::Display for Cut {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match (self.inward, self.outward) {
            (true, true) => "in+out",
            (true, false) => "in",
            (false, true) => "out",
            (false, false) => "",
        })
    }
}

/// Everything that is broken on purpose.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Faults {
    /// Cut nodes, by name.
    pub nodes: BTreeMap<String, Cut>,
    /// Cut regions, by name.
    pub regions: BTreeSet<String>,
    /// Milliseconds one way, by the two regions' names in alphabetical order.
    pub latencies: BTreeMap<String, u64>,
}

fn pair(a: Region, b: Region) -> String {
    let (first, second) = if a.name <= b.name { (a, b) } else { (b, a) };
    format!("{first} {second}")
}

fn set(networks: &[String]) -> String {
    format!("{{ {} }}", networks.join(", "))
}

impl Faults {
    /// What is in force now.
    ///
    /// # Errors
    /// If the file can't be understood.
    pub fn read(layout: &Layout) -> Result<Self> {
        match fs::read(layout.faults()) {
            Ok(text) => serde_json::from_slice(&text).context("reading the faults in force"),
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => Ok(Self::default()),
            Err(e) => Err(e).context("reading the faults in force"),
        }
    }

    /// How long packets from one region to another are held back.
    #[must_use]
    pub fn latency(&self, from: Region, to: Region) -> Duration {
        Duration::from_millis(self.latencies.get(&pair(from, to)).copied().unwrap_or(0))
    }

    /// Sets a latency; zero removes it.
    ///
    /// # Errors
    /// If the two are one.
    pub fn set_latency(&mut self, a: Region, b: Region, milliseconds: u64) -> Result<()> {
        if a == b {
            bail!("a latency lies between two regions, not inside {a}");
        }
        if milliseconds == 0 {
            self.latencies.remove(&pair(a, b));
        } else {
            self.latencies.insert(pair(a, b), milliseconds);
        }
        Ok(())
    }

    /// The packet filter's table for these faults; replaces the one before it in one go.
    #[must_use]
    pub fn rules(&self) -> String {
        let mut cuts = String::new();
        for (name, cut) in &self.nodes {
            let Some(node) = Node::find(name) else {
                continue;
            };
            let own = set(&node.networks());
            if cut.inward {
                let _ = writeln!(
                    cuts,
                    "    ip daddr {own} counter drop comment \"{name} in\""
                );
            }
            if cut.outward {
                let _ = writeln!(
                    cuts,
                    "    ip saddr {own} counter drop comment \"{name} out\""
                );
            }
        }
        for region in self.regions.iter().filter_map(|r| Region::find(r)) {
            let own = set(&region.networks());
            let _ = writeln!(
                cuts,
                "    ip saddr {own} ip daddr != {own} counter drop comment \"{region} out\""
            );
            let _ = writeln!(
                cuts,
                "    ip saddr != {own} ip daddr {own} counter drop comment \"{region} in\""
            );
        }
        let mut delays = String::new();
        for names in self.latencies.keys() {
            let regions: Vec<_> = names.split(' ').filter_map(Region::find).collect();
            let [a, b] = regions[..] else { continue };
            for (from, to) in [(a, b), (b, a)] {
                let _ = writeln!(
                    delays,
                    "    iifname != \"{DELAY_LINK}\" ip saddr {} ip daddr {} meta mark set {DELAY_MARK} comment \"{from} {to}\"",
                    set(&from.networks()),
                    set(&to.networks())
                );
            }
        }
        format!(
            "table ip {TABLE} {{}}\ndelete table ip {TABLE}\ntable ip {TABLE} {{\n\
             \x20 chain cuts {{\n    type filter hook forward priority filter; policy accept;\n{cuts}  }}\n\
             \x20 chain delays {{\n    type filter hook prerouting priority mangle; policy accept;\n{delays}  }}\n}}\n"
        )
    }

    /// Puts these faults in force, in place of those before.
    ///
    /// # Errors
    /// If the packet filter refuses, or the relay doesn't start.
    pub async fn apply(&self, layout: &Layout) -> Result<()> {
        write_atomically(
            &layout.faults(),
            serde_json::to_string_pretty(self)?.as_bytes(),
        )?;
        if !self.latencies.is_empty() {
            start_relay(layout).await?;
        }
        let enter = format!("--net=/run/netns/{ROUTER_NS}");
        run_with(&["nsenter", &enter, "nft", "-f", "-"], Some(&self.rules()))
            .await
            .context("the packet filter")?;
        if self.latencies.is_empty() {
            let _ = sh(&format!(
                "ip -n {ROUTER_NS} rule del fwmark {DELAY_MARK} lookup {DELAY_ROUTES}"
            ))
            .await;
            daemon::stop(layout, RELAY, Duration::from_secs(2)).await?;
        }
        Ok(())
    }
}

async fn start_relay(layout: &Layout) -> Result<()> {
    let before = daemon::record(layout, RELAY);
    let program = layout.program().display().to_string();
    let relay = Daemon {
        name: RELAY.into(),
        netns: Some(ROUTER_NS.into()),
        command: vec![
            program,
            "relay".into(),
            "--state".into(),
            layout.root().display().to_string(),
        ],
        contained: true,
    };
    daemon::ensure(layout, &relay).await?;
    until(
        "the relay's link",
        Duration::from_secs(5),
        Duration::from_millis(20),
        || async {
            daemon::check(layout, RELAY)?;
            anyhow::ensure!(
                succeeds(&[
                    "ip",
                    "-n",
                    ROUTER_NS,
                    "route",
                    "replace",
                    "default",
                    "dev",
                    DELAY_LINK,
                    "table",
                    DELAY_ROUTES
                ])
                .await,
                "{DELAY_LINK} isn't up"
            );
            Ok(())
        },
    )
    .await?;
    net::rule(&format!("fwmark {DELAY_MARK}"), DELAY_ROUTES).await?;
    match (before, daemon::record(layout, RELAY)) {
        // One that ran already reads the latencies anew when it's told to.
        (Some(old), Some(now)) if old == now => {
            kill(Pid::from_raw(now.pid), Signal::SIGHUP).context("telling the relay")?;
            Ok(())
        }
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::topology::REGIONS;

    #[test]
    fn a_cut_covers_the_node_and_its_pods_in_the_asked_directions() {
        let mut f = Faults::default();
        f.nodes.insert("w2".into(), Cut::IN);
        let rules = f.rules();
        assert!(
            rules.contains("ip daddr { 198.18.1.2, 198.19.2.0/24 } counter drop"),
            "{rules}"
        );
        assert!(!rules.contains("ip saddr"));
        f.nodes.insert("w2".into(), Cut::OUT);
        let rules = f.rules();
        assert!(rules.contains("ip saddr { 198.18.1.2, 198.19.2.0/24 } counter drop"));
        assert!(!rules.contains("ip daddr"));
    }

    #[test]
    fn a_cut_region_loses_only_what_crosses_its_border() {
        let mut f = Faults::default();
        f.regions.insert("us-east".into());
        let own = "{ 198.18.1.4, 198.19.4.0/24, 198.18.1.5, 198.19.5.0/24 }";
        let rules = f.rules();
        assert!(
            rules.contains(&format!("ip saddr {own} ip daddr != {own} counter drop")),
            "{rules}"
        );
        assert!(rules.contains(&format!("ip saddr != {own} ip daddr {own} counter drop")));
        assert_eq!(rules.matches(" drop ").count(), 2);
    }

    #[test]
    fn a_latency_is_the_same_both_ways_and_zero_removes_it() {
        let [west, east, eu] = REGIONS;
        let mut f = Faults::default();
        f.set_latency(west, east, 40).unwrap();
        assert_eq!(f.latency(east, west), Duration::from_millis(40));
        assert_eq!(f.latency(west, eu), Duration::ZERO);
        assert_eq!(f.rules().matches("meta mark set").count(), 2);
        f.set_latency(east, west, 0).unwrap();
        assert_eq!(f, Faults::default());
        assert!(!f.rules().contains("mark set"));
        assert!(f.set_latency(west, west, 5).is_err());
    }

    #[test]
    fn no_faults_mean_an_empty_table() {
        let rules = Faults::default().rules();
        assert!(
            rules.starts_with("table ip domicile_testbed {}\ndelete table ip domicile_testbed\n")
        );
        assert!(!rules.contains("drop"));
    }
}
