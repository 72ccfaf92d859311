//! Which pages of its RAM a QEMU wrote: by write faults that this agent serves, a group of pages at a time (capability 10).
//!
//! ```text
//!   guest writes an armed page ─▶ waits ─▶ handler: the group around it opened and noted ─▶ goes on
//!   scan: opened groups armed again, given to the caller          size of groups ◀── what was opened for nothing
//! ```
//!
//! Invariants
//! * Every page that can be written is in the set of opened pages: opening and noting is one step under one lock, arming
//!   again and taking out of the set another one. So a page is armed before it is read to be sent.
//! * The guest never waits for anything but this one thread, which does a bounded amount of work for a fault: it opens
//!   at most 256 pages and looks at eight.
//! * The agent's descriptor is the only one. When it is closed, by the kernel if the agent dies, every page is open and
//!   whoever waits goes on. A handler that fails gives everything free before it ends, and the next scan tells why.
//! * Faults of the kernel on QEMU's behalf must be served too: the descriptor is not of the user-mode-only kind.
//!
//! Not here: how large groups are (`engine::memory::page_group`), the asynchronous way (`dirty`), changing between the two
//! (`capture`).

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::FileExt as _;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use parking_lot::{Mutex, MutexGuard};
use rustix::event::{EventfdFlags, PollFd, PollFlags, eventfd, poll};
use whimbrel_engine::memory::page_group::{Looked, PageGroups, group_of};

use crate::error::{Context, Error, ErrorKind, Result};
use crate::guest::dirty::{RamMapping, ScanStats, data_ranges};
use crate::guest::uffd;
use crate::memory::bitmap::{PAGE_BYTES, PageBitmap};

const PAGE: u64 = PAGE_BYTES as u64;
/// One fault in so many is looked at more closely.
const SAMPLE_EVERY: u64 = 8;
/// Between two scans at most so many.
const SAMPLES_MAX: usize = 128;
/// Pages of a group that are looked at.
const SAMPLE_PAGES: u64 = 8;
/// Ranges that are armed again before a waiting fault gets its turn.
const RANGES_PER_TURN: usize = 64;

/// What serving faults has cost; counters over the tracker's life.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct FaultStats {
    /// Faults served.
    pub faults: u64,
    /// Pages opened by them.
    pub opened_pages: u64,
    /// Time the handler took for them.
    pub handling: Duration,
    /// Pages that were looked at before they were opened and after they were armed again.
    pub sampled_pages: u64,
    /// Those of them that the guest had not changed.
    pub unchanged_pages: u64,
    /// The size of groups now, pages.
    pub group_pages: u64,
}

/// A page before it was opened.
struct Sample {
    page: u64,
    hash: blake3::Hash,
}

struct State {
    /// Pages that can be written without a fault.
    open: PageBitmap,
    groups: PageGroups,
    samples: Vec<Sample>,
    stats: FaultStats,
    /// What was told to `groups`.
    told: FaultStats,
    failed: Option<String>,
    /// Its ranges are another tracker's now.
    spent: bool,
}

struct Shared {
    pid: u32,
    uffd: OwnedFd,
    ram: File,
    mappings: Vec<RamMapping>,
    pages: u64,
    state: Mutex<State>,
}

/// See the module's charter.
pub struct GroupTracker {
    shared: Arc<Shared>,
    stop: Arc<OwnedFd>,
    handler: Option<JoinHandle<()>>,
    first: bool,
}

impl GroupTracker {
    /// Starts to serve the faults of process `pid`, whose userfaultfd is `uffd`. Nothing is armed yet.
    pub fn start(pid: u32, uffd: OwnedFd, ram: &File, mappings: &[RamMapping]) -> Result<Self> {
        let action = || format!("serve write faults of process {pid}");
        uffd::enable(uffd.as_fd(), uffd::FAULT_FEATURES).with_context(action)?;
        rustix::io::ioctl_fionbio(&uffd, true).map_err(io::Error::from).with_context(action)?;
        let pages = mappings.iter().map(|one| one.file_offset.saturating_add(one.length) / PAGE).max();
        let pages = pages.unwrap_or(0);
        let groups = PageGroups::default();
        let stats = FaultStats { group_pages: groups.size_pages(), ..FaultStats::default() };
        let state = State {
            open: PageBitmap::new(pages),
            groups,
            samples: Vec::new(),
            stats,
            told: stats,
            failed: None,
            spent: false,
        };
        let shared = Arc::new(Shared {
            pid,
            uffd,
            ram: ram.try_clone().with_context(action)?,
            mappings: mappings.to_vec(),
            pages,
            state: Mutex::new(state),
        });
        let stop = eventfd(0, EventfdFlags::CLOEXEC).map_err(io::Error::from).with_context(action)?;
        let stop = Arc::new(stop);
        let (served, stopped) = (Arc::clone(&shared), Arc::clone(&stop));
        let handler = std::thread::Builder::new().name(format!("faults-{pid}"));
        let handler = handler.spawn(move || serve(&served, &stopped)).with_context(action)?;
        Ok(Self { shared, stop, handler: Some(handler), first: false })
    }

    /// Starts to serve and arms everything: the first scan gives every page that exists.
    pub fn attach(pid: u32, uffd: OwnedFd, ram: &File, mappings: &[RamMapping]) -> Result<Self> {
        let mut tracker = Self::start(pid, uffd, ram, mappings)?;
        for mapping in mappings {
            tracker.arm(*mapping)?;
        }
        tracker.first = true;
        Ok(tracker)
    }

    /// Registers a part of a mapping, and arms every page of it.
    pub(super) fn arm(&mut self, part: RamMapping) -> Result<()> {
        let uffd = self.shared.uffd.as_fd();
        uffd::register_wp(uffd, part.address, part.length)
            .and_then(|()| uffd::write_protect(uffd, part.address, part.length, true))
            .with_context(|| format!("serve write faults of process {}", self.shared.pid))
    }

    /// Ends the serving of a part of a mapping; its opened pages that no scan has given yet go into `into`.
    pub(super) fn disarm(&mut self, part: RamMapping, into: &mut PageBitmap) -> Result<()> {
        let result = uffd::unregister(self.shared.uffd.as_fd(), part.address, part.length);
        // After it no fault of this part can be under way: what was opened is in the set.
        let mut state = self.shared.state.lock();
        let (first, end) = (part.file_offset / PAGE, part.file_offset.saturating_add(part.length) / PAGE);
        let mut from = first;
        while let Some(range) = state.open.next_range(from).filter(|range| range.start < end) {
            let last = range.end.min(end);
            into.set_range(range.start, last - range.start);
            from = last;
        }
        state.open.clear_range(first, end - first);
        result.with_context(|| format!("end serving write faults of process {}", self.shared.pid))
    }

    /// Adds the pages opened since the last scan to `into` and arms them again.
    pub fn scan(&mut self, into: &mut PageBitmap) -> Result<ScanStats> {
        let started = Instant::now();
        let mut stats = ScanStats::default();
        for index in 0..self.shared.mappings.len() {
            let Some(&mapping) = self.shared.mappings.get(index) else { break };
            stats.dirty_pages += self.collect(mapping, into)?;
            stats.scanned_pages += mapping.length / PAGE;
        }
        self.look_at_samples()?;
        if self.first {
            for mapping in &self.shared.mappings {
                let end = mapping.file_offset.saturating_add(mapping.length);
                for data in data_ranges(&self.shared.ram, mapping.file_offset, end)? {
                    into.set_range(data.start / PAGE, data.end.div_ceil(PAGE) - data.start / PAGE);
                }
            }
            self.first = false;
            stats.dirty_pages = into.count();
        }
        stats.took = started.elapsed();
        Ok(stats)
    }

    /// Arms the opened pages of a part again and gives them; how many there were.
    pub(super) fn collect(&mut self, part: RamMapping, into: &mut PageBitmap) -> Result<u64> {
        let action = || format!("arm pages of process {} again", self.shared.pid);
        let end = part.file_offset.saturating_add(part.length) / PAGE;
        let mut from = part.file_offset / PAGE;
        let mut pages = 0;
        loop {
            let mut state = self.shared.state.lock();
            if let Some(words) = &state.failed {
                return Err(Error::new(ErrorKind::Io, format!("{}: {words}", action())));
            }
            for _ in 0..RANGES_PER_TURN {
                let Some(range) = state.open.next_range(from).filter(|range| range.start < end) else {
                    return Ok(pages);
                };
                let (start, length) = (range.start, range.end.min(end) - range.start);
                let address = part.address + (start * PAGE - part.file_offset);
                uffd::write_protect(self.shared.uffd.as_fd(), address, length * PAGE, true)
                    .with_context(action)?;
                state.open.clear_range(start, length);
                into.set_range(start, length);
                pages += length;
                from = start + length;
            }
            // A fault that waits for the lock goes first.
            MutexGuard::unlock_fair(state);
        }
    }

    /// Compares what was sampled, and tells the size of groups what became of it.
    fn look_at_samples(&mut self) -> Result<()> {
        let samples = std::mem::take(&mut self.shared.state.lock().samples);
        let mut unchanged = 0;
        for sample in &samples {
            unchanged +=
                u64::from(self.shared.hash(sample.page).context("read the RAM file")? == sample.hash);
        }
        let state = &mut *self.shared.state.lock();
        state.stats.sampled_pages += samples.len() as u64;
        state.stats.unchanged_pages += unchanged;
        let looked = Looked {
            faults: state.stats.faults - state.told.faults,
            opened_pages: state.stats.opened_pages - state.told.opened_pages,
            sampled_pages: state.stats.sampled_pages - state.told.sampled_pages,
            unchanged_pages: state.stats.unchanged_pages - state.told.unchanged_pages,
        };
        state.stats.group_pages = state.groups.observe(&looked);
        state.told = state.stats;
        Ok(())
    }

    /// Every part is disarmed, and belongs to another userfaultfd: the end of this one must not touch them, as the kernel
    /// lets one descriptor unregister the ranges of another.
    pub(super) fn is_spent(&mut self) {
        self.shared.state.lock().spent = true;
    }

    /// What it has cost so far.
    pub fn stats(&self) -> FaultStats {
        self.shared.state.lock().stats
    }

    /// Ends tracking; QEMU runs on as if nothing had been. Dropping does the same, without telling errors.
    pub fn detach(mut self) -> Result<()> {
        self.end()
    }

    fn end(&mut self) -> Result<()> {
        // First everything is opened, then nobody needs the handler any more.
        let result = self.shared.give_free();
        let _ = rustix::io::write(&self.stop, &1u64.to_ne_bytes());
        if let Some(handler) = self.handler.take() {
            let _ = handler.join();
        }
        result.with_context(|| format!("stop tracking process {}", self.shared.pid))
    }
}

impl Drop for GroupTracker {
    fn drop(&mut self) {
        if self.handler.is_some()
            && let Err(error) = self.end()
        {
            tracing::warn!(pid = self.shared.pid, %error, "closing the userfaultfd ends tracking all the same");
        }
    }
}

impl Shared {
    /// Opens every page for good, and wakes whoever waits.
    fn give_free(&self) -> io::Result<()> {
        if self.state.lock().spent {
            return Ok(());
        }
        let mut result = Ok(());
        for mapping in &self.mappings {
            match uffd::unregister(self.uffd.as_fd(), mapping.address, mapping.length) {
                // It has ended; or this part is not registered here (any more).
                Err(error) if matches!(error.raw_os_error(), Some(libc::ESRCH | libc::EINVAL)) => {}
                Err(error) => result = Err(error),
                Ok(()) => {}
            }
        }
        result
    }

    fn hash(&self, page: u64) -> io::Result<blake3::Hash> {
        let mut bytes = [0; PAGE_BYTES];
        self.ram.read_exact_at(&mut bytes, page * PAGE)?;
        Ok(blake3::hash(&bytes))
    }

    /// Opens the group around `address`.
    fn open_group(&self, address: u64) -> io::Result<()> {
        let started = Instant::now();
        let inside = |one: &&RamMapping| (one.address..one.address + one.length).contains(&address);
        let Some(mapping) = self.mappings.iter().find(inside) else {
            return Err(io::Error::other(format!("a fault at {address:#x}, outside of the guest's memory")));
        };
        let page = (address - mapping.address + mapping.file_offset) / PAGE;
        let state = &mut *self.state.lock();
        let (first, end) = (mapping.file_offset / PAGE, (mapping.file_offset + mapping.length) / PAGE);
        let group = group_of(page, state.groups.size_pages(), self.pages.min(end));
        let group = group.start.max(first)..group.end;
        let at = mapping.address + (group.start * PAGE - mapping.file_offset);
        if state.open.contains(page) {
            // Two processors wrote to it at once: the first one's fault has opened it.
            return uffd::wake(self.uffd.as_fd(), at, (group.end - group.start) * PAGE);
        }
        if state.stats.faults.is_multiple_of(SAMPLE_EVERY) && state.samples.len() < SAMPLES_MAX {
            // Spread over the group, so that the page that is surely written counts as much as the others.
            let step = ((group.end - group.start) / SAMPLE_PAGES).max(1);
            let phase = (state.stats.faults / SAMPLE_EVERY) % step;
            for page in (group.start + phase..group.end).step_by(usize::try_from(step).unwrap_or(1)) {
                if !state.open.contains(page) {
                    state.samples.push(Sample { page, hash: self.hash(page)? });
                }
            }
        }
        let length = (group.end - group.start) * PAGE;
        match uffd::write_protect(self.uffd.as_fd(), at, length, false) {
            Ok(()) => {}
            // A part of it was taken back meanwhile; whoever waited there was woken, whoever waits beside it is now.
            Err(error) if error.raw_os_error() == Some(libc::ENOENT) => {
                return uffd::wake(self.uffd.as_fd(), at, length);
            }
            // It has ended.
            Err(error) if error.raw_os_error() == Some(libc::ESRCH) => return Ok(()),
            Err(error) => return Err(error),
        }
        state.open.set_range(group.start, group.end - group.start);
        state.stats.faults += 1;
        state.stats.opened_pages += group.end - group.start;
        state.stats.handling += started.elapsed();
        Ok(())
    }

    fn next_faults(&self, stop: &OwnedFd) -> io::Result<Option<Vec<u64>>> {
        let mut waited = [PollFd::new(&self.uffd, PollFlags::IN), PollFd::new(stop, PollFlags::IN)];
        match poll(&mut waited, None) {
            Err(rustix::io::Errno::INTR) => return Ok(Some(Vec::new())),
            other => other?,
        };
        let [faults, stop] = &waited;
        if !stop.revents().is_empty() {
            return Ok(None);
        }
        if faults.revents().intersects(PollFlags::HUP | PollFlags::ERR) {
            return Ok(None);
        }
        uffd::read_faults(self.uffd.as_fd()).map(Some)
    }
}

/// Everything is given free, however the handler ends.
struct Free<'a>(&'a Shared, &'static str);

impl Drop for Free<'_> {
    fn drop(&mut self) {
        let mut state = self.0.state.lock();
        state.failed.get_or_insert_with(|| self.1.to_owned());
        drop(state);
        let _ = self.0.give_free();
    }
}

fn serve(shared: &Shared, stop: &OwnedFd) {
    let _free = Free(shared, "the handler of write faults has ended");
    loop {
        let served = shared.next_faults(stop).and_then(|faults| match faults {
            None => Ok(false),
            Some(faults) => faults.into_iter().try_for_each(|fault| shared.open_group(fault)).map(|()| true),
        });
        match served {
            Ok(true) => {}
            Ok(false) => return,
            Err(error) => {
                tracing::warn!(pid = shared.pid, %error, "write faults are not served any more");
                shared.state.lock().failed = Some(error.to_string());
                return;
            }
        }
    }
}
