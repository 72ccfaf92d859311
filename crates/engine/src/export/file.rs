//! A disk as a file: what a request of a program that only knows files may do to it.
//!
//! ```text
//!   bytes a program names ──▶ admit_* : clipped at the end, or refused
//!                                │
//!                                ▼
//!            sectors, cut : whole sectors, and bytes at the edges that are read, changed and written back
//! ```
//!
//! Invariants
//! * The file has the disk's size, always: nothing that is admitted reaches behind it, or changes it.
//! * Bytes that a request does not name keep their content.
//!
//! Not here: how the requests come (`host::export::fuse`).

#[cfg(test)]
mod test;

use std::ops::Range;

/// What a disk reads and writes at least, bytes.
pub const SECTOR_BYTES: u64 = 512;

/// `fallocate(2)`: the size stays.
const KEEP_SIZE: u32 = 1;
/// `fallocate(2)`: the range becomes a hole.
const PUNCH_HOLE: u32 = 2;
/// `fallocate(2)`: the range becomes zeros.
const ZERO_RANGE: u32 = 0x10;

/// Bits of a file's mode that are permissions.
const PERMISSIONS: u32 = 0o7777;

/// The file as it is now.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct File {
    /// The disk's size, bytes.
    pub size_bytes: u64,
    /// Whether it may only be read.
    pub read_only: bool,
    /// Permission bits.
    pub mode: u32,
    /// Its user.
    pub uid: u32,
    /// Its group.
    pub gid: u32,
}

/// Why a request is not carried out; each is one error number.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Refusal {
    /// `ENOSPC`: it is about bytes behind the end, and the file does not grow.
    BehindTheEnd,
    /// `EPERM`: size, owner and mode are not to be changed.
    Fixed,
    /// `EROFS`.
    ReadOnly,
    /// `EOPNOTSUPP`.
    Unsupported,
    /// `ENXIO`: there is nothing of what is looked for.
    NothingThere,
}

/// Changes of attributes that a program asks for; `None`: leave as it is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Change {
    /// A new size, bytes.
    pub size_bytes: Option<u64>,
    /// A new mode.
    pub mode: Option<u32>,
    /// A new user.
    pub uid: Option<u32>,
    /// A new group.
    pub gid: Option<u32>,
}

/// How a range becomes zeros.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Zeroing {
    /// Its content does not matter any more.
    Discard,
    /// It is to read as zeros.
    Zeroes,
}

/// What is looked for in the file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Seek {
    /// The next byte that may not be a zero.
    Data,
    /// The next hole; the end of the file is one.
    Hole,
}

/// The bytes that a read brings: less than asked for at the end, as of every file.
pub fn admit_read(file: &File, offset: u64, length: u64) -> Range<u64> {
    let end = offset.saturating_add(length).min(file.size_bytes);
    offset.min(end)..end
}

/// The bytes that a write changes: those before the end; there must be one, as on a disk.
pub fn admit_write(file: &File, offset: u64, length: u64) -> Result<Range<u64>, Refusal> {
    if file.read_only {
        return Err(Refusal::ReadOnly);
    }
    let range = admit_read(file, offset, length);
    if range.is_empty() && length > 0 {
        return Err(Refusal::BehindTheEnd);
    }
    Ok(range)
}

/// What `fallocate` with `mode` does; nothing with a range that is empty.
///
/// To reserve room (mode 0) is refused: a volume gives its space to whoever writes first.
pub fn admit_allocate(
    file: &File,
    mode: u32,
    offset: u64,
    length: u64,
) -> Result<(Zeroing, Range<u64>), Refusal> {
    let range = admit_read(file, offset, length);
    let how = match mode {
        _ if file.read_only => return Err(Refusal::ReadOnly),
        _ if mode == PUNCH_HOLE | KEEP_SIZE => Zeroing::Discard,
        _ if mode == ZERO_RANGE | KEEP_SIZE => Zeroing::Zeroes,
        ZERO_RANGE if offset.saturating_add(length) > file.size_bytes => return Err(Refusal::BehindTheEnd),
        ZERO_RANGE => Zeroing::Zeroes,
        _ => return Err(Refusal::Unsupported),
    };
    Ok((how, range))
}

/// Whether attributes may be set so: to what they are.
pub fn admit_change(file: &File, change: &Change) -> Result<(), Refusal> {
    let Change { size_bytes, mode, uid, gid } = *change;
    let same = size_bytes.is_none_or(|size| size == file.size_bytes)
        && mode.is_none_or(|mode| mode & PERMISSIONS == file.mode)
        && uid.is_none_or(|uid| uid == file.uid)
        && gid.is_none_or(|gid| gid == file.gid);
    if same { Ok(()) } else { Err(Refusal::Fixed) }
}

/// The whole sectors that hold `range`.
pub fn sectors(range: &Range<u64>) -> Range<u64> {
    if range.is_empty() {
        let at = range.start / SECTOR_BYTES * SECTOR_BYTES;
        return at..at;
    }
    range.start / SECTOR_BYTES * SECTOR_BYTES..range.end.next_multiple_of(SECTOR_BYTES)
}

/// A range cut at sectors: `head` and `tail` are parts of one sector each, and may be empty as `whole` may.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Cut {
    /// What lies before the first whole sector.
    pub head: Range<u64>,
    /// Whole sectors.
    pub whole: Range<u64>,
    /// What lies behind the last whole sector.
    pub tail: Range<u64>,
}

/// Cuts `range` at sectors.
pub fn cut(range: Range<u64>) -> Cut {
    let Range { start, end } = range;
    let first = start.next_multiple_of(SECTOR_BYTES);
    let last = end / SECTOR_BYTES * SECTOR_BYTES;
    if first > last {
        // All of it lies inside one sector.
        return Cut { head: start..end, whole: end..end, tail: end..end };
    }
    Cut { head: start..first, whole: first..last, tail: last..end }
}

/// Where the next data or hole begins at `offset` or behind it. `extent` says how long the run at a place is, and
/// whether it is data.
pub fn seek<E>(
    file: &File,
    offset: u64,
    what: Seek,
    mut extent: impl FnMut(u64) -> Result<(u64, bool), E>,
) -> Result<Result<u64, Refusal>, E> {
    let mut at = offset;
    while at < file.size_bytes {
        let (length, data) = extent(at)?;
        if data == (what == Seek::Data) {
            return Ok(Ok(at));
        }
        at = at.saturating_add(length.max(1));
    }
    let end_is_a_hole = what == Seek::Hole && offset < file.size_bytes;
    Ok(if end_is_a_hole { Ok(file.size_bytes) } else { Err(Refusal::NothingThere) })
}

/// Bytes of the file that are data, counted over `runs_max` runs; what lies behind them counts as data. Never zero where
/// there is a byte of data: there are programs that take a file without blocks for a file of zeros.
pub fn allocated<E>(
    file: &File,
    runs_max: usize,
    mut extent: impl FnMut(u64) -> Result<(u64, bool), E>,
) -> Result<u64, E> {
    let (mut at, mut found) = (0u64, 0u64);
    for _ in 0..runs_max {
        if at >= file.size_bytes {
            return Ok(found);
        }
        let (length, data) = extent(at)?;
        let length = length.clamp(1, file.size_bytes - at);
        at += length;
        found += if data { length } else { 0 };
    }
    Ok(found + file.size_bytes.saturating_sub(at))
}
