//! Sizes of a disk, and which entry of the block allocation table is whose (section 2.5).
//!
//! ```text
//!   chunk = 2^23 sectors: what the bits of one sector bitmap, a block of 1 MiB, stand for
//!   ratio = payload blocks in a chunk        payload block b: entry b + b / ratio      bitmap of chunk c: (c + 1) · ratio + c
//! ```

use whimbrel_wire::record::vhdx::{BLOCK_BYTES, DISK_BYTES_MAX};
use whimbrel_wire::{ErrorKind, WireError};

/// Sectors that one bitmap block has bits for.
pub const CHUNK_SECTORS: u64 = 1 << 23;

/// What an entry of the table is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Slot {
    /// The payload block of this number.
    Payload(u64),
    /// The sector bitmap of the chunk of this number.
    Bitmap(u64),
}

/// Sizes of a disk; they fit together.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Geometry {
    size_bytes: u64,
    block_bytes: u64,
    sector_bytes: u64,
    differencing: bool,
}

impl Geometry {
    /// Verifies the sizes. `Corrupt`: they are not possible.
    pub fn new(
        size_bytes: u64,
        block_bytes: u32,
        sector_bytes: u32,
        differencing: bool,
    ) -> Result<Self, WireError> {
        let corrupt = |why: String| Err(WireError::new(ErrorKind::Corrupt, why));
        if sector_bytes != 512 && sector_bytes != 4096 {
            return corrupt(format!("sectors of {sector_bytes} bytes (512 and 4096 are possible)"));
        }
        if !BLOCK_BYTES.contains(&block_bytes) || !block_bytes.is_power_of_two() {
            return corrupt(format!(
                "blocks of {block_bytes} bytes (1 to 256 MiB, a power of two, are possible)"
            ));
        }
        if size_bytes == 0
            || size_bytes > DISK_BYTES_MAX
            || !size_bytes.is_multiple_of(u64::from(sector_bytes))
        {
            return corrupt(format!(
                "a disk of {size_bytes} bytes (up to 64 TiB in sectors of {sector_bytes} are possible)"
            ));
        }
        let (block_bytes, sector_bytes) = (u64::from(block_bytes), u64::from(sector_bytes));
        Ok(Self { size_bytes, block_bytes, sector_bytes, differencing })
    }

    /// Size of the disk, bytes.
    pub fn size_bytes(&self) -> u64 {
        self.size_bytes
    }

    /// Bytes of a payload block.
    pub fn block_bytes(&self) -> u64 {
        self.block_bytes
    }

    /// Bytes of a logical sector.
    pub fn sector_bytes(&self) -> u64 {
        self.sector_bytes
    }

    /// Whether what is not here is a parent's.
    pub fn is_differencing(&self) -> bool {
        self.differencing
    }

    /// Payload blocks in a chunk.
    pub fn chunk_ratio(&self) -> u64 {
        CHUNK_SECTORS * self.sector_bytes / self.block_bytes
    }

    /// Payload blocks of the disk.
    pub fn payload_blocks(&self) -> u64 {
        self.size_bytes.div_ceil(self.block_bytes)
    }

    /// Entries of the table. A differencing disk has a bitmap after every chunk, another disk between chunks only.
    pub fn bat_entries(&self) -> u64 {
        let (blocks, ratio) = (self.payload_blocks(), self.chunk_ratio());
        if self.differencing { blocks.div_ceil(ratio) * (ratio + 1) } else { blocks + (blocks - 1) / ratio }
    }

    /// The entry of a payload block.
    pub fn payload_entry(&self, block: u64) -> u64 {
        block + block / self.chunk_ratio()
    }

    /// The entry of the sector bitmap of a chunk.
    pub fn bitmap_entry(&self, chunk: u64) -> u64 {
        chunk * (self.chunk_ratio() + 1) + self.chunk_ratio()
    }

    /// What an entry is for.
    pub fn slot(&self, entry: u64) -> Slot {
        let (chunk, place) = (entry / (self.chunk_ratio() + 1), entry % (self.chunk_ratio() + 1));
        if place == self.chunk_ratio() {
            Slot::Bitmap(chunk)
        } else {
            Slot::Payload(chunk * self.chunk_ratio() + place)
        }
    }

    /// The block that a byte of the disk is in.
    pub fn block_of(&self, offset: u64) -> u64 {
        offset / self.block_bytes
    }

    /// The chunk that a payload block is in.
    pub fn chunk_of(&self, block: u64) -> u64 {
        block / self.chunk_ratio()
    }

    /// Bytes of a payload block that are the disk's: the last one may go over its end. 0 behind the end.
    pub fn used_bytes(&self, block: u64) -> u64 {
        self.size_bytes.saturating_sub(block.saturating_mul(self.block_bytes)).min(self.block_bytes)
    }

    /// The bit, of its chunk's bitmap, of the sector that a byte of the disk is in.
    pub fn bit_of(&self, offset: u64) -> u64 {
        (offset / self.sector_bytes) % CHUNK_SECTORS
    }
}

#[cfg(test)]
mod test {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn sizes_that_are_not_possible_are_refused() {
        let good = |size, block, sector| Geometry::new(size, block, sector, false).is_ok();
        assert!(good(512, 1 << 20, 512) && good(4096, 256 << 20, 4096) && good(64 << 40, 1 << 20, 512));
        assert!(!good(0, 1 << 20, 512) && !good((64 << 40) + 512, 1 << 20, 512));
        assert!(!good(513, 1 << 20, 512) && !good(512, 1 << 20, 4096));
        assert!(!good(512, 1 << 19, 512) && !good(512, 3 << 20, 512) && !good(512, 512 << 20, 512));
        assert!(!good(512, 1 << 20, 0) && !good(512, 1 << 20, 1024));
    }

    /// The table written out entry by entry, as the specification tells it.
    fn written_out(geometry: &Geometry) -> Vec<Slot> {
        let mut slots = Vec::new();
        let blocks = geometry.payload_blocks();
        let (mut block, mut chunk) = (0, 0);
        loop {
            for _ in 0..geometry.chunk_ratio() {
                if block == blocks && !geometry.is_differencing() {
                    return slots;
                }
                slots.push(Slot::Payload(block));
                block += 1;
            }
            if block >= blocks && !geometry.is_differencing() {
                return slots;
            }
            slots.push(Slot::Bitmap(chunk));
            chunk += 1;
            if block >= blocks {
                return slots;
            }
        }
    }

    proptest! {
        #[test]
        fn entries_are_where_the_table_written_out_has_them(
            sectors in 1u64..(1 << 30), block in 4u32..9, large_sectors: bool, differencing: bool
        ) {
            let sector = if large_sectors { 4096 } else { 512 };
            let geometry = Geometry::new(sectors * u64::from(sector), 1 << (20 + block), sector, differencing).unwrap();
            let slots = written_out(&geometry);
            prop_assert_eq!(geometry.bat_entries(), slots.len() as u64);
            for (entry, slot) in slots.iter().enumerate() {
                prop_assert_eq!(geometry.slot(entry as u64), *slot);
                match *slot {
                    Slot::Payload(block) => prop_assert_eq!(geometry.payload_entry(block), entry as u64),
                    Slot::Bitmap(chunk) => prop_assert_eq!(geometry.bitmap_entry(chunk), entry as u64),
                }
            }
            let used: u64 = (0..geometry.payload_blocks()).map(|block| geometry.used_bytes(block)).sum();
            prop_assert_eq!(used, geometry.size_bytes());
            prop_assert_eq!(geometry.used_bytes(geometry.payload_blocks()), 0);
        }
    }

    #[test]
    fn bits_start_anew_with_each_chunk() {
        let geometry = Geometry::new(16 << 30, 2 << 20, 512, true).unwrap();
        assert_eq!((geometry.chunk_ratio(), geometry.bat_entries()), (2048, 4 * 2049));
        assert_eq!(geometry.bit_of(0), 0);
        assert_eq!(geometry.bit_of((4 << 30) - 1), CHUNK_SECTORS - 1);
        assert_eq!(geometry.bit_of(4 << 30), 0);
        assert_eq!((geometry.block_of(4 << 30), geometry.chunk_of(2048)), (2048, 1));
    }
}
