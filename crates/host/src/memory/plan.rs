//! The plan of a round: which pages come next.
//!
//! ```text
//!   one set of pages per block, classes ──► units: up to 4 MiB of one class ──► LinkPlan: the coldest first
//!                                                                                    │
//!           Worker ◄── piece: a group of ≤ 64 pages, or holes ◄── the current unit ◄─┘
//!                      what was rewritten meanwhile ──► skip
//! ```
//!
//! What changes seldom goes first: by the time the hot pages' turn comes, those that were written again are known and are
//! left out. In the first round nothing is known of any page, so it goes by address.
//!
//! Invariants
//! * Every page of the sets is handed out exactly once, or was left out by [`Plan::skip`] before its turn.
//! * A piece is of one block, its runs ascend; a group has at most [`GROUP_PAGES`] pages.
//!
//! Not here: classes and order (`engine::memory::rank`, `engine::memory::link_plan`), reading pages (`encoder`).

use std::ops::Range;
use std::sync::Arc;

use whimbrel_engine::memory::link_plan::{LinkPlan, Unit};
use whimbrel_engine::memory::rank::{Classes, SEGMENT_PAGES};
use whimbrel_wire::peer::memory::Run;

use crate::error::Result;
use crate::memory::bitmap::{PAGE_BYTES, PageBitmap};
use crate::memory::ram::RamFile;

/// Pages that are read, and compressed, together.
pub const GROUP_PAGES: usize = 64;
/// A unit spans at most so many pages: 4 MiB, some 30 ms of a 1 Gbit/s link.
const UNIT_PAGES: u64 = 1024;

/// Pages of one class, close together.
#[derive(Clone, Debug, Default)]
struct Span {
    block: usize,
    pages: Range<u64>,
}

/// What a round still has to send.
pub struct Plan {
    blocks: Arc<[RamFile]>,
    /// What was not handed out yet.
    left: Vec<PageBitmap>,
    spans: Vec<Span>,
    order: LinkPlan,
    /// The rest of the current unit that was not looked at yet.
    current: Span,
    /// Pages in front of that, not handed out yet: holes, then data.
    holes: Range<u64>,
    data: Range<u64>,
    look_for_holes: bool,
    extents: Extents,
}

/// The extent with data of one block that was found last; pages left out make many pieces of one, and each look for its end
/// would go over all of it.
#[derive(Default)]
struct Extents {
    block: usize,
    /// Between this page and the extent there are holes only.
    from: u64,
    found: Range<u64>,
}

/// A piece of a round; its runs are of one block, ascending.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Piece {
    /// At most [`GROUP_PAGES`] pages to read of the block with this index.
    Group(u16),
    /// Pages that are holes in the block with this index.
    Holes(u16),
}

impl Plan {
    /// The plan to send `pages`, one set for each block, in the order of their `classes` (none: all are equal). Holes are
    /// worth looking for in a round of whole blocks; what a guest has written is none.
    pub fn new(
        blocks: Arc<[RamFile]>,
        pages: &[PageBitmap],
        classes: &[Classes],
        look_for_holes: bool,
    ) -> Self {
        let (spans, units) = units(pages, classes);
        // One link carries all. Its rate says nothing.
        let order = LinkPlan::new(units, &[1]);
        Self {
            blocks,
            left: pages.to_vec(),
            spans,
            order,
            current: Span::default(),
            holes: 0..0,
            data: 0..0,
            look_for_holes,
            extents: Extents::default(),
        }
    }

    /// The next piece, its pages in `runs`.
    pub fn next(&mut self, runs: &mut Vec<Run>) -> Result<Option<Piece>> {
        runs.clear();
        let mut room = GROUP_PAGES as u64;
        let mut block = self.current.block;
        while room > 0 {
            if self.holes.is_empty() && self.data.is_empty() && !self.look()? {
                let Some(next) = self.order.next(0).and_then(|unit| self.spans.get(unit)) else { break };
                self.current = next.clone();
                let ended = runs.last().map_or(0, |last| u64::from(last.first_page) + u64::from(last.pages));
                if !runs.is_empty() && (next.block != block || next.pages.start < ended) {
                    break;
                }
                block = next.block;
                continue;
            }
            if !self.holes.is_empty() {
                if !runs.is_empty() {
                    break;
                }
                let holes = std::mem::replace(&mut self.holes, 0..0);
                runs.push(self.hand_out(holes));
                return Ok(Some(Piece::Holes(index(block))));
            }
            let end = self.data.end.min(self.data.start + room);
            let taken = self.data.start..end;
            room -= end - taken.start;
            self.data.start = end;
            runs.push(self.hand_out(taken));
        }
        Ok((!runs.is_empty()).then_some(Piece::Group(index(block))))
    }

    /// Leaves out these pages, one set for each block, as far as they were not handed out; how many that are.
    pub fn skip(&mut self, pages: &[PageBitmap]) -> u64 {
        let left = |plan: &Self| plan.left.iter().map(PageBitmap::count).sum::<u64>();
        let pending = [&self.holes, &self.data].into_iter().find(|pending| !pending.is_empty());
        if let Some(pending) = pending {
            self.current.pages.start = pending.start;
            (self.holes, self.data) = (0..0, 0..0);
        }
        let before = left(self);
        for (left, skipped) in self.left.iter_mut().zip(pages) {
            left.subtract(skipped);
        }
        before - left(self)
    }

    /// Pages of the current block, which are not left any more.
    fn hand_out(&mut self, pages: Range<u64>) -> Run {
        let count = pages.end - pages.start;
        if let Some(left) = self.left.get_mut(self.current.block) {
            left.clear_range(pages.start, count);
        }
        // A block has fewer than 2^32 pages: `RamFile` refuses others.
        let first_page = u32::try_from(pages.start).unwrap_or(u32::MAX);
        Run { first_page, pages: u32::try_from(count).unwrap_or(0) }
    }

    /// Finds the next holes and data of the current unit; false at its end.
    fn look(&mut self) -> Result<bool> {
        let Span { block, pages } = &self.current;
        let (Some(left), Some(ram)) = (self.left.get(*block), self.blocks.get(*block)) else {
            return Ok(false);
        };
        let Some(dirty) = left.next_range_within(pages.clone()) else { return Ok(false) };
        if self.look_for_holes {
            let extent = self.extents.at_or_after(*block, ram, dirty.start)?;
            let start = extent.start.clamp(dirty.start, dirty.end);
            self.holes = dirty.start..start;
            self.data = start..dirty.end.min(extent.end).max(start);
        } else {
            self.data = dirty;
        }
        self.current.pages.start = self.data.end;
        Ok(true)
    }
}

impl Extents {
    /// The first extent with data that does not end before `page`; behind the last one there is an empty one at the end.
    fn at_or_after(&mut self, block: usize, ram: &RamFile, page: u64) -> Result<Range<u64>> {
        if block != self.block || page < self.from || page >= self.found.end {
            let found = ram.next_data(page, ram.pages())?.unwrap_or(ram.pages()..u64::MAX);
            *self = Self { block, from: page, found };
        }
        Ok(self.found.clone())
    }
}

/// Cuts the sets into units.
fn units(pages: &[PageBitmap], classes: &[Classes]) -> (Vec<Span>, Vec<Unit>) {
    let all_equal = Classes::default();
    let mut spans: Vec<Span> = Vec::new();
    let mut units: Vec<Unit> = Vec::new();
    for (block, set) in pages.iter().enumerate() {
        let classes = classes.get(block).unwrap_or(&all_equal);
        for (segment, count) in set.segments() {
            let class = classes.of(segment);
            let start = segment as u64 * SEGMENT_PAGES;
            let (end, bytes) = (start + SEGMENT_PAGES, u64::from(count) * PAGE_BYTES as u64);
            match (spans.last_mut(), units.last_mut()) {
                (Some(span), Some(unit))
                    if span.block == block && unit.class == class && end - span.pages.start <= UNIT_PAGES =>
                {
                    span.pages.end = end;
                    unit.bytes += bytes;
                }
                _ => {
                    spans.push(Span { block, pages: start..end });
                    units.push(Unit { class, bytes });
                }
            }
        }
    }
    (spans, units)
}

fn index(block: usize) -> u16 {
    u16::try_from(block).unwrap_or(u16::MAX)
}

#[cfg(test)]
mod test {
    use super::*;
    use proptest::prelude::*;
    use std::collections::BTreeSet;
    use whimbrel_engine::memory::rank::Ranking;

    fn ram(pages: u64, data: &[Range<u64>]) -> RamFile {
        let file = tempfile::tempfile().unwrap();
        file.set_len(pages * PAGE_BYTES as u64).unwrap();
        let ram = RamFile::new("mem", file).unwrap();
        for range in data {
            let range = range.start.min(pages)..range.end.min(pages);
            for page in range {
                ram.write(page, &[1; PAGE_BYTES]).unwrap();
            }
        }
        ram
    }

    /// A ranking in which each of these segments was written so many times.
    fn classes(pages: u64, written: &[(usize, u32)]) -> Classes {
        let mut ranking = Ranking::new(pages);
        ranking.observe(0.1, written.iter().copied());
        ranking.classes()
    }

    fn segment_of(page: u64) -> usize {
        (page / SEGMENT_PAGES) as usize
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(200))]
        #[test]
        fn every_page_is_handed_out_once_or_left_out_and_the_coldest_first(
            blocks in prop::collection::vec(
                (
                    1u64..3000,
                    prop::collection::vec((0u64..3000, 1u64..400), 0..8),
                    prop::collection::vec((0usize..47, 1u32..64), 0..20),
                    prop::collection::vec((0u64..3000, 1u64..200), 0..3),
                ),
                1..3,
            ),
            skips in prop::collection::vec((0usize..40, 0usize..2, 0u64..3000, 1u64..300), 0..6),
            look_for_holes: bool,
        ) {
            let data = |ranges: &[(u64, u64)]| -> Vec<Range<u64>> {
                ranges.iter().map(|(start, len)| *start..start + len).collect()
            };
            let files: Vec<RamFile> = blocks.iter().map(|(pages, _, _, with)| ram(*pages, &data(with))).collect();
            let sets: Vec<PageBitmap> = blocks
                .iter()
                .map(|(pages, dirty, _, _)| {
                    let mut set = PageBitmap::new(*pages);
                    dirty.iter().for_each(|(start, len)| set.set_range(*start, *len));
                    set
                })
                .collect();
            let classes: Vec<Classes> =
                blocks.iter().map(|(pages, _, written, _)| classes(*pages, written)).collect();
            let mut left: Vec<BTreeSet<u64>> =
                sets.iter().map(|set| set.iter_ranges().flatten().collect()).collect();
            let mut plan = Plan::new(files.into(), &sets, &classes, look_for_holes);
            let mut runs = Vec::new();
            let (mut coldest, mut pieces) = (0, 0);
            loop {
                for (_, block, start, len) in skips.iter().filter(|skip| skip.0 == pieces) {
                    let mut skipped: Vec<PageBitmap> =
                        blocks.iter().map(|block| PageBitmap::new(block.0)).collect();
                    let Some(set) = skipped.get_mut(*block) else { continue };
                    set.set_range(*start, *len);
                    let gone = (*start..start + len).filter(|page| left[*block].remove(page)).count();
                    prop_assert_eq!(plan.skip(&skipped), gone as u64);
                }
                let Some(piece) = plan.next(&mut runs).unwrap() else { break };
                pieces += 1;
                let (block, holes) = match piece {
                    Piece::Group(block) => (usize::from(block), false),
                    Piece::Holes(block) => (usize::from(block), true),
                };
                let count: u64 = runs.iter().map(|run| u64::from(run.pages)).sum();
                prop_assert!(count > 0 && (holes || count <= GROUP_PAGES as u64));
                let mut end = 0;
                for run in &runs {
                    let first = u64::from(run.first_page);
                    prop_assert!(first >= end && run.pages > 0);
                    end = first + u64::from(run.pages);
                    for page in first..end {
                        prop_assert!(left[block].remove(&page), "page {page} of block {block}");
                        let class = classes[block].of(segment_of(page));
                        prop_assert!(class >= coldest, "{class} after {coldest}");
                        coldest = class;
                        let with_data = data(&blocks[block].3).iter().any(|with| with.contains(&page));
                        prop_assert!(!holes || (look_for_holes && !with_data));
                        prop_assert!(holes || !look_for_holes || with_data);
                    }
                }
            }
            prop_assert!(left.iter().all(BTreeSet::is_empty), "{left:?}");
        }
    }

    #[test]
    fn a_round_of_everything_is_in_whole_groups_by_address() {
        let files = vec![ram(4096, &[])];
        let mut plan = Plan::new(files.into(), &[PageBitmap::full(4096)], &[], false);
        let mut runs = Vec::new();
        for group in 0..64 {
            assert_eq!(plan.next(&mut runs).unwrap(), Some(Piece::Group(0)));
            assert_eq!(runs, [Run { first_page: group * 64, pages: 64 }]);
        }
        assert_eq!(plan.next(&mut runs).unwrap(), None);
    }
}
