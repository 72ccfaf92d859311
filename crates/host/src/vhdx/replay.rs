//! A file as it is after the replay of its log, without writing to it.
//!
//! Invariant: finding the entries takes time linear in the log's length, whatever stands in it. An entry is believed as
//! far as its sectors are of it; none of those begins like an entry, so that no two candidates share more than their
//! first wrong sector.

use std::collections::BTreeMap;
use std::fs::File;
use std::os::unix::fs::FileExt;

use rustix::fs::SeekFrom;
use whimbrel_engine::disk::vhdx::log::{Entry, active};
use whimbrel_wire::record::vhdx::log::{SECTOR_LEN, check_data_sector};
use whimbrel_wire::record::vhdx::{Descriptor, EntryHeader, Header};

use crate::block_dev::Extent;
use crate::error::{Context, Error, ErrorKind, Result};

const SECTOR_BYTES: u64 = SECTOR_LEN as u64;
/// No file that holds a disk of at most 64 TiB is longer.
const FILE_BYTES_MAX: u64 = 66 << 40;

/// An open file, with what its log says over it.
#[derive(Debug)]
pub(super) struct Replayed {
    file: File,
    name: String,
    /// Bytes that the file has.
    on_disk_bytes: u64,
    /// Bytes that it has after the replay.
    bytes: u64,
    overlay: Overlay,
}

impl Replayed {
    /// The file as it is.
    pub(super) fn new(file: File, name: String) -> Result<Self> {
        let on_disk_bytes = file.metadata().with_context(|| format!("read {name}"))?.len();
        if on_disk_bytes > FILE_BYTES_MAX {
            let why = format!("read {name}: no VHDX file has {on_disk_bytes} bytes");
            return Err(Error::new(ErrorKind::InvalidInput, why));
        }
        Ok(Self { file, name, on_disk_bytes, bytes: on_disk_bytes, overlay: Overlay::default() })
    }

    /// What people know the file by.
    pub(super) fn name(&self) -> &str {
        &self.name
    }

    /// Its length, bytes.
    pub(super) fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Fills `into` from `offset` on.
    ///
    /// `Corrupt`: that is behind the file's end.
    pub(super) fn read(&self, offset: u64, into: &mut [u8]) -> Result<()> {
        let end = offset.checked_add(into.len() as u64).filter(|end| *end <= self.bytes);
        if end.is_none() {
            return Err(
                self.corrupt(format!("it is cut off: it has {} bytes, and {offset} is needed", self.bytes))
            );
        }
        self.overlay.read(offset, into, &|at, part| self.read_file(at, part))
    }

    /// The run of data, or of a hole, at the start of this range.
    pub(super) fn extent(&self, offset: u64, length: u64) -> Result<Extent> {
        let data = |length| Ok(Extent { length, data: true });
        if !self.overlay.pieces.is_empty() {
            return data(length);
        }
        match rustix::fs::seek(&self.file, SeekFrom::Data(offset)) {
            Err(rustix::io::Errno::NXIO) => return Ok(Extent { length, data: false }),
            // A file system that knows no holes.
            Err(rustix::io::Errno::INVAL | rustix::io::Errno::NOTSUP) => return data(length),
            Ok(at) if at > offset => return Ok(Extent { length: length.min(at - offset), data: false }),
            found => found.with_context(|| format!("look for holes in {}", self.name))?,
        };
        let hole = rustix::fs::seek(&self.file, SeekFrom::Hole(offset));
        let hole = hole.with_context(|| format!("look for holes in {}", self.name))?;
        data(length.min(hole.saturating_sub(offset)).max(1))
    }

    /// An error that names the file.
    pub(super) fn corrupt(&self, why: impl std::fmt::Display) -> Error {
        Error::new(ErrorKind::Corrupt, format!("read {}: {why}", self.name))
            .hint("get the file again and compare its checksum")
    }

    /// What the file itself holds; zeros behind its end.
    fn read_file(&self, offset: u64, into: &mut [u8]) -> Result<()> {
        let inside = self.on_disk_bytes.saturating_sub(offset).min(into.len() as u64) as usize;
        let (there, beyond) = into.split_at_mut(inside);
        beyond.fill(0);
        self.file.read_exact_at(there, offset).with_context(|| format!("read {} at {offset}", self.name))
    }

    /// Replays the log that `header` names.
    ///
    /// `Corrupt`: it holds nothing whole, or the file is shorter than when the log was written.
    pub(super) fn replay(&mut self, header: &Header) -> Result<()> {
        let ring = Ring { file: self, header };
        if header.log_offset.checked_add(u64::from(header.log_bytes)).is_none_or(|end| end > self.bytes) {
            return Err(self.corrupt("it is cut off within its log"));
        }
        let whole = ring.entries()?;
        let entries: BTreeMap<u32, Entry> =
            whole.iter().map(|(at, header)| (*at, entry_of(header))).collect();
        let places = active(&entries, header.log_bytes).unwrap_or_default();
        let Some(head) = places.last().and_then(|place| whole.get(place)) else {
            return Err(self.corrupt("its log has to be replayed and is damaged: no entry of it is whole"));
        };
        if self.on_disk_bytes < head.flushed_file_offset {
            let (had, has) = (head.flushed_file_offset, self.on_disk_bytes);
            return Err(self.corrupt(format!("it is cut off: its log says {had} bytes, it has {has}")));
        }
        let bytes = head.last_file_offset.max(self.on_disk_bytes);
        if bytes > FILE_BYTES_MAX {
            return Err(self.corrupt(format!("its log wants it to have {bytes} bytes")));
        }
        let mut overlay = Overlay::default();
        for place in places {
            if let Some(header) = whole.get(&place) {
                ring.apply(place, header, &mut overlay)?;
            }
        }
        (self.bytes, self.overlay) = (bytes, overlay);
        Ok(())
    }
}

fn entry_of(header: &EntryHeader) -> Entry {
    Entry { bytes: header.bytes, tail: header.tail, sequence: header.sequence }
}

/// The log.
struct Ring<'a> {
    file: &'a Replayed,
    header: &'a Header,
}

impl Ring<'_> {
    /// Where in the file the sector is that stands `number` sectors behind `place` in the ring.
    fn place(&self, place: u32, number: u64) -> u64 {
        let at = (u64::from(place) + number * SECTOR_BYTES) % u64::from(self.header.log_bytes).max(1);
        self.header.log_offset + at
    }

    fn sector(&self, place: u32, number: u64) -> Result<[u8; SECTOR_LEN]> {
        let mut sector = [0; SECTOR_LEN];
        self.file.read_file(self.place(place, number), &mut sector)?;
        Ok(sector)
    }

    /// All whole entries, by place.
    fn entries(&self) -> Result<BTreeMap<u32, EntryHeader>> {
        let mut found = BTreeMap::new();
        let mut at = 0;
        while at < self.header.log_bytes {
            let entry = self.entry(at)?;
            let bytes = entry.as_ref().map_or(SECTOR_LEN as u32, |entry| entry.bytes);
            if let Some(entry) = entry {
                found.insert(at, entry);
            }
            at = at.saturating_add(bytes);
        }
        Ok(found)
    }

    /// The entry at `place`, if a whole one is there.
    fn entry(&self, place: u32) -> Result<Option<EntryHeader>> {
        let first = self.sector(place, 0)?;
        let Ok(header) = EntryHeader::decode(&first) else { return Ok(None) };
        let ours = header.log_id == self.header.log_id;
        let fits = header.bytes <= self.header.log_bytes && header.tail < self.header.log_bytes;
        if !ours || !fits {
            return Ok(None);
        }
        let mut crc = EntryHeader::checksum_of_first(&first);
        let (mut sector, mut data_sectors) = (first, 0);
        for number in 0..u64::from(header.bytes) / SECTOR_BYTES {
            if number > 0 {
                sector = self.sector(place, number)?;
                crc = crc32c::crc32c_append(crc, &sector);
            }
            let described = header.descriptor_sectors();
            let good = if number < described {
                let descriptors = header.descriptors_in(number, &sector);
                let read: Result<Vec<Descriptor>, _> =
                    descriptors.map(|bytes| Descriptor::decode(bytes, header.sequence)).collect();
                let data = |list: &Vec<Descriptor>| {
                    list.iter().filter(|one| matches!(one, Descriptor::Data { .. })).count() as u64
                };
                data_sectors += read.as_ref().map_or(0, data);
                read.is_ok()
            } else if number < described + data_sectors {
                check_data_sector(&sector, header.sequence).is_ok()
            } else {
                !sector.starts_with(b"loge")
            };
            if !good {
                return Ok(None);
            }
        }
        let room = header.descriptor_sectors() + data_sectors <= u64::from(header.bytes) / SECTOR_BYTES;
        Ok((room && crc == header.checksum).then_some(header))
    }

    /// Lays an entry's changes over the file.
    fn apply(&self, place: u32, header: &EntryHeader, overlay: &mut Overlay) -> Result<()> {
        let mut data = header.descriptor_sectors();
        for number in 0..header.descriptor_sectors() {
            let sector = self.sector(place, number)?;
            for bytes in header.descriptors_in(number, &sector) {
                match Descriptor::decode(bytes, header.sequence)? {
                    Descriptor::Zero { offset, bytes } => overlay.put(offset, offset + bytes, What::Zeros),
                    Descriptor::Data { offset, leading, trailing } => {
                        let at = self.place(place, data);
                        overlay.put(offset, offset + SECTOR_BYTES, What::Logged { at, leading, trailing });
                        data += 1;
                    }
                }
            }
        }
        Ok(())
    }
}

/// What lies over a range of the file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum What {
    Zeros,
    /// A data sector of the log, which stands in the file at `at`, with its ends put right.
    Logged {
        at: u64,
        leading: [u8; 8],
        trailing: [u8; 4],
    },
}

/// What lies over the file: ranges in whole sectors, none over another.
#[derive(Debug, Default)]
struct Overlay {
    /// By start: end, and what.
    pieces: BTreeMap<u64, (u64, What)>,
}

impl Overlay {
    /// Covers what was there. A logged sector is as long as the unit of all ranges, so that only zeros are ever cut.
    fn put(&mut self, start: u64, end: u64, what: What) {
        if start >= end {
            return;
        }
        let before = self.pieces.range(..start).next_back().map(|(at, piece)| (*at, *piece));
        if let Some((at, (old_end, old))) = before
            && old_end > start
        {
            self.pieces.insert(at, (start, old));
            if old_end > end {
                self.pieces.insert(end, (old_end, old));
            }
        }
        let inside: Vec<u64> = self.pieces.range(start..end).map(|(at, _)| *at).collect();
        for at in inside {
            if let Some((old_end, old)) = self.pieces.remove(&at)
                && old_end > end
            {
                self.pieces.insert(end, (old_end, old));
            }
        }
        self.pieces.insert(start, (end, what));
    }

    /// Reads from `file` through what lies over it.
    fn read(&self, offset: u64, into: &mut [u8], file: &dyn Fn(u64, &mut [u8]) -> Result<()>) -> Result<()> {
        let mut at = offset;
        let mut rest = into;
        while !rest.is_empty() {
            let over = self.pieces.range(..=at).next_back().filter(|(_, (end, _))| *end > at);
            let next = self.pieces.range(at..).next().map_or(u64::MAX, |(start, _)| *start);
            let end = over.map_or(next, |(_, (end, _))| *end);
            let length = (end - at).min(rest.len() as u64) as usize;
            let (part, more) = rest.split_at_mut(length);
            match over {
                None => file(at, part)?,
                Some((_, (_, What::Zeros))) => part.fill(0),
                Some((start, (_, What::Logged { at: place, leading, trailing }))) => {
                    let mut sector = [0; SECTOR_LEN];
                    file(*place, &mut sector)?;
                    sector[..8].copy_from_slice(leading);
                    sector[SECTOR_LEN - 4..].copy_from_slice(trailing);
                    let from = (at - start) as usize;
                    part.copy_from_slice(sector.get(from..from + length).unwrap_or_default());
                }
            }
            at += length as u64;
            rest = more;
        }
        Ok(())
    }
}

#[cfg(test)]
mod test {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        /// Ranges laid over each other, against a file that was really written.
        #[test]
        fn reading_through_the_overlay_is_reading_what_was_written(
            changes in proptest::collection::vec((0u64..24, 1u64..9, any::<bool>()), 0..30),
            reads in proptest::collection::vec((0usize..90_000, 1usize..9000), 1..10)
        ) {
            let log: Vec<u8> = (0..40 * SECTOR_LEN).map(|n| (n / SECTOR_LEN * 7 + n % 251) as u8).collect();
            let mut written = log.clone();
            let mut overlay = Overlay::default();
            for (n, (sector, length, zeros)) in changes.into_iter().enumerate() {
                let start = sector * SECTOR_BYTES;
                if zeros {
                    let end = start + length * SECTOR_BYTES;
                    overlay.put(start, end, What::Zeros);
                    written[start as usize..end as usize].fill(0);
                } else {
                    let at = (n % 40 * SECTOR_LEN) as u64;
                    let (leading, trailing) = ([n as u8; 8], [n as u8 ^ 0xff; 4]);
                    overlay.put(start, start + SECTOR_BYTES, What::Logged { at, leading, trailing });
                    let mut content = log[at as usize..at as usize + SECTOR_LEN].to_vec();
                    content[..8].copy_from_slice(&leading);
                    content[SECTOR_LEN - 4..].copy_from_slice(&trailing);
                    written[start as usize..start as usize + SECTOR_LEN].copy_from_slice(&content);
                }
            }
            let file = |at: u64, part: &mut [u8]| -> Result<()> {
                part.copy_from_slice(&log[at as usize..at as usize + part.len()]);
                Ok(())
            };
            for (at, length) in reads {
                let mut read = vec![0xee; length];
                overlay.read(at as u64, &mut read, &file).unwrap();
                prop_assert!(read == written[at..at + length]);
            }
        }
    }
}
