//! Following a guest's writes, in either of two ways, and the change from one to the other while the guest runs.
//!
//! ```text
//!   Pages (dirty: asynchronous, a page at a time) ◀──── switch ────▶ Groups (fault: served by the agent, in groups)
//!
//!   of each slice:  copy it ─▶ scan, arm again ─▶ unregister ─▶ register at the other descriptor, arm ─▶ compare
//!                   what is written from here … is reported        … is not seen by anybody …        is in the bytes
//! ```
//!
//! A range has one userfaultfd at a time, and unregistering it opens all of its pages: between the two registrations
//! nobody sees a write. All pages that could be written in that moment would have to count as dirty, which is all of
//! them; so each slice is compared with a copy that was made while its writes were still reported, and only pages whose
//! bytes differ count. Nothing stands still for it.
//!
//! Invariants
//! * A page that was written before, during or after a change is in the set of the change, or of a later scan.
//! * A change that fails leaves tracking broken, and says so; the guest runs on as if it were not followed.
//! * A slice holds whole groups of every size.
//!
//! Not here: when to change (`engine::memory::page_group`).

use std::fs::File;
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileExt as _;
use std::time::{Duration, Instant};

use whimbrel_engine::memory::page_group::{Capture as Way, GROUP_MAX_PAGES};

use crate::error::{Context, Result};
use crate::guest::dirty::{RamMapping, ScanStats, Tracker, data_ranges};
use crate::guest::fault::{FaultStats, GroupTracker};
use crate::memory::bitmap::{PAGE_BYTES, PageBitmap};

const PAGE: u64 = PAGE_BYTES as u64;
/// Bytes that change hands at once: what is written to them in that moment is found by comparing them.
const SLICE_BYTES: u64 = 2 << 20;
const _: () = assert!(SLICE_BYTES.is_multiple_of(GROUP_MAX_PAGES * PAGE));

/// One of the two trackers.
enum Tracking {
    Pages(Tracker),
    Groups(GroupTracker),
}

/// What changes of the way have cost.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct SwitchStats {
    /// How many there were.
    pub count: u32,
    /// Together they took.
    pub took: Duration,
    /// Pages that were found to be written in the moment when nobody looked.
    pub unseen_pages: u64,
}

/// See the module's charter.
pub struct Capture {
    pid: u32,
    ram: File,
    mappings: Vec<RamMapping>,
    tracking: Tracking,
    /// Of trackers that were given up.
    faults_before: FaultStats,
    switches: SwitchStats,
}

impl Capture {
    /// Begins to follow process `pid`, page by page or in groups. The first scan gives every page that exists.
    pub fn attach(way: Way, pid: u32, uffd: OwnedFd, ram: &File, mappings: &[RamMapping]) -> Result<Self> {
        let tracking = match way {
            Way::Pages => Tracking::Pages(Tracker::attach(pid, uffd, ram, mappings)?),
            Way::Groups => Tracking::Groups(GroupTracker::attach(pid, uffd, ram, mappings)?),
        };
        Ok(Self {
            pid,
            ram: ram.try_clone().context("copy a descriptor")?,
            mappings: mappings.to_vec(),
            tracking,
            faults_before: FaultStats::default(),
            switches: SwitchStats::default(),
        })
    }

    /// How writes are followed now.
    pub fn way(&self) -> Way {
        match self.tracking {
            Tracking::Pages(_) => Way::Pages,
            Tracking::Groups(_) => Way::Groups,
        }
    }

    /// Adds the pages written since the last scan (in groups: pages that may have been) to `into`, and arms them again.
    pub fn scan(&mut self, into: &mut PageBitmap) -> Result<ScanStats> {
        match &mut self.tracking {
            Tracking::Pages(tracker) => tracker.scan(into),
            Tracking::Groups(tracker) => tracker.scan(into),
        }
    }

    /// What served faults have cost so far; `group_pages` is 0 when none are served now.
    pub fn faults(&self) -> FaultStats {
        let before = self.faults_before;
        let now = match &self.tracking {
            Tracking::Pages(_) => FaultStats::default(),
            Tracking::Groups(tracker) => tracker.stats(),
        };
        FaultStats {
            faults: before.faults + now.faults,
            opened_pages: before.opened_pages + now.opened_pages,
            handling: before.handling + now.handling,
            sampled_pages: before.sampled_pages + now.sampled_pages,
            unchanged_pages: before.unchanged_pages + now.unchanged_pages,
            group_pages: now.group_pages,
        }
    }

    /// What changes of the way have cost so far.
    pub fn switches(&self) -> SwitchStats {
        self.switches
    }

    /// Follows writes in the other way from now on, with another userfaultfd of the same process. Pages written since the
    /// last scan are added to `into`. Takes a fraction of a second for each GiB; the guest runs meanwhile.
    pub fn switch(&mut self, uffd: OwnedFd, into: &mut PageBitmap) -> Result<()> {
        let started = Instant::now();
        let mut next = match self.way() {
            Way::Pages => Tracking::Groups(GroupTracker::start(self.pid, uffd, &self.ram, &self.mappings)?),
            Way::Groups => Tracking::Pages(Tracker::start(self.pid, uffd, &self.ram, &self.mappings)?),
        };
        let mut buffers = (Vec::new(), Vec::new());
        let mut unseen = 0;
        for mapping in &self.mappings {
            for part in slices(*mapping) {
                unseen += move_slice(&self.ram, &mut self.tracking, &mut next, part, &mut buffers, into)?;
            }
        }
        self.faults_before = FaultStats { group_pages: 0, ..self.faults() };
        match &mut self.tracking {
            Tracking::Pages(tracker) => tracker.is_spent(),
            Tracking::Groups(tracker) => tracker.is_spent(),
        }
        self.tracking = next;
        self.switches.count += 1;
        self.switches.took += started.elapsed();
        self.switches.unseen_pages += unseen;
        Ok(())
    }

    /// Ends tracking at once; QEMU runs on as if nothing had been.
    pub fn detach(self) -> Result<()> {
        match self.tracking {
            Tracking::Pages(tracker) => tracker.detach(),
            Tracking::Groups(tracker) => tracker.detach(),
        }
    }
}

/// The parts of a mapping that change hands one after the other, cut at multiples of their size in the file.
fn slices(mapping: RamMapping) -> impl Iterator<Item = RamMapping> {
    let end = mapping.file_offset.saturating_add(mapping.length);
    let mut at = mapping.file_offset;
    std::iter::from_fn(move || {
        if at >= end {
            return None;
        }
        let next = (at / SLICE_BYTES + 1).saturating_mul(SLICE_BYTES).min(end);
        let address = mapping.address + (at - mapping.file_offset);
        let part = RamMapping { file_offset: at, address, length: next - at };
        at = next;
        Some(part)
    })
}

/// Hands one slice over; how many pages were found written by comparison alone.
fn move_slice(
    ram: &File,
    from: &mut Tracking,
    to: &mut Tracking,
    part: RamMapping,
    (before, after): &mut (Vec<u8>, Vec<u8>),
    into: &mut PageBitmap,
) -> Result<u64> {
    read_slice(ram, part, before)?;
    // Written up to here: reported. So a page that is not, is as it was copied.
    match from {
        Tracking::Pages(tracker) => {
            tracker.scan_mapping(part, into)?;
            tracker.disarm(part)?;
        }
        Tracking::Groups(tracker) => {
            tracker.collect(part, into)?;
            tracker.disarm(part, into)?;
        }
    }
    match to {
        Tracking::Pages(tracker) => tracker.arm(part)?,
        Tracking::Groups(tracker) => tracker.arm(part)?,
    }
    // Written from here on: reported by the other one. So a page whose bytes are the same has not been missed.
    read_slice(ram, part, after)?;
    if before == after {
        return Ok(0);
    }
    let mut unseen = 0;
    let first = part.file_offset / PAGE;
    for (page, (before, after)) in (first..).zip(before.chunks(PAGE_BYTES).zip(after.chunks(PAGE_BYTES))) {
        if before != after && !into.contains(page) {
            into.set(page);
            unseen += 1;
        }
    }
    Ok(unseen)
}

/// A slice's bytes; nothing for one that is all hole.
fn read_slice(ram: &File, part: RamMapping, into: &mut Vec<u8>) -> Result<()> {
    into.clear();
    let end = part.file_offset + part.length;
    let length = usize::try_from(part.length).unwrap_or(0);
    if data_ranges(ram, part.file_offset, end)?.is_empty() {
        into.resize(length, 0);
        return Ok(());
    }
    into.resize(length, 0);
    ram.read_exact_at(into, part.file_offset).context("read the RAM file")
}
