//! A layer used here while its blocks are still at another host (`--disk on-demand`).
//!
//! ```text
//!            ┌ mapped here ───────────► this layer's log          (written here, or pulled)
//!   read ────┤ named in pull.map ─────► RemoteLayer::fetch        (and pulled next, with its neighbours)
//!            └ neither ───────────────► the image, or zeros
//!
//!   step(): for ranges in pull.map that are not mapped here: fetch, append where still absent; at the end
//!           flush, header Ready, pull.map removed: the chain is local
//! ```
//!
//! A reader whose block cannot be fetched waits, and looks again: the block may come by a step, or the source may
//! answer again. It gives up only where waiting cannot help: the source's disk is damaged, or nobody wants the
//! answer any more ([`Pull::stop_waiting`]).
//!
//! Invariants
//! * What is pulled is exactly what the log's map says, so a restart goes on where the last durable record was.
//! * A block that the guest wrote here is never replaced by the source's.
//! * A block that is here is read here, also by a reader who looked before it came: the source may be gone by then.
//! * The source's layer is fenced and does not change.
//! * A flush that returned here is durable here; what was not written here was durable at the source before the
//!   first read.
//!
//! Not here: how bytes are fetched (the caller's [`RemoteLayer`]), when steps are made (the caller's loop).

use std::collections::VecDeque;
use std::io::{IoSlice, IoSliceMut};
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Weak};
use std::time::Duration;

use parking_lot::{Condvar, Mutex};
use whimbrel_engine::disk::extent_map::Piece;
use whimbrel_wire::Epoch;
use whimbrel_wire::record::layer::{BLOCK_BYTES, PAYLOAD_BYTES_MAX, Run, RunKind, State, runs};

use super::append::Record;
use super::files::Dir;
use super::header_file::HeaderFile;
use super::layer::Layer;
use super::slices;
use super::spec::LayerSpec;
use crate::block_dev::{BlockDev, BlockRead, Extent};
use crate::error::{Context, Error, ErrorKind, Result};

/// The file that says which ranges another host has.
pub(super) const MAP_NAME: &str = "pull.map";
/// Around what a reader asked for, a portion of this length is pulled next.
const PORTION_BLOCKS: u64 = 256;
/// Of the rest, at most so many blocks are fetched at once …
const FETCH_BLOCKS: u64 = 2048;
/// … in at most so many pieces.
const FETCH_PIECES: usize = 2048;
/// Portions that readers asked for and that wait to be pulled; more are pulled in order.
const DEMANDED_MAX: usize = 64;
/// A reader whose block could not be fetched tries again after this long.
const READ_AGAIN: Duration = Duration::from_millis(200);

/// A range of the disk, bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FetchRange {
    /// Where it starts.
    pub offset: u64,
    /// How long it is.
    pub length: u64,
}

/// Who waits for what is fetched.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Urgency {
    /// A reader.
    Demand,
    /// Nobody yet.
    Ahead,
}

/// The layer at the host that it came from.
pub trait RemoteLayer: Send + Sync {
    /// Fills `into` with the bytes of `ranges`, one after another. Tries once, within a limit.
    fn fetch(&self, ranges: &[FetchRange], into: &mut [u8], urgency: Urgency) -> Result<()>;
}

/// How far a pull is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PullProgress {
    /// Bytes that all ranges have together.
    pub total_bytes: u64,
    /// At most this much is still to be fetched, bytes.
    pub left_bytes: u64,
    /// Everything is here, durably: the source may forget the layer.
    pub done: bool,
}

/// See the module's charter.
pub struct Pull {
    layer: Arc<Layer>,
    base: Arc<PullBase>,
    /// Index of the first run, and block in it, that the pull in order has not looked at.
    cursor: Mutex<(usize, u64)>,
    /// Fetched since this was opened, bytes.
    fetched_bytes: AtomicU64,
}

impl std::fmt::Debug for Pull {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Pull").field("layer", &self.layer).finish_non_exhaustive()
    }
}

impl Pull {
    /// Makes the directory `path` for a layer whose blocks are at another host. `spec` is the source's
    /// ([`Layer::spec`], after [`Layer::ship_end`]), `map` its [`Layer::pull_map`].
    pub fn create(path: &Path, spec: &LayerSpec, map: &[u8]) -> Result<()> {
        Self::create_in(&Dir::new(path), spec, map)
    }

    pub(super) fn create_in(dir: &Dir, spec: &LayerSpec, map: &[u8]) -> Result<()> {
        let what = || format!("prepare to pull layer {}", spec.disk_id);
        let all = runs::decode(map).map_err(Error::from).with_context(what)?;
        let blocks = spec.size_bytes.div_ceil(BLOCK_BYTES);
        if all.iter().any(|run| run.end() > blocks) {
            return Err(Error::new(ErrorKind::Corrupt, format!("{}: a range outside the disk", what())));
        }
        let data = all.iter().copied().filter(|run| run.kind != RunKind::Zero);
        let bytes = runs::encode(data);
        let header = spec.header(State::Pulling)?;
        dir.make(|dir| {
            HeaderFile::create(dir, &header)?;
            let file = dir.create(MAP_NAME).with_context(what)?;
            file.write(0, &[IoSlice::new(&bytes)]).with_context(what)?;
            file.sync().with_context(what)
        })?;
        // Zeros need no fetching.
        if all.iter().all(|run| run.kind != RunKind::Zero) {
            return Ok(());
        }
        let layer = Layer::open_in(dir, None, spec.epoch, true, |_| Ok(()))?;
        let mut log = layer.log_for_copy()?;
        for run in all.iter().filter(|run| run.kind == RunKind::Zero) {
            let (offset_bytes, length_bytes) = (run.start * BLOCK_BYTES, u64::from(run.blocks) * BLOCK_BYTES);
            layer.append(&mut log, &Record { offset_bytes, length_bytes, payload: None })?;
        }
        drop(log);
        layer.close()
    }

    /// Opens the layer for writing while it is pulled, over `below` (the image, or `None`: zeros).
    pub fn open(
        path: &Path,
        below: Option<Arc<dyn BlockRead>>,
        remote: Arc<dyn RemoteLayer>,
        epoch: Epoch,
    ) -> Result<Self> {
        Self::open_in(&Dir::new(path), below, remote, epoch)
    }

    pub(super) fn open_in(
        dir: &Dir,
        below: Option<Arc<dyn BlockRead>>,
        remote: Arc<dyn RemoteLayer>,
        epoch: Epoch,
    ) -> Result<Self> {
        let layer = Layer::open_in(dir, None, epoch, true, |header| match header.state {
            State::Pulling => Ok(()),
            _ => Err(Error::new(
                ErrorKind::AlreadyExists,
                format!("pull layer {}: it is all here", header.disk_id),
            )),
        })?;
        let what = || format!("read {}", dir.path().join(MAP_NAME).display());
        let bytes = dir.read(MAP_NAME).with_context(what)?;
        let runs = runs::decode(&bytes).map_err(Error::from).with_context(what)?;
        let base = Arc::new(PullBase {
            size_bytes: layer.size_bytes(),
            layer: Arc::downgrade(&layer),
            runs,
            remote,
            below,
            demanded: Mutex::default(),
            may_wait: Mutex::new(true),
            stopped: Condvar::new(),
        });
        layer.set_base(Some(Arc::clone(&base) as Arc<dyn BlockRead>));
        Ok(Self { layer, base, cursor: Mutex::new((0, 0)), fetched_bytes: AtomicU64::new(0) })
    }

    /// The layer; it stays the same handle when the pull is done.
    pub fn layer(&self) -> &Arc<Layer> {
        &self.layer
    }

    /// How far it is.
    pub fn progress(&self) -> PullProgress {
        let runs = &self.base.runs;
        let total = |runs: &[Run]| runs.iter().map(|run| u64::from(run.blocks) * BLOCK_BYTES).sum::<u64>();
        let cursor = *self.cursor.lock();
        let total_bytes = total(runs);
        let in_order = total(runs.get(cursor.0..).unwrap_or_default()) - cursor.1 * BLOCK_BYTES;
        let not_fetched = total_bytes.saturating_sub(self.fetched_bytes.load(Ordering::Relaxed));
        PullProgress { total_bytes, left_bytes: in_order.min(not_fetched), done: false }
    }

    /// Readers of blocks that cannot be fetched fail from here on, and those that wait do so now: nobody wants their
    /// answer any more. Fetching goes on.
    pub fn stop_waiting(&self) {
        *self.base.may_wait.lock() = false;
        self.base.stopped.notify_all();
    }

    /// Readers wait again.
    pub fn wait_again(&self) {
        *self.base.may_wait.lock() = true;
    }

    /// Fetches about `bytes_max` more, what readers wait for first. Called again until done; an error (the source does
    /// not answer) leaves everything as it was, and the call is repeated.
    pub fn step(&self, bytes_max: u64) -> Result<PullProgress> {
        let mut fetched = 0;
        while fetched < bytes_max {
            let demanded = self.base.demanded.lock().front().copied();
            if let Some(portion) = demanded {
                let mut pieces = Vec::new();
                for run in overlapping(&self.base.runs, portion, portion + PORTION_BLOCKS) {
                    let (from, to) = (run.start.max(portion), run.end().min(portion + PORTION_BLOCKS));
                    self.absent(from, to, &mut pieces);
                }
                fetched += self.fetch(&pieces)?;
                self.base.demanded.lock().retain(|other| *other != portion);
                continue;
            }
            // Held throughout: whoever else makes a step waits.
            let mut cursor = self.cursor.lock();
            let blocks_max = (bytes_max - fetched).div_ceil(BLOCK_BYTES).min(FETCH_BLOCKS);
            let (pieces, next) = self.gather(*cursor, blocks_max);
            fetched += self.fetch(&pieces)?;
            *cursor = next;
            if next.0 >= self.base.runs.len() {
                drop(cursor);
                self.finish()?;
                return Ok(PullProgress { left_bytes: 0, done: true, ..self.progress() });
            }
        }
        Ok(self.progress())
    }

    /// The next absent pieces in order from `cursor` on, and where to go on after them.
    fn gather(&self, mut cursor: (usize, u64), blocks_max: u64) -> (Vec<(u64, u64)>, (usize, u64)) {
        let (mut pieces, mut blocks) = (Vec::new(), 0);
        while let Some(run) = self.base.runs.get(cursor.0) {
            let from = run.start + cursor.1;
            let to = run.end().min(from + (blocks_max - blocks));
            let before = pieces.len();
            self.absent(from, to, &mut pieces);
            blocks += pieces.iter().skip(before).map(|(_, blocks)| blocks).sum::<u64>();
            cursor = if to == run.end() { (cursor.0 + 1, 0) } else { (cursor.0, to - run.start) };
            if blocks >= blocks_max || pieces.len() >= FETCH_PIECES {
                break;
            }
        }
        (pieces, cursor)
    }

    /// Adds the pieces (first block, blocks) of a range that are absent here.
    fn absent(&self, from: u64, to: u64, pieces: &mut Vec<(u64, u64)>) {
        let view = self.layer.view.read();
        let mut block = from;
        while block < to {
            let (piece, blocks) = view.map.lookup(block, to - block);
            if piece == Piece::Absent {
                pieces.push((block, blocks));
            }
            block += blocks;
        }
    }

    /// Fetches pieces and keeps what is still absent of them; gives the bytes fetched.
    fn fetch(&self, pieces: &[(u64, u64)]) -> Result<u64> {
        let total: u64 = pieces.iter().map(|(_, blocks)| blocks * BLOCK_BYTES).sum();
        if total == 0 {
            return Ok(0);
        }
        // The last block of the disk may be short; the rest of it is zeros.
        let inside = |first: u64, blocks: u64| {
            let offset = first * BLOCK_BYTES;
            FetchRange { offset, length: (self.base.size_bytes - offset).min(blocks * BLOCK_BYTES) }
        };
        let ranges: Vec<FetchRange> = pieces.iter().map(|(first, blocks)| inside(*first, *blocks)).collect();
        let mut bytes = vec![0; total as usize];
        let wanted = ranges.iter().map(|range| range.length).sum::<u64>() as usize;
        let into = bytes.get_mut(..wanted).unwrap_or_default();
        self.base.remote.fetch(&ranges, into, Urgency::Ahead)?;
        let mut at = 0;
        // Pieces are in order, so only the last one can be short.
        for (first, blocks) in pieces {
            let length = (blocks * BLOCK_BYTES) as usize;
            self.put_absent(*first, bytes.get(at..at + length).unwrap_or_default())?;
            at += length;
        }
        self.fetched_bytes.fetch_add(total, Ordering::Relaxed);
        Ok(total)
    }

    /// Appends those of the blocks from `first` on that nobody wrote meanwhile.
    fn put_absent(&self, first: u64, bytes: &[u8]) -> Result<()> {
        let end = first + bytes.len() as u64 / BLOCK_BYTES;
        let mut log = self.layer.log_for_copy()?;
        let mut block = first;
        while block < end {
            let most = (end - block).min(PAYLOAD_BYTES_MAX / BLOCK_BYTES);
            let (piece, blocks) = self.layer.view.read().map.lookup(block, most);
            if piece == Piece::Absent {
                let range = ((block - first) * BLOCK_BYTES) as usize
                    ..((block - first + blocks) * BLOCK_BYTES) as usize;
                let payload = [IoSlice::new(bytes.get(range).unwrap_or_default())];
                let record = Record {
                    offset_bytes: block * BLOCK_BYTES,
                    length_bytes: blocks * BLOCK_BYTES,
                    payload: Some((&payload, slices::crc(&payload))),
                };
                self.layer.append(&mut log, &record)?;
            }
            block += blocks;
        }
        Ok(())
    }

    /// Everything is here: durable first, then the header says so, then nothing asks the source any more.
    fn finish(&self) -> Result<()> {
        self.layer.flush()?;
        self.layer.update_header(|header| header.state = State::Ready)?;
        self.layer.set_base(self.base.below.clone());
        self.layer.reclaim.enabled.store(true, Ordering::Release);
        if self.layer.dir.has(MAP_NAME) {
            self.layer.dir.remove(MAP_NAME).context("remove pull.map")?;
        }
        Ok(())
    }
}

/// The runs that have blocks in `from..to`.
fn overlapping(runs: &[Run], from: u64, to: u64) -> impl Iterator<Item = Run> + '_ {
    let first = runs.partition_point(|run| run.end() <= from);
    runs.get(first..).unwrap_or_default().iter().copied().take_while(move |run| run.start < to)
}

fn gone() -> Error {
    Error::new(ErrorKind::Internal, "read a layer that is pulled: nobody has it open any more")
}

/// What lies under a layer while it is pulled: the source's layer where it has something, the image elsewhere.
struct PullBase {
    size_bytes: u64,
    /// The layer above: what it has by now is read there.
    layer: Weak<Layer>,
    runs: Vec<Run>,
    remote: Arc<dyn RemoteLayer>,
    below: Option<Arc<dyn BlockRead>>,
    /// First blocks of portions that readers asked for.
    demanded: Mutex<VecDeque<u64>>,
    /// Whether readers wait for a source that does not answer.
    may_wait: Mutex<bool>,
    stopped: Condvar,
}

impl PullBase {
    /// The length of the run of one kind at `offset`, at most `length_max`, and whether it is remote.
    fn piece(&self, offset: u64, length_max: u64) -> (u64, bool) {
        let next = overlapping(&self.runs, offset / BLOCK_BYTES, u64::MAX).next();
        match next {
            Some(run) if run.start * BLOCK_BYTES <= offset => {
                ((run.end() * BLOCK_BYTES - offset).min(length_max), true)
            }
            Some(run) => ((run.start * BLOCK_BYTES - offset).min(length_max), false),
            None => (length_max, false),
        }
    }

    /// Reads a range that the source had something for; `now`: gives up where it still is there only. A range that
    /// is here in part is read by parts.
    fn read_run(&self, range: FetchRange, into: &mut [IoSliceMut<'_>], skip: u64, now: bool) -> Result<bool> {
        let end = range.offset + range.length;
        let mut at = range.offset;
        while at < end {
            let block = at / BLOCK_BYTES;
            let layer = self.layer.upgrade().ok_or_else(gone)?;
            let (piece, blocks) = layer.view.read().map.lookup(block, end.div_ceil(BLOCK_BYTES) - block);
            let part = FetchRange { offset: at, length: ((block + blocks) * BLOCK_BYTES).min(end) - at };
            let skip = skip + (at - range.offset);
            let done = match piece {
                Piece::Absent if now => false,
                Piece::Absent => self.read_remote(part, into, skip)?,
                Piece::Zero | Piece::Data(_) => slices::window(into, skip, part.length, |some, from| {
                    layer.read_pieces(part.offset + from, slices::length_mut(some), some, now)
                })?,
            };
            match done {
                true => at += part.length,
                false if now => return Ok(false),
                // It could not be fetched: look again, it may be here by now.
                false => {}
            }
        }
        Ok(true)
    }

    /// Reads from the source. `false`: it could not be fetched, and a while has passed.
    fn read_remote(&self, part: FetchRange, into: &mut [IoSliceMut<'_>], skip: u64) -> Result<bool> {
        let mut bytes = vec![0; part.length as usize];
        if let Err(error) = self.remote.fetch(&[part], &mut bytes, Urgency::Demand) {
            // Damage is not mended by waiting.
            if matches!(error.kind(), ErrorKind::Corrupt | ErrorKind::Io) {
                return Err(error);
            }
            tracing::debug!(%error, offset = part.offset, "a reader waits for a block of another host");
            let mut may_wait = self.may_wait.lock();
            if *may_wait {
                self.stopped.wait_for(&mut may_wait, READ_AGAIN);
            }
            return if *may_wait { Ok(false) } else { Err(error) };
        }
        let mut demanded = self.demanded.lock();
        let portion = part.offset / BLOCK_BYTES / PORTION_BLOCKS * PORTION_BLOCKS;
        if demanded.len() < DEMANDED_MAX && !demanded.contains(&portion) {
            demanded.push_back(portion);
        }
        drop(demanded);
        slices::window(into, skip, part.length, |some, at| {
            let mut at = at as usize;
            for slice in some {
                let length = slice.len();
                slice.copy_from_slice(bytes.get(at..at + length).unwrap_or_default());
                at += length;
            }
            Ok(true)
        })
    }

    fn read_below(&self, offset: u64, into: &mut [IoSliceMut<'_>], now: bool) -> Result<bool> {
        let length = slices::length_mut(into);
        let Some(below) = &self.below else {
            slices::zero(into);
            return Ok(true);
        };
        let inside = below.size_bytes().saturating_sub(offset).min(length);
        let done = slices::window(into, 0, inside, |part, at| {
            if now { below.read_now(offset + at, part) } else { below.read(offset + at, part).map(|()| true) }
        })?;
        Ok(done
            && slices::window(into, inside, length - inside, |part, _| {
                slices::zero(part);
                Ok(true)
            })?)
    }

    fn read_any(&self, offset: u64, into: &mut [IoSliceMut<'_>], now: bool) -> Result<bool> {
        let length = slices::length_mut(into);
        let mut done = 0;
        while done < length {
            let (piece, remote) = self.piece(offset + done, length - done);
            let whole = match remote {
                true => {
                    self.read_run(FetchRange { offset: offset + done, length: piece }, into, done, now)?
                }
                false => slices::window(into, done, piece, |part, at| {
                    self.read_below(offset + done + at, part, now)
                })?,
            };
            if !whole {
                return Ok(false);
            }
            done += piece;
        }
        Ok(true)
    }
}

impl BlockRead for PullBase {
    fn size_bytes(&self) -> u64 {
        self.size_bytes
    }

    fn read(&self, offset: u64, into: &mut [IoSliceMut<'_>]) -> Result<()> {
        self.read_any(offset, into, false).map(|_| ())
    }

    fn read_now(&self, offset: u64, into: &mut [IoSliceMut<'_>]) -> Result<bool> {
        self.read_any(offset, into, true)
    }

    fn extent(&self, offset: u64) -> Result<Extent> {
        let (length, remote) = self.piece(offset, self.size_bytes.saturating_sub(offset));
        match &self.below {
            _ if remote => Ok(Extent { length, data: true }),
            Some(below) if offset < below.size_bytes() => {
                let below = below.extent(offset)?;
                Ok(Extent { length: below.length.min(length), data: below.data })
            }
            _ => Ok(Extent { length, data: false }),
        }
    }
}
