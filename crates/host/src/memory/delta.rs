//! The versions of pages that the target has, kept by the source so that a page which is sent again can go as its changes.
//!
//! ```text
//!   page read again ─► difference ─┬─ no version kept ─► sent by itself ─┐
//!                                  ├─ equal ─► not sent at all           ├─► keep: the version is what was sent
//!                                  └─ XOR, word by word ─► sent ─────────┘
//! ```
//!
//! Invariants
//! * What is kept of a page is what the target's RAM file holds at the end of the round in which it was sent: bytes as they
//!   were sent, not as they are in the guest. Whoever learns that the target holds something else calls [`Kept::forget`].
//! * At most the given number of bytes is kept; memory is taken as pages come.
//!
//! Not here: which pages are kept (`engine::memory::delta`), how changes are written (`codec::words`).

use parking_lot::Mutex;
use whimbrel_engine::memory::PageId;
use whimbrel_engine::memory::delta::Versions;

use crate::memory::bitmap::PAGE_BYTES;

/// Neighbouring pages that share a lock: the pages of a group mostly do.
const NEIGHBOURS: u32 = 64;
const SHARDS: usize = 16;

type Page = [u8; PAGE_BYTES];

#[derive(Default)]
struct Shard {
    versions: Versions,
    /// By slot.
    bytes: Vec<Box<Page>>,
}

/// See the module.
pub struct Kept {
    shards: Vec<Mutex<Shard>>,
}

/// What a page is to the version of it that the target has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Difference {
    /// That version is not kept.
    Unknown,
    /// The same.
    None,
    /// Another; the difference was written.
    Some,
}

/// Writes `now` XOR `before` to `into`, all of the same length; whether they differ.
pub fn xor(now: &[u8], before: &[u8], into: &mut [u8]) -> bool {
    let mut all = 0;
    for ((now, before), into) in now.chunks_exact(8).zip(before.chunks_exact(8)).zip(into.chunks_exact_mut(8))
    {
        let word = |bytes: &[u8]| bytes.try_into().map_or(0, u64::from_le_bytes);
        let changed: u64 = word(now) ^ word(before);
        all |= changed;
        into.copy_from_slice(&changed.to_le_bytes());
    }
    all != 0
}

/// XORs `with` into `into`, both of the same length.
pub fn xor_into(into: &mut [u8], with: &[u8]) {
    for (into, with) in into.iter_mut().zip(with) {
        *into ^= with;
    }
}

impl Kept {
    /// Keeps at most `bytes_max` bytes of pages.
    pub fn new(bytes_max: u64) -> Self {
        let slots = bytes_max / PAGE_BYTES as u64;
        let shards = if slots < SHARDS as u64 * u64::from(NEIGHBOURS) { 1 } else { SHARDS };
        let slots = u32::try_from(slots / shards as u64).unwrap_or(u32::MAX);
        let shard = || Mutex::new(Shard { versions: Versions::new(slots), bytes: Vec::new() });
        Self { shards: std::iter::repeat_with(shard).take(shards).collect() }
    }

    /// A round begins.
    pub fn begin_round(&self, round: u32) {
        self.shards.iter().for_each(|shard| shard.lock().versions.begin_round(round));
    }

    /// Writes the difference between `now`, the page's bytes, and the version that the target has to `into`.
    pub fn difference(&self, page: PageId, now: &[u8], into: &mut [u8]) -> Difference {
        let Some(shard) = self.shard(page) else { return Difference::Unknown };
        let mut shard = shard.lock();
        let slot = shard.versions.find(page);
        let Some(before) = slot.and_then(|slot| shard.bytes.get(slot as usize)) else {
            return Difference::Unknown;
        };
        if xor(now, &before[..], into) { Difference::Some } else { Difference::None }
    }

    /// Learns whether sending a page's difference paid.
    pub fn judge(&self, page: PageId, paid: bool) {
        if let Some(shard) = self.shard(page) {
            shard.lock().versions.judge(page, paid);
        }
    }

    /// `now` is what the target will have of the page.
    pub fn keep(&self, page: PageId, now: &[u8]) {
        let (Some(shard), Ok(now)) = (self.shard(page), <&Page>::try_from(now)) else { return };
        let mut shard = shard.lock();
        let Some(slot) = shard.versions.admit(page) else { return };
        match shard.bytes.get_mut(slot as usize) {
            Some(bytes) => bytes.copy_from_slice(now),
            // Slots are handed out in order, so this one is the next.
            None => shard.bytes.push(Box::new(*now)),
        }
    }

    /// The target has something else of these pages, or it is not known what.
    pub fn forget(&self, first: PageId, pages: u32) {
        if u64::from(pages) >= u64::from(NEIGHBOURS) * self.shards.len() as u64 {
            self.shards.iter().for_each(|shard| shard.lock().versions.forget_run(first, pages));
            return;
        }
        for page in first.page..first.page.saturating_add(pages) {
            let page = PageId { page, ..first };
            if let Some(shard) = self.shard(page) {
                shard.lock().versions.forget(page);
            }
        }
    }

    fn shard(&self, page: PageId) -> Option<&Mutex<Shard>> {
        self.shards.get((page.page / NEIGHBOURS) as usize % self.shards.len())
    }
}

#[cfg(test)]
mod test {
    use super::*;
    use proptest::prelude::*;
    use std::collections::HashMap;

    proptest! {
        /// Whatever is kept, the difference leads from what was kept last to the page.
        #[test]
        fn a_difference_leads_from_the_version_kept_last(
            bytes_max in 0u64..3_000_000,
            acts in prop::collection::vec((0u32..400, any::<u8>(), 0u8..10), 0..200),
        ) {
            let kept = Kept::new(bytes_max);
            let mut oracle: HashMap<PageId, u8> = HashMap::new();
            let mut into = vec![0; PAGE_BYTES];
            for (number, (page, fill, act)) in acts.into_iter().enumerate() {
                let page = PageId { block: 0, page };
                kept.begin_round(number as u32);
                if act == 0 {
                    kept.forget(page, 70);
                    oracle.retain(|other, _| !(page.page..page.page + 70).contains(&other.page));
                }
                let now = vec![fill; PAGE_BYTES];
                match (kept.difference(page, &now, &mut into), oracle.get(&page)) {
                    (Difference::Unknown, _) => {}
                    (Difference::None, before) => prop_assert_eq!(before, Some(&fill)),
                    (Difference::Some, Some(before)) => {
                        prop_assert!(*before != fill && into.iter().all(|byte| *byte == fill ^ before));
                        xor_into(&mut into, &vec![*before; PAGE_BYTES]);
                        prop_assert!(into == now);
                        kept.judge(page, act < 8);
                    }
                    (Difference::Some, None) => prop_assert!(false, "a version of nothing"),
                }
                kept.keep(page, &now);
                oracle.insert(page, fill);
            }
        }
    }

    #[test]
    fn what_fits_is_kept() {
        let kept = Kept::new(4 << 20);
        let page = |page| PageId { block: 1, page };
        for number in 0..1024 {
            kept.keep(page(number), &[number as u8; PAGE_BYTES]);
        }
        let mut into = [0; PAGE_BYTES];
        let same =
            |number: u32| kept.difference(page(number), &[number as u8; PAGE_BYTES], &mut [0; PAGE_BYTES]);
        assert!((0..1024).all(|number| same(number) == Difference::None));
        assert_eq!(kept.difference(page(5), &[1; PAGE_BYTES], &mut into), Difference::Some);
        assert_eq!(into, [4; PAGE_BYTES]);
        kept.forget(page(0), 1100);
        assert!((0..1024).all(|number| same(number) == Difference::Unknown));
    }
}
