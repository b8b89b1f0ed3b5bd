//! Ways to break a store beyond cuts and freezes: signals to its processes, deletions, lost files, a full volume,
//! an absent API server or operator.
//!
//! Owns how each is done and undone. Signals only processes of the pod it is told, found by the pod's cgroup.

use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use k8s_openapi::api::apps::v1::Deployment;
use k8s_openapi::api::core::v1::{PersistentVolume, PersistentVolumeClaim, Pod};
use kube::api::{DeleteParams, EvictParams, Patch, PatchParams};
use kube::{Api, ResourceExt};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::json;

use crate::cgroups;
use crate::control::{self, Place};
use crate::daemon;
use crate::harness::{PATIENCE, Scope, wait_for};
use crate::run::{run, until};
use crate::testbed::TestBed;

const API_SERVER: &str = "kube-apiserver";
const OPERATOR: &str = "domicile-operator";
const SYSTEM: &str = "domicile-system";
/// Where an instance's volume is mounted (docs/instance.md).
const VOLUME: &str = "var/lib/domicile";
/// The file that fills a volume.
const FILL: &str = "fill";

/// A pod that something is done to: known beforehand, so that it can be reached without the API server.
#[derive(Clone, Debug)]
pub struct Victim {
    /// Its name.
    pub pod: String,
    /// Its node.
    pub node: String,
    uid: String,
}

impl Victim {
    /// Looks a pod up.
    ///
    /// # Errors
    /// If it isn't there, or not on a node.
    pub async fn find(scope: &Scope, pod: &str) -> Result<Self> {
        let found = scope.api::<Pod>().get(pod).await?;
        Ok(Self {
            pod: pod.to_owned(),
            node: found
                .spec
                .as_ref()
                .and_then(|s| s.node_name.clone())
                .with_context(|| format!("the pod {pod} is on no node"))?,
            uid: found.uid().context("a pod without uid")?,
        })
    }

    /// Its processes, if it has any.
    fn found(&self) -> Result<Vec<Process>> {
        let all = cgroups::pod_processes(&self.uid)?;
        Ok(all.into_iter().filter_map(Process::read).collect())
    }

    fn processes(&self) -> Result<Vec<Process>> {
        let all = self.found()?;
        ensure!(!all.is_empty(), "the pod {} has no process", self.pod);
        Ok(all)
    }

    /// PostgreSQL's first process, whose parent isn't PostgreSQL.
    fn postmaster(&self) -> Result<Process> {
        let all = self.processes()?;
        let postgres = |pid: i32| all.iter().any(|p| p.pid == pid && p.name == "postgres");
        all.iter()
            .find(|p| p.name == "postgres" && !postgres(p.parent))
            .cloned()
            .with_context(|| format!("no PostgreSQL runs in {}", self.pod))
    }

    /// The file of the pod's network namespace.
    ///
    /// # Errors
    /// If no PostgreSQL runs in it.
    pub fn netns(&self) -> Result<PathBuf> {
        Ok(super::process::of_process(self.postmaster()?.pid))
    }

    /// Whether any process of a program runs in it, as the machine's list of processes has it.
    ///
    /// # Errors
    /// If the pod's cgroups can't be looked for: that isn't the same as nothing running.
    pub fn runs(&self, program: &str) -> Result<bool> {
        Ok(self.found()?.iter().any(|p| p.name == program))
    }

    /// SIGKILL to PostgreSQL's first process.
    ///
    /// # Errors
    /// If there is none.
    pub fn kill_postmaster(&self) -> Result<()> {
        send(self.postmaster()?.pid, Signal::SIGKILL)
    }

    /// SIGTERM to the container's first process: what a kubelet sends at a pod's end, also without an API server.
    ///
    /// # Errors
    /// If there is none.
    pub fn terminate(&self) -> Result<()> {
        send(self.postmaster()?.parent, Signal::SIGTERM)
    }

    /// SIGKILL to every process of the pod, the holder of its network included: as when its host restarts.
    ///
    /// # Errors
    /// If there is none.
    pub fn kill(&self) -> Result<()> {
        for process in self.processes()? {
            // It may have gone with its parent in the meantime.
            let _ = send(process.pid, Signal::SIGKILL);
        }
        Ok(())
    }

    /// SIGSTOP to every process, or SIGCONT: unlike one that is frozen it can be killed.
    ///
    /// # Errors
    /// If there is none.
    pub fn stall(&self, stalled: bool) -> Result<()> {
        let signal = if stalled {
            Signal::SIGSTOP
        } else {
            Signal::SIGCONT
        };
        for process in self.processes()? {
            let _ = send(process.pid, signal);
        }
        Ok(())
    }

    /// Stops every process, or lets them go on.
    ///
    /// # Errors
    /// If one doesn't stop.
    pub async fn freeze(&self, frozen: bool) -> Result<()> {
        cgroups::freeze_pod(&self.uid, frozen).await
    }

    /// The pod's volume, seen through the root of its container.
    fn volume(&self) -> Result<PathBuf> {
        let pid = self.postmaster()?.pid;
        Ok(PathBuf::from(format!("/proc/{pid}/root")).join(VOLUME))
    }

    /// Removes the data directory and kills every process.
    ///
    /// # Errors
    /// If it can't be removed.
    pub fn wipe(&self) -> Result<()> {
        let data = self.volume()?.join("data");
        let first = std::fs::remove_dir_all(&data);
        if first.is_err() {
            // PostgreSQL makes files meanwhile; what is left goes once more.
            std::fs::remove_dir_all(&data).with_context(|| format!("removing {data:?}"))?;
        }
        self.kill()
    }

    /// Fills the volume to its last byte; the file to remove is the answer.
    ///
    /// # Errors
    /// If the volume has no bound of its own.
    pub async fn fill(&self, bed: &TestBed) -> Result<PathBuf> {
        let inside = self.volume()?.join(FILL);
        let mounted = volumes(bed, &self.node)?;
        ensure!(
            !mounted.is_empty(),
            "the volumes of {} have no bound: filling one would fill the machine's disk",
            self.node
        );
        // Ends with "No space left on device", which is what it is for.
        let of = format!("of={}", inside.display());
        let _ = run(&["dd", "if=/dev/zero", &of, "bs=64k"]).await;
        // The file is removed from outside: the container may be gone by then.
        mounted
            .into_iter()
            .map(|m| m.join(FILL))
            .find(|f| f.exists())
            .context("the filling isn't on a bounded volume")
    }

    /// Deletes the pod, with grace or without.
    ///
    /// # Errors
    /// If the API server refuses.
    pub async fn delete(&self, scope: &Scope, grace: Option<u32>) -> Result<()> {
        let params = DeleteParams {
            grace_period_seconds: grace,
            ..DeleteParams::default()
        };
        scope.api::<Pod>().delete(&self.pod, &params).await?;
        Ok(())
    }

    /// Evicts the pod, as a drain does: asked again while its budget doesn't allow it.
    ///
    /// # Errors
    /// If it isn't allowed in time.
    pub async fn evict(&self, scope: &Scope) -> Result<()> {
        let pods = scope.api::<Pod>();
        until(
            "the eviction",
            Duration::from_secs(30),
            Duration::from_millis(500),
            || async {
                pods.evict(&self.pod, &EvictParams::default()).await?;
                Ok(())
            },
        )
        .await
    }
}

#[derive(Clone, Debug)]
struct Process {
    pid: i32,
    parent: i32,
    name: String,
}

impl Process {
    fn read(pid: i32) -> Option<Self> {
        let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
        let (name, parent) = parse_stat(&stat)?;
        Some(Self { pid, parent, name })
    }
}

/// Name and parent in a text of the form of `/proc/PID/stat`.
fn parse_stat(stat: &str) -> Option<(String, i32)> {
    let (head, tail) = stat.rsplit_once(") ")?;
    let (_, name) = head.split_once('(')?;
    Some((name.to_owned(), tail.split(' ').nth(1)?.parse().ok()?))
}

fn send(pid: i32, signal: Signal) -> Result<()> {
    kill(Pid::from_raw(pid), signal).with_context(|| format!("{signal} to {pid}"))
}

/// Asks for a switchover to another instance.
///
/// # Errors
/// If the API server refuses.
pub async fn promote(scope: &Scope, store: &str, instance: &str) -> Result<()> {
    let annotation = json!({ "metadata": { "annotations": { "domicile.dev/promote": instance } } });
    scope.patch(store, annotation).await
}

/// Stops the API server at once.
///
/// # Errors
/// If it doesn't end.
pub async fn stop_api(bed: &TestBed) -> Result<()> {
    daemon::stop(bed.layout(), API_SERVER, Duration::ZERO).await
}

/// Starts the API server, if it doesn't run, and waits until it answers.
///
/// # Errors
/// If it doesn't.
pub async fn start_api(bed: &TestBed) -> Result<()> {
    let layout = bed.layout();
    let pki = control::pki(layout);
    control::start_storage(layout, &pki, &Place::testbed()).await?;
    control::ready(layout, &bed.client()).await?;
    // Kubernetes' scheduler ends itself when it finds its cache at odds with an API server that was away; whoever runs a
    // cluster starts it again.
    control::start_controllers(layout, &pki, &Place::testbed()).await
}

/// How many operators there are to be.
///
/// # Errors
/// If there is no Deployment of them.
pub async fn operators(bed: &TestBed) -> Result<i32> {
    let deployments: Api<Deployment> = Api::namespaced(bed.client(), SYSTEM);
    let found = deployments.get(OPERATOR).await?;
    Ok(found.spec.replicas.unwrap_or(1).max(1))
}

/// Scales the operator; comes back when that many run.
///
/// # Errors
/// If they don't come or go in time.
pub async fn scale_operator(bed: &TestBed, replicas: i32) -> Result<()> {
    let deployments: Api<Deployment> = Api::namespaced(bed.client(), SYSTEM);
    let patch = Patch::Merge(json!({ "spec": { "replicas": replicas } }));
    deployments
        .patch(OPERATOR, &PatchParams::default(), &patch)
        .await?;
    let settled = wait_for(deployments, OPERATOR, |d: &Deployment| {
        d.status.as_ref().is_some_and(|s| {
            s.ready_replicas.unwrap_or(0) == replicas && s.replicas.unwrap_or(0) == replicas
        })
    });
    tokio::time::timeout(PATIENCE, settled)
        .await
        .context("scaling the operator")??;
    Ok(())
}

/// The mounted volumes of a node.
fn volumes(bed: &TestBed, node: &str) -> Result<Vec<PathBuf>> {
    let folder = bed.layout().volumes(node);
    let text = std::fs::read_to_string("/proc/self/mountinfo").context("reading the mounts")?;
    Ok(text
        .lines()
        .filter_map(|line| line.split(' ').nth(4))
        .map(PathBuf::from)
        .filter(|mount| mount.parent() == Some(folder.as_path()))
        .collect())
}

/// Gives an instance's volume a bound: the same files, on a file system of their own in memory. The operator must
/// be away meanwhile, or it would make the pod again too early.
///
/// # Errors
/// If the pod doesn't go, or the files can't be moved.
pub async fn bound_volume(scope: &Scope, bed: &TestBed, pod: &str, size: &str) -> Result<()> {
    let claim = scope.api::<PersistentVolumeClaim>().get(pod).await?;
    let volume = claim.spec.and_then(|s| s.volume_name);
    let volume = volume.context("an unbound claim")?;
    let volume = Api::<PersistentVolume>::all(bed.client())
        .get(&volume)
        .await?;
    let path = volume.spec.and_then(|s| s.local).map(|l| l.path);
    let path = PathBuf::from(path.context("a volume that isn't local")?);
    let pods = scope.api::<Pod>();
    if pods.get_opt(pod).await?.is_some() {
        pods.delete(pod, &DeleteParams::default()).await?;
    }
    until(
        "the pod's end",
        PATIENCE,
        Duration::from_millis(200),
        || async {
            ensure!(pods.get_opt(pod).await?.is_none(), "{pod} is still there");
            Ok(())
        },
    )
    .await?;
    let aside = path.with_extension("aside");
    let (from, to) = (path.display().to_string(), aside.display().to_string());
    run(&["cp", "-a", &from, &to]).await?;
    let options = format!("size={size},mode=0700");
    run(&[
        "mount",
        "-t",
        "tmpfs",
        "-o",
        &options,
        "domicile-e2e",
        &from,
    ])
    .await?;
    run(&["sh", "-c", "cp -a \"$1\"/. \"$2\"", "cp", &to, &from]).await?;
    std::fs::remove_dir_all(&aside).with_context(|| format!("removing {}", aside.display()))
}

/// Takes away the bounds that [`bound_volume`] made, with what is in them.
///
/// # Errors
/// If one can't be unmounted.
pub async fn unbound_volumes(bed: &TestBed) -> Result<()> {
    for node in crate::topology::NODES {
        for mount in volumes(bed, node.name)? {
            unmount(&mount).await?;
        }
    }
    Ok(())
}

async fn unmount(mount: &Path) -> Result<()> {
    // Lazily: a container that is about to end may still hold it.
    run(&["umount", "--lazy", &mount.display().to_string()]).await?;
    Ok(())
}

/// Makes a primary write WAL until it can't.
pub async fn write_wal(scope: &Scope, instance: &str) {
    let sql = "do $$ begin for i in 1..100000 loop \
        perform pg_logical_emit_message(false, 'fill', repeat('x', 1000000)); end loop; end $$";
    // It ends with an error: that is what it is for.
    let _ = tokio::time::timeout(Duration::from_secs(8), scope.sql(instance, "app", sql)).await;
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_and_parents_are_read_past_strange_names() {
        assert_eq!(
            parse_stat("42 (a ) b) S 7 1 1"),
            Some(("a ) b".to_owned(), 7))
        );
        assert_eq!(parse_stat("nonsense"), None);
    }
}
