//! The directory of the files: a small tmpfs that is read-only but for the moments in which a file comes or goes.
//!
//! ```text
//!   nothing ──first file──▶ mounted ──last file──▶ nothing
//!                             ▲ │ killed
//!                             └─▼ a dead mount: detached by the next `FileDir::new`
//! ```
//!
//! Without it a wrong name (`cp disk.raw FILES/tpyo`) would quietly fill the host's RAM.
//!
//! Invariants
//! * The tmpfs is there exactly while it has files.
//! * A file in it is empty, and only a place to mount something.

use std::fs::{self, File};
use std::os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use parking_lot::Mutex;

use super::mount::{self, MountFlags};
use crate::error::{Context, Error, ErrorKind, Result};

/// Mounts on top of each other that are taken away at most: one is what a killed agent leaves.
const DEAD_MAX: usize = 64;
const OPTIONS: &str = "mode=0700,size=64k";

/// See the module's charter.
pub struct FileDir {
    path: PathBuf,
    /// Files in it.
    files: Mutex<usize>,
}

impl FileDir {
    /// The directory `path`, empty; what an agent that was killed left there is taken away.
    pub fn new(path: PathBuf) -> Result<Arc<Self>> {
        for _ in 0..DEAD_MAX {
            // Not there, or nothing mounted: both are what is wanted.
            if mount::detach(&path).is_err() {
                break;
            }
            tracing::info!(path = %path.display(), "took away a mount that an earlier agent left");
        }
        fs::DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(&path)
            .with_context(|| format!("make directory {}", path.display()))?;
        Ok(Arc::new(Self { path, files: Mutex::default() }))
    }

    /// Makes a place for the file `name`, with these permission bits.
    pub(super) fn make(self: &Arc<Self>, name: &str, mode: u32) -> Result<Place> {
        let mut files = self.files.lock();
        if *files == 0 {
            let flags = MountFlags { read_only: true, remount: false };
            mount::mount("whimbrel", &self.path, "tmpfs", flags, OPTIONS).map_err(|error| {
                Error::with_source(ErrorKind::Missing, "mount a directory for volumes as files", error)
                    .hint("run the agent as root; or attach the volume over nbd")
            })?;
        }
        let path = self.path.join(name);
        let made = self.writable(|| {
            let made = File::options().write(true).create_new(true).mode(mode).open(&path);
            made.map(drop).with_context(|| format!("make {}", path.display()))
        });
        if made.is_err() && *files == 0 {
            self.unmount();
        }
        made?;
        *files += 1;
        Ok(Place { dir: self.clone(), path })
    }

    /// Does something to the directory.
    fn writable(&self, change: impl FnOnce() -> Result<()>) -> Result<()> {
        let remount = |read_only| {
            let flags = MountFlags { read_only, remount: true };
            mount::mount("whimbrel", &self.path, "tmpfs", flags, OPTIONS)
        };
        remount(false)?;
        let changed = change();
        remount(true)?;
        changed
    }

    fn unmount(&self) {
        if let Err(error) = mount::detach(&self.path) {
            tracing::warn!(path = %self.path.display(), %error, "unmount the directory of files");
        }
    }
}

/// A file in the directory; dropping it removes the file. What is mounted there must be gone before.
pub(super) struct Place {
    dir: Arc<FileDir>,
    path: PathBuf,
}

impl Place {
    pub(super) fn path(&self) -> &Path {
        &self.path
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let mut files = self.dir.files.lock();
        *files -= 1;
        if *files == 0 {
            return self.dir.unmount();
        }
        let removed = self.dir.writable(|| {
            fs::remove_file(&self.path).with_context(|| format!("remove {}", self.path.display()))
        });
        if let Err(error) = removed {
            tracing::warn!(%error, "remove a volume's file");
        }
    }
}
