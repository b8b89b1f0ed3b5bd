//! Files of several timelines for the same stretch of the log, of which PostgreSQL would read one that is too short.
//!
//! A standby that goes over to a new timeline streams the segment in which the timelines part from that segment's
//! beginning, into a file of the new timeline, although the old one's file has the same bytes. If it stops before it has
//! caught up with itself, PostgreSQL prefers the new file when it starts again, finds less log in it than it has
//! replayed, and never answers; or answers, and has forgotten the end of what it acknowledged. (How a standby chooses:
//! `XLogFileReadAnyTLI`, and where it streams from: `RequestXLogStreaming`, in PostgreSQL's source.)
//!
//! Owns taking such a file away before PostgreSQL starts. Never takes one away unless an older file of the same segment
//! holds more of the same history: one that goes on behind the place where the timelines part holds another history.
//! Never makes sure that nothing of the last PostgreSQL lives, which its caller must: a receiver that hung would go on
//! writing, and acknowledging, what is in no folder any more.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::time::Duration;

use super::agent::wal;
use super::files;
use super::programs::{self, Programs};
use super::reaper::Children;
use crate::failover::Lsn;

/// How long reading one file of the log may take.
const LIMIT: Duration = Duration::from_secs(60);
/// In how many segments partings are looked at, the newest first: a standby that was away for several failovers goes over
/// to one timeline after the other.
const PARTINGS: usize = 4;

/// A file of a segment.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Piece {
    timeline: u32,
    /// Where its timeline is left for the next one of the history; none for the newest.
    left: Option<Lsn>,
    /// Behind its last whole record.
    end: Lsn,
}

/// Which files are to go, of pieces from the newest timeline to the oldest.
fn too_short(pieces: &[Piece]) -> Vec<u32> {
    let foreign = |p: &Piece| p.left.is_some_and(|left| p.end > left);
    let best = pieces.iter().map(|p| p.end).max();
    let Some(best) = best.filter(|_| !pieces.iter().any(foreign)) else {
        return Vec::new();
    };
    // PostgreSQL reads the newest that is there.
    let shorter = pieces.iter().take_while(|p| p.end < best);
    shorter.map(|p| p.timeline).collect()
}

/// Takes away what would be read instead of a longer file. The timelines whose file went.
///
/// # Errors
/// In words, if the log can't be read or a file can't be removed; nothing that matters is lost then.
pub async fn clear(
    programs: &Programs,
    data: &Path,
    children: &Children,
) -> Result<Vec<u32>, String> {
    let folder = data.join("pg_wal");
    let Some((newest, history)) = newest(&folder)? else {
        return Ok(Vec::new());
    };
    let Some(size) = wal::segment_size(&folder) else {
        return Ok(Vec::new());
    };
    let partings: BTreeSet<Lsn> = history.iter().map(|(_, at)| at - at % size).collect();
    let mut gone = Vec::new();
    for start in partings.into_iter().rev().take(PARTINGS) {
        let path = |timeline| folder.join(wal::segment_name(timeline, start, size));
        let next = |timeline| folder.join(wal::segment_name(timeline, start + size, size));
        let older = history.iter().rev().map(|(t, at)| (*t, Some(*at)));
        let all = std::iter::once((newest, None)).chain(older);
        let there: Vec<(u32, Option<Lsn>)> = all.filter(|(t, _)| path(*t).exists()).collect();
        if there.len() < 2 {
            continue;
        }
        let mut pieces: Vec<Piece> = Vec::new();
        for (timeline, left) in there {
            // What was left before the end of a newer file has nothing to add to it.
            let longest = pieces.iter().map(|p| p.end).max();
            if left.is_some_and(|left| longest.is_some_and(|end| left <= end)) {
                break;
            }
            // A record that begins before the place where the timeline was left may end in the next file.
            let further = Some(next(timeline)).filter(|f| left.is_some() && f.exists());
            let files = [Some(path(timeline)), further];
            let Some(end) = end(programs, files.iter().flatten(), start, children).await? else {
                pieces.clear();
                break;
            };
            pieces.push(Piece {
                timeline,
                left,
                end,
            });
        }
        for timeline in too_short(&pieces) {
            let file = path(timeline);
            std::fs::remove_file(&file)
                .map_err(|e| format!("can't remove {}: {e}", file.display()))?;
            gone.push(timeline);
        }
    }
    if !gone.is_empty() {
        files::sync_parent(&folder.join("0"))
            .map_err(|e| format!("can't sync {}: {e}", folder.display()))?;
    }
    Ok(gone)
}

/// The newest timeline, and those before it.
fn newest(folder: &Path) -> Result<Option<(u32, wal::Left)>, String> {
    let entries = std::fs::read_dir(folder).map_err(|e| format!("can't read pg_wal: {e}"))?;
    let names = entries
        .flatten()
        .filter_map(|e| e.file_name().into_string().ok());
    let timelines = names.filter_map(|name| {
        let digits = name.strip_suffix(".history")?;
        u32::from_str_radix(digits, 16).ok()
    });
    let Some(newest) = timelines.max() else {
        return Ok(None);
    };
    let history = wal::history(folder, newest)
        .ok_or_else(|| format!("can't understand the history of timeline {newest}"))?;
    Ok(Some((newest, history)))
}

/// Behind the last whole record of files of which the first begins at `start`; none if that can't be told.
async fn end(
    programs: &Programs,
    files: impl Iterator<Item = &PathBuf>,
    start: Lsn,
    children: &Children,
) -> Result<Option<Lsn>, String> {
    let mut command = programs::command(&programs.dir, "pg_waldump");
    command.arg("--stats").args(files);
    // It ends with an error wherever the log ends within the file.
    let said = programs::said(command, LIMIT, children).await?;
    if let Some(end) = parse_stats(&said.0) {
        return Ok(Some(end));
    }
    let nothing = said.1.contains("could not find a valid record")
        // Of a file of zeroes.
        || said.1.contains("WAL segment size");
    Ok(nothing.then_some(start))
}

fn parse_stats(text: &str) -> Option<Lsn> {
    let line = text
        .lines()
        .find_map(|l| l.strip_prefix("WAL statistics between "))?;
    let (_, end) = line.split_once(" and ")?;
    wal::parse_lsn(end.trim_end_matches(':'))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn piece(timeline: u32, left: Option<Lsn>, end: Lsn) -> Piece {
        Piece {
            timeline,
            left,
            end,
        }
    }

    #[test]
    fn a_file_goes_only_if_an_older_one_has_more_of_the_same_history() {
        // The usual: the new timeline's file reaches beyond the parting.
        assert!(too_short(&[piece(3, None, 120), piece(2, Some(100), 100)]).is_empty());
        // Stopped while it was copied.
        for end in [100, 90] {
            let both = [piece(3, None, 40), piece(2, Some(100), end)];
            assert_eq!(too_short(&both), [3]);
        }
        // Twice in a row.
        let twice = [
            piece(4, None, 40),
            piece(3, Some(100), 60),
            piece(2, Some(100), 100),
        ];
        assert_eq!(too_short(&twice), [4, 3]);
        // The older one went on where the newer timeline didn't: another history.
        assert!(too_short(&[piece(3, None, 40), piece(2, Some(100), 110)]).is_empty());
        assert!(too_short(&[]).is_empty());
        assert!(too_short(&[piece(3, None, 40)]).is_empty());
    }

    #[test]
    fn what_postgresql_says() {
        let stats = "WAL statistics between 0/5000028 and 0/501FB20:\nType   N\n";
        assert_eq!(parse_stats(stats), Some(0x501_FB20));
        assert_eq!(parse_stats(""), None);
    }

    proptest::proptest! {
        /// Whatever is there: what PostgreSQL reads then reaches as far as anything of its own history did.
        #[test]
        fn nothing_is_shortened(ends in proptest::collection::vec((0u64..50, 0u64..50), 1..5)) {
            let count = u32::try_from(ends.len()).unwrap();
            let pieces: Vec<Piece> = ends.iter().zip(0u32..).map(|((end, left), n)| {
                piece(count - n, (n > 0).then_some(*left), *end)
            }).collect();
            let gone = too_short(&pieces);
            let read = pieces.iter().find(|p| !gone.contains(&p.timeline));
            let foreign = |p: &Piece| p.left.is_some_and(|left| p.end > left);
            if !gone.is_empty() {
                let read = read.unwrap();
                proptest::prop_assert!(pieces.iter().filter(|p| gone.contains(&p.timeline)).all(|p| p.end < read.end));
                proptest::prop_assert!(!foreign(read));
            }
        }
    }
}
