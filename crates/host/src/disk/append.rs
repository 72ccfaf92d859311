//! The end of the log: where the next record goes.
//!
//! ```text
//!          begin_flush, group full            segment full
//!  (open group) ─────────► (no group) ───────────────────────► fdatasync, new segment
//!       ▲                      │ append: index block + payload in one pwritev
//!       └──────────────────────┘ append into an open group: payload, then its 64-byte entry
//! ```
//!
//! Invariants: the caller holds the log's lock, so records are written one after the other: a process that dies in
//! the middle leaves no hole before a record that somebody was told about. A record that could not be written
//! moves nothing; the next one takes its place.

use std::io::{self, IoSlice};
use std::sync::Arc;

use whimbrel_wire::record::layer::{
    BLOCK_BYTES, BLOCK_LEN, ENTRY_LEN, Entry, EntryKind, GROUP_PAYLOAD_BYTES, GroupHead, INDEX_ENTRIES,
    LogPoint, SegmentHead,
};
use whimbrel_wire::{DiskId, Epoch};

use super::files::{DataFile, Dir};
use crate::error::{Context, Error, ErrorKind, Result};

/// Slices that a write may have before the list of them is allocated.
const SLICES_ON_STACK: usize = 34;

/// What all records of a session have in common.
#[derive(Clone, Copy, Debug)]
pub(super) struct Ident {
    pub(super) disk_id: DiskId,
    pub(super) salt: u64,
    pub(super) epoch: Epoch,
    pub(super) session: u64,
    pub(super) segment_blocks: u32,
}

impl Ident {
    /// Where a block of a segment is in the log, blocks from its beginning.
    pub(super) fn place(&self, segment: u32, block: u32) -> u64 {
        u64::from(segment) * u64::from(self.segment_blocks) + u64::from(block)
    }
}

#[derive(Debug)]
struct Group {
    block: u32,
    entries: usize,
    payload_blocks: u32,
}

/// See the module's charter.
#[derive(Debug)]
pub(super) struct Log {
    ident: Ident,
    /// The next record's number and chain, and the next free block.
    point: LogPoint,
    group: Option<Group>,
    /// The segment at `point`; none before the first append after an unclean end.
    segment: Option<Arc<DataFile>>,
    /// A segment that was begun, and that no appended record has told of yet.
    begun: Option<Arc<DataFile>>,
    /// Whether the segment has records that are not durable.
    dirty: bool,
    /// Always zero but for its first two entries while a group is begun.
    index: Box<[u8; BLOCK_LEN]>,
}

/// A payload and where it belongs.
#[derive(Clone, Copy, Debug)]
pub(super) struct Record<'a> {
    pub(super) offset_bytes: u64,
    pub(super) length_bytes: u64,
    /// The payload with its CRC, or zeros.
    pub(super) payload: Option<(&'a [IoSlice<'a>], u32)>,
}

/// What an append did.
#[derive(Debug)]
pub(super) struct Appended {
    /// Place of the payload; 0 for zeros.
    pub(super) place: u32,
    /// The record's number.
    pub(super) seq: u64,
    /// The segment that had to be begun for it.
    pub(super) segment: Option<Arc<DataFile>>,
}

/// Why nothing was appended.
pub(super) enum AppendError {
    /// The log is as it was.
    Unchanged(Error),
    /// What was written before may be lost: go read-only.
    Lost(Error),
}

impl Log {
    /// Goes on at `point`, in `segment` if the log ends cleanly there, else in a new one.
    pub(super) fn new(ident: Ident, point: LogPoint, segment: Option<Arc<DataFile>>) -> Self {
        Self {
            ident,
            point,
            group: None,
            segment,
            begun: None,
            dirty: false,
            index: Box::new([0; BLOCK_LEN]),
        }
    }

    /// The end of the log; also closes the group, so that whole groups stand before it.
    pub(super) fn end(&mut self) -> LogPoint {
        self.group = None;
        self.point
    }

    /// The end of the log, for people.
    pub(super) fn point(&self) -> LogPoint {
        self.point
    }

    /// What a flush must make durable: the last record's number, and the file to sync if there is anything.
    pub(super) fn begin_flush(&mut self) -> (u64, Option<Arc<DataFile>>) {
        self.group = None;
        let file = self.segment.clone().filter(|_| self.dirty);
        self.dirty = false;
        (self.point.seq - 1, file)
    }

    /// Appends one record. `durable_seq` is known to be durable.
    pub(super) fn append(
        &mut self,
        dir: &Dir,
        record: &Record<'_>,
        durable_seq: u64,
    ) -> Result<Appended, AppendError> {
        // Whoever reads the log would take it for the log's end.
        if !(record.offset_bytes | record.length_bytes).is_multiple_of(BLOCK_BYTES) {
            let text = format!("append to layer {}: a record of odd blocks", self.ident.disk_id);
            return Err(AppendError::Unchanged(Error::new(ErrorKind::Internal, text)));
        }
        let blocks = match record.payload {
            Some(_) => u32::try_from(record.length_bytes / BLOCK_BYTES).unwrap_or(u32::MAX),
            None => 0,
        };
        self.make_room(dir, blocks)?;
        let Some(segment) = self.segment.clone() else {
            return Err(AppendError::Unchanged(Error::new(
                ErrorKind::Internal,
                "append to layer: no segment",
            )));
        };
        let first = self.point.block + u32::from(self.group.is_none());
        let place = match record.payload {
            Some(_) => self.place(first).map_err(AppendError::Unchanged)?,
            None => 0,
        };
        let written = match &self.group {
            Some(_) => self.write_more(&segment, record, first),
            None => self.write_first(&segment, record, first, durable_seq),
        };
        let chain = written
            .with_context(|| format!("append to layer {}", self.ident.disk_id))
            .map_err(AppendError::Unchanged)?;
        let seq = self.point.seq;
        let block = first + blocks;
        self.point = LogPoint { segment: self.point.segment, block, seq: seq + 1, chain };
        if let Some(group) = &mut self.group {
            group.entries += 1;
            group.payload_blocks += blocks;
        }
        self.dirty = true;
        Ok(Appended { place, seq, segment: self.begun.take() })
    }

    fn place(&self, block: u32) -> Result<u32> {
        let place = self.ident.place(self.point.segment, block);
        u32::try_from(place).ok().filter(|place| *place < u32::MAX - self.ident.segment_blocks).ok_or_else(
            || {
                Error::new(
                    ErrorKind::NoSpace,
                    format!("append to layer {}: its log is full", self.ident.disk_id),
                )
                .hint("take a snapshot of the volume, and remove it: it goes on on a new layer, whose log takes 16 TiB again")
            },
        )
    }

    fn entry(&self, record: &Record<'_>, first: u32, chain: u32) -> ([u8; ENTRY_LEN], u32) {
        let kind = match record.payload {
            Some((_, payload_crc)) => EntryKind::Data { block: first, payload_crc },
            None => EntryKind::Zero,
        };
        let entry = Entry {
            chain,
            seq: self.point.seq,
            offset_bytes: record.offset_bytes,
            length_bytes: record.length_bytes,
            kind,
        };
        entry.encode()
    }

    /// The record and its group's index in one write.
    fn write_first(
        &mut self,
        segment: &DataFile,
        record: &Record<'_>,
        first: u32,
        durable_seq: u64,
    ) -> io::Result<u32> {
        let block = self.point.block;
        let head = GroupHead {
            chain: self.point.chain,
            first_seq: self.point.seq,
            salt: self.ident.salt,
            epoch: self.ident.epoch,
            durable_seq,
            block,
        };
        let (head, chain) = head.encode();
        let (entry, chain) = self.entry(record, first, chain);
        self.index[..ENTRY_LEN].copy_from_slice(&head);
        self.index[ENTRY_LEN..2 * ENTRY_LEN].copy_from_slice(&entry);
        let payload = record.payload.map(|(payload, _)| payload).unwrap_or_default();
        let offset = u64::from(block) * BLOCK_BYTES;
        let mut on_stack = [IoSlice::new(&[]); SLICES_ON_STACK];
        match on_stack.get_mut(..=payload.len()) {
            Some(all) => {
                all[0] = IoSlice::new(self.index.as_slice());
                all[1..].copy_from_slice(payload);
                segment.write(offset, all)?;
            }
            None => {
                let mut all = vec![IoSlice::new(self.index.as_slice())];
                all.extend_from_slice(payload);
                segment.write(offset, &all)?;
            }
        }
        self.group = Some(Group { block, entries: 1, payload_blocks: 0 });
        Ok(chain)
    }

    /// The payload, then the entry that makes it count.
    fn write_more(&mut self, segment: &DataFile, record: &Record<'_>, first: u32) -> io::Result<u32> {
        let Some(group) = &self.group else { return Err(io::ErrorKind::InvalidInput.into()) };
        if let Some((payload, _)) = record.payload {
            segment.write(u64::from(first) * BLOCK_BYTES, payload)?;
        }
        let (entry, chain) = self.entry(record, first, self.point.chain);
        let slot = u64::from(group.block) * BLOCK_BYTES + (group.entries * ENTRY_LEN) as u64;
        segment.write(slot, &[IoSlice::new(&entry)])?;
        Ok(chain)
    }

    /// Sees to it that a record of `blocks` fits into the open group, or into a new one in the segment at hand.
    fn make_room(&mut self, dir: &Dir, blocks: u32) -> Result<(), AppendError> {
        let fits = |free_from: u32| {
            free_from.checked_add(blocks).is_some_and(|end| end <= self.ident.segment_blocks)
        };
        if let Some(group) = &self.group {
            let small = u64::from(group.payload_blocks) * BLOCK_BYTES < GROUP_PAYLOAD_BYTES;
            if group.entries < INDEX_ENTRIES - 1 && small && fits(self.point.block) {
                return Ok(());
            }
            self.group = None;
        }
        if self.segment.is_some() && fits(self.point.block + 1) {
            return Ok(());
        }
        if let Some(full) = &self.segment {
            // A segment is durable before the next one exists: recovery looks for a torn end in the last one only.
            let what = || format!("sync layer {}", self.ident.disk_id);
            full.sync().with_context(what).map_err(AppendError::Lost)?;
            self.dirty = false;
        }
        let number = if self.segment.is_some() { self.point.segment + 1 } else { self.point.segment };
        let file = self.begin_segment(dir, number).map_err(AppendError::Unchanged)?;
        self.segment = Some(Arc::clone(&file));
        self.begun = Some(file);
        self.point = LogPoint { segment: number, block: 1, ..self.point };
        Ok(())
    }

    fn begin_segment(&self, dir: &Dir, number: u32) -> Result<Arc<DataFile>> {
        let what = || format!("begin segment {number} of layer {}", self.ident.disk_id);
        let file = dir.create(&segment_name(number)).with_context(what)?;
        let head = SegmentHead {
            disk_id: self.ident.disk_id,
            salt: self.ident.salt,
            segment: number,
            first_seq: self.point.seq,
            chain: self.point.chain,
            session: self.ident.session,
            epoch: self.ident.epoch,
        };
        file.write(0, &[IoSlice::new(head.encode().as_slice())]).with_context(what)?;
        dir.sync()?;
        Ok(Arc::new(file))
    }
}

/// The file of a segment.
pub(super) fn segment_name(number: u32) -> String {
    format!("segment.{number:08x}")
}
