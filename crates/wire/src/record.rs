//! On-disk records: layers of volumes, manifests and packs of images, the cache's bitmaps.
//!
//! Each file's module is its specification, with a version and a rule for unknown ones.

pub mod image;
pub mod layer;
pub mod vm;
