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
//! Invariants
//! * The id is replaced, durably, **before** the first change that a reader could see after a writable open;
//!   a crash between any two steps never leaves changed data under the old id. It may leave a new id over
//!   unchanged data, which is safe and never undone.
//! * An epoch older than the newest one ever recorded opens nothing.
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
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Link {
    /// Identity.
    pub disk_id: DiskId,
    /// Identity of its content.
    pub data_id: DataId,
    /// What it says it lies on.
    pub parent: Parent,
}

/// Verifies a chain, writable layer first, over the image that was opened under it.
pub fn check_chain(links: &[Link], image: Option<ImageId>) -> Result<(), WireError> {
    let Some(top) = links.first() else {
        return Err(WireError::new(ErrorKind::InvalidInput, "open volume: an empty chain"));
    };
    let refuse = |why: String| {
        let error =
            WireError::new(ErrorKind::Refused, format!("open volume on layer {}: {why}", top.disk_id));
        Err(error.hint("the layers no longer form one disk; restore the parent it was made on"))
    };
    if links.len() > CHAIN_MAX {
        return refuse(format!("{} layers, at most {CHAIN_MAX} are allowed", links.len()));
    }
    for (at, link) in links.iter().enumerate() {
        let below = links.get(at + 1);
        if links.iter().skip(at + 1).any(|other| other.disk_id == link.disk_id) {
            return refuse(format!("layer {} lies under itself", link.disk_id));
        }
        match (link.parent, below) {
            (Parent::Layer { disk_id, data_id }, Some(parent)) => {
                if parent.disk_id != disk_id {
                    return refuse(format!(
                        "layer {} lies on layer {disk_id}, not on {}",
                        link.disk_id, parent.disk_id
                    ));
                }
                if parent.data_id != data_id {
                    return refuse(format!(
                        "layer {} was made over content {data_id} of layer {disk_id}, which now has {}",
                        link.disk_id, parent.data_id
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
        Link { disk_id: DiskId::from_u128(disk), data_id: DataId::from_u128(data), parent }
    }

    fn on(disk: u128, data: u128) -> Parent {
        Parent::Layer { disk_id: DiskId::from_u128(disk), data_id: DataId::from_u128(data) }
    }

    #[test]
    fn a_whole_chain_opens() {
        let chain = [link(1, 10, on(2, 20)), link(2, 20, on(3, 30)), link(3, 30, Parent::Image(IMAGE))];
        check_chain(&chain, Some(IMAGE)).unwrap();
        check_chain(&[link(1, 10, Parent::None)], None).unwrap();
    }

    #[test]
    fn a_chain_that_no_longer_is_one_disk_is_refused_and_both_ids_are_named() {
        let changed = [link(1, 10, on(2, 20)), link(2, 21, Parent::None)];
        let error = check_chain(&changed, None).unwrap_err();
        assert_eq!(error.kind, ErrorKind::Refused);
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
            assert!(check_chain(&chain, image).is_err(), "{chain:?}");
        }
        let long: Vec<Link> = (0..=CHAIN_MAX as u128).map(|n| link(n, n, on(n + 1, n + 1))).collect();
        assert!(check_chain(&long, None).unwrap_err().message.contains("layers"));
    }

    #[test]
    fn an_old_epoch_or_a_half_received_layer_does_not_open() {
        let id = DiskId::from_u128(1);
        let open = |state, recorded, asked, writable| {
            may_open(id, &state, Epoch(recorded), Epoch(asked), writable).map_err(|error| error.kind)
        };
        assert_eq!(open(State::Ready, 3, 3, true), Ok(()));
        assert_eq!(open(State::Ready, 3, 4, true), Ok(()));
        assert_eq!(open(State::Pulling, 3, 4, true), Ok(()));
        assert_eq!(open(State::Ready, 3, 2, true), Err(ErrorKind::Refused));
        assert_eq!(open(State::Ready, 3, 2, false), Ok(()));
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
