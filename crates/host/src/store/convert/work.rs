//! Temporary directories: one per conversion, locked while in use, swept at start.

use std::fs::{DirBuilder, File, OpenOptions};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use uuid::Uuid;

use crate::error::{Context, Result};

/// A directory that is removed when dropped.
#[derive(Debug)]
pub(super) struct WorkDir {
    path: PathBuf,
    _lock: File,
}

fn root(work_dir: &Path) -> PathBuf {
    work_dir.join("convert")
}

impl WorkDir {
    pub(super) fn new(work_dir: &Path) -> Result<Self> {
        let root = root(work_dir);
        std::fs::create_dir_all(&root).with_context(|| format!("make directory {}", root.display()))?;
        let path = root.join(Uuid::new_v4().to_string());
        let what = || format!("make work directory {}", path.display());
        DirBuilder::new().mode(0o700).create(&path).with_context(what)?;
        let lock = File::open(&path).with_context(what)?;
        rustix::fs::flock(&lock, rustix::fs::FlockOperation::NonBlockingLockExclusive).with_context(what)?;
        Ok(Self { path, _lock: lock })
    }

    pub(super) fn at(&self, name: &str) -> PathBuf {
        self.path.join(name)
    }

    /// A new file in the directory, for this process to read and write.
    pub(super) fn create(&self, name: &str) -> Result<File> {
        let path = self.at(name);
        let mut options = OpenOptions::new();
        options.read(true).write(true).create_new(true).mode(0o600);
        options.open(&path).with_context(|| format!("create {}", path.display()))
    }
}

impl Drop for WorkDir {
    fn drop(&mut self) {
        if let Err(error) = std::fs::remove_dir_all(&self.path) {
            tracing::warn!(path = %self.path.display(), %error, "convert: work directory not removed");
        }
    }
}

/// Removes directories whose owner is gone.
pub(super) fn sweep(work_dir: &Path) -> Result<()> {
    let root = root(work_dir);
    let entries = match std::fs::read_dir(&root) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(()),
        entries => entries.with_context(|| format!("list {}", root.display()))?,
    };
    for entry in entries {
        let path = entry.with_context(|| format!("list {}", root.display()))?.path();
        let Ok(dir) = File::open(&path) else { continue };
        if rustix::fs::flock(&dir, rustix::fs::FlockOperation::NonBlockingLockExclusive).is_ok() {
            std::fs::remove_dir_all(&path).with_context(|| format!("remove {}", path.display()))?;
        }
    }
    Ok(())
}
