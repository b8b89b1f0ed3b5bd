//! The programs of the test bed that are built from Go modules, and the cache they are kept in.
//!
//! Each set of programs has a `go.mod` of its own under `e2e/tools`. A set is built once per
//! version and flags, and appears in the cache whole or not at all. Never runs what it builds.

use crate::layout::cache;
use crate::run::{run_long, say, succeeds};
use anyhow::{Context, Result, ensure};
use nix::fcntl::{Flock, FlockArg};
use sha2::{Digest, Sha256};
use std::fs;
use std::path::{Path, PathBuf};
use tokio::process::Command;

/// A set of programs out of one Go module.
#[derive(Debug)]
pub struct Tool {
    name: &'static str,
    version: &'static str,
    go_mod: &'static str,
    go_sum: &'static str,
    ldflags: &'static str,
    /// Name of the program and its package.
    programs: &'static [(&'static str, &'static str)],
}

macro_rules! tool {
    ($name:literal, $version:literal, $ldflags:expr, $programs:expr) => {
        Tool {
            name: $name,
            version: $version,
            go_mod: include_str!(concat!("../tools/", $name, "/go.mod")),
            go_sum: include_str!(concat!("../tools/", $name, "/go.sum")),
            ldflags: $ldflags,
            programs: $programs,
        }
    };
}

/// Kubernetes. Without the version stamp its feature gates misbehave.
pub const KUBERNETES: Tool = tool!(
    "kubernetes",
    "v1.37.2",
    "-s -w -X k8s.io/component-base/version.gitVersion=v1.37.2 -X k8s.io/component-base/version.gitMajor=1 \
     -X k8s.io/component-base/version.gitMinor=37 -X k8s.io/component-base/version.gitTreeState=clean",
    &[
        ("kube-apiserver", "k8s.io/kubernetes/cmd/kube-apiserver"),
        (
            "kube-controller-manager",
            "k8s.io/kubernetes/cmd/kube-controller-manager"
        ),
        ("kube-scheduler", "k8s.io/kubernetes/cmd/kube-scheduler"),
        ("kube-proxy", "k8s.io/kubernetes/cmd/kube-proxy"),
        ("kubelet", "k8s.io/kubernetes/cmd/kubelet"),
        ("kubectl", "k8s.io/kubernetes/cmd/kubectl"),
    ]
);
/// etcd.
pub const ETCD: Tool = tool!(
    "etcd",
    "v3.6.16",
    "-s -w",
    &[("etcd", "go.etcd.io/etcd/server/v3")]
);
/// CoreDNS.
pub const COREDNS: Tool = tool!(
    "coredns",
    "v1.15.0",
    "-s -w",
    &[("coredns", "github.com/coredns/coredns")]
);
/// Helm.
pub const HELM: Tool = tool!(
    "helm",
    "v4.3.1",
    "-s -w",
    &[("helm", "helm.sh/helm/v4/cmd/helm")]
);
/// What says how much pods use, to those who scale them.
pub const METRICS_SERVER: Tool = tool!(
    "metrics-server",
    "v0.9.0",
    "-s -w",
    &[(
        "metrics-server",
        "sigs.k8s.io/metrics-server/cmd/metrics-server"
    )]
);
/// kwok, with its stages (`stages.yaml` beside the program).
pub const KWOK: Tool = tool!(
    "kwok",
    "v0.8.0",
    "-s -w",
    &[("kwok", "sigs.k8s.io/kwok/cmd/kwok")]
);

/// The folders of kwok's module that hold the stages we use.
const KWOK_STAGES: [&str; 3] = ["pod/fast", "node/fast", "node/heartbeat-with-lease"];

/// Makes builds wait for each other. Let go when dropped.
///
/// # Errors
/// If the lock file can't be made.
pub async fn build_lock() -> Result<Flock<fs::File>> {
    lock(&cache()?.join("build.lock"), "another build").await
}

/// Takes a lock, saying so if somebody else has it.
///
/// # Errors
/// If the lock file can't be made.
pub async fn lock(path: &Path, holder: &str) -> Result<Flock<fs::File>> {
    if let Some(folder) = path.parent() {
        fs::create_dir_all(folder).with_context(|| format!("making {}", folder.display()))?;
    }
    let file = fs::File::create(path).with_context(|| format!("making {}", path.display()))?;
    let file = match Flock::lock(file, FlockArg::LockExclusiveNonblock) {
        Ok(held) => return Ok(held),
        Err((file, _)) => file,
    };
    say(
        "...",
        &format!("waiting for {holder} to end ({})", path.display()),
        None,
    );
    tokio::task::spawn_blocking(move || {
        Flock::lock(file, FlockArg::LockExclusive)
            .map_err(|(_, e)| anyhow::Error::from(e).context("taking a lock"))
    })
    .await
    .context("waiting for a lock")?
}

impl Tool {
    /// Its name.
    #[must_use]
    pub const fn name(&self) -> &'static str {
        self.name
    }

    /// The name of its folder in the cache: changes with versions and flags.
    #[must_use]
    pub fn key(&self) -> String {
        let mut hash = Sha256::new();
        let parts = [
            self.version,
            self.go_mod,
            self.go_sum,
            self.ldflags,
            std::env::consts::ARCH,
        ];
        for part in parts
            .into_iter()
            .chain(self.programs.iter().flat_map(|(a, b)| [*a, *b]))
        {
            hash.update(part.len().to_le_bytes());
            hash.update(part);
        }
        format!(
            "{}-{}-{}",
            self.name,
            self.version,
            &hex(&hash.finalize())[..12]
        )
    }

    fn folder(&self) -> Result<PathBuf> {
        Ok(cache()?.join("bin").join(self.key()))
    }

    /// Where a program of this set lies once it's built.
    ///
    /// # Errors
    /// If there is no cache folder.
    pub fn path(&self, program: &str) -> Result<PathBuf> {
        Ok(self.folder()?.join(program))
    }

    /// Whether it's built.
    #[must_use]
    pub fn is_built(&self) -> bool {
        self.folder().is_ok_and(|f| f.is_dir())
    }

    /// Builds the set, unless it's in the cache. Whether there was anything to do is the answer.
    ///
    /// # Errors
    /// If there's no Go, or the build fails.
    pub async fn ensure(&self) -> Result<bool> {
        if self.is_built() {
            return Ok(false);
        }
        let _lock = build_lock().await?;
        let (folder, base) = (self.folder()?, cache()?);
        if folder.is_dir() {
            return Ok(false);
        }
        remove_unfinished(&base.join("bin"));
        ensure!(
            succeeds(&["go", "version"]).await,
            "there is no Go here: run scripts/setup"
        );
        let unfinished = base.join("bin").join(format!("{}.unfinished", self.key()));
        let source = base.join("build").join(self.key());
        for made in [&unfinished, &source] {
            fs::create_dir_all(made).with_context(|| format!("making {}", made.display()))?;
        }
        fs::write(source.join("go.mod"), self.go_mod).context("writing go.mod")?;
        fs::write(source.join("go.sum"), self.go_sum).context("writing go.sum")?;

        let log = base.join("log").join(format!("build-{}.log", self.name));
        let what = format!("building {} {}", self.name, self.version);
        // Several packages at once only if each program's name is its package's last part.
        let plain = self
            .programs
            .iter()
            .all(|(name, package)| package.rsplit('/').next() == Some(name));
        let output = if plain {
            format!("{}/", unfinished.display())
        } else {
            unfinished.join(self.programs[0].0).display().to_string()
        };
        let mut build = go(&source);
        build.args([
            "build",
            "-v",
            "-trimpath",
            "-ldflags",
            self.ldflags,
            "-o",
            &output,
        ]);
        build.args(self.programs.iter().map(|(_, package)| package));
        run_long(&what, &mut build, &log).await?;
        if self.name == KWOK.name {
            kwok_stages(&source, &unfinished.join("stages.yaml")).await?;
        }
        fs::rename(&unfinished, &folder)
            .with_context(|| format!("moving {} into place", folder.display()))?;
        let _ = fs::remove_dir_all(&source);
        Ok(true)
    }
}

/// A build that was interrupted leaves a folder that nobody will ever name again.
fn remove_unfinished(bin: &Path) {
    for entry in fs::read_dir(bin).into_iter().flatten().flatten() {
        if entry.file_name().to_string_lossy().ends_with(".unfinished") {
            let _ = fs::remove_dir_all(entry.path());
        }
    }
}

fn go(folder: &Path) -> Command {
    let mut command = Command::new("go");
    command
        .current_dir(folder)
        .env("CGO_ENABLED", "0")
        .env("GOFLAGS", "-mod=readonly")
        .env("GOTOOLCHAIN", "auto");
    command.env_remove("GOWORK");
    command
}

async fn kwok_stages(source: &Path, out: &Path) -> Result<()> {
    let listed = go(source)
        .args(["list", "-m", "-f", "{{.Dir}}", "sigs.k8s.io/kwok"])
        .output()
        .await
        .context("asking Go for the folder of kwok's module")?;
    ensure!(
        listed.status.success(),
        "go list: {}",
        String::from_utf8_lossy(&listed.stderr)
    );
    let module = PathBuf::from(String::from_utf8_lossy(&listed.stdout).trim());
    let mut stages = Vec::new();
    for folder in KWOK_STAGES {
        let folder = module.join("kustomize/stage").join(folder);
        let mut files: Vec<_> = fs::read_dir(&folder)
            .with_context(|| format!("reading {}", folder.display()))?
            .flatten()
            .map(|e| e.path())
            .filter(|p| {
                p.extension().is_some_and(|e| e == "yaml") && !p.ends_with("kustomization.yaml")
            })
            .collect();
        files.sort();
        for file in files {
            stages.push(
                fs::read_to_string(&file).with_context(|| format!("reading {}", file.display()))?,
            );
        }
    }
    ensure!(
        !stages.is_empty(),
        "kwok's module has no stages in {}",
        module.display()
    );
    fs::write(out, stages.join("\n---\n")).with_context(|| format!("writing {}", out.display()))
}

/// Bytes as one writes a digest.
#[must_use]
pub fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|b| format!("{b:02x}")).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_follow_versions_and_flags() {
        assert!(KUBERNETES.key().starts_with("kubernetes-v1.37.2-"));
        let other = Tool {
            ldflags: "-s",
            ..ETCD
        };
        assert_ne!(other.key(), ETCD.key());
        assert_eq!(ETCD.key(), ETCD.key());
    }

    #[test]
    fn versions_are_those_of_the_module_files() {
        for (tool, module) in [
            (&KUBERNETES, "k8s.io/kubernetes"),
            (&ETCD, "go.etcd.io/etcd/server/v3"),
            (&COREDNS, "github.com/coredns/coredns"),
            (&HELM, "helm.sh/helm/v4"),
            (&METRICS_SERVER, "sigs.k8s.io/metrics-server"),
            (&KWOK, "sigs.k8s.io/kwok"),
        ] {
            assert!(
                tool.go_mod.contains(&format!("{module} {}", tool.version)),
                "{module}"
            );
        }
    }
}
