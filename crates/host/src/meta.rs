//! The metadata store: one trait, one conformance suite, three back-ends.
//!
//! ```text
//!   MetaStore ── sqlite   one file, WAL, full sync; several agents of one machine may share it
//!             ── remote   the same store, served by the host that made the cluster, over mutual TLS
//!             ── etcd     for clusters that want no single point
//! ```
//!
//! Invariants
//! * Revisions rise with every committed transaction, store-wide; a transaction is all or nothing.
//! * A watch delivers every event after the asked revision once, in order, across reconnects; if that revision
//!   has been compacted away it says so, and the caller reads again.
//! * A transaction whose answer got lost fails with [`ErrorKind::Unknown`]: [`MetaStore::resolve`] tells, exactly
//!   and for good, whether it was made. [`commit`] and [`update`] do that for their callers.
//! * Every other error of a transaction means that it was not made.
//! * No lease is trusted: liveness is a hint for people.
//!
//! Not here: the records and their keys (`wire::meta`), the served store's messages (`wire::peer::meta`).

use async_trait::async_trait;
use serde::Serialize;
use serde::de::DeserializeOwned;
use std::collections::HashSet;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::mpsc;
use tokio::time::{Instant, sleep};
use uuid::Uuid;
use whimbrel_wire::Role;
use whimbrel_wire::peer::cluster::MetaLocation;

mod batch;
#[cfg(test)]
mod conformance;
pub mod etcd;
pub mod remote;
pub mod serve;
pub mod sqlite;

use crate::cluster::Files;
use crate::error::{Context, Error, ErrorKind, Result};
use crate::link::{Links, Router};
use etcd::{EtcdOptions, EtcdStore};
use remote::RemoteStore;
use sqlite::SqliteStore;

/// Most conditions, and most changes, of one transaction.
pub const TXN_PARTS_MAX: usize = 120;
/// Most bytes of one key.
pub const KEY_BYTES_MAX: usize = 512;
/// Most bytes of keys and values of one transaction.
pub const TXN_BYTES_MAX: usize = 1 << 20;

/// Names one transaction, so that its outcome can be asked for later. Made by whoever starts it; may be journalled.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, serde::Deserialize)]
#[serde(transparent)]
pub struct TxnId(pub Uuid);

impl TxnId {
    /// A new one, like no other.
    pub fn random() -> Self {
        Self(Uuid::new_v4())
    }
}

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
    /// All items whose key starts with `prefix`, as they were at one revision, in the order of their keys.
    async fn read(&self, prefix: &str) -> Result<Snapshot>;

    /// One item.
    async fn get(&self, key: &str) -> Result<Option<Item>>;

    /// Makes all changes if all conditions hold, under a name of the caller's choosing: asked again with the same
    /// name it is not made twice, and the answer is the first one's. No key may be changed twice.
    async fn txn_as(&self, id: TxnId, compare: Vec<Compare>, ops: Vec<Op>) -> Result<Committed>;

    /// How the transaction ended: the revision if it was made. If it was not, it never will be, even if its
    /// request is still on its way. The store remembers for an hour, or ten thousand transactions.
    async fn resolve(&self, id: TxnId) -> Result<Option<u64>>;

    /// Makes all changes if all conditions hold. A lost answer is not looked for: see [`commit`].
    async fn txn(&self, compare: Vec<Compare>, ops: Vec<Op>) -> Result<Committed> {
        self.txn_as(TxnId::random(), compare, ops).await
    }

    /// Every change under `prefix` after revision `after_rev`, until the receiver is dropped. The implementation
    /// reconnects by itself; the channel is bounded, a slow reader slows the watch, not the store. After
    /// [`WatchEvent::Compacted`] the channel ends.
    async fn watch(&self, prefix: &str, after_rev: u64) -> Result<mpsc::Receiver<WatchEvent>>;

    /// Milliseconds since the store last answered this process anything.
    fn answered_ms_ago(&self) -> u64;
}

/// An opened store, and what this host serves of it to others.
pub struct Opened {
    /// The store.
    pub store: Arc<dyn MetaStore>,
    /// The same, if it is a file of this machine: then other hosts may reach it through this one.
    file: Option<Arc<SqliteStore>>,
}

impl Opened {
    /// Adds the store to what this host answers, if it is this host that has it.
    pub fn routes(&self, router: Router) -> Router {
        match &self.file {
            Some(file) => serve::routes(file, router),
            None => router,
        }
    }
}

/// Opens the store of the cluster whose member has these files. Nothing is asked of another host yet.
pub fn open(location: &MetaLocation, links: &Links, files: &Files) -> Result<Opened> {
    match location {
        MetaLocation::Sqlite { path } => {
            let file = SqliteStore::open(Path::new(path))?;
            Ok(Opened { store: file.clone(), file: Some(file) })
        }
        MetaLocation::Served { by } => {
            // The host's record is in the store: the address to reach it first is the one that joining told.
            if links.addresses(&by.name).is_empty() {
                links.set_addresses(&by.name, by.addresses.iter().filter_map(|it| it.parse().ok()).collect());
            }
            Ok(Opened { store: RemoteStore::new(links.clone(), by.name.clone()), file: None })
        }
        MetaLocation::Etcd { endpoints } => {
            let options = EtcdOptions {
                endpoints: endpoints.clone(),
                ca: files.ca_path(),
                identity: files.credentials_path(Role::Host),
            };
            Ok(Opened { store: EtcdStore::new(options)?, file: None })
        }
    }
}

/// Checks a transaction against the limits that every back-end shares.
fn check_txn(compare: &[Compare], ops: &[Op]) -> Result<()> {
    let bad = |what: &str| Err(Error::new(ErrorKind::InvalidInput, format!("change records: {what}")));
    if compare.len() > TXN_PARTS_MAX || ops.len() > TXN_PARTS_MAX {
        return bad("too many conditions or changes in one transaction");
    }
    let mut keys = HashSet::new();
    let mut bytes = 0;
    for op in ops {
        let (key, length) = match op {
            Op::Put(key, value) => (key, value.len()),
            Op::Delete(key) => (key, 0),
        };
        bytes += key.len() + length;
        if key.is_empty() || key.len() > KEY_BYTES_MAX {
            return bad("a key is empty or too long");
        }
        if !keys.insert(key) {
            return bad("a key is changed twice in one transaction");
        }
    }
    if bytes > TXN_BYTES_MAX { bad("more than 1 MiB in one transaction") } else { Ok(()) }
}

/// Makes all changes if all conditions hold, and finds out what became of them if the answer is lost. Fails with
/// [`ErrorKind::Unknown`] only if the store could not be asked until `deadline` ran out.
pub async fn commit(
    store: &dyn MetaStore,
    compare: Vec<Compare>,
    ops: Vec<Op>,
    deadline: Duration,
) -> Result<Committed> {
    let end = Instant::now() + deadline;
    let id = TxnId::random();
    let lost = match store.txn_as(id, compare.clone(), ops.clone()).await {
        Err(error) if error.kind() == ErrorKind::Unknown => error,
        known => return known,
    };
    loop {
        match store.resolve(id).await {
            Ok(Some(rev)) => return Ok(Committed::Yes(rev)),
            // It was not made and never will be: a new one may be.
            Ok(None) => {
                let left = end.saturating_duration_since(Instant::now());
                return Box::pin(commit(store, compare, ops, left)).await;
            }
            Err(_) if Instant::now() >= end => return Err(lost),
            Err(_) => sleep(Duration::from_millis(50)).await,
        }
    }
}

/// A record and the revision that wrote it, if the key exists.
pub async fn record<R: DeserializeOwned>(store: &dyn MetaStore, key: &str) -> Result<Option<(R, u64)>> {
    let item = store.get(key).await.with_context(|| format!("read record {key}"))?;
    item.map(|item| Ok((parse(key, &item.value)?, item.mod_rev))).transpose()
}

/// A record's JSON, read.
pub fn parse<R: DeserializeOwned>(key: &str, value: &[u8]) -> Result<R> {
    serde_json::from_slice(value)
        .map_err(|error| Error::with_source(ErrorKind::Corrupt, format!("read record {key}"), error))
}

/// A record as JSON.
pub fn encode<R: Serialize>(key: &str, record: &R) -> Result<Vec<u8>> {
    serde_json::to_vec(record)
        .map_err(|error| Error::with_source(ErrorKind::Internal, format!("write record {key}"), error))
}

/// A record as JSON that replaces `old`: fields of `old` that this release does not know are kept, so that releases
/// N and N−1 may change the same record.
pub fn encode_over<R: Serialize + DeserializeOwned>(key: &str, old: &[u8], record: &R) -> Result<Vec<u8>> {
    let fields = |bytes: &[u8]| serde_json::from_slice::<serde_json::Map<_, _>>(bytes).unwrap_or_default();
    let known = fields(&encode(key, &parse::<R>(key, old)?)?);
    let bytes = encode(key, record)?;
    let mut unknown = fields(old);
    unknown.retain(|name, _| !known.contains_key(name));
    if unknown.is_empty() {
        return Ok(bytes);
    }
    let mut new: serde_json::Map<String, serde_json::Value> = fields(&bytes);
    for (name, value) in unknown {
        new.entry(name).or_insert(value);
    }
    encode(key, &new)
}

/// Changes one record by compare-and-swap, until it succeeds or `deadline` runs out. `change` gets the record as
/// it stands (`None`: there is none) and returns it as it is to be (`None`: removed); it may run several times,
/// and its error ends the loop. Returns what stands there now.
pub async fn update<R, F>(
    store: &dyn MetaStore,
    key: &str,
    deadline: Duration,
    mut change: F,
) -> Result<Option<R>>
where
    R: Serialize + DeserializeOwned,
    F: FnMut(Option<R>) -> Result<Option<R>>,
{
    let end = Instant::now() + deadline;
    for round in 0u64.. {
        let item = store.get(key).await.with_context(|| format!("read record {key}"))?;
        let old = item.as_ref().map(|item| parse(key, &item.value)).transpose()?;
        let new = change(old)?;
        let bytes = match (&item, &new) {
            (Some(item), Some(new)) => Some(encode_over::<R>(key, &item.value, new)?),
            (_, new) => new.as_ref().map(|record| encode(key, record)).transpose()?,
        };
        if bytes.as_ref() == item.as_ref().map(|item| &item.value) {
            return Ok(new);
        }
        let compare = match &item {
            Some(item) => Compare::Unchanged(key.to_owned(), item.mod_rev),
            None => Compare::Absent(key.to_owned()),
        };
        let op = match bytes {
            Some(bytes) => Op::Put(key.to_owned(), bytes),
            None => Op::Delete(key.to_owned()),
        };
        let left = end.saturating_duration_since(Instant::now());
        match commit(store, vec![compare], vec![op], left)
            .await
            .with_context(|| format!("change record {key}"))?
        {
            Committed::Yes(_) => return Ok(new),
            Committed::Conflict if Instant::now() < end => {}
            Committed::Conflict => break,
        }
        // Another writer was faster; back off a little so that many do not run in step.
        let jitter = u64::from(TxnId::random().0.as_bytes()[0]) % 8;
        sleep(Duration::from_millis((round.min(8) + jitter).min(16))).await;
    }
    Err(Error::new(ErrorKind::TimedOut, format!("change record {key}: other writers were always faster")))
}
