//! A guest's RAM as the front-end shared it: mapped here, looked up by the guest's and the front-end's addresses.
//!
//! Invariants
//! * A pointer is handed out only for bytes that lie inside one mapped region; it stays good as long as the
//!   [`GuestRam`] it came from.
//! * Regions do not overlap; what a message says is checked against the file's length, so that no access faults
//!   unless the front-end shrinks the file afterwards.
//!
//! The guest writes to these bytes while we look at them. Nothing here makes a reference to them: they are read
//! with volatile or atomic loads, or by the kernel on our behalf.
//!
//! Not here: which pages we wrote (`dirty`), what they were filled from (`fills`), what the bytes mean (`ring`, `blk`).
#![expect(unsafe_code, reason = "maps the guest's memory and hands out pointers into it")]

use std::fs::File;
use std::io::IoSliceMut;
use std::os::unix::fs::MetadataExt;
use std::ptr;
use std::sync::Arc;

use rustix::mm::{MapFlags, ProtFlags, mmap, munmap};

use super::fills::{FilledFrom, Fills};
use crate::error::{Context, Error, ErrorKind, Result};

/// Most regions a front-end may give us, as we answer GET_MAX_MEM_SLOTS; QEMU sends 8 at once without slots.
pub(super) const MAX_REGIONS: usize = 32;

const PAGE: u64 = 4096;

/// A shared, writable mapping of a part of a file, unmapped on drop.
pub(super) struct Mapping {
    start: *mut u8,
    mapped: usize,
    skip: usize,
    length: usize,
}

// SAFETY: the mapping is plain memory that outlives every pointer use guarded by this value; all accesses to it are
// atomic, volatile or made by the kernel, so threads may share it.
unsafe impl Send for Mapping {}
// SAFETY: as above.
unsafe impl Sync for Mapping {}

impl Mapping {
    /// Maps `length` bytes of `file` from `offset` on; refuses what lies beyond the file's end.
    pub(super) fn new(file: &File, offset: u64, length: u64) -> Result<Self> {
        let meta = file.metadata().context("look at shared memory")?;
        let end = offset.checked_add(length).filter(|end| length > 0 && *end <= meta.len());
        let Some(_) = end else {
            return Err(Error::new(
                ErrorKind::InvalidInput,
                format!("map {length} bytes at {offset} of a file of {} bytes", meta.len()),
            ));
        };
        // Huge pages are mapped in whole pages only; the file tells their size.
        let granule = if meta.blksize().is_power_of_two() { meta.blksize().max(PAGE) } else { PAGE };
        let from = offset & !(granule - 1);
        let skip = usize::try_from(offset - from).unwrap_or(usize::MAX);
        let length = usize::try_from(length).unwrap_or(usize::MAX);
        let mapped = skip.saturating_add(length).next_multiple_of(usize::try_from(granule).unwrap_or(4096));
        // SAFETY: a new mapping at an address of the kernel's choice aliases nothing of ours.
        let start = unsafe {
            mmap(
                ptr::null_mut(),
                mapped,
                ProtFlags::READ | ProtFlags::WRITE,
                MapFlags::SHARED | MapFlags::NORESERVE,
                file,
                from,
            )
        }
        .with_context(|| format!("map {mapped} bytes of shared memory"))?;
        Ok(Self { start: start.cast(), mapped, skip, length })
    }

    /// The first byte asked for.
    pub(super) fn as_ptr(&self) -> *mut u8 {
        // SAFETY: `skip < mapped`, so the result lies inside the mapping.
        unsafe { self.start.add(self.skip) }
    }

    /// How many bytes from [`Mapping::as_ptr`] on are mapped.
    pub(super) fn len(&self) -> usize {
        self.length
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: the mapping was made by `new` with this start and length, and nobody else unmaps it.
        let _ = unsafe { munmap(self.start.cast(), self.mapped) };
    }
}

/// Where a region of guest memory lies, in the three address spaces it has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct RegionAddr {
    /// Guest physical address.
    pub(super) gpa: u64,
    /// Length, bytes.
    pub(super) size: u64,
    /// Address in the front-end's process.
    pub(super) user: u64,
    /// Offset in the shared file.
    pub(super) file_offset: u64,
}

/// One mapped region.
pub(super) struct Region {
    pub(super) addr: RegionAddr,
    /// The RAM file: device and inode number.
    pub(super) file: (u64, u64),
    map: Mapping,
    fills: Arc<Fills>,
}

/// A run of guest memory inside one region.
#[derive(Clone, Copy, Debug)]
pub(super) struct Seg {
    pub(super) gpa: u64,
    pub(super) ptr: *mut u8,
    pub(super) len: usize,
}

impl Seg {
    /// Takes the last byte off; `None` if there is none.
    pub(super) fn take_last(&mut self) -> Option<Self> {
        let rest = self.len.checked_sub(1)?;
        self.len = rest;
        // SAFETY: `rest` is inside the run as it was.
        let ptr = unsafe { self.ptr.add(rest) };
        Some(Self { gpa: self.gpa.wrapping_add(rest as u64), ptr, len: 1 })
    }
}

// SAFETY: the pointer is used only together with the `GuestRam` it came from, which may be shared.
unsafe impl Send for Seg {}

/// See the module's charter. Immutable: a changed memory table is a new value that shares the regions kept.
#[derive(Default)]
pub(super) struct GuestRam {
    regions: Vec<Arc<Region>>,
}

impl GuestRam {
    /// The same memory with one region more.
    pub(super) fn with(&self, addr: RegionAddr, file: &File) -> Result<Self> {
        let overlaps = |other: &RegionAddr| {
            addr.gpa < other.gpa.saturating_add(other.size) && other.gpa < addr.gpa.saturating_add(addr.size)
        };
        if self.regions.len() >= MAX_REGIONS || self.regions.iter().any(|region| overlaps(&region.addr)) {
            return Err(Error::new(
                ErrorKind::InvalidInput,
                format!("add region of {} bytes at {:#x}: too many, or it overlaps", addr.size, addr.gpa),
            ));
        }
        if addr.gpa.checked_add(addr.size).is_none() || addr.user.checked_add(addr.size).is_none() {
            return Err(Error::new(ErrorKind::InvalidInput, "add region: it wraps around"));
        }
        let meta = file.metadata().context("look at shared memory")?;
        let (file, map) = ((meta.dev(), meta.ino()), Mapping::new(file, addr.file_offset, addr.size)?);
        let mut regions = self.regions.clone();
        let fills = Arc::new(Fills::new(addr.size));
        regions.push(Arc::new(Region { addr, file, map, fills }));
        regions.sort_by_key(|region| region.addr.gpa);
        Ok(Self { regions })
    }

    /// The same memory without the region at `gpa` of `size` bytes; `None` if there is none.
    pub(super) fn without(&self, gpa: u64, size: u64) -> Option<Self> {
        let mut regions = self.regions.clone();
        regions.retain(|region| region.addr.gpa != gpa || region.addr.size != size);
        (regions.len() < self.regions.len()).then_some(Self { regions })
    }

    /// The region that holds a guest physical address.
    pub(super) fn region(&self, gpa: u64) -> Option<&Region> {
        self.regions
            .iter()
            .map(|region| &**region)
            .find(|region| gpa.checked_sub(region.addr.gpa).is_some_and(|offset| offset < region.addr.size))
    }

    /// `segs` were filled with the disk's bytes from `offset` on.
    pub(super) fn note_fill(&self, segs: &[Seg], mut offset: u64) {
        for seg in segs {
            if let Some(region) = self.region(seg.gpa) {
                region.fills.note(seg.gpa - region.addr.gpa, seg.len as u64, offset);
            }
            offset = offset.saturating_add(seg.len as u64);
        }
    }

    /// What the pages of a RAM file (device and inode number) were filled from.
    pub(super) fn filled(&self, file: (u64, u64)) -> FilledFrom {
        let mut filled = FilledFrom::default();
        for region in self.regions.iter().filter(|region| region.file == file) {
            filled.add(region.addr.file_offset, region.addr.size, Arc::clone(&region.fills));
        }
        filled
    }

    /// The first run of `len` bytes from a guest physical address on; shorter than `len` where a region ends.
    pub(super) fn run(&self, gpa: u64, len: u64) -> Option<Seg> {
        let region = self.region(gpa)?;
        let offset = gpa - region.addr.gpa;
        let len = len.min(region.addr.size - offset);
        let offset = usize::try_from(offset).ok()?;
        let len = usize::try_from(len).ok()?;
        debug_assert!(offset + len <= region.map.len(), "a region is mapped whole");
        // SAFETY: `offset < size == map.len()`, so the result lies inside the mapping.
        let ptr = unsafe { region.map.as_ptr().add(offset) };
        Some(Seg { gpa, ptr, len })
    }

    /// `len` bytes at a front-end address, if one region holds them all.
    pub(super) fn by_user(&self, user: u64, len: u64) -> Option<Seg> {
        let region = self.regions.iter().find(|region| {
            user.checked_sub(region.addr.user).is_some_and(|offset| offset < region.addr.size)
        })?;
        let gpa = region.addr.gpa + (user - region.addr.user);
        self.run(gpa, len).filter(|seg| seg.len as u64 == len)
    }
}

/// Copies bytes of guest memory, from `skip` on, into `into`; `false` if there are not enough.
pub(super) fn copy_in(segs: &[Seg], mut skip: usize, into: &mut [u8]) -> bool {
    let mut done = 0;
    for seg in segs {
        if skip >= seg.len {
            skip -= seg.len;
            continue;
        }
        let take = (seg.len - skip).min(into.len() - done);
        // SAFETY: `skip + take <= seg.len`, all of it inside the mapping that `seg` came from; `into` has `take`
        // bytes left from `done` on. A guest that writes meanwhile only changes which bytes are copied.
        unsafe { ptr::copy_nonoverlapping(seg.ptr.add(skip), into.as_mut_ptr().add(done), take) };
        done += take;
        skip = 0;
        if done == into.len() {
            return true;
        }
    }
    done == into.len()
}

/// Copies `from` into guest memory; `false` if there is not enough room.
pub(super) fn copy_out(segs: &[Seg], mut from: &[u8]) -> bool {
    for seg in segs {
        let take = seg.len.min(from.len());
        // SAFETY: `take <= seg.len` bytes inside the mapping that `seg` came from.
        unsafe { ptr::copy_nonoverlapping(from.as_ptr(), seg.ptr, take) };
        from = from.get(take..).unwrap_or_default();
        if from.is_empty() {
            return true;
        }
    }
    from.is_empty()
}

/// Guest memory as the list of slices that disks fill, reused from request to request.
#[derive(Default)]
pub(super) struct Buffers {
    list: Vec<libc::iovec>,
}

// SAFETY: as for `Seg`.
unsafe impl Send for Buffers {}

impl Buffers {
    /// Sets the list to `segs`.
    pub(super) fn set(&mut self, segs: &[Seg]) {
        self.list.clear();
        self.list.extend(segs.iter().map(|seg| libc::iovec { iov_base: seg.ptr.cast(), iov_len: seg.len }));
    }

    /// Total length, bytes.
    pub(super) fn bytes(&self) -> u64 {
        self.list.iter().map(|part| part.iov_len as u64).sum()
    }

    /// Gives the memory to `fill` to be written. `_ram` is what the segments came from.
    pub(super) fn write_to<R>(
        &mut self,
        _ram: &GuestRam,
        fill: impl FnOnce(&mut [IoSliceMut<'_>]) -> R,
    ) -> R {
        // SAFETY: `IoSliceMut` has the layout of an `iovec`, and each part lies inside a mapping that `_ram` keeps.
        // The guest can reach the same bytes, and may name some twice: whoever fills them hands them to the system
        // or copies whole ranges into them, and reads nothing back.
        let slices =
            unsafe { std::slice::from_raw_parts_mut(self.list.as_mut_ptr().cast(), self.list.len()) };
        fill(slices)
    }
}

#[cfg(test)]
mod test {
    use super::*;

    fn file(bytes: u64) -> File {
        let file = tempfile::tempfile().unwrap();
        file.set_len(bytes).unwrap();
        file
    }

    #[test]
    fn bytes_are_found_by_both_addresses_and_runs_end_with_their_region() {
        let file = file(0x10000);
        let ram = GuestRam::default()
            .with(RegionAddr { gpa: 0, size: 0x4000, user: 0x7000_0000, file_offset: 0x2000 }, &file)
            .unwrap()
            .with(RegionAddr { gpa: 0x4000, size: 0x1000, user: 0x9000_0000, file_offset: 0x8000 }, &file)
            .unwrap();
        let seg = ram.run(0x3f00, 0x200).unwrap();
        assert_eq!(seg.len, 0x100);
        let by_user = ram.by_user(0x9000_0010, 4).unwrap();
        assert_eq!(by_user.gpa, 0x4010);
        assert!(copy_out(&[by_user], b"wxyz"));
        let mut back = [0; 4];
        std::os::unix::fs::FileExt::read_exact_at(&file, &mut back, 0x8010).unwrap();
        assert_eq!(&back, b"wxyz");
        assert!(ram.by_user(0x9000_0ff0, 0x20).is_none());
        assert!(ram.run(0x5000, 1).is_none());
    }

    #[test]
    fn regions_that_overlap_wrap_or_exceed_their_file_are_refused() {
        let file = file(0x2000);
        let at = |gpa, size| RegionAddr { gpa, size, user: 0, file_offset: 0 };
        let ram = GuestRam::default().with(at(0x1000, 0x1000), &file).unwrap();
        assert!(ram.with(at(0x1800, 0x1000), &file).is_err());
        assert!(ram.with(at(0x4000, 0x3000), &file).is_err());
        assert!(ram.with(at(u64::MAX - 0x100, 0x1000), &file).is_err());
        assert!(ram.without(0x1000, 0x800).is_none());
        assert!(ram.without(0x1000, 0x1000).is_some());
    }
}
