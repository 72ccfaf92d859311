//! What an exported disk is to the code that exports it, and what a base is to the layer above it.
//!
//! Invariants
//! * Offsets and lengths are multiples of 512; callers check them against [`BlockRead::size_bytes`] first, an
//!   implementation refuses what lies outside all the same.
//! * A write that returned is seen by every later read. It survives the end of this process, or the host's, only
//!   once a later [`BlockDev::flush`] has returned.
//! * `*_now` never waits for another host or a store: it returns `Ok(false)` having done nothing the caller can
//!   see, and the caller repeats the call without `_now` on a thread that may wait.
//! * Everything is callable from any number of threads at once.

use std::io::{IoSlice, IoSliceMut};

use crate::error::Result;

/// A disk that can be read.
pub trait BlockRead: Send + Sync {
    /// Size of the disk, bytes.
    fn size_bytes(&self) -> u64;

    /// Fills `into` from `offset` on, waiting for other hosts or stores if it must.
    fn read(&self, offset: u64, into: &mut [IoSliceMut<'_>]) -> Result<()>;

    /// As [`BlockRead::read`], but returns `Ok(false)` instead of waiting for another host or a store.
    fn read_now(&self, offset: u64, into: &mut [IoSliceMut<'_>]) -> Result<bool>;

    /// As [`BlockRead::read_now`], but reads from this host's disk what is there and was not read since the start, too,
    /// and is no reader's demand: nothing is fetched, or counted, because of it.
    fn read_here(&self, offset: u64, into: &mut [IoSliceMut<'_>]) -> Result<bool> {
        self.read_now(offset, into)
    }

    /// The end of the run of equal kind (data, or reads-as-zero) that starts at `offset`, and whether it is data.
    fn extent(&self, offset: u64) -> Result<Extent>;
}

/// A run of bytes of one kind.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Extent {
    /// Its length from the asked offset on, bytes; never 0 inside the disk.
    pub length: u64,
    /// Whether it may hold other bytes than zeros.
    pub data: bool,
}

/// A disk that can be written too.
pub trait BlockDev: BlockRead {
    /// Writes `from` at `offset`.
    fn write(&self, offset: u64, from: &[IoSlice<'_>]) -> Result<()>;

    /// Returns once every write that returned before this call is durable.
    fn flush(&self) -> Result<()>;

    /// The range's content no longer matters; it reads as zeros afterwards.
    fn discard(&self, offset: u64, length: u64) -> Result<()>;

    /// The range reads as zeros afterwards.
    fn write_zeroes(&self, offset: u64, length: u64) -> Result<()>;

    /// As [`BlockDev::write`], but `Ok(false)` instead of waiting (a partial write over a block not yet here).
    fn write_now(&self, offset: u64, from: &[IoSlice<'_>]) -> Result<bool>;
}
