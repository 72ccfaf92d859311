//! Volumes as files, for programs that only know files: a directory in which each attached volume is a raw file.
//!
//! ```text
//!   RUN/files            a tmpfs that nobody can write; there while a volume is attached (`place`)
//!   RUN/files/NAME       a FUSE mount of its own, over an empty file
//!
//!   program ── read, write, fsync, fallocate, lseek … ── kernel ── /dev/fuse ──▶ serving threads (`file`)
//!                                                                     │ now: read_now, write_now ──▶ DeviceSlot
//!                                                                     └ what waits: pools ─────────────▲
//! ```
//!
//! Each volume has its own connection to the kernel, with its own queue there: requests for a volume whose source does
//! not answer pile up, and are limited, in the queue of that volume alone. A file can be taken away by aborting its
//! connection; no other one notices.
//!
//! The kernel caches nothing but what is mapped (`FOPEN_DIRECT_IO`): a write that returned is in the volume, and any
//! offset and length will do; the bytes that a sector has beside those written are read first (`bytes`).
//!
//! Invariants
//! * `fsync`, `fdatasync`, `close` and writes with `O_SYNC` or `O_DSYNC` end after the volume's flush did.
//! * The file never changes its size, owner and mode; in the directory nothing can be made, removed or renamed.
//! * After [`FileExport::stop`] returned no request begins on the disk, whoever has the file open: they get `ENOTCONN`.
//! * A file whose agent was killed answers `ENOTCONN`, and hinders no later agent ([`FileDir::new`]).
//!
//! Not here: what a request may do (`engine::export::file`), what the disk is (`disk`).

mod bytes;
mod file;
mod mount;
mod place;
mod ranges;
#[cfg(test)]
mod test;
#[cfg(test)]
mod test_peers;

use std::fs::File;
use std::os::fd::{AsRawFd as _, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::mpsc;
use std::time::{Duration, Instant};

use fuser::{BackgroundSession, Config, Session, SessionACL};

use super::slot::DeviceSlot;
use crate::error::{Context, Error, ErrorKind, Result};
use file::{DiskFile, Served};
use mount::MountFlags;
pub use place::FileDir;
use place::Place;

/// Threads that take requests from the kernel, of each volume.
const SERVING_THREADS: usize = 3;
/// How long what programs mapped and did not sync is waited for when a file is taken away.
const SYNC_LIMIT: Duration = Duration::from_secs(5);
/// Between two looks whether the serving threads have ended.
const END_POLL: Duration = Duration::from_millis(2);

/// How a disk is shown as a file.
#[derive(Clone, Debug)]
pub struct FileOptions {
    /// The file's name.
    pub name: String,
    /// Whether it may only be read.
    pub read_only: bool,
    /// Threads for requests that wait for other hosts or stores.
    pub workers: usize,
    /// How long the end of the service waits for the serving threads.
    pub patience: Duration,
    /// How long a request may wait for a disk that is not served, before it fails.
    pub disk_patience: Duration,
}

impl Default for FileOptions {
    fn default() -> Self {
        Self {
            name: String::new(),
            read_only: false,
            workers: 8,
            patience: Duration::from_secs(30),
            disk_patience: Duration::from_secs(30),
        }
    }
}

impl FileOptions {
    /// Permission bits of the file.
    fn mode(&self) -> u32 {
        if self.read_only { 0o400 } else { 0o600 }
    }
}

/// A disk that is being served as a file. Dropping it ends the service.
pub struct FileExport {
    place: Place,
    served: Arc<Served>,
    session: Option<BackgroundSession>,
    /// The kernel's number of the connection.
    connection: u32,
}

impl FileExport {
    /// Makes the file appear in `dir`, with the slot's disk in it.
    ///
    /// [`ErrorKind::Missing`] without `/dev/fuse` or the right to mount.
    pub fn start(dir: &Arc<FileDir>, slot: DeviceSlot, options: FileOptions) -> Result<Self> {
        let what = format!("show volume {} as a file", options.name);
        let device = File::options().read(true).write(true).open("/dev/fuse");
        let device = device.map_err(|error| {
            Error::with_source(ErrorKind::Missing, format!("{what}: open /dev/fuse"), error)
                .hint("`modprobe fuse`, and run the agent as root; or attach the volume over nbd")
        })?;
        let place = dir.make(&options.name, options.mode()).with_context(|| what.clone())?;
        let source = format!("whimbrel:{}", options.name);
        let data = format!(
            "fd={},rootmode={:o},user_id={},group_id={},default_permissions",
            device.as_raw_fd(),
            rustix::fs::FileType::RegularFile.as_raw_mode() | options.mode(),
            rustix::process::geteuid().as_raw(),
            rustix::process::getegid().as_raw(),
        );
        let flags = MountFlags { read_only: options.read_only, remount: false };
        mount::mount(&source, place.path(), "fuse.whimbrel", flags, &data).with_context(|| what.clone())?;
        // Whatever fails from here on: the mount goes with this.
        let mut export =
            Self { place, served: Arc::new(Served::new(slot, options)), session: None, connection: 0 };
        export.session = Some(export.serve(device.into()).with_context(|| what.clone())?);
        // Answered by the threads that were just started.
        let there = rustix::fs::stat(export.path()).map_err(std::io::Error::from);
        export.connection = rustix::fs::minor(there.with_context(|| what)?.st_dev);
        Ok(export)
    }

    fn serve(&self, device: OwnedFd) -> Result<BackgroundSession> {
        let mut config = Config::default();
        config.acl = SessionACL::Owner;
        config.n_threads = Some(SERVING_THREADS);
        let session = Session::from_fd(DiskFile(self.served.clone()), device, config.acl, config);
        session.and_then(Session::spawn).context("begin the conversation with the kernel")
    }

    /// Where the file is.
    pub fn path(&self) -> &Path {
        self.place.path()
    }

    /// The disk being served, or the place for it.
    pub fn slot(&self) -> &DeviceSlot {
        self.served.slot()
    }

    /// Ends the service: the file is gone, and who has it open gets `ENOTCONN`.
    pub fn stop(mut self) -> Result<()> {
        self.shut_down()
    }

    fn shut_down(&mut self) -> Result<()> {
        let Some(session) = self.session.take() else { return Ok(()) };
        sync_within(self.path().to_owned(), SYNC_LIMIT);
        self.served.stop();
        if let Err(error) = mount::abort_and_detach(self.path()) {
            // Somebody else unmounted it, but may have it still open.
            tracing::debug!(path = %self.path().display(), %error, "unmount a volume's file");
            self.abort();
        }
        let end = Instant::now() + self.served.patience();
        while !session.guard.is_finished() {
            if Instant::now() > end {
                let what = format!("take {} away: a request does not end", self.path().display());
                return Err(Error::new(ErrorKind::TimedOut, what));
            }
            std::thread::sleep(END_POLL);
        }
        session.join().with_context(|| format!("serve {}", self.path().display()))
    }

    /// Ends a connection that has no place any more. Nothing is lost if it has ended already.
    fn abort(&self) {
        let path = format!("/sys/fs/fuse/connections/{}/abort", self.connection);
        let _ = std::fs::write(path, "1");
    }
}

impl Drop for FileExport {
    fn drop(&mut self) {
        if self.session.is_none() {
            // It never served, or not any more: there is nobody to answer.
            let _ = mount::abort_and_detach(self.path());
        }
        if let Err(error) = self.shut_down() {
            tracing::error!(%error, "stop serving a file");
        }
    }
}

/// Has the kernel write what programs changed in mappings of the file; gives up at the limit.
fn sync_within(path: PathBuf, limit: Duration) {
    let (done, result) = mpsc::channel();
    let sync = move || {
        let synced =
            File::open(path).and_then(|file| rustix::fs::syncfs(&file).map_err(std::io::Error::from));
        // Nobody waits any more: the limit is over.
        let _ = done.send(synced);
    };
    match std::thread::Builder::new().name("fuse-sync".to_owned()).spawn(sync) {
        Ok(_) => match result.recv_timeout(limit) {
            Ok(Ok(())) => {}
            Ok(Err(error)) => tracing::debug!(%error, "sync a file that is being taken away"),
            Err(_) => tracing::warn!("what was mapped of a file that goes away could not be written"),
        },
        Err(error) => tracing::warn!(%error, "start a thread to sync a file"),
    }
}
