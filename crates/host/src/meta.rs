//! The metadata store: one trait, one conformance suite, three back-ends.
//!
//! ```text
//!   MetaStore ── sqlite   one file, WAL, full sync; several agents of one machine may share it
//!             ── remote   the same store, served by the host that made the cluster, over mutual TLS
//!             ── etcd     for clusters that want no single point
//! ```
//!
//! Invariants
//! * Revisions rise by one per committed transaction, store-wide; a transaction is all or nothing.
//! * A watch delivers every event after the asked revision once, in order, across reconnects; if that revision
//!   has been compacted away it says so, and the caller reads again.
//! * A transaction whose answer got lost fails with [`ErrorKind::Unknown`](crate::ErrorKind): read back first.
//! * No lease is trusted: liveness is a hint for people.

use async_trait::async_trait;
use tokio::sync::mpsc;

use crate::error::Result;

/// A stored value.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Item {
    /// Its key.
    pub key: String,
    /// Its bytes (JSON of a `wire::meta` record).
    pub value: Vec<u8>,
    /// Revision of the transaction that wrote it.
    pub mod_rev: u64,
}

/// What a read saw.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Snapshot {
    /// The items, by key.
    pub items: Vec<Item>,
    /// The store's revision at which they were read.
    pub rev: u64,
}

/// A condition of a transaction.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Compare {
    /// The key does not exist.
    Absent(String),
    /// The key was last written at this revision.
    Unchanged(String, u64),
}

/// A change of a transaction.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Op {
    /// Write a value.
    Put(String, Vec<u8>),
    /// Remove a key, if it exists.
    Delete(String),
}

/// How a transaction ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Committed {
    /// All changes were made, at this revision.
    Yes(u64),
    /// A condition did not hold; nothing was changed.
    Conflict,
}

/// A change, as a watch tells it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum WatchEvent {
    /// A key was written.
    Put(Item),
    /// A key was removed, at this revision.
    Deleted(String, u64),
    /// The revision asked for is gone: read again and watch from there.
    Compacted,
}

/// See the module's charter.
#[async_trait]
pub trait MetaStore: Send + Sync {
    /// All items whose key starts with `prefix`.
    async fn read(&self, prefix: &str) -> Result<Snapshot>;

    /// One item.
    async fn get(&self, key: &str) -> Result<Option<Item>>;

    /// Makes all changes if all conditions hold.
    async fn txn(&self, compare: Vec<Compare>, ops: Vec<Op>) -> Result<Committed>;

    /// Every change under `prefix` after revision `after_rev`, until the receiver is dropped. The implementation
    /// reconnects by itself; the channel is bounded, a slow reader slows the watch, not the store.
    async fn watch(&self, prefix: &str, after_rev: u64) -> Result<mpsc::Receiver<WatchEvent>>;

    /// Milliseconds since the store last answered this process anything.
    fn answered_ms_ago(&self) -> u64;
}
