//! The header: which state of the file counts, whose content it is, and where the log lies (section 2.2.2).
//!
//! ```text
//!   0 "head"   4 crc32c of the 4096 bytes   8 sequence   16 FileWriteGuid   32 DataWriteGuid   48 LogGuid
//!  64 log version u16   66 version u16   68 log length u32   72 log offset u64   80 zeros
//! ```
//!
//! There are two. The valid one with the higher sequence counts; an update writes the other one.

use uuid::Uuid;

use super::{checksum, corrupt, guid, u16_at};
use crate::error::WireError;
use crate::record::layer::field::{self, put};

const SIGNATURE: &[u8; 4] = b"head";

/// One of the two headers.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Header {
    /// The higher of two valid headers counts.
    pub sequence: u64,
    /// New at the first change of anything after a writable open.
    pub file_write_id: Uuid,
    /// New before the first change that a reader of the disk could see.
    pub data_write_id: Uuid,
    /// Which entries of the log belong to this state; nil: the log is empty.
    pub log_id: Uuid,
    /// Version of the log; 0.
    pub log_version: u16,
    /// Version of the file; 1.
    pub version: u16,
    /// Length of the log, bytes.
    pub log_bytes: u32,
    /// Where it begins, bytes.
    pub log_offset: u64,
}

impl Header {
    /// Bytes of a header.
    pub const LEN: usize = 4096;
    /// Where the two stand.
    pub const OFFSETS: [u64; 2] = [64 << 10, 128 << 10];
    /// The only version of the file.
    pub const VERSION: u16 = 1;

    /// The header's bytes.
    pub fn encode(&self) -> Vec<u8> {
        let mut out = vec![0; Self::LEN];
        put(&mut out, 0, SIGNATURE);
        put(&mut out, 8, &self.sequence.to_le_bytes());
        put(&mut out, 16, &self.file_write_id.to_bytes_le());
        put(&mut out, 32, &self.data_write_id.to_bytes_le());
        put(&mut out, 48, &self.log_id.to_bytes_le());
        put(&mut out, 64, &self.log_version.to_le_bytes());
        put(&mut out, 66, &self.version.to_le_bytes());
        put(&mut out, 68, &self.log_bytes.to_le_bytes());
        put(&mut out, 72, &self.log_offset.to_le_bytes());
        let crc = checksum(&out, 4);
        put(&mut out, 4, &crc.to_le_bytes());
        out
    }

    /// Reads a header. `Corrupt`: no signature, or another checksum.
    pub fn decode(from: &[u8]) -> Result<Self, WireError> {
        let bad = |why| corrupt("read header", why);
        let from = from.get(..Self::LEN).ok_or_else(|| bad("it is cut off"))?;
        if !from.starts_with(SIGNATURE) {
            return Err(bad("no signature"));
        }
        if field::u32(from, 4) != checksum(from, 4) {
            return Err(bad("its checksum differs"));
        }
        Ok(Self {
            sequence: field::u64(from, 8),
            file_write_id: guid(from, 16),
            data_write_id: guid(from, 32),
            log_id: guid(from, 48),
            log_version: u16_at(from, 64),
            version: u16_at(from, 66),
            log_bytes: field::u32(from, 68),
            log_offset: field::u64(from, 72),
        })
    }
}

#[cfg(test)]
mod test {
    use super::*;

    #[test]
    fn a_header_reads_back_and_any_flipped_bit_is_noticed() {
        let header = Header {
            sequence: 7,
            file_write_id: Uuid::from_u128(1),
            data_write_id: Uuid::from_u128(2),
            log_id: Uuid::from_u128(3),
            log_version: 0,
            version: 1,
            log_bytes: 1 << 20,
            log_offset: 1 << 20,
        };
        let good = header.encode();
        assert_eq!(Header::decode(&good).unwrap(), header);
        assert!(Header::decode(&good[..4095]).is_err());
        for bit in (0..Header::LEN * 8).step_by(5) {
            let mut bad = good.clone();
            bad[bit / 8] ^= 1 << (bit % 8);
            assert!(Header::decode(&bad).is_err(), "bit {bit}");
        }
    }

    /// Taken from a file that qemu-img 10.0 wrote: the order of a GUID's bytes, and the checksum.
    #[test]
    fn a_header_of_qemu_reads() {
        let mut bytes = vec![0; Header::LEN];
        bytes[..4].copy_from_slice(b"head");
        bytes[16..32].copy_from_slice(&[
            0x57, 0x2d, 0xca, 0x0d, 0x2e, 0x8f, 0x46, 0x76, 0x97, 0xab, 0x94, 0x16, 0x75, 0x90, 0x78, 0xd4,
        ]);
        let crc = checksum(&bytes, 4);
        bytes[4..8].copy_from_slice(&crc.to_le_bytes());
        let header = Header::decode(&bytes).unwrap();
        assert_eq!(header.file_write_id.to_string(), "0dca2d57-8f2e-7646-97ab-9416759078d4");
    }
}
