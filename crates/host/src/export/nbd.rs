//! The disk for tools and other machines: an NBD server, as many connections as clients like.
//!
//! ```text
//!   unix socket ─┐            line (plain, or TLS)
//!                ├─ accept ──▶ handshake (engine::export::nbd) ──▶ session (requests, in any order) ──▶ closed
//!   TCP, TLS ────┘                                                   │ what would wait: pool, mailbox
//!                                                                    └──▶ DeviceSlot ──▶ disk
//! ```
//!
//! Offered: fixed newstyle negotiation, structured replies, extended headers, `base:allocation`, flush, FUA, trim,
//! write-zeroes (no hole, fast), cache, multi-conn. Lengths and offsets are in units of 512 bytes, payloads at most
//! 32 MiB; what keeps not to that is an error of the request.
//!
//! Invariants
//! * A flush on one connection covers what was answered on every other one: all share one disk.
//! * What a client sends is measured before it is believed, and a handshake ends within its limit.
//! * A connection has its own thread, its own threads for requests that wait, and about 100 MiB at most: one that
//!   sends rubbish, stops reading or vanishes takes nothing from the others.
//! * Over TCP nothing is told before TLS stands and the client's certificate was checked; a unix socket has no TLS,
//!   who may connect is its owner and mode.
//! * A disk that grew is larger for connections that begin afterwards.
//!
//! Not here: bytes (`wire::nbd`), what is agreed on and what a request may do (`engine::export::nbd`).

#[cfg(test)]
mod fuzz;
mod handshake;
mod line;
mod mailbox;
mod session;
#[cfg(test)]
mod test_client;
#[cfg(test)]
mod test_hostile;
#[cfg(test)]
mod test_tls;
#[cfg(test)]
mod test_tools;

use std::collections::BTreeMap;
use std::net::{SocketAddr, TcpListener};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use parking_lot::{Condvar, Mutex};
use rustix::event::{PollFd, PollFlags, poll};
use rustix::net::sockopt;
use whimbrel_engine::export::nbd::Offer;

use super::event::Waker;
use super::slot::{DeviceSlot, Entered};
use super::socket::{SocketOwner, listen};
use crate::block_dev::BlockDev;
use crate::error::{Context, Error, ErrorKind, Result};
use crate::link::ExportTls;
use line::Line;

/// So many times the clients at once may there be with those whose threads are just ending.
const ENDING_TIMES: usize = 4;

/// How a disk is offered over NBD.
#[derive(Clone, Debug)]
pub struct NbdOptions {
    /// Name of the export; clients may ask for it, or for the empty name.
    pub name: String,
    /// Whether clients may only read.
    pub read_only: bool,
    /// Who may connect to a unix socket; our own user with mode 0600 if not said.
    pub owner: Option<SocketOwner>,
    /// Threads of a connection for requests that wait for other hosts or stores.
    pub workers: usize,
    /// Clients at once; further ones are closed. One that has not got through its handshake makes room for another.
    pub max_connections: usize,
    /// How long a handshake may take, and how long a client may refuse to take answers.
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
            workers: 8,
            max_connections: 32,
            patience: Duration::from_secs(30),
            disk_patience: Duration::from_secs(30),
        }
    }
}

/// What all connections share.
struct Export {
    slot: DeviceSlot,
    options: NbdOptions,
    tls: Option<ExportTls>,
    stop: AtomicBool,
}

/// Where clients connect.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum NbdPlace {
    /// A unix socket.
    Unix(PathBuf),
    /// A TCP port, with TLS.
    Tcp(SocketAddr),
}

impl std::fmt::Display for NbdPlace {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Unix(path) => path.display().fmt(f),
            Self::Tcp(address) => address.fmt(f),
        }
    }
}

enum Listener {
    Unix(UnixListener),
    Tcp(TcpListener),
}

impl Listener {
    fn set_nonblocking(&self) -> std::io::Result<()> {
        match self {
            Self::Unix(listener) => listener.set_nonblocking(true),
            Self::Tcp(listener) => listener.set_nonblocking(true),
        }
    }

    fn accept(&self) -> std::io::Result<OwnedFd> {
        match self {
            Self::Unix(listener) => {
                let (stream, _) = listener.accept()?;
                stream.set_nonblocking(false)?;
                Ok(stream.into())
            }
            Self::Tcp(listener) => {
                let (stream, _) = listener.accept()?;
                stream.set_nonblocking(false)?;
                // These fail for a client that is gone already, which is noticed soon enough.
                let _ = stream.set_nodelay(true);
                // One whose machine is gone is noticed after two minutes.
                let _ = sockopt::set_socket_keepalive(&stream, true);
                let _ = sockopt::set_tcp_keepidle(&stream, Duration::from_secs(60));
                let _ = sockopt::set_tcp_keepintvl(&stream, Duration::from_secs(15));
                let _ = sockopt::set_tcp_keepcnt(&stream, 4);
                Ok(stream.into())
            }
        }
    }
}

impl AsFd for Listener {
    fn as_fd(&self) -> BorrowedFd<'_> {
        match self {
            Self::Unix(listener) => listener.as_fd(),
            Self::Tcp(listener) => listener.as_fd(),
        }
    }
}

/// A client that is connected.
struct Connection {
    socket: Arc<OwnedFd>,
    /// Whether its handshake is over.
    settled: AtomicBool,
    /// Whether it was cut off for the sake of another.
    dismissed: AtomicBool,
}

struct Shared {
    export: Arc<Export>,
    place: NbdPlace,
    waker: Waker,
    /// By the order in which they came.
    connections: Mutex<BTreeMap<u64, Arc<Connection>>>,
    all_closed: Condvar,
}

/// A disk that is being served over NBD. Dropping it ends the service.
pub struct NbdServer {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

impl NbdServer {
    /// Binds the unix socket `path` and serves the slot's disk there.
    pub fn start(path: &Path, slot: DeviceSlot, options: NbdOptions) -> Result<Self> {
        let listener = Listener::Unix(listen(path, options.owner)?);
        Self::serve(listener, NbdPlace::Unix(path.to_owned()), slot, options, None)
    }

    /// Binds a TCP port and serves the slot's disk there, to whom `tls` lets in. Port 0: one that is free.
    pub fn start_tcp(
        address: SocketAddr,
        tls: ExportTls,
        slot: DeviceSlot,
        options: NbdOptions,
    ) -> Result<Self> {
        let listener = TcpListener::bind(address).with_context(|| format!("listen on {address}"))?;
        let address = listener.local_addr().context("ask for the listening address")?;
        Self::serve(Listener::Tcp(listener), NbdPlace::Tcp(address), slot, options, Some(tls))
    }

    fn serve(
        listener: Listener,
        place: NbdPlace,
        slot: DeviceSlot,
        options: NbdOptions,
        tls: Option<ExportTls>,
    ) -> Result<Self> {
        listener.set_nonblocking().with_context(|| format!("listen on {place}"))?;
        let shared = Arc::new(Shared {
            export: Arc::new(Export { slot, options, tls, stop: AtomicBool::new(false) }),
            place,
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
    pub fn place(&self) -> &NbdPlace {
        &self.shared.place
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
        if let NbdPlace::Unix(path) = &self.shared.place {
            // A socket that somebody else removed or replaced is not ours to care for.
            let _ = std::fs::remove_file(path);
        }
        let mut connections = self.shared.connections.lock();
        for connection in connections.values() {
            line::shut(&connection.socket);
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
    fn serve(self: Arc<Self>, listener: &Listener) {
        let mut next = 0;
        loop {
            self.waker.prepare();
            if self.export.stop.load(Ordering::SeqCst) {
                return;
            }
            match listener.accept() {
                Ok(socket) => {
                    next += 1;
                    if let Err(error) = self.clone().start(next, socket) {
                        // Not louder: how often is up to whoever connects.
                        tracing::debug!(place = %self.place, %error, "NBD client");
                    }
                    continue;
                }
                Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => {}
                Err(error) => {
                    tracing::warn!(place = %self.place, %error, "accept an NBD client");
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
    fn start(self: Arc<Self>, id: u64, socket: OwnedFd) -> Result<()> {
        let connection = Arc::new(Connection {
            socket: Arc::new(socket),
            settled: AtomicBool::new(false),
            dismissed: AtomicBool::new(false),
        });
        {
            let mut connections = self.connections.lock();
            let max = self.export.options.max_connections;
            let is_settled = |connection: &Connection| connection.settled.load(Ordering::SeqCst);
            let settled = connections.values().filter(|other| is_settled(other)).count();
            if settled >= max || connections.len() >= ENDING_TIMES * max {
                return Err(Error::new(
                    ErrorKind::Unavailable,
                    "serve one more client: too many connections",
                ));
            }
            // Those that were dismissed are here until their threads have ended, which may take a while.
            let mut staying = connections.values().filter(|other| !other.dismissed.load(Ordering::SeqCst));
            if staying.clone().count() >= max
                && let Some(oldest) = staying.find(|other| !is_settled(other))
            {
                // Clients that connect and say nothing keep nobody out.
                oldest.dismissed.store(true, Ordering::SeqCst);
                line::shut(&oldest.socket);
            }
            connections.insert(id, connection.clone());
        }
        let shared = self.clone();
        let spawned = std::thread::Builder::new().name("nbd-client".to_owned()).spawn(move || {
            let _closed = Closed { shared: &shared, id };
            if let Err(error) = shared.export.serve_client(&connection) {
                tracing::debug!(place = %shared.place, %error, "NBD client");
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
        if let Some(connection) = connections.remove(&self.id) {
            // The client must see the end now, whoever else holds the descriptor.
            line::shut(&connection.socket);
        }
        if connections.is_empty() {
            self.shared.all_closed.notify_all();
        }
    }
}

impl Export {
    fn serve_client(self: &Arc<Self>, connection: &Connection) -> Result<()> {
        let mut line = Line::new(connection.socket.clone());
        let Some(agreed) = handshake::shake_hands(self, &mut line)? else { return Ok(()) };
        connection.settled.store(true, Ordering::SeqCst);
        // A client may be silent for as long as it likes, but not stop taking answers.
        line.limit_receiving(None)?;
        session::run(self, line, agreed)
    }

    /// What is offered now.
    fn offer(&self) -> Offer<'_> {
        Offer {
            name: &self.options.name,
            size_bytes: self.slot.size_bytes(),
            read_only: self.options.read_only,
        }
    }

    fn is_stopping(&self) -> bool {
        self.stop.load(Ordering::SeqCst)
    }

    /// The disk, held against a fence; waits for it if it is not served, up to the export's patience.
    fn enter(&self) -> Option<Entered<'_>> {
        self.enter_unless(|| false)
    }

    /// The same for a flush; `None` at once if nothing is left to flush ([`DeviceSlot::is_durable`]).
    fn enter_to_flush(&self) -> Option<Entered<'_>> {
        self.enter_unless(|| self.slot.is_durable())
    }

    fn enter_unless(&self, needless: impl Fn() -> bool) -> Option<Entered<'_>> {
        self.slot.enter_patiently(self.options.disk_patience, || needless() || self.is_stopping())
    }

    /// The disk for reads, which may take long and hold up no fence.
    fn reader(&self) -> Option<Arc<dyn BlockDev>> {
        loop {
            drop(self.enter()?);
            // Gone between the two: its next coming is waited for as well.
            if let Some(reader) = self.slot.reader() {
                return Some(reader);
            }
        }
    }
}
