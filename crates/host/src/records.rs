//! Typed records of the metadata store, and transactions over them whose outcome is always known.
//!
//! ```text
//!  txn ──► Yes ────────────────────────────► committed
//!   │ └──► Conflict ──► first try? ── yes ─► conflict
//!   │                       └─ no: read back: ours? ─► committed | conflict
//!   └────► Unknown ──► try the same txn again (its conditions fail if the first one got through)
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
use crate::meta::{Committed, Compare, Item, MetaStore, Op};

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

/// Between two tries of a transaction whose outcome is not known.
const RETRY_PAUSE: Duration = Duration::from_millis(200);

/// Tries before the caller is told that the outcome is not known.
const TRIES_MAX: u32 = 10;

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
        let mut doubtful = false;
        for _ in 0..TRIES_MAX {
            match meta.txn(self.compare.clone(), self.ops.clone()).await {
                Ok(Committed::Yes(_)) => return Ok(true),
                Ok(Committed::Conflict) if !doubtful => return Ok(false),
                Ok(Committed::Conflict) => return self.is_made(meta).await,
                Err(error) if error.kind() == ErrorKind::Unknown => {
                    doubtful = true;
                    tokio::time::sleep(RETRY_PAUSE).await;
                }
                // Refused before it was sent: nothing happened this time; an earlier try may have.
                Err(error) if doubtful && error.kind() == ErrorKind::Unavailable => {
                    tokio::time::sleep(RETRY_PAUSE).await;
                }
                Err(error) => return Err(error),
            }
        }
        Err(Error::new(ErrorKind::Unknown, "change metadata: the store did not say whether it did"))
    }

    /// As [`Change::commit`], with a conflict as an error of kind `Refused` about `what`.
    pub async fn commit_or_refuse(&self, meta: &dyn MetaStore, what: &str) -> Result<()> {
        if self.commit(meta).await? {
            return Ok(());
        }
        Err(Error::new(ErrorKind::Refused, format!("{what}: somebody else changed it at the same time"))
            .hint("look at it again, then repeat the command"))
    }

    /// Whether the store holds what this change writes.
    async fn is_made(&self, meta: &dyn MetaStore) -> Result<bool> {
        for op in &self.ops {
            let (key, wanted) = match op {
                Op::Put(key, value) => (key, Some(value)),
                Op::Delete(key) => (key, None),
            };
            let found = meta.get(key).await?;
            if found.as_ref().map(|item| &item.value) != wanted {
                return Ok(false);
            }
        }
        Ok(true)
    }
}

fn encode<T: Serialize>(key: &str, value: &T) -> Result<Vec<u8>> {
    serde_json::to_vec(value).map_err(|error| {
        Error::with_source(ErrorKind::Internal, format!("write metadata record {key}"), error)
    })
}
