//! What a source knows of what the target has: how a page is best told.
//!
//! ```text
//!   page, not zero ─┬─ the target lacked it last time ─────────────────────────► with its bytes
//!                   ├─ its version is kept ─┬─ equal ─► not at all
//!                   │                       └─ differs ─► with its bytes, or as its changes (codec::words decides)
//!                   ├─ sent with the same key before ──────────────────────────► named by itself
//!                   ├─ equal to a page that was sent, not in the last round ───► named by that
//!                   ├─ equal to the image's block that filled it, likewise ────► named by that
//!                   └─ else ─► with its bytes
//! ```
//!
//! Invariants
//! * What the target says it lacks is sent with its bytes the next time, whatever else is known of it.
//! * No page is named by another in a last round: what is not found there costs a round trip while the guest stands still.
//!   Changes are sent there, and pages that did not change named: the target has the version before, unless something is
//!   broken.
//! * A page is named by another only if both were equal in the guest when it was read; the hash is that of the bytes that
//!   were read.
//!
//! Not here: zero pages, frames (`encoder`); the target's side (`lookup`).

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};

use parking_lot::Mutex;
use whimbrel_engine::memory::{PageId, reference as decide};
use whimbrel_wire::peer::memory::{Encoding, Missing, REFERENCE_BYTES, Reference};

use crate::codec::words;
use crate::error::Result;
use crate::memory::bitmap::{PAGE_BYTES, PageBitmap};
use crate::memory::delta::{Difference, Kept};
use crate::memory::disks::Disks;
use crate::memory::ram::RamFile;
use crate::memory::reference::{Sent, hash, key};
use crate::memory::techniques::{Shortened, Techniques};

/// Of a page that is named, about so many bytes travel: the reference, its part of a run.
const NAMED_BYTES: usize = REFERENCE_BYTES + 8;

/// How a page is told.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Told {
    /// Not at all: the target has it.
    Unchanged,
    /// By what it equals, in a frame of this encoding.
    Named(Encoding, Reference),
    /// With its bytes. The difference from the version that the target has was written if that is known.
    Bytes {
        /// It was written.
        difference: bool,
    },
}

/// Shared by all that encode for one move. See the module.
pub struct Known {
    blocks: Arc<[RamFile]>,
    kept: Option<Kept>,
    sent: Option<Sent>,
    disks: Option<Disks>,
    /// The target has too little of the images.
    no_disks: AtomicBool,
    round: AtomicU32,
    last: AtomicBool,
    /// Pages that go with their bytes.
    whole: Mutex<Vec<PageBitmap>>,
    any_whole: AtomicBool,
}

impl Known {
    /// Nothing was sent yet.
    pub fn new(blocks: Arc<[RamFile]>, techniques: &Techniques, disks: Disks) -> Self {
        let pages: Vec<u64> = blocks.iter().map(RamFile::pages).collect();
        Self {
            kept: (techniques.delta_bytes >= PAGE_BYTES as u64).then(|| Kept::new(techniques.delta_bytes)),
            sent: techniques.same.then(|| Sent::new(&pages)),
            disks: techniques.disk.then_some(disks),
            no_disks: AtomicBool::new(false),
            round: AtomicU32::new(0),
            last: AtomicBool::new(false),
            whole: Mutex::default(),
            any_whole: AtomicBool::new(false),
            blocks,
        }
    }

    /// A round begins; all of the one before is at the target.
    pub fn begin_round(&self, round: u32, last: bool) {
        self.round.store(round, Ordering::Release);
        self.last.store(last, Ordering::Release);
        if let Some(kept) = &self.kept {
            kept.begin_round(round);
        }
    }

    /// How to tell a page that was just read as `now` and is not zero. `scratch` and `difference` hold a page each.
    pub fn tell(
        &self,
        page: PageId,
        now: &[u8],
        difference: &mut [u8],
        scratch: &mut [u8],
        did: &mut Shortened,
    ) -> Result<Told> {
        if self.take_whole(page, 1) {
            self.unknown(page, 1);
            return Ok(Told::Bytes { difference: false });
        }
        let found =
            self.kept.as_ref().map_or(Difference::Unknown, |kept| kept.difference(page, now, difference));
        match found {
            Difference::None => {
                did.unchanged_pages += 1;
                return Ok(Told::Unchanged);
            }
            Difference::Some => {
                self.unknown(page, 1);
                return Ok(Told::Bytes { difference: true });
            }
            Difference::Unknown => {}
        }
        let named = match self.same(page, now, scratch, did)? {
            Some(reference) => Some((Encoding::SamePages, reference)),
            None => self.on_disk(page, now, scratch, did).map(|reference| (Encoding::DiskBlocks, reference)),
        };
        let Some((encoding, reference)) = named else { return Ok(Told::Bytes { difference: false }) };
        self.keep(page, now);
        Ok(Told::Named(encoding, reference))
    }

    /// A page goes out with its bytes, or as its changes, and is this at the target from then on.
    pub fn keep(&self, page: PageId, now: &[u8]) {
        // What is sent in the first round is sent for the first time: most of it will never be again.
        if let Some(kept) = &self.kept
            && self.round.load(Ordering::Acquire) > 1
        {
            kept.keep(page, now);
        }
    }

    /// Learns whether sending a page as its changes paid.
    pub fn judge(&self, page: PageId, paid: bool) {
        if let Some(kept) = &self.kept {
            kept.judge(page, paid);
        }
    }

    /// Pages go out as zero.
    pub fn zero(&self, first: PageId, pages: u32) {
        // Before the first round nothing is known that would have to be forgotten.
        if self.round.load(Ordering::Acquire) > 1 {
            self.take_whole(first, u64::from(pages));
            if let Some(kept) = &self.kept {
                kept.forget(first, pages);
            }
            self.unknown(first, pages);
        }
    }

    /// Of `named` pages that were named by blocks of images, the target did not find `missed`.
    pub fn learn_disks(&self, named: u64, missed: u64) {
        if !decide::disks_pay(named, missed) {
            self.no_disks.store(true, Ordering::Relaxed);
        }
    }

    /// The target lacks these pages, although they were told; the sets of them, one for each block.
    pub fn lacks(&self, missing: &[Missing]) -> Vec<PageBitmap> {
        let mut sets: Vec<PageBitmap> = self.blocks.iter().map(|ram| PageBitmap::new(ram.pages())).collect();
        for Missing(block, first, pages) in missing {
            let Some(set) = sets.get_mut(usize::from(*block)) else { continue };
            set.set_range(u64::from(*first), u64::from(*pages));
            let first = PageId { block: *block, page: *first };
            if let Some(kept) = &self.kept {
                kept.forget(first, *pages);
            }
            self.unknown(first, *pages);
        }
        if !missing.is_empty() {
            let mut whole = self.whole.lock();
            match whole.is_empty() {
                true => whole.clone_from(&sets),
                false => whole.iter_mut().zip(&sets).for_each(|(whole, set)| whole.merge(set)),
            }
            self.any_whole.store(true, Ordering::Release);
        }
        sets
    }

    fn unknown(&self, first: PageId, pages: u32) {
        if let Some(sent) = &self.sent {
            sent.forget(first, pages);
        }
    }

    /// Whether the first of the pages is to go with its bytes, which is what happens to all of them now.
    fn take_whole(&self, first: PageId, pages: u64) -> bool {
        if !self.any_whole.load(Ordering::Acquire) {
            return false;
        }
        let mut whole = self.whole.lock();
        let Some(set) = whole.get_mut(usize::from(first.block)) else { return false };
        let taken = set.contains(u64::from(first.page));
        set.clear_range(u64::from(first.page), pages);
        taken
    }

    /// A page that was sent and is equal, which may be the page itself; if there is none, this one will have been sent.
    fn same(
        &self,
        page: PageId,
        now: &[u8],
        scratch: &mut [u8],
        did: &mut Shortened,
    ) -> Result<Option<Reference>> {
        let Some(sent) = &self.sent else { return Ok(None) };
        let key = key(now);
        let unchanged = sent.tell(key, page);
        let other = match unchanged {
            true => Some(page),
            false if self.last.load(Ordering::Acquire) => None,
            false => sent.find(key).filter(|other| *other != page),
        };
        if let Some(other) = other {
            let plain_bytes = words::packed_bytes(now);
            if !decide::pays(plain_bytes) {
                return Ok(None);
            }
            if unchanged || self.is_equal(other, now, scratch)? {
                did.same.count(plain_bytes, NAMED_BYTES);
                return Ok(Some(Reference { object: other.block, index: other.page, hash: hash(now) }));
            }
        }
        sent.put(key, page);
        Ok(None)
    }

    /// The block of an image that the page was filled from, if it still is that block.
    fn on_disk(
        &self,
        page: PageId,
        now: &[u8],
        scratch: &mut [u8],
        did: &mut Shortened,
    ) -> Option<Reference> {
        let disks = self.disks.as_ref()?;
        if self.last.load(Ordering::Acquire) || self.no_disks.load(Ordering::Relaxed) {
            return None;
        }
        let mut plain_bytes = None;
        for (disk, block) in disks.sources(page) {
            let plain_bytes = *plain_bytes.get_or_insert_with(|| words::packed_bytes(now));
            if decide::pays(plain_bytes) && disks.images.read(disk, block, scratch) && scratch == now {
                did.disk.count(plain_bytes, NAMED_BYTES);
                return Some(Reference { object: disk, index: block, hash: hash(now) });
            }
        }
        None
    }

    /// Whether a page of the guest is `now`, as far as one can tell while it runs.
    fn is_equal(&self, page: PageId, now: &[u8], scratch: &mut [u8]) -> Result<bool> {
        let Some(ram) = self.blocks.get(usize::from(page.block)) else { return Ok(false) };
        ram.read(u64::from(page.page), scratch)?;
        Ok(scratch == now)
    }
}
