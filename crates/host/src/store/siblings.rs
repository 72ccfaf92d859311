//! Equal blocks of other cached images: copied on this host instead of fetched.
//!
//! ```text
//!   hashes   "WHBLHASH" │ version u32 │ 0 u32 │ runs u64 │ 0 u64 │ (length u64 per run) │ items of run 0 │ run 1 …
//!   item     first 8 bytes of the hash, as a number │ block u64        each run ascending
//! ```
//!
//! Several short runs rather than one, so that building it takes a few MiB of memory whatever the image's size. It is
//! a hint: whatever it points at is checked against the hash in the manifest, and the bytes against the hash.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;

use whimbrel_wire::BlockHash;

use super::manifest::Manifest;
use super::sorted::{lower_bound, sort_key};
use crate::error::{Context, Error, ErrorKind, Result};

const MAGIC: &[u8; 8] = b"WHBLHASH";
const VERSION: u32 = 1;
const HEADER_BYTES: u64 = 32;
/// Items sorted at once: 4 MiB.
const RUN_ITEMS: usize = 256 << 10;
const RUNS_MAX: u64 = 1 << 16;

/// See the module's charter.
pub struct Hashes {
    file: File,
    /// Where each run starts, and its length in items.
    runs: Vec<(u64, u64)>,
}

impl Hashes {
    /// Opens the file in the cache directory `dir`, made from `manifest` if it is missing or unreadable.
    pub fn open(dir: &Path, manifest: &Manifest) -> Result<Self> {
        let path = dir.join("hashes");
        if let Ok(found) = File::open(&path).context("open").and_then(Self::read) {
            return Ok(found);
        }
        let part = dir.join("hashes.part");
        build(&part, manifest).with_context(|| format!("index the hashes of image {}", manifest.id()))?;
        std::fs::rename(&part, &path).context("rename the index of hashes")?;
        Self::read(File::open(&path).context("open the index of hashes")?)
    }

    fn read(file: File) -> Result<Self> {
        let bad = || Error::new(ErrorKind::Corrupt, "read an index of hashes");
        let mut head = [0; HEADER_BYTES as usize];
        file.read_exact_at(&mut head, 0).context("read an index of hashes")?;
        let (magic, rest) = head.split_first_chunk::<8>().ok_or_else(bad)?;
        let (version, rest) = rest.split_first_chunk::<4>().ok_or_else(bad)?;
        let count = rest.get(4..12).and_then(|bytes| bytes.first_chunk::<8>()).ok_or_else(bad)?;
        let count = u64::from_le_bytes(*count);
        if magic != MAGIC || u32::from_le_bytes(*version) != VERSION || count > RUNS_MAX {
            return Err(bad());
        }
        let mut lengths = vec![0; usize::try_from(count * 8).map_err(|_| bad())?];
        file.read_exact_at(&mut lengths, HEADER_BYTES).context("read an index of hashes")?;
        let mut at = HEADER_BYTES + count * 8;
        let mut runs = Vec::new();
        for length in lengths.as_chunks::<8>().0 {
            let length = u64::from_le_bytes(*length);
            runs.push((at, length));
            at = length.checked_mul(16).and_then(|bytes| at.checked_add(bytes)).ok_or_else(bad)?;
        }
        if file.metadata().context("read an index of hashes")?.len() != at {
            return Err(bad());
        }
        Ok(Self { file, runs })
    }

    /// A block of `manifest`, whose index this is, that has this hash and for which `here` says yes.
    pub fn find(
        &self,
        manifest: &Manifest,
        hash: &BlockHash,
        here: impl Fn(u64) -> bool,
    ) -> Result<Option<u64>> {
        let key = sort_key(&hash.0);
        for (start, length) in &self.runs {
            let mut at = lower_bound(*length, key, |item| Ok(self.item(*start, item)?.0))?;
            while at < *length {
                let (found, block) = self.item(*start, at)?;
                if found != key {
                    break;
                }
                if here(block) && manifest.place(block)?.is_some_and(|place| place.hash == *hash) {
                    return Ok(Some(block));
                }
                at += 1;
            }
        }
        Ok(None)
    }

    fn item(&self, start: u64, item: u64) -> Result<(u64, u64)> {
        let mut bytes = [0; 16];
        self.file.read_exact_at(&mut bytes, start + item * 16).context("read an index of hashes")?;
        let [key, block] = [0, 8].map(|at| {
            bytes.get(at..at + 8).and_then(|part| part.first_chunk::<8>()).copied().unwrap_or_default()
        });
        Ok((u64::from_le_bytes(key), u64::from_le_bytes(block)))
    }
}

fn build(path: &Path, manifest: &Manifest) -> Result<()> {
    let file = File::create(path).context("create it")?;
    let entries = manifest.header().entries;
    let runs = entries.div_ceil(RUN_ITEMS as u64);
    let mut head = Vec::new();
    head.extend_from_slice(MAGIC);
    head.extend_from_slice(&VERSION.to_le_bytes());
    head.extend_from_slice(&[0; 4]);
    head.extend_from_slice(&runs.to_le_bytes());
    head.extend_from_slice(&[0; 8]);
    for run in 0..runs {
        let length = (entries - run * RUN_ITEMS as u64).min(RUN_ITEMS as u64);
        head.extend_from_slice(&length.to_le_bytes());
    }
    file.write_all_at(&head, 0).context("write it")?;
    let mut at = head.len() as u64;
    let mut blocks = manifest.stored_from(0);
    for _ in 0..runs {
        let mut items = Vec::with_capacity(RUN_ITEMS.min(usize::try_from(entries).unwrap_or(RUN_ITEMS)));
        for block in blocks.by_ref().take(RUN_ITEMS) {
            if let Some(place) = manifest.place(block)? {
                items.push((sort_key(&place.hash.0), block));
            }
        }
        items.sort_unstable();
        let bytes: Vec<u8> = items
            .iter()
            .flat_map(|(key, block)| [key.to_le_bytes(), block.to_le_bytes()])
            .flatten()
            .collect();
        file.write_all_at(&bytes, at).context("write it")?;
        at += bytes.len() as u64;
    }
    Ok(())
}

#[cfg(test)]
mod fuzz {
    use super::*;

    whimbrel_fuzz::fuzz! {
        /// The index of hashes, as it was found on the disk.
        fn index(bytes) seeds [
            [MAGIC.as_slice(), &[1, 0, 0, 0, 0, 0, 0, 0, 1], &[0; 15], &[2], &[0; 7], &[0; 32]].concat(),
        ] {
            let file = rustix::fs::memfd_create("fuzz", rustix::fs::MemfdFlags::CLOEXEC).expect("make a file");
            let file = File::from(file);
            file.write_all_at(bytes, 0).expect("fill a file");
            let Ok(hashes) = Hashes::read(file) else { return };
            for (start, length) in &hashes.runs {
                for at in [0, length.saturating_sub(1)].into_iter().filter(|at| at < length) {
                    let _ = hashes.item(*start, at).expect("items lie inside the file");
                }
            }
        }
    }
}
