//! VHDX: the virtual disk files of Hyper-V, as [MS-VHDX] specifies them.
//!
//! ```text
//!   0        64K       128K      192K          256K          1 MiB
//!   ├────────┼─────────┼─────────┼─────────────┼─────────────┼──────┬──────────┬─────┬───────────────┬─ ─
//!   │ ident  │ header  │ header  │ region table│ region table│ log  │ metadata │ BAT │ blocks …      │
//!   └────────┴─────────┴─────────┴─────────────┴─────────────┴──────┴──────────┴─────┴───────────────┴─ ─
//!     8+512 B   4 KiB     4 KiB      64 KiB        64 KiB      the order from 1 MiB on is free, all of it in whole MiB
//! ```
//!
//! | part | module | what it says |
//! |---|---|---|
//! | identifier | [`IDENTIFIER`] | that it is one, and who wrote it |
//! | header | [`header`] | which of two counts, the file's and the content's ids, where the log is |
//! | region table | [`region`] | where metadata and BAT are |
//! | metadata | [`metadata`] | block size, disk size, sector sizes, the disk's id, the parent |
//! | BAT | [`bat`] | for each block whether it is there, and where |
//! | log | [`log`] | changes to the above that may not have been carried out |
//!
//! All numbers are little-endian. GUIDs stand in Microsoft's mixed order (the first three parts little-endian), which is
//! what [`Uuid::from_bytes_le`] reads. Checksums are CRC-32C with the checksum's own place taken as zeros.
//!
//! A decoder answers whether bytes are such a record; `Corrupt` if not. Whether records make up a disk is decided in
//! `engine::disk::vhdx`, and files are read and written by `host::vhdx`.
//!
//! [MS-VHDX]: https://learn.microsoft.com/openspecs/windows_protocols/ms-vhdx

pub mod bat;
pub mod header;
pub mod log;
pub mod metadata;
pub mod region;

pub use bat::{BatEntry, BitmapState, PayloadState};
pub use header::Header;
pub use log::{Descriptor, EntryHeader};
pub use metadata::{FileParameters, MetadataEntry, MetadataTable, ParentLocator};
pub use region::{RegionEntry, RegionTable};

/// A GUID of the format.
pub use uuid::Uuid;

use crate::error::{ErrorKind, WireError};
use crate::record::layer::field;

/// The first bytes of every file.
pub const IDENTIFIER: &[u8; 8] = b"vhdxfile";
/// What is in the file lies at multiples of this.
pub const MIB: u64 = 1 << 20;
/// Where the name of the program that wrote the file stands, as UTF-16 (section 2.2.1).
pub const CREATOR_OFFSET: usize = 8;
/// Bytes of that name, the most.
pub const CREATOR_LEN: usize = 512;
/// The most entries a region or metadata table has (sections 2.2.3 and 2.6.1).
pub const TABLE_ENTRIES_MAX: usize = 2047;
/// Bytes of a region or metadata table.
pub const TABLE_LEN: usize = 64 << 10;
/// The largest disk (section 2.6.2.2).
pub const DISK_BYTES_MAX: u64 = 64 << 40;
/// The smallest and the largest block (section 2.6.2.1).
pub const BLOCK_BYTES: std::ops::RangeInclusive<u32> = 1 << 20..=256 << 20;

/// The file's first bytes, with the name of the program that writes it.
pub fn encode_identifier(creator: &str) -> Vec<u8> {
    let mut out = IDENTIFIER.to_vec();
    let name: Vec<u8> = creator.encode_utf16().flat_map(u16::to_le_bytes).take(CREATOR_LEN - 2).collect();
    out.extend_from_slice(&name);
    out.resize(CREATOR_OFFSET + CREATOR_LEN, 0);
    out
}

fn corrupt(what: &str, why: impl std::fmt::Display) -> WireError {
    WireError::new(ErrorKind::Corrupt, format!("{what}: {why}"))
}

fn guid(from: &[u8], at: usize) -> Uuid {
    Uuid::from_bytes_le(field::bytes(from, at))
}

fn u16_at(from: &[u8], at: usize) -> u16 {
    u16::from_le_bytes(field::bytes(from, at))
}

/// CRC-32C of `record`, whose own checksum stands at `at`.
fn checksum(record: &[u8], at: usize) -> u32 {
    let (before, rest) = record.split_at(at.min(record.len()));
    let crc = crc32c::crc32c_append(crc32c::crc32c(before), &[0; 4]);
    crc32c::crc32c_append(crc, rest.get(4..).unwrap_or_default())
}
