//! Which pages of guest memory this back-end wrote: told to QEMU by vhost's dirty log, to a migration by a tracker.
//!
//! Invariant: a page is marked after it was written. Whoever clears the mark and then reads the page sees either
//! what was written, or the mark again.
//!
//! Not here: pages that the guest itself writes (`guest`).
#![expect(unsafe_code, reason = "the dirty log is memory shared with the front-end")]

use std::fs::File;
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};

use super::guest_ram::{GuestRam, Mapping};
use crate::error::Result;
use crate::memory::bitmap::SharedDirty;

/// Bytes that one bit of vhost's dirty log stands for.
const LOG_PAGE: u64 = 4096;

/// Where to mark what is written into one file of guest RAM.
#[derive(Clone)]
pub struct WriteTracker {
    /// Device number of the RAM file (`st_dev`).
    pub device: u64,
    /// Inode number of the RAM file (`st_ino`).
    pub inode: u64,
    /// One bit per 4 KiB page, numbered from the start of the file.
    pub dirty: Arc<SharedDirty>,
}

/// vhost's dirty log: one bit per page of guest physical memory, shared with the front-end.
pub(super) struct Log {
    map: Mapping,
}

impl Log {
    pub(super) fn new(file: &File, offset: u64, length: u64) -> Result<Self> {
        Ok(Self { map: Mapping::new(file, offset, length)? })
    }

    fn mark(&self, gpa: u64, len: u64) {
        let first = gpa / LOG_PAGE;
        let last = gpa.saturating_add(len - 1) / LOG_PAGE;
        for page in first..=last {
            let Some(byte) = usize::try_from(page / 8).ok().filter(|byte| *byte < self.map.len()) else {
                return;
            };
            // SAFETY: `byte` lies inside the mapping, and an `AtomicU8` has no alignment to keep.
            let bits = unsafe { AtomicU8::from_ptr(self.map.as_ptr().add(byte)) };
            bits.fetch_or(1 << (page % 8), Ordering::SeqCst);
        }
    }
}

/// Everybody who wants to know which pages were written.
#[derive(Clone, Default)]
pub(super) struct Dirty {
    pub(super) log: Option<Arc<Log>>,
    pub(super) tracker: Option<WriteTracker>,
}

impl Dirty {
    /// Whether anybody wants to know.
    pub(super) fn wanted(&self) -> bool {
        self.log.is_some() || self.tracker.is_some()
    }

    /// Marks `len` bytes of guest memory that were written.
    pub(super) fn mark(&self, ram: &GuestRam, gpa: u64, len: u64) {
        if let Some(log) = &self.log {
            self.mark_log_page(log, gpa, len);
        }
        self.mark_tracked(ram, gpa, len);
    }

    /// Marks a write into a used ring: the log has its own address for it, and is told only if asked to be.
    pub(super) fn mark_used(&self, ram: &GuestRam, gpa: u64, log_at: Option<u64>, len: u64) {
        if let (Some(log), Some(log_at)) = (&self.log, log_at) {
            self.mark_log_page(log, log_at, len);
        }
        self.mark_tracked(ram, gpa, len);
    }

    fn mark_log_page(&self, log: &Log, gpa: u64, len: u64) {
        if len > 0 {
            log.mark(gpa, len);
        }
    }

    fn mark_tracked(&self, ram: &GuestRam, gpa: u64, len: u64) {
        let Some(tracker) = &self.tracker else { return };
        let Some(region) = ram.region(gpa) else { return };
        if len == 0 || region.file != (tracker.device, tracker.inode) {
            return;
        }
        let page = crate::memory::bitmap::PAGE_BYTES as u64;
        let start = region.addr.file_offset + (gpa - region.addr.gpa);
        let last = start.saturating_add(len - 1);
        tracker.dirty.mark(start / page, last / page - start / page + 1);
    }
}

#[cfg(test)]
mod test {
    use std::os::unix::fs::{FileExt, MetadataExt};

    use super::super::guest_ram::RegionAddr;
    use super::*;
    use crate::memory::bitmap::PageBitmap;

    #[test]
    fn the_log_has_one_bit_per_guest_page_and_ignores_what_it_has_no_room_for() {
        let file = tempfile::tempfile().unwrap();
        file.set_len(4096).unwrap();
        let log = Log::new(&file, 8, 16).unwrap();
        log.mark(0x1fff, 2); // pages 1 and 2
        log.mark(127 * 4096, 4096); // the last bit
        log.mark(128 * 4096, 4096); // beyond
        let mut bytes = [0; 32];
        file.read_exact_at(&mut bytes, 0).unwrap();
        let mut expected = [0; 32];
        expected[8] = 0b110;
        expected[8 + 15] = 0x80;
        assert_eq!(bytes, expected);
    }

    #[test]
    fn a_tracker_counts_pages_from_the_start_of_its_own_file() {
        let file = tempfile::tempfile().unwrap();
        file.set_len(0x10000).unwrap();
        let meta = file.metadata().unwrap();
        let at = RegionAddr { gpa: 0x10_0000, size: 0x8000, user: 0, file_offset: 0x4000 };
        let ram = GuestRam::default().with(at, &file).unwrap();
        let dirty = Arc::new(SharedDirty::new(16));
        let tracker = WriteTracker { device: meta.dev(), inode: meta.ino(), dirty: dirty.clone() };
        let ours = Dirty { log: None, tracker: Some(tracker.clone()) };
        ours.mark(&ram, 0x10_1ff0, 0x20);
        let foreign = Dirty { log: None, tracker: Some(WriteTracker { inode: meta.ino() + 1, ..tracker }) };
        foreign.mark(&ram, 0x10_5000, 1);
        let mut pages = PageBitmap::new(16);
        dirty.drain_into(&mut pages);
        assert_eq!(pages.iter_ranges().collect::<Vec<_>>(), vec![5..7]);
    }
}
