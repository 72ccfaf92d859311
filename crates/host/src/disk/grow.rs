//! A layer's disk becomes larger, while it is in use or at rest.
//!
//! ```text
//!   header: size and data_id in one durable write ──► map ──► size: from here on readers and writers may go further
//! ```
//!
//! Invariants
//! * Nobody sees the larger disk under an old `data_id`: a crash leaves the header before, or the one after.
//! * What it gains reads as zeros: the last block was padded with zeros ([`Layer`]'s partial writes), behind it the map
//!   is empty, and layers below end where they end.
//!
//! Not here: which sizes are allowed (`engine::disk::resize`), the volume's record, which comes first (`volume::resize`).

use std::sync::atomic::Ordering;

use uuid::Uuid;
use whimbrel_engine::disk::{identity, resize};
use whimbrel_wire::record::layer::{BLOCK_BYTES, Header, State};
use whimbrel_wire::{DataId, DiskId, Epoch};

use super::files::Dir;
use super::header_file::HeaderFile;
use super::layer::Layer;
use super::volume::VolumeDir;
use crate::error::{Context, Error, ErrorKind, Result};

/// The size that the header is to have; none if it has it.
fn grow_to(header: &Header, size_bytes: u64) -> Result<Option<u64>> {
    let action = || format!("resize layer {}", header.disk_id);
    if header.state == State::Pulling {
        let why = format!("{}: some of its blocks are still at another host", action());
        return Err(Error::new(ErrorKind::Refused, why));
    }
    let next = resize::grow_to(header.size_bytes, size_bytes).map_err(Error::from).with_context(action)?;
    if next.is_some_and(|next| !next.is_multiple_of(header.sector_bytes.into())) {
        let why = format!("{}: {size_bytes} bytes are no whole sectors of {}", action(), header.sector_bytes);
        return Err(Error::new(ErrorKind::InvalidInput, why));
    }
    Ok(next)
}

impl Layer {
    /// Makes the disk larger, durably; it is so for everybody who has this handle when this returns. Does nothing if it
    /// has that size.
    ///
    /// `InvalidInput`: it would become smaller. `Refused`: this handle may not write.
    pub fn grow(&self, size_bytes: u64) -> Result<()> {
        let mut file = self.header.lock();
        let Some(next) = grow_to(file.get(), size_bytes)? else { return Ok(()) };
        let changed = self.change_seen(&mut file, |header| header.size_bytes = next);
        // Fenced meanwhile it may be larger all the same; the header knows.
        let now = file.get().size_bytes;
        self.view.write().map.grow(now.div_ceil(BLOCK_BYTES));
        self.size_bytes.store(now, Ordering::Release);
        changed
    }
}

impl VolumeDir {
    /// As [`Layer::grow`], for a layer that nobody has open. A layer that is that large already, or larger, stays as it
    /// is.
    pub fn grow_at_rest(&self, disk_id: DiskId, size_bytes: u64, epoch: Epoch) -> Result<()> {
        if self.header(disk_id)?.size_bytes >= size_bytes {
            return Ok(());
        }
        let mut file = HeaderFile::open(&Dir::new(&self.path(disk_id)), true)?;
        let header = file.get();
        identity::may_open(disk_id, &header.state, header.epoch, epoch, true)?;
        let Some(next) = grow_to(header, size_bytes)? else { return Ok(()) };
        let id = DataId(Uuid::new_v4());
        file.update(|header| {
            (header.size_bytes, header.data_id, header.epoch) = (next, id, epoch);
        })?;
        Ok(())
    }
}
