//! `kubectl domicile rotate-authority`: another certificate authority for a store.
//!
//! Owns the asking, and the words about what follows. Asks only: the operator goes on as fast as instances and clients
//! allow. Never: has one begun while another is under way.

use std::time::Duration;

use anyhow::{anyhow, bail};
use kube::runtime::wait::await_condition;
use kube::{Api, Client};

use super::act::set;
use super::status::get;
use crate::api::conditions::{self, reasons};
use crate::api::{PrivacyDataStore, labels};
use crate::operator::store::rotation::clients_have;

/// How long the operator is waited for.
const PATIENCE: Duration = Duration::from_secs(30);

/// What `rotate-authority` is told.
#[derive(Clone, Debug, clap::Args)]
pub struct Rotate {
    /// How long clients have to read the next authority's certificate (ca.crt of the application's Secret) before servers
    /// show certificates that it signed, as 10m or 24h. Pods see a changed Secret within two minutes; clients that keep a
    /// copy of their own need longer.
    #[arg(long, default_value = "10m")]
    pub clients_have: String,
}

/// Asks, and waits until the operator has begun.
///
/// # Errors
/// In words: a time that is none, a rotation that is under way, a missing right, an operator that doesn't answer.
pub async fn rotate(
    client: Client,
    namespace: &str,
    name: &str,
    args: Rotate,
) -> anyhow::Result<String> {
    clients_have(&args.clients_have).map_err(|why| anyhow!("--clients-have: {why}"))?;
    let store = get(&client, namespace, name).await?;
    if let Some((reason, message)) = certified(&store)
        && reason == reasons::ROTATING
    {
        bail!("a rotation is under way: {message}");
    }
    let api: Api<PrivacyDataStore> = Api::namespaced(client, namespace);
    set(&api, store, labels::ROTATE_AUTHORITY, |_| {
        Some(args.clients_have.clone())
    })
    .await?;
    let over = |store: Option<&PrivacyDataStore>| {
        store.is_none_or(|s| {
            // Taken once it's under way. What is said then needn't be that: an end that is near is said first.
            let taken = !kube::ResourceExt::annotations(s).contains_key(labels::ROTATE_AUTHORITY);
            let said = certified(s);
            let news = said.as_ref().is_some_and(|(reason, _)| {
                [reasons::ROTATING, reasons::ENDS_SOON].contains(&reason.as_str())
            });
            taken && news
        })
    };
    match tokio::time::timeout(PATIENCE, await_condition(api, name, over)).await {
        Err(_) => bail!(
            "the operator has not begun within {} s: is it running, and what does it say in `kubectl describe pds {name}`? The request stands; take it back with `kubectl annotate pds {name} {}-`",
            PATIENCE.as_secs(),
            labels::ROTATE_AUTHORITY
        ),
        Ok(store) => {
            let said = store?.as_ref().and_then(certified);
            let message = said.map(|(_, message)| message).unwrap_or_default();
            Ok(format!(
                "begun: {message}\nfollow it with `kubectl domicile status {name}`, line Certified\n"
            ))
        }
    }
}

/// Reason and message of the condition Certified.
fn certified(store: &PrivacyDataStore) -> Option<(String, String)> {
    let conditions = &store.status.as_ref()?.conditions;
    let found = conditions
        .iter()
        .find(|c| c.type_ == conditions::CERTIFIED)?;
    Some((found.reason.clone(), found.message.clone()))
}
