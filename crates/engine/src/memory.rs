//! Memory on the move: when to stop copying and pause ([`precopy`]), how the guest's writes are followed ([`page_group`]).

pub mod page_group;
pub mod precopy;
