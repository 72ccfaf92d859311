//! What a layer does for its neighbours in a chain: it is sealed so that others can lie on it, and takes over blocks.
//!
//! ```text
//!   Open ── settle_id ─► (a child is made over that content) ── seal ─► Sealed: read by its children, written by nobody
//!   copy_from(neighbour): up, where this layer has nothing; down, over whatever it has
//! ```
//!
//! Invariants: sealing loses nothing that was written, and what was written is durable when it returns. Copying up
//! changes nothing that a reader of this layer sees, so the `data_id` stays.
//!
//! Not here: in which order a merge does this (`engine::disk::merge`, `merge`), who lies on whom (`chain`).

use std::io::{IoSlice, IoSliceMut};
use std::sync::Arc;

use whimbrel_engine::disk::extent_map::Piece;
use whimbrel_wire::DataId;
use whimbrel_wire::record::layer::{BLOCK_BYTES, PAYLOAD_BYTES_MAX, Run, RunKind, State};

use super::append::Record;
use super::files::Dir;
use super::layer::{CLOSED, Layer};
use super::slices;
use crate::block_dev::{BlockDev, BlockRead};
use crate::error::{Error, ErrorKind, Result};

/// Runs of the neighbour's map looked at in one step.
const STEP_RUNS: usize = 256;
/// Pieces put into the log under one hold of it, so that a writer never waits for long.
const HOLD_PIECES: usize = 64;

/// Which blocks of a neighbour are taken over.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Take {
    /// Those that this layer has nothing for: the neighbour lies under it.
    Absent,
    /// All: the neighbour lies on it.
    All,
}

impl Layer {
    /// The identity of what readers see, and sees to it that it stays for as long as this handle writes: a child made
    /// over it is not outdated by the next write.
    pub fn settle_id(&self) -> Result<DataId> {
        self.ready_to_write()?;
        Ok(self.header.lock().get().data_id)
    }

    /// Saves the map, after whoever does so already. What is written from here on until [`Layer::seal`] is replayed at
    /// the next open.
    pub fn checkpoint_before_seal(&self) -> Result<()> {
        let _alone = self.checkpointing.lock();
        self.checkpoint_alone()
    }

    /// Ends writing for good, durably: other layers may lie on this one. The handle goes on reading.
    pub fn seal(&self) -> Result<()> {
        self.shut(CLOSED);
        self.flush()?;
        let end = self.log.lock().end();
        self.update_header(|header| {
            header.clean_end = Some(end);
            header.state = State::Sealed;
        })?;
        self.header.lock().release();
        Ok(())
    }

    /// Opens a sealed layer to have a neighbour's blocks copied into it. Its `data_id` has been changed by the caller.
    pub(super) fn open_for_merge(dir: &Dir) -> Result<Arc<Self>> {
        Self::open_with(dir, None, None, true, |header| match header.state {
            State::Sealed => Ok(()),
            _ => Err(Error::new(
                ErrorKind::Refused,
                format!("merge into layer {}: it is not sealed", header.disk_id),
            )),
        })
    }

    /// Copies what `from` holds, from block `at` on, about `bytes_max` of it; gives the block to go on from, or `None`
    /// at the end. What was copied is not durable before a flush.
    pub(super) fn copy_from(&self, from: &Self, take: Take, at: u64, bytes_max: u64) -> Result<Option<u64>> {
        let mut runs = Vec::new();
        let next = from.view.read().map.runs(at, STEP_RUNS, &mut runs);
        let mut copied = 0;
        for run in runs {
            match run.kind {
                RunKind::Zero => self.take_zeros(run, take)?,
                RunKind::Data(_) => {
                    let mut block = run.start;
                    while block < run.end() {
                        if copied >= bytes_max {
                            return Ok(Some(block));
                        }
                        let blocks = (run.end() - block).min(PAYLOAD_BYTES_MAX / BLOCK_BYTES);
                        copied += self.take_data(from, block, blocks, take)?;
                        block += blocks;
                    }
                }
            }
        }
        Ok(next)
    }

    /// The pieces (first block, blocks) of a range that are wanted here, at most so many, and where the look ended.
    fn wanted(&self, from: u64, to: u64, take: Take) -> (Vec<(u64, u64)>, u64) {
        if take == Take::All {
            return (vec![(from, to - from)], to);
        }
        let (view, mut pieces, mut block) = (self.view.read(), Vec::new(), from);
        while block < to && pieces.len() < HOLD_PIECES {
            let (piece, blocks) = view.map.lookup(block, to - block);
            if piece == Piece::Absent {
                pieces.push((block, blocks));
            }
            block += blocks;
        }
        (pieces, block)
    }

    fn take_zeros(&self, run: Run, take: Take) -> Result<()> {
        let mut block = run.start;
        while block < run.end() {
            let mut log = self.log_for_copy()?;
            let (pieces, next) = self.wanted(block, run.end(), take);
            for (first, blocks) in pieces {
                self.append_zeros(&mut log, first, blocks)?;
            }
            block = next;
        }
        Ok(())
    }

    /// Copies data blocks; gives the bytes that were read for it.
    fn take_data(&self, from: &Self, first: u64, blocks: u64, take: Take) -> Result<u64> {
        let end = first + blocks;
        if self.wanted(first, end, take).0.is_empty() {
            return Ok(0);
        }
        // The neighbour does not change, so it is read without holding the log.
        let mut bytes = vec![0; (blocks * BLOCK_BYTES) as usize];
        let offset = first * BLOCK_BYTES;
        let inside = (from.size_bytes() - offset).min(bytes.len() as u64);
        let into = bytes.get_mut(..inside as usize).unwrap_or_default();
        from.read_pieces(offset, inside, &mut [IoSliceMut::new(into)], false)?;
        let mut block = first;
        while block < end {
            let mut log = self.log_for_copy()?;
            let (pieces, next) = self.wanted(block, end, take);
            for (piece, length) in pieces {
                let range = ((piece - first) * BLOCK_BYTES) as usize
                    ..((piece - first + length) * BLOCK_BYTES) as usize;
                let payload = [IoSlice::new(bytes.get(range).unwrap_or_default())];
                let record = Record {
                    offset_bytes: piece * BLOCK_BYTES,
                    length_bytes: length * BLOCK_BYTES,
                    payload: Some((&payload, slices::crc(&payload))),
                };
                self.append(&mut log, &record)?;
            }
            block = next;
        }
        Ok(blocks * BLOCK_BYTES)
    }

    /// Bytes of the disk that this layer holds data for.
    pub fn data_bytes(&self) -> u64 {
        let (mut from, mut blocks, mut runs) = (Some(0), 0, Vec::new());
        while let Some(block) = from {
            runs.clear();
            from = self.view.read().map.runs(block, STEP_RUNS, &mut runs);
            let data = runs.iter().filter(|run| run.kind != RunKind::Zero);
            blocks += data.map(|run| u64::from(run.blocks)).sum::<u64>();
        }
        blocks * BLOCK_BYTES
    }
}
