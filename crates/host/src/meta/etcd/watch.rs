//! A watch of etcd, made again from the revision after the last event whenever its stream ends or falls silent.
//!
//! Invariant: an answer's events are whole revisions (fragments are not asked for), so none is lost or repeated.

use etcd_client::{EventType, WatchOptions, WatchResponse};
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::mpsc;
use tokio::time::{Instant, MissedTickBehavior, interval, sleep, timeout};

use super::super::batch::Batch;
use super::super::{Item, WatchEvent};
use super::{ANSWER, Failure, MESSAGE_BYTES, RECORDS, Shared, int, uint};
use crate::error::{Error, ErrorKind, Result};
use crate::metrics::metrics;

/// How often a sign of life is asked for.
const BEAT: Duration = Duration::from_millis(500);
/// How long a stream may be silent.
const SILENCE: Duration = Duration::from_secs(3);

/// Watches keys that start with `prefix`, until nobody listens or the revision is compacted away.
pub(super) async fn run(shared: Arc<Shared>, prefix: String, after_rev: u64, batches: mpsc::Sender<Batch>) {
    let mut cursor = after_rev;
    loop {
        let followed = tokio::select! {
            () = batches.closed() => return,
            followed = follow(&shared, &prefix, &mut cursor, &batches) => followed,
        };
        let Err(error) = followed else { return };
        tracing::debug!(prefix, cursor, %error, "make a watch again");
        metrics().meta_watch_resumed.inc();
        // Whatever the connection was, the next one is made from scratch.
        *shared.client.lock().await = None;
        tokio::select! {
            () = batches.closed() => return,
            () = sleep(Duration::from_millis(200)) => {}
        }
    }
}

fn silent() -> Error {
    Error::new(ErrorKind::Unavailable, "watch etcd: it fell silent")
}

fn failed(error: etcd_client::Error) -> Error {
    Failure::from(error).error
}

/// One stream; `Ok` if the watch is over for good.
async fn follow(
    shared: &Shared,
    prefix: &str,
    cursor: &mut u64,
    batches: &mpsc::Sender<Batch>,
) -> Result<()> {
    let client = shared.connect().await?;
    let options = WatchOptions::new().with_prefix().with_start_revision(int(*cursor + 1));
    let mut watch = client.watch_client().max_decoding_message_size(MESSAGE_BYTES);
    let stream = timeout(ANSWER, watch.watch(prefix, Some(options))).await.map_err(|_| silent())?;
    let mut stream = stream.map_err(failed)?;
    let mut beat = interval(BEAT);
    beat.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut heard = Instant::now();
    loop {
        let answer = tokio::select! {
            answer = stream.message() => answer.map_err(failed)?,
            _ = beat.tick() => {
                if heard.elapsed() > SILENCE {
                    return Err(silent());
                }
                timeout(ANSWER, stream.request_progress()).await.map_err(|_| silent())?.map_err(failed)?;
                continue;
            }
        };
        let Some(answer) = answer else {
            return Err(Error::new(ErrorKind::Unavailable, "watch etcd: the stream ended"));
        };
        heard = Instant::now();
        shared.answered.now();
        let compacted = answer.compact_revision() > 0 || is_from_the_future(&answer, *cursor);
        if answer.canceled() && !compacted {
            let why = format!("watch etcd: it gave up: {}", answer.cancel_reason());
            return Err(Error::new(ErrorKind::Unavailable, why));
        }
        let batch = batch_of(&answer, *cursor, compacted);
        *cursor = batch.rev;
        if !batch.events.is_empty() && batches.send(batch).await.is_err() || compacted {
            return Ok(());
        }
    }
}

/// Whether the store is another one than it was: its revision lies before what the watch has seen.
fn is_from_the_future(answer: &WatchResponse, cursor: u64) -> bool {
    answer.created() && answer.header().is_some_and(|header| uint(header.revision()) < cursor)
}

fn batch_of(answer: &WatchResponse, cursor: u64, compacted: bool) -> Batch {
    let mut batch = Batch { rev: cursor, events: Vec::new() };
    for event in answer.events() {
        let Some(kv) = event.kv() else { continue };
        let rev = uint(kv.mod_revision());
        batch.rev = batch.rev.max(rev);
        let key = std::str::from_utf8(kv.key()).ok().and_then(|key| key.strip_prefix(RECORDS));
        let Some(key) = key.map(str::to_owned) else { continue };
        batch.events.push(match event.event_type() {
            EventType::Put => WatchEvent::Put(Item { key, value: kv.value().to_vec(), mod_rev: rev }),
            EventType::Delete => WatchEvent::Deleted(key, rev),
        });
    }
    if compacted {
        batch.events.push(WatchEvent::Compacted);
    }
    batch
}
