//! Tests of layers against a disk in RAM, crashes, faults, and each other.

mod chain;
mod crash;
mod faults;
mod figures;
mod fuzz;
mod grow;
mod kill;
mod model;
mod reclaim;
mod ship;
mod volumes;

use std::io::{IoSlice, IoSliceMut};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use parking_lot::Mutex;
use tempfile::TempDir;
use whimbrel_wire::Epoch;
use whimbrel_wire::record::layer::Parent;

use super::layer::Layer;
use super::spec::LayerSpec;
use crate::block_dev::{BlockDev, BlockRead, Extent};
use crate::error::{Error, ErrorKind, Result};

const BLOCK: u64 = 4096;

/// A directory in RAM if there is one: these tests sync a great deal.
fn temp_dir() -> TempDir {
    if std::path::Path::new("/dev/shm").is_dir() {
        TempDir::new_in("/dev/shm").unwrap()
    } else {
        TempDir::new().unwrap()
    }
}

/// A disk in RAM.
struct RamDisk {
    bytes: Mutex<Vec<u8>>,
    /// Whether `read_now` answers.
    local: AtomicBool,
    reads: AtomicU64,
}

impl RamDisk {
    fn new(bytes: Vec<u8>) -> Arc<Self> {
        Arc::new(Self { bytes: Mutex::new(bytes), local: AtomicBool::new(true), reads: AtomicU64::new(0) })
    }
}

impl BlockRead for RamDisk {
    fn size_bytes(&self) -> u64 {
        self.bytes.lock().len() as u64
    }
    fn read(&self, offset: u64, into: &mut [IoSliceMut<'_>]) -> Result<()> {
        self.reads.fetch_add(1, Ordering::Relaxed);
        let bytes = self.bytes.lock();
        let mut at = offset as usize;
        for slice in into {
            let from = bytes.get(at..at + slice.len());
            let from =
                from.ok_or_else(|| Error::new(ErrorKind::InvalidInput, "read RAM disk: behind its end"))?;
            slice.copy_from_slice(from);
            at += from.len();
        }
        Ok(())
    }
    fn read_now(&self, offset: u64, into: &mut [IoSliceMut<'_>]) -> Result<bool> {
        let local = self.local.load(Ordering::Relaxed);
        if local {
            self.read(offset, into)?;
        }
        Ok(local)
    }
    fn extent(&self, offset: u64) -> Result<Extent> {
        // The first half says that it is data, the second that it is zeros, as `half_full` makes them.
        let half = self.size_bytes() / 2 / 512 * 512;
        Ok(if offset < half {
            Extent { length: half - offset, data: true }
        } else {
            Extent { length: self.size_bytes() - offset, data: false }
        })
    }
}

/// Bytes whose second half is zeros.
fn half_full(length: usize) -> Vec<u8> {
    let half = length / 2 / 512 * 512;
    (0..length).map(|at| if at < half { (at / 512 % 250 + 1) as u8 } else { 0 }).collect()
}

fn spec(size_bytes: u64) -> LayerSpec {
    LayerSpec { segment_blocks: 512, ..LayerSpec::new(Parent::None, size_bytes, Epoch(1)) }
}

fn read(disk: &dyn BlockRead, offset: u64, length: usize) -> Vec<u8> {
    let mut bytes = vec![0xee; length];
    disk.read(offset, &mut [IoSliceMut::new(&mut bytes)]).unwrap();
    bytes
}

fn read_all(disk: &dyn BlockRead) -> Vec<u8> {
    read(disk, 0, disk.size_bytes() as usize)
}

fn write(disk: &dyn BlockDev, offset: u64, bytes: &[u8]) -> Result<()> {
    disk.write(offset, &[IoSlice::new(bytes)])
}

/// A new layer of that size, opened.
fn layer(size_bytes: u64) -> (TempDir, PathBuf, Arc<Layer>) {
    let dir = temp_dir();
    let path = dir.path().join("layer");
    Layer::create(&path, &spec(size_bytes)).unwrap();
    let layer = Layer::open(&path, None, Epoch(1), true).unwrap();
    (dir, path, layer)
}
