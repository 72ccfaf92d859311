//! The metadata store that another host serves.
//!
//! ```text
//!   RemoteStore::read, get, txn_as, resolve ──► calls       meta.*
//!   RemoteStore::watch ─────────────────────► a stream     meta.watch, made again from the last revision told
//! ```
//!
//! Invariants
//! * A transaction fails with `Unknown` if its request may have reached the server and no answer came back.
//! * A watch that hears nothing for two seconds is made again: the server gives a sign of life every half second.
//!
//! Not here: the messages (`wire::peer::meta`), the serving side (`meta::serve`).

use async_trait::async_trait;
use bytes::{Bytes, BytesMut};
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::mpsc;
use tokio::time::timeout;
use whimbrel_wire::HostId;
use whimbrel_wire::peer::FrameKind;
use whimbrel_wire::peer::meta::{
    CompareHead, GetRequest, ItemHead, Items, OpHead, ReadRequest, ResolveRequest, TxnAnswer, TxnRequest,
    WatchMessage, WatchRequest,
};

use super::batch::{Answered, BATCHES, Batch, flatten};
use super::{Committed, Compare, Item, MetaStore, Op, Snapshot, TxnId, WatchEvent, check_txn};
use crate::error::{Context, Error, ErrorKind, Result};
use crate::link::{Links, PeerStream, read_frame};
use crate::metrics::metrics;

/// How long one answer is waited for.
const ANSWER: Duration = Duration::from_secs(5);
/// How long a watch may be silent.
const SILENCE: Duration = Duration::from_secs(2);
/// Waits between attempts to make a watch again, first and last.
const AGAIN_MS: (u64, u64) = (50, 1_000);

/// See the module's charter.
pub struct RemoteStore {
    links: Links,
    host: HostId,
    answered: Arc<Answered>,
}

impl RemoteStore {
    /// The store that `host` serves.
    pub fn new(links: Links, host: HostId) -> Arc<Self> {
        Arc::new(Self { links, host, answered: Arc::default() })
    }

    async fn call<P, T>(&self, method: &str, params: &P, payload: Bytes) -> Result<(T, Bytes)>
    where
        P: serde::Serialize + Sync,
        T: serde::de::DeserializeOwned,
    {
        let result = self.links.call(&self.host, method, params, payload, ANSWER).await;
        if result.is_ok() {
            self.answered.now();
        }
        result
    }

    async fn read_all(&self, request: &ReadRequest) -> Result<Snapshot> {
        let mut stream = self.links.stream(&self.host, "meta.read_all", request, ANSWER).await?;
        let mut all = Snapshot { items: Vec::new(), rev: 0 };
        loop {
            let frame = timeout(ANSWER, read_frame(&mut stream)).await;
            let frame = frame
                .map_err(|_| Error::new(ErrorKind::Unavailable, "read records: no answer in time"))??;
            let frame =
                frame.ok_or_else(|| Error::new(ErrorKind::Unavailable, "read records: the stream ended"))?;
            let part: Items = frame.parse("records")?;
            all.rev = part.rev;
            all.items.extend(join_items(part.items, frame.payload)?);
            self.answered.now();
            if !part.more {
                return Ok(all);
            }
        }
    }
}

fn torn() -> Error {
    Error::new(ErrorKind::InvalidInput, "read records: fewer bytes than announced")
}

/// Cuts the next value off the payload.
fn cut(payload: &mut Bytes, len: u32) -> Result<Vec<u8>> {
    let len = len as usize;
    if len > payload.len() {
        return Err(torn());
    }
    Ok(payload.split_to(len).to_vec())
}

fn join_items(heads: Vec<ItemHead>, mut payload: Bytes) -> Result<Vec<Item>> {
    let join = |head: ItemHead| {
        let value = cut(&mut payload, head.len)?;
        Ok(Item { key: head.key, value, mod_rev: head.mod_rev })
    };
    heads.into_iter().map(join).collect()
}

fn join_events(message: WatchMessage, mut payload: Bytes) -> Result<Batch> {
    let mut events = Vec::with_capacity(message.events.len() + 1);
    for head in message.events {
        events.push(match head.len {
            Some(len) => {
                let value = cut(&mut payload, len)?;
                WatchEvent::Put(Item { key: head.key, value, mod_rev: head.mod_rev })
            }
            None => WatchEvent::Deleted(head.key, head.mod_rev),
        });
    }
    if message.compacted {
        events.push(WatchEvent::Compacted);
    }
    Ok(Batch { rev: message.rev, events })
}

fn split_txn(id: TxnId, compare: Vec<Compare>, ops: Vec<Op>) -> (TxnRequest, Bytes) {
    let compare = compare.into_iter().map(|condition| match condition {
        Compare::Absent(key) => CompareHead { key, mod_rev: None },
        Compare::Unchanged(key, rev) => CompareHead { key, mod_rev: Some(rev) },
    });
    let mut payload = BytesMut::new();
    let ops = ops.into_iter().map(|op| match op {
        Op::Put(key, value) => {
            payload.extend_from_slice(&value);
            // Checked against a limit of 1 MiB.
            OpHead { key, len: Some(u32::try_from(value.len()).unwrap_or(u32::MAX)) }
        }
        Op::Delete(key) => OpHead { key, len: None },
    });
    let request = TxnRequest { id: id.0, compare: compare.collect(), ops: ops.collect() };
    (request, payload.freeze())
}

/// What a failed call says about a transaction: whether it may have been made.
fn txn_error(error: Error) -> Error {
    match error.kind() {
        // The request itself was checked on this side: an answer that cannot be read was given after the fact.
        ErrorKind::Unknown | ErrorKind::Internal | ErrorKind::InvalidInput => {
            Error::with_source(ErrorKind::Unknown, "change records", error)
        }
        ErrorKind::TimedOut => Error::with_source(ErrorKind::Unavailable, "change records", error),
        _ => error,
    }
}

/// What a failed call says about a read: nothing but that there is no answer.
fn read_error(error: Error) -> Error {
    match error.kind() {
        ErrorKind::Unknown | ErrorKind::TimedOut => {
            Error::with_source(ErrorKind::Unavailable, "ask the metadata store", error)
        }
        _ => error,
    }
}

#[async_trait]
impl MetaStore for RemoteStore {
    async fn read(&self, prefix: &str) -> Result<Snapshot> {
        let request = ReadRequest { prefix: prefix.to_owned() };
        let (part, payload): (Items, _) =
            self.call("meta.read", &request, Bytes::new()).await.map_err(read_error)?;
        if part.more {
            return self.read_all(&request).await.map_err(read_error);
        }
        Ok(Snapshot { rev: part.rev, items: join_items(part.items, payload)? })
    }

    async fn get(&self, key: &str) -> Result<Option<Item>> {
        let request = GetRequest { key: key.to_owned() };
        let (part, payload): (Items, _) =
            self.call("meta.get", &request, Bytes::new()).await.map_err(read_error)?;
        Ok(join_items(part.items, payload)?.pop())
    }

    async fn txn_as(&self, id: TxnId, compare: Vec<Compare>, ops: Vec<Op>) -> Result<Committed> {
        check_txn(&compare, &ops)?;
        let (request, payload) = split_txn(id, compare, ops);
        let (answer, _): (TxnAnswer, _) =
            self.call("meta.txn", &request, payload).await.map_err(txn_error)?;
        Ok(answer.rev.map_or(Committed::Conflict, Committed::Yes))
    }

    async fn resolve(&self, id: TxnId) -> Result<Option<u64>> {
        let request = ResolveRequest { id: id.0 };
        let (answer, _): (TxnAnswer, _) =
            self.call("meta.resolve", &request, Bytes::new()).await.map_err(read_error)?;
        Ok(answer.rev)
    }

    async fn watch(&self, prefix: &str, after_rev: u64) -> Result<mpsc::Receiver<WatchEvent>> {
        let (batches, receiver) = mpsc::channel(BATCHES);
        let watch = Watch {
            links: self.links.clone(),
            host: self.host.clone(),
            answered: self.answered.clone(),
            request: WatchRequest { prefix: prefix.to_owned(), after_rev },
            batches,
        };
        tokio::spawn(watch.run());
        Ok(flatten(receiver))
    }

    fn answered_ms_ago(&self) -> u64 {
        self.answered.ms_ago()
    }
}

struct Watch {
    links: Links,
    host: HostId,
    answered: Arc<Answered>,
    /// What is asked for next: its revision is the last one told.
    request: WatchRequest,
    batches: mpsc::Sender<Batch>,
}

impl Watch {
    async fn run(mut self) {
        let mut wait_ms = AGAIN_MS.0;
        loop {
            let batches = self.batches.clone();
            let before = self.request.after_rev;
            let result = tokio::select! {
                () = batches.closed() => return,
                result = self.follow() => result,
            };
            let error = match result {
                Ok(()) => return,
                Err(error) => error,
            };
            tracing::debug!(host = %self.host, prefix = self.request.prefix, %error, "make a watch again");
            metrics().meta_watch_resumed.inc();
            wait_ms =
                if self.request.after_rev > before { AGAIN_MS.0 } else { (wait_ms * 2).min(AGAIN_MS.1) };
            tokio::select! {
                () = batches.closed() => return,
                () = tokio::time::sleep(Duration::from_millis(wait_ms)) => {}
            }
        }
    }

    /// One stream; `Ok` if the watch is over for good.
    async fn follow(&mut self) -> Result<()> {
        let mut stream: PeerStream =
            self.links.stream(&self.host, "meta.watch", &self.request, ANSWER).await?;
        loop {
            let silent = |_| Error::new(ErrorKind::Unavailable, "watch the metadata store: it fell silent");
            let frame = timeout(SILENCE, read_frame(&mut stream)).await.map_err(silent)??;
            let ended = || Error::new(ErrorKind::Unavailable, "watch the metadata store: the stream ended");
            let frame = frame.ok_or_else(ended)?;
            if frame.kind != FrameKind::Answer {
                return Err(frame.error()).context("watch the metadata store");
            }
            self.answered.now();
            let message: WatchMessage = frame.parse("a watch's message")?;
            let compacted = message.compacted;
            let batch = join_events(message, frame.payload)?;
            self.request.after_rev = self.request.after_rev.max(batch.rev);
            if !batch.events.is_empty() && self.batches.send(batch).await.is_err() {
                return Ok(());
            }
            if compacted {
                return Ok(());
            }
        }
    }
}

#[cfg(test)]
mod fuzz {
    use super::*;

    whimbrel_fuzz::fuzz! {
        /// Answers of the host that keeps the store: a line of JSON, then the values.
        fn answers(bytes) seeds [
            b"{\"rev\":3,\"items\":[{\"key\":\"a\",\"mod_rev\":1,\"len\":2}],\"more\":false}\nxy",
            b"{\"rev\":3,\"events\":[{\"key\":\"a\",\"mod_rev\":1,\"len\":2},{\"key\":\"b\",\"mod_rev\":2}]}\nxy",
        ] {
            let Some(end) = bytes.iter().position(|byte| *byte == b'\n') else { return };
            let values = Bytes::copy_from_slice(&bytes[end + 1..]);
            if let Ok(part) = serde_json::from_slice::<Items>(&bytes[..end]) {
                let _ = join_items(part.items, values.clone());
            }
            if let Ok(message) = serde_json::from_slice::<WatchMessage>(&bytes[..end]) {
                let _ = join_events(message, values);
            }
        }
    }
}
