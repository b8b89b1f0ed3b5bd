//! Where a database cluster's log ends after a clean stop, read from its files.
//!
//! Owns the few bytes of PostgreSQL's control file and log that say so; their layout is the same in PostgreSQL 15
//! to 18 (src/include/catalog/pg_control.h, access/xlogrecord.h, access/xlog_internal.h).
//! Never: trusts them after a crash, when the end is known only once PostgreSQL has recovered.

use std::fs::File;
use std::io::{Read as _, Seek as _, SeekFrom};
use std::path::Path;

use crate::failover::Lsn;
use crate::instance::files;

const SHUT_DOWN: u32 = 1;
const PAGE: u64 = 8192;

/// The end of the log, if the database cluster was stopped cleanly as a primary: right behind its last checkpoint.
#[must_use]
pub fn clean_end(data: &Path) -> Option<Lsn> {
    let control = files::read_bounded(&data.join("global/pg_control"), 64 << 10).ok()??;
    let u32_at = |at: usize| Some(u32::from_ne_bytes(*control.get(at..)?.first_chunk::<4>()?));
    let u64_at = |at: usize| Some(u64::from_ne_bytes(*control.get(at..)?.first_chunk::<8>()?));
    if u32_at(16)? != SHUT_DOWN {
        return None;
    }
    let checkpoint = u64_at(32)?;
    let timeline = u32_at(48)?;
    let wal = data.join("pg_wal");
    let segment = segment_size(&wal)?;
    let name = segment_name(timeline, checkpoint, segment);
    let mut file = File::open(wal.join(name)).ok()?;
    file.seek(SeekFrom::Start(checkpoint % segment)).ok()?;
    let mut length = [0; 4];
    file.read_exact(&mut length).ok()?;
    Some(record_end(
        checkpoint,
        u64::from(u32::from_ne_bytes(length)),
        segment,
    ))
}

/// The name of the log's file that holds `at`.
#[must_use]
pub fn segment_name(timeline: u32, at: Lsn, segment: u64) -> String {
    let number = at / segment;
    let per_id = 0x1_0000_0000 / segment;
    format!(
        "{timeline:08X}{:08X}{:08X}",
        number / per_id,
        number % per_id
    )
}

/// Every file of the log has the same size: that of the first that is found.
#[must_use]
pub fn segment_size(wal: &Path) -> Option<u64> {
    std::fs::read_dir(wal)
        .ok()?
        .flatten()
        .find(|e| {
            let name = e.file_name();
            name.len() == 24
                && name
                    .to_str()
                    .is_some_and(|n| n.bytes().all(|b| b.is_ascii_hexdigit()))
        })
        .and_then(|e| Some(e.metadata().ok()?.len()))
        .filter(|size| size.is_power_of_two() && *size >= PAGE)
}

/// Where a record of this length that begins at `start` ends: pages begin with a header, records are aligned.
fn record_end(start: Lsn, length: u64, segment: u64) -> Lsn {
    let mut at = start;
    let mut left = length;
    loop {
        let room = PAGE - at % PAGE;
        if left <= room {
            return (at + left).next_multiple_of(8);
        }
        left -= room;
        at += room;
        at += if at.is_multiple_of(segment) { 40 } else { 24 };
    }
}

/// Whether these bytes, which begin with a page, are what they should be at `at`: each page says where it is.
#[must_use]
pub fn in_place(bytes: &[u8], at: Lsn) -> bool {
    at.is_multiple_of(PAGE)
        && bytes
            .chunks(usize::try_from(PAGE).unwrap_or(usize::MAX))
            .zip((at..).step_by(usize::try_from(PAGE).unwrap_or(usize::MAX)))
            .all(|(page, at)| {
                let said = page.get(8..16).and_then(|b| b.first_chunk::<8>());
                // A page of which only the first bytes belong to the log has its header, too.
                said.is_none_or(|said| u64::from_ne_bytes(*said) == at)
            })
}

/// A position as PostgreSQL writes it.
#[must_use]
pub fn show_lsn(at: Lsn) -> String {
    format!("{:X}/{:X}", at >> 32, at & 0xFFFF_FFFF)
}

/// Reads a position that PostgreSQL wrote.
#[must_use]
pub fn parse_lsn(text: &str) -> Option<Lsn> {
    let (high, low) = text.split_once('/')?;
    let high = u64::from_str_radix(high, 16).ok()?;
    let low = u64::from_str_radix(low, 16).ok()?;
    (low <= 0xFFFF_FFFF && high <= 0xFFFF_FFFF).then_some((high << 32) | low)
}

/// The timelines before a timeline, each with where it was left for the next one; oldest first.
pub type Left = Vec<(u32, Lsn)>;

/// What a timeline's history file says. None if there is none, or not all of it can be understood: of a history with a
/// gap, nothing may be concluded.
#[must_use]
pub fn history(wal: &Path, timeline: u32) -> Option<Left> {
    let path = wal.join(format!("{timeline:08X}.history"));
    let bytes = files::read_bounded(&path, 1 << 20).ok()??;
    // Why a timeline was begun is in a person's words, in whatever encoding; only the positions matter.
    parse_history(&String::from_utf8_lossy(&bytes))
}

/// The same of its text.
#[must_use]
pub fn parse_history(text: &str) -> Option<Left> {
    let lines = text.lines().map(str::trim);
    lines
        .filter(|l| !l.is_empty() && !l.starts_with('#'))
        .map(|line| {
            let mut words = line.split_whitespace();
            Some((words.next()?.parse().ok()?, parse_lsn(words.next()?)?))
        })
        .collect()
}

/// Where `timeline` forked, from its history file.
#[must_use]
pub fn fork(data: &Path, timeline: u32) -> Option<Lsn> {
    let (_, at) = history(&data.join("pg_wal"), timeline)?.pop()?;
    Some(at)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_and_positions() {
        let segment = 16 << 20;
        assert_eq!(
            segment_name(2, 0x1_0300_0028, segment),
            "000000020000000100000003"
        );
        assert_eq!(parse_lsn("1/3000028"), Some(0x1_0300_0028));
        assert_eq!(parse_lsn("1"), None);
        assert_eq!(show_lsn(0x1_0300_0028), "1/3000028");
    }

    #[test]
    fn a_page_says_where_it_is() {
        let page = |at: u64| {
            let mut page = vec![0; 8192];
            page[8..16].copy_from_slice(&at.to_ne_bytes());
            page
        };
        let two = [page(0x300_0000), page(0x300_2000)].concat();
        assert!(in_place(&two, 0x300_0000));
        assert!(in_place(&two[..8192 + 40], 0x300_0000));
        assert!(!in_place(&two, 0x400_0000));
        assert!(!in_place(&two[100..], 0x300_0064));
        let recycled = [page(0x300_0000), page(0x100_2000)].concat();
        assert!(!in_place(&recycled, 0x300_0000));
    }

    #[test]
    fn a_history_is_understood_whole_or_not_at_all() {
        let text = "1\t0/1B86FA8\tno recovery target specified\n\n# x\n2\t1/5055E40\tno\n";
        let all = vec![(1, 0x1B8_6FA8), (2, 0x1_0505_5E40)];
        assert_eq!(parse_history(text), Some(all));
        for half in [
            "1\t0/1B86FA8\tno\n2",
            "1\t0/1B86FA8\tno\n2\tx\tno",
            "y\t0/1\tno",
        ] {
            assert_eq!(parse_history(half), None, "{half}");
        }
        assert_eq!(parse_history(""), Some(Vec::new()));
    }

    #[test]
    fn a_record_ends_behind_the_headers_it_crosses() {
        let segment = 16 << 20;
        assert_eq!(record_end(0x300_0028, 114, segment), 0x300_00A0);
        // Eight bytes of room, then a page's header.
        assert_eq!(record_end(0x300_1FF8, 114, segment), 0x300_2000 + 24 + 112);
        assert_eq!(record_end(0x3FF_FFF8, 114, segment), 0x400_0000 + 40 + 112);
    }
}
