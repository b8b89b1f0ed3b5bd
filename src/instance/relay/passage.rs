//! One receiver on its way to its upstream.
//!
//! Owns what of the receiver's questions is answered here: nothing but what this copy has itself. Never: acknowledges;
//! sends a receiver anything that didn't come from the upstream, unless the upstream's log begins with what this copy has;
//! does so twice for one upstream, should it be refused.

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use anyhow::{Context as _, bail, ensure};
use bytes::BytesMut;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _, split};
use tokio::net::UnixStream;
use tokio::sync::watch;

use super::session::Session;
use super::wire::{self, Command};
use crate::failover::Lsn;
use crate::instance::agent::wal;

/// How long a receiver waits for its upstream to serve, before it is passed on as it is.
const PATIENCE: Duration = Duration::from_secs(5);

/// The end of a copy that is a beginning of its upstream's.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Level {
    /// Where it ends.
    pub at: Lsn,
    /// The timeline whose files hold what is before that, without a gap.
    pub timeline: u32,
    /// Whether the upstream begins an era, and with it a timeline, right there.
    pub begins: bool,
}

/// What there is to know of the way.
pub struct Way {
    /// Where the copy ends.
    pub level: Option<Level>,
    /// That was made use of.
    pub spent: AtomicBool,
    /// Nothing goes this way any more.
    pub closed: AtomicBool,
    /// The slot that the receiver uses.
    pub slot: String,
    /// The timeline under which the upstream serves, once it does.
    pub serves: watch::Receiver<Option<u32>>,
}

/// What was asked of the upstream before the receiver asked for it.
struct Ahead {
    timeline: u32,
    /// The answer to the question who it is.
    identity: Vec<u8>,
    /// And for its history.
    history: Vec<u8>,
    /// The timeline that it goes on from, and where.
    level: Level,
}

/// A receiver, its session with the upstream, and what they are at.
struct Passage<'a> {
    receiver: UnixStream,
    inbox: BytesMut,
    session: Session,
    way: &'a Way,
    data: &'a Path,
    ahead: Option<Ahead>,
}

/// Serves a receiver until one of the two ends.
///
/// # Errors
/// If they don't come together. The receiver is asked for again by its PostgreSQL.
pub async fn serve(
    receiver: UnixStream,
    session: Session,
    way: &Way,
    data: &Path,
) -> anyhow::Result<()> {
    let mut passage = Passage {
        receiver,
        inbox: BytesMut::new(),
        session,
        way,
        data,
        ahead: None,
    };
    wire::greeting(&mut passage.receiver, &mut passage.inbox).await?;
    let welcome = wire::welcome(&passage.session.parameters);
    passage.receiver.write_all(&welcome).await?;
    while let Some(frame) = wire::next(&mut passage.receiver, &mut passage.inbox).await? {
        match frame.kind() {
            b'Q' => {}
            b'X' => return Ok(()),
            // What a receiver still said of a stream that is over.
            _ => continue,
        }
        if way.closed.load(Ordering::SeqCst) {
            return Ok(());
        }
        let text = String::from_utf8_lossy(frame.body()).into_owned();
        if !passage.asked(text.trim_end_matches('\0')).await? {
            return Ok(());
        }
    }
    Ok(())
}

impl Passage<'_> {
    /// Answers a command. False: one of the two has ended.
    async fn asked(&mut self, text: &str) -> anyhow::Result<bool> {
        match (wire::command(text), &self.ahead) {
            (Command::Identify, None) => {
                if let Some((level, timeline)) = begins(self.way).await {
                    self.ask_ahead(level.at, timeline).await?;
                    self.ahead = Some(self.told(level, timeline).await?);
                    return self.identified().await;
                }
                self.passed(text).await
            }
            // It asks before each timeline.
            (Command::Identify, Some(_)) => self.identified().await,
            (Command::History(timeline), Some(known)) if timeline == known.timeline => {
                self.receiver.write_all(&known.history).await?;
                Ok(true)
            }
            // Its own timeline has ended where its copy does: there is nothing to send, nor a way to go for it.
            (Command::Start { at, timeline }, Some(known))
                if timeline == known.level.timeline && at <= known.level.at =>
            {
                let next = wire::succeeded(known.timeline, known.level.at);
                let ends = [wire::copying(), wire::copied()].concat();
                self.receiver.write_all(&ends).await?;
                while wire::next(&mut self.receiver, &mut self.inbox)
                    .await?
                    .context("the receiver ended")?
                    .kind()
                    != b'c'
                {}
                self.receiver.write_all(&next).await?;
                Ok(true)
            }
            (Command::Start { at, timeline }, Some(known))
                if timeline == known.timeline && at <= known.level.at =>
            {
                let level = known.level;
                self.ahead = None;
                let file = self.file(at, level).with_context(|| {
                    let (at, end) = (wal::show_lsn(at), wal::show_lsn(level.at));
                    format!("asks from {at} on, where {end} is the end")
                })?;
                self.receiver.write_all(&wire::copying()).await?;
                self.beginning(&file, at, level.at).await?;
                self.begun().await?;
                self.stream(timeline).await
            }
            (Command::Start { at, timeline }, None) => {
                // The rest of what it has the beginning of.
                let level = self
                    .way
                    .level
                    .filter(|level| level.timeline == timeline && at < level.at);
                match level.and_then(|level| Some((self.file(at, level)?, level.at))) {
                    Some((file, end)) if !self.way.spent.swap(true, Ordering::Relaxed) => {
                        self.session.ask(&[&self.start(end, timeline)]).await?;
                        self.receiver.write_all(&wire::copying()).await?;
                        self.beginning(&file, at, end).await?;
                        self.begun().await?;
                    }
                    _ => self.session.ask(&[text]).await?,
                }
                self.stream(timeline).await
            }
            (_, None) => self.passed(text).await,
            // The stream is on its way already, so nothing else can be asked. The next attempt goes without this.
            (other, Some(_)) => bail!("asks for {other:?}, and not for what was asked ahead"),
        }
    }

    async fn passed(&mut self, text: &str) -> anyhow::Result<bool> {
        self.session.ask(&[text]).await?;
        let answer = self.session.answer().await?;
        self.receiver.write_all(&answer).await?;
        Ok(true)
    }

    async fn identified(&mut self) -> anyhow::Result<bool> {
        let known = self.ahead.as_ref().context("nothing is known")?;
        self.receiver.write_all(&known.identity).await?;
        Ok(true)
    }

    fn start(&self, at: Lsn, timeline: u32) -> String {
        let slot = match self.way.slot.as_str() {
            "" => String::new(),
            slot => format!("SLOT \"{slot}\" "),
        };
        format!(
            "START_REPLICATION {slot}{} TIMELINE {timeline}",
            wal::show_lsn(at)
        )
    }

    /// Asks for everything that a receiver is going to ask for: one way there and back instead of four.
    async fn ask_ahead(&mut self, at: Lsn, timeline: u32) -> anyhow::Result<()> {
        let history = format!("TIMELINE_HISTORY {timeline}");
        let start = self.start(at, timeline);
        let all = ["IDENTIFY_SYSTEM", &history, &start];
        Ok(self.session.ask(&all).await?)
    }

    /// What came of it, but for the stream.
    async fn told(&mut self, level: Level, timeline: u32) -> anyhow::Result<Ahead> {
        let identity = self.session.answer().await?;
        let history = self.session.answer().await?;
        let (_, text) = wire::row(&history).context("it has no history of its timeline")?;
        let forks = wal::parse_history(&String::from_utf8_lossy(&text));
        let fork = forks.and_then(|mut f| f.pop()).context("no fork")?;
        // The protocol compares copies by the terms of who wrote them, and found this one a beginning of the upstream's. That
        // the upstream goes on exactly where this ends has to be PostgreSQL's own word.
        ensure!(
            fork == (level.timeline, level.at),
            "its timeline goes on from {} at {}, not from {} at {}",
            fork.0,
            wal::show_lsn(fork.1),
            level.timeline,
            wal::show_lsn(level.at)
        );
        Ok(Ahead {
            timeline,
            identity,
            history,
            level,
        })
    }

    /// The file of the log that begins at `at`, if the copy ends in it.
    fn file(&self, at: Lsn, end: Level) -> Option<PathBuf> {
        let folder = self.data.join("pg_wal");
        let size = wal::segment_size(&folder)?;
        let held = end.at.checked_sub(at)?;
        (at.is_multiple_of(size) && held <= size)
            .then(|| folder.join(wal::segment_name(end.timeline, at, size)))
    }

    /// A receiver wants a file of the log from its beginning, which is `at`: what the copy has of it is read here.
    async fn beginning(&mut self, path: &Path, mut at: Lsn, end: Lsn) -> anyhow::Result<()> {
        if at == end {
            return Ok(());
        }
        let name = path.display();
        let mut file = tokio::fs::File::open(path)
            .await
            .with_context(|| format!("can't open {name}"))?;
        let mut buffer = vec![0; wire::CHUNK];
        while at < end {
            let left = usize::try_from(end - at).unwrap_or(usize::MAX);
            let chunk = buffer.get_mut(..left.min(wire::CHUNK)).unwrap_or_default();
            file.read_exact(chunk).await?;
            // A file may have been another one before; what is left of that must not become a part of the log.
            ensure!(
                wal::in_place(chunk, at),
                "{name} isn't whole up to {}",
                wal::show_lsn(end)
            );
            self.receiver
                .write_all(&wire::piece(at, end, chunk))
                .await?;
            at += chunk.len() as u64;
        }
        Ok(())
    }

    /// The stream that was asked for has begun: the receiver knows that already.
    async fn begun(&mut self) -> anyhow::Result<()> {
        loop {
            let frame = self.session.frame().await?;
            match frame.kind() {
                b'W' => return Ok(()),
                b'S' | b'N' => {}
                _ => {
                    self.receiver.write_all(frame.whole()).await?;
                    bail!("the upstream doesn't begin: {}", frame.words());
                }
            }
        }
    }

    /// The log of `timeline`, and what is said of it, until the upstream has no more of it. False: one of the two has ended.
    async fn stream(&mut self, timeline: u32) -> anyhow::Result<bool> {
        let (session, inbox) = (&mut self.session, &mut self.inbox);
        let (mut from, mut to) = split(&mut session.stream);
        let (mut said, mut tell) = self.receiver.split();
        let mut over = false;
        loop {
            tokio::select! {
                frame = wire::next(&mut from, &mut session.buffer), if !over => {
                    let Some(frame) = frame? else { return Ok(false) };
                    tell.write_all(frame.whole()).await?;
                    over = frame.kind() == b'c';
                    if frame.kind() == b'E' {
                        return Ok(false);
                    }
                }
                frame = wire::next(&mut said, inbox) => {
                    let Some(frame) = frame? else { return Ok(false) };
                    if self.way.closed.load(Ordering::SeqCst) {
                        return Ok(false);
                    }
                    to.write_all(frame.whole()).await?;
                    to.flush().await?;
                    if frame.kind() == b'c' {
                        break;
                    }
                }
            }
        }
        drop((from, to));
        if !over {
            // The receiver doesn't want any more.
            return Ok(false);
        }
        let answer = self.session.answer().await?;
        let next = wire::row(&answer).and_then(|(next, at)| {
            let text = |bytes: Vec<u8>| String::from_utf8(bytes).ok();
            Some((
                text(next)?.parse::<u32>().ok()?,
                wal::parse_lsn(&text(at)?)?,
            ))
        });
        let Some((next, at)) = next else {
            self.receiver.write_all(&answer).await?;
            return Ok(true);
        };
        // What the upstream was promoted for, mostly: a commit waits for the rest.
        self.ask_ahead(at, next).await?;
        self.receiver.write_all(&answer).await?;
        let level = Level {
            at,
            timeline,
            begins: true,
        };
        self.ahead = Some(self.told(level, next).await?);
        Ok(true)
    }
}

/// Where the upstream's era begins and its timeline, if this copy ends there and that was not made use of before.
async fn begins(way: &Way) -> Option<(Level, u32)> {
    let level = way.level.filter(|level| level.begins)?;
    if way.spent.swap(true, Ordering::Relaxed) {
        return None;
    }
    let mut serves = way.serves.clone();
    let timeline = tokio::time::timeout(PATIENCE, serves.wait_for(Option::is_some)).await;
    let timeline = (*timeline.ok()?.ok()?)?;
    Some((level, timeline))
}
