//! userfaultfd(2) and `PAGEMAP_SCAN`: the kernel's structures and calls, as thin as they get.
//!
//! No crate offers the asynchronous write-protection of kernel 6.7; the few ioctls are spelled here.
//!
//! Invariant: a range belongs to one userfaultfd at a time; registering it at a second one fails with `EBUSY`.
//!
//! Not here: whose userfaultfd it is (`inject`), what the pages mean (`dirty`).
#![expect(unsafe_code, reason = "ioctls with structures of the kernel")]

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

/// Write faults are told apart from others.
pub const FEATURE_PAGEFAULT_FLAG_WP: u64 = 1 << 0;
/// Missing pages of shared memory.
pub const FEATURE_MISSING_SHMEM: u64 = 1 << 5;
/// Write-protection of shared memory and huge pages.
pub const FEATURE_WP_HUGETLBFS_SHMEM: u64 = 1 << 12;
/// Write-protection of pages that are not there yet.
pub const FEATURE_WP_UNPOPULATED: u64 = 1 << 13;
/// The kernel lifts write-protection by itself and remembers (6.7).
pub const FEATURE_WP_ASYNC: u64 = 1 << 15;
/// All that write tracking needs.
pub const TRACKING_FEATURES: u64 =
    FEATURE_PAGEFAULT_FLAG_WP | FEATURE_WP_HUGETLBFS_SHMEM | FEATURE_WP_UNPOPULATED | FEATURE_WP_ASYNC;

/// All that serving write faults needs.
pub const FAULT_FEATURES: u64 =
    FEATURE_PAGEFAULT_FLAG_WP | FEATURE_WP_HUGETLBFS_SHMEM | FEATURE_WP_UNPOPULATED;

/// `UFFD_USER_MODE_ONLY`: faults of the kernel on behalf of the process are not served. Needs no privilege.
pub const USER_MODE_ONLY: i32 = 1;
/// `USERFAULTFD_IOC_NEW` on /dev/userfaultfd.
pub const IOC_NEW: u64 = 0xaa00;

const API: u64 = 0xaa;
const UFFDIO_API: u64 = 0xc018_aa3f;
const UFFDIO_REGISTER: u64 = 0xc020_aa00;
const UFFDIO_UNREGISTER: u64 = 0x8010_aa01;
const UFFDIO_WAKE: u64 = 0x8010_aa02;
const UFFDIO_WRITEPROTECT: u64 = 0xc018_aa06;
const REGISTER_MODE_WP: u64 = 1 << 1;
const WRITEPROTECT_MODE_WP: u64 = 1 << 0;
const EVENT_PAGEFAULT: u8 = 0x12;
const PAGEMAP_SCAN: u64 = 0xc060_6610;

/// Write-protect the pages that are returned.
const PM_SCAN_WP_MATCHING: u64 = 1 << 0;
/// Refuse ranges that are not registered for asynchronous write-protection.
const PM_SCAN_CHECK_WPASYNC: u64 = 1 << 1;
const PAGE_IS_WRITTEN: u64 = 1 << 1;

#[repr(C)]
struct ApiArg {
    api: u64,
    features: u64,
    ioctls: u64,
}

#[repr(C)]
struct RangeArg {
    start: u64,
    length: u64,
}

#[repr(C)]
struct RegisterArg {
    range: RangeArg,
    mode: u64,
    ioctls: u64,
}

#[repr(C)]
struct WriteprotectArg {
    range: RangeArg,
    mode: u64,
}

/// `struct uffd_msg`, of which only page faults are asked for.
#[repr(C)]
#[derive(Clone, Copy, Default)]
struct Message {
    event: u8,
    reserved: [u8; 7],
    flags: u64,
    address: u64,
    thread: u64,
}

/// `struct pm_scan_arg`.
#[repr(C)]
#[derive(Default)]
struct ScanArg {
    size: u64,
    flags: u64,
    start: u64,
    end: u64,
    walk_end: u64,
    vec: u64,
    vec_len: u64,
    max_pages: u64,
    category_inverted: u64,
    category_mask: u64,
    category_anyof_mask: u64,
    return_mask: u64,
}

/// `struct page_region`: addresses of the process, from `start` up to `end`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Region {
    /// First byte.
    pub start: u64,
    /// Byte after the last one.
    pub end: u64,
    /// What holds for its pages.
    pub categories: u64,
}

/// # Safety
/// `argument` is the structure that `request` takes.
unsafe fn ioctl<T>(fd: BorrowedFd<'_>, request: u64, argument: &mut T) -> io::Result<i64> {
    // SAFETY: by the caller; the reference lives for the call.
    let result = unsafe { libc::ioctl(fd.as_raw_fd(), request, std::ptr::from_mut(argument)) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(i64::from(result)) }
}

/// A userfaultfd of this process; the kernel, then /dev/userfaultfd, is asked for one that serves kernel faults,
/// and at last for one that does not.
pub fn create_here() -> io::Result<OwnedFd> {
    let flags = libc::O_CLOEXEC | libc::O_NONBLOCK;
    let call = |flags: i32| {
        // SAFETY: takes an integer, returns a new descriptor that nobody else owns.
        let fd = unsafe { libc::syscall(libc::SYS_userfaultfd, flags) };
        match i32::try_from(fd) {
            // SAFETY: see above.
            Ok(fd) if fd >= 0 => Ok(unsafe { OwnedFd::from_raw_fd(fd) }),
            _ => Err(io::Error::last_os_error()),
        }
    };
    call(flags).or_else(|_| call(flags | USER_MODE_ONLY))
}

/// Agrees on `features`; each descriptor does this once. Fails with `EINVAL` if the kernel lacks one of them.
pub fn enable(fd: BorrowedFd<'_>, features: u64) -> io::Result<()> {
    let mut argument = ApiArg { api: API, features, ioctls: 0 };
    // SAFETY: UFFDIO_API takes a `struct uffdio_api`.
    unsafe { ioctl(fd, UFFDIO_API, &mut argument) }.map(drop)
}

/// Registers a range of the descriptor's process for write-protection.
pub fn register_wp(fd: BorrowedFd<'_>, start: u64, length: u64) -> io::Result<()> {
    let mut argument = RegisterArg { range: RangeArg { start, length }, mode: REGISTER_MODE_WP, ioctls: 0 };
    // SAFETY: UFFDIO_REGISTER takes a `struct uffdio_register`.
    unsafe { ioctl(fd, UFFDIO_REGISTER, &mut argument) }.map(drop)
}

/// Undoes a registration; write-protection of its pages is lifted.
pub fn unregister(fd: BorrowedFd<'_>, start: u64, length: u64) -> io::Result<()> {
    let mut argument = RangeArg { start, length };
    // SAFETY: UFFDIO_UNREGISTER takes a `struct uffdio_range`.
    unsafe { ioctl(fd, UFFDIO_UNREGISTER, &mut argument) }.map(drop)
}

/// Write-protects the pages of a registered range, or opens them and lets whoever waits for one of them go on.
pub fn write_protect(fd: BorrowedFd<'_>, start: u64, length: u64, protect: bool) -> io::Result<()> {
    let mode = if protect { WRITEPROTECT_MODE_WP } else { 0 };
    loop {
        let mut argument = WriteprotectArg { range: RangeArg { start, length }, mode };
        // SAFETY: UFFDIO_WRITEPROTECT takes a `struct uffdio_writeprotect`.
        match unsafe { ioctl(fd, UFFDIO_WRITEPROTECT, &mut argument) } {
            // The process changes its mappings at this moment; nothing was done.
            Err(error) if error.raw_os_error() == Some(libc::EAGAIN) => std::thread::yield_now(),
            other => return other.map(drop),
        }
    }
}

/// Lets whoever waits for a page of a range look again.
pub fn wake(fd: BorrowedFd<'_>, start: u64, length: u64) -> io::Result<()> {
    let mut argument = RangeArg { start, length };
    // SAFETY: UFFDIO_WAKE takes a `struct uffdio_range`.
    unsafe { ioctl(fd, UFFDIO_WAKE, &mut argument) }.map(drop)
}

/// At most so many faults are taken at once.
pub const FAULTS_MAX: usize = 16;

/// The addresses of faults that wait to be served; none if none waits (the descriptor does not block).
pub fn read_faults(fd: BorrowedFd<'_>) -> io::Result<Vec<u64>> {
    let mut messages = [Message::default(); FAULTS_MAX];
    let size = size_of_val(&messages);
    // SAFETY: the kernel writes at most `size` bytes, whole messages, into the array that is borrowed for the call; any
    // bytes are a value of it.
    let length = unsafe { libc::read(fd.as_raw_fd(), messages.as_mut_ptr().cast(), size) };
    match usize::try_from(length) {
        Ok(length) => {
            let count = length / size_of::<Message>();
            let faults = messages.iter().take(count).filter(|message| message.event == EVENT_PAGEFAULT);
            Ok(faults.map(|message| message.address).collect())
        }
        Err(_) => match io::Error::last_os_error() {
            error if matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted) => {
                Ok(Vec::new())
            }
            error => Err(error),
        },
    }
}

/// Finds pages written since they were last write-protected, and write-protects them again, in one step.
///
/// `pagemap` is `/proc/PID/pagemap`. Fills `into` with up to its length of regions; returns how many, and where
/// the walk ended: call again from there until it is `end`.
pub fn scan_written(
    pagemap: BorrowedFd<'_>,
    start: u64,
    end: u64,
    into: &mut [Region],
) -> io::Result<(usize, u64)> {
    let mut argument = ScanArg {
        size: size_of::<ScanArg>() as u64,
        flags: PM_SCAN_WP_MATCHING | PM_SCAN_CHECK_WPASYNC,
        start,
        end,
        vec: into.as_mut_ptr() as u64,
        vec_len: into.len() as u64,
        category_mask: PAGE_IS_WRITTEN,
        return_mask: PAGE_IS_WRITTEN,
        ..ScanArg::default()
    };
    // SAFETY: PAGEMAP_SCAN takes a `struct pm_scan_arg`; `vec` points to `vec_len` regions, borrowed for the call.
    let count = unsafe { ioctl(pagemap, PAGEMAP_SCAN, &mut argument) }?;
    Ok((usize::try_from(count).unwrap_or(0).min(into.len()), argument.walk_end))
}

/// Tries write tracking on a few pages of shared memory of this process: whether the kernel has all of it, and
/// whether we may.
pub fn probe_tracking() -> io::Result<()> {
    use rustix::fs::{MemfdFlags, ftruncate, memfd_create};
    use rustix::mm::{MapFlags, ProtFlags, mmap, munmap};
    use std::os::fd::AsFd;
    const PAGES: usize = 4;
    const PAGE: usize = 4096;
    let memory = memfd_create("whimbrel-probe", MemfdFlags::CLOEXEC)?;
    ftruncate(&memory, (PAGES * PAGE) as u64)?;
    let protection = ProtFlags::READ | ProtFlags::WRITE;
    // SAFETY: a new mapping at an address of the kernel's choice; unmapped below, used by nobody else.
    let base = unsafe { mmap(std::ptr::null_mut(), PAGES * PAGE, protection, MapFlags::SHARED, &memory, 0) }?;
    let start = base as u64;
    let end = start + (PAGES * PAGE) as u64;
    let attempt = || {
        let uffd = create_here()?;
        enable(uffd.as_fd(), TRACKING_FEATURES)?;
        register_wp(uffd.as_fd(), start, end - start)?;
        let pagemap = std::fs::File::open("/proc/self/pagemap")?;
        let mut regions = [Region::default(); PAGES];
        // SAFETY: within the mapping, which nobody else uses.
        let touch = |page: usize| unsafe { base.cast::<u8>().add(page * PAGE).write_volatile(1) };
        touch(1);
        touch(2);
        scan_written(pagemap.as_fd(), start, end, &mut regions)?;
        touch(2);
        let (count, _) = scan_written(pagemap.as_fd(), start, end, &mut regions)?;
        let written = start + 2 * PAGE as u64;
        match regions.get(..count) {
            Some([one]) if one.start == written && one.end == written + PAGE as u64 => Ok(()),
            other => Err(io::Error::other(format!("the kernel tracks writes wrongly: {other:x?}"))),
        }
    };
    let result = attempt();
    // SAFETY: mapped above; nothing refers to it any more.
    unsafe { munmap(base, PAGES * PAGE) }?;
    result
}

#[cfg(test)]
mod test {
    use super::*;

    #[test]
    fn tracking_is_there_or_the_error_says_what_is_missing() {
        let release = rustix::system::uname().release().to_string_lossy().into_owned();
        let mut numbers = release.split(['.', '-']).map_while(|part| part.parse::<u32>().ok());
        let version = (numbers.next().unwrap_or(0), numbers.next().unwrap_or(0));
        match probe_tracking() {
            Ok(()) => assert!(version >= (6, 7), "{release}"),
            Err(error) => assert!(version < (6, 7), "{release}: {error}"),
        }
    }
}
