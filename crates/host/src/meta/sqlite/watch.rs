//! Feeds the watches of one process from the log of events.
//!
//! Invariants: each watch has a cursor, the last revision it was told in full; a watch whose reader is slow keeps
//! its cursor and is fed later, and delays no other.

use rusqlite::{Connection, params};
use std::sync::mpsc::{Receiver, RecvTimeoutError};
use std::time::Duration;
use tokio::sync::mpsc;

use super::super::{Item, WatchEvent};
use super::{Answered, Batch, end_of, int, state, uint};

/// How often to look for writes of other processes.
const POLL: Duration = Duration::from_millis(20);
/// Most events of one look; more than a transaction can have.
const LOOK_EVENTS: usize = 512;
/// Values of one look stop beyond this many bytes; a transaction has at most a quarter of it.
const LOOK_BYTES: usize = 4 << 20;
/// Tell a watch of this many revisions that did not concern it, so that it can resume after them.
const PROGRESS_REVS: u64 = 256;

/// One watch, or a mere nudge if it has no channel.
pub(super) struct Watcher {
    prefix: String,
    cursor: u64,
    told: u64,
    /// The reader was slow: look again although nothing has changed.
    behind: bool,
    batches: Option<mpsc::Sender<Batch>>,
}

impl Watcher {
    pub fn new(prefix: &str, after_rev: u64, batches: mpsc::Sender<Batch>) -> Self {
        Self {
            prefix: prefix.to_owned(),
            cursor: after_rev,
            told: after_rev,
            behind: true,
            batches: Some(batches),
        }
    }

    pub fn nudge() -> Self {
        Self { prefix: String::new(), cursor: 0, told: 0, behind: false, batches: None }
    }

    /// Tells what there is to tell, as far as the reader takes it; whether the watch goes on.
    fn advance(&mut self, connection: &Connection) -> rusqlite::Result<bool> {
        let Some(batches) = &self.batches else { return Ok(false) };
        self.behind = true;
        while !batches.is_closed() {
            let Ok(place) = batches.try_reserve() else { return Ok(true) };
            let look = connection.unchecked_transaction()?;
            let (rev, compacted_rev) = state(&look)?;
            // A revision from the future means that the store is another one than it was.
            if self.cursor < compacted_rev || self.cursor > rev {
                place.send(Batch { rev: self.cursor, events: vec![WatchEvent::Compacted] });
                return Ok(false);
            }
            if self.cursor == rev {
                self.behind = false;
                return Ok(true);
            }
            let (until, events) = events(&look, &self.prefix, self.cursor, rev)?;
            self.cursor = until;
            if !events.is_empty() || until - self.told >= PROGRESS_REVS {
                self.told = until;
                place.send(Batch { rev: until, events });
            }
        }
        Ok(false)
    }
}

/// The events of whole revisions after `after`, and up to which revision they reach.
fn events(
    connection: &Connection,
    prefix: &str,
    after: u64,
    rev: u64,
) -> rusqlite::Result<(u64, Vec<WatchEvent>)> {
    let mut select = connection.prepare_cached(
        "SELECT rev, key, value FROM event
         WHERE rev > ?1 AND rev <= ?2 AND key >= ?3 AND key < ?4 ORDER BY rev, seq LIMIT ?5",
    )?;
    let range = params![int(after), int(rev), prefix, end_of(prefix), int(LOOK_EVENTS as u64)];
    let rows = select.query_map(range, |row| {
        let (rev, key, value) = (uint(row.get(0)?), row.get(1)?, row.get::<_, Option<Vec<u8>>>(2)?);
        Ok(match value {
            Some(value) => WatchEvent::Put(Item { key, value, mod_rev: rev }),
            None => WatchEvent::Deleted(key, rev),
        })
    })?;
    let mut events: Vec<WatchEvent> = Vec::new();
    let mut bytes = 0;
    for event in rows {
        let event = event?;
        let begins = events.last().is_some_and(|last| rev_of(last) < rev_of(&event));
        if begins && bytes > LOOK_BYTES {
            // The rest is for the next look.
            let last = rev_of(&event) - 1;
            return Ok((last, events));
        }
        if let WatchEvent::Put(item) = &event {
            bytes += item.value.len();
        }
        events.push(event);
    }
    if events.len() < LOOK_EVENTS {
        return Ok((rev, events));
    }
    // The last revision may be cut in two: leave it for the next look.
    let last = events.last().map_or(rev, rev_of);
    events.retain(|event| rev_of(event) < last);
    Ok((last - 1, events))
}

fn rev_of(event: &WatchEvent) -> u64 {
    match event {
        WatchEvent::Put(item) => item.mod_rev,
        WatchEvent::Deleted(_, rev) => *rev,
        WatchEvent::Compacted => 0,
    }
}

/// The thread's work, until the store is dropped.
pub(super) fn feed(connection: &Connection, news: &Receiver<Watcher>, answered: &Answered) {
    let mut watchers: Vec<Watcher> = Vec::new();
    let mut seen = -1;
    loop {
        // Without watches there is nothing to look for.
        let first = if watchers.is_empty() {
            news.recv().map_err(|_| RecvTimeoutError::Disconnected)
        } else {
            news.recv_timeout(POLL)
        };
        let first = match first {
            Ok(watcher) => Some(watcher),
            Err(RecvTimeoutError::Timeout) => None,
            Err(RecvTimeoutError::Disconnected) => return,
        };
        let mut changed = first.is_some();
        for watcher in first.into_iter().chain(news.try_iter()) {
            if watcher.batches.is_some() {
                watchers.push(watcher);
            }
        }
        match connection.query_row("PRAGMA data_version", [], |row| row.get::<_, i64>(0)) {
            Ok(version) => {
                answered.now();
                changed |= version != seen;
                seen = version;
            }
            Err(error) => tracing::warn!(%error, "look at the metadata store"),
        }
        watchers.retain_mut(|watcher| {
            if !changed && !watcher.behind {
                return watcher.batches.as_ref().is_some_and(|batches| !batches.is_closed());
            }
            watcher.advance(connection).unwrap_or_else(|error| {
                tracing::warn!(%error, "read the log of the metadata store");
                // It is still marked as behind, so the next poll looks again.
                true
            })
        });
    }
}
