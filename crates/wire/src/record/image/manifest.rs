//! The manifest: header, directory, entries. The layout stands in the parent module.

use super::{
    BLOCK_BYTES, Encoding, PACK_BYTES_MAX, PACKS_MAX, Reader, SIZE_BYTES_MAX, VERSION, block_count, corrupt,
};
use crate::error::WireError;
use crate::id::BlockHash;

/// Bytes of the header.
pub const MANIFEST_HEADER_BYTES: usize = 64;
/// Bytes of the directory per 64 blocks.
pub const DIRECTORY_BYTES: u64 = 16;
/// Bytes of an entry.
pub const ENTRY_BYTES: u64 = 48;

const MAGIC: &[u8; 8] = b"WHBLMANI";

/// The first bytes of a manifest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ManifestHeader {
    /// Size of the disk, bytes; a multiple of 512.
    pub size_bytes: u64,
    /// How many packs it refers to.
    pub packs: u64,
    /// How many blocks are stored.
    pub entries: u64,
    /// Bytes of the stored blocks, uncompressed.
    pub data_bytes: u64,
}

impl ManifestHeader {
    /// How many blocks the disk has, stored or not.
    pub fn blocks(&self) -> u64 {
        block_count(self.size_bytes)
    }

    /// Where the name of pack `pack` stands.
    pub fn pack_at(&self, pack: u64) -> u64 {
        MANIFEST_HEADER_BYTES as u64 + pack * 32
    }

    /// Where the directory of blocks `64·group …` stands.
    pub fn directory_at(&self, group: u64) -> u64 {
        self.pack_at(self.packs) + group * DIRECTORY_BYTES
    }

    /// How many groups of 64 blocks there are.
    pub fn groups(&self) -> u64 {
        self.blocks().div_ceil(64)
    }

    /// Where entry `entry` stands.
    pub fn entry_at(&self, entry: u64) -> u64 {
        self.directory_at(self.groups()) + entry * ENTRY_BYTES
    }

    /// Bytes of the whole manifest.
    pub fn file_bytes(&self) -> u64 {
        self.entry_at(self.entries)
    }

    /// As bytes.
    pub fn encode(&self) -> [u8; MANIFEST_HEADER_BYTES] {
        let mut out = [0; MANIFEST_HEADER_BYTES];
        out[..8].copy_from_slice(MAGIC);
        out[8..12].copy_from_slice(&VERSION.to_le_bytes());
        out[12..16].copy_from_slice(&BLOCK_BYTES.to_le_bytes());
        for (place, value) in
            [self.size_bytes, self.packs, self.entries, self.data_bytes].into_iter().enumerate()
        {
            out[16 + place * 8..24 + place * 8].copy_from_slice(&value.to_le_bytes());
        }
        out
    }

    /// From bytes; every number is within its limit, so that no place computed from it overflows.
    pub fn decode(bytes: &[u8]) -> Result<Self, WireError> {
        let mut reader = Reader::new(bytes, "a manifest");
        reader.magic(MAGIC)?;
        let block_bytes = reader.u32()?;
        if block_bytes != BLOCK_BYTES {
            return Err(corrupt(format!("read a manifest: blocks of {block_bytes} bytes are not known")));
        }
        let header = Self {
            size_bytes: reader.u64()?,
            packs: reader.u64()?,
            entries: reader.u64()?,
            data_bytes: reader.u64()?,
        };
        let sane = header.size_bytes <= SIZE_BYTES_MAX
            && header.size_bytes.is_multiple_of(512)
            && header.packs <= PACKS_MAX
            && header.entries <= header.blocks()
            && header.data_bytes <= header.size_bytes;
        if !sane {
            return Err(corrupt("read a manifest: its sizes are outside the limits"));
        }
        Ok(header)
    }
}

/// One directory item: 64 blocks.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Directory {
    /// Bit i: block `64·n + i` is stored.
    pub present: u64,
    /// The entry of the first stored one.
    pub first_entry: u64,
}

impl Directory {
    /// As bytes.
    pub fn encode(&self) -> [u8; DIRECTORY_BYTES as usize] {
        let mut out = [0; DIRECTORY_BYTES as usize];
        out[..8].copy_from_slice(&self.present.to_le_bytes());
        out[8..].copy_from_slice(&self.first_entry.to_le_bytes());
        out
    }

    /// From bytes.
    pub fn decode(bytes: &[u8]) -> Result<Self, WireError> {
        let mut reader = Reader::new(bytes, "a manifest's directory");
        Ok(Self { present: reader.u64()?, first_entry: reader.u64()? })
    }

    /// The entry of block `block`, if it is stored.
    pub fn entry_of(&self, block: u64) -> Option<u64> {
        let bit = 1u64 << (block % 64);
        let below = (self.present & (bit - 1)).count_ones();
        (self.present & bit != 0).then(|| self.first_entry.saturating_add(u64::from(below)))
    }
}

/// Where a stored block is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Entry {
    /// The hash of its bytes, uncompressed.
    pub hash: BlockHash,
    /// Which pack of the manifest's list.
    pub pack: u32,
    /// Where in the pack.
    pub offset: u32,
    /// How many bytes there.
    pub length: u32,
    /// How it stands there.
    pub encoding: Encoding,
}

impl Entry {
    /// As bytes.
    pub fn encode(&self) -> [u8; ENTRY_BYTES as usize] {
        let mut out = [0; ENTRY_BYTES as usize];
        out[..32].copy_from_slice(&self.hash.0);
        out[32..36].copy_from_slice(&self.pack.to_le_bytes());
        out[36..40].copy_from_slice(&self.offset.to_le_bytes());
        out[40..44].copy_from_slice(&self.length.to_le_bytes());
        out[44] = self.encoding.code();
        out
    }

    /// From bytes; `packs` is the length of the list it refers to.
    pub fn decode(bytes: &[u8], packs: u64) -> Result<Self, WireError> {
        let mut reader = Reader::new(bytes, "an entry of a block");
        let entry = Self {
            hash: BlockHash(reader.take()?),
            pack: reader.u32()?,
            offset: reader.u32()?,
            length: reader.u32()?,
            encoding: Encoding::from_code(reader.u8()?)?,
        };
        let end = u64::from(entry.offset) + u64::from(entry.length);
        let sane = u64::from(entry.pack) < packs
            && end <= PACK_BYTES_MAX
            && entry.length > 0
            // A block that does not shrink is stored raw.
            && entry.length <= BLOCK_BYTES;
        if !sane {
            return Err(corrupt("read an entry of a block: its place is outside the limits"));
        }
        Ok(entry)
    }
}
