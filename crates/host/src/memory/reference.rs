//! Keys and hashes of pages, and which pages the target has been sent.
//!
//! A *key* says where to look for an equal page: 64 bits, made at the speed of memory, easily made equal by who wants to. A
//! *hash*, 128 bits of BLAKE3, proves that what the target found is the page: a guest that could make two pages of one hash
//! would need 2^64 tries, and would then harm its own memory only.
//!
//! Who can learn what: references name pages of the same memory, and blocks of images under the VM's own disks. The target
//! looks nowhere else, whatever a source says: not into other VMs' memory, not into its cache by hash. So that a page was
//! found tells a source nothing that it could not compute from what this VM has already.
//!
//! Not here: what is named (`engine::memory::reference`), finding it at the target (`lookup`), the format
//! (`wire::peer::memory::reference`).

use std::sync::atomic::{AtomicU32, Ordering};

use parking_lot::Mutex;
use whimbrel_engine::memory::PageId;
use whimbrel_engine::memory::reference::{ENTRY_BYTES, PageIndex};
use whimbrel_wire::peer::memory::HASH_BYTES;

/// The most bytes that the index of a move takes: enough for 5 GiB of memory; beyond that the pages sent last are found.
const INDEX_BYTES_MAX: u64 = 32 << 20;
const SHARDS: usize = 16;

/// A page's key.
pub fn key(page: &[u8]) -> u64 {
    // Both halves of a product: with the lower one alone, the highest bit of a word would reach no other.
    fn mix(word: u64) -> u64 {
        let product = u128::from(word) * 0x9e37_79b9_7f4a_7c15;
        product as u64 ^ (product >> 64) as u64
    }
    // Lanes that do not wait for each other.
    let mut lanes = [1_u64, 2, 3, 4];
    for words in page.chunks_exact(32) {
        for (lane, word) in lanes.iter_mut().zip(words.chunks_exact(8)) {
            let word = word.try_into().map_or(0, u64::from_le_bytes);
            *lane = mix(*lane ^ word);
        }
    }
    let mixed = lanes.iter().fold(0, |all: u64, lane| mix(all.rotate_left(31) ^ lane));
    mixed ^ (mixed >> 32)
}

/// A page's hash, as references carry it.
pub fn hash(page: &[u8]) -> [u8; HASH_BYTES] {
    let whole = blake3::hash(page);
    whole.as_bytes().first_chunk().copied().unwrap_or_default()
}

/// Which page was sent with which key: an index from keys to pages, and four bytes of the key that each page was sent with
/// last, so that pages that were sent anew since are not named.
pub struct Sent {
    shards: Vec<Mutex<PageIndex>>,
    /// By block and page; 0 if it is not known.
    last: Vec<Vec<AtomicU32>>,
}

fn short(key: u64) -> u32 {
    ((key >> 32) as u32).max(1)
}

impl Sent {
    /// Nothing was sent of blocks of so many pages.
    pub fn new(blocks: &[u64]) -> Self {
        let pages: u64 = blocks.iter().sum();
        let of = |pages: &u64| usize::try_from(*pages).unwrap_or(0);
        let last =
            blocks.iter().map(|pages| std::iter::repeat_with(AtomicU32::default).take(of(pages)).collect());
        let last = last.collect();
        // Sets are never filled evenly: with twice as many entries as pages one page in thirty finds no place.
        let entries = (pages + pages / 2).next_power_of_two().min(INDEX_BYTES_MAX / ENTRY_BYTES as u64);
        let entries = usize::try_from(entries).unwrap_or(0) / SHARDS;
        let shard = || Mutex::new(PageIndex::new(entries));
        Self { shards: std::iter::repeat_with(shard).take(SHARDS).collect(), last }
    }

    /// A page that was sent with this key, and not with another one since.
    pub fn find(&self, key: u64) -> Option<PageId> {
        let found = self.shard(key)?.lock().find(key >> 4)?;
        (self.last(found)?.load(Ordering::Relaxed) == short(key)).then_some(found)
    }

    /// A page of this key is about to be told; whether it was sent with it the last time.
    pub fn tell(&self, key: u64, page: PageId) -> bool {
        self.last(page).is_some_and(|last| last.swap(short(key), Ordering::Relaxed) == short(key))
    }

    /// What these pages were sent as is not known, or not to be relied on.
    pub fn forget(&self, first: PageId, pages: u32) {
        for page in first.page..first.page.saturating_add(pages) {
            let Some(last) = self.last(PageId { page, ..first }) else { return };
            last.store(0, Ordering::Relaxed);
        }
    }

    fn last(&self, page: PageId) -> Option<&AtomicU32> {
        self.last.get(usize::from(page.block))?.get(page.page as usize)
    }

    /// A page with this key is being sent, and can be named from now on.
    pub fn put(&self, key: u64, page: PageId) {
        if let Some(shard) = self.shard(key) {
            shard.lock().put(key >> 4, page);
        }
    }

    fn shard(&self, key: u64) -> Option<&Mutex<PageIndex>> {
        self.shards.get(key as usize % SHARDS)
    }
}

#[cfg(test)]
mod test {
    use super::*;
    use crate::memory::PAGE_BYTES;
    use std::collections::HashSet;

    #[test]
    fn keys_tell_pages_apart_that_differ_in_one_bit_or_in_the_order_of_words() {
        let page: Vec<u8> = (0..PAGE_BYTES).map(|at| (at / 8 * 7) as u8).collect();
        let mut keys = HashSet::from([key(&page)]);
        for bit in (0..PAGE_BYTES * 8).step_by(17) {
            let mut other = page.clone();
            other[bit / 8] ^= 1 << (bit % 8);
            keys.insert(key(&other));
        }
        let count = (0..PAGE_BYTES * 8).step_by(17).count();
        let mut turned = page.clone();
        turned.rotate_left(8);
        keys.insert(key(&turned));
        assert_eq!(keys.len(), count + 2);
        // What the index uses of them differs too: the lower bits, and the upper half.
        assert!(keys.iter().map(|key| key >> 32).collect::<HashSet<_>>().len() > count);
        assert!(keys.iter().map(|key| key & 0xfff).collect::<HashSet<_>>().len() > 1200);
    }

    #[test]
    fn what_was_sent_is_found_until_it_is_sent_anew() {
        let sent = Sent::new(&[5000]);
        let pages =
            (0..5000).map(|page| (key(&[&[0; 32][..], &u32::to_le_bytes(page), &[0; 28]].concat()), page));
        let pages: Vec<(u64, u32)> = pages.collect();
        for (key, page) in &pages {
            assert!(!sent.tell(*key, PageId { block: 0, page: *page }));
            sent.put(*key, PageId { block: 0, page: *page });
        }
        let found =
            pages.iter().filter(|(key, page)| sent.find(*key) == Some(PageId { block: 0, page: *page }));
        assert!(found.count() > 4500);
        assert_eq!(sent.find(key(&[9; 64])), None);
        // The newest of its set.
        let (newest, page) = (pages[4999].0, PageId { block: 0, page: 4999 });
        assert!(sent.tell(newest, page) && sent.find(newest) == Some(page));
        assert!(!sent.tell(pages[8].0, page));
        assert_eq!(sent.find(newest), None);
        assert!(!sent.tell(newest, page) && sent.tell(newest, page));
        sent.forget(PageId { block: 0, page: 3 }, 100_000);
        assert!(!sent.tell(newest, page));
    }
}
