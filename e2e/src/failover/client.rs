//! The clients: an application that writes, probes, and sessions inside a server's own pod.
//!
//! Owns their loops and nothing else: what they saw goes out as events, in the order of their times per client.
//! Never judges, never retries a row, never cancels (unless its spec says so).

use std::io::Write;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};
use tokio::sync::mpsc::{UnboundedReceiver, UnboundedSender, unbounded_channel};
use tokio::sync::oneshot;
use tokio::time::{Instant, sleep, sleep_until, timeout};

use super::event::{Event, Row, Who, now};
use super::probe;
use super::session::{Connector, Session};
use super::target::{Host, Target};

/// What one client process does.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Spec {
    /// The cluster.
    pub target: Target,
    /// Begins every key, so that runs don't take each other's rows for their own.
    pub run: String,
    /// An application that writes.
    #[serde(default)]
    pub writer: Option<Pace>,
    /// A fresh session to each host, again and again.
    #[serde(default)]
    pub probe: Option<Pace>,
    /// Two sessions to each host, one that commits and one that reads.
    #[serde(default)]
    pub inside: Option<Pace>,
    /// As `inside`, but what isn't acknowledged in time is cancelled, not dropped.
    #[serde(default)]
    pub cancelling: Option<Pace>,
}

/// How often, and how long something may take.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Pace {
    /// Milliseconds from one beginning to the next.
    pub every_ms: u64,
    /// Milliseconds after which the client gives up and drops its connection.
    pub limit_ms: u64,
}

impl Pace {
    /// The application: a row every 5 ms, a second for each.
    pub const WRITER: Pace = Pace {
        every_ms: 5,
        limit_ms: 1000,
    };
    /// The probes: one every 40 ms, a second for each.
    pub const PROBE: Pace = Pace {
        every_ms: 40,
        limit_ms: 1000,
    };
    /// Inside: a row and a read every 10 ms, a quarter of a second for each.
    pub const INSIDE: Pace = Pace {
        every_ms: 10,
        limit_ms: 250,
    };

    pub(super) fn every(self) -> Duration {
        Duration::from_millis(self.every_ms)
    }

    pub(super) fn limit(self) -> Duration {
        Duration::from_millis(self.limit_ms)
    }
}

/// A careful application waits this long before it tries all hosts again.
const BETWEEN_ROUNDS: Duration = Duration::from_millis(100);

/// Where events go, and what every client of this process knows.
#[derive(Clone)]
pub(super) struct Desk {
    pub(super) connector: Connector,
    events: UnboundedSender<Event>,
}

impl Desk {
    pub(super) fn tell(&self, event: Event) {
        // Nobody listens any more: the process is about to end.
        let _ = self.events.send(event);
    }

    fn session(&self, who: Who, host: &Host, why: Option<String>) -> Result<()> {
        self.tell(Event::Session {
            who,
            at: now()?,
            host: host.name.clone(),
            why,
        });
        Ok(())
    }
}

/// The keys of one client: its name, and a number that only rises.
#[derive(Clone)]
pub(super) struct Keys {
    who: Who,
    name: Arc<str>,
    next: Arc<AtomicU64>,
}

impl Keys {
    pub(super) fn new(who: Who, name: &str) -> Self {
        Self {
            who,
            name: name.into(),
            next: Arc::default(),
        }
    }
}

/// Commits one row and tells what became of it. Whether the session can be used again is the answer.
pub(super) async fn write(
    desk: &Desk,
    keys: &Keys,
    session: &Session,
    host: &Host,
    timeline: u32,
    limit: Duration,
) -> Result<bool> {
    let seq = keys.next.fetch_add(1, Ordering::SeqCst);
    let sql = format!(
        "insert into {} (writer, seq) values ('{}', {seq})",
        desk.connector.target().table,
        keys.name
    );
    let sent = now()?;
    let answer = timeout(limit, session.commit(&sql)).await;
    let row = Row {
        who: keys.who,
        writer: keys.name.to_string(),
        seq,
        sent,
        at: now()?,
        host: host.name.clone(),
        timeline,
    };
    Ok(match answer {
        Ok(Ok(warned)) => {
            desk.tell(Event::Acknowledged { row, warned });
            true
        }
        Ok(Err(e)) => {
            let why = format!("{e:#}");
            desk.tell(Event::Unknown { row, why });
            false
        }
        Err(_) => {
            let why = "no answer in time".to_owned();
            desk.tell(Event::Unknown { row, why });
            false
        }
    })
}

/// The application: one session with whoever is primary, as libpq finds it by a URI of several hosts.
async fn writer(desk: Desk, keys: Keys, pace: Pace) -> Result<()> {
    loop {
        for host in desk.connector.target().hosts.clone() {
            let limit = desk.connector.target().connect_timeout();
            let (session, timeline) = match desk.connector.open(&host, limit).await {
                Ok((session, identity)) => match identity.writable() {
                    Some(timeline) => (session, timeline),
                    None => {
                        session.close().await;
                        continue;
                    }
                },
                Err(e) => {
                    desk.session(Who::Writer, &host, Some(format!("{e:#}")))?;
                    continue;
                }
            };
            desk.session(Who::Writer, &host, None)?;
            let mut next = Instant::now();
            while write(&desk, &keys, &session, &host, timeline, pace.limit()).await? {
                next = (next + pace.every()).max(Instant::now());
                sleep_until(next).await;
            }
            // A session that failed says nothing about the next host: begin the list anew, as drivers do.
            break;
        }
        sleep(BETWEEN_ROUNDS).await;
    }
}

/// A session with one server that commits for as long as the server lets it.
async fn inside(desk: Desk, keys: Keys, host: Host, pace: Pace) -> Result<()> {
    loop {
        if let Ok((session, identity)) = desk.connector.open(&host, pace.limit()).await
            && let Some(timeline) = identity.timeline
        {
            while write(&desk, &keys, &session, &host, timeline, pace.limit()).await? {
                sleep(pace.every()).await;
            }
        }
        sleep(pace.every()).await;
    }
}

/// A session with one server that reads for as long as the server lets it.
async fn reader(desk: Desk, host: Host, pace: Pace) -> Result<()> {
    loop {
        if let Ok((session, _)) = desk.connector.open(&host, pace.limit()).await {
            loop {
                let sent = now()?;
                let Ok(Ok(identity)) = timeout(pace.limit(), session.identity()).await else {
                    break;
                };
                desk.tell(Event::Read {
                    who: Who::Inside,
                    sent,
                    at: now()?,
                    host: host.name.clone(),
                    timeline: identity.timeline,
                });
                sleep(pace.every()).await;
            }
        }
        sleep(pace.every()).await;
    }
}

/// As [`inside`], but what takes too long is cancelled, and the answer to that is waited for.
async fn cancelling(desk: Desk, keys: Keys, host: Host, pace: Pace) -> Result<()> {
    const PATIENCE: Duration = Duration::from_secs(2);
    loop {
        if let Ok((session, identity)) = desk.connector.open(&host, pace.limit()).await
            && let Some(timeline) = identity.timeline
        {
            let token = session.cancel_token();
            loop {
                let mut row =
                    std::pin::pin!(write(&desk, &keys, &session, &host, timeline, PATIENCE));
                let usable = match timeout(pace.limit(), &mut row).await {
                    Ok(usable) => usable?,
                    Err(_) => {
                        // The outcome shows in the answer to the row itself.
                        let _ = timeout(PATIENCE, desk.connector.cancel(&host, &token)).await;
                        row.await?
                    }
                };
                if !usable {
                    break;
                }
                sleep(pace.every()).await;
            }
        }
        sleep(pace.every()).await;
    }
}

/// Runs the clients of a spec until `end` comes; every event goes to `events`.
///
/// # Errors
/// If the spec can't be followed.
pub async fn run(
    spec: Spec,
    events: UnboundedSender<Event>,
    end: impl Future<Output = ()>,
) -> Result<()> {
    let desk = Desk {
        connector: Connector::new(spec.target)?,
        events,
    };
    let hosts = desk.connector.target().hosts.clone();
    let mut tasks = tokio::task::JoinSet::new();
    let name = |kind: &str| format!("{}/{kind}", spec.run);
    if let Some(pace) = spec.writer {
        let keys = Keys::new(Who::Writer, &name("writer"));
        tasks.spawn(writer(desk.clone(), keys, pace));
    }
    for host in hosts {
        let keys = |who, kind: &str| Keys::new(who, &name(&format!("{kind}-{}", host.name)));
        if let Some(pace) = spec.probe {
            let keys = keys(Who::Probe, "probe");
            tasks.spawn(probe::probes(desk.clone(), keys, host.clone(), pace));
        }
        if let Some(pace) = spec.inside {
            let keys = keys(Who::Inside, "inside");
            tasks.spawn(inside(desk.clone(), keys, host.clone(), pace));
            tasks.spawn(reader(desk.clone(), host.clone(), pace));
        }
        if let Some(pace) = spec.cancelling {
            let keys = keys(Who::Cancelling, "cancelling");
            tasks.spawn(cancelling(desk.clone(), keys, host.clone(), pace));
        }
    }
    let failed = async {
        while let Some(ended) = tasks.join_next().await {
            ended.context("a client")??;
        }
        anyhow::Ok(())
    };
    tokio::select! {
        failed = failed => failed,
        () = end => Ok(()),
    }?;
    tasks.shutdown().await;
    desk.tell(Event::End { at: now()? });
    Ok(())
}

/// The program `bench client`: the spec is the first line of standard input, an event a line goes to standard
/// output, and the end of the input is the end.
///
/// # Errors
/// If the spec can't be read or followed, or nobody reads what is written.
pub async fn serve() -> Result<()> {
    let mut line = String::new();
    std::io::stdin()
        .read_line(&mut line)
        .context("reading the spec from standard input")?;
    let spec: Spec = serde_json::from_str(&line).context("the spec on standard input")?;
    let (ended, end) = oneshot::channel();
    // Threads of their own: a runtime waits at its end for what blocks in it.
    std::thread::spawn(move || {
        // An error ends it as well: whoever started it is gone.
        let _ = std::io::copy(&mut std::io::stdin(), &mut std::io::sink());
        let _ = ended.send(());
    });
    let (sender, receiver) = unbounded_channel();
    let printer = std::thread::spawn(move || print(receiver));
    run(spec, sender, async {
        let _ = end.await;
    })
    .await?;
    match printer.join() {
        Ok(printed) => printed,
        Err(_) => anyhow::bail!("writing events failed"),
    }
}

fn print(mut events: UnboundedReceiver<Event>) -> Result<()> {
    let mut output = std::io::stdout().lock();
    while let Some(event) = events.blocking_recv() {
        let line = serde_json::to_string(&event)? + "\n";
        output
            .write_all(line.as_bytes())
            .context("writing an event")?;
    }
    output.flush().context("writing an event")
}
