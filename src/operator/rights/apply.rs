//! Executes a plan's steps, in order, and stops at the first failure.
//!
//! Owns every write to a workflow's objects, and what only whoever holds a key can do.
//! Never decides, never deletes without a uid, never takes over an object that isn't this workflow's, never logs key
//! material, and never writes over a key that is there.

use anyhow::{Context as _, ensure};
use jiff::Timestamp;
use jiff::civil::Date;
use k8s_openapi::ByteString;
use k8s_openapi::api::core::v1::Secret;
use k8s_openapi::api::rbac::v1::ClusterRoleBinding;
use kube::api::{ApiResource, DynamicObject, Patch, PatchParams, PostParams};
use kube::{Api, Resource, ResourceExt};
use rand::RngCore;
use serde_json::{Value, json};
use std::collections::BTreeSet;

use super::build;
use super::keys::{self, BYTES, HASH};
use super::step::{Certificate, Object, Step};
use crate::api::names::rights as names;
use crate::api::privacy_data_store::RightsAccess;
use crate::api::{GROUP, PrivacyDataStore, RightsWorkflow, VERSION, labels};
use crate::operator::context::{Context, bounded};
use crate::operator::hands::{self, ApplyError, Hands, already_exists, is_not_found};
use crate::operator::store::certificates::{self, Pair};

/// Field manager of the finalizer alone, so that an apply of the status doesn't drop it.
const FINALIZER_MANAGER: &str = "domicile-operator-finalizer";

/// Executes `steps`.
///
/// # Errors
/// The first step that fails; those behind it are not tried, since each relies on those before it.
pub async fn apply(
    ctx: &Context,
    workflow: &RightsWorkflow,
    steps: &[Step],
) -> Result<(), ApplyError> {
    let writer = Writer {
        workflow,
        hands: Hands {
            ctx,
            resource: ApiResource::erase::<RightsWorkflow>(&()),
            what: "workflow",
            label: labels::WORKFLOW,
            meta: &workflow.metadata,
            reference: workflow.object_ref(&()),
        },
    };
    for step in steps {
        let (name, namespace) = (writer.hands.name(), writer.hands.namespace());
        tracing::info!(workflow = name, namespace, step = %step, "step");
        writer
            .run(step)
            .await
            .map_err(|source| ApplyError::new(step.to_string(), source))?;
    }
    Ok(())
}

struct Writer<'a> {
    workflow: &'a RightsWorkflow,
    hands: Hands<'a>,
}

impl Writer<'_> {
    async fn run(&self, step: &Step) -> anyhow::Result<()> {
        let hands = &self.hands;
        match step {
            Step::AddFinalizer => {
                hands
                    .add_finalizer(labels::RIGHTS_FINALIZER, FINALIZER_MANAGER)
                    .await
            }
            Step::RemoveFinalizer => hands.remove_finalizer(labels::RIGHTS_FINALIZER).await,
            Step::GrantAccess { store, uid, access } => self.say(store, uid, Some(access)).await,
            Step::WithdrawAccess { store, uid } => self.say(store, uid, None).await,
            Step::CreateKeys { epochs } => self.create_keys(epochs).await,
            Step::AddEpochs { epochs, version } => {
                self.change_keys(version, |data| {
                    for day in epochs {
                        data.entry(keys::epoch(*day)).or_insert_with(new_key);
                    }
                })
                .await
            }
            Step::DestroyEpochs { epochs, version } => {
                self.change_keys(version, |data| {
                    for day in epochs {
                        data.remove(&keys::epoch(*day));
                    }
                })
                .await
            }
            Step::IssueCertificate(wanted) => self.issue(wanted).await,
            Step::Entrust(wanted) => self.entrust(wanted).await,
            Step::Create(kind, value) => hands.create(&kind.resource(), value).await,
            Step::Update(kind, object) => hands.update(&kind.resource(), object).await,
            Step::Delete { object, name, uid } => {
                let resource = match object {
                    Object::Secret => ApiResource::erase::<Secret>(&()),
                    Object::Child(kind) => kind.resource(),
                };
                hands.delete(&resource, name, uid).await
            }
            Step::Fence { name, uid } => hands.fence(name, uid).await,
            Step::BindGateway => self.bind().await,
            Step::UnbindGateway { uid } => {
                let resource = ApiResource::erase::<ClusterRoleBinding>(&());
                let api: Api<DynamicObject> = Api::all_with(hands.ctx.client.clone(), &resource);
                hands::delete(&api, &self.binding(), uid).await
            }
            Step::Tell { reason, note } => {
                hands.tell(reason, true, note).await;
                Ok(())
            }
        }
    }

    fn binding(&self) -> String {
        names::gateway_binding(self.hands.namespace(), self.hands.name())
    }

    /// What a store's status says of this workflow. Under a field manager of its own, so that it is taken back as a whole
    /// and nothing else of the status with it.
    async fn say(
        &self,
        store: &str,
        uid: &str,
        access: Option<&RightsAccess>,
    ) -> anyhow::Result<()> {
        let hands = &self.hands;
        let stores: Api<PrivacyDataStore> =
            Api::namespaced(hands.ctx.client.clone(), hands.namespace());
        let status = access.map_or_else(|| json!({}), |access| json!({ "rights": [access] }));
        let patch = json!({
            "apiVersion": format!("{GROUP}/{VERSION}"), "kind": "PrivacyDataStore",
            // The uid: an apply would otherwise bring it onto a namesake.
            "metadata": { "uid": uid }, "status": status,
        });
        let params = PatchParams::apply(&names::field_manager(hands.name())).force();
        let done = bounded(
            "write the store's status",
            stores.patch_status(store, &params, &Patch::Apply(patch)),
        )
        .await;
        match done {
            // Gone: there is nothing to take back.
            Err(error) if access.is_none() && is_not_found(&error) => Ok(()),
            Err(error) => Err(error),
            Ok(_) => Ok(()),
        }
    }

    // --- keys

    async fn create_keys(&self, epochs: &BTreeSet<Date>) -> anyhow::Result<()> {
        let name = names::keys(self.hands.name());
        let metadata = build::metadata_of_kept(self.workflow, &name);
        let mut data = std::collections::BTreeMap::from([(HASH.to_owned(), new_key())]);
        data.extend(epochs.iter().map(|day| (keys::epoch(*day), new_key())));
        let value = json!({ "apiVersion": "v1", "kind": "Secret", "metadata": metadata, "type": "Opaque", "data": data });
        self.hands
            .create(&ApiResource::erase::<Secret>(&()), &value)
            .await
    }

    /// Changes the keys, if they are still those of this version.
    async fn change_keys(
        &self,
        version: &str,
        change: impl FnOnce(&mut std::collections::BTreeMap<String, ByteString>),
    ) -> anyhow::Result<()> {
        let name = names::keys(self.hands.name());
        let secrets = self.hands.secrets();
        let mut secret = bounded("read the keys", secrets.get(&name)).await?;
        self.hands
            .must_own("Secret", &name, secret.labels(), secret.owner_references())?;
        ensure!(
            secret.resource_version().as_deref() == Some(version),
            "the keys have changed meanwhile"
        );
        change(secret.data.get_or_insert_default());
        bounded(
            "replace the keys",
            // On the condition that they are still at this version, which the object carries.
            secrets.replace(&name, &PostParams::default(), &secret),
        )
        .await?;
        Ok(())
    }

    // --- certificates

    async fn issue(&self, wanted: &Certificate) -> anyhow::Result<()> {
        let signers = self.signers(&wanted.store).await?;
        let signer = certificates::pair(&signers, certificates::keys::ACTIVE)?;
        let pair = certificates::issue_for(
            wanted.purpose,
            &signer,
            &wanted.common_name,
            &wanted.names,
            Timestamp::now(),
        )?;
        self.put(wanted, certificates::bundle(&signers), pair).await
    }

    /// The authorities that are trusted now, beside the certificate that is there.
    async fn entrust(&self, wanted: &Certificate) -> anyhow::Result<()> {
        let bundle = certificates::bundle(&self.signers(&wanted.store).await?);
        let secrets = self.hands.secrets();
        let secret = bounded("read a certificate", secrets.get(&wanted.secret)).await?;
        let pair = certificates::pair(&secret, ("tls.crt", "tls.key"))?;
        self.put(wanted, bundle, pair).await
    }

    async fn signers(&self, store: &str) -> anyhow::Result<Secret> {
        let name = crate::api::names::ca_secret(store);
        bounded("read the authority", self.hands.secrets().get_opt(&name))
            .await?
            .with_context(|| format!("the authority of store {store} is gone"))
    }

    async fn put(&self, wanted: &Certificate, bundle: String, pair: Pair) -> anyhow::Result<()> {
        let content = [
            ("ca.crt", bundle),
            ("tls.crt", pair.certificate),
            ("tls.key", pair.key),
        ];
        let metadata = build::metadata(self.workflow, &wanted.secret, None);
        self.hands.put_secret(metadata, &content).await
    }

    // --- the gateway's right to ask about tokens

    async fn bind(&self) -> anyhow::Result<()> {
        let (name, namespace) = (self.hands.name(), self.hands.namespace());
        let mut metadata = json!({ "name": self.binding() });
        metadata["labels"] = json!(build::labels_of(name, Some(build::GATEWAY)));
        // No owner: one with a namespace can't have an object without. It goes with the finalizer.
        let value: Value = json!({
            "apiVersion": "rbac.authorization.k8s.io/v1", "kind": "ClusterRoleBinding",
            "metadata": metadata,
            "roleRef": {
                "apiGroup": "rbac.authorization.k8s.io", "kind": "ClusterRole", "name": names::GATEWAY_CLUSTER_ROLE,
            },
            "subjects": [{
                "kind": "ServiceAccount", "name": names::gateway(name), "namespace": namespace,
            }],
        });
        let binding: ClusterRoleBinding = serde_json::from_value(value)?;
        let api: Api<ClusterRoleBinding> = Api::all(self.hands.ctx.client.clone());
        let params = PostParams {
            field_manager: Some(crate::api::names::OPERATOR_FIELD_MANAGER.to_owned()),
            ..Default::default()
        };
        match bounded("bind the gateway", api.create(&params, &binding)).await {
            // Made just now by another pass: the next one looks whom it binds.
            Err(error) if !already_exists(&error) => Err(error),
            _ => Ok(()),
        }
    }
}

fn new_key() -> ByteString {
    let mut bytes = vec![0u8; BYTES];
    rand::rng().fill_bytes(&mut bytes);
    ByteString(bytes)
}
