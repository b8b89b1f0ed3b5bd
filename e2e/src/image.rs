//! Container images without a container engine.
//!
//! Owns the format: an archive that is an OCI image layout and a docker-archive at once, so that
//! `ctr images import`, `docker load` and `podman load` all read it. The same input always gives
//! the same bytes. Never starts a program, never knows what the images are for.

use crate::layout::temporary_name;
use crate::tools::hex;
use anyhow::{Context, Result};
use serde_json::{Value, json};
use sha2::{Digest, Sha256};
use std::fs;
use std::io::{Read, Write};
use std::path::{Path, PathBuf};

/// How containers of the image start.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Config {
    /// The program and its first arguments.
    pub entrypoint: Vec<String>,
    /// Arguments that a pod replaces.
    pub command: Vec<String>,
    /// `NAME=value`.
    pub env: Vec<String>,
    /// Who runs it: a name or a number; empty: root.
    pub user: String,
    /// Where it starts; empty: at the root.
    pub working_dir: String,
    /// The signal that asks it to end; empty: SIGTERM.
    pub stop_signal: String,
}

/// What an archive holds.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Summary {
    /// The full name: `docker.io/library/postgres:17`.
    pub name: String,
    /// The digest of its manifest, as a registry would have it.
    pub digest: String,
}

/// One entry of a layer that is made by hand.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Entry {
    /// A folder, with its permissions.
    Folder(String, u32),
    /// A file, with its permissions and content.
    File(String, u32, Vec<u8>),
    /// A file copied from the machine, with its permissions.
    Copy(String, u32, PathBuf),
    /// A symbolic link and what it points to.
    Link(String, String),
}

/// The name with registry and tag, as containerd keeps it.
#[must_use]
pub fn full_name(name: &str) -> String {
    let tagged = if name
        .rsplit('/')
        .next()
        .is_some_and(|last| last.contains(':'))
    {
        name.to_owned()
    } else {
        format!("{name}:latest")
    };
    match tagged.split_once('/') {
        None => format!("docker.io/library/{tagged}"),
        Some((host, _)) if host.contains(['.', ':']) || host == "localhost" => tagged,
        Some(_) => format!("docker.io/{tagged}"),
    }
}

/// Writes a layer: owned by root, without times.
///
/// # Errors
/// If a file can't be read, or the layer can't be written.
pub fn write_layer(out: &Path, entries: &[Entry]) -> Result<()> {
    let file = fs::File::create(out).with_context(|| format!("making {}", out.display()))?;
    let mut tar = tar::Builder::new(std::io::BufWriter::new(file));
    for entry in entries {
        let mut header = tar::Header::new_gnu();
        header.set_mtime(0);
        match entry {
            Entry::Folder(path, mode) => {
                header.set_entry_type(tar::EntryType::Directory);
                header.set_mode(*mode);
                header.set_size(0);
                tar.append_data(&mut header, format!("{path}/"), std::io::empty())?;
            }
            Entry::File(path, mode, content) => {
                header.set_mode(*mode);
                header.set_size(content.len() as u64);
                tar.append_data(&mut header, path, content.as_slice())?;
            }
            Entry::Copy(path, mode, from) => {
                let source =
                    fs::File::open(from).with_context(|| format!("opening {}", from.display()))?;
                header.set_mode(*mode);
                header.set_size(source.metadata()?.len());
                tar.append_data(&mut header, path, source)?;
            }
            Entry::Link(path, target) => {
                header.set_entry_type(tar::EntryType::Symlink);
                header.set_mode(0o777);
                header.set_size(0);
                tar.append_link(&mut header, path, target)?;
            }
        }
    }
    tar.into_inner()
        .and_then(|mut w| w.flush())
        .with_context(|| format!("writing {}", out.display()))
}

/// The layer of an image that holds one static program: besides it, certificates (if the machine
/// has them), a user and a place for temporary files.
#[must_use]
pub fn program_layer(program: &Path, path: &str) -> Vec<Entry> {
    let mut entries = vec![
        Entry::Folder("etc".into(), 0o755),
        Entry::File(
            "etc/passwd".into(),
            0o644,
            b"root:x:0:0:root:/:/sbin/nologin\nnonroot:x:65532:65532:nonroot:/:/sbin/nologin\n"
                .to_vec(),
        ),
        Entry::File(
            "etc/group".into(),
            0o644,
            b"root:x:0:\nnonroot:x:65532:\n".to_vec(),
        ),
        Entry::Folder("tmp".into(), 0o1777),
    ];
    let certificates = PathBuf::from("/etc/ssl/certs/ca-certificates.crt");
    if certificates.exists() {
        entries.push(Entry::Folder("etc/ssl".into(), 0o755));
        entries.push(Entry::Folder("etc/ssl/certs".into(), 0o755));
        entries.push(Entry::Copy(
            "etc/ssl/certs/ca-certificates.crt".into(),
            0o644,
            certificates,
        ));
    }
    let path = path.trim_start_matches('/');
    let mut parents: Vec<_> = Path::new(path)
        .ancestors()
        .skip(1)
        .filter(|p| !p.as_os_str().is_empty())
        .collect();
    parents.reverse();
    entries.extend(
        parents
            .into_iter()
            .map(|p| Entry::Folder(p.display().to_string(), 0o755)),
    );
    entries.push(Entry::Copy(path.to_owned(), 0o755, program.to_owned()));
    entries
}

fn digest_of(path: &Path) -> Result<(String, u64)> {
    let mut file = fs::File::open(path).with_context(|| format!("opening {}", path.display()))?;
    let (mut hash, mut size, mut buffer) = (Sha256::new(), 0_u64, vec![0; 1 << 20]);
    loop {
        match file
            .read(&mut buffer)
            .with_context(|| format!("reading {}", path.display()))?
        {
            0 => return Ok((hex(&hash.finalize()), size)),
            n => {
                hash.update(&buffer[..n]);
                size += n as u64;
            }
        }
    }
}

fn architecture() -> &'static str {
    match std::env::consts::ARCH {
        "x86_64" => "amd64",
        "aarch64" => "arm64",
        other => other,
    }
}

fn config_json(config: &Config, layer: &str) -> Value {
    let mut inner = serde_json::Map::new();
    for (key, list) in [
        ("Entrypoint", &config.entrypoint),
        ("Cmd", &config.command),
        ("Env", &config.env),
    ] {
        if !list.is_empty() {
            inner.insert(key.into(), json!(list));
        }
    }
    for (key, text) in [
        ("User", &config.user),
        ("WorkingDir", &config.working_dir),
        ("StopSignal", &config.stop_signal),
    ] {
        if !text.is_empty() {
            inner.insert(key.into(), json!(text));
        }
    }
    json!({
        "architecture": architecture(), "os": "linux", "config": inner,
        "rootfs": {"type": "layers", "diff_ids": [format!("sha256:{layer}")]},
        "history": [{"created_by": "testbed image"}],
    })
}

/// Writes an image of one layer (an uncompressed tar) as an archive; whole or not at all.
///
/// # Errors
/// If the layer can't be read, or the archive can't be written.
pub fn write(out: &Path, name: &str, layer: &Path, config: &Config) -> Result<Summary> {
    let name = full_name(name);
    let (layer_digest, layer_size) = digest_of(layer)?;
    let config = serde_json::to_vec(&config_json(config, &layer_digest))?;
    let config_digest = hex(&Sha256::digest(&config));
    let manifest = serde_json::to_vec(&json!({
        "schemaVersion": 2,
        "mediaType": "application/vnd.oci.image.manifest.v1+json",
        "config": {
            "mediaType": "application/vnd.oci.image.config.v1+json",
            "digest": format!("sha256:{config_digest}"), "size": config.len(),
        },
        "layers": [{
            "mediaType": "application/vnd.oci.image.layer.v1.tar",
            "digest": format!("sha256:{layer_digest}"), "size": layer_size,
        }],
    }))?;
    let manifest_digest = hex(&Sha256::digest(&manifest));
    let tag = name.rsplit(':').next().unwrap_or("latest");
    let index = serde_json::to_vec(&json!({
        "schemaVersion": 2,
        "mediaType": "application/vnd.oci.image.index.v1+json",
        "manifests": [{
            "mediaType": "application/vnd.oci.image.manifest.v1+json",
            "digest": format!("sha256:{manifest_digest}"), "size": manifest.len(),
            "platform": {"architecture": architecture(), "os": "linux"},
            "annotations": {"io.containerd.image.name": name, "org.opencontainers.image.ref.name": tag},
        }],
    }))?;
    let blob = |digest: &str| format!("blobs/sha256/{digest}");
    let docker = serde_json::to_vec(&json!([{
        "Config": blob(&config_digest), "RepoTags": [name], "Layers": [blob(&layer_digest)],
    }]))?;

    if let Some(folder) = out.parent().filter(|f| !f.as_os_str().is_empty()) {
        fs::create_dir_all(folder).with_context(|| format!("making {}", folder.display()))?;
    }
    let temporary = temporary_name(out);
    write_layer(
        &temporary,
        &[
            Entry::File("index.json".into(), 0o644, index),
            Entry::File("manifest.json".into(), 0o644, docker),
            Entry::File(
                "oci-layout".into(),
                0o644,
                br#"{"imageLayoutVersion":"1.0.0"}"#.to_vec(),
            ),
            Entry::Folder("blobs".into(), 0o755),
            Entry::Folder("blobs/sha256".into(), 0o755),
            Entry::File(blob(&config_digest), 0o644, config),
            Entry::File(blob(&manifest_digest), 0o644, manifest),
            Entry::Copy(blob(&layer_digest), 0o644, layer.to_owned()),
        ],
    )?;
    fs::rename(&temporary, out).with_context(|| format!("moving {} into place", out.display()))?;
    Ok(Summary {
        name,
        digest: format!("sha256:{manifest_digest}"),
    })
}

/// Writes the image of one static program.
///
/// # Errors
/// If the program can't be read, or the archive can't be written.
pub fn write_program(
    out: &Path,
    name: &str,
    program: &Path,
    path: &str,
    config: &Config,
) -> Result<Summary> {
    if let Some(folder) = out.parent().filter(|f| !f.as_os_str().is_empty()) {
        fs::create_dir_all(folder).with_context(|| format!("making {}", folder.display()))?;
    }
    let layer = temporary_name(&out.with_extension("layer"));
    let result = write_layer(&layer, &program_layer(program, path))
        .and_then(|()| write(out, name, &layer, config));
    let _ = fs::remove_file(&layer);
    result
}

/// The image in an archive; `None` if it's one of another maker that says too little.
///
/// # Errors
/// If it isn't a readable archive.
pub fn inspect(archive: &Path) -> Result<Option<Summary>> {
    let file = fs::File::open(archive).with_context(|| format!("opening {}", archive.display()))?;
    let mut tar = tar::Archive::new(file);
    for entry in tar
        .entries_with_seek()
        .with_context(|| format!("reading {}", archive.display()))?
    {
        let mut entry = entry.with_context(|| format!("reading {}", archive.display()))?;
        if entry.path()?.as_os_str() != "index.json" {
            continue;
        }
        let mut text = String::new();
        entry.read_to_string(&mut text)?;
        let index: Value = serde_json::from_str(&text).context("index.json")?;
        let manifests = index["manifests"]
            .as_array()
            .map(Vec::as_slice)
            .unwrap_or_default();
        let [only] = manifests else { return Ok(None) };
        let name = only["annotations"]["io.containerd.image.name"].as_str();
        return Ok(name.zip(only["digest"].as_str()).map(|(n, d)| Summary {
            name: n.into(),
            digest: d.into(),
        }));
    }
    Ok(None)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_completed_as_containerd_does() {
        assert_eq!(full_name("postgres:17"), "docker.io/library/postgres:17");
        assert_eq!(
            full_name("domicile/operator"),
            "docker.io/domicile/operator:latest"
        );
        assert_eq!(full_name("localhost:5000/a:1"), "localhost:5000/a:1");
        assert_eq!(full_name("example.org/a/b"), "example.org/a/b:latest");
    }

    #[test]
    fn the_same_input_gives_the_same_bytes_and_digests_fit_their_content() {
        let folder = tempfile::tempdir().unwrap();
        let program = folder.path().join("program");
        fs::write(&program, b"\x7fELF pretend").unwrap();
        let config = Config {
            entrypoint: vec!["/bin/program".into()],
            user: "65532".into(),
            ..Config::default()
        };
        let (a, b) = (folder.path().join("a.tar"), folder.path().join("b.tar"));
        let one = write_program(&a, "demo:1", &program, "/bin/program", &config).unwrap();
        let two = write_program(&b, "demo:1", &program, "/bin/program", &config).unwrap();
        assert_eq!(fs::read(&a).unwrap(), fs::read(&b).unwrap());
        assert_eq!(one, two);
        assert_eq!(inspect(&a).unwrap(), Some(one.clone()));
        assert_eq!(one.name, "docker.io/library/demo:1");

        let mut blobs = 0;
        let mut tar = tar::Archive::new(fs::File::open(&a).unwrap());
        for entry in tar.entries().unwrap() {
            let mut entry = entry.unwrap();
            let path = entry.path().unwrap().display().to_string();
            if let Some(digest) = path.strip_prefix("blobs/sha256/").filter(|d| !d.is_empty()) {
                let mut content = Vec::new();
                entry.read_to_end(&mut content).unwrap();
                assert_eq!(hex(&Sha256::digest(&content)), digest);
                blobs += 1;
            }
        }
        assert_eq!(blobs, 3);
        // nothing half-finished beside it
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 3);
    }

    #[test]
    fn a_layer_has_folders_before_what_is_in_them() {
        let entries = program_layer(Path::new("/bin/true"), "/usr/local/bin/domicile");
        let names: Vec<_> = entries
            .iter()
            .map(|e| match e {
                Entry::Folder(p, _)
                | Entry::File(p, _, _)
                | Entry::Copy(p, _, _)
                | Entry::Link(p, _) => p.as_str(),
            })
            .collect();
        let tail = &names[names.len() - 4..];
        assert_eq!(
            tail,
            [
                "usr",
                "usr/local",
                "usr/local/bin",
                "usr/local/bin/domicile"
            ]
        );
    }
}
