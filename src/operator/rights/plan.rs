//! What to do next for one workflow.
//!
//! Owns the order of steps: what runs outside is stopped first, stores are told what is needed before anybody needs it,
//! keys and certificates are there before pods, removal comes last. [`plan`] is a function of what was observed and of
//! the time; executed to its end and observed again it comes to nothing.
//! Never does I/O, never makes randomness, and never steps outside: every region in a step is one that `validate` found
//! lawful. Never lets a workflow go whose requests are open, unless a person says so.

use std::collections::{BTreeMap, BTreeSet};

use jiff::Timestamp;
use kube::ResourceExt;
use kube::api::DynamicObject;

use super::assess::{self, Draft};
use super::backlog::Reading;
use super::build::{self, CONFIG_KEY, GATEWAY, WORKER};
use super::keys;
use super::kinds::ChildKind;
use super::observe::Observed;
use super::pods;
use super::step::{Certificate, Object, Step};
use super::validate::{Lawful, validate};
use crate::api::conditions::reasons;
use crate::api::labels;
use crate::api::names::rights::{self as names, Role};
use crate::api::residency_policy::Data;
use crate::operator::hands::lingers;
use crate::operator::law::Problem;
use crate::operator::objects;
use crate::operator::store::build::Settings;
use crate::operator::store::certificates::{Use, service_names};
use crate::operator::store::rotation;
use crate::residency::violations::{Finder, Verdict};

/// What comes of a pass.
#[derive(Clone, Debug)]
pub struct Plan {
    /// What to write, in this order; the first failure ends the pass.
    pub steps: Vec<Step>,
    /// What to say.
    pub draft: Draft,
}

/// What keeps a workflow from being as specified, beside what is wrong with it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct State {
    /// What is waited for, in words.
    pub waits: Vec<String>,
    /// Pods outside, in words.
    pub outside: Vec<String>,
    /// Pods of which it can't be known.
    pub unsure: Vec<String>,
    /// It is being deleted, and its requests are to be closed first.
    pub closing: bool,
}

/// Decides.
#[must_use]
pub fn plan(observed: &Observed, settings: &Settings, now: Timestamp) -> Plan {
    let workflow = &observed.workflow;
    let deleted = workflow.metadata.deletion_timestamp.is_some();
    if deleted && may_go(observed) {
        return Plan {
            steps: farewell(observed),
            draft: assess::resting(observed, (reasons::DELETING, "being deleted".into()), true),
        };
    }
    if observed.namespace_ending {
        return Plan {
            steps: Vec::new(),
            draft: if deleted {
                assess::held(observed)
            } else {
                let words = "its namespace is being deleted".to_owned();
                assess::resting(observed, (reasons::DELETING, words), true)
            },
        };
    }
    let paused = workflow.annotations().get(labels::PAUSE);
    if paused.is_some_and(|v| v == "true") {
        let words = format!(
            "left alone while the annotation {} is \"true\"",
            labels::PAUSE
        );
        return Plan {
            steps: Vec::new(),
            draft: assess::resting(observed, (reasons::PAUSED, words), false),
        };
    }
    let mut steps = Vec::new();
    let lawful = match validate(observed) {
        Ok(lawful) => lawful,
        Err(problem) => {
            // A policy that is briefly gone (renamed, re-applied) must not take anything down. What runs needs a new key
            // every day all the same.
            if observed.keys.is_some() {
                upkeep(observed, now, &mut steps);
            }
            return Plan {
                steps,
                draft: assess::stalled(observed, &[problem]),
            };
        }
    };
    let mut state = State {
        closing: deleted,
        ..State::default()
    };
    let mut problems = lawful.problems.clone();
    if !workflow
        .finalizers()
        .iter()
        .any(|f| f == labels::RIGHTS_FINALIZER)
        && !deleted
    {
        steps.push(Step::AddFinalizer);
    }
    evict(observed, &lawful, &mut state, &mut steps);
    let grows = problems.is_empty();
    if grows {
        grant(observed, &lawful, &mut steps);
    }
    let kept = if grows || observed.keys.is_some() {
        keys::keep(
            &workflow.name_any(),
            observed.keys.as_ref(),
            &observed.reading,
            now,
            &mut steps,
        )
    } else {
        keys::Outcome::Waits
    };
    let ledger = &workflow.spec.ledger_ref.name;
    let equipped = match kept {
        keys::Outcome::There => true,
        keys::Outcome::Waits => {
            let why = match &observed.reading {
                Reading::Failed { why, .. } => format!(": {why}"),
                _ => String::new(),
            };
            state
                .waits
                .push(format!("waits for the ledger in store {ledger}{why}"));
            false
        }
        keys::Outcome::Lost(problem) => {
            problems.push(problem);
            false
        }
    };
    let certified = certify(observed, grows, now, &mut state, &mut steps);
    if lawful.config.is_none() && problems.is_empty() {
        state
            .waits
            .push("waits for the instances of the stores that it names".to_owned());
    }
    furnish(
        observed,
        &lawful,
        settings,
        grows && equipped && certified,
        deleted,
        &mut steps,
    );
    if grows {
        bind(observed, &mut problems, &mut steps);
    }
    let draft = assess::assess(observed, &lawful, &state, &problems);
    Plan { steps, draft }
}

/// Whether a workflow that is being deleted may go: nothing is open, or never was, or a person says so.
fn may_go(observed: &Observed) -> bool {
    let workflow = &observed.workflow;
    let abandoned = workflow.annotations().get(labels::ABANDON_REQUESTS);
    if abandoned.is_some_and(|v| v == "true") {
        return true;
    }
    let ours = |f: &String| f == labels::RIGHTS_FINALIZER;
    if !workflow.finalizers().iter().any(ours) {
        return true;
    }
    let ledger = observed.stores.get(&workflow.spec.ledger_ref.name);
    // Without a ledger there is nothing to wait for; and before there were keys, nothing was taken in.
    if ledger.is_none() || observed.keys.is_none() {
        return true;
    }
    let gateways = observed.gateways() > 0;
    match &observed.reading {
        // Read since the last gateway went: see `observe`.
        Reading::Known(tally) => tally.open == 0 && (!gateways || observed.namespace_ending),
        // Nobody can ask a ledger any more whose pods went with the namespace: its last word counts.
        Reading::Failed {
            last: Some(tally), ..
        } => observed.namespace_ending && tally.open == 0,
        Reading::Failed { last: None, .. } | Reading::Never => {
            let said = workflow.status.as_ref().and_then(|s| s.backlog.as_ref());
            observed.namespace_ending && said.is_some_and(|b| b.open == 0)
        }
    }
}

/// Deletion: what others hold for it is taken back, then it may go. Everything else has it as owner, but for its keys,
/// which stay with the ledger.
fn farewell(observed: &Observed) -> Vec<Step> {
    let workflow = &observed.workflow;
    let ours = |f: &String| f == labels::RIGHTS_FINALIZER;
    if !workflow.finalizers().iter().any(ours) {
        return Vec::new();
    }
    let mut steps: Vec<Step> = granted(observed)
        .map(|(store, uid)| Step::WithdrawAccess { store, uid })
        .collect();
    if let Some(binding) = observed.binding.as_ref().filter(|b| b.ours) {
        steps.push(Step::UnbindGateway {
            uid: binding.uid.clone(),
        });
    }
    steps.push(Step::RemoveFinalizer);
    steps
}

/// The stores on which something is said for this workflow, with their uids.
fn granted(observed: &Observed) -> impl Iterator<Item = (String, String)> {
    let name = observed.workflow.name_any();
    observed.stores.values().filter_map(move |store| {
        let rights = &store.status.as_ref()?.rights;
        rights.iter().find(|r| r.workflow == name)?;
        Some((store.name_any(), store.uid()?))
    })
}

/// Tells the stores what is needed of them, and those of which nothing is any more.
fn grant(observed: &Observed, lawful: &Lawful<'_>, steps: &mut Vec<Step>) {
    let name = observed.workflow.name_any();
    for (store, wanted) in &lawful.access {
        let Some(found) = observed.stores.get(store) else {
            continue;
        };
        let said = found.status.iter().flat_map(|s| &s.rights);
        let said = said.into_iter().find(|r| r.workflow == name);
        if said != Some(wanted)
            && let Some(uid) = found.uid()
        {
            steps.push(Step::GrantAccess {
                store: store.clone(),
                uid,
                access: Box::new(wanted.clone()),
            });
        }
    }
    let not_any_more = granted(observed).filter(|(store, _)| !lawful.access.contains_key(store));
    steps.extend(not_any_more.map(|(store, uid)| Step::WithdrawAccess { store, uid }));
}

/// Keys and certificates of a workflow that runs.
fn upkeep(observed: &Observed, now: Timestamp, steps: &mut Vec<Step>) {
    let name = observed.workflow.name_any();
    keys::keep(&name, observed.keys.as_ref(), &observed.reading, now, steps);
    certify(observed, false, now, &mut State::default(), steps);
}

/// Stops what runs where it may not. A Deployment doesn't bring it back there: its affinity is required.
fn evict(observed: &Observed, lawful: &Lawful<'_>, state: &mut State, steps: &mut Vec<Step>) {
    let finder = Finder {
        permissions: &lawful.permissions,
        regions: observed.regions.iter().map(AsRef::as_ref).collect(),
        nodes: &observed.nodes,
    };
    for pod in &observed.pods {
        let name = pod.name_any();
        let component = pod.labels().get(labels::COMPONENT).map(String::as_str);
        let data = match component {
            Some(GATEWAY) => Data::Gateway,
            Some(WORKER) => Data::Worker,
            // Somebody's own pod may carry a workflow's label too.
            _ => continue,
        };
        let node = pod.spec.as_ref().and_then(|s| s.node_name.as_deref());
        let Some(node) = node.filter(|n| !n.is_empty()) else {
            continue;
        };
        match finder.on(node, data) {
            Verdict::Within => {}
            Verdict::Unknown(words) => state.unsure.push(format!("{name} is bound to {words}")),
            Verdict::Outside(words) => {
                state.outside.push(format!("{name} is on {words}"));
                if lingers(pod) {
                    steps.push(Step::Tell {
                        reason: reasons::FENCED,
                        note: format!("{name} is stopped: it is on {words}"),
                    });
                    steps.push(Step::Fence {
                        name,
                        uid: pod.uid().unwrap_or_default(),
                    });
                }
            }
        }
    }
}

/// The certificates of a workflow.
#[must_use]
pub fn certificates(observed: &Observed) -> Vec<Certificate> {
    let workflow = &observed.workflow;
    let name = workflow.name_any();
    let ledger = &workflow.spec.ledger_ref.name;
    let client = |secret: String, store: &str, role: Role| Certificate {
        secret,
        store: store.to_owned(),
        common_name: names::role(&name, role),
        names: Vec::new(),
        purpose: Use::Client,
    };
    let service = names::gateway_service(&name);
    let namespace = workflow.namespace().unwrap_or_default();
    let mut all = vec![
        client(names::gateway_tls(&name), ledger, Role::Gateway),
        Certificate {
            secret: names::serving(&name),
            store: ledger.clone(),
            common_name: service.clone(),
            names: service_names(&[service], &namespace),
            purpose: Use::Server,
        },
    ];
    let stores = super::observe::named_stores(workflow);
    all.extend(
        stores
            .into_iter()
            .map(|store| client(names::worker_tls(&name, store), store, Role::Worker)),
    );
    all
}

/// Issues what is missing (only if it `grows`) and renews what ends. Whether all that pods need is there or on its way.
fn certify(
    observed: &Observed,
    grows: bool,
    now: Timestamp,
    state: &mut State,
    steps: &mut Vec<Step>,
) -> bool {
    let mut whole = true;
    let mut waited = BTreeSet::new();
    for wanted in certificates(observed) {
        let facts = observed.certificates.get(&wanted.secret);
        let signers = observed.authorities.get(&wanted.store);
        let store = observed.stores.get(&wanted.store);
        let (Some(signers), Some(store)) = (signers, store) else {
            if facts.is_none() {
                whole = false;
                if waited.insert(wanted.store.clone()) {
                    state.waits.push(format!(
                        "waits for the certificate authority of store {}",
                        wanted.store
                    ));
                }
            }
            continue;
        };
        let active = &signers.known.active.id;
        let trusted = rotation::trusted_by_all(store, active);
        match facts {
            None if grows => steps.push(Step::IssueCertificate(wanted)),
            None => whole = false,
            Some(facts) if facts.outdated(now, active, trusted, &wanted.names) => {
                steps.push(Step::IssueCertificate(wanted));
            }
            Some(facts) if facts.bundle != signers.known.bundle => {
                steps.push(Step::Entrust(wanted));
            }
            Some(_) => {}
        }
    }
    whole
}

/// Brings the workflow's other objects to what they should be. Makes none, unless it `grows`.
fn furnish(
    observed: &Observed,
    lawful: &Lawful<'_>,
    settings: &Settings,
    grows: bool,
    closed: bool,
    steps: &mut Vec<Step>,
) {
    let workflow = &observed.workflow;
    let name = workflow.name_any();
    let signers = observed.authorities.get(&workflow.spec.ledger_ref.name);
    let there = |kind: ChildKind, name: String| observed.children.get(&(kind, name));
    let ca = signers.map(|s| s.bundle.clone()).or_else(|| {
        let found = there(ChildKind::ConfigMap, names::gateway_ca(&name))?;
        Some(found.data["data"]["ca.crt"].as_str()?.to_owned())
    });
    let Some(authorities) = ca else {
        return;
    };
    // What is there stays in force while nobody can say what should be.
    let config = match &lawful.config {
        Some(config) => build::config_text(config).ok(),
        None => there(ChildKind::ConfigMap, names::config(&name))
            .and_then(|found| found.data["data"][CONFIG_KEY].as_str().map(str::to_owned)),
    };
    let input = build::Input {
        workflow,
        lawful,
        regions: &observed.regions,
        settings,
        config,
        authorities: &authorities,
        closed,
    };
    let wanted = build::children(&input);
    for (kind, wanted) in &wanted {
        match observed.children.get(&(*kind, wanted.name_any())) {
            None if grows => steps.push(create(workflow.spec.gateway.replicas.min, *kind, wanted)),
            None => {}
            Some(found) if found.metadata.deletion_timestamp.is_some() => {}
            Some(found) if objects::differs(wanted, found) => {
                let mut wanted = wanted.clone();
                wanted.metadata.uid.clone_from(&found.metadata.uid);
                steps.push(Step::Update(*kind, Box::new(wanted)));
            }
            Some(_) => {}
        }
    }
    if input.config.is_some() {
        remove(observed, lawful, &wanted, steps);
    }
}

fn create(replicas: i32, kind: ChildKind, wanted: &DynamicObject) -> Step {
    let mut value = objects::complete(&kind.resource(), wanted);
    if kind == ChildKind::Deployment {
        value = pods::with_replicas(value, replicas);
    }
    Step::Create(kind, Box::new(value))
}

/// Removes what isn't wanted any more: the pool of a region, the autoscaler, certificates for a store that is no target.
fn remove(
    observed: &Observed,
    lawful: &Lawful<'_>,
    wanted: &[(ChildKind, DynamicObject)],
    steps: &mut Vec<Step>,
) {
    let wanted: BTreeSet<(ChildKind, String)> = wanted
        .iter()
        .map(|(kind, object)| (*kind, object.name_any()))
        .collect();
    for ((kind, name), found) in &observed.children {
        let removable = matches!(
            kind,
            ChildKind::Deployment
                | ChildKind::PodDisruptionBudget
                | ChildKind::HorizontalPodAutoscaler
        );
        let ours = found
            .labels()
            .get(labels::MANAGED_BY)
            .is_some_and(|v| v == labels::MANAGED_BY_VALUE);
        if removable
            && ours
            && found.metadata.deletion_timestamp.is_none()
            && !wanted.contains(&(*kind, name.clone()))
        {
            steps.push(Step::Delete {
                object: Object::Child(*kind),
                name: name.clone(),
                uid: found.metadata.uid.clone().unwrap_or_default(),
            });
        }
    }
    if !lawful.problems.is_empty() {
        return;
    }
    let needed: BTreeSet<String> = certificates(observed)
        .into_iter()
        .map(|c| c.secret)
        .collect();
    let unneeded: BTreeMap<&String, &String> = observed
        .secrets
        .iter()
        .filter(|(name, _)| observed.certificates.contains_key(*name) && !needed.contains(*name))
        .collect();
    for (name, uid) in unneeded {
        steps.push(Step::Delete {
            object: Object::Secret,
            name: name.clone(),
            uid: uid.clone(),
        });
    }
}

/// The gateway's right to ask about tokens.
fn bind(observed: &Observed, problems: &mut Vec<Problem>, steps: &mut Vec<Step>) {
    match &observed.binding {
        None => steps.push(Step::BindGateway),
        Some(binding) if binding.right => {}
        Some(binding) if binding.ours => {
            // Who is bound can't be changed in place without the right to change every binding.
            steps.push(Step::UnbindGateway {
                uid: binding.uid.clone(),
            });
            steps.push(Step::BindGateway);
        }
        Some(_) => {
            let namespace = observed.workflow.namespace().unwrap_or_default();
            let name = names::gateway_binding(&namespace, &observed.workflow.name_any());
            problems.push(Problem {
                reason: reasons::NAME_TAKEN,
                message: format!(
                    "ClusterRoleBinding {name} exists and is not this workflow's: remove it, so that its gateway can be bound"
                ),
            });
        }
    }
}
