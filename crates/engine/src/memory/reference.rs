//! Which pages are named instead of sent: those that equal a page that the target has been sent.
//!
//! ```text
//!   page ─► key (64 bits, not cryptographic) ─► find ─┬─ a page of that key: equal now? ─► named by it, with its hash
//!                                                     └─ none, or it changed ─► sent, and put
//! ```
//!
//! A key only says where to look. The source compares the bytes before it names a page, and the target verifies the hash of
//! what it finds: a key that two pages share costs a comparison, an entry that is out of date costs sending a page one round
//! later, never a wrong byte.
//!
//! Invariants: the index never takes more than it was given; it holds what was put last, as far as it fits.
//!
//! Not here: keys, hashes and bytes (`host::memory::reference`), the format (`wire::peer::memory::reference`).

use std::ops::Range;

use super::PageId;

const WAYS: usize = 4;
/// Bytes that an entry of the index takes.
pub const ENTRY_BYTES: usize = size_of::<Entry>();
/// A page that takes less without its frequent words is sent: naming it takes two hashes and a read at each end.
const PAYS_BYTES: usize = 512;

/// Whether a page that takes `plain_bytes` without its frequent words is worth being named.
pub fn pays(plain_bytes: usize) -> bool {
    plain_bytes >= PAYS_BYTES
}

/// Whether a target has enough of an image for pages to be named by it: half of what the image stores. A page that is named
/// and not found costs a round.
pub fn holds_enough(cached_bytes: u64, stored_bytes: u64) -> bool {
    cached_bytes >= stored_bytes / 2
}

/// Whether to go on naming pages by blocks of images, after a round in which the target did not find `missed` of `named`.
pub fn disks_pay(named: u64, missed: u64) -> bool {
    missed <= named / 2
}

#[derive(Clone, Copy, Debug, Default)]
struct Entry {
    /// A part of the key; 0: nothing is here.
    tag: u32,
    page: u32,
    block: u16,
}

/// Where pages with a given key were sent to. See the module.
#[derive(Clone, Debug)]
pub struct PageIndex {
    /// By the low bits of the key; the newest first.
    sets: Vec<[Entry; WAYS]>,
}

impl PageIndex {
    /// An empty index of at most `entries_max` entries, of [`ENTRY_BYTES`] each; at least one set of four.
    pub fn new(entries_max: usize) -> Self {
        let sets = (entries_max / WAYS).max(1);
        // A power of two, rounded down.
        let sets = 1 << sets.ilog2();
        Self { sets: vec![[Entry::default(); WAYS]; sets] }
    }

    /// A page with this key, the newest that is known.
    pub fn find(&self, key: u64) -> Option<PageId> {
        let tag = tag(key);
        let found = self.sets.get(self.place(key))?.iter().find(|entry| entry.tag == tag)?;
        Some(PageId { block: found.block, page: found.page })
    }

    /// The page with this key is at the target now.
    pub fn put(&mut self, key: u64, page: PageId) {
        let (tag, place) = (tag(key), self.place(key));
        let Some(set) = self.sets.get_mut(place) else { return };
        let at = set.iter().position(|entry| entry.tag == tag).unwrap_or(WAYS - 1);
        if let Some(older) = set.get_mut(..=at) {
            older.rotate_right(1);
        }
        set[0] = Entry { tag, page: page.page, block: page.block };
    }

    /// Entries that there is room for.
    pub fn capacity(&self) -> usize {
        self.sets.len() * WAYS
    }

    fn place(&self, key: u64) -> usize {
        key as usize & (self.sets.len() - 1)
    }
}

fn tag(key: u64) -> u32 {
    ((key >> 32) as u32).max(1)
}

/// Joins ascending, disjoint ranges until there are at most `most` of them, over the smallest gaps: what lies in a gap
/// is sent once more than it has to be.
pub fn coarsen(ranges: &mut Vec<Range<u64>>, most: usize) {
    let surplus = ranges.len().saturating_sub(most.max(1));
    if surplus == 0 {
        return;
    }
    let mut gaps: Vec<(u64, usize)> = ranges
        .iter()
        .zip(ranges.iter().skip(1))
        .enumerate()
        .map(|(index, (before, after))| (after.start.saturating_sub(before.end), index + 1))
        .collect();
    if surplus < gaps.len() {
        gaps.select_nth_unstable(surplus);
    }
    let mut joined = vec![false; ranges.len()];
    for (_, index) in gaps.iter().take(surplus) {
        if let Some(join) = joined.get_mut(*index) {
            *join = true;
        }
    }
    let mut coarse: Vec<Range<u64>> = Vec::with_capacity(most);
    for (range, join) in ranges.iter().zip(joined) {
        match coarse.last_mut() {
            Some(last) if join => last.end = range.end,
            _ => coarse.push(range.clone()),
        }
    }
    *ranges = coarse;
}

#[cfg(test)]
mod test {
    use super::*;
    use proptest::prelude::*;
    use std::collections::HashMap;

    proptest! {
        #[test]
        fn what_is_found_was_put_last_and_nothing_is_lost_while_there_is_room(
            puts in prop::collection::vec((0u64..40, any::<u32>()), 0..200),
            entries in 0usize..300,
        ) {
            // Keys that differ in both parts.
            let key = |n: u64| n.wrapping_mul(0x9e37_79b9_7f4a_7c15).rotate_left(17);
            let mut index = PageIndex::new(entries);
            prop_assert!(index.capacity() <= entries.max(WAYS));
            let mut oracle = HashMap::new();
            for (number, page) in &puts {
                let page = PageId { block: (page % 7) as u16, page: *page };
                index.put(key(*number), page);
                oracle.insert(key(*number), page);
                prop_assert_eq!(index.find(key(*number)), Some(page));
            }
            for number in 0..60 {
                let found = index.find(key(number));
                prop_assert!(found.is_none() || found.as_ref() == oracle.get(&key(number)));
            }
            // A set that no more than four keys fall into has forgotten none of them.
            let mut sets: HashMap<usize, Vec<u64>> = HashMap::new();
            oracle.keys().for_each(|key| sets.entry(index.place(*key)).or_default().push(*key));
            for keys in sets.values().filter(|keys| keys.len() <= WAYS) {
                prop_assert!(keys.iter().all(|key| index.find(*key) == oracle.get(key).copied()));
            }
        }

        #[test]
        fn coarse_ranges_hold_all_the_pages_and_as_few_others_as_they_can(
            parts in prop::collection::vec((1u64..20, 1u64..20), 0..60),
            most in 1usize..20,
        ) {
            let mut at = 0;
            let ranges: Vec<Range<u64>> = parts
                .iter()
                .map(|(gap, len)| {
                    at += gap + len;
                    at - len..at
                })
                .collect();
            let mut coarse = ranges.clone();
            coarsen(&mut coarse, most);
            prop_assert!(coarse.len() <= most.max(1));
            prop_assert!(coarse.windows(2).all(|pair| pair[0].end < pair[1].start));
            let inside = |page: u64| coarse.iter().any(|range| range.contains(&page));
            prop_assert!(ranges.iter().all(|range| range.clone().all(inside)));
            let pages = |ranges: &[Range<u64>]| ranges.iter().map(|range| range.end - range.start).sum::<u64>();
            let mut gaps: Vec<u64> = parts.iter().skip(1).map(|(gap, _)| *gap).collect();
            gaps.sort_unstable();
            let least: u64 = gaps.iter().take(ranges.len().saturating_sub(most)).sum();
            prop_assert_eq!(pages(&coarse), pages(&ranges) + least);
        }
    }

    #[test]
    fn a_page_that_takes_little_is_not_worth_naming() {
        assert!(pays(4096) && pays(2000) && !pays(100));
    }

    #[test]
    fn images_that_are_hardly_there_are_left_alone() {
        assert!(holds_enough(50, 100) && holds_enough(0, 0) && !holds_enough(49, 100));
        assert!(disks_pay(0, 0) && disks_pay(100, 50) && !disks_pay(100, 51) && !disks_pay(1, 1));
    }
}
