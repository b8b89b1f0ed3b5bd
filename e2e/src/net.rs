//! The network of the test bed: a namespace per node, one for the control plane, and a router
//! between them that has no way out.
//!
//! Owns namespaces, links, addresses and routes. Never drops or delays a packet: that is
//! `faults`'.

use crate::run::{run, sh, succeeds};
use crate::topology::{
    CONTROL_PLANE, CONTROL_PLANE_NS, GATEWAY, HOST, HOST_LINK, NODES, PREFIX, ROUTER, ROUTER_NS,
    SERVICE_NET, SUPERNET,
};
use anyhow::{Context, Result};
use std::net::Ipv4Addr;
use std::path::Path;

/// The router's end of the machine's link.
const UPLINK: &str = "dmc-up";
/// The routing table for what comes from the machine: it may ask for Services.
const FROM_HOST: &str = "100";

fn sysctls(settings: &[(&str, &str)]) -> String {
    settings
        .iter()
        .map(|(key, value)| format!("echo {value} >/proc/sys/{key}; "))
        .collect()
}

/// Runs a command in a network namespace.
///
/// # Errors
/// If the command fails.
pub async fn inside(ns: &str, command: &[&str]) -> Result<String> {
    let enter = format!("--net=/run/netns/{ns}");
    run(&[&["nsenter", &enter], command].concat()).await
}

async fn namespace(name: &str) -> Result<()> {
    if !succeeds(&["ip", "-n", name, "link", "show", "lo"]).await {
        // A folder entry without a namespace behind it is what an interrupted `ip netns add` leaves.
        let _ = run(&["ip", "netns", "del", name]).await;
        run(&["ip", "netns", "add", name]).await?;
    }
    let script = sysctls(&[
        ("net/ipv4/ip_forward", "1"),
        ("net/ipv4/conf/all/rp_filter", "0"),
        ("net/ipv4/conf/default/rp_filter", "0"),
        ("net/ipv4/conf/all/send_redirects", "0"),
        ("net/ipv4/conf/default/send_redirects", "0"),
    ]);
    inside(name, &["sh", "-ec", &format!("{script} ip link set lo up")]).await?;
    Ok(())
}

/// One namespace with its link to the router.
async fn member(ns: &str, address: Ipv4Addr) -> Result<()> {
    namespace(ns).await?;
    let link = ns;
    let whole = succeeds(&["ip", "-n", ROUTER_NS, "link", "show", link]).await
        && succeeds(&["ip", "-n", ns, "link", "show", "eth0"]).await;
    if !whole {
        let _ = run(&["ip", "-n", ROUTER_NS, "link", "del", link]).await;
        sh(&format!(
            "ip link add {link} netns {ROUTER_NS} type veth peer name eth0 netns {ns}"
        ))
        .await?;
    }
    for line in [
        format!("ip -n {ns} addr replace {address}/32 dev eth0"),
        format!("ip -n {ns} link set eth0 up"),
        format!("ip -n {ROUTER_NS} link set {link} up"),
        format!("ip -n {ROUTER_NS} addr replace {GATEWAY}/32 dev {link}"),
        format!("ip -n {ROUTER_NS} route replace {address}/32 dev {link}"),
        format!("ip -n {ns} route replace {GATEWAY}/32 dev eth0"),
        format!("ip -n {ns} route replace {SUPERNET} via {GATEWAY} src {address}"),
    ] {
        sh(&line).await?;
    }
    Ok(())
}

/// Makes the whole network, or what is missing of it.
///
/// # Errors
/// If the kernel refuses.
pub async fn up() -> Result<()> {
    namespace(ROUTER_NS).await?;
    if !(succeeds(&["ip", "link", "show", HOST_LINK]).await
        && succeeds(&["ip", "-n", ROUTER_NS, "link", "show", UPLINK]).await)
    {
        let _ = run(&["ip", "link", "del", HOST_LINK]).await;
        sh(&format!(
            "ip link add {HOST_LINK} type veth peer name {UPLINK} netns {ROUTER_NS}"
        ))
        .await?;
    }
    for line in [
        format!("ip addr replace {HOST}/30 dev {HOST_LINK}"),
        format!("ip link set {HOST_LINK} up"),
        format!("ip -n {ROUTER_NS} addr replace {ROUTER}/30 dev {UPLINK}"),
        format!("ip -n {ROUTER_NS} link set {UPLINK} up"),
        format!("ip route replace {SUPERNET} via {ROUTER} dev {HOST_LINK} src {HOST}"),
    ] {
        sh(&line).await?;
    }
    member(CONTROL_PLANE_NS, CONTROL_PLANE)
        .await
        .context("the control plane's network")?;
    for node in &NODES {
        member(&node.netns(), node.address())
            .await
            .with_context(|| format!("the network of {}", node.name))?;
        let line = format!(
            "ip -n {ROUTER_NS} route replace {} via {} dev {}",
            node.pod_net(),
            node.address(),
            node.link()
        );
        sh(&line).await?;
    }
    // What the machine sends to a Service goes through the control plane's kube-proxy. Nodes have
    // their own: what leaves one of them for a Service's address is lost, as it should be.
    sh(&format!(
        "ip -n {ROUTER_NS} route replace {SERVICE_NET} via {CONTROL_PLANE} dev {CONTROL_PLANE_NS} table {FROM_HOST}"
    ))
    .await?;
    rule(&format!("iif {UPLINK}"), FROM_HOST).await
}

/// Makes a routing rule in the router, once.
///
/// # Errors
/// If the kernel refuses.
pub async fn rule(selector: &str, table: &str) -> Result<()> {
    let _ = sh(&format!(
        "ip -n {ROUTER_NS} rule del {selector} lookup {table}"
    ))
    .await;
    sh(&format!(
        "ip -n {ROUTER_NS} rule add {selector} lookup {table}"
    ))
    .await?;
    Ok(())
}

/// Removes the whole network.
///
/// # Errors
/// If the kernel refuses.
pub async fn down() -> Result<()> {
    for ns in namespaces() {
        run(&["ip", "netns", "del", &ns]).await?;
    }
    for link in links() {
        // Links into a namespace go with it, if a little later.
        let _ = run(&["ip", "link", "del", &link]).await;
    }
    Ok(())
}

fn entries(folder: &Path) -> Vec<String> {
    let read = std::fs::read_dir(folder).into_iter().flatten().flatten();
    read.map(|e| e.file_name().to_string_lossy().into_owned())
        .filter(|n| n.starts_with(PREFIX))
        .collect()
}

/// The namespaces of the test bed that exist.
#[must_use]
pub fn namespaces() -> Vec<String> {
    entries(Path::new("/run/netns"))
}

/// The links of the test bed that exist on the machine itself.
#[must_use]
pub fn links() -> Vec<String> {
    entries(Path::new("/sys/class/net"))
}
