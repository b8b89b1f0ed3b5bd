//! `make break`: cuts the primary's node off before one's eyes, and lets it come home.
//!
//! Owns what is shown. Mends the cut and removes its table whatever happens, also when it is interrupted.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use serde_json::Value;
use tokio::signal::unix::{SignalKind, signal};
use tokio::time::{Instant, interval};

use super::check;
use super::client::{Pace, Spec};
use super::event::{Event, now, seconds};
use super::ledger::Ledger;
use super::process::{Process, named};
use super::store::{self, Instance, Status, ask, healthy};
use super::target::Target;
use crate::faults::Cut;
use crate::harness::Scope;
use crate::net;
use crate::testbed::TestBed;
use crate::topology::Node;

/// The cut lasts at least this long, so that one can see what the instance beyond it does.
const CUT: Duration = Duration::from_secs(8);
/// If nobody else is primary after this, the cut ends all the same.
const NOBODY: Duration = Duration::from_secs(30);
/// How long the old primary may take to come home.
const HOME: Duration = Duration::from_secs(90);
/// How often instances are asked.
const LOOK: Duration = Duration::from_millis(250);
/// A silence of the writer longer than this is shown.
const SILENCE: f64 = 0.5;

/// What is broken.
#[derive(Clone, Debug)]
pub struct Show {
    /// The test bed.
    pub bed: TestBed,
    /// The store's namespace.
    pub scope: Scope,
    /// The store.
    pub store: String,
    /// The program `bench`.
    pub program: PathBuf,
}

/// What an instance says, as far as it is shown.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Words(String);

impl Words {
    fn of(said: &Result<Value>) -> Self {
        let Ok(said) = said else {
            return Self("doesn't answer".to_owned());
        };
        let text = |key: &str| said[key].as_str().unwrap_or("-").to_owned();
        let ready = if said["ready"] == true {
            "ready"
        } else {
            "not ready"
        };
        let message = match said["message"].as_str() {
            Some(message) => format!("  \"{message}\""),
            None => String::new(),
        };
        Self(format!(
            "{:<9} {ready:<9}  term {}  primary {}{message}",
            text("role"),
            said["term"],
            text("primary"),
        ))
    }
}

/// The live part: what was shown last, and since when.
struct Screen {
    begin: Instant,
    shown: BTreeMap<String, Words>,
    silent: bool,
}

impl Screen {
    fn say(&self, text: &str) {
        println!("{:>+7.1} s  {text}", self.begin.elapsed().as_secs_f64());
    }

    fn instance(&mut self, instance: &Instance, words: Words) {
        if self.shown.get(&instance.name) != Some(&words) {
            self.say(&format!(
                "{:<14} {:<3} {}",
                instance.name, instance.node, words.0
            ));
            self.shown.insert(instance.name.clone(), words);
        }
    }

    fn writer(&mut self, events: &[Event]) -> Result<()> {
        let mut commits = events.iter().rev().filter_map(|e| match e {
            Event::Acknowledged { row, .. } => Some(row),
            _ => None,
        });
        let Some(last) = commits.next() else {
            return Ok(());
        };
        let silence = seconds(last.at, now()?);
        if silence > SILENCE && !self.silent {
            self.silent = true;
            self.say("the writer    gets no commit acknowledged");
        } else if silence <= SILENCE && self.silent {
            self.silent = false;
            let host = last.host.split('.').next().unwrap_or_default();
            self.say(&format!("the writer    commits again, on {host}"));
        }
        Ok(())
    }
}

/// Breaks it and shows what happens.
///
/// # Errors
/// If the store isn't healthy, something acknowledged is lost, or the old primary doesn't come home.
pub async fn show(show: &Show) -> Result<()> {
    let mut terminated = signal(SignalKind::terminate()).context("listening for SIGTERM")?;
    let target = store::target(&show.scope, &show.store).await?;
    let outcome = tokio::select! {
        outcome = Box::pin(show.play(&target)) => outcome,
        _ = tokio::signal::ctrl_c() => Err(anyhow::anyhow!("interrupted")),
        _ = terminated.recv() => Err(anyhow::anyhow!("told to end")),
    };
    let mended = show.bed.mend().await;
    // Without a primary the table has to stay; the next show empties it.
    let removed = check::remove(&target).await;
    outcome?;
    mended.context("ending the cut")?;
    removed
}

impl Show {
    async fn play(&self, target: &Target) -> Result<()> {
        println!("waiting until every instance of {} serves", self.store);
        let before = healthy(&self.scope, &self.store).await?;
        let old = before.instance(&before.primary)?.clone();
        let home = Node::find(&old.node).context("the primary's node")?;
        let away = if home.region.name == "us-east" {
            "c1"
        } else {
            "e2"
        };
        let away = Node::find(away).context("the client's node")?;
        check::prepare(target).await?;
        let spec = Spec {
            target: target.clone(),
            run: "break".to_owned(),
            writer: Some(Pace::WRITER),
            probe: Some(Pace::PROBE),
            inside: None,
            cancelling: None,
        };
        let mut client = Process::start(&self.program, Some(&named(&away.netns())), &spec).await?;
        let committed = |all: &[Event]| all.iter().any(|e| matches!(e, Event::Acknowledged { .. }));
        client
            .until("the writer's first commit", NOBODY, committed)
            .await?;
        println!(
            "{} is primary, on {} in {}; a writer in {} commits every few milliseconds\n",
            old.name, old.node, old.region, away.region
        );

        let mut screen = Screen {
            begin: Instant::now(),
            shown: BTreeMap::new(),
            silent: false,
        };
        self.look(&mut screen, &before, None, &client).await?;
        let from = now()?;
        screen.begin = Instant::now();
        screen.say(&format!(
            "CUT           {}: what goes to it or comes from it vanishes",
            old.node
        ));
        self.bed.cut(&old.node, Cut::BOTH).await?;
        let mut tick = interval(LOOK);
        while screen.begin.elapsed() < CUT
            || (Ledger::new(client.so_far().iter().cloned()).reigns().len() < 2
                && screen.begin.elapsed() < NOBODY)
        {
            tick.tick().await;
            self.look(&mut screen, &before, Some(&old), &client).await?;
        }
        screen.say(&format!("HEAL          {}", old.node));
        self.bed.heal(&old.node).await?;
        let healed = Instant::now();
        let back = loop {
            tick.tick().await;
            self.look(&mut screen, &before, None, &client).await?;
            let last = Status::of(&self.scope.stores().get(&self.store).await?);
            if last.whole() {
                break Some(healed.elapsed());
            }
            if healed.elapsed() > HOME {
                break None;
            }
        };
        self.look(&mut screen, &before, None, &client).await?;
        let to = now()?;
        let ledger = Ledger::new(client.finish().await?);
        let found = check::read(target).await?;
        let after = Status::of(&self.scope.stores().get(&self.store).await?);
        let wrong = ledger.compare(&found);
        println!(
            "\nprimary        {} (term {}), was {} (term {})\n\
             the service    had no commit acknowledged for {:.2} s; the single writer for {:.2} s\n\
             rows           {} acknowledged, {} of them lost, {} of unknown outcome",
            after.primary,
            after.term,
            before.primary,
            before.term,
            ledger.gap(from, to),
            ledger.writer_gap(from, to),
            ledger.acknowledged().len(),
            wrong.lost.len(),
            ledger.unknown().len(),
        );
        match back {
            Some(back) => println!(
                "{:<14} is back, as {}, {:.1} s after the heal",
                old.name,
                after.instance(&old.name)?.role,
                back.as_secs_f64()
            ),
            None => bail!("{} isn't back {HOME:?} after the heal", old.name),
        }
        if !wrong.lost.is_empty() {
            bail!("{} acknowledged rows are lost", wrong.lost.len());
        }
        Ok(())
    }

    /// Asks every instance; the one beyond the cut from its own node.
    async fn look(
        &self,
        screen: &mut Screen,
        before: &Status,
        cut: Option<&Instance>,
        client: &Process,
    ) -> Result<()> {
        let said = before.instances.iter().map(|instance| async move {
            let address = instance.address.context("no address")?;
            if cut.is_some_and(|cut| cut.node == instance.node) {
                self.ask_from_within(&instance.node, &address.to_string())
                    .await
            } else {
                ask(address).await
            }
        });
        let said = futures::future::join_all(said).await;
        for (instance, said) in before.instances.iter().zip(&said) {
            screen.instance(instance, Words::of(said));
        }
        screen.writer(&client.so_far())
    }

    async fn ask_from_within(&self, node: &str, address: &str) -> Result<Value> {
        let node = Node::find(node).context("the instance's node")?;
        let program = Path::new(&self.program).display().to_string();
        let said = net::inside(&node.netns(), &[&program, "ask", address]).await?;
        serde_json::from_str(&said).context("not JSON")
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn what_is_said_fits_a_line() {
        let said = Ok(
            json!({ "instance": "s-1", "role": "Standby", "ready": true, "term": 2, "primary": "s-2" }),
        );
        assert_eq!(
            Words::of(&said).0,
            "Standby   ready      term 2  primary s-2"
        );
        assert_eq!(Words::of(&Err(anyhow::anyhow!("x"))).0, "doesn't answer");
    }
}
