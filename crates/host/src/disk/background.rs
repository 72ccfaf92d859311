//! What a layer does beside its user's requests: it saves its map, and frees the space of what was overwritten.
//!
//! ```text
//!   flush ── enough appended? ─► thread: checkpoint
//!         └─ enough appended? ─► thread: count what is live ─► engine::disk::reclaim::choose ─► one piece, rest, again
//!
//!   punch:  records that are dead ─► flush (what replaced them is durable) ─► holes
//!   move:   live blocks appended once more ─► nothing of the segment is live
//!   drop:   zeros that it says appended once more ─► checkpoint ─► header: replay begins behind it ─► file removed
//! ```
//!
//! Readers hold no lock while they read. A dropped file stays readable through their handle; for punched holes
//! [`Reclaim::punches`] counts: whoever finds it changed after a read looks the block up again, and finds where it is
//! now.
//!
//! Invariants
//! * What is left of the log still says everything that the map says, so a move can read it.
//! * A payload is destroyed only after whatever replaced it is durable, and never one that the log's replay verifies.
//! * The `data_id` stays; no reader sees a difference.
//! * At most a quarter of the time goes into it, and no write waits for more than one record of it.
//! * While somebody reads the log itself (a move, a check) nothing is destroyed: [`Layer::hold_reclaim`].
//!
//! Not here: what is freed next (`engine::disk::reclaim`), the checkpoint's bytes (`checkpoint`).

use std::collections::HashMap;
use std::io::{IoSlice, IoSliceMut};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use whimbrel_engine::disk::extent_map::Piece;
use whimbrel_engine::disk::reclaim::{self, SegmentUse, Work};
use whimbrel_wire::record::layer::{
    BLOCK_BYTES, BLOCK_LEN, EntryKind, INDEX_ENTRIES, PAYLOAD_BYTES_MAX, Run, RunKind,
};

use super::append::{Record, segment_name};
use super::files::DataFile;
use super::layer::{CLOSED, Layer};
use super::recover::{live_blocks, read_group, segment_start};
use super::{checkpoint, slices};
use crate::block_dev::BlockDev as _;
use crate::error::{Context as _, Result};

/// Records after which a flush starts a checkpoint in the background.
const CHECKPOINT_RECORDS: u64 = 1 << 20;
/// Runs of the map looked at under one hold of its lock.
const DUMP_RUNS: usize = 4096;
/// Blocks punched out, or moved, between two rests.
const STEP_BLOCKS: u64 = 1024;
/// After each piece of work, so many times its length is rested.
const REST_TIMES: u32 = 3;
/// A segment is not dropped if its zeros take more than one part in so many of it.
const ZEROS_SHARE: usize = 4;
/// The longest rest.
const REST_MAX: Duration = Duration::from_millis(500);

/// The state of reclaiming, beside the layer's.
#[derive(Debug)]
pub(super) struct Reclaim {
    /// Whether this handle does it at all: it is the only one that writes, and reads, the layer.
    pub(super) enabled: AtomicBool,
    /// Raised before holes are punched.
    pub(super) punches: AtomicU64,
    /// Held while something is destroyed; taken by a reader whom `punches` kept from finishing.
    pub(super) punching: Mutex<()>,
    /// Less dead space than this in a segment is left alone; smaller in tests.
    pub(super) piece_blocks: AtomicU32,
    holds: AtomicU32,
    running: AtomicBool,
    /// Place of the log's end at the last look, blocks; and what the log took on disk then.
    looked_at: Mutex<(u64, u64)>,
    live_at_punch: Mutex<HashMap<u32, u32>>,
}

impl Default for Reclaim {
    fn default() -> Self {
        Self {
            enabled: AtomicBool::new(false),
            punches: AtomicU64::new(0),
            punching: Mutex::default(),
            piece_blocks: AtomicU32::new(reclaim::PIECE_BLOCKS),
            holds: AtomicU32::new(0),
            running: AtomicBool::new(false),
            looked_at: Mutex::default(),
            live_at_punch: Mutex::default(),
        }
    }
}

/// Nothing of the log is destroyed while it exists.
#[derive(Debug)]
#[must_use]
pub struct ReclaimHold(Arc<Layer>);

impl Drop for ReclaimHold {
    fn drop(&mut self) {
        self.0.reclaim.holds.fetch_sub(1, Ordering::AcqRel);
    }
}

/// What one look at a layer freed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Reclaimed {
    /// Blocks of records that were punched out.
    pub punched_blocks: u64,
    /// Blocks that were appended once more.
    pub moved_blocks: u64,
    /// Segments that were removed.
    pub dropped_segments: u32,
}

impl Layer {
    /// Saves the map, so that the next open replays only what comes after. Does nothing if that is under way.
    pub fn checkpoint(&self) -> Result<()> {
        let Some(_alone) = self.checkpointing.try_lock() else { return Ok(()) };
        if self.gate() == CLOSED {
            return Ok(());
        }
        self.checkpoint_alone()
    }

    pub(super) fn checkpoint_alone(&self) -> Result<()> {
        if self.checkpoint_seq.load(Ordering::Acquire) == self.appended_seq.load(Ordering::Acquire) {
            return Ok(());
        }
        self.checkpoint_from(false)
    }

    /// `dropping`: segments below the checkpoint's place may be absent from here on.
    fn checkpoint_from(&self, dropping: bool) -> Result<()> {
        let covers = self.log.lock().end();
        let (number, first) = {
            let header = self.header.lock();
            (header.get().checkpoint.map_or(0, |last| last.number + 1), header.get().first_segment)
        };
        let first = if dropping { covers.segment } else { first };
        let dump = |from: u64, runs: &mut Vec<Run>| self.view.read().map.runs(from, DUMP_RUNS, runs);
        let written = checkpoint::write(&self.dir, number, covers, first > 0, dump);
        let saved = written.inspect_err(|_| {
            for name in checkpoint::names(number) {
                let _ = self.dir.remove(&name);
            }
        })?;
        // The dump may hold records that came after `covers`; they must be as durable as it.
        self.flush()?;
        self.update_header(|header| {
            header.checkpoint = Some(saved);
            header.first_segment = first;
        })?;
        self.checkpoint_seq.store(covers.seq - 1, Ordering::Release);
        checkpoint::sweep(&self.dir, Some(number))
    }

    /// Starts a checkpoint, or a look for space, on a thread of its own if enough was appended since the last one.
    pub(super) fn work_if_due(&self) {
        let since = self.durable_seq.load(Ordering::Acquire) - self.checkpoint_seq.load(Ordering::Acquire);
        if since >= CHECKPOINT_RECORDS && !self.checkpointing.is_locked() {
            self.spawn("layer-checkpoint", |layer| {
                if let Err(problem) = layer.checkpoint() {
                    tracing::warn!(%problem, "layer: checkpoint failed; opening it will take longer");
                }
            });
        }
        if self.reclaim.enabled.load(Ordering::Acquire)
            && self.reclaim_is_due()
            && !self.reclaim.running.swap(true, Ordering::AcqRel)
        {
            let began = self.spawn("layer-reclaim", |layer| {
                if let Err(problem) = layer.reclaim() {
                    tracing::warn!(%problem, "layer: space of what was overwritten is not freed");
                }
                layer.reclaim.running.store(false, Ordering::Release);
            });
            if !began {
                self.reclaim.running.store(false, Ordering::Release);
            }
        }
    }

    fn spawn(&self, name: &str, work: impl FnOnce(Arc<Self>) + Send + 'static) -> bool {
        let Some(layer) = self.weak.upgrade() else { return false };
        let thread = std::thread::Builder::new().name(name.to_owned()).spawn(move || work(layer));
        if let Err(problem) = &thread {
            tracing::warn!(%problem, name, "layer: no thread for work in the background");
        }
        thread.is_ok()
    }

    /// Place of the log's end, blocks.
    fn end_place(&self) -> u64 {
        let end = self.log.lock().point();
        self.ident.place(end.segment, end.block)
    }

    fn reclaim_is_due(&self) -> bool {
        let Some(looked_at) = self.reclaim.looked_at.try_lock() else { return false };
        let (place, disk_blocks) = *looked_at;
        drop(looked_at);
        reclaim::due(self.end_place().saturating_sub(place), disk_blocks)
    }

    /// Keeps everything of the log in its place for as long as the answer lives.
    pub fn hold_reclaim(self: &Arc<Self>) -> ReclaimHold {
        self.reclaim.holds.fetch_add(1, Ordering::AcqRel);
        // Whoever is destroying something now ends first.
        drop(self.reclaim.punching.lock());
        ReclaimHold(Arc::clone(self))
    }

    fn may_destroy(&self) -> bool {
        self.reclaim.holds.load(Ordering::Acquire) == 0 && self.is_writable()
    }

    /// Frees space of what was overwritten until nothing more is worth it, resting in between.
    pub fn reclaim(&self) -> Result<Reclaimed> {
        let mut total = Reclaimed::default();
        while self.may_destroy() {
            *self.reclaim.looked_at.lock() = (self.end_place(), self.disk_blocks());
            let looking = Instant::now();
            let (uses, tail) = self.segment_uses();
            // A look walks the whole map.
            rest(looking);
            let Some(work) = reclaim::choose(&uses, tail, self.reclaim.piece_blocks.load(Ordering::Relaxed))
            else {
                break;
            };
            let done = match work {
                Work::Drop(_) => {
                    let empty: Vec<u32> = uses
                        .iter()
                        .filter(|segment| segment.segment < tail && segment.live_blocks == 0)
                        .map(|segment| segment.segment)
                        .collect();
                    self.drop_segments(&empty)?
                }
                Work::Punch(segment) => {
                    let live =
                        uses.iter().find(|other| other.segment == segment).map_or(0, |s| s.live_blocks);
                    let done = self.punch_segment(segment)?;
                    self.reclaim.live_at_punch.lock().insert(segment, live);
                    done
                }
                Work::Move(segment) => self.move_segment(segment)?,
            };
            total.punched_blocks += done.punched_blocks;
            total.moved_blocks += done.moved_blocks;
            total.dropped_segments += done.dropped_segments;
            tracing::debug!(layer = %self.ident.disk_id, ?work, ?done, "space of what was overwritten");
            if done == Reclaimed::default() && !matches!(work, Work::Punch(_)) {
                break;
            }
        }
        Ok(total)
    }

    fn segment(&self, number: u32) -> Option<Arc<DataFile>> {
        self.view.read().segments.get(&number).cloned()
    }

    fn disk_blocks(&self) -> u64 {
        let segments = self.view.read().segments.clone();
        segments.values().filter_map(|file| file.disk_bytes().ok()).sum::<u64>() / BLOCK_BYTES
    }

    /// How much of each segment is live, and the segment that was being appended to before they were counted.
    fn segment_uses(&self) -> (Vec<SegmentUse>, u32) {
        let tail = self.log.lock().point().segment;
        let segments = self.view.read().segments.clone();
        let mut live: HashMap<u32, u32> = HashMap::new();
        let (mut from, mut runs) = (Some(0), Vec::new());
        while let Some(block) = from {
            runs.clear();
            from = self.view.read().map.runs(block, DUMP_RUNS, &mut runs);
            for run in &runs {
                for (segment, _, _, blocks) in self.by_segment(*run) {
                    *live.entry(segment).or_default() += blocks;
                }
            }
        }
        let punched = self.reclaim.live_at_punch.lock();
        let uses = segments.iter().filter_map(|(number, file)| {
            let disk_bytes = file.disk_bytes().ok()?;
            let disk_blocks = u32::try_from(disk_bytes / BLOCK_BYTES).unwrap_or(u32::MAX);
            let mut live_blocks = live.get(number).copied().unwrap_or(0);
            if live_blocks == 0 && *number < tail {
                // Its records of zeros would have to be appended again, in so many blocks of index.
                let zeros = self.live_zeros(*number, file).ok()?.len().div_ceil(INDEX_ENTRIES - 1);
                if zeros * ZEROS_SHARE > disk_blocks as usize {
                    live_blocks = disk_blocks;
                }
            }
            Some(SegmentUse {
                segment: *number,
                live_blocks,
                disk_blocks,
                live_at_punch: punched.get(number).copied(),
            })
        });
        (uses.collect(), tail)
    }

    /// The parts of a run by segment: segment, first block of the disk, block in the segment, blocks. A run of places
    /// that happen to go on may cross from one segment to the next.
    fn by_segment(&self, run: Run) -> Vec<(u32, u64, u32, u32)> {
        let RunKind::Data(place) = run.kind else { return Vec::new() };
        let size = self.ident.segment_blocks;
        let (mut parts, mut done) = (Vec::new(), 0);
        while done < run.blocks {
            let at = place.saturating_add(done);
            let blocks = (size - at % size).min(run.blocks - done);
            parts.push((at / size, run.start + u64::from(done), at % size, blocks));
            done += blocks;
        }
        parts
    }

    /// Punches out the payloads of a segment's records of which nothing is live.
    fn punch_segment(&self, number: u32) -> Result<Reclaimed> {
        let Some(file) = self.segment(number) else { return Ok(Reclaimed::default()) };
        let dead = self.dead_records(number, &file)?;
        // What replaced them is durable, and the records that say so, before anything goes.
        self.flush()?;
        let mut done = Reclaimed::default();
        let mut ranges = dead.into_iter().peekable();
        while ranges.peek().is_some() {
            let started = Instant::now();
            {
                let _punching = self.reclaim.punching.lock();
                if !self.may_destroy() {
                    break;
                }
                self.reclaim.punches.fetch_add(1, Ordering::SeqCst);
                let mut blocks = 0;
                while let Some((block, length)) = ranges.next_if(|_| blocks < STEP_BLOCKS) {
                    let (offset, bytes) = (u64::from(block) * BLOCK_BYTES, u64::from(length) * BLOCK_BYTES);
                    match file.punch(offset, bytes) {
                        Ok(()) => blocks += u64::from(length),
                        // A file system that has no holes keeps everything; moving and dropping frees it there.
                        Err(error) if error.raw_os_error() == Some(libc::EOPNOTSUPP) => return Ok(done),
                        Err(error) => {
                            return Err(error)
                                .with_context(|| format!("free space of layer {}", self.ident.disk_id));
                        }
                    }
                }
                done.punched_blocks += blocks;
            }
            rest(started);
        }
        Ok(done)
    }

    /// Payloads (first block, blocks) of the records of which nothing is live, neighbours joined. Only of those that a
    /// durable group says were durable: replay believes them without a look at the payload.
    fn dead_records(&self, number: u32, file: &DataFile) -> Result<Vec<(u32, u32)>> {
        let header = self.header.lock().get().clone();
        let durable_now = self.durable_seq.load(Ordering::Acquire);
        let (mut records, mut believed) = (Vec::new(), 0);
        let mut at = segment_start(file, number)?;
        while let Some(group) = read_group(file, &header, at)? {
            if group.head.first_seq <= durable_now {
                believed = believed.max(group.head.durable_seq);
            }
            for entry in group.entries {
                if let EntryKind::Data { block, .. } = entry.kind
                    && live_blocks(&self.view.read().map, &header, number, &entry) == 0
                {
                    records.push((entry.seq, block, entry.payload_blocks()));
                }
            }
            at = group.next;
        }
        // Every record of a segment that another one follows was durable when that one was begun. Its head must become
        // durable too, which the flush before holes are punched sees to once it has a record.
        if self.view.read().segments.range(number.saturating_add(1)..).next().is_some() {
            believed = u64::MAX;
        }
        let mut dead: Vec<(u32, u32)> = Vec::new();
        for (_, block, blocks) in records.into_iter().filter(|(seq, _, _)| *seq <= believed) {
            match dead.last_mut() {
                Some((first, length)) if *first + *length == block && u64::from(*length) < STEP_BLOCKS => {
                    *length += blocks;
                }
                _ => dead.push((block, blocks)),
            }
        }
        Ok(dead)
    }

    /// Appends what is live in a segment once more.
    fn move_segment(&self, number: u32) -> Result<Reclaimed> {
        let Some(file) = self.segment(number) else { return Ok(Reclaimed::default()) };
        let mut done = Reclaimed::default();
        let (mut from, mut runs) = (Some(0), Vec::new());
        while let Some(start) = from {
            runs.clear();
            from = self.view.read().map.runs(start, DUMP_RUNS, &mut runs);
            let parts: Vec<_> = runs.iter().flat_map(|run| self.by_segment(*run)).collect();
            let mut began = (Instant::now(), 0);
            for (_, block, place, blocks) in parts.into_iter().filter(|(segment, ..)| *segment == number) {
                let moved = self.move_run(number, &file, (block, place, blocks))?;
                done.moved_blocks += moved;
                began.1 += moved;
                if began.1 >= STEP_BLOCKS {
                    rest(began.0);
                    began = (Instant::now(), 0);
                }
            }
        }
        Ok(done)
    }

    /// Appends those blocks of a run that still are where they were.
    fn move_run(&self, number: u32, file: &DataFile, (block, place, blocks): (u64, u32, u32)) -> Result<u64> {
        let what = || format!("free space of layer {}", self.ident.disk_id);
        let step = (PAYLOAD_BYTES_MAX / BLOCK_BYTES) as u32;
        let (mut done, mut moved) = (0, 0);
        while done < blocks {
            let length = step.min(blocks - done);
            let mut bytes = vec![0; length as usize * BLOCK_LEN];
            let from = u64::from(place + done) * BLOCK_BYTES;
            file.read(from, &mut [IoSliceMut::new(&mut bytes)]).with_context(what)?;
            let mut log = self.log_for_copy()?;
            let (first, base) = (block + u64::from(done), number * self.ident.segment_blocks + place + done);
            let mut at = 0;
            while at < u64::from(length) {
                let (piece, run) = self.view.read().map.lookup(first + at, u64::from(length) - at);
                if piece == Piece::Data(base.saturating_add(at as u32)) {
                    let range = (at * BLOCK_BYTES) as usize..((at + run) * BLOCK_BYTES) as usize;
                    let payload = [IoSlice::new(bytes.get(range).unwrap_or_default())];
                    let record = Record {
                        offset_bytes: (first + at) * BLOCK_BYTES,
                        length_bytes: run * BLOCK_BYTES,
                        payload: Some((&payload, slices::crc(&payload))),
                    };
                    self.append(&mut log, &record)?;
                    moved += run;
                }
                at += run;
            }
            done += length;
        }
        Ok(moved)
    }

    /// Ranges (first block, blocks) that a segment's records say are zeros, and that still are.
    fn live_zeros(&self, number: u32, file: &DataFile) -> Result<Vec<(u64, u64)>> {
        let header = self.header.lock().get().clone();
        let mut zeros = Vec::new();
        let mut at = segment_start(file, number)?;
        while let Some(group) = read_group(file, &header, at)? {
            for entry in group.entries.iter().filter(|entry| entry.kind == EntryKind::Zero) {
                let first = entry.offset_bytes / BLOCK_BYTES;
                self.zeros_in(first, first + entry.length_bytes / BLOCK_BYTES, &mut zeros);
            }
            at = group.next;
        }
        zeros.sort_unstable();
        let mut merged: Vec<(u64, u64)> = Vec::new();
        for (first, blocks) in zeros {
            match merged.last_mut() {
                Some(last) if first <= last.0 + last.1 => last.1 = last.1.max(first + blocks - last.0),
                _ => merged.push((first, blocks)),
            }
        }
        Ok(merged)
    }

    fn zeros_in(&self, from: u64, to: u64, into: &mut Vec<(u64, u64)>) {
        let view = self.view.read();
        let (mut block, to) = (from, to.min(view.map.blocks()));
        while block < to {
            let (piece, blocks) = view.map.lookup(block, to - block);
            if piece == Piece::Zero {
                into.push((block, blocks));
            }
            block += blocks;
        }
    }

    /// Appends once more what a segment says of zeros.
    fn keep_zeros(&self, number: u32) -> Result<()> {
        let Some(file) = self.segment(number) else { return Ok(()) };
        for (first, blocks) in self.live_zeros(number, &file)? {
            let mut log = self.log_for_copy()?;
            let mut still = Vec::new();
            self.zeros_in(first, first + blocks, &mut still);
            for (first, blocks) in still {
                self.append_zeros(&mut log, first, blocks)?;
            }
        }
        Ok(())
    }

    /// Removes segments of which nothing is live: first the header says that replay does not need them.
    fn drop_segments(&self, numbers: &[u32]) -> Result<Reclaimed> {
        let _alone = self.checkpointing.lock();
        if self.gate() == CLOSED {
            return Ok(Reclaimed::default());
        }
        for number in numbers {
            self.keep_zeros(*number)?;
        }
        self.checkpoint_from(true)?;
        let mut done = Reclaimed::default();
        let _punching = self.reclaim.punching.lock();
        if !self.may_destroy() {
            return Ok(done);
        }
        for number in numbers {
            let slot = self.view.write().segments.remove(number);
            if slot.is_some() {
                self.dir
                    .remove(&segment_name(*number))
                    .with_context(|| format!("remove segment {number} of layer {}", self.ident.disk_id))?;
                self.reclaim.live_at_punch.lock().remove(number);
                done.dropped_segments += 1;
            }
        }
        Ok(done)
    }
}

/// After work since `began`, leaves the disk to others for longer than that took.
fn rest(began: Instant) {
    std::thread::sleep((began.elapsed() * REST_TIMES).min(REST_MAX));
}
