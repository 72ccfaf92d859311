//! A RAM block of a guest as a file: read at the source, written at the target.
//!
//! The file (`memory-backend-file,share=on` on tmpfs) is read and written with `pread` and `pwrite`, not through a
//! mapping of our own. Both see the same page cache as the guest, and
//! * reading a hole costs nothing and leaves it a hole, where touching a mapping of tmpfs would fill it;
//! * writing whole pages into a fresh file does not clear them first, as a page fault would;
//! * a file that was cut short is an error, not a SIGBUS.
//!
//! Invariants
//! * A hole and a zero page are the same thing: they read the same and hash the same.
//! * Pages are read while the guest writes them, so a page may be torn. That is safe because the tracker re-arms a
//!   page **before** it is read: whoever wrote during or after the read has marked it for a later round. The last
//!   round is read while the guest is paused.
//!
//! Not here: which pages changed (`guest`), frames (`wire::peer::memory`).

use std::fs::File;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};

use rustix::fs::{FallocateFlags, SeekFrom};
use rustix::io::Errno;

use crate::error::{Context, Error, ErrorKind, Result};
use crate::memory::bitmap::PAGE_BYTES;

/// Bytes that are hashed as one piece of a digest.
const DIGEST_CHUNK_BYTES: usize = 1 << 20;
/// Shorter runs are overwritten with zeros, longer ones are punched out: a punch costs as much as writing these.
const PUNCH_PAGES_MIN: u64 = 16;
const HUGETLBFS_MAGIC: i64 = 0x9584_58f6;

/// One RAM block.
#[derive(Debug)]
pub struct RamFile {
    file: File,
    name: String,
    pages: u64,
}

impl RamFile {
    /// Opens a block to read it. `name` is the block's name in QEMU.
    pub fn open_source(name: impl Into<String>, path: &Path) -> Result<Self> {
        let file = File::open(path).with_context(|| format!("open RAM file {}", path.display()))?;
        Self::new(name, file)
    }

    /// Opens a block to write it. The file exists: the incoming QEMU made it at its full size.
    pub fn open_target(name: impl Into<String>, path: &Path) -> Result<Self> {
        let opened = File::options().read(true).write(true).open(path);
        let file = opened.with_context(|| format!("open RAM file {}", path.display()))?;
        let stat = rustix::fs::fstatfs(&file).context("examine the RAM file's file system")?;
        if stat.f_type as i64 == HUGETLBFS_MAGIC {
            let text =
                format!("write RAM file {}: it is on hugetlbfs, which takes no writes", path.display());
            return Err(Error::new(ErrorKind::Unsupported, text)
                .hint("keep the guest's RAM on tmpfs, with transparent huge pages if it should have them"));
        }
        Self::new(name, file)
    }

    /// A block in an open file.
    pub fn new(name: impl Into<String>, file: File) -> Result<Self> {
        let name = name.into();
        let bytes = file.metadata().with_context(|| format!("examine RAM block {name}"))?.len();
        let pages = bytes / PAGE_BYTES as u64;
        if bytes == 0 || bytes % PAGE_BYTES as u64 != 0 || pages > u64::from(u32::MAX) {
            let text =
                format!("use RAM block {name}: {bytes} bytes are not whole pages of 4 KiB below 16 TiB");
            return Err(Error::new(ErrorKind::InvalidInput, text));
        }
        Ok(Self { file, name, pages })
    }

    /// The same block through another descriptor.
    pub fn try_clone(&self) -> Result<Self> {
        let file = self.file.try_clone().with_context(|| format!("share RAM block {}", self.name))?;
        Ok(Self { file, name: self.name.clone(), pages: self.pages })
    }

    /// The block's name in QEMU.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The block's size in pages.
    pub fn pages(&self) -> u64 {
        self.pages
    }

    /// Reads whole pages from `first_page` on, as many as `buffer` holds.
    pub fn read(&self, first_page: u64, buffer: &mut [u8]) -> Result<()> {
        self.file
            .read_exact_at(buffer, first_page * PAGE_BYTES as u64)
            .with_context(|| format!("read RAM block {} at page {first_page}", self.name))
    }

    /// Writes whole pages from `first_page` on.
    pub fn write(&self, first_page: u64, bytes: &[u8]) -> Result<()> {
        self.file
            .write_all_at(bytes, first_page * PAGE_BYTES as u64)
            .with_context(|| format!("write RAM block {} at page {first_page}", self.name))
    }

    /// Makes pages zero, giving memory back where that is worth it. Pages that are holes cost one system call.
    pub fn zero(&self, pages: Range<u64>) -> Result<()> {
        static ZEROS: [u8; PUNCH_PAGES_MIN as usize * PAGE_BYTES] =
            [0; PUNCH_PAGES_MIN as usize * PAGE_BYTES];
        let Some(start) = self.first_data(pages.clone())? else { return Ok(()) };
        let len = pages.end - start;
        if len >= PUNCH_PAGES_MIN {
            let (offset, bytes) = (start * PAGE_BYTES as u64, len * PAGE_BYTES as u64);
            let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
            rustix::fs::fallocate(&self.file, flags, offset, bytes)
                .with_context(|| format!("punch RAM block {} at page {start}", self.name))
        } else {
            let bytes = usize::try_from(len).unwrap_or(0) * PAGE_BYTES;
            self.write(start, ZEROS.get(..bytes).unwrap_or(&ZEROS))
        }
    }

    /// The first of `pages` that is not a hole. Cheap, unlike the end of an extent: see [`Self::next_data`].
    pub fn first_data(&self, pages: Range<u64>) -> Result<Option<u64>> {
        let end = pages.end.min(self.pages);
        if pages.start >= end {
            return Ok(None);
        }
        match self.seek(SeekFrom::Data(pages.start * PAGE_BYTES as u64)) {
            // No data up to the end of the file.
            Err(Errno::NXIO) => Ok(None),
            // The file system cannot tell: all is data.
            Err(Errno::INVAL) => Ok(Some(pages.start)),
            Err(error) => Err(error).with_context(|| format!("look for data in RAM block {}", self.name)),
            Ok(at) => {
                let start = (at / PAGE_BYTES as u64).max(pages.start);
                Ok((start < end).then_some(start))
            }
        }
    }

    /// The first extent with data that lies in `from .. end`, cut to it; pages before it are holes. The kernel looks
    /// at every page up to the next hole, wherever `end` is: for walks over the whole block only.
    pub fn next_data(&self, from: u64, end: u64) -> Result<Option<Range<u64>>> {
        let end = end.min(self.pages);
        let Some(start) = self.first_data(from..end)? else { return Ok(None) };
        let hole = match self.seek(SeekFrom::Hole(start * PAGE_BYTES as u64)) {
            Err(Errno::INVAL) => return Ok(Some(start..end)),
            other => other.with_context(|| format!("look for holes in RAM block {}", self.name))?,
        };
        // Never an empty extent: a page that was punched since counts as data, and reads as zeros.
        Ok(Some(start..hole.div_ceil(PAGE_BYTES as u64).max(start + 1).min(end)))
    }

    fn seek(&self, to: SeekFrom) -> Result<u64, Errno> {
        // The offset is shared by threads, but nobody uses it: all reads and writes name their place.
        rustix::fs::seek(&self.file, to)
    }

    /// Pages that are not holes.
    pub fn data_pages(&self) -> Result<u64> {
        let (mut next, mut count) = (0, 0);
        while let Some(data) = self.next_data(next, self.pages)? {
            count += data.end - data.start;
            next = data.end;
        }
        Ok(count)
    }
}

/// The hash of all blocks: BLAKE3 over, for each block, its size in pages (`u64`, little-endian) and the BLAKE3 of
/// each MiB of it. Uses `threads` threads; the guest must be paused.
pub fn digest(blocks: &[RamFile], threads: usize) -> Result<blake3::Hash> {
    let mut whole = blake3::Hasher::new();
    for block in blocks {
        whole.update(&block.pages.to_le_bytes());
        for chunk in digest_chunks(block, threads.max(1))? {
            whole.update(chunk.as_bytes());
        }
    }
    Ok(whole.finalize())
}

fn digest_chunks(block: &RamFile, threads: usize) -> Result<Vec<blake3::Hash>> {
    let chunk_pages = (DIGEST_CHUNK_BYTES / PAGE_BYTES) as u64;
    let chunks = block.pages.div_ceil(chunk_pages);
    let next = AtomicU64::new(0);
    let zero = blake3::hash(&vec![0; DIGEST_CHUNK_BYTES]);
    let lane = || -> Result<Vec<(u64, blake3::Hash)>> {
        let mut buffer = vec![0; DIGEST_CHUNK_BYTES];
        let mut found = Vec::new();
        loop {
            let chunk = next.fetch_add(1, Ordering::Relaxed);
            if chunk >= chunks {
                return Ok(found);
            }
            let first = chunk * chunk_pages;
            let pages = chunk_pages.min(block.pages - first);
            let hash = if pages == chunk_pages && block.first_data(first..first + pages)?.is_none() {
                zero
            } else {
                let bytes = usize::try_from(pages).unwrap_or(0) * PAGE_BYTES;
                let buffer = buffer.get_mut(..bytes).unwrap_or(&mut []);
                block.read(first, buffer)?;
                blake3::hash(buffer)
            };
            found.push((chunk, hash));
        }
    };
    let mut all = std::thread::scope(|scope| {
        let lanes: Vec<_> = (0..threads).map(|_| scope.spawn(lane)).collect();
        let mut all = Vec::new();
        for lane in lanes {
            let found =
                lane.join().map_err(|_| Error::new(ErrorKind::Internal, "hash RAM: a thread died"))?;
            all.extend(found?);
        }
        Ok::<_, Error>(all)
    })?;
    all.sort_unstable_by_key(|(chunk, _)| *chunk);
    Ok(all.into_iter().map(|(_, hash)| hash).collect())
}

#[cfg(test)]
pub(crate) mod test {
    use super::*;

    /// An unlinked file of `pages` holes on tmpfs.
    pub fn ram(pages: u64) -> RamFile {
        let file = tempfile::tempfile_in("/dev/shm").unwrap();
        file.set_len(pages * PAGE_BYTES as u64).unwrap();
        RamFile::new("mem", file).unwrap()
    }

    #[test]
    fn a_hole_is_a_zero_page_and_stays_a_hole() {
        let (a, b) = (ram(1000), ram(1000));
        assert_eq!(a.data_pages().unwrap(), 0);
        let mut page = vec![1; PAGE_BYTES];
        a.read(999, &mut page).unwrap();
        assert_eq!(page, vec![0; PAGE_BYTES]);
        assert_eq!(a.data_pages().unwrap(), 0);
        b.write(300, &vec![0; 100 * PAGE_BYTES]).unwrap();
        assert_eq!(b.data_pages().unwrap(), 100);
        let hash = |block: RamFile, threads| digest(&[block], threads).unwrap();
        assert_eq!(hash(a, 1), hash(b, 3));
    }

    #[test]
    fn zeroing_removes_data_and_frees_long_runs() {
        let block = ram(1000);
        block.write(10, &vec![5; 900 * PAGE_BYTES]).unwrap();
        block.zero(20..500).unwrap();
        block.zero(600..603).unwrap();
        let mut next = 0;
        let mut extents = Vec::new();
        while let Some(data) = block.next_data(next, 1000).unwrap() {
            next = data.end;
            extents.push(data);
        }
        assert_eq!(extents, vec![10..20, 500..910]);
        let mut page = vec![1; PAGE_BYTES];
        for (at, byte) in [(19, 5), (20, 0), (499, 0), (500, 5), (599, 5), (600, 0), (602, 0), (603, 5)] {
            block.read(at, &mut page).unwrap();
            assert_eq!(page, vec![byte; PAGE_BYTES], "page {at}");
        }
    }

    #[test]
    fn one_different_byte_changes_the_digest() {
        let (a, b) = (ram(700), ram(700));
        b.write(699, &[&[0; PAGE_BYTES - 1][..], &[1]].concat()).unwrap();
        assert_ne!(digest(&[a], 2).unwrap(), digest(&[b], 2).unwrap());
    }

    #[test]
    fn a_file_that_is_not_whole_pages_is_refused() {
        for bytes in [0, 100, 5000] {
            let file = tempfile::tempfile_in("/dev/shm").unwrap();
            file.set_len(bytes).unwrap();
            assert_eq!(RamFile::new("mem", file).unwrap_err().kind(), ErrorKind::InvalidInput);
        }
    }
}
