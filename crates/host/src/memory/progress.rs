//! How far a move of memory is, for people and for the engine; the same figures in both modes.
//!
//! Not here: the estimates of pause and time left (`engine::memory::precopy`), the task's state (`task`).

use std::sync::Arc;

use parking_lot::Mutex;
use whimbrel_wire::peer::memory::Misses;

use crate::memory::techniques::Shortened;

/// The figures of one move, shared between who moves and who shows.
#[derive(Clone, Debug, Default)]
pub struct Progress(Arc<Mutex<Figures>>);

/// A look at a move. Counters run over all rounds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Figures {
    /// The round under way, from 1; 0 before the first.
    pub round: u32,
    /// Size of the guest's memory, bytes.
    pub total_bytes: u64,
    /// Pages of the round under way that are still to be sent.
    pub left_pages: u64,
    /// Pages sent with their bytes.
    pub data_pages: u64,
    /// Pages found to be zero.
    pub zero_pages: u64,
    /// Bytes that went out, headers included.
    pub wire_bytes: u64,
    /// Memory that was sent compressed, bytes before compression.
    pub packed_raw_bytes: u64,
    /// The same after compression.
    pub packed_wire_bytes: u64,
    /// What was sent shorter than with its bytes.
    pub shortened: Shortened,
    /// What of it the target did not find, and was sent with its bytes.
    pub misses: Misses,
    /// Wire bytes per second that the link takes; 0 before it was measured.
    pub link_bytes_s: u64,
    /// Bytes per second that the guest writes; 0 before it was measured.
    pub dirty_bytes_s: u64,
    /// How long the pause would be if it began now; none before the first round is over.
    pub expected_pause_ms: Option<u64>,
    /// Nanoseconds until the pause for each of `left_pages`; none while that is unknown or nothing converges.
    pub page_left_ns: Option<u64>,
}

impl Figures {
    /// The seconds until the pause, rounded up; none while nobody knows.
    pub fn left_s(&self) -> Option<u64> {
        Some(self.left_pages.saturating_mul(self.page_left_ns?).div_ceil(1_000_000_000))
    }
}

impl Progress {
    /// The figures now.
    pub fn get(&self) -> Figures {
        *self.0.lock()
    }

    /// Changes the figures.
    pub fn update(&self, change: impl FnOnce(&mut Figures)) {
        change(&mut self.0.lock());
    }
}
