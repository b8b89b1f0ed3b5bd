//! From evidence to findings.
//!
//! Owns what each kind of evidence proves, and the words for what it doesn't. Pure, and independent of the order in
//! which evidence comes.
//! Never settles a doubt in favour of "within": a node that isn't known, a volume whose affinity names nodes of no
//! Region, an instance that didn't answer are Unknown; a stranger that streams is Outside, since it is nowhere.

use std::collections::{BTreeMap, BTreeSet};

use super::evidence::{EndpointSeen, Evidence, VolumeSeen};
use super::{
    Content, Finding, Kind, Observation, Place, PolicyRef, RegionRef, Source, Unobserved, Verdict,
    seal,
};
use crate::api::residency_policy::Data;
use crate::api::{Region, ResidencyPolicy, labels, names};
use crate::residency::violations::{Affinity, Requirement, reaching};
use crate::residency::{NodeFacts, Permissions, Whereabouts, locate};

/// Judges.
#[must_use]
pub fn judge(evidence: &Evidence<'_>) -> Content {
    let judge = Judge(evidence);
    let mut findings = Vec::new();
    let mut unobserved = standing();
    for (pod, node) in &evidence.bound {
        findings.push(judge.instance(pod, node));
    }
    for volume in &evidence.volumes {
        findings.push(judge.volume(volume));
    }
    let copies: BTreeMap<String, Finding> = findings
        .iter()
        .filter(|f| f.kind == Kind::Instance)
        .map(|f| (f.name.clone(), f.clone()))
        .collect();
    judge.channels(&copies, &mut findings, &mut unobserved);
    for endpoint in &evidence.endpoints {
        findings.push(judge.endpoint(endpoint, &copies));
    }
    findings.sort();
    unobserved.sort();
    // A primary that was not asked may have strangers streaming from it.
    let blind = unobserved.iter().any(|u| !u.standing);
    let worst = findings.iter().map(|f| f.verdict).max();
    let verdict = worst
        .unwrap_or(Verdict::Within)
        .max(if blind || evidence.policy.is_err() {
            Verdict::Unknown
        } else {
            Verdict::Within
        });
    Content {
        verdict,
        deleting: evidence.deleting,
        policy: evidence
            .policy
            .as_ref()
            .ok()
            .map(|(p, permissions)| policy_ref(p, permissions, evidence.regions.iter().copied())),
        not_applied: evidence.policy.as_ref().err().cloned(),
        regions: judge.region_refs(&findings),
        findings,
        unobserved,
    }
}

fn policy_ref<'a>(
    policy: &ResidencyPolicy,
    permissions: &Permissions,
    regions: impl IntoIterator<Item = &'a Region>,
) -> PolicyRef {
    PolicyRef {
        name: permissions.policy().to_owned(),
        uid: policy.metadata.uid.clone().unwrap_or_default(),
        generation: policy.metadata.generation.unwrap_or_default(),
        spec_digest: seal::digest(&policy.spec),
        basis: policy.spec.basis,
        citation: policy.spec.citation.clone().unwrap_or_default(),
        permits: permissions
            .published(regions)
            .into_iter()
            .map(Into::into)
            .collect(),
    }
}

/// What this version never observes. Said in every full entry: a reader must not take silence for absence.
fn standing() -> Vec<Unobserved> {
    let made_here = "Domicile makes none in this version, and doesn't look for those of others";
    [
        (
            Kind::CascadedStandby,
            "instances report who streams from the primary only; every instance takes the store's certificates",
        ),
        (
            Kind::LogicalReplication,
            "instances report physical replication only",
        ),
        (
            Kind::SqlClient,
            "who has the password or a dump, and where, can't be seen from here",
        ),
        (
            Kind::ForeignPod,
            "pods without the store's labels are not looked at",
        ),
        (Kind::Snapshot, made_here),
        (Kind::Backup, made_here),
        (Kind::Worker, made_here),
        (Kind::Gateway, made_here),
        (
            Kind::Sink,
            "where the cluster sends pods' logs and metrics can't be seen from here; Domicile puts no personal data into them",
        ),
    ]
    .map(|(kind, why)| Unobserved {
        kind,
        subject: None,
        why: why.to_owned(),
        standing: true,
    })
    .into()
}

struct Judge<'a>(&'a Evidence<'a>);

impl Judge<'_> {
    fn data_of(&self, name: &str) -> Data {
        if self.0.primary == Some(name) {
            Data::Primary
        } else {
            self.0.copy
        }
    }

    fn permitted(&self, data: Data, region: &str) -> (Verdict, Option<String>) {
        match &self.0.policy {
            Ok((_, permissions)) => Verdict::of(permissions.check(data, region)),
            Err(why) => (Verdict::Unknown, Some(why.clone())),
        }
    }

    fn instance(&self, pod: &str, node_name: &str) -> Finding {
        let data = self.data_of(pod);
        let mut observed = vec![Observation {
            by: Source::PodBinding,
            of: format!("pod {pod}"),
            says: format!("node {node_name}"),
        }];
        let mut place = Place {
            node: Some(node_name.to_owned()),
            ..Place::default()
        };
        let (verdict, because) = match self.0.nodes.iter().find(|n| n.name == node_name) {
            None => (
                Verdict::Unknown,
                Some(format!("there is no node {node_name} in the API")),
            ),
            Some(node) => {
                observed.extend(self.witnesses(node));
                place.zone = node.labels.get(labels::NODE_ZONE).cloned();
                let (region, verdict, because) = self.on(node, data);
                place.region = region;
                (verdict, because)
            }
        };
        Finding {
            kind: Kind::Instance,
            name: pod.to_owned(),
            data: Some(data),
            place,
            observed,
            verdict,
            because,
        }
    }

    fn whereabouts(&self, node: &NodeFacts) -> Whereabouts {
        locate(node, self.0.regions.iter().copied())
    }

    /// Whether this kind of data may be on this node.
    fn on(&self, node: &NodeFacts, data: Data) -> (Option<String>, Verdict, Option<String>) {
        match self.whereabouts(node) {
            Whereabouts::In(region) => {
                let (verdict, because) = self.permitted(data, &region);
                (Some(region), verdict, because)
            }
            Whereabouts::Unclaimed => {
                let words = format!("node {} is in no Region", node.name);
                (None, Verdict::Outside, Some(words))
            }
            Whereabouts::Disputed(regions) => {
                let words = format!(
                    "node {} is disputed by Regions {}",
                    node.name,
                    regions.join(", ")
                );
                (None, Verdict::Outside, Some(words))
            }
        }
    }

    /// What a node shows of where it is: the witnesses of its Region; of a node in none, what Regions usually name.
    fn witnesses(&self, node: &NodeFacts) -> Vec<Observation> {
        let region = self.whereabouts(node).region().map(str::to_owned);
        let spec = region.and_then(|name| {
            let found = self
                .0
                .regions
                .iter()
                .find(|r| r.metadata.name.as_ref() == Some(&name));
            found.map(|r| &r.spec.nodes)
        });
        let mut keys: BTreeSet<&str> = [labels::NODE_ZONE].into();
        match spec {
            Some(witnesses) => keys.extend(witnesses.labels.keys().map(String::as_str)),
            None => keys.extend([labels::NODE_TOPOLOGY_REGION]),
        }
        keys.remove(labels::NODE_REGION);
        let label = |key: &str| node.labels.get(key).map(|value| format!("{key}={value}"));
        let provider = spec
            .is_none_or(|s| s.provider_id_prefix.is_some())
            .then_some(node.provider_id.as_ref())
            .flatten();
        let mut seen: Vec<(Source, String)> = keys
            .into_iter()
            .filter_map(label)
            .map(|says| (Source::NodeLabel, says))
            .collect();
        seen.extend(label(labels::NODE_REGION).map(|says| (Source::NodeStamp, says)));
        seen.extend(provider.map(|id| (Source::ProviderId, id.clone())));
        seen.into_iter()
            .map(|(by, says)| Observation {
                by,
                of: format!("node {}", node.name),
                says,
            })
            .collect()
    }

    fn volume(&self, seen: &VolumeSeen) -> Finding {
        let data = self.data_of(&seen.claim);
        let of = format!("volume {}", seen.volume);
        let mut observed = vec![Observation {
            by: Source::VolumeClaim,
            of: format!("claim {}", seen.claim),
            says: of.clone(),
        }];
        let mut place = Place::default();
        let (verdict, because) = match &seen.affinity {
            Err(why) => (Verdict::Unknown, Some(why.clone())),
            Ok(None) => {
                let words = "it has no node affinity, so that where it is isn't said anywhere";
                (Verdict::Unknown, Some(words.to_owned()))
            }
            Ok(Some(terms)) => {
                let words: Vec<String> = terms
                    .iter()
                    .map(|t| t.iter().map(Requirement::words).collect::<Vec<_>>())
                    .map(|t| t.join(" and "))
                    .collect();
                observed.push(Observation {
                    by: Source::VolumeAffinity,
                    of,
                    says: words.join(", or "),
                });
                self.reachable(terms, data, &mut place, &mut observed)
            }
        };
        Finding {
            kind: Kind::Volume,
            name: seen.claim.clone(),
            data: Some(data),
            place,
            observed,
            verdict,
            because,
        }
    }

    /// Where a volume is, by the nodes that can reach it.
    fn reachable(
        &self,
        terms: &Affinity,
        data: Data,
        place: &mut Place,
        observed: &mut Vec<Observation>,
    ) -> (Verdict, Option<String>) {
        let Some(nodes) = reaching(terms, self.0.nodes) else {
            let words = "its node affinity uses an operator that isn't understood here";
            return (Verdict::Unknown, Some(words.to_owned()));
        };
        let all: Vec<_> = nodes.iter().map(|n| self.on(n, data)).collect();
        let regions: BTreeSet<Option<String>> = all.iter().map(|(r, _, _)| r.clone()).collect();
        if let [node] = nodes[..] {
            place.node = Some(node.name.clone());
            observed.extend(self.witnesses(node));
        }
        if let (1, Some(Some(region))) = (regions.len(), regions.first()) {
            place.region = Some(region.clone());
        }
        let zones: BTreeSet<_> = nodes
            .iter()
            .map(|n| n.labels.get(labels::NODE_ZONE))
            .collect();
        if let (1, Some(Some(zone))) = (zones.len(), zones.first()) {
            place.zone = Some((*zone).clone());
        }
        let worst = all.into_iter().max_by_key(|(_, verdict, _)| *verdict);
        match worst {
            None => {
                let words = "no node matches its node affinity now";
                (Verdict::Unknown, Some(words.to_owned()))
            }
            Some((_, verdict, because)) => (verdict, because),
        }
    }

    /// Who streams from the primary, and for whom WAL is held back.
    fn channels(
        &self,
        copies: &BTreeMap<String, Finding>,
        findings: &mut Vec<Finding>,
        unobserved: &mut Vec<Unobserved>,
    ) {
        for (instance, report) in &self.0.reports {
            let is_primary = self.0.primary == Some(instance.as_str());
            let missing = |kind, why: &str| Unobserved {
                kind,
                subject: Some(instance.clone()),
                why: why.to_owned(),
                standing: false,
            };
            match report {
                Err(why) => {
                    unobserved.push(missing(Kind::ReplicationSlot, why));
                    if is_primary {
                        unobserved.push(missing(Kind::Standby, why));
                    }
                }
                Ok(report) => {
                    if is_primary && report.streams.is_none() {
                        let why = "the primary doesn't say who streams from it: it has not taken over yet";
                        unobserved.push(missing(Kind::Standby, why));
                    }
                    for name in report.streams.iter().flatten() {
                        findings.push(self.standby(instance, name, copies));
                    }
                    for (slot, active) in &report.slots {
                        findings.push(self.slot(instance, slot, *active, copies));
                    }
                }
            }
        }
    }

    fn standby(&self, from: &str, name: &str, copies: &BTreeMap<String, Finding>) -> Finding {
        let ours = names::slot(self.0.store, name).is_some();
        let shown = if ours {
            name.to_owned()
        } else {
            stranger(name)
        };
        let observed = vec![Observation {
            by: Source::PgStatReplication,
            of: from.to_owned(),
            says: format!("{shown} streams"),
        }];
        let name = format!("{from} to {shown}");
        channel(Kind::Standby, name, &shown, ours, observed, copies)
    }

    fn slot(
        &self,
        on: &str,
        slot: &str,
        active: bool,
        copies: &BTreeMap<String, Finding>,
    ) -> Finding {
        let owner = copies
            .keys()
            .find(|name| names::replication_slot(name) == slot)
            .cloned()
            .or_else(|| self.owner_by_name(slot));
        let shown = owner
            .as_ref()
            .map_or_else(|| stranger(slot), |owner| names::replication_slot(owner));
        let use_words = if active { "in use" } else { "not in use" };
        let observed = vec![Observation {
            by: Source::PgReplicationSlots,
            of: on.to_owned(),
            says: format!("{shown} is {use_words}"),
        }];
        let name = format!("{shown} on {on}");
        let (verdict, because) = match &owner {
            // A slot that nobody uses moves nothing; its instance's pod is away.
            Some(owner) if !active && !copies.contains_key(owner) => (Verdict::Within, None),
            Some(owner) => {
                return channel(Kind::ReplicationSlot, name, owner, true, observed, copies);
            }
            None => {
                let words = "it is the slot of none of the store's instances: where its user is isn't known";
                let verdict = if active {
                    Verdict::Outside
                } else {
                    Verdict::Unknown
                };
                (verdict, Some(words.to_owned()))
            }
        };
        Finding {
            kind: Kind::ReplicationSlot,
            name,
            data: None,
            place: Place {
                leads_to: owner,
                ..Place::default()
            },
            observed,
            verdict,
            because,
        }
    }

    /// The instance of this store whose slot has this name, whether or not it runs.
    fn owner_by_name(&self, slot: &str) -> Option<String> {
        let prefix = names::replication_slot(self.0.store);
        let number = slot.strip_prefix(&prefix)?.strip_prefix('_')?;
        let name = format!("{}-{number}", self.0.store);
        names::slot(self.0.store, &name).map(|_| name)
    }

    fn endpoint(&self, seen: &EndpointSeen, copies: &BTreeMap<String, Finding>) -> Finding {
        let shown = seen.pod.clone().unwrap_or_else(|| stranger(&seen.address));
        let observed = vec![Observation {
            by: Source::EndpointSlice,
            of: format!("EndpointSlice {}", seen.slice),
            says: shown.clone(),
        }];
        let name = format!("{} to {shown}", seen.slice);
        let ours = seen.pod.is_some();
        channel(Kind::Endpoint, name, &shown, ours, observed, copies)
    }

    /// The Regions that bear on this: permitted ones, and those in which something was found.
    fn region_refs(&self, findings: &[Finding]) -> Vec<RegionRef> {
        let found: BTreeSet<&str> = findings
            .iter()
            .filter_map(|f| f.place.region.as_deref())
            .collect();
        let permitted = |name: &str| {
            self.0.policy.as_ref().is_ok_and(|(policy, permissions)| {
                let kinds = policy.spec.permits.iter().map(|p| p.data);
                kinds
                    .into_iter()
                    .any(|data| permissions.permits(data, name))
            })
        };
        let mut all: Vec<RegionRef> = self
            .0
            .regions
            .iter()
            .filter_map(|r| {
                let name = r.metadata.name.as_deref()?;
                (found.contains(name) || permitted(name)).then(|| RegionRef {
                    name: name.to_owned(),
                    uid: r.metadata.uid.clone().unwrap_or_default(),
                    generation: r.metadata.generation.unwrap_or_default(),
                    spec_digest: seal::digest(&r.spec),
                    jurisdictions: r.spec.jurisdictions.clone(),
                })
            })
            .collect();
        all.sort_by(|a, b| a.name.cmp(&b.name));
        all
    }
}

/// A channel is judged by the copy that it leads to.
fn channel(
    kind: Kind,
    name: String,
    to: &str,
    ours: bool,
    observed: Vec<Observation>,
    copies: &BTreeMap<String, Finding>,
) -> Finding {
    let copy = copies.get(to);
    let (verdict, because) = match copy {
        Some(copy) => (copy.verdict, copy.because.clone()),
        None if ours => (
            Verdict::Unknown,
            Some(format!("{to} is on no node that was seen")),
        ),
        None => (
            Verdict::Outside,
            Some(format!(
                "{to} is none of the store's instances: where it is isn't known"
            )),
        ),
    };
    Finding {
        kind,
        name,
        data: None,
        place: Place {
            leads_to: Some(to.to_owned()),
            ..copy.map(|c| c.place.clone()).unwrap_or_default()
        },
        observed,
        verdict,
        because,
    }
}

/// A name that Domicile didn't give may be a person's. The same name gives the same word.
fn stranger(name: &str) -> String {
    format!("stranger-{}", &seal::digest(&name)[..12])
}
