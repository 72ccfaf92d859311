//! A kept connection to one host: calls over it at once, pings, and what became of each call when it ends.
//!
//! ```text
//!  call ─► slot ─► pending ─► queue ─► writer ─(begun)─► peer ─► reader ─► answer
//!            │                  │           └ connection ends: Unknown
//!            └──────────────────┴ connection ends or time runs out: not sent
//! ```
//!
//! Invariant: a call counts as not sent exactly if not one byte of it was given to TLS.

use bytes::Bytes;
use parking_lot::Mutex;
use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, AtomicU64, AtomicUsize, Ordering};
use std::time::Duration;
use tokio::sync::{Semaphore, mpsc, oneshot};
use tokio::time::{Instant, timeout_at};
use whimbrel_wire::Time;
use whimbrel_wire::peer::FrameKind;

use super::frame::{Frame, read_frame};
use super::stream::{PeerStream, Traffic};
use super::write::write_frames;
use super::{LinkOptions, clock};
use crate::error::{Error, ErrorKind, Result};
use crate::metrics::metrics;

/// Calls of one connection under way at once; more wait for their turn.
const SLOTS: usize = 256;
/// Calls queued behind the one that is being written.
const QUEUE: usize = 32;

/// Why a call has no answer.
#[derive(Debug)]
pub(super) enum Fault {
    /// The connection had ended before any of it was sent: try another connection.
    Gone,
    /// Not sent, and no time left.
    Late,
    /// Sent, and nobody knows what became of it.
    Unknown(String),
    /// The call cannot be sent at all.
    Bad(Error),
}

struct Waiting {
    begun: bool,
    answer: oneshot::Sender<Outcome>,
}

enum Outcome {
    Came(Frame),
    Lost { begun: bool },
}

#[derive(Default)]
struct Pending {
    ended: bool,
    waiting: HashMap<u32, Waiting>,
}

struct Shared {
    host: String,
    pending: Mutex<Pending>,
    why: Mutex<String>,
    next: AtomicU32,
    used_ns: AtomicU64,
    keepers: Arc<AtomicUsize>,
}

/// See the module's charter. The connection ends when this is dropped.
pub(super) struct Conn {
    calls: mpsc::Sender<Frame>,
    slots: Semaphore,
    shared: Arc<Shared>,
}

impl Conn {
    /// Runs calls over `stream`, on which both sides have said hello.
    pub fn start(stream: PeerStream, options: &LinkOptions, keepers: Arc<AtomicUsize>) -> Self {
        let shared = Arc::new(Shared {
            host: stream.peer().host.to_string(),
            pending: Mutex::default(),
            why: Mutex::default(),
            next: AtomicU32::new(1),
            used_ns: AtomicU64::new(clock::now().0),
            keepers,
        });
        let (calls, queue) = mpsc::channel(QUEUE);
        tokio::spawn(run(stream, shared.clone(), queue, options.clone()));
        Self { calls, slots: Semaphore::new(SLOTS), shared }
    }

    /// Whether the connection still runs, as far as is known.
    pub fn is_open(&self) -> bool {
        !self.calls.is_closed()
    }

    /// Returns when the connection has ended.
    pub async fn ended(&self) {
        self.calls.closed().await;
    }

    /// Sends one call and waits for its answer, an `Answer` or `Failed` frame.
    pub async fn call(&self, json: Bytes, payload: Bytes, deadline: Instant) -> Result<Frame, Fault> {
        let shared = &self.shared;
        shared.used_ns.store(clock::now().0, Ordering::Relaxed);
        let Ok(slot) = timeout_at(deadline, self.slots.acquire()).await else { return Err(Fault::Late) };
        let _slot = slot.map_err(|_| Fault::Gone)?;
        let request = shared.next.fetch_add(1, Ordering::Relaxed);
        let frame = Frame::new(FrameKind::Call, request, json, payload).map_err(Fault::Bad)?;
        let (answer, answered) = oneshot::channel();
        {
            let mut pending = shared.pending.lock();
            if pending.ended {
                return Err(Fault::Gone);
            }
            pending.waiting.insert(request, Waiting { begun: false, answer });
        }
        // Also when the caller is dropped: what is not begun by then is not sent.
        let place = Place { shared, request };
        match timeout_at(deadline, self.calls.send(frame)).await {
            Err(_) => return Err(Fault::Late),
            Ok(Err(_)) => return Err(Fault::Gone),
            Ok(Ok(())) => {}
        }
        match timeout_at(deadline, answered).await {
            Ok(Ok(Outcome::Came(frame))) => Ok(frame),
            Ok(Ok(Outcome::Lost { begun: true })) => Err(Fault::Unknown(shared.why.lock().clone())),
            Ok(Ok(Outcome::Lost { begun: false }) | Err(_)) => Err(Fault::Gone),
            Err(_) if place.leave() => Err(Fault::Unknown("no answer in time".into())),
            Err(_) => Err(Fault::Late),
        }
    }
}

/// A call's entry among those that wait.
struct Place<'a> {
    shared: &'a Shared,
    request: u32,
}

impl Place<'_> {
    /// Leaves; whether sending had begun.
    fn leave(&self) -> bool {
        self.shared.pending.lock().waiting.remove(&self.request).is_some_and(|waiting| waiting.begun)
    }
}

impl Drop for Place<'_> {
    fn drop(&mut self) {
        self.leave();
    }
}

async fn run(stream: PeerStream, shared: Arc<Shared>, queue: mpsc::Receiver<Frame>, options: LinkOptions) {
    let traffic = stream.traffic().clone();
    let (reader, writer) = tokio::io::split(stream);
    let (urgent, urgent_queue) = mpsc::channel(4);
    let begin = |frame: &Frame| {
        if frame.kind != FrameKind::Call {
            return true;
        }
        let mut pending = shared.pending.lock();
        let waiting = pending.waiting.get_mut(&frame.request);
        waiting.is_some_and(|waiting| {
            waiting.begun = true;
            true
        })
    };
    let why = tokio::select! {
        why = read_answers(reader, &shared) => why,
        sent = write_frames(writer, urgent_queue, queue, begin) => match sent {
            Ok(()) => "this host closed the connection".into(),
            Err(error) => error.to_string(),
        },
        why = ping(&urgent, &traffic, &shared, &options) => why,
    };
    tracing::debug!(host = %shared.host, why, "connection ended");
    shared.why.lock().clone_from(&why);
    let mut pending = shared.pending.lock();
    pending.ended = true;
    for (_, waiting) in pending.waiting.drain() {
        // Nobody listens any more if the caller has gone meanwhile.
        let _ = waiting.answer.send(Outcome::Lost { begun: waiting.begun });
    }
}

/// Hands answers to those who wait, until the connection ends; returns why it did.
async fn read_answers(mut reader: impl tokio::io::AsyncRead + Unpin, shared: &Shared) -> String {
    loop {
        match read_frame(&mut reader).await {
            Ok(Some(frame)) => match frame.kind {
                FrameKind::Answer | FrameKind::Failed => {
                    if let Some(waiting) = shared.pending.lock().waiting.remove(&frame.request) {
                        // Nobody listens any more if the caller has gone meanwhile.
                        let _ = waiting.answer.send(Outcome::Came(frame));
                    }
                }
                FrameKind::Pong => {}
                kind => return format!("the peer sent an unexpected frame ({kind:?})"),
            },
            Ok(None) => return "the peer closed the connection".into(),
            Err(error) => return error.to_string(),
        }
    }
}

/// Asks for a sign of life when there was none; returns when the peer is silent, or the connection is idle.
async fn ping(
    urgent: &mpsc::Sender<Frame>,
    traffic: &Traffic,
    shared: &Shared,
    options: &LinkOptions,
) -> String {
    let mut last = clock::now();
    loop {
        tokio::time::sleep(Duration::from_millis(options.ping_ms / 2)).await;
        let now = clock::now();
        // If this process itself stood still, silence says nothing about the peer.
        let late = now.since_ms(last) > 2 * options.ping_ms;
        last = now;
        let silent_ms = traffic.silent_ms();
        if silent_ms > options.dead_ms && !late {
            metrics().link_silent_peers.inc();
            return format!("the peer has been silent for {silent_ms} ms");
        }
        if silent_ms >= options.ping_ms {
            // A full queue has pings in it already.
            let _ = urgent.try_send(Frame::bare(FrameKind::Ping, 0));
        }
        let unused_ms = now.since_ms(Time(shared.used_ns.load(Ordering::Relaxed)));
        let wanted = shared.keepers.load(Ordering::Relaxed) > 0 || !shared.pending.lock().waiting.is_empty();
        if unused_ms > options.idle_ms && !wanted {
            return "nobody has used it for a while".into();
        }
    }
}

impl Fault {
    /// The error of a call `what` that ended in this fault for good.
    pub fn into_error(self, what: &str) -> Error {
        match self {
            Self::Gone => {
                Error::new(ErrorKind::Unavailable, format!("{what}: the connection ended before it was sent"))
            }
            Self::Late => {
                Error::new(ErrorKind::TimedOut, format!("{what}: there was no time left to send it"))
            }
            Self::Unknown(why) => Error::new(
                ErrorKind::Unknown,
                format!("{what}: it was sent and no answer came ({why}); it may have been carried out"),
            ),
            Self::Bad(error) => error,
        }
    }
}
