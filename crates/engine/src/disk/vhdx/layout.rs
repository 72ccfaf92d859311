//! Where the parts of a new file go.
//!
//! ```text
//!   0 head   1 MiB log, empty   2 MiB metadata   3 MiB BAT, whole MiB   then blocks, in the order in which they are written
//! ```
//!
//! Blocks are as small as the table of them stays: 2 MiB up to disks of 1 TiB, 32 MiB above, so that little data takes
//! little room and the table of the largest disk is 16 MiB.

use whimbrel_wire::WireError;
use whimbrel_wire::record::vhdx::{BatEntry, MIB, PayloadState};

use super::{Extent, Geometry};

/// Where the log of a new file is.
pub const LOG: Extent = Extent { offset: MIB, bytes: MIB };
/// Where the metadata of a new file is.
pub const METADATA: Extent = Extent { offset: 2 * MIB, bytes: MIB };
const BAT_OFFSET: u64 = 3 * MIB;
const SMALL_DISK_BYTES_MAX: u64 = 1 << 40;

/// Bytes of a payload block of a new file.
pub fn block_bytes(size_bytes: u64) -> u32 {
    if size_bytes <= SMALL_DISK_BYTES_MAX { 2 << 20 } else { 32 << 20 }
}

/// A file under construction: what is where so far.
#[derive(Clone, Debug)]
pub struct Layout {
    geometry: Geometry,
    bat: Vec<BatEntry>,
    /// The end of what was given out, bytes.
    end: u64,
}

impl Layout {
    /// An empty disk. The same errors as [`Geometry::new`].
    pub fn new(size_bytes: u64, sector_bytes: u32, differencing: bool) -> Result<Self, WireError> {
        let geometry = Geometry::new(size_bytes, block_bytes(size_bytes), sector_bytes, differencing)?;
        let entries = geometry.bat_entries();
        let bat = vec![BatEntry::default(); usize::try_from(entries).unwrap_or(usize::MAX)];
        let end = BAT_OFFSET + (entries * BatEntry::LEN).next_multiple_of(MIB);
        Ok(Self { geometry, bat, end })
    }

    /// The disk's sizes.
    pub fn geometry(&self) -> &Geometry {
        &self.geometry
    }

    /// Where the table goes.
    pub fn bat_place(&self) -> Extent {
        let bytes = (self.geometry.bat_entries() * BatEntry::LEN).next_multiple_of(MIB);
        Extent { offset: BAT_OFFSET, bytes }
    }

    /// The table.
    pub fn bat(&self) -> &[BatEntry] {
        &self.bat
    }

    /// Length of the file, bytes.
    pub fn file_bytes(&self) -> u64 {
        self.end
    }

    /// Where a payload block is in the file; it is given a place if it has none.
    pub fn place_block(&mut self, block: u64) -> u64 {
        let entry = self.geometry.payload_entry(block);
        let Some(slot) = usize::try_from(entry).ok().and_then(|entry| self.bat.get_mut(entry)) else {
            return self.end;
        };
        if *slot == BatEntry::default() {
            *slot = BatEntry::of_payload(PayloadState::Full, self.end);
            self.end += self.geometry.block_bytes();
        }
        slot.offset()
    }

    /// Only the sectors with a bit are here.
    pub fn make_partial(&mut self, block: u64) {
        let entry = self.geometry.payload_entry(block);
        if let Some(slot) = usize::try_from(entry).ok().and_then(|entry| self.bat.get_mut(entry)) {
            *slot = BatEntry::of_payload(PayloadState::Partial, slot.offset());
        }
    }

    /// Gives a chunk's sector bitmap a place.
    pub fn place_bitmap(&mut self, chunk: u64) -> u64 {
        let entry = self.geometry.bitmap_entry(chunk);
        let offset = self.end;
        if let Some(slot) = usize::try_from(entry).ok().and_then(|entry| self.bat.get_mut(entry)) {
            *slot = BatEntry::of_bitmap(offset);
            self.end += MIB;
        }
        offset
    }
}

#[cfg(test)]
mod test {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn nothing_lies_over_anything_else(
            size in 1u64..3000, wanted in proptest::collection::vec((0u64..5000, 0u8..4), 0..40)
        ) {
            let mut layout = Layout::new(size << 30, 512, true).unwrap();
            let mut parts = vec![Extent { offset: 0, bytes: MIB }, LOG, METADATA, layout.bat_place()];
            let mut placed = std::collections::BTreeMap::new();
            for (n, kind) in wanted {
                let block = n % layout.geometry().payload_blocks();
                if kind == 0 {
                    let chunk = layout.geometry().chunk_of(block);
                    if placed.insert((true, chunk), 0).is_none() {
                        parts.push(Extent { offset: layout.place_bitmap(chunk), bytes: MIB });
                    }
                    continue;
                }
                let offset = layout.place_block(block);
                if kind == 1 {
                    layout.make_partial(block);
                }
                match placed.insert((false, block), offset) {
                    Some(before) => prop_assert_eq!(before, offset, "a block stays where it is"),
                    None => parts.push(Extent { offset, bytes: layout.geometry().block_bytes() }),
                }
            }
            parts.sort_by_key(|part| part.offset);
            for pair in parts.windows(2) {
                prop_assert!(pair[0].offset + pair[0].bytes <= pair[1].offset);
            }
            prop_assert!(parts.iter().all(|part| part.offset % MIB == 0));
            let last = parts.last().unwrap();
            prop_assert_eq!(last.offset + last.bytes, layout.file_bytes());
            let there = layout.bat().iter().filter(|entry| **entry != BatEntry::default()).count();
            prop_assert_eq!(there, placed.len());
        }
    }

    #[test]
    fn the_table_of_the_largest_disk_stays_small() {
        let layout = Layout::new(64 << 40, 512, true).unwrap();
        assert!(layout.bat_place().bytes <= 17 << 20);
        assert_eq!(block_bytes(1 << 40), 2 << 20);
        assert_eq!(Layout::new(1 << 40, 512, false).unwrap().bat_place().bytes, 5 << 20);
    }
}
