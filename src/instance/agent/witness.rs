//! The witness, asked: a voter that is an object in the API server, and acts through whoever asks it.
//!
//! Owns the requests to it, one round at a time, in a task of its own: read the object, let the protocol say what it
//! answers, write it back on the condition that nobody else has, and only then hand the answers on. And this
//! instance's own watch over how long the primary has been silent there.
//! Never: waits longer than a bound for the API server, which then is a voter that doesn't answer; answers for an
//! object of another uid; takes content that it can't read for a voter that has promised nothing.

use std::collections::BTreeMap;
use std::future::Future;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use anyhow::{Context as _, bail};
use tokio::sync::{Notify, mpsc};
use tokio::task::JoinHandle;
use tokio::time::{Instant, sleep_until, timeout};
use tracing::debug;

use super::names;
use crate::api::names::WITNESS_KEY;
use crate::failover::{Message, Millis, Register, Term, Watch};
use crate::instance::clock::boottime_ms;
use crate::instance::store::Shelf;

/// One call to the API server.
const CALL: Duration = Duration::from_secs(1);
/// How often a round begins again because somebody else wrote in between.
const TRIES: u32 = 4;
/// After a round that failed: an API server in trouble isn't helped by haste.
const AFTER_FAILURE: Duration = Duration::from_millis(50);

/// What the task says.
#[derive(Clone, Debug, PartialEq)]
pub enum Said {
    /// The voter that the object is now; none if there is no object.
    Seen(Option<String>),
    /// An answer, written down if it had to be.
    Answer {
        /// The witness.
        from: String,
        /// What it says.
        message: Message<String>,
    },
    /// Why it can't be asked; none once it can.
    Trouble(Option<String>),
}

/// What this instance knows, for whoever acts as the witness.
#[derive(Clone, Copy, Debug, Default)]
pub struct Facts {
    /// Silence after which a primary counts as dead.
    pub detection: Millis,
    /// The primary of this term is known to be down.
    pub dead: Option<Term>,
}

/// What is to be asked in the next round. Of heartbeats, and of everything else, only the newest: each is asked
/// again as long as it matters, and an older one never does.
#[derive(Default)]
struct Pending {
    messages: BTreeMap<(String, bool), Message<String>>,
    look: bool,
}

impl Pending {
    fn is_empty(&self) -> bool {
        self.messages.is_empty() && !self.look
    }

    /// A question that changes nothing is asked no more often than the pace; it would be the same answer.
    fn patient(&self) -> bool {
        self.messages
            .values()
            .all(|m| matches!(m, Message::PreVote { .. }))
    }
}

#[derive(Default)]
struct Shared {
    state: Mutex<(Pending, Facts)>,
    wake: Notify,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, (Pending, Facts)> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The way to the witness.
pub struct Witness {
    shared: Arc<Shared>,
    said: mpsc::UnboundedReceiver<Said>,
    task: JoinHandle<()>,
}

impl Drop for Witness {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl Witness {
    /// Begins; `me` is who asks.
    #[must_use]
    pub fn start(me: String, shelf: Arc<dyn Shelf>) -> Self {
        let shared = Arc::<Shared>::default();
        let (say, said) = mpsc::unbounded_channel();
        let rounds = Rounds {
            me,
            shelf,
            shared: shared.clone(),
            say,
            watch: Watch::default(),
            seen: None,
            trouble: None,
        };
        Self {
            shared,
            said,
            task: tokio::spawn(rounds.run()),
        }
    }

    /// Sends it a message; answered by [`Said::Answer`], or not.
    pub fn ask(&self, to: String, message: Message<String>) {
        let beat = match message {
            Message::Heartbeat { .. } => true,
            Message::PreVote { .. } | Message::RequestVote { .. } | Message::Accept { .. } => false,
            // It has no mind to tell anything to.
            _ => return,
        };
        self.shared.lock().0.messages.insert((to, beat), message);
        self.shared.wake.notify_one();
    }

    /// Has it looked at: [`Said::Seen`], and a beginning for the watch.
    pub fn look(&self) {
        self.shared.lock().0.look = true;
        self.shared.wake.notify_one();
    }

    /// What this instance knows now.
    pub fn brief(&self, facts: Facts) {
        self.shared.lock().1 = facts;
    }

    /// What it says next.
    pub async fn said(&mut self) -> Said {
        match self.said.recv().await {
            Some(said) => said,
            None => std::future::pending().await,
        }
    }
}

struct Rounds {
    me: String,
    shelf: Arc<dyn Shelf>,
    shared: Arc<Shared>,
    say: mpsc::UnboundedSender<Said>,
    watch: Watch,
    seen: Option<Option<String>>,
    trouble: Option<String>,
}

impl Rounds {
    async fn run(mut self) {
        let mut last: Option<Instant> = None;
        loop {
            self.due(last).await;
            let pending = std::mem::take(&mut self.shared.lock().0);
            let done = self.round(&pending).await;
            last = Some(Instant::now());
            match done {
                Ok(()) => self.troubled(None),
                Err(e) => {
                    debug!("the witness doesn't answer: {e:#}");
                    self.troubled(Some(format!("{e:#}").chars().take(200).collect()));
                    tokio::time::sleep(AFTER_FAILURE).await;
                }
            }
        }
    }

    /// Until there is something to ask, and it's time to.
    async fn due(&self, last: Option<Instant>) {
        loop {
            let woken = self.shared.wake.notified();
            let pause = {
                let state = self.shared.lock();
                let (pending, facts) = &*state;
                let configured = Duration::from_millis(facts.detection / 24);
                (!pending.is_empty()).then(|| {
                    // Who knows the primary dead needs no second look, and asks at once.
                    let looks = pending.messages.is_empty();
                    let patient = looks || (pending.patient() && facts.dead.is_none());
                    last.filter(|_| patient)
                        .map_or_else(Instant::now, |at| at + configured)
                })
            };
            match pause {
                Some(at) if at <= Instant::now() => return,
                Some(at) => tokio::select! {
                    () = woken => {}
                    () = sleep_until(at) => {}
                },
                None => woken.await,
            }
        }
    }

    fn troubled(&mut self, trouble: Option<String>) {
        if self.trouble != trouble {
            self.trouble.clone_from(&trouble);
            let _ = self.say.send(Said::Trouble(trouble));
        }
    }

    fn saw(&mut self, voter: Option<String>) {
        if self.seen.as_ref() != Some(&voter) {
            // Another object is another voter: what was seen of the one before says nothing.
            self.watch = Watch::default();
        }
        self.seen = Some(voter.clone());
        let _ = self.say.send(Said::Seen(voter));
    }

    /// Reads, answers, writes; what was written in between by somebody else is read first.
    async fn round(&mut self, pending: &Pending) -> anyhow::Result<()> {
        for _ in 0..TRIES {
            let asked = boottime_ms();
            let found = within("read", self.shelf.read()).await?;
            let Some(mut object) = found else {
                self.saw(None);
                bail!("its object isn't there");
            };
            let uid = object.metadata.uid.clone().context("it has no uid")?;
            let voter = names::witness(&uid);
            self.saw(Some(voter.clone()));
            let text = object.data.as_ref().and_then(|d| d.get(WITNESS_KEY));
            let old = register(&voter, text.map(String::as_str))?;
            self.watch.look(boottime_ms(), old.beat);
            let facts = self.shared.lock().1;
            let term = old.configuration.as_ref().map_or(0, |c| c.term);
            let silent = self.watch.silent(asked, facts.detection) || facts.dead == Some(term);
            let mut new = old.clone();
            let answers: Vec<Message<String>> = pending
                .messages
                .iter()
                .filter(|((to, _), _)| *to == voter)
                .filter_map(|(_, message)| new.answer(silent, &self.me, message))
                .collect();
            if new != old {
                let text = serde_json::to_string(&new)?;
                object
                    .data
                    .get_or_insert_default()
                    .insert(WITNESS_KEY.to_owned(), text);
                if !within("write", self.shelf.replace(object)).await? {
                    continue;
                }
            }
            for message in answers {
                let from = voter.clone();
                let _ = self.say.send(Said::Answer { from, message });
            }
            return Ok(());
        }
        bail!("its object keeps changing")
    }
}

async fn within<T>(
    what: &'static str,
    call: impl Future<Output = anyhow::Result<T>>,
) -> anyhow::Result<T> {
    timeout(CALL, call)
        .await
        .with_context(|| format!("can't {what} its object: the API server doesn't answer"))?
        .with_context(|| format!("can't {what} its object in the API server"))
}

/// What the object holds. One that is empty, or holds what another object held (brought back from a copy), is a
/// voter that has promised nothing yet.
fn register(voter: &str, text: Option<&str>) -> anyhow::Result<Register<String>> {
    let new = || Register::new(voter.to_owned());
    let Some(text) = text.filter(|t| !t.is_empty()) else {
        return Ok(new());
    };
    let register: Register<String> = serde_json::from_str(text).context(
        "its content can't be read, so nobody knows what it has promised: delete the ConfigMap, and a new witness \
         takes its place",
    )?;
    Ok(if register.me == voter {
        register
    } else {
        new()
    })
}

#[cfg(test)]
mod tests;
