//! The metadata store in one SQLite file: write-ahead log, full sync, any number of agents of one machine.
//!
//! ```text
//!   kv(key, value, mod_rev)          what stands
//!   event(rev, seq, key, value)      what changed: the log that watches read, its old end compacted
//!   outcome(id, rev, made_s)         which transactions were made, or never will be
//!   state(rev, compacted_rev)        one row
//! ```
//!
//! Three threads, so that the runtime never waits for the disk: one writes, one reads, one feeds the watches. The
//! last is woken by writes of this process and looks every 20 ms whether another process has written.
//!
//! Invariants: a transaction's changes, its events, its outcome and the new revision are one SQLite transaction
//! that began as a writer; a watch reads the log in the order of revisions, whole revisions at a time.

use async_trait::async_trait;
use parking_lot::Mutex;
use rusqlite::{Connection, OptionalExtension, TransactionBehavior, params};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::mpsc as thread_mpsc;
use std::time::Duration;
use tokio::sync::{mpsc, oneshot};
use tokio::time::timeout;

use super::batch::{Answered, BATCHES, Batch, flatten};
use super::{Committed, Compare, Item, MetaStore, Op, Snapshot, TxnId, WatchEvent, check_txn};
use crate::clock;
use crate::error::{Context, Error, ErrorKind, Result};
use crate::metrics::metrics;

mod watch;

use watch::{Watcher, feed};

/// Jobs waiting for a thread.
const JOBS: usize = 256;
/// How long a statement waits for another process that writes.
const BUSY: Duration = Duration::from_secs(4);
/// How long an answer is waited for before the disk counts as hanging.
const ANSWER: Duration = Duration::from_secs(8);
/// Compaction runs once per so many transactions.
const COMPACT_EVERY: u64 = 64;
/// Outcomes are kept for so long, seconds.
const OUTCOME_S: u64 = 3_600;
/// Version of the tables; a newer file is refused.
const FORMAT: u64 = 1;

/// What to do about a damaged file.
const RESTORE: &str = "running VMs are not affected; with the agents that use it stopped, put back a copy of this \
    file, or what `sqlite3 FILE .recover` finds in it";

const TABLES: &str = "
    CREATE TABLE IF NOT EXISTS kv(key TEXT PRIMARY KEY, value BLOB NOT NULL, mod_rev INTEGER NOT NULL) WITHOUT ROWID;
    CREATE TABLE IF NOT EXISTS event(rev INTEGER NOT NULL, seq INTEGER NOT NULL, key TEXT NOT NULL, value BLOB,
        PRIMARY KEY(rev, seq)) WITHOUT ROWID;
    CREATE TABLE IF NOT EXISTS outcome(id BLOB PRIMARY KEY, rev INTEGER, made_s INTEGER NOT NULL) WITHOUT ROWID;
    CREATE TABLE IF NOT EXISTS state(one INTEGER PRIMARY KEY CHECK(one = 1), rev INTEGER NOT NULL,
        compacted_rev INTEGER NOT NULL, format INTEGER NOT NULL);
    INSERT OR IGNORE INTO state VALUES (1, 0, 0, 1);
";

type Job = Box<dyn FnOnce(&mut Connection) + Send>;

/// See the module's charter.
pub struct SqliteStore {
    write: mpsc::Sender<Job>,
    read: mpsc::Sender<Job>,
    watch: Mutex<thread_mpsc::SyncSender<Watcher>>,
    answered: Arc<Answered>,
    path: PathBuf,
    keep_revs: u64,
}

fn failed(what: impl Into<String>) -> impl FnOnce(rusqlite::Error) -> Error {
    move |error| {
        let kind = match error.sqlite_error_code() {
            Some(rusqlite::ErrorCode::DatabaseBusy | rusqlite::ErrorCode::DatabaseLocked) => {
                ErrorKind::Unavailable
            }
            Some(rusqlite::ErrorCode::DiskFull) => ErrorKind::NoSpace,
            Some(rusqlite::ErrorCode::NotADatabase | rusqlite::ErrorCode::DatabaseCorrupt) => {
                ErrorKind::Corrupt
            }
            _ => ErrorKind::Io,
        };
        let error = Error::with_source(kind, what, error);
        if kind == ErrorKind::Corrupt { error.hint(RESTORE) } else { error }
    }
}

fn connect(path: &Path) -> Result<Connection> {
    let what = || format!("open metadata store {}", path.display());
    let open = || -> rusqlite::Result<Connection> {
        let connection = Connection::open(path)?;
        connection.busy_timeout(BUSY)?;
        connection.pragma_update(None, "journal_mode", "wal")?;
        connection.pragma_update(None, "synchronous", "full")?;
        Ok(connection)
    };
    open().map_err(failed(what()))
}

impl SqliteStore {
    /// Opens the file, making it if it does not exist (mode 0600), and keeps the last 10,000 changes for watches.
    pub fn open(path: &Path) -> Result<Arc<Self>> {
        Self::open_keeping(path, 10_000)
    }

    /// As [`SqliteStore::open`], keeping the changes of the last `keep_revs` revisions.
    pub fn open_keeping(path: &Path, keep_revs: u64) -> Result<Arc<Self>> {
        make_private(path)?;
        let writer = connect(path)?;
        let what = || format!("open metadata store {}", path.display());
        // Damage is to be known now, not when a right has to change hands; the file has a few MiB at most.
        let found: String =
            writer.query_row("PRAGMA quick_check(1)", [], |row| row.get(0)).map_err(failed(what()))?;
        if found != "ok" {
            let text = format!("{}: the file is damaged: {}", what(), found.replace('\n', " "));
            return Err(Error::new(ErrorKind::Corrupt, text).hint(RESTORE));
        }
        writer.execute_batch(TABLES).map_err(failed(what()))?;
        let format = writer.query_row("SELECT format FROM state", [], |row| row.get::<_, i64>(0));
        if format.map_err(failed(what()))? != FORMAT as i64 {
            return Err(Error::new(ErrorKind::Unsupported, format!("{}: it is of a newer release", what())));
        }
        let answered = Arc::new(Answered::default());
        answered.now();
        let (watch, watchers) = thread_mpsc::sync_channel(1024);
        let feeder = (connect(path)?, answered.clone());
        thread("meta-watch", move || feed(&feeder.0, &watchers, &feeder.1))?;
        Ok(Arc::new(Self {
            write: worker("meta-write", writer)?,
            read: worker("meta-read", connect(path)?)?,
            watch: Mutex::new(watch),
            answered,
            path: path.to_owned(),
            keep_revs,
        }))
    }

    /// The file.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Runs `work` on one of the threads. Its error is `lost` if no answer comes at all.
    async fn run<T: Send + 'static>(
        &self,
        thread: &mpsc::Sender<Job>,
        lost: ErrorKind,
        work: impl FnOnce(&mut Connection) -> Result<T> + Send + 'static,
    ) -> Result<T> {
        let (answer, answered) = oneshot::channel();
        let job: Job = Box::new(move |connection| {
            // The caller may have gone meanwhile.
            let _ = answer.send(work(connection));
        });
        let stuck = || Error::new(ErrorKind::Unavailable, "use the metadata store: its disk does not answer");
        match timeout(ANSWER, thread.send(job)).await {
            Err(_) => return Err(stuck()),
            Ok(Err(_)) => {
                return Err(Error::new(ErrorKind::Internal, "use the metadata store: it is closed"));
            }
            Ok(Ok(())) => {}
        }
        match timeout(ANSWER, answered).await {
            Ok(Ok(result)) => {
                if result.is_ok() {
                    self.answered.now();
                }
                result
            }
            _ => Err(Error::new(lost, "use the metadata store: its disk does not answer")),
        }
    }

    /// As [`MetaStore::watch`], whole revisions at a time.
    pub(super) async fn watch_batches(&self, prefix: &str, after_rev: u64) -> Result<mpsc::Receiver<Batch>> {
        let (batches, receiver) = mpsc::channel(BATCHES);
        let watcher = Watcher::new(prefix, after_rev, batches);
        self.watch.lock().try_send(watcher).map_err(|_| {
            Error::new(ErrorKind::Unavailable, "watch the metadata store: too many watches begin at once")
        })?;
        Ok(receiver)
    }
}

/// Makes the file before SQLite does, readable by its owner only.
fn make_private(path: &Path) -> Result<()> {
    use std::os::unix::fs::OpenOptionsExt;
    let made = std::fs::OpenOptions::new().append(true).create(true).mode(0o600).open(path);
    made.map(drop).with_context(|| format!("open metadata store {}", path.display()))
}

fn thread(name: &str, work: impl FnOnce() + Send + 'static) -> Result<()> {
    let started = std::thread::Builder::new().name(name.to_owned()).spawn(work);
    started.map(drop).context("start a thread of the metadata store")
}

fn worker(name: &str, mut connection: Connection) -> Result<mpsc::Sender<Job>> {
    let (jobs, mut queue) = mpsc::channel::<Job>(JOBS);
    thread(name, move || {
        while let Some(job) = queue.blocking_recv() {
            job(&mut connection);
        }
    })?;
    Ok(jobs)
}

/// SQLite's integers are signed; revisions stay far below 2^63.
fn int(number: u64) -> i64 {
    i64::try_from(number).unwrap_or(i64::MAX)
}

fn uint(number: i64) -> u64 {
    u64::try_from(number).unwrap_or(0)
}

/// The end of the range of keys that start with `prefix`.
fn end_of(prefix: &str) -> String {
    format!("{prefix}\u{10FFFF}")
}

fn state(connection: &Connection) -> rusqlite::Result<(u64, u64)> {
    connection
        .prepare_cached("SELECT rev, compacted_rev FROM state")?
        .query_row([], |row| Ok((uint(row.get(0)?), uint(row.get(1)?))))
}

fn read(connection: &mut Connection, prefix: &str) -> rusqlite::Result<Snapshot> {
    let txn = connection.transaction()?;
    let (rev, _) = state(&txn)?;
    let items = {
        let mut select = txn
            .prepare_cached("SELECT key, value, mod_rev FROM kv WHERE key >= ?1 AND key < ?2 ORDER BY key")?;
        let rows = select.query_map([prefix, &end_of(prefix)], |row| {
            Ok(Item { key: row.get(0)?, value: row.get(1)?, mod_rev: uint(row.get(2)?) })
        })?;
        rows.collect::<rusqlite::Result<Vec<_>>>()?
    };
    Ok(Snapshot { items, rev })
}

fn get(connection: &Connection, key: &str) -> rusqlite::Result<Option<Item>> {
    let mut select = connection.prepare_cached("SELECT key, value, mod_rev FROM kv WHERE key = ?1")?;
    let item = select.query_row([key], |row| {
        Ok(Item { key: row.get(0)?, value: row.get(1)?, mod_rev: uint(row.get(2)?) })
    });
    item.optional()
}

/// What is known of a transaction: `Some(None)` if it never will be made.
fn outcome(connection: &Connection, id: TxnId) -> rusqlite::Result<Option<Option<u64>>> {
    let mut select = connection.prepare_cached("SELECT rev FROM outcome WHERE id = ?1")?;
    let found = select.query_row([id.0.as_bytes()], |row| Ok(row.get::<_, Option<i64>>(0)?.map(uint)));
    found.optional()
}

fn note_outcome(connection: &Connection, id: TxnId, rev: Option<u64>) -> rusqlite::Result<()> {
    let mut insert = connection.prepare_cached("INSERT INTO outcome VALUES (?1, ?2, ?3)")?;
    insert.execute(params![id.0.as_bytes(), rev.map(int), int(clock::wall_s())]).map(drop)
}

fn holds(connection: &Connection, compare: &Compare) -> rusqlite::Result<bool> {
    let (key, wanted) = match compare {
        Compare::Absent(key) => (key, None),
        Compare::Unchanged(key, rev) => (key, Some(*rev)),
    };
    let mut select = connection.prepare_cached("SELECT mod_rev FROM kv WHERE key = ?1")?;
    let found = select.query_row([key], |row| Ok(uint(row.get(0)?))).optional()?;
    Ok(found == wanted)
}

/// Makes the changes as revision `rev`; whether there were any.
fn change(connection: &Connection, rev: u64, ops: &[Op]) -> rusqlite::Result<bool> {
    let mut changed = false;
    for (seq, op) in ops.iter().enumerate() {
        let (key, value) = match op {
            Op::Put(key, value) => {
                let mut put = connection.prepare_cached("INSERT OR REPLACE INTO kv VALUES (?1, ?2, ?3)")?;
                put.execute(params![key, value, int(rev)])?;
                (key, Some(value))
            }
            Op::Delete(key) => {
                let mut delete = connection.prepare_cached("DELETE FROM kv WHERE key = ?1")?;
                if delete.execute([key])? == 0 {
                    continue;
                }
                (key, None)
            }
        };
        changed = true;
        let mut log = connection.prepare_cached("INSERT INTO event VALUES (?1, ?2, ?3, ?4)")?;
        log.execute(params![int(rev), int(seq as u64), key, value])?;
    }
    Ok(changed)
}

fn compact(connection: &Connection, rev: u64, keep_revs: u64) -> rusqlite::Result<()> {
    let until = int(rev.saturating_sub(keep_revs));
    connection.prepare_cached("DELETE FROM event WHERE rev <= ?1")?.execute([until])?;
    connection.prepare_cached("UPDATE state SET compacted_rev = max(compacted_rev, ?1)")?.execute([until])?;
    let old_s = int(clock::wall_s().saturating_sub(OUTCOME_S));
    connection.prepare_cached("DELETE FROM outcome WHERE made_s < ?1")?.execute([old_s])?;
    Ok(())
}

/// A transaction's result, before it is committed; `Err` inside is an answer, not a failure.
fn prepare(
    connection: &Connection,
    id: TxnId,
    compare: &[Compare],
    ops: &[Op],
    keep_revs: u64,
) -> rusqlite::Result<Result<Committed>> {
    match outcome(connection, id)? {
        Some(Some(rev)) => return Ok(Ok(Committed::Yes(rev))),
        Some(None) => {
            let late = "change records: the request came after it had been given up";
            return Ok(Err(Error::new(ErrorKind::Cancelled, late)));
        }
        None => {}
    }
    for condition in compare {
        if !holds(connection, condition)? {
            return Ok(Ok(Committed::Conflict));
        }
    }
    let (rev, _) = state(connection)?;
    let next = rev + 1;
    let rev = if change(connection, next, ops)? {
        connection.prepare_cached("UPDATE state SET rev = ?1")?.execute([int(next)])?;
        if next.is_multiple_of(COMPACT_EVERY.min(keep_revs.max(1))) {
            compact(connection, next, keep_revs)?;
        }
        next
    } else {
        rev
    };
    note_outcome(connection, id, Some(rev))?;
    Ok(Ok(Committed::Yes(rev)))
}

fn txn(
    connection: &mut Connection,
    id: TxnId,
    compare: &[Compare],
    ops: &[Op],
    keep_revs: u64,
) -> Result<Committed> {
    let what = "change records";
    let txn = connection.transaction_with_behavior(TransactionBehavior::Immediate).map_err(failed(what))?;
    let result = prepare(&txn, id, compare, ops, keep_revs).map_err(failed(what))?;
    if !matches!(result, Ok(Committed::Yes(_))) {
        return result;
    }
    match txn.commit() {
        Ok(()) => result,
        // A commit that found the file locked has not happened; any other failure of a disk proves nothing.
        Err(error) if error.sqlite_error_code() == Some(rusqlite::ErrorCode::DatabaseBusy) => {
            Err(failed(what)(error))
        }
        Err(error) => Err(Error::with_source(ErrorKind::Unknown, what, error)),
    }
}

fn resolve(connection: &mut Connection, id: TxnId) -> rusqlite::Result<Option<u64>> {
    let txn = connection.transaction_with_behavior(TransactionBehavior::Immediate)?;
    if let Some(known) = outcome(&txn, id)? {
        return Ok(known);
    }
    note_outcome(&txn, id, None)?;
    txn.commit()?;
    Ok(None)
}

#[async_trait]
impl MetaStore for SqliteStore {
    async fn read(&self, prefix: &str) -> Result<Snapshot> {
        let prefix = prefix.to_owned();
        self.run(&self.read, ErrorKind::Unavailable, move |connection| {
            read(connection, &prefix).map_err(failed("read records"))
        })
        .await
    }

    async fn get(&self, key: &str) -> Result<Option<Item>> {
        let key = key.to_owned();
        self.run(&self.read, ErrorKind::Unavailable, move |connection| {
            get(connection, &key).map_err(failed("read a record"))
        })
        .await
    }

    async fn txn_as(&self, id: TxnId, compare: Vec<Compare>, ops: Vec<Op>) -> Result<Committed> {
        check_txn(&compare, &ops)?;
        let keep_revs = self.keep_revs;
        let result = self
            .run(&self.write, ErrorKind::Unknown, move |connection| {
                txn(connection, id, &compare, &ops, keep_revs)
            })
            .await;
        let label = match &result {
            Ok(Committed::Yes(_)) => "committed",
            Ok(Committed::Conflict) => "conflict",
            Err(error) if error.kind() == ErrorKind::Unknown => "unknown",
            Err(_) => "failed",
        };
        metrics().meta_transactions.with_label_values(&[label]).inc();
        if label == "committed" {
            // Wakes the thread that feeds the watches; if its queue is full it is awake.
            let _ = self.watch.lock().try_send(Watcher::nudge());
        }
        result
    }

    async fn resolve(&self, id: TxnId) -> Result<Option<u64>> {
        self.run(&self.write, ErrorKind::Unavailable, move |connection| {
            resolve(connection, id).map_err(failed("find out about a transaction"))
        })
        .await
    }

    async fn watch(&self, prefix: &str, after_rev: u64) -> Result<mpsc::Receiver<WatchEvent>> {
        Ok(flatten(self.watch_batches(prefix, after_rev).await?))
    }

    fn answered_ms_ago(&self) -> u64 {
        self.answered.ms_ago()
    }
}
