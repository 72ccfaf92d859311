//! What a side has written down of its moves: one file per attempt and side, replaced whole.
//!
//! Invariant: an entry is on its way to the disk before the effect that it guards; it survives the end of this
//! process at once, and the loss of power where the machine asks for it.

use std::fs;
use std::path::{Path, PathBuf};

use whimbrel_engine::migrate::handover::{JournalEntry, Side};
use whimbrel_wire::AttemptId;

use crate::durable;
use crate::error::{Context as _, Error, ErrorKind, Result};

/// The directory of all entries.
#[derive(Clone, Debug)]
pub struct Journal {
    dir: PathBuf,
}

impl Journal {
    /// Opens the directory, making it if need be.
    pub fn open(dir: PathBuf) -> Result<Self> {
        fs::create_dir_all(&dir).with_context(|| format!("make directory {}", dir.display()))?;
        Ok(Self { dir })
    }

    fn path(&self, attempt: AttemptId, side: Side) -> PathBuf {
        self.dir.join(format!("{attempt}-{side}.json"))
    }

    /// Where a side keeps what it needs of an attempt beside the entry (device state).
    pub fn attachment(&self, attempt: AttemptId, what: &str) -> PathBuf {
        self.dir.join(format!("{attempt}.{what}"))
    }

    /// Replaces the entry of its attempt and side.
    pub fn write(&self, entry: &JournalEntry, sync: bool) -> Result<()> {
        let path = self.path(entry.offer.attempt, entry.side);
        let bytes = serde_json::to_vec(entry)
            .map_err(|error| Error::with_source(ErrorKind::Internal, "write the journal", error))?;
        if sync { durable::replace(&path, &bytes) } else { durable::replace_fast(&path, &bytes) }
    }

    /// Forgets an attempt.
    pub fn remove(&self, attempt: AttemptId, side: Side) {
        let _ = fs::remove_file(self.path(attempt, side));
        // An entry that came back after power loss would have its `Release` done to a newer copy.
        if let Err(error) = fs::File::open(&self.dir).and_then(|dir| dir.sync_all()) {
            tracing::warn!(%error, "the end of a move was not made durable");
        }
    }

    /// Every entry that is there. One that cannot be read is reported and left: an operator has to look.
    pub fn read_all(&self) -> Result<Vec<JournalEntry>> {
        let mut entries = Vec::new();
        let action = || format!("read directory {}", self.dir.display());
        for file in fs::read_dir(&self.dir).with_context(action)? {
            let path = file.with_context(action)?.path();
            if path.extension().is_some_and(|extension| extension == "json") {
                match read_one(&path) {
                    Ok(entry) => entries.push(entry),
                    Err(error) => tracing::error!(%error, "a move's journal is left as it is"),
                }
            }
        }
        Ok(entries)
    }
}

fn read_one(path: &Path) -> Result<JournalEntry> {
    let action = || format!("read {}", path.display());
    let bytes = fs::read(path).with_context(action)?;
    let entry: JournalEntry = serde_json::from_slice(&bytes)
        .map_err(|error| Error::with_source(ErrorKind::Corrupt, action(), error))?;
    if entry.version > JournalEntry::VERSION {
        return Err(Error::new(
            ErrorKind::Unsupported,
            format!("{}: a newer release wrote it (version {})", action(), entry.version),
        ));
    }
    Ok(entry)
}
