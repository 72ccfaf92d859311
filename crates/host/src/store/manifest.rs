//! A manifest in a file: looked up by `pread`, one bit per block in memory.
//!
//! Invariant: a manifest is used only after its bytes had the hash that is the image's id, and its directory was
//! found consistent; whoever finds wrong bytes afterwards asks [`Manifest::recheck`] before blaming anybody else.
//!
//! Not here: the layout (`wire::record::image`).

use std::fs::File;
use std::io::Read;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use bytes::Bytes;
use whimbrel_wire::record::image::{
    DIRECTORY_BYTES, Directory, ENTRY_BYTES, Encoding, Entry, MANIFEST_HEADER_BYTES, ManifestHeader, PackId,
    SIZE_BYTES_MAX, block_len, manifest_path,
};
use whimbrel_wire::{BlockHash, ImageId};

use super::repo::Repo;
use crate::error::{Context, Error, ErrorKind, Result};

/// Manifests are fetched in parts of this size.
const PART_BYTES: u64 = 4 << 20;

/// See the module's charter.
pub struct Manifest {
    path: PathBuf,
    file: File,
    id: ImageId,
    header: ManifestHeader,
    /// One bit per block: stored, or zeros.
    present: Vec<u64>,
}

/// Where a block is in the repository.
#[derive(Clone, Copy, Debug)]
pub struct Place {
    /// The hash of its bytes.
    pub hash: BlockHash,
    /// How many bytes it has, uncompressed.
    pub len: usize,
    /// Its pack.
    pub pack: PackId,
    /// Where in the pack.
    pub offset: u64,
    /// How many bytes there.
    pub stored_len: u64,
    /// How it stands there.
    pub encoding: Encoding,
}

impl Manifest {
    /// Opens the file at `path`, whose hash must be `id`.
    pub fn open(path: &Path, id: ImageId) -> Result<Self> {
        let what = || format!("open the manifest of image {id}");
        let file = File::open(path).with_context(what)?;
        if hash_of(&file).with_context(what)? != id.0 {
            return Err(Error::new(ErrorKind::Corrupt, "it does not have the hash of the image"))
                .with_context(what);
        }
        Self::checked(path, file, id).with_context(what)
    }

    fn checked(path: &Path, file: File, id: ImageId) -> Result<Self> {
        let mut head = [0; MANIFEST_HEADER_BYTES];
        file.read_exact_at(&mut head, 0).context("read its header")?;
        let header = ManifestHeader::decode(&head)?;
        let length = file.metadata().context("read its size")?.len();
        if length != header.file_bytes() {
            return Err(Error::new(
                ErrorKind::Corrupt,
                format!("it has {length} bytes, its header tells {}", header.file_bytes()),
            ));
        }
        let present = read_directory(&file, &header)?;
        Ok(Self { path: path.to_owned(), file, id, header, present })
    }

    /// Fetches the manifest of `id` into `path`, unless it is there already.
    pub async fn fetch(repo: &Repo, id: ImageId, path: &Path) -> Result<()> {
        if path.exists() {
            return Ok(());
        }
        let object = manifest_path(&id);
        let what = || format!("fetch the manifest of image {id}");
        let Some(size) = repo.size(&object).await? else {
            return Err(Error::new(ErrorKind::NotFound, format!("{} has no such image", repo.url()))
                .hint("was it removed and collected, or is this another store?"))
            .with_context(what);
        };
        let largest =
            ManifestHeader { size_bytes: SIZE_BYTES_MAX, packs: 1 << 20, entries: 1 << 29, data_bytes: 0 };
        if size > largest.file_bytes() {
            return Err(Error::new(ErrorKind::Corrupt, format!("it has {size} bytes"))).with_context(what);
        }
        let part_path = path.with_extension("part");
        let file = File::create(&part_path).with_context(what)?;
        let mut hasher = blake3::Hasher::new();
        let mut at = 0;
        while at < size {
            let part = repo.range(&object, at, PART_BYTES.min(size - at)).await?;
            hasher.update(&part);
            file.write_all_at(&part, at).with_context(what)?;
            at += part.len() as u64;
        }
        if *hasher.finalize().as_bytes() != id.0 {
            let _ = std::fs::remove_file(&part_path);
            return Err(Error::new(
                ErrorKind::Corrupt,
                format!("{object} of {} is damaged: it does not have the hash of its name", repo.url()),
            )
            .hint("publish the image again"))
            .with_context(what);
        }
        std::fs::rename(&part_path, path).with_context(what)
    }

    /// What it describes.
    pub fn id(&self) -> ImageId {
        self.id
    }

    /// Its header.
    pub fn header(&self) -> &ManifestHeader {
        &self.header
    }

    /// How many blocks the disk has, stored or not.
    pub fn blocks(&self) -> u64 {
        self.header.blocks()
    }

    /// Whether the block is stored; the others are zeros.
    pub fn is_stored(&self, block: u64) -> bool {
        let word = usize::try_from(block / 64).ok().and_then(|word| self.present.get(word));
        word.is_some_and(|word| word >> (block % 64) & 1 != 0)
    }

    /// How many blocks from `block` on are all stored, or all zeros.
    pub fn run(&self, block: u64) -> u64 {
        let blocks = self.blocks();
        let stored = self.is_stored(block);
        let mut end = block + 1;
        while end < blocks {
            let whole = if stored { u64::MAX } else { 0 };
            let word = usize::try_from(end / 64).ok().and_then(|word| self.present.get(word));
            if end.is_multiple_of(64) && word == Some(&whole) {
                end += 64;
            } else if self.is_stored(end) == stored {
                end += 1;
            } else {
                break;
            }
        }
        end.min(blocks).saturating_sub(block)
    }

    /// The stored blocks from `block` on, ascending.
    pub fn stored_from(&self, block: u64) -> impl Iterator<Item = u64> + '_ {
        (block..self.blocks()).filter(|block| self.is_stored(*block))
    }

    /// Where a block is; `None` if it is zeros.
    pub fn place(&self, block: u64) -> Result<Option<Place>> {
        let what = || format!("look up block {block} of image {}", self.id);
        if !self.is_stored(block) {
            return Ok(None);
        }
        let mut bytes = [0; DIRECTORY_BYTES as usize];
        self.file.read_exact_at(&mut bytes, self.header.directory_at(block / 64)).with_context(what)?;
        let entry = Directory::decode(&bytes)?.entry_of(block).filter(|entry| *entry < self.header.entries);
        let Some(number) = entry else {
            return Err(Error::new(ErrorKind::Corrupt, "the manifest's file has changed")).with_context(what);
        };
        let entry = self.entry(number).with_context(what)?;
        let mut pack = [0; 32];
        self.file.read_exact_at(&mut pack, self.header.pack_at(entry.pack.into())).with_context(what)?;
        Ok(Some(Place {
            hash: entry.hash,
            len: block_len(self.header.size_bytes, block),
            pack: PackId(pack),
            offset: entry.offset.into(),
            stored_len: entry.length.into(),
            encoding: entry.encoding,
        }))
    }

    fn entry(&self, number: u64) -> Result<Entry> {
        let mut bytes = [0; ENTRY_BYTES as usize];
        self.file.read_exact_at(&mut bytes, self.header.entry_at(number)).context("read an entry")?;
        Ok(Entry::decode(&bytes, self.header.packs)?)
    }

    /// The packs it refers to.
    pub fn packs(&self) -> Result<Vec<PackId>> {
        let count = usize::try_from(self.header.packs).unwrap_or(0);
        let mut bytes = vec![0; count * 32];
        self.file.read_exact_at(&mut bytes, self.header.pack_at(0)).context("read the list of packs")?;
        Ok(bytes.as_chunks::<32>().0.iter().map(|id| PackId(*id)).collect())
    }

    /// A part of the file, for peers.
    pub fn part(&self, offset: u64, length: u64) -> Result<Bytes> {
        let mut bytes = vec![0; usize::try_from(length).unwrap_or(0)];
        self.file.read_exact_at(&mut bytes, offset).context("read a part of the manifest")?;
        Ok(Bytes::from(bytes))
    }

    /// Whether the file still has the hash it was opened with.
    pub fn recheck(&self) -> Result<bool> {
        let file = File::open(&self.path).context("open the manifest again")?;
        Ok(hash_of(&file)? == self.id.0)
    }
}

/// Turns what a repository or a peer gave into the block, or says how it is wrong.
pub fn decode_block(place: &Place, stored: Bytes) -> Result<Bytes> {
    let bytes = match place.encoding {
        Encoding::Raw => stored,
        Encoding::Zstd => Bytes::from(
            zstd::bulk::decompress(&stored, place.len)
                .map_err(|error| Error::with_source(ErrorKind::Corrupt, "decompress a block", error))?,
        ),
    };
    check_block(place, &bytes)?;
    Ok(bytes)
}

/// Whether `bytes` are the block.
pub fn check_block(place: &Place, bytes: &[u8]) -> Result<()> {
    if bytes.len() == place.len && BlockHash::of(bytes) == place.hash {
        return Ok(());
    }
    Err(Error::new(ErrorKind::Corrupt, "check a block: its bytes do not have the hash in the manifest"))
}

fn read_directory(file: &File, header: &ManifestHeader) -> Result<Vec<u64>> {
    let groups = header.groups();
    let mut present = Vec::with_capacity(usize::try_from(groups).unwrap_or(0));
    let mut entries = 0;
    let mut buffer = vec![0; 4096 * DIRECTORY_BYTES as usize];
    let mut at = 0;
    while at < groups {
        let count = (groups - at).min(4096);
        let part = &mut buffer[..usize::try_from(count * DIRECTORY_BYTES).unwrap_or(0)];
        file.read_exact_at(part, header.directory_at(at)).context("read its directory")?;
        for bytes in part.as_chunks::<{ DIRECTORY_BYTES as usize }>().0 {
            let item = Directory::decode(bytes)?;
            if item.first_entry != entries {
                return Err(Error::new(ErrorKind::Corrupt, "its directory does not count up"));
            }
            entries += u64::from(item.present.count_ones());
            present.push(item.present);
        }
        at += count;
    }
    let spare = header.blocks() % 64;
    let beyond = spare != 0 && present.last().is_some_and(|last| last >> spare != 0);
    if entries != header.entries || beyond {
        return Err(Error::new(ErrorKind::Corrupt, "its directory does not fit its header"));
    }
    Ok(present)
}

fn hash_of(mut file: &File) -> Result<[u8; 32]> {
    let mut hasher = blake3::Hasher::new();
    let mut buffer = vec![0; 1 << 20];
    loop {
        match file.read(&mut buffer).context("read its bytes")? {
            0 => return Ok(*hasher.finalize().as_bytes()),
            n => hasher.update(&buffer[..n]),
        };
    }
}

#[cfg(test)]
mod fuzz {
    use super::*;

    fn file(bytes: &[u8]) -> File {
        let file = rustix::fs::memfd_create("fuzz", rustix::fs::MemfdFlags::CLOEXEC).expect("make a file");
        let file = File::from(file);
        file.write_all_at(bytes, 0).expect("fill a file");
        file
    }

    /// 100 blocks, three of them stored in one pack.
    fn manifest() -> Vec<u8> {
        let header = ManifestHeader { size_bytes: 100 << 17, packs: 1, entries: 3, data_bytes: 3 << 17 };
        let mut bytes = vec![0; usize::try_from(header.file_bytes()).unwrap_or(0)];
        let mut put =
            |at: u64, part: &[u8]| bytes[at as usize..at as usize + part.len()].copy_from_slice(part);
        put(0, &header.encode());
        put(header.directory_at(0), &Directory { present: 0b101, first_entry: 0 }.encode());
        put(header.directory_at(1), &Directory { present: 1 << 35, first_entry: 2 }.encode());
        for number in 0..3 {
            let hash = BlockHash([number as u8; 32]);
            let entry = Entry { hash, pack: 0, offset: 0, length: 100, encoding: Encoding::Zstd };
            put(header.entry_at(number), &entry.encode());
        }
        bytes
    }

    whimbrel_fuzz::fuzz! {
        /// A manifest whose hash is right, from somebody who publishes rubbish.
        fn manifests(bytes) seeds [manifest()] {
            let Ok(manifest) = Manifest::checked(Path::new("manifest"), file(bytes), ImageId([0; 32])) else { return };
            let blocks = manifest.blocks();
            for block in (0..blocks.min(500)).chain([blocks.saturating_sub(1), blocks, u64::MAX]) {
                let place = manifest.place(block);
                assert_eq!(manifest.is_stored(block), !matches!(place, Ok(None)), "block {block}");
                if block < blocks {
                    assert!((1..=blocks - block).contains(&manifest.run(block)));
                }
            }
            let _ = (manifest.packs(), manifest.part(0, 10), manifest.part(u64::MAX, 10));
        }

        /// A stored block: what a store or a peer sends in its place.
        fn blocks(bytes) seeds [zstd::bulk::compress(&[7; 5000], 1).expect("compress"), b"raw"] {
            for encoding in [Encoding::Raw, Encoding::Zstd] {
                let place = Place {
                    hash: BlockHash::of(b"raw"),
                    len: 3,
                    pack: PackId([0; 32]),
                    offset: 0,
                    stored_len: bytes.len() as u64,
                    encoding,
                };
                if let Ok(block) = decode_block(&place, Bytes::copy_from_slice(bytes)) {
                    assert_eq!(block, "raw");
                }
            }
        }
    }
}
