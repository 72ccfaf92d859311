//! What the back-ends share: when the store last answered, and watches as back-ends see them, all events of a revision together, so that a resumed watch neither loses nor
//! repeats half a transaction.

use std::sync::atomic::{AtomicU64, Ordering};
use tokio::sync::mpsc;
use whimbrel_wire::Time;

use super::WatchEvent;
use crate::clock;

/// Events of complete revisions, up to and including `rev`.
#[derive(Clone, Debug)]
pub(super) struct Batch {
    /// Everything up to this revision has been told.
    pub rev: u64,
    /// The events; none if only `rev` is news.
    pub events: Vec<WatchEvent>,
}

/// Batches on their way to a watcher that has not yet taken them.
pub(super) const BATCHES: usize = 16;
/// Events on their way to a watcher that has not yet taken them.
pub(super) const EVENTS: usize = 256;

/// The events of batches, one by one.
pub(super) fn flatten(mut batches: mpsc::Receiver<Batch>) -> mpsc::Receiver<WatchEvent> {
    let (events, receiver) = mpsc::channel(EVENTS);
    tokio::spawn(async move {
        loop {
            let batch = tokio::select! {
                batch = batches.recv() => batch,
                () = events.closed() => return,
            };
            let Some(batch) = batch else { return };
            for event in batch.events {
                if events.send(event).await.is_err() {
                    return;
                }
            }
        }
    });
    receiver
}

/// When the store last answered.
#[derive(Debug, Default)]
pub(super) struct Answered(AtomicU64);

impl Answered {
    pub fn now(&self) {
        self.0.store(clock::now().0, Ordering::Relaxed);
    }

    pub fn ms_ago(&self) -> u64 {
        match self.0.load(Ordering::Relaxed) {
            0 => u64::MAX,
            at => clock::now().since_ms(Time(at)),
        }
    }
}
