//! Records what a layer does to its files, in order, and makes it fail: for crash and full-disk tests.

use parking_lot::Mutex;
use std::io;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

/// One change of a file or of the directory.
#[derive(Clone, Debug)]
pub(in crate::disk) enum Op {
    Create(String),
    Write {
        name: String,
        offset: u64,
        bytes: Vec<u8>,
    },
    Sync(String),
    Remove(String),
    SyncDir,
    /// Something a test wants to find again.
    Mark(u64),
}

#[derive(Debug)]
pub(in crate::disk) struct Recorder {
    pub(in crate::disk) ops: Mutex<Vec<Op>>,
    /// Bytes by which files may still grow before the disk is full.
    pub(in crate::disk) space: AtomicU64,
    pub(in crate::disk) sync_fails: AtomicBool,
    pub(in crate::disk) syncs: AtomicU64,
    /// How long each sync takes.
    pub(in crate::disk) sync_ms: AtomicU64,
    /// Whether ops are kept; counting goes on without.
    pub(in crate::disk) keep: AtomicBool,
}

impl Default for Recorder {
    fn default() -> Self {
        Self {
            ops: Mutex::default(),
            space: AtomicU64::new(u64::MAX),
            sync_fails: AtomicBool::new(false),
            syncs: AtomicU64::new(0),
            sync_ms: AtomicU64::new(0),
            keep: AtomicBool::new(true),
        }
    }
}

impl Recorder {
    pub(in crate::disk) fn mark(&self, number: u64) {
        self.ops.lock().push(Op::Mark(number));
    }
}

pub(super) fn note(recorder: Option<&Recorder>, op: impl FnOnce() -> Op) {
    if let Some(recorder) = recorder.filter(|recorder| recorder.keep.load(Ordering::Relaxed)) {
        recorder.ops.lock().push(op());
    }
}

pub(super) fn before_write(recorder: Option<&Recorder>, length: u64) -> io::Result<()> {
    let Some(recorder) = recorder else { return Ok(()) };
    let take = |space: u64| if space == u64::MAX { Some(space) } else { space.checked_sub(length) };
    match recorder.space.fetch_update(Ordering::Relaxed, Ordering::Relaxed, take) {
        Ok(_) => Ok(()),
        Err(_) => Err(io::ErrorKind::StorageFull.into()),
    }
}

pub(super) fn before_sync(recorder: Option<&Recorder>) -> io::Result<()> {
    let Some(recorder) = recorder else { return Ok(()) };
    recorder.syncs.fetch_add(1, Ordering::Relaxed);
    std::thread::sleep(std::time::Duration::from_millis(recorder.sync_ms.load(Ordering::Relaxed)));
    if recorder.sync_fails.load(Ordering::Relaxed) {
        Err(io::Error::from_raw_os_error(libc::EIO))
    } else {
        Ok(())
    }
}
