//! What the test bed leaves in places that it shares with the machine: mounts, sockets of shims,
//! caches and links of logs; how they are found and removed.
//!
//! Never removes what it can't tell to be the test bed's own.

use crate::cgroups;
use crate::layout::Layout;
use crate::net;
use crate::run::run;
use crate::topology::SUPERNET;
use anyhow::{Context, Result};
use nix::mount::{MntFlags, umount2};
use std::fs;
use std::path::{Path, PathBuf};

const SHIM_SOCKETS: &str = "/run/containerd/s";
const CNI_RESULTS: &str = "/var/lib/cni/results";
const CONTAINER_LOGS: &str = "/var/log/containers";
const DEVICE_PLUGINS: &str = "/var/lib/kubelet/device-plugins";

/// Folders that the components make outside ours, innermost first.
pub const SHARED_FOLDERS: [&str; 8] = [
    SHIM_SOCKETS,
    "/run/containerd",
    CNI_RESULTS,
    "/var/lib/cni/cache",
    "/var/lib/cni",
    CONTAINER_LOGS,
    DEVICE_PLUGINS,
    "/var/lib/kubelet",
];

/// The mount points below a folder in a text of the form of `/proc/self/mountinfo`, last one first.
fn mounts_below(mountinfo: &str, folder: &Path) -> Vec<PathBuf> {
    let mut found: Vec<_> = mountinfo
        .lines()
        .filter_map(|line| line.split(' ').nth(4))
        .map(|point| PathBuf::from(unescape(point)))
        .filter(|point| point.starts_with(folder))
        .collect();
    found.reverse();
    found
}

/// The kernel writes blanks and backslashes as three octal digits.
fn unescape(text: &str) -> String {
    let mut parts = text.split('\\');
    let mut out = parts.next().unwrap_or_default().to_owned();
    for part in parts {
        match part
            .get(..3)
            .and_then(|digits| u8::from_str_radix(digits, 8).ok())
        {
            Some(byte) => {
                out.push(char::from(byte));
                out.push_str(&part[3..]);
            }
            None => {
                out.push('\\');
                out.push_str(part);
            }
        }
    }
    out
}

fn mounts(layout: &Layout) -> Result<Vec<PathBuf>> {
    let text = fs::read_to_string("/proc/self/mountinfo").context("reading the mounts")?;
    Ok(mounts_below(&text, layout.root()))
}

/// Unmounts everything below our folder.
///
/// # Errors
/// If the kernel refuses.
pub fn unmount(layout: &Layout) -> Result<()> {
    // Mounts may lie on top of each other: look again until none is left.
    for _ in 0..20 {
        let points = mounts(layout)?;
        if points.is_empty() {
            return Ok(());
        }
        for point in points {
            match umount2(&point, MntFlags::MNT_DETACH | MntFlags::UMOUNT_NOFOLLOW) {
                Ok(()) | Err(nix::errno::Errno::EINVAL | nix::errno::Errno::ENOENT) => {}
                Err(e) => return Err(e).with_context(|| format!("unmounting {}", point.display())),
            }
        }
    }
    anyhow::bail!("still mounted: {:?}", mounts(layout)?)
}

fn files(folder: &str) -> Vec<PathBuf> {
    fs::read_dir(folder)
        .into_iter()
        .flatten()
        .flatten()
        .map(|e| e.path())
        .collect()
}

/// Sockets of shims and kubelets that nobody listens on any more.
fn dead_sockets() -> Vec<PathBuf> {
    let dead = |p: &PathBuf| {
        std::os::unix::net::UnixStream::connect(p)
            .is_err_and(|e| e.kind() == std::io::ErrorKind::ConnectionRefused)
    };
    let sockets = files(SHIM_SOCKETS).into_iter().chain(files(DEVICE_PLUGINS));
    sockets.filter(dead).collect()
}

/// What CNI remembers of pods whose network namespaces lay in our folder.
fn cni_results(layout: &Layout) -> Vec<PathBuf> {
    let root = format!("\"{}/", layout.root().display());
    let ours = |p: &PathBuf| fs::read_to_string(p).is_ok_and(|text| text.contains(&root));
    files(CNI_RESULTS).into_iter().filter(ours).collect()
}

fn log_links(layout: &Layout) -> Vec<PathBuf> {
    let ours = |p: &PathBuf| fs::read_link(p).is_ok_and(|target| target.starts_with(layout.root()));
    files(CONTAINER_LOGS).into_iter().filter(ours).collect()
}

async fn routes() -> Result<Vec<String>> {
    let shown = run(&["ip", "-o", "route", "show", SUPERNET]).await?;
    Ok(shown.lines().map(str::to_owned).collect())
}

/// Removes what the components have left outside our folder.
///
/// # Errors
/// If a file can't be removed.
pub async fn remove_shared(layout: &Layout) -> Result<()> {
    for path in dead_sockets()
        .into_iter()
        .chain(cni_results(layout))
        .chain(log_links(layout))
    {
        fs::remove_file(&path).with_context(|| format!("removing {}", path.display()))?;
    }
    for route in routes().await? {
        let words: Vec<_> = route.split_whitespace().collect();
        run(&[&["ip", "route", "del"], &words[..]].concat()).await?;
    }
    Ok(())
}

/// Processes that were started for this state folder, in whatever cgroup.
fn processes(layout: &Layout) -> Vec<String> {
    let root = layout.root().display().to_string();
    let ours = [
        "etcd",
        "kube-",
        "kubelet",
        "containerd",
        "testbed",
        "runc",
        "sh",
    ];
    let me = std::process::id();
    let mut found = Vec::new();
    for entry in fs::read_dir("/proc").into_iter().flatten().flatten() {
        let Some(pid) = entry
            .file_name()
            .to_str()
            .and_then(|n| n.parse::<u32>().ok())
        else {
            continue;
        };
        let raw = fs::read(entry.path().join("cmdline")).unwrap_or_default();
        let line: Vec<_> = raw
            .split(|b| *b == 0)
            .map(String::from_utf8_lossy)
            .collect();
        let program = line
            .first()
            .and_then(|p| p.rsplit('/').next())
            .unwrap_or_default();
        let named = ours
            .iter()
            .any(|o| program == *o || (*o != "sh" && program.starts_with(o)));
        if pid != me
            && named
            && line
                .iter()
                .skip(1)
                .any(|word| word.contains(&format!("{root}/")))
        {
            found.push(format!("process {pid}: {}", line.join(" ").trim()));
        }
    }
    found
}

/// Everything of the test bed that is there: nothing, after `down`.
///
/// # Errors
/// If one can't look.
pub async fn list(layout: &Layout) -> Result<Vec<String>> {
    let mut found = processes(layout);
    found.extend(
        cgroups::processes()?
            .into_iter()
            .map(|p| format!("process {p} in a cgroup of ours")),
    );
    found.extend(
        mounts(layout)?
            .into_iter()
            .map(|p| format!("mount {}", p.display())),
    );
    found.extend(
        net::namespaces()
            .into_iter()
            .map(|n| format!("network namespace {n}")),
    );
    found.extend(net::links().into_iter().map(|l| format!("link {l}")));
    found.extend(routes().await?.into_iter().map(|r| format!("route {r}")));
    found.extend(
        cgroups::remaining()?
            .into_iter()
            .map(|p| format!("cgroup {}", p.display())),
    );
    for path in dead_sockets()
        .into_iter()
        .chain(cni_results(layout))
        .chain(log_links(layout))
    {
        found.push(format!("file {}", path.display()));
    }
    if layout.root().exists() {
        found.push(format!("folder {}", layout.root().display()));
    }
    Ok(found)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mounts_come_innermost_first_and_only_ours() {
        let text = "1 0 8:1 / / rw - ext4 /dev/vda rw\n\
                    2 1 0:5 / /state/nodes/w1 rw - tmpfs tmpfs rw\n\
                    3 1 0:5 / /state/nodes/w1/a\\040b rw - tmpfs tmpfs rw\n\
                    4 1 0:5 / /statement rw - tmpfs tmpfs rw\n";
        let found = mounts_below(text, Path::new("/state"));
        assert_eq!(
            found,
            [
                PathBuf::from("/state/nodes/w1/a b"),
                PathBuf::from("/state/nodes/w1")
            ]
        );
    }
}
