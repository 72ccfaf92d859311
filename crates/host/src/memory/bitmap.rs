//! Sets of guest pages: one bit per 4 KiB page of a RAM block, numbered from the block's start.
//!
//! Two forms of the same set: [`PageBitmap`] has one owner and is what rounds are made of; [`SharedDirty`] is
//! written by many threads at once, without locks, and is drained into a `PageBitmap` between rounds.
//!
//! Invariants
//! * Bits at and above `pages()` are always zero. Page numbers beyond the end are ignored, not a panic: they may
//!   come from a guest or from another host.
//! * Nothing marked in a [`SharedDirty`] is lost: a mark is either in a drain or waits for the next one.
//!
//! Not here: how dirty pages are found (`guest`), how they are sent (`memory::source`).

use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};

use whimbrel_engine::memory::rank;

/// Bytes of a page: the unit in which memory is tracked, encoded and sent.
pub const PAGE_BYTES: usize = 4096;

const WORD_PAGES: u64 = 64;

/// The mask of the bits `from..to` of one word, `0 <= from < to <= 64`.
fn mask(from: u64, to: u64) -> u64 {
    (u64::MAX >> (WORD_PAGES - (to - from))) << from
}

/// The words that `start .. start + len`, cut to `pages`, touches: `(word index, mask)`.
fn words_of(start: u64, len: u64, pages: u64) -> impl Iterator<Item = (usize, u64)> {
    let end = start.saturating_add(len).min(pages);
    let first = start / WORD_PAGES;
    let last = if start < end { end.div_ceil(WORD_PAGES) } else { first };
    (first..last).map(move |word| {
        let base = word * WORD_PAGES;
        let from = start.max(base) - base;
        let to = end.min(base + WORD_PAGES) - base;
        (usize::try_from(word).unwrap_or(usize::MAX), mask(from, to))
    })
}

fn words_for(pages: u64) -> usize {
    usize::try_from(pages.div_ceil(WORD_PAGES)).unwrap_or(usize::MAX)
}

/// A dense set of pages with one owner.
#[derive(Clone, PartialEq, Eq)]
pub struct PageBitmap {
    words: Vec<u64>,
    pages: u64,
}

impl PageBitmap {
    /// The empty set over a block of `pages` pages.
    pub fn new(pages: u64) -> Self {
        Self { words: vec![0; words_for(pages)], pages }
    }

    /// The set of all pages of a block of `pages` pages.
    pub fn full(pages: u64) -> Self {
        let mut all = Self::new(pages);
        all.set_range(0, pages);
        all
    }

    /// How many pages the block has (not how many are in the set).
    pub fn pages(&self) -> u64 {
        self.pages
    }

    /// Puts a page into the set.
    pub fn set(&mut self, page: u64) {
        self.set_range(page, 1);
    }

    /// Puts the pages `start .. start + len` into the set; the part beyond the end is ignored.
    pub fn set_range(&mut self, start: u64, len: u64) {
        for (word, mask) in words_of(start, len, self.pages) {
            if let Some(word) = self.words.get_mut(word) {
                *word |= mask;
            }
        }
    }

    /// Takes the pages `start .. start + len` out of the set.
    pub fn clear_range(&mut self, start: u64, len: u64) {
        for (word, mask) in words_of(start, len, self.pages) {
            if let Some(word) = self.words.get_mut(word) {
                *word &= !mask;
            }
        }
    }

    /// Whether a page is in the set.
    pub fn contains(&self, page: u64) -> bool {
        words_of(page, 1, self.pages)
            .any(|(word, mask)| self.words.get(word).is_some_and(|word| word & mask != 0))
    }

    /// How many pages are in the set.
    pub fn count(&self) -> u64 {
        self.words.iter().map(|word| u64::from(word.count_ones())).sum()
    }

    /// The segments ([`rank::SEGMENT_PAGES`]) that have pages in the set, ascending, and how many.
    pub fn segments(&self) -> impl Iterator<Item = (usize, u32)> + '_ {
        const { assert!(rank::SEGMENT_PAGES == WORD_PAGES) };
        self.words.iter().map(|word| word.count_ones()).enumerate().filter(|(_, pages)| *pages > 0)
    }

    /// Takes out the pages of all segments but those of which `keep` holds.
    pub fn retain_segments(&mut self, mut keep: impl FnMut(usize) -> bool) {
        for (segment, word) in self.words.iter_mut().enumerate() {
            if *word != 0 && !keep(segment) {
                *word = 0;
            }
        }
    }

    /// Whether no page is in the set.
    pub fn is_empty(&self) -> bool {
        self.words.iter().all(|word| *word == 0)
    }

    /// The maximal runs of pages in the set, in order.
    pub fn iter_ranges(&self) -> impl Iterator<Item = Range<u64>> + '_ {
        let mut next = 0;
        std::iter::from_fn(move || {
            let range = self.next_range(next)?;
            next = range.end;
            Some(range)
        })
    }

    /// The first run of pages in the set that begins at or after `from`, or the rest of one that covers `from`.
    pub fn next_range(&self, from: u64) -> Option<Range<u64>> {
        self.next_range_within(from..self.pages)
    }

    /// The same, cut to `within`; looks at the words of `within` only.
    pub fn next_range_within(&self, within: Range<u64>) -> Option<Range<u64>> {
        let within = within.start..within.end.min(self.pages);
        let start = self.find(within.clone(), 0)?;
        let end = within.end;
        Some(start..self.find(start..end, u64::MAX).unwrap_or(end))
    }

    /// The first page of `within` whose bit differs from those of `flip` (0: first set, all ones: first clear one).
    fn find(&self, within: Range<u64>, flip: u64) -> Option<u64> {
        let mut word = within.start / WORD_PAGES;
        let mut keep = u64::MAX << (within.start % WORD_PAGES);
        while word * WORD_PAGES < within.end {
            let bits = (self.words.get(usize::try_from(word).ok()?)? ^ flip) & keep;
            if bits != 0 {
                let page = word * WORD_PAGES + u64::from(bits.trailing_zeros());
                return (page < within.end).then_some(page);
            }
            word += 1;
            keep = u64::MAX;
        }
        None
    }

    /// Adds the pages of `other`.
    pub fn merge(&mut self, other: &Self) {
        let last = self.last_mask();
        for (mine, theirs) in self.words.iter_mut().zip(&other.words) {
            *mine |= theirs;
        }
        if let (Some(word), true) = (self.words.last_mut(), other.pages > self.pages) {
            *word &= last;
        }
    }

    /// Removes the pages of `other`.
    pub fn subtract(&mut self, other: &Self) {
        for (mine, theirs) in self.words.iter_mut().zip(&other.words) {
            *mine &= !theirs;
        }
    }

    /// Keeps only the pages that are in `other` too.
    pub fn intersect(&mut self, other: &Self) {
        let mut theirs = other.words.iter();
        for mine in &mut self.words {
            *mine &= theirs.next().copied().unwrap_or(0);
        }
    }

    /// Empties the set.
    pub fn clear(&mut self) {
        self.words.fill(0);
    }

    /// Empties the set and returns what was in it.
    #[must_use]
    pub fn take(&mut self) -> Self {
        std::mem::replace(self, Self::new(self.pages))
    }

    fn last_mask(&self) -> u64 {
        match self.pages % WORD_PAGES {
            0 => u64::MAX,
            rest => mask(0, rest),
        }
    }
}

impl std::fmt::Debug for PageBitmap {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "PageBitmap({} of {})", self.count(), self.pages)
    }
}

/// Pages written by threads of this process on behalf of the guest (a disk back-end filling read buffers),
/// which the page tables of the guest's process do not show.
///
/// A writer marks a page **after** its last byte is in place: whoever reads the page before the mark and sends
/// old or torn bytes finds the mark in a later drain and sends the page again.
#[derive(Debug)]
pub struct SharedDirty {
    words: Vec<AtomicU64>,
    pages: u64,
}

impl SharedDirty {
    /// No page of a block of `pages` pages is marked.
    pub fn new(pages: u64) -> Self {
        let words = std::iter::repeat_with(AtomicU64::default).take(words_for(pages)).collect();
        Self { words, pages }
    }

    /// How many pages the block has.
    pub fn pages(&self) -> u64 {
        self.pages
    }

    /// Marks `pages` pages from `first_page` on; the part beyond the end is ignored. Lock-free.
    pub fn mark(&self, first_page: u64, pages: u64) {
        for (word, mask) in words_of(first_page, pages, self.pages) {
            if let Some(word) = self.words.get(word) {
                // Release: a drain that sees the mark sees the bytes written before it.
                word.fetch_or(mask, Ordering::Release);
            }
        }
    }

    /// Moves all marks into `into`, which covers the same block.
    pub fn drain_into(&self, into: &mut PageBitmap) {
        let last = into.last_mask();
        let words = into.words.len();
        for (index, (from, to)) in self.words.iter().zip(&mut into.words).enumerate() {
            // Most words are clean: a load keeps their cache lines shared.
            if from.load(Ordering::Relaxed) != 0 {
                let keep = if index + 1 == words { last } else { u64::MAX };
                *to |= from.swap(0, Ordering::Acquire) & keep;
            }
        }
    }
}

#[cfg(test)]
mod test {
    use super::*;
    use proptest::prelude::*;
    use std::collections::BTreeSet;

    fn pages_of(set: &PageBitmap) -> BTreeSet<u64> {
        (0..set.pages() + 70).filter(|page| set.contains(*page)).collect()
    }

    fn runs(set: &BTreeSet<u64>) -> Vec<Range<u64>> {
        let mut runs: Vec<Range<u64>> = Vec::new();
        for page in set {
            match runs.last_mut() {
                Some(run) if run.end == *page => run.end += 1,
                _ => runs.push(*page..page + 1),
            }
        }
        runs
    }

    fn filled(pages: u64, ranges: &[(u64, u64)]) -> (PageBitmap, BTreeSet<u64>) {
        let mut set = PageBitmap::new(pages);
        let mut oracle = BTreeSet::new();
        for (start, len) in ranges {
            set.set_range(*start, *len);
            oracle.extend((*start..start + len).filter(|page| *page < pages));
        }
        (set, oracle)
    }

    proptest! {
        #[test]
        fn a_bitmap_is_a_set_of_pages(
            pages in 0u64..300,
            mine in prop::collection::vec((0u64..320, 0u64..150), 0..6),
            theirs in prop::collection::vec((0u64..320, 0u64..150), 0..6),
            gone in (0u64..320, 0u64..150),
        ) {
            let (mut a, mut oracle_a) = filled(pages, &mine);
            let (b, oracle_b) = filled(pages, &theirs);
            prop_assert_eq!(pages_of(&a), oracle_a.clone());
            prop_assert_eq!(a.count(), oracle_a.len() as u64);
            prop_assert_eq!(a.iter_ranges().collect::<Vec<_>>(), runs(&oracle_a));
            let within = gone.0..gone.0 + gone.1;
            let inside: BTreeSet<u64> = oracle_a.iter().copied().filter(|page| within.contains(page)).collect();
            prop_assert_eq!(a.next_range_within(within.clone()), runs(&inside).first().cloned());
            let counted: u64 = a.segments().map(|(_, pages)| u64::from(pages)).sum();
            prop_assert_eq!(counted, a.count());
            let mut odd = a.clone();
            odd.retain_segments(|segment| segment % 2 == 1);
            let kept = oracle_a.iter().copied().filter(|page| page / WORD_PAGES % 2 == 1).collect();
            prop_assert_eq!(pages_of(&odd), kept);

            let mut merged = a.clone();
            merged.merge(&b);
            prop_assert_eq!(pages_of(&merged), oracle_a.union(&oracle_b).copied().collect());
            let mut left = a.clone();
            left.subtract(&b);
            prop_assert_eq!(pages_of(&left), oracle_a.difference(&oracle_b).copied().collect());
            let mut both = a.clone();
            both.intersect(&b);
            prop_assert_eq!(pages_of(&both), oracle_a.intersection(&oracle_b).copied().collect());

            a.clear_range(gone.0, gone.1);
            oracle_a.retain(|page| *page < gone.0 || *page >= gone.0 + gone.1);
            prop_assert_eq!(pages_of(&a), oracle_a.clone());
            let taken = a.take();
            prop_assert_eq!(pages_of(&taken), oracle_a);
            prop_assert!(a.is_empty() && a.pages() == pages);
        }

        #[test]
        fn what_a_larger_block_says_about_pages_beyond_the_end_is_ignored(
            pages in 1u64..200,
            other in 1u64..300,
        ) {
            let mut a = PageBitmap::new(pages);
            a.merge(&PageBitmap::full(other));
            prop_assert_eq!(a.count(), pages.min(other));
            let shared = SharedDirty::new(other);
            shared.mark(0, u64::MAX);
            let mut drained = PageBitmap::new(pages);
            shared.drain_into(&mut drained);
            prop_assert_eq!(drained.count(), pages.min(other));
        }
    }

    #[test]
    fn a_full_block_is_one_run() {
        for pages in [1, 63, 64, 65, 4096] {
            let all = PageBitmap::full(pages);
            assert_eq!(all.count(), pages);
            assert_eq!(all.iter_ranges().collect::<Vec<_>>(), vec![0..pages]);
        }
        assert_eq!(PageBitmap::full(0).iter_ranges().count(), 0);
    }

    #[test]
    fn marks_made_while_draining_are_never_lost() {
        let shared = SharedDirty::new(1000);
        let drained = std::thread::scope(|scope| {
            for lane in 0..2u64 {
                let shared = &shared;
                scope.spawn(move || {
                    for page in (0..1000).filter(|page| page % 2 == lane) {
                        shared.mark(page, 1);
                    }
                });
            }
            let mut all = PageBitmap::new(1000);
            while all.count() < 1000 {
                shared.drain_into(&mut all);
            }
            all
        });
        assert_eq!(drained, PageBitmap::full(1000));
        let mut rest = PageBitmap::new(1000);
        shared.drain_into(&mut rest);
        assert!(rest.is_empty());
    }
}
