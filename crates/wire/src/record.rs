//! On-disk records: layers of volumes, manifests and packs of images, the cache's bitmaps; and VHDX, a format of others.
//!
//! Each file's module is its specification, with a version and a rule for unknown ones.

pub mod image;
pub mod layer;
pub mod vhdx;
pub mod vm;
