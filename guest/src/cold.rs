//! Disks of which the content is known from the place alone, read and written on command: what a guest waits for while
//! its disk's blocks are far away, and what lies where a disk became larger. The 8 bytes at offset `o` are
//! [`word`]`(o)`, little-endian (`xtask/src/e2e/cold_block.rs` makes such a disk).
//!
//! Each command has a thread of its own, so that one that waits holds up nothing else. What it brings is compared; anything
//! else, an error included, is an error of the disk.

use std::fs::{File, OpenOptions};
use std::io::{self, Seek as _, SeekFrom};
use std::os::unix::fs::{FileExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::thread;

use crate::disk::{Aligned, RECORD};
use crate::report::Counters;

/// What is done with 4 KiB of a disk.
#[derive(Clone, Copy, Debug)]
pub enum Work {
    /// They are read, and are what they are known to be.
    Read,
    /// They are read, and are zeros.
    Blank,
    /// What they are known to be is written, and flushed.
    Fill,
}

/// Begins to do it at `offset`.
pub fn begin(work: Work, path: &str, offset: u64, counters: &Arc<Counters>) {
    let (path, counters) = (PathBuf::from(path), Arc::clone(counters));
    thread::spawn(move || match carry_out(work, &path, offset) {
        Ok(()) => {
            counters.cold_reads.fetch_add(1, Relaxed);
        }
        Err(e) => counters.disk_error(&format!("{work:?} {} at {offset}: {e}", path.display())),
    });
}

fn carry_out(work: Work, path: &Path, offset: u64) -> io::Result<()> {
    let writes = matches!(work, Work::Fill);
    let file = OpenOptions::new().read(true).write(writes).custom_flags(libc::O_DIRECT).open(path)?;
    let mut buffer = Aligned::new();
    let page = buffer.page();
    debug_assert_eq!(page.len(), RECORD);
    if writes {
        for (at, bytes) in (offset..).step_by(8).zip(page.chunks_exact_mut(8)) {
            bytes.copy_from_slice(&word(at).to_le_bytes());
        }
        file.write_all_at(page, offset)?;
        return file.sync_data();
    }
    file.read_exact_at(page, offset)?;
    for (at, bytes) in (offset..).step_by(8).zip(page.chunks_exact(8)) {
        let known = if matches!(work, Work::Blank) { 0 } else { word(at) };
        if bytes != known.to_le_bytes() {
            return Err(io::Error::other(format!("wrong content at {at}")));
        }
    }
    Ok(())
}

/// Size of a disk as the kernel has it now, bytes; 0 if it cannot be had.
pub fn size_bytes(path: &Path) -> u64 {
    File::open(path).and_then(|mut disk| disk.seek(SeekFrom::End(0))).unwrap_or(0)
}

/// What stands at a place: the finaliser of splitmix64.
fn word(offset: u64) -> u64 {
    let mut x = offset.wrapping_add(0x9E37_79B9_7F4A_7C15);
    x = (x ^ (x >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    x = (x ^ (x >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    x ^ (x >> 31)
}
