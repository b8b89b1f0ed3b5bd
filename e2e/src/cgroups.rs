//! The cgroups of the test bed, in whatever hierarchies the machine has (v1, v2 or both).
//!
//! Every process of the test bed lives below [`CGROUP`]: that is how `down` finds what pid files
//! don't tell, and how a pod is frozen. Never touches a cgroup outside it, except to let version 2
//! hand its controllers down.

use crate::topology::CGROUP;
use anyhow::{Context, Result};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// One mounted hierarchy.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Hierarchy {
    mount: PathBuf,
    unified: bool,
}

/// The hierarchies named in a text of the form of `/proc/mounts`.
fn parse_mounts(mounts: &str) -> Vec<Hierarchy> {
    let mut found: Vec<Hierarchy> = Vec::new();
    for line in mounts.lines() {
        let mut fields = line.split(' ');
        let (Some(_), Some(mount), Some(kind)) = (fields.next(), fields.next(), fields.next())
        else {
            continue;
        };
        let unified = match kind {
            "cgroup" => false,
            "cgroup2" => true,
            _ => continue,
        };
        let mount = PathBuf::from(mount);
        if mount.starts_with("/sys/fs/cgroup") && !found.iter().any(|h| h.mount == mount) {
            found.push(Hierarchy { mount, unified });
        }
    }
    found
}

fn hierarchies() -> Result<Vec<Hierarchy>> {
    Ok(parse_mounts(
        &fs::read_to_string("/proc/mounts").context("reading /proc/mounts")?,
    ))
}

/// Makes the cgroup `domicile-testbed/NAME` in every hierarchy, so that processes can join it.
///
/// # Errors
/// If the kernel refuses.
pub fn create(name: &str) -> Result<()> {
    for h in hierarchies()? {
        let mut folder = h.mount.clone();
        for part in [CGROUP, name] {
            let parent = folder.clone();
            folder.push(part);
            if h.unified {
                hand_down(&parent);
            }
            fs::create_dir_all(&folder)
                .with_context(|| format!("making the cgroup {}", folder.display()))?;
            // A cpuset is born empty and takes nobody in until it has been given something.
            for file in ["cpuset.cpus", "cpuset.mems"] {
                let (from, to) = (parent.join(file), folder.join(file));
                if !h.unified
                    && to.exists()
                    && fs::read_to_string(&to).is_ok_and(|v| v.trim().is_empty())
                {
                    let value = fs::read_to_string(&from)
                        .with_context(|| format!("reading {}", from.display()))?;
                    fs::write(&to, value.trim())
                        .with_context(|| format!("writing {}", to.display()))?;
                }
            }
        }
        if h.unified && name != SYSTEM {
            hand_down(&folder);
        }
    }
    Ok(())
}

/// The cgroup of everything that isn't a container.
pub const SYSTEM: &str = "system";

/// Lets the children of a version 2 cgroup use its controllers. One that can't be handed down
/// isn't needed: the kubelet says so when it is.
fn hand_down(folder: &Path) {
    let controllers = fs::read_to_string(folder.join("cgroup.controllers")).unwrap_or_default();
    for c in controllers.split_whitespace() {
        let _ = fs::write(folder.join("cgroup.subtree_control"), format!("+{c}"));
    }
}

/// The files into which a process writes its number to join the cgroup of everything that isn't a
/// container.
///
/// # Errors
/// If the mounts can't be read.
pub fn system_procs() -> Result<Vec<PathBuf>> {
    Ok(hierarchies()?
        .into_iter()
        .map(|h| h.mount.join(CGROUP).join(SYSTEM).join("cgroup.procs"))
        .collect())
}

/// All cgroups of ours, children before their parents.
fn folders(top: &Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    if let Ok(entries) = fs::read_dir(top) {
        for e in entries.flatten() {
            if e.file_type().is_ok_and(|t| t.is_dir()) {
                found.extend(folders(&e.path()));
            }
        }
        found.push(top.to_owned());
    }
    found
}

/// Every cgroup of the test bed that exists, children before their parents.
///
/// # Errors
/// If the mounts can't be read.
pub fn remaining() -> Result<Vec<PathBuf>> {
    Ok(hierarchies()?
        .iter()
        .flat_map(|h| folders(&h.mount.join(CGROUP)))
        .collect())
}

/// Every process in a cgroup of the test bed.
///
/// # Errors
/// If the mounts can't be read.
pub fn processes() -> Result<BTreeSet<i32>> {
    Ok(remaining()?.iter().flat_map(|f| members(f)).collect())
}

fn members(folder: &Path) -> Vec<i32> {
    let text = fs::read_to_string(folder.join("cgroup.procs")).unwrap_or_default();
    text.lines()
        .filter_map(|l| l.trim().parse().ok())
        .filter(|pid| *pid > 0)
        .collect()
}

/// Kills every process of the test bed and removes its cgroups.
///
/// # Errors
/// If something is still there after ten seconds.
pub fn destroy() -> Result<()> {
    let start = Instant::now();
    let me = i32::try_from(std::process::id()).unwrap_or_default();
    loop {
        for folder in remaining()? {
            set_frozen(&folder, false)?;
        }
        for pid in processes()?.into_iter().filter(|p| *p != me) {
            let _ = kill(Pid::from_raw(pid), Signal::SIGKILL);
        }
        for folder in remaining()? {
            let _ = fs::remove_dir(&folder);
        }
        let left = remaining()?;
        if left.is_empty() {
            return Ok(());
        }
        if start.elapsed() > Duration::from_secs(10) {
            anyhow::bail!(
                "cgroups that can't be removed: {left:?}, with the processes {:?}",
                processes()?
            );
        }
        std::thread::sleep(Duration::from_millis(50));
    }
}

/// The cgroups of the pod with this uid, one per hierarchy that has a freezer; if none has one,
/// one of any hierarchy.
fn pod_folders(uid: &str) -> Result<Vec<PathBuf>> {
    let name = format!("pod{uid}");
    let all: Vec<_> = remaining()?
        .into_iter()
        .filter(|f| f.file_name().is_some_and(|n| n.to_string_lossy() == name))
        .collect();
    let freezers: Vec<_> = all
        .iter()
        .filter(|f| freezer_file(f).is_some())
        .cloned()
        .collect();
    Ok(if freezers.is_empty() {
        all.into_iter().take(1).collect()
    } else {
        freezers
    })
}

fn freezer_file(folder: &Path) -> Option<(PathBuf, bool)> {
    let (v1, v2) = (folder.join("freezer.state"), folder.join("cgroup.freeze"));
    if v1.exists() {
        Some((v1, false))
    } else if v2.exists() && folder.join("memory.max").exists() {
        // In a hybrid set-up the version 2 hierarchy has no containers in it.
        Some((v2, true))
    } else {
        None
    }
}

fn set_frozen(folder: &Path, frozen: bool) -> Result<()> {
    let Some((file, unified)) = freezer_file(folder) else {
        return Ok(());
    };
    let value = match (unified, frozen) {
        (true, true) => "1",
        (true, false) => "0",
        (false, true) => "FROZEN",
        (false, false) => "THAWED",
    };
    match fs::write(&file, value) {
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => Ok(()),
        other => other.with_context(|| format!("writing {value} to {}", file.display())),
    }
}

/// Stops (or lets go on) every process of a pod. Comes back once all of them have stopped.
///
/// # Errors
/// If the pod has no cgroup here, or a process doesn't stop within ten seconds.
pub async fn freeze_pod(uid: &str, frozen: bool) -> Result<()> {
    let folders_of_pod = pod_folders(uid)?;
    anyhow::ensure!(
        !folders_of_pod.is_empty(),
        "the pod {uid} has no cgroup: it isn't running"
    );
    for folder in folders_of_pod {
        if freezer_file(&folder).is_some() {
            let start = Instant::now();
            loop {
                set_frozen(&folder, frozen)?;
                if is_settled(&folder, frozen) {
                    break;
                }
                anyhow::ensure!(
                    start.elapsed() < Duration::from_secs(10),
                    "{} doesn't settle",
                    folder.display()
                );
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        } else {
            let signal = if frozen {
                Signal::SIGSTOP
            } else {
                Signal::SIGCONT
            };
            for pid in folders(&folder).iter().flat_map(|f| members(f)) {
                kill(Pid::from_raw(pid), signal).with_context(|| format!("{signal} to {pid}"))?;
            }
        }
    }
    Ok(())
}

/// The processes of a pod, its holder of the network included; none if it doesn't run here.
///
/// # Errors
/// If the mounts can't be read.
pub fn pod_processes(uid: &str) -> Result<BTreeSet<i32>> {
    let top = pod_folders(uid)?;
    Ok(top
        .iter()
        .flat_map(|f| folders(f))
        .flat_map(|f| members(&f))
        .collect())
}

fn is_settled(folder: &Path, frozen: bool) -> bool {
    let state = fs::read_to_string(folder.join("freezer.state")).unwrap_or_default();
    if state.is_empty() {
        let events = fs::read_to_string(folder.join("cgroup.events")).unwrap_or_default();
        return events.contains("frozen 1") == frozen;
    }
    (state.trim() == "FROZEN") == frozen
}

/// The uids of the pods that are frozen.
///
/// # Errors
/// If the mounts can't be read.
pub fn frozen_pods() -> Result<BTreeSet<String>> {
    let mut uids = BTreeSet::new();
    for folder in remaining()? {
        let Some(name) = folder.file_name().and_then(|n| n.to_str()) else {
            continue;
        };
        let Some(uid) = name.strip_prefix("pod") else {
            continue;
        };
        let stopped = match freezer_file(&folder) {
            Some(_) => is_settled(&folder, true),
            None => {
                let pids: Vec<_> = folders(&folder).iter().flat_map(|f| members(f)).collect();
                !pids.is_empty() && pids.iter().all(|p| is_stopped(*p))
            }
        };
        if stopped && uid.len() == 36 {
            uids.insert(uid.to_owned());
        }
    }
    Ok(uids)
}

fn is_stopped(pid: i32) -> bool {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    stat.rsplit(") ")
        .next()
        .is_some_and(|rest| rest.starts_with('T'))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_kinds_of_hierarchies_are_found() {
        let text = "cgroup2 /sys/fs/cgroup cgroup2 rw 0 0\nproc /proc proc rw 0 0\n";
        assert_eq!(
            parse_mounts(text),
            [Hierarchy {
                mount: "/sys/fs/cgroup".into(),
                unified: true
            }]
        );
        let text = "cgroup /sys/fs/cgroup/memory cgroup rw,memory 0 0\n\
                    cgroup /sys/fs/cgroup/memory cgroup rw,memory 0 0\n\
                    cgroup2 /sys/fs/cgroup/unified cgroup2 rw 0 0\n\
                    cgroup /elsewhere/cpu cgroup rw,cpu 0 0\n";
        let found = parse_mounts(text);
        assert_eq!(found.len(), 2);
        assert!(!found[0].unified && found[1].unified);
    }
}
