//! Bytes anywhere on a disk that knows whole sectors.
//!
//! Invariant: a sector that is written in part keeps its other bytes, if its caller holds it alone (`ranges`).

use std::io::{IoSlice, IoSliceMut};
use std::ops::Range;

use whimbrel_engine::export::file::{SECTOR_BYTES, Zeroing, cut, sectors};

use crate::block_dev::BlockDev;
use crate::error::Result;

const SECTOR: usize = SECTOR_BYTES as usize;

/// Whether a call may wait for another host or a store.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Patience {
    /// It returns `false`, having done nothing, where it would have to.
    None,
    Waits,
}

fn read_sectors(device: &dyn BlockDev, offset: u64, into: &mut [u8], patience: Patience) -> Result<bool> {
    let mut into = [IoSliceMut::new(into)];
    match patience {
        Patience::None => device.read_now(offset, &mut into),
        Patience::Waits => device.read(offset, &mut into).map(|()| true),
    }
}

/// Reads `range` into the buffer, which becomes large enough; says where in the buffer it is.
pub(super) fn read(
    device: &dyn BlockDev,
    range: &Range<u64>,
    buffer: &mut Vec<u8>,
    patience: Patience,
) -> Result<Option<Range<usize>>> {
    let around = sectors(range);
    let length = (around.end - around.start) as usize;
    if buffer.len() < length {
        buffer.resize(length, 0);
    }
    let room = buffer.get_mut(..length).unwrap_or_default();
    let skip = (range.start - around.start) as usize;
    let done = read_sectors(device, around.start, room, patience)?;
    Ok(done.then(|| skip..skip + (range.end - range.start) as usize))
}

/// Writes `data` at `offset`.
pub(super) fn write(device: &dyn BlockDev, offset: u64, data: &[u8], patience: Patience) -> Result<bool> {
    let end = offset + data.len() as u64;
    let around = sectors(&(offset..end));
    let (before, after) = ((offset - around.start) as usize, (around.end - end) as usize);
    let (mut first, mut last) = ([0; SECTOR], [0; SECTOR]);
    if before > 0 && !read_sectors(device, around.start, &mut first, patience)? {
        return Ok(false);
    }
    if after > 0 && !read_sectors(device, around.end - SECTOR_BYTES, &mut last, patience)? {
        return Ok(false);
    }
    let parts =
        [first.get(..before).unwrap_or_default(), data, last.get(SECTOR - after..).unwrap_or_default()];
    let mut slices = [IoSlice::new(&[]), IoSlice::new(&[]), IoSlice::new(&[])];
    let mut used = 0;
    for (slice, part) in slices.iter_mut().zip(parts.into_iter().filter(|part| !part.is_empty())) {
        *slice = IoSlice::new(part);
        used += 1;
    }
    let slices = slices.get(..used).unwrap_or_default();
    match patience {
        Patience::None => device.write_now(around.start, slices),
        Patience::Waits => device.write(around.start, slices).map(|()| true),
    }
}

/// Makes `range` read as zeros.
pub(super) fn zero(device: &dyn BlockDev, range: Range<u64>, how: Zeroing) -> Result<()> {
    let cut = cut(range);
    for edge in [cut.head, cut.tail] {
        let zeros = [0; SECTOR];
        let length = (edge.end - edge.start) as usize;
        if let Some(zeros) = zeros.get(..length).filter(|zeros| !zeros.is_empty()) {
            write(device, edge.start, zeros, Patience::Waits)?;
        }
    }
    let length = cut.whole.end - cut.whole.start;
    match how {
        _ if length == 0 => Ok(()),
        Zeroing::Discard => device.discard(cut.whole.start, length),
        Zeroing::Zeroes => device.write_zeroes(cut.whole.start, length),
    }
}
