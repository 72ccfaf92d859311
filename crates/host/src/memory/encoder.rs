//! From pieces of a round to frames: the worker that encodes one group of pages after another.
//!
//! ```text
//!  Plan ──group of ≤ 64 pages──► Worker: pread → zero scan → known? → words → zstd? → frame
//!    └────holes (never read)───► zero frames                  └──► references, or nothing
//! ```
//!
//! Invariants
//! * Every page of a piece is in exactly one frame, or in none if the target has it as it was read; what a page is, is told by
//!   the bytes that were read, and the frame's check, or the reference's hash, is over those same bytes.
//! * Runs within a frame ascend: a piece that lies before the last one begins a new frame.
//! * A group is at most `GROUP_PAGES` pages of one block, ascending, so that it stays in the processor's cache
//!   between its read and its encoding, and holds up an urgent frame for no more than about 2 ms at 1 Gbit/s.
//!
//! Not here: which pages, in which order (`plan`), threads and the socket (`source`), whether to compress (`engine::block::encode`),
//! what the target is known to have (`known`).

use std::ops::Range;
use std::sync::Arc;

use parking_lot::Mutex;
use whimbrel_engine::block::encode::Chooser;
use whimbrel_engine::memory::PageId;
use whimbrel_wire::peer::memory::{self as wire, Encoding, Reference, RoundCounts, Run};

use crate::codec::adaptive::{self, Adaptive, thread_cpu_s};
use crate::codec::{is_zero, words};
use crate::error::Result;
use crate::memory::bitmap::PAGE_BYTES;
use crate::memory::known::{Known, Told};
use crate::memory::plan::{GROUP_PAGES, Piece};
use crate::memory::ram::RamFile;
use crate::memory::techniques::{Saved, Shortened};

/// A zero frame is sent when it has so many runs.
const ZERO_RUNS: usize = 1024;
/// A frame of references is sent when it has so many.
const NAMED_PAGES: usize = 128;

fn range(run: &Run) -> Range<u64> {
    u64::from(run.first_page)..u64::from(run.first_page) + u64::from(run.pages)
}

/// What a worker did in a round.
#[derive(Clone, Copy, Debug, Default)]
pub struct Work {
    /// Pages by kind.
    pub counts: RoundCounts,
    /// What was sent shorter, or not at all.
    pub shortened: Shortened,
    /// Bytes that were compressed.
    pub packed_raw_bytes: u64,
    /// What they were compressed to.
    pub packed_wire_bytes: u64,
    /// Processor time, seconds.
    pub cpu_s: f64,
}

impl Work {
    /// Adds what another worker did.
    pub fn add(&mut self, other: &Self) {
        self.counts.add(&other.counts);
        self.shortened.add(&other.shortened);
        self.packed_raw_bytes += other.packed_raw_bytes;
        self.packed_wire_bytes += other.packed_wire_bytes;
        self.cpu_s += other.cpu_s;
    }

    /// Pages that are done.
    pub fn pages(&self) -> u64 {
        self.counts.pages() + self.shortened.unchanged_pages
    }
}

/// References that were not sent yet.
struct Named {
    encoding: Encoding,
    block: u16,
    runs: Vec<Run>,
    pages: usize,
    payload: Vec<u8>,
}

/// Encodes pieces of a round; one per thread, kept from round to round.
pub struct Worker {
    blocks: Arc<[RamFile]>,
    adaptive: Adaptive,
    known: Arc<Known>,
    round: u32,
    /// Pages that were read and are not zero, not sent yet, and where they belong.
    data: Vec<u8>,
    data_len: usize,
    data_runs: Vec<Run>,
    data_block: u16,
    /// Their numbers, and whether they are in `differences`, too.
    data_pages: Vec<(u32, bool)>,
    /// Pages XORed with the versions that the target has, at the places of the pages.
    differences: Vec<u8>,
    scratch: Vec<u8>,
    named: Named,
    /// The same without their frequent words.
    worded: Vec<u8>,
    packed: Vec<u8>,
    zero_runs: Vec<Run>,
    zero_block: u16,
    gather_cpu_s: f64,
    gathered_bytes: u64,
    work: Work,
}

impl Worker {
    /// A worker for these blocks.
    pub fn new(blocks: Arc<[RamFile]>, chooser: Arc<Mutex<Chooser>>, known: Arc<Known>) -> Result<Self> {
        let named = Named {
            encoding: Encoding::SamePages,
            block: 0,
            runs: Vec::new(),
            pages: 0,
            payload: Vec::new(),
        };
        Ok(Self {
            blocks,
            adaptive: Adaptive::new(chooser)?,
            known,
            round: 0,
            // Pages carried over from one group, then the next group.
            data: vec![0; 2 * GROUP_PAGES * PAGE_BYTES],
            data_len: 0,
            data_runs: Vec::new(),
            data_block: 0,
            data_pages: Vec::new(),
            differences: vec![0; 2 * GROUP_PAGES * PAGE_BYTES],
            scratch: vec![0; PAGE_BYTES],
            named,
            worded: vec![0; 2 * GROUP_PAGES * PAGE_BYTES],
            packed: vec![0; 2 * GROUP_PAGES * PAGE_BYTES],
            zero_runs: Vec::new(),
            zero_block: 0,
            gather_cpu_s: 0.0,
            gathered_bytes: 0,
            work: Work::default(),
        })
    }

    /// What was encoded in this round so far.
    pub fn work(&self) -> Work {
        self.work
    }

    /// Starts a round.
    pub fn begin(&mut self, round: u32) {
        self.round = round;
        self.work = Work::default();
        self.data_len = 0;
        self.data_runs.clear();
        self.data_pages.clear();
        self.zero_runs.clear();
        self.named.clear();
    }

    /// Encodes a piece; frames that are ready are appended to `out`.
    pub fn encode(&mut self, piece: Piece, runs: &[Run], out: &mut Vec<u8>) -> Result<()> {
        match piece {
            Piece::Holes(block) => runs.iter().for_each(|holes| self.add_zero(block, *holes, out)),
            Piece::Group(block) => {
                let ascends = match (self.data_runs.last(), runs.first()) {
                    (Some(last), Some(first)) => range(last).end <= range(first).start,
                    _ => true,
                };
                if block != self.data_block || !ascends {
                    self.flush_data(out)?;
                    self.data_block = block;
                }
                let start_s = thread_cpu_s();
                self.gather(block, runs, out)?;
                self.gather_cpu_s += thread_cpu_s() - start_s;
                if self.data_len >= GROUP_PAGES * PAGE_BYTES {
                    self.flush_data(out)?;
                }
            }
        }
        Ok(())
    }

    /// Ends a round: what was held back is appended to `out`.
    pub fn end(&mut self, out: &mut Vec<u8>) -> Result<Work> {
        self.flush_data(out)?;
        self.flush_zero(out);
        self.named.flush(self.round, out);
        Ok(self.work)
    }

    /// Reads the runs and keeps the pages that are not zero.
    fn gather(&mut self, block: u16, runs: &[Run], out: &mut Vec<u8>) -> Result<()> {
        let blocks = Arc::clone(&self.blocks);
        let Some(ram) = blocks.get(usize::from(block)) else { return Ok(()) };
        for run in runs {
            let bytes = run.pages as usize * PAGE_BYTES;
            let start = self.data_len;
            let Some(buffer) = self.data.get_mut(start..start + bytes) else { return Ok(()) };
            ram.read(u64::from(run.first_page), buffer)?;
            self.gathered_bytes += bytes as u64;
            self.keep_data(block, run, start, out)?;
        }
        Ok(())
    }

    /// Moves the pages of a run, just read to `start`, together over those that are not sent with their bytes.
    fn keep_data(&mut self, block: u16, run: &Run, start: usize, out: &mut Vec<u8>) -> Result<()> {
        let mut kept: Option<Run> = None;
        for (index, page) in range(run).enumerate() {
            let at = start + index * PAGE_BYTES;
            let first_page = u32::try_from(page).unwrap_or(u32::MAX);
            if self.data.get(at..at + PAGE_BYTES).is_none_or(is_zero) {
                self.data_runs.extend(kept.take());
                self.add_zero(block, Run { first_page, pages: 1 }, out);
                continue;
            }
            match self.tell(PageId { block, page: first_page }, at)? {
                Told::Bytes { difference } => self.data_pages.push((first_page, difference)),
                told => {
                    self.data_runs.extend(kept.take());
                    if let Told::Named(encoding, reference) = told {
                        self.add_named(encoding, PageId { block, page: first_page }, &reference, out);
                    }
                    continue;
                }
            }
            if at != self.data_len {
                self.data.copy_within(at..at + PAGE_BYTES, self.data_len);
            }
            self.data_len += PAGE_BYTES;
            match &mut kept {
                Some(kept) => kept.pages += 1,
                None => kept = Some(Run { first_page, pages: 1 }),
            }
        }
        self.data_runs.extend(kept);
        Ok(())
    }

    /// How to tell the page that was just read to `at`; its difference goes to where the page will stand.
    fn tell(&mut self, page: PageId, at: usize) -> Result<Told> {
        let Self { known, data, data_len, differences, scratch, work, .. } = self;
        let (now, difference) = (
            data.get(at..at + PAGE_BYTES).unwrap_or(&[]),
            differences.get_mut(*data_len..*data_len + PAGE_BYTES).unwrap_or(&mut []),
        );
        known.tell(page, now, difference, scratch, &mut work.shortened)
    }

    fn add_named(&mut self, encoding: Encoding, page: PageId, reference: &Reference, out: &mut Vec<u8>) {
        self.work.counts.referred_pages += 1;
        self.named.add(self.round, encoding, page, reference, out);
    }

    fn add_zero(&mut self, block: u16, zero: Run, out: &mut Vec<u8>) {
        let ascends = self.zero_runs.last().is_none_or(|last| range(last).end <= range(&zero).start);
        if block != self.zero_block || self.zero_runs.len() >= ZERO_RUNS || !ascends {
            self.flush_zero(out);
            self.zero_block = block;
        }
        self.known.zero(PageId { block, page: zero.first_page }, zero.pages);
        self.work.counts.zero_pages += u64::from(zero.pages);
        match self.zero_runs.last_mut() {
            Some(last) if range(last).end == range(&zero).start => last.pages += zero.pages,
            _ => self.zero_runs.push(zero),
        }
    }

    fn flush_zero(&mut self, out: &mut Vec<u8>) {
        if !self.zero_runs.is_empty() {
            wire::put_pages(out, self.round, self.zero_block, Encoding::Zero, &self.zero_runs, &[], &[]);
            self.zero_runs.clear();
        }
    }

    fn flush_data(&mut self, out: &mut Vec<u8>) -> Result<()> {
        let raw = self.data.get(..self.data_len).unwrap_or(&[]);
        if raw.is_empty() {
            return Ok(());
        }
        let start_s = thread_cpu_s();
        let room = self.worded.get_mut(..adaptive::room(raw.len())).unwrap_or(&mut []);
        let page = |index: usize| {
            let (page, difference) = self.data_pages.get(index).copied().unwrap_or_default();
            (PageId { block: self.data_block, page }, difference)
        };
        let difference = |index: usize| match page(index) {
            (_, true) => self.differences.get(index * PAGE_BYTES..(index + 1) * PAGE_BYTES),
            (_, false) => None,
        };
        let mut delta = Saved::default();
        let worded_len = words::pack_changes(raw, room, difference, |tried| {
            self.known.judge(page(tried.index).0, tried.paid);
            if tried.paid {
                delta.count(tried.plain_bytes, tried.changed_bytes);
            }
        });
        let (mut encoding, mut payload) = match worded_len.and_then(|len| self.worded.get(..len)) {
            Some(worded) if delta.pages > 0 => (Encoding::Changes, worded),
            Some(worded) => (Encoding::Words, worded),
            None => (Encoding::Raw, raw),
        };
        self.gather_cpu_s += thread_cpu_s() - start_s;
        let packed = self.adaptive.pack(raw.len(), payload, &mut self.packed)?;
        if let Some(bytes) = packed.length.and_then(|length| self.packed.get(..length)) {
            encoding = match encoding {
                Encoding::Words => Encoding::WordsZstd,
                Encoding::Changes => Encoding::ChangesZstd,
                _ => Encoding::Zstd,
            };
            payload = bytes;
        }
        match packed.by_level {
            true => self.work.cpu_s += packed.cpu_s,
            false => self.gather_cpu_s += packed.cpu_s,
        }
        let framing_s = thread_cpu_s();
        let (raw_bytes, wire_bytes) = (raw.len() as u64, payload.len() as u64);
        if encoding != Encoding::Raw {
            self.work.packed_raw_bytes += raw_bytes;
            self.work.packed_wire_bytes += wire_bytes;
        }
        wire::put_pages(out, self.round, self.data_block, encoding, &self.data_runs, raw, payload);
        if matches!(encoding, Encoding::Changes | Encoding::ChangesZstd) {
            self.work.shortened.delta.add(&delta);
        }
        for (index, now) in raw.chunks_exact(PAGE_BYTES).enumerate() {
            self.known.keep(page(index).0, now);
        }
        self.work.counts.data_pages += raw_bytes / PAGE_BYTES as u64;
        self.data_len = 0;
        self.data_runs.clear();
        self.data_pages.clear();
        self.gather_cpu_s += thread_cpu_s() - framing_s;
        self.adaptive.gathered(self.gathered_bytes, self.gather_cpu_s);
        self.work.cpu_s += self.gather_cpu_s;
        (self.gathered_bytes, self.gather_cpu_s) = (0, 0.0);
        Ok(())
    }
}

impl Named {
    fn clear(&mut self) {
        self.runs.clear();
        self.payload.clear();
        self.pages = 0;
    }

    fn add(
        &mut self,
        round: u32,
        encoding: Encoding,
        page: PageId,
        reference: &Reference,
        out: &mut Vec<u8>,
    ) {
        let behind = self.runs.last().is_none_or(|last| range(last).end <= u64::from(page.page));
        if self.pages >= NAMED_PAGES || !behind || (encoding, page.block) != (self.encoding, self.block) {
            self.flush(round, out);
            (self.encoding, self.block) = (encoding, page.block);
        }
        match self.runs.last_mut() {
            Some(last) if range(last).end == u64::from(page.page) => last.pages += 1,
            _ => self.runs.push(Run { first_page: page.page, pages: 1 }),
        }
        self.pages += 1;
        reference.put(&mut self.payload);
    }

    fn flush(&mut self, round: u32, out: &mut Vec<u8>) {
        if !self.runs.is_empty() {
            let Self { encoding, block, runs, payload, .. } = &*self;
            wire::put_pages(out, round, *block, *encoding, runs, payload, payload);
            self.clear();
        }
    }
}
