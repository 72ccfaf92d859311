//! Requests that pass unanswered from one host's device to the next one's, when a VM is moved.
//!
//! ```text
//!  source:  cut short ──▶ GET_VRING_BASE: what ends within CUT_LIMIT is answered, the rest is listed
//!                                                                          │ QueueIo: queue, place, heads
//!  target:  carried ──▶ the ring starts at that place, with a new in-flight record ──▶ done first, in that order
//! ```
//!
//! A guest must not stand still for a read that waits for a slow store; QEMU before 11 knows no way to take such a
//! request along (`VHOST_USER_PROTOCOL_F_GET_VRING_BASE_INFLIGHT`), so the agents hand the list to each other. Its
//! ring, in the RAM that is moved anyway, says what each request is. A QEMU that does know brings the in-flight record
//! itself; that says the same, and comes first.
//!
//! Invariants
//! * A list is used once, by a ring that starts where the list's ring stopped and whose in-flight record is new: an
//!   older record has what was carried, whatever became of it since.
//! * The heads are in the in-flight record before it counts.
//! * A list of another host is not trusted: what does not fit its ring is dropped.
//!
//! Not here: stopping a queue (`queue`), sending the list (`migrate`).

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use whimbrel_wire::peer::migrate::QueueIo;

/// How long requests have to end when a VM is about to move: those that only need this host's memory and disk do.
const CUT_LIMIT: Duration = Duration::from_millis(4);

/// See the module's charter. One for each device.
#[derive(Debug, Default)]
pub(super) struct Handover {
    cut_short: AtomicBool,
    /// When the rings that are being stopped leave their requests; one time for all of them.
    cut_at: Mutex<Option<Instant>>,
    carried: Mutex<Vec<QueueIo>>,
}

impl Handover {
    /// Whether rings that stop from now on leave unanswered what does not end at once.
    pub(super) fn cut_short(&self, cut_short: bool) {
        self.cut_short.store(cut_short, Ordering::Release);
        *self.cut_at.lock() = None;
    }

    /// A ring runs: the next pause is another one.
    pub(super) fn began(&self) {
        *self.cut_at.lock() = None;
    }

    /// How long a stopping ring waits for its requests; none if it waits as long as it always does. `recorded`: its
    /// front-end takes along what is left in the in-flight record.
    pub(super) fn limit(&self, recorded: bool) -> Option<Duration> {
        if !recorded && !self.cut_short.load(Ordering::Acquire) {
            return None;
        }
        let now = Instant::now();
        let at = *self.cut_at.lock().get_or_insert(now + CUT_LIMIT);
        Some(at.saturating_duration_since(now))
    }

    /// Has these requests of another host's device done when their rings start.
    pub(super) fn carry(&self, queues: Vec<QueueIo>) {
        *self.carried.lock() = queues;
    }

    /// What was carried for a ring of `size` entries that starts at `next_avail` for the first time.
    pub(super) fn take(&self, queue: u16, size: u16, next_avail: u16, used_idx: u16) -> Vec<u16> {
        let mut carried = self.carried.lock();
        let Some(index) = carried.iter().position(|other| other.queue == queue) else { return Vec::new() };
        let list = carried.swap_remove(index);
        let mut seen: Vec<u16> = list.heads.clone();
        seen.sort_unstable();
        seen.dedup();
        let fits = list.next_avail == next_avail
            && seen.len() == list.heads.len()
            && seen.last().is_none_or(|head| *head < size)
            && seen.len() <= usize::from(next_avail.wrapping_sub(used_idx));
        if !fits {
            tracing::warn!(
                queue,
                requests = list.heads.len(),
                "what was to be done again is of another ring"
            );
            return Vec::new();
        }
        list.heads
    }
}

#[cfg(test)]
mod test {
    use super::*;

    fn list(heads: &[u16]) -> QueueIo {
        QueueIo { queue: 1, next_avail: 9, heads: heads.to_vec() }
    }

    #[test]
    fn a_list_is_used_once_and_only_by_its_ring() {
        let handover = Handover::default();
        handover.carry(vec![list(&[5, 2])]);
        assert!(handover.take(0, 8, 9, 7).is_empty(), "another queue");
        assert_eq!(handover.take(1, 8, 9, 7), [5, 2]);
        assert!(handover.take(1, 8, 9, 7).is_empty(), "a second time");
    }

    #[test]
    fn what_does_not_fit_its_ring_is_dropped() {
        for (what, heads, size, next_avail, used_idx) in [
            ("a ring that was reset", &[5, 2][..], 8, 0, 0),
            ("a ring that went on", &[5, 2], 8, 10, 8),
            ("a head outside", &[5, 8], 8, 9, 7),
            ("a head twice", &[5, 5], 8, 9, 7),
            ("more than was taken", &[5, 2, 1], 8, 9, 7),
        ] {
            let handover = Handover::default();
            handover.carry(vec![list(heads)]);
            assert!(handover.take(1, size, next_avail, used_idx).is_empty(), "{what}");
        }
    }

    #[test]
    fn all_rings_of_a_device_have_one_limit_together() {
        let handover = Handover::default();
        assert_eq!(handover.limit(false), None);
        handover.cut_short(true);
        assert!(handover.limit(false).is_some_and(|limit| limit > Duration::ZERO));
        std::thread::sleep(2 * CUT_LIMIT);
        assert_eq!(handover.limit(false), Some(Duration::ZERO));
        handover.cut_short(false);
        assert_eq!(handover.limit(false), None);
        assert!(handover.limit(true).is_some_and(|limit| limit > Duration::ZERO), "another pause");
        std::thread::sleep(2 * CUT_LIMIT);
        assert_eq!(handover.limit(true), Some(Duration::ZERO));
        handover.began();
        assert!(handover.limit(true).is_some_and(|limit| limit > Duration::ZERO));
    }
}
