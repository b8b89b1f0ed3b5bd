//! Reads the world of one workflow into a plain struct.
//!
//! Owns every read that a pass makes, but for the ledger's (`backlog`). Nodes, Regions and policies come from caches that
//! watches keep; what belongs to the workflow is listed afresh.
//! Never writes, never decides, and never reads a Secret that isn't Domicile's own: credentials of targets go from their
//! Secret into the workers' pods without passing here.

use k8s_openapi::api::core::v1::{Namespace, Pod, Secret};
use k8s_openapi::api::rbac::v1::ClusterRoleBinding;
use kube::api::{DynamicObject, ListParams};
use kube::{Api, ResourceExt};
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use super::backlog::Reading;
use super::keys;
use super::kinds::ChildKind;
use crate::api::{PrivacyDataStore, Region, ResidencyPolicy, RightsWorkflow, labels, names};
use crate::operator::context::{Context, bounded};
use crate::operator::store::certificates::{self, Authorities, Facts};
use crate::residency::NodeFacts;

/// What a pass knows.
#[derive(Clone, Debug)]
pub struct Observed {
    /// The workflow as it is now, not as the cache had it.
    pub workflow: Arc<RightsWorkflow>,
    /// Labels of its namespace.
    pub namespace_labels: BTreeMap<String, String>,
    /// Its namespace is being deleted: nothing can be made in it any more.
    pub namespace_ending: bool,
    /// The policy it refers to, if it exists.
    pub policy: Option<Arc<ResidencyPolicy>>,
    /// The policy that its namespace names as its ceiling, if it names one and that exists.
    pub ceiling: Option<Arc<ResidencyPolicy>>,
    /// Every Region.
    pub regions: Vec<Arc<Region>>,
    /// Every node.
    pub nodes: Vec<NodeFacts>,
    /// The stores of its namespace.
    pub stores: BTreeMap<String, Arc<PrivacyDataStore>>,
    /// The authorities of those stores that it names.
    pub authorities: BTreeMap<String, Signers>,
    /// The workflow's pods.
    pub pods: Vec<Pod>,
    /// The workflow's other objects, by kind and name.
    pub children: BTreeMap<(ChildKind, String), DynamicObject>,
    /// The keys, if their Secret exists.
    pub keys: Option<keys::Seen>,
    /// Certificates, by the name of their Secret.
    pub certificates: BTreeMap<String, Facts>,
    /// The workflow's Secrets, with their uids.
    pub secrets: BTreeMap<String, String>,
    /// The binding by which the gateway may ask about tokens.
    pub binding: Option<Binding>,
    /// What the ledger said.
    pub reading: Reading,
}

/// A store's authorities.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Signers {
    /// What is known of them.
    pub known: Authorities,
    /// All of their certificates, PEM.
    pub bundle: String,
}

/// A ClusterRoleBinding.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Binding {
    /// Its uid.
    pub uid: String,
    /// It binds this workflow's gateway to the role meant for it, and nobody else.
    pub right: bool,
    /// It carries our labels.
    pub ours: bool,
}

/// The stores that a workflow names.
#[must_use]
pub fn named_stores(workflow: &RightsWorkflow) -> BTreeSet<&str> {
    let targets = workflow.spec.targets.iter();
    let of_targets = targets
        .filter_map(|t| t.postgresql.as_ref()?.store_ref.as_ref())
        .map(|r| r.name.as_str());
    of_targets
        .chain(std::iter::once(workflow.spec.ledger_ref.name.as_str()))
        .collect()
}

/// Reads everything. `None`: the workflow is gone.
///
/// # Errors
/// If a read fails or takes too long; nothing has been changed then.
pub async fn observe(
    ctx: &Context,
    namespace: &str,
    name: &str,
) -> anyhow::Result<Option<Observed>> {
    let client = || ctx.client.clone();
    let workflows: Api<RightsWorkflow> = Api::namespaced(client(), namespace);
    let Some(workflow) = bounded("get the workflow", workflows.get_opt(name)).await? else {
        return Ok(None);
    };
    let ours = ListParams::default().labels(&format!("{}={name}", labels::WORKFLOW));
    let all = ListParams::default();
    let namespaces: Api<Namespace> = Api::all(client());
    let stores: Api<PrivacyDataStore> = Api::namespaced(client(), namespace);
    let pods: Api<Pod> = Api::namespaced(client(), namespace);
    let secrets: Api<Secret> = Api::namespaced(client(), namespace);
    let bindings: Api<ClusterRoleBinding> = Api::all(client());
    let binding = names::rights::gateway_binding(namespace, name);
    let (namespace_object, stores, pods, own_secrets, binding) = tokio::try_join!(
        bounded("get the namespace", namespaces.get_opt(namespace)),
        bounded("list stores", stores.list(&all)),
        bounded("list pods", pods.list(&ours)),
        bounded("list Secrets", secrets.list(&ours)),
        bounded("get the gateway's binding", bindings.get_opt(&binding)),
    )?;
    let kinds = ChildKind::ALL.into_iter().map(|kind| {
        let api: Api<DynamicObject> = Api::namespaced_with(client(), namespace, &kind.resource());
        let ours = &ours;
        async move {
            let all = bounded("list children", api.list(ours)).await?;
            anyhow::Ok((kind, all.items))
        }
    });
    let lists = futures::future::try_join_all(kinds).await?;
    let children = lists
        .into_iter()
        .flat_map(|(kind, all)| all.into_iter().map(move |o| ((kind, o.name_any()), o)))
        .collect();
    let mut authorities = BTreeMap::new();
    for store in named_stores(&workflow) {
        let secret = names::ca_secret(store);
        let secret = bounded("read an authority", secrets.get_opt(&secret)).await?;
        if let Some(secret) = secret.filter(|s| labelled(s, labels::STORE, store))
            && let Some(known) = certificates::authorities(&secret)
        {
            let bundle = certificates::bundle(&secret);
            authorities.insert(store.to_owned(), Signers { known, bundle });
        }
    }
    let policy = |name: &str| {
        let all = ctx.policies.state();
        all.into_iter().find(|p| p.name_any() == name)
    };
    let namespace_labels = namespace_object
        .as_ref()
        .map(|n| n.labels().clone())
        .unwrap_or_default();
    let mut regions = ctx.regions.state();
    // Caches iterate in random order; decisions must not depend on it.
    regions.sort_by_key(|r| r.name_any());
    let mut observed = Observed {
        namespace_ending: namespace_object
            .as_ref()
            .is_none_or(|n| n.metadata.deletion_timestamp.is_some()),
        policy: policy(&workflow.spec.residency_policy_ref.name),
        ceiling: namespace_labels
            .get(labels::RESIDENCY)
            .and_then(|name| policy(name)),
        namespace_labels,
        regions,
        nodes: ctx.node_facts(),
        stores: stores
            .into_iter()
            .map(|s| (s.name_any(), Arc::new(s)))
            .collect(),
        authorities,
        pods: pods.items,
        children,
        keys: None,
        certificates: BTreeMap::new(),
        secrets: BTreeMap::new(),
        binding: binding.map(|b| binding_seen(&b, namespace, name)),
        reading: ctx.backlogs.reading(workflow.uid().as_deref()),
        workflow: Arc::new(workflow),
    };
    for secret in own_secrets {
        observed.note_secret(&secret);
    }
    let deleted = observed.workflow.metadata.deletion_timestamp.is_some();
    if deleted && observed.gateways() == 0 && !observed.namespace_ending {
        // Whether it may go depends on the answer: not on one from before its last gateway went.
        let workflow = observed.workflow.clone();
        let store = observed.stores.get(&workflow.spec.ledger_ref.name);
        super::backlog::look(ctx, &workflow, store.map(AsRef::as_ref)).await;
        observed.reading = ctx.backlogs.last_attempt(workflow.uid().as_deref());
    }
    Ok(Some(observed))
}

fn labelled(secret: &Secret, label: &str, value: &str) -> bool {
    let found = secret.labels();
    found.get(label).is_some_and(|v| v == value)
        && found
            .get(labels::MANAGED_BY)
            .is_some_and(|v| v == labels::MANAGED_BY_VALUE)
}

fn binding_seen(binding: &ClusterRoleBinding, namespace: &str, workflow: &str) -> Binding {
    let account = names::rights::gateway(workflow);
    let right = binding.role_ref.kind == "ClusterRole"
        && binding.role_ref.name == names::rights::GATEWAY_CLUSTER_ROLE
        && matches!(
            binding.subjects.as_deref(),
            Some([only]) if only.kind == "ServiceAccount"
                && only.name == account
                && only.namespace.as_deref() == Some(namespace)
        );
    let found = binding.labels();
    Binding {
        uid: binding.uid().unwrap_or_default(),
        right,
        ours: found
            .get(labels::MANAGED_BY)
            .is_some_and(|v| v == labels::MANAGED_BY_VALUE)
            && found.get(labels::WORKFLOW).is_some_and(|v| v == workflow),
    }
}

impl Observed {
    /// How many of its gateways there are, ready or not.
    #[must_use]
    pub fn gateways(&self) -> usize {
        let all = self.pods.iter().filter(|p| {
            let component = p.labels().get(labels::COMPONENT);
            component.is_some_and(|c| c == super::build::GATEWAY)
        });
        all.count()
    }

    /// Keeps of a Secret what planning needs, and nothing that is secret.
    fn note_secret(&mut self, secret: &Secret) {
        let name = secret.name_any();
        self.secrets
            .insert(name.clone(), secret.uid().unwrap_or_default());
        if name == names::rights::keys(&self.workflow.name_any()) {
            self.keys = Some(keys::Seen::of(secret));
        } else if let Some(facts) = certificates::facts(secret, "tls.crt", "tls.key") {
            self.certificates.insert(name, facts);
        }
    }
}
