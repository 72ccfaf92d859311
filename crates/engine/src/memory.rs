//! Memory on the move: when to stop copying and pause ([`precopy`]), which versions of pages are kept so that changes to
//! them can be sent ([`delta`]), which pages are named instead of sent ([`reference`]).

pub mod delta;
pub mod precopy;
pub mod reference;

/// A page of a guest's memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PageId {
    /// The RAM block, by its number in the move.
    pub block: u16,
    /// The page's number in the block.
    pub page: u32,
}
