//! PostgreSQL's frames, as far as a relay has to understand them: what a receiver asks, and the few answers that it can be
//! given here.
//!
//! Owns their form (PostgreSQL's documentation, "Message Formats" and "Streaming Replication Protocol"; the same in 15 to
//! 18). Never: makes room for more than [`LIMIT`], whatever a length says.

use std::io;

use bytes::{Buf as _, BufMut as _, Bytes, BytesMut};
use jiff::Timestamp;
use tokio::io::{AsyncRead, AsyncReadExt as _};

use crate::failover::Lsn;
use crate::instance::agent::wal;

/// The longest frame that is put together here; the stream itself isn't. The largest is a timeline's history.
pub const LIMIT: usize = 4 << 20;
/// How much of the log goes into one frame.
pub const CHUNK: usize = 128 << 10;

/// 2000-01-01, from which PostgreSQL counts, in microseconds of Unix time.
const EPOCH: i64 = 946_684_800_000_000;

/// A frame: what it is, and all of it as it came.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Frame(Bytes);

impl Frame {
    /// What it is.
    pub fn kind(&self) -> u8 {
        self.0.first().copied().unwrap_or_default()
    }

    /// Without its header.
    pub fn body(&self) -> &[u8] {
        self.0.get(5..).unwrap_or_default()
    }

    /// All of it.
    pub fn whole(&self) -> &[u8] {
        &self.0
    }

    /// An error's words.
    pub fn words(&self) -> String {
        let mut rest = self.body();
        while let Some((kind, tail)) = rest.split_first() {
            let (field, tail) = text(tail);
            if *kind == b'M' {
                return field.to_owned();
            }
            rest = tail;
        }
        "an error without words".to_owned()
    }
}

/// The text up to a zero, and what comes after it.
fn text(bytes: &[u8]) -> (&str, &[u8]) {
    let end = bytes.iter().position(|b| *b == 0).unwrap_or(bytes.len());
    let (text, rest) = bytes.split_at(end);
    (
        std::str::from_utf8(text).unwrap_or_default(),
        rest.get(1..).unwrap_or_default(),
    )
}

/// The next frame, or `None` at the end. May be given up and called again.
pub async fn next(
    stream: &mut (impl AsyncRead + Unpin),
    buffer: &mut BytesMut,
) -> io::Result<Option<Frame>> {
    while !whole(buffer, 1)? {
        if stream.read_buf(buffer).await? == 0 {
            return ended(buffer);
        }
    }
    let length = 1 + length(buffer, 1).unwrap_or_default();
    Ok(Some(Frame(buffer.split_to(length).freeze())))
}

/// The first packet of a client, which has no kind.
pub async fn greeting(
    stream: &mut (impl AsyncRead + Unpin),
    buffer: &mut BytesMut,
) -> io::Result<()> {
    while !whole(buffer, 0)? {
        if stream.read_buf(buffer).await? == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
    }
    buffer.advance(length(buffer, 0).unwrap_or_default());
    Ok(())
}

fn ended<T>(buffer: &BytesMut) -> io::Result<Option<T>> {
    if buffer.is_empty() {
        Ok(None)
    } else {
        Err(io::ErrorKind::UnexpectedEof.into())
    }
}

/// The length that stands at `at`, itself included.
fn length(buffer: &[u8], at: usize) -> Option<usize> {
    let field = buffer.get(at..)?.first_chunk::<4>()?;
    usize::try_from(u32::from_be_bytes(*field)).ok()
}

fn whole(buffer: &BytesMut, header: usize) -> io::Result<bool> {
    let Some(length) = length(buffer, header) else {
        return Ok(false);
    };
    if !(4..=LIMIT).contains(&length) {
        return Err(io::Error::new(
            io::ErrorKind::InvalidData,
            format!("a frame of {length} bytes; {LIMIT} are allowed"),
        ));
    }
    Ok(buffer.len() >= header + length)
}

/// What a receiver asks for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Command {
    /// Which database system, which timeline.
    Identify,
    /// A timeline's history.
    History(u32),
    /// The log from here on, of this timeline.
    Start {
        /// From where on.
        at: Lsn,
        /// Of which timeline.
        timeline: u32,
    },
    /// Something else.
    Other,
}

/// What a receiver's command asks for.
pub fn command(text: &str) -> Command {
    let mut words = text
        .trim_end_matches(['\0', ';'])
        .split_whitespace()
        .peekable();
    match words.next() {
        Some("IDENTIFY_SYSTEM") => Command::Identify,
        Some("TIMELINE_HISTORY") => words
            .next()
            .and_then(|n| n.parse().ok())
            .map_or(Command::Other, Command::History),
        Some("START_REPLICATION") => start(words).unwrap_or(Command::Other),
        _ => Command::Other,
    }
}

fn start<'a>(words: impl Iterator<Item = &'a str>) -> Option<Command> {
    let mut words = words.peekable();
    if words.next_if_eq(&"SLOT").is_some() {
        words.next()?;
    }
    let _ = words.next_if_eq(&"PHYSICAL");
    let at = wal::parse_lsn(words.next()?)?;
    if words.next()? != "TIMELINE" {
        return None;
    }
    let timeline = words.next()?.parse().ok()?;
    Some(Command::Start { at, timeline })
}

/// A command, as a client sends it.
pub fn query(command: &str) -> Bytes {
    let mut body = BytesMut::from(command);
    body.put_u8(0);
    frame(b'Q', &body)
}

/// A client's first packet: replication, as this user, under this name.
pub fn startup(user: &str, name: &str) -> Bytes {
    let mut body = BytesMut::new();
    body.put_u32(3 << 16);
    for (key, value) in [
        ("user", user),
        // Ignored by physical replication; a pooler or an old server wants one.
        ("database", "replication"),
        ("replication", "true"),
        ("application_name", name),
    ] {
        for word in [key, value] {
            body.put_slice(word.as_bytes());
            body.put_u8(0);
        }
    }
    body.put_u8(0);
    let mut all = BytesMut::new();
    all.put_u32(u32::try_from(body.len() + 4).unwrap_or(u32::MAX));
    all.put_slice(&body);
    all.freeze()
}

/// By which a client asks for TLS.
pub const TLS: [u8; 8] = [0, 0, 0, 8, 4, 210, 22, 47];

fn frame(kind: u8, body: &[u8]) -> Bytes {
    let mut all = BytesMut::with_capacity(5 + body.len());
    all.put_u8(kind);
    all.put_u32(u32::try_from(body.len() + 4).unwrap_or(u32::MAX));
    all.put_slice(body);
    all.freeze()
}

/// The answer to a client's greeting: it is let in, with these parameters, and may ask.
pub fn welcome(parameters: &[u8]) -> Bytes {
    let mut all = BytesMut::from(&frame(b'R', &[0; 4])[..]);
    all.put_slice(parameters);
    all.put_slice(&frame(b'Z', b"I"));
    all.freeze()
}

/// The log comes now.
pub fn copying() -> Bytes {
    frame(b'W', &[0; 3])
}

/// No more of the log.
pub fn copied() -> Bytes {
    frame(b'c', &[])
}

/// After it: the timeline ended at `at`, and `next` is what goes on there.
pub fn succeeded(next: u32, at: Lsn) -> Bytes {
    let mut columns = BytesMut::new();
    columns.put_u16(2);
    for (name, of, size) in [("next_tli", 20, 8), ("next_tli_startpos", 25, -1)] {
        columns.put_slice(name.as_bytes());
        columns.put_u8(0);
        columns.put_u32(0);
        columns.put_u16(0);
        columns.put_u32(of);
        columns.put_i16(size);
        columns.put_i32(-1);
        columns.put_u16(0);
    }
    let mut row = BytesMut::new();
    row.put_u16(2);
    for value in [next.to_string(), wal::show_lsn(at)] {
        row.put_u32(u32::try_from(value.len()).unwrap_or_default());
        row.put_slice(value.as_bytes());
    }
    let mut all = BytesMut::from(&frame(b'T', &columns)[..]);
    all.put_slice(&frame(b'D', &row));
    all.put_slice(&frame(b'C', b"START_STREAMING\0"));
    all.put_slice(&frame(b'C', b"START_REPLICATION\0"));
    all.put_slice(&frame(b'Z', b"I"));
    all.freeze()
}

/// A piece of the log from `at` on, of one that ends at `end`.
pub fn piece(at: Lsn, end: Lsn, bytes: &[u8]) -> Bytes {
    let mut body = BytesMut::with_capacity(25 + bytes.len());
    body.put_u8(b'w');
    body.put_u64(at);
    body.put_u64(end);
    body.put_i64(Timestamp::now().as_microsecond() - EPOCH);
    body.put_slice(bytes);
    frame(b'd', &body)
}

/// The first two columns of the only row of an answer: of a timeline's history its name and content, of a stream's end the
/// next timeline and where it begins.
pub fn row(answer: &[u8]) -> Option<(Vec<u8>, Vec<u8>)> {
    let mut rest = answer;
    while let Some((kind, tail)) = rest.split_first() {
        let length = length(tail, 0)?;
        let (body, after) = (tail.get(4..length)?, tail.get(length..)?);
        if *kind == b'D' {
            let (first, rest) = column(body.get(2..)?)?;
            let (second, _) = column(rest)?;
            return Some((first.to_vec(), second.to_vec()));
        }
        rest = after;
    }
    None
}

fn column(bytes: &[u8]) -> Option<(&[u8], &[u8])> {
    let length = length(bytes, 0).filter(|n| *n <= LIMIT)?;
    Some((bytes.get(4..4 + length)?, bytes.get(4 + length..)?))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn frames(mut bytes: &[u8]) -> Vec<Frame> {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .build()
            .unwrap();
        let mut buffer = BytesMut::new();
        let mut all = Vec::new();
        while let Some(frame) = runtime.block_on(next(&mut bytes, &mut buffer)).unwrap() {
            all.push(frame);
        }
        all
    }

    #[test]
    fn a_receivers_commands_are_understood() {
        let start = |at, timeline| Command::Start { at, timeline };
        for (text, is) in [
            ("IDENTIFY_SYSTEM\0", Command::Identify),
            ("TIMELINE_HISTORY 7", Command::History(7)),
            (
                "START_REPLICATION 1/3000000 TIMELINE 2",
                start(0x1_0300_0000, 2),
            ),
            (
                "START_REPLICATION SLOT \"s_2\" 0/4000000 TIMELINE 3\0",
                start(0x400_0000, 3),
            ),
            (
                "START_REPLICATION PHYSICAL 0/4000000 TIMELINE 3",
                start(0x400_0000, 3),
            ),
            ("START_REPLICATION 0/4000000", Command::Other),
            ("SHOW wal_segment_size", Command::Other),
            ("TIMELINE_HISTORY x", Command::Other),
            ("", Command::Other),
        ] {
            assert_eq!(command(text), is, "{text}");
        }
    }

    #[test]
    fn what_is_answered_here_is_whole_frames() {
        let kinds = |bytes: &[u8]| -> String {
            frames(bytes).iter().map(|f| char::from(f.kind())).collect()
        };
        let parameter = frame(b'S', b"server_version\x0017.2\0");
        assert_eq!(kinds(&welcome(&parameter)), "RSZ");
        assert_eq!(kinds(&succeeded(3, 0x300_0028)), "TDCCZ");
        assert_eq!(kinds(&[copying(), copied()].concat()), "Wc");
        let data = &frames(&piece(0x300_0000, 0x300_0028, b"abc"))[0];
        assert_eq!((data.kind(), data.body().len()), (b'd', 28));
        assert!(data.body().ends_with(b"abc"));
        // As the row of a history has its name and content.
        assert_eq!(
            row(&succeeded(3, 0x300_0028)),
            Some((b"3".to_vec(), b"0/3000028".to_vec()))
        );
        assert_eq!(row(&copied()), None);
        assert_eq!(row(b"D\0\0\0"), None);
    }

    #[test]
    fn a_length_is_not_believed() {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .build()
            .unwrap();
        for (wire, kind) in [
            (&b"Q\xff\xff\xff\xff"[..], io::ErrorKind::InvalidData),
            (b"Q\0\0\0\x03", io::ErrorKind::InvalidData),
            (b"Q\0\0\0\x09ab", io::ErrorKind::UnexpectedEof),
        ] {
            let mut wire = wire;
            let read = runtime.block_on(next(&mut wire, &mut BytesMut::new()));
            assert_eq!(read.unwrap_err().kind(), kind);
        }
        let error = frame(b'E', b"SFATAL\0C57P01\0Mterminating\0\0");
        assert_eq!(frames(&error)[0].words(), "terminating");
    }
}
