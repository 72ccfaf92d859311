//! A layer: the writable part of a volume, open on this host.
//!
//! ```text
//!   create ─► open(read-only) ─────────────────────────► ReadOnly
//!        └──► open(writable) ─► Clean ─ first write ──► Open ─ fence(epoch) ─► Fenced
//!                                or growth (new data_id)   │ └── close() ──────► Closed
//!                                                        └ fdatasync failed ─► Broken
//! ```
//!
//! Locks, in this order: `sync` (who syncs), `header`, `log` (the end of the log), `view` (map and segments; held for
//! a look-up or an insertion, never during I/O).
//!
//! Not here: bytes on disk (`append`, `recover`, `wire::record::layer`), shipping (`ship`, `receive`, `pull`).

use std::collections::BTreeMap;
use std::io::{IoSlice, IoSliceMut};
use std::path::Path;
use std::sync::atomic::{AtomicU8, AtomicU64, Ordering};
use std::sync::{Arc, Weak};

use parking_lot::{Condvar, Mutex, RwLock};
use uuid::Uuid;
use whimbrel_engine::disk::extent_map::{ExtentMap, Piece};
use whimbrel_engine::disk::identity;
use whimbrel_wire::peer::migrate::LayerHead;
use whimbrel_wire::record::layer::{BLOCK_BYTES, BLOCK_LEN, Header, PAYLOAD_BYTES_MAX, State};
use whimbrel_wire::{DataId, Epoch};

use super::append::{AppendError, Appended, Ident, Log, Record};
use super::background::Reclaim;
use super::files::{DataFile, Dir, sync_dir};
use super::header_file::{HeaderFile, UpdateError};
use super::recover;
use super::slices;
use super::spec::{LayerInfo, LayerSpec};
use crate::block_dev::{BlockDev, BlockRead, Extent};
use crate::error::{Context, Error, ErrorKind, Result};

/// Pieces of the map looked at under one hold of its lock when a caller asks for an extent.
const EXTENT_PIECES: u32 = 1024;

/// A reader looks a block up so often before it keeps holes from being punched.
const READ_TRIES: u32 = 3;

const CLEAN: u8 = 0;
pub(super) const OPEN: u8 = 1;
const FENCED: u8 = 2;
const BROKEN: u8 = 3;
const READ_ONLY: u8 = 4;
pub(super) const CLOSED: u8 = 5;

/// What readers need.
#[derive(Debug)]
pub(super) struct View {
    pub(super) map: ExtentMap,
    /// By number; those that were freed are missing.
    pub(super) segments: BTreeMap<u32, Arc<DataFile>>,
}

/// See the module's charter.
pub struct Layer {
    pub(super) weak: Weak<Self>,
    pub(super) dir: Dir,
    pub(super) ident: Ident,
    /// Rises only, after the header and the map have (`grow`).
    pub(super) size_bytes: AtomicU64,
    base: RwLock<Option<Arc<dyn BlockRead>>>,
    gate: AtomicU8,
    pub(super) view: RwLock<View>,
    pub(super) log: Mutex<Log>,
    pub(super) header: Mutex<HeaderFile>,
    pub(super) appended_seq: AtomicU64,
    pub(super) durable_seq: AtomicU64,
    syncing: Mutex<bool>,
    synced: Condvar,
    pub(super) checkpoint_seq: AtomicU64,
    pub(super) checkpointing: Mutex<()>,
    pub(super) reclaim: Reclaim,
}

impl std::fmt::Debug for Layer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Layer")
            .field("ident", &self.ident)
            .field("size_bytes", &self.size_bytes)
            .finish_non_exhaustive()
    }
}

/// Removes a layer that nobody has open for writing.
pub fn remove(path: &Path) -> Result<()> {
    let dir = Dir::new(path);
    let lock = dir.lock()?;
    std::fs::remove_dir_all(path).with_context(|| format!("remove layer {}", path.display()))?;
    drop(lock);
    path.parent().map_or(Ok(()), sync_dir)
}

impl Layer {
    /// Makes a layer in the new directory `path`; nothing is open afterwards.
    pub fn create(path: &Path, spec: &LayerSpec) -> Result<()> {
        Self::create_in(&Dir::new(path), spec, State::Ready)
    }

    pub(super) fn create_in(dir: &Dir, spec: &LayerSpec, state: State) -> Result<()> {
        let header = spec.header(state)?;
        dir.make(|dir| HeaderFile::create(dir, &header).map(|_| ()))
    }

    /// Opens the layer in `path` over `base` (`None`: zeros). A writable handle makes `epoch` the layer's, durably,
    /// and is the only one.
    ///
    /// `Refused`: an older epoch than the layer has seen, another writable handle, a layer still being received.
    /// `Corrupt`: what was reported durable is damaged.
    pub fn open(
        path: &Path,
        base: Option<Arc<dyn BlockRead>>,
        epoch: Epoch,
        writable: bool,
    ) -> Result<Arc<Self>> {
        let layer = Self::open_in(&Dir::new(path), base, epoch, writable, |header| {
            if header.state == State::Pulling {
                return Err(Error::new(
                    ErrorKind::Refused,
                    format!("open layer {}: some of its blocks are still at another host", header.disk_id),
                ));
            }
            Ok(())
        })?;
        // Other handles, such as a merge's, have readers beside them that do not know what was freed.
        layer.reclaim.enabled.store(writable, Ordering::Release);
        Ok(layer)
    }

    pub(super) fn open_in(
        dir: &Dir,
        base: Option<Arc<dyn BlockRead>>,
        epoch: Epoch,
        writable: bool,
        check: impl FnOnce(&Header) -> Result<()>,
    ) -> Result<Arc<Self>> {
        Self::open_with(dir, base, Some(epoch), writable, check)
    }

    /// `epoch`: none for those who write what nobody else may: the receiver of a layer, a merge.
    pub(super) fn open_with(
        dir: &Dir,
        base: Option<Arc<dyn BlockRead>>,
        epoch: Option<Epoch>,
        writable: bool,
        check: impl FnOnce(&Header) -> Result<()>,
    ) -> Result<Arc<Self>> {
        let mut file = HeaderFile::open(dir, writable)?;
        check(file.get())?;
        let header = file.get();
        if let Some(epoch) = epoch {
            identity::may_open(header.disk_id, &header.state, header.epoch, epoch, writable)?;
        }
        let found = recover::recover(dir, file.get(), writable)?;
        if let Some(problem) = &found.checkpoint_problem {
            tracing::warn!(%problem, "layer: checkpoint not used, whole log replayed");
        }
        let mut gate = READ_ONLY;
        if writable {
            // What a dead process left in the page cache counts from here on, so it must be durable first.
            // Segments before the last one were durable when it was begun.
            if let Some((_, last)) = found.segments.last_key_value() {
                last.sync().with_context(|| format!("open layer {}", file.get().disk_id))?;
            }
            file.update(|header| {
                header.epoch = epoch.unwrap_or(header.epoch);
                header.session += 1;
                header.clean_end = None;
            })?;
            gate = CLEAN;
        }
        let header = file.get();
        let ident = Ident {
            disk_id: header.disk_id,
            salt: header.salt,
            epoch: header.epoch,
            session: header.session,
            segment_blocks: header.segment_blocks,
        };
        let last = found.segments.get(&found.end.segment).filter(|_| found.clean).cloned();
        let seq = found.end.seq - 1;
        let size_bytes = header.size_bytes;
        Ok(Arc::new_cyclic(|weak| Self {
            weak: weak.clone(),
            dir: dir.clone(),
            ident,
            size_bytes: AtomicU64::new(size_bytes),
            base: RwLock::new(base),
            gate: AtomicU8::new(gate),
            view: RwLock::new(View { map: found.map, segments: found.segments }),
            log: Mutex::new(Log::new(ident, found.end, last)),
            appended_seq: AtomicU64::new(seq),
            durable_seq: AtomicU64::new(seq),
            syncing: Mutex::new(false),
            synced: Condvar::new(),
            checkpoint_seq: AtomicU64::new(seq - found.replayed.min(seq)),
            checkpointing: Mutex::new(()),
            reclaim: Reclaim::default(),
            header: Mutex::new(file),
        }))
    }

    /// Opens a layer that is being received, for its receiver.
    pub(super) fn open_receiving(dir: &Dir, check: impl FnOnce(&Header) -> Result<()>) -> Result<Arc<Self>> {
        Self::open_with(dir, None, None, true, check)
    }

    /// A handle that received its records becomes an ordinary writable one.
    pub(super) fn take_over(&self, base: Option<Arc<dyn BlockRead>>, epoch: Epoch) -> Result<()> {
        let header = self.header.lock().get().clone();
        identity::may_open(header.disk_id, &header.state, header.epoch, epoch, true)?;
        self.update_header(|header| header.epoch = epoch)?;
        self.set_base(base);
        self.reclaim.enabled.store(true, Ordering::Release);
        Ok(())
    }

    /// The layer as it is now.
    pub fn info(&self) -> LayerInfo {
        let header = self.header.lock().get().clone();
        let end = self.log.lock().point();
        LayerInfo {
            disk_id: header.disk_id,
            data_id: header.data_id,
            parent: header.parent,
            size_bytes: header.size_bytes,
            epoch: header.epoch,
            state: header.state,
            end,
            durable_seq: self.durable_seq.load(Ordering::Acquire),
            log_bytes: self.ident.place(end.segment, end.block) * BLOCK_BYTES,
            map_bytes: self.view.read().map.heap_bytes() as u64,
            writable: self.is_writable(),
        }
    }

    /// Ends writing through this handle: the log is flushed, the map saved, so that the next open is quick.
    pub fn close(&self) -> Result<()> {
        let was = self.gate.load(Ordering::Acquire);
        if matches!(was, READ_ONLY | BROKEN | CLOSED) {
            return Ok(());
        }
        self.shut(CLOSED);
        self.flush()?;
        // Waits for one in the background; none begins after this.
        let _alone = self.checkpointing.lock();
        if let Err(problem) = self.checkpoint_alone() {
            tracing::warn!(%problem, "layer: closed without a checkpoint");
        }
        let end = self.log.lock().end();
        self.update_header(|header| header.clean_end = Some(end))?;
        self.header.lock().release();
        Ok(())
    }

    /// Refuses, from its return on, every write through this handle, and every later open before `epoch`. Reads and
    /// [`BlockDev::flush`] go on.
    pub fn fence(&self, epoch: Epoch) -> Result<()> {
        self.shut(FENCED);
        self.update_header(|header| header.epoch = epoch.max(header.epoch))
    }

    /// Takes a fence back: the layer stays here after all, at `epoch`, which is the one it was opened with or a newer
    /// one. The caller has read in the metadata store that the right is still its own.
    pub fn unfence(&self, epoch: Epoch) -> Result<()> {
        if epoch < self.ident.epoch {
            return Err(Error::new(
                ErrorKind::Refused,
                format!("take back layer {}: epoch {epoch} is older than its own", self.ident.disk_id),
            ));
        }
        self.update_header(|header| header.epoch = epoch)?;
        // At worst the `data_id` changes once more than needed.
        let _ = self.gate.compare_exchange(FENCED, CLEAN, Ordering::AcqRel, Ordering::Acquire);
        Ok(())
    }

    /// Whether writes through this handle are refused because the right went elsewhere.
    pub fn is_fenced(&self) -> bool {
        self.gate.load(Ordering::Acquire) == FENCED
    }

    /// What another host needs to make the same layer.
    pub fn spec(&self) -> LayerSpec {
        let header = self.header.lock();
        LayerHead::from(header.get()).into()
    }

    /// Moves the gate, with no append under way afterwards.
    pub(super) fn shut(&self, to: u8) {
        let _log = self.log.lock();
        let _ = self.gate.fetch_update(Ordering::AcqRel, Ordering::Acquire, |gate| {
            (!matches!(gate, BROKEN | READ_ONLY)).then_some(to)
        });
    }

    pub(super) fn update_header(&self, change: impl FnOnce(&mut Header)) -> Result<()> {
        let result = self.header.lock().update(change);
        if let Err(UpdateError::Unknown(_)) = &result {
            self.gate.store(BROKEN, Ordering::Release);
        }
        Ok(result?)
    }

    /// The layer below from now on.
    pub(super) fn set_base(&self, base: Option<Arc<dyn BlockRead>>) {
        *self.base.write() = base;
    }

    /// Whether this handle may write.
    pub fn is_writable(&self) -> bool {
        matches!(self.gate(), CLEAN | OPEN)
    }

    pub(super) fn gate(&self) -> u8 {
        self.gate.load(Ordering::Acquire)
    }

    pub(super) fn below(&self) -> Option<Arc<dyn BlockRead>> {
        self.base.read().clone()
    }

    fn refused(&self, gate: u8) -> Error {
        let disk_id = self.ident.disk_id;
        match gate {
            BROKEN => Error::new(
                ErrorKind::Io,
                format!(
                    "write layer {disk_id}: read-only since an error of its disk; unflushed data may be lost"
                ),
            )
            .hint("check the host's disk and log, then detach and attach the volume"),
            FENCED => Error::new(
                ErrorKind::Refused,
                format!("write layer {disk_id}: fenced, epoch {} is over", self.ident.epoch),
            ),
            CLOSED => Error::new(ErrorKind::Refused, format!("write layer {disk_id}: it is closed")),
            _ => Error::new(ErrorKind::Refused, format!("write layer {disk_id}: it was opened read-only")),
        }
    }

    /// Lets writes pass: before the first one of a session the `data_id` changes, durably.
    pub(super) fn ready_to_write(&self) -> Result<()> {
        if self.gate.load(Ordering::Acquire) == OPEN {
            return Ok(());
        }
        let mut header = self.header.lock();
        match self.gate.load(Ordering::Acquire) {
            OPEN => Ok(()),
            _ => self.change_seen(&mut header, |_| ()),
        }
    }

    /// Changes the header in a way that readers may see, durably: the `data_id` with it, unless this session has
    /// changed it already.
    pub(super) fn change_seen(&self, file: &mut HeaderFile, change: impl FnOnce(&mut Header)) -> Result<()> {
        let mut session = match self.gate.load(Ordering::Acquire) {
            CLEAN => identity::Session::Clean,
            OPEN => identity::Session::Changed,
            gate => return Err(self.refused(gate)),
        };
        let before = session.before_visible_write(DataId(Uuid::new_v4()));
        let updated = file.update(|header| {
            change(header);
            if let identity::Before::Replace(id) = before {
                header.data_id = id;
            }
        });
        match updated {
            Ok(()) => session.id_is_durable(),
            Err(UpdateError::Unchanged(error)) => return Err(error),
            Err(UpdateError::Unknown(error)) => {
                self.gate.store(BROKEN, Ordering::Release);
                return Err(error);
            }
        }
        match self.gate.compare_exchange(CLEAN, OPEN, Ordering::AcqRel, Ordering::Acquire) {
            Ok(_) | Err(OPEN) => Ok(()),
            Err(gate) => Err(self.refused(gate)),
        }
    }

    fn check_range(&self, what: &str, offset: u64, length: u64) -> Result<()> {
        let size_bytes = self.size_bytes();
        let inside = offset.checked_add(length).is_some_and(|end| end <= size_bytes);
        if inside && offset.is_multiple_of(512) && length.is_multiple_of(512) {
            return Ok(());
        }
        Err(Error::new(
            ErrorKind::InvalidInput,
            format!(
                "{what} layer {}: {length} bytes at {offset} of a disk of {size_bytes} bytes (in units of 512)",
                self.ident.disk_id
            ),
        ))
    }

    /// Appends one record and puts it into the map; the caller holds the log.
    pub(super) fn append(&self, log: &mut Log, record: &Record<'_>) -> Result<()> {
        let appended = log.append(&self.dir, record, self.durable_seq.load(Ordering::Acquire));
        let Appended { place, seq, segment } = match appended {
            Ok(appended) => appended,
            Err(AppendError::Unchanged(error)) => return Err(error),
            Err(AppendError::Lost(error)) => {
                self.gate.store(BROKEN, Ordering::Release);
                return Err(error);
            }
        };
        let piece = if record.payload.is_some() { Piece::Data(place) } else { Piece::Zero };
        let mut view = self.view.write();
        view.segments.extend(segment.map(|file| (log.point().segment, file)));
        view.map.set(record.offset_bytes / BLOCK_BYTES, record.length_bytes / BLOCK_BYTES, piece);
        drop(view);
        self.appended_seq.store(seq, Ordering::Release);
        Ok(())
    }

    /// Appends that so many blocks from `first` on are zeros; the caller holds the log.
    pub(super) fn append_zeros(&self, log: &mut Log, first: u64, blocks: u64) -> Result<()> {
        let (offset_bytes, length_bytes) = (first * BLOCK_BYTES, blocks * BLOCK_BYTES);
        self.append(log, &Record { offset_bytes, length_bytes, payload: None })
    }

    /// The log, for a handle that may write.
    fn log_for_write(&self) -> Result<parking_lot::MutexGuard<'_, Log>> {
        let log = self.log.lock();
        match self.gate.load(Ordering::Acquire) {
            OPEN => Ok(log),
            gate => Err(self.refused(gate)),
        }
    }

    /// The log, for records that change nothing a reader sees: received ones, or fetched from the source.
    pub(super) fn log_for_copy(&self) -> Result<parking_lot::MutexGuard<'_, Log>> {
        let log = self.log.lock();
        match self.gate.load(Ordering::Acquire) {
            OPEN | CLEAN => Ok(log),
            gate => Err(self.refused(gate)),
        }
    }

    /// Appends whole blocks.
    fn put_blocks(&self, offset: u64, from: &[IoSlice<'_>], length: u64) -> Result<()> {
        if length <= PAYLOAD_BYTES_MAX {
            let record = Record {
                offset_bytes: offset,
                length_bytes: length,
                payload: Some((from, slices::crc(from))),
            };
            let mut log = self.log_for_write()?;
            return self.append(&mut log, &record);
        }
        let mut done = 0;
        while done < length {
            let part_length = (length - done).min(PAYLOAD_BYTES_MAX);
            self.put_blocks(offset + done, &slices::part(from, done, part_length), part_length)?;
            done += part_length;
        }
        Ok(())
    }

    /// Writes that do not begin or end between blocks: the first and the last block are completed with what they
    /// had. `now`: `Ok(false)` if that is not on this host.
    fn put_part(&self, offset: u64, from: &[IoSlice<'_>], length: u64, now: bool) -> Result<bool> {
        let first = offset / BLOCK_BYTES;
        let end = (offset + length).div_ceil(BLOCK_BYTES);
        let mut edges = [first, end - 1].into_iter();
        let mut below = [None, None];
        for (slot, block) in below.iter_mut().zip(edges.by_ref().take(if end - first == 1 { 1 } else { 2 })) {
            // The base never changes, so it is read without any lock.
            if self.view.read().map.lookup(block, 1).0 == Piece::Absent {
                let mut bytes = Box::new([0u8; BLOCK_LEN]);
                if !self.read_base(block * BLOCK_BYTES, &mut [IoSliceMut::new(bytes.as_mut_slice())], now)? {
                    return Ok(false);
                }
                *slot = Some((block, bytes));
            }
        }
        let mut whole = vec![0u8; ((end - first) * BLOCK_BYTES) as usize];
        let mut log = self.log_for_write()?;
        for block in [first, end - 1] {
            let at = ((block - first) * BLOCK_BYTES) as usize;
            let Some(into) = whole.get_mut(at..at + BLOCK_LEN) else { continue };
            match below.iter().flatten().find(|(of, _)| *of == block) {
                // Nobody can have written it since without holding the log.
                Some((_, bytes)) if self.view.read().map.lookup(block, 1).0 == Piece::Absent => {
                    into.copy_from_slice(bytes.as_slice());
                }
                _ => {
                    let mut into = [IoSliceMut::new(into)];
                    if !self.read_pieces(block * BLOCK_BYTES, BLOCK_BYTES, &mut into, now)? {
                        return Ok(false);
                    }
                }
            }
        }
        let mut at = (offset - first * BLOCK_BYTES) as usize;
        for slice in from {
            if let Some(into) = whole.get_mut(at..at + slice.len()) {
                into.copy_from_slice(slice);
            }
            at += slice.len();
        }
        for (part, n) in whole.chunks(PAYLOAD_BYTES_MAX as usize).zip(0u64..) {
            let payload = [IoSlice::new(part)];
            let record = Record {
                offset_bytes: first * BLOCK_BYTES + n * PAYLOAD_BYTES_MAX,
                length_bytes: part.len() as u64,
                payload: Some((&payload, slices::crc(&payload))),
            };
            self.append(&mut log, &record)?;
        }
        Ok(true)
    }

    fn put(&self, offset: u64, from: &[IoSlice<'_>], now: bool) -> Result<bool> {
        let length = slices::length(from);
        self.check_range("write", offset, length)?;
        if length == 0 {
            return Ok(true);
        }
        self.ready_to_write()?;
        if offset.is_multiple_of(BLOCK_BYTES) && length.is_multiple_of(BLOCK_BYTES) {
            self.put_blocks(offset, from, length)?;
            return Ok(true);
        }
        self.put_part(offset, from, length, now)
    }

    fn put_zeroes(&self, what: &str, offset: u64, length: u64) -> Result<()> {
        const ZEROS: [u8; BLOCK_LEN] = [0; BLOCK_LEN];
        self.check_range(what, offset, length)?;
        if length == 0 || self.is_zero(offset, length) {
            return Ok(());
        }
        self.ready_to_write()?;
        let end = offset + length;
        let first_whole = offset.next_multiple_of(BLOCK_BYTES);
        // The last block of the disk may be short; what lies behind the end is nobody's.
        let last_whole = if end == self.size_bytes() { end.next_multiple_of(BLOCK_BYTES) } else { end };
        let last_whole = last_whole / BLOCK_BYTES * BLOCK_BYTES;
        let edge = |from: u64, to: u64| -> Result<()> {
            let zeros = [IoSlice::new(ZEROS.get(..(to - from) as usize).unwrap_or_default())];
            if from < to { self.put_part(from, &zeros, to - from, false).map(|_| ()) } else { Ok(()) }
        };
        edge(offset, first_whole.min(end))?;
        if first_whole < last_whole {
            let length_bytes = last_whole - first_whole;
            let mut log = self.log_for_write()?;
            self.append_zeros(&mut log, first_whole / BLOCK_BYTES, length_bytes / BLOCK_BYTES)?;
        }
        edge(last_whole.max(first_whole).min(end), end)
    }

    /// Whether nothing needs to be done for the range to read as zeros.
    fn is_zero(&self, offset: u64, length: u64) -> bool {
        let bare = self.base.read().is_none();
        let view = self.view.read();
        let (mut block, end) = (offset / BLOCK_BYTES, (offset + length).div_ceil(BLOCK_BYTES));
        while block < end {
            let (piece, blocks) = view.map.lookup(block, end - block);
            if !(piece == Piece::Zero || bare && piece == Piece::Absent) {
                return false;
            }
            block += blocks;
        }
        true
    }

    /// Reads from the layer below; zeros behind its end.
    fn read_base(&self, offset: u64, into: &mut [IoSliceMut<'_>], now: bool) -> Result<bool> {
        let base = self.base.read().clone();
        let Some(base) = base else {
            slices::zero(into);
            return Ok(true);
        };
        let length = slices::length_mut(into);
        let inside = base.size_bytes().saturating_sub(offset).min(length);
        if inside == length {
            return if now { base.read_now(offset, into) } else { base.read(offset, into).map(|()| true) };
        }
        if inside > 0 {
            let done = slices::window(into, 0, inside, |part, at| {
                if now {
                    base.read_now(offset + at, part)
                } else {
                    base.read(offset + at, part).map(|()| true)
                }
            })?;
            if !done {
                return Ok(false);
            }
        }
        slices::window(into, inside, length - inside, |part, _| {
            slices::zero(part);
            Ok(true)
        })
    }

    /// What is at `block`, for how many blocks, and the file if it is data.
    fn find(&self, block: u64, blocks_max: u64) -> (Piece, u64, Option<Arc<DataFile>>) {
        let view = self.view.read();
        let (piece, blocks) = view.map.lookup(block, blocks_max);
        let file = match piece {
            Piece::Data(place) => view.segments.get(&(place / self.ident.segment_blocks)).cloned(),
            Piece::Absent | Piece::Zero => None,
        };
        (piece, blocks, file)
    }

    pub(super) fn read_pieces(
        &self,
        offset: u64,
        length: u64,
        into: &mut [IoSliceMut<'_>],
        now: bool,
    ) -> Result<bool> {
        let end = offset + length;
        let mut at = offset;
        let mut tries = 0;
        while at < end {
            let block = at / BLOCK_BYTES;
            let punches = self.reclaim.punches.load(Ordering::SeqCst);
            // A reader whom holes overtook again and again has them wait.
            let held = (tries >= READ_TRIES).then(|| self.reclaim.punching.lock());
            let (piece, blocks, file) = self.find(block, end.div_ceil(BLOCK_BYTES) - block);
            let piece_end = ((block + blocks) * BLOCK_BYTES).min(end);
            let done = slices::window(into, at - offset, piece_end - at, |part, skip| match piece {
                Piece::Zero => {
                    slices::zero(part);
                    Ok(true)
                }
                Piece::Absent => self.read_base(at + skip, part, now),
                Piece::Data(place) => {
                    let in_segment = u64::from(place % self.ident.segment_blocks) * BLOCK_BYTES;
                    let from = in_segment + (at + skip - block * BLOCK_BYTES);
                    self.read_segment(file.as_deref(), from, part)
                }
            })?;
            let punched = self.reclaim.punches.load(Ordering::SeqCst) != punches;
            if matches!(piece, Piece::Data(_)) && held.is_none() && punched {
                // It may have been replaced, and its place freed, while it was read: look again.
                tries += 1;
                continue;
            }
            tries = 0;
            if !done {
                return Ok(false);
            }
            at = piece_end;
        }
        Ok(true)
    }

    fn read_segment(&self, file: Option<&DataFile>, from: u64, into: &mut [IoSliceMut<'_>]) -> Result<bool> {
        let what = || format!("read layer {}", self.ident.disk_id);
        let file =
            file.ok_or_else(|| Error::new(ErrorKind::Corrupt, format!("{}: a segment is missing", what())))?;
        file.read(from, into).with_context(what)?;
        Ok(true)
    }

    /// One fdatasync of whatever was appended until now.
    fn sync_now(&self) -> Result<()> {
        let (seq, file) = self.log.lock().begin_flush();
        if let Err(error) = file.map_or(Ok(()), |file| file.sync()) {
            // The kernel has dropped the pages: a second try would claim success for lost data.
            self.gate.store(BROKEN, Ordering::Release);
            return Err(error).with_context(|| format!("flush layer {}", self.ident.disk_id));
        }
        self.durable_seq.fetch_max(seq, Ordering::AcqRel);
        Ok(())
    }
}

impl BlockRead for Layer {
    fn size_bytes(&self) -> u64 {
        self.size_bytes.load(Ordering::Acquire)
    }

    fn read(&self, offset: u64, into: &mut [IoSliceMut<'_>]) -> Result<()> {
        let length = slices::length_mut(into);
        self.check_range("read", offset, length)?;
        self.read_pieces(offset, length, into, false).map(|_| ())
    }

    fn read_now(&self, offset: u64, into: &mut [IoSliceMut<'_>]) -> Result<bool> {
        let length = slices::length_mut(into);
        self.check_range("read", offset, length)?;
        self.read_pieces(offset, length, into, true)
    }

    fn extent(&self, offset: u64) -> Result<Extent> {
        self.check_range("map", offset, 0)?;
        let size_bytes = self.size_bytes();
        let blocks_end = size_bytes.div_ceil(BLOCK_BYTES);
        let first = offset / BLOCK_BYTES;
        let view = self.view.read();
        let (mut block, mut kind) = (first, None);
        for _ in 0..EXTENT_PIECES {
            let (piece, blocks) = view.map.lookup(block, (blocks_end - block).max(1));
            if *kind.get_or_insert(piece_kind(piece)) != piece_kind(piece) {
                break;
            }
            block += blocks;
            if block >= blocks_end || kind == Some(None) {
                break;
            }
        }
        drop(view);
        let here = (block * BLOCK_BYTES).min(size_bytes) - offset;
        match (kind.flatten(), self.base.read().clone()) {
            (Some(data), _) => Ok(Extent { length: here, data }),
            (None, Some(base)) if offset < base.size_bytes() => {
                let below = base.extent(offset)?;
                Ok(Extent { length: below.length.min(here), data: below.data })
            }
            (None, _) => Ok(Extent { length: here, data: false }),
        }
    }
}

/// Data, zeros, or not here.
fn piece_kind(piece: Piece) -> Option<bool> {
    match piece {
        Piece::Data(_) => Some(true),
        Piece::Zero => Some(false),
        Piece::Absent => None,
    }
}

impl BlockDev for Layer {
    fn write(&self, offset: u64, from: &[IoSlice<'_>]) -> Result<()> {
        self.put(offset, from, false).map(|_| ())
    }

    fn write_now(&self, offset: u64, from: &[IoSlice<'_>]) -> Result<bool> {
        self.put(offset, from, true)
    }

    fn flush(&self) -> Result<()> {
        let want = self.appended_seq.load(Ordering::Acquire);
        let mut syncing = self.syncing.lock();
        loop {
            if self.durable_seq.load(Ordering::Acquire) >= want {
                return Ok(());
            }
            if self.gate.load(Ordering::Acquire) == BROKEN {
                return Err(self.refused(BROKEN));
            }
            if !*syncing {
                break;
            }
            self.synced.wait(&mut syncing);
        }
        *syncing = true;
        drop(syncing);
        let result = self.sync_now();
        *self.syncing.lock() = false;
        self.synced.notify_all();
        if result.is_ok() {
            self.work_if_due();
        }
        result
    }

    fn discard(&self, offset: u64, length: u64) -> Result<()> {
        self.put_zeroes("discard", offset, length)
    }

    fn write_zeroes(&self, offset: u64, length: u64) -> Result<()> {
        self.put_zeroes("write zeros to", offset, length)
    }
}
