//! Patroni with etcd, from Debian's packages, on hosts like the test bed's: what the product is compared with.
//!
//! Owns the cluster's life, the faults it is given and what it says of itself. Three PostgreSQL hosts in two
//! regions and one etcd where the test bed has its control plane, all in the test bed's network namespaces, with
//! nothing of Kubernetes beside them. A single etcd is as good as three here: no case breaks one of three.
//! Never runs beside the test bed (they share names and addresses), and never as a service of the machine.

pub mod bench;
mod config;
mod host;

use crate::daemon::{self, Daemon};
use crate::faults::{Cut, Faults};
use crate::layout::{Layout, write_atomically};
use crate::run::{Hopeless, run, say, until};
use crate::topology::{CONTROL_PLANE_NS, Node};
use crate::{cgroups, leftovers, net};
use anyhow::{Context, Result, bail, ensure};
pub use config::{DATABASE, PASSWORD, USER};
use serde::Deserialize;
use std::fs;
use std::net::Ipv4Addr;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// The nodes that have a PostgreSQL, as a store with two instances in us-west and one in us-east would.
pub const HOSTS: [&str; 3] = ["w1", "w2", "e1"];
/// The port of every PostgreSQL.
pub const PORT: u16 = 5432;
/// The name of the cluster.
pub const SCOPE: &str = "bench";
/// The state folder: gone after [`Patroni::down`].
const ROOT: &str = "/var/lib/domicile-patroni";
const ETCD: &str = "patroni-etcd";
/// How long a whole cluster may take to come up or to mend itself.
pub const PATIENCE: Duration = Duration::from_secs(180);
const EVERY: Duration = Duration::from_millis(100);

/// Patroni's three clocks, in seconds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Clocks {
    /// How long a leader may be silent before it is replaced.
    pub ttl: u32,
    /// How often each member looks.
    pub loop_wait: u32,
    /// How long it tries again when etcd or PostgreSQL doesn't answer.
    pub retry_timeout: u32,
}

impl Clocks {
    /// Those it comes with.
    pub const DEFAULT: Clocks = Clocks {
        ttl: 30,
        loop_wait: 10,
        retry_timeout: 10,
    };
    /// About as quick as its documentation allows: 20 is the least ttl it takes.
    pub const QUICK: Clocks = Clocks {
        ttl: 20,
        loop_wait: 1,
        retry_timeout: 3,
    };
}

/// A PostgreSQL host.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Host {
    /// The node's name; the server's certificate carries it too.
    pub name: &'static str,
    /// Its address.
    pub address: Ipv4Addr,
    /// PostgreSQL's port.
    pub port: u16,
}

/// What is done to the cluster.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// The primary's postmaster is killed.
    PostmasterKill,
    /// Every process of the primary's host is killed, Patroni too; nothing starts it again before the heal.
    PodKill,
    /// What goes to the primary's host or comes from it vanishes silently.
    NodeCut,
    /// Every process of the primary's host is stopped where it stands.
    PodFreeze,
    /// A switchover is asked for.
    Graceful,
    /// etcd is killed.
    EtcdDown,
}

impl Fault {
    /// Its name in a report.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Fault::PostmasterKill => "postmaster-kill",
            Fault::PodKill => "pod-kill",
            Fault::NodeCut => "node-cut",
            Fault::PodFreeze => "pod-freeze",
            Fault::Graceful => "graceful",
            Fault::EtcdDown => "etcd-down",
        }
    }
}

/// What a member says of the cluster (`GET /cluster`).
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
struct View {
    members: Vec<Member>,
}

#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
struct Member {
    name: String,
    role: String,
    state: String,
    #[serde(default)]
    timeline: Option<u32>,
    /// Bytes, or the word "unknown".
    #[serde(default)]
    lag: Option<serde_json::Value>,
}

impl View {
    fn leader(&self) -> Option<&Member> {
        self.members.iter().find(|m| m.role == "leader")
    }

    /// What keeps the cluster from being whole: nothing, if it is.
    fn ailment(&self) -> Option<String> {
        let leader = match self.leader() {
            Some(l) if l.state == "running" => l,
            Some(l) => return Some(format!("the leader {} is {}", l.name, l.state)),
            None => return Some("there is no leader".to_owned()),
        };
        for name in HOSTS {
            let Some(m) = self.members.iter().find(|m| m.name == name) else {
                return Some(format!("{name} isn't a member"));
            };
            // Later versions call a standby that streams by that name.
            if !["running", "streaming"].contains(&m.state.as_str()) {
                return Some(format!("{name} is {}", m.state));
            }
            if m.timeline != leader.timeline {
                return Some(format!("{name} is on the timeline {:?}", m.timeline));
            }
            if m.name != leader.name && m.lag.as_ref().and_then(serde_json::Value::as_u64).is_none()
            {
                return Some(format!("nobody knows how far {name} is behind"));
            }
        }
        let synchronous = self.members.iter().filter(|m| m.role == "sync_standby");
        match synchronous.count() {
            1 => None,
            n => Some(format!("there are {n} synchronous standbys")),
        }
    }
}

/// A running cluster.
#[derive(Clone, Debug)]
pub struct Patroni {
    layout: Layout,
    clocks: Clocks,
    bin: PathBuf,
}

fn node(name: &str) -> Result<&'static Node> {
    Node::find(name).with_context(|| format!("no node {name}"))
}

impl Patroni {
    /// Brings the cluster up, with an empty database; what an earlier one has left goes first.
    ///
    /// # Errors
    /// If the packages aren't there, a test bed is, or the cluster doesn't come up: with the end of a log.
    pub async fn up(clocks: Clocks) -> Result<Self> {
        ensure!(
            nix::unistd::Uid::effective().is_root(),
            "network namespaces need root"
        );
        for program in ["/usr/bin/patroni", "/usr/bin/patronictl", "/usr/bin/etcd"] {
            ensure!(
                Path::new(program).exists(),
                "there is no {program}: scripts/bench-failover-patroni installs Debian's packages"
            );
        }
        let cluster = Self {
            layout: Layout::at(Path::new(ROOT)),
            clocks,
            bin: programs()?,
        };
        Self::down().await?;
        cgroups::create(cgroups::SYSTEM)?;
        net::up().await?;
        Faults::default().apply(&cluster.layout).await?;
        config::write_authority(&cluster.layout)?;
        cluster.start_etcd().await?;
        for name in HOSTS {
            cluster.configure(node(name)?).await?;
            cluster.start(name).await?;
        }
        let primary = cluster.wait_healthy(PATIENCE).await?;
        cluster.prepare(&primary).await?;
        cluster.wait_healthy(PATIENCE).await?;
        Ok(cluster)
    }

    /// The hosts, in the order in which a client should try them.
    #[must_use]
    pub fn hosts(&self) -> Vec<Host> {
        let found = HOSTS.iter().filter_map(|n| Node::find(n));
        found.map(host).collect()
    }

    /// The certificate that verifies the servers, in PEM.
    ///
    /// # Errors
    /// If it can't be read.
    pub fn authority(&self) -> Result<String> {
        let path = config::authority(&self.layout);
        fs::read_to_string(&path).with_context(|| format!("reading {}", path.display()))
    }

    /// The present primary, as etcd has it.
    ///
    /// # Errors
    /// If there is none, or nobody answers.
    pub async fn primary(&self) -> Result<Host> {
        let view = self.view().await?;
        let leader = view.leader().context("the cluster has no leader")?;
        Ok(host(node(&leader.name)?))
    }

    /// Does this to the present primary (or to etcd); who was the primary is the answer.
    ///
    /// # Errors
    /// If it can't be done.
    pub async fn inject(&self, fault: Fault) -> Result<Host> {
        let primary = self.primary().await?;
        let name = primary.name;
        match fault {
            Fault::PostmasterKill => host::kill_postmaster(node(name)?, &self.data(name))?,
            Fault::PodKill => host::kill_all(node(name)?).await?,
            Fault::NodeCut => {
                let mut faults = Faults::default();
                faults.nodes.insert(name.to_owned(), Cut::BOTH);
                faults.apply(&self.layout).await?;
            }
            Fault::PodFreeze => host::freeze(node(name)?).await?,
            Fault::Graceful => {
                let file = self.file(name).display().to_string();
                // Without --candidate Patroni chooses, as it does in a failover.
                run(&["patronictl", "-c", &file, "switchover", SCOPE, "--force"]).await?;
            }
            Fault::EtcdDown => daemon::stop(&self.layout, ETCD, Duration::ZERO).await?,
        }
        Ok(primary)
    }

    /// Ends every fault, whatever it was, and starts what is dead. Doesn't wait for the cluster.
    ///
    /// # Errors
    /// If something doesn't start.
    pub async fn heal(&self) -> Result<()> {
        Faults::default().apply(&self.layout).await?;
        for name in HOSTS {
            host::thaw(node(name)?)?;
        }
        self.start_etcd().await?;
        for name in HOSTS {
            self.start(name).await?;
        }
        Ok(())
    }

    /// Waits until all three run on one timeline and one is the synchronous standby; who is the primary is the
    /// answer.
    ///
    /// # Errors
    /// If that doesn't come about in time: with what is missing and the end of a log.
    pub async fn wait_healthy(&self, patience: Duration) -> Result<Host> {
        until("Patroni's cluster whole", patience, EVERY, || async {
            for name in HOSTS {
                daemon::check(&self.layout, &daemon_name(name))?;
            }
            let view = self.view().await?;
            if let Some(ailment) = view.ailment() {
                bail!(
                    "{ailment}; {}",
                    HOSTS
                        .map(|n| daemon::tail(&self.layout, &daemon_name(n)))
                        .join("")
                );
            }
            self.primary().await
        })
        .await
    }

    /// Waits until somebody else than `old` is the primary; who is the answer. `None`: not within `patience`.
    pub async fn wait_other_primary(&self, old: &Host, patience: Duration) -> Option<Host> {
        until("another primary", patience, EVERY, || async {
            let primary = self.primary().await?;
            ensure!(primary != *old, "still {}", old.name);
            Ok(primary)
        })
        .await
        .ok()
    }

    /// Removes the cluster and its network, also one that another process has left.
    ///
    /// # Errors
    /// If a test bed is there, or something is left.
    pub async fn down() -> Result<()> {
        ensure!(
            !Layout::system().root().exists(),
            "there is a test bed (or what is left of one), whose network this would take: testbed down"
        );
        let layout = Layout::at(Path::new(ROOT));
        for name in daemon::names(&layout) {
            daemon::stop(&layout, &name, Duration::ZERO).await?;
        }
        tokio::task::spawn_blocking(cgroups::destroy)
            .await
            .context("removing the cgroups")??;
        net::down().await?;
        leftovers::remove_shared(&layout).await?;
        match fs::remove_dir_all(layout.root()) {
            Err(e) if e.kind() != std::io::ErrorKind::NotFound => {
                return Err(e).with_context(|| format!("removing {ROOT}"));
            }
            _ => {}
        }
        let left = leftovers::list(&layout).await?;
        ensure!(left.is_empty(), "left behind: {}", left.join("; "));
        Ok(())
    }

    fn folder(&self, host: &str) -> PathBuf {
        self.layout.node(host)
    }

    fn data(&self, host: &str) -> PathBuf {
        self.folder(host).join("data")
    }

    fn file(&self, host: &str) -> PathBuf {
        self.folder(host).join("patroni.yml")
    }

    async fn start_etcd(&self) -> Result<()> {
        let data = self.layout.etcd();
        let etcd = Daemon {
            name: ETCD.to_owned(),
            netns: Some(CONTROL_PLANE_NS.to_owned()),
            command: config::etcd(&data),
            contained: true,
        };
        daemon::ensure(&self.layout, &etcd).await?;
        until("etcd", Duration::from_secs(20), EVERY, || async {
            daemon::check(&self.layout, ETCD)?;
            host::get(config::ETCD_ADDRESS, config::ETCD_PORT, "/health").await
        })
        .await
        .map(drop)
    }

    async fn configure(&self, node: &Node) -> Result<()> {
        let folder = self.folder(node.name);
        let run_folder = folder.join("run");
        fs::create_dir_all(&run_folder)
            .with_context(|| format!("making {}", run_folder.display()))?;
        config::write_identity(&self.layout, node, &folder)?;
        let text = config::patroni(node, &folder, &self.bin, self.clocks);
        write_atomically(&self.file(node.name), text.as_bytes())?;
        // PostgreSQL refuses to run as root and to read keys that aren't its user's.
        let folder = folder.display().to_string();
        run(&["chown", "-R", "postgres:postgres", &folder])
            .await
            .map(drop)
    }

    /// Starts a host's Patroni, unless it runs.
    async fn start(&self, name: &str) -> Result<()> {
        let patroni = Daemon {
            name: daemon_name(name),
            netns: Some(node(name)?.netns()),
            command: host::command(&["/usr/bin/patroni", &self.file(name).display().to_string()]),
            contained: true,
        };
        daemon::ensure(&self.layout, &patroni).await
    }

    /// Makes the clients' role and database.
    async fn prepare(&self, primary: &Host) -> Result<()> {
        let psql = self.bin.join("psql").display().to_string();
        let uri = config::superuser_uri(primary);
        for sql in [
            format!("CREATE ROLE {USER} LOGIN PASSWORD '{PASSWORD}'"),
            format!("CREATE DATABASE {DATABASE} OWNER {USER}"),
        ] {
            run(&[&psql, &uri, "-XAtqv", "ON_ERROR_STOP=1", "-c", &sql]).await?;
        }
        Ok(())
    }

    /// What the first host that answers says of the cluster.
    async fn view(&self) -> Result<View> {
        let asked = self.hosts().into_iter().map(|h| {
            Box::pin(async move {
                let text = host::get(h.address, config::API_PORT, "/cluster").await?;
                serde_json::from_str::<View>(&text)
                    .with_context(|| format!("what {} says of the cluster: {text}", h.name))
            })
        });
        let (view, _) = futures::future::select_ok(asked).await?;
        Ok(view)
    }
}

fn host(node: &'static Node) -> Host {
    Host {
        name: node.name,
        address: node.address(),
        port: PORT,
    }
}

fn daemon_name(host: &str) -> String {
    format!("patroni-{host}")
}

/// The newest of Debian's PostgreSQLs that has a server.
fn programs() -> Result<PathBuf> {
    let folders = fs::read_dir("/usr/lib/postgresql").into_iter().flatten();
    let mut found: Vec<(u32, PathBuf)> = folders
        .flatten()
        .filter(|e| e.path().join("bin/postgres").exists())
        .filter_map(|e| Some((e.file_name().to_str()?.parse().ok()?, e.path().join("bin"))))
        .collect();
    found.sort();
    match found.pop() {
        Some((major, bin)) => {
            say("ok", &format!("PostgreSQL {major} from Debian"), None);
            Ok(bin)
        }
        None => {
            Err(Hopeless("there is no PostgreSQL server here: run scripts/setup".into()).into())
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn view(change: impl FnOnce(&mut View)) -> View {
        let mut view: View = serde_json::from_str(
            r#"{"members": [
                {"name": "e1", "role": "replica", "state": "running", "timeline": 2, "lag": 0, "api_url": "x"},
                {"name": "w1", "role": "leader", "state": "running", "timeline": 2},
                {"name": "w2", "role": "sync_standby", "state": "streaming", "timeline": 2, "lag": 16}]}"#,
        )
        .unwrap();
        change(&mut view);
        view
    }

    #[test]
    fn a_whole_cluster_is_told_from_others() {
        let whole = view(|_| {});
        assert_eq!(whole.ailment(), None);
        assert_eq!(whole.leader().unwrap().name, "w1");
        for (change, said) in [
            (
                (|v: &mut View| v.members[1].role = "replica".into()) as fn(&mut View),
                "no leader",
            ),
            (|v| v.members[1].state = "starting".into(), "is starting"),
            (|v| v.members[0].timeline = Some(1), "timeline"),
            (|v| v.members[0].lag = Some("unknown".into()), "behind"),
            (|v| v.members[2].role = "replica".into(), "synchronous"),
            (|v| drop(v.members.remove(0)), "isn't a member"),
        ] {
            let ailment = view(change).ailment().unwrap();
            assert!(ailment.contains(said), "{ailment}");
        }
    }
}
