//! Capability 12: taking a layer out of a chain while the disk above it is in use.
//!
//! ```text
//!   into the child:   X's blocks that the child lacks ─► child;   child's link := X's parent;   X removed
//!   into the parent:  child's second linkage := new id ─► X's id := new id ─► child's blocks ─► X
//!                     ─► the links of all that lie on the child := X, new id;   child removed
//! ```
//!
//! Into the child nothing changes that any reader of any layer sees, so one linkage is enough: the child lies on X, or
//! on what X lay on, and reads the same. Into the parent X's own content changes, so its id changes first; from
//! before that until the child is gone, the child's two linkages name both contents. What lies on the child reads the
//! same throughout: over the child, whose blocks hide what happens in X, and then over X, which has them.
//!
//! The machine keeps nothing: [`next`] looks at the layers' headers as they are on disk, so it goes on after a crash
//! at any step. Only the copy leaves no mark there; it is done again, which does no harm.
//!
//! Invariants
//! * After every step every chain opens and reads as before.
//! * A layer that several lie on is changed by nobody.
//!
//! Not here: the records of the metadata store that name snapshots (`host::volume`), making headers durable and
//! copying blocks (`host::disk`).

use whimbrel_wire::record::layer::Parent;
use whimbrel_wire::{DataId, DiskId, ErrorKind, WireError};

/// A layer's header, as far as a merge is concerned.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Node {
    /// Its identity.
    pub disk_id: DiskId,
    /// Its content.
    pub data_id: DataId,
    /// What it lies on.
    pub parent: Parent,
    /// The other content that its parent may have.
    pub second_linkage: Option<DataId>,
}

/// Which way the blocks go.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Direction {
    /// From the layer that is removed up into the one that lies on it.
    IntoChild,
    /// From the layer above down into the layer whose snapshot is removed; it then stands for the layer above.
    IntoParent,
}

/// What decides the direction.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Choice {
    /// Data that the layer holds, bytes.
    pub layer_bytes: u64,
    /// Data that the one layer on it holds, bytes.
    pub child_bytes: u64,
    /// The child is a snapshot itself: nobody writes it.
    pub child_is_sealed: bool,
    /// Both are disks of the same size.
    pub same_size: bool,
    /// The child already has a second linkage: a merge into the parent was begun.
    pub begun_into_parent: bool,
}

/// The direction in which less is copied. A layer that is being written is never merged down, because whoever writes it
/// would have to stop for it.
pub fn direction(choice: &Choice) -> Direction {
    let down = choice.child_is_sealed && choice.same_size && choice.child_bytes < choice.layer_bytes;
    if choice.begun_into_parent || down { Direction::IntoParent } else { Direction::IntoChild }
}

/// The layers of a merge as they are on disk now.
#[derive(Clone, Copy, Debug)]
pub struct View<'a> {
    /// The layer whose snapshot is removed; none if it is gone.
    pub layer: Option<&'a Node>,
    /// The one layer that lies, or lay, on it; none if it is gone.
    pub child: Option<&'a Node>,
    /// Layers that lie on the child, or (into the parent) that were relinked to the layer.
    pub above: &'a [Node],
    /// In this process the copy is complete and durable.
    pub copied: bool,
}

/// What to do next; each is durable before [`next`] is asked again.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Step {
    /// Give the child this second linkage; `id` is the fresh one that was offered.
    NameSecond(DataId),
    /// Give the layer this content's id.
    ReplaceId(DataId),
    /// Copy the layer's blocks into the child where it has none.
    CopyUp,
    /// Copy the child's blocks into the layer.
    CopyDown,
    /// Let this layer lie on that parent, with no second linkage.
    Relink(DiskId, Parent),
    /// Remove this layer's files: nothing lies on it.
    Remove(DiskId),
    /// It is over; this layer stands where two stood.
    Done(DiskId),
}

/// The next step of a merge. `fresh` is a random id, used if one is needed.
///
/// `Refused` if the layers do not lie on each other as a merge leaves them at any time.
pub fn next(direction: Direction, view: &View<'_>, fresh: DataId) -> Result<Step, WireError> {
    match direction {
        Direction::IntoChild => into_child(view),
        Direction::IntoParent => into_parent(view, fresh),
    }
}

fn lies_on(node: &Node, on: DiskId) -> bool {
    matches!(node.parent, Parent::Layer { disk_id, .. } if disk_id == on)
}

fn holds(node: &Node, on: &Node) -> bool {
    let first = Parent::Layer { disk_id: on.disk_id, data_id: on.data_id };
    node.parent == first || lies_on(node, on.disk_id) && node.second_linkage == Some(on.data_id)
}

fn refuse(why: &str) -> WireError {
    WireError::new(ErrorKind::Refused, format!("merge layers: {why}"))
        .hint("the layers no longer form one disk; see `whimbrel volume check`")
}

fn into_child(view: &View<'_>) -> Result<Step, WireError> {
    let child = view.child.ok_or_else(|| refuse("the layer above is gone"))?;
    let Some(layer) = view.layer else { return Ok(Step::Done(child.disk_id)) };
    if !lies_on(child, layer.disk_id) {
        return match child.parent == layer.parent {
            true => Ok(Step::Remove(layer.disk_id)),
            false => Err(refuse(&format!("layer {} does not lie on {}", child.disk_id, layer.disk_id))),
        };
    }
    if !holds(child, layer) {
        return Err(refuse(&format!(
            "layer {} was made over another content of {} than {}",
            child.disk_id, layer.disk_id, layer.data_id
        )));
    }
    Ok(if view.copied { Step::Relink(child.disk_id, layer.parent) } else { Step::CopyUp })
}

fn into_parent(view: &View<'_>, fresh: DataId) -> Result<Step, WireError> {
    let layer = view.layer.ok_or_else(|| refuse("the layer below is gone"))?;
    let Some(child) = view.child else { return Ok(Step::Done(layer.disk_id)) };
    if !holds(child, layer) {
        return Err(refuse(&format!(
            "layer {} was made over another content of {} than {}",
            child.disk_id, layer.disk_id, layer.data_id
        )));
    }
    let Some(second) = child.second_linkage else { return Ok(Step::NameSecond(fresh)) };
    if layer.data_id != second {
        return Ok(Step::ReplaceId(second));
    }
    // One that was relinked proves that the copy was complete.
    let relinked = view.above.iter().any(|node| lies_on(node, layer.disk_id));
    if !view.copied && !relinked {
        return Ok(Step::CopyDown);
    }
    let left = view.above.iter().find(|node| lies_on(node, child.disk_id));
    Ok(match left {
        Some(node) => {
            let parent = Parent::Layer { disk_id: layer.disk_id, data_id: layer.data_id };
            Step::Relink(node.disk_id, parent)
        }
        None => Step::Remove(child.disk_id),
    })
}

#[cfg(test)]
mod test {
    use super::*;
    use crate::disk::identity::{Link, check_chain};
    use proptest::prelude::*;
    use std::collections::BTreeMap;

    const BLOCKS: usize = 12;

    /// What is on disk of a layer: its header, and its blocks.
    #[derive(Clone, Debug)]
    struct Layer {
        node: Node,
        blocks: [Option<u8>; BLOCKS],
    }

    type Disk = BTreeMap<DiskId, Layer>;

    fn id(number: u128) -> DiskId {
        DiskId::from_u128(number)
    }

    fn chain(disk: &Disk, top: DiskId) -> Vec<DiskId> {
        let (mut chain, mut at) = (vec![], Some(top));
        while let Some(layer) = at.and_then(|id| disk.get(&id)) {
            chain.push(layer.node.disk_id);
            at = match layer.node.parent {
                Parent::Layer { disk_id, .. } => Some(disk_id),
                _ => None,
            };
        }
        chain
    }

    /// Opens the chain as a host does, and reads it.
    fn read(disk: &Disk, top: DiskId) -> Result<Vec<u8>, WireError> {
        let chain = chain(disk, top);
        let links: Vec<Link> = chain
            .iter()
            .filter_map(|id| disk.get(id))
            .map(|layer| Link {
                file: String::new(),
                disk_id: layer.node.disk_id,
                data_id: layer.node.data_id,
                parent: layer.node.parent,
                second_linkage: layer.node.second_linkage,
                size_bytes: 4096,
                sector_bytes: 512,
            })
            .collect();
        check_chain(&links, None, 0)?;
        let value = |block: usize| {
            let found = chain.iter().filter_map(|id| disk.get(id)).find_map(|layer| layer.blocks[block]);
            found.unwrap_or(0)
        };
        Ok((0..BLOCKS).map(value).collect())
    }

    /// A copy step: each block is a change of its own.
    fn copy(disk: &mut Disk, from: DiskId, to: DiskId, keep: bool, blocks: usize) {
        let source = disk[&from].blocks;
        let target = disk.get_mut(&to).unwrap();
        for (value, slot) in source.iter().zip(&mut target.blocks).take(blocks) {
            if value.is_some() && !(keep && slot.is_some()) {
                *slot = *value;
            }
        }
    }

    #[derive(Clone, Debug)]
    struct Case {
        layers: Vec<[Option<u8>; BLOCKS]>,
        /// The layer that is removed.
        at: usize,
        into_parent: bool,
        /// Volumes on the child, beside the one on top.
        clones: usize,
        /// After how many steps the process dies, how far a copy had come then; again and again.
        crashes: Vec<(usize, usize)>,
        /// Blocks written by the guest between steps.
        writes: Vec<(usize, u8)>,
    }

    fn case() -> impl Strategy<Value = Case> {
        let blocks = proptest::array::uniform12(proptest::option::of(1..255u8));
        let layers = proptest::collection::vec(blocks, 3..6);
        let crashes = proptest::collection::vec((0..7usize, 0..=BLOCKS), 0..6);
        let writes = proptest::collection::vec((0..BLOCKS, 1..255u8), 0..20);
        (layers, any::<proptest::sample::Index>(), any::<bool>(), 0..3usize, crashes, writes).prop_map(
            |(layers, at, into_parent, clones, crashes, writes)| {
                // Into the parent there is a layer above the child.
                let most = if into_parent { layers.len() - 2 } else { layers.len() - 1 };
                Case { at: at.index(most), layers, into_parent, clones, crashes, writes }
            },
        )
    }

    struct Rig {
        disk: Disk,
        tops: Vec<DiskId>,
        oracle: BTreeMap<DiskId, Vec<u8>>,
        layer: DiskId,
        child: DiskId,
        direction: Direction,
        fresh: u128,
    }

    impl Rig {
        fn new(case: &Case) -> Self {
            let mut disk = Disk::new();
            let mut parent = Parent::None;
            for (blocks, n) in case.layers.iter().zip(1u128..) {
                let node =
                    Node { disk_id: id(n), data_id: DataId::from_u128(n), parent, second_linkage: None };
                parent = Parent::Layer { disk_id: node.disk_id, data_id: node.data_id };
                disk.insert(node.disk_id, Layer { node, blocks: *blocks });
            }
            let (layer, child) = (id(case.at as u128 + 1), id(case.at as u128 + 2));
            let mut tops = vec![id(case.layers.len() as u128)];
            // Clones lie on the child; if that is written itself, nothing can.
            let sealed = child != tops[0];
            for n in (100u128..).take(if sealed { case.clones } else { 0 }) {
                let on = Parent::Layer { disk_id: child, data_id: disk[&child].node.data_id };
                let node =
                    Node { disk_id: id(n), data_id: DataId::from_u128(n), parent: on, second_linkage: None };
                disk.insert(id(n), Layer { node, blocks: [None; BLOCKS] });
                tops.push(id(n));
            }
            let oracle = tops.iter().map(|top| (*top, read(&disk, *top).unwrap())).collect();
            let direction = if case.into_parent { Direction::IntoParent } else { Direction::IntoChild };
            Self { disk, tops, oracle, layer, child, direction, fresh: 1000 }
        }

        fn next(&mut self, copied: bool) -> Step {
            self.fresh += 1;
            let node = |id: DiskId| self.disk.get(&id).map(|layer| layer.node);
            let (layer, child) = (node(self.layer), node(self.child));
            let above: Vec<Node> = self
                .disk
                .values()
                .map(|layer| layer.node)
                .filter(|node| {
                    lies_on(node, self.child)
                        || self.direction == Direction::IntoParent
                            && lies_on(node, self.layer)
                            && node.disk_id != self.child
                })
                .collect();
            let view = View { layer: layer.as_ref(), child: child.as_ref(), above: &above, copied };
            next(self.direction, &view, DataId::from_u128(self.fresh)).unwrap()
        }

        fn apply(&mut self, step: Step, blocks: usize) {
            match step {
                Step::NameSecond(second) => {
                    self.disk.get_mut(&self.child).unwrap().node.second_linkage = Some(second);
                }
                Step::ReplaceId(new) => self.disk.get_mut(&self.layer).unwrap().node.data_id = new,
                Step::CopyUp => copy(&mut self.disk, self.layer, self.child, true, blocks),
                Step::CopyDown => copy(&mut self.disk, self.child, self.layer, false, blocks),
                Step::Relink(what, parent) => {
                    let node = &mut self.disk.get_mut(&what).unwrap().node;
                    (node.parent, node.second_linkage) = (parent, None);
                }
                Step::Remove(what) => {
                    assert!(!self.disk.values().any(|layer| lies_on(&layer.node, what)), "somebody needs it");
                    self.disk.remove(&what);
                }
                Step::Done(_) => {}
            }
        }

        fn verify(&self, what: &str) {
            for top in &self.tops {
                let now = read(&self.disk, *top).unwrap_or_else(|error| panic!("{what}: {error}"));
                assert_eq!(&now, &self.oracle[top], "{what}: disk {top}");
            }
        }

        fn write(&mut self, (block, value): (usize, u8)) {
            let top = self.tops[0];
            self.disk.get_mut(&top).unwrap().blocks[block] = Some(value);
            self.oracle.get_mut(&top).unwrap()[block] = value;
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig { cases: 600, ..ProptestConfig::default() })]
        /// At every step, with crashes anywhere, also in the middle of a copy, and a guest that writes all the while.
        #[test]
        fn a_merge_may_be_cut_off_anywhere_and_every_disk_reads_as_before(case in case()) {
            let mut rig = Rig::new(&case);
            let layers = rig.disk.len();
            let (mut crashes, mut writes) = (case.crashes.iter(), case.writes.iter());
            let mut crash = crashes.next();
            let (mut copied, mut since) = (false, 0);
            let mut ended = None;
            for _ in 0..200 {
                let step = rig.next(copied);
                if let Step::Done(stands) = step {
                    ended = Some(stands);
                    break;
                }
                if let Some((steps, blocks)) = crash.filter(|(steps, _)| *steps == since) {
                    // Cut off in the middle of a copy, or before any other step.
                    if matches!(step, Step::CopyUp | Step::CopyDown) {
                        rig.apply(step, *blocks);
                    }
                    rig.verify(&format!("crash in {step:?} after {steps} steps"));
                    (copied, since, crash) = (false, 0, crashes.next());
                    continue;
                }
                rig.apply(step, BLOCKS);
                copied |= matches!(step, Step::CopyUp | Step::CopyDown);
                rig.verify(&format!("after {step:?}"));
                if let Some(write) = writes.next() {
                    rig.write(*write);
                    rig.verify("after a write");
                }
                since += 1;
            }
            let expected = if case.into_parent { rig.layer } else { rig.child };
            prop_assert_eq!(ended, Some(expected));
            prop_assert_eq!(rig.disk.len(), layers - 1);
            prop_assert!(rig.disk.values().all(|layer| layer.node.second_linkage.is_none()));
        }
    }

    #[test]
    fn layers_that_are_no_disk_are_not_merged() {
        let node = |n: u128, parent| Node {
            disk_id: id(n),
            data_id: DataId::from_u128(n),
            parent,
            second_linkage: None,
        };
        let layer = node(1, Parent::None);
        let strange = node(2, Parent::Layer { disk_id: id(1), data_id: DataId::from_u128(9) });
        let elsewhere = node(3, Parent::Layer { disk_id: id(8), data_id: DataId::from_u128(1) });
        for child in [strange, elsewhere] {
            for direction in [Direction::IntoChild, Direction::IntoParent] {
                let view = View { layer: Some(&layer), child: Some(&child), above: &[], copied: true };
                let error = next(direction, &view, DataId::from_u128(5)).unwrap_err();
                assert_eq!(error.kind, ErrorKind::Refused);
            }
        }
    }

    #[test]
    fn less_is_copied_and_a_merge_goes_on_the_way_it_began() {
        let choice = Choice {
            layer_bytes: 10,
            child_bytes: 5,
            child_is_sealed: true,
            same_size: true,
            begun_into_parent: false,
        };
        assert_eq!(direction(&choice), Direction::IntoParent);
        for other in [
            Choice { child_is_sealed: false, ..choice },
            Choice { same_size: false, ..choice },
            Choice { child_bytes: 11, ..choice },
        ] {
            assert_eq!(direction(&other), Direction::IntoChild);
            assert_eq!(direction(&Choice { begun_into_parent: true, ..other }), Direction::IntoParent);
        }
    }
}
