//! The disk for tools: an NBD server on a unix socket, as many connections as clients like.
//!
//! ```text
//!   accept ──▶ handshake (fixed newstyle, options) ──▶ session (requests, answered in any order) ──▶ closed
//! ```
//!
//! Offered: structured replies, `base:allocation`, flush, FUA, trim, write-zeroes, cache, multi-conn. Block sizes are
//! told: 512 at least, 4096 preferred, 32 MiB at most; what keeps not to them is an error of the request.
//!
//! Invariants
//! * A flush on one connection covers what was answered on every other one: all share one disk.
//! * What a client sends is measured before it is believed: options are at most 64 KiB, payloads at most 32 MiB, and
//!   a handshake ends within its limit.
//!
//! Not here: TLS; who may connect is the socket's owner and mode.

#[cfg(test)]
mod fuzz;
mod handshake;
mod proto;
mod session;
#[cfg(test)]
mod test_tools;

use std::collections::HashMap;
use std::os::fd::AsFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use parking_lot::{Condvar, Mutex};
use rustix::event::{PollFd, PollFlags, poll};

use super::event::Waker;
use super::pool::Pool;
use super::slot::DeviceSlot;
use super::socket::{SocketOwner, listen};
use crate::error::{Context, Error, ErrorKind, Result};

/// How a disk is offered over NBD.
#[derive(Clone, Debug)]
pub struct NbdOptions {
    /// Name of the export; clients may ask for it, or for the empty name.
    pub name: String,
    /// Whether clients may only read.
    pub read_only: bool,
    /// Who may connect; our own user with mode 0600 if not said.
    pub owner: Option<SocketOwner>,
    /// Threads for requests that wait for other hosts, stores or flushes.
    pub workers: usize,
    /// Connections over which further ones are closed at once.
    pub max_connections: usize,
    /// How long a handshake may take.
    pub patience: Duration,
    /// How long a request may wait for a disk that is not served, before it is answered with an error.
    pub disk_patience: Duration,
}

impl Default for NbdOptions {
    fn default() -> Self {
        Self {
            name: String::new(),
            read_only: false,
            owner: None,
            workers: 16,
            max_connections: 32,
            patience: Duration::from_secs(30),
            disk_patience: Duration::from_secs(30),
        }
    }
}

/// What all connections share.
struct Export {
    slot: DeviceSlot,
    pool: Pool,
    options: NbdOptions,
    stop: AtomicBool,
}

struct Shared {
    export: Arc<Export>,
    path: PathBuf,
    waker: Waker,
    connections: Mutex<HashMap<u64, UnixStream>>,
    all_closed: Condvar,
}

/// A disk that is being served over NBD. Dropping it ends the service.
pub struct NbdServer {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

impl NbdServer {
    /// Binds `path` and serves the slot's disk there.
    pub fn start(path: &Path, slot: DeviceSlot, options: NbdOptions) -> Result<Self> {
        let listener = listen(path, options.owner)?;
        listener.set_nonblocking(true).with_context(|| format!("listen on {}", path.display()))?;
        let pool = Pool::new("nbd-wait", options.workers);
        let shared = Arc::new(Shared {
            export: Arc::new(Export { slot, pool, options, stop: AtomicBool::new(false) }),
            path: path.to_owned(),
            waker: Waker::new()?,
            connections: Mutex::default(),
            all_closed: Condvar::new(),
        });
        let run = shared.clone();
        let thread = std::thread::Builder::new()
            .name("nbd-serve".to_owned())
            .spawn(move || run.serve(&listener))
            .context("start a thread for NBD")?;
        Ok(Self { shared, thread: Some(thread) })
    }

    /// Where clients connect.
    pub fn path(&self) -> &Path {
        &self.shared.path
    }

    /// The disk being served, or the place for it.
    pub fn slot(&self) -> &DeviceSlot {
        &self.shared.export.slot
    }

    /// How many clients are connected.
    pub fn connections(&self) -> usize {
        self.shared.connections.lock().len()
    }

    /// Ends the service: connections are closed, the socket is removed.
    pub fn stop(mut self) -> Result<()> {
        self.shut_down()
    }

    fn shut_down(&mut self) -> Result<()> {
        let Some(thread) = self.thread.take() else { return Ok(()) };
        self.shared.export.stop.store(true, Ordering::SeqCst);
        self.shared.waker.wake();
        let panicked = thread.join().is_err();
        // A socket that somebody else removed or replaced is not ours to care for.
        let _ = std::fs::remove_file(&self.shared.path);
        let mut connections = self.shared.connections.lock();
        for stream in connections.values() {
            // One that is closed already is what we want.
            let _ = stream.shutdown(std::net::Shutdown::Both);
        }
        let limit = self.shared.export.options.patience;
        self.shared.all_closed.wait_while_for(&mut connections, |open| !open.is_empty(), limit);
        if panicked || !connections.is_empty() {
            return Err(Error::new(ErrorKind::TimedOut, "stop NBD: a connection does not end"));
        }
        Ok(())
    }
}

impl Drop for NbdServer {
    fn drop(&mut self) {
        if let Err(error) = self.shut_down() {
            tracing::error!(%error, "stop NBD");
        }
    }
}

impl Shared {
    fn serve(self: Arc<Self>, listener: &UnixListener) {
        let mut next = 0;
        loop {
            self.waker.prepare();
            if self.export.stop.load(Ordering::SeqCst) {
                return;
            }
            match listener.accept() {
                Ok((stream, _)) => {
                    next += 1;
                    if let Err(error) = self.clone().start(next, stream) {
                        tracing::warn!(socket = %self.path.display(), %error, "NBD client");
                    }
                    continue;
                }
                Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => {}
                Err(error) => {
                    tracing::warn!(socket = %self.path.display(), %error, "accept an NBD client");
                    std::thread::sleep(Duration::from_millis(200));
                    continue;
                }
            }
            let mut fds = [
                PollFd::new(listener, PollFlags::IN),
                PollFd::from_borrowed_fd(self.waker.as_fd(), PollFlags::IN),
            ];
            // An interrupted poll is a look too many, nothing worse.
            let _ = poll(&mut fds, None);
        }
    }

    /// Gives a connection a thread of its own.
    fn start(self: Arc<Self>, id: u64, stream: UnixStream) -> Result<()> {
        stream.set_nonblocking(false).context("set up a connection")?;
        let copy = stream.try_clone().context("copy a connection")?;
        {
            let mut connections = self.connections.lock();
            if connections.len() >= self.export.options.max_connections {
                return Err(Error::new(
                    ErrorKind::Unavailable,
                    "serve one more client: too many connections",
                ));
            }
            connections.insert(id, copy);
        }
        let shared = self.clone();
        let spawned = std::thread::Builder::new().name("nbd-client".to_owned()).spawn(move || {
            let _closed = Closed { shared: &shared, id };
            if let Err(error) = shared.export.serve_client(&stream) {
                tracing::debug!(socket = %shared.path.display(), %error, "NBD client");
            }
        });
        if let Err(error) = spawned {
            self.connections.lock().remove(&id);
            return Err(error).context("start a thread for a client");
        }
        Ok(())
    }
}

/// Takes a connection off the list, however its thread ends.
struct Closed<'a> {
    shared: &'a Shared,
    id: u64,
}

impl Drop for Closed<'_> {
    fn drop(&mut self) {
        let mut connections = self.shared.connections.lock();
        if let Some(stream) = connections.remove(&self.id) {
            // Jobs of the pool may still hold a copy; the client must see the end now.
            let _ = stream.shutdown(std::net::Shutdown::Both);
        }
        if connections.is_empty() {
            self.shared.all_closed.notify_all();
        }
    }
}

impl Export {
    fn serve_client(self: &Arc<Self>, stream: &UnixStream) -> Result<()> {
        let patience = self.options.patience;
        stream.set_read_timeout(Some(patience)).context("set up a connection")?;
        stream.set_write_timeout(Some(patience)).context("set up a connection")?;
        let Some(agreed) = handshake::shake_hands(self, stream)? else { return Ok(()) };
        // A client may be silent for as long as it likes, but not stop taking answers.
        stream.set_read_timeout(None).context("set up a connection")?;
        session::run(self, stream, agreed)
    }
}
