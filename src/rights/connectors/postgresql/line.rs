//! A connection to the database, and the statements it has prepared.
//!
//! Owns which statements are prepared: those of which neither text nor cost depends on whom they concern. To plan them anew
//! each time was half of what one erasure cost the database. What erases and what reads a target's own tables is planned
//! for the people it concerns. Never: prepares behind an address that may be a pooler's, which may give each transaction
//! another server, where nothing is prepared.

use std::collections::HashMap;
use std::sync::Mutex;

use tokio_postgres::types::{ToSql, Type};
use tokio_postgres::{Error, Row, Statement};

use crate::rights::postgres::Session;

/// A statement's parameter, and its type.
pub type Parameter<'a> = (&'a (dyn ToSql + Sync), Type);

/// A connection.
pub struct Line {
    /// The session itself.
    pub session: Session,
    /// None: nothing is prepared.
    prepared: Option<Mutex<HashMap<&'static str, Statement>>>,
}

impl Line {
    /// `prepares`: whether the server at its other end is the same for as long as it lasts.
    pub fn new(session: Session, prepares: bool) -> Self {
        Self {
            session,
            prepared: prepares.then(Mutex::default),
        }
    }

    /// The rows of a statement of ours. Statements asked for together are sent together, in their
    /// order, once they are prepared.
    pub async fn rows(&self, sql: &'static str, of: &[Parameter<'_>]) -> Result<Vec<Row>, Error> {
        let client = &self.session.client;
        match self.statement(sql, of).await? {
            Some(statement) => client.query(&statement, &values(of)).await,
            None => client.query_typed(sql, of).await,
        }
    }

    /// The row of a statement that has exactly one.
    pub async fn row(&self, sql: &'static str, of: &[Parameter<'_>]) -> Result<Row, Error> {
        let client = &self.session.client;
        match self.statement(sql, of).await? {
            Some(statement) => client.query_one(&statement, &values(of)).await,
            None => client.query_typed_one(sql, of).await,
        }
    }

    async fn statement(
        &self,
        sql: &'static str,
        of: &[Parameter<'_>],
    ) -> Result<Option<Statement>, Error> {
        let Some(prepared) = &self.prepared else {
            return Ok(None);
        };
        let known = prepared.lock().ok().and_then(|p| p.get(sql).cloned());
        if known.is_some() {
            return Ok(known);
        }
        let types: Vec<Type> = of.iter().map(|(_, ty)| ty.clone()).collect();
        let statement = self.session.client.prepare_typed(sql, &types).await?;
        if let Ok(mut prepared) = prepared.lock() {
            prepared.insert(sql, statement.clone());
        }
        Ok(Some(statement))
    }
}

fn values<'a>(of: &[Parameter<'a>]) -> Vec<&'a (dyn ToSql + Sync)> {
    of.iter().map(|(value, _)| *value).collect()
}
