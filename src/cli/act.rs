//! `kubectl domicile promote`, `fence`, `unfence`: what a person asks of a store.
//!
//! Owns the annotations' words and the waiting for what comes of them. Asks only: the instances act, by their own
//! rules, and refuse what isn't safe.
//! Never accepts the loss of data without having named it, and never without `--yes`.

use std::collections::BTreeSet;
use std::fmt::Write as _;
use std::time::Duration;

use anyhow::{Context as _, bail};
use kube::api::{Patch, PatchParams};
use kube::runtime::wait::await_condition;
use kube::{Api, Client, ResourceExt};
use serde_json::json;

use super::explain;
use super::status::{ask, get};
use crate::api::privacy_data_store::InstanceStatus;
use crate::api::{PrivacyDataStore, conditions, labels};
use crate::instance::status::Status;
use crate::operator::store::leader::{self, instance_of};
use crate::operator::store::requests::fenced;

/// How long a request is waited for.
const PATIENCE: Duration = Duration::from_secs(30);
/// Somebody else may change the store in between this often.
const ATTEMPTS: usize = 4;
/// Who sets the annotations.
const MANAGER: &str = "kubectl-domicile";

/// What `promote` is told.
#[derive(Clone, Debug, Default, clap::Args)]
#[group(id = "promote-options")]
pub struct Promote {
    /// The instance; default: the best standby that is ready and may be primary.
    pub instance: Option<String>,
    /// Go on without the copies that would know what was acknowledged. Only if they are gone for good.
    #[arg(long)]
    pub accept_data_loss: bool,
    /// Do it: without this, --accept-data-loss only says what may be missing.
    #[arg(long, requires = "accept_data_loss")]
    pub yes: bool,
}

fn entries(store: &PrivacyDataStore) -> &[InstanceStatus] {
    store
        .status
        .as_ref()
        .map_or(&[], |s| s.instances.as_slice())
}

fn serves(store: &PrivacyDataStore) -> bool {
    store
        .status
        .as_ref()
        .is_some_and(|s| conditions::is_true(&s.conditions, conditions::AVAILABLE))
}

/// Why an instance can't become primary by a switchover, as far as the store tells.
fn obstacle(store: &PrivacyDataStore, name: &str) -> Option<String> {
    let Some(entry) = entries(store).iter().find(|e| e.name == name) else {
        let all: Vec<&str> = entries(store).iter().map(|e| e.name.as_str()).collect();
        return Some(format!(
            "there is none of that name; there are {}",
            all.join(", ")
        ));
    };
    if entry.may_be_primary == Some(false) {
        let region = entry.region.as_deref().unwrap_or("?");
        return Some(format!(
            "the policy doesn't permit a primary in region {region}, or where it is isn't certain"
        ));
    }
    if entry.leaving == Some(true) {
        return Some("it is being taken out of the store".to_owned());
    }
    if fenced(store, name) {
        return Some("it is fenced: unfence it first".to_owned());
    }
    if entry.ready != Some(true) {
        let said = entry.message.as_deref().unwrap_or("it doesn't say why");
        return Some(format!("it isn't ready: {said}"));
    }
    None
}

/// The standby that is best placed to become primary.
fn best(store: &PrivacyDataStore) -> Option<String> {
    let primary = leader::of(store).map(|l| l.name.to_owned());
    let region = |name: Option<&str>| {
        let entry = entries(store)
            .iter()
            .find(|e| Some(e.name.as_str()) == name);
        entry.and_then(|e| e.region.clone())
    };
    let home = region(primary.as_deref());
    let agreed = store.status.as_ref().and_then(|s| s.configuration.as_ref());
    let waited_for =
        |name: &str| agreed.is_some_and(|c| c.sync_members.iter().any(|m| instance_of(m) == name));
    entries(store)
        .iter()
        .filter(|e| Some(&e.name) != primary.as_ref() && e.may_be_primary == Some(true))
        .filter(|e| obstacle(store, &e.name).is_none())
        .min_by_key(|e| (!waited_for(&e.name), e.region != home, e.name.clone()))
        .map(|e| e.name.clone())
}

async fn annotate(
    api: &Api<PrivacyDataStore>,
    store: &PrivacyDataStore,
    annotation: &str,
    value: Option<String>,
) -> kube::Result<PrivacyDataStore> {
    // Guarded: neither a namesake nor what somebody else asked for meanwhile is overwritten.
    let patch = json!({ "metadata": {
        "uid": store.uid(), "resourceVersion": store.resource_version(), "annotations": { annotation: value },
    } });
    let params = PatchParams {
        field_manager: Some(MANAGER.to_owned()),
        ..PatchParams::default()
    };
    api.patch(&store.name_any(), &params, &Patch::Merge(patch))
        .await
}

/// Sets an annotation to what `value` makes of the store; again if the store has changed in between.
pub(super) async fn set(
    api: &Api<PrivacyDataStore>,
    mut store: PrivacyDataStore,
    annotation: &str,
    value: impl Fn(&PrivacyDataStore) -> Option<String>,
) -> anyhow::Result<PrivacyDataStore> {
    for _ in 0..ATTEMPTS {
        let wanted = value(&store);
        match annotate(api, &store, annotation, wanted).await {
            Ok(store) => return Ok(store),
            Err(kube::Error::Api(status)) if status.is_conflict() => {
                store = api.get(&store.name_any()).await?;
            }
            Err(kube::Error::Api(status)) if status.is_forbidden() => bail!(
                "you may not change this store: {}; the ClusterRole domicile-edit has the right",
                status.message
            ),
            Err(error) => return Err(error).context("the annotation can't be set"),
        }
    }
    bail!("the store changes all the time: try again")
}

/// Asks for a switchover, or to go on by hand, and says what came of it.
///
/// # Errors
/// If it can't be asked for, was refused, or hasn't come to pass in time.
pub async fn promote(
    client: Client,
    namespace: &str,
    name: &str,
    args: Promote,
) -> anyhow::Result<String> {
    let store = get(&client, namespace, name).await?;
    if args.accept_data_loss {
        return accept_loss(client, namespace, store, args).await;
    }
    let before = leader::of(&store).map(|l| (l.name.to_owned(), l.term));
    let target = match args.instance {
        Some(target) => target,
        None => best(&store).context(
            "no standby is ready and may be primary; `kubectl domicile explain` says who may be and why not",
        )?,
    };
    if before
        .as_ref()
        .is_some_and(|(primary, _)| *primary == target)
    {
        return Ok(format!("{target} is the primary already\n"));
    }
    if let Some(why) = obstacle(&store, &target) {
        bail!("{target} can't become primary: {why}");
    }
    let api: Api<PrivacyDataStore> = Api::namespaced(client, namespace);
    set(&api, store, labels::PROMOTE, |_| Some(target.clone())).await?;
    let wanted = target.clone();
    let over = move |store: Option<&PrivacyDataStore>| {
        store.is_none_or(|s| {
            let there = leader::of(s).is_some_and(|l| l.name == wanted);
            there || s.annotations().get(labels::PROMOTE) != Some(&wanted)
        })
    };
    match tokio::time::timeout(PATIENCE, await_condition(api, name, over)).await {
        Err(_) => bail!(
            "{target} isn't primary after {} s. The request stands for 10 minutes; take it back with `kubectl annotate pds {name} {}-`",
            PATIENCE.as_secs(),
            labels::PROMOTE
        ),
        Ok(seen) => {
            let store = seen
                .context("the store can't be watched")?
                .context("the store is gone")?;
            let reached = leader::of(&store).filter(|l| l.name == target);
            let Some(leader) = reached else {
                bail!("{target} is refused: `kubectl describe pds {name}` has the reason");
            };
            Ok(switched(
                &store,
                leader.term,
                &target,
                before.map(|b| b.0).as_deref(),
            ))
        }
    }
}

/// What a switchover was.
fn switched(store: &PrivacyDataStore, term: i64, target: &str, before: Option<&str>) -> String {
    let mut out = format!("{target} is primary of term {term}");
    if let Some(before) = before {
        let _ = write!(out, ", after {before}");
    }
    let last = store.status.as_ref().and_then(|s| s.last_failover.as_ref());
    if let Some(last) = last.filter(|l| l.term == term)
        && let (Some(from), Some(to)) = (&last.detected_at, &last.promoted_at)
    {
        let took = to.0.duration_since(from.0).as_millis();
        let _ = write!(out, "; writes stood still for about {took} ms");
    }
    out.push('\n');
    out
}

/// A position such as "16/B374D848".
fn position(text: &str) -> Option<u64> {
    let (high, low) = text.split_once('/')?;
    let part = |s: &str| u32::from_str_radix(s, 16).ok().map(u64::from);
    Some((part(high)? << 32) | part(low)?)
}

/// What every copy says of itself, and what one would leave behind.
fn losses(seen: &[(String, Result<Status, String>)], target: &str) -> String {
    let at = |status: &Status| status.position.as_deref().and_then(position);
    let own = seen
        .iter()
        .find(|(name, _)| name == target)
        .and_then(|(_, s)| s.as_ref().ok())
        .and_then(at);
    let mut out = String::new();
    for (name, status) in seen {
        let words = match status {
            Err(why) => format!("unknown ({why}): whatever only it has is lost"),
            Ok(status) => match (at(status), own) {
                (None, _) => "says no position: whatever only it has is lost".to_owned(),
                (Some(there), Some(own)) if there > own => format!(
                    "{}: {} bytes of log more than {target}, which are lost",
                    status.position.as_deref().unwrap_or_default(),
                    there - own
                ),
                (Some(_), _) => status.position.clone().unwrap_or_default(),
            },
        };
        let _ = writeln!(out, "  {name:<20} {words}");
    }
    out
}

/// The instance that has most, of those that can be asked and may be primary.
fn furthest(store: &PrivacyDataStore, seen: &[(String, Result<Status, String>)]) -> Option<String> {
    seen.iter()
        .filter(|(name, _)| {
            let entry = entries(store).iter().find(|e| e.name == *name);
            entry.is_some_and(|e| e.may_be_primary == Some(true)) && !fenced(store, name)
        })
        .filter_map(|(name, status)| {
            let at = status
                .as_ref()
                .ok()?
                .position
                .as_deref()
                .and_then(position)?;
            Some((at, std::cmp::Reverse(name)))
        })
        .max()
        .map(|(_, name)| name.0.clone())
}

async fn accept_loss(
    client: Client,
    namespace: &str,
    store: PrivacyDataStore,
    args: Promote,
) -> anyhow::Result<String> {
    let name = store.name_any();
    if serves(&store) {
        let primary = leader::of(&store).map(|l| l.name.to_owned());
        bail!(
            "{} serves: nothing needs to be lost; leave --accept-data-loss away",
            primary.unwrap_or_default()
        );
    }
    let mut seen = Vec::new();
    for entry in entries(&store) {
        seen.push((
            entry.name.clone(),
            ask(&client, namespace, &entry.name).await,
        ));
    }
    let target = match args.instance {
        Some(target) => target,
        None => furthest(&store, &seen).context(
            "no instance that may be primary tells how far its copy goes: name the instance yourself",
        )?,
    };
    let Some(entry) = entries(&store).iter().find(|e| e.name == target) else {
        bail!("{target} can't become primary: there is none of that name");
    };
    if entry.may_be_primary != Some(true) {
        bail!(
            "{target} can't become primary: the policy doesn't permit one there, whatever is accepted"
        );
    }
    let answer = seen.iter().find(|(n, _)| *n == target);
    let term = answer
        .and_then(|(_, s)| s.as_ref().ok()?.term)
        .or(entry.term)
        .with_context(|| format!("{target} doesn't say which term it knows: it can't be asked"))?;
    let mut out = format!(
        "{target} would go on from term {term} with what it has. The copies:\n{}",
        losses(&seen, &target)
    );
    out.push_str("Commits that were acknowledged to applications may be missing for good.\n");
    if !args.yes {
        print!("{out}");
        bail!("nothing was done: if the other copies are gone for good, say --yes");
    }
    let api: Api<PrivacyDataStore> = Api::namespaced(client, namespace);
    let value = format!("{target}@{term}");
    set(&api, store, labels::ACCEPT_DATA_LOSS, |_| {
        Some(value.clone())
    })
    .await?;
    let over = move |store: Option<&PrivacyDataStore>| {
        store.is_none_or(|s| leader::of(s).is_some_and(|l| l.term > term))
    };
    match tokio::time::timeout(PATIENCE, await_condition(api, &name, over)).await {
        Err(_) => {
            print!("{out}");
            bail!(
                "{target} isn't primary after {} s; `kubectl domicile explain {name}` and its log say why. The request stands for 10 minutes",
                PATIENCE.as_secs()
            )
        }
        Ok(seen) => {
            let store = seen
                .context("the store can't be watched")?
                .context("the store is gone")?;
            if let Some(leader) = leader::of(&store) {
                let _ = writeln!(out, "{} is primary of term {}", leader.name, leader.term);
            }
            Ok(out)
        }
    }
}

/// The annotation with an instance put on or taken off.
fn fences(present: Option<&str>, instance: &str, on: bool) -> Option<String> {
    let mut names: BTreeSet<&str> = present
        .unwrap_or_default()
        .split(',')
        .map(str::trim)
        .filter(|n| !n.is_empty())
        .collect();
    if on {
        names.insert(instance);
    } else {
        names.remove(instance);
    }
    let all: Vec<&str> = names.into_iter().collect();
    (!all.is_empty()).then(|| all.join(","))
}

/// Fences an instance, or lifts the fence.
///
/// # Errors
/// If the store can't be read or changed, or has no such instance.
pub async fn fence(
    client: Client,
    namespace: &str,
    name: &str,
    instance: &str,
    on: bool,
) -> anyhow::Result<String> {
    let store = get(&client, namespace, name).await?;
    if on && entries(&store).iter().all(|e| e.name != instance) {
        let all: Vec<&str> = entries(&store).iter().map(|e| e.name.as_str()).collect();
        bail!(
            "the store has no instance {instance}; it has {}",
            all.join(", ")
        );
    }
    let api: Api<PrivacyDataStore> = Api::namespaced(client, namespace);
    let now = set(&api, store, labels::FENCE, |s| {
        fences(
            s.annotations().get(labels::FENCE).map(String::as_str),
            instance,
            on,
        )
    })
    .await?;
    let wanted = instance.to_owned();
    let over = move |store: Option<&PrivacyDataStore>| {
        store.is_none_or(|s| {
            let entry = entries(s).iter().find(|e| e.name == wanted);
            entry.is_some_and(|e| e.fenced == Some(true)) == on
        })
    };
    let done = tokio::time::timeout(PATIENCE, await_condition(api, name, over)).await;
    Ok(match (done.is_ok(), on) {
        (true, true) => format!(
            "{instance} has stopped PostgreSQL and is no candidate until `kubectl domicile unfence {name} {instance}`\n"
        ),
        (true, false) => format!("{instance} takes part again\n"),
        (false, _) => format!(
            "{instance} hasn't said so within {} s; the annotation {} stands as {:?}. What is known:\n\n{}",
            PATIENCE.as_secs(),
            labels::FENCE,
            now.annotations()
                .get(labels::FENCE)
                .map_or("", String::as_str),
            explain::render(&now)
        ),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn store() -> PrivacyDataStore {
        let instance = |n: u32, region: &str, role: &str, may: bool| json!({ "name": format!("s-{n}"), "region": region, "role": role, "ready": true, "term": 4, "mayBePrimary": may });
        serde_json::from_value(json!({
            "apiVersion": "domicile.dev/v1alpha1", "kind": "PrivacyDataStore", "metadata": { "name": "s" },
            "spec": { "residencyPolicyRef": { "name": "p" }, "placement": [], "storage": { "size": "1Gi" } },
            "status": { "primary": "s-2", "term": 4, "instances": [
                instance(1, "east", "Standby", true), instance(2, "west", "Primary", true),
                instance(3, "west", "Standby", true), instance(4, "west", "Standby", false) ],
                "configuration": { "term": 4, "syncMembers": ["s-1/a", "s-3/c"] } },
        }))
        .unwrap()
    }

    #[test]
    fn the_best_standby_is_waited_for_near_and_permitted() {
        let mut s = store();
        assert_eq!(best(&s).as_deref(), Some("s-3"));
        s.status
            .as_mut()
            .unwrap()
            .configuration
            .as_mut()
            .unwrap()
            .sync_members = vec!["s-1/a".into()];
        assert_eq!(best(&s).as_deref(), Some("s-1"));
        s.annotations_mut()
            .insert(labels::FENCE.into(), "s-1, s-3".into());
        assert_eq!(best(&s), None);
        assert!(obstacle(&s, "s-1").unwrap().contains("fenced"));
        assert!(obstacle(&s, "s-4").unwrap().contains("region west"));
        assert!(obstacle(&s, "s-9").unwrap().contains("s-1, s-2"));
    }

    #[test]
    fn fences_are_a_set() {
        assert_eq!(fences(None, "a", true).as_deref(), Some("a"));
        assert_eq!(fences(Some(" b ,a"), "c", true).as_deref(), Some("a,b,c"));
        assert_eq!(fences(Some("a,b"), "a", true).as_deref(), Some("a,b"));
        assert_eq!(fences(Some("a,b"), "a", false).as_deref(), Some("b"));
        assert_eq!(fences(Some("a"), "a", false), None);
    }

    #[test]
    fn what_is_lost_is_named() {
        let status = |at: &str| {
            Ok(Status {
                position: Some(at.into()),
                ..Status::default()
            })
        };
        let seen = vec![
            ("s-1".to_owned(), status("1/10")),
            ("s-2".to_owned(), Err("it doesn't answer".to_owned())),
            ("s-3".to_owned(), status("1/0")),
            ("s-4".to_owned(), status("2/0")),
        ];
        assert_eq!(
            furthest(&store(), &seen).as_deref(),
            Some("s-1"),
            "s-4 may not be"
        );
        let said = losses(&seen, "s-3");
        assert!(
            said.contains("1/10: 16 bytes of log more than s-3"),
            "{said}"
        );
        assert!(
            said.contains("unknown (it doesn't answer): whatever only it has is lost"),
            "{said}"
        );
        assert_eq!(position("16/B374D848"), Some(0x0016_B374_D848));
        assert_eq!(position("x"), None);
    }
}
