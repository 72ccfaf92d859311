//! Virtual disks: identity and linkage of layers.

pub mod identity;
