//! One run of one case: a healthy store, clients that write, the fault, its end, everybody back, and the account.
//!
//! Owns the order of things. Whatever happens, what was broken is mended before it comes back.

use std::net::IpAddr;
use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, Result};
use tokio::time::{Instant, sleep, timeout};

use super::cases::{Case, Failover, Kind};
use super::check;
use super::client::{Pace, Spec};
use super::event::{Event, Who, now, seconds};
use super::inject::{self, Victim};
use super::ledger::{Ledger, Thaw};
use super::process::{Process, named};
use super::sample::Sample;
use super::store::{self, Status, ask, healthy};
use super::target::Target;
use super::watch::{Watch, falling_terms};
use crate::faults::Cut;
use crate::harness::Scope;
use crate::testbed::TestBed;
use crate::topology::{Node, Region};

/// How long clients have to be at work before the fault.
const WARM: Duration = Duration::from_secs(1);
/// How long a failover may take before it counts as none.
const FAILOVER: Duration = Duration::from_secs(30);
/// How long who was hurt may take to come back before it counts as gone.
const BACK: Duration = Duration::from_secs(120);
/// How long the service is watched once everything is over.
const AFTER: Duration = Duration::from_secs(1);
/// What a frozen server may still answer after it goes on: what was sent to it until then.
const THAW_GRACE: u64 = 100_000_000;
/// How long one half of a flap lasts.
const FLAP: Duration = Duration::from_secs(3);
/// There may be one failover in this many seconds of flapping.
const SECONDS_PER_FAILOVER: u64 = 6;

/// What runs are made with.
#[derive(Clone, Debug)]
pub struct Ground {
    /// The test bed.
    pub bed: TestBed,
    /// The store's namespace.
    pub scope: Scope,
    /// The store.
    pub store: String,
    /// The program `bench`, which is the client too.
    pub program: PathBuf,
}

/// What a run works on.
struct Run<'a> {
    ground: &'a Ground,
    case: Case,
    number: usize,
    before: Status,
    primary: Victim,
    standbys: Vec<Victim>,
    operators: i32,
}

/// When the fault began and ended.
struct Span {
    begin: u64,
    /// When ending it began: from here on, starting an API server or an operator is a load of its own.
    over: u64,
    end: u64,
    thaw: Option<Thaw>,
}

impl Ground {
    /// Mends whatever a run may have broken: cuts, freezes, the API server, the operator.
    ///
    /// # Errors
    /// If something can't be mended.
    pub async fn mend(&self, operators: i32) -> Result<()> {
        self.bed.mend().await?;
        inject::start_api(&self.bed).await?;
        inject::scale_operator(&self.bed, operators).await?;
        Ok(())
    }

    /// One run.
    ///
    /// # Errors
    /// If it can't be made. What goes wrong with the store is no error but in the sample.
    pub async fn run(&self, case: Case, latency: u64, number: usize) -> Result<Sample> {
        let before = healthy(&self.scope, &self.store).await?;
        if latency > 0 {
            store::sessions(&before).await?;
        }
        let primary = Victim::find(&self.scope, &before.primary).await?;
        let mut standbys = Vec::new();
        for instance in before.instances.iter().filter(|i| i.name != before.primary) {
            standbys.push(Victim::find(&self.scope, &instance.name).await?);
        }
        let operators = inject::operators(&self.bed).await?;
        let run = Run {
            ground: self,
            case,
            number,
            before,
            primary,
            standbys,
            operators,
        };
        let sample = Box::pin(run.make(latency)).await;
        // Also when the run failed half-way: nothing stays broken.
        self.mend(operators).await.context("mending")?;
        sample
    }
}

impl Run<'_> {
    fn bed(&self) -> &TestBed {
        &self.ground.bed
    }

    fn scope(&self) -> &Scope {
        &self.ground.scope
    }

    fn variant(&self) -> &'static str {
        self.case.variant(self.number)
    }

    fn address(&self, instance: &str) -> Result<IpAddr> {
        let address = self.before.instance(instance)?.address;
        address.with_context(|| format!("{instance} has no address"))
    }

    /// A node in another region than the primary's.
    fn client_node(&self) -> Result<&'static Node> {
        let home = Node::find(&self.primary.node).context("the primary's node")?;
        let away = if home.region.name == "eu-central" {
            "e2"
        } else {
            "c1"
        };
        Node::find(away).context("the client's node")
    }

    async fn make(&self, latency: u64) -> Result<Sample> {
        let target = store::target(self.scope(), &self.ground.store).await?;
        store::reachable(&self.client_node()?.netns(), &target).await?;
        check::prepare(&target).await?;
        let mut watch = Watch::start(self.scope(), &self.ground.store);
        watch.until("a first status", FAILOVER, |_| true).await?;
        let mut outside = self.outside(&target).await?;
        let mut inside = self.inside(&target).await?;
        let begin = warm(&mut outside, &mut inside).await?;
        let mut calm = None;
        if self.case.kind == Kind::QuietApiDown {
            // What is slow without any fault, too, isn't the fault's.
            sleep(self.case.lasts()).await;
            calm = Some(now()?);
        }

        let mut violations = Vec::new();
        let fault = self.fault(&mut outside).await;
        let span = fault.context("the fault")?;
        let failovers = self.settled(&mut outside, &span).await;
        let back = self.back(&mut watch, &span, failovers).await;
        sleep(AFTER).await;

        let end = now()?;
        let mut events = outside.finish().await.context("outside")?;
        events.extend(inside.finish().await.context("inside")?);
        let ledger = Ledger::new(events);
        let found = check::read(&target).await?;
        let seen = watch.all();
        drop(watch);

        let wrong = ledger.compare(&found);
        let dual = ledger.dual(span.thaw);
        let failovers = ledger.reigns().len().saturating_sub(1);
        violations.extend(falling_terms(&seen));
        violations.extend(describe("acknowledged and lost", &wrong.lost));
        violations.extend(describe("acknowledged by a deposed primary", &dual));
        if !wrong.duplicates.is_empty() {
            violations.push(format!("there more than once: {:?}", wrong.duplicates));
        }
        match (self.case.failover(self.number), failovers) {
            (Failover::Must, 0) => violations.push("no other instance became primary".to_owned()),
            (Failover::Home, _) => {
                let elsewhere = seen
                    .iter()
                    .map(|s| s.status.primary.as_str())
                    .find(|p| !p.is_empty() && *p != self.primary.pod);
                if let Some(pod) = elsewhere {
                    violations.push(format!("{pod} became primary, where none is permitted"));
                }
            }
            (Failover::Never, n) if n > 0 => {
                violations.push(format!("{n} promotions, where there must be none"));
            }
            _ => {}
        }
        let most = self.case.lasts().as_secs() / SECONDS_PER_FAILOVER;
        if self.case.kind == Kind::Flapping && failovers as u64 > most {
            violations.push(format!("{failovers} promotions, more than {most}"));
        }
        if self.case.kind == Kind::RegionCutHome {
            // Down, but not without a word.
            let said = seen
                .iter()
                .any(|s| s.at >= span.begin && s.status.down.is_some());
            if !said {
                violations.push("the status never said that it was down, and why".to_owned());
            }
        }
        let back = match back {
            Ok(back) => back,
            Err(e) => {
                violations.push(format!("{e:#}"));
                None
            }
        };
        Ok(Sample {
            case: self.case.to_string(),
            latency,
            run: self.number,
            variant: self.variant().to_owned(),
            gap: ledger.gap(begin, end),
            writer: ledger.writer_gap(begin, end),
            longest: ledger.longest_commit(span.begin, span.over),
            usual: calm.map(|calm| ledger.longest_commit(begin, calm)),
            commits: ledger.acknowledged().len(),
            unknown: ledger.unknown().len(),
            lost: wrong.lost.len(),
            duplicates: wrong.duplicates.len(),
            dual: dual.len(),
            stale: ledger.stale(span.thaw),
            back,
            again: ledger.first_after(span.end),
            failovers,
            cancelled: ledger.warned().len(),
            cancelled_lost: ledger.warned_lost(&found).len(),
            violations,
        })
    }

    fn spec(&self, target: Target) -> Spec {
        Spec {
            target,
            run: format!("{}-{}", self.case, self.number),
            writer: None,
            probe: None,
            inside: None,
            cancelling: None,
        }
    }

    /// The application and the probes, in another region.
    async fn outside(&self, target: &Target) -> Result<Process> {
        let mut spec = self.spec(target.clone());
        spec.writer = Some(Pace::WRITER);
        spec.probe = Some(Pace::PROBE);
        let netns = named(&self.client_node()?.netns());
        Process::start(&self.ground.program, Some(&netns), &spec).await
    }

    /// Sessions on the primary, from inside its pod's own network.
    async fn inside(&self, target: &Target) -> Result<Process> {
        let pod = &self.primary.pod;
        let name = target
            .hosts
            .iter()
            .find(|h| h.name.split('.').next() == Some(pod))
            .with_context(|| format!("{pod} isn't among the URI's hosts"))?;
        let mut spec = self.spec(target.only(&name.name, self.address(pod)?));
        spec.inside = Some(Pace::INSIDE);
        if self.case.kind == Kind::Cancelled {
            spec.cancelling = Some(Pace::INSIDE);
        }
        let netns = self.primary.netns()?;
        Process::start(&self.ground.program, Some(&netns), &spec).await
    }

    /// Does the fault, lets it last, and ends it.
    async fn fault(&self, outside: &mut Process) -> Result<Span> {
        let bed = self.bed();
        let quiet = matches!(self.case.kind, Kind::QuietApiDown | Kind::OperatorDown);
        if quiet {
            inject::scale_operator(bed, 0).await?;
        }
        let api_down =
            self.case.api_down || matches!(self.case.kind, Kind::ApiDown | Kind::QuietApiDown);
        if api_down {
            inject::stop_api(bed).await?;
        }
        let begin = now()?;
        let filling = Box::pin(self.hurt()).await?;
        match self.case.kind {
            Kind::Flapping => self.flap().await?,
            Kind::OperatorDown => {
                // Without its operator a deleted pod isn't made again; that is how long the fault lasts.
                wait_for_reign(outside, FAILOVER).await;
            }
            Kind::Graceful if self.variant() == "promote" => {}
            _ => sleep(self.case.lasts()).await,
        }
        let over = now()?;
        let mut thaw = None;
        match self.case.kind {
            Kind::NodeCut | Kind::CutIn | Kind::CutOut | Kind::Cancelled => {
                bed.heal(&self.primary.node).await?;
            }
            Kind::RegionCut | Kind::RegionCutHome => {
                bed.heal_region(self.region()?.name).await?;
            }
            Kind::PodFreeze => {
                let at = now()?;
                self.primary.freeze(false).await?;
                let excused = now()? + THAW_GRACE;
                thaw = Some(Thaw { at, excused });
            }
            Kind::StandbysLost if self.variant() == "freeze" => {
                for standby in &self.standbys {
                    standby.freeze(false).await?;
                }
            }
            _ => {}
        }
        if let Some(file) = filling {
            std::fs::remove_file(&file).with_context(|| format!("removing {}", file.display()))?;
        }
        if api_down {
            inject::start_api(bed).await?;
        }
        if quiet {
            inject::scale_operator(bed, self.operators).await?;
        }
        // Whoever is told to end at once has its end at the beginning.
        let end = if self.case.lasts().is_zero() && !quiet {
            begin
        } else {
            now()?
        };
        Ok(Span {
            begin,
            over,
            end,
            thaw,
        })
    }

    fn region(&self) -> Result<Region> {
        let node = Node::find(&self.primary.node);
        Ok(node.context("the primary's node")?.region)
    }

    /// Breaks it. A file that fills a volume is the answer, if there is one.
    async fn hurt(&self) -> Result<Option<PathBuf>> {
        let (bed, scope, primary) = (self.bed(), self.scope(), &self.primary);
        match (self.case.kind, self.variant()) {
            (Kind::PostmasterKill, _) => primary.kill_postmaster()?,
            (_, "kill") if self.case.kind != Kind::StandbysLost => primary.kill()?,
            (Kind::PodKill | Kind::OperatorDown, _) => primary.delete(scope, Some(0)).await?,
            (Kind::Graceful, "delete") => primary.delete(scope, None).await?,
            (Kind::Graceful, "drain") => primary.evict(scope).await?,
            (Kind::Graceful, "terminate") => primary.terminate()?,
            (Kind::Graceful, _) => {
                let home = self.region()?.label;
                let mut others = self
                    .before
                    .instances
                    .iter()
                    .filter(|i| i.name != primary.pod);
                let other =
                    others.find(|i| Node::find(&i.node).is_some_and(|n| n.region.label == home));
                let other = other.context("no other instance in the primary's region")?;
                inject::promote(scope, &self.ground.store, &other.name).await?;
            }
            (Kind::NodeCut | Kind::Cancelled, _) => bed.cut(&primary.node, Cut::BOTH).await?,
            (Kind::CutIn, _) => bed.cut(&primary.node, Cut::IN).await?,
            (Kind::CutOut, _) => bed.cut(&primary.node, Cut::OUT).await?,
            (Kind::PodFreeze, _) => primary.freeze(true).await?,
            (Kind::RegionCut | Kind::RegionCutHome, _) => {
                bed.cut_region(self.region()?.name).await?;
            }
            (Kind::DiskFull, _) => {
                let file = primary.fill(bed).await?;
                inject::write_wal(scope, &primary.pod).await;
                return Ok(Some(file));
            }
            (Kind::PgdataWiped, "primary") => primary.wipe()?,
            (Kind::PgdataWiped, _) => {
                self.standbys.first().context("no standby")?.wipe()?;
            }
            (Kind::StandbysLost, how) => {
                for standby in &self.standbys {
                    if how == "freeze" {
                        standby.freeze(true).await?;
                    } else {
                        standby.kill()?;
                    }
                }
            }
            (Kind::ApiDown | Kind::QuietApiDown | Kind::Flapping, _) => {}
        }
        Ok(None)
    }

    async fn flap(&self) -> Result<()> {
        let (bed, node) = (self.bed(), &self.primary.node);
        let begin = Instant::now();
        while begin.elapsed() < self.case.lasts() {
            bed.cut(node, Cut::BOTH).await?;
            sleep(FLAP).await;
            bed.heal(node).await?;
            sleep(FLAP).await;
        }
        Ok(())
    }

    /// Waits until another timeline acknowledges commits, if one is expected, and commits go on. Whether another
    /// one does is the answer; that it doesn't is seen in the account.
    async fn settled(&self, outside: &mut Process, span: &Span) -> bool {
        if self.case.failover(self.number) == Failover::Must {
            wait_for_reign(outside, FAILOVER).await;
        }
        let again = outside.until("commits", FAILOVER, |all| {
            all.iter()
                .any(|e| matches!(e, Event::Acknowledged { row, .. } if row.sent > span.end))
        });
        let _ = again.await;
        self.case.failover(self.number) != Failover::Home && reigns(&outside.so_far()) > 1
    }

    /// Seconds from the fault's end until everybody who was hurt is back at work: the status says so, and so does
    /// the instance itself.
    async fn back(&self, watch: &mut Watch, span: &Span, failed_over: bool) -> Result<Option<f64>> {
        let hurt: Vec<&str> = match self.case.kind {
            Kind::QuietApiDown => return Ok(None),
            Kind::StandbysLost => self.standbys.iter().map(|v| v.pod.as_str()).collect(),
            Kind::PgdataWiped if self.variant() == "standby" => self
                .standbys
                .iter()
                .take(1)
                .map(|v| v.pod.as_str())
                .collect(),
            _ => vec![self.primary.pod.as_str()],
        };
        let waited = timeout(BACK, async {
            for name in hurt {
                let deposed = failed_over && name == self.primary.pod;
                back_to_work(watch, name, deposed).await?;
            }
            anyhow::Ok(())
        });
        waited.await.with_context(|| {
            let last = watch.last().unwrap_or_default();
            format!(
                "not back {BACK:?} after the fault's end: {:?}",
                last.instances
            )
        })??;
        Ok(Some(seconds(span.end, now()?)))
    }
}

/// Waits until an instance is back: as a standby, if it was deposed.
async fn back_to_work(watch: &mut Watch, name: &str, deposed: bool) -> Result<()> {
    loop {
        let status = watch.last().unwrap_or_default();
        let listed = status.instance(name).ok().cloned().unwrap_or_default();
        let mut right =
            listed.ready && (listed.role == "Standby" || (listed.role == "Primary" && !deposed));
        // The status may still be the one from before the fault.
        right = right
            && match listed.address {
                Some(address) => ask(address).await.is_ok_and(|said| {
                    said["ready"] == true && said["role"] == listed.role.as_str()
                }),
                None => false,
            };
        if right {
            return Ok(());
        }
        // The instance itself tells nobody; the status changes now and then.
        let changed = watch.until("a change", Duration::from_millis(200), |s| *s != status);
        let _ = changed.await;
    }
}

/// Waits until writer, probes, and sessions inside are at work; from when on they are is the answer.
async fn warm(outside: &mut Process, inside: &mut Process) -> Result<u64> {
    let from = now()?;
    for who in [Who::Writer, Who::Probe] {
        outside
            .until("the clients' first commits", FAILOVER, |all| {
                acknowledged(all, who, from)
            })
            .await?;
    }
    inside
        .until("the first commit inside the pod", FAILOVER, |all| {
            acknowledged(all, Who::Inside, from)
        })
        .await?;
    let begin = now()?;
    sleep(WARM).await;
    Ok(begin)
}

fn acknowledged(events: &[Event], who: Who, from: u64) -> bool {
    events
        .iter()
        .any(|e| matches!(e, Event::Acknowledged { row, .. } if row.who == who && row.sent >= from))
}

/// How many timelines acknowledged commits.
fn reigns(events: &[Event]) -> usize {
    let timelines = events.iter().filter_map(|e| match e {
        Event::Acknowledged { row, .. } => Some(row.timeline),
        _ => None,
    });
    timelines.collect::<std::collections::BTreeSet<_>>().len()
}

async fn wait_for_reign(outside: &mut Process, limit: Duration) {
    // That there is none is seen in the account.
    let _ = outside
        .until("another primary", limit, |all| reigns(all) > 1)
        .await;
}

/// What isn't as it must be, in one line with the first rows.
fn describe(what: &str, rows: &[super::event::Row]) -> Option<String> {
    let first = rows.first()?;
    let shown: Vec<String> = rows
        .iter()
        .take(3)
        .map(|r| {
            format!(
                "{}/{} by {} of timeline {}",
                r.writer, r.seq, r.host, r.timeline
            )
        })
        .collect();
    let last = rows.last().unwrap_or(first);
    Some(format!(
        "{} rows {what} within {:.3} s: {}",
        rows.len(),
        seconds(first.at, last.at),
        shown.join(", ")
    ))
}
