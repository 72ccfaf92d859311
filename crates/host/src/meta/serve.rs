//! Serves this host's metadata store to the others; the other side of `meta::remote`.
//!
//! Invariants: every message of a watch holds whole revisions; a sign of life is only given while the store's file
//! itself answers.

use bytes::{Bytes, BytesMut};
use std::sync::Arc;
use std::time::Duration;
use tokio::time::MissedTickBehavior;
use whimbrel_wire::peer::FrameKind;
use whimbrel_wire::peer::meta::{
    EventHead, GetRequest, ItemHead, Items, ReadRequest, ResolveRequest, TxnAnswer, TxnRequest, WatchMessage,
    WatchRequest,
};

use super::batch::Batch;
use super::sqlite::SqliteStore;
use super::{Committed, Compare, Item, MetaStore, Op, TxnId, WatchEvent};
use crate::error::{Context, Error, ErrorKind, Result};
use crate::link::{Frame, PeerStream, Router, StreamOffer, to_json, write_frame};

/// Most items of one frame: their heads stay below the limit for JSON.
const ITEMS_MAX: usize = 1_000;
/// Values of one frame stop beyond this many bytes.
const VALUES_BYTES: usize = 4 << 20;
/// How often a watch gives a sign of life.
const BEAT: Duration = Duration::from_millis(500);

/// Adds the methods of `meta.*` to what this host answers.
pub fn routes(store: &Arc<SqliteStore>, router: Router) -> Router {
    let (read, get, txn) = (store.clone(), store.clone(), store.clone());
    let (resolve, all, watch) = (store.clone(), store.clone(), store.clone());
    router
        .call("meta.read", move |_, request: ReadRequest, _| {
            let store = read.clone();
            async move {
                let snapshot = store.read(&request.prefix).await?;
                let mut parts = Parts { rev: snapshot.rev, items: snapshot.items.into_iter().peekable() };
                parts.next_part().map(Ok).unwrap_or_else(|| parts.empty())
            }
        })
        .call("meta.get", move |_, request: GetRequest, _| {
            let store = get.clone();
            async move {
                let item = store.get(&request.key).await?;
                let mut parts =
                    Parts { rev: 0, items: item.into_iter().collect::<Vec<_>>().into_iter().peekable() };
                parts.next_part().map(Ok).unwrap_or_else(|| parts.empty())
            }
        })
        .call("meta.txn", move |_, request: TxnRequest, payload| {
            let store = txn.clone();
            async move { answer_txn(&store, request, payload).await }
        })
        .call("meta.resolve", move |_, request: ResolveRequest, _| {
            let store = resolve.clone();
            async move {
                let rev = store.resolve(TxnId(request.id)).await?;
                Ok((TxnAnswer { rev }, Bytes::new()))
            }
        })
        .stream("meta.read_all", move |_, request: ReadRequest, offer| {
            let store = all.clone();
            async move { answer_read_all(&store, &request, offer).await }
        })
        .stream("meta.watch", move |_, request: WatchRequest, offer| {
            let store = watch.clone();
            async move { answer_watch(&store, &request, offer).await }
        })
}

/// Items cut into parts that fit into frames.
struct Parts<I: Iterator<Item = Item>> {
    rev: u64,
    items: std::iter::Peekable<I>,
}

impl<I: Iterator<Item = Item>> Parts<I> {
    fn next_part(&mut self) -> Option<(Items, Bytes)> {
        self.items.peek()?;
        let (mut heads, mut values) = (Vec::new(), BytesMut::new());
        while heads.len() < ITEMS_MAX && values.len() < VALUES_BYTES {
            let Some(item) = self.items.next() else { break };
            values.extend_from_slice(&item.value);
            heads.push(ItemHead { key: item.key, mod_rev: item.mod_rev, len: length(&item.value) });
        }
        let more = self.items.peek().is_some();
        Some((Items { rev: self.rev, items: heads, more }, values.freeze()))
    }

    fn empty(&self) -> Result<(Items, Bytes)> {
        Ok((Items { rev: self.rev, items: Vec::new(), more: false }, Bytes::new()))
    }
}

/// Values are at most 1 MiB long.
fn length(value: &[u8]) -> u32 {
    u32::try_from(value.len()).unwrap_or(u32::MAX)
}

async fn answer_txn(
    store: &SqliteStore,
    request: TxnRequest,
    mut payload: Bytes,
) -> Result<(TxnAnswer, Bytes)> {
    let compare = request.compare.into_iter().map(|head| match head.mod_rev {
        Some(rev) => Compare::Unchanged(head.key, rev),
        None => Compare::Absent(head.key),
    });
    let mut ops = Vec::with_capacity(request.ops.len());
    for head in request.ops {
        ops.push(match head.len {
            None => Op::Delete(head.key),
            Some(len) if len as usize <= payload.len() => {
                Op::Put(head.key, payload.split_to(len as usize).to_vec())
            }
            Some(_) => {
                return Err(Error::new(
                    ErrorKind::InvalidInput,
                    "change records: fewer bytes than announced",
                ));
            }
        });
    }
    let rev = match store.txn_as(TxnId(request.id), compare.collect(), ops).await? {
        Committed::Yes(rev) => Some(rev),
        Committed::Conflict => None,
    };
    Ok((TxnAnswer { rev }, Bytes::new()))
}

async fn send<T: serde::Serialize>(stream: &mut PeerStream, message: &T, payload: Bytes) -> Result<()> {
    let json = to_json(message, "a message of the metadata store")?;
    write_frame(stream, &Frame::new(FrameKind::Answer, 0, json, payload)?).await
}

async fn answer_read_all(store: &SqliteStore, request: &ReadRequest, offer: StreamOffer) -> Result<()> {
    let snapshot = store.read(&request.prefix).await?;
    let mut stream = offer.accept().await?;
    let mut parts = Parts { rev: snapshot.rev, items: snapshot.items.into_iter().peekable() };
    let mut sent = false;
    while let Some((part, values)) = parts.next_part() {
        send(&mut stream, &part, values).await?;
        sent = true;
    }
    if !sent {
        let (part, values) = parts.empty()?;
        send(&mut stream, &part, values).await?;
    }
    use tokio::io::AsyncWriteExt;
    stream.shutdown().await.context("end a stream of records")
}

async fn answer_watch(store: &SqliteStore, request: &WatchRequest, offer: StreamOffer) -> Result<()> {
    let mut batches = store.watch_batches(&request.prefix, request.after_rev).await?;
    let mut stream = offer.accept().await?;
    let mut told = request.after_rev;
    let mut beat = tokio::time::interval(BEAT);
    beat.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        tokio::select! {
            batch = batches.recv() => {
                let Some(batch) = batch else { return Ok(()) };
                told = batch.rev;
                let (message, values) = split_events(batch);
                send(&mut stream, &message, values).await?;
            }
            _ = beat.tick() => {
                if store.answered_ms_ago() < 1_000 {
                    let message = WatchMessage { rev: told, events: Vec::new(), compacted: false };
                    send(&mut stream, &message, Bytes::new()).await?;
                }
            }
        }
    }
}

fn split_events(batch: Batch) -> (WatchMessage, Bytes) {
    let mut message = WatchMessage { rev: batch.rev, events: Vec::new(), compacted: false };
    let mut values = BytesMut::new();
    for event in batch.events {
        match event {
            WatchEvent::Put(Item { key, value, mod_rev }) => {
                values.extend_from_slice(&value);
                message.events.push(EventHead { key, mod_rev, len: Some(length(&value)) });
            }
            WatchEvent::Deleted(key, mod_rev) => message.events.push(EventHead { key, mod_rev, len: None }),
            WatchEvent::Compacted => message.compacted = true,
        }
    }
    (message, values.freeze())
}
