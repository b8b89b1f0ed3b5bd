//! A small volume that can be full.
//!
//! Owns a process of root that mounts and takes away: the test itself gives its rights up. When the test ends, however
//! it does, that process reads the end of its input, and what it has mounted goes.

use std::io::{BufRead as _, BufReader, Write as _};
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::sync::Mutex;

const SCRIPT: &str = r#"
trap '' INT TERM HUP QUIT
mounted=
while read -r what dir; do
  case $what in
    mount) mount -t tmpfs -o "size=512m,mode=0700,uid=$1,gid=$2" domicile-test "$dir" && mounted="$mounted $dir" && echo done || echo failed ;;
    release) umount -l "$dir" && echo done || echo failed ;;
  esac
done
for dir in $mounted; do
  umount -l "$dir" 2>/dev/null
  rmdir -p "$dir" 2>/dev/null
done
"#;

/// The process, what it reads, what it answers.
type Root = (Child, ChildStdin, BufReader<ChildStdout>);

static ROOT: Mutex<Option<Root>> = Mutex::new(None);

/// To be called while the process is root still. `uid` and `gid` own what is mounted.
pub fn prepare(uid: u32, gid: u32) {
    let mut child = Command::new("sh")
        .args(["-c", SCRIPT, "volumes", &uid.to_string(), &gid.to_string()])
        // What ends the test by its group, as Ctrl-C does, must not end this first.
        .process_group(0)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    let (input, output) = (child.stdin.take().unwrap(), child.stdout.take().unwrap());
    *ROOT.lock().unwrap() = Some((child, input, BufReader::new(output)));
}

fn ask(what: &str, dir: &Path) -> bool {
    let mut root = ROOT.lock().unwrap();
    let Some((_, input, output)) = root.as_mut() else {
        return false;
    };
    writeln!(input, "{what} {}", dir.display()).unwrap();
    let mut answer = String::new();
    output.read_line(&mut answer).unwrap();
    answer.trim() == "done"
}

/// A volume of 512 MiB.
pub struct Volume {
    dir: PathBuf,
}

impl Volume {
    /// Over an empty directory. None, if nobody here may mount.
    pub fn over(dir: &Path) -> Option<Self> {
        std::fs::create_dir_all(dir).unwrap();
        ask("mount", dir).then(|| Self {
            dir: dir.to_owned(),
        })
    }

    /// Writes until there is no room for a byte more.
    pub fn fill(&self) {
        let mut file = std::fs::File::create(self.dir.join("fill")).unwrap();
        let much = vec![0; 1 << 20];
        while file.write_all(&much).is_ok() {}
        while file.write_all(&[0; 4096]).is_ok() {}
    }

    pub fn empty(&self) {
        let _ = std::fs::remove_file(self.dir.join("fill"));
    }
}

impl Drop for Volume {
    fn drop(&mut self) {
        ask("release", &self.dir);
    }
}
