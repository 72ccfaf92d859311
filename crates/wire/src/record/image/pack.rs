//! The pack's tail: an index of its blocks, and a trailer. The layout stands in the parent module.

use super::{BLOCK_BYTES, Encoding, PACK_ENTRIES_MAX, Reader, VERSION, corrupt};
use crate::error::WireError;
use crate::id::BlockHash;

/// Bytes of the trailer.
pub const PACK_TRAILER_BYTES: usize = 64;
/// Bytes of the index per block.
pub const PACK_ENTRY_BYTES: usize = 48;

const MAGIC: &[u8; 8] = b"WHBLPACK";

/// One block of a pack.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PackEntry {
    /// The hash of its bytes, uncompressed.
    pub hash: BlockHash,
    /// Where in the pack.
    pub offset: u32,
    /// How many bytes there.
    pub length: u32,
    /// How it stands there.
    pub encoding: Encoding,
}

/// The last bytes of a pack.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PackTrailer {
    /// How many blocks it has.
    pub entries: u32,
    /// BLAKE3 of the index before the trailer.
    pub index_hash: [u8; 32],
}

impl PackTrailer {
    /// Bytes of the index.
    pub fn index_bytes(&self) -> usize {
        self.entries as usize * PACK_ENTRY_BYTES
    }

    /// From the last [`PACK_TRAILER_BYTES`] of a pack.
    pub fn decode(bytes: &[u8]) -> Result<Self, WireError> {
        let mut reader = Reader::new(bytes, "a pack's trailer");
        reader.magic(MAGIC)?;
        let trailer = Self { entries: reader.u32()?, index_hash: reader.take()? };
        if trailer.entries > PACK_ENTRIES_MAX {
            return Err(corrupt("read a pack's trailer: more blocks than a pack has"));
        }
        Ok(trailer)
    }
}

/// Index and trailer of a pack with these blocks.
pub fn encode_pack_tail(entries: &[PackEntry]) -> Vec<u8> {
    let mut out = Vec::with_capacity(entries.len() * PACK_ENTRY_BYTES + PACK_TRAILER_BYTES);
    for entry in entries {
        out.extend_from_slice(&entry.hash.0);
        out.extend_from_slice(&entry.offset.to_le_bytes());
        out.extend_from_slice(&entry.length.to_le_bytes());
        out.push(entry.encoding.code());
        out.extend_from_slice(&[0; 7]);
    }
    let index_hash = *blake3::hash(&out).as_bytes();
    out.extend_from_slice(MAGIC);
    out.extend_from_slice(&VERSION.to_le_bytes());
    out.extend_from_slice(&u32::try_from(entries.len()).unwrap_or(u32::MAX).to_le_bytes());
    out.extend_from_slice(&index_hash);
    out.extend_from_slice(&[0; 16]);
    out
}

/// The index of a pack whose blocks fill the first `data_bytes` of it.
pub fn decode_pack_index(
    index: &[u8],
    trailer: &PackTrailer,
    data_bytes: u64,
) -> Result<Vec<PackEntry>, WireError> {
    if index.len() != trailer.index_bytes() || *blake3::hash(index).as_bytes() != trailer.index_hash {
        return Err(corrupt("read a pack's index: it does not have the hash that its trailer tells"));
    }
    index.chunks_exact(PACK_ENTRY_BYTES).map(|bytes| decode_entry(bytes, data_bytes)).collect()
}

fn decode_entry(bytes: &[u8], data_bytes: u64) -> Result<PackEntry, WireError> {
    let mut reader = Reader::new(bytes, "a pack's index");
    let entry = PackEntry {
        hash: BlockHash(reader.take()?),
        offset: reader.u32()?,
        length: reader.u32()?,
        encoding: Encoding::from_code(reader.u8()?)?,
    };
    let end = u64::from(entry.offset) + u64::from(entry.length);
    if end > data_bytes || entry.length == 0 || entry.length > BLOCK_BYTES {
        return Err(corrupt("read a pack's index: a block lies outside the pack"));
    }
    Ok(entry)
}
