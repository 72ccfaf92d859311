//! One image's verified blocks on this host.
//!
//! ```text
//!   DIR/cache/IMAGE_ID/manifest   as in the repository
//!                     /data       sparse; block i at i × 128 KiB
//!                     /bitmap     header 64 B │ one bit per block: verified when written, and written
//!                     /hashes     sorted, so that other images find equal blocks (`siblings`)
//!                     /about.json which names and stores it came from
//!
//!   bitmap header   "WHBLBITS" │ version u32 │ 0 u32 │ image id 32 B │ blocks u64 │ 0 u64
//! ```
//!
//! Invariants
//! * A bit of the bitmap is set only after the block was verified and written. Nothing is synced: after a power cut a
//!   bit may stand for bytes that were lost, so a block is verified again before its first use after a start.
//! * What [`ImageCache::is_verified`] tells was verified since the start.
//! * A full disk loses nothing but the cache's growth.
//!
//! Not here: where missing blocks come from (`image`).

use std::fs::{File, OpenOptions};
use std::io::IoSliceMut;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use bytes::Bytes;
use parking_lot::Mutex;
use whimbrel_wire::peer::block::Bitmap;
use whimbrel_wire::record::image::BLOCK_BYTES;

use super::manifest::{Manifest, check_block};
use crate::error::{Context, Error, ErrorKind, Result};

const MAGIC: &[u8; 8] = b"WHBLBITS";
const VERSION: u32 = 1;
const HEADER_BYTES: usize = 64;

/// See the module's charter.
pub struct ImageCache {
    manifest: Arc<Manifest>,
    data: File,
    bitmap: File,
    held: Vec<AtomicU64>,
    verified: Vec<AtomicU64>,
    /// Held while a word is changed and written, so that an older word never overwrites a newer one.
    write: Mutex<()>,
    held_blocks: AtomicU64,
    held_bytes: AtomicU64,
    #[cfg(test)]
    test_target: Mutex<Option<File>>,
}

/// What the cache had for a block.
#[derive(Debug)]
pub enum Loaded {
    /// The verified block.
    Good(Bytes),
    /// It is not here.
    Absent,
    /// Its bytes changed since they were written.
    Rotten,
}

impl ImageCache {
    /// Opens or makes the cache of `manifest`'s image in `dir`.
    pub fn open(dir: &Path, manifest: Arc<Manifest>) -> Result<Self> {
        let what = || format!("open the cache of image {}", manifest.id());
        let open = |name: &str| {
            OpenOptions::new().read(true).write(true).create(true).truncate(false).open(dir.join(name))
        };
        let data = open("data").with_context(what)?;
        let size = manifest.blocks() * u64::from(BLOCK_BYTES);
        if data.metadata().with_context(what)?.len() != size {
            data.set_len(size).with_context(what)?;
        }
        let bitmap = open("bitmap").with_context(what)?;
        let words = usize::try_from(manifest.blocks().div_ceil(64)).unwrap_or(0);
        let held = match read_bitmap(&bitmap, &manifest, words) {
            Some(held) => held,
            None => {
                write_empty_bitmap(&bitmap, &manifest, words).with_context(what)?;
                vec![0; words]
            }
        };
        let cache = Self {
            data,
            bitmap,
            held: held.into_iter().map(AtomicU64::new).collect(),
            verified: (0..words).map(|_| AtomicU64::new(0)).collect(),
            write: Mutex::new(()),
            held_blocks: AtomicU64::new(0),
            held_bytes: AtomicU64::new(0),
            #[cfg(test)]
            test_target: Mutex::new(None),
            manifest,
        };
        let all = cache.held();
        let last = cache.manifest.blocks().saturating_sub(1);
        let mut bytes = all.count() * u64::from(BLOCK_BYTES);
        if all.has(last) {
            bytes = bytes - u64::from(BLOCK_BYTES) + cache.len_of(last) as u64;
        }
        cache.held_blocks.store(all.count(), Ordering::Relaxed);
        cache.held_bytes.store(bytes, Ordering::Relaxed);
        Ok(cache)
    }

    fn len_of(&self, block: u64) -> usize {
        whimbrel_wire::record::image::block_len(self.manifest.header().size_bytes, block)
    }

    /// Whether the block is here, verified when it was written.
    pub fn holds(&self, block: u64) -> bool {
        bit(&self.held, block)
    }

    /// Whether the block is here and was verified since the start.
    pub fn is_verified(&self, block: u64) -> bool {
        bit(&self.verified, block)
    }

    /// Which blocks are here.
    pub fn held(&self) -> Bitmap {
        let bytes: Vec<u8> =
            self.held.iter().flat_map(|word| word.load(Ordering::Relaxed).to_le_bytes()).collect();
        let length = usize::try_from(self.manifest.blocks().div_ceil(8)).unwrap_or(0);
        let bytes = bytes.get(..length).unwrap_or(&bytes);
        Bitmap::from_bytes(self.manifest.blocks(), bytes)
            .unwrap_or_else(|_| Bitmap::new(self.manifest.blocks()))
    }

    /// How many blocks are here.
    pub fn held_blocks(&self) -> u64 {
        self.held_blocks.load(Ordering::Relaxed)
    }

    /// How many bytes of blocks are here.
    pub fn held_bytes(&self) -> u64 {
        self.held_bytes.load(Ordering::Relaxed)
    }

    /// Fills `into` from `offset` on, from blocks that the caller knows to be verified.
    pub fn read_verified(&self, offset: u64, into: &mut [IoSliceMut<'_>]) -> Result<()> {
        let wanted: usize = into.iter().map(|part| part.len()).sum();
        let n = rustix::io::preadv(&self.data, into, offset).context("read the cache")?;
        if n == wanted {
            return Ok(());
        }
        // Short reads of a regular file do not happen short of its end; finish part by part all the same.
        let mut at = offset;
        for part in into {
            self.data.read_exact_at(part, at).context("read the cache")?;
            at += part.len() as u64;
        }
        Ok(())
    }

    /// A block that was verified since the start; `None` if it was not.
    pub fn verified_block(&self, block: u64) -> Result<Option<Bytes>> {
        if !self.is_verified(block) {
            return Ok(None);
        }
        let mut bytes = vec![0; self.len_of(block)];
        self.data.read_exact_at(&mut bytes, block * u64::from(BLOCK_BYTES)).context("read the cache")?;
        Ok(Some(Bytes::from(bytes)))
    }

    /// Reads a block and verifies it.
    pub fn load(&self, block: u64) -> Result<Loaded> {
        let what = || format!("read block {block} of image {} from the cache", self.manifest.id());
        if !self.holds(block) {
            return Ok(Loaded::Absent);
        }
        let Some(place) = self.manifest.place(block)? else { return Ok(Loaded::Absent) };
        let mut bytes = vec![0; place.len];
        self.data.read_exact_at(&mut bytes, block * u64::from(BLOCK_BYTES)).with_context(what)?;
        if check_block(&place, &bytes).is_err() {
            return Ok(Loaded::Rotten);
        }
        set(&self.verified, block);
        Ok(Loaded::Good(Bytes::from(bytes)))
    }

    /// Writes a block that was verified. `false` if the disk is full.
    pub fn keep(&self, block: u64, bytes: &[u8]) -> Result<bool> {
        let what = || format!("write block {block} of image {} to the cache", self.manifest.id());
        match self.write_block(bytes, block * u64::from(BLOCK_BYTES)).with_context(what) {
            Err(error) if error.kind() == ErrorKind::NoSpace => return Ok(false),
            other => other?,
        }
        let _order = self.write.lock();
        if set(&self.held, block) {
            self.held_blocks.fetch_add(1, Ordering::Relaxed);
            self.held_bytes.fetch_add(bytes.len() as u64, Ordering::Relaxed);
        }
        set(&self.verified, block);
        match self.write_word(block).with_context(what) {
            // The bit lives in memory; after a restart the block is fetched again.
            Err(error) if error.kind() == ErrorKind::NoSpace => Ok(true),
            other => other.map(|()| true),
        }
    }

    /// Lets a test write to something else than the file.
    #[cfg(test)]
    pub(super) fn set_data_for_test(&self, file: File) {
        *self.test_target.lock() = Some(file);
    }

    fn write_block(&self, bytes: &[u8], offset: u64) -> std::io::Result<()> {
        #[cfg(test)]
        if let Some(file) = &*self.test_target.lock() {
            return std::io::Write::write_all(&mut &*file, bytes);
        }
        self.data.write_all_at(bytes, offset)
    }

    /// Makes the next reader verify the block again.
    pub fn distrust(&self, block: u64) {
        clear(&self.verified, block);
    }

    /// Forgets a block. Its bytes stay where they are: somebody may be reading them.
    pub fn forget(&self, block: u64) -> Result<()> {
        let _order = self.write.lock();
        clear(&self.verified, block);
        if clear(&self.held, block) {
            self.held_blocks.fetch_sub(1, Ordering::Relaxed);
            self.held_bytes.fetch_sub(self.len_of(block) as u64, Ordering::Relaxed);
        }
        self.write_word(block)
            .with_context(|| format!("forget block {block} of image {}", self.manifest.id()))
    }

    fn write_word(&self, block: u64) -> Result<()> {
        let Some(word) = usize::try_from(block / 64).ok().and_then(|word| self.held.get(word)) else {
            return Err(Error::new(ErrorKind::Internal, "the block lies beyond the image"));
        };
        let bytes = word.load(Ordering::Relaxed).to_le_bytes();
        self.bitmap.write_all_at(&bytes, HEADER_BYTES as u64 + block / 64 * 8).context("write the bitmap")
    }
}

fn place(block: u64) -> (usize, u64) {
    (usize::try_from(block / 64).unwrap_or(usize::MAX), 1 << (block % 64))
}

fn bit(words: &[AtomicU64], block: u64) -> bool {
    let (word, mask) = place(block);
    // Acquire pairs with the release in `set`: who sees the bit sees the bytes, which went through the kernel anyway.
    words.get(word).is_some_and(|word| word.load(Ordering::Acquire) & mask != 0)
}

fn set(words: &[AtomicU64], block: u64) -> bool {
    let (word, mask) = place(block);
    words.get(word).is_some_and(|word| word.fetch_or(mask, Ordering::Release) & mask == 0)
}

fn clear(words: &[AtomicU64], block: u64) -> bool {
    let (word, mask) = place(block);
    words.get(word).is_some_and(|word| word.fetch_and(!mask, Ordering::Release) & mask != 0)
}

fn header(manifest: &Manifest) -> [u8; HEADER_BYTES] {
    let mut out = [0; HEADER_BYTES];
    out[..8].copy_from_slice(MAGIC);
    out[8..12].copy_from_slice(&VERSION.to_le_bytes());
    out[16..48].copy_from_slice(&manifest.id().0);
    out[48..56].copy_from_slice(&manifest.blocks().to_le_bytes());
    out
}

/// The words of a bitmap that fits the image; `None` otherwise, and then the cache starts empty.
fn read_bitmap(file: &File, manifest: &Manifest, words: usize) -> Option<Vec<u64>> {
    if file.metadata().ok()?.len() != (HEADER_BYTES + words * 8) as u64 {
        return None;
    }
    let mut head = [0; HEADER_BYTES];
    file.read_exact_at(&mut head, 0).ok()?;
    if head != header(manifest) {
        return None;
    }
    let mut bytes = vec![0; words * 8];
    file.read_exact_at(&mut bytes, HEADER_BYTES as u64).ok()?;
    let held: Vec<u64> = bytes.as_chunks::<8>().0.iter().map(|word| u64::from_le_bytes(*word)).collect();
    // Bits of blocks that are not stored would be counted, and never found.
    let sane = (0u64..)
        .zip(&held)
        .all(|(group, word)| (0..64).all(|bit| word >> bit & 1 == 0 || manifest.is_stored(group * 64 + bit)));
    sane.then_some(held)
}

fn write_empty_bitmap(file: &File, manifest: &Manifest, words: usize) -> Result<()> {
    file.set_len(0).context("empty the bitmap")?;
    file.set_len((HEADER_BYTES + words * 8) as u64).context("size the bitmap")?;
    file.write_all_at(&header(manifest), 0).context("write the bitmap's header")
}
