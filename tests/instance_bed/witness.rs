//! The witness's object in memory: compare-and-swap by uid and resourceVersion, and an API server that can be away.

use std::sync::{Arc, Mutex};

use anyhow::ensure;
use domicile::api::names::WITNESS_KEY;
use domicile::failover::Register;
use domicile::instance::store::Shelf;
use futures::FutureExt as _;
use futures::future::BoxFuture;
use k8s_openapi::api::core::v1::ConfigMap;

#[derive(Clone, Debug, Default)]
pub struct Witness(Arc<Mutex<State>>);

#[derive(Debug, Default)]
struct State {
    object: Option<ConfigMap>,
    version: u64,
    reads: u64,
    writes: u64,
    away: bool,
}

impl State {
    fn next(&mut self) -> Option<String> {
        self.version += 1;
        Some(self.version.to_string())
    }
}

impl Witness {
    /// As the operator makes it: empty.
    pub fn make(&self, uid: &str) {
        let mut state = self.0.lock().unwrap();
        let mut object = ConfigMap::default();
        object.metadata.uid = Some(uid.to_owned());
        object.metadata.resource_version = state.next();
        state.object = Some(object);
    }

    /// While away, the API server refuses.
    pub fn away(&self, away: bool) {
        self.0.lock().unwrap().away = away;
    }

    /// Reads and writes so far.
    pub fn count(&self) -> (u64, u64) {
        let state = self.0.lock().unwrap();
        (state.reads, state.writes)
    }

    pub fn register(&self) -> Option<Register<String>> {
        let state = self.0.lock().unwrap();
        let text = state.object.as_ref()?.data.as_ref()?.get(WITNESS_KEY)?;
        Some(serde_json::from_str(text).unwrap())
    }
}

impl Shelf for Witness {
    fn read(&self) -> BoxFuture<'_, anyhow::Result<Option<ConfigMap>>> {
        async {
            let mut state = self.0.lock().unwrap();
            ensure!(!state.away, "connection refused");
            state.reads += 1;
            Ok(state.object.clone())
        }
        .boxed()
    }

    fn replace(&self, mut object: ConfigMap) -> BoxFuture<'_, anyhow::Result<bool>> {
        async move {
            let mut state = self.0.lock().unwrap();
            ensure!(!state.away, "connection refused");
            let same = state.object.as_ref().is_some_and(|now| {
                now.metadata.uid == object.metadata.uid
                    && now.metadata.resource_version == object.metadata.resource_version
            });
            if same {
                object.metadata.resource_version = state.next();
                state.object = Some(object);
                state.writes += 1;
            }
            Ok(same)
        }
        .boxed()
    }
}
