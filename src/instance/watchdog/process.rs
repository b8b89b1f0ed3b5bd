//! The watchdog process itself: a clock, a pipe, and SIGKILL.
//!
//! Owns the waiting and the killing. Standard library and system calls only, one thread, no runtime.
//! Never: kills before the deadline unless the manager is gone; kills a process that it wasn't told of.
//!
//! It wakes for a message, for the deadline (by a timer of the boot-time clock, which also counts a suspended
//! machine's time), or for the end of its input. Whatever it wakes for, it first takes the messages that are there,
//! without waiting, and then looks at the clock: a deadline is absolute, so a message that was written before a
//! freeze can't make it go on after one, while one that is still good must not be overlooked because this process
//! was the late one.

use std::fs::File;
use std::io;
use std::os::fd::AsFd;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::time::TimeSpec;
use nix::sys::timer::{Expiration, TimerSetTimeFlags};
use nix::sys::timerfd::{ClockId, TimerFd, TimerFlags};

use super::RECORD;
use crate::instance::clock::boottime_ms;
use crate::instance::kill::Family;
use crate::instance::proc::Proc;

/// How long one attempt to kill goes on before it's reported.
const ATTEMPT: Duration = Duration::from_secs(5);
/// Between two looks at processes that were killed.
const PAUSE: Duration = Duration::from_millis(1);
/// Messages taken at once; whoever writes faster must not keep it from looking at the clock.
const RECORDS: usize = 64;

/// What the manager says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Word {
    Serve(Proc, u64),
    Release,
}

/// A message, padded.
#[must_use]
pub fn record(text: &str) -> [u8; RECORD] {
    let mut record = [b' '; RECORD];
    for (to, from) in record.iter_mut().zip(text.bytes()) {
        *to = from;
    }
    record
}

fn parse(record: &[u8]) -> Option<Word> {
    let text = std::str::from_utf8(record).ok()?;
    let mut words = text.split_ascii_whitespace();
    let word = match words.next()? {
        "serve" => {
            let pid = words.next()?.parse().ok().filter(|pid| *pid > 1)?;
            let started = words.next()?.parse().ok()?;
            Word::Serve(Proc { pid, started }, words.next()?.parse().ok()?)
        }
        "release" => Word::Release,
        _ => return None,
    };
    words.next().is_none().then_some(word)
}

/// Runs until the input ends.
#[must_use]
pub fn main() -> ExitCode {
    // Without a buffer: what lay in it, no poll would tell of.
    let input = io::stdin().as_fd().try_clone_to_owned().map(File::from);
    match input.and_then(|input| run(input, &mut io::stdout().lock())) {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => {
            // Its manager starts another.
            eprintln!("domicile watchdog: {e}");
            ExitCode::FAILURE
        }
    }
}

struct Guarded {
    family: Family,
    deadline: u64,
}

fn run(mut input: impl io::Read + AsFd, output: &mut impl io::Write) -> io::Result<()> {
    let flags = OFlag::from_bits_retain(fcntl(input.as_fd(), FcntlArg::F_GETFL)?);
    fcntl(input.as_fd(), FcntlArg::F_SETFL(flags | OFlag::O_NONBLOCK))?;
    let timer = TimerFd::new(
        ClockId::CLOCK_BOOTTIME,
        TimerFlags::TFD_CLOEXEC | TimerFlags::TFD_NONBLOCK,
    )?;
    let mut guarded: Option<Guarded> = None;
    loop {
        let said = hear(&mut input);
        // What it can't read, it can't obey: as good as no manager.
        let manager = *said.as_ref().unwrap_or(&Heard::Over(None));
        if let Heard::On(Some(word)) | Heard::Over(Some(word)) = manager {
            guarded = obey(word, guarded);
        }
        let over = matches!(manager, Heard::Over(_));
        if let Some(guard) = &mut guarded
            && (over || boottime_ms() >= guard.deadline)
        {
            let (killed, left) = end(&mut guard.family);
            let done = left == 0;
            // To a manager that is gone it says it in vain.
            let _ = if done {
                writeln!(output, "killed {killed}")
            } else {
                writeln!(output, "left {left}")
            };
            let _ = output.flush();
            if done {
                guarded = None;
            } else {
                // Processes that can't be killed yet: again at once, after another look at what is said.
                continue;
            }
        }
        if over {
            return said.map(|_| ());
        }
        match &guarded {
            Some(guard) => timer.set(
                Expiration::OneShot(instant(guard.deadline)),
                TimerSetTimeFlags::TFD_TIMER_ABSTIME,
            )?,
            None => timer.unset()?,
        }
        let mut wake = [
            PollFd::new(input.as_fd(), PollFlags::POLLIN),
            PollFd::new(timer.as_fd(), PollFlags::POLLIN),
        ];
        match poll(&mut wake, PollTimeout::NONE) {
            Ok(_) | Err(nix::errno::Errno::EINTR) => {}
            Err(e) => return Err(e.into()),
        }
    }
}

fn instant(ms: u64) -> TimeSpec {
    // Not zero, which would disarm the timer.
    let ms = ms.max(1);
    let whole = Duration::from_millis(ms.min(i64::MAX as u64 / 1_000_000));
    TimeSpec::from_duration(whole)
}

#[derive(Clone, Copy, Debug)]
enum Heard {
    On(Option<Word>),
    Over(Option<Word>),
}

/// Takes what is there, without waiting; the last word counts.
fn hear(input: &mut impl io::Read) -> io::Result<Heard> {
    let mut word = None;
    for _ in 0..RECORDS {
        let mut record = [0; RECORD];
        let mut filled = 0;
        while let Some(rest) = record.get_mut(filled..).filter(|r| !r.is_empty()) {
            match input.read(rest) {
                Ok(0) => return Ok(Heard::Over(word)),
                Ok(n) => filled += n,
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) if e.kind() == io::ErrorKind::WouldBlock && filled == 0 => {
                    return Ok(Heard::On(word));
                }
                // The manager writes whole records or none.
                Err(e) => return Err(e),
            }
        }
        let said = parse(&record);
        word = Some(said.ok_or_else(|| io::Error::other("a message isn't understood"))?);
    }
    Ok(Heard::On(word))
}

fn obey(word: Word, guarded: Option<Guarded>) -> Option<Guarded> {
    match word {
        Word::Release => None,
        Word::Serve(postmaster, deadline) => {
            let family = guarded
                .map(|g| g.family)
                .filter(|f| f.postmaster() == postmaster)
                .unwrap_or_else(|| Family::of(postmaster));
            Some(Guarded { family, deadline })
        }
    }
}

/// Kills all of it. Returns how many there were, and how many are left after [`ATTEMPT`].
fn end(family: &mut Family) -> (usize, usize) {
    let begun = Instant::now();
    let mut seen = std::collections::BTreeSet::new();
    loop {
        let left = match family.strike() {
            Ok(living) if living.is_empty() => return (seen.len(), 0),
            Ok(living) => {
                let left = living.len();
                seen.extend(living);
                left
            }
            // Out of file descriptors or memory, for a moment: whoever was killed is known from before.
            Err(_) => 1,
        };
        if begun.elapsed() >= ATTEMPT {
            return (seen.len(), left);
        }
        std::thread::sleep(PAUSE);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_are_understood_or_refused() {
        let postmaster = Proc {
            pid: 42,
            started: 7,
        };
        let of = |text: &str| parse(&record(text));
        assert_eq!(of("serve 42 7 99"), Some(Word::Serve(postmaster, 99)));
        assert_eq!(of("release"), Some(Word::Release));
        for bad in [
            "",
            "serve 42 7",
            "serve 42 7 99 1",
            "serve 1 7 99",
            "serve -42 7 99",
            "serve 0 7 99",
            "release now",
        ] {
            assert_eq!(of(bad), None, "{bad}");
        }
    }
}
