//! A disk in RAM for tests: slow where it is told to be, and it remembers what was made durable.

use std::io::{IoSlice, IoSliceMut};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use parking_lot::Mutex;

use crate::block_dev::{BlockDev, BlockRead, Extent};
use crate::error::{Error, ErrorKind, Result};

/// See the module's charter.
pub(crate) struct RamDevice {
    bytes: Mutex<Vec<u8>>,
    /// Reads and writes of these never succeed without waiting.
    pub(crate) slow: Option<(std::ops::Range<u64>, Duration)>,
    /// Reads and writes of these fail.
    pub(crate) bad: std::ops::Range<u64>,
    /// There is no space for what is written.
    pub(crate) full: AtomicBool,
    /// Flushes so far.
    pub(crate) flushes: Mutex<u64>,
}

impl RamDevice {
    pub(crate) fn new(size: usize) -> Self {
        Self {
            bytes: Mutex::new(vec![0; size]),
            slow: None,
            bad: 0..0,
            full: AtomicBool::new(false),
            flushes: Mutex::new(0),
        }
    }

    /// Adds zeros at its end.
    pub(crate) fn grow(&self, size: usize) {
        self.bytes.lock().resize(size, 0);
    }

    fn check(&self, offset: u64, len: usize) -> Result<(usize, usize)> {
        let end = offset + len as u64;
        if end > self.size_bytes() || (offset < self.bad.end && self.bad.start < end) {
            return Err(Error::new(ErrorKind::Io, format!("reach {len} bytes at {offset}")));
        }
        Ok((offset as usize, end as usize))
    }

    fn must_have_space(&self) -> Result<()> {
        match self.full.load(Ordering::SeqCst) {
            true => Err(Error::new(ErrorKind::NoSpace, "append to the test's disk")),
            false => Ok(()),
        }
    }

    fn is_slow(&self, offset: u64) -> bool {
        self.slow.as_ref().is_some_and(|(range, _)| range.contains(&offset))
    }

    fn wait(&self, offset: u64) {
        if let Some((_, delay)) = self.slow.as_ref().filter(|(range, _)| range.contains(&offset)) {
            std::thread::sleep(*delay);
        }
    }
}

impl BlockRead for RamDevice {
    fn size_bytes(&self) -> u64 {
        self.bytes.lock().len() as u64
    }

    fn read(&self, offset: u64, into: &mut [IoSliceMut<'_>]) -> Result<()> {
        self.wait(offset);
        let total = into.iter().map(|part| part.len()).sum();
        let (mut from, _) = self.check(offset, total)?;
        let bytes = self.bytes.lock();
        for part in into {
            let len = part.len();
            part.copy_from_slice(&bytes[from..from + len]);
            from += len;
        }
        Ok(())
    }

    fn read_now(&self, offset: u64, into: &mut [IoSliceMut<'_>]) -> Result<bool> {
        if self.is_slow(offset) {
            return Ok(false);
        }
        self.read(offset, into).map(|()| true)
    }

    fn extent(&self, offset: u64) -> Result<Extent> {
        let bytes = self.bytes.lock();
        let mut blocks =
            bytes[offset as usize..].chunks(4096).map(|block| block.iter().any(|byte| *byte != 0));
        let data = blocks.next().unwrap_or(false);
        let length = 4096 * (1 + blocks.take_while(|other| *other == data).count() as u64);
        Ok(Extent { length: length.min(bytes.len() as u64 - offset), data })
    }
}

impl BlockDev for RamDevice {
    fn write(&self, offset: u64, from: &[IoSlice<'_>]) -> Result<()> {
        self.wait(offset);
        let total = from.iter().map(|part| part.len()).sum();
        let (mut to, _) = self.check(offset, total)?;
        self.must_have_space()?;
        let mut bytes = self.bytes.lock();
        for part in from {
            bytes[to..to + part.len()].copy_from_slice(part);
            to += part.len();
        }
        Ok(())
    }

    fn flush(&self) -> Result<()> {
        *self.flushes.lock() += 1;
        Ok(())
    }

    fn discard(&self, offset: u64, length: u64) -> Result<()> {
        self.write_zeroes(offset, length)
    }

    fn write_zeroes(&self, offset: u64, length: u64) -> Result<()> {
        let (from, to) = self.check(offset, length as usize)?;
        self.must_have_space()?;
        self.bytes.lock()[from..to].fill(0);
        Ok(())
    }

    fn write_now(&self, offset: u64, from: &[IoSlice<'_>]) -> Result<bool> {
        if self.is_slow(offset) {
            return Ok(false);
        }
        self.write(offset, from).map(|()| true)
    }
}
