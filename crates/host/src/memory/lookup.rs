//! The target's side of pages that do not come with their bytes: what they name is looked up, verified and written.
//!
//! ```text
//!   changes ─► version in the RAM file ─► XOR ─► check ─┬─ agrees ─► written
//!                                                       └─ does not ─────────────────────────► lacking
//!   reference ─► page read ─► hash ─┬─ agrees ─► written
//!                                   └─ does not: its frame may still be decoded ─► at the round's end, once more ─► lacking
//!   to a disk ─► block read ─► hash ─┬─ agrees ─► written
//!                                    └─ does not, or it is not on this host ──────────────────────────────────────► lacking
//! ```
//!
//! Invariants
//! * Nothing is written that was not verified: changes by the frame's check, references by their hash.
//! * A page that is lacking is told to the source after the round; until it has come nobody may call the memory complete.
//! * What waits for the round's end is bounded; beyond that pages are lacking at once.
//! * Only this VM's own memory and the images under its disks are looked at: see `reference`.
//!
//! Not here: frames and threads (`target`), the source's side (`known`).

use std::sync::Arc;

use parking_lot::Mutex;
use whimbrel_engine::memory::reference::coarsen;
use whimbrel_wire::peer::memory::{Encoding, MISSING_RUNS_MAX, Misses, Missing, Pages, Reference};

use crate::error::{Error, ErrorKind, Result};
use crate::memory::bitmap::{PAGE_BYTES, PageBitmap};
use crate::memory::delta::xor_into;
use crate::memory::disks::Images;
use crate::memory::ram::RamFile;
use crate::memory::reference::hash;

/// References that may wait for the end of their round: 32 bytes each.
const WAITING_MAX: usize = 16_384;

/// A reference to a page that was not there.
#[derive(Clone, Copy, Debug)]
struct Waiting {
    block: u16,
    page: u64,
    reference: Reference,
}

#[derive(Default)]
struct Open {
    waiting: Vec<Waiting>,
    /// One set for each block, once there is one.
    lacking: Vec<PageBitmap>,
    misses: Misses,
}

/// Shared by the decoders of a move. See the module.
pub struct Lookup {
    blocks: Arc<[RamFile]>,
    images: Images,
    open: Mutex<Open>,
}

fn corrupt(what: &str) -> Error {
    Error::new(ErrorKind::Corrupt, format!("read page stream: {what}"))
}

impl Lookup {
    /// Nothing is lacking yet.
    pub fn new(blocks: Arc<[RamFile]>, images: Images) -> Self {
        Self { blocks, images, open: Mutex::default() }
    }

    /// Makes pages of `raw`, those at the places `differences`, out of their differences and the versions that are here.
    /// `scratch` holds a page.
    pub fn add_versions(
        &self,
        frame: &Pages<'_>,
        differences: &[usize],
        raw: &mut [u8],
        scratch: &mut [u8],
    ) -> Result<()> {
        let Some(ram) = self.blocks.get(usize::from(frame.block)) else { return Ok(()) };
        let mut wanted = differences.iter().copied().peekable();
        for (index, number) in frame.page_numbers().enumerate() {
            if wanted.next_if_eq(&index).is_none() {
                continue;
            }
            ram.read(number, scratch)?;
            if let Some(page) = raw.get_mut(index * PAGE_BYTES..(index + 1) * PAGE_BYTES) {
                xor_into(page, scratch);
            }
        }
        Ok(())
    }

    /// None of a frame's pages are what they should be: the versions here were others.
    pub fn lacks_changes(&self, frame: &Pages<'_>) {
        let mut open = self.open.lock();
        open.misses.delta += frame.pages();
        for run in frame.runs() {
            self.lack(&mut open, frame.block, u64::from(run.first_page), u64::from(run.pages));
        }
    }

    /// Writes the pages of a references frame, as far as they are found. `scratch` holds a page.
    pub fn resolve(&self, frame: &Pages<'_>, scratch: &mut [u8]) -> Result<()> {
        frame.verify(frame.payload)?;
        for (page, reference) in frame.page_numbers().zip(frame.references()) {
            let reference = reference.ok_or_else(|| corrupt("a reference has reserved bits"))?;
            let waiting = Waiting { block: frame.block, page, reference };
            let found = match frame.encoding {
                Encoding::SamePages => self.copy(&waiting, scratch)?,
                _ => self.copy_block(&waiting, scratch)?,
            };
            if !found {
                self.put_off(waiting, frame.encoding);
            }
        }
        Ok(())
    }

    /// Ends a round whose frames are all decoded: looks once more for what was not there, and tells what is lacking.
    pub fn end_round(&self) -> Result<(Vec<Missing>, Misses)> {
        let mut open = std::mem::take(&mut *self.open.lock());
        let mut scratch = vec![0; PAGE_BYTES];
        for waiting in std::mem::take(&mut open.waiting) {
            if !self.copy(&waiting, &mut scratch)? {
                open.misses.same += 1;
                self.lack(&mut open, waiting.block, waiting.page, 1);
            }
        }
        let most = MISSING_RUNS_MAX / self.blocks.len().clamp(1, MISSING_RUNS_MAX);
        let mut missing = Vec::new();
        for (block, set) in (0_u16..).zip(&open.lacking) {
            let mut runs: Vec<_> = set.iter_ranges().collect();
            coarsen(&mut runs, most);
            let number = |page: u64| u32::try_from(page).unwrap_or(u32::MAX);
            missing.extend(
                runs.into_iter().map(|run| Missing(block, number(run.start), number(run.end - run.start))),
            );
        }
        Ok((missing, open.misses))
    }

    /// Copies the page that is named, if it is the right one.
    fn copy(&self, waiting: &Waiting, scratch: &mut [u8]) -> Result<bool> {
        let Reference { object, index, hash: wanted } = waiting.reference;
        let from = self.blocks.get(usize::from(object)).filter(|ram| u64::from(index) < ram.pages());
        let from = from.ok_or_else(|| corrupt("a reference names a page that does not exist"))?;
        from.read(u64::from(index), scratch)?;
        let found = hash(scratch) == wanted;
        let itself = object == waiting.block && u64::from(index) == waiting.page;
        if found
            && !itself
            && let Some(ram) = self.blocks.get(usize::from(waiting.block))
        {
            ram.write(waiting.page, scratch)?;
        }
        Ok(found)
    }

    /// Copies the block that is named, if it is on this host and the right one.
    fn copy_block(&self, waiting: &Waiting, scratch: &mut [u8]) -> Result<bool> {
        let Reference { object, index, hash: wanted } = waiting.reference;
        let found = self.images.read(object, index, scratch) && hash(scratch) == wanted;
        if found && let Some(ram) = self.blocks.get(usize::from(waiting.block)) {
            ram.write(waiting.page, scratch)?;
        }
        Ok(found)
    }

    fn put_off(&self, waiting: Waiting, encoding: Encoding) {
        let mut open = self.open.lock();
        if encoding == Encoding::SamePages && open.waiting.len() < WAITING_MAX {
            open.waiting.push(waiting);
            return;
        }
        match encoding {
            Encoding::SamePages => open.misses.same += 1,
            _ => open.misses.disk += 1,
        }
        self.lack(&mut open, waiting.block, waiting.page, 1);
    }

    fn lack(&self, open: &mut Open, block: u16, first: u64, pages: u64) {
        if open.lacking.is_empty() {
            open.lacking = self.blocks.iter().map(|ram| PageBitmap::new(ram.pages())).collect();
        }
        if let Some(set) = open.lacking.get_mut(usize::from(block)) {
            set.set_range(first, pages);
        }
    }
}
