//! A request as the pool does it: one that may have to wait, with copies of its data.
//!
//! ```text
//!   taken from the ring ──▶ handed on ──▶ carried out ──▶ Ended: the guest is answered
//!                               ▲             │ the disk is not served now, or its layer finds no space
//!                               └── Parked ◀──┘
//! ```
//!
//! A guest whose layer finds no space waits, as it does with QEMU's own disks (`werror=enospc`), but without being
//! paused: told of an error its file system would give up. Reads and what is overwritten in place go on.
//!
//! Invariants
//! * Nothing in an [`Op`] points into guest memory.
//! * What was not done is done later, or never answered: it is in the in-flight record.
//!
//! Not here: taking and answering requests (`queue`), what a layer does without space (`disk::append`).

use std::io::{IoSlice, IoSliceMut};
use std::ops::Range;
use std::time::{Duration, Instant};

use super::queue::{Device, Stats};
use crate::error::{ErrorKind, Result};

/// Between two tries of a request for which there is no space.
const SPACE_POLL: Duration = Duration::from_millis(500);

/// What is to be done.
pub(super) enum Op {
    Read { offset: u64, len: usize },
    Write { offset: u64, data: Vec<u8>, then_flush: bool },
    Flush,
    Discard(Vec<Range<u64>>),
    WriteZeroes(Vec<Range<u64>>),
}

/// What became of it.
pub(super) enum Done {
    /// It ended; a read brings its data.
    Ended(Result<Vec<u8>>),
    /// The disk was not served any more when its turn came, or had no space: to be handed on again later.
    Parked(Op),
}

impl Op {
    /// Bytes of data it holds, or will.
    pub(super) fn bytes(&self) -> u64 {
        match self {
            Op::Read { len, .. } => *len as u64,
            Op::Write { data, .. } => data.len() as u64,
            Op::Flush | Op::Discard(_) | Op::WriteZeroes(_) => 0,
        }
    }

    /// Where on the disk it reads.
    pub(super) fn read_offset(&self) -> Option<u64> {
        match self {
            Op::Read { offset, .. } => Some(*offset),
            Op::Write { .. } | Op::Flush | Op::Discard(_) | Op::WriteZeroes(_) => None,
        }
    }

    /// Whether the disk may be another one after it.
    pub(super) fn changes_disk(&self) -> bool {
        match self {
            Op::Read { .. } => false,
            Op::Write { .. } | Op::Flush | Op::Discard(_) | Op::WriteZeroes(_) => true,
        }
    }

    /// Does it, on a thread that may wait.
    pub(super) fn carry_out(self, shared: &Device) -> Done {
        if let Op::Read { offset, len } = self {
            let Some(device) = shared.slot.reader() else { return Done::Parked(self) };
            let mut data = vec![0; len];
            let result = device.read(offset, &mut [IoSliceMut::new(&mut data)]);
            return Done::Ended(result.map(|()| data));
        }
        let Some(device) = shared.slot.enter() else { return Done::Parked(self) };
        let result = match &self {
            Op::Read { .. } => Ok(()),
            Op::Write { offset, data, then_flush } => device
                .write(*offset, &[IoSlice::new(data)])
                .and_then(|()| if *then_flush { device.flush() } else { Ok(()) }),
            Op::Flush => device.flush(),
            Op::Discard(ranges) => {
                ranges.iter().try_for_each(|range| device.discard(range.start, range.end - range.start))
            }
            Op::WriteZeroes(ranges) => {
                ranges.iter().try_for_each(|range| device.write_zeroes(range.start, range.end - range.start))
            }
        };
        drop(device);
        match result {
            // A flush that failed may have lost what it was to keep: trying again would not bring it back.
            Err(error) if error.kind() == ErrorKind::NoSpace && !matches!(self, Op::Flush) => {
                *shared.stats.starved.lock() = Some(Instant::now());
                shared.complaints.log(&format_args!("a guest waits for space: {error}"));
                std::thread::sleep(SPACE_POLL);
                Done::Parked(self)
            }
            result => Done::Ended(result.map(|()| Vec::new())),
        }
    }
}

impl Stats {
    /// Whether requests wait for space now.
    pub(super) fn is_starved(&self) -> bool {
        self.starved.lock().is_some_and(|at| at.elapsed() < 3 * SPACE_POLL)
    }
}
