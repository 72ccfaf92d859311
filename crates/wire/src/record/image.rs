//! Images at rest: manifests, packs, dedup indexes, names, and the layout of a repository.
//!
//! ```text
//!   REPOSITORY/                                  an object store: a directory, S3, read-only HTTP
//!     manifests/IMAGE_ID                         one per image; its BLAKE3 is the image's id
//!     packs/PACK_ID                              blocks, 32 MiB or so of them; its BLAKE3 is its name
//!     index/HASH                                 where blocks with which hashes are; only for publishing
//!     names/NAME/TAG.json                        ImageName: what a name means
//!     publishing/UUID, collecting/UUID           who is at work (see host::store::guard)
//! ```
//!
//! All integers are little-endian. A manifest is used from a file by `pread`, without loading it:
//!
//! ```text
//!   manifest   header 64 B │ pack names, 32 B each │ directory, 16 B per 64 blocks │ entries, 48 B per stored block
//!
//!   header     "WHBLMANI" │ version u32 │ block_bytes u32 │ size_bytes u64 │ packs u64 │ entries u64 │ data_bytes u64
//!              │ 0 u64 │ 0 u64
//!   directory  present u64 (bit i: block 64·n+i is stored; the others are zeros) │ first entry u64
//!   entry      hash 32 B │ pack u32 │ offset u32 │ length u32 │ encoding u8 │ 0 u8 ×3
//!
//!   pack       blocks … │ index: hash 32 B, offset u32, length u32, encoding u8, 0 ×7, per block │ trailer 64 B
//!   trailer    "WHBLPACK" │ version u32 │ entries u32 │ index BLAKE3 32 B │ 0 u64 │ 0 u64
//!
//!   index      header 32 B │ pack names, 32 B each │ entries, 48 B each as in a manifest, ascending by hash
//!   header     "WHBLINDX" │ version u32 │ 0 u32 │ packs u64 │ entries u64
//! ```
//!
//! The entry of block `b` is `first entry + (how many bits of present are set below b % 64)`.
//!
//! Versions: a reader refuses a version it does not know; bytes shown as 0 are ignored by it. Release N writes what
//! release N − 1 reads.
//!
//! Invariants: decoders take bytes from strangers, never panic, and check every number against the limits here.
//!
//! Not here: how objects get there and back (`host::store`).

mod index;
mod manifest;
mod pack;

use serde::{Deserialize, Serialize};

use crate::error::{ErrorKind, WireError};
use crate::id::{ImageId, ImageRef, Name};

pub use index::{INDEX_ENTRY_BYTES, INDEX_HEADER_BYTES, IndexHeader};
pub use manifest::{DIRECTORY_BYTES, Directory, ENTRY_BYTES, Entry, MANIFEST_HEADER_BYTES, ManifestHeader};
pub use pack::{
    PACK_ENTRY_BYTES, PACK_TRAILER_BYTES, PackEntry, PackTrailer, decode_pack_index, encode_pack_tail,
};

/// The version of every format here.
pub const VERSION: u32 = 1;
/// Bytes of a block of an image; the last one may be shorter.
pub const BLOCK_BYTES: u32 = 128 << 10;
/// The largest disk: 64 TiB.
pub const SIZE_BYTES_MAX: u64 = 64 << 40;
/// The most packs a manifest or index refers to.
pub const PACKS_MAX: u64 = 1 << 24;
/// A pack is closed when it has reached this size.
pub const PACK_BYTES_AIM: usize = 32 << 20;
/// The largest pack that is read.
pub const PACK_BYTES_MAX: u64 = 256 << 20;
/// The most blocks of a pack.
pub const PACK_ENTRIES_MAX: u32 = 1 << 20;
/// The largest `names/…json`.
pub const NAME_BYTES_MAX: usize = 64 << 10;

/// How a block stands in its pack.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Encoding {
    /// As it is.
    Raw,
    /// One zstd frame.
    Zstd,
}

impl Encoding {
    fn code(self) -> u8 {
        match self {
            Self::Raw => 0,
            Self::Zstd => 1,
        }
    }

    fn from_code(code: u8) -> Result<Self, WireError> {
        match code {
            0 => Ok(Self::Raw),
            1 => Ok(Self::Zstd),
            other => Err(corrupt(format!("read an entry: no encoding has the number {other}"))),
        }
    }
}

/// `names/NAME/TAG.json`: a name, so that a repository explains itself without the cluster's metadata.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ImageName {
    /// Its name and tag.
    pub image: ImageRef,
    /// What it means.
    pub id: ImageId,
    /// Size of the disk, bytes.
    pub size_bytes: u64,
    /// Bytes of its blocks that are not zeros, uncompressed.
    pub stored_bytes: u64,
    /// Tenant that may read it.
    #[serde(default)]
    pub domain: Option<Name>,
    /// When it was published, seconds since 1970; for people.
    #[serde(default)]
    pub published_s: u64,
}

/// The prefix of all names.
pub const NAMES: &str = "names";
/// The prefix of all manifests.
pub const MANIFESTS: &str = "manifests";
/// The prefix of all packs.
pub const PACKS: &str = "packs";
/// The prefix of all dedup indexes.
pub const INDEXES: &str = "index";
/// The prefix of the marks of those who publish.
pub const PUBLISHING: &str = "publishing";
/// The prefix of the marks of those who collect.
pub const COLLECTING: &str = "collecting";

/// Where a name's object is.
pub fn name_path(image: &ImageRef) -> String {
    format!("{NAMES}/{}/{}.json", image.name, image.tag)
}

/// Where an image's manifest is.
pub fn manifest_path(id: &ImageId) -> String {
    format!("{MANIFESTS}/{id}")
}

/// The name of a pack: the BLAKE3 of its bytes.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PackId(pub [u8; 32]);

impl PackId {
    /// The name as it stands in paths.
    pub fn to_hex(&self) -> String {
        blake3::Hash::from_bytes(self.0).to_hex().to_string()
    }

    /// Reads it back.
    pub fn from_hex(text: &str) -> Option<Self> {
        blake3::Hash::from_hex(text).ok().map(|hash| Self(*hash.as_bytes()))
    }

    /// Where the pack is.
    pub fn path(&self) -> String {
        format!("{PACKS}/{}", self.to_hex())
    }
}

impl std::fmt::Debug for PackId {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.to_hex()[..12])
    }
}

/// How many bytes block `index` of a disk of `size_bytes` has; 0 beyond its end.
pub fn block_len(size_bytes: u64, index: u64) -> usize {
    let start = index.saturating_mul(u64::from(BLOCK_BYTES));
    let len = size_bytes.saturating_sub(start).min(u64::from(BLOCK_BYTES));
    usize::try_from(len).unwrap_or(0)
}

/// How many blocks a disk of `size_bytes` has.
pub fn block_count(size_bytes: u64) -> u64 {
    size_bytes.div_ceil(u64::from(BLOCK_BYTES))
}

fn corrupt(what: impl Into<String>) -> WireError {
    WireError::new(ErrorKind::Corrupt, what)
}

/// Takes fixed-size integers off a slice; what is missing reads as an error, never as a panic.
struct Reader<'a> {
    rest: &'a [u8],
    what: &'static str,
}

impl<'a> Reader<'a> {
    fn new(bytes: &'a [u8], what: &'static str) -> Self {
        Self { rest: bytes, what }
    }

    fn take<const N: usize>(&mut self) -> Result<[u8; N], WireError> {
        let (first, rest) = self
            .rest
            .split_first_chunk::<N>()
            .ok_or_else(|| corrupt(format!("read {}: it is cut short", self.what)))?;
        self.rest = rest;
        Ok(*first)
    }

    fn u8(&mut self) -> Result<u8, WireError> {
        self.take::<1>().map(|[byte]| byte)
    }

    fn u32(&mut self) -> Result<u32, WireError> {
        self.take().map(u32::from_le_bytes)
    }

    fn u64(&mut self) -> Result<u64, WireError> {
        self.take().map(u64::from_le_bytes)
    }

    fn magic(&mut self, magic: &[u8; 8]) -> Result<(), WireError> {
        if self.take::<8>()? != *magic {
            return Err(corrupt(format!("read {}: it does not start with its mark", self.what)));
        }
        match self.u32()? {
            VERSION => Ok(()),
            other => Err(WireError::new(
                ErrorKind::Unsupported,
                format!("read {}: version {other} is not known to this release", self.what),
            )),
        }
    }
}

#[cfg(test)]
mod test;
