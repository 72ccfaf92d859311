//! Takes a layer out of a chain while the disk above it is in use.
//!
//! ```text
//!   headers on disk ─► engine::disk::merge::next ─► one step, durable ─► headers on disk ─► … ─► Done
//!                                                    └ handles above are put on what they lie on now
//! ```
//!
//! Invariants: what is on disk decides, so a merge that was cut off goes on where it was. Whoever reads the disk
//! meanwhile reads what it was; a writer waits for a few blocks at most. The copy takes at most half of the disk's time.
//!
//! Not here: the order of the steps and why it is safe (`engine::disk::merge`), which snapshot goes (`volume`).

use std::sync::Arc;
use std::time::{Duration, Instant};

use uuid::Uuid;
use whimbrel_engine::disk::merge::{self, Choice, Direction, Node, Step, View};
use whimbrel_wire::record::layer::{Header, Parent, State};
use whimbrel_wire::{DataId, DiskId};

use super::files::Dir;
use super::header_file::HeaderFile;
use super::layer::{Layer, remove};
use super::neighbour::Take;
use super::volume::VolumeDir;
use crate::block_dev::{BlockDev as _, BlockRead};
use crate::error::{Error, ErrorKind, Result};

/// Bytes copied between two looks at the clock.
const STEP_BYTES: u64 = 4 << 20;
/// The longest rest between two pieces of a copy.
const REST_MAX: Duration = Duration::from_millis(200);

/// What is to be merged.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MergePlan {
    /// The layer that is taken out.
    pub layer: DiskId,
    /// The one layer that lies on it, or did before an earlier try.
    pub child: DiskId,
}

/// A merge under way.
pub struct Merge<'a> {
    dir: &'a VolumeDir,
    plan: MergePlan,
    direction: Direction,
    /// Layers that are open for writing here.
    open: &'a dyn Fn(DiskId) -> Option<Arc<Layer>>,
    /// The copy is complete and durable; with the handle that wrote it, unless that is the open child itself.
    copied: Option<Option<Arc<Layer>>>,
}

impl std::fmt::Debug for Merge<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Merge")
            .field("plan", &self.plan)
            .field("direction", &self.direction)
            .finish_non_exhaustive()
    }
}

fn node(header: &Header) -> Node {
    Node {
        disk_id: header.disk_id,
        data_id: header.data_id,
        parent: header.parent,
        second_linkage: header.second_linkage,
    }
}

impl<'a> Merge<'a> {
    /// Looks at the layers and chooses the direction; `open` gives the layers that are open for writing here.
    ///
    /// `Refused`: more than one layer lies on the one that is to go.
    pub fn new(
        dir: &'a VolumeDir,
        plan: MergePlan,
        open: &'a dyn Fn(DiskId) -> Option<Arc<Layer>>,
    ) -> Result<Self> {
        let (layer, child) = (header_if_here(dir, plan.layer)?, header_if_here(dir, plan.child)?);
        let direction = match (&layer, &child) {
            (Some(layer), Some(child)) => {
                let lies_on = |header: &Header| matches!(header.parent, Parent::Layer { disk_id, .. } if disk_id == plan.layer);
                let begun_into_parent = child.second_linkage.is_some();
                let others = dir.children(plan.layer)?;
                if !begun_into_parent
                    && let Some(other) = others.iter().find(|other| other.disk_id != plan.child)
                {
                    return Err(Error::new(
                        ErrorKind::Refused,
                        format!("merge layer {}: layer {} lies on it too", plan.layer, other.disk_id),
                    ));
                }
                let both = lies_on(child) && !begun_into_parent;
                merge::direction(&Choice {
                    layer_bytes: if both { data_bytes(dir, plan.layer)? } else { 0 },
                    child_bytes: if both { data_bytes(dir, plan.child)? } else { 0 },
                    child_is_sealed: child.state == State::Sealed && both,
                    same_size: layer.size_bytes == child.size_bytes,
                    begun_into_parent,
                })
            }
            (Some(_), None) => Direction::IntoParent,
            (None, Some(_)) => Direction::IntoChild,
            (None, None) => {
                return Err(Error::new(
                    ErrorKind::NotFound,
                    format!("merge layers {} and {}: neither is on this host", plan.layer, plan.child),
                ));
            }
        };
        Ok(Self { dir, plan, direction, open, copied: None })
    }

    /// Carries the merge out, waiting as it goes; gives the layer that stands where the two stood. `progress` is told
    /// blocks done and in all, and may end it with an error: it goes on from there the next time.
    pub fn run(mut self, progress: &mut dyn FnMut(u64, u64) -> Result<()>) -> Result<DiskId> {
        loop {
            let (layer, child) =
                (header_if_here(self.dir, self.plan.layer)?, header_if_here(self.dir, self.plan.child)?);
            let above = self.above()?;
            let (layer_node, child_node) = (layer.as_ref().map(node), child.as_ref().map(node));
            let view = View {
                layer: layer_node.as_ref(),
                child: child_node.as_ref(),
                above: &above,
                copied: self.copied.is_some(),
            };
            let step = merge::next(self.direction, &view, DataId(Uuid::new_v4()))?;
            tracing::debug!(?step, "merge layers");
            match step {
                Step::NameSecond(second) => {
                    self.change(self.plan.child, |header| header.second_linkage = Some(second))?;
                }
                Step::ReplaceId(new) => self.change(self.plan.layer, |header| header.data_id = new)?,
                Step::CopyUp => self.copied = Some(self.copy_up(progress)?),
                Step::CopyDown => self.copied = Some(Some(self.copy_down(progress)?)),
                Step::Relink(what, parent) => self.relink(what, parent)?,
                Step::Remove(what) => {
                    self.dir.sealed_layers().lock().remove(&what);
                    remove(&self.dir.path(what))?;
                }
                Step::Done(stands) => return Ok(stands),
            }
        }
    }

    /// What lies on the child, and, while it is merged down, what was relinked already.
    fn above(&self) -> Result<Vec<Node>> {
        let mut above: Vec<Node> = self.dir.children(self.plan.child)?.iter().map(node).collect();
        if self.direction == Direction::IntoParent {
            let relinked = self.dir.children(self.plan.layer)?;
            above.extend(relinked.iter().filter(|header| header.disk_id != self.plan.child).map(node));
        }
        Ok(above)
    }

    /// Changes the header of a layer, durably, through the handle that may.
    fn change(&self, disk_id: DiskId, change: impl FnOnce(&mut Header)) -> Result<()> {
        match (self.open)(disk_id) {
            Some(layer) => layer.update_header(change),
            None => {
                let mut file = HeaderFile::open(&Dir::new(&self.dir.path(disk_id)), true)?;
                Ok(file.update(change)?)
            }
        }
    }

    fn copy_up(&self, progress: &mut dyn FnMut(u64, u64) -> Result<()>) -> Result<Option<Arc<Layer>>> {
        let from = self.reader(self.plan.layer)?;
        match (self.open)(self.plan.child) {
            Some(child) => {
                copy(&from, &child, Take::Absent, progress)?;
                child.flush()?;
                Ok(None)
            }
            None => {
                let child = self.writer(self.plan.child)?;
                copy(&from, &child, Take::Absent, progress)?;
                child.close()?;
                Ok(Some(child))
            }
        }
    }

    fn copy_down(&self, progress: &mut dyn FnMut(u64, u64) -> Result<()>) -> Result<Arc<Layer>> {
        let from = self.reader(self.plan.child)?;
        let layer = self.writer(self.plan.layer)?;
        copy(&from, &layer, Take::All, progress)?;
        layer.close()?;
        if let Some(shared) = self.dir.sealed(self.plan.layer) {
            layer.set_base(shared.below());
            // Whoever opens the chain from here on shares the handle that has all blocks.
            self.dir.keep_sealed(&layer);
        }
        Ok(layer)
    }

    /// A handle to read what a layer itself holds.
    fn reader(&self, disk_id: DiskId) -> Result<Arc<Layer>> {
        match self.dir.sealed(disk_id) {
            Some(layer) => Ok(layer),
            None => {
                self.dir.seal(disk_id)?;
                Layer::open(&self.dir.path(disk_id), None, whimbrel_wire::Epoch(u64::MAX), false)
            }
        }
    }

    /// A handle to write a sealed layer, beside the one that reads it.
    fn writer(&self, disk_id: DiskId) -> Result<Arc<Layer>> {
        self.dir.seal(disk_id)?;
        Layer::open_for_merge(&Dir::new(&self.dir.path(disk_id)))
    }

    /// Puts a layer on another parent, on disk and where it is open.
    fn relink(&self, what: DiskId, parent: Parent) -> Result<()> {
        self.change(what, |header| {
            header.parent = parent;
            header.second_linkage = None;
        })?;
        match self.direction {
            Direction::IntoChild => {
                let below = self.dir.sealed(self.plan.layer).map(|layer| layer.below());
                match ((self.open)(what), below) {
                    (Some(child), Some(below)) => child.set_base(below),
                    (None, Some(below)) => {
                        // Those on the child read through the handle that has all blocks, so that nobody needs the layer.
                        if let Some(Some(written)) = &self.copied {
                            written.set_base(below);
                            self.replace(what, written)?;
                        }
                    }
                    (_, None) => {}
                }
            }
            Direction::IntoParent => {
                let handle = (self.open)(what).or_else(|| self.dir.sealed(what));
                if let Some(handle) = handle {
                    let on = match &self.copied {
                        Some(Some(written)) => Arc::clone(written),
                        // After a crash, the layer as it is on disk has everything.
                        _ => match self.dir.sealed(self.plan.layer) {
                            Some(layer) => layer,
                            None => return Ok(()),
                        },
                    };
                    self.dir.keep_sealed(&on);
                    handle.set_base(Some(on as Arc<dyn BlockRead>));
                }
            }
        }
        Ok(())
    }

    /// Has all that lie on a layer read it through another handle.
    fn replace(&self, disk_id: DiskId, handle: &Arc<Layer>) -> Result<()> {
        self.dir.keep_sealed(handle);
        for above in self.dir.children(disk_id)? {
            let open = (self.open)(above.disk_id).or_else(|| self.dir.sealed(above.disk_id));
            if let Some(open) = open {
                open.set_base(Some(Arc::clone(handle) as Arc<dyn BlockRead>));
            }
        }
        Ok(())
    }
}

fn header_if_here(dir: &VolumeDir, disk_id: DiskId) -> Result<Option<Header>> {
    match dir.header(disk_id) {
        Ok(header) => Ok(Some(header)),
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error),
    }
}

/// Data that a layer holds, bytes; that of one which is being written does not matter.
fn data_bytes(dir: &VolumeDir, disk_id: DiskId) -> Result<u64> {
    match dir.sealed(disk_id) {
        Some(layer) => Ok(layer.data_bytes()),
        None if dir.header(disk_id)?.state == State::Sealed => {
            let layer = Layer::open(&dir.path(disk_id), None, whimbrel_wire::Epoch(u64::MAX), false)?;
            Ok(layer.data_bytes())
        }
        None => Ok(0),
    }
}

fn copy(
    from: &Layer,
    to: &Layer,
    take: Take,
    progress: &mut dyn FnMut(u64, u64) -> Result<()>,
) -> Result<()> {
    let total = from.size_bytes().div_ceil(whimbrel_wire::record::layer::BLOCK_BYTES);
    let mut at = Some(0);
    while let Some(block) = at {
        progress(block, total)?;
        let started = Instant::now();
        at = to.copy_from(from, take, block, STEP_BYTES)?;
        if at.is_some() {
            std::thread::sleep(started.elapsed().min(REST_MAX));
        }
    }
    progress(total, total)
}
