//! Images: where each block is read from.

pub mod read;
