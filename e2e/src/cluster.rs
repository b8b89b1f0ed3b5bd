//! The life of the test bed as a whole: `up`, `down`, and what is left after it.
//!
//! Owns the order of things. Every step can be done again; what an interrupted `up` or a restart
//! of the machine has left is cleared away before anything is started.

use crate::addons;
use crate::cgroups;
use crate::control::{self, Place};
use crate::daemon;
use crate::faults::{Faults, RELAY};
use crate::images;
use crate::layout::{Layout, cache, temporary_name, write_atomically};
use crate::leftovers;
use crate::net;
use crate::node;
use crate::run::{say, step, until};
use crate::seed;
use crate::tools::{self, COREDNS, ETCD, HELM, KUBERNETES, Tool};
use crate::topology::NODES;
use anyhow::{Context, Result, bail, ensure};
use futures::{StreamExt, TryStreamExt, stream};
use kube::Client;
use nix::fcntl::Flock;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::PathBuf;
use std::time::{Duration, Instant};

/// What `up` found on the machine.
#[derive(Debug, Default, Serialize, Deserialize)]
struct Before {
    boot: String,
    /// Settings of the kernel that kubelets change.
    sysctls: BTreeMap<String, String>,
    /// Folders outside ours that weren't there.
    absent: Vec<PathBuf>,
}

/// What a kubelet sets.
const SYSCTLS: [&str; 6] = [
    "vm/overcommit_memory",
    "vm/panic_on_oom",
    "kernel/panic",
    "kernel/panic_on_oops",
    "kernel/keys/root_maxkeys",
    "kernel/keys/root_maxbytes",
];

impl Before {
    fn look() -> Result<Self> {
        let read = |key: &&str| {
            let value = fs::read_to_string(format!("/proc/sys/{key}")).ok()?;
            Some(((*key).to_owned(), value.trim().to_owned()))
        };
        Ok(Self {
            boot: daemon::boot_id()?,
            sysctls: SYSCTLS.iter().filter_map(read).collect(),
            absent: leftovers::SHARED_FOLDERS
                .iter()
                .map(PathBuf::from)
                .filter(|p| !p.exists())
                .collect(),
        })
    }

    fn read(layout: &Layout) -> Option<Self> {
        serde_json::from_slice(&fs::read(layout.restore()).ok()?).ok()
    }
}

fn preflight() -> Result<()> {
    ensure!(
        nix::unistd::Uid::effective().is_root(),
        "the test bed needs root"
    );
    let needed = [
        "containerd",
        "containerd-shim-runc-v2",
        "ctr",
        "runc",
        "nft",
        "conntrack",
        "ip",
        "nsenter",
        "setsid",
        "busybox",
        "gcc",
    ];
    let path = std::env::var_os("PATH").unwrap_or_default();
    let missing: Vec<_> = needed
        .into_iter()
        .filter(|p| !std::env::split_paths(&path).any(|dir| dir.join(p).exists()))
        .collect();
    ensure!(
        missing.is_empty(),
        "missing here: {}: run scripts/setup",
        missing.join(", ")
    );
    ensure!(
        fs::metadata("/usr/lib/cni/bridge").is_ok(),
        "no CNI plug-ins in /usr/lib/cni: run scripts/setup"
    );
    Ok(())
}

async fn exclusive() -> Result<Flock<fs::File>> {
    tools::lock(
        &cache()?.join("testbed.lock"),
        "another 'testbed up' or 'down'",
    )
    .await
}

/// Copies this program to where the daemons run it from, so that building it anew doesn't touch
/// them; they are started anew when it has changed.
async fn install_program(layout: &Layout) -> Result<()> {
    let program = find_program()?;
    let meta =
        fs::metadata(&program).with_context(|| format!("looking at {}", program.display()))?;
    let stamp = format!("{} {} {}", meta.ino(), meta.mtime(), meta.len());
    let stamp_file = layout.root().join("testbed.stamp");
    if fs::read_to_string(&stamp_file).is_ok_and(|s| s == stamp) && layout.program().exists() {
        return Ok(());
    }
    for name in [addons::PROVISIONER, RELAY] {
        daemon::stop(layout, name, Duration::from_secs(2)).await?;
    }
    let temporary = temporary_name(&layout.program());
    fs::copy(&program, &temporary)
        .and_then(|_| fs::rename(&temporary, layout.program()))
        .with_context(|| format!("copying {}", program.display()))?;
    write_atomically(&stamp_file, stamp.as_bytes())
}

/// The `testbed` program: this very process, or, in a test, the one that was built beside it.
fn find_program() -> Result<PathBuf> {
    let me = std::env::current_exe().context("finding this program")?;
    if me.file_name().is_some_and(|n| n == "testbed") {
        return Ok(me);
    }
    let beside = me
        .ancestors()
        .skip(1)
        .take(2)
        .map(|dir| dir.join("testbed"))
        .find(|p| p.is_file());
    beside.with_context(|| format!("no 'testbed' beside {}: cargo build -p e2e", me.display()))
}

/// Builds what isn't in the cache.
///
/// # Errors
/// If a build fails: with the name of its log file.
pub async fn prepare() -> Result<images::Archives> {
    for tool in [&KUBERNETES, &ETCD, &COREDNS, &HELM] {
        build(tool).await?;
    }
    step("programs and images", images::ensure_all()).await
}

/// Builds a program that isn't in the cache, and says so.
///
/// # Errors
/// If the build fails: with the name of its log file.
pub async fn build(tool: &Tool) -> Result<()> {
    let start = Instant::now();
    if !tool.is_built() {
        say(
            "...",
            &format!("{} isn't in the cache: building it", tool.key()),
            None,
        );
    }
    if tool.ensure().await? {
        say(
            "ok",
            &format!("built {}", tool.key()),
            Some(start.elapsed()),
        );
    }
    Ok(())
}

/// Starts the test bed, or what is missing of it.
///
/// # Errors
/// If a step fails: with the end of the log that tells why.
pub async fn up(layout: &Layout) -> Result<()> {
    let start = Instant::now();
    preflight()?;
    let _lock = exclusive().await?;
    let archives = prepare().await?;

    let half_finished = layout.root().exists() && !layout.complete().exists();
    let restarted =
        Before::read(layout).is_some_and(|b| daemon::boot_id().is_ok_and(|now| now != b.boot));
    if half_finished || restarted {
        let why = if restarted {
            "from before the machine's restart"
        } else {
            "of an interrupted 'up'"
        };
        say("...", &format!("clearing away what is left {why}"), None);
        clear(layout).await?;
    }
    fs::create_dir_all(layout.root())
        .with_context(|| format!("making {}", layout.root().display()))?;
    if Before::read(layout).is_none() {
        write_atomically(
            &layout.restore(),
            serde_json::to_string_pretty(&Before::look()?)?.as_bytes(),
        )?;
    }
    install_program(layout).await?;
    cgroups::create(cgroups::SYSTEM)?;
    let seed = step(
        "images unpacked (once for all nodes)",
        seed::ensure(layout, &archives),
    )
    .await?;
    step("network: router, control plane, six nodes", net::up()).await?;
    let (pki, place) = (control::pki(layout), Place::testbed());
    pki.ensure()?;
    if !layout.kubeconfig().exists() {
        fs::copy(pki.kubeconfig("admin"), layout.kubeconfig())
            .context("copying the administrator's kubeconfig")?;
    }

    let client = control::client(&layout.kubeconfig()).await?;
    step("etcd and API server ready", async {
        control::start_storage(layout, &pki, &place).await?;
        control::ready(layout, &client).await
    })
    .await?;
    step("controller manager, scheduler, six nodes started", async {
        control::start_controllers(layout, &pki, &place).await?;
        stream::iter(&NODES)
            .map(|n| node::start(layout, &pki, n, &seed))
            .buffer_unordered(3)
            .try_collect::<Vec<()>>()
            .await?;
        control::start_proxy(layout, &pki, &place).await
    })
    .await?;
    let (wait, every) = (Duration::from_secs(90), Duration::from_millis(200));
    step("nodes registered and labelled", async {
        until("all nodes", wait, every, || addons::label_nodes(&client)).await?;
        addons::apply(layout).await?;
        addons::start_provisioner(layout).await
    })
    .await?;
    step("images on the nodes", async {
        // A node that is older than an image hasn't got it from the seed.
        for archive in archives.all() {
            images::load(layout, archive).await?;
        }
        Ok(())
    })
    .await?;
    // Faults outlive an `up`, but not the namespace that they were in.
    let faults = Faults::read(layout)?;
    faults.apply(layout).await?;
    if faults.nodes.is_empty() && faults.regions.is_empty() {
        whole(layout, &client).await?;
    } else {
        say(
            "note",
            "cuts are in force: not waiting for all nodes ('testbed heal' ends them)",
            None,
        );
    }
    link_tools(layout)?;
    write_atomically(&layout.complete(), b"")?;
    say(
        "ok",
        &format!(
            "the test bed is up: export KUBECONFIG={}",
            layout.kubeconfig().display()
        ),
        Some(start.elapsed()),
    );
    Ok(())
}

/// Waits until every node is ready and the DNS answers.
async fn whole(layout: &Layout, client: &Client) -> Result<()> {
    let (wait, every) = (Duration::from_secs(90), Duration::from_millis(200));
    step("six nodes ready", async {
        until("all nodes", wait, every, || async {
            for part in NODES.iter().flat_map(node::daemons) {
                daemon::check(layout, &part)?;
            }
            let ready = addons::ready_nodes(client).await?;
            ensure!(
                ready.len() >= NODES.len(),
                "only {} are ready",
                ready.join(", ")
            );
            Ok(())
        })
        .await
    })
    .await?;
    step("DNS answers", addons::dns_ready(client)).await
}

/// Puts kubectl and helm where people find them: `bin` in the state folder.
fn link_tools(layout: &Layout) -> Result<()> {
    let bin = layout.root().join("bin");
    fs::create_dir_all(&bin).with_context(|| format!("making {}", bin.display()))?;
    for (name, target) in [
        ("kubectl", KUBERNETES.path("kubectl")?),
        ("helm", HELM.path("helm")?),
    ] {
        let link = bin.join(name);
        if fs::read_link(&link).ok().as_ref() != Some(&target) {
            let _ = fs::remove_file(&link);
            std::os::unix::fs::symlink(&target, &link)
                .with_context(|| format!("linking {}", link.display()))?;
        }
    }
    Ok(())
}

/// Stops and removes everything.
///
/// # Errors
/// If something is left.
pub async fn down(layout: &Layout) -> Result<()> {
    ensure!(
        nix::unistd::Uid::effective().is_root(),
        "the test bed needs root"
    );
    let _lock = exclusive().await?;
    let cleared = clear(layout).await;
    let left = leftovers::list(layout).await?;
    for what in &left {
        say("LEFT", what, None);
    }
    cleared?;
    if !left.is_empty() {
        bail!("{} things are left", left.len());
    }
    say("ok", "nothing of the test bed is left", None);
    Ok(())
}

async fn clear(layout: &Layout) -> Result<()> {
    // Nothing here is worth a farewell: it's all thrown away. By record first, then whatever else
    // is in our cgroups: shims, containers, and daemons whose record was never written.
    step("processes and cgroups", async {
        let names = daemon::names(layout);
        let stops = names
            .iter()
            .map(|name| daemon::stop(layout, name, Duration::ZERO));
        futures::future::try_join_all(stops).await?;
        tokio::task::spawn_blocking(cgroups::destroy)
            .await
            .context("removing the cgroups")?
    })
    .await?;
    step("mounts and network", async {
        leftovers::unmount(layout)?;
        net::down().await?;
        leftovers::remove_shared(layout).await
    })
    .await?;
    if let Some(before) = Before::read(layout) {
        for (key, value) in before
            .sysctls
            .iter()
            .filter(|_| daemon::boot_id().is_ok_and(|b| b == before.boot))
        {
            let path = format!("/proc/sys/{key}");
            if fs::read_to_string(&path).is_ok_and(|v| v.trim() != value) {
                fs::write(&path, value).with_context(|| format!("putting {key} back"))?;
            }
        }
        for folder in &before.absent {
            let _ = fs::remove_dir(folder); // if it's empty
        }
    }
    let root = layout.root().to_owned();
    let removal = tokio::task::spawn_blocking(move || fs::remove_dir_all(root));
    match step("files", async { Ok(removal.await?) }).await? {
        Err(e) if e.kind() != std::io::ErrorKind::NotFound => {
            Err(e).with_context(|| format!("removing {}", layout.root().display()))
        }
        _ => Ok(()),
    }
}

/// Whether `up` came to its end on this boot.
#[must_use]
pub fn is_up(layout: &Layout) -> bool {
    layout.complete().exists()
        && Before::read(layout).is_some_and(|b| daemon::boot_id().is_ok_and(|now| now == b.boot))
        && daemon::alive(layout, "kube-apiserver")
}
