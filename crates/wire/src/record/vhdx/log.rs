//! The log: changes to metadata that were promised and may not have been carried out (section 2.3).
//!
//! The log is a ring of 4 KiB sectors. An entry, which may go round its end:
//!
//! ```text
//!   sector 0    0 "loge"   4 crc32c of the entry   8 length u32   12 tail u32   16 sequence u64   24 descriptors u32
//!              32 LogGuid  48 FlushedFileOffset    56 LastFileOffset
//!              64 descriptors of 32 B, going on in as many sectors as they need:
//!                 "desc"  4 last 4 bytes u32   8 first 8 bytes   16 file offset u64   24 sequence u64
//!                 "zero"  8 length u64                           16 file offset u64   24 sequence u64
//!   then, for each "desc" in turn, a sector:
//!               0 "data"   4 sequence, upper half   8 the bytes 8 to 4091 of what is to be written   4092 sequence, lower half
//! ```
//!
//! The sequence stands in every sector, so that a torn write is seen. `tail` is where in the log the oldest entry begins
//! that has to be replayed when this one is the newest.
//!
//! Not here: which entries are to be replayed (`engine::disk::vhdx::log`).

use uuid::Uuid;

use super::{checksum, corrupt, guid};
use crate::error::WireError;
use crate::record::layer::field::{self, put};

/// Unit of the log, bytes.
pub const SECTOR_LEN: usize = 4096;
const HEAD_LEN: usize = 64;
const DESCRIPTOR_LEN: usize = 32;
const ENTRY: &[u8; 4] = b"loge";
const DATA: &[u8; 4] = b"data";

/// The head of an entry.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct EntryHeader {
    /// Of the whole entry.
    pub checksum: u32,
    /// Length, bytes; whole sectors.
    pub bytes: u32,
    /// Where in the log the oldest entry begins that goes with this one.
    pub tail: u32,
    /// One higher than that of the entry before.
    pub sequence: u64,
    /// How many descriptors there are.
    pub descriptors: u32,
    /// The header's, or the entry is somebody else's.
    pub log_id: Uuid,
    /// The file was at least this long when the entry was written, bytes.
    pub flushed_file_offset: u64,
    /// What has to fit into the file after the replay, bytes.
    pub last_file_offset: u64,
}

impl EntryHeader {
    /// Reads an entry's head from its first sector. `Corrupt`: it is none.
    pub fn decode(sector: &[u8]) -> Result<Self, WireError> {
        let bad = |why: &str| corrupt("read log entry", why);
        if sector.len() < HEAD_LEN || !sector.starts_with(ENTRY) {
            return Err(bad("no signature"));
        }
        let header = Self {
            checksum: field::u32(sector, 4),
            bytes: field::u32(sector, 8),
            tail: field::u32(sector, 12),
            sequence: field::u64(sector, 16),
            descriptors: field::u32(sector, 24),
            log_id: guid(sector, 32),
            flushed_file_offset: field::u64(sector, 48),
            last_file_offset: field::u64(sector, 56),
        };
        let whole = |bytes: u32| (bytes as usize).is_multiple_of(SECTOR_LEN);
        if header.sequence == 0 || !whole(header.bytes) || !whole(header.tail) {
            return Err(bad("a field has a value that is not possible"));
        }
        if header.descriptor_sectors() > u64::from(header.bytes) / SECTOR_LEN as u64 {
            return Err(bad("its descriptors do not fit into it"));
        }
        Ok(header)
    }

    /// Sectors that hold the head and the descriptors.
    pub fn descriptor_sectors(&self) -> u64 {
        (HEAD_LEN as u64 + u64::from(self.descriptors) * DESCRIPTOR_LEN as u64).div_ceil(SECTOR_LEN as u64)
    }

    /// The bytes of the descriptors that stand in descriptor sector `number`, one after the other.
    pub fn descriptors_in<'a>(
        &self,
        number: u64,
        sector: &'a [u8],
    ) -> impl Iterator<Item = &'a [u8]> + use<'a> {
        let per_sector = (SECTOR_LEN / DESCRIPTOR_LEN) as u64;
        let head = (HEAD_LEN / DESCRIPTOR_LEN) as u64;
        let first = if number == 0 { head } else { 0 };
        let end = (u64::from(self.descriptors) + head).saturating_sub(number * per_sector).min(per_sector);
        let from = sector.get(first as usize * DESCRIPTOR_LEN..end as usize * DESCRIPTOR_LEN);
        from.unwrap_or_default().chunks_exact(DESCRIPTOR_LEN)
    }

    /// The checksum over an entry's first sector; [`crc32c::crc32c_append`] takes it over the others.
    pub fn checksum_of_first(sector: &[u8]) -> u32 {
        checksum(sector, 4)
    }
}

/// One change.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Descriptor {
    /// 4 KiB at `offset`; what is between the first 8 and the last 4 bytes stands in a data sector.
    Data {
        /// Where in the file, bytes.
        offset: u64,
        /// The first bytes.
        leading: [u8; 8],
        /// The last bytes.
        trailing: [u8; 4],
    },
    /// Zeros.
    Zero {
        /// Where in the file, bytes.
        offset: u64,
        /// How many, bytes.
        bytes: u64,
    },
}

impl Descriptor {
    /// Reads a descriptor of the entry with this sequence. `Corrupt`: it is none, or of another entry.
    pub fn decode(from: &[u8], sequence: u64) -> Result<Self, WireError> {
        let bad = |why: &str| corrupt("read log descriptor", why);
        if from.len() != DESCRIPTOR_LEN || field::u64(from, 24) != sequence {
            return Err(bad("it belongs to another entry"));
        }
        let offset = field::u64(from, 16);
        let bytes = match &field::bytes::<4>(from, 0) {
            b"desc" => SECTOR_LEN as u64,
            b"zero" => field::u64(from, 8),
            _ => return Err(bad("no signature")),
        };
        let whole = offset.is_multiple_of(SECTOR_LEN as u64) && bytes.is_multiple_of(SECTOR_LEN as u64);
        if !whole || offset.checked_add(bytes).is_none() {
            return Err(bad(&format!("{bytes} bytes at {offset}")));
        }
        if from.starts_with(b"zero") {
            return Ok(Self::Zero { offset, bytes });
        }
        Ok(Self::Data { offset, leading: field::bytes(from, 8), trailing: field::bytes(from, 4) })
    }
}

/// Verifies a data sector of the entry with this sequence; its bytes 8 to 4091 are the change's.
pub fn check_data_sector(sector: &[u8], sequence: u64) -> Result<(), WireError> {
    let halves = (u64::from(field::u32(sector, 4)) << 32) | u64::from(field::u32(sector, SECTOR_LEN - 4));
    if sector.len() != SECTOR_LEN || !sector.starts_with(DATA) || halves != sequence {
        return Err(corrupt("read log data sector", "it belongs to another entry, or was torn"));
    }
    Ok(())
}

/// What an entry changes.
#[derive(Clone, Debug)]
pub enum Change {
    /// Writes 4 KiB at this offset.
    Data(u64, Box<[u8; SECTOR_LEN]>),
    /// Writes so many zeros at this offset.
    Zero(u64, u64),
}

/// An entry's bytes. Length, number of descriptors and checksum of `header` are put right.
pub fn encode_entry(header: &EntryHeader, changes: &[Change]) -> Vec<u8> {
    let header = EntryHeader { descriptors: changes.len() as u32, ..header.clone() };
    let mut out = vec![0; header.descriptor_sectors() as usize * SECTOR_LEN];
    for (n, change) in changes.iter().enumerate() {
        let at = HEAD_LEN + n * DESCRIPTOR_LEN;
        put(&mut out, at + 24, &header.sequence.to_le_bytes());
        match change {
            Change::Zero(offset, bytes) => {
                put(&mut out, at, b"zero");
                put(&mut out, at + 8, &bytes.to_le_bytes());
                put(&mut out, at + 16, &offset.to_le_bytes());
            }
            Change::Data(offset, content) => {
                put(&mut out, at, b"desc");
                put(&mut out, at + 4, &content[SECTOR_LEN - 4..]);
                put(&mut out, at + 8, &content[..8]);
                put(&mut out, at + 16, &offset.to_le_bytes());
                let mut sector = content.to_vec();
                put(&mut sector, 0, DATA);
                put(&mut sector, 4, &((header.sequence >> 32) as u32).to_le_bytes());
                put(&mut sector, SECTOR_LEN - 4, &(header.sequence as u32).to_le_bytes());
                out.extend_from_slice(&sector);
            }
        }
    }
    let length = out.len() as u32;
    put(&mut out, 0, ENTRY);
    put(&mut out, 8, &length.to_le_bytes());
    put(&mut out, 12, &header.tail.to_le_bytes());
    put(&mut out, 16, &header.sequence.to_le_bytes());
    put(&mut out, 24, &header.descriptors.to_le_bytes());
    put(&mut out, 32, &header.log_id.to_bytes_le());
    put(&mut out, 48, &header.flushed_file_offset.to_le_bytes());
    put(&mut out, 56, &header.last_file_offset.to_le_bytes());
    let crc = checksum(&out, 4);
    put(&mut out, 4, &crc.to_le_bytes());
    out
}

#[cfg(test)]
mod test {
    use super::*;

    fn header() -> EntryHeader {
        EntryHeader {
            checksum: 0,
            bytes: 0,
            tail: 8192,
            sequence: 0x1_0000_0002,
            descriptors: 0,
            log_id: Uuid::from_u128(5),
            flushed_file_offset: 4 << 20,
            last_file_offset: 5 << 20,
        }
    }

    /// What a reader of the bytes alone finds.
    fn read(entry: &[u8]) -> Result<Vec<Change>, WireError> {
        let sectors: Vec<&[u8]> = entry.chunks(SECTOR_LEN).collect();
        let header = EntryHeader::decode(sectors[0])?;
        assert_eq!(header.bytes as usize, entry.len());
        let mut crc = EntryHeader::checksum_of_first(sectors[0]);
        crc = sectors[1..].iter().fold(crc, |crc, sector| crc32c::crc32c_append(crc, sector));
        if crc != header.checksum {
            return Err(corrupt("read entry", "checksum"));
        }
        let mut data = sectors[header.descriptor_sectors() as usize..].iter();
        let mut changes = Vec::new();
        for number in 0..header.descriptor_sectors() {
            for bytes in header.descriptors_in(number, sectors[number as usize]) {
                changes.push(match Descriptor::decode(bytes, header.sequence)? {
                    Descriptor::Zero { offset, bytes } => Change::Zero(offset, bytes),
                    Descriptor::Data { offset, leading, trailing } => {
                        let sector = data.next().expect("a data sector per descriptor");
                        check_data_sector(sector, header.sequence)?;
                        let mut content: [u8; SECTOR_LEN] = (*sector).try_into().unwrap();
                        content[..8].copy_from_slice(&leading);
                        content[SECTOR_LEN - 4..].copy_from_slice(&trailing);
                        Change::Data(offset, Box::new(content))
                    }
                });
            }
        }
        Ok(changes)
    }

    #[test]
    fn entries_of_any_number_of_changes_read_back() {
        // 126 descriptors fill the first sector, 128 each one after.
        for count in [0, 1, 2, 125, 126, 127, 254, 255, 400] {
            let changes: Vec<Change> = (0..count)
                .map(|n: u64| match n % 3 {
                    0 => Change::Zero(n << 20, 8192),
                    _ => Change::Data(n << 12, Box::new([n as u8; SECTOR_LEN])),
                })
                .collect();
            let entry = encode_entry(&header(), &changes);
            let back = read(&entry).unwrap();
            assert_eq!(format!("{back:?}"), format!("{changes:?}"), "{count} changes");
            for bit in (0..entry.len() * 8).step_by(entry.len() * 8 / 97) {
                let mut bad = entry.clone();
                bad[bit / 8] ^= 1 << (bit % 8);
                // A length that is another one is noticed by the reader of the ring.
                assert!((64..96).contains(&bit) || read(&bad).is_err(), "bit {bit} of {count} changes");
            }
        }
    }

    #[test]
    fn what_cannot_be_is_refused() {
        let good = encode_entry(&header(), &[Change::Zero(0, 4096)]);
        for (at, value) in [(8, 4095u32), (12, 100), (16, 0), (24, u32::MAX), (0, 0)] {
            let mut bad = good.clone();
            put(&mut bad, at, &value.to_le_bytes());
            put(&mut bad, 20, &[0; 4]);
            assert!(EntryHeader::decode(&bad).is_err(), "{value} at {at}");
        }
        for (offset, bytes) in [(1, 4096), (0, 4095), (u64::MAX - 4095, 4096)] {
            let bad = encode_entry(&header(), &[Change::Zero(offset, bytes)]);
            assert!(read(&bad).is_err(), "{bytes} at {offset}");
        }
        let mut torn = [0u8; SECTOR_LEN];
        torn[..4].copy_from_slice(DATA);
        put(&mut torn, 4, &1u32.to_le_bytes());
        assert!(check_data_sector(&torn, 0x1_0000_0000).is_ok());
        assert!(check_data_sector(&torn, 0x1_0000_0001).is_err());
        assert!(check_data_sector(&torn[..8], 0x1_0000_0000).is_err());
    }
}
