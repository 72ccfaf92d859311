//! The region table: where metadata and BAT are (section 2.2.3).
//!
//! ```text
//!   0 "regi"   4 crc32c of the 64 KiB   8 entries u32   12 zeros
//!  16 entries of 32 B: GUID, offset u64, length u32, bit 0: required
//! ```
//!
//! There are two copies, at 192 KiB and 256 KiB.

use uuid::Uuid;

use super::{TABLE_ENTRIES_MAX, TABLE_LEN, checksum, corrupt, guid};
use crate::error::WireError;
use crate::record::layer::field::{self, put};

const SIGNATURE: &[u8; 4] = b"regi";
const HEAD_LEN: usize = 16;
const ENTRY_LEN: usize = 32;

/// One region.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RegionEntry {
    /// What it holds.
    pub id: Uuid,
    /// Where it begins, bytes; whole MiB.
    pub offset: u64,
    /// Its length, bytes; whole MiB.
    pub bytes: u32,
    /// Who does not know it may not open the file.
    pub required: bool,
}

/// The table.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct RegionTable {
    /// In the order in which they stand.
    pub entries: Vec<RegionEntry>,
}

impl RegionTable {
    /// Where the two copies stand.
    pub const OFFSETS: [u64; 2] = [192 << 10, 256 << 10];
    /// The block allocation table.
    pub const BAT: Uuid = Uuid::from_u128(0x2dc2_7766_f623_4200_9d64_115e_9bfd_4a08);
    /// The metadata.
    pub const METADATA: Uuid = Uuid::from_u128(0x8b7c_a206_4790_4b9a_b8fe_575f_050f_886e);

    /// The table's bytes.
    pub fn encode(&self) -> Vec<u8> {
        let mut out = vec![0; TABLE_LEN];
        put(&mut out, 0, SIGNATURE);
        put(&mut out, 8, &(self.entries.len() as u32).to_le_bytes());
        for (n, entry) in self.entries.iter().enumerate() {
            let at = HEAD_LEN + n * ENTRY_LEN;
            put(&mut out, at, &entry.id.to_bytes_le());
            put(&mut out, at + 16, &entry.offset.to_le_bytes());
            put(&mut out, at + 24, &entry.bytes.to_le_bytes());
            put(&mut out, at + 28, &u32::from(entry.required).to_le_bytes());
        }
        let crc = checksum(&out, 4);
        put(&mut out, 4, &crc.to_le_bytes());
        out
    }

    /// Reads a table. `Corrupt`: no signature, another checksum, or too many entries.
    pub fn decode(from: &[u8]) -> Result<Self, WireError> {
        let bad = |why: &str| corrupt("read region table", why);
        let from = from.get(..TABLE_LEN).ok_or_else(|| bad("it is cut off"))?;
        if !from.starts_with(SIGNATURE) {
            return Err(bad("no signature"));
        }
        if field::u32(from, 4) != checksum(from, 4) {
            return Err(bad("its checksum differs"));
        }
        let count = field::u32(from, 8) as usize;
        if count > TABLE_ENTRIES_MAX {
            return Err(bad(&format!("{count} entries, at most {TABLE_ENTRIES_MAX} are possible")));
        }
        let entry = |n: usize| {
            let at = HEAD_LEN + n * ENTRY_LEN;
            RegionEntry {
                id: guid(from, at),
                offset: field::u64(from, at + 16),
                bytes: field::u32(from, at + 24),
                required: field::u32(from, at + 28) & 1 != 0,
            }
        };
        Ok(Self { entries: (0..count).map(entry).collect() })
    }
}

#[cfg(test)]
mod test {
    use super::*;

    #[test]
    fn a_table_reads_back_and_damage_is_noticed() {
        let entry = |id, offset, required| RegionEntry { id, offset, bytes: 1 << 20, required };
        let table = RegionTable {
            entries: vec![
                entry(RegionTable::BAT, 3 << 20, true),
                entry(RegionTable::METADATA, 2 << 20, true),
                entry(Uuid::from_u128(9), 9 << 20, false),
            ],
        };
        let good = table.encode();
        assert_eq!(RegionTable::decode(&good).unwrap(), table);
        assert!(RegionTable::decode(&good[..TABLE_LEN - 1]).is_err());
        for bit in (0..TABLE_LEN * 8).step_by(997) {
            let mut bad = good.clone();
            bad[bit / 8] ^= 1 << (bit % 8);
            assert!(RegionTable::decode(&bad).is_err(), "bit {bit}");
        }
        let most = RegionTable { entries: vec![entry(Uuid::nil(), 0, false); TABLE_ENTRIES_MAX] };
        assert_eq!(RegionTable::decode(&most.encode()).unwrap(), most);
        let mut more = good.clone();
        put(&mut more, 8, &2048u32.to_le_bytes());
        let crc = checksum(&more, 4);
        put(&mut more, 4, &crc.to_le_bytes());
        assert!(RegionTable::decode(&more).unwrap_err().message.contains("2048 entries"));
    }

    #[test]
    fn the_ids_stand_in_the_order_that_others_write() {
        let bytes: Vec<u8> = RegionTable::BAT.to_bytes_le().to_vec();
        let hex: String = bytes.iter().map(|byte| format!("{byte:02x}")).collect();
        assert_eq!(hex, "6677c22d23f600429d64115e9bfd4a08");
    }
}
