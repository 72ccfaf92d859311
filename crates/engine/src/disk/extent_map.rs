//! Which 4 KiB block of a layer is where in its log.
//!
//! ```text
//! chunk (1 GiB of disk) ─► region (2 MiB) ─┬ Absent            nothing here: ask what lies below
//!                                          ├ Zero              all of it
//!                                          ├ Runs  [start, blocks, place] sorted, 8 bytes each
//!                                          └ Dense [place; 512]           2 KiB, once runs are many
//! ```
//!
//! A look-up is two array steps and a search among at most [`RUNS_MAX`] runs, without allocation.
//! Memory per TiB of mapped disk: about 35 MiB if written in long runs, 1.02 GiB if every 4 KiB block came alone
//! (the worst case); 8 bytes per GiB of disk where nothing is mapped.
//!
//! Invariants: runs of a region are sorted, apart, never empty, and merged with a neighbour that goes on.
//!
//! Not here: locks, and what a place means (`host::disk`).

use whimbrel_wire::record::layer::{Run, RunKind};

const REGION_BLOCKS: u64 = 512;
const REGION_LEN: u16 = 512;
const CHUNK_REGIONS: usize = 512;
/// More runs than this turn a region into a dense array.
pub const RUNS_MAX: usize = 128;

/// No payload is ever at place 0: it is the head of the first segment.
const ABSENT: u32 = 0;
const ZERO: u32 = u32::MAX;

/// What is at a block.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Piece {
    /// Nothing: the layer below decides.
    Absent,
    /// Zeros.
    Zero,
    /// Payload, at this place of the log (4 KiB blocks); neither 0 nor `u32::MAX`.
    Data(u32),
}

impl Piece {
    fn value(self) -> u32 {
        match self {
            Self::Absent => ABSENT,
            Self::Zero => ZERO,
            Self::Data(place) => place,
        }
    }

    fn of(value: u32) -> Self {
        match value {
            ABSENT => Self::Absent,
            ZERO => Self::Zero,
            place => Self::Data(place),
        }
    }
}

/// The value `blocks` further on in a run.
fn advance(value: u32, blocks: u64) -> u32 {
    match value {
        ABSENT | ZERO => value,
        place => place.saturating_add(u32::try_from(blocks).unwrap_or(u32::MAX)),
    }
}

#[derive(Clone, Copy, Debug)]
struct RegionRun {
    start: u16,
    blocks: u16,
    value: u32,
}

impl RegionRun {
    fn end(self) -> u16 {
        self.start + self.blocks
    }
    fn goes_on_with(self, next: Self) -> bool {
        self.end() == next.start && advance(self.value, self.blocks.into()) == next.value
    }
}

#[derive(Debug, Default)]
enum Region {
    #[default]
    Absent,
    Zero,
    Runs(Vec<RegionRun>),
    Dense(Box<[u32; REGION_LEN as usize]>),
}

impl Region {
    /// The value at `at` and for how many blocks it goes on inside the region.
    fn lookup(&self, at: u16) -> (u32, u16) {
        match self {
            Self::Absent => (ABSENT, REGION_LEN - at),
            Self::Zero => (ZERO, REGION_LEN - at),
            Self::Runs(runs) => {
                let next = runs.partition_point(|run| run.end() <= at);
                match runs.get(next) {
                    Some(run) if run.start <= at => {
                        (advance(run.value, u64::from(at - run.start)), run.end() - at)
                    }
                    Some(run) => (ABSENT, run.start - at),
                    None => (ABSENT, REGION_LEN - at),
                }
            }
            Self::Dense(places) => {
                let mut rest = places.iter().skip(usize::from(at));
                let first = rest.next().copied().unwrap_or(ABSENT);
                let more = rest.zip(1u64..).take_while(|(value, n)| **value == advance(first, *n)).count();
                (first, u16::try_from(more + 1).unwrap_or(REGION_LEN))
            }
        }
    }

    fn set(&mut self, start: u16, blocks: u16, value: u32) {
        if blocks == REGION_LEN {
            *self = match value {
                ABSENT => Self::Absent,
                ZERO => Self::Zero,
                value => Self::Runs(vec![RegionRun { start: 0, blocks, value }]),
            };
            return;
        }
        match self {
            Self::Absent if value == ABSENT => {}
            Self::Zero if value == ZERO => {}
            Self::Absent => *self = Self::Runs(vec![RegionRun { start, blocks, value }]),
            Self::Zero => {
                let mut runs = vec![RegionRun { start: 0, blocks: REGION_LEN, value: ZERO }];
                set_run(&mut runs, RegionRun { start, blocks, value });
                *self = Self::Runs(runs);
            }
            Self::Runs(runs) => {
                set_run(runs, RegionRun { start, blocks, value });
                self.settle();
            }
            Self::Dense(places) => {
                for (place, n) in places.iter_mut().skip(usize::from(start)).take(blocks.into()).zip(0u64..) {
                    *place = advance(value, n);
                }
            }
        }
    }

    /// Picks the form that fits the runs after a change.
    fn settle(&mut self) {
        let Self::Runs(runs) = self else { return };
        match runs.as_slice() {
            [] => *self = Self::Absent,
            [run] if run.value == ZERO && run.blocks == REGION_LEN => *self = Self::Zero,
            many if many.len() > RUNS_MAX => {
                let mut places = Box::new([ABSENT; REGION_LEN as usize]);
                for run in many {
                    let slots = places.iter_mut().skip(usize::from(run.start)).take(run.blocks.into());
                    for (place, n) in slots.zip(0u64..) {
                        *place = advance(run.value, n);
                    }
                }
                *self = Self::Dense(places);
            }
            _ => {}
        }
    }

    fn heap_bytes(&self) -> usize {
        match self {
            Self::Absent | Self::Zero => 0,
            Self::Runs(runs) => runs.capacity() * size_of::<RegionRun>(),
            Self::Dense(places) => size_of_val(&**places),
        }
    }
}

/// Puts `new` over whatever it overlaps, splitting and merging; `ABSENT` only takes away.
fn set_run(runs: &mut Vec<RegionRun>, new: RegionRun) {
    let mut from = runs.partition_point(|run| run.end() <= new.start);
    let mut to = runs.partition_point(|run| run.start < new.end());
    let (mut left, mut right, mut middle) = (None, None, Some(new));
    if let Some(run) = runs.get(from).filter(|run| from < to && run.start < new.start) {
        left = Some(RegionRun { blocks: new.start - run.start, ..*run });
    }
    let last = to.checked_sub(1).and_then(|last| runs.get(last));
    if let Some(run) = last.filter(|run| from < to && run.end() > new.end()) {
        let skip = new.end() - run.start;
        let value = advance(run.value, skip.into());
        right = Some(RegionRun { start: new.end(), blocks: run.blocks - skip, value });
    }
    if new.value == ABSENT {
        middle = None;
    } else {
        // Neighbours that were not overlapped may go on into the new run, or it into them.
        if left.is_none() && from > 0 && runs.get(from - 1).is_some_and(|run| run.goes_on_with(new)) {
            from -= 1;
            left = runs.get(from).copied();
        }
        if right.is_none() && runs.get(to).is_some_and(|run| new.goes_on_with(*run)) {
            right = runs.get(to).copied();
            to += 1;
        }
    }
    let mut parts = [None; 3];
    let mut count = 0;
    for part in [left, middle, right].into_iter().flatten() {
        match parts.get_mut(count.max(1) - 1) {
            Some(Some(last)) if RegionRun::goes_on_with(*last, part) => last.blocks += part.blocks,
            _ => {
                if let Some(slot) = parts.get_mut(count) {
                    *slot = Some(part);
                    count += 1;
                }
            }
        }
    }
    runs.splice(from..to, parts.into_iter().flatten());
}

/// See the module's charter.
#[derive(Debug)]
pub struct ExtentMap {
    chunks: Vec<Option<Box<[Region; CHUNK_REGIONS]>>>,
    blocks: u64,
}

impl ExtentMap {
    /// The map of a disk of `blocks` 4 KiB blocks, everything absent.
    pub fn new(blocks: u64) -> Self {
        let chunks = std::iter::repeat_with(|| None).take(chunks_of(blocks)).collect();
        Self { chunks, blocks }
    }

    /// Makes the disk one of `blocks` blocks; what is behind its old end is absent. Smaller it does not become.
    pub fn grow(&mut self, blocks: u64) {
        if blocks > self.blocks {
            self.chunks.resize_with(chunks_of(blocks), || None);
            self.blocks = blocks;
        }
    }

    /// Blocks of the disk.
    pub fn blocks(&self) -> u64 {
        self.blocks
    }

    /// What is at `block`, and for how many blocks it goes on, at most `blocks_max` (and at least 1, also past the
    /// end of the disk, where everything is absent). A run of data goes on as long as its places do.
    pub fn lookup(&self, block: u64, blocks_max: u64) -> (Piece, u64) {
        let (first, length) = self.lookup_region(block);
        let mut total = length;
        while total < blocks_max && block + total < self.blocks {
            let (value, length) = self.lookup_region(block + total);
            if value != advance(first, total) {
                break;
            }
            total += length;
        }
        (Piece::of(first), total.min(blocks_max).max(1))
    }

    fn lookup_region(&self, block: u64) -> (u32, u64) {
        let (chunk, region, at) = split(block);
        match self.chunks.get(chunk) {
            Some(Some(regions)) => match regions.get(region) {
                Some(region) => {
                    let (value, length) = region.lookup(at);
                    (value, length.into())
                }
                None => (ABSENT, 1),
            },
            _ => (
                ABSENT,
                REGION_BLOCKS * CHUNK_REGIONS as u64 - block % (REGION_BLOCKS * CHUNK_REGIONS as u64),
            ),
        }
    }

    /// Sets what is at `blocks` blocks from `start` on; data goes on from place to place. What lies outside the disk
    /// is left out.
    pub fn set(&mut self, start: u64, blocks: u64, piece: Piece) {
        let end = start.saturating_add(blocks).min(self.blocks);
        let value = piece.value();
        let mut at = start;
        while at < end {
            let (chunk, region, in_region) = split(at);
            let length = (REGION_BLOCKS - u64::from(in_region)).min(end - at);
            if let Some(slot) = self.chunks.get_mut(chunk) {
                let regions = slot.get_or_insert_with(|| Box::new(std::array::from_fn(|_| Region::Absent)));
                if let Some(region) = regions.get_mut(region) {
                    region.set(in_region, length as u16, advance(value, at - start));
                }
            }
            at += length;
        }
    }

    /// Adds the runs from block `from` on to `into`, until it has `runs_max`; gives the block to go on from, or `None`
    /// at the end.
    pub fn runs(&self, from: u64, runs_max: usize, into: &mut Vec<Run>) -> Option<u64> {
        let mut at = from;
        while at < self.blocks {
            if into.len() >= runs_max {
                return Some(at);
            }
            let (piece, blocks) = self.lookup(at, (self.blocks - at).min(u32::MAX.into()));
            let kind = match piece {
                Piece::Absent => None,
                Piece::Zero => Some(RunKind::Zero),
                Piece::Data(place) => Some(RunKind::Data(place)),
            };
            if let Some(kind) = kind {
                into.push(Run { start: at, blocks: u32::try_from(blocks).unwrap_or(u32::MAX), kind });
            }
            at += blocks;
        }
        None
    }

    /// Memory the map holds, bytes.
    pub fn heap_bytes(&self) -> usize {
        let chunks = self.chunks.iter().flatten();
        let regions =
            chunks.map(|chunk| size_of_val(&**chunk) + chunk.iter().map(Region::heap_bytes).sum::<usize>());
        self.chunks.capacity() * size_of::<Option<Box<[Region; CHUNK_REGIONS]>>>() + regions.sum::<usize>()
    }
}

fn chunks_of(blocks: u64) -> usize {
    usize::try_from(blocks.div_ceil(REGION_BLOCKS * CHUNK_REGIONS as u64)).unwrap_or(0)
}

/// Chunk, region in it, block in that.
fn split(block: u64) -> (usize, usize, u16) {
    let region = block / REGION_BLOCKS;
    let chunk = region / CHUNK_REGIONS as u64;
    let in_chunk = region % CHUNK_REGIONS as u64;
    (usize::try_from(chunk).unwrap_or(usize::MAX), in_chunk as usize, (block % REGION_BLOCKS) as u16)
}

#[cfg(test)]
mod test {
    use super::*;
    use proptest::prelude::*;

    const BLOCKS: u64 = 1800;

    #[derive(Clone, Debug)]
    struct Step {
        start: u64,
        blocks: u64,
        piece: Piece,
    }

    fn step() -> impl Strategy<Value = Step> {
        let piece = prop_oneof![
            6 => (1..100_000u32).prop_map(Piece::Data),
            1 => Just(Piece::Zero),
            1 => Just(Piece::Absent)
        ];
        // Mostly short, so that regions become dense; sometimes whole regions.
        let blocks = prop_oneof![8 => 1..4u64, 2 => 1..200u64, 1 => 400..1300u64];
        (0..BLOCKS + 5, blocks, piece).prop_map(|(start, blocks, piece)| Step { start, blocks, piece })
    }

    fn at(oracle: &[Piece], block: u64) -> Piece {
        oracle.get(block as usize).copied().unwrap_or(Piece::Absent)
    }

    fn plus(piece: Piece, blocks: u64) -> Piece {
        match piece {
            Piece::Data(place) => Piece::Data(place + blocks as u32),
            other => other,
        }
    }

    proptest! {
        /// It becomes larger between the parts, sometimes not by much, sometimes by more than a chunk.
        #[test]
        fn the_map_says_what_an_array_says(
            parts in proptest::collection::vec(
                (
                    prop_oneof![Just(0), 1..700u64, 261_000..263_000u64],
                    proptest::collection::vec(step(), 1..300),
                ),
                1..4,
            )
        ) {
            let mut map = ExtentMap::new(1);
            let mut oracle = vec![Piece::Absent; 1];
            for (n, (more, steps)) in parts.iter().enumerate() {
                let blocks = if n == 0 { BLOCKS } else { map.blocks() + more };
                map.grow(blocks - 1);
                map.grow(blocks);
                map.grow(more % blocks);
                oracle.resize(blocks as usize, Piece::Absent);
                prop_assert_eq!(map.blocks(), blocks);
                for step in steps {
                    // Near either end of what the disk is by now.
                    let start = if step.start % 2 == 0 { step.start } else { blocks + 5 - step.start };
                    map.set(start, step.blocks, step.piece);
                    for n in 0..step.blocks {
                        if let Some(slot) = oracle.get_mut((start + n) as usize) {
                            *slot = plus(step.piece, n);
                        }
                    }
                }
            }
            let blocks = map.blocks();
            let ends = || (0..blocks.min(BLOCKS + 100)).chain(blocks.saturating_sub(3 * BLOCKS)..blocks);
            for block in ends() {
                let (piece, length) = map.lookup(block, 64);
                prop_assert_eq!(piece, at(&oracle, block));
                prop_assert!((1..=64).contains(&length));
                for n in 0..length.min(blocks - block) {
                    prop_assert_eq!(plus(piece, n), at(&oracle, block + n));
                }
                // It is the longest run.
                if length < 64 && block + length < blocks {
                    prop_assert_ne!(plus(piece, length), at(&oracle, block + length));
                }
            }
            let mut back = ExtentMap::new(blocks);
            let (mut from, mut runs) = (0, Vec::new());
            loop {
                let mut some = Vec::new();
                let next = map.runs(from, 7, &mut some);
                runs.append(&mut some);
                match next { Some(next) => from = next, None => break }
            }
            for run in runs {
                let piece = match run.kind { RunKind::Zero => Piece::Zero, RunKind::Data(p) => Piece::Data(p) };
                back.set(run.start, run.blocks.into(), piece);
            }
            for block in ends() {
                prop_assert_eq!(back.lookup(block, 1).0, at(&oracle, block));
            }
        }
    }

    #[test]
    fn memory_per_tebibyte_is_what_the_charter_says() {
        let blocks = (1u64 << 40) / 4096;
        let empty = ExtentMap::new(blocks).heap_bytes();
        assert!(empty <= 8 * 1024, "{empty}");
        // A 64th of a TiB, every block alone.
        let mut alone = ExtentMap::new(blocks);
        for block in 0..blocks / 64 {
            alone.set(block, 1, Piece::Data((block as u32).wrapping_mul(7919) % 1_000_000 + 1));
        }
        let per_tib = alone.heap_bytes() * 64;
        assert!(per_tib < (1 << 30) + (32 << 20), "{per_tib}");
        let mut long = ExtentMap::new(blocks);
        for mib in 0..blocks / 64 / 256 {
            long.set(mib * 256, 256, Piece::Data((mib * 257 + 1) as u32));
        }
        let per_tib = long.heap_bytes() * 64;
        assert!(per_tib < 40 << 20, "{per_tib}");
    }
}
