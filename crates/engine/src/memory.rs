//! Memory on the move: when to stop copying and pause ([`precopy`]).

pub mod precopy;
