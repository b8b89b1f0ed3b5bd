//! The images, unpacked once: a root folder of containerd that every node's begins as.
//!
//! Unpacking the same layers on every node takes twenty seconds; linking them takes one. What
//! containerd never changes (layers, archives) is linked, what it does (its databases) is copied.
//! Kept in the cache, by what is in it. Never changed once it's there.

use crate::daemon::{self, Daemon};
use crate::images::Archives;
use crate::layout::{Layout, cache, write_atomically};
use crate::node::{answers, containerd_config};
use crate::run::{run, succeeds, until};
use crate::tools::{build_lock, hex};
use anyhow::{Context, Result, ensure};
use sha2::{Digest, Sha256};
use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

const NAME: &str = "seed-containerd";

/// Makes the seed of these archives, unless it's in the cache.
///
/// # Errors
/// If containerd doesn't start, or refuses an archive.
pub async fn ensure(layout: &Layout, archives: &Archives) -> Result<PathBuf> {
    let mut hash = Sha256::new();
    // The archives' names tell what is in them; another containerd may keep it otherwise.
    hash.update(run(&["containerd", "--version"]).await?);
    for archive in archives.all() {
        hash.update(archive.file_name().unwrap_or_default().as_encoded_bytes());
    }
    let folder = cache()?
        .join("img")
        .join(format!("seed-{}", &hex(&hash.finalize())[..12]));
    if folder.is_dir() {
        return Ok(folder);
    }
    let _lock = build_lock().await?;
    let work = cache()?.join("img/seed.unfinished");
    if work.exists() {
        fs::remove_dir_all(&work).with_context(|| format!("removing {}", work.display()))?;
    }
    fs::create_dir_all(&work).with_context(|| format!("making {}", work.display()))?;
    let made = fill(layout, archives, &work).await;
    daemon::stop(layout, NAME, Duration::from_secs(10)).await?;
    made?;
    fs::rename(work.join("containerd"), &folder)
        .with_context(|| format!("moving {} into place", folder.display()))?;
    fs::remove_dir_all(&work).with_context(|| format!("removing {}", work.display()))?;
    Ok(folder)
}

async fn fill(layout: &Layout, archives: &Archives, work: &Path) -> Result<()> {
    // Not in the cache: the path of a socket may be 107 characters long.
    let socket = layout.root().join("seed.sock");
    let config = work.join("containerd.toml");
    write_atomically(&config, containerd_config(work, &socket).as_bytes())?;
    let containerd = Daemon {
        name: NAME.into(),
        netns: None,
        command: ["containerd", "-c", &config.display().to_string()]
            .map(str::to_owned)
            .to_vec(),
        contained: true,
    };
    daemon::ensure(layout, &containerd).await?;
    answers(layout, NAME, &socket).await?;
    let socket = socket.display().to_string();
    let ctr = ["ctr", "-a", &socket, "-n", "k8s.io", "images"];
    let mut count = 0;
    for archive in archives.all() {
        let file = archive.display().to_string();
        run(&[&ctr[..], &["import", &file]].concat()).await?;
        count += 1;
    }
    // Its CRI half learns of an image a moment later, and then names it by its digest, too.
    until(
        "the images",
        Duration::from_secs(10),
        Duration::from_millis(100),
        || async {
            let listed = run(&[&ctr[..], &["ls", "-q"]].concat()).await?;
            let known = listed.lines().filter(|l| l.starts_with("sha256:")).count();
            ensure!(known >= count, "CRI knows {known} of {count}");
            Ok(())
        },
    )
    .await
}

/// Gives a node its own root folder of containerd, unless it has one.
///
/// # Errors
/// If the folder can't be made.
pub async fn plant(seed: &Path, root: &Path) -> Result<()> {
    if root.exists() {
        return Ok(());
    }
    let unfinished = root.with_extension("unfinished");
    let _ = fs::remove_dir_all(&unfinished);
    let (from, to) = (seed.display().to_string(), unfinished.display().to_string());
    // Links don't reach another file system; copies do.
    if !succeeds(&["cp", "-al", &from, &to]).await {
        let _ = fs::remove_dir_all(&unfinished);
        run(&["cp", "-a", &from, &to]).await?;
    }
    for database in databases(&unfinished) {
        let own = database.with_extension("own");
        fs::copy(&database, &own)
            .and_then(|_| fs::rename(&own, &database))
            .with_context(|| format!("copying {}", database.display()))?;
    }
    fs::rename(&unfinished, root).with_context(|| format!("moving {} into place", root.display()))
}

/// The databases of containerd and of its snapshotters: each in its plug-in's folder.
fn databases(root: &Path) -> Vec<PathBuf> {
    let plugins = fs::read_dir(root).into_iter().flatten().flatten();
    let files = plugins.flat_map(|p| fs::read_dir(p.path()).into_iter().flatten().flatten());
    files
        .map(|f| f.path())
        .filter(|p| p.extension().is_some_and(|e| e == "db"))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::MetadataExt;

    #[tokio::test]
    async fn layers_are_shared_and_databases_are_not() {
        let folder = tempfile::tempdir().unwrap();
        let (seed, root) = (folder.path().join("seed"), folder.path().join("root"));
        let (layer, database) = ("content/blobs/sha256/aa", "bolt/meta.db");
        for file in [layer, database] {
            fs::create_dir_all(seed.join(file).parent().unwrap()).unwrap();
            fs::write(seed.join(file), "x").unwrap();
        }
        plant(&seed, &root).await.unwrap();
        let inode = |p: PathBuf| fs::metadata(p).unwrap().ino();
        assert_eq!(inode(seed.join(layer)), inode(root.join(layer)));
        assert_ne!(inode(seed.join(database)), inode(root.join(database)));

        // one that is in use stays as it is
        fs::write(root.join(database), "y").unwrap();
        plant(&seed, &root).await.unwrap();
        assert_eq!(fs::read_to_string(root.join(database)).unwrap(), "y");
    }
}
