//! The address plan of the test bed: regions, nodes, addresses and names.
//!
//! Owns every address and every name of a namespace, link or cgroup. Never touches the machine:
//! everything here is a pure function of constants.

use std::net::Ipv4Addr;

/// All addresses of the test bed: the range reserved for benchmarks (RFC 2544).
pub const SUPERNET: &str = "198.18.0.0/15";
/// Addresses of all pods.
pub const POD_NET: &str = "198.19.0.0/16";
/// Addresses of all Services.
pub const SERVICE_NET: &str = "198.18.64.0/20";
/// The Service `kubernetes`.
pub const KUBERNETES_SERVICE: Ipv4Addr = Ipv4Addr::new(198, 18, 64, 1);
/// The Service of the cluster's DNS.
pub const DNS_SERVICE: Ipv4Addr = Ipv4Addr::new(198, 18, 64, 10);
/// The control plane.
pub const CONTROL_PLANE: Ipv4Addr = Ipv4Addr::new(198, 18, 0, 10);
/// The machine itself, seen from the test bed.
pub const HOST: Ipv4Addr = Ipv4Addr::new(198, 18, 0, 1);
/// The router, seen from the machine.
pub const ROUTER: Ipv4Addr = Ipv4Addr::new(198, 18, 0, 2);
/// The router, seen from nodes and the control plane.
pub const GATEWAY: Ipv4Addr = Ipv4Addr::new(198, 18, 0, 254);
/// The port of the API server.
pub const API_PORT: u16 = 6443;

/// The network namespace of the router.
pub const ROUTER_NS: &str = "dmc-router";
/// The network namespace of the control plane.
pub const CONTROL_PLANE_NS: &str = "dmc-cp";
/// The machine's end of its link to the router.
pub const HOST_LINK: &str = "dmc-host";
/// What every namespace and link of the test bed begins with.
pub const PREFIX: &str = "dmc-";
/// The cgroup that everything of the test bed lives in, in every hierarchy.
pub const CGROUP: &str = "domicile-testbed";

/// A region of the test bed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Region {
    /// What people and the `Region` objects call it: `us-west`.
    pub name: &'static str,
    /// What its nodes are labelled with: `us-west-2`.
    pub label: &'static str,
}

/// The regions, in the order in which they are shown.
pub const REGIONS: [Region; 3] = [
    Region {
        name: "us-west",
        label: "us-west-2",
    },
    Region {
        name: "us-east",
        label: "us-east-1",
    },
    Region {
        name: "eu-central",
        label: "eu-central-1",
    },
];

impl Region {
    /// Finds a region by its short name or its label.
    #[must_use]
    pub fn find(name: &str) -> Option<Region> {
        REGIONS
            .into_iter()
            .find(|r| r.name == name || r.label == name)
    }

    /// The nodes of this region.
    pub fn nodes(self) -> impl Iterator<Item = &'static Node> {
        NODES.iter().filter(move |n| n.region == self)
    }

    /// Every network of this region: its nodes' own addresses and their pods'.
    #[must_use]
    pub fn networks(self) -> Vec<String> {
        self.nodes().flat_map(|n| n.networks()).collect()
    }

    /// The region an address lies in, if it is a node's or a pod's.
    #[must_use]
    pub fn of(address: Ipv4Addr) -> Option<Region> {
        let [a, b, c, d] = address.octets();
        let index = match (a, b) {
            (198, 18) if c == 1 => d,
            (198, 19) => c,
            _ => return None,
        };
        NODES.iter().find(|n| n.index == index).map(|n| n.region)
    }
}

impl std::fmt::Display for Region {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.name)
    }
}

/// A node of the test bed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Node {
    /// Its name in Kubernetes.
    pub name: &'static str,
    /// Its place in the address plan.
    pub index: u8,
    /// The region it lies in.
    pub region: Region,
    /// The letter of its zone.
    pub zone: char,
}

const fn node(name: &'static str, index: u8, region: Region, zone: char) -> Node {
    Node {
        name,
        index,
        region,
        zone,
    }
}

/// The nodes, in the order in which they are shown.
pub const NODES: [Node; 6] = [
    node("w1", 1, REGIONS[0], 'a'),
    node("w2", 2, REGIONS[0], 'b'),
    node("w3", 3, REGIONS[0], 'c'),
    node("e1", 4, REGIONS[1], 'a'),
    node("e2", 5, REGIONS[1], 'b'),
    node("c1", 6, REGIONS[2], 'a'),
];

impl Node {
    /// Finds a node by its name.
    #[must_use]
    pub fn find(name: &str) -> Option<&'static Node> {
        NODES.iter().find(|n| n.name == name)
    }

    /// The node's own address.
    #[must_use]
    pub fn address(&self) -> Ipv4Addr {
        Ipv4Addr::new(198, 18, 1, self.index)
    }

    /// The network of the node's pods.
    #[must_use]
    pub fn pod_net(&self) -> String {
        format!("198.19.{}.0/24", self.index)
    }

    /// The node's own address and the network of its pods.
    #[must_use]
    pub fn networks(&self) -> [String; 2] {
        [self.address().to_string(), self.pod_net()]
    }

    /// The node's zone: `us-west-2a`.
    #[must_use]
    pub fn zone_label(&self) -> String {
        format!("{}{}", self.region.label, self.zone)
    }

    /// What a cloud would call the node.
    #[must_use]
    pub fn provider_id(&self) -> String {
        format!("testbed:///{}/{}", self.region.label, self.name)
    }

    /// The node's network namespace.
    #[must_use]
    pub fn netns(&self) -> String {
        format!("{PREFIX}{}", self.name)
    }

    /// The router's end of the node's link.
    #[must_use]
    pub fn link(&self) -> String {
        format!("{PREFIX}{}", self.name)
    }

    /// The labels that the administrator puts on the node.
    #[must_use]
    pub fn labels(&self) -> [(&'static str, String); 2] {
        [
            (
                "topology.kubernetes.io/region",
                self.region.label.to_owned(),
            ),
            ("topology.kubernetes.io/zone", self.zone_label()),
        ]
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeSet;

    #[test]
    fn addresses_are_distinct_and_inside_their_networks() {
        let addresses: BTreeSet<_> = NODES.iter().map(Node::address).collect();
        assert_eq!(addresses.len(), NODES.len());
        let pods: BTreeSet<_> = NODES.iter().map(Node::pod_net).collect();
        assert_eq!(pods.len(), NODES.len());
        for n in &NODES {
            // neither in the range of Services (198.18.64.0/20) nor the router's own net
            assert_eq!(n.address().octets()[..3], [198, 18, 1]);
            assert_eq!(Region::of(n.address()), Some(n.region));
            let [_, _, c, _] = n.address().octets();
            assert_eq!(c, 1);
            assert_eq!(
                Region::of(Ipv4Addr::new(198, 19, n.index, 77)),
                Some(n.region)
            );
        }
        for outside in [
            CONTROL_PLANE,
            HOST,
            ROUTER,
            GATEWAY,
            DNS_SERVICE,
            KUBERNETES_SERVICE,
        ] {
            assert_eq!(Region::of(outside), None);
        }
    }

    #[test]
    fn names_are_the_ones_that_manifests_rely_on() {
        let w2 = Node::find("w2").unwrap();
        assert_eq!(w2.zone_label(), "us-west-2b");
        assert_eq!(w2.provider_id(), "testbed:///us-west-2/w2");
        assert_eq!(Node::find("e2").unwrap().zone_label(), "us-east-1b");
        assert_eq!(Node::find("c1").unwrap().zone_label(), "eu-central-1a");
        assert_eq!(Region::find("us-west"), Region::find("us-west-2"));
        assert!(Region::find("mars").is_none());
        // Linux allows 15 characters in the name of a link
        assert!(NODES.iter().all(|n| n.link().len() <= 15));
        assert!(HOST_LINK.len() <= 15);
    }

    #[test]
    fn every_region_has_its_nodes() {
        let counts: Vec<_> = REGIONS.iter().map(|r| r.nodes().count()).collect();
        assert_eq!(counts, [3, 2, 1]);
        assert_eq!(REGIONS[2].networks(), ["198.18.1.6", "198.19.6.0/24"]);
    }
}
