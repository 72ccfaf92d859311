//! Virtual disks: identity and linkage of layers, and which block is where.

pub mod extent_map;
pub mod identity;
