//! The images of the test bed, made once and kept in the cache, and their way onto the nodes.
//!
//! Owns what is in each image. Never pulls anything from a container registry: there is none.

use crate::image::{self, Config, Entry, Summary};
use crate::layout::{Layout, cache, temporary_name};
use crate::run::{run, run_long, succeeds};
use crate::tools::{COREDNS, METRICS_SERVER, Tool, build_lock, hex};
use crate::topology::{NODES, Node};
use anyhow::{Context, Result, ensure};
use futures::{StreamExt, TryStreamExt, stream};
use sha2::{Digest, Sha256};
use std::fs;
use std::path::{Path, PathBuf};
use tokio::process::Command;

/// The image of the process that holds a pod's namespaces.
pub const PAUSE: &str = "pause:1";
/// A shell and small programs, for probes.
pub const BUSYBOX: &str = "busybox:1";
/// The cluster's DNS.
pub const DNS: &str = "coredns:1";
/// What says how much pods use.
pub const METRICS: &str = "metrics-server:1";
/// Redis, a target of rights requests, and the Debian whose package it is.
pub const REDIS: (&str, &str) = ("redis:8", "trixie");
/// PostgreSQL, and the Debian whose package it is: the newest, and the oldest that the product supports, on
/// an older C library.
pub const POSTGRES: [(u32, &str); 2] = [(17, "trixie"), (15, "bookworm")];

const PAUSE_SOURCE: &str = include_str!("../tools/pause/pause.c");

/// How the file system of an image of Debian packages is made.
const DEBIAN_RECIPE: &[&str] = &[
    "--mode=root",
    "--format=tar",
    "--variant=minbase",
    "--skip=output/dev",
    "--aptopt=Acquire::Languages \"none\"",
    "--dpkgopt=path-exclude=/usr/share/doc/*",
    "--dpkgopt=path-exclude=/usr/share/info/*",
    "--dpkgopt=path-exclude=/usr/share/lintian/*",
    "--dpkgopt=path-exclude=/usr/share/locale/*",
    "--dpkgopt=path-exclude=/usr/share/man/*",
];

/// What is PostgreSQL's own. As in the image that everybody uses: user and group 999, programs in PATH,
/// libnss-wrapper for other users, no cluster. Without what only JIT compilation needs (160 MB): PostgreSQL runs
/// without it when it isn't there.
const POSTGRES_RECIPE: &[&str] = &[
    "--dpkgopt=path-exclude=/usr/lib/llvm*",
    "--dpkgopt=path-exclude=/usr/lib/*/libLLVM*",
    "--dpkgopt=path-exclude=/usr/lib/*/libz3*",
    "--dpkgopt=path-exclude=/usr/lib/postgresql/*/lib/llvmjit*",
    "--dpkgopt=path-exclude=/usr/lib/postgresql/*/lib/bitcode/*",
    "--essential-hook=echo 'postgres:x:999:' >>\"$1/etc/group\"",
    "--essential-hook=echo 'postgres:x:999:999::/var/lib/postgresql:/bin/bash' >>\"$1/etc/passwd\"",
    "--essential-hook=mkdir -p \"$1/etc/postgresql-common\"; \
     echo 'create_main_cluster = false' >\"$1/etc/postgresql-common/createcluster.conf\"",
    "--customize-hook=cd \"$1\" && rm -rf usr/share/postgresql/*/man usr/share/i18n var/cache/debconf \
     var/lib/apt/lists/* var/lib/systemd var/log/*",
    "--customize-hook=install -d -m 3777 -o 999 -g 999 \"$1/run/postgresql\"",
    "--customize-hook=install -d -m 1777 -o 999 -g 999 \"$1/var/lib/postgresql/data\"",
];

/// What is Redis' own: nothing of the package's service, and nothing that it keeps.
const REDIS_RECIPE: &[&str] = &[
    "--customize-hook=cd \"$1\" && rm -rf usr/share/i18n var/cache/debconf var/lib/apt/lists/* \
     var/lib/systemd var/log/* etc/redis/redis.conf",
];

fn hashed(name: &str, parts: &[&[u8]]) -> Result<PathBuf> {
    let mut hash = Sha256::new();
    for part in parts {
        hash.update(part.len().to_le_bytes());
        hash.update(part);
    }
    hash.update(std::env::consts::ARCH);
    Ok(cache()?
        .join("img")
        .join(format!("{name}-{}.tar", &hex(&hash.finalize())[..12])))
}

/// The archives that every node gets.
#[derive(Clone, Debug)]
pub struct Archives(Vec<PathBuf>);

impl Archives {
    /// All of them.
    pub fn all(&self) -> impl Iterator<Item = &Path> {
        self.0.iter().map(PathBuf::as_path)
    }
}

/// Makes the images that aren't in the cache.
///
/// # Errors
/// If one can't be made.
pub async fn ensure_all() -> Result<Archives> {
    let _lock = build_lock().await?;
    Ok(Archives(vec![
        pause().await?,
        busybox().await?,
        program(&COREDNS, DNS)?,
        postgres(POSTGRES[0]).await?,
        postgres(POSTGRES[1]).await?,
        redis(REDIS).await?,
    ]))
}

/// Makes the metrics server's image, if it isn't in the cache. Its program is there.
///
/// # Errors
/// If it can't be made.
pub async fn metrics() -> Result<PathBuf> {
    let _lock = build_lock().await?;
    program(&METRICS_SERVER, METRICS)
}

async fn pause() -> Result<PathBuf> {
    let out = hashed("pause", &[PAUSE_SOURCE.as_bytes()])?;
    if !out.exists() {
        let (source, program) = (
            temporary_name(&out.with_extension("c")),
            temporary_name(&out.with_extension("bin")),
        );
        fs::create_dir_all(out.parent().unwrap_or(Path::new("/")))?;
        fs::write(&source, PAUSE_SOURCE).context("writing pause.c")?;
        let (from, to) = (source.display().to_string(), program.display().to_string());
        run(&["gcc", "-static", "-Os", "-s", "-x", "c", "-o", &to, &from]).await?;
        let config = Config {
            entrypoint: vec!["/pause".into()],
            user: "65535".into(),
            ..Config::default()
        };
        image::write_program(&out, PAUSE, &program, "/pause", &config)?;
        let _ = fs::remove_file(source);
        let _ = fs::remove_file(program);
    }
    Ok(out)
}

async fn busybox() -> Result<PathBuf> {
    let program = Path::new("/bin/busybox");
    let content = fs::read(program).context("reading /bin/busybox: run scripts/setup")?;
    let out = hashed("busybox", &[&content])?;
    if !out.exists() {
        let mut entries = image::program_layer(program, "/bin/busybox");
        for applet in run(&["/bin/busybox", "--list"])
            .await?
            .lines()
            .filter(|a| *a != "busybox")
        {
            entries.push(Entry::Link(format!("bin/{applet}"), "busybox".into()));
        }
        let layer = temporary_name(&out.with_extension("layer"));
        fs::create_dir_all(out.parent().unwrap_or(Path::new("/")))?;
        image::write_layer(&layer, &entries)?;
        let config = Config {
            command: vec!["sh".into()],
            env: vec!["PATH=/bin".into()],
            ..Config::default()
        };
        image::write(&out, BUSYBOX, &layer, &config)?;
        let _ = fs::remove_file(layer);
    }
    Ok(out)
}

/// An image of one program of a set of the same name.
fn program(tool: &Tool, image: &str) -> Result<PathBuf> {
    let name = tool.name();
    let out = hashed(name, &[tool.key().as_bytes()])?;
    if !out.exists() {
        let config = Config {
            entrypoint: vec![format!("/{name}")],
            user: "65532".into(),
            ..Config::default()
        };
        image::write_program(&out, image, &tool.path(name)?, &format!("/{name}"), &config)?;
    }
    Ok(out)
}

async fn postgres((major, suite): (u32, &str)) -> Result<PathBuf> {
    let config = Config {
        command: vec!["postgres".into()],
        env: vec![
            format!(
                "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin:/usr/lib/postgresql/{major}/bin"
            ),
            "LANG=C.UTF-8".to_owned(),
            format!("PG_MAJOR={major}"),
            "PGDATA=/var/lib/postgresql/data".to_owned(),
        ],
        stop_signal: "SIGINT".into(),
        ..Config::default()
    };
    let packages = format!("--include=postgresql-{major},libnss-wrapper");
    debian(
        &format!("postgres:{major}"),
        &[POSTGRES_RECIPE, &[packages.as_str(), suite]].concat(),
        &config,
    )
    .await
}

async fn redis((name, suite): (&str, &str)) -> Result<PathBuf> {
    let config = Config {
        command: vec!["redis-server".into()],
        env: vec!["PATH=/usr/bin:/bin".into()],
        user: "65534".into(),
        ..Config::default()
    };
    let recipe = [REDIS_RECIPE, &["--include=redis-server", suite]].concat();
    debian(name, &recipe, &config).await
}

/// An image of Debian packages.
async fn debian(name: &str, own: &[&str], config: &Config) -> Result<PathBuf> {
    let recipe = [DEBIAN_RECIPE, own].concat();
    let short = name.split(':').next().unwrap_or(name);
    let out = hashed(short, &[recipe.join("\n").as_bytes()])?;
    if !out.exists() {
        ensure!(
            succeeds(&["mmdebstrap", "--version"]).await,
            "there is no mmdebstrap here: run scripts/setup"
        );
        let log = cache()?.join(format!("log/image-{short}.log"));
        let root = temporary_name(&out.with_extension("layer.tar"));
        fs::create_dir_all(out.parent().unwrap_or(Path::new("/")))?;
        let mut command = Command::new("mmdebstrap");
        command
            .args(recipe)
            .arg(&root)
            .env("LC_ALL", "C.UTF-8")
            .env("DEBIAN_FRONTEND", "noninteractive");
        // Files are dated as of the packages, not of today, so that the same packages give the same image.
        command.env("SOURCE_DATE_EPOCH", "1700000000");
        run_long(&format!("making the image {name}"), &mut command, &log).await?;
        image::write(&out, name, &root, config)?;
        let _ = fs::remove_file(root);
    }
    Ok(out)
}

/// Imports an archive into a node's containerd, unless the node has that very image. Whether there
/// was anything to do is the answer.
///
/// # Errors
/// If containerd refuses.
pub async fn import(
    layout: &Layout,
    node: &Node,
    archive: &Path,
    summary: Option<&Summary>,
) -> Result<bool> {
    let socket = layout.containerd_socket(node.name).display().to_string();
    let ctr = ["ctr", "-a", &socket, "-n", "k8s.io", "images"];
    if let Some(s) = summary {
        let listed = run(&[&ctr[..], &["ls", &format!("name=={}", s.name)]].concat()).await?;
        if listed.contains(&s.digest) {
            return Ok(false);
        }
    }
    let file = archive.display().to_string();
    run(&[&ctr[..], &["import", &file]].concat())
        .await
        .with_context(|| format!("importing {file} on {}", node.name))?;
    Ok(true)
}

/// Imports an archive on every node. How many nodes needed it is the answer.
///
/// # Errors
/// If a containerd refuses.
pub async fn load(layout: &Layout, archive: &Path) -> Result<usize> {
    let summary = image::inspect(archive)?;
    // More than the machine has processors, since half of an import is waiting for the disk.
    let results: Vec<bool> = stream::iter(&NODES)
        .map(|node| import(layout, node, archive, summary.as_ref()))
        .buffer_unordered(3)
        .try_collect()
        .await?;
    Ok(results.into_iter().filter(|imported| *imported).count())
}
