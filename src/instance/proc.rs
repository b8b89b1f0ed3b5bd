//! Processes as `/proc` shows them.
//!
//! Owns how one is told from a later one of the same number, how a parent's children are found, and what they are
//! connected to.
//! Never: waits, or takes a zombie for a process that can still do something.

use std::collections::BTreeSet;
use std::io;

use nix::errno::Errno;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

/// A process, told apart from a later one of the same number by its start.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Proc {
    /// Its number.
    pub pid: i32,
    /// When it started, in the kernel's ticks since the machine did.
    pub started: u64,
}

/// What `/proc/PID/stat` says of a process.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Stat {
    /// `R`, `S`, `D`, `T`, `Z`, …
    pub state: char,
    /// Its parent's number.
    pub parent: i32,
    /// When it started.
    pub started: u64,
}

impl Stat {
    /// Whether it has ended and only waits to be waited for: its memory and its sockets are gone.
    #[must_use]
    pub fn ended(&self) -> bool {
        matches!(self.state, 'Z' | 'X' | 'x')
    }
}

impl Proc {
    /// The process that has this number now.
    #[must_use]
    pub fn of(pid: u32) -> Option<Self> {
        let pid = i32::try_from(pid).ok()?;
        Some(Self {
            pid,
            started: stat(pid)?.started,
        })
    }

    /// What it's doing, if it is still there: a zombie is, another process under its number isn't.
    #[must_use]
    pub fn stat(&self) -> Option<Stat> {
        stat(self.pid).filter(|s| s.started == self.started)
    }

    /// Whether it can still do something.
    #[must_use]
    pub fn alive(&self) -> bool {
        self.stat().is_some_and(|s| !s.ended())
    }

    /// Sends it a signal, if it is still there.
    ///
    /// # Errors
    /// If this process isn't allowed to.
    pub fn signal(&self, signal: Signal) -> io::Result<()> {
        // Between the look and the signal the number could pass to another only if the kernel went through all
        // its numbers in these microseconds. 0 and below would mean whole groups of processes.
        if self.pid <= 0 || !self.alive() {
            return Ok(());
        }
        match kill(Pid::from_raw(self.pid), signal) {
            Err(Errno::ESRCH) | Ok(()) => Ok(()),
            Err(e) => Err(e.into()),
        }
    }
}

/// Lets a postmaster read its configuration again. Not in its first moment, before it has a handler for that: it would
/// end. It reads the configuration then anyway.
pub fn reload(postmaster: i32) {
    if postmaster > 0 && catches(postmaster, Signal::SIGHUP) {
        let _ = kill(Pid::from_raw(postmaster), Signal::SIGHUP);
    }
}

/// Whether a process has a handler for a signal.
fn catches(pid: i32, signal: Signal) -> bool {
    let Ok(status) = std::fs::read_to_string(format!("/proc/{pid}/status")) else {
        return false;
    };
    status
        .lines()
        .find_map(|line| line.strip_prefix("SigCgt:"))
        .and_then(|mask| u64::from_str_radix(mask.trim(), 16).ok())
        .is_some_and(|mask| mask & (1 << (signal as i32 - 1)) != 0)
}

/// What `/proc/PID/stat` says.
#[must_use]
pub fn stat(pid: i32) -> Option<Stat> {
    parse(&std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?)
}

fn parse(text: &str) -> Option<Stat> {
    // The name stands in parentheses and may itself contain some.
    let mut fields = text.rsplit_once(')')?.1.split_whitespace();
    Some(Stat {
        state: fields.next()?.chars().next()?,
        parent: fields.next()?.parse().ok()?,
        started: fields.nth(17)?.parse().ok()?,
    })
}

/// Every process there is, zombies included. One that lives throughout the call is among them; one that begins
/// during it may be missing.
///
/// # Errors
/// If `/proc` can't be read.
pub fn all() -> io::Result<Vec<(Proc, Stat)>> {
    let mut found = Vec::new();
    for entry in std::fs::read_dir("/proc")? {
        let name = entry?.file_name();
        let Some(pid) = name.to_str().and_then(|n| n.parse::<i32>().ok()) else {
            continue;
        };
        // One that is gone by now is none.
        if let Some(stat) = stat(pid) {
            let started = stat.started;
            found.push((Proc { pid, started }, stat));
        }
    }
    Ok(found)
}

/// Its command line, or the title it gave itself; empty for a zombie.
#[must_use]
pub fn title(pid: i32) -> Option<Vec<u8>> {
    std::fs::read(format!("/proc/{pid}/cmdline")).ok()
}

/// The sockets that it has open, by the kernel's numbers.
///
/// # Errors
/// If it has ended, or isn't this user's.
pub fn sockets(pid: i32) -> io::Result<BTreeSet<u64>> {
    let mut found = BTreeSet::new();
    for entry in std::fs::read_dir(format!("/proc/{pid}/fd"))? {
        // One that is closed by now is none.
        let Ok(target) = std::fs::read_link(entry?.path()) else {
            continue;
        };
        let number = target.to_str().and_then(|t| {
            t.strip_prefix("socket:[")?
                .strip_suffix(']')?
                .parse::<u64>()
                .ok()
        });
        found.extend(number);
    }
    Ok(found)
}

/// The TCP connections whose own end is this port, in the network of a process, by the numbers of their sockets. One
/// that is made meanwhile may be missing.
///
/// # Errors
/// If the process has ended.
pub fn connections(pid: i32, port: u16) -> io::Result<BTreeSet<u64>> {
    let mut found = BTreeSet::new();
    for table in ["tcp", "tcp6"] {
        match std::fs::read_to_string(format!("/proc/{pid}/net/{table}")) {
            Ok(text) => found.extend(text.lines().filter_map(|line| connection(line, port))),
            // Without the protocol there is no such table.
            Err(e) if e.kind() == io::ErrorKind::NotFound => {}
            Err(e) => return Err(e),
        }
    }
    Ok(found)
}

/// The number of the socket of a line of `/proc/net/tcp`, unless it listens, is nobody's any more, or another port's.
fn connection(line: &str, port: u16) -> Option<u64> {
    const LISTENS: u8 = 0x0A;
    let mut words = line.split_whitespace().skip(1);
    let (own, state) = (words.next()?, words.nth(1)?);
    let socket: u64 = words.nth(5)?.parse().ok()?;
    // The first line says what is what.
    let state = u8::from_str_radix(state, 16).ok()?;
    let at = u16::from_str_radix(own.rsplit_once(':')?.1, 16).ok()?;
    (state != LISTENS && at == port && socket != 0).then_some(socket)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_connection_is_one_to_this_port_and_doesnt_listen() {
        let lines = [
            "  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode",
            "   0: 0100007F:1538 00000000:0000 0A 00000000:00000000 00:00000000 00000000   999        0 4711 1 0 100 0 0 10 0",
            "   1: 0100007F:1538 0100007F:D3A2 01 00000000:00000000 00:00000000 00000000   999        0 4712 1 0 20 4 30 10 -1",
            "   2: 0100007F:D3A2 0100007F:1538 01 00000000:00000000 00:00000000 00000000   999        0 4713 1 0 20 4 30 10 -1",
            "   3: 0100007F:1538 0100007F:D3A4 06 00000000:00000000 03:00000F1C 00000000     0        0 0 3 0",
        ];
        let found = lines
            .into_iter()
            .filter_map(|line| connection(line, 0x1538));
        assert_eq!(found.collect::<Vec<u64>>(), [4712]);
        assert!(sockets(-1).is_err());

        let me = i32::try_from(std::process::id()).unwrap();
        let server = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let port = server.local_addr().unwrap().port();
        assert_eq!(connections(me, port).unwrap(), BTreeSet::new());
        let client = std::net::TcpStream::connect(("127.0.0.1", port)).unwrap();
        let (accepted, _) = server.accept().unwrap();
        let of_server = connections(me, port).unwrap();
        assert_eq!(of_server.intersection(&sockets(me).unwrap()).count(), 1);
        drop((client, accepted));
    }

    #[test]
    fn own_stat_can_be_read() {
        let me = Proc::of(std::process::id()).unwrap();
        let stat = me.stat().unwrap();
        assert_eq!(stat.parent, nix::unistd::getppid().as_raw());
        assert!(me.started > 0 && me.alive());
        assert!(all().unwrap().iter().any(|(p, _)| *p == me));
        let earlier = Proc {
            started: me.started - 1,
            ..me
        };
        assert_eq!(earlier.stat(), None);
        // Would end this test otherwise.
        earlier.signal(Signal::SIGKILL).unwrap();
    }

    #[test]
    fn a_name_may_contain_anything() {
        let text = "7 (a) R 1) Z 42 0 0 0 0 0 0 0 0 0 0 0 0 0 20 0 1 0 4711 0 0";
        let stat = parse(text).unwrap();
        assert_eq!((stat.parent, stat.started), (42, 4711));
        assert!(stat.ended());
        assert_eq!(parse("7 (a) R"), None);
    }
}
