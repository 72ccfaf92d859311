//! Memory on the move: when to stop copying and pause ([`precopy`]), what changes how often ([`rank`]), which link carries what
//! ([`link_plan`]).

pub mod link_plan;
pub mod precopy;
pub mod rank;
