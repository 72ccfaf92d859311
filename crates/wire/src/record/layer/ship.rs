//! A layer on its way to another host: chunks of frames, in the order of the log.
//!
//! ```text
//! chunk: 0 magic "WHMBSHP1"  8 version  12 crc32c of bytes 16..72   16 disk_id  32 from (LogPoint)  52 next (LogPoint)
//!        72 frames…
//! frame (32 B): 0 crc32c of 4..32  4 crc32c of the payload  8 offset_bytes  16 length_bytes  24 kind (1 data, 2 zero)
//!        then the payload, for data
//! ```
//!
//! A chunk goes from one place of the source's log to a later one. Its frames are what is still alive of the
//! records between, so a chunk may be empty. `ShipPosition::chain` is a running BLAKE3: of the position before it
//! and the whole chunk; source and receiver each compute it over the chunks that were applied, in order, and must
//! agree at the end.

use crate::error::{ErrorKind, WireError};
use crate::id::DiskId;
use crate::record::layer::field::{self, put};
use crate::record::layer::log::LogPoint;
use crate::record::layer::{BLOCK_BYTES, DISK_BYTES_MAX, PAYLOAD_BYTES_MAX, VERSION};
use serde::{Deserialize, Serialize};
use uuid::Uuid;

const MAGIC: &[u8; 8] = b"WHMBSHP1";
/// Length of a chunk's head, bytes.
pub const CHUNK_HEAD_LEN: usize = 72;
/// Length of a frame's head, bytes.
pub const FRAME_HEAD_LEN: usize = 32;

/// How far a layer has been shipped: a place in the source's log, and the hash of all chunks up to it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ShipPosition {
    /// Place in the source's log.
    pub at: LogPoint,
    /// Running BLAKE3 of the chunks.
    pub chain: [u8; 32],
}

impl ShipPosition {
    /// Encoded length, bytes.
    pub const LEN: usize = LogPoint::LEN + 32;

    /// Nothing has been shipped.
    pub const START: Self = Self { at: LogPoint::START, chain: [0; 32] };

    /// As bytes.
    pub fn encode(&self) -> [u8; Self::LEN] {
        let mut out = [0; Self::LEN];
        put(&mut out, 0, &self.at.encode());
        put(&mut out, LogPoint::LEN, &self.chain);
        out
    }

    /// From the first [`Self::LEN`] bytes.
    pub fn decode(from: &[u8]) -> Result<Self, WireError> {
        if from.len() < Self::LEN {
            return Err(WireError::new(ErrorKind::Corrupt, "read ship position: too short"));
        }
        Ok(Self { at: LogPoint::decode(from, 0)?, chain: field::bytes(from, LogPoint::LEN) })
    }

    /// The position after `chunk`, whose head says `next`.
    pub fn after(&self, chunk: &[u8], next: LogPoint) -> Self {
        let mut hasher = blake3::Hasher::new();
        hasher.update(&self.chain).update(chunk);
        Self { at: next, chain: *hasher.finalize().as_bytes() }
    }
}

/// Builds a chunk.
#[derive(Debug)]
pub struct ChunkBuilder {
    bytes: Vec<u8>,
}

impl ChunkBuilder {
    /// An empty chunk with room for `capacity` bytes.
    pub fn with_capacity(capacity: usize) -> Self {
        let mut bytes = Vec::with_capacity(capacity.max(CHUNK_HEAD_LEN));
        bytes.resize(CHUNK_HEAD_LEN, 0);
        Self { bytes }
    }

    /// Bytes so far.
    pub fn len(&self) -> usize {
        self.bytes.len()
    }

    /// Whether there is no frame yet.
    pub fn is_empty(&self) -> bool {
        self.bytes.len() == CHUNK_HEAD_LEN
    }

    /// Adds payload.
    pub fn data(&mut self, offset_bytes: u64, payload: &[u8]) {
        self.frame(offset_bytes, payload.len() as u64, 1, crc32c::crc32c(payload));
        self.bytes.extend_from_slice(payload);
    }

    /// Adds a range of zeros.
    pub fn zero(&mut self, offset_bytes: u64, length_bytes: u64) {
        self.frame(offset_bytes, length_bytes, 2, 0);
    }

    fn frame(&mut self, offset_bytes: u64, length_bytes: u64, kind: u8, payload_crc: u32) {
        let mut head = [0; FRAME_HEAD_LEN];
        put(&mut head, 4, &payload_crc.to_le_bytes());
        put(&mut head, 8, &offset_bytes.to_le_bytes());
        put(&mut head, 16, &length_bytes.to_le_bytes());
        put(&mut head, 24, &[kind]);
        let crc = crc32c::crc32c(&head[4..]);
        put(&mut head, 0, &crc.to_le_bytes());
        self.bytes.extend_from_slice(&head);
    }

    /// The chunk's bytes.
    pub fn finish(mut self, disk_id: DiskId, from: LogPoint, next: LogPoint) -> Vec<u8> {
        put(&mut self.bytes, 0, MAGIC);
        put(&mut self.bytes, 8, &VERSION.to_le_bytes());
        put(&mut self.bytes, 16, disk_id.0.as_bytes());
        put(&mut self.bytes, 32, &from.encode());
        put(&mut self.bytes, 52, &next.encode());
        let crc = crc32c::crc32c(self.bytes.get(16..CHUNK_HEAD_LEN).unwrap_or_default());
        put(&mut self.bytes, 12, &crc.to_le_bytes());
        self.bytes
    }
}

/// One range in a chunk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ShipFrame<'a> {
    /// Where on the disk, bytes; a multiple of 4096.
    pub offset_bytes: u64,
    /// How much, bytes; a multiple of 4096.
    pub length_bytes: u64,
    /// Its bytes, or `None` for zeros.
    pub payload: Option<&'a [u8]>,
}

/// A chunk whose every checksum was verified.
#[derive(Clone, Debug)]
pub struct ShipChunk<'a> {
    /// The layer it is of.
    pub disk_id: DiskId,
    /// From this place of the source's log …
    pub from: LogPoint,
    /// … to this one.
    pub next: LogPoint,
    /// What changed between.
    pub frames: Vec<ShipFrame<'a>>,
}

impl<'a> ShipChunk<'a> {
    /// Reads and verifies a chunk.
    pub fn decode(from: &'a [u8]) -> Result<Self, WireError> {
        let corrupt = |why: &str| WireError::new(ErrorKind::Corrupt, format!("read layer chunk: {why}"));
        let head = from.get(..CHUNK_HEAD_LEN).ok_or_else(|| corrupt("too short"))?;
        if field::bytes::<8>(head, 0) != *MAGIC {
            return Err(corrupt("no magic"));
        }
        if field::u32(head, 8) != VERSION {
            return Err(WireError::new(ErrorKind::Unsupported, "read layer chunk: unknown version"));
        }
        if field::u32(head, 12) != crc32c::crc32c(head.get(16..).unwrap_or_default()) {
            return Err(corrupt("checksum of the head differs"));
        }
        let mut chunk = Self {
            disk_id: DiskId(Uuid::from_bytes(field::bytes(head, 16))),
            from: LogPoint::decode(head, 32)?,
            next: LogPoint::decode(head, 52)?,
            frames: Vec::new(),
        };
        let mut rest = from.get(CHUNK_HEAD_LEN..).unwrap_or_default();
        while !rest.is_empty() {
            let (frame, after) = decode_frame(rest).map_err(corrupt)?;
            chunk.frames.push(frame);
            rest = after;
        }
        Ok(chunk)
    }
}

fn decode_frame(from: &[u8]) -> Result<(ShipFrame<'_>, &[u8]), &'static str> {
    let head = from.get(..FRAME_HEAD_LEN).ok_or("a frame is cut off")?;
    if field::u32(head, 0) != crc32c::crc32c(head.get(4..).unwrap_or_default()) {
        return Err("checksum of a frame differs");
    }
    let offset_bytes = field::u64(head, 8);
    let length_bytes = field::u64(head, 16);
    let kind = field::u8(head, 24);
    let longest = if kind == 1 { PAYLOAD_BYTES_MAX } else { DISK_BYTES_MAX };
    let aligned = offset_bytes.is_multiple_of(BLOCK_BYTES) && length_bytes.is_multiple_of(BLOCK_BYTES);
    if !aligned || offset_bytes >= DISK_BYTES_MAX || !(BLOCK_BYTES..=longest).contains(&length_bytes) {
        return Err("an impossible range");
    }
    let rest = from.get(FRAME_HEAD_LEN..).unwrap_or_default();
    match kind {
        1 => {
            let payload = rest.get(..length_bytes as usize).ok_or("a payload is cut off")?;
            if crc32c::crc32c(payload) != field::u32(head, 4) {
                return Err("checksum of a payload differs");
            }
            let frame = ShipFrame { offset_bytes, length_bytes, payload: Some(payload) };
            Ok((frame, rest.get(payload.len()..).unwrap_or_default()))
        }
        2 => Ok((ShipFrame { offset_bytes, length_bytes, payload: None }, rest)),
        _ => Err("an unknown kind of frame"),
    }
}

#[cfg(test)]
mod test {
    use super::*;

    #[test]
    fn a_chunk_reads_back_and_any_damage_is_noticed() {
        let mut chunk = ChunkBuilder::with_capacity(0);
        assert!(chunk.is_empty());
        chunk.data(8192, &[7; 4096]);
        chunk.zero(1 << 30, 1 << 20);
        let next = LogPoint { segment: 1, block: 2, seq: 3, chain: 4 };
        let disk_id = DiskId(Uuid::from_u128(5));
        let bytes = chunk.finish(disk_id, LogPoint::START, next);
        let back = ShipChunk::decode(&bytes).unwrap();
        assert_eq!((back.disk_id, back.from, back.next), (disk_id, LogPoint::START, next));
        assert_eq!(back.frames.len(), 2);
        assert_eq!(back.frames[0].payload, Some([7; 4096].as_slice()));
        assert_eq!(back.frames[1].length_bytes, 1 << 20);
        for at in 0..bytes.len() {
            let mut bad = bytes.clone();
            bad[at] ^= 1;
            assert!(ShipChunk::decode(&bad).is_err(), "byte {at}");
        }
        for length in 0..CHUNK_HEAD_LEN + FRAME_HEAD_LEN {
            // Cut exactly between two frames it is a shorter, valid chunk; the running hash notices that.
            assert_eq!(ShipChunk::decode(&bytes[..length]).is_ok(), length == CHUNK_HEAD_LEN, "{length}");
        }
        let position = ShipPosition::START.after(&bytes, next);
        assert_eq!(ShipPosition::decode(&position.encode()).unwrap(), position);
        assert_ne!(position.chain, ShipPosition::START.after(&bytes[..bytes.len() - 32], next).chain);
    }
}
