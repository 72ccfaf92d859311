//! A new VHDX file: dynamic, or differencing over another.
//!
//! Data comes in rising order; blocks are appended as it comes. What was not written stays a hole, of the file where a
//! block is there, of the table where none is. The table is kept in memory (`engine::disk::vhdx::layout` bounds it), and
//! of the sector bitmaps the one of the current chunk.
//!
//! The log is not used: the headers are written last, after a flush, and without them nothing is a VHDX file. Both ids
//! that a header holds are new with every file, so that no child of another file takes it for its parent.

use std::fs::File;
use std::os::unix::fs::FileExt;

use whimbrel_engine::disk::vhdx::geometry::CHUNK_SECTORS;
use whimbrel_engine::disk::vhdx::layout::{LOG, Layout, METADATA};
use whimbrel_wire::record::vhdx::metadata::item;
use whimbrel_wire::record::vhdx::{
    BatEntry, FileParameters, Header, MetadataEntry, MetadataTable, ParentLocator, RegionEntry, RegionTable,
    TABLE_LEN, Uuid, encode_identifier,
};

use crate::error::{Context, Error, ErrorKind, Result};

const CREATOR: &str = concat!("Whimbrel ", env!("CARGO_PKG_VERSION"));
const PHYSICAL_SECTOR_BYTES: u32 = 4096;
/// Zeros are left out in units of this.
const PAGE_LEN: usize = 4096;

/// What a new file is to be.
#[derive(Clone, Debug)]
pub struct NewDisk {
    /// Size of the disk, bytes.
    pub size_bytes: u64,
    /// Bytes of a logical sector: 512 or 4096.
    pub sector_bytes: u32,
    /// The disk's identity; with a parent, the parent's.
    pub disk_id: Uuid,
    /// What it lies on.
    pub parent: Option<NewParent>,
}

/// What a new file lies on.
#[derive(Clone, Debug)]
pub struct NewParent {
    /// The `DataWriteGuid` in its header.
    pub data_write_id: Uuid,
    /// Its file, from the new file's directory on, with backslashes.
    pub relative_path: String,
}

/// See the module's charter.
#[derive(Debug)]
pub struct Writer<'a> {
    file: &'a File,
    new: NewDisk,
    layout: Layout,
    /// What is below was written; bytes of the disk.
    at: u64,
    /// The block that was written last, and how many of its sectors are here.
    block: Option<(u64, u64)>,
    chunk: Option<Chunk>,
}

/// The bits of one chunk.
#[derive(Debug)]
struct Chunk {
    number: u64,
    bits: Vec<u8>,
    /// A block of it is here in part, so that the bits are needed.
    partial: bool,
}

impl<'a> Writer<'a> {
    /// Begins a file; `file` is empty. The errors of sizes that are not possible.
    pub fn new(file: &'a File, new: NewDisk) -> Result<Self> {
        let layout = Layout::new(new.size_bytes, new.sector_bytes, new.parent.is_some())?;
        Ok(Self { file, new, layout, at: 0, block: None, chunk: None })
    }

    /// Writes `bytes` at `offset` of the disk, which is not below what was written before. Over a parent, whole sectors.
    pub fn write(&mut self, offset: u64, bytes: &[u8]) -> Result<()> {
        self.advance(offset, bytes.len() as u64)?;
        let (mut at, mut rest) = (offset, bytes);
        while !rest.is_empty() {
            let (place, length) = self.piece(at, rest.len() as u64)?;
            let (part, more) = rest.split_at(length as usize);
            self.put(part, place)?;
            at += length;
            rest = more;
        }
        Ok(())
    }

    /// The range reads as zeros. Of use over a parent only: elsewhere it does so anyway.
    pub fn write_zeroes(&mut self, offset: u64, length: u64) -> Result<()> {
        self.advance(offset, length)?;
        let end = offset + length;
        let mut at = offset;
        while at < end && self.layout.geometry().is_differencing() {
            // A block that is new in the file is a hole.
            at += self.piece(at, end - at)?.1;
        }
        Ok(())
    }

    /// Makes it a VHDX file, durably.
    pub fn finish(mut self) -> Result<()> {
        self.leave_block();
        self.leave_chunk()?;
        self.file.set_len(self.layout.file_bytes()).context("write vhdx file")?;
        self.put(&encode_identifier(CREATOR), 0)?;
        let bat_place = self.layout.bat_place();
        let regions = RegionTable {
            entries: vec![
                region(RegionTable::BAT, bat_place.offset, bat_place.bytes),
                region(RegionTable::METADATA, METADATA.offset, METADATA.bytes),
            ],
        };
        for offset in RegionTable::OFFSETS {
            self.put(&regions.encode(), offset)?;
        }
        self.put_metadata()?;
        let per_page = PAGE_LEN / BatEntry::LEN as usize;
        for (n, entries) in self.layout.bat().chunks(per_page).enumerate() {
            if entries.iter().any(|entry| *entry != BatEntry::default()) {
                let page: Vec<u8> = entries.iter().flat_map(|entry| entry.0.to_le_bytes()).collect();
                self.put(&page, bat_place.offset + (n * PAGE_LEN) as u64)?;
            }
        }
        self.file.sync_data().context("flush vhdx file")?;
        let (file_write_id, data_write_id) = (Uuid::new_v4(), Uuid::new_v4());
        for (sequence, offset) in (1..).zip(Header::OFFSETS) {
            let header = Header {
                sequence,
                file_write_id,
                data_write_id,
                log_id: Uuid::nil(),
                log_version: 0,
                version: Header::VERSION,
                log_bytes: LOG.bytes as u32,
                log_offset: LOG.offset,
            };
            self.put(&header.encode(), offset)?;
        }
        self.file.sync_all().context("flush vhdx file")
    }

    fn put(&self, bytes: &[u8], offset: u64) -> Result<()> {
        self.file.write_all_at(bytes, offset).context("write vhdx file")
    }

    fn put_metadata(&self) -> Result<()> {
        let geometry = self.layout.geometry();
        let parameters = FileParameters {
            block_bytes: geometry.block_bytes() as u32,
            leave_allocated: false,
            has_parent: self.new.parent.is_some(),
        };
        let mut items = vec![
            (item::FILE_PARAMETERS, false, parameters.encode().to_vec()),
            (item::VIRTUAL_DISK_SIZE, true, self.new.size_bytes.to_le_bytes().to_vec()),
            (item::VIRTUAL_DISK_ID, true, self.new.disk_id.to_bytes_le().to_vec()),
            (item::LOGICAL_SECTOR_SIZE, true, self.new.sector_bytes.to_le_bytes().to_vec()),
            (item::PHYSICAL_SECTOR_SIZE, true, PHYSICAL_SECTOR_BYTES.to_le_bytes().to_vec()),
        ];
        if let Some(parent) = &self.new.parent {
            let pair = |key: &str, value: String| (key.to_owned(), value);
            let locator = ParentLocator {
                kind: ParentLocator::VHDX,
                pairs: vec![
                    pair(ParentLocator::LINKAGE, ParentLocator::braced(parent.data_write_id)),
                    pair(ParentLocator::RELATIVE_PATH, parent.relative_path.clone()),
                ],
            };
            items.push((item::PARENT_LOCATOR, false, locator.encode()));
        }
        let mut table = MetadataTable::default();
        let mut at = TABLE_LEN;
        for (id, is_virtual_disk, bytes) in items {
            self.put(&bytes, METADATA.offset + at as u64)?;
            let (offset, length) = (at as u32, bytes.len() as u32);
            table.entries.push(MetadataEntry {
                id,
                offset,
                bytes: length,
                is_user: false,
                is_virtual_disk,
                required: true,
            });
            at += bytes.len().next_multiple_of(8);
        }
        self.put(&table.encode(), METADATA.offset)
    }

    /// Verifies that the caller goes on behind what it wrote, inside the disk, in whole sectors where bits count them.
    fn advance(&mut self, offset: u64, length: u64) -> Result<()> {
        let geometry = self.layout.geometry();
        let end = offset.checked_add(length).filter(|end| *end <= geometry.size_bytes());
        let sector = if geometry.is_differencing() { geometry.sector_bytes() } else { 1 };
        let whole = offset.is_multiple_of(sector) && length.is_multiple_of(sector);
        match end {
            Some(end) if offset >= self.at && whole => {
                self.at = end;
                Ok(())
            }
            _ => {
                let why = format!("write vhdx file: {length} bytes at {offset}, after {}", self.at);
                Err(Error::new(ErrorKind::Internal, why))
            }
        }
    }

    /// Takes the part of this range that is in one block into the file; gives where in it that is, and its length.
    fn piece(&mut self, offset: u64, length: u64) -> Result<(u64, u64)> {
        let geometry = *self.layout.geometry();
        let block = geometry.block_of(offset);
        let within = offset % geometry.block_bytes();
        let length = length.min(geometry.block_bytes() - within);
        if self.block.is_none_or(|(current, _)| current != block) {
            self.leave_block();
            let chunk = geometry.chunk_of(block);
            if self.chunk.as_ref().is_none_or(|current| current.number != chunk) {
                self.leave_chunk()?;
                let bits = if geometry.is_differencing() { (CHUNK_SECTORS / 8) as usize } else { 0 };
                self.chunk = Some(Chunk { number: chunk, bits: vec![0; bits], partial: false });
            }
            self.block = Some((block, 0));
        }
        let sectors = length / geometry.sector_bytes();
        if let (Some((_, here)), Some(chunk), true) =
            (&mut self.block, &mut self.chunk, geometry.is_differencing())
        {
            *here += sectors;
            let first = geometry.bit_of(offset);
            for bit in first..first + sectors {
                if let Some(byte) = chunk.bits.get_mut((bit / 8) as usize) {
                    *byte |= 1 << (bit % 8);
                }
            }
        }
        Ok((self.layout.place_block(block) + within, length))
    }

    fn leave_block(&mut self) {
        let Some((block, here)) = self.block.take() else { return };
        let geometry = *self.layout.geometry();
        if geometry.is_differencing() && here * geometry.sector_bytes() < geometry.used_bytes(block) {
            self.layout.make_partial(block);
            if let Some(chunk) = &mut self.chunk {
                chunk.partial = true;
            }
        }
    }

    fn leave_chunk(&mut self) -> Result<()> {
        let Some(chunk) = self.chunk.take().filter(|chunk| chunk.partial) else { return Ok(()) };
        let offset = self.layout.place_bitmap(chunk.number);
        for (n, page) in chunk.bits.chunks(PAGE_LEN).enumerate() {
            if page.iter().any(|byte| *byte != 0) {
                self.put(page, offset + (n * PAGE_LEN) as u64)?;
            }
        }
        Ok(())
    }
}

fn region(id: Uuid, offset: u64, bytes: u64) -> RegionEntry {
    RegionEntry { id, offset, bytes: bytes as u32, required: true }
}
