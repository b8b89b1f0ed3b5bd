//! How much memory gateways and workers hold, read from the machine that the test bed runs on.
//!
//! Never counts what isn't theirs: the resident pages of the process itself, not its cgroup's caches.

use std::collections::BTreeMap;

use anyhow::Result;

/// The most MiB that each running gateway and worker ever had resident.
///
/// # Errors
/// If the processes can't be listed.
pub fn sample() -> Result<BTreeMap<&'static str, Vec<f64>>> {
    let mut found: BTreeMap<&'static str, Vec<f64>> = BTreeMap::new();
    for entry in std::fs::read_dir("/proc")? {
        let path = entry?.path();
        // A process may end while it is looked at.
        let (Ok(command), Ok(status)) = (
            std::fs::read(path.join("cmdline")),
            std::fs::read_to_string(path.join("status")),
        ) else {
            continue;
        };
        let mut words = command.split(|b| *b == 0);
        let (program, what) = (words.next().unwrap_or_default(), words.next());
        let name = match what {
            Some(b"gateway") => "gateway",
            Some(b"worker") => "worker",
            _ => continue,
        };
        if !program.ends_with(b"/domicile") {
            continue;
        }
        let resident = status
            .lines()
            .find_map(|l| l.strip_prefix("VmHWM:"))
            .and_then(|l| l.split_whitespace().next()?.parse::<f64>().ok());
        if let Some(kibibytes) = resident {
            found.entry(name).or_default().push(kibibytes / 1024.0);
        }
    }
    Ok(found)
}
