//! The metadata store, served to other hosts.
//!
//! | method | params, payload → result, payload |
//! |---|---|
//! | `meta.read` | [`ReadRequest`] → [`Items`], values |
//! | `meta.get` | [`GetRequest`] → [`Items`] of one or none, value |
//! | `meta.txn` | [`TxnRequest`], values → [`TxnAnswer`] |
//! | `meta.resolve` | [`ResolveRequest`] → [`TxnAnswer`] |
//! | stream `meta.read_all` | [`ReadRequest`]; `Answer` frames of [`Items`] and values, the last without `more` |
//! | stream `meta.watch` | [`WatchRequest`]; `Answer` frames of [`WatchMessage`] and values, at least every half second |
//!
//! Values travel as payload, one after the other in the order of their heads. A message of a watch holds whole
//! revisions: whoever resumes after its `rev` misses nothing and sees nothing twice.

use serde::{Deserialize, Serialize};
use uuid::Uuid;

/// Asks for all items under a prefix.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct ReadRequest {
    /// What their keys start with.
    pub prefix: String,
}

/// Asks for one item.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct GetRequest {
    /// Its key.
    pub key: String,
}

/// An item without its value.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct ItemHead {
    /// Its key.
    pub key: String,
    /// Revision that wrote it.
    pub mod_rev: u64,
    /// Bytes of its value.
    pub len: u32,
}

/// Items, as they were at one revision.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Items {
    /// That revision.
    pub rev: u64,
    /// The items, by key.
    pub items: Vec<ItemHead>,
    /// There are more than fit: for `meta.read`, ask again for a stream `meta.read_all`.
    #[serde(default)]
    pub more: bool,
}

/// A condition.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct CompareHead {
    /// The key.
    pub key: String,
    /// The revision that must have written it last; none: it must not exist.
    pub mod_rev: Option<u64>,
}

/// A change.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct OpHead {
    /// The key.
    pub key: String,
    /// Bytes of its new value; none: remove it.
    pub len: Option<u32>,
}

/// Makes all changes if all conditions hold.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct TxnRequest {
    /// Name of the transaction, of the client's making; the same name is not carried out twice.
    pub id: Uuid,
    /// The conditions.
    pub compare: Vec<CompareHead>,
    /// The changes.
    pub ops: Vec<OpHead>,
}

/// How a transaction ended.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub struct TxnAnswer {
    /// The revision it made; none: it was not made (a condition did not hold; for `meta.resolve`: and never will be).
    pub rev: Option<u64>,
}

/// Asks how a transaction ended, and makes sure that it does not happen any more if it has not.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct ResolveRequest {
    /// Its name.
    pub id: Uuid,
}

/// Asks for every change under a prefix.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct WatchRequest {
    /// What the keys start with.
    pub prefix: String,
    /// Only what changed after this revision.
    pub after_rev: u64,
}

/// A change, without the value.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct EventHead {
    /// The key.
    pub key: String,
    /// Revision of the change.
    pub mod_rev: u64,
    /// Bytes of its new value; none: it was removed.
    pub len: Option<u32>,
}

/// Changes of whole revisions; none as a sign of life.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct WatchMessage {
    /// Everything up to this revision has been told.
    pub rev: u64,
    /// The changes, in order.
    #[serde(default)]
    pub events: Vec<EventHead>,
    /// The revision asked for is gone; nothing follows.
    #[serde(default)]
    pub compacted: bool,
}
