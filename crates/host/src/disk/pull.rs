//! A layer used here while its blocks are still at another host (`--disk on-demand`).
//!
//! ```text
//!            ┌ mapped here ───────────► this layer's log          (written here, or pulled)
//!   read ────┤ named in pull.map ─────► RemoteLayer::fetch        (and pulled next, with its neighbours)
//!            └ neither ───────────────► the image, or zeros
//!
//!   step(): for each range in pull.map that is not mapped here: fetch, append where still absent; at the end
//!           flush, header Ready, pull.map removed: the chain is local
//! ```
//!
//! Invariants
//! * What is pulled is exactly what the log's map says, so a restart goes on where the last durable record was.
//! * A block that the guest wrote here is never replaced by the source's.
//! * The source's layer is fenced and does not change.
//!
//! Not here: how bytes are fetched (the caller's [`RemoteLayer`]), when steps are made (the caller's loop).

use std::collections::VecDeque;
use std::io::{IoSlice, IoSliceMut};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use parking_lot::{Mutex, RwLock};
use whimbrel_engine::disk::extent_map::Piece;
use whimbrel_wire::Epoch;
use whimbrel_wire::record::layer::{BLOCK_BYTES, Run, RunKind, State, runs};

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
/// Ranges are fetched in portions of this length.
const PORTION_BLOCKS: u64 = 256;
/// Portions that readers asked for and that wait to be pulled; more are pulled in order.
const DEMANDED_MAX: usize = 64;

/// The layer at the host that it came from.
pub trait RemoteLayer: Send + Sync {
    /// Fills `into` with the bytes at `offset` of the disk, waiting for the other host.
    fn fetch(&self, offset: u64, into: &mut [u8]) -> Result<()>;
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
            runs: RwLock::new(runs.into()),
            remote,
            below,
            demanded: Mutex::default(),
        });
        layer.set_base(Some(Arc::clone(&base) as Arc<dyn BlockRead>));
        Ok(Self { layer, base, cursor: Mutex::new((0, 0)), fetched_bytes: AtomicU64::new(0) })
    }

    /// The layer; it stays the same handle when the pull is done.
    pub fn layer(&self) -> &Arc<Layer> {
        &self.layer
    }

    /// Fetches about `bytes_max` more, what readers wait for first. Called again until done; an error (the source does
    /// not answer) leaves everything as it was, and the call is repeated.
    pub fn step(&self, bytes_max: u64) -> Result<PullProgress> {
        let mut fetched = 0;
        loop {
            let runs = Arc::clone(&self.base.runs.read());
            let total =
                |runs: &[Run]| runs.iter().map(|run| u64::from(run.blocks) * BLOCK_BYTES).sum::<u64>();
            let mut cursor = self.cursor.lock();
            let Some((run, at)) = runs.get(cursor.0).map(|run| (*run, run.start + cursor.1)) else {
                self.finish()?;
                return Ok(PullProgress { total_bytes: total(&runs), left_bytes: 0, done: true });
            };
            if fetched >= bytes_max {
                let in_order = total(runs.get(cursor.0..).unwrap_or_default()) - cursor.1 * BLOCK_BYTES;
                let total_bytes = total(&runs);
                let not_fetched = total_bytes.saturating_sub(self.fetched_bytes.load(Ordering::Relaxed));
                return Ok(PullProgress { total_bytes, left_bytes: in_order.min(not_fetched), done: false });
            }
            let demanded = self.base.demanded.lock().front().copied();
            if let Some(portion) = demanded {
                drop(cursor);
                for run in overlapping(&runs, portion, portion + PORTION_BLOCKS) {
                    let (from, to) = (run.start.max(portion), run.end().min(portion + PORTION_BLOCKS));
                    fetched += self.fetch(from, to)?;
                }
                self.base.demanded.lock().retain(|other| *other != portion);
                continue;
            }
            let to = run.end().min((at / PORTION_BLOCKS + 1) * PORTION_BLOCKS);
            fetched += self.fetch(at, to)?;
            *cursor = if to == run.end() { (cursor.0 + 1, 0) } else { (cursor.0, to - run.start) };
        }
    }

    /// Fetches what is still absent in a range of blocks; gives the bytes fetched.
    fn fetch(&self, from: u64, to: u64) -> Result<u64> {
        let mut fetched = 0;
        let mut block = from;
        while block < to {
            let (piece, blocks) = self.layer.view.read().map.lookup(block, to - block);
            if piece == Piece::Absent {
                let offset = block * BLOCK_BYTES;
                let mut bytes = vec![0; (blocks * BLOCK_BYTES) as usize];
                let inside = (self.base.size_bytes - offset).min(bytes.len() as u64) as usize;
                let into = bytes.get_mut(..inside).unwrap_or_default();
                self.base.remote.fetch(offset, into)?;
                self.put_absent(block, &bytes)?;
                fetched += blocks * BLOCK_BYTES;
                self.fetched_bytes.fetch_add(blocks * BLOCK_BYTES, Ordering::Relaxed);
            }
            block += blocks;
        }
        Ok(fetched)
    }

    /// Appends those of the blocks from `first` on that nobody wrote meanwhile.
    fn put_absent(&self, first: u64, bytes: &[u8]) -> Result<()> {
        let end = first + bytes.len() as u64 / BLOCK_BYTES;
        let mut log = self.layer.log_for_copy()?;
        let mut block = first;
        while block < end {
            let (piece, blocks) = self.layer.view.read().map.lookup(block, end - block);
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
        *self.base.runs.write() = Arc::new([]);
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

/// What lies under a layer while it is pulled: the source's layer where it has something, the image elsewhere.
struct PullBase {
    size_bytes: u64,
    /// Empty once everything is here.
    runs: RwLock<Arc<[Run]>>,
    remote: Arc<dyn RemoteLayer>,
    below: Option<Arc<dyn BlockRead>>,
    /// First blocks of portions that readers asked for.
    demanded: Mutex<VecDeque<u64>>,
}

impl PullBase {
    /// The length of the run of one kind at `offset`, at most `length_max`, and whether it is remote.
    fn piece(&self, offset: u64, length_max: u64) -> (u64, bool) {
        let runs = self.runs.read();
        let next = overlapping(&runs, offset / BLOCK_BYTES, u64::MAX).next();
        match next {
            Some(run) if run.start * BLOCK_BYTES <= offset => {
                ((run.end() * BLOCK_BYTES - offset).min(length_max), true)
            }
            Some(run) => ((run.start * BLOCK_BYTES - offset).min(length_max), false),
            None => (length_max, false),
        }
    }

    fn read_remote(&self, offset: u64, length: u64, into: &mut [IoSliceMut<'_>], skip: u64) -> Result<bool> {
        let mut bytes = vec![0; length as usize];
        self.remote.fetch(offset, &mut bytes)?;
        let mut demanded = self.demanded.lock();
        let portion = offset / BLOCK_BYTES / PORTION_BLOCKS * PORTION_BLOCKS;
        if demanded.len() < DEMANDED_MAX && !demanded.contains(&portion) {
            demanded.push_back(portion);
        }
        drop(demanded);
        slices::window(into, skip, length, |part, at| {
            let mut at = at as usize;
            for slice in part {
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
            let whole = match (remote, now) {
                (true, true) => false,
                (true, false) => self.read_remote(offset + done, piece, into, done)?,
                (false, _) => slices::window(into, done, piece, |part, at| {
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
