//! Volumes of this host: where their layers live.
//!
//! ```text
//!   DATA/volumes/DISK_ID/     one layer each
//!   chain: writable layer ─► parent layers (read-only, checked by data_id) ─► image, or zeros
//! ```
//!
//! Invariants: a volume is never smaller than its image; behind the image's end it reads as zeros.
//!
//! Not here: how a chain opens (`chain`), names, holders and epochs of volumes (the metadata store), images (`store`).

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Weak};

use parking_lot::Mutex;
use uuid::Uuid;
use whimbrel_wire::record::layer::{Parent, State};
use whimbrel_wire::size::show_bytes;
use whimbrel_wire::{DiskId, Epoch, ImageId};

use super::files::PARTIAL;
use super::layer::{Layer, remove};
use super::pull::{Pull, RemoteLayer};
use super::receive::LayerReceiver;
use super::spec::LayerSpec;
use crate::block_dev::BlockRead;
use crate::error::{Context, Error, ErrorKind, Result};

/// An image under a volume.
pub type BaseImage = (ImageId, Arc<dyn BlockRead>);

/// A volume to be made.
#[derive(Clone, Copy, Debug)]
pub struct VolumeSpec {
    /// The image under it, and the image's size in bytes.
    pub image: Option<(ImageId, u64)>,
    /// Size of the disk, bytes; the image's if none is given.
    pub size_bytes: Option<u64>,
    /// Epoch of the first right to write it.
    pub epoch: Epoch,
}

impl VolumeSpec {
    /// The layer of such a volume.
    pub fn layer(&self) -> Result<LayerSpec> {
        let image_bytes = self.image.map_or(0, |(_, bytes)| bytes);
        let size_bytes = self.size_bytes.unwrap_or(image_bytes).next_multiple_of(512);
        let bad = |why: String| Err(Error::new(ErrorKind::InvalidInput, format!("create volume: {why}")));
        if size_bytes == 0 {
            return bad("it has no size and no image".to_owned());
        }
        if size_bytes < image_bytes {
            return bad(format!(
                "{} are less than the image's {}",
                show_bytes(size_bytes),
                show_bytes(image_bytes)
            ));
        }
        let parent = self.image.map_or(Parent::None, |(id, _)| Parent::Image(id));
        Ok(LayerSpec::new(parent, size_bytes, self.epoch))
    }
}

/// See the module's charter.
#[derive(Clone, Debug)]
pub struct VolumeDir {
    root: PathBuf,
    /// Layers that others lie on, as far as they are open.
    sealed: Arc<Mutex<HashMap<DiskId, Weak<Layer>>>>,
    /// Held while the layers under a volume are opened.
    opening: Arc<Mutex<()>>,
}

impl VolumeDir {
    /// The volumes under `data`, the agent's data directory; makes the directory if it is missing. Called once, at
    /// the agent's start: it removes what a crash left half made.
    pub fn new(data: &Path) -> Result<Self> {
        let root = data.join("volumes");
        let what = || format!("make directory {}", root.display());
        std::fs::create_dir_all(&root).with_context(what)?;
        // Layers that a crash left half made; they never had their name.
        for entry in std::fs::read_dir(&root).with_context(what)? {
            let path = entry.with_context(what)?.path();
            if path.extension().is_some_and(|extension| extension == PARTIAL) {
                std::fs::remove_dir_all(&path).with_context(|| format!("remove {}", path.display()))?;
            }
        }
        Ok(Self { root, sealed: Arc::default(), opening: Arc::default() })
    }

    /// Where the layers are.
    pub fn root(&self) -> &Path {
        &self.root
    }

    pub(super) fn sealed_layers(&self) -> &Mutex<HashMap<DiskId, Weak<Layer>>> {
        &self.sealed
    }

    pub(super) fn opening_chain(&self) -> &Mutex<()> {
        &self.opening
    }

    /// Where a layer is, or would be.
    pub fn path(&self, disk_id: DiskId) -> PathBuf {
        self.root.join(disk_id.to_string())
    }

    /// Makes a layer.
    pub fn create(&self, spec: &LayerSpec) -> Result<()> {
        Layer::create(&self.path(spec.disk_id), spec)
    }

    /// Layers that are here, whole or not.
    pub fn list(&self) -> Result<Vec<DiskId>> {
        let what = || format!("list {}", self.root.display());
        let mut ids = Vec::new();
        for entry in std::fs::read_dir(&self.root).with_context(what)? {
            let name = entry.with_context(what)?.file_name();
            ids.extend(name.to_str().and_then(|name| Uuid::parse_str(name).ok()).map(DiskId));
        }
        ids.sort_unstable();
        Ok(ids)
    }

    /// Opens the chain on `disk_id` over `image`, its writable layer at `epoch`.
    pub fn open(
        &self,
        disk_id: DiskId,
        image: Option<BaseImage>,
        epoch: Epoch,
        writable: bool,
    ) -> Result<Arc<Layer>> {
        let base = self.base(disk_id, image)?;
        Layer::open(&self.path(disk_id), base, epoch, writable)
    }

    /// Makes a layer whose blocks are still at another host; see [`Pull::create`].
    pub fn create_pull(&self, spec: &LayerSpec, map: &[u8]) -> Result<()> {
        Pull::create(&self.path(spec.disk_id), spec, map)
    }

    /// Whether some of the layer's blocks are still at another host.
    pub fn is_pulling(&self, disk_id: DiskId) -> Result<bool> {
        Ok(self.header(disk_id)?.state == State::Pulling)
    }

    /// Opens the chain on a layer whose blocks are still at another host.
    pub fn open_pull(
        &self,
        disk_id: DiskId,
        image: Option<BaseImage>,
        remote: Arc<dyn RemoteLayer>,
        epoch: Epoch,
    ) -> Result<Pull> {
        let base = self.base(disk_id, image)?;
        Pull::open(&self.path(disk_id), base, remote, epoch)
    }

    /// A layer that arrives from another host; goes on with one that was arriving before.
    pub fn receive(&self, spec: &LayerSpec) -> Result<LayerReceiver> {
        let path = self.path(spec.disk_id);
        if path.exists() { LayerReceiver::open(&path) } else { LayerReceiver::create(&path, spec) }
    }

    /// Removes a layer that nobody has open.
    pub fn remove(&self, disk_id: DiskId) -> Result<()> {
        remove(&self.path(disk_id))
    }
}
