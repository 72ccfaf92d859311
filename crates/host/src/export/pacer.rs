//! The limits of one disk, kept for all its clients together: `whimbrel volume limit`.
//!
//! Invariant: a disk without limits pays one atomic load per look.
//!
//! Not here: how much may begin when (`engine::export::budget`).

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use whimbrel_engine::export::budget::Budget;
use whimbrel_wire::meta::IoLimits;

/// Whoever waits looks again after so long: limits may have changed.
const LOOK_AGAIN: Duration = Duration::from_millis(50);

/// See the module's charter.
#[derive(Debug)]
pub(super) struct Pacer {
    limited: AtomicBool,
    budget: Mutex<Budget>,
    start: Instant,
}

impl Default for Pacer {
    fn default() -> Self {
        Self { limited: AtomicBool::new(false), budget: Mutex::default(), start: Instant::now() }
    }
}

impl Pacer {
    /// Keeps these limits from now on.
    pub(super) fn set(&self, limits: IoLimits) {
        let budget = Budget::new(limits);
        self.limited.store(budget.is_limited(), Ordering::Release);
        *self.budget.lock() = budget;
    }

    fn now_ns(&self) -> u64 {
        // Counted from a burst before the start, so that a fresh disk has its burst.
        let now_ns = self.start.elapsed().as_nanos() + u128::from(whimbrel_engine::export::budget::BURST_NS);
        u64::try_from(now_ns).unwrap_or(u64::MAX)
    }

    /// How long to wait before the next request may begin, or until the next look; nothing if it may begin now.
    pub(super) fn wait(&self) -> Option<Duration> {
        if !self.limited.load(Ordering::Acquire) {
            return None;
        }
        let wait_ns = self.budget.lock().wait_ns(self.now_ns());
        (wait_ns > 0).then(|| Duration::from_nanos(wait_ns).min(LOOK_AGAIN))
    }

    /// A request of so many bytes has begun.
    pub(super) fn charge(&self, bytes: u64) {
        if self.limited.load(Ordering::Acquire) {
            self.budget.lock().charge(self.now_ns(), bytes);
        }
    }
}
