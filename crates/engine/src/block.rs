//! Blocks of any object: how each is encoded for its way.

pub mod encode;
