//! Virtual disks: identity and linkage of layers, which block is where, and what VHDX files say.

pub mod extent_map;
pub mod identity;
pub mod merge;
pub mod pressure;
pub mod reclaim;
pub mod resize;
pub mod vhdx;
