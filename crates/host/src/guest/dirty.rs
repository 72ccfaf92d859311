//! Which pages of its RAM a QEMU wrote: from outside, by asynchronous write-protection.
//!
//! ```text
//!   attach ── register ranges ──▶ armed ──┬─ scan: written since the last scan, and armed again
//!                                         └─ detach: as if nothing had been (also when the agent dies)
//! ```
//!
//! Invariants
//! * A page that QEMU writes after a scan has returned is in the set of the next scan. Arming comes first: the
//!   first scan returns every page that exists, so that nothing written before is missed.
//! * Seen are writes through QEMU's own page tables: its threads, its guest's processors, the kernel on their
//!   behalf. Direct I/O is seen when it begins, not when it ends: what a scan reported may be read only after a grace
//!   period (`drain`). Other processes that map the same file are not seen: the precheck refuses them; our own disk
//!   server marks what it writes.
//! * Pages that were never touched are holes of the RAM file and cost nothing.
//!
//! Not here: how the descriptor came out of QEMU (`inject`), what happens to the pages (`memory`), the other way of
//! following writes (`fault`) and the change between the two (`capture`).

use std::fs::File;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::MetadataExt;
use std::time::{Duration, Instant};

use crate::error::{Context, Error, ErrorKind, Result};
use crate::guest::uffd::{self, Region};
use crate::memory::bitmap::{PAGE_BYTES, PageBitmap};

/// Regions per call of the kernel.
const REGIONS_MAX: usize = 4096;
const PAGE: u64 = PAGE_BYTES as u64;

/// A part of the RAM file and where QEMU has it mapped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RamMapping {
    /// Where it starts in the file, bytes.
    pub file_offset: u64,
    /// Address of that byte in QEMU.
    pub address: u64,
    /// Bytes; a multiple of the page size, as all three are.
    pub length: u64,
}

/// What a scan did.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ScanStats {
    /// Pages found written (counting one twice if the caller's set held it already).
    pub dirty_pages: u64,
    /// Pages looked at.
    pub scanned_pages: u64,
    /// Time it took.
    pub took: Duration,
}

/// See the module's charter.
#[derive(Debug)]
pub struct Tracker {
    pid: u32,
    uffd: OwnedFd,
    pagemap: File,
    ram: File,
    mappings: Vec<RamMapping>,
    regions: Vec<Region>,
    first: bool,
    registered: usize,
}

impl Tracker {
    /// Starts to track process `pid` with its userfaultfd `uffd`, over `mappings` of the file `ram`.
    pub fn attach(pid: u32, uffd: OwnedFd, ram: &File, mappings: &[RamMapping]) -> Result<Self> {
        let action = || format!("track writes of process {pid}");
        let mut tracker = Self::start(pid, uffd, ram, mappings)?;
        for index in 0..tracker.mappings.len() {
            let Some(&RamMapping { address, length, .. }) = tracker.mappings.get(index) else { break };
            // A failure undoes what was registered: the tracker is dropped.
            uffd::register_wp(tracker.uffd.as_fd(), address, length).with_context(action)?;
            tracker.registered = index + 1;
        }
        tracker.first = true;
        Ok(tracker)
    }

    /// Prepares to track; nothing is registered yet, see [`Tracker::arm`].
    pub(super) fn start(pid: u32, uffd: OwnedFd, ram: &File, mappings: &[RamMapping]) -> Result<Self> {
        let action = || format!("track writes of process {pid}");
        for mapping in mappings {
            if [mapping.file_offset, mapping.address, mapping.length].iter().any(|n| n % PAGE != 0) {
                return Err(Error::new(
                    ErrorKind::InvalidInput,
                    format!("{}: {mapping:x?} is odd", action()),
                ));
            }
        }
        uffd::enable(uffd.as_fd(), uffd::TRACKING_FEATURES).with_context(action).map_err(|error| {
            error.hint("tracking writes from outside needs Linux 6.7 or later; mode B works without")
        })?;
        let path = format!("/proc/{pid}/pagemap");
        let pagemap = File::open(&path).with_context(|| format!("open {path}"))?;
        let ram = ram.try_clone().with_context(action)?;
        let regions = vec![Region::default(); REGIONS_MAX];
        let mappings = mappings.to_vec();
        Ok(Self { pid, uffd, pagemap, ram, mappings, regions, first: false, registered: 0 })
    }

    /// Registers a part of a mapping, and arms every page of it, without telling which were written.
    pub(super) fn arm(&mut self, part: RamMapping) -> Result<()> {
        uffd::register_wp(self.uffd.as_fd(), part.address, part.length)
            .with_context(|| format!("track writes of process {}", self.pid))?;
        // If anything fails from here on, the end of this tracker undoes all of it.
        self.registered = self.mappings.len();
        self.scan_mapping(part, &mut PageBitmap::new(0)).map(drop)
    }

    /// Ends the tracking of a part of a mapping.
    pub(super) fn disarm(&mut self, part: RamMapping) -> Result<()> {
        uffd::unregister(self.uffd.as_fd(), part.address, part.length)
            .with_context(|| format!("stop tracking process {}", self.pid))
    }

    /// Every part is disarmed, and belongs to another userfaultfd: the end of this one must not touch them, as the kernel
    /// lets one descriptor unregister the ranges of another.
    pub(super) fn is_spent(&mut self) {
        self.registered = 0;
    }

    /// Adds the pages written since the last scan to `into` (page numbers of the file) and arms them again. The
    /// first scan adds every page that exists.
    pub fn scan(&mut self, into: &mut PageBitmap) -> Result<ScanStats> {
        let started = Instant::now();
        let mut stats = ScanStats::default();
        for index in 0..self.mappings.len() {
            let Some(&mapping) = self.mappings.get(index) else { break };
            stats.dirty_pages += self.scan_mapping(mapping, into)?;
            stats.scanned_pages += mapping.length / PAGE;
        }
        if self.first {
            // After arming: what comes into being from here on is seen by the next scan.
            stats.dirty_pages = self.add_existing(into)?;
            self.first = false;
        }
        stats.took = started.elapsed();
        Ok(stats)
    }

    pub(super) fn scan_mapping(&mut self, mapping: RamMapping, into: &mut PageBitmap) -> Result<u64> {
        let end = mapping.address.saturating_add(mapping.length);
        let mut at = mapping.address;
        let mut dirty = 0;
        while at < end {
            let (count, walked) = uffd::scan_written(self.pagemap.as_fd(), at, end, &mut self.regions)
                .with_context(|| format!("scan page tables of process {}", self.pid))?;
            for region in self.regions.iter().take(count) {
                let first =
                    region.start.saturating_sub(mapping.address).saturating_add(mapping.file_offset) / PAGE;
                let pages = region.end.saturating_sub(region.start) / PAGE;
                into.set_range(first, pages);
                dirty += pages;
            }
            if walked <= at {
                let words = format!("scan page tables of process {}: no progress at {at:#x}", self.pid);
                return Err(Error::new(ErrorKind::Io, words));
            }
            at = walked;
        }
        Ok(dirty)
    }

    /// Every page of the mapped ranges that the file has, whoever wrote it.
    fn add_existing(&self, into: &mut PageBitmap) -> Result<u64> {
        let mut pages = 0;
        for mapping in &self.mappings {
            let end = mapping.file_offset.saturating_add(mapping.length);
            for data in data_ranges(&self.ram, mapping.file_offset, end)? {
                let (first, last) = (data.start / PAGE, data.end.div_ceil(PAGE));
                into.set_range(first, last.saturating_sub(first));
                pages += last.saturating_sub(first);
            }
        }
        Ok(pages)
    }

    /// Ends tracking at once; QEMU runs on as if nothing had been. Dropping does the same, without telling errors.
    pub fn detach(mut self) -> Result<()> {
        self.unregister()
    }

    fn unregister(&mut self) -> Result<()> {
        let mut result = Ok(());
        for mapping in self.mappings.iter().take(self.registered) {
            match uffd::unregister(self.uffd.as_fd(), mapping.address, mapping.length) {
                // The process has ended: nothing is left to undo.
                Err(error) if error.raw_os_error() == Some(libc::ESRCH) => {}
                Err(error) => result = Err(error).context(format!("stop tracking process {}", self.pid)),
                Ok(()) => {}
            }
        }
        self.registered = 0;
        result
    }
}

impl Drop for Tracker {
    fn drop(&mut self) {
        if let Err(error) = self.unregister() {
            tracing::warn!(pid = self.pid, %error, "closing the userfaultfd ends tracking all the same");
        }
    }
}

/// The ranges of `file` within `start..end` that are not holes, in order.
pub fn data_ranges(file: &File, start: u64, end: u64) -> Result<Vec<std::ops::Range<u64>>> {
    use rustix::fs::{SeekFrom, seek};
    let size = file.metadata().context("look at the RAM file")?.size();
    let end = end.min(size);
    let mut ranges = Vec::new();
    let mut at = start;
    while at < end {
        let from = match seek(file, SeekFrom::Data(at)) {
            Ok(from) if from < end => from,
            Ok(_) | Err(rustix::io::Errno::NXIO) => break,
            Err(error) => return Err(error).context("find data in the RAM file"),
        };
        let to = seek(file, SeekFrom::Hole(from)).context("find holes of the RAM file")?.clamp(from + 1, end);
        ranges.push(from..to);
        at = to;
    }
    Ok(ranges)
}
