//! Reads of a disk whose content is known from the place alone: what a guest waits for while its disk's blocks are far
//! away. The 8 bytes at offset `o` are [`word`]`(o)`, little-endian (`xtask/src/e2e/cold_block.rs` makes such a disk).
//!
//! Each read has a thread of its own, so that one that waits holds up nothing else. What it brings is compared; anything
//! else, an error included, is an error of the disk.

use std::fs::OpenOptions;
use std::io;
use std::os::unix::fs::{FileExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::thread;

use crate::disk::{Aligned, RECORD};
use crate::report::Counters;

/// Begins to read 4 KiB at `offset`.
pub fn begin(path: &str, offset: u64, counters: &Arc<Counters>) {
    let (path, counters) = (PathBuf::from(path), Arc::clone(counters));
    thread::spawn(move || match read(&path, offset) {
        Ok(()) => {
            counters.cold_reads.fetch_add(1, Relaxed);
        }
        Err(e) => counters.disk_error(&format!("read {} at {offset}: {e}", path.display())),
    });
}

fn read(path: &Path, offset: u64) -> io::Result<()> {
    let file = OpenOptions::new().read(true).custom_flags(libc::O_DIRECT).open(path)?;
    let mut buffer = Aligned::new();
    let page = buffer.page();
    file.read_exact_at(page, offset)?;
    for (at, bytes) in (offset..).step_by(8).zip(page.chunks_exact(8)) {
        if bytes != word(at).to_le_bytes() {
            return Err(io::Error::other(format!("wrong content at {at}")));
        }
    }
    debug_assert_eq!(page.len(), RECORD);
    Ok(())
}

/// What stands at a place: the finaliser of splitmix64.
fn word(offset: u64) -> u64 {
    let mut x = offset.wrapping_add(0x9E37_79B9_7F4A_7C15);
    x = (x ^ (x >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    x = (x ^ (x >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    x ^ (x >> 31)
}
