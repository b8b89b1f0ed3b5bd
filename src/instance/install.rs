//! The init container's work: brings this program, and names for its user, into a pod of any image.
//!
//! Owns what lies in the injected directory. Never: runs in the main container.

use std::path::Path;

use anyhow::Context as _;

use super::files;
use crate::api::names::{POD_UID, SUPERUSER, paths};

/// Copies the running executable to `target`/domicile, and writes `target`/passwd and `target`/group, which
/// the pod mounts over /etc's: initdb refuses a user without a name, and the image is arbitrary.
///
/// # Errors
/// If the executable can't be read or the directory not be written.
pub fn install(target: &Path) -> anyhow::Result<()> {
    std::fs::create_dir_all(target)
        .with_context(|| format!("can't make the directory {}", target.display()))?;
    let program = std::fs::read("/proc/self/exe").context("can't read the running executable")?;
    for (name, content, mode) in [
        ("passwd", passwd().into_bytes(), 0o644),
        ("group", group().into_bytes(), 0o644),
        // Last: its presence means that the others are there.
        ("domicile", program, 0o755),
    ] {
        let path = target.join(name);
        files::replace_durably(&path, &content, mode)
            .with_context(|| format!("can't write {}", path.display()))?;
    }
    Ok(())
}

fn passwd() -> String {
    format!(
        "root:x:0:0:root:/root:/sbin/nologin\n\
         {SUPERUSER}:x:{POD_UID}:{POD_UID}:PostgreSQL:{}:/sbin/nologin\n\
         nobody:x:65534:65534:nobody:/:/sbin/nologin\n",
        paths::VOLUME
    )
}

fn group() -> String {
    format!("root:x:0:\n{SUPERUSER}:x:{POD_UID}:\nnobody:x:65534:\n")
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt as _;

    #[test]
    fn the_program_and_the_names_are_there() {
        let dir = tempfile::tempdir().unwrap();
        let target = dir.path().join("bin");
        for _ in 0..2 {
            install(&target).unwrap();
        }
        let program = target.join("domicile");
        assert_eq!(
            std::fs::metadata(&program).unwrap().permissions().mode() & 0o777,
            0o755
        );
        assert_eq!(
            std::fs::metadata(&program).unwrap().len(),
            std::fs::metadata("/proc/self/exe").unwrap().len()
        );
        let passwd = std::fs::read_to_string(target.join("passwd")).unwrap();
        assert_eq!(
            super::super::hba::user_name(&passwd, 10001).as_deref(),
            Some("postgres")
        );
        assert_eq!(std::fs::read_dir(&target).unwrap().count(), 3);
    }
}
