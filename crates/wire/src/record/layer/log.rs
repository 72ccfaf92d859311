//! The log: segment heads, group heads, entries.
//!
//! ```text
//! segment head (4 KiB): 0 magic "WHMBSEG1"  8 version  12 crc32c of the rest  16 disk_id  32 salt
//!                       40 segment u32  44 chain  48 first seq  56 session  64 epoch
//! group head (64 B):    0 crc32c of 4..64  4 chain  8 first seq  16 salt  24 epoch  32 durable_seq
//!                       40 kind 0x47  44 block (its own place)
//! entry (64 B):         0 crc32c of 4..64  4 chain  8 seq  16 offset_bytes  24 length_bytes  32 block of the payload
//!                       36 crc32c of the payload  40 kind
//! ```

use crate::error::{ErrorKind, WireError};
use crate::id::{DiskId, Epoch};
use crate::record::layer::field::{self, put};
use crate::record::layer::{
    BLOCK_BYTES, BLOCK_LEN, COUNT_MAX, DISK_BYTES_MAX, ENTRY_LEN, PAYLOAD_BYTES_MAX, VERSION,
};
use serde::{Deserialize, Serialize};
use uuid::Uuid;

const SEGMENT_MAGIC: &[u8; 8] = b"WHMBSEG1";
const KIND_DATA: u8 = 1;
const KIND_ZERO: u8 = 2;
const KIND_GROUP: u8 = 0x47;

/// A place between two records. Ordered by `seq`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct LogPoint {
    /// Segment in which the next group would begin.
    pub segment: u32,
    /// Block in the segment where the next group would begin.
    pub block: u32,
    /// Sequence number of the next record; the first one is 1, [`COUNT_MAX`] the highest that a reader believes.
    pub seq: u64,
    /// CRC of the last entry before.
    pub chain: u32,
}

impl LogPoint {
    /// Encoded length, bytes.
    pub const LEN: usize = 20;

    /// Before the first record of a log.
    pub const START: Self = Self { segment: 0, block: 0, seq: 1, chain: 0 };

    /// As bytes.
    pub fn encode(&self) -> [u8; Self::LEN] {
        let mut out = [0; Self::LEN];
        put(&mut out, 0, &self.segment.to_le_bytes());
        put(&mut out, 4, &self.block.to_le_bytes());
        put(&mut out, 8, &self.seq.to_le_bytes());
        put(&mut out, 16, &self.chain.to_le_bytes());
        out
    }

    /// From bytes at `at`; `Corrupt` if no log has such a place.
    pub fn decode(from: &[u8], at: usize) -> Result<Self, WireError> {
        Ok(Self {
            segment: field::u32(from, at),
            block: field::u32(from, at + 4),
            seq: seq(field::u64(from, at + 8))?,
            chain: field::u32(from, at + 16),
        })
    }
}

/// A sequence number that a log can have.
fn seq(found: u64) -> Result<u64, WireError> {
    if (1..=COUNT_MAX).contains(&found) {
        return Ok(found);
    }
    Err(WireError::new(ErrorKind::Corrupt, format!("read layer: a record with the number {found}")))
}

/// The first block of a segment.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SegmentHead {
    /// The layer.
    pub disk_id: DiskId,
    /// The layer's salt.
    pub salt: u64,
    /// This segment's number.
    pub segment: u32,
    /// Sequence number of its first record: records of the segment before from here on never counted.
    pub first_seq: u64,
    /// CRC of the last entry before.
    pub chain: u32,
    /// The writable session that made it.
    pub session: u64,
    /// The session's epoch.
    pub epoch: Epoch,
}

impl SegmentHead {
    /// The block's bytes.
    pub fn encode(&self) -> Box<[u8; BLOCK_LEN]> {
        let mut out = Box::new([0u8; BLOCK_LEN]);
        let to = out.as_mut_slice();
        put(to, 0, SEGMENT_MAGIC);
        put(to, 8, &VERSION.to_le_bytes());
        put(to, 16, self.disk_id.0.as_bytes());
        put(to, 32, &self.salt.to_le_bytes());
        put(to, 40, &self.segment.to_le_bytes());
        put(to, 44, &self.chain.to_le_bytes());
        put(to, 48, &self.first_seq.to_le_bytes());
        put(to, 56, &self.session.to_le_bytes());
        put(to, 64, &self.epoch.0.to_le_bytes());
        let crc = segment_checksum(to);
        put(to, 12, &crc.to_le_bytes());
        out
    }

    /// Reads the first block of a segment.
    pub fn decode(from: &[u8]) -> Result<Self, WireError> {
        let corrupt = |why: &str| WireError::new(ErrorKind::Corrupt, format!("read segment head: {why}"));
        if from.len() != BLOCK_LEN || field::bytes::<8>(from, 0) != *SEGMENT_MAGIC {
            return Err(corrupt("no magic"));
        }
        if field::u32(from, 12) != segment_checksum(from) {
            return Err(corrupt("checksum differs"));
        }
        if field::u32(from, 8) != VERSION {
            return Err(WireError::new(ErrorKind::Unsupported, "read segment head: unknown version"));
        }
        Ok(Self {
            disk_id: DiskId(Uuid::from_bytes(field::bytes(from, 16))),
            salt: field::u64(from, 32),
            segment: field::u32(from, 40),
            chain: field::u32(from, 44),
            first_seq: seq(field::u64(from, 48))?,
            session: field::u64(from, 56),
            epoch: Epoch(field::u64(from, 64)),
        })
    }
}

fn segment_checksum(block: &[u8]) -> u32 {
    let (before, after) = block.split_at(12.min(block.len()));
    crc32c::crc32c_append(crc32c::crc32c(before), after.get(4..).unwrap_or_default())
}

/// The first entry of an index block.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct GroupHead {
    /// CRC of the last record before.
    pub chain: u32,
    /// Sequence number of the group's first record.
    pub first_seq: u64,
    /// The layer's salt.
    pub salt: u64,
    /// Epoch of the writer.
    pub epoch: Epoch,
    /// Every record up to this one was durable before this group was begun.
    pub durable_seq: u64,
    /// Where this index block is in its segment.
    pub block: u32,
}

impl GroupHead {
    /// As bytes; the second value is the CRC, the chain of the group's first record.
    pub fn encode(&self) -> ([u8; ENTRY_LEN], u32) {
        let mut out = [0; ENTRY_LEN];
        put(&mut out, 4, &self.chain.to_le_bytes());
        put(&mut out, 8, &self.first_seq.to_le_bytes());
        put(&mut out, 16, &self.salt.to_le_bytes());
        put(&mut out, 24, &self.epoch.0.to_le_bytes());
        put(&mut out, 32, &self.durable_seq.to_le_bytes());
        put(&mut out, 40, &[KIND_GROUP]);
        put(&mut out, 44, &self.block.to_le_bytes());
        seal(out)
    }

    /// Reads a group head; `None` if it is none. The second value is its CRC.
    pub fn decode(from: &[u8]) -> Option<(Self, u32)> {
        let crc = checked(from, KIND_GROUP)?;
        let head = Self {
            chain: field::u32(from, 4),
            first_seq: field::u64(from, 8),
            salt: field::u64(from, 16),
            epoch: Epoch(field::u64(from, 24)),
            durable_seq: field::u64(from, 32),
            block: field::u32(from, 44),
        };
        Some((head, crc))
    }
}

/// What a record says about its range of the disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum EntryKind {
    /// It holds the payload.
    Data {
        /// First block of the payload in the segment.
        block: u32,
        /// CRC-32C of the payload.
        payload_crc: u32,
    },
    /// It reads as zeros.
    Zero,
}

/// One record of the log.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Entry {
    /// CRC of the entry before (of the group head for a group's first).
    pub chain: u32,
    /// Counts the records of a log.
    pub seq: u64,
    /// Where on the disk, bytes; a multiple of 4096.
    pub offset_bytes: u64,
    /// How much, bytes; a multiple of 4096, not 0.
    pub length_bytes: u64,
    /// What.
    pub kind: EntryKind,
}

impl Entry {
    /// As bytes; the second value is the CRC, the chain of what follows.
    pub fn encode(&self) -> ([u8; ENTRY_LEN], u32) {
        let mut out = [0; ENTRY_LEN];
        put(&mut out, 4, &self.chain.to_le_bytes());
        put(&mut out, 8, &self.seq.to_le_bytes());
        put(&mut out, 16, &self.offset_bytes.to_le_bytes());
        put(&mut out, 24, &self.length_bytes.to_le_bytes());
        match self.kind {
            EntryKind::Data { block, payload_crc } => {
                put(&mut out, 32, &block.to_le_bytes());
                put(&mut out, 36, &payload_crc.to_le_bytes());
                put(&mut out, 40, &[KIND_DATA]);
            }
            EntryKind::Zero => put(&mut out, 40, &[KIND_ZERO]),
        }
        seal(out)
    }

    /// Reads an entry; `None` if it is none, or says something impossible. The second value is its CRC.
    pub fn decode(from: &[u8]) -> Option<(Self, u32)> {
        let (kind, crc) = match field::u8(from, 40) {
            KIND_DATA => {
                let kind = EntryKind::Data { block: field::u32(from, 32), payload_crc: field::u32(from, 36) };
                (kind, checked(from, KIND_DATA)?)
            }
            KIND_ZERO => (EntryKind::Zero, checked(from, KIND_ZERO)?),
            _ => return None,
        };
        let entry = Self {
            chain: field::u32(from, 4),
            seq: field::u64(from, 8),
            offset_bytes: field::u64(from, 16),
            length_bytes: field::u64(from, 24),
            kind,
        };
        let longest = if matches!(kind, EntryKind::Zero) { DISK_BYTES_MAX } else { PAYLOAD_BYTES_MAX };
        let good = entry.offset_bytes.is_multiple_of(BLOCK_BYTES)
            && entry.length_bytes.is_multiple_of(BLOCK_BYTES)
            && entry.offset_bytes < DISK_BYTES_MAX
            && (BLOCK_BYTES..=longest).contains(&entry.length_bytes);
        good.then_some((entry, crc))
    }

    /// Blocks of the payload.
    pub fn payload_blocks(&self) -> u32 {
        match self.kind {
            EntryKind::Data { .. } => u32::try_from(self.length_bytes / BLOCK_BYTES).unwrap_or(u32::MAX),
            EntryKind::Zero => 0,
        }
    }
}

fn seal(mut entry: [u8; ENTRY_LEN]) -> ([u8; ENTRY_LEN], u32) {
    let crc = crc32c::crc32c(&entry[4..]);
    put(&mut entry, 0, &crc.to_le_bytes());
    (entry, crc)
}

/// The CRC, if `from` is a whole entry of that kind.
fn checked(from: &[u8], kind: u8) -> Option<u32> {
    let entry = from.get(..ENTRY_LEN)?;
    let crc = crc32c::crc32c(entry.get(4..)?);
    (field::u8(entry, 40) == kind && field::u32(entry, 0) == crc).then_some(crc)
}

#[cfg(test)]
mod test {
    use super::*;

    #[test]
    fn entries_and_heads_read_back_and_flipped_bits_are_noticed() {
        let entry = Entry {
            chain: 1,
            seq: 2,
            offset_bytes: 3 << 12,
            length_bytes: 4 << 12,
            kind: EntryKind::Data { block: 5, payload_crc: 6 },
        };
        let zero = Entry { kind: EntryKind::Zero, length_bytes: 1 << 40, ..entry };
        for entry in [entry, zero] {
            let (bytes, crc) = entry.encode();
            assert_eq!(Entry::decode(&bytes), Some((entry, crc)));
            assert_eq!(GroupHead::decode(&bytes), None);
            for bit in 0..ENTRY_LEN * 8 {
                let mut bad = bytes;
                bad[bit / 8] ^= 1 << (bit % 8);
                assert_eq!(Entry::decode(&bad), None, "bit {bit}");
            }
        }
        let head = GroupHead { chain: 1, first_seq: 2, salt: 3, epoch: Epoch(4), durable_seq: 5, block: 6 };
        let (bytes, crc) = head.encode();
        assert_eq!(GroupHead::decode(&bytes), Some((head, crc)));
        assert_eq!(Entry::decode(&bytes), None);
    }

    #[test]
    fn impossible_ranges_are_refused() {
        let good = Entry { chain: 0, seq: 1, offset_bytes: 0, length_bytes: 4096, kind: EntryKind::Zero };
        let data = EntryKind::Data { block: 1, payload_crc: 0 };
        for bad in [
            Entry { offset_bytes: 512, ..good },
            Entry { length_bytes: 0, ..good },
            Entry { length_bytes: 4097, ..good },
            Entry { offset_bytes: !4095, ..good },
            Entry { length_bytes: PAYLOAD_BYTES_MAX * 2, kind: data, ..good },
        ] {
            assert_eq!(Entry::decode(&bad.encode().0), None, "{bad:?}");
        }
    }

    #[test]
    fn a_segment_head_reads_back() {
        let head = SegmentHead {
            disk_id: DiskId(Uuid::from_u128(1)),
            salt: 2,
            segment: 3,
            first_seq: 4,
            chain: 5,
            session: 6,
            epoch: Epoch(7),
        };
        let mut bytes = head.encode();
        assert_eq!(SegmentHead::decode(bytes.as_slice()).unwrap(), head);
        bytes[4000] ^= 4;
        assert_eq!(SegmentHead::decode(bytes.as_slice()).unwrap_err().kind, ErrorKind::Corrupt);
    }
}
