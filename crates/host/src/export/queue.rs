//! One queue of one device: a thread that takes requests from a ring, has them done, and answers.
//!
//! ```text
//!            ┌──────────── round ────────────┐ nothing to do   ┌────── look again, ─────┐ still nothing
//!  start ──▶ │ take results of the pool       │ ──────────────▶ │ yielding, for as long  │ ─────────────▶ asleep
//!            │ take requests: do, or hand on  │ ◀────────────── │ as it paid before      │                 │
//!            └────────────────────────────────┘  something      └────────────────────────┘ ◀── kick, wake ─┘
//!                     │ stop asked, nothing outstanding (or given up)
//!                     ▼
//!                   ended
//! ```
//!
//! What the disk can do without waiting is done here: reads straight into guest memory, writes from a copy, since a
//! guest may change its pages meanwhile. The rest goes to the [`Pool`] with copies of its data, and is answered here,
//! in whatever order it ends: only this thread touches the rings.
//!
//! Invariants
//! * A request is recorded as in flight before it is begun, and answered only after it was done.
//! * The answer of a request handed on needs its own memory only: the memory table may change meanwhile.
//! * A stopped queue knows what it has not answered, in the order in which it was taken: nothing of it changes guest
//!   memory any more, and what of it may still change the disk is waited for before anything else is begun.
//! * What the guest put into a ring can stop that ring, and nothing else.
//!
//! Not here: when a ring may run (`frontend`), what its bytes are (`ring`), what a request is (`blk`), how one is done
//! that may wait (`op`).

use std::collections::VecDeque;
use std::io::IoSlice;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use parking_lot::{Condvar, Mutex};
use rustix::event::epoll;

use super::blk::{self, Ask, Identity};
use super::dirty::Dirty;
use super::event::{Waker, signal};
use super::guest_ram::{Buffers, GuestRam, Seg, copy_in, copy_out};
use super::handover::Handover;
use super::inflight::Inflight;
use super::op::{Done, Op};
use super::pool::Pool;
use super::ring::{BadRing, Chain, Ring};
use super::slot::DeviceSlot;
use crate::block_dev::BlockDev;
use crate::error::{Context as _, Error, ErrorKind, Result};

/// Answers after which the guest is asked whether it wants to be told, even if more requests wait.
const SIGNAL_EVERY: u32 = 16;
/// Requests after which the thread looks up, even if more wait.
const ROUND_REQUESTS: u32 = 128;
/// Bytes of requests handed on, over which no more are taken.
const HANDED_ON_BYTES: u64 = 64 << 20;
/// Between two looks whether what an earlier queue left has ended.
const ORPHANS_POLL: Duration = Duration::from_millis(20);
/// Between two looks at a ring whose guest does not kick.
const KICKS_POLL: Duration = Duration::from_millis(1);
/// How long a queue's thread, told to leave its requests unanswered, may take to end: only a disk that hangs keeps it.
const HANG_LIMIT: Duration = Duration::from_secs(20);

/// What all queues of a device share.
pub(super) struct Device {
    pub(super) slot: DeviceSlot,
    pub(super) identity: Identity,
    pub(super) pool: Pool,
    pub(super) busy_poll: Duration,
    /// Requests that change the disk, that a stopped queue gave up waiting for, and that still run.
    pub(super) orphans: AtomicUsize,
    /// How requests pass from one host to another.
    pub(super) handover: Handover,
    pub(super) stats: Stats,
    pub(super) complaints: Complaints,
}

/// Counters of a device.
#[derive(Default)]
pub(super) struct Stats {
    pub(super) read_bytes: AtomicU64,
    pub(super) written_bytes: AtomicU64,
    pub(super) requests: AtomicU64,
    pub(super) handed_on: AtomicU64,
    pub(super) errors: AtomicU64,
    /// When a request last found no space.
    pub(super) starved: Mutex<Option<Instant>>,
}

/// Lets one complaint a second through, and counts the others.
#[derive(Default)]
pub(super) struct Complaints {
    last: Mutex<(Option<Instant>, u64)>,
}

impl Complaints {
    /// Logs `what`, unless something was logged within the last second.
    pub(super) fn log(&self, what: &dyn std::fmt::Display) {
        let mut last = self.last.lock();
        if last.0.is_some_and(|at| at.elapsed() < Duration::from_secs(1)) {
            last.1 += 1;
            return;
        }
        let suppressed = std::mem::take(&mut last.1);
        last.0 = Some(Instant::now());
        drop(last);
        tracing::warn!(suppressed, "export: {what}");
    }
}

/// What is needed to answer a request handed on.
struct Pending {
    /// Requests that were taken before it.
    order: u64,
    /// Where its data goes.
    data: Vec<Seg>,
    /// Where on the disk that begins, of a read.
    offset: Option<u64>,
    status: Seg,
    bytes: u64,
    ram: Arc<GuestRam>,
}

/// What a queue needs to start.
pub(super) struct Setup {
    pub(super) ring: Ring,
    pub(super) size: u16,
    pub(super) ram: Arc<GuestRam>,
    pub(super) inflight: Option<Inflight>,
    /// Requests of an earlier process to do first.
    pub(super) again: Vec<u16>,
    pub(super) dirty: Dirty,
    pub(super) kick: Option<OwnedFd>,
    pub(super) call: Option<OwnedFd>,
    pub(super) err: Option<OwnedFd>,
    /// Whether writes are made durable before they are answered: the guest cannot flush.
    pub(super) write_through: bool,
}

/// The state of a queue, changed by its thread and, between rounds, by the front-end.
pub(super) struct State {
    pub(super) ring: Ring,
    pub(super) ram: Arc<GuestRam>,
    pub(super) dirty: Dirty,
    pub(super) call: Option<OwnedFd>,
    pub(super) err: Option<OwnedFd>,
    pub(super) inflight: Option<Inflight>,
    pub(super) write_through: bool,
    again: VecDeque<u16>,
    pending: Vec<Option<Pending>>,
    /// Requests taken so far.
    taken: u64,
    outstanding: usize,
    outstanding_bytes: u64,
    parked: Vec<(u16, Op)>,
    broken: bool,
    unsignalled: u32,
    chain: Chain,
    buffers: Buffers,
    copied: Copied,
}

/// Room for a write's data, reused from request to request.
#[derive(Default)]
struct Copied(Vec<u8>);

impl Copied {
    /// Kept between requests; what a larger request needed is given back after it.
    const KEPT_BYTES: usize = 1 << 20;

    fn take(&mut self, len: usize) -> &mut [u8] {
        if self.0.len() > Self::KEPT_BYTES && len <= Self::KEPT_BYTES {
            self.0 = Vec::new();
        }
        if self.0.len() < len {
            self.0.resize(len, 0);
        }
        self.0.get_mut(..len).unwrap_or_default()
    }
}

/// A running queue.
pub(super) struct Queue {
    device: Arc<Device>,
    state: Mutex<State>,
    results: Mutex<Results>,
    /// Requests that change the disk and that the pool has now.
    changing: AtomicUsize,
    has_results: AtomicBool,
    waker: Arc<Waker>,
    stop: AtomicBool,
    give_up: AtomicBool,
    ended: Mutex<bool>,
    has_ended: Condvar,
}

#[derive(Default)]
struct Results {
    list: Vec<(u16, Done)>,
    abandoned: bool,
}

/// How a round went.
#[derive(PartialEq, Eq)]
enum Round {
    Worked,
    Nothing,
    Ended,
}

/// How a queue stopped.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Stopped {
    /// The next entry of the available ring to take.
    pub(super) next_avail: u16,
    /// Heads of the requests taken and not answered, in the order in which they were taken: they stay in the in-flight
    /// record.
    pub(super) unfinished: Vec<u16>,
}

/// A queue and its thread.
pub(super) struct RunningQueue {
    pub(super) queue: Arc<Queue>,
    thread: JoinHandle<()>,
}

impl RunningQueue {
    /// Starts the thread of a queue.
    pub(super) fn start(device: Arc<Device>, index: u16, setup: Setup) -> Result<Self> {
        let waker = Arc::new(Waker::new()?);
        let sleep = Sleep::new(&waker, setup.kick)?;
        device.slot.wake_on_activate(&waker);
        let state = State {
            ring: setup.ring,
            ram: setup.ram,
            dirty: setup.dirty,
            call: setup.call,
            err: setup.err,
            inflight: setup.inflight,
            write_through: setup.write_through,
            again: setup.again.into(),
            pending: std::iter::repeat_with(|| None).take(usize::from(setup.size)).collect(),
            taken: 0,
            outstanding: 0,
            outstanding_bytes: 0,
            parked: Vec::new(),
            broken: false,
            unsignalled: 0,
            chain: Chain::default(),
            buffers: Buffers::default(),
            copied: Copied::default(),
        };
        let queue = Arc::new(Queue {
            device,
            state: Mutex::new(state),
            results: Mutex::default(),
            changing: AtomicUsize::new(0),
            has_results: AtomicBool::new(false),
            waker,
            stop: AtomicBool::new(false),
            give_up: AtomicBool::new(false),
            ended: Mutex::new(false),
            has_ended: Condvar::new(),
        });
        // An earlier process may have died between an answer and its signal.
        if let Some(call) = &queue.state.lock().call {
            signal(call.as_fd());
        }
        let run = queue.clone();
        let thread = std::thread::Builder::new()
            .name(format!("vub-q{index}"))
            .spawn(move || run.run(&sleep))
            .context("start a queue's thread")?;
        Ok(Self { queue, thread })
    }

    /// Says that the queue will be stopped, without waiting for it.
    pub(super) fn ask_to_stop(&self) {
        self.queue.stop.store(true, Ordering::SeqCst);
        self.queue.waker.wake();
    }

    /// Takes no more requests, waits up to `limit` for those taken, and ends the thread.
    pub(super) fn stop(self, limit: Duration) -> Result<Stopped> {
        let queue = &self.queue;
        self.ask_to_stop();
        if !queue.wait_ended(limit) {
            queue.give_up.store(true, Ordering::SeqCst);
            queue.waker.wake();
            if !queue.wait_ended(HANG_LIMIT) {
                return Err(Error::new(ErrorKind::TimedOut, "stop queue: the disk does not answer"));
            }
        }
        if self.thread.join().is_err() {
            return Err(Error::new(ErrorKind::Internal, "stop queue: its thread panicked"));
        }
        let state = queue.state.lock();
        Ok(Stopped { next_avail: state.ring.next_avail(), unfinished: state.unfinished() })
    }
}

impl Queue {
    /// Changes the state between two rounds.
    pub(super) fn with_state<R>(&self, change: impl FnOnce(&mut State) -> R) -> R {
        let result = change(&mut self.state.lock());
        self.waker.wake();
        result
    }

    fn wait_ended(&self, limit: Duration) -> bool {
        let mut ended = self.ended.lock();
        self.has_ended.wait_while_for(&mut ended, |ended| !*ended, limit);
        *ended
    }

    fn run(self: Arc<Self>, sleep: &Sleep) {
        // However the thread ends, whoever waits for it must learn of it.
        struct Announce<'a>(&'a Queue);
        impl Drop for Announce<'_> {
            fn drop(&mut self) {
                *self.0.ended.lock() = true;
                self.0.has_ended.notify_all();
            }
        }
        let _announce = Announce(&self);
        let mut spin = Spin::new(self.device.busy_poll);
        loop {
            let round = self.state.lock().round(&self);
            match round {
                Round::Ended => break,
                Round::Worked => spin.worked(),
                Round::Nothing if spin.again() => rustix::thread::sched_yield(),
                Round::Nothing => {
                    self.waker.prepare();
                    if !self.state.lock().must_look(&self) {
                        let asleep = Instant::now();
                        sleep.wait(self.device.look_again());
                        spin.slept(asleep.elapsed());
                    }
                    self.waker.awake();
                    self.state.lock().ring.refuse_kicks();
                }
            }
        }
        self.abandon();
    }

    /// Leaves what still runs in the pool to itself; the next queue waits for it to end.
    fn abandon(&self) {
        let mut results = self.results.lock();
        results.abandoned = true;
        self.device.orphans.fetch_add(self.changing.load(Ordering::Acquire), Ordering::AcqRel);
    }

    /// Runs `op` on the pool and brings its result back.
    fn hand_on(self: &Arc<Self>, head: u16, op: Op) {
        self.device.stats.handed_on.fetch_add(1, Ordering::Relaxed);
        let changing = usize::from(op.changes_disk());
        self.changing.fetch_add(changing, Ordering::AcqRel);
        let queue = self.clone();
        self.device.pool.submit(move || {
            let done = op.carry_out(&queue.device);
            // Counted under the lock, so that a queue that stops meanwhile leaves it behind or not.
            let mut results = queue.results.lock();
            queue.changing.fetch_sub(changing, Ordering::AcqRel);
            if results.abandoned {
                queue.device.orphans.fetch_sub(changing, Ordering::AcqRel);
                return;
            }
            results.list.push((head, done));
            queue.has_results.store(true, Ordering::Release);
            drop(results);
            queue.waker.wake();
        });
    }
}

/// How a request that was begun goes on.
enum Begun {
    Answer { status: u8, written: u64 },
    HandOn(Op),
}

impl State {
    /// Requests that the pool has now.
    fn still_running(&self) -> usize {
        self.outstanding - self.parked.len()
    }

    /// Heads of the requests taken and not answered, in the order in which they were taken.
    fn unfinished(&self) -> Vec<u16> {
        let waiting = (0..).zip(&self.pending);
        let mut begun: Vec<(u64, u16)> =
            waiting.filter_map(|(head, pending)| Some((pending.as_ref()?.order, head))).collect();
        begun.sort_unstable();
        // What an earlier process took, and this one has not come to, was taken before anything new.
        begun.into_iter().map(|(_, head)| head).chain(self.again.iter().copied()).collect()
    }

    /// Changes what the guest is signalled by. It may have missed a signal meanwhile, so it gets one.
    pub(super) fn set_call(&mut self, call: Option<OwnedFd>) {
        if let Some(call) = &call {
            signal(call.as_fd());
        }
        self.call = call;
    }

    /// One look at everything there may be to do.
    fn round(&mut self, queue: &Arc<Queue>) -> Round {
        let mut worked = self.take_results(queue);
        if queue.give_up.load(Ordering::SeqCst) {
            self.signal_guest();
            return Round::Ended;
        }
        if queue.stop.load(Ordering::SeqCst) {
            self.signal_guest();
            return match (self.still_running() == 0, worked) {
                (true, _) => Round::Ended,
                (false, true) => Round::Worked,
                (false, false) => Round::Nothing,
            };
        }
        if self.may_take(queue)
            && (!self.again.is_empty() || !self.parked.is_empty() || self.ring.has_more())
            && let Some(device) = queue.device.slot.enter()
        {
            worked |= self.take_requests(queue, &*device);
        }
        self.signal_guest();
        if worked { Round::Worked } else { Round::Nothing }
    }

    /// Whether requests may be taken, apart from whether the disk is there.
    fn may_take(&self, queue: &Queue) -> bool {
        !self.broken
            && self.outstanding_bytes < HANDED_ON_BYTES
            && queue.device.orphans.load(Ordering::Acquire) == 0
            && queue.device.slot.pacer().wait().is_none()
    }

    /// Whether there is something to do, after asking to be woken for whatever comes later.
    fn must_look(&mut self, queue: &Queue) -> bool {
        queue.has_results.load(Ordering::Acquire)
            || (queue.stop.load(Ordering::SeqCst) && self.still_running() == 0)
            || queue.give_up.load(Ordering::SeqCst)
            || (!queue.stop.load(Ordering::SeqCst)
                && self.may_take(queue)
                && queue.device.slot.enter().is_some()
                && (!self.again.is_empty() || !self.parked.is_empty() || self.ring.ask_for_kicks()))
    }

    fn take_requests(&mut self, queue: &Arc<Queue>, device: &dyn BlockDev) -> bool {
        let mut worked = !self.parked.is_empty();
        for (head, op) in std::mem::take(&mut self.parked) {
            queue.hand_on(head, op);
        }
        for _ in 0..ROUND_REQUESTS {
            if !self.may_take(queue) {
                break;
            }
            let again = self.again.pop_front();
            let next = match again {
                Some(head) => Ok(Some(head)),
                None => self.ring.pop(),
            };
            match next {
                Ok(None) => break,
                Ok(Some(head)) => {
                    worked = true;
                    if let (None, Some(inflight)) = (again, &mut self.inflight) {
                        inflight.take(head);
                    }
                    if let Err(bad) = self.serve(queue, device, head) {
                        self.break_ring(queue, bad);
                    }
                }
                Err(bad) => self.break_ring(queue, bad),
            }
        }
        worked
    }

    /// Begins one request, and answers it or hands it on.
    fn serve(&mut self, queue: &Arc<Queue>, device: &dyn BlockDev, head: u16) -> Result<(), BadRing> {
        if self.pending.get(usize::from(head)).is_none_or(Option::is_some) {
            return Err(BadRing("a request that is made twice"));
        }
        self.ring.chain(&self.ram, head, &mut self.chain)?;
        let status = split_status(&mut self.chain).ok_or(BadRing("a request without room for its status"))?;
        queue.device.stats.requests.fetch_add(1, Ordering::Relaxed);
        self.taken += 1;
        let bytes = data_bytes(&self.chain);
        // A flush moves nothing, and holds others up: it is free.
        if bytes > 0 {
            queue.device.slot.pacer().charge(bytes);
        }
        match self.begin(&queue.device, device) {
            Begun::Answer { status: code, written } => {
                if written > 0 && self.dirty.wanted() {
                    mark_all(&self.dirty, &self.ram, &self.chain.writable, written);
                }
                self.answer(head, status, code, written);
            }
            Begun::HandOn(op) => {
                let pending = Pending {
                    order: self.taken,
                    data: self.chain.writable.clone(),
                    offset: op.read_offset(),
                    status,
                    bytes: op.bytes(),
                    ram: self.ram.clone(),
                };
                self.outstanding += 1;
                self.outstanding_bytes += pending.bytes;
                if let Some(slot) = self.pending.get_mut(usize::from(head)) {
                    *slot = Some(pending);
                }
                queue.hand_on(head, op);
            }
        }
        Ok(())
    }

    /// Does what the request in `chain` asks for, as far as it can be done without waiting.
    fn begin(&mut self, shared: &Device, device: &dyn BlockDev) -> Begun {
        let fail = |status| Begun::Answer { status, written: 0 };
        let identity = &shared.identity;
        match blk::ask(&self.chain.readable) {
            None => fail(blk::S_IOERR),
            Some(Ask::Read { offset }) => self.begin_read(shared, device, offset),
            Some(Ask::Write { .. } | Ask::Discard | Ask::WriteZeroes) if identity.read_only => {
                fail(blk::S_IOERR)
            }
            Some(Ask::Write { offset }) => self.begin_write(shared, device, offset),
            Some(Ask::Flush) => Begun::HandOn(Op::Flush),
            Some(Ask::GetId) => {
                let mut id = [0; 20];
                for (to, from) in id.iter_mut().zip(identity.serial.bytes()) {
                    *to = from;
                }
                let room: usize = self.chain.writable.iter().map(|seg| seg.len).sum();
                let id = id.get(..room.min(20)).unwrap_or(&id);
                copy_out(&self.chain.writable, id);
                Begun::Answer { status: blk::S_OK, written: id.len() as u64 }
            }
            Some(ask @ (Ask::Discard | Ask::WriteZeroes)) => {
                match blk::ranges(device.size_bytes(), &self.chain.readable, ask == Ask::Discard) {
                    Err(status) => fail(status),
                    Ok(ranges) if ask == Ask::Discard => Begun::HandOn(Op::Discard(ranges)),
                    Ok(ranges) => Begun::HandOn(Op::WriteZeroes(ranges)),
                }
            }
            Some(Ask::Other) => fail(blk::S_UNSUPP),
        }
    }

    fn begin_read(&mut self, shared: &Device, device: &dyn BlockDev, offset: u64) -> Begun {
        self.buffers.set(&self.chain.writable);
        let len = self.buffers.bytes();
        if !blk::holds(device.size_bytes(), offset, len) {
            return Begun::Answer { status: blk::S_IOERR, written: 0 };
        }
        match self.buffers.write_to(&self.ram, |into| device.read_now(offset, into)) {
            Ok(true) => {
                shared.stats.read_bytes.fetch_add(len, Ordering::Relaxed);
                self.ram.note_fill(&self.chain.writable, offset);
                Begun::Answer { status: blk::S_OK, written: len }
            }
            Ok(false) => Begun::HandOn(Op::Read { offset, len: usize::try_from(len).unwrap_or(0) }),
            // The guest may have got a part of it; the pages must be known to have changed.
            Err(error) => Begun::Answer { status: shared.complain(&error), written: len },
        }
    }

    fn begin_write(&mut self, shared: &Device, device: &dyn BlockDev, offset: u64) -> Begun {
        let total: u64 = self.chain.readable.iter().map(|seg| seg.len as u64).sum();
        let len = total - blk::HEADER_BYTES as u64;
        if !blk::holds(device.size_bytes(), offset, len) {
            return Begun::Answer { status: blk::S_IOERR, written: 0 };
        }
        // Copied, because a guest may go on writing to a page while that is on its way to the disk (file systems
        // do), and a disk that keeps checksums must see the same bytes twice.
        let data = self.copied.take(usize::try_from(len).unwrap_or(0));
        copy_in(&self.chain.readable, blk::HEADER_BYTES, data);
        match device.write_now(offset, &[IoSlice::new(data)]) {
            Ok(true) => {
                shared.stats.written_bytes.fetch_add(len, Ordering::Relaxed);
                if self.write_through {
                    return Begun::HandOn(Op::Flush);
                }
                Begun::Answer { status: blk::S_OK, written: 0 }
            }
            Err(error) if error.kind() != ErrorKind::NoSpace => {
                Begun::Answer { status: shared.complain(&error), written: 0 }
            }
            Ok(false) | Err(_) => {
                let data = data.to_vec();
                Begun::HandOn(Op::Write { offset, data, then_flush: self.write_through })
            }
        }
    }

    /// Answers what the pool has done.
    fn take_results(&mut self, queue: &Arc<Queue>) -> bool {
        if !queue.has_results.swap(false, Ordering::Acquire) {
            return false;
        }
        let results = std::mem::take(&mut queue.results.lock().list);
        let worked = !results.is_empty();
        for (head, done) in results {
            let result = match done {
                Done::Ended(result) => result,
                Done::Parked(op) => {
                    self.parked.push((head, op));
                    continue;
                }
            };
            let Some(pending) = self.pending.get_mut(usize::from(head)).and_then(Option::take) else {
                continue;
            };
            self.outstanding -= 1;
            self.outstanding_bytes -= pending.bytes;
            let (status, written) = match result {
                Ok(data) => {
                    copy_out(&pending.data, &data);
                    queue.device.stats.read_bytes.fetch_add(data.len() as u64, Ordering::Relaxed);
                    mark_all(&self.dirty, &pending.ram, &pending.data, data.len() as u64);
                    if let Some(offset) = pending.offset {
                        pending.ram.note_fill(&pending.data, offset);
                    }
                    (blk::S_OK, data.len() as u64)
                }
                Err(error) => (queue.device.complain(&error), 0),
            };
            self.answer(head, pending.status, status, written);
        }
        worked
    }

    /// Answers one request: status, used ring, in-flight record, in the order that a crash cannot hurt.
    fn answer(&mut self, head: u16, status_at: Seg, status: u8, written: u64) {
        copy_out(&[status_at], &[status]);
        self.ring.put_used(head, u32::try_from(written + 1).unwrap_or(u32::MAX));
        if let Some(inflight) = &self.inflight {
            inflight.about_to_answer(head);
        }
        let used_idx = self.ring.publish();
        if let Some(inflight) = &self.inflight {
            inflight.answered(head, used_idx);
        }
        if self.dirty.wanted() {
            self.dirty.mark(&self.ram, status_at.gpa, 1);
            let (gpa, log_at, len) = self.ring.used_range();
            self.dirty.mark_used(&self.ram, gpa, log_at, len);
        }
        self.unsignalled += 1;
        if self.unsignalled >= SIGNAL_EVERY {
            self.signal_guest();
        }
    }

    fn signal_guest(&mut self) {
        if self.unsignalled == 0 {
            return;
        }
        self.unsignalled = 0;
        if self.ring.wants_signal()
            && let Some(call) = &self.call
        {
            signal(call.as_fd());
        }
    }

    /// Stops serving a ring that makes no sense, and says so.
    fn break_ring(&mut self, queue: &Queue, bad: BadRing) {
        self.broken = true;
        queue.device.complaints.log(&format_args!("a guest's ring is stopped: {}", bad.0));
        if let Some(err) = &self.err {
            signal(err.as_fd());
        }
    }
}

impl Device {
    /// When a sleeping queue must look by itself, because nobody will tell it.
    fn look_again(&self) -> Option<Duration> {
        let orphans = (self.orphans.load(Ordering::Acquire) > 0).then_some(ORPHANS_POLL);
        orphans.into_iter().chain(self.slot.pacer().wait()).min()
    }

    /// Logs a failed request; the status to answer with.
    fn complain(&self, error: &Error) -> u8 {
        self.stats.errors.fetch_add(1, Ordering::Relaxed);
        self.complaints.log(&format_args!("a guest's request failed: {error}"));
        blk::S_IOERR
    }
}

/// Bytes that a request moves, its header apart.
fn data_bytes(chain: &Chain) -> u64 {
    let all: u64 = chain.readable.iter().chain(&chain.writable).map(|seg| seg.len as u64).sum();
    all.saturating_sub(blk::HEADER_BYTES as u64)
}

/// Takes the last writable byte off the chain: the status goes there.
fn split_status(chain: &mut Chain) -> Option<Seg> {
    let last = chain.writable.last_mut()?;
    let status = last.take_last()?;
    if last.len == 0 {
        chain.writable.pop();
    }
    Some(status)
}

/// Marks the first `len` bytes of `segs`.
fn mark_all(dirty: &Dirty, ram: &GuestRam, segs: &[Seg], mut len: u64) {
    for seg in segs {
        let part = len.min(seg.len as u64);
        dirty.mark(ram, seg.gpa, part);
        len -= part;
    }
}

/// How long the thread keeps looking before it sleeps: longer while requests come soon after each other.
struct Spin {
    max: Duration,
    window: Duration,
    since: Option<Instant>,
}

impl Spin {
    fn new(max: Duration) -> Self {
        Self { max, window: max, since: None }
    }

    fn worked(&mut self) {
        self.since = None;
    }

    /// Whether to look once more; the first look after work starts the clock.
    fn again(&mut self) -> bool {
        match self.since {
            None => {
                self.since = Some(Instant::now());
                !self.window.is_zero()
            }
            Some(since) => since.elapsed() < self.window,
        }
    }

    /// Learns from how long it then slept: a short sleep should have been waited out, a long one not.
    fn slept(&mut self, slept: Duration) {
        self.since = None;
        self.window =
            if slept < self.max { (self.window * 2).clamp(self.max / 8, self.max) } else { self.window / 2 };
        if self.window < self.max / 16 {
            self.window = Duration::ZERO;
        }
    }
}

/// What a sleeping thread waits for: kicks of the guest, wakes of our own.
struct Sleep {
    epoll: OwnedFd,
    // Kept open as long as the interest in it.
    _kick: Option<OwnedFd>,
    polled: bool,
}

impl Sleep {
    fn new(waker: &Arc<Waker>, kick: Option<OwnedFd>) -> Result<Self> {
        let epoll = epoll::create(epoll::CreateFlags::CLOEXEC).context("make an epoll descriptor")?;
        // Edge-triggered: every kick wakes once, and the counters need not be read.
        let flags = epoll::EventFlags::IN | epoll::EventFlags::ET;
        epoll::add(&epoll, waker.as_fd(), epoll::EventData::new_u64(0), flags).context("watch for wakes")?;
        if let Some(kick) = &kick {
            epoll::add(&epoll, kick, epoll::EventData::new_u64(1), flags).context("watch for kicks")?;
        }
        Ok(Self { epoll, polled: kick.is_none(), _kick: kick })
    }

    /// Waits for an event, not longer than `limit`; some milliseconds if nobody tells of kicks.
    fn wait(&self, limit: Option<Duration>) {
        let limit = limit.or(self.polled.then_some(KICKS_POLL)).map(|limit| rustix::event::Timespec {
            tv_sec: 0,
            tv_nsec: limit.min(ORPHANS_POLL.max(KICKS_POLL)).subsec_nanos().into(),
        });
        let mut events =
            [epoll::Event { flags: epoll::EventFlags::empty(), data: epoll::EventData::new_u64(0) }; 2];
        // An interrupted wait is a look too many, nothing worse.
        let _ = epoll::wait(&self.epoll, &mut events, limit.as_ref());
    }
}
