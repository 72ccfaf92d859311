//! Metadata: what the disk is, and what it lies on (section 2.6).
//!
//! ```text
//!   table    0 "metadata"   8 zeros u16   10 entries u16   12 zeros
//!           32 entries of 32 B: GUID, offset u32 (from the region's start, ≥ 64 KiB), length u32,
//!              flags u32 (1 user, 2 virtual disk, 4 required), zeros
//!   items   file parameters     block size u32, flags u32 (1 leave blocks allocated, 2 has a parent)
//!           virtual disk size   u64        logical, physical sector size   u32 each        virtual disk id   GUID
//!           parent locator      0 type GUID   16 zeros u16   18 pairs u16
//!                              20 pairs of 12 B: key offset u32, value offset u32, key length u16, value length u16
//!                                 (offsets from the item's start, lengths in bytes; UTF-16, not ended by a zero)
//! ```

use uuid::Uuid;

use super::{TABLE_ENTRIES_MAX, TABLE_LEN, corrupt, guid, u16_at};
use crate::error::WireError;
use crate::record::layer::field::{self, put};

const SIGNATURE: &[u8; 8] = b"metadata";
const HEAD_LEN: usize = 32;
const ENTRY_LEN: usize = 32;
const IS_USER: u32 = 1;
const IS_VIRTUAL_DISK: u32 = 2;
const IS_REQUIRED: u32 = 4;
const LEAVE_ALLOCATED: u32 = 1;
const HAS_PARENT: u32 = 2;
const LOCATOR_HEAD_LEN: usize = 20;
const PAIR_LEN: usize = 12;

/// Items that the specification knows.
pub mod item {
    use uuid::Uuid;

    /// Block size and flags.
    pub const FILE_PARAMETERS: Uuid = Uuid::from_u128(0xcaa1_6737_fa36_4d43_b3b6_33f0_aa44_e76b);
    /// Size of the disk.
    pub const VIRTUAL_DISK_SIZE: Uuid = Uuid::from_u128(0x2fa5_4224_cd1b_4876_b211_5dbe_d83b_f4b8);
    /// The disk's identity, which a guest sees in page 83 of its inquiry data.
    pub const VIRTUAL_DISK_ID: Uuid = Uuid::from_u128(0xbeca_12ab_b2e6_4523_93ef_c309_e000_c746);
    /// Logical sector size.
    pub const LOGICAL_SECTOR_SIZE: Uuid = Uuid::from_u128(0x8141_bf1d_a96f_4709_ba47_f233_a8fa_ab5f);
    /// Physical sector size.
    pub const PHYSICAL_SECTOR_SIZE: Uuid = Uuid::from_u128(0xcda3_48c7_445d_4471_9cc9_e988_5251_c556);
    /// What the disk lies on.
    pub const PARENT_LOCATOR: Uuid = Uuid::from_u128(0xa8d3_5f2d_b30b_454d_abf7_d3d8_4834_ab0c);
}

/// Where one item is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MetadataEntry {
    /// What it says.
    pub id: Uuid,
    /// From the region's start, bytes.
    pub offset: u32,
    /// Its length, bytes.
    pub bytes: u32,
    /// Of a user, not of the format.
    pub is_user: bool,
    /// Of the disk, not of the file.
    pub is_virtual_disk: bool,
    /// Who does not know it may not open the file.
    pub required: bool,
}

/// The table at the start of the metadata region.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct MetadataTable {
    /// In the order in which they stand.
    pub entries: Vec<MetadataEntry>,
}

impl MetadataTable {
    /// The table's bytes.
    pub fn encode(&self) -> Vec<u8> {
        let mut out = vec![0; TABLE_LEN];
        put(&mut out, 0, SIGNATURE);
        put(&mut out, 10, &(self.entries.len() as u16).to_le_bytes());
        for (n, entry) in self.entries.iter().enumerate() {
            let at = HEAD_LEN + n * ENTRY_LEN;
            let flag = |set: bool, flag: u32| if set { flag } else { 0 };
            let flags = flag(entry.is_user, IS_USER)
                | flag(entry.is_virtual_disk, IS_VIRTUAL_DISK)
                | flag(entry.required, IS_REQUIRED);
            put(&mut out, at, &entry.id.to_bytes_le());
            put(&mut out, at + 16, &entry.offset.to_le_bytes());
            put(&mut out, at + 20, &entry.bytes.to_le_bytes());
            put(&mut out, at + 24, &flags.to_le_bytes());
        }
        out
    }

    /// Reads a table. `Corrupt`: no signature, or too many entries.
    pub fn decode(from: &[u8]) -> Result<Self, WireError> {
        let bad = |why: &str| corrupt("read metadata table", why);
        let from = from.get(..TABLE_LEN).ok_or_else(|| bad("it is cut off"))?;
        if !from.starts_with(SIGNATURE) {
            return Err(bad("no signature"));
        }
        let count = usize::from(u16_at(from, 10));
        if count > TABLE_ENTRIES_MAX {
            return Err(bad(&format!("{count} entries, at most {TABLE_ENTRIES_MAX} are possible")));
        }
        let entry = |n: usize| {
            let at = HEAD_LEN + n * ENTRY_LEN;
            let flags = field::u32(from, at + 24);
            MetadataEntry {
                id: guid(from, at),
                offset: field::u32(from, at + 16),
                bytes: field::u32(from, at + 20),
                is_user: flags & IS_USER != 0,
                is_virtual_disk: flags & IS_VIRTUAL_DISK != 0,
                required: flags & IS_REQUIRED != 0,
            }
        };
        Ok(Self { entries: (0..count).map(entry).collect() })
    }
}

/// The item of this name.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FileParameters {
    /// Bytes of a payload block.
    pub block_bytes: u32,
    /// The disk is a fixed one: blocks are not given back.
    pub leave_allocated: bool,
    /// What is not here is the parent's.
    pub has_parent: bool,
}

impl FileParameters {
    /// The item's bytes.
    pub fn encode(&self) -> [u8; 8] {
        let leave = if self.leave_allocated { LEAVE_ALLOCATED } else { 0 };
        let parent = if self.has_parent { HAS_PARENT } else { 0 };
        let mut out = [0; 8];
        put(&mut out, 0, &self.block_bytes.to_le_bytes());
        put(&mut out, 4, &(leave | parent).to_le_bytes());
        out
    }

    /// Reads the item. `Corrupt`: another length.
    pub fn decode(from: &[u8]) -> Result<Self, WireError> {
        if from.len() != 8 {
            return Err(corrupt("read file parameters", format!("{} bytes instead of 8", from.len())));
        }
        let flags = field::u32(from, 4);
        Ok(Self {
            block_bytes: field::u32(from, 0),
            leave_allocated: flags & LEAVE_ALLOCATED != 0,
            has_parent: flags & HAS_PARENT != 0,
        })
    }
}

/// What a differencing disk lies on: pairs of words.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ParentLocator {
    /// What the pairs mean; [`ParentLocator::VHDX`] is the only one known.
    pub kind: Uuid,
    /// Keys and values.
    pub pairs: Vec<(String, String)>,
}

impl ParentLocator {
    /// The parent is a VHDX file.
    pub const VHDX: Uuid = Uuid::from_u128(0xb04a_efb7_d19e_4a81_b789_25b8_e944_5913);
    /// The parent's DataWriteGuid when the child was made, in braces.
    pub const LINKAGE: &str = "parent_linkage";
    /// Another one that the parent may have instead, while a merge is under way.
    pub const LINKAGE2: &str = "parent_linkage2";
    /// The parent's file, from the child's directory on, with backslashes.
    pub const RELATIVE_PATH: &str = "relative_path";
    /// The parent's file, by its volume's GUID.
    pub const VOLUME_PATH: &str = "volume_path";
    /// The parent's file, from a drive's letter on.
    pub const ABSOLUTE_PATH: &str = "absolute_win32_path";

    /// The value of a key.
    pub fn get(&self, key: &str) -> Option<&str> {
        self.pairs.iter().find(|(name, _)| name == key).map(|(_, value)| value.as_str())
    }

    /// The value of a key that holds a GUID. `Corrupt`: it holds something else.
    pub fn guid(&self, key: &str) -> Result<Option<Uuid>, WireError> {
        let parse = |text: &str| {
            let inner = text.strip_prefix('{').and_then(|text| text.strip_suffix('}')).unwrap_or(text);
            Uuid::try_parse(inner)
                .map_err(|_| corrupt("read parent locator", format!("{key} is {text:?}, which is no GUID")))
        };
        self.get(key).map(parse).transpose()
    }

    /// A GUID as such values hold it.
    pub fn braced(id: Uuid) -> String {
        format!("{{{}}}", id.hyphenated())
    }

    /// The item's bytes.
    pub fn encode(&self) -> Vec<u8> {
        let mut out = vec![0; LOCATOR_HEAD_LEN + self.pairs.len() * PAIR_LEN];
        put(&mut out, 0, &self.kind.to_bytes_le());
        put(&mut out, 18, &(self.pairs.len() as u16).to_le_bytes());
        for (n, (key, value)) in self.pairs.iter().enumerate() {
            let at = LOCATOR_HEAD_LEN + n * PAIR_LEN;
            for (text, offset_at, length_at) in [(key, at, at + 8), (value, at + 4, at + 10)] {
                let bytes: Vec<u8> = text.encode_utf16().flat_map(u16::to_le_bytes).collect();
                let offset = out.len() as u32;
                put(&mut out, offset_at, &offset.to_le_bytes());
                put(&mut out, length_at, &(bytes.len() as u16).to_le_bytes());
                out.extend_from_slice(&bytes);
            }
        }
        out
    }

    /// Reads the item. `Corrupt`: a pair lies outside, is no text, or a key stands twice.
    pub fn decode(from: &[u8]) -> Result<Self, WireError> {
        let bad = |why: &str| corrupt("read parent locator", why);
        if from.len() < LOCATOR_HEAD_LEN {
            return Err(bad("it is cut off"));
        }
        let text = |offset: u32, length: u16| {
            let at = offset as usize;
            let bytes = from.get(at..at.saturating_add(usize::from(length)));
            let bytes = bytes.filter(|bytes| bytes.len() % 2 == 0 && !bytes.is_empty());
            let bytes = bytes.ok_or_else(|| bad("a word lies outside it"))?;
            let units = bytes.chunks_exact(2).map(|two| u16_at(two, 0));
            char::decode_utf16(units).collect::<Result<String, _>>().map_err(|_| bad("a word is no text"))
        };
        let mut pairs: Vec<(String, String)> = Vec::new();
        for n in 0..usize::from(u16_at(from, 18)) {
            let at = LOCATOR_HEAD_LEN + n * PAIR_LEN;
            let pair = from.get(at..at + PAIR_LEN).ok_or_else(|| bad("it is cut off"))?;
            let key = text(field::u32(pair, 0), u16_at(pair, 8))?;
            let value = text(field::u32(pair, 4), u16_at(pair, 10))?;
            if pairs.iter().any(|(other, _)| *other == key) {
                return Err(bad(&format!("{key} stands twice")));
            }
            pairs.push((key, value));
        }
        Ok(Self { kind: guid(from, 0), pairs })
    }
}

#[cfg(test)]
mod test {
    use super::*;

    #[test]
    fn a_table_reads_back() {
        let entry = |id, is_user, required| MetadataEntry {
            id,
            offset: 65536,
            bytes: 8,
            is_user,
            is_virtual_disk: !is_user,
            required,
        };
        let table = MetadataTable {
            entries: vec![entry(item::FILE_PARAMETERS, false, true), entry(Uuid::from_u128(7), true, false)],
        };
        let good = table.encode();
        assert_eq!(MetadataTable::decode(&good).unwrap(), table);
        assert!(MetadataTable::decode(&good[1..]).is_err());
        let mut more = good;
        put(&mut more, 10, &2048u16.to_le_bytes());
        assert!(MetadataTable::decode(&more).is_err());
    }

    #[test]
    fn file_parameters_read_back() {
        for (leave_allocated, has_parent) in [(false, false), (true, false), (false, true)] {
            let item = FileParameters { block_bytes: 32 << 20, leave_allocated, has_parent };
            assert_eq!(FileParameters::decode(&item.encode()).unwrap(), item);
        }
        assert!(FileParameters::decode(&[0; 7]).is_err());
    }

    #[test]
    fn a_locator_reads_back_and_says_ids_in_either_case() {
        let id = Uuid::from_u128(0x83ed_0ec3_24c8_49a6_a959_5e4b_f128_8bfb);
        let pair = |key: &str, value: &str| (key.to_owned(), value.to_owned());
        let locator = ParentLocator {
            kind: ParentLocator::VHDX,
            pairs: vec![
                pair(ParentLocator::LINKAGE, &ParentLocator::braced(id)),
                pair(ParentLocator::LINKAGE2, "{83ED0EC3-24C8-49A6-A959-5E4BF1288BFB}"),
                pair(ParentLocator::RELATIVE_PATH, ".\\größe 𝄞.vhdx"),
            ],
        };
        let good = locator.encode();
        let back = ParentLocator::decode(&good).unwrap();
        assert_eq!(back, locator);
        assert_eq!(ParentLocator::braced(id), "{83ed0ec3-24c8-49a6-a959-5e4bf1288bfb}");
        assert_eq!(back.guid(ParentLocator::LINKAGE).unwrap(), Some(id));
        assert_eq!(back.guid(ParentLocator::LINKAGE2).unwrap(), Some(id));
        assert_eq!(back.guid(ParentLocator::VOLUME_PATH).unwrap(), None);
        assert!(back.guid(ParentLocator::RELATIVE_PATH).is_err());
        for length in 0..good.len() {
            assert!(ParentLocator::decode(&good[..length]).is_err(), "cut to {length}");
        }
        let twice = ParentLocator { pairs: [&locator.pairs[..1], &locator.pairs[..1]].concat(), ..locator };
        assert!(ParentLocator::decode(&twice.encode()).unwrap_err().message.contains("twice"));
    }
}
