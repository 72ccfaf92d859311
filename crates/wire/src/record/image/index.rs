//! The dedup index: which blocks a repository has, ascending by hash. The layout stands in the parent module.

use super::{ENTRY_BYTES, PACKS_MAX, Reader, VERSION, corrupt};
use crate::error::WireError;

/// Bytes of the header.
pub const INDEX_HEADER_BYTES: usize = 32;
/// Bytes per block.
pub const INDEX_ENTRY_BYTES: u64 = ENTRY_BYTES;

const MAGIC: &[u8; 8] = b"WHBLINDX";

/// The first bytes of an index.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct IndexHeader {
    /// How many packs it refers to.
    pub packs: u64,
    /// How many blocks it tells of.
    pub entries: u64,
}

impl IndexHeader {
    /// Where the name of pack `pack` stands.
    pub fn pack_at(&self, pack: u64) -> u64 {
        INDEX_HEADER_BYTES as u64 + pack * 32
    }

    /// Where entry `entry` stands.
    pub fn entry_at(&self, entry: u64) -> u64 {
        self.pack_at(self.packs) + entry * INDEX_ENTRY_BYTES
    }

    /// Bytes of the whole index.
    pub fn file_bytes(&self) -> u64 {
        self.entry_at(self.entries)
    }

    /// As bytes.
    pub fn encode(&self) -> [u8; INDEX_HEADER_BYTES] {
        let mut out = [0; INDEX_HEADER_BYTES];
        out[..8].copy_from_slice(MAGIC);
        out[8..12].copy_from_slice(&VERSION.to_le_bytes());
        out[16..24].copy_from_slice(&self.packs.to_le_bytes());
        out[24..32].copy_from_slice(&self.entries.to_le_bytes());
        out
    }

    /// From bytes.
    pub fn decode(bytes: &[u8]) -> Result<Self, WireError> {
        let mut reader = Reader::new(bytes, "a dedup index");
        reader.magic(MAGIC)?;
        reader.u32()?;
        let header = Self { packs: reader.u64()?, entries: reader.u64()? };
        if header.packs > PACKS_MAX || header.entries > 1 << 40 {
            return Err(corrupt("read a dedup index: its sizes are outside the limits"));
        }
        Ok(header)
    }
}
