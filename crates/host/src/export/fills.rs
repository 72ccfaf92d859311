//! Which block of its disk a page of guest RAM was filled from last.
//!
//! A guest's page cache is mostly what it read from its disks and never changed. A move that knows which page that may be
//! names the block instead of sending the page, if the other host holds the image. What is noted here is a hint: the guest
//! may have written the page since, or given it to somebody else, which nobody is told. Whoever uses it compares the bytes.
//!
//! Cost: four bytes for each page of RAM, one part in a thousand, taken as pages are filled; one store for each page read.
//!
//! Invariants: only whole, aligned pages filled from whole, aligned blocks of 4 KiB are noted. A page filled again is that of
//! its newer block.
//!
//! Not here: comparing and naming (`memory::known`).

use std::ops::Range;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, OnceLock};

/// Bytes of a page, and of a block.
const PAGE: u64 = 4096;
/// Pages whose entries are taken together.
const CHUNK: usize = 1024;

/// The blocks of one region's pages.
pub struct Fills {
    chunks: Vec<OnceLock<Box<[AtomicU32; CHUNK]>>>,
}

impl Fills {
    /// For a region of so many bytes.
    pub(crate) fn new(bytes: u64) -> Self {
        let chunks = usize::try_from(bytes.div_ceil(PAGE * CHUNK as u64)).unwrap_or(0);
        Self { chunks: std::iter::repeat_with(OnceLock::new).take(chunks).collect() }
    }

    /// `len` bytes from `at` on, counted from the region's start, were filled from the disk's bytes from `offset` on.
    pub(crate) fn note(&self, at: u64, len: u64, offset: u64) {
        if (at ^ offset) & (PAGE - 1) != 0 {
            return;
        }
        let end = (at + len) / PAGE;
        let first = at.div_ceil(PAGE);
        // The difference is a multiple of a page.
        let block = offset.div_ceil(PAGE);
        for page in first..end {
            // Blocks are kept from 1 on; those beyond 16 TiB are not noted.
            let Ok(entry) = u32::try_from(block + (page - first) + 1) else { return };
            let chunk = usize::try_from(page / CHUNK as u64).ok().and_then(|chunk| self.chunks.get(chunk));
            let Some(chunk) = chunk else { return };
            let chunk = chunk.get_or_init(|| Box::new([const { AtomicU32::new(0) }; CHUNK]));
            if let Some(place) = chunk.get(page as usize % CHUNK) {
                place.store(entry, Ordering::Relaxed);
            }
        }
    }

    /// The block that a page of the region was filled from.
    fn block_of(&self, page: u64) -> Option<u32> {
        let chunk = self.chunks.get(usize::try_from(page / CHUNK as u64).ok()?)?.get()?;
        chunk.get(page as usize % CHUNK)?.load(Ordering::Relaxed).checked_sub(1)
    }
}

/// For the pages of one RAM file, the blocks of one disk that they were filled from. What is filled later is seen, too.
#[derive(Clone, Default)]
pub struct FilledFrom {
    /// Pages of the file, and their blocks.
    regions: Vec<(Range<u64>, Arc<Fills>)>,
}

impl FilledFrom {
    /// `fills` are the blocks of the file's bytes from `file_offset` on.
    pub(crate) fn add(&mut self, file_offset: u64, bytes: u64, fills: Arc<Fills>) {
        let first = file_offset / PAGE;
        self.regions.push((first..first + bytes / PAGE, fills));
    }

    /// The 4 KiB block that a page of the file was filled from last.
    pub fn block_of(&self, page: u64) -> Option<u32> {
        let (pages, fills) = self.regions.iter().find(|(pages, _)| pages.contains(&page))?;
        fills.block_of(page - pages.start)
    }
}

#[cfg(test)]
mod test {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        /// Naive: every byte of RAM with the disk's byte that was put there last; a page is a block's if all its bytes are.
        #[test]
        fn a_noted_page_is_the_block_that_filled_it_whole(
            reads in prop::collection::vec((0u64..20 * 8, 1u64..9 * 8, 0u64..40 * 8), 0..40),
        ) {
            const SECTOR: u64 = 512;
            let fills = Arc::new(Fills::new(20 * PAGE));
            let mut filled = FilledFrom::default();
            filled.add(3 * PAGE, 20 * PAGE, Arc::clone(&fills));
            let mut newest = vec![None; 20];
            for (at, len, offset) in reads {
                let len = len.min(20 * 8 - at);
                fills.note(at * SECTOR, len * SECTOR, offset * SECTOR);
                for (page, newest) in (0_u64..).zip(&mut newest) {
                    let inside = at <= page * 8 && (page + 1) * 8 <= at + len;
                    let from = (offset + page * 8).checked_sub(at).filter(|from| from % 8 == 0);
                    if let (true, Some(from)) = (inside, from) {
                        *newest = Some((from / 8) as u32);
                    }
                }
            }
            for (page, newest) in (0_u64..).zip(newest) {
                prop_assert_eq!(filled.block_of(page + 3), newest);
            }
            prop_assert_eq!(filled.block_of(2), None);
            prop_assert_eq!(filled.block_of(23), None);
        }
    }

    #[test]
    fn what_lies_outside_of_the_region_or_behind_16_tib_is_not_noted() {
        let fills = Fills::new(PAGE);
        fills.note(4096 * PAGE, PAGE, 0);
        fills.note(0, PAGE, u64::from(u32::MAX) * PAGE);
        assert_eq!(fills.block_of(0), None);
        assert_eq!(fills.block_of(4096), None);
    }
}
