//! A layer on its way out: its log, in order, while it is being written.
//!
//! ```text
//!   ship_from ─► read_ship ─► read_ship … ─► (VM paused) ─► ship_end ─► read_ship until reached ─► seal
//! ```
//!
//! Of each record only what is still alive is sent: what a later record replaced is sent with that one. So the first
//! pass over a long log costs about what the disk holds, and the tail costs what was written since.
//!
//! Invariants: reading changes nothing but where the next group begins. A position stays good across restarts of
//! either side; the source keeps nothing per receiver.
//!
//! Not here: the chunk's bytes (`wire::record::layer::ship`), the receiving side (`receive`).

use std::io::IoSliceMut;
use std::sync::Arc;

use serde::{Deserialize, Serialize};
use whimbrel_engine::disk::extent_map::Piece;
use whimbrel_wire::record::layer::ship::ChunkBuilder;
use whimbrel_wire::record::layer::{
    BLOCK_BYTES, Entry, EntryKind, Header, LogPoint, Run, RunKind, ShipPosition, runs,
};
use whimbrel_wire::{DataId, Epoch};

use super::files::DataFile;
use super::layer::Layer;
use super::recover::{Group, read_group, segment_start};
use crate::block_dev::BlockDev;
use crate::error::{Context, Error, ErrorKind, Result};

/// Groups looked at in one call, alive or not.
const GROUPS_MAX: usize = 4096;

/// The end of a paused layer's log.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ShipEnd {
    /// Where the log ends.
    pub at: LogPoint,
    /// What its readers see.
    pub data_id: DataId,
    /// The epoch of its last writer.
    pub epoch: Epoch,
}

impl ShipEnd {
    /// Whether everything up to the end was read.
    pub fn reached(&self, position: &ShipPosition) -> bool {
        position.at.seq >= self.at.seq
    }

    /// What the receiver must have arrived at, given the position that the last chunk led to.
    pub fn seal(&self, position: ShipPosition) -> ShipSeal {
        ShipSeal { position, data_id: self.data_id, epoch: self.epoch }
    }
}

/// What a received layer must be to be whole.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ShipSeal {
    /// Where the source's log ends, and the hash of all chunks.
    pub position: ShipPosition,
    /// What its readers see.
    pub data_id: DataId,
    /// The epoch of its last writer; the layer opens at a later one.
    pub epoch: Epoch,
}

impl Layer {
    /// Where shipping begins.
    pub fn ship_from(&self) -> ShipPosition {
        ShipPosition::START
    }

    /// At most this much of the log is left to ship, bytes.
    pub fn ship_left_bytes(&self, from: &ShipPosition) -> u64 {
        let place = |at: LogPoint| self.ident.place(at.segment, at.block);
        place(self.log.lock().point()).saturating_sub(place(from.at)) * BLOCK_BYTES
    }

    /// The next chunk after `from`, and the position after it. The chunk is empty, and the position the same, if
    /// nothing was written since. It may be up to 2 MiB longer than `bytes_max`.
    pub fn read_ship(&self, from: &ShipPosition, bytes_max: usize) -> Result<(Vec<u8>, ShipPosition)> {
        let end = self.log.lock().end();
        let header = self.header.lock().get().clone();
        if from.at.seq >= end.seq {
            return Ok((Vec::new(), *from));
        }
        let mut chunk = ChunkBuilder::with_capacity(bytes_max.min(8 << 20));
        let mut at = from.at;
        let mut payload = Vec::new();
        for _ in 0..GROUPS_MAX {
            if at.seq >= end.seq || chunk.len() >= bytes_max {
                break;
            }
            let (file, group) = self.next_group(&header, &mut at, end)?;
            for entry in &group.entries {
                self.ship_entry(&file, at.segment, entry, &mut payload, &mut chunk)?;
            }
            at = group.next;
        }
        let bytes = chunk.finish(self.ident.disk_id, from.at, at);
        let next = from.after(&bytes, at);
        Ok((bytes, next))
    }

    /// The group at `at`, which moves on to the next segment where one ends.
    fn next_group(
        &self,
        header: &Header,
        at: &mut LogPoint,
        end: LogPoint,
    ) -> Result<(Arc<DataFile>, Group)> {
        let what = || format!("ship layer {}", header.disk_id);
        let lost = |why: &str| Error::new(ErrorKind::Corrupt, format!("{}: {why}", what()));
        loop {
            let (file, following) = {
                let view = self.view.read();
                let after = view.segments.range(at.segment.saturating_add(1)..).next();
                (
                    view.segments.get(&at.segment).cloned(),
                    after.map(|(number, file)| (*number, Arc::clone(file))),
                )
            };
            // Records that a dead session left torn at the end of its segment do not count.
            let next = match following {
                Some((number, next)) if at.segment < end.segment => {
                    Some(segment_start(&next, number).with_context(what)?)
                }
                _ => None,
            };
            // What was live in segments that were freed stands further on.
            let gap = next.filter(|next| next.segment > at.segment + 1 || file.is_none());
            let Some(file) = file else {
                *at = gap.ok_or_else(|| lost("a segment is missing"))?;
                continue;
            };
            if let Some(mut group) = read_group(&file, header, *at)? {
                if let Some(next) = next.filter(|next| next.seq < group.next.seq) {
                    group.entries.retain(|entry| entry.seq < next.seq);
                    group.next = next;
                }
                if !group.entries.is_empty() {
                    return Ok((file, group));
                }
            }
            match next {
                Some(next) if next.seq == at.seq => *at = next,
                Some(next) if gap.is_some() && next.seq > at.seq => *at = next,
                _ => return Err(lost(&format!("record {} is damaged or gone", at.seq))),
            }
        }
    }

    /// Adds what is alive of a record.
    fn ship_entry(
        &self,
        file: &DataFile,
        segment: u32,
        entry: &Entry,
        payload: &mut Vec<u8>,
        chunk: &mut ChunkBuilder,
    ) -> Result<()> {
        let what = || format!("ship record {} of layer {}", entry.seq, self.ident.disk_id);
        let first = entry.offset_bytes / BLOCK_BYTES;
        let blocks = entry.length_bytes / BLOCK_BYTES;
        let (mut done, mut loaded) = (0, false);
        while done < blocks {
            let (piece, length) = self.view.read().map.lookup(first + done, blocks - done);
            let offset = (first + done) * BLOCK_BYTES;
            match entry.kind {
                EntryKind::Zero if piece == Piece::Zero => chunk.zero(offset, length * BLOCK_BYTES),
                EntryKind::Data { block, payload_crc } => {
                    let place = self.ident.place(segment, block) + done;
                    if piece == u32::try_from(place).map_or(Piece::Absent, Piece::Data) {
                        if !loaded {
                            payload.resize(entry.length_bytes as usize, 0);
                            let from = u64::from(block) * BLOCK_BYTES;
                            file.read(from, &mut [IoSliceMut::new(payload)]).with_context(what)?;
                            if crc32c::crc32c(payload) != payload_crc {
                                return Err(Error::new(
                                    ErrorKind::Corrupt,
                                    format!("{}: checksum differs", what()),
                                ));
                            }
                            loaded = true;
                        }
                        let range = (done * BLOCK_BYTES) as usize..((done + length) * BLOCK_BYTES) as usize;
                        chunk.data(offset, payload.get(range).unwrap_or_default());
                    }
                }
                EntryKind::Zero => {}
            }
            done += length;
        }
        Ok(())
    }

    /// Flushes the layer and says where its log ends. Called after the last write: with the VM paused, its I/O
    /// cancelled or done.
    pub fn ship_end(&self) -> Result<ShipEnd> {
        self.flush()?;
        let at = self.log.lock().end();
        let header = self.header.lock();
        Ok(ShipEnd { at, data_id: header.get().data_id, epoch: header.get().epoch })
    }

    /// Which ranges this layer holds, for a host that will pull them ([`super::Pull`]). Called after [`Layer::ship_end`].
    pub fn pull_map(&self) -> Vec<u8> {
        let view = self.view.read();
        let mut all = Vec::new();
        let mut from = Some(0);
        while let Some(block) = from {
            let mut some = Vec::new();
            from = view.map.runs(block, usize::MAX, &mut some);
            all.append(&mut some);
        }
        drop(view);
        // Where a payload is here means nothing there; without it neighbours become one run.
        let mut merged: Vec<Run> = Vec::new();
        for run in all {
            let kind = if run.kind == RunKind::Zero { RunKind::Zero } else { RunKind::Data(0) };
            match merged.last_mut() {
                Some(last) if last.kind == kind && last.end() == run.start => {
                    match last.blocks.checked_add(run.blocks) {
                        Some(blocks) => last.blocks = blocks,
                        None => merged.push(Run { kind, ..run }),
                    }
                }
                _ => merged.push(Run { kind, ..run }),
            }
        }
        runs::encode(merged)
    }
}
