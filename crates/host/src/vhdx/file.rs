//! One VHDX file, open for reading.

use std::fs::File;

use whimbrel_engine::disk::vhdx::geometry::Slot;
use whimbrel_engine::disk::vhdx::{
    Extent as Place, Geometry, Linkage, Member, Regions, current, items, linkage, regions,
};
use whimbrel_wire::record::vhdx::{
    BatEntry, BitmapState, FileParameters, Header, IDENTIFIER, MIB, MetadataTable, ParentLocator,
    PayloadState, RegionTable, TABLE_LEN, Uuid,
};

use super::replay::Replayed;
use crate::block_dev::Extent;
use crate::error::{Context, Error, ErrorKind, Result};

/// Entries of the table that are verified at a time.
const BAT_PAGE_ENTRIES: u64 = 4096;
/// Bytes of a sector bitmap that are looked at at a time.
const BITMAP_PAGE_BYTES: u64 = 512;

/// See the module's charter.
#[derive(Debug)]
pub struct VhdxFile {
    content: Replayed,
    header: Header,
    geometry: Geometry,
    bat: Place,
    disk_id: Option<Uuid>,
    linkage: Option<Linkage>,
}

/// Where a payload block's bytes are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Block {
    Zeros,
    Parent,
    /// In this file from here on.
    Here(u64),
    /// In this file from `data` on, as far as the bits of the bitmap at `bits` are set; the parent's otherwise.
    Partial {
        data: u64,
        bits: u64,
    },
}

impl VhdxFile {
    /// Opens and verifies a file; its log is replayed in memory if it has to be. `name` is what errors call it.
    ///
    /// `InvalidInput`: no VHDX file. `Corrupt`: cut off or damaged. `Unsupported`: it needs something that is not known,
    /// which is named.
    pub fn open(file: File, name: &str) -> Result<Self> {
        let mut content = Replayed::new(file, name.to_owned())?;
        let what = || format!("read {name}");
        let mut magic = [0; IDENTIFIER.len()];
        if content.read(0, &mut magic).is_err() || magic != *IDENTIFIER {
            let why = format!("read {name} as vhdx: it does not begin like one");
            return Err(Error::new(ErrorKind::InvalidInput, why)
                .hint("state its real format with --format, or get the file again if it is cut off"));
        }
        let header = current(Header::OFFSETS.map(|at| {
            let bytes = read_vec(&content, at, Header::LEN as u64).ok()?;
            Header::decode(&bytes).ok()
        }));
        let header = header.with_what(what)?;
        if !header.log_id.is_nil() {
            content.replay(&header)?;
        }
        let mut table = Err(content.corrupt("it has no region table"));
        for at in RegionTable::OFFSETS {
            if table.is_err() {
                let bytes = read_vec(&content, at, TABLE_LEN as u64)?;
                table = RegionTable::decode(&bytes).with_what(what);
            }
        }
        let regions = regions(&table?, &header).with_what(what)?;
        let table = read_vec(&content, regions.metadata.offset, TABLE_LEN as u64)?;
        let table = MetadataTable::decode(&table).with_what(what)?;
        let items = items(&table, regions.metadata).with_what(what)?;
        let item = |place: Place| read_vec(&content, place.offset, place.bytes);
        let parameters = FileParameters::decode(&item(items.file_parameters)?).with_what(what)?;
        let number = |place: Place, length: usize, name: &str| -> Result<u64> {
            let bytes = item(place)?;
            if bytes.len() != length {
                return Err(
                    content.corrupt(format!("its {name} has {} bytes instead of {length}", bytes.len()))
                );
            }
            let mut number = [0; 8];
            number.iter_mut().zip(bytes).for_each(|(to, from)| *to = from);
            Ok(u64::from_le_bytes(number))
        };
        let size = number(items.virtual_disk_size, 8, "disk's size")?;
        let sector = number(items.logical_sector_size, 4, "sector size")? as u32;
        let geometry = Geometry::new(size, parameters.block_bytes, sector, parameters.has_parent);
        let geometry = geometry.with_what(what)?;
        let disk_id = items.virtual_disk_id.map(item).transpose()?;
        let disk_id = disk_id.and_then(|bytes| Uuid::from_slice_le(&bytes).ok());
        let locator = items.parent_locator.map(item).transpose()?;
        let locator = locator.map(|bytes| ParentLocator::decode(&bytes)).transpose().with_what(what)?;
        let linkage = linkage(parameters, locator.as_ref()).with_what(what)?;
        let file = Self { content, header, geometry, bat: regions.bat, disk_id, linkage };
        file.verify_blocks(&regions)?;
        Ok(file)
    }

    /// What errors call it.
    pub fn name(&self) -> &str {
        self.content.name()
    }

    /// The header that counts.
    pub fn header(&self) -> &Header {
        &self.header
    }

    /// The disk's sizes.
    pub fn geometry(&self) -> &Geometry {
        &self.geometry
    }

    /// The disk's identity, which it shares with what it lies on.
    pub fn disk_id(&self) -> Option<Uuid> {
        self.disk_id
    }

    /// What it lies on, if anything.
    pub fn linkage(&self) -> Option<&Linkage> {
        self.linkage.as_ref()
    }

    /// The file as a member of a chain.
    pub(super) fn member(&self) -> Member<'_> {
        Member { file: self.name(), data_write_id: self.header.data_write_id, geometry: &self.geometry }
    }

    /// Verifies every entry of the table: states, that blocks lie inside the file, and that none lies over another.
    fn verify_blocks(&self, regions: &Regions) -> Result<()> {
        let entries = self.geometry.bat_entries();
        if entries * BatEntry::LEN > self.bat.bytes {
            let has = self.bat.bytes / BatEntry::LEN;
            return Err(self
                .content
                .corrupt(format!("its table has {has} blocks, the disk needs {entries}")));
        }
        let mut used = Used::new(self.content.bytes());
        for place in &regions.taken {
            if !used.inside(*place) {
                let (offset, bytes) = (place.offset, place.bytes);
                return Err(self
                    .content
                    .corrupt(format!("it is cut off: {bytes} bytes at {offset} are missing")));
            }
            used.take(*place);
        }
        let mut bytes = vec![0; (BAT_PAGE_ENTRIES * BatEntry::LEN) as usize];
        let (mut first, mut partial) = (0, false);
        while first < entries {
            let count = (entries - first).min(BAT_PAGE_ENTRIES);
            let page = bytes.get_mut(..(count * BatEntry::LEN) as usize).unwrap_or_default();
            self.content.read(self.bat.offset + first * BatEntry::LEN, page)?;
            for (entry, bytes) in (first..).zip(page.chunks_exact(BatEntry::LEN as usize)) {
                let value = BatEntry(bytes.try_into().map_or(0, u64::from_le_bytes));
                // Most entries of a large table: nothing there, and no bitmap missing.
                if value == BatEntry::default() && !partial {
                    continue;
                }
                self.verify_entry(entry, value, &mut used, &mut partial)?;
            }
            first += count;
        }
        Ok(())
    }

    fn verify_entry(&self, entry: u64, value: BatEntry, used: &mut Used, partial: &mut bool) -> Result<()> {
        let what = || format!("read {}", self.name());
        let (place, needed, number) = match self.geometry.slot(entry) {
            Slot::Payload(block) if block < self.geometry.payload_blocks() => {
                let state = value.payload().with_what(what)?;
                if state == PayloadState::Partial && !self.geometry.is_differencing() {
                    return Err(self
                        .content
                        .corrupt(format!("block {block} is a part of one, and there is no parent")));
                }
                *partial |= state == PayloadState::Partial;
                if !matches!(state, PayloadState::Full | PayloadState::Partial) {
                    return Ok(());
                }
                let place = Place { offset: value.offset(), bytes: self.geometry.block_bytes() };
                (place, self.geometry.used_bytes(block), block)
            }
            Slot::Bitmap(chunk) if self.geometry.is_differencing() => {
                let wanted = std::mem::take(partial);
                if value.bitmap().with_what(what)? == BitmapState::NotPresent {
                    let missing = format!("the sector bitmap of chunk {chunk} is missing");
                    return if wanted { Err(self.content.corrupt(missing)) } else { Ok(()) };
                }
                (Place { offset: value.offset(), bytes: MIB }, MIB, chunk)
            }
            // Behind the disk's end, or of no meaning in a disk without a parent.
            Slot::Payload(_) | Slot::Bitmap(_) => return Ok(()),
        };
        if !used.inside(Place { offset: place.offset, bytes: needed }) {
            return Err(self.content.corrupt(format!(
                "it is cut off: it has {} bytes, and block {number} lies at {}",
                self.content.bytes(),
                place.offset
            )));
        }
        if !used.take(place) {
            return Err(self
                .content
                .corrupt(format!("block {number} at {} lies over something else", place.offset)));
        }
        Ok(())
    }

    fn bat_entry(&self, entry: u64) -> Result<BatEntry> {
        let mut bytes = [0; BatEntry::LEN as usize];
        self.content.read(self.bat.offset + entry * BatEntry::LEN, &mut bytes)?;
        Ok(BatEntry(u64::from_le_bytes(bytes)))
    }

    /// Where a payload block is.
    pub(super) fn block(&self, block: u64) -> Result<Block> {
        let entry = self.bat_entry(self.geometry.payload_entry(block))?;
        Ok(match entry.payload()? {
            PayloadState::NotPresent if self.geometry.is_differencing() => Block::Parent,
            PayloadState::NotPresent
            | PayloadState::Undefined
            | PayloadState::Zero
            | PayloadState::Unmapped => Block::Zeros,
            PayloadState::Full => Block::Here(entry.offset()),
            PayloadState::Partial => {
                let bitmap = self.geometry.bitmap_entry(self.geometry.chunk_of(block));
                Block::Partial { data: entry.offset(), bits: self.bat_entry(bitmap)?.offset() }
            }
        })
    }

    /// Whether the sector at `offset` of the disk is in this file, and for how many bytes, `length` at most, that goes on.
    /// May say less than there is.
    pub(super) fn run_of_bits(&self, bits: u64, offset: u64, length: u64) -> Result<(bool, u64)> {
        let sector = self.geometry.sector_bytes();
        let first = self.geometry.bit_of(offset);
        let (byte, mut bit) = (first / 8, first % 8);
        let mut page = vec![0; (BITMAP_PAGE_BYTES.min(MIB - byte)) as usize];
        self.content.read(bits + byte, &mut page)?;
        let mut all = page.iter().flat_map(|byte| (0..8).map(move |bit| byte >> bit & 1 == 1));
        let mut run = sector - offset % sector;
        // To the first bit that is asked for.
        while bit > 0 {
            all.next();
            bit -= 1;
        }
        let here = all.next().unwrap_or(false);
        while run < length && all.next() == Some(here) {
            run += sector;
        }
        Ok((here, run.min(length)))
    }

    /// Reads bytes of the file.
    pub(super) fn read_at(&self, place: u64, into: &mut [u8]) -> Result<()> {
        self.content.read(place, into)
    }

    /// The run of data, or of a hole, at the start of this range of the file.
    pub(super) fn extent_at(&self, place: u64, length: u64) -> Result<Extent> {
        self.content.extent(place, length)
    }
}

fn read_vec(content: &Replayed, offset: u64, bytes: u64) -> Result<Vec<u8>> {
    let mut into = vec![0; bytes as usize];
    content.read(offset, &mut into).map(|()| into)
}

/// Which MiB of a file are taken.
struct Used {
    file_bytes: u64,
    bits: Vec<u64>,
}

impl Used {
    fn new(file_bytes: u64) -> Self {
        Self { file_bytes, bits: vec![0; (file_bytes / MIB / 64 + 1) as usize] }
    }

    fn inside(&self, place: Place) -> bool {
        place.offset.checked_add(place.bytes).is_some_and(|end| end <= self.file_bytes)
    }

    /// Takes what of `place` is inside the file; `false` if a part was taken.
    fn take(&mut self, place: Place) -> bool {
        let end = place.offset.saturating_add(place.bytes).min(self.file_bytes).div_ceil(MIB);
        for mib in place.offset / MIB..end {
            let Some(word) = self.bits.get_mut((mib / 64) as usize) else { return true };
            if *word >> (mib % 64) & 1 == 1 {
                return false;
            }
            *word |= 1 << (mib % 64);
        }
        true
    }
}

/// Puts "read FILE" in front of what a decoder or a decision said.
trait WithWhat<T> {
    fn with_what(self, what: impl FnOnce() -> String) -> Result<T>;
}

impl<T> WithWhat<T> for Result<T, whimbrel_wire::WireError> {
    fn with_what(self, what: impl FnOnce() -> String) -> Result<T> {
        self.map_err(Error::from).with_context(what)
    }
}
