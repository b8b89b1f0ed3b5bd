//! Certificates and credentials: read from the mounted Secrets, kept as PostgreSQL wants them.
//!
//! Owns the copies under the run directory, which is memory: the server's in `tls/`, and the client's, for
//! streaming, in `upstream/`, apart, so that taking the client's key away (see `receiver`) leaves the server
//! its own. Never: writes a key to the volume, or logs what it reads.

use std::io;
use std::path::{Path, PathBuf};

use super::files;

/// What a Secret with a certificate holds.
#[derive(Clone, PartialEq, Eq)]
pub struct Certificate {
    ca: Vec<u8>,
    cert: Vec<u8>,
    key: Vec<u8>,
}

/// The application's credentials.
#[derive(Clone, PartialEq, Eq)]
pub struct Credentials {
    /// Role.
    pub username: String,
    /// Password.
    pub password: String,
}

impl std::fmt::Debug for Credentials {
    // A password must not reach a log by a derived Debug.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Credentials(..)")
    }
}

/// The largest file of a Secret; the API server allows 1 MiB for all of them.
const LIMIT: u64 = 1 << 20;

impl Certificate {
    /// Reads a mounted Secret. `None` while it isn't whole.
    ///
    /// # Errors
    /// As the file system's.
    pub fn read(dir: &Path) -> io::Result<Option<Self>> {
        let once = || -> io::Result<Option<Self>> {
            let read = |name| files::read_bounded(&dir.join(name), LIMIT);
            Ok(
                match (read("ca.crt")?, read("tls.crt")?, read("tls.key")?) {
                    (Some(ca), Some(cert), Some(key))
                        if !ca.is_empty() && !cert.is_empty() && !key.is_empty() =>
                    {
                        Some(Self { ca, cert, key })
                    }
                    _ => None,
                },
            )
        };
        // The kubelet exchanges all files at once, but we read one after the other: a mixture of an old
        // certificate and a new key would make PostgreSQL refuse both.
        let first = once()?;
        Ok(if once()? == first { first } else { None })
    }

    /// The authority's certificates, PEM.
    #[must_use]
    pub fn ca(&self) -> &[u8] {
        &self.ca
    }

    /// The certificate, PEM.
    #[must_use]
    pub fn cert(&self) -> &[u8] {
        &self.cert
    }

    /// Its private key, PEM. For whoever speaks TLS with it; never to be logged or kept.
    pub(crate) fn key(&self) -> &[u8] {
        &self.key
    }

    /// Writes the server's copies.
    ///
    /// # Errors
    /// As the file system's.
    pub fn install_server(&self, run: &Path) -> io::Result<()> {
        self.install(&run.join("tls"))
    }

    /// Writes the client's copies: from here on this instance can stream.
    ///
    /// # Errors
    /// As the file system's.
    pub fn install_client(&self, run: &Path) -> io::Result<()> {
        self.install(&client_dir(run))
    }

    fn install(&self, dir: &Path) -> io::Result<()> {
        make_private(dir)?;
        for (name, bytes) in [
            ("ca.crt", &self.ca),
            ("tls.crt", &self.cert),
            ("tls.key", &self.key),
        ] {
            let path = dir.join(name);
            if files::read_bounded(&path, LIMIT)?.as_ref() != Some(bytes) {
                files::replace(&path, bytes, 0o600)?;
            }
        }
        Ok(())
    }
}

/// Makes a directory that only its owner may enter.
///
/// # Errors
/// As the file system's.
pub fn make_private(dir: &Path) -> io::Result<()> {
    use std::os::unix::fs::DirBuilderExt as _;
    std::fs::DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(dir)
}

/// Where the client's copies are.
#[must_use]
pub fn client_dir(run: &Path) -> PathBuf {
    run.join("upstream")
}

/// Takes the client's key away: no connection begun from now on can authenticate.
///
/// # Errors
/// As the file system's.
pub fn remove_client_key(run: &Path) -> io::Result<()> {
    match std::fs::remove_file(client_dir(run).join("tls.key")) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => Err(e),
        _ => Ok(()),
    }
}

impl Credentials {
    /// Reads a mounted Secret. `None` while it isn't whole.
    ///
    /// # Errors
    /// As the file system's.
    pub fn read(dir: &Path) -> io::Result<Option<Self>> {
        let read = |name: &str| -> io::Result<Option<String>> {
            let bytes = files::read_bounded(&dir.join(name), 64 << 10)?;
            Ok(bytes
                .and_then(|b| String::from_utf8(b).ok())
                .map(|s| s.trim_end_matches(['\r', '\n']).to_owned())
                .filter(|s| !s.is_empty()))
        };
        Ok(match (read("username")?, read("password")?) {
            (Some(username), Some(password)) => Some(Self { username, password }),
            _ => None,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt as _;

    #[test]
    fn copies_are_private_and_the_client_key_goes_alone() {
        let dir = tempfile::tempdir().unwrap();
        let (secret, run) = (dir.path().join("secret"), dir.path().join("run"));
        std::fs::create_dir(&secret).unwrap();
        assert!(Certificate::read(&secret).unwrap().is_none());
        for name in ["ca.crt", "tls.crt", "tls.key"] {
            std::fs::write(secret.join(name), name).unwrap();
        }
        let cert = Certificate::read(&secret).unwrap().unwrap();
        cert.install_server(&run).unwrap();
        cert.install_client(&run).unwrap();
        let mode = |p: &str| std::fs::metadata(run.join(p)).unwrap().permissions().mode() & 0o777;
        assert_eq!((mode("tls"), mode("tls/tls.key")), (0o700, 0o600));
        remove_client_key(&run).unwrap();
        remove_client_key(&run).unwrap();
        assert!(!run.join("upstream/tls.key").exists());
        assert!(run.join("tls/tls.key").exists());
    }

    #[test]
    fn credentials_are_read_whole_or_not_and_never_shown() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("username"), "app").unwrap();
        assert!(Credentials::read(dir.path()).unwrap().is_none());
        std::fs::write(dir.path().join("password"), "se cret\n").unwrap();
        let c = Credentials::read(dir.path()).unwrap().unwrap();
        assert_eq!(c.password, "se cret");
        assert!(!format!("{c:?}").contains("cret"));
    }
}
