//! Volumes of this host: where their layers live, and how a chain opens.
//!
//! ```text
//!   DATA/volumes/DISK_ID/     one layer each
//!   chain: writable layer ─► parent layers (read-only, checked by data_id) ─► image, or zeros
//! ```
//!
//! Invariants: a chain opens whole and verified, or not at all. A volume is never smaller than its image; behind the
//! image's end it reads as zeros.
//!
//! Not here: names, holders and epochs of volumes (the metadata store), images (`store`).

use std::path::{Path, PathBuf};
use std::sync::Arc;

use uuid::Uuid;
use whimbrel_engine::disk::identity::{self, CHAIN_MAX, Link};
use whimbrel_wire::record::layer::{Parent, State};
use whimbrel_wire::size::show_bytes;
use whimbrel_wire::{DiskId, Epoch, ImageId};

use super::check::{Report, check};
use super::files::{Dir, PARTIAL};
use super::header_file::HeaderFile;
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
        Ok(Self { root })
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
        let file = HeaderFile::open(&Dir::new(&self.path(disk_id)), false)?;
        Ok(file.get().state == State::Pulling)
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

    /// What lies under the writable layer `disk_id`: verified by its links.
    pub fn base(&self, disk_id: DiskId, image: Option<BaseImage>) -> Result<Option<Arc<dyn BlockRead>>> {
        let links = self.links(disk_id)?;
        identity::check_chain(&links, image.as_ref().map(|(id, _)| *id))?;
        let mut base = image.map(|(_, disk)| disk);
        for link in links.iter().skip(1).rev() {
            let layer = Layer::open(&self.path(link.disk_id), base, Epoch(u64::MAX), false)?;
            base = Some(layer);
        }
        Ok(base)
    }

    /// The chain's links as their headers tell them.
    fn links(&self, disk_id: DiskId) -> Result<Vec<Link>> {
        let mut links: Vec<Link> = Vec::new();
        let mut next = Some(disk_id);
        while let Some(id) = next {
            let path = self.path(id);
            if !path.exists() {
                let error =
                    Error::new(ErrorKind::NotFound, format!("open layer {id}: it is not on this host"));
                return Err(error.hint("see `whimbrel volume show` for the host that holds it"));
            }
            let file = HeaderFile::open(&Dir::new(&path), false)?;
            let header = file.get();
            links.push(Link { disk_id: header.disk_id, data_id: header.data_id, parent: header.parent });
            next = match header.parent {
                Parent::Layer { disk_id, .. } if links.len() <= CHAIN_MAX => Some(disk_id),
                _ => None,
            };
        }
        Ok(links)
    }

    /// Verifies every layer of the chain, and its links; the writable layer first. Problems of the links stand with it.
    pub fn check(&self, disk_id: DiskId, image: Option<ImageId>) -> Result<Vec<Report>> {
        let links = self.links(disk_id)?;
        let mut reports = Vec::new();
        for link in &links {
            reports.push(check(&self.path(link.disk_id))?);
        }
        if let (Err(error), Some(first)) = (identity::check_chain(&links, image), reports.first_mut()) {
            first.problems.push(error.to_string());
        }
        Ok(reports)
    }

    /// Removes a layer that nobody has open.
    pub fn remove(&self, disk_id: DiskId) -> Result<()> {
        remove(&self.path(disk_id))
    }
}
