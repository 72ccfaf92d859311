//! Where an export finds its disk: a place that may be empty, filled or closed while clients are connected.
//!
//! ```text
//!            activate(device)            fence(limit)
//!  Standby ───────────────────▶ Active ───────────────▶ Fenced
//!  requests wait                 ▲      the disk is served  │ requests wait
//!                                └────── activate(device) ──┘
//! ```
//!
//! At a migration's target the export exists before COMMIT, because QEMU asks for features and size when it starts;
//! the disk comes with `activate`. At the source `fence` returns when the last write that could still change the
//! volume has returned, which is what lets the target start.
//!
//! Invariants
//! * The size changes by `grow` only; `activate` refuses a device of another size.
//! * Every write, flush, discard runs inside an [`Entered`]; `fence` waits for all of them.

use std::ops::Deref;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Weak};
use std::time::{Duration, Instant};

use parking_lot::{Condvar, MappedRwLockReadGuard, Mutex, RwLock, RwLockReadGuard};
use whimbrel_wire::meta::IoLimits;

use super::event::Waker;
use super::pacer::Pacer;
use crate::block_dev::BlockDev;
use crate::error::{Error, ErrorKind, Result};

/// Between two looks whether a request that waits for its disk is still wanted.
const GIVE_UP_POLL: Duration = Duration::from_millis(100);

/// What a [`DeviceSlot`] does with requests now.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SlotState {
    /// Not served yet: requests wait.
    Standby,
    /// Requests reach the disk.
    Active,
    /// No longer served: requests wait, and nothing of the disk is touched.
    Fenced,
}

enum State {
    Standby,
    Active(Arc<dyn BlockDev>),
    Fenced {
        /// All that was answered before is durable.
        durable: bool,
    },
}

struct Shared {
    size_bytes: AtomicU64,
    pacer: Pacer,
    state: RwLock<State>,
    // Told about `activate`: threads that sleep on their own eventfd, and those that wait on the condition.
    sleepers: Mutex<Vec<Weak<Waker>>>,
    activated: Condvar,
}

/// See the module's charter. Clones are the same slot.
#[derive(Clone)]
pub struct DeviceSlot {
    shared: Arc<Shared>,
}

impl DeviceSlot {
    /// A slot that waits for its disk of `size_bytes`.
    pub fn standby(size_bytes: u64) -> Self {
        Self::with(size_bytes, State::Standby)
    }

    /// A slot that serves `device` at once.
    pub fn active(device: Arc<dyn BlockDev>) -> Self {
        Self::with(device.size_bytes(), State::Active(device))
    }

    fn with(size_bytes: u64, state: State) -> Self {
        let shared = Shared {
            size_bytes: AtomicU64::new(size_bytes),
            pacer: Pacer::default(),
            state: RwLock::new(state),
            sleepers: Mutex::new(Vec::new()),
            activated: Condvar::new(),
        };
        Self { shared: Arc::new(shared) }
    }

    /// Size of the disk, bytes.
    pub fn size_bytes(&self) -> u64 {
        self.shared.size_bytes.load(Ordering::Acquire)
    }

    /// The disk that is served has become larger: clients that ask from now on are told so.
    pub fn grow(&self, size_bytes: u64) {
        self.shared.size_bytes.fetch_max(size_bytes, Ordering::AcqRel);
    }

    /// Limits what clients have of the disk, from now on.
    pub fn limit(&self, limits: IoLimits) {
        self.shared.pacer.set(limits);
    }

    /// Whom clients ask before they begin a request.
    pub(super) fn pacer(&self) -> &Pacer {
        &self.shared.pacer
    }

    /// What happens to requests now.
    pub fn state(&self) -> SlotState {
        match *self.shared.state.read() {
            State::Standby => SlotState::Standby,
            State::Active(_) => SlotState::Active,
            State::Fenced { .. } => SlotState::Fenced,
        }
    }

    /// Serves `device` from now on; requests that waited are done first. [`ErrorKind::InvalidInput`] if its
    /// size is not the one that clients were told.
    pub fn activate(&self, device: Arc<dyn BlockDev>) -> Result<()> {
        if device.size_bytes() != self.size_bytes() {
            return Err(Error::new(
                ErrorKind::InvalidInput,
                format!(
                    "serve a disk of {} bytes where clients were told {} bytes",
                    device.size_bytes(),
                    self.size_bytes()
                ),
            ));
        }
        *self.shared.state.write() = State::Active(device);
        let mut sleepers = self.shared.sleepers.lock();
        sleepers.retain(|sleeper| sleeper.upgrade().map(|waker| waker.wake()).is_some());
        self.shared.activated.notify_all();
        Ok(())
    }

    /// Stops serving: when this returns `Ok`, no request of any client is running on the disk or will run.
    /// [`ErrorKind::TimedOut`], and still serving, if a running request did not end within `limit`.
    pub fn fence(&self, limit: Duration) -> Result<()> {
        match self.shared.state.try_write_for(limit) {
            Some(mut state) => {
                *state = State::Fenced { durable: false };
                Ok(())
            }
            None => Err(still_running(limit)),
        }
    }

    /// As [`DeviceSlot::fence`], and makes durable what was answered before: a flush that comes later has nothing to
    /// do. Clients that flush a disk which they have stopped to write, as QEMU does over NBD, need not wait.
    pub fn fence_durably(&self, limit: Duration) -> Result<()> {
        let mut state = self.shared.state.try_write_for(limit).ok_or_else(|| still_running(limit))?;
        if let State::Active(device) = &*state {
            device.flush()?;
            *state = State::Fenced { durable: true };
        }
        Ok(())
    }

    /// Whether nothing is served, and all that was answered before is durable.
    pub(super) fn is_durable(&self) -> bool {
        matches!(*self.shared.state.read(), State::Fenced { durable: true })
    }

    /// The disk, held against [`DeviceSlot::fence`] until the answer is dropped; `None` while it is not served.
    pub(super) fn enter(&self) -> Option<Entered<'_>> {
        let held = RwLockReadGuard::try_map(self.shared.state.read(), |state| match state {
            State::Active(device) => Some(&**device),
            State::Standby | State::Fenced { .. } => None,
        });
        held.ok().map(Entered)
    }

    /// As [`DeviceSlot::enter`], but waits up to `limit` for `activate`.
    pub(crate) fn enter_within(&self, limit: Duration) -> Option<Entered<'_>> {
        let deadline = Instant::now() + limit;
        loop {
            // Taken before the look, so that an `activate` in between is not missed.
            let mut sleepers = self.shared.sleepers.lock();
            if let Some(entered) = self.enter() {
                return Some(entered);
            }
            if self.shared.activated.wait_until(&mut sleepers, deadline).timed_out() {
                return None;
            }
        }
    }

    /// As [`DeviceSlot::enter`], but waits up to `limit` for `activate`, unless `give_up` says that it is no use.
    pub(super) fn enter_patiently(&self, limit: Duration, give_up: impl Fn() -> bool) -> Option<Entered<'_>> {
        if let Some(device) = self.enter() {
            return Some(device);
        }
        let deadline = Instant::now() + limit;
        while !give_up() && Instant::now() <= deadline {
            if let Some(device) = self.enter_within(GIVE_UP_POLL) {
                return Some(device);
            }
        }
        None
    }

    /// The disk for a read that may take long, not held against a fence: a read cannot harm the next holder.
    pub(super) fn reader(&self) -> Option<Arc<dyn BlockDev>> {
        match &*self.shared.state.read() {
            State::Active(device) => Some(device.clone()),
            State::Standby | State::Fenced { .. } => None,
        }
    }

    /// Has `waker` woken at every `activate`, for as long as it exists.
    pub(super) fn wake_on_activate(&self, waker: &Arc<Waker>) {
        let mut sleepers = self.shared.sleepers.lock();
        sleepers.retain(|sleeper| sleeper.strong_count() > 0);
        sleepers.push(Arc::downgrade(waker));
    }
}

fn still_running(limit: Duration) -> Error {
    Error::new(
        ErrorKind::TimedOut,
        format!("fence disk: a request is still running after {} ms", limit.as_millis()),
    )
}

/// The disk, held against being fenced.
pub(crate) struct Entered<'a>(MappedRwLockReadGuard<'a, dyn BlockDev>);

impl Deref for Entered<'_> {
    type Target = dyn BlockDev;

    fn deref(&self) -> &Self::Target {
        &*self.0
    }
}

#[cfg(test)]
mod test {
    use super::*;
    use crate::export::test_device::RamDevice;

    #[test]
    fn requests_wait_until_the_disk_is_there_and_again_after_it_is_fenced() {
        let slot = DeviceSlot::standby(1 << 20);
        assert!(slot.enter().is_none());
        assert!(slot.enter_within(Duration::from_millis(5)).is_none());

        let waiting = slot.clone();
        let waiter = std::thread::spawn(move || waiting.enter_within(Duration::from_secs(20)).is_some());
        slot.activate(Arc::new(RamDevice::new(1 << 20))).unwrap();
        assert!(waiter.join().unwrap());

        slot.fence(Duration::from_secs(1)).unwrap();
        assert_eq!(slot.state(), SlotState::Fenced);
        assert!(slot.enter().is_none());
    }

    #[test]
    fn a_fence_waits_for_the_running_request_and_gives_up_at_its_limit() {
        let slot = DeviceSlot::active(Arc::new(RamDevice::new(1 << 20)));
        let entered = slot.enter().unwrap();
        let error = slot.fence(Duration::from_millis(10)).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::TimedOut);
        assert_eq!(slot.state(), SlotState::Active);
        drop(entered);
        slot.fence(Duration::from_millis(10)).unwrap();
    }

    #[test]
    fn a_durable_fence_says_so_until_the_disk_is_served_again() {
        let slot = DeviceSlot::active(Arc::new(RamDevice::new(1 << 20)));
        assert!(!slot.is_durable());
        slot.fence_durably(Duration::from_millis(10)).unwrap();
        assert!(slot.is_durable() && slot.enter().is_none());
        slot.activate(Arc::new(RamDevice::new(1 << 20))).unwrap();
        assert!(!slot.is_durable());
        slot.fence(Duration::from_millis(10)).unwrap();
        slot.fence_durably(Duration::from_millis(10)).unwrap();
        assert!(!slot.is_durable(), "nobody flushed it");
    }

    #[test]
    fn a_disk_of_another_size_is_refused() {
        let slot = DeviceSlot::standby(1 << 20);
        let error = slot.activate(Arc::new(RamDevice::new(2 << 20))).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::InvalidInput);
        slot.grow(2 << 20);
        slot.grow(1 << 20);
        slot.activate(Arc::new(RamDevice::new(2 << 20))).unwrap();
    }
}
