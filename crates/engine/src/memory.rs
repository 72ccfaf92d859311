//! Memory on the move.

pub mod precopy;
