//! The voter's durable state on the volume.
//!
//! Owns two files of fixed size that are written in turns, in place: a full disk must not keep a voter from its
//! promise, and a torn write must not cost the state before it.
//! Never: returns before the disk has it; reads a torn file as a state.

use std::fs::{File, OpenOptions};
use std::io::{self, Read as _, Seek as _, SeekFrom, Write as _};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, bail};
use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};

use crate::failover::Durable;
use crate::instance::files;

/// Size of each file. A state with nine voters takes a few kilobytes, with as many eras as a history keeps some ten
/// more; what earlier versions wrote, which kept all eras, is read, too.
const SIZE: usize = 256 << 10;
const NAMES: [&str; 2] = ["failover-a.json", "failover-b.json"];
const DIGEST: usize = 64;

/// The voter's file.
#[derive(Debug)]
pub struct Keep {
    dir: PathBuf,
    seq: u64,
}

#[derive(Serialize, Deserialize)]
struct Slot {
    seq: u64,
    state: Durable<String>,
}

impl Keep {
    /// Opens it; with the state that was kept last, if there is one.
    ///
    /// # Errors
    /// As the file system's, or if there is a state that can't be read: to go on without it would be to forget a
    /// promise.
    pub fn open(dir: &Path) -> anyhow::Result<(Self, Option<Durable<String>>)> {
        let mut newest: Option<Slot> = None;
        let mut torn = 0;
        for name in NAMES {
            let path = dir.join(name);
            match read(&path)? {
                Read::Slot(slot) => {
                    if newest.as_ref().is_none_or(|n| n.seq < slot.seq) {
                        newest = Some(*slot);
                    }
                }
                Read::Blank => {}
                Read::Torn => torn += 1,
            }
            allot(&path)?;
        }
        if newest.is_none() && torn > 0 {
            bail!(
                "what this volume remembers of its votes ({}, {}) can't be read: the instance can't take part; \
                 delete the volume claim and the pod, and it is made anew as a copy of another",
                NAMES[0],
                NAMES[1]
            );
        }
        let seq = newest.as_ref().map_or(0, |n| n.seq);
        let keep = Self {
            dir: dir.to_owned(),
            seq,
        };
        Ok((keep, newest.map(|n| n.state)))
    }

    /// Writes the state. Once this returns, a power failure doesn't take it away.
    ///
    /// # Errors
    /// As the disk's. The state before is then still there.
    pub fn write(&mut self, state: &Durable<String>) -> anyhow::Result<()> {
        let seq = self.seq + 1;
        let body = serde_json::to_vec(&Slot {
            seq,
            state: state.clone(),
        })?;
        if body.len() + DIGEST + 2 > SIZE {
            bail!("the voter's state is larger than its file");
        }
        let mut bytes = hex(&body).into_bytes();
        bytes.push(b'\n');
        bytes.extend_from_slice(&body);
        bytes.push(b'\n');
        // In place: the file has its blocks already.
        let name = NAMES[usize::from(seq.is_multiple_of(2))];
        let mut file = OpenOptions::new()
            .write(true)
            .open(self.dir.join(name))
            .with_context(|| format!("can't open {name}"))?;
        file.seek(SeekFrom::Start(0))?;
        file.write_all(&bytes)?;
        file.sync_data()
            .with_context(|| format!("can't write {name}"))?;
        self.seq = seq;
        Ok(())
    }
}

fn hex(body: &[u8]) -> String {
    Sha256::digest(body)
        .iter()
        .map(|b| format!("{b:02x}"))
        .collect()
}

/// Makes the file in its full size, so that later writes need no room.
fn allot(path: &Path) -> anyhow::Result<()> {
    let size = std::fs::metadata(path).map_or(0, |m| m.len());
    if size >= SIZE as u64 {
        return Ok(());
    }
    let mut file = OpenOptions::new()
        .create(true)
        .append(true)
        .mode(0o600)
        .open(path)
        .with_context(|| format!("can't make {}", path.display()))?;
    let missing = SIZE.saturating_sub(usize::try_from(size)?);
    file.write_all(&vec![b'\n'; missing])?;
    file.sync_all()?;
    files::sync_parent(path)?;
    Ok(())
}

enum Read {
    Slot(Box<Slot>),
    Blank,
    Torn,
}

fn read(path: &Path) -> anyhow::Result<Read> {
    let mut bytes = Vec::new();
    match File::open(path) {
        Ok(file) => file.take(2 * SIZE as u64).read_to_end(&mut bytes)?,
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(Read::Blank),
        Err(e) => return Err(e).with_context(|| format!("can't read {}", path.display())),
    };
    let mut lines = bytes.split(|b| *b == b'\n');
    let digest = lines.next().unwrap_or_default();
    if digest.is_empty() {
        return Ok(Read::Blank);
    }
    let body = lines.next().unwrap_or_default();
    if hex(body).as_bytes() != digest {
        return Ok(Read::Torn);
    }
    Ok(serde_json::from_slice(body).map_or(Read::Torn, |slot| Read::Slot(Box::new(slot))))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn state(promised: u64) -> Durable<String> {
        Durable {
            promised,
            ..Durable::default()
        }
    }

    #[test]
    fn the_last_state_comes_back() {
        let dir = tempfile::tempdir().unwrap();
        let (mut keep, none) = Keep::open(dir.path()).unwrap();
        assert!(none.is_none());
        for promised in 1..=5 {
            keep.write(&state(promised)).unwrap();
            let (again, last) = Keep::open(dir.path()).unwrap();
            assert_eq!((again.seq, last), (promised, Some(state(promised))));
        }
    }

    #[test]
    fn what_an_earlier_version_wrote_is_read_whole() {
        let dir = tempfile::tempdir().unwrap();
        let eras: Vec<_> = (0..3_000)
            .map(|n| {
                format!(
                    r#"{{"term":{},"timeline":{},"start":{}}}"#,
                    n + 1,
                    n + 1,
                    n * 16
                )
            })
            .collect();
        let body = format!(
            r#"{{"seq":7,"state":{{"promised":3001,"coordinator":"s-2/b","configuration":{{"term":3000,"version":2,"primary":"s-1/a","voters":["s-1/a","s-2/b"],"witness":null,"sync":{{"members":["s-2/b"],"acks":1}},"durability":"Required","may_be_primary":["s-1/a"]}},"rebuilding":true,"history":[{}]}}}}"#,
            eras.join(",")
        );
        let text = format!("{}\n{body}\n", hex(body.as_bytes()));
        std::fs::write(dir.path().join(NAMES[0]), text).unwrap();
        let (keep, last) = Keep::open(dir.path()).unwrap();
        let last = last.unwrap();
        assert_eq!((keep.seq, last.promised, last.at()), (7, 3001, (3000, 2)));
        assert!(last.rebuilding);
        assert_eq!(last.history.len(), 3_000);
    }

    #[test]
    fn a_torn_write_costs_nothing_but_itself() {
        let dir = tempfile::tempdir().unwrap();
        let (mut keep, _) = Keep::open(dir.path()).unwrap();
        keep.write(&state(1)).unwrap();
        keep.write(&state(2)).unwrap();
        // The second is in the other file.
        for name in NAMES {
            let path = dir.path().join(name);
            let whole = std::fs::read(&path).unwrap();
            let mut torn = whole.clone();
            torn[80] ^= 1;
            std::fs::write(&path, torn).unwrap();
            let (_, last) = Keep::open(dir.path()).unwrap();
            assert!(last.unwrap().promised >= 1);
            std::fs::write(&path, whole).unwrap();
        }
        for name in NAMES {
            std::fs::write(dir.path().join(name), "nonsense\n{}\n").unwrap();
        }
        let refused = Keep::open(dir.path()).unwrap_err().to_string();
        assert!(refused.contains("can't be read"), "{refused}");
    }
}
