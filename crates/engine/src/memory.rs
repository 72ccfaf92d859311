//! Memory on the move: when to stop copying and pause ([`precopy`]), how the guest's writes are followed ([`page_group`]), what
//! changes how often ([`rank`]), which link carries what ([`link_plan`]), which versions of pages are kept so that changes to them
//! can be sent ([`delta`]), which pages are named instead of sent ([`mod@reference`]).

pub mod delta;
pub mod link_plan;
pub mod page_group;
pub mod precopy;
pub mod rank;
pub mod reference;

/// A page of a guest's memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PageId {
    /// The RAM block, by its number in the move.
    pub block: u16,
    /// The page's number in the block.
    pub page: u32,
}
