//! A disk piece by piece: what of it is not zeros, and what of it differs from another.
//!
//! Holes are skipped without being read. Memory: one piece, of each disk.

use std::io::IoSliceMut;

use super::Progress;
use crate::block_dev::BlockRead;
use crate::error::Result;

/// Bytes of a piece.
const PIECE_BYTES: u64 = 1 << 20;
/// Zeros are left out in units of this.
const ZERO_UNIT_BYTES: u64 = 4096;

/// Calls `sink` with what of `disk` is not zeros, in rising order, and `progress` after each piece.
pub fn each_data(
    disk: &dyn BlockRead,
    progress: Progress<'_>,
    sink: &mut dyn FnMut(u64, &[u8]) -> Result<()>,
) -> Result<()> {
    let size = disk.size_bytes();
    let mut buffer = vec![0; PIECE_BYTES as usize];
    let mut at = 0;
    while at < size {
        let extent = disk.extent(at)?;
        let length = extent.length.min(size - at).max(1);
        let length = if extent.data { length.min(PIECE_BYTES - at % PIECE_BYTES) } else { length };
        if extent.data {
            let bytes = buffer.get_mut(..length as usize).unwrap_or_default();
            disk.read(at, &mut [IoSliceMut::new(bytes)])?;
            let is_wanted = |from: usize, to: usize| !is_zero(bytes.get(from..to).unwrap_or_default());
            each_run(bytes.len(), ZERO_UNIT_BYTES as usize, &is_wanted, &mut |from, to| {
                sink(at + from as u64, bytes.get(from..to).unwrap_or_default())
            })?;
        }
        at += length;
        progress(at, size)?;
    }
    Ok(())
}

/// What a disk has where its parent has something else.
pub enum Difference<'a> {
    /// These bytes.
    Data(&'a [u8]),
    /// So many bytes.
    Zeros(u64),
}

/// Calls `sink` with what of `disk` differs from `parent`, a disk of the same size, in whole units and rising order.
pub fn each_difference(
    disk: &dyn BlockRead,
    parent: &dyn BlockRead,
    unit_bytes: u64,
    progress: Progress<'_>,
    sink: &mut dyn FnMut(u64, Difference<'_>) -> Result<()>,
) -> Result<()> {
    let size = disk.size_bytes().min(parent.size_bytes());
    let (mut own, mut below) = (vec![0; PIECE_BYTES as usize], vec![0; PIECE_BYTES as usize]);
    let mut at = 0;
    while at < size {
        let (extent, under) = (disk.extent(at)?, parent.extent(at)?);
        if !extent.data && !under.data {
            // What both leave out, in whole units, so that the next piece begins with one.
            let both = extent.length.min(under.length).min(size - at);
            let whole = both - both % unit_bytes;
            if whole > 0 {
                at += whole;
                progress(at, size)?;
                continue;
            }
        }
        let length = (size - at).min(PIECE_BYTES) as usize;
        let (own, below) =
            (own.get_mut(..length).unwrap_or_default(), below.get_mut(..length).unwrap_or_default());
        disk.read(at, &mut [IoSliceMut::new(own)])?;
        parent.read(at, &mut [IoSliceMut::new(below)])?;
        let differs = |from: usize, to: usize| own.get(from..to) != below.get(from..to);
        each_run(length, unit_bytes as usize, &differs, &mut |from, to| {
            let bytes = own.get(from..to).unwrap_or_default();
            let offset = at + from as u64;
            if is_zero(bytes) {
                return sink(offset, Difference::Zeros(bytes.len() as u64));
            }
            sink(offset, Difference::Data(bytes))
        })?;
        at += length as u64;
        progress(at, size)?;
    }
    Ok(())
}

fn is_zero(bytes: &[u8]) -> bool {
    bytes.iter().all(|byte| *byte == 0)
}

/// Calls `sink` with the longest runs of wanted units among `length` bytes.
fn each_run(
    length: usize,
    unit: usize,
    is_wanted: &dyn Fn(usize, usize) -> bool,
    sink: &mut dyn FnMut(usize, usize) -> Result<()>,
) -> Result<()> {
    let mut run: Option<usize> = None;
    let mut from = 0;
    while from < length {
        let to = (from + unit).min(length);
        match (is_wanted(from, to), run) {
            (true, None) => run = Some(from),
            (false, Some(start)) => {
                sink(start, from)?;
                run = None;
            }
            _ => {}
        }
        from = to;
    }
    run.map_or(Ok(()), |start| sink(start, length))
}
