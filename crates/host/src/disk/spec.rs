//! What a layer is to be, and what it is: values, no handle.
//!
//! Not here: the open layer (`layer`), its header on disk (`wire::record::layer`).

use serde::{Deserialize, Serialize};
use uuid::Uuid;
use whimbrel_wire::peer::migrate::LayerHead;
use whimbrel_wire::record::layer::{
    DISK_BYTES_MAX, Header, LogPoint, Parent, SECTOR_BYTES, SEGMENT_BLOCKS, State,
};
use whimbrel_wire::{DataId, DiskId, Epoch};

use crate::error::{Error, ErrorKind, Result};

/// A layer to be made.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct LayerSpec {
    /// Its identity.
    pub disk_id: DiskId,
    /// The identity of what its readers see.
    pub data_id: DataId,
    /// What it lies on.
    pub parent: Parent,
    /// Size of the disk, bytes: a multiple of 512, at most 64 TiB.
    pub size_bytes: u64,
    /// The oldest epoch that may write it.
    pub epoch: Epoch,
    /// Length of a segment, 4 KiB blocks: a power of two, at least 512 (larger than the largest record).
    pub segment_blocks: u32,
}

impl From<LayerHead> for LayerSpec {
    fn from(head: LayerHead) -> Self {
        let LayerHead { disk_id, data_id, parent, size_bytes, epoch, segment_blocks } = head;
        Self { disk_id, data_id, parent, size_bytes, epoch, segment_blocks }
    }
}

impl LayerSpec {
    /// A new layer of `size_bytes` on `parent`, with random ids.
    pub fn new(parent: Parent, size_bytes: u64, epoch: Epoch) -> Self {
        Self {
            disk_id: DiskId(Uuid::new_v4()),
            data_id: DataId(Uuid::new_v4()),
            parent,
            size_bytes,
            epoch,
            segment_blocks: SEGMENT_BLOCKS,
        }
    }

    pub(super) fn header(&self, state: State) -> Result<Header> {
        let bad = |why: String| {
            Err(Error::new(ErrorKind::InvalidInput, format!("create layer {}: {why}", self.disk_id)))
        };
        if self.size_bytes == 0 || !self.size_bytes.is_multiple_of(512) || self.size_bytes > DISK_BYTES_MAX {
            return bad(format!("a disk has a multiple of 512 bytes up to 64 TiB, not {}", self.size_bytes));
        }
        if self.segment_blocks < 512 || !self.segment_blocks.is_power_of_two() {
            return bad(format!("segments of {} blocks", self.segment_blocks));
        }
        Ok(Header {
            generation: 0,
            features_required: 0,
            features_ignorable: 0,
            disk_id: self.disk_id,
            data_id: self.data_id,
            parent: self.parent,
            second_linkage: None,
            sector_bytes: SECTOR_BYTES,
            size_bytes: self.size_bytes,
            epoch: self.epoch,
            salt: Uuid::new_v4().as_u64_pair().0,
            session: 0,
            segment_blocks: self.segment_blocks,
            first_segment: 0,
            state,
            clean_end: Some(LogPoint::START),
            checkpoint: None,
        })
    }
}

/// A layer as people and records see it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LayerInfo {
    /// Its identity.
    pub disk_id: DiskId,
    /// What its readers see.
    pub data_id: DataId,
    /// What it lies on.
    pub parent: Parent,
    /// Size of the disk, bytes.
    pub size_bytes: u64,
    /// The newest epoch at which it was opened or fenced.
    pub epoch: Epoch,
    /// How complete it is.
    pub state: State,
    /// The end of its log.
    pub end: LogPoint,
    /// Records that are durable: all up to this number.
    pub durable_seq: u64,
    /// Length of the log, bytes.
    pub log_bytes: u64,
    /// Memory of the map, bytes.
    pub map_bytes: u64,
    /// Whether this handle may write.
    pub writable: bool,
}
