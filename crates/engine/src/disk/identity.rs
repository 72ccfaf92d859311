//! Capability 12: identity and linkage of virtual disks.
//!
//! ```text
//!              open writable                first write
//!   (closed) ───────────────► Clean(id) ──────────────────► id replaced, durable ──► Changed: writes pass
//! ```
//!
//! A layer holds a `data_id`: the identity of what its readers see. A child holds a copy of its parent's. Whoever
//! changes the parent behind the child's back changes the id first, so a mismatch proves that parent and child no
//! longer form a disk, and the chain refuses to open.
//!
//! A link holds if the child's copy is the parent's id, or the child's *second linkage* is: that one is set while the
//! child is merged into its parent ([`super::merge`]).
//!
//! Invariants
//! * The id is replaced, durably, **before** the first change that a reader could see after a writable open;
//!   a crash between any two steps never leaves changed data under the old id. It may leave a new id over
//!   unchanged data, which is safe and never undone.
//! * An epoch older than the newest one ever recorded opens nothing.
//! * A sealed layer, which others may lie on, is not opened for writing.
//!
//! Not here: making anything durable (`host::disk`).

use whimbrel_wire::record::layer::{Parent, State};
use whimbrel_wire::{DataId, DiskId, Epoch, ErrorKind, ImageId, WireError};

/// The longest chain that opens.
pub const CHAIN_MAX: usize = 64;

/// One writable session's part of the rule.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Session {
    /// Nothing visible was written yet.
    #[default]
    Clean,
    /// The id is new and durable.
    Changed,
}

/// What must happen before a visible write.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Before {
    /// Write.
    Go,
    /// Make this id durable in the header, call [`Session::id_is_durable`], then write.
    Replace(DataId),
}

impl Session {
    /// Called before every write that a reader could see. `fresh` is a random id, used if one is needed.
    pub fn before_visible_write(self, fresh: DataId) -> Before {
        match self {
            Self::Clean => Before::Replace(fresh),
            Self::Changed => Before::Go,
        }
    }

    /// The replaced id is on stable storage.
    pub fn id_is_durable(&mut self) {
        *self = Self::Changed;
    }
}

/// Whether a layer in this state may be opened at `epoch`.
pub fn may_open(
    disk_id: DiskId,
    state: &State,
    recorded: Epoch,
    asked: Epoch,
    writable: bool,
) -> Result<(), WireError> {
    if let State::Receiving(_) = state {
        return Err(WireError::new(
            ErrorKind::Refused,
            format!("open layer {disk_id}: it is still being received"),
        )
        .hint("let the move finish, or remove the layer and move again"));
    }
    if writable && *state == State::Sealed {
        return Err(WireError::new(
            ErrorKind::Refused,
            format!("open layer {disk_id} for writing: it is a snapshot, and others may lie on it"),
        )
        .hint(
            "make a volume from it, and write that one: `whimbrel volume create NAME --from VOLUME@SNAPSHOT`",
        ));
    }
    if writable && asked < recorded {
        return Err(WireError::new(
            ErrorKind::Refused,
            format!("open layer {disk_id}: epoch {asked} is too old, {recorded} has been here"),
        )
        .hint("another holder has the right to write this volume; see `whimbrel volume show`"));
    }
    Ok(())
}

/// What chain opening needs to know of one layer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Link {
    /// Where it was found, for people.
    pub file: String,
    /// Identity.
    pub disk_id: DiskId,
    /// Identity of its content.
    pub data_id: DataId,
    /// What it says it lies on.
    pub parent: Parent,
    /// The other content that its parent may have.
    pub second_linkage: Option<DataId>,
    /// Size of the disk, bytes.
    pub size_bytes: u64,
    /// Logical sector, bytes.
    pub sector_bytes: u32,
}

impl Link {
    /// Whether this layer was made over that content of its parent.
    pub fn holds(&self, parent_data_id: DataId) -> bool {
        let first = matches!(self.parent, Parent::Layer { data_id, .. } if data_id == parent_data_id);
        first || matches!(self.parent, Parent::Layer { .. }) && self.second_linkage == Some(parent_data_id)
    }
}

/// Verifies a chain, writable layer first, over the image that was opened under it: every link, cycles, depth, sizes and
/// sectors. `image_bytes` is the image's size, 0 if it is not known.
pub fn check_chain(links: &[Link], image: Option<ImageId>, image_bytes: u64) -> Result<(), WireError> {
    let Some(top) = links.first() else {
        return Err(WireError::new(ErrorKind::InvalidInput, "open volume: an empty chain"));
    };
    let refuse = |why: String| {
        let error =
            WireError::new(ErrorKind::Refused, format!("open volume on layer {}: {why}", top.disk_id));
        Err(error.hint(
            "the layers no longer form one disk: restore the parent it was made on, or say that what is there now is \
             wanted (`whimbrel volume relink`)",
        ))
    };
    if links.len() > CHAIN_MAX {
        return refuse(format!("{} layers, at most {CHAIN_MAX} are allowed", links.len()));
    }
    for (at, link) in links.iter().enumerate() {
        let below = links.get(at + 1);
        if links.iter().skip(at + 1).any(|other| other.disk_id == link.disk_id) {
            return refuse(format!("layer {} lies under itself ({})", link.disk_id, link.file));
        }
        if let Some(parent) = below {
            if parent.sector_bytes != link.sector_bytes {
                return refuse(format!(
                    "layer {} has sectors of {} bytes, and {} under it of {} ({})",
                    link.disk_id, link.sector_bytes, parent.disk_id, parent.sector_bytes, parent.file
                ));
            }
            if parent.size_bytes > link.size_bytes {
                return refuse(format!(
                    "layer {} of {} bytes is smaller than {} under it, of {} ({})",
                    link.disk_id, link.size_bytes, parent.disk_id, parent.size_bytes, parent.file
                ));
            }
        } else if image_bytes.next_multiple_of(512) > link.size_bytes {
            return refuse(format!(
                "layer {} of {} bytes is smaller than the image under it, of {image_bytes} ({})",
                link.disk_id, link.size_bytes, link.file
            ));
        }
        match (link.parent, below) {
            (Parent::Layer { disk_id, data_id }, Some(parent)) => {
                if parent.disk_id != disk_id {
                    return refuse(format!(
                        "layer {} lies on layer {disk_id}, not on {} ({})",
                        link.disk_id, parent.disk_id, parent.file
                    ));
                }
                if !link.holds(parent.data_id) {
                    return refuse(format!(
                        "layer {} was made over content {data_id} of layer {disk_id}, which now has {} ({})",
                        link.disk_id, parent.data_id, parent.file
                    ));
                }
            }
            (Parent::Layer { disk_id, .. }, None) => {
                return refuse(format!("its parent layer {disk_id} is missing"));
            }
            (Parent::Image(id), None) if image != Some(id) => {
                let found = image.map_or_else(|| "no image".to_owned(), |image| format!("image {image}"));
                return refuse(format!("layer {} lies on image {id}, {found} was opened", link.disk_id));
            }
            (Parent::None, None) if image.is_some() => {
                return refuse(format!("layer {} lies on nothing, an image was opened", link.disk_id));
            }
            (Parent::Image(_) | Parent::None, Some(_)) => {
                return refuse(format!("layer {} does not lie on another layer", link.disk_id));
            }
            (Parent::Image(_) | Parent::None, None) => {}
        }
    }
    Ok(())
}

#[cfg(test)]
mod test {
    use super::*;
    use proptest::prelude::*;
    use whimbrel_wire::record::layer::ShipPosition;

    const IMAGE: ImageId = ImageId([7; 32]);

    fn link(disk: u128, data: u128, parent: Parent) -> Link {
        Link {
            file: format!("/volumes/{disk}"),
            disk_id: DiskId::from_u128(disk),
            data_id: DataId::from_u128(data),
            parent,
            second_linkage: None,
            size_bytes: 1 << 20,
            sector_bytes: 512,
        }
    }

    fn on(disk: u128, data: u128) -> Parent {
        Parent::Layer { disk_id: DiskId::from_u128(disk), data_id: DataId::from_u128(data) }
    }

    #[test]
    fn a_whole_chain_opens() {
        let chain = [link(1, 10, on(2, 20)), link(2, 20, on(3, 30)), link(3, 30, Parent::Image(IMAGE))];
        check_chain(&chain, Some(IMAGE), 1 << 20).unwrap();
        check_chain(&[link(1, 10, Parent::None)], None, 0).unwrap();
        // While the first is merged into the second, either content of the second will do.
        let [first, second, third] = chain;
        for now in [20, 21] {
            let first = Link { second_linkage: Some(DataId::from_u128(21)), ..first.clone() };
            let second = Link { data_id: DataId::from_u128(now), ..second.clone() };
            check_chain(&[first, second, third.clone()], Some(IMAGE), 0).unwrap();
        }
        let grown = Link { size_bytes: 2 << 20, ..first };
        check_chain(&[grown, second, third], Some(IMAGE), 0).unwrap();
    }

    #[test]
    fn a_chain_that_no_longer_is_one_disk_is_refused_and_both_ids_are_named() {
        let changed = [link(1, 10, on(2, 20)), link(2, 21, Parent::None)];
        let error = check_chain(&changed, None, 0).unwrap_err();
        assert_eq!(error.kind, ErrorKind::Refused);
        assert!(error.message.contains("/volumes/2"), "{error}");
        for id in [DataId::from_u128(20), DataId::from_u128(21)] {
            assert!(error.message.contains(&id.to_string()), "{error}");
        }
        let image = Parent::Image(IMAGE);
        let other = Some(ImageId([8; 32]));
        for (chain, image) in [
            (vec![], None),
            (vec![link(1, 10, on(2, 20))], None),
            (vec![link(1, 10, on(2, 20)), link(3, 20, Parent::None)], None),
            (vec![link(1, 10, on(1, 10)), link(1, 10, Parent::None)], None),
            (vec![link(1, 10, image)], other),
            (vec![link(1, 10, image)], None),
            (vec![link(1, 10, Parent::None)], other),
            (vec![link(1, 10, image), link(2, 20, Parent::None)], None),
        ] {
            assert!(check_chain(&chain, image, 0).is_err(), "{chain:?}");
        }
        let long: Vec<Link> = (0..=CHAIN_MAX as u128).map(|n| link(n, n, on(n + 1, n + 1))).collect();
        assert!(check_chain(&long, None, 0).unwrap_err().message.contains("layers"));
        // Off by one sector, and other sectors.
        for parent in [
            Link { size_bytes: (1 << 20) + 512, ..link(2, 20, Parent::None) },
            Link { sector_bytes: 4096, ..link(2, 20, Parent::None) },
        ] {
            let error = check_chain(&[link(1, 10, on(2, 20)), parent], None, 0).unwrap_err();
            assert!(error.message.contains("/volumes/2"), "{error}");
        }
        assert!(check_chain(&[link(1, 10, image)], Some(IMAGE), (1 << 20) + 1).is_err());
        // A second linkage is for a parent layer only.
        let odd = Link { second_linkage: Some(DataId::from_u128(20)), ..link(1, 10, Parent::None) };
        assert!(!odd.holds(DataId::from_u128(20)));
    }

    #[test]
    fn an_old_epoch_a_snapshot_or_a_half_received_layer_does_not_open() {
        let id = DiskId::from_u128(1);
        let open = |state, recorded, asked, writable| {
            may_open(id, &state, Epoch(recorded), Epoch(asked), writable).map_err(|error| error.kind)
        };
        assert_eq!(open(State::Ready, 3, 3, true), Ok(()));
        assert_eq!(open(State::Ready, 3, 4, true), Ok(()));
        assert_eq!(open(State::Pulling, 3, 4, true), Ok(()));
        assert_eq!(open(State::Ready, 3, 2, true), Err(ErrorKind::Refused));
        assert_eq!(open(State::Ready, 3, 2, false), Ok(()));
        assert_eq!(open(State::Sealed, 3, 9, true), Err(ErrorKind::Refused));
        assert_eq!(open(State::Sealed, 3, 2, false), Ok(()));
        assert_eq!(open(State::Receiving(ShipPosition::START), 3, 3, false), Err(ErrorKind::Refused));
    }

    /// What a crash leaves: the durable id and the durable content (a number that each write changes).
    #[derive(Clone, Copy, PartialEq)]
    struct Disk {
        id: DataId,
        content: u64,
    }

    proptest! {
        /// Sessions of writes with a crash after any step: whoever remembers (id, content) never sees the
        /// same id over other content.
        #[test]
        fn a_crash_between_any_two_steps_never_leaves_changed_data_under_the_old_id(
            sessions in proptest::collection::vec((0..4u8, proptest::option::of(0..9usize)), 1..12)
        ) {
            let mut disk = Disk { id: DataId::from_u128(0), content: 0 };
            let mut fresh = 0u128;
            for (writes, crash_after) in sessions {
                let child = disk;
                let mut session = Session::default();
                let mut steps = 0;
                let crashed = |steps: &mut usize| { *steps += 1; Some(*steps) == crash_after };
                'session: for _ in 0..writes {
                    fresh += 1;
                    if let Before::Replace(id) = session.before_visible_write(DataId::from_u128(fresh)) {
                        prop_assert!(disk == child, "data changed before the id");
                        if crashed(&mut steps) { break 'session; }
                        disk.id = id;
                        if crashed(&mut steps) { break 'session; }
                        session.id_is_durable();
                    }
                    disk.content += 1;
                    if crashed(&mut steps) { break 'session; }
                }
                prop_assert!(disk.content == child.content || disk.id != child.id);
            }
        }
    }
}
