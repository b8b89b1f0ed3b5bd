//! PostgreSQL's log, line by line into the manager's.
//!
//! Owns the reading of PostgreSQL's standard error, and which of its words are passed on. An error's message
//! can quote a value ("invalid input syntax for type date: …"), so what backends say on behalf of clients is
//! passed on as its error code alone; what PostgreSQL's own processes say is passed on in full.
//! Never: passes on a statement, a detail, or more than a bounded line; never lets PostgreSQL wait for it
//! longer than a write to the manager's own output takes.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use tokio::io::{AsyncBufReadExt as _, AsyncRead, AsyncReadExt as _, BufReader};
use tracing::{debug, error, info, warn};

/// The longest line that is read; the rest of it is dropped.
const LINE_MAX: usize = 8 << 10;
/// How long the upstream's word that WAL is gone counts: it repeats it every few seconds while it lives. A copy is not
/// given up on the word of a primary that may have died since.
const WAL_GONE_FRESH: Duration = Duration::from_secs(30);
/// Clients' errors that are logged per second; the others are counted.
const CLIENT_LINES_PER_SECOND: u32 = 10;
/// What receivers say per second: one whose upstream refuses it tries again ten times in that.
const RECEIVER_LINES_PER_SECOND: u32 = 2;

/// What the log told that the manager acts on.
#[derive(Debug, Default)]
pub struct Signs {
    wal_gone: Mutex<Option<Instant>>,
    disk_full: AtomicBool,
    client_errors: AtomicU64,
    last: Mutex<Option<String>>,
    reason: Mutex<Option<String>>,
}

impl Signs {
    /// Whether the upstream said that it no longer has the WAL this standby needs.
    pub fn wal_gone(&self) -> bool {
        let last = *self.wal_gone.lock().unwrap_or_else(PoisonError::into_inner);
        last.is_some_and(|at| at.elapsed() < WAL_GONE_FRESH)
    }

    /// It streams (again).
    pub fn clear_wal_gone(&self) {
        *self.wal_gone.lock().unwrap_or_else(PoisonError::into_inner) = None;
    }

    /// Whether PostgreSQL ran out of space since the last time this was asked.
    pub fn take_disk_full(&self) -> bool {
        self.disk_full.swap(false, Ordering::Relaxed)
    }

    /// How many errors clients have had.
    pub fn client_errors(&self) -> u64 {
        self.client_errors.load(Ordering::Relaxed)
    }

    /// The last fatal thing that PostgreSQL's own processes said.
    pub fn last_fatal(&self) -> Option<String> {
        self.last
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clone()
    }

    /// A new start: what was said before no longer explains anything.
    pub fn clear_fatal(&self) {
        *self.last.lock().unwrap_or_else(PoisonError::into_inner) = None;
        *self.reason.lock().unwrap_or_else(PoisonError::into_inner) = None;
    }

    fn note(&self, record: &Record<'_>) {
        // A client's own sort may fill its share, and SQL can raise any code: only what ends the server counts.
        let matters = own_process(record.backend) || record.severity == "PANIC";
        if matters && (record.code == "53100" || record.text.contains("No space left on device")) {
            self.disk_full.store(true, Ordering::Relaxed);
        }
        if !own_process(record.backend) {
            return;
        }
        // These words are the upstream's, passed on by the receiver; PostgreSQL has no code for them.
        let gone = (record.text.contains("requested WAL segment")
            && record.text.contains("has already been removed"))
            || record
                .text
                .contains("can no longer get changes from replication slot")
            || record
                .text
                .contains("can no longer access replication slot")
            || record
                .text
                .contains("cannot read from physical replication slot")
            || record.text.contains("cannot read from replication slot");
        if record.backend == "walreceiver" && gone {
            *self.wal_gone.lock().unwrap_or_else(PoisonError::into_inner) = Some(Instant::now());
        }
        let text: String = record.text.chars().take(200).collect();
        // "configuration file … contains errors" says what the line before it explains.
        if record.severity == "LOG" && record.code != "00000" {
            *self.reason.lock().unwrap_or_else(PoisonError::into_inner) = Some(text);
        } else if matches!(record.severity, "FATAL" | "PANIC") {
            let reason = self
                .reason
                .lock()
                .unwrap_or_else(PoisonError::into_inner)
                .take();
            let text = match reason {
                Some(reason) => format!("{text} ({reason})"),
                None => text,
            };
            *self.last.lock().unwrap_or_else(PoisonError::into_inner) = Some(text);
        }
    }
}

/// One record of PostgreSQL's log.
#[derive(Debug, PartialEq, Eq)]
struct Record<'a> {
    pid: &'a str,
    code: &'a str,
    backend: &'a str,
    severity: &'a str,
    text: &'a str,
}

/// Reads a line that begins with `settings::LOG_LINE_PREFIX`.
fn parse(line: &str) -> Option<Record<'_>> {
    let rest = line.strip_prefix("domicile ")?;
    let (pid, rest) = rest.split_once(' ')?;
    let (code, rest) = rest.split_once(' ')?;
    let (backend, rest) = rest.strip_prefix('[')?.split_once("] ")?;
    let (severity, text) = rest.split_once(':')?;
    (pid.bytes().all(|b| b.is_ascii_digit()) && code.len() == 5).then_some(Record {
        pid,
        code,
        backend,
        severity,
        text: text.trim_start(),
    })
}

/// Whether a process speaks for PostgreSQL, and not for a client's statement, a function in an index, or a
/// decoding plug-in, any of which can put a row's values into words.
fn own_process(backend: &str) -> bool {
    matches!(
        backend,
        "postmaster"
            | "startup"
            | "walreceiver"
            | "checkpointer"
            | "walwriter"
            | "background writer"
            | "archiver"
            | "logger"
            | "autovacuum launcher"
            | "walsummarizer"
            | "slotsync worker"
            | "io worker"
    )
}

/// Reads to the end of PostgreSQL's standard error.
pub async fn relay(from: impl AsyncRead + Unpin, signs: Arc<Signs>) {
    let mut reader = BufReader::with_capacity(4 << 10, from);
    let mut line = Vec::with_capacity(256);
    let mut budget = Budget::of(CLIENT_LINES_PER_SECOND);
    let mut receivers = Budget::of(RECEIVER_LINES_PER_SECOND);
    // Whether lines that continue a record may be passed on.
    let mut open = false;
    // Until PostgreSQL's own log begins, what comes is the loader's. Later it can be a dump of memory
    // contexts, which quotes statements.
    let mut begun = false;
    while let Ok(true) = read_line(&mut reader, &mut line).await {
        let text = String::from_utf8_lossy(&line);
        if let Some(rest) = text.strip_prefix('\t') {
            if open {
                info!(target: "postgres", "{rest}");
            }
            continue;
        }
        match parse(&text) {
            Some(record) => {
                begun = true;
                signs.note(&record);
                open = own_process(record.backend);
                if record.backend == "walreceiver" && !receivers.take() {
                    open = false;
                } else if open {
                    emit(&record, record.text);
                } else {
                    on_behalf_of_a_client(&record, &signs, &mut budget);
                }
            }
            None => {
                open = false;
                if !begun && !text.trim().is_empty() {
                    warn!(target: "postgres", "{text}");
                }
            }
        }
    }
}

fn on_behalf_of_a_client(record: &Record<'_>, signs: &Signs, budget: &mut Budget) {
    if !matches!(record.severity, "WARNING" | "ERROR" | "FATAL" | "PANIC") {
        return;
    }
    signs.client_errors.fetch_add(1, Ordering::Relaxed);
    // A panic takes the server down; without its words nobody could say why. It speaks of files and pages.
    if record.severity == "PANIC" {
        emit(record, record.text);
    } else if budget.take() {
        let suppressed = std::mem::take(&mut budget.suppressed);
        warn!(target: "postgres", pid = record.pid, code = record.code, backend = record.backend,
            severity = record.severity, suppressed, "a client's statement or connection failed");
    } else {
        budget.suppressed += 1;
    }
}

fn emit(r: &Record<'_>, text: &str) {
    let (pid, code, backend) = (r.pid, r.code, r.backend);
    match r.severity {
        "PANIC" | "FATAL" | "ERROR" => {
            error!(target: "postgres", pid, code, backend, severity = r.severity, "{text}");
        }
        "WARNING" => warn!(target: "postgres", pid, code, backend, "{text}"),
        // Again and again, as long as a standby has no upstream.
        "LOG" if text.starts_with("waiting for WAL to become available") => {
            debug!(target: "postgres", pid, code, backend, "{text}");
        }
        "LOG" | "INFO" | "NOTICE" => info!(target: "postgres", pid, code, backend, "{text}"),
        _ => debug!(target: "postgres", pid, code, backend, "{text}"),
    }
}

struct Budget {
    per_second: u32,
    second: Option<Instant>,
    left: u32,
    suppressed: u64,
}

impl Budget {
    fn of(per_second: u32) -> Self {
        Self {
            per_second,
            second: None,
            left: 0,
            suppressed: 0,
        }
    }

    fn take(&mut self) -> bool {
        if self
            .second
            .is_none_or(|s| s.elapsed() >= Duration::from_secs(1))
        {
            self.second = Some(Instant::now());
            self.left = self.per_second;
        }
        let granted = self.left > 0;
        self.left = self.left.saturating_sub(1);
        granted
    }
}

/// Reads a line without its end into `line`; false at the end of the stream. What goes beyond the limit is
/// read and dropped, so that a writer of endless lines costs no memory.
async fn read_line(
    reader: &mut (impl tokio::io::AsyncBufRead + Unpin),
    line: &mut Vec<u8>,
) -> std::io::Result<bool> {
    line.clear();
    let mut first = true;
    loop {
        let room = (LINE_MAX - line.len().min(LINE_MAX)) as u64;
        let mut dropped = Vec::new();
        let (read, ended) = if room > 0 {
            let n = (&mut *reader).take(room).read_until(b'\n', line).await?;
            (n, line.last() == Some(&b'\n'))
        } else {
            let n = (&mut *reader)
                .take(LINE_MAX as u64)
                .read_until(b'\n', &mut dropped)
                .await?;
            (n, dropped.last() == Some(&b'\n'))
        };
        if read == 0 {
            return Ok(!first);
        }
        first = false;
        if ended {
            if line.last() == Some(&b'\n') {
                line.pop();
            }
            return Ok(true);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn records() {
        let r = parse("domicile 71 28P01 [client backend] FATAL:  password authentication failed")
            .unwrap();
        assert_eq!(
            (r.pid, r.code, r.backend, r.severity),
            ("71", "28P01", "client backend", "FATAL")
        );
        assert_eq!(r.text, "password authentication failed");
        assert_eq!(parse("\tdomicile 71 28P01 [x] LOG:  y"), None);
        assert_eq!(parse("libpq.so.5: cannot open"), None);
    }

    #[tokio::test]
    async fn signs_come_from_own_processes_only() {
        let signs = Arc::new(Signs::default());
        let forged = "domicile 1 00000 [client backend] LOG:  FATAL: requested WAL segment 1 has already \
                      been removed\n\tdomicile 2 08P01 [walreceiver] FATAL:  requested WAL segment 1 has \
                      already been removed\n";
        relay(forged.as_bytes(), signs.clone()).await;
        assert!(!signs.wal_gone() && signs.last_fatal().is_none());
        let real = "domicile 2 08P01 [walreceiver] FATAL:  could not receive data from WAL stream: ERROR:  \
                    requested WAL segment 000000010000000000000002 has already been removed\n";
        relay(real.as_bytes(), signs.clone()).await;
        assert!(signs.wal_gone() && signs.last_fatal().is_some());
        let explained = "domicile 2 22023 [postmaster] LOG:  invalid value for parameter\n\
                         domicile 2 F0000 [postmaster] FATAL:  configuration file contains errors\n";
        relay(explained.as_bytes(), signs.clone()).await;
        assert_eq!(
            signs.last_fatal().unwrap(),
            "configuration file contains errors (invalid value for parameter)"
        );
        relay(
            "domicile 3 53100 [checkpointer] PANIC:  could not write\n".as_bytes(),
            signs.clone(),
        )
        .await;
        assert!(signs.take_disk_full() && !signs.take_disk_full());
    }

    #[tokio::test]
    async fn a_long_line_is_cut_and_the_next_is_whole() {
        let text = format!("{}\nnext\nlast", "x".repeat(3 * LINE_MAX));
        let mut reader = BufReader::with_capacity(64, text.as_bytes());
        let mut line = Vec::new();
        assert!(read_line(&mut reader, &mut line).await.unwrap());
        assert_eq!(line.len(), LINE_MAX);
        for expected in ["next", "last"] {
            assert!(read_line(&mut reader, &mut line).await.unwrap());
            assert_eq!(line, expected.as_bytes());
        }
        assert!(!read_line(&mut reader, &mut line).await.unwrap());
    }
}
