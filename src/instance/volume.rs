//! The volume: PGDATA, what lies unfinished beside it, and the few facts the manager keeps.
//!
//! Owns the layout, the one lock, and the rule that a database cluster appears as `data/` only when whole:
//! initdb and base backups write `data.new/`, and a rename finishes them.
//! Never: interprets what it keeps; and never removes `data/` except where `replace` says so.

use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};

use anyhow::Context as _;
use nix::errno::Errno;
use nix::fcntl::{AT_FDCWD, Flock, FlockArg, RenameFlags};
use rand::Rng as _;
use serde::{Deserialize, Serialize, de::DeserializeOwned};

use super::files;
use super::plan::{Cluster, Content};

const DATA: &str = "data";
const FRESH: &str = "data.new";
/// The copy that another took the place of, where the two couldn't be exchanged.
const OLD: &str = "data.old";
const STATE: &str = "state";

/// A volume that this process alone uses.
#[derive(Debug)]
pub struct Volume {
    root: PathBuf,
    // Two pods can mount one ReadWriteOnce volume if they are on the same node.
    _lock: Flock<File>,
}

/// The identity of a volume's content.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Identity {
    /// Random; another one means another volume in the same slot.
    pub id: String,
}

impl Volume {
    /// Takes the volume.
    ///
    /// # Errors
    /// If it can't be written, or another manager has it.
    pub fn open(root: &Path) -> anyhow::Result<Self> {
        let state = root.join(STATE);
        std::fs::create_dir_all(&state)
            .with_context(|| format!("can't write to the volume at {}", root.display()))?;
        let lock = File::options()
            .create(true)
            .truncate(false)
            .write(true)
            .open(state.join("lock"))
            .context("can't open the volume's lock")?;
        let lock = Flock::lock(lock, FlockArg::LockExclusiveNonblock)
            .map_err(|(_, e)| e)
            .context("another instance manager uses this volume")?;
        Ok(Self {
            root: root.to_owned(),
            _lock: lock,
        })
    }

    /// PGDATA.
    #[must_use]
    pub fn data(&self) -> PathBuf {
        self.root.join(DATA)
    }

    /// Where a database cluster is made.
    #[must_use]
    pub fn fresh(&self) -> PathBuf {
        self.root.join(FRESH)
    }

    /// The volume itself.
    #[must_use]
    pub fn root(&self) -> &Path {
        &self.root
    }

    /// Whether something unfinished lies beside PGDATA.
    #[must_use]
    pub fn leftover(&self) -> bool {
        self.fresh().exists() || self.root.join(OLD).exists()
    }

    /// What PGDATA is.
    #[must_use]
    pub fn content(&self) -> Content {
        content(&self.data())
    }

    /// Free bytes and size of the volume.
    ///
    /// # Errors
    /// As the file system's.
    pub fn space(&self) -> io::Result<(u64, u64)> {
        let s = nix::sys::statvfs::statvfs(&self.root)?;
        let unit = s.fragment_size();
        Ok((s.blocks_available() * unit, s.blocks() * unit))
    }

    /// The identity, made now if there is none yet.
    ///
    /// # Errors
    /// As the file system's, or if what is there can't be read.
    pub fn identity(&self) -> anyhow::Result<Identity> {
        if let Some(identity) = self.recall("identity.json")? {
            return Ok(identity);
        }
        // No vowels, so that no word comes out; nothing that looks like something else.
        const LETTERS: &[u8] = b"23456789bcdfghjkmnpqrstvwxz";
        let mut rng = rand::rng();
        let identity = Identity {
            id: (0..5)
                .filter_map(|_| LETTERS.get(rng.random_range(0..LETTERS.len())))
                .map(|b| char::from(*b))
                .collect(),
        };
        self.remember("identity.json", &identity)?;
        Ok(identity)
    }

    /// The identity, if there is one.
    #[must_use]
    pub fn known_identity(&self) -> Option<Identity> {
        self.recall("identity.json").ok().flatten()
    }

    /// Keeps a fact in `state/`.
    ///
    /// # Errors
    /// As the file system's.
    pub fn remember<T: Serialize>(&self, name: &str, fact: &T) -> anyhow::Result<()> {
        remember(&self.root, name, fact)
    }

    /// A fact from `state/`, if it was ever kept.
    ///
    /// # Errors
    /// As the file system's, or if it can't be understood.
    pub fn recall<T: DeserializeOwned>(&self, name: &str) -> anyhow::Result<Option<T>> {
        let path = self.root.join(STATE).join(name);
        let Some(bytes) = files::read_bounded(&path, 4 << 20)? else {
            return Ok(None);
        };
        let fact = serde_json::from_slice(&bytes)
            .with_context(|| format!("{STATE}/{name} on the volume can't be understood"))?;
        Ok(Some(fact))
    }
}

/// As [`Volume::remember`], for a thread that may wait for the disk.
///
/// # Errors
/// As the file system's.
pub fn remember<T: Serialize>(root: &Path, name: &str, fact: &T) -> anyhow::Result<()> {
    let bytes = serde_json::to_vec(fact)?;
    files::replace_durably(&root.join(STATE).join(name), &bytes, 0o600)
        .with_context(|| format!("can't write {STATE}/{name} on the volume"))
}

/// What a person can do.
pub const UNTOUCHED: &str =
    "; nothing was touched. Restore it, or delete the volume claim and the pod";

/// What a directory is, as PGDATA.
#[must_use]
pub fn content(data: &Path) -> Content {
    match std::fs::symlink_metadata(data) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Content::Empty,
        Err(e) => return Content::Unusable(format!("the volume can't be read: {e}")),
        Ok(_) => {}
    }
    let unread = |e: io::Error| Content::Unusable(format!("the volume can't be read: {e}"));
    let whole = |what: &str| {
        format!("data/ on the volume is there, but {what}, so it is no whole database cluster")
    };
    let unusable = |what: &str| Content::Unusable(format!("{}{UNTOUCHED}", whole(what)));
    let identifier = match system_identifier(data) {
        Ok(identifier) => identifier,
        Err(e) => return unread(e),
    };
    let major = match files::read_bounded(&data.join("PG_VERSION"), 64) {
        Ok(Some(text)) => match String::from_utf8_lossy(&text).trim().parse() {
            Ok(major) => major,
            Err(_) => return unusable("its PG_VERSION can't be understood"),
        },
        Ok(None) if identifier.is_none() => {
            return Content::Remains(whole("it has neither PG_VERSION nor global/pg_control"));
        }
        Ok(None) => return unusable("it has no PG_VERSION"),
        Err(e) => return unread(e),
    };
    match identifier {
        Some(system_identifier) => Content::Cluster(Cluster {
            major,
            system_identifier,
            standby: data.join("standby.signal").exists(),
        }),
        None => unusable("its global/pg_control is missing or too short"),
    }
}

/// The major version of the database cluster in `data`, if it says one.
#[must_use]
pub fn major(data: &Path) -> Option<u32> {
    let text = files::read_bounded(&data.join("PG_VERSION"), 64).ok()??;
    String::from_utf8_lossy(&text).trim().parse().ok()
}

/// PostgreSQL's identifier of the database cluster: the first eight bytes of its control file, in every
/// version, in the machine's byte order.
fn system_identifier(data: &Path) -> io::Result<Option<String>> {
    let bytes = files::read_bounded(&data.join("global/pg_control"), 64 << 10)?;
    let id = bytes
        .as_deref()
        .and_then(|b| b.first_chunk::<8>())
        .map(|b| u64::from_ne_bytes(*b))
        .filter(|id| *id != 0);
    Ok(id.map(|id| id.to_string()))
}

/// Removes what lies unfinished beside PGDATA. Long for a large one: call it where it may block.
///
/// # Errors
/// As the file system's.
pub fn clear_leftover(root: &Path) -> io::Result<()> {
    for leftover in [FRESH, OLD] {
        match std::fs::remove_dir_all(root.join(leftover)) {
            Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(e),
            _ => {}
        }
    }
    files::sync_parent(&root.join(FRESH))
}

/// Makes the finished `data.new` PGDATA. A present PGDATA takes its place there in the same instant, and is
/// a leftover from then on.
///
/// # Errors
/// As the file system's.
pub fn finish(root: &Path) -> io::Result<()> {
    let (fresh, data) = (root.join(FRESH), root.join(DATA));
    // What the tools wrote is already on disk (initdb and pg_basebackup sync); standby.signal's entry isn't.
    File::open(&fresh)?.sync_all()?;
    if data.exists() {
        let exchanged = nix::fcntl::renameat2(
            AT_FDCWD,
            &fresh,
            AT_FDCWD,
            &data,
            RenameFlags::RENAME_EXCHANGE,
        );
        match exchanged {
            // A file system that can't: in two steps, each of which leaves whole directories.
            Err(Errno::EINVAL | Errno::ENOSYS | Errno::EOPNOTSUPP) => {
                std::fs::rename(&data, root.join(OLD))?;
                std::fs::rename(&fresh, &data)?;
            }
            other => other?,
        }
    } else {
        std::fs::rename(&fresh, &data)?;
    }
    files::sync_parent(&data)
}

/// Turns a present PGDATA into a leftover, so that a crash while it's removed can't leave half of it as data.
///
/// # Errors
/// As the file system's.
pub fn aside(root: &Path) -> io::Result<()> {
    let data = root.join(DATA);
    if data.exists() {
        std::fs::rename(&data, root.join(FRESH))?;
        files::sync_parent(&data)?;
    }
    Ok(())
}

/// Bytes that a directory takes. Long for a large one: call it where it may block.
#[must_use]
pub fn bytes_of(dir: &Path) -> u64 {
    let mut sum = 0;
    let mut open = vec![dir.to_owned()];
    while let Some(dir) = open.pop() {
        let Ok(entries) = std::fs::read_dir(&dir) else {
            continue;
        };
        for entry in entries.flatten() {
            match entry.metadata() {
                Ok(meta) if meta.is_dir() => open.push(entry.path()),
                Ok(meta) => sum += meta.len(),
                Err(_) => {}
            }
        }
    }
    sum
}

#[cfg(test)]
mod tests {
    use super::*;

    fn cluster(dir: &Path, id: u64) {
        std::fs::create_dir_all(dir.join("global")).unwrap();
        std::fs::write(dir.join("PG_VERSION"), "17\n").unwrap();
        std::fs::write(dir.join("global/pg_control"), id.to_ne_bytes()).unwrap();
    }

    #[test]
    fn what_a_volume_holds() {
        let dir = tempfile::tempdir().unwrap();
        let volume = Volume::open(dir.path()).unwrap();
        assert_eq!(volume.content(), Content::Empty);
        std::fs::create_dir(volume.data()).unwrap();
        assert!(matches!(volume.content(), Content::Remains(_)));
        cluster(&volume.data(), 7);
        std::fs::remove_file(volume.data().join("PG_VERSION")).unwrap();
        assert!(matches!(volume.content(), Content::Unusable(_)));
        std::fs::write(volume.data().join("PG_VERSION"), "new").unwrap();
        assert!(matches!(volume.content(), Content::Unusable(_)));
        cluster(&volume.data(), 7);
        let Content::Cluster(c) = volume.content() else {
            panic!()
        };
        assert_eq!(
            (c.major, c.system_identifier.as_str(), c.standby),
            (17, "7", false)
        );
        std::fs::write(volume.data().join("standby.signal"), "").unwrap();
        assert!(matches!(volume.content(), Content::Cluster(c) if c.standby));
        std::fs::write(volume.data().join("global/pg_control"), "abc").unwrap();
        assert!(matches!(volume.content(), Content::Unusable(_)));
    }

    #[test]
    fn a_copy_replaces_another_in_one_step() {
        let dir = tempfile::tempdir().unwrap();
        let volume = Volume::open(dir.path()).unwrap();
        let id = |c: Content| match c {
            Content::Cluster(c) => c.system_identifier,
            other => panic!("{other:?}"),
        };
        cluster(&volume.fresh(), 1);
        finish(dir.path()).unwrap();
        assert_eq!(id(volume.content()), "1");
        assert!(!volume.leftover());
        cluster(&volume.fresh(), 2);
        finish(dir.path()).unwrap();
        assert_eq!(id(volume.content()), "2");
        assert_eq!(id(content(&volume.fresh())), "1");
        clear_leftover(dir.path()).unwrap();
        assert!(!volume.leftover());
        aside(dir.path()).unwrap();
        assert_eq!(volume.content(), Content::Empty);
        assert!(volume.leftover());
    }

    #[test]
    fn facts_and_identity_stay() {
        let dir = tempfile::tempdir().unwrap();
        let volume = Volume::open(dir.path()).unwrap();
        assert!(volume.known_identity().is_none());
        let id = volume.identity().unwrap();
        assert_eq!(id.id.len(), 5);
        assert_eq!(volume.identity().unwrap(), id);
        drop(volume);
        assert_eq!(Volume::open(dir.path()).unwrap().known_identity(), Some(id));
    }

    #[test]
    fn one_manager_at_a_time() {
        let dir = tempfile::tempdir().unwrap();
        let first = Volume::open(dir.path()).unwrap();
        let refused = Volume::open(dir.path()).unwrap_err().to_string();
        assert!(refused.contains("another instance manager"), "{refused}");
        drop(first);
        Volume::open(dir.path()).unwrap();
    }
}
