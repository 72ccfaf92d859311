//! Chains of layers: who lies on whom, opened whole or not at all.
//!
//! ```text
//!   writable layer ─► sealed layer ─► sealed layer ─► image, or zeros        sealed layers may have several children
//!   a crash between "made a child" and "sealed": the next open seals, which also makes durable what was written
//! ```
//!
//! Invariants
//! * A sealed layer is open once in this process; all that lie on it share the handle.
//! * A layer that something here lies on is not removed.
//! * Nothing is relinked but by the operator's word, or by a merge.
//!
//! Not here: the rules of a link (`engine::disk::identity`), merging (`merge`), names of snapshots (`volume`).

use std::sync::Arc;

use whimbrel_engine::disk::identity::{self, CHAIN_MAX, Link};
use whimbrel_wire::record::layer::{Header, Parent, State};
use whimbrel_wire::{DataId, DiskId, Epoch, ImageId};

use super::check::{Report, check};
use super::files::Dir;
use super::header_file::HeaderFile;
use super::layer::{Layer, remove};
use super::volume::{BaseImage, VolumeDir};
use crate::block_dev::BlockRead;
use crate::error::{Error, ErrorKind, Result};

/// A link that did not hold and was accepted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Relinked {
    /// The child.
    pub layer: DiskId,
    /// Its parent.
    pub parent: DiskId,
    /// The content that it was made over.
    pub was: DataId,
    /// The content that the parent has.
    pub now: DataId,
}

impl VolumeDir {
    /// What lies under the writable layer `disk_id`: verified by its links.
    pub fn base(&self, disk_id: DiskId, image: Option<BaseImage>) -> Result<Option<Arc<dyn BlockRead>>> {
        let links = self.links(disk_id)?;
        let image_bytes = image.as_ref().map_or(0, |(_, disk)| disk.size_bytes());
        identity::check_chain(&links, image.as_ref().map(|(id, _)| *id), image_bytes)?;
        let mut base = image.map(|(_, disk)| disk);
        let _one = self.opening_chain().lock();
        for link in links.iter().skip(1).rev() {
            base = Some(self.open_sealed(link.disk_id, base)?);
        }
        Ok(base)
    }

    /// A layer that others lie on, shared with all who read it.
    fn open_sealed(&self, disk_id: DiskId, base: Option<Arc<dyn BlockRead>>) -> Result<Arc<dyn BlockRead>> {
        if let Some(layer) = self.sealed(disk_id) {
            return Ok(layer);
        }
        if self.header(disk_id)?.state == State::Ready {
            self.seal(disk_id)?;
        }
        let layer = Layer::open(&self.path(disk_id), base, Epoch(u64::MAX), false)?;
        self.keep_sealed(&layer);
        Ok(layer)
    }

    /// Ends writing of a layer that nobody has open, for good. Does nothing if it is sealed.
    pub fn seal(&self, disk_id: DiskId) -> Result<()> {
        let state = self.header(disk_id)?.state;
        if state == State::Sealed {
            return Ok(());
        }
        let layer =
            Layer::open_with(&Dir::new(&self.path(disk_id)), None, None, true, |header| {
                match header.state {
                    State::Ready => Ok(()),
                    _ => Err(Error::new(
                        ErrorKind::Refused,
                        format!("seal layer {}: it is not whole on this host", header.disk_id),
                    )),
                }
            })?;
        layer.checkpoint_before_seal()?;
        layer.seal()
    }

    /// The shared handle of a sealed layer, if somebody has it open.
    pub fn sealed(&self, disk_id: DiskId) -> Option<Arc<Layer>> {
        self.sealed_layers().lock().get(&disk_id).and_then(std::sync::Weak::upgrade)
    }

    /// Shares a handle with all that open a chain over the layer from here on.
    pub fn keep_sealed(&self, layer: &Arc<Layer>) {
        let mut sealed = self.sealed_layers().lock();
        sealed.retain(|_, layer| layer.strong_count() > 0);
        sealed.insert(layer.info().disk_id, Arc::downgrade(layer));
    }

    /// The header of a layer, as it is on disk.
    pub fn header(&self, disk_id: DiskId) -> Result<Header> {
        let path = self.path(disk_id);
        if !path.exists() {
            let error =
                Error::new(ErrorKind::NotFound, format!("open layer {disk_id}: it is not on this host"));
            return Err(error.hint("see `whimbrel volume show` for the host that holds it"));
        }
        Ok(HeaderFile::open(&Dir::new(&path), false)?.get().clone())
    }

    /// The headers of the chain on `disk_id`, as they are on disk, the given layer first.
    pub fn chain(&self, disk_id: DiskId) -> Result<Vec<Header>> {
        let mut chain = Vec::new();
        let mut next = Some(disk_id);
        while let Some(id) = next {
            let header = self.header(id)?;
            next = match header.parent {
                Parent::Layer { disk_id, .. } if chain.len() <= CHAIN_MAX => Some(disk_id),
                _ => None,
            };
            chain.push(header);
        }
        Ok(chain)
    }

    /// The chain's links as its headers tell them.
    fn links(&self, disk_id: DiskId) -> Result<Vec<Link>> {
        let link = |header: Header| Link {
            file: self.path(header.disk_id).display().to_string(),
            disk_id: header.disk_id,
            data_id: header.data_id,
            parent: header.parent,
            second_linkage: header.second_linkage,
            size_bytes: header.size_bytes,
            sector_bytes: header.sector_bytes,
        };
        Ok(self.chain(disk_id)?.into_iter().map(link).collect())
    }

    /// Layers of this host that lie on `disk_id`.
    pub fn children(&self, disk_id: DiskId) -> Result<Vec<Header>> {
        let mut children = Vec::new();
        for id in self.list()? {
            let header = match self.header(id) {
                Ok(header) => header,
                // Removed since it was listed.
                Err(error) if error.kind() == ErrorKind::NotFound => continue,
                Err(error) => return Err(error),
            };
            if matches!(header.parent, Parent::Layer { disk_id: on, .. } if on == disk_id) {
                children.push(header);
            }
        }
        Ok(children)
    }

    /// Removes those of the layers, given from the top of a chain down, that nothing here lies on any more.
    pub fn remove_unused(&self, from_top: &[DiskId], keep: impl Fn(DiskId) -> bool) -> Result<()> {
        for id in from_top {
            if keep(*id) || !self.path(*id).exists() {
                continue;
            }
            if !self.children(*id)?.is_empty() {
                break;
            }
            self.sealed_layers().lock().remove(id);
            remove(&self.path(*id))?;
        }
        Ok(())
    }

    /// Bytes that a layer takes on this host's disk.
    pub fn disk_bytes(&self, disk_id: DiskId) -> Option<u64> {
        use std::os::unix::fs::MetadataExt as _;
        let entries = std::fs::read_dir(self.path(disk_id)).ok()?;
        Some(
            entries.flatten().filter_map(|entry| entry.metadata().ok()).map(|meta| meta.blocks() * 512).sum(),
        )
    }

    /// Verifies every layer of the chain, and its links; the writable layer first. Problems of the links stand with it.
    pub fn check(&self, disk_id: DiskId, image: Option<ImageId>) -> Result<Vec<Report>> {
        let links = self.links(disk_id)?;
        let mut reports = Vec::new();
        for link in &links {
            reports.push(check(&self.path(link.disk_id))?);
        }
        if let (Err(error), Some(first)) = (identity::check_chain(&links, image, 0), reports.first_mut()) {
            first.problems.push(error.to_string());
        }
        for (report, link) in reports.iter_mut().zip(&links).skip(1) {
            match report.header.state {
                State::Sealed => {}
                State::Ready => {
                    report.notes.push(format!("layer {} is not sealed; the next open does so", link.disk_id));
                }
                State::Pulling | State::Receiving(_) => {
                    report.problems.push(format!("layer {} is not whole", link.disk_id));
                }
            }
        }
        for (report, link) in reports.iter_mut().zip(&links) {
            if let Some(second) = link.second_linkage {
                report.notes.push(format!(
                    "layer {} is being merged into its parent, which has or will have content {second}",
                    link.disk_id
                ));
            }
        }
        Ok(reports)
    }

    /// Links of the chain on `disk_id` that do not hold because the parent's content changed. `accept`: they are made
    /// to hold, durably; nobody has the chain open then.
    pub fn relink(&self, disk_id: DiskId, accept: bool) -> Result<Vec<Relinked>> {
        let links = self.links(disk_id)?;
        let mut changed = Vec::new();
        for (child, parent) in links.iter().zip(links.iter().skip(1)) {
            let Parent::Layer { disk_id: on, data_id: was } = child.parent else { continue };
            if on != parent.disk_id || child.holds(parent.data_id) {
                continue;
            }
            let relinked = Relinked { layer: child.disk_id, parent: on, was, now: parent.data_id };
            if accept {
                self.set_parent(child.disk_id, Parent::Layer { disk_id: on, data_id: parent.data_id })?;
            }
            changed.push(relinked);
        }
        Ok(changed)
    }

    /// Lets a layer that nobody writes lie on `parent`, durably.
    pub(super) fn set_parent(&self, disk_id: DiskId, parent: Parent) -> Result<()> {
        let mut file = HeaderFile::open(&Dir::new(&self.path(disk_id)), true)?;
        Ok(file.update(|header| {
            header.parent = parent;
            header.second_linkage = None;
        })?)
    }
}
