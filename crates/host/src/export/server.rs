//! A vhost-user-blk device on a unix socket: one front-end at a time, as often as it comes back.
//!
//! ```text
//!   bind ──▶ waiting ──accept──▶ serving ──front-end gone──▶ rings stopped ──▶ waiting … ──stop──▶ ended
//! ```
//!
//! QEMU connects when it starts and again after this process was restarted; the socket's path is all they share.
//!
//! Invariant: a second front-end waits until the first is gone and its requests have ended.
//!
//! Not here: the conversation (`frontend`).

use std::os::fd::AsFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, poll};
use vhost::vhost_user::{BackendReqHandler, Error as VhostError};
use whimbrel_wire::peer::migrate::QueueIo;

use super::blk::Identity;
use super::config_change::{Notifier, SizeNotice, channel_in_next};
use super::dirty::WriteTracker;
use super::event::Waker;
use super::fills::FilledFrom;
use super::frontend::Frontend;
use super::greeting::{MUTE_AFTER, begins_with_greeting, primed};
use super::handover::Handover;
use super::pool::Pool;
use super::queue::{Complaints, Device, Stats};
use super::slot::DeviceSlot;
use super::socket::{SocketOwner, listen};
use crate::error::{Context, Error, ErrorKind, Result};

/// How a device is offered.
#[derive(Clone, Debug)]
pub struct VhostUserOptions {
    /// Most queues a guest may use, one thread each; 1 to 64.
    pub queues: u16,
    /// Most entries of a queue; a power of two.
    pub max_queue_size: u16,
    /// Whether the guest may only read.
    pub read_only: bool,
    /// What a guest sees as the disk's serial number; the first 20 bytes count.
    pub serial: String,
    /// Who may connect; our own user with mode 0600 if not said.
    pub owner: Option<SocketOwner>,
    /// Threads for requests that wait for other hosts, stores or flushes.
    pub workers: usize,
    /// How long a stopping ring waits for its requests.
    pub drain_limit: Duration,
    /// Longest time a queue looks for more work before it sleeps; zero: never.
    pub busy_poll: Duration,
    /// Offer memory slots: a guest may have more than eight regions of memory. A QEMU that has agreed to them cannot
    /// be taken up in the middle of a conversation (`greeting`): it does not say again where memory is.
    pub mem_slots: bool,
}

impl Default for VhostUserOptions {
    fn default() -> Self {
        Self {
            queues: 4,
            max_queue_size: 1024,
            read_only: false,
            serial: String::new(),
            owner: None,
            workers: 32,
            drain_limit: Duration::from_secs(20),
            busy_poll: Duration::from_micros(50),
            mem_slots: true,
        }
    }
}

/// What a device has done so far.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ExportCounters {
    /// Requests taken.
    pub requests: u64,
    /// Bytes read by guests.
    pub read_bytes: u64,
    /// Bytes written by guests.
    pub written_bytes: u64,
    /// Requests that had to wait for another host, a store or a flush.
    pub handed_on: u64,
    /// Requests answered with an error of the disk.
    pub errors: u64,
}

/// The front-end at a device's socket.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FrontEndState {
    /// Nobody is connected.
    Absent,
    /// It has said nothing yet.
    New,
    /// It will say nothing by itself: see `greeting`.
    Mute,
    /// It has said something.
    Spoke,
}

/// A connection.
struct Connection {
    frontend: Arc<Mutex<Frontend>>,
    notifier: Arc<Notifier>,
    stream: UnixStream,
    since: Instant,
    spoke: bool,
}

struct Shared {
    device: Arc<Device>,
    options: VhostUserOptions,
    path: PathBuf,
    waker: Waker,
    stop: AtomicBool,
    current: parking_lot::Mutex<Option<Connection>>,
    tracker: parking_lot::Mutex<Option<WriteTracker>>,
}

/// A device that is being served. Dropping it ends the service.
pub struct VhostUserServer {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

impl VhostUserServer {
    /// Binds `path` and serves the slot's disk there, from a thread of its own.
    pub fn start(path: &Path, slot: DeviceSlot, options: VhostUserOptions) -> Result<Self> {
        if !(1..=64).contains(&options.queues) || !options.max_queue_size.is_power_of_two() {
            return Err(Error::new(
                ErrorKind::InvalidInput,
                format!("serve {} queues of up to {} entries", options.queues, options.max_queue_size),
            ));
        }
        let listener = listen(path, options.owner)?;
        listener.set_nonblocking(true).with_context(|| format!("listen on {}", path.display()))?;
        let device = Device {
            identity: Identity {
                read_only: options.read_only,
                queues: options.queues,
                serial: options.serial.clone(),
            },
            slot,
            pool: Pool::new("vub-wait", options.workers),
            busy_poll: options.busy_poll,
            orphans: AtomicUsize::new(0),
            handover: Handover::default(),
            stats: Stats::default(),
            complaints: Complaints::default(),
        };
        let shared = Arc::new(Shared {
            device: Arc::new(device),
            options,
            path: path.to_owned(),
            waker: Waker::new()?,
            stop: AtomicBool::new(false),
            current: parking_lot::Mutex::new(None),
            tracker: parking_lot::Mutex::new(None),
        });
        let run = shared.clone();
        let thread = std::thread::Builder::new()
            .name("vub-serve".to_owned())
            .spawn(move || run.serve(&listener))
            .context("start a thread for a device")?;
        Ok(Self { shared, thread: Some(thread) })
    }

    /// Where front-ends connect.
    pub fn path(&self) -> &Path {
        &self.shared.path
    }

    /// The disk being served, or the place for it.
    pub fn slot(&self) -> &DeviceSlot {
        &self.shared.device.slot
    }

    /// Who is connected now.
    pub fn front_end(&self) -> FrontEndState {
        match &*self.shared.current.lock() {
            None => FrontEndState::Absent,
            Some(connection) if connection.spoke => FrontEndState::Spoke,
            Some(connection) if connection.since.elapsed() >= MUTE_AFTER => FrontEndState::Mute,
            Some(_) => FrontEndState::New,
        }
    }

    /// What is to be told to the front-end after the disk became larger; none if nobody is connected.
    pub fn size_notice(&self) -> Option<SizeNotice> {
        let notifier = self.shared.current.lock().as_ref()?.notifier.clone();
        Some(SizeNotice { notifier, size_bytes: self.slot().size_bytes() })
    }

    fn frontend(&self) -> Option<Arc<Mutex<Frontend>>> {
        self.shared.current.lock().as_ref().map(|connection| connection.frontend.clone())
    }

    /// Has every page of guest RAM that this device writes from now on marked in `tracker`; `None` ends that. A
    /// page is marked after it was written, and before the guest learns that its request is done.
    pub fn track_writes(&self, tracker: Option<WriteTracker>) {
        *self.shared.tracker.lock() = tracker.clone();
        if let Some(frontend) = self.frontend() {
            lock(&frontend).track_writes(tracker);
        }
    }

    /// Which block of the disk each page of a RAM file (device and inode number) was filled from last, as far as this
    /// process and the present front-end know; none if nobody is connected.
    pub fn filled(&self, device: u64, inode: u64) -> Option<FilledFrom> {
        self.frontend().map(|frontend| lock(&frontend).filled((device, inode)))
    }

    /// Whether rings that stop from now on leave unanswered what does not end at once: the guest is about to go on at
    /// another host, which is told of it ([`Self::outstanding`]).
    pub fn cut_short(&self, cut_short: bool) {
        self.shared.device.handover.cut_short(cut_short);
    }

    /// Requests that the guest's stopped rings left unanswered, by queue. They are in the in-flight record that this
    /// QEMU keeps, and are done when its rings run again; a QEMU at another host knows nothing of them, so whoever
    /// resumes the VM there must be told ([`Self::reissue`]). [`ErrorKind::Unavailable`] if nobody can tell, because
    /// the front-end is gone or its rings run.
    pub fn outstanding(&self) -> Result<Vec<QueueIo>> {
        let found = self.frontend().and_then(|frontend| lock(&frontend).outstanding());
        found.ok_or_else(|| {
            let path = self.shared.path.display();
            Error::new(ErrorKind::Unavailable, format!("list requests at {path}: its rings are not stopped"))
        })
    }

    /// Has requests done that another host's device left unanswered, before anything else and in that order, when the
    /// guest's rings start where they stopped there.
    pub fn reissue(&self, queues: Vec<QueueIo>) {
        self.shared.device.handover.carry(queues);
    }

    /// What was done so far.
    pub fn counters(&self) -> ExportCounters {
        let stats = &self.shared.device.stats;
        ExportCounters {
            requests: stats.requests.load(Ordering::Relaxed),
            read_bytes: stats.read_bytes.load(Ordering::Relaxed),
            written_bytes: stats.written_bytes.load(Ordering::Relaxed),
            handed_on: stats.handed_on.load(Ordering::Relaxed),
            errors: stats.errors.load(Ordering::Relaxed),
        }
    }

    /// Whether requests of the guest wait for space on this host.
    pub fn waits_for_space(&self) -> bool {
        self.shared.device.stats.is_starved()
    }

    /// Ends the service: rings are stopped, the socket is removed.
    pub fn stop(mut self) -> Result<()> {
        self.shut_down()
    }

    fn shut_down(&mut self) -> Result<()> {
        let Some(thread) = self.thread.take() else { return Ok(()) };
        self.shared.stop.store(true, Ordering::SeqCst);
        self.shared.waker.wake();
        if let Some(connection) = &*self.shared.current.lock() {
            // A connection that is gone already is what we want.
            let _ = connection.stream.shutdown(std::net::Shutdown::Both);
        }
        let panicked = thread.join().is_err();
        // A socket that somebody else removed or replaced is not ours to care for.
        let _ = std::fs::remove_file(&self.shared.path);
        if panicked {
            return Err(Error::new(ErrorKind::Internal, "stop device: its thread panicked"));
        }
        Ok(())
    }
}

impl Drop for VhostUserServer {
    fn drop(&mut self) {
        if let Err(error) = self.shut_down() {
            tracing::error!(%error, "stop device");
        }
    }
}

/// Locks a front-end; a message that panicked half-way leaves one whose rings can still be stopped.
fn lock(frontend: &Mutex<Frontend>) -> std::sync::MutexGuard<'_, Frontend> {
    frontend.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Shared {
    fn serve(&self, listener: &UnixListener) {
        while let Some(stream) = self.accept(listener) {
            if let Err(error) = self.converse(stream) {
                tracing::warn!(socket = %self.path.display(), %error, "front-end");
            }
        }
    }

    /// The next connection; `None` when the service ends.
    fn accept(&self, listener: &UnixListener) -> Option<UnixStream> {
        loop {
            self.waker.prepare();
            if self.stop.load(Ordering::SeqCst) {
                return None;
            }
            match listener.accept() {
                Ok((stream, _)) => {
                    if stream.set_nonblocking(false).is_ok() {
                        return Some(stream);
                    }
                    continue;
                }
                Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => {}
                Err(error) => {
                    // Out of descriptors, most likely: not for long, one hopes.
                    self.device.complaints.log(&format_args!("accept a front-end: {error}"));
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

    /// Talks with one front-end until it is gone.
    fn converse(&self, stream: UnixStream) -> Result<()> {
        let mut frontend = Frontend::new(self.device.clone(), &self.options);
        frontend.track_writes(self.tracker.lock().clone());
        let notifier = frontend.notifier().clone();
        let frontend = Arc::new(Mutex::new(frontend));
        let copy = stream.try_clone().context("copy a connection")?;
        *self.current.lock() = Some(Connection {
            frontend: frontend.clone(),
            notifier: notifier.clone(),
            stream: copy,
            since: Instant::now(),
            spoke: false,
        });
        tracing::debug!(socket = %self.path.display(), "front-end connected");
        let result = self.handle(stream, &frontend, &notifier);
        // Rings first: what was taken is still answered, the front-end may only have lost us.
        lock(&frontend).stop_all();
        *self.current.lock() = None;
        tracing::debug!(socket = %self.path.display(), "front-end gone");
        result
    }

    /// Handles messages until the front-end is gone or the service ends.
    fn handle(&self, stream: UnixStream, frontend: &Arc<Mutex<Frontend>>, notifier: &Notifier) -> Result<()> {
        // A service that ends shuts the connection down, which ends the wait below; one that ended before the
        // connection was known is seen here.
        if self.stop.load(Ordering::SeqCst) {
            return Ok(());
        }
        let Some(greets) = begins_with_greeting(&stream).context("hear a front-end")? else { return Ok(()) };
        if let Some(connection) = &mut *self.current.lock() {
            connection.spoke = true;
        }
        let ahead = stream.try_clone().context("copy a connection")?;
        let mut handler = if greets {
            BackendReqHandler::from_stream(stream, frontend.clone())
        } else {
            tracing::info!(socket = %self.path.display(), "front-end goes on without a greeting");
            primed(&stream, frontend)?
        };
        loop {
            if self.stop.load(Ordering::SeqCst) {
                return Ok(());
            }
            // What goes wrong here goes wrong below as well, and is told there.
            if let Ok(Some(channel)) = channel_in_next(&ahead) {
                notifier.listens(channel);
            }
            match handler.handle_request() {
                Ok(()) => {}
                Err(VhostError::SocketRetry(_)) => {}
                Err(VhostError::Disconnected) => return Ok(()),
                Err(VhostError::SocketBroken(_)) => return Ok(()),
                Err(error) => {
                    return Err(Error::with_source(
                        ErrorKind::InvalidInput,
                        "handle a front-end's message",
                        error,
                    ));
                }
            }
        }
    }
}
