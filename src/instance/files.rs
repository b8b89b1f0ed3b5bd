//! Writing files so that a crash leaves either the old or the new one.
//!
//! Owns that one sequence. Never: decides what is written.

use std::fs::{File, OpenOptions};
use std::io::{self, Write as _};
use std::os::unix::fs::{OpenOptionsExt as _, PermissionsExt as _};
use std::path::Path;

/// Replaces `path` with `bytes`; once this returns, also a power failure leaves the new content.
///
/// # Errors
/// As the file system's; the old content is then still there.
pub fn replace_durably(path: &Path, bytes: &[u8], mode: u32) -> io::Result<()> {
    let tmp = write_beside(path, bytes, mode)?;
    File::open(&tmp)?.sync_all()?;
    std::fs::rename(&tmp, path)?;
    sync_parent(path)
}

/// Replaces `path` with `bytes` in one step, without waiting for a disk: for files in memory.
///
/// # Errors
/// As the file system's; the old content is then still there.
pub fn replace(path: &Path, bytes: &[u8], mode: u32) -> io::Result<()> {
    let tmp = write_beside(path, bytes, mode)?;
    std::fs::rename(&tmp, path)
}

fn write_beside(path: &Path, bytes: &[u8], mode: u32) -> io::Result<std::path::PathBuf> {
    let mut name = path
        .file_name()
        .ok_or_else(|| io::Error::new(io::ErrorKind::InvalidInput, "a file needs a name"))?
        .to_owned();
    name.push(".tmp");
    let tmp = path.with_file_name(name);
    // One left over from a crash may have another mode, which opening wouldn't change.
    match std::fs::remove_file(&tmp) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(e),
        _ => {}
    }
    let mut file = OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(mode)
        .open(&tmp)?;
    file.write_all(bytes)?;
    // The umask may have taken bits away.
    file.set_permissions(std::fs::Permissions::from_mode(mode))?;
    Ok(tmp)
}

/// Makes a rename or removal in `path`'s directory durable.
///
/// # Errors
/// As the file system's.
pub fn sync_parent(path: &Path) -> io::Result<()> {
    File::open(path.parent().unwrap_or(Path::new(".")))?.sync_all()
}

/// A file's content, or `None` if there is no such file. No more than `limit` bytes are accepted.
///
/// # Errors
/// As the file system's, or if the file is larger.
pub fn read_bounded(path: &Path, limit: u64) -> io::Result<Option<Vec<u8>>> {
    use std::io::Read as _;
    let file = match File::open(path) {
        Ok(file) => file,
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(e) => return Err(e),
    };
    let mut bytes = Vec::new();
    file.take(limit + 1).read_to_end(&mut bytes)?;
    if bytes.len() as u64 > limit {
        return Err(io::Error::new(
            io::ErrorKind::InvalidData,
            "the file is larger than it can be",
        ));
    }
    Ok(Some(bytes))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_mode_is_as_asked_and_a_leftover_does_not_matter() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("key");
        std::fs::write(dir.path().join("key.tmp"), "half").unwrap();
        replace_durably(&path, b"whole", 0o600).unwrap();
        assert_eq!(std::fs::read(&path).unwrap(), b"whole");
        let mode = std::fs::metadata(&path).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600);
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 1);
        assert_eq!(read_bounded(&path, 5).unwrap().unwrap(), b"whole");
        assert!(read_bounded(&path, 4).is_err());
        assert!(read_bounded(&dir.path().join("none"), 4).unwrap().is_none());
    }
}
