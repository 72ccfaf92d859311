//! Typed records of the metadata store, and transactions over them whose outcome is always known.
//!
//! ```text
//!  txn ──► Yes ──────────────────────────────────► committed
//!   │ └──► Conflict ─────────────────────────────► conflict
//!   └────► Unknown ──► the store is asked for the outcome by the transaction's name ([`meta::commit`])
//! ```
//!
//! Invariant: [`Change::commit`] never says "conflict" of a change that was made, nor "committed" of one that was
//! not. While the store cannot say, it returns an error and the caller must not act as if it knew.
//!
//! Not here: what the records mean (`wire::meta`), how they are stored ([`crate::meta`]).

use std::time::Duration;

use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::error::{Error, ErrorKind, Result};
use crate::meta::{self, Committed, Compare, Item, MetaStore, Op};

/// A record with the revision that a condition on it names.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Versioned<T> {
    /// Its key.
    pub key: String,
    /// The record.
    pub value: T,
    /// Revision of the transaction that wrote it.
    pub mod_rev: u64,
}

/// Reads a stored value as a record. A value that is not one is `Corrupt`.
pub fn parse<T: DeserializeOwned>(item: &Item) -> Result<Versioned<T>> {
    serde_json::from_slice(&item.value)
        .map(|value| Versioned { key: item.key.clone(), value, mod_rev: item.mod_rev })
        .map_err(|error| {
            Error::with_source(ErrorKind::Corrupt, format!("read metadata record {}", item.key), error)
        })
}

/// One record, if it exists.
pub async fn get<T: DeserializeOwned>(meta: &dyn MetaStore, key: &str) -> Result<Option<Versioned<T>>> {
    meta.get(key).await?.as_ref().map(parse).transpose()
}

/// One record that has to exist; `what` names it for people ("vm web").
pub async fn must<T: DeserializeOwned>(meta: &dyn MetaStore, key: &str, what: &str) -> Result<Versioned<T>> {
    get(meta, key)
        .await?
        .ok_or_else(|| Error::new(ErrorKind::NotFound, format!("find {what}: there is none")))
}

/// All records under a prefix. One that cannot be read is reported and left out, so that it hides no other.
pub async fn list<T: DeserializeOwned>(meta: &dyn MetaStore, prefix: &str) -> Result<Vec<Versioned<T>>> {
    let snapshot = meta.read(prefix).await?;
    let mut records = Vec::with_capacity(snapshot.items.len());
    for item in &snapshot.items {
        match parse(item) {
            Ok(record) => records.push(record),
            Err(error) => tracing::warn!(%error, "metadata record skipped"),
        }
    }
    Ok(records)
}

/// A transaction in the making.
#[derive(Clone, Debug, Default)]
pub struct Change {
    compare: Vec<Compare>,
    ops: Vec<Op>,
}

/// How long to go on asking the store for an outcome that it did not tell.
const PATIENCE: Duration = Duration::from_secs(5);

impl Change {
    /// Writes a record that must not exist yet.
    pub fn create<T: Serialize>(mut self, key: &str, value: &T) -> Result<Self> {
        self.compare.push(Compare::Absent(key.to_owned()));
        self.ops.push(Op::Put(key.to_owned(), encode(key, value)?));
        Ok(self)
    }

    /// Writes a record that must still be as it was read.
    pub fn replace<T: Serialize>(mut self, old: &Versioned<T>, value: &T) -> Result<Self> {
        self.compare.push(Compare::Unchanged(old.key.clone(), old.mod_rev));
        self.ops.push(Op::Put(old.key.clone(), encode(&old.key, value)?));
        Ok(self)
    }

    /// Removes a record that must still be as it was read.
    #[must_use]
    pub fn delete<T>(mut self, old: &Versioned<T>) -> Self {
        self.compare.push(Compare::Unchanged(old.key.clone(), old.mod_rev));
        self.ops.push(Op::Delete(old.key.clone()));
        self
    }

    /// Requires a record to be as it was read, without changing it.
    #[must_use]
    pub fn require<T>(mut self, old: &Versioned<T>) -> Self {
        self.compare.push(Compare::Unchanged(old.key.clone(), old.mod_rev));
        self
    }

    /// Makes the change; `Ok(false)` if a condition did not hold.
    pub async fn commit(&self, meta: &dyn MetaStore) -> Result<bool> {
        let committed = meta::commit(meta, self.compare.clone(), self.ops.clone(), PATIENCE).await?;
        Ok(matches!(committed, Committed::Yes(_)))
    }

    /// As [`Change::commit`], with a conflict as an error of kind `Refused` about `what`.
    pub async fn commit_or_refuse(&self, meta: &dyn MetaStore, what: &str) -> Result<()> {
        if self.commit(meta).await? {
            return Ok(());
        }
        Err(Error::new(ErrorKind::Refused, format!("{what}: somebody else changed it at the same time"))
            .hint("look at it again, then repeat the command"))
    }
}

fn encode<T: Serialize>(key: &str, value: &T) -> Result<Vec<u8>> {
    serde_json::to_vec(value).map_err(|error| {
        Error::with_source(ErrorKind::Internal, format!("write metadata record {key}"), error)
    })
}
