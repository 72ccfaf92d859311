//! Layers and volumes on this host.
//!
//! ```text
//!  export, guest ──► Volume ──► Layer ──► (parent Layer ──►) image, or zeros
//!                               │ append: one pwritev, then the map        read: map, then preadv
//!                               └ flush: one fdatasync for all who wait
//! ```
//!
//! * [`Layer`]: the writable part: a log, a map in RAM, checkpoints. Format: `wire::record::layer`.
//! * [`LayerReceiver`], [`Layer::read_ship`]: a layer on its way to another host while it is written.
//! * [`Pull`]: a layer that is used here while its blocks are still at another host.
//! * [`VolumeDir`]: where layers live, and how a chain of them opens.
//! * [`Merge`]: a layer taken out of a chain while the disk above it is in use.
//!
//! Invariants
//! * A flush that returned survives the end of the process and of power; after an error of `fdatasync` a layer never
//!   takes another write, because the kernel has dropped the pages and a second try would lie.
//! * Nothing is overwritten in place; a full disk fails the write that did not fit and nothing else.
//! * What a writer did is visible to every later read as soon as the write returned.
//! * Writes carry the epoch of the handle; a fenced handle writes nothing more.
//!
//! Not here: who may open what (`engine::disk::identity`), where images come from (`store`), guests' protocols
//! (`export`).

mod append;
mod background;
mod chain;
mod check;
mod checkpoint;
mod files;
mod grow;
mod header_file;
mod layer;
mod merge;
mod neighbour;
mod pull;
mod receive;
mod recover;
mod ship;
mod slices;
mod spec;
mod volume;

pub use background::{ReclaimHold, Reclaimed};
pub use chain::Relinked;
pub use check::{Report, check};
pub use layer::{Layer, remove};
pub use merge::{Merge, MergePlan};
pub use pull::{FetchRange, Pull, PullProgress, RemoteLayer, Urgency};
pub use receive::{LayerReceiver, Received};
pub use ship::{ShipEnd, ShipSeal};
pub use spec::{LayerInfo, LayerSpec};
pub use volume::{BaseImage, VolumeDir, VolumeSpec};

#[cfg(test)]
mod test;
