//! `kubectl domicile status STORE`: regions, zones, roles and lag at one glance.
//!
//! Owns the picture. Lag comes from the primary itself, through the API server's pod proxy; without the
//! right to use it, everything else is still shown.

use anyhow::Context as _;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Condition;
use kube::{Api, Client, ResourceExt};
use std::fmt::Write as _;
use std::time::Duration;

use crate::api::privacy_data_store::InstanceStatus;
use crate::api::residency_policy::Data;
use crate::api::{PrivacyDataStore, Region, ResidencyPolicy, names};
use crate::instance::status::{Replica, Status};
use crate::residency::Permissions;

/// How long the primary has to answer.
const ASK: Duration = Duration::from_secs(3);

/// What was read.
#[derive(Clone, Debug)]
pub struct Picture {
    /// The store.
    pub store: PrivacyDataStore,
    /// What its policy permits; `None` if that couldn't be read.
    pub permissions: Option<Permissions>,
    /// What the primary says, or why it can't be asked.
    pub primary: Result<Status, String>,
}

/// Reads and prints.
///
/// # Errors
/// If the store can't be read.
pub async fn run(client: Client, namespace: &str, name: &str) -> anyhow::Result<String> {
    Ok(render(&look(client, namespace, name).await?))
}

/// The store.
pub(super) async fn get(
    client: &Client,
    namespace: &str,
    name: &str,
) -> anyhow::Result<PrivacyDataStore> {
    let stores: Api<PrivacyDataStore> = Api::namespaced(client.clone(), namespace);
    let Some(store) = stores
        .get_opt(name)
        .await
        .context("the API server can't be asked")?
    else {
        anyhow::bail!(
            "there is no PrivacyDataStore {name} in namespace {namespace}; `kubectl get pds -A` lists all"
        );
    };
    Ok(store)
}

async fn look(client: Client, namespace: &str, name: &str) -> anyhow::Result<Picture> {
    let store = get(&client, namespace, name).await?;
    let policies: Api<ResidencyPolicy> = Api::all(client.clone());
    let regions: Api<Region> = Api::all(client.clone());
    let permissions = match (
        policies.get(&store.spec.residency_policy_ref.name).await,
        regions.list(&Default::default()).await,
    ) {
        (Ok(policy), Ok(regions)) => Some(Permissions::resolve(&policy, &regions.items)),
        _ => None,
    };
    let primary = match store.status.as_ref().and_then(|s| s.primary.clone()) {
        Some(primary) => ask(&client, namespace, &primary).await,
        None => Err("there is no primary yet".to_owned()),
    };
    Ok(Picture {
        store,
        permissions,
        primary,
    })
}

/// What an instance says of itself.
pub(super) async fn ask(client: &Client, namespace: &str, pod: &str) -> Result<Status, String> {
    let path = format!(
        "/api/v1/namespaces/{namespace}/pods/{pod}:{}/proxy/status",
        names::HTTP_PORT
    );
    let request = axum::http::Request::get(path)
        .body(Vec::new())
        .map_err(|e| e.to_string())?;
    match tokio::time::timeout(ASK, client.request::<Status>(request)).await {
        Ok(Ok(status)) => Ok(status),
        Ok(Err(kube::Error::Api(status))) if status.is_forbidden() => {
            Err("you may not use pods/proxy here, so lag can't be shown".to_owned())
        }
        Ok(Err(error)) => Err(format!("{pod} can't be asked: {error}")),
        Err(_) => Err(format!("{pod} doesn't answer within {} s", ASK.as_secs())),
    }
}

/// The picture as text.
#[must_use]
pub fn render(picture: &Picture) -> String {
    let store = &picture.store;
    let status = store.status.clone().unwrap_or_default();
    let mut out = String::new();
    let or = |value: Option<&str>| value.unwrap_or("-").to_owned();
    // Writing to a String can't fail.
    let _ = writeln!(
        out,
        "{}/{}  {} instances ready",
        store.namespace().unwrap_or_default(),
        store.name_any(),
        or(status.summary.as_deref())
    );
    let _ = writeln!(
        out,
        "  policy   {}{}",
        store.spec.residency_policy_ref.name,
        permitted(picture)
    );
    let term = status
        .term
        .map_or_else(|| "-".to_owned(), |t| t.to_string());
    let _ = writeln!(
        out,
        "  primary  {} (term {term})",
        or(status.primary.as_deref())
    );
    match picture.primary.as_ref().map(|p| p.synchronous.as_ref()) {
        Ok(Some(rule)) => {
            let force = if rule.in_force {
                ""
            } else {
                ", NOT in force yet"
            };
            let _ = writeln!(
                out,
                "  commits  wait for {} of {}{force}",
                rule.acks,
                if rule.members.is_empty() {
                    "none".to_owned()
                } else {
                    rule.members.join(", ")
                }
            );
        }
        Ok(None) => {}
        Err(why) => {
            let _ = writeln!(out, "  lag      unknown: {why}");
        }
    }
    out.push('\n');
    out.push_str(&table(picture, &status.instances));
    out.push('\n');
    for condition in &status.conditions {
        let _ = writeln!(out, "  {}", line(condition));
    }
    out
}

fn permitted(picture: &Picture) -> String {
    let Some(permissions) = &picture.permissions else {
        return "  (can't be read)".to_owned();
    };
    let list = |data| permissions.regions(data).collect::<Vec<_>>().join(", ");
    format!(
        "  (primary: {}; standby: {})",
        list(Data::Primary),
        list(Data::Standby)
    )
}

fn line(condition: &Condition) -> String {
    let message = if condition.message.is_empty() {
        String::new()
    } else {
        format!("  {}", condition.message)
    };
    format!(
        "{:<12}{:<8}{}{message}",
        condition.type_, condition.status, condition.reason
    )
}

/// The role, and what sets an instance apart: fenced, going, or with another term than its store's.
fn role(instance: &InstanceStatus, store_term: Option<i64>) -> String {
    let mut words = instance
        .role
        .map_or_else(|| "-".to_owned(), |r| format!("{r:?}"));
    if instance.fenced == Some(true) {
        words.push_str(", fenced");
    }
    if instance.leaving == Some(true) {
        words.push_str(", leaving");
    }
    if let Some(term) = instance.term.filter(|t| Some(*t) != store_term) {
        let _ = write!(words, " (term {term})");
    }
    words
}

fn table(picture: &Picture, instances: &[InstanceStatus]) -> String {
    let store_term = picture.store.status.as_ref().and_then(|s| s.term);
    let mut instances = instances.to_vec();
    instances.sort_by(|a, b| (&a.region, &a.zone, &a.name).cmp(&(&b.region, &b.zone, &b.name)));
    let mut rows = vec![
        [
            "REGION",
            "ZONE",
            "INSTANCE",
            "NODE",
            "ROLE",
            "READY",
            "REPLICATION",
            "LAG",
        ]
        .map(str::to_owned),
    ];
    let mut last = None;
    for instance in &instances {
        let region = instance.region.clone().unwrap_or_else(|| "?".to_owned());
        let replica = picture
            .primary
            .as_ref()
            .ok()
            .and_then(|p| p.replication.iter().find(|r| r.name == instance.name));
        let role = role(instance, store_term);
        rows.push([
            if last.as_ref() == Some(&region) {
                String::new()
            } else {
                region.clone()
            },
            instance.zone.clone().unwrap_or_else(|| "-".to_owned()),
            instance.name.clone(),
            instance.node.clone().unwrap_or_else(|| "-".to_owned()),
            role,
            match instance.ready {
                Some(true) => "yes",
                _ => "no",
            }
            .to_owned(),
            replica.map_or_else(|| "-".to_owned(), |r| format!("{} ({})", r.state, r.sync)),
            replica.map_or_else(|| "-".to_owned(), lag),
        ]);
        last = Some(region);
    }
    let mut out = columns(&rows);
    for instance in instances.iter().filter(|i| i.ready != Some(true)) {
        if let Some(message) = instance.message.as_deref().filter(|m| !m.is_empty()) {
            let _ = writeln!(out, "  {}: {message}", instance.name);
        }
    }
    out
}

fn lag(replica: &Replica) -> String {
    let bytes = replica.lag_bytes.max(0);
    let amount = match bytes {
        0..=1023 => format!("{bytes} B"),
        1024..=1_048_575 => format!("{} KiB", bytes / 1024),
        _ => format!("{} MiB", bytes / 1_048_576),
    };
    match replica.lag_seconds {
        Some(seconds) => format!("{amount}, {:.1} ms", seconds * 1000.0),
        None => amount,
    }
}

/// Rows as columns of equal width.
pub(super) fn columns<const N: usize>(rows: &[[String; N]]) -> String {
    let widths: Vec<usize> = (0..N)
        .map(|i| rows.iter().map(|r| r[i].chars().count()).max().unwrap_or(0))
        .collect();
    let mut out = String::new();
    for row in rows {
        let cells: Vec<String> = row
            .iter()
            .zip(&widths)
            .map(|(cell, width)| format!("{cell:<width$}"))
            .collect();
        let _ = writeln!(out, "  {}", cells.join("  ").trim_end());
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::api::privacy_data_store::{
        InstanceRole, PrivacyDataStoreSpec, PrivacyDataStoreStatus,
    };
    use crate::instance::status::Synchronous;

    #[test]
    fn the_picture() {
        let spec: PrivacyDataStoreSpec = serde_json::from_value(serde_json::json!({
            "residencyPolicyRef": { "name": "records" }, "storage": { "size": "1Gi" },
            "placement": [{ "region": "us-west", "instances": 1 }, { "region": "us-east", "instances": 1 }],
        }))
        .unwrap();
        let mut store = PrivacyDataStore::new("consumers", spec);
        store.metadata.namespace = Some("records".into());
        let instance = |name: &str, region: &str, role| InstanceStatus {
            name: name.into(),
            region: Some(region.into()),
            zone: Some(format!("{region}-a")),
            node: Some("n".into()),
            role: Some(role),
            term: Some(if role == InstanceRole::Primary { 1 } else { 7 }),
            fenced: (role == InstanceRole::Starting).then_some(true),
            ready: Some(role == InstanceRole::Primary),
            message: Some("following".into()),
            ..Default::default()
        };
        store.status = Some(PrivacyDataStoreStatus {
            summary: Some("1/2".into()),
            term: Some(1),
            primary: Some("consumers-1".into()),
            instances: vec![
                instance("consumers-1", "us-west", InstanceRole::Primary),
                instance("consumers-2", "us-east", InstanceRole::Starting),
            ],
            ..Default::default()
        });
        let replica = Replica {
            name: "consumers-2".into(),
            state: "streaming".into(),
            sync: "quorum".into(),
            lag_bytes: 2048,
            lag_seconds: Some(0.0012),
        };
        let primary = Status {
            synchronous: Some(Synchronous {
                acks: 1,
                members: vec!["consumers-2".into()],
                in_force: true,
            }),
            replication: vec![replica],
            ..Status::default()
        };
        let shown = render(&Picture {
            store,
            permissions: None,
            primary: Ok(primary),
        });
        let expected = "\
records/consumers  1/2 instances ready
  policy   records  (can't be read)
  primary  consumers-1 (term 1)
  commits  wait for 1 of consumers-2

  REGION   ZONE       INSTANCE     NODE  ROLE                       READY  REPLICATION         LAG
  us-east  us-east-a  consumers-2  n     Starting, fenced (term 7)  no     streaming (quorum)  2 KiB, 1.2 ms
  us-west  us-west-a  consumers-1  n     Primary                    yes    -                   -
  consumers-2: following

";
        assert_eq!(shown, expected);
    }
}
