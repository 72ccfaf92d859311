//! What following writes costs on this host, measured once on memory of this process: the guest's write to an armed page
//! in either way.
//!
//! Not here: what is concluded from it (`engine::memory::page_group`).
#![expect(unsafe_code, reason = "writes to memory that is mapped for the measurement")]

use std::ffi::c_void;
use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::sync::OnceLock;
use std::time::Instant;

use rustix::fs::{MemfdFlags, ftruncate, memfd_create};
use rustix::mm::{MapFlags, ProtFlags, mmap, munmap};
use whimbrel_engine::memory::page_group::Capture as Way;

use crate::error::{Context, Result};
use crate::guest::capture::Capture;
use crate::guest::dirty::RamMapping;
use crate::guest::uffd;
use crate::memory::bitmap::{PAGE_BYTES, PageBitmap};

const PAGES: u64 = 512;
/// The size of a new tracker's groups.
const FIRST_GROUP_PAGES: u64 = 8;

/// Nanoseconds per armed page followed asynchronously, per write fault that is served, and per page that it opened.
pub(crate) fn costs() -> Result<(f64, f64, f64)> {
    static KNOWN: OnceLock<(f64, f64, f64)> = OnceLock::new();
    if let Some(known) = KNOWN.get() {
        return Ok(*known);
    }
    let page_ns = measure(Way::Pages, 1)?.0 / PAGES as f64;
    // Further apart than a new tracker's groups are large: each write is a fault.
    let fault_ns = measure(Way::Groups, 2 * FIRST_GROUP_PAGES)?.1;
    // Every page of every group: what is left are the pages.
    let all_ns = measure(Way::Groups, 1)?.0;
    let faults = (PAGES / FIRST_GROUP_PAGES) as f64;
    let opened_ns = ((all_ns - faults * fault_ns) / PAGES as f64).max(0.0);
    Ok(*KNOWN.get_or_init(|| (page_ns, fault_ns, opened_ns)))
}

/// Shared memory of this process, as a QEMU's RAM is.
pub(super) struct Memory {
    base: *mut c_void,
    length: usize,
    pub(super) file: File,
}

impl Memory {
    pub(super) fn new(pages: u64) -> io::Result<Self> {
        let length = usize::try_from(pages).unwrap_or(0) * PAGE_BYTES;
        let file = memfd_create("whimbrel-measure", MemfdFlags::CLOEXEC)?;
        ftruncate(&file, length as u64)?;
        let protection = ProtFlags::READ | ProtFlags::WRITE;
        // SAFETY: a new mapping at an address of the kernel's choice; unmapped when this value is dropped.
        let base = unsafe { mmap(std::ptr::null_mut(), length, protection, MapFlags::SHARED, &file, 0) }?;
        Ok(Self { base, length, file: file.into() })
    }

    pub(super) fn mapping(&self) -> RamMapping {
        RamMapping { file_offset: 0, address: self.base as u64, length: self.length as u64 }
    }

    /// Writes one word of a page.
    pub(super) fn write(&self, page: u64, value: u64) {
        let offset = usize::try_from(page).unwrap_or(0) * PAGE_BYTES;
        assert!(offset < self.length, "a page of this memory");
        // SAFETY: within the mapping, aligned; nothing else refers to it but by such writes and through the file.
        unsafe { self.base.cast::<u8>().add(offset).cast::<u64>().write_volatile(value) }
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        // SAFETY: mapped in `new`; whoever writes to it borrows this value.
        let _ = unsafe { munmap(self.base, self.length) };
    }
}

// SAFETY: an address of memory that is written by single words only, each by a volatile write.
unsafe impl Send for Memory {}
// SAFETY: see above.
unsafe impl Sync for Memory {}

/// A userfaultfd of this process that gets the kernel's faults too, or only its own: here nobody else writes.
pub(super) fn own_userfaultfd() -> Result<OwnedFd> {
    uffd::create_here().context("make a userfaultfd")
}

/// Writes to every `step`th armed page: nanoseconds for all of them together, and the median of one.
fn measure(way: Way, step: u64) -> Result<(f64, f64)> {
    let memory = Memory::new(PAGES).context("map memory for a measurement")?;
    for page in 0..PAGES {
        memory.write(page, 1);
    }
    let mapping = memory.mapping();
    let mut capture = Capture::attach(way, std::process::id(), own_userfaultfd()?, &memory.file, &[mapping])?;
    let mut all = PageBitmap::new(PAGES);
    capture.scan(&mut all)?;
    let mut times: Vec<f64> = Vec::new();
    for index in 0..PAGES / step {
        let started = Instant::now();
        memory.write(index * step, 2);
        times.push(started.elapsed().as_secs_f64() * 1e9);
    }
    capture.detach()?;
    let together = times.iter().sum();
    times.sort_by(f64::total_cmp);
    Ok((together, times.get(times.len() / 2).copied().unwrap_or(0.0)))
}
