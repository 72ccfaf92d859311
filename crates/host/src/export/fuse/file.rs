//! The requests of the programs that have the file open.
//!
//! ```text
//!   kernel ──▶ serving thread ── admitted ──▶ done now ────────────────────▶ answer
//!                                   └─ would wait, or flushes ──▶ pool ──▶ answer
//! ```
//!
//! Invariants
//! * A serving thread never waits for another host, a store or a flush. It waits for the volume's limits, and for room
//!   if the data of writes that wait is more than [`WAITING_BYTES_MAX`]; what comes next then stays in the kernel's queue
//!   of this file.
//! * A read that waits holds nothing until a worker has it. Their number is the kernel's business: one for each thread
//!   that reads, and [`BACKGROUND_MAX`] of those that asked for more at a time.
//! * Every request is answered, once; with an error if the disk is not served for as long as a request waits.

use std::cell::RefCell;
use std::ffi::OsStr;
use std::io;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, SystemTime};

use fuser::{
    BsdFileFlags, CopyFileRangeFlags, Errno, FileAttr, FileHandle, FileType, Filesystem, FopenFlags, INodeNo,
    InitFlags, IoctlFlags, KernelConfig, LockOwner, OpenFlags, PollEvents, PollFlags, PollNotifier,
    ReplyAttr, ReplyData, ReplyEmpty, ReplyIoctl, ReplyLseek, ReplyOpen, ReplyPoll, ReplyStatfs, ReplyWrite,
    ReplyXattr, Request, TimeOrNow, WriteFlags,
};
use parking_lot::{Condvar, Mutex};
use whimbrel_engine::export::file::{
    Change, File, Refusal, SECTOR_BYTES, Seek, Zeroing, admit_allocate, admit_change, admit_read,
    admit_write, allocated, sectors, seek,
};

use super::FileOptions;
use super::bytes::{self, Patience};
use super::ranges::Ranges;
use crate::block_dev::BlockDev;
use crate::error::{Error, ErrorKind, Result};
use crate::export::pool::Pool;
use crate::export::slot::{DeviceSlot, Entered};

/// Most bytes of one read or write.
const PAYLOAD_BYTES_MAX: u32 = 1 << 20;
/// Requests of asynchronous clients that the kernel has under way at once.
const BACKGROUND_MAX: u16 = 64;
/// What writes that wait may hold; more only if nothing else waits.
const WAITING_BYTES_MAX: usize = 32 << 20;
/// Threads that flush.
const FLUSHERS: usize = 2;
/// Runs of data and holes that are counted to say how much room the file takes.
const RUNS_MAX: usize = 4096;
/// For how long the kernel may believe what it was told about the file, unless it was written meanwhile.
const ATTRIBUTES_LIMIT: Duration = Duration::from_secs(1);
/// Between two looks whether what is waited for is still wanted.
const POLL: Duration = Duration::from_millis(100);

/// The only handle that there is.
const HANDLE: FileHandle = FileHandle(0);

thread_local! {
    /// Where a serving thread reads to.
    static SCRATCH: RefCell<Vec<u8>> = const { RefCell::new(Vec::new()) };
}

struct Times {
    accessed: SystemTime,
    changed: SystemTime,
}

/// Data of writes that wait.
#[derive(Default)]
struct Room {
    bytes: Mutex<usize>,
    freed: Condvar,
}

/// Room that is taken until this is dropped.
struct Taken {
    served: Arc<Served>,
    bytes: usize,
}

impl Drop for Taken {
    fn drop(&mut self) {
        *self.served.room.bytes.lock() -= self.bytes;
        self.served.room.freed.notify_all();
    }
}

/// What all requests of a file share.
pub(super) struct Served {
    slot: DeviceSlot,
    options: FileOptions,
    uid: u32,
    gid: u32,
    times: Mutex<Times>,
    ranges: Ranges,
    room: Room,
    workers: Pool,
    /// Of their own, so that a flush does not wait behind reads that wait for other hosts.
    flushers: Pool,
    /// Requests that changed the disk, and how many of them are known to be durable.
    changes: AtomicU64,
    durable_changes: AtomicU64,
    stop: AtomicBool,
}

/// Why a request has no good answer.
enum Failure {
    Refused(Refusal),
    Disk(Error),
    /// The disk is not served.
    Absent,
}

impl From<Refusal> for Failure {
    fn from(refusal: Refusal) -> Self {
        Self::Refused(refusal)
    }
}

impl From<Error> for Failure {
    fn from(error: Error) -> Self {
        Self::Disk(error)
    }
}

impl Failure {
    /// The error number that the program sees.
    fn errno(&self) -> Errno {
        match self {
            Self::Refused(Refusal::BehindTheEnd) => Errno::ENOSPC,
            Self::Refused(Refusal::Fixed) => Errno::EPERM,
            Self::Refused(Refusal::ReadOnly) => Errno::EROFS,
            Self::Refused(Refusal::Unsupported) => Errno::EOPNOTSUPP,
            Self::Refused(Refusal::NothingThere) => Errno::ENXIO,
            Self::Disk(error) => {
                tracing::debug!(%error, "a request for a volume's file failed");
                match error.kind() {
                    ErrorKind::NoSpace => Errno::ENOSPC,
                    ErrorKind::InvalidInput => Errno::EINVAL,
                    ErrorKind::Refused => Errno::EPERM,
                    _ => Errno::EIO,
                }
            }
            Self::Absent => Errno::EIO,
        }
    }
}

impl Served {
    pub(super) fn new(slot: DeviceSlot, options: FileOptions) -> Self {
        let now = SystemTime::now();
        Self {
            workers: Pool::new("fuse-wait", options.workers),
            flushers: Pool::new("fuse-flush", FLUSHERS),
            slot,
            options,
            uid: rustix::process::geteuid().as_raw(),
            gid: rustix::process::getegid().as_raw(),
            times: Mutex::new(Times { accessed: now, changed: now }),
            ranges: Ranges::default(),
            room: Room::default(),
            changes: AtomicU64::new(0),
            durable_changes: AtomicU64::new(0),
            stop: AtomicBool::new(false),
        }
    }

    pub(super) fn slot(&self) -> &DeviceSlot {
        &self.slot
    }

    pub(super) fn patience(&self) -> Duration {
        self.options.patience
    }

    /// From now on nothing that waits is begun.
    pub(super) fn stop(&self) {
        self.stop.store(true, Ordering::SeqCst);
        self.room.freed.notify_all();
    }

    fn is_stopping(&self) -> bool {
        self.stop.load(Ordering::SeqCst)
    }

    fn file(&self) -> File {
        File {
            size_bytes: self.slot.size_bytes(),
            read_only: self.options.read_only,
            mode: self.options.mode(),
            uid: self.uid,
            gid: self.gid,
        }
    }

    /// The disk, held against a fence; waits for it if it is not served, up to the patience.
    fn enter(&self) -> Result<Entered<'_>, Failure> {
        let stopping = || self.is_stopping();
        if stopping() {
            return Err(Failure::Absent);
        }
        self.slot.enter_patiently(self.options.disk_patience, stopping).ok_or(Failure::Absent)
    }

    /// The disk for reads, which may take long and hold up no fence.
    fn reader(&self) -> Result<Arc<dyn BlockDev>, Failure> {
        loop {
            drop(self.enter()?);
            // Gone between the two: its next coming is waited for as well.
            if let Some(reader) = self.slot.reader() {
                return Ok(reader);
            }
        }
    }

    /// Takes room for the data of a write that will wait.
    fn take_room(self: &Arc<Self>, bytes: usize) -> Taken {
        let mut taken = self.room.bytes.lock();
        while *taken > 0 && *taken + bytes > WAITING_BYTES_MAX && !self.is_stopping() {
            self.room.freed.wait_for(&mut taken, POLL);
        }
        *taken += bytes;
        drop(taken);
        Taken { served: self.clone(), bytes }
    }

    /// Waits until the volume's limits let another request of so many bytes in.
    fn pace(&self, bytes: u64) {
        let pacer = self.slot.pacer();
        while let Some(wait) = pacer.wait()
            && !self.is_stopping()
        {
            std::thread::sleep(wait.min(POLL));
        }
        pacer.charge(bytes);
    }

    fn note_change(&self) {
        self.times.lock().changed = SystemTime::now();
        self.changes.fetch_add(1, Ordering::SeqCst);
    }

    /// Whether nothing changed since a flush.
    fn is_clean(&self) -> bool {
        self.durable_changes.load(Ordering::SeqCst) >= self.changes.load(Ordering::SeqCst)
    }

    /// Makes durable what was answered.
    fn flush(&self) -> Result<(), Failure> {
        let changes = self.changes.load(Ordering::SeqCst);
        let needless = || self.is_stopping() || self.slot.is_durable();
        match self.slot.enter_patiently(self.options.disk_patience, needless) {
            Some(device) => device.flush()?,
            // It is fenced, and nothing is left to make durable.
            None if self.slot.is_durable() => {}
            None => return Err(Failure::Absent),
        }
        self.durable_changes.fetch_max(changes, Ordering::SeqCst);
        Ok(())
    }

    /// Tries to write without waiting; `false`: it must be handed on.
    fn write_now(&self, offset: u64, data: &[u8]) -> Result<bool, Failure> {
        let around = sectors(&(offset..offset + data.len() as u64));
        let Some(_held) = self.ranges.try_hold(&around, !is_whole(offset, data.len())) else {
            return Ok(false);
        };
        let Some(device) = self.slot.enter() else { return Ok(false) };
        Ok(bytes::write(&*device, offset, data, Patience::None)?)
    }

    fn write(&self, offset: u64, data: &[u8]) -> Result<(), Failure> {
        let around = sectors(&(offset..offset + data.len() as u64));
        let alone = !is_whole(offset, data.len());
        let held = self.ranges.hold(&around, alone, || self.is_stopping());
        let _held = held.ok_or(Failure::Absent)?;
        bytes::write(&*self.enter()?, offset, data, Patience::Waits)?;
        Ok(())
    }

    fn zero(&self, range: Range<u64>, how: Zeroing) -> Result<(), Failure> {
        if range.is_empty() {
            return Ok(());
        }
        let around = sectors(&range);
        let held = self.ranges.hold(&around, around != range, || self.is_stopping());
        let _held = held.ok_or(Failure::Absent)?;
        bytes::zero(&*self.enter()?, range, how)?;
        self.note_change();
        Ok(())
    }

    /// Reads without waiting into the thread's scratch buffer, and answers; gives the reply back if it must be handed
    /// on.
    fn read_now(&self, range: &Range<u64>, reply: ReplyData) -> Option<ReplyData> {
        let Some(device) = self.slot.enter() else { return Some(reply) };
        SCRATCH.with_borrow_mut(|buffer| match bytes::read(&*device, range, buffer, Patience::None) {
            Ok(Some(part)) => {
                reply.data(buffer.get(part).unwrap_or_default());
                None
            }
            Ok(None) => Some(reply),
            Err(error) => {
                reply.error(Failure::Disk(error).errno());
                None
            }
        })
    }

    fn read(&self, range: &Range<u64>) -> Result<(Vec<u8>, Range<usize>), Failure> {
        let device = self.reader()?;
        let mut buffer = Vec::new();
        let part = bytes::read(&*device, range, &mut buffer, Patience::Waits)?;
        Ok((buffer, part.unwrap_or_default()))
    }

    fn seek(&self, offset: u64, what: Seek) -> Result<u64, Failure> {
        let device = self.reader()?;
        let found = seek(&self.file(), offset, what, |at| {
            if self.is_stopping() {
                return Err(Failure::Absent);
            }
            let extent = device.extent(at)?;
            Ok((extent.length, extent.data))
        })?;
        Ok(found?)
    }

    /// Bytes of the file that take room, as far as that is cheaply known; never too few.
    fn allocated_bytes(&self) -> u64 {
        let file = self.file();
        let Some(device) = self.slot.reader() else { return file.size_bytes };
        let count =
            allocated(&file, RUNS_MAX, |at| device.extent(at).map(|extent| (extent.length, extent.data)));
        count.unwrap_or_else(|error| {
            tracing::debug!(%error, "count what a volume's file takes");
            file.size_bytes
        })
    }

    fn attributes(&self) -> FileAttr {
        let file = self.file();
        let times = self.times.lock();
        let (accessed, changed) = (times.accessed, times.changed);
        drop(times);
        FileAttr {
            ino: INodeNo::ROOT,
            size: file.size_bytes,
            blocks: self.allocated_bytes().div_ceil(SECTOR_BYTES),
            atime: accessed,
            mtime: changed,
            ctime: changed,
            crtime: changed,
            kind: FileType::RegularFile,
            perm: file.mode as u16,
            nlink: 1,
            uid: file.uid,
            gid: file.gid,
            rdev: 0,
            blksize: 4096,
            flags: 0,
        }
    }
}

fn is_whole(offset: u64, length: usize) -> bool {
    offset.is_multiple_of(SECTOR_BYTES) && (length as u64).is_multiple_of(SECTOR_BYTES)
}

fn answer(reply: ReplyEmpty, result: Result<(), Failure>) {
    match result {
        Ok(()) => reply.ok(),
        Err(failure) => reply.error(failure.errno()),
    }
}

/// The file, as the kernel's library wants it.
pub(super) struct DiskFile(pub(super) Arc<Served>);

impl DiskFile {
    /// Answers a write that was done: at once, or when it is durable.
    fn written(served: &Arc<Served>, length: u32, durable: bool, reply: ReplyWrite) {
        served.note_change();
        if !durable {
            return reply.written(length);
        }
        let flush = served.clone();
        served.flushers.submit(move || match flush.flush() {
            Ok(()) => reply.written(length),
            Err(failure) => reply.error(failure.errno()),
        });
    }

    fn flush_then(&self, reply: ReplyEmpty) {
        let served = self.0.clone();
        self.0.flushers.submit(move || answer(reply, served.flush()));
    }
}

impl Filesystem for DiskFile {
    fn init(&mut self, _req: &Request, config: &mut KernelConfig) -> io::Result<()> {
        // What an older kernel lacks it does without: files are then not mapped to be written, and clients of
        // asynchronous I/O wait for each request.
        for wanted in [InitFlags::FUSE_ASYNC_DIO, InitFlags::FUSE_DIRECT_IO_ALLOW_MMAP] {
            if let Err(missing) = config.add_capabilities(wanted) {
                tracing::debug!(?missing, "this kernel's FUSE lacks something");
            }
        }
        // Both are below what the library takes, so that neither is refused.
        let _ = config.set_max_write(PAYLOAD_BYTES_MAX);
        let _ = config.set_max_background(BACKGROUND_MAX);
        Ok(())
    }

    fn getattr(&self, _req: &Request, _ino: INodeNo, _fh: Option<FileHandle>, reply: ReplyAttr) {
        reply.attr(&ATTRIBUTES_LIMIT, &self.0.attributes());
    }

    fn setattr(
        &self,
        _req: &Request,
        _ino: INodeNo,
        mode: Option<u32>,
        uid: Option<u32>,
        gid: Option<u32>,
        size: Option<u64>,
        accessed: Option<TimeOrNow>,
        changed: Option<TimeOrNow>,
        _ctime: Option<SystemTime>,
        _fh: Option<FileHandle>,
        _crtime: Option<SystemTime>,
        _chgtime: Option<SystemTime>,
        _bkuptime: Option<SystemTime>,
        _flags: Option<BsdFileFlags>,
        reply: ReplyAttr,
    ) {
        let change = Change { size_bytes: size, mode, uid, gid };
        if let Err(refusal) = admit_change(&self.0.file(), &change) {
            return reply.error(Failure::from(refusal).errno());
        }
        let moment = |time| match time {
            TimeOrNow::SpecificTime(time) => time,
            TimeOrNow::Now => SystemTime::now(),
        };
        let mut times = self.0.times.lock();
        times.accessed = accessed.map_or(times.accessed, moment);
        times.changed = changed.map_or(times.changed, moment);
        drop(times);
        reply.attr(&ATTRIBUTES_LIMIT, &self.0.attributes());
    }

    fn open(&self, _req: &Request, _ino: INodeNo, _flags: OpenFlags, reply: ReplyOpen) {
        reply.opened(HANDLE, FopenFlags::FOPEN_DIRECT_IO | FopenFlags::FOPEN_PARALLEL_DIRECT_WRITES);
    }

    fn read(
        &self,
        _req: &Request,
        _ino: INodeNo,
        _fh: FileHandle,
        offset: u64,
        size: u32,
        _flags: OpenFlags,
        _lock_owner: Option<LockOwner>,
        reply: ReplyData,
    ) {
        let range = admit_read(&self.0.file(), offset, u64::from(size));
        if range.is_empty() {
            return reply.data(&[]);
        }
        self.0.pace(range.end - range.start);
        let Some(reply) = self.0.read_now(&range, reply) else { return };
        let served = self.0.clone();
        self.0.workers.submit(move || match served.read(&range) {
            Ok((buffer, part)) => reply.data(buffer.get(part).unwrap_or_default()),
            Err(failure) => reply.error(failure.errno()),
        });
    }

    fn write(
        &self,
        _req: &Request,
        _ino: INodeNo,
        _fh: FileHandle,
        offset: u64,
        data: &[u8],
        _write_flags: WriteFlags,
        flags: OpenFlags,
        _lock_owner: Option<LockOwner>,
        reply: ReplyWrite,
    ) {
        let range = match admit_write(&self.0.file(), offset, data.len() as u64) {
            Ok(range) => range,
            Err(refusal) => return reply.error(Failure::from(refusal).errno()),
        };
        let length = (range.end - range.start) as u32;
        let data = data.get(..length as usize).unwrap_or_default();
        self.0.pace(u64::from(length));
        // `O_SYNC` has this bit too.
        let durable = flags.0 & libc::O_DSYNC != 0;
        match self.0.write_now(offset, data) {
            Ok(true) => return Self::written(&self.0, length, durable, reply),
            Ok(false) => {}
            Err(failure) => return reply.error(failure.errno()),
        }
        let taken = self.0.take_room(data.len());
        let (served, data) = (self.0.clone(), data.to_vec());
        self.0.workers.submit(move || {
            let result = served.write(offset, &data);
            drop((data, taken));
            match result {
                Ok(()) => Self::written(&served, length, durable, reply),
                Err(failure) => reply.error(failure.errno()),
            }
        });
    }

    /// A program closes the file: what is not durable yet becomes so, as its last chance to hear of an error.
    fn flush(
        &self,
        _req: &Request,
        _ino: INodeNo,
        _fh: FileHandle,
        _lock_owner: LockOwner,
        reply: ReplyEmpty,
    ) {
        if self.0.is_clean() {
            return reply.ok();
        }
        self.flush_then(reply);
    }

    fn fsync(&self, _req: &Request, _ino: INodeNo, _fh: FileHandle, _datasync: bool, reply: ReplyEmpty) {
        self.flush_then(reply);
    }

    fn fallocate(
        &self,
        _req: &Request,
        _ino: INodeNo,
        _fh: FileHandle,
        offset: u64,
        length: u64,
        mode: i32,
        reply: ReplyEmpty,
    ) {
        match admit_allocate(&self.0.file(), mode as u32, offset, length) {
            Ok((how, range)) => {
                self.0.pace(0);
                let served = self.0.clone();
                self.0.workers.submit(move || answer(reply, served.zero(range, how)));
            }
            Err(refusal) => reply.error(Failure::from(refusal).errno()),
        }
    }

    fn lseek(
        &self,
        _req: &Request,
        _ino: INodeNo,
        _fh: FileHandle,
        offset: i64,
        whence: i32,
        reply: ReplyLseek,
    ) {
        let what = match whence {
            libc::SEEK_DATA => Seek::Data,
            libc::SEEK_HOLE => Seek::Hole,
            // The kernel does the others by itself.
            _ => return reply.error(Errno::EINVAL),
        };
        let Ok(offset) = u64::try_from(offset) else { return reply.error(Errno::ENXIO) };
        let served = self.0.clone();
        self.0.workers.submit(move || match served.seek(offset, what) {
            Ok(found) => reply.offset(found as i64),
            Err(failure) => reply.error(failure.errno()),
        });
    }

    fn statfs(&self, _req: &Request, _ino: INodeNo, reply: ReplyStatfs) {
        let size = self.0.slot.size_bytes() / SECTOR_BYTES;
        let free = size.saturating_sub(self.0.allocated_bytes().div_ceil(SECTOR_BYTES));
        reply.statfs(size, free, free, 1, 0, 4096, 255, SECTOR_BYTES as u32);
    }

    // Programs try what a file may not have; the library would log each of these. The kernel remembers `ENOSYS`, and does
    // what can be done without.

    fn getxattr(&self, _req: &Request, _ino: INodeNo, _name: &OsStr, _size: u32, reply: ReplyXattr) {
        reply.error(Errno::ENOSYS);
    }

    fn listxattr(&self, _req: &Request, _ino: INodeNo, _size: u32, reply: ReplyXattr) {
        reply.error(Errno::ENOSYS);
    }

    fn setxattr(
        &self,
        _req: &Request,
        _ino: INodeNo,
        _name: &OsStr,
        _value: &[u8],
        _flags: i32,
        _position: u32,
        reply: ReplyEmpty,
    ) {
        reply.error(Errno::ENOSYS);
    }

    fn removexattr(&self, _req: &Request, _ino: INodeNo, _name: &OsStr, reply: ReplyEmpty) {
        reply.error(Errno::ENOSYS);
    }

    fn ioctl(
        &self,
        _req: &Request,
        _ino: INodeNo,
        _fh: FileHandle,
        _flags: IoctlFlags,
        _command: u32,
        _data: &[u8],
        _out_size: u32,
        reply: ReplyIoctl,
    ) {
        reply.error(Errno::ENOTTY);
    }

    fn poll(
        &self,
        _req: &Request,
        _ino: INodeNo,
        _fh: FileHandle,
        _notifier: PollNotifier,
        _events: PollEvents,
        _flags: PollFlags,
        reply: ReplyPoll,
    ) {
        reply.error(Errno::ENOSYS);
    }

    fn copy_file_range(
        &self,
        _req: &Request,
        _ino_in: INodeNo,
        _fh_in: FileHandle,
        _offset_in: u64,
        _ino_out: INodeNo,
        _fh_out: FileHandle,
        _offset_out: u64,
        _length: u64,
        _flags: CopyFileRangeFlags,
        reply: ReplyWrite,
    ) {
        reply.error(Errno::ENOSYS);
    }
}
