//! The provisioner of the StorageClass `local`: a folder per volume, on the node that the scheduler
//! chose.
//!
//! Watches claims and volumes, and survives the API server's absence. Owns the folders below each
//! node's `volumes`, and removes one only when its volume is released and says `Delete`. Never
//! removes a path outside them, whatever a volume says.

use crate::control;
use crate::layout::Layout;
use anyhow::{Context, Result};
use futures::StreamExt;
use k8s_openapi::api::core::v1::{ObjectReference, PersistentVolume, PersistentVolumeClaim};
use kube::api::{DeleteParams, ObjectMeta, PostParams, Preconditions};
use kube::runtime::controller::{Action, Controller};
use kube::runtime::watcher;
use kube::{Api, Client, ResourceExt};
use serde_json::json;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;
use tokio::signal::unix::{SignalKind, signal};

/// The name of the StorageClass.
pub const CLASS: &str = "local";
/// What the StorageClass calls us.
pub const NAME: &str = "testbed.domicile.dev/local";

const SELECTED_NODE: &str = "volume.kubernetes.io/selected-node";
const PROVISIONED_BY: &str = "pv.kubernetes.io/provisioned-by";

struct Shared {
    client: Client,
    layout: Layout,
}

/// A failure on the way; tried again later.
#[derive(Debug)]
struct Failure(anyhow::Error);

impl std::fmt::Display for Failure {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{:#}", self.0)
    }
}

impl std::error::Error for Failure {}

/// A name that a node can have, and so no path: tests make nodes beside those of the topology.
fn node_name(name: &str) -> Option<&str> {
    let ordinary = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '-' || c == '.';
    let is_one = name.starts_with(|c: char| c != '.' && ordinary(c)) && name.chars().all(ordinary);
    is_one.then_some(name)
}

/// The volume that a claim needs: `None` if it isn't ours to make, or not yet.
fn volume_for(
    layout: &Layout,
    claim: &PersistentVolumeClaim,
) -> Option<(PathBuf, PersistentVolume)> {
    let spec = claim.spec.as_ref()?;
    if spec.storage_class_name.as_deref() != Some(CLASS)
        || spec.volume_name.is_some()
        || claim.metadata.deletion_timestamp.is_some()
    {
        return None;
    }
    let node = node_name(claim.annotations().get(SELECTED_NODE)?)?;
    let uid = claim.metadata.uid.as_deref()?;
    let name = format!("pvc-{uid}");
    let path = layout.volumes(node).join(&name);
    let request = spec.resources.as_ref()?.requests.as_ref()?.get("storage")?;
    let volume = PersistentVolume {
        metadata: ObjectMeta {
            name: Some(name),
            annotations: Some([(PROVISIONED_BY.to_owned(), NAME.to_owned())].into()),
            ..ObjectMeta::default()
        },
        spec: serde_json::from_value(json!({
            "capacity": {"storage": request},
            "accessModes": spec.access_modes,
            "volumeMode": "Filesystem",
            "storageClassName": CLASS,
            "persistentVolumeReclaimPolicy": "Delete",
            "local": {"path": path},
            "claimRef": ObjectReference {
                api_version: Some("v1".into()),
                kind: Some("PersistentVolumeClaim".into()),
                namespace: claim.metadata.namespace.clone(),
                name: claim.metadata.name.clone(),
                uid: Some(uid.to_owned()),
                ..ObjectReference::default()
            },
            "nodeAffinity": {"required": {"nodeSelectorTerms": [{"matchExpressions": [
                {"key": "kubernetes.io/hostname", "operator": "In", "values": [node]},
            ]}]}},
        }))
        .ok()?,
        status: None,
    };
    Some((path, volume))
}

/// The folder of a volume that has to go: `None` if the volume isn't ours or stays.
fn folder_to_remove(layout: &Layout, volume: &PersistentVolume) -> Option<PathBuf> {
    let spec = volume.spec.as_ref()?;
    let released = volume.status.as_ref()?.phase.as_deref() == Some("Released");
    if !released
        || spec.persistent_volume_reclaim_policy.as_deref() != Some("Delete")
        || volume.annotations().get(PROVISIONED_BY).map(String::as_str) != Some(NAME)
    {
        return None;
    }
    let path = Path::new(&spec.local.as_ref()?.path);
    // Exactly one level below a node's volumes, and of the volume's own name.
    let node = path.parent()?.parent()?.file_name()?.to_str()?;
    let own = layout
        .volumes(node_name(node)?)
        .join(volume.metadata.name.as_deref()?);
    (own == path).then_some(own)
}

async fn provision(
    claim: Arc<PersistentVolumeClaim>,
    shared: Arc<Shared>,
) -> Result<Action, Failure> {
    let work = async {
        let Some((path, volume)) = volume_for(&shared.layout, &claim) else {
            return Ok(());
        };
        fs::create_dir_all(&path).with_context(|| format!("making {}", path.display()))?;
        let api: Api<PersistentVolume> = Api::all(shared.client.clone());
        match api.create(&PostParams::default(), &volume).await {
            Ok(made) => {
                say(&format!("made {} at {}", made.name_any(), path.display()));
                Ok(())
            }
            Err(kube::Error::Api(e)) if e.is_already_exists() => Ok(()),
            Err(e) => Err(e).context("creating a volume"),
        }
    };
    work.await.map_err(Failure)?;
    Ok(Action::await_change())
}

async fn reclaim(volume: Arc<PersistentVolume>, shared: Arc<Shared>) -> Result<Action, Failure> {
    let work = async {
        let Some(path) = folder_to_remove(&shared.layout, &volume) else {
            return Ok(());
        };
        match fs::remove_dir_all(&path) {
            Err(e) if e.kind() != std::io::ErrorKind::NotFound => {
                return Err(e).with_context(|| format!("removing {}", path.display()));
            }
            _ => {}
        }
        let api: Api<PersistentVolume> = Api::all(shared.client.clone());
        let only_this = Preconditions {
            uid: volume.metadata.uid.clone(),
            resource_version: None,
        };
        let parameters = DeleteParams {
            preconditions: Some(only_this),
            ..DeleteParams::default()
        };
        match api.delete(&volume.name_any(), &parameters).await {
            Ok(_) => {
                say(&format!(
                    "removed {} at {}",
                    volume.name_any(),
                    path.display()
                ));
                Ok(())
            }
            Err(kube::Error::Api(e)) if e.is_not_found() || e.is_conflict() => Ok(()),
            Err(e) => Err(e).context("deleting a volume"),
        }
    };
    work.await.map_err(Failure)?;
    Ok(Action::await_change())
}

#[allow(
    clippy::print_stdout,
    reason = "this daemon's standard output is its log file"
)]
fn say(what: &str) {
    println!("{} {what}", jiff::Timestamp::now());
}

fn try_again<T>(_: Arc<T>, error: &Failure, _: Arc<Shared>) -> Action {
    say(&format!("{error}"));
    Action::requeue(Duration::from_secs(2))
}

/// Runs until it is told to end.
///
/// # Errors
/// If there's no kubeconfig.
pub async fn serve(layout: &Layout) -> Result<()> {
    let client = control::client(&layout.kubeconfig()).await?;
    let shared = Arc::new(Shared {
        client: client.clone(),
        layout: layout.clone(),
    });
    let mut end = signal(SignalKind::terminate()).context("listening for SIGTERM")?;
    let claims = Controller::new(
        Api::<PersistentVolumeClaim>::all(client.clone()),
        watcher::Config::default(),
    )
    .run(provision, try_again, Arc::clone(&shared))
    .for_each(|_| async {});
    let volumes = Controller::new(
        Api::<PersistentVolume>::all(client),
        watcher::Config::default(),
    )
    .run(reclaim, try_again, shared)
    .for_each(|_| async {});
    tokio::select! {
        () = claims => {}
        () = volumes => {}
        _ = end.recv() => {}
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn layout() -> Layout {
        Layout::at(Path::new("/state"))
    }

    fn claim(node: Option<&str>) -> PersistentVolumeClaim {
        let mut claim: PersistentVolumeClaim = serde_json::from_value(json!({
            "metadata": {"name": "data", "namespace": "ns", "uid": "u-1"},
            "spec": {"storageClassName": "local", "accessModes": ["ReadWriteOnce"], "resources": {"requests": {"storage": "1Gi"}}},
        }))
        .unwrap();
        if let Some(n) = node {
            claim.metadata.annotations = Some([(SELECTED_NODE.to_owned(), n.to_owned())].into());
        }
        claim
    }

    #[test]
    fn a_volume_waits_for_the_scheduler_and_stays_on_its_node() {
        assert!(volume_for(&layout(), &claim(None)).is_none());
        for path in ["", ".", "../e1", "e1/..", "/e1"] {
            assert!(
                volume_for(&layout(), &claim(Some(path))).is_none(),
                "{path}"
            );
        }
        let (path, volume) = volume_for(&layout(), &claim(Some("e1"))).unwrap();
        assert_eq!(path, Path::new("/state/nodes/e1/volumes/pvc-u-1"));
        let text = serde_json::to_string(&volume).unwrap();
        assert!(
            text.contains(r#""values":["e1"]"#) && text.contains(r#""uid":"u-1""#),
            "{text}"
        );
        let mut bound = claim(Some("e1"));
        bound.spec.as_mut().unwrap().volume_name = Some("x".into());
        assert!(volume_for(&layout(), &bound).is_none());
    }

    #[test]
    fn only_released_folders_of_ours_are_removed() {
        let (path, mut volume) = volume_for(&layout(), &claim(Some("e1"))).unwrap();
        assert_eq!(folder_to_remove(&layout(), &volume), None);
        volume.status = serde_json::from_value(json!({"phase": "Released"})).unwrap();
        assert_eq!(folder_to_remove(&layout(), &volume), Some(path));
        let mut elsewhere = volume.clone();
        elsewhere
            .spec
            .as_mut()
            .unwrap()
            .local
            .as_mut()
            .unwrap()
            .path = "/state/nodes/e1/volumes/pvc-other".into();
        assert_eq!(folder_to_remove(&layout(), &elsewhere), None);
        let mut kept = volume;
        kept.spec.as_mut().unwrap().persistent_volume_reclaim_policy = Some("Retain".into());
        assert_eq!(folder_to_remove(&layout(), &kept), None);
    }
}
