//! A layer on its way in.
//!
//! ```text
//!   create ─► Receiving ─ write(chunk)* ─ finish(seal) ─► Ready ─ open(base, epoch + 1)
//!                 ▲ open(): after a restart of this agent, goes on where it was durable
//! ```
//!
//! Invariants
//! * Nobody opens the layer before it is whole: verified against the source's seal, and durable.
//! * Chunks are applied in order and once; one that was applied is ignored, a gap is refused.
//! * A position that was reported durable (`sync`) is never ahead of the data.

use std::io::IoSlice;
use std::path::Path;
use std::sync::Arc;

use whimbrel_wire::Epoch;
use whimbrel_wire::record::layer::{Header, ShipChunk, ShipPosition, State};

use super::append::Record;
use super::files::Dir;
use super::layer::Layer;
use super::ship::ShipSeal;
use super::slices;
use super::spec::LayerSpec;
use crate::block_dev::{BlockDev, BlockRead};
use crate::error::{Context, Error, ErrorKind, Result};

/// Bytes received between two durable positions.
const SYNC_BYTES: u64 = 64 << 20;

/// See the module's charter.
#[derive(Debug)]
pub struct LayerReceiver {
    layer: Arc<Layer>,
    position: ShipPosition,
    unsynced_bytes: u64,
}

/// A layer that arrived whole.
#[derive(Debug)]
pub struct Received {
    layer: Arc<Layer>,
}

impl LayerReceiver {
    /// Makes the directory `path` for a layer that will arrive.
    pub fn create(path: &Path, spec: &LayerSpec) -> Result<Self> {
        Self::create_in(&Dir::new(path), spec)
    }

    pub(super) fn create_in(dir: &Dir, spec: &LayerSpec) -> Result<Self> {
        Layer::create_in(dir, spec, State::Receiving(ShipPosition::START))?;
        Self::open_in(dir)
    }

    /// Goes on with a layer that was arriving when this agent ended.
    pub fn open(path: &Path) -> Result<Self> {
        Self::open_in(&Dir::new(path))
    }

    pub(super) fn open_in(dir: &Dir) -> Result<Self> {
        let mut position = None;
        let layer = Layer::open_receiving(dir, |header: &Header| match header.state {
            State::Receiving(at) => {
                position = Some(at);
                Ok(())
            }
            _ => Err(Error::new(
                ErrorKind::AlreadyExists,
                format!("receive layer {}: it is whole already", header.disk_id),
            )),
        })?;
        let position = position.unwrap_or(ShipPosition::START);
        Ok(Self { layer, position, unsynced_bytes: 0 })
    }

    /// Where the source goes on.
    pub fn position(&self) -> ShipPosition {
        self.position
    }

    /// Applies the next chunk; gives the position after it.
    ///
    /// `Corrupt`: the chunk is damaged. `InvalidInput`: it is another layer's, or does not go on at [`Self::position`].
    pub fn write(&mut self, chunk: &[u8]) -> Result<ShipPosition> {
        let what = || format!("receive layer {}", self.layer.ident.disk_id);
        let decoded = ShipChunk::decode(chunk).map_err(Error::from).with_context(what)?;
        if decoded.disk_id != self.layer.ident.disk_id {
            let why = format!("{}: a chunk of layer {} came", what(), decoded.disk_id);
            return Err(Error::new(ErrorKind::InvalidInput, why));
        }
        if decoded.next.seq <= self.position.at.seq {
            return Ok(self.position);
        }
        if decoded.from.seq != self.position.at.seq {
            let (came, want) = (decoded.from.seq, self.position.at.seq);
            return Err(Error::new(
                ErrorKind::InvalidInput,
                format!("{}: record {came} came, not {want}", what()),
            ));
        }
        let mut log = self.layer.log_for_copy()?;
        for frame in &decoded.frames {
            let payload = frame.payload.map(|payload| [IoSlice::new(payload)]);
            let record = Record {
                offset_bytes: frame.offset_bytes,
                length_bytes: frame.length_bytes,
                payload: payload.as_ref().map(|slices| (slices.as_slice(), slices::crc(slices))),
            };
            self.layer.append(&mut log, &record)?;
        }
        drop(log);
        self.position = self.position.after(chunk, decoded.next);
        self.unsynced_bytes += chunk.len() as u64;
        if self.unsynced_bytes >= SYNC_BYTES {
            self.sync()?;
        }
        Ok(self.position)
    }

    /// Makes what was received durable, and the position that says so.
    pub fn sync(&mut self) -> Result<()> {
        self.layer.flush()?;
        let position = self.position;
        self.layer.update_header(|header| header.state = State::Receiving(position))?;
        self.unsynced_bytes = 0;
        Ok(())
    }

    /// Verifies that everything arrived, and makes it durable: the host may say that it is ready.
    ///
    /// `Corrupt`: the chunks applied here are not those that the source sent.
    pub fn finish(self, seal: &ShipSeal) -> Result<Received> {
        if self.position != seal.position {
            return Err(Error::new(
                ErrorKind::Corrupt,
                format!(
                    "receive layer {}: record {} with hash {:02x?} was reached, the source ends at {} with {:02x?}",
                    self.layer.ident.disk_id,
                    self.position.at.seq,
                    self.position.chain.get(..4).unwrap_or_default(),
                    seal.position.at.seq,
                    seal.position.chain.get(..4).unwrap_or_default(),
                ),
            )
            .hint("the move is undone; start it again"));
        }
        self.layer.flush()?;
        self.layer.update_header(|header| {
            header.state = State::Ready;
            header.data_id = seal.data_id;
            header.epoch = seal.epoch;
        })?;
        Ok(Received { layer: self.layer })
    }
}

impl Received {
    /// Makes it what other layers lie on: nobody writes it from here on.
    pub fn seal(self) -> Result<()> {
        self.layer.seal()
    }

    /// Opens it for writing, as [`Layer::open`] would, but without reading its log again.
    pub fn open(self, base: Option<Arc<dyn BlockRead>>, epoch: Epoch) -> Result<Arc<Layer>> {
        self.layer.take_over(base, epoch)?;
        Ok(self.layer)
    }
}
