//! Where the test bed keeps its files.
//!
//! Owns every path below the state folder (gone after `down`) and the cache folder (kept). Never
//! decides what is written there.

use anyhow::{Context, Result};
use std::path::{Path, PathBuf};

/// The environment variable that names another state folder.
pub const STATE_ENV: &str = "DOMICILE_TESTBED_DIR";

/// The state folder of a test bed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Layout {
    root: PathBuf,
}

impl Layout {
    /// The state folder of this machine's test bed.
    #[must_use]
    pub fn system() -> Self {
        let root = std::env::var_os(STATE_ENV)
            .filter(|v| !v.is_empty())
            .map_or_else(|| PathBuf::from("/var/lib/domicile-testbed"), PathBuf::from);
        Self { root }
    }

    /// A state folder of one's own.
    #[must_use]
    pub fn at(root: &Path) -> Self {
        Self {
            root: root.to_owned(),
        }
    }

    /// The folder itself.
    #[must_use]
    pub fn root(&self) -> &Path {
        &self.root
    }

    /// The administrator's kubeconfig.
    #[must_use]
    pub fn kubeconfig(&self) -> PathBuf {
        self.root.join("kubeconfig")
    }

    /// Keys, certificates and the components' kubeconfigs.
    #[must_use]
    pub fn pki(&self) -> PathBuf {
        self.root.join("pki")
    }

    /// One log file per component.
    #[must_use]
    pub fn logs(&self) -> PathBuf {
        self.root.join("log")
    }

    /// One record per daemon.
    #[must_use]
    pub fn pids(&self) -> PathBuf {
        self.root.join("pid")
    }

    /// The data of etcd.
    #[must_use]
    pub fn etcd(&self) -> PathBuf {
        self.root.join("etcd")
    }

    /// Everything of one node.
    #[must_use]
    pub fn node(&self, node: &str) -> PathBuf {
        self.root.join("nodes").join(node)
    }

    /// The volumes of one node.
    #[must_use]
    pub fn volumes(&self, node: &str) -> PathBuf {
        self.node(node).join("volumes")
    }

    /// The socket of a node's containerd.
    #[must_use]
    pub fn containerd_socket(&self, node: &str) -> PathBuf {
        self.node(node).join("run/containerd.sock")
    }

    /// The cuts and latencies in force.
    #[must_use]
    pub fn faults(&self) -> PathBuf {
        self.root.join("faults.json")
    }

    /// What `up` found on the machine and `down` puts back.
    #[must_use]
    pub fn restore(&self) -> PathBuf {
        self.root.join("restore.json")
    }

    /// The copy of this program that the test bed's own daemons run.
    #[must_use]
    pub fn program(&self) -> PathBuf {
        self.root.join("testbed")
    }

    /// The mark that `up` came to its end.
    #[must_use]
    pub fn complete(&self) -> PathBuf {
        self.root.join("complete")
    }
}

/// The cache folder: built programs and images, kept over `down`.
///
/// # Errors
/// If neither `XDG_CACHE_HOME` nor `HOME` is set.
pub fn cache() -> Result<PathBuf> {
    let base = match std::env::var_os("XDG_CACHE_HOME").filter(|v| !v.is_empty()) {
        Some(dir) => PathBuf::from(dir),
        None => PathBuf::from(
            std::env::var_os("HOME").context("neither XDG_CACHE_HOME nor HOME is set")?,
        )
        .join(".cache"),
    };
    Ok(base.join("domicile"))
}

/// Writes a file so that nobody ever sees half of it.
///
/// # Errors
/// If the folder can't be made or written to.
pub fn write_atomically(path: &Path, content: &[u8]) -> Result<()> {
    let folder = path
        .parent()
        .with_context(|| format!("{} has no folder", path.display()))?;
    std::fs::create_dir_all(folder).with_context(|| format!("making {}", folder.display()))?;
    let temporary = temporary_name(path);
    std::fs::write(&temporary, content)
        .and_then(|()| std::fs::rename(&temporary, path))
        .with_context(|| format!("writing {}", path.display()))
}

/// A name beside `path` for a file that is not finished yet.
#[must_use]
pub fn temporary_name(path: &Path) -> PathBuf {
    let mut name = path.file_name().unwrap_or_default().to_owned();
    name.push(format!(".tmp{}", std::process::id()));
    path.with_file_name(name)
}
